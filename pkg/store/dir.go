package store

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Dir keeps objects as files below a directory. Files are readable by their owner only.
type Dir struct {
	path string
}

// NewDir keeps objects below a directory, which is made when the first one is.
func NewDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	return &Dir{path: abs}, nil
}

func (d *Dir) String() string { return d.path }

// root opens the directory so that no name and no link below it leads out of it.
func (d *Dir) root(create bool) (*os.Root, error) {
	if create {
		if err := os.MkdirAll(d.path, 0o700); err != nil {
			return nil, err
		}
	}
	return os.OpenRoot(d.path)
}

// Put implements Store.
func (d *Dir) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	if err := checkName(name); err != nil {
		return err
	}
	root, err := d.root(true)
	if err != nil {
		return unreachable(err, d)
	}
	defer root.Close()
	if dir := path.Dir(name); dir != "." {
		if err := root.MkdirAll(dir, 0o700); err != nil {
			return unreachable(err, d)
		}
	}
	return writeWhole(ctx, root, name, write)
}

// WriteFile makes a file of what write writes, or replaces it: it is there whole or as it was before. Only its owner can
// read it.
func WriteFile(ctx context.Context, name string, write func(io.Writer) error) error {
	root, err := os.OpenRoot(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer root.Close()
	return writeWhole(ctx, root, filepath.Base(name), write)
}

// WriteDir makes a directory of the files that write creates in it, by names without a slash: it is there with all of
// them or not at all. There must be none of its name. Only its owner can read it.
func WriteDir(ctx context.Context, name string, write func(create func(name string) (io.WriteCloser, error)) error) (err error) {
	root, err := os.OpenRoot(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer root.Close()
	base := filepath.Base(name)
	if _, err := root.Lstat(base); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = &fs.PathError{Op: "mkdir", Path: name, Err: fs.ErrExist}
		}
		return err
	}
	sweep(root, ".")
	tmp := temporary + rand.Text()
	if err := root.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = root.RemoveAll(tmp)
		}
	}()
	in, err := root.OpenRoot(tmp)
	if err != nil {
		return err
	}
	defer in.Close()
	err = write(func(name string) (io.WriteCloser, error) {
		f, err := in.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return synced{f}, err
	})
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := syncDir(in, "."); err != nil {
		return err
	}
	// It takes the place of no other one: a directory that holds something is not replaced.
	if err := root.Rename(tmp, base); err != nil {
		return err
	}
	return syncDir(root, ".")
}

// synced is a file that is on the disk when it is closed.
type synced struct{ *os.File }

func (s synced) Close() error { return errors.Join(s.Sync(), s.File.Close()) }

// temporary begins the names of files that are being written.
const temporary = ".oneo-partial-"

// stale is when a file that was being written belongs to a process that is dead: no archive takes so long.
const stale = 7 * 24 * time.Hour

func writeWhole(ctx context.Context, root *os.Root, name string, write func(io.Writer) error) (err error) {
	dir := path.Dir(name)
	sweep(root, dir)
	tmp := path.Join(dir, temporary+rand.Text())
	f, err := root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			_ = root.Remove(tmp)
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	// Only what has reached the disk gets the name, and only a name that has reached the disk is told.
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := root.Rename(tmp, name); err != nil {
		return err
	}
	return syncDir(root, dir)
}

func syncDir(root *os.Root, dir string) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// sweep takes away what processes that died have left behind. What it cannot take away is in nobody's way.
func sweep(root *os.Root, dir string) {
	d, err := root.Open(dir)
	if err != nil {
		return
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), temporary) {
			continue
		}
		if info, err := e.Info(); err == nil && time.Since(info.ModTime()) > stale {
			_ = root.RemoveAll(path.Join(dir, e.Name()))
		}
	}
}

// Get implements Store.
func (d *Dir) Get(_ context.Context, name string) (io.ReadCloser, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(err, name)
	}
	if err != nil {
		return nil, unreachable(err, d)
	}
	defer root.Close()
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(err, name)
	}
	if err != nil {
		return nil, unreachable(err, d)
	}
	return f, nil
}

// List implements Store.
func (d *Dir) List(ctx context.Context, prefix string) ([]Object, error) {
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, unreachable(err, d)
	}
	defer root.Close()
	var all []Object
	err = fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // deleted meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if e.IsDir() {
			if name != "." && !strings.HasPrefix(name+"/", prefix) && !strings.HasPrefix(prefix, name+"/") {
				return fs.SkipDir
			}
			return nil
		}
		if !e.Type().IsRegular() || !strings.HasPrefix(name, prefix) || checkName(name) != nil {
			return nil
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		all = append(all, Object{Name: name, Size: info.Size(), Modified: info.ModTime()})
		return nil
	})
	if err != nil {
		return nil, unreachable(err, d)
	}
	slices.SortFunc(all, func(a, b Object) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Delete implements Store.
func (d *Dir) Delete(_ context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return unreachable(err, d)
	}
	defer root.Close()
	if err := root.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return unreachable(err, d)
	}
	return nil
}

func unreachable(err error, s Store) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fault.Wrap(err, fault.Unavailable, "the store %s cannot be used", s).WithCode("store_unreachable")
}
