package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
	"github.com/oneo-crm/oneo/schemas"
)

func (f *fixture) diff(p parts, t tenant.Tenant, b []byte, of transfer.Parts) (map[string][4]int64, error) {
	all, err := p.Diff(context.Background(), t, bytes.NewReader(b), false, of, transfer.Loading{Actor: "test"})
	counts := map[string][4]int64{}
	for _, d := range all {
		counts[d.Table] = [4]int64{d.Added, d.Removed, d.Changed, d.Same}
	}
	return counts, err
}

func (f *fixture) merge(p parts, t tenant.Tenant, b []byte, of transfer.Parts) (map[string][2]int64, error) {
	all, err := p.Merge(context.Background(), t, bytes.NewReader(b), false, of, func([]transfer.Difference) error { return nil }, transfer.Loading{Actor: "test"})
	counts := map[string][2]int64{}
	for _, m := range all {
		counts[m.Table] = [2]int64{m.Inserted, m.Overwritten}
	}
	return counts, err
}

// What a restore would change, for every kind of table; and it is what the restore then changes.
func TestDiff(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, _ := f.export(p, one)
	got, err := f.diff(p, one, b, transfer.Parts{})
	require.NoError(t, err)
	for table, n := range got {
		if table != "sessions" { // which are in no archive
			require.Zero(t, n[0]+n[1]+n[2], "%s: %v", table, n)
		}
	}
	require.Equal(t, [4]int64{0, 1, 0, 0}, got["sessions"])
	require.Equal(t, [4]int64{0, 0, 0, 4}, got["types"])

	f.in(one, `alter table books disable trigger noted;
insert into authors (name) values ('since'), ('then');
delete from books where id = 2; update books set title = 'Other' where id = 1;
update types set d = 0 where id = 1; update types set j = '{"b":1, "a":2, "a":3}' where id = 2; delete from types where id = 3;
update parts set kind = 'c' where id = 2;
insert into empty_handed default values;
insert into "Odd ""Name" values ('', null, 'ß€😀'), ('new', 7, null); delete from "Odd ""Name" where "select" = 1;
create table own (id integer primary key); insert into own values (1), (2);
alter table books enable trigger noted`)
	want := map[string][4]int64{
		"authors": {0, 2, 0, 5}, "books": {1, 0, 1, 2}, "types": {1, 0, 2, 1}, "parts_rest": {1, 1, 0, 0}, "parts_a": {0, 0, 0, 1},
		"empty_handed": {0, 1, 0, 2}, `Odd "Name`: {1, 2, 0, 2}, "own": {0, 2, 0, 0}, "seeded": {0, 0, 0, 1},
	}
	before, _ := f.export(p, one)
	got, err = f.diff(p, one, b, transfer.Parts{})
	require.NoError(t, err)
	for table, n := range want {
		require.Equal(t, n, got[table], table)
	}
	// Nothing was changed, and nothing is left.
	after, _ := f.export(p, one)
	require.Equal(t, f.sums(before), f.sums(after))
	require.Zero(t, f.count(`select count(*) from public.operations where kind in ('tenant.restore', 'tenant.return')`))
	require.Zero(t, f.count(`select count(*) from pg_namespace where nspname like 'oneo_re%'`))
	f.Invariants(t)
	_, err = f.diff(p, one, b[:len(b)-1], transfer.Parts{})
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)

	_, err = f.restore(p, one, b)
	require.NoError(t, err)
	got, err = f.diff(p, one, b, transfer.Parts{})
	require.NoError(t, err)
	for table, n := range got {
		require.Zero(t, n[0]+n[1]+n[2], "%s: %v", table, n)
	}
}

// A tenant of an older version is compared by the columns that it has; an older archive by those that it had, migrated up.
func TestDiffOverVersions(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	old := f.with(first)
	one := f.tenant(old, "acme")
	f.in(one, rows)
	b, _ := f.export(old, one)
	p := f.with(first, `alter table authors add column initial text; create table later (id integer primary key); insert into later values (1)`)
	got, err := f.diff(p, one, b, transfer.Parts{})
	require.NoError(t, err)
	require.Equal(t, [4]int64{0, 0, 0, 5}, got["authors"])
	require.Equal(t, [4]int64{1, 0, 0, 0}, got["later"])
	_, err = f.merge(p, one, b, transfer.Parts{Tables: []string{"authors"}})
	require.Equal(t, "tenant_behind", fault.Of(err).StableCode(), "%v", err)
	require.Equal(t, 1, f.count(`select version from public.placements`))
}

// Rows come back into live tables: the missing ones, and the changed ones where that was asked for. Nothing is deleted.
func TestMergeTables(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first + `create table zoos (id integer primary key); create table animals (id integer primary key, zoo integer not null references zoos (id));`)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	f.in(one, `insert into zoos values (1); insert into animals values (1, 1)`)
	b, _ := f.export(p, one)
	f.in(one, `delete from animals; delete from zoos`)
	_, err := f.admin.Exec(t.Context(), postgres.GrantRestorePoints("oneo_owner"))
	require.NoError(t, err)
	got, err := f.merge(p, one, b, transfer.Parts{Tables: []string{"animals", "zoos"}})
	require.NoError(t, err, "what others refer to comes first")
	require.Equal(t, map[string][2]int64{"animals": {1, 0}, "zoos": {1, 0}}, got)
	f.in(one, `delete from books; delete from authors where name = 'Mary'; update authors set name = 'Countess' where name = 'Ada'; insert into authors (name) values ('since');
select setval('books_id_seq', 1, false); delete from log`)
	for _, refused := range []struct {
		parts transfer.Parts
		code  string
	}{
		{transfer.Parts{Tables: []string{"nowhere"}}, "unknown_table"},
		{transfer.Parts{Tables: []string{"authors", `Odd "Name`}}, "no_primary_key"},
		{transfer.Parts{Tables: []string{"books"}}, "missing_reference"}, // Mary has gone
		{transfer.Parts{Pipeline: "deals"}, "no_pipelines"},
	} {
		_, err := f.merge(p, one, b, refused.parts)
		require.Equal(t, refused.code, fault.Of(err).StableCode(), "%v: %v", refused.parts, err)
		require.Equal(t, "0", f.ask(one, `select count(*) from books`))
	}
	both := transfer.Parts{Tables: []string{"books", "authors"}}
	seen, err := f.diff(p, one, b, both)
	require.NoError(t, err)
	require.Equal(t, map[string][4]int64{"authors": {1, 0, 1, 4}, "books": {4, 0, 0, 0}}, seen)
	refusal := errors.New("no")
	_, err = p.Merge(t.Context(), one, bytes.NewReader(b), false, both, func([]transfer.Difference) error { return refusal }, transfer.Loading{})
	require.ErrorIs(t, err, refusal)
	require.Equal(t, "0", f.ask(one, `select count(*) from books`))

	got, err = f.merge(p, one, b, both)
	require.NoError(t, err)
	require.Equal(t, map[string][2]int64{"authors": {1, 0}, "books": {4, 0}}, got)
	require.Equal(t, "Countess,Grace,Mary,before,nobody,since", f.ask(one, `select string_agg(name, ',' order by name collate "C") from authors`))
	require.Equal(t, "1", f.ask(one, `select count(*) from log where what = 'INSERT authors'`), "the tenant's triggers hold")
	f.in(one, `insert into books (author, title) select id, 'after' from authors where name = 'since'`) // its number is free
	both.Overwrite = true
	got, err = f.merge(p, one, b, both)
	require.NoError(t, err)
	require.Equal(t, map[string][2]int64{"authors": {0, 1}, "books": {0, 0}}, got)
	require.Equal(t, "1", f.ask(one, `select count(*) from authors where name = 'Ada'`))
	require.Equal(t, "5", f.ask(one, `select count(*) from books`))
	// What does not fit to the tenant's own rules is refused as a whole.
	f.in(one, `delete from books where author = 2; delete from authors where name = 'Grace'; insert into authors (name) values ('Grace')`)
	_, err = f.merge(p, one, b, both)
	require.Equal(t, "rows_do_not_fit", fault.Of(err).StableCode(), "%v", err)
	require.Equal(t, 2, f.count(`select count(*) from public.audit where action = 'tenant.merge' and details -> 'tables' ? 'books'`))
	require.Zero(t, f.count(`select count(*) from pg_namespace where nspname like 'oneo_re%'`))
	// Each merge that was agreed to and done has its restore point, and the audit trail tells whose it is.
	require.Equal(t, 3, f.count(`select count(*) from public.restore_points`))
	require.Equal(t, 3, f.count(`select count(*) from public.restore_points p join public.audit a on (a.details->>'operation')::uuid = p.operation and a.action = p.kind
	where p.kind = 'tenant.merge' and p.tenant = 'acme' and p.group_name = 'main'`))
	f.Invariants(t)
}

// Merged rows of types that the tenant has of its own come back, and whatever gives columns their values goes on behind them:
// also where that had begun anew, counts down, or is a sequence that belongs to no column.
func TestMergeTypesAndSequences(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create type mood as enum ('good', 'bad'); create type pair as (m mood, n integer); create domain short as text check (length(value) < 9);
create table moods (m mood primary key, all_of mood[], p pair, s short, note text);
create table fresh (id integer generated always as identity primary key);
create sequence free; create table loose (id bigint primary key default nextval('free'));
create table down (id integer generated by default as identity (increment -1 minvalue -100 maxvalue 0 start 0) primary key)`)
	one := f.tenant(p, "acme")
	f.in(one, `insert into moods values ('good', '{good,bad}', '(bad,3)', 'x', 'a'), ('bad', null, null, null, 'b');
insert into fresh default values; insert into loose default values; insert into loose default values; insert into down default values; insert into down default values`)
	b, _ := f.export(p, one)
	f.in(one, `delete from moods where m = 'good'; update moods set note = 'spoilt'; truncate fresh, loose, down restart identity; select setval('free', 1, false)`)
	parts := transfer.Parts{Tables: []string{"moods", "fresh", "loose", "down"}, Overwrite: true}
	seen, err := f.diff(p, one, b, parts)
	require.NoError(t, err)
	require.Equal(t, [4]int64{1, 0, 1, 0}, seen["moods"])
	got, err := f.merge(p, one, b, parts)
	require.NoError(t, err)
	require.Equal(t, map[string][2]int64{"moods": {1, 1}, "fresh": {1, 0}, "loose": {2, 0}, "down": {2, 0}}, got)
	require.Equal(t, "(bad,,,,b) (good,\"{good,bad}\",\"(bad,3)\",x,a)", f.ask(one, `select string_agg(moods::text, ' ' order by note desc) from moods`))
	f.in(one, `insert into fresh default values; insert into loose default values; insert into down default values`)
	require.Equal(t, "2 3 -2", f.ask(one, `select (select max(id) from fresh) || ' ' || (select max(id) from loose) || ' ' || (select min(id) from down)`))
	f.Invariants(t)
}

// One pipeline's records come back, with the pipeline and its fields where they are gone.
func TestMergePipeline(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	var up []string
	for _, name := range []string{"tenant/0001_people.up.sql", "tenant/0002_pipelines.up.sql"} {
		text, err := schemas.Files.ReadFile(name)
		require.NoError(t, err)
		up = append(up, string(text))
	}
	second := f.SecondGroup(t)
	db, _, _ := f.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{postgres.MainGroup: f.Group, "second": second}
	})
	f.DB = db
	p := f.on(db, up...)
	_, err := p.migrate.Shared(t.Context())
	require.NoError(t, err)
	for _, group := range []string{"main", "second"} {
		one, err := p.provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme-"+group), Group: group, Actor: "test"})
		require.NoError(t, err)
		id := func(n int) string { return fmt.Sprintf("'00000000-0000-0000-0000-%012d'", n) }
		f.in(one, `insert into users (id, email, password_hash) values (`+id(1)+`, 'ann@acme.example', 'x');
insert into pipelines (id, key, name) values (`+id(10)+`, 'deals', 'Deals'), (`+id(11)+`, 'people', 'People');
insert into fields (id, pipeline_id, key, name, type) values (`+id(20)+`, `+id(10)+`, 'note', 'Note', 'text'), (`+id(21)+`, `+id(10)+`, 'sum', 'Sum', 'number');
insert into records (id, pipeline_id, data, created_by) select ('00000000-0000-0000-0001-' || lpad(n::text, 12, '0'))::uuid, case when n <= 5 then `+id(10)+`::uuid else `+id(11)+`::uuid end,
	jsonb_build_object('note', n), `+id(1)+` from generate_series(1, 8) n`)
		b, _ := f.export(p, one)
		f.in(one, `delete from users; delete from fields where key = 'sum'; update fields set id = `+id(29)+` where key = 'note';
delete from records where data @> '{"note": 1}'; update records set data = '{"note": "spoilt"}' where data @> '{"note": 2}'; delete from records where data @> '{"note": 7}';
insert into records (id, pipeline_id) values (`+id(30)+`, `+id(10)+`)`)
		seen, err := f.diff(p, one, b, transfer.Parts{Pipeline: "deals"})
		require.NoError(t, err)
		require.Equal(t, [4]int64{1, 0, 1, 4}, seen["records"])
		got, err := f.merge(p, one, b, transfer.Parts{Pipeline: "deals"})
		require.NoError(t, err)
		require.Equal(t, map[string][2]int64{"pipelines": {0, 0}, "fields": {1, 0}, "records": {1, 0}}, got)
		require.Equal(t, "6 2 1", f.ask(one, `select (select count(*) from records where pipeline_id = `+id(10)+`) || ' ' || (select count(*) from records where pipeline_id = `+id(11)+
			`) || ' ' || (select count(*) from records where data @> '{"note": "spoilt"}')`))
		got, err = f.merge(p, one, b, transfer.Parts{Pipeline: "deals", Overwrite: true})
		require.NoError(t, err)
		require.Equal(t, [2]int64{0, 1}, got["records"], "the one that was spoilt, and not those that have lost their user")
		f.in(one, `delete from pipelines`)
		got, err = f.merge(p, one, b, transfer.Parts{Pipeline: "deals"})
		require.NoError(t, err)
		require.Equal(t, map[string][2]int64{"pipelines": {1, 0}, "fields": {2, 0}, "records": {5, 0}}, got)
		require.Equal(t, "0", f.ask(one, `select count(*) from records where created_by is not null`))
		_, err = f.merge(p, one, b, transfer.Parts{Pipeline: "nowhere"})
		require.Equal(t, "unknown_pipeline", fault.Of(err).StableCode(), "%v", err)
		f.in(one, `delete from pipelines; insert into pipelines (id, key, name) values (`+id(12)+`, 'deals', 'Deals')`)
		_, err = f.merge(p, one, b, transfer.Parts{Pipeline: "deals"})
		require.Equal(t, "pipeline_remade", fault.Of(err).StableCode(), "%v", err)
		require.Equal(t, 3, f.count(`select count(*) from public.audit where action = 'tenant.merge' and slug = $1 and details ->> 'pipeline' = 'deals'`, one.Slug.String()))
	}
	f.Invariants(t)
}

// sums are what an archive says of its rows.
func (f *fixture) sums(b []byte) any {
	f.t.Helper()
	a, err := archive.NewReader(bytes.NewReader(b), archive.ReadOptions{})
	require.NoError(f.t, err)
	for err == nil {
		_, err = a.Next()
	}
	require.ErrorIs(f.t, err, io.EOF)
	trailer, err := a.Trailer()
	require.NoError(f.t, err)
	return trailer.Tables
}

// kill -9 in the middle of a restore's loading and of a merge, in the registry's database and in another one: the tenant is as it
// was, and the same again succeeds.
func TestKillWhileLoading(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t)
			groups := map[string]postgres.Group{postgres.MainGroup: f.Group}
			if group == "second" {
				groups[group] = f.SecondGroup(t)
			}
			db, _, _ := f.Open(t, func(o *postgres.Options) { o.Groups = groups })
			f.DB = db
			p := f.on(db, first)
			_, err := p.migrate.Shared(t.Context())
			require.NoError(t, err)
			one, err := p.provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
			require.NoError(t, err)
			f.in(one, rows)
			b, _ := f.export(p, one)
			file := f.file(b)
			f.in(one, `delete from books; insert into authors (name) values ('since')`)
			asItWas, _ := f.export(p, one)
			for _, place := range []string{"load.begun", "load.table", "load.table@5", "load.checked", "merge.table", "merge.table@2"} {
				name, nth := place, ""
				if i := bytes.IndexByte([]byte(place), '@'); i > 0 {
					name, nth = place[:i], place[i:]
				}
				for _, what := range []string{"restore", "merge"} {
					if what == "restore" && name == "merge.table" {
						continue
					}
					k := task{What: what, Number: one.Number, File: file, Base: f.Base.String(), Groups: groups}
					code, out := k.process(t, name+"=exit"+nth)
					require.Equal(t, 137, code, "%s of a %s: %s", place, what, out)
					f.died()
					var now []byte
					require.Eventually(t, func() bool { // the dead process's lock goes with its connection
						var b bytes.Buffer
						_, err := p.Export(t.Context(), one, &b, transfer.ExportOptions{})
						now = b.Bytes()
						return err == nil
					}, time.Minute, 100*time.Millisecond)
					require.Equal(t, f.sums(asItWas), f.sums(now), "%s of a %s", place, what)
				}
			}
			k := task{What: "merge", Number: one.Number, File: file}
			f.again(t, p, k)
			require.Equal(t, "4", f.ask(one, `select count(*) from books`))
			k.What = "restore"
			f.again(t, p, k)
			now, _ := f.export(p, one)
			require.Equal(t, f.sums(b), f.sums(now))
			require.Zero(t, f.count(`select count(*) from public.operations where state = 'running'`))
			f.Invariants(t)
		})
	}
}
