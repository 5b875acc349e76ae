package app

import (
	"context"
	"fmt"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// remembered is the server's cache where there is no Redis. It keeps tenants' settings only, which anybody may ask for
// without being known: each of these questions would cost a transaction of the few on the shared tables. Who is signed
// in the server remembers by itself. Other processes' changes are seen after ttl.
type remembered struct {
	values *otter.Cache[string, rememberedValue]
	ttl    time.Duration
}

var _ server.Cache = remembered{}

type rememberedValue struct {
	value []byte
	ttl   time.Duration
}

// maxRemembered bounds the memory, in bytes.
const maxRemembered = 32 << 20

func newRemembered(ttl time.Duration) (remembered, error) {
	values, err := otter.New(&otter.Options[string, rememberedValue]{
		MaximumWeight: maxRemembered,
		Weigher:       func(key string, v rememberedValue) uint32 { return uint32(len(key) + len(v.value) + 200) }, //nolint:gosec // settings are bounded
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[string, rememberedValue]) time.Duration {
			return e.Value.ttl
		}),
	})
	if err != nil {
		return remembered{}, fmt.Errorf("make the cache of settings: %w", err)
	}
	return remembered{values, ttl}, nil
}

func (r remembered) close() error {
	r.values.StopAllGoroutines()
	return nil
}

// key makes the key of a tenant's value; others are not remembered.
func (r remembered) key(t tenant.Tenant, kind, id string) (string, bool) {
	return fmt.Sprintf("%d:%d:%s", t.Number, t.CacheGeneration, id), kind == "settings"
}

func (r remembered) Get(_ context.Context, t tenant.Tenant, kind, id string) ([]byte, bool) {
	k, ok := r.key(t, kind, id)
	if !ok {
		return nil, false
	}
	v, found := r.values.GetIfPresent(k)
	return v.value, found
}

func (r remembered) Add(_ context.Context, t tenant.Tenant, kind, id string, value []byte, _ time.Time, ttl time.Duration) {
	if k, ok := r.key(t, kind, id); ok {
		r.values.SetIfAbsent(k, rememberedValue{value, min(ttl, r.ttl)})
	}
}

// Set is for what bars a key: it lives as long as it is told to, beyond ttl too.
func (r remembered) Set(_ context.Context, t tenant.Tenant, kind, id string, value []byte, ttl time.Duration) {
	if k, ok := r.key(t, kind, id); ok {
		r.values.Set(k, rememberedValue{value, ttl})
	}
}
