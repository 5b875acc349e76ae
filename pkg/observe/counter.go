package observe

import (
	"cmp"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Counter counts the requests and transactions of one process, of all and of each tenant. It is safe for concurrent use, and
// what it holds is bounded whatever requests ask for: by MaxTenants, and by the routes, methods and statuses that a server has.
type Counter struct {
	began time.Time
	now   func() time.Duration // since began
	limit int                  // of tenants

	all    load
	window window // of all
	shards [shards]shard
	held   atomic.Int64 // tenants in the shards
	growth sync.Mutex   // one at a time makes room

	routes       atomic.Pointer[map[routeKey]routeCount]
	adding       sync.Mutex // to routes
	requests     *prometheus.CounterVec
	durations    *prometheus.HistogramVec
	worked       *prometheus.HistogramVec
	failures     *prometheus.CounterVec
	statements   *prometheus.CounterVec
	rows         *prometheus.CounterVec
	transactions [2]transactionCount // of tenants, of the shared tables

	// The rest is what the series of /metrics need.
	mu    sync.Mutex
	top   int              // tenants with series of their own
	other counts           // of the tenants that had none meanwhile
	shown map[int32]*entry // at most 2 * top
	owed  map[int32]counts // what Usage has to be told of tenants that are not held any more
}

var _ postgres.Counter = (*Counter)(nil)

// shards is how many parts the tenants lie in: whoever comes for the first time locks one of them.
const shards = 64

type shard struct {
	mu      sync.RWMutex
	tenants map[int32]*entry
}

// load is what is counted of all requests, and of each tenant's.
type load struct {
	requests, errors, refused, inFlight, database, transactions, rows, bytes atomic.Int64
}

// counts is a load at one moment, without what goes down again.
type counts struct {
	requests, errors, refused, transactions, rows, bytes int64
	database                                             time.Duration
}

func (l *load) counts() counts {
	return counts{
		requests: l.requests.Load(), errors: l.errors.Load(), refused: l.refused.Load(), transactions: l.transactions.Load(),
		rows: l.rows.Load(), bytes: l.bytes.Load(), database: time.Duration(l.database.Load()),
	}
}

func (c *counts) add(o counts) {
	c.requests += o.requests
	c.errors += o.errors
	c.refused += o.refused
	c.transactions += o.transactions
	c.rows += o.rows
	c.bytes += o.bytes
	c.database += o.database
}

func (c counts) minus(o counts) counts {
	return counts{
		requests: c.requests - o.requests, errors: c.errors - o.errors, refused: c.refused - o.refused,
		transactions: c.transactions - o.transactions, rows: c.rows - o.rows, bytes: c.bytes - o.bytes, database: c.database - o.database,
	}
}

// entry is one tenant. While it is in its shard, it is written with the shard locked for reading at least.
type entry struct {
	number int32
	name   atomic.Pointer[tenantName]
	load   load
	window atomic.Pointer[window] // nil: no request so far
	used   atomic.Int64           // when last, as a time.Duration since began
	gone   atomic.Bool            // the tenant was dropped: the entry goes when nothing of it is in flight

	// Counter.mu guards these.
	settled counts // what has been added to series, its own or the others'
	told    counts // what Usage was told of
	series  counts // what its own show; it had none before
	as      string // the name in its series
	fresh   bool   // they are new
	inTop   time.Duration
	size    int64 // bytes; 0: unknown
}

type tenantName struct {
	slug  string
	epoch int64
}

func (e *entry) slug() string { return e.name.Load().slug }

type routeKey struct {
	route, method string
	status        int
}

type routeCount struct {
	count    prometheus.Counter
	duration prometheus.Observer
}

type transactionCount struct {
	duration                   prometheus.Observer
	failures, statements, rows prometheus.Counter
}

// NewCounter makes a counter whose /metrics have series of their own for so many tenants.
func NewCounter(top int) *Counter {
	c := &Counter{began: time.Now(), limit: MaxTenants, top: top, shown: map[int32]*entry{}, owed: map[int32]counts{}}
	c.now = func() time.Duration { return time.Since(c.began) }
	for i := range c.shards {
		c.shards[i].tenants = map[int32]*entry{}
	}
	c.routes.Store(&map[routeKey]routeCount{})
	c.requests, c.durations = counterVec(httpRequests), histogramVec(httpDuration)
	c.worked, c.failures = histogramVec(transactionDuration), counterVec(transactionFailures)
	c.statements, c.rows = counterVec(transactionStatements), counterVec(transactionRows)
	for i, work := range []string{"tenant", "shared"} {
		c.transactions[i] = transactionCount{
			c.worked.WithLabelValues(work), c.failures.WithLabelValues(work), c.statements.WithLabelValues(work), c.rows.WithLabelValues(work),
		}
	}
	return c
}

// Answer is one request's end.
type Answer struct {
	Tenant int32  // whose it was, if Bind was told and took it; 0 otherwise
	Route  string // its template; empty: none matched
	Method string
	Status int // 0: nothing was answered
	Bytes  int // of the answer's body
	Took   time.Duration
	Refused,
	Failed bool
}

// Begin counts a request that has come, before it is known for whom.
func (c *Counter) Begin() { c.all.inFlight.Add(1) }

// Bind says for which tenant a request is, between its Begin and its End. False: there is no room for the tenant, or it is
// not there any more, and the request counts among all only.
func (c *Counter) Bind(t tenant.Tenant) bool {
	return c.of(t, func(e *entry) { e.load.inFlight.Add(1) }, counts{requests: 1})
}

// End counts a request that is over.
func (c *Counter) End(a Answer) {
	now := c.now()
	rc := c.route(a)
	rc.count.Inc()
	rc.duration.Observe(a.Took.Seconds())
	c.all.answered(a)
	c.window.add(now, a.Took)
	if a.Tenant == 0 {
		return
	}
	s := c.shard(a.Tenant)
	s.mu.RLock()
	defer s.mu.RUnlock()
	e := s.tenants[a.Tenant]
	if e == nil { // nobody bound it: with a request in flight it would not have been taken out
		return
	}
	e.load.answered(a)
	e.used.Store(int64(now))
	w := e.window.Load()
	if w == nil {
		w = &window{}
		if !e.window.CompareAndSwap(nil, w) {
			w = e.window.Load()
		}
	}
	w.add(now, a.Took)
}

func (l *load) answered(a Answer) {
	l.requests.Add(1)
	l.inFlight.Add(-1)
	l.bytes.Add(int64(a.Bytes))
	if a.Failed {
		l.errors.Add(1)
	}
	if a.Refused {
		l.refused.Add(1)
	}
}

// Transaction counts a transaction that is over.
func (c *Counter) Transaction(t tenant.Tenant, w postgres.Work) {
	tc := &c.transactions[0]
	if t.IsZero() {
		tc = &c.transactions[1]
	}
	tc.duration.Observe(w.Took.Seconds())
	tc.statements.Add(float64(w.Statements))
	tc.rows.Add(float64(w.Rows))
	if w.Failed {
		tc.failures.Inc()
	}
	c.all.worked(w)
	if !t.IsZero() {
		c.of(t, func(e *entry) { e.load.worked(w) }, counts{transactions: 1, rows: w.Rows, database: w.Took})
	}
}

func (l *load) worked(w postgres.Work) {
	l.transactions.Add(1)
	l.database.Add(int64(w.Took))
	l.rows.Add(w.Rows)
}

func (c *Counter) shard(number int32) *shard { return &c.shards[uint32(number)%shards] }

// of counts for a tenant, which is entered if it is not there yet and there is room. Without room only Usage is told, of
// what is owed.
func (c *Counter) of(t tenant.Tenant, count func(*entry), owed counts) bool {
	if t.State == tenant.Dropped || t.State == tenant.Purged {
		return false
	}
	now := c.now()
	s := c.shard(t.Number)
	s.mu.RLock()
	if e := s.tenants[t.Number]; e != nil {
		count(e)
		e.used.Store(int64(now))
		e.called(t)
		s.mu.RUnlock()
		return true
	}
	s.mu.RUnlock()
	if !c.makeRoom() {
		c.mu.Lock()
		c.owe(t.Number, owed)
		c.mu.Unlock()
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.tenants[t.Number]
	if e == nil {
		e = &entry{number: t.Number}
		e.name.Store(&tenantName{t.Slug.String(), t.Epoch})
		s.tenants[t.Number] = e
		c.held.Add(1)
	}
	count(e)
	e.used.Store(int64(now))
	return true
}

// called notes a tenant's name, unless what is known is newer.
func (e *entry) called(t tenant.Tenant) {
	if n := e.name.Load(); n.slug != t.Slug.String() && n.epoch <= t.Epoch {
		e.name.Store(&tenantName{t.Slug.String(), t.Epoch})
	}
}

// makeRoom takes the tenants out that were quiet longest when there are too many. False: all of them have requests in flight.
func (c *Counter) makeRoom() bool {
	if c.held.Load() < int64(c.limit) {
		return true
	}
	c.growth.Lock()
	defer c.growth.Unlock()
	if c.held.Load() < int64(c.limit) {
		return true
	}
	var all []*entry
	c.each(func(e *entry) { all = append(all, e) })
	slices.SortFunc(all, func(a, b *entry) int { return cmp.Compare(a.used.Load(), b.used.Load()) })
	for _, e := range all[:max(1, len(all)/10)] { // a tenth at once: sorting is not for every newcomer
		c.remove(e)
	}
	return c.held.Load() < int64(c.limit)
}

// each visits all tenants that are held.
func (c *Counter) each(visit func(*entry)) {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.RLock()
		for _, e := range s.tenants {
			visit(e)
		}
		s.mu.RUnlock()
	}
}

// remove takes a tenant out unless a request of it is in flight. What its series have not shown yet is the others'.
func (c *Counter) remove(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.shard(e.number)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tenants[e.number] != e || e.load.inFlight.Load() > 0 {
		return
	}
	delete(s.tenants, e.number)
	delete(c.shown, e.number)
	c.held.Add(-1)
	n := e.load.counts()
	c.other.add(n.minus(e.settled))
	c.owe(e.number, n.minus(e.told))
}

// quiet is how long a tenant may be quiet before it is held no longer.
const quiet = time.Hour

// Sweep takes the tenants out that are gone or have been quiet for an hour.
func (c *Counter) Sweep() {
	now := c.now()
	var out []*entry
	c.each(func(e *entry) {
		if e.gone.Load() || now-time.Duration(e.used.Load()) > quiet {
			out = append(out, e)
		}
	})
	for _, e := range out {
		c.remove(e)
	}
}

// Learn follows what the registry says of a tenant: one that is dropped or purged is told of no more, another one by its
// name.
func (c *Counter) Learn(number int32, slug string, epoch int64, state tenant.State) {
	s := c.shard(number)
	s.mu.RLock()
	defer s.mu.RUnlock()
	e := s.tenants[number]
	if e == nil {
		return
	}
	e.gone.Store(state == tenant.Dropped || state == tenant.Purged)
	if n := e.name.Load(); n.slug != slug && n.epoch <= epoch {
		e.name.Store(&tenantName{slug, epoch})
	}
}

// The labels for what a request has invented.
const (
	noRoute     = "_unknown"
	otherMethod = "_other"
)

var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

// route finds the series of an answer. Route templates and statuses are the server's own; a method may be anything.
func (c *Counter) route(a Answer) routeCount {
	k := routeKey{cmp.Or(a.Route, noRoute), a.Method, a.Status}
	if !slices.Contains(methods, k.method) {
		k.method = otherMethod
	}
	if rc, ok := (*c.routes.Load())[k]; ok {
		return rc
	}
	c.adding.Lock()
	defer c.adding.Unlock()
	routes := *c.routes.Load()
	if rc, ok := routes[k]; ok {
		return rc
	}
	more := make(map[routeKey]routeCount, len(routes)+1)
	for key, rc := range routes {
		more[key] = rc
	}
	rc := routeCount{c.requests.WithLabelValues(k.route, k.method, strconv.Itoa(k.status)), c.durations.WithLabelValues(k.route)}
	more[k] = rc
	c.routes.Store(&more)
	return rc
}

// at is a load as Stats tells it.
func (l *load) at(w *window, now time.Duration) Load {
	n := l.counts()
	out := Load{
		Requests: n.requests, Errors: n.errors, Refused: n.refused, InFlight: l.inFlight.Load(), DatabaseSeconds: n.database.Seconds(),
		Transactions: n.transactions, Rows: n.rows,
	}
	if w != nil {
		out.P50, out.P95, out.P99, _ = w.quantiles(now)
	}
	return out
}

// Loads is what was counted of all and of each tenant, by their numbers.
func (c *Counter) Loads() (all Load, tenants []TenantLoad) {
	now := c.now()
	tenants = []TenantLoad{}
	c.each(func(e *entry) {
		if !e.gone.Load() {
			tenants = append(tenants, TenantLoad{Number: e.number, Tenant: e.slug(), Load: e.load.at(e.window.Load(), now)})
		}
	})
	slices.SortFunc(tenants, func(a, b TenantLoad) int { return cmp.Compare(a.Number, b.Number) })
	return c.all.at(&c.window, now), tenants
}
