package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// Task is one tenant's part of a run.
type Task struct {
	Run      uuid.UUID
	Ordinal  int
	Number   int32
	Slug     string
	Group    string
	Wave     int
	From, To int // versions as they were planned
	Attempts int // this one included
}

// Outcome is how the work on a task ended.
type Outcome struct {
	Status   fleet.Status // empty: OK, or Failed where there is an error
	From, To int
	Result   any // JSON; may be nil
	Err      error
	// Undone hands the task back: its work was broken off because the process is to stop. Nothing else is written of it.
	Undone   bool
	Duration time.Duration // filled in by Work
}

// WorkOptions says how a process works on a run.
type WorkOptions struct {
	Jobs int // at one time; at least 1
	// Changes says that the run changes tenants: restore points are set before its first one.
	Changes bool
	// Patience is for how long a tenant that is busy, or whose database is away, is tried again; 0 is two minutes.
	Patience time.Duration
	// Timeout ends the work on one tenant; 0: none.
	Timeout time.Duration
	// Hold says why no task is to be begun at the moment, or is empty; may be nil. It is asked often.
	Hold func() string
	// Yields says whether tenants are served meanwhile: then one worker is at work at a time, and rests after each tenant until
	// it has worked for Share percent of the time, for a second at most. May be nil.
	Yields func() bool
	Share  int // 1 to 100
	// Told is called with what happens, never twice at a time; may be nil.
	Told func(Event)
}

// Event is something that happened in a run. Exactly one of Task and Held is given, or neither: then only the counts
// are news.
type Event struct {
	Task    *Task
	Outcome Outcome
	Again   time.Duration // the task was set aside, and is tried again after so long
	Held    string        // why nothing is begun at the moment
	Yields  bool          // tenants are served meanwhile, since the last Event
	Counts  Counts        // of the whole run, when it was last looked at
	Run     Run           // its state and wave then; its counts are in Counts
}

// Work carries out tasks of a run until it has ended, or was paused or aborted, and returns how it stands then. Other
// processes may work on it at the same time; what they have in hand is waited for. When ctx ends, the tasks in hand are
// finished with a context that goes on, the others are handed back, and the error is ctx's.
func (r *Runner) Work(ctx context.Context, id uuid.UUID, o WorkOptions, work func(context.Context, Task) Outcome) (Run, error) {
	if o.Patience == 0 {
		o.Patience = 2 * time.Minute
	}
	worker, err := uuid.NewV7()
	if err != nil {
		return Run{}, err
	}
	if o.Changes && r.o.Marker != nil {
		r.mark(ctx, id)
	}
	w := &crew{Runner: r, id: id, worker: worker, o: o, jobs: max(1, o.Jobs), work: work, firstTried: map[int]time.Time{},
		began: time.Now(), held: map[int32]struct{}{}}
	return w.run(ctx)
}

// mark sets the restore points of a run that has begun with no tenant: one in each of its groups, and not one for each tenant. A
// process that finds them there sets none that is remembered.
func (r *Runner) mark(ctx context.Context, id uuid.UUID) {
	k := registry.Marking{Operation: id}
	const ask = `select o.kind, pg_catalog.array_agg(distinct coalesce(n.group_name, t.group_name)::text)
from public.operations o join public.tasks t on t.run = o.id left join public.tenants n on n.number = t.tenant
where o.id = $1 and not exists (select from public.restore_points where operation = $1)
group by o.kind having pg_catalog.bool_and(t.state = 'queued' and t.attempts = 0)`
	err := r.inMain(ctx, func(tx *postgres.OwnerTx) error { return tx.QueryRow(ctx, ask, id).Scan(&k.Kind, &k.Groups) })
	if err == nil {
		r.o.Marker.Mark(ctx, k)
	} else if !errors.Is(err, pgx.ErrNoRows) && ctx.Err() == nil { // if it matters, the work fails by it too
		r.o.Logger.WarnContext(ctx, "no restore point was set before the run", "run", id, "error", err)
	}
}

// crew is one process's work on one run.
type crew struct {
	*Runner
	id, worker uuid.UUID
	o          WorkOptions
	jobs       int
	work       func(context.Context, Task) Outcome

	stopping atomic.Bool // begin nothing more
	turn     sync.Mutex  // of the one that works while others use the database
	tasks    chan Task
	ended    chan ended

	queue  []Task  // claimed and not given to a worker
	inHand int     // given to a worker
	done   []ended // to be written
	// unwritten are failures that the run's rows do not hold yet, bound how many the run may have in all. A worker looks
	// at them itself: it must not begin another tenant before somebody else has counted.
	unwritten  atomic.Int64
	bound      atomic.Int64      // less those that are written
	firstTried map[int]time.Time // of tasks that were set aside
	last       settled
	sign       atomic.Int64       // when the last sign of life was given, in nanoseconds since began
	began      time.Time          // of the monotonic clock
	held       map[int32]struct{} // the ordinals of what was claimed, and is not written yet
	doubt      bool               // whether the last words to the run's rows have arrived is not known
	lost       time.Time          // since when the database has been away
}

type ended struct {
	task   Task
	out    Outcome
	back   bool // not begun
	failed bool // counted as a failure
	wait   time.Duration
}

// lasting reports whether work failed for a reason that does not pass by itself.
func lasting(o Outcome) bool {
	return o.Status == fleet.Failed && !fault.Is(o.Err, fault.Locked) && !fault.Is(o.Err, fault.Unavailable)
}

// silent reports whether this process has given no sign of life for so long that another one may have taken up its tasks:
// it was stopped, or the database was away. What it has not begun is then not its own to begin.
func (w *crew) silent() bool {
	// A task's own sign is renewed when a tenth of the time has passed.
	return time.Since(w.began)-time.Duration(w.sign.Load()) > w.Runner.o.StaleAfter*9/10
}

// oneByOne works at a task as soon as it is its turn, unless nothing is to be begun any more by then.
func (w *crew) oneByOne(ctx context.Context, t Task) (out Outcome, begun bool) {
	yields := w.o.Yields != nil && w.o.Yields()
	if yields {
		w.turn.Lock()
		defer w.turn.Unlock()
	}
	if w.stopping.Load() || w.silent() {
		return out, false
	}
	start := time.Now()
	out = w.guarded(ctx, t)
	if yields && !w.stopping.Load() {
		worked := time.Since(start)
		time.Sleep(min(worked*time.Duration(100-w.o.Share)/time.Duration(w.o.Share), time.Second))
	}
	return out, true
}

func (w *crew) noteFailure() {
	if w.unwritten.Add(1) >= w.bound.Load() {
		w.stopping.Store(true)
	}
}

func (w *crew) run(ctx context.Context) (Run, error) {
	w.bound.Store(math.MaxInt64)
	w.tasks, w.ended = make(chan Task, ahead*w.jobs), make(chan ended, 2*ahead*w.jobs)
	// Finishing a tenant is what leaves it whole; interrupting it would only leave more to do again.
	working := context.WithoutCancel(ctx)
	var workers sync.WaitGroup
	for range w.jobs {
		workers.Go(func() {
			for t := range w.tasks {
				out, begun := w.oneByOne(working, t)
				if !begun {
					w.ended <- ended{task: t, back: true}
					continue
				}
				if out.Undone {
					w.ended <- ended{task: t, back: true}
					continue
				}
				if lasting(out) {
					w.noteFailure()
				}
				w.ended <- ended{task: t, out: out}
			}
		})
	}
	run, err := w.dispatch(ctx)
	w.stopping.Store(true)
	close(w.tasks)
	go func() { workers.Wait(); close(w.ended) }()
	for e := range w.ended {
		w.take(e)
	}
	w.handBack()
	// What is done must be written, also when nobody waits any more.
	last, cancel := context.WithTimeout(working, w.o.lastWords())
	defer cancel()
	for {
		s, serr := w.settle(last, 0)
		if serr == nil {
			run = s.run
			break
		}
		if !passing(serr) || !pause(last, 200*time.Millisecond) {
			return run, errors.Join(err, fmt.Errorf("write what was done: %w", serr))
		}
	}
	if err == nil {
		err = ctx.Err()
	}
	return run, err
}

const (
	// ahead is how many tasks are given out to each worker before it has ended one: it does not stand still while the
	// run's rows are written.
	ahead = 4
	// together is about how many of a worker's tasks are written at one time; twice as many are claimed.
	together = 12
	// written is after how long what was done is written in any case: others want to see it.
	written = 500 * time.Millisecond
)

// due reports whether it is time to write and to claim, although there are tasks left to give out.
func (w *crew) due(beat time.Duration) bool {
	since := time.Since(w.last.at)
	return len(w.done) >= together*w.jobs || len(w.done) > 0 && since > written || since >= beat
}

// lastWords is for how long what was done is tried to be written.
func (o WorkOptions) lastWords() time.Duration { return 10 * time.Second }

// dispatch gives tasks to the workers until the run is over or ctx ends.
func (w *crew) dispatch(ctx context.Context) (Run, error) {
	beat := w.Runner.o.StaleAfter / 5
	held, yields := "", false
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if ctx.Err() != nil {
			return w.last.run, nil
		}
		why := ""
		if w.o.Hold != nil {
			why = w.o.Hold()
		}
		if why != held {
			held = why
			w.tell(Event{Held: why})
		}
		if now := w.o.Yields != nil && w.o.Yields(); now != yields {
			yields = now
			w.tell(Event{Held: held, Yields: now})
		}
		var next chan Task
		var first Task
		if len(w.queue) > 0 && why == "" && !w.stopping.Load() {
			next, first = w.tasks, w.queue[0]
		}
		select {
		case <-ctx.Done():
			w.stopping.Store(true)
			continue
		case next <- first:
			w.queue = w.queue[1:]
			w.inHand++
			if len(w.queue) > 0 {
				continue
			}
		case e := <-w.ended:
			w.take(e)
			if len(w.queue) > 0 && !w.due(beat) {
				continue
			}
			for range len(w.ended) { // what else has ended goes along
				w.take(<-w.ended)
			}
		case <-timer.C:
		}
		if len(w.queue) > 0 && !w.due(beat) && !w.stopping.Load() {
			timer.Reset(min(beat, 100*time.Millisecond))
			continue
		}
		// Looking more often than this finds nothing new: others are at work, a wave waits, or tenants are busy.
		if len(w.done) == 0 && time.Since(w.last.at) < w.last.idle {
			timer.Reset(w.last.idle - time.Since(w.last.at))
			continue
		}
		want := 2*together*w.jobs - len(w.queue) - w.inHand
		if why != "" || w.stopping.Load() {
			want = 0
		}
		s, err := w.settle(ctx, want)
		if err != nil {
			if over, werr := w.unsettled(ctx, err); over {
				return w.last.run, werr
			}
			timer.Reset(500 * time.Millisecond)
			continue
		}
		w.tell(Event{})
		if s.run.State != registry.Running {
			w.stopping.Store(true)
			return s.run, nil
		}
		timer.Reset(min(beat, max(s.idle, time.Millisecond)))
	}
}

// passing reports whether the run's rows may be read and written in a moment.
func passing(err error) bool {
	return fault.Is(err, fault.Unavailable) || fault.Is(err, fault.Locked) || fault.Is(err, fault.Conflict)
}

// unsettled decides what becomes of the work when the run's rows cannot be read or written: a database that is away may
// come back.
func (w *crew) unsettled(ctx context.Context, err error) (over bool, _ error) {
	if ctx.Err() != nil {
		return true, nil
	}
	if !passing(err) {
		return true, err
	}
	if w.lost.IsZero() {
		w.lost = time.Now()
		w.Runner.o.Logger.WarnContext(ctx, "the run's tables cannot be reached; trying again", "run", w.id, "error", err)
	}
	if time.Since(w.lost) > w.o.Patience {
		return true, err
	}
	return false, nil
}

// take notes what has become of a task.
func (w *crew) take(e ended) {
	w.inHand--
	if !e.back {
		e = w.decide(e)
		w.tell(Event{Task: &e.task, Outcome: e.out, Again: e.wait})
		if e.out.Status == fleet.Failed && e.wait == 0 {
			if !lasting(e.out) {
				w.noteFailure() // its patience has ended
			}
			e.failed = true
		}
	}
	w.done = append(w.done, e)
}

// decide sets a task aside whose tenant was busy, for as long as patience lasts.
func (w *crew) decide(e ended) ended {
	if e.out.Err == nil || lasting(e.out) {
		delete(w.firstTried, e.task.Ordinal)
		return e
	}
	first, ok := w.firstTried[e.task.Ordinal]
	if !ok {
		first = time.Now().Add(-e.out.Duration)
		w.firstTried[e.task.Ordinal] = first
	}
	wait := min(500*time.Millisecond<<min(e.task.Attempts-1, 6), 30*time.Second)
	wait += time.Duration(rand.Int64N(int64(wait)/4 + 1))
	if time.Since(first)+wait > w.o.Patience {
		delete(w.firstTried, e.task.Ordinal) // who retries it begins anew
		return e
	}
	e.wait = wait
	return e
}

// handBack returns what was claimed and not begun.
func (w *crew) handBack() {
	for _, t := range w.queue {
		w.done = append(w.done, ended{task: t, back: true})
	}
	w.queue = nil
}

func (w *crew) tell(e Event) {
	if w.o.Told == nil {
		return
	}
	e.Counts, e.Run = w.last.run.Counts, w.last.run
	w.o.Told(e)
}

// guarded does the work; a panic is the tenant's failure.
func (w *crew) guarded(ctx context.Context, t Task) (out Outcome) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			out = Outcome{Err: &fleet.Panic{Value: p, Stack: debug.Stack()}}
		}
		switch {
		case out.Err != nil:
			out.Status = fleet.Failed
		case out.Status == "":
			out.Status = fleet.OK
		}
		out.Duration = time.Since(start)
	}()
	if err := failpoint.Hit("run.claimed"); err != nil {
		return Outcome{Err: err}
	}
	if w.o.Timeout > 0 {
		limit, cancel := context.WithTimeout(ctx, w.o.Timeout)
		defer cancel()
		out = w.work(limit, t)
		if out.Err != nil && limit.Err() != nil {
			out.Err = fault.Wrap(out.Err, fault.Unfit, "the work on this tenant took longer than %s and was ended", w.o.Timeout).
				WithCode("timeout").WithHint("give it longer with --timeout, or look what it waits for")
		}
	} else {
		out = w.work(ctx, t)
	}
	if err := failpoint.Hit("run.worked"); err != nil {
		out.Err = errors.Join(out.Err, err)
	}
	return out
}

func resultOf(o Outcome) (json.RawMessage, error) {
	if o.Result == nil {
		return nil, nil
	}
	return json.Marshal(o.Result)
}

// pause waits; false: ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
