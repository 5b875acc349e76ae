package observe

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"os"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Options says of what an Observer tells.
type Options struct {
	Instance uuid.UUID // as in public.instances
	Version  string
	Counter  *Counter
	DB       *postgres.DB
	Cache    *cache.Cache
	// Head is the newest tenant migration, MigrateKind the kind of the runs that migrate, BackupKind that of those that back
	// tenants up; empty: there is no store for backups.
	Head                    int
	MigrateKind, BackupKind string
	// Physical reads what there is of each cluster's physical backups, within a time of its own; nil: no engine makes any.
	Physical func(context.Context) ([]Physical, error)
	// Pools is DB.Stats; nil: it is asked.
	Pools func() []postgres.Stats
	// Within bounds each question to PostgreSQL; 0: a second.
	Within time.Duration
	Logger *slog.Logger
}

// Observer tells what one server does. It is safe for concurrent use. What it tells of PostgreSQL and Redis is what Run has
// found out last.
type Observer struct {
	o        Options
	counter  *Counter
	registry *prometheus.Registry
	fleet    fleet
	redis    atomic.Pointer[cache.State]

	mu      sync.Mutex
	failing []string // questions
}

// New makes an Observer, with a registry of its own.
func New(o Options) *Observer {
	if o.Pools == nil {
		o.Pools = o.DB.Stats
	}
	if o.Within == 0 {
		o.Within = time.Second
	}
	ob := &Observer{o: o, counter: o.Counter, registry: prometheus.NewRegistry()}
	ob.redis.Store(&cache.State{})
	c := o.Counter
	ob.registry.MustRegister(c.requests, c.durations, c.worked, c.failures, c.statements, c.rows, collector{ob},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return ob
}

// Metrics answers GET /metrics. It asks nothing of anybody, so nothing can make it wait.
func (o *Observer) Metrics() http.Handler {
	return promhttp.HandlerFor(o.registry, promhttp.HandlerOpts{
		ErrorHandling: promhttp.ContinueOnError, ErrorLog: errorLog{o.o.Logger}, MaxRequestsInFlight: 8,
	})
}

type errorLog struct{ log *slog.Logger }

func (l errorLog) Println(v ...any) { l.log.Error("metrics", "error", v) }

// Stats is what the server has counted so far.
func (o *Observer) Stats() Stats {
	host, _ := os.Hostname() // empty is a name too
	s := Stats{
		Instance: o.o.Instance, Host: host, PID: os.Getpid(), Version: o.o.Version, StartedAt: o.counter.began.UTC(), At: time.Now().UTC(), Pools: []Pool{},
	}
	s.All, s.Tenants = o.counter.Loads()
	for _, p := range o.o.Pools() {
		s.Pools = append(s.Pools, Pool{
			Group: p.Group, Max: int64(p.Max), InUse: int64(p.InUse), Idle: int64(p.Idle), Waits: p.Waits, WaitSecs: p.WaitFor.Seconds(),
			Retired: p.Retired, Tenants: int64(p.Tenants),
		})
	}
	cs, redis := o.o.Cache.Stats(), o.redis.Load()
	s.Cache = Cache{Redis: redis.Set, Up: redis.Up, Hits: cs.Hits, Misses: cs.Misses, MemoryBytes: redis.Memory}
	samples := []metrics.Sample{{Name: "/sched/goroutines:goroutines"}, {Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	s.Runtime = Runtime{
		Goroutines: int(samples[0].Value.Uint64()), MemoryBytes: int64(samples[1].Value.Uint64() - samples[2].Value.Uint64()),
	}
	return s
}

// ServeStats answers GET /stats. Whoever mounts it asks for the token (Guard).
func (o *Observer) ServeStats(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(o.Stats()) // a client that left is noticed by its own end
}
