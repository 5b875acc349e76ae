package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// ops asks a server's operators' listener, with the token.
func (s *served) ops(t *testing.T, path string) string {
	t.Helper()
	var n int
	_, err := fmt.Sscan(s.port, &n)
	require.NoError(t, err)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://127.0.0.1:%d%s", n+1, path), nil)
	require.NoError(t, err)
	req.Header.Set("Authorization", "Bearer "+observe.Token([]byte(pgtest.Secret)))
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, res.StatusCode, string(body))
	return string(body)
}

// The logs of two servers are one, filtered by tenant, and followed over the end of one and the beginning of another. What
// was used is written when a server stops.
func TestLogsAndUsageOfServers(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	env.Tenant(t, "globex")
	one, two := serve(t, env), serve(t, env)
	ask := func(s *served, slug, id string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+s.port+"/api/v1/tenant", nil)
		require.NoError(t, err)
		req.Host = slug + ".localhost:" + s.port
		req.Header.Set("X-Request-Id", id)
		res, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		require.NoError(t, res.Body.Close())
	}
	ask(one, "acme", "request-1")
	ask(two, "acme", "request-2")
	ask(two, "globex", "request-3")
	stdout, stderr, code := oneo(t, env, nil, "logs", "-t", "acme", "-o", "json")
	require.Zero(t, code, stderr)
	var lines []struct {
		Tenant  string
		Request string `json:"request_id"`
		Msg     string
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &lines), stdout)
	require.Len(t, lines, 2, stdout)
	require.Equal(t, []string{"request-1", "request-2"}, []string{lines[0].Request, lines[1].Request})
	stdout, stderr, code = oneo(t, env, nil, "logs", "--level", "info")
	require.Zero(t, code, stderr)
	require.Contains(t, stdout, " globex request ")
	require.Equal(t, 2, strings.Count(stdout, " serving "), stdout)

	f := child(env, nil, "logs", "-f", "-t", "*", "-o", "json")
	out, err := f.StdoutPipe()
	require.NoError(t, err)
	story := &buffer{}
	f.Stderr = story
	require.NoError(t, f.Start())
	t.Cleanup(func() { _ = f.Process.Kill() })
	seen := make(chan string, 100)
	go func() {
		defer close(seen)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			seen <- lines.Text()
		}
	}()
	until := func(id string) {
		t.Helper()
		patience := time.After(pgtest.Patience)
		for {
			select {
			case line, ok := <-seen:
				require.True(t, ok, "it has ended: %s", story)
				if strings.Contains(line, `"`+id+`"`) {
					return
				}
			case <-patience:
				require.Failf(t, "not shown", "%s: %s", id, story)
			}
		}
	}
	until("request-3")
	stop := func(s *served) {
		t.Helper()
		require.NoError(t, s.cmd.Process.Signal(syscall.SIGTERM))
		require.NoError(t, s.cmd.Wait(), s.logs)
	}
	stop(one)
	three := serve(t, env)
	ask(two, "globex", "request-4")
	until("request-4")
	ask(three, "acme", "request-5")
	until("request-5")
	require.NoError(t, two.cmd.Process.Kill())
	_ = two.cmd.Wait() // it was killed
	require.Eventually(t, func() bool { return strings.Count(story.String(), "no log of") >= 2 }, pgtest.Patience, 10*time.Millisecond)
	_, stderr, code = oneo(t, env, nil, "logs", "-t", "acme", "-t", "acne")
	require.Equal(t, exitNotFound, code, stderr)
	require.Contains(t, stderr, "did you mean acme?")
	_, stderr, code = oneo(t, env, nil, "logs")
	require.Equal(t, exitSomeFailed, code)
	require.Contains(t, stderr, fmt.Sprintf("/%d: ", two.cmd.Process.Pid), "who does not answer is named")
	stop(three)
	require.NoError(t, f.Process.Signal(syscall.SIGINT))
	require.NoError(t, f.Wait())

	// One request each by the two that were stopped; what the killed one had counted may be lost.
	stdout, stderr, code = oneo(t, env, nil, "tenant", "usage", "acme", "--by", "month", "-o", "json")
	require.Zero(t, code, stderr)
	var used []struct {
		Requests int
		Bytes    int `json:"bytes_out"`
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &used))
	sum := 0
	for _, u := range used {
		sum += u.Requests
		require.Positive(t, u.Bytes)
	}
	require.GreaterOrEqual(t, sum, 2)
	require.LessOrEqual(t, sum, 3)
}

// F93: a log that nobody reads, whose reader has gone, or whose disk is full: requests are answered as if nothing was.
func TestServeWhoseLogIsNotTaken(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	r, w, err := os.Pipe()
	require.NoError(t, err)
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	require.NoError(t, err)
	defer full.Close()
	for name, stderr := range map[string]*os.File{"pipe": w, "disk": full} {
		s := serveInto(t, env, stderr)
		requests := func() {
			t.Helper()
			for range 500 { // a pipe takes less than 400 of their lines
				status, body := s.do(t, "GET", "acme.localhost", "/api/v1/tenant", "", "")
				require.NotEqual(t, http.StatusServiceUnavailable, status, body)
			}
		}
		requests()
		if name == "pipe" {
			require.NoError(t, w.Close())
			require.NoError(t, r.Close()) // the reader is gone
			requests()
		}
		require.GreaterOrEqual(t, strings.Count(s.ops(t, "/logs"), `"msg":"request"`), 500, "they are kept all the same")
		require.NoError(t, s.cmd.Process.Signal(syscall.SIGTERM))
		require.NoError(t, s.cmd.Wait(), name)
	}
}

// Passwords, tokens, cookies, query strings and connection strings are in no line, no metric and no error's text.
func TestNoSecretIsLogged(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	const canary = "feather-of-a-canary"
	add := child(env, nil, "user", "add", "ada@example.com", "-t", "acme", "--password-stdin")
	add.Stdin = strings.NewReader(canary + "-password")
	text, err := add.CombinedOutput()
	require.NoError(t, err, string(text))
	_, token := userKey(t, env, nil, "acme", "bob@example.com")
	s := serve(t, env, "ONEO_LOG_LEVEL=debug", "ONEO_REDIS_URL=redis://user:"+canary+"-redis@127.0.0.1:1/0")
	login := func(password string, want int) {
		t.Helper()
		status, body := s.do(t, "POST", "acme.localhost", "/api/v1/auth/login", "", `{"email":"ada@example.com","password":"`+password+`"}`)
		require.Equal(t, want, status, body)
	}
	login(canary+"-password", http.StatusOK)
	login(canary+"-wrong", http.StatusUnauthorized)
	for _, path := range []string{"/api/v1/me?secret=" + canary, "/" + canary, "/api/v1/pipelines/" + canary, "/api/v1/pipelines?limit=" + canary} {
		s.do(t, "GET", "acme.localhost", path, token, "")
		s.do(t, "GET", "acme.localhost", path, canary+"-token", "")
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+s.port+"/api/v1/me", nil)
	require.NoError(t, err)
	req.Host = "acme.localhost"
	req.Header.Set("Cookie", "oneo_session="+canary+"-cookie")
	req.Header.Set("X-Request-Id", canary+" is no id")
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	seen := map[string]string{"log": s.logs.String(), "/logs": s.ops(t, "/logs"), "/metrics": s.ops(t, "/metrics"), "/stats": s.ops(t, "/stats")}
	var port int
	_, err = fmt.Sscan(s.port, &port)
	require.NoError(t, err)
	res, err = http.Get(fmt.Sprintf("http://127.0.0.1:%d/logs", port+1))
	require.NoError(t, err)
	require.NoError(t, res.Body.Close())
	require.Equal(t, http.StatusUnauthorized, res.StatusCode, "lines name people's addresses: they are for whoever has the token")
	for i, extra := range [][]string{
		{"ONEO_DATABASE_URL=postgres://user:" + canary + "@127.0.0.1:1/x", "ONEO_DATABASE_OWNER_URL=postgres://user:" + canary + "@127.0.0.1:1/x", "ONEO_DATABASE_ACQUIRE_TIMEOUT=100ms"},
		{"ONEO_DATABASE_URL=postgres://user:" + canary + "@:::/x"}, {"ONEO_REDIS_URL=redis://user:" + canary + "@a b"},
	} {
		stdout, stderr, code := oneo(t, env, append(extra, "ONEO_LOG_LEVEL=debug"), "tenant", "list", "--debug", "-v")
		require.NotZero(t, code, stderr)
		seen[fmt.Sprint("command ", i)] = stdout + stderr
	}
	require.Contains(t, seen["log"], "/api/v1/auth/login")
	require.Contains(t, seen["/logs"], "/api/v1/auth/login")
	for where, text := range seen {
		for _, secret := range []string{canary, token, pgtest.Secret} {
			require.NotContains(t, text, secret, where)
		}
	}
}
