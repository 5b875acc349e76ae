package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// userKey makes a user of a tenant with an API key that may do everything.
func userKey(t *testing.T, env *pgtest.Env, extra []string, slug, email string) (id, token string) {
	t.Helper()
	_, stderr, code := oneo(t, env, extra, "user", "add", email, "-t", slug, "--role", "admin", "-o", "json")
	require.Zero(t, code, stderr)
	stdout, stderr, code := oneo(t, env, extra, "key", "add", "-t", slug, "--user", email, "--name", "test", "--scope", "admin", "-o", "json")
	require.Zero(t, code, stderr)
	var key struct{ ID, Token string }
	require.NoError(t, json.Unmarshal([]byte(stdout), &key))
	require.NotEmpty(t, key.Token)
	return key.ID, key.Token
}

func redisServer(t *testing.T) *devstack.Redis {
	t.Helper()
	dir, err := os.MkdirTemp("", "oneo-redis-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r, err := devstack.StartRedis(t.Context(), devstack.RedisOptions{Dir: dir})
	require.NoError(t, err)
	t.Cleanup(func() { _ = r.Stop(context.Background()) })
	return r
}

// D67, F40, F72: what a command changes is seen by every instance long before what they remember runs out; and when
// Redis has died, what was suspended is refused all the same.
func TestInstancesHearOfChanges(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := redisServer(t)
	extra := []string{"ONEO_REDIS_URL=" + redis.URL(), "ONEO_CACHE_TENANT_TTL=30m", "ONEO_CACHE_NEGATIVE_TTL=10s", "ONEO_CACHE_SHARED_TTL=30m"}
	run := func(args ...string) {
		t.Helper()
		_, stderr, code := oneo(t, env, extra, args...)
		require.Zerof(t, code, "%v: %s", args, stderr)
	}
	run("tenant", "create", "acme")
	key, token := userKey(t, env, extra, "acme", "ada@example.com")
	servers := []*served{serve(t, env, extra...), serve(t, env, extra...)}
	both := func(host string, want int, why string) {
		t.Helper()
		for i, s := range servers {
			var got int
			require.Eventuallyf(t, func() bool {
				got, _ = s.do(t, "GET", host, "/api/v1/me", token, "")
				return got == want
			}, pgtest.Patience, 20*time.Millisecond, "instance %d, %s: %s; last answer %d, want %d", i+1, host, why, got, want)
		}
	}
	both("acme.localhost", http.StatusOK, "served")
	both("www.acme.example", http.StatusNotFound, "nobody's")
	run("tenant", "budget", "acme", "--requests", "1")
	both("acme.localhost", http.StatusTooManyRequests, "a budget was set")
	run("tenant", "budget", "acme", "--reset")
	both("acme.localhost", http.StatusOK, "and taken back")
	run("domain", "add", "acme", "www.acme.example")
	both("www.acme.example", http.StatusOK, "added")
	run("tenant", "suspend", "acme")
	both("acme.localhost", http.StatusServiceUnavailable, "suspended")
	run("tenant", "resume", "acme")
	both("acme.localhost", http.StatusOK, "resumed")
	both("www.acme.example", http.StatusOK, "resumed")
	o, err := goredis.ParseURL(redis.URL())
	require.NoError(t, err)
	flush := goredis.NewClient(o)
	defer flush.Close()
	require.NoError(t, flush.FlushAll(t.Context()).Err())
	both("acme.localhost", http.StatusOK, "Redis has forgotten everything")
	run("tenant", "rename", "acme", "globex")
	both("acme.localhost", http.StatusNotFound, "renamed away")
	both("globex.localhost", http.StatusOK, "renamed")
	run("domain", "remove", "globex", "www.acme.example")
	both("www.acme.example", http.StatusNotFound, "removed")
	run("key", "revoke", key, "-t", "globex")
	both("globex.localhost", http.StatusUnauthorized, "revoked")

	require.NoError(t, redis.Stop(t.Context()))
	_, token = userKey(t, env, extra, "globex", "bob@example.com")
	both("globex.localhost", http.StatusOK, "Redis is gone, and only speed with it")
	run("tenant", "suspend", "globex")
	for i, s := range servers {
		status, body := s.do(t, "GET", "globex.localhost", "/api/v1/pipelines", token, "")
		require.Equalf(t, http.StatusServiceUnavailable, status, "instance %d remembers the tenant as active, PostgreSQL knows better: %s", i+1, body)
	}
	env.Invariants(t)
}

// F94: an instance that is asked to end under load answers what it has taken on: every row has its 201, every 201 its
// row.
func TestServeEndsUnderLoad(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	_, token := userKey(t, env, nil, "acme", "ada@example.com")
	s := serve(t, env)
	status, body := s.do(t, "POST", "acme.localhost", "/api/v1/pipelines", token, `{"key":"deals","name":"Deals","fields":[{"key":"n","name":"N","type":"number"}]}`)
	require.Equal(t, http.StatusCreated, status, body)

	var made, other atomic.Int64
	var words sync.Map
	stop := make(chan struct{})
	var writers sync.WaitGroup
	for range 6 {
		writers.Go(func() {
			client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				req, err := http.NewRequest("POST", "http://127.0.0.1:"+s.port+"/api/v1/pipelines/deals/records", strings.NewReader(fmt.Sprintf(`{"data":{"n":%d}}`, n)))
				if err != nil {
					panic(err)
				}
				req.Host = "acme.localhost"
				req.Header.Set("Authorization", "Bearer "+token)
				req.Header.Set("Content-Type", "application/json")
				res, err := client.Do(req)
				if err != nil {
					return // not taken on any more
				}
				text, _ := io.ReadAll(res.Body)
				_ = res.Body.Close()
				if res.StatusCode == http.StatusCreated {
					made.Add(1)
				} else if res.StatusCode != http.StatusServiceUnavailable {
					other.Add(1)
					words.Store(string(text), true)
				}
			}
		})
	}
	require.Eventually(t, func() bool { return made.Load() > 50 }, pgtest.Patience, time.Millisecond)
	require.NoError(t, s.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, s.cmd.Wait(), s.logs)
	close(stop)
	writers.Wait()
	words.Range(func(k, _ any) bool { t.Errorf("an answer under way: %s", k); return true })
	var rows int64
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select count(*) from `+acme.Schema.String()+`.records`).Scan(&rows))
	require.Equal(t, made.Load(), rows)
	require.Zero(t, other.Load())
	env.Invariants(t)
}
