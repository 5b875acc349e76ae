package observe

import (
	"cmp"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// owe notes what Usage has to be told of a tenant that is not held. The caller has c.mu.
func (c *Counter) owe(number int32, n counts) {
	if n == (counts{}) {
		return
	}
	sum := c.owed[number]
	sum.add(n)
	c.owed[number] = sum
}

// takeUsage is what was counted of each tenant since the last call.
func (c *Counter) takeUsage() map[int32]counts {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.each(func(e *entry) {
		n := e.load.counts()
		c.owe(e.number, n.minus(e.told))
		e.told = n
	})
	taken := c.owed
	c.owed = map[int32]counts{}
	return taken
}

const (
	// usageEach is how often usage is written: about what a server loses that is killed.
	usageEach = time.Minute
	// usageTogether is how many rows are written by one statement.
	usageTogether = 20_000
	// usageHeld is how many rows are held while they cannot be written; then the oldest hours are put together.
	usageHeld = 200_000
	// expireUsageEach is how often rows are looked for whose time is over.
	expireUsageEach = time.Hour
	expiredTogether = 10_000
)

// UsageOptions say where usage is written.
type UsageOptions struct {
	Instance uuid.UUID // no other process's
	Counter  *Counter
	DB       *postgres.DB
	// Expires is true for a server that has the owner's connection: it removes what is older than Keep (0: nothing is).
	Expires bool
	Keep    time.Duration
	Logger  *slog.Logger
}

// Usage adds what one server has counted of each tenant to public.usage. Several servers add up. What cannot be written is
// held and written later; what was written is never added again, also when the answer of its commit was lost. It is safe for
// concurrent use.
type Usage struct {
	o     UsageOptions
	now   func() time.Time
	after func() error // of a write that was committed; a test loses its answer

	mu       sync.Mutex // one writes at a time
	since    time.Time  // when the counter was read last
	gathered map[usageKey]counts
	batch    []usageRow // is being written, and stays as it is until that is known to be done; nil: nothing is
	sequence int64      // its number
	most     int        // rows that are held
	measured int64      // the last hour whose sizes this server need not measure
	failing  bool
}

type usageKey struct {
	tenant int32
	hour   int64 // in seconds since 1970
}

type usageRow struct {
	usageKey
	counts
}

// NewUsage makes a Usage that begins now.
func NewUsage(o UsageOptions) *Usage {
	return &Usage{o: o, now: time.Now, after: func() error { return nil }, since: time.Now(), most: usageHeld, gathered: map[usageKey]counts{}}
}

// Run writes about once a minute until ctx ends. Close writes the rest.
func (u *Usage) Run(ctx context.Context) {
	var expiring sync.WaitGroup
	defer expiring.Wait()
	if u.o.Expires {
		expiring.Go(func() {
			repeat(ctx, expireUsageEach, func() {
				if _, err := u.Expire(ctx); err != nil && ctx.Err() == nil {
					u.o.Logger.WarnContext(ctx, "remove usage whose time is over", "error", err)
				}
			})
		})
	}
	for {
		// On the minute, so that what an hour has is read when it ends.
		now := u.now()
		next := time.NewTimer(now.Truncate(usageEach).Add(usageEach).Sub(now))
		select {
		case <-next.C:
		case <-ctx.Done():
			next.Stop()
			return
		}
		u.told(ctx, u.Write(ctx))
		if err := u.measure(ctx); err != nil && ctx.Err() == nil {
			u.o.Logger.WarnContext(ctx, "measure how large tenants are; this hour's usage may be without", "error", err)
		}
	}
}

// closeUsage bounds the last write.
const closeUsage = 5 * time.Second

// Close writes what has been counted since the last write, within a few seconds.
func (u *Usage) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), closeUsage)
	defer cancel()
	if err := u.Write(ctx); err != nil {
		u.mu.Lock()
		defer u.mu.Unlock()
		u.o.Logger.ErrorContext(ctx, "usage that could not be written is lost", "rows", len(u.batch)+len(u.gathered), "error", err)
	}
}

// told logs the first failure, not each one.
func (u *Usage) told(ctx context.Context, err error) {
	switch {
	case ctx.Err() != nil:
	case err != nil && !u.failing:
		u.failing = true
		u.o.Logger.WarnContext(ctx, "usage cannot be written; it is held", "error", err)
	case err == nil && u.failing:
		u.failing = false
		u.o.Logger.InfoContext(ctx, "usage is written again")
	}
}

// Write reads the counter and writes all that has not been written. After an error that is held, and the next Write does it.
func (u *Usage) Write(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.gather()
	for {
		if u.batch == nil {
			u.batch = u.take()
			if u.batch == nil {
				return nil
			}
			u.sequence++
		}
		if err := u.put(ctx); err != nil {
			return err
		}
		u.batch = nil
	}
}

// gather adds what was counted since the last time to the hour in which that was.
func (u *Usage) gather() {
	hour := u.since.Truncate(time.Hour).Unix()
	for number, n := range u.o.Counter.takeUsage() {
		k := usageKey{number, hour}
		sum := u.gathered[k]
		sum.add(n)
		u.gathered[k] = sum
	}
	u.since = u.now()
	for len(u.gathered) > u.most && u.fold() {
	}
}

// fold puts the oldest hour that is held into the one after it: no count is lost, only when it was. False: there is one hour.
func (u *Usage) fold() bool {
	var hours []int64
	for k := range u.gathered {
		if !slices.Contains(hours, k.hour) {
			hours = append(hours, k.hour)
		}
	}
	if len(hours) < 2 {
		return false
	}
	slices.Sort(hours)
	for k, n := range u.gathered {
		if k.hour == hours[0] {
			delete(u.gathered, k)
			into := usageKey{k.tenant, hours[1]}
			n.add(u.gathered[into])
			u.gathered[into] = n
		}
	}
	return true
}

// take is the next rows to be written, in the order in which every server writes them: no two wait for each other.
func (u *Usage) take() (rows []usageRow) {
	for k, n := range u.gathered {
		if len(rows) == usageTogether {
			break
		}
		rows = append(rows, usageRow{k, n})
		delete(u.gathered, k)
	}
	slices.SortFunc(rows, func(a, b usageRow) int { return cmp.Or(cmp.Compare(a.tenant, b.tenant), cmp.Compare(a.hour, b.hour)) })
	return rows
}

// put writes the batch, or finds that it has been.
func (u *Usage) put(ctx context.Context) error {
	const add = `with mark as (insert into public.usage_marks as m (writer, sequence) values ($1, $2)
	on conflict (writer) do update set sequence = excluded.sequence, written_at = now() where m.sequence < excluded.sequence returning 1)
insert into public.usage as u (tenant, hour, requests, errors, refused, transactions, database_us, row_count, bytes_out)
select n.* from unnest($3::integer[], $4::timestamptz[], $5::bigint[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::bigint[], $11::bigint[])
	as n (tenant, hour, requests, errors, refused, transactions, database_us, row_count, bytes_out)
where exists (select from mark) and not exists (select from public.erasures e where e.number = n.tenant) order by n.tenant, n.hour
on conflict (tenant, hour) do update set requests = u.requests + excluded.requests, errors = u.errors + excluded.errors,
	refused = u.refused + excluded.refused, transactions = u.transactions + excluded.transactions, database_us = u.database_us + excluded.database_us,
	row_count = u.row_count + excluded.row_count, bytes_out = u.bytes_out + excluded.bytes_out`
	tenants, hours := make([]int32, len(u.batch)), make([]time.Time, len(u.batch))
	var columns [7][]int64
	for i, r := range u.batch {
		tenants[i], hours[i] = r.tenant, time.Unix(r.hour, 0).UTC()
		for c, v := range [...]int64{r.requests, r.errors, r.refused, r.transactions, r.database.Microseconds(), r.rows, r.bytes} {
			columns[c] = append(columns[c], v)
		}
	}
	args := []any{u.o.Instance.String(), u.sequence, tenants, hours}
	for _, c := range columns {
		args = append(args, c)
	}
	err := u.o.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(ctx, add, args...)
		return err
	})
	if err != nil {
		return err
	}
	return u.after()
}

// sizesWriter is the writer of sizes in public.usage_marks; its sequence is the hour.
const sizesWriter = "sizes"

// measure notes how large each tenant is, once an hour: the server that claims the hour does it, for all.
func (u *Usage) measure(ctx context.Context) error {
	hour := u.now().Truncate(time.Hour)
	if u.measured == hour.Unix() {
		return nil
	}
	const claim = `insert into public.usage_marks as m (writer, sequence) values ($1, $2)
on conflict (writer) do update set sequence = excluded.sequence, written_at = now() where m.sequence < excluded.sequence`
	mine := false
	err := u.o.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
		tag, err := tx.Exec(ctx, claim, sizesWriter, hour.Unix())
		mine = tag.RowsAffected() == 1
		return err
	})
	if err != nil {
		return err
	}
	u.measured = hour.Unix()
	if !mine {
		return nil
	}
	// In one look at the catalog and the statistics, as the metrics do it.
	const sizes = `select p.number, (sum(greatest(c.relpages, 0)::bigint + greatest(coalesce(t.relpages, 0), 0)) * pg_catalog.current_setting('block_size')::bigint)::bigint,
	sum(case when c.relname = 'records' and c.relkind in ('r', 'p') then coalesce(nullif(pg_catalog.pg_stat_get_live_tuples(c.oid), 0), greatest(c.reltuples, 0)::bigint) end)::bigint
from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace left join pg_catalog.pg_class t on t.oid = c.reltoastrelid
group by p.number order by p.number`
	const note = `insert into public.usage as u (tenant, hour, size_bytes, records)
select n.tenant, $1, n.size_bytes, n.records from unnest($2::integer[], $3::bigint[], $4::bigint[]) as n (tenant, size_bytes, records)
where not exists (select from public.erasures e where e.number = n.tenant) order by n.tenant
on conflict (tenant, hour) do update set size_bytes = excluded.size_bytes, records = excluded.records`
	var failed error
	for _, group := range u.o.DB.Groups() {
		var numbers []int32
		var bytes []int64
		var records []*int64
		err := u.o.DB.InSharedAt(ctx, group, postgres.Read, func(tx *postgres.Tx) error {
			numbers, bytes, records = nil, nil, nil
			rows, err := tx.Query(ctx, sizes)
			if err != nil {
				return err
			}
			var number int32
			var size int64
			var live *int64
			_, err = pgx.ForEachRow(rows, []any{&number, &size, &live}, func() error {
				numbers, bytes, records = append(numbers, number), append(bytes, size), append(records, live)
				return nil
			})
			return err
		})
		if err == nil {
			err = u.o.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, note, hour, numbers, bytes, records)
				return err
			})
		}
		failed = cmp.Or(failed, err)
	}
	return failed
}

// Expire removes what is older than Keep, and what an erased tenant had left in the moment of its erasure. It returns how many rows
// were removed.
func (u *Usage) Expire(ctx context.Context) (expired int64, err error) {
	remove := func(sql string, args ...any) (n int64, err error) {
		err = u.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			tag, err := tx.Exec(ctx, sql, args...)
			n = tag.RowsAffected()
			return err
		})
		return n, err
	}
	const old = `delete from public.usage where ctid = any(array(select ctid from public.usage where hour < now() - $1::interval limit $2))`
	for more := u.o.Keep > 0; more; {
		n, err := remove(old, u.o.Keep, expiredTogether)
		expired += n
		if err != nil {
			return expired, err
		}
		more = n == expiredTogether
	}
	if u.o.Keep > 0 {
		if _, err = remove(`delete from public.usage_marks where written_at < now() - $1::interval`, u.o.Keep); err != nil {
			return expired, err
		}
	}
	n, err := remove(`delete from public.usage u using public.erasures e where u.tenant = e.number`)
	return expired + n, err
}

// Span is a length of time by which usage is added up: in UTC.
type Span string

// The spans.
const (
	Hourly  Span = "hour"
	Daily   Span = "day"
	Monthly Span = "month"
)

// UsageFilter selects usage.
type UsageFilter struct {
	Tenants      []int32
	Since, Until time.Time // whole hours are taken: those that begin in between, Until excluded
	By           Span
}

// Used is what one tenant has used in one span.
type Used struct {
	Tenant       int32
	From         time.Time // the span's beginning, in UTC
	Requests     int64
	Errors       int64
	Refused      int64
	Transactions int64
	DatabaseUS   int64 // microseconds
	Rows         int64
	BytesOut     int64
	SizeBytes    *int64 // the most that was found in it; nil: it was not measured
	Records      *int64 // the same, of the tenant's table records; nil: there is none, or it was not measured
}

// UsageOf reads what tenants have used, ordered by tenant and time.
func UsageOf(ctx context.Context, q postgres.Querier, f UsageFilter) ([]Used, error) {
	const query = `select u.tenant, date_trunc($1, u.hour, 'UTC') as span, sum(u.requests)::bigint, sum(u.errors)::bigint, sum(u.refused)::bigint, sum(u.transactions)::bigint,
	sum(u.database_us)::bigint, sum(u.row_count)::bigint, sum(u.bytes_out)::bigint, max(u.size_bytes), max(u.records)
from public.usage u where u.tenant = any($2::integer[]) and u.hour >= $3 and u.hour < $4 group by u.tenant, span order by u.tenant, span`
	rows, err := q.Query(ctx, query, string(f.By), f.Tenants, f.Since, f.Until)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Used])
}
