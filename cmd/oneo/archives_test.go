package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/demo"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// offices are the demonstration's tenants on two servers, with a user each, and one oneo that serves them.
type offices struct {
	command
	extra  []string
	at     map[string]*pgx.Conn // the database of each group
	served *served
	keys   map[string]string // of a user of each tenant
	// scratch is where clusters are recovered, where there are physical backups.
	scratch string
}

func newOffices(t *testing.T) *offices {
	t.Helper()
	c, second := newTwoServers(t)
	o := &offices{command: c, at: map[string]*pgx.Conn{"main": pgtest.Admin(t, c.env.AdminURL), "second": pgtest.Admin(t, second)}, keys: map[string]string{}}
	o.open()
	return o
}

// open makes the tenants, and serves them.
func (o *offices) open() {
	t, c := o.t, o.command
	t.Helper()
	_, err := demo.Seed(t.Context(), demo.Deps{
		Tenant: func(ctx context.Context, slug tenant.Slug, name string) (tenant.Tenant, error) {
			return c.env.Provision.Create(ctx, provision.CreateRequest{Slug: slug, Name: name, Actor: "test"})
		},
		In: func(ctx context.Context, t tenant.Tenant, fn func(postgres.Querier) error) error {
			return c.env.DB.InTenant(ctx, t, postgres.Write, func(tx *postgres.Tx) error { return fn(tx) })
		},
	})
	require.NoError(t, err)
	_, err = plainOneo()
	require.NoError(t, err)
	o.extra = slices.Concat([]string{plain}, c.environ[len(patience):], []string{"ONEO_REDIS_URL=" + pgtest.Redis(t).URL()})
	for _, slug := range []string{"central", "east", "west"} {
		_, o.keys[slug] = userKey(t, c.env, o.extra, slug, slug+"@agency.example")
	}
	o.served = serve(t, c.env, o.extra...)
}

// oneo runs a command of the binary, and returns what it answers and what it tells.
func (o *offices) oneo(code int, args ...string) (answer, story string) {
	o.t.Helper()
	answer, story, got := oneo(o.t, o.env, o.extra, args...)
	require.Equal(o.t, code, got, "oneo %s: %s%s", strings.Join(args, " "), answer, story)
	return answer, story
}

// won is how many deals a tenant's own API says to be won, and the status of the answer.
func (o *offices) won(host, key string) (status, n int) {
	o.t.Helper()
	path := "/api/v1/pipelines/opportunities/records?limit=1&count=exact&filter=" + url.QueryEscape(`stage = "Won"`)
	status, body := o.served.do(o.t, "GET", host+".localhost", path, key, "")
	var page struct{ Page struct{ Count int } }
	if status == http.StatusOK {
		require.NoError(o.t, json.Unmarshal([]byte(body), &page), body)
	}
	return status, page.Page.Count
}

// requireWon holds what a tenant's API answers, once the server has heard of what a command has done.
func (o *offices) requireWon(host, key string, status, n int) {
	o.t.Helper()
	var got, count int
	require.Eventually(o.t, func() bool {
		got, count = o.won(host, key)
		return got == status
	}, pgtest.Patience, 20*time.Millisecond, "%s: want the status %d", host, status)
	require.Equal(o.t, n, count, host)
}

// rows are the sums of a schema's tables, made without oneo, but for those of what no archive holds.
func (o *offices) rows(group, schema string) map[string]string {
	o.t.Helper()
	found, err := o.at[group].Query(context.Background(), `select relname::text from pg_class where relnamespace = $1::text::regnamespace and relkind = 'r' and relname <> 'sessions'`, postgres.Quote(schema))
	require.NoError(o.t, err)
	tables, err := pgx.CollectRows(found, pgx.RowTo[string])
	require.NoError(o.t, err)
	require.Len(o.t, tables, 5)
	sums := map[string]string{}
	for _, table := range tables {
		var sum string
		const sql = `select count(*) || ' ' || coalesce(md5(string_agg(md5(r::text), '' order by r::text collate "C")), '') from %s.%s r`
		require.NoError(o.t, o.at[group].QueryRow(context.Background(), fmt.Sprintf(sql, postgres.Quote(schema), postgres.Quote(table))).Scan(&sum))
		sums[table] = sum
	}
	return sums
}

// text is all that a schema of the main server says of people.
func (o *offices) text(schema string) (all string) {
	o.t.Helper()
	const sql = `select (select string_agg(u::text, E'\n') from %[1]s.users u) || (select string_agg(data::text, E'\n') from %[1]s.records)`
	require.NoError(o.t, o.at["main"].QueryRow(context.Background(), fmt.Sprintf(sql, postgres.Quote(schema))).Scan(&all))
	return all
}

// login is the status of the answer to a password, and a session.
func (o *offices) login(host, email, password string) (status int, session string) {
	o.t.Helper()
	status, body := o.served.do(o.t, "POST", host+".localhost", "/api/v1/auth/login", "", fmt.Sprintf(`{"email":%q,"password":%q,"token":true}`, email, password))
	var got struct{ Token string }
	if status == http.StatusOK {
		require.NoError(o.t, json.Unmarshal([]byte(body), &got), body)
	}
	return status, got.Token
}

// field is one text of an answer in JSON.
func field(t *testing.T, answer, key string) string {
	t.Helper()
	var object map[string]any
	require.NoError(t, json.Unmarshal([]byte(answer), &object), answer)
	require.IsType(t, "", object[key], answer)
	return object[key].(string)
}

// The demonstration's tenants, all the way from the command line, while they are served: exported, purged and imported; spoilt,
// restored, and that undone; cloned and masked; moved to another server, whose archive becomes a tenant of the first one. Who has
// logged in, with which key, and what is served, is the same before and behind it; in the end nothing is left.
func TestArchivesOfTheDemonstration(t *testing.T) {
	t.Parallel()
	o := newOffices(t)
	dir := t.TempDir()
	for slug, n := range map[string]int{"central": 1629, "east": 1171, "west": 1438} {
		o.requireWon(slug, o.keys[slug], http.StatusOK, n)
	}
	answer, _ := o.oneo(0, "user", "add", "ada@agency.example", "-t", "central", "--role", "member", "-o", "json")
	password := field(t, answer, "password")
	status, session := o.login("central", "ada@agency.example", password)
	require.Equal(t, http.StatusOK, status)

	// Exported, purged, imported: the same rows, keys and passwords; nobody is logged in any more.
	central := filepath.Join(dir, "central.oneo")
	before := o.rows("main", "central")
	o.oneo(0, "tenant", "export", "central", "-f", central)
	o.oneo(0, "tenant", "drop", "central", "--purge", "--confirm", "central")
	o.requireWon("central", o.keys["central"], http.StatusNotFound, 0)
	o.oneo(0, "tenant", "import", central)
	require.Equal(t, before, o.rows("main", "central"))
	o.requireWon("central", o.keys["central"], http.StatusOK, 1629)
	o.requireWon("central", session, http.StatusUnauthorized, 0)
	status, session = o.login("central", "ada@agency.example", password)
	require.Equal(t, http.StatusOK, status)

	// Spoilt, restored; the restore undone, and done once more.
	east := filepath.Join(dir, "east.oneo")
	before = o.rows("main", "east")
	o.oneo(0, "tenant", "export", "east", "-f", east)
	o.oneo(0, "sql", "-t", "east", "--write", "--yes", `update records set data = jsonb_set(data, '{stage}', '"Lost"') where data->>'stage' = 'Won'`)
	spoilt := o.rows("main", "east")
	require.NotEqual(t, before["records"], spoilt["records"])
	o.requireWon("east", o.keys["east"], http.StatusOK, 0)
	answer, _ = o.oneo(0, "restore", east, "-t", "east", "--diff", "-o", "json")
	require.Regexp(t, `"changed": 1171,\s+"removed": 0,\s+"same": 1217,\s+"table": "records"`, answer)
	answer, _ = o.oneo(0, "restore", east, "-t", "east", "--yes", "-o", "json")
	require.Equal(t, before, o.rows("main", "east"))
	o.requireWon("east", o.keys["east"], http.StatusOK, 1171)
	o.oneo(0, "undo", field(t, answer, "operation"), "--yes")
	require.Equal(t, spoilt, o.rows("main", "east"))
	o.requireWon("east", o.keys["east"], http.StatusOK, 0)
	o.oneo(0, "restore", east, "-t", "east", "--yes")
	require.Equal(t, before, o.rows("main", "east"))
	o.requireWon("east", o.keys["east"], http.StatusOK, 1171)

	// Cloned and masked: as many deals, and nobody's name, address or key.
	before = o.rows("main", "west")
	_, story := o.oneo(0, "tenant", "clone", "west", "west-test", "--mask")
	require.Contains(t, story, "agents.name (name)")
	require.Equal(t, before, o.rows("main", "west"))
	clone := o.text("west_test")
	var people []string
	found, err := o.at["main"].Query(t.Context(), `select email from west.users union select data ->> 'name' from west.records r join west.pipelines p on p.id = r.pipeline_id where p.key in ('agents', 'accounts')
union select data ->> 'manager' from west.records r join west.pipelines p on p.id = r.pipeline_id where p.key = 'agents'`)
	require.NoError(t, err)
	people, err = pgx.CollectRows(found, pgx.RowTo[string])
	require.NoError(t, err)
	require.Greater(t, len(people), 90)
	original := o.text("west")
	for _, name := range people {
		require.Contains(t, original, name)
		require.NotContains(t, clone, name)
	}
	o.requireWon("west-test", o.keys["west"], http.StatusUnauthorized, 0)
	_, key := userKey(t, o.env, o.extra, "west-test", "tester@agency.example")
	o.requireWon("west-test", key, http.StatusOK, 1438)
	o.requireWon("west", o.keys["west"], http.StatusOK, 1438)

	// Moved to another server: the same rows, keys and sessions; its archive from there is a tenant here.
	before = o.rows("main", "central")
	o.oneo(0, "tenant", "move", "central", "--to", "second")
	require.Equal(t, before, o.rows("second", "central"))
	o.requireWon("central", o.keys["central"], http.StatusOK, 1629)
	o.requireWon("central", session, http.StatusOK, 1629)
	away := filepath.Join(dir, "away.oneo")
	o.oneo(0, "tenant", "export", "central", "-f", away)
	o.oneo(0, "tenant", "import", away, "--as", "home", "--group", "main")
	require.Equal(t, before, o.rows("main", "home"))
	o.requireWon("home", o.keys["central"], http.StatusOK, 1629)
	o.requireWon("home", session, http.StatusUnauthorized, 0)
	o.oneo(0, "migrate", "drift", "--all-tenants", "--check")
	o.oneo(0, "migrate", "status", "--check")
	o.env.Invariants(t)

	// One is erased, and comes back from no archive; the others are purged. Of none anything is left on either server.
	o.oneo(0, "tenant", "erase", "east", "--confirm", "east")
	o.oneo(1, "tenant", "import", east)
	o.requireWon("east", o.keys["east"], http.StatusNotFound, 0)
	for _, slug := range []string{"central", "west", "west-test", "home"} {
		o.oneo(0, "tenant", "drop", slug, "--purge", "--confirm", slug)
		o.requireWon(slug, "", http.StatusNotFound, 0)
	}
	var id string
	require.NoError(t, o.at["main"].QueryRow(t.Context(), `select id from public.installation`).Scan(&id))
	for group, c := range o.at {
		var left []string
		const sql = `select coalesce(array_agg(what), '{}') from (
	select 'schema ' || nspname as what from pg_namespace where nspname !~ '^pg_' and nspname not in ('public', 'ext', 'river', 'information_schema')
	union all select 'role ' || rolname from pg_roles where rolname ~ ('^oneo_' || $1 || '_[0-9]+$')
	union all select 'placement ' || schema from public.placements union all select 'ledger ' || tenant from public.ledger where set = 'tenant'
	union all select 'kept ' || schema from (select schema from public.replaced union all select schema from public.moved union all select schema from public.undo_points) k) w`
		require.NoError(t, c.QueryRow(t.Context(), sql, id).Scan(&left))
		require.Empty(t, left, group)
	}
	var open int
	require.NoError(t, o.at["main"].QueryRow(t.Context(), `select count(*) from public.operations where state not in ('done', 'failed')`).Scan(&open))
	require.Zero(t, open)
	files, err := os.ReadDir(dir)
	require.NoError(t, err)
	names := []string{}
	for _, f := range files {
		names = append(names, f.Name())
	}
	require.True(t, slices.Equal([]string{"away.oneo", "central.oneo", "east.oneo"}, names), "%v", names)
	o.env.Invariants(t)
}
