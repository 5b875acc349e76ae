// Package config holds what can be set, where a value came from, and the defaults. A flag wins over the environment,
// that over the file, that over the plain DATABASE_URL, REDIS_URL and PORT, and those over the default. An unknown key
// is an error that names the nearest one. No value that it prints holds a password.
package config

import (
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Config is every setting. config/oneo.yaml documents each of them, and is held equal to Default by a test.
type Config struct {
	Database     Database     `mapstructure:"database"`
	Tenancy      Tenancy      `mapstructure:"tenancy"`
	Budgets      Budgets      `mapstructure:"budgets"`
	Provisioning Provisioning `mapstructure:"provisioning"`
	Redis        Redis        `mapstructure:"redis"`
	Server       Server       `mapstructure:"server"`
	Auth         Auth         `mapstructure:"auth"`
	Cache        Cache        `mapstructure:"cache"`
	Schemas      Schemas      `mapstructure:"schemas"`
	Migrate      Migrate      `mapstructure:"migrate"`
	Runs         Runs         `mapstructure:"runs"`
	Backup       Backup       `mapstructure:"backup"`
	Metrics      Metrics      `mapstructure:"metrics"`
	Usage        Usage        `mapstructure:"usage"`
	Tracing      Tracing      `mapstructure:"tracing"`
	Log          Log          `mapstructure:"log"`
	TUI          TUI          `mapstructure:"tui"`
}

// Database says how PostgreSQL is reached.
type Database struct {
	URL                      string           `mapstructure:"url"`
	OwnerURL                 string           `mapstructure:"owner_url"`
	DirectURL                string           `mapstructure:"direct_url"`
	Groups                   map[string]Group `mapstructure:"groups"` // without main
	Roles                    Roles            `mapstructure:"roles"`
	MaxConns                 int              `mapstructure:"max_conns"`
	SharedConns              int              `mapstructure:"shared_conns"`
	OwnerConns               int              `mapstructure:"owner_conns"`
	ConnectTimeout           time.Duration    `mapstructure:"connect_timeout"`
	AcquireTimeout           time.Duration    `mapstructure:"acquire_timeout"`
	StatementTimeout         time.Duration    `mapstructure:"statement_timeout"`
	IdleInTransactionTimeout time.Duration    `mapstructure:"idle_in_transaction_timeout"`
	LockTimeout              time.Duration    `mapstructure:"lock_timeout"`
	Statements               string           `mapstructure:"statements"`
	HotStatements            int              `mapstructure:"hot_statements"`
	BackendMemory            Size             `mapstructure:"backend_memory"`
}

// Group is one database group besides main.
type Group struct {
	URL       string `mapstructure:"url"`
	OwnerURL  string `mapstructure:"owner_url"`
	DirectURL string `mapstructure:"direct_url"`
}

// Roles names PostgreSQL's roles.
type Roles struct {
	App   string `mapstructure:"app"`
	Owner string `mapstructure:"owner"`
}

// Tenancy says how tenants are kept apart and for how long they are kept.
type Tenancy struct {
	Isolation  string        `mapstructure:"isolation"`
	Logins     int           `mapstructure:"logins"`
	InFlight   int           `mapstructure:"in_flight"`
	DropGrace  time.Duration `mapstructure:"drop_grace"`
	DomainHold time.Duration `mapstructure:"domain_hold"`
}

// Budgets are what each tenant's requests may take, unless `oneo tenant budget` says otherwise for one. 0: no bound but the
// server's own.
type Budgets struct {
	Requests         int           `mapstructure:"requests"`
	InFlight         int           `mapstructure:"in_flight"`
	StatementTimeout time.Duration `mapstructure:"statement_timeout"`
	Storage          Size          `mapstructure:"storage"`
	Records          int64         `mapstructure:"records"`
	Measure          time.Duration `mapstructure:"measure"`
}

// Provisioning says what is made before it is asked for.
type Provisioning struct {
	PoolSize int `mapstructure:"pool_size"`
}

// Redis says how Redis is reached. Without a URL each process caches for itself.
type Redis struct {
	URL     string        `mapstructure:"url"`
	Timeout time.Duration `mapstructure:"timeout"`
}

// Server says how HTTP is served.
type Server struct {
	Addr              string        `mapstructure:"addr"`
	OpsAddr           string        `mapstructure:"ops_addr"`
	PublicHosts       []string      `mapstructure:"public_hosts"`
	BaseDomain        string        `mapstructure:"base_domain"`
	PublicURL         string        `mapstructure:"public_url"`
	Secret            string        `mapstructure:"secret"`
	TrustedProxies    []string      `mapstructure:"trusted_proxies"`
	ReadHeaderTimeout time.Duration `mapstructure:"read_header_timeout"`
	ReadTimeout       time.Duration `mapstructure:"read_timeout"`
	WriteTimeout      time.Duration `mapstructure:"write_timeout"`
	IdleTimeout       time.Duration `mapstructure:"idle_timeout"`
	RequestTimeout    time.Duration `mapstructure:"request_timeout"`
	ShutdownGrace     time.Duration `mapstructure:"shutdown_grace"`
	MaxBody           Size          `mapstructure:"max_body"`
	MaxHeader         Size          `mapstructure:"max_header"`
	RequestsPerIP     int           `mapstructure:"requests_per_ip"`
	RequestsPerTenant int           `mapstructure:"requests_per_tenant"`
}

// Auth says how people log in.
type Auth struct {
	SessionIdle     time.Duration `mapstructure:"session_idle"`
	SessionAbsolute time.Duration `mapstructure:"session_absolute"`
	HashConcurrency int           `mapstructure:"hash_concurrency"`
	LoginsPerMinute int           `mapstructure:"logins_per_minute"`
}

// Cache says how long looked-up values are kept.
type Cache struct {
	TenantTTL   time.Duration `mapstructure:"tenant_ttl"`
	TenantGrace time.Duration `mapstructure:"tenant_grace"`
	NegativeTTL time.Duration `mapstructure:"negative_ttl"`
	SharedTTL   time.Duration `mapstructure:"shared_ttl"`
	LocalTTL    time.Duration `mapstructure:"local_ttl"`
}

// Schemas says where a product's own tenant migrations are, and which tenants are served by their versions.
type Schemas struct {
	Dir        string        `mapstructure:"dir"`
	MinVersion int           `mapstructure:"min_version"`
	Poll       time.Duration `mapstructure:"poll"`
}

// Migrate says when runs over the fleet hold back, and for how long they try again.
type Migrate struct {
	Patience       time.Duration `mapstructure:"patience"`
	StaleAfter     time.Duration `mapstructure:"stale_after"`
	LiveShare      int           `mapstructure:"live_share"`
	MaxLockWaits   int           `mapstructure:"max_lock_waits"`
	MaxReplicaLag  time.Duration `mapstructure:"max_replica_lag"`
	MaxConnections int           `mapstructure:"max_connections"`
	UndoKeep       time.Duration `mapstructure:"undo_keep"`
}

// Runs says for how long what is over of runs over the fleet is kept.
type Runs struct {
	Keep time.Duration `mapstructure:"keep"`
}

// Backup says where backups lie, who can read them, and how long what restores have replaced is kept.
type Backup struct {
	URL          string        `mapstructure:"url"`
	Recipients   []string      `mapstructure:"recipients"`
	IdentityFile string        `mapstructure:"identity_file"`
	KeepMin      int           `mapstructure:"keep_min"`
	Hooks        Hooks         `mapstructure:"hooks"`
	Schedules    []Schedule    `mapstructure:"schedules"`
	Alarm        []string      `mapstructure:"alarm"`
	UndoKeep     time.Duration `mapstructure:"undo_keep"`
	Physical     Physical      `mapstructure:"physical"`
}

// Physical says which engine backs up whole clusters, and where. Without an engine there are no physical backups.
type Physical struct {
	Engine  string `mapstructure:"engine"`  // files or pgbackrest
	Dir     string `mapstructure:"dir"`     // of the repository
	Scratch string `mapstructure:"scratch"` // where clusters are recovered; empty: .scratch in Dir
	Stanza  string `mapstructure:"stanza"`  // pgBackRest's name of the cluster
	Config  string `mapstructure:"config"`  // pgBackRest's file of settings
}

// Hooks are programs, with their arguments, that are run around each backup, and for how long each of them may.
type Hooks struct {
	Before  []string      `mapstructure:"before"`
	After   []string      `mapstructure:"after"`
	Timeout time.Duration `mapstructure:"timeout"`
}

// Metrics says what a server counts and tells of it.
type Metrics struct {
	Enabled bool `mapstructure:"enabled"`
	Tenants int  `mapstructure:"tenants"`
}

// Usage says for how long what tenants have used is kept.
type Usage struct {
	Keep time.Duration `mapstructure:"keep"`
}

// Tracing says where traces of requests go.
type Tracing struct {
	Endpoint string  `mapstructure:"endpoint"`
	Sample   float64 `mapstructure:"sample"`
}

// Log says what is logged and how.
type Log struct {
	Level  string `mapstructure:"level"`
	Format string `mapstructure:"format"`
	Keep   Size   `mapstructure:"keep"`
}

// TUI says how the dashboard begins.
type TUI struct {
	Protected bool `mapstructure:"protected"`
}

// Default is every setting's default.
func Default() Config {
	return Config{
		Database: Database{
			Groups: map[string]Group{}, Roles: Roles{App: "oneo_app", Owner: "oneo_owner"},
			MaxConns: 32, SharedConns: 8, OwnerConns: 8,
			ConnectTimeout: 5 * time.Second, AcquireTimeout: 2 * time.Second, StatementTimeout: 15 * time.Second,
			IdleInTransactionTimeout: 30 * time.Second, LockTimeout: time.Second,
			Statements: "prepared", HotStatements: 2048, BackendMemory: 512 << 20,
		},
		Tenancy: Tenancy{Isolation: "role", Logins: 8, DropGrace: 30 * 24 * time.Hour, DomainHold: 7 * 24 * time.Hour},
		Budgets: Budgets{Measure: 5 * time.Minute},
		Redis:   Redis{Timeout: 150 * time.Millisecond},
		Server: Server{
			Addr: ":8000", OpsAddr: "127.0.0.1:8001", PublicHosts: []string{"localhost"}, BaseDomain: "localhost",
			PublicURL: "http://localhost:8000", TrustedProxies: []string{},
			ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
			RequestTimeout: 30 * time.Second, ShutdownGrace: 20 * time.Second, MaxBody: 1 << 20, MaxHeader: 16 << 10,
		},
		Auth:    Auth{SessionIdle: 24 * time.Hour, SessionAbsolute: 30 * 24 * time.Hour, HashConcurrency: 2, LoginsPerMinute: 10},
		Cache:   Cache{TenantTTL: 30 * time.Second, TenantGrace: 10 * time.Minute, NegativeTTL: 3 * time.Second, SharedTTL: 30 * time.Second, LocalTTL: 10 * time.Second},
		Migrate: Migrate{Patience: 2 * time.Minute, StaleAfter: 10 * time.Second, LiveShare: 25, MaxLockWaits: 20, MaxReplicaLag: 10 * time.Second, MaxConnections: 90, UndoKeep: 72 * time.Hour},
		Schemas: Schemas{Poll: 10 * time.Second},
		Runs:    Runs{Keep: 90 * 24 * time.Hour},
		Backup:  Backup{Recipients: []string{}, KeepMin: 1, Hooks: Hooks{Before: []string{}, After: []string{}, Timeout: 10 * time.Minute}, Schedules: []Schedule{}, Alarm: []string{}, UndoKeep: 7 * 24 * time.Hour},
		Metrics: Metrics{Enabled: true, Tenants: 50},
		Usage:   Usage{Keep: 400 * 24 * time.Hour},
		Tracing: Tracing{Sample: 0.01},
		Log:     Log{Level: "info", Format: "text", Keep: 4 << 20},
	}
}

// Size is a number of bytes, written as a number or with KB, MB or GB (powers of 1024).
type Size int64

var sizeForm = regexp.MustCompile(`^(\d{1,12})(?:\s*(B|KB|MB|GB))?$`)

// ParseSize reads a size.
func ParseSize(s string) (Size, error) {
	m := sizeForm.FindStringSubmatch(strings.TrimSpace(s))
	if m == nil {
		return 0, fmt.Errorf("%q is no size; write for example 512MB", s)
	}
	n, err := strconv.ParseInt(m[1], 10, 64)
	if err != nil {
		return 0, err
	}
	shift := map[string]uint{"": 0, "B": 0, "KB": 10, "MB": 20, "GB": 30}[m[2]]
	if n > (1<<50)>>shift {
		return 0, fmt.Errorf("%q is too large", s)
	}
	return Size(n << shift), nil
}

// String writes the size with the largest unit that divides it.
func (s Size) String() string {
	for _, u := range []struct {
		name  string
		shift uint
	}{{"GB", 30}, {"MB", 20}, {"KB", 10}} {
		if s > 0 && s%(1<<u.shift) == 0 {
			return strconv.FormatInt(int64(s)>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(s), 10) + "B"
}

// MainGroup is the group that database.url itself describes.
const MainGroup = "main"

// AllGroups are the configured groups, main included. What a group leaves out of its three URLs is filled by the one
// before it.
func (c Config) AllGroups() map[string]Group {
	all := map[string]Group{MainGroup: {URL: c.Database.URL, OwnerURL: c.Database.OwnerURL, DirectURL: c.Database.DirectURL}}
	for name, g := range c.Database.Groups {
		all[name] = g
	}
	for name, g := range all {
		if g.OwnerURL == "" {
			g.OwnerURL = g.URL
		}
		if g.DirectURL == "" {
			g.DirectURL = g.OwnerURL
		}
		all[name] = g
	}
	return all
}

var groupForm = regexp.MustCompile(`^[a-z0-9]{1,32}$`)

// MinSecretBytes is the least length of server.secret.
const MinSecretBytes = 32

// MinRunsKeep is the least time for which runs are kept: a process that was taken for dead may still come with a change,
// and must find its mark.
const MinRunsKeep = time.Hour

// MinUsageKeep is the least time for which usage is kept: a server that could not write may come with what is as old.
const MinUsageKeep = 24 * time.Hour

// maxCached is cache.MaxTTL; a test holds them equal.
const maxCached = 24 * time.Hour

// Validate names every setting whose value cannot be used. That a database is set is left to those who need one.
func (c Config) Validate() error {
	var fields []fault.Field
	bad := func(key, format string, args ...any) {
		fields = append(fields, fault.Field{Parameter: key, Code: "setting", Detail: fmt.Sprintf(format, args...)})
	}
	oneOf := func(key, value string, values ...string) {
		if !slices.Contains(values, value) {
			bad(key, "must be one of %s", strings.Join(values, ", "))
		}
	}
	between := func(key string, n, least, most int) {
		if n < least || n > most {
			bad(key, "must be from %d to %d", least, most)
		}
	}
	positive := func(key string, d time.Duration) {
		if d <= 0 {
			bad(key, "must be above 0, for example 5s")
		}
	}
	d := c.Database
	oneOf("database.statements", d.Statements, "prepared", "unprepared")
	between("database.max_conns", d.MaxConns, 1, 10_000)
	between("database.shared_conns", d.SharedConns, 1, 1000)
	between("database.owner_conns", d.OwnerConns, 1, 1000)
	between("database.hot_statements", d.HotStatements, 0, 100_000)
	positive("database.connect_timeout", d.ConnectTimeout)
	positive("database.acquire_timeout", d.AcquireTimeout)
	positive("database.statement_timeout", d.StatementTimeout)
	positive("database.idle_in_transaction_timeout", d.IdleInTransactionTimeout)
	positive("database.lock_timeout", d.LockTimeout)
	if d.Roles.App == "" || d.Roles.Owner == "" || d.Roles.App == d.Roles.Owner {
		bad("database.roles", "app and owner must be two different names")
	}
	for name, g := range d.Groups {
		if !groupForm.MatchString(name) || name == MainGroup {
			bad("database.groups", "%q is no name for a group; use [a-z0-9]+, and database.url for main", name)
		}
		if g.URL == "" {
			bad("database.groups."+name+".url", "must be set")
		}
	}
	oneOf("tenancy.isolation", c.Tenancy.Isolation, "role", "schema")
	between("tenancy.logins", c.Tenancy.Logins, 0, 64)
	between("tenancy.in_flight", c.Tenancy.InFlight, 0, 10_000)
	between("server.requests_per_ip", c.Server.RequestsPerIP, 0, 1_000_000)
	between("server.requests_per_tenant", c.Server.RequestsPerTenant, 0, 1_000_000)
	between("budgets.requests", c.Budgets.Requests, 0, 1_000_000)
	between("budgets.in_flight", c.Budgets.InFlight, 0, 10_000)
	if c.Budgets.StatementTimeout < 0 || c.Budgets.StatementTimeout%time.Millisecond != 0 {
		bad("budgets.statement_timeout", "must be whole milliseconds, or 0s: none")
	}
	if c.Budgets.Storage < 0 {
		bad("budgets.storage", "must not be below 0")
	}
	if c.Budgets.Records < 0 {
		bad("budgets.records", "must not be below 0")
	}
	if c.Budgets.Measure < time.Second {
		bad("budgets.measure", "must be at least 1s, for example 5m")
	}
	between("provisioning.pool_size", c.Provisioning.PoolSize, 0, 1000)
	positive("tenancy.drop_grace", c.Tenancy.DropGrace)
	if c.Tenancy.DomainHold < 0 {
		bad("tenancy.domain_hold", "must not be below 0")
	}
	positive("redis.timeout", c.Redis.Timeout)
	if c.Redis.URL != "" {
		u, err := url.Parse(c.Redis.URL)
		if err != nil || u.Scheme != "redis" && u.Scheme != "rediss" && u.Scheme != "unix" {
			bad("redis.url", "must be a redis:// or rediss:// URL")
		}
	}
	s := c.Server
	if u, err := url.Parse(s.PublicURL); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" {
		bad("server.public_url", "must be an http or https URL, for example https://example.com")
	}
	if s.Secret != "" && len(s.Secret) < MinSecretBytes {
		bad("server.secret", "must have at least %d bytes, for example from `openssl rand -hex 32`", MinSecretBytes)
	}
	for _, p := range s.TrustedProxies {
		if _, err := netip.ParsePrefix(p); err != nil {
			bad("server.trusted_proxies", "%q is no network; write for example 10.0.0.0/8", p)
		}
	}
	for key, v := range map[string]time.Duration{
		"server.read_header_timeout": s.ReadHeaderTimeout, "server.read_timeout": s.ReadTimeout, "server.write_timeout": s.WriteTimeout,
		"server.idle_timeout": s.IdleTimeout, "server.request_timeout": s.RequestTimeout, "server.shutdown_grace": s.ShutdownGrace,
		"auth.session_idle": c.Auth.SessionIdle, "auth.session_absolute": c.Auth.SessionAbsolute,
		"cache.tenant_ttl": c.Cache.TenantTTL, "cache.negative_ttl": c.Cache.NegativeTTL,
		"cache.shared_ttl": c.Cache.SharedTTL, "cache.local_ttl": c.Cache.LocalTTL,
	} {
		positive(key, v)
	}
	if c.Cache.TenantGrace < 0 || c.Cache.TenantGrace > maxCached {
		bad("cache.tenant_grace", "must be from 0 (off) to %s", maxCached)
	}
	// The caches' times are held against each other when each is one by itself.
	shared, local, idle, request := c.Cache.SharedTTL, c.Cache.LocalTTL, c.Auth.SessionIdle, s.RequestTimeout
	if shared > 0 && local > shared {
		bad("cache.local_ttl", "must be at most cache.shared_ttl, which is %s", shared)
	}
	// Only a look at PostgreSQL notes that a session is in use: one in use must not run out between two.
	if idle > 0 && shared > idle/2 {
		bad("cache.shared_ttl", "must be at most half of auth.session_idle, which is %s", idle)
	}
	// What has changed is barred in Redis for both times together, and nothing is kept there for longer than a day.
	if request > 0 && shared > maxCached-request {
		bad("cache.shared_ttl", "must be at most %s together with server.request_timeout, which is %s", maxCached, request)
	}
	if s.MaxBody < 1<<10 || s.MaxBody > 1<<30 {
		bad("server.max_body", "must be from 1KB to 1GB")
	}
	if s.MaxHeader < 1<<10 || s.MaxHeader > 1<<20 {
		bad("server.max_header", "must be from 1KB to 1MB")
	}
	between("schemas.min_version", c.Schemas.MinVersion, 0, 999_999_999)
	if c.Schemas.MinVersion > 0 && c.Schemas.Dir == "" {
		bad("schemas.min_version", "needs schemas.dir: for the migrations in the binary, the binary knows it")
	}
	positive("schemas.poll", c.Schemas.Poll)
	between("auth.hash_concurrency", c.Auth.HashConcurrency, 1, 256)
	between("auth.logins_per_minute", c.Auth.LoginsPerMinute, 1, 100_000)
	positive("migrate.patience", c.Migrate.Patience)
	positive("migrate.stale_after", c.Migrate.StaleAfter)
	positive("migrate.undo_keep", c.Migrate.UndoKeep)
	positive("backup.undo_keep", c.Backup.UndoKeep)
	between("backup.keep_min", c.Backup.KeepMin, 1, 1000)
	positive("backup.hooks.timeout", c.Backup.Hooks.Timeout)
	c.Backup.Physical.check(bad)
	between("migrate.live_share", c.Migrate.LiveShare, 0, 100)
	c.checkSchedules(bad)
	between("migrate.max_lock_waits", c.Migrate.MaxLockWaits, 0, 10_000)
	between("migrate.max_connections", c.Migrate.MaxConnections, 0, 100)
	if c.Migrate.MaxReplicaLag < 0 {
		bad("migrate.max_replica_lag", "must not be below 0")
	}
	if k := c.Runs.Keep; k != 0 && k < MinRunsKeep {
		bad("runs.keep", "must be at least %s, or 0s: for ever", MinRunsKeep)
	}
	between("metrics.tenants", c.Metrics.Tenants, 0, 1000)
	if k := c.Usage.Keep; k != 0 && k < MinUsageKeep {
		bad("usage.keep", "must be at least %s, or 0s: for ever", MinUsageKeep)
	}
	if c.Tracing.Endpoint != "" {
		u, err := url.Parse(c.Tracing.Endpoint)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.User != nil {
			bad("tracing.endpoint", "must be an http or https URL without a password, for example http://collector:4318")
		}
	}
	if s := c.Tracing.Sample; !(s >= 0 && s <= 1) {
		bad("tracing.sample", "must be from 0 to 1")
	}
	oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	oneOf("log.format", c.Log.Format, "text", "json")
	if c.Log.Keep < 64<<10 || c.Log.Keep > 1<<30 {
		bad("log.keep", "must be from 64KB to 1GB")
	}
	if len(fields) == 0 {
		return nil
	}
	slices.SortFunc(fields, func(a, b fault.Field) int { return strings.Compare(a.Parameter, b.Parameter) })
	f := fault.New(fault.Invalid, "setting %s: %s", fields[0].Parameter, fields[0].Detail).WithCode("setting").
		WithHint("`oneo config show --origin` says where each value comes from")
	f.Fields = fields
	return f
}

var stanzaForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$`)

// check names each setting that cannot be used. Folders are absolute: PostgreSQL's archive_command runs elsewhere.
func (p Physical) check(bad func(key, format string, args ...any)) {
	if !slices.Contains([]string{"", "files", "pgbackrest"}, p.Engine) {
		bad("backup.physical.engine", "must be files, pgbackrest, or empty: none")
	}
	if p.Engine != "" && p.Dir == "" {
		bad("backup.physical.dir", "must be set with backup.physical.engine, for example /var/lib/oneo/physical")
	}
	for key, path := range map[string]string{"dir": p.Dir, "scratch": p.Scratch, "config": p.Config} {
		if path != "" && !filepath.IsAbs(path) {
			bad("backup.physical."+key, "must be a path from the root, for example /var/lib/oneo/%s", key)
		}
	}
	if p.Stanza != "" && !stanzaForm.MatchString(p.Stanza) {
		bad("backup.physical.stanza", "%q is no name of a stanza; use letters, digits, - and _", p.Stanza)
	}
}
