package observe

import (
	"cmp"
	"slices"
)

// tenantSeries are what /metrics shows of one tenant, or of all that have no series of their own.
type tenantSeries struct {
	name     string
	counts   counts
	inFlight int64
	size     int64 // 0: unknown
}

// otherTenants is the name of all tenants without series of their own. No slug begins so.
const otherTenants = "_other"

// series are the tenants' series, the others' last. A tenant has some from the time on when it was first among the top; they
// begin at 0, and what it did before stays with the others. It keeps them while it is there and not quiet, unless twice as
// many would have some: then those go that were among the top longest ago. So no series ever goes back, and no work is
// counted in two of them.
func (c *Counter) series() []tenantSeries {
	if c.top == 0 {
		return nil
	}
	now := c.now()
	c.mu.Lock()
	defer c.mu.Unlock()
	type ranked struct {
		e      *entry
		recent uint64
	}
	var held []*entry
	var lately []ranked
	c.each(func(e *entry) {
		held = append(held, e)
		if w := e.window.Load(); w != nil && !e.gone.Load() {
			if _, recent := w.sum(now); recent > 0 {
				lately = append(lately, ranked{e, recent})
			}
		}
	})
	slices.SortFunc(lately, func(a, b ranked) int {
		return cmp.Or(cmp.Compare(b.recent, a.recent), cmp.Compare(a.e.number, b.e.number))
	})
	for number, e := range c.shown {
		if e.gone.Load() || e.as != e.slug() {
			delete(c.shown, number)
		}
	}
	for _, r := range lately[:min(c.top, len(lately))] {
		if _, has := c.shown[r.e.number]; !has {
			c.shown[r.e.number] = r.e
			r.e.series, r.e.as, r.e.fresh = counts{}, r.e.slug(), true
		}
		r.e.inTop = now
	}
	var shown []*entry
	for _, e := range c.shown {
		shown = append(shown, e)
	}
	slices.SortFunc(shown, func(a, b *entry) int { return cmp.Or(cmp.Compare(b.inTop, a.inTop), cmp.Compare(a.number, b.number)) })
	for _, e := range shown[min(2*c.top, len(shown)):] {
		delete(c.shown, e.number)
	}
	shown = c.oneOfEachName(shown[:min(2*c.top, len(shown))])
	var othersInFlight int64
	for _, e := range held {
		n := e.load.counts()
		since := n.minus(e.settled)
		e.settled = n
		_, has := c.shown[e.number]
		if has && !e.fresh {
			e.series.add(since)
		} else {
			c.other.add(since)
		}
		e.fresh = false
		if !has && !e.gone.Load() {
			othersInFlight += e.load.inFlight.Load()
		}
	}
	out := make([]tenantSeries, 0, len(shown)+1)
	for _, e := range shown {
		out = append(out, tenantSeries{e.as, e.series, e.load.inFlight.Load(), e.size})
	}
	return append(out, tenantSeries{name: otherTenants, counts: c.other, inFlight: othersInFlight})
}

// oneOfEachName leaves a name that two tenants seem to have to the newer one: the other was renamed, and has not been heard of
// since. Two series of one name would spoil the whole of /metrics.
func (c *Counter) oneOfEachName(all []*entry) []*entry {
	newest := make(map[string]*entry, len(all))
	for _, e := range all {
		if n := newest[e.as]; n == nil || n.number < e.number {
			newest[e.as] = e
		}
	}
	return slices.DeleteFunc(all, func(e *entry) bool {
		if newest[e.as] == e {
			return false
		}
		delete(c.shown, e.number)
		return true
	})
}

// shownNumbers are the tenants that have series of their own.
func (c *Counter) shownNumbers() []int32 {
	c.mu.Lock()
	defer c.mu.Unlock()
	numbers := make([]int32, 0, len(c.shown))
	for n := range c.shown {
		numbers = append(numbers, n)
	}
	return numbers
}

// setSizes notes how large the tenants are that have series.
func (c *Counter) setSizes(sizes map[int32]int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, e := range c.shown {
		if size, known := sizes[n]; known {
			e.size = size
		}
	}
}
