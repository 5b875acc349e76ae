package rollout

import (
	"context"
	"errors"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// Made tells which of a run's tasks stand, by their tenants' numbers, although no process has written so. It must answer
// only for what the same request, made again, would not do a second time: once the run has ended it is a new one.
type Made func(ctx context.Context, run Run, tasks []Task) (map[int32]bool, error)

// Conclude ends the open runs that have nothing left to do and of which no process gives a sign of life: whoever did the
// last of it died before it could write so. Their state follows from their tasks; those that are open count as done
// where made says that they stand. It returns the runs that it ended. What fails does not stop the others.
func (r *Runner) Conclude(ctx context.Context, made Made) (ended []Run, err error) {
	const left = `select o.id from public.operations o join public.runs r on r.id = o.id
where o.state in ('running', 'paused') and coalesce(o.heartbeat, o.created_at) < now() - $1::interval order by o.id`
	var ids []uuid.UUID
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, left, r.o.StaleAfter)
		if err != nil {
			return err
		}
		ids, err = pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		return err
	})
	errs := []error{err}
	for _, id := range ids {
		run, done, err := r.conclude(ctx, id, made)
		errs = append(errs, err)
		if done {
			ended = append(ended, run)
		}
	}
	return ended, errors.Join(errs...)
}

// errUnfinished ends the look at a run that has something left to do.
var errUnfinished = errors.New("the run has something left to do")

func (r *Runner) conclude(ctx context.Context, id uuid.UUID, made Made) (run Run, done bool, err error) {
	if run, err = r.Show(ctx, id); err != nil {
		return run, false, err
	}
	stand, err := r.standing(ctx, run, made)
	if err == nil {
		run, err = r.endStale(ctx, id, stand)
	}
	if errors.Is(err, errUnfinished) {
		return run, false, nil
	}
	return run, err == nil, err
}

// standing are the ordinals of a run's open tasks, if all of them stand.
func (r *Runner) standing(ctx context.Context, run Run, made Made) (ordinals []int32, err error) {
	var page []Task
	ask := func() error {
		if len(page) == 0 {
			return nil
		}
		if made == nil {
			return errUnfinished
		}
		stand, err := made(ctx, run, page)
		if err != nil {
			return err
		}
		for _, t := range page {
			if !stand[t.Number] {
				return errUnfinished
			}
			ordinals = append(ordinals, int32(t.Ordinal))
		}
		page = page[:0]
		return nil
	}
	const most = 500 // of a run with thousands left the first few say enough
	err = r.Tasks(ctx, run.ID, func(t Reported) error {
		if page = append(page, t.Task); len(page) == most {
			return ask()
		}
		return nil
	}, "queued", "running")
	if err == nil {
		err = ask()
	}
	return ordinals, err
}

// endStale writes that the tasks are done and ends the run, if it has none left then and still nobody works on it.
func (r *Runner) endStale(ctx context.Context, id uuid.UUID, ordinals []int32) (run Run, err error) {
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		var stale bool
		const lock = `select o.state in ('running', 'paused') and coalesce(o.heartbeat, o.created_at) < now() - $2::interval
from public.operations o where o.id = $1 for update`
		if err := tx.QueryRow(ctx, lock, id, r.o.StaleAfter).Scan(&stale); err != nil {
			return err
		}
		if !stale {
			return errUnfinished
		}
		const write = `update public.tasks set state = 'ok', worker = null, error = null, finished_at = now()
where run = $1 and ordinal = any($2) and state in ('queued', 'running')`
		if _, err := tx.Exec(ctx, write, id, ordinals); err != nil {
			return err
		}
		w, s := &crew{Runner: r, id: id}, settled{}
		if s.run, err = r.show(ctx, tx, id); err != nil {
			return err
		}
		if s.run.Left() > 0 {
			return errUnfinished
		}
		if _, err := w.finish(ctx, tx, &s, 0); err != nil {
			return err
		}
		run = s.run
		return nil
	})
	if err == nil && run.State == registry.Running {
		err = errUnfinished
	}
	return run, err
}
