package transfer

import (
	"context"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/provision"
)

// Filling is an archive as provision takes it.
func (x *Transfers) Filling(ctx context.Context, a *archive.Reader, group string) (provision.Filling, error) {
	return x.filling(ctx, a, group, Loading{}, &archive.Trailer{})
}
