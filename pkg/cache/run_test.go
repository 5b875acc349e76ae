package cache_test

import (
	"bytes"
	"context"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/devstack"
)

// keeping starts a Redis that has what it had when it is started again.
func keeping(t *testing.T) (o devstack.RedisOptions, r *devstack.Redis, raw *redis.Client) {
	t.Helper()
	o = devstack.RedisOptions{Dir: t.TempDir(), Keep: true}
	r, err := devstack.StartRedis(t.Context(), o)
	require.NoError(t, err)
	ro, err := redis.ParseURL(r.URL())
	require.NoError(t, err)
	raw = redis.NewClient(ro)
	t.Cleanup(func() { require.NoError(t, raw.Close()) })
	return o, r, raw
}

// What Redis has when it is started is not believed: changes that its former run was told may not be among it.
func TestNothingIsReadThatWasSetBeforeRedisWasStarted(t *testing.T) {
	t.Parallel()
	o, r, raw := keeping(t)
	k, set := key(t, tenantOf(t, 1, "acme"), "k", "x"), key(t, tenantOf(t, 1, "acme"), "k", "set")
	here, there := open(t, r.URL()), open(t, r.URL())
	for _, c := range []*cache.Cache{here, there} {
		require.NoError(t, c.Ping(t.Context()))
	}
	read := time.Now()
	here.Add(t.Context(), k, []byte("old"), read, time.Hour)
	require.NoError(t, here.Set(t.Context(), set, []byte("old"), time.Hour))
	for _, c := range []*cache.Cache{here, there} {
		v, _ := c.Get(t.Context(), k)
		require.Equal(t, "old", string(v))
	}
	require.NoError(t, r.Stop(t.Context()))
	r, err := devstack.StartRedis(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.Background())) })
	require.Len(t, raw.Keys(t.Context(), "acme:1:k:*").Val(), 2, "the test itself: Redis still has them")
	for _, c := range []*cache.Cache{here, there, open(t, r.URL())} {
		for _, k := range []cache.Key{k, set} {
			_, found := c.Get(t.Context(), k)
			require.False(t, found)
		}
	}
	here.Add(t.Context(), k, []byte("read before"), read, time.Hour)
	_, found := here.Get(t.Context(), k)
	require.False(t, found, "a change of what was read before may have been told to the former run")
	here.Add(t.Context(), k, []byte("new"), time.Now(), time.Hour)
	v, _ := there.Get(t.Context(), k)
	require.Equal(t, "new", string(v), "it is a cache again at once")
}

// Of its run Redis is asked once a connection, and not once a read.
func TestAReadIsOneCommand(t *testing.T) {
	t.Parallel()
	_, r, raw := keeping(t)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.Background())) })
	c, k := open(t, r.URL()), key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, c.Set(t.Context(), k, []byte("v"), time.Hour))
	require.NoError(t, raw.ConfigResetStat(t.Context()).Err())
	for range 20 {
		_, found := c.Get(t.Context(), k)
		require.True(t, found)
	}
	stats := raw.InfoMap(t.Context(), "commandstats").Val()["Commandstats"]
	require.Contains(t, stats["cmdstat_get"], "calls=20,")
	require.NotContains(t, stats, "cmdstat_ping")
	require.NotContains(t, stats, "cmdstat_info", "the connection was made before")
}

// A change whose words go to the next run is told there.
func TestAChangeIsToldToTheRedisThatIsThere(t *testing.T) {
	t.Parallel()
	o, r, _ := keeping(t)
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	here := open(t, r.URL())
	require.NoError(t, here.Ping(t.Context()))
	require.NoError(t, r.Stop(t.Context()))
	r, err := devstack.StartRedis(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.Background())) })
	require.NoError(t, here.Set(t.Context(), k, []byte("barred"), time.Hour))
	there := open(t, r.URL())
	v, _ := there.Get(t.Context(), k)
	require.Equal(t, "barred", string(v))
}

// Where Redis does not say when it was started, or not to this user, it is a cache as before.
func TestARedisThatDoesNotSayItsRunIsShared(t *testing.T) {
	t.Parallel()
	_, r, raw := keeping(t)
	t.Cleanup(func() { require.NoError(t, r.Stop(context.Background())) })
	require.NoError(t, raw.Do(t.Context(), "acl", "setuser", "server", "on", ">words", "~*", "&oneo:*", "-@all", "+get", "+set", "+ping", "+hello", "+auth", "+select").Err())
	u, err := url.Parse(r.URL())
	require.NoError(t, err)
	u.User = url.UserPassword("server", "words")
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, open(t, u.String()).Set(t.Context(), k, []byte("v"), time.Hour))
	v, _ := open(t, u.String()).Get(t.Context(), k)
	require.Equal(t, "v", string(v))
	require.Equal(t, []string{k.String()}, raw.Keys(t.Context(), "*").Val())
}

// Two connections are made while Redis is started again; the one to the former run is told of it last.
func TestALateWordOfAFormerRunDoesNotCount(t *testing.T) {
	t.Parallel()
	former, now := server(t, nil), server(t, nil)
	password := func(r *devstack.Redis) string {
		u, err := url.Parse(r.URL())
		require.NoError(t, err)
		p, _ := u.User.Password()
		return p
	}
	same := password(former)
	ro, err := redis.ParseURL(now.URL())
	require.NoError(t, err)
	raw := redis.NewClient(ro)
	defer raw.Close()
	require.NoError(t, raw.ConfigSet(t.Context(), "requirepass", same).Err())

	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	held, release := make(chan struct{}), make(chan struct{})
	var running sync.WaitGroup
	var conns atomic.Int64
	running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			to, late := now, conns.Add(1) == 1
			if late {
				to = former
			}
			up, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", portOf(t, to)))
			if err != nil {
				_ = c.Close()
				continue
			}
			running.Go(func() { pass(up, c, nil); _ = up.Close() })
			running.Go(func() {
				pass(c, up, func(b []byte) {
					if late && bytes.Contains(b, []byte("run_id:")) {
						close(held)
						<-release
					}
				})
				_ = c.Close()
			})
		}
	})
	u, err := url.Parse(former.URL())
	require.NoError(t, err)
	u.Host = l.Addr().String()
	c, err := cache.Open(cache.Options{URL: u.String(), Timeout: 30 * time.Second})
	require.NoError(t, err)
	defer func() {
		require.NoError(t, c.Close())
		require.NoError(t, l.Close())
		running.Wait()
	}()
	first := make(chan error, 1)
	go func() { first <- c.Ping(t.Context()) }()
	<-held
	k := key(t, tenantOf(t, 1, "acme"), "k", "x")
	require.NoError(t, c.Set(t.Context(), k, []byte("v"), time.Hour))
	close(release)
	require.NoError(t, <-first)
	require.NoError(t, former.Kill())
	require.Eventually(t, func() bool { v, found := c.Get(t.Context(), k); return found && string(v) == "v" }, time.Minute, 10*time.Millisecond,
		"the names are the former run's")
}

func portOf(t *testing.T, r *devstack.Redis) string {
	u, err := url.Parse(r.URL())
	require.NoError(t, err)
	return u.Port()
}

// pass carries what one connection sends to another until either ends; look sees it first.
func pass(to, from net.Conn, look func([]byte)) {
	b := make([]byte, 64<<10)
	for {
		n, err := from.Read(b)
		if n > 0 && look != nil {
			look(b[:n])
		}
		if _, werr := to.Write(b[:n]); err != nil || werr != nil {
			return
		}
	}
}
