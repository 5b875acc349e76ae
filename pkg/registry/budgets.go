package registry

import (
	"context"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const budgetColumns = `b.requests, b.in_flight, b.statement_ms, b.storage, b.records, coalesce(b.storage_used, 0), coalesce(b.records_used, 0),
	coalesce(b.storage_full, false), coalesce(b.records_full, false)`

// budgetRow reads budgetColumns, of a row that may be missing.
type budgetRow struct {
	requests, inFlight, statement *int
	storage, records              *int64
	use                           tenant.Use
}

func (b *budgetRow) dest() []any {
	return []any{&b.requests, &b.inFlight, &b.statement, &b.storage, &b.records, &b.use.Storage, &b.use.Records, &b.use.StorageFull, &b.use.RecordsFull}
}

func (b *budgetRow) budget() tenant.Budget {
	return tenant.Budget{
		Requests: said(b.requests), InFlight: said(b.inFlight), StatementTimeout: time.Duration(said(b.statement)) * statementUnit,
		Storage: said(b.storage), Records: said(b.records),
	}
}

// said is a number as a Budget has it: a row has null for the default and 0 for none.
func said[T int | int64](n *T) T {
	switch {
	case n == nil:
		return 0
	case *n == 0:
		return tenant.Unlimited
	}
	return *n
}

const statementUnit = time.Millisecond

// BudgetOf reads what is set for a tenant, what was measured last, and when; nil: never.
func BudgetOf(ctx context.Context, q postgres.Querier, number int32) (b tenant.Budget, u tenant.Use, at *time.Time, err error) {
	var row budgetRow
	err = q.QueryRow(ctx, `select `+budgetColumns+`, b.measured_at from public.budgets b where b.tenant = $1`, number).Scan(append(row.dest(), &at)...)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return row.budget(), row.use, at, err
}

// ChangeBudget changes what is set for a tenant and says what it was and is. What was full by a limit that has changed is
// judged anew.
func ChangeBudget(ctx context.Context, q postgres.Querier, number int32, change func(tenant.Budget) tenant.Budget) (was, is tenant.Budget, err error) {
	// Two who change it come one after the other.
	if _, err := q.Exec(ctx, `select from public.tenants where number = $1 for no key update`, number); err != nil {
		return was, is, err
	}
	if was, _, _, err = BudgetOf(ctx, q, number); err != nil {
		return was, is, err
	}
	is = change(was)
	return was, is, setBudget(ctx, q, number, is)
}

func setBudget(ctx context.Context, q postgres.Querier, number int32, b tenant.Budget) error {
	const set = `insert into public.budgets as b (tenant, requests, in_flight, statement_ms, storage, records) values ($1, $2, $3, $4, $5, $6)
on conflict (tenant) do update set requests = $2, in_flight = $3, statement_ms = $4, storage = $5, records = $6,
	storage_full = b.storage_full and b.storage is not distinct from $5, records_full = b.records_full and b.records is not distinct from $6`
	timeout := b.StatementTimeout
	if timeout > 0 {
		timeout /= statementUnit
	}
	_, err := q.Exec(ctx, set, number, stored(b.Requests), stored(b.InFlight), stored(int(timeout)), stored(b.Storage), stored(b.Records))
	return err
}

// stored is what said reads.
func stored[T int | int64](n T) *T {
	switch {
	case n == 0:
		return nil
	case n < 0:
		n = 0
	}
	return &n
}

// Budgeted are the tenants whose storage or records are bounded, by their own budgets or by the defaults, and that were
// not measured within the time, with what is in force for them. One that was measured in the future has been too: a clock
// was set back.
func Budgeted(ctx context.Context, q postgres.Querier, defaults tenant.Budget, within time.Duration) ([]tenant.Tenant, error) {
	const due = `select ` + tenantColumns + `, ` + budgetColumns + fromTenants + ` left join public.budgets b on b.tenant = t.number
where t.state in ('active', 'suspended') and (coalesce(b.storage, $1) > 0 or coalesce(b.records, $2) > 0)
  and (b.measured_at is null or b.measured_at <= now() - $3::interval or b.measured_at > now()) order by t.number`
	rows, err := q.Query(ctx, due, defaults.Storage, defaults.Records, within)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.Tenant, error) {
		var b budgetRow
		t, err := scanTenant(row, b.dest()...)
		t.Budget, t.Use = b.budget().Or(defaults), b.use
		return t, err
	})
}

// SetUse notes what was measured of tenants now.
func SetUse(ctx context.Context, q postgres.Querier, measured []tenant.Tenant) error {
	const set = `insert into public.budgets (tenant, storage_used, records_used, storage_full, records_full, measured_at)
select m.*, now() from unnest($1::int[], $2::bigint[], $3::bigint[], $4::boolean[], $5::boolean[]) m
on conflict (tenant) do update set storage_used = excluded.storage_used, records_used = excluded.records_used,
	storage_full = excluded.storage_full, records_full = excluded.records_full, measured_at = excluded.measured_at`
	n := len(measured)
	numbers, storage, records, storageFull, recordsFull := make([]int32, n), make([]int64, n), make([]int64, n), make([]bool, n), make([]bool, n)
	for i, t := range measured {
		numbers[i], storage[i], records[i] = t.Number, t.Use.Storage, t.Use.Records
		storageFull[i], recordsFull[i] = t.Use.StorageFull, t.Use.RecordsFull
	}
	_, err := q.Exec(ctx, set, numbers, storage, records, storageFull, recordsFull)
	return err
}

// Budgets reads what is set for tenants and what was measured last, by their numbers; one of whom there is nothing is missing.
func Budgets(ctx context.Context, q postgres.Querier, numbers []int32) (map[int32]tenant.Tenant, error) {
	rows, err := q.Query(ctx, `select b.tenant, t.group_name, `+budgetColumns+` from public.budgets b join public.tenants t on t.number = b.tenant where b.tenant = any($1)`, numbers)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out := map[int32]tenant.Tenant{}
	for rows.Next() {
		var t tenant.Tenant
		var b budgetRow
		if err := rows.Scan(append([]any{&t.Number, &t.Group}, b.dest()...)...); err != nil {
			return nil, err
		}
		t.Budget, t.Use = b.budget(), b.use
		out[t.Number] = t
	}
	return out, rows.Err()
}
