package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// Servers that know hosts, sessions and keys by heart forget them with a restore, and with its undo: who is not in the archive
// is refused at once, who is goes on, and everybody who was logged in logs in again.
func TestServersHearOfARestore(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := []string{"ONEO_REDIS_URL=" + pgtest.Redis(t).URL(), "ONEO_CACHE_LOCAL_TTL=1h", "ONEO_CACHE_SHARED_TTL=2h"}
	env.Tenant(t, "acme")
	run := func(args ...string) string {
		t.Helper()
		stdout, stderr, code := oneo(t, env, redis, args...)
		require.Zero(t, code, "%v: %s", args, stderr)
		return stdout
	}
	_, kept := userKey(t, env, redis, "acme", "ann@example.com")
	servers := []*served{serve(t, env, redis...), serve(t, env, redis...)}
	status, body := servers[0].do(t, "POST", "acme.localhost", "/api/v1/pipelines", kept, `{"key":"deals","name":"Deals","fields":[{"key":"note","name":"Note","type":"text"}]}`)
	require.Equal(t, http.StatusCreated, status, body)
	file := filepath.Join(t.TempDir(), "acme.oneo")
	run("tenant", "export", "acme", "-f", file)

	var added struct{ Password string }
	require.NoError(t, json.Unmarshal([]byte(run("user", "add", "eve@example.com", "-t", "acme", "--role", "admin", "-o", "json")), &added))
	_, late := userKey(t, env, redis, "acme", "late@example.com")
	status, body = servers[0].do(t, "POST", "acme.localhost", "/api/v1/auth/login", "", fmt.Sprintf(`{"email":"eve@example.com","password":%q,"token":true}`, added.Password))
	require.Equal(t, http.StatusOK, status, body)
	var session struct{ Token string }
	require.NoError(t, json.Unmarshal([]byte(body), &session))
	status, body = servers[0].do(t, "POST", "acme.localhost", "/api/v1/pipelines/deals/records", late, `{"data":{"note":"since"}}`)
	require.Equal(t, http.StatusCreated, status, body)
	records := func(s *served, token string) (status, count int) {
		t.Helper()
		status, body := s.do(t, "GET", "acme.localhost", "/api/v1/pipelines/deals/records?count=exact", token, "")
		var page struct{ Page struct{ Count int } }
		if status == http.StatusOK {
			require.NoError(t, json.Unmarshal([]byte(body), &page), body)
		}
		return status, page.Page.Count
	}
	all := func(want map[string]int, count int, when string) {
		t.Helper()
		for i, s := range servers {
			for token, status := range want {
				got, n := records(s, token)
				require.Equal(t, status, got, "server %d %s", i, when)
				if status == http.StatusOK {
					require.Equal(t, count, n, "server %d %s", i, when)
				}
			}
		}
	}
	known := map[string]int{kept: http.StatusOK, late: http.StatusOK, session.Token: http.StatusOK}
	all(known, 1, "before")

	var done struct{ Operation string }
	require.NoError(t, json.Unmarshal([]byte(run("restore", file, "-t", "acme", "--yes", "-o", "json")), &done))
	all(map[string]int{kept: http.StatusOK, late: http.StatusUnauthorized, session.Token: http.StatusUnauthorized}, 0, "restored")
	run("undo", done.Operation, "--yes")
	all(known, 1, "undone")

	// A merge of users is heard of as well.
	run("restore", file, "-t", "acme", "--table", "users", "--overwrite", "--yes")
	all(known, 1, "merged")
	env.Invariants(t)
}
