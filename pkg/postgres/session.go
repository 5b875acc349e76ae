package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

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
	// Through a pooler the settings and the locks would be somebody else's in a moment.
	var pid uint32
	if err := s.QueryRow(ctx, `select pg_catalog.pg_backend_pid()`, outsideTx).Scan(&pid); err != nil {
		return Fault(err)
	}
	if pid != conn.PgConn().PID() {
		return fault.New(fault.Invalid, "the direct connection to the database of group %s goes through a pooler", groupName).
			WithCode("direct_url_pooled").WithHint("set ONEO_DATABASE_DIRECT_URL, or direct_url of the group, to PostgreSQL's own address")
	}
	if err := s.Script(ctx, "set search_path to ''"); err != nil {
		return Fault(err)
	}
	if err := s.Timeouts(ctx, g.opts.LockTimeout, 0); err != nil {
		return Fault(err)
	}
	const check = `select pg_catalog.set_config('client_connection_check_interval', '10s', false)
where pg_catalog.current_setting('server_version_num')::int >= 140000`
	var pe *pgconn.PgError
	if err := s.Script(ctx, check); err != nil && !errors.As(err, &pe) { // a server's refusal changes nothing else
		return Fault(err)
	}
	return Fault(fn(s))
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
	return s.Script(ctx, fmt.Sprintf("set lock_timeout to %s; set statement_timeout to %s; set idle_in_transaction_session_timeout to %s",
		bound(lock), bound(statement), ms(s.group.opts.IdleInTransactionTimeout)))
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
