package postgres_test

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// F27: a statement of a tenant with a budget is cancelled after the budget's time, whatever way it is sent, and neither its
// neighbour's on the same connection nor that of the same tenant without a budget.
func TestStatementsEndByTheBudget(t *testing.T) {
	t.Parallel()
	for _, mode := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Statements = mode })
		a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech") // c is on a's connection
		bounded := a
		bounded.Budget.StatementTimeout = 1234 * time.Millisecond
		generous := a
		generous.Budget.StatementTimeout = 24 * time.Hour
		all := env.DB
		const show = `select current_setting('statement_timeout')`
		byDefault := value[string](t, all, a, postgres.Read, show)
		for range 3 { // the first is prepared, the second has a name, the third a name of its own
			for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
				require.Equal(t, "1234ms", value[string](t, all, bounded, access, show), "%s %d", mode, access)
				require.Equal(t, byDefault, value[string](t, all, c, access, show), "%s %d: the neighbour's", mode, access)
				require.Equal(t, byDefault, value[string](t, all, generous, access, show), "%s %d: never beyond the server's own", mode, access)
			}
		}
		const helpers = `select current_setting('max_parallel_workers_per_gather')`
		require.Equal(t, "2", value[string](t, all, bounded, postgres.Read, helpers), "PostgreSQL's own default")
		bounded.Budget.InFlight = 1
		for _, access := range []postgres.Access{postgres.Single, postgres.Single, postgres.Read, postgres.Write} {
			require.Equal(t, "0", value[string](t, all, bounded, access, helpers), "a transaction that is counted takes one process")
			require.Equal(t, "2", value[string](t, all, c, access, helpers), "and the neighbour's takes what PostgreSQL gives")
		}
		bounded.Budget.StatementTimeout = 50 * time.Millisecond
		for _, access := range []postgres.Access{postgres.Single, postgres.Single, postgres.Read, postgres.Write} {
			err := try(t.Context(), all, bounded, access, `select pg_sleep(3600)`)
			require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
			require.Equal(t, "statement_timeout", fault.Of(err).Code)
			require.Equal(t, "acme", fault.Of(err).Tenant)
			require.Equal(t, 1, value[int](t, all, c, access, `select 1`), "the neighbour on the same connection")
		}
	}
}

// A budget that changes while the tenant is at work holds for whoever comes after the change, and for this tenant alone.
func TestInFlightFollowsTheBudget(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight, o.AcquireTimeout = 12, 3, 2*time.Second })
	a, quiet := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	end := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	var once sync.Once
	release := func() { once.Do(func() { close(end) }) }
	defer release()
	var in atomic.Int32
	hold := func(budget int) {
		tn := a
		tn.Budget.InFlight = budget
		wg.Go(func() {
			if err := env.DB.InTenant(t.Context(), tn, postgres.Read, func(*postgres.Tx) error { in.Add(1); <-end; return nil }); err != nil {
				t.Errorf("holder: %v", err)
			}
		})
	}
	refused := func(budget int) {
		t.Helper()
		tn := a
		tn.Budget.InFlight = budget
		err := try(t.Context(), env.DB, tn, postgres.Read, `select 1`)
		require.True(t, fault.Is(err, fault.Busy), "%v", err)
		require.Equal(t, "tenant_busy", fault.Of(err).Code)
		require.Positive(t, fault.Of(err).Retry)
	}
	hold(1)
	until(t, "one is at work", func() bool { return in.Load() == 1 })
	refused(1)
	hold(2) // raised
	until(t, "two are at work", func() bool { return in.Load() == 2 })
	refused(2)
	refused(1) // lowered
	hold(0)    // none of its own: the server's
	until(t, "three are at work", func() bool { return in.Load() == 3 })
	refused(0)
	most, err := env.DB.MostInFlight(t.Context(), a)
	require.NoError(t, err)
	require.Equal(t, 3, most)
	a.Budget.InFlight = 10_000
	most, err = env.DB.MostInFlight(t.Context(), a)
	require.NoError(t, err)
	require.Equal(t, 5, most, "the last of the six connections of its sub-pool is the others', however large the budget")
	for most > int(in.Load()) {
		before := in.Load()
		hold(10_000)
		until(t, "one more is at work", func() bool { return in.Load() == before+1 })
	}
	refused(10_000)
	for range 5 {
		require.Equal(t, 1, value[int](t, env.DB, quiet, postgres.Single, `select 1`))
	}
	release()
	wg.Wait()
	a.Budget.InFlight = 1
	require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select 1`), "what was taken is given back")
}

// Whoever waits for a slot gets one when it becomes free, and in turn.
func TestWaitersAreServedInTurn(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.AcquireTimeout = 12, pgtest.Patience })
	a := env.Tenant(t, "acme")
	a.Budget.InFlight = 1
	var at, most atomic.Int32
	var wg sync.WaitGroup
	for range 16 { // as many as may wait, and the one at work
		wg.Go(func() {
			if err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
				n := at.Add(1)
				defer at.Add(-1)
				for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
				}
				_, err := tx.Exec(t.Context(), `select pg_sleep(0.01)`)
				return err
			}); err != nil {
				t.Errorf("a waiter got %v", err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, most.Load(), "more than one was at work at one time")
}
