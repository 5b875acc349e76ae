package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
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
	return trailer, x.scratch(ctx, group, fill.Version, func(tx *postgres.OwnerTx, name tenant.Schema, at structure.Schema) error {
		if err := fill.Rows(ctx, tx, at); err != nil {
			return err
		}
		return x.o.Migrate.Advance(ctx, tx, name, fill.Version, x.head())
	})
}

// scratch runs fn with a schema that the migrations up to a version have made and that nobody ever sees, in a transaction of the
// group's database that is rolled back.
func (x *Transfers) scratch(ctx context.Context, group string, version int, fn func(tx *postgres.OwnerTx, name tenant.Schema, at structure.Schema) error) error {
	inst, err := x.o.DB.Installation(ctx, group)
	if err != nil {
		return err
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
		if err := x.o.Migrate.Create(ctx, tx, name, version, before+structure.Empty(at), ""); err != nil {
			return err
		}
		if err := fn(tx, name, at); err != nil {
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
		return nil
	case committed: // what would have been rolled back
		err = errors.Join(err, x.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error { return tx.Script(ctx, undo) }))
	}
	return err
}

// complete refuses a tenant of which its own statements do not make all that it has beyond its migrations: nothing could be restored from its archive.
// It has made it by them in a schema that was rolled back, once for a structure, and adds the comments that are missing then.
func (x *Transfers) complete(ctx context.Context, ses *postgres.Session, group string, from *source) error {
	if len(from.own.Custom) == 0 && from.header.Fingerprint == from.header.Base {
		return nil
	}
	if err := ses.Script(ctx, bound(from.at)); err != nil {
		return err
	}
	comments, err := commentsOf(ctx, ses, from.at.Name)
	if err != nil {
		return err
	}
	if err := ses.Script(ctx, plain); err != nil {
		return err
	}
	key := [3]string{group, from.header.Base, from.header.Fingerprint}
	if _, known := x.carried.Load(key); !known {
		made, err := x.makes(ctx, group, from)
		if err != nil {
			return err
		}
		x.carried.Store(key, made)
	}
	made, _ := x.carried.Load(key)
	for _, c := range comments {
		if !slices.Contains(made.([]string), c) && !strings.HasPrefix(c, "comment on schema ") {
			from.own.Custom = append(from.own.Custom, archive.Statement{Object: "comment", SQL: c})
		}
	}
	return nil
}

// makes tries the statements, and returns the comments that the migrations have made.
func (x *Transfers) makes(ctx context.Context, group string, from *source) (comments []string, err error) {
	refused := func(what string) error {
		return fault.New(fault.Conflict, "the tenant has what an archive cannot carry: %s", what).WithCode("not_carried").
			WithHint("make it in a migration, or take it away; `oneo migrate drift -t %s` shows all that is not in the migrations", from.header.Slug)
	}
	return comments, x.scratch(ctx, group, from.header.Version(), func(tx *postgres.OwnerTx, _ tenant.Schema, at structure.Schema) error {
		var owner string
		if err := tx.QueryRow(ctx, `select current_user::text`).Scan(&owner); err != nil {
			return err
		}
		if err := tx.Script(ctx, plain+";\n"+bound(at)+"; set local check_function_bodies to off"); err != nil {
			return err
		}
		steps := make([]structure.Step, len(from.own.Custom))
		for i, c := range from.own.Custom {
			steps[i] = structure.Step{What: c.Object, SQL: c.SQL}
		}
		if step, err := structure.Run(ctx, tx, at, owner, steps); err != nil && step.SQL == "" {
			return err
		} else if err != nil {
			return refused(fmt.Sprintf("%s (%v)", step.What, err))
		}
		if comments, err = commentsOf(ctx, tx, at.Name); err != nil {
			return err
		}
		have, err := structure.Read(ctx, tx, at)
		if err != nil {
			return err
		}
		var lacks []string
		for _, d := range structure.Compare(from.have, have) {
			lacks = append(lacks, d.String())
		}
		if len(lacks) > 0 {
			return refused(strings.Join(lacks, "; "))
		}
		return nil
	})
}
