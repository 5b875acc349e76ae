//go:build otel

package trace_test

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/trace"
)

// What a statement, its arguments and its failure hold does not leave the process.
func TestATraceHoldsNoValues(t *testing.T) {
	var mu sync.Mutex
	var sent strings.Builder
	to := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		_, _ = io.Copy(&sent, r.Body)
	}))
	t.Cleanup(to.Close)
	tr, err := trace.Open(trace.Options{Endpoint: to.URL, Sample: 1, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	about := &tenant.About{Request: "request-1"}
	ctx, end := tr.Request(tenant.WithAbout(t.Context(), about), "GET")
	slug, err := tenant.ParseSlug("acme")
	require.NoError(t, err)
	about.For(slug)
	q := tr.Postgres()
	of := q.TraceQueryStart(ctx, nil, pgx.TraceQueryStartData{SQL: "select 'feather'", Args: []any{"feather"}})
	q.TraceQueryEnd(of, nil, pgx.TraceQueryEndData{Err: errors.New("the value feather is bad")})
	end("/api/v1/me", 500)
	require.NoError(t, tr.Close())
	mu.Lock()
	defer mu.Unlock()
	require.Contains(t, sent.String(), "GET /api/v1/me")
	require.Contains(t, sent.String(), "select")
	require.Contains(t, sent.String(), "acme")
	require.Contains(t, sent.String(), "request-1")
	require.NotContains(t, sent.String(), "feather")
}
