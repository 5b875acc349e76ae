package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// HostCache is a cache of hosts that all servers share. It may lose anything at any time.
type HostCache interface {
	Get(ctx context.Context, host tenant.Host) ([]byte, bool)
	// Add stores a value unless there is one, or one may have been lost since the moment read, from which on it was read.
	Add(ctx context.Context, host tenant.Host, value []byte, read time.Time, ttl time.Duration)
	// Set stores a value in any case.
	Set(ctx context.Context, host tenant.Host, value []byte, ttl time.Duration)
}

// ResolverOptions says how hosts are resolved.
type ResolverOptions struct {
	// Lookup asks the registry. NotFound is an answer; any other error is not remembered.
	Lookup      func(ctx context.Context, host tenant.Host) (tenant.Tenant, error)
	Shared      HostCache     // may be nil
	TTL         time.Duration // in this process; a change elsewhere is seen at the latest after it
	NegativeTTL time.Duration // for hosts that no tenant has: seconds at most
	SharedTTL   time.Duration // in the shared cache, from the moment at which the registry was asked
	Timeout     time.Duration // of one look-up, whoever waits for it
	Size        int           // hosts remembered in this process
	Grace       Grace
}

// Resolver finds the tenant of a host: in the process, then in the shared cache, then in the registry. Callers that
// ask for the same host at the same time cause one look-up. While the registry cannot be asked, the last answer stands
// in for it, within the Grace, unless the host is known to have changed since.
type Resolver struct {
	o       ResolverOptions
	known   *otter.Cache[tenant.Host, resolved]
	last    *lastAnswers
	mu      sync.Mutex // what is forgotten against what is kept for the grace
	forgets atomic.Int64
}

type resolved struct {
	tenant tenant.Tenant // zero: no tenant has the host
	brief  bool          // something was forgotten during the look-up: do not keep
	old    bool          // the registry could not be asked
}

// NewResolver makes a Resolver.
func NewResolver(o ResolverOptions) (*Resolver, error) {
	if o.Lookup == nil || o.TTL <= 0 || o.NegativeTTL <= 0 || o.Timeout <= 0 || o.Size <= 0 || o.Shared != nil && o.SharedTTL <= 0 {
		return nil, errors.New("resolver: Lookup, TTL, NegativeTTL, SharedTTL, Timeout and Size must be given")
	}
	last, err := newLastAnswers(o.Grace, o.Size)
	if err != nil {
		return nil, err
	}
	known, err := otter.New(&otter.Options[tenant.Host, resolved]{
		MaximumSize: o.Size,
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[tenant.Host, resolved]) time.Duration {
			switch {
			case e.Value.brief:
				return time.Nanosecond
			case e.Value.old:
				return min(o.TTL, askAgain)
			case e.Value.tenant.IsZero():
				return o.NegativeTTL
			default:
				return o.TTL
			}
		}),
	})
	if err != nil {
		return nil, fmt.Errorf("make the cache of hosts: %w", err)
	}
	return &Resolver{o: o, known: known, last: last}, nil
}

// Resolve finds the tenant of a host, whatever its state. NotFound: no tenant has it.
func (r *Resolver) Resolve(ctx context.Context, host tenant.Host) (tenant.Tenant, error) {
	v, ok := r.known.GetIfPresent(host)
	if !ok {
		var err error
		if v, err = r.known.Get(ctx, host, otter.LoaderFunc[tenant.Host, resolved](r.load)); err != nil {
			return tenant.Tenant{}, err
		}
	}
	if v.tenant.IsZero() {
		return tenant.Tenant{}, fault.New(fault.NotFound, "no tenant has the host %s", host).WithCode("unknown_host")
	}
	return v.tenant, nil
}

// load asks the shared cache and the registry. A caller that goes away does not take the others' answer with it.
func (r *Resolver) load(ctx context.Context, host tenant.Host) (resolved, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), r.o.Timeout)
	defer cancel()
	before := r.forgets.Load()
	t, at, is := r.recall(ctx, host)
	switch is {
	case shared:
		return resolved{tenant: t, brief: !r.keep(host, answer{tenant: t, at: at}, before)}, nil
	case changed:
		r.last.dropUnlessSince(host, at)
	}
	if r.last.resting() {
		if t, ok := r.last.of(host); ok {
			return resolved{tenant: t, old: true, brief: r.forgets.Load() != before}, nil
		}
	}
	said := answer{at: time.Now()}
	if is == changed {
		said.change = at
	}
	t, err := r.o.Lookup(ctx, host)
	if r.last.heard(err) {
		// What was forgotten meanwhile is not there any more.
		if t, ok := r.last.of(host); ok {
			return resolved{tenant: t, old: true, brief: r.forgets.Load() != before}, nil
		}
	}
	if err != nil && !fault.Is(err, fault.NotFound) {
		return resolved{}, err
	}
	if err == nil {
		said.tenant = t
	}
	if !r.keep(host, said, before) {
		return resolved{tenant: said.tenant, brief: true}, nil
	}
	if is == absent && !said.tenant.IsZero() {
		if raw, err := encodeTenant(said.tenant, said.at); err == nil {
			r.o.Shared.Add(ctx, host, raw, said.at, r.o.SharedTTL)
		}
	}
	return resolved{tenant: said.tenant}, nil
}

// keep keeps an answer for the grace, unless something was forgotten since the look-up began: then it reports false.
func (r *Resolver) keep(host tenant.Host, a answer, before int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.forgets.Load() != before {
		return false
	}
	r.last.keep(host, a)
	return true
}

// Stands reports whether the registry's last answers may still stand in for it, where it cannot be asked.
func (r *Resolver) Stands() bool { return r.last.young() }

// recalled is what the shared cache has for a host.
type recalled int

const (
	absent  recalled = iota // nothing
	shared                  // an answer
	useless                 // nothing that may be used, and nothing may be stored
	changed                 // the host has just changed: nothing may be stored
)

// recall asks the shared cache, for an answer and when it was given, or for when the host has changed.
func (r *Resolver) recall(ctx context.Context, host tenant.Host) (t tenant.Tenant, at time.Time, is recalled) {
	if r.o.Shared == nil {
		return t, at, useless
	}
	raw, ok := r.o.Shared.Get(ctx, host)
	if !ok {
		return t, at, absent
	}
	t, at, err := decodeTenant(raw)
	if errors.Is(err, errBarred) {
		return tenant.Tenant{}, at, changed
	}
	// The time is there because a cache may come back from a snapshot.
	if age := time.Since(at); err != nil || age > r.o.SharedTTL || age < -r.o.SharedTTL {
		return tenant.Tenant{}, at, useless
	}
	return t, at, shared
}

// barTime outlives every answer that was read before a change: the longest look-up, and what it may have stored last.
func (r *Resolver) barTime() time.Duration { return r.o.SharedTTL + r.o.Timeout }

// Bar makes the next request for the hosts ask the registry, here and wherever the shared cache is asked, and keeps
// answers from before from being stored there: removing them would not, since one may be on its way. What others
// remember in their processes is theirs to Forget. Call it after the commit.
func (r *Resolver) Bar(ctx context.Context, hosts ...tenant.Host) {
	if raw, err := json.Marshal(wireTenant{At: time.Now().UnixMilli(), Barred: true}); err == nil && r.o.Shared != nil {
		for _, h := range hosts {
			r.o.Shared.Set(ctx, h, raw, r.barTime())
		}
	}
	r.Forget(hosts...)
}

// Forget makes the next request for the hosts ask again, also one that is being answered at the moment.
func (r *Resolver) Forget(hosts ...tenant.Host) {
	r.mu.Lock()
	r.forgets.Add(1)
	for _, h := range hosts {
		r.last.drop(h)
	}
	r.mu.Unlock()
	for _, h := range hosts {
		r.known.Invalidate(h)
	}
}

// ForgetAll makes the next request for every host ask again: after messages of other servers may have been missed. No
// host is known to have changed by that, so that the last answers stay for a registry that is away, as it is when it
// and the shared cache go down together.
func (r *Resolver) ForgetAll() {
	r.mu.Lock()
	r.forgets.Add(1)
	r.mu.Unlock()
	r.known.InvalidateAll()
}

type wireTenant struct {
	Number     int32
	ID         string
	Slug       string
	Schema     string
	Group      string
	State      string
	Name       string
	Primary    string
	Epoch      int64
	Generation int64
	CreatedAt  time.Time
	Budget     tenant.Budget `json:",omitzero"`
	Use        tenant.Use    `json:",omitzero"`
	At         int64         // unix milliseconds: when the registry was asked
	// Barred stands where a host has just changed: for a while nobody may store an answer.
	Barred bool `json:",omitempty"`
}

var errBarred = errors.New("the host has just changed")

func encodeTenant(t tenant.Tenant, asked time.Time) ([]byte, error) {
	return json.Marshal(wireTenant{
		At:     asked.UnixMilli(),
		Number: t.Number, ID: t.ID, Slug: t.Slug.String(), Schema: t.Schema.String(), Group: t.Group, State: string(t.State),
		Name: t.Name, Primary: t.Primary.String(), Epoch: t.Epoch, Generation: t.CacheGeneration, CreatedAt: t.CreatedAt,
		Budget: t.Budget, Use: t.Use,
	})
}

func decodeTenant(raw []byte) (t tenant.Tenant, at time.Time, err error) {
	var w wireTenant
	if err := json.Unmarshal(raw, &w); err != nil {
		return t, at, err
	}
	at = time.UnixMilli(w.At)
	if w.Barred {
		return t, at, errBarred
	}
	t = tenant.Tenant{Number: w.Number, ID: w.ID, Group: w.Group, Name: w.Name, Epoch: w.Epoch, CacheGeneration: w.Generation, CreatedAt: w.CreatedAt,
		Budget: w.Budget, Use: w.Use}
	if t.Slug, err = tenant.ParseSlug(w.Slug); err != nil {
		return t, at, err
	}
	if t.Schema, err = tenant.ParseSchema(w.Schema); err != nil {
		return t, at, err
	}
	if t.State, err = tenant.ParseState(w.State); err != nil {
		return t, at, err
	}
	if w.Primary != "" {
		if t.Primary, err = tenant.ParseHost(w.Primary); err != nil {
			return t, at, err
		}
	}
	if t.Number <= 0 || t.Group == "" {
		return t, at, errors.New("a tenant without number or group")
	}
	return t, at, nil
}
