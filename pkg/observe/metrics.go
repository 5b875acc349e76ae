package observe

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// kind is what Prometheus calls a metric's type.
type kind string

const (
	counterKind   kind = "counter"
	gaugeKind     kind = "gauge"
	histogramKind kind = "histogram"
)

// definition is one metric of /metrics. docs/metrics.md is written from these, and nothing else is exposed but what Go's
// runtime and the process have.
type definition struct {
	name   string
	kind   kind
	labels []string
	help   string
	desc   *prometheus.Desc
}

var definitions []*definition

func define(k kind, name, help string, labels ...string) *definition {
	d := &definition{name: name, kind: k, labels: labels, help: help, desc: prometheus.NewDesc(name, help, labels, nil)}
	definitions = append(definitions, d)
	return d
}

// No label holds what a request has said: routes are templates, methods and statuses are known ones, tenants those of the
// registry, and few of them.
var (
	buildInfo = define(gaugeKind, "oneo_build_info", "1; the label says which oneo this is.", "version")

	httpRequests = define(counterKind, "oneo_http_requests_total", "Requests answered. A route is the template, _unknown where none fits; a status of 0: nothing could be answered; 499: whoever asked had left.", "route", "method", "status")
	httpDuration = define(histogramKind, "oneo_http_request_duration_seconds", "How long answers took, by route.", "route")
	httpErrors   = define(counterKind, "oneo_http_errors_total", "Requests answered 5xx by our fault: without refused ones and those to tenants that are suspended or being changed.")
	httpRefused  = define(counterKind, "oneo_http_refused_total", "Requests answered 429 or 503 for a budget or a limit.")
	httpInFlight = define(gaugeKind, "oneo_http_requests_in_flight", "Requests being answered.")

	transactionDuration   = define(histogramKind, "oneo_transaction_duration_seconds", "How long transactions held a connection, of tenants (tenant) and on the shared tables (shared).", "work")
	transactionFailures   = define(counterKind, "oneo_transaction_failures_total", "Transactions that ended by our fault or that of the way to PostgreSQL.", "work")
	transactionStatements = define(counterKind, "oneo_transaction_statements_total", "Statements run in transactions, without their binding.", "work")
	transactionRows       = define(counterKind, "oneo_transaction_rows_total", "Rows read or written by these statements.", "work")

	poolMax     = define(gaugeKind, "oneo_pool_connections_max", "Connections for tenants' work at most.", "group")
	poolInUse   = define(gaugeKind, "oneo_pool_connections_in_use", "Connections for tenants' work that are at work.", "group")
	poolIdle    = define(gaugeKind, "oneo_pool_connections_idle", "Connections for tenants' work at rest.", "group")
	poolWaits   = define(counterKind, "oneo_pool_waits_total", "Times that work got a connection that it had to wait for.", "group")
	poolWaited  = define(counterKind, "oneo_pool_wait_seconds_total", "All of these waits together.", "group")
	poolGaveUp  = define(counterKind, "oneo_pool_gave_up_total", "Times that work got no connection: its time was over, or whoever asked had left.", "group")
	poolRetired = define(counterKind, "oneo_pool_retired_total", "Connections replaced because their backends had seen too many tenants.", "group")
	poolTenants = define(gaugeKind, "oneo_pool_connection_tenants_max", "Distinct tenants of the open connection that has seen most.", "group")

	cacheHits   = define(counterKind, "oneo_cache_hits_total", "Values found in Redis, or held for it.")
	cacheMisses = define(counterKind, "oneo_cache_misses_total", "Values not found there.")
	cacheHeld   = define(gaugeKind, "oneo_cache_held", "Changes that Redis has not taken yet and this process holds.")
	redisUp     = define(gaugeKind, "oneo_redis_up", "1: Redis answers. Not there without Redis.")
	redisMemory = define(gaugeKind, "oneo_redis_memory_bytes", "What Redis holds. Not there where its user may not ask (INFO).")

	fleetAge         = define(gaugeKind, "oneo_fleet_age_seconds", "How old the answers of PostgreSQL are: registry is asked every 15 s, slow (backups, sizes) every 5 minutes. Not there before the first answer.", "question")
	fleetFailures    = define(counterKind, "oneo_fleet_failures_total", "Times that PostgreSQL did not answer in time; the last answers stand.", "question")
	fleetTenants     = define(gaugeKind, "oneo_tenants", "Tenants of the registry by state.", "state")
	operations       = define(gaugeKind, "oneo_operations", "Operations and runs that are not over, by state: queued, running, paused.", "state")
	operationsOldest = define(gaugeKind, "oneo_operations_oldest_seconds", "Age of the oldest of these.", "state")
	operationsStale  = define(gaugeKind, "oneo_operations_stale", "Running ones whose process has given no sign for a minute.")
	operationsEnded  = define(gaugeKind, "oneo_operations_ended", "Operations and runs begun within the last 24 hours that are over, by state: done, failed, aborted.", "state")
	runs             = define(gaugeKind, "oneo_runs", "Runs over the fleet that are not over, by state; they are among the operations too.", "state")
	instances        = define(gaugeKind, "oneo_instances", "Running servers by version.", "version")
	migrationHead    = define(gaugeKind, "oneo_migration_head", "The newest tenant migration that this oneo knows.")
	migrationBehind  = define(gaugeKind, "oneo_migration_tenants_behind", "Tenants below the head.", "group")
	migrationFailed  = define(gaugeKind, "oneo_migration_tenants_failed", "Tenants below the head whose last migration in a run has failed.")
	backupOldest     = define(gaugeKind, "oneo_backup_oldest_timestamp_seconds", "When the tenant was backed up whose last backup is oldest, of active tenants. Not there without backup.url.")
	backupNever      = define(gaugeKind, "oneo_backup_tenants_never", "Active tenants that no run has backed up. Not there without backup.url.")
	physicalNewest   = define(gaugeKind, "oneo_physical_backup_newest_timestamp_seconds", "When the newest physical backup was made from which a moment can be had back. Not there where there is none, or where this machine has no repository.", "cluster")
	physicalArchived = define(gaugeKind, "oneo_physical_archived_timestamp_seconds", "When the newest WAL was archived.", "cluster")
	physicalFailing  = define(gaugeKind, "oneo_physical_archiving_failing", "1: the last try to archive WAL has failed. Not there while the cluster does not answer.", "cluster")

	tenantsHeld        = define(gaugeKind, "oneo_counted_tenants", "Tenants counted apart in this process, served within the last hour.")
	tenantRequests     = define(counterKind, "oneo_tenant_requests_total", "Requests answered, by tenant.", "tenant")
	tenantErrors       = define(counterKind, "oneo_tenant_errors_total", "Of these, answered 5xx by our fault.", "tenant")
	tenantRefused      = define(counterKind, "oneo_tenant_refused_total", "Of these, answered 429 or 503 for a budget or a limit.", "tenant")
	tenantDatabase     = define(counterKind, "oneo_tenant_database_seconds_total", "How long the tenant's transactions held a connection.", "tenant")
	tenantTransactions = define(counterKind, "oneo_tenant_transactions_total", "Transactions.", "tenant")
	tenantRows         = define(counterKind, "oneo_tenant_rows_total", "Rows read or written.", "tenant")
	tenantInFlight     = define(gaugeKind, "oneo_tenant_requests_in_flight", "Requests being answered.", "tenant")
	tenantSize         = define(gaugeKind, "oneo_tenant_size_bytes", "The tenant's tables and indexes as PostgreSQL's last vacuum or analyze found them. Not there for _other.", "tenant")
)

// Seconds at which the buckets of the histograms end.
var bucketEnds = []float64{0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30}

func counterVec(d *definition) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: d.name, Help: d.help}, d.labels)
}

func histogramVec(d *definition) *prometheus.HistogramVec {
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: d.name, Help: d.help, Buckets: bucketEnds}, d.labels)
}

// collector tells Prometheus what is known at the moment of a scrape. It asks nobody.
type collector struct{ o *Observer }

// Describe tells of nothing: which of these there are depends on what has been found out. Each has a definition all the same.
func (collector) Describe(chan<- *prometheus.Desc) {}

func (c collector) Collect(ch chan<- prometheus.Metric) {
	send := func(d *definition, value float64, labels ...string) {
		t := prometheus.GaugeValue
		if d.kind == counterKind {
			t = prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(d.desc, t, value, labels...)
	}
	o := c.o
	send(buildInfo, 1, o.o.Version)
	all := o.counter.all.counts()
	send(httpErrors, float64(all.errors))
	send(httpRefused, float64(all.refused))
	send(httpInFlight, float64(o.counter.all.inFlight.Load()))
	for _, p := range o.o.Pools() {
		send(poolMax, float64(p.Max), p.Group)
		send(poolInUse, float64(p.InUse), p.Group)
		send(poolIdle, float64(p.Idle), p.Group)
		send(poolWaits, float64(p.Waits), p.Group)
		send(poolWaited, p.WaitFor.Seconds(), p.Group)
		send(poolGaveUp, float64(p.GaveUp), p.Group)
		send(poolRetired, float64(p.Retired), p.Group)
		send(poolTenants, float64(p.Tenants), p.Group)
	}
	cs := o.o.Cache.Stats()
	send(cacheHits, float64(cs.Hits))
	send(cacheMisses, float64(cs.Misses))
	send(cacheHeld, float64(cs.Held))
	if redis := o.redis.Load(); redis.Set {
		send(redisUp, float64(map[bool]int{true: 1}[redis.Up]))
		if redis.Memory > 0 {
			send(redisMemory, float64(redis.Memory))
		}
	}
	o.fleet.collect(send)
	send(tenantsHeld, float64(o.counter.held.Load()))
	for _, s := range o.counter.series() {
		send(tenantRequests, float64(s.counts.requests), s.name)
		send(tenantErrors, float64(s.counts.errors), s.name)
		send(tenantRefused, float64(s.counts.refused), s.name)
		send(tenantDatabase, s.counts.database.Seconds(), s.name)
		send(tenantTransactions, float64(s.counts.transactions), s.name)
		send(tenantRows, float64(s.counts.rows), s.name)
		send(tenantInFlight, float64(s.inFlight), s.name)
		if s.size > 0 {
			send(tenantSize, float64(s.size), s.name)
		}
	}
}

// Table is the table of all metrics in docs/metrics.md.
func Table() string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | what |\n| --- | --- | --- | --- |\n")
	for _, d := range definitions {
		labels := "-"
		if len(d.labels) > 0 {
			labels = "`" + strings.Join(d.labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.name, d.kind, labels, d.help)
	}
	return b.String()
}
