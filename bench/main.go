// Command bench measures what oneo promises, side by side with what it is measured against, in one run, and prints the
// tables of docs/benchmarks.md. It starts a PostgreSQL and a Redis of its own and stops them.
package main

import (
	"context"
	"encoding/base64"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/devstack"
)

func main() {
	only := flag.String("only", "create,claim,read,metrics,neighbours,fleet,archives,recovery", "what to measure, separated by commas; fleet is "+strings.Join(fleetParts, ",")+", archives is "+strings.Join(archiveParts, ",")+"; tracing and dashboard are measured only when they are named, and share their tenants with metrics")
	few := flag.Int("few", 120, "the small number of tenants that are read")
	fleet := flag.Int("fleet", 1000, "the number of tenants that are migrated; some of it is measured at a tenth too")
	many := flag.Int("many", 5000, "the large number of tenants")
	jobs := flag.Int("jobs", 0, "tenants that are migrated at one time; 0: oneo's own choice, and live is measured with a run that yields")
	ways := flag.String("ways", "", "a regular expression: of the ways to read, only those are measured whose names it matches, beside the floor")
	duration := flag.Duration("duration", 10*time.Second, "how long each contender is measured")
	mode := flag.String("floor", "", "internal: run as the floor or the naive server")
	url := flag.String("floor-url", "", "internal")
	addr := flag.String("floor-addr", "", "internal")
	schema := flag.String("floor-schema", "", "internal")
	peak := flag.Bool("peak", false, "internal: run the arguments as a command and tell its peak memory")
	flag.Parse()
	var err error
	switch {
	case *mode != "":
		err = serveFloor(*mode, *url, *addr, *schema)
	case *peak:
		err = tellPeak(flag.Args())
	default:
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		err = run(ctx, strings.Split(*only, ","), *ways, *few, *fleet, *many, *jobs, *duration)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only []string, ways string, few, fleet, many, jobs int, d time.Duration) error {
	for _, part := range only {
		if part == "fleet" {
			only = append(only, fleetParts...)
		} else if part == "archives" {
			only = append(only, archiveParts...)
		} else if !slices.Contains(slices.Concat([]string{"create", "claim", "read", "neighbours", "recovery"}, sightParts, fleetParts, archiveParts), part) {
			return fmt.Errorf("-only: there is no %q", part)
		}
	}
	matching, err := regexp.Compile(ways)
	if err != nil {
		return fmt.Errorf("-ways: %w", err)
	}
	dir, err := os.MkdirTemp("", "oneo-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	b := &bench{dir: dir, jobs: jobs, binary: filepath.Join(dir, "oneo"), duration: d, ways: matching, out: os.Stdout}
	if err := build(ctx, b.binary, "nomsgpack"); err != nil {
		return err
	}
	b.pg, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Settings: map[string]string{
		"shared_buffers": "2GB", "max_connections": "200", "max_locks_per_transaction": "256", "max_wal_size": "8GB",
		"autovacuum": "on", "password_encryption": "scram-sha-256",
	}})
	if err != nil {
		return err
	}
	defer b.pg.Stop(context.WithoutCancel(ctx))
	if b.redis, err = devstack.StartRedis(ctx, devstack.RedisOptions{Dir: dir}); err != nil {
		return err
	}
	defer b.redis.Stop(context.WithoutCancel(ctx))

	b.printf("Machine: %s\n", machine())
	if slices.Contains(only, "create") {
		if err := b.create(ctx, 200); err != nil {
			return err
		}
	}
	if slices.Contains(only, "claim") {
		if err := b.claim(ctx, 200); err != nil {
			return err
		}
	}
	if slices.Contains(only, "read") {
		if err := b.reads(ctx, few, many); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(only, func(part string) bool { return slices.Contains(sightParts, part) }) {
		if err := b.sight(ctx, only, few, many); err != nil {
			return err
		}
	}
	if slices.Contains(only, "neighbours") {
		if err := b.neighbours(ctx); err != nil {
			return err
		}
	}
	if slices.Contains(only, "recovery") {
		if err := b.recovery(ctx); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(only, func(part string) bool { return slices.Contains(fleetParts, part) }) {
		if err := b.fleets(ctx, only, fleet, many); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(only, func(part string) bool { return slices.Contains(archiveParts, part) }) {
		return b.archives(ctx, only, fleet, many)
	}
	return nil
}

// build makes the binary with build tags.
func build(ctx context.Context, binary, tags string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-tags", tags, "-trimpath", "-o", binary, "./cmd/oneo")
	cmd.Dir = ".."
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, text)
	}
	return nil
}

func sessionToken(sum [32]byte) string { return "ons_" + base64.RawURLEncoding.EncodeToString(sum[:]) }

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(all []time.Duration) time.Duration {
	slices.Sort(all)
	return all[len(all)/2]
}

func machine() string {
	cpu, _ := exec.Command("sh", "-c", "nproc; grep -m1 'model name' /proc/cpuinfo | cut -d: -f2; free -g | awk '/Mem/{print $2}'").Output()
	f := strings.Split(strings.TrimSpace(string(cpu)), "\n")
	if len(f) < 3 {
		return "unknown"
	}
	return fmt.Sprintf("%s cores (%s), %s GiB, client and servers together", f[0], strings.TrimSpace(f[1]), f[2])
}
