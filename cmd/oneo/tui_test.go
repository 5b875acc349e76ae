package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tui"
)

// terminal is tmux with one program in it.
type terminal struct {
	t      *testing.T
	socket string
}

// inTerminal runs a shell script in a terminal of its own.
func inTerminal(t *testing.T, script string) *terminal {
	t.Helper()
	_, err := exec.LookPath("tmux")
	require.NoError(t, err, "scripts/setup.sh --ci installs tmux")
	dir := t.TempDir()
	file := filepath.Join(dir, "script")
	require.NoError(t, os.WriteFile(file, []byte(script), 0o755))
	x := &terminal{t, filepath.Join(dir, "tmux")}
	x.tmux("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", "/bin/sh", file)
	t.Cleanup(func() { _ = exec.Command("tmux", "-S", x.socket, "kill-server").Run() })
	return x
}

func (x *terminal) tmux(args ...string) string {
	x.t.Helper()
	cmd := exec.Command("tmux", append([]string{"-u", "-S", x.socket}, args...)...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "TERM=xterm-256color", "HOME=/nowhere"}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	require.NoError(x.t, cmd.Run(), "tmux %v: %s", args, errs.String())
	return out.String()
}

func (x *terminal) keys(keys ...string) {
	x.t.Helper()
	for _, k := range keys {
		x.tmux("send-keys", k)
	}
}

func (x *terminal) screen() string {
	x.t.Helper()
	return x.tmux("capture-pane", "-p")
}

// sees waits until all parts are on the screen.
func (x *terminal) sees(parts ...string) string {
	x.t.Helper()
	return x.until("sees "+strings.Join(parts, ", "), func(screen string) bool {
		for _, p := range parts {
			if !strings.Contains(screen, p) {
				return false
			}
		}
		return true
	})
}

func (x *terminal) until(what string, holds func(string) bool) string {
	x.t.Helper()
	screen := ""
	for end := time.Now().Add(3 * pgtest.Patience); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if screen = x.screen(); holds(screen) {
			return screen
		}
	}
	x.t.Fatalf("it never %s:\n%s", what, screen)
	return ""
}

// TestTheDashboardInATerminal drives `oneo tui` on the demo's data as a person does.
func TestTheDashboardInATerminal(t *testing.T) {
	t.Parallel()
	_, err := pgserver.Find()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "oneo-tui-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	dev := startDev(t, dir)
	binary, err := plainOneo()
	require.NoError(t, err)
	script := func(before, args string) string {
		return fmt.Sprintf(". %s/oneo.env\nexport HOME=/nowhere %s\n%s %s\necho \"code $?\"\nexec sleep 1000\n", dir, before, binary, args)
	}
	state := func(name string) string {
		var all []struct{ Tenant, State string }
		out, err := exec.Command("/bin/sh", "-c", fmt.Sprintf(". %s/oneo.env; %s tenant list -o json", dir, binary)).Output()
		require.NoError(t, err)
		require.NoError(t, json.Unmarshal(out, &all))
		for _, one := range all {
			if one.Tenant == name {
				return one.State
			}
		}
		return ""
	}

	x := inTerminal(t, script("TERM=xterm-256color", "tui"))
	x.sees("oneo", "home", "TENANTS", "● active", "SERVERS", "POSTGRESQL")
	x.keys(":", "tena", "Tab", "Enter")
	x.sees("tenants", "central", "east", "west")
	x.keys("/", "ea", "Enter")
	screen := x.sees("1 of 3 · filter ea")
	require.NotContains(t, screen, "central")
	x.keys("s")
	x.sees("oneo tenant suspend east", "enter: run it")
	require.Equal(t, "active", state("east"), "nothing runs before enter")
	x.keys("Enter")
	x.sees("$ oneo tenant suspend east", " done ", "z: undo", "◐ suspended")
	require.Equal(t, "suspended", state("east"))
	x.keys("z")
	x.sees("oneo tenant resume east", "enter: run it")
	x.keys("Enter")
	x.sees("$ oneo tenant resume east", " done ", "● active")
	require.Equal(t, "active", state("east"))
	x.keys("Escape")
	x.until("closes the output", func(s string) bool { return !strings.Contains(s, "$ oneo") })
	for key, part := range map[string]string{"3": "migrations", "4": "backups", "5": "queries", "6": "locks", "7": "operations", "8": "tenant.suspend", "9": "central.localhost", "0": "logs"} {
		x.keys(key)
		x.sees(part)
	}
	x.keys("2")
	x.sees("east")
	x.keys("Enter")
	x.sees("users east", "demo@example.com")
	x.keys("?")
	x.sees("The users of one tenant")
	x.keys("q")
	x.sees("code 0")

	x = inTerminal(t, script("TERM=xterm-256color NO_COLOR=1", "tui --read-only"))
	x.sees("read-only", "● active")
	require.NotRegexp(t, `\x1b\[[0-9;]*(3[0-8]|4[0-8]|9[0-7])m`, x.tmux("capture-pane", "-p", "-e"), "NO_COLOR leaves colours out")
	x.keys("2")
	x.sees("central")
	x.keys("s")
	x.sees("read-only: `:unlock`")
	for _, size := range [][2]string{{"10", "3"}, {"1", "1"}, {"200", "50"}} {
		x.tmux("resize-window", "-x", size[0], "-y", size[1])
	}
	x.sees("central.localhost")
	x.keys("C-c")
	x.sees("code 0")
	require.Equal(t, 0, dev.stop(t))
}

func TestNoDashboardWithoutATerminal(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	out, errs, code := oneo(t, env, nil, "tui")
	require.Equal(t, exitUsage, code)
	require.Empty(t, out)
	require.Contains(t, errs, "the dashboard needs a terminal")
	require.Contains(t, errs, "oneo status")
	require.Contains(t, errs, "oneo tenant list")
}

// TestKeysAreDocumented holds docs/tui.md and the dashboard's own help to one table.
func TestKeysAreDocumented(t *testing.T) {
	t.Parallel()
	const path, begin, end = "../../docs/tui.md", "<!-- keys: begin -->\n", "<!-- keys: end -->"
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	before, rest, ok := strings.Cut(string(text), begin)
	require.True(t, ok)
	got, after, ok := strings.Cut(rest, end)
	require.True(t, ok)
	want := "\n" + tui.Keys() + "\n"
	if os.Getenv("ONEO_UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(path, []byte(before+begin+want+end+after), 0o644))
		return
	}
	require.Equal(t, want, got, "make golden")
}

func TestReadingsAreWhatServersTell(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	server := tui.Server{ID: uuid.NewString()}
	got := readingOf(server, observe.Stats{
		At: at, All: observe.Load{Requests: 7, Errors: 1, Refused: 2, InFlight: 3, DatabaseSeconds: 0.5, P50: 1, P95: 2, P99: 3},
		Tenants: []observe.TenantLoad{{Number: 4, Tenant: "acme", Load: observe.Load{Requests: 5}}},
		Pools:   []observe.Pool{{Group: "main", Max: 32, InUse: 4, Waits: 6, Retired: 1}},
		Cache:   observe.Cache{Redis: true, Up: true, Hits: 8, Misses: 2, MemoryBytes: 99}, Runtime: observe.Runtime{MemoryBytes: 1000},
	})
	require.Equal(t, tui.Reading{
		Server: server, At: at, All: tui.Load{Requests: 7, Errors: 1, Refused: 2, InFlight: 3, DatabaseSeconds: 0.5, P50: 1, P95: 2, P99: 3},
		Tenants: []tui.TenantLoad{{Number: 4, Tenant: "acme", Load: tui.Load{Requests: 5}}},
		Pools:   []tui.Pool{{Group: "main", Max: 32, InUse: 4, Waits: 6, Retired: 1}},
		Redis:   tui.Redis{Set: true, Up: true, Hits: 8, Misses: 2, Memory: 99}, Memory: 1000,
	}, got)
	require.Equal(t, tui.LogLine{At: at, Level: "WARN", Server: "app1/7", Tenant: "acme", Message: "slow", Request: "r", Fields: "status=200 took=1s b=true ms=12"},
		logLine(observe.LogLine{Instance: registry.Instance{Host: "app1", PID: 7}, At: at, Level: "WARN", Message: "slow",
			Attrs: map[string]any{"tenant": "acme", "request_id": "r", "ms": json.Number("12"), "b": true, "took": "1s", "status": json.Number("200"), "empty": ""}}))
	require.Equal(t, "3 lines are gone", logLine(observe.LogLine{Missed: 3}).Message)
}
