package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// hold takes the tenant's gate exclusively until the returned function is called.
func hold(t *testing.T, db *postgres.DB, number int32) (release func()) {
	t.Helper()
	held, end, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		done <- db.AsOwner(context.Background(), "main", func(tx *postgres.OwnerTx) error {
			if err := tx.LockGate(context.Background(), number); err != nil {
				return err
			}
			close(held)
			<-end
			return nil
		})
	}()
	select {
	case <-held:
	case err := <-done:
		t.Fatalf("take the gate: %v", err)
	}
	release = sync.OnceFunc(func() { close(end); require.NoError(t, <-done) })
	t.Cleanup(release) // before the pool is closed, which waits for its connections
	return release
}

func TestGateHeldRefusesWithinABound(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		t.Run(string(st), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, func(o *postgres.Options) { o.AcquireTimeout, o.Statements = 2*time.Second, st })
			a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
			for range 3 { // warm: the ways of one round trip are to be tried too
				require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select 1`))
			}
			release := hold(t, env.DB, a.Number)
			for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
				for _, sql := range []string{`select 1`, `select 2`} {
					err := try(t.Context(), env.DB, a, access, sql) // it ends, though the gate stays held
					requireFault(t, err, fault.Suspended, "tenant_locked")
					require.Positive(t, fault.Of(err).Retry, "a 503 says when to come back")
					require.Equal(t, 2, value[int](t, env.DB, b, access, `select 2`), "a neighbour is not disturbed")
				}
			}
			err := env.DB.AsOwnerIn(t.Context(), a, func(*postgres.OwnerTx) error { panic("reached") })
			require.Truef(t, fault.Is(err, fault.Locked), "%v", err)
			release()
			for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
				require.Equal(t, 1, value[int](t, env.DB, a, access, `select 1`))
			}
		})
	}
}

func TestGateHeldForAMomentIsWaitedFor(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.AcquireTimeout = pgtest.Patience })
	a := env.Tenant(t, "acme")
	require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select 1`))
	for _, access := range []postgres.Access{postgres.Single, postgres.Write} {
		release := hold(t, env.DB, a.Number)
		timer := time.AfterFunc(100*time.Millisecond, release)
		require.Equal(t, 1, value[int](t, env.DB, a, access, `select 1`))
		timer.Stop()
		release()
	}
}

// The other direction: what changes a placement waits for the transactions in flight, and no longer than lock_timeout.
func TestGateWaitsForTransactionsInFlight(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.LockTimeout = 200 * time.Millisecond })
	a := env.Tenant(t, "acme")
	for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write, postgres.Single} {
		err := env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) error {
			rows, err := tx.Query(t.Context(), `select repeat('x', 1000) from generate_series(1, 20000)`) // not read to the end
			if err != nil {
				return err
			}
			defer rows.Close()
			rows.Next()
			err = env.DB.AsOwner(t.Context(), "main", func(o *postgres.OwnerTx) error { return o.LockGate(t.Context(), a.Number) })
			requireFault(t, err, fault.Locked, "gate_busy")
			return nil
		})
		require.NoError(t, err)
		require.NoError(t, env.DB.AsOwner(t.Context(), "main", func(o *postgres.OwnerTx) error { return o.LockGate(t.Context(), a.Number) }))
	}
}

func TestSuspendedAndDroppedAreRefusedAtOnce(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme") // stays "active" in the caller's hands: F40
	ctx := t.Context()
	all := func(kind fault.Kind, code string) {
		t.Helper()
		for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write, postgres.Single, postgres.Single} {
			requireFault(t, try(ctx, env.DB, a, access, `select 1`), kind, code)
		}
	}
	_, err := env.Provision.Suspend(ctx, a.Slug, "test")
	require.NoError(t, err)
	all(fault.Suspended, "tenant_suspended")
	_, err = env.Provision.Resume(ctx, a.Slug, "test")
	require.NoError(t, err)
	require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select 1`))
	_, err = env.Provision.Drop(ctx, a.Slug, 0, "test")
	require.NoError(t, err)
	all(fault.Gone, "tenant_gone")
	_, err = env.Provision.Purge(ctx, a.Slug, "test")
	require.NoError(t, err)
	all(fault.Gone, "tenant_gone")
	// A new tenant of the old name is not reached by whoever holds the old one.
	env.Tenant(t, "acme")
	all(fault.Gone, "tenant_gone")
	env.Invariants(t)
}

// F39, I7: with writers at work, 20 drops, undrops and renames of the schema lose no acknowledged write.
func TestNoAcknowledgedWriteIsLost(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight = 8, 4 })
	a := env.Tenant(t, "acme")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var acknowledged sync.Map
	var count atomic.Int64
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				key := pipelineKey(w, i)
				err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
					sql, args := insertPipeline(key)
					if _, err := tx.Exec(t.Context(), sql, args...); err != nil {
						return err
					}
					if i%3 == 0 { // in flight for a while
						_, err := tx.Exec(t.Context(), `select pg_sleep(0.004)`)
						return err
					}
					return nil
				})
				switch {
				case err == nil:
					acknowledged.Store(key, true)
					count.Add(1)
				case !fault.Is(err, fault.Gone) && !fault.Is(err, fault.Suspended) && !fault.Is(err, fault.Busy):
					t.Errorf("a writer got %v", err)
					return
				}
			}
		})
	}
	schema := func(i int) tenant.Schema {
		s, err := tenant.ParseSchema(fmt.Sprintf("acme_%d", i))
		require.NoError(t, err)
		return s
	}
	for i := range 20 {
		before := count.Load()
		until(t, "writers are at work", func() bool { return count.Load() > before+3 || t.Failed() })
		if i%2 == 0 {
			_, err := env.Provision.Rename(t.Context(), a.Slug, provision.RenameRequest{Schema: schema(i), Actor: "test"})
			require.NoError(t, err)
			continue
		}
		_, err := env.Provision.Drop(t.Context(), a.Slug, 0, "test")
		require.NoError(t, err)
		_, err = env.Provision.Undrop(t.Context(), a.Slug, "test")
		require.NoError(t, err)
	}
	stop()
	wg.Wait()
	there := map[string]bool{}
	require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(tx *postgres.Tx) error {
		rows, err := tx.Query(t.Context(), `select key from pipelines`)
		if err != nil {
			return err
		}
		keys, err := pgx.CollectRows(rows, pgx.RowTo[string])
		for _, k := range keys {
			there[k] = true
		}
		return err
	}))
	lost := 0
	acknowledged.Range(func(k, _ any) bool {
		if !there[k.(string)] {
			lost++
		}
		return true
	})
	require.Zerof(t, lost, "lost %d of %d acknowledged writes", lost, count.Load())
	require.Greater(t, count.Load(), int64(60))
	env.Invariants(t)
}

// F26: the busy tenant gets Busy, its neighbour works.
func TestOneTenantCannotTakeThePool(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight, o.AcquireTimeout = 6, 2, 2*time.Second })
	busy, quiet := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	other := env.Tenant(t, "initech") // shares the sub-pool of the busy one
	end := make(chan struct{})
	var wg sync.WaitGroup
	var in atomic.Int32
	for range 2 {
		wg.Go(func() {
			err := env.DB.InTenant(t.Context(), busy, postgres.Read, func(tx *postgres.Tx) error { in.Add(1); <-end; return nil })
			if err != nil {
				t.Errorf("holder: %v", err)
			}
		})
	}
	until(t, "two transactions are in flight", func() bool { return in.Load() == 2 })
	var refusals atomic.Int32
	var waiting sync.WaitGroup
	for range 50 {
		waiting.Go(func() {
			err := try(t.Context(), env.DB, busy, postgres.Read, `select 1`)
			if fault.Is(err, fault.Busy) && fault.Of(err).Tenant == "acme" && fault.Of(err).Retry > 0 {
				refusals.Add(1)
			}
		})
	}
	for range 20 {
		require.Equal(t, 1, value[int](t, env.DB, quiet, postgres.Single, `select 1`))
		require.Equal(t, 1, value[int](t, env.DB, other, postgres.Single, `select 1`), "also in the same sub-pool")
	}
	waiting.Wait()
	require.EqualValues(t, 50, refusals.Load(), "every caller of the busy tenant must get Busy")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, env.DB.InTenant(ctx, busy, postgres.Read, func(*postgres.Tx) error { return nil }), context.DeadlineExceeded)
	close(end)
	wg.Wait()
	require.Equal(t, 1, value[int](t, env.DB, busy, postgres.Single, `select 1`))
}

// A pool that is taken, by many tenants, refuses after a bounded wait.
func TestPoolExhausted(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.AcquireTimeout = 2 * time.Second })
	a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech")
	err := env.DB.InTenant(t.Context(), a, postgres.Read, func(*postgres.Tx) error {
		err := try(t.Context(), env.DB, c, postgres.Single, `select 1`)
		requireFault(t, err, fault.Unavailable, "pool_exhausted")
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, try(t.Context(), env.DB, c, postgres.Single, `select 1`))
}

func TestOperationLock(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	ctx := t.Context()
	err := env.DB.AsOwner(ctx, "main", func(first *postgres.OwnerTx) error {
		got, err := first.TryOperationLock(ctx, a.Number)
		require.True(t, got)
		require.NoError(t, err)
		inner := env.DB.AsOwner(ctx, "main", func(second *postgres.OwnerTx) error {
			got, err := second.TryOperationLock(ctx, a.Number)
			require.False(t, got, "two operations on one tenant")
			require.NoError(t, err)
			got, err = second.TryOperationLock(ctx, a.Number+1)
			require.True(t, got, "another tenant's lock is its own")
			require.NoError(t, err)
			return second.LockOperation(ctx, a.Number, 100*time.Millisecond)
		})
		requireFault(t, inner, fault.Locked, "operation_running")
		cctx, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
		defer cancel()
		inner = env.DB.AsOwner(ctx, "main", func(second *postgres.OwnerTx) error { return second.LockOperation(cctx, a.Number, time.Minute) })
		require.ErrorIs(t, inner, context.DeadlineExceeded)
		require.NoError(t, try(ctx, env.DB, a, postgres.Write, `select 1`), "the operation lock does not stop requests")
		return errors.New("roll back")
	})
	require.EqualError(t, err, "roll back")
	require.NoError(t, env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error { return tx.LockOperation(ctx, a.Number, 0) }))
}
