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
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func main() {
	only := flag.String("only", "create,read,pending", "what to measure, separated by commas")
	many := flag.Int("tenants", 5000, "the large number of tenants")
	few := flag.Int("few", 120, "the small number of tenants")
	ways := flag.String("ways", "", "a regular expression: of the ways to read, only those are measured whose names it matches, beside the floor")
	duration := flag.Duration("duration", 10*time.Second, "how long each contender is measured")
	mode := flag.String("floor", "", "internal: run as the floor or the naive server")
	url := flag.String("floor-url", "", "internal")
	addr := flag.String("floor-addr", "", "internal")
	schema := flag.String("floor-schema", "", "internal")
	flag.Parse()
	var err error
	if *mode != "" {
		err = serveFloor(*mode, *url, *addr, *schema)
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
		err = run(ctx, strings.Split(*only, ","), *ways, *few, *many, *duration)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only []string, ways string, few, many int, d time.Duration) error {
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
	b := &bench{dir: dir, binary: filepath.Join(dir, "oneo"), duration: d, ways: matching, out: os.Stdout}
	build := exec.CommandContext(ctx, "go", "build", "-tags", "nomsgpack", "-trimpath", "-o", b.binary, "./cmd/oneo")
	build.Dir = ".."
	if text, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w: %s", err, text)
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
	if !slices.Contains(only, "read") && !slices.Contains(only, "pending") {
		return nil
	}
	return b.fleets(ctx, only, few, many)
}

// fleets grows one installation from few to many tenants, and measures at both sizes.
func (b *bench) fleets(ctx context.Context, only []string, few, many int) error {
	in, err := b.install(ctx, "bench_role", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	if err := in.grow(ctx, few); err != nil {
		return err
	}
	var atFew, atMany time.Duration
	if slices.Contains(only, "pending") {
		if atFew, err = in.pending(ctx); err != nil {
			return err
		}
	}
	if slices.Contains(only, "read") {
		schema, err := b.install(ctx, "bench_schema", postgres.BySchema, 8)
		if err != nil {
			return err
		}
		if err := schema.grow(ctx, few); err != nil {
			return err
		}
		if err := in.read(ctx, []contender{
			{"floor", false, in.floor("floor")},
			{"oneo, gate and role", false, func(ctx context.Context) (*process, error) { return in.serve(ctx) }},
			{"naive: begin, set local search_path, query, commit", false, in.floor("naive")},
			{"oneo, no statement of a tenant's own", false, func(ctx context.Context) (*process, error) { return in.serve(ctx, "ONEO_DATABASE_HOT_STATEMENTS=0") }},
		}); err != nil {
			return err
		}
		if err := schema.read(ctx, []contender{
			{"floor", false, schema.floor("floor")},
			{"oneo, isolation: schema", false, func(ctx context.Context) (*process, error) { return schema.serve(ctx) }},
		}); err != nil {
			return err
		}
	}
	start := time.Now()
	if err := in.grow(ctx, many); err != nil {
		return err
	}
	b.printf("(%d tenants with 50 records each were made in %s.)\n", many-few, time.Since(start).Round(time.Second))
	if slices.Contains(only, "pending") {
		if atMany, err = in.pending(ctx); err != nil {
			return err
		}
		b.printf("### `oneo migrate --all-tenants` with nothing pending, the whole command\n")
		b.printf("| tenants | ms (median of 15) | of the first |\n| --- | --- | --- |")
		b.printf("| %d | %.1f | 1.00 |\n| %d | %.1f | **%.2f** |\n", few, ms(atFew), many, ms(atMany), float64(atMany)/float64(atFew))
	}
	if slices.Contains(only, "read") {
		oneo := func(more ...string) func(context.Context) (*process, error) {
			return func(ctx context.Context) (*process, error) { return in.serve(ctx, more...) }
		}
		return in.read(ctx, []contender{
			{"floor", false, in.floor("floor")},
			{"oneo, uniform", false, oneo()},
			{"oneo, Zipf 1.1", true, oneo()},
			{"oneo, uniform, the cap reached (backends of at most 24 MB)", false, oneo("ONEO_DATABASE_BACKEND_MEMORY=24MB")},
			{"naive, uniform", false, in.floor("naive")},
		})
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
