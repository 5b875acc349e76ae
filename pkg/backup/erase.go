package backup

import (
	"context"
	"path"
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

// Left is what the store holds of one tenant.
type Left struct {
	// Archives counts those of its own and those in full backups, whole or not; Bytes is their size.
	Archives int
	Bytes    int64
}

// Left is what the store holds of each tenant, by their ids for the outside.
func (b *Backups) Left(ctx context.Context) (map[string]Left, error) {
	objects, err := b.o.Store.List(ctx, "")
	if err != nil {
		return nil, err
	}
	all := map[string]Left{}
	for _, o := range objects {
		id, _, _ := strings.Cut(o.Name, "/")
		archived := !strings.HasSuffix(o.Name, manifestSuffix)
		if strings.HasPrefix(o.Name, fullPrefix) {
			id, archived = strings.CutSuffix(path.Base(o.Name), archiveSuffix)
		}
		if checkTenantID(id) != nil {
			continue
		}
		l := all[id]
		if l.Bytes += o.Size; archived {
			l.Archives++
		}
		all[id] = l
	}
	return all, nil
}

// Keeps counts the tenant's own backups that Keep keeps from being pruned.
func (b *Backups) Keeps(ctx context.Context, tenantID string) (n int, err error) {
	if err := checkTenantID(tenantID); err != nil {
		return 0, err
	}
	c, err := b.List(ctx, tenantID)
	for _, m := range c.Backups {
		if m.Kept {
			n++
		}
	}
	return n, err
}
