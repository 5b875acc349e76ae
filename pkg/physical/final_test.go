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
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// A cluster that is to stay has the settings of the backup, is found by what it says of itself, and goes on archiving without a gap when
// somebody starts it.
func TestAClusterThatStays(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	a.exec(`create table deals (id int primary key)`)
	a.exec(`alter system set work_mem = '5MB'`)
	note := filepath.Join(a.dir, "postgres", "oneo-recovered.json") // of an earlier recovery of this cluster
	require.NoError(t, os.WriteFile(note, []byte(`{"id": "scratch-of-old"}`), 0o644))
	_, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	a.exec(`insert into deals values (1)`)
	before := a.now()
	a.exec(`delete from deals`)
	a.flush()

	scratch, final := filepath.Join(a.dir, "scratch"), filepath.Join(a.dir, "next", "postgres")
	o := physical.RecoverOptions{Dir: scratch, Target: physical.Target{Time: before}, Role: "postgres", Database: "postgres", Final: final}
	c, err := physical.Recover(t.Context(), a.engine, o)
	require.NoError(t, err)
	require.NoFileExists(t, filepath.Join(c.Data(), "oneo-recovered.json"), "it is not whole yet")
	require.NoDirExists(t, final)
	_, err = physical.Recover(t.Context(), a.engine, o)
	require.Equal(t, "recovering", fault.Of(err).StableCode(), "%v", err)
	n, err := c.Settle(t.Context(), map[string]int{"tenants": 3})
	require.NoError(t, err)
	require.NoError(t, c.Close(context.Background()))
	left, err := os.ReadDir(scratch)
	require.NoError(t, err)
	require.Empty(t, left)
	require.False(t, n.Checksums)
	require.EqualValues(t, 2, n.Timeline)
	read, err := physical.ReadNote(final)
	require.NoError(t, err)
	require.JSONEq(t, `{"tenants": 3}`, string(read.More))
	require.Equal(t, n.System, physical.SystemOf(final, n.Major))
	_, err = physical.Recover(t.Context(), a.engine, o)
	require.Equal(t, "not_empty", fault.Of(err).StableCode(), "%v", err)
	require.FileExists(t, filepath.Join(final, "oneo-recovered.json"))

	// The new server archives its timeline; a recovery from the old backup reaches a moment behind the switch.
	require.NoError(t, a.server.Stop(t.Context()))
	plan, err := a.engine.Plan(t.Context())
	require.NoError(t, err)
	plan.Settings["archive_timeout"] = "0"
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: filepath.Dir(final), Trust: true, Settings: plan.Settings})
	require.NoError(t, err)
	defer func() { require.NoError(t, pg.Stop(context.Background())) }()
	conn, err := pgx.Connect(t.Context(), pg.URL("postgres"))
	require.NoError(t, err)
	defer conn.Close(context.Background())
	var rows int
	var mem string
	require.NoError(t, conn.QueryRow(t.Context(), `select (select count(*) from deals), current_setting('work_mem')`).Scan(&rows, &mem))
	require.Equal(t, 1, rows)
	require.Equal(t, "5MB", mem)
	_, err = conn.Exec(t.Context(), `insert into deals values (2)`)
	require.NoError(t, err)
	var later time.Time
	require.NoError(t, conn.QueryRow(t.Context(), `select clock_timestamp() from pg_sleep(0.002)`).Scan(&later))
	_, err = conn.Exec(t.Context(), `select pg_sleep(0.002)`)
	require.NoError(t, err)
	require.NoError(t, physical.Flush(t.Context(), conn))
	require.FileExists(t, filepath.Join(a.dir, "repository", "wal", "00000002.history.gz"))
	c, err = a.recover(physical.Target{Time: later})
	require.NoError(t, err)
	past, err := pgx.Connect(t.Context(), c.URL("postgres", "postgres"))
	require.NoError(t, err)
	require.NoError(t, past.QueryRow(t.Context(), `select count(*) from deals`).Scan(&rows))
	require.Equal(t, 2, rows)
	require.NoError(t, past.Close(t.Context()))
	require.NoError(t, c.Close(context.Background()))
}

// What does not become whole leaves nothing.
func TestAHalfMadeClusterIsNone(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	_, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	at := a.now()
	a.flush()
	scratch, final := filepath.Join(a.dir, "scratch"), filepath.Join(a.dir, "next")
	o := physical.RecoverOptions{Dir: scratch, Target: physical.Target{Time: at}, Role: "postgres", Database: "postgres", Final: final, Why: "a test"}

	c, err := physical.Recover(t.Context(), a.engine, o)
	require.NoError(t, err)
	require.NoError(t, c.Close(context.Background()), "without Settle")
	gone := func() {
		t.Helper()
		found, err := filepath.Glob(final + "*")
		require.NoError(t, err)
		require.Empty(t, found)
	}
	gone()
	ctx, cancel := context.WithCancel(t.Context())
	o.Report = func(p physical.Progress) {
		if p.Phase == physical.PhaseVerify { // all is fetched
			cancel()
		}
	}
	_, err = physical.Recover(ctx, a.engine, o)
	require.ErrorIs(t, err, context.Canceled)
	gone()
	left, err := os.ReadDir(scratch)
	require.NoError(t, err)
	require.Empty(t, left)
}
