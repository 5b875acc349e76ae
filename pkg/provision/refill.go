package provision

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// RefillPlan says what becomes of the tenants of a registry that was restored from a full backup.
type RefillPlan struct {
	Backup string // its id
	// Groups are those whose tenants the backup holds. Tenants of others stand where the registry says, and are left alone.
	Groups []string
	// Held are the ids for the outside of those whose archives it has.
	Held map[string]bool
	// Erased are the ids of those that were erased since, and when: they do not come back.
	Erased map[string]time.Time
	// Named are the ids of erased tenants that come back all the same.
	Named []string
	Actor string
}

// refilling is what the operation's row holds of a tenant that waits for its rows: as what it is to come back.
type refilling struct {
	Backup      string     `json:"backup"`
	State       string     `json:"state"`
	StateBefore *string    `json:"state_before,omitempty"`
	DroppedAt   *time.Time `json:"dropped_at,omitempty"`
	PurgeAfter  *time.Time `json:"purge_after,omitempty"`
}

// Refillable is a tenant of a restored registry whose rows are not there yet.
type Refillable struct {
	tenant.Tenant
	Backup string // that has them
	op     registry.Operation
	as     refilling
}

// BeginRefill prepares the rows of a registry that were loaded in the same transaction: each tenant of which the backup has an
// archive is being created until Refill has put its rows back, and nobody serves or changes it before. Operations that were
// open then are over. left are the tenants of which there is no archive: their names are free.
func (p *Provisioner) BeginRefill(ctx context.Context, tx *postgres.OwnerTx, plan RefillPlan) (left []tenant.Tenant, err error) {
	why, err := json.Marshal(map[string]string{"code": "restored", "message": "the database was restored from the full backup " + plan.Backup + ", in which this had not ended"})
	if err != nil {
		return nil, err
	}
	all, err := registry.List(ctx, tx, registry.Filter{})
	if err != nil {
		return nil, err
	}
	erased := map[int32]time.Time{}
	for _, t := range all {
		at, is := plan.Erased[t.ID]
		if !is { // or was being erased at that moment, which has not ended otherwise since
			if is, err = Erased(ctx, tx, t.ID); err != nil {
				return nil, err
			}
		}
		if is && !slices.Contains(plan.Named, t.ID) {
			erased[t.Number] = at
		}
	}
	const over = `update public.operations set state = 'failed', error = $1, request = '{}', finished_at = now() where state not in ('done', 'failed', 'aborted')`
	if _, err := tx.Exec(ctx, over, why); err != nil {
		return nil, err
	}
	var waiting []int32
	for _, t := range all {
		at, is := erased[t.Number]
		switch {
		case is:
			err = p.stayErased(ctx, tx, t, at, plan.Actor)
		case plan.Held[t.ID]:
			waiting = append(waiting, t.Number)
		case slices.Contains(plan.Groups, t.Group):
			if t.State != tenant.Creating { // which had not got as far as its schema
				left = append(left, t)
			}
			_, err = tx.Exec(ctx, `delete from public.tenants where number = $1`, t.Number)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := awaitRows(ctx, tx, waiting, plan); err != nil {
		return nil, err
	}
	details := map[string]any{"backup": plan.Backup, "tenants": len(waiting), "without_archive": len(left), "erased": len(erased)}
	return left, registry.Audit(ctx, tx, registry.AuditEntry{Actor: plan.Actor, Action: KindRefill, Details: details})
}

// awaitRows enters an operation for each tenant whose rows are still to come.
func awaitRows(ctx context.Context, tx *postgres.OwnerTx, waiting []int32, plan RefillPlan) error {
	rows, err := tx.Query(ctx, `select number, slug, state, state_before, dropped_at, purge_after from public.tenants where number = any($1) order by number`, waiting)
	if err != nil {
		return err
	}
	var ids []uuid.UUID
	var numbers []int32
	var slugs, requests []string
	var number int32
	var slug string
	as := refilling{Backup: plan.Backup}
	_, err = pgx.ForEachRow(rows, []any{&number, &slug, &as.State, &as.StateBefore, &as.DroppedAt, &as.PurgeAfter}, func() error {
		if as.State == string(tenant.Creating) { // all of it was there but the registry's last word
			as.State = string(tenant.Active)
		}
		body, err := json.Marshal(request{Slug: slug, Refill: &as})
		if err != nil {
			return err
		}
		id, err := uuid.NewV7()
		ids, numbers, slugs, requests = append(ids, id), append(numbers, number), append(slugs, slug), append(requests, string(body))
		return err
	})
	if err != nil {
		return err
	}
	const enter = `insert into public.operations (id, kind, tenant, slug, state, step, request, actor, started_at, heartbeat)
select u.id, $5, u.number, u.slug, 'running', 'begun', u.request::jsonb, $6, now(), now() from unnest($1::uuid[], $2::int4[], $3::text[], $4::text[]) as u (id, number, slug, request)`
	if _, err := tx.Exec(ctx, enter, ids, numbers, slugs, requests, KindRefill, plan.Actor); err != nil {
		return err
	}
	const shut = `update public.tenants set state = 'creating', state_before = null, dropped_at = null, purge_after = null where number = any($1)`
	_, err = tx.Exec(ctx, shut, numbers)
	return err
}

// stayErased makes the row of a tenant that was erased since the backup what the erasure had made of it.
func (p *Provisioner) stayErased(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, at time.Time, actor string) error {
	const forget = `with d as (delete from public.domains where tenant = $1), p as (delete from public.proofs where tenant = $1),
	o as (update public.operations set request = '{}' where tenant = $1)
update public.tenants set state = 'purged', name = '', settings = '{}', state_before = null, dropped_at = null, purge_after = null, epoch = epoch + 1, updated_at = now() where number = $1`
	if _, err := tx.Exec(ctx, forget, t.Number); err != nil {
		return err
	}
	if _, found, err := p.ErasureBy(ctx, tx, t.ID); err != nil || found {
		return err
	}
	return p.record(ctx, tx, Erasure{Tenant: t.ID, Number: t.Number, Slug: t.Slug.String(), At: at, Actor: actor})
}

// Refillables are the tenants whose rows are not there yet, in the order of their numbers. ever: some were restored from this backup
// here, or are to be.
func (p *Provisioner) Refillables(ctx context.Context, backup string) (all []Refillable, ever bool, err error) {
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		all = nil
		const begun = `select exists (select from public.operations where kind = $1 and request -> 'refill' ->> 'backup' = $2)`
		if err := tx.QueryRow(ctx, begun, KindRefill, backup).Scan(&ever); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `select id, tenant, request from public.operations where kind = $1 and state = 'running' order by tenant`, KindRefill)
		if err != nil {
			return err
		}
		var id uuid.UUID
		var number int32
		var body json.RawMessage
		var numbers []int32
		_, err = pgx.ForEachRow(rows, []any{&id, &number, &body}, func() error {
			r, err := parseRequest(body)
			if err == nil && r.Refill == nil {
				err = fmt.Errorf("the operation %s does not say from which backup its tenant is restored", id)
			}
			if err != nil {
				return err
			}
			numbers = append(numbers, number)
			all = append(all, Refillable{Backup: r.Refill.Backup, as: *r.Refill, op: registry.Operation{ID: id, Kind: KindRefill, Begun: true}})
			return nil
		})
		if err != nil {
			return err
		}
		ts, err := registry.ByNumbers(ctx, tx, numbers)
		if err != nil {
			return err
		}
		for _, t := range ts {
			all[slices.Index(numbers, t.Number)].Tenant = t
		}
		return nil
	})
	return all, ever, err
}

// Refill puts the rows of a tenant of a restored registry back, in one transaction of its group's database, under its number and
// with its own role, and lets it be served. It does nothing where another process has done so. fill is called once at most.
func (p *Provisioner) Refill(ctx context.Context, r Refillable, fill Filling, actor string) (tenant.Tenant, error) {
	t := r.Tenant
	inst, err := p.o.DB.Installation(ctx, t.Group)
	if err != nil {
		return t, err
	}
	c := change{kind: KindRefill, tenant: t}
	over := false
	finish := func(tx *postgres.OwnerTx) error {
		var err error
		if t, err = p.refilled(ctx, tx, r, actor); isOver(err) {
			over, err = true, nil
		}
		return err
	}
	err = p.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, t.Number, p.o.GateWait); err != nil {
			return err
		}
		if err := p.stillRunning(ctx, tx, c, &r.op); isOver(err) {
			over = true
			return nil
		} else if err != nil {
			return err
		}
		made, err := placed(t.Number)(ctx, tx)
		if err == nil && !made {
			err = p.rebuild(ctx, tx, inst, r, fill)
		}
		if err == nil {
			err = failpoint.Hit("refill.built")
		}
		if err != nil || !p.o.DB.SameDatabase(t.Group) {
			return err
		}
		return finish(tx)
	})
	if err == nil && !over && !p.o.DB.SameDatabase(t.Group) {
		err = p.o.DB.AsOwner(ctx, postgres.MainGroup, finish)
	}
	if err != nil || over {
		return t, p.named(err, c)
	}
	if p.o.Uncache != nil { // what was cached under its generations of after the backup would be taken for its own
		if _, err := p.o.Uncache(ctx, t); err != nil {
			p.o.Logger.WarnContext(ctx, "Redis may have values of a restored tenant from after its backup, until their time ends", "tenant", t.Slug, "error", err)
		}
	}
	var hosts []tenant.Host
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		domains, err := registry.Domains(ctx, tx, t)
		for _, d := range domains {
			hosts = append(hosts, d.Host)
		}
		return err
	})
	if err != nil {
		return t, err
	}
	p.o.Changed(context.WithoutCancel(ctx), t, hosts)
	return t, failpoint.Hit("refill.after")
}

// rebuild makes the tenant's role, schema and placement, and its ledger as it was as far as the files are the same.
func (p *Provisioner) rebuild(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, r Refillable, fill Filling) error {
	t := r.Tenant
	var state string
	const ask = `select coalesce((select state from public.placements where number = $1 for update), '')`
	if err := tx.QueryRow(ctx, ask, t.Number).Scan(&state); err != nil {
		return err
	}
	var ledger json.RawMessage
	const read = `select coalesce(pg_catalog.jsonb_agg(l), '[]') from public.ledger l where l.set = 'tenant' and l.tenant = $1`
	if err := tx.QueryRow(ctx, read, t.Number).Scan(&ledger); err != nil {
		return err
	}
	if state == spare { // which bears the number of a tenant that nobody knew of here when it was made
		ledger = json.RawMessage(`[]`)
		if err := p.removeSpare(ctx, tx, inst, t.Number); err != nil {
			return err
		}
	}
	if _, err := tx.Exec(ctx, `delete from public.ledger where set = 'tenant' and tenant = $1`, t.Number); err != nil {
		return err
	}
	at := plot{number: t.Number, schema: t.Schema, state: string(tenant.Active), fill: &fill}
	err := p.build(ctx, tx, inst, at, func() error {
		return fill.Rows(ctx, tx, structure.Schema{Name: t.Schema.String(), Role: p.role(inst, t.Number)})
	})
	if err != nil {
		return err
	}
	const when = `update public.ledger l set applied_at = o.applied_at, duration_ms = o.duration_ms, applied_by = o.applied_by
from pg_catalog.jsonb_populate_recordset(null::public.ledger, $2) o where l.set = 'tenant' and l.tenant = $1 and o.version = l.version and o.checksum = l.checksum`
	if _, err := tx.Exec(ctx, when, t.Number, ledger); err != nil {
		return err
	}
	const place = `update public.placements set state = $2, epoch = $3 where number = $1`
	if _, err := tx.Exec(ctx, place, t.Number, r.as.State, t.Epoch+1); err != nil {
		return err
	}
	if r.as.State == string(tenant.Dropped) {
		return moveSchema(ctx, tx, t, droppedSchema(t.Number))
	}
	return nil
}

// refilled lets the registry serve the tenant as it was. A dropped one has its grace again: whoever has just restored it must
// not lose it to a server that thinks it overdue.
func (p *Provisioner) refilled(ctx context.Context, tx *postgres.OwnerTx, r Refillable, actor string) (t tenant.Tenant, err error) {
	if err := registry.Finish(ctx, tx, r.op.ID, map[string]any{"tenant": r.Slug.String(), "state": r.as.State}); err != nil {
		return t, err // another process was faster
	}
	const open = `update public.tenants set state = $2, state_before = $3, dropped_at = $4, epoch = epoch + 1, cache_generation = cache_generation + 1, updated_at = now(),
	purge_after = case when $5::timestamptz is not null then greatest($5::timestamptz, now() + $6::interval) end where number = $1 and state = 'creating'`
	if _, err := tx.Exec(ctx, open, r.Number, r.as.State, r.as.StateBefore, r.as.DroppedAt, r.as.PurgeAfter, p.o.DropGrace); err != nil {
		return t, err
	}
	details := map[string]any{"backup": r.Backup}
	// Only one that was named comes back though it was erased: from now on it is not.
	tag, err := tx.Exec(ctx, `delete from public.erasures where tenant = $1::text::uuid`, r.ID)
	if err != nil {
		return t, err
	}
	if tag.RowsAffected() > 0 {
		details["was_erased"] = true
	}
	if t, err = registry.ByNumber(ctx, tx, r.Number); err != nil {
		return t, err
	}
	if err := registry.Audit(ctx, tx, registry.AuditEntry{Actor: actor, Action: KindRefill, Tenant: t, Details: details}); err != nil {
		return t, err
	}
	return t, failpoint.Hit("refill.finish")
}

// refillWaits is what becomes of other operations on a tenant whose rows are still to come.
func refillWaits(op registry.Operation) error {
	r, err := parseRequest(op.Request)
	if err != nil {
		return err
	}
	backup := ""
	if r.Refill != nil {
		backup = r.Refill.Backup
	}
	return fault.New(fault.Locked, "the tenant has not been restored yet").WithCode("operation_running").WithTenant(op.Slug).
		WithHint("oneo restore --database %s", backup)
}

// RoomToRefill makes room in a group's database for tenants of these numbers: it destroys spares that bear one of them, which were made before
// anybody knew. Conflict: tenants stand there already, which the registry, as it is empty, does not know.
func (p *Provisioner) RoomToRefill(ctx context.Context, tx *postgres.OwnerTx, group string, numbers []int32) error {
	inst, err := p.o.DB.Installation(ctx, group)
	if err != nil {
		return err
	}
	var n int
	if err := tx.QueryRow(ctx, `select count(*) from public.placements where state <> 'spare'`).Scan(&n); err != nil {
		return err
	}
	if n > 0 {
		return fault.New(fault.Conflict, "%d tenant(s) stand in the database of group %s already", n, group).WithCode("not_empty").
			WithHint("restore into an empty database: make a new one, and run `oneo init` on it")
	}
	rows, err := tx.Query(ctx, `select number from public.placements where state = 'spare' and number = any($1) order by number for update`, numbers)
	if err != nil {
		return err
	}
	spares, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		return err
	}
	for _, number := range spares {
		if err := p.removeSpare(ctx, tx, inst, number); err != nil {
			return err
		}
	}
	return nil
}
