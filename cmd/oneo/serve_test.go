package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// plain in the environment of a child asks for oneo as it is built for use. The tests' own binary looks for races, which
// makes it many times slower: those that start hundreds of processes, or migrate hundreds of tenants, do without.
const plain = "plain"

func plainPath() string {
	return filepath.Join(os.TempDir(), fmt.Sprintf("oneo-plain-%d", os.Getpid()))
}

var plainOneo = sync.OnceValues(func() (string, error) {
	path := plainPath()
	out, err := exec.Command("go", "build", "-tags", "nomsgpack", "-trimpath", "-buildvcs=false", "-o", path, ".").CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build oneo: %w: %s", err, out)
	}
	return path, err
})

// child is oneo as a process, with the environment's database.
func child(env *pgtest.Env, extra []string, args ...string) *exec.Cmd {
	binary := os.Args[0]
	if slices.Contains(extra, plain) {
		path, err := plainOneo()
		if err != nil {
			panic(err) // no test of this package can pass then
		}
		binary, extra = path, slices.DeleteFunc(slices.Clone(extra), func(s string) bool { return s == plain })
	}
	cmd := exec.Command(binary, args...)
	cmd.Env = slices.Concat([]string{
		"ONEO_TEST_BE_ONEO=1", "PATH=" + os.Getenv("PATH"), "HOME=/nowhere", "GORACE=" + os.Getenv("GORACE"), "ONEO_REDIS_URL=",
		"ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret,
	}, patience, extra)
	return cmd
}

// patience is the bounds of waiting that a busy machine would meet although nothing is wrong, and no waiting for nobody.
var patience = []string{
	"ONEO_DATABASE_ACQUIRE_TIMEOUT=30s", "ONEO_DATABASE_CONNECT_TIMEOUT=30s", "ONEO_DATABASE_STATEMENT_TIMEOUT=1m", "ONEO_REDIS_TIMEOUT=10s",
	"ONEO_DATABASE_IDLE_IN_TRANSACTION_TIMEOUT=2m",
	"ONEO_SERVER_SHUTDOWN_GRACE=2m", "ONEO_SERVER_READ_HEADER_TIMEOUT=20s",
	"ONEO_MIGRATE_LIVE_SHARE=0", // or runs would rest for the sake of the tests' own sessions
}

// oneo runs a command to its end.
func oneo(t *testing.T, env *pgtest.Env, extra []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := child(env, extra, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// served is a running `oneo serve`.
type served struct {
	cmd  *exec.Cmd
	port string
	logs *buffer
}

func serve(t *testing.T, env *pgtest.Env, extra ...string) *served {
	t.Helper()
	logs := &buffer{}
	s := serveInto(t, env, logs, extra...)
	s.logs = logs
	return s
}

// serveInto is serve with a log that goes elsewhere.
func serveInto(t *testing.T, env *pgtest.Env, stderr io.Writer, extra ...string) *served {
	t.Helper()
	s := &served{port: twoPorts(t), logs: &buffer{}}
	var n int
	_, err := fmt.Sscan(s.port, &n)
	require.NoError(t, err)
	s.cmd = child(env, append([]string{"ONEO_SERVER_ADDR=127.0.0.1:" + s.port, fmt.Sprintf("ONEO_SERVER_OPS_ADDR=127.0.0.1:%d", n+1)}, extra...), "serve")
	s.cmd.Stderr = stderr
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() { _ = s.cmd.Process.Kill() })
	require.Eventually(t, func() bool {
		res, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/readyz", n+1))
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	}, pgtest.Patience, 20*time.Millisecond, "serve did not get ready")
	return s
}

func (s *served) do(t *testing.T, method, host, path, token, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://127.0.0.1:"+s.port+path, strings.NewReader(body))
	require.NoError(t, err)
	req.Host = host + ":" + s.port
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(b)
}

func adminToken(t *testing.T, env *pgtest.Env) string {
	t.Helper()
	_, stderr, code := oneo(t, env, nil, "admin", "add", "root@example.com", "-o", "json")
	require.Zero(t, code, stderr)
	stdout, stderr, code := oneo(t, env, nil, "key", "add", "--admin", "--user", "root@example.com", "--name", "test", "-o", "json")
	require.Zero(t, code, stderr)
	var key struct{ Token string }
	require.NoError(t, json.Unmarshal([]byte(stdout), &key))
	require.NotEmpty(t, key.Token)
	return key.Token
}

func instances(t *testing.T, env *pgtest.Env) (n int) {
	t.Helper()
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select count(*) from public.instances`).Scan(&n))
	return n
}

// An instance enters itself, provisions by its own worker, and leaves nothing behind when it is asked to end.
func TestServe(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	token := adminToken(t, env)
	s := serve(t, env)
	require.Eventually(t, func() bool { return instances(t, env) == 1 }, pgtest.Patience, 50*time.Millisecond)
	status, body := s.do(t, "POST", "localhost", "/api/v1/admin/tenants", token, `{"slug":"acme"}`)
	require.Equal(t, http.StatusAccepted, status, body)
	require.Eventually(t, func() bool {
		status, _ := s.do(t, "GET", "acme.localhost", "/api/v1/me", "", "")
		return status == http.StatusUnauthorized
	}, pgtest.Patience, 50*time.Millisecond, "the tenant is not served")
	status, _ = s.do(t, "GET", "globex.localhost", "/api/v1/me", "", "")
	require.Equal(t, http.StatusNotFound, status)

	require.NoError(t, s.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, s.cmd.Wait(), s.logs)
	require.Zero(t, instances(t, env))
	_, err := net.DialTimeout("tcp", "127.0.0.1:"+s.port, time.Second)
	require.Error(t, err)
	env.Invariants(t)
}

// Without an owner's connection tenants are served; what makes or changes them is refused, and nothing is queued.
func TestServeWithoutOwner(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	token := adminToken(t, env)
	env.Tenant(t, "acme")
	s := serve(t, env, "ONEO_DATABASE_OWNER_URL=")
	status, body := s.do(t, "GET", "localhost", "/api/v1/admin/tenants", token, "")
	require.Equal(t, http.StatusOK, status, body)
	require.Contains(t, body, `"slug":"acme"`)
	status, body = s.do(t, "GET", "acme.localhost", "/api/v1/me", "", "")
	require.Equal(t, http.StatusUnauthorized, status, body)
	status, body = s.do(t, "POST", "localhost", "/api/v1/admin/tenants", token, `{"slug":"globex"}`)
	require.Equal(t, http.StatusServiceUnavailable, status, body)
	require.Contains(t, body, "provisioning_unavailable")
	var queued int
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select count(*) from public.operations where state <> 'done'`).Scan(&queued))
	require.Zero(t, queued)
	require.NoError(t, s.cmd.Process.Signal(syscall.SIGINT))
	require.NoError(t, s.cmd.Wait(), s.logs)
}

// What keeps an instance from starting is one sentence and an exit code, and nothing is served meanwhile.
func TestServeRefuses(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer taken.Close()
	free := "ONEO_SERVER_ADDR=127.0.0.1:0"
	for _, c := range []struct {
		name  string
		extra []string
		code  int
		says  string
	}{
		{"port taken", []string{"ONEO_SERVER_ADDR=" + taken.Addr().String(), "ONEO_SERVER_OPS_ADDR="}, 1, "already"},
		{"no secret", []string{free, "ONEO_SERVER_SECRET="}, 2, "server.secret"},
		{"short secret", []string{free, "ONEO_SERVER_SECRET=short"}, 2, "server.secret"},
		{"database away", []string{free, "ONEO_DATABASE_URL=postgres://oneo_app@127.0.0.1:1/oneo", "ONEO_DATABASE_ACQUIRE_TIMEOUT=300ms"}, 5, "127.0.0.1:1"},
		{"owner unknown", []string{free, "ONEO_DATABASE_OWNER_URL=" + strings.Replace(env.Group.OwnerURL, "oneo_owner", "nobody_here", 1)}, 5, "refused"},
		{"no such setting", []string{free, "ONEO_SERVER_ADR=127.0.0.1:0"}, 2, "ONEO_SERVER_ADR"},
	} {
		_, stderr, code := oneo(t, env, c.extra, "serve")
		require.Equal(t, c.code, code, "%s: %s", c.name, stderr)
		require.Contains(t, stderr, c.says, c.name)
		require.NotContains(t, stderr, pgtest.Secret, c.name)
	}
	// A schema that is behind, as before a deploy's migration.
	admin := pgtest.Admin(t, env.AdminURL)
	_, err = admin.Exec(t.Context(), `delete from public.ledger where set = 'shared'`)
	require.NoError(t, err)
	_, stderr, code := oneo(t, env, []string{free}, "serve")
	require.Equal(t, 13, code, stderr)
	require.Contains(t, stderr, "oneo migrate --shared")
}
