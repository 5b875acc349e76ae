package server

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/gin-gonic/gin"
	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Handler does a route's work in the transaction that the route declares. What it returns is written after the commit.
type Handler func(ctx context.Context, r *Request, tx Tx) (Reply, error)

// Request is what a handler may know of a request.
type Request struct {
	Tenant   tenant.Tenant // zero on public hosts
	Host     tenant.Host
	Identity auth.Identity // zero: anonymous
	ID       string
	Client   netip.Addr
	Body     json.RawMessage // nil: none. It is well-formed JSON

	x      *exchange
	params gin.Params
	query  url.Values
}

// Reply is a handler's answer.
type Reply struct {
	Status int // 0: 200, or 204 where there is no Body
	Body   any
	Header http.Header // may be nil
	// After runs after the commit and before the answer is written: it drops what caches remember of the change.
	After func(ctx context.Context)
}

// policy says who may call a route.
type policy int

const (
	// open is a route that does not look at credentials at all.
	open policy = iota
	// optional is a route for everybody, which shows more to those who are signed in.
	optional
	// signedIn is everybody whose credentials are good, and who may do the route's action if it names one.
	signedIn
	// session is the same without API keys.
	session
)

// route is one row of the table of routes.
type route struct {
	method, path string
	realm        realm
	policy       policy
	action       auth.Action // empty: nothing but being signed in
	access       Access
	// shared runs the handler on the shared tables; routes of public hosts always do.
	shared bool
	body   bodyKind
	// params are the query parameters that the route knows; any other is refused.
	params  []string
	handler Handler
	// free is a handler that opens its transactions itself, for work that must not hold one (hashing). Exactly one of
	// handler and free is set.
	free func(ctx context.Context, r *Request) (Reply, error)
	// stores is a route that takes room, and adds one that makes a record: a tenant whose budget for that is used up is
	// refused.
	stores, adds bool
	// owner is a route that needs the owner's connection, behind the operations worker.
	owner bool
}

// engine lays out the routes of one realm. A realm's engine knows the other's paths not at all.
func (s *Server) engine(of realm) (*gin.Engine, error) {
	gin.SetMode(gin.ReleaseMode) // of the whole process: gin has no other switch for its debug output
	e := gin.New()
	if err := e.SetTrustedProxies(nil); err != nil {
		return nil, err
	}
	e.ForwardedByClientIP = false
	e.HandleMethodNotAllowed = true
	e.RedirectTrailingSlash = false
	e.ContextWithFallback = true
	e.UseEscapedPath = true // an escaped slash is part of a name, never a separator
	e.UnescapePathValues = true
	e.NoRoute(func(c *gin.Context) {
		x := exchangeOf(c)
		s.fail(x, fault.New(fault.NotFound, "there is nothing at this path").WithCode("unknown_path"))
	})
	e.NoMethod(func(c *gin.Context) {
		x := exchangeOf(c)
		s.refuse(x, http.StatusMethodNotAllowed, "method_not_allowed", "this path does not know the method; the Allow header lists those it does")
	})
	for _, rt := range s.routes() {
		if rt.realm&of == 0 {
			continue
		}
		h := func(c *gin.Context) { s.serve(c, &rt) }
		e.Handle(rt.method, rt.path, h)
		if rt.method == http.MethodGet {
			e.Handle(http.MethodHead, rt.path, h) // net/http leaves the body out
		}
	}
	return e, nil
}

// routes is the table of all routes.
func (s *Server) routes() []route {
	return slices.Concat(s.indexRoutes(), s.authRoutes(), s.userRoutes(), s.keyRoutes(), s.settingsRoutes(),
		s.pipelineRoutes(), s.recordRoutes(), s.adminTenantRoutes(), s.adminDomainRoutes(), s.operationRoutes())
}

func exchangeOf(c *gin.Context) *exchange {
	x, _ := c.Request.Context().Value(exchangeKey{}).(*exchange)
	x.w = c.Writer
	return x
}

// serve takes one request through its route. Everything that ends it badly ends in fail.
func (s *Server) serve(c *gin.Context, rt *route) {
	x := exchangeOf(c)
	x.route = rt.path
	reply, body, err := s.handle(c.Request.Context(), x, c.Params, rt)
	if err != nil {
		s.fail(x, err)
		c.Abort()
		return
	}
	for k, v := range reply.Header {
		x.w.Header()[k] = v
	}
	x.write(reply.Status, "application/json", body)
}

// handle answers who is asking, whether they may, and with what, and then lets the handler work. The answer is encoded
// before the commit, so that one that cannot be encoded changes nothing.
func (s *Server) handle(ctx context.Context, x *exchange, params gin.Params, rt *route) (reply Reply, body []byte, err error) {
	if err := s.authenticate(ctx, x, rt.policy); err != nil {
		return Reply{}, nil, err
	}
	if err := authorise(x, rt); err != nil {
		return Reply{}, nil, err
	}
	if rt.stores {
		if err := x.tenant.MayStore(); err != nil {
			return Reply{}, nil, err
		}
	}
	if rt.adds {
		if err := x.tenant.MayAdd(); err != nil {
			return Reply{}, nil, err
		}
	}
	if rt.owner && !s.opts.Provisioning {
		return Reply{}, nil, fault.New(fault.Unavailable, "this instance cannot provision: it has no owner's connection to PostgreSQL").
			WithCode("provisioning_unavailable")
	}
	if rt.method != http.MethodGet && len(x.r.Header.Values("Idempotency-Key")) > 0 {
		// Whoever sends it will repeat the request: better not at all than twice.
		return Reply{}, nil, fault.New(fault.Invalid, "Idempotency-Key is not supported yet: repeating this request would do it again").
			WithCode("not_supported").WithHint("leave the header out; after a lost answer, look whether the change is there before repeating it")
	}
	r := &Request{
		Tenant: x.tenant, Host: x.host, Identity: x.identity, ID: x.id, Client: x.client, x: x, params: params,
	}
	if r.query, err = readQuery(x.r.URL.RawQuery, rt.params); err != nil {
		return Reply{}, nil, err
	}
	if r.Body, err = readBody(x.r, x.w, rt.body, s.opts.MaxBodyBytes); err != nil {
		return Reply{}, nil, err
	}
	work := func(tx Tx) error {
		if rt.free != nil {
			reply, err = rt.free(ctx, r)
		} else {
			reply, err = rt.handler(ctx, r, tx)
		}
		if err != nil || reply.Body == nil {
			return err
		}
		body, err = encode(reply.Body)
		return err
	}
	switch {
	case rt.free != nil:
		err = work(nil)
	case rt.shared || x.realm == publicRealm:
		err = s.opts.Databases.InShared(ctx, x.tenant, rt.access, work)
	default:
		err = s.opts.Databases.InTenant(ctx, x.tenant, rt.access, work)
	}
	if err != nil {
		return Reply{}, nil, err
	}
	if reply.After != nil {
		// The change is made: what remembers the old state is told even if the client has left.
		reply.After(context.WithoutCancel(ctx))
	}
	if reply.Status == 0 {
		reply.Status = http.StatusOK
		if reply.Body == nil {
			reply.Status = http.StatusNoContent
		}
	}
	return reply, body, nil
}

// within runs fn in the realm of a request: for handlers that open their transactions themselves.
func (s *Server) within(ctx context.Context, r *Request, a Access, fn func(Tx) error) error {
	if r.x.realm == publicRealm {
		return s.opts.Databases.InShared(ctx, r.Tenant, a, fn)
	}
	return s.opts.Databases.InTenant(ctx, r.Tenant, a, fn)
}

// readQuery reads the query string strictly: a parameter that the route does not know, or one given twice, is refused.
func readQuery(raw string, allowed []string) (url.Values, error) {
	if raw == "" {
		return nil, nil
	}
	bad := func(name, code, detail string) error {
		return fault.New(fault.Invalid, "the query string does not fit this route: %s", detail).WithCode(code).
			WithField(fault.Field{Parameter: name, Code: code, Detail: detail})
	}
	q, err := url.ParseQuery(raw)
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the query string is malformed").WithCode("malformed_query")
	}
	for name, values := range q {
		switch {
		case !slices.Contains(allowed, name) && len(allowed) == 0:
			return nil, bad(clip(name), "unknown_parameter", "it takes no parameters")
		case !slices.Contains(allowed, name):
			return nil, bad(clip(name), "unknown_parameter", "use "+strings.Join(allowed, ", "))
		case len(values) > 1:
			return nil, bad(name, "duplicate_parameter", "give each parameter once")
		case !utf8.ValidString(values[0]) || strings.ContainsRune(values[0], 0):
			return nil, bad(name, "malformed_parameter", "it is no UTF-8 text")
		}
	}
	return q, nil
}

func clip(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) > 64 {
		return strings.ToValidUTF8(s[:64], "") + "..."
	}
	return s
}

// Param is a part of the path by its name in the route's template.
func (r *Request) Param(name string) string { return r.params.ByName(name) }

// id reads a part of the path as a uuid. What is none names nothing: 404.
func (r *Request) id(name, what string) (uuid.UUID, error) {
	id, err := uuid.Parse(r.Param(name))
	if err != nil || len(r.Param(name)) != 36 {
		return uuid.UUID{}, fault.New(fault.NotFound, "there is no such %s", what).WithCode("unknown_" + what)
	}
	return id, nil
}

// Query is a query parameter; empty: it was not given.
func (r *Request) Query(name string) string { return r.query.Get(name) }

// The bounds of a page.
const (
	defaultLimit = 50
	maxLimit     = 1000
)

// limit reads the parameter of that name.
func (r *Request) limit() (int, error) {
	if !r.query.Has("limit") {
		return defaultLimit, nil
	}
	n, err := strconv.Atoi(r.Query("limit"))
	if err != nil || n < 1 || n > maxLimit {
		return 0, badParameter("limit", "limit must be a whole number from 1 to 1000")
	}
	return n, nil
}

func badParameter(name, detail string) error {
	return fault.New(fault.Invalid, "%s", detail).WithCode("bad_parameter").
		WithField(fault.Field{Parameter: name, Code: "bad_parameter", Detail: detail})
}

// boolean reads a parameter that is true or false.
func (r *Request) boolean(name string) (bool, error) {
	switch r.Query(name) {
	case "":
		if !r.query.Has(name) {
			return false, nil
		}
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, badParameter(name, name+" must be true or false")
}

// version reads If-Match: the version that a change is made against. 428: it is missing.
func (r *Request) version() (int, error) {
	values := r.x.r.Header.Values("If-Match")
	if len(values) == 0 {
		return 0, fault.New(fault.PreconditionRequired, "say which version this change is made against").WithCode("if_match_required").
			WithHint(`send the ETag of the last answer as If-Match, for example If-Match: "7"`)
	}
	text, ok := strings.CutPrefix(strings.TrimSpace(strings.Join(values, ",")), `"`)
	text, ok2 := strings.CutSuffix(text, `"`)
	n, err := strconv.Atoi(text)
	if !ok || !ok2 || err != nil || n < 1 {
		return 0, fault.New(fault.Invalid, `If-Match must be one version in quotes, for example "7"`).WithCode("bad_if_match")
	}
	return n, nil
}

// versionIfGiven reads If-Match where it may be left out; 0: it was.
func (r *Request) versionIfGiven() (int, error) {
	if len(r.x.r.Header.Values("If-Match")) == 0 {
		return 0, nil
	}
	return r.version()
}

// etag is the header that names a version.
func etag(version int) http.Header {
	return http.Header{"Etag": []string{`"` + strconv.Itoa(version) + `"`}}
}

// decode reads the body strictly.
func (r *Request) decode(into any) error {
	if r.Body == nil {
		return nil
	}
	return decode(r.Body, into)
}

// page is the second part of every list.
type page struct {
	NextCursor *string `json:"next_cursor"`
	PrevCursor *string `json:"prev_cursor"`
	HasMore    bool    `json:"has_more"`
	Limit      int     `json:"limit"`
	Count      *int64  `json:"count"`
}

// links is the Link header of a page: where the ones beside it are.
func (r *Request) links(p page) http.Header {
	var links []string
	for rel, cursor := range map[string]*string{"next": p.NextCursor, "prev": p.PrevCursor} {
		if cursor == nil {
			continue
		}
		q := url.Values{}
		maps.Copy(q, r.query)
		q.Set("cursor", *cursor)
		links = append(links, "<"+r.x.r.URL.EscapedPath()+"?"+q.Encode()+`>; rel="`+rel+`"`)
	}
	if links == nil {
		return nil
	}
	slices.Sort(links)
	return http.Header{"Link": []string{strings.Join(links, ", ")}}
}

// list is a page of a list.
type list struct {
	Data any  `json:"data"`
	Page page `json:"page"`
}
