package rollout_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// newRunner takes nobody for dead who only stands still for a while.
func newRunner(t *testing.T, env *pgtest.Env) *rollout.Runner {
	t.Helper()
	return newRunnerOn(t, env.DB, pgtest.Patience)
}

func newRunnerOn(t *testing.T, db *postgres.DB, staleAfter time.Duration) *rollout.Runner {
	t.Helper()
	r, err := rollout.New(rollout.Options{DB: db, StaleAfter: staleAfter, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return r
}

// items are tenants that are only names: a run itself never opens one.
func items(t *testing.T, n int) []rollout.Item {
	t.Helper()
	all := make([]rollout.Item, n)
	for i := range all {
		slug := pgtest.Slug(t, fmt.Sprintf("t%03d", i))
		all[i] = rollout.Item{Tenant: tenant.Tenant{Number: int32(i + 1), Slug: slug, Group: postgres.MainGroup}, From: 1, To: 2}
	}
	return all
}

func spec(t *testing.T, n int) rollout.Spec {
	return rollout.Spec{Kind: "run.test", Actor: "test", Request: map[string]int{"target": 2}, Items: items(t, n)}
}

func plan(t *testing.T, r *rollout.Runner, s rollout.Spec) rollout.Run {
	t.Helper()
	run, joined, err := r.Plan(t.Context(), s)
	require.NoError(t, err)
	require.False(t, joined)
	return run
}

// counter counts how often each tenant's work was done.
type counter struct {
	mu    sync.Mutex
	times map[string]int
}

func (c *counter) add(slug string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.times == nil {
		c.times = map[string]int{}
	}
	c.times[slug]++
}

func (c *counter) each(t *testing.T, n, times int) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Len(t, c.times, n)
	for slug, k := range c.times {
		require.Equalf(t, times, k, "tenant %s", slug)
	}
}

func TestRunEndsWellAndInOrder(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 60))
	require.Equal(t, registry.Running, run.State)
	require.Equal(t, 60, run.Left())
	var order []string
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 1}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		order = append(order, task.Slug)
		return rollout.Outcome{From: 1, To: 2, Result: map[string]int{"rows": task.Ordinal}}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Done, run.State)
	require.Equal(t, rollout.Counts{OK: 60}, run.Counts)
	require.True(t, slices.IsSorted(order), "one worker begins them in the order of the plan")
	require.NoError(t, r.Tasks(t.Context(), run.ID, func(task rollout.Reported) error {
		require.JSONEq(t, fmt.Sprintf(`{"rows": %d}`, task.Ordinal), string(task.Result))
		require.Equal(t, 1, task.Attempts)
		require.NotNil(t, task.Ended)
		return nil
	}))
	env.Invariants(t)
}

func TestProcessesShareARun(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 300))
	var c counter
	var workers sync.WaitGroup
	var took [3]atomic.Int32
	var present sync.WaitGroup // each has had something to do
	present.Add(len(took))
	for p := range took {
		db, _, _ := env.Open(t)
		other := newRunnerOn(t, db, pgtest.Patience)
		workers.Go(func() {
			end, err := other.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2}, func(_ context.Context, task rollout.Task) rollout.Outcome {
				c.add(task.Slug)
				if took[p].Add(1) == 1 {
					present.Done()
				}
				present.Wait()
				return rollout.Outcome{}
			})
			if err != nil || end.State != registry.Done {
				t.Errorf("process %d: %v, %s", p, err, end.State)
			}
		})
	}
	workers.Wait()
	c.each(t, 300, 1)
}

func TestBusyTenantIsSetAside(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 12))
	var tries atomic.Int32
	var order []string
	aside := 0
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 1, Told: func(e rollout.Event) {
		if e.Again > 0 {
			aside++
		}
	}}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		order = append(order, task.Slug)
		if task.Slug == "t003" && tries.Add(1) < 3 {
			return rollout.Outcome{Err: fault.New(fault.Locked, "busy").WithCode("lock_timeout")}
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Done, run.State)
	require.Equal(t, 12, run.OK)
	require.Equal(t, 2, aside)
	require.Equal(t, "t003", order[len(order)-1], "the others do not wait for it")
}

func TestBusyTenantFailsWhenPatienceEnds(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 3))
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2, Patience: 6 * time.Second}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Slug == "t001" {
			return rollout.Outcome{Err: fault.New(fault.Locked, "busy").WithCode("lock_timeout")}
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Failed, run.State)
	require.Equal(t, rollout.Counts{OK: 2, Failed: 1}, run.Counts)
	require.NoError(t, r.Tasks(t.Context(), run.ID, func(task rollout.Reported) error {
		require.Equal(t, "lock_timeout", task.Error.Code)
		require.Greater(t, task.Attempts, 1)
		return nil
	}, "failed"))
}

func TestFailuresEndARunAndRetryOpensIt(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	s := spec(t, 50)
	s.MaxFailures = 1
	run := plan(t, r, s)
	broken := atomic.Bool{}
	broken.Store(true)
	var c counter
	work := func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Slug == "t004" && broken.Load() {
			return rollout.Outcome{Err: fault.New(fault.Unfit, "bad row").WithCode("migration_failed")}
		}
		c.add(task.Slug)
		return rollout.Outcome{}
	}
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 1}, work)
	require.NoError(t, err)
	require.Equal(t, registry.Failed, run.State)
	require.Equal(t, rollout.Counts{OK: 4, Failed: 1, Queued: 45}, run.Counts, "nothing is begun behind the failure")
	require.Contains(t, string(run.Error), "too_many_failures")

	// Going on leaves the failed one as it is; it does not count again.
	run, err = r.Resume(t.Context(), run.ID, "test")
	require.NoError(t, err)
	run, err = r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2}, work)
	require.NoError(t, err)
	require.Equal(t, registry.Failed, run.State)
	require.Equal(t, rollout.Counts{OK: 49, Failed: 1}, run.Counts)

	broken.Store(false)
	run, err = r.Retry(t.Context(), run.ID, "test")
	require.NoError(t, err)
	require.Equal(t, registry.Running, run.State)
	run, err = r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2}, work)
	require.NoError(t, err)
	require.Equal(t, registry.Done, run.State)
	c.each(t, 50, 1)
}

func TestCanariesAndWaves(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	s := spec(t, 40)
	s.Canary, s.Wave, s.Pause = 4, rollout.Wave{Percent: 50}, 300*time.Millisecond
	run := plan(t, r, s)
	require.Equal(t, 3, run.Waves)
	var mu sync.Mutex
	last := 0
	ends := map[int]time.Time{}
	begins := map[int]time.Time{}
	inWave := map[int]int{}
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 4}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		mu.Lock()
		defer mu.Unlock()
		if task.Wave < last {
			t.Errorf("wave %d after wave %d", task.Wave, last)
		}
		last = task.Wave
		if inWave[task.Wave]++; inWave[task.Wave] == 1 {
			begins[task.Wave] = time.Now()
		}
		ends[task.Wave] = time.Now()
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Done, run.State)
	require.Equal(t, map[int]int{0: 4, 1: 18, 2: 18}, inWave)
	for w := 1; w < 3; w++ {
		require.GreaterOrEqual(t, begins[w].Sub(ends[w-1]), 300*time.Millisecond, "the pause before wave %d", w)
	}
}

func TestFailedCanaryEndsARun(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	s := spec(t, 30)
	s.Canary = 3
	run := plan(t, r, s)
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 4}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Wave != 0 {
			t.Errorf("%s is begun behind a failed canary", task.Slug)
		}
		if task.Ordinal == 15 { // the second of three canaries among thirty
			return rollout.Outcome{Err: errors.New("no")}
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Failed, run.State)
	require.Contains(t, string(run.Error), "canary_failed")
	require.GreaterOrEqual(t, run.Queued, 27)
	require.Equal(t, 1, run.Failed)
}

func TestPauseAndAbortReachOtherProcesses(t *testing.T) {
	t.Parallel()
	for _, verb := range []string{"pause", "abort"} {
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t)
			r := newRunner(t, env)
			run := plan(t, r, spec(t, 200))
			begun, goOn := make(chan struct{}, 200), make(chan struct{})
			ended := make(chan rollout.Run, 1)
			go func() {
				end, err := r.Work(context.WithoutCancel(t.Context()), run.ID, rollout.WorkOptions{Jobs: 2}, func(context.Context, rollout.Task) rollout.Outcome {
					begun <- struct{}{}
					<-goOn
					return rollout.Outcome{}
				})
				if err != nil {
					t.Errorf("work: %v", err)
				}
				ended <- end
			}()
			<-begun
			var err error
			want := registry.Paused
			if verb == "pause" {
				_, err = r.Pause(t.Context(), run.ID, "test")
			} else {
				want = registry.Aborted
				_, err = r.Abort(t.Context(), run.ID, "test")
			}
			require.NoError(t, err)
			close(goOn)
			end := <-ended
			require.Equal(t, want, end.State)
			require.Zero(t, end.Running, "what was in hand is finished, what was not begun is handed back")
			require.NotZero(t, end.Queued)
			if verb == "abort" {
				_, err = r.Resume(t.Context(), run.ID, "test")
				require.ErrorContains(t, err, "is aborted and cannot be resumed")
				return
			}
			_, err = r.Resume(t.Context(), run.ID, "test")
			require.NoError(t, err)
			end, err = r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 4}, func(context.Context, rollout.Task) rollout.Outcome { return rollout.Outcome{} })
			require.NoError(t, err)
			require.Equal(t, rollout.Counts{OK: 200}, end.Counts)
		})
	}
}

func TestInterruptFinishesWhatIsInHand(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 100))
	ctx, stop := context.WithCancel(t.Context())
	var c counter
	work := func(ctx context.Context, task rollout.Task) rollout.Outcome {
		stop()
		if ctx.Err() != nil {
			t.Error("work in hand is interrupted")
		}
		c.add(task.Slug)
		return rollout.Outcome{}
	}
	end, err := r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 3}, work)
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, registry.Running, end.State, "it can be resumed")
	require.Zero(t, end.Running)
	require.Positive(t, end.OK)
	require.LessOrEqual(t, end.OK, 16, "at most what was given out to the three already")
	end, err = r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 3}, work)
	require.NoError(t, err)
	require.Equal(t, registry.Done, end.State)
	c.each(t, 100, 1)
}

// A process that dies gives no sign of life any more: its tenants are taken up.
func TestDeadProcessesTasksAreTakenUp(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 20))
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(t.Context(), `update public.tasks set state = 'running', worker = gen_random_uuid(), heartbeat = now(), attempts = 1 where run = $1 and ordinal < 10`, run.ID)
	require.NoError(t, err)
	var own atomic.Int32
	run, err = r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2, Told: func(e rollout.Event) {
		// It does what is free first; then the others have been dead for longer than a process may be silent.
		if e.Task == nil && own.Load() == 10 && e.Counts.OK == 10 && e.Counts.Running == 10 {
			_, err := admin.Exec(t.Context(), `update public.tasks set heartbeat = now() - interval '1 hour' where run = $1 and ordinal < 10`, run.ID)
			if err != nil {
				t.Errorf("age the signs of life: %v", err)
			}
			own.Add(1)
		}
	}}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if task.Ordinal < 10 && own.Load() <= 10 {
			t.Errorf("%s was taken from a process that lives", task.Slug)
		} else if task.Ordinal >= 10 {
			own.Add(1)
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, rollout.Counts{OK: 20}, run.Counts)
}

// A process that was silent for too long, because it was stopped or the database was away, begins nothing more of what it
// had claimed: another one may be at it.
func TestWhatOthersMayHaveTakenUpIsNotBegun(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	const staleAfter = 2 * time.Second
	r := newRunnerOn(t, env.DB, staleAfter)
	run := plan(t, r, spec(t, 10))
	admin := pgtest.Admin(t, env.AdminURL)
	var silent atomic.Bool
	var once sync.Once
	var c counter
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 1, Told: func(e rollout.Event) {
		if e.Task == nil || e.Task.Ordinal != 0 {
			return
		}
		silent.Store(false)
		if _, err := admin.Exec(context.Background(), `rollback`); err != nil {
			t.Errorf("let it speak: %v", err)
		}
	}}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		c.add(task.Slug)
		if silent.Load() {
			t.Errorf("%s is begun", task.Slug)
		}
		once.Do(func() {
			_, err := admin.PgConn().Exec(context.Background(), `begin; select from public.operations for update`).ReadAll()
			if err != nil {
				t.Errorf("silence it: %v", err)
			}
			time.Sleep(staleAfter)
			silent.Store(true)
		})
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, rollout.Counts{OK: 10}, run.Counts)
	c.each(t, 10, 1)
}

// What a process has claimed by a commit whose answer was lost, it hands back when it knows that it has missed one.
func TestClaimsThatWereNeverHeardOfAreHandedBack(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	log := &logged{}
	r, err := rollout.New(rollout.Options{DB: env.DB, StaleAfter: 10 * time.Second, Logger: slog.New(slog.NewTextHandler(log, nil))})
	require.NoError(t, err)
	run := plan(t, r, spec(t, 40))
	admin := pgtest.Admin(t, env.AdminURL)
	exec := func(sql string) {
		if _, err := admin.PgConn().Exec(context.Background(), sql).ReadAll(); err != nil {
			t.Errorf("%s: %v", sql, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), pgtest.Patience)
	defer cancel()
	var once sync.Once
	var c counter
	run, err = r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 1}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		c.add(task.Slug)
		once.Do(func() {
			exec(`update public.tasks set state = 'running', heartbeat = now(), attempts = 1, worker = (select worker from public.tasks where ordinal = 0) where ordinal >= 30`)
			exec(`begin; select from public.operations for update`)
			for ctx.Err() == nil && log.count("cannot be reached") == 0 {
				time.Sleep(5 * time.Millisecond)
			}
			exec(`rollback`)
		})
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, rollout.Counts{OK: 40}, run.Counts)
	c.each(t, 40, 1)
}

func TestOneRunAtATimeOnATenant(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	s := spec(t, 10)
	s.Alone = true
	first := plan(t, r, s)
	second, joined, err := r.Plan(ctx, s)
	require.NoError(t, err)
	require.True(t, joined, "the same request goes on with the run that is there")
	require.Equal(t, first.ID, second.ID)

	other := s
	other.Request = map[string]int{"target": 3}
	_, _, err = r.Plan(ctx, other)
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	require.ErrorContains(t, err, first.ID.String())

	_, err = r.Pause(ctx, first.ID, "test")
	require.NoError(t, err)
	_, _, err = r.Plan(ctx, s)
	require.ErrorContains(t, err, "is paused")
	_, err = r.Resume(ctx, first.ID, "test")
	require.NoError(t, err)

	// Its processes are dead: it makes room.
	_, err = pgtest.Admin(t, env.AdminURL).Exec(ctx, `update public.operations set heartbeat = now() - interval '1 hour', created_at = now() - interval '1 hour' where id = $1`, first.ID)
	require.NoError(t, err)
	third, joined, err := r.Plan(ctx, other)
	require.NoError(t, err)
	require.False(t, joined)
	first, err = r.Show(ctx, first.ID)
	require.NoError(t, err)
	require.Equal(t, registry.Aborted, first.State)
	require.NotEqual(t, first.ID, third.ID)

	apart := s
	apart.Items = items(t, 20)[10:]
	_, joined, err = r.Plan(ctx, apart)
	require.NoError(t, err)
	require.False(t, joined, "other tenants do not meet")
}

func TestPanicAndTimeoutAreTheTenantsOwn(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 5))
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 2, Timeout: 2 * time.Second}, func(ctx context.Context, task rollout.Task) rollout.Outcome {
		switch task.Slug {
		case "t001":
			panic("boom")
		case "t002":
			<-ctx.Done()
			return rollout.Outcome{Err: ctx.Err()}
		}
		return rollout.Outcome{Status: fleet.Skipped}
	})
	require.NoError(t, err)
	require.Equal(t, rollout.Counts{Skipped: 3, Failed: 2}, run.Counts)
	codes := map[string]string{}
	require.NoError(t, r.Tasks(t.Context(), run.ID, func(task rollout.Reported) error {
		codes[task.Slug] = task.Error.Code
		return nil
	}, "failed"))
	require.Equal(t, "timeout", codes["t002"])
}

func TestNothingIsBegunWhileHeld(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	run := plan(t, r, spec(t, 20))
	var held atomic.Bool
	var during, told, asked atomic.Int32
	run, err := r.Work(t.Context(), run.ID, rollout.WorkOptions{Jobs: 1,
		Hold: func() string {
			if !held.Load() {
				return ""
			}
			if asked.Add(1) == 8 { // it has stood still for some rounds
				held.Store(false)
			}
			return "too much"
		},
		Told: func(e rollout.Event) {
			if e.Held != "" {
				told.Add(1)
			}
		},
	}, func(_ context.Context, task rollout.Task) rollout.Outcome {
		if held.Load() {
			during.Add(1)
		}
		if task.Ordinal == 3 {
			held.Store(true)
		}
		return rollout.Outcome{}
	})
	require.NoError(t, err)
	require.Equal(t, registry.Done, run.State)
	// Four are given out ahead to each worker, and one more may be about to be: how many of them were begun before is
	// the scheduler's choice.
	require.LessOrEqual(t, during.Load(), int32(5), "what was given out already goes on, nothing else")
	require.Equal(t, int32(1), told.Load())
}

func TestFind(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	_, err := r.Find(ctx, "last")
	require.True(t, fault.Is(err, fault.NotFound))
	first := plan(t, r, spec(t, 1))
	second := plan(t, r, spec(t, 2))
	last, err := r.Find(ctx, "last")
	require.NoError(t, err)
	require.Equal(t, second.ID, last.ID)
	id := first.ID.String()
	found, err := r.Find(ctx, id[len(id)-8:])
	require.NoError(t, err)
	require.Equal(t, first.ID, found.ID)
	for _, name := range []string{"nonsense", id[len(id)-2:], "00000000-0000-0000-0000-000000000000"} {
		_, err = r.Find(ctx, name)
		require.Truef(t, fault.Is(err, fault.NotFound), "%s: %v", name, err)
	}
}

func TestWavesHoldEveryTenantOnce(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 300).Draw(t, "tenants")
		s := rollout.Spec{Items: make([]rollout.Item, n), Canary: rapid.IntRange(0, 20).Draw(t, "canary"), Wave: rollout.Wave{Percent: rapid.IntRange(0, 100).Draw(t, "percent")}}
		waves := s.Waves()
		count := map[int]int{}
		for _, w := range waves {
			count[w]++
		}
		top := slices.Max(waves)
		for w := range top + 1 {
			if count[w] == 0 {
				t.Fatalf("wave %d is empty: %v", w, waves)
			}
		}
		if s.Canary > 0 && count[0] != min(s.Canary, n) {
			t.Fatalf("%d canaries of %d: %v", s.Canary, n, waves)
		}
	})
}

func TestParseWave(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]rollout.Wave{"": {}, "10%": {Percent: 10}, "50": {Count: 50}, "100%": {Percent: 100}} {
		got, err := rollout.ParseWave(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"0", "-1", "101%", "0%", "ten", "10x", "10 %x", "%"} {
		_, err := rollout.ParseWave(text)
		require.Error(t, err, text)
	}
}

// Two kinds of runs that take the same tenants to different places are not at work at one time, also when both are
// planned at the same moment.
func TestRivals(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	kinds := []string{"run.up", "run.down"}
	of := func(i, n int) rollout.Spec {
		s := spec(t, n)
		s.Kind, s.Alone, s.Rivals = kinds[i], true, kinds[1-i:2-i]
		return s
	}
	for range 5 {
		errs := make([]error, 2)
		runs := make([]rollout.Run, 2)
		var both sync.WaitGroup
		for i := range kinds {
			both.Go(func() { runs[i], _, errs[i] = r.Plan(t.Context(), of(i, 3)) })
		}
		both.Wait()
		won := slices.Index(errs, nil)
		require.GreaterOrEqual(t, won, 0, "%v", errs)
		require.Error(t, errs[1-won], "both are planned")
		require.Equal(t, "run_at_work", fault.Of(errs[1-won]).Code)
		again, joined, err := r.Plan(t.Context(), of(won, 3))
		require.NoError(t, err)
		require.True(t, joined, "of its own kind the same run is gone on with")
		require.Equal(t, runs[won].ID, again.ID)
		_, err = r.Pause(t.Context(), runs[won].ID, "test")
		require.NoError(t, err)
		_, _, err = r.Plan(t.Context(), of(1-won, 3))
		require.Equal(t, "run_paused", fault.Of(err).Code)
		_, err = r.Abort(t.Context(), runs[won].ID, "test")
		require.NoError(t, err)
	}
	dead := plan(t, r, of(0, 3))
	r = newRunnerOn(t, env.DB, 100*time.Millisecond)
	require.Eventually(t, func() bool { _, _, err := r.Plan(t.Context(), of(1, 3)); return err == nil }, 30*time.Second, 10*time.Millisecond,
		"a run whose process is dead stands in nobody's way")
	dead, err := r.Show(t.Context(), dead.ID)
	require.NoError(t, err)
	require.Equal(t, registry.Aborted, dead.State, "nobody resumes it behind the other one")
}
