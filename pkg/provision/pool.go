package provision

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// The warm pool: schemas that stand ready before anybody has asked for a tenant. A spare is a placement in the state
// spare, with the number, the role and the tables that its tenant will have, and without a row in the registry. A
// creation takes its number, renames its schema and makes the placement active. What stands in the way of that is never
// mended: a spare that a tenant may not have is destroyed and another one made, under another number.

const spare = "spare"

// fit asks whether a tenant may have the spare of the placement p: it was made by exactly the files of this process,
// all of them, nothing of them is still at work, its schema stands, and its role is the one that a creation would give
// it. Its parameters are fitArgs.
const fit = `(p.version = pg_catalog.cardinality($1::int4[])
and p.role = $3 || case when $4 then p.number::text else '' end
and exists (select from pg_catalog.pg_namespace n where n.oid = p.namespace and n.nspname = p.schema)
and not exists (select from public.progress g where g.tenant = p.number)
and p.version = (select count(*) from public.ledger l join unnest($1::int4[], $2::bytea[]) as f (version, checksum) using (version, checksum)
	where l.set = 'tenant' and l.tenant = p.number))`

func (p *Provisioner) fitArgs(inst postgres.Installation, more ...any) []any {
	files := p.o.Migrate.Files(migrate.TenantSet)
	versions, sums := make([]int32, len(files)), make([][]byte, len(files))
	for i, f := range files {
		versions[i], sums[i] = int32(f.Version), f.Checksum[:]
	}
	byRole, role := p.o.DB.Isolation() == postgres.ByRole, inst.AppRole
	if byRole {
		role = strings.TrimSuffix(inst.TenantRole(0), "0")
	}
	return append([]any{versions, sums, role, byRole}, more...)
}

// spareFor takes a spare for a creation, until the transaction ends, and returns its number; 0: the pool is empty, or
// there is none. Others skip it meanwhile. not are spares that others have reserved.
func (p *Provisioner) spareFor(ctx context.Context, tx *postgres.OwnerTx, group string, not []int32) (number int32, err error) {
	if p.o.PoolSize == 0 {
		return 0, nil
	}
	inst, err := p.o.DB.Installation(ctx, group)
	if err != nil {
		return 0, err
	}
	const take = `select p.number from public.placements p where p.state = 'spare' and p.number <> all ($5::int4[]) and ` + fit + `
order by p.number limit 1 for update of p skip locked`
	if not == nil {
		not = []int32{}
	}
	err = tx.QueryRow(ctx, take, p.fitArgs(inst, not)...).Scan(&number)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	return number, err
}

// spareApart is spareFor in another database than the registry's, where it only proposes: the registry's row, whose
// number nobody else can have, is what reserves the spare. A database that does not answer proposes none: the creation
// will say why.
func (p *Provisioner) spareApart(ctx context.Context, group string, not []int32) (number int32) {
	if p.o.PoolSize == 0 {
		return 0
	}
	err := p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) (err error) {
		number, err = p.spareFor(ctx, tx, group, not)
		return err
	})
	if err != nil {
		p.o.Logger.WarnContext(ctx, "the pool of spare schemas cannot be read: the tenant is made in the ordinary way", "group", group, "error", err)
		return 0
	}
	return number
}

// claimSpare makes the spare of the number the tenant's schema. The caller has its row and its operation lock. False: a
// tenant may not have it, and nothing was done.
func (p *Provisioner) claimSpare(ctx context.Context, tx *postgres.OwnerTx, r CreateRequest, inst postgres.Installation, number int32) (bool, error) {
	at := tenant.SpareSchema(number)
	var may bool
	const ask = `select p.schema = $6 and ` + fit + ` from public.placements p where p.number = $5 and p.state = 'spare'`
	if err := tx.QueryRow(ctx, ask, p.fitArgs(inst, number, at.String())...).Scan(&may); err != nil || !may {
		return false, err
	}
	if err := tx.Script(ctx, "alter schema "+postgres.Quote(at.String())+" rename to "+postgres.Quote(r.Schema.String())); err != nil {
		return false, err
	}
	if err := repath(ctx, tx, r.Schema.String(), at.String(), r.Schema.String()); err != nil {
		return false, err
	}
	if r.AdminEmail != "" {
		if err := firstUser(ctx, tx, r); err != nil {
			return false, err
		}
		if err := tx.Script(ctx, emptyPath); err != nil {
			return false, err
		}
	}
	// Nobody has ever been bound to it, so that there is no gate to take.
	const place = `update public.placements set schema = $2, state = $3, created_at = now(), updated_at = now() where number = $1`
	if _, err := tx.Exec(ctx, place, number, r.Schema.String(), string(tenant.Active)); err != nil {
		return false, err
	}
	p.o.Logger.DebugContext(ctx, "the tenant takes a spare schema", "tenant", r.Slug, "number", number)
	return true, nil
}

// removeSpare destroys a spare. The caller has its row and its operation lock.
func (p *Provisioner) removeSpare(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, number int32) error {
	details, at := map[string]any{}, tenant.SpareSchema(number).String()
	if err := destroy(ctx, tx, inst, number, at, details); err != nil {
		return err
	}
	if details[codeSchemaMissing] == true {
		p.o.Logger.WarnContext(ctx, "a spare's schema is gone or was made again behind oneo's back: no schema was destroyed", "schema", at)
	}
	return failpoint.Hit("spare.removed")
}

// buildSpare makes a spare, by the same steps as a tenant's schema.
func (p *Provisioner) buildSpare(ctx context.Context, tx *postgres.OwnerTx, group string, inst postgres.Installation) error {
	var number int32
	next := func(tx *postgres.OwnerTx) (err error) {
		number, err = registry.NextNumber(ctx, tx)
		return err
	}
	var err error
	if p.o.DB.SameDatabase(group) {
		err = next(tx)
	} else {
		err = p.o.DB.AsOwner(ctx, postgres.MainGroup, next)
	}
	if err != nil {
		return err
	}
	if err := tx.LockOperation(ctx, number, p.o.GateWait); err != nil {
		return err
	}
	if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
		return err
	}
	schema := tenant.SpareSchema(number)
	err = p.build(ctx, tx, inst, plot{number: number, schema: schema, state: spare}, func() error {
		what, err := holdsName(ctx, tx, schema.String(), schema.String(), true)
		if err == nil && what != "" {
			err = fault.New(fault.Conflict, "no schema can be made ahead from these migrations: %s holds the schema's name as text", what).
				WithCode(codeNotSpare).WithHint("write it without the name, or set provisioning.pool_size to 0")
		}
		return err
	})
	if err != nil {
		return err
	}
	var may bool
	const ask = `select ` + fit + ` from public.placements p where p.number = $5`
	if err := tx.QueryRow(ctx, ask, p.fitArgs(inst, number)...).Scan(&may); err != nil {
		return err
	}
	if !may { // it would be destroyed and made again for ever
		return fault.New(fault.Conflict, "a schema made ahead would not be what a tenant gets").WithCode(codeNotSpare).
			WithHint("set provisioning.pool_size to 0: these migrations leave something to be done behind a creation")
	}
	return failpoint.Hit("spare.made")
}

const codeNotSpare = "no_spares"

// spareState is one spare as the keeper sees it.
type spareState struct {
	number  int32
	version int
	fit     bool
	edited  bool // made by a file that has changed since
}

// spares reads a group's spares in the order of their numbers.
func (p *Provisioner) spares(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation) ([]spareState, error) {
	const list = `select p.number, p.version, ` + fit + `, exists (select from public.ledger l
	join unnest($1::int4[], $2::bytea[]) as f (version, checksum) on f.version = l.version and f.checksum <> l.checksum
	where l.set = 'tenant' and l.tenant = p.number)
from public.placements p where p.state = 'spare' order by p.number`
	rows, err := tx.Query(ctx, list, p.fitArgs(inst)...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (s spareState, err error) {
		return s, row.Scan(&s.number, &s.version, &s.fit, &s.edited)
	})
}

// unfit reports whether no process with these files, nor a newer one, gives the spare to a tenant.
func (p *Provisioner) unfit(s spareState) bool {
	return !s.fit && s.version <= p.o.Migrate.Head(migrate.TenantSet)
}

const codePoolBusy = "pool_busy"

// keep does one thing for a group's pool in one transaction: it destroys a spare that no tenant may have or that is one
// too many, or makes one that is missing; false: there was nothing to do. Of several processes one at a time does; to
// the others the fault is Locked. A spare of newer files than this process's counts, and is not judged.
func (p *Provisioner) keep(ctx context.Context, group string, size int) (did bool, err error) {
	inst, err := p.o.DB.Installation(ctx, group)
	if err != nil {
		return false, err
	}
	err = p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		did = false
		got, err := tx.TryPoolLock(ctx)
		if err != nil {
			return err
		}
		if !got {
			return fault.New(fault.Locked, "another process is at work on the pool of spare schemas").WithCode(codePoolBusy).WithRetry(time.Second)
		}
		all, err := p.spares(ctx, tx, inst)
		if err != nil {
			return err
		}
		for i, s := range all {
			if p.unfit(s) || i < len(all)-size {
				if did, err = p.dismiss(ctx, tx, inst, s); did || err != nil {
					return err
				}
			}
		}
		if len(all) >= size {
			return nil
		}
		did = true
		return p.buildSpare(ctx, tx, group, inst)
	})
	if err != nil {
		return false, err
	}
	return did, nil
}

// dismiss destroys a spare that nobody is about to take; false: somebody is, or it is not this process's to judge.
func (p *Provisioner) dismiss(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, s spareState) (bool, error) {
	if s.edited {
		// Whose files are the true ones? Those of the tenants.
		const ours = `select not exists (select from unnest($1::int4[], $2::bytea[]) as f (version, checksum)
	join public.ledger l on l.version = f.version and (l.checksum < f.checksum or l.checksum > f.checksum)
	where l.set = 'tenant' and not exists (select from public.placements p where p.number = l.tenant and p.state = 'spare'))`
		var are bool
		if err := tx.QueryRow(ctx, ours, p.fitArgs(inst)[:2]...).Scan(&are); err != nil || !are {
			return false, err
		}
	}
	const hold = `select from public.placements where number = $1 and state = 'spare' for update skip locked`
	tag, err := tx.Exec(ctx, hold, s.number)
	if err != nil || tag.RowsAffected() == 0 {
		return false, err
	}
	if got, err := tx.TryOperationLock(ctx, s.number); err != nil || !got {
		return false, err
	}
	return true, p.removeSpare(ctx, tx, inst, s.number)
}

// KeepSpares replaces every spare that no tenant may have any more, as after a run that has brought the tenants to a
// newer version: it is destroyed and another one made. It neither enlarges nor reduces the pools: that is Work's.
func (p *Provisioner) KeepSpares(ctx context.Context) error {
	counts, err := p.Spares(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, c := range counts {
		for did := true; did && err == nil; {
			err = p.patiently(ctx, func() (err error) {
				did, err = p.keep(ctx, c.Group, c.Ready+c.Unfit)
				return err
			})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("spare schemas of group %s: %w", c.Group, err))
			err = nil
		}
	}
	return errors.Join(errs...)
}

// SpareCount is how many spares a group has.
type SpareCount struct {
	Group string
	Ready int // of this process's version, or of a newer one
	Unfit int // behind, or broken: no tenant gets one
}

// Spares counts the spares of each group.
func (p *Provisioner) Spares(ctx context.Context) ([]SpareCount, error) {
	var counts []SpareCount
	for _, group := range p.o.DB.Groups() {
		inst, err := p.o.DB.Installation(ctx, group)
		if err != nil {
			return nil, err
		}
		c := SpareCount{Group: group}
		err = p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			all, err := p.spares(ctx, tx, inst)
			for _, s := range all {
				if p.unfit(s) {
					c.Unfit++
				} else {
					c.Ready++
				}
			}
			return err
		})
		if err != nil {
			return nil, err
		}
		counts = append(counts, c)
	}
	return counts, nil
}

const (
	// poolEvery is how often Work looks at pools from which this process has taken nothing.
	poolEvery = 5 * time.Second
	// poolPause is how long Work leaves a pool alone that it could not keep.
	poolPause = time.Minute
)

// keeper is what Work remembers of the pools.
type keeper struct {
	next   time.Time            // when all of them were full: the next look
	paused map[string]time.Time // by group, until when
}

// keepPools does one thing for one pool, and reports whether there may be more to do.
func (p *Provisioner) keepPools(ctx context.Context, k *keeper) bool {
	if !p.taken.Swap(false) && time.Now().Before(k.next) {
		return false
	}
	closed := map[string]bool{}
	err := p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select name from public.groups where not accepting`)
		if err != nil {
			return err
		}
		var name string
		_, err = pgx.ForEachRow(rows, []any{&name}, func() error { closed[name] = true; return nil })
		return err
	})
	if err != nil {
		k.next = time.Now().Add(poolPause)
		if ctx.Err() == nil {
			p.o.Logger.ErrorContext(ctx, "spare schemas", "error", err)
		}
		return false
	}
	for _, group := range p.o.DB.Groups() {
		if time.Now().Before(k.paused[group]) {
			continue
		}
		size := p.o.PoolSize
		if closed[group] {
			size = 0
		}
		did, err := p.keep(ctx, group, size)
		switch {
		case did:
			k.next = time.Time{}
			return true
		case err == nil || ctx.Err() != nil:
		case fault.Is(err, fault.Locked): // another process is at it
		default:
			k.paused[group] = time.Now().Add(poolPause)
			p.o.Logger.ErrorContext(ctx, "spare schemas", "group", group, "error", err)
		}
	}
	k.next = time.Now().Add(poolEvery)
	return false
}
