package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
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
		`create materialized view spy as select most_common_vals from pg_stats`, `alter table "oneo schema to come".books add column spy integer`, `alter table books owner to "oneo owner to come"`,
		`drop table shared`, `alter table shared add column spy integer`, "create table \x05.x (id integer) tablespace \x03; drop table other.books",
	} {
		bad := forge(t, b, func(f *forged) {
			f.Custom = []archive.Statement{{Object: "table fine", SQL: `create table fine (id integer)`}, {Object: "what is forged", SQL: sql}}
			f.Fingerprint = "forged"
		})
		_, err := f.load(p, bad, "copy", withDDL)
		require.True(t, fault.Is(err, fault.Conflict), "%s: %v", sql, err)
		require.Equal(t, "custom_ddl_refused", fault.Of(err).StableCode(), "%s: %v", sql, err)
		f.nothing("copy")
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
