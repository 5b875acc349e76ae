package backup

import (
	"context"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/transfer"
)

// fewTenants is of how many tenants the backups are listed one by one, and not with all others.
const fewTenants = 10

// NewestOf are the newest backups of tenants with these ids for the outside, by these, and perhaps of others. A tenant without one is not
// among them, also where it is in a full backup.
func (b *Backups) NewestOf(ctx context.Context, ids []string) (map[string]Manifest, error) {
	c, err := b.of(ctx, ids)
	return c.Newest(), err
}

// of reads the backups of tenants, and perhaps of others as well.
func (b *Backups) of(ctx context.Context, ids []string) (all Catalogue, err error) {
	if len(ids) > fewTenants {
		return b.List(ctx, "")
	}
	for _, id := range ids {
		c, err := b.List(ctx, id)
		if err != nil {
			return all, err
		}
		all.Backups = append(all.Backups, c.Backups...)
	}
	return all, nil
}

// Provable are what a drill restores of tenants with these ids for the outside, by these, and perhaps of others: the newest of all that there
// is of a tenant, be it a backup of its own or its archive in a full backup. bad are full backups that cannot be believed, which do not count.
func (b *Backups) Provable(ctx context.Context, ids []string) (newest map[string]Manifest, bad []Bad, err error) {
	c, err := b.of(ctx, ids)
	if err != nil {
		return nil, nil, err
	}
	full, err := b.ListFull(ctx)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range full.Backups {
		for _, g := range f.Groups {
			for _, t := range g.Tenants {
				m := f.archive(g, t)
				m.Made = g.At // its rows are of the group's moment, and not of when they were written
				c.Backups = append(c.Backups, m)
			}
		}
	}
	slices.SortStableFunc(c.Backups, Manifest.compare)
	return c.Newest(), full.Bad, nil
}

// Drill restores a backup of the tenant with this number as Try does, and remembers that it went well.
func (b *Backups) Drill(ctx context.Context, number int32, m Manifest, o transfer.Loading) error {
	start := time.Now()
	if _, err := b.Try(ctx, m, "", o); err != nil {
		return err
	}
	return b.Remember(ctx, number, m, time.Since(start))
}

// Triable are the archives of a full backup's tenants that can be tried: of all but those that were erased since, which is how many.
func (b *Backups) Triable(ctx context.Context, f Full) (ms []Manifest, erased int, err error) {
	gone, err := b.erased(ctx)
	if err != nil {
		return nil, 0, err
	}
	for _, m := range f.Archives() {
		if _, is := gone[m.Tenant]; is {
			erased++
		} else if m.Tenant != "" {
			ms = append(ms, m)
		}
	}
	return ms, erased, nil
}
