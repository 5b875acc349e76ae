package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/snapshot"
)

// passing reports whether a request is answered 503, as it may be while the tenant is taken back.
func passing(err error) bool {
	return fault.Is(err, fault.Unavailable) || fault.Is(err, fault.Suspended) || fault.Is(err, fault.Locked)
}

// While the tenant is migrated and taken back again and again, what its users were told is written stays written in the
// tables that the runs do not change, no request sees half of it, and none fails otherwise than by a 503.
func TestUsersAtWorkWhileATenantIsTakenBack(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `alter table books drop column pages cascade; alter table log add column note text`)
	s := f.snapshots(m)
	var written, answered, refused atomic.Int64
	stop := make(chan struct{})
	var users sync.WaitGroup
	request := func(access postgres.Access, fn func(ctx context.Context, tx *postgres.Tx) error) bool {
		ctx, cancel := context.WithTimeout(context.Background(), pgtest.Patience)
		defer cancel()
		err := f.DB.InTenant(ctx, f.t1, access, func(tx *postgres.Tx) error { return fn(ctx, tx) })
		switch {
		case err == nil:
			answered.Add(1)
		case passing(err):
			refused.Add(1)
		default:
			t.Errorf("a request failed: %v", err)
		}
		return err == nil
	}
	for u := range 3 {
		users.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				if request(postgres.Write, func(ctx context.Context, tx *postgres.Tx) error {
					_, err := tx.Exec(ctx, `insert into authors (name) values ($1)`, fmt.Sprintf("user %d writes %d", u, i))
					return err
				}) {
					written.Add(1)
				}
			}
		})
	}
	users.Go(func() {
		least := int64(3)
		for {
			select {
			case <-stop:
				return
			default:
			}
			request(postgres.Read, func(ctx context.Context, tx *postgres.Tx) error {
				var first, second int64
				if err := tx.QueryRow(ctx, `select count(*) from authors`).Scan(&first); err != nil {
					return err
				}
				if err := tx.QueryRow(ctx, `select count(*) from authors, (select count(*) from books) b`).Scan(&second); err != nil {
					return err
				}
				if first < least || second < first {
					return fmt.Errorf("rows are gone: %d, then %d, then %d", least, first, second)
				}
				least = second
				return nil
			})
		}
	})
	patiently := func(what string, fn func() error) {
		t.Helper()
		require.Eventually(t, func() bool {
			err := fn()
			if err != nil && !fault.Is(err, fault.Locked) {
				t.Errorf("%s: %v", what, err)
				return true
			}
			return err == nil
		}, pgtest.Patience, 5*time.Millisecond, what)
	}
	for range 8 {
		run := uuid.New()
		patiently("migrate", func() error {
			_, err := m.Tenant(t.Context(), f.t1, migrate.TenantOptions{Keeper: s.Keeper(run, f.t1)})
			return err
		})
		patiently("undo", func() error {
			_, err := s.Undo(t.Context(), f.t1, run)
			return err
		})
	}
	require.Eventually(t, func() bool { return written.Load() > 50 }, pgtest.Patience, time.Millisecond)
	close(stop)
	users.Wait()
	require.Equal(t, fmt.Sprint(3+written.Load()), f.ask(f.t1, `select count(*) from authors`), "each that was acknowledged, and no other")
	t.Logf("%d answered, %d written, %d refused with 503", answered.Load(), written.Load(), refused.Load())
	require.Equal(t, f.ref, f.print(f.t1))
	require.Equal(t, "(4,1446)", f.ask(f.t1, "select row(count(*), sum(pages)) from books"))
	f.Invariants(t)
}

// Of several at once one takes the tenant back, and the others find nothing to do.
func TestSeveralTakeATenantBackAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `delete from books`)
	s, err := snapshot.New(snapshot.Options{DB: f.DB, Migrate: m, Keep: time.Hour, LockWait: pgtest.Patience, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	run := f.migrated(m, s, f.t1)
	var done atomic.Int64
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			res, err := s.Undo(context.Background(), f.t1, run)
			if err != nil {
				t.Errorf("undo: %v", err)
			}
			done.Add(int64(res.From - res.To))
		})
	}
	all.Wait()
	require.EqualValues(t, 1, done.Load())
	require.Equal(t, "4", f.ask(f.t1, "select count(*) from books"))
	f.Invariants(t)
}

// Who writes past the gate, by the tables' own names, is waited for and then writes into the right tables.
func TestWritersPastTheGate(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `alter table books drop column pages cascade`)
	s := f.snapshots(m)
	run := f.migrated(m, s, f.t1)
	writer := pgtest.Admin(t, f.AdminURL)
	_, err := writer.PgConn().Exec(t.Context(), `begin; insert into acme.authors (name) values ('before')`).ReadAll()
	require.NoError(t, err)
	_, err = s.Undo(t.Context(), f.t1, run)
	require.Truef(t, fault.Is(err, fault.Locked), "it waits for who is at work: %v", err)
	_, err = writer.Exec(t.Context(), `commit`)
	require.NoError(t, err)
	_, err = s.Undo(t.Context(), f.t1, run)
	require.NoError(t, err)
	_, err = writer.Exec(t.Context(), `insert into acme.authors (name) values ('behind')`)
	require.NoError(t, err)
	require.Equal(t, "5", f.ask(f.t1, "select count(*) from authors"))
	f.Invariants(t)
}

// A writer that comes between the copy and the change would be lost: it must wait.
func TestNobodyWritesBetweenTheCopyAndTheChange(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	m := f.with(first, `update authors set name = name || '!'; select pg_sleep(0.3)`)
	s := f.snapshots(m)
	stop := make(chan struct{})
	var users sync.WaitGroup
	var written atomic.Int64
	for u := range 2 {
		writer := pgtest.Admin(t, f.AdminURL)
		users.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				_, err := writer.Exec(context.Background(), `insert into acme.authors (name) values ($1)`, fmt.Sprintf("%d writes %d", u, i))
				if err != nil {
					t.Errorf("write: %v", err)
					return
				}
				written.Add(1)
			}
		})
	}
	require.Eventually(t, func() bool { return written.Load() > 20 }, pgtest.Patience, time.Millisecond)
	run := uuid.New()
	require.Eventually(t, func() bool {
		_, err := m.Tenant(t.Context(), f.t1, migrate.TenantOptions{Keeper: s.Keeper(run, f.t1)})
		if err != nil && !fault.Is(err, fault.Locked) {
			t.Errorf("migrate: %v", err)
		}
		return err == nil
	}, pgtest.Patience, time.Millisecond)
	close(stop)
	users.Wait()
	// Each name without the mark was written behind the run; each with it was there before, and is in the copy.
	before := f.ask(f.t1, `select count(*) from authors where name like '%!'`)
	require.Equal(t, before, f.scalar(`select count(*) from `+f.scalar(`select schema from public.undo_points`)+`.authors`))
	f.Invariants(t)
}

// A group besides main: points, copies and placements are in its own database.
func TestAnotherGroup(t *testing.T) {
	t.Parallel()
	f := &fixture{Env: pgtest.New(t), t: t}
	second := f.SecondGroup(t)
	db, _, _ := f.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{postgres.MainGroup: f.Group, "second": second}
	})
	f.DB = db
	old := f.with(first)
	_, err := old.Shared(t.Context())
	require.NoError(t, err)
	made, err := f.provisioner(old).Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: "second", Actor: "test"})
	require.NoError(t, err)
	f.in(made, rows)
	m := f.with(first, `drop table books cascade`)
	s := f.snapshots(m)
	run := f.migrated(m, s, made)
	require.Equal(t, []string{"books"}, f.kept(run, made, s))
	_, err = s.Undo(t.Context(), made, run)
	require.NoError(t, err)
	require.Equal(t, "4", f.ask(made, "select count(*) from books"))
	points, err := s.Points(t.Context(), "second", run)
	require.NoError(t, err)
	require.True(t, points[made.Number].Undone)
	n, err := s.Expire(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
	err = db.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		var found int
		err := tx.QueryRow(t.Context(), `select 1 from public.undo_points`).Scan(&found)
		if !errors.Is(err, pgx.ErrNoRows) {
			t.Errorf("the main group has a point: %v", err)
		}
		return nil
	})
	require.NoError(t, err)
}
