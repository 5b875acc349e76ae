package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// OwnerTx is a transaction of the owner: it makes and changes schemas, roles and the registry. Its search path is
// empty until Bind. It is not safe for concurrent use and ends with the function that received it.
type OwnerTx struct {
	group *group
	conn  *pgxpool.Conn
	bound bool
	tx    *Tx // ends it
}

var _ Querier = (*OwnerTx)(nil)

// OwnerOptions bounds a transaction of the owner.
type OwnerOptions struct {
	LockTimeout      time.Duration // for each lock; 0: the database's
	StatementTimeout time.Duration // for each statement; 0: none
}

// AsOwner runs fn in one transaction of the owner in a group's database, and commits only if fn returned nil.
func (db *DB) AsOwner(ctx context.Context, groupName string, fn func(*OwnerTx) error) error {
	begin := `begin; set local search_path to ''; set local lock_timeout to ` + ms(db.opts.LockTimeout)
	return db.asOwner(ctx, groupName, simply(begin), fn)
}

// AsOwnerWithin is AsOwner with bounds of its own. A process that stands still in the midst of it loses the transaction.
func (db *DB) AsOwnerWithin(ctx context.Context, groupName string, o OwnerOptions, fn func(*OwnerTx) error) error {
	return db.asOwner(ctx, groupName, simply(`begin; `+db.within(o)), fn)
}

// within sets the bounds of a transaction.
func (db *DB) within(o OwnerOptions) string {
	if o.LockTimeout == 0 {
		o.LockTimeout = db.opts.LockTimeout
	}
	return fmt.Sprintf(`select pg_catalog.set_config('search_path', '', true), pg_catalog.set_config('lock_timeout', '%s', true),
	pg_catalog.set_config('statement_timeout', '%s', true), pg_catalog.set_config('idle_in_transaction_session_timeout', '%s', true)`,
		ms(o.LockTimeout), bound(o.StatementTimeout), ms(db.opts.IdleInTransactionTimeout))
}

// simply begins a transaction with a script.
func simply(begin string) func(context.Context, *pgx.Conn) error {
	return func(ctx context.Context, c *pgx.Conn) error { return c.PgConn().Exec(ctx, begin).Close() }
}

// AsOwnerAt is AsOwnerWithin and BindPlaced, where what first queues is sent between the two, and all of it in one
// message exchange if statements are prepared. first must change nothing: it is called and sent again while the server
// is lost. Each of its statements sees what was committed when its turn came.
func (db *DB) AsOwnerAt(ctx context.Context, groupName string, number int32, o OwnerOptions, first func(*pgx.Batch), fn func(*OwnerTx) error) error {
	there := false
	begin := func(ctx context.Context, c *pgx.Conn) error {
		there = false
		b := &pgx.Batch{}
		if db.opts.Statements == Unprepared {
			if err := simply(`begin; `+db.within(o))(ctx, c); err != nil {
				return err
			}
		} else {
			b.Queue(sqlBegin)
			b.Queue(db.within(o))
		}
		first(b)
		b.Queue(bindPlaced, number).Exec(func(tag pgconn.CommandTag) error {
			there = tag.RowsAffected() == 1
			return nil
		})
		return c.SendBatch(ctx, b).Close()
	}
	return db.asOwner(ctx, groupName, begin, func(tx *OwnerTx) error {
		tx.countBind()
		if !there {
			return schemaMissing()
		}
		return fn(tx)
	})
}

// bound is a timeout as PostgreSQL reads it; 0: none.
func bound(d time.Duration) string {
	if d == 0 {
		return "0"
	}
	return ms(d)
}

func (db *DB) asOwner(ctx context.Context, groupName string, begin func(context.Context, *pgx.Conn) error, fn func(*OwnerTx) error) error {
	g, err := db.group(groupName)
	if err != nil {
		return err
	}
	pool, err := g.ownerPool()
	if err != nil {
		return err
	}
	var conn *pgxpool.Conn
	err = retryLost(ctx, g.opts.AcquireTimeout, pool.Reset, func(ctx context.Context) error {
		c, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		if err := begin(ctx, c.Conn()); err != nil {
			if c.Conn().PgConn().TxStatus() != 'I' {
				closeConn(c)
			}
			c.Release()
			return err
		}
		conn = c
		return nil
	})
	if err != nil {
		return Fault(err)
	}
	// The bound transactions' end serves here as well: commit, rollback and what becomes of the connection.
	tx := &Tx{group: g, conn: conn, access: Write, begun: true}
	return tx.end(ctx, func() error { return fn(&OwnerTx{group: g, conn: conn, tx: tx}) })
}

const (
	// ownerBinds is after how many tenants' work a connection of the owner is replaced. PostgreSQL looks through a
	// backend's lists of role members one by one and never forgets a table: with 4,000 tenants behind it, a backend
	// takes four times as long to create one more, and 2 GB (docs/benchmarks.md).
	ownerBinds    = 400
	ownerBindsKey = "oneo_owner_binds"
)

// countBind notes that the connection works for one more tenant.
func (tx *OwnerTx) countBind() {
	tx.bound = true
	data := tx.conn.Conn().PgConn().CustomData()
	n, _ := data[ownerBindsKey].(int)
	data[ownerBindsKey] = n + 1
}

// Retire closes the connection when the transaction ends: its backend will hold more than a later user should pay for.
func (tx *OwnerTx) Retire() { tx.conn.Conn().PgConn().CustomData()[ownerBindsKey] = ownerBinds }

// ownerWorn reports whether a connection of the owner has worked for so many tenants that a new one is cheaper.
func ownerWorn(c *pgxpool.Conn) bool {
	n, _ := c.Conn().PgConn().CustomData()[ownerBindsKey].(int)
	return n >= ownerBinds
}

// AsOwnerIn is AsOwner with the search path bound to the tenant. It checks that the tenant's schema stands there, and
// takes the tenant's gate as a request would, so that it never writes into a schema that is being renamed away. It
// does not mind whether the tenant is suspended.
func (db *DB) AsOwnerIn(ctx context.Context, t tenant.Tenant, fn func(*OwnerTx) error) error {
	if t.IsZero() {
		return fault.New(fault.Internal, "work was to be bound to no tenant").WithCode("no_tenant")
	}
	return withTenant(db.AsOwner(ctx, t.Group, func(tx *OwnerTx) error {
		if err := tx.ShareGate(ctx, t.Number); err != nil {
			return err
		}
		if err := tx.BindPlaced(ctx, t.Number); err != nil {
			return err
		}
		return fn(tx)
	}), t)
}

// Exec runs a statement that returns no rows.
func (tx *OwnerTx) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return tx.conn.Conn().Exec(ctx, sql, tx.args(args)...)
}

// Query runs a statement; the rows must be closed.
func (tx *OwnerTx) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return tx.conn.Conn().Query(ctx, sql, tx.args(args)...)
}

// QueryRow runs a statement and reads its first row; pgx.ErrNoRows when there is none.
func (tx *OwnerTx) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return tx.conn.Conn().QueryRow(ctx, sql, tx.args(args)...)
}

// args keeps a statement on a tenant's tables out of the connection's statement cache: the next tenant's may differ.
func (tx *OwnerTx) args(args []any) []any {
	if !tx.bound {
		return args
	}
	return append([]any{pgx.QueryExecModeDescribeExec}, args...)
}

// Script runs several statements in one round trip, inside the transaction. Values cannot be passed: the SQL must
// consist of migrations, constants and identifiers that were quoted by Quote.
func (tx *OwnerTx) Script(ctx context.Context, sql string) error {
	return tx.conn.Conn().PgConn().Exec(ctx, sql).Close()
}

// deallocates finds what takes prepared statements away.
var deallocates = regexp.MustCompile(`(?i)\bdeallocate\b`)

// Run is Script, and tells how many of the statements were carried out. They may take away prepared statements.
func (tx *OwnerTx) Run(ctx context.Context, sql string) (done int, err error) {
	if deallocates.MatchString(sql) {
		defer func() {
			if err == nil { // else the connection's transaction has failed
				err = tx.conn.Conn().DeallocateAll(ctx)
			}
		}()
	}
	results := tx.conn.Conn().PgConn().Exec(ctx, sql)
	for results.NextResult() {
		if _, err := results.ResultReader().Close(); err == nil {
			done++
		}
	}
	return done, results.Close()
}

// Send runs statements in one message exchange. Their names must be qualified.
func (tx *OwnerTx) Send(ctx context.Context, b *pgx.Batch) error {
	return tx.conn.Conn().SendBatch(ctx, b).Close()
}

// Last leaves what to queues to be sent together with the commit: if one of these statements fails nothing is committed.
// Their search path is empty: they are on tables that are not the tenant's.
func (tx *OwnerTx) Last(to func(*pgx.Batch)) {
	tx.tx.last = &pgx.Batch{}
	tx.tx.last.Queue(`set local search_path to ''`)
	to(tx.tx.last)
}

// CopyFrom runs a copy ... from stdin whose rows are read from r. An error of r is what comes back, and nothing was copied.
func (tx *OwnerTx) CopyFrom(ctx context.Context, r io.Reader, sql string) (rows int64, err error) {
	in := &watched{r: r}
	tag, err := tx.conn.Conn().PgConn().CopyFrom(ctx, in, sql)
	if in.err != nil {
		return 0, in.err
	}
	return tag.RowsAffected(), err
}

// watched remembers the error that ended a stream: PostgreSQL only says that the client gave up.
type watched struct {
	r   io.Reader
	err error
}

func (w *watched) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		w.err = err
	}
	return n, err
}

// Bind sets the search path to the schema, ext and pg_temp until the transaction ends.
func (tx *OwnerTx) Bind(ctx context.Context, s tenant.Schema) error {
	if s.IsZero() {
		return fault.New(fault.Internal, "work was to be bound to no schema").WithCode("no_tenant")
	}
	tx.countBind()
	return tx.Script(ctx, "set local search_path to "+Quote(s.String())+", ext, pg_temp")
}

// A tenant that is being moved, or was, is no place to write in.
const bindPlaced = `select case when p.moving is null and p.state <> 'moved' then
	pg_catalog.set_config('search_path', pg_catalog.quote_ident(p.schema) || ', ext, pg_temp', true) else ext.refuse('ON005', 'moving')::text end
from public.placements p join pg_catalog.pg_namespace n on n.nspname = p.schema and n.oid = p.namespace where p.number = $1`

// BindPlaced is Bind for the schema in which the tenant's placement says that it stands. NotFound: nowhere here; Locked: it is
// being moved.
func (tx *OwnerTx) BindPlaced(ctx context.Context, number int32) error {
	tx.countBind()
	tag, err := tx.conn.Conn().Exec(ctx, bindPlaced, number)
	if err != nil {
		return err
	}
	if tag.RowsAffected() != 1 {
		return schemaMissing()
	}
	return nil
}

func schemaMissing() error {
	return fault.New(fault.NotFound, "the tenant's schema is not where the registry says").WithCode("schema_missing")
}

// LockGate takes the tenant's gate exclusively until the transaction ends: it waits for the bound transactions in
// flight and keeps new ones out. It waits at most the lock timeout; then the fault is Locked.
func (tx *OwnerTx) LockGate(ctx context.Context, number int32) error {
	_, err := tx.conn.Conn().Exec(ctx, `select pg_catalog.pg_advisory_xact_lock($1::int4, $2::int4)`, GateLock, number)
	if SQLState(err) == "55P03" {
		return fault.Wrap(err, fault.Locked, "requests of this tenant are still at work").WithCode("gate_busy").WithRetry(time.Second)
	}
	return err
}

// ShareGate takes the tenant's gate shared until the transaction ends, as a bound transaction does.
func (tx *OwnerTx) ShareGate(ctx context.Context, number int32) error {
	_, err := tx.conn.Conn().Exec(ctx, `select pg_catalog.pg_advisory_xact_lock_shared($1::int4, $2::int4)`, GateLock, number)
	if SQLState(err) == "55P03" {
		return fault.Wrap(err, fault.Locked, "the tenant is being changed at the moment").WithCode("tenant_locked").WithRetry(time.Second)
	}
	return err
}

// TryOperationLock takes the tenant's operation lock until the transaction ends, and reports whether it did. It never
// waits: whoever wants the lock polls. Locked: a full backup has come at this moment; the transaction must end.
func (tx *OwnerTx) TryOperationLock(ctx context.Context, number int32) (bool, error) {
	got, _, err := tx.tryOperation(ctx, number)
	return got, err
}

func (tx *OwnerTx) tryOperation(ctx context.Context, number int32) (got bool, by string, err error) {
	got, by, err = tryOperation(ctx, tx.conn.Conn(), "pg_try_advisory_xact_lock", number)
	if err == nil && got && by != "" { // which cannot be let go before the transaction ends
		err = HeldBack(by)
	}
	return got, by, err
}

// LockOperation polls for the tenant's operation lock for as long as wait. The fault is Locked: another operation has it, or a
// full backup has not copied the tenant yet.
func (tx *OwnerTx) LockOperation(ctx context.Context, number int32, wait time.Duration) error {
	return pollOperation(ctx, wait, func() (bool, string, error) { return tx.tryOperation(ctx, number) })
}

// OperationBusy says that the operation lock of a tenant was not to be had.
func OperationBusy() error {
	return fault.New(fault.Locked, "another operation is at work on this tenant").WithCode("operation_running").
		WithRetry(time.Second).WithHint("wait until it is done, then run the command again")
}

func pollOperation(ctx context.Context, wait time.Duration, try func() (got bool, by string, err error)) error {
	deadline := time.Now().Add(wait)
	for attempt := 0; ; attempt++ {
		got, by, err := try()
		if err != nil || got {
			return err
		}
		if !pause(ctx, deadline, attempt) {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if by != "" {
				return HeldBack(by)
			}
			return OperationBusy()
		}
	}
}

// TryPoolLock takes the lock of the database's pool of spare schemas until the transaction ends, and reports whether it
// did. It never waits.
func (tx *OwnerTx) TryPoolLock(ctx context.Context) (bool, error) {
	var got bool
	err := tx.conn.Conn().QueryRow(ctx, `select pg_catalog.pg_try_advisory_xact_lock($1::int4, 0)`, lockPool).Scan(&got)
	return got, err
}

// Quote quotes an identifier. It is the one place where a name becomes SQL.
func Quote(identifier string) string { return pgx.Identifier{identifier}.Sanitize() }
