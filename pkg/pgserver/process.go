// Package devstack starts PostgreSQL and Redis for a machine that has no servers running: for `oneo dev`, for tests and
// for benchmarks. It promises: they listen on the loopback only; they end with the process that started them, also when
// that is killed; what they keep is in the folder that was given; and a second start on that folder finds it.
package devstack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// process is a child that ends when this process does.
type process struct {
	cmd    *exec.Cmd
	done   chan struct{}
	result error // valid once done is closed
}

// startProcess starts cmd so that the kernel sends it death when this process ends. The signal is tied to the thread
// that started the child, so a goroutine keeps that thread until the child has ended.
func startProcess(cmd *exec.Cmd, death syscall.Signal) (*process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = death
	// A group of its own: a Ctrl-C at the terminal is for us, and we stop the child in order.
	cmd.SysProcAttr.Setpgid = true
	p := &process{cmd: cmd, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err == nil {
			p.result = cmd.Wait()
		}
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

func (p *process) signal(s syscall.Signal) error {
	err := p.cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// stop asks the child to end by each signal in turn, giving it patience each time, and waits for it.
func (p *process) stop(ctx context.Context, patience time.Duration, signals ...syscall.Signal) error {
	for _, s := range append(signals, syscall.SIGKILL) {
		if err := p.signal(s); err != nil {
			return err
		}
		timer := time.NewTimer(patience)
		select {
		case <-p.done:
			timer.Stop()
			return nil
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	<-p.done
	return nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// FreePort finds a port of the loopback that nobody listens on. It looks below those that the system gives out by itself:
// anybody's next connection may take one of these, while a server is still starting or is away between two starts.
func FreePort() (int, error) {
	for range 100 {
		if n := 10_000 + rand.IntN(10_000); portFree(n) {
			return n, nil
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0, errors.New("find a free port: no TCP address")
	}
	return addr.Port, nil
}

// servant is the user that PostgreSQL runs as: ourselves, or, since it refuses root, postgres or nobody.
type servant struct {
	credential *syscall.Credential // nil: ourselves
	uid, gid   int
	name       string
}

func findServant() (servant, error) {
	if os.Geteuid() != 0 {
		return servant{uid: -1, gid: -1}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err := errors.Join(err1, err2); err != nil {
			return servant{}, fmt.Errorf("user %s: %w", name, err)
		}
		return servant{&syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, uid, gid, name}, nil
	}
	return servant{}, fault.New(fault.Unavailable, "PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody").
		WithCode("no_user").WithHint("run oneo as an ordinary user")
}

// own makes a folder that the servant owns, and checks that it can get there.
func (s servant) own(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make a data folder: %w", err)
	}
	if s.credential == nil {
		return nil
	}
	if err := os.Chown(dir, s.uid, s.gid); err != nil {
		return fmt.Errorf("hand the data folder to %s: %w", s.name, err)
	}
	for parent := filepath.Dir(dir); ; parent = filepath.Dir(parent) {
		st, err := os.Stat(parent)
		if err != nil {
			return fmt.Errorf("look at %s: %w", parent, err)
		}
		if sys, ok := st.Sys().(*syscall.Stat_t); ok && st.Mode().Perm()&0o001 == 0 && int(sys.Uid) != s.uid {
			return fault.New(fault.Unavailable, "PostgreSQL runs as the user %s here, who may not enter %s", s.name, parent).
				WithCode("data_folder").WithHint("choose another folder with --data, or `chmod o+x %s`", parent)
		}
		if parent == filepath.Dir(parent) {
			return nil
		}
	}
}

func (s servant) command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.credential}
	return cmd
}

// tail is the end of a log, for an error.
func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return ""
	}
	const most = 2000
	if st.Size() > most {
		if _, err := f.Seek(-most, io.SeekEnd); err != nil {
			return ""
		}
	}
	text, err := io.ReadAll(f)
	if err != nil {
		return ""
	}
	return string(text)
}

// portLost reports whether a server did not start because somebody else was faster to take its port.
func portLost(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Address already in use")
}

func portFree(port int) bool {
	l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		return false
	}
	return l.Close() == nil
}
