package server_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// budget sets what a tenant's requests may take, as the command does.
func (st *stage) budget(t *testing.T, tn tenant.Tenant, b tenant.Budget) {
	t.Helper()
	require.NoError(t, st.env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, _, err := registry.ChangeBudget(t.Context(), tx, tn.Number, func(tenant.Budget) tenant.Budget { return b })
		return err
	}))
}

// uses notes what a tenant keeps, as a measurement does.
func (st *stage) uses(t *testing.T, tn tenant.Tenant, u tenant.Use) {
	t.Helper()
	tn.Use = u
	require.NoError(t, st.env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return registry.SetUse(t.Context(), tx, []tenant.Tenant{tn})
	}))
}

// slow makes each reading transaction of one tenant sleep, but not the look-up of who is asking.
type slow struct {
	databases
	noisy   tenant.Slug
	sleeps  atomic.Bool
	started atomic.Int64
}

func (s *slow) InTenant(ctx context.Context, t tenant.Tenant, a server.Access, fn func(server.Tx) error) error {
	return s.databases.InTenant(ctx, t, a, func(tx server.Tx) error {
		if t.Slug == s.noisy && a == server.Read && s.sleeps.Load() {
			s.started.Add(1)
			if _, err := tx.Exec(ctx, `select pg_sleep(3600)`); err != nil {
				return err
			}
		}
		return fn(tx)
	})
}

// F26, F27, security 58: while one tenant saturates its share with statements that never end, its own requests are
// refused, and all requests of twenty quiet tenants succeed, those on the same connections too.
func TestANoisyTenantIsRefusedAloneAndAllOthersServed(t *testing.T) {
	var db *slow
	st := openOn(t, pgtest.New(t, func(o *postgres.Options) { o.MaxConns = 12 }), func(o *server.Options) {
		db = &slow{databases: o.Databases.(databases)}
		o.Databases = db
		o.Budget = tenant.Budget{InFlight: 2, StatementTimeout: 200 * time.Millisecond}
	})
	db.noisy = st.acme.Slug
	noisy := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "known", path: "/api/v1/me", token: noisy, status: 200})

	type quiet struct{ host, token string }
	hash, err := auth.NewHasher(2).Hash(t.Context(), password)
	require.NoError(t, err)
	quiets := make([]quiet, 20)
	sharing := 0
	for i := range quiets {
		tn := st.env.Tenant(t, fmt.Sprintf("quiet-%d", i))
		require.NoError(t, st.env.DB.InTenant(t.Context(), tn, postgres.Write, func(tx *postgres.Tx) error {
			_, err := auth.Tenants().AddUser(t.Context(), tx, auth.NewUser{Email: adminMail, Role: auth.RoleAdmin, PasswordHash: hash})
			return err
		}))
		quiets[i].host = tn.Slug.String() + ".localhost"
		quiets[i].token = st.login(t, quiets[i].host, adminMail)
		if tn.Number%2 == st.acme.Number%2 {
			sharing++
		}
	}
	require.Positive(t, sharing, "some of them must be on the noisy tenant's connections")

	db.sleeps.Store(true)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var busy, cancelled, odd atomic.Int64
	var load sync.WaitGroup
	for range 40 { // 2 at work, 32 waiting
		load.Go(func() {
			for ctx.Err() == nil {
				r := scenario{path: "/api/v1/pipelines", token: noisy}.request(t, st.addr).WithContext(ctx)
				resp, err := http.DefaultTransport.RoundTrip(r)
				if err != nil {
					return // the end
				}
				_ = resp.Body.Close()
				switch {
				case resp.StatusCode == 429 && resp.Header.Get("Retry-After") != "":
					busy.Add(1)
				case resp.StatusCode == 503 && resp.Header.Get("Retry-After") != "":
					cancelled.Add(1)
				default:
					odd.Add(1)
				}
				time.Sleep(10 * time.Millisecond) // as a client that takes no hint
			}
		})
	}
	eventually(t, "the noisy tenant is refused", func() bool { return busy.Load() > 0 && cancelled.Load() > 0 })
	var quieter sync.WaitGroup
	var failed atomic.Pointer[string]
	for _, q := range quiets {
		quieter.Go(func() {
			for range 3 {
				for _, path := range []string{"/api/v1/me", "/api/v1/pipelines", "/api/v1/settings"} {
					resp, err := http.DefaultTransport.RoundTrip(scenario{host: q.host, path: path, token: q.token}.request(t, st.addr))
					what := fmt.Sprintf("%s%s: %v", q.host, path, err)
					if err == nil {
						_ = resp.Body.Close()
						if resp.StatusCode == 200 {
							continue
						}
						what = fmt.Sprintf("%s%s: %d", q.host, path, resp.StatusCode)
					}
					failed.Store(&what)
				}
			}
		})
	}
	quieter.Wait()
	before := db.started.Load()
	eventually(t, "the noisy tenant is still at it", func() bool { return db.started.Load() > before })
	stop()
	load.Wait()
	if what := failed.Load(); what != nil {
		t.Fatalf("a quiet tenant was not served: %s", *what)
	}
	require.Zero(t, odd.Load(), "each of the noisy tenant's requests is to be refused with 429 or 503, and to say when to come again")
	db.sleeps.Store(false)
	st.do(t, scenario{name: "when it is quiet again", path: "/api/v1/pipelines", token: noisy, status: 200})
}

// One tenant's requests on the shared tables wait for each other, and not on all of the connections.
func TestSharedWorkOfOneTenantLeavesRoom(t *testing.T) {
	st := openOn(t, pgtest.New(t, func(o *postgres.Options) { o.SharedConns = 4 }))
	admin := st.login(t, "acme.localhost", adminMail)
	other := st.login(t, "globex.localhost", adminMail)
	// Somebody holds the tenant's row: its changes of settings wait for it.
	held, end := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(end) })
	var wg sync.WaitGroup
	defer wg.Wait()
	defer release()
	wg.Go(func() {
		if err := st.env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(t.Context(), `select from public.tenants where number = $1 for update`, st.acme.Number)
			close(held)
			<-end
			return err
		}); err != nil {
			t.Errorf("holder: %v", err)
		}
	})
	<-held
	for range 12 {
		wg.Go(func() {
			resp, err := http.DefaultTransport.RoundTrip(scenario{method: "PATCH", path: "/api/v1/settings", token: admin, body: `{"a":1}`}.request(t, st.addr))
			if err != nil {
				t.Errorf("a change of settings: %v", err)
				return
			}
			_ = resp.Body.Close()
		})
	}
	waiting := func() (n int) {
		require.NoError(t, pgtest.Admin(t, st.env.AdminURL).QueryRow(t.Context(),
			`select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query like 'update public.tenants set settings%'`).Scan(&n))
		return n
	}
	eventually(t, "a change of settings waits for the row", func() bool { return waiting() > 0 })
	for range 10 {
		st.do(t, scenario{name: "another's", method: "PATCH", host: "globex.localhost", path: "/api/v1/settings", token: other, body: `{"b":2}`, status: 200})
		require.LessOrEqual(t, waiting(), 1, "connections for shared work that one tenant holds")
	}
	release()
	wg.Wait()
}

func TestRequestsOfATenantFollowItsBudget(t *testing.T) {
	st := open(t, func(o *server.Options) { o.RequestsPerTenant = server.Rate{Count: 1, Per: time.Hour} })
	get := func(host string) answer { return st.do(t, scenario{name: "get", host: host, path: "/"}) }
	require.Equal(t, 200, get("acme.localhost").status)
	a := get("acme.localhost")
	require.Equal(t, 429, a.status, "the default")
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, `"tenant";q=1;w=3600`, a.header.Get("RateLimit-Policy"))
	require.Contains(t, a.header.Get("RateLimit"), `"tenant";r=0;t=`)
	st.budget(t, st.acme, tenant.Budget{Requests: 100_000})
	eventually(t, "raised, as soon as the server knows", func() bool { return get("acme.localhost").status == 200 })
	require.Equal(t, `"tenant";q=100000;w=1`, get("acme.localhost").header.Get("RateLimit-Policy"))
	require.Equal(t, 200, get("globex.localhost").status, "the other one has its own")
	require.Equal(t, 429, get("globex.localhost").status, "and the default")
	st.budget(t, st.globex, tenant.Budget{Requests: tenant.Unlimited})
	for range 20 {
		a := get("globex.localhost")
		require.Equal(t, 200, a.status)
		require.Empty(t, a.header.Get("RateLimit"))
	}
}

// Who has used up storage or records may read, delete and manage people; what adds is refused, for this tenant alone.
func TestAFullTenantReadsAndDeletes(t *testing.T) {
	st := open(t, func(o *server.Options) { o.Budget = tenant.Budget{Records: 2} })
	tokens := map[string]string{}
	ids := map[string]string{}
	for _, host := range []string{"acme.localhost", "globex.localhost"} {
		tokens[host] = st.login(t, host, adminMail)
		st.do(t, scenario{name: "pipeline", method: "POST", host: host, path: "/api/v1/pipelines", token: tokens[host], body: createDeals, status: 201})
		ids[host] = st.do(t, scenario{name: "record", method: "POST", host: host, path: deals, token: tokens[host], body: `{"data":{"title":"x"}}`, status: 201}).text(t, "id")
	}
	admin, one := tokens["acme.localhost"], deals+"/"+ids["acme.localhost"]
	add := scenario{name: "add", method: "POST", path: deals, token: admin, body: `{"data":{"title":"y"}}`}
	change := scenario{name: "change", method: "PATCH", path: one, token: admin, header: ifMatch(`"1"`), body: `{"data":{"title":"z"}}`}
	refused := func(sc scenario, code string) {
		t.Helper()
		sc.status, sc.code = 403, code
		sc.hasNot = []string{"oneo_", "budgets"}
		st.do(t, sc)
	}
	done := func(sc scenario, status int) {
		t.Helper()
		sc.status = status
		st.do(t, sc)
	}

	st.uses(t, st.acme, tenant.Use{Records: 2})
	refused(add, "records_full")
	done(change, 200)
	done(scenario{name: "read", path: one, token: admin}, 200)
	done(scenario{name: "delete", method: "DELETE", path: one, token: admin}, 200)
	refused(scenario{name: "restore", method: "POST", path: one + "/restore", token: admin}, "records_full")
	st.uses(t, st.acme, tenant.Use{Records: 1, RecordsFull: true})
	done(scenario{name: "restore", method: "POST", path: one + "/restore", token: admin}, 200)
	change.header = ifMatch(`"4"`)

	st.budget(t, st.acme, tenant.Budget{Storage: 1 << 20, Records: tenant.Unlimited})
	st.uses(t, st.acme, tenant.Use{Storage: 1 << 20, StorageFull: true, Records: 99})
	refused(add, "storage_full")
	refused(change, "storage_full")
	for _, sc := range []scenario{
		{name: "pipeline", method: "POST", path: "/api/v1/pipelines", body: `{"key":"more"}`},
		{name: "pipeline", method: "PATCH", path: "/api/v1/pipelines/deals", body: `{"name":"More"}`},
		{name: "field", method: "POST", path: "/api/v1/pipelines/deals/fields", body: `{"key":"more","type":"text"}`},
		{name: "field", method: "PATCH", path: "/api/v1/pipelines/deals/fields/title", body: `{"name":"More"}`},
	} {
		sc.token, sc.header = admin, ifMatch(`"1"`)
		refused(sc, "storage_full")
	}
	st.login(t, "acme.localhost", memberMail) // a session is nobody's storage
	done(scenario{name: "a person", method: "POST", path: "/api/v1/users", token: admin, body: `{"email":"new@example.com","role":"viewer"}`}, 201)
	done(scenario{name: "list", path: deals, token: admin}, 200)
	done(scenario{name: "delete", method: "DELETE", path: one, token: admin}, 200)
	done(scenario{name: "purge", method: "DELETE", path: one + "?purge=true", token: admin}, 204)

	// The neighbour has the default, and is far from it.
	done(scenario{name: "neighbour adds", method: "POST", host: "globex.localhost", path: deals, token: tokens["globex.localhost"], body: `{"data":{"title":"y"}}`}, 201)

	// Hysteresis: just below the limit it is still full, further below it is not, whatever the limit was.
	st.uses(t, st.acme, tenant.Use{Storage: 1<<20 - 1, StorageFull: true})
	refused(add, "storage_full")
	st.uses(t, st.acme, tenant.Use{Storage: 1 << 19, StorageFull: true})
	done(add, 201)
	st.uses(t, st.acme, tenant.Use{Storage: 1 << 20, StorageFull: true})
	refused(add, "storage_full")
	st.budget(t, st.acme, tenant.Budget{Storage: 1<<20 + 1})
	done(add, 201)
	require.NotContains(t, strings.ToLower(st.logs.String()), "panic")
}
