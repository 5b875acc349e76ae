package postgres

import (
	"context"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// key is what the statement's name on a connection goes by.
func (tx *Tx) key(sql string) ownKey { return ownKey{tx.tenant.Number, tx.was, sql} }

// outlived reports whether err says that a prepared statement no longer fits the schema that it was prepared for, or
// that its name is not there.
func outlived(err error) bool {
	switch SQLState(err) {
	case "0A000", "26000", "42P05":
		return true
	}
	return false
}

// misfit reports whether err may come of a statement's name that was prepared for other tables than there are now: its
// columns or parameters have other types, or what it names is not there.
func misfit(err error) bool {
	switch SQLState(err) {
	case "42P01", "42703", "42883", "42804", "42702", "42704", "42846", "42P10":
		return true
	}
	return outlived(err)
}

// disturbed reports whether err may come of a migration that was committed while the transaction was at work: besides
// misfits, what PostgreSQL says when a table goes from under a statement, and what new constraints of a table say.
func disturbed(err error) bool {
	code := SQLState(err)
	switch code {
	case "XX000", "3F000", "23502", "23514":
		return true
	}
	return strings.HasPrefix(code, "42") || outlived(err)
}

// explain tells an error that comes of a change of the tenant's schema while the transaction was at work, and may be
// repeated, from one of its own. Only errors that may come of one are looked into, for a round trip: after the
// transaction's end, with its connection still there.
func (tx *Tx) explain(ctx context.Context, err error) error {
	if err == nil || tx.anyVersion || tx.bound.IsZero() || tx.conn == nil || tx.conn.Conn().IsClosed() {
		return err
	}
	cause := err
	if !disturbed(cause) {
		if cause = tx.err; !disturbed(cause) { // the statement's reader may have swallowed it
			return err
		}
	}
	unfit := outlived(cause) || tx.named && misfit(cause)
	if unfit {
		stateOf(tx.conn).stale = true
	}
	p, changed, lookErr := tx.look(ctx)
	switch {
	case lookErr == nil && !tx.group.opts.Serves.Holds(p):
		return upgrading(err)
	case lookErr != nil, changed, unfit:
		return fault.Wrap(err, fault.Unavailable, "this tenant has just been changed").WithCode("tenant_changed").WithRetry(time.Second)
	}
	return err
}

// prove takes back the names that the transaction has made for all tenants of its version, unless it is certain that the
// tenant had that version until after they were made: a migration may be committed between the binding and the
// preparing. Names of the tenant's own are at worst its own trouble.
func (tx *Tx) prove(ctx context.Context) {
	if tx.sub == nil || tx.conn == nil || tx.bound.IsZero() {
		return
	}
	st := stateOf(tx.conn)
	if len(st.unproved) == 0 {
		return
	}
	if _, changed, err := tx.look(ctx); err != nil || changed {
		for _, key := range st.unproved {
			st.stale = st.forget(ctx, tx.conn.Conn(), key) != nil || st.stale
		}
	}
	st.unproved = st.unproved[:0]
}

const (
	readPlacement = `select p.version, p.reader from public.placements p where p.number = $1`
	readChange    = `select p.version, p.reader, pg_catalog.extract('epoch', pg_catalog.clock_timestamp() - p.updated_at)::float8
from public.placements p where p.number = $1`
)

// disown closes a connection on which names were made that nobody has proved.
func (tx *Tx) disown() {
	if tx.sub == nil || tx.conn == nil {
		return
	}
	if st := stateOf(tx.conn); st != nil && len(st.unproved) > 0 {
		st.stale = true
	}
}

// look reads how the tenant stands now, on the connection of a transaction that is over, and whether its placement has
// been changed since it was bound: it has another version, or was written meanwhile, as by steps forth and back.
func (tx *Tx) look(ctx context.Context) (p Placement, changed bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tx.group.opts.AcquireTimeout)
	defer cancel()
	var age float64
	err = tx.conn.Conn().QueryRow(ctx, readChange, outsideTx, tx.tenant.Number).Scan(&p.Version, &p.Reader, &age)
	return p, p.Version != int(tx.was) || age < time.Since(tx.bound).Seconds(), err
}

// Placement is how far the migrations of a tenant have come, as its group's database has it.
type Placement struct {
	Version int
	Reader  int // the least version that a binary must know to serve the tenant
}

// Holds reports whether a tenant that stands so is served.
func (r Range) Holds(p Placement) bool { return p.Version >= r.Min && p.Reader <= r.Head }

// Serves is the range of versions that InTenant binds to.
func (db *DB) Serves() Range { return db.opts.Serves }

// Placement reads how a tenant stands. pgx.ErrNoRows: it has no placement, because it is being made or was purged.
func (db *DB) Placement(ctx context.Context, t tenant.Tenant) (p Placement, err error) {
	err = db.look(ctx, t.Group, func(ctx context.Context, pool *pgxpool.Pool) error {
		return pool.QueryRow(ctx, readPlacement, outsideTx, t.Number).Scan(&p.Version, &p.Reader)
	})
	return p, err
}

// Placement reads how a tenant stands, in the owner's transaction.
func (tx *OwnerTx) Placement(ctx context.Context, t tenant.Tenant) (p Placement, err error) {
	err = tx.QueryRow(ctx, readPlacement, t.Number).Scan(&p.Version, &p.Reader)
	return p, err
}

// OutOfRange lists the numbers of the tenants of a group that InTenant refuses for their version.
func (db *DB) OutOfRange(ctx context.Context, group string) (numbers []int32, err error) {
	const list = `select p.number from public.placements p where p.state in ('active', 'suspended', 'moving') and (p.version < $1 or p.reader > $2)`
	r := db.opts.Serves
	err = db.look(ctx, group, func(ctx context.Context, pool *pgxpool.Pool) error {
		rows, err := pool.Query(ctx, list, outsideTx, r.Min, r.Head)
		if err != nil {
			return err
		}
		numbers, err = pgx.CollectRows(rows, pgx.RowTo[int32])
		return err
	})
	return numbers, err
}

// look runs one reading statement of ours on a group's shared connections, as the app role.
func (db *DB) look(ctx context.Context, name string, fn func(context.Context, *pgxpool.Pool) error) error {
	g, err := db.group(name)
	if err != nil {
		return err
	}
	pool, err := g.sharedPool()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, g.opts.AcquireTimeout+g.opts.StatementTimeout)
	defer cancel()
	return Fault(retryLost(ctx, g.opts.AcquireTimeout, pool.Reset, func(ctx context.Context) error { return fn(ctx, pool) }))
}
