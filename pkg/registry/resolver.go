package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// HostCache is a cache of hosts that all servers share. It may lose anything at any time.
type HostCache interface {
	Get(ctx context.Context, host tenant.Host) ([]byte, bool)
	// Add stores a value unless there is one.
	Add(ctx context.Context, host tenant.Host, value []byte, ttl time.Duration)
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
}

// Resolver finds the tenant of a host: in the process, then in the shared cache, then in the registry. Callers that
// ask for the same host at the same time cause one look-up.
type Resolver struct {
	o       ResolverOptions
	known   *otter.Cache[tenant.Host, resolved]
	forgets atomic.Int64
}

type resolved struct {
	tenant tenant.Tenant // zero: no tenant has the host
	brief  bool          // something was forgotten during the look-up: do not keep
}

// NewResolver makes a Resolver.
func NewResolver(o ResolverOptions) (*Resolver, error) {
	if o.Lookup == nil || o.TTL <= 0 || o.NegativeTTL <= 0 || o.Timeout <= 0 || o.Size <= 0 || o.Shared != nil && o.SharedTTL <= 0 {
		return nil, errors.New("resolver: Lookup, TTL, NegativeTTL, SharedTTL, Timeout and Size must be given")
	}
	known, err := otter.New(&otter.Options[tenant.Host, resolved]{
		MaximumSize: o.Size,
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[tenant.Host, resolved]) time.Duration {
			switch {
			case e.Value.brief:
				return time.Nanosecond
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
	return &Resolver{o: o, known: known}, nil
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
	t, found, barred := r.recall(ctx, host)
	if found {
		return resolved{tenant: t, brief: r.forgets.Load() != before}, nil
	}
	asked := time.Now()
	t, err := r.o.Lookup(ctx, host)
	if err != nil && !fault.Is(err, fault.NotFound) {
		return resolved{}, err
	}
	if err != nil {
		t = tenant.Tenant{}
	}
	if r.forgets.Load() != before {
		return resolved{tenant: t, brief: true}, nil
	}
	if !barred && !t.IsZero() {
		if raw, err := encodeTenant(t, asked); err == nil {
			r.o.Shared.Add(ctx, host, raw, r.o.SharedTTL)
		}
	}
	return resolved{tenant: t}, nil
}

// recall asks the shared cache. With barred nothing may be stored there.
func (r *Resolver) recall(ctx context.Context, host tenant.Host) (t tenant.Tenant, found, barred bool) {
	if r.o.Shared == nil {
		return t, false, true
	}
	raw, ok := r.o.Shared.Get(ctx, host)
	if !ok {
		return t, false, false
	}
	t, at, err := decodeTenant(raw)
	// The time is there because a cache may come back from a snapshot.
	if age := time.Since(at); err != nil || age > r.o.SharedTTL || age < -r.o.SharedTTL {
		return tenant.Tenant{}, false, true
	}
	return t, true, false
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
	r.forgets.Add(1)
	for _, h := range hosts {
		r.known.Invalidate(h)
	}
}

// ForgetAll forgets every host: after messages of other servers may have been missed.
func (r *Resolver) ForgetAll() {
	r.forgets.Add(1)
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
	At         int64 // unix milliseconds: when the registry was asked
	// Barred stands where a host has just changed: for a while nobody may store an answer.
	Barred bool `json:",omitempty"`
}

var errBarred = errors.New("the host has just changed")

func encodeTenant(t tenant.Tenant, asked time.Time) ([]byte, error) {
	return json.Marshal(wireTenant{
		At:     asked.UnixMilli(),
		Number: t.Number, ID: t.ID, Slug: t.Slug.String(), Schema: t.Schema.String(), Group: t.Group, State: string(t.State),
		Name: t.Name, Primary: t.Primary.String(), Epoch: t.Epoch, Generation: t.CacheGeneration, CreatedAt: t.CreatedAt,
	})
}

func decodeTenant(raw []byte) (t tenant.Tenant, at time.Time, err error) {
	var w wireTenant
	if err := json.Unmarshal(raw, &w); err != nil {
		return t, at, err
	}
	if w.Barred {
		return t, at, errBarred
	}
	at = time.UnixMilli(w.At)
	t = tenant.Tenant{Number: w.Number, ID: w.ID, Group: w.Group, Name: w.Name, Epoch: w.Epoch, CacheGeneration: w.Generation, CreatedAt: w.CreatedAt}
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
