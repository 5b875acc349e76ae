package rollout_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// eventually waits for what another process does.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	require.Eventually(t, is, pgtest.Patience, 10*time.Millisecond, what)
}

// blocked makes n sessions of a login wait for a lock on a table until free is called.
func blocked(t *testing.T, env *pgtest.Env, login string, n int) (free func()) {
	t.Helper()
	ctx := t.Context()
	holder, admin := pgtest.Admin(t, env.AdminURL), pgtest.Admin(t, env.AdminURL)
	for _, sql := range []string{`create table if not exists public.contended (); grant all on public.contended to public`, `begin; lock table public.contended`} {
		_, err := holder.PgConn().Exec(ctx, sql).ReadAll()
		require.NoError(t, err)
	}
	var waiting sync.WaitGroup
	for range n {
		c := pgtest.Admin(t, login)
		waiting.Go(func() {
			if _, err := c.Exec(ctx, `select from public.contended`); err != nil {
				t.Errorf("wait for a lock: %v", err)
			}
		})
	}
	eventually(t, "the sessions wait", func() bool {
		var now int
		const count = `select count(*) from pg_locks where not granted and relation = 'public.contended'::regclass
	and database = (select oid from pg_database where datname = current_database())`
		return admin.QueryRow(ctx, count).Scan(&now) == nil && now == n
	})
	return func() {
		_, err := holder.Exec(ctx, `rollback`)
		require.NoError(t, err)
		waiting.Wait()
	}
}

func TestBrakeCountsLockWaits(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	look := func(most int) string { return r.Strained(ctx, "main", rollout.Bounds{LockWaits: most}) }
	require.Empty(t, look(1))
	free := blocked(t, env, env.Group.URL, 3)
	require.Empty(t, look(3), "as many as the bound are none too many")
	require.Equal(t, "3 sessions wait for locks in group main", look(2))
	free()
	require.Empty(t, look(1))

	// The owner's own sessions wait because of the run itself; another database's are not its concern.
	free = blocked(t, env, env.Group.OwnerURL, 2)
	require.Empty(t, look(1))
	free()
	other := pgtest.New(t)
	free = blocked(t, other, other.Group.URL, 2)
	require.Empty(t, look(1))
	free()
}

func TestBrakeCountsConnections(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	var most int
	admin := pgtest.Admin(t, env.AdminURL)
	require.NoError(t, admin.QueryRow(ctx, `select current_setting('max_connections')::int`).Scan(&most))
	open := 8*most/100 + 1
	for range open {
		pgtest.Admin(t, env.AdminURL)
	}
	// Other tests have connections too: at least these are there.
	require.Contains(t, r.Strained(ctx, "main", rollout.Bounds{Connections: open*100/most - 1}), "% of the connections of group main are in use")
	require.Empty(t, r.Strained(ctx, "main", rollout.Bounds{Connections: 100}), "there cannot be more than all")
}

// A run holds back while sessions wait, and goes on by itself when they do not.
func TestRunHoldsBackWhileSessionsWait(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	free := blocked(t, env, env.Group.URL, 2)
	brake := r.Brake(t.Context(), []string{"main"}, rollout.Bounds{LockWaits: 1})
	eventually(t, "the brake holds", func() bool { return brake.Hold() != "" })
	run := plan(t, r, spec(t, 10))
	var begun atomic.Int32
	held, ended := make(chan string, 1), make(chan rollout.Run, 1)
	go func() {
		end, err := r.Work(context.WithoutCancel(t.Context()), run.ID, rollout.WorkOptions{Jobs: 2, Hold: brake.Hold, Told: func(e rollout.Event) {
			if e.Held != "" {
				held <- e.Held
			}
		}}, func(context.Context, rollout.Task) rollout.Outcome {
			begun.Add(1)
			return rollout.Outcome{}
		})
		if err != nil {
			t.Errorf("work: %v", err)
		}
		ended <- end
	}()
	require.Equal(t, "2 sessions wait for locks in group main", <-held)
	require.Zero(t, begun.Load())
	free()
	end := <-ended
	require.Equal(t, registry.Done, end.State)
	require.Equal(t, int32(10), begun.Load())
}

// logged is a logger's text, which many may write.
type logged struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logged) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), s)
}

// brakeWith begins to look at a database, with a log of its own.
func brakeWith(t *testing.T, db *postgres.DB, bounds rollout.Bounds) (*rollout.Brake, *logged) {
	t.Helper()
	l := &logged{}
	r, err := rollout.New(rollout.Options{DB: db, Logger: slog.New(slog.NewTextHandler(l, nil))})
	require.NoError(t, err)
	return r.Brake(t.Context(), []string{"main"}, bounds), l
}

// What the brake may not ask it says once, and its other bounds hold all the same.
func TestBrakeSaysWhatItCannotSee(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(ctx, `revoke select on pg_catalog.pg_stat_replication from public`)
	require.NoError(t, err)
	free := blocked(t, env, env.Group.URL, 2)
	brake, log := brakeWith(t, env.DB, rollout.Bounds{LockWaits: 5, ReplicaLag: time.Second, Connections: 100})
	eventually(t, "it says so", func() bool { return log.count("permission denied for view pg_stat_replication") > 0 })
	require.Equal(t, 1, log.count("bound=migrate.max_replica_lag group=main"))
	require.Empty(t, brake.Hold(), "what cannot be seen holds nothing back")

	_, err = admin.Exec(ctx, `revoke select on pg_catalog.pg_stat_activity from public`)
	require.NoError(t, err)
	eventually(t, "it says that too, in a later look", func() bool { return log.count("bound=migrate.max_lock_waits") > 0 })
	_, err = admin.Exec(ctx, `grant select on pg_catalog.pg_stat_activity to public`)
	require.NoError(t, err)
	require.Equal(t, 1, log.count("permission denied for view pg_stat_replication"), "once, and not with each look")

	second, _ := brakeWith(t, env.DB, rollout.Bounds{LockWaits: 1, ReplicaLag: time.Second})
	eventually(t, "another bound holds", func() bool { return second.Hold() != "" })
	free()
}

// standby connects as one does.
func standby(t *testing.T, env *pgtest.Env) *pgconn.PgConn {
	t.Helper()
	u, err := url.Parse(env.AdminURL)
	require.NoError(t, err)
	q := u.Query()
	q.Set("replication", "database")
	u.RawQuery = q.Encode()
	c, err := pgconn.Connect(t.Context(), u.String())
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = c.Close(ctx)
	})
	return c
}

// A standby that the owner may not look at is told; one that may be seen and is behind holds.
func TestBrakeLooksAtStandbys(t *testing.T) {
	env := pgtest.New(t)
	env.Blind(t)
	ctx := t.Context()
	bounds := rollout.Bounds{ReplicaLag: 20 * time.Millisecond}
	hidden, err := rollout.New(rollout.Options{DB: env.DB, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	require.Empty(t, hidden.Strained(ctx, "main", bounds))
	_, log := brakeWith(t, env.DB, bounds)
	c := standby(t, env)
	eventually(t, "it says so", func() bool { return log.count("does not show how far 1 standby(s) are behind") > 0 })

	owner := env.Group
	owner.OwnerURL = env.AdminURL // who may see everything
	db, _, _ := env.Open(t, func(o *postgres.Options) { o.Groups = map[string]postgres.Group{"main": owner} })
	seeing, err := rollout.New(rollout.Options{DB: db, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	require.Empty(t, seeing.Strained(ctx, "main", bounds))

	admin := pgtest.Admin(t, env.AdminURL)
	follow(t, admin, c)
	require.Contains(t, seeing.Strained(ctx, "main", bounds), "a standby of group main is ")
	require.Empty(t, seeing.Strained(ctx, "main", rollout.Bounds{ReplicaLag: time.Hour}))
	require.Empty(t, hidden.Strained(ctx, "main", bounds))
}

// follow streams as a standby does, and says only a while after it has got it that it has applied what was written.
func follow(t *testing.T, admin *pgx.Conn, c *pgconn.PgConn) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var from string
	require.NoError(t, admin.QueryRow(ctx, `select pg_current_wal_flush_lsn()::text`).Scan(&from))
	f := c.Frontend()
	f.SendQuery(&pgproto3.Query{String: "START_REPLICATION PHYSICAL " + from})
	require.NoError(t, f.Flush())
	said := false
	eventually(t, "its lag is seen", func() bool {
		if !said {
			_, err := admin.Exec(ctx, `create table if not exists public.written (); drop table public.written; select pg_switch_wal()`)
			require.NoError(t, err)
			m, err := c.ReceiveMessage(ctx)
			require.NoError(t, err)
			if refused, is := m.(*pgproto3.ErrorResponse); is {
				require.Fail(t, refused.Message)
			}
			data, is := m.(*pgproto3.CopyData)
			if !is || data.Data[0] != 'w' {
				return false
			}
			end := binary.BigEndian.Uint64(data.Data[1:9]) + uint64(len(data.Data)-25)
			time.Sleep(3 * 20 * time.Millisecond) // it is at least so late
			status := make([]byte, 34)
			status[0] = 'r'
			for i := range 3 {
				binary.BigEndian.PutUint64(status[1+8*i:], end)
			}
			f.Send(&pgproto3.CopyData{Data: status})
			require.NoError(t, f.Flush())
			said = true
		}
		var late bool
		err := admin.QueryRow(ctx, `select coalesce(bool_or(replay_lag > interval '20 ms'), false) from pg_stat_replication`).Scan(&late)
		require.NoError(t, err)
		if !late {
			said = false
		}
		return late
	})
}

// Others are those who are connected as servers are: this process's own sessions, and a person's, are none.
func TestBrakeSeesOthers(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	brake := r.Brake(ctx, []string{"main"}, rollout.Bounds{Others: true})
	eventually(t, "nobody else is there", func() bool { return !brake.Yields() })
	inst, err := env.DB.Installation(ctx, "main")
	require.NoError(t, err)
	login, err := url.Parse(env.Group.URL)
	require.NoError(t, err)
	password, _ := login.User.Password()
	login.User = url.UserPassword(inst.LoginNames()[0], password)
	c, err := pgx.Connect(ctx, login.String())
	require.NoError(t, err)
	eventually(t, "somebody is there", func() bool {
		_, err := c.Exec(ctx, `select 1`)
		return err == nil && brake.Yields()
	})
	require.NoError(t, c.Close(ctx))
	eventually(t, "nobody is there any more", func() bool { return !brake.Yields() })

	require.False(t, r.Brake(ctx, []string{"main"}, rollout.Bounds{}).Yields())
}

// While others use the database a run works at one tenant at a time, says so, and does all of its work.
func TestRunYields(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 20))
	var atWork, most, told atomic.Int32
	end, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{
		Jobs: 4, Share: 50, Yields: func() bool { return true },
		Told: func(e rollout.Event) {
			if e.Yields {
				told.Add(1)
			}
		},
	}, func(context.Context, rollout.Task) rollout.Outcome {
		most.Store(max(most.Load(), atWork.Add(1)))
		time.Sleep(2 * time.Millisecond) // or nobody would meet anybody anyway
		atWork.Add(-1)
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, 20, end.OK)
	require.EqualValues(t, 1, most.Load())
	require.EqualValues(t, 1, told.Load())
}
