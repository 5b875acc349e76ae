package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// forged is an archive that somebody has written anew: its checksums are right.
type forged struct {
	archive.Header
	archive.Registry
	archive.Structure
	tables    []forgedTable
	sequences []archive.Sequence
}

type forgedTable struct {
	archive.Table
	rows  []byte
	count int64
}

func forge(t *testing.T, b []byte, change func(*forged)) []byte {
	t.Helper()
	a, err := archive.NewReader(bytes.NewReader(b), archive.ReadOptions{})
	require.NoError(t, err)
	defer a.Close()
	f := forged{Header: a.Header(), Registry: a.Registry(), Structure: a.Structure()}
	for {
		table, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		rows, err := io.ReadAll(a)
		require.NoError(t, err)
		f.tables = append(f.tables, forgedTable{Table: table, rows: rows})
	}
	trailer, err := a.Trailer()
	require.NoError(t, err)
	for i, s := range trailer.Tables {
		f.tables[i].count = s.Rows
	}
	f.sequences = trailer.Sequences
	change(&f)
	var out bytes.Buffer
	w, err := archive.NewWriter(&out, f.Header)
	require.NoError(t, err)
	require.NoError(t, errors.Join(w.Registry(f.Registry), w.Structure(f.Structure)))
	for _, table := range f.tables {
		rows, err := w.Table(table.Table)
		require.NoError(t, err)
		_, err = rows.Write(table.rows)
		require.NoError(t, err)
		require.NoError(t, w.EndTable(table.count))
	}
	_, err = w.Close(f.sequences)
	require.NoError(t, err)
	return out.Bytes()
}

func withDDL(o *transfer.ImportOptions) { o.CustomDDL = true }

// SQL in an archive that reaches beyond the tenant's schema is named and not run, nor is anything before it, whether its
// reach is seen in its text, or under the names that it is run with, or only by what it did.
func TestCustomDDLIsConfined(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one, other := f.tenant(p, "acme"), f.tenant(p, "other")
	f.in(one, rows)
	f.in(other, rows)
	b, _ := f.export(p, one)
	ctx := context.Background()
	for _, sql := range []string{`create table ext.shared (id integer)`, `alter table ext.shared owner to oneo_owner`, `grant usage, create on schema ext to oneo_owner`} {
		_, err := f.admin.Exec(ctx, sql)
		require.NoError(t, err)
	}
	_, before := f.export(p, other)
	structure := func() int {
		return f.count(`select count(*) from pg_class where relnamespace in ('other'::regnamespace, 'ext'::regnamespace, 'public'::regnamespace)`) +
			f.count(`select count(*) from pg_roles where rolname = 'bob'`) + 1000*f.count(`select count(*) from pg_namespace`)
	}
	there := structure()
	for _, sql := range []string{
		`drop schema other cascade`, `drop table other.books`, `create view spy as select token from other.sessions`, `create role bob`, `grant select on table books to oneo_app`,
		`do $$ begin drop schema other cascade; end $$`, `create table x (id integer); drop table other.books`, `set search_path to other`, `copy books to program 'id'`,
		`create function f() returns integer language plpgsql immutable as $$ begin execute 'drop schema other cascade'; return 1; end $$`,
		`create materialized view spy as select most_common_vals from pg_stats`, "create table \x05.x (id integer) tablespace \x03; drop table other.books",
		`alter table "oneo schema to come".books add column spy integer`, `alter table books owner to "oneo owner to come"`, `drop table shared`, `alter table shared add column spy integer`,
	} {
		bad := forge(t, b, func(f *forged) {
			f.Custom = []archive.Statement{{Object: "table fine", SQL: `create table fine (id integer)`}, {Object: "what is forged", SQL: sql}}
			f.Fingerprint = "forged"
		})
		_, err := f.load(p, bad, "copy", withDDL)
		require.True(t, fault.Is(err, fault.Conflict), "%s: %v", sql, err)
		require.Equal(t, "custom_ddl_refused", fault.Of(err).StableCode(), "%s: %v", sql, err)
		f.nothing("copy")
		if !strings.Contains(sql, "to come") && !strings.Contains(sql, "table shared") {
			require.Zero(t, f.count(`select count(*) from public.operations where slug = 'copy'`), "%s: not even begun", sql)
		}
		_, _, err = p.Restore(ctx, one, bytes.NewReader(bad), 1, false, transfer.Loading{Actor: "test", CustomDDL: true})
		require.Equal(t, "custom_ddl_refused", fault.Of(err).StableCode(), "%s: %v", sql, err)
		require.Equal(t, there, structure(), sql)
	}
	_, after := f.export(p, other)
	require.Equal(t, before.Tables, after.Tables)
	f.Invariants(t)
}

// What a tenant can have of its own is carried by statements that are let through.
func TestEveryKindOfCustomDDL(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	_, err := f.admin.Exec(t.Context(), `create extension citext with schema ext`)
	require.NoError(t, err)
	f.in(one, rows)
	f.in(one, beyond)
	f.in(one, `drop materialized view counted; alter table books alter column author type bigint, alter column title drop not null, add column extra integer generated always as identity;
drop trigger noted on books; create or replace function note() returns trigger language plpgsql as $$ begin return new; end $$; create sequence away; grant execute on function note() to public;
drop table seeded; alter table authors alter column born set default '2000-01-01'`)
	b, trailer := f.export(p, one)
	two, err := f.load(p, b, "copy", withDDL)
	require.NoError(t, err)
	_, again := f.export(p, two)
	require.Equal(t, trailer.Tables, again.Tables)
	require.Equal(t, trailer.Sequences, again.Sequences)
	require.Equal(t, f.ask(one, `select count(*) from moods`), f.ask(two, `select count(*) from moods`))
}

// What comes in is compared with what an archive says of itself, whatever its checksums say: the count of rows, and the structure.
func TestForgedCounts(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, trailer := f.export(p, one)
	refused := func(kind fault.Kind, words string, change func(*forged)) {
		_, err := f.load(p, forge(t, b, change), "copy", withDDL)
		require.True(t, fault.Is(err, kind), "%v", err)
		require.ErrorContains(t, err, words)
		f.nothing("copy")
	}
	for i, s := range trailer.Tables {
		refused(fault.Unverified, "rows in the archive", func(f *forged) { f.tables[i].count = s.Rows + 1 })
	}
	other := func(f *forged) { f.Fingerprint = "another structure" }
	refused(fault.Conflict, "not the structure that was exported", other)
	refused(fault.Conflict, "not the structure that was exported", func(f *forged) {
		f.Custom = []archive.Statement{{Object: "table more", SQL: `create table more (id integer)`}}
	})
	refused(fault.Conflict, "not make", func(f *forged) { f.sequences[0].Name = "other" })
	refused(fault.Conflict, "not make", func(f *forged) { f.tables[0].Name = "other" })
	refused(fault.Conflict, "not make", func(f *forged) { f.tables[0].Columns = append(f.tables[0].Columns, "other") })
	refused(fault.Unverified, "twice", func(f *forged) { f.tables = append(f.tables, f.tables[0]) })
	_, err := f.load(p, forge(t, b, func(*forged) {}), "copy")
	require.NoError(t, err, "what was forged by nothing is as it was")
}

var errEnough = errors.New("enough")

// A stream is read once: a transaction that is begun again does not take what is left of it, nothing, for all of it.
func TestStreamIsReadOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (id integer)`)
	one := f.tenant(p, "acme")
	b, _ := f.export(p, one)
	a, err := archive.NewReader(bytes.NewReader(b), archive.ReadOptions{})
	require.NoError(t, err)
	defer a.Close()
	ctx := t.Context()
	fill, err := p.Filling(ctx, a, postgres.MainGroup)
	require.NoError(t, err)
	load := func() (err error) {
		terr := f.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			if err = tx.Script(ctx, `create schema twice; create table twice.notes (id integer)`); err == nil {
				err = fill.Rows(ctx, tx, structure.Schema{Name: "twice", Role: f.role(one)})
			}
			return errEnough
		})
		require.ErrorIs(t, terr, errEnough)
		return err
	}
	first := load()
	require.NotEqual(t, "import_interrupted", fault.Of(errors.Join(first, errEnough)).StableCode())
	again := load()
	require.True(t, fault.Is(again, fault.Conflict), "%v", again)
	require.Equal(t, "import_interrupted", fault.Of(again).StableCode())
}

// Rows that a policy hides from who reads are in an export all the same, or there is none.
func TestRowSecurityHidesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (id integer primary key); alter table notes enable row level security; create policy few on notes using (id = 1)`)
	one := f.tenant(p, "acme")
	f.in(one, `insert into notes values (1), (2), (3)`)
	for _, format := range []transfer.Format{transfer.Archive, transfer.SQL, transfer.NDJSON} {
		_, trailer := f.exportAs(p, "acme", format)
		require.EqualValues(t, 3, trailer.Rows(), format)
	}
	b, _ := f.export(p, one)
	_, err := f.load(p, b, "copy")
	require.NoError(t, err)
	f.in(one, `alter table notes force row level security`)
	for _, format := range []transfer.Format{transfer.Archive, transfer.SQL, transfer.NDJSON} {
		_, err := p.Export(t.Context(), one, io.Discard, transfer.ExportOptions{Format: format})
		require.ErrorContains(t, err, "row-level security", format)
	}
}

// Sequences are read when the rows have been: whatever an export holds, its sequences are ahead of it.
func TestSequencesAreAheadOfRows(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (id integer generated always as identity primary key)`)
	one := f.tenant(p, "acme")
	f.in(one, `insert into notes default values`)
	trailer, err := p.Export(t.Context(), one, io.Discard, transfer.ExportOptions{Begun: func(archive.Header) {
		f.in(one, `insert into notes default values; insert into notes default values`)
	}})
	require.NoError(t, err)
	require.EqualValues(t, 1, trailer.Rows(), "of the moment at which it was begun")
	require.Equal(t, []archive.Sequence{{Name: "notes_id_seq", Last: 3, Called: true}}, trailer.Sequences)
}

// An export that waits for another operation holds what that has done.
func TestLockComesBeforeTheSnapshot(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (id integer primary key)`)
	one := f.tenant(p, "acme")
	ctx := t.Context()
	_, err := f.admin.Exec(ctx, `select pg_advisory_lock($1, $2)`, postgres.OperationLock, one.Number)
	require.NoError(t, err)
	type answer struct {
		trailer archive.Trailer
		err     error
	}
	done := make(chan answer, 1)
	go func() {
		trailer, err := p.Export(ctx, one, io.Discard, transfer.ExportOptions{})
		done <- answer{trailer, err}
	}()
	// It asks for the lock again and again.
	require.Eventually(t, func() bool {
		return f.count(`select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and query like '%pg_try_advisory_lock%'`) > 0
	}, time.Minute, 5*time.Millisecond)
	f.in(one, `insert into notes values (1)`)
	_, err = f.admin.Exec(ctx, `select pg_advisory_unlock($1, $2)`, postgres.OperationLock, one.Number)
	require.NoError(t, err)
	got := <-done
	require.NoError(t, got.err)
	require.EqualValues(t, 1, got.trailer.Rows())
}

// Rows that were there before a check that is not valid come back, and the check with them.
func TestChecksThatAreNotValid(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create domain percent as integer; create table notes (id integer primary key, share percent); insert into notes values (1, 500);
alter table notes add constraint positive check (id > 1) not valid; comment on constraint positive on notes is 'since 2026';
alter domain percent add constraint range check (value < 100) not valid`)
	one := f.tenant(p, "acme")
	b, _ := f.export(p, one)
	two, err := f.load(p, b, "copy")
	require.NoError(t, err)
	require.Equal(t, "1 500", f.ask(two, `select id || ' ' || share from notes`))
	require.Equal(t, pgtest.Fingerprint(t, f.admin, "acme", f.role(one)), pgtest.Fingerprint(t, f.admin, "copy", f.role(two)))
	require.Equal(t, "since 2026", f.ask(two, `select obj_description(oid) from pg_constraint where conname = 'positive' and connamespace = 'copy'::regnamespace`))
	script, _ := f.exportAs(p, "acme", transfer.SQL)
	out, err := psql(f.elsewhere(), script)
	require.NoError(t, err, out)
}
