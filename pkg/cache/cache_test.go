package cache_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) {
	// What go-redis and devstack start ends with what the tests close.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/exec.(*Cmd).Wait"))
}

func server(t *testing.T, conf map[string]string) *devstack.Redis {
	t.Helper()
	r, err := devstack.StartRedis(t.Context(), devstack.RedisOptions{Dir: t.TempDir(), Conf: conf})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.Background())) })
	return r
}

// open is patient: a busy machine must not look like a Redis that is away.
func open(t *testing.T, url string) *cache.Cache {
	t.Helper()
	return openWithin(t, url, 20*time.Second)
}

func openWithin(t *testing.T, url string, timeout time.Duration) *cache.Cache {
	t.Helper()
	c, err := cache.Open(cache.Options{URL: url, Timeout: timeout})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func tenantOf(t *testing.T, number int32, slug string) tenant.Tenant {
	t.Helper()
	s, err := tenant.ParseSlug(slug)
	require.NoError(t, err)
	return tenant.Tenant{Number: number, Slug: s, Schema: s.Schema(), CacheGeneration: 1}
}

func key(t *testing.T, of tenant.Tenant, kind, id string) cache.Key {
	t.Helper()
	k, err := cache.TenantKey(of, kind, id)
	require.NoError(t, err)
	return k
}

func TestTheSameKeyOfTwoTenantsIsTwoValues(t *testing.T) {
	t.Parallel()
	c := open(t, server(t, nil).URL())
	a, b := tenantOf(t, 1, "acme"), tenantOf(t, 2, "beta")
	require.NoError(t, c.Set(t.Context(), key(t, a, "k", "x"), []byte("A"), time.Minute))
	_, found := c.Get(t.Context(), key(t, b, "k", "x"))
	require.False(t, found)
	require.NoError(t, c.Set(t.Context(), key(t, b, "k", "x"), []byte("B"), time.Minute))
	v, found := c.Get(t.Context(), key(t, a, "k", "x"))
	require.True(t, found)
	require.Equal(t, "A", string(v))
	require.Equal(t, "acme:1:k:x", key(t, a, "k", "x").String())

	a.CacheGeneration++
	_, found = c.Get(t.Context(), key(t, a, "k", "x"))
	require.False(t, found, "a raised generation flushes the tenant")
	_, found = c.Get(t.Context(), key(t, b, "k", "x"))
	require.True(t, found, "and nobody else")

	c.Add(t.Context(), key(t, b, "k", "x"), []byte("other"), time.Now(), time.Minute)
	v, _ = c.Get(t.Context(), key(t, b, "k", "x"))
	require.Equal(t, "B", string(v), "Add keeps what is there")
}

func TestEveryKeyHasATimeToLive(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	c := open(t, s.URL())
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, c.Set(t.Context(), k, []byte("v"), 365*24*time.Hour))
	o, err := redis.ParseURL(s.URL())
	require.NoError(t, err)
	raw := redis.NewClient(o)
	defer raw.Close()
	names := raw.Keys(t.Context(), k.String()+":*").Val()
	require.Len(t, names, 1)
	require.Positive(t, raw.TTL(t.Context(), names[0]).Val())
	require.LessOrEqual(t, raw.TTL(t.Context(), names[0]).Val(), cache.MaxTTL)
}

func TestAPartThatCouldBeMistakenIsRefused(t *testing.T) {
	t.Parallel()
	a := tenantOf(t, 1, "acme")
	for _, part := range []string{"", "a:b", "{a}", "a*", "a?", "a[b", `a\b`, "a b", "a\nb", "a\x00", "é", strings.Repeat("x", 201)} {
		_, err := cache.TenantKey(a, "k", part)
		require.Errorf(t, err, "id %q", part)
		_, err = cache.TenantKey(a, part, "x")
		require.Errorf(t, err, "kind %q", part)
		_, err = cache.PublicKey("k", part)
		require.Errorf(t, err, "public id %q", part)
	}
	_, err := cache.TenantKey(tenant.Tenant{}, "k", "x")
	require.Error(t, err, "no tenant")
}

func FuzzKeysOfTwoTenantsNeverMeet(f *testing.F) {
	f.Add("k", "x", "k", "x")
	f.Fuzz(func(t *testing.T, kind1, id1, kind2, id2 string) {
		a, b := tenantOf(t, 1, "acme"), tenantOf(t, 2, "acme-1")
		k1, err1 := cache.TenantKey(a, kind1, id1)
		k2, err2 := cache.TenantKey(b, kind2, id2)
		p, err3 := cache.PublicKey(kind2, id2)
		if err1 == nil && err2 == nil {
			require.NotEqual(t, k1.String(), k2.String())
		}
		if err1 == nil && err3 == nil {
			require.NotEqual(t, k1.String(), p.String())
		}
	})
}

func TestADeadRedisIsACacheThatHoldsNothing(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	c := open(t, s.URL())
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, c.Set(t.Context(), k, []byte("v"), time.Minute))
	require.NoError(t, c.Ping(t.Context()))
	require.NoError(t, s.Kill())
	for range 1000 { // most of them must not even dial
		_, found := c.Get(t.Context(), k)
		require.False(t, found)
	}
	require.Equal(t, "open", c.Stats().Breaker)
	require.Error(t, c.Ping(t.Context()))
	require.NotContains(t, fmt.Sprint(c.Ping(t.Context())), "password")
	d := c.Allow(t.Context(), k, cache.Limit{Count: 2, Per: time.Hour})
	require.True(t, d.Allowed, "limits go on in the process")
}

func TestAHangingRedisCostsAFewTimeouts(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	c := openWithin(t, s.URL(), 150*time.Millisecond)
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, open(t, s.URL()).Set(t.Context(), k, []byte("v"), time.Hour))
	require.NoError(t, s.Pause())
	start := time.Now()
	for range 1000 {
		_, found := c.Get(t.Context(), k)
		require.False(t, found)
	}
	require.Less(t, time.Since(start), 100*time.Second, "1,000 timeouts would take 150 s")
	require.NoError(t, s.Continue())
	require.Eventually(t, func() bool { _, found := c.Get(t.Context(), k); return found }, time.Minute, 20*time.Millisecond,
		"it must be used again when it is back")
}

// A change that did not reach Redis: what stands there is old, and must not be believed by the process that knows.
func TestAChangeThatRedisDidNotTakeIsHeldAndTold(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	a, b := open(t, s.URL()), open(t, s.URL())
	k, other := key(t, tenantOf(t, 1, "acme"), "k", "x"), key(t, tenantOf(t, 2, "beta"), "k", "x")
	require.NoError(t, a.Set(t.Context(), k, []byte("old"), time.Minute))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	require.Error(t, a.Set(gone, k, []byte("new"), time.Minute), "whoever sets a value must learn that Redis has not got it")
	require.Equal(t, 1, a.Stats().Held)
	v, _ := b.Get(t.Context(), k)
	require.Equal(t, "old", string(v), "the test is of no use: the change must not have reached Redis")
	v, _ = a.Get(gone, k)
	require.Equal(t, "new", string(v), "while Redis cannot be told")
	a.Add(t.Context(), k, []byte("read before"), time.Now(), time.Minute)
	_, found := a.Get(t.Context(), other)
	require.False(t, found)
	require.Zero(t, a.Stats().Held, "the next request, whatever it asks for, tells Redis")
	for _, c := range []*cache.Cache{a, b} {
		v, _ = c.Get(t.Context(), k)
		require.Equal(t, "new", string(v))
	}

	require.Error(t, a.Set(gone, k, []byte("newer"), time.Minute))
	require.NoError(t, a.Set(t.Context(), k, []byte("newest"), time.Minute))
	require.Zero(t, a.Stats().Held, "what another change has replaced is not told any more")
	v, _ = a.Get(t.Context(), k)
	require.Equal(t, "newest", string(v))
}

// A command has no later request at which Redis could be told.
func TestWhatIsHeldIsToldAtTheEnd(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	var log strings.Builder
	o := cache.Options{URL: s.URL(), Timeout: 20 * time.Second, Logger: slog.New(slog.NewTextHandler(&log, nil))}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	a := tenantOf(t, 1, "acme")
	c, err := cache.Open(o)
	require.NoError(t, err)
	require.Error(t, c.Set(gone, key(t, a, "k", "x"), []byte("new"), time.Minute))
	require.Error(t, c.Set(gone, key(t, a, "k", "y"), []byte("new"), time.Minute))
	require.NoError(t, c.Close())
	require.Empty(t, log.String())
	for _, id := range []string{"x", "y"} {
		v, _ := open(t, s.URL()).Get(t.Context(), key(t, a, "k", id))
		require.Equal(t, "new", string(v))
	}
	c, err = cache.Open(o)
	require.NoError(t, err)
	require.Error(t, c.Set(gone, key(t, a, "k", "x"), []byte("newer"), time.Minute))
	require.NoError(t, s.Kill())
	require.NoError(t, c.Close())
	require.Contains(t, log.String(), "Redis has not taken changes")
}

// More changes than may be held: then nothing is read, rather than what may be old.
func TestMoreChangesThanCanBeHeldMakeTheCacheBlind(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	c := open(t, s.URL())
	a := tenantOf(t, 1, "acme")
	last := key(t, a, "k", "last")
	require.NoError(t, c.Set(t.Context(), last, []byte("old"), time.Hour))
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 10_000 {
		require.Error(t, c.Set(gone, key(t, a, "k", fmt.Sprint(i)), []byte("new"), time.Hour))
	}
	require.Error(t, c.Set(gone, last, []byte("new"), time.Hour))
	require.Equal(t, 10_000, c.Stats().Held)
	_, found := c.Get(t.Context(), last)
	require.False(t, found, "the old value must not be read")
	v, _ := open(t, s.URL()).Get(t.Context(), last)
	require.Equal(t, "old", string(v), "which is still there")
}

func TestAFullRedisForgets(t *testing.T) {
	t.Parallel()
	c := open(t, server(t, map[string]string{"maxmemory": "2mb", "maxmemory-policy": "allkeys-lru"}).URL())
	a := tenantOf(t, 1, "acme")
	for i := range 400 {
		require.NoError(t, c.Set(t.Context(), key(t, a, "k", fmt.Sprint(i)), make([]byte, 10_000), time.Minute))
	}
	// Which are evicted is Redis's choice, by samples: that some are, and that the rest is served, is what counts.
	held := 0
	for i := range 400 {
		if _, found := c.Get(t.Context(), key(t, a, "k", fmt.Sprint(i))); found {
			held++
		}
	}
	require.Positive(t, held)
	require.Less(t, held, 400)
}

func TestMessagesReachTheOthersAndOurselves(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	a, b := open(t, s.URL()), open(t, s.URL())
	var atA, atB, stale atomic.Int64
	a.OnMessage(func(m cache.Message) { atA.Add(1) })
	b.OnMessage(func(m cache.Message) {
		if m.Kind == "host" && m.Value == "acme.localhost" {
			atB.Add(1)
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { b.Listen(ctx, func() { stale.Add(1) }); close(done) }()
	require.Eventually(t, func() bool {
		a.Publish(ctx, cache.Message{Kind: "host", Value: "acme.localhost"})
		return atB.Load() > 0
	}, time.Minute, 20*time.Millisecond)
	require.Positive(t, atA.Load(), "the sender hears itself at once")

	o, err := redis.ParseURL(s.URL())
	require.NoError(t, err)
	raw := redis.NewClient(o)
	defer raw.Close()
	require.NoError(t, raw.ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	require.Eventually(t, func() bool { return stale.Load() > 0 }, time.Minute, 20*time.Millisecond,
		"a lost connection means that messages may have been missed")
	cancel()
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("Listen did not end with its context")
	}
}

func TestWithoutRedisMessagesReachOurselves(t *testing.T) {
	t.Parallel()
	c := open(t, "")
	got := 0
	c.OnMessage(func(cache.Message) { got++ })
	c.Publish(t.Context(), cache.Message{Kind: "host", Value: "x"})
	require.Equal(t, 1, got)
	_, found := c.Get(t.Context(), key(t, tenantOf(t, 1, "acme"), "k", "x"))
	require.False(t, found)
	require.NoError(t, c.Ping(t.Context()))
}

func TestLimitsAreSharedByProcesses(t *testing.T) {
	t.Parallel()
	s := server(t, nil)
	a, b := open(t, s.URL()), open(t, s.URL())
	k, err := cache.PublicKey("rate", "login")
	require.NoError(t, err)
	allowed := 0
	for range 5 {
		for _, c := range []*cache.Cache{a, b} {
			if d := c.Allow(t.Context(), k, cache.Limit{Count: 3, Per: time.Hour}); d.Allowed {
				allowed++
			} else {
				require.Positive(t, d.RetryAfter)
			}
		}
	}
	require.Equal(t, 3, allowed)
}

// Erasing takes away all generations of one tenant, and nothing of a tenant whose name begins like its own.
func TestErase(t *testing.T) {
	t.Parallel()
	c := open(t, server(t, nil).URL())
	a, b := tenantOf(t, 1, "acme"), tenantOf(t, 2, "acme-2")
	later := a
	later.CacheGeneration++
	for i := range 2500 {
		require.NoError(t, c.Set(t.Context(), key(t, a, "k", fmt.Sprint(i)), []byte("A"), time.Minute))
	}
	require.NoError(t, c.Set(t.Context(), key(t, later, "k", "x"), []byte("A"), time.Minute))
	require.NoError(t, c.Set(t.Context(), key(t, b, "k", "x"), []byte("B"), time.Minute))
	public, err := cache.PublicKey("host", "acme.localhost")
	require.NoError(t, err)
	require.NoError(t, c.Set(t.Context(), public, []byte("P"), time.Minute))
	n, err := c.Erase(t.Context(), a)
	require.NoError(t, err)
	require.Equal(t, 2501, n)
	for _, k := range []cache.Key{key(t, a, "k", "0"), key(t, later, "k", "x")} {
		_, found := c.Get(t.Context(), k)
		require.False(t, found, k)
	}
	for _, k := range []cache.Key{key(t, b, "k", "x"), public} {
		_, found := c.Get(t.Context(), k)
		require.True(t, found, k)
	}
	n, err = c.Erase(t.Context(), a)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = c.Erase(t.Context(), tenant.Tenant{})
	require.Error(t, err)
	away := openWithin(t, "redis://127.0.0.1:1", time.Second)
	_, err = away.Erase(t.Context(), a)
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	none, err := openWithin(t, "", time.Second).Erase(t.Context(), a)
	require.NoError(t, err)
	require.Zero(t, none)
}
