package devstack

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
)

// RedisOptions says how Redis is started.
type RedisOptions struct {
	Dir  string            // holds its files, and with Keep its port and password
	Port int               // 0: any free one
	Keep bool              // snapshots and append-only file in Dir; otherwise nothing outlives the server
	Conf map[string]string // as in redis.conf
}

// Redis is a running server, or one inside this process where none is installed.
type Redis struct {
	opts     RedisOptions
	port     int
	password string
	process  *pgserver.Process // nil: in process
	inside   *miniredis.Miniredis
	stopTick func()
}

// StartRedis starts redis-server, or, where it is not installed, one inside this process that keeps nothing. It returns
// when the server answers.
func StartRedis(ctx context.Context, o RedisOptions) (*Redis, error) {
	path, absent := exec.LookPath("redis-server")
	for attempt := 1; ; attempt++ {
		r := &Redis{opts: o, port: o.Port}
		if err := r.recall(); err != nil {
			return nil, err
		}
		if absent != nil {
			return r, r.startInside()
		}
		if err := r.start(ctx, path); !pgserver.PortLost(err) || o.Port != 0 || attempt == portTries {
			return r, err
		}
	}
}

// recall chooses port and password: with Keep those of the last start, so that what was told of them stays true.
func (r *Redis) recall() error {
	file := filepath.Join(r.opts.Dir, "redis.port")
	if r.opts.Keep {
		if text, err := os.ReadFile(file); err == nil {
			port, password, _ := strings.Cut(strings.TrimSpace(string(text)), " ")
			if n, err := strconv.Atoi(port); err == nil && (r.port == 0 || r.port == n) && pgserver.PortFree(n) && len(password) == 32 {
				r.port, r.password = n, password
				return nil
			}
		}
	}
	b := make([]byte, 16)
	if _, err := rand.Read(b); err != nil {
		return fmt.Errorf("make a password: %w", err)
	}
	r.password = hex.EncodeToString(b)
	if r.port == 0 {
		var err error
		if r.port, err = pgserver.FreePort(); err != nil {
			return err
		}
	}
	if !r.opts.Keep {
		return nil
	}
	return os.WriteFile(file, []byte(strconv.Itoa(r.port)+" "+r.password+"\n"), 0o600)
}

func (r *Redis) startInside() error {
	r.inside = miniredis.NewMiniRedis()
	r.inside.RequireAuth(r.password)
	if err := r.inside.StartAddr("127.0.0.1:" + strconv.Itoa(r.port)); err != nil {
		return fmt.Errorf("start Redis in process: %w", err)
	}
	// Its clock stands still unless it is moved.
	done := make(chan struct{})
	var ticking sync.WaitGroup
	ticking.Go(func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				r.inside.FastForward(time.Second)
			case <-done:
				return
			}
		}
	})
	r.stopTick = func() { close(done); ticking.Wait() }
	return nil
}

func (r *Redis) start(ctx context.Context, path string) error {
	conf := map[string]string{
		"port": strconv.Itoa(r.port), "bind": "127.0.0.1", "dir": r.opts.Dir, "save": `""`, "appendonly": "no",
		"requirepass": r.password, "daemonize": "no", "loglevel": "warning",
	}
	if r.opts.Keep {
		conf["save"], conf["appendonly"], conf["appendfsync"] = "3600 1 300 100 60 10000", "yes", "everysec"
	}
	for k, v := range r.opts.Conf {
		conf[k] = v
	}
	var text strings.Builder
	for k, v := range conf {
		fmt.Fprintf(&text, "%s %s\n", k, v)
	}
	logPath := filepath.Join(r.opts.Dir, "redis.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	defer log.Close()
	cmd := exec.Command(path, "-") // the password is not for the list of processes
	cmd.Stdin = strings.NewReader(text.String())
	cmd.Stdout, cmd.Stderr = log, log
	if r.process, err = pgserver.StartProcess(cmd, syscall.SIGTERM); err != nil {
		return fmt.Errorf("start Redis: %w", err)
	}
	deadline := time.Now().Add(60 * time.Second)
	for !r.answers() {
		if r.process.Ended() || time.Now().After(deadline) {
			_ = r.process.Stop(ctx, time.Second, syscall.SIGTERM) // the reason is told already
			return fault.New(fault.Unavailable, "Redis did not start; its log says:\n%s", pgserver.Tail(logPath)).WithCode("redis_start")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
	return nil
}

// answers asks the server for a sign of life: a snapshot may still be loading when the port is open.
func (r *Redis) answers() bool {
	c, err := net.DialTimeout("tcp", r.addr(), time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return false
	}
	if _, err := fmt.Fprintf(c, "AUTH %s\r\nPING\r\n", r.password); err != nil {
		return false
	}
	in := bufio.NewReader(c)
	auth, err1 := in.ReadString('\n')
	pong, err2 := in.ReadString('\n')
	return err1 == nil && err2 == nil && strings.HasPrefix(auth, "+OK") && strings.HasPrefix(pong, "+PONG")
}

func (r *Redis) addr() string { return "127.0.0.1:" + strconv.Itoa(r.port) }

// URL is the way to the server.
func (r *Redis) URL() string {
	u := url.URL{Scheme: "redis", User: url.UserPassword("", r.password), Host: r.addr(), Path: "/0"}
	return u.String()
}

// Port is where the server listens on 127.0.0.1.
func (r *Redis) Port() int { return r.port }

// InProcess reports whether the server is inside this process, because none is installed.
func (r *Redis) InProcess() bool { return r.inside != nil }

// Stop ends the server in order.
func (r *Redis) Stop(ctx context.Context) error {
	if r.inside != nil {
		r.stopTick()
		r.inside.Close()
		return nil
	}
	return r.process.Stop(ctx, 10*time.Second, syscall.SIGTERM)
}

// Kill ends the server as a crash does.
func (r *Redis) Kill() error {
	if r.inside != nil {
		return r.Stop(context.Background())
	}
	err := r.process.Signal(syscall.SIGKILL)
	<-r.process.Done
	return err
}

// Pause makes the server hang until Continue.
func (r *Redis) Pause() error { return r.process.Signal(syscall.SIGSTOP) }

// Continue ends a Pause.
func (r *Redis) Continue() error { return r.process.Signal(syscall.SIGCONT) }
