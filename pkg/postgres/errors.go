package postgres

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// SQLSTATEs that the functions in ext raise for the binding: the gate is held, the placement is not as the caller believed,
// the version is outside of the range that is served; and for the owner's: the tenant is being moved.
const (
	stateGateHeld  = "ON001"
	stateNotServed = "ON002"
	stateVersion   = "ON003"
	stateMoving    = "ON005"
)

// Fault turns what PostgreSQL or the way to it answered into a fault by its SQLSTATE, once, at the driver's door.
// A fault, pgx.ErrNoRows, a cancelled context and what is not PostgreSQL's pass through as they are.
func Fault(err error) error {
	if err == nil {
		return nil
	}
	var f *fault.Fault
	if errors.As(err, &f) || errors.Is(err, pgx.ErrNoRows) || errors.Is(err, context.Canceled) {
		return err
	}
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return fromState(err, pe)
	}
	var connect *pgconn.ConnectError
	if errors.As(err, &connect) {
		return fault.Wrap(err, fault.Unavailable, "PostgreSQL at %s cannot be reached", place(connect.Config)).
			WithCode("database_unreachable").WithRetry(time.Second).
			WithHint("is the server running? `oneo config show --origin` says where the address comes from")
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fault.Wrap(err, fault.Unavailable, "the database did not answer in time").
			WithCode("database_timeout").WithRetry(time.Second)
	}
	if connectionLost(err) {
		return fault.Wrap(err, fault.Unavailable, "the connection to PostgreSQL was lost").
			WithCode("database_unreachable").WithRetry(time.Second)
	}
	return err
}

func fromState(err error, pe *pgconn.PgError) error {
	unavailable := func(code, message string) *fault.Fault {
		return fault.Wrap(err, fault.Unavailable, "%s", message).WithCode(code).WithRetry(time.Second)
	}
	switch pe.Code {
	case stateGateHeld:
		return fault.Wrap(err, fault.Suspended, "this tenant is being changed at the moment").
			WithCode("tenant_locked").WithRetry(time.Second)
	case stateNotServed:
		if strings.HasSuffix(pe.Message, "suspended") {
			return fault.Wrap(err, fault.Suspended, "this tenant is not available at the moment").
				WithCode("tenant_suspended").WithRetry(30 * time.Second)
		}
		if strings.HasSuffix(pe.Message, "moved") { // and whoever came here has not heard of it
			return fault.Wrap(err, fault.Suspended, "this tenant has just been moved").WithCode("tenant_moved").WithRetry(time.Second)
		}
		if strings.HasSuffix(pe.Message, "moving") || strings.HasSuffix(pe.Message, "arriving") {
			return fault.Wrap(err, fault.Suspended, "this tenant is being moved: it can be read, and written again in a moment").
				WithCode("tenant_moving").WithRetry(2 * time.Second)
		}
		return fault.Wrap(err, fault.Gone, "this tenant has been removed").WithCode("tenant_gone")
	case stateVersion:
		return upgrading(err)
	case stateMoving:
		return moving(err)
	case "23505":
		return fault.Wrap(err, fault.Conflict, "it exists already").WithCode("exists")
	case "23503":
		return fault.Wrap(err, fault.Conflict, "it refers to something that is not there, or is still referred to").WithCode("reference")
	case "23502", "23514", "22001", "22003", "22007", "22008", "22021", "22P02", "22P05":
		return fault.Wrap(err, fault.Unfit, "a value does not fit").WithCode("value")
	case "25P03":
		return unavailable("transaction_idle", "the transaction stood still for too long and was ended")
	case "57014":
		return unavailable("statement_timeout", "the statement took too long and was cancelled")
	case "55P03":
		return fault.Wrap(err, fault.Locked, "another transaction holds a lock on this").WithCode("lock_timeout").WithRetry(time.Second)
	case "40001", "40P01":
		return fault.Wrap(err, fault.Conflict, "another change came in between").WithCode("serialization").WithRetry(time.Second)
	case "25006":
		return fault.Wrap(err, fault.Internal, "a reading transaction tried to write").WithCode("read_only")
	case "42501":
		return fault.Wrap(err, fault.Internal, "PostgreSQL refused access").WithCode("isolation").
			WithHint("`oneo init` sets the roles' rights; a tenant's own role reaches that tenant only")
	case "3D000":
		return unavailable("database_missing", "the database does not exist").
			WithHint("`oneo init --admin-url ...` creates it")
	case "53100":
		return unavailable("disk_full", "PostgreSQL's disk is full").WithHint("free space where PostgreSQL keeps its data, then run the same again")
	case "53200":
		return unavailable("out_of_memory", "PostgreSQL has no memory left for this").
			WithHint("its log says which; too few locks are cured by a higher max_locks_per_transaction")
	case "53300":
		return unavailable("too_many_connections", "PostgreSQL has no connection free").
			WithHint("raise max_connections of PostgreSQL, or lower database.max_conns")
	}
	switch pe.Code[:2] {
	case "28":
		return unavailable("login_refused", "PostgreSQL refused the login").
			WithHint("check the user and password of the database URL; `oneo init` makes the roles, with passwords from server.secret")
	case "08", "53", "57", "58":
		return unavailable("database_unavailable", "PostgreSQL is not available at the moment")
	}
	return err
}

// moving is what an operation is told that would change a tenant in the midst of its move.
func moving(cause error) error {
	return fault.Wrap(cause, fault.Locked, "the tenant is being moved to another group, or has just been").WithCode("operation_running").
		WithRetry(time.Second).WithHint("wait for it; if its process died, `oneo tenant move` or a server takes it up")
}

// Upgrading is the fault of a tenant whose version is outside of the range that this binary serves: kind Suspended, code
// tenant_upgrading.
func Upgrading(t tenant.Tenant) error { return withTenant(upgrading(nil), t) }

func upgrading(cause error) error {
	return fault.Wrap(cause, fault.Suspended, "this tenant is being upgraded at the moment").
		WithCode("tenant_upgrading").WithRetry(5 * time.Second)
}

// SQLState is the SQLSTATE in err's chain, or empty.
func SQLState(err error) string {
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return pe.Code
	}
	return ""
}

// connectionLost reports whether err says that the connection, and not the statement, failed.
func connectionLost(err error) bool {
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		switch pe.Code {
		case "57P01", "57P02", "57P03", "57P05":
			return true
		}
		return strings.HasPrefix(pe.Code, "08")
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var connect *pgconn.ConnectError
	var ne net.Error
	return pgconn.SafeToRetry(err) || errors.As(err, &connect) || errors.As(err, &ne) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) ||
		strings.Contains(err.Error(), "conn closed")
}

// Away reports whether a fault says that the database was not reached: no connection was to be had, or it was lost or
// silent. A database that refuses the login, or that answers with an error of its own, is not away.
func Away(err error) bool {
	if err == nil {
		return false
	}
	switch fault.Of(err).Code {
	case "database_unreachable", "database_timeout", "pool_exhausted", "too_many_connections":
		return true
	case "database_unavailable":
		return connectionLost(err)
	}
	return false
}

// mayPass reports whether a new connection may be had in a moment: the server is lost, or has none free.
func mayPass(err error) bool {
	return connectionLost(err) && !refusedForGood(err) || SQLState(err) == "53300"
}

// refusedForGood reports whether connecting again cannot help: a wrong password, a missing database, no such role.
func refusedForGood(err error) bool {
	code := SQLState(err)
	return strings.HasPrefix(code, "28") || code == "3D000" || code == "42501"
}
