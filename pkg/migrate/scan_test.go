package migrate_test

import (
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
