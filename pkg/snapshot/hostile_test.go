package snapshot_test

import (
	"context"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// fresh is a fixture whose tenant is at version 1 of other tables than first's.
func freshFixture(t *testing.T, tables, rows string) *fixture {
	t.Helper()
	f := &fixture{Env: pgtest.New(t), t: t}
	f.admin = pgtest.Admin(t, f.AdminURL)
	f.old = f.with(tables)
	f.t1 = f.tenant(f.old, "acme")
	f.in(f.t1, rows)
	f.ref = f.print(f.t1)
	return f
}

// Types that lie in the tenant's schema do not keep its columns from being copied, nor do the copies keep the run from
// changing them.
func TestTypesOfTheTenantsOwn(t *testing.T) {
	t.Parallel()
	const tables = `
create type mood as enum ('sad', 'ok');
create type pair as (a integer, b text);
create domain short as text check (length(value) < 9);
create table faces (id integer primary key, m mood not null default 'sad', ms mood[], s short, p pair, f bytea);
create table others (id integer primary key, m mood);
create view sad as select id from others where m = 'sad';
create materialized view held as select id, m from others;`
	for what, up := range map[string]string{
		"rows":          `update faces set m = 'ok', ms = null, s = 'x', p = null, f = null`,
		"another type":  `alter table faces alter column m drop default, alter column m type text, alter column ms type text[]; drop materialized view held; drop view sad; alter table others alter column m type text; drop type mood`,
		"cascade":       `drop type mood cascade; drop type pair cascade; drop domain short cascade`,
		"another label": `alter type mood rename value 'sad' to 'blue'; alter domain short add check (value <> 'y'); update faces set s = 'x'`,
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := freshFixture(t, tables, `insert into faces values (1, 'sad', '{sad,ok,null}', 'brief', row(1, 'one, "two"'), '\x00ff'), (2, 'ok', null, null, null, null);
				insert into others values (1, 'sad'), (2, null)`)
			before := f.all(f.t1, "faces") + f.all(f.t1, "others")
			m := f.with(tables, up)
			s, told := f.telling(m)
			run := f.migrated(m, s, f.t1)
			_, err := s.Check(t.Context(), f.t1, run)
			require.NoError(t, err)
			_, err = s.Undo(t.Context(), f.t1, run)
			if what == "another label" { // the copies have the old labels, today's others the new ones
				requireFault(t, err, fault.Conflict, "undo_unfit")
				return
			}
			require.NoError(t, err)
			require.Empty(t, told.String())
			require.Equal(t, before, f.all(f.t1, "faces")+f.all(f.t1, "others"))
			require.Equal(t, f.ref, f.print(f.t1))
			f.Invariants(t)
		})
	}
}

// A sequence that the run has renamed goes on behind what it has given under its new name.
func TestRenamedSequences(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `alter sequence tickets rename to numbers; alter table log rename to diary; alter sequence log_id_seq rename to diary_id_seq`)
	s := f.snapshots(m)
	run := f.migrated(m, s, f.t1)
	f.in(f.t1, `select nextval('numbers') from generate_series(1, 10); insert into diary (what) values ('x'); delete from diary`)
	was := f.ask(f.t1, "select last_value from diary_id_seq")
	_, err := s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	require.Equal(t, "112", f.ask(f.t1, "select nextval('tickets')"))
	f.in(f.t1, `insert into log (what) values ('next')`)
	require.Equal(t, "1", f.ask(f.t1, "select max(id) - "+was+" from log"))
	f.Invariants(t)
}

// What others were given by hand would be lost with the tables, and what hangs on them from elsewhere would go on with
// those that lie aside. What the run itself has granted goes.
func TestWhatOthersHaveOfTheTenant(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	_, err := f.admin.Exec(t.Context(), `create schema elsewhere`)
	require.NoError(t, err)
	bi := "bi_" + uuid.NewString()[:8]
	_, err = f.admin.Exec(t.Context(), `create role `+bi)
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := f.admin.PgConn().Exec(context.Background(), `drop owned by `+bi+`; drop role `+bi+``).ReadAll()
		require.NoError(t, err)
	})
	m := f.with(first, `update books set title = title || '!'; grant usage on schema acme to `+bi+`; grant select on books to `+bi)
	s := f.snapshots(m)
	run := f.migrated(m, s, f.t1)
	for what, c := range map[string]struct{ do, back, says string }{
		"a table":          {`grant select on acme.log to ` + bi, `revoke all on acme.log from ` + bi, "grant to " + bi + " on table log"},
		"a column":         {`grant update (what) on acme.log to ` + bi, `revoke all (what) on acme.log from ` + bi, "grant to " + bi + " on column log.what"},
		"a sequence":       {`grant usage on sequence acme.tickets to ` + bi, `revoke all on sequence acme.tickets from ` + bi, "grant to " + bi + " on sequence tickets"},
		"a view elsewhere": {`create view elsewhere.v as select id from acme.log`, `drop view elsewhere.v`, "view elsewhere.v"},
		"a key elsewhere":  {`create table elsewhere.k (author integer references acme.authors (id))`, `drop table elsewhere.k`, "elsewhere.k"},
		"a publication":    {`create publication p for table acme.log`, `drop publication p`, "publication p"},
	} {
		_, err := f.admin.Exec(t.Context(), c.do)
		require.NoError(t, err)
		_, err = s.Check(t.Context(), f.t1, run)
		requireFault(t, err, fault.Conflict, "foreign_objects")
		require.Contains(t, fault.Of(err).Message, c.says, what)
		_, err = s.Undo(t.Context(), f.t1, run)
		requireFault(t, err, fault.Conflict, "foreign_objects")
		_, err = f.admin.Exec(t.Context(), c.back)
		require.NoError(t, err)
	}
	_, err = s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	require.Equal(t, f.ref, f.print(f.t1))
	require.Equal(t, "false", f.scalar(`select has_schema_privilege($1, (select undone from public.undo_points), 'usage')`, bi))
	_, err = f.admin.Exec(t.Context(), `drop schema elsewhere cascade`)
	require.NoError(t, err)
	f.Invariants(t)
}

// Isolation by schema: the rights are the app role's, in the new schema and no more in the old one.
func TestIsolationBySchema(t *testing.T) {
	t.Parallel()
	f := &fixture{Env: pgtest.New(t), t: t}
	f.admin = pgtest.Admin(t, f.AdminURL)
	db, _, _ := f.Open(t, func(o *postgres.Options) { o.Isolation = postgres.BySchema })
	f.DB = db
	f.old = f.with(first)
	f.t1 = f.tenant(f.old, "acme")
	f.in(f.t1, rows)
	m := f.with(first, `alter table books drop column pages cascade; alter table authors add column age int`)
	s, told := f.telling(m)
	run := f.migrated(m, s, f.t1)
	read := func(t1 tenant.Tenant, table string) error {
		return db.InTenant(t.Context(), t1, postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(t.Context(), `update `+table+` set name = name`)
			return err
		})
	}
	require.NoError(t, read(f.t1, "authors"))
	_, err := s.Check(t.Context(), f.t1, run)
	require.NoError(t, err)
	_, err = s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	require.Empty(t, told.String())
	require.NoError(t, read(f.t1, "authors"))
	require.Equal(t, "42501", postgres.SQLState(read(f.t1, f.scalar(`select undone from public.undo_points`)+".authors")))
	require.Equal(t, "(4,1446)", f.ask(f.t1, "select row(count(*), sum(pages)) from books"))
	f.Invariants(t)
	_, err = m.Tenant(t.Context(), f.t1, migrate.TenantOptions{})
	require.NoError(t, err)
}
