package provision

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Adoption says that a tenant's schema is there already: made by another tool, or by hand.
type Adoption struct {
	Version int  `json:"version"` // of our migrations, that the schema is at
	Force   bool `json:"force,omitempty"`
}

// Adopt makes a tenant of the schema that stands in a database already: the registry's row, domains, the tenant's role
// with its rights, and ledger rows up to the version that the schema is said to be at. Nothing in it is changed but
// rights. Conflict: there is no such schema, parts of it are not the owner's, other tenants may look into it, or it
// differs from what the migrations make at that version (unless forced: then `oneo migrate drift` shows how).
func (p *Provisioner) Adopt(ctx context.Context, r CreateRequest, a Adoption) (tenant.Tenant, error) {
	if r.AdminEmail != "" {
		return tenant.Tenant{}, fault.New(fault.Invalid, "a tenant that is adopted has its users already").WithCode("invalid_request").
			WithHint("oneo user add ADDRESS -t %s", r.Slug)
	}
	r.Adopt = &a
	return p.Create(ctx, r)
}

// referenceOf is what the schema is compared with that a request adopts. It is made before the transaction that adopts.
func (p *Provisioner) referenceOf(ctx context.Context, r CreateRequest) (structure.Structure, error) {
	switch {
	case r.Adopt == nil || r.Adopt.Force:
		return structure.Structure{}, nil
	case p.o.Structure == nil:
		return structure.Structure{}, fault.New(fault.Internal, "provision: adopting needs Structure")
	}
	if head := p.o.Migrate.Head(migrate.TenantSet); r.Adopt.Version < 0 || r.Adopt.Version > head {
		return structure.Structure{}, fault.New(fault.Invalid, "there is no version %d: the tenant migrations go from 1 to %d", r.Adopt.Version, head).
			WithCode("target_out_of_range")
	}
	return p.o.Structure.Reference(ctx, r.Group, r.Adopt.Version)
}

// adoptSchema takes over the schema, in the transaction that makes the tenant.
func (p *Provisioner) adoptSchema(ctx context.Context, tx *postgres.OwnerTx, r CreateRequest, inst postgres.Installation, number int32, reference structure.Structure) error {
	if made, err := placed(number)(ctx, tx); err != nil || made {
		return err
	}
	if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
		return err
	}
	var oid *uint32
	var taken bool
	const find = `select (select oid from pg_catalog.pg_namespace where nspname = $1), exists (select from public.placements where schema = $1)`
	if err := tx.QueryRow(ctx, find, r.Schema.String()).Scan(&oid, &taken); err != nil {
		return err
	}
	switch {
	case taken:
		return fault.New(fault.Conflict, "the schema %s is another tenant's", r.Schema).WithCode("schema_taken")
	case oid == nil:
		return fault.New(fault.Conflict, "there is no schema %s in the database of group %s", r.Schema, r.Group).WithCode("schema_missing").
			WithHint("oneo tenant create %s makes a new one", r.Slug)
	}
	if err := owned(ctx, tx, r.Schema); err != nil {
		return err
	}
	if p.o.DB.Isolation() == postgres.ByRole {
		if err := isolated(ctx, tx, r.Schema, inst.AppRole); err != nil {
			return err
		}
	}
	role := p.role(inst, number)
	if err := tx.Script(ctx, p.adoptionScript(r, inst, number, role)); err != nil {
		return err
	}
	have, err := structure.Read(ctx, tx, structure.Schema{Name: r.Schema.String(), Role: role})
	if err != nil {
		return err
	}
	if ds := structure.Compare(reference, have); len(ds) > 0 && !r.Adopt.Force {
		return differs(r, ds)
	}
	const place = `insert into public.placements (number, schema, role, namespace, state) values ($1, $2, $3, $4, 'active')`
	if _, err := tx.Exec(ctx, place, number, r.Schema.String(), role, *oid); err != nil {
		return err
	}
	return p.o.Migrate.BaselineTx(ctx, tx, number, r.Adopt.Version)
}

// adoptionScript makes the role and gives it what it would have been given by creating.
func (p *Provisioner) adoptionScript(r CreateRequest, inst postgres.Installation, number int32, role string) string {
	var b strings.Builder
	schema, qrole := postgres.Quote(r.Schema.String()), postgres.Quote(role)
	if p.o.DB.Isolation() == postgres.ByRole {
		fmt.Fprintf(&b, "create role %s nologin noinherit;\n", qrole)
		fmt.Fprintf(&b, "grant %s to %s;\n", qrole, postgres.Quote(inst.LoginOf(number)))
	}
	fmt.Fprintf(&b, "grant usage on schema %s to %s;\n", schema, qrole)
	fmt.Fprintf(&b, "grant select, insert, update, delete on all tables in schema %s to %s;\n", schema, qrole)
	fmt.Fprintf(&b, "grant usage, select on all sequences in schema %s to %s;\n", schema, qrole)
	fmt.Fprintf(&b, "alter default privileges in schema %s grant select, insert, update, delete on tables to %s;\n", schema, qrole)
	fmt.Fprintf(&b, "alter default privileges in schema %s grant usage, select on sequences to %s;\n", schema, qrole)
	return b.String()
}

// owned refuses a schema of which parts are not the owner's: migrations could not change them.
func owned(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema) error {
	const others = `select o.name, pg_catalog.pg_get_userbyid(o.owner)::text from pg_catalog.pg_namespace n cross join lateral (
	select 'schema ' || n.nspname as name, n.nspowner as owner
	union all select 'relation ' || relname, relowner from pg_catalog.pg_class where relnamespace = n.oid and relkind in ('r', 'p', 'v', 'm', 'S', 'f')
	union all select 'function ' || proname, proowner from pg_catalog.pg_proc where pronamespace = n.oid
	union all select 'type ' || typname, typowner from pg_catalog.pg_type where typnamespace = n.oid and typtype in ('e', 'd', 'r')) o
where n.nspname = $1 and pg_catalog.pg_get_userbyid(o.owner) <> current_user order by 1`
	type other struct{ name, owner string }
	rows, err := tx.Query(ctx, others, schema.String())
	if err != nil {
		return err
	}
	found, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (o other, err error) { return o, row.Scan(&o.name, &o.owner) })
	if err != nil || len(found) == 0 {
		return err
	}
	var owner string
	if err := tx.QueryRow(ctx, `select current_user::text`).Scan(&owner); err != nil {
		return err
	}
	return fault.New(fault.Conflict, "%d object(s) of the schema %s are not %s's, which could not migrate them: the first is the %s of %s",
		len(found), schema, owner, found[0].name, found[0].owner).WithCode("not_owned").
		WithHint("as an administrator, in that database: reassign owned by %s to %s; or alter ... owner to for each, where %[1]s has others too",
			postgres.Quote(found[0].owner), postgres.Quote(owner))
}

// isolated refuses a schema into which other tenants may look: all by what was granted to everybody or to the app role,
// one by its own role. Whoever may not use the schema reaches nothing in it.
func isolated(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema, app string) error {
	const query = `select case when a.grantee = 0 then 'public' else pg_catalog.quote_ident(r.rolname) end
from pg_catalog.pg_namespace n cross join lateral pg_catalog.aclexplode(n.nspacl) a left join pg_catalog.pg_roles r on r.oid = a.grantee
where n.nspname = $1 and a.privilege_type = 'USAGE'
and (a.grantee = 0 or r.rolname = $2 or r.rolname in (select p.role from public.placements p)) order by 1`
	rows, err := tx.Query(ctx, query, schema.String(), app)
	if err != nil {
		return err
	}
	to, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(to) == 0 {
		return err
	}
	return fault.New(fault.Conflict, "other tenants may look into the schema %s: it is open to %s", schema, strings.Join(to, ", ")).
		WithCode("not_isolated").WithHint("in that database: revoke all on schema %s from %s", postgres.Quote(schema.String()), strings.Join(to, ", "))
}

func differs(r CreateRequest, ds []structure.Difference) error {
	const most = 5
	texts := make([]string, 0, most)
	for _, d := range ds[:min(most, len(ds))] {
		texts = append(texts, d.String())
	}
	more := ""
	if n := len(ds) - most; n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	return fault.New(fault.Conflict, "the schema %s is not what the migrations make at version %d: %s%s", r.Schema, r.Adopt.Version, strings.Join(texts, "; "), more).
		WithCode("structure_differs").WithHint("give the version that it is at, or bring it there; --force adopts it as it is, and `oneo migrate drift` shows the rest")
}
