package transfer_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// beyond is what the tenant has beside its migrations, of the kinds that are hard to make in the right order.
const beyond = `
create extension if not exists citext with schema ext;
create type mood as enum ('sad', 'it''s', 'Happy');
create domain percent as numeric default 0 constraint percent_range check (value between 0 and 100);
create type span as range (subtype = integer);
create type pair as (a integer, b text);
create function doubled(i integer) returns integer language sql immutable as 'select 2 * i';
create table moods (id integer primary key default 1, m mood default 'sad', p percent, s span, pr pair, ma mood[], e ext.citext unique,
	d integer generated always as (doubled(id)) stored, constraint checked check (doubled(id) > 0), exclude using gist (s with &&));
insert into moods values (1, 'it''s', 12.5, '[1,3)', '(1,"a,b")', '{sad,Happy}', 'MiXed'), (2, null, null, 'empty', null, '{}', null);
comment on table moods is E'of every\nkind \\ it''s';
comment on column moods.p is 'percent';
comment on constraint checked on moods is 'always';
comment on type mood is 'a mood';
create view late as select 1 as id, 'x'::text as name;
create function of_view() returns setof late language sql as 'select * from late';
create view above as select id from late;
create view later as select 7 as id, 'y'::text as name;
create or replace view late as select id, name from later;
create function later_name() returns text language sql as 'select name from later';
create materialized view named as select later_name() as name;
create unique index named_name on named (name);
create table parted (id integer, at date) partition by range (at);
create table parted_1 partition of parted for values from ('2026-01-01') to ('2027-01-01');
create unique index "parted On" on parted (id, at);
comment on index "parted On" is 'on all';
insert into parted values (1, '2026-05-01');
create table base (id integer not null, body text); create table derived (more text) inherits (base);
insert into base values (1, 'base'); insert into derived values (2, 'derived', 'more');
alter table base enable row level security;
create policy seen on base using (id > 0);
create policy named on base to current_user using (id > 1);
create table cyclic_a (id integer primary key, b integer); create table cyclic_b (id integer primary key, a integer references cyclic_a);
alter table cyclic_a add foreign key (b) references cyclic_b;
insert into cyclic_a values (1, null); insert into cyclic_b values (1, 1); update cyclic_a set b = 1;
create procedure tidy() language sql as $$ delete from moods where id < 0 $$;
create function pinned() returns integer language sql set search_path from current as 'select count(*)::integer from moods';
create statistics moods_stats on m, p from moods;
create unlogged table scratch (id integer);
alter table moods replica identity full;
`

// elsewhere is an empty database, without oneo.
func (f *fixture) elsewhere() (url string) {
	f.t.Helper()
	name := f.Database + "_elsewhere"
	_, err := f.admin.Exec(context.Background(), "create database "+name+" template template0")
	require.NoError(f.t, err)
	f.t.Cleanup(func() {
		_, err := f.admin.Exec(context.Background(), "drop database "+name+" with (force)")
		require.NoError(f.t, err)
	})
	return f.Server.URL(name)
}

func psql(url, script string) (string, error) {
	cmd := exec.Command("psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", url, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// state is everything in a schema that does not depend on the roles of a server: rows, sequences, comments, structure.
func state(t *testing.T, c *pgx.Conn, schema string) map[string]string {
	t.Helper()
	ctx := context.Background()
	all := map[string]string{}
	rights := regexp.MustCompile(`(^|; )(owner|grants|sequence grants)=[^;]*`)
	for _, line := range pgtest.Fingerprint(t, c, schema, "nobody") {
		line = rights.ReplaceAllString(strings.Replace(line, ": ", ":; ", 1), "")
		if !strings.HasPrefix(line, "schema ") && !strings.HasPrefix(line, "default privileges ") && !strings.HasPrefix(line, "policy base.named:") {
			all[line] = "is"
		}
	}
	rows, err := c.Query(ctx, `select relname::text, relkind::text from pg_class where relnamespace = $1::regnamespace and relkind in ('r', 'm', 'S')`, pgx.Identifier{schema}.Sanitize())
	require.NoError(t, err)
	kinds := map[string]string{}
	var name, kind string
	_, err = pgx.ForEachRow(rows, []any{&name, &kind}, func() error { kinds[name] = kind; return nil })
	require.NoError(t, err)
	for name, kind := range kinds {
		table := pgx.Identifier{schema, name}.Sanitize()
		ask := `select coalesce(string_agg((r.*)::text, E'\n' order by (r.*)::text collate "C"), '') from only ` + table + ` r`
		switch {
		case kind == "S":
			ask = `select last_value || ' ' || is_called from ` + table
		case kind == "m":
			ask = strings.Replace(ask, "only ", "", 1)
		case name == "sessions":
			continue
		}
		var got string
		require.NoError(t, c.QueryRow(ctx, ask).Scan(&got), ask)
		all["rows of "+name] = got
	}
	for _, of := range []string{"'moods'::regclass, 'pg_class'", "'titles'::regclass, 'pg_class'", `'"parted On"'::regclass, 'pg_class'`, "'mood'::regtype, 'pg_type'",
		"(select oid from pg_constraint where conname = 'checked' and connamespace = current_schema()::regnamespace), 'pg_constraint'",
		"(select oid from pg_constraint where conname = 'books_author_fkey' and connamespace = current_schema()::regnamespace), 'pg_constraint'"} {
		_, err := c.Exec(ctx, "set search_path to "+pgx.Identifier{schema}.Sanitize())
		require.NoError(t, err)
		var got *string
		require.NoError(t, c.QueryRow(ctx, "select obj_description("+of+")").Scan(&got))
		require.NotNil(t, got, of)
		all["comment on "+of] = *got
	}
	return all
}

func (f *fixture) exportAs(p parts, slug string, format transfer.Format) (string, archive.Trailer) {
	f.t.Helper()
	one, err := registryTenant(f, slug)
	require.NoError(f.t, err)
	var b bytes.Buffer
	trailer, err := p.Export(f.t.Context(), one, &b, transfer.ExportOptions{Format: format})
	require.NoError(f.t, err)
	return b.String(), trailer
}

// What is written as SQL makes the same tenant where there is no oneo: structure, rows, sequences and comments, and nothing
// of the roles here. Cut off anywhere it makes nothing.
func TestSQL(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	_, err := f.admin.Exec(t.Context(), `create extension citext with schema ext`)
	require.NoError(t, err)
	f.in(one, rows)
	f.in(one, beyond)
	script, trailer := f.exportAs(p, "acme", transfer.SQL)
	require.NotContains(t, script, "oneo_")
	require.NotContains(t, script, "secret", "sessions are never in it")
	require.NotContains(t, strings.ToLower(script), "grant ")
	_, whole := f.export(p, one)
	require.Equal(t, whole.Tables, trailer.Tables, "the rows are those of an archive")

	url := f.elsewhere()
	there := pgtest.Admin(t, url)
	for _, part := range []string{script[:len(script)/3], script[:2*len(script)/3], strings.TrimSuffix(script, "commit;\n"), script[:strings.Index(script, "\nfrom stdin")+1]} {
		_, _ = psql(url, part) // whether psql minds is not the matter
		var n int
		require.NoError(t, there.QueryRow(t.Context(), `select count(*) from pg_namespace where nspname in ('acme', 'ext')`).Scan(&n))
		require.Zero(t, n)
	}
	out, err := psql(url, script)
	require.NoError(t, err, out)
	require.Equal(t, state(t, f.admin, "acme"), state(t, there, "acme"))
	ask := func(sql string) (got string) {
		require.NoError(t, there.QueryRow(t.Context(), "select ("+sql+")::text").Scan(&got), sql)
		return got
	}
	_, err = there.Exec(t.Context(), `set search_path to acme, ext; insert into authors (name) values ('next')`)
	require.NoError(t, err)
	require.Equal(t, "7", ask(`select max(id) from authors`), "sequences go on")
	require.Equal(t, "1", ask(`select count(*) from log where what = 'INSERT authors' and id > 10`), "triggers fire again")
	require.Equal(t, "y", ask(`select name from of_view()`))
	require.Equal(t, "2", ask(`select pinned()`))
	out, err = psql(url, script)
	require.Error(t, err, "it takes the place of nothing")
	require.Contains(t, out, "already exists")
}

// Rows that a refused COPY leaves on psql's input are no commands, whether psql was told to stop or not.
func TestSQLRunsNoRows(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (body text)`)
	one := f.tenant(p, "acme")
	mark := filepath.Join(t.TempDir(), "mark")
	f.in(one, `insert into notes values ('\! touch `+mark+`'), ('create table public.mark ();')`)
	script, _ := f.exportAs(p, "acme", transfer.SQL)
	script = strings.Replace(script, `copy "acme"."notes"`, `copy "acme"."gone"`, 1)
	url := f.elsewhere()
	cmd := exec.Command("psql", "-X", "-q", "-d", url, "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	require.Error(t, err, "%s", out)
	require.NoFileExists(t, mark)
	var n int
	require.NoError(t, pgtest.Admin(t, url).QueryRow(t.Context(), `select count(*) from pg_class where relname = 'mark'`).Scan(&n))
	require.Zero(t, n)
}

// What plain statements cannot make is said before anything is written.
func TestSQLRefused(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, `create aggregate product (integer) (sfunc = int4mul, stype = integer, initcond = 1)`)
	var b bytes.Buffer
	_, err := p.Export(t.Context(), one, &b, transfer.ExportOptions{Format: transfer.SQL})
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "aggregate product(integer)")
	require.Zero(t, b.Len())
	require.Zero(t, f.count(`select count(*) from pg_namespace where nspname like 'oneo_reference%'`))
	pair, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	to, err := archive.ParseRecipient(pair.Recipient().String())
	require.NoError(t, err)
	for _, format := range []transfer.Format{transfer.SQL, transfer.NDJSON} {
		_, err = p.Export(t.Context(), one, &b, transfer.ExportOptions{Format: format, To: []archive.Recipient{to}})
		require.True(t, fault.Is(err, fault.Invalid), "%v", err)
		require.ErrorContains(t, err, "only an archive is encrypted")
	}
	_, err = p.Export(t.Context(), one, &b, transfer.ExportOptions{Format: "csv"})
	require.True(t, fault.Is(err, fault.Invalid), "%v", err)
	require.Zero(t, b.Len())
}

// An export as NDJSON has every row as PostgreSQL writes it as JSON, in a directory and as a tar file alike, and a manifest
// that fits.
func TestNDJSON(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	f.in(one, `create table base (id integer, body text); create table derived (more text) inherits (base);
insert into base values (1, 'base'); insert into derived values (2, 'derived', 'more');
create table documents (id integer primary key, j json, jb jsonb, t text);
insert into documents values (1, E'{"a"\t:\r\n "b\\u0000\\n\\\\",\n"a": 1.10}', '["\n"]', E'\u2028 \b\f\n\r\t\v\x01 "\\" \x7f'), (2, E'\n1e1000000\n', null, '\.'),
	(3, to_json(repeat('\', 100000)), null, repeat(E'\\\n', 100000))`)
	dir := filepath.Join(t.TempDir(), "acme.ndjson")
	var trailer archive.Trailer
	require.NoError(t, store.WriteDir(t.Context(), dir, func(create func(string) (io.WriteCloser, error)) (err error) {
		trailer, err = p.ExportFiles(t.Context(), one, create, transfer.ExportOptions{Format: transfer.NDJSON})
		return err
	}))
	files := map[string][]byte{}
	require.NoError(t, fs.WalkDir(os.DirFS(dir), ".", func(name string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files[name], err = os.ReadFile(filepath.Join(dir, name))
		}
		return err
	}))
	stream, again := f.exportAs(p, "acme", transfer.NDJSON)
	require.Equal(t, trailer, again)
	packed, last := map[string][]byte{}, ""
	for in := tar.NewReader(strings.NewReader(stream)); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		require.NoError(t, err)
		packed[h.Name], err = io.ReadAll(in)
		require.NoError(t, err)
		last = h.Name
	}
	require.Equal(t, "manifest.json", last, "what has a manifest is whole")
	var m, of transfer.Manifest
	require.NoError(t, json.Unmarshal(files["manifest.json"], &m))
	require.NoError(t, json.Unmarshal(packed["manifest.json"], &of))
	of.Made = m.Made
	require.Equal(t, m, of)
	delete(packed, "manifest.json")
	delete(files, "manifest.json")
	require.Equal(t, files, packed)

	require.Equal(t, "acme", m.Slug)
	require.Len(t, m.Tables, len(files))
	require.NotContains(t, slices.Collect(maps.Keys(files)), "sessions.ndjson")
	require.Contains(t, files, "%4Fdd%20%22%4Eame.ndjson")
	tables := map[string]transfer.ManifestTable{}
	for i, table := range m.Tables {
		tables[table.Table] = table
		text := files[table.File]
		require.Equal(t, fmt.Sprintf("%x", sha256.Sum256(text)), table.SHA256, table.Table)
		require.EqualValues(t, len(text), table.Bytes)
		require.Equal(t, table.SHA256, hex.EncodeToString(trailer.Tables[i].SHA256))
		require.EqualValues(t, bytes.Count(text, []byte("\n")), table.Rows)
		lines := bufio.NewScanner(bytes.NewReader(text))
		lines.Buffer(nil, 10<<20)
		// PostgreSQL reads it back as it is: as rows of the table they are the same.
		n, from := 0, pgx.Identifier{"acme", table.Table}.Sanitize()
		for lines.Scan() {
			n++
			require.True(t, json.Valid(lines.Bytes()), "%s: %.200s", table.Table, lines.Text())
			if len(table.Columns) == 0 {
				continue
			}
			if table.Table == "documents" { // of which the blanks between words differ
				continue
			}
			// The bounds of an array are all that JSON does not tell.
			require.Positive(t, f.count(`select count(*) from only `+from+` r where (json_populate_record(null::`+from+`, $1::text::json))::text = (r.*)::text
				or (r.*)::text like '(3,%[2:3]={7,8}%'`, lines.Text()), "%s: %.200s", table.Table, lines.Text())
		}
		require.NoError(t, lines.Err())
		require.EqualValues(t, table.Rows, n)
		require.Equal(t, n, f.count(`select count(*) from only `+from), table.Table)
	}
	require.Equal(t, []string{"id", "kind"}, tables["parts_a"].PrimaryKey)
	require.Equal(t, transfer.ManifestColumn{Name: "search", Type: "text", Null: true, Generated: true}, tables["books"].Columns[4])
	require.Equal(t, "{}\n{}\n", string(files["empty_handed.ndjson"]))
	require.Equal(t, `{"id":1,"body":"base"}`+"\n", string(files["base.ndjson"]), "a table has its own rows only")
	require.Contains(t, string(files["types.ndjson"]), `"r":"NaN"`)
	require.Contains(t, string(files["types.ndjson"]), `"d":"-Infinity"`)
	require.Contains(t, string(files["types.ndjson"]), `"b":"\\x00ff5c00ff5c`)
	require.Contains(t, string(files["types.ndjson"]), `12345678901234567890.12345678901234567890`)
	require.Contains(t, string(files["documents.ndjson"]), `"j": 1e1000000 ,`)
	require.Contains(t, string(files["documents.ndjson"]), `"b\u0000\n\\"`)
}
