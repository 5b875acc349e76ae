package app_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// ops asks the operators' listener of the only server.
func ops(t *testing.T, a *app.App, path, token string) (int, string) {
	t.Helper()
	var servers []registry.Instance
	require.Eventually(t, func() bool {
		require.NoError(t, a.DB.InShared(t.Context(), postgres.Read, func(tx *postgres.Tx) (err error) {
			servers, err = registry.Instances(t.Context(), tx, app.InstanceDead)
			return err
		}))
		return len(servers) == 1
	}, pgtest.Patience, pgtest.Patience/1000, "the server enters itself")
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+servers[0].OpsAddr+path, nil)
	require.NoError(t, err)
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(r)
	require.NoError(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(body)
}

// A running server counts what is asked of it, tells it to Prometheus and to whoever has the token, and nothing of what
// strangers have said.
func TestAServerTellsWhatItDoes(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	a := open(t, env, pgtest.Redis(t).URL())
	addr := serve(t, a)
	token := session(t, env, acme)
	status, _ := ask(t, addr, "GET", "acme.localhost", "/api/v1/me", token, "")
	require.Equal(t, http.StatusOK, status)
	for i := range 50 {
		ask(t, addr, "GET", fmt.Sprintf("hostile-host-%d.example.com", i), "/api/v1/me", "", "")
		ask(t, addr, "GET", "acme.localhost", fmt.Sprintf("/hostile-path-%d/hostile@example.com", i), token, "")
		ask(t, addr, fmt.Sprintf("HOSTILE%d", i), "localhost", "/api/v1/me", "", "")
	}
	var metrics string
	require.Eventually(t, func() bool { // a request is counted behind its answer; PostgreSQL is asked beside
		_, metrics = ops(t, a, "/metrics", "")
		return strings.Contains(metrics, "oneo_tenants{") && strings.Contains(metrics, `oneo_http_requests_total{method="_other",route="_unknown",status="405"} 50`)
	}, pgtest.Patience, pgtest.Patience/1000)
	require.Contains(t, metrics, `oneo_http_requests_total{method="GET",route="/api/v1/me",status="200"} 1`)
	require.Contains(t, metrics, `oneo_http_requests_total{method="GET",route="_unknown",status="404"} 100`)
	require.Contains(t, metrics, "oneo_redis_up 1")
	require.Contains(t, metrics, `oneo_tenants{state="active"} 1`)
	for _, never := range []string{"hostile", "HOSTILE", "example.com", "acme.localhost", token, pgtest.Secret} {
		require.NotContains(t, metrics, never)
	}

	status, body := ops(t, a, "/stats", "")
	require.Equal(t, http.StatusUnauthorized, status)
	require.NotContains(t, body, "acme")
	status, body = ops(t, a, "/stats", observe.Token([]byte(pgtest.Secret)))
	require.Equal(t, http.StatusOK, status)
	var st observe.Stats
	require.NoError(t, json.Unmarshal([]byte(body), &st))
	require.Equal(t, int64(151), st.All.Requests)
	require.Len(t, st.Tenants, 1)
	require.Equal(t, acme.Number, st.Tenants[0].Number)
	require.Equal(t, int64(51), st.Tenants[0].Requests)
	require.Positive(t, st.Tenants[0].Transactions)
	require.Positive(t, st.Tenants[0].DatabaseSeconds)
	require.True(t, st.Cache.Redis)

	var servers []registry.Instance
	require.NoError(t, a.DB.InShared(t.Context(), postgres.Read, func(tx *postgres.Tx) (err error) {
		servers, err = registry.Instances(t.Context(), tx, app.InstanceDead)
		return err
	}))
	require.Equal(t, servers[0].ID, st.Instance, "as in public.instances")
}

// Switched off, nothing is counted or told.
func TestCountingCanBeSwitchedOff(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	a := open(t, env, "", func(c *config.Config) { c.Metrics.Enabled = false })
	addr := serve(t, a)
	status, _ := ask(t, addr, "GET", "acme.localhost", "/api/v1/me", session(t, env, acme), "")
	require.Equal(t, http.StatusOK, status)
	for _, path := range []string{"/metrics", "/stats"} {
		status, _ := ops(t, a, path, observe.Token([]byte(pgtest.Secret)))
		require.Equal(t, http.StatusNotFound, status, path)
	}
	require.Nil(t, a.Counter)
}
