// Package tenant holds the words of a schema-per-tenant product: Slug, Schema, Host, State and Tenant. They are parsed
// at the door and opaque inside: whoever holds a Slug, Schema or Host that is not zero holds a valid one, and no other
// room makes an identifier or a host name from text.
package tenant

import (
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// State is where a tenant is in its life.
type State string

const (
	// Creating is a tenant whose schema does not exist yet, because it lives in another database than the registry.
	Creating State = "creating"
	// Active is a tenant that is served.
	Active State = "active"
	// Suspended is a tenant that is kept and not served (503).
	Suspended State = "suspended"
	// Dropped is a tenant whose schema is renamed away and kept for a grace period (410).
	Dropped State = "dropped"
	// Purged is a tenant of which nothing is left but its registry row; its slug is free again.
	Purged State = "purged"
)

// States lists every state, in the order of a tenant's life.
var States = []State{Creating, Active, Suspended, Dropped, Purged}

// ParseState reads a state as written.
func ParseState(s string) (State, error) {
	for _, st := range States {
		if string(st) == s {
			return st, nil
		}
	}
	return "", fault.New(fault.Invalid, "unknown tenant state %q", clip(s)).
		WithHint("use one of creating, active, suspended, dropped, purged")
}

// Tenant is what the rest of oneo needs to know to work for one tenant. It is a value: it says how the tenant was when
// the registry was read, and the binding of work to it checks the placement anew each time.
type Tenant struct {
	Number  int32  // for locks and role names; never reused, always above 0
	ID      string // uuid, for the outside
	Slug    Slug
	Schema  Schema // never zero; of a dropped tenant: the name that it had
	Group   string // the database group that holds the schema
	State   State
	Name    string // for display
	Primary Host   // the canonical domain
	// Epoch counts changes of placement: rename, move, suspend, resume, drop.
	Epoch int64
	// CacheGeneration is part of every cache key of the tenant; raising it flushes the tenant's cache.
	CacheGeneration int64
	CreatedAt       time.Time
	// Budget is what an operator has set for the tenant, and Use what was measured last: known of one found by its host,
	// zero otherwise.
	Budget Budget
	Use    Use
}

// IsZero reports whether t is no tenant at all.
func (t Tenant) IsZero() bool { return t.Number == 0 || t.Schema.IsZero() }

// Serving returns nil for an active tenant and otherwise the fault that says why it is not served.
func (t Tenant) Serving() error {
	switch t.State {
	case Active:
		return nil
	case Dropped, Purged:
		return fault.New(fault.Gone, "this tenant has been removed").WithCode("tenant_gone").WithTenant(t.Slug.String())
	default:
		return fault.New(fault.Suspended, "this tenant is not available at the moment").
			WithCode("tenant_" + string(t.State)).WithTenant(t.Slug.String()).WithRetry(30 * time.Second)
	}
}
