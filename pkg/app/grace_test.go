package app_test

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// far is an installation whose registry has a server of its own, which a test may stop; its tenants are in the group far,
// on the tests' server.
type far struct {
	main   *devstack.Postgres
	change func(*config.Config)
	shard  string // an administrator's URL
}

func newFar(t *testing.T) far {
	t.Helper()
	env := pgtest.New(t)
	inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "pgtest-own-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir, Trust: true})
	require.NoError(t, err)
	t.Cleanup(func() { _ = pg.Stop(context.Background()) })
	as := func(role string) string {
		u, err := url.Parse(pg.URL("oneo"))
		require.NoError(t, err)
		u.User = url.User(role)
		return u.String()
	}
	g := postgres.Group{URL: as("oneo_app"), OwnerURL: as("oneo_owner")}
	_, err = postgres.Setup(t.Context(), postgres.SetupOptions{
		AdminURL: pg.URL("postgres"), Group: g, AppRole: "oneo_app", OwnerRole: "oneo_owner", Secret: pgtest.Secret, Logins: 2, ID: inst.ID,
	})
	require.NoError(t, err)
	return far{main: pg, shard: env.AdminURL, change: func(c *config.Config) {
		c.Database.URL, c.Database.OwnerURL = g.URL, g.OwnerURL
		c.Database.Groups = map[string]config.Group{"far": {URL: env.Group.URL, OwnerURL: env.Group.OwnerURL}}
	}}
}

// lines is a log that is read while it is written.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// F88: while the registry is away, the tenants of other groups are served that were known before, except those that are
// known to have changed since.
func TestKnownTenantsAreServedWithoutTheRegistry(t *testing.T) {
	t.Parallel()
	f := newFar(t)
	redis := pgtest.Redis(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ops := l.Addr().String()
	require.NoError(t, l.Close())
	log := &lines{}
	start := func(ops string, log io.Writer) *app.App {
		c := config.Default()
		c.Server.Secret, c.Server.Addr, c.Server.OpsAddr, c.Redis.URL = pgtest.Secret, "127.0.0.1:0", ops, redis.URL()
		c.Cache.TenantTTL, c.Cache.LocalTTL, c.Cache.SharedTTL = time.Millisecond, time.Millisecond, time.Millisecond
		c.Cache.TenantGrace = time.Hour
		f.change(&c)
		require.NoError(t, c.Validate())
		a, err := app.Open(c, "test", slog.New(slog.NewTextHandler(log, nil)))
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, a.Close()) })
		return a
	}
	a, other := start(ops, log), start("127.0.0.1:0", io.Discard)
	_, err = a.Migrate.Shared(t.Context())
	require.NoError(t, err)
	tokens := map[string]string{}
	tenants := map[string]tenant.Tenant{}
	for _, slug := range []string{"acme", "globex", "initech", "unasked"} {
		tn, err := a.Provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, slug), Group: "far", Actor: "test"})
		require.NoError(t, err)
		tokens[slug], tenants[slug] = session(t, &pgtest.Env{DB: a.DB}, tn), tn
	}
	addr := serve(t, a)
	me := func(slug string) int {
		status, _ := ask(t, addr, "GET", slug+".localhost", "/api/v1/me", tokens[slug], "")
		return status
	}
	ready := func() (int, string) {
		res, err := http.Get("http://" + ops + "/readyz")
		require.NoError(t, err)
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		return res.StatusCode, string(b)
	}
	for _, slug := range []string{"acme", "globex", "initech"} {
		require.Equal(t, http.StatusOK, me(slug))
	}
	for round := 1; round <= 2; round++ {
		if round == 1 {
			require.NoError(t, f.main.Kill())
		} else {
			require.NoError(t, f.main.Stop(t.Context()))
		}
		for range 50 {
			require.Equal(t, http.StatusOK, me("acme"), "a known tenant is not served")
		}
		require.Equal(t, http.StatusOK, me("globex"))
		status, body := ready()
		require.Equal(t, http.StatusOK, status, body)
		require.Contains(t, body, `"postgres":"database_`)
		if round == 1 {
			require.Equal(t, http.StatusServiceUnavailable, me("unasked"), "a tenant of which nothing is known is none that there is not")
			h, err := tenant.ParseHost("globex.localhost")
			require.NoError(t, err)
			other.Changed(t.Context(), tenants["globex"], h)
			require.Eventually(t, func() bool { return me("globex") == http.StatusServiceUnavailable }, 30*time.Second, 10*time.Millisecond,
				"what another process has announced is served all the same")
			require.Equal(t, http.StatusOK, me("acme"))
			// What the shard says of a tenant counts, whatever the registry's last answer was.
			_, err = pgtest.Admin(t, f.shard).Exec(t.Context(), `update public.placements set state = 'suspended' where number = $1`, tenants["initech"].Number)
			require.NoError(t, err)
			require.Equal(t, http.StatusServiceUnavailable, me("initech"))
		}
		require.NoError(t, f.main.Restart(t.Context()))
		for _, slug := range []string{"acme", "globex"} {
			require.Eventually(t, func() bool { return me(slug) == http.StatusOK }, 30*time.Second, 10*time.Millisecond, slug)
		}
		require.Eventually(t, func() bool { return me("acme") == http.StatusOK && log.count("the registry answers again") == round }, 30*time.Second, 10*time.Millisecond)
		require.Equal(t, round, log.count("the registry cannot be asked"))
	}
	_, err = a.Provision.Suspend(t.Context(), tenants["acme"].Slug, "test")
	require.NoError(t, err)
	require.NoError(t, f.main.Kill())
	require.Equal(t, http.StatusServiceUnavailable, me("acme"), "this process has suspended it itself")
	require.NoError(t, f.main.Restart(t.Context()))
}

// Where nobody can be served without the registry, the instance says that it is not ready.
func TestAnInstanceThatKnowsNobodyIsNotReadyWithoutTheRegistry(t *testing.T) {
	t.Parallel()
	f := newFar(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	ops := l.Addr().String()
	require.NoError(t, l.Close())
	a := open(t, &pgtest.Env{}, "", f.change, func(c *config.Config) { c.Server.OpsAddr = ops })
	_, err = a.Migrate.Shared(t.Context())
	require.NoError(t, err)
	serve(t, a)
	ready := func() int {
		res, err := http.Get("http://" + ops + "/readyz")
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
		return res.StatusCode
	}
	require.Eventually(t, func() bool { return ready() == http.StatusOK }, time.Minute, 10*time.Millisecond)
	require.NoError(t, f.main.Kill())
	// A backend answers for a moment longer than its postmaster lives.
	require.Eventually(t, func() bool { return ready() == http.StatusServiceUnavailable }, time.Minute, 10*time.Millisecond)
	require.NoError(t, f.main.Restart(t.Context()))
	require.Eventually(t, func() bool { return ready() == http.StatusOK }, time.Minute, 10*time.Millisecond)
}
