package migrate

import (
	"context"
	"crypto/sha256"
	"fmt"
	"regexp"
	"runtime/debug"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Func is a step of the tenant set that is written in Go, in the same numbering as the files. Up is a step like a file
// with SQL: it runs in the transaction of its neighbours, bound to the tenant. Batch is a data migration: it is called
// in a transaction of its own again and again, until it returns 0. Exactly one of them is given. What they do must
// depend on nothing but the tenant's schema, because a new tenant is made by the same functions; they run again when the
// transaction has to be tried again. A panic is an error like any other.
type Func struct {
	Version int
	Name    string // [a-z0-9_]+, as in a file's name
	// Key stands for what the function does, as a file's content does: part of the checksum. A new key for a step that
	// has been applied somewhere is refused like an edited file.
	Key string

	Up    func(ctx context.Context, tx *postgres.OwnerTx) error
	Batch func(ctx context.Context, tx *postgres.OwnerTx, limit int) (changed int64, err error)
	// Down takes the step back; nil: it cannot be taken back.
	Down func(ctx context.Context, tx *postgres.OwnerTx) error

	Size     int  // of a batch: the limit that Batch is given; 0: DefaultBatch
	Beside   bool // Batch only, as `-- oneo: beside`
	Breaking bool // Up only, as `-- oneo: breaking`
}

var stepName = regexp.MustCompile(`^[a-z0-9_]+$`)

// file is the step as one of the set.
func (f Func) file() (File, error) {
	bad := func(format string, args ...any) (File, error) {
		return File{}, fault.New(fault.Invalid, "the migration %04d_%s in Go: "+format, append([]any{f.Version, f.Name}, args...)...).WithCode("bad_migrations")
	}
	switch {
	case f.Version < 1:
		return bad("its version must be above 0")
	case !stepName.MatchString(f.Name):
		return bad("its name may have a-z, 0-9 and _ only")
	case f.Key == "":
		return bad("it lacks a key, which stands for what it does")
	case (f.Up == nil) == (f.Batch == nil):
		return bad("it must have either Up or Batch")
	case f.Batch == nil && (f.Beside || f.Size != 0):
		return bad("Beside and Size go with Batch")
	case f.Size < 0:
		return bad("the size of a batch must be above 0")
	case f.Batch != nil && f.Breaking:
		return bad("a data migration cannot be breaking: an Up before it can")
	}
	file := File{
		Version: f.Version, Name: f.Name, Kind: Go, Breaking: f.Breaking, Beside: f.Beside,
		Checksum: sha256.Sum256([]byte("func\x00" + f.Name + "\x00" + f.Key)), code: &f,
	}
	if f.Batch != nil {
		file.Kind, file.Batch = Data, f.Size
		if f.Size == 0 {
			file.Batch = DefaultBatch
		}
	}
	return file, nil
}

// guarded calls a function of a migration and makes a panic an error.
func guarded(f File, fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fault.Wrap(fmt.Errorf("panic: %v\n%s", p, debug.Stack()), fault.Unfit, "migration %s panicked", f).
				WithCode(codeFailed).WithHint("the log holds the place; mend the function, then run the same command again")
		}
	}()
	return fn()
}
