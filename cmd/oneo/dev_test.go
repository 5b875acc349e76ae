package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// devProcess is a running `oneo dev`.
type devProcess struct {
	cmd            *exec.Cmd
	port           string
	stdout, stderr *buffer
}

// buffer is a bytes.Buffer that a process writes while a test reads.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

var given sync.Map // the ports that twoPorts has found: what takes them may not have begun to listen

// twoPorts finds a free port whose next one is free too: dev serves on the first, and health on the second.
func twoPorts(t *testing.T) string {
	t.Helper()
	// Below those that the system gives out by itself: the servers of other tests take them between now and the use.
	for range 200 {
		n := 20000 + 2*rand.IntN(5000)
		if _, taken := given.LoadOrStore(n, true); taken {
			continue
		}
		a, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n))
		if err != nil {
			continue
		}
		b, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n+1))
		require.NoError(t, a.Close())
		if err == nil {
			require.NoError(t, b.Close())
			return fmt.Sprint(n)
		}
	}
	t.Fatal("no two free ports")
	return ""
}

func startDev(t *testing.T, dir string, settings ...string) *devProcess {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	p := &devProcess{port: twoPorts(t), stdout: &buffer{}, stderr: &buffer{}}
	p.cmd = exec.Command(self, "dev", "--data", dir, "--addr", "127.0.0.1:"+p.port)
	p.cmd.Env = append(append(os.Environ(), "ONEO_TEST_BE_ONEO=1"), settings...)
	p.cmd.Stdout, p.cmd.Stderr = p.stdout, p.stderr
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() { _ = p.cmd.Process.Kill() })
	require.Eventually(t, func() bool { return strings.Contains(p.stdout.String(), "Ctrl-C stops") }, 3*pgtest.Patience, 20*time.Millisecond,
		"dev did not get ready:\n%s", p.stderr)
	return p
}

func (p *devProcess) stop(t *testing.T) int {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGINT))
	err := p.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		t.Log(p.stderr)
		return exit.ExitCode()
	}
	require.NoError(t, err)
	return 0
}

// call is one of the printed curl lines; the port differs from start to start.
type call struct{ token, host, path string }

var curlLine = regexp.MustCompile(`curl -s -H 'Authorization: Bearer ([^']+)' '?http://([^:/]+):\d+([^'\s]*)`)

func (p *devProcess) curl(t *testing.T) []call {
	t.Helper()
	var calls []call
	for _, m := range curlLine.FindAllStringSubmatch(p.stdout.String(), -1) {
		calls = append(calls, call{m[1], m[2], m[3]})
	}
	return calls
}

func (p *devProcess) get(t *testing.T, c call) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://127.0.0.1:"+p.port+c.path, nil)
	require.NoError(t, err)
	req.Host = c.host + ":" + p.port
	req.Header.Set("Authorization", "Bearer "+c.token)
	res, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	require.NoError(t, err)
	return res.StatusCode, string(body)
}
