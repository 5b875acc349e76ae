package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/demo"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type devOptions struct {
	dir, addr, seed string
}

func newDevCmd(e *env) *cobra.Command {
	var o devOptions
	cmd := &cobra.Command{
		Use: "dev", Short: "Run everything on this machine, with demo data",
		Long: `Start PostgreSQL and Redis with a data folder of their own (or use the database that is configured), make
roles and tables, seed three tenants with a real CRM's data, serve, and print curl lines that read them.

server.ops_addr is the port behind that of --addr, unless it is configured.
DIR/oneo.env holds the settings for a second terminal. Ctrl-C stops what was started; a second start
keeps the data. PostgreSQL refuses to run as root: it then runs as the user postgres or nobody.`,
		Example: "  oneo dev\n  oneo dev --data /tmp/oneo --addr :9000 --seed none", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return untilStopped(cmd.Context(), runDev(cmd.Context(), e, o))
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.dir, "data", defaultDataDir(e.environ), "the data `DIR`")
	f.StringVar(&o.addr, "addr", "127.0.0.1:8000", "`ADDRESS` to serve on")
	f.StringVar(&o.seed, "seed", "demo", "demo or none")
	return cmd
}

// defaultDataDir is where dev keeps its data: root's own folders cannot be reached by PostgreSQL's user.
func defaultDataDir(environ []string) string {
	if os.Geteuid() == 0 {
		return "/var/lib/oneo-dev"
	}
	get := func(name string) string {
		for _, kv := range environ {
			if n, v, _ := strings.Cut(kv, "="); n == name {
				return v
			}
		}
		return ""
	}
	if dir := get("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "oneo-dev")
	}
	return filepath.Join(get("HOME"), ".local", "share", "oneo-dev")
}

// devState is what dev keeps between starts. It holds secrets: mode 0600.
type devState struct {
	Secret   string            `json:"secret"`
	Password string            `json:"password"` // of every account that dev makes
	Keys     map[string]string `json:"keys"`     // API keys by tenant; "" is the administrator's
}

const (
	devAdmin = "admin@localhost"
	devUser  = "demo@example.com"
)

func runDev(ctx context.Context, e *env, o devOptions) (err error) {
	if o.seed != "demo" && o.seed != "none" {
		return errUsage{fault.New(fault.Invalid, "--seed must be demo or none")}
	}
	if o.dir, err = filepath.Abs(o.dir); err != nil {
		return err
	}
	if err := notSwitching(o.dir); err != nil {
		return err
	}
	c, err := devConfig(e, o.dir)
	if err != nil {
		return err
	}
	opsAddr, publicURL, err := devAddresses(ctx, o.addr, c.Server.OpsAddr, e.origins["server.ops_addr"] != "default")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return fault.Wrap(err, fault.Forbidden, "the data folder %s cannot be made", o.dir).WithHint("choose another one with --data")
	}
	state, err := loadState(o.dir)
	if err != nil {
		return err
	}

	start := time.Now()
	var stops []func(context.Context) error
	defer func() {
		// Last-first, and also when a later step failed.
		for _, stop := range slices.Backward(stops) {
			sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
			err = errors.Join(err, stop(sctx))
			cancel()
		}
	}()
	set := map[string]string{
		"server.addr": o.addr, "server.ops_addr": opsAddr, "server.public_url": publicURL, "server.secret": state.Secret,
	}
	if c.Database.URL != "" && c.Server.Secret != "" {
		set["server.secret"] = c.Server.Secret // the one that the configured database was made with
	}
	admin, ours, archives := c.Database.OwnerURL, c.Database.URL == "", false
	if ours {
		settings := map[string]string{"max_locks_per_transaction": "256", "max_connections": "150", "shared_buffers": "128MB"}
		if c.Backup.Physical.Engine == "" {
			archives = devArchive(ctx, e, o.dir, set, settings)
		}
		pg, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: o.dir, Settings: settings, Preload: []string{counting}})
		if err != nil {
			return err
		}
		stops = append(stops, pg.Stop)
		e.say("PostgreSQL on 127.0.0.1:%d, data in %s", pg.Port(), o.dir)
		admin = pg.URL("oneo")
		set["database.url"], set["database.owner_url"] = roleURL(admin, c.Database.Roles.App, state.Secret), roleURL(admin, c.Database.Roles.Owner, state.Secret)
	}
	if c.Redis.URL == "" {
		redis, err := devstack.StartRedis(ctx, devstack.RedisOptions{Dir: o.dir, Keep: true})
		if err != nil {
			return err
		}
		stops = append(stops, redis.Stop)
		set["redis.url"] = redis.URL()
		if redis.InProcess() {
			e.say("Redis in this process (redis-server is not installed)")
		} else {
			e.say("Redis on 127.0.0.1:%d", redis.Port())
		}
	}
	for k, v := range set {
		e.flags[k] = v
	}
	e.cfg = nil
	if c, err = e.load(); err != nil {
		return err
	}
	if _, err := app.Init(ctx, c, app.InitOptions{AdminURL: admin, Logf: func(string, ...any) {}}); err != nil {
		return err
	}
	if ours {
		if err := devCount(ctx, admin); err != nil {
			return err
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	// Before the servers that it uses are stopped.
	stops = append(stops, func(context.Context) error { e.app = nil; return a.Close() })
	if archives {
		// Before anything is written that is worth having back.
		if err := devGrant(ctx, e, a, admin); err != nil {
			return err
		}
	}
	if err := devFill(ctx, e, a, &state, o); err != nil {
		return err
	}
	if err := saveState(o.dir, state); err != nil {
		return err
	}
	if err := writeEnv(o.dir, set); err != nil {
		return err
	}
	return a.Serve(ctx, app.ServeOptions{Version: versionOf(), Ready: func(string) {
		e.say("ready in %s\n", time.Since(start).Round(10*time.Millisecond))
		devWelcome(e, a, state, o)
		if archives {
			stops = append(stops, devBackUp(ctx, e, a))
		}
	}})
}

// counting is the extension that counts statements, for `oneo inspect queries`.
const counting = "pg_stat_statements"

// devCount makes the extension where the server has loaded it.
func devCount(ctx context.Context, admin string) error {
	c, err := pgx.Connect(ctx, admin)
	if err != nil {
		return postgres.Fault(err)
	}
	defer c.Close(context.WithoutCancel(ctx))
	var loaded bool
	if err := c.QueryRow(ctx, `select current_setting('shared_preload_libraries') = $1`, counting).Scan(&loaded); err != nil || !loaded {
		return err
	}
	_, err = c.Exec(ctx, "create extension if not exists "+counting)
	return err
}

// devArchive adds what an archived PostgreSQL is started with, and what a second terminal must know, and reports whether it did: a
// folder that no archive_command can name has no physical backups.
func devArchive(ctx context.Context, e *env, dir string, set, settings map[string]string) bool {
	repository := filepath.Join(dir, "physical")
	engine, err := physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(repository, config.MainGroup), URL: "postgres://"})
	var plan physical.Plan
	if err == nil {
		plan, err = engine.Plan(ctx)
	}
	if err != nil {
		e.say("no physical backups: %s", fault.Of(err).Message)
		return false
	}
	maps.Copy(settings, plan.Settings)
	set["backup.physical.engine"], set["backup.physical.dir"] = physical.FilesName, repository
	return true
}

// devGrant makes the repository, and lets the owner use it. One of another cluster, whose data folder is gone, is put aside.
func devGrant(ctx context.Context, e *env, a *app.App, admin string) error {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return err
	}
	k := clusters[0]
	err = a.MeetPhysical(ctx, k, admin)
	if !fault.Is(err, fault.Conflict) {
		return err
	}
	aside := k.Where + "-" + time.Now().UTC().Format("20060102T150405Z")
	if err := os.Rename(k.Where, aside); err != nil {
		return err
	}
	e.say("%s: they are in %s now", fault.Of(err).Message, aside)
	return a.MeetPhysical(ctx, k, admin)
}

// devKeep is how many physical backups dev keeps, of one a day on which it is started.
const devKeep = 2

// devBackUp makes a physical backup beside the server where the newest is older than a day, and returns what ends and awaits it.
func devBackUp(ctx context.Context, e *env, a *app.App) func(context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		b, err := devBackedUp(ctx, a)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			e.say("# no physical backup was made: %s", fault.Of(err).Message)
		case b.Label != "":
			e.say("# from now on any moment of a tenant can be had back: oneo restore -t NAME --at '10m ago' --diff")
		}
	}()
	return func(context.Context) error {
		cancel()
		<-done
		return nil
	}
}

func devBackedUp(ctx context.Context, a *app.App) (b physical.Backup, err error) {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return b, err
	}
	s, err := a.PhysicalState(ctx, clusters[0])
	if err != nil {
		return b, err
	}
	if good := s.Good(); len(good) > 0 && time.Since(good[len(good)-1].Stop) < 24*time.Hour {
		return b, nil
	}
	if b, _, err = a.CreatePhysical(ctx, clusters[0], physical.CreateOptions{}); err != nil {
		return b, err
	}
	_, err = a.PrunePhysical(ctx, clusters[0], backup.Policy{Last: devKeep})
	return b, err
}

// devAddresses checks that the ports are free before anything is started. Operators have the one that is configured, or the
// one behind that of the API.
func devAddresses(ctx context.Context, addr, configured string, isConfigured bool) (ops, public string, err error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return "", "", errUsage{fault.New(fault.Invalid, "--addr %q is no address", addr).WithHint("for example --addr 127.0.0.1:9000 or --addr :9000")}
	}
	n, err := strconv.Atoi(port)
	if err != nil || n < 1 || n > 65534 {
		return "", "", errUsage{fault.New(fault.Invalid, "--addr %q has no port from 1 to 65534", addr)}
	}
	ops = net.JoinHostPort("127.0.0.1", strconv.Itoa(n+1))
	if isConfigured {
		ops = configured
	}
	for _, a := range []string{net.JoinHostPort(host, port), ops} {
		if a == "" { // operators are to have none
			continue
		}
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", a)
		if err != nil {
			return "", "", fault.Wrap(err, fault.Conflict, "the address %s is taken", a).WithCode("listen").
				WithHint("is another `oneo dev` running? --addr 127.0.0.1:%d serves elsewhere, and server.ops_addr says where operators are answered", n+1000)
		}
		if err := l.Close(); err != nil {
			return "", "", err
		}
	}
	return ops, "http://localhost:" + port, nil
}

// devConfig is the configuration as it stands, without what an earlier dev wrote into oneo.env: a terminal that has
// sourced it may start dev again.
func devConfig(e *env, dir string) (config.Config, error) {
	if text, err := os.ReadFile(filepath.Join(dir, "oneo.env")); err == nil {
		for line := range strings.Lines(string(text)) {
			kv := strings.ReplaceAll(strings.TrimPrefix(strings.TrimSpace(line), "export "), "'", "")
			e.environ = slices.DeleteFunc(e.environ, func(s string) bool { return s == kv && kv != "" })
		}
	}
	return e.load()
}

func roleURL(admin, role, secret string) string {
	u, err := url.Parse(admin)
	if err != nil {
		panic(err) // devstack made it
	}
	u.User = url.UserPassword(role, postgres.LoginPassword(secret, role))
	return u.String()
}

func loadState(dir string) (devState, error) {
	var s devState
	text, err := os.ReadFile(filepath.Join(dir, "dev.json"))
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("read dev.json: %w", err)
	}
	if s.Keys == nil {
		s.Keys = map[string]string{}
	}
	if s.Secret == "" {
		b := make([]byte, 32)
		if _, err := rand.Read(b); err != nil {
			return s, err
		}
		s.Secret, s.Password = hex.EncodeToString(b), auth.GeneratePassword()
		// Before anything is made with it: a start that is killed goes on with the same secret.
		return s, saveState(dir, s)
	}
	return s, nil
}

func saveState(dir string, s devState) error {
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return writePrivate(filepath.Join(dir, "dev.json"), append(text, '\n'))
}

func writePrivate(path string, text []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, text, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return os.Rename(tmp, path)
}

func writeEnv(dir string, set map[string]string) error {
	var b strings.Builder
	b.WriteString("# For a second terminal: . " + filepath.Join(dir, "oneo.env") + "\n")
	for _, key := range []string{"database.url", "database.owner_url", "redis.url", "server.secret", "server.public_url", "backup.physical.engine", "backup.physical.dir"} {
		if v, ok := set[key]; ok {
			fmt.Fprintf(&b, "export %s='%s'\n", config.EnvName(key), v)
		}
	}
	return writePrivate(filepath.Join(dir, "oneo.env"), []byte(b.String()))
}

// devFill migrates, seeds, and makes the accounts and keys that the welcome shows.
func devFill(ctx context.Context, e *env, a *app.App, state *devState, o devOptions) error {
	if _, err := a.MigrateShared(ctx); err != nil {
		return err
	}
	if err := devMigrate(ctx, e, a); err != nil {
		return err
	}
	hash := ""
	hashed := func() (string, error) {
		var err error
		if hash == "" {
			hash, err = a.Hasher.Hash(ctx, state.Password)
		}
		return hash, err
	}
	key, err := devAccount(ctx, a, people{admins: true}, devAdmin, "Administrator", state.Keys[""], hashed)
	if err != nil {
		return err
	}
	state.Keys[""] = key
	if o.seed == "none" {
		return nil
	}
	report, err := demo.Seed(ctx, demo.Deps{
		Tenant: func(ctx context.Context, slug tenant.Slug, name string) (tenant.Tenant, error) {
			t, err := tenantNamed(ctx, a, slug.String())
			if !fault.Is(err, fault.NotFound) {
				return t, err
			}
			settings := json.RawMessage(fmt.Sprintf(`{"public": {"title": %q}, "currency": "USD"}`, name))
			return a.Provision.Create(ctx, provision.CreateRequest{Slug: slug, Name: name, Settings: settings, Actor: "oneo dev"})
		},
		In: func(ctx context.Context, t tenant.Tenant, fn func(postgres.Querier) error) error {
			return a.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error { return fn(tx) })
		},
	})
	if err != nil {
		return err
	}
	if !report.Already && !e.quiet {
		if err := report.Write(e.err); err != nil {
			return err
		}
	}
	for _, t := range report.Tenants {
		slug := t.Tenant.Slug.String()
		key, err := devAccount(ctx, a, people{tenant: slug}, devUser, "Demo", state.Keys[slug], hashed)
		if err != nil {
			return err
		}
		state.Keys[slug] = key
	}
	return nil
}

// devMigrate brings tenants of an earlier version up.
func devMigrate(ctx context.Context, e *env, a *app.App) error {
	o := migrateOptions{selector: selector{all: true}, fleetOptions: fleetOptions{workOptions: workOptions{jobs: 2, progress: "auto"}}}
	spec := rollout.Spec{Kind: kindMigrate, Actor: e.actor(), Alone: true, Rivals: rivals(kindMigrate)}
	quiet := *e // the report is of no interest here
	quiet.out, quiet.quiet = io.Discard, true
	err := migrateTenants(ctx, &quiet, a, o, spec, nil)
	var exit errExit
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exit):
		return fault.New(fault.Unfit, "not every tenant could be migrated").WithCode("tenants_failed").WithHint("oneo migrate run show last")
	}
	return err
}

// devAccount makes an account where there is none, and an API key where the known one does not work.
func devAccount(ctx context.Context, a *app.App, p people, email, name, known string, hashed func() (string, error)) (key string, err error) {
	r := p.realm()
	var u auth.User
	err = p.in(ctx, a, func(tx *postgres.OwnerTx, _ tenant.Tenant) (err error) {
		if _, err := r.Authenticate(ctx, tx, known, time.Hour); err == nil {
			key = known
			return nil
		}
		u, err = r.UserByEmail(ctx, tx, email)
		return err
	})
	if key != "" {
		return key, nil
	}
	if err != nil && !fault.Is(err, fault.NotFound) {
		return "", err
	}
	hash := ""
	if u.Email == "" {
		if hash, err = hashed(); err != nil { // not inside the transaction
			return "", err
		}
	}
	err = p.in(ctx, a, func(tx *postgres.OwnerTx, _ tenant.Tenant) (err error) {
		if u.Email == "" {
			if u, err = r.AddUser(ctx, tx, auth.NewUser{Email: email, Name: name, Role: auth.RoleAdmin, PasswordHash: hash}); err != nil {
				return err
			}
		}
		_, key, err = r.AddKey(ctx, tx, u.ID, "oneo dev", []string{auth.ScopeAdmin}, nil)
		return err
	})
	return key, err
}

// devWelcome prints what a newcomer does next.
func devWelcome(e *env, a *app.App, state devState, o devOptions) {
	var served []tenant.Tenant
	err := a.DB.AsOwner(context.Background(), postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		served, err = registry.List(context.Background(), tx, registry.Filter{States: []tenant.State{tenant.Active}, Limit: 10})
		return err
	})
	if err != nil {
		e.say("the list of tenants cannot be read: %s", err)
		return
	}
	p := func(format string, args ...any) { fmt.Fprintf(e.out, format+"\n", args...) }
	for _, t := range served {
		if key := state.Keys[t.Slug.String()]; key != "" {
			p("# %s: deals that were won", t.Name)
			p("curl -s -H 'Authorization: Bearer %s' '%s/api/v1/pipelines/opportunities/records?filter=stage%%20=%%20%%22Won%%22&limit=2&count=exact'\n", key, a.URL(t.Primary))
		}
	}
	p("# the administration: all tenants")
	p("curl -s -H 'Authorization: Bearer %s' %s/api/v1/admin/tenants\n", state.Keys[""], a.Config.Server.PublicURL)
	p("# log in by password: %s at the administration, %s at a tenant", devAdmin, devUser)
	p("#   password: %s", state.Password)
	p("# a second terminal: . %s", filepath.Join(o.dir, "oneo.env"))
	p("# Ctrl-C stops")
}
