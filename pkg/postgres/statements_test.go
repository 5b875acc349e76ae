package postgres_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const names = `select count(*) from pg_prepared_statements where name like $1`

// A tenant's own names are made at the second use, are used, and are bounded.
func TestHotStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.HotStatements = 5 })
	a := env.Tenant(t, "acme")
	var tenants []tenant.Tenant
	for i := range 8 {
		tenants = append(tenants, env.Tenant(t, fmt.Sprintf("t-%d", i)))
	}
	for range 4 {
		for _, access := range []postgres.Access{postgres.Single, postgres.Read} {
			for _, tn := range tenants {
				for k := range 3 {
					require.Equal(t, k, value[int](t, env.DB, tn, access, fmt.Sprintf(`select %d + count(*)::int from users`, k)))
				}
			}
		}
	}
	own := value[int](t, env.DB, a, postgres.Read, names, "t%")
	require.LessOrEqual(t, own, 5, "the names of tenants' own statements are bounded by HotStatements")
	require.Positive(t, own, "a statement that a tenant runs again gets a name of its own")
	const used = `select coalesce(max(generic_plans + custom_plans), 0)::int from pg_prepared_statements where name like 't%'`
	require.Greater(t, value[int](t, env.DB, a, postgres.Read, used), 1, "names that are made must be used")
}

func TestNoHotStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.HotStatements = 0 })
	a, c := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	for range 6 {
		for _, tn := range []tenant.Tenant{a, c} {
			require.Equal(t, tn.Schema.String(), value[string](t, env.DB, tn, postgres.Single, `select current_schema()`))
		}
	}
	require.Zero(t, value[int](t, env.DB, a, postgres.Read, names, "t%"))
}

// Statements without end, such as built filters, must not fill the backend.
func TestSharedStatementsAreBounded(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.HotStatements = 20 })
	a := env.Tenant(t, "acme")
	err := env.DB.InTenant(t.Context(), a, postgres.Read, func(tx *postgres.Tx) error {
		for i := range 700 {
			var n int
			if err := tx.QueryRow(t.Context(), fmt.Sprintf(`select %d`, i)).Scan(&n); err != nil {
				return err
			}
			require.Equal(t, i, n)
		}
		return nil
	})
	require.NoError(t, err)
	require.LessOrEqual(t, value[int](t, env.DB, a, postgres.Read, `select count(*) from pg_prepared_statements`), 512+20+3)
	require.Equal(t, 4242, value[int](t, env.DB, a, postgres.Single, `select 4242`), "a statement beyond the bound runs without a name")
	require.Equal(t, 4242, value[int](t, env.DB, a, postgres.Single, `select 4242`))
}

// F17: after a column changes its type, Single answers right; Write refuses once, clean and retryable, and then works.
func TestCachedPlanAfterMigration(t *testing.T) {
	t.Parallel()
	for name, warm := range map[string]int{"shared name": 1, "own name": 4} {
		for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
			t.Run(fmt.Sprintf("%s %d", name, access), func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, oneConn)
				a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech") // a and c share a connection
				admin(t, env, `create table acme.x (v int); insert into acme.x values (7); grant select on acme.x to public;
create table initech.x (v int); insert into initech.x values (8); grant select on initech.x to public`)
				const sql = `select v from x`
				for range warm {
					require.Equal(t, 7, value[int](t, env.DB, a, access, sql))
				}
				admin(t, env, `alter table acme.x alter column v type text`)
				var got string
				read := func(tx *postgres.Tx) error { return tx.QueryRow(t.Context(), sql).Scan(&got) }
				err := env.DB.InTenant(t.Context(), a, access, read)
				if access == postgres.Single {
					require.NoError(t, err, "Single retries by itself: it has done nothing yet")
				} else if err != nil {
					requireFault(t, err, fault.Unavailable, "tenant_changed")
					require.NoError(t, env.DB.InTenant(t.Context(), a, access, read), "the next try must work")
				}
				require.Equal(t, "7", got)
				// A tenant at the other version, on the same connection: right, or refused clean and retryable.
				var other int
				readOther := func(tx *postgres.Tx) error { return tx.QueryRow(t.Context(), sql).Scan(&other) }
				if err := env.DB.InTenant(t.Context(), c, access, readOther); err != nil {
					require.NotEqual(t, postgres.Single, access, "Single retries by itself")
					requireFault(t, err, fault.Unavailable, "tenant_changed")
					require.NoError(t, env.DB.InTenant(t.Context(), c, access, readOther))
				}
				require.Equal(t, 8, other)
				require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Single, read))
				require.Equal(t, "7", got)
				for range 20 {
					require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Single, read))
					require.Equal(t, "7", got)
					require.Equal(t, 8, value[int](t, env.DB, c, postgres.Single, sql))
				}
				env.Invariants(t)
			})
		}
	}
}

// A backend never forgets a tenant that it has seen: after so many it is replaced.
func TestRetirement(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.MaxTenants = 2 })
	var tenants []tenant.Tenant
	for i := range 10 { // five for each sub-pool
		tenants = append(tenants, env.Tenant(t, fmt.Sprintf("t-%d", i)))
	}
	pids := map[int]bool{}
	for _, tn := range tenants {
		for range 3 {
			pids[value[int](t, env.DB, tn, postgres.Single, `select pg_backend_pid()`)] = true
		}
	}
	require.GreaterOrEqual(t, len(pids), 4, "with five tenants and a bound of two, each sub-pool must have had two backends or more")
	require.Less(t, len(pids), 15, "a tenant that the backend knows already must not retire it")
	retired := env.DB.Stats()[0].Retired
	require.GreaterOrEqual(t, retired, int64(2))
	for range 5 {
		value[int](t, env.DB, tenants[9], postgres.Single, `select 1`)
	}
	require.LessOrEqual(t, env.DB.Stats()[0].Retired, retired+1)

	small := pgtest.New(t, oneConn, func(o *postgres.Options) { o.BackendMemory = 1 })
	a := small.Tenant(t, "acme")
	first := value[int](t, small.DB, a, postgres.Single, `select pg_backend_pid()`)
	require.NotEqual(t, first, value[int](t, small.DB, a, postgres.Single, `select pg_backend_pid()`), "a backend beyond its memory is replaced")
}

// The owner's backends see every tenant in a run over the fleet; none may keep them all.
func TestOwnerConnectionsAreReplaced(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.OwnerConns = 1 })
	a := env.Tenant(t, "acme")
	backends := map[int]int{}
	for range 900 {
		require.NoError(t, env.DB.AsOwnerIn(t.Context(), a, func(tx *postgres.OwnerTx) error {
			var pid int
			err := tx.QueryRow(t.Context(), `select pg_backend_pid()`).Scan(&pid)
			backends[pid]++
			return err
		}))
	}
	require.Len(t, backends, 3)
	for pid, n := range backends {
		require.LessOrEqual(t, n, 400, "backend %d", pid)
	}
}
