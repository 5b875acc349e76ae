package app

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// ServeOptions says how an instance serves.
type ServeOptions struct {
	AutoMigrate bool // bring the shared schema to its head first
	Version     string
	// Ready is called once the ports are taken, with the address of the API.
	Ready func(addr string)
}

// Serve serves until ctx ends, and then stops in order. Pending: the shared schema is behind.
func (a *App) Serve(ctx context.Context, o ServeOptions) error {
	if len(a.Config.Server.Secret) < config.MinSecretBytes {
		return fault.New(fault.Invalid, "server.secret is not set").WithCode("no_secret").
			WithHint("set ONEO_SERVER_SECRET to the one that `oneo init` was run with; all instances share it")
	}
	if o.AutoMigrate {
		_, err := a.MigrateShared(ctx)
		if err != nil && fault.Of(err).Code == "newer_database" {
			err = a.Migrate.SharedBehind(ctx) // a newer oneo was here; it may have left this one room
		}
		if err != nil {
			return err
		}
	} else if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	owner, err := a.DB.HasOwner(ctx, postgres.MainGroup)
	if err != nil {
		return err
	}
	var schedules *schedule.Scheduler
	if owner {
		if schedules, err = a.Scheduler(); err != nil {
			return err
		}
	}
	if schedules != nil {
		if err := schedule.Behind(ctx, a.DB); err != nil {
			return err
		}
	}
	so, err := a.serverOptions(o)
	if err != nil {
		return err
	}
	so.Provisioning = owner
	id, err := uuid.NewV7()
	if err != nil {
		return err
	}
	var observer *observe.Observer
	if a.Counter != nil {
		observer = a.observer(id, o.Version)
		so.Counter = counter{a.Counter}
	}
	so.Ops = a.opsHandlers(id, observer)
	if a.tracer != nil {
		so.Trace = a.tracer.Request
	}
	s, err := server.New(so)
	if err != nil {
		return err
	}
	if err := s.Listen(); err != nil {
		return err
	}

	var usage *observe.Usage
	if a.Counter != nil {
		usage = observe.NewUsage(observe.UsageOptions{Instance: id, Counter: a.Counter, DB: a.DB, Expires: owner, Keep: a.Config.Usage.Keep, Logger: a.Log})
		defer usage.Close() // when nothing counts any more
	}

	// What runs beside the server ends after it: requests in flight may still queue and forget.
	beside, stop := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	a.Cache.OnMessage(func(m cache.Message) {
		switch m.Kind {
		case forgetHost:
			if h, err := tenant.ParseHost(m.Value); err == nil {
				a.Resolver.Forget(h)
			}
		case forgetTokens:
			if e, ok := server.ParseEnded(m.Value); ok {
				s.Forget(e)
			}
		}
	})
	running.Go(func() { a.Cache.Listen(beside, func() { a.Resolver.ForgetAll(); s.ForgetAll() }) })
	if owner {
		running.Go(func() {
			if err := a.Provision.Work(beside); err != nil {
				a.Log.Error("operations worker", "error", err)
			}
		})
		running.Go(func() { a.expireUndoPoints(beside) })
		running.Go(func() { a.expireRuns(beside) })
		running.Go(func() { a.measureBudgets(beside) })
		if schedules != nil {
			running.Go(func() {
				if err := schedules.Run(ctx); err != nil { // ctx: what is in hand has the time that requests have
					a.Log.Error("scheduled backups", "error", err)
				}
			})
		}
	} else {
		a.Log.Info("this instance cannot provision: database.owner_url is not set")
	}
	running.Go(func() { a.enter(beside, id, s.OpsAddr(), o.Version) })
	if observer != nil {
		running.Go(func() { observer.Run(beside) })
		running.Go(func() { usage.Run(beside) })
	}
	for _, group := range a.DB.Groups() {
		running.Go(func() { a.versions.watch(beside, group) })
	}
	running.Go(func() { a.clearSessions(beside) })

	a.Log.Info("serving", "addr", s.Addr(), "ops_addr", s.OpsAddr(), "redis", a.Cache.String())
	if o.Ready != nil {
		o.Ready(s.Addr())
	}
	err = s.Run(ctx)
	a.Log.Info("stopped")
	return err
}

func (a *App) serverOptions(o ServeOptions) (server.Options, error) {
	c := a.Config
	so := server.DefaultOptions()
	so.Addr, so.OpsAddr, so.PublicURL = c.Server.Addr, c.Server.OpsAddr, c.Server.PublicURL
	so.PublicHosts = nil
	for _, h := range c.Server.PublicHosts {
		host, err := tenant.ParseHost(h)
		if err != nil {
			return so, fmt.Errorf("server.public_hosts: %w", err)
		}
		so.PublicHosts = append(so.PublicHosts, host)
	}
	for _, p := range c.Server.TrustedProxies {
		prefix, err := netip.ParsePrefix(p)
		if err != nil {
			return so, fmt.Errorf("server.trusted_proxies: %w", err)
		}
		so.TrustedProxies = append(so.TrustedProxies, prefix)
	}
	so.Secret = []byte(c.Server.Secret)
	so.Databases, so.Resolver, so.Serves = databases{a.DB}, resolver{a}, a.versions.serves
	so.Admin, so.Settings, so.Hasher = admin{a}, settings{}, a.Hasher
	if c.Redis.URL != "" {
		so.Cache, so.Limiter = tenantCache{a.Cache}, limiter{a.Cache}
	} else {
		r, err := newRemembered(c.Cache.LocalTTL)
		if err != nil {
			return so, err
		}
		a.onClose(r.close)
		so.Cache = r
	}
	so.Sessions = auth.SessionOptions{Idle: c.Auth.SessionIdle, Absolute: c.Auth.SessionAbsolute}
	so.OnEnqueued = a.Provision.Wake
	so.Checks = []server.Check{
		{Name: "postgres", Required: true, Run: func(ctx context.Context) error {
			err := a.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `select 1`)
				return err
			})
			if err != nil && !a.Resolver.Stands() {
				return err
			}
			return a.borne(err)
		}},
		{Name: "schema", Required: true, Run: func(ctx context.Context) error { return a.borne(a.Migrate.SharedBehind(ctx)) }},
		{Name: "redis", Run: a.Cache.Ping},
	}
	so.Logger, so.Version = a.Log, o.Version
	so.MaxBodyBytes, so.MaxHeaderBytes = int64(c.Server.MaxBody), int(c.Server.MaxHeader)
	so.ReadHeaderTimeout, so.ReadTimeout, so.WriteTimeout = c.Server.ReadHeaderTimeout, c.Server.ReadTimeout, c.Server.WriteTimeout
	so.IdleTimeout, so.RequestTimeout, so.ShutdownGrace = c.Server.IdleTimeout, c.Server.RequestTimeout, c.Server.ShutdownGrace
	so.LoginPerAccount = server.Rate{Count: c.Auth.LoginsPerMinute, Per: time.Minute}
	so.LoginPerIP = server.Rate{Count: 6 * c.Auth.LoginsPerMinute, Per: time.Minute}
	so.RequestsPerIP = server.Rate{Count: c.Server.RequestsPerIP, Per: time.Second}
	so.Budget = BudgetOf(c)
	so.RequestsPerTenant = server.Rate{Count: so.Budget.Requests, Per: time.Second}
	so.IdentityTTL, so.LocalTTL = c.Cache.SharedTTL, c.Cache.LocalTTL
	if c.Redis.URL == "" {
		so.LocalTTL = min(so.LocalTTL, aloneLocalTTL)
	}
	so.OnEnded = a.ended
	return so, nil
}

// borne makes it a failure that this instance bears where a database is away and there are others: it serves their tenants.
func (a *App) borne(err error) error {
	if postgres.Away(err) && len(a.DB.Groups()) > 1 {
		return server.Borne{Err: err}
	}
	return err
}

// Without Redis nobody tells this process what another one has changed: it remembers for less long.
const (
	aloneTenantTTL = 10 * time.Second
	aloneLocalTTL  = 2 * time.Second
)

const beatEvery = 10 * time.Second

// InstanceDead is how long a server may give no sign of life in public.instances.
const InstanceDead = 6 * beatEvery

// enter keeps this instance's row in public.instances, and removes it and those of dead ones.
func (a *App) enter(ctx context.Context, id uuid.UUID, opsAddr, version string) {
	host, _ := os.Hostname() // empty is a name too
	beat := func(ctx context.Context) error {
		return a.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
			return registry.BeatInstance(ctx, tx, registry.Instance{ID: id, Host: host, PID: os.Getpid(), Version: version, OpsAddr: opsAddr}, InstanceDead)
		})
	}
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		if err := beat(ctx); err != nil && ctx.Err() == nil {
			a.Log.Warn("enter the instance", "error", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			bye, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
			defer cancel()
			err := a.DB.InShared(bye, postgres.Write, func(tx *postgres.Tx) error { return registry.RemoveInstance(bye, tx, id) })
			if err != nil {
				a.Log.Warn("leave the list of instances", "error", err)
			}
			return
		}
	}
}

// clearSessionsEach is how often sessions that have run out are removed. They are refused in any case, and a login
// removes its own user's; this is for people who never come back.
const clearSessionsEach = 24 * time.Hour

func (a *App) clearSessions(ctx context.Context) {
	ticker := time.NewTicker(clearSessionsEach)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if err := a.ClearSessions(ctx); err != nil && ctx.Err() == nil {
			a.Log.Warn("remove sessions that have run out", "error", err)
		}
	}
}

// expireUndoPointsEach is how often undo points are looked for whose time is over.
const expireUndoPointsEach = time.Minute

func (a *App) expireUndoPoints(ctx context.Context) {
	ticker := time.NewTicker(expireUndoPointsEach)
	defer ticker.Stop()
	for {
		n, err := a.Snapshots.Expire(ctx)
		if n > 0 {
			a.Log.Info("dropped undo points that have expired", "tenants", n)
		}
		if err != nil && ctx.Err() == nil {
			a.Log.Warn("drop undo points that have expired", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// expireRunsEach is how often runs are looked for that are over and have been kept for long enough.
const expireRunsEach = time.Hour

func (a *App) expireRuns(ctx context.Context) {
	ticker := time.NewTicker(expireRunsEach)
	defer ticker.Stop()
	for {
		n, err := a.Rollout.Expire(ctx, a.Config.Runs.Keep)
		if n > 0 {
			a.Log.Info("removed runs whose time is over", "runs", n)
		}
		if err != nil && ctx.Err() == nil {
			a.Log.Warn("remove runs whose time is over", "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// ClearSessions removes the administrators' and every active tenant's sessions that have run out, one short transaction
// a tenant. It goes on behind a tenant that fails.
func (a *App) ClearSessions(ctx context.Context) error {
	idle := a.Config.Auth.SessionIdle
	var ts []tenant.Tenant
	err := a.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) (err error) {
		if _, err = auth.Administrators().PurgeExpired(ctx, tx, idle); err != nil {
			return err
		}
		ts, err = registry.List(ctx, tx, registry.Filter{States: []tenant.State{tenant.Active}})
		return err
	})
	errs := []error{err}
	for _, t := range ts {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		err := a.DB.InTenant(ctx, t, postgres.Write, func(tx *postgres.Tx) error {
			_, err := auth.Tenants().PurgeExpired(ctx, tx, idle)
			return err
		})
		if !fault.Is(err, fault.Suspended) { // it has its turn when it is served again
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// The types below hand the parts to the server in the form that it declares.

type databases struct{ db *postgres.DB }

func (d databases) InTenant(ctx context.Context, t tenant.Tenant, access server.Access, fn func(server.Tx) error) error {
	return d.db.InTenant(ctx, t, postgres.Access(access), func(tx *postgres.Tx) error { return fn(tx) })
}

func (d databases) InShared(ctx context.Context, t tenant.Tenant, access server.Access, fn func(server.Tx) error) error {
	work := func(tx *postgres.Tx) error { return fn(tx) }
	if t.IsZero() {
		return d.db.InShared(ctx, postgres.Access(access), work)
	}
	return d.db.InSharedFor(ctx, t, postgres.Access(access), work)
}

type resolver struct{ a *App }

func (r resolver) Resolve(ctx context.Context, host tenant.Host) (tenant.Tenant, error) {
	return r.a.Resolver.Resolve(ctx, host)
}

func (r resolver) Forget(ctx context.Context, hosts ...tenant.Host) { r.a.forget(ctx, hosts...) }

type tenantCache struct{ c *cache.Cache }

func (tc tenantCache) key(t tenant.Tenant, kind, id string) (cache.Key, error) {
	if t.IsZero() {
		return cache.PublicKey(kind, id)
	}
	return cache.TenantKey(t, kind, id)
}

func (tc tenantCache) Get(ctx context.Context, t tenant.Tenant, kind, id string) ([]byte, bool) {
	k, err := tc.key(t, kind, id)
	if err != nil {
		return nil, false
	}
	return tc.c.Get(ctx, k)
}

func (tc tenantCache) Add(ctx context.Context, t tenant.Tenant, kind, id string, value []byte, read time.Time, ttl time.Duration) {
	if k, err := tc.key(t, kind, id); err == nil {
		tc.c.Add(ctx, k, value, read, ttl)
	}
}

// Set need not tell of a failure: until Redis has taken the value, the cache itself answers with it.
func (tc tenantCache) Set(ctx context.Context, t tenant.Tenant, kind, id string, value []byte, ttl time.Duration) {
	if k, err := tc.key(t, kind, id); err == nil {
		_ = tc.c.Set(ctx, k, value, ttl)
	}
}

type limiter struct{ c *cache.Cache }

// Allow counts under the hash of the server's key: addresses and e-mails may hold anything.
func (l limiter) Allow(ctx context.Context, key string, r server.Rate) (server.Decision, error) {
	sum := sha256.Sum256([]byte(key))
	k, err := cache.PublicKey("rate", hex.EncodeToString(sum[:16]))
	if err != nil {
		return server.Decision{}, err
	}
	d := l.c.Allow(ctx, k, cache.Limit{Count: r.Count, Per: r.Per})
	return server.Decision{Allowed: d.Allowed, Remaining: d.Remaining, RetryAfter: d.RetryAfter, ResetAfter: d.ResetAfter}, nil
}

type settings struct{}

func (settings) Settings(ctx context.Context, tx server.Tx, t tenant.Tenant) (json.RawMessage, error) {
	return registry.Settings(ctx, tx, t)
}

func (settings) SetSettings(ctx context.Context, tx server.Tx, t tenant.Tenant, old, value json.RawMessage) error {
	return registry.SetSettings(ctx, tx, t, old, value)
}

type admin struct{ a *App }

func (ad admin) Tenants(ctx context.Context, tx server.Tx, f server.TenantFilter) ([]tenant.Tenant, error) {
	rf := registry.Filter{States: f.States, Group: f.Group, After: f.After, Limit: f.Limit}
	if f.Name != "" {
		rf.Names = []string{f.Name}
	}
	return registry.List(ctx, tx, rf)
}

func (ad admin) Tenant(ctx context.Context, tx server.Tx, slug tenant.Slug) (tenant.Tenant, error) {
	return registry.BySlug(ctx, tx, slug)
}

func (ad admin) Standing(ctx context.Context, t tenant.Tenant) (server.Standing, error) {
	st, err := ad.a.Standing(ctx, t)
	return server.Standing(st), err
}

func (ad admin) Domains(ctx context.Context, tx server.Tx, t tenant.Tenant) ([]server.Domain, error) {
	ds, err := registry.Domains(ctx, tx, t)
	out := make([]server.Domain, len(ds))
	for i, d := range ds {
		out[i] = server.Domain{Host: d.Host, Primary: d.Primary, CreatedAt: d.CreatedAt}
	}
	return out, err
}

func (ad admin) AddDomain(ctx context.Context, tx server.Tx, t tenant.Tenant, host tenant.Host, primary bool) error {
	return registry.AddDomain(ctx, tx, t, host, primary)
}

func (ad admin) RemoveDomain(ctx context.Context, tx server.Tx, t tenant.Tenant, host tenant.Host) error {
	return registry.RemoveDomain(ctx, tx, t, host, ad.a.Config.Tenancy.DomainHold)
}

func (ad admin) SetPrimary(ctx context.Context, tx server.Tx, t tenant.Tenant, host tenant.Host) error {
	return registry.SetPrimary(ctx, tx, t, host)
}

func (ad admin) EnqueueCreate(ctx context.Context, tx server.Tx, c server.CreateTenant, actor string) (server.Operation, error) {
	r := provision.CreateRequest{
		Slug: c.Slug, Name: c.Name, Schema: c.Schema, Group: c.Group, Domains: c.Domains,
		AdminEmail: c.AdminEmail, AdminPasswordHash: c.AdminPasswordHash, Settings: c.Settings,
	}
	return operation(registry.Enqueue(ctx, tx, provision.KindCreate, c.Slug.String(), actor, r.Request()))
}

func (ad admin) EnqueueDrop(ctx context.Context, tx server.Tx, slug tenant.Slug, grace time.Duration, actor string) (server.Operation, error) {
	return operation(registry.Enqueue(ctx, tx, provision.KindDrop, slug.String(), actor, map[string]int64{"grace_seconds": int64(grace.Seconds())}))
}

func (ad admin) Enqueue(ctx context.Context, tx server.Tx, kind string, slug tenant.Slug, actor string) (server.Operation, error) {
	return operation(registry.Enqueue(ctx, tx, kind, slug.String(), actor, map[string]string{}))
}

func (ad admin) Operation(ctx context.Context, tx server.Tx, id uuid.UUID) (server.Operation, error) {
	return operation(registry.OperationByID(ctx, tx, id))
}

func (ad admin) Operations(ctx context.Context, tx server.Tx, limit int, before *uuid.UUID) ([]server.Operation, error) {
	ops, err := registry.Operations(ctx, tx, limit, before)
	out := make([]server.Operation, len(ops))
	for i, o := range ops {
		out[i], _ = operation(o, nil)
	}
	return out, err
}

func (ad admin) Audit(ctx context.Context, tx server.Tx, e server.AuditEntry) error {
	return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.Actor, Action: e.Action, Tenant: e.Tenant, Details: e.Details, RequestID: e.RequestID})
}

// operation is an operation as it may be shown: without the request, which may hold a password's hash.
func operation(o registry.Operation, err error) (server.Operation, error) {
	return server.Operation{
		ID: o.ID, Kind: o.Kind, Slug: o.Slug, State: o.State, Actor: o.Actor, Result: o.Result, Error: o.Error,
		Attempts: o.Attempts, CreatedAt: o.CreatedAt, StartedAt: o.StartedAt, FinishedAt: o.FinishedAt,
	}, err
}
