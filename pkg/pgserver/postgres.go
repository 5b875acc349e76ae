package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Find finds the folder of PostgreSQL's programs: the newest of the distribution's, or what is in the path.
func Find() (string, error) {
	for _, dir := range candidates() {
		if complete(dir) {
			return dir, nil
		}
	}
	return "", fault.New(fault.Unavailable, "PostgreSQL is not installed on this machine").WithCode("no_postgres").
		WithHint("run scripts/setup.sh, or `apt-get install postgresql`, or set ONEO_DATABASE_URL to a server elsewhere")
}

// FindMajor finds the programs of one major version: a data folder can be read by no other.
func FindMajor(major int) (string, error) {
	for _, dir := range candidates() {
		if !complete(dir) {
			continue
		}
		text, err := exec.Command(filepath.Join(dir, "postgres"), "--version").Output()
		if err != nil {
			continue
		}
		words := strings.Fields(string(text)) // postgres (PostgreSQL) 15.18 (Debian ...)
		if len(words) > 2 && (words[2] == strconv.Itoa(major) || strings.HasPrefix(words[2], strconv.Itoa(major)+".")) {
			return dir, nil
		}
	}
	return "", fault.New(fault.Unavailable, "PostgreSQL %d is not installed on this machine", major).WithCode("no_postgres").
		WithHint("a cluster can only be recovered by programs of its own version: `apt-get install postgresql-%d`", major)
}

func complete(dir string) bool {
	_, err1 := os.Stat(filepath.Join(dir, "postgres"))
	_, err2 := os.Stat(filepath.Join(dir, "initdb"))
	return err1 == nil && err2 == nil
}

func candidates() []string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin") // the patterns are constant
	version := func(dir string) float64 {
		v, err := strconv.ParseFloat(filepath.Base(filepath.Dir(dir)), 64)
		if err != nil {
			return 0
		}
		return v
	}
	slices.SortFunc(found, func(a, b string) int { return int(10 * (version(b) - version(a))) })
	if path, err := exec.LookPath("postgres"); err == nil {
		found = append(found, filepath.Dir(path))
	}
	more, _ := filepath.Glob("/opt/homebrew/opt/postgresql@*/bin")
	return append(append(found, "/usr/local/pgsql/bin", "/usr/pgsql/bin"), more...)
}

// StartOptions say how PostgreSQL is started on a data folder that is there.
type StartOptions struct {
	Bin      string // the folder of its programs
	Data     string
	Log      string            // is appended to
	Settings map[string]string // as in postgresql.conf, and before what stands there
	Gentle   bool              // others come first: least priority for processor and disk
}

// Start starts PostgreSQL as the servant and returns at once.
func Start(s Servant, o StartOptions) (*Process, error) {
	log, err := os.OpenFile(o.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open the log: %w", err)
	}
	defer log.Close()
	args := []string{filepath.Join(o.Bin, "postgres"), "-D", o.Data}
	for k, v := range o.Settings {
		args = append(args, "-c", k+"="+v)
	}
	if o.Gentle {
		args = append(Gently(), args...)
	}
	cmd := s.Command(args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	cmd.Stdout, cmd.Stderr = log, log
	// SIGINT is PostgreSQL's fast shutdown.
	p, err := StartProcess(cmd, syscall.SIGINT)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	return p, nil
}

// Gently is what stands before a command that is to leave processor and disk to others, as far as this machine has it.
func Gently() (prefix []string) {
	for _, words := range [][]string{{"nice", "-n", "19"}, {"ionice", "-c", "3"}} {
		if path, err := exec.LookPath(words[0]); err == nil {
			prefix = append(append(prefix, path), words[1:]...)
		}
	}
	return prefix
}

// Running is the process id of the server that works on a data folder; 0: none does, whatever a killed one has left.
func Running(data string) (int, error) {
	text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read postmaster.pid: %w", err)
	}
	first, _, _ := strings.Cut(string(text), "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(first))
	if err != nil || pid <= 0 || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return 0, nil
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil && strings.TrimSpace(string(name)) != "postgres" {
		return 0, nil // the number is another process's by now
	}
	return pid, nil
}

// Await waits until a server says in its pid file that it takes connections, for a minute. One that does not is stopped.
func Await(ctx context.Context, p *Process, data, log string) error {
	err := await(ctx, p, data, log)
	if err != nil {
		_ = p.Stop(ctx, 5*time.Second, syscall.SIGQUIT) // the reason is told already
	}
	return err
}

func await(ctx context.Context, p *Process, data, log string) error {
	deadline := time.Now().Add(60 * time.Second)
	for {
		if text, err := os.ReadFile(filepath.Join(data, "postmaster.pid")); err == nil {
			lines := strings.Split(string(text), "\n")
			if len(lines) > 7 && strings.TrimSpace(lines[0]) == strconv.Itoa(p.Cmd.Process.Pid) && strings.TrimSpace(lines[7]) == "ready" {
				return nil
			}
		}
		if p.Ended() {
			return fault.New(fault.Unavailable, "PostgreSQL ended while starting; its log says:\n%s", Tail(log)).WithCode("postgres_start")
		}
		if time.Now().After(deadline) {
			return fault.New(fault.Unavailable, "PostgreSQL was not ready within a minute; its log says:\n%s", Tail(log)).WithCode("postgres_start")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}
