package tui

import (
	"encoding/json"
	"time"
)

// Fleet is what the home screen counts.
type Fleet struct {
	At         time.Time // by the database's clock
	Tenants    []StateCount
	Versions   []VersionCount // of tenants that are served or suspended
	Head       int            // the version that this oneo's migrations lead to
	Servers    []Server
	Open       []Operation // at work or waiting, the oldest first; the first few
	OpenCount  int
	FailedDay  int // operations that failed within a day
	Runs       []Run
	Database   Database
	Unreadable []string // groups whose database did not answer
}

// StateCount is how many tenants are in a state.
type StateCount struct {
	State string `json:"state"`
	N     int    `json:"n"`
}

// VersionCount is how many tenants are at a version.
type VersionCount struct {
	Version int `json:"version"`
	N       int `json:"n"`
}

// Database is the main group's server.
type Database struct {
	Sessions int `json:"sessions"`
	Max      int `json:"max"`
	Waiting  int `json:"waiting"` // sessions that wait for a lock
}

// Server is one running `oneo serve`.
type Server struct {
	ID      string    `json:"id"`
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	OpsAddr string    `json:"ops_addr"`
	Started time.Time `json:"started_at"`
	Beat    time.Time `json:"heartbeat"`
}

// Reading is what one server has counted since it was started: a rate is the difference of two.
type Reading struct {
	Server  Server
	At      time.Time
	Err     string
	All     Load
	Tenants []TenantLoad
	Pools   []Pool
	Redis   Redis
	Memory  int64 // bytes
}

// Load is what requests have cost.
type Load struct {
	Requests, Errors, Refused, InFlight int64
	DatabaseSeconds                     float64
	P50, P95, P99                       float64 // milliseconds, of the last minute; 0: none
}

// TenantLoad is one tenant's.
type TenantLoad struct {
	Number int32
	Tenant string
	Load
}

// Pool is one group's connections for tenants' work.
type Pool struct {
	Group                      string
	Max, InUse, Waits, Retired int64
}

// Redis is the shared cache, or what stands in for it.
type Redis struct {
	Set, Up              bool
	Hits, Misses, Memory int64 // Memory in bytes; 0: unknown
}

// Ages is how old backups are. Of tenants that are served or suspended.
type Ages struct {
	Set     bool // a store is configured
	Tenants int
	Without int // tenants that have none
	Oldest  time.Time
	Whose   string    // the tenant of the oldest one
	Newest  time.Time // of all
}

// Tenant is one line of the tenants' screen.
type Tenant struct {
	Number  int32
	Slug    string
	Name    string
	Schema  string
	Group   string
	State   string
	Version int // 0: unknown
	Host    string
	ID      string
	Created time.Time
	Purge   time.Time // when a dropped one goes; zero otherwise
}

// Run is one run over many tenants.
type Run struct {
	ID                                   string
	Kind                                 string
	State                                string
	Actor                                string
	Queued, Running, OK, Skipped, Failed int
	Wave, Waves                          int // the wave at work, counting from 1
	Alive                                bool
	Created                              time.Time
	Finished                             time.Time // zero: it has not
	Error                                string
}

// Task is a tenant's part of a run.
type Task struct {
	Tenant   string
	State    string
	From, To int
	Attempts int
	Duration time.Duration
	Error    string
	Hint     string
}

// Backup is one backup of a tenant.
type Backup struct {
	ID        string
	Tenant    string
	Made      time.Time
	Version   int
	Rows      int64
	Bytes     int64
	Encrypted bool
	Kept      bool
	Reason    string
}

// Session is a PostgreSQL session that works for a tenant.
type Session struct {
	Group  string
	PID    int32
	Tenant string // "": for none at the moment
	Login  string
	State  string // "": PostgreSQL does not show it to who asks
	Wait   string
	Begun  time.Time // of the transaction; zero: none, or not shown
	Since  time.Time // of the statement
	Query  string    // "": not shown
	From   string
}

// Lock is a lock that is held or waited for, and holds somebody up.
type Lock struct {
	Group   string
	PID     int32
	Tenant  string
	Kind    string
	On      string
	Mode    string
	Granted bool
	Since   time.Time // since when it is waited for; zero: it is held
	Behind  []int32   // the sessions that it waits for
}

// Operation is one piece of work on a tenant.
type Operation struct {
	ID       string
	Kind     string
	Tenant   string
	State    string
	Actor    string
	Attempts int
	Created  time.Time
	Started  time.Time
	Finished time.Time
	Error    string
	Hint     string
}

// AuditLine is one line of the audit trail.
type AuditLine struct {
	ID      int64
	At      time.Time
	Actor   string
	Action  string
	Tenant  string
	Request string
	Details json.RawMessage
}

// Domain is one host of a tenant.
type Domain struct {
	Host    string
	Tenant  string
	Primary bool
	State   string // the tenant's
	Created time.Time
}

// User is one account of a tenant.
type User struct {
	ID       string
	Email    string
	Name     string
	Role     string
	Disabled time.Time // zero: it may log in
	Created  time.Time
}

// LogLine is one line that a server has logged.
type LogLine struct {
	At      time.Time
	Level   string
	Server  string
	Tenant  string
	Message string
	Request string
	Fields  string // the others, as key=value
}
