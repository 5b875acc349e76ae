package main

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"
)

// examinations is what looking the whole fleet over took at each number of tenants.
type examinations []struct {
	tenants     int
	took, quick time.Duration
	found       string // the line in which the command counts, and what was wrong
}

const doctorRuns = 5

// examine measures `oneo doctor`, the whole command, and without what is long.
func (f *fleet) examine(ctx context.Context, to *examinations) error {
	run := func(args ...string) (time.Duration, string, error) {
		var all []time.Duration
		found := ""
		for range doctorRuns {
			cmd := exec.CommandContext(ctx, f.b.binary, append([]string{"doctor", "--schemas", f.dir}, args...)...)
			cmd.Env = f.environment()
			start := time.Now()
			text, err := cmd.CombinedOutput()
			// The distribution's server may lack fixes, or its disk room: the exit code for what is wrong is 13.
			var exit *exec.ExitError
			if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 13) {
				return 0, "", fmt.Errorf("doctor: %w: %s", err, tail(text))
			}
			all = append(all, time.Since(start))
			var wrong []string
			for line := range strings.Lines(string(text)) {
				if of := strings.Fields(line); len(of) > 2 && of[1] == "fail" {
					wrong = append(wrong, of[2])
				}
				if strings.HasSuffix(strings.TrimSpace(line), " left out") {
					found = strings.TrimSpace(line)
				}
			}
			if len(wrong) > 0 {
				found += " (" + strings.Join(wrong, ", ") + ")"
			}
		}
		return median(all), found, nil
	}
	took, found, err := run()
	if err != nil {
		return err
	}
	quick, _, err := run("--quick")
	if err != nil {
		return err
	}
	*to = append(*to, examinations{{len(f.slugs), took, quick, found}}...)
	return nil
}

func (all examinations) print(f *fleet) {
	if len(all) == 0 {
		return
	}
	f.b.printf("### oneo doctor\n")
	f.b.printf("The whole command (median of %d), and with `--quick`.\n", doctorRuns)
	f.b.printf("| tenants | s | s, quick | it said |\n| --- | --- | --- | --- |")
	for _, p := range all {
		f.b.printf("| %d | %.2f | %.2f | %s |", p.tenants, p.took.Seconds(), p.quick.Seconds(), p.found)
	}
	f.b.printf("\nGoal: seconds, stated.\n")
}
