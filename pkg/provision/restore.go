package provision

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// RestoreRequest says what takes a tenant's place.
type RestoreRequest struct {
	Fill Filling
	// Keep is how long what is there now is kept, for Return.
	Keep  time.Duration
	Actor string
}

// Restored is what a restore has done.
type Restored struct {
	Tenant    tenant.Tenant
	Operation uuid.UUID     // for Return
	Kept      time.Time     // until when
	Pause     time.Duration // for how long the tenant's requests were kept waiting or turned away
}

// Restore puts other tables in the place of a tenant's: they are made and filled beside it, while it is served, and
// swapped in under its gate. What was there is kept. The transaction is one: until it commits nothing has changed. Faults: Conflict for a tenant that is
// neither active nor suspended, Locked when its requests do not leave the gate.
func (p *Provisioner) Restore(ctx context.Context, slug tenant.Slug, r RestoreRequest) (done Restored, err error) {
	t, err := p.find(ctx, slug)
	if err != nil {
		return done, err
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return done, wrongState(t, "restored", "oneo tenant undrop "+slug.String()+", or restore it under another name")
	}
	if r.Keep <= 0 {
		return done, fault.New(fault.Internal, "provision: a restore needs a Keep above 0")
	}
	c := p.restoring(t, r, &done)
	done.Tenant, err = p.run(ctx, c, nil)
	return done, err
}

func (p *Provisioner) restoring(t tenant.Tenant, r RestoreRequest, done *Restored) change {
	details := map[string]any{}
	return change{
		kind: KindRestore, point: "restore", tenant: t, actor: r.Actor, once: true, details: details,
		request: request{Slug: t.Slug.String(), KeepSeconds: int64(r.Keep.Seconds())},
		known:   func(operation uuid.UUID) { done.Operation = operation },
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if err := forgetUndo(ctx, tx, t.Number); err != nil {
				return err
			}
			if err := untied(ctx, tx, t.Schema.String()); err != nil {
				return err
			}
			if _, err := p.fillBeside(ctx, tx, t, r.Fill); err != nil {
				return err
			}
			if err := failpoint.Hit("restore.filled"); err != nil {
				return err
			}
			at, err := p.lockGate(ctx, tx, t.Number)
			if err != nil {
				return err
			}
			if done.Kept, err = p.swapIn(ctx, tx, t, done.Operation, r.Keep); err != nil {
				return err
			}
			done.Pause = time.Since(at)
			return p.forgotten(ctx, tx, t)
		},
		made: func(ctx context.Context, tx *postgres.OwnerTx) (bool, error) {
			err := tx.QueryRow(ctx, `select expires_at from public.replaced where operation = $1`, done.Operation).Scan(&done.Kept)
			if errors.Is(err, pgx.ErrNoRows) {
				return false, nil
			}
			return err == nil, err
		},
		finish: func(ctx context.Context, q postgres.Querier) error {
			details["operation"], details["kept_until"] = done.Operation, done.Kept
			return swapped(ctx, q, t)
		},
	}
}

// Beside makes and fills tables beside a tenant's, at the newest version, as Restore does, and runs fn in the same transaction,
// with an empty search path. Then they are gone again. What fn has changed of the tenant's own stays unless it fails, and where the
// registry is in the same database nobody goes on with what was cached of it; fn takes the tenant's gate for that. Meanwhile no other operation of the tenant begins. Faults: those of Restore.
func (p *Provisioner) Beside(ctx context.Context, slug tenant.Slug, fill Filling, fn func(ctx context.Context, tx *postgres.OwnerTx, live, beside structure.Schema) error) error {
	t, err := p.find(ctx, slug)
	if err != nil {
		return err
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return wrongState(t, "compared with an archive", "oneo tenant undrop "+slug.String()+", or restore it under another name")
	}
	return p.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, t.Number, p.o.GateWait); err != nil {
			return err
		}
		// Another operation may have come before the lock: the tenant's tables may be elsewhere by now.
		err := p.inRegistry(ctx, tx, t.Group, func(tx *postgres.OwnerTx) error {
			now, err := registry.ByNumber(ctx, tx, t.Number)
			if err == nil && (now.Epoch != t.Epoch || now.Group != t.Group || now.State != t.State) {
				err = tenantChanged(now.Slug.String(), string(now.State))
			}
			return err
		})
		if err != nil {
			return err
		}
		beside, err := p.fillBeside(ctx, tx, t, fill)
		if err != nil {
			return err
		}
		if err := fn(ctx, tx, structure.Schema{Name: t.Schema.String(), Role: beside.Role}, beside); err != nil {
			return err
		}
		if err := tx.Script(ctx, emptyPath+"drop schema "+postgres.Quote(beside.Name)+" cascade"); err != nil {
			return err
		}
		return p.forgotten(ctx, tx, t)
	})
}

// forgotten is swapped in the transaction of the swap itself, where the registry is in the same database: whoever dies behind
// it has left nobody with rows of before.
func (p *Provisioner) forgotten(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant) error {
	if !p.o.DB.SameDatabase(t.Group) {
		return nil
	}
	return swapped(ctx, tx, t)
}

// swapped makes everybody forget what they know of the tenant's rows.
func swapped(ctx context.Context, q postgres.Querier, t tenant.Tenant) error {
	const bump = `update public.tenants set epoch = epoch + 1, cache_generation = cache_generation + 1, updated_at = now() where number = $1`
	_, err := q.Exec(ctx, bump, t.Number)
	return err
}

// fillBeside makes and fills tables for the tenant in a schema that nobody sees yet, at the newest version.
func (p *Provisioner) fillBeside(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, fill Filling) (into structure.Schema, err error) {
	if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
		return into, err
	}
	at, there, err := standing(ctx, tx, t.Number)
	if err != nil {
		return into, err
	}
	if !there || at != t.Schema.String() {
		return into, fault.New(fault.Conflict, "the tenant's schema is gone, or was made again behind oneo's back").WithCode(codeSchemaMissing).
			WithHint("drop the tenant, then import the archive")
	}
	// Whoever runs a statement of `oneo sql` in the tenant refers to the row meanwhile, and does not wait.
	var role string
	if err := tx.QueryRow(ctx, `select role from public.placements where number = $1 for no key update`, t.Number).Scan(&role); err != nil {
		return into, err
	}
	before, err := migrate.Transaction(ctx, tx)
	if err != nil {
		return into, err
	}
	schema, head := tenant.RestoreSchema(t.Number), p.o.Migrate.Head(migrate.TenantSet)
	into = structure.Schema{Name: schema.String(), Role: role}
	if err := p.o.Migrate.Create(ctx, tx, schema, fill.Version, structure.Empty(into), ""); err != nil {
		return into, err
	}
	if err := fill.Rows(ctx, tx, into); err != nil {
		return into, err
	}
	if err := p.o.Migrate.Advance(ctx, tx, schema, fill.Version, head); err != nil {
		return into, err
	}
	// While the path is bound, or every name of the schema's own would be taken for a text.
	// Rows of the archive cannot know this name; those that a later migration has written may.
	what, err := holdsName(ctx, tx, schema.String(), schema.String(), fill.Version < head)
	if err != nil {
		return into, err
	}
	if what != "" {
		return into, fault.New(fault.Conflict, "the tenant cannot be restored in place: %s would hold the name of another schema as text", what).WithCode("schema_named").
			WithHint("restore it under another name: --as NAME")
	}
	if err := tx.Script(ctx, emptyPath); err != nil {
		return into, err
	}
	after, err := migrate.Transaction(ctx, tx)
	if err != nil {
		return into, err
	}
	return into, migrate.SameTransaction(before, after)
}

// forgetUndo lets the undo points of runs expire: they are about tables that will be away, and nothing may put their rows into
// others. Before anything that takes long, and not under the gate: whoever is destroying one at this moment is waited for.
func forgetUndo(ctx context.Context, tx *postgres.OwnerTx, number int32) error {
	const forget = `update public.undo_points set expires_at = pg_catalog.now() where tenant = $1 and expires_at > pg_catalog.now()`
	_, err := tx.Exec(ctx, forget, number)
	return err
}

// lockGate takes the tenant's gate for the rest of the transaction, whose work is not lost while requests are still at
// work: it tries for as long as GateWait. It returns when it began to wait for the last time.
func (p *Provisioner) lockGate(ctx context.Context, tx *postgres.OwnerTx, number int32) (since time.Time, err error) {
	for deadline := time.Now().Add(p.o.GateWait); ; {
		since = time.Now()
		if err := tx.Script(ctx, "savepoint gate"); err != nil {
			return since, err
		}
		err := tx.LockGate(ctx, number)
		if err == nil {
			return since, tx.Script(ctx, "release savepoint gate")
		}
		if !fault.Is(err, fault.Locked) || time.Now().After(deadline) {
			return since, err
		}
		if err := tx.Script(ctx, "rollback to savepoint gate; release savepoint gate"); err != nil {
			return since, err
		}
		select { // whoever waits before us gets through
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			return since, ctx.Err()
		}
	}
}

// keeps is what public.replaced remembers of a tenant that is taken out of use. Its transaction may be hours old.
const keeps = `insert into public.replaced (operation, tenant, schema, namespace, version, reader, ledger, progress, rights, made_at, expires_at)
select $2, number, $3, namespace, version, reader,
	(select coalesce(pg_catalog.jsonb_agg(l), '[]') from public.ledger l where l.set = 'tenant' and l.tenant = $1),
	(select coalesce(pg_catalog.jsonb_agg(g), '[]') from public.progress g where g.tenant = $1), $5, pg_catalog.clock_timestamp(), pg_catalog.clock_timestamp() + $4::interval
from public.placements where number = $1 returning expires_at`

// swapIn renames what is there away and what was filled to its place. The caller holds the gate.
func (p *Provisioner) swapIn(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, operation uuid.UUID, keep time.Duration) (until time.Time, err error) {
	away := tenant.ReplacedSchema(t.Number, shortID(operation)).String()
	all, err := rightsIn(ctx, tx, t.Schema.String())
	if err != nil {
		return until, err
	}
	if err := tx.QueryRow(ctx, keeps, t.Number, operation, away, keep, all).Scan(&until); err != nil {
		return until, err
	}
	brought := tenant.RestoreSchema(t.Number).String()
	if err := rename(ctx, tx, t.Schema.String(), away, brought, t.Schema.String()); err != nil {
		return until, err
	}
	if err := repath(ctx, tx, t.Schema.String(), brought, t.Schema.String()); err != nil {
		return until, err
	}
	if err := keepOut(ctx, tx, away, all); err != nil {
		return until, err
	}
	const clean = `with a as (delete from public.ledger where set = 'tenant' and tenant = $1)
delete from public.progress where tenant = $1`
	if _, err := tx.Exec(ctx, clean, t.Number); err != nil {
		return until, err
	}
	head := p.o.Migrate.Head(migrate.TenantSet)
	const place = `update public.placements set namespace = (select oid from pg_catalog.pg_namespace where nspname = schema), version = $2, reader = $3,
	epoch = epoch + 1, updated_at = pg_catalog.now() where number = $1`
	if _, err := tx.Exec(ctx, place, t.Number, head, p.o.Migrate.Reader(head)); err != nil {
		return until, err
	}
	return until, migrate.Record(ctx, tx, migrate.TenantSet, t.Number, p.o.Migrate.Files(migrate.TenantSet), 0)
}

// rename renames schemas, two and two, in one message.
func rename(ctx context.Context, tx *postgres.OwnerTx, names ...string) error {
	sql := ""
	for i := 0; i+1 < len(names); i += 2 {
		sql += "alter schema " + postgres.Quote(names[i]) + " rename to " + postgres.Quote(names[i+1]) + ";\n"
	}
	return tx.Script(ctx, sql)
}

// untied refuses to take tables out of use to which something outside of their schema is tied, as a view for reports or a publication:
// it would go on with the old ones, and vanish with them.
func untied(ctx context.Context, tx *postgres.OwnerTx, schema string) error {
	const query = `with s as (select oid from pg_catalog.pg_namespace where nspname = $1),
own (class, oid) as materialized (
	select 'pg_catalog.pg_namespace'::pg_catalog.regclass, s.oid from s
	union all select 'pg_catalog.pg_class'::pg_catalog.regclass, c.oid from s join pg_catalog.pg_class c on c.relnamespace = s.oid
	union all select 'pg_catalog.pg_type'::pg_catalog.regclass, y.oid from s join pg_catalog.pg_type y on y.typnamespace = s.oid
	union all select 'pg_catalog.pg_proc'::pg_catalog.regclass, p.oid from s join pg_catalog.pg_proc p on p.pronamespace = s.oid
), tied as materialized (
	select distinct d.classid, d.objid, d.objsubid from own join pg_catalog.pg_depend d on d.refclassid = own.class and d.refobjid = own.oid
	where d.deptype in ('n', 'a') and d.classid <> 'pg_catalog.pg_default_acl'::pg_catalog.regclass
), placed as (
	select t.*, case t.classid
		when 'pg_catalog.pg_class'::pg_catalog.regclass then (select relnamespace from pg_catalog.pg_class where oid = objid)
		when 'pg_catalog.pg_type'::pg_catalog.regclass then (select typnamespace from pg_catalog.pg_type where oid = objid)
		when 'pg_catalog.pg_proc'::pg_catalog.regclass then (select pronamespace from pg_catalog.pg_proc where oid = objid)
		when 'pg_catalog.pg_constraint'::pg_catalog.regclass then (select connamespace from pg_catalog.pg_constraint where oid = objid)
		when 'pg_catalog.pg_operator'::pg_catalog.regclass then (select oprnamespace from pg_catalog.pg_operator where oid = objid)
		when 'pg_catalog.pg_statistic_ext'::pg_catalog.regclass then (select stxnamespace from pg_catalog.pg_statistic_ext where oid = objid)
		when 'pg_catalog.pg_rewrite'::pg_catalog.regclass then (select relnamespace from pg_catalog.pg_class c join pg_catalog.pg_rewrite r on r.ev_class = c.oid where r.oid = objid)
		when 'pg_catalog.pg_attrdef'::pg_catalog.regclass then (select relnamespace from pg_catalog.pg_class c join pg_catalog.pg_attrdef a on a.adrelid = c.oid where a.oid = objid)
		when 'pg_catalog.pg_trigger'::pg_catalog.regclass then (select relnamespace from pg_catalog.pg_class c join pg_catalog.pg_trigger g on g.tgrelid = c.oid where g.oid = objid)
		when 'pg_catalog.pg_policy'::pg_catalog.regclass then (select relnamespace from pg_catalog.pg_class c join pg_catalog.pg_policy y on y.polrelid = c.oid where y.oid = objid)
	end as at from tied t
), outside as (
	select pg_catalog.pg_describe_object(classid, objid, objsubid) as what from placed left join pg_catalog.pg_namespace n on n.oid = placed.at
	where case when n.oid is null -- these lie in no schema
		then classid in (pg_catalog.to_regclass('pg_catalog.pg_publication_rel'), pg_catalog.to_regclass('pg_catalog.pg_publication_namespace'),
			pg_catalog.to_regclass('pg_catalog.pg_event_trigger'), pg_catalog.to_regclass('pg_catalog.pg_cast'))
		else n.oid <> (select oid from s) and n.nspname !~ '^(oneo|pg_temp|pg_toast)_' end
)
select count(*), coalesce((select pg_catalog.string_agg(what, ', ') from (select what from outside order by what limit 10) w), '') from outside`
	var count int
	var some string
	if err := tx.QueryRow(ctx, query, schema).Scan(&count, &some); err != nil || count == 0 {
		return err
	}
	return fault.New(fault.Conflict, "%d object(s) outside of the tenant's schema are tied to its tables, and would go on with the old ones: %s", count, some).WithCode("tied_outside").
		WithHint("take them away first, and make them again afterwards")
}

// right is what somebody may do with a schema.
type right struct {
	Role      string `json:"role"` // empty: everybody
	Privilege string `json:"privilege"`
	Grantable bool   `json:"grantable"`
}

// rightsIn reads who but its owner may do what with a schema: the tenant's role, and whom a person has let in.
func rightsIn(ctx context.Context, tx *postgres.OwnerTx, schema string) ([]right, error) {
	const query = `select coalesce(r.rolname::text, ''), a.privilege_type, a.is_grantable
from pg_catalog.pg_namespace n cross join lateral pg_catalog.aclexplode(n.nspacl) a left join pg_catalog.pg_roles r on r.oid = a.grantee
where n.nspname = $1 and a.grantee <> n.nspowner order by 1, 2`
	rows, err := tx.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r right, err error) {
		return r, row.Scan(&r.Role, &r.Privilege, &r.Grantable)
	})
	if all == nil {
		all = []right{} // never null in the database
	}
	return all, err
}

// to is the role as SQL writes it.
func (r right) to() string {
	if r.Role == "" {
		return "public"
	}
	return postgres.Quote(r.Role)
}

// keepOut takes all rights in a schema away: what is kept is the owner's alone.
func keepOut(ctx context.Context, tx *postgres.OwnerTx, schema string, all []right) error {
	sql := ""
	for _, r := range all {
		sql += "revoke all on schema " + postgres.Quote(schema) + " from " + r.to() + " cascade;\n"
	}
	return tx.Script(ctx, sql)
}

// letIn gives rights in a schema back to those who are still there.
func letIn(ctx context.Context, tx *postgres.OwnerTx, schema string, all []right) error {
	sql := ""
	for _, r := range all {
		var there bool
		if err := tx.QueryRow(ctx, `select $1 = '' or exists (select from pg_catalog.pg_roles where rolname = $1)`, r.Role).Scan(&there); err != nil {
			return err
		}
		if verb, known := map[string]string{"USAGE": "usage", "CREATE": "create"}[r.Privilege]; there && known {
			sql += "grant " + verb + " on schema " + postgres.Quote(schema) + " to " + r.to()
			if r.Grantable {
				sql += " with grant option"
			}
			sql += ";\n"
		}
	}
	return tx.Script(ctx, sql)
}

// shortID tells operations apart by the end of their ids: the beginning is a time.
func shortID(id uuid.UUID) string {
	s := id.String()
	return s[len(s)-8:]
}

// Return undoes a restore: what it had taken out of use takes its place again, and what it had brought, with all that was
// written since, is kept in turn until the time that the restore gave. Faults: NotFound for an operation that is no restore or
// whose tables have expired, Conflict when it was undone already or another restore has followed.
func (p *Provisioner) Return(ctx context.Context, slug tenant.Slug, restore uuid.UUID, actor string) (done Restored, err error) {
	t, err := p.find(ctx, slug)
	if err != nil {
		return done, err
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return done, wrongState(t, "returned to what it was", "oneo tenant undrop "+slug.String())
	}
	done.Operation = restore
	done.Tenant, err = p.run(ctx, p.returning(t, restore, actor, &done), nil)
	return done, err
}

// CheckReturn returns what Return would refuse now, and until when what it would take out of use is kept. It changes nothing.
func (p *Provisioner) CheckReturn(ctx context.Context, t tenant.Tenant, restore uuid.UUID) (until time.Time, err error) {
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return until, wrongState(t, "returned to what it was", "oneo tenant undrop "+t.Slug.String())
	}
	return until, p.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
		if err := returnable(ctx, tx, t, restore, &until); err != nil {
			return err
		}
		return untied(ctx, tx, t.Schema.String())
	})
}

func (p *Provisioner) returning(t tenant.Tenant, restore uuid.UUID, actor string, done *Restored) change {
	var by *uuid.UUID // nil: all is one transaction
	return change{
		kind: KindReturn, point: "return", tenant: t, actor: actor, request: request{Slug: t.Slug.String(), Restore: &restore},
		details: map[string]any{"restore": restore},
		known:   func(operation uuid.UUID) { by = &operation },
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if err := returnable(ctx, tx, t, restore, &done.Kept); err != nil {
				return err
			}
			if err := untied(ctx, tx, t.Schema.String()); err != nil {
				return err
			}
			if err := forgetUndo(ctx, tx, t.Number); err != nil {
				return err
			}
			at, err := p.lockGate(ctx, tx, t.Number)
			if err != nil {
				return err
			}
			err = swapBack(ctx, tx, t, restore, by)
			done.Pause = time.Since(at)
			return err
		},
		// By this operation: that another one has undone the restore does not make it a success.
		made: func(ctx context.Context, tx *postgres.OwnerTx) (is bool, err error) {
			return is, tx.QueryRow(ctx, `select exists (select from public.replaced where operation = $1 and undone_by = $2)`, restore, by).Scan(&is)
		},
		finish: func(ctx context.Context, q postgres.Querier) error { return swapped(ctx, q, t) },
	}
}

// returnable refuses to undo a restore that cannot be, or not any more.
func returnable(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, restore uuid.UUID, until *time.Time) error {
	var undone, latest, there, expired bool
	const ask = `select r.undone_at is not null, not exists (select from public.replaced l where l.tenant = r.tenant and l.made_at > r.made_at and l.undone_at is null),
	exists (select from pg_catalog.pg_namespace n where n.oid = r.namespace and n.nspname = r.schema), r.expires_at <= pg_catalog.now(), r.expires_at
from public.replaced r where r.operation = $1 and r.tenant = $2 for update`
	err := tx.QueryRow(ctx, ask, restore, t.Number).Scan(&undone, &latest, &there, &expired, until)
	switch {
	case errors.Is(err, pgx.ErrNoRows), err == nil && expired:
		return fault.New(fault.NotFound, "nothing is kept of the restore %s of %s: it has expired, or never was", restore, t.Slug).WithCode("nothing_kept").
			WithHint("oneo backup list -t %s", t.Slug)
	case err != nil:
		return err
	case undone:
		return fault.New(fault.Conflict, "the restore %s was undone already", restore).WithCode("undone_already")
	case !latest:
		return fault.New(fault.Conflict, "the tenant was restored once more since; undo the later restore first").WithCode("restored_since")
	case !there:
		return fault.New(fault.Conflict, "what the restore has kept is gone, or was made again behind oneo's back").WithCode(codeSchemaMissing)
	}
	at, there, err := standing(ctx, tx, t.Number)
	if err == nil && (!there || at != t.Schema.String()) {
		err = fault.New(fault.Conflict, "the tenant's schema is gone, or was made again behind oneo's back").WithCode(codeSchemaMissing)
	}
	return err
}

// swapBack exchanges the tenant's tables for those of a restore's row, which remembers the former in turn. The caller holds the gate.
func swapBack(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, restore uuid.UUID, by *uuid.UUID) error {
	var kept struct {
		Schema    string
		Namespace uint32
		Version   int
		Reader    int
		Ledger    json.RawMessage
		Progress  json.RawMessage
		Rights    []right
	}
	const read = `select schema, namespace, version, reader, ledger, progress, rights from public.replaced where operation = $1`
	if err := tx.QueryRow(ctx, read, restore).Scan(&kept.Schema, &kept.Namespace, &kept.Version, &kept.Reader, &kept.Ledger, &kept.Progress, &kept.Rights); err != nil {
		return err
	}
	all, err := rightsIn(ctx, tx, t.Schema.String())
	if err != nil {
		return err
	}
	const remember = `update public.replaced r set namespace = p.namespace, version = p.version, reader = p.reader, undone_at = pg_catalog.clock_timestamp(), undone_by = $2, rights = $3,
	ledger = (select coalesce(pg_catalog.jsonb_agg(l), '[]') from public.ledger l where l.set = 'tenant' and l.tenant = p.number),
	progress = (select coalesce(pg_catalog.jsonb_agg(g), '[]') from public.progress g where g.tenant = p.number)
from public.placements p where r.operation = $1 and p.number = r.tenant`
	if _, err := tx.Exec(ctx, remember, restore, by, all); err != nil {
		return err
	}
	between := tenant.RestoreSchema(t.Number).String()
	if err := rename(ctx, tx, t.Schema.String(), between, kept.Schema, t.Schema.String(), between, kept.Schema); err != nil {
		return err
	}
	if err := keepOut(ctx, tx, kept.Schema, all); err != nil {
		return err
	}
	if err := letIn(ctx, tx, t.Schema.String(), kept.Rights); err != nil {
		return err
	}
	const clean = `with a as (delete from public.ledger where set = 'tenant' and tenant = $1)
delete from public.progress where tenant = $1`
	if _, err := tx.Exec(ctx, clean, t.Number); err != nil {
		return err
	}
	const rows = `with a as (insert into public.ledger select * from pg_catalog.jsonb_populate_recordset(null::public.ledger, $1))
insert into public.progress select * from pg_catalog.jsonb_populate_recordset(null::public.progress, $2)`
	if _, err := tx.Exec(ctx, rows, kept.Ledger, kept.Progress); err != nil {
		return err
	}
	const place = `update public.placements set namespace = $2, version = $3, reader = $4, epoch = epoch + 1, updated_at = pg_catalog.now() where number = $1`
	_, err = tx.Exec(ctx, place, t.Number, kept.Namespace, kept.Version, kept.Reader)
	return err
}

// RestoreOf finds the tenant of a restore, by its operation's id or the end of it. NotFound: there is none.
func (p *Provisioner) RestoreOf(ctx context.Context, id string) (op registry.Operation, err error) {
	const find = `select id from public.operations where kind = $1 and (id::text = $2 or pg_catalog.right(id::text, 8) = $2) order by created_at desc limit 1`
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		var found uuid.UUID
		if err := tx.QueryRow(ctx, find, KindRestore, id).Scan(&found); errors.Is(err, pgx.ErrNoRows) {
			return fault.New(fault.NotFound, "there is no restore %s", id).WithCode("operation_not_found")
		} else if err != nil {
			return err
		}
		op, err = registry.OperationByID(ctx, tx, found)
		return err
	})
	return op, err
}

// dropReplaced destroys what restores have kept of a number.
func dropReplaced(ctx context.Context, tx *postgres.OwnerTx, number int32) error {
	rows, err := tx.Query(ctx, `select schema from public.replaced where tenant = $1 order by made_at`, number)
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
	_, err = tx.Exec(ctx, `delete from public.replaced where tenant = $1`, number)
	return err
}

// ExpireReplaced destroys what restores have kept whose time is over, in the databases of all groups, one in a transaction. It
// returns how many. What fails does not stop the others.
func (p *Provisioner) ExpireReplaced(ctx context.Context) (expired int, err error) {
	var errs []error
	for _, group := range p.o.DB.Groups() {
		for after := time.Unix(0, 0); ; {
			var operation uuid.UUID
			var schema string
			const next = `select operation, schema, expires_at from public.replaced where expires_at <= pg_catalog.now() and expires_at > $1
order by expires_at limit 1 for update skip locked`
			err := p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
				if err := tx.QueryRow(ctx, next, after).Scan(&operation, &schema, &after); err != nil {
					return err
				}
				if err := tx.Script(ctx, "drop schema if exists "+postgres.Quote(schema)+" cascade"); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `delete from public.replaced where operation = $1`, operation)
				return err
			})
			if errors.Is(err, pgx.ErrNoRows) {
				break
			}
			if err == nil {
				expired++
				continue
			}
			errs = append(errs, err)
			if operation == uuid.Nil || ctx.Err() != nil {
				break
			}
		}
	}
	return expired, errors.Join(errs...)
}
