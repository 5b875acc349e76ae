package app_test

import (
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

// folder is a product's own migrations: the ones in the binary, and more.
func folder(t *testing.T, more map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	files, err := fs.Sub(schemas.Files, "tenant")
	require.NoError(t, err)
	require.NoError(t, os.CopyFS(dir, files))
	for name, text := range more {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	return dir
}

// with serves by a folder, from a version on.
func with(dir string, least int) func(*config.Config) {
	return func(c *config.Config) { c.Schemas.Dir, c.Schemas.MinVersion = dir, least }
}

// Both change the type of what every list reads: the names of statements that are there do not fit afterwards.
var (
	expand = map[string]string{
		"0003_expand.up.sql":   `alter table pipelines add column fresh text not null default 'fresh', alter column name type varchar(200)`,
		"0003_expand.down.sql": `alter table pipelines drop column fresh, alter column name type text`,
	}
	contract = map[string]string{
		"0004_contract.up.sql":   "-- oneo: breaking\nalter table pipelines alter column description type varchar(2000)",
		"0004_contract.down.sql": `alter table pipelines alter column description type text`,
	}
)

func both(ms ...map[string]string) map[string]string {
	all := map[string]string{}
	for _, m := range ms {
		for k, v := range m {
			all[k] = v
		}
	}
	return all
}

// reply is an answer of a tenant's host.
type reply struct {
	status int
	code   string
	retry  string
	body   string
}

func get(addr string, tn tenant.Tenant, method, path, token, body string) (reply, error) {
	r, err := http.NewRequest(method, "http://"+addr+path, strings.NewReader(body))
	if err != nil {
		return reply{}, err
	}
	r.Host = tn.Slug.String() + ".localhost"
	r.Header.Set("Authorization", "Bearer "+token)
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		return reply{}, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	var p struct{ Code string }
	_ = json.Unmarshal(b, &p) // of a success there is none
	return reply{res.StatusCode, p.Code, res.Header.Get("Retry-After"), string(b)}, err
}

// early is what an instance answers before it asks PostgreSQL for anything: at a path that there is not, nothing does.
func early(t *testing.T, addr string, tn tenant.Tenant) string {
	t.Helper()
	r, err := get(addr, tn, "GET", "/nothing-here", "", "")
	require.NoError(t, err)
	return r.code
}

const (
	upgrading = "tenant_upgrading"
	nothing   = "unknown_path"
)

func becomes(t *testing.T, addr string, tn tenant.Tenant, want, why string) {
	t.Helper()
	require.Eventuallyf(t, func() bool { return early(t, addr, tn) == want }, pgtest.Patience, 5*time.Millisecond, "%s: %s", tn.Slug, why)
}

// F16: an instance hears at once, from the migration itself, that a tenant has left the range that it serves, or is back.
// The poll would be an hour away.
func TestVersionsAreHeardOf(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, globex := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	hour := func(c *config.Config) { c.Schemas.Poll = time.Hour }
	old := serve(t, open(t, env, "", hour))
	newer := open(t, env, "", with(folder(t, both(expand, contract)), 3), hour)
	next := serve(t, newer)
	at := func(version int) {
		t.Helper()
		if version < 4 {
			_, err := newer.Migrate.Down(t.Context(), acme, version, migrate.TenantOptions{})
			require.NoError(t, err)
		}
		_, err := newer.Migrate.Tenant(t.Context(), acme, migrate.TenantOptions{Target: version})
		require.NoError(t, err)
	}
	becomes(t, next, acme, upgrading, "behind from the start")
	for range 3 {
		at(4)
		becomes(t, old, acme, upgrading, "closed to the old binary")
		becomes(t, next, acme, nothing, "what the new binary needs is there")
		r, err := get(old, acme, "GET", "/api/v1/settings", "", "")
		require.NoError(t, err)
		require.Equal(t, []any{http.StatusServiceUnavailable, upgrading, "5"}, []any{r.status, r.code, r.retry}, r.body)
		require.NotContains(t, r.body, "version", "what is being done inside is nobody's affair")
		require.Equal(t, nothing, early(t, old, globex), "a neighbour is not concerned")
		at(3)
		becomes(t, old, acme, nothing, "merely newer")
		becomes(t, next, acme, nothing, "at the least version")
		at(2)
		becomes(t, next, acme, upgrading, "behind again")
		require.Equal(t, nothing, early(t, old, acme))
	}

	// What was told while nobody listened is read when listening goes on.
	require.Equal(t, nothing, early(t, old, acme))
	conn := pgtest.Admin(t, env.AdminURL)
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `update public.placements set version = 9, reader = 9 where number = $1`, acme.Number)
	require.NoError(t, err)
	require.NoError(t, tx.Commit(t.Context()))
	require.Equal(t, nothing, early(t, old, acme), "nobody has told")
	_, err = conn.Exec(t.Context(), `select pg_terminate_backend(pid, 60000) from pg_stat_activity where query like 'listen %' and datname = current_database()`)
	require.NoError(t, err)
	becomes(t, old, acme, upgrading, "read after the reconnect")
}

// Where no LISTEN gets through, the poll finds it. F88: while that cannot read, what was last known stands, and the
// binding decides.
func TestVersionsArePolled(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, globex := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	deaf := open(t, env, "", func(c *config.Config) {
		c.Schemas.Poll = 100 * time.Millisecond
		c.Database.DirectURL = strings.Replace(env.Group.URL, fmt.Sprint(env.Server.Port()), "1", 1)
	})
	addr := serve(t, deaf)
	conn := pgtest.Admin(t, env.AdminURL)
	exec := func(sql string, args ...any) {
		t.Helper()
		_, err := conn.Exec(t.Context(), sql, args...)
		require.NoError(t, err)
	}
	const reader = `update public.placements set reader = $2 where number = $1`
	exec(reader, acme.Number, 9)
	becomes(t, addr, acme, upgrading, "polled")
	exec(reader, acme.Number, 0)
	becomes(t, addr, acme, nothing, "polled")
	exec(reader, acme.Number, 9)
	becomes(t, addr, acme, upgrading, "polled")

	exec(`revoke select on public.placements from oneo_app`) // the sub-pools' logins have a right of their own
	require.Error(t, func() error { _, err := deaf.DB.OutOfRange(t.Context(), postgres.MainGroup); return err }())
	exec(reader, globex.Number, 9)
	exec(reader, acme.Number, 0)
	pause := time.NewTimer(500 * time.Millisecond)
	<-pause.C
	require.Equal(t, upgrading, early(t, addr, acme), "what was last known stands")
	require.Equal(t, nothing, early(t, addr, globex))
	err := deaf.DB.InTenant(t.Context(), globex, postgres.Read, func(*postgres.Tx) error { return nil })
	require.Truef(t, fault.Is(err, fault.Suspended), "the binding decides: %v", err)
	exec(`grant select on public.placements to oneo_app`)
	becomes(t, addr, acme, nothing, "read again")
	becomes(t, addr, globex, upgrading, "read again")
}

// load asks instances for tenants' lists and writes into them, and keeps what must not come back.
type load struct {
	t       *testing.T
	addrs   []string
	tenants []tenant.Tenant
	tokens  map[int32]string

	phase   atomic.Int64
	mayFail func(phase int64, instance int) bool // be refused for its version
	mu      sync.Mutex
	made    map[int32]int
	refused [2]int
	changed int
	ok      [2]int
}

func (l *load) round(i int) {
	k, tn := i%2, l.tenants[i/2%len(l.tenants)]
	before := l.phase.Load()
	method, path, body, want := "GET", "/api/v1/pipelines", "", http.StatusOK
	switch i / 2 % 7 {
	case 1:
		path = "/api/v1/pipelines/deals/records?limit=2"
	case 2:
		method, path, body, want = "POST", "/api/v1/pipelines/deals/records", `{"data":{}}`, http.StatusCreated
	case 3:
		path = "/api/v1/pipelines/deals"
	}
	r, err := get(l.addrs[k], tn, method, path, l.tokens[tn.Number], body)
	if err != nil {
		l.t.Error(err)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case r.status == want:
		l.ok[k]++
		if method == "POST" {
			l.made[tn.Number]++
		} else if !strings.Contains(path, "records") && !strings.Contains(r.body, `"of `+tn.Slug.String()+`"`) {
			l.t.Errorf("%s got %s", tn.Slug, r.body)
		}
	case r.status == http.StatusServiceUnavailable && r.code == upgrading && r.retry == "5" &&
		(l.mayFail(before, k) || l.mayFail(l.phase.Load(), k)):
		l.refused[k]++
	case r.status == http.StatusServiceUnavailable && r.code == "tenant_changed" && r.retry != "":
		l.changed++ // several statements, with the migration's commit in between: to be repeated
	default:
		l.t.Errorf("instance %d in phase %d, %s %s of %s: %d %s", k, before, method, path, tn.Slug, r.status, r.body)
	}
}

// F16, F85: two binaries on one installation, under load, while its tenants are migrated: first by a migration that the
// older binary stands, which the newer one needs, then by one that it does not stand. Each tenant is refused by the binary
// that it does not fit, only then, and by no other.
func TestTwoBinariesWhileTenantsAreMigrated(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	l := &load{t: t, tokens: map[int32]string{}, made: map[int32]int{}}
	for i := range 5 {
		tn := env.Tenant(t, fmt.Sprintf("mixed-%d", i))
		l.tenants = append(l.tenants, tn)
		l.tokens[tn.Number] = session(t, env, tn)
	}
	older := open(t, env, "", func(c *config.Config) { c.Schemas.Poll = time.Hour })
	newer := open(t, env, "", with(folder(t, both(expand, contract)), 3), func(c *config.Config) { c.Schemas.Poll = time.Hour })
	l.addrs = []string{serve(t, older), serve(t, newer)}
	for _, tn := range l.tenants {
		r, err := get(l.addrs[0], tn, "POST", "/api/v1/pipelines", l.tokens[tn.Number], `{"key":"deals","name":"of `+tn.Slug.String()+`","fields":[]}`)
		require.NoError(t, err)
		require.Equal(t, http.StatusCreated, r.status, r.body)
	}
	const (
		toThree = 1
		atThree = 2
		toFour  = 3
	)
	l.mayFail = func(phase int64, instance int) bool {
		return instance == 1 && phase <= toThree || instance == 0 && phase >= toFour
	}
	stop := make(chan struct{})
	var workers sync.WaitGroup
	var rounds atomic.Int64
	for range 3 {
		workers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					l.round(int(rounds.Add(1)))
				}
			}
		})
	}
	some := func(n int64) {
		t.Helper()
		until := rounds.Load() + n
		require.Eventually(t, func() bool { return rounds.Load() >= until || t.Failed() }, pgtest.Patience, time.Millisecond)
		require.False(t, t.Failed())
	}
	migrated := func(version int) {
		t.Helper()
		for _, tn := range l.tenants {
			some(30)
			_, err := newer.Migrate.Tenant(t.Context(), tn, migrate.TenantOptions{Target: version})
			require.NoError(t, err)
		}
		some(100)
	}
	some(100)
	l.phase.Store(toThree)
	migrated(3)
	for _, tn := range l.tenants {
		becomes(t, l.addrs[1], tn, nothing, "at the version that the newer binary needs")
	}
	l.phase.Store(atThree)
	some(200)
	l.phase.Store(toFour)
	migrated(4)
	for _, tn := range l.tenants {
		becomes(t, l.addrs[0], tn, upgrading, "closed to the older binary")
	}
	close(stop)
	workers.Wait()
	t.Logf("%d requests: served %v, refused %v, changed meanwhile %d", rounds.Load(), l.ok, l.refused, l.changed)
	for k := range 2 {
		require.Positive(t, l.refused[k], "instance %d was never refused", k)
		require.Positive(t, l.ok[k], "instance %d never served", k)
	}
	for _, tn := range l.tenants {
		var rows int
		require.NoError(t, newer.DB.InTenant(t.Context(), tn, postgres.Read, func(tx *postgres.Tx) error {
			return tx.QueryRow(t.Context(), `select count(*) from records`).Scan(&rows)
		}))
		require.Equalf(t, l.made[tn.Number], rows, "%s: rows that were acknowledged", tn.Slug)
	}
	for i, a := range []*app.App{older, newer} {
		st, err := a.Standing(t.Context(), l.tenants[0])
		require.NoError(t, err)
		require.Equal(t, app.Standing{Version: 4, NotServed: []string{"it asks for a oneo that knows version 4, and this one knows 2", ""}[i]}, st)
	}
	env.Invariants(t)
}

func TestLeastVersionIsValidated(t *testing.T) {
	t.Parallel()
	c := config.Default()
	c.Database.URL, c.Server.Secret = "postgres://localhost/x", pgtest.Secret
	c.Schemas.MinVersion = 3
	require.True(t, fault.Is(c.Validate(), fault.Invalid), "it needs a folder")
	c.Schemas.Dir = folder(t, nil)
	require.NoError(t, c.Validate())
	_, err := app.Open(c, "test", nil)
	require.Truef(t, fault.Is(err, fault.Invalid), "above the newest migration: %v", err)
}
