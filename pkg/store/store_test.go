package store_test

import (
	"bytes"
	"context"
	"crypto/rand"
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

// kind is an empty store of one kind.
type kind struct {
	store.Store
	// leave makes what a Put of an object leaves that was killed so long ago.
	leave func(t *testing.T, name string, age time.Duration)
	// left is how many of these there are, and of what Put itself has not taken away.
	left func(t *testing.T) int
}

// each runs a test over every kind of store.
func each(t *testing.T, test func(t *testing.T, s kind)) {
	t.Run("directory", func(t *testing.T) {
		t.Parallel()
		path := filepath.Join(t.TempDir(), "made", "when needed")
		s, err := store.NewDir(path)
		require.NoError(t, err)
		test(t, kind{
			Store: s,
			leave: func(t *testing.T, name string, age time.Duration) {
				file := filepath.Join(path, filepath.Dir(name), ".oneo-partial-"+rand.Text())
				require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
				require.NoError(t, os.WriteFile(file, []byte("half"), 0o600))
				require.NoError(t, os.Chtimes(file, time.Now().Add(-age), time.Now().Add(-age)))
			},
			left: func(t *testing.T) (n int) {
				require.NoError(t, filepath.WalkDir(path, func(name string, _ os.DirEntry, err error) error {
					if strings.HasPrefix(filepath.Base(name), ".") {
						n++
					}
					return err
				}))
				return n
			},
		})
	})
	t.Run("s3", func(t *testing.T) {
		t.Parallel()
		service := newService(t)
		test(t, kind{Store: service.store(t, "of/oneo"), leave: service.leave, left: service.left})
	})
}

func TestContract(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, s kind) {
		require.Empty(t, names(t, s, ""))
		_, err := s.Get(t.Context(), "a")
		require.True(t, fault.Is(err, fault.NotFound), "%v", err)
		require.NoError(t, s.Delete(t.Context(), "a"))
		for _, n := range []string{"acme/2.oneo", "acme/1.oneo", "beta/1.oneo", "acme2/1.oneo", "top"} {
			require.NoError(t, s.Put(t.Context(), n, text("of "+n)))
		}
		require.Equal(t, []string{"acme/1.oneo", "acme/2.oneo", "acme2/1.oneo", "beta/1.oneo", "top"}, names(t, s, ""))
		require.Equal(t, []string{"acme/1.oneo", "acme/2.oneo"}, names(t, s, "acme/"))
		require.Equal(t, []string{"acme/2.oneo"}, names(t, s, "acme/2"))
		require.Empty(t, names(t, s, "gamma/"))
		require.Equal(t, "of acme/2.oneo", read(t, s, "acme/2.oneo"))
		began := time.Now()
		require.NoError(t, s.Put(t.Context(), "acme/2.oneo", text("again")))
		require.Equal(t, "again", read(t, s, "acme/2.oneo"))
		all, err := s.List(t.Context(), "acme/2")
		require.NoError(t, err)
		require.Equal(t, int64(5), all[0].Size)
		require.WithinDuration(t, began, all[0].Modified, time.Minute)

		// What only begins other names is no object.
		_, err = s.Get(t.Context(), "acme")
		require.True(t, fault.Is(err, fault.NotFound), "%v", err)
		require.NoError(t, s.Delete(t.Context(), "acme"))
		require.NoError(t, s.Delete(t.Context(), "acme/2.oneo"))
		require.NoError(t, s.Delete(t.Context(), "acme/2.oneo"))
		require.Equal(t, []string{"acme/1.oneo"}, names(t, s, "acme/"))
		require.NoError(t, s.Put(t.Context(), "nothing", text("")))
		require.Empty(t, read(t, s, "nothing"))

		for _, bad := range []string{"", "/", "..", "../x", "a/../x", "/etc/passwd", "a//b", "a/", ".x", "a/.x", "a\\b", "a b", "a\x00", "a\nb", "ä", strings.Repeat("a", 1025)} {
			require.True(t, fault.Is(s.Put(t.Context(), bad, text("")), fault.Invalid), bad)
			_, err := s.Get(t.Context(), bad)
			require.True(t, fault.Is(err, fault.Invalid), bad)
			require.True(t, fault.Is(s.Delete(t.Context(), bad), fault.Invalid), bad)
		}
		for _, bad := range []string{"a", "/", "../", "a/../", ".x/", "a//"} {
			require.True(t, fault.Is(s.Sweep(t.Context(), bad, time.Hour), fault.Invalid), bad)
		}
	})
}

// What is large comes back as it was, at each size around that of a part.
func TestLarge(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, s kind) {
		for _, size := range []int{part - 1, part, part + 1, 2 * part, 5*part + 7} {
			large := bytes.Repeat([]byte("0123456789abcdef!"), size/17+1)[:size]
			require.NoError(t, s.Put(t.Context(), "large", func(w io.Writer) error {
				for rest := large; len(rest) > 0; rest = rest[min(len(rest), 10_001):] {
					if n, err := w.Write(rest[:min(len(rest), 10_001)]); err != nil || n != min(len(rest), 10_001) {
						return fmt.Errorf("%d bytes: %w", n, err)
					}
				}
				return nil
			}))
			require.True(t, read(t, s, "large") == string(large), size)
			require.Zero(t, s.left(t))
		}
	})
}

// What cannot be written to its end leaves what was there, and nothing else, however far it was.
func TestWholeOrNotThere(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, s kind) {
		require.NoError(t, s.Put(t.Context(), "a/x", text("first")))
		for _, size := range []int{0, 100, part, 3*part + 1} {
			for _, cause := range []error{errors.New("the tenant is gone"), io.EOF, io.ErrUnexpectedEOF, io.ErrShortWrite} {
				for _, name := range []string{"a/x", "a/y"} {
					err := s.Put(t.Context(), name, func(w io.Writer) error {
						require.NoError(t, text(strings.Repeat("x", size))(w))
						require.Equal(t, []string{"a/x"}, names(t, s, ""), "what is being written is not listed")
						return cause
					})
					require.Equal(t, cause, err, "as it is")
				}
			}
			ctx, cancel := context.WithCancel(t.Context())
			require.ErrorIs(t, s.Put(ctx, "a/x", func(w io.Writer) error {
				require.NoError(t, text(strings.Repeat("x", size))(w))
				cancel()
				return nil
			}), context.Canceled)
		}
		require.Equal(t, []string{"a/x"}, names(t, s, ""))
		require.Equal(t, "first", read(t, s, "a/x"))
		require.Zero(t, s.left(t))
	})
}

// What killed processes have left is no object. It goes when it is old enough, and only where it is asked for.
func TestSweep(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, s kind) {
		require.NoError(t, s.Sweep(t.Context(), "", 0), "of nothing")
		require.NoError(t, s.Put(t.Context(), "acme/x", text("whole")))
		for _, name := range []string{"acme/1", "acme/2", "acme2/1", "beta/1", "beta/2"} {
			s.leave(t, name, 8*24*time.Hour)
			s.leave(t, name, time.Hour)
		}
		require.Equal(t, []string{"acme/x"}, names(t, s, ""))
		require.Equal(t, 10, s.left(t))
		require.NoError(t, s.Sweep(t.Context(), "gamma/", 0))
		require.NoError(t, s.Sweep(t.Context(), "acme/", 7*24*time.Hour))
		require.Equal(t, 8, s.left(t))
		require.NoError(t, s.Sweep(t.Context(), "acme/", 0))
		require.Equal(t, 6, s.left(t))
		require.NoError(t, s.Sweep(t.Context(), "", 7*24*time.Hour))
		require.Equal(t, 3, s.left(t))
		s.leave(t, "beta/3", -time.Hour) // a clock was wrong
		require.NoError(t, s.Sweep(t.Context(), "", 0))
		require.Zero(t, s.left(t))
		require.Equal(t, "whole", read(t, s, "acme/x"))
	})
}

// Many writers of one name: one of them wins, and is not mixed with another.
func TestManyAtOnce(t *testing.T) {
	t.Parallel()
	each(t, func(t *testing.T, s kind) {
		failed := make(chan error)
		for i := range 10 {
			go func() {
				failed <- s.Put(context.Background(), "x", text(strings.Repeat(fmt.Sprint(i), 2*part)))
			}()
		}
		for range 10 {
			require.NoError(t, <-failed)
		}
		got := read(t, s, "x")
		require.Equal(t, strings.Repeat(got[:1], 2*part), got)
		require.Zero(t, s.left(t))
	})
}

// Another kind of store is an opener of its scheme, in a file with a build tag: here it is export_test.go.
func TestOpen(t *testing.T) {
	t.Parallel()
	s, err := store.Open("test://somewhere", []string{"KEY=value"})
	require.NoError(t, err)
	require.Equal(t, "test://somewhere KEY=value", s.String())
	path := t.TempDir()
	s, err = store.Open(path, nil)
	require.NoError(t, err)
	require.Equal(t, path, s.String())
	_, err = store.Open("gs://bucket", keys)
	require.True(t, fault.Is(err, fault.Unsupported), "%v", err)
	require.ErrorContains(t, err, `no store of the kind "gs"`)
	require.Contains(t, fault.Of(err).Hint, "s3:// or test://")
	_, err = store.Open("", keys)
	require.ErrorContains(t, err, "no store is configured")
}

// Files are their owner's only. A file that is written by itself is there whole, or as it was.
func TestFiles(t *testing.T) {
	t.Parallel()
	path := t.TempDir()
	s, err := store.NewDir(filepath.Join(path, "store"))
	require.NoError(t, err)
	_, err = s.Get(t.Context(), "a")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	require.NoDirExists(t, filepath.Join(path, "store"), "reading makes nothing")
	require.NoError(t, s.Put(t.Context(), "a/x", text("")))
	for name, mode := range map[string]os.FileMode{"store": 0o700, "store/a": 0o700, "store/a/x": 0o600} {
		info, err := os.Stat(filepath.Join(path, name))
		require.NoError(t, err)
		require.Equal(t, mode, info.Mode().Perm(), name)
	}
	full := errors.New("no space left on device")
	file := filepath.Join(path, "file")
	require.ErrorIs(t, store.WriteFile(t.Context(), file, func(w io.Writer) error { return errors.Join(text("half")(w), full) }), full)
	require.NoFileExists(t, file)
	require.NoError(t, store.WriteFile(t.Context(), file, text("whole")))
	require.ErrorIs(t, store.WriteFile(t.Context(), filepath.Join(path, "nowhere", "file"), text("")), os.ErrNotExist)

	// A directory that is none is a store that cannot be used.
	s, err = store.NewDir(file)
	require.NoError(t, err)
	_, lerr := s.List(t.Context(), "")
	_, gerr := s.Get(t.Context(), "x")
	for _, err := range []error{lerr, gerr, s.Put(t.Context(), "x", text("")), s.Delete(t.Context(), "x"), s.Sweep(t.Context(), "", 0)} {
		require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	}
}

// What a directory tells is on the disk: each file before it has its name, and the names before the last Put returns, which
// brings that of a Put ahead of it along.
func TestOnTheDisk(t *testing.T) {
	t.Parallel()
	path := t.TempDir()
	s, err := store.NewDir(path)
	require.NoError(t, err)
	require.NoError(t, s.Put(t.Context(), "a/made", text("")))
	var synced []string
	s.Synced(func(f *os.File) {
		info, err := f.Stat()
		require.NoError(t, err)
		what := fmt.Sprintf("file of %d", info.Size())
		if info.IsDir() {
			what = filepath.Base(f.Name())
		}
		synced = append(synced, fmt.Sprint(what, " ", names(t, s, "a/")))
	})
	require.NoError(t, store.PutAhead(t.Context(), s, "a/first", text("first")))
	require.NoError(t, s.Put(t.Context(), "a/second", text("second")))
	require.Equal(t, []string{
		"file of 5 [a/made]", "file of 6 [a/first a/made]", "a [a/first a/made a/second]",
	}, synced)
	require.Equal(t, "first", read(t, s, "a/first"))
	synced = nil
	require.NoError(t, s.Put(t.Context(), "a/first", text("alone")))
	require.Len(t, synced, 2)
}

// Who writes takes away what is old beside it, and leaves what is not its own.
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
	require.NoError(t, s.Sweep(t.Context(), "", 0))
	require.NoFileExists(t, filepath.Join(path, ".oneo-partial-NEW"))
	require.FileExists(t, filepath.Join(path, ".hidden"))
	require.Equal(t, []string{"x"}, names(t, s, ""))
}

// No link leads out, as no name does.
func TestNoWayOut(t *testing.T) {
	t.Parallel()
	outside := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600))
	path := t.TempDir()
	s, err := store.NewDir(path)
	require.NoError(t, err)
	require.NoError(t, os.Symlink(outside, filepath.Join(path, "link")))
	_, err = s.Get(t.Context(), "link/secret")
	require.Error(t, err)
	require.Error(t, s.Put(t.Context(), "link/new", text("")))
	require.NoFileExists(t, filepath.Join(outside, "new"))
	require.Error(t, s.Delete(t.Context(), "link/secret"))
	require.FileExists(t, filepath.Join(outside, "secret"))
	for _, prefix := range []string{"", "../", "/", "../secret", "a/../../"} {
		require.Empty(t, names(t, s, prefix), prefix)
	}
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
