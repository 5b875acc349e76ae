package postgres

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Statement is one statement of an operator's, to be run for one tenant after another.
type Statement struct {
	SQL string
	// Write lets it change rows; otherwise the transaction is read-only.
	Write bool
	// Rehearse rolls it back after it has run; only with Write.
	Rehearse bool
	// Describe leaves it at what Columns is told.
	Describe bool
	// Timeout ends the statement; 0: none.
	Timeout time.Duration
	// Limit is after how many rows a reading statement is left alone; 0: none. A writing one always runs to its end.
	Limit int
	// Mark, where it is given, is the run whose change this is: it is made once for each run and tenant.
	Mark uuid.UUID
	// Columns is told of the result's columns before the statement runs: an error of it ends the transaction. May be nil.
	Columns func([]Column) error
	// Row is called with each row in the text form of PostgreSQL, nil for null; the bytes are valid during the call.
	// May be nil.
	Row func([][]byte) error
}

// Column is one column of a statement's result.
type Column struct {
	Name string
	OID  uint32
	Type string // the name that PostgreSQL has for the type, without its schema
}

// StatementResult is what a statement did.
type StatementResult struct {
	Rows   int64 `json:"rows"`          // changed or returned; with Cut those that were read
	Cut    bool  `json:"cut,omitempty"` // there are more rows than Limit
	Before bool  `json:"-"`             // the run's change had been made before: nothing was done
}

var errRehearsed = errors.New("rehearsed")

// CheckStatement refuses, before anything is begun, what AsTenant would refuse at every tenant.
func CheckStatement(sql string) error {
	if firstWord(sql) == "" {
		return fault.New(fault.Invalid, "the statement is empty").WithCode("no_statement")
	}
	err := guard(sql)
	if err == nil {
		return nil
	}
	// An operator knows of no bound transaction.
	return fault.New(fault.Invalid, "%s", strings.TrimSuffix(fault.Of(err).Message, " in a bound transaction")).WithCode("statement_refused").
		WithHint("select, insert, update, delete, merge, with, values and explain are; changes of tables belong in a migration")
}

// ChangesRows reports whether a statement is there to change rows, as far as its first word tells.
func ChangesRows(sql string) bool {
	return slices.Contains([]string{"insert", "update", "delete", "merge"}, firstWord(sql))
}

// AsTenant runs one statement of an operator's in a transaction bound to the tenant, with the tenant's own rights, in
// the time zone UTC, whatever version the tenant is at. A mark is written in the same transaction by the login itself,
// which may, and whose role the statement cannot take: a run that is taken up again finds it and changes nothing.
// Faults are those of InTenant; what PostgreSQL said of the statement itself is in the chain of the error.
func (db *DB) AsTenant(ctx context.Context, t tenant.Tenant, s Statement) (done StatementResult, err error) {
	if err := CheckStatement(s.SQL); err != nil {
		return done, err
	}
	access := Read
	if s.Write && !s.Describe {
		access = Write
	}
	if s.Timeout > 0 { // the server's own timeout is of no use when the network swallows its words
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.Timeout+db.opts.AcquireTimeout+10*time.Second)
		defer cancel()
	}
	err = db.inTenant(ctx, t, &Tx{access: access, anyVersion: true}, func(tx *Tx) error {
		done, err = tx.statement(ctx, s)
		tx.ran(done.Rows)
		return err
	})
	if errors.Is(err, errRehearsed) {
		err = nil
	}
	if err == nil && access == Write && !s.Rehearse {
		err = failpoint.Hit("sql.committed")
	}
	return done, err
}

// AsShared runs one statement of an operator's on the shared schema of the main group, with the rights of the app role.
// It has no mark: it is one transaction, and whoever sends it again means it. Faults are those of InShared; what
// PostgreSQL said of the statement itself is in the chain of the error.
func (db *DB) AsShared(ctx context.Context, s Statement) (done StatementResult, err error) {
	if err := CheckStatement(s.SQL); err != nil {
		return done, err
	}
	access := Read
	if s.Write && !s.Describe {
		access = Write
	}
	s.Mark = uuid.Nil
	if s.Timeout > 0 { // as in AsTenant
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, s.Timeout+db.opts.AcquireTimeout+10*time.Second)
		defer cancel()
	}
	err = db.InShared(ctx, access, func(tx *Tx) error {
		if _, err := tx.conn.Conn().Exec(ctx, `select pg_catalog.set_config('search_path', 'public, ext, pg_temp', true)`, outsideTx); err != nil {
			return err
		}
		done, err = tx.statement(ctx, s)
		tx.ran(done.Rows)
		return err
	})
	if errors.Is(err, errRehearsed) {
		err = nil
	}
	return done, err
}

func (tx *Tx) statement(ctx context.Context, s Statement) (done StatementResult, err error) {
	c := tx.conn.Conn()
	// Of a session they are the server's and differ; of the result's text they must not.
	const settings = `select pg_catalog.current_setting('role'), pg_catalog.set_config('statement_timeout', $1, true),
pg_catalog.set_config('timezone', 'UTC', true), pg_catalog.set_config('datestyle', 'ISO, YMD', true),
pg_catalog.set_config('intervalstyle', 'iso_8601', true), pg_catalog.set_config('bytea_output', 'hex', true),
pg_catalog.set_config('extra_float_digits', '1', true)`
	var role string
	timeout := "0"
	if s.Timeout > 0 {
		timeout = ms(s.Timeout)
	}
	if err := c.QueryRow(ctx, settings, outsideTx, timeout).Scan(&role, nil, nil, nil, nil, nil, nil); err != nil {
		return done, err
	}
	mark := s.Mark != uuid.Nil && s.Write && !s.Rehearse && !s.Describe
	if mark {
		if done, err = tx.marked(ctx, s.Mark, role); err != nil || done.Before {
			return done, err
		}
	}
	if err := tx.describe(ctx, s); err != nil || s.Describe {
		return done, err
	}
	if err := failpoint.Hit("sql.bound"); err != nil {
		return done, err
	}
	if done, err = tx.execute(ctx, s); err != nil || !s.Write {
		return done, err
	}
	if err := failpoint.Hit("sql.ran"); err != nil {
		return done, err
	}
	// What is deferred happens now, with the tenant's rights, or it is no part of the change.
	if err := c.PgConn().Exec(ctx, `set constraints all immediate`).Close(); err != nil {
		return done, err
	}
	if s.Rehearse {
		return done, errRehearsed
	}
	if mark {
		if err := tx.mark(ctx, s.Mark, done); err != nil {
			return done, err
		}
	}
	return done, failpoint.Hit("sql.marked")
}

// layDown ends the tenant's role for the rest of the transaction: it is the login's own again.
const layDown = `select pg_catalog.set_config('role', 'none', true)`

// marked reads the mark of an earlier attempt. The role is the tenant's again afterwards.
func (tx *Tx) marked(ctx context.Context, run uuid.UUID, role string) (done StatementResult, err error) {
	c := tx.conn.Conn()
	if _, err := c.Exec(ctx, layDown, outsideTx); err != nil {
		return done, err
	}
	const look = `select m.result from public.marks m where m.run = $1 and m.tenant = $2`
	var result []byte
	switch err := c.QueryRow(ctx, look, outsideTx, run, tx.tenant.Number).Scan(&result); {
	case err == nil:
		done.Before = true
		if err := json.Unmarshal(result, &done); err != nil {
			return done, fmt.Errorf("read the mark: %w", err)
		}
	case !errors.Is(err, pgx.ErrNoRows):
		return done, err
	}
	_, err = c.Exec(ctx, `select pg_catalog.set_config('role', $1, true)`, outsideTx, role)
	return done, err
}

// mark writes that the run has changed this tenant. The role is the login's afterwards.
func (tx *Tx) mark(ctx context.Context, run uuid.UUID, done StatementResult) error {
	c := tx.conn.Conn()
	result, err := json.Marshal(done)
	if err != nil {
		return err
	}
	if _, err := c.Exec(ctx, layDown, outsideTx); err != nil {
		return err
	}
	const insert = `insert into public.marks (run, tenant, result) values ($1, $2, $3) on conflict do nothing`
	tag, err := c.Exec(ctx, insert, outsideTx, run, tx.tenant.Number, string(result))
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 { // this process was taken for dead, and is not: the other one's change stands
		return fault.New(fault.Locked, "another process has made this change at the same time").WithCode("marked").WithRetry(time.Second)
	}
	return nil
}

// describe parses the statement without a name, as the last one on this connection: execute runs it.
func (tx *Tx) describe(ctx context.Context, s Statement) error {
	pc := tx.conn.Conn().PgConn()
	parsed, err := pc.Prepare(ctx, "", s.SQL, nil)
	if err != nil {
		return err
	}
	if n := len(parsed.ParamOIDs); n > 0 {
		return fault.New(fault.Invalid, "the statement has %d parameter(s), which nobody fills", n).WithCode("has_parameters").
			WithHint("write the values themselves instead of $1")
	}
	columns, foreign, err := tx.columns(ctx, parsed.Fields)
	if err != nil {
		return err
	}
	if s.Columns != nil {
		if err := s.Columns(columns); err != nil {
			return err
		}
	}
	if foreign && !s.Describe { // looking for their names has taken the statement's place
		_, err = pc.Prepare(ctx, "", s.SQL, nil)
	}
	return err
}

// columns names the types. foreign: some are not PostgreSQL's own, and a statement was run to name them.
func (tx *Tx) columns(ctx context.Context, fields []pgconn.FieldDescription) (columns []Column, foreign bool, err error) {
	c := tx.conn.Conn()
	var unknown []uint32
	for _, f := range fields {
		column := Column{Name: f.Name, OID: f.DataTypeOID}
		if t, ok := c.TypeMap().TypeForOID(f.DataTypeOID); ok {
			column.Type = t.Name
		} else {
			unknown = append(unknown, f.DataTypeOID)
		}
		columns = append(columns, column)
	}
	if len(unknown) == 0 {
		return columns, false, nil
	}
	const names = `select t.oid, t.typname::text from pg_catalog.pg_type t where t.oid = any($1::oid[])`
	rows, err := c.Query(ctx, names, outsideTx, unknown)
	if err != nil {
		return nil, true, err
	}
	var oid uint32
	var name string
	_, err = pgx.ForEachRow(rows, []any{&oid, &name}, func() error {
		for i := range columns {
			if columns[i].OID == oid {
				columns[i].Type = name
			}
		}
		return nil
	})
	return columns, true, err
}

// execute runs what describe has parsed. It speaks the protocol itself, because only there can PostgreSQL be told to
// stop after so many rows: whoever reads a million rows to drop all but a thousand of them has read them all the same.
func (tx *Tx) execute(ctx context.Context, s Statement) (done StatementResult, err error) {
	pc := tx.conn.Conn().PgConn()
	most := 0
	if !s.Write && s.Limit > 0 {
		most = s.Limit + 1 // the one more says that there are more
	}
	var failure error
	f := pc.Frontend()
	f.SendBind(&pgproto3.Bind{})
	f.SendExecute(&pgproto3.Execute{MaxRows: uint32(most)})
	f.SendClose(&pgproto3.Close{ObjectType: 'P'})
	f.SendSync(&pgproto3.Sync{})
	if err := f.Flush(); err != nil {
		closeConn(tx.conn)
		return done, err
	}
	for {
		message, err := pc.ReceiveMessage(ctx)
		if err != nil {
			// The server's answer ends in the middle: nothing can follow on this connection.
			closeConn(tx.conn)
			return done, err
		}
		switch m := message.(type) {
		case *pgproto3.DataRow:
			if done.Rows++; most > 0 && done.Rows == int64(most) {
				done.Cut, done.Rows = true, int64(s.Limit)
				continue
			}
			if s.Row != nil && failure == nil {
				failure = s.Row(m.Values)
			}
		case *pgproto3.CommandComplete: // of EXPLAIN it counts nothing
			done.Rows = max(done.Rows, pgconn.NewCommandTag(string(m.CommandTag)).RowsAffected())
		case *pgproto3.ErrorResponse:
			failure = pgconn.ErrorResponseToPgError(m)
		case *pgproto3.ReadyForQuery:
			return done, failure
		}
	}
}
