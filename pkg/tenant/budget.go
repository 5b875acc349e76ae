package tenant

import (
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Unlimited is a budget that an operator has taken away from one tenant.
const Unlimited = -1

// Budget bounds what the requests of one tenant may take, so that they cannot take it from the others. In one that an
// operator set for a tenant, 0 is the default of the configuration and Unlimited none; in one that Or has made, 0 is none.
type Budget struct {
	Requests         int           // in a second, of each server
	InFlight         int           // transactions at one time, of each server; each of them holds one connection
	StatementTimeout time.Duration // for one statement
	Storage          int64         // bytes of the tenant's schema, with indexes
	Records          int64         // rows of the table records that are not in the trash
}

// Or is b with the defaults where b says nothing.
func (b Budget) Or(defaults Budget) Budget {
	return Budget{
		Requests: or(b.Requests, defaults.Requests), InFlight: or(b.InFlight, defaults.InFlight),
		StatementTimeout: or(b.StatementTimeout, defaults.StatementTimeout),
		Storage:          or(b.Storage, defaults.Storage), Records: or(b.Records, defaults.Records),
	}
}

func or[T int | int64 | time.Duration](own, byDefault T) T {
	switch {
	case own < 0:
		return 0
	case own == 0:
		return byDefault
	}
	return own
}

// Use is what was measured last of what a tenant keeps. What was not measured is 0.
type Use struct {
	Storage, Records         int64
	StorageFull, RecordsFull bool // the budget was used up then
}

// Full reports whether a budget is used up: from the limit on, and once it is, until no more than 95 % is in use. So a
// tenant at its limit is not refused and served by turns.
func Full(used, limit int64, was bool) bool {
	return limit > 0 && (used >= limit || was && used > limit-limit/20)
}

// MayStore returns nil, or the fault of a tenant whose budget for storage is used up; MayAdd that of records. The budget
// must be one that Or has made.
func (t Tenant) MayStore() error {
	if !Full(t.Use.Storage, t.Budget.Storage, t.Use.StorageFull) {
		return nil
	}
	return fault.New(fault.Forbidden, "the storage of this tenant is used up").WithCode("storage_full").WithTenant(t.Slug.String()).
		WithHint("reading and deleting go on; room that was made counts from the next measurement, within minutes").
		WithDetails(map[string]int64{"used_bytes": t.Use.Storage, "limit_bytes": t.Budget.Storage})
}

// MayAdd is told of at MayStore.
func (t Tenant) MayAdd() error {
	if !Full(t.Use.Records, t.Budget.Records, t.Use.RecordsFull) {
		return nil
	}
	return fault.New(fault.Forbidden, "this tenant has as many records as it may have").WithCode("records_full").WithTenant(t.Slug.String()).
		WithHint("reading, changing and deleting go on; room that was made counts from the next measurement, within minutes").
		WithDetails(map[string]int64{"used": t.Use.Records, "limit": t.Budget.Records})
}
