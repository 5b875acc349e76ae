package migrate_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/provision"
)

// A step is one transaction: a file that ends it is refused before anything is done, with its name and line.
func TestTransactionControlIsRefused(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]string{
		"begin;\ncreate table a (id int);\ncommit;":            "line 1: begin",
		"create table a (id int);\ncommit;":                    "line 2: commit",
		"create table a (id int); /* so */ -- it is\n  COMMIT": "line 2: commit",
		"Start Transaction; select 1":                          "line 1: start",
		"select 1; end":                                        "line 1: end",
		"select 1; rollback to x":                              "line 1: rollback",
		"abort":                                                "line 1: abort",
		"savepoint x; select 1":                                "line 1: savepoint",
		"select 1; release x":                                  "line 1: release",
		"select 1; prepare transaction 'x'":                    "line 1: prepare transaction",
		"do $$ begin perform 1; end $$; commit":                "line 1: commit",
		"select 'it''s'; commit":                               "line 1: commit",
		`select E'it\'s'; commit`:                              "line 1: commit",
		`select 'a\'; commit`:                                  "line 1: commit",
		"select $1$; commit; $1$":                              "line 1: commit",
		"create function f() returns int language sql begin atomic select 1; end; commit":   "line 1: commit",
		"create function f() returns int as 'select 1' language sql; begin; select 1; end;": "line 1: begin",

		"create table a (id int)":                "",
		"do $$ begin perform 1; commit; end $$;": "",
		"create function f() returns trigger language plpgsql as $body$\nbegin\n  return new;\nend;\n$body$": "",
		"select $a$ $b$; commit; $b$ $a$": "",
		"select '; commit;', \"; commit;\", E'\\'; commit;' -- ; commit;\n/* ; commit; /* ; begin; */ ; commit; */":                        "",
		"comment on table a is 'begin; commit;'; alter table a rename column commit to \"end\"":                                            "",
		"create function f(n int) returns int language sql begin atomic select case when n > 0 then 1 else 2 end; select 2; end; select 1": "",
		"create or replace procedure p() begin atomic insert into a values (1); insert into a values (2); end;\nselect 1":                  "",
		"create table t (\"begin\" int, start int, release int); select begin from t; insert into t (start) values (1)":                    "",
		"prepare x as select 1; deallocate x":        "",
		"select case when true then 1 end; select 1": "",
	} {
		got, err := migrate.Load(files("0001_a.up.sql", "select 1", "0002_b.up.sql", sql), ".")
		if want == "" {
			require.NoErrorf(t, err, "%s", sql)
			require.Len(t, got, 2)
			continue
		}
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", sql, err)
		require.Contains(t, err.Error(), "0002_b.up.sql", sql)
		require.Contains(t, err.Error(), want, sql)
		require.Contains(t, fault.Of(err).Hint, "leave", sql)
	}
	_, err := migrate.Load(files("0001_a.up.sql", "select 1", "0001_a.down.sql", "begin; select 1; commit"), ".")
	require.ErrorContains(t, err, "0001_a.down.sql")
}

// What slips past the scanner is still found: on a server that is set to read backslashes in quotes, a commit stands
// where the standard sees a literal.
func TestLeavingTheTransactionIsFound(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	fs := files("0001_a.up.sql", "create table a (id int);")
	a := create(t, provisioner(t, env.DB, with(t, env.DB, fs)), "acme")
	_, err := pgtest.Admin(t, env.AdminURL).Exec(ctx, `do $$ begin execute format('alter database %I set standard_conforming_strings to off', current_database()); end $$`)
	require.NoError(t, err)
	fs["0002_b.up.sql"] = &fstest.MapFile{Data: []byte(`set local escape_string_warning to off; create table b (id int); select 'a\', ' ; commit; begin; select 1 -- '`)}
	db, _, _ := env.Open(t)
	_, err = with(t, db, fs).Tenant(ctx, a, migrate.TenantOptions{})
	requireFault(t, err, fault.Invalid, "transaction_control")
	_, err = provisioner(t, db, with(t, db, fs)).Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Actor: "test"})
	requireFault(t, err, fault.Invalid, "transaction_control")
}

// A script is cut where psql cuts it.
func TestSplit(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string][]string{
		"":                                 nil,
		"select 1":                         {"1 select 1"},
		"select 1; -- x\n\n select 2 ;\n ": {"1 select 1;", "3  -- x\n\n select 2 ;", "blank \n "},
		";;":                               {"blank ;", "blank ;"},
		"select ';', \";\", $$;$$, $x$;$$;$x$, E'\\';', $1;select 2":                                                          {"1 select ';', \";\", $$;$$, $x$;$$;$x$, E'\\';', $1;", "1 select 2"},
		"/* ; /* ; */ ; */ select 1;\n-- ;\nselect 2":                                                                         {"1 /* ; /* ; */ ; */ select 1;", "3 \n-- ;\nselect 2"},
		"create rule r as on insert to a do (insert into b values (1); insert into c values (1));\nselect 1":                  {"1 create rule r as on insert to a do (insert into b values (1); insert into c values (1));", "2 \nselect 1"},
		"create function f() returns int language sql begin atomic select 1; select case when true then 2 end; end; select 3": {"1 create function f() returns int language sql begin atomic select 1; select case when true then 2 end; end;", "1  select 3"},
		"create or replace procedure p() begin atomic insert into a values (1);\nend;\nselect 1":                              {"1 create or replace procedure p() begin atomic insert into a values (1);\nend;", "3 \nselect 1"},
		"create function f() returns int as 'select 1;' language sql; select 2":                                               {"1 create function f() returns int as 'select 1;' language sql;", "1  select 2"},
	} {
		texts, lines, blank, open := migrate.Split(sql)
		require.Zero(t, open)
		var got []string
		for i, text := range texts {
			if blank[i] {
				got = append(got, "blank "+text)
			} else {
				got = append(got, fmt.Sprintf("%d %s", lines[i], text))
			}
		}
		require.Equalf(t, want, got, "%q", sql)
		require.Equal(t, sql, strings.Join(texts, ""))
	}
}

// Statements for a transaction lose concurrently and nothing else; vacuum and reindex concurrently leave only their
// lines.
func TestPlain(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]string{
		"create unique index /* x */ concurrently if not exists i on a (b);\nselect 'create index concurrently'": "create unique index /* x */  if not exists i on a (b);\nselect 'create index concurrently'",
		"drop index\nconcurrently if exists i;\nselect 1":                                                        "drop index\n if exists i;\nselect 1",
		"vacuum\n(full) a;\nselect 1":                                                                            "\n\nselect 1",
		"reindex (verbose, concurrently) table a; select 1;":                                                     " select 1;",
		"reindex index i": "reindex index i",
		"alter table p detach partition q concurrently;":      "alter table p detach partition q ;",
		"alter table p detach partition q;":                   "alter table p detach partition q;",
		"alter table a rename column b to concurrently":       "alter table a rename column b to concurrently",
		"create index i on a (concurrently)":                  "create index i on a (concurrently)",
		"alter table a add column b int;":                     "alter table a add column b int;",
		"create table concurrently (id int); cluster a using": "create table concurrently (id int);",
	} {
		require.Equalf(t, want, migrate.Plain(sql), "%q", sql)
	}
}

// FuzzSplit: the pieces are the text, none but the last is without its semicolon, and no piece hides transaction
// control that the whole shows.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{
		"select 1; select 2", "create function f() begin atomic select 1; end; commit", "$a$;$b$;$a$;", "/* /* ; */", "E'\\';';", "create rule r do (a; b);",
		"$1;$x", "\"\"\";\";", "-- ;\n;", "create or replace procedure p() begin atomic case end; end; begin",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		texts, lines, _, open := migrate.Split(sql)
		if got := strings.Join(texts, ""); got != sql {
			t.Fatalf("split and joined it is another text: %q", got)
		}
		for i, text := range texts {
			if i < len(texts)-1 && !strings.HasSuffix(text, ";") {
				t.Fatalf("a statement ends without a semicolon: %q", text)
			}
			if most := strings.Count(sql, "\n") + 1; lines[i] < 1 || lines[i] > most {
				t.Fatalf("line %d of %d", lines[i], most)
			}
			if open == 0 { // cut again it is one statement
				if again, _, _, _ := migrate.Split(text); len(again) != 1 {
					t.Fatalf("a statement is several: %q", again)
				}
			}
			_ = migrate.Plain(text)
		}
		if open > strings.Count(sql, "\n")+1 {
			t.Fatalf("the quote in line %d", open)
		}
		_ = migrate.ControlIn(sql)
	})
}

// FuzzLoad: whatever a file holds, it is read or refused.
func FuzzLoad(f *testing.F) {
	for _, s := range []string{
		"-- oneo: no-transaction\ncreate index concurrently i on a (b); vacuum a", "-- oneo: batch 5\nupdate a set b = 1 where id = $1",
		"-- +goose Up\nselect 1;\n-- +goose Down\nselect 2;", "-- oneo: no-transaction\nalter table a detach partition b concurrently",
		"-- oneo: no-transaction\nreindex (concurrently) table a", "-- oneo: no-transaction\ndrop index concurrently \"a\"\"b\"",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		for _, name := range []string{"0001_a.up.sql", "0001_a.data.sql", "0001_a.sql"} {
			got, err := migrate.Load(files(name, sql), ".")
			if err != nil && !fault.Is(err, fault.Invalid) {
				t.Fatalf("%s: %v", name, err)
			}
			if err == nil && len(got) != 1 {
				t.Fatalf("%s: %d steps", name, len(got))
			}
		}
	})
}
