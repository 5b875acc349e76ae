package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// exchange is one request and its answer on the way through the server.
type exchange struct {
	w       http.ResponseWriter
	r       *http.Request
	id      string
	about   *tenant.About // what log lines and traces say of it
	started time.Time
	peer    netip.Addr // the other end of the connection
	client  netip.Addr // who asked: peer, or behind a configured proxy whom that names

	realm    realm
	host     tenant.Host
	tenant   tenant.Tenant                  // zero on public hosts; its Budget is the one in force
	rate     Rate                           // of the tenant's requests
	route    string                         // the template; empty: none matched
	identity auth.Identity                  // zero: anonymous
	counted  bool                           // for the tenant
	traced   func(route string, status int) // nil: it is not

	status int // 0: nothing has been answered
	size   int
	err    error
}

type exchangeKey struct{}

// write answers, once.
func (x *exchange) write(status int, contentType string, body []byte) {
	x.status, x.size = status, len(body)
	h := x.w.Header()
	if len(body) > 0 {
		h.Set("Content-Type", contentType)
	}
	if status != http.StatusNoContent && status != http.StatusNotModified {
		h.Set("Content-Length", strconv.Itoa(len(body)))
	}
	x.w.WriteHeader(status)
	_, _ = x.w.Write(body) // a client that left is noticed by its own end
}

// ServeHTTP is the path of every request to a tenant's or public host: it finds out for whom the request is before
// anything else looks at it, and hands it to that realm's routes.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.requests.Add(1)
	defer s.requests.Done()
	x := &exchange{w: w, started: time.Now(), id: requestID(r), peer: peerOf(r)}
	x.about = &tenant.About{Request: x.id}
	ctx := tenant.WithAbout(context.WithValue(r.Context(), exchangeKey{}, x), x.about)
	if s.opts.Trace != nil {
		ctx, x.traced = s.opts.Trace(ctx, r.Method)
	}
	ctx, cancel := context.WithTimeout(ctx, s.opts.RequestTimeout)
	defer cancel()
	x.r = r.WithContext(ctx)
	x.client = s.clientOf(r, x.peer)
	if s.opts.Counter != nil {
		s.opts.Counter.Begin()
	}
	defer s.finish(x)
	for k, v := range s.fixed {
		w.Header()[k] = v
	}
	w.Header().Set("X-Request-Id", x.id)
	if len(r.TransferEncoding) > 0 {
		// net/http drops a Content-Length that came along, which a proxy in front may have believed: what stands behind
		// this body on the connection is nobody's request.
		w.Header().Set("Connection", "close")
	}
	if err := s.admit(ctx, x); err != nil {
		s.fail(x, err)
		return
	}
	if x.realm == publicRealm {
		s.public.ServeHTTP(w, x.r)
	} else {
		s.tenants.ServeHTTP(w, x.r)
	}
}

// admit does what comes before routing.
func (s *Server) admit(ctx context.Context, x *exchange) error {
	if s.opts.RequestsPerIP.Count > 0 {
		if err := s.limitLocally(x, "ip", bucketOf(x.client), s.opts.RequestsPerIP); err != nil {
			return err
		}
	}
	if err := s.locate(ctx, x); err != nil {
		return err
	}
	if err := s.crossOrigin.Check(x.r); err != nil {
		return fault.Wrap(err, fault.Forbidden, "a page of another origin may not do this").WithCode("cross_origin")
	}
	if x.realm == tenantRealm {
		return s.limitLocally(x, "tenant", strconv.Itoa(int(x.tenant.Number)), x.rate)
	}
	return nil
}

// fixedHeaders say that answers are data, for this client alone. There are no CORS headers: no other origin's page may
// read them.
func fixedHeaders(secure bool) http.Header {
	h := http.Header{}
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("Cross-Origin-Resource-Policy", "same-origin")
	h.Set("Cache-Control", "no-store")
	h.Set("Vary", "Host, Authorization, Cookie")
	if secure {
		h.Set("Strict-Transport-Security", "max-age=31536000")
	}
	return h
}

// requestID takes over an id that a proxy or client gave, if it is harmless in a log, and makes one otherwise.
func requestID(r *http.Request) string {
	id := r.Header.Get("X-Request-ID")
	if len(id) < 8 || len(id) > 64 {
		return uuid.NewString()
	}
	for i := range len(id) {
		c := id[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '_' && c != '.' {
			return uuid.NewString()
		}
	}
	return id
}

// finish is the last thing of each request: it turns a panic into a 500, when the transaction has been rolled back on
// the panic's way, and writes the access log.
func (s *Server) finish(x *exchange) {
	if s.opts.Counter != nil {
		defer s.count(x)
	}
	if x.traced != nil {
		defer func() { x.traced(x.route, x.status) }()
	}
	if p := recover(); p != nil {
		if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
			panic(p)
		}
		s.opts.Logger.LogAttrs(x.r.Context(), slog.LevelError, "panic", slog.String("request_id", x.id),
			slog.String("tenant", x.tenant.Slug.String()), slog.String("route", x.route), slog.Any("panic", p),
			slog.String("stack", string(debug.Stack())))
		s.fail(x, fmt.Errorf("panic: %v", p))
	}
	s.accessLog(x)
}

// count tells the counter how a request ended.
func (s *Server) count(x *exchange) {
	a := Answer{Route: x.route, Method: x.r.Method, Status: x.status, Bytes: x.size, Took: time.Since(x.started)}
	if x.counted {
		a.Tenant = x.tenant.Number
	}
	if x.err != nil {
		kind := fault.Of(x.err).Kind
		a.Refused = kind == fault.Busy || outOfTime(x)
		a.Failed = x.status >= 500 && !a.Refused && kind != fault.Suspended
	}
	s.opts.Counter.End(a)
}

func (s *Server) accessLog(x *exchange) {
	level := slog.LevelInfo
	ctx := x.r.Context()
	if !s.opts.Logger.Enabled(ctx, level) {
		return
	}
	attrs := make([]slog.Attr, 0, 12)
	attrs = append(attrs, slog.String("request_id", x.id), slog.String("method", x.r.Method), slog.String("route", x.route),
		slog.Int("status", x.status), slog.Duration("took", time.Since(x.started)), slog.Int("bytes", x.size),
		slog.String("host", x.host.String()), slog.String("tenant", x.tenant.Slug.String()), slog.String("client", x.client.String()))
	if who := x.identity; !who.IsZero() {
		attrs = append(attrs, slog.String("user", who.UserID.String()))
	}
	if x.err != nil {
		attrs = append(attrs, slog.String("code", fault.Of(x.err).StableCode()))
	}
	s.opts.Logger.LogAttrs(ctx, level, "request", attrs...)
}
