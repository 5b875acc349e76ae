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
)

// Dir keeps objects as files below a directory. Files are readable by their owner only.
type Dir struct {
	path string
	sync func(*os.File) error // brings a file or a directory to the disk
}

// NewDir keeps objects below a directory, which is made when the first one is.
func NewDir(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	return &Dir{path: abs, sync: (*os.File).Sync}, nil
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
	return d.put(ctx, name, write, true)
}

// put leaves it to whoever is told of a name to bring it to the disk, unless told is set.
func (d *Dir) put(ctx context.Context, name string, write func(io.Writer) error, told bool) error {
	if err := checkName(name); err != nil {
		return err
	}
	root, err := d.root(true)
	if err != nil {
		return failed(ctx, err, d)
	}
	defer root.Close()
	if err := makeDir(root, path.Dir(name), d.sync); err != nil {
		return failed(ctx, err, d)
	}
	var theirs error
	err = writeWhole(ctx, root, name, d.sync, func(w io.Writer) error {
		theirs = write(writerFunc(func(p []byte) (int, error) {
			n, err := w.Write(p)
			return n, failed(ctx, err, d)
		}))
		return theirs
	})
	if theirs != nil {
		return theirs
	}
	if err == nil && told {
		err = syncDir(root, path.Dir(name), d.sync)
	}
	return failed(ctx, err, d)
}

// makeDir makes a directory and those above it, on the disk.
func makeDir(root *os.Root, dir string, sync func(*os.File) error) error {
	if _, err := root.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := root.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for dir != "." {
		dir = path.Dir(dir)
		if err := syncDir(root, dir, sync); err != nil {
			return err
		}
	}
	return nil
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// WriteFile makes a file of what write writes, or replaces it: it is there whole or as it was before. Only its owner can
// read it.
func WriteFile(ctx context.Context, name string, write func(io.Writer) error) error {
	root, err := os.OpenRoot(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer root.Close()
	if err := writeWhole(ctx, root, filepath.Base(name), (*os.File).Sync, write); err != nil {
		return err
	}
	return syncDir(root, ".", (*os.File).Sync)
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
	if err := syncDir(in, ".", (*os.File).Sync); err != nil {
		return err
	}
	// It takes the place of no other one: a directory that holds something is not replaced.
	if err := root.Rename(tmp, base); err != nil {
		return err
	}
	return syncDir(root, ".", (*os.File).Sync)
}

// synced is a file that is on the disk when it is closed.
type synced struct{ *os.File }

func (s synced) Close() error { return errors.Join(s.Sync(), s.File.Close()) }

// temporary begins the names of files that are being written.
const temporary = ".oneo-partial-"

// stale is when a file that was being written belongs to a process that is dead: no archive takes so long.
const stale = 7 * 24 * time.Hour

// writeWhole writes a file and then gives it its name, which is on the disk once its directory is: only then it may be told.
func writeWhole(ctx context.Context, root *os.Root, name string, sync func(*os.File) error, write func(io.Writer) error) (err error) {
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
	// Only what has reached the disk gets the name.
	if err := sync(f); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return root.Rename(tmp, name)
}

func syncDir(root *os.Root, dir string, sync func(*os.File) error) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return sync(d)
}

// sweep takes away what processes that died have left behind. What it cannot take away is in nobody's way.
func sweep(root *os.Root, dir string) { _ = sweepDir(root, dir, stale) }

// sweepDir takes away what was being written in a directory and is older than age.
func sweepDir(root *os.Root, dir string, age time.Duration) error {
	d, err := root.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := d.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), temporary) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && !old(info.ModTime(), age) { // it is whole meanwhile, or is being written
			continue
		}
		if err == nil {
			err = root.RemoveAll(path.Join(dir, e.Name()))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// old reports whether something from a time is older than age. With 0 all is, whatever the clock says.
func old(from time.Time, age time.Duration) bool { return age == 0 || time.Since(from) > age }

// Sweep implements Store.
func (d *Dir) Sweep(ctx context.Context, prefix string, age time.Duration) error {
	if err := checkPrefix(prefix); err != nil {
		return err
	}
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return failed(ctx, err, d)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), path.Clean(prefix), func(name string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // there is nothing of the prefix, or it was deleted meanwhile
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil || !e.IsDir() {
			return err
		}
		return sweepDir(root, name, age)
	})
	return failed(ctx, err, d)
}

// Get implements Store.
func (d *Dir) Get(ctx context.Context, name string) (io.ReadCloser, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(err, name)
	}
	if err != nil {
		return nil, failed(ctx, err, d)
	}
	defer root.Close()
	f, err := root.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, notFound(err, name)
	}
	if err != nil {
		return nil, failed(ctx, err, d)
	}
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		f.Close()
		return nil, notFound(err, name)
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
		return nil, failed(ctx, err, d)
	}
	defer root.Close()
	from := path.Dir(prefix) // what else there is may be a lot
	if !fs.ValidPath(from) {
		from = "."
	}
	var all []Object
	err = fs.WalkDir(root.FS(), from, func(name string, e fs.DirEntry, err error) error {
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
		return nil, failed(ctx, err, d)
	}
	slices.SortFunc(all, func(a, b Object) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

// Delete implements Store.
func (d *Dir) Delete(ctx context.Context, name string) error {
	if err := checkName(name); err != nil {
		return err
	}
	root, err := d.root(false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return failed(ctx, err, d)
	}
	defer root.Close()
	info, err := root.Lstat(name)
	if err == nil && !info.IsDir() {
		err = root.Remove(name)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return failed(ctx, err, d)
}
