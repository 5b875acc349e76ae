package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Access says what a transaction may do.
type Access int

const (
	// Read is a read-only transaction.
	Read Access = iota
	// Write is a transaction that reads and writes.
	Write
	// Single is exactly one reading statement, sent with its binding in one round trip. Use it where speed counts.
	Single
)

// Kinds of advisory locks: the first of their two keys, the second is the tenant's number.
const (
	// GateLock is taken shared by every bound transaction, exclusively by what changes the placement.
	GateLock int32 = 7302657
	// OperationLock is the lock of which there is one structural operation on a tenant at a time. It is polled, never
	// waited for inside PostgreSQL.
	OperationLock int32 = 7302658
	lockPool      int32 = 7302659 // what fills and empties the pool of spare schemas, one process at a time; the second key is 0
)

const (
	nameBegin, sqlBegin = "oneo_begin", `begin`
	sqlCommit           = `commit`
	nameGate, nameBind  = "oneo_gate", "oneo_bind"
	nameProbe           = "oneo_probe"

	// The gate comes first and in a statement of its own: a row read in the same statement would come from a snapshot
	// older than the lock.
	sqlGate = `select case when pg_catalog.pg_try_advisory_xact_lock_shared(7302657, $1::int4) then 0 else ext.refuse('ON001', 'gate') end`

	// Schema and role come from the placement itself, never from the caller: whoever holds an old Tenant is still bound
	// to the right place, or to none. CASE keeps the order: nothing is set before the placement was found active and
	// its version in the range that this binary serves. While it is being moved it may be read. One column, because each
	// one is described and sent with every binding: the version. The verbs are the least and the greatest version, lock_timeout and
	// idle_in_transaction_session_timeout.
	formBind = `select coalesce((select case when (p.state = 'active' or p.state = 'moving' and $2 = 'on') and p.version >= %d and p.reader <= %d then case when
	pg_catalog.set_config('statement_timeout', $3, true) is not null and
	($4 = '' or pg_catalog.set_config('max_parallel_workers_per_gather', $4, true) is not null) and
	pg_catalog.set_config('lock_timeout', '%s', true) is not null and
	pg_catalog.set_config('idle_in_transaction_session_timeout', '%s', true) is not null and
	pg_catalog.set_config('transaction_read_only', $2, true) is not null and
	pg_catalog.set_config('search_path', pg_catalog.quote_ident(p.schema) || ', ext, pg_temp', true) is not null and
	pg_catalog.set_config('role', p.role, true) is not null
	then p.version end else ext.refuse(case when p.state = 'active' or p.state = 'moving' and $2 = 'on' then 'ON003' else 'ON002' end, p.state) end from public.placements p where p.number = $1), ext.refuse('ON002', 'missing'))`
)

// sqlBind binds the rest of a transaction to the tenant $1, read-only when $2 is on, with the statement_timeout $3
// and, unless it is empty, $4 helpers to a statement.
func (o *Options) sqlBind(serves Range) string {
	return fmt.Sprintf(formBind, serves.Min, serves.Head, ms(o.LockTimeout), ms(o.IdleInTransactionTimeout))
}

// Tx is a transaction bound to one tenant, or one on the shared tables. It runs plain reading and writing statements
// and nothing that could outlive it. It is not safe for concurrent use and ends with the function that received it.
type Tx struct {
	group  *group
	sub    *subPool // nil: shared work
	conn   *pgxpool.Conn
	tenant tenant.Tenant
	access Access
	// anyVersion binds to a tenant at whatever version: the statements are not this binary's.
	anyVersion bool

	bound time.Time        // when it was about to be; zero: it has not been
	was   int32            // the tenant's version then
	named bool             // the last statement went by a name that was prepared before
	begun bool             // an explicit transaction is open
	last  *pgx.Batch       // to be sent with the commit; nil: nothing
	batch pgx.BatchResults // of a Single sent in one round trip
	free  func()           // ends the bound of a Single's statement
	used  bool             // the one statement of a Single has been sent
	over  bool
	err   error // the first thing that PostgreSQL refused: the statement's own reader may have swallowed it

	since time.Time // when the connection was got; zero: there is none, or nobody counts
	work  Work
}

var _ Querier = (*Tx)(nil)

// InTenant runs fn in a transaction bound to the tenant, and commits only if fn returned nil. The first round trip
// takes the gate, checks the placement and binds; while the server is away or the gate is held for a moment it is
// repeated for as long as AcquireTimeout, since nothing has happened yet. Faults: Suspended (also of a tenant whose
// version is outside of the range that is served), Gone, Busy, Unavailable. The tenant's Budget, where it says something,
// bounds its transactions at one time and each statement, the latter never beyond StatementTimeout.
// A panic in fn rolls back and goes on.
func (db *DB) InTenant(ctx context.Context, t tenant.Tenant, a Access, fn func(*Tx) error) error {
	return db.inTenant(ctx, t, &Tx{access: a}, fn)
}

func (db *DB) inTenant(ctx context.Context, t tenant.Tenant, tx *Tx, fn func(*Tx) error) error {
	if t.IsZero() {
		return fault.New(fault.Internal, "work was to be bound to no tenant").WithCode("no_tenant")
	}
	g, err := db.group(t.Group)
	if err != nil {
		return err
	}
	sub, err := g.subPool(ctx, t.Number)
	if err != nil {
		return err
	}
	leave, err := g.inFlight.Load().enter(ctx, t.Number, t.Budget.InFlight)
	if err != nil {
		return withTenant(err, t)
	}
	defer leave()
	tx.group, tx.sub, tx.tenant = g, sub, t
	return withTenant(tx.counted(ctx, fn), t)
}

// MostInFlight is how many transactions the tenant may have at one time in this process, by its Budget or without one.
func (db *DB) MostInFlight(ctx context.Context, t tenant.Tenant) (int, error) {
	g, err := db.group(t.Group)
	if err != nil {
		return 0, err
	}
	if _, err := g.subPool(ctx, t.Number); err != nil {
		return 0, err
	}
	return g.inFlight.Load().limitOf(t.Budget.InFlight), nil
}

// InSharedFor is InShared for a tenant's request: at most a quarter of SharedConns are one tenant's at one time, or one.
// Behind that it waits a bounded time; then the fault is Busy.
func (db *DB) InSharedFor(ctx context.Context, t tenant.Tenant, a Access, fn func(*Tx) error) error {
	leave, err := db.sharedInFlight.enter(ctx, t.Number, 0)
	if err != nil {
		return withTenant(err, t)
	}
	defer leave()
	return withTenant(db.InShared(ctx, a, fn), t)
}

// InShared runs fn in a transaction on the shared tables of the main database, as the app role.
func (db *DB) InShared(ctx context.Context, a Access, fn func(*Tx) error) error {
	return db.InSharedAt(ctx, MainGroup, a, fn)
}

// InSharedAt is InShared on the shared tables of a group's database.
func (db *DB) InSharedAt(ctx context.Context, groupName string, a Access, fn func(*Tx) error) error {
	g, err := db.group(groupName)
	if err != nil {
		return err
	}
	tx := &Tx{group: g, access: a}
	return tx.counted(ctx, fn)
}

func withTenant(err error, t tenant.Tenant) error {
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = t.Slug.String()
	}
	return err
}

// run gives fn the transaction and ends it, whatever happens.
func (tx *Tx) run(ctx context.Context, fn func(*Tx) error) error {
	if tx.access != Single {
		if err := tx.begin(ctx); err != nil {
			return Fault(err)
		}
	}
	return tx.end(ctx, func() error { return fn(tx) })
}

// end runs fn, commits if it returned nil, and gives the connection back; a panic in fn rolls back and goes on.
func (tx *Tx) end(ctx context.Context, fn func() error) error {
	returned := false
	defer func() {
		tx.over = true
		if !returned {
			tx.take()
			tx.rollback(ctx)
			tx.disown()
		}
		tx.release()
		if tx.free != nil {
			tx.free()
		}
	}()
	err := fn()
	returned, tx.over = true, true
	switch {
	case tx.batch != nil:
		if cerr := tx.batch.Close(); err == nil {
			err = cerr
		}
	case tx.begun && err == nil:
		err = tx.commit(ctx)
	case tx.begun:
		tx.rollback(ctx)
	}
	tx.take()
	tx.prove(ctx)
	return Fault(tx.explain(ctx, err))
}

// begin opens an explicit transaction and binds it, in one round trip.
func (tx *Tx) begin(ctx context.Context) error {
	return tx.connect(ctx, func(c *pgx.Conn) error {
		bctx, cancel := context.WithTimeout(ctx, tx.group.opts.AcquireTimeout)
		defer cancel()
		if tx.sub == nil {
			return tx.beginShared(bctx, c)
		}
		return tx.bind(bctx, c)
	})
}

// bind opens and binds the transaction on a connection that is ours.
func (tx *Tx) bind(ctx context.Context, c *pgx.Conn) error {
	begin, gate, bind := nameBegin, nameGate, nameBind
	if tx.group.opts.Statements == Unprepared {
		begin, gate, bind = sqlBegin, sqlGate, tx.group.opts.sqlBind(tx.group.opts.Serves)
	}
	if tx.anyVersion {
		bind = tx.group.opts.sqlBind(Range{Head: math.MaxInt32})
	}
	b := &pgx.Batch{}
	b.Queue(begin)
	b.Queue(gate, tx.tenant.Number)
	b.Queue(bind, tx.bindArgs()...)
	sent := time.Now()
	br := c.SendBatch(ctx, b)
	err := tx.readBinding(br, 2, sent)
	if cerr := br.Close(); err == nil {
		err = cerr
	}
	tx.begun = c.PgConn().TxStatus() != 'I'
	return unbound(err)
}

// readBinding reads the answers to a binding, of which so many come before the version.
func (tx *Tx) readBinding(br pgx.BatchResults, before int, sent time.Time) error {
	tx.bound = time.Time{}
	for range before {
		if _, err := br.Exec(); err != nil {
			return err
		}
	}
	rows, err := br.Query()
	if err != nil {
		return err
	}
	// By hand: this is on the way of every request.
	if rows.Next() {
		raw := rows.RawValues()[0]
		if rows.FieldDescriptions()[0].Format == pgx.BinaryFormatCode && len(raw) == 4 {
			tx.was = int32(binary.BigEndian.Uint32(raw))
		} else if n, err := strconv.ParseInt(string(raw), 10, 32); err == nil {
			tx.was = int32(n)
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return err
	}
	tx.bound = sent
	tx.uncount()
	stateOf(tx.conn).saw(tx.tenant.Number, tx.was)
	return nil
}

// bindingError says that it was the binding that failed, before any statement of the caller's.
type bindingError struct{ error }

func (e bindingError) Unwrap() error { return e.error }

func unbound(err error) error {
	if err == nil {
		return nil
	}
	return bindingError{err}
}

// cutShort reports whether the binding was cancelled though nobody gave it up: an earlier borrower left a timeout of
// the session's, which the binding only replaces when it runs, or a request to cancel came too late for its statement.
func cutShort(ctx context.Context, err error) bool {
	var binding bindingError
	return ctx.Err() == nil && SQLState(err) == "57014" && errors.As(err, &binding)
}

func (tx *Tx) bindArgs() []any {
	timeout := tx.group.opts.StatementTimeout
	if own := tx.tenant.Budget.StatementTimeout; own > 0 {
		timeout = min(own, timeout)
	}
	readOnly := "on"
	if tx.access == Write {
		readOnly = "off"
	}
	helpers := "" // as PostgreSQL is set
	if tx.tenant.Budget.InFlight > 0 {
		helpers = "0" // transactions that are counted are to take one process each
	}
	return []any{tx.tenant.Number, readOnly, ms(timeout), helpers}
}

func ms(d time.Duration) string { return strconv.FormatInt(max(1, d.Milliseconds()), 10) }

func (tx *Tx) beginShared(ctx context.Context, c *pgx.Conn) error {
	o := tx.group.opts
	mode := "read only"
	if tx.access == Write {
		mode = "read write"
	}
	// One simple query: every value in it is ours.
	sql := fmt.Sprintf(`begin %s; set local search_path to ''; set local statement_timeout to %s; set local lock_timeout to %s; `+
		`set local idle_in_transaction_session_timeout to %s`,
		mode, ms(o.StatementTimeout), ms(o.LockTimeout), ms(o.IdleInTransactionTimeout))
	err := c.PgConn().Exec(ctx, sql).Close()
	tx.begun = c.PgConn().TxStatus() != 'I'
	return unbound(err)
}

// connect gets a connection and runs first on it. It starts over with another connection while the server is lost or
// the gate is held, or when the binding was cut short, for as long as AcquireTimeout; first must be safe to repeat.
func (tx *Tx) connect(ctx context.Context, first func(*pgx.Conn) error) error {
	deadline := time.Now().Add(tx.group.opts.AcquireTimeout)
	var before error
	for attempt := 0; ; attempt++ {
		err := tx.acquire(ctx, deadline)
		if err != nil && before != nil && time.Now().After(deadline) {
			return before // why we are still waiting says more than that the time is over
		}
		if err == nil {
			if err = first(tx.conn.Conn()); err == nil {
				return nil
			}
			tx.giveUp(ctx, err)
		}
		if !bindAgain(ctx, err) {
			return err
		}
		if attempt == 0 && connectionLost(err) {
			tx.reset()
		}
		if !pause(ctx, deadline, attempt) {
			return err
		}
		before = err
	}
}

// giveUp gives back a connection on which the binding failed, or closes it when the connection itself is to blame.
func (tx *Tx) giveUp(ctx context.Context, err error) {
	tx.rollback(ctx)
	if cutShort(ctx, err) {
		closeConn(tx.conn)
	}
	tx.release()
}

// bindAgain reports whether another try, on another connection or in a moment, may succeed.
func bindAgain(ctx context.Context, err error) bool {
	return ctx.Err() == nil && (mayPass(err) || SQLState(err) == stateGateHeld || cutShort(ctx, err))
}

func (tx *Tx) acquire(ctx context.Context, deadline time.Time) (err error) {
	if tx.sub != nil {
		tx.conn, err = tx.sub.acquire(ctx, deadline)
		if err == nil {
			stateOf(tx.conn).meets(tx.tenant.Number)
			tx.got()
		}
		return err
	}
	pool, err := tx.group.sharedPool()
	if err != nil {
		return err
	}
	if tx.conn, err = (&subPool{group: tx.group, pool: pool}).acquire(ctx, deadline); err == nil {
		tx.got()
	}
	return err
}

// reset throws away the idle connections that a lost server left behind.
func (tx *Tx) reset() {
	if tx.sub != nil {
		tx.sub.pool.Reset()
	} else if pool, err := tx.group.sharedPool(); err == nil {
		pool.Reset()
	}
}

func (tx *Tx) release() {
	c := tx.conn
	if c == nil {
		return
	}
	tx.conn = nil
	tx.gave()
	if tx.sub == nil {
		if ownerWorn(c) {
			closeConn(c)
		}
		c.Release()
		return
	}
	if st := stateOf(c); st != nil && st.stale {
		closeConn(c)
	}
	tx.sub.release(c)
}

func closeConn(c *pgxpool.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.Conn().Close(ctx) // the pool drops a closed connection; the backend ends with its socket
}

// commit ends the transaction. The caller may be gone by now; its change is whole all the same.
func (tx *Tx) commit(ctx context.Context) error {
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), tx.group.opts.StatementTimeout)
	defer cancel()
	tx.begun = false
	if tx.conn.Conn().PgConn().IsBusy() {
		closeConn(tx.conn)
		return fault.New(fault.Internal, "a transaction was to be committed while its rows were still being read").WithCode("rows_open")
	}
	tag, err := tx.sendCommit(cctx)
	if err != nil {
		if connectionLost(err) || errors.Is(err, context.DeadlineExceeded) {
			closeConn(tx.conn)
			return fault.Wrap(err, fault.Unavailable, "the connection was lost while committing: the change may or may not have been made").
				WithCode("outcome_unknown").WithRetry(time.Second)
		}
		if tx.conn.Conn().PgConn().TxStatus() != 'I' {
			if tx.last != nil { // one of these failed
				tx.rollback(ctx)
				return err
			}
			closeConn(tx.conn)
		}
		return fmt.Errorf("commit: %w", err)
	}
	if tag != "COMMIT" {
		return fault.New(fault.Internal, "a transaction in which a statement had failed was to be committed").WithCode("rolled_back")
	}
	return nil
}

// sendCommit sends what was left for the end, and commits, in one message exchange. A statement that fails keeps the
// server from the commit behind it.
func (tx *Tx) sendCommit(ctx context.Context) (tag string, err error) {
	c := tx.conn.Conn()
	if b := tx.last; b != nil {
		b.Queue(sqlCommit).Exec(func(t pgconn.CommandTag) error {
			tag = t.String()
			return nil
		})
		err := c.SendBatch(ctx, b).Close()
		return tag, err
	}
	results, err := c.PgConn().Exec(ctx, sqlCommit).ReadAll()
	if len(results) == 1 {
		tag = results[0].CommandTag.String()
	}
	return tag, err
}

// rollback ends the transaction without a trace; a connection on which that fails is closed.
func (tx *Tx) rollback(ctx context.Context) {
	if tx.batch != nil {
		_ = tx.batch.Close() // an implicit transaction: its error was or will be reported by the statement
		tx.batch = nil
	}
	if tx.conn == nil || tx.conn.Conn().IsClosed() {
		tx.begun = false
		return
	}
	if !tx.begun && tx.conn.Conn().PgConn().TxStatus() == 'I' {
		return
	}
	tx.begun = false
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := tx.conn.Conn().PgConn().Exec(rctx, "rollback").Close(); err != nil {
		closeConn(tx.conn)
	}
}

var errOver = errors.New("the transaction is over")

// check is what every statement passes.
func (tx *Tx) check(sql string) error {
	if tx.over {
		return errOver
	}
	if tx.access == Single {
		if tx.used {
			return fault.New(fault.Internal, "a Single transaction runs exactly one statement").WithCode("single")
		}
		tx.used = true
	}
	return tx.group.guard(sql)
}

// Exec runs a statement that returns no rows.
func (tx *Tx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	rows, err := tx.Query(ctx, sql, args...)
	rows.Close()
	if err == nil {
		err = rows.Err()
	}
	return rows.CommandTag(), err
}

// Query runs a statement; the rows must be closed. They are never nil, also when there is an error.
func (tx *Tx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	ctx, free := tx.bounded(ctx)
	rows, err := tx.query(ctx, sql, args)
	if err != nil {
		tx.failed(err)
		free()
		return failedRows{err}, err
	}
	if tx.batch != nil {
		tx.free = free // the batch is read to its end after the rows
		return boundRows{rows, nil}, nil
	}
	return boundRows{rows, free}, nil
}

func (tx *Tx) failed(err error) {
	if SQLState(tx.err) == "" {
		tx.err = err
	}
}

// bounded ends a statement to which no answer comes: the server's own timeouts are of no use when the network swallows
// its words, or the server itself hangs. Callers with an earlier deadline have theirs.
func (tx *Tx) bounded(ctx context.Context) (context.Context, func()) {
	deadline := time.Now().Add(tx.group.opts.AcquireTimeout + tx.group.opts.StatementTimeout + time.Second)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, deadline)
}

// QueryRow runs a statement and reads its first row; pgx.ErrNoRows when there is none.
func (tx *Tx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	rows, err := tx.Query(ctx, sql, args...)
	return oneRow{rows: rows, err: err, tx: tx}
}

func (tx *Tx) query(ctx context.Context, sql string, args []any) (pgx.Rows, error) {
	if err := tx.check(sql); err != nil {
		return nil, err
	}
	if err := guardArgs(args); err != nil {
		return nil, err
	}
	if tx.access == Single {
		return tx.single(ctx, sql, args)
	}
	if tx.sub == nil {
		return tx.conn.Conn().Query(ctx, sql, args...)
	}
	return tx.byName(ctx, sql, args)
}

// byName runs a statement in the explicit transaction, by the name that it has on this connection.
func (tx *Tx) byName(ctx context.Context, sql string, args []any) (pgx.Rows, error) {
	c := tx.conn.Conn()
	tx.named = false
	if tx.group.opts.Statements == Unprepared {
		return c.Query(ctx, sql, append([]any{pgx.QueryExecModeDescribeExec}, args...)...)
	}
	name, err := stateOf(tx.conn).prepare(ctx, c, tx.key(sql))
	if err != nil {
		return nil, err
	}
	if name == "" {
		return c.Query(ctx, sql, append([]any{pgx.QueryExecModeDescribeExec}, args...)...)
	}
	tx.named = true
	return c.Query(ctx, name, args...)
}

// single sends binding and statement as one implicit transaction when the statement is prepared on the connection;
// otherwise it opens a transaction, prepares the statement there and runs it.
func (tx *Tx) single(ctx context.Context, sql string, args []any) (pgx.Rows, error) {
	if tx.sub == nil || tx.group.opts.Statements == Unprepared {
		if err := tx.begin(ctx); err != nil {
			return nil, err
		}
		if tx.sub == nil {
			return tx.conn.Conn().Query(ctx, sql, args...)
		}
		return tx.byName(ctx, sql, args)
	}
	var rows pgx.Rows
	err := tx.connect(ctx, func(c *pgx.Conn) error {
		st := stateOf(tx.conn)
		// The version that the tenant had here before, or that others have: the binding says which it has. A name of
		// another version is harmless, since PostgreSQL looks at the tables anew; at worst it does not fit.
		key := ownKey{tx.tenant.Number, st.versionOf(tx.tenant.Number), sql}
		name, ready := st.ready(key)
		if !ready {
			return nil
		}
		b := &pgx.Batch{}
		b.Queue(nameGate, tx.tenant.Number)
		b.Queue(nameBind, tx.bindArgs()...)
		b.Queue(name, args...)
		sent := time.Now()
		br := c.SendBatch(ctx, b)
		if err := tx.readBinding(br, 1, sent); err != nil {
			_ = br.Close() // says the same
			return unbound(err)
		}
		tx.batch = br
		var err error
		if rows, err = br.Query(); err != nil {
			tx.batch = nil
			_ = br.Close() // says the same
			st.stale = st.stale || misfit(err) && key.version == tx.was
			return err
		}
		return nil
	})
	if !tx.bound.IsZero() && misfit(err) {
		// The tenant was migrated since the name was prepared, or meanwhile. Nothing has been done, so the statement may
		// be sent again: bound anew, and without a name, so that it is parsed anew.
		if err := tx.begin(ctx); err != nil {
			return nil, err
		}
		return tx.conn.Conn().Query(ctx, sql, append([]any{pgx.QueryExecModeDescribeExec}, args...)...)
	}
	if err != nil || rows != nil {
		return rows, err
	}
	// The connection is ours and nothing has been sent on it.
	if err := tx.bind(ctx, tx.conn.Conn()); err != nil {
		tx.giveUp(ctx, err)
		if !bindAgain(ctx, err) {
			return nil, err
		}
		if err := tx.begin(ctx); err != nil {
			return nil, err
		}
	}
	return tx.byName(ctx, sql, args)
}

// oneRow reads the first row of rows and closes them.
type oneRow struct {
	rows pgx.Rows
	err  error
	tx   *Tx
}

func (r oneRow) Scan(dest ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			r.tx.failed(err)
			return err
		}
		return pgx.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}

// failedRows are the rows of a statement that did not run.
type failedRows struct{ err error }

func (r failedRows) Close()                                       {}
func (r failedRows) Err() error                                   { return r.err }
func (r failedRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (r failedRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (r failedRows) Next() bool                                   { return false }
func (r failedRows) Scan(...any) error                            { return r.err }
func (r failedRows) Values() ([]any, error)                       { return nil, r.err }
func (r failedRows) RawValues() [][]byte                          { return nil }
func (r failedRows) Conn() *pgx.Conn                              { return nil }
func (r failedRows) TypeMap() *pgtype.Map                         { return nil }

// boundRows keeps the connection from whoever reads the rows.
type boundRows struct {
	pgx.Rows
	free func() // nil: the transaction does it
}

func (r boundRows) Close() {
	r.Rows.Close()
	if r.free != nil {
		r.free()
	}
}

func (boundRows) Conn() *pgx.Conn { return nil }
