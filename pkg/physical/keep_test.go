package physical

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
)

// TestABackupIsInUseForAsLongAsItsRecoveryLives takes a scratch cluster's place without starting one.
func TestABackupIsInUseForAsLongAsItsRecoveryLives(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "physical-keep-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	scratch := filepath.Join(dir, "scratch")
	labels, err := InUse(scratch)
	require.NoError(t, err)
	require.Empty(t, labels)

	s, err := pgserver.FindServant()
	require.NoError(t, err)
	c := &Cluster{Backup: Backup{Label: "20261126T034512Z"}}
	require.NoError(t, c.place(s, RecoverOptions{Dir: scratch}))
	labels, err = InUse(scratch)
	require.NoError(t, err)
	require.Equal(t, []string{"20261126T034512Z"}, labels)

	// One that has only just begun does not say yet which it reads; one that never said so is dead.
	fresh := filepath.Join(scratch, "scratch-fresh")
	require.NoError(t, os.Mkdir(fresh, 0o700))
	_, err = InUse(scratch)
	require.True(t, fault.Is(err, fault.Locked), err)
	old := time.Now().Add(-time.Hour)
	require.NoError(t, os.Chtimes(fresh, old, old))
	labels, err = InUse(scratch)
	require.NoError(t, err)
	require.Len(t, labels, 1)

	// Its process dies.
	require.NoError(t, syscall.Flock(int(c.held.Fd()), syscall.LOCK_UN))
	labels, err = InUse(scratch)
	require.NoError(t, err)
	require.Empty(t, labels)
	require.NoError(t, c.remove(t.Context()))
}

func TestWhatABackupNeeds(t *testing.T) {
	t.Parallel()
	i := Info{Backups: []Backup{{Label: "f"}, {Label: "d", Prior: "f"}, {Label: "i", Prior: "d"}, {Label: "loop", Prior: "pool"}, {Label: "pool", Prior: "loop"}}}
	require.Empty(t, i.Needs("f"))
	require.Equal(t, []string{"d", "f"}, i.Needs("i"))
	require.Equal(t, []string{"pool", "loop"}, i.Needs("loop"))
}
