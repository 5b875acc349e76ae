package physical_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

const childTask = "PHYSICAL_TEST_TASK"

// TestMain also serves as the child that does one thing and is killed in the middle of it.
func TestMain(m *testing.M) {
	if raw := os.Getenv(childTask); raw != "" {
		var k task
		err := json.Unmarshal([]byte(raw), &k)
		if err == nil {
			err = k.child(context.Background())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	m.Run()
}

// task is one thing done by a process of its own.
type task struct {
	What       string // recover, create, prune or fill
	Repository string
	URL        string
	Scratch    string
	At         time.Time
	Labels     []string
	Final      string // where the recovered cluster is to stay
}

func (k task) child(ctx context.Context) error {
	e, err := physical.NewFiles(physical.FilesOptions{Dir: k.Repository, URL: k.URL})
	if err != nil {
		return err
	}
	switch k.What {
	case "recover":
		c, err := physical.Recover(ctx, e, physical.RecoverOptions{Dir: k.Scratch, Target: physical.Target{Time: k.At}, Role: "postgres", Database: "postgres", Why: "a child", Final: k.Final})
		if err != nil {
			return err
		}
		if k.Final != "" {
			if _, err := c.Settle(ctx, nil); err != nil {
				return err
			}
		}
		return c.Close(ctx)
	case "fill":
		return k.fill(ctx, e)
	case "create":
		_, err = e.Create(ctx, physical.CreateOptions{})
	case "prune":
		err = e.Prune(ctx, k.Labels)
	default:
		err = fmt.Errorf("no task %q", k.What)
	}
	return err
}

// fill recovers onto a disk that is full but for a few megabytes when the replay begins, and says why that fails.
func (k task) fill(ctx context.Context, e physical.Engine) error {
	filler := filepath.Join(filepath.Dir(k.Scratch), "filler")
	m := meddling{Engine: e, change: func(i *physical.Info) { i.Backups[0].Bytes = -1 << 30 }, after: func() { // it is not refused at once
		f := must(os.Create(filler))
		defer f.Close()
		size, block := int64(0), make([]byte, 1<<20)
		for {
			n, err := f.Write(block)
			if size += int64(n); err != nil {
				break
			}
		}
		if err := f.Truncate(size - 8<<20); err != nil {
			panic(err)
		}
	}}
	_, err := physical.Recover(ctx, m, physical.RecoverOptions{Dir: k.Scratch, Target: physical.Target{Time: k.At}, Role: "postgres", Database: "postgres"})
	fmt.Println(fault.Of(err).StableCode(), err)
	entries, err := os.ReadDir(k.Scratch)
	if err == nil && len(entries) > 0 {
		err = fmt.Errorf("%d entries are left in the scratch folder", len(entries))
	}
	return err
}

// child does the task in a process of its own, with failures injected, and returns how that ended.
func (a *archived) child(k task, failpoints string) (code int, said string) {
	a.t.Helper()
	k.Repository, k.URL = filepath.Join(a.dir, "repository"), a.server.URL("postgres")
	cmd := exec.CommandContext(a.t.Context(), must(os.Executable()))
	if k.Scratch == "" {
		k.Scratch = a.scratch()
	} else {
		// A small disk that only the child sees. PostgreSQL refuses root, also the one that is root in there alone.
		mount, in := "mount -t tmpfs -o mode=777,size=128m tmpfs "+filepath.Dir(k.Scratch)+" && exec ", "-m"
		if id := os.Getuid(); id != 0 {
			mount, in = mount+fmt.Sprintf("unshare --user --map-user=%d --map-group=%d ", id, os.Getgid()), "-rm"
		}
		cmd = exec.CommandContext(a.t.Context(), "unshare", in, "sh", "-c", mount+cmd.Path)
	}
	raw := must(json.Marshal(k))
	cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+failpoints)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		require.NoError(a.t, err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// archived is a running cluster that archives its WAL with an engine.
type archived struct {
	t      *testing.T
	dir    string // for everything
	server *devstack.Postgres
	engine physical.Engine
	conn   *pgx.Conn
}

// withFiles starts a cluster that PostgreSQL's own tools back up.
func withFiles(t *testing.T) *archived {
	t.Helper()
	dir, err := os.MkdirTemp("", "physical-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	repo := filepath.Join(dir, "repository")
	plan, err := must(physical.NewFiles(physical.FilesOptions{Dir: repo, URL: ""})).Plan(t.Context())
	require.NoError(t, err)
	settings := map[string]string{"autovacuum": "off", "archive_timeout": "0"}
	for k, v := range plan.Settings {
		if k != "archive_timeout" { // tests say when
			settings[k] = v
		}
	}
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true, Settings: settings})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, pg.Stop(context.Background())) })
	a := &archived{t: t, dir: dir, server: pg, engine: must(physical.NewFiles(physical.FilesOptions{Dir: repo, URL: pg.URL("postgres")}))}
	require.NoError(t, a.engine.Prepare(t.Context()))
	a.conn, err = pgx.Connect(t.Context(), pg.URL("postgres"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = a.conn.Close(context.Background()) })
	return a
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func (a *archived) exec(sql string, args ...any) {
	a.t.Helper()
	_, err := a.conn.Exec(a.t.Context(), sql, args...)
	require.NoError(a.t, err)
}

// now is a moment after everything that was committed, and before everything that will be.
func (a *archived) now() (at time.Time) {
	a.t.Helper()
	require.NoError(a.t, a.conn.QueryRow(a.t.Context(), `select clock_timestamp() from pg_sleep(0.002)`).Scan(&at))
	a.exec(`select pg_sleep(0.002)`)
	return at
}

// flush archives everything until now, with a commit behind it.
func (a *archived) flush() {
	a.t.Helper()
	require.NoError(a.t, physical.Flush(a.t.Context(), a.conn))
}

func (a *archived) scratch() string { return filepath.Join(a.dir, "scratch") }

func (a *archived) recover(target physical.Target) (*physical.Cluster, error) {
	return physical.Recover(a.t.Context(), a.engine, physical.RecoverOptions{Dir: a.scratch(), Target: target, Role: "postgres", Database: "postgres", Why: a.t.Name()})
}
