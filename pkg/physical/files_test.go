package physical_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/physical"
)

func TestAMomentIsReachedBesideTheLiveCluster(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	a.exec(`create table deals (id int primary key)`)
	a.exec(`insert into deals select generate_series(1, 1000)`)
	b, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	earlier := a.now()
	a.exec(`insert into deals values (1001)`)
	before := a.now()
	a.exec(`delete from deals`)
	a.flush()

	// Two at once, as a drill beside a restore: neither is in the other's way.
	var other *physical.Cluster
	done := make(chan error, 1)
	go func() {
		var err error
		other, err = a.recover(physical.Target{Time: earlier})
		done <- err
	}()
	c, err := a.recover(physical.Target{Time: before})
	require.NoError(t, <-done)
	require.NoError(t, err)
	count := func(c *physical.Cluster) (n int) {
		conn, err := pgx.Connect(t.Context(), c.URL("postgres", "postgres"))
		require.NoError(t, err)
		require.NoError(t, conn.QueryRow(t.Context(), `select count(*) from deals`).Scan(&n))
		require.NoError(t, conn.Close(t.Context()))
		return n
	}
	require.Equal(t, 1000, count(other))
	require.NoError(t, other.Close(context.Background()))
	require.NoDirExists(t, other.Dir())
	require.Equal(t, 1001, count(c))
	require.Equal(t, b.Label, c.Backup.Label)
	require.False(t, c.Reached.After(before))
	var n int
	require.NoError(t, a.conn.QueryRow(t.Context(), `select count(*) from deals`).Scan(&n))
	require.Zero(t, n)

	left, err := physical.Leftovers(filepath.Join(a.dir, "scratch"))
	require.NoError(t, err)
	require.Empty(t, left) // it is held
	require.NoError(t, c.Close(context.Background()))
	entries, err := os.ReadDir(filepath.Join(a.dir, "scratch"))
	require.NoError(t, err)
	require.Empty(t, entries)
	require.NoError(t, a.engine.Verify(t.Context(), b.Label, nil))
}
