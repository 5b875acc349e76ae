package postgres_test

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

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// F97: through a PgBouncer that hands one server connection from client to client after each transaction.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := startPgBouncer(t, env.Server.Port())
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Statements, o.MaxConns, o.InFlight, o.AcquireTimeout = postgres.Unprepared, 8, 4, 3*time.Second
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, bouncer), OwnerURL: through(t, env.Group.OwnerURL, bouncer), DirectURL: env.Group.OwnerURL}}
	})
	pgtest.Isolation(t, env, pgtest.IsolationOptions{DB: db, Tenants: []tenant.Tenant{env.Tenant(t, "acme"), env.Tenant(t, "globex")}, Workers: 6, Requests: 40, NoCancels: true})
}

// Behind a pooler that carries no prepared statements, prepared mode is refused in words instead of running what another
// client prepared. The pooler does hand one server connection to everybody: what a session sets, the next one finds.
func TestPoolerWithoutPreparedStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := startPgBouncer(t, env.Server.Port())
	cfg, err := pgx.ParseConfig(through(t, env.AdminURL, bouncer))
	require.NoError(t, err)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	var conns [2]*pgx.Conn
	for i := range conns {
		conns[i], err = pgx.ConnectConfig(t.Context(), cfg)
		require.NoError(t, err)
		defer conns[i].Close(context.Background())
	}
	var leaked string
	_, err = conns[0].Exec(t.Context(), `set search_path to leaked`)
	require.NoError(t, err)
	require.NoError(t, conns[1].QueryRow(t.Context(), `show search_path`).Scan(&leaked))
	require.Equal(t, "leaked", leaked, "this pooler was to show what a session leaves behind")

	a := env.Tenant(t, "acme")
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, bouncer), OwnerURL: through(t, env.Group.OwnerURL, bouncer)}}
	})
	nothing := func(*postgres.Tx) error { t.Error("a statement was let through"); return nil }
	for range 3 {
		requireFault(t, db.InTenant(t.Context(), a, postgres.Read, nothing), fault.Pending, "pooler_unprepared")
		requireFault(t, db.InShared(t.Context(), postgres.Read, nothing), fault.Pending, "pooler_unprepared")
		err := db.AsOwner(t.Context(), postgres.MainGroup, func(*postgres.OwnerTx) error { return nothing(nil) })
		requireFault(t, err, fault.Pending, "pooler_unprepared")
	}
}

func startPgBouncer(t *testing.T, port int) (addr string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "bouncer-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	_, listen, _ := net.SplitHostPort(l.Addr().String())
	require.NoError(t, l.Close())
	ini := filepath.Join(dir, "pgbouncer.ini")
	require.NoError(t, os.WriteFile(ini, fmt.Appendf(nil, `[databases]
* = host=127.0.0.1 port=%d
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = %s
unix_socket_dir =
auth_type = trust
auth_file = %s/users
pool_mode = transaction
default_pool_size = 1
max_client_conn = 100
ignore_startup_parameters = extra_float_digits
`, port, listen, dir), 0o644))
	var users string
	for _, u := range []string{"oneo_app", "oneo_app_1", "oneo_app_2", "oneo_owner", "postgres"} {
		users += fmt.Sprintf("%q %q\n", u, "")
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "users"), []byte(users), 0o644))
	require.NoError(t, os.Chmod(dir, 0o755))
	cmd := exec.Command("pgbouncer", ini)
	if path, err := exec.LookPath("pgbouncer"); err != nil {
		cmd = exec.Command("/usr/sbin/pgbouncer", ini)
	} else {
		cmd.Path = path
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if os.Getuid() == 0 { // it refuses to run as root
		u, err := user.Lookup("nobody")
		require.NoError(t, err)
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
	require.NoError(t, err)
	cmd.Stdout, cmd.Stderr = out, out
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	addr = net.JoinHostPort("127.0.0.1", listen)
	until(t, "PgBouncer answers", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			_ = c.Close()
		}
		return err == nil
	})
	return addr
}
