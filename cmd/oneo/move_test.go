package main

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// newTwoServers is newCommand with the second group on a server of its own.
func newTwoServers(t *testing.T) (c command, second string) {
	t.Helper()
	env := pgtest.New(t)
	group, server := env.SecondServer(t)
	c = command{t: t, env: env, environ: append(slices.Clone(patience), []string{
		"ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret,
		"ONEO_DATABASE_GROUPS_SECOND_URL=" + group.URL, "ONEO_DATABASE_GROUPS_SECOND_OWNER_URL=" + group.OwnerURL,
	}...)}
	c.run(0, "migrate --shared")
	return c, server.URL("oneo")
}

// From the command line, between two servers: shown, moved with its users, and back; what is left behind is destroyed.
func TestMoveBetweenServers(t *testing.T) {
	t.Parallel()
	c, second := newTwoServers(t)
	c.run(0, "tenant create acme --admin-email ada@acme.example")
	c.run(2, "tenant move acme")
	c.run(2, "tenant move acme --to second --drop-kept")
	require.Contains(t, c.run(2, "tenant move acme --to nowhere"), "main, second")
	c.run(10, "tenant move acm --to second")
	require.Contains(t, c.run(0, "tenant move acme --to second --dry-run"), "would move tenant acme from group main to second: about ")
	require.Contains(t, c.run(0, "tenant show acme"), "main")

	told := c.run(0, "tenant move acme --to second -o json")
	require.Contains(t, told, "moved tenant acme from group main to second: ")
	require.Contains(t, told, "back: oneo tenant move acme --to main")
	var moved struct {
		Tenant string    `json:"tenant"`
		From   string    `json:"from"`
		To     string    `json:"to"`
		Rows   int64     `json:"rows"`
		Pause  int64     `json:"pause_ms"`
		Kept   time.Time `json:"kept_until"`
	}
	require.NoError(t, json.NewDecoder(strings.NewReader(told)).Decode(&moved), told)
	require.Equal(t, "acme", moved.Tenant)
	require.Equal(t, "main", moved.From)
	require.Equal(t, "second", moved.To)
	require.Positive(t, moved.Pause)
	require.WithinDuration(t, time.Now().Add(7*24*time.Hour), moved.Kept, time.Hour)
	require.Contains(t, c.run(0, "user list -t acme"), "ada@acme.example")
	c.run(0, "user add bob@acme.example -t acme --role member")
	c.run(0, "migrate status --check")
	c.run(0, "migrate drift --all-tenants")
	require.Contains(t, c.run(0, "tenant move acme --to second"), "tenant acme is in group second already")

	// The old place answers nobody, and is not written by a command that has it wrong.
	old := pgtest.Admin(t, c.env.AdminURL)
	var state, schema string
	require.NoError(t, old.QueryRow(t.Context(), `select state, schema from public.placements`).Scan(&state, &schema))
	require.Equal(t, "moved", state)
	require.Regexp(t, `^oneo_moved_1_[0-9a-f]{8}$`, schema)
	c.run(0, "tenant move acme --to main --keep 1h")
	require.Contains(t, c.run(0, "user list -t acme"), "bob@acme.example")
	c.run(2, "tenant move acme --drop-kept")
	require.Contains(t, c.run(0, "tenant move acme --drop-kept --dry-run"), "would destroy")
	require.Contains(t, c.run(0, "tenant move acme --drop-kept --confirm acme"), "destroyed 2 old copies")
	var n int
	require.NoError(t, pgtest.Admin(t, second).QueryRow(t.Context(), `select count(*) from public.placements`).Scan(&n))
	require.Zero(t, n)
	require.Contains(t, c.run(0, "user list -t acme"), "bob@acme.example")
	c.env.Invariants(t)
}

// A step that fails is undone, and said so by the exit code and the state of the tenant.
func TestMoveThatIsUndone(t *testing.T) {
	t.Parallel()
	c, second := newTwoServers(t)
	c.run(0, "tenant create acme")
	there := pgtest.Admin(t, second)
	_, err := there.Exec(t.Context(), `create function ext.no() returns event_trigger language plpgsql as $$ begin raise exception 'no tables today'; end $$;
create event trigger no on ddl_command_start when tag in ('CREATE TABLE') execute function ext.no()`)
	require.NoError(t, err)
	require.Contains(t, c.run(2, "tenant move acme --to second"), "no tables today")
	require.Contains(t, c.run(0, "tenant show acme"), "active")
	c.run(0, "user add ada@acme.example -t acme")
	c.env.Invariants(t)
	_, err = there.Exec(t.Context(), `drop event trigger no`)
	require.NoError(t, err)
	c.run(0, "tenant move acme --to second")
}

// A server that has not heard of a move, because there is no Redis, refuses by the old place's own word, once, and then goes
// to the new one: with the same key.
func TestMoveUnderAServer(t *testing.T) {
	t.Parallel()
	c, _ := newTwoServers(t)
	extra := c.environ[len(patience):]
	c.run(0, "tenant create acme")
	_, token := userKey(t, c.env, extra, "acme", "ada@acme.example")
	s := serve(t, c.env, extra...)
	get := func() (int, string) { return s.do(t, "GET", "acme.localhost", "/api/v1/pipelines", token, "") }
	for _, group := range []string{"second", "main"} {
		status, body := get()
		require.Equal(t, http.StatusOK, status, body)
		c.run(0, "tenant move acme --to "+group)
		if status, body = get(); status != http.StatusOK { // it may have asked the registry just now
			require.Equal(t, http.StatusServiceUnavailable, status, body)
			require.Contains(t, body, "tenant_moved")
			status, body = get()
		}
		require.Equal(t, http.StatusOK, status, body)
		status, body = s.do(t, "POST", "acme.localhost", "/api/v1/pipelines", token, `{"key":"`+group+`","name":"`+group+`"}`)
		require.Equal(t, http.StatusCreated, status, body)
	}
	_, body := get()
	require.Contains(t, body, `"second"`)
	c.env.Invariants(t)
}
