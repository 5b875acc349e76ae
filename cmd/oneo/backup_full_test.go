package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// After the whole database was restored elsewhere passwords and keys are those that they were, and nobody is logged in.
func TestLoginsAfterAFullRestore(t *testing.T) {
	t.Parallel()
	const password = "a-long-enough-password-1"
	store := "ONEO_BACKUP_URL=" + t.TempDir()
	f := pgtest.New(t)
	key := adminToken(t, f)
	_, stderr, code := oneo(t, f, nil, "tenant", "create", "acme", "--admin-email", "ada@acme.example")
	require.Zero(t, code, stderr)
	set := child(f, nil, "user", "set-password", "ada@acme.example", "-t", "acme", "--password-stdin")
	set.Stdin = strings.NewReader(password)
	out, err := set.CombinedOutput()
	require.NoError(t, err, string(out))
	login := func(s *served) (int, string) {
		t.Helper()
		status, body := s.do(t, "POST", "acme.localhost", "/api/v1/auth/login", "", `{"email":"ada@acme.example","password":"`+password+`","token":true}`)
		var got struct{ Token string }
		_ = json.Unmarshal([]byte(body), &got) // what is refused has none
		return status, got.Token
	}
	first := serve(t, f)
	status, session := login(first)
	require.Equal(t, http.StatusOK, status)
	require.NotEmpty(t, session)
	status, _ = first.do(t, "GET", "acme.localhost", "/api/v1/me", session, "")
	require.Equal(t, http.StatusOK, status)
	stdout, stderr, code := oneo(t, f, []string{store}, "backup", "create", "--database", "-o", "name")
	require.Zero(t, code, stderr)
	require.NoError(t, first.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, first.cmd.Wait(), first.logs)

	g := pgtest.New(t)
	_, stderr, code = oneo(t, g, []string{store}, "restore", "--database", strings.TrimSpace(stdout), "--yes")
	require.Zero(t, code, stderr)
	second := serve(t, g)
	status, _ = second.do(t, "GET", "acme.localhost", "/api/v1/me", session, "")
	require.Equal(t, http.StatusUnauthorized, status, "a session has come back")
	status, session = login(second)
	require.Equal(t, http.StatusOK, status)
	status, _ = second.do(t, "GET", "acme.localhost", "/api/v1/me", session, "")
	require.Equal(t, http.StatusOK, status)
	status, body := second.do(t, "GET", "localhost", "/api/v1/admin/tenants", key, "")
	require.Equal(t, http.StatusOK, status, body)
	require.NoError(t, second.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, second.cmd.Wait(), second.logs)
}
