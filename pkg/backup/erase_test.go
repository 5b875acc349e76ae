package backup_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
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
	// What processes that died have been writing.
	partial := func(m backup.Manifest) string { return f.path(filepath.Dir(m.Name) + "/.oneo-partial-ABCD") }
	require.NoError(t, os.WriteFile(partial(loose), []byte("rows"), 0o600))
	require.NoError(t, os.WriteFile(partial(other), []byte("rows"), 0o600))
	for _, id := range []string{"", "..", one.ID[:8], one.ID + "/", filepath.Dir(other.Name) + "x"} {
		_, err := f.EraseArchives(t.Context(), id)
		require.Error(t, err, id)
	}
	require.Len(t, f.files(), 9)
	n, err := f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, 4, n)
	require.ElementsMatch(t, []string{other.Name, manifestOf(other)}, f.files())
	require.NoFileExists(t, partial(loose))
	require.FileExists(t, partial(other))
	n, err = f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = f.Newest(t.Context(), one.ID)
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	require.NoError(t, f.Checksum(t.Context(), other))
}

// What there is of each tenant is found, wherever it lies, and nothing of somebody else's.
func TestLeft(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 3), f.tenant("beta", 3)
	first, second := f.back(one), f.back(one)
	full, _, err := f.CreateFull(t.Context(), backup.FullOptions{})
	require.NoError(t, err)
	for _, name := range []string{"notes.txt", "erased/" + two.ID + ".json", "full/readme.oneo"} {
		require.NoError(t, os.MkdirAll(filepath.Dir(f.path(name)), 0o700))
		require.NoError(t, os.WriteFile(f.path(name), []byte("x"), 0o600))
	}
	left, err := f.Left(t.Context())
	require.NoError(t, err)
	require.Len(t, left, 2)
	require.Equal(t, 3, left[one.ID].Archives)
	parts := full.Groups[0].Tenants
	require.Greater(t, left[one.ID].Bytes, first.Bytes+second.Bytes+parts[0].Bytes, "manifests count")
	require.Equal(t, backup.Left{Archives: 1, Bytes: parts[1].Bytes}, left[two.ID])

	keeps := func(want int) {
		t.Helper()
		n, err := f.Keeps(t.Context(), one.ID)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	keeps(0)
	_, err = f.Keep(t.Context(), first.ID, true, "")
	require.NoError(t, err)
	keeps(1)
	_, err = f.Keeps(t.Context(), "")
	require.Error(t, err)

	n, err := f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	left, err = f.Left(t.Context())
	require.NoError(t, err)
	require.NotContains(t, left, one.ID)
	require.Contains(t, left, two.ID)
}

// An erasure that comes while a backup is made, and looks into the store before it is there, leaves nothing of it.
func TestEraseBesideABackup(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	plain := f.o.Store
	for n, suffix := range []string{".oneo", ".json", ".oneo", ".json"} {
		one := f.tenant(fmt.Sprintf("acme%d", n), 3)
		f.back(one)
		s := &interrupted{Store: plain, suffix: suffix, lasting: n < 2}
		s.do = func() {
			e, err := f.provision.Erase(t.Context(), one.Slug, provision.EraseRequest{Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, 1, e.Destroyed.Tables)
			require.Positive(t, e.Destroyed.Archives)
		}
		f.Backups = f.with(func(o *backup.Options) { o.Store = s })
		_, err := f.Create(t.Context(), one, backup.CreateOptions{})
		require.True(t, s.did)
		require.True(t, fault.Is(err, fault.Gone), "%s: %v", suffix, err)
		// But for the notes for full backups.
		require.Empty(t, slices.DeleteFunc(f.files(), func(name string) bool { return strings.HasPrefix(name, "erased/") }), suffix)
	}
	f.Invariants(t)
}

// interrupted does something just before an object of this suffix is there. With lasting, what is being written comes to be there
// whatever is swept, as in a store at a distance.
type interrupted struct {
	store.Store
	suffix  string
	lasting bool
	do      func()
	did     bool
}

func (s *interrupted) Sweep(ctx context.Context, prefix string, age time.Duration) error {
	if s.lasting {
		return nil
	}
	return s.Store.Sweep(ctx, prefix, age)
}

func (s *interrupted) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	return s.Store.Put(ctx, name, func(w io.Writer) error {
		err := write(w)
		if err == nil && !s.did && strings.HasSuffix(name, s.suffix) {
			s.did = true
			s.do()
		}
		return err
	})
}
