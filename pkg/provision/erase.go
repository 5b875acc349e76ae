package provision

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Archives is where archives of tenants lie.
type Archives interface {
	// EraseArchives destroys every archive of the tenant with this id for the outside, and says how many there were. It
	// is safe to repeat.
	EraseArchives(ctx context.Context, tenantID string) (n int, err error)
	// MarkErased notes beside the archives that the tenant is erased: a full backup from before brings it back only where
	// it is named. It is safe to repeat.
	MarkErased(ctx context.Context, tenantID, slug string) error
}

// EraseRequest says how a tenant is erased.
type EraseRequest struct {
	// KeepArchives leaves the archives where they are.
	KeepArchives bool
	Actor        string
}

// Why an erasure has left a tenant's archives where they are.
const (
	ArchivesKept    = "kept"     // as it was asked for
	ArchivesUnknown = "no_store" // no store is configured
	ArchivesGoing   = "going"    // EraseLeft has begun, and not ended
)

// Destroyed is what an erasure has destroyed. What a process that died had destroyed in no database, or in another group's, may
// be missing in the numbers.
type Destroyed struct {
	Schema string `json:"schema"`
	// SchemaMissing: it was gone, or another one made behind oneo's back stood there, which was left alone.
	SchemaMissing bool `json:"schema_missing,omitempty"`
	Tables        int  `json:"tables"`
	Domains       int  `json:"domains"`
	// Kept are the schemas that runs, restores and moves had kept.
	Kept int `json:"kept_schemas"`
	// CacheKeys are those in Redis. CacheLeft: Redis could not be asked; they go within a day.
	CacheKeys int  `json:"cache_keys"`
	CacheLeft bool `json:"cache_left,omitempty"`
	Archives  int  `json:"archives"`
	// ArchivesLeft says why none were; empty: there are none any more.
	ArchivesLeft string `json:"archives_left,omitempty"`
	// ArchivesErasedAt is when those went that the erasure had left; nil: it has left none, or they are left still.
	ArchivesErasedAt *time.Time `json:"archives_erased_at,omitempty"`
}

// Erasure is the record of a tenant that was erased.
type Erasure struct {
	Tenant    string // its id for the outside
	Number    int32
	Slug      string
	At        time.Time
	Actor     string
	Destroyed Destroyed
	// Genuine: the record was written with this installation's secret, and is as it was written.
	Genuine bool
	// Exists: there is a tenant with this id all the same, or one is being made.
	Exists bool
}

// erasing is what the operation's row holds of an erasure.
type erasing struct {
	KeepArchives bool `json:"keep_archives,omitempty"`
	// Store: whoever began it knew of a store of archives. A process that knows of none does not end it.
	Store     bool      `json:"store,omitempty"`
	Destroyed Destroyed `json:"destroyed"`
}

// Erase destroys a tenant for good, wherever it is: schema, role, what runs, restores and moves have kept, cached values, archives,
// domains, and what the registry knows of it but its name, in the record of it. The tenant is not served from the first
// of it on. What was begun is only gone on with: after a failure or a death of the process the same command does, or a
// server; KeepArchives holds for one that was begun as well. Faults: NotFound, Conflict for a tenant that is being created, and
// what the archives' store fails by.
func (p *Provisioner) Erase(ctx context.Context, slug tenant.Slug, r EraseRequest) (e Erasure, err error) {
	if p.o.Secret == "" {
		return e, fault.New(fault.Invalid, "an erasure is signed with server.secret, which is not set").WithCode("setting").
			WithHint("set ONEO_SERVER_SECRET as the servers have it")
	}
	if r.KeepArchives { // a store that is gone for good must not keep an erasure open for good
		err := p.inMain(ctx, func(tx *postgres.OwnerTx) error {
			const leave = `update public.operations set request = pg_catalog.jsonb_set(request, '{erase,keep_archives}', 'true')
where kind = $1 and state = 'running' and tenant = (select number from public.tenants where slug = $2 and state <> 'purged')`
			_, err := tx.Exec(ctx, leave, KindErase, slug.String())
			return err
		})
		if err != nil {
			return e, err
		}
	}
	t, finished, err := p.findAndFinish(ctx, slug)
	if fault.Is(err, fault.NotFound) && finished == KindErase {
		return p.lastErasure(ctx, slug)
	}
	if err != nil {
		return e, err
	}
	if t.State == tenant.Creating {
		return e, wrongState(t, "erased", "")
	}
	x := erasing{KeepArchives: r.KeepArchives, Store: p.o.Archives != nil}
	if x.Destroyed, err = p.inventory(ctx, t); err != nil {
		return e, err
	}
	c, err := p.erasure(ctx, t, x, r.Actor)
	if err != nil {
		return e, err
	}
	if _, err := p.run(ctx, c, nil); err != nil {
		return e, err
	}
	e, _, err = p.Erasure(ctx, t.ID)
	return e, err
}

// inventory counts what there is to destroy in the databases, before any of it is.
func (p *Provisioner) inventory(ctx context.Context, t tenant.Tenant) (d Destroyed, err error) {
	d.Schema = ownSchema(t)
	err = p.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
		at, there, err := standing(ctx, tx, t.Number)
		if err != nil {
			return err
		}
		d.SchemaMissing = !there || at != d.Schema
		const count = `select (select count(*) from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = $2 and c.relkind in ('r', 'p')),
	(select count(*) from public.undo_points where tenant = $1) + (select count(*) from public.replaced where tenant = $1) + (select count(*) from public.moved where tenant = $1)`
		return tx.QueryRow(ctx, count, t.Number, d.Schema).Scan(&d.Tables, &d.Kept)
	})
	if err != nil {
		return d, err
	}
	if d.SchemaMissing {
		d.Tables = 0
	}
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select count(*) from public.domains where tenant = $1`, t.Number).Scan(&d.Domains)
	})
	return d, err
}

// ownSchema is the name under which a tenant's schema stands.
func ownSchema(t tenant.Tenant) string {
	if t.State == tenant.Dropped {
		return droppedSchema(t.Number)
	}
	return t.Schema.String()
}

func (p *Provisioner) erasure(ctx context.Context, t tenant.Tenant, x erasing, actor string) (change, error) {
	inst, err := p.o.DB.Installation(ctx, t.Group)
	if err != nil {
		return change{}, err
	}
	details := map[string]any{"destroyed": &x.Destroyed}
	asked := request{Slug: t.Slug.String(), Erase: &x}
	var operation uuid.UUID
	return change{
		kind: KindErase, point: "erase", tenant: t, actor: actor, request: asked, details: details, apart: true,
		known: func(id uuid.UUID) { operation = id },
		schema: func(ctx context.Context, tx *postgres.OwnerTx) error {
			if err := tx.LockGate(ctx, t.Number); err != nil {
				return err
			}
			err := destroy(ctx, tx, inst, t.Number, x.Destroyed.Schema, details)
			if x.Destroyed.SchemaMissing = details[codeSchemaMissing] == true; x.Destroyed.SchemaMissing {
				p.o.Logger.WarnContext(ctx, "the tenant's schema is gone or was made again behind oneo's back: no schema was destroyed", "tenant", t.Slug)
			}
			return err
		},
		made: func(ctx context.Context, tx *postgres.OwnerTx) (bool, error) {
			there, err := placed(t.Number)(ctx, tx)
			return !there, err
		},
		outside: func(ctx context.Context) error {
			err := p.eraseOutside(ctx, t, &x)
			// What one attempt has destroyed the next one does not find.
			nerr := p.inMain(context.WithoutCancel(ctx), func(tx *postgres.OwnerTx) error {
				const note = `update public.operations set request = pg_catalog.jsonb_set(request, '{erase,destroyed}', $2) where id = $1 and state = 'running'`
				_, err := tx.Exec(ctx, note, operation, x.Destroyed)
				return err
			})
			if err := errors.Join(err, nerr); err != nil {
				return err
			}
			return failpoint.Hit("erase.outside")
		},
		finish: func(ctx context.Context, q postgres.Querier) error {
			if err := p.purged(ctx, q, t, tenant.Active, tenant.Suspended, tenant.Dropped); err != nil {
				return err
			}
			// What was asked about the tenant names people: a first user.
			const forget = `with o as (update public.operations set request = '{}' where (tenant = $1 or tenant is null and slug = $2) and state in ('done', 'failed')),
	p as (delete from public.proofs where tenant = $1),
	u as (delete from public.usage where tenant = $1)
update public.tenants set name = '' where number = $1`
			if _, err := q.Exec(ctx, forget, t.Number, t.Slug.String()); err != nil {
				return err
			}
			return p.record(ctx, q, Erasure{Tenant: t.ID, Number: t.Number, Slug: t.Slug.String(), Actor: actor, Destroyed: x.Destroyed})
		},
	}, nil
}

// eraseOutside destroys what lies in other groups' databases and in none, once nobody can add to it.
func (p *Provisioner) eraseOutside(ctx context.Context, t tenant.Tenant, x *erasing) error {
	copies, err := p.DropMoved(ctx, t.Number)
	x.Destroyed.Kept += copies
	if err != nil {
		return err
	}
	for _, group := range p.o.DB.Groups() { // a move that was undone may not have been able to take away what had arrived
		if group == t.Group {
			continue
		}
		if err := p.discard(ctx, group, t.Number); err != nil {
			return err
		}
	}
	if p.o.Uncache != nil {
		n, err := p.o.Uncache(ctx, t)
		if err != nil {
			p.o.Logger.WarnContext(ctx, "Redis keeps what it has of an erased tenant until its time ends", "tenant", t.Slug, "error", err)
		}
		x.Destroyed.CacheKeys, x.Destroyed.CacheLeft = x.Destroyed.CacheKeys+n, err != nil
	}
	var unmarked error
	if p.o.Archives != nil {
		unmarked = p.o.Archives.MarkErased(ctx, t.ID, t.Slug.String())
	}
	switch {
	case x.KeepArchives:
		if unmarked != nil { // the next full backup does it
			p.o.Logger.WarnContext(ctx, "the store does not know yet that a tenant is erased: a full backup from before would bring it back", "tenant", t.Slug, "error", unmarked)
		}
		x.Destroyed.ArchivesLeft = ArchivesKept
		return nil
	case p.o.Archives == nil && x.Store:
		return fault.New(fault.Invalid, "the tenant's tables are destroyed, its archives are not: no store of backups is configured here, and one was where it was begun").
			WithCode("no_backup_store").WithHint("run the same command where backup.url is set, or with --keep-archives")
	case p.o.Archives == nil:
		x.Destroyed.ArchivesLeft = ArchivesUnknown
		return nil
	}
	n, err := 0, unmarked
	if err == nil {
		n, err = p.o.Archives.EraseArchives(ctx, t.ID)
	}
	x.Destroyed.Archives += n
	if err != nil {
		f := fault.Of(err)
		return fault.Wrap(err, f.Kind, "the tenant's tables are destroyed, its archives are not: %s", f.Message).WithCode(f.StableCode()).
			WithHint("run the same command again; a server tries it too. Where the store is gone for good: --keep-archives")
	}
	return nil
}

// record writes the erasure, signed.
func (p *Provisioner) record(ctx context.Context, q postgres.Querier, e Erasure) error {
	body, err := json.Marshal(e.Destroyed)
	if err != nil {
		return err
	}
	if e.At.IsZero() {
		e.At = time.Now()
	}
	e.At = e.At.UTC().Truncate(time.Microsecond)
	const insert = `insert into public.erasures (tenant, number, slug, erased_at, actor, destroyed, mac) values ($1, $2, $3, $4, $5, $6, $7)`
	_, err = q.Exec(ctx, insert, e.Tenant, e.Number, e.Slug, e.At, e.Actor, string(body), p.sign(e, string(body)))
	return err
}

// sign is the MAC of a record.
func (p *Provisioner) sign(e Erasure, destroyed string) []byte {
	k := hmac.New(sha256.New, []byte(p.o.Secret))
	k.Write([]byte("oneo erasure 1"))
	m := hmac.New(sha256.New, k.Sum(nil))
	for _, part := range []string{e.Tenant, fmt.Sprint(e.Number), e.Slug, e.At.UTC().Format(time.RFC3339Nano), e.Actor, destroyed} {
		fmt.Fprintf(m, "%d:%s", len(part), part)
	}
	return m.Sum(nil)
}

// Erased reports whether the tenant with this id for the outside was erased, or is being erased: nothing may bring it back, or add
// to what is kept of it. Of what another transaction commits before the erasure begins the erasure knows.
func Erased(ctx context.Context, q postgres.Querier, id string) (is bool, err error) {
	const ask = `select exists (select from public.erasures where tenant::text = $1) or exists (select from public.operations o join public.tenants t on t.number = o.tenant
	where t.id::text = $1 and o.kind = $2 and o.state = 'running')`
	return is, q.QueryRow(ctx, ask, strings.ToLower(id), KindErase).Scan(&is)
}

// Erasure is the record of the erased tenant with this id for the outside; false: there is none.
func (p *Provisioner) Erasure(ctx context.Context, id string) (e Erasure, found bool, err error) {
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		e, found, err = p.ErasureBy(ctx, tx, id)
		return err
	})
	return e, found, err
}

// ErasureBy is Erasure by a transaction in the registry's database.
func (p *Provisioner) ErasureBy(ctx context.Context, q postgres.Querier, id string) (e Erasure, found bool, err error) {
	return p.readErasure(ctx, q, `tenant::text = $1`, strings.ToLower(id))
}

// lastErasure is that of the tenant which bore a name at last.
func (p *Provisioner) lastErasure(ctx context.Context, slug tenant.Slug) (e Erasure, err error) {
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		var found bool
		if e, found, err = p.readErasure(ctx, tx, `slug = $1 order by erased_at desc limit 1`, slug.String()); err == nil && !found {
			err = fault.New(fault.Internal, "the erasure of %s was finished and has no record", slug)
		}
		return err
	})
	return e, err
}

const erasures = `select tenant::text, number, slug, erased_at, actor, destroyed::text, mac,
	exists (select from public.tenants t where t.id = e.tenant and t.state <> 'purged') from public.erasures e `

func (p *Provisioner) readErasure(ctx context.Context, q postgres.Querier, where string, arg string) (e Erasure, found bool, err error) {
	e, err = p.scanErasure(q.QueryRow(ctx, erasures+`where `+where, arg))
	if errors.Is(err, pgx.ErrNoRows) {
		return e, false, nil
	}
	return e, err == nil, err
}

func (p *Provisioner) scanErasure(row pgx.Row) (e Erasure, err error) {
	var destroyed string
	var mac []byte
	if err := row.Scan(&e.Tenant, &e.Number, &e.Slug, &e.At, &e.Actor, &destroyed, &mac, &e.Exists); err != nil {
		return e, err
	}
	// One that was changed still says that there was an erasure.
	e.Genuine = p.o.Secret != "" && hmac.Equal(mac, p.sign(e, destroyed)) && json.Unmarshal([]byte(destroyed), &e.Destroyed) == nil
	return e, nil
}

// Erasures are the records of all tenants that were erased, the oldest first.
func (p *Provisioner) Erasures(ctx context.Context) (all []Erasure, err error) {
	err = p.inMain(ctx, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, erasures+`order by erased_at, tenant`)
		if err != nil {
			return err
		}
		all, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Erasure, error) { return p.scanErasure(row) })
		return err
	})
	return all, err
}

// EraseLeft destroys the archives that an erasure has left of the tenant with this id for the outside, and says in its record when they
// went, and how many now. It is gone on with by calling it again. Faults: NotFound without a record, Unverified for one that is not
// genuine, Conflict for a tenant that exists, and what the archives' store fails by.
func (p *Provisioner) EraseLeft(ctx context.Context, id, actor string) (e Erasure, n int, err error) {
	if p.o.Archives == nil {
		return e, 0, fault.New(fault.Invalid, "no store of backups is configured here").WithCode("no_backup_store")
	}
	// The record first: once they are gone, nothing else tells a process that goes on with it that they were.
	e, err = p.amend(ctx, id, func(_ *postgres.OwnerTx, e *Erasure) error {
		e.Destroyed.ArchivesLeft = ArchivesGoing
		return nil
	})
	if err != nil {
		return e, 0, err
	}
	if err := failpoint.Hit("left.begun"); err != nil {
		return e, 0, err
	}
	if err = p.o.Archives.MarkErased(ctx, e.Tenant, e.Slug); err == nil {
		n, err = p.o.Archives.EraseArchives(ctx, e.Tenant)
	}
	if err == nil {
		err = failpoint.Hit("left.erased")
	}
	noted, nerr := p.amend(context.WithoutCancel(ctx), id, func(tx *postgres.OwnerTx, e *Erasure) error {
		e.Destroyed.Archives += n
		if err != nil {
			return nil // what is left goes the next time
		}
		now := time.Now().UTC().Truncate(time.Microsecond)
		e.Destroyed.ArchivesLeft, e.Destroyed.ArchivesErasedAt = "", &now
		return p.auditLeft(ctx, tx, *e, n, actor)
	})
	if nerr == nil {
		e = noted
	}
	return e, n, errors.Join(err, nerr)
}

// amend changes the record of an erased tenant, and signs it anew.
func (p *Provisioner) amend(ctx context.Context, id string, change func(*postgres.OwnerTx, *Erasure) error) (e Erasure, err error) {
	err = p.inMain(ctx, func(tx *postgres.OwnerTx) (err error) {
		var found bool
		if e, found, err = p.readErasure(ctx, tx, `tenant::text = $1 for update`, strings.ToLower(id)); err != nil {
			return err
		}
		switch {
		case !found:
			return fault.New(fault.NotFound, "no tenant with the id %s was erased", id).WithCode("unknown_tenant")
		case !e.Genuine:
			return fault.New(fault.Unverified, "the record of the erasure of %s was not made with this server.secret, or was changed since", e.Slug).WithCode("erasure_unverified").WithTenant(e.Slug)
		case e.Exists:
			return fault.New(fault.Conflict, "the tenant %s exists, though it was erased: its archives are not touched", e.Slug).WithCode("tenant_exists").WithTenant(e.Slug)
		}
		if err := change(tx, &e); err != nil {
			return err
		}
		body, err := json.Marshal(e.Destroyed)
		if err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `update public.erasures set destroyed = $2, mac = $3 where tenant::text = $1`, e.Tenant, string(body), p.sign(e, string(body)))
		return err
	})
	return e, err
}

// auditLeft notes in the audit trail that archives went which an erasure had left.
func (p *Provisioner) auditLeft(ctx context.Context, q postgres.Querier, e Erasure, n int, actor string) error {
	t, err := registry.ByNumber(ctx, q, e.Number)
	if fault.Is(err, fault.NotFound) || err == nil && t.ID != e.Tenant { // the tombstone is in another installation
		t, err = tenant.Tenant{}, nil
	}
	if err != nil {
		return err
	}
	return registry.Audit(ctx, q, registry.AuditEntry{Actor: actor, Action: KindErase + ".archives", Tenant: t, Details: map[string]any{"tenant": e.Tenant, "slug": e.Slug, "archives": n}})
}
