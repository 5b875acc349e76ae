package lint_test

import (
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/schemas"
)

// before is what the tenants have already when a case is read.
const before = `create table users (
    id uuid primary key, email varchar(100) not null, name text, amount numeric(10,2), at timestamp(3), n integer, code char(3), tags text[],
    state text constraint state_set check (state is not null)
);
create table orders (id bigint primary key, user_id uuid, total integer);
alter table orders add constraint total_set check (total is not null) not valid;
create index orders_user on orders (user_id);
create unique index concurrently users_email on users (email);
create unique index concurrently users_n on users (n);
create function stamp() returns text language sql as 'select clock_timestamp()::text';
create function zero() returns integer language sql immutable as 'select 0';
create view people as select id, name from users;
`

type lintCase struct {
	sql string
	// want are "rule:line", in order; missing-down is left out.
	want []string
	kind lint.Kind
	// breaking, and so on, as the file would say.
	breaking bool
	shared   bool
}

func found(rules ...string) []string { return rules }

// cases by rule: what must be found, and what must not be.
var cases = map[string][]lintCase{
	"syntax": {
		{sql: "select 1;\nselct 2;\nselect 3", want: found("syntax:2")},
		{sql: "-- 'ä'\nselect 'äöü', 1 +;\ncreate schema x", want: found("syntax:2", "schema:3")},
		{sql: "select 'open", want: found("syntax:1")},
		{sql: "create function f() returns int language sql as $$\nselect 1;\nselct\n$$", want: found("syntax:3")},
		{sql: "select 1\x00;", want: found("syntax:1")},
		{sql: "select '\xff';", want: found("syntax:1")},
		{sql: "select 1;;\n;"},
		{sql: "-- oneo: allow syntax a newer PostgreSQL reads it\nalter table users add column x int generated always as (n) virtual;\nselect 1"},
	},
	"empty": {
		{sql: "-- nothing yet\n", want: found("empty:1")},
		{sql: "-- nothing yet\n", kind: lint.Down, want: found("empty:1")},
		{sql: "/* one */ select 1"},
	},
	"bad-allow": {
		{sql: "-- oneo: allow create-indx it is small\ncreate index on orders (total);", want: found("bad-allow:1", "create-index:2")},
		{sql: "-- oneo: allow create-index\ncreate index on orders (total);", want: found("bad-allow:1", "create-index:2")},
		{sql: "-- oneo: allow\ncreate index on orders (total);", want: found("bad-allow:1", "create-index:2")},
		{sql: "-- oneo: allow create-index it has ten rows\ncreate index on orders (total);"},
		{sql: "--oneo:allow create-index it has ten rows\n-- a comment\n\ncreate index on orders (total);"},
		{sql: "-- oneo: allow create-index ten rows\n-- oneo: allow add-unique ten rows\ncreate index on orders (total);", want: found("unused-allow:2")},
	},
	"unused-allow": {
		{sql: "-- oneo: allow create-index it has ten rows\nselect 1;\ncreate index on orders (total);", want: found("create-index:3", "unused-allow:1")},
		{sql: "-- oneo: allow select-star not a tenant's\nselect 1", shared: true},
		{sql: "alter table users\n    -- oneo: allow column-rewrite ten rows\n    add column u uuid default gen_random_uuid();"},
		{sql: "-- oneo: allow column-rewrite ten rows\nalter table users\n    add column u uuid default gen_random_uuid();"},
		{sql: "-- oneo: allow unseen-sql it grants nothing\ndo $$\nbegin\n    execute 'select 1';\nend $$"},
		{sql: "do $$\nbegin\n    -- oneo: allow unseen-sql it grants nothing\n    execute 'select 1';\nend $$"},
	},
	"unseen-sql": {
		{sql: "do $$\nbegin\n  execute format('drop table %I', 'x');\nend $$", want: found("unseen-sql:3")},
		{sql: "create function f() returns void language plperl as 'x'", want: found("unseen-sql:1")},
		{sql: "create function f() returns setof int language plpgsql as $$\nbegin\n  return query execute 'select 1';\nend $$", want: found("unseen-sql:3")},
		{sql: "create function f() returns int language plpgsql as $$ begin x y z; end $$", want: found("unseen-sql:1")},
		{sql: "do $$ begin execute 'x'; end $$", shared: true},
		{sql: "do $$\nbegin\n  perform 1;\nend $$"},
	},
	"long-name": {
		{sql: "select 1;\ncreate table " + strings.Repeat("a", 64) + " (id int)", want: found("long-name:2")},
		{sql: "create table \"" + strings.Repeat("ä", 32) + "\" (id int)", want: found("long-name:1")},
		{sql: "create function f() returns int language sql as $$\nselect 1 as " + strings.Repeat("a", 64) + " $$", want: found("long-name:2")},
		{sql: "create table " + strings.Repeat("a", 63) + " (id int)"},
		{sql: "create table \"" + strings.Repeat("a", 62) + "\"\"\" (id int)"},
		{sql: "select '" + strings.Repeat("a", 64) + "'"},
	},
	"foreign-schema": {
		{sql: "select id\nfrom public.tenants", want: found("foreign-schema:2")},
		{sql: "create table acme.x (id int)", want: found("foreign-schema:1")},
		{sql: "create table x (id int, t public.mood)", want: found("foreign-schema:1")},
		{sql: "create table x (like public.tenants)", want: found("foreign-schema:1")},
		{sql: "select public.f(1)", want: found("foreign-schema:1")},
		{sql: "call public.f(1)", want: found("foreign-schema:1")},
		{sql: "select information_schema.tables.table_name from users", want: found("foreign-schema:1")},
		{sql: "select public.users.* from users", want: found("foreign-schema:1")},
		{sql: "drop table public.users", breaking: true, want: found("drop-data:1", "foreign-schema:1")},
		{sql: "drop function public.f(int)", breaking: true, want: found("foreign-schema:1")},
		{sql: "drop trigger t on public.users", want: found("foreign-schema:1")},
		{sql: "comment on column public.users.name is 'x'", want: found("foreign-schema:1")},
		{sql: "comment on column users.name is 'x'"},
		{sql: "select nextval('public.seq')", want: found("foreign-schema:1")},
		{sql: "select 'public.users'::regclass", want: found("foreign-schema:1")},
		{sql: "create table x (id int default nextval('\"Acme\".seq'::regclass))", want: found("foreign-schema:1")},
		{sql: "select 1 operator(public.+) 2", want: found("foreign-schema:1")},
		{sql: "create trigger t before insert on users for each row execute function public.f()", want: found("foreign-schema:1")},
		{sql: "create function f() returns int language sql as $$\nselect 1 from\npublic.users $$", want: found("foreign-schema:3")},
		{sql: "create function f() returns int language sql begin atomic\nselect 1 from public.users; end", want: found("foreign-schema:2")},
		{sql: "create function f() returns int language plpgsql as $$\ndeclare r public.t%rowtype;\nbegin\n  return public.g();\nend $$", want: found("foreign-schema:2", "foreign-schema:4")},
		{sql: "create function f() returns trigger language plpgsql as $$\nbegin\n  if new.n > 1 then\n    insert into other.log (n) values (new.n);\n  end if;\n  return new;\nend $$", want: found("foreign-schema:4")},
		{sql: "do $$\nbegin\n  update public.tenants set name = '' where number = 1;\nend $$", want: found("foreign-schema:3")},
		{sql: "create view v as select exists (select * from public.users)", want: found("foreign-schema:1")},
		{sql: "create function ext.f() returns int language sql as 'select 1'", want: found("foreign-schema:1")},
		{sql: "create type ext.mood as enum ('a')", want: found("foreign-schema:1", "tenant-type:1")},
		{sql: "insert into acme.users (id) values (null)", want: found("foreign-schema:1")},
		{sql: "with t as (select id from acme.users) select id from t", want: found("foreign-schema:1")},
		{sql: "select id, ext.f(1), pg_catalog.now() from users", kind: lint.Transactional},
		{sql: "create table x (id int, t ext.mood, v pg_catalog.int4)"},
		{sql: "select u.id, (u.r).x from users u"},
		{sql: "select 'public.users', 'public.users'::text"},
		{sql: "create trigger t before insert on users for each row execute function ext.f()"},
		{sql: "create function f() returns trigger language plpgsql as $$\ndeclare i users.id%type; r users%rowtype;\nbegin\n  new.name := new.data.x;\n  return new;\nend $$"},
		{sql: "create table public.tenants2 (id int)", shared: true},
		{sql: "create index on orders using gin (user_id ext.ops)", want: found("create-index:1")},
	},
	"cross-schema-foreign-key": {
		{sql: "create table x (id int,\n  tenant int references public.tenants (number))", want: found("cross-schema-foreign-key:2")},
		{sql: "alter table orders add foreign key (user_id) references ext.users (id) not valid", want: found("cross-schema-foreign-key:1")},
		{sql: "create table x (id int, u uuid references users (id))"},
		{sql: "create table public.x (id int, t int references public.tenants (number))", shared: true},
	},
	"search-path": {
		{sql: "set search_path to public", want: found("search-path:1")},
		{sql: "set local search_path = ext", want: found("search-path:1")},
		{sql: "set schema 'public'", want: found("search-path:1")},
		{sql: "reset all", want: found("search-path:1")},
		{sql: "reset search_path", want: found("search-path:1")},
		{sql: "set search_path to ext", kind: lint.NoTransaction, want: found("search-path:1")},
		{sql: "select pg_catalog.set_config('Search_Path', 'public', true)", want: found("search-path:1")},
		{sql: "create function f() returns int language sql set search_path to public, pg_temp as 'select 1'", want: found("search-path:1")},
		{sql: "alter function zero() set search_path to acme", want: found("search-path:1")},
		{sql: "create function f() returns void language plpgsql as $$\nbegin\n perform set_config('search_path', 'x', true);\nend $$", want: found("search-path:3")},
		{sql: "create function f() returns int language sql set search_path from current as 'select 1'"},
		{sql: "create function f() returns int language sql set search_path to pg_catalog, ext, pg_temp as 'select 1'"},
		{sql: "set local lock_timeout = '1s'"},
	},
	"schema": {
		{sql: "create schema other", want: found("schema:1")},
		{sql: "drop schema other", want: found("schema:1")},
		{sql: "alter schema a rename to b", want: found("schema:1")},
		{sql: "alter table users set schema other", want: found("schema:1")},
		{sql: "create table schema_changes (id int)"},
	},
	"outside-tenant": {
		{sql: "create publication p for table users", want: found("outside-tenant:1")},
		{sql: "alter system set work_mem = '1GB'", want: found("not-in-transaction:1", "outside-tenant:1")},
		{sql: "create database x", kind: lint.NoTransaction, want: found("outside-tenant:1")},
		{sql: "create event trigger e on ddl_command_end execute function f()", want: found("outside-tenant:1")},
		{sql: "drop foreign data wrapper w", want: found("outside-tenant:1")},
		{sql: "alter publication p rename to q", want: found("outside-tenant:1")},
		{sql: "create statistics s on id, name from users"},
	},
	"tenant-type": {
		{sql: "create type mood as enum ('a', 'b')", want: found("tenant-type:1")},
		{sql: "create type pair as (a int, b int)", want: found("tenant-type:1")},
		{sql: "create type span as range (subtype = int4)", want: found("tenant-type:1")},
		{sql: "create type shell", want: found("tenant-type:1")},
		{sql: "create domain positive as int check (value > 0)", want: found("tenant-type:1")},
		{sql: "alter type mood add value 'c'", want: found("tenant-type:1")},
		{sql: "alter type pair add attribute c int", want: found("tenant-type:1")},
		{sql: "drop type mood", want: found("tenant-type:1")},
		{sql: "create aggregate total (int) (sfunc = int4pl, stype = int)"},
		{sql: "create table mood (value text check (value in ('a', 'b')))"},
	},
	"extension": {
		{sql: "create extension if not exists citext", want: found("extension:1")},
		{sql: "drop extension citext", want: found("extension:1")},
		{sql: "alter extension citext update", want: found("extension:1")},
		{sql: "create table x (a citext)"},
	},
	"rights": {
		{sql: "grant select on users to reader", want: found("rights:1")},
		{sql: "revoke all on users from public", want: found("rights:1")},
		{sql: "alter table users owner to me", want: found("rights:1")},
		{sql: "alter function zero() owner to me", want: found("rights:1")},
		{sql: "create role r", want: found("rights:1")},
		{sql: "set local role other", want: found("rights:1")},
		{sql: "alter default privileges grant select on tables to x", want: found("rights:1")},
		{sql: "grant select on public.users to x", shared: true},
		{sql: "create policy own on users using (name = current_user)"},
	},
	"security-definer": {
		{sql: "create function f() returns int language sql security definer as 'select 1'", want: found("security-definer:1")},
		{sql: "alter function zero() security definer", want: found("security-definer:1")},
		{sql: "create function f() returns int language sql security definer set search_path to default as 'select 1'", want: found("security-definer:1")},
		{sql: "create function f() returns int language sql security definer set search_path from current as 'select 1'"},
		{sql: "create function f() returns int language sql security invoker as 'select 1'"},
	},
	"select-star": {
		{sql: "create view v as\nselect * from users", want: found("select-star:2")},
		{sql: "create view v as select id from (select u.* from users u) x", want: found("select-star:1")},
		{sql: "create function f() returns setof users language sql as $$\nselect * from users $$", want: found("select-star:2")},
		{sql: "create function f() returns int language plpgsql as $$\ndeclare r record;\nbegin\n  select * into r from users;\n  return 1;\nend $$", want: found("select-star:4")},
		{sql: "create function f() returns setof users language sql begin atomic select * from users; end", want: found("select-star:1")},
		{sql: "create table copy_of_users as select * from users", want: found("select-star:1")},
		{sql: "create table x (id uuid);\ninsert into x select * from users where id = null", want: found("select-star:2")},
		{sql: "insert into orders (id) values (1) returning *", want: found("select-star:1")},
		{sql: "create view v as select count(*) from users where exists (select * from orders)"},
		{sql: "select * from users"},
	},
	"transaction-control": {
		{sql: "begin;\nselect 1;\ncommit", want: found("transaction-control:1", "transaction-control:3")},
		{sql: "savepoint a", want: found("transaction-control:1")},
		{sql: "do $$\nbegin\n  commit;\nend $$", want: found("transaction-control:3")},
		{sql: "do $$\nbegin\n  commit;\nend $$", kind: lint.NoTransaction},
		{sql: "create procedure p() language plpgsql as $$ begin commit; end $$"},
		{sql: "do $$ begin null; exception when others then null; end $$"},
	},
	"session-state": {
		{sql: "set lock_timeout = '1h'", want: found("session-state:1")},
		{sql: "reset lock_timeout", want: found("session-state:1")},
		{sql: "select set_config('lock_timeout', '1h', false)", want: found("session-state:1")},
		{sql: "create temp table x (id int)", want: found("session-state:1")},
		{sql: "create temp table x as select 1 as id", want: found("session-state:1")},
		{sql: "prepare p as select 1", want: found("session-state:1")},
		{sql: "listen l", want: found("session-state:1")},
		{sql: "declare c cursor with hold for select 1", want: found("session-state:1")},
		{sql: "select pg_advisory_lock(1)", want: found("session-state:1")},
		{sql: "discard temp", want: found("session-state:1")},
		{sql: "set lock_timeout = '1h'", kind: lint.NoTransaction},
		{sql: "set local lock_timeout = '1h'; select set_config('lock_timeout', '1h', true), pg_advisory_xact_lock(1)"},
		{sql: "create temp table x (id int) on commit drop; create temp table y on commit drop as select 1 as id"},
		{sql: "declare c cursor for select 1; set transaction isolation level serializable; set constraints all deferred"},
	},
	"not-in-transaction": {
		{sql: "create index concurrently on orders (total)", want: found("not-in-transaction:1")},
		{sql: "drop index concurrently orders_user", want: found("not-in-transaction:1")},
		{sql: "drop index concurrently orders_user", kind: lint.Down, want: found("not-in-transaction:1")},
		{sql: "reindex (concurrently) table orders", want: found("not-in-transaction:1")},
		{sql: "vacuum orders", want: found("not-in-transaction:1")},
		{sql: "alter table orders detach partition p concurrently", want: found("not-in-transaction:1")},
		{sql: "create index concurrently on orders (total); drop index concurrently orders_user; reindex table concurrently orders; vacuum orders", kind: lint.NoTransaction},
		{sql: "analyze orders; refresh materialized view concurrently m"},
	},
	"type-rewrite": {
		{sql: "alter table users\n  alter column n type bigint", want: found("type-rewrite:2")},
		{sql: "alter table users alter column email type varchar(50)", want: found("type-rewrite:1")},
		{sql: "alter table users alter column name type varchar(50)", want: found("type-rewrite:1")},
		{sql: "alter table users alter column amount type numeric(12,3)", want: found("type-rewrite:1")},
		{sql: "alter table users alter column code type char(5)", want: found("type-rewrite:1")},
		{sql: "alter table users alter column at type timestamptz", want: found("type-rewrite:1")},
		{sql: "alter table users alter column email type text using lower(email)", want: found("type-rewrite:1")},
		{sql: "alter table users alter column email type text collate \"C\"", want: found("type-rewrite:1")},
		{sql: "alter table users alter column tags type text", want: found("type-rewrite:1")},
		{sql: "alter table elsewhere alter column x type text", want: found("type-rewrite:1")},
		{sql: "alter table users alter column email type varchar(200)"},
		{sql: "alter table users alter column email type varchar"},
		{sql: "alter table users alter column email type text using email::text, alter column name type varchar"},
		{sql: "alter table users alter column amount type numeric(14,2)"},
		{sql: "alter table users alter column amount type numeric"},
		{sql: "alter table users alter column at type timestamp"},
		{sql: "create table x (n int);\nalter table x alter column n type bigint"},
		{sql: "create table x (n int);\nalter table x rename to y;\nalter table y alter column n type bigint"},
	},
	"column-rewrite": {
		{sql: "alter table users add column u uuid not null default gen_random_uuid()", want: found("column-rewrite:1")},
		{sql: "alter table users add column u text default 'a' || clock_timestamp()", want: found("column-rewrite:1")},
		{sql: "alter table users add column u text default stamp()", want: found("column-rewrite:1")},
		{sql: "alter table users add column u uuid default ext.something()", want: found("column-rewrite:1")},
		{sql: "alter table users add column u bigserial", want: found("column-rewrite:1")},
		{sql: "alter table users add column u bigint generated always as identity", want: found("column-rewrite:1")},
		{sql: "alter table users add column u int generated always as (n * 2) stored", want: found("column-rewrite:1")},
		{sql: "alter table users add column u timestamptz not null default now()"},
		{sql: "alter table users add column u int not null default zero(), add column v jsonb default '{}'"},
		{sql: "alter table users alter column n set default random()"},
		{sql: "create table x (id bigserial, u uuid default gen_random_uuid());\nalter table x add column v uuid default gen_random_uuid()"},
	},
	"table-rewrite": {
		{sql: "alter table users set unlogged", want: found("table-rewrite:1")},
		{sql: "alter table users set logged", want: found("table-rewrite:1")},
		{sql: "alter table users set tablespace fast", want: found("table-rewrite:1")},
		{sql: "cluster users using users_pkey", want: found("table-rewrite:1")},
		{sql: "vacuum full users", kind: lint.NoTransaction, want: found("table-rewrite:1")},
		{sql: "alter table users set (fillfactor = 70)"},
		{sql: "vacuum users", kind: lint.NoTransaction},
	},
	"required-column": {
		{sql: "alter table users add column x int not null", want: found("required-column:1")},
		{sql: "alter table users add column x int default null not null", want: found("required-column:1")},
		{sql: "alter table users add column x int not null default 0"},
		{sql: "create table x (a int); alter table x add column b int not null"},
	},
	"set-not-null": {
		{sql: "alter table users alter column name set not null", want: found("set-not-null:1")},
		{sql: "alter table orders alter column total set not null", want: found("set-not-null:1")},
		{sql: "alter table users add constraint k primary key using index users_n", want: found("set-not-null:1")},
		{sql: "alter table users alter column state set not null"},
		{sql: "alter table users alter column email set not null"},
		{sql: "alter table users add constraint k primary key using index users_email"},
		{sql: "alter table orders validate constraint total_set;\nalter table orders alter column total set not null", kind: lint.NoTransaction},
		{sql: "create table x (a int); alter table x alter column a set not null"},
	},
	"add-check": {
		{sql: "alter table users\n  add constraint c check (n > 0)", want: found("add-check:2")},
		{sql: "alter table users add column x int check (x > 0)", want: found("add-check:1")},
		{sql: "alter table users add constraint c check (n > 0) not valid"},
		{sql: "create table x (a int check (a > 0)); alter table x add check (a < 9)"},
	},
	"add-foreign-key": {
		{sql: "alter table orders add foreign key (user_id) references users (id)", want: found("add-foreign-key:1")},
		{sql: "alter table orders add column u uuid default '00000000-0000-0000-0000-000000000000' references users (id)", want: found("add-foreign-key:1")},
		{sql: "alter table orders add constraint f foreign key (user_id) references users (id) not valid"},
		{sql: "alter table orders add column u uuid references users (id)"},
		{sql: "create table x (u uuid); alter table x add foreign key (u) references users (id)"},
	},
	"add-unique": {
		{sql: "alter table orders add constraint u unique (user_id)", want: found("add-unique:1")},
		{sql: "alter table orders add primary key (id)", want: found("add-unique:1")},
		{sql: "alter table orders add column x int unique", want: found("add-unique:1")},
		{sql: "alter table users add constraint u unique using index users_email"},
		{sql: "create table x (a int unique); alter table x add unique (a)"},
	},
	"add-exclusion": {
		{sql: "alter table orders add exclude using gist (total with =)", want: found("add-exclusion:1")},
		{sql: "create table x (a int, exclude using gist (a with =))"},
	},
	"validate-same-file": {
		{sql: "alter table orders add constraint c check (total > 0) not valid;\nalter table orders validate constraint c", want: found("validate-same-file:2")},
		{sql: "alter table orders add constraint c check (total > 0) not valid, validate constraint c", want: found("validate-same-file:1")},
		{sql: "alter table orders add constraint c check (total > 0) not valid;\nalter table orders validate constraint c", kind: lint.NoTransaction},
	},
	"validate-in-transaction": {
		{sql: "alter table orders validate constraint total_set", want: found("validate-in-transaction:1")},
		{sql: "alter table orders validate constraint total_set", kind: lint.NoTransaction},
	},
	"create-index": {
		{sql: "select 1;\n\n-- for the list\ncreate index on orders (total)", want: found("create-index:4")},
		{sql: "create unique index u on elsewhere (x)", want: found("create-index:1")},
		{sql: "create index on orders (total)", kind: lint.NoTransaction, want: found("create-index:1")},
		{sql: "do $$\nbegin\n  create index on orders (total);\nend $$", want: found("create-index:3")},
		{sql: "create table if not exists orders (id int);\ncreate index on orders (id)", want: found("create-index:2")},
		{sql: "create index on public.audit (id)", shared: true, want: found("create-index:1")},
		{sql: "create table x (id int);\ncreate index on x (id)"},
		{sql: "create function f() returns void language plpgsql as $$ begin create index on orders (total); end $$"},
	},
	"reindex": {
		{sql: "reindex table orders", want: found("reindex:1")},
		{sql: "reindex index concurrently orders_user", kind: lint.NoTransaction},
	},
	"drop-index": {
		{sql: "drop index orders_user", want: found("drop-index:1")},
		{sql: "create table x (id int); create index x_id on x (id); drop index x_id"},
	},
	"refresh-view": {
		{sql: "refresh materialized view m", want: found("refresh-view:1")},
		{sql: "refresh materialized view m with no data; refresh materialized view concurrently m"},
	},
	"lock-table": {
		{sql: "lock table users in share mode", want: found("lock-table:1")},
		{sql: "select id from users for update"},
	},
	"breaking-apart": {
		{sql: "create index concurrently i on users (n)", kind: lint.NoTransaction, breaking: true, want: found("breaking-apart:1")},
		{sql: "update users set n = 0 where id in (select id from users where n is null limit $1)", kind: lint.Data, breaking: true, want: found("breaking-apart:1")},
		{sql: "create index concurrently i on users (n)", kind: lint.NoTransaction},
		{sql: "select 1", breaking: true},
	},
	"breaking-change": {
		{sql: "alter table users drop column name", want: found("breaking-change:1", "drop-data:1")},
		{sql: "alter table users rename column name to title", want: found("breaking-change:1")},
		{sql: "alter table users rename to people", want: found("breaking-change:1")},
		{sql: "drop table orders", want: found("breaking-change:1", "drop-data:1")},
		{sql: "drop view people", want: found("breaking-change:1")},
		{sql: "drop function zero()", want: found("breaking-change:1")},
		{sql: "alter table users rename column name to title", breaking: true},
		{sql: "alter table users drop column name; drop table orders", kind: lint.Down},
		{sql: "drop view people; create view people as select id, name, n from users"},
		{sql: "drop function zero(); create function zero() returns bigint language sql immutable as 'select 0::bigint'"},
		{sql: "create table x (a int); alter table x rename column a to b; drop table x"},
		{sql: "alter index orders_user rename to orders_by_user; alter table orders rename constraint total_set to t"},
	},
	"drop-data": {
		{sql: "drop table orders", breaking: true, want: found("drop-data:1")},
		{sql: "alter table users drop column name", breaking: true, want: found("drop-data:1")},
		{sql: "alter table users alter column name drop default; alter table orders drop constraint total_set"},
	},
	"cascade": {
		{sql: "drop view people cascade", breaking: true, want: found("cascade:1")},
		{sql: "alter table users drop column name cascade", breaking: true, want: found("cascade:1", "drop-data:1")},
		{sql: "create table x (u uuid references users (id) on delete cascade)"},
	},
	"truncate": {
		{sql: "truncate users, orders", want: found("truncate:1", "truncate:1")},
		{sql: "create table x (a int); truncate x"},
	},
	"dml-without-where": {
		{sql: "update users set n = 0", want: found("dml-without-where:1")},
		{sql: "delete from users where true", want: found("dml-without-where:1")},
		{sql: "with gone as (\n  delete from orders returning id) select id from gone", want: found("dml-without-where:2")},
		{sql: "do $$\nbegin\n  delete from users;\nend $$", want: found("dml-without-where:3")},
		{sql: "create table x (a int); update x set a = 1"},
		{sql: "create function f() returns void language sql as 'delete from users'"},
	},
	"dml-unbounded": {
		{sql: "update users set n = 0 where n is null", want: found("dml-unbounded:1")},
		{sql: "delete from orders using users where orders.user_id = users.id", want: found("dml-unbounded:1")},
		{sql: "create table x (a int);\ninsert into x (a) select n from users", want: found("dml-unbounded:2")},
		{sql: "merge into users using orders on user_id = users.id when matched then delete", want: found("dml-unbounded:1")},
		{sql: "update users set n = 0 where id = '00000000-0000-0000-0000-000000000000'"},
		{sql: "delete from users where email in ('a', 'b') and n > 1"},
		{sql: "update users set n = 0 where id in (select id from users where n is null limit 10)"},
		{sql: "insert into users (n) values (1), (2)"},
		{sql: "insert into users (n) select 1"},
	},
	"data-statement": {
		{sql: "update users set n = 0 where id in (select id from users where n is null limit $1);\nselect 1", kind: lint.Data, want: found("data-statement:2")},
		{sql: "select 1 limit 1", kind: lint.Data, want: found("data-statement:1")},
		{sql: "alter table users add column x int", kind: lint.Data, want: found("data-statement:1")},
		{sql: "update users set n = 0 where id in (select id from users where n is null limit $1)", kind: lint.Data},
	},
	"data-no-limit": {
		{sql: "update users set n = 0 where n is null", kind: lint.Data, want: found("data-no-limit:1")},
		{sql: "-- oneo: batch 100\nwith next as (select id from users where n is null order by id limit $1)\nupdate users u set n = 0 from next where next.id = u.id", kind: lint.Data},
		{sql: "delete from orders where id in (select id from orders where total = 0 limit 5000)", kind: lint.Data},
	},
	"data-endless": {
		{sql: "update users set n = 0 where id in (select id from users where name is null limit $1)", kind: lint.Data, want: found("data-endless:1")},
		{sql: "insert into orders (id) select n from users limit $1", kind: lint.Data, want: found("data-endless:1")},
		{sql: "insert into orders (id) select n from users limit $1 on conflict (id) do update set total = 1", kind: lint.Data, want: found("data-endless:1")},
		{sql: "insert into orders (id) select n from users limit $1 on conflict do nothing", kind: lint.Data},
		{sql: "insert into orders (id) select n from users u where not exists (select from orders o where o.id = u.n) limit $1", kind: lint.Data},
		{sql: "insert into orders (id) select n from users u left join orders o on o.id = u.n where o.id is null limit $1", kind: lint.Data},
	},
}

func TestEachRuleFindsWhatItShouldAndNothingElse(t *testing.T) {
	t.Parallel()
	earlier := []lint.File{{Name: "0001_before.up.sql", Kind: lint.Transactional, SQL: before}}
	for rule, all := range cases {
		t.Run(rule, func(t *testing.T) {
			t.Parallel()
			hits, misses := 0, 0
			for _, c := range all {
				scope, kind := lint.Tenant, c.kind
				if c.shared {
					scope = lint.Shared
				}
				if kind == "" {
					kind = lint.Transactional
				}
				file := lint.File{Name: "0002_case.up.sql", Kind: kind, SQL: c.sql, Breaking: c.breaking, HasDown: true}
				var got []string
				hit := false
				for _, f := range lint.Check(scope, earlier, []lint.File{file}) {
					got = append(got, fmt.Sprintf("%s:%d", f.Rule, f.Line))
					hit = hit || f.Rule == rule
					require.NotEmpty(t, f.Message)
					require.NotEmpty(t, f.Instead)
					require.Equal(t, "0002_case.up.sql", f.File)
				}
				require.ElementsMatch(t, c.want, got, "%s\n%v", c.sql, lint.Check(scope, earlier, []lint.File{file}))
				if hit {
					hits++
				} else {
					misses++
				}
			}
			require.Positive(t, hits, "no case in which the rule finds something")
			require.Positive(t, misses, "no near miss")
		})
	}
}

func TestEveryRuleHasCases(t *testing.T) {
	t.Parallel()
	for _, r := range lint.Rules() {
		if r.Name != "missing-down" {
			require.Contains(t, cases, r.Name)
		}
		require.Contains(t, []lint.Severity{lint.Error, lint.Warning}, r.Severity)
		require.NotEmpty(t, r.Finds, r.Name)
		require.NotEmpty(t, r.Instead, r.Name)
	}
	for name := range cases {
		require.True(t, isRule(name), name)
	}
}

func isRule(name string) bool {
	for _, r := range lint.Rules() {
		if r.Name == name {
			return true
		}
	}
	return false
}

func rulesOf(fs []lint.Finding) []string {
	var all []string
	for _, f := range fs {
		all = append(all, f.Rule)
	}
	return all
}

func TestAStepUpWithoutAStepDown(t *testing.T) {
	t.Parallel()
	f := lint.File{Name: "x", Kind: lint.Transactional, SQL: "select 1"}
	require.Equal(t, []string{"missing-down"}, rulesOf(lint.Check(lint.Tenant, nil, []lint.File{f})))
	require.Empty(t, lint.Check(lint.Shared, nil, []lint.File{f}))
	f.HasDown = true
	require.Empty(t, lint.Check(lint.Tenant, nil, []lint.File{f}))
	f.HasDown, f.SQL = false, "select 1;\n-- oneo: allow missing-down nothing is to be taken back\nselect 2"
	require.Empty(t, lint.Check(lint.Tenant, nil, []lint.File{f}))
	f = lint.File{Name: "x", Kind: lint.Data, SQL: "delete from t where id in (select id from t limit 1)"}
	require.Empty(t, lint.Check(lint.Tenant, nil, []lint.File{f}))
}

// What a file makes is new for that file only: another file may be applied on another day.
func TestFilesAreReadInOrder(t *testing.T) {
	t.Parallel()
	file := func(kind lint.Kind, sql string) lint.File {
		return lint.File{Name: sql, Kind: kind, SQL: sql, HasDown: true}
	}
	got := lint.Check(lint.Tenant, nil, []lint.File{
		file(lint.Transactional, "create table a (id int, b varchar(10)); create index on a (id)"),
		file(lint.Down, "alter table a alter column b type text; drop table a"),
		file(lint.Transactional, "create index on a (b)"),
		file(lint.Transactional, "alter table a alter column b type varchar(20)"),
		file(lint.Transactional, "alter table a add constraint set_b check (b is not null) not valid"),
		file(lint.NoTransaction, "alter table a validate constraint set_b"),
		file(lint.Transactional, "alter table a alter column b set not null"),
	})
	require.Equal(t, []string{"create-index"}, rulesOf(got))
	require.Equal(t, "create index on a (b)", got[0].File)
}

// The second file is read although nothing can be made of the one before it.
func TestWhatCannotBeReadStopsNothing(t *testing.T) {
	t.Parallel()
	earlier := []lint.File{{Name: "a", Kind: lint.Transactional, SQL: "create tble x (id int); create table y (id int primary key)"}}
	got := lint.Check(lint.Tenant, earlier, []lint.File{{Name: "b", Kind: lint.Transactional, HasDown: true, SQL: "alter table y alter column id set not null"}})
	require.Empty(t, got)
}

func TestAFindingSaysWhatItCosts(t *testing.T) {
	t.Parallel()
	f := lint.File{Name: "b", Kind: lint.Transactional, HasDown: true, Line: 11, SQL: "-- wider\nalter table orders alter column total type bigint"}
	got := lint.Check(lint.Tenant, []lint.File{{SQL: before, Kind: lint.Transactional}}, []lint.File{f})
	require.Len(t, got, 1)
	require.Equal(t, 12, got[0].Line)
	require.Equal(t, "orders", got[0].Table)
	require.Equal(t, lint.Rewrites, got[0].Work)
	require.Contains(t, got[0].Locks, "ACCESS EXCLUSIVE")
	require.Contains(t, got[0].Message, "orders.total changes from integer to bigint")
}

// oneo's own migrations pass, or say why not.
func TestTheDeliveredMigrationsAreClean(t *testing.T) {
	t.Parallel()
	for dir, scope := range map[string]lint.Scope{"group": lint.Shared, "shared": lint.Shared, "tenant": lint.Tenant} {
		var files []lint.File
		entries, err := fs.ReadDir(schemas.Files, dir)
		require.NoError(t, err)
		require.NotEmpty(t, entries)
		for _, suffix := range []string{".up.sql", ".data.sql"} {
			for _, e := range entries {
				if !strings.HasSuffix(e.Name(), suffix) {
					continue
				}
				sql, err := fs.ReadFile(schemas.Files, dir+"/"+e.Name())
				require.NoError(t, err)
				f := lint.File{Name: e.Name(), Kind: lint.Transactional, SQL: string(sql)}
				if suffix == ".data.sql" {
					f.Kind = lint.Data
				} else if regexp.MustCompile(`(?m)^-- oneo: no-transaction`).Match(sql) {
					f.Kind = lint.NoTransaction
				}
				f.Breaking = regexp.MustCompile(`(?m)^-- oneo: breaking`).Match(sql)
				_, err = fs.Stat(schemas.Files, dir+"/"+strings.TrimSuffix(e.Name(), suffix)+".down.sql")
				f.HasDown = err == nil
				files = append(files, f)
			}
		}
		require.Empty(t, lint.Check(scope, nil, files), dir)
	}
}

// markdown is the documentation of the rules.
func markdown() string {
	var b strings.Builder
	b.WriteString(documentation)
	for _, severity := range []lint.Severity{lint.Error, lint.Warning} {
		fmt.Fprintf(&b, "\n## %ss\n\n| rule | finds | write instead |\n| --- | --- | --- |\n", strings.ToUpper(string(severity)[:1])+string(severity)[1:])
		for _, r := range lint.Rules() {
			if r.Severity == severity {
				only := ""
				if r.TenantOnly {
					only = " ¹"
				}
				fmt.Fprintf(&b, "| `%s`%s | %s | %s |\n", r.Name, only, r.Finds, r.Instead)
			}
		}
	}
	b.WriteString("\n¹ of tenant migrations only; the shared schema's are free to do it.\n")
	return b.String()
}

const documentation = `# What ` + "`oneo migrate lint`" + ` looks for

It reads migrations with PostgreSQL's own parser (of version 17) and runs nothing. Errors stop ` + "`oneo migrate`" + ` unless
it is given ` + "`--force`" + `, and make ` + "`oneo migrate lint`" + ` end with exit code 14; warnings stop nothing.

What is found depends on the files alone. A table is new for the file that makes it, and exists for every later file,
also when both are applied in one run: a file that passes in CI passes everywhere.

A rule is silenced for a statement, or for one line of it, by a comment on a line of its own above it, with a reason:

    -- oneo: allow create-index the table has one row for each pipeline
    create index fields_position on fields (pipeline_id, position);

It is no proof. SQL that is put together as it runs is not seen (` + "`unseen-sql`" + ` says where), nor is what a function does to
tables when it is called; of a column whose type the files do not say, a change of the type is taken for a rewrite; and
a type from ` + "`ext`" + ` that is a domain may rewrite a table when a column of it is added.
`

func TestTheDocumentationIsTheTable(t *testing.T) {
	t.Parallel()
	const golden = "../../docs/lint.md"
	if os.Getenv("ONEO_UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(golden, []byte(markdown()), 0o644))
	}
	got, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, markdown(), string(got), "docs/lint.md differs from the rules; make golden writes it")
}

func FuzzCheck(f *testing.F) {
	for _, all := range cases {
		for _, c := range all {
			f.Add(c.sql, 0)
		}
	}
	f.Add(before, 1)
	f.Add("create function f() returns int language plpgsql as $$ declare r record; begin for r in execute 'x' loop null; end loop; end $$", 2)
	f.Add(strings.Repeat("(", 200)+"select 1", 0)
	kinds := []lint.Kind{lint.Transactional, lint.NoTransaction, lint.Data, lint.Down}
	earlier := []lint.File{{Name: "a", Kind: lint.Transactional, SQL: before}}
	lint.Check(lint.Tenant, nil, earlier) // the first call loads the parser, instrumented longer than fuzzing lets one input take
	f.Fuzz(func(t *testing.T, sql string, n int) {
		file := lint.File{Name: "x.up.sql", Kind: kinds[uint(n)%4], SQL: sql}
		lines := 1 + strings.Count(sql, "\n")
		for _, finding := range lint.Check(lint.Tenant, earlier, []lint.File{file}) {
			if finding.Line < 1 || finding.Line > lines || !isRule(finding.Rule) || finding.Message == "" {
				t.Fatalf("%+v of %q", finding, sql)
			}
		}
		// What is read for what it makes only must not panic either.
		lint.Check(lint.Shared, []lint.File{file}, []lint.File{{Name: "y", Kind: lint.Transactional, SQL: "select 1"}})
	})
}
