package postgres_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// refused are statements that could outlive their transaction, or end it. Whoever runs one is told so before anything
// reaches PostgreSQL.
var refused = []string{
	`set search_path to public`, `SET search_path TO public`, "\n\t set role none", `set session authorization default`, `set local role none`,
	`reset all`, `reset role`, `discard all`, `listen x`, `unlisten *`, `notify x`, `lock table users`, `prepare p as select 1`, `execute p`, `deallocate all`,
	`begin`, `start transaction`, `commit`, `end`, `abort`, `rollback`, `savepoint s`, `release s`, `prepare transaction 'x'`, `commit prepared 'x'`,
	`declare c cursor with hold for select 1`, `fetch c`, `close c`, `move c`, `load 'x'`, `do $$ begin end $$`, `call p()`, `copy users to stdout`,
	`create table x (a int)`, `create temp table x (a int)`, `drop schema acme`, `alter table users add x int`, `truncate users`, `grant all on users to public`,
	`vacuum`, `analyze`, `cluster`, `reindex table users`, `checkpoint`, `comment on table users is 'x'`, `security label on table users is 'x'`, `refresh materialized view x`,
	`show all`, `table users`, ``, ` `, `;`, `-- only a comment`, `/* only a comment`, `/* c */ set role none`, "-- c\nset role none", `; set role none`, `(((set role none`,
	`/* /* nested */ set role none */ set role none`, `/* /* */ select */ set role none`, `/*/**/*/set role none`, `/* a */ /* /* b */ select */ reset all`,
	`select set_config('search_path', 'globex', false)`, `select pg_catalog.set_config('role', 'x', true)`, `SELECT SET_CONFIG ('role', 'x', true)`, `select "set_config"('a', 'b', false)`,
	"select set_config\n('role', 'x', true)", `select set_config/* c */('role', 'x', true)`, "select set_config -- c\n('role', 'x', true)",
	`with x as (select set_config('role', 'none', true)) select 1`, `insert into users select set_config('role', 'none', true)`, `update users set name = set_config('role', 'x', true)`,
	`select pg_advisory_lock(1)`, `select pg_try_advisory_lock(1, 2)`, `select pg_advisory_lock_shared(1)`, `select pg_advisory_unlock_all()`, `select pg_advisory_unlock(1)`,
	`select pg_notify('x', 'y')`, `select dblink_connect('x')`, `select U&"\0073et_config"('role', 'x', true)`,
	`explain analyze execute oneo_bind(1, '1', '1', '1', 'on')`, `explain execute oneo_gate(1)`, `explain (analyze) execute s1`,
	`explain analyze create table x as select 1`, `explain declare c cursor with hold for select 1`,
	`select pg_catalog.lo_import('/etc/passwd')`, `select 1 into temp x`,
	`update pg_settings set setting = 'none' where name = 'role'`, `with x as (update pg_catalog.pg_settings set setting = 'ISO, DMY' where name = 'DateStyle' returning 1) select 1`,
	`UPDATE Pg_Settings SET setting = 'UTC' WHERE name = 'TimeZone'`, "select set_config\v('role', 'x', true)",
	`select query_to_xml('select set_con' || 'fig(''role'', ''none'', true)', true, true, '')`, `select query_to_xml_and_xmlschema('select 1', true, true, '')`,
	`select cursor_to_xml('c', 1, true, true, '')`, `select table_to_xml('users', true, true, '')`, `select * from ts_stat('select pg_catalog.set_con' || 'fig(''role'', ''none'', true)')`,
	`select ts_rewrite('a'::tsquery, 'select 1')`, `select lo_create(0)`, `select lo_from_bytea(0, '')`,
}

func TestGuardRefuses(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		t.Run(string(st), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Statements = st })
			a := env.Tenant(t, "acme")
			for _, sql := range refused {
				for _, access := range []postgres.Access{postgres.Single, postgres.Write} {
					var said error
					err := env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) error {
						_, said = tx.Exec(t.Context(), sql)
						return said
					})
					require.Errorf(t, said, "%q was run", sql)
					require.Error(t, err)
					shared := env.DB.InShared(t.Context(), access, func(tx *postgres.Tx) error { _, err := tx.Exec(t.Context(), sql); return err })
					require.Errorf(t, shared, "%q was run on the shared tables", sql)
				}
			}
			clean(t, env)
		})
	}
}

// Several statements in one text, and pgx's own switches, are no way around the guard.
func TestGuardHasNoSideDoor(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Statements = st })
		a := env.Tenant(t, "acme")
		const two = `select 1; commit; set search_path to public`
		for _, args := range [][]any{
			nil, {pgx.QueryExecModeSimpleProtocol}, {pgx.QueryExecModeExec}, {pgx.QueryResultFormats{0}, pgx.QueryExecModeSimpleProtocol}, {rewrite{}},
		} {
			for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
				run := func(tx *postgres.Tx) error { _, err := tx.Exec(t.Context(), two, args...); return err }
				require.Errorf(t, env.DB.InTenant(t.Context(), a, access, run), "%s: two statements with %v", st, args)
				require.Errorf(t, env.DB.InShared(t.Context(), access, run), "%s, shared: two statements with %v", st, args)
				single := func(tx *postgres.Tx) error { _, err := tx.Exec(t.Context(), `select 1`, rewrite{}); return err }
				require.Errorf(t, env.DB.InTenant(t.Context(), a, access, single), "%s: a statement rewritten behind the guard", st)
				require.Errorf(t, env.DB.InShared(t.Context(), access, single), "%s, shared: a statement rewritten behind the guard", st)
			}
		}
		clean(t, env)
	}
}

type rewrite struct{}

func (rewrite) RewriteQuery(context.Context, *pgx.Conn, string, []any) (string, []any, error) {
	return `set search_path to public`, nil, nil
}

func TestGuardAllowsPlainWork(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	for _, sql := range []string{
		`select 1`, `SELECT 1`, ` select 1;`, "-- why\nselect 1", `/* why */ select 1`, `/* a /* nested */ one */ select 1`, `(select 1)`, `values (1)`,
		`with x as (select 1) select * from x`, `explain select 1 from users`, `select id from users for update`, `select 'set role none; listen x'`,
		`update users set name = 'set_config' where false`, `delete from users where false`, `select pg_advisory_xact_lock(1, 2)`, `select 1 where 'a' <> 'begin'`,
		`insert into users (id, email, password_hash) select gen_random_uuid(), 'x', 'y' where false`, `select '/*', '*/', 'commit'`, `select "name" from users`,
	} {
		for range 3 {
			require.NoErrorf(t, try(t.Context(), env.DB, a, postgres.Write, sql), "%q is plain work", sql)
		}
	}
}

// clean opens one more borrower on each connection, and looks from outside: nothing of an earlier one may be left (F31, I9).
func clean(t *testing.T, env *pgtest.Env) {
	t.Helper()
	const leftovers = `select concat_ws('|', (select count(*) from pg_listening_channels()), (select count(*) from pg_cursors where name <> ''),
(select count(*) from pg_prepared_statements where name !~ '^(oneo_|s|t)[a-z0-9]*$'), (select count(*) from pg_class where relpersistence = 't'),
(select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid() and classid <> 7302657),
current_setting('oneo.left', true), current_setting('work_mem'), current_setting('DateStyle'), session_user = any (array['oneo_app_1', 'oneo_app_2']))`
	const want = `0|0|0|0|0|4MB|ISO, MDY|t`
	var got string
	ctx := t.Context()
	for i := range 2 {
		slug := fmt.Sprintf("probe-%d", i)
		probe := env.Tenant(t, slug)
		for range 2 {
			require.Equal(t, want, value[string](t, env.DB, probe, postgres.Read, leftovers), "something was left on the connection")
			require.Equal(t, probe.Schema.String()+", ext, pg_temp", value[string](t, env.DB, probe, postgres.Single, `select current_setting('search_path')`))
		}
	}
	require.NoError(t, env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error { return tx.QueryRow(ctx, bindingState).Scan(&got) }))
	require.Equal(t, `""|oneo_app|on|1min|1s|2min`, got)
	env.Invariants(t)
}

// F31: what the guard cannot see, because it hides in a function that an administrator made, does not outlive the
// transaction either, or what is left has no effect on the next borrower's binding.
func TestNothingSurvivesTheBorrower(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"path":      `perform pg_catalog.set_config('search_path', 'globex', true)`,
		"role":      `perform pg_catalog.set_config('role', 'none', true)`,
		"read only": `perform pg_catalog.set_config('transaction_read_only', 'on', true)`,
		"guc":       `perform pg_catalog.set_config('oneo.left', 'x', true)`,
		"lock":      `perform pg_catalog.pg_advisory_xact_lock(5, 5)`,
		// These outlive the transaction. The next binding sets path, role and limits anew.
		"session path": `perform pg_catalog.set_config('search_path', 'globex', false)`,
		"session role": `perform pg_catalog.set_config('role', 'none', false)`,
		"session time": `perform pg_catalog.set_config('statement_timeout', '7000', false)`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, oneConn)
			a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
			c := env.Tenant(t, "initech") // on the connection of a
			_ = b
			admin(t, env, `create function ext.nasty() returns int language plpgsql as $$ begin `+body+`; return 1; end $$`)
			inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
			require.NoError(t, err)
			require.Equal(t, inst.LoginOf(a.Number), inst.LoginOf(c.Number), "the test needs two tenants on one connection")
			pid := value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`)
			for range 3 {
				for _, access := range []postgres.Access{postgres.Single, postgres.Write} {
					_ = try(t.Context(), env.DB, a, access, `select ext.nasty()`)
					require.Equal(t, "initech, ext, pg_temp|"+inst.TenantRole(c.Number)+"|on|1min|1s|2min|initech", value[string](t, env.DB, c, postgres.Single, bindingState))
					require.Equal(t, "initech, ext, pg_temp|"+inst.TenantRole(c.Number)+"|off|1min|1s|2min|initech", value[string](t, env.DB, c, postgres.Write, bindingState))
				}
			}
			require.Equal(t, pid, value[int](t, env.DB, c, postgres.Single, `select pg_backend_pid()`), "it must have been one connection all the time")
			require.Equal(t, 0, value[int](t, env.DB, c, postgres.Read, `select count(*) from pg_locks where locktype = 'advisory' and classid = 5 and pid = pg_backend_pid()`))
		})
	}
}

// A session's timeout that an earlier borrower left so short that it ends the next binding, which would replace it,
// costs the connection and not the request.
func TestTimeoutLeftBehindEndsNoBinding(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	admin(t, env, `create function ext.nasty() returns int language plpgsql as $$
begin perform pg_catalog.set_config('statement_timeout', '1', false); return 1; end $$`)
	// Makes every binding slower than the timeout.
	admin(t, env, `create function ext.slow() returns boolean language plpgsql as $$ begin perform pg_catalog.pg_sleep(0.02); return true; end $$;
grant execute on function ext.slow() to public; alter table public.placements enable row level security;
create policy slow on public.placements for select to public using (ext.slow())`)
	for _, access := range []postgres.Access{postgres.Single, postgres.Single, postgres.Write, postgres.Read} {
		pid := value[int](t, env.DB, a, access, `select pg_backend_pid()`)
		require.NoError(t, try(t.Context(), env.DB, a, postgres.Write, `select ext.nasty()`))
		require.NotEqual(t, pid, value[int](t, env.DB, a, access, `select pg_backend_pid()`), "the binding was to be cut short, and tried on another connection")
	}
}

func TestNoTempNoCreate(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	for range 2 {
		err := try(t.Context(), env.DB, a, postgres.Write, `select 1 as a into temp x`)
		require.Error(t, err)
		err = try(t.Context(), env.DB, a, postgres.Write, `select 1 as a into x`)
		require.Error(t, err)
		require.False(t, fault.Is(err, fault.Unavailable))
	}
	clean(t, env)
}
