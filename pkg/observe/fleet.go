package observe

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const (
	// askEach is how often PostgreSQL and Redis are asked, askSlowlyEach how often for what takes PostgreSQL longer.
	askEach       = 15 * time.Second
	askSlowlyEach = 5 * time.Minute
	// maxVersions bounds the versions of instances that are told apart.
	maxVersions = 16
)

// fleet is what PostgreSQL has said last. Whoever looks gets that and never waits for more.
type fleet struct {
	registry atomic.Pointer[registryFacts]
	slow     atomic.Pointer[slowFacts]

	registryFailures, slowFailures atomic.Int64
}

// registryFacts are what the registry and the placements say.
type registryFacts struct {
	at                    time.Time
	tenants               map[string]float64 // by state
	open, oldest          map[string]float64 // operations by state
	stale                 float64
	ended, runs, versions map[string]float64
	head                  int
	behind                map[string]float64 // by group; only those that have answered
	failed                float64
}

// slowFacts are what is asked seldom.
type slowFacts struct {
	at      time.Time
	backups bool // there is a store for them
	oldest  time.Time
	never   float64

	physical []Physical
}

// Physical is what is known of a cluster's physical backups.
type Physical struct {
	Cluster string
	// Newest is when the newest backup was made from which a moment can be reached, Archived when the newest WAL was archived; zero:
	// there is none.
	Newest, Archived time.Time
	// Failing: the last try to archive WAL has failed. nil: the cluster does not answer.
	Failing *bool
}

func (f *fleet) collect(send func(*definition, float64, ...string)) {
	each := func(d *definition, values map[string]float64) {
		for label, value := range values {
			send(d, value, label)
		}
	}
	send(fleetFailures, float64(f.registryFailures.Load()), "registry")
	send(fleetFailures, float64(f.slowFailures.Load()), "slow")
	if r := f.registry.Load(); r != nil {
		send(fleetAge, time.Since(r.at).Seconds(), "registry")
		each(fleetTenants, r.tenants)
		each(operations, r.open)
		each(operationsOldest, r.oldest)
		send(operationsStale, r.stale)
		each(operationsEnded, r.ended)
		each(runs, r.runs)
		each(instances, r.versions)
		send(migrationHead, float64(r.head))
		each(migrationBehind, r.behind)
		send(migrationFailed, r.failed)
	}
	if s := f.slow.Load(); s != nil {
		send(fleetAge, time.Since(s.at).Seconds(), "slow")
		if s.backups {
			send(backupNever, s.never)
			if !s.oldest.IsZero() {
				send(backupOldest, float64(s.oldest.Unix()))
			}
		}
		for _, p := range s.physical {
			if !p.Newest.IsZero() {
				send(physicalNewest, float64(p.Newest.Unix()), p.Cluster)
			}
			if !p.Archived.IsZero() {
				send(physicalArchived, float64(p.Archived.Unix()), p.Cluster)
			}
			if p.Failing != nil {
				failing := 0.0
				if *p.Failing {
					failing = 1
				}
				send(physicalFailing, failing, p.Cluster)
			}
		}
	}
}

// within runs one reading transaction on a group's shared tables, for at most Options.Within.
func (o *Observer) within(ctx context.Context, group string, fn func(context.Context, *postgres.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, o.o.Within)
	defer cancel()
	return o.o.DB.InSharedAt(ctx, group, postgres.Read, func(tx *postgres.Tx) error { return fn(ctx, tx) })
}

// pairs reads rows of a label and a number.
func pairs(ctx context.Context, tx *postgres.Tx, sql string, args ...any) (map[string]float64, error) {
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	out := map[string]float64{}
	var label string
	var n float64
	_, err = pgx.ForEachRow(rows, []any{&label, &n}, func() error {
		out[label] = n
		return nil
	})
	return out, err
}

// askRegistry finds out how the fleet stands, and what has become of the tenants that are counted. since is how far back
// changes of tenants may not have been seen yet.
func (o *Observer) askRegistry(ctx context.Context, since time.Duration) error {
	f := registryFacts{head: o.o.Head, behind: map[string]float64{}, open: map[string]float64{}, oldest: map[string]float64{}}
	var behind []int32
	errs := make([]error, len(o.o.DB.Groups()))
	numbers := make([][]int32, len(errs))
	var wg sync.WaitGroup
	for i, group := range o.o.DB.Groups() { // at one time: one that hangs must not make the others' answers old
		wg.Go(func() {
			errs[i] = o.within(ctx, group, func(ctx context.Context, tx *postgres.Tx) error {
				rows, err := tx.Query(ctx, `select number from public.placements where state <> 'dropped' and version < $1`, o.o.Head)
				if err != nil {
					return err
				}
				numbers[i], err = pgx.CollectRows(rows, pgx.RowTo[int32])
				return err
			})
		})
	}
	wg.Wait()
	for i, group := range o.o.DB.Groups() {
		if errs[i] == nil {
			f.behind[group] = float64(len(numbers[i]))
			behind = append(behind, numbers[i]...)
		}
	}
	err := o.within(ctx, postgres.MainGroup, func(ctx context.Context, tx *postgres.Tx) (err error) {
		if f.tenants, err = pairs(ctx, tx, `select state, count(*)::float8 from public.tenants where state <> 'purged' group by state`); err != nil {
			return err
		}
		// By the index of open ones; of runs, only those that are there.
		const open = `select state, count(*)::float8, extract(epoch from now() - min(created_at))::float8,
	count(*) filter (where state = 'running' and coalesce(heartbeat, created_at) < now() - interval '1 minute')::float8
from public.operations where state in ('queued', 'running') group by state`
		rows, err := tx.Query(ctx, open)
		if err != nil {
			return err
		}
		var state string
		var n, oldest, stale float64
		if _, err := pgx.ForEachRow(rows, []any{&state, &n, &oldest, &stale}, func() error {
			f.open[state], f.oldest[state] = n, oldest
			f.stale += stale
			return nil
		}); err != nil {
			return err
		}
		const ofRuns = `select o.state, count(*)::float8 from public.runs r join public.operations o on o.id = r.id
where o.state in ('queued', 'running', 'paused') group by o.state`
		if f.runs, err = pairs(ctx, tx, ofRuns); err != nil {
			return err
		}
		if paused := f.runs["paused"]; paused > 0 {
			f.open["paused"] = paused
		}
		// Their ids begin with the time: a day's worth lies together in the primary key.
		const ended = `select state, count(*)::float8 from public.operations
where id >= $1 and state in ('done', 'failed', 'aborted') group by state`
		if f.ended, err = pairs(ctx, tx, ended, firstIDOf(time.Now().Add(-24*time.Hour))); err != nil {
			return err
		}
		const versions = `select version, count(*)::float8 from public.instances where heartbeat > now() - interval '1 minute'
group by version order by version limit $1`
		if f.versions, err = pairs(ctx, tx, versions, maxVersions); err != nil {
			return err
		}
		if len(behind) > 0 {
			const failed = `select count(*)::float8 from unnest($1::integer[]) n cross join lateral (select t.state from public.tasks t
	join public.operations o on o.id = t.run where t.tenant = n and o.kind = $2 order by t.run desc limit 1) last where last.state = 'failed'`
			if err := tx.QueryRow(ctx, failed, behind, o.o.MigrateKind).Scan(&f.failed); err != nil {
				return err
			}
		}
		return o.learn(ctx, tx, since)
	})
	if err != nil {
		o.fleet.registryFailures.Add(1)
		return errors.Join(append(errs, err)...)
	}
	if last := o.fleet.registry.Load(); last != nil { // what a group that does not answer has said last stands
		for i, group := range o.o.DB.Groups() {
			if n, known := last.behind[group]; errs[i] != nil && known {
				f.behind[group] = n
			}
		}
	}
	for _, state := range []string{"queued", "running", "paused"} {
		f.open[state] += 0 // none is 0, not nothing: an alert that waits for an end must see it
		f.runs[state] += 0
	}
	for _, state := range []string{"done", "failed", "aborted"} {
		f.ended[state] += 0
	}
	f.at = time.Now()
	o.fleet.registry.Store(&f)
	if err := errors.Join(errs...); err != nil {
		o.fleet.registryFailures.Add(1)
		return err
	}
	return nil
}

// learn hears what has become of tenants: of those with series, and of those that were changed of late.
func (o *Observer) learn(ctx context.Context, tx *postgres.Tx, since time.Duration) error {
	const changed = `select number, slug, epoch, state from public.tenants where updated_at > now() - $1::interval or number = any($2::integer[])`
	rows, err := tx.Query(ctx, changed, since, o.counter.shownNumbers())
	if err != nil {
		return err
	}
	var number int32
	var slug, state string
	var epoch int64
	_, err = pgx.ForEachRow(rows, []any{&number, &slug, &epoch, &state}, func() error {
		o.counter.Learn(number, slug, epoch, tenant.State(state))
		return nil
	})
	return err
}

// askSlowly finds out how old backups are, whether WAL is archived, and how large the tenants with series.
func (o *Observer) askSlowly(ctx context.Context) error {
	f := slowFacts{backups: o.o.BackupKind != ""}
	var errs []error
	if f.backups {
		// Of each active tenant the newest task of a run of backups that ended well, by the index of its tasks.
		const ages = `select min(last.finished_at), count(*) filter (where last.finished_at is null)::float8 from public.tenants t
left join lateral (select k.finished_at from public.tasks k join public.operations o on o.id = k.run
	where k.tenant = t.number and k.state = 'ok' and o.kind = $1 order by k.run desc limit 1) last on true where t.state = 'active'`
		errs = append(errs, o.within(ctx, postgres.MainGroup, func(ctx context.Context, tx *postgres.Tx) error {
			var oldest *time.Time
			if err := tx.QueryRow(ctx, ages, o.o.BackupKind).Scan(&oldest, &f.never); err != nil {
				return err
			}
			if oldest != nil {
				f.oldest = *oldest
			}
			return nil
		}))
	}
	if o.o.Physical != nil {
		var err error
		f.physical, err = o.o.Physical(ctx)
		errs = append(errs, err)
	}
	shown := o.counter.shownNumbers()
	if len(shown) > 0 {
		// What the last vacuum or analyze found, in one look at the catalog: pg_total_relation_size would wait for each
		// table's lock, and leave all of them in the backend's memory.
		const sizes = `select p.number, sum(greatest(c.relpages, 0)::bigint + greatest(coalesce(t.relpages, 0), 0)) * current_setting('block_size')::bigint
from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace left join pg_catalog.pg_class t on t.oid = c.reltoastrelid
where p.number = any($1::integer[]) group by p.number`
		all := map[int32]int64{}
		for _, group := range o.o.DB.Groups() {
			errs = append(errs, o.within(ctx, group, func(ctx context.Context, tx *postgres.Tx) error {
				rows, err := tx.Query(ctx, sizes, shown)
				if err != nil {
					return err
				}
				var number int32
				var size int64
				_, err = pgx.ForEachRow(rows, []any{&number, &size}, func() error {
					all[number] = size
					return nil
				})
				return err
			}))
		}
		o.counter.setSizes(all)
	}
	if err := errors.Join(errs...); err != nil {
		o.fleet.slowFailures.Add(1)
		return err
	}
	f.at = time.Now()
	o.fleet.slow.Store(&f)
	return nil
}

// firstIDOf is the least UUID of version 7 that is made at a time.
func firstIDOf(t time.Time) (id [16]byte) {
	ms := t.UnixMilli()
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	return id
}

// Run asks PostgreSQL and Redis now and then, and lets go of tenants that are gone, until ctx ends. A database that hangs
// makes what /metrics says of it old, which it says.
func (o *Observer) Run(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	asking.Go(func() {
		repeat(ctx, askEach, func() {
			st := o.o.Cache.State(ctx)
			o.redis.Store(&st)
			o.counter.Sweep()
		})
	})
	asking.Go(func() { repeat(ctx, askSlowlyEach, func() { o.told(ctx, "slow", o.askSlowly(ctx)) }) })
	repeat(ctx, askEach, func() { o.told(ctx, "registry", o.askRegistry(ctx, o.unseen())) })
}

func repeat(ctx context.Context, each time.Duration, do func()) {
	ticker := time.NewTicker(each)
	defer ticker.Stop()
	for {
		do()
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
	}
}

// unseen is how far back changes of tenants may not have been seen: since the last answer, and a time for transactions that
// were not over then.
func (o *Observer) unseen() time.Duration {
	const open = 5 * time.Minute
	if last := o.fleet.registry.Load(); last != nil {
		return time.Since(last.at) + open
	}
	return time.Since(o.counter.began) + open
}

// told logs the first failure of a question, not each one.
func (o *Observer) told(ctx context.Context, question string, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	failing := slices.Contains(o.failing, question)
	switch {
	case ctx.Err() != nil:
	case err != nil && !failing:
		o.failing = append(o.failing, question)
		o.o.Logger.Warn("metrics: PostgreSQL does not answer; its last answers stand", "question", question, "error", err)
	case err == nil && failing:
		o.failing = slices.DeleteFunc(o.failing, func(q string) bool { return q == question })
		o.o.Logger.Info("metrics: PostgreSQL answers again", "question", question)
	}
}
