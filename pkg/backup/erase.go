package backup

import (
	"context"
	"strings"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// EraseArchives destroys every object of the tenant with this id: its backups, those that are kept as well, and what interrupted
// ones have left, whole or not. It says how many archives there were, and is safe to repeat. Locked: somebody else is at the
// catalogue.
func (b *Backups) EraseArchives(ctx context.Context, tenantID string) (n int, err error) {
	if id, err := uuid.Parse(tenantID); err != nil || id.String() != tenantID {
		return 0, fault.New(fault.Internal, "%q is no tenant's id: its archives were not erased", tenantID) // the beginning of others' names, perhaps
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
		return b.o.Store.Sweep(ctx, tenantID+"/", 0)
	})
	return n, err
}
