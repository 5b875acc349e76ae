package provision

import (
	"context"
	"time"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// PurgeIfOverdue is what a worker does with a tenant that it has found overdue.
func (p *Provisioner) PurgeIfOverdue(ctx context.Context, slug tenant.Slug) error {
	_, err := p.purge(ctx, slug, "test", true)
	return err
}

// PurgeAsRead purges a tenant as it was when it was read.
func (p *Provisioner) PurgeAsRead(ctx context.Context, t tenant.Tenant) error {
	c, err := p.purging(ctx, t, "test")
	if err != nil {
		return err
	}
	_, err = p.run(ctx, c, nil)
	return err
}

// KeepPools does what Work does for the pools, until nothing is left to do.
func (p *Provisioner) KeepPools(ctx context.Context) {
	for k := (&keeper{paused: map[string]time.Time{}}); p.keepPools(ctx, k); {
	}
}

// Keep does one thing for one pool.
func (p *Provisioner) Keep(ctx context.Context, group string, size int) (bool, error) {
	return p.keep(ctx, group, size)
}

// DropNow and RenameNow begin a change of a tenant as it was read, without waiting for another operation on it.
func (p *Provisioner) DropNow(ctx context.Context, t tenant.Tenant) (tenant.Tenant, error) {
	return p.run(ctx, p.dropping(t, time.Hour, "test"), nil)
}

// RenameNow: see DropNow.
func (p *Provisioner) RenameNow(ctx context.Context, t tenant.Tenant, schema string) (tenant.Tenant, error) {
	to, err := tenant.ParseSchema(schema)
	if err != nil {
		return t, err
	}
	return p.run(ctx, p.renaming(t, RenameRequest{Slug: t.Slug, Schema: to, Name: t.Name, Actor: "test"}), nil)
}
