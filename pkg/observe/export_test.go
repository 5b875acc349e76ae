package observe

import (
	"context"
	"time"
)

// SetClock makes the counter live by a test's time, which begins at 0.
func (c *Counter) SetClock(now func() time.Duration) { c.now = now }

// SetLimit bounds the tenants that are counted apart.
func (c *Counter) SetLimit(n int) { c.limit = n }

// Held is how many tenants are counted apart.
func (c *Counter) Held() int { return int(c.held.Load()) }

// Kept is how many tenants the counter really has.
func (c *Counter) Kept() (n int) {
	c.each(func(*entry) { n++ })
	return n
}

// Routes is how many series of requests there are.
func (c *Counter) Routes() int { return len(*c.routes.Load()) }

// Series are the requests and rows that the series of tenants show, by name, and the requests in flight.
func (c *Counter) Series() (requests, rows, inFlight map[string]int64) {
	requests, rows, inFlight = map[string]int64{}, map[string]int64{}, map[string]int64{}
	for _, s := range c.series() {
		if _, twice := requests[s.name]; twice {
			panic("two series of one name: " + s.name)
		}
		requests[s.name], rows[s.name], inFlight[s.name] = s.counts.requests, s.counts.rows, s.inFlight
	}
	return requests, rows, inFlight
}

// Ask asks PostgreSQL and Redis all questions now.
func (o *Observer) Ask(ctx context.Context) (registry, slow error) {
	st := o.o.Cache.State(ctx)
	o.redis.Store(&st)
	o.counter.Sweep()
	return o.askRegistry(ctx, o.unseen()), o.askSlowly(ctx)
}

// Names are the names of all metrics that are defined, and of the parts that Prometheus makes of histograms.
func Names() map[string]bool {
	names := map[string]bool{}
	for _, d := range definitions {
		if d.kind == histogramKind {
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				names[d.name+part] = true
			}
			continue
		}
		names[d.name] = true
	}
	return names
}

// Labels are the labels of each metric by its name.
func Labels() map[string][]string {
	labels := map[string][]string{}
	for _, d := range definitions {
		labels[d.name] = d.labels
	}
	return labels
}

// SetNow makes the usage live by a test's time.
func (u *Usage) SetNow(now func() time.Time) { u.now, u.since = now, now() }

// AfterWrite is called when a write was committed; its error is taken for that of the commit.
func (u *Usage) AfterWrite(f func() error) { u.after = f }

// SetHeld bounds the rows that are held while they cannot be written.
func (u *Usage) SetHeld(n int) { u.most = n }

// Measure notes how large tenants are, if nobody has in this hour.
func (u *Usage) Measure(ctx context.Context) error { return u.measure(ctx) }
