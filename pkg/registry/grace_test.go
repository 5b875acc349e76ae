package registry_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

var (
	errAway    = errors.New("the registry is away")
	errRefused = errors.New("the registry refuses the login")
)

// graced is a resolver that remembers nothing by itself, over a registry that can be away.
type graced struct {
	*registry.Resolver
	log    *bytes.Buffer
	asked  atomic.Int32
	answer func() (tenant.Tenant, error)
}

func newGraced(t *testing.T, grace time.Duration, shared registry.HostCache) *graced {
	t.Helper()
	g := &graced{log: &bytes.Buffer{}}
	g.is(acme(1), nil)
	r, err := registry.NewResolver(registry.ResolverOptions{
		Lookup: func(context.Context, tenant.Host) (tenant.Tenant, error) { g.asked.Add(1); return g.answer() },
		Shared: shared, TTL: time.Nanosecond, NegativeTTL: time.Nanosecond, SharedTTL: time.Hour, Timeout: 5 * time.Second, Size: 100,
		Grace: registry.Grace{For: grace, Away: func(err error) bool { return errors.Is(err, errAway) }, Logger: slog.New(slog.NewTextHandler(g.log, nil))},
	})
	require.NoError(t, err)
	g.Resolver = r
	return g
}

func (g *graced) is(t tenant.Tenant, err error) {
	g.answer = func() (tenant.Tenant, error) { return t, err }
}

func (g *graced) epoch(t *testing.T, h tenant.Host) int64 {
	t.Helper()
	got, err := g.Resolve(t.Context(), h)
	require.NoError(t, err)
	return got.Epoch
}

func TestGrace(t *testing.T) {
	t.Parallel()
	g := newGraced(t, time.Hour, nil)
	h := host(t, "acme.localhost")
	require.False(t, g.Stands(), "nothing is known yet")
	require.EqualValues(t, 1, g.epoch(t, h))
	require.True(t, g.Stands())
	g.is(tenant.Tenant{}, errAway)
	asked := g.asked.Load()
	for range 100 {
		require.EqualValues(t, 1, g.epoch(t, h))
	}
	require.Less(t, g.asked.Load()-asked, int32(60), "a registry that is away is not asked by each request: all would wait")
	_, err := g.Resolve(t.Context(), host(t, "globex.localhost"))
	require.ErrorIs(t, err, errAway, "a host of which nothing is known is no unknown one")
	require.Equal(t, 1, strings.Count(g.log.String(), "cannot be asked"), g.log)
	require.NotContains(t, g.log.String(), "answers again")

	g.is(acme(2), nil)
	require.Eventually(t, func() bool { return g.epoch(t, h) == 2 }, 30*time.Second, 10*time.Millisecond, "it is asked again when it is back")
	require.Equal(t, 1, strings.Count(g.log.String(), "answers again"), g.log)
	g.is(acme(3), nil)
	require.Eventually(t, func() bool { return g.epoch(t, h) == 3 }, 30*time.Second, 10*time.Millisecond)
	require.Equal(t, 2, strings.Count(g.log.String(), "\n"), "once at its beginning and once at its end: %s", g.log)
}

// Only a registry that cannot be asked is stood in for, and only by what is not known to have changed.
func TestWhatEndsTheGrace(t *testing.T) {
	t.Parallel()
	h := host(t, "acme.localhost")
	for what, c := range map[string]struct {
		grace time.Duration
		err   error
		end   func(*testing.T, *graced, *memory)
		still bool
	}{
		"nothing":                      {grace: time.Hour, err: errAway, still: true},
		"messages that were missed":    {grace: time.Hour, err: errAway, still: true, end: func(_ *testing.T, g *graced, _ *memory) { g.ForgetAll() }},
		"another host's change":        {grace: time.Hour, err: errAway, still: true, end: func(t *testing.T, g *graced, _ *memory) { g.Forget(host(t, "globex.localhost")) }},
		"its time":                     {grace: time.Nanosecond, err: errAway},
		"it is off":                    {err: errAway},
		"an error of the registry":     {grace: time.Hour, err: errRefused},
		"a message of another process": {grace: time.Hour, err: errAway, end: func(_ *testing.T, g *graced, _ *memory) { g.Forget(h) }},
		"a change of this process":     {grace: time.Hour, err: errAway, end: func(t *testing.T, g *graced, _ *memory) { g.Bar(t.Context(), h) }},
		"a bar of another process": {grace: time.Hour, err: errAway, end: func(t *testing.T, _ *graced, m *memory) {
			newGraced(t, 0, m).Bar(t.Context(), h)
		}},
		"a bar that was seen before the last answer": {grace: time.Hour, err: errAway, still: true, end: func(t *testing.T, g *graced, m *memory) {
			newGraced(t, 0, m).Bar(t.Context(), h)
			g.is(acme(1), nil)
			require.Eventually(t, func() bool { got, err := g.Resolve(t.Context(), h); return err == nil && got.Epoch == 1 }, 30*time.Second, time.Millisecond)
		}},
		"no tenant has it any more": {grace: time.Hour, err: errAway, end: func(t *testing.T, g *graced, _ *memory) {
			g.is(tenant.Tenant{}, fault.New(fault.NotFound, "none"))
			require.Eventually(t, func() bool { _, err := g.Resolve(t.Context(), h); return fault.Is(err, fault.NotFound) }, 30*time.Second, time.Millisecond)
			g.is(tenant.Tenant{}, errAway)
		}},
	} {
		for _, away := range []bool{false, true} { // when it ends: before the registry goes away, or while it is
			shared := &memory{values: map[tenant.Host][]byte{}}
			g := newGraced(t, c.grace, shared)
			require.EqualValues(t, 1, g.epoch(t, h))
			shared.expire(h)
			if away {
				g.is(tenant.Tenant{}, c.err)
				_, _ = g.Resolve(t.Context(), h)
			}
			if c.end != nil {
				c.end(t, g, shared)
			}
			g.is(tenant.Tenant{}, c.err)
			got, err := g.Resolve(t.Context(), h)
			if c.still {
				require.NoErrorf(t, err, "%s, away: %v", what, away)
				require.EqualValues(t, 1, got.Epoch, what)
				continue
			}
			require.ErrorIsf(t, err, c.err, "%s, away: %v", what, away)
			require.Truef(t, got.IsZero(), what)
		}
	}
}

// A change that is heard of while the registry is waited for in vain is a known one.
func TestAChangeDuringALookUpInVain(t *testing.T) {
	t.Parallel()
	g := newGraced(t, time.Hour, nil)
	h := host(t, "acme.localhost")
	require.EqualValues(t, 1, g.epoch(t, h))
	g.answer = func() (tenant.Tenant, error) {
		if g.asked.Load() == 2 {
			g.Forget(h)
		}
		return tenant.Tenant{}, errAway
	}
	_, err := g.Resolve(t.Context(), h)
	require.ErrorIs(t, err, errAway)
}

// An answer from before a change is not kept for the grace either.
func TestAnOvertakenAnswerIsNotKeptForTheGrace(t *testing.T) {
	t.Parallel()
	shared := &memory{values: map[tenant.Host][]byte{}}
	g := newGraced(t, time.Hour, shared)
	h := host(t, "acme.localhost")
	g.answer = func() (tenant.Tenant, error) {
		if g.asked.Load() > 1 {
			return tenant.Tenant{}, errAway
		}
		g.Forget(h)
		return acme(1), nil
	}
	_, _ = g.Resolve(t.Context(), h)
	_, err := g.Resolve(t.Context(), h)
	require.ErrorIs(t, err, errAway)
}
