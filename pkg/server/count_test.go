package server_test

import (
	"context"
	"net/http"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// tallies keeps what a server tells of its requests.
type tallies struct {
	mu      sync.Mutex
	begun   int
	bound   []int32
	answers []server.Answer
	full    bool // takes no tenant
}

func (c *tallies) Begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.begun++
}

func (c *tallies) Bind(t tenant.Tenant) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bound = append(c.bound, t.Number)
	return !c.full
}

func (c *tallies) End(a server.Answer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.answers = append(c.answers, a)
}

// one is the request that has been told of since; a client may have its answer before.
func (c *tallies) one(t *testing.T) server.Answer {
	t.Helper()
	eventually(t, "a request is told of", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return len(c.answers) > 0 })
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Len(t, c.answers, 1)
	require.Equal(t, 1, c.begun)
	a := c.answers[0]
	c.begun, c.bound, c.answers = 0, nil, nil
	require.Positive(t, a.Took)
	if a.Status == http.StatusOK {
		require.Positive(t, a.Bytes)
	}
	a.Took, a.Bytes = 0, 0
	return a
}

// failing are databases on which work ends as a test wants.
type failing struct {
	server.Databases
	end func(context.Context) error
}

func (f *failing) InTenant(ctx context.Context, t tenant.Tenant, a server.Access, fn func(server.Tx) error) error {
	if f.end == nil {
		return f.Databases.InTenant(ctx, t, a, fn)
	}
	return f.end(ctx)
}

// Each request is told of once, whatever becomes of it, and by nothing that it has said but its method.
func TestEachRequestIsCountedOnce(t *testing.T) {
	t.Parallel()
	st := open(t)
	acme := st.acme.Number
	c := &tallies{}
	db := &failing{Databases: databases{st.env.DB}}
	addr := st.again(t, func(o *server.Options) { o.Counter, o.Databases = c, db })
	ask := func(sc scenario) server.Answer {
		t.Helper()
		st.doAt(t, addr, sc)
		return c.one(t)
	}
	me := "/api/v1/me"
	token := st.login(t, "acme.localhost", adminMail)
	record := "/api/v1/pipelines/deals/records/01234567-89ab-7def-8123-456789abcdef"
	for _, row := range []struct {
		sc   scenario
		want server.Answer
	}{
		{scenario{name: "a tenant's", path: me, token: token}, server.Answer{Tenant: acme, Route: me, Method: "GET", Status: 200}},
		{scenario{name: "the template, not the path", path: record, token: token, status: 404},
			server.Answer{Tenant: acme, Route: "/api/v1/pipelines/:pipeline/records/:id", Method: "GET", Status: 404}},
		{scenario{name: "anonymous", path: me, status: 401}, server.Answer{Tenant: acme, Route: me, Method: "GET", Status: 401}},
		{scenario{name: "no route", path: "/wp-login.php?user=ada@example.com", status: 404}, server.Answer{Tenant: acme, Method: "GET", Status: 404}},
		{scenario{name: "no method", path: me, method: "BREW", status: 405}, server.Answer{Tenant: acme, Method: "BREW", Status: 405}},
		{scenario{name: "nobody's host", host: "evil.example.com", path: me, status: 404}, server.Answer{Method: "GET", Status: 404}},
		{scenario{name: "a public host", host: "localhost", path: me, status: 401}, server.Answer{Route: me, Method: "GET", Status: 401}},
	} {
		require.Equal(t, row.want, ask(row.sc), row.sc.name)
	}

	for name, row := range map[string]struct {
		err             error
		status          int
		failed, refused bool
	}{
		"ours":           {fault.New(fault.Internal, "x"), 500, true, false},
		"the database's": {fault.New(fault.Unavailable, "x"), 503, true, false},
		"a budget":       {fault.New(fault.Busy, "x"), 429, false, true},
		"suspended":      {fault.New(fault.Suspended, "x"), 503, false, false},
		"theirs":         {fault.New(fault.Conflict, "x"), 409, false, false},
	} {
		db.end = func(context.Context) error { return row.err }
		got := ask(scenario{name: name, path: "/api/v1/pipelines", token: token, status: row.status})
		require.Equal(t, []any{row.failed, row.refused}, []any{got.Failed, got.Refused}, name)
		require.Equal(t, acme, got.Tenant)
	}
	db.end = func(context.Context) error { panic("here") }
	got := ask(scenario{name: "panic", path: "/api/v1/pipelines", token: token, status: 500})
	require.True(t, got.Failed)
	require.Equal(t, "/api/v1/pipelines", got.Route)

	// Whoever leaves before the answer.
	gone, leave := context.WithCancel(t.Context())
	reached := make(chan struct{})
	db.end = func(ctx context.Context) error {
		close(reached)
		<-ctx.Done()
		return ctx.Err()
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		r, err := http.NewRequestWithContext(gone, http.MethodGet, "http://"+addr+"/api/v1/pipelines", nil)
		if err != nil {
			return
		}
		r.Host = "acme.localhost"
		r.Header.Set("Authorization", "Bearer "+token)
		if resp, err := http.DefaultTransport.RoundTrip(r); err == nil {
			_ = resp.Body.Close()
		}
	}()
	<-reached
	leave()
	<-ended
	got = c.one(t)
	require.Equal(t, server.Answer{Tenant: acme, Route: "/api/v1/pipelines", Method: "GET", Status: 499}, got, "it is nobody's failure")

	c.full, db.end = true, nil
	require.Zero(t, ask(scenario{name: "no room", path: me, token: token, status: 200}).Tenant)
}

// The operators' listener has what it is given, and the listener of tenants does not.
func TestOpsHandlersAreForOperatorsOnly(t *testing.T) {
	t.Parallel()
	st := open(t, func(o *server.Options) {
		o.Ops = map[string]http.Handler{"GET /metrics": http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })}
	})
	resp, err := http.Get("http://" + st.server.OpsAddr() + "/metrics")
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusTeapot, resp.StatusCode)
	for _, host := range []string{"acme.localhost", "localhost"} {
		st.do(t, scenario{name: "metrics", host: host, path: "/metrics", status: 404, code: "unknown_path"})
	}
}

// What works for a request knows by its context which one it is and whose, also what was begun before that was known.
func TestTheContextSaysWhoseARequestIs(t *testing.T) {
	t.Parallel()
	st := open(t)
	ended := make(chan [4]string, 1)
	addr := st.again(t, func(o *server.Options) {
		o.Trace = func(ctx context.Context, method string) (context.Context, func(string, int)) {
			return ctx, func(route string, status int) {
				about := tenant.AboutOf(ctx)
				ended <- [4]string{method, route, about.Request, about.Tenant()}
			}
		}
	})
	st.doAt(t, addr, scenario{method: "GET", path: "/api/v1/me", status: http.StatusUnauthorized})
	got := <-ended
	require.NotEmpty(t, got[2])
	require.Equal(t, [4]string{"GET", "/api/v1/me", got[2], st.acme.Slug.String()}, got)
}
