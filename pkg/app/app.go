// Package app puts the parts of oneo together from a configuration, and takes them apart last-first. It knows neither
// flags nor signals.
package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/snapshot"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/trace"
	"github.com/oneo-crm/oneo/pkg/transfer"
	"github.com/oneo-crm/oneo/schemas"
)

// App is one process's oneo. It is safe for concurrent use and must be closed.
type App struct {
	Config  config.Config
	Version string
	// Environ is as os.Environ: the keys of the store of backups, and what the programs around a backup see. Whoever opens
	// the App sets it before that store is used.
	Environ   []string
	Log       *slog.Logger
	Logs      *observe.Logs // the last lines of Log
	DB        *postgres.DB
	Cache     *cache.Cache
	Migrate   *migrate.Migrator
	Structure *structure.Checker
	Provision *provision.Provisioner
	Rollout   *rollout.Runner
	Snapshots *snapshot.Snapshots
	Transfers *transfer.Transfers
	Marker    *registry.Marker // nil: no restore points are set
	Resolver  *registry.Resolver
	Hasher    *auth.Hasher
	Counter   *observe.Counter // nil: nothing is counted
	Base      tenant.Host      // a tenant's default domain is <slug>.<base>

	versions *versions
	tracer   trace.Tracer // nil: nothing is traced
	closers  []func() error

	measureWithin time.Duration
}

// Open makes the parts; version is the program's; without a log nothing is logged. It connects nothing: each connects at its first use.
func Open(c config.Config, version string, log *slog.Logger) (*App, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	a := &App{Config: c, Version: version, Logs: observe.NewLogs(int(c.Log.Keep)), Hasher: auth.NewHasher(c.Auth.HashConcurrency), measureWithin: measureWithin}
	a.Log = slog.New(a.Logs.Handler(log.Handler()))
	if err := a.open(); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// Close takes the parts apart, the last one first.
func (a *App) Close() error {
	var errs []error
	for i := len(a.closers) - 1; i >= 0; i-- {
		errs = append(errs, a.closers[i]())
	}
	a.closers = nil
	return errors.Join(errs...)
}

func (a *App) onClose(fn func() error) { a.closers = append(a.closers, fn) }

func (a *App) open() (err error) {
	c := a.Config
	if a.Base, err = tenant.ParseHost(c.Server.BaseDomain); err != nil {
		return err
	}
	mo, err := migrations(c)
	if err != nil {
		return err
	}
	do := DatabaseOptions(c, a.Log)
	if do.Serves, err = served(c); err != nil {
		return err
	}
	if a.tracer, err = trace.Open(trace.Options{Endpoint: c.Tracing.Endpoint, Sample: c.Tracing.Sample, Version: a.Version, Logger: a.Log}); err != nil {
		return err
	}
	co := cache.Options{URL: c.Redis.URL, Timeout: c.Redis.Timeout, Logger: a.Log}
	if a.tracer != nil {
		a.onClose(a.tracer.Close)
		do.Tracer, co.Trace = a.tracer.Postgres(), a.tracer.Redis
	}
	if c.Metrics.Enabled {
		a.Counter = observe.NewCounter(c.Metrics.Tenants)
		do.Counter = a.Counter
	}
	if a.DB, err = postgres.Open(do); err != nil {
		return err
	}
	a.onClose(func() error { a.DB.Close(); return nil })
	a.versions = newVersions(a.DB, c.Schemas.Poll, a.Log)
	if a.Cache, err = cache.Open(co); err != nil {
		return err
	}
	a.onClose(a.Cache.Close)
	if a.Migrate, err = migrate.New(a.DB, mo); err != nil {
		return err
	}
	tenantTTL := c.Cache.TenantTTL
	if c.Redis.URL == "" {
		tenantTTL = min(tenantTTL, aloneTenantTTL)
	}
	a.Resolver, err = registry.NewResolver(registry.ResolverOptions{
		Lookup: a.lookup, Shared: hostCache{a.Cache}, TTL: tenantTTL, NegativeTTL: c.Cache.NegativeTTL,
		SharedTTL: c.Cache.SharedTTL, Timeout: c.Database.AcquireTimeout + time.Second, Size: 100_000,
		Grace: registry.Grace{For: c.Cache.TenantGrace, Away: postgres.Away, Logger: a.Log},
	})
	if err != nil {
		return err
	}
	if a.Structure, err = structure.New(structure.Options{DB: a.DB, Head: a.Migrate.Head(migrate.TenantSet), Make: a.Migrate.Create}); err != nil {
		return err
	}
	if c.Backup.Physical.Engine != "" {
		a.Marker = registry.NewMarker(a.DB, a.Log)
	}
	po := provision.Options{
		DB: a.DB, Migrate: a.Migrate, Structure: a.Structure, BaseDomain: a.Base, DropGrace: c.Tenancy.DropGrace, DomainHold: c.Tenancy.DomainHold,
		PoolSize: c.Provisioning.PoolSize, Changed: a.changed, Secret: c.Server.Secret, Uncache: a.Cache.Erase, Marker: a.Marker, Logger: a.Log,
	}
	if c.Backup.URL != "" {
		po.Archives = archives{a}
	}
	a.Provision, err = provision.New(po)
	if err != nil {
		return err
	}
	a.Snapshots, err = snapshot.New(snapshot.Options{DB: a.DB, Migrate: a.Migrate, Keep: c.Migrate.UndoKeep, Logger: a.Log})
	if err != nil {
		return err
	}
	to := transfer.Options{DB: a.DB, Migrate: a.Migrate, Structure: a.Structure, Provision: a.Provision, BaseDomain: a.Base, Version: a.Version, Marker: a.Marker, Logger: a.Log}
	to.Secret = c.Server.Secret
	if c.Schemas.Dir == "" { // in a folder of the operator's own a table of that name may be anything
		to.Volatile, to.Personal = []string{auth.SessionsTable}, personal
	}
	if a.Transfers, err = transfer.New(to); err != nil {
		return err
	}
	a.Rollout, err = rollout.New(rollout.Options{DB: a.DB, StaleAfter: c.Migrate.StaleAfter, Marker: a.Marker, Logger: a.Log})
	return err
}

// migrations says where a configuration has its migrations.
func migrations(c config.Config) (o migrate.Options, err error) {
	o.Files = schemas.Files
	if c.Schemas.Dir != "" {
		o.TenantDir = c.Schemas.Dir
		o.Tenant, err = folder(c.Schemas.Dir)
	}
	return o, err
}

// Migrations are a set of a configuration's migrations, which are read without a database.
func Migrations(c config.Config, set migrate.Set) ([]migrate.File, error) {
	o, err := migrations(c)
	if err != nil {
		return nil, err
	}
	m, err := migrate.New(nil, o)
	if err != nil {
		return nil, err
	}
	return m.Files(set), nil
}

// served is the range of versions at which this process serves tenants.
func served(c config.Config) (postgres.Range, error) {
	files, err := Migrations(c, migrate.TenantSet)
	if err != nil {
		return postgres.Range{}, err
	}
	least := schemas.MinTenantVersion
	if c.Schemas.Dir != "" {
		least = c.Schemas.MinVersion
	}
	if least > len(files) {
		return postgres.Range{}, fault.New(fault.Invalid, "schemas.min_version is %d, and the folder %s has %d migration(s)", least, c.Schemas.Dir, len(files)).
			WithCode("setting").WithHint("set it to the least version that the product can work with")
	}
	return postgres.Range{Min: least, Head: len(files)}, nil
}

func folder(dir string) (fs.FS, error) {
	st, err := os.Stat(dir)
	if err != nil || !st.IsDir() {
		return nil, fault.New(fault.Invalid, "schemas.dir: there is no folder %s", dir).WithCode("no_migrations")
	}
	return os.DirFS(dir), nil
}

// DatabaseOptions are the options of the databases that a configuration describes.
func DatabaseOptions(c config.Config, log *slog.Logger) postgres.Options {
	d := c.Database
	o := postgres.Options{
		Groups: map[string]postgres.Group{}, Secret: c.Server.Secret, AppRole: d.Roles.App, OwnerRole: d.Roles.Owner,
		Isolation: postgres.Isolation(c.Tenancy.Isolation), MaxConns: d.MaxConns, SharedConns: d.SharedConns, OwnerConns: d.OwnerConns,
		InFlight: c.Tenancy.InFlight, ConnectTimeout: d.ConnectTimeout, AcquireTimeout: d.AcquireTimeout,
		StatementTimeout: d.StatementTimeout, IdleInTransactionTimeout: d.IdleInTransactionTimeout, LockTimeout: d.LockTimeout,
		Statements: postgres.Statements(d.Statements), HotStatements: d.HotStatements, BackendMemory: int64(d.BackendMemory), Logger: log,
	}
	for name, g := range c.AllGroups() {
		o.Groups[name] = postgres.Group{URL: g.URL, OwnerURL: g.OwnerURL, DirectURL: g.DirectURL}
	}
	return o
}

func (a *App) lookup(ctx context.Context, host tenant.Host) (t tenant.Tenant, err error) {
	err = a.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
		t, err = registry.ByHost(ctx, tx, host)
		return err
	})
	return t, err
}

// Words of the messages between processes.
const (
	forgetHost   = "host"
	forgetTokens = "tokens"
)

// changed makes every process forget what it knows of a tenant's hosts.
func (a *App) changed(ctx context.Context, t tenant.Tenant, hosts []tenant.Host) {
	a.forget(ctx, hosts...)
	a.ended(ctx, server.Ended{Tenant: t.Number})
}

// ended tells every process that tokens no longer stand for what they did.
func (a *App) ended(ctx context.Context, e server.Ended) {
	a.Cache.Publish(context.WithoutCancel(ctx), cache.Message{Kind: forgetTokens, Value: e.String()})
}

func (a *App) forget(ctx context.Context, hosts ...tenant.Host) {
	ctx = context.WithoutCancel(ctx) // what has been committed must be told, also when nobody waits any more
	a.Resolver.Bar(ctx, hosts...)
	for _, h := range hosts {
		a.Cache.Publish(ctx, cache.Message{Kind: forgetHost, Value: h.String()})
	}
}

// Changed tells every process that a tenant's hosts or settings have changed.
func (a *App) Changed(ctx context.Context, t tenant.Tenant, hosts ...tenant.Host) {
	a.changed(ctx, t, hosts)
}

// AccountChanged tells the servers that an account's rights have changed or that tokens of it have ended; the zero user:
// only the tokens have, the zero tenant: it is an administrator's.
func (a *App) AccountChanged(ctx context.Context, t tenant.Tenant, user uuid.UUID, ended [][]byte) {
	server.BarAccount(context.WithoutCancel(ctx), tenantCache{a.Cache}, server.AccountChange{
		Tenant: t, User: user, Hashes: ended, TTL: a.Config.Cache.SharedTTL + a.Config.Server.RequestTimeout,
	})
	for _, h := range ended {
		if len(h) == 32 {
			a.ended(ctx, server.Ended{Tenant: t.Number, Hash: [32]byte(h)})
		}
	}
	if user != uuid.Nil {
		a.ended(ctx, server.Ended{Tenant: t.Number, User: user})
	}
}

// URL is where a tenant is reached: its primary domain with the scheme and port of the public URL.
func (a *App) URL(h tenant.Host) string {
	u, err := url.Parse(a.Config.Server.PublicURL)
	if err != nil || h.IsZero() {
		return ""
	}
	host := h.String()
	if p := u.Port(); p != "" {
		host += ":" + p
	}
	return u.Scheme + "://" + host
}

// hostCache is the shared cache of hosts, under public:.
type hostCache struct{ c *cache.Cache }

func (h hostCache) Get(ctx context.Context, host tenant.Host) ([]byte, bool) {
	k, err := cache.PublicKey("host", host.String())
	if err != nil {
		return nil, false
	}
	return h.c.Get(ctx, k)
}

func (h hostCache) Add(ctx context.Context, host tenant.Host, value []byte, read time.Time, ttl time.Duration) {
	if k, err := cache.PublicKey("host", host.String()); err == nil {
		h.c.Add(ctx, k, value, read, ttl)
	}
}

// Set need not tell of a failure: until Redis has taken the value, the cache itself answers with it.
func (h hostCache) Set(ctx context.Context, host tenant.Host, value []byte, ttl time.Duration) {
	if k, err := cache.PublicKey("host", host.String()); err == nil {
		_ = h.c.Set(ctx, k, value, ttl)
	}
}

// InitOptions says how the databases are made.
type InitOptions struct {
	AdminURL string // of an administrator; empty: the owner's URL of the configuration
	Group    string // only this group; empty: all, with the administrator's host for main and each group's own otherwise
	Logf     func(format string, args ...any)
}

// Init makes roles, rights, ext and the ledger in the databases of the configuration. It is idempotent.
func Init(ctx context.Context, c config.Config, o InitOptions) (postgres.Installation, error) {
	if c.Database.URL == "" {
		return postgres.Installation{}, fault.New(fault.Invalid, "no database is configured").WithCode("no_database").
			WithHint("set ONEO_DATABASE_URL to the URL that oneo is to use, for example postgres://oneo_app@localhost/oneo")
	}
	groups := c.AllGroups()
	names := []string{config.MainGroup}
	for name := range groups {
		if name != config.MainGroup {
			names = append(names, name)
		}
	}
	if o.Group != "" {
		if _, ok := groups[o.Group]; !ok {
			return postgres.Installation{}, fault.New(fault.Invalid, "database group %q is not configured", o.Group).WithCode("unknown_group")
		}
		names = []string{o.Group}
	}
	id := ""
	if o.Group != "" && o.Group != config.MainGroup {
		inst, err := installationOf(ctx, c)
		if err != nil {
			return inst, err
		}
		id = inst.ID
	}
	var inst postgres.Installation
	for _, name := range names {
		g := groups[name]
		admin := o.AdminURL
		if admin == "" || name != config.MainGroup && o.Group == "" {
			admin = g.OwnerURL
		}
		var err error
		inst, err = postgres.Setup(ctx, postgres.SetupOptions{
			AdminURL: admin, Group: postgres.Group{URL: g.URL, OwnerURL: g.OwnerURL, DirectURL: g.DirectURL},
			AppRole: c.Database.Roles.App, OwnerRole: c.Database.Roles.Owner, Secret: c.Server.Secret,
			Logins: c.Tenancy.Logins, ID: id, Logf: o.Logf,
		})
		if err != nil {
			return inst, fmt.Errorf("initialise group %s: %w", name, err)
		}
		id = inst.ID
	}
	return inst, nil
}

func installationOf(ctx context.Context, c config.Config) (postgres.Installation, error) {
	db, err := postgres.Open(DatabaseOptions(c, slog.New(slog.DiscardHandler)))
	if err != nil {
		return postgres.Installation{}, err
	}
	defer db.Close()
	return db.Installation(ctx, postgres.MainGroup)
}
