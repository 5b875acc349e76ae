package schedule_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/schedule"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// hourly comes at each full hour.
type hourly struct{}

func (hourly) Next(t time.Time) time.Time { return t.Truncate(time.Hour).Add(time.Hour) }

var nightly = schedule.Schedule{Name: "nightly", Spec: "hourly", Times: hourly{}}

// clock is what the schedulers take for the time.
type clock struct {
	mu sync.Mutex
	at time.Time
}

func (c *clock) Now() time.Time { c.mu.Lock(); defer c.mu.Unlock(); return c.at }

func (c *clock) forward(d time.Duration) { c.mu.Lock(); defer c.mu.Unlock(); c.at = c.at.Add(d) }

// fixture is a database with River's tables, and what was asked of the servers in it.
type fixture struct {
	*pgtest.Env
	t *testing.T
	clock
	did    chan schedule.Taken
	alarms chan schedule.Alarm
	hold   chan struct{} // an alarm takes until this is closed
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{Env: pgtest.New(t), t: t, did: make(chan schedule.Taken, 100), alarms: make(chan schedule.Alarm, 100), hold: make(chan struct{})}
	close(f.hold)
	f.at = time.Date(2026, 11, 25, 9, 30, 0, 0, time.UTC)
	require.NoError(t, schedule.Migrate(context.Background(), f.DB))
	return f
}

// server makes one that does its work by do, and runs it until the test ends or it is stopped.
func (f *fixture) server(do func(context.Context, *schedule.Taken) (schedule.Result, error)) (s *schedule.Scheduler, stop func()) {
	f.t.Helper()
	s, err := schedule.New(schedule.Options{
		DB: f.DB, Schedules: []schedule.Schedule{nightly}, Now: f.Now, StaleAfter: time.Second, Logger: slog.New(slog.DiscardHandler),
		Alarm: func(_ context.Context, a schedule.Alarm) {
			f.alarms <- a
			<-f.hold
		},
		Do: func(ctx context.Context, t *schedule.Taken) (schedule.Result, error) {
			f.did <- *t
			return do(ctx, t)
		},
	})
	require.NoError(f.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(f.t, <-ended)
	})
	f.t.Cleanup(stop)
	return s, stop
}

func (f *fixture) standing() schedule.Standing {
	f.t.Helper()
	all, err := schedule.Standings(context.Background(), f.DB)
	require.NoError(f.t, err)
	return all["nightly"]
}

// until waits for a standing.
func (f *fixture) until(what string, is func(schedule.Standing) bool) (st schedule.Standing) {
	f.t.Helper()
	require.Eventually(f.t, func() bool { st = f.standing(); return is(st) }, pgtest.Patience, 20*time.Millisecond, "%s", what)
	return st
}

func next[T any](t *testing.T, c chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(pgtest.Patience):
		t.Fatal("nothing came")
		panic("unreachable")
	}
}

func ended(context.Context, *schedule.Taken) (schedule.Result, error) {
	return schedule.Result{Ended: &schedule.Outcome{OK: 2}}, nil
}

func over(st schedule.Standing) bool { return st.Due != nil && !st.AtWork() }

func TestADueTimeIsTakenOnOnceWhateverTheServers(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	a, _ := f.server(ended)
	b, _ := f.server(ended)
	f.until("one of them looks", func(st schedule.Standing) bool { return st.Name != "" })
	require.Empty(t, f.did, "no due time has passed since somebody looked first")
	f.forward(time.Hour) // 10:30
	var looks sync.WaitGroup
	for _, s := range []*schedule.Scheduler{a, b, a, b} {
		looks.Go(func() {
			if err := s.Look(ctx); err != nil {
				t.Errorf("look: %v", err)
			}
		})
	}
	looks.Wait()
	st := f.until("it is done", over)
	require.Equal(t, time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC), st.Due.UTC())
	require.Equal(t, 2, st.OK)
	require.Zero(t, st.Missed)
	require.NoError(t, a.Look(ctx))
	require.NoError(t, b.Look(ctx))
	require.Equal(t, time.Date(2026, 11, 25, 10, 0, 0, 0, time.UTC), next(t, f.did).Due.UTC())
	state, healthy := nightly.State(st, f.Now())
	require.True(t, healthy)
	require.Equal(t, schedule.StateOK, state)
	f.forward(time.Hour)
	require.NoError(t, b.Look(ctx))
	f.until("the next one is done", func(st schedule.Standing) bool { return over(st) && st.Due.UTC().Hour() == 11 })
	require.Equal(t, 11, next(t, f.did).Due.UTC().Hour())
	require.Empty(t, f.did, "each due time is worked on once")
	require.Empty(t, f.alarms)
}

// A look that waits for another server's sees what that one has done, and begins nothing a second time.
func TestALookWaitsForAnother(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	s, _ := f.server(ended)
	f.until("it looks", func(st schedule.Standing) bool { return st.Name != "" })
	other, err := pgtest.Admin(t, f.AdminURL).Begin(ctx)
	require.NoError(t, err)
	_, err = other.Exec(ctx, `select from public.schedules for update`)
	require.NoError(t, err)
	f.forward(time.Hour)
	looked := make(chan error, 1)
	go func() { looked <- s.Look(ctx) }()
	admin := pgtest.Admin(t, f.AdminURL)
	require.Eventually(t, func() bool {
		var waits bool
		require.NoError(t, admin.QueryRow(ctx, `select exists (select from pg_catalog.pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')`).Scan(&waits))
		return waits
	}, pgtest.Patience, 10*time.Millisecond)
	_, err = other.Exec(ctx, `update public.schedules set seen = '2026-11-25 10:00Z', due = '2026-11-25 10:00Z', ended_at = now()`)
	require.NoError(t, err)
	require.NoError(t, other.Commit(ctx))
	require.NoError(t, <-looked)
	require.False(t, f.standing().AtWork())
	require.Empty(t, f.did)
}

func TestWhatPassedWhileNobodyWasThere(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	_, stop := f.server(ended)
	f.until("somebody looks", func(st schedule.Standing) bool { return st.Name != "" })
	stop()
	f.forward(3*time.Hour + 10*time.Minute) // 12:40: 10, 11 and 12 have passed
	state, healthy := nightly.State(f.standing(), f.Now())
	require.False(t, healthy)
	require.Equal(t, schedule.StateOverdue, state)
	f.server(ended)
	st := f.until("the last one is made up for", over)
	require.Equal(t, 12, st.Due.UTC().Hour())
	require.Equal(t, int64(2), st.Missed)
	require.Equal(t, 11, st.MissedAt.UTC().Hour())
	alarm := next(t, f.alarms)
	require.Equal(t, schedule.CodeMissed, alarm.Code)
	require.Equal(t, int64(2), alarm.Missed)
	state, healthy = nightly.State(st, f.Now())
	require.True(t, healthy)
	require.Equal(t, schedule.StateOK, state)
}

func TestADueTimeWhileTheOneBeforeIsAtWorkIsMissed(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	release := make(chan struct{})
	s, _ := f.server(func(ctx context.Context, taken *schedule.Taken) (schedule.Result, error) {
		select {
		case <-release:
		case <-ctx.Done():
		}
		return ended(ctx, taken)
	})
	f.until("somebody looks", func(st schedule.Standing) bool { return st.Name != "" })
	f.forward(time.Hour)
	require.NoError(t, s.Look(ctx))
	require.Equal(t, 10, next(t, f.did).Due.UTC().Hour())
	f.forward(time.Hour)
	require.NoError(t, s.Look(ctx))
	require.NoError(t, s.Look(ctx))
	require.Equal(t, schedule.CodeMissed, next(t, f.alarms).Code)
	require.Empty(t, f.alarms, "it is told once")
	st := f.standing()
	require.Equal(t, int64(1), st.Missed)
	state, healthy := nightly.State(st, f.Now())
	require.False(t, healthy)
	require.Equal(t, schedule.StateMissed, state)
	// Its job comes again and again meanwhile, and finds that somebody is at work; one of another due time has nothing to do.
	admin := pgtest.Admin(t, f.AdminURL)
	_, err := admin.Exec(ctx, `insert into river.river_job (kind, args, max_attempts, state) values ('schedule_due', '{"schedule": "nightly", "due": "2026-11-25T09:00:00Z"}', 9, 'available')`)
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		var again, done bool
		const query = `select coalesce(bool_or((metadata->>'snoozes')::int >= 2), false), coalesce(bool_or(state = 'completed'), false) from river.river_job where kind = 'schedule_due'`
		require.NoError(t, admin.QueryRow(ctx, query).Scan(&again, &done))
		return again && done
	}, pgtest.Patience, 50*time.Millisecond)
	require.Empty(t, f.did, "nobody else began it")
	close(release)
	f.until("the first one ends", over)
	require.Empty(t, f.did, "nobody else began it")
}

func TestWhatFailsIsToldAndWhatCannotBeBegunIsTriedAgain(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	run, admin := uuid.New(), pgtest.Admin(t, f.AdminURL)
	s, _ := f.server(func(ctx context.Context, taken *schedule.Taken) (schedule.Result, error) {
		if taken.Run == uuid.Nil {
			if err := taken.Note(ctx, run, 1); err != nil {
				return schedule.Result{}, err
			}
			return schedule.Result{}, fault.New(fault.Unavailable, "the store is away")
		}
		if taken.Run != run || taken.Tries != 1 {
			return schedule.Result{}, errors.New("what was noted is lost")
		}
		return schedule.Result{Ended: &schedule.Outcome{OK: 1, Failed: 1}}, nil
	})
	f.until("somebody looks", func(st schedule.Standing) bool { return st.Name != "" })
	f.forward(time.Hour)
	require.NoError(t, s.Look(ctx))
	next(t, f.did)
	// Until it is tried again there is time; the test has none. Nor for the errors that make it stuck.
	f.until("it is given back", func(schedule.Standing) bool {
		tag, err := admin.Exec(ctx, `update public.schedules set not_before = null, errors = 3, run = null where errors = 1`)
		require.NoError(t, err)
		return tag.RowsAffected() == 1
	})
	require.Equal(t, schedule.CodeStuck, next(t, f.alarms).Code)
	f.until("it is stuck", func(st schedule.Standing) bool {
		state, healthy := nightly.State(st, f.Now())
		return state == schedule.StateStuck && !healthy
	})
	f.until("it is given back", func(schedule.Standing) bool {
		tag, err := admin.Exec(ctx, `update public.schedules set not_before = null where errors = 4`)
		require.NoError(t, err)
		return tag.RowsAffected() == 1
	})
	alarm := next(t, f.alarms)
	require.Equal(t, schedule.CodeFailed, alarm.Code)
	require.Equal(t, 1, alarm.Failed)
	require.Equal(t, run, *alarm.Run)
	st := f.until("it ends", over)
	state, healthy := nightly.State(st, f.Now())
	require.False(t, healthy)
	require.Equal(t, schedule.StateFailed, state)
}

func TestAServerThatStopsHandsOver(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	begun := make(chan struct{}, 1)
	a, stop := f.server(func(ctx context.Context, taken *schedule.Taken) (schedule.Result, error) {
		begun <- struct{}{}
		<-ctx.Done()
		return schedule.Result{}, ctx.Err()
	})
	f.until("it looks", func(st schedule.Standing) bool { return st.Name != "" })
	f.forward(time.Hour)
	require.NoError(t, a.Look(ctx))
	<-begun
	f.server(ended)
	stop()
	st := f.until("the other one ends it", over)
	require.Equal(t, 10, st.Due.UTC().Hour())
	require.Empty(t, f.alarms, "that a server was stopped is nothing to be alarmed about")
}

// A server that was silent for too long, and whose due time another one has claimed, ends its work, and says no more of it.
func TestAClaimThatIsLost(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	admin := pgtest.Admin(t, f.AdminURL)
	lost, noted := make(chan error, 1), make(chan error, 1)
	s, _ := f.server(func(ctx context.Context, taken *schedule.Taken) (schedule.Result, error) {
		if taken.Tries == 7 { // the second time
			return ended(ctx, taken)
		}
		<-ctx.Done()
		lost <- context.Cause(ctx)
		noted <- taken.Note(context.WithoutCancel(ctx), uuid.New(), 1)
		return schedule.Result{Ended: &schedule.Outcome{Failed: 9}}, nil
	})
	f.until("it looks", func(st schedule.Standing) bool { return st.Name != "" })
	f.forward(time.Hour)
	require.NoError(t, s.Look(ctx))
	next(t, f.did)
	_, err := admin.Exec(ctx, `update public.schedules set worker = gen_random_uuid(), beat = now() + interval '1 day', tries = 7`)
	require.NoError(t, err)
	require.ErrorContains(t, next(t, lost), "taken over")
	require.ErrorContains(t, next(t, noted), "taken over")
	require.Empty(t, f.did, "whoever has it is alive")
	// The other one dies.
	_, err = admin.Exec(ctx, `update public.schedules set beat = now() - interval '1 day'`)
	require.NoError(t, err)
	st := f.until("it is gone on with", over)
	require.Equal(t, [2]int{2, 0}, [2]int{st.OK, st.Failed})
	require.Nil(t, st.Run)
	require.Empty(t, f.alarms)
}

// An alarm that takes long keeps no work waiting, and the server that raises it is not taken for dead.
func TestAnAlarmKeepsNobodyWaiting(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	admin := pgtest.Admin(t, f.AdminURL)
	_, stop := f.server(ended)
	f.until("somebody looks", func(st schedule.Standing) bool { return st.Name != "" })
	stop()
	f.forward(3 * time.Hour)
	f.hold = make(chan struct{})
	release := sync.OnceFunc(func() { close(f.hold) })
	t.Cleanup(release)
	f.server(func(context.Context, *schedule.Taken) (schedule.Result, error) {
		return schedule.Result{}, fault.New(fault.Unavailable, "the store is away")
	})
	require.Equal(t, schedule.CodeMissed, next(t, f.alarms).Code)
	next(t, f.did)
	f.until("it is given back", func(schedule.Standing) bool {
		tag, err := admin.Exec(ctx, `update public.schedules set not_before = null, errors = 3 where errors = 1`)
		require.NoError(t, err)
		return tag.RowsAffected() == 1
	})
	next(t, f.did)
	require.Equal(t, schedule.CodeStuck, next(t, f.alarms).Code)
	var raised time.Time
	require.NoError(t, admin.QueryRow(ctx, `select clock_timestamp()`).Scan(&raised))
	require.Eventually(t, func() bool { // for longer than somebody is silent who is taken for dead
		var alive bool
		require.NoError(t, admin.QueryRow(ctx, `select beat > $1::timestamptz + interval '2 s' from public.schedules`, raised).Scan(&alive))
		return alive
	}, pgtest.Patience, 50*time.Millisecond)
	require.Empty(t, f.did, "nobody else has begun it")
	release()
	f.until("it is given back", func(st schedule.Standing) bool {
		var free bool
		require.NoError(t, admin.QueryRow(ctx, `select worker is null from public.schedules`).Scan(&free))
		return free
	})
}

// A server whose clock was days ahead has looked: what is due now is not taken for seen.
func TestAClockThatWasAhead(t *testing.T) {
	t.Parallel()
	f, ctx := newFixture(t), context.Background()
	s, _ := f.server(ended)
	f.until("it looks", func(st schedule.Standing) bool { return st.Name != "" })
	f.forward(49 * time.Hour) // the 27th, 10:30
	require.NoError(t, s.Look(ctx))
	require.Equal(t, 27, next(t, f.did).Due.UTC().Day())
	f.until("it is done", over)
	require.Equal(t, schedule.CodeMissed, next(t, f.alarms).Code)
	f.forward(-48 * time.Hour)
	require.NoError(t, s.Look(ctx))
	f.forward(3 * time.Hour)
	require.NoError(t, s.Look(ctx))
	require.Equal(t, time.Date(2026, 11, 25, 13, 0, 0, 0, time.UTC), next(t, f.did).Due.UTC())
	alarm := next(t, f.alarms)
	require.Equal(t, schedule.CodeMissed, alarm.Code, "what is missed now is told")
	require.Equal(t, 25, alarm.Due.UTC().Day())
}

// never is of due times that do not come any more.
type never struct{}

func (never) Next(time.Time) time.Time { return time.Time{} }

func TestLooks(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	look := func(times ...schedule.Times) string {
		o := schedule.Options{DB: env.DB, Logger: slog.New(slog.DiscardHandler), Alarm: func(context.Context, schedule.Alarm) {}, Do: ended}
		for i, at := range times {
			o.Schedules = append(o.Schedules, schedule.Schedule{Name: fmt.Sprint(i), Times: at})
		}
		s, err := schedule.New(o)
		require.NoError(t, err)
		return s.NextLook(time.Date(2026, 11, 25, 9, 59, 45, 0, time.UTC)).Format(time.TimeOnly)
	}
	require.Equal(t, "10:00:15", look())
	require.Equal(t, "10:00:00", look(never{}, hourly{}))
	require.Equal(t, "10:00:15", look(never{}), "it would be looked again and again")
}

func TestChangedWordsBeginAnew(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	_, stop := f.server(ended)
	f.until("somebody looks", func(st schedule.Standing) bool { return st.Name != "" })
	stop()
	_, err := pgtest.Admin(t, f.AdminURL).Exec(context.Background(), `update public.schedules set spec = 'daily'`)
	require.NoError(t, err)
	f.forward(5 * time.Hour)
	f.server(ended)
	st := f.until("the new words are noted", func(st schedule.Standing) bool { return st.Spec == "hourly" })
	require.Zero(t, st.Missed)
	require.Nil(t, st.Due)
}

func TestRiversTables(t *testing.T) {
	t.Parallel()
	env, ctx := pgtest.New(t), context.Background()
	err := schedule.Behind(ctx, env.DB)
	require.True(t, fault.Is(err, fault.Pending), "%v", err)
	require.Contains(t, fault.Of(err).Hint, "oneo migrate --shared")
	var both sync.WaitGroup
	for range 3 {
		both.Go(func() {
			if err := schedule.Migrate(ctx, env.DB); err != nil {
				t.Errorf("migrate: %v", err)
			}
		})
	}
	both.Wait()
	require.NoError(t, schedule.Behind(ctx, env.DB))
	require.NoError(t, schedule.Migrate(ctx, env.DB), "it can be asked for again")

	admin := pgtest.Admin(t, env.AdminURL)
	tn := env.Tenant(t, "acme")
	inst, err := env.DB.Installation(ctx, postgres.MainGroup)
	require.NoError(t, err)
	for _, role := range append(inst.LoginNames(), inst.AppRole, inst.TenantRole(tn.Number), "public") {
		var may bool
		require.NoError(t, admin.QueryRow(ctx, `select pg_catalog.has_schema_privilege($1, 'river', 'usage') or pg_catalog.has_schema_privilege($1, 'river', 'create')`, role).Scan(&may))
		require.False(t, may, "%s has rights on River's schema", role)
		var tables int
		require.NoError(t, admin.QueryRow(ctx, `select count(*) from pg_catalog.pg_class c where (c.relnamespace = 'river'::regnamespace or c.oid = 'public.schedules'::regclass) and c.relkind in ('r', 'p', 'S')
and case when c.relkind = 'S' then pg_catalog.has_sequence_privilege($1, c.oid, 'usage, select, update') else pg_catalog.has_table_privilege($1, c.oid, 'select, insert, update, delete') end`, role).Scan(&tables))
		require.Zero(t, tables, "%s has rights on River's tables", role)
	}
	var others int
	require.NoError(t, admin.QueryRow(ctx, `select count(*) from pg_catalog.pg_class c where c.relnamespace = 'river'::regnamespace and pg_catalog.pg_get_userbyid(c.relowner) <> $1`, postgres.DefaultOptions().OwnerRole).Scan(&others))
	require.Zero(t, others, "all of it is the owner's")
	err = env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
		_, err := tx.Exec(ctx, `select from river.river_job`)
		return err
	})
	require.Equal(t, "42501", postgres.SQLState(err), fmt.Sprint(err))
}
