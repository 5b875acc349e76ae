package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Refillables are the tenants of a restored registry whose rows are not there yet: see provision.Refillables.
func (x *Transfers) Refillables(ctx context.Context, backup string) ([]provision.Refillable, bool, error) {
	return x.o.Provision.Refillables(ctx, backup)
}

// FitsShared refuses shared tables of versions that this program does not know.
func (x *Transfers) FitsShared(versions map[migrate.Set]int, oneo string) error {
	for _, set := range []migrate.Set{migrate.GroupSet, migrate.SharedSet} {
		if head := x.o.Migrate.Head(set); versions[set] > head {
			return fault.New(fault.Conflict, "the backup's shared tables are at version %d (%s); this oneo knows the migrations up to %d", versions[set], set, head).
				WithCode("archive_newer").WithHint("restore it with the oneo that wrote it, %s, or a newer one", oneo)
		}
	}
	return nil
}

// RefillLedger puts the ledger of tenants that are to be restored into a group's database that is not the registry's. numbers are theirs,
// and those of tenants of which there is no archive. It is safe to repeat until the first of them is restored. Conflict: the database is not empty.
func (x *Transfers) RefillLedger(ctx context.Context, group string, numbers []int32, r io.Reader, ids []archive.Identity) error {
	return x.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		_, err := x.loadShared(ctx, tx, group, numbers, r, ids)
		return err
	})
}

// RefillRegistry puts the shared tables of the registry's database back, in one transaction, and prepares the tenants as
// provision.BeginRefill says. numbers are as for RefillLedger, of the main group. Conflict: there are tenants, or other rows, already.
func (x *Transfers) RefillRegistry(ctx context.Context, numbers []int32, r io.Reader, ids []archive.Identity, plan provision.RefillPlan) (left []tenant.Tenant, err error) {
	err = x.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := vacantRegistry(ctx, tx); err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `delete from public.groups`); err != nil { // init's own row, which the backup has as well
			return err
		}
		trailer, err := x.loadShared(ctx, tx, postgres.MainGroup, numbers, r, ids)
		if err != nil {
			return err
		}
		for _, s := range trailer.Sequences {
			if s.Name != numbering {
				continue
			}
			// Spares that were made here may have taken numbers behind those of the backup.
			const on = `select pg_catalog.setval('public.tenant_numbers', greatest($1::bigint, (select last_value from public.tenant_numbers)))`
			if _, err := tx.Exec(ctx, on, s.Last); err != nil {
				return err
			}
		}
		const audited = `select pg_catalog.setval(pg_catalog.pg_get_serial_sequence('public.audit', 'id'), (select coalesce(max(id), 0) + 1 from public.audit), false)`
		if _, err := tx.Exec(ctx, audited); err != nil {
			return err
		}
		left, err = x.o.Provision.BeginRefill(ctx, tx, plan)
		return err
	})
	return left, err
}

// vacantRegistry refuses a registry in which there is anything that was not there after `oneo init`, and locks out whoever would make
// something now.
func vacantRegistry(ctx context.Context, tx *postgres.OwnerTx) error {
	if err := tx.Script(ctx, "lock table public.tenants in share row exclusive mode"); err != nil {
		return err
	}
	for _, table := range sharedTables {
		if table.name == "groups" || table.name == ledgerTable { // which says more than init has said only if there are tenants, or spares
			continue
		}
		var n int
		if err := tx.QueryRow(ctx, "select count(*) from public."+postgres.Quote(table.name)).Scan(&n); err != nil {
			return err
		}
		if n > 0 {
			return fault.New(fault.Conflict, "this installation is not empty: there are %d row(s) in public.%s", n, table.name).WithCode("not_empty").
				WithHint("restore into an empty database: make a new one, and run `oneo init` on it; nothing was changed")
		}
	}
	return nil
}

// VacantRegistry refuses an installation in which there is anything that was not there after `oneo init`.
func (x *Transfers) VacantRegistry(ctx context.Context) error {
	return x.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error { return vacantRegistry(ctx, tx) })
}

// loadShared puts the rows of an archive of shared tables into the tables as they are today: columns that have come since have
// their defaults.
func (x *Transfers) loadShared(ctx context.Context, tx *postgres.OwnerTx, group string, numbers []int32, r io.Reader, ids []archive.Identity) (trailer archive.Trailer, err error) {
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: ids})
	if err != nil {
		return trailer, err
	}
	defer a.Close()
	if h := a.Header(); h.Tenant != "" || h.Group != group {
		return trailer, fault.New(fault.Unverified, "the archive does not hold the shared tables of group %s", group).WithCode("backup_damaged")
	}
	if err := x.o.Provision.RoomToRefill(ctx, tx, group, numbers); err != nil {
		return trailer, err
	}
	if _, err := tx.Exec(ctx, `delete from public.ledger where set = 'tenant' and tenant = any($1)`, numbers); err != nil {
		return trailer, err
	}
	if err := tx.Script(ctx, plain); err != nil {
		return trailer, err
	}
	for {
		t, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return trailer, err
		}
		known := false
		for _, s := range sharedTables {
			known = known || s.name == t.Name && (group == postgres.MainGroup || t.Name == ledgerTable)
		}
		columns, err := []string(nil), error(nil)
		if known {
			columns, err = sharedColumns(ctx, tx, t.Name)
		}
		if err != nil {
			return trailer, err
		}
		for _, c := range t.Columns {
			known = known && slices.Contains(columns, c)
		}
		if !known {
			return trailer, fault.New(fault.Conflict, "the backup has a shared table %s with columns that this oneo does not know", t.Name).WithCode("archive_unfit").
				WithHint("restore it with the oneo that wrote it, %s", a.Header().Oneo)
		}
		if _, err := tx.CopyFrom(ctx, a, copyOf("public", t.Name, t.Columns)+" from stdin"); err != nil {
			return trailer, fmt.Errorf("load table %s: %w", t.Name, err)
		}
	}
	return a.Trailer()
}

// Refill puts the rows of a tenant of a restored registry back, from its archive in the full backup: see provision.Refill. An archive
// of an older version is migrated up. Faults: those of Import.
func (x *Transfers) Refill(ctx context.Context, of provision.Refillable, r io.Reader, o Loading) (t tenant.Tenant, trailer archive.Trailer, err error) {
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: o.Identities, MaxBytes: o.MaxBytes})
	if err != nil {
		return t, trailer, named(err, of.Tenant)
	}
	defer a.Close()
	if h := a.Header(); h.Tenant != of.ID || h.Number != of.Number {
		return t, trailer, named(fault.New(fault.Unverified, "the archive is that of %s, %s", h.Slug, h.Tenant).WithCode("backup_damaged"), of.Tenant)
	}
	if err := x.notErased(ctx, nil, a.Header(), o.Erased); err != nil {
		return t, trailer, named(err, of.Tenant)
	}
	fill, err := x.filling(ctx, a, of.Group, o, &trailer)
	if err != nil {
		return t, trailer, named(err, of.Tenant)
	}
	t, err = x.o.Provision.Refill(ctx, of, fill, o.Actor)
	return t, trailer, named(err, of.Tenant)
}
