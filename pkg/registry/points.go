package registry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// PointsKeep is for how long restore points are remembered. The WAL in which they lie is seldom kept for as long.
const PointsKeep = 400 * 24 * time.Hour

// Point is a restore point that was set in a group's cluster before an operation changed anything.
type Point struct {
	Operation uuid.UUID `json:"operation"`
	Kind      string    `json:"kind"`
	Tenant    string    `json:"tenant,omitempty"` // its name then; empty: more than one is concerned
	Group     string    `json:"group"`
	postgres.RestorePoint
}

const pointColumns = `operation, kind, tenant, group_name, name, lsn::text, timeline, at`

func collectPoints(rows pgx.Rows, err error) ([]Point, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (p Point, err error) {
		return p, row.Scan(&p.Operation, &p.Kind, &p.Tenant, &p.Group, &p.Name, &p.LSN, &p.Timeline, &p.At)
	})
}

// AddPoint remembers a restore point. The first one of an operation in a group is kept; so is none of a run that has begun with a
// tenant: a later one would not be before its first change.
func AddPoint(ctx context.Context, q postgres.Querier, p Point) error {
	const insert = `insert into public.restore_points (operation, kind, tenant, group_name, name, lsn, timeline, at)
select $1, $2, $3, $4, $5, $6::text::pg_catalog.pg_lsn, $7, $8
where not exists (select from public.tasks where run = $1 and (state <> 'queued' or attempts > 0)) on conflict do nothing`
	_, err := q.Exec(ctx, insert, p.Operation, p.Kind, p.Tenant, p.Group, p.Name, p.LSN, p.Timeline, p.At)
	return err
}

// Points are the restore points since a moment, the newest first, at most so many.
func Points(ctx context.Context, q postgres.Querier, since time.Time, limit int) ([]Point, error) {
	return collectPoints(q.Query(ctx, `select `+pointColumns+` from public.restore_points where at >= $1 order by at desc, group_name limit $2`, since, limit))
}

// leastOfID is how many characters of an id are taken for it.
const leastOfID = 4

// PointsOf are the restore points of an operation or run, by its id, or by the beginning or the end of it where no other one's is the
// same. Faults: NotFound, and Invalid for what is the beginning or the end of several.
func PointsOf(ctx context.Context, q postgres.Querier, name string) ([]Point, error) {
	name = strings.ToLower(strings.TrimSpace(name))
	unknown := fault.New(fault.NotFound, "no restore point was set before an operation %s", name).WithCode("unknown_point").
		WithHint("they are set while backup.physical.engine is configured, and remembered for %d days", int(PointsKeep.Hours()/24))
	if len(name) < leastOfID {
		return nil, unknown
	}
	const query = `select ` + pointColumns + ` from public.restore_points
where pg_catalog.left(operation::text, pg_catalog.length($1)) = $1 or pg_catalog.right(operation::text, pg_catalog.length($1)) = $1 order by at, group_name`
	found, err := collectPoints(q.Query(ctx, query, name))
	switch {
	case err != nil:
		return nil, err
	case len(found) == 0:
		return nil, unknown
	case slices.ContainsFunc(found, func(p Point) bool { return p.Operation != found[0].Operation }):
		return nil, fault.New(fault.Invalid, "the ids of several operations begin or end with %s", name).WithCode("ambiguous_point").WithHint("give the whole id")
	}
	return found, nil
}

// ExpirePoints forgets the restore points that are older than PointsKeep.
func ExpirePoints(ctx context.Context, q postgres.Querier) error {
	_, err := q.Exec(ctx, `delete from public.restore_points where at < now() - $1::interval`, PointsKeep)
	return err
}

// Marker sets restore points before operations. An operation never fails for want of one. It is safe for concurrent use; the nil
// Marker sets none.
type Marker struct {
	db   *postgres.DB
	log  *slog.Logger
	told sync.Map // what has been warned of, so that a server says it once
}

// NewMarker makes a Marker of an installation.
func NewMarker(db *postgres.DB, log *slog.Logger) *Marker { return &Marker{db: db, log: log} }

// Marking is an operation that is about to begin.
type Marking struct {
	Operation uuid.UUID
	Kind      string
	Tenant    string // empty: more than one is concerned
	// Groups are those whose databases it changes; main, which holds the registry, is always one of them.
	Groups []string
}

// Mark sets and remembers a restore point in each cluster concerned, as long as ctx lasts. Where one cannot be had it is logged as a
// warning, with what mends it, in one line. It holds no connection of the owner when it returns, and needs one at a time.
func (m *Marker) Mark(ctx context.Context, k Marking) {
	m.mark(ctx, k, func(group string, fn func(*postgres.OwnerTx) error) error { return m.db.AsOwner(ctx, group, fn) })
}

// MarkIn is Mark by whoever is in a transaction in a group's database and may have the last connection. What is remembered in that
// database stands and falls with the transaction, which goes on when no point can be had.
func (m *Marker) MarkIn(ctx context.Context, tx *postgres.OwnerTx, in string, k Marking) {
	m.mark(ctx, k, func(group string, fn func(*postgres.OwnerTx) error) error {
		if group != in {
			return m.db.AsOwner(ctx, group, fn)
		}
		if err := tx.Script(ctx, "savepoint restore_point"); err != nil {
			return err
		}
		end := "release savepoint restore_point"
		err := fn(tx)
		if err != nil {
			end = "rollback to savepoint restore_point; " + end
		}
		if serr := tx.Script(ctx, end); err == nil {
			err = serr
		}
		return err
	})
}

// mark sets the points one after another and remembers all of them at once, in main, whose own is the last: whoever finds one of an
// operation finds every one that could be had.
func (m *Marker) mark(ctx context.Context, k Marking, in func(group string, fn func(*postgres.OwnerTx) error) error) {
	if m == nil {
		return
	}
	var had []Point
	var failed []string
	var cause error
	set := func(group string) func(tx *postgres.OwnerTx) error {
		return func(tx *postgres.OwnerTx) error {
			at, err := tx.SetRestorePoint(ctx, pointName(k.Operation))
			if err == nil {
				had = append(had, Point{Operation: k.Operation, Kind: k.Kind, Tenant: k.Tenant, Group: group, RestorePoint: at})
			}
			return err
		}
	}
	remember := func(tx *postgres.OwnerTx) error {
		for _, p := range had {
			if err := AddPoint(ctx, tx, p); err != nil {
				return err
			}
		}
		return nil
	}
	for _, group := range slices.Compact(slices.Sorted(slices.Values(k.Groups))) {
		if m.db.SameDatabase(group) {
			continue
		}
		if err := in(group, set(group)); err != nil {
			failed, cause = append(failed, group), err
		}
	}
	others := len(had)
	err := in(postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := set(postgres.MainGroup)(tx); err != nil {
			return err
		}
		return remember(tx)
	})
	if err != nil && len(had) == others && others > 0 {
		err = errors.Join(err, in(postgres.MainGroup, remember))
	}
	// Before the migration that makes the table nothing can be remembered, and nothing is wrong.
	if err != nil && postgres.SQLState(err) != "42P01" {
		failed, cause = append(failed, postgres.MainGroup), err
	}
	if cause == nil || ctx.Err() != nil {
		return
	}
	f := fault.Of(postgres.Fault(cause))
	if _, again := m.told.LoadOrStore(strings.Join(failed, ",")+" "+f.StableCode(), true); again {
		return
	}
	m.log.WarnContext(ctx, "no restore point is remembered: --before cannot name this operation, which goes on", "operation", k.Operation, "kind", k.Kind,
		"groups", strings.Join(failed, ","), "error", cause, "hint", f.Hint)
}

// pointName is never used twice: a recovery ends at the first place that bears it. PostgreSQL takes 63 characters.
func pointName(operation uuid.UUID) string {
	return fmt.Sprintf("oneo-%s-%s", operation, uuid.NewString()[:8])
}
