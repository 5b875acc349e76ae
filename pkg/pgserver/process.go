// Package pgserver runs servers on this machine, and PostgreSQL's own programs. It promises: a server ends with the process that
// started it, also when that is killed; PostgreSQL, which refuses root, runs as a user who may; and a start says what
// the server's log says when it fails.
package pgserver

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

// Process is a child that ends when this process does.
type Process struct {
	Cmd    *exec.Cmd
	Done   chan struct{} // closed when it has ended
	Result error         // valid once Done is closed
}

// StartProcess starts cmd so that the kernel sends it death when this process ends. The signal is tied to the thread
// that started the child, so a goroutine keeps that thread until the child has ended.
func StartProcess(cmd *exec.Cmd, death syscall.Signal) (*Process, error) {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = death
	// A group of its own: a Ctrl-C at the terminal is for us, and we stop the child in order.
	cmd.SysProcAttr.Setpgid = true
	p := &Process{Cmd: cmd, Done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err == nil {
			p.Result = cmd.Wait()
		}
		close(p.Done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// Signal sends a signal, to one that has ended too.
func (p *Process) Signal(s syscall.Signal) error {
	err := p.Cmd.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// Stop asks the child to end by each signal in turn, giving it patience each time, and waits for it.
func (p *Process) Stop(ctx context.Context, patience time.Duration, signals ...syscall.Signal) error {
	for _, s := range append(signals, syscall.SIGKILL) {
		if err := p.Signal(s); err != nil {
			return err
		}
		timer := time.NewTimer(patience)
		select {
		case <-p.Done:
			timer.Stop()
			return nil
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
	<-p.Done
	return nil
}

// Ended reports whether it has.
func (p *Process) Ended() bool {
	select {
	case <-p.Done:
		return true
	default:
		return false
	}
}

// FreePort finds a port of the loopback that nobody listens on. It looks below those that the system gives out by itself:
// anybody's next connection may take one of these, while a server is still starting or is away between two starts.
func FreePort() (int, error) {
	for range 100 {
		if n := 10_000 + rand.IntN(10_000); PortFree(n) {
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

// Servant is the user that PostgreSQL runs as: ourselves, or, since it refuses root, postgres or nobody.
type Servant struct {
	credential *syscall.Credential // nil: ourselves
	uid, gid   int
	name       string
}

// FindServant finds the user that PostgreSQL can be run as.
func FindServant() (Servant, error) {
	if os.Geteuid() != 0 {
		return Servant{uid: -1, gid: -1}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		u, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(u.Uid)
		gid, err2 := strconv.Atoi(u.Gid)
		if err := errors.Join(err1, err2); err != nil {
			return Servant{}, fmt.Errorf("user %s: %w", name, err)
		}
		return Servant{&syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, uid, gid, name}, nil
	}
	return Servant{}, fault.New(fault.Unavailable, "PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody").
		WithCode("no_user").WithHint("run oneo as an ordinary user")
}

// Own makes a folder that the Servant owns, and checks that it can get there.
func (s Servant) Own(dir string) error {
	// Who is to get to the last folder gets through those before it.
	if err := errors.Join(os.MkdirAll(filepath.Dir(dir), 0o755), os.MkdirAll(dir, 0o700)); err != nil {
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

// Chown hands one file or folder to the servant, if that is somebody else.
func (s Servant) Chown(path string) error {
	if s.credential == nil {
		return nil
	}
	return os.Chown(path, s.uid, s.gid)
}

// Lchown is Chown of a link itself.
func (s Servant) Lchown(path string) error {
	if s.credential == nil {
		return nil
	}
	return os.Lchown(path, s.uid, s.gid)
}

// Command is a program that the servant runs.
func (s Servant) Command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.credential}
	return cmd
}

// Tail is the end of a log, for an error.
func Tail(path string) string {
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

// PortLost reports whether a server did not start because somebody else was faster to take its port.
func PortLost(err error) bool {
	return err != nil && strings.Contains(err.Error(), "Address already in use")
}

// PortFree reports whether nobody listens on a port of the loopback.
func PortFree(port int) bool {
	l, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err != nil {
		return false
	}
	return l.Close() == nil
}
