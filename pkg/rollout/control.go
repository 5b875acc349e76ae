package rollout

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

const runQuery = `select o.id, o.kind, o.state, o.actor, o.request, o.error, r.wave, r.waves, r.wave_after, coalesce(r.max_failures, 0),
	o.created_at, o.finished_at, o.state = 'running' and o.heartbeat > now() - $1::interval,
	t.queued, t.running, t.ok, t.skipped, t.failed
from public.operations o join public.runs r on r.id = o.id cross join lateral (
	select count(*) filter (where t.state = 'queued') queued, count(*) filter (where t.state = 'running') running,
		count(*) filter (where t.state = 'ok') ok, count(*) filter (where t.state = 'skipped') skipped, count(*) filter (where t.state = 'failed') failed
	from public.tasks t where t.run = o.id) t`

func scanRun(row pgx.Row) (Run, error) {
	var run Run
	var body json.RawMessage
	err := row.Scan(&run.ID, &run.Kind, &run.State, &run.Actor, &body, &run.Error, &run.Wave, &run.Waves, &run.WaveAfter, &run.MaxFailures,
		&run.CreatedAt, &run.FinishedAt, &run.Alive, &run.Queued, &run.Running, &run.OK, &run.Skipped, &run.Failed)
	if err != nil {
		return run, err
	}
	var p plannedRequest
	if err := json.Unmarshal(body, &p); err != nil {
		return run, fmt.Errorf("read the request of run %s: %w", run.ID, err)
	}
	run.Request, run.Canary = p.Request, p.Canary > 0
	return run, nil
}

// Show reads a run. NotFound: there is none.
func (r *Runner) Show(ctx context.Context, id uuid.UUID) (run Run, err error) {
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		run, err = r.show(ctx, tx, id)
		return err
	})
	return run, err
}

func (r *Runner) show(ctx context.Context, q postgres.Querier, id uuid.UUID) (Run, error) {
	run, err := scanRun(q.QueryRow(ctx, runQuery+` where o.id = $2`, r.o.StaleAfter, id))
	if errors.Is(err, pgx.ErrNoRows) {
		return run, unknownRun(id.String())
	}
	return run, err
}

func unknownRun(name string) error {
	return fault.New(fault.NotFound, "there is no run %s", name).WithCode("unknown_run").WithHint("oneo migrate run list")
}

// Find reads the run of an id, the only one whose id ends in so many characters, or the newest one: "last".
func (r *Runner) Find(ctx context.Context, name string) (run Run, err error) {
	if id, perr := uuid.Parse(name); perr == nil {
		return r.Show(ctx, id)
	}
	var found []Run
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		where, args := ` where right(o.id::text, length($2)) = $2 order by o.id desc limit 2`, []any{r.o.StaleAfter, name}
		if name == "last" {
			where, args = ` order by o.id desc limit 1`, args[:1]
		} else if len(name) < 4 {
			return unknownRun(name)
		}
		rows, err := tx.Query(ctx, runQuery+where, args...)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Run, error) { return scanRun(row) })
		return err
	})
	switch {
	case err != nil:
		return run, err
	case len(found) == 0:
		return run, unknownRun(name)
	case len(found) > 1:
		return run, fault.New(fault.Invalid, "more than one run ends in %s", name).WithCode("ambiguous_run").WithHint("oneo migrate run list")
	}
	return found[0], nil
}

// List reads the newest runs; open: those only that have not ended.
func (r *Runner) List(ctx context.Context, limit int, open bool) (runs []Run, err error) {
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, runQuery+` where not $2 or o.state in ('running', 'paused') order by o.id desc limit $3`, r.o.StaleAfter, open, limit)
		if err != nil {
			return err
		}
		runs, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Run, error) { return scanRun(row) })
		return err
	})
	return runs, err
}

// Reported is a task as it stands.
type Reported struct {
	Task
	State    string
	Duration time.Duration
	Result   json.RawMessage
	Error    *Cause
	Began    *time.Time
	Ended    *time.Time
}

// Cause is why a task failed, or is still to be tried.
type Cause struct {
	Code     string `json:"code"`
	SQLState string `json:"sqlstate,omitempty"`
	Message  string `json:"message"`
	Hint     string `json:"hint,omitempty"`
}

func causeOf(err error) *Cause {
	f := fault.Of(err)
	c := &Cause{Code: f.StableCode(), SQLState: postgres.SQLState(err), Message: f.Message, Hint: f.Hint}
	var p *fleet.Panic
	if f.Kind == fault.Internal && !errors.As(err, &p) {
		c.Message = err.Error()
	}
	return c
}

// Tasks calls fn with each task of a run in the order of the plan, a page at a time; states narrow them.
func (r *Runner) Tasks(ctx context.Context, id uuid.UUID, fn func(Reported) error, states ...string) error {
	const page = 500
	const query = `select ordinal, tenant, slug, group_name, wave, state, coalesce(from_version, 0), coalesce(to_version, 0), attempts,
	coalesce(duration_ms, 0), result, error, started_at, finished_at from public.tasks
where run = $1 and ordinal > $2 and (cardinality($3::text[]) = 0 or state = any($3)) order by ordinal limit $4`
	if states == nil {
		states = []string{}
	}
	for after := -1; ; {
		var found []Reported
		err := r.inMain(ctx, func(tx *postgres.OwnerTx) error {
			rows, err := tx.Query(ctx, query, id, after, states, page)
			if err != nil {
				return err
			}
			found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Reported, err error) {
				var ms int64
				t.Run = id
				err = row.Scan(&t.Ordinal, &t.Number, &t.Slug, &t.Group, &t.Wave, &t.State, &t.From, &t.To, &t.Attempts,
					&ms, &t.Result, &t.Error, &t.Began, &t.Ended)
				t.Duration = time.Duration(ms) * time.Millisecond
				return t, err
			})
			return err
		})
		if err != nil {
			return err
		}
		for _, t := range found {
			if err := fn(t); err != nil {
				return err
			}
			after = t.Ordinal
		}
		if len(found) < page {
			return nil
		}
	}
}

// change sets a run's state where it is one of from, and says no otherwise.
func (r *Runner) change(ctx context.Context, id uuid.UUID, actor, verb string, from []string, do func(ctx context.Context, tx *postgres.OwnerTx) error) (run Run, err error) {
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		var state string
		const lock = `select o.state from public.operations o join public.runs r on r.id = o.id where o.id = $1 for update`
		if err := tx.QueryRow(ctx, lock, id).Scan(&state); errors.Is(err, pgx.ErrNoRows) {
			return unknownRun(id.String())
		} else if err != nil {
			return err
		}
		allowed := false
		for _, s := range from {
			allowed = allowed || s == state
		}
		if !allowed {
			return fault.New(fault.Conflict, "the run %s is %s and cannot be %s", id, state, verb).WithCode("run_state").
				WithHint("oneo migrate run show %s", id)
		}
		if err := do(ctx, tx); err != nil {
			return err
		}
		err := registry.Audit(ctx, tx, registry.AuditEntry{Actor: actor, Action: "run." + verb, Details: map[string]any{"run": id, "from": state}})
		if err != nil {
			return err
		}
		run, err = r.show(ctx, tx, id)
		return err
	})
	return run, err
}

// Pause lets a run's processes finish the tenants in hand and begin no more.
func (r *Runner) Pause(ctx context.Context, id uuid.UUID, actor string) (Run, error) {
	return r.change(ctx, id, actor, "paused", []string{registry.Running, registry.Paused}, func(ctx context.Context, tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `update public.operations set state = 'paused' where id = $1`, id)
		return err
	})
}

// Resume opens a run again that was paused, or ended early: what has failed stays so, and does not count against its
// bound of failures any more. It does nothing to one that is open. Who resumes it works on it then.
func (r *Runner) Resume(ctx context.Context, id uuid.UUID, actor string) (Run, error) {
	return r.change(ctx, id, actor, "resumed", []string{registry.Running, registry.Paused, registry.Failed}, func(ctx context.Context, tx *postgres.OwnerTx) error {
		return open(ctx, tx, id)
	})
}

// Retry queues a run's failed tasks once more, and opens it.
func (r *Runner) Retry(ctx context.Context, id uuid.UUID, actor string) (Run, error) {
	states := []string{registry.Running, registry.Paused, registry.Failed, registry.Done}
	return r.change(ctx, id, actor, "retried", states, func(ctx context.Context, tx *postgres.OwnerTx) error {
		const again = `update public.tasks set state = 'queued', attempts = 0, not_before = now(), worker = null, error = null,
	duration_ms = null, started_at = null, finished_at = null where run = $1 and state = 'failed'`
		tag, err := tx.Exec(ctx, again, id)
		if err != nil || tag.RowsAffected() == 0 {
			return err
		}
		return open(ctx, tx, id)
	})
}

// open makes a run one that is worked on, from its first wave that has a task left.
func open(ctx context.Context, tx *postgres.OwnerTx, id uuid.UUID) error {
	const again = `update public.operations set state = 'running', error = null, result = null, finished_at = null, heartbeat = now()
where id = $1 and (state <> 'failed' or exists (select from public.tasks where run = $1 and state in ('queued', 'running')))`
	if _, err := tx.Exec(ctx, again, id); err != nil {
		return err
	}
	const forgive = `update public.runs set wave_after = now(),
	forgiven = (select count(*) from public.tasks where run = $1 and state = 'failed'),
	wave = coalesce((select min(wave) from public.tasks where run = $1 and state in ('queued', 'running')), wave) where id = $1`
	_, err := tx.Exec(ctx, forgive, id)
	return err
}

// Abort ends a run for good: what is in hand is finished, what is left is never begun.
func (r *Runner) Abort(ctx context.Context, id uuid.UUID, actor string) (Run, error) {
	states := []string{registry.Running, registry.Paused, registry.Failed}
	return r.change(ctx, id, actor, "aborted", states, func(ctx context.Context, tx *postgres.OwnerTx) error {
		return end(ctx, tx, id, registry.Aborted, fault.New(fault.Conflict, "aborted by %s", actor).WithCode("aborted"))
	})
}

// end gives a run its final state, and why.
func end(ctx context.Context, q postgres.Querier, id uuid.UUID, state string, why *fault.Fault) error {
	var reason []byte
	if why != nil {
		var err error
		if reason, err = json.Marshal(causeOf(why)); err != nil {
			return fmt.Errorf("write the end of a run: %w", err)
		}
	}
	const finish = `update public.operations set state = $2, error = $3, finished_at = now() where id = $1`
	if _, err := q.Exec(ctx, finish, id, state, reason); err != nil {
		return err
	}
	return tally(ctx, q, id)
}

// tally writes the counts of an ended run where those read them who read operations. What was in hand may end after it.
func tally(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
	const count = `update public.operations set result = (
	select jsonb_object_agg(state, n) from (select state, count(*) n from public.tasks where run = $1 group by state) t)
where id = $1 and state in ('done', 'failed', 'aborted')`
	_, err := q.Exec(ctx, count, id)
	return err
}
