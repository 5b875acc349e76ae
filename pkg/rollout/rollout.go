// Package rollout runs one kind of work over many tenants, durably. A run and its tasks are rows in the main group's
// database: any number of processes claim tasks, and any of them may die at any moment.
//
// It promises: a task is at work in one process at a time, as long as that process gives signs of life, and is taken up
// by another one when it does not; waves begin one after another; a tenant that is busy is set aside and tried again
// later instead of holding up the others; a run that is paused, interrupted or killed goes on where it was. What makes
// a change happen exactly once is not the task but the change itself: its ledger row or mark, in its own transaction.
package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options is what a Runner needs.
type Options struct {
	DB *postgres.DB
	// StaleAfter is how long a task's process may give no sign of life before another one takes the task up; 0 is 10
	// seconds.
	StaleAfter time.Duration
	// Marker sets restore points before runs that change tenants; nil: there are none.
	Marker *registry.Marker
	Logger *slog.Logger
}

// Runner plans runs and works on them. It is safe for concurrent use.
type Runner struct{ o Options }

// New checks the options.
func New(o Options) (*Runner, error) {
	if o.DB == nil || o.Logger == nil {
		return nil, errors.New("rollout: DB and Logger must be given")
	}
	if o.StaleAfter == 0 {
		o.StaleAfter = 10 * time.Second
	}
	return &Runner{o: o}, nil
}

// Prefix is what the kinds of runs begin with, among the operations.
const Prefix = "run."

// Spec says what a run is to do.
type Spec struct {
	Kind    string // Prefix and a word
	Actor   string // who asked, for the audit trail
	Request any    // what a process that resumes the run must know; written as JSON
	Items   []Item // in the order in which they are to be begun
	// Canary is how many tenants are a wave of their own before the others: a failure among them ends the run. They are
	// spread evenly over Items. 0: none.
	Canary int
	// Wave divides the others; the zero Wave is one wave of all.
	Wave        Wave
	Pause       time.Duration // between two waves
	MaxFailures int           // begin no more once so many have failed; 0: no bound
	// Alone refuses a run while another one of its kind is open that has tenants in common with it, and goes on with
	// that one when it was asked for by the same request. One whose processes are dead is aborted instead.
	Alone bool
	// Rivals are other kinds whose open runs stand in the way of one that is to be Alone: one run would take the tenants
	// where another takes them from. Each of them names all the others.
	Rivals []string
	// Join goes on with an open run of its kind on the same tenants that was asked for by the same request, and minds no
	// other one.
	Join bool
}

// Item is one tenant of a run.
type Item struct {
	Tenant   tenant.Tenant
	From, To int // versions, for a migration; 0 otherwise
}

// Wave is the size of a wave: a share of the tenants in percent, or their number.
type Wave struct{ Percent, Count int }

// ParseWave reads "10%" or "50".
func ParseWave(s string) (Wave, error) {
	var w Wave
	var n int
	var rest string
	switch k, _ := fmt.Sscanf(s, "%d%s", &n, &rest); {
	case s == "":
		return w, nil
	case k == 2 && rest == "%" && n >= 1 && n <= 100:
		w.Percent = n
	case k == 1 && n >= 1:
		w.Count = n
	default:
		return w, fault.New(fault.Invalid, "%q is no size of a wave", s).WithCode("bad_wave").WithHint("write for example 10%% or 50")
	}
	return w, nil
}

func (w Wave) size(tenants int) int {
	switch {
	case w.Percent > 0:
		return max(1, (tenants*w.Percent+99)/100)
	case w.Count > 0:
		return w.Count
	}
	return max(1, tenants)
}

// Waves is the wave of each item, counting from 0: the canaries first, if there are any.
func (s Spec) Waves() []int {
	n := len(s.Items)
	of := make([]int, n)
	first := 0
	canary := min(s.Canary, n)
	if canary > 0 {
		for i := range of {
			of[i] = -1
		}
		for k := range canary {
			of[(2*k+1)*n/(2*canary)] = 0
		}
		first = 1
	}
	size, placed := s.Wave.size(n-canary), 0
	for i := range of {
		if canary > 0 && of[i] == 0 {
			continue
		}
		of[i] = first + placed/size
		placed++
	}
	return of
}

// Run is a run as it stands.
type Run struct {
	ID          uuid.UUID
	Kind        string
	State       string // registry.Running, Paused, Done, Failed or Aborted
	Actor       string
	Request     json.RawMessage
	Error       json.RawMessage // why it was ended, where it did not end by itself
	Wave, Waves int             // the wave at work, counting from 0
	WaveAfter   time.Time
	Canary      bool
	MaxFailures int
	CreatedAt   time.Time
	FinishedAt  *time.Time
	Alive       bool // a process has given a sign of life a short while ago
	Counts
}

// Counts is how far a run is.
type Counts struct {
	Queued, Running, OK, Skipped, Failed int
}

// Tasks is the number of a run's tasks.
func (c Counts) Tasks() int { return c.Queued + c.Running + c.OK + c.Skipped + c.Failed }

// Left is the number of tasks that have not ended.
func (c Counts) Left() int { return c.Queued + c.Running }

// Over reports whether a run has ended; resuming or retrying may still open one that has failed.
func (r Run) Over() bool {
	return r.State == registry.Done || r.State == registry.Failed || r.State == registry.Aborted
}

// plannedRequest is what operations.request holds of a run.
type plannedRequest struct {
	Request json.RawMessage `json:"request"`
	Canary  int             `json:"canary,omitempty"`
}

// Plan stores a run. joined: it is another process's, which does the same. Conflict or Locked: another run stands in
// the way; Spec.Alone says when.
func (r *Runner) Plan(ctx context.Context, s Spec) (run Run, joined bool, err error) {
	if len(s.Items) == 0 {
		return run, false, fault.New(fault.Invalid, "a run needs a tenant").WithCode("no_tenants")
	}
	id, err := uuid.NewV7()
	if err != nil {
		return run, false, err
	}
	request, err := json.Marshal(s.Request)
	if err != nil {
		return run, false, fmt.Errorf("write request: %w", err)
	}
	body, err := json.Marshal(plannedRequest{Request: request, Canary: s.Canary})
	if err != nil {
		return run, false, fmt.Errorf("write request: %w", err)
	}
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		if s.Alone || s.Join {
			// Who plans a run of this kind waits for who plans another: a row lock would lock nothing when there is none.
			if _, err := tx.Exec(ctx, `select pg_catalog.pg_advisory_xact_lock($1::int4, pg_catalog.hashtext($2))`, lockPlan, slices.Min(s.kinds())); err != nil {
				return err
			}
			other, found, err := r.inTheWay(ctx, tx, s, body)
			if err != nil || found {
				id, joined = other, found
				return err
			}
		}
		if err := failpoint.Hit("run.planning"); err != nil {
			return err
		}
		return insertRun(ctx, tx, id, s, body)
	})
	if err != nil {
		return run, false, err
	}
	if err := failpoint.Hit("run.planned"); err != nil {
		return run, false, err
	}
	run, err = r.Show(ctx, id)
	return run, joined, err
}

// lockPlan is the first key of the advisory lock of those who plan a run. Only its kind's hash follows: kinds that meet
// in it wait for each other, and nothing worse.
const lockPlan = 7302660

// kinds are those whose runs stand in each other's way.
func (s Spec) kinds() []string { return append([]string{s.Kind}, s.Rivals...) }

// inTheWay looks for an open run of the same kind, or of a rival, on the same tenants: one to be joined, or one that must
// end first. Those without a living process are aborted.
func (r *Runner) inTheWay(ctx context.Context, tx *postgres.OwnerTx, s Spec, body []byte) (id uuid.UUID, join bool, err error) {
	numbers := make([]int32, len(s.Items))
	for i, it := range s.Items {
		numbers[i] = it.Tenant.Number
	}
	const open = `select o.id, o.state, o.kind = $5 and o.request = $2::jsonb, o.actor, coalesce(o.heartbeat, o.created_at) > now() - $3::interval
from public.operations o where o.kind = any($1) and o.state in ('running', 'paused')
and exists (select from public.tasks t where t.run = o.id and t.state in ('queued', 'running') and t.tenant = any($4))
order by o.id for update`
	type other struct {
		id          uuid.UUID
		state       string
		same, alive bool
		actor       string
	}
	rows, err := tx.Query(ctx, open, s.kinds(), body, r.o.StaleAfter, numbers, s.Kind)
	if err != nil {
		return id, false, err
	}
	others, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (o other, err error) {
		return o, row.Scan(&o.id, &o.state, &o.same, &o.actor, &o.alive)
	})
	if err != nil {
		return id, false, err
	}
	for _, o := range others {
		switch {
		case !s.Alone && !o.same:
			continue
		case o.state == registry.Paused:
			return id, false, fault.New(fault.Locked, "the run %s (by %s) is paused and has the same tenants", o.id, o.actor).
				WithCode("run_paused").WithHint("oneo migrate run resume %s, or oneo migrate run abort %s", o.id, o.id)
		case o.same:
			return o.id, true, nil
		case o.alive:
			return id, false, fault.New(fault.Locked, "the run %s (by %s) is at work on the same tenants", o.id, o.actor).
				WithCode("run_at_work").WithHint("oneo migrate run show %s", o.id)
		}
		if err := end(ctx, tx, o.id, registry.Aborted, fault.New(fault.Conflict, "its process died and another run took its place").WithCode("superseded")); err != nil {
			return id, false, err
		}
		r.o.Logger.WarnContext(ctx, "a run whose process died is aborted: another one takes its place", "run", o.id)
	}
	return id, false, nil
}

func insertRun(ctx context.Context, tx *postgres.OwnerTx, id uuid.UUID, s Spec, body []byte) error {
	waves := s.Waves()
	n := len(s.Items)
	ordinals, numbers, of := make([]int32, n), make([]int32, n), make([]int32, n)
	slugs, groups, from, to := make([]string, n), make([]string, n), make([]int32, n), make([]int32, n)
	for i, it := range s.Items {
		ordinals[i], numbers[i], of[i] = int32(i), it.Tenant.Number, int32(waves[i])
		slugs[i], groups[i], from[i], to[i] = it.Tenant.Slug.String(), it.Tenant.Group, int32(it.From), int32(it.To)
	}
	const operation = `insert into public.operations (id, kind, state, step, request, actor, attempts, started_at, heartbeat)
values ($1, $2, 'running', 'begun', $3, $4, 1, now(), now())`
	if _, err := tx.Exec(ctx, operation, id, s.Kind, body, s.Actor); err != nil {
		return err
	}
	const run = `insert into public.runs (id, waves, pause, max_failures) values ($1, $2, $3, nullif($4::int, 0))`
	if _, err := tx.Exec(ctx, run, id, slices.Max(waves)+1, s.Pause, s.MaxFailures); err != nil {
		return err
	}
	const tasks = `insert into public.tasks (run, ordinal, tenant, slug, group_name, wave, from_version, to_version)
select $1, o, t, s, g, w, f, v from unnest($2::int4[], $3::int4[], $4::text[], $5::text[], $6::int4[], $7::int4[], $8::int4[]) as x (o, t, s, g, w, f, v)`
	if _, err := tx.Exec(ctx, tasks, id, ordinals, numbers, slugs, groups, of, from, to); err != nil {
		return err
	}
	return registry.Audit(ctx, tx, registry.AuditEntry{
		Actor: s.Actor, Action: s.Kind, Details: map[string]any{"run": id, "tenants": n, "request": s.Request},
	})
}

// inMain runs a transaction on the tables of runs.
func (r *Runner) inMain(ctx context.Context, fn func(*postgres.OwnerTx) error) error {
	return r.o.DB.AsOwner(ctx, postgres.MainGroup, fn)
}
