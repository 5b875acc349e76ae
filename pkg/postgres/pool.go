package postgres

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/multitracer"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgconn/ctxwatch"
	"github.com/jackc/pgx/v5/pgxpool"
	pgxuuid "github.com/vgarvardt/pgx-google-uuid/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// group is one group's database: a pool for shared work, one for the owner, and sub-pools for tenants' work. The pools
// are made at their first use.
type group struct {
	name     string
	urls     Group
	opts     *Options
	inFlight atomic.Pointer[inFlight]
	retired  atomic.Int64
	// passed are statements that the guard has let through.
	passed      sync.Map
	passedCount atomic.Int64
	// states are those of the open connections for tenants' work.
	states sync.Map // *connState -> nothing

	mu     sync.Mutex
	shared *pgxpool.Pool
	owner  *pgxpool.Pool
	// sessions are those that read, and are used again.
	sessions *pgxpool.Pool
	inst     *Installation
	subs     []*subPool
	closed   bool
}

// subPool holds the connections of one login. A tenant's work always goes through the same one, because PostgreSQL's
// backends never forget a tenant that they have seen.
type subPool struct {
	group *group
	pool  *pgxpool.Pool

	mu      sync.Mutex
	cap     int // distinct tenants after which a connection is retired
	counted time.Time
}

func newGroup(name string, urls Group, opts *Options) *group {
	return &group{name: name, urls: urls, opts: opts}
}

func (g *group) close() {
	g.mu.Lock()
	pools := []*pgxpool.Pool{g.shared, g.owner, g.sessions}
	for _, s := range g.subs {
		pools = append(pools, s.pool)
	}
	g.closed, g.shared, g.owner, g.sessions, g.subs = true, nil, nil, nil, nil
	g.mu.Unlock()
	for _, p := range pools {
		if p != nil {
			p.Close()
		}
	}
}

// config is what all pools of the group have in common.
func (g *group) config(url string, conns int) (*pgxpool.Config, error) {
	cfg, err := pgxpool.ParseConfig(url)
	if err != nil {
		return nil, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", g.name)
	}
	cfg.MaxConns = int32(conns)
	cfg.MinConns = 0
	// A connection knows the tenants that it has served; replacing it costs their catalog anew.
	cfg.MaxConnLifetime = 4 * time.Hour
	cfg.MaxConnLifetimeJitter = time.Hour
	cfg.MaxConnIdleTime = 15 * time.Minute
	cfg.PingTimeout = g.opts.AcquireTimeout
	cc := cfg.ConnConfig
	cc.ConnectTimeout = g.opts.ConnectTimeout
	// Work that has no bound of its own, a migration, ends when the other side has said nothing for half a minute.
	cc.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}).DialContext
	if cc.RuntimeParams["application_name"] == "" {
		cc.RuntimeParams["application_name"] = "oneo"
	}
	cfg.AfterConnect = g.greet
	// A cancelled request cancels its statement and keeps its connection.
	cc.BuildContextWatcherHandler = func(pc *pgconn.PgConn) ctxwatch.Handler {
		return &pgconn.CancelRequestContextWatcherHandler{Conn: pc, CancelRequestDelay: 0, DeadlineDelay: time.Second}
	}
	return cfg, nil
}

func (g *group) open(pool **pgxpool.Pool, url string, conns int, tune func(*pgxpool.Config)) (*pgxpool.Pool, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errors.New("database is closed")
	}
	if *pool != nil {
		return *pool, nil
	}
	cfg, err := g.config(url, conns)
	if err != nil {
		return nil, err
	}
	cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
	if g.opts.Statements == Unprepared {
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeDescribeExec
	}
	if tune != nil {
		tune(cfg)
	}
	p, err := pgxpool.NewWithConfig(context.Background(), cfg)
	if err != nil {
		return nil, fmt.Errorf("make pool of group %s: %w", g.name, err)
	}
	*pool = p
	return p, nil
}

// trace has the work on a pool's connections counted and traced.
func (g *group) trace(cfg *pgxpool.Config) {
	var all []pgx.QueryTracer
	if g.opts.Counter != nil {
		all = append(all, tracer{})
	}
	if g.opts.Tracer != nil {
		all = append(all, g.opts.Tracer)
	}
	switch len(all) {
	case 0:
	case 1:
		cfg.ConnConfig.Tracer = all[0]
	default:
		cfg.ConnConfig.Tracer = multitracer.New(all...)
	}
}

func (g *group) sharedPool() (*pgxpool.Pool, error) {
	return g.open(&g.shared, g.urls.URL, g.opts.SharedConns, g.trace)
}

func (g *group) ownerPool() (*pgxpool.Pool, error) {
	return g.open(&g.owner, g.urls.OwnerURL, g.opts.OwnerConns, nil)
}

// OwnerPool makes a pool of at most so many connections of the owner's to a group's database, past any pooler, for a library
// that brings its own statements. Nothing binds or ends them; their search path is empty. Whoever asks for it closes it.
func (db *DB) OwnerPool(groupName string, conns int) (*pgxpool.Pool, error) {
	g, err := db.group(groupName)
	if err != nil {
		return nil, err
	}
	cfg, err := g.config(g.urls.DirectURL, conns)
	if err != nil {
		return nil, err
	}
	return pgxpool.NewWithConfig(context.Background(), cfg)
}

// outsideTx runs a statement in one message exchange: outside of a transaction a pooler may give the second one to
// another server connection.
const outsideTx = pgx.QueryExecModeExec

const readInstallation = `select id, logins, app_role from public.installation`

// installation reads what Setup fixed, once.
func (g *group) installation(ctx context.Context) (Installation, error) {
	g.mu.Lock()
	known := g.inst
	g.mu.Unlock()
	if known != nil {
		return *known, nil
	}
	pool, err := g.sharedPool()
	if err != nil {
		return Installation{}, err
	}
	var inst Installation
	err = retryLost(ctx, g.opts.AcquireTimeout, pool.Reset, func(ctx context.Context) error {
		return pool.QueryRow(ctx, readInstallation, outsideTx).Scan(&inst.ID, &inst.Logins, &inst.AppRole)
	})
	switch code := SQLState(err); {
	case code == "42P01" || code == "3F000" || code == "42501" || errors.Is(err, pgx.ErrNoRows):
		return Installation{}, fault.Wrap(err, fault.Pending, "the database of group %s has not been initialised", g.name).
			WithCode("not_initialised").WithHint("run `oneo init` once, with an administrator's URL")
	case err != nil:
		return Installation{}, Fault(err)
	}
	g.mu.Lock()
	g.inst = &inst
	g.mu.Unlock()
	return inst, nil
}

// subPool is the one that serves the tenant.
func (g *group) subPool(ctx context.Context, number int32) (*subPool, error) {
	g.mu.Lock()
	if n := len(g.subs); n > 0 {
		s := g.subs[int(number)%n]
		g.mu.Unlock()
		return s, nil
	}
	g.mu.Unlock()
	inst, err := g.installation(ctx)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, errors.New("database is closed")
	}
	if len(g.subs) == 0 {
		if err := g.makeSubPools(inst); err != nil {
			return nil, err
		}
	}
	return g.subs[int(number)%len(g.subs)], nil
}

func (g *group) makeSubPools(inst Installation) error {
	n := max(1, inst.Logins)
	conns := max(1, g.opts.MaxConns/n)
	limit := g.opts.InFlight
	if limit <= 0 {
		limit = max(1, min(g.opts.MaxConns/4, conns-1))
	}
	var subs []*subPool
	for k := range n {
		cfg, err := g.config(g.urls.URL, conns)
		if err != nil {
			return err
		}
		if inst.Logins > 0 {
			cfg.ConnConfig.User = LoginName(inst.AppRole, k)
			cfg.ConnConfig.Password = LoginPassword(g.opts.Secret, cfg.ConnConfig.User)
		}
		// Statements are prepared by name, or not at all: pgx's own cache would parse them outside the binding. Its mode
		// is on all the same, because a batch of names alone then goes without describing each of them again.
		cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeCacheStatement
		cfg.ConnConfig.StatementCacheCapacity = 1
		if g.opts.Statements == Unprepared {
			cfg.ConnConfig.DefaultQueryExecMode = pgx.QueryExecModeExec
			cfg.ConnConfig.StatementCacheCapacity = 0
		}
		cfg.ConnConfig.DescriptionCacheCapacity = 0
		cfg.AfterConnect, cfg.BeforeClose = g.afterConnect, g.beforeClose
		g.trace(cfg)
		pool, err := pgxpool.NewWithConfig(context.Background(), cfg)
		if err != nil {
			for _, s := range subs {
				s.pool.Close()
			}
			return fmt.Errorf("make sub-pool of group %s: %w", g.name, err)
		}
		subs = append(subs, &subPool{group: g, pool: pool})
	}
	g.subs = subs
	g.inFlight.Store(newInFlight(limit, max(1, conns-1), g.opts.AcquireTimeout))
	return nil
}

// greet makes pgx send and read ids by their bytes, where it takes the longer way over their text otherwise, and
// refuses a pooler that would lose prepared statements.
func (g *group) greet(ctx context.Context, c *pgx.Conn) error {
	pgxuuid.Register(c.TypeMap())
	if g.opts.Counter != nil {
		c.PgConn().CustomData()[tallyKey] = &tally{}
	}
	if g.opts.Statements != Prepared {
		return nil
	}
	var pid uint32
	if err := c.QueryRow(ctx, `select pg_catalog.pg_backend_pid()`, outsideTx).Scan(&pid); err != nil {
		return err
	}
	if pid == c.PgConn().PID() {
		return nil
	}
	// A pooler stands between: the process that answers is not the one that said hello. One that carries prepared
	// statements gives them names of its own; one that does not leaves ours, on a server connection that is ours only
	// until the transaction ends.
	var lost bool
	err := pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
		if _, err := tx.Prepare(ctx, nameProbe, `select 1`); err != nil {
			return err
		}
		const seen = `select exists (select from pg_catalog.pg_prepared_statements where name = $1)`
		if err := tx.QueryRow(ctx, seen, outsideTx, nameProbe).Scan(&lost); err != nil {
			return err
		}
		return tx.Conn().Deallocate(ctx, nameProbe)
	})
	if err != nil && SQLState(err) != "42P05" { // another client's probe of the same name: it was not carried either
		return err
	}
	if err != nil || lost {
		return fault.New(fault.Pending, "the pooler at %s carries no prepared statements", place(&c.Config().Config)).
			WithCode("pooler_unprepared").WithHint("set database.statements to unprepared, or use PgBouncer 1.21 or newer with max_prepared_statements above 0")
	}
	return nil
}

// afterConnect refuses a login whose statements would find tables without a binding, and prepares the binding.
func (g *group) afterConnect(ctx context.Context, c *pgx.Conn) error {
	// The pool makes connections behind whoever waits for them, with no deadline of theirs: a server that falls silent
	// here would keep the place of this connection for good.
	ctx, cancel := context.WithTimeout(ctx, g.opts.ConnectTimeout)
	defer cancel()
	if err := g.greet(ctx, c); err != nil {
		return err
	}
	var path string
	if err := c.QueryRow(ctx, `select current_setting('search_path')`, pgx.QueryExecModeExec).Scan(&path); err != nil {
		return err
	}
	if path != "" && path != `""` {
		return fault.New(fault.Pending, "the login %s has a search path of its own", c.Config().User).
			WithCode("search_path").WithHint("run `oneo init`, which sets it empty")
	}
	if g.opts.Statements == Prepared {
		for name, sql := range map[string]string{nameBegin: sqlBegin, nameGate: sqlGate, nameBind: g.opts.sqlBind(g.opts.Serves)} {
			if _, err := c.Prepare(ctx, name, sql); err != nil {
				return err
			}
		}
	}
	st := newConnState(g.opts.HotStatements)
	c.PgConn().CustomData()[stateKey] = st
	g.states.Store(st, nil)
	return nil
}

func (g *group) beforeClose(c *pgx.Conn) {
	if st, ok := c.PgConn().CustomData()[stateKey].(*connState); ok {
		g.states.Delete(st)
	}
}

// acquire gets a connection, waiting at most until the deadline.
func (s *subPool) acquire(ctx context.Context, deadline time.Time) (*pgxpool.Conn, error) {
	actx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	c, err := s.pool.Acquire(actx)
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return nil, fault.Wrap(err, fault.Unavailable, "no database connection became free in time").
			WithCode("pool_exhausted").WithRetry(time.Second)
	}
	return c, err
}

// release gives a connection back, or closes it when its backend has seen too many tenants.
func (s *subPool) release(c *pgxpool.Conn) {
	st := stateOf(c)
	if !c.Conn().IsClosed() && st != nil && s.worn(st) {
		s.group.retired.Add(1)
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		_ = c.Conn().Close(ctx) // the pool drops a closed connection; the backend ends with its socket
		cancel()
	}
	c.Release()
}

const (
	minTenantsPerConn  = 400
	bytesPerTenant     = 60 << 10 // relation cache of one tenant (measurements: 857 MB / 4,992)
	bytesPerStatement  = 43 << 10 // plan of one statement of one tenant
	bytesPerBackend    = 8 << 20
	recountTenantsEach = time.Minute
)

// worn reports whether a backend has seen so many tenants that it is cheaper to start a new one.
func (s *subPool) worn(st *connState) bool {
	seen := len(st.seen)
	if limit := s.group.opts.BackendMemory; limit > 0 &&
		int64(bytesPerBackend+seen*bytesPerTenant+len(st.own)*bytesPerStatement) > limit {
		return true
	}
	if n := s.group.opts.MaxTenants; n > 0 {
		return seen > n
	}
	if seen <= minTenantsPerConn {
		return false
	}
	return seen > s.tenantCap()
}

// tenantCap is max(400, 1.3 x tenants of the sub-pool), counted at most once a minute.
func (s *subPool) tenantCap() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.counted) < recountTenantsEach {
		return s.cap
	}
	s.counted = time.Now()
	s.cap = max(s.cap, minTenantsPerConn)
	pool, err := s.group.sharedPool()
	if err != nil {
		return s.cap
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	var n int
	if err := pool.QueryRow(ctx, `select count(*) from public.placements`, outsideTx).Scan(&n); err == nil {
		s.group.mu.Lock()
		subs := max(1, len(s.group.subs))
		s.group.mu.Unlock()
		s.cap = max(minTenantsPerConn, n*13/(10*subs))
	}
	return s.cap
}

// retryLost runs fn again while the connection or the server is lost, for as long as wait; reset throws away the
// connections that the lost server left behind. fn must be safe to run again.
func retryLost(ctx context.Context, wait time.Duration, reset func(), fn func(context.Context) error) error {
	deadline := time.Now().Add(wait)
	for attempt := 0; ; attempt++ {
		err := fn(ctx)
		if err == nil || !mayPass(err) {
			return err
		}
		if attempt == 0 && connectionLost(err) {
			reset()
		}
		if !pause(ctx, deadline, attempt) {
			return err
		}
	}
}

// pause waits a jittered moment that grows with the attempt; false when the deadline or the context ends first.
func pause(ctx context.Context, deadline time.Time, attempt int) bool {
	d := jittered(min(5*time.Millisecond<<min(attempt, 6), 250*time.Millisecond))
	return !time.Now().Add(d).After(deadline) && rest(ctx, d)
}

// jittered is a time about as long as d.
func jittered(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// rest waits; false when the context ends first.
func rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Stats is what the pools of one group are doing.
type Stats struct {
	Group   string
	InUse   int           // tenants' connections at work
	Idle    int           // tenants' connections at rest
	Max     int           // tenants' connections at most
	Waits   int64         // times that work got a connection that it had to wait for
	WaitFor time.Duration // all of these waits together
	GaveUp  int64         // times that work got none: its time was over, or whoever asked had left
	Retired int64         // connections closed because their backends had seen too many tenants
	Tenants int           // distinct tenants of the open connection that has seen most
}

// Stats describes each group that has been used.
func (db *DB) Stats() []Stats {
	var all []Stats
	for _, name := range db.Groups() {
		g, err := db.group(name)
		if err != nil {
			continue
		}
		st := Stats{Group: name, Retired: g.retired.Load()}
		g.mu.Lock()
		for _, s := range g.subs {
			ps := s.pool.Stat()
			st.InUse += int(ps.AcquiredConns())
			st.Idle += int(ps.IdleConns())
			st.Max += int(ps.MaxConns())
			st.Waits += ps.EmptyAcquireCount()
			st.WaitFor += ps.EmptyAcquireWaitTime()
			st.GaveUp += ps.CanceledAcquireCount()
		}
		g.mu.Unlock()
		g.states.Range(func(state, _ any) bool {
			st.Tenants = max(st.Tenants, int(state.(*connState).known.Load()))
			return true
		})
		all = append(all, st)
	}
	return all
}
