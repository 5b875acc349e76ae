package observe_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// clock is a test's time.
type clock struct{ at atomic.Int64 }

func (c *clock) pass(d time.Duration) { c.at.Add(int64(d)) }

func counterWith(top int) (*observe.Counter, *clock) {
	c, k := observe.NewCounter(top), &clock{}
	c.SetClock(func() time.Duration { return time.Duration(k.at.Load()) })
	return c, k
}

func named(t testing.TB, number int32, slug string) tenant.Tenant {
	t.Helper()
	s, err := tenant.ParseSlug(slug)
	require.NoError(t, err)
	return tenant.Tenant{Number: number, Slug: s, Schema: s.Schema(), State: tenant.Active, Epoch: 1}
}

// answer is one whole request of a tenant's.
func answer(c *observe.Counter, tn tenant.Tenant, a observe.Answer) {
	c.Begin()
	if c.Bind(tn) {
		a.Tenant = tn.Number
	}
	c.End(a)
}

func get(took time.Duration) observe.Answer {
	return observe.Answer{Route: "/api/v1/me", Method: "GET", Status: 200, Took: took}
}

func only(t *testing.T, c *observe.Counter) observe.TenantLoad {
	t.Helper()
	_, tenants := c.Loads()
	require.Len(t, tenants, 1)
	return tenants[0]
}

func TestQuantilesAreWithinTenPercent(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		c, _ := counterWith(0)
		tn := named(t, 1, "acme")
		var all []float64
		for _, us := range rapid.SliceOfN(rapid.IntRange(100, 40_000_000), 1, 300).Draw(rt, "microseconds") {
			all = append(all, float64(us)/1000)
			answer(c, tn, get(time.Duration(us)*time.Microsecond))
		}
		slices.Sort(all)
		whole, tenants := c.Loads()
		for _, l := range []observe.Load{whole, tenants[0].Load} {
			for q, got := range map[float64]float64{0.50: l.P50, 0.95: l.P95, 0.99: l.P99} {
				rank := max(1, int(q*float64(len(all))+0.999999))
				if want := all[rank-1]; got < want*0.9 || got > want*1.1 {
					rt.Fatalf("the quantile %g of %d answers is %g ms, and is told as %g", q, len(all), want, got)
				}
			}
		}
	})
}

func TestTheWindowForgets(t *testing.T) {
	c, k := counterWith(0)
	tn := named(t, 1, "acme")
	answer(c, tn, get(time.Second))
	k.pass(55 * time.Second)
	answer(c, tn, get(10*time.Millisecond))
	require.InEpsilon(t, 1000, only(t, c).P99, 0.1, "a minute is not over")
	k.pass(15 * time.Second)
	require.InEpsilon(t, 10, only(t, c).P99, 0.1)
	k.pass(time.Minute)
	require.Zero(t, only(t, c).P50, "there was none within the last minute")
	require.Equal(t, int64(2), only(t, c).Requests, "counts do not go back")
}

func TestRequestsAndTransactionsAreCounted(t *testing.T) {
	c, _ := counterWith(0)
	tn := named(t, 7, "acme")
	c.Begin()
	require.True(t, c.Bind(tn))
	all, tenants := c.Loads()
	require.Equal(t, int64(1), all.InFlight)
	require.Equal(t, int64(1), tenants[0].InFlight)
	c.Transaction(tn, postgres.Work{Took: 2 * time.Second, Statements: 3, Rows: 40})
	c.Transaction(tenant.Tenant{}, postgres.Work{Took: time.Second, Rows: 2})
	c.End(observe.Answer{Tenant: 7, Status: 500, Failed: true})
	answer(c, tn, observe.Answer{Status: 429, Refused: true})
	c.Begin() // of a public host
	c.End(get(time.Millisecond))
	all, tenants = c.Loads()
	require.Equal(t, int64(3), all.Requests)
	require.InDelta(t, 3, all.DatabaseSeconds, 1e-9)
	require.Zero(t, all.InFlight)
	got := tenants[0]
	got.P50, got.P95, got.P99 = 0, 0, 0
	require.Equal(t, observe.TenantLoad{Number: 7, Tenant: "acme", Load: observe.Load{
		Requests: 2, Errors: 1, Refused: 1, DatabaseSeconds: 2, Transactions: 1, Rows: 40,
	}}, got)
}

// What strangers send is no label, and nothing is kept of it.
func TestHostileRequestsDoNotGrowTheCounter(t *testing.T) {
	c, _ := counterWith(10)
	for i := range 2000 {
		c.Begin()
		c.End(observe.Answer{Method: fmt.Sprintf("X%d", i), Status: 404, Took: time.Millisecond})
		answer(c, tenant.Tenant{Number: int32(i + 1), State: tenant.Dropped}, get(time.Millisecond))
		c.Transaction(tenant.Tenant{Number: int32(i + 1), State: tenant.Purged}, postgres.Work{})
	}
	require.Equal(t, 2, c.Routes())
	require.Zero(t, c.Held())
	all, _ := c.Loads()
	require.Equal(t, int64(4000), all.Requests)
}

// Whoever was quiet longest makes room; nobody with a request in flight does, so that what is in flight comes to nothing again.
func TestTenantsAreBounded(t *testing.T) {
	c, k := counterWith(5)
	c.SetLimit(20)
	busy := named(t, 1, "busy")
	c.Begin()
	require.True(t, c.Bind(busy))
	for i := range int32(500) {
		k.pass(time.Millisecond)
		answer(c, named(t, i+2, fmt.Sprintf("t-%d", i)), get(time.Millisecond))
		require.LessOrEqual(t, c.Held(), 20)
		require.Equal(t, c.Held(), c.Kept())
	}
	_, tenants := c.Loads()
	require.Equal(t, "busy", tenants[0].Tenant)
	require.Equal(t, "t-499", tenants[len(tenants)-1].Tenant)
	c.End(observe.Answer{Tenant: 1, Status: 200})
	_, tenants = c.Loads()
	require.Zero(t, tenants[0].InFlight)
	require.Equal(t, int64(1), tenants[0].Requests)

	full, _ := counterWith(5)
	full.SetLimit(3)
	for i := range int32(3) {
		require.True(t, full.Bind(named(t, i+1, fmt.Sprintf("t-%d", i))))
	}
	require.False(t, full.Bind(named(t, 4, "late")), "all have requests in flight")
	full.Begin()
	full.End(observe.Answer{Status: 200})
	require.Equal(t, 3, full.Kept())
}

func TestQuietTenantsAreLetGo(t *testing.T) {
	c, k := counterWith(5)
	answer(c, named(t, 1, "acme"), get(time.Millisecond))
	k.pass(59 * time.Minute)
	answer(c, named(t, 2, "globex"), get(time.Millisecond))
	c.Sweep()
	require.Equal(t, 2, c.Kept())
	k.pass(2 * time.Minute)
	c.Sweep()
	require.Equal(t, "globex", only(t, c).Tenant)
}

func TestADroppedTenantGoesAndARenamedOneHasItsNewName(t *testing.T) {
	c, _ := counterWith(5)
	acme := named(t, 1, "acme")
	answer(c, acme, get(time.Millisecond))
	c.Series()

	renamed := named(t, 1, "acme-new")
	renamed.Epoch = 2
	answer(c, renamed, get(time.Millisecond))
	answer(c, acme, get(time.Millisecond)) // by an instance's memory of before
	require.Equal(t, "acme-new", only(t, c).Tenant)
	require.Equal(t, int64(3), only(t, c).Requests)
	requests, _, _ := c.Series()
	require.Equal(t, map[string]int64{"acme-new": 0, "_other": 3}, requests, "the new name's series begin at 0")
	answer(c, renamed, get(time.Millisecond))
	requests, _, _ = c.Series()
	require.Equal(t, map[string]int64{"acme-new": 1, "_other": 3}, requests)

	c.Learn(1, "acme-again", 3, tenant.Suspended)
	require.Equal(t, "acme-again", only(t, c).Tenant, "the registry says so though no request does")

	c.Begin()
	require.True(t, c.Bind(renamed))
	c.Learn(1, "acme-again", 4, tenant.Dropped)
	_, tenants := c.Loads()
	require.Empty(t, tenants)
	requests, _, _ = c.Series()
	require.Equal(t, []string{"_other"}, keys(requests))
	c.Sweep()
	require.Equal(t, 1, c.Kept(), "its request is still in flight")
	c.End(observe.Answer{Tenant: 1, Status: 200})
	c.Sweep()
	require.Zero(t, c.Kept())
}

// A tenant takes the name that another one had, of whose renaming nobody has heard yet.
func TestNoTwoSeriesHaveOneName(t *testing.T) {
	c, _ := counterWith(5)
	answer(c, named(t, 1, "acme"), get(time.Millisecond))
	answer(c, named(t, 2, "acme"), get(time.Millisecond))
	requests, _, _ := c.Series() // which panics
	require.ElementsMatch(t, []string{"acme", "_other"}, keys(requests))
}

func keys[V any](m map[string]V) (out []string) {
	for k := range m {
		out = append(out, k)
	}
	slices.Sort(out)
	return out
}

// Whoever comes into the top and falls out of it: no series ever goes back, no request is in two of them, none is lost, and
// there are never more than twice as many as are wanted.
func TestSeriesNeverGoBackAndCountEachRequestOnce(t *testing.T) {
	const top = 3
	r := rand.New(rand.NewPCG(1, 2))
	c, k := counterWith(top)
	c.SetLimit(25)
	var done, increased int64
	last := map[string]int64{}
	look := func() {
		requests, rows, _ := c.Series()
		require.LessOrEqual(t, len(requests), 2*top+1)
		require.Contains(t, requests, "_other")
		for name, n := range requests {
			require.Equal(t, n, rows[name])
			before, had := last[name]
			if had {
				require.GreaterOrEqual(t, n, before, "the series of %s went back", name)
			} else if name != "_other" {
				require.Zero(t, n, "the series of %s begins above 0", name)
			}
			increased += n - before
		}
		last = requests
		require.Equal(t, done, increased, "what the series have counted together")
	}
	for round := range 300 {
		// The busy ones change by and by; forty tenants are more than there is room for.
		for range r.IntN(60) {
			i := (round/10 + int(r.ExpFloat64()*4)) % 40
			tn := named(t, int32(i+1), fmt.Sprintf("t-%d", i))
			answer(c, tn, get(time.Millisecond))
			c.Transaction(tn, postgres.Work{Rows: 1})
			done++
		}
		k.pass(time.Duration(r.IntN(60)) * time.Second)
		if round%50 == 49 {
			k.pass(2 * time.Hour)
			c.Sweep()
		}
		look()
	}
	require.Positive(t, last["_other"])
}

func TestNoSeriesOfTenantsAreWanted(t *testing.T) {
	c, _ := counterWith(0)
	answer(c, named(t, 1, "acme"), get(time.Millisecond))
	requests, _, _ := c.Series()
	require.Empty(t, requests)
}

// Many goroutines count, come and go, and are read, at one time.
func TestCountingConcurrently(t *testing.T) {
	c := observe.NewCounter(4)
	c.SetLimit(30)
	var wg sync.WaitGroup
	var tenants []tenant.Tenant
	for i := range int32(50) {
		tenants = append(tenants, named(t, i+1, fmt.Sprintf("t-%d", i)))
	}
	const each = 2000
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 0))
			for range each {
				tn := tenants[r.IntN(len(tenants))]
				answer(c, tn, get(time.Duration(r.IntN(1000))*time.Microsecond))
				c.Transaction(tn, postgres.Work{Took: time.Microsecond, Rows: 1})
			}
		})
	}
	wg.Go(func() {
		for i := range 50 {
			c.Loads()
			c.Series()
			c.Learn(tenants[i].Number, tenants[i].Slug.String(), 1, tenant.Dropped)
			c.Sweep()
		}
	})
	wg.Wait()
	all, loads := c.Loads()
	require.Equal(t, int64(8*each), all.Requests)
	require.Equal(t, int64(8*each), all.Rows)
	require.Zero(t, all.InFlight)
	require.LessOrEqual(t, c.Kept(), 30+8)
	for _, l := range loads {
		require.Zero(t, l.InFlight, l.Tenant)
	}
	requests, _, _ := c.Series()
	var sum int64
	for name, n := range requests {
		require.True(t, name == "_other" || strings.HasPrefix(name, "t-"))
		sum += n
	}
	require.LessOrEqual(t, sum, int64(8*each), "none is counted twice")
}

// BenchmarkRequest is what counting costs each request to a tenant that reads once: no allocation.
func BenchmarkRequest(b *testing.B) {
	c := observe.NewCounter(50)
	tn := named(b, 7, "acme")
	answer(c, tn, get(time.Millisecond))
	b.ReportAllocs()
	for b.Loop() {
		answer(c, tn, get(3*time.Millisecond))
		c.Transaction(tn, postgres.Work{Took: time.Millisecond, Statements: 1, Rows: 1})
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	c := observe.NewCounter(50)
	tn := named(t, 7, "acme")
	answer(c, tn, get(time.Millisecond))
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		answer(c, tn, get(3*time.Millisecond))
		c.Transaction(tn, postgres.Work{Took: time.Millisecond, Statements: 1, Rows: 1})
	}))
}
