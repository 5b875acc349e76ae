package tui

import (
	"cmp"
	"slices"
	"time"
)

// TenantRate is what a tenant costs a second, over all servers.
type TenantRate struct {
	Tenant                     string
	Requests, Errors, Database float64 // a second; Database in seconds of it
	P95                        float64 // of its slowest server
}

// PoolRate is one group's connections, over all servers.
type PoolRate struct {
	Group      string
	InUse, Max int64
	Waits      float64 // a second
	Retired    int64   // so far
}

// Rates is what all servers do a second, from two readings of each.
type Rates struct {
	Answer, Silent                      int    // servers
	Why                                 string // the first silent one is
	Ready                               bool   // there were two readings of one
	Requests, Errors, Refused, Database float64
	InFlight                            int64
	P50, P95, P99                       float64 // of the slowest server: percentiles do not add up
	Pools                               []PoolRate
	Tenants                             map[int32]TenantRate
	Redis                               Redis
	Hits                                float64 // share of look-ups since the last reading that found something; -1: there was none
	Memory                              int64
}

// compare makes rates of two readings. A server that was begun in between counts from its next reading; one that counts backwards is
// taken for new.
func compare(before, after []Reading) Rates {
	r := Rates{Tenants: map[int32]TenantRate{}, Hits: -1}
	last := map[string]Reading{}
	for _, b := range before {
		if b.Err == "" {
			last[b.Server.ID] = b
		}
	}
	pools := map[string]*PoolRate{}
	var hits, misses int64
	for _, a := range after {
		if a.Err != "" {
			r.Silent++
			r.Why = cmp.Or(r.Why, a.Err)
			continue
		}
		r.Answer++
		r.InFlight += a.All.InFlight
		r.Memory += a.Memory
		r.P50, r.P95, r.P99 = max(r.P50, a.All.P50), max(r.P95, a.All.P95), max(r.P99, a.All.P99)
		if a.Redis.Set && !r.Redis.Set { // it is one for all of them
			r.Redis = a.Redis
		}
		r.Redis.Up = r.Redis.Up && (a.Redis.Up || !a.Redis.Set)
		for _, p := range a.Pools {
			at := pools[p.Group]
			if at == nil {
				at = &PoolRate{Group: p.Group}
				pools[p.Group] = at
			}
			at.InUse, at.Max, at.Retired = at.InUse+p.InUse, at.Max+p.Max, at.Retired+p.Retired
		}
		b, had := last[a.Server.ID]
		seconds := a.At.Sub(b.At).Seconds()
		if !had || seconds <= 0 || a.All.Requests < b.All.Requests {
			continue
		}
		r.Ready = true
		per := func(now, then int64) float64 { return max(0, float64(now-then)/seconds) }
		r.Requests += per(a.All.Requests, b.All.Requests)
		r.Errors += per(a.All.Errors, b.All.Errors)
		r.Refused += per(a.All.Refused, b.All.Refused)
		r.Database += max(0, (a.All.DatabaseSeconds-b.All.DatabaseSeconds)/seconds)
		hits, misses = hits+max(0, a.Redis.Hits-b.Redis.Hits), misses+max(0, a.Redis.Misses-b.Redis.Misses)
		for _, p := range a.Pools {
			for _, q := range b.Pools {
				if p.Group == q.Group {
					pools[p.Group].Waits += per(p.Waits, q.Waits)
				}
			}
		}
		then := make(map[int32]TenantLoad, len(b.Tenants))
		for _, t := range b.Tenants {
			then[t.Number] = t
		}
		for _, t := range a.Tenants {
			was := then[t.Number] // zero for one that was quiet: all of it is new
			at := r.Tenants[t.Number]
			at.Tenant = t.Tenant
			at.Requests += per(t.Requests, was.Requests)
			at.Errors += per(t.Errors, was.Errors)
			at.Database += max(0, (t.DatabaseSeconds-was.DatabaseSeconds)/seconds)
			at.P95 = max(at.P95, t.P95)
			r.Tenants[t.Number] = at
		}
	}
	for _, p := range pools {
		r.Pools = append(r.Pools, *p)
	}
	slices.SortFunc(r.Pools, func(a, b PoolRate) int { return cmp.Compare(a.Group, b.Group) })
	if hits+misses > 0 {
		r.Hits = float64(hits) / float64(hits+misses)
	}
	return r
}

// busiest are the tenants with the most requests.
func (r Rates) busiest(n int) []TenantRate {
	var all []TenantRate
	for _, t := range r.Tenants {
		if t.Requests > 0 {
			all = append(all, t)
		}
	}
	slices.SortFunc(all, func(a, b TenantRate) int {
		return cmp.Or(cmp.Compare(b.Requests, a.Requests), cmp.Compare(a.Tenant, b.Tenant))
	})
	return all[:min(n, len(all))]
}

// history is the last minutes of what the sparklines show.
type history struct{ requests, p95, errors, pool []float64 }

const (
	readEvery   = 2 * time.Second
	historyKept = 150 // readings: five minutes
)

func (h *history) add(r Rates) {
	var used, whole int64
	for _, p := range r.Pools {
		used, whole = used+p.InUse, whole+p.Max
	}
	share := 0.0
	if whole > 0 {
		share = float64(used) / float64(whole)
	}
	push := func(to *[]float64, v float64) {
		*to = append(*to, v)
		*to = (*to)[max(0, len(*to)-historyKept):]
	}
	push(&h.requests, r.Requests)
	push(&h.p95, r.P95)
	push(&h.errors, r.Errors)
	push(&h.pool, share)
}
