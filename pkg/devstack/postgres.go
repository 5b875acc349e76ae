// Package devstack starts PostgreSQL and Redis for a machine that has no servers running: for `oneo dev`, for tests and
// for benchmarks. It promises: they listen on the loopback only; they end with the process that started them, also when
// that is killed; what they keep is in the folder that was given; and a second start on that folder finds it.
package devstack

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
)

// PostgresOptions says how PostgreSQL is started.
type PostgresOptions struct {
	Dir      string            // holds the data folder, the log and the superuser's password; kept
	Port     int               // 0: the port of the last start if it is free, or any free one
	Settings map[string]string // as in postgresql.conf
	Preload  []string          // libraries that are loaded with the server, those of them that are installed
	Fast     bool              // forgets everything in a crash: for tests
	Trust    bool              // no passwords on the loopback: for tests
}

// Postgres is a running server.
type Postgres struct {
	opts     PostgresOptions
	bin      string
	servant  pgserver.Servant
	port     int
	password string
	process  *pgserver.Process
}

const superuser = "postgres"

// StartPostgres starts a server on Dir, making its data folder first where there is none. It returns when the server
// answers. Faults of kind Unavailable say what is missing.
func StartPostgres(ctx context.Context, o PostgresOptions) (*Postgres, error) {
	bin, err := pgserver.Find()
	if err != nil {
		return nil, err
	}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return nil, fmt.Errorf("data folder: %w", err)
	}
	s, err := pgserver.FindServant()
	if err != nil {
		return nil, err
	}
	p := &Postgres{opts: o, bin: bin, servant: s}
	if err := s.Own(p.data()); err != nil {
		return nil, err
	}
	if err := s.Own(p.sockets()); err != nil {
		return nil, err
	}
	if err := p.initialise(ctx); err != nil {
		return nil, err
	}
	if err := p.running(); err != nil {
		return nil, err
	}
	for attempt := 1; ; attempt++ {
		if err := p.choosePort(); err != nil {
			return nil, err
		}
		if err = p.startPatiently(ctx); !pgserver.PortLost(err) || o.Port != 0 || attempt == portTries {
			return p, err
		}
	}
}

// portTries is how often a server is started whose free port was taken by somebody else before it had it.
const portTries = 5

// startPatiently starts the server, and again while the backends of one that was killed are still ending.
func (p *Postgres) startPatiently(ctx context.Context) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := p.start(ctx)
		if err == nil || !strings.Contains(err.Error(), "pre-existing shared memory block") || time.Now().After(deadline) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (p *Postgres) data() string     { return filepath.Join(p.opts.Dir, "postgres") }
func (p *Postgres) log() string      { return filepath.Join(p.opts.Dir, "postgres.log") }
func (p *Postgres) secret() string   { return filepath.Join(p.opts.Dir, "postgres.password") }
func (p *Postgres) lastPort() string { return filepath.Join(p.opts.Dir, "postgres.port") }

// sockets is where the socket lies: a path may have 107 bytes only, so a deep folder has its socket elsewhere.
func (p *Postgres) sockets() string {
	dir := filepath.Join(p.opts.Dir, "socket")
	if len(dir) > 80 {
		return filepath.Join(os.TempDir(), fmt.Sprintf("oneo-socket-%d", os.Getpid()))
	}
	return dir
}

// initialise makes the data folder. A folder whose making was interrupted is made again: it holds nothing yet.
func (p *Postgres) initialise(ctx context.Context) error {
	password, err := os.ReadFile(p.secret())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read the superuser's password: %w", err)
	}
	p.password = strings.TrimSpace(string(password))
	ready := filepath.Join(p.data(), "oneo-initialised")
	if _, err := os.Stat(ready); err == nil {
		return p.servant.Chown(ready) // older ones were ours, and pg_basebackup reads every file
	}
	entries, err := os.ReadDir(p.data())
	if err != nil {
		return fmt.Errorf("look into the data folder: %w", err)
	}
	if _, err := os.Stat(filepath.Join(p.data(), "global", "pg_control")); err == nil && len(entries) > 0 {
		if p.password == "" {
			return fault.New(fault.Conflict, "%s holds a PostgreSQL that oneo did not make", p.data()).WithCode("foreign_data").
				WithHint("choose another folder with --data")
		}
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(p.data(), e.Name())); err != nil {
			return fmt.Errorf("clear a half-made data folder: %w", err)
		}
	}
	b := make([]byte, 24)
	if _, err := rand.Read(b); err != nil {
		return fmt.Errorf("make a password: %w", err)
	}
	p.password = hex.EncodeToString(b)
	if err := os.WriteFile(p.secret(), []byte(p.password+"\n"), 0o600); err != nil {
		return fmt.Errorf("keep the superuser's password: %w", err)
	}
	auth := "scram-sha-256"
	if p.opts.Trust {
		auth = "trust"
	}
	// A file that the server's user may read, for as long as initdb runs.
	pwfile := filepath.Join(p.sockets(), "initdb.password")
	if err := os.WriteFile(pwfile, []byte(p.password+"\n"), 0o600); err != nil {
		return fmt.Errorf("hand the password to initdb: %w", err)
	}
	defer os.Remove(pwfile)
	if err := p.servant.Chown(pwfile); err != nil {
		return fmt.Errorf("hand the password to initdb: %w", err)
	}
	cmd := p.servant.Command(filepath.Join(p.bin, "initdb"), "--pgdata", p.data(), "--username", superuser, "--no-sync",
		"--encoding", "UTF8", "--locale", "C.UTF-8", "--auth", auth, "--pwfile", pwfile)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w: %s", err, text)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err := os.WriteFile(ready, nil, 0o600); err != nil {
		return err
	}
	return p.servant.Chown(ready)
}

// running refuses a data folder that another server is working on.
func (p *Postgres) running() error {
	pid, err := pgserver.Running(p.data())
	if err != nil || pid == 0 {
		return err
	}
	return fault.New(fault.Conflict, "a PostgreSQL (pid %d) is running on %s already", pid, p.data()).WithCode("already_running").
		WithHint("another `oneo dev` has this folder: stop it, or choose another one with --data")
}

func (p *Postgres) choosePort() error {
	p.port = p.opts.Port
	if p.port != 0 {
		return nil
	}
	if text, err := os.ReadFile(p.lastPort()); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pgserver.PortFree(n) {
			p.port = n
			return nil
		}
	}
	var err error
	if p.port, err = pgserver.FreePort(); err != nil {
		return err
	}
	return os.WriteFile(p.lastPort(), []byte(strconv.Itoa(p.port)+"\n"), 0o600)
}

// installed are those of the libraries that lie beside the server's programs, where distributions have them.
func (p *Postgres) installed(libraries []string) (found []string) {
	for _, name := range libraries {
		for _, dir := range []string{"lib", "lib/postgresql"} {
			if files, _ := filepath.Glob(filepath.Join(filepath.Dir(p.bin), dir, name+".*")); len(files) > 0 && !slices.Contains(found, name) {
				found = append(found, name)
			}
		}
	}
	return found
}

func (p *Postgres) start(ctx context.Context) (err error) {
	settings := map[string]string{"listen_addresses": "127.0.0.1", "unix_socket_directories": p.sockets(), "port": strconv.Itoa(p.port), "logging_collector": "off"}
	if p.opts.Fast {
		settings["fsync"], settings["synchronous_commit"], settings["full_page_writes"] = "off", "off", "off"
	}
	if found := p.installed(p.opts.Preload); len(found) > 0 { // with one that is not it would not start
		settings["shared_preload_libraries"] = strings.Join(found, ",")
	}
	for k, v := range p.opts.Settings {
		settings[k] = v
	}
	if p.process, err = pgserver.Start(p.servant, pgserver.StartOptions{Bin: p.bin, Data: p.data(), Log: p.log(), Settings: settings}); err != nil {
		return err
	}
	return pgserver.Await(ctx, p.process, p.data(), p.log())
}

// URL is the superuser's way to a database.
func (p *Postgres) URL(database string) string {
	u := url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, p.password), Host: "127.0.0.1:" + strconv.Itoa(p.port),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	if p.opts.Trust {
		u.User = url.User(superuser)
	}
	return u.String()
}

// Port is where the server listens on 127.0.0.1.
func (p *Postgres) Port() int { return p.port }

// Pid is the server's process id.
func (p *Postgres) Pid() int { return p.process.Cmd.Process.Pid }

// Stop ends the server in order: sessions are ended, what is committed stays.
func (p *Postgres) Stop(ctx context.Context) error {
	return p.process.Stop(ctx, 20*time.Second, syscall.SIGINT, syscall.SIGQUIT)
}

// Kill ends the server as a crash does.
func (p *Postgres) Kill() error {
	err := p.process.Signal(syscall.SIGKILL)
	<-p.process.Done
	return err
}

// Restart stops the server if it runs and starts it on the same port.
func (p *Postgres) Restart(ctx context.Context) error {
	if err := p.Stop(ctx); err != nil {
		return err
	}
	return p.startPatiently(ctx)
}
