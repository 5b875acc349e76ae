package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

const (
	watchedLoad = 20 // requests a second to the server that is watched
	screenWide  = 120
	screenHigh  = 40
)

// watched is what the dashboard cost on each screen.
type watched []struct {
	tenants    int
	screen     string
	peakMB     float64 // since it was started
	cpu        float64 // of one core
	statements float64 // a second
	scripts    float64 // a second
}

// watch measures `oneo tui` in a terminal beside a server that counts all tenants.
func (in *installation) watch(ctx context.Context, to *watched) error {
	p, err := in.serve(ctx)
	if err != nil {
		return err
	}
	defer p.stop()
	if _, err := in.drive(ctx, p, false, in.warm()); err != nil {
		return err
	}
	asked, err := readAlong("127.0.0.1:" + strconv.Itoa(in.b.pg.Port()))
	if err != nil {
		return err
	}
	defer asked.listener.Close()

	loaded, stop := context.WithCancel(ctx)
	defer stop()
	load := make(chan []answer, 1)
	go func() { load <- in.pace(loaded, p, watchedLoad, everyone(len(in.slugs))) }()

	through := func(url string) string { return strings.Replace(url, asked.server, asked.listener.Addr().String(), 1) }
	t, err := openTerminal(ctx, in.b.dir, in.environment("ONEO_DATABASE_URL="+through(in.group.URL), "ONEO_DATABASE_OWNER_URL="+through(in.group.OwnerURL)),
		in.b.binary, "tui", "--read-only")
	if err != nil {
		return err
	}
	defer t.close()
	for _, s := range []struct {
		name, key string
		shows     []string
	}{
		{"home", "1", []string{"TRAFFIC", "● active", "answering       1 of 1"}},
		{"tenants", "2", []string{in.slugs[0]}},
	} {
		if _, err := t.tmux(ctx, "send-keys", s.key); err != nil {
			return err
		}
		if err := t.sees(ctx, s.shows...); err != nil {
			return err
		}
		if !pauseFor(ctx, 5*time.Second) { // what a screen asks once is over
			return ctx.Err()
		}
		worked, err := workOf(t.pid)
		if err != nil {
			return err
		}
		statements, scripts, start := asked.statements.Load(), asked.scripts.Load(), time.Now()
		if !pauseFor(ctx, 3*in.b.duration) {
			return ctx.Err()
		}
		took := time.Since(start).Seconds()
		more, err := workOf(t.pid)
		if err != nil {
			return err
		}
		peak, err := memoryOf(t.pid, "VmHWM:")
		if err != nil {
			return err
		}
		if err := t.sees(ctx, s.shows...); err != nil { // still
			return err
		}
		statements, scripts = asked.statements.Load()-statements, asked.scripts.Load()-scripts
		if statements == 0 {
			return fmt.Errorf("the dashboard's %s screen asked the database nothing", s.name)
		}
		*to = append(*to, watched{{len(in.slugs), s.name, peak, (more - worked).Seconds() / took, float64(statements) / took, float64(scripts) / took}}...)
	}
	stop()
	for _, a := range <-load {
		if a.status != "" {
			return fmt.Errorf("beside the dashboard a request was answered %s", a.status)
		}
	}
	return nil
}

func (all watched) print(b *bench) {
	b.printf("### The dashboard\n")
	b.printf("`oneo tui` in a terminal of %d by %d, %s on each screen, beside one server that counts all tenants and answers %d requests/s. Statements are counted on the wire; scripts are the begin and commit around them, and the pings of connections that stood idle.\n",
		screenWide, screenHigh, 3*b.duration, watchedLoad)
	b.printf("| tenants | screen | most MB so far | %% of a core | statements/s | scripts/s |\n| --- | --- | --- | --- | --- | --- |")
	for _, s := range all {
		b.printf("| %d | %s | %.1f | %.1f | %.2f | %.2f |", s.tenants, s.screen, s.peakMB, 100*s.cpu, s.statements, s.scripts)
	}
	b.printf("\nGoal: stated; at most one statement a second.\n")
}

// workOf is the processor time that a process has taken.
func workOf(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), ") ") // behind the name, which is oneo
	fields := strings.Fields(rest)
	if len(fields) < 13 {
		return 0, fmt.Errorf("the kernel tells too little of process %d", pid)
	}
	user, uerr := strconv.Atoi(fields[11])
	system, serr := strconv.Atoi(fields[12])
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(uerr, serr) // Linux counts in hundredths of a second
}

// terminal is tmux with one program in it.
type terminal struct {
	socket string
	env    []string
	pid    int // of the program
}

func openTerminal(ctx context.Context, dir string, env []string, program ...string) (*terminal, error) {
	settings := filepath.Join(dir, "tmux.conf")
	if err := os.WriteFile(settings, []byte("set -g remain-on-exit on\n"), 0o600); err != nil { // what it said at its end can be read
		return nil, err
	}
	t := &terminal{socket: filepath.Join(dir, "tmux"), env: append(env, "LC_ALL=C.UTF-8", "TERM=xterm-256color")}
	pid, err := t.tmux(ctx, append([]string{"-f", settings, "new-session", "-d", "-P", "-F", "#{pane_pid}",
		"-x", strconv.Itoa(screenWide), "-y", strconv.Itoa(screenHigh), "env", "TERM=xterm-256color"}, program...)...)
	if err != nil {
		return nil, err
	}
	if t.pid, err = strconv.Atoi(strings.TrimSpace(pid)); err != nil {
		t.close()
		return nil, err
	}
	return t, nil
}

func (t *terminal) tmux(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "tmux", append([]string{"-u", "-S", t.socket}, args...)...)
	cmd.Env = t.env
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("tmux %s: %w: %s", args[0], err, errs.String())
	}
	return string(out), nil
}

func (t *terminal) close() { _, _ = t.tmux(context.Background(), "kill-server") }

// sees waits until all parts are on the screen.
func (t *terminal) sees(ctx context.Context, parts ...string) error {
	screen := ""
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		var err error
		if screen, err = t.tmux(ctx, "capture-pane", "-p"); err != nil {
			return err
		}
		missing := ""
		for _, p := range parts {
			if !strings.Contains(screen, p) {
				missing = p
			}
		}
		if missing == "" {
			return nil
		}
		if !pauseFor(ctx, 100*time.Millisecond) {
			return ctx.Err()
		}
	}
	return fmt.Errorf("the screen never showed %s:\n%s", strings.Join(parts, ", "), screen)
}

// wire stands between a program and PostgreSQL and counts what is asked.
type wire struct {
	listener   net.Listener
	server     string
	statements atomic.Int64 // Execute
	scripts    atomic.Int64 // Query
}

func readAlong(server string) (*wire, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	w := &wire{listener: l, server: server}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			go w.pass(c)
		}
	}()
	return w, nil
}

// pass hands on what both say until one of them ends.
func (w *wire) pass(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", w.server)
	if err != nil {
		return // the program sees a connection that ends, and says so
	}
	defer server.Close()
	go func() {
		defer client.Close()
		_, _ = io.Copy(client, server)
	}()
	_ = w.read(bufio.NewReader(io.TeeReader(client, server)))
}

// read counts a client's messages: a byte that tells the kind, which the first one has not, and the length without it.
func (w *wire) read(from *bufio.Reader) error {
	var kind byte
	length := make([]byte, 4)
	for {
		if _, err := io.ReadFull(from, length); err != nil {
			return err
		}
		if _, err := from.Discard(int(binary.BigEndian.Uint32(length)) - len(length)); err != nil {
			return err
		}
		switch kind {
		case 'E':
			w.statements.Add(1)
		case 'Q':
			w.scripts.Add(1)
		}
		var err error
		if kind, err = from.ReadByte(); err != nil {
			return err
		}
	}
}
