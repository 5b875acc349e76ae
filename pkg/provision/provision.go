// Package provision creates, suspends, resumes, renames, drops, undrops, purges and erases tenants.
//
// It promises: where one database holds registry and schema, a change is one transaction; where there are two, it is
// an operation whose steps can be repeated, and that the same command or a server's worker resumes wherever it was
// killed. Two changes of one tenant never mix: they take its operation lock. A change of what requests see takes the
// tenant's gate, so that no request sees half of it and none writes behind it. Dropping keeps the data for a grace
// period; only Purge and Erase destroy. A schema of the warm pool becomes at most one tenant's, and only while it is what a
// creation would make at that moment.
package provision

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options is what a Provisioner needs.
type Options struct {
	DB         *postgres.DB
	Migrate    *migrate.Migrator
	Structure  *structure.Checker // compares what is to be adopted; nil: nothing can be
	BaseDomain tenant.Host        // a tenant's default domain is <slug>.<base>
	DropGrace  time.Duration      // how long a dropped tenant is kept
	DomainHold time.Duration      // how long a removed domain is held back from other tenants
	// GateWait is how long a change waits, in all, for a tenant's requests in flight; 0 is 10 seconds.
	GateWait time.Duration
	// StaleAfter is how long an operation may go without a sign of life before another process takes it up; 0 is 10
	// seconds.
	StaleAfter time.Duration
	// PoolSize is how many spare schemas Work keeps ready in each group that accepts tenants; 0: none, and no creation
	// looks for one.
	PoolSize int
	// Changed is called after a tenant's placement, hosts or state have changed, with every host it had or has: the
	// caches forget them. May be nil.
	Changed func(ctx context.Context, t tenant.Tenant, hosts []tenant.Host)
	// Secret signs the records of erasures; empty: none can be written.
	Secret string
	// Uncache destroys what is cached of a tenant and says how many values there were; it is safe to repeat. May be nil.
	Uncache func(ctx context.Context, t tenant.Tenant) (int, error)
	// Archives is where the archives of tenants lie that are erased; nil: oneo knows of none.
	Archives Archives
	// Marker sets restore points before what changes much; nil: there are none.
	Marker *registry.Marker
	Logger *slog.Logger
}

// Provisioner changes tenants. It is safe for concurrent use.
type Provisioner struct {
	o       Options
	wake    chan struct{}
	taken   atomic.Bool // perhaps a spare, since Work last looked at the pools
	carrier Carrier     // nil: nothing can be moved
}

// New checks the options.
func New(o Options) (*Provisioner, error) {
	if o.DB == nil || o.Migrate == nil || o.Logger == nil || o.BaseDomain.IsZero() {
		return nil, errors.New("provision: DB, Migrate, BaseDomain and Logger must be given")
	}
	if o.PoolSize < 0 {
		return nil, errors.New("provision: PoolSize must not be below 0")
	}
	if o.GateWait == 0 {
		o.GateWait = 10 * time.Second
	}
	if o.StaleAfter == 0 {
		o.StaleAfter = 10 * time.Second
	}
	if o.Changed == nil {
		o.Changed = func(context.Context, tenant.Tenant, []tenant.Host) {}
	}
	return &Provisioner{o: o, wake: make(chan struct{}, 1)}, nil
}

// Kinds of operations.
const (
	KindCreate  = "tenant.create"
	KindSuspend = "tenant.suspend"
	KindResume  = "tenant.resume"
	KindRename  = "tenant.rename"
	KindDrop    = "tenant.drop"
	KindUndrop  = "tenant.undrop"
	KindPurge   = "tenant.purge"
	KindErase   = "tenant.erase"
	KindRestore = "tenant.restore"
	KindReturn  = "tenant.return" // undoes a restore
	KindMove    = "tenant.move"
	// KindRefill is not begun by its first word like the others: no server takes it up.
	KindRefill = "database.restore"
)

// change is one structural change of one tenant. Where one database holds everything, begin, schema and finish run in
// one transaction; otherwise each in its own, the first and the last in the registry's database.
type change struct {
	kind   string
	point  string // prefix of its failpoints
	tenant tenant.Tenant
	actor  string
	// request is what a resumed operation is made from again.
	request any
	details any // of the audit row
	// spareless takes no spare: the schema is there already, or is not made as a spare is.
	spareless bool
	// once cannot be repeated: it stands in the registry while it is at work, as if there were two databases, and what it
	// has begun is taken back whatever it fails by.
	once bool
	// apart has it stand in the registry while it is at work, as if there were two databases: part of it is in none.
	apart bool

	// known is told under which operation it runs, before anything else is asked of it; may be nil.
	known func(operation uuid.UUID)

	// numbered is the same creation under a number; nil: the number is settled.
	numbered func(number int32) change

	begin  func(ctx context.Context, q postgres.Querier) error   // may be nil
	schema func(ctx context.Context, tx *postgres.OwnerTx) error // must be safe to repeat
	// outside is what is to be done in no database, between schema and finish; must be safe to repeat, may be nil. When it
	// fails the operation stays open: only forward is left.
	outside func(ctx context.Context) error
	finish  func(ctx context.Context, q postgres.Querier) error // must be safe to repeat
	undo    func(ctx context.Context, q postgres.Querier) error // takes begin back when schema cannot succeed; may be nil
	// made asks the placement whether schema has been made: then the change only goes forward.
	made func(ctx context.Context, tx *postgres.OwnerTx) (bool, error)
}

// run carries a change out, as the operation op where it already is one, and returns the tenant as it is then.
func (p *Provisioner) run(ctx context.Context, c change, op *registry.Operation) (tenant.Tenant, error) {
	if err := failpoint.Hit(c.point + ".before"); err != nil {
		return tenant.Tenant{}, err
	}
	if op != nil && c.known != nil {
		c.known(op.ID)
	}
	id, err := p.mark(ctx, c, op)
	if err != nil {
		return tenant.Tenant{}, err
	}
	hosts := map[tenant.Host]bool{}
	var after tenant.Tenant
	collect := func(q postgres.Querier) error {
		domains, err := registry.Domains(ctx, q, c.tenant)
		for _, d := range domains {
			hosts[d.Host] = true
		}
		return err
	}
	begin := func(tx *postgres.OwnerTx) error {
		if c.kind != KindCreate { // what is not there yet has not changed, and has no domains
			if err := unchanged(ctx, tx, c); err != nil {
				return err
			}
			if err := collect(tx); err != nil {
				return err
			}
		}
		if c.begin != nil {
			if err := c.begin(ctx, tx); err != nil {
				return err
			}
		}
		if op != nil && c.numbered != nil {
			if err := registry.Assign(ctx, tx, op.ID, c.tenant.Number); err != nil {
				return err
			}
		}
		return failpoint.Hit(c.point + ".started")
	}
	schema := func(tx *postgres.OwnerTx) error {
		if err := tx.LockOperation(ctx, c.tenant.Number, p.o.GateWait); err != nil {
			return err
		}
		if op != nil && op.Begun {
			if err := p.stillRunning(ctx, tx, c, op); err != nil {
				return err
			}
			// What an earlier attempt has made is not looked at again: only forward is left.
			if made, err := c.made(ctx, tx); err != nil || made {
				return err
			}
		}
		if err := c.schema(ctx, tx); err != nil {
			return err
		}
		return failpoint.Hit(c.point + ".schema")
	}
	ended := func(tx *postgres.OwnerTx) (err error) {
		if after, err = registry.ByNumber(ctx, tx, c.tenant.Number); err != nil {
			return err
		}
		return collect(tx)
	}
	finish := func(tx *postgres.OwnerTx) error {
		if err := c.finish(ctx, tx); err != nil {
			return err
		}
		if err := ended(tx); err != nil {
			return err
		}
		if err := registry.Audit(ctx, tx, registry.AuditEntry{Actor: c.actor, Action: c.kind, Tenant: after, Details: c.details}); err != nil {
			return err
		}
		if op != nil {
			result := map[string]any{"tenant": after.Slug.String(), "state": string(after.State)}
			if d, ok := c.details.(map[string]any); ok && d[codeSchemaMissing] == true {
				result[codeSchemaMissing] = true
			}
			if err := registry.Finish(ctx, tx, op.ID, result); err != nil {
				return err
			}
		}
		return failpoint.Hit(c.point + ".finish")
	}

	if p.o.DB.SameDatabase(c.tenant.Group) && !c.once && !c.apart {
		err = p.patiently(ctx, func() error {
			return p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
				if c.numbered != nil {
					var number int32
					var err error
					if !c.spareless {
						number, err = p.spareFor(ctx, tx, c.tenant.Group, nil)
					}
					if err == nil && number == 0 {
						number, err = registry.NextNumber(ctx, tx)
					}
					if err != nil {
						return err
					}
					c = c.numbered(number)
				}
				if err := p.exclude(ctx, tx, c, op); err != nil {
					return err
				}
				for _, step := range []func(*postgres.OwnerTx) error{begin, schema, finish} {
					if err := step(tx); err != nil {
						return err
					}
				}
				return nil
			})
		})
	} else {
		err = p.runApart(ctx, id, &c, &op, begin, schema, finish, ended)
	}
	if err != nil {
		return tenant.Tenant{}, p.named(err, c)
	}
	all := make([]tenant.Host, 0, len(hosts))
	for h := range hosts {
		all = append(all, h)
	}
	p.o.Changed(context.WithoutCancel(ctx), after, all)
	if c.kind == KindCreate && p.o.PoolSize > 0 {
		p.taken.Store(true)
		p.Wake()
	}
	return after, failpoint.Hit(c.point + ".after")
}

// marked are the kinds of changes before which restore points are set; so they are before a move.
var marked = []string{KindRestore, KindReturn, KindDrop, KindPurge, KindErase}

// mark sets the restore points of a change that is about to begin, and returns the id by which its operation is known; one that has
// begun has its own. The audit trail tells the id also of what is one transaction, and no operation that has a row.
func (p *Provisioner) mark(ctx context.Context, c change, op *registry.Operation) (id uuid.UUID, err error) {
	if op != nil {
		id = op.ID
	} else if id, err = uuid.NewV7(); err != nil {
		return id, err
	}
	if p.o.Marker == nil || !slices.Contains(marked, c.kind) {
		return id, nil
	}
	if d, ok := c.details.(map[string]any); ok {
		d["operation"] = id
	}
	if op == nil || !op.Begun { // whoever begins it has set them: now may be behind its first change
		p.o.Marker.Mark(ctx, registry.Marking{Operation: id, Kind: c.kind, Tenant: c.tenant.Slug.String(), Groups: []string{c.tenant.Group}})
	}
	return id, nil
}

// unchanged refuses a change of a tenant that another one has changed since it was read, and keeps the tenant's row
// until the transaction ends. Without it a purge would take away what an undrop has just brought back.
func unchanged(ctx context.Context, tx *postgres.OwnerTx, c change) error {
	var slug, schema, state string
	var epoch int64
	const lock = `select slug, schema, state, epoch from public.tenants where number = $1 for update`
	if err := tx.QueryRow(ctx, lock, c.tenant.Number).Scan(&slug, &schema, &state, &epoch); err != nil {
		return err
	}
	// The epoch tells a tenant that was undropped and dropped again, whose grace has begun anew, from one that was not.
	if slug != c.tenant.Slug.String() || schema != c.tenant.Schema.String() || state != string(c.tenant.State) || epoch != c.tenant.Epoch {
		return tenantChanged(slug, state)
	}
	return nil
}

func tenantChanged(slug, state string) error {
	return fault.New(fault.Conflict, "the tenant was changed by somebody else in between: it is %s now", state).
		WithCode("tenant_changed").WithTenant(slug).WithHint("oneo tenant show %s", slug)
}

// emptyPath takes back the search path that a script has set: what follows it is on the shared tables.
const emptyPath = "set local search_path to '';\n"

// exclude refuses a change while another process's operation on the tenant is unfinished.
func (p *Provisioner) exclude(ctx context.Context, tx *postgres.OwnerTx, c change, op *registry.Operation) error {
	if op == nil && c.kind == KindCreate { // nobody else knows the number yet
		return nil
	}
	open, found, err := registry.Open(ctx, tx, c.tenant.Number)
	if err != nil || !found || op != nil && open.ID == op.ID {
		return err
	}
	return running(open)
}

// runApart carries a change out whose schema lies in another database than the registry, or that cannot be repeated, as the
// operation id. It settles the number of *c. ended reads what has become of it when somebody else has finished it.
func (p *Provisioner) runApart(ctx context.Context, id uuid.UUID, c *change, op **registry.Operation, begin, schema, finish, ended func(*postgres.OwnerTx) error) error {
	inMain := func(steps ...func(*postgres.OwnerTx) error) error {
		return p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			for _, step := range steps {
				if err := step(tx); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if *op == nil || !(*op).Begun {
		begun := *op
		var refused []int32 // spares that creations have reserved already
		for {
			var spare int32
			if c.numbered != nil && !c.spareless {
				spare = p.spareApart(ctx, c.tenant.Group, refused)
			}
			err := inMain(func(tx *postgres.OwnerTx) error {
				if c.numbered == nil {
					return nil
				}
				number, err := spare, error(nil)
				if number == 0 {
					number, err = registry.NextNumber(ctx, tx)
				}
				*c = c.numbered(number)
				return err
			}, func(tx *postgres.OwnerTx) error {
				if err := p.exclude(ctx, tx, *c, *op); err != nil {
					return err
				}
				return begin(tx)
			}, func(tx *postgres.OwnerTx) error {
				if begun != nil {
					return registry.MarkBegun(ctx, tx, begun.ID, c.request)
				}
				o, err := registry.BeginAs(ctx, tx, id, c.kind, c.tenant, c.actor, c.request)
				*op = &o
				return err
			})
			if spare != 0 && numberTaken(err) {
				refused = append(refused, spare)
				continue
			}
			if err != nil {
				return err
			}
			break
		}
		(*op).Begun = true
	}
	if c.known != nil {
		c.known((*op).ID)
	}
	defer p.beat(ctx, **op)()
	err := p.patiently(ctx, func() error { return p.o.DB.AsOwner(ctx, c.tenant.Group, schema) })
	if err != nil && !isOver(err) {
		if c.once {
			// A command that was interrupted still cleans up; where it cannot, the same command does.
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), p.o.GateWait)
			defer cancel()
		} else if retryable(err) {
			return err // the operation stays open and is resumed
		}
		made, terr := p.takeBack(ctx, *c, *op, p.named(err, *c))
		if !made || terr != nil {
			return errors.Join(err, terr)
		}
		err = nil // its commit's answer was lost, or another process was faster
	}
	if err == nil && c.outside != nil {
		err = c.outside(ctx)
	}
	if err == nil {
		err = inMain(finish)
	}
	if isOver(err) {
		// This process was taken for dead, and another one has ended the operation: as it was to end, or not.
		err = inMain(func(tx *postgres.OwnerTx) error {
			if now, oerr := registry.OperationByID(ctx, tx, (*op).ID); oerr != nil || now.State != registry.Done {
				return err
			}
			return ended(tx)
		})
	}
	return err
}

const codeOver = "operation_over"

// isOver reports whether somebody else has ended the operation.
func isOver(err error) bool {
	var f *fault.Fault
	return errors.As(err, &f) && f.Code == codeOver
}

// numberTaken reports whether the registry has a tenant of that number already. It is the registry's row that reserves
// a spare of another database: whoever was killed behind it holds the spare until its creation is finished or undone.
func numberTaken(err error) bool {
	var pe *pgconn.PgError
	return errors.As(err, &pe) && pe.Code == "23505" && pe.ConstraintName == "tenants_pkey"
}

// takeBack undoes the beginning of an operation whose schema cannot be made, and fails it, in one transaction. What an
// attempt has made stays, and made says so: then only forward is left. The operation lock keeps a process that was taken for
// dead from making the schema meanwhile.
func (p *Provisioner) takeBack(ctx context.Context, c change, op *registry.Operation, cause error) (made bool, err error) {
	err = p.o.DB.AsOwner(ctx, c.tenant.Group, func(there *postgres.OwnerTx) error {
		if err := there.LockOperation(ctx, c.tenant.Number, p.o.GateWait); err != nil {
			return err
		}
		if made, err = c.made(ctx, there); err != nil || made {
			return err
		}
		return p.inRegistry(ctx, there, c.tenant.Group, func(tx *postgres.OwnerTx) error {
			if c.undo != nil {
				if err := c.undo(ctx, tx); err != nil {
					return err
				}
			}
			return registry.Fail(ctx, tx, op.ID, fault.Of(cause))
		})
	})
	return made, err
}

// inRegistry runs fn in the registry's database: in the group's own transaction where that is the same one, so that an
// operation that is at work needs no second connection.
func (p *Provisioner) inRegistry(ctx context.Context, there *postgres.OwnerTx, group string, fn func(*postgres.OwnerTx) error) error {
	if p.o.DB.SameDatabase(group) {
		return fn(there)
	}
	return p.o.DB.AsOwner(ctx, postgres.MainGroup, fn)
}

// stillRunning refuses to go on with an operation that somebody else has ended, having taken this process for dead.
func (p *Provisioner) stillRunning(ctx context.Context, there *postgres.OwnerTx, c change, op *registry.Operation) error {
	return p.inRegistry(ctx, there, c.tenant.Group, func(tx *postgres.OwnerTx) error {
		now, err := registry.OperationByID(ctx, tx, op.ID)
		if err == nil && now.State != registry.Running {
			return fault.New(fault.Conflict, "the operation was taken back: its process had given no sign of life").WithCode(codeOver).
				WithHint("run the same command again")
		}
		return err
	})
}

// retryable reports whether the same step may succeed later.
func retryable(err error) bool {
	return fault.Is(err, fault.Unavailable) || fault.Is(err, fault.Locked) ||
		errors.Is(err, context.Canceled) || errors.Is(err, failpoint.ErrInjected)
}

// patiently repeats a transaction that found the tenant's gate or a lock taken, for as long as GateWait.
func (p *Provisioner) patiently(ctx context.Context, fn func() error) error {
	deadline := time.Now().Add(p.o.GateWait)
	for {
		err := fn()
		var f *fault.Fault
		if err == nil || !errors.As(err, &f) || f.Kind != fault.Locked || f.Code == "operation_running" || time.Now().After(deadline) {
			return err
		}
		timer := time.NewTimer(50 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return err
		}
	}
}

// named gives the errors of a change words that its person understands.
func (p *Provisioner) named(err error, c change) error {
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		f := func(code, format string, args ...any) *fault.Fault {
			return fault.Wrap(err, fault.Conflict, format, args...).WithCode(code).WithTenant(c.tenant.Slug.String())
		}
		switch {
		case pe.Code == "23505" && pe.ConstraintName == "tenants_slug":
			return f("tenant_exists", "a tenant of this name exists already").WithHint("oneo tenant show %s", c.tenant.Slug)
		case pe.Code == "23505" && pe.ConstraintName == "tenants_schema":
			return f("schema_taken", "another tenant has a schema of this name").WithHint("choose another one with --schema")
		case pe.Code == "42P06":
			return schemaExists(err).WithTenant(c.tenant.Slug.String())
		case pe.Code == "23505" && pe.ConstraintName == "operations_one_running":
			return fault.Wrap(err, fault.Locked, "another operation on this tenant has not ended").WithCode("operation_running")
		}
	}
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = c.tenant.Slug.String()
	}
	return err
}

func schemaExists(cause error) *fault.Fault {
	return fault.Wrap(cause, fault.Conflict, "a schema of this name exists already in the database, and is not one of oneo's").
		WithCode("schema_exists").WithHint("choose another one with --schema, or rename the schema that is there")
}

// find reads the tenant that a change is about. An operation on it that another process has begun is waited for, for as
// long as it shows signs of life, and finished here when that process is dead.
func (p *Provisioner) find(ctx context.Context, slug tenant.Slug) (tenant.Tenant, error) {
	t, _, err := p.findAndFinish(ctx, slug)
	return t, err
}

// findAndFinish is find, and says which kind of operation it has finished, if any.
func (p *Provisioner) findAndFinish(ctx context.Context, slug tenant.Slug) (t tenant.Tenant, finished string, err error) {
	deadline := time.Now().Add(p.o.GateWait + p.o.StaleAfter)
	for {
		var open registry.Operation
		var unfinished, ours bool
		err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
			if t, err = registry.BySlug(ctx, tx, slug); err != nil {
				return err
			}
			if open, unfinished, err = registry.Open(ctx, tx, t.Number); err != nil || !unfinished {
				return err
			}
			ours, err = registry.TakeUp(ctx, tx, open.ID, p.o.StaleAfter)
			return err
		})
		switch {
		case err != nil || !unfinished:
			return t, finished, err
		case ours:
			open.Attempts++
			if err := p.carryOut(ctx, open); err != nil && !errors.Is(err, errFillLost) {
				return t, "", err
			}
			finished = open.Kind
			continue
		case time.Now().After(deadline):
			return t, "", running(open).WithTenant(slug.String())
		}
		timer := time.NewTimer(100 * time.Millisecond)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return t, "", ctx.Err()
		}
	}
}

func running(op registry.Operation) *fault.Fault {
	return fault.New(fault.Locked, "the operation %s (%s) on this tenant has not ended", op.ID, op.Kind).
		WithCode("operation_running").WithRetry(time.Second).
		WithHint("wait for it; if its process died, the same command takes it up")
}

// request is what an operation's row holds of what was asked.
type request struct {
	Slug              string          `json:"slug,omitempty"`
	Name              string          `json:"name,omitempty"`
	Schema            string          `json:"schema,omitempty"`
	Group             string          `json:"group,omitempty"`
	Domains           []string        `json:"domains,omitempty"`
	AdminEmail        string          `json:"admin_email,omitempty"`
	AdminPasswordHash string          `json:"admin_password_hash,omitempty"`
	Settings          json.RawMessage `json:"settings,omitempty"`
	GraceSeconds      int64           `json:"grace_seconds,omitempty"`
	Adopt             *Adoption       `json:"adopt,omitempty"`
	Filled            bool            `json:"filled,omitempty"`
	Origin            *Origin         `json:"origin,omitempty"`
	KeepSeconds       int64           `json:"keep_seconds,omitempty"`
	Restore           *uuid.UUID      `json:"restore,omitempty"` // that is undone
	Move              *moving         `json:"move,omitempty"`
	Erase             *erasing        `json:"erase,omitempty"`
	Refill            *refilling      `json:"refill,omitempty"`
	// What a rename replaced, for undoing it.
	OldSlug   string `json:"old_slug,omitempty"`
	OldSchema string `json:"old_schema,omitempty"`
	OldName   string `json:"old_name,omitempty"`
}

func parseRequest(raw json.RawMessage) (request, error) {
	var r request
	if err := json.Unmarshal(raw, &r); err != nil {
		return r, fmt.Errorf("read the operation's request: %w", err)
	}
	return r, nil
}
