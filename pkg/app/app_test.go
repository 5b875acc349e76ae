package app_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// wire leads to a Redis and can be cut: what is sent meanwhile arrives nowhere, and Redis keeps what it has.
type wire struct {
	url string
	to  string

	mu    sync.Mutex
	cut   bool
	conns map[net.Conn]bool
}

func newWire(t *testing.T, r *devstack.Redis) *wire {
	t.Helper()
	u, err := url.Parse(r.URL())
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	w := &wire{to: u.Host, conns: map[net.Conn]bool{}}
	u.Host = l.Addr().String()
	w.url = u.String()
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() { w.carry(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		w.set(true)
		running.Wait()
	})
	return w
}

func (w *wire) carry(c net.Conn) {
	defer c.Close()
	up, err := net.Dial("tcp", w.to)
	if err != nil {
		return
	}
	defer up.Close()
	if !w.join(c) {
		return
	}
	go func() { _, _ = io.Copy(c, up); _ = c.Close() }()
	_, _ = io.Copy(up, c)
}

func (w *wire) join(c net.Conn) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conns[c] = true
	return !w.cut
}

func (w *wire) set(cut bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.cut = cut; cut {
		for c := range w.conns {
			_ = c.Close()
		}
		clear(w.conns)
	}
}

// open makes a process's parts, which remember nothing for longer than a moment by themselves.
func open(t *testing.T, env *pgtest.Env, redis string, change ...func(*config.Config)) *app.App {
	t.Helper()
	c := config.Default()
	c.Database.URL, c.Database.OwnerURL, c.Server.Secret = env.Group.URL, env.Group.OwnerURL, pgtest.Secret
	c.Server.Addr, c.Server.OpsAddr = "127.0.0.1:0", "127.0.0.1:0"
	c.Redis.URL = redis
	// What a busy machine would meet although nothing is wrong; a wire that is cut refuses at once.
	c.Redis.Timeout, c.Database.AcquireTimeout, c.Database.ConnectTimeout = 10*time.Second, 30*time.Second, 30*time.Second
	c.Cache.TenantTTL, c.Cache.LocalTTL, c.Cache.SharedTTL = time.Millisecond, time.Millisecond, time.Hour
	for _, f := range change {
		f(&c)
	}
	require.NoError(t, c.Validate())
	a, err := app.Open(c, "test", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, a.Close()) })
	return a
}

// serve runs a process and returns the address of its API.
func serve(t *testing.T, a *app.App) string {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	addr, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- a.Serve(ctx, app.ServeOptions{Ready: func(s string) { addr <- s }}) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	select {
	case s := <-addr:
		return s
	case err := <-ended:
		ended <- err
		t.Fatalf("serve: %v", err)
		return ""
	}
}

// usable waits until a process asks Redis again.
func usable(t *testing.T, a *app.App) {
	t.Helper()
	require.Eventually(t, func() bool { return a.Cache.Stats().Breaker != "open" }, pgtest.Patience, 10*time.Millisecond, "the breaker stays open")
}

// A tenant is suspended while its process cannot reach Redis, which still has it as active.
func TestAChangeThatRedisMissedIsNotReadFromIt(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	tn := env.Tenant(t, "acme")
	redis := pgtest.Redis(t)
	w := newWire(t, redis)
	here, there := open(t, env, w.url), open(t, env, redis.URL())
	h, err := tenant.ParseHost("acme.localhost")
	require.NoError(t, err)
	state := func(a *app.App) tenant.State {
		a.Resolver.ForgetAll()
		got, err := a.Resolver.Resolve(t.Context(), h)
		require.NoError(t, err)
		return got.State
	}
	require.Equal(t, tenant.Active, state(here))
	w.set(true)
	_, err = here.Provision.Suspend(t.Context(), tn.Slug, "test")
	require.NoError(t, err)
	w.set(false)
	usable(t, here)
	require.Equal(t, tenant.Suspended, state(here))
	require.Eventually(t, func() bool { return state(here) == tenant.Suspended && state(there) == tenant.Suspended }, pgtest.Patience, 20*time.Millisecond,
		"Redis is never told")
}

// A session ends while its process cannot reach Redis, which still has who it stands for.
func TestALogoutThatRedisMissedRevivesNobody(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := pgtest.Redis(t)
	w := newWire(t, redis)
	here, there := open(t, env, w.url), open(t, env, redis.URL())
	token := session(t, env, tenant.Tenant{})
	a, b := serve(t, here), serve(t, there)
	require.Equal(t, http.StatusOK, do(t, a, "GET", "/api/v1/me", token))
	w.set(true)
	require.Equal(t, http.StatusNoContent, do(t, a, "POST", "/api/v1/auth/logout", token))
	w.set(false)
	usable(t, here)
	require.Equal(t, http.StatusUnauthorized, do(t, a, "GET", "/api/v1/me", token), "whoever ended it takes it for good")
	require.Eventually(t, func() bool {
		return do(t, a, "GET", "/api/v1/me", token) == http.StatusUnauthorized && do(t, b, "GET", "/api/v1/me", token) == http.StatusUnauthorized
	}, pgtest.Patience, 20*time.Millisecond, "another process takes it for good for as long as Redis does")
}

// F81: what one instance or a command ends is refused by the others at once, whatever they would remember by themselves.
func TestInstancesTellEachOtherWhatHasEnded(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	redis := pgtest.Redis(t)
	long := func(c *config.Config) {
		c.Cache.LocalTTL, c.Cache.SharedTTL, c.Cache.TenantTTL = time.Hour, time.Hour, time.Hour
	}
	parts := []*app.App{open(t, env, redis.URL(), long), open(t, env, redis.URL(), long)}
	addrs := []string{serve(t, parts[0]), serve(t, parts[1])}
	both := func(host, token string, want int, why string) {
		t.Helper()
		for _, addr := range addrs {
			require.Eventually(t, func() bool { got, _ := ask(t, addr, "GET", host, "/api/v1/me", token, ""); return got == want }, pgtest.Patience, 10*time.Millisecond, why)
		}
	}
	for host, tn := range map[string]tenant.Tenant{"acme.localhost": acme, "localhost": {}} {
		first, second := session(t, env, tn), again(t, env, tn)
		both(host, first, http.StatusOK, "signed in")
		both(host, second, http.StatusOK, "signed in")
		status, _ := ask(t, addrs[0], "POST", host, "/api/v1/auth/logout", first, "")
		require.Equal(t, http.StatusNoContent, status)
		both(host, first, http.StatusUnauthorized, host+": logged out at one instance")
		both(host, second, http.StatusOK, host+": another session")
		// As a command does: it ends in PostgreSQL, and says so.
		realm, in := realmOf(t, env, tn)
		var u auth.User
		var ended [][]byte
		require.NoError(t, in(func(tx *postgres.Tx) (err error) {
			if u, err = realm.UserByEmail(t.Context(), tx, "root@example.com"); err != nil {
				return err
			}
			ended, err = realm.RevokeSessions(t.Context(), tx, u.ID)
			return err
		}))
		open(t, env, redis.URL()).AccountChanged(t.Context(), tn, u.ID, ended)
		both(host, second, http.StatusUnauthorized, host+": ended by a command")
	}
}

// Without Redis: whoever asks for a tenant's settings may be anybody, and must not cost a transaction each time.
func TestWithoutRedisSettingsAreRemembered(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, globex := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	token := session(t, env, acme)
	addr := serve(t, open(t, env, "", func(c *config.Config) { c.Cache.LocalTTL = time.Hour }))
	behind := func(tn tenant.Tenant, old, settings string) {
		t.Helper()
		require.NoError(t, env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			return registry.SetSettings(t.Context(), tx, tn, json.RawMessage(old), json.RawMessage(settings))
		}))
	}
	behind(acme, `{}`, `{"public":{"color":"red"}}`)
	behind(globex, `{}`, `{"public":{"color":"green"}}`)
	show := func(host string) string {
		t.Helper()
		status, body := ask(t, addr, "GET", host, "/api/v1/settings", "", "")
		require.Equal(t, http.StatusOK, status, body)
		return body
	}
	require.Contains(t, show("acme.localhost"), "red")
	require.Contains(t, show("globex.localhost"), "green")
	behind(acme, `{"public":{"color":"red"}}`, `{"public":{"color":"blue"}}`)
	require.Contains(t, show("acme.localhost"), "red", "PostgreSQL is asked each time")
	status, body := ask(t, addr, "PATCH", "acme.localhost", "/api/v1/settings", token, `{"public":{"size":"large"}}`)
	require.Equal(t, http.StatusOK, status, body)
	for range 2 {
		require.JSONEq(t, `{"public":{"color":"blue","size":"large"}}`, show("acme.localhost"), "a change made here must be seen here")
	}
	require.Contains(t, show("globex.localhost"), "green")
}

// realmOf is where a tenant's users are kept, or with the zero tenant the administrators.
func realmOf(t *testing.T, env *pgtest.Env, tn tenant.Tenant) (*auth.Realm, func(func(*postgres.Tx) error) error) {
	if tn.IsZero() {
		return auth.Administrators(), func(fn func(*postgres.Tx) error) error { return env.DB.InShared(t.Context(), postgres.Write, fn) }
	}
	return auth.Tenants(), func(fn func(*postgres.Tx) error) error { return env.DB.InTenant(t.Context(), tn, postgres.Write, fn) }
}

// session makes somebody who is logged in: at a tenant, or with the zero tenant an administrator.
func session(t *testing.T, env *pgtest.Env, tn tenant.Tenant) (token string) {
	t.Helper()
	hash, err := auth.NewHasher(1).Hash(t.Context(), "correct horse battery staple")
	require.NoError(t, err)
	realm, in := realmOf(t, env, tn)
	require.NoError(t, in(func(tx *postgres.Tx) error {
		_, err := realm.AddUser(t.Context(), tx, auth.NewUser{Email: "root@example.com", Role: auth.RoleAdmin, PasswordHash: hash})
		return err
	}))
	return again(t, env, tn)
}

// again logs the same person in once more.
func again(t *testing.T, env *pgtest.Env, tn tenant.Tenant) (token string) {
	t.Helper()
	realm, in := realmOf(t, env, tn)
	require.NoError(t, in(func(tx *postgres.Tx) error {
		c, err := realm.Credential(t.Context(), tx, "root@example.com")
		if err != nil {
			return err
		}
		token, _, err = realm.StartSession(t.Context(), tx, c, auth.DefaultSessionOptions())
		return err
	}))
	return token
}

// do asks the administration.
func do(t *testing.T, addr, method, path, token string) int {
	t.Helper()
	status, _ := ask(t, addr, method, "localhost", path, token, "")
	return status
}

func ask(t *testing.T, addr, method, host, path, token, body string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+addr+path, strings.NewReader(body))
	require.NoError(t, err)
	r.Host = host
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	if body != "" {
		r.Header.Set("Content-Type", "application/merge-patch+json")
	}
	res, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(b)
}

// The setting reaches the worker that fills the pool, and the creations that take from it.
func TestServeKeepsThePool(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	pooled := func(c *config.Config) { c.Provisioning.PoolSize = 2 }
	a, command := open(t, env, "", pooled), open(t, env, "", pooled)
	serve(t, a)
	full := func() bool {
		counts, err := a.Provision.Spares(t.Context())
		require.NoError(t, err)
		return counts[0].Ready == 2
	}
	require.Eventually(t, full, pgtest.Patience, 20*time.Millisecond, "the pool is not filled")
	made, err := command.Provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Actor: "test"})
	require.NoError(t, err)
	require.EqualValues(t, 1, made.Number, "the tenant has taken the first spare")
	require.Eventually(t, full, pgtest.Patience, 20*time.Millisecond, "the pool is not filled again, though another process has taken the spare")
	h, err := tenant.ParseHost("acme.localhost")
	require.NoError(t, err)
	got, err := a.Resolver.Resolve(t.Context(), h)
	require.NoError(t, err)
	require.Equal(t, made.Number, got.Number)
}
