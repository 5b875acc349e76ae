// Package store is where archives lie: objects with names in a directory or with an object store, behind one small
// interface. It promises that an object is there whole or not at all, whatever happens to the process or the disk while
// it is written, and that no name leads out of the store.
package store

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Store keeps objects. It is safe for concurrent use. Faults: Unavailable where it cannot be reached, or does not answer;
// Forbidden where it lets nobody in; TooLarge where it is full; Invalid for a name that is none.
type Store interface {
	// Put makes an object of what write writes, or replaces it: it is there when Put returns nil, and all of it. Otherwise
	// all is as it was, but for a store at a distance whose answer to the last word was lost: there it may be there, whole. An
	// error of write comes back as it is; what it writes to returns the store's faults.
	Put(ctx context.Context, name string, write func(io.Writer) error) error
	// Get opens an object, which must be closed. NotFound: there is none of this name.
	Get(ctx context.Context, name string) (io.ReadCloser, error)
	// List returns the objects whose names begin with prefix, in the order of their names.
	List(ctx context.Context, prefix string) ([]Object, error)
	// Delete takes an object away. It does nothing when there is none.
	Delete(ctx context.Context, name string) error
	// Sweep takes away what Puts that were killed have left of objects whose names begin with prefix, which is empty or ends
	// with a slash, and that were begun longer ago than age; 0: however short. Such leftovers are no objects.
	Sweep(ctx context.Context, prefix string, age time.Duration) error
	// String says where it is, without secrets.
	String() string
}

// PutAhead is Put for an object that is nothing without a second one, of a name in the same folder, that is Put behind it: until that Put
// has returned, a loss of power may take the first one's name away, and never a part of what it holds.
//
// A directory is then brought to the disk once for both. What has a name is whole, because a file gets it when it is on the disk
// itself, and the second Put brings both names there before it is told. In between, file systems with a journal (ext4, XFS, Btrfs) bring names there in
// the order in which they were given, so that there is no second one without the first. One that does not shows the second one alone, of what
// nobody was told of: whoever reads it must look whether the first one is there.
func PutAhead(ctx context.Context, s Store, name string, write func(io.Writer) error) error {
	if d, is := s.(*Dir); is {
		return d.put(ctx, name, write, false)
	}
	return s.Put(ctx, name, write)
}

// Object is one thing in a store.
type Object struct {
	Name     string
	Size     int64 // bytes
	Modified time.Time
}

// A name is parts between slashes, none of which begins with a dot: neither a way out of a directory nor one of the
// files that a store itself needs.
var names = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._=+-]*(/[A-Za-z0-9_][A-Za-z0-9._=+-]*)*$`)

// maxName bounds a name, in bytes: what S3 allows.
const maxName = 1024

func checkName(name string) error {
	if len(name) > maxName || !names.MatchString(name) {
		return fault.New(fault.Invalid, "%q is no name for an object in a store", name).WithCode("invalid_object_name")
	}
	return nil
}

func checkPrefix(prefix string) error {
	if name, ended := strings.CutSuffix(prefix, "/"); prefix != "" && (!ended || checkName(name) != nil) {
		return fault.New(fault.Invalid, "%q is no prefix of names of objects in a store", prefix).WithCode("invalid_object_name")
	}
	return nil
}

// failed says of an error, if it is one, what it means.
func failed(ctx context.Context, err error, s Store) error {
	var f *fault.Fault
	switch {
	case err == nil || errors.As(err, &f):
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return full(err, s)
	case errors.Is(err, fs.ErrPermission):
		return forbidden(err, s)
	}
	return fault.Wrap(err, fault.Unavailable, "the store %s cannot be used", s).WithCode("store_unreachable")
}

func full(cause error, s Store) *fault.Fault {
	return fault.Wrap(cause, fault.TooLarge, "the store %s is full", s).WithCode("store_full")
}

func forbidden(cause error, s Store) *fault.Fault {
	return fault.Wrap(cause, fault.Forbidden, "the store %s denies access", s).WithCode("store_forbidden")
}

func notFound(cause error, name string) error {
	return fault.Wrap(cause, fault.NotFound, "there is no %s in the store", name).WithCode("object_not_found")
}
