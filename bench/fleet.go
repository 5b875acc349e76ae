package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/schemas"
)

// fleet is an installation whose tenants are migrated: with a folder of migrations that grows by a column at a time.
type fleet struct {
	*installation
	dir        string // what --schemas is given
	base, head int    // the version of tenants as they are made, and of the folder
	jobs       int    // tenants at one time
}

// columnPrefix marks what restore takes away again.
const columnPrefix = "bench_"

func (b *bench) newFleet(ctx context.Context) (*fleet, error) {
	in, err := b.install(ctx, "bench_fleet", postgres.ByRole, 8)
	if err != nil {
		return nil, err
	}
	// What the commands work on is made by the command: schedules have tables of their own.
	shared := exec.CommandContext(ctx, b.binary, "migrate", "--shared")
	shared.Env = in.environment()
	if _, err := timed(shared); err != nil {
		return nil, err
	}
	f := &fleet{installation: in, dir: filepath.Join(b.dir, "migrations"), jobs: cmp.Or(b.jobs, min(8, 2*runtime.NumCPU()))}
	if err := os.Mkdir(f.dir, 0o755); err != nil {
		return nil, err
	}
	own, err := fs.Sub(schemas.Files, "tenant")
	if err != nil {
		return nil, err
	}
	files, err := fs.Glob(own, "[0-9]*.sql") // neutralize.sql is no migration
	if err != nil {
		return nil, err
	}
	for _, name := range files {
		text, err := fs.ReadFile(own, name)
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile(filepath.Join(f.dir, name), text, 0o644); err != nil {
			return nil, err
		}
		if !strings.HasSuffix(name, ".down.sql") {
			f.base++
		}
	}
	f.head = f.base
	return f, nil
}

func addColumn(column string) string {
	return "alter table records add column " + column + " text;\n"
}

// addMigration adds a migration to oneo's folder that adds a column, and returns the column's name.
func (f *fleet) addMigration() (column string, err error) {
	f.head++
	column = fmt.Sprintf("%soneo_%d", columnPrefix, f.head)
	path := filepath.Join(f.dir, fmt.Sprintf("%04d_%s", f.head, column))
	err = os.WriteFile(path+".up.sql", []byte(addColumn(column)), 0o644)
	return column, errors.Join(err, os.WriteFile(path+".down.sql", []byte("alter table records drop column "+column+";\n"), 0o644))
}

// migrate is the command that brings all tenants to the head of the folder; with 0 jobs as many at one time as oneo thinks
// good. One connection more than jobs is for the run's own rows: with as many as jobs, oneo would use one less.
func (f *fleet) migrate(ctx context.Context, jobs int, more ...string) *exec.Cmd {
	args := append([]string{"migrate", "--all-tenants", "--schemas", f.dir}, more...)
	if jobs > 0 {
		args = append(args, "--jobs", fmt.Sprint(jobs))
	}
	cmd := exec.CommandContext(ctx, f.b.binary, args...)
	cmd.Env = f.environment(fmt.Sprintf("ONEO_DATABASE_OWNER_CONNS=%d", cmp.Or(jobs, f.jobs)+1))
	return cmd
}

// timed runs a command and says how long it took, its start included.
func timed(cmd *exec.Cmd) (time.Duration, error) {
	start := time.Now()
	if text, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail(text))
	}
	return time.Since(start), nil
}

// tail is the end of what a program said.
func tail(text []byte) []byte { return text[max(0, len(text)-2000):] }

// asSuperuser gives fn a connection of PostgreSQL's administrator to the installation's database.
func (in *installation) asSuperuser(ctx context.Context, fn func(*pgx.Conn) error) error {
	c, err := pgx.Connect(ctx, in.b.pg.URL(in.name))
	if err != nil {
		return err
	}
	defer c.Close(context.WithoutCancel(ctx))
	return fn(c)
}

// added refuses a way that has not added the column to every tenant.
func (f *fleet) added(ctx context.Context, column string) error {
	return f.asSuperuser(ctx, func(c *pgx.Conn) error {
		const count = `select count(*) from pg_attribute a join pg_class c on c.oid = a.attrelid where c.relname = 'records' and a.attname = $1`
		var n int
		if err := c.QueryRow(ctx, count, column).Scan(&n); err != nil {
			return err
		}
		if n != len(f.slugs) {
			return fmt.Errorf("the column %s is on %d of %d tenants", column, n, len(f.slugs))
		}
		return nil
	})
}

// dropColumns takes the columns away that were added, whoever did it, and lets the server come to rest, so that each
// turn finds the same tables and pays for its own checkpoint and dead rows only.
func (f *fleet) dropColumns(ctx context.Context) error {
	return f.asSuperuser(ctx, func(c *pgx.Conn) error {
		const columns = `select format('alter table %I.records ', n.nspname) || string_agg(format('drop column %I', a.attname), ', ')
from pg_attribute a join pg_class c on c.oid = a.attrelid join pg_namespace n on n.oid = c.relnamespace
where c.relname = 'records' and c.relkind = 'r' and starts_with(a.attname, $1) and not a.attisdropped group by n.nspname`
		if err := inBatches(ctx, c, columns, columnPrefix); err != nil {
			return err
		}
		return rest(ctx, c)
	})
}

// restore makes every tenant as it was made, for oneo and for the others.
func (f *fleet) restore(ctx context.Context) error {
	for f.head > f.base {
		old, err := filepath.Glob(filepath.Join(f.dir, fmt.Sprintf("%04d_*", f.head)))
		if err != nil {
			return err
		}
		for _, path := range old {
			if err := os.Remove(path); err != nil {
				return err
			}
		}
		f.head--
	}
	if err := f.dropColumns(ctx); err != nil {
		return err
	}
	return f.asSuperuser(ctx, func(c *pgx.Conn) error {
		const tables = `select format('drop table %I.%I', schemaname, tablename) from pg_tables where tablename = any($1)`
		if err := inBatches(ctx, c, tables, versionTables()); err != nil {
			return err
		}
		if _, err := c.Exec(ctx, `delete from public.ledger where set = 'tenant' and version > $1`, f.base); err != nil {
			return err
		}
		if _, err := c.Exec(ctx, `update public.placements set version = $1 where version > $1`, f.base); err != nil {
			return err
		}
		return rest(ctx, c)
	})
}

// inBatches runs the statements that a query makes, a hundred in a transaction: each holds locks until its end.
func inBatches(ctx context.Context, c *pgx.Conn, query string, args ...any) error {
	rows, err := c.Query(ctx, query, args...)
	if err != nil {
		return err
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for batch := range slices.Chunk(all, 100) {
		if _, err := c.PgConn().Exec(ctx, strings.Join(batch, ";\n")).ReadAll(); err != nil {
			return err
		}
	}
	return nil
}

// rest does what autovacuum and the checkpointer would do in the middle of the next measurement.
func rest(ctx context.Context, c *pgx.Conn) error {
	const tables = `select string_agg(format('%I.%I', schemaname, tablename), ', ') from pg_tables
where schemaname = 'public' or schemaname = 'pg_catalog' and tablename in
	('pg_attribute', 'pg_class', 'pg_type', 'pg_index', 'pg_depend', 'pg_shdepend', 'pg_constraint', 'pg_namespace')`
	var list string
	if err := c.QueryRow(ctx, tables).Scan(&list); err != nil {
		return err
	}
	for _, statement := range []string{"vacuum (analyze) " + list, "checkpoint"} {
		if _, err := c.Exec(ctx, statement); err != nil {
			return err
		}
	}
	return nil
}

// The parts of -only fleet.
const (
	onPending     = "pending"
	onFingerprint = "fingerprint"
	onLive        = "live"
	onBlocked     = "blocked"
	onColumn      = "column"
	onMemory      = "memory"
	onDoctor      = "doctor"
)

var fleetParts = []string{onPending, onColumn, onLive, onBlocked, onMemory, onFingerprint, onDoctor}

// fleets grows one installation from a tenth of n, at most 100, to n and to many tenants and measures the chosen parts
// on the way. A part that fails is told, and the others go on.
func (b *bench) fleets(ctx context.Context, only []string, n, many int) error {
	few := max(1, min(100, n/10))
	f, err := b.newFleet(ctx)
	if err != nil {
		return err
	}
	var nothing pendings
	var memory peaks
	var prints fingerprints
	var looks examinations
	steps := []struct {
		part string
		size int
		run  func(context.Context) error
	}{
		{onPending, few, func(ctx context.Context) error { return f.pending(ctx, &nothing) }},
		{onMemory, few, func(ctx context.Context) error { return f.memory(ctx, &memory) }},
		{onPending, n, func(ctx context.Context) error { return f.pending(ctx, &nothing) }},
		{onFingerprint, n, func(ctx context.Context) error { return f.fingerprint(ctx, &prints) }},
		{onDoctor, n, func(ctx context.Context) error { return f.examine(ctx, &looks) }},
		{onLive, n, f.live},
		{onBlocked, n, f.blocked},
		{onColumn, n, f.column},
		{onMemory, n, func(ctx context.Context) error { return f.memory(ctx, &memory) }},
		{onPending, many, func(ctx context.Context) error { return f.pending(ctx, &nothing) }},
		{onFingerprint, many, func(ctx context.Context) error { return f.fingerprint(ctx, &prints) }},
		{onDoctor, many, func(ctx context.Context) error { return f.examine(ctx, &looks) }},
		{onMemory, many, func(ctx context.Context) error { return f.memory(ctx, &memory) }},
	}
	var failed error
	for _, s := range steps {
		if !slices.Contains(only, s.part) || s.size < len(f.slugs) || ctx.Err() != nil {
			continue
		}
		if err := f.growTo(ctx, s.size); err != nil {
			return errors.Join(failed, err)
		}
		b.tell("%s at %d tenants", s.part, s.size)
		err := s.run(ctx)
		if err != nil {
			err = fmt.Errorf("%s at %d tenants: %w", s.part, s.size, err)
			b.printf("(%v)\n", err)
		}
		if err = errors.Join(err, f.restore(ctx)); err != nil {
			failed = errors.Join(failed, err)
		}
	}
	nothing.print(f)
	memory.print(f)
	prints.print(f)
	looks.print(f)
	return errors.Join(failed, ctx.Err())
}

// growTo makes the tenants that are missing.
func (f *fleet) growTo(ctx context.Context, n int) error {
	more := n - len(f.slugs)
	if more == 0 {
		return nil
	}
	start := time.Now()
	f.b.tell("making %d tenants", more)
	if err := f.grow(ctx, n); err != nil {
		return err
	}
	f.b.printf("(%d tenants with %d records each were made in %s.)\n", more, recordsEach, time.Since(start).Round(time.Second))
	return f.asSuperuser(ctx, func(c *pgx.Conn) error { return rest(ctx, c) })
}
