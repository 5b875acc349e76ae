package postgres

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Counter is told of each transaction of InTenant, InShared and AsTenant when it is over; the zero tenant: it was on the
// shared tables. It must not wait for anything.
type Counter interface {
	Transaction(t tenant.Tenant, w Work)
}

// Work is what one transaction has cost.
type Work struct {
	Took       time.Duration // from getting a connection to giving it back, of all attempts together
	Statements int64         // the caller's, without the binding and the end
	Rows       int64         // read or written by them
	// Failed is a transaction that ended by our fault or that of the way to PostgreSQL, or by a panic: what a caller asked
	// wrongly, or gave up, is not.
	Failed bool
}

// tally is what has been done on a connection since it was bound. It is its holder's.
type tally struct{ statements, rows int64 }

const tallyKey = "oneo_tally"

func tallyOf(c *pgx.Conn) *tally {
	n, _ := c.PgConn().CustomData()[tallyKey].(*tally)
	return n
}

// tracer counts on the connection itself, so that nothing has to be carried in a context. pgx tells it of every statement,
// also of those that go in a batch with their binding.
type tracer struct{}

var (
	_ pgx.QueryTracer = tracer{}
	_ pgx.BatchTracer = tracer{}
)

func (tracer) note(c *pgx.Conn, tag pgconn.CommandTag, err error) {
	if n := tallyOf(c); n != nil && err == nil {
		n.statements++
		n.rows += tag.RowsAffected()
	}
}

func (tracer) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (t tracer) TraceQueryEnd(_ context.Context, c *pgx.Conn, d pgx.TraceQueryEndData) {
	t.note(c, d.CommandTag, d.Err)
}

func (tracer) TraceBatchStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceBatchStartData) context.Context {
	return ctx
}

func (t tracer) TraceBatchQuery(_ context.Context, c *pgx.Conn, d pgx.TraceBatchQueryData) {
	t.note(c, d.CommandTag, d.Err)
}

func (tracer) TraceBatchEnd(context.Context, *pgx.Conn, pgx.TraceBatchEndData) {}

// got begins to count what is done on the transaction's connection.
func (tx *Tx) got() {
	if tx.group.opts.Counter == nil {
		return
	}
	tx.since = time.Now()
	tx.uncount()
}

// uncount leaves out what was done on the connection so far: the binding is not the caller's.
func (tx *Tx) uncount() {
	if n := tallyOf(tx.conn.Conn()); n != nil {
		*n = tally{}
	}
}

// ran leaves of an operator's statement, which goes past the tracer, nothing but itself.
func (tx *Tx) ran(rows int64) {
	if n := tallyOf(tx.conn.Conn()); n != nil {
		*n = tally{1, rows}
	}
}

// take adds what the caller's statements have done. What the end of the transaction asks for itself comes after it.
func (tx *Tx) take() {
	if tx.since.IsZero() || tx.conn == nil {
		return
	}
	if n := tallyOf(tx.conn.Conn()); n != nil {
		tx.work.Statements += n.statements
		tx.work.Rows += n.rows
		*n = tally{}
	}
}

// gave adds the time for which the connection was the transaction's.
func (tx *Tx) gave() {
	if !tx.since.IsZero() {
		tx.work.Took += time.Since(tx.since)
		tx.since = time.Time{}
	}
}

// counted runs the transaction and tells the counter of it.
func (tx *Tx) counted(ctx context.Context, fn func(*Tx) error) (err error) {
	counter := tx.group.opts.Counter
	if counter == nil {
		return tx.run(ctx, fn)
	}
	tx.work.Failed = true // a panic passes through
	defer func() { counter.Transaction(tx.tenant, tx.work) }()
	err = tx.run(ctx, fn)
	tx.work.Failed = ourFault(err)
	return err
}

func ourFault(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, pgx.ErrNoRows) || errors.Is(err, errRehearsed) {
		return false
	}
	k := fault.Of(err).Kind
	return k == fault.Internal || k == fault.Unavailable
}
