package transfer_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// A label that was added to an enum, by a migration or in the tenant alone, comes with the rows that have it: before PostgreSQL 17 none
// may be used in the transaction that has added it.
func TestLabelsThatWereAdded(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first, `create type status as enum ('open', 'closed'); create domain stand as status; create table states (s status default 'open', all_of status[], d stand, check (s <> 'closed'));
create function worst() returns status language sql as $$ select max(s) from states $$; create view open as select s from states where s = 'open'; comment on column states.s is 'how it stands'`,
		`alter type status add value 'lost' after 'open'`)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	f.in(one, `insert into states values ('lost', '{open,lost}', 'lost'), ('open', null, null)`)
	b, trailer := f.export(p, one)
	two, err := f.load(p, b, "copy")
	require.NoError(t, err)
	_, again := f.export(p, two)
	require.Equal(t, trailer.Tables, again.Tables)
	require.Equal(t, trailer.Sequences, again.Sequences)
	require.Equal(t, pgtest.Fingerprint(t, f.admin, "acme", f.role(one)), pgtest.Fingerprint(t, f.admin, "copy", f.role(two)))
	require.Equal(t, "lost", f.ask(two, `select worst()`))
	require.Equal(t, "how it stands", f.ask(two, `select col_description('states'::regclass, 1)`))
	require.Equal(t, "who has written it", f.ask(two, `select obj_description(oid) from pg_constraint where conname = 'books_author_fkey' and connamespace = 'copy'::regnamespace`))
	_, err = f.restore(p, one, b)
	require.NoError(t, err)
	f.in(one, `alter type status add value 'own'`)
	f.in(one, `insert into states values ('own')`)
	b, _ = f.export(p, one)
	three, err := f.load(p, b, "three", withDDL)
	require.NoError(t, err)
	require.Equal(t, "own", f.ask(three, `select worst()`))
	f.Invariants(t)
}

// What is computed after the rows have come in, by a migration or a view, is so by the database's time zone, as everywhere else.
func TestTimeZoneOfTheDatabase(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	_, err := f.admin.Exec(t.Context(), `do $$ begin execute format('alter database %I set timezone to %L', current_database(), 'Asia/Tokyo'); end $$`)
	require.NoError(t, err)
	f.DB, _, _ = f.Open(t)
	events := `create table events (at timestamptz); create materialized view days as select at::date as day from events`
	p := f.on(f.DB, events)
	one := f.tenant(p, "acme")
	f.in(one, `insert into events values ('2026-01-01 20:00:00+00')`)
	b, _ := f.export(p, one)
	later := f.on(f.DB, events, `alter table events add column day date; update events set day = at::date`)
	two, err := f.load(later, b, "copy")
	require.NoError(t, err)
	require.Equal(t, "2026-01-02 2026-01-02", f.ask(two, `select e.day || ' ' || d.day from events e, days d`))
}
