package main

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// What a command takes away from an administrator counts at the servers at once, also where they know only the user
// from it and not the tokens.
func TestAdministratorsTokensEndWithTheCommand(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	redis := []string{"ONEO_REDIS_URL=" + pgtest.Redis(t).URL(), "ONEO_CACHE_LOCAL_TTL=1ms", "ONEO_CACHE_SHARED_TTL=1h"}
	ask := func(s *served, token string) int {
		status, _ := s.do(t, "GET", "localhost", "/api/v1/admin/tenants", token, "")
		return status
	}
	command := func(extra []string, into any, args ...string) string {
		t.Helper()
		stdout, stderr, code := oneo(t, env, extra, append(args, "-o", "json")...)
		require.Zero(t, code, "%v: %s", args, stderr)
		if into != nil {
			require.NoError(t, json.Unmarshal([]byte(stdout), into), stdout)
		}
		return stderr
	}
	root := adminToken(t, env)
	var eve struct{ Password string }
	var kept, ended struct{ ID, Token string }
	command(redis, &eve, "admin", "add", "eve@example.com")
	command(redis, &kept, "key", "add", "--admin", "--user", "eve@example.com", "--name", "kept")
	command(redis, &ended, "key", "add", "--admin", "--user", "eve@example.com", "--name", "ended")
	s := serve(t, env, redis...)
	for _, token := range []string{root, kept.Token, ended.Token} {
		require.Equal(t, http.StatusOK, ask(s, token))
	}
	command(redis, nil, "key", "revoke", "--admin", ended.ID)
	require.Equal(t, http.StatusUnauthorized, ask(s, ended.Token))
	require.Equal(t, http.StatusOK, ask(s, kept.Token))

	status, body := s.do(t, "POST", "localhost", "/api/v1/auth/login", "", `{"email":"eve@example.com","password":"`+eve.Password+`","token":true}`)
	require.Equal(t, http.StatusOK, status, body)
	var session struct{ Token string }
	require.NoError(t, json.Unmarshal([]byte(body), &session))
	require.Equal(t, http.StatusOK, ask(s, session.Token))
	stderr := command(redis, nil, "admin", "disable", "eve@example.com")
	require.NotContains(t, stderr, "Redis")
	for _, token := range []string{kept.Token, session.Token} {
		require.Equal(t, http.StatusUnauthorized, ask(s, token))
	}
	require.Equal(t, http.StatusOK, ask(s, root), "nobody else's tokens end")

	var last struct{ ID string }
	command(redis, &last, "key", "add", "--admin", "--user", "root@example.com", "--name", "last")
	stderr = command([]string{"ONEO_REDIS_URL=redis://127.0.0.1:1"}, nil, "key", "revoke", "--admin", last.ID)
	require.Contains(t, stderr, "Redis has not taken", "whoever revokes a key must learn that servers may not know yet")
}
