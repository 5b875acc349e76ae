package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
)

func text(s string) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return err
	}
}

func read(t *testing.T, s store.Store, name string) string {
	t.Helper()
	r, err := s.Get(t.Context(), name)
	require.NoError(t, err)
	defer r.Close()
	b, err := io.ReadAll(r)
	require.NoError(t, err)
	return string(b)
}

func names(t *testing.T, s store.Store, prefix string) []string {
	t.Helper()
	all, err := s.List(t.Context(), prefix)
	require.NoError(t, err)
	list := make([]string, len(all))
	for i, o := range all {
		list[i] = o.Name
	}
	return list
}

func TestDir(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "made", "when needed")
	s, err := store.NewDir(path)
	require.NoError(t, err)
	require.Empty(t, names(t, s, ""))
	_, err = s.Get(t.Context(), "a")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	require.NoError(t, s.Delete(t.Context(), "a"))
	require.NoDirExists(t, path, "reading makes nothing")
	for _, n := range []string{"acme/2.oneo", "acme/1.oneo", "beta/1.oneo", "acme2/1.oneo", "top"} {
		require.NoError(t, s.Put(t.Context(), n, text("of "+n)))
	}
	require.Equal(t, []string{"acme/1.oneo", "acme/2.oneo", "acme2/1.oneo", "beta/1.oneo", "top"}, names(t, s, ""))
	require.Equal(t, []string{"acme/1.oneo", "acme/2.oneo"}, names(t, s, "acme/"))
	require.Equal(t, []string{"acme/2.oneo"}, names(t, s, "acme/2"))
	require.Equal(t, "of acme/2.oneo", read(t, s, "acme/2.oneo"))
	require.NoError(t, s.Put(t.Context(), "acme/2.oneo", text("again")))
	require.Equal(t, "again", read(t, s, "acme/2.oneo"))
	info, err := os.Stat(filepath.Join(path, "acme", "2.oneo"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())
	require.NoError(t, s.Delete(t.Context(), "acme/2.oneo"))
	require.Equal(t, []string{"acme/1.oneo"}, names(t, s, "acme/"))
}

// What cannot be written to its end leaves what was there, and nothing else.
func TestWholeOrNotThere(t *testing.T) {
	t.Parallel()
	path := t.TempDir()
	s, err := store.NewDir(path)
	require.NoError(t, err)
	require.NoError(t, s.Put(t.Context(), "a/x", text("first")))
	full := errors.New("no space left on device")
	half := func(w io.Writer) error {
		require.NoError(t, text("half of the second")(w))
		require.Equal(t, []string{"a/x"}, names(t, s, ""), "what is being written is not listed")
		return full
	}
	for _, n := range []string{"a/x", "a/y"} {
		require.ErrorIs(t, s.Put(t.Context(), n, half), full)
	}
	ctx, cancel := context.WithCancel(t.Context())
	require.ErrorIs(t, s.Put(ctx, "a/x", func(w io.Writer) error { cancel(); return text("second")(w) }), context.Canceled)
	require.Equal(t, "first", read(t, s, "a/x"))
	files, err := os.ReadDir(filepath.Join(path, "a"))
	require.NoError(t, err)
	require.Len(t, files, 1)

	file := filepath.Join(path, "file")
	require.ErrorIs(t, store.WriteFile(t.Context(), file, half), full)
	require.NoFileExists(t, file)
	require.NoError(t, store.WriteFile(t.Context(), file, text("whole")))
	require.ErrorIs(t, store.WriteFile(t.Context(), filepath.Join(path, "nowhere", "file"), text("")), os.ErrNotExist)
}

// What a dead process has left behind goes when it is old, and stays while it may be at work.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	path := t.TempDir()
	s, err := store.NewDir(path)
	require.NoError(t, err)
	for name, age := range map[string]time.Duration{".oneo-partial-OLD": 8 * 24 * time.Hour, ".oneo-partial-NEW": time.Hour, ".hidden": 30 * 24 * time.Hour} {
		file := filepath.Join(path, name)
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		require.NoError(t, os.Chtimes(file, time.Now().Add(-age), time.Now().Add(-age)))
	}
	require.NoError(t, s.Put(t.Context(), "x", text("")))
	require.NoFileExists(t, filepath.Join(path, ".oneo-partial-OLD"))
	require.FileExists(t, filepath.Join(path, ".oneo-partial-NEW"))
	require.FileExists(t, filepath.Join(path, ".hidden"))
	require.Equal(t, []string{"x"}, names(t, s, ""))
}

// No name and no link leads out.
func TestNoWayOut(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	path := t.TempDir()
	s, err := store.NewDir(path)
	require.NoError(t, err)
	for _, bad := range []string{"", "/", "..", "../x", "a/../x", "/etc/passwd", "a//b", "a/", ".x", "a/.x", "a\\b", "a b", "a\x00", "ä", strings.Repeat("a", 1025)} {
		require.True(t, fault.Is(s.Put(t.Context(), bad, text("")), fault.Invalid), bad)
		_, err := s.Get(t.Context(), bad)
		require.True(t, fault.Is(err, fault.Invalid), bad)
		require.True(t, fault.Is(s.Delete(t.Context(), bad), fault.Invalid), bad)
	}
	require.NoError(t, os.Symlink(outside, filepath.Join(path, "link")))
	_, err = s.Get(t.Context(), "link/secret")
	require.Error(t, err)
	require.Error(t, s.Put(t.Context(), "link/new", text("")))
	require.NoFileExists(t, filepath.Join(outside, "new"))
	require.Error(t, s.Delete(t.Context(), "link/secret"))
	require.FileExists(t, filepath.Join(outside, "secret"))
	require.Empty(t, names(t, s, ""))
}

// Many writers of one name: the last one wins, none of them mixes with another.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	s, err := store.NewDir(t.TempDir())
	require.NoError(t, err)
	failed := make(chan error)
	for i := range 10 {
		go func() {
			failed <- s.Put(context.Background(), "x", text(strings.Repeat(fmt.Sprint(i), 100_000)))
		}()
	}
	for range 10 {
		require.NoError(t, <-failed)
	}
	got := read(t, s, "x")
	require.Equal(t, strings.Repeat(got[:1], 100_000), got)
}

// A directory is there with all its files, or not at all.
func TestWriteDir(t *testing.T) {
	t.Parallel()
	top := t.TempDir()
	dir := filepath.Join(top, "made")
	entries := func() (names []string) {
		all, err := os.ReadDir(top)
		require.NoError(t, err)
		for _, e := range all {
			names = append(names, e.Name())
		}
		return names
	}
	add := func(create func(string) (io.WriteCloser, error), name string) error {
		f, err := create(name)
		if err != nil {
			return err
		}
		if _, err := io.WriteString(f, "of "+name); err != nil {
			return err
		}
		return f.Close()
	}
	full := errors.New("full")
	err := store.WriteDir(t.Context(), dir, func(create func(string) (io.WriteCloser, error)) error {
		require.NoError(t, add(create, "a"))
		require.NoDirExists(t, dir)
		require.Error(t, add(create, "a"), "twice")
		require.Error(t, add(create, "../out"))
		return full
	})
	require.ErrorIs(t, err, full)
	require.Empty(t, entries())
	gone, cancel := context.WithCancel(t.Context())
	err = store.WriteDir(gone, dir, func(create func(string) (io.WriteCloser, error)) error {
		cancel()
		return add(create, "a")
	})
	require.ErrorIs(t, err, context.Canceled)
	require.Empty(t, entries())
	both := func(create func(string) (io.WriteCloser, error)) error {
		return errors.Join(add(create, "a"), add(create, "b"))
	}
	require.NoError(t, store.WriteDir(t.Context(), dir, both))
	require.Equal(t, []string{"made"}, entries())
	b, err := os.ReadFile(filepath.Join(dir, "b"))
	require.NoError(t, err)
	require.Equal(t, "of b", string(b))
	info, err := os.Stat(filepath.Join(dir, "b"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	require.ErrorIs(t, store.WriteDir(t.Context(), dir, both), os.ErrExist)
}
