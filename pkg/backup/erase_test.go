package backup_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Of an erased tenant no object is left, whatever it is, and every one of another tenant's is.
func TestEraseArchives(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 3), f.tenant("beta", 3)
	f.back(one)
	kept := f.back(one)
	_, err := f.Keep(t.Context(), kept.ID, true, "")
	require.NoError(t, err)
	bad := f.back(one)
	require.NoError(t, os.WriteFile(f.path(manifestOf(bad)), []byte("no manifest"), 0o600))
	loose := f.back(one)
	require.NoError(t, os.Remove(f.path(manifestOf(loose))))
	other := f.back(two)
	for _, id := range []string{"", "..", one.ID[:8], one.ID + "/", filepath.Dir(other.Name) + "x"} {
		_, err := f.EraseArchives(t.Context(), id)
		require.Error(t, err, id)
	}
	require.Len(t, f.files(), 9)
	n, err := f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, 4, n)
	require.ElementsMatch(t, []string{other.Name, manifestOf(other)}, f.files())
	n, err = f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = f.Newest(t.Context(), one.ID)
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	require.NoError(t, f.Checksum(t.Context(), other))
}
