package migrate_test

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func adminExec(t *testing.T, c *pgx.Conn, sql string) {
	t.Helper()
	_, err := c.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
}

// waiting counts who waits for a lock in the test's database.
const waiting = `select count(*)::text from pg_locks where not granted and database = (select oid from pg_database where datname = current_database())`

// F14: a long reader stands in the way. Each attempt waits for the lock timeout and no longer, so that other readers do
// not either; then the tenant is busy, and as it was.
func TestLongReader(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.put("0002_b.up.sql", "create table b (id int); alter table a add column x int;")
	reader := pgtest.Admin(t, s.env.AdminURL)
	adminExec(t, reader, "begin; select from acme.a")
	const lockTimeout = 200 * time.Millisecond
	// The other readers give up long before the long one ends, and not before a busy machine has let them through.
	readers, _, _ := s.env.Open(t, func(o *postgres.Options) { o.LockTimeout = 30 * time.Second })
	stop, slowest := make(chan struct{}), make(chan time.Duration, 1)
	go func() {
		var worst time.Duration
		for {
			select {
			case <-stop:
				slowest <- worst
				return
			default:
			}
			start := time.Now()
			err := readers.InTenant(context.Background(), s.a, postgres.Read, func(tx *postgres.Tx) error {
				var n int
				return tx.QueryRow(context.Background(), `select count(*) from a`).Scan(&n)
			})
			if err != nil {
				t.Errorf("a reader: %v", err)
			}
			worst = max(worst, time.Since(start))
		}
	}()
	res, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{LockTimeout: lockTimeout})
	close(stop)
	worst := <-slowest
	requireFault(t, err, fault.Locked, "lock_timeout")
	require.Contains(t, err.Error(), "0002_b in statement 2, line 1")
	require.Equal(t, []int{1, 1}, []int{res.From, res.To})
	require.Equal(t, "null", s.scalar(t, "select to_regclass('b')"))
	require.GreaterOrEqual(t, res.Duration, 3*lockTimeout, "it tries again")
	require.Greater(t, worst, lockTimeout/2, "the readers do meet the waiting migration")

	// The reader ends while the migration still tries.
	done := make(chan error, 1)
	m := s.migrator(t)
	go func() {
		for {
			_, err := m.Tenant(t.Context(), s.a, migrate.TenantOptions{LockTimeout: lockTimeout})
			if !fault.Is(err, fault.Locked) {
				done <- err
				return
			}
		}
	}()
	require.Eventually(t, func() bool { return s.scalar(t, waiting) == "1" }, pgtest.Patience, 5*time.Millisecond)
	require.Eventually(t, func() bool { return s.scalar(t, waiting) == "0" }, pgtest.Patience, 5*time.Millisecond)
	adminExec(t, reader, "rollback")
	require.NoError(t, <-done)
	require.Equal(t, "2 1,2", s.version(t))
}

// A deadlock that PostgreSQL breaks at the migration's cost is tried again.
func TestDeadlockIsTriedAgain(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.exec(t, "create table b (id int)")
	s.put("0002_b.up.sql", "alter table a add column x int;\nalter table b add column x int;")
	other := pgtest.Admin(t, s.env.AdminURL)
	adminExec(t, other, "set deadlock_timeout to '10min'; begin; lock table acme.b in access share mode")
	done := make(chan error, 1)
	go func() {
		_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{LockTimeout: pgtest.Patience})
		done <- err
	}()
	require.Eventually(t, func() bool {
		return s.scalar(t, waiting) == "1"
	}, pgtest.Patience, 5*time.Millisecond)
	adminExec(t, other, "lock table acme.a in access exclusive mode; commit")
	require.NoError(t, <-done)
	require.Equal(t, "2 1,2", s.version(t))
}

// A backup holds the operation lock and reads. A migration waits for it outside of PostgreSQL: no reader queues behind it.
func TestNeverQueuedBehindABackup(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.exec(t, "insert into a values (1)")
	s.put("0002_b.up.sql", "alter table a add column x int;")
	s.put("0003_c.up.sql", "-- oneo: no-transaction\ncreate index concurrently i on a (n);")
	begun, ended, end := make(chan struct{}), make(chan error, 1), make(chan struct{})
	var once sync.Once
	finish := func() { once.Do(func() { close(end) }) }
	t.Cleanup(finish)
	go func() {
		ended <- s.env.DB.AsOwnerIn(t.Context(), s.a, func(tx *postgres.OwnerTx) error {
			if err := tx.LockOperation(t.Context(), s.a.Number, time.Second); err != nil {
				return err
			}
			if err := tx.Script(t.Context(), "select from a"); err != nil {
				return err
			}
			close(begun)
			<-end
			return nil
		})
	}()
	<-begun
	short := s.migrator(t, func(o *migrate.Options) { o.LockWait = 300 * time.Millisecond })
	finished := make(chan []error, 1)
	go func() {
		_, up := short.Tenant(t.Context(), s.a, migrate.TenantOptions{})
		_, down := short.Down(t.Context(), s.a, 0, migrate.TenantOptions{})
		_, mark := short.Mark(t.Context(), s.a, 2, "ops")
		finished <- []error{up, down, mark}
	}()
	admin := pgtest.Admin(t, s.env.AdminURL)
	for looking := true; looking; {
		var queue string
		require.NoError(t, admin.QueryRow(t.Context(), waiting).Scan(&queue))
		require.Equal(t, "0", queue, "nothing may wait inside PostgreSQL")
		select {
		case errs := <-finished:
			looking = false
			for _, err := range errs {
				requireFault(t, err, fault.Locked, "operation_running")
			}
		default:
		}
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{Target: 2})
		done <- err
	}()
	finish()
	require.NoError(t, <-ended)
	require.NoError(t, <-done)
	// The same for a file without a transaction, whose lock is the session's.
	require.NoError(t, s.env.DB.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) error {
		require.NoError(t, tx.LockOperation(t.Context(), s.a.Number, time.Second))
		_, err := short.Tenant(t.Context(), s.a, migrate.TenantOptions{})
		requireFault(t, err, fault.Locked, "operation_running")
		return nil
	}))
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "3 1,2,3", s.version(t))
	s.env.Invariants(t)
}

// Behaviour F 108: two tenants do not wait for each other.
func TestTenantsDoNotBlockEachOther(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	b := create(t, provisioner(t, s.env.DB, s.migrator(t)), "globex")
	// acme's migration stands still behind a reader while globex's goes through.
	reader := pgtest.Admin(t, s.env.AdminURL)
	adminExec(t, reader, "begin; select from acme.a")
	s.put("0002_b.up.sql", "create table b (id int); alter table a add column x int;")
	done := make(chan error, 1)
	go func() {
		_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{LockTimeout: pgtest.Patience})
		done <- err
	}()
	require.Eventually(t, func() bool {
		return s.scalar(t, waiting) == "1"
	}, pgtest.Patience, 5*time.Millisecond)
	_, err := s.migrator(t).Tenant(t.Context(), b, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "1 1", s.version(t))
	adminExec(t, reader, "rollback")
	require.NoError(t, <-done)
	require.Equal(t, "2 1,2", s.version(t))
}

// A statement that takes longer than it may fails by its own name; one that was cancelled says that it was.
func TestStatementTimeoutAndCancel(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.put("0002_b.up.sql", "create table b (id int);\nselect pg_sleep(600);")
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{StatementTimeout: 2 * time.Second})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Contains(t, fault.Of(err).Message, "statement 2, line 2 (SQLSTATE 57014)")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.False(t, fault.Is(err, fault.Unfit))
	require.Equal(t, "1 1", s.version(t))
	s.env.Invariants(t)
}

// Each migrated version is told to whoever listens, and a breaking one raises the reader.
func TestToldAndBreaking(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	listener := pgtest.Admin(t, s.env.AdminURL)
	adminExec(t, listener, "listen oneo_versions")
	s.put("0002_b.up.sql", "-- oneo: breaking\nselect 1")
	s.put("0003_c.up.sql", "select 1")
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), pgtest.Patience)
	defer cancel()
	n, err := listener.WaitForNotification(ctx)
	require.NoError(t, err)
	require.Equal(t, s.scalar(t, "select number || ' 3' from public.placements"), n.Payload)
	require.Equal(t, "2", s.scalar(t, "select reader from public.placements"))
	require.Equal(t, []int{0, 0, 2, 2}, slices.Collect(func(yield func(int) bool) {
		for v := range 4 {
			if !yield(s.migrator(t).Reader(v)) {
				return
			}
		}
	}))
}

// Spares of the warm pool are no tenants: nobody counts them, and they are not behind.
func TestSparesAreLeftOut(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.put("0002_b.data.sql", "-- oneo: beside\nupdate a set nonsense = 1")
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	adminExec(t, pgtest.Admin(t, s.env.AdminURL), "update public.placements set state = 'spare'")
	s.put("0003_c.up.sql", "select 1")
	m := s.migrator(t)
	behind, err := m.TenantsBehind(t.Context(), "main")
	require.NoError(t, err)
	require.Empty(t, behind)
	st, err := m.Status(t.Context())
	require.NoError(t, err)
	require.Empty(t, st.Versions)
	require.Empty(t, st.Unfinished)
}
