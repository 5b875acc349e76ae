package lint_test

import (
	"regexp"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// What PostgreSQL itself says, at debug1, that it does to every row is what the linter finds.
func TestPostgresDoesToRowsWhatTheLinterSays(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	config, err := pgx.ParseConfig(env.AdminURL)
	require.NoError(t, err)
	work := lint.NoWork
	config.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) {
		switch {
		case regexp.MustCompile(`^rewriting table`).MatchString(n.Message):
			work = lint.Rewrites
		case regexp.MustCompile(`^(verifying table|validating foreign key|building index)`).MatchString(n.Message) && work == lint.NoWork:
			work = lint.Reads
		}
	}
	ctx := t.Context()
	conn, err := pgx.ConnectConfig(ctx, config)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close(ctx)) })
	const tables = `create table b (id integer primary key);
create table t (
    i integer, v varchar(10), x text, c char(3), n numeric(10,2), m numeric, ts timestamp(3), tz timestamptz, tm time(3), iv interval(3),
    net cidr, bits varbit(8), vs varchar(10)[], nn integer not null, seen integer constraint seen_set check (seen is not null), f integer
);
alter table t add constraint later check (i is not null) not valid;
create unique index t_i on t (i);
create index on t (v, n, net, ts, bits);
create function slow() returns integer language sql as 'select (random() * 10)::integer';
create function quick() returns integer language sql immutable as 'select 1';
`
	exec := func(sql string) {
		_, err := conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
		require.NoError(t, err, sql)
	}
	exec("create schema lint; set search_path to lint; set client_min_messages to debug1;" + tables)
	for _, part := range []string{
		"alter column v type varchar(20)", "alter column v type varchar(10)", "alter column v type varchar(5)", "alter column v type varchar",
		"alter column v type text", "alter column v type text using v", "alter column v type text using v::text",
		"alter column v type text using upper(v)", "alter column v type char(10)", "alter column v type varchar(20) using v::varchar(20)",
		"alter column v type varchar(20) using v::varchar(5)", "alter column x type varchar", "alter column x type varchar(10)",
		"alter column x type text", "alter column c type char(5)", "alter column c type text", "alter column i type bigint", "alter column i type integer",
		"alter column n type numeric(12,2)", "alter column n type numeric(12,3)", "alter column n type numeric(8,2)",
		"alter column n type numeric", "alter column m type numeric(12,2)", "alter column ts type timestamp(6)", "alter column ts type timestamp(1)",
		"alter column ts type timestamp", "alter column tz type timestamptz(3)", "alter column tm type time(6)", "alter column tm type time(1)",
		"alter column iv type interval", "alter column net type inet", "alter column bits type varbit(16)", "alter column bits type varbit(4)",
		"alter column bits type varbit", "alter column vs type varchar(10)[]", "alter column vs type text using vs[1]",
		"add column y integer", "add column y integer default 0", "add column y integer not null default 0", "add column y timestamptz default now()",
		"add column y timestamptz not null default current_timestamp", "add column y uuid default gen_random_uuid()", "add column y float default random()",
		"add column y integer default slow()", "add column y integer default quick()", "add column y timestamptz default clock_timestamp()",
		"add column y bigserial", "add column y integer generated always as identity", "add column y integer generated always as (i + 1) stored",
		"add column y integer check (y > 0)", "add column y integer default 1 check (y > 0)", "add column y integer unique",
		"add column y integer references b (id)", "add column y integer default null references b (id)",
		"add constraint k check (i > 0)", "add constraint k check (i > 0) not valid", "add constraint k foreign key (f) references b (id)",
		"add constraint k foreign key (f) references b (id) not valid", "add constraint k unique (f)", "add constraint k unique using index t_i",
		"add constraint k primary key using index t_i", "add constraint k exclude using btree (f with =)", "validate constraint later",
		"alter column i set not null", "alter column seen set not null", "alter column nn set not null", "alter column nn drop not null",
		"set unlogged", "set (fillfactor = 70)", "alter column i set default 7", "drop column x", "alter column i set statistics 10",
		"rename column i to j", "add constraint k check (i > 0) not valid, validate constraint k",
		"drop column seen, add column seen integer, alter column seen set not null",
	} {
		sql := "alter table t " + part
		found := lint.Check(lint.Tenant, []lint.File{{SQL: tables, Kind: lint.Transactional}}, []lint.File{{SQL: sql, Kind: lint.Transactional, HasDown: true}})
		said := lint.NoWork
		for _, f := range found {
			if f.Work == lint.Rewrites || said == lint.NoWork {
				said = f.Work
			}
		}
		work = lint.NoWork
		exec("begin; " + sql)
		got := work
		exec("rollback")
		assert.Equal(t, got, said, "%s: PostgreSQL %q, the linter %q: %v", sql, got, said, found)
	}
}
