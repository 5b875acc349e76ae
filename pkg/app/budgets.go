package app

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// BudgetOf are the defaults of a configuration for each tenant; 0: none. Those that an older setting stands for are the
// older setting's where budgets does not say otherwise.
func BudgetOf(c config.Config) tenant.Budget {
	b := tenant.Budget{
		Requests: c.Budgets.Requests, InFlight: c.Budgets.InFlight, StatementTimeout: c.Budgets.StatementTimeout,
		Storage: int64(c.Budgets.Storage), Records: c.Budgets.Records,
	}
	if b.Requests == 0 {
		b.Requests = c.Server.RequestsPerTenant
	}
	return b
}

// measureBudgetsEach is how often tenants are looked for that are due to be measured.
const measureBudgetsEach = 30 * time.Second

func (a *App) measureBudgets(ctx context.Context) {
	for {
		if n, err := a.MeasureBudgets(ctx, a.Config.Budgets.Measure); err != nil && ctx.Err() == nil {
			a.Log.Warn("measure what tenants keep; what was measured before stands", "error", err)
		} else if n > 0 {
			a.Log.Debug("measured what tenants keep", "tenants", n)
		}
		if !wait(ctx, measureBudgetsEach) {
			return
		}
	}
}

// measureAtOnce is how many tenants one statement measures, and one transaction of the registry notes.
const measureAtOnce = 200

// MeasureBudgets measures the tenants whose storage or records are bounded and that were not measured within the time, and
// notes whose budget is used up; the servers hear of those with whom that has changed. A tenant that cannot be measured
// keeps what was measured before, and holds up no other. It says how many were measured.
func (a *App) MeasureBudgets(ctx context.Context, within time.Duration) (measured int, err error) {
	var due []tenant.Tenant
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		due, err = registry.Budgeted(ctx, tx, BudgetOf(a.Config), within)
		return err
	})
	if err != nil {
		return 0, err
	}
	byGroup := map[string][]tenant.Tenant{}
	for _, t := range due {
		byGroup[t.Group] = append(byGroup[t.Group], t)
	}
	var errs []error
	for _, ts := range byGroup {
		for some := range slices.Chunk(ts, measureAtOnce) {
			done, err := a.measure(ctx, some)
			if nerr := a.noteUse(ctx, done, due); nerr != nil {
				return measured, nerr
			}
			measured += len(done)
			errs = append(errs, err)
			if postgres.Away(err) { // the others of this database have to wait for it too
				break
			}
		}
	}
	return measured, errors.Join(errs...)
}

// Measure measures one tenant now; its Budget must be the one in force.
func (a *App) Measure(ctx context.Context, t tenant.Tenant) error {
	ts, err := a.measure(ctx, []tenant.Tenant{t})
	if err != nil {
		return err
	}
	return a.noteUse(ctx, ts, []tenant.Tenant{t})
}

// measure measures tenants of one group, whose Budget is the one in force, and returns those of whom it succeeded.
func (a *App) measure(ctx context.Context, ts []tenant.Tenant) (done []tenant.Tenant, err error) {
	sizes, err := a.sizes(ctx, ts)
	if err != nil && len(ts) > 1 && ctx.Err() == nil && !postgres.Away(err) {
		// One of them is locked by a migration, say: the others are measured without it.
		first, err1 := a.measure(ctx, ts[:len(ts)/2])
		second, err2 := a.measure(ctx, ts[len(ts)/2:])
		return append(first, second...), errors.Join(err1, err2)
	}
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, t := range ts {
		size, there := sizes[t.Number]
		if !there { // it has moved meanwhile
			continue
		}
		was := t.Use
		t.Use = tenant.Use{Storage: size, StorageFull: tenant.Full(size, t.Budget.Storage, was.StorageFull)}
		if t.Budget.Records > 0 {
			if t.Use.Records, err = a.records(ctx, t); err != nil {
				errs = append(errs, err)
				if ctx.Err() != nil || postgres.Away(err) {
					break
				}
				continue
			}
			t.Use.RecordsFull = tenant.Full(t.Use.Records, t.Budget.Records, was.RecordsFull)
		}
		done = append(done, t)
	}
	return done, errors.Join(errs...)
}

// measureWithin bounds one statement of a measurement.
const measureWithin = time.Minute

// measuring is a transaction of a measurement. It ends by itself also where PostgreSQL says nothing any more: the tenants of
// other groups are measured after it.
func (a *App) measuring(ctx context.Context, group string, fn func(context.Context, *postgres.OwnerTx) error) error {
	ctx, cancel := context.WithTimeout(ctx, a.measureWithin*3/2)
	defer cancel()
	return a.DB.AsOwnerWithin(ctx, group, postgres.OwnerOptions{StatementTimeout: a.measureWithin}, func(tx *postgres.OwnerTx) error { return fn(ctx, tx) })
}

// sizes are the bytes of the tenants' tables with indexes and all, in one statement: the files are asked, no row is read.
func (a *App) sizes(ctx context.Context, ts []tenant.Tenant) (sizes map[int32]int64, err error) {
	numbers := make([]int32, len(ts))
	for i, t := range ts {
		numbers[i] = t.Number
	}
	sizes = make(map[int32]int64, len(ts))
	const query = `select p.number, coalesce(sum(pg_catalog.pg_total_relation_size(c.oid)), 0)::bigint
from public.placements p left join pg_catalog.pg_class c on c.relnamespace = p.namespace and c.relkind in ('r', 'm')
where p.number = any($1) group by p.number`
	err = a.measuring(ctx, ts[0].Group, func(ctx context.Context, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, query, numbers)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var number int32
			var size int64
			if err := rows.Scan(&number, &size); err != nil {
				return err
			}
			sizes[number] = size
		}
		return rows.Err()
	})
	return sizes, err
}

// records counts the records that are not in the trash. A product's own migrations may have no such table: then there are
// none.
func (a *App) records(ctx context.Context, t tenant.Tenant) (n int64, err error) {
	err = a.measuring(ctx, t.Group, func(ctx context.Context, tx *postgres.OwnerTx) error {
		if err := tx.BindPlaced(ctx, t.Number); err != nil {
			return err
		}
		var there bool
		if err := tx.QueryRow(ctx, `select pg_catalog.to_regclass('records') is not null`).Scan(&there); err != nil || !there {
			return err
		}
		return tx.QueryRow(ctx, `select count(*) from records where deleted_at is null`).Scan(&n)
	})
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = t.Slug.String()
	}
	return n, err
}

// noteUse writes what was measured, and tells the servers of those who are full now and were not before, or the other way
// round.
func (a *App) noteUse(ctx context.Context, ts, before []tenant.Tenant) error {
	if len(ts) == 0 {
		return nil
	}
	was := make(map[int32]tenant.Use, len(before))
	for _, t := range before {
		was[t.Number] = t.Use
	}
	var turned []tenant.Host
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		for _, t := range ts {
			if u := was[t.Number]; u.StorageFull == t.Use.StorageFull && u.RecordsFull == t.Use.RecordsFull {
				continue
			}
			ds, err := registry.Domains(ctx, tx, t)
			if err != nil {
				return err
			}
			for _, d := range ds {
				turned = append(turned, d.Host)
			}
		}
		return registry.SetUse(ctx, tx, ts)
	})
	if err == nil {
		a.forget(ctx, turned...)
	}
	return err
}
