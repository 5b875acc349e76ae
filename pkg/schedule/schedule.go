// Package schedule has work done when its time has come, by one of the servers that are there. River chooses a leader among
// them, which looks what is due; it hands the work out, and gives it to another server when one has died over it.
//
// It promises: a due time is taken on once, however many servers there are and whichever of them die; one that passed while
// no server was there is made up for if none has passed since, and else it is counted as missed, as is one that passes while the
// work on the one before it is not at its end; and each that was missed, or failed, raises an alarm - twice at worst, never
// not at all. The rows of public.schedules say so, not River's: without those nothing is lost but time.
package schedule

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivertype"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Times are due times.
type Times interface {
	// Next is the first one behind a time; zero: there is none.
	Next(after time.Time) time.Time
}

// Schedule is one piece of work with its due times.
type Schedule struct {
	Name string
	// Spec is what Times follow from: where it has changed, what passed before is not counted by the new ones.
	Spec  string
	Times Times
	// Jitter is by how much later the work may be begun; it spreads the load.
	Jitter time.Duration
}

// Taken is a due time that was taken on. Run and Tries are what Note last noted.
type Taken struct {
	Schedule string
	Due      time.Time
	Run      uuid.UUID
	Tries    int
	errors   int // so far, one after another
	claim    uuid.UUID
	s        *Scheduler
}

// errLost is the end of the work of a server that gave no sign of life for too long: another one goes on with it, or this one by a new claim.
var errLost = errors.New("it was taken over, since there was no sign of life for too long")

// Note keeps what whoever goes on with the work must know. uuid.Nil: there is no run.
func (t *Taken) Note(ctx context.Context, run uuid.UUID, tries int) error {
	const note = `update public.schedules set run = nullif($3::uuid, '00000000-0000-0000-0000-000000000000'), tries = $4
where name = $1 and due = $2 and worker = $5`
	t.Run, t.Tries = run, tries
	return t.s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		tag, err := tx.Exec(ctx, note, t.Schedule, t.Due, run, tries, t.claim)
		if err == nil && tag.RowsAffected() == 0 {
			err = errLost
		}
		return err
	})
}

// Result is how far the work has come.
type Result struct {
	Ended *Outcome      // it is over; nil: it is not
	Again time.Duration // else it is to be gone on with after so long, by any server
}

// Outcome is the end of the work on a due time.
type Outcome struct {
	OK, Failed, Skipped int
	Err                 string // why it failed as a whole, or empty
}

// Good reports whether there is nothing to be alarmed about.
func (o Outcome) Good() bool { return o.Err == "" && o.Failed == 0 }

// The codes of alarms.
const (
	CodeMissed = "schedule_missed" // due times passed and nothing was done
	CodeFailed = "schedule_failed" // the work ended, and some or all of it failed
	CodeStuck  = "schedule_stuck"  // it cannot be begun, or gone on with; it is tried on
)

// Alarm is something that a person should see to.
type Alarm struct {
	Code     string     `json:"code"`
	Schedule string     `json:"schedule"`
	Due      time.Time  `json:"due_at"`
	Missed   int64      `json:"missed,omitempty"` // of all due times so far
	Run      *uuid.UUID `json:"run,omitempty"`
	OK       int        `json:"ok,omitempty"`
	Failed   int        `json:"failed,omitempty"`
	Error    string     `json:"error,omitempty"`
}

// Options is what a Scheduler needs.
type Options struct {
	DB        *postgres.DB
	Schedules []Schedule
	// Do works on a due time until it is over, or says when to go on. It is called again for the same one after an error, and
	// by another server when this one has died; when ctx ends it hands the work back soon.
	Do func(ctx context.Context, t *Taken) (Result, error)
	// Alarm is told what a person should see to.
	Alarm func(ctx context.Context, a Alarm)
	// Now is the clock; nil: the system's.
	Now func() time.Time
	// StaleAfter is for how long the server that works on a due time may give no sign of life before another one goes on
	// with it; 0: ten seconds.
	StaleAfter time.Duration
	Logger     *slog.Logger
}

// Scheduler is one server's part in the schedules. It is safe for concurrent use.
type Scheduler struct {
	o     Options
	river *river.Client[pgx.Tx]

	stopping context.Context // ends when this server is to stop; set by Run
	working  sync.WaitGroup
}

// New checks the options.
func New(o Options) (*Scheduler, error) {
	if o.DB == nil || o.Do == nil || o.Alarm == nil || o.Logger == nil {
		return nil, errors.New("schedule: DB, Do, Alarm and Logger must be given")
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.StaleAfter == 0 {
		o.StaleAfter = 10 * time.Second
	}
	return &Scheduler{o: o}, nil
}

const (
	// lookEvery is how often the leader looks, besides at each due time.
	lookEvery = 30 * time.Second
	// startEvery is how often a server tries to take part whose database is away.
	startEvery = 5 * time.Second
	// stuckAfter is after how many errors a due time is told to be stuck: after some four minutes.
	stuckAfter = 4
	retryLeast = 30 * time.Second
	retryMost  = 10 * time.Minute
)

// lookArgs is the job of looking what is due.
type lookArgs struct{}

func (lookArgs) Kind() string { return "schedule_look" }

// InsertOpts has looks never tried again, since there is another one soon; nor are they unique: one whose server has died
// would keep the next ones away.
func (lookArgs) InsertOpts() river.InsertOpts { return river.InsertOpts{MaxAttempts: 1} }

// dueArgs is the job of seeing to it that a due time is worked on. It is a short one, done again and again until the work is
// over: River takes a job that lasts long either for stuck, or its server never for dead.
type dueArgs struct {
	Schedule string    `json:"schedule"`
	Due      time.Time `json:"due"`
}

func (dueArgs) Kind() string { return "schedule_due" }

// open are the states of jobs that are not over. One that is may come again: the row in public.schedules knows better.
var open = []rivertype.JobState{
	rivertype.JobStateAvailable, rivertype.JobStatePending, rivertype.JobStateRetryable, rivertype.JobStateRunning, rivertype.JobStateScheduled,
}

type looker struct {
	river.WorkerDefaults[lookArgs]
	s *Scheduler
}

func (w looker) Work(ctx context.Context, _ *river.Job[lookArgs]) error { return w.s.Look(ctx) }

type worker struct {
	river.WorkerDefaults[dueArgs]
	s *Scheduler
}

func (w worker) Work(ctx context.Context, job *river.Job[dueArgs]) error {
	over, err := w.s.see(ctx, job.Args)
	if err != nil || over {
		return err
	}
	return river.JobSnooze(w.s.o.StaleAfter)
}

// Run takes part until ctx ends; then the work in hand is handed back, and Run returns once it has been.
func (s *Scheduler) Run(ctx context.Context) error {
	s.stopping = ctx
	pool, err := s.o.DB.OwnerPool(postgres.MainGroup, riverConns)
	if err != nil {
		return err
	}
	defer pool.Close()
	workers := river.NewWorkers()
	river.AddWorker(workers, looker{s: s})
	river.AddWorker(workers, worker{s: s})
	s.river, err = river.NewClient(riverpgxv5.New(pool), &river.Config{
		Schema: Schema, Logger: slog.New(quiet{s.o.Logger.With("part", "river").Handler()}), Workers: workers,
		// Each schedule has one job at most, and there is the look.
		Queues:                      map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: len(s.o.Schedules) + 1}},
		FetchPollInterval:           2 * time.Second, // besides being told
		RescueStuckJobsAfter:        time.Minute,     // of which none takes that long
		RetryPolicy:                 soon{},
		MaxAttempts:                 30_000, // the work is due until the next due time
		CompletedJobRetentionPeriod: time.Hour,
		DiscardedJobRetentionPeriod: time.Hour,
		ReindexerSchedule:           river.NeverSchedule(), // there are a handful of rows
		PeriodicJobs: []*river.PeriodicJob{river.NewPeriodicJob(looks{s}, func() (river.JobArgs, *river.InsertOpts) {
			return lookArgs{}, nil
		}, &river.PeriodicJobOpts{RunOnStart: true})},
	})
	if err != nil {
		return err
	}
	going := context.WithoutCancel(ctx)
	for lost := false; ; lost = true {
		if err = s.river.Start(going); err == nil {
			break
		}
		if !lost {
			s.o.Logger.Warn("take part in the schedules; trying on", "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(startEvery):
		}
	}
	<-ctx.Done()
	err = s.river.Stop(going)
	s.working.Wait()
	return err
}

// quiet lets through what River warns of: it has a story to tell every quarter of a minute.
type quiet struct{ slog.Handler }

func (q quiet) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && q.Handler.Enabled(ctx, l)
}

func (q quiet) WithAttrs(as []slog.Attr) slog.Handler { return quiet{q.Handler.WithAttrs(as)} }

func (q quiet) WithGroup(name string) slog.Handler { return quiet{q.Handler.WithGroup(name)} }

// soon is when a job is tried again that has met with an error: its database was away.
type soon struct{}

func (soon) NextRetry(*rivertype.JobRow) time.Time { return time.Now().Add(startEvery) }

// looks are the times at which the leader looks.
type looks struct{ s *Scheduler }

func (l looks) Next(t time.Time) time.Time {
	next := t.Add(lookEvery)
	for _, sc := range l.s.o.Schedules {
		if due := sc.Times.Next(t); !due.IsZero() && due.Before(next) {
			next = due
		}
	}
	return next
}

func (s *Scheduler) inMain(ctx context.Context, fn func(*postgres.OwnerTx) error) error {
	return s.o.DB.AsOwner(ctx, postgres.MainGroup, fn)
}

// Look takes on what is due, counts what was missed, and sees to it that what was taken on is worked on. What fails with one
// schedule does not stop the others, and no alarm keeps the work waiting.
func (s *Scheduler) Look(ctx context.Context) error {
	var errs []error
	failed := func(name string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("schedule %s: %w", name, err))
		}
	}
	var missed []Standing
	for _, sc := range s.o.Schedules {
		st, err := s.take(ctx, sc, s.o.Now())
		if err == nil && st.MissedAt != nil && (st.told == nil || st.told.Before(*st.MissedAt)) {
			missed = append(missed, st)
		}
		if err == nil && st.AtWork() {
			err = s.enqueue(ctx, sc, *st.Due)
		}
		failed(sc.Name, err)
	}
	for _, st := range missed {
		failed(st.Name, s.tellMissed(ctx, st))
	}
	return errors.Join(errs...)
}

// ahead is how far in the future a row may say that due times were seen up to; beyond that the clock of whoever looked was wrong.
const ahead = time.Hour

// take brings a schedule's row up to now.
func (s *Scheduler) take(ctx context.Context, sc Schedule, now time.Time) (st Standing, err error) {
	err = s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		const first = `insert into public.schedules (name, spec, seen) values ($1, $2, $3) on conflict (name) do nothing`
		if _, err := tx.Exec(ctx, first, sc.Name, sc.Spec, now); err != nil {
			return err
		}
		if st, err = scanStanding(tx.QueryRow(ctx, standings+` where name = $1 for update`, sc.Name)); err != nil {
			return err
		}
		if st.Spec != sc.Spec || st.Seen.After(now.Add(ahead)) {
			const anew = `update public.schedules set spec = $2, seen = $3, missed_at = case when missed_at > $3 then $3 else missed_at end,
	missed_told = case when missed_told > $3 then $3 else missed_told end where name = $1`
			_, err := tx.Exec(ctx, anew, sc.Name, sc.Spec, now)
			return err
		}
		var passed, before, newest time.Time
		n := int64(0)
		for passed = sc.Times.Next(st.Seen); !passed.IsZero() && !passed.After(now); passed = sc.Times.Next(passed) {
			before, newest = newest, passed
			n++
		}
		if n == 0 {
			return nil
		}
		if st.AtWork() { // the one before it has not ended
			st.Missed, st.MissedAt = st.Missed+n, &newest
		} else {
			if n > 1 {
				st.Missed, st.MissedAt = st.Missed+n-1, &before
			}
			st.Due, st.Run, st.EndedAt, st.Tries = &newest, nil, nil, 0
			const anew = `update public.schedules set errors = 0, not_before = null, worker = null, beat = null,
	ok = 0, failed = 0, skipped = 0, error = null where name = $1`
			if _, err := tx.Exec(ctx, anew, sc.Name); err != nil {
				return err
			}
		}
		st.Seen = newest
		if err := failpoint.Hit("schedule.taking"); err != nil {
			return err
		}
		const take = `update public.schedules set seen = $2, due = $3, run = $4, ended_at = $5, tries = $6, missed = $7, missed_at = $8 where name = $1`
		_, err := tx.Exec(ctx, take, sc.Name, st.Seen, st.Due, st.Run, st.EndedAt, st.Tries, st.Missed, st.MissedAt)
		return err
	})
	if err == nil {
		err = failpoint.Hit("schedule.taken")
	}
	return st, err
}

func (s *Scheduler) tellMissed(ctx context.Context, st Standing) error {
	s.o.Alarm(ctx, Alarm{Code: CodeMissed, Schedule: st.Name, Due: *st.MissedAt, Missed: st.Missed})
	return s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `update public.schedules set missed_told = $2 where name = $1`, st.Name, st.MissedAt)
		return err
	})
}

// enqueue makes the job of a due time, unless there is one.
func (s *Scheduler) enqueue(ctx context.Context, sc Schedule, due time.Time) error {
	o := &river.InsertOpts{UniqueOpts: river.UniqueOpts{ByArgs: true, ByState: open}}
	if sc.Jitter > 0 {
		o.ScheduledAt = due.Add(rand.N(sc.Jitter))
	}
	_, err := s.river.Insert(ctx, dueArgs{Schedule: sc.Name, Due: due}, o)
	return err
}

// see looks whether a due time is over, and works on it in this server if it is not and nobody does.
func (s *Scheduler) see(ctx context.Context, job dueArgs) (over bool, err error) {
	st, found, err := s.standing(ctx, job.Schedule)
	switch {
	case err != nil:
		return false, err
	case !found || !st.AtWork() || !st.Due.Equal(job.Due):
		return true, nil // it is over, or was never taken on
	case !s.knows(job.Schedule):
		// A server with another configuration has it, or it was taken out of all of them.
		return time.Since(job.Due) > time.Hour, nil
	}
	claimed, err := uuid.NewV7()
	if err != nil {
		return false, err
	}
	var got bool
	err = s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		const claim = `update public.schedules set worker = $3, beat = now() where name = $1 and due = $2 and ended_at is null
and (worker is null or beat < now() - $4::interval) and (not_before is null or not_before <= now())`
		tag, err := tx.Exec(ctx, claim, job.Schedule, job.Due, claimed, s.o.StaleAfter)
		got = tag.RowsAffected() == 1
		return err
	})
	if err != nil || !got {
		return false, err
	}
	t := &Taken{Schedule: st.Name, Due: *st.Due, Tries: st.Tries, errors: st.errors, claim: claimed, s: s}
	if st.Run != nil {
		t.Run = *st.Run
	}
	s.working.Go(func() {
		if err := s.carry(t); err != nil {
			s.o.Logger.Error("a due time of a schedule; it is gone on with", "schedule", t.Schedule, "due_at", t.Due, "error", err)
		}
	})
	return false, nil
}

// carry works on a due time that this server has claimed, and gives it back.
func (s *Scheduler) carry(t *Taken) error {
	going := context.WithoutCancel(s.stopping) // what has been done is told, also when the server is to stop
	working, lose := context.WithCancelCause(s.stopping)
	defer lose(nil)
	beating, stop := context.WithCancel(going)
	var beats sync.WaitGroup
	beats.Go(func() { s.beat(beating, t, lose) })
	defer beats.Wait()
	defer stop() // not before it is given back: an alarm may take its time
	r, err := s.o.Do(working, t)
	if errors.Is(context.Cause(working), errLost) {
		return errLost
	}
	if err == nil && r.Ended != nil {
		err = s.end(going, t, *r.Ended)
	}
	if err == nil || s.stopping.Err() != nil {
		return s.giveBack(going, t, r.Again, nil)
	}
	return errors.Join(err, s.giveBack(going, t, min(retryLeast<<min(t.errors, 10), retryMost), err))
}

// beat gives signs of life until ctx ends, or somebody else has claimed the due time: then lose ends the work on it.
func (s *Scheduler) beat(ctx context.Context, t *Taken, lose context.CancelCauseFunc) {
	ticker := time.NewTicker(s.o.StaleAfter / 5)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		err := s.inMain(ctx, func(tx *postgres.OwnerTx) error {
			tag, err := tx.Exec(ctx, `update public.schedules set beat = now() where name = $1 and worker = $2`, t.Schedule, t.claim)
			if err == nil && tag.RowsAffected() == 0 {
				err = errLost
			}
			return err
		})
		if errors.Is(err, errLost) {
			lose(errLost)
			return
		}
		if err != nil && ctx.Err() == nil {
			s.o.Logger.Warn("give a sign of life", "schedule", t.Schedule, "error", err)
		}
	}
}

// end writes how the work on a due time ended. The alarm comes first: it may come twice, and is never lost.
func (s *Scheduler) end(ctx context.Context, t *Taken, o Outcome) error {
	if !o.Good() {
		a := Alarm{Code: CodeFailed, Schedule: t.Schedule, Due: t.Due, OK: o.OK, Failed: o.Failed, Error: o.Err}
		if t.Run != uuid.Nil {
			a.Run = &t.Run
		}
		s.o.Alarm(ctx, a)
	}
	if err := failpoint.Hit("schedule.ending"); err != nil {
		return err
	}
	return s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		const end = `update public.schedules set ended_at = now(), ok = $4, failed = $5, skipped = $6, error = nullif($7, '')
where name = $1 and due = $2 and worker = $3 and ended_at is null`
		_, err := tx.Exec(ctx, end, t.Schedule, t.Due, t.claim, o.OK, o.Failed, o.Skipped, o.Err)
		return err
	})
}

// giveBack lets any server go on with a due time after a while.
func (s *Scheduler) giveBack(ctx context.Context, t *Taken, after time.Duration, why error) error {
	n := 0
	if why != nil {
		if n = t.errors + 1; n == stuckAfter {
			s.o.Alarm(ctx, Alarm{Code: CodeStuck, Schedule: t.Schedule, Due: t.Due, Error: fault.Of(why).Message})
		}
	}
	return s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		const back = `update public.schedules set worker = null, beat = null, errors = $4, not_before = now() + $5::interval
where name = $1 and due = $2 and worker = $3`
		_, err := tx.Exec(ctx, back, t.Schedule, t.Due, t.claim, n, after)
		return err
	})
}

func (s *Scheduler) knows(name string) bool {
	for _, sc := range s.o.Schedules {
		if sc.Name == name {
			return true
		}
	}
	return false
}

// standing reads one row.
func (s *Scheduler) standing(ctx context.Context, name string) (st Standing, found bool, err error) {
	err = s.inMain(ctx, func(tx *postgres.OwnerTx) error {
		st, err = scanStanding(tx.QueryRow(ctx, standings+` where name = $1`, name))
		return err
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return st, false, nil
	}
	return st, err == nil, err
}
