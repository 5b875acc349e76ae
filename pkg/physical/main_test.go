package physical_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/physical"
)

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

func (a *archived) recover(target physical.Target) (*physical.Cluster, error) {
	return physical.Recover(a.t.Context(), a.engine, physical.RecoverOptions{Dir: filepath.Join(a.dir, "scratch"), Target: target, Role: "postgres", Database: "postgres", Why: a.t.Name()})
}
