package registry_test

import (
	"context"
	"encoding/json"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func acme(epoch int64) tenant.Tenant {
	s := mustSlug("acme")
	return tenant.Tenant{Number: 1, ID: "x", Slug: s, Schema: s.Schema(), Group: "main", State: tenant.Active, Epoch: epoch}
}

func resolver(t *testing.T, shared registry.HostCache, lookup func(context.Context, tenant.Host) (tenant.Tenant, error)) *registry.Resolver {
	t.Helper()
	r, err := registry.NewResolver(registry.ResolverOptions{
		Lookup: lookup, Shared: shared, TTL: time.Hour, NegativeTTL: 50 * time.Millisecond, SharedTTL: time.Hour, Timeout: 5 * time.Second, Size: 100,
	})
	require.NoError(t, err)
	return r
}

func TestResolverAsksOnce(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	begun, end := make(chan struct{}, 1), make(chan struct{})
	r := resolver(t, nil, func(context.Context, tenant.Host) (tenant.Tenant, error) {
		asked.Add(1)
		begun <- struct{}{}
		<-end
		return acme(1), nil
	})
	var wg sync.WaitGroup
	h := host(t, "acme.localhost")
	ctx, cancel := context.WithCancel(t.Context())
	for i := range 30 {
		wg.Go(func() {
			c := t.Context()
			if i == 0 {
				c = ctx
			}
			if _, err := r.Resolve(c, h); err != nil && i != 0 {
				t.Errorf("%v", err)
			}
		})
	}
	<-begun
	cancel() // one that goes away does not take the others' answer with it
	close(end)
	wg.Wait()
	got, err := r.Resolve(t.Context(), h)
	require.NoError(t, err)
	require.Equal(t, "acme", got.Slug.String())
	require.EqualValues(t, 1, asked.Load(), "callers at the same time cause one look-up, and the answer is kept")
}

func TestResolverForgetsUnknownHostsSoon(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	var known atomic.Bool
	r := resolver(t, nil, func(context.Context, tenant.Host) (tenant.Tenant, error) {
		asked.Add(1)
		if !known.Load() {
			return tenant.Tenant{}, fault.New(fault.NotFound, "none")
		}
		return acme(1), nil
	})
	h := host(t, "acme.localhost")
	_, err := r.Resolve(t.Context(), h)
	requireFault(t, err, fault.NotFound, "unknown_host")
	known.Store(true)
	deadline := time.Now().Add(time.Minute)
	for err != nil {
		require.True(t, time.Now().Before(deadline), "a negative answer lives for NegativeTTL only")
		_, err = r.Resolve(t.Context(), h)
	}
	require.EqualValues(t, 2, asked.Load(), "and it does live so long")
}

// A Forget that lands in the middle of a look-up is not lost: the old answer is given to those who wait, and not kept.
func TestResolverForgetDuringLookup(t *testing.T) {
	t.Parallel()
	var epoch atomic.Int64
	epoch.Store(1)
	begun, end := make(chan struct{}, 9), make(chan struct{})
	shared := &memory{values: map[tenant.Host][]byte{}}
	r := resolver(t, shared, func(context.Context, tenant.Host) (tenant.Tenant, error) {
		was := epoch.Load()
		begun <- struct{}{}
		<-end
		return acme(was), nil
	})
	h := host(t, "acme.localhost")
	done := make(chan struct{})
	go func() { defer close(done); _, _ = r.Resolve(context.Background(), h) }()
	<-begun
	epoch.Store(2)
	r.Forget(h)
	close(end)
	<-done
	got, err := r.Resolve(t.Context(), h)
	require.NoError(t, err)
	require.EqualValues(t, 2, got.Epoch, "an answer from before the Forget must not be kept, neither here nor in the shared cache")
}

// Another process's look-up that began before a change must not put its answer where everybody reads it.
func TestALookUpThatIsOvertakenByAChangeElsewhereIsNotShared(t *testing.T) {
	t.Parallel()
	var epoch atomic.Int64
	epoch.Store(1)
	now := func(context.Context, tenant.Host) (tenant.Tenant, error) { return acme(epoch.Load()), nil }
	begun, end := make(chan struct{}), make(chan struct{})
	shared := &memory{values: map[tenant.Host][]byte{}}
	here, third := resolver(t, shared, now), resolver(t, shared, now)
	slow := resolver(t, shared, func(context.Context, tenant.Host) (tenant.Tenant, error) {
		was := epoch.Load()
		close(begun)
		<-end
		return acme(was), nil
	})
	h := host(t, "acme.localhost")
	done := make(chan struct{})
	go func() { defer close(done); _, _ = slow.Resolve(context.Background(), h) }()
	<-begun
	epoch.Store(2)
	here.Bar(t.Context(), h)
	close(end)
	<-done
	for name, r := range map[string]*registry.Resolver{"whoever changed it": here, "a third": third} {
		got, err := r.Resolve(t.Context(), h)
		require.NoError(t, err)
		require.EqualValues(t, 2, got.Epoch, "%s reads the answer from before the change", name)
	}
}

// A cache that comes back from a snapshot, or a value that a change could not reach, lives no longer than its time.
func TestASharedAnswerEndsByItsOwnTime(t *testing.T) {
	t.Parallel()
	shared := &memory{values: map[tenant.Host][]byte{}}
	epoch := int64(1)
	lookup := func(context.Context, tenant.Host) (tenant.Tenant, error) { return acme(epoch), nil }
	h := host(t, "acme.localhost")
	_, err := resolver(t, shared, lookup).Resolve(t.Context(), h)
	require.NoError(t, err)
	raw, found := shared.Get(t.Context(), h)
	require.True(t, found)
	epoch = 2
	for moved, want := range map[time.Duration]int64{0: 1, -59 * time.Minute: 1, -61 * time.Minute: 2, 61 * time.Minute: 2} {
		var value map[string]any
		require.NoError(t, json.Unmarshal(raw, &value))
		at, ok := value["At"].(float64)
		require.True(t, ok, "%s", raw)
		value["At"] = int64(at) + moved.Milliseconds()
		aged, err := json.Marshal(value)
		require.NoError(t, err)
		shared.Set(t.Context(), h, aged, 0)
		got, err := resolver(t, shared, lookup).Resolve(t.Context(), h)
		require.NoError(t, err)
		require.Equal(t, want, got.Epoch, "a value of %v from now", moved)
	}
}

func TestResolverIgnoresGarbageAndErrors(t *testing.T) {
	t.Parallel()
	var asked atomic.Int32
	fail := atomic.Bool{}
	fail.Store(true)
	h := host(t, "acme.localhost")
	shared := &memory{values: map[tenant.Host][]byte{h: []byte(`{"Number": 7, "Slug": "x'; drop", "Schema": "pg_catalog"}`)}}
	r := resolver(t, shared, func(context.Context, tenant.Host) (tenant.Tenant, error) {
		asked.Add(1)
		if fail.Load() {
			return tenant.Tenant{}, errors.New("database is away")
		}
		return acme(1), nil
	})
	_, err := r.Resolve(t.Context(), h)
	require.ErrorContains(t, err, "database is away")
	require.False(t, fault.Is(err, fault.NotFound), "a database that is away is no unknown host")
	fail.Store(false)
	got, err := r.Resolve(t.Context(), h)
	require.NoError(t, err, "an error is not remembered")
	require.EqualValues(t, 1, got.Number)
	shared.expire(h)
	r.Forget(h)
	_, err = r.Resolve(t.Context(), h)
	require.NoError(t, err)
	r.Forget(h)
	before := asked.Load()
	_, err = r.Resolve(t.Context(), h)
	require.NoError(t, err)
	require.Equal(t, before, asked.Load(), "the answer was put into the shared cache")
	for _, bad := range []string{``, `null`, `{}`, `[]`, `{"Number": 0}`, "\x00"} {
		shared.Set(t.Context(), h, []byte(bad), 0)
		r.ForgetAll()
		got, err := r.Resolve(t.Context(), h)
		require.NoErrorf(t, err, "shared value %q", bad)
		require.EqualValuesf(t, 1, got.Number, "shared value %q", bad)
	}
}

type memory struct {
	mu     sync.Mutex
	values map[tenant.Host][]byte
}

func (m *memory) Get(_ context.Context, h tenant.Host) ([]byte, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.values[h]
	return v, ok
}

func (m *memory) Add(_ context.Context, h tenant.Host, v []byte, _ time.Time, _ time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, there := m.values[h]; !there {
		m.values[h] = v
	}
}

func (m *memory) Set(_ context.Context, h tenant.Host, v []byte, _ time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.values[h] = v
}

// expire is the end of a value's time to live.
func (m *memory) expire(h tenant.Host) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.values, h)
}
