package postgres

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// HoldLock is the lock that a full backup has for as long as it holds tenants back; the second key is its row's in
// public.holds, whose function held_by knows the number too.
const HoldLock int32 = 7302666

// tryOperation tries the operation lock of a tenant by one of PostgreSQL's functions, unless a full backup holds the tenant
// back: by is which one. Where the lock was got, by may be given all the same: then it must be let go.
func tryOperation(ctx context.Context, c *pgx.Conn, lock string, number int32) (got bool, by string, err error) {
	if number == 0 { // the shared tables, which may not be there yet
		return got, "", c.QueryRow(ctx, `select pg_catalog.`+lock+`($1::int4, 0)`, OperationLock).Scan(&got)
	}
	try := `select case when h.by is null then pg_catalog.` + lock + `($1::int4, $2::int4) else false end, coalesce(h.by, '')
from (select public.held_by($2::int4) as by offset 0) h`
	if err := c.QueryRow(ctx, try, OperationLock, number).Scan(&got, &by); err != nil || !got {
		return false, by, err
	}
	// A statement of its own, which sees what was committed before the lock was there: a backup makes its hold seen, then looks
	// who has a lock and waits for them. Whoever it has not seen sees the hold.
	err = c.QueryRow(ctx, `select coalesce(public.held_by($1::int4), '')`, number).Scan(&by)
	return true, by, err
}

// HeldBack says that a tenant is held back by a full backup.
func HeldBack(by string) error {
	return fault.New(fault.Locked, "the full backup %s has not copied this tenant yet", by).WithCode("operation_running").
		WithRetry(time.Second).WithHint("run the command again when it has; whatever changes a tenant's structure waits for that")
}

// LockReading is LockOperation for what changes nothing of the tenant's structure: a full backup does not hold it back.
func (s *Session) LockReading(ctx context.Context, number int32, wait time.Duration) error {
	return pollOperation(ctx, wait, func() (got bool, by string, err error) {
		err = s.QueryRow(ctx, `select pg_catalog.pg_try_advisory_lock($1::int4, $2::int4)`, OperationLock, number).Scan(&got)
		return got, "", err
	})
}

// SnapshotOf is Snapshot as of the moment of another session's, which must still be in the transaction that has exported it:
// Unavailable where it is not.
func (s *Session) SnapshotOf(ctx context.Context, id string, fn func() error) error {
	return s.Snapshot(ctx, func() error {
		if err := s.Script(ctx, fmt.Sprintf("set transaction snapshot '%s'", id)); err != nil {
			return fault.Wrap(err, fault.Unavailable, "the moment that is to be read is over").WithCode("moment_over")
		}
		return fn()
	})
}
