package server_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// meddling runs something of a test's own in each writing transaction, after the handler and before the commit.
type meddling struct {
	databases
	meddle func(ctx context.Context, tx server.Tx) error
}

func (m meddling) InTenant(ctx context.Context, t tenant.Tenant, a server.Access, fn func(server.Tx) error) error {
	return m.databases.InTenant(ctx, t, a, func(tx server.Tx) error {
		if err := fn(tx); err != nil || a != server.Write {
			return err
		}
		return m.meddle(ctx, tx)
	})
}

// meddler starts another instance whose writing transactions are meddled with.
func (st *stage) meddler(t *testing.T, meddle func(ctx context.Context, tx server.Tx) error, change ...func(*server.Options)) string {
	t.Helper()
	return st.again(t, append(change, func(o *server.Options) { o.Databases = meddling{databases{st.env.DB}, meddle} })...)
}

const createDeals = `{"key":"deals","fields":[{"key":"title","type":"text","required":true},{"key":"amount","type":"number"}]}`

func (st *stage) records(t *testing.T) (n int) {
	t.Helper()
	require.NoError(t, st.env.DB.InTenant(t.Context(), st.acme, postgres.Read, func(tx *postgres.Tx) error {
		return tx.QueryRow(t.Context(), `select count(*) from records`).Scan(&n)
	}))
	return n
}

func TestTheAnswerComesAfterTheCommit(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "pipeline", method: "POST", path: "/api/v1/pipelines", token: token, body: createDeals, status: 201})
	owner := pgtest.Admin(t, st.env.AdminURL)
	_, err := owner.Exec(t.Context(), `create table acme.promises (id int unique deferrable initially deferred)`)
	require.NoError(t, err)
	_, err = owner.Exec(t.Context(), `do $$ declare r text; begin
		select role into r from public.placements where schema = 'acme'; execute format('grant all on acme.promises to %I', r); end $$`)
	require.NoError(t, err)

	// The handler is content; a deferred constraint fails at the commit.
	broken := st.meddler(t, func(ctx context.Context, tx server.Tx) error {
		_, err := tx.Exec(ctx, `insert into promises values (1), (1)`)
		return err
	})
	st.doAt(t, broken, scenario{name: "record", method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`,
		status: 409, hasNot: []string{`"data"`, "promises"}, headers: map[string]string{"Location": "-", "Etag": "-"}})
	require.Zero(t, st.records(t), "what was not committed must not be there")
	// A statement fails and the handler does not notice: the transaction cannot be committed and is not said to have been.
	swallowed := st.meddler(t, func(ctx context.Context, tx server.Tx) error {
		_, _ = tx.Exec(ctx, `select 1/0`)
		return nil
	})
	st.doAt(t, swallowed, scenario{name: "swallowed", method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`,
		status: 500, code: "internal", hasNot: []string{"division"}})
	require.Zero(t, st.records(t))
	st.do(t, scenario{name: "sound", method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`, status: 201})
	require.Equal(t, 1, st.records(t))
	st.env.Invariants(t)
}

func TestAPanicRollsBack(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "pipeline", method: "POST", path: "/api/v1/pipelines", token: token, body: createDeals, status: 201})
	broken := st.meddler(t, func(context.Context, server.Tx) error { panic("the secret of the panic") })
	for range 10 { // more than there are connections
		a := st.doAt(t, broken, scenario{name: "panic", method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`,
			status: 500, code: "internal", hasNot: []string{"secret"}})
		require.Contains(t, st.logs.String(), a.text(t, "request_id"))
	}
	require.Contains(t, st.logs.String(), "the secret of the panic")
	require.Contains(t, st.logs.String(), "path_test.go", "the log has the stack")
	require.Zero(t, st.records(t))
	st.do(t, scenario{name: "after", method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`, status: 201})
	st.env.Invariants(t)
}

func TestBodiesAreBounded(t *testing.T) {
	st := open(t, func(o *server.Options) { o.MaxBodyBytes = 1000 })
	token := st.login(t, "acme.localhost", adminMail)
	big := `{"key":"big","description":"` + strings.Repeat("x", 2000) + `"}`
	st.do(t, scenario{name: "declared", method: "POST", path: "/api/v1/pipelines", token: token, body: big, status: 413, code: "body_too_large"})
	resp, body := raw(t, st.addr, "POST /api/v1/pipelines HTTP/1.1\r\nHost: acme.localhost\r\nAuthorization: Bearer "+token+
		"\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"+fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(big), big))
	require.Equal(t, 413, resp.StatusCode, body)
	st.do(t, scenario{name: "on a GET", method: "GET", path: "/api/v1/me", token: token, body: `{"a":1}`, status: 400, code: "unknown_member"})
	resp, _ = raw(t, st.addr, "GET / HTTP/1.1\r\nHost: acme.localhost\r\nX-Big: "+strings.Repeat("x", 64<<10)+"\r\n\r\n")
	require.Equal(t, 431, resp.StatusCode)
	st.do(t, scenario{name: "anonymous bodies are not read", method: "POST", path: "/api/v1/pipelines", body: big, status: 401})
	for name, request := range map[string]string{
		"both lengths": "POST / HTTP/1.1\r\nHost: acme.localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /api/v1/me HTTP/1.1\r\nHost: acme.localhost\r\n\r\n",
		"two lengths":  "POST / HTTP/1.1\r\nHost: acme.localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
		"odd encoding": "POST / HTTP/1.1\r\nHost: acme.localhost\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
	} {
		resp, _ := raw(t, st.addr, request)
		require.GreaterOrEqual(t, resp.StatusCode, 400, name)
		require.True(t, resp.Close, "%s: the connection must not be used again", name)
	}
}

// Security 41: what stands behind a body whose length two servers may see differently is never taken for a request.
func TestNoRequestIsSmuggled(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	second := "GET /api/v1/me HTTP/1.1\r\nHost: acme.localhost\r\nAuthorization: Bearer " + token + "\r\n\r\n"
	head := "POST /api/v1/pipelines HTTP/1.1\r\nHost: acme.localhost\r\nContent-Type: application/json\r\nAuthorization: Bearer " + token + "\r\n"
	body := `{"key":"k%d","name":"K"}`
	for i, lengths := range []string{
		"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n", "Transfer-Encoding: chunked\r\n",
	} {
		c, err := net.Dial("tcp", st.addr)
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(pgtest.Patience)))
		text := fmt.Sprintf(body, i)
		_, err = io.WriteString(c, head+lengths+fmt.Sprintf("\r\n%x\r\n%s\r\n0\r\n\r\n", len(text), text)+second)
		require.NoError(t, err)
		all, _ := io.ReadAll(c) // a reset is an end, too
		require.NoError(t, c.Close())
		require.Equal(t, 1, strings.Count(string(all), "HTTP/1.1 "), "%q: %s", lengths, all)
		require.Contains(t, string(all), "201 Created", lengths)
	}
}

func TestSlowClientsAreCutOff(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	brief := st.again(t, func(o *server.Options) {
		o.ReadHeaderTimeout, o.ReadTimeout = 500*time.Millisecond, time.Second
	})
	for name, request := range map[string]string{
		"headers": "GET / HTTP/1.1\r\nHost: acme.localhost\r\nX-Slow: ",
		"body": "POST /api/v1/pipelines HTTP/1.1\r\nHost: acme.localhost\r\nAuthorization: Bearer " + token +
			"\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
	} {
		c, err := net.Dial("tcp", brief)
		require.NoError(t, err)
		_, err = io.WriteString(c, request)
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(pgtest.Patience)))
		began := time.Now()
		_, err = io.Copy(io.Discard, c) // until the server closes
		var ne net.Error
		if err != nil {
			require.NotErrorAs(t, err, &ne, "%s: the connection was still open after %s", name, time.Since(began))
		}
		require.NoError(t, c.Close())
	}
	st.doAt(t, brief, scenario{name: "others are served", path: "/api/v1/me", token: token, status: 200})
}

func TestRateLimits(t *testing.T) {
	st := open(t, func(o *server.Options) {
		o.LoginPerAccount, o.LoginPerIP = server.Rate{Count: 3, Per: time.Hour}, server.Rate{Count: 9, Per: time.Hour}
		o.Limiter = brokenLimiter{} // the process counts by itself
	})
	try := func(host, email string) answer {
		return st.do(t, scenario{name: "login", method: "POST", host: host, path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":%q,"password":"wrong wrong"}`, email)})
	}
	for range 3 {
		require.Equal(t, 401, try("acme.localhost", adminMail).status)
	}
	limited := try("acme.localhost", adminMail)
	require.Equal(t, 429, limited.status)
	require.NotEmpty(t, limited.header.Get("Retry-After"))
	require.NotEmpty(t, limited.header.Get("RateLimit"))
	// The right password is no way round, nor is another spelling; other accounts and tenants count for themselves.
	a := st.do(t, scenario{name: "right", method: "POST", path: "/api/v1/auth/login", status: 429, body: fmt.Sprintf(`{"email":%q,"password":%q}`, adminMail, password)})
	require.Empty(t, a.header.Get("Set-Cookie"))
	require.Equal(t, 429, try("ACME.localhost.", strings.ToUpper(adminMail)).status)
	st.addDomain(t, st.acme, "crm.acme.example")
	require.Equal(t, 429, try("crm.acme.example", adminMail).status, "nor is another domain of the tenant")
	require.Equal(t, 401, try("acme.localhost", memberMail).status)
	require.Equal(t, 401, try("globex.localhost", adminMail).status)
	require.Equal(t, 429, try("globex.localhost", memberMail).status, "the address as a whole has had its nine")

	all := st.again(t, func(o *server.Options) {
		o.RequestsPerTenant = server.Rate{Count: 2, Per: time.Hour}
		o.RequestsPerIP = server.Rate{Count: 5, Per: time.Hour}
	})
	get := func(host string) int { return st.doAt(t, all, scenario{name: "all", host: host, path: "/"}).status }
	require.Equal(t, []int{200, 200, 429, 200, 200, 429}, []int{get("acme.localhost"), get("acme.localhost"), get("acme.localhost"),
		get("globex.localhost"), get("globex.localhost"), get("localhost")})
}

// brokenLimiter is a limiter whose Redis is away.
type brokenLimiter struct{}

func (brokenLimiter) Allow(context.Context, string, server.Rate) (server.Decision, error) {
	return server.Decision{}, fault.New(fault.Unavailable, "Redis is away")
}

func TestALoginFloodLeavesRoom(t *testing.T) {
	st := openOn(t, pgtest.New(t, func(o *postgres.Options) { o.MaxConns = 24 })) // 6 transactions a tenant
	token := st.login(t, "acme.localhost", adminMail)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var wg sync.WaitGroup
	var wrong atomic.Int64
	for i := range 40 {
		wg.Go(func() {
			r := scenario{method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":"u%d@example.com","password":"wrong wrong"}`, i)}.request(t, st.addr).WithContext(ctx)
			resp, err := http.DefaultTransport.RoundTrip(r)
			if err != nil {
				return // cancelled below
			}
			if resp.StatusCode != 401 {
				wrong.Add(1)
			}
			_ = resp.Body.Close()
		})
	}
	// While passwords are computed, two at a time, no transaction is held for them.
	for range 20 {
		began := time.Now()
		st.do(t, scenario{name: "meanwhile", path: "/api/v1/me", token: token, status: 200})
		require.Less(t, time.Since(began), 20*time.Second)
	}
	cancel()
	wg.Wait()
	require.Zero(t, wrong.Load(), "every login that was answered must have been refused")
	st.env.Invariants(t)
}

func TestStopFinishesWhatHasBegun(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "pipeline", method: "POST", path: "/api/v1/pipelines", token: token, body: createDeals, status: 201})
	inside, release := make(chan struct{}), make(chan struct{})
	o := st.options(t)
	o.Databases = meddling{databases{st.env.DB}, func(context.Context, server.Tx) error {
		close(inside)
		<-release
		return nil
	}}
	s, addr, stop := run(t, o)
	answered := make(chan int, 1)
	go func() {
		r := scenario{method: "POST", path: "/api/v1/pipelines/deals/records", token: token, body: `{"data":{"title":"x"}}`}.request(t, addr)
		resp, err := http.DefaultTransport.RoundTrip(r)
		if err != nil {
			answered <- -1
			return
		}
		_ = resp.Body.Close()
		answered <- resp.StatusCode
	}()
	<-inside
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	eventually(t, "no new connections, and not ready", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
			return false
		}
		return opsStatus(t, s.OpsAddr(), "/readyz") == 503
	})
	close(release)
	require.Equal(t, 201, <-answered, "a request in flight is finished")
	require.NoError(t, <-stopped)
	require.Equal(t, 1, st.records(t))
}

func TestStopCancelsWhatWillNotEnd(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "pipeline", method: "POST", path: "/api/v1/pipelines", token: token, body: createDeals, status: 201})
	inside := make(chan struct{})
	o := st.options(t)
	o.ShutdownGrace = 300 * time.Millisecond
	o.Databases = meddling{databases{st.env.DB}, func(ctx context.Context, tx server.Tx) error {
		close(inside)
		_, err := tx.Exec(ctx, `select pg_sleep(600)`)
		return err
	}}
	_, addr, stop := run(t, o)
	answered := make(chan string, 1)
	go func() {
		defer close(answered) // raw ends the goroutine when there is no answer
		_, body := raw(t, addr, "POST /api/v1/pipelines/deals/records HTTP/1.1\r\nHost: acme.localhost\r\nAuthorization: Bearer "+token+
			"\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n"+`{"data":{"title":"x"}}`)
		answered <- body
	}()
	<-inside
	began := time.Now()
	require.NoError(t, stop())
	require.Less(t, time.Since(began), pgtest.Patience/2)
	require.Contains(t, <-answered, `"status":503`)
	require.Zero(t, st.records(t))
	st.env.Invariants(t)
}

func TestClientsThatLeaveDoNotCostConnections(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	slow := st.meddler(t, func(ctx context.Context, tx server.Tx) error {
		_, err := tx.Exec(ctx, `select pg_sleep(600)`)
		return err
	})
	for range 8 {
		c, err := net.Dial("tcp", slow)
		require.NoError(t, err)
		_, err = io.WriteString(c, "POST /api/v1/auth/logout HTTP/1.1\r\nHost: acme.localhost\r\nAuthorization: Bearer "+token+"\r\nContent-Length: 0\r\n\r\n")
		require.NoError(t, err)
		_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		_, _ = bufio.NewReader(c).ReadByte()
		require.NoError(t, c.Close())
	}
	eventually(t, "the tenant is served again, and nothing was done for those who left", func() bool {
		return st.do(t, scenario{path: "/api/v1/me", token: token}).status == 200
	})
	eventually(t, "those who left are logged as such", func() bool { return strings.Count(st.logs.String(), "status=499") >= 4 })
}

func TestOpsListener(t *testing.T) {
	var failing atomic.Bool
	st := open(t, func(o *server.Options) {
		o.Version = "v1.2.3"
		o.Checks = []server.Check{
			{Name: "postgres", Required: true, Run: func(context.Context) error {
				if failing.Load() {
					return fault.New(fault.Unavailable, "PostgreSQL at 10.0.0.7 cannot be reached").WithCode("database_unreachable")
				}
				return nil
			}},
			{Name: "redis", Run: func(context.Context) error { return fault.New(fault.Unavailable, "away").WithCode("redis_unreachable") }},
			{Name: "schema", Required: true, Run: func(context.Context) error {
				return server.Borne{Err: fault.New(fault.Unavailable, "one group is away").WithCode("database_unreachable")}
			}},
		}
	})
	ops := st.server.OpsAddr()
	require.Equal(t, 200, opsStatus(t, ops, "/livez"))
	require.Equal(t, 200, opsStatus(t, ops, "/readyz"), "Redis is wanted and not needed, and what is borne is no reason")
	require.Equal(t, 200, opsStatus(t, ops, "/debug/pprof/cmdline"))
	require.Equal(t, 404, opsStatus(t, ops, "/api/v1/me"), "the API is not on the operators' listener")
	failing.Store(true)
	require.Equal(t, 503, opsStatus(t, ops, "/readyz"))
	require.Equal(t, 200, opsStatus(t, ops, "/livez"), "a database that is away is no reason to be killed")
}

func opsStatus(t *testing.T, addr, path string) int {
	t.Helper()
	resp, err := http.Get("http://" + addr + path)
	require.NoError(t, err)
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	require.NoError(t, err)
	return resp.StatusCode
}

func TestOptionsAreChecked(t *testing.T) {
	st := open(t)
	for name, change := range map[string]func(*server.Options){
		"PublicURL":    func(o *server.Options) { o.PublicURL = "ftp://x" },
		"Secret":       func(o *server.Options) { o.Secret = []byte("short") },
		"PublicHosts":  func(o *server.Options) { o.PublicHosts = nil },
		"Databases":    func(o *server.Options) { o.Databases = nil },
		"ReadTimeout":  func(o *server.Options) { o.ReadTimeout = 0 },
		"MaxBodyBytes": func(o *server.Options) { o.MaxBodyBytes = 0 },
		"Sessions":     func(o *server.Options) { o.Sessions = auth.SessionOptions{} },
	} {
		o := st.options(t)
		change(&o)
		_, err := server.New(o)
		require.ErrorContains(t, err, name)
	}
	o := st.options(t)
	o.Addr = st.addr
	taken, err := server.New(o)
	require.NoError(t, err)
	require.True(t, fault.Is(taken.Run(t.Context()), fault.Conflict), "a port that is taken is said so")
}
