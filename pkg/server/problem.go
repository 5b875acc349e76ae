package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// statuses says which HTTP status each kind of failure has; a test holds it complete.
var statuses = map[fault.Kind]int{
	fault.Internal:             http.StatusInternalServerError,
	fault.Invalid:              http.StatusBadRequest,
	fault.Unfit:                http.StatusUnprocessableEntity,
	fault.NotFound:             http.StatusNotFound,
	fault.Conflict:             http.StatusConflict,
	fault.Stale:                http.StatusPreconditionFailed,
	fault.PreconditionRequired: http.StatusPreconditionRequired,
	fault.Unauthenticated:      http.StatusUnauthorized,
	fault.Forbidden:            http.StatusForbidden,
	fault.Gone:                 http.StatusGone,
	fault.Suspended:            http.StatusServiceUnavailable,
	fault.Busy:                 http.StatusTooManyRequests,
	fault.TooLarge:             http.StatusRequestEntityTooLarge,
	fault.Unsupported:          http.StatusUnsupportedMediaType,
	fault.Locked:               http.StatusConflict,
	fault.Unavailable:          http.StatusServiceUnavailable,
	fault.Pending:              http.StatusServiceUnavailable,
	fault.Unverified:           http.StatusUnprocessableEntity,
	fault.WrongKey:             http.StatusUnprocessableEntity,
	fault.NeedsConfirmation:    http.StatusUnprocessableEntity,
}

// StatusOf is the HTTP status of a kind of failure.
func StatusOf(k fault.Kind) int {
	if s, ok := statuses[k]; ok {
		return s
	}
	return http.StatusInternalServerError
}

// problem is the body of every answer that is not a success (RFC 9457).
type problem struct {
	Type      string        `json:"type"`
	Title     string        `json:"title"`
	Status    int           `json:"status"`
	Detail    string        `json:"detail,omitempty"`
	Instance  string        `json:"instance,omitempty"`
	Code      string        `json:"code"`
	Hint      string        `json:"hint,omitempty"`
	RequestID string        `json:"request_id"`
	Errors    []fault.Field `json:"errors,omitempty"`
	// more are members of the fault's own: of a stale change, what it is now.
	more json.RawMessage
}

// outspoken are the codes of unavailability whose sentence is for strangers too: the others name hosts and databases.
var outspoken = map[string]bool{"provisioning_unavailable": true, "outcome_unknown": true, "tenant_changed": true, "stopping": true, "statement_timeout": true}

const notNow = "the service cannot do this at the moment; please try again"

// statusClientGone is logged, never sent: nobody is there to read it.
const statusClientGone = 499

// problemOf renders what a stranger may know of an error. Of our own trouble (500, a database that cannot be reached or
// has not been set up) that is nothing but a code and the request's id: the sentence, the hint and the cause are for the
// log.
func problemOf(err error, requestID, path string) (problem, http.Header) {
	header := http.Header{}
	f := fault.Of(err)
	p := problem{Status: StatusOf(f.Kind), Code: f.StableCode(), RequestID: requestID, Instance: path}
	switch {
	case errors.Is(err, context.DeadlineExceeded) && f.Kind == fault.Internal:
		p.Status, p.Code, p.Detail = http.StatusServiceUnavailable, "timeout", "the request took too long and was given up"
		header.Set("Retry-After", "1")
	case p.Status == http.StatusInternalServerError:
		p.Code = "internal"
		p.Detail = "something went wrong on our side; the request id finds it in the log"
	case f.Kind == fault.Pending: // what is outstanding, down to its code, is the operator's affair
		p.Code, p.Detail = string(fault.Unavailable), notNow
	case p.Code == "lock_timeout":
		// Nothing about the request is in conflict: a migration or another writer was at the table for a moment.
		p.Status, p.Detail = http.StatusServiceUnavailable, notNow
	case f.Kind == fault.Unavailable && !outspoken[p.Code]:
		p.Detail = notNow
	default:
		p.Detail, p.Hint, p.Errors = f.Message, f.Hint, f.Fields
		if f.Details != nil {
			if raw, err := encode(f.Details); err == nil {
				p.more = raw
			}
		}
	}
	p.Title = http.StatusText(p.Status)
	p.Type = "urn:oneo:problem:" + p.Code
	switch {
	case p.Status == http.StatusUnauthorized:
		header.Set("WWW-Authenticate", `Bearer realm="oneo"`)
	case p.Code == "outcome_unknown":
		// Clients repeat by themselves what has a Retry-After, and this change may have been made.
	case p.Status == http.StatusServiceUnavailable, p.Status == http.StatusTooManyRequests:
		header.Set("Retry-After", retryAfter(max(f.Retry, time.Second)))
	case f.Retry > 0:
		header.Set("Retry-After", retryAfter(f.Retry))
	}
	return p, header
}

// retryAfter is a duration in whole seconds, rounded up.
func retryAfter(d time.Duration) string { return strconv.Itoa(int(math.Ceil(d.Seconds()))) }

func (p problem) body() []byte {
	body, err := encode(p)
	if err != nil { // strings and numbers only: cannot happen
		return []byte(`{"status":500,"code":"internal"}`)
	}
	more := bytes.TrimSpace(p.more)
	if len(more) <= 2 || more[0] != '{' {
		return body
	}
	return append(append(body[:len(body)-1], ','), more[1:]...)
}

// encode writes JSON as it is meant to be read by people too: <, > and & stay as they are.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// fail is the one way by which a request ends badly. It answers with a problem unless something has been answered
// already, and remembers the error for the access log.
func (s *Server) fail(x *exchange, err error) {
	x.err = err
	if x.status != 0 {
		return
	}
	if errors.Is(err, context.Canceled) && x.r.Context().Err() != nil && !s.stopping.Load() {
		x.status = statusClientGone
		return
	}
	if x.realm == tenantRealm && fault.Of(err).Code == "unknown_group" {
		// The tenant's place is not configured at this instance. Nobody at a tenant's host chose it or can mend it.
		err = fault.Wrap(err, fault.Unavailable, "the tenant's database group is not configured here")
	}
	if x.realm == tenantRealm && fault.Of(err).Code == "tenant_moved" {
		// Its old place says what this instance had not heard: the next request asks the registry.
		s.opts.Resolver.Forget(x.r.Context(), x.host)
	}
	p, header := problemOf(err, x.id, x.r.URL.EscapedPath())
	for k, v := range header {
		x.w.Header()[k] = v
	}
	if p.Status >= 500 {
		s.logFailure(x, p, err)
	}
	x.write(p.Status, "application/problem+json", p.body())
}

// refuse answers with a status that no kind of failure stands for.
func (s *Server) refuse(x *exchange, status int, code, detail string) {
	p := problem{
		Type: "urn:oneo:problem:" + code, Title: http.StatusText(status), Status: status, Detail: detail,
		Instance: x.r.URL.EscapedPath(), Code: code, RequestID: x.id,
	}
	x.write(status, "application/problem+json", p.body())
}

// logFailure tells what the caller is not told.
func (s *Server) logFailure(x *exchange, p problem, err error) {
	level := slog.LevelWarn
	if p.Status == http.StatusInternalServerError {
		level = slog.LevelError
	}
	s.opts.Logger.LogAttrs(x.r.Context(), level, "request failed", slog.String("request_id", x.id),
		slog.String("tenant", x.tenant.Slug.String()), slog.String("route", x.route), slog.Int("status", p.Status),
		slog.String("code", p.Code), slog.String("error", err.Error()))
}
