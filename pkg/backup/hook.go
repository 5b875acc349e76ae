package backup

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unicode"
)

// hookEvent is what a program reads from its standard input.
type hookEvent struct {
	Event    string   `json:"event"` // before or after
	OK       bool     `json:"ok"`    // after: there is a backup
	Error    string   `json:"error,omitempty"`
	Store    string   `json:"store"`
	Manifest Manifest `json:"backup"` // as far as it is known
}

// hookWait is how long what a program has left behind may hold its output.
const hookWait = 5 * time.Second

// keptBack are names of the environment, or how they begin, that a program does not see: what configures oneo and its store.
var keptBack = []string{"ONEO_", "DATABASE_URL=", "REDIS_URL=", "AWS_ACCESS_KEY_ID=", "AWS_SECRET_ACCESS_KEY=", "AWS_SESSION_TOKEN="}

func (b *Backups) hook(ctx context.Context, name string, program []string, ev hookEvent) error {
	ev.Store = b.o.Store.String()
	return Tell(ctx, name, program, b.o.Environ, b.o.HookTimeout, ev)
}

// Tell runs a program with its arguments to its end, in a process group of its own that ends with ctx, or when the timeout is
// over, and gives it what as JSON on standard input; no program: it does nothing. What configures oneo is taken out of environ,
// ONEO_HOOK is name, and more is added. The program's words are told only when it fails.
func Tell(ctx context.Context, name string, program, environ []string, timeout time.Duration, what any, more ...string) error {
	if len(program) == 0 {
		return nil
	}
	in, err := json.Marshal(what)
	if err != nil {
		return fmt.Errorf("write for the program: %w", err)
	}
	tctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(tctx, program[0], program[1:]...)
	said := &tail{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(append(in, '\n')), said, said
	for _, kv := range environ {
		if !slices.ContainsFunc(keptBack, func(name string) bool { return strings.HasPrefix(kv, name) }) {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	cmd.Env = append(append(cmd.Env, "ONEO_HOOK="+name), more...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = hookWait
	err = cmd.Run()
	var exit *exec.ExitError
	switch {
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // it did its work, and left somebody behind
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case tctx.Err() != nil:
		return fmt.Errorf("%s: was ended, as it was not done after %s", program[0], timeout)
	case errors.As(err, &exit) && said.String() != "":
		return fmt.Errorf("%s: %w: %s", program[0], err, said)
	}
	return fmt.Errorf("%s: %w", program[0], err)
}

// tail keeps the end of what is written. Who writes may be somebody who was left behind, and outlives the wait.
type tail struct {
	mu   sync.Mutex
	text []byte
}

// maxTail is how much is kept, in bytes.
const maxTail = 2 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-maxTail):]
	return len(p), nil
}

// String is the text in one line, without what would steer a terminal.
func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	text := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(string(t.text), "?"))
	return strings.Join(strings.Fields(text), " ")
}
