package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Loading says how an archive is read and loaded.
type Loading struct {
	// Identities open an encrypted archive, MaxBytes bounds what it may come to; 0: no bound.
	Identities []archive.Identity
	MaxBytes   int64
	// CustomDDL runs the statements of the archive that are no migrations, as far as they keep to the tenant's schema.
	CustomDDL bool
	// Known is the Sum of the statements that this installation is known to have written into the archive: those are run as a clone's are,
	// whatever they do. Whoever sets it has it from something that nobody else can write.
	Known string
	// ours: the archive comes from one of our own databases and no file, so that its statements are not looked at.
	ours bool
	// Erased is the id of an erased tenant whose archive is to be read all the same.
	Erased string
	Actor  string
	// Progress is told how far it is, now and then; may be nil.
	Progress func(Progress)
}

// ImportOptions say what a tenant is made of an archive as.
type ImportOptions struct {
	Loading
	Slug   tenant.Slug   // zero: the archive's
	Schema tenant.Schema // zero: made from the slug
	Group  string        // empty: main
	// WithoutDomains leaves the archive's domains out.
	WithoutDomains bool
}

// Import makes a new tenant of an archive. Under the archive's own name it gets its domains back and is suspended where
// it was; under another name neither. Faults: WrongKey and Unverified for the archive, Conflict when a name or a domain
// is taken, or the archive does not fit the migrations here. When it fails there is no such tenant.
func (x *Transfers) Import(ctx context.Context, r io.Reader, o ImportOptions) (t tenant.Tenant, trailer archive.Trailer, err error) {
	return x.make(ctx, r, o, nil)
}

// make is Import; change, which may be nil, has the last word on the creation.
func (x *Transfers) make(ctx context.Context, r io.Reader, o ImportOptions, change func(*provision.CreateRequest) error) (t tenant.Tenant, trailer archive.Trailer, err error) {
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: o.Identities, MaxBytes: o.MaxBytes})
	if err != nil {
		return t, trailer, err
	}
	defer a.Close()
	h, known := a.Header(), a.Registry()
	req, err := x.request(h, known, o)
	if err != nil {
		return t, trailer, err
	}
	if err := x.notErased(ctx, nil, h, o.Erased); err != nil {
		return t, trailer, err
	}
	fill, err := x.filling(ctx, a, req.Group, o.Loading, &trailer)
	if err != nil {
		return t, trailer, err
	}
	req.Fill = &fill
	if change != nil {
		if err := change(&req); err != nil {
			return t, trailer, err
		}
	}
	t, err = x.o.Provision.Create(ctx, req)
	return t, trailer, err
}

// Restore puts the tables of an archive in the place of a tenant's, as provision.Restore does; its domains and settings
// stay as they are. keep is how long what is there now is kept. The archive may be another tenant's only if foreign says so.
func (x *Transfers) Restore(ctx context.Context, t tenant.Tenant, r io.Reader, keep time.Duration, foreign bool, o Loading) (done provision.Restored, trailer archive.Trailer, err error) {
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: o.Identities, MaxBytes: o.MaxBytes})
	if err != nil {
		return done, trailer, err
	}
	defer a.Close()
	if err := ownArchive(a.Header(), t, foreign); err != nil {
		return done, trailer, err
	}
	if err := x.notErased(ctx, nil, a.Header(), o.Erased); err != nil {
		return done, trailer, named(err, t)
	}
	fill, err := x.filling(ctx, a, t.Group, o, &trailer)
	if err != nil {
		return done, trailer, named(err, t)
	}
	done, err = x.o.Provision.Restore(ctx, t.Slug, provision.RestoreRequest{Fill: fill, Keep: keep, Actor: o.Actor})
	return done, trailer, err
}

// notErased refuses an archive of a tenant that was erased, or is being erased, unless it is named. tx is a transaction in the
// registry's database; nil: there is none.
func (x *Transfers) notErased(ctx context.Context, tx *postgres.OwnerTx, h archive.Header, name string) error {
	if name != "" && !strings.EqualFold(name, h.Tenant) {
		return fault.New(fault.Invalid, "the archive is not that of %s, but that of %s, %s", name, h.Slug, h.Tenant).WithCode("other_tenant")
	}
	if tx == nil {
		return x.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error { return x.notErased(ctx, tx, h, name) })
	}
	erased, err := provision.Erased(ctx, tx, h.Tenant)
	if err != nil || !erased || name != "" {
		return err
	}
	e, found, err := x.o.Provision.ErasureBy(ctx, tx, h.Tenant)
	if err != nil {
		return err
	}
	said := "the tenant " + h.Slug + ", which is being erased"
	if found {
		said = fmt.Sprintf("the tenant %s, which was erased at %s by %s", e.Slug, e.At.UTC().Format(time.RFC3339), e.Actor)
		if !e.Genuine {
			said += "; the record of it was not made with this server.secret, or was changed since"
		}
	}
	return fault.New(fault.Conflict, "the archive is that of %s", said).
		WithCode("erased").WithHint("who is erased stays so; if this one is to come back all the same: --erased %s", h.Tenant)
}

// filling is an archive as provision takes it, once it was found to fit.
func (x *Transfers) filling(ctx context.Context, a *archive.Reader, group string, o Loading, trailer *archive.Trailer) (provision.Filling, error) {
	if err := x.fits(ctx, a.Header(), group); err != nil {
		return provision.Filling{}, err
	}
	if err := allowed(a.Structure(), o.CustomDDL); err != nil {
		return provision.Filling{}, err
	}
	if o.Known != "" && o.Known == a.Structure().Sum() {
		o.ours = true
	}
	if !o.ours {
		if err := confined(a.Structure(), nowhere, nobody); err != nil {
			return provision.Filling{}, err
		}
	}
	begun := false
	return provision.Filling{Version: a.Header().Version(), Rows: func(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) (err error) {
		if begun { // what was read is gone
			return fault.New(fault.Conflict, "the archive was read already when the database asked for it again").WithCode("import_interrupted").
				WithHint("run the same command again")
		}
		begun = true
		if *trailer, err = x.load(ctx, tx, a, at, o); err == nil {
			if !x.o.DB.SameDatabase(group) {
				tx = nil
			}
			return x.notErased(ctx, tx, a.Header(), o.Erased) // a load may take hours
		} else if ctx.Err() == nil {
			// A changed byte shows first as a value that PostgreSQL does not take, or as a table that nobody knows.
			if derr := readOver(a); fault.Is(derr, fault.Unverified) {
				return derr
			}
		}
		return err
	}}, nil
}

// readOver reads what is left of an archive, and returns what is wrong with it.
func readOver(a *archive.Reader) error {
	for {
		if _, err := a.Next(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// request is the creation of the tenant.
func (x *Transfers) request(h archive.Header, known archive.Registry, o ImportOptions) (r provision.CreateRequest, err error) {
	r = provision.CreateRequest{Slug: o.Slug, Schema: o.Schema, Group: o.Group, Name: known.Name, Settings: known.Settings, Actor: o.Actor}
	if r.Group == "" {
		r.Group = postgres.MainGroup
	}
	if r.Slug.IsZero() {
		if r.Slug, err = tenant.ParseSlug(h.Slug); err != nil {
			return r, err
		}
	}
	if r.Slug.String() != h.Slug {
		if r.Name == h.Slug {
			r.Name = ""
		}
		return r, nil
	}
	r.Suspended = tenant.State(known.State) == tenant.Suspended
	if o.WithoutDomains {
		return r, nil
	}
	for _, d := range known.Domains {
		host, err := tenant.ParseHost(d.Host)
		if err != nil {
			return r, err
		}
		r.Domains = append(r.Domains, host)
	}
	return r, nil
}

// allowed refuses SQL that nobody has asked for.
func allowed(s archive.Structure, custom bool) error {
	if len(s.Custom) == 0 || custom {
		return nil
	}
	const most = 20
	var list []string
	for _, c := range s.Custom[:min(most, len(s.Custom))] {
		list = append(list, "  "+structure.Step{SQL: c.SQL}.String())
	}
	if n := len(s.Custom) - most; n > 0 {
		list = append(list, fmt.Sprintf("  and %d more", n))
	}
	return fault.New(fault.Conflict, "the tenant had more than its migrations make; the archive would run:\n%s", strings.Join(list, "\n")).WithCode("custom_ddl").
		WithHint("look at it, then add --with-custom-ddl")
}

// nowhere and nobody stand for the schema and the owner before they are known. No statement knows them.
var (
	nowhere = structure.Schema{Name: "oneo schema to come", Role: "oneo role to come"}
	nobody  = "oneo owner to come"
)

// confined refuses statements of an archive that would do more than make the schema's own objects.
func confined(s archive.Structure, at structure.Schema, owner string) error {
	within := lint.Confinement{Schema: at.Name, Roles: []string{at.Role, owner}}
	for _, c := range s.Custom {
		step := structure.Step{SQL: c.SQL}
		if err := within.Check(step.On(at, owner)); err != nil {
			return fault.New(fault.Conflict, "the archive's own statement for %q is not confined to the tenant: %v\n  %s", c.Object, err, step).WithCode("custom_ddl_refused").
				WithHint("nothing was changed; look at where the archive comes from")
		}
	}
	return nil
}

// custom runs the archive's own statements, bound to the schema.
func custom(ctx context.Context, tx *postgres.OwnerTx, s archive.Structure, at structure.Schema, ours bool) error {
	if len(s.Custom) == 0 {
		return nil
	}
	var owner string
	if err := tx.QueryRow(ctx, `select current_user::text`).Scan(&owner); err != nil {
		return err
	}
	if !ours {
		// Once more, by the names that it is run with: what means one thing under one name may mean another under another.
		if err := confined(s, at, owner); err != nil {
			return err
		}
	}
	// A name that is not in the schema may be found in ext, which all tenants share.
	before, err := extended(ctx, tx, at)
	if err != nil {
		return err
	}
	steps := make([]structure.Step, len(s.Custom))
	for i, c := range s.Custom {
		steps[i] = structure.Step{What: c.Object, SQL: c.SQL}
	}
	// A function may use what comes behind it.
	if err := tx.Script(ctx, "set local check_function_bodies to off"); err != nil {
		return err
	}
	if step, err := structure.Run(ctx, tx, at, owner, steps); err != nil && step.SQL == "" {
		return err
	} else if err != nil {
		return fault.Wrap(err, fault.Conflict, "the archive's own statement for %s cannot be run here", step.What).WithCode("custom_ddl")
	}
	if err := tx.Script(ctx, "set local check_function_bodies to on"); err != nil {
		return err
	}
	after, err := extended(ctx, tx, at)
	if err == nil && before != after {
		err = fault.New(fault.Conflict, "the archive's own statements change what lies in the schema ext, which all tenants share").WithCode("custom_ddl_refused").
			WithHint("nothing of the archive is left")
	}
	return err
}

// extended is a fingerprint of what all tenants share. It leaves the search path bound to the schema.
func extended(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) (string, error) {
	s, err := structure.Read(ctx, tx, structure.Schema{Name: "ext", Role: at.Role})
	if err != nil {
		return "", err
	}
	return s.Hash(), tx.Script(ctx, bound(at))
}

// sameStructure compares what has come of the migrations and the archive's statements with what was exported.
func sameStructure(ctx context.Context, tx *postgres.OwnerTx, h archive.Header, at structure.Schema) error {
	var here int
	if err := tx.QueryRow(ctx, `select pg_catalog.current_setting('server_version_num')::int`).Scan(&here); err != nil {
		return err
	}
	if !sameWords(h, here) {
		return nil
	}
	have, err := structure.Read(ctx, tx, at)
	if err != nil {
		return err
	}
	if have.Hash() != h.Fingerprint {
		return fault.New(fault.Conflict, "what has come of the archive has not the structure that was exported").WithCode("structure_differs").
			WithHint("the tenant has something that cannot be carried; `oneo migrate drift -t %s` shows it where it came from", h.Slug)
	}
	return nil
}
