package postgres_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

// own is an installation on a server of the test's own, which it may stop.
type own struct {
	pg    *devstack.Postgres
	group postgres.Group
	db    *postgres.DB
	p     *provision.Provisioner
}

func ownServer(t *testing.T, o devstack.PostgresOptions, change func(*postgres.Options)) own {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgtest-own-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	o.Dir = dir
	pg, err := devstack.StartPostgres(t.Context(), o)
	require.NoError(t, err)
	t.Cleanup(func() { _ = pg.Stop(context.Background()) })
	u, err := url.Parse(pg.URL("oneo"))
	require.NoError(t, err)
	as := func(role string) string { v := *u; v.User = url.User(role); return v.String() }
	if !o.Trust {
		as = func(role string) string {
			v := *u
			v.User = url.UserPassword(role, postgres.LoginPassword(pgtest.Secret, role))
			return v.String()
		}
	}
	g := postgres.Group{URL: as("oneo_app"), OwnerURL: as("oneo_owner")}
	_, err = postgres.Setup(t.Context(), postgres.SetupOptions{
		AdminURL: pg.URL("postgres"), Group: g, AppRole: "oneo_app", OwnerRole: "oneo_owner", Secret: pgtest.Secret, Logins: 2,
	})
	require.NoError(t, err)
	po := postgres.DefaultOptions()
	po.Groups = map[string]postgres.Group{"main": g}
	po.Secret, po.MaxConns = pgtest.Secret, 4
	if change != nil {
		change(&po)
	}
	db, err := postgres.Open(po)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	require.NoError(t, err)
	_, err = m.Shared(t.Context())
	require.NoError(t, err)
	base, err := tenant.ParseHost("localhost")
	require.NoError(t, err)
	p, err := provision.New(provision.Options{DB: db, Migrate: m, BaseDomain: base, DropGrace: time.Hour, DomainHold: time.Hour, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return own{pg: pg, group: g, db: db, p: p}
}

func (o own) tenant(t *testing.T, slug string) tenant.Tenant {
	t.Helper()
	made, err := o.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, slug), Actor: "test"})
	require.NoError(t, err)
	return made
}

// F20, F21: after a restart of PostgreSQL the next request works; while it is away, requests fail in bounded time.
func TestRestart(t *testing.T) {
	t.Parallel()
	o := ownServer(t, devstack.PostgresOptions{Trust: true, Fast: true}, func(po *postgres.Options) { pgtest.Patient(po) })
	a := o.tenant(t, "acme")
	owner := func(db *postgres.DB) error {
		return db.AsOwnerIn(t.Context(), a, func(tx *postgres.OwnerTx) error { return tx.Script(t.Context(), `select 1 from users`) })
	}
	shared := func(db *postgres.DB) error {
		return db.InShared(t.Context(), postgres.Single, func(tx *postgres.Tx) error { _, err := tx.Exec(t.Context(), `select 1`); return err })
	}
	all := func(db *postgres.DB, check func(what string, err error)) {
		for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
			check(fmt.Sprintf("access %d", access), try(t.Context(), db, a, access, `select 1 from users`))
		}
		check("owner", owner(db))
		check("shared", shared(db))
	}
	for range 3 {
		all(o.db, func(what string, err error) { require.NoError(t, err, what) })
	}
	for _, kill := range []bool{false, true} {
		if kill {
			require.NoError(t, o.pg.Kill())
			require.NoError(t, o.pg.Restart(t.Context()))
		} else {
			require.NoError(t, o.pg.Restart(t.Context()))
		}
		all(o.db, func(what string, err error) {
			require.NoErrorf(t, err, "%s: the first request after a restart must work", what)
		})
	}
	// In the middle of a transaction.
	err := o.db.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
		sql, args := insertPipeline("lost")
		_, err := tx.Exec(t.Context(), sql, args...)
		require.NoError(t, err)
		require.NoError(t, o.pg.Restart(t.Context()))
		return nil
	})
	require.Truef(t, fault.Is(err, fault.Unavailable), "a transaction whose server went away: %v", err)
	require.Zero(t, value[int](t, o.db, a, postgres.Single, `select count(*) from pipelines`))

	po := postgres.DefaultOptions()
	po.Groups, po.Secret = map[string]postgres.Group{"main": o.group}, pgtest.Secret
	po.AcquireTimeout = 700 * time.Millisecond
	brief, err := postgres.Open(po)
	require.NoError(t, err)
	defer brief.Close()
	for range 3 {
		all(brief, func(string, error) {}) // it has connections, which will be lost
	}
	require.NoError(t, o.pg.Stop(t.Context()))
	start := time.Now()
	all(brief, func(what string, err error) {
		require.Truef(t, fault.Is(err, fault.Unavailable), "%s while the server is away: want Unavailable, got %v", what, err)
	})
	require.Less(t, time.Since(start), pgtest.Patience/2, "none waits until the server is back")
	require.NoError(t, o.pg.Restart(t.Context()))
	all(o.db, func(what string, err error) { require.NoErrorf(t, err, "%s after the server came back", what) })

	// It comes back while a request waits: nobody notices.
	require.NoError(t, o.pg.Stop(t.Context()))
	db, err := postgres.Open(func() postgres.Options {
		po := postgres.DefaultOptions()
		po.Groups, po.Secret, po.AcquireTimeout = map[string]postgres.Group{"main": o.group}, pgtest.Secret, pgtest.Patience
		return po
	}())
	require.NoError(t, err)
	defer db.Close()
	done := make(chan error, 2)
	go func() { done <- try(context.Background(), db, a, postgres.Single, `select 1`) }()
	go func() { done <- db.AsOwner(context.Background(), "main", func(*postgres.OwnerTx) error { return nil }) }()
	require.NoError(t, o.pg.Restart(t.Context()))
	require.NoError(t, <-done)
	require.NoError(t, <-done)
}

// Backends that an administrator ends are replaced without anybody noticing.
func TestTerminatedBackends(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
		for range 3 {
			require.Equal(t, 1, value[int](t, env.DB, a, access, `select 1`))
		}
		admin(t, env, `select pg_terminate_backend(pid, 60000) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()`)
		require.Equal(t, 1, value[int](t, env.DB, a, access, `select 1`))
	}
}

// F25: no free slot in PostgreSQL is waited for, in a bound, and then Unavailable.
func TestTooManyConnections(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.AcquireTimeout = 2 * time.Second })
	a := env.Tenant(t, "acme")
	// Roles are shared by the tests of this process: the limit is the database's.
	admin(t, env, fmt.Sprintf(`alter database %s connection limit 0`, env.Database))
	fresh, _, _ := env.Open(t)
	for _, access := range []postgres.Access{postgres.Single, postgres.Write} {
		err := try(t.Context(), fresh, a, access, `select 1`)
		requireFault(t, err, fault.Unavailable, "too_many_connections")
		require.Positive(t, fault.Of(err).Retry)
	}
	patient, _, _ := env.Open(t, func(o *postgres.Options) { o.AcquireTimeout = pgtest.Patience })
	freed := time.AfterFunc(150*time.Millisecond, func() {
		c, err := pgx.Connect(context.Background(), env.AdminURL)
		if err != nil {
			t.Errorf("free a slot: %v", err)
			return
		}
		defer c.Close(context.Background())
		if _, err := c.Exec(context.Background(), fmt.Sprintf(`alter database %s connection limit -1`, env.Database)); err != nil {
			t.Errorf("free a slot: %v", err)
		}
	})
	defer freed.Stop()
	require.NoError(t, try(t.Context(), patient, a, postgres.Write, `select 1`), "a slot that becomes free within the bound is taken")
}

// proxy forwards to an address until it is told to swallow everything, as a network that drops packets would.
type proxy struct {
	addr string
	mu   sync.Mutex
	hole bool
	word string // a connection on which it is sent goes dark
	open []net.Conn
}

// swallow makes each connection that sends the word go dark for good.
func (p *proxy) swallow(word string) { p.mu.Lock(); p.word = word; p.mu.Unlock() }

// forward ends that for the connections to come.
func (p *proxy) forward() { p.swallow("") }

func newProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{addr: l.Addr().String()}
	t.Cleanup(func() {
		_ = l.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, c := range p.open {
			_ = c.Close()
		}
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s, err := net.Dial("tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			p.mu.Lock()
			p.open = append(p.open, c, s)
			p.mu.Unlock()
			go p.copy(s, c)
			go p.copy(c, s)
		}
	}()
	return p
}

func (p *proxy) copy(to, from net.Conn) {
	buf := make([]byte, 32<<10)
	dark := false
	for {
		n, err := from.Read(buf)
		p.mu.Lock()
		dark = dark || p.word != "" && bytes.Contains(buf[:n], []byte(p.word))
		hole := p.hole || dark
		p.mu.Unlock()
		if hole {
			if err != nil {
				return
			}
			continue
		}
		if n > 0 {
			if _, werr := to.Write(buf[:n]); werr != nil {
				return
			}
		}
		if err != nil {
			_ = to.Close()
			return
		}
	}
}

func (p *proxy) set(hole bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hole = hole
	if !hole { // the packets that were dropped are lost: those connections are dead
		for _, c := range p.open {
			_ = c.Close()
		}
		p.open = nil
	}
}

func through(t *testing.T, raw, addr string) string {
	t.Helper()
	u, err := url.Parse(raw)
	require.NoError(t, err)
	u.Host = addr
	return u.String()
}

// F23, F24: a network that swallows everything ends at the caller's deadline, and the other group's work goes on.
func TestBlackHole(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	holed := newProxy(t, fmt.Sprintf("127.0.0.1:%d", env.Server.Port()))
	groups := map[string]postgres.Group{
		"main": env.Group, "second": {URL: through(t, second.URL, holed.addr), OwnerURL: second.OwnerURL},
	}
	_, m, p := env.Open(t, func(o *postgres.Options) { o.Groups = groups })
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.AcquireTimeout, o.ConnectTimeout, o.StatementTimeout, o.Groups = 2*time.Second, 2*time.Second, 2*time.Second, groups
	})
	_, err := m.Shared(t.Context())
	require.NoError(t, err)
	a, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: "second", Actor: "test"})
	require.NoError(t, err)
	b, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Actor: "test"})
	require.NoError(t, err)
	for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
		for range 3 {
			require.Equal(t, 1, value[int](t, db, a, access, `select 1`))
			require.Equal(t, 1, value[int](t, db, b, access, `select 1`))
		}
	}
	for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
		holed.set(true)
		var wg sync.WaitGroup
		var hanging atomic.Bool
		hanging.Store(true)
		for _, bound := range []time.Duration{300 * time.Millisecond, 0} { // with a deadline, and with none of the caller's
			wg.Go(func() {
				ctx, cancel := t.Context(), context.CancelFunc(func() {})
				if bound > 0 {
					ctx, cancel = context.WithTimeout(ctx, bound)
				}
				defer cancel()
				start := time.Now()
				err := try(ctx, db, a, access, `select 1`)
				if err == nil || time.Since(start) > pgtest.Patience/2 {
					t.Errorf("access %d, deadline %s: %v after %s", access, bound, err, time.Since(start))
				}
				if bound == 0 {
					hanging.Store(false)
				}
			})
		}
		meanwhile := 0
		for hanging.Load() {
			require.Equal(t, 1, value[int](t, db, b, access, `select 1`))
			meanwhile++
		}
		require.Greater(t, meanwhile, 3, "the other group must not wait")
		wg.Wait()
		holed.set(false)
		until(t, "the group works again", func() bool { return try(t.Context(), db, a, access, `select 1`) == nil })
	}
	env.Invariants(t)
}

// A reply to COMMIT that never comes is an unknown outcome, and is called so.
func TestLostCommit(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	holed := newProxy(t, fmt.Sprintf("127.0.0.1:%d", env.Server.Port()))
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.StatementTimeout = 3 * time.Second
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, holed.addr), OwnerURL: env.Group.OwnerURL}}
	})
	a := env.Tenant(t, "acme")
	err := db.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
		sql, args := insertPipeline("k")
		_, err := tx.Exec(t.Context(), sql, args...)
		holed.set(true)
		return err
	})
	requireFault(t, err, fault.Unavailable, "outcome_unknown")
	holed.set(false)
}

// Passwords derived from the secret work with SCRAM, and others do not.
func TestScram(t *testing.T) {
	t.Parallel()
	o := ownServer(t, devstack.PostgresOptions{Fast: true}, nil)
	a := o.tenant(t, "acme")
	require.Equal(t, "acme", value[string](t, o.db, a, postgres.Single, `select current_schema()`))
	po := postgres.DefaultOptions()
	po.Groups, po.Secret = map[string]postgres.Group{"main": o.group}, "another secret, which is long enough too"
	po.AcquireTimeout = pgtest.Patience
	wrong, err := postgres.Open(po)
	require.NoError(t, err)
	defer wrong.Close()
	start := time.Now()
	err = try(t.Context(), wrong, a, postgres.Single, `select 1`)
	requireFault(t, err, fault.Unavailable, "login_refused")
	require.Less(t, time.Since(start), pgtest.Patience/2, "a wrong password is not tried again and again")
	var stored string
	c := pgtest.Admin(t, o.pg.URL("oneo"))
	require.NoError(t, c.QueryRow(t.Context(), `select rolpassword from pg_authid where rolname = 'oneo_app_1'`).Scan(&stored))
	require.Regexp(t, `^SCRAM-SHA-256\$4096:`, stored)
}

// The pool makes connections behind whoever waits for them, with no deadline of theirs: one whose server falls silent
// after the login gives its place free again.
func TestSilenceAfterTheLogin(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	silent := newProxy(t, fmt.Sprintf("127.0.0.1:%d", env.Server.Port()))
	db, _, _ := env.Open(t, oneConn, func(o *postgres.Options) {
		o.AcquireTimeout, o.ConnectTimeout = 2*time.Second, 2*time.Second
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, silent.addr), OwnerURL: env.Group.OwnerURL}}
	})
	a := env.Tenant(t, "acme")
	_, err := db.Installation(t.Context(), postgres.MainGroup) // over the shared pool; the tenant's is made below
	require.NoError(t, err)
	silent.swallow("search_path")
	err = try(t.Context(), db, a, postgres.Write, `select 1`)
	require.Truef(t, fault.Is(err, fault.Unavailable), "nobody answers: %v", err)
	silent.forward() // new connections: the silent one stays as it is
	until(t, "the only place for a connection is free again", func() bool { return try(t.Context(), db, a, postgres.Write, `select 1`) == nil })
}

// F21: PostgreSQL is killed under writes, on a server that does wait for its disk: every write that was acknowledged is
// there after its recovery, once.
func TestAcknowledgedWritesSurviveACrash(t *testing.T) {
	t.Parallel()
	o := ownServer(t, devstack.PostgresOptions{Trust: true}, nil)
	a, b := o.tenant(t, "acme"), o.tenant(t, "globex")
	ctx, stop := context.WithCancel(t.Context())
	var mu sync.Mutex
	acknowledged := map[tenant.Tenant][]string{}
	count := 0
	var writers sync.WaitGroup
	for w := range 4 {
		tn := []tenant.Tenant{a, b}[w%2]
		writers.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				sql, args := insertPipeline(pipelineKey(w, n))
				if try(ctx, o.db, tn, postgres.Write, sql, args...) == nil {
					mu.Lock()
					acknowledged[tn] = append(acknowledged[tn], pipelineKey(w, n))
					count++
					mu.Unlock()
				}
			}
		})
	}
	more := func(n int) {
		mu.Lock()
		want := count + n
		mu.Unlock()
		until(t, "writes are acknowledged", func() bool { mu.Lock(); defer mu.Unlock(); return count >= want })
	}
	for range 3 {
		more(40)
		require.NoError(t, o.pg.Kill())
		require.NoError(t, o.pg.Restart(t.Context()))
	}
	more(40)
	stop()
	writers.Wait()
	for tn, keys := range acknowledged {
		var there []string
		require.NoError(t, o.db.InTenant(t.Context(), tn, postgres.Read, func(tx *postgres.Tx) error {
			rows, err := tx.Query(t.Context(), `select key from pipelines`)
			if err != nil {
				return err
			}
			there, err = pgx.CollectRows(rows, pgx.RowTo[string])
			return err
		}))
		require.Subset(t, there, keys, "an acknowledged write of %s is missing", tn.Slug)
	}
}
