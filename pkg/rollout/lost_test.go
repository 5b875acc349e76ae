package rollout_test

import (
	"bytes"
	"context"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// cutter leads to PostgreSQL and loses the answers to commits: what was committed is, and the client does not hear of it.
type cutter struct {
	left atomic.Int32 // so many answers are still to be lost
	lost atomic.Int32
}

func (c *cutter) url(t *testing.T, to string) string {
	t.Helper()
	u, err := url.Parse(to)
	require.NoError(t, err)
	server := u.Host
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { c.carry(client, server) })
		}
	})
	t.Cleanup(func() { _ = l.Close(); running.Wait() })
	u.Host = l.Addr().String()
	return u.String()
}

func (c *cutter) carry(client net.Conn, server string) {
	defer client.Close()
	up, err := net.Dial("tcp", server)
	if err != nil {
		return
	}
	defer up.Close()
	var lose atomic.Bool
	go func() {
		defer client.Close()
		b := make([]byte, 64<<10)
		for {
			n, err := up.Read(b)
			if err == nil && lose.Load() { // the first bytes of the answer say that it has been done
				c.lost.Add(1)
				return
			}
			if err != nil {
				return
			}
			if _, err := client.Write(b[:n]); err != nil {
				return
			}
		}
	}()
	b := make([]byte, 64<<10)
	for {
		n, err := client.Read(b)
		if err != nil {
			return
		}
		if bytes.Contains(b[:n], []byte("Q\x00\x00\x00\x0bcommit\x00")) && c.left.Add(-1) >= 0 {
			lose.Store(true)
		}
		if _, err := up.Write(b[:n]); err != nil {
			return
		}
	}
}

// A process whose commit was made without its hearing of it must not sit on the tasks that it has claimed by it.
func TestTasksOfALostAnswerAreNotLost(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	run := plan(t, newRunner(t, env), spec(t, 300))
	var c cutter
	owner := c.url(t, env.Group.OwnerURL)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{postgres.MainGroup: {URL: env.Group.URL, OwnerURL: owner}}
	})
	r := newRunnerOn(t, db, pgtest.Patience)
	var done counter
	var ended atomic.Int32
	c.left.Store(1)
	ctx, cancel := context.WithTimeout(t.Context(), pgtest.Patience)
	defer cancel()
	end, err := r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 2}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		done.add(task.Slug)
		if n := ended.Add(1); n == 100 || n == 200 {
			c.left.Store(1)
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Positive(t, c.lost.Load())
	require.Equal(t, registry.Done, end.State, "%+v", end.Counts)
	done.each(t, 300, 1)
}

// What was done is written also by a process that is to stop while another one keeps the run's row for longer than a
// lock is waited for.
func TestWhatWasDoneIsWrittenBehindALock(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	run := plan(t, newRunner(t, env), spec(t, 2))
	db, _, _ := env.Open(t, func(o *postgres.Options) { o.LockTimeout = 50 * time.Millisecond })
	r := newRunnerOn(t, db, pgtest.Patience)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var watching sync.WaitGroup
	holder, watcher := pgtest.Admin(t, env.AdminURL), pgtest.Admin(t, env.AdminURL)
	end, err := r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 2}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Ordinal == 1 {
			<-ctx.Done()
			return rollout.Outcome{}
		}
		if _, err := holder.Exec(t.Context(), "begin"); err != nil {
			return rollout.Outcome{Err: err}
		}
		if _, err := holder.Exec(t.Context(), "select from public.operations where id = $1 for update", run.ID); err != nil {
			return rollout.Outcome{Err: err}
		}
		cancel()
		watching.Go(func() { // once one has waited in vain
			const waiting = `select count(*) from pg_locks where not granted`
			seen := false
			for {
				var n int
				if watcher.QueryRow(context.Background(), waiting).Scan(&n) != nil || seen && n == 0 {
					break
				}
				seen = seen || n > 0
			}
			_, _ = holder.Exec(context.Background(), "rollback")
		})
		return rollout.Outcome{}
	})
	watching.Wait()
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, 2, end.OK, "%+v", end.Counts)
}

// A tenant whose patience had ended is tried as patiently as any other once it is retried, by the same process too.
func TestARetriedTenantHasAllPatience(t *testing.T) {
	t.Parallel()
	r := newRunner(t, pgtest.New(t))
	run := plan(t, r, spec(t, 2))
	busy := fault.New(fault.Locked, "busy")
	given, retried := make(chan struct{}), make(chan struct{})
	var again atomic.Int32
	var ended sync.WaitGroup
	ended.Go(func() {
		<-given
		for {
			run, err := r.Retry(t.Context(), run.ID, "test")
			if err != nil || run.Failed == 0 && run.Left() == 2 {
				break
			}
		}
		close(retried)
	})
	failed := false
	end, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{
		Jobs: 2, Patience: 4 * time.Second,
		Told: func(e rollout.Event) {
			if e.Task != nil && e.Task.Ordinal == 0 && e.Outcome.Status == fleet.Failed && e.Again == 0 && !failed {
				failed = true
				close(given)
			}
		},
	}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Ordinal == 1 {
			<-retried
			return rollout.Outcome{}
		}
		select {
		case <-retried:
			if again.Add(1) > 1 {
				return rollout.Outcome{}
			}
		default:
		}
		return rollout.Outcome{Err: busy}
	})
	ended.Wait()
	require.NoError(t, err)
	require.Equal(t, registry.Done, end.State, "%+v", end.Counts)
}
