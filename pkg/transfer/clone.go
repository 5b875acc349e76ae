package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"time"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// CloneOptions say what a tenant is cloned as.
type CloneOptions struct {
	Slug   tenant.Slug
	Schema tenant.Schema // zero: made from the slug
	Group  string        // empty: the original's
	// Empty takes the structure only, with the rows that migrations insert.
	Empty bool
	// Mask puts made-up values in the place of what is about people, while the rows pass: of them nothing is ever
	// written into the clone.
	Mask  bool
	Actor string
	// Progress is told how far the load is, now and then; may be nil.
	Progress func(Progress)
}

// Cloned is what a clone has become.
type Cloned struct {
	Tenant  tenant.Tenant
	Trailer archive.Trailer
	// Neutralized: the tenant migrations have a file that says what a clone must not take along, and it was run.
	Neutralized bool
	// Masking is what was masked, and what was not.
	Masking Masking
}

// CloneMark is the member of a tenant's settings that says of whom it is a clone.
const CloneMark = "clone"

// Clone makes a tenant of another one: an export, of one moment, that is read by an import while it is written. The clone has
// its own id and number, no session, and none of the original's domains; what it has beyond its migrations comes along.
// It is neutralised, and masked when that was asked for, before anybody sees it, and marked in its settings and in the audit trail of
// both. Faults: those of Export and Import. When it fails there is no clone.
func (x *Transfers) Clone(ctx context.Context, t tenant.Tenant, o CloneOptions) (done Cloned, err error) {
	if o.Slug.IsZero() {
		return done, fault.New(fault.Invalid, "a clone needs a name").WithCode("invalid_slug")
	}
	if o.Slug == t.Slug {
		return done, fault.New(fault.Conflict, "a tenant of this name exists already: the original").WithCode("tenant_exists").WithTenant(t.Slug.String())
	}
	if o.Group == "" {
		o.Group = t.Group
	}
	export := ExportOptions{Empty: o.Empty}
	if o.Mask {
		if x.o.Secret == "" {
			return done, fault.New(fault.Invalid, "what is masked depends on server.secret, which is not set").WithCode("setting").
				WithHint("set ONEO_SERVER_SECRET as the servers have it")
		}
		export.masks = &Masking{}
	}
	r, w := io.Pipe()
	exported := make(chan error, 1)
	go func() {
		_, err := x.Export(ctx, t, w, export)
		_ = w.CloseWithError(err) // never fails
		exported <- err
	}()
	done.Neutralized = x.o.Migrate.Neutralizes()
	done.Tenant, done.Trailer, err = x.make(ctx, r, ImportOptions{
		Loading: Loading{CustomDDL: true, ours: true, Actor: o.Actor, Progress: o.Progress}, Slug: o.Slug, Schema: o.Schema, Group: o.Group, WithoutDomains: true,
	}, func(req *provision.CreateRequest) error { return x.asClone(req, t, o) })
	// Whoever has failed first makes the other one fail: what is told is the cause.
	failed := errors.New("the clone was not made")
	_ = r.CloseWithError(failed)
	if eerr := <-exported; err != nil && eerr != nil && !errors.Is(eerr, failed) {
		return done, eerr
	}
	if err == nil && o.Mask {
		done.Masking = *export.masks
	}
	return done, err
}

// asClone makes a creation that of a clone.
func (x *Transfers) asClone(req *provision.CreateRequest, t tenant.Tenant, o CloneOptions) error {
	settings := map[string]json.RawMessage{}
	if err := json.Unmarshal(req.Settings, &settings); err != nil {
		return err
	}
	clone := map[string]any{"of": t.Slug.String(), "id": t.ID, "at": time.Now().UTC().Truncate(time.Second)}
	if o.Mask {
		clone["masked"] = true
		req.Name = "" // that of a firm, or of a person
	}
	mark, err := json.Marshal(clone)
	if err != nil {
		return err
	}
	settings[CloneMark] = mark
	if req.Settings, err = json.Marshal(settings); err != nil {
		return err
	}
	req.Origin = &provision.Origin{Slug: t.Slug.String(), ID: t.ID, Number: t.Number, Masked: o.Mask, Empty: o.Empty}
	req.Fill.After = func(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema) error {
		return x.o.Migrate.Neutralize(ctx, tx, schema)
	}
	return nil
}
