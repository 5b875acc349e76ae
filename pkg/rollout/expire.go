package rollout

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// expiredTogether is how many runs are removed in one transaction: each may have thousands of tasks.
const expiredTogether = 10

// Expire removes runs that ended longer than keep ago, with their tasks and the marks of their changes; 0: none. Those
// that may still be resumed, retried or undone stay, however old they are: open ones, failed ones, those of which a group
// has an undo point, and those with tenants in a group that is not configured. A group that cannot be asked keeps all of
// them. It returns how many were removed. Restore points have a time of their own, whatever keep is.
func (r *Runner) Expire(ctx context.Context, keep time.Duration) (expired int, err error) {
	if err := r.inMain(ctx, func(tx *postgres.OwnerTx) error { return registry.ExpirePoints(ctx, tx) }); err != nil {
		return 0, err
	}
	if keep <= 0 {
		return 0, nil
	}
	for after := (uuid.UUID{}); ; {
		ids, err := r.over(ctx, keep, after)
		if err != nil || len(ids) == 0 {
			return expired, err
		}
		after = ids[len(ids)-1]
		if ids, err = r.withoutPoints(ctx, ids); err != nil {
			return expired, err
		}
		n, err := r.remove(ctx, ids)
		expired += n
		if err != nil {
			return expired, err
		}
	}
}

// final are the states in which nothing can be done with a run any more.
const final = `('done', 'aborted')`

// over are the first runs behind another one that are over for good, and have been for so long.
func (r *Runner) over(ctx context.Context, keep time.Duration, after uuid.UUID) (ids []uuid.UUID, err error) {
	const query = `select o.id from public.operations o join public.runs r on r.id = o.id
where o.state in ` + final + ` and o.finished_at < now() - $1::interval and o.id > $2
and not exists (select from public.tasks t where t.run = o.id and t.group_name <> all($3)) order by o.id limit $4`
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, query, keep, after, r.o.DB.Groups(), expiredTogether)
		if err != nil {
			return err
		}
		ids, err = pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		return err
	})
	return ids, err
}

// withoutPoints leaves out the runs of which a group still has something to put back.
func (r *Runner) withoutPoints(ctx context.Context, ids []uuid.UUID) ([]uuid.UUID, error) {
	for _, group := range r.o.DB.Groups() {
		var kept []uuid.UUID
		err := r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			rows, err := tx.Query(ctx, `select distinct run from public.undo_points where run = any($1)`, ids)
			if err != nil {
				return err
			}
			kept, err = pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("look for undo points in group %s: %w", group, err)
		}
		ids = slices.DeleteFunc(ids, func(id uuid.UUID) bool { return slices.Contains(kept, id) })
	}
	return ids, nil
}

// remove takes runs away: their marks first, because without its run nobody would find them.
func (r *Runner) remove(ctx context.Context, ids []uuid.UUID) (removed int, err error) {
	if len(ids) == 0 {
		return 0, nil
	}
	for _, group := range r.o.DB.Groups() {
		err := r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(ctx, `delete from public.marks where run = any($1)`, ids)
			return err
		})
		if err != nil {
			return 0, fmt.Errorf("remove marks in group %s: %w", group, err)
		}
	}
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		tag, err := tx.Exec(ctx, `delete from public.operations where id = any($1) and state in `+final, ids)
		removed = int(tag.RowsAffected())
		return err
	})
	return removed, err
}
