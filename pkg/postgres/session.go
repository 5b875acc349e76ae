package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Session is a connection of the owner's own, past any pooler, for work that cannot be one transaction: what is set on
// it and the locks that it holds last until the function that received it returns. Each statement is a transaction by
// itself, unless it runs inside Tx. It is not safe for concurrent use.
type Session struct {
	conn  *pgx.Conn
	group *group
}

var _ Querier = (*Session)(nil)

// OwnerSession connects by a group's DirectURL, runs fn, and closes the connection. The search path is empty and the
// lock timeout the database's until fn changes them. A server that notices that this process has died ends what the
// session was doing, where its system can tell (PostgreSQL 14, Linux and the like).
func (db *DB) OwnerSession(ctx context.Context, groupName string, fn func(*Session) error) error {
	g, err := db.group(groupName)
	if err != nil {
		return err
	}
	cfg, err := g.config(g.urls.DirectURL, 1)
	if err != nil {
		return err
	}
	// What runs here changes tables: nothing is kept of a statement.
	cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
	var conn *pgx.Conn
	err = retryLost(ctx, g.opts.AcquireTimeout, func() {}, func(ctx context.Context) (err error) {
		conn, err = pgx.ConnectConfig(ctx, cfg.ConnConfig)
		return err
	})
	if err != nil {
		return Fault(err)
	}
	defer func() {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(cctx) // its backend ends with its socket
	}()
	s := &Session{conn: conn, group: g}
	if err := s.begin(ctx, ""); err != nil {
		return Fault(err)
	}
	return Fault(fn(s))
}

const (
	// sessionUses is after how many uses a reading session is replaced: its backend never forgets a tenant's catalog, about 80 kB of
	// a small one.
	sessionUses    = 100
	sessionUsesKey = "oneo_session_uses"
	// sessionIdle is for how long one is kept that nobody uses.
	sessionIdle = 15 * time.Second
	// sessionsAtMost is no bound but PostgreSQL's own: whoever calls says how many there are at one time.
	sessionsAtMost = 1000
)

// ReadingSession is OwnerSession for work that changes nothing, one tenant after another: a login, and a backend that knows no
// catalog yet, cost several times what it takes to read a small tenant. fn has the connection to itself, and finds it as a
// new one is, but for the statements that Kept keeps. When fn has returned, every lock is let go, settings, role, temporary
// tables and cursors are gone, and only then somebody else may get it. A connection is used again only where nothing had
// failed: it is closed when fn returned an error or panicked, when ctx has ended, also behind fn's back, when a transaction
// or a COPY was left open, and when it cannot be cleared. One that is idle is closed after a quarter of a minute, or with db.
func (db *DB) ReadingSession(ctx context.Context, groupName string, fn func(*Session) error) error {
	g, err := db.group(groupName)
	if err != nil {
		return err
	}
	pool, err := g.sessionPool()
	if err != nil {
		return err
	}
	var c *pgxpool.Conn
	err = retryLost(ctx, g.opts.AcquireTimeout, pool.Reset, func(ctx context.Context) (err error) {
		c, err = pool.Acquire(ctx)
		return err
	})
	if err != nil {
		return Fault(err)
	}
	s := &Session{conn: c.Conn(), group: g}
	clean := false
	defer func() {
		if !clean || !s.clear(ctx) {
			closeConn(c)
		}
		c.Release()
	}()
	err = fn(s)
	clean = err == nil
	return Fault(err)
}

// sessionPool holds the connections of reading sessions.
func (g *group) sessionPool() (*pgxpool.Pool, error) {
	return g.open(&g.sessions, g.urls.DirectURL, sessionsAtMost, func(cfg *pgxpool.Config) {
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
		cfg.MaxConnIdleTime, cfg.HealthCheckPeriod = sessionIdle, sessionIdle/3
		// One that its server has lost is not found out by fn, as with a new one.
		cfg.ShouldPing = func(context.Context, pgxpool.ShouldPingParams) bool { return true }
		cfg.AfterConnect = func(ctx context.Context, c *pgx.Conn) error {
			return (&Session{conn: c, group: g}).begin(ctx, plannedOnce)
		}
	})
}

// plannedOnce lets a statement that is kept be planned once, for any tenant.
const plannedOnce = "set plan_cache_mode to force_generic_plan;\n"

// clearing is what DISCARD ALL does, but for what is kept prepared and planned.
const clearing = `close all; set session authorization default; reset all; unlisten *; select pg_catalog.pg_advisory_unlock_all();
discard temp; discard sequences;
`

// clear makes the session as a new one is, and reports whether it may be used again. One whose ctx has ended may not: a request to cancel a
// statement may still be under way to the server, and would meet the next one's. The pool itself keeps no connection that is closed,
// busy or in a transaction.
func (s *Session) clear(ctx context.Context) bool {
	data := s.conn.PgConn().CustomData()
	uses, _ := data[sessionUsesKey].(int)
	data[sessionUsesKey] = uses + 1
	if uses+1 >= sessionUses {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, s.group.opts.AcquireTimeout)
	defer cancel()
	return s.settle(ctx, clearing+plannedOnce) == nil
}

// begin makes a new connection a session, on which first is run before its settings are made.
func (s *Session) begin(ctx context.Context, first string) error {
	// Through a pooler the settings and the locks would be somebody else's in a moment.
	var pid uint32
	if err := s.QueryRow(ctx, `select pg_catalog.pg_backend_pid()`, outsideTx).Scan(&pid); err != nil {
		return err
	}
	if pid != s.conn.PgConn().PID() {
		return fault.New(fault.Invalid, "the direct connection to the database of group %s goes through a pooler", s.group.name).
			WithCode("direct_url_pooled").WithHint("set ONEO_DATABASE_DIRECT_URL, or direct_url of the group, to PostgreSQL's own address")
	}
	return s.settle(ctx, first)
}

// settle runs first and makes the settings that a session begins with.
func (s *Session) settle(ctx context.Context, first string) error {
	if err := s.Script(ctx, first+"set search_path to ''; "+s.timeouts(s.group.opts.LockTimeout, 0)); err != nil {
		return err
	}
	const check = `select pg_catalog.set_config('client_connection_check_interval', '10s', false)
where pg_catalog.current_setting('server_version_num')::int >= 140000`
	var pe *pgconn.PgError
	if err := s.Script(ctx, check); err != nil && !errors.As(err, &pe) { // a server's refusal changes nothing else
		return err
	}
	return nil
}

// Kept runs queries that the connection of a reading session prepares and plans once for all who use it. They must be the same
// for every tenant, and their names those of pg_catalog or qualified: what stands in a tenant's schema differs.
func (s *Session) Kept() Querier { return kept{s} }

type kept struct{ *Session }

func (k kept) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return k.Session.Query(ctx, sql, append([]any{pgx.QueryExecModeCacheStatement}, args...)...)
}

func (k kept) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return k.Session.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeCacheStatement}, args...)...)
}

// Exec runs a statement that returns no rows.
func (s *Session) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	return s.conn.Exec(ctx, sql, args...)
}

// Query runs a statement; the rows must be closed.
func (s *Session) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	return s.conn.Query(ctx, sql, args...)
}

// QueryRow runs a statement and reads its first row; pgx.ErrNoRows when there is none.
func (s *Session) QueryRow(ctx context.Context, sql string, args ...any) pgx.Row {
	return s.conn.QueryRow(ctx, sql, args...)
}

// Script runs SQL as it stands, in one message: migrations, constants and identifiers that were quoted by Quote. Several
// statements outside of Tx are one transaction, which some statements refuse.
func (s *Session) Script(ctx context.Context, sql string) error {
	return s.conn.PgConn().Exec(ctx, sql).Close()
}

// Send runs statements in one message exchange.
func (s *Session) Send(ctx context.Context, b *pgx.Batch) error {
	return s.conn.SendBatch(ctx, b).Close()
}

// Tx runs fn in a transaction on the session, and commits only if fn returned nil.
func (s *Session) Tx(ctx context.Context, fn func() error) error { return s.tx(ctx, "begin", fn) }

// Snapshot runs fn in a transaction that changes nothing and in which every statement sees the rows as they were at its
// first one. A lock that must come before what is read is taken before.
func (s *Session) Snapshot(ctx context.Context, fn func() error) error {
	return s.tx(ctx, "begin isolation level repeatable read, read only", fn)
}

func (s *Session) tx(ctx context.Context, begin string, fn func() error) error {
	if err := s.Script(ctx, begin); err != nil {
		return err
	}
	err := fn()
	if err == nil {
		var results []*pgconn.Result
		if results, err = s.conn.PgConn().Exec(ctx, "commit").ReadAll(); err == nil {
			if len(results) == 1 && results[0].CommandTag.String() == "COMMIT" {
				return nil
			}
			return fault.New(fault.Internal, "a transaction in which a statement had failed was to be committed").WithCode("rolled_back")
		}
		err = fmt.Errorf("commit: %w", err)
	}
	if s.conn.PgConn().TxStatus() != 'I' && !s.conn.IsClosed() {
		rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if rerr := s.Script(rctx, "rollback"); rerr != nil {
			_ = s.conn.Close(rctx)
		}
	}
	return err
}

// Timeouts bounds the session's later statements: how long they may wait for a lock and how long they may take; 0: no
// bound.
func (s *Session) Timeouts(ctx context.Context, lock, statement time.Duration) error {
	return s.Script(ctx, s.timeouts(lock, statement))
}

func (s *Session) timeouts(lock, statement time.Duration) string {
	return fmt.Sprintf("set lock_timeout to %s; set statement_timeout to %s; set idle_in_transaction_session_timeout to %s",
		bound(lock), bound(statement), ms(s.group.opts.IdleInTransactionTimeout))
}

// BindPlaced sets the session's search path to the schema in which the tenant's placement says that it stands, ext and
// pg_temp, and returns that schema's oid. NotFound: it stands nowhere here; Locked: it is being moved.
func (s *Session) BindPlaced(ctx context.Context, number int32) (namespace uint32, err error) {
	const bind = `select n.oid, case when p.moving is null and p.state <> 'moved' then
	pg_catalog.set_config('search_path', pg_catalog.quote_ident(p.schema) || ', ext, pg_temp', false) else ext.refuse('ON005', 'moving')::text end
from public.placements p join pg_catalog.pg_namespace n on n.nspname = p.schema and n.oid = p.namespace where p.number = $1`
	var path string
	if err := s.QueryRow(ctx, bind, number).Scan(&namespace, &path); errors.Is(err, pgx.ErrNoRows) {
		return 0, schemaMissing()
	} else if err != nil {
		return 0, err
	}
	return namespace, nil
}

// CopyTo runs a copy ... to stdout and writes its rows to w. When w fails the session is over.
func (s *Session) CopyTo(ctx context.Context, w io.Writer, sql string) (rows int64, err error) {
	tag, err := s.conn.PgConn().CopyTo(ctx, w, sql)
	return tag.RowsAffected(), err
}

// UnlockOperation gives back what LockOperation took.
func (s *Session) UnlockOperation(ctx context.Context, number int32) error {
	_, err := s.Exec(ctx, `select pg_catalog.pg_advisory_unlock($1::int4, $2::int4)`, OperationLock, number)
	return err
}

// LockOperation polls for the tenant's operation lock for as long as wait, and keeps it until UnlockOperation or the
// session's end. The fault is Locked: another operation has it, or a full backup has not copied the tenant yet.
func (s *Session) LockOperation(ctx context.Context, number int32, wait time.Duration) error {
	return pollOperation(ctx, wait, func() (got bool, by string, err error) {
		got, by, err = tryOperation(ctx, s.conn, "pg_try_advisory_lock", number)
		if err == nil && got && by != "" {
			return false, by, s.UnlockOperation(ctx, number)
		}
		return got, by, err
	})
}
