package rollout

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// settled is how a run stood when a process last wrote to it.
type settled struct {
	run     Run
	counted int           // failures that count against the bound
	idle    time.Duration // nothing can be claimed for as long as this
	at      time.Time
}

// bound is how many more failures end the run.
func (s settled) bound() int64 {
	switch {
	case s.run.Canary && s.run.Wave == 0:
		return 1
	case s.run.MaxFailures > 0:
		return int64(max(1, s.run.MaxFailures-s.counted))
	}
	return math.MaxInt64
}

const (
	// idleMost is how often a process with nothing to do looks again.
	idleMost  = 500 * time.Millisecond
	idleLeast = 20 * time.Millisecond
)

// settle writes what has been done, gives a sign of life, takes up what dead processes left, moves on to the next wave
// or ends the run, and claims up to want tasks: one transaction, which the run's processes make one after another.
func (w *crew) settle(ctx context.Context, want int) (settled, error) {
	var s settled
	var claimed []Task
	sign := time.Since(w.began)
	err := w.inMain(ctx, func(tx *postgres.OwnerTx) error {
		s, claimed = settled{}, nil
		// The operation first, as whoever pauses or aborts the run does.
		const lock = `select o.state from public.operations o join public.runs r on r.id = o.id where o.id = $1 for update`
		var state string
		if err := tx.QueryRow(ctx, lock, w.id).Scan(&state); err != nil {
			return err
		}
		if err := w.write(ctx, tx); err != nil {
			return err
		}
		if err := failpoint.Hit("run.settling"); err != nil {
			return err
		}
		if err := w.beat(ctx, tx); err != nil {
			return err
		}
		if w.doubt {
			if err := w.disown(ctx, tx); err != nil {
				return err
			}
		}
		var err error
		if s.run, err = w.show(ctx, tx, w.id); err != nil {
			return err
		}
		if s.run.State != registry.Running {
			return tally(ctx, tx, w.id)
		}
		var next *time.Duration
		const stand = `select (select count(*) from public.tasks t where t.run = r.id and t.state = 'failed') - r.forgiven,
	(select count(*) from public.tasks t where t.run = r.id and t.wave = r.wave and t.state in ('queued', 'running')),
	greatest(r.wave_after, (select min(t.not_before) from public.tasks t where t.run = r.id and t.wave = r.wave and t.state = 'queued')) - now()
from public.runs r where r.id = $1`
		var inWave int
		if err := tx.QueryRow(ctx, stand, w.id).Scan(&s.counted, &inWave, &next); err != nil {
			return err
		}
		if ended, err := w.finish(ctx, tx, &s, inWave); err != nil || ended {
			return err
		}
		if inWave == 0 {
			const advance = `update public.runs set wave = wave + 1, wave_after = now() + pause where id = $1 returning wave, wave_after, pause`
			var wait time.Duration
			if err := tx.QueryRow(ctx, advance, w.id).Scan(&s.run.Wave, &s.run.WaveAfter, &wait); err != nil {
				return err
			}
			next = &wait
		}
		if want > 0 && (next == nil || *next <= 0) {
			if claimed, err = w.claim(ctx, tx, s.run.Wave, want); err != nil {
				return err
			}
			s.run.Queued -= len(claimed)
			s.run.Running += len(claimed)
		}
		s.idle = idleMost
		if next != nil && *next > 0 {
			s.idle = min(s.idle, max(*next, idleLeast))
		}
		return nil
	})
	if w.doubt = err != nil; w.doubt {
		return s, err
	}
	w.sign.Store(int64(sign))
	if err := failpoint.Hit("run.settled"); err != nil {
		return s, err
	}
	s.at = time.Now()
	if len(claimed) == want && want > 0 {
		s.idle = 0
	}
	for _, e := range w.done {
		delete(w.held, int32(e.task.Ordinal))
		if e.failed {
			w.unwritten.Add(-1)
		}
	}
	for _, t := range claimed {
		w.held[int32(t.Ordinal)] = struct{}{}
	}
	w.bound.Store(s.bound())
	w.done, w.lost = nil, time.Time{}
	w.queue = append(w.queue, claimed...)
	w.last = s
	return s, nil
}

// finish ends the run where it is to end: nothing is left, too many have failed, or a canary has.
func (w *crew) finish(ctx context.Context, tx *postgres.OwnerTx, s *settled, inWave int) (bool, error) {
	var state string
	var why *fault.Fault
	switch r := s.run; {
	case r.Left() == 0 && r.Failed == 0:
		state = registry.Done
	case r.Left() == 0:
		state, why = registry.Failed, fault.New(fault.Unfit, "%d of %d tenants failed", r.Failed, r.Tasks()).WithCode("tenants_failed").
			WithHint("oneo migrate run retry %s", r.ID)
	case r.MaxFailures > 0 && s.counted >= r.MaxFailures:
		state, why = registry.Failed, fault.New(fault.Unfit, "%d tenants have failed: no more are begun", s.counted).WithCode("too_many_failures").
			WithHint("oneo migrate run retry %s tries them again and goes on", r.ID)
	case r.Canary && r.Wave == 0 && s.counted > 0:
		state, why = registry.Failed, fault.New(fault.Unfit, "a canary has failed: the other tenants are not begun").WithCode("canary_failed").
			WithHint("oneo migrate run retry %s tries it again and goes on", r.ID)
	default:
		return false, nil
	}
	if err := end(ctx, tx, w.id, state, why); err != nil {
		return false, err
	}
	err := registry.Audit(ctx, tx, registry.AuditEntry{Actor: s.run.Actor, Action: s.run.Kind + ".ended", Details: map[string]any{
		"run": w.id, "state": state, "ok": s.run.OK, "skipped": s.run.Skipped, "failed": s.run.Failed, "left": s.run.Left(),
	}})
	if err != nil {
		return false, err
	}
	s.run, err = w.show(ctx, tx, w.id)
	return true, err
}

// write stores what has become of tasks. One that another process has taken up meanwhile, believing this one dead, is
// that process's to tell.
func (w *crew) write(ctx context.Context, tx *postgres.OwnerTx) error {
	n := len(w.done)
	if n == 0 {
		return nil
	}
	ordinals, states, waits := make([]int32, n), make([]string, n), make([]int64, n)
	from, to, ms := make([]int32, n), make([]int32, n), make([]int64, n)
	results, errs, fewer := make([][]byte, n), make([][]byte, n), make([]int32, n)
	for i, e := range w.done {
		ordinals[i], from[i], to[i], ms[i] = int32(e.task.Ordinal), int32(e.out.From), int32(e.out.To), e.out.Duration.Milliseconds()
		switch {
		case e.back:
			states[i], fewer[i] = "queued", 1
		case e.wait > 0:
			states[i], waits[i] = "queued", e.wait.Milliseconds()
		default:
			states[i] = string(e.out.Status)
		}
		var err error
		if results[i], err = resultOf(e.out); err != nil {
			return fmt.Errorf("write the result of %s: %w", e.task.Slug, err)
		}
		if e.out.Err != nil {
			if errs[i], err = json.Marshal(causeOf(e.out.Err)); err != nil {
				return fmt.Errorf("write the error of %s: %w", e.task.Slug, err)
			}
		}
	}
	const update = `update public.tasks t set state = x.state, attempts = t.attempts - x.fewer,
	not_before = case when x.wait > 0 then now() + x.wait * interval '1 millisecond' else t.not_before end,
	worker = case when x.state = 'queued' then null else t.worker end,
	from_version = case when x.state = 'queued' then t.from_version else coalesce(nullif(x.from_version, 0), t.from_version) end,
	to_version = case when x.state = 'queued' then t.to_version else coalesce(nullif(x.to_version, 0), t.to_version) end,
	result = x.result, error = x.error, duration_ms = x.ms, finished_at = case when x.state = 'queued' then null else now() end
from unnest($3::int4[], $4::text[], $5::int8[], $6::int4[], $7::int4[], $8::int8[], $9::jsonb[], $10::jsonb[], $11::int4[])
	as x (ordinal, state, wait, from_version, to_version, ms, result, error, fewer)
where t.run = $1 and t.ordinal = x.ordinal and t.worker = $2 and t.state = 'running'`
	_, err := tx.Exec(ctx, update, w.id, w.worker, ordinals, states, waits, from, to, ms, results, errs, fewer)
	return err
}

// beat gives a sign of life, and takes what dead processes had in hand away from them.
func (w *crew) beat(ctx context.Context, tx *postgres.OwnerTx) error {
	if _, err := tx.Exec(ctx, `update public.operations set heartbeat = now() where id = $1`, w.id); err != nil {
		return err
	}
	const alive = `update public.tasks set heartbeat = now() where run = $1 and worker = $2 and state = 'running'
and heartbeat < now() - $3::interval / 10`
	if _, err := tx.Exec(ctx, alive, w.id, w.worker, w.Runner.o.StaleAfter); err != nil {
		return err
	}
	const dead = `update public.tasks set state = 'queued', worker = null where run = $1 and worker <> $2 and state = 'running'
and heartbeat < now() - $3::interval`
	tag, err := tx.Exec(ctx, dead, w.id, w.worker, w.Runner.o.StaleAfter)
	if err == nil && tag.RowsAffected() > 0 {
		w.Runner.o.Logger.WarnContext(ctx, "another process of this run is dead: its tenants are taken up", "run", w.id, "tenants", tag.RowsAffected())
	}
	return err
}

// disown hands back what was claimed for this process by a transaction whose end it never heard of: it would hold these
// tasks for as long as it lives, and begin none of them.
func (w *crew) disown(ctx context.Context, tx *postgres.OwnerTx) error {
	const back = `update public.tasks set state = 'queued', worker = null, attempts = attempts - 1
where run = $1 and worker = $2 and state = 'running' and ordinal <> all($3::int4[])`
	known := slices.AppendSeq(make([]int32, 0, len(w.held)), maps.Keys(w.held)) // never null
	_, err := tx.Exec(ctx, back, w.id, w.worker, known)
	return err
}

// claim takes tasks of a wave that may be begun, in the order of the plan.
func (w *crew) claim(ctx context.Context, tx *postgres.OwnerTx, wave, want int) ([]Task, error) {
	// The group is the tenant's of now: it may have been moved since the plan was made. By their places: how many tasks a new run has is in no statistics, and a join that is planned for one task may
	// look through all of them for each that is claimed.
	const claim = `update public.tasks t set state = 'running', worker = $4, heartbeat = now(), attempts = t.attempts + 1,
	started_at = coalesce(t.started_at, now()) where t.ctid = any(array(
	select q.ctid from public.tasks q where q.run = $1 and q.wave = $2 and q.state = 'queued' and q.not_before <= now()
	order by q.ordinal limit $3 for update skip locked))
returning t.ordinal, t.tenant, t.slug, coalesce((select n.group_name from public.tenants n where n.number = t.tenant), t.group_name), t.wave, coalesce(t.from_version, 0), coalesce(t.to_version, 0), t.attempts`
	rows, err := tx.Query(ctx, claim, w.id, wave, want, w.worker)
	if err != nil {
		return nil, err
	}
	tasks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Task, err error) {
		t.Run = w.id
		return t, row.Scan(&t.Ordinal, &t.Number, &t.Slug, &t.Group, &t.Wave, &t.From, &t.To, &t.Attempts)
	})
	// An update returns its rows in no order.
	slices.SortFunc(tasks, func(a, b Task) int { return a.Ordinal - b.Ordinal })
	return tasks, err
}
