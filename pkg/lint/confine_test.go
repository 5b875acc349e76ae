package lint_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/oneo-crm/oneo/pkg/lint"
)

var place = lint.Confinement{Schema: "acme", Roles: []string{"oneo_owner", "oneo_t1"}}

// What makes, changes and drops a schema's own objects is let through.
func TestConfined(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		`create table "notes" ("id" integer generated always as identity (sequence name notes_id_seq start 1) not null, "t" ext.citext collate pg_catalog."C")`,
		`create table p partition of parts for values in ('a') tablespace fast`,
		`create table more (x text) inherits (acme.base)`,
		`create sequence s as bigint start 1`, `alter sequence s owned by acme.notes.id`, `alter sequence "h" rename to w`,
		`CREATE UNIQUE INDEX i ON acme.notes USING btree (lower(t) text_pattern_ops) WHERE (id > 0)`,
		`create view v as select a.id, pg_catalog.lower(b.t) from notes a join acme.more b on a.id OPERATOR(pg_catalog.=) b.id where exists (select * from notes)`,
		`create materialized view m as with x as (select 1 as a) select a from x`,
		`create type mood as enum ('a')`, `create type pair as (a integer, b acme.mood)`, `create domain d as ext.citext default 'x' not null`,
		`create type span as range (subtype = integer, subtype_diff = int4range_subdiff, multirange_type_name = spans)`,
		`alter type acme.mood add value if not exists 'x' after 'a'`, `alter type pair add attribute c text`, `alter domain d add constraint c check (value <> '')`,
		`alter table notes add constraint f foreign key (id) references acme.more(id) on delete cascade, alter column t set default nextval('s'::regclass)`,
		`alter table notes owner to oneo_owner`, `alter function f() owner to "oneo_t1"`, `alter table notes enable row level security`, `alter index i set (fillfactor = 70)`, `alter table notes replica identity full`, `alter table notes cluster on i`,
		`alter table x add exclude using gist (s with &&, c with operator(pg_catalog.=))`,
		`create statistics st on a, b from notes`, `alter statistics st set statistics 5`,
		`CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW WHEN (old.t IS DISTINCT FROM new.t) EXECUTE FUNCTION touch('a')`,
		`CREATE RULE r AS ON INSERT TO notes DO ALSO INSERT INTO more (x) VALUES (new.t)`,
		`create policy p on notes as permissive for select to oneo_t1, public using (t = current_user)`,
		`grant select, insert on table notes to oneo_t1 with grant option`, `grant execute on function f(integer) to public`, `revoke all on table notes from public, oneo_t1`,
		`grant usage on schema acme to oneo_t1`, `grant usage on type mood to public`, `grant select ("id") on table notes to oneo_t1`, `comment on constraint c on notes is 'x'`,
		`alter default privileges for role oneo_owner in schema acme grant select on tables to oneo_t1`, `comment on schema acme is 'x'`,
		`drop table a, acme.b`, `drop function f(integer, acme.mood)`, `drop trigger t on notes`, `drop index i`, `comment on table acme.notes is 'other.table'`,
		`CREATE OR REPLACE FUNCTION f(i integer DEFAULT 1) RETURNS integer LANGUAGE sql IMMUTABLE SET search_path TO 'acme', 'pg_temp' AS $$ select count(*)::integer from notes; update notes set t = 'x' $$`,
		`CREATE OR REPLACE PROCEDURE p() LANGUAGE sql BEGIN ATOMIC DELETE FROM notes WHERE (id < 0); END`,
		`CREATE OR REPLACE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql SET work_mem TO '8MB' AS $$ declare n integer := (select count(*) from notes); r notes%rowtype; c cursor for select id from acme.notes;
			begin new.t = now(); n := n + 1; perform f(n); call p(); for r in select * from notes loop n = n + r.id; end loop;
			insert into notes (t) values ('x') returning id into n; n := nextval(pg_get_serial_sequence('notes', 'id')); raise notice '%', n; return new; exception when others then return null; end $$`,
		`CREATE OR REPLACE FUNCTION many() RETURNS SETOF notes LANGUAGE plpgsql AS $$ begin return query select * from notes; end $$`,
	} {
		assert.NoError(t, place.Check(sql), sql)
	}
}

// What would do anything else, by itself or in what it makes, is refused, and so is what cannot be read.
func TestNotConfined(t *testing.T) {
	t.Parallel()
	fn := func(body string) string {
		return "create function f() returns integer language plpgsql as $$ " + body + " $$"
	}
	for _, sql := range []string{
		// What is read otherwise where it runs.
		`create function f() returns text language sql set standard_conforming_strings to off as $$ select 'a\''; delete from other.t; --' $$`,
		`create function f() returns text language plpgsql set "Backslash_Quote" to on as $$ begin return 'a'; end $$`,
		// What may be anybody's, by its number.
		`create table t (a bigint default nextval('16384'))`, `create table t (a bigint default nextval('16384'::regclass))`, `create function f() returns bigint language sql as $$ select setval('16384', 1) $$`,
		`create table t (a bigint default nextval('acme.other.s'))`, `create function f() returns bigint language sql as $$ select setval('"acme"."other"."s"', 1) $$`,
		`create view v as select 1 where exists (select other.f(), count(*) from t)`, `create view v as select 1 where exists (select 'other.t'::regclass, count(*))`,
		`create index i on t (a collate other.c)`, `create view v as select 1 operator(other.=) any (select 1)`, `create view v as select a from t order by a using operator(other.<)`,
		`create view v as select a from t tablesample other.m (1)`, `create table t (a text) partition by list (a collate other.c)`,
		`create function f() returns bigint language sql as $$ select gin_clean_pending_list('other.i') $$`, `create trigger g after delete on t execute function check_foreign_key(1, 'cascade', 'id', 'other.t', 'id')`,
		// Other kinds of statements.
		`create role bob`, `alter role oneo_owner superuser`, `create extension dblink`, `create database x`, `create schema x`, `drop schema acme`, `alter schema acme rename to x`,
		`create foreign table f (a integer) server s`, `create server s foreign data wrapper w`, `create event trigger e on ddl_command_end execute function f()`, `copy notes to program 'id'`,
		`copy notes from '/etc/passwd'`, `do $$ begin null; end $$`, `set search_path to other`, `set role bob`, `reset all`, `truncate notes`, `insert into notes values (1)`, `delete from notes`,
		`select 1`, `select pg_catalog.setval('acme.s', 1)`, `call p()`, `lock table notes`, `vacuum`, `begin`, `commit`, `listen x`, `notify x`, `load 'x'`, `refresh materialized view m`, `create language plperl`,
		`create cast (text as integer) with inout`, `create operator + (leftarg = text, rightarg = text, function = f)`, `create aggregate a (integer) (sfunc = int4pl, stype = integer)`,
		`create type base`, `create publication p for all tables`, `create table t as select 1`, `select 1 into t`, `security label on table t is 'x'`, `reassign owned by a to b`, `drop owned by oneo_owner`,
		`alter table notes set schema other`, `alter function f() security definer`, `alter database x set search_path to y`, `drop extension citext`, `drop role bob`, `import foreign schema s from server x into acme`,
		`create temporary table t (a integer)`, `alter view v rename to w`, `explain analyze delete from notes`, `prepare x as select 1`, `create tablespace t location '/x'`,
		``, `-- nothing`, `create table a (); create table b ()`, `create table a (`, "create table a (b text default '\x00')", `create table a (b integer) garbage`,
		// Names of other schemas.
		`create table other.t (a integer)`, `create table t (a other.type)`, `create table t (like other.t)`, `create table t () inherits (other.t)`, `create table t partition of other.t default`,
		`create table t (a integer references other.t)`, `create table t (a integer default nextval('other.s'))`, `create table t (a integer default nextval('other.s'::regclass))`,
		`create table t (a integer generated by default as identity (sequence name other.s))`, `create table t (a integer check (other.f(a)))`, `create table t (a integer default (other.f()))`,
		`create index i on other.t (a)`, `create index i on t (other.f(a))`, `create index i on t (a other.ops)`, `create view other.v as select 1`, `create view v as select a from other.t`,
		`create view v as select (select max(a) from other.t)`, `create view v as select 1 where exists (select from other.t)`, `create view v as select 'other.t'::regclass`, `create view v as select 1 operator(other.+) 2`,
		`create view v as select cast(1 as other.d)`, `create view v as select a collate other.c from t`, `create view v as table public.users`, `create view v as select * from information_schema.tables`,
		`create materialized view m as select body from other.notes`, `create materialized view m as select most_common_vals from pg_catalog.pg_stats`, `create materialized view m as select * from pg_stats`,
		`create view v as select * from pg_temp.x`, `alter sequence s owned by other.t.c`, `create sequence other.s`, `alter table other.t add column a integer`, `alter table t attach partition other.p default`,
		`alter table t inherit other.t`, `alter table t add exclude using gist (a with operator(other.&&))`, `alter table t alter column a type integer using other.f(a)`, `create domain d as other.d`,
		`create type x as range (subtype = integer, subtype_diff = other.f)`, `create type p as (a other.t)`, `create statistics s on a, b from other.t`, `create statistics other.s on a, b from t`, `alter statistics other.s set statistics 1`,
		`create trigger g after insert on other.t execute function f()`, `create trigger g after insert on t execute function other.f()`, `create rule r as on insert to other.t do nothing`,
		`create rule r as on insert to t do also delete from other.t`, `create rule r as on insert to t do also notify x`, `create policy p on other.t using (true)`, `create policy p on t using (exists (select from other.t))`,
		`drop table other.t`, `drop table a, other.t`, `drop view other.v`, `drop function other.f()`, `drop trigger g on other.t`, `drop type other.t`, `drop table t cascade`, `drop function ext.f()`, `drop table ext.t`,
		`comment on table other.t is 'x'`, `comment on schema other is 'x'`, `comment on role bob is 'x'`, `comment on database x is 'y'`, `comment on extension citext is 'x'`, `comment on type ext.citext is 'x'`,
		`alter table pg_catalog.pg_class add column x integer`, `create index i on ext.t (a)`, `alter type ext.mood add value 'x'`, `alter sequence other.h rename to x`, `create function other.f() returns integer language sql as 'select 1'`,
		// Roles and rights.
		`grant select on table t to bob`, `grant select on table t to public`, `grant usage on schema acme to public`, `grant usage on schema other to oneo_t1`, `grant select on table other.t to oneo_t1`,
		`grant select on all tables in schema other to oneo_t1`, `grant oneo_owner to oneo_t1`, `grant all on database x to oneo_t1`, `grant usage on language plpgsql to oneo_t1`, `grant set on parameter work_mem to oneo_t1`,
		`grant usage on type other.t to oneo_t1`, `grant execute on function other.f() to public`, `alter default privileges grant select on tables to oneo_t1`, `grant usage on sequence s to public`,
		`alter default privileges in schema other grant select on tables to oneo_t1`, `alter default privileges in schema acme grant select on tables to public`, `alter default privileges for role bob in schema acme grant select on tables to oneo_t1`,
		`alter table t owner to bob`, `alter function f() owner to bob`, `alter function other.f() owner to oneo_owner`, `alter schema acme owner to oneo_t1`, `create policy p on t to bob using (true)`, `revoke all on table other.t from oneo_t1`,
		// Functions.
		`create function f() returns integer language c as 'lib', 'f'`, `create function f() returns integer language internal as 'f'`, `create function f() returns integer language plpython3u as 'return 1'`,
		`create function f() returns integer language sql security definer as 'select 1'`, `create function f() returns integer language sql security definer set search_path to acme as 'select 1'`,
		`create function f() returns integer language sql set search_path to other as 'select 1'`, `create function f() returns integer language sql set role to bob as 'select 1'`,
		`create function f() returns integer language sql set session_replication_role to replica as 'select 1'`, `create function f(a integer default other.f()) returns integer language sql as 'select 1'`,
		`create function f() returns other.t language sql as 'select 1'`, `create function f() returns integer language sql as 'drop schema other cascade; select 1'`, `create function f() returns integer language sql as 'select a from other.t'`,
		`create function f() returns integer language sql as 'delete from other.t returning 1'`, `create function f() returns integer language sql as 'set search_path to other; select 1'`, `create function f() returns integer language sql as 'garbage here'`,
		`create function f() returns integer language sql as 'select 1 into x; select 1'`, `create function f() returns integer language sql as 'copy notes to program ''id'''`,
		`create function f() returns integer language sql begin atomic select a from other.t; end`, `create function f() returns integer language sql support other.f as 'select 1'`,
		`create function f() returns integer language sql as $$ select query_to_xml('drop schema other', true, true, '') is null $$`, `create function f() returns text language sql as $$ select set_config('search_path', 'other', false) $$`,
		`create function f() returns integer language sql as $$ update pg_settings set setting = 'other' where name = 'search_path' returning 1 $$`, `create function f() returns text language sql as $$ select pg_catalog.pg_read_file('/etc/passwd') $$`,
		`create function f(a text) returns bigint language sql as $$ select nextval(a::regclass) $$`, `create function f(a text) returns bigint language sql as $$ select setval('other.' || a, 1) $$`,
		`create function f() returns integer language sql as $$ select lo_import('/etc/passwd')::integer $$`, `create function f() returns integer language sql as $$ select pg_advisory_lock(1, 2) is null $$`,
		`create function f() returns setof record language sql as $$ select ext.dblink('dbname=x', 'drop table y') $$`,
		fn(`begin execute 'drop schema other'; return 1; end`), fn(`declare r record; begin for r in execute 'select 1' loop end loop; return 1; end`), fn(`declare c refcursor; begin open c for execute 'select 1'; return 1; end`),
		fn(`begin drop schema other; return 1; end`), fn(`begin perform other.f(); return 1; end`), fn(`begin return (select max(a) from other.t); end`), fn(`declare x integer := other.f(); begin return x; end`),
		fn(`declare x other.t; begin return 1; end`), fn(`declare x other.t%rowtype; begin return 1; end`), fn(`declare c cursor for select a from other.t; begin return 1; end`), fn(`begin if other.f() then return 1; end if; return 2; end`),
		fn(`declare a integer[]; begin a[other.f()] := 1; return 1; end`), fn(`declare a integer[]; begin a[1] = other.f(); return 1; end`), fn(`begin commit; return 1; end`), fn(`begin set local role bob; return 1; end`),
		fn(`begin create temporary table x (a integer); return 1; end`), fn(`begin do $x$ begin null; end $x$; return 1; end`), fn(`begin copy notes to program 'id'; return 1; end`), fn(`begin insert into other.t values (1); return 1; end`),
		fn(`begin with x as (delete from other.t returning 1) select 1 from x; return 1; end`), fn(`begin raise notice '%', other.f(); return 1; end`), fn(`begin call other.p(); return 1; end`), fn(`begin garbage; return 1; end`),
		fn(`declare a text[]; begin a['x:=y'] := other.f(); return 1; end`), fn(`begin return query_to_xml('select 1', true, true, '') is null; end`), fn(`begin notify x; return 1; end`), fn(`begin truncate notes; return 1; end`),
	} {
		assert.Error(t, place.Check(sql), sql)
	}
}
