package provision

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const (
	pollEvery   = time.Second
	maxAttempts = 5
	// maxPurgesEach bounds what one look for overdue tenants purges, so that operations do not wait behind it.
	maxPurgesEach = 20
)

// Work carries out queued operations, takes up interrupted ones, purges tenants whose grace is over and keeps the pools
// of spare schemas, one spare at a time and while no operation waits, until ctx ends. Any number of processes may work at once.
func (p *Provisioner) Work(ctx context.Context) error {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	var looked time.Time
	var at place
	pools := keeper{paused: map[string]time.Time{}}
	for {
		for {
			did, err := p.workOnce(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				p.o.Logger.ErrorContext(ctx, "operations worker", "error", err)
				break
			}
			if !did {
				break
			}
		}
		if at != (place{}) || time.Since(looked) > time.Minute {
			looked = time.Now()
			var err error
			if at, err = p.purgeOverdue(ctx, at); err != nil && ctx.Err() == nil {
				p.o.Logger.ErrorContext(ctx, "purge overdue tenants", "error", err)
			}
			if _, err := p.ExpireReplaced(ctx); err != nil && ctx.Err() == nil {
				p.o.Logger.ErrorContext(ctx, "destroy what restores have kept", "error", err)
			}
			if _, err := p.ExpireMoved(ctx); err != nil && ctx.Err() == nil {
				p.o.Logger.ErrorContext(ctx, "destroy what moves have left behind", "error", err)
			}
		}
		if p.keepPools(ctx, &pools) {
			continue // operations first, then the next spare
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		case <-p.wake:
		}
	}
}

// Wake makes Work look for queued operations now instead of within a second.
func (p *Provisioner) Wake() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// workOnce claims one operation and carries it out. The error is the worker's, never the operation's.
func (p *Provisioner) workOnce(ctx context.Context) (bool, error) {
	op, found, err := p.claim(ctx)
	if err != nil || !found {
		return false, err
	}
	if err := p.carryOut(ctx, op); err != nil && ctx.Err() == nil {
		p.o.Logger.WarnContext(ctx, "operation failed", "operation", op.ID, "kind", op.Kind, "tenant", op.Slug, "error", err)
	}
	return true, nil
}

// claim marks the next operation as running in this process.
func (p *Provisioner) claim(ctx context.Context) (op registry.Operation, found bool, err error) {
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if op, found, err = registry.NextInterrupted(ctx, tx, p.o.StaleAfter); err != nil {
			return err
		}
		if !found {
			if op, found, err = registry.NextQueued(ctx, tx); err != nil || !found {
				return err
			}
		}
		op.Attempts++
		if op.Kind == KindCreate && !op.Begun { // its beginning gives the tenant a number
			op.Number = nil
			return registry.Start(ctx, tx, op.ID, 0)
		}
		if op.Number == nil {
			n, err := numberOf(ctx, tx, op)
			if err != nil {
				var f *fault.Fault
				if errors.As(err, &f) && f.Kind != fault.Unavailable {
					found = false
					return registry.Fail(ctx, tx, op.ID, f)
				}
				return err
			}
			op.Number = &n
		}
		if other, busy, err := registry.Open(ctx, tx, *op.Number); err != nil {
			return err
		} else if busy && other.ID != op.ID {
			found = false // it waits for the tenant's running operation
			return nil
		}
		return registry.Start(ctx, tx, op.ID, *op.Number)
	})
	return op, found, err
}

// numberOf is the tenant that an operation is about.
func numberOf(ctx context.Context, tx *postgres.OwnerTx, op registry.Operation) (int32, error) {
	slug, err := tenant.ParseSlug(op.Slug)
	if err != nil {
		return 0, err
	}
	t, err := registry.BySlug(ctx, tx, slug)
	return t.Number, err
}

// carryOut does what a running operation asks for, from where it was left, and ends it. Failures that may pass leave
// it running: it is taken up again when it has gone stale. One that has begun is never failed here: half of it stands,
// and only run knows how to take that back.
func (p *Provisioner) carryOut(ctx context.Context, op registry.Operation) error {
	stop := p.beat(ctx, op)
	defer stop()
	if op.Kind == KindMove { // which ends itself
		return p.resumeMove(ctx, op)
	}
	if op.Kind == KindRefill { // whose rows lie in a store
		return refillWaits(op)
	}
	c, err := p.changeOf(ctx, op)
	if err == nil && c == nil {
		return p.end(ctx, op, nil)
	}
	if err == nil {
		_, err = p.run(ctx, *c, &op)
	}
	if err == nil {
		return nil
	}
	if op.Begun || retryable(err) && op.Attempts < maxAttempts || ctx.Err() != nil {
		return err
	}
	return errors.Join(err, p.end(ctx, op, err))
}

func (p *Provisioner) end(ctx context.Context, op registry.Operation, cause error) error {
	err := p.o.DB.AsOwner(context.WithoutCancel(ctx), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if cause == nil {
			return registry.Finish(ctx, tx, op.ID, map[string]string{"tenant": op.Slug})
		}
		return registry.Fail(ctx, tx, op.ID, fault.Of(cause))
	})
	if fault.Is(err, fault.Conflict) { // ended by its own steps
		return nil
	}
	return err
}

// beat gives signs of life until it is stopped.
func (p *Provisioner) beat(ctx context.Context, op registry.Operation) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticker := time.NewTicker(max(p.o.StaleAfter/5, time.Millisecond))
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				err := p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error { return registry.Beat(ctx, tx, op.ID) })
				if err != nil && ctx.Err() == nil {
					p.o.Logger.WarnContext(ctx, "operation's sign of life", "operation", op.ID, "error", err)
				}
			}
		}
	}()
	return func() { cancel(); <-done }
}

// changeOf makes an operation's change from its row; nil when the tenant is in the wanted state already.
func (p *Provisioner) changeOf(ctx context.Context, op registry.Operation) (*change, error) {
	r, err := parseRequest(op.Request)
	if err != nil {
		return nil, err
	}
	if op.Kind == KindCreate {
		cr, err := r.create(op.Actor)
		if err != nil {
			return nil, err
		}
		if err := p.checkCreate(&cr); err != nil {
			return nil, err
		}
		var c change
		if op.Begun {
			c, err = p.creation(ctx, cr, *op.Number)
		} else {
			c, err = p.newCreation(ctx, cr)
		}
		return &c, err
	}
	var t tenant.Tenant
	err = p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		t, err = registry.ByNumber(ctx, tx, *op.Number)
		return err
	})
	if err != nil {
		return nil, err
	}
	return p.changeOn(ctx, t, op, r)
}

func (p *Provisioner) changeOn(ctx context.Context, t tenant.Tenant, op registry.Operation, r request) (*change, error) {
	var c change
	var err error
	// A begun operation goes on whatever the state says; a queued one finds the tenant as it is now.
	allowed := func(verb string, states ...tenant.State) error {
		for _, s := range states {
			if t.State == s || op.Begun {
				return nil
			}
		}
		return wrongState(t, verb, "oneo tenant show "+t.Slug.String())
	}
	switch op.Kind {
	case KindSuspend:
		if t.State == tenant.Suspended && !op.Begun {
			return nil, nil
		}
		c, err = p.stateChange(t, KindSuspend, "suspend", tenant.Suspended, op.Actor), allowed("suspended", tenant.Active)
	case KindResume:
		if t.State == tenant.Active && !op.Begun {
			return nil, nil
		}
		c, err = p.stateChange(t, KindResume, "resume", tenant.Active, op.Actor), allowed("resumed", tenant.Suspended)
	case KindDrop:
		if t.State == tenant.Dropped && !op.Begun {
			return nil, nil
		}
		c, err = p.dropping(t, time.Duration(r.GraceSeconds)*time.Second, op.Actor), allowed("dropped", tenant.Active, tenant.Suspended)
	case KindUndrop:
		if err = allowed("undropped", tenant.Dropped); err == nil {
			c, err = p.undropping(ctx, t, op.Actor)
		}
	case KindPurge:
		if err = allowed("purged", tenant.Dropped); err == nil {
			c, err = p.purging(ctx, t, op.Actor)
		}
	case KindErase:
		if r.Erase == nil {
			return nil, fault.New(fault.Invalid, "the operation does not say what is to be erased")
		}
		c, err = p.erasure(ctx, t, *r.Erase, op.Actor)
	case KindRestore: // whose rows are gone, unless they are in already
		c = p.restoring(t, RestoreRequest{Fill: Filling{Rows: fillLost}, Keep: time.Duration(r.KeepSeconds) * time.Second, Actor: op.Actor}, &Restored{})
	case KindReturn:
		if r.Restore == nil {
			return nil, fault.New(fault.Invalid, "the operation names no restore")
		}
		c = p.returning(t, *r.Restore, op.Actor, &Restored{})
	case KindRename:
		c, err = p.renameOf(t, op, r)
		if err == nil {
			err = allowed("renamed", tenant.Active, tenant.Suspended)
		}
	default:
		err = fault.New(fault.Invalid, "there is no operation of the kind %q", op.Kind)
	}
	if err != nil {
		return nil, err
	}
	return &c, nil
}

// renameOf makes a rename again. Once it has begun, the registry holds the new words and the row the old ones.
func (p *Provisioner) renameOf(t tenant.Tenant, op registry.Operation, r request) (change, error) {
	rr := RenameRequest{Slug: t.Slug, Schema: t.Schema, Name: t.Name, Actor: op.Actor}
	var err error
	if r.Slug != "" {
		if rr.Slug, err = tenant.ParseSlug(r.Slug); err != nil {
			return change{}, err
		}
	}
	if r.Schema != "" {
		if rr.Schema, err = tenant.ParseSchema(r.Schema); err != nil {
			return change{}, err
		}
	}
	if r.Name != "" {
		rr.Name = r.Name
	}
	if op.Begun {
		if t.Slug, err = tenant.ParseSlug(r.OldSlug); err != nil {
			return change{}, err
		}
		if t.Schema, err = tenant.ParseSchema(r.OldSchema); err != nil {
			return change{}, err
		}
		t.Name = r.OldName
	}
	return p.renaming(t, rr), nil
}

// place is where a look for overdue tenants ended: the next one goes on behind it, so that tenants that cannot be
// purged do not keep it from the others. The zero place is the beginning.
type place struct {
	after  time.Time
	number int32
}

// purgeOverdue destroys up to maxPurgesEach tenants whose grace is over, and returns where to go on; the zero place: it
// has seen all.
func (p *Provisioner) purgeOverdue(ctx context.Context, from place) (place, error) {
	type overdue struct {
		place
		slug string
	}
	var found []overdue
	err := p.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		const query = `select purge_after, number, slug from public.tenants
where state = 'dropped' and purge_after < now() and ($2 = 0 or (purge_after, number) > ($1, $2)) order by purge_after, number limit $3`
		rows, err := tx.Query(ctx, query, from.after, from.number, maxPurgesEach)
		if err != nil {
			return err
		}
		found, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (o overdue, err error) {
			return o, row.Scan(&o.after, &o.number, &o.slug)
		})
		return err
	})
	if err != nil {
		return place{}, err
	}
	var errs []error
	for _, o := range found {
		slug, err := tenant.ParseSlug(o.slug)
		if err == nil {
			_, err = p.purge(ctx, slug, "oneo serve", true)
		}
		// Somebody else has purged it, or brought it back.
		if err != nil && !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.NotFound) {
			errs = append(errs, fmt.Errorf("purge %s: %w", o.slug, err))
		}
	}
	if len(found) < maxPurgesEach {
		return place{}, errors.Join(errs...)
	}
	return found[len(found)-1].place, errors.Join(errs...)
}
