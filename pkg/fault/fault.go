// Package fault names the kinds of failure that an edge of oneo tells apart. A room returns a *Fault when the caller
// can act on the difference; everything else is an ordinary error, which the edges treat as Internal: logged, never
// shown. A fault's Message, Hint and Fields are written for the person who asked and never hold SQL, a database's own
// text, a password or a connection string; the cause is for the log only.
package fault

import (
	"errors"
	"fmt"
	"time"
)

// Kind is one kind of failure. The command line turns it into an exit code, the HTTP server into a status.
type Kind string

const (
	// Internal is a failure that nobody outside can act on: a bug or an unexpected answer.
	Internal Kind = "internal"
	// Invalid is input that can never succeed as it is: a bad name, an unknown option, a malformed body.
	Invalid Kind = "invalid"
	// Unfit is well-formed input whose values do not fit (HTTP 422): a wrong type in a field, a missing required one.
	Unfit Kind = "unfit"
	// NotFound is a thing that is not there, or that the caller may not see.
	NotFound Kind = "not_found"
	// Conflict is a state that forbids the change: it exists already, or it is in another state.
	Conflict Kind = "conflict"
	// Stale is a change made against an old version (HTTP 412).
	Stale Kind = "stale"
	// PreconditionRequired is a change that must say which version it is made against (HTTP 428).
	PreconditionRequired Kind = "precondition_required"
	// Unauthenticated is a caller that did not prove who they are.
	Unauthenticated Kind = "unauthenticated"
	// Forbidden is a known caller who is not allowed to do this.
	Forbidden Kind = "forbidden"
	// Gone is a tenant that has been dropped.
	Gone Kind = "gone"
	// Suspended is a tenant that is suspended, frozen or in maintenance.
	Suspended Kind = "suspended"
	// Busy is a bound that this one caller or tenant has reached (HTTP 429).
	Busy Kind = "busy"
	// TooLarge is a body or value beyond its bound (HTTP 413).
	TooLarge Kind = "too_large"
	// Unsupported is a content type that is not understood (HTTP 415).
	Unsupported Kind = "unsupported"
	// Locked is a tenant on which another operation is at work.
	Locked Kind = "locked"
	// Unavailable is PostgreSQL, Redis or a store that cannot be reached, or not in time.
	Unavailable Kind = "unavailable"
	// Pending is work that is outstanding: migrations not applied, a fleet that is not healthy.
	Pending Kind = "pending"
	// Unverified is something that was checked and is not what it should be: a damaged archive, a migration that lint refuses.
	Unverified Kind = "unverified"
	// WrongKey is an encrypted archive without the key that opens it.
	WrongKey Kind = "wrong_key"
	// NeedsConfirmation is a destructive act without the confirmation it wants.
	NeedsConfirmation Kind = "needs_confirmation"
)

// Field is one field, parameter or setting that does not fit.
type Field struct {
	// Pointer is a JSON pointer into the body ("/fields/0/key"), or empty.
	Pointer string `json:"pointer,omitempty"`
	// Parameter is a query parameter's name, or empty.
	Parameter string `json:"parameter,omitempty"`
	// Code is stable and listed in the documentation.
	Code string `json:"code"`
	// Detail says what is wrong and what is allowed.
	Detail string `json:"detail"`
}

// Fault is a failure with its kind. Construct it with New or Wrap.
type Fault struct {
	Kind    Kind
	Code    string        // stable and narrower than Kind; empty: the kind itself
	Message string        // one sentence for the person who asked
	Hint    string        // what to do or type next; may be empty
	Fields  []Field       // what exactly does not fit; may be empty
	Tenant  string        // the tenant's slug where one is concerned; may be empty
	Retry   time.Duration // when trying again makes sense; 0: unknown
	Details any           // data for the caller, rendered as JSON; may be nil
	cause   error
}

// New makes a fault of a kind with a formatted message.
func New(kind Kind, format string, args ...any) *Fault {
	return &Fault{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

// Wrap makes a fault of a kind around its cause, which is kept for the log and for errors.Is.
func Wrap(cause error, kind Kind, format string, args ...any) *Fault {
	return &Fault{Kind: kind, Message: fmt.Sprintf(format, args...), cause: cause}
}

// WithHint says what to do or type next.
func (f *Fault) WithHint(format string, args ...any) *Fault {
	f.Hint = fmt.Sprintf(format, args...)
	return f
}

// WithCode gives a stable code narrower than the kind.
func (f *Fault) WithCode(code string) *Fault {
	f.Code = code
	return f
}

// WithTenant names the tenant concerned.
func (f *Fault) WithTenant(slug string) *Fault {
	f.Tenant = slug
	return f
}

// WithRetry says when trying again makes sense.
func (f *Fault) WithRetry(after time.Duration) *Fault {
	f.Retry = after
	return f
}

// WithField adds one field that does not fit.
func (f *Fault) WithField(field Field) *Fault {
	f.Fields = append(f.Fields, field)
	return f
}

// WithDetails attaches data for the caller.
func (f *Fault) WithDetails(details any) *Fault {
	f.Details = details
	return f
}

// Error is the message, and the cause behind it: for logs. Edges that speak to strangers use Message and Hint.
func (f *Fault) Error() string {
	if f.cause != nil {
		return f.Message + ": " + f.cause.Error()
	}
	return f.Message
}

// Unwrap returns the cause.
func (f *Fault) Unwrap() error { return f.cause }

// StableCode is the code, or the kind where no narrower code was given.
func (f *Fault) StableCode() string {
	if f.Code != "" {
		return f.Code
	}
	return string(f.Kind)
}

// Of returns the outermost fault in err's chain, or one of kind Internal that hides err behind a plain sentence.
// It returns nil for a nil error.
func Of(err error) *Fault {
	if err == nil {
		return nil
	}
	var f *Fault
	if errors.As(err, &f) {
		return f
	}
	return Wrap(err, Internal, "something went wrong inside oneo")
}

// Is reports whether err holds a fault of the kind.
func Is(err error, kind Kind) bool {
	var f *Fault
	return errors.As(err, &f) && f.Kind == kind
}
