package migrate_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

const childTask = "MIGRATE_TEST_TASK"

// TestMain also serves as the child that migrates one tenant and is killed in the middle of it.
func TestMain(m *testing.M) {
	if raw := os.Getenv(childTask); raw != "" {
		var k task
		if err := json.Unmarshal([]byte(raw), &k); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(9)
		}
		if err := k.child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	pgtest.Main(m)
}

// task is the migration of one tenant, as a process of its own would do it.
type task struct {
	Groups       map[string]postgres.Group
	Number       int32
	Slug, Schema string
	Down         bool
}

func (k task) child() error {
	o := postgres.DefaultOptions()
	pgtest.Patient(&o)
	o.Groups, o.Secret, o.OwnerConns = k.Groups, pgtest.Secret, 2
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	return k.do(context.Background(), db)
}

func (k task) do(ctx context.Context, db *postgres.DB) error {
	m, err := migrate.New(db, everyKind())
	if err != nil {
		return err
	}
	t := tenant.Tenant{Number: k.Number, Group: "main"}
	if t.Slug, err = tenant.ParseSlug(k.Slug); err != nil {
		return err
	}
	if t.Schema, err = tenant.ParseSchema(k.Schema); err != nil {
		return err
	}
	if k.Down {
		_, err = m.Down(ctx, t, 1, migrate.TenantOptions{})
	} else {
		_, err = m.Tenant(ctx, t, migrate.TenantOptions{})
	}
	return err
}

const rowsEach = 25

// everyKind is a set with a step of each kind. Each notes in public.counted that it was run, in the tenant's name.
func everyKind() migrate.Options {
	note := func(v int) string {
		return fmt.Sprintf("insert into public.counted values (current_schema(), %d);\n", v)
	}
	fs := files(
		"0001_things.up.sql", "create table things (id int, n int not null default 0, m int not null default 0, done boolean not null default false, beside boolean not null default false);",
		"0002_column.up.sql", "-- oneo: breaking\nalter table things add column a int;\n"+note(2),
		"0002_column.down.sql", note(-2)+"alter table things drop column a;",
		"0003_index.up.sql", `-- oneo: no-transaction
create index concurrently things_n on things (n);
`+note(3)+`create unique index concurrently if not exists "things ""id" on things (id);
alter table things add column b int;
reindex index concurrently things_n;
drop index concurrently things_n;
vacuum (analyze) things;
create index concurrently things_n on only things (n) where n > 0;
`,
		"0003_index.down.sql", note(-3)+"drop index concurrently things_n; drop index \"things \"\"id\"; alter table things drop column b;",
		"0004_rows.data.sql", "-- oneo: batch 10\nupdate things set n = n + 1, done = true where ctid in (select ctid from things where not done limit $1)",
		"0004_rows.down.sql", note(-4)+"update things set n = 0, done = false;",
		"0005_others.data.sql", "-- oneo: batch 10\n-- oneo: beside\nupdate things set m = m + 1, beside = true where ctid in (select ctid from things where not beside limit $1)",
		"0005_others.down.sql", note(-5)+"update things set m = 0, beside = false;",
		"0006_column.up.sql", "alter table things add column c int;\n"+note(6),
		"0006_column.down.sql", note(-6)+"alter table things drop column c;",
	)
	run := func(v int) func(context.Context, *postgres.OwnerTx) error {
		return func(ctx context.Context, tx *postgres.OwnerTx) error { return tx.Script(ctx, note(v)) }
	}
	return migrate.Options{Files: schemas.Files, Tenant: fs, LockWait: pgtest.Patience, Funcs: []migrate.Func{
		{Version: 7, Name: "in_go", Key: "1", Up: run(7), Down: run(-7)},
	}}
}

// kinds is an installation with tenants at version 1 of everyKind, with rows.
type kinds struct {
	env   *pgtest.Env
	m     *migrate.Migrator
	first *migrate.Migrator
	admin *pgx.Conn
}

func newKinds(t *testing.T) kinds {
	t.Helper()
	env := pgtest.New(t)
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(t.Context(), `create table public.counted (tenant text, version int);
grant select, insert on public.counted to oneo_owner`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	m, err := migrate.New(env.DB, everyKind())
	require.NoError(t, err)
	one := fstest.MapFS{"0001_things.up.sql": everyKind().Tenant.(fstest.MapFS)["0001_things.up.sql"]}
	return kinds{env: env, m: m, first: with(t, env.DB, one), admin: admin}
}

func (k kinds) tenant(t *testing.T, slug string) tenant.Tenant {
	t.Helper()
	tn := create(t, provisioner(t, k.env.DB, k.first), slug)
	k.exec(t, tn, fmt.Sprintf(`insert into things (id) select generate_series(1, %d)`, rowsEach))
	return tn
}

func (k kinds) exec(t *testing.T, tn tenant.Tenant, sql string) {
	t.Helper()
	require.NoError(t, k.env.DB.AsOwnerIn(t.Context(), tn, func(tx *postgres.OwnerTx) error { return tx.Script(t.Context(), sql) }))
}

func (k kinds) lines(t *testing.T, sql string, args ...any) []string {
	t.Helper()
	rows, err := k.admin.Query(t.Context(), sql, args...)
	require.NoError(t, err)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	return got
}

// atHead checks that each step was run once for the tenant, and nothing is left of how.
func (k kinds) atHead(t *testing.T, tn tenant.Tenant) {
	t.Helper()
	s := postgres.Quote(tn.Schema.String())
	require.Equal(t, []string{"2 1", "3 1", "6 1", "7 1"}, k.lines(t, `select version || ' ' || count(*) from public.counted where tenant = $1 and version > 0 group by version order by version`, tn.Schema.String()))
	require.Equal(t, []string{fmt.Sprintf("1 1 t t %d", rowsEach)}, k.lines(t, `select concat_ws(' ', n, m, done, beside, count(*)) from `+s+`.things group by n, m, done, beside`), "each row is changed once")
	require.Equal(t, []string{"things \"id true", "things_n true"}, k.lines(t, `select c.relname || ' ' || indisvalid from pg_index join pg_class c on c.oid = indexrelid where relnamespace = $1::text::regnamespace order by 1`, s))
	require.Equal(t, []string{"7 2"}, k.lines(t, `select version || ' ' || reader from public.placements where number = $1`, tn.Number))
	require.Empty(t, k.lines(t, `select version::text from public.progress where tenant = $1`, tn.Number))
	k.env.Invariants(t)
}

func TestEveryKind(t *testing.T) {
	t.Parallel()
	k := newKinds(t)
	a := k.tenant(t, "acme-1")
	var told []string
	res, err := k.m.Tenant(t.Context(), a, migrate.TenantOptions{Progress: func(p migrate.Progress) {
		told = append(told, fmt.Sprintf("%s %d/%d %d %d", p.File, p.Statements, p.Of, p.Batches, p.Rows))
	}})
	require.NoError(t, err)
	require.Equal(t, []int{1, 7, 6}, []int{res.From, res.To, len(res.Applied)})
	require.Equal(t, int64(2*rowsEach), res.Rows)
	require.Equal(t, []string{
		"0003_index 1/8 0 0", "0003_index 2/8 0 0", "0003_index 3/8 0 0", "0003_index 4/8 0 0", "0003_index 5/8 0 0", "0003_index 6/8 0 0", "0003_index 7/8 0 0", "0003_index 8/8 0 0",
		"0004_rows 0/0 1 10", "0004_rows 0/0 2 20", "0004_rows 0/0 3 25", "0004_rows 0/0 3 25",
		"0005_others 0/0 1 10", "0005_others 0/0 2 20", "0005_others 0/0 3 25", "0005_others 0/0 3 25",
	}, told)
	k.atHead(t, a)
}

// F10, F11, F12: kill -9 at each pass of each place, for each kind of step, up and down: the same again reaches the end, and each step
// has been run once.
func TestKillEverywhere(t *testing.T) {
	t.Parallel()
	for _, point := range failpoint.All {
		operation, _, _ := strings.Cut(point, ".")
		if operation != "migrate" && operation != "down" {
			continue
		}
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			k := newKinds(t)
			fired := 0
			for n := 1; ; n++ {
				tn := k.tenant(t, fmt.Sprintf("t%d", n))
				down := operation == "down"
				if down {
					_, err := k.m.Tenant(t.Context(), tn, migrate.TenantOptions{})
					require.NoError(t, err)
				} else if point == "migrate.tidied" { // as a reindex and a create index of before have left it
					k.exec(t, tn, `create index things_n on things (n); create index things_n_ccnew on things (m)`)
					_, err := k.admin.Exec(t.Context(), `update pg_index set indisvalid = false where indexrelid in (select oid from pg_class where relname like 'things_n%' and relnamespace = $1::text::regnamespace)`, tn.Schema.String())
					require.NoError(t, err)
				}
				job := task{Groups: map[string]postgres.Group{"main": k.env.Group}, Number: tn.Number, Slug: tn.Slug.String(), Schema: tn.Schema.String(), Down: down}
				code, out := job.run(t, fmt.Sprintf("%s=exit@%d", point, n))
				if code == 137 {
					fired++
					require.NoErrorf(t, job.do(t.Context(), k.env.DB), "%s, pass %d, again", point, n)
				} else {
					require.Zerof(t, code, "%s", out)
				}
				if down {
					require.Equal(t, []string{"1 0"}, k.lines(t, `select version || ' ' || reader from public.placements where number = $1`, tn.Number))
					require.Equal(t, []string{"-7 1", "-6 1", "-5 1", "-4 1", "-3 1", "-2 1"}, k.lines(t, `select version || ' ' || count(*) from public.counted where tenant = $1 and version < 0 group by version order by version`, tn.Schema.String()))
					k.env.Invariants(t)
				} else {
					k.atHead(t, tn)
				}
				if code != 137 {
					break
				}
			}
			require.Positivef(t, fired, "the failpoint %s did not fire", point)
			if kill, ok := map[string]int{"migrate.begun": 6, "migrate.statement": 6, "migrate.tidied": 2, "migrate.applied": 2, "migrate.batch": 8}[point]; ok {
				require.Equalf(t, kill, fired, "passes of %s", point)
			}
		})
	}
}

func (k task) run(t *testing.T, failpoints string) (code int, out string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	raw, err := json.Marshal(k)
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+failpoints)
	text, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return cmd.ProcessState.ExitCode(), string(text)
}

// F11: the backend that builds an index dies in the midst of it. The INVALID index is found, dropped and made again.
func TestInvalidIndexIsMadeAgain(t *testing.T) {
	t.Parallel()
	k := newKinds(t)
	ctx := t.Context()
	a := k.tenant(t, "acme")
	// An old transaction keeps the build waiting behind its first phase: the index stands, and is invalid.
	old := pgtest.Admin(t, k.env.AdminURL)
	_, err := old.Exec(ctx, `begin isolation level repeatable read; select from public.placements`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	failed := make(chan error, 1)
	go func() {
		_, err := k.m.Tenant(ctx, a, migrate.TenantOptions{})
		failed <- err
	}()
	invalid := `select c.relname::text from pg_index join pg_class c on c.oid = indexrelid where not indisvalid and relnamespace = 'acme'::regnamespace`
	require.Eventually(t, func() bool { return slices.Equal(k.lines(t, invalid), []string{"things_n"}) }, pgtest.Patience, 20*time.Millisecond)
	require.Equal(t, []string{"true"}, k.lines(t, `select pg_terminate_backend(pid)::text from pg_stat_activity where datname = current_database() and query ilike '%create index concurrently%' and pid <> pg_backend_pid()`))
	require.Error(t, <-failed)
	require.Equal(t, []string{"things_n"}, k.lines(t, invalid))
	require.Equal(t, []string{"3 0 t"}, k.lines(t, `select concat_ws(' ', version, statements, begun is not null) from public.progress`))
	// Somebody who stays in the way: the build gives up, is Locked, and leaves what the next attempt finds.
	short, err := migrate.New(k.env.DB, func() migrate.Options { o := everyKind(); o.LockWait = 300 * time.Millisecond; return o }())
	require.NoError(t, err)
	_, err = short.Tenant(ctx, a, migrate.TenantOptions{LockTimeout: 50 * time.Millisecond})
	require.Truef(t, isLocked(err), "%v", err)
	_, err = old.Exec(ctx, `rollback`)
	require.NoError(t, err)
	_, err = k.m.Tenant(ctx, a, migrate.TenantOptions{})
	require.NoError(t, err)
	k.atHead(t, a)
}
