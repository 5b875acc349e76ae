package transfer

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// errTried ends the transaction in which an archive was tried.
var errTried = errors.New("the archive has been restored")

// Try restores an archive into a schema that nobody ever sees, in the database of a group, and takes everything back:
// rows, counts, checksums, indexes, constraints, structure and the migrations up to the newest version are those of a real restore. It
// writes as much as one, and holds no lock that a tenant waits for. Faults: those of Import.
func (x *Transfers) Try(ctx context.Context, group string, r io.Reader, o Loading) (archive.Trailer, error) {
	var trailer archive.Trailer
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: o.Identities, MaxBytes: o.MaxBytes})
	if err != nil {
		return trailer, err
	}
	defer a.Close()
	fill, err := x.filling(ctx, a, group, o, &trailer)
	if err != nil {
		return trailer, err
	}
	inst, err := x.o.DB.Installation(ctx, group)
	if err != nil {
		return trailer, err
	}
	name := tenant.TrySchema(rand.Uint64())
	at := structure.Schema{Name: name.String(), Role: inst.AppRole}
	before, undo := "", "drop schema if exists "+postgres.Quote(at.Name)+" cascade"
	if x.o.DB.Isolation() == postgres.ByRole {
		at.Role = at.Name
		before = "create role " + postgres.Quote(at.Role) + " nologin noinherit;\n"
		undo += "; drop role if exists " + postgres.Quote(at.Role)
	}
	committed := false
	err = x.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		began, err := migrate.Transaction(ctx, tx)
		if err != nil {
			return err
		}
		if err := x.o.Migrate.Create(ctx, tx, name, fill.Version, before+structure.Empty(at), ""); err != nil {
			return err
		}
		if err := fill.Rows(ctx, tx, at); err != nil {
			return err
		}
		if err := x.o.Migrate.Advance(ctx, tx, name, fill.Version, x.head()); err != nil {
			return err
		}
		ended, err := migrate.Transaction(ctx, tx)
		if err != nil {
			return err
		}
		if err := migrate.SameTransaction(began, ended); err != nil {
			committed = true
			return err
		}
		return errTried
	})
	switch {
	case errors.Is(err, errTried):
		return trailer, nil
	case committed: // what would have been rolled back
		err = errors.Join(err, x.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error { return tx.Script(ctx, undo) }))
	}
	return trailer, err
}
