package migrate_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

func isLocked(err error) bool { return fault.Is(err, fault.Locked) }

func requireFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	require.Truef(t, fault.Is(err, kind), "want a fault of kind %s (%s), got %v", kind, code, err)
	require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
}

func files(named ...string) fstest.MapFS {
	fs := fstest.MapFS{}
	for i := 0; i+1 < len(named); i += 2 {
		fs[named[i]] = &fstest.MapFile{Data: []byte(named[i+1])}
	}
	return fs
}

func TestLoad(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		fs   fstest.MapFS
		want string // in the message; empty: good
	}{
		"good":            {files("0001_a.up.sql", "x", "0002_b.up.sql", "y", "0002_b.down.sql", "z", "README.md", "no SQL"), ""},
		"sorted":          {files("0010_j.up.sql", "x", "0001_a.up.sql", "x"), "version 2 is missing before 0010_j"},
		"gap":             {files("0001_a.up.sql", "x", "0003_c.up.sql", "y"), "version 2 is missing before 0003_c"},
		"not from one":    {files("0002_a.up.sql", "x"), "version 1 is missing"},
		"zero":            {files("0000_a.up.sql", "x"), "0000_a.up.sql has no version above 0"},
		"twice":           {files("0001_a.up.sql", "x", "0001_b.up.sql", "y"), "version 1 stands twice"},
		"twice by length": {files("0001_a.up.sql", "x", "00001_a.up.sql", "y"), "version 1 stands twice"},
		"misnamed":        {files("0001_a.up.sql", "x", "2_b.sql", "y"), "2_b.sql is not named like a migration"},
		"capitals":        {files("0001_A.up.sql", "x"), "0001_A.up.sql is not named"},
		"down alone":      {files("0001_a.up.sql", "x", "0002_b.down.sql", "y"), "0002_b has a step down and no step up"},
		"empty":           {files("0001_a.up.sql", " \n"), "0001_a.up.sql is empty"},
		"empty down":      {files("0001_a.up.sql", "x", "0001_a.down.sql", ""), "0001_a.down.sql is empty"},
	} {
		got, err := migrate.Load(c.fs, ".")
		if c.want == "" {
			require.NoErrorf(t, err, what)
			require.Len(t, got, 2)
			require.Equal(t, "0002_b", got[1].String())
			require.Equal(t, "z", got[1].Down)
			require.NotEqual(t, got[0].Checksum, got[1].Checksum)
			continue
		}
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", what, err)
		require.Containsf(t, err.Error(), c.want, what)
	}
	_, err := migrate.Load(files(), "nowhere")
	require.Truef(t, fault.Is(err, fault.Invalid), "%v", err)
}

// The file that neutralises a clone is no migration: it has no number, and may not end the clone's transaction either.
func TestNeutralizeIsNoMigration(t *testing.T) {
	t.Parallel()
	file := func(text string) fstest.MapFS {
		return fstest.MapFS{"0001_a.up.sql": {Data: []byte("select 1")}, migrate.NeutralizeFile: {Data: []byte(text)}}
	}
	m, err := migrate.New(nil, migrate.Options{Files: schemas.Files, Tenant: file("delete from keys")})
	require.NoError(t, err)
	require.Len(t, m.Files(migrate.TenantSet), 1)
	require.True(t, m.Neutralizes())
	for text, want := range map[string]string{
		"delete from keys; commit": "transaction control", "-- later": "no statement", "delete from keys where name = 'x": "does not end",
	} {
		_, err := migrate.New(nil, migrate.Options{Files: schemas.Files, Tenant: file(text), TenantDir: "/srv/schemas"})
		require.True(t, fault.Is(err, fault.Invalid), "%s: %v", text, err)
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, "/srv/schemas")
	}
	m, err = migrate.New(nil, migrate.Options{Files: schemas.Files, Tenant: fstest.MapFS{"0001_a.up.sql": {Data: []byte("select 1")}}})
	require.NoError(t, err)
	require.False(t, m.Neutralizes(), "what the embedded folder says is about its own tables")
}

// with is a migrator whose tenant migrations are these.
func with(t *testing.T, db *postgres.DB, fs fstest.MapFS) *migrate.Migrator {
	t.Helper()
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files, Tenant: fs, LockWait: pgtest.Patience})
	require.NoError(t, err)
	return m
}

func provisioner(t *testing.T, db *postgres.DB, m *migrate.Migrator) *provision.Provisioner {
	t.Helper()
	base, err := tenant.ParseHost("localhost")
	require.NoError(t, err)
	p, err := provision.New(provision.Options{DB: db, Migrate: m, BaseDomain: base, DropGrace: time.Hour, Logger: postgres.DefaultOptions().Logger})
	require.NoError(t, err)
	return p
}

func create(t *testing.T, p *provision.Provisioner, slug string) tenant.Tenant {
	t.Helper()
	made, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, slug), Actor: "test"})
	require.NoError(t, err)
	return made
}

func upTo(t *testing.T, env *pgtest.Env, n int) fstest.MapFS {
	t.Helper()
	fs := fstest.MapFS{}
	for _, f := range env.Migrate.Files(migrate.TenantSet)[:n] {
		fs[f.String()+".up.sql"] = &fstest.MapFile{Data: []byte(f.Up)}
		if f.Down != "" {
			fs[f.String()+".down.sql"] = &fstest.MapFile{Data: []byte(f.Down)}
		}
	}
	return fs
}

// The creation script gives the structure that migrating step by step gives, and each step down undoes its step up.
func TestCreationEqualsMigrating(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	inst, err := env.DB.Installation(ctx, "main")
	require.NoError(t, err)
	admin := pgtest.Admin(t, env.AdminURL)
	of := func(tn tenant.Tenant) []string {
		return pgtest.Fingerprint(t, admin, tn.Schema.String(), inst.TenantRole(tn.Number))
	}
	all := env.Migrate.Files(migrate.TenantSet)
	created := env.Tenant(t, "created")
	stepped := create(t, provisioner(t, env.DB, with(t, env.DB, upTo(t, env, 1))), "stepped")
	require.NotEqual(t, of(created), of(stepped))
	at := map[int][]string{1: of(stepped)}
	for n := 2; n <= len(all); n++ {
		res, err := with(t, env.DB, upTo(t, env, n)).Tenant(ctx, stepped, migrate.TenantOptions{})
		require.NoError(t, err)
		require.Equal(t, []int{n - 1, n}, []int{res.From, res.To})
		at[n] = of(stepped)
	}
	require.Equal(t, of(created), of(stepped), "creating and migrating must give the same structure")
	res, err := env.Migrate.Tenant(ctx, stepped, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{len(all), len(all)}, []int{res.From, res.To})
	require.Empty(t, res.Applied)
	env.Invariants(t)

	run := func(sql string) {
		t.Helper()
		require.NoError(t, env.DB.AsOwnerIn(ctx, stepped, func(tx *postgres.OwnerTx) error { return tx.Script(ctx, sql) }))
	}
	for n := len(all); n >= 1; n-- {
		require.NotEmptyf(t, all[n-1].Down, "%s has no step down: say so here when that is on purpose", all[n-1])
		run(all[n-1].Down)
		if n > 1 {
			require.Equalf(t, at[n-1], of(stepped), "%s down must give the structure before it", all[n-1])
		}
	}
	for _, f := range all {
		run(f.Up)
	}
	require.Equal(t, of(created), of(stepped), "up, down, up must give the same structure")
}

func TestEditedAndNewer(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	before := with(t, env.DB, files("0001_a.up.sql", "create table a (id int);"))
	a := create(t, provisioner(t, env.DB, before), "acme")
	edited := with(t, env.DB, files("0001_a.up.sql", "create table a (id bigint);", "0002_b.up.sql", "create table b (id int);"))
	_, err := edited.TenantsBehind(ctx, "main")
	requireFault(t, err, fault.Conflict, "edited_migration")
	_, err = edited.Tenant(ctx, a, migrate.TenantOptions{})
	requireFault(t, err, fault.Conflict, "edited_migration")
	_, err = edited.Status(ctx)
	requireFault(t, err, fault.Conflict, "edited_migration")
	require.NoError(t, edited.SharedBehind(ctx), "a tenant's migrations must not keep a server from starting")
	_, err = edited.Shared(ctx)
	require.NoError(t, err)
	_, err = provisioner(t, env.DB, edited).Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Actor: "test"})
	requireFault(t, err, fault.Conflict, "edited_migration")
	var there int
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(ctx, `select count(*) from public.tenants`).Scan(&there))
	require.Equal(t, 1, there, "a create with other files changes nothing")
	newer := with(t, env.DB, files("0001_a.up.sql", "create table a (id int);", "0002_b.up.sql", "create table b (id int);"))
	_, err = newer.Tenant(ctx, a, migrate.TenantOptions{})
	require.NoError(t, err)
	_, err = before.TenantsBehind(ctx, "main")
	requireFault(t, err, fault.Conflict, "newer_database")
	require.NoError(t, before.SharedBehind(ctx), "a newer binary at work on the tenants must not stop the older servers")
	create(t, provisioner(t, env.DB, before), "initech")
	env.Invariants(t)
}

// Behaviours F 109, F12: two processes and many goroutines: each file once, on each tenant.
func TestAppliedExactlyOnce(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	_, err := pgtest.Admin(t, env.AdminURL).Exec(t.Context(), `create table public.counted (tenant text, version int);
grant select, insert on public.counted to oneo_owner`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	fs := files("0001_a.up.sql", "create table a (id int);")
	first := provisioner(t, env.DB, with(t, env.DB, fs))
	tenants := []tenant.Tenant{create(t, first, "acme"), create(t, first, "globex")}
	for v := 2; v <= 5; v++ {
		fs[fmt.Sprintf("%04d_x.up.sql", v)] = &fstest.MapFile{Data: fmt.Appendf(nil, "create table x%d (id int); insert into public.counted values (current_schema(), %d);", v, v)}
	}
	other, _, _ := env.Open(t)
	var wg sync.WaitGroup
	for i := range 12 {
		m := with(t, []*postgres.DB{env.DB, other}[i%2], fs)
		for _, tn := range tenants {
			wg.Go(func() {
				if _, err := m.Tenant(t.Context(), tn, migrate.TenantOptions{}); err != nil {
					t.Errorf("%s: %v", tn.Slug, err)
				}
			})
		}
	}
	wg.Wait()
	rows, err := pgtest.Admin(t, env.AdminURL).Query(t.Context(), `select tenant || ' ' || version || ' ' || count(*) from public.counted group by tenant, version order by 1`)
	require.NoError(t, err)
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	require.Equal(t, []string{"acme 2 1", "acme 3 1", "acme 4 1", "acme 5 1", "globex 2 1", "globex 3 1", "globex 4 1", "globex 5 1"}, got)
	env.Invariants(t)
}

func TestFailingMigration(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	fs := files("0001_a.up.sql", "create table a (id int);")
	a := create(t, provisioner(t, env.DB, with(t, env.DB, fs)), "acme")
	fs["0002_b.up.sql"] = &fstest.MapFile{Data: []byte("create table b (id int);")}
	fs["0003_c.up.sql"] = &fstest.MapFile{Data: []byte("create table c (id int);\n-- ümlaut\ninsert into c\nvalues (nonsense);")}
	res, err := with(t, env.DB, fs).Tenant(ctx, a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	for _, want := range []string{"0003_c", "line 4", "42703"} {
		require.Contains(t, fault.Of(err).Message, want)
	}
	require.Equal(t, "acme", fault.Of(err).Tenant)
	require.Contains(t, fault.Of(err).Message, "statement 2")
	require.Contains(t, fault.Of(err).Message, "the tenant is at version 1")
	require.Equal(t, []int{1, 1}, []int{res.From, res.To})
	require.Empty(t, res.Applied)
	var there []string
	require.NoError(t, env.DB.AsOwnerIn(ctx, a, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select relname::text from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = relnamespace where nspname = 'acme' order by 1`)
		if err != nil {
			return err
		}
		there, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	}))
	require.Equal(t, []string{"a"}, there, "nothing of the failed steps may be left")
	env.Invariants(t)
	fs["0003_c.up.sql"] = &fstest.MapFile{Data: []byte("create table c (id int);")}
	res, err = with(t, env.DB, fs).Tenant(ctx, a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{1, 3}, []int{res.From, res.To}, "running it again does what is missing")
}

// F 111: at head no lock is taken; behind, a held operation lock is waited for in a bound.
func TestNothingPendingTakesNoLock(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	fs := files("0001_a.up.sql", "create table a (id int);")
	a := create(t, provisioner(t, env.DB, with(t, env.DB, fs)), "acme")
	err := env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
		got, err := tx.TryOperationLock(ctx, a.Number)
		require.True(t, got)
		require.NoError(t, err)
		_, err = with(t, env.DB, fs).Tenant(ctx, a, migrate.TenantOptions{})
		require.NoError(t, err, "nothing pending: the lock that somebody holds does not matter")
		fs["0002_b.up.sql"] = &fstest.MapFile{Data: []byte("create table b (id int);")}
		m, err := migrate.New(env.DB, migrate.Options{Files: schemas.Files, Tenant: fs, LockWait: 100 * time.Millisecond})
		require.NoError(t, err)
		_, err = m.Tenant(ctx, a, migrate.TenantOptions{})
		requireFault(t, err, fault.Locked, "operation_running")
		behind, err := m.TenantsBehind(ctx, "main")
		require.NoError(t, err)
		require.Equal(t, []migrate.Behind{{Number: a.Number, Version: 1}}, behind)
		return nil
	})
	require.NoError(t, err)
}

func TestStatus(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	require.NoError(t, env.Migrate.SharedBehind(ctx))
	a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	st, err := env.Migrate.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, []migrate.VersionCount{{Group: "main", Version: st.Head, Tenants: 2}}, st.Versions)
	require.Empty(t, st.Missing)
	_, err = pgtest.Admin(t, env.AdminURL).Exec(ctx, `drop schema acme cascade; drop schema globex cascade; create schema globex`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	st, err = env.Migrate.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, []int32{a.Number, b.Number}, st.Missing, "dropped, or dropped and made again, behind oneo's back")
	for _, tn := range []tenant.Tenant{a, b} {
		err := env.DB.AsOwnerIn(ctx, tn, func(*postgres.OwnerTx) error { return nil })
		requireFault(t, err, fault.NotFound, "schema_missing")
	}
}

func TestSharedIsIdempotentAndRefusesEarlyUse(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	db, m, _ := env.Open(t, func(o *postgres.Options) { o.Groups = map[string]postgres.Group{"main": env.Group, "second": second} })
	requireFault(t, m.SharedBehind(t.Context()), fault.Pending, "shared_behind")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := m.Shared(t.Context()); err != nil {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	require.NoError(t, m.SharedBehind(t.Context()))
	require.NoError(t, db.AsOwner(context.Background(), "second", func(tx *postgres.OwnerTx) error {
		return tx.Script(t.Context(), `select 1 from public.placements`)
	}))
	require.True(t, strings.HasPrefix(m.Files(migrate.SharedSet)[0].String(), "0001_"))
}
