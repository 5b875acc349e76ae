package provision

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
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

// Carrier carries the rows of a tenant from one database to another: pkg/transfer does.
type Carrier interface {
	// Check refuses a tenant that Carry would refuse, and says about how many bytes of tables it has. It changes nothing.
	Check(ctx context.Context, t tenant.Tenant, group string) (bytes int64, err error)
	// Carry reads all of a tenant that nobody changes, gives arrive what puts it into the group's database, and when arrive has
	// committed that, reads it there once more and compares. Only when it returns nil are both the same.
	Carry(ctx context.Context, t tenant.Tenant, group string, arrive func(context.Context, Filling) error, told func(MoveProgress)) (Carried, error)
}

// Carried is what came of it.
type Carried struct {
	Tables int
	Rows   int64
	Bytes  int64 // of rows, as COPY writes them
}

// MoveProgress is how far a move is.
type MoveProgress struct {
	Step  string // copy or verify
	Table string // at hand
	Rows  int64
	Bytes int64
	Total int64 // about how many bytes of tables there are; 0: unknown
	// Frozen is for how long the tenant could not be written so far.
	Frozen time.Duration
}

// CarryBy says who carries the rows of tenants that are moved. It must be called before anything is moved or worked.
func (p *Provisioner) CarryBy(c Carrier) { p.carrier = c }

// MoveRequest says where a tenant is to go.
type MoveRequest struct {
	Group string
	// Keep is how long what is left behind is kept.
	Keep time.Duration
	// Force moves a tenant also when something is kept for undoing a change of it: that stays behind and expires.
	Force bool
	Actor string
	// Progress is told how far it is, now and then; may be nil.
	Progress func(MoveProgress)
}

// Moved is what a move has done.
type Moved struct {
	Tenant    tenant.Tenant
	Operation uuid.UUID // zero: the tenant was there already
	From      string
	Carried
	Pause time.Duration // for how long the tenant could not be written
	Kept  time.Time     // until when the old copy is kept
}

// movedResult is Moved as the operation's row holds it.
type movedResult struct {
	Tenant  string    `json:"tenant"`
	From    string    `json:"from"`
	To      string    `json:"to"`
	Tables  int       `json:"tables"`
	Rows    int64     `json:"rows"`
	Bytes   int64     `json:"size_bytes"`
	PauseMS int64     `json:"pause_ms"`
	Kept    time.Time `json:"kept_until"`
}

// The phases of a move, as its operation's row tells them to people. What is done next is never read from there but
// from the registry and the placements.
const (
	phaseBegun    = "begun"
	phaseFrozen   = "frozen"
	phaseSwitched = "switched"
)

// moving is what an operation's row holds of a move.
type moving struct {
	From     string     `json:"from"`
	To       string     `json:"to"`
	Force    bool       `json:"force,omitempty"`
	Phase    string     `json:"phase"`
	FrozenAt *time.Time `json:"frozen_at,omitempty"`
	Carried  *Carried   `json:"carried,omitempty"`
}

// move is one move at work.
type move struct {
	moving
	t    tenant.Tenant // as the registry had it, in the group that it comes from
	op   registry.Operation
	keep time.Duration
	told func(MoveProgress)
	kept time.Time
}

// Move brings a tenant to another group's database. It is frozen there where it is: it may be read and not written. All
// of it is copied and compared, then the registry is switched, the old place retired and the new one opened, in this order: at no
// moment can it be written in both. What fails before the switch is undone, and the tenant goes on where it was; behind it there
// is only forward. A move whose process died is gone on with by the same command, or by a server. Faults: Conflict for what
// stands in the way, Unverified when what arrived is not what was sent.
func (p *Provisioner) Move(ctx context.Context, slug tenant.Slug, r MoveRequest) (done Moved, err error) {
	t, finished, err := p.findAndFinish(ctx, slug)
	if err != nil {
		return done, err
	}
	if t.Group == r.Group {
		done.Tenant, done.From = t, t.Group
		if finished == KindMove {
			err = p.lastMove(ctx, &done)
		}
		return done, err
	}
	if _, err := p.mayMove(ctx, t, r); err != nil {
		return done, named(err, t)
	}
	m := &move{moving: moving{From: t.Group, To: r.Group, Force: r.Force, Phase: phaseBegun}, t: t, keep: r.Keep, told: r.Progress}
	if m.told == nil {
		m.told = func(MoveProgress) {}
	}
	if err := failpoint.Hit("move.before"); err != nil {
		return done, err
	}
	id, err := uuid.NewV7()
	if err != nil {
		return done, err
	}
	p.o.Marker.Mark(ctx, registry.Marking{Operation: id, Kind: KindMove, Tenant: t.Slug.String(), Groups: []string{m.From, m.To}})
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		c := change{kind: KindMove, tenant: t}
		if err := unchanged(ctx, tx, c); err != nil {
			return err
		}
		if err := p.exclude(ctx, tx, c, nil); err != nil {
			return err
		}
		if err := room(ctx, tx, r.Group); err != nil {
			return err
		}
		m.op, err = registry.BeginAs(ctx, tx, id, KindMove, t, r.Actor, request{Slug: t.Slug.String(), KeepSeconds: int64(r.Keep.Seconds()), Move: &m.moving})
		return err
	})
	if err != nil {
		return done, p.named(err, change{tenant: t})
	}
	defer p.beat(ctx, m.op)()
	done, err = p.carryOver(ctx, m)
	return done, named(err, t)
}

// named gives a fault the tenant that it is about.
func named(err error, t tenant.Tenant) error {
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = t.Slug.String()
	}
	return err
}

// MayMove refuses what Move would refuse now, without changing anything, and says about how many bytes of tables there
// are and what would expire by it.
func (p *Provisioner) MayMove(ctx context.Context, slug tenant.Slug, r MoveRequest) (t tenant.Tenant, bytes int64, err error) {
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		if t, err = registry.BySlug(ctx, tx, slug); err != nil {
			return err
		}
		open, found, err := registry.Open(ctx, tx, t.Number)
		if err == nil && found {
			err = running(open)
		}
		return err
	})
	if err != nil || t.Group == r.Group {
		return t, 0, named(err, t)
	}
	bytes, err = p.mayMove(ctx, t, r)
	return t, bytes, named(err, t)
}

// mayMove refuses what cannot be moved. It asks both databases and changes neither.
func (p *Provisioner) mayMove(ctx context.Context, t tenant.Tenant, r MoveRequest) (bytes int64, err error) {
	if p.carrier == nil {
		return 0, fault.New(fault.Internal, "nobody is there to carry a tenant's rows").WithCode("no_carrier")
	}
	if t.State != tenant.Active && t.State != tenant.Suspended {
		return 0, wrongState(t, "moved", "oneo tenant undrop "+t.Slug.String())
	}
	if r.Keep <= 0 {
		return 0, fault.New(fault.Invalid, "what a move leaves behind must be kept for a while: servers that have not heard of it are refused there").WithCode("invalid_keep").
			WithHint("--keep 1h")
	}
	here, err := p.o.DB.Installation(ctx, t.Group)
	if err != nil {
		return 0, err
	}
	there, err := p.o.DB.Installation(ctx, r.Group)
	if err != nil {
		return 0, err
	}
	if here.ID != there.ID || here.AppRole != there.AppRole {
		return 0, fault.New(fault.Conflict, "the database of group %s belongs to another installation (%s, app role %s)", r.Group, there.ID, there.AppRole).
			WithCode("other_installation").WithHint("make it one of this installation: oneo init, on an empty database")
	}
	if err := p.o.Migrate.SharedBehind(ctx); err != nil {
		return 0, err
	}
	rollBack := errors.New("only asked")
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := room(ctx, tx, r.Group); err != nil {
			return err
		}
		return rollBack
	})
	if !errors.Is(err, rollBack) {
		return 0, err
	}
	if err := p.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error { return leaves(ctx, tx, t, r.Force) }); err != nil {
		return 0, err
	}
	err = p.o.DB.AsOwner(ctx, r.Group, func(tx *postgres.OwnerTx) error {
		if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
			return err
		}
		return vacantThere(ctx, tx, t)
	})
	if err != nil {
		return 0, err
	}
	return p.carrier.Check(ctx, t, r.Group)
}

// leaves refuses to take a tenant away from where something would be lost or left unfinished by that.
func leaves(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, force bool) error {
	at, there, err := standing(ctx, tx, t.Number)
	if err != nil {
		return err
	}
	if !there || at != t.Schema.String() {
		return fault.New(fault.Conflict, "the tenant's schema is gone, or was made again behind oneo's back").WithCode(codeSchemaMissing).
			WithHint("oneo migrate status names all such tenants")
	}
	if err := untied(ctx, tx, at); err != nil {
		return err
	}
	const ask = `select exists (select from public.progress where tenant = $1),
	(select count(*) from public.undo_points where tenant = $1 and expires_at > pg_catalog.now()) + (select count(*) from public.replaced where tenant = $1 and expires_at > pg_catalog.now()),
	greatest((select max(expires_at) from public.undo_points where tenant = $1), (select max(expires_at) from public.replaced where tenant = $1))`
	var unfinished bool
	var kept int
	var until *time.Time
	if err := tx.QueryRow(ctx, ask, t.Number).Scan(&unfinished, &kept, &until); err != nil {
		return err
	}
	if unfinished {
		return fault.New(fault.Conflict, "a migration of this tenant has been begun and not ended").WithCode("migration_unfinished").WithHint("oneo migrate -t %s", t.Slug)
	}
	if kept > 0 && !force {
		return fault.New(fault.Conflict, "%d undo point(s) or restore(s) of the tenant can still be undone, until %s; they do not move with it", kept, until.UTC().Format(time.RFC3339)).
			WithCode("undo_kept").WithHint("wait until then, or add --force: they expire with the move")
	}
	return nil
}

// vacantThere refuses a place that another one has.
func vacantThere(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant) error {
	const ask = `select coalesce((select state from public.placements where number = $1), ''),
	exists (select from pg_catalog.pg_namespace n where n.nspname = $2
		and not exists (select from public.placements p where p.number = $1 and p.state = 'arriving' and p.namespace = n.oid))`
	var state string
	var taken bool
	if err := tx.QueryRow(ctx, ask, t.Number, t.Schema.String()).Scan(&state, &taken); err != nil {
		return err
	}
	switch {
	case state != "" && state != "moved" && state != "arriving":
		return fault.New(fault.Conflict, "a tenant of the same number stands there already, and is %s", state).WithCode("placement_exists").
			WithHint("two groups may be one database; `oneo config show` says where each is")
	case taken:
		return fault.New(fault.Conflict, "a schema %s exists there already, and is not one of oneo's", t.Schema).WithCode("schema_exists").
			WithHint("rename the schema that is there")
	}
	return nil
}

// resumeMove goes on with a move that another process had begun.
func (p *Provisioner) resumeMove(ctx context.Context, op registry.Operation) error {
	r, err := parseRequest(op.Request)
	if err != nil {
		return err
	}
	if r.Move == nil || p.carrier == nil {
		return fault.New(fault.Internal, "this process cannot go on with the move %s", op.ID).WithCode("no_carrier")
	}
	m := &move{moving: *r.Move, op: op, keep: time.Duration(r.KeepSeconds) * time.Second, told: func(MoveProgress) {}}
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		m.t, err = registry.ByNumber(ctx, tx, *op.Number)
		return err
	})
	if err != nil {
		return err
	}
	switched := m.t.Group == m.To
	m.t.Group = m.From
	if switched {
		_, err = p.forward(ctx, m)
	} else {
		_, err = p.carryOver(ctx, m)
	}
	return named(err, m.t)
}

// carryOver does all of a move, from wherever it was left before the switch. What fails before that is put back.
func (p *Provisioner) carryOver(ctx context.Context, m *move) (done Moved, err error) {
	cause := p.upToSwitch(ctx, m)
	if cause == nil {
		return p.forward(ctx, m)
	}
	switched, err := p.putBack(ctx, m, cause)
	switch {
	case switched: // its commit's answer was lost
		return p.forward(ctx, m)
	case err != nil:
		return done, errors.Join(cause, fmt.Errorf("the move is not undone yet: %w", err))
	}
	return done, cause
}

// upToSwitch freezes the tenant, copies and compares it, and switches the registry. Its steps may be repeated.
func (p *Provisioner) upToSwitch(ctx context.Context, m *move) error {
	if err := failpoint.Hit("move.started"); err != nil {
		return err
	}
	if err := p.patiently(ctx, func() error { return p.freeze(ctx, m) }); err != nil {
		return err
	}
	if err := failpoint.Hit("move.frozen"); err != nil {
		return err
	}
	m.Phase = phaseFrozen
	if err := p.inMain(ctx, func(tx *postgres.OwnerTx) error { return m.note(ctx, tx) }); err != nil {
		return err
	}
	if err := p.discard(ctx, m.To, m.t.Number); err != nil { // what an earlier attempt has left
		return err
	}
	carried, err := p.carrier.Carry(ctx, m.t, m.To, func(ctx context.Context, fill Filling) error {
		err := p.arrive(ctx, m, fill)
		if err == nil {
			err = failpoint.Hit("move.copied")
		}
		return err
	}, func(at MoveProgress) {
		at.Frozen = time.Since(*m.FrozenAt)
		m.told(at)
	})
	if err != nil {
		return p.named(err, change{tenant: m.t})
	}
	if err := failpoint.Hit("move.verified"); err != nil {
		return err
	}
	m.Carried = &carried
	if err := p.inMain(ctx, func(tx *postgres.OwnerTx) error { return p.switchOver(ctx, tx, m) }); err != nil {
		return err
	}
	return failpoint.Hit("move.switched")
}

func (p *Provisioner) inMain(ctx context.Context, fn func(*postgres.OwnerTx) error) error {
	return p.o.DB.AsOwner(ctx, postgres.MainGroup, fn)
}

// note writes how far the move is into its operation's row.
func (m *move) note(ctx context.Context, tx *postgres.OwnerTx) error {
	body, err := json.Marshal(m.moving)
	if err != nil {
		return err
	}
	const note = `update public.operations set request = request || pg_catalog.jsonb_build_object('move', $2::jsonb), heartbeat = now()
where id = $1 and state = 'running' and attempts = $3`
	tag, err := tx.Exec(ctx, note, m.op.ID, string(body), m.op.Attempts)
	if err == nil && tag.RowsAffected() == 0 {
		return moveOver(m)
	}
	return err
}

func moveOver(m *move) error {
	return fault.New(fault.Conflict, "another process has taken the move %s up, or ended it", m.op.ID).WithCode("operation_over")
}

// ours refuses to go on with a move that another process has taken up or ended. The attempts are its fence: whoever takes a move up
// counts them on. With lock nobody does so before the transaction has ended.
func (m *move) ours(ctx context.Context, tx *postgres.OwnerTx, lock string) error {
	var ours bool
	err := tx.QueryRow(ctx, `select state = 'running' and attempts = $2 from public.operations where id = $1 `+lock, m.op.ID, m.op.Attempts).Scan(&ours)
	if err == nil && !ours {
		return moveOver(m)
	}
	return err
}

func (p *Provisioner) stillOurs(ctx context.Context, m *move) error {
	return p.inMain(ctx, func(tx *postgres.OwnerTx) error { return m.ours(ctx, tx, "") })
}

// freeze lets every transaction that is bound to the tenant end, and no further one write. It is repeatable.
func (p *Provisioner) freeze(ctx context.Context, m *move) error {
	return p.o.DB.AsOwner(ctx, m.From, func(tx *postgres.OwnerTx) error {
		// Under the lock: whoever has taken the move up thaws the tenant under it too, after it has put up its fence.
		if err := tx.LockOperation(ctx, m.t.Number, p.o.GateWait); err != nil {
			return err
		}
		if err := p.stillOurs(ctx, m); err != nil {
			return err
		}
		if err := leaves(ctx, tx, m.t, m.Force); err != nil {
			return err
		}
		if _, err := p.lockGate(ctx, tx, m.t.Number); err != nil {
			return err
		}
		const freeze = `update public.placements set state = case state when 'active' then 'moving' else state end, moving = $2, epoch = epoch + 1, updated_at = pg_catalog.clock_timestamp()
where number = $1 and moving is distinct from $2 and state in ('active', 'suspended', 'moving')`
		if _, err := tx.Exec(ctx, freeze, m.t.Number, m.op.ID); err != nil {
			return err
		}
		const frozen = `select updated_at from public.placements where number = $1 and moving = $2`
		err := tx.QueryRow(ctx, frozen, m.t.Number, m.op.ID).Scan(&m.FrozenAt)
		if errors.Is(err, pgx.ErrNoRows) {
			return fault.New(fault.Conflict, "the tenant's placement is not as the registry says").WithCode("placement_differs").WithHint("oneo tenant show %s", m.t.Slug)
		}
		return err
	})
}

// belongings are what a tenant has in its group's shared tables.
type belongings struct {
	version, reader int
	epoch           int64
	ledger, marks   json.RawMessage
}

func (p *Provisioner) belongingsOf(ctx context.Context, m *move) (b belongings, err error) {
	const read = `select version, reader, epoch,
	(select coalesce(pg_catalog.jsonb_agg(l), '[]') from public.ledger l where l.set = 'tenant' and l.tenant = $1),
	(select coalesce(pg_catalog.jsonb_agg(k), '[]') from public.marks k where k.tenant = $1) from public.placements where number = $1 and moving = $2`
	err = p.o.DB.AsOwner(ctx, m.From, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, read, m.t.Number, m.op.ID).Scan(&b.version, &b.reader, &b.epoch, &b.ledger, &b.marks)
	})
	return b, err
}

// arrive makes and fills the tenant at its new place, where nobody is bound to it yet, in one transaction.
func (p *Provisioner) arrive(ctx context.Context, m *move, fill Filling) error {
	inst, err := p.o.DB.Installation(ctx, m.To)
	if err != nil {
		return err
	}
	b, err := p.belongingsOf(ctx, m)
	if err != nil {
		return err
	}
	if b.version != fill.Version {
		return fault.New(fault.Conflict, "the tenant is at version %d and its ledger at %d", b.version, fill.Version).WithCode("ledger_gap")
	}
	number, role := m.t.Number, p.role(inst, m.t.Number)
	return p.o.DB.AsOwner(ctx, m.To, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, number, p.o.GateWait); err != nil {
			return err
		}
		if err := p.stillOurs(ctx, m); err != nil {
			return err
		}
		if err := p.o.Migrate.CheckTenantFiles(ctx, tx); err != nil {
			return err
		}
		before, err := migrate.Transaction(ctx, tx)
		if err != nil {
			return err
		}
		made, err := p.roleScript(ctx, tx, inst, number)
		if err != nil {
			return err
		}
		at := structure.Schema{Name: m.t.Schema.String(), Role: role}
		if err := p.o.Migrate.Create(ctx, tx, m.t.Schema, b.version, made+structure.Empty(at), ""); err != nil {
			return err
		}
		if err := fill.Rows(ctx, tx, at); err != nil {
			return err
		}
		if err := tx.Script(ctx, emptyPath); err != nil {
			return err
		}
		after, err := migrate.Transaction(ctx, tx)
		if err == nil {
			err = migrate.SameTransaction(before, after)
		}
		if err != nil {
			return err
		}
		// Where it had been before: servers that have not heard of that since are refused by the epoch as well.
		const place = `insert into public.placements as p (number, schema, role, namespace, state, moving, epoch, version, reader)
values ($1, $2, $3, (select oid from pg_catalog.pg_namespace where nspname = $2::text), 'arriving', $4, $5, $6, $7)
on conflict (number) do update set schema = excluded.schema, role = excluded.role, namespace = excluded.namespace, state = excluded.state, moving = excluded.moving,
	epoch = greatest(p.epoch, excluded.epoch) + 1, version = excluded.version, reader = excluded.reader, created_at = now(), updated_at = now() where p.state = 'moved'`
		tag, err := tx.Exec(ctx, place, number, at.Name, role, m.op.ID, b.epoch+1, b.version, b.reader)
		if err == nil && tag.RowsAffected() == 0 {
			err = fault.New(fault.Conflict, "a tenant of the same number stands there already").WithCode("placement_exists")
		}
		if err != nil {
			return err
		}
		if err := putLedger(ctx, tx, number, b.ledger); err != nil {
			return err
		}
		const marks = `insert into public.marks select * from pg_catalog.jsonb_populate_recordset(null::public.marks, $1) on conflict do nothing`
		if _, err := tx.Exec(ctx, marks, b.marks); err != nil {
			return err
		}
		return failpoint.Hit("move.arrived")
	})
}

// roleScript is what makes the tenant's role where it is not there yet: two groups may be databases of one cluster.
func (p *Provisioner) roleScript(ctx context.Context, tx *postgres.OwnerTx, inst postgres.Installation, number int32) (string, error) {
	if p.o.DB.Isolation() != postgres.ByRole {
		return "", nil
	}
	role := inst.TenantRole(number)
	var there bool
	if err := tx.QueryRow(ctx, `select exists (select from pg_catalog.pg_roles where rolname = $1)`, role).Scan(&there); err != nil {
		return "", err
	}
	script := "grant " + postgres.Quote(role) + " to " + postgres.Quote(inst.LoginOf(number)) + ";\n"
	if !there {
		script = "create role " + postgres.Quote(role) + " nologin noinherit;\n" + script
	}
	return script, nil
}

func putLedger(ctx context.Context, tx *postgres.OwnerTx, number int32, ledger json.RawMessage) error {
	if _, err := tx.Exec(ctx, `delete from public.ledger where set = 'tenant' and tenant = $1`, number); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, `insert into public.ledger select * from pg_catalog.jsonb_populate_recordset(null::public.ledger, $1)`, ledger)
	return err
}

// discard destroys what has arrived of a tenant at a place to which the registry has not switched. Where an older copy is
// kept, the place is that of the copy again. It does nothing where nothing has arrived.
func (p *Provisioner) discard(ctx context.Context, group string, number int32) error {
	inst, err := p.o.DB.Installation(ctx, group)
	if err != nil {
		return err
	}
	return p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, number, p.o.GateWait); err != nil {
			return err
		}
		var state string
		err := tx.QueryRow(ctx, `select state from public.placements where number = $1 for update`, number).Scan(&state)
		if errors.Is(err, pgx.ErrNoRows) || err == nil && state != "arriving" {
			return nil
		}
		if err != nil {
			return err
		}
		at, there, err := standing(ctx, tx, number)
		if err != nil {
			return err
		}
		var kept int
		if err := tx.QueryRow(ctx, `select count(*) from public.moved where tenant = $1`, number).Scan(&kept); err != nil {
			return err
		}
		if kept == 0 {
			return destroy(ctx, tx, inst, number, at, map[string]any{})
		}
		if there {
			if err := tx.Script(ctx, "drop schema "+postgres.Quote(at)+" cascade"); err != nil {
				return err
			}
		}
		const back = `update public.placements p set schema = k.schema, namespace = k.namespace, version = k.version, state = 'moved', moving = null,
	epoch = p.epoch + 1, updated_at = now() from (select * from public.moved where tenant = $1 order by moved_at desc limit 1) k where p.number = $1 returning k.ledger`
		var ledger json.RawMessage
		if err := tx.QueryRow(ctx, back, number).Scan(&ledger); err != nil {
			return err
		}
		return putLedger(ctx, tx, number, ledger)
	})
}

// switchOver makes the new place the tenant's, in the registry. It is the one step that cannot be taken back.
func (p *Provisioner) switchOver(ctx context.Context, tx *postgres.OwnerTx, m *move) error {
	if err := m.ours(ctx, tx, "for update"); err != nil {
		return err
	}
	if err := room(ctx, tx, m.To); err != nil {
		return err
	}
	const set = `update public.tenants set group_name = $3, epoch = epoch + 1, cache_generation = cache_generation + 1, updated_at = now()
where number = $1 and group_name = $2 and state in ('active', 'suspended')`
	tag, err := tx.Exec(ctx, set, m.t.Number, m.From, m.To)
	if err == nil && tag.RowsAffected() == 0 {
		err = fault.New(fault.Conflict, "the tenant was changed by somebody else in between").WithCode("tenant_changed")
	}
	if err != nil {
		return err
	}
	m.Phase = phaseSwitched
	if err := m.note(ctx, tx); err != nil {
		return err
	}
	return failpoint.Hit("move.switching")
}

// insist repeats what may succeed in a moment, for as long as GateWait.
func (p *Provisioner) insist(ctx context.Context, fn func() error) error {
	for deadline := time.Now().Add(p.o.GateWait); ; {
		err := fn()
		if err == nil || !fault.Is(err, fault.Unavailable) && !fault.Is(err, fault.Locked) || time.Now().After(deadline) {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// putBack undoes a move that has not switched: the tenant goes on where it was. It reports whether it has switched after all. What it
// cannot undo stays open, and is gone on with by the same command or a server.
func (p *Provisioner) putBack(ctx context.Context, m *move, cause error) (switched bool, err error) {
	ctx = context.WithoutCancel(ctx) // a command that is interrupted still cleans up
	fence := func(tx *postgres.OwnerTx) error {
		// A switch whose answer was lost may still be at work: this waits for it, and lets no later one by.
		if err := m.ours(ctx, tx, "for update"); err != nil {
			return err
		}
		var group string
		if err := tx.QueryRow(ctx, `select group_name from public.tenants where number = $1`, m.t.Number).Scan(&group); err != nil {
			return err
		}
		if switched = group == m.To; switched {
			return nil
		}
		_, err := tx.Exec(ctx, `update public.operations set attempts = attempts + 1, heartbeat = now() where id = $1`, m.op.ID)
		return err
	}
	if err := p.insist(ctx, func() error { return p.inMain(ctx, fence) }); err != nil || switched {
		return switched, err
	}
	m.op.Attempts++
	if err := p.insist(ctx, func() error { return p.thaw(ctx, m.From, m.t, m.op.ID) }); err != nil {
		return false, err
	}
	if err := p.discard(ctx, m.To, m.t.Number); err != nil { // it is no tenant's: a server destroys it when it can
		p.o.Logger.WarnContext(ctx, "what has arrived of a tenant whose move was undone is not destroyed yet", "tenant", m.t.Slug, "group", m.To, "error", err)
	}
	return false, p.insist(ctx, func() error {
		return p.inMain(ctx, func(tx *postgres.OwnerTx) error { return registry.Fail(ctx, tx, m.op.ID, fault.Of(cause)) })
	})
}

// thaw lets the tenant be written again at a place that is the registry's.
func (p *Provisioner) thaw(ctx context.Context, group string, t tenant.Tenant, operation uuid.UUID) error {
	return p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, t.Number, p.o.GateWait); err != nil {
			return err
		}
		const thaw = `update public.placements set state = case state when 'moving' then 'active' else state end, moving = null, epoch = epoch + 1, updated_at = now()
where number = $1 and moving = $2 and state in ('moving', 'suspended')`
		_, err := tx.Exec(ctx, thaw, t.Number, operation)
		return err
	})
}

// forward ends a move that has switched: the old place is retired, the new one opened. A place that is away does not keep the other one
// from its step: nobody can write at the old one in any case.
func (p *Provisioner) forward(ctx context.Context, m *move) (done Moved, err error) {
	ctx = context.WithoutCancel(ctx)
	rerr := p.retire(ctx, m)
	if rerr == nil {
		if err := failpoint.Hit("move.retired"); err != nil {
			return done, err
		}
	}
	if err := p.insist(ctx, func() error { return p.open(ctx, m) }); err != nil {
		return done, errors.Join(err, rerr)
	}
	if m.FrozenAt != nil {
		done.Pause = time.Since(*m.FrozenAt)
	}
	if err := failpoint.Hit("move.opened"); err != nil {
		return done, err
	}
	var domains []registry.Domain
	err = p.inMain(ctx, func(tx *postgres.OwnerTx) (err error) {
		if done.Tenant, err = registry.ByNumber(ctx, tx, m.t.Number); err == nil {
			domains, err = registry.Domains(ctx, tx, m.t)
		}
		return err
	})
	if err != nil {
		return done, err
	}
	hosts := make([]tenant.Host, len(domains))
	for i, d := range domains {
		hosts[i] = d.Host
	}
	p.o.Changed(ctx, done.Tenant, hosts)
	if rerr != nil {
		if err := p.insist(ctx, func() error { return p.retire(ctx, m) }); err != nil {
			return done, fmt.Errorf("the tenant is served in group %s; its old place is not retired yet: %w", m.To, err)
		}
	}
	done.Operation, done.From, done.Kept = m.op.ID, m.From, m.kept
	if m.Carried != nil {
		done.Carried = *m.Carried
	}
	err = p.inMain(ctx, func(tx *postgres.OwnerTx) error {
		result := movedResult{
			Tenant: m.t.Slug.String(), From: m.From, To: m.To, Tables: done.Tables, Rows: done.Rows, Bytes: done.Bytes, PauseMS: done.Pause.Milliseconds(), Kept: done.Kept,
		}
		if err := registry.Audit(ctx, tx, registry.AuditEntry{Actor: m.op.Actor, Action: KindMove, Tenant: done.Tenant, Details: result}); err != nil {
			return err
		}
		if err := registry.Finish(ctx, tx, m.op.ID, result); err != nil {
			return err
		}
		return failpoint.Hit("move.finish")
	})
	if err != nil {
		return done, err
	}
	return done, failpoint.Hit("move.after")
}

// retire makes the place that a tenant has left one that nobody is served from: its schema is renamed away, and kept.
func (p *Provisioner) retire(ctx context.Context, m *move) error {
	return p.o.DB.AsOwner(ctx, m.From, func(tx *postgres.OwnerTx) error {
		number := m.t.Number
		if err := tx.LockOperation(ctx, number, p.o.GateWait); err != nil {
			return err
		}
		var here bool
		const at = `select moving is not distinct from $2 from public.placements where number = $1 for update`
		if err := tx.QueryRow(ctx, at, number, m.op.ID).Scan(&here); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		if !here { // retired by an earlier attempt
			err := tx.QueryRow(ctx, `select expires_at from public.moved where operation = $1`, m.op.ID).Scan(&m.kept)
			if errors.Is(err, pgx.ErrNoRows) {
				return nil
			}
			return err
		}
		if _, err := p.lockGate(ctx, tx, number); err != nil { // whoever reads here has ended
			return err
		}
		schema, there, err := standing(ctx, tx, number)
		if err != nil {
			return err
		}
		away := tenant.MovedSchema(number, shortID(m.op.ID)).String()
		if there {
			const keep = `insert into public.moved (operation, tenant, group_name, schema, namespace, version, ledger, expires_at)
select $2, number, $3, $4, namespace, version, (select coalesce(pg_catalog.jsonb_agg(l), '[]') from public.ledger l where l.set = 'tenant' and l.tenant = $1),
	pg_catalog.now() + $5::interval from public.placements where number = $1 returning expires_at`
			if err := tx.QueryRow(ctx, keep, number, m.op.ID, m.To, away, m.keep).Scan(&m.kept); err != nil {
				return err
			}
			if err := rename(ctx, tx, schema, away); err != nil {
				return err
			}
			rights, err := rightsIn(ctx, tx, away)
			if err != nil {
				return err
			}
			if err := keepOut(ctx, tx, away, rights); err != nil {
				return err
			}
		} else {
			p.o.Logger.WarnContext(ctx, "the schema that a tenant has left is gone: nothing is kept of it", "tenant", m.t.Slug, "group", m.From)
			away = schema
		}
		// What is kept for undoing is about the tables that are left behind.
		const forget = `with a as (update public.undo_points set expires_at = pg_catalog.now() where tenant = $1 and expires_at > pg_catalog.now())
update public.replaced set expires_at = pg_catalog.now() where tenant = $1 and expires_at > pg_catalog.now()`
		if _, err := tx.Exec(ctx, forget, number); err != nil {
			return err
		}
		const leave = `update public.placements set state = 'moved', moving = null, schema = $2, epoch = epoch + 1, updated_at = now() where number = $1`
		_, err = tx.Exec(ctx, leave, number, away)
		return err
	})
}

// open lets the tenant be served at its new place. It is repeatable.
func (p *Provisioner) open(ctx context.Context, m *move) error {
	return p.o.DB.AsOwner(ctx, m.To, func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, m.t.Number, p.o.GateWait); err != nil {
			return err
		}
		const open = `update public.placements set state = $3, moving = null, epoch = epoch + 1, updated_at = now() where number = $1 and state = 'arriving' and moving = $2`
		tag, err := tx.Exec(ctx, open, m.t.Number, m.op.ID, string(m.t.State))
		if err != nil || tag.RowsAffected() == 1 {
			return err
		}
		served, err := placed(m.t.Number, "state", string(m.t.State))(ctx, tx)
		if err == nil && !served {
			return fault.New(fault.Conflict, "what has arrived of the tenant in group %s is not there any more", m.To).WithCode("arrival_gone").
				WithHint("was that database restored to an older point? In group %s the old copy is kept: table public.moved", m.From)
		}
		return err
	})
}

// lastMove reads what the tenant's last move has done.
func (p *Provisioner) lastMove(ctx context.Context, done *Moved) error {
	const last = `select id, result from public.operations where tenant = $1 and kind = $2 and state = 'done' order by id desc limit 1`
	return p.inMain(ctx, func(tx *postgres.OwnerTx) error {
		var r movedResult
		if err := tx.QueryRow(ctx, last, done.Tenant.Number, KindMove).Scan(&done.Operation, &r); err != nil {
			return err
		}
		done.From, done.Carried = r.From, Carried{Tables: r.Tables, Rows: r.Rows, Bytes: r.Bytes}
		done.Pause, done.Kept = time.Duration(r.PauseMS)*time.Millisecond, r.Kept
		return nil
	})
}

// dropLeft destroys what moves have left behind of a number that has come back.
func dropLeft(ctx context.Context, tx *postgres.OwnerTx, number int32) error {
	rows, err := tx.Query(ctx, `delete from public.moved where tenant = $1 returning schema`, number)
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
	return nil
}

// DropMoved destroys at once what moves of a tenant have left behind, in the databases of all groups. It returns how many
// copies.
func (p *Provisioner) DropMoved(ctx context.Context, number int32) (dropped int, err error) {
	var errs []error
	for _, group := range p.o.DB.Groups() {
		errs = append(errs, p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(ctx, `update public.moved set expires_at = pg_catalog.now() where tenant = $1 and expires_at > pg_catalog.now()`, number)
			return err
		}))
		n, err := p.expireMoved(ctx, group, number)
		dropped, errs = dropped+n, append(errs, err)
	}
	return dropped, errors.Join(errs...)
}

// ExpireMoved destroys what moves have left behind whose time is over, and what has arrived by moves that are over and had not
// switched, in the databases of all groups, one tenant in a transaction. It returns how many copies. What fails does not stop
// the others.
func (p *Provisioner) ExpireMoved(ctx context.Context) (expired int, err error) {
	var errs []error
	for _, group := range p.o.DB.Groups() {
		n, err := p.expireMoved(ctx, group, 0)
		expired, errs = expired+n, append(errs, err, p.expireArrivals(ctx, group))
	}
	return expired, errors.Join(errs...)
}

// expireMoved destroys the copies in a group's database whose time is over; of one number, or with 0 of all.
func (p *Provisioner) expireMoved(ctx context.Context, group string, number int32) (expired int, err error) {
	inst, err := p.o.DB.Installation(ctx, group)
	if err != nil {
		return 0, err
	}
	// The last one is the place's: it goes with the place, and after the others.
	const next = `select m.operation, m.tenant, m.schema, m.expires_at, p.state = 'moved' and p.namespace = m.namespace,
	exists (select from pg_catalog.pg_namespace n where n.oid = m.namespace and n.nspname = m.schema)
from public.moved m join public.placements p on p.number = m.tenant where m.expires_at <= pg_catalog.now() and (m.expires_at, m.operation) > ($1, $2) and ($3 = 0 or m.tenant = $3)
	and not (p.state = 'moved' and p.namespace = m.namespace and exists (select from public.moved o where o.tenant = m.tenant and o.operation <> m.operation))
order by m.expires_at, m.operation limit 1 for update of m, p skip locked`
	var errs []error
	for after, operation := time.Unix(0, 0), uuid.Nil; ; {
		did := false
		err := p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			var of int32
			var schema string
			var whole, there bool
			if err := tx.QueryRow(ctx, next, after, operation, number).Scan(&operation, &of, &schema, &after, &whole, &there); err != nil {
				return err
			}
			did = true
			if err := tx.LockOperation(ctx, of, 0); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, `delete from public.moved where operation = $1`, operation); err != nil {
				return err
			}
			if whole {
				return destroy(ctx, tx, inst, of, schema, map[string]any{})
			}
			if !there {
				return nil
			}
			return tx.Script(ctx, "drop schema "+postgres.Quote(schema)+" cascade")
		})
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return expired, errors.Join(errs...)
		case err == nil:
			expired++
		default:
			errs = append(errs, err)
			if !did || ctx.Err() != nil {
				return expired, errors.Join(errs...)
			}
		}
	}
}

// expireArrivals destroys what has arrived by moves that are over. Those had not switched: a move that has ends only when the
// place is open.
func (p *Provisioner) expireArrivals(ctx context.Context, group string) error {
	type arrival struct {
		number    int32
		operation uuid.UUID
	}
	var found []arrival
	err := p.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select number, moving from public.placements where state = 'arriving'`)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (a arrival, err error) { return a, row.Scan(&a.number, &a.operation) })
		return err
	})
	errs := []error{err}
	for _, a := range found {
		var over bool
		err := p.inMain(ctx, func(tx *postgres.OwnerTx) error {
			const ask = `select not exists (select from public.operations where id = $1 and state = 'running')
	and exists (select from public.tenants where number = $2 and group_name <> $3)`
			return tx.QueryRow(ctx, ask, a.operation, a.number, group).Scan(&over)
		})
		if err == nil && over {
			err = p.discard(ctx, group, a.number)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
