package main

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// folder makes a folder of migrations, by name and text.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	add(t, dir, files)
	return dir
}

func add(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
}

// These run in one process with the tests beside them: each process that reads a migration loads the parser.
func TestLintWithoutADatabase(t *testing.T) {
	t.Parallel()
	dir := folder(t, map[string]string{"0001_first.up.sql": `create table a (id integer primary key, n integer);

insert into a (id)
select number from public.tenants where name = 'x';
alter table elsewhere alter column n type bigint;
`, "0001_first.down.sql": "set search_path to public;\ndrop table a;\n"})
	c := command{t: t, environ: []string{"ONEO_SCHEMAS_DIR=" + dir}}
	told := c.run(exitUnverified, "migrate lint")
	require.Regexp(t, `(?m)^0001_first.up.sql +4 +foreign-schema +error +.*public.tenants`, told)
	require.Regexp(t, `(?m)^0001_first.down.sql +1 +search-path +error `, told)
	require.Contains(t, told, "no database is asked (no database is configured): all files are read")
	require.Contains(t, told, "no estimate")
	require.Contains(t, told, "2 file(s) read: 3 error(s), 0 warning(s)")
	c.environ = append(c.environ, "ONEO_DATABASE_URL=postgres://app:sesame-open@127.0.0.1:1/oneo")
	told = c.run(exitUnverified, "migrate lint")
	require.Contains(t, told, "cannot be reached")
	require.NotContains(t, told, "sesame")

	var rows []map[string]any
	require.NoError(t, json.Unmarshal([]byte(c.run(exitUnverified, "migrate lint --offline -q -o json")), &rows))
	require.Len(t, rows, 3)
	require.Equal(t, "write the name unqualified: the search path is the tenant's schema, then ext", rows[0]["instead"])
	require.Contains(t, rows[1]["locks"], "ACCESS EXCLUSIVE")
	require.Nil(t, rows[1]["estimate"])

	// Warnings exit 0, and so does nothing at all.
	add(t, dir, map[string]string{"0001_first.up.sql": "create table a (id integer primary key);", "0001_first.down.sql": "drop table a;"})
	require.Equal(t, "[]\n", c.run(0, "migrate lint --offline -q -o json"))
	require.NoError(t, os.Remove(filepath.Join(dir, "0001_first.down.sql")))
	require.Contains(t, c.run(0, "migrate lint --offline"), "0 error(s), 1 warning(s)")
	// Line numbers are the file's, also of goose's second half.
	require.NoError(t, os.Remove(filepath.Join(dir, "0001_first.up.sql")))
	add(t, dir, map[string]string{"0001_first.sql": "-- +goose Up\ncreate table a (id integer);\n\n-- +goose Down\nreset all;\n"})
	require.Regexp(t, `(?m)^0001_first.sql +5 +search-path`, c.run(exitUnverified, "migrate lint --offline"))
}

// What oneo is delivered with passes, and what `oneo migrate new` makes does not until it is written.
func TestLintOfWhatIsThere(t *testing.T) {
	t.Parallel()
	c := command{t: t}
	require.Contains(t, c.run(0, "migrate lint --offline"), ": 0 error(s), 0 warning(s)")
	require.Contains(t, c.run(0, "migrate lint --offline --shared"), ": 0 error(s), 0 warning(s)")
	dir := folder(t, nil)
	c.environ = []string{"ONEO_SCHEMAS_DIR=" + dir}
	c.run(0, "migrate new one")
	told := c.run(exitUnverified, "migrate lint --offline")
	require.Regexp(t, `(?m)^0001_one.up.sql +1 +empty +error`, told)
	require.Regexp(t, `(?m)^0001_one.down.sql +1 +empty +error`, told)
}

// Two that make a migration at one time: the second finds the name taken, and leaves nothing of its own behind.
func TestNewOverwritesNothing(t *testing.T) {
	t.Parallel()
	dir := folder(t, map[string]string{"0001_a.down.sql": "select 1"})
	_, err := writeNew(dir, "0001_a", newOptions{})
	require.ErrorContains(t, err, "0001_a.down.sql is there already")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
	text, err := os.ReadFile(filepath.Join(dir, "0001_a.down.sql"))
	require.NoError(t, err)
	require.Equal(t, "select 1", string(text))
}

// With a database only what is applied nowhere is read, and it is told what that is for the fleet.
func TestLintAsksTheFleet(t *testing.T) {
	t.Parallel()
	c := newCommand(t)
	// Only this test counts the rows: autovacuum would analyze the table of the tenant that is never analyzed.
	dir := folder(t, map[string]string{"0001_records.up.sql": `create table records (id integer primary key, n integer, text text) with (autovacuum_enabled = off);
insert into records (id, n, text) select i, i, repeat('x', 1000) from generate_series(1, 100) as i;
create view all_records as select * from (select id from records) as r;
`})
	c.environ = append(c.environ, "ONEO_SCHEMAS_DIR="+dir)
	e := &env{in: strings.NewReader(""), out: io.Discard, err: io.Discard, environ: c.environ, flags: map[string]string{}}
	a, err := e.open()
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, a.Close()) })
	pending := func() []lint.Finding {
		t.Helper()
		a, err := e.open()
		require.NoError(t, err)
		found, err := lintPending(t.Context(), e, a)
		require.NoError(t, err)
		return found
	}
	require.Empty(t, pending(), "no tenant is behind: nothing is read")
	c.run(0, "tenant create acme")
	c.run(0, "tenant create beta --group second")
	c.run(0, "tenant create gone")
	c.run(0, "tenant drop gone --yes")
	require.Contains(t, c.run(0, "migrate lint"), "nothing to read")
	require.Equal(t, "[]\n", c.run(0, "migrate lint -q -o json"))
	require.Regexp(t, `0001_records.up.sql +3 +select-star`, c.run(exitUnverified, "migrate lint --all"))
	require.Empty(t, pending())

	admin := pgtest.Admin(t, c.env.AdminURL)
	_, err = admin.Exec(t.Context(), `insert into acme.records (id, n, text) select i, i, '' from generate_series(1001, 3000) as i`)
	require.NoError(t, err)
	_, err = admin.Exec(t.Context(), `vacuum analyze acme.records`)
	require.NoError(t, err)
	add(t, dir, map[string]string{"0002_wider.up.sql": "-- wider\nalter table records alter column n type bigint;\n", "0002_wider.down.sql": "drop table no_matter;"})
	told := c.run(exitUnverified, "migrate lint --new-only")
	require.Regexp(t, `0002_wider.up.sql +2 +type-rewrite +error`, told)
	require.NotContains(t, told, "0001_records")
	require.Regexp(t, `estimate: records: 2 tenant\(s\), about 2,100 row\(s\), .* in all, the largest acme .*; 1 of them never analyzed, .*; ACCESS EXCLUSIVE`, told)
	var rows []struct {
		Estimate estimate `json:"estimate"`
	}
	require.NoError(t, json.Unmarshal([]byte(c.run(exitUnverified, "migrate lint -q -o json")), &rows))
	require.Len(t, rows, 1)
	require.Equal(t, "acme", rows[0].Estimate.Largest.Tenant)
	require.Greater(t, rows[0].Estimate.Bytes, int64(100_000))

	// The file is read before every run, until a tenant has it.
	require.NoError(t, a.Close())
	e.app = nil
	found := pending()
	require.Len(t, found, 1)
	require.Equal(t, "type-rewrite", found[0].Rule)
	require.Contains(t, c.run(exitUsage, "migrate -t acme"), "type-rewrite")
	c.run(0, "migrate -t acme --force")
	require.Empty(t, pending(), "applied somewhere, though beta is behind")
}

func TestNumbersAsPeopleReadThem(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 1234567: "1,234,567"} {
		require.Equal(t, want, grouped(n))
	}
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1 kB", 1536: "1.5 kB", 220 << 20: "220 MB", 3328599655: "3.1 GB"} {
		require.Equal(t, want, size(n))
	}
}
