// Package store is where archives lie: objects with names in a directory or with an object store, behind one small
// interface. It promises that an object is there whole or not at all, whatever happens to the process or the disk while
// it is written, and that no name leads out of the store.
package store

import (
	"context"
	"io"
	"regexp"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Store keeps objects. It is safe for concurrent use.
type Store interface {
	// Put makes an object of what write writes, or replaces it. Only when Put returns nil is it there; otherwise all is as
	// it was. An error of write comes back.
	Put(ctx context.Context, name string, write func(io.Writer) error) error
	// Get opens an object, which must be closed. NotFound: there is none of this name.
	Get(ctx context.Context, name string) (io.ReadCloser, error)
	// List returns the objects whose names begin with prefix, in the order of their names.
	List(ctx context.Context, prefix string) ([]Object, error)
	// Delete takes an object away. It does nothing when there is none.
	Delete(ctx context.Context, name string) error
	// String says where it is, without secrets.
	String() string
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

func notFound(cause error, name string) error {
	return fault.Wrap(cause, fault.NotFound, "there is no %s in the store", name).WithCode("object_not_found")
}
