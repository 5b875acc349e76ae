package app_test

import (
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// keep makes records in a tenant's first pipeline, past the server.
func keep(t *testing.T, env *pgtest.Env, tn tenant.Tenant, records int) {
	t.Helper()
	require.NoError(t, env.DB.InTenant(t.Context(), tn, postgres.Write, func(tx *postgres.Tx) error {
		const pipeline = `insert into pipelines (id, key, name) values (gen_random_uuid(), 'deals', 'Deals') on conflict (key) do nothing`
		if _, err := tx.Exec(t.Context(), pipeline); err != nil {
			return err
		}
		const rows = `insert into records (id, pipeline_id) select gen_random_uuid(), p.id from pipelines p, generate_series(1, $1::int)`
		_, err := tx.Exec(t.Context(), rows, records)
		return err
	}))
}

// trash moves so many of them to the trash.
func trash(t *testing.T, env *pgtest.Env, tn tenant.Tenant, records int) {
	t.Helper()
	require.NoError(t, env.DB.InTenant(t.Context(), tn, postgres.Write, func(tx *postgres.Tx) error {
		const some = `update records set deleted_at = now() where id in (select id from records where deleted_at is null limit $1)`
		_, err := tx.Exec(t.Context(), some, records)
		return err
	}))
}

func use(t *testing.T, env *pgtest.Env, tn tenant.Tenant) (u tenant.Use, at *time.Time) {
	t.Helper()
	require.NoError(t, env.DB.InShared(t.Context(), postgres.Read, func(tx *postgres.Tx) (err error) {
		_, u, at, err = registry.BudgetOf(t.Context(), tx, tn.Number)
		return err
	}))
	return u, at
}

func setBudget(t *testing.T, env *pgtest.Env, tn tenant.Tenant, b tenant.Budget) {
	t.Helper()
	require.NoError(t, env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, _, err := registry.ChangeBudget(t.Context(), tx, tn.Number, func(tenant.Budget) tenant.Budget { return b })
		return err
	}))
}

func TestWhatTenantsKeepIsMeasured(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, globex, free, locked := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "free"), env.Tenant(t, "locked")
	a := open(t, env, "", func(c *config.Config) {
		c.Budgets.Records, c.Budgets.Storage, c.Database.LockTimeout = 40, 1<<40, 100*time.Millisecond
	})
	setBudget(t, env, free, tenant.Budget{Records: tenant.Unlimited, Storage: tenant.Unlimited})
	for _, tn := range []tenant.Tenant{acme, free, locked} {
		keep(t, env, tn, 40)
	}
	keep(t, env, globex, 39)

	n, err := a.MeasureBudgets(t.Context(), time.Hour)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	u, at := use(t, env, acme)
	require.NotNil(t, at)
	require.EqualValues(t, 40, u.Records)
	require.True(t, u.RecordsFull)
	require.False(t, u.StorageFull)
	require.Greater(t, u.Storage, int64(64<<10), "the tables and indexes of a schema")
	u, _ = use(t, env, globex)
	require.EqualValues(t, 39, u.Records)
	require.False(t, u.RecordsFull)
	_, at = use(t, env, free)
	require.Nil(t, at, "without a budget nothing is measured")
	n, err = a.MeasureBudgets(t.Context(), time.Hour)
	require.NoError(t, err)
	require.Zero(t, n, "another server has just done it")

	// Hysteresis, by what is in use and not by the time.
	trash(t, env, acme, 1)
	_, err = a.MeasureBudgets(t.Context(), 0)
	require.NoError(t, err)
	u, _ = use(t, env, acme)
	require.Equal(t, []any{int64(39), true}, []any{u.Records, u.RecordsFull}, "just below the limit, having been at it")
	u, _ = use(t, env, globex)
	require.False(t, u.RecordsFull, "as many, never having been at it")
	trash(t, env, acme, 1)

	// One whose tables are locked is measured later, and holds up nobody.
	held := pgtest.Admin(t, env.AdminURL)
	tx, err := held.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `lock table `+postgres.Quote(locked.Schema.String())+`.records in access exclusive mode`)
	require.NoError(t, err)
	_, before := use(t, env, locked)
	n, err = a.MeasureBudgets(t.Context(), 0)
	require.Error(t, err)
	require.Equal(t, 2, n)
	u, at = use(t, env, locked)
	require.Equal(t, before, at)
	require.True(t, u.RecordsFull, "what was measured before stands")
	u, _ = use(t, env, acme)
	require.Equal(t, []any{int64(38), false}, []any{u.Records, u.RecordsFull}, "95 % of the limit")
	require.NoError(t, tx.Rollback(t.Context()))

	// A clock that jumps: what was measured stands, and is measured anew.
	admin := pgtest.Admin(t, env.AdminURL)
	for _, at := range []string{`'-1 year'`, `'1 year'`} {
		_, err := admin.Exec(t.Context(), `update public.budgets set measured_at = now() + interval `+at+` where tenant = $1`, locked.Number)
		require.NoError(t, err)
		u, _ := use(t, env, locked)
		require.True(t, u.RecordsFull)
		n, err := a.MeasureBudgets(t.Context(), time.Hour)
		require.NoError(t, err)
		require.Equal(t, 1, n, "measured %s from now", at)
		_, measured := use(t, env, locked)
		require.WithinDuration(t, time.Now(), *measured, pgtest.Patience)
	}

	// A product of its own may have no records at all.
	_, err = admin.Exec(t.Context(), `alter table `+postgres.Quote(globex.Schema.String())+`.records rename to rows`)
	require.NoError(t, err)
	require.NoError(t, a.Measure(t.Context(), withBudget(globex, a)))
	u, _ = use(t, env, globex)
	require.Zero(t, u.Records)
}

func withBudget(tn tenant.Tenant, a *app.App) tenant.Tenant {
	tn.Budget = app.BudgetOf(a.Config)
	return tn
}

// add asks a server for one record more.
func add(t *testing.T, addr, host, token string) int {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+addr+"/api/v1/pipelines/deals/records", strings.NewReader(`{"data":{}}`))
	require.NoError(t, err)
	r.Host = host
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	return res.StatusCode
}

// Servers that remember a tenant for an hour hear of a budget that was changed and of one that is used up; those that Redis
// cannot tell look by themselves when their time is over.
func TestServersHearOfBudgets(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, globex := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	keep(t, env, acme, 5)
	keep(t, env, globex, 5)
	redis := pgtest.Redis(t)
	w := newWire(t, redis)
	long := func(c *config.Config) {
		c.Cache.LocalTTL, c.Cache.SharedTTL, c.Cache.TenantTTL = time.Hour, time.Hour, time.Hour
	}
	command := open(t, env, redis.URL())
	deaf := open(t, env, w.url) // remembers for a moment, and its Redis goes away below
	addrs := []string{serve(t, open(t, env, redis.URL(), long)), serve(t, deaf)}
	tokens := map[string]string{"acme.localhost": session(t, env, acme), "globex.localhost": session(t, env, globex)}
	all := func(want int, why string) {
		t.Helper()
		for _, addr := range addrs {
			require.Eventually(t, func() bool { return add(t, addr, "acme.localhost", tokens["acme.localhost"]) == want }, pgtest.Patience, 10*time.Millisecond, why)
			require.Equal(t, http.StatusCreated, add(t, addr, "globex.localhost", tokens["globex.localhost"]), "the neighbour")
		}
	}
	h, err := tenant.ParseHost("acme.localhost")
	require.NoError(t, err)
	set := func(b tenant.Budget) { // as the command does
		t.Helper()
		setBudget(t, env, acme, b)
		tn := acme
		tn.Budget = b.Or(tenant.Budget{})
		require.NoError(t, command.Measure(t.Context(), tn))
		command.Changed(t.Context(), acme, h)
	}
	all(http.StatusCreated, "no budget")
	set(tenant.Budget{Records: 5})
	all(http.StatusForbidden, "used up by a change")
	set(tenant.Budget{Records: 1000})
	all(http.StatusCreated, "raised")
	keep(t, env, acme, 1000)
	_, err = command.MeasureBudgets(t.Context(), 0)
	require.NoError(t, err)
	all(http.StatusForbidden, "used up by records, and measured")

	// Redis is down for one of them: what it knows stands, and what is new it reads from PostgreSQL.
	w.set(true)
	all(http.StatusForbidden, "without Redis")
	trash(t, env, acme, 1100)
	_, err = command.MeasureBudgets(t.Context(), 0)
	require.NoError(t, err)
	all(http.StatusCreated, "room was made")
	set(tenant.Budget{Requests: 1})
	for _, addr := range addrs {
		require.Eventually(t, func() bool {
			return add(t, addr, "acme.localhost", tokens["acme.localhost"]) == http.StatusTooManyRequests
		},
			pgtest.Patience, time.Millisecond, "requests, counted by each server without Redis too")
		require.Equal(t, http.StatusCreated, add(t, addr, "globex.localhost", tokens["globex.localhost"]), "the neighbour")
	}
}

// The older settings go on to be what they were, and those of budgets win.
func TestBudgetsOfTheConfiguration(t *testing.T) {
	t.Parallel()
	c := config.Default()
	require.Zero(t, app.BudgetOf(c), "by default nothing is bounded but by the server itself")
	c.Server.RequestsPerTenant = 7
	require.Equal(t, tenant.Budget{Requests: 7}, app.BudgetOf(c))
	c.Budgets = config.Budgets{Requests: 9, InFlight: 2, StatementTimeout: time.Second, Storage: 1 << 20, Records: 5, Measure: time.Minute}
	require.NoError(t, c.Validate())
	require.Equal(t, tenant.Budget{Requests: 9, InFlight: 2, StatementTimeout: time.Second, Storage: 1 << 20, Records: 5}, app.BudgetOf(c))
	for i, b := range []config.Budgets{
		{Requests: -1, Measure: time.Minute}, {InFlight: -1, Measure: time.Minute}, {StatementTimeout: time.Microsecond, Measure: time.Minute},
		{StatementTimeout: -time.Second, Measure: time.Minute}, {Storage: -1, Measure: time.Minute}, {Records: -1, Measure: time.Minute}, {},
	} {
		c.Budgets = b
		require.Error(t, c.Validate(), fmt.Sprint(i))
	}
}

// mute passes on to addr what it is told, until it is hushed: from then on it answers nothing to those that it knows, and nobody
// else gets in.
func mute(t *testing.T, addr string) (at string, hush func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	var hushed atomic.Bool
	pass := func(to, from net.Conn) {
		defer to.Close()
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			if n > 0 && !hushed.Load() {
				if _, err := to.Write(buf[:n]); err != nil {
					return
				}
			}
			if err != nil {
				return
			}
		}
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if hushed.Load() {
				_ = c.Close()
				continue
			}
			s, err := net.Dial("tcp", addr)
			if err != nil {
				_ = c.Close()
				continue
			}
			go pass(s, c)
			go pass(c, s)
		}
	}()
	return l.Addr().String(), func() { hushed.Store(true) }
}

// A database that says nothing any more holds up the measurement of its own tenants alone.
func TestAMuteGroupHoldsUpNoOthersMeasurement(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	at, hush := mute(t, fmt.Sprintf("127.0.0.1:%d", env.Server.Port()))
	u, err := url.Parse(second.OwnerURL)
	require.NoError(t, err)
	u.Host = at
	_, m, p := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{postgres.MainGroup: env.Group, "second": second}
	})
	_, err = m.Shared(t.Context())
	require.NoError(t, err)
	acme := env.Tenant(t, "acme")
	_, err = p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: "second", Actor: "test"})
	require.NoError(t, err)
	a := open(t, env, "", func(c *config.Config) {
		c.Budgets.Records = 40
		c.Database.Groups = map[string]config.Group{"second": {URL: second.URL, OwnerURL: u.String(), DirectURL: u.String()}}
	})
	n, err := a.MeasureBudgets(t.Context(), time.Hour)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	hush()
	a.MeasureWithin(2 * time.Second)
	_, before := use(t, env, acme)
	for range 2 { // whichever group comes first
		_, err = a.MeasureBudgets(t.Context(), 0)
		require.Error(t, err)
	}
	require.Eventually(t, func() bool {
		_, after := use(t, env, acme)
		if !after.After(*before) {
			_, _ = a.MeasureBudgets(t.Context(), 0)
		}
		return after.After(*before)
	}, pgtest.Patience, time.Millisecond)
}
