// Package server answers HTTP requests for tenants and for administrators. It promises: the host name alone decides the
// tenant; who is asking is looked up with that tenant only; a handler's work is bound to it, in one transaction; an
// answer is written only after that has been committed; and what goes wrong is told as a problem (RFC 9457) that never
// holds a database's own text. Health and profiles are on a listener of their own.
//
// The room knows neither databases nor caches: it declares what it needs of them, and app hands it in.
package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gin-gonic/gin"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Access says what a route's transaction may do. The values are those of postgres.Access.
type Access int

const (
	// Read is a read-only transaction.
	Read Access = iota
	// Write is one that reads and writes.
	Write
	// Single is exactly one reading statement, which goes to PostgreSQL in one round trip with its binding.
	Single
)

// Tx is a transaction that is already bound to the request's tenant, or on the shared tables of a public host's
// request. Whoever hands it in begins and ends it.
type Tx interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Databases runs work in a transaction that is committed only if fn returned nil.
type Databases interface {
	InTenant(ctx context.Context, t tenant.Tenant, a Access, fn func(Tx) error) error
	// InShared works on the shared tables, for a request of the tenant; zero: of a public host.
	InShared(ctx context.Context, t tenant.Tenant, a Access, fn func(Tx) error) error
}

// Resolver finds the tenant of a host. A host that nobody has is a fault of kind NotFound; a tenant that is suspended
// or dropped is returned all the same.
type Resolver interface {
	Resolve(ctx context.Context, host tenant.Host) (tenant.Tenant, error)
	// Forget drops what is remembered of hosts, in all instances.
	Forget(ctx context.Context, hosts ...tenant.Host)
}

// Cache remembers values for all instances. It is never needed: it may lose anything at any time, and what fails in it
// is a miss; but what was Set here it answers with here. Keys lie in the scope of one tenant; the zero Tenant is the public scope.
type Cache interface {
	Get(ctx context.Context, t tenant.Tenant, kind, id string) (value []byte, found bool)
	// Add stores a value unless there is one, or one may have been lost since the moment read, from which on it was read.
	Add(ctx context.Context, t tenant.Tenant, kind, id string, value []byte, read time.Time, ttl time.Duration)
	// Set stores a value in any case.
	Set(ctx context.Context, t tenant.Tenant, kind, id string, value []byte, ttl time.Duration)
}

// Counter counts requests. It must neither wait nor fail.
type Counter interface {
	// Begin is told of each request as it comes.
	Begin()
	// Bind is told for which tenant it is, once that is known. False: it will not be counted for the tenant.
	Bind(t tenant.Tenant) bool
	// End is told once of each Begin.
	End(a Answer)
}

// Answer is how a request ended. Of what the request itself has said it holds the method alone.
type Answer struct {
	Tenant  int32  // the number of the one that Bind took; 0: none
	Route   string // the template; empty: none matched
	Method  string // as sent: it may be anything
	Status  int    // 0: nothing was answered
	Bytes   int    // of the answer's body
	Took    time.Duration
	Refused bool // for a budget or a limit
	Failed  bool // by our fault: without refused ones and those to a tenant that is suspended or being changed
}

// Check is one thing that /readyz looks at.
type Check struct {
	Name     string
	Required bool // its failure makes the instance not ready, unless it is Borne
	Run      func(ctx context.Context) error
}

// Borne is the failure of a check with which the instance serves nevertheless: it is told and changes nothing.
type Borne struct{ Err error }

func (b Borne) Error() string { return b.Err.Error() }

// Unwrap is what has failed.
func (b Borne) Unwrap() error { return b.Err }

// Options is everything that a Server can be told. Start from DefaultOptions.
type Options struct {
	Addr    string // of the API; port 0: any free one
	OpsAddr string // of health and profiles; empty: none
	// PublicURL gives the scheme and port of URLs that are shown. With https the session cookie is __Host-oneo and
	// Secure, and HSTS is on; with http it is oneo_session.
	PublicURL      string
	PublicHosts    []tenant.Host  // where administrators are served
	TrustedProxies []netip.Prefix // whose X-Forwarded-Host and X-Forwarded-For count
	Secret         []byte         // shared by all instances; at least 16 bytes. Keys are derived from it

	Databases Databases
	Resolver  Resolver
	Cache     Cache   // nil: in-process only
	Limiter   Limiter // nil: each instance counts for itself
	Admin     Admin
	Settings  Settings
	Hasher    *auth.Hasher
	Sessions  auth.SessionOptions

	// Serves returns nil for a tenant that this instance serves, and otherwise the fault that says why it does not: asked
	// before anything of PostgreSQL is taken. It may be wrong for a moment, since the binding knows better; nil: it is
	// left to the binding.
	Serves func(t tenant.Tenant) error
	// Provisioning is false where there is no owner's connection: routes that need one answer 503.
	Provisioning bool
	// OnEnded tells the other instances, which Forget, that tokens no longer stand for what they did; nil: they follow
	// within LocalTTL.
	OnEnded func(ctx context.Context, e Ended)
	// OnEnqueued is called after an operation has been queued; nil: the worker finds it by itself.
	OnEnqueued func()
	Checks     []Check
	// Counter is told of each request; nil: nobody counts.
	Counter Counter
	// Trace begins to trace a request, and end is told how it ended; nil: nothing is traced.
	Trace func(ctx context.Context, method string) (_ context.Context, end func(route string, status int))
	// Ops are more handlers of the operators' listener, by pattern as of http.ServeMux.
	Ops     map[string]http.Handler
	Logger  *slog.Logger
	Version string

	MaxBodyBytes      int64
	MaxHeaderBytes    int
	ReadHeaderTimeout time.Duration
	ReadTimeout       time.Duration
	WriteTimeout      time.Duration
	IdleTimeout       time.Duration
	RequestTimeout    time.Duration // for everything that a request causes
	ShutdownGrace     time.Duration // for requests in flight when Run is asked to end; then they are cancelled

	LoginPerAccount   Rate // logins of one tenant for one address and e-mail
	LoginPerIP        Rate // logins from one address, on all hosts
	RequestsPerIP     Rate // all requests, per instance; zero: no limit
	RequestsPerTenant Rate // all requests, per instance, of a tenant whose Budget says nothing else; zero: no limit
	// Budget is what the requests of a tenant may take whose own Budget says nothing else; of Requests, RequestsPerTenant is.
	Budget tenant.Budget

	// IdentityTTL is how long who a token stands for is remembered in the Cache, LocalTTL how long in this process:
	// the time after which a change made by another instance is certain to be seen here.
	IdentityTTL time.Duration
	LocalTTL    time.Duration
}

// DefaultOptions are the defaults of the configuration; the parts and the Secret are the caller's to fill.
func DefaultOptions() Options {
	local, err := tenant.ParseHost("localhost")
	if err != nil { // cannot happen
		panic(err)
	}
	return Options{
		Addr: "127.0.0.1:8000", OpsAddr: "127.0.0.1:8001", PublicURL: "http://localhost:8000", PublicHosts: []tenant.Host{local},
		Sessions: auth.DefaultSessionOptions(), Logger: slog.New(slog.DiscardHandler),
		MaxBodyBytes: 1 << 20, MaxHeaderBytes: 32 << 10,
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		RequestTimeout: 30 * time.Second, ShutdownGrace: 20 * time.Second,
		LoginPerAccount: Rate{10, time.Minute}, LoginPerIP: Rate{60, time.Minute},
		IdentityTTL: time.Minute, LocalTTL: 2 * time.Second,
	}
}

func (o Options) validate() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, "server: "+format, args...) }
	u, err := url.Parse(o.PublicURL)
	switch {
	case err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
		return bad("PublicURL %q is no http or https URL", o.PublicURL)
	case o.Addr == "":
		return bad("Addr is empty")
	case len(o.PublicHosts) == 0:
		return bad("PublicHosts is empty: administrators could not log in")
	case len(o.Secret) < 16:
		return bad("Secret must have at least 16 bytes")
	case o.Databases == nil, o.Resolver == nil, o.Admin == nil, o.Settings == nil, o.Hasher == nil, o.Logger == nil:
		return bad("Databases, Resolver, Admin, Settings, Hasher and Logger must be given")
	case o.Sessions.Idle < 5*time.Minute || o.Sessions.Absolute < o.Sessions.Idle:
		return bad("Sessions must last at least 5 minutes idle, and at least as long in all")
	case o.MaxBodyBytes < 1, o.MaxHeaderBytes < 1:
		return bad("MaxBodyBytes and MaxHeaderBytes must be at least 1")
	}
	for _, d := range []struct {
		name string
		d    time.Duration
	}{
		{"ReadHeaderTimeout", o.ReadHeaderTimeout}, {"ReadTimeout", o.ReadTimeout}, {"WriteTimeout", o.WriteTimeout},
		{"IdleTimeout", o.IdleTimeout}, {"RequestTimeout", o.RequestTimeout}, {"ShutdownGrace", o.ShutdownGrace},
		{"IdentityTTL", o.IdentityTTL}, {"LocalTTL", o.LocalTTL},
	} {
		if d.d <= 0 {
			return bad("%s must be above 0", d.name)
		}
	}
	return nil
}

// Server serves until its context ends. Make it with New; Run may be called once.
type Server struct {
	opts        Options
	secure      bool // cookies are Secure, HSTS is on
	fixed       http.Header
	crossOrigin *http.CrossOriginProtection
	cursors     cursors
	local       *localLimiter
	identities  *identities
	tenants     *gin.Engine
	public      *gin.Engine

	api, ops               *http.Server
	apiListener, opsListen net.Listener
	requests               sync.WaitGroup
	stopping               atomic.Bool
}

// New checks the options and lays out the routes. It opens nothing.
func New(o Options) (*Server, error) {
	if err := o.validate(); err != nil {
		return nil, err
	}
	u, _ := url.Parse(o.PublicURL) // validated
	s := &Server{
		opts: o, secure: u.Scheme == "https", crossOrigin: http.NewCrossOriginProtection(),
		cursors: newCursors(o.Secret), local: newLocalLimiter(),
	}
	s.fixed = fixedHeaders(s.secure)
	s.identities = newIdentities(o.LocalTTL)
	var err error
	if s.tenants, err = s.engine(tenantRealm); err != nil {
		return nil, err
	}
	if s.public, err = s.engine(publicRealm); err != nil {
		return nil, err
	}
	errorLog := slog.NewLogLogger(o.Logger.Handler(), slog.LevelWarn)
	s.api = &http.Server{
		Handler: s, ReadHeaderTimeout: o.ReadHeaderTimeout, ReadTimeout: o.ReadTimeout, WriteTimeout: o.WriteTimeout,
		IdleTimeout: o.IdleTimeout, MaxHeaderBytes: o.MaxHeaderBytes, ErrorLog: errorLog, DisableGeneralOptionsHandler: true,
	}
	// A profile takes as long as it is asked to: no WriteTimeout.
	s.ops = &http.Server{
		Handler: s.opsHandler(), ReadHeaderTimeout: o.ReadHeaderTimeout, ReadTimeout: o.ReadTimeout,
		IdleTimeout: o.IdleTimeout, MaxHeaderBytes: o.MaxHeaderBytes, ErrorLog: errorLog,
	}
	return s, nil
}

// Handler is the API without a listener.
func (s *Server) Handler() http.Handler { return s }

// Listen takes the ports, so that Addr and OpsAddr are known before Run. Run does it when it has not been done.
func (s *Server) Listen() (err error) {
	if s.apiListener, err = listen(s.opts.Addr, "server.addr"); err != nil {
		return err
	}
	if s.opts.OpsAddr == "" {
		return nil
	}
	if s.opsListen, err = listen(s.opts.OpsAddr, "server.ops_addr"); err != nil {
		return errors.Join(err, s.apiListener.Close())
	}
	return nil
}

func listen(addr, setting string) (net.Listener, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(context.Background(), "tcp", addr)
	if err != nil {
		return nil, fault.Wrap(err, fault.Conflict, "cannot listen on %s", addr).WithCode("listen").
			WithHint("another process may have the port; %s sets another address", setting)
	}
	return l, nil
}

// Addr is where the API listens; empty before Listen.
func (s *Server) Addr() string { return addrOf(s.apiListener) }

// OpsAddr is where health and profiles are; empty before Listen, and where there is no such listener.
func (s *Server) OpsAddr() string { return addrOf(s.opsListen) }

func addrOf(l net.Listener) string {
	if l == nil {
		return ""
	}
	return l.Addr().String()
}

// Run serves until ctx ends. Then it takes no more connections, says so on /readyz, lets the requests in flight finish
// for as long as ShutdownGrace, cancels those that are left and waits for them. It returns nil after such an end, and
// an error only if a listener failed.
func (s *Server) Run(ctx context.Context) error {
	if s.apiListener == nil {
		if err := s.Listen(); err != nil {
			return err
		}
	}
	base, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	s.api.BaseContext = func(net.Listener) context.Context { return base }

	failed := make(chan error, 2)
	var serving sync.WaitGroup
	serve := func(hs *http.Server, l net.Listener, what string) {
		serving.Go(func() {
			if err := hs.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				failed <- fmt.Errorf("%s: %w", what, err)
			}
		})
	}
	serve(s.api, s.apiListener, "serve the API")
	if s.opsListen != nil {
		serve(s.ops, s.opsListen, "serve health and profiles")
	}

	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	s.stopping.Store(true)
	grace, stop := context.WithTimeout(context.WithoutCancel(ctx), s.opts.ShutdownGrace)
	defer stop()
	if serr := s.api.Shutdown(grace); serr != nil {
		s.opts.Logger.WarnContext(ctx, "requests are still at work after the grace period and are cancelled", "grace", s.opts.ShutdownGrace)
		cancel(errStopping)
		// Handlers end by their context, which their transactions have too, and may still answer. A connection is done
		// when its answer has left, which is after its handler has returned.
		answers, stop := context.WithTimeout(context.WithoutCancel(ctx), stopWait)
		defer stop()
		if serr := s.api.Shutdown(answers); serr != nil {
			_ = s.api.Close()
		}
	}
	s.requests.Wait()
	_ = s.ops.Close()
	serving.Wait()
	s.identities.close()
	s.local.buckets.StopAllGoroutines()
	return err
}

// stopWait is how long cancelled requests have to write their answer before their connections are cut.
const stopWait = 5 * time.Second

var errStopping = errors.New("the server is stopping")
