package snapshot

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Expire destroys what undo points have kept whose time is over, in the databases of all groups: one in a transaction,
// whose locks nobody waits for longer than the lock timeout. It returns how many. One that is being used is left alone, and what fails does not
// stop the others.
func (s *Snapshots) Expire(ctx context.Context) (expired int, err error) {
	var errs []error
	for _, group := range s.o.DB.Groups() {
		for after := (key{}); ; {
			next, found, err := s.expireNext(ctx, group, after)
			if next == (key{}) {
				errs = append(errs, err)
				break
			}
			if err != nil {
				errs = append(errs, fmt.Errorf("drop the undo point of run %s and tenant %d: %w", next.run, next.tenant, err))
			} else if found {
				expired++
			}
			after = next
		}
	}
	return expired, errors.Join(errs...)
}

// key is an undo point's.
type key struct {
	run    uuid.UUID
	tenant int32
}

// expireNext destroys the first expired point behind another one. The zero key: there is none.
func (s *Snapshots) expireNext(ctx context.Context, group string, after key) (next key, dropped bool, err error) {
	const oldest = `select run, tenant, schema, undone from public.undo_points
where expires_at <= pg_catalog.now() and (run, tenant) > ($1, $2) order by run, tenant limit 1 for update skip locked`
	err = s.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		var schema string
		var undone *string
		err := tx.QueryRow(ctx, oldest, after.run, after.tenant).Scan(&next.run, &next.tenant, &schema, &undone)
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		if undone != nil {
			schema = *undone
		}
		if err := tx.Script(ctx, "drop schema if exists "+postgres.Quote(schema)+" cascade"); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `delete from public.undo_points where run = $1 and tenant = $2`, next.run, next.tenant); err != nil {
			return err
		}
		dropped = true
		return failpoint.Hit("point.expired")
	})
	return next, dropped && err == nil, err
}
