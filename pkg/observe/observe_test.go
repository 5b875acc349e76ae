package observe_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// stage is a server's observer on an installation.
type stage struct {
	env     *pgtest.Env
	admin   *pgx.Conn
	counter *observe.Counter
	options observe.Options
	o       *observe.Observer
}

func newStage(t *testing.T, change ...func(*observe.Options)) *stage {
	t.Helper()
	s := &stage{counter: observe.NewCounter(3)}
	s.env = pgtest.New(t, func(o *postgres.Options) { o.Counter = s.counter })
	s.admin = pgtest.Admin(t, s.env.AdminURL)
	s.options = observe.Options{
		Instance: uuid.New(), Version: "v1", Counter: s.counter, DB: s.env.DB, Cache: openCache(t, ""), Head: 2, MigrateKind: "run.migrate",
		BackupKind: "run.backup", Within: pgtest.Patience, Logger: slog.New(slog.DiscardHandler),
		Physical: func(context.Context) ([]observe.Physical, error) {
			failing := true
			return []observe.Physical{{Cluster: "main", Newest: time.Unix(1_700_000_000, 0), Archived: time.Unix(1_700_000_500, 0), Failing: &failing}, {Cluster: "new"}}, nil
		},
	}
	for _, f := range change {
		f(&s.options)
	}
	s.o = observe.New(s.options)
	return s
}

func openCache(t *testing.T, url string) *cache.Cache {
	t.Helper()
	c, err := cache.Open(cache.Options{URL: url, Timeout: 10 * time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, c.Close()) })
	return c
}

func (s *stage) exec(t *testing.T, sql string, args ...any) {
	t.Helper()
	_, err := s.admin.Exec(t.Context(), sql, args...)
	require.NoError(t, err)
}

func (s *stage) ask(t *testing.T) {
	t.Helper()
	asked, slow := s.o.Ask(t.Context())
	require.NoError(t, asked)
	require.NoError(t, slow)
}

// scrape reads /metrics: samples by name with labels, as Prometheus writes them.
func scrape(t testing.TB, o *observe.Observer) map[string]float64 {
	t.Helper()
	w := httptest.NewRecorder()
	o.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, w.Code, w.Body.String())
	out := map[string]float64{}
	for line := range strings.Lines(w.Body.String()) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		at := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[at+1:], 64)
		require.NoError(t, err, line)
		out[line[:at]] = v
	}
	return out
}

func nameOf(sample string) string { name, _, _ := strings.Cut(sample, "{"); return name }

// fill makes an installation in which there is something of everything: operations in all states, a run that failed at a
// tenant behind, backups old and missing, a tenant that was served.
func (s *stage) fill(t *testing.T) (acme tenant.Tenant) {
	t.Helper()
	acme, globex, initech := s.env.Tenant(t, "acme"), s.env.Tenant(t, "globex"), s.env.Tenant(t, "initech")
	operation := func(kind, state string, tn tenant.Tenant) uuid.UUID {
		id, err := uuid.NewV7()
		require.NoError(t, err)
		s.exec(t, `insert into public.operations (id, kind, tenant, slug, state, created_at, heartbeat)
values ($1, $2, nullif($3, 0), $4, $5, now() - interval '10 minutes', now() - interval '2 minutes')`, id, kind, tn.Number, tn.Slug.String(), state)
		return id
	}
	run := func(kind, state string) uuid.UUID {
		id := operation(kind, state, tenant.Tenant{})
		s.exec(t, `insert into public.runs (id, waves) values ($1, 1)`, id)
		return id
	}
	task := func(run uuid.UUID, tn tenant.Tenant, state, ago string) {
		s.exec(t, `insert into public.tasks (run, ordinal, tenant, slug, group_name, state, finished_at)
values ($1, $2, $2, $3, 'main', $4, now() - $5::text::interval)`, run, tn.Number, tn.Slug.String(), state, ago)
	}
	operation("tenant.drop", "queued", globex)
	operation("tenant.suspend", "running", globex)
	operation("tenant.create", "failed", tenant.Tenant{})
	run("run.sql", "paused")
	old, last := run("run.backup", "done"), run("run.backup", "failed")
	task(old, acme, "ok", "3 days")
	task(old, globex, "ok", "3 days")
	task(last, acme, "ok", "1 day")
	task(last, globex, "failed", "1 day")
	task(last, initech, "failed", "1 day")
	migration := run("run.migrate", "failed")
	task(migration, acme, "ok", "1 hour")
	task(migration, globex, "failed", "1 hour")
	task(migration, initech, "failed", "1 hour")
	s.exec(t, `update public.placements set version = 1 where number = any($1)`, []int32{acme.Number, globex.Number})
	s.exec(t, `insert into public.instances (id, host, pid, version, ops_addr, heartbeat) values
(gen_random_uuid(), 'a', 1, 'v1', '', now()), (gen_random_uuid(), 'b', 1, 'v0', '', now()), (gen_random_uuid(), 'c', 1, 'old', '', now() - interval '1 hour')`)
	s.exec(t, `analyze`)
	answer(s.counter, acme, get(3*time.Millisecond))
	require.NoError(t, s.env.DB.InTenant(t.Context(), acme, postgres.Single, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), `select 1`)
		return err
	}))
	scrape(t, s.o) // whoever has series has a size
	return acme
}

func TestMetricsTellHowTheFleetStands(t *testing.T) {
	t.Parallel()
	redis := pgtest.Redis(t)
	s := newStage(t, func(o *observe.Options) { o.Cache = openCache(t, redis.URL()) })
	s.fill(t)
	got := scrape(t, s.o)
	require.NotContains(t, got, `oneo_fleet_age_seconds{question="registry"}`, "nobody has asked yet")
	require.NotContains(t, got, `oneo_migration_head`)
	s.ask(t)
	answer(s.counter, named(t, 1, "acme"), get(3*time.Millisecond))
	got = scrape(t, s.o)
	for sample, want := range map[string]float64{
		`oneo_build_info{version="v1"}`:                                            1,
		`oneo_http_requests_total{method="GET",route="/api/v1/me",status="200"}`:   2,
		`oneo_http_request_duration_seconds_bucket{route="/api/v1/me",le="0.005"}`: 2,
		`oneo_tenants{state="active"}`:                                             3,
		`oneo_operations{state="queued"}`:                                          1,
		`oneo_operations{state="running"}`:                                         1,
		`oneo_operations{state="paused"}`:                                          1,
		`oneo_operations_stale`:                                                    1,
		`oneo_operations_ended{state="failed"}`:                                    3,
		`oneo_operations_ended{state="done"}`:                                      1,
		`oneo_operations_ended{state="aborted"}`:                                   0,
		`oneo_runs{state="running"}`:                                               0,
		`oneo_runs{state="paused"}`:                                                1,
		`oneo_instances{version="v0"}`:                                             1,
		`oneo_instances{version="v1"}`:                                             1,
		`oneo_migration_head`:                                                      2,
		`oneo_migration_tenants_behind{group="main"}`:                              2,
		`oneo_migration_tenants_failed`:                                            1,
		`oneo_backup_tenants_never`:                                                1,
		`oneo_physical_backup_newest_timestamp_seconds{cluster="main"}`:            1_700_000_000,
		`oneo_physical_archived_timestamp_seconds{cluster="main"}`:                 1_700_000_500,
		`oneo_physical_archiving_failing{cluster="main"}`:                          1,
		`oneo_redis_up`:                                                            1,
		`oneo_tenant_requests_total{tenant="acme"}`:                                1,
		`oneo_tenant_requests_total{tenant="_other"}`:                              1,
		`oneo_tenant_rows_total{tenant="_other"}`:                                  1,
		`oneo_counted_tenants`:                                                     1,
		`oneo_fleet_failures_total{question="registry"}`:                           0,
		`oneo_transaction_statements_total{work="tenant"}`:                         1,
		`oneo_pool_connection_tenants_max{group="main"}`:                           1,
	} {
		require.Contains(t, got, sample)
		require.Equal(t, want, got[sample], sample)
	}
	require.NotContains(t, got, `oneo_instances{version="old"}`)
	require.NotContains(t, got, `oneo_physical_archived_timestamp_seconds{cluster="new"}`)
	require.InDelta(t, 600, got[`oneo_operations_oldest_seconds{state="queued"}`], 120)
	require.InDelta(t, float64(time.Now().Add(-72*time.Hour).Unix()), got[`oneo_backup_oldest_timestamp_seconds`], 300)
	require.Greater(t, got[`oneo_redis_memory_bytes`], 100_000.0)
	require.GreaterOrEqual(t, got[`oneo_tenant_size_bytes{tenant="acme"}`], 8192.0*5, "each table has indexes")

	// Everything that is defined is there, and nothing else but what Go and the process have.
	defined, seen := observe.Names(), map[string]bool{}
	for sample := range got {
		name := nameOf(sample)
		if !defined[name] {
			require.Regexp(t, `^(go|process|promhttp)_`, name)
			continue
		}
		seen[name] = true
	}
	for name := range defined {
		require.True(t, seen[name], "%s is defined, and /metrics does not have it", name)
	}
	for _, never := range []string{pgtest.Secret, "localhost", "postgres://", "redis://", redis.URL(), s.env.Group.URL} {
		for sample := range got {
			require.NotContains(t, sample, never)
		}
	}
}

func TestWithoutRedisAndStoreNothingIsToldOfThem(t *testing.T) {
	t.Parallel()
	s := newStage(t, func(o *observe.Options) { o.BackupKind, o.Physical = "", nil })
	s.ask(t)
	for sample := range scrape(t, s.o) {
		require.NotRegexp(t, `^oneo_(redis|backup|physical)_`, sample)
	}
}

// A Redis whose user may not ask how it is, is there all the same; one that is gone is not.
func TestRedisMayRefuseTheQuestion(t *testing.T) {
	t.Parallel()
	redis := pgtest.Redis(t)
	c := openCache(t, redis.URL())
	require.Equal(t, cache.State{Set: true, Up: true}, cache.State{Set: c.State(t.Context()).Set, Up: c.State(t.Context()).Up})
	refusing := refusingRedis(t)
	require.Equal(t, cache.State{Set: true, Up: true}, openCache(t, refusing).State(t.Context()))
	require.Equal(t, cache.State{Set: true}, openCache(t, "redis://127.0.0.1:1").State(t.Context()))
	require.Equal(t, cache.State{}, openCache(t, "").State(t.Context()))
}

// refusingRedis is one that refuses every command, as a user without rights finds it.
func refusingRedis(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 4096)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					// One answer to each command: each begins with the number of its words.
					for range strings.Count("\n"+string(buf[:n]), "\n*") {
						if _, err := io.WriteString(c, "-NOPERM this user has no permissions to run it\r\n"); err != nil {
							return
						}
					}
				}
			}()
		}
	}()
	return "redis://" + l.Addr().String()
}

// While PostgreSQL hangs a scrape does not: what it said last stands, and is told to be old.
func TestADatabaseThatHangsDoesNotHangAScrape(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	s.fill(t)
	s.options.DB, _, _ = s.env.Open(t, func(o *postgres.Options) { o.LockTimeout = pgtest.Patience })
	s.o = observe.New(s.options)
	s.ask(t)

	blocker := pgtest.Admin(t, s.env.AdminURL)
	tx, err := blocker.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `lock table public.tenants, public.placements in access exclusive mode`)
	require.NoError(t, err)
	asked := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		first, second := s.o.Ask(ctx)
		if second != nil && first == nil {
			first = second
		}
		asked <- first
	}()
	require.Eventually(t, func() bool {
		var n int
		require.NoError(t, s.admin.QueryRow(t.Context(), `select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n))
		return n > 0
	}, pgtest.Patience, 10*time.Millisecond)
	got := scrape(t, s.o) // would wait for the lock, which nobody lets go until it is over
	require.Equal(t, 3.0, got[`oneo_tenants{state="active"}`])
	require.Equal(t, 2.0, got[`oneo_migration_tenants_behind{group="main"}`])
	require.Positive(t, got[`oneo_fleet_age_seconds{question="registry"}`])
	s.o.Stats()
	cancel()
	require.Error(t, <-asked)
	require.NoError(t, tx.Rollback(t.Context()))
	got = scrape(t, s.o)
	require.Equal(t, 1.0, got[`oneo_fleet_failures_total{question="registry"}`])
	require.Equal(t, 3.0, got[`oneo_tenants{state="active"}`])
	s.ask(t)
}

// A server that takes connections and never says a word costs a question its second.
func TestAQuestionIsBounded(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	do := postgres.DefaultOptions()
	do.Groups = map[string]postgres.Group{postgres.MainGroup: {URL: "postgres://x@" + l.Addr().String() + "/x?sslmode=disable"}}
	do.Secret = pgtest.Secret
	do.ConnectTimeout, do.AcquireTimeout = time.Hour, time.Hour
	db, err := postgres.Open(do)
	require.NoError(t, err)
	o := observe.New(observe.Options{
		Counter: observe.NewCounter(3), DB: db, Cache: openCache(t, ""), Logger: slog.New(slog.DiscardHandler), BackupKind: "run.backup",
	})
	ctx, cancel := context.WithTimeout(t.Context(), pgtest.Patience)
	defer cancel()
	registry, slow := o.Ask(ctx) // with the bound that servers have
	require.Error(t, registry)
	require.Error(t, slow)
	require.NoError(t, ctx.Err(), "the question's own bound has ended it")
	require.Equal(t, 1.0, scrape(t, o)[`oneo_fleet_failures_total{question="slow"}`])
	_ = l.Close()
}

// What the registry says of tenants is followed though no request of theirs comes.
func TestTenantsThatAreDroppedOrRenamedAreFollowed(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	acme, globex := s.env.Tenant(t, "acme"), s.env.Tenant(t, "globex")
	answer(s.counter, acme, get(time.Millisecond))
	answer(s.counter, globex, get(time.Millisecond))
	require.Contains(t, scrape(t, s.o), `oneo_tenant_requests_total{tenant="globex"}`)
	_, err := s.env.Provision.Drop(t.Context(), globex.Slug, time.Hour, "test")
	require.NoError(t, err)
	s.exec(t, `update public.tenants set slug = 'acme-new', epoch = epoch + 1 where slug = 'acme'`)
	s.ask(t)
	for sample := range scrape(t, s.o) {
		require.NotContains(t, sample, `"globex"`)
		require.NotContains(t, sample, `"acme"`)
	}
	st := s.o.Stats()
	require.Len(t, st.Tenants, 1)
	require.Equal(t, "acme-new", st.Tenants[0].Tenant)
}

func TestStatsAreForWhoeverHasTheToken(t *testing.T) {
	t.Parallel()
	s := newStage(t)
	acme := s.fill(t)
	secret := []byte(pgtest.Secret)
	server := httptest.NewServer(observe.Guard(secret, http.HandlerFunc(s.o.ServeStats)))
	t.Cleanup(server.Close)
	addr := server.Listener.Addr().String()
	for _, header := range []string{"", "Bearer", "Bearer ", "Bearer " + observe.Token([]byte("another")), observe.Token(secret), "Basic " + observe.Token(secret), "Bearer " + pgtest.Secret} {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/stats", nil)
		require.NoError(t, err)
		r.Header.Set("Authorization", header)
		resp, err := http.DefaultClient.Do(r)
		require.NoError(t, err)
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, errorsOf(err, resp.Body.Close()))
		require.Equal(t, http.StatusUnauthorized, resp.StatusCode, header)
		require.NotContains(t, string(body), "acme")
	}
	require.Equal(t, "c68d011f8c0a7598ef9a46785e071b5fa94ef30221dbadf9e217386d723a91f3", observe.Token([]byte("s3cret")), "as docs/operations.md has openssl make it")
	w := httptest.NewRecorder()
	observe.Guard(nil, http.HandlerFunc(s.o.ServeStats)).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/stats", nil))
	require.Equal(t, http.StatusNotFound, w.Code, "without a secret there is nothing")

	host, err := os.Hostname()
	require.NoError(t, err)
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	t.Cleanup(func() { _ = silent.Close() })
	here := registry.Instance{ID: s.options.Instance, Host: host, OpsAddr: addr}
	c := observe.NewClient(secret)
	t.Cleanup(c.Close)
	answers := c.Stats(t.Context(), []registry.Instance{
		here, {ID: uuid.New(), Host: host, OpsAddr: addr}, {ID: uuid.New(), Host: host, OpsAddr: silent.Addr().String()},
		{ID: uuid.New(), Host: "elsewhere", OpsAddr: "127.0.0.1:8001"}, {ID: uuid.New(), Host: host, OpsAddr: ""},
	})
	require.NoError(t, answers[0].Err)
	require.Equal(t, "acme", answers[0].Stats.Tenants[0].Tenant)
	require.Equal(t, acme.Number, answers[0].Stats.Tenants[0].Number)
	require.Equal(t, int64(1), answers[0].Stats.All.Requests)
	require.Equal(t, "main", answers[0].Stats.Pools[0].Group)
	require.Positive(t, answers[0].Stats.Runtime.MemoryBytes)
	require.ErrorContains(t, answers[1].Err, "another server answers")
	require.ErrorContains(t, answers[2].Err, "does not answer")
	require.ErrorContains(t, answers[3].Err, "own machine")
	require.ErrorContains(t, answers[4].Err, "no listener")
	for _, a := range answers[1:] {
		require.Zero(t, a.Stats.Instance)
	}
	stranger := observe.NewClient([]byte("another secret"))
	t.Cleanup(stranger.Close)
	require.ErrorContains(t, stranger.Stats(t.Context(), []registry.Instance{here})[0].Err, "another server.secret")
}

func errorsOf(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// The token goes to the server that was asked, and nowhere else.
func TestTheClientFollowsNoRedirection(t *testing.T) {
	t.Parallel()
	var asked []string
	other := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked = append(asked, r.Header.Get("Authorization")) }))
	t.Cleanup(other.Close)
	server := httptest.NewServer(http.RedirectHandler(other.URL, http.StatusFound))
	t.Cleanup(server.Close)
	host, err := os.Hostname()
	require.NoError(t, err)
	c := observe.NewClient([]byte(pgtest.Secret))
	t.Cleanup(c.Close)
	require.Error(t, c.Stats(t.Context(), []registry.Instance{{Host: host, OpsAddr: server.Listener.Addr().String()}})[0].Err)
	require.Empty(t, asked)
}

// A scrape of a server that counts 5,000 tenants.
func TestAScrapeIsSmall(t *testing.T) {
	t.Parallel()
	s := newStage(t, func(o *observe.Options) { o.Counter = observe.NewCounter(50) })
	for i := range int32(5000) {
		tn := named(t, i+1, fmt.Sprintf("tenant-%d", i))
		for range 1 + i%3 {
			answer(s.options.Counter, tn, get(time.Millisecond))
		}
	}
	w := httptest.NewRecorder()
	s.o.Metrics().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Less(t, w.Body.Len(), 1<<20)
	require.Equal(t, 51, strings.Count(w.Body.String(), "\noneo_tenant_requests_total{"))
	body, err := json.Marshal(s.o.Stats())
	require.NoError(t, err)
	require.Less(t, len(body), 4<<20)
}

var quoted = regexp.MustCompile("`([a-z_]+)`")

// BenchmarkScrape is a scrape of a server that counts 5,000 tenants.
func BenchmarkScrape(b *testing.B) {
	c := observe.NewCounter(50)
	for i := range int32(5000) {
		answer(c, named(b, i+1, fmt.Sprintf("tenant-%d", i)), get(time.Millisecond))
	}
	ca, err := cache.Open(cache.Options{Timeout: time.Second})
	require.NoError(b, err)
	defer ca.Close()
	o := observe.New(observe.Options{Counter: c, Cache: ca, Pools: func() []postgres.Stats { return nil }, Logger: slog.New(slog.DiscardHandler)})
	h := o.Metrics()
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		b.ReportMetric(float64(w.Body.Len()), "bytes")
	}
}

// docs/metrics.md holds the table of all metrics; ONEO_UPDATE_GOLDEN=1 writes it.
func TestTheDocumentedMetricsAreThoseThatThereAre(t *testing.T) {
	const path, begin, end = "../../docs/metrics.md", "<!-- table -->\n", "<!-- end -->"
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	before, rest, found := strings.Cut(string(text), begin)
	require.True(t, found)
	_, after, found := strings.Cut(rest, end)
	require.True(t, found)
	want := before + begin + observe.Table() + end + after
	if os.Getenv("ONEO_UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(path, []byte(want), 0o644))
		return
	}
	require.Equal(t, want, string(text), "run `make golden`")
	names := observe.Names()
	for _, m := range quoted.FindAllStringSubmatch(before+after, -1) {
		if strings.HasPrefix(m[1], "oneo_") {
			require.True(t, names[m[1]] || slices.Contains(keys(observe.Labels()), m[1]), "docs/metrics.md speaks of %s", m[1])
		}
	}
}
