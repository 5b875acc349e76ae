package devstack_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
)

// TestMain is also the child of TestServersEndWithTheirParent.
func TestMain(m *testing.M) {
	if dir := os.Getenv("ONEO_TEST_CHILD_DIR"); dir != "" {
		ctx := context.Background()
		pg, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Fast: true})
		if err != nil {
			fmt.Println("error", err)
			return
		}
		r, err := devstack.StartRedis(ctx, devstack.RedisOptions{Dir: dir})
		if err != nil {
			fmt.Println("error", err)
			return
		}
		fmt.Println("ready", pg.Pid(), pg.Port(), r.Port())
		select {}
	}
	m.Run()
}

// folder is one that PostgreSQL's own user can reach: a test's folder is its user's alone.
func folder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "devstack-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

func query(t *testing.T, url, sql string) string {
	t.Helper()
	c, err := pgx.Connect(t.Context(), url)
	require.NoError(t, err)
	defer c.Close(context.Background())
	var s string
	require.NoError(t, c.QueryRow(t.Context(), sql).Scan(&s))
	return s
}

func TestPostgresKeepsItsDataAndItsPort(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir})
	require.NoError(t, err)
	c, err := pgx.Connect(t.Context(), pg.URL("postgres"))
	require.NoError(t, err)
	_, err = c.Exec(t.Context(), `create table kept as select 'here'::text x`)
	require.NoError(t, err)
	require.NoError(t, c.Close(t.Context()))

	_, err = devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir})
	require.ErrorContains(t, err, "running", "two servers on one folder")
	wrong := strings.Replace(pg.URL("postgres"), "postgres:", "postgres:x", 2)
	_, err = pgx.Connect(t.Context(), wrong)
	require.Error(t, err, "a wrong password must be refused")

	require.NoError(t, pg.Kill())
	again, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir, Preload: []string{"oneo_no_such_library", "pg_stat_statements"}})
	require.NoError(t, err, "a crash must not keep it from starting")
	require.Equal(t, pg.Port(), again.Port())
	require.Equal(t, "here", query(t, again.URL("postgres"), `select x from kept`))
	require.Equal(t, "pg_stat_statements", query(t, again.URL("postgres"), `show shared_preload_libraries`), "what is not installed is not loaded")
	require.NoError(t, again.Restart(t.Context()))
	require.Equal(t, "here", query(t, again.URL("postgres"), `select x from kept`))
	require.NoError(t, again.Stop(t.Context()))
	_, err = pgx.Connect(t.Context(), again.URL("postgres"))
	require.Error(t, err)
}

func TestRedisKeepsWhatItIsAskedToKeep(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	for _, keep := range []bool{true, false} {
		r, err := devstack.StartRedis(t.Context(), devstack.RedisOptions{Dir: dir, Keep: keep})
		require.NoError(t, err)
		o, err := redis.ParseURL(r.URL())
		require.NoError(t, err)
		c := redis.NewClient(o)
		require.NoError(t, c.Set(t.Context(), "k", "v", 0).Err())
		o2 := *o
		o2.Password = ""
		open := redis.NewClient(&o2)
		require.Error(t, open.Get(t.Context(), "k").Err(), "without a password")
		require.NoError(t, open.Close())
		require.NoError(t, c.Close())
		require.NoError(t, r.Stop(t.Context()))
		if keep {
			again, err := devstack.StartRedis(t.Context(), devstack.RedisOptions{Dir: dir, Keep: true})
			require.NoError(t, err)
			o, err := redis.ParseURL(again.URL())
			require.NoError(t, err)
			c := redis.NewClient(o)
			require.Equal(t, "v", c.Get(t.Context(), "k").Val())
			require.NoError(t, c.Close())
			require.NoError(t, again.Kill())
		}
	}
}

func TestServersEndWithTheirParent(t *testing.T) {
	t.Parallel()
	dir := folder(t)
	self, err := os.Executable()
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "ONEO_TEST_CHILD_DIR="+dir)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(line, "ready "), line)
	pid, err := strconv.Atoi(strings.Fields(line)[1])
	require.NoError(t, err)
	require.NoError(t, cmd.Process.Kill())
	_ = cmd.Wait() // killed
	require.Eventually(t, func() bool { return syscall.Kill(pid, 0) != nil }, time.Minute, 20*time.Millisecond,
		"PostgreSQL (pid %d) outlived the process that started it", pid)
}
