package transfer_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

const (
	releasedDir = "../archive/testdata/v1"
	// releasedWord opens passphrase.oneo.
	releasedWord = "correct horse battery staple"
	releasedRows = `
insert into people (name, born) values ('Ada', '1815-12-10'), ('Grace', null), ('before', '-infinity');
insert into deals (person, title, worth, data) values (1, 'Engine', 12345678901234.5678, '{"a": [1.10, null]}'), (2, 'Compiler', 'NaN', '{}'), (1, 'Notes', 0, '{"ä": "ß"}');
insert into "Odd ""Name" values (E'tab\there\nline\\.\n\\N', 1, '\x00ff5c', 'infinity', '{"a,b",NULL,"c\"d"}'), ('', null, '', '2026-01-01 00:00:00.000001+00', '{}'), (null, -1, null, null, '[2:3]={x,y}');
insert into sessions values ('secret');
refresh materialized view persons`
	releasedOwn = `create table notes (id serial primary key, deal bigint references deals (id), text text); insert into notes (deal, text) values (1, 'mine');
create index notes_text on notes (text); create view mine as select text from notes`
)

// The archives of each released format are restored for ever. Those of a new format are made once, by
// ONEO_MAKE_ARCHIVES=1 go test -tags nomsgpack -run TestReleasedArchives ./pkg/transfer, which makes none that is there.
func TestReleasedArchives(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	product, err := os.ReadFile(filepath.Join(releasedDir, "0001_product.up.sql"))
	require.NoError(t, err)
	p := f.with(string(product))
	if os.Getenv("ONEO_MAKE_ARCHIVES") != "" {
		makeArchives(f, p)
	}
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(releasedDir, name))
		require.NoError(t, err)
		return b
	}
	check := func(got tenant.Tenant) {
		for sql, want := range map[string]string{
			`select string_agg(name || coalesce(born::text, '?'), ',' order by id) from people`:                          "Ada1815-12-10,Grace?,before-infinity",
			`select string_agg(title || ' ' || worth || ' ' || data || ' ' || search, ',' order by id) from deals`:       `Engine 12345678901234.5678 {"a": [1.10, null]} engine,Compiler NaN {} compiler,Notes 0.0000 {"ä": "ß"} notes`,
			`select string_agg(o::text, ';' order by "select") from "Odd ""Name" o where "a column" is distinct from ''`: `(,-1,,,"[2:3]={x,y}");("tab` + "\there\nline\\\\.\n\\\\N" + `",1,"\\x00ff5c",infinity,"{""a,b"",NULL,""c\\""d""}")`,
			`select count(*) from sessions`: "0", `select nextval('tickets')`: "121", `select sum(deals) from persons`: "3",
			`select obj_description('deals_person'::regclass)`: "by person", `select count(*) from large`: "2",
		} {
			require.Equal(t, want, f.ask(got, sql), sql)
		}
		f.in(got, `insert into people (name) values ('next'); insert into deals (person, title) values (4, 'Next')`)
		require.Equal(t, "4 4", f.ask(got, `select person || ' ' || id from deals where title = 'Next'`))
		require.Equal(t, "128", f.ask(got, `select last_value from tickets`))
	}
	plain, err := f.load(p, read("plain.oneo"), "plain")
	require.NoError(t, err)
	check(plain)
	word, err := archive.PassphraseIdentity(releasedWord)
	require.NoError(t, err)
	locked, err := f.load(p, read("passphrase.oneo"), "locked", func(o *transfer.ImportOptions) { o.Identities = []archive.Identity{word} })
	require.NoError(t, err)
	check(locked)
	_, err = f.load(p, read("custom.oneo"), "custom")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	custom, err := f.load(p, read("custom.oneo"), "custom", withDDL)
	require.NoError(t, err)
	check(custom)
	require.Equal(t, "mine", f.ask(custom, `select text from mine`))

	// Where structures are described by other words, or under another major version, the migrations' checksums decide.
	other := forge(t, read("plain.oneo"), func(f *forged) { f.Words, f.Base, f.Fingerprint = 0, "other", "other" })
	got, err := f.load(p, other, "words")
	require.NoError(t, err)
	check(got)
	other = forge(t, read("plain.oneo"), func(f *forged) { f.Postgres, f.Base, f.Fingerprint = 90_600, "other", "other" })
	got, err = f.load(p, other, "major")
	require.NoError(t, err)
	check(got)
	other = forge(t, other, func(f *forged) { f.Migrations[0].Checksum = bytes.Repeat([]byte{1}, 32) })
	_, err = f.load(p, other, "checksums")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	f.nothing("checksums")
}

func makeArchives(f *fixture, p parts) {
	one := f.tenant(p, "released")
	f.in(one, releasedRows)
	word, err := archive.PassphraseRecipient(releasedWord)
	require.NoError(f.t, err)
	save := func(name string, to ...archive.Recipient) {
		path := filepath.Join(releasedDir, name)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return
		}
		b, _ := f.export(p, one, to...)
		require.NoError(f.t, os.WriteFile(path, b, 0o644))
	}
	save("plain.oneo")
	save("passphrase.oneo", word)
	f.in(one, releasedOwn)
	save("custom.oneo")
}
