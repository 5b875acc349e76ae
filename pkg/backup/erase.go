package backup

import (
	"context"
	"strings"
)

// EraseArchives destroys every object of the tenant with this id: its backups, those that are kept as well, its part of full
// backups, and what interrupted ones have left, whole or not. It says how many archives there were, and is safe to repeat.
// Locked: somebody else is at the catalogue.
func (b *Backups) EraseArchives(ctx context.Context, tenantID string) (n int, err error) {
	if err := checkTenantID(tenantID); err != nil {
		return 0, err
	}
	err = b.alone(ctx, func(func() error) error {
		objects, err := b.o.Store.List(ctx, tenantID+"/")
		if err != nil {
			return err
		}
		// Without its manifest it is no backup any more, also if the archive stays behind.
		for _, manifests := range []bool{true, false} {
			for _, o := range objects {
				if strings.HasSuffix(o.Name, manifestSuffix) != manifests {
					continue
				}
				if err := b.o.Store.Delete(ctx, o.Name); err != nil {
					return err
				}
				if !manifests {
					n++
				}
			}
		}
		full, err := b.eraseFromFull(ctx, tenantID)
		n += full
		if err != nil {
			return err
		}
		return b.o.Store.Sweep(ctx, tenantID+"/", 0)
	})
	return n, err
}
