//go:build otel

package app_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// One request is one trace with its statements and Redis commands; all say whose it is, and none what was asked or answered.
func TestARequestIsOneTrace(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	redis := pgtest.Redis(t)
	var mu sync.Mutex
	var spans []*otlp.Span
	var raw strings.Builder
	to := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var got collector.ExportTraceServiceRequest
		if err == nil {
			err = proto.Unmarshal(body, &got)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		mu.Lock()
		defer mu.Unlock()
		raw.WriteString(got.String())
		for _, rs := range got.ResourceSpans {
			for _, ss := range rs.ScopeSpans {
				spans = append(spans, ss.Spans...)
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(to.Close)
	a := open(t, env, redis.URL(), func(c *config.Config) { c.Tracing.Endpoint, c.Tracing.Sample = to.URL, 1 })
	addr := serve(t, a)
	token := session(t, env, acme)
	status, body := ask(t, addr, "GET", "acme.localhost", "/api/v1/me", token, "")
	require.Equal(t, http.StatusOK, status, body)
	status, _ = ask(t, addr, "GET", "acme.localhost", "/api/v1/pipelines?canary=feather", token, "")
	require.Equal(t, http.StatusBadRequest, status)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+addr+"/api/v1/auth/login", strings.NewReader(`{"email":"feather@example.com","password":"feather-of-a-canary"}`))
	require.NoError(t, err)
	req.Host = "acme.localhost"
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, http.StatusUnauthorized, resp.StatusCode)
	status, _ = ask(t, addr, "GET", "acme.localhost", "/api/v1/pipelines/feather/records", token, "")
	require.Equal(t, http.StatusNotFound, status)

	attrs := func(s *otlp.Span) map[string]string {
		m := map[string]string{}
		for _, kv := range s.Attributes {
			m[kv.Key] = fmt.Sprint(kv.Value.GetStringValue(), kv.Value.GetIntValue())
		}
		return m
	}
	find := func(name string) (root *otlp.Span) {
		for _, s := range spans {
			if s.Name == name {
				root = s
			}
		}
		return root
	}
	require.Eventually(t, func() bool {
		mu.Lock()
		defer mu.Unlock()
		return find("GET /api/v1/me") != nil && find("POST /api/v1/auth/login") != nil && find("GET /api/v1/pipelines/:pipeline/records") != nil
	}, pgtest.Patience, 20*time.Millisecond, "no span was sent: %s", &raw)
	mu.Lock()
	defer mu.Unlock()
	root := find("GET /api/v1/me")
	require.Equal(t, otlp.Span_SPAN_KIND_SERVER, root.Kind)
	require.Empty(t, root.ParentSpanId)
	require.Equal(t, "acme0", attrs(root)["oneo.tenant"])
	require.Equal(t, "200", attrs(root)["http.response.status_code"])
	systems := map[string]int{}
	for _, s := range spans {
		if string(s.TraceId) != string(root.TraceId) || s == root {
			continue
		}
		system := attrs(s)["db.system"] + attrs(s)["db.system.name"]
		if of := attrs(s)["oneo.tenant"]; of != "" { // what is done to find out whose it is, is nobody's yet
			require.Equal(t, "acme0", of, s.Name)
			systems[strings.TrimSuffix(system, "0")]++
		}
		require.Empty(t, s.Events)
		require.Empty(t, s.GetStatus().GetMessage())
	}
	require.Positive(t, systems["postgresql"], "%v", systems)
	require.Positive(t, systems["redis"], "%v", systems)
	for _, secret := range []string{"feather", token, "select ", "acme:", "$1", pgtest.Secret} {
		require.NotContains(t, raw.String(), secret)
	}
}

// A collector that is away or hangs costs a request nothing.
func TestACollectorThatHangsIsNotWaitedFor(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	release := make(chan struct{})
	to := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, _ *http.Request) { <-release }))
	t.Cleanup(to.Close)
	t.Cleanup(func() { close(release) })
	token := session(t, env, acme)
	for _, endpoint := range []string{to.URL, "http://127.0.0.1:1"} {
		a := open(t, env, "", func(c *config.Config) { c.Tracing.Endpoint, c.Tracing.Sample = endpoint, 1 })
		addr := serve(t, a)
		for range 6000 { // more spans than are held
			if do(t, addr, "GET", "/livez", token) == 0 {
				t.Fatal("no answer")
			}
		}
	}
}
