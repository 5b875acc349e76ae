// Package observe counts what a server does for whom, keeps its last log lines, and tells both: to Prometheus, to the dashboard, and by the
// hour to PostgreSQL. Counting never waits for a database, a file or the network, and holds a bounded number of tenants apart.
package observe

import (
	"time"

	"github.com/google/uuid"
)

// Stats is what one server has counted since StartedAt. Counts only grow: a rate is the difference of two readings of the same Instance.
type Stats struct {
	Instance  uuid.UUID `json:"instance"`
	Host      string    `json:"host"`
	PID       int       `json:"pid"`
	Version   string    `json:"version"`
	StartedAt time.Time `json:"started_at"`
	At        time.Time `json:"at"`

	All     Load         `json:"all"`     // every request, those to public and unknown hosts too
	Tenants []TenantLoad `json:"tenants"` // those served lately, by number; at most MaxTenants
	Pools   []Pool       `json:"pools"`   // by group
	Cache   Cache        `json:"cache"`
	Runtime Runtime      `json:"runtime"`
}

// MaxTenants bounds how many tenants Stats holds apart; the counts of those that were quiet longest are only in All then.
const MaxTenants = 10_000

// Load is what requests have cost.
type Load struct {
	Requests int64 `json:"requests"`
	Errors   int64 `json:"errors"`  // answered 5xx by our fault: without Refused, and without tenants that are suspended or being changed
	Refused  int64 `json:"refused"` // answered 429 or 503 for a budget or a limit
	InFlight int64 `json:"in_flight"`
	// Database is the time that transactions took, from getting a connection to its release.
	DatabaseSeconds float64 `json:"database_seconds"`
	Transactions    int64   `json:"transactions"`
	Rows            int64   `json:"rows"` // read or written by statements
	// Of the answers of the last minute, in milliseconds; 0: there was none. Within 10 % of the true value.
	P50 float64 `json:"p50_ms"`
	P95 float64 `json:"p95_ms"`
	P99 float64 `json:"p99_ms"`
}

// TenantLoad is one tenant's.
type TenantLoad struct {
	Number int32  `json:"number"`
	Tenant string `json:"tenant"` // its slug when it was served last
	Load
}

// Pool is one group's connections for tenants' work.
type Pool struct {
	Group    string  `json:"group"`
	Max      int64   `json:"max"`
	InUse    int64   `json:"in_use"`
	Idle     int64   `json:"idle"`
	Waits    int64   `json:"waits"` // acquisitions that had to wait, so far
	WaitSecs float64 `json:"wait_seconds"`
	Retired  int64   `json:"retired"`     // connections replaced for the tenants that they had seen, so far
	Tenants  int64   `json:"tenants_max"` // distinct tenants of the connection that has seen most
}

// Cache is what Redis, or the process instead of it, did.
type Cache struct {
	Redis       bool  `json:"redis"` // false: no Redis is set
	Up          bool  `json:"up"`
	Hits        int64 `json:"hits"`
	Misses      int64 `json:"misses"`
	MemoryBytes int64 `json:"memory_bytes"` // of Redis; 0: unknown
}

// Runtime is the process.
type Runtime struct {
	Goroutines  int   `json:"goroutines"`
	MemoryBytes int64 `json:"memory_bytes"` // held from the operating system
}
