package pgtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// PgBouncer starts a pooler in transaction mode before the test's server, with so many connections for each user and
// database, and returns its address. The distribution's is taken; it carries no prepared statements.
func (env *Env) PgBouncer(t testing.TB, size int) (addr string) {
	t.Helper()
	for range 5 { // its port may be taken by somebody else before it has it
		addr, ok := env.startPgBouncer(t, size)
		if ok {
			return addr
		}
	}
	t.Fatal("pgtest: PgBouncer did not start; what it said stands above")
	return ""
}

func (env *Env) startPgBouncer(t testing.TB, size int) (addr string, ok bool) {
	t.Helper()
	require := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("pgtest: start PgBouncer: %v", err)
		}
	}
	dir, err := os.MkdirTemp("", "bouncer-")
	require(err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	port, err := pgserver.FreePort()
	require(err)
	ini := filepath.Join(dir, "pgbouncer.ini")
	require(os.WriteFile(ini, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %d
unix_socket_dir =
auth_type = trust
auth_file = %s/users
pool_mode = transaction
default_pool_size = %d
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
`, env.Server.Port(), port, dir, size), 0o644))
	var users string
	for _, u := range append([]string{appRole, ownerRole, "postgres"}, logins()...) {
		users += fmt.Sprintf("%q %q\n", u, "")
	}
	require(os.WriteFile(filepath.Join(dir, "users"), []byte(users), 0o644))
	require(os.Chmod(dir, 0o755))
	path, err := exec.LookPath("pgbouncer")
	if err != nil {
		path = "/usr/sbin/pgbouncer"
	}
	cmd := exec.CommandContext(context.Background(), path, ini)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 { // it refuses to run as root
		u, err := user.Lookup("nobody")
		require(err)
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	said := func() string {
		log, err := os.ReadFile(filepath.Join(dir, "log"))
		require(err)
		return string(log)
	}
	out, err := os.Create(filepath.Join(dir, "log"))
	require(err)
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // the kernel kills it when the thread that started it ends
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(ended)
	}()
	require(<-started)
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("PgBouncer said:\n%s", said())
		}
	})
	addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	for deadline := time.Now().Add(Patience); !strings.Contains(said(), "listening on "+addr); time.Sleep(5 * time.Millisecond) {
		select {
		case <-ended:
			t.Logf("PgBouncer ended:\n%s", said())
			return "", false
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("pgtest: PgBouncer is not ready:\n%s", said())
		}
	}
	return addr, true
}

// logins are the names of the sub-pools' logins.
func logins() []string {
	return postgres.Installation{Logins: Logins, AppRole: appRole}.LoginNames()
}
