package main

import (
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	goredis "github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// canaried is a tenant whose every row carries its canary.
type canaried struct {
	slug, canary, token string
	records             []string
}

// Security 2, F77: requests of three tenants, interleaved over two instances, few connections and one Redis. No answer,
// header, value in Redis or line of a log holds what is another tenant's; no tenant's token and no tenant's id is good at
// another.
func TestNoForeignCanaryOverHTTP(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := redisServer(t)
	extra := []string{"ONEO_REDIS_URL=" + redis.URL(), "ONEO_DATABASE_MAX_CONNS=4", "ONEO_TENANCY_IN_FLIGHT=2", "ONEO_DATABASE_ACQUIRE_TIMEOUT=20s", "ONEO_CACHE_LOCAL_TTL=20ms", "ONEO_CACHE_TENANT_TTL=20ms", "ONEO_LOG_LEVEL=info"}
	var all []*canaried
	for i := range 3 {
		c := &canaried{slug: fmt.Sprintf("canary-%d", i), canary: fmt.Sprintf("feather%dof%d", i, time.Now().UnixNano())}
		_, stderr, code := oneo(t, env, extra, "tenant", "create", c.slug, "--name", c.canary)
		require.Zero(t, code, stderr)
		_, c.token = userKey(t, env, extra, c.slug, c.canary+"@example.com")
		all = append(all, c)
	}
	servers := []*served{serve(t, env, extra...), serve(t, env, extra...)}
	for _, c := range all {
		status, body := servers[0].do(t, "POST", c.slug+".localhost", "/api/v1/pipelines", c.token, `{"key":"deals","name":"`+c.canary+`","fields":[{"key":"note","name":"Note","type":"text"}]}`)
		require.Equal(t, http.StatusCreated, status, body)
		for range 5 {
			status, body := servers[0].do(t, "POST", c.slug+".localhost", "/api/v1/pipelines/deals/records", c.token, `{"data":{"note":"`+c.canary+`"}}`)
			require.Equal(t, http.StatusCreated, status, body)
			var made struct{ ID string }
			require.NoError(t, json.Unmarshal([]byte(body), &made))
			c.records = append(c.records, made.ID)
		}
	}
	foreign := func(c *canaried, text string) string {
		for _, other := range all {
			if other != c && strings.Contains(text, other.canary) {
				return other.slug
			}
		}
		return ""
	}
	const workers, requests = 8, 400
	var wg sync.WaitGroup
	for w := range workers {
		r := rand.New(rand.NewPCG(uint64(w), 1))
		wg.Go(func() {
			client := &http.Client{Transport: &http.Transport{}}
			defer client.CloseIdleConnections()
			for range requests {
				c, other := all[r.IntN(len(all))], all[r.IntN(len(all))]
				method, path, body, token, want := "GET", "/api/v1/me", "", c.token, http.StatusOK
				switch r.IntN(8) {
				case 0:
					path = "/api/v1/pipelines/deals/records/" + c.records[r.IntN(len(c.records))]
				case 1:
					path = "/api/v1/pipelines/deals/records?limit=3&count=exact"
				case 2:
					path = `/api/v1/pipelines/deals/records?filter=note%20=%20%22` + other.canary + `%22`
				case 3:
					method, path, want = "POST", "/api/v1/pipelines/deals/records", http.StatusCreated
					body = `{"data":{"note":"` + c.canary + `"}}`
				case 4:
					path = "/api/v1/pipelines"
				case 5:
					if other != c {
						token, want = other.token, http.StatusUnauthorized
					}
				case 6:
					if other != c {
						path, want = "/api/v1/pipelines/deals/records/"+other.records[0], http.StatusNotFound
					}
				}
				req, err := http.NewRequest(method, "http://127.0.0.1:"+servers[r.IntN(2)].port+path, strings.NewReader(body))
				if err != nil {
					panic(err)
				}
				req.Host = c.slug + ".localhost"
				req.Header.Set("Authorization", "Bearer "+token)
				req.Header.Set("X-Tenant-Id", other.slug)
				if body != "" {
					req.Header.Set("Content-Type", "application/json")
				}
				res, err := client.Do(req)
				if err != nil {
					t.Errorf("%s %s: %v", method, path, err)
					return
				}
				text, _ := io.ReadAll(res.Body)
				_ = res.Body.Close()
				if res.StatusCode != want {
					t.Errorf("%s: %s %s: %d, want %d: %s", c.slug, method, path, res.StatusCode, want, text)
				}
				if f := foreign(c, fmt.Sprint(string(text), res.Header)); f != "" && !strings.Contains(path, "filter=") {
					t.Errorf("%s: %s %s answers with what is %s's: %s %v", c.slug, method, path, f, text, res.Header)
				} else if strings.Contains(path, "filter=") && other != c && strings.Contains(string(text), `"note"`) {
					t.Errorf("%s: a filter found %s's record: %s", c.slug, other.slug, text)
				}
			}
		})
	}
	wg.Wait()

	o, err := goredis.ParseURL(redis.URL())
	require.NoError(t, err)
	rc := goredis.NewClient(o)
	defer rc.Close()
	keys, err := rc.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	require.NotEmpty(t, keys)
	for _, key := range keys {
		value, err := rc.Get(t.Context(), key).Result()
		if err != nil {
			continue // it has run out meanwhile, or is a counter of another kind
		}
		for _, c := range all {
			mine := strings.ReplaceAll(c.slug, "-", "_")
			if strings.Contains(value, c.canary) && !strings.HasPrefix(key, mine+":") && !strings.HasPrefix(key, "public:") {
				t.Errorf("the key %s holds what is %s's: %s", key, c.slug, value)
			}
			if strings.HasPrefix(key, mine+":") && foreign(c, value) != "" {
				t.Errorf("%s's key %s holds what is another's: %s", c.slug, key, value)
			}
		}
	}
	for _, s := range servers {
		for _, line := range strings.Split(s.logs.String(), "\n") {
			for _, c := range all {
				if strings.Contains(line, "tenant="+c.slug+" ") && foreign(c, line) != "" {
					t.Errorf("a line of %s's log holds what is another's: %s", c.slug, line)
				}
				if strings.Contains(line, c.token) {
					t.Errorf("a token stands in the log: %s", line)
				}
			}
		}
	}
	env.Invariants(t)
}
