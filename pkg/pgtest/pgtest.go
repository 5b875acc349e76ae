// Package pgtest gives a test its own database: a clone of a migrated one, on a PostgreSQL that this test process
// started. It serves oneo's tests and those of products built on its packages.
//
// In each test package:
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
// The server starts with the first New and ends with Main, also when the process is killed. A missing PostgreSQL fails
// the test; it never skips it.
package pgtest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

// Secret is the server secret of every test installation.
const Secret = "pgtest-secret-that-is-long-enough-for-tests"

// Patience is for how long a test may wait for what another process or another goroutine does. It is far more than
// anything takes, so that only what never comes fails a test, on however busy a machine.
const Patience = 2 * time.Minute

// Logins is the number of sub-pools of every test installation.
const Logins = 2

const (
	appRole    = "oneo_app"
	ownerRole  = "oneo_owner"
	templateDB = "oneo_template"
)

// cluster is the one PostgreSQL of this test process.
type cluster struct {
	once   sync.Once
	err    error
	dir    string
	more   map[string]string // settings besides those of all
	pg     *devstack.Postgres
	serial atomic.Int64
}

// settings are those of the servers that tests start.
var settings = map[string]string{
	"max_connections": "200", "max_locks_per_transaction": "256", "max_prepared_transactions": "0",
	"autovacuum": "off", // whether it has come by, or is at a table just now, must not decide a test
}

var shared cluster // one server a process: starting one costs half a second

// Main runs the tests of a package and stops what they started.
func Main(m *testing.M) {
	defer shared.stop()
	// A process with the race detector sleeps for a second before it ends, and tests start hundreds of them.
	if os.Getenv("GORACE") == "" {
		_ = os.Setenv("GORACE", "atexit_sleep_ms=10") // for the children: it is read at the start
	}
	m.Run()
}

func (c *cluster) stop() {
	if c.pg != nil {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		_ = c.pg.Stop(ctx) // the folder goes anyway
	}
	if c.dir != "" {
		_ = os.RemoveAll(c.dir)
	}
}

func (c *cluster) start() error {
	c.once.Do(func() { c.err = c.make() })
	return c.err
}

func (c *cluster) make() error {
	if c.dir == "" {
		dir, err := os.MkdirTemp("", "pgtest-")
		if err != nil {
			return err
		}
		c.dir = dir
	}
	if err := os.Chmod(c.dir, 0o755); err != nil { // the server's own user must get through
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	set := maps.Clone(settings)
	maps.Copy(set, c.more)
	var err error
	c.pg, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{
		Dir: c.dir, Fast: true, Trust: true,
		Settings: set,
	})
	if err != nil {
		return fmt.Errorf("start PostgreSQL: %w", err)
	}
	g := c.group(templateDB)
	_, err = postgres.Setup(ctx, postgres.SetupOptions{
		AdminURL: c.pg.URL("postgres"), Group: g, AppRole: appRole, OwnerRole: ownerRole, Secret: Secret, Logins: Logins,
	})
	if err != nil {
		return fmt.Errorf("set up the template: %w", err)
	}
	db, err := postgres.Open(options(g))
	if err != nil {
		return err
	}
	defer db.Close()
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	if err != nil {
		return err
	}
	if _, err := m.Shared(ctx); err != nil {
		return fmt.Errorf("migrate the template: %w", err)
	}
	return nil
}

// group is how the roles reach a database of the cluster, which trusts the loopback.
func (c *cluster) group(database string) postgres.Group {
	as := func(role string) string {
		u, err := url.Parse(c.pg.URL(database))
		if err != nil {
			panic(err) // devstack made it
		}
		u.User = url.User(role)
		return u.String()
	}
	return postgres.Group{URL: as(appRole), OwnerURL: as(ownerRole)}
}

func options(g postgres.Group) postgres.Options {
	o := postgres.DefaultOptions()
	o.Groups = map[string]postgres.Group{postgres.MainGroup: g}
	o.Secret = Secret
	o.MaxConns, o.SharedConns, o.OwnerConns = 6, 3, 3
	Patient(&o)
	return o
}

// Patient sets the bounds of waiting that a busy machine would meet although nothing is wrong. Tests of these bounds set
// their own.
func Patient(o *postgres.Options) {
	o.AcquireTimeout, o.ConnectTimeout, o.StatementTimeout, o.IdleInTransactionTimeout = 30*time.Second, 30*time.Second, time.Minute, Patience
}

// Env is one test's installation: a database of its own with the shared schema at its head and no tenants.
type Env struct {
	DB        *postgres.DB
	Migrate   *migrate.Migrator
	Provision *provision.Provisioner
	Group     postgres.Group // the URLs of the app role and the owner
	AdminURL  string         // a superuser's
	Database  string
	Server    *devstack.Postgres // shared by the tests of the process: do not stop it
	Base      tenant.Host        // localhost

	options postgres.Options
	cluster *cluster
}

// New makes an installation; change adapts how it is opened. Everything is gone when the test ends.
func New(t testing.TB, change ...func(*postgres.Options)) *Env {
	t.Helper()
	return shared.env(t, change...)
}

// NewAlone makes an installation on a server of its own, with settings besides those of all. Its folder is dir, which PostgreSQL's user
// can reach.
func NewAlone(t testing.TB, dir string, settings map[string]string, change ...func(*postgres.Options)) *Env {
	t.Helper()
	c := &cluster{dir: dir, more: settings}
	t.Cleanup(c.stop)
	return c.env(t, change...)
}

func (c *cluster) env(t testing.TB, change ...func(*postgres.Options)) *Env {
	t.Helper()
	if err := c.start(); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	env := &Env{Database: fmt.Sprintf("test_%d", c.serial.Add(1)), Server: c.pg, cluster: c}
	env.AdminURL = c.pg.URL(env.Database)
	env.Group = c.group(env.Database)
	env.clone(t, ctx)

	env.options = options(env.Group)
	for _, f := range change {
		f(&env.options)
	}
	var err error
	if env.Base, err = tenant.ParseHost("localhost"); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	env.DB, env.Migrate, env.Provision = env.Open(t)
	return env
}

// Open opens the installation once more, as another process would.
func (env *Env) Open(t testing.TB, change ...func(*postgres.Options)) (*postgres.DB, *migrate.Migrator, *provision.Provisioner) {
	t.Helper()
	o := env.options
	for _, f := range change {
		f(&o)
	}
	db, err := postgres.Open(o)
	if err != nil {
		t.Fatalf("pgtest: open: %v", err)
	}
	t.Cleanup(db.Close)
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	if err != nil {
		t.Fatalf("pgtest: migrations: %v", err)
	}
	p, err := provision.New(provision.Options{
		DB: db, Migrate: m, BaseDomain: env.Base, DropGrace: 24 * time.Hour, DomainHold: time.Hour,
		GateWait: 30 * time.Second, Logger: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatalf("pgtest: provision: %v", err)
	}
	return db, m, p
}

func (env *Env) clone(t testing.TB, ctx context.Context) {
	t.Helper()
	t.Cleanup(func() { env.drop(t) })
	admin := Admin(t, env.cluster.pg.URL("postgres"))
	if _, err := admin.Exec(ctx, "create database "+postgres.Quote(env.Database)+" template "+templateDB); err != nil {
		t.Fatalf("pgtest: clone the template: %v", err)
	}
	id := make([]byte, 4)
	if _, err := rand.Read(id); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	in := Admin(t, env.AdminURL)
	// Roles are cluster-wide: an id of its own keeps this test's tenants' roles apart from others'.
	if _, err := in.Exec(ctx, `update public.installation set id = $1`, hex.EncodeToString(id)); err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	_, err := postgres.Setup(ctx, postgres.SetupOptions{
		AdminURL: env.AdminURL, Group: env.Group, AppRole: appRole, OwnerRole: ownerRole, Secret: Secret, Logins: Logins, KeepRoles: true,
	})
	if err != nil {
		t.Fatalf("pgtest: set up the clone: %v", err)
	}
}

// drop removes the database and the roles of its tenants.
func (env *Env) drop(t testing.TB) {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	admin, err := pgx.Connect(ctx, env.cluster.pg.URL("postgres"))
	if err != nil {
		t.Logf("pgtest: leave %s behind: %v", env.Database, err)
		return
	}
	defer admin.Close(ctx)
	var id string
	if in, err := pgx.Connect(ctx, env.AdminURL); err == nil {
		_ = in.QueryRow(ctx, `select id from public.installation`).Scan(&id)
		_ = in.Close(ctx)
	}
	if _, err := admin.Exec(ctx, "drop database if exists "+postgres.Quote(env.Database)+" with (force)"); err != nil {
		t.Logf("pgtest: leave %s behind: %v", env.Database, err)
		return
	}
	if id == "" {
		return
	}
	rows, err := admin.Query(ctx, `select rolname from pg_roles where rolname like $1`, "oneo\\_"+id+"\\_%")
	if err != nil {
		return
	}
	roles, _ := pgx.CollectRows(rows, pgx.RowTo[string])
	for _, r := range roles {
		if _, err := admin.Exec(ctx, "drop role if exists "+postgres.Quote(r)); err != nil {
			t.Logf("pgtest: leave role %s behind: %v", r, err)
		}
	}
}

// Blind takes from the owner, until the test ends, what shows it the sessions of others and lets it end them. That is of the
// whole server: the test must not be parallel.
func (env *Env) Blind(t testing.TB) {
	t.Helper()
	admin := Admin(t, env.AdminURL)
	do := func(sql string) {
		if _, err := admin.Exec(context.Background(), sql); err != nil {
			t.Fatalf("pgtest: %s: %v", sql, err)
		}
	}
	do("revoke " + strings.Join(postgres.Sight, ", ") + " from " + ownerRole)
	t.Cleanup(func() { do(postgres.SightGrant(postgres.Sight, ownerRole)) })
}

// Tenant makes a tenant with all its migrations.
func (env *Env) Tenant(t testing.TB, slug string) tenant.Tenant {
	t.Helper()
	made, err := env.Provision.Create(context.Background(), provision.CreateRequest{Slug: Slug(t, slug), Actor: "pgtest"})
	if err != nil {
		t.Fatalf("pgtest: create tenant %s: %v", slug, err)
	}
	return made
}

// Slug parses a slug that the test knows to be good.
func Slug(t testing.TB, s string) tenant.Slug {
	t.Helper()
	slug, err := tenant.ParseSlug(s)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	return slug
}

// Admin connects past oneo; the connection is closed when the test ends.
func Admin(t testing.TB, url string) *pgx.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	c, err := pgx.Connect(ctx, url)
	if err != nil {
		t.Fatalf("pgtest: connect: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = c.Close(ctx)
	})
	return c
}

// SecondGroup makes another database on the same server and returns how it is reached: a group of its own.
func (env *Env) SecondGroup(t testing.TB) postgres.Group {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	name := fmt.Sprintf("test_%d", env.cluster.serial.Add(1))
	g := env.cluster.group(name)
	inst, err := env.DB.Installation(ctx, postgres.MainGroup)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	_, err = postgres.Setup(ctx, postgres.SetupOptions{
		AdminURL: env.cluster.pg.URL(name), Group: g, AppRole: appRole, OwnerRole: ownerRole, Secret: Secret, Logins: Logins, ID: inst.ID, KeepRoles: true,
	})
	if err != nil {
		t.Fatalf("pgtest: set up a second group: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		c, err := pgx.Connect(ctx, env.cluster.pg.URL("postgres"))
		if err != nil {
			t.Logf("pgtest: leave %s behind: %v", name, err)
			return
		}
		defer c.Close(ctx)
		if _, err := c.Exec(ctx, "drop database if exists "+postgres.Quote(name)+" with (force)"); err != nil {
			t.Logf("pgtest: leave %s behind: %v", name, err)
		}
	})
	return g
}

// SecondServer starts another PostgreSQL, with one database, oneo, and returns how it is reached: a group of its own. The test may stop and
// restart the server.
func (env *Env) SecondServer(t testing.TB) (postgres.Group, *devstack.Postgres) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	dir, err := os.MkdirTemp("", "pgtest-")
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil { // the server's own user must get through
		t.Fatalf("pgtest: %v", err)
	}
	pg, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true, Settings: settings})
	if err != nil {
		t.Fatalf("pgtest: start a second PostgreSQL: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), Patience)
		defer cancel()
		_ = pg.Stop(ctx) // the folder goes anyway
	})
	inst, err := env.DB.Installation(ctx, postgres.MainGroup)
	if err != nil {
		t.Fatalf("pgtest: %v", err)
	}
	g := (&cluster{pg: pg}).group("oneo")
	_, err = postgres.Setup(ctx, postgres.SetupOptions{
		AdminURL: pg.URL("oneo"), Group: g, AppRole: appRole, OwnerRole: ownerRole, Secret: Secret, Logins: Logins, ID: inst.ID,
	})
	if err != nil {
		t.Fatalf("pgtest: set up a second server: %v", err)
	}
	return g, pg
}

// Redis starts a redis-server of the test's own.
func Redis(t testing.TB) *devstack.Redis {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	r, err := devstack.StartRedis(ctx, devstack.RedisOptions{Dir: t.TempDir()})
	if err != nil {
		t.Fatalf("pgtest: start Redis: %v", err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		_ = r.Stop(ctx)
	})
	return r
}
