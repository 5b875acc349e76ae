package schedule

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Standing is what has become of a schedule's due times.
type Standing struct {
	Name, Spec string
	// Seen is up to where due times were taken on or counted as missed.
	Seen time.Time
	// Due is the newest that was taken on, and Run what was begun for it; nil: none yet.
	Due   *time.Time
	Run   *uuid.UUID
	Tries int
	// EndedAt is when the work on it ended with Outcome; nil: it has not.
	EndedAt *time.Time
	Outcome
	// Missed is how many due times were not taken on, and MissedAt the newest of them.
	Missed   int64
	MissedAt *time.Time
	told     *time.Time // up to which an alarm was raised
	errors   int
}

// AtWork reports whether a due time was taken on whose work has not ended.
func (st Standing) AtWork() bool { return st.Due != nil && st.EndedAt == nil }

// The states of a schedule. All but OK, AtWork and New are unhealthy.
const (
	StateNew     = "new"     // no server has looked at it yet
	StateWaiting = "waiting" // no due time has passed since
	StateAtWork  = "at work"
	StateStuck   = "stuck" // it cannot be begun, or gone on with, for some minutes
	StateOK      = "ok"
	StateFailed  = "failed"
	StateMissed  = "missed"  // since the newest one that was taken on
	StateOverdue = "overdue" // a due time has passed, and no server has looked
)

// late is how long after a due time it is overdue.
const late = 5 * time.Minute

// State is where a schedule stands. One that no server has looked at is new and unhealthy: nothing is done by it.
func (sc Schedule) State(st Standing, now time.Time) (state string, healthy bool) {
	from := st.Seen
	switch {
	case st.Name == "":
		return StateNew, false
	case st.Spec != sc.Spec: // no server has the new words yet: they count from when one has
	default:
		if due := sc.Times.Next(from); !due.IsZero() && due.Add(late).Before(now) {
			return StateOverdue, false
		}
	}
	switch {
	case st.MissedAt != nil && (st.Due == nil || st.MissedAt.After(*st.Due)):
		return StateMissed, false
	case st.AtWork() && st.errors >= stuckAfter:
		return StateStuck, false
	case st.AtWork():
		return StateAtWork, true
	case st.Due == nil:
		return StateWaiting, true
	case !st.Good():
		return StateFailed, false
	}
	return StateOK, true
}

const standings = `select name, spec, seen, due, run, tries, ended_at, ok, failed, skipped, coalesce(error, ''), missed, missed_at, missed_told, errors
from public.schedules`

func scanStanding(row pgx.Row) (st Standing, err error) {
	return st, row.Scan(&st.Name, &st.Spec, &st.Seen, &st.Due, &st.Run, &st.Tries, &st.EndedAt, &st.OK, &st.Failed, &st.Skipped, &st.Err,
		&st.Missed, &st.MissedAt, &st.told, &st.errors)
}

// Standings reads where all schedules stand that a server has ever looked at, by their names.
func Standings(ctx context.Context, db *postgres.DB) (map[string]Standing, error) {
	all := map[string]Standing{}
	err := db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, standings)
		if err != nil {
			return err
		}
		list, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Standing, error) { return scanStanding(row) })
		for _, st := range list {
			all[st.Name] = st
		}
		return err
	})
	return all, err
}
