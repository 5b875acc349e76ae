// Package transfer carries one tenant between a database and an archive: export and import, and what is made of them.
//
// It promises: an export holds every row as it was at one moment and costs nothing that grows with the number of other
// tenants; nothing of an archive is seen by anybody before all of it has been read and compared with its checksums; an
// import that fails, or whose process dies, leaves nothing; and SQL from an archive is run only by who said so.
package transfer

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options is what a Transfers needs.
type Options struct {
	DB         *postgres.DB
	Migrate    *migrate.Migrator
	Structure  *structure.Checker
	Provision  *provision.Provisioner
	BaseDomain tenant.Host
	Version    string // of this program, for the headers of archives
	// Volatile are tables whose rows are never archived: sessions, that would log somebody in.
	Volatile []string
	// Personal says what the tables hold of people, for masking; it is called with a search path of the tenant's. nil: only the
	// comments of columns do.
	Personal func(ctx context.Context, q postgres.Querier) (Personal, error)
	// Secret is the installation's: what is masked depends on it. Empty: nothing can be masked.
	Secret string
	// LockWait is how long another operation on the tenant is waited for; 0 is 10 seconds.
	LockWait time.Duration
	// Marker sets restore points before merges; nil: there are none. The Provisioner has its own.
	Marker *registry.Marker
	Logger *slog.Logger
}

// Transfers exports and imports tenants. It is safe for concurrent use.
type Transfers struct {
	o       Options
	carried sync.Map // what complete has tried: comments by group and structure
}

// New checks the options. The Provisioner's moves are carried by what it returns.
func New(o Options) (*Transfers, error) {
	if o.DB == nil || o.Migrate == nil || o.Structure == nil || o.Provision == nil || o.Logger == nil || o.BaseDomain.IsZero() {
		return nil, errors.New("transfer: DB, Migrate, Structure, Provision, BaseDomain and Logger must be given")
	}
	if o.LockWait == 0 {
		o.LockWait = 10 * time.Second
	}
	x := &Transfers{o: o}
	o.Provision.CarryBy(x)
	return x, nil
}

// named gives a fault the tenant that it is about.
func named(err error, t tenant.Tenant) error {
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = t.Slug.String()
	}
	return err
}
