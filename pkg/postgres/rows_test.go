package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// C34: work bound to one tenant may open work bound to another; whatever becomes of that, the outer work is still bound
// to its own tenant and can be committed.
func TestNestedWorkKeepsItsTenant(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight = 8, 2 })
	a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	ctx := t.Context()
	schema := func(tx *postgres.Tx) (s string) {
		require.NoError(t, tx.QueryRow(ctx, `select current_schema()`).Scan(&s))
		return s
	}
	inner := map[string]func(*postgres.Tx) error{
		"returns":   func(*postgres.Tx) error { return nil },
		"fails":     func(*postgres.Tx) error { return errors.New("no") },
		"breaks":    func(tx *postgres.Tx) error { _, err := tx.Exec(ctx, `select 1/0`); return err },
		"panics":    func(*postgres.Tx) error { panic("no") },
		"goes deep": func(*postgres.Tx) error { return try(ctx, env.DB, a, postgres.Read, `select 1 from users`) },
	}
	for name, fn := range inner {
		for _, on := range []string{"another tenant", "the same tenant", "shared tables"} {
			key := fmt.Sprintf("k%d", time.Now().UnixNano())
			err := env.DB.InTenant(ctx, a, postgres.Write, func(tx *postgres.Tx) error {
				require.Equal(t, "acme", schema(tx))
				func() {
					defer func() { _ = recover() }()
					switch on {
					case "another tenant":
						_ = env.DB.InTenant(ctx, b, postgres.Write, func(in *postgres.Tx) error {
							require.Equal(t, "globex", schema(in))
							return fn(in)
						})
					case "the same tenant":
						if name != "goes deep" { // two at once is this tenant's bound
							_ = env.DB.InTenant(ctx, a, postgres.Write, fn)
						}
					default:
						_ = env.DB.InShared(ctx, postgres.Read, fn)
					}
				}()
				require.Equal(t, "acme", schema(tx), "%s, which %s", on, name)
				sql, args := insertPipeline(key)
				_, err := tx.Exec(ctx, sql, args...)
				return err
			})
			require.NoErrorf(t, err, "%s, which %s", on, name)
			require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select count(*) from pipelines where key = $1`, key))
			require.Equal(t, 0, value[int](t, env.DB, b, postgres.Single, `select count(*) from pipelines`))
		}
	}
	env.Invariants(t)
}

// C37: many tenants over few connections, while names of tenants' own statements are given up for others and backends
// are retired.
func TestIsolationOfManyTenants(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.MaxConns, o.InFlight, o.AcquireTimeout, o.HotStatements, o.MaxTenants = 3, 3, pgtest.Patience, 4, 12
	})
	var many []tenant.Tenant
	for i := range 50 {
		many = append(many, env.Tenant(t, fmt.Sprintf("canary-%d", i)))
	}
	pgtest.Isolation(t, env, pgtest.IsolationOptions{DB: db, Tenants: many, Workers: 10, Requests: 100})
	require.NotZero(t, db.Stats()[0].Retired, "backends were to be retired meanwhile")
}

// F28: a handler that stands still with a transaction open loses it, and its locks with it.
func TestIdleTransactionEnds(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight = 4, 2 })
	idle, _, _ := env.Open(t, func(o *postgres.Options) { o.IdleInTransactionTimeout = 2 * time.Second })
	a := env.Tenant(t, "acme")
	ctx := t.Context()
	sql, args := insertPipeline("held")
	require.NoError(t, try(ctx, env.DB, a, postgres.Write, sql, args...))
	var pid int
	err := idle.InTenant(ctx, a, postgres.Write, func(tx *postgres.Tx) error {
		require.NoError(t, tx.QueryRow(ctx, `update pipelines set name = 'mine' where key = 'held' returning pg_backend_pid()`).Scan(&pid))
		admin := pgtest.Admin(t, env.AdminURL)
		until(t, "the backend has ended", func() bool {
			var gone bool
			require.NoError(t, admin.QueryRow(ctx, `select not exists (select from pg_stat_activity where pid = $1)`, pid).Scan(&gone))
			return gone
		})
		_, err := tx.Exec(ctx, `select 1`)
		return err
	})
	require.Truef(t, fault.Is(err, fault.Unavailable), "the transaction is gone: %v", err)
	require.NoError(t, try(ctx, env.DB, a, postgres.Write, `update pipelines set name = 'yours' where key = 'held'`), "its locks are gone, too")
	require.NotEqual(t, pid, value[int](t, idle, a, postgres.Single, `select pg_backend_pid()`))
	env.Invariants(t)
}

// F32: a tenant whose role is gone cannot be bound, and the connection on which that failed serves the next tenant.
func TestARoleThatIsGone(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech") // c is on a's connection
	inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
	require.NoError(t, err)
	require.Equal(t, inst.LoginOf(a.Number), inst.LoginOf(c.Number))
	pid := value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`)
	role := inst.TenantRole(a.Number)
	admin(t, env, `alter role `+role+` rename to elsewhere`)
	for range 2 {
		for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
			require.Error(t, env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) error {
				_, err := tx.Exec(t.Context(), `select 1`)
				return err
			}), "access %d", access)
			require.Equal(t, pid, value[int](t, env.DB, c, access, `select pg_backend_pid()`), "the connection is kept")
			require.Equal(t, "initech", value[string](t, env.DB, c, access, `select current_schema()`))
		}
	}
	admin(t, env, `alter role elsewhere rename to `+role)
	require.Equal(t, "acme", value[string](t, env.DB, a, postgres.Write, `select current_schema()`))
	env.Invariants(t)
}

// A46: tables that the owner makes later are the tenant's to read and write, and never to change.
func TestLaterTables(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		t.Run(string(iso), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Isolation = iso })
			a := env.Tenant(t, "acme")
			require.NoError(t, env.DB.AsOwnerIn(t.Context(), a, func(tx *postgres.OwnerTx) error {
				return tx.Script(t.Context(), `create table later (id int generated always as identity primary key, n int not null); create table serially (id serial primary key)`)
			}))
			run := func(sql string) error { return try(t.Context(), env.DB, a, postgres.Write, sql) }
			require.NoError(t, run(`insert into later (n) values (1), (2)`))
			require.NoError(t, run(`insert into serially default values`))
			require.NoError(t, run(`update later set n = n + 1`))
			require.NoError(t, run(`delete from later where n = 2`))
			require.Equal(t, 1, value[int](t, env.DB, a, postgres.Read, `select count(*) from later where n = 3`))
			inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
			require.NoError(t, err)
			login := asLogin(t, env, inst.LoginOf(a.Number))
			if iso == postgres.ByRole {
				_, err := login.Exec(t.Context(), `set role `+inst.TenantRole(a.Number))
				require.NoError(t, err)
			} else {
				_, err := login.Exec(t.Context(), `set role `+inst.AppRole)
				require.NoError(t, err)
			}
			for _, sql := range []string{`drop table acme.later`, `truncate acme.later`, `alter table acme.later add x int`, `create table acme.mine (a int)`, `create index on acme.later (n)`} {
				_, err := login.Exec(t.Context(), sql)
				requireState(t, err, "42501", sql)
			}
		})
	}
}

// F36, security 18: every function that a bound transaction can reach through ext pins its search path, and none runs
// with another's rights.
func TestFunctionsPinTheirPath(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	rows, err := pgtest.Admin(t, env.AdminURL).Query(context.Background(), `select p.oid::regprocedure::text, p.prosecdef, coalesce(array_to_string(p.proconfig, ' '), '')
from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname in ('ext', 'public', 'acme')
and not exists (select from pg_depend d where d.classid = 'pg_proc'::regclass and d.objid = p.oid and d.deptype = 'e')`)
	require.NoError(t, err)
	defer rows.Close()
	found := 0
	for rows.Next() {
		var name, settings string
		var definer bool
		require.NoError(t, rows.Scan(&name, &definer, &settings))
		found++
		require.Containsf(t, settings, "search_path=pg_catalog, pg_temp", "%s takes names from its caller's path", name)
		require.Falsef(t, definer, "%s runs with its owner's rights", name)
	}
	require.NoError(t, rows.Err())
	require.NotZero(t, found)
}

// F38: what isolation by role does not stop, as docs/adr/0001 says: SQL injected past the guard can take off its role
// and put on one of the same sub-pool. Another sub-pool's tenants stay out of reach.
func TestWhatInjectionReaches(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a, b, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech")
	inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
	require.NoError(t, err)
	require.Equal(t, inst.LoginOf(a.Number), inst.LoginOf(c.Number))
	login := asLogin(t, env, inst.LoginOf(a.Number))
	set := func(number int32) error {
		_, err := login.Exec(t.Context(), `select set_config('role', $1, false)`, inst.TenantRole(number))
		return err
	}
	require.NoError(t, set(a.Number))
	_, err = login.Exec(t.Context(), `select 1 from initech.users`)
	requireState(t, err, "42501", "as acme's role")
	require.NoError(t, set(c.Number), "a neighbour of the sub-pool")
	_, err = login.Exec(t.Context(), `select 1 from initech.users`)
	require.NoError(t, err)
	requireState(t, set(b.Number), "42501", "a tenant of another sub-pool")
}
