package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// fingerprints is what comparing all tenants with their migrations took at each number of them.
type fingerprints []struct {
	tenants int
	took    time.Duration
	found   string // the last line that the command told
}

const fingerprintRuns = 5

var driftCommand = regexp.MustCompile(`(?m)^\s+drift\s`)

// fingerprint measures `oneo migrate drift --all-tenants`, the whole command.
func (f *fleet) fingerprint(ctx context.Context, to *fingerprints) error {
	help, err := exec.CommandContext(ctx, f.b.binary, "migrate", "--help").Output()
	if err != nil {
		return err
	}
	if !driftCommand.Match(help) {
		f.b.printf("(Fingerprints were not measured: this oneo has no `migrate drift`.)\n")
		return nil
	}
	var all []time.Duration
	found := ""
	for range fingerprintRuns {
		cmd := exec.CommandContext(ctx, f.b.binary, "migrate", "drift", "--all-tenants", "--schemas", f.dir)
		cmd.Env = f.environment()
		start := time.Now()
		text, err := cmd.CombinedOutput()
		// Drift that was found has an exit code of its own; here nothing has been planted.
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 13) {
			return fmt.Errorf("migrate drift: %w: %s", err, tail(text))
		}
		all = append(all, time.Since(start))
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		found = lines[len(lines)-1]
	}
	*to = append(*to, fingerprints{{len(f.slugs), median(all), found}}...)
	return nil
}

func (all fingerprints) print(f *fleet) {
	if len(all) == 0 {
		return
	}
	f.b.printf("### Fingerprints\n")
	f.b.printf("`oneo migrate drift --all-tenants`, the whole command (median of %d): every tenant's catalog compared with the migrations.\n", fingerprintRuns)
	f.b.printf("| tenants | s | ms a tenant | it said |\n| --- | --- | --- | --- |")
	for _, p := range all {
		f.b.printf("| %d | %.2f | %.2f | %s |", p.tenants, p.took.Seconds(), ms(p.took)/float64(p.tenants), strings.ReplaceAll(p.found, "|", `\|`))
	}
	f.b.printf("\nGoal: to state the time.\n")
}
