package provision

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// CreateRequest says which tenant is to be made. Only Slug is needed.
type CreateRequest struct {
	Slug    tenant.Slug
	Name    string        // for display; empty: the slug
	Schema  tenant.Schema // zero: made from the slug
	Group   string        // empty: main
	Domains []tenant.Host // besides <slug>.<base domain>, which is the primary one
	// AdminEmail and AdminPasswordHash make the first user. The hash is computed by the caller, outside of any
	// transaction.
	AdminEmail, AdminPasswordHash string
	Settings                      json.RawMessage // a JSON object; empty: {}
	Adopt                         *Adoption       // the schema is there already; nil: it is to be made
	Fill                          *Filling        // the tables get rows before anybody sees them; nil: the tenant begins as its migrations make it
	Origin                        *Origin         // the tenant that it is a clone of, for the audit trail; nil: of none
	Suspended                     bool            // with Fill: it is not served until it is resumed
	Actor                         string          // who asked, for the audit trail
}

// Filling is what a tenant begins with. A creation with it that is interrupted cannot be finished by anybody else: it is
// undone.
type Filling struct {
	// Version is that of the tenant migrations to whose tables the rows belong; the later ones run when they are in.
	Version int
	// Rows puts the rows in, in a transaction that is bound to the schema and that nobody sees before it has ended. It is called
	// once at most.
	Rows func(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) error
	// After changes the rows when all migrations have run, in the same transaction; may be nil.
	After func(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema) error
}

// Origin is the tenant of which another one is a clone. It stands in the audit trail of both.
type Origin struct {
	Slug   string `json:"slug"`
	ID     string `json:"id"`
	Number int32  `json:"number"`
	Masked bool   `json:"masked,omitempty"`
	Empty  bool   `json:"no_data,omitempty"`
}

// Request is the request as it is queued for a worker.
func (r CreateRequest) Request() any { return r.wire() }

func (r CreateRequest) wire() request {
	w := request{
		Slug: r.Slug.String(), Name: r.Name, Schema: r.Schema.String(), Group: r.Group,
		AdminEmail: r.AdminEmail, AdminPasswordHash: r.AdminPasswordHash, Settings: r.Settings,
		Adopt: r.Adopt, Filled: r.Fill != nil, Origin: r.Origin,
	}
	for _, h := range r.Domains {
		w.Domains = append(w.Domains, h.String())
	}
	return w
}

func (w request) create(actor string) (CreateRequest, error) {
	r := CreateRequest{Name: w.Name, Group: w.Group, AdminEmail: w.AdminEmail, AdminPasswordHash: w.AdminPasswordHash, Settings: w.Settings, Adopt: w.Adopt, Origin: w.Origin, Actor: actor}
	if w.Filled { // by whoever asked for it, and nobody else
		r.Fill = &Filling{Rows: fillLost}
	}
	var err error
	if r.Slug, err = tenant.ParseSlug(w.Slug); err != nil {
		return r, err
	}
	if w.Schema != "" {
		if r.Schema, err = tenant.ParseSchema(w.Schema); err != nil {
			return r, err
		}
	}
	for _, d := range w.Domains {
		h, err := tenant.ParseHost(d)
		if err != nil {
			return r, err
		}
		r.Domains = append(r.Domains, h)
	}
	return r, nil
}

// Create makes a tenant: registry row, domains, role, schema, every migration and the first user. Faults: Conflict
// when the name, the schema or a domain is taken; Invalid when the request cannot be met. A creation of the same name
// that was killed in the middle is finished as it was asked for then.
func (p *Provisioner) Create(ctx context.Context, r CreateRequest) (tenant.Tenant, error) {
	t, _, err := p.CreateOrFinish(ctx, r)
	return t, err
}

// CreateOrFinish is Create, and says whether it has only finished what an earlier process had begun: then the tenant is
// as it was asked for then, with that request's first user.
func (p *Provisioner) CreateOrFinish(ctx context.Context, r CreateRequest) (t tenant.Tenant, finished bool, err error) {
	if err := p.checkCreate(&r); err != nil {
		return t, false, err
	}
	free, t, err := p.vacant(ctx, r.Slug, r.Actor)
	if err != nil || !free {
		return t, err == nil, err
	}
	c, err := p.newCreation(ctx, r)
	if err != nil {
		return tenant.Tenant{}, false, err
	}
	t, err = p.run(ctx, c, nil)
	return t, false, err
}

// DryRun is Create without making anything: it completes a request with its defaults and returns what Create would
// refuse now. The beginning of the creation runs and is rolled back, so that both ask the same questions.
func (p *Provisioner) DryRun(ctx context.Context, r CreateRequest) (CreateRequest, error) {
	if err := p.checkCreate(&r); err != nil {
		return r, err
	}
	// A number that no tenant has and no sequence gives: the true ones are not used up by asking.
	c, err := p.creation(ctx, r, math.MaxInt32)
	if err != nil {
		return r, err
	}
	rollBack := errors.New("only asked")
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := c.begin(ctx, tx); err != nil {
			return err
		}
		return rollBack
	})
	if err != nil && !errors.Is(err, rollBack) {
		return r, p.named(err, c)
	}
	return r, p.o.DB.AsOwner(ctx, r.Group, func(tx *postgres.OwnerTx) error {
		if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
			return err
		}
		var taken bool
		const there = `select exists (select from pg_catalog.pg_namespace where nspname = $1)`
		if err := tx.QueryRow(ctx, there, r.Schema.String()).Scan(&taken); err != nil || !taken {
			return err
		}
		return schemaExists(nil).WithTenant(r.Slug.String())
	})
}

// checkCreate completes a request with its defaults and refuses one that can never succeed. It asks no database.
func (p *Provisioner) checkCreate(r *CreateRequest) error {
	if r.Slug.IsZero() {
		return fault.New(fault.Invalid, "a tenant needs a name").WithCode("invalid_slug")
	}
	if r.Schema.IsZero() {
		r.Schema = r.Slug.Schema()
	}
	if r.Group == "" {
		r.Group = postgres.MainGroup
	}
	if r.Name == "" {
		r.Name = r.Slug.String()
	}
	if n := len([]rune(r.Name)); n > 200 || strings.ContainsRune(r.Name, 0) {
		return fault.New(fault.Invalid, "the display name is longer than 200 characters or holds a NUL").WithCode("invalid_name")
	}
	if len(r.Settings) == 0 {
		r.Settings = json.RawMessage(`{}`)
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(r.Settings, &object); err != nil || object == nil {
		return fault.New(fault.Invalid, "settings must be a JSON object").WithCode("invalid_settings").
			WithHint(`for example --settings '{"public": {"colour": "teal"}}'`)
	}
	if err := crm.CheckNumbers(r.Settings); err != nil {
		return fault.Wrap(err, fault.Invalid, "settings hold a number that does not fit").WithCode("invalid_settings").
			WithHint("a number has at most 100 characters and an exponent below 1000")
	}
	if len(r.Settings) > registry.MaxSettingsBytes {
		return fault.New(fault.Invalid, "settings may have at most %d bytes", registry.MaxSettingsBytes).WithCode("invalid_settings")
	}
	if (r.AdminEmail == "") != (r.AdminPasswordHash == "") {
		return fault.New(fault.Internal, "a first user needs an address and a password hash")
	}
	def := r.Slug.Under(p.o.BaseDomain)
	r.Domains = slices.DeleteFunc(r.Domains, func(h tenant.Host) bool { return h == def })
	return nil
}

// vacant reports whether nobody has the name. When somebody has, it returns the tenant of that name, whose creation it
// has finished.
func (p *Provisioner) vacant(ctx context.Context, slug tenant.Slug, actor string) (free bool, t tenant.Tenant, err error) {
	settled := false
	for {
		var taken bool
		err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			taken, err = registry.Taken(ctx, tx, slug)
			return err
		})
		if err != nil || !taken {
			return err == nil, t, err
		}
		// A create that was killed between two databases is finished by asking for the same again.
		t, kind, err := p.findAndFinish(ctx, slug)
		switch {
		case fault.Is(err, fault.NotFound): // or undone
			continue
		case err != nil:
			return false, t, err
		case t.State == tenant.Creating && !settled:
			settled = true
			if t, err = p.run(ctx, p.settling(t, actor), nil); err == nil || !notMade(err) {
				return false, t, err
			}
			continue
		case kind == KindCreate && (t.State == tenant.Active || t.State == tenant.Suspended):
			return false, t, nil
		case t.State == tenant.Creating:
			return false, t, fault.New(fault.Locked, "the tenant is being created").WithCode("operation_running").WithTenant(slug.String())
		}
		return false, t, fault.New(fault.Conflict, "a tenant of this name exists already").WithCode("tenant_exists").
			WithTenant(slug.String()).WithHint("oneo tenant show %s", slug)
	}
}

// newCreation is a creation whose number is settled when it begins: that of a spare, or of a new tenant.
func (p *Provisioner) newCreation(ctx context.Context, r CreateRequest) (change, error) {
	inst, err := p.o.DB.Installation(ctx, r.Group)
	if err != nil {
		return change{}, err
	}
	reference, err := p.referenceOf(ctx, r)
	if err != nil {
		return change{}, err
	}
	var numbered func(int32) change
	numbered = func(number int32) change {
		c := p.creationOn(inst, r, number, reference)
		c.numbered = numbered
		return c
	}
	return numbered(0), nil
}

// creation is a creation under a number that is settled.
func (p *Provisioner) creation(ctx context.Context, r CreateRequest, number int32) (change, error) {
	inst, err := p.o.DB.Installation(ctx, r.Group)
	if err != nil {
		return change{}, err
	}
	reference, err := p.referenceOf(ctx, r)
	return p.creationOn(inst, r, number, reference), err
}

func (p *Provisioner) creationOn(inst postgres.Installation, r CreateRequest, number int32, reference structure.Structure) change {
	t := tenant.Tenant{Number: number, Slug: r.Slug, Schema: r.Schema, Group: r.Group, State: tenant.Active, Name: r.Name}
	state := tenant.Active
	if !p.o.DB.SameDatabase(r.Group) || r.Fill != nil {
		state = tenant.Creating
	}
	becomes := tenant.Active
	if r.Suspended {
		becomes = tenant.Suspended
	}
	details := map[string]any{"schema": r.Schema.String(), "group": r.Group}
	if r.Adopt != nil {
		details["adopted_at_version"] = r.Adopt.Version
	}
	if r.Origin != nil {
		details["clone_of"] = r.Origin
	}
	return change{
		kind: KindCreate, point: "create", tenant: t, actor: r.Actor, request: r.wire(),
		details: details, spareless: r.Adopt != nil || r.Fill != nil, once: r.Fill != nil,
		begin: func(ctx context.Context, q postgres.Querier) error {
			if err := room(ctx, q, r.Group); err != nil {
				return err
			}
			const insert = `insert into public.tenants (number, slug, schema, name, group_name, state, settings) values ($1, $2, $3, $4, $5, $6, $7)`
			if _, err := q.Exec(ctx, insert, number, r.Slug.String(), r.Schema.String(), r.Name, r.Group, string(state), r.Settings); err != nil {
				return err
			}
			if err := registry.AddDomain(ctx, q, t, r.Slug.Under(p.o.BaseDomain), false); err != nil {
				return err
			}
			for _, h := range r.Domains {
				if err := registry.AddDomain(ctx, q, t, h, false); err != nil {
					return err
				}
			}
			return nil
		},
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if r.Adopt != nil {
				return p.adoptSchema(ctx, tx, r, inst, number, reference)
			}
			return p.makeSchema(ctx, tx, r, inst, number)
		},
		finish: func(ctx context.Context, q postgres.Querier) error {
			if r.Origin != nil {
				if err := clonedTo(ctx, q, *r.Origin, t, r.Actor); err != nil {
					return err
				}
			}
			if state == tenant.Active {
				return nil
			}
			return created(ctx, q, number, becomes)
		},
		undo: func(ctx context.Context, q postgres.Querier) error { return uncreated(ctx, q, number) },
		made: placedAs(number, &becomes),
	}
}

// clonedTo notes in the original's own audit trail where its rows have gone.
func clonedTo(ctx context.Context, q postgres.Querier, from Origin, to tenant.Tenant, actor string) error {
	slug, err := tenant.ParseSlug(from.Slug)
	if err != nil {
		return err
	}
	return registry.Audit(ctx, q, registry.AuditEntry{
		Actor: actor, Action: "tenant.clone", Tenant: tenant.Tenant{Number: from.Number, Slug: slug},
		Details: map[string]any{"to": to.Slug.String(), "number": to.Number, "masked": from.Masked, "no_data": from.Empty},
	})
}

func created(ctx context.Context, q postgres.Querier, number int32, state tenant.State) error {
	_, err := q.Exec(ctx, `update public.tenants set state = $2, updated_at = now() where number = $1 and state = 'creating'`, number, string(state))
	return err
}

func uncreated(ctx context.Context, q postgres.Querier, number int32) error {
	_, err := q.Exec(ctx, `delete from public.tenants where number = $1 and state = 'creating'`, number)
	return err
}

// placed asks whether the tenant has a placement; with conditions, one that meets them. A spare is no tenant's yet.
func placed(number int32, conditions ...string) func(context.Context, *postgres.OwnerTx) (bool, error) {
	query := `select exists (select from public.placements where number = $1 and state <> 'spare'`
	args := []any{number}
	for i := 0; i+1 < len(conditions); i += 2 { // a column of our own and its value
		args = append(args, conditions[i+1])
		query += fmt.Sprintf(" and %s = $%d", conditions[i], len(args))
	}
	query += ")"
	return func(ctx context.Context, tx *postgres.OwnerTx) (is bool, err error) {
		return is, tx.QueryRow(ctx, query, args...).Scan(&is)
	}
}

// placedAs is placed, and reads the state of the placement.
func placedAs(number int32, state *tenant.State) func(context.Context, *postgres.OwnerTx) (bool, error) {
	return func(ctx context.Context, tx *postgres.OwnerTx) (bool, error) {
		err := tx.QueryRow(ctx, `select state from public.placements where number = $1 and state <> 'spare'`, number).Scan(state)
		if errors.Is(err, pgx.ErrNoRows) {
			return false, nil
		}
		return err == nil, err
	}
}

const codeNotMade = "not_made"

func notMade(err error) bool {
	var f *fault.Fault
	return errors.As(err, &f) && f.Code == codeNotMade
}

// settling ends a creation that stands half-made with no operation to finish it: where its schema was made it becomes
// a tenant, otherwise its name is free again and the error is notMade.
func (p *Provisioner) settling(t tenant.Tenant, actor string) change {
	var becomes tenant.State
	made := placedAs(t.Number, &becomes)
	return change{
		kind: KindCreate, point: "create", tenant: t, actor: actor,
		request: request{Slug: t.Slug.String(), Schema: t.Schema.String(), Group: t.Group, Name: t.Name},
		details: map[string]any{"schema": t.Schema.String(), "group": t.Group},
		begin: func(ctx context.Context, q postgres.Querier) error {
			const keep = `select from public.tenants where number = $1 and state = 'creating' and not exists (
	select from public.operations where tenant = $1 and state = 'running') for update`
			tag, err := q.Exec(ctx, keep, t.Number)
			if err == nil && tag.RowsAffected() == 0 {
				return fault.New(fault.Locked, "the tenant is being created").WithCode("operation_running").WithRetry(time.Second)
			}
			return err
		},
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			is, err := made(ctx, tx)
			if err == nil && !is {
				return fault.New(fault.Conflict, "the tenant's creation had not got as far as its schema").WithCode(codeNotMade)
			}
			return err
		},
		finish: func(ctx context.Context, q postgres.Querier) error { return created(ctx, q, t.Number, becomes) },
		undo:   func(ctx context.Context, q postgres.Querier) error { return uncreated(ctx, q, t.Number) },
		made:   made,
	}
}

// room refuses a group that is unknown, closed or full.
func room(ctx context.Context, q postgres.Querier, group string) error {
	var accepting bool
	var limit *int
	// Where there is a limit, one creation at a time counts and adds itself; elsewhere they do not wait for each other.
	const query = `with limited as (select accepting, max_tenants from public.groups where name = $1 and max_tenants is not null for no key update),
	unlimited as (select accepting, max_tenants from public.groups where name = $1 and max_tenants is null for share)
select accepting, max_tenants from limited union all select accepting, max_tenants from unlimited`
	err := q.QueryRow(ctx, query, group).Scan(&accepting, &limit)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		// Configured, or the connection would not have been found; the registry learns of it by its first tenant.
		_, err := q.Exec(ctx, `insert into public.groups (name) values ($1) on conflict do nothing`, group)
		return err
	case err != nil:
		return err
	case !accepting:
		return fault.New(fault.Conflict, "the group %s accepts no tenants", group).WithCode("group_closed")
	case limit == nil:
		return nil
	}
	// A statement of its own: the one that waited for the lock does not see whom it has waited for.
	var tenants int
	if err := q.QueryRow(ctx, `select count(*) from public.tenants where group_name = $1 and state <> 'purged'`, group).Scan(&tenants); err != nil {
		return err
	}
	if tenants >= *limit {
		return fault.New(fault.Conflict, "the group %s is full", group).WithCode("group_full")
	}
	return nil
}

// makeSchema gives the tenant its schema: the spare of its number where a tenant may have it, and a new one otherwise.
// It does nothing when a placement of the tenant stands already: all comes in one transaction.
func (p *Provisioner) makeSchema(ctx context.Context, tx *postgres.OwnerTx, r CreateRequest, inst postgres.Installation, number int32) error {
	var state string
	const ask = `select coalesce((select state from public.placements where number = $1 for update), '')`
	if err := tx.QueryRow(ctx, ask, number).Scan(&state); err != nil || state != "" && state != spare {
		return err
	}
	if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
		return err
	}
	if state == spare {
		claimed, err := p.claimSpare(ctx, tx, r, inst, number)
		if err != nil || claimed {
			return err
		}
		if err := p.removeSpare(ctx, tx, inst, number); err != nil {
			return err
		}
	}
	at := plot{number: number, schema: r.Schema, state: string(tenant.Active)}
	switch {
	case r.Fill != nil:
		if at.fill = r.Fill; r.Suspended {
			at.state = string(tenant.Suspended)
		}
		return p.build(ctx, tx, inst, at, func() error {
			return r.Fill.Rows(ctx, tx, structure.Schema{Name: r.Schema.String(), Role: p.role(inst, number)})
		})
	case r.AdminEmail != "":
		return p.build(ctx, tx, inst, at, func() error { return firstUser(ctx, tx, r) })
	}
	return p.build(ctx, tx, inst, at, nil)
}

// errFillLost ends a creation or a restore whose rows only another process had.
var errFillLost = errors.New("its rows were another process's")

func fillLost(context.Context, *postgres.OwnerTx, structure.Schema) error {
	return fault.Wrap(errFillLost, fault.Conflict, "the import or restore was interrupted, and has been undone").WithCode("import_interrupted").
		WithHint("run the same command again")
}

// plot says where a schema is built, and as what.
type plot struct {
	number int32
	schema tenant.Schema
	state  string
	// fill says behind which migration inside runs; nil: behind all.
	fill *Filling
}

// build makes role, schema, tables, placement and ledger rows. inside, which may be nil, runs when the tables are made,
// bound to the schema.
func (p *Provisioner) build(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, at plot, inside func() error) error {
	start := time.Now()
	before, err := migrate.Transaction(ctx, tx)
	if err != nil {
		return err
	}
	role := p.role(inst, at.number)
	qrole := postgres.Quote(role)
	var b strings.Builder
	if p.o.DB.Isolation() == postgres.ByRole {
		fmt.Fprintf(&b, "create role %s nologin noinherit;\n", qrole)
		fmt.Fprintf(&b, "grant %s to %s;\n", qrole, postgres.Quote(inst.LoginOf(at.number)))
	}
	b.WriteString(structure.Empty(structure.Schema{Name: at.schema.String(), Role: role}))
	head, after := p.o.Migrate.Head(migrate.TenantSet), ""
	first := head
	if at.fill != nil {
		first = at.fill.Version
	}
	if inside == nil {
		after = emptyPath
	}
	if err := p.o.Migrate.Create(ctx, tx, at.schema, first, b.String(), after); err != nil {
		return err
	}
	if inside != nil {
		if err := inside(); err != nil {
			return err
		}
		if err := p.o.Migrate.Advance(ctx, tx, at.schema, first, head); err != nil {
			return err
		}
		if at.fill != nil && at.fill.After != nil {
			if err := at.fill.After(ctx, tx, at.schema); err != nil {
				return err
			}
		}
		if err := tx.Script(ctx, emptyPath); err != nil {
			return err
		}
	}
	var ended string
	const place = `insert into public.placements (number, schema, role, namespace, state, version, reader)
values ($1, $2, $3, (select oid from pg_catalog.pg_namespace where nspname = $2::text), $6, $4, $5)
returning pg_catalog.pg_current_xact_id()::text`
	if err := tx.QueryRow(ctx, place, at.number, at.schema.String(), role, head, p.o.Migrate.Reader(head), at.state).Scan(&ended); err != nil {
		return err
	}
	if err := migrate.SameTransaction(before, ended); err != nil {
		return err
	}
	return migrate.Record(ctx, tx, migrate.TenantSet, at.number, p.o.Migrate.Files(migrate.TenantSet), time.Since(start))
}

// role is the one whose rights a transaction bound to the tenant has.
func (p *Provisioner) role(inst postgres.Installation, number int32) string {
	if p.o.DB.Isolation() == postgres.ByRole {
		return inst.TenantRole(number)
	}
	return inst.AppRole
}

// firstUser adds the tenant's first user, and leaves the transaction bound to the tenant's schema.
func firstUser(ctx context.Context, tx *postgres.OwnerTx, r CreateRequest) error {
	if err := tx.Bind(ctx, r.Schema); err != nil {
		return err
	}
	var there bool
	if err := tx.QueryRow(ctx, `select pg_catalog.to_regclass('users') is not null`).Scan(&there); err != nil {
		return err
	}
	if !there {
		return fault.New(fault.Invalid, "these tenant migrations make no table users, so there is no first user to add").
			WithCode("no_users").WithHint("leave --admin-email out")
	}
	_, err := auth.Tenants().AddUser(ctx, tx, auth.NewUser{Email: r.AdminEmail, Role: auth.RoleAdmin, PasswordHash: r.AdminPasswordHash})
	return err
}

// setState is what suspending, resuming, dropping and undropping do to the placement, under the tenant's gate: every
// transaction bound before has ended, and every later one sees the new state.
func setState(ctx context.Context, tx *postgres.OwnerTx, number int32, state tenant.State) error {
	if err := tx.LockGate(ctx, number); err != nil {
		return err
	}
	const set = `update public.placements set state = $2, epoch = epoch + 1, updated_at = now() where number = $1 and state <> $2`
	_, err := tx.Exec(ctx, set, number, string(state))
	return err
}

const setTenantState = `update public.tenants set state = $2, epoch = epoch + 1, updated_at = now() where number = $1 and state <> $2`

func (p *Provisioner) stateChange(t tenant.Tenant, kind, point string, state tenant.State, actor string) change {
	return change{
		kind: kind, point: point, tenant: t, actor: actor, request: request{Slug: t.Slug.String()},
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error { return setState(ctx, tx, t.Number, state) },
		made:   placed(t.Number, "state", string(state)),
		finish: func(ctx context.Context, q postgres.Querier) error {
			_, err := q.Exec(ctx, setTenantState, t.Number, string(state))
			return err
		},
	}
}

func wrongState(t tenant.Tenant, verb string, hint string) error {
	if t.State == tenant.Creating {
		hint = "oneo tenant create " + t.Slug.String() + " finishes it, or makes it anew"
	}
	return fault.New(fault.Conflict, "the tenant %s is %s and cannot be %s", t.Slug, t.State, verb).
		WithCode("wrong_state").WithTenant(t.Slug.String()).WithHint("%s", hint)
}

// Suspend stops serving a tenant: when it returns, no request of the tenant is at work and none will be begun. It does
// nothing to a suspended tenant. Conflict: the tenant is dropped.
func (p *Provisioner) Suspend(ctx context.Context, slug tenant.Slug, actor string) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if err != nil || t.State == tenant.Suspended {
		return t, err
	}
	if t.State != tenant.Active {
		return t, wrongState(t, "suspended", "oneo tenant show "+slug.String())
	}
	return p.run(ctx, p.stateChange(t, KindSuspend, "suspend", tenant.Suspended, actor), nil)
}

// Resume serves a suspended tenant again. It does nothing to an active one.
func (p *Provisioner) Resume(ctx context.Context, slug tenant.Slug, actor string) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if err != nil || t.State == tenant.Active {
		return t, err
	}
	if t.State != tenant.Suspended {
		return t, wrongState(t, "resumed", "oneo tenant undrop "+slug.String())
	}
	return p.run(ctx, p.stateChange(t, KindResume, "resume", tenant.Active, actor), nil)
}

// droppedSchema is where a dropped tenant's schema lies. The prefix is oneo's: no tenant's own schema has it.
func droppedSchema(number int32) string { return fmt.Sprintf("oneo_dropped_%d", number) }

// Drop takes a tenant away from its users and keeps its schema, renamed, for grace; 0 is DropGrace. Until then Undrop
// brings it back; afterwards `oneo serve` purges it. It does nothing to a dropped tenant. A schema that is gone, or was
// made again behind oneo's back, is left alone: that is logged and audited.
func (p *Provisioner) Drop(ctx context.Context, slug tenant.Slug, grace time.Duration, actor string) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if err != nil || t.State == tenant.Dropped {
		return t, err
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return t, wrongState(t, "dropped", "oneo tenant show "+slug.String())
	}
	return p.run(ctx, p.dropping(t, grace, actor), nil)
}

func (p *Provisioner) dropping(t tenant.Tenant, grace time.Duration, actor string) change {
	if grace <= 0 {
		grace = p.o.DropGrace
	}
	details := map[string]any{"grace_seconds": int64(grace.Seconds())}
	return change{
		kind: KindDrop, point: "drop", tenant: t, actor: actor,
		request: request{Slug: t.Slug.String(), GraceSeconds: int64(grace.Seconds())},
		details: details,
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if err := setState(ctx, tx, t.Number, tenant.Dropped); err != nil {
				return err
			}
			err := moveSchema(ctx, tx, t, droppedSchema(t.Number))
			var f *fault.Fault
			if errors.As(err, &f) && f.Code == codeSchemaMissing {
				details[codeSchemaMissing] = true
				p.o.Logger.WarnContext(ctx, "the tenant's schema is gone or was made again behind oneo's back: nothing was renamed", "tenant", t.Slug)
				return nil
			}
			return err
		},
		made: placed(t.Number, "state", string(tenant.Dropped)),
		finish: func(ctx context.Context, q postgres.Querier) error {
			const drop = `update public.tenants set state_before = case state when 'suspended' then 'suspended' else 'active' end,
	state = 'dropped', epoch = epoch + 1, dropped_at = now(), purge_after = now() + $2::interval, updated_at = now()
where number = $1 and state in ('active', 'suspended')`
			_, err := q.Exec(ctx, drop, t.Number, grace)
			return err
		},
	}
}

const codeSchemaMissing = "schema_missing"

// standing finds the schema of the tenant's placement; false: it is gone, or what bears its name is another one, made
// behind oneo's back. A name alone would hand somebody else's data to a drop.
func standing(ctx context.Context, tx *postgres.OwnerTx, number int32) (schema string, there bool, err error) {
	const stands = `select p.schema, n.oid is not null from public.placements p
left join pg_catalog.pg_namespace n on n.oid = p.namespace and n.nspname = p.schema where p.number = $1`
	err = tx.QueryRow(ctx, stands, number).Scan(&schema, &there)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", false, nil
	}
	return schema, there, err
}

// moveSchema renames the schema in which the tenant stands, and says so in its placement. The caller holds the gate.
// NotFound with codeSchemaMissing: it does not stand there; nothing was done.
func moveSchema(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, to string) error {
	number := t.Number
	at, there, err := standing(ctx, tx, number)
	if err != nil {
		return err
	}
	if !there {
		f := fault.New(fault.NotFound, "the tenant's schema is gone, or was made again behind oneo's back").WithCode(codeSchemaMissing)
		if t.State == tenant.Dropped {
			return f.WithHint("restore the database from a backup, or `oneo tenant drop %s --purge`", t.Slug)
		}
		return f.WithHint("restore the database from a backup, or `oneo tenant drop %s`; `oneo migrate status` names all such tenants", t.Slug)
	}
	if at == to {
		return nil
	}
	if err := tx.Script(ctx, "alter schema "+postgres.Quote(at)+" rename to "+postgres.Quote(to)); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `update public.placements set schema = $2, updated_at = now() where number = $1`, number, to)
	return err
}

// Undrop brings a dropped tenant back, as it was. Conflict: it is not dropped, or its schema's name has been taken
// behind oneo's back.
func (p *Provisioner) Undrop(ctx context.Context, slug tenant.Slug, actor string) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if err != nil {
		return t, err
	}
	if t.State != tenant.Dropped {
		return t, wrongState(t, "undropped", "oneo tenant show "+slug.String())
	}
	c, err := p.undropping(ctx, t, actor)
	if err != nil {
		return t, err
	}
	return p.run(ctx, c, nil)
}

func (p *Provisioner) undropping(ctx context.Context, t tenant.Tenant, actor string) (change, error) {
	var before string
	err := p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select coalesce(state_before, 'active') from public.tenants where number = $1`, t.Number).Scan(&before)
	})
	if err != nil {
		return change{}, err
	}
	return change{
		kind: KindUndrop, point: "undrop", tenant: t, actor: actor, request: request{Slug: t.Slug.String()},
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if err := setState(ctx, tx, t.Number, tenant.State(before)); err != nil {
				return err
			}
			return moveSchema(ctx, tx, t, t.Schema.String())
		},
		made: placed(t.Number, "state", before),
		finish: func(ctx context.Context, q postgres.Querier) error {
			const undrop = `update public.tenants set state = coalesce(state_before, 'active'), state_before = null,
	epoch = epoch + 1, cache_generation = cache_generation + 1, dropped_at = null, purge_after = null, updated_at = now()
where number = $1 and state = 'dropped'`
			_, err := q.Exec(ctx, undrop, t.Number)
			return err
		},
	}, nil
}

// Purge destroys a dropped tenant for good: schema, role, placement, ledger rows and domains. Its registry row stays
// as a tombstone. Conflict: the tenant is not dropped. Only the schema that oneo itself has renamed away is destroyed.
func (p *Provisioner) Purge(ctx context.Context, slug tenant.Slug, actor string) (tenant.Tenant, error) {
	return p.purge(ctx, slug, actor, false)
}

// purge is Purge; with overdue only if the tenant's grace is over in the transaction that begins it.
func (p *Provisioner) purge(ctx context.Context, slug tenant.Slug, actor string, overdue bool) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if err != nil {
		return t, err
	}
	if t.State != tenant.Dropped {
		return t, wrongState(t, "purged", "oneo tenant drop "+slug.String())
	}
	c, err := p.purging(ctx, t, actor)
	if err != nil {
		return t, err
	}
	if overdue {
		c.begin = func(ctx context.Context, q postgres.Querier) error {
			var over bool
			if err := q.QueryRow(ctx, `select purge_after < now() from public.tenants where number = $1`, t.Number).Scan(&over); err != nil || over {
				return err
			}
			return fault.New(fault.Conflict, "the tenant's grace is not over").WithCode("not_overdue")
		}
	}
	gone, err := p.run(ctx, c, nil)
	if err != nil {
		return gone, err
	}
	if _, err := p.DropMoved(ctx, t.Number); err != nil { // a server tries again
		p.o.Logger.WarnContext(ctx, "what moves of a purged tenant have left behind is not destroyed yet", "tenant", t.Slug, "error", err)
	}
	return gone, nil
}

func (p *Provisioner) purging(ctx context.Context, t tenant.Tenant, actor string) (change, error) {
	inst, err := p.o.DB.Installation(ctx, t.Group)
	if err != nil {
		return change{}, err
	}
	details := map[string]any{}
	return change{
		kind: KindPurge, point: "purge", tenant: t, actor: actor, request: request{Slug: t.Slug.String()}, details: details,
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			// By its renamed name only: a schema that stands under the tenant's name by now is another's.
			err := destroy(ctx, tx, inst, t.Number, droppedSchema(t.Number), details)
			if details[codeSchemaMissing] == true {
				p.o.Logger.WarnContext(ctx, "the dropped tenant's schema is gone or was made again behind oneo's back: no schema was destroyed", "tenant", t.Slug)
			}
			return err
		},
		made: func(ctx context.Context, tx *postgres.OwnerTx) (bool, error) {
			there, err := placed(t.Number)(ctx, tx)
			return !there, err
		},
		finish: func(ctx context.Context, q postgres.Querier) error {
			return p.purged(ctx, q, t, tenant.Dropped)
		},
	}, nil
}

// purged leaves the tombstone of a tenant that is in one of the states, without domains and settings.
func (p *Provisioner) purged(ctx context.Context, q postgres.Querier, t tenant.Tenant, states ...tenant.State) error {
	// Whoever is giving the tenant a domain at this moment keeps its row until that is done; then it goes as well.
	if _, err := q.Exec(ctx, `select from public.tenants where number = $1 for update`, t.Number); err != nil {
		return err
	}
	if p.o.DomainHold > 0 {
		const hold = `insert into public.domain_holds (host, tenant, held_until)
select host, tenant, now() + $2::interval from public.domains where tenant = $1
on conflict (host) do update set tenant = excluded.tenant, held_until = excluded.held_until`
		// The default domain goes with the name: whoever takes the name next needs it.
		if _, err := q.Exec(ctx, hold, t.Number, p.o.DomainHold); err != nil {
			return err
		}
		if _, err := q.Exec(ctx, `delete from public.domain_holds where host = $1 and tenant = $2`,
			t.Slug.Under(p.o.BaseDomain).String(), t.Number); err != nil {
			return err
		}
	}
	if _, err := q.Exec(ctx, `delete from public.domains where tenant = $1`, t.Number); err != nil {
		return err
	}
	const purge = `update public.tenants set state = 'purged', purge_after = null, settings = '{}', epoch = epoch + 1,
	cache_generation = cache_generation + 1, updated_at = now() where number = $1 and state = any($2)`
	_, err := q.Exec(ctx, purge, t.Number, states)
	return err
}

// destroy takes away what a number has in the database: schema, role, ledger rows and placement. The schema goes only
// where it is the one of the placement and stands under its name own; details say so when it does not.
func destroy(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, number int32, own string, details map[string]any) error {
	at, there, err := standing(ctx, tx, number)
	switch {
	case err != nil:
		return err
	case at == "": // destroyed by an earlier attempt
	case there && at == own:
		if err := tx.Script(ctx, "drop schema "+postgres.Quote(at)+" cascade"); err != nil {
			return err
		}
	default:
		details[codeSchemaMissing] = true
	}
	if err := dropUndo(ctx, tx, number); err != nil {
		return err
	}
	if err := dropReplaced(ctx, tx, number); err != nil {
		return err
	}
	if err := dropLeft(ctx, tx, number); err != nil {
		return err
	}
	if err := dropRole(ctx, tx, inst.TenantRole(number), details); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, `delete from public.ledger where set = 'tenant' and tenant = $1`, number); err != nil {
		return err
	}
	_, err = tx.Exec(ctx, `delete from public.placements where number = $1`, number)
	return err
}

// dropUndo destroys what runs have kept of a number, and what taking them back has taken out.
func dropUndo(ctx context.Context, tx *postgres.OwnerTx, number int32) error {
	rows, err := tx.Query(ctx, `select coalesce(undone, schema) from public.undo_points where tenant = $1 order by run`, number)
	if err != nil {
		return err
	}
	schemas, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, s := range schemas {
		if err := tx.Script(ctx, "drop schema if exists "+postgres.Quote(s)+" cascade"); err != nil {
			return err
		}
	}
	_, err = tx.Exec(ctx, `delete from public.undo_points where tenant = $1`, number)
	return err
}

// dropRole destroys a tenant's role, unless something that is not the tenant's refers to it: then it is left, and the
// audit row's details say so. In another database of the cluster it may stand for a copy of the tenant, and goes with that.
func dropRole(ctx context.Context, tx *postgres.OwnerTx, role string, details map[string]any) error {
	const elsewhere = `select exists (select from pg_catalog.pg_shdepend d join pg_catalog.pg_roles r on r.oid = d.refobjid
where d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass and r.rolname = $1
	and d.dbid not in (0, (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())))`
	var other bool
	if err := tx.QueryRow(ctx, elsewhere, role).Scan(&other); err != nil || other { // a copy that a move has left, or has made
		return err
	}
	if details[codeSchemaMissing] == true {
		// Whoever moved or restored the schema by hand may have granted it to the role again.
		const used = `select exists (select from pg_catalog.pg_shdepend d join pg_catalog.pg_roles r on r.oid = d.refobjid
where d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass and r.rolname = $1)`
		var is bool
		if err := tx.QueryRow(ctx, used, role).Scan(&is); err != nil {
			return err
		}
		if is {
			details["role_left"] = role
			return nil
		}
	}
	return tx.Script(ctx, "drop role if exists "+postgres.Quote(role))
}

// RenameRequest says what a tenant is to be called. Zero values stay as they are.
type RenameRequest struct {
	Slug   tenant.Slug
	Schema tenant.Schema
	Name   string
	Actor  string
}

// Rename gives a tenant another name, and with it another default domain; with Schema its schema too. The former
// default domain is held back from other tenants.
func (p *Provisioner) Rename(ctx context.Context, slug tenant.Slug, r RenameRequest) (tenant.Tenant, error) {
	t, err := p.find(ctx, slug)
	if fault.Is(err, fault.NotFound) && !r.Slug.IsZero() {
		// A rename that was killed between two databases is finished by asking for the same again.
		if going, lerr := p.beingRenamed(ctx, slug, r.Slug); lerr != nil || going {
			if lerr != nil {
				return t, lerr
			}
			return p.find(ctx, r.Slug)
		}
	}
	if err != nil {
		return t, err
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return t, wrongState(t, "renamed", "oneo tenant show "+slug.String())
	}
	if r.Slug.IsZero() {
		r.Slug = t.Slug
	}
	if r.Schema.IsZero() {
		r.Schema = t.Schema
	}
	if r.Name == "" {
		r.Name = t.Name
		if t.Name == t.Slug.String() {
			r.Name = r.Slug.String()
		}
	}
	if r.Slug == t.Slug && r.Schema == t.Schema && r.Name == t.Name {
		return t, nil
	}
	if n := len([]rune(r.Name)); n > 200 {
		return t, fault.New(fault.Invalid, "the display name is longer than 200 characters").WithCode("invalid_name")
	}
	return p.run(ctx, p.renaming(t, r), nil)
}

// beingRenamed reports whether an unfinished rename has given the name from up for to already.
func (p *Provisioner) beingRenamed(ctx context.Context, from, to tenant.Slug) (going bool, err error) {
	const query = `select exists (select from public.operations o join public.tenants t on t.number = o.tenant
where o.state = 'running' and o.kind = $1 and o.slug = $2 and t.slug = $3)`
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, query, KindRename, from.String(), to.String()).Scan(&going)
	})
	return going, err
}

func (p *Provisioner) renaming(t tenant.Tenant, r RenameRequest) change {
	return change{
		kind: KindRename, point: "rename", tenant: t, actor: r.Actor,
		request: request{
			Slug: r.Slug.String(), Schema: r.Schema.String(), Name: r.Name,
			OldSlug: t.Slug.String(), OldSchema: t.Schema.String(), OldName: t.Name,
		},
		details: map[string]any{"from": t.Slug.String(), "to": r.Slug.String(), "schema": r.Schema.String()},
		begin: func(ctx context.Context, q postgres.Querier) error {
			return p.renameInRegistry(ctx, q, t, r.Slug, r.Schema.String(), r.Name)
		},
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if r.Schema == t.Schema {
				return nil
			}
			if err := nameless(ctx, tx, t); err != nil {
				return err
			}
			if err := tx.LockGate(ctx, t.Number); err != nil {
				return err
			}
			if err := moveSchema(ctx, tx, t, r.Schema.String()); err != nil {
				return err
			}
			kept, err := replacedSchemas(ctx, tx, t.Number)
			if err != nil {
				return err
			}
			for _, schema := range append(kept, r.Schema.String()) {
				if err := repath(ctx, tx, schema, t.Schema.String(), r.Schema.String()); err != nil {
					return err
				}
			}
			_, err = tx.Exec(ctx, `update public.placements set epoch = epoch + 1 where number = $1`, t.Number)
			return err
		},
		finish: func(context.Context, postgres.Querier) error { return nil },
		undo: func(ctx context.Context, q postgres.Querier) error {
			renamed := t
			renamed.Slug = r.Slug
			return p.renameInRegistry(ctx, q, renamed, t.Slug, t.Schema.String(), t.Name)
		},
		made: func(ctx context.Context, tx *postgres.OwnerTx) (bool, error) {
			if r.Schema == t.Schema { // nothing is to be made there
				return false, nil
			}
			return placed(t.Number, "schema", r.Schema.String())(ctx, tx)
		},
	}
}

func (p *Provisioner) renameInRegistry(ctx context.Context, q postgres.Querier, t tenant.Tenant, slug tenant.Slug, schema, name string) error {
	const rename = `update public.tenants set slug = $2, schema = $3, name = $4, epoch = epoch + 1,
	cache_generation = cache_generation + 1, updated_at = now() where number = $1`
	if _, err := q.Exec(ctx, rename, t.Number, slug.String(), schema, name); err != nil {
		return err
	}
	if slug == t.Slug {
		return nil
	}
	old, host := t.Slug.Under(p.o.BaseDomain), slug.Under(p.o.BaseDomain)
	domains, err := registry.Domains(ctx, q, t)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(domains, func(d registry.Domain) bool { return d.Host == old })
	if err := registry.AddDomain(ctx, q, t, host, i >= 0 && domains[i].Primary); err != nil {
		return err
	}
	if i < 0 {
		return nil
	}
	return registry.RemoveDomain(ctx, q, t, old, p.o.DomainHold)
}
