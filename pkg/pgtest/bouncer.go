package pgtest

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// PgBouncer starts a pooler in transaction mode before the test's server, with so many connections for each user and
// database, and returns its address. The distribution's is taken; it carries no prepared statements.
func (env *Env) PgBouncer(t testing.TB, size int) (addr string) {
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
	ctx := context.Background()
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	require(err)
	_, listen, _ := net.SplitHostPort(l.Addr().String())
	require(l.Close())
	ini := filepath.Join(dir, "pgbouncer.ini")
	require(os.WriteFile(ini, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = trust
auth_file = %s/users
pool_mode = transaction
default_pool_size = %d
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
`, env.Server.Port(), listen, dir, size), 0o644))
	var users string
	for _, u := range append([]string{appRole, ownerRole, "postgres"}, logins()...) {
		users += fmt.Sprintf("%q %q\n", u, "")
	}
	require(os.WriteFile(filepath.Join(dir, "users"), []byte(users), 0o644))
	require(os.Chmod(dir, 0o755))
	cmd := exec.CommandContext(ctx, "pgbouncer", ini)
	if path, err := exec.LookPath("pgbouncer"); err != nil {
		cmd = exec.CommandContext(ctx, "/usr/sbin/pgbouncer", ini)
	} else {
		cmd.Path = path
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 { // it refuses to run as root
		u, err := user.Lookup("nobody")
		require(err)
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	t.Cleanup(func() {
		if log, err := os.ReadFile(filepath.Join(dir, "log")); err == nil && t.Failed() {
			t.Logf("PgBouncer said:\n%s", log)
		}
	})
	out, err := os.Create(filepath.Join(dir, "log"))
	require(err)
	cmd.Stdout, cmd.Stderr = out, out
	require(cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	addr = net.JoinHostPort("127.0.0.1", listen)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
		if err == nil {
			_ = c.Close()
			return addr
		}
		if time.Now().After(deadline) {
			require(err)
		}
	}
}

// logins are the names of the sub-pools' logins.
func logins() []string {
	return postgres.Installation{Logins: Logins, AppRole: appRole}.LoginNames()
}
