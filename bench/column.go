package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"
)

const columnRounds = 3

// column compares ways to add one column to every tenant. Each adds columns of its own, which are dropped before the next
// has its turn; who is first changes from round to round.
func (f *fleet) column(ctx context.Context) error {
	var fsync, commit string
	err := f.asSuperuser(ctx, func(c *pgx.Conn) error {
		return c.QueryRow(ctx, `select current_setting('fsync'), current_setting('synchronous_commit')`).Scan(&fsync, &commit)
	})
	if err != nil {
		return err
	}
	type way struct {
		name string
		add  func(ctx context.Context, jobs int) (column string, took time.Duration, err error)
	}
	ways := []way{{"psql", f.columnByPsql}, {"oneo", f.columnByOneo("--force")}, {"oneo, the linter first", f.columnByOneo()}}
	for _, t := range tools {
		if t.name == "golang-migrate" { // beside goose and tern it tells nothing new, and takes the longest
			continue
		}
		if err := t.overAll(ctx, f, t.files(f.base), f.jobs); err != nil {
			return err
		}
		ways = append(ways, way{t.name, f.columnByTool(t)})
	}
	type row struct {
		took   []time.Duration
		ratios []float64 // psql's time of the same round by this
	}
	f.b.printf("### One added column on %d tenants\n", len(f.slugs))
	f.b.printf("Median of %d turns; psql: J processes, each a script of its share with a transaction a tenant; oneo: the whole command with --force, which asks no linter, and without, J workers and a connection for the run's rows; goose, tern: J workers within this process (tern's wait for each other: its lock has one number for the whole database). fsync is %s and synchronous_commit %s for all.\n",
		columnRounds, fsync, commit)
	f.b.printf("| J | way | s | ms a tenant | of psql's speed |\n| --- | --- | --- | --- | --- |")
	held, told := true, []string{}
	for _, jobs := range []int{4, 8} {
		rows := make([]row, len(ways))
		for round := range columnRounds {
			for i := range ways {
				i := (i + round) % len(ways)
				if err := f.dropColumns(ctx); err != nil {
					return err
				}
				column, took, err := ways[i].add(ctx, jobs)
				if err == nil {
					err = f.added(ctx, column)
				}
				if err != nil {
					return fmt.Errorf("%s: %w", ways[i].name, err)
				}
				rows[i].took = append(rows[i].took, took)
			}
			for i := range rows {
				rows[i].ratios = append(rows[i].ratios, float64(rows[0].took[round])/float64(rows[i].took[round]))
			}
		}
		for i, r := range rows {
			slices.Sort(r.ratios)
			ratio, took := r.ratios[len(r.ratios)/2], median(r.took)
			f.b.printf("| %d | %s | %.2f | %.2f | **%.2f** |", jobs, ways[i].name, took.Seconds(), ms(took)/float64(len(f.slugs)), ratio)
			if ways[i].name == "oneo" {
				held, told = held && ratio >= 0.8, append(told, fmt.Sprintf("%.2f at %d", ratio, jobs))
			}
		}
	}
	f.b.printf("")
	f.b.goal(held, "oneo at least 0.8 of psql's speed", strings.Join(told, ", "))
	return nil
}

// columnByPsql runs one psql for each connection, at the same time.
func (f *fleet) columnByPsql(ctx context.Context, jobs int) (string, time.Duration, error) {
	const column = columnPrefix + "psql"
	scripts := make([]strings.Builder, jobs)
	for i, slug := range f.slugs {
		fmt.Fprintf(&scripts[i%jobs], "begin;\nset local search_path to %s, ext, pg_temp;\n%scommit;\n", pgx.Identifier{slug}.Sanitize(), addColumn(column))
	}
	var g errgroup.Group
	files := make([]string, jobs)
	for i := range scripts {
		files[i] = filepath.Join(f.b.dir, fmt.Sprintf("column%d.sql", i))
		if err := os.WriteFile(files[i], []byte(scripts[i].String()), 0o600); err != nil {
			return "", 0, err
		}
	}
	start := time.Now()
	for _, file := range files {
		g.Go(func() error {
			_, err := timed(exec.CommandContext(ctx, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", f.group.OwnerURL, "-f", file))
			return err
		})
	}
	err := g.Wait()
	return column, time.Since(start), err
}

func (f *fleet) columnByOneo(more ...string) func(context.Context, int) (string, time.Duration, error) {
	return func(ctx context.Context, jobs int) (string, time.Duration, error) {
		column, err := f.addMigration()
		if err != nil {
			return "", 0, err
		}
		took, err := timed(f.migrate(ctx, jobs, append([]string{"-q"}, more...)...))
		return column, took, err
	}
}

// columnByTool adds a migration at every turn, as oneo's folder gets one.
func (f *fleet) columnByTool(t tool) func(context.Context, int) (string, time.Duration, error) {
	var columns []string
	return func(ctx context.Context, jobs int) (string, time.Duration, error) {
		column := fmt.Sprintf("%s%s_%d", columnPrefix, t.name, len(columns)+1)
		columns = append(columns, column)
		files := t.files(f.base, columns...)
		start := time.Now()
		err := t.overAll(ctx, f, files, jobs)
		return column, time.Since(start), err
	}
}
