package snapshot_test

import (
	"bytes"
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/snapshot"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// story is what was logged.
type story struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (s *story) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *story) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func (f *fixture) telling(m *migrate.Migrator) (*snapshot.Snapshots, *story) {
	f.t.Helper()
	told := &story{}
	s, err := snapshot.New(snapshot.Options{DB: f.DB, Migrate: m, Keep: time.Hour, Logger: slog.New(slog.NewTextHandler(told, nil))})
	require.NoError(f.t, err)
	return s, told
}

func (f *fixture) oid(t tenant.Tenant, table string) string {
	return f.ask(t, "select to_regclass('"+table+"')::oid")
}

// Of a table that the run has not changed nothing is copied: it is the same table afterwards, with everything that hangs
// on it, and what lies aside has no hold on it.
func TestWhatWasNotChangedIsMoved(t *testing.T) {
	t.Parallel()
	const old = first + `
create table tags (id integer generated always as identity primary key, name text not null unique);
create table tagged (book bigint not null references books (id) deferrable initially deferred, tag integer not null references tags (id), author integer references authors (id) on delete set null,
	parent integer references tags (id), primary key (book, tag));
create trigger tagged_noted after insert on tagged for each row execute function note();
create trigger tagged_off after insert on tagged for each row execute function note();
alter table tagged disable trigger tagged_off;
comment on trigger tagged_noted on tagged is 'notes it';
comment on column tags.name is 'as people write it';
create view shown with (security_barrier) as select t.name from tags t where name <> '';
comment on view shown is 'tags to show';
create view counts as select count(*) as n from shown;
create policy every on tags using (true);
`
	f := &fixture{Env: pgtest.New(t), t: t}
	f.admin = pgtest.Admin(t, f.AdminURL)
	f.t1 = f.tenant(f.with(old), "acme")
	f.in(f.t1, rows+`insert into tags (name) values ('old'), ('new'), ('gone'); insert into tagged (book, tag, author) values (1, 1, 1), (4, 2, 3); delete from tags where name = 'gone'`)
	f.ref = f.print(f.t1)
	m := f.with(old, `update books set title = title || '!';
		alter table tags add column colour text, add column weight int not null default 3, add check (weight > 0), add unique (colour); create index on tags (weight); create policy more on tags using (weight > 0);
		create table notes (tag integer references tags (id), body text); insert into notes values (1, 'by the run');
		alter table tagged add column note text, drop constraint tagged_author_fkey, add constraint tagged_author_fkey foreign key (author) references authors (id) on delete cascade;
		drop view counts; drop view shown; create view shown as select id, colour from tags; create trigger tagged_more before update on tagged for each row execute function note()`)
	s, told := f.telling(m)
	run := f.migrated(m, s, f.t1)
	require.ElementsMatch(t, []string{"books", "log"}, f.kept(run, f.t1, s))
	f.in(f.t1, `update tags set colour = 'red' where id = 1; insert into tags (name) values ('later'); insert into tagged (book, tag) values (1, 2);
		insert into tags (name) values ('came and went'); delete from tags where name = 'came and went'`)
	tags, tagged, authors, seeded := f.oid(f.t1, "tags"), f.oid(f.t1, "tagged"), f.oid(f.t1, "authors"), f.oid(f.t1, "seeded")

	_, err := s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	require.Empty(t, told.String())
	require.Equal(t, f.ref, f.print(f.t1), "the structure of the old version")
	require.Equal(t, []string{tags, tagged, authors}, []string{f.oid(f.t1, "tags"), f.oid(f.t1, "tagged"), f.oid(f.t1, "authors")}, "the same tables")
	require.NotEqual(t, seeded, f.oid(f.t1, "seeded"), "its rule is tied to log, which was put back")
	require.Equal(t, "(1,old) (2,new) (4,later)", f.all(f.t1, "tags"), "those of today")
	require.Equal(t, "3", f.ask(f.t1, "select count(*) from tagged"))
	require.Equal(t, "Notes", f.ask(f.t1, "select title from books where id = 1"), "as before the run")
	require.Equal(t, "notes it", f.ask(f.t1, `select obj_description(oid, 'pg_trigger') from pg_trigger where tgname = 'tagged_noted' and tgrelid = 'tagged'::regclass`))
	require.Equal(t, "tags to show", f.ask(f.t1, `select obj_description('shown'::regclass, 'pg_class')`))
	require.Equal(t, "as people write it", f.ask(f.t1, `select col_description('tags'::regclass, 2)`))
	require.Equal(t, "3", f.ask(f.t1, "select n from counts"))
	f.Invariants(t)

	// What went with the columns can be looked up; and no number is given twice.
	undone := f.scalar(`select undone from public.undo_points`)
	require.Equal(t, "1|red|3 2|<null>|3 4|<null>|3", f.scalar(`select string_agg(concat_ws('|', id, coalesce(colour, '<null>'), weight), ' ' order by id) from `+undone+`.tags`))
	f.in(f.t1, `delete from tagged; delete from tags; insert into tags (name) values ('next')`)
	require.Equal(t, "6", f.ask(f.t1, "select id from tags"))

	// The trigger and the keys are those of the new schema.
	require.Equal(t, "0", f.scalar(`select count(*) from pg_depend d join pg_namespace n on n.nspname = $1
where d.refclassid = 'pg_class'::regclass and d.refobjid = any($2::oid[])
and (d.classid, d.objid) in (select classid, objid from pg_depend where refclassid = 'pg_namespace'::regclass and refobjid = n.oid)`, undone, []string{tags, tagged, authors}))
	was := f.ask(f.t1, "select count(*) from log")
	f.in(f.t1, `insert into tagged (book, tag, author) values (2, 6, 1)`)
	require.Equal(t, "1", f.ask(f.t1, "select count(*) - "+was+" from log"))
	f.in(f.t1, `delete from authors where id = 3; drop view counts; drop view shown; drop policy every on tags; alter table tags alter column name type varchar(99)`)
	require.NoError(t, f.DB.InTenant(t.Context(), f.t1, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), `insert into tags (name) values ('by the tenant itself')`)
		return err
	}))
	f.Invariants(t)
}

// What is in the way of moving does not keep the tenant from being taken back: then all is copied.
func TestWhatCannotBeMovedIsCopied(t *testing.T) {
	t.Parallel()
	for what, c := range map[string]struct {
		up, later, why string
	}{
		"a view that something hangs on": {`create function thin() returns setof thick language sql as 'select id, title from thick'`, ``, "SQLSTATE 2BP01"},
		"an index under another's name":  {`drop index books_author_idx; create index books_author_idx on authors (born)`, ``, ""},
		"a setting of somebody's":        {`update books set title = title || '!'`, `alter table authors set (fillfactor = 50); alter table authors alter column name set statistics 7`, ""},
		"a sequence's step":              {`update books set title = title || '!'`, `alter sequence plain_id_seq increment 5`, "sequence plain_id_seq"},
		"a comment":                      {`update books set title = title || '!'`, `comment on column authors.name is 'mine'`, ""},
		"statistics":                     {`update books set title = title || '!'`, `create statistics s on id, name from authors`, ""},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			m := f.with(first, c.up)
			s, told := f.telling(m)
			run := f.migrated(m, s, f.t1)
			f.in(f.t1, c.later)
			authors := f.oid(f.t1, "authors")
			_, err := s.Undo(t.Context(), f.t1, run)
			require.NoError(t, err)
			require.Equal(t, f.ref, f.print(f.t1))
			require.Equal(t, "5", f.ask(f.t1, "select count(*) from log"))
			require.Equal(t, "(4,1446)", f.ask(f.t1, "select row(count(*), sum(pages)) from books"))
			require.Equal(t, "", f.ask(f.t1, `select col_description('authors'::regclass, 2)`))
			require.NotEqual(t, authors, f.oid(f.t1, "authors"))
			if c.why == "" {
				require.Empty(t, told.String())
			} else {
				require.Contains(t, told.String(), c.why)
			}
			f.Invariants(t)
		})
	}
}

// Who reads a table past the gate is waited for: a table is not moved under a reader's eyes.
func TestReadersPastTheGate(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `update books set title = title || '!' where id = 1`)
	s := f.snapshots(m)
	run := f.migrated(m, s, f.t1)
	reader := pgtest.Admin(t, f.AdminURL)
	_, err := reader.PgConn().Exec(t.Context(), `begin; select * from acme.parts; select * from acme.empty_handed`).ReadAll()
	require.NoError(t, err)
	_, err = s.Undo(t.Context(), f.t1, run)
	require.Truef(t, fault.Is(err, fault.Locked), "%v", err)
	_, err = reader.Exec(context.Background(), `commit`)
	require.NoError(t, err)
	_, err = s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	require.Equal(t, f.ref, f.print(f.t1))
	f.Invariants(t)
}
