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
