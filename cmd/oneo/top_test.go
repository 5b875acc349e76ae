package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/registry"
)

func reading(id byte, all observe.Load, tenants ...observe.TenantLoad) observe.Reading {
	return observe.Reading{Stats: observe.Stats{Instance: uuid.UUID{id}, All: all, Tenants: tenants}}
}

func loadOf(number int32, slug string, l observe.Load) observe.TenantLoad {
	return observe.TenantLoad{Number: number, Tenant: slug, Load: l}
}

// A reading is what came on top between two samples, of all servers together.
func TestTopComparesTwoSamples(t *testing.T) {
	t.Parallel()
	at := time.Now()
	before := sample{at, []observe.Reading{
		reading(1, observe.Load{Requests: 100}, loadOf(7, "acme", observe.Load{Requests: 40, DatabaseSeconds: 1, Rows: 10}), loadOf(8, "old-name", observe.Load{Requests: 60})),
		reading(2, observe.Load{Requests: 1000}, loadOf(7, "acme", observe.Load{Requests: 1000, DatabaseSeconds: 50, Rows: 900})),
		reading(3, observe.Load{Requests: 5}),
	}}
	// Its clock was set back meanwhile, which changes nothing: the time between is this process's.
	now := sample{at.Add(2 * time.Second), []observe.Reading{
		reading(1, observe.Load{Requests: 120, Errors: 2, Refused: 4}, loadOf(7, "acme", observe.Load{Requests: 50, Refused: 4, InFlight: 1, DatabaseSeconds: 2, Rows: 30, P95: 12}),
			loadOf(8, "globex", observe.Load{Requests: 70, Errors: 2, DatabaseSeconds: 1, P95: 3}), loadOf(9, "new", observe.Load{Requests: 6})),
		// It has given acme's counts up, and counts anew.
		reading(2, observe.Load{Requests: 1010}, loadOf(7, "acme", observe.Load{Requests: 10, InFlight: 2, DatabaseSeconds: 2, Rows: 20, P95: 40})),
		// It was started anew: what it has counted has no beginning yet.
		reading(4, observe.Load{Requests: 9999}, loadOf(7, "acme", observe.Load{Requests: 9999, InFlight: 3, DatabaseSeconds: 99})),
		{Instance: registry.Instance{Host: "web-3", OpsAddr: "10.0.0.3:8001"}, Err: fault.New(fault.Unavailable, "it does not answer")},
	}}
	r := compare(before, now)
	sortTop(r.rows, "db")
	require.Equal(t, 3, r.answered)
	require.Equal(t, []string{"web-3 (10.0.0.3:8001): it does not answer"}, r.silent)
	require.Equal(t, []float64{15, 1, 2}, []float64{r.requests, r.errors, r.refused})
	require.Equal(t, []topRow{
		{number: 7, tenant: "acme", requests: 10, refused: 2, inFlight: 6, databaseSeconds: 1.5, databaseShare: 75, rows: 20, p95: 40},
		{number: 8, tenant: "globex", requests: 5, errors: 1, databaseSeconds: 0.5, databaseShare: 25, p95: 3},
		{number: 9, tenant: "new", requests: 3},
	}, r.rows)
	for by, first := range map[string]string{"requests": "acme", "errors": "globex", "refused": "acme", "in-flight": "acme", "rows": "acme", "p95": "acme", "tenant": "acme"} {
		sortTop(r.rows, by)
		require.Equal(t, first, r.rows[0].tenant, by)
	}
	require.Empty(t, compare(sample{}, sample{}).rows)
}

func TestTopShowsTheBudgetThatIsUsedMost(t *testing.T) {
	t.Parallel()
	require.Empty(t, topBudget{}.String())
	b := topBudget{Requests: &usage{Used: 5, Limit: 10}, InFlight: &usage{Used: 2, Limit: 2}, Storage: &usage{Used: 99, Limit: 100}}
	require.Equal(t, "in flight 100%", b.String())
	raw, err := json.Marshal(b)
	require.NoError(t, err)
	require.JSONEq(t, `{"requests_per_second":{"used":5,"limit":10},"in_flight":{"used":2,"limit":2},"storage_bytes":{"used":99,"limit":100}}`, string(raw))
}

func TestTopFitsTheScreen(t *testing.T) {
	t.Parallel()
	got := topScreen("one\nzwölf\nthree\n", 4, 2)
	require.Equal(t, "\x1b[Hone\x1b[K\nzwöl\x1b[K\x1b[J", got)
}

// Tenants stand with what they cost the servers that run, and one that does not answer is named.
func TestTop(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	_, stderr, code := oneo(t, env, nil, "top", "--once")
	require.Equal(t, exitUnreachable, code)
	require.Contains(t, stderr, "no server is running")
	env.Tenant(t, "acme")
	env.Tenant(t, "globex")
	env.Tenant(t, "asleep")
	extra := []string{"ONEO_BUDGETS_REQUESTS=1000000"}
	_, stderr, code = oneo(t, env, extra, "tenant", "budget", "globex", "--requests", "1")
	require.Zero(t, code, stderr)
	s := serve(t, env, extra...)
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(t.Context(), `insert into public.instances (id, host, pid, version, ops_addr, heartbeat)
values (gen_random_uuid(), 'gone', 1, 'x', '127.0.0.1:1', now() + interval '1 hour')`)
	require.NoError(t, err)

	ctx, stop := context.WithCancel(t.Context())
	var load sync.WaitGroup
	defer load.Wait()
	defer stop()
	for _, host := range []string{"acme.localhost", "globex.localhost"} {
		load.Go(func() {
			for ctx.Err() == nil {
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+s.port+"/api/v1/settings", nil)
				if err != nil {
					t.Error(err)
					return
				}
				req.Host = host
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					if !errors.Is(err, context.Canceled) {
						t.Error(err)
					}
					return
				}
				_ = resp.Body.Close()
				time.Sleep(5 * time.Millisecond)
			}
		})
	}
	type row struct {
		Tenant   string
		Requests float64 `json:"requests_per_second"`
		Refused  float64 `json:"refused_per_second"`
		Budget   struct {
			Requests struct{ Used, Limit float64 } `json:"requests_per_second"`
			InFlight struct{ Limit float64 }       `json:"in_flight"`
		}
	}
	var rows []row
	require.Eventually(t, func() bool {
		stdout, stderr, code := oneo(t, env, extra, "top", "--interval", "1s", "--sort", "tenant", "-o", "json")
		require.Zero(t, code, stderr)
		require.Contains(t, stderr, "does not answer: ")
		require.Contains(t, stderr, "127.0.0.1:1")
		require.NoError(t, json.Unmarshal([]byte(stdout), &rows), stdout)
		return len(rows) == 2 && rows[0].Requests > 0 && rows[1].Refused > 0
	}, pgtest.Patience, time.Millisecond, "the load is never seen: %v", &rows)
	require.Equal(t, []string{"acme", "globex"}, []string{rows[0].Tenant, rows[1].Tenant}, "who was not served is not there")
	require.Zero(t, rows[0].Refused)
	require.EqualValues(t, 1_000_000, rows[0].Budget.Requests.Limit)
	require.EqualValues(t, 1, rows[1].Budget.Requests.Limit)
	require.Positive(t, rows[1].Budget.InFlight.Limit)

	stdout, stderr, code := oneo(t, env, extra, "top", "-n", "2", "--interval", "200ms", "--sort", "requests")
	require.Zero(t, code, stderr)
	require.Equal(t, 2, strings.Count(stdout, "TENANT"), "without a terminal each reading is a table: %s", stdout)
	require.NotContains(t, stdout, "\x1b")
	require.Equal(t, 2, strings.Count(stderr, "1 server(s), 2 tenant(s)"), stderr)
	stdout, _, code = oneo(t, env, extra, "top", "-n", "2", "--interval", "200ms", "-o", "ndjson")
	require.Zero(t, code)
	require.Equal(t, 4, strings.Count(stdout, "\n"), stdout)

	for _, args := range [][]string{{"--sort", "nothing"}, {"--interval", "1ms"}, {"-n", "-1"}, {"--once", "-n", "2"}, {"-n", "2", "-o", "json"}, {"more"}} {
		_, stderr, code := oneo(t, env, extra, append([]string{"top"}, args...)...)
		require.Equal(t, exitUsage, code, "%v: %s", args, stderr)
	}
	_, stderr, code = oneo(t, env, []string{"ONEO_SERVER_SECRET=" + strings.Repeat("x", 40)}, "top", "--once", "--interval", "200ms")
	require.Equal(t, exitUnreachable, code, stderr)
	require.Contains(t, stderr, "another server.secret")
}
