package server

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// envelope is how values lie in the shared cache. Whose a value is stands inside it too and is checked on reading: a key
// that was built wrongly finds nothing instead of another tenant's value. The time is there because a cache may come
// back from a snapshot: what is older than its time to live counts for nothing, whatever the cache says.
type envelope struct {
	Number int32           `json:"n"`
	Tenant string          `json:"t"`
	At     int64           `json:"at"` // unix milliseconds
	Value  json.RawMessage `json:"v,omitempty"`
	// Barred stands where a value has just changed: for a while nobody may store one, since it may have been read
	// before the change.
	Barred bool `json:"barred,omitempty"`
}

// barTime outlives every value that was read before a change: the longest request, and what it may have stored last.
func (s *Server) barTime() time.Duration { return s.opts.IdentityTTL + s.opts.RequestTimeout }

// recall finds a value; ttl is the age beyond which it does not count. With barred the caller must not store one.
func (s *Server) recall(ctx context.Context, t tenant.Tenant, kind, id string, ttl time.Duration, into any) (found, barred bool) {
	if s.opts.Cache == nil {
		return false, true
	}
	raw, ok := s.opts.Cache.Get(ctx, t, kind, id)
	if !ok {
		return false, false
	}
	var e envelope
	if json.Unmarshal(raw, &e) != nil || e.Number != t.Number || e.Tenant != t.ID {
		return false, true
	}
	age := time.Since(time.UnixMilli(e.At))
	if e.Barred || age > ttl || age < -ttl {
		return false, true
	}
	return into != nil && json.Unmarshal(e.Value, into) == nil, false
}

// keep stores a value that was read at a moment, unless another stands there or is barred.
func (s *Server) keep(ctx context.Context, t tenant.Tenant, kind, id string, read time.Time, ttl time.Duration, value any) {
	if s.opts.Cache == nil {
		return
	}
	v, err := json.Marshal(value)
	if err != nil {
		return
	}
	e, err := json.Marshal(envelope{Number: t.Number, Tenant: t.ID, At: read.UnixMilli(), Value: v})
	if err != nil {
		return
	}
	s.opts.Cache.Add(ctx, t, kind, id, e, read, ttl)
}

// bar drops a value that has changed and keeps the old one from coming back. Call it after the commit. A Cache that could
// not store it must answer with it all the same, here, for as long as it was to be stored: the old value is still there.
func (s *Server) bar(ctx context.Context, t tenant.Tenant, kind, id string) {
	if s.opts.Cache != nil {
		bar(ctx, s.opts.Cache, t, kind, id, s.barTime())
	}
}

func bar(ctx context.Context, c Cache, t tenant.Tenant, kind, id string, ttl time.Duration) {
	e, err := json.Marshal(envelope{Number: t.Number, Tenant: t.ID, At: time.Now().UnixMilli(), Barred: true})
	if err != nil {
		return
	}
	c.Set(ctx, t, kind, id, e, ttl)
}

// AccountChange is a change of an account that no Server has made.
type AccountChange struct {
	Tenant tenant.Tenant // zero: the account is an administrator's
	User   uuid.UUID     // whose sessions and keys no longer stand for what they did; zero: nobody's
	Hashes [][]byte      // of single tokens that have ended
	TTL    time.Duration // the servers' IdentityTTL and RequestTimeout together
}

// BarAccount makes the servers ask PostgreSQL who the tokens of a changed account stand for, as a Server's own changes
// do. What a server remembers in its process ends within its LocalTTL. Call it after the commit.
func BarAccount(ctx context.Context, c Cache, a AccountChange) {
	for _, h := range a.Hashes {
		bar(ctx, c, a.Tenant, "identity", hex.EncodeToString(h), a.TTL)
	}
	if a.User != uuid.Nil {
		bar(ctx, c, a.Tenant, "user", a.User.String(), a.TTL)
	}
}
