// Package snapshot copies one tenant's schema and puts it back: the undo points of runs.
//
// An undo point is what a run keeps of a tenant in the transactions of the tenant's own migrations: the rows of the
// tables that these change, as they were. It promises: a run never changes a row, or takes away a column or a rule for
// rows, of a table that was not copied before; nobody but the owner reads the copies; and Undo either leaves the tenant
// with the structure of its old version, those tables as they were and all others as they are, or changes nothing. What it
// takes out of use is kept until the point expires. Of a tenant that has gone on since, or has something that would be
// lost, nothing is taken back: it says why.
package snapshot

import (
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options is what a Snapshots needs.
type Options struct {
	DB      *postgres.DB
	Migrate *migrate.Migrator
	// Keep is how long an undo point is kept behind the last change that the run has made to its tenant; once the tenant
	// was taken back, how long what was there until then is kept.
	Keep time.Duration
	// LockWait is how long Undo waits for another operation on the tenant; 0 is 10 seconds.
	LockWait time.Duration
	Logger   *slog.Logger
}

// Snapshots keeps undo points and puts tenants back. It is safe for concurrent use.
type Snapshots struct {
	o Options

	mu         sync.Mutex
	references map[reference]map[string]bool
}

// New checks the options.
func New(o Options) (*Snapshots, error) {
	if o.DB == nil || o.Migrate == nil || o.Logger == nil || o.Keep <= 0 {
		return nil, errors.New("snapshot: DB, Migrate, Logger and a Keep above 0 must be given")
	}
	if o.LockWait == 0 {
		o.LockWait = 10 * time.Second
	}
	return &Snapshots{o: o, references: map[reference]map[string]bool{}}, nil
}

// mark tells a run's schemas from those of others: the end of its id, by which people call it too. The beginning is a
// time, which other runs share.
func mark(run uuid.UUID) string {
	s := run.String()
	return s[len(s)-8:]
}

// Keepable refuses a way from one version to another on which a step is that no undo point can cover. The fault is
// Invalid and names the step.
func (s *Snapshots) Keepable(from, to int) error {
	for _, f := range s.o.Migrate.Files(migrate.TenantSet)[from:to] {
		switch {
		case f.Kind == migrate.NoTransaction && !f.OnlyIndexes():
			return fault.New(fault.Invalid, "no undo point can be kept of migration %s: it is not one transaction, and does more than make, drop or tend indexes", f).
				WithCode("no_undo_point").WithHint("leave --undo-point out, or give what changes tables or rows a file of its own, without `no-transaction`")
		case f.Kind == migrate.Data && f.Beside:
			return fault.New(fault.Invalid, "no undo point can be kept of migration %s: its batches run beside what comes after it, perhaps in another run", f).
				WithCode("no_undo_point").WithHint("leave --undo-point out, or take `-- oneo: beside` out of the file")
		}
	}
	return nil
}

// named gives a fault the tenant that it is about.
func named(err error, t tenant.Tenant) error {
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = t.Slug.String()
	}
	return err
}
