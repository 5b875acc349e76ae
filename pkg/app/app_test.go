package app_test

import (
	"context"
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
func open(t *testing.T, env *pgtest.Env, redis string) *app.App {
	t.Helper()
	c := config.Default()
	c.Database.URL, c.Database.OwnerURL, c.Server.Secret = env.Group.URL, env.Group.OwnerURL, pgtest.Secret
	c.Server.Addr, c.Server.OpsAddr = "127.0.0.1:0", "127.0.0.1:0"
	c.Redis.URL = redis
	c.Cache.TenantTTL, c.Cache.LocalTTL, c.Cache.SharedTTL = time.Millisecond, time.Millisecond, time.Hour
	require.NoError(t, c.Validate())
	a, err := app.Open(c, slog.New(slog.DiscardHandler))
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
	require.Eventually(t, func() bool { return a.Cache.Stats().Breaker != "open" }, 15*time.Second, 10*time.Millisecond, "the breaker stays open")
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
	require.Eventually(t, func() bool { return state(here) == tenant.Suspended && state(there) == tenant.Suspended }, 15*time.Second, 20*time.Millisecond,
		"Redis is never told")
}

// A session ends while its process cannot reach Redis, which still has who it stands for.
func TestALogoutThatRedisMissedRevivesNobody(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := pgtest.Redis(t)
	w := newWire(t, redis)
	here, there := open(t, env, w.url), open(t, env, redis.URL())
	token := session(t, env)
	a, b := serve(t, here), serve(t, there)
	require.Equal(t, http.StatusOK, do(t, a, "GET", "/api/v1/me", token))
	w.set(true)
	require.Equal(t, http.StatusNoContent, do(t, a, "POST", "/api/v1/auth/logout", token))
	w.set(false)
	usable(t, here)
	require.Equal(t, http.StatusUnauthorized, do(t, a, "GET", "/api/v1/me", token), "whoever ended it takes it for good")
	require.Eventually(t, func() bool {
		return do(t, a, "GET", "/api/v1/me", token) == http.StatusUnauthorized && do(t, b, "GET", "/api/v1/me", token) == http.StatusUnauthorized
	}, 15*time.Second, 20*time.Millisecond, "another process takes it for good for as long as Redis does")
}

// session makes an administrator who is logged in.
func session(t *testing.T, env *pgtest.Env) (token string) {
	t.Helper()
	h := auth.NewHasher(1)
	hash, err := h.Hash(t.Context(), "correct horse battery staple")
	require.NoError(t, err)
	realm := auth.Administrators()
	require.NoError(t, env.DB.InShared(t.Context(), postgres.Write, func(tx *postgres.Tx) error {
		if _, err := realm.AddUser(t.Context(), tx, auth.NewUser{Email: "root@example.com", Role: auth.RoleAdmin, PasswordHash: hash}); err != nil {
			return err
		}
		c, err := realm.Credential(t.Context(), tx, "root@example.com")
		if err != nil {
			return err
		}
		token, _, err = realm.StartSession(t.Context(), tx, c, auth.DefaultSessionOptions())
		return err
	}))
	return token
}

func do(t *testing.T, addr, method, path, token string) int {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, "http://"+addr+path, strings.NewReader(""))
	require.NoError(t, err)
	r.Host = "localhost"
	r.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer res.Body.Close()
	return res.StatusCode
}
