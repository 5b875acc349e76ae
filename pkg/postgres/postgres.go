// Package postgres opens the databases of each group by name and binds work to one tenant. It is the only way to a
// connection: every statement runs either bound to a tenant (InTenant), on the shared tables as the app role
// (InShared), or as the owner (AsOwner, AsOwnerIn), and always inside a transaction that this package begins and ends.
//
// What a bound transaction is promised: PostgreSQL itself checked, under the tenant's gate, that the tenant is served
// from here; the search path is exactly the tenant's schema, ext and pg_temp; with isolation by role the rights are
// those of that tenant alone; and nothing of it outlives the transaction. A statement that was not bound finds an
// empty search path and fails.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// MainGroup is the group whose database holds the registry.
const MainGroup = "main"

// Isolation says whose rights a bound transaction has.
type Isolation string

const (
	// ByRole gives each tenant a role of its own: PostgreSQL refuses another tenant's table with 42501.
	ByRole Isolation = "role"
	// BySchema grants every schema to the app role: only the search path separates tenants.
	BySchema Isolation = "schema"
)

// Statements says whether prepared statements may be kept on a connection.
type Statements string

const (
	// Prepared keeps prepared statements on each connection; needs PgBouncer 1.21 or newer where one stands between.
	Prepared Statements = "prepared"
	// Unprepared keeps none, for older poolers in transaction mode.
	Unprepared Statements = "unprepared"
)

// Group is how one group's database is reached. An empty OwnerURL or DirectURL means the URL before it.
type Group struct {
	URL       string // logs in as the app role
	OwnerURL  string // logs in as the owner
	DirectURL string // as owner, past any pooler
}

// Range says which tenants a binary serves: those whose migrations have come at least to Min, which its code needs, and
// which no migration has closed to readers below a version above Head, the newest that it knows. A tenant that is merely
// newer is served: its migrations were made so that this code goes on working.
type Range struct{ Min, Head int }

// Options is everything that a DB can be told. Start from DefaultOptions.
type Options struct {
	Groups map[string]Group // by name; MainGroup must be there
	// Secret derives the passwords of the logins made by Setup.
	Secret    string
	AppRole   string
	OwnerRole string
	Isolation Isolation
	// MaxConns bounds the connections for tenants' work in each group, spread evenly over the sub-pools.
	MaxConns    int
	SharedConns int // for shared work as the app role, in each group
	OwnerConns  int // for the owner's work, in each group
	// InFlight caps the transactions of one tenant at one time; 0 is a quarter of MaxConns, but always at least one
	// connection fewer than its sub-pool has, and never less than one.
	InFlight int

	ConnectTimeout           time.Duration
	AcquireTimeout           time.Duration // for a free connection, and for a lost server to come back
	StatementTimeout         time.Duration
	IdleInTransactionTimeout time.Duration
	LockTimeout              time.Duration

	// Serves is the range of versions that InTenant binds to.
	Serves Range

	Statements Statements
	// HotStatements bounds the statement names kept per (tenant, statement) on each connection; 0 keeps none.
	HotStatements int
	// BackendMemory retires a connection whose backend is estimated to hold more than this many bytes.
	BackendMemory int64
	// MaxTenants, when above 0, replaces the computed number of tenants after which a connection is retired.
	MaxTenants int

	// Counter is told of transactions; nil: nobody is.
	Counter Counter
	// Tracer is told of statements on the pools' connections, besides; nil: nobody is.
	Tracer pgx.QueryTracer
	Logger *slog.Logger
}

// DefaultOptions are the defaults of the configuration; Groups and Secret are the caller's to fill.
func DefaultOptions() Options {
	return Options{
		AppRole: "oneo_app", OwnerRole: "oneo_owner", Isolation: ByRole,
		MaxConns: 32, SharedConns: 8, OwnerConns: 8,
		ConnectTimeout: 5 * time.Second, AcquireTimeout: 2 * time.Second, StatementTimeout: 15 * time.Second,
		IdleInTransactionTimeout: 30 * time.Second, LockTimeout: time.Second, Serves: Range{Head: math.MaxInt32},
		Statements: Prepared, HotStatements: 2048, BackendMemory: 512 << 20,
		Logger: slog.New(slog.DiscardHandler),
	}
}

func (o Options) validate() error {
	bad := func(format string, args ...any) error { return fault.New(fault.Invalid, "postgres: "+format, args...) }
	if o.Groups[MainGroup].URL == "" {
		return fault.New(fault.Invalid, "no database is configured").WithCode("no_database").
			WithHint("set ONEO_DATABASE_URL, or run `oneo dev`, which starts one")
	}
	for name, g := range o.Groups {
		for _, u := range []string{g.URL, g.OwnerURL, g.DirectURL} {
			if u == "" {
				continue
			}
			if _, err := pgx.ParseConfig(u); err != nil {
				return bad("the connection URL of group %s cannot be read", name) // err may quote the password
			}
		}
	}
	switch {
	case o.MaxConns < 1, o.SharedConns < 1, o.OwnerConns < 1:
		return bad("MaxConns, SharedConns and OwnerConns must be at least 1")
	case o.Isolation != ByRole && o.Isolation != BySchema:
		return bad("isolation is %q; use role or schema", o.Isolation)
	case o.Statements != Prepared && o.Statements != Unprepared:
		return bad("statements is %q; use prepared or unprepared", o.Statements)
	case o.Serves.Min < 0 || o.Serves.Head < o.Serves.Min || o.Serves.Head > math.MaxInt32:
		return bad("Serves must be a range of versions, not %d to %d", o.Serves.Min, o.Serves.Head)
	case o.AppRole == "" || o.OwnerRole == "":
		return bad("AppRole and OwnerRole must be named")
	case o.Logger == nil:
		return bad("Logger is nil")
	}
	for _, d := range []time.Duration{o.ConnectTimeout, o.AcquireTimeout, o.StatementTimeout, o.IdleInTransactionTimeout, o.LockTimeout} {
		if d <= 0 {
			return bad("timeouts must be above 0")
		}
	}
	return nil
}

// Querier is what a statement can be run on: a *Tx or an *OwnerTx.
type Querier interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

// Installation is what `oneo init` fixed for one group's database.
type Installation struct {
	ID      string // 8 hex digits: part of role names, which are cluster-wide
	Logins  int    // sub-pools' logins; 0: the app role itself
	AppRole string
}

// TenantRole is the name of a tenant's NOLOGIN role.
func (i Installation) TenantRole(number int32) string { return fmt.Sprintf("oneo_%s_%d", i.ID, number) }

// LoginOf is the login of the sub-pool that a tenant's work goes through.
func (i Installation) LoginOf(number int32) string {
	if i.Logins == 0 {
		return i.AppRole
	}
	return LoginName(i.AppRole, int(number)%i.Logins)
}

// LoginNames lists the logins that may bind: one per sub-pool, or the app role alone.
func (i Installation) LoginNames() []string {
	if i.Logins == 0 {
		return []string{i.AppRole}
	}
	names := make([]string, i.Logins)
	for k := range names {
		names[k] = LoginName(i.AppRole, k)
	}
	return names
}

// LoginName is the name of the k-th sub-pool's login, counting from 0.
func LoginName(appRole string, k int) string { return fmt.Sprintf("%s_%d", appRole, k+1) }

// DB reaches the databases of all groups. It is safe for concurrent use and must be closed.
type DB struct {
	opts           Options
	sharedInFlight *inFlight // tenants' requests on the shared tables

	mu     sync.Mutex
	groups map[string]*group
	closed bool
}

// Open checks the options. It connects nothing: each group is opened by its first use, and tried again by the next use
// when it could not be reached.
func Open(opts Options) (*DB, error) {
	if err := opts.validate(); err != nil {
		return nil, err
	}
	db := &DB{opts: opts, groups: make(map[string]*group)}
	shared := max(1, opts.SharedConns/4)
	db.sharedInFlight = newInFlight(shared, shared, opts.AcquireTimeout)
	for name, g := range opts.Groups {
		if g.OwnerURL == "" {
			g.OwnerURL = g.URL
		}
		if g.DirectURL == "" {
			g.DirectURL = g.OwnerURL
		}
		db.groups[name] = newGroup(name, g, &db.opts)
	}
	return db, nil
}

// Close closes every connection and waits for those in use.
func (db *DB) Close() {
	db.mu.Lock()
	db.closed = true
	groups := db.groups
	db.groups = nil
	db.mu.Unlock()
	for _, g := range groups {
		g.close()
	}
}

// Groups lists the names of the configured groups: main first, the others in alphabetical order.
func (db *DB) Groups() []string {
	names := []string{MainGroup}
	for name := range db.opts.Groups {
		if name != MainGroup {
			names = append(names, name)
		}
	}
	slices.Sort(names[1:])
	return names
}

// SameDatabase reports whether a group's schemas live in the database that holds the registry.
func (db *DB) SameDatabase(name string) bool { return name == MainGroup }

func (db *DB) group(name string) (*group, error) {
	db.mu.Lock()
	defer db.mu.Unlock()
	if db.closed {
		return nil, errors.New("database is closed")
	}
	g, ok := db.groups[name]
	if !ok {
		return nil, fault.New(fault.Invalid, "database group %q is not configured", name).WithCode("unknown_group").
			WithHint("set ONEO_DATABASE_GROUPS_%s_URL, or use one of: %s", strings.ToUpper(name), strings.Join(db.namesLocked(), ", "))
	}
	return g, nil
}

func (db *DB) namesLocked() []string {
	names := make([]string, 0, len(db.groups))
	for n := range db.groups {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// Installation reads what `oneo init` fixed for the group's database. Pending: init has not been run there.
func (db *DB) Installation(ctx context.Context, name string) (Installation, error) {
	g, err := db.group(name)
	if err != nil {
		return Installation{}, err
	}
	return g.installation(ctx)
}

// Isolation is how bound transactions are kept apart.
func (db *DB) Isolation() Isolation { return db.opts.Isolation }

// AppRole is the name of the app role.
func (db *DB) AppRole() string { return db.opts.AppRole }

// LockTimeout is how long a statement may wait for a lock.
func (db *DB) LockTimeout() time.Duration { return db.opts.LockTimeout }

// HasOwner reports whether a group's owner connection logs in as somebody who may act as the owner. Without a URL of its
// own it is the app's, who may not: such an instance serves tenants, and cannot make or change them.
func (db *DB) HasOwner(ctx context.Context, name string) (bool, error) {
	var has bool
	err := db.AsOwner(ctx, name, func(tx *OwnerTx) error {
		return tx.QueryRow(ctx, `select pg_catalog.pg_has_role(current_user, $1, 'usage')`, db.opts.OwnerRole).Scan(&has)
	})
	return has, err
}

// place names where a connection goes, without a password: host:port/database.
func place(cfg *pgconn.Config) string {
	return fmt.Sprintf("%s:%d/%s", cfg.Host, cfg.Port, url.PathEscape(cfg.Database))
}
