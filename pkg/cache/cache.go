// Package cache keeps values in Redis under each tenant's prefix, tells the other processes what to forget, and counts
// for rate limits. It is never needed: a Redis that is away, hangs, was flushed or rolled back is a cache that holds
// nothing, and costs a process no more than a few failed calls before it is left alone for a second. What a process has
// set and Redis has not taken it holds itself: it never reads an older value than its own. Nor does anybody read a value
// that was set before Redis was started the last time, from whatever snapshot.
//
// Keys are made here only, from parts that are checked: <schema>:<generation>:<kind>:<id> of a tenant and
// public:<kind>:<id> of the installation, and the run of Redis behind it. Raising a tenant's generation flushes it.
package cache

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"
	"github.com/sony/gobreaker/v2"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options says how Redis is reached.
type Options struct {
	URL     string        // empty: there is none, and nothing is kept
	Timeout time.Duration // for each command
	Logger  *slog.Logger
	// Trace makes the client traced; nil: it is not.
	Trace func(*redis.Client) error
}

// MaxTTL bounds how long anything is kept.
const MaxTTL = 24 * time.Hour

// Cache is one process's way to Redis. It is safe for concurrent use and must be closed.
type Cache struct {
	client  *redis.Client // nil: there is none
	breaker *gobreaker.CircuitBreaker[any]
	timeout time.Duration
	log     *slog.Logger
	hits    atomic.Int64
	misses  atomic.Int64
	limiter *limiter
	held    held

	mu        sync.Mutex
	listeners []func(Message)
	asked     time.Time // when the run was asked for that is the current one
	run       atomic.Pointer[run]
}

// Open makes the client; it connects at the first use. The fault is Invalid when the URL cannot be read.
func Open(o Options) (*Cache, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Timeout <= 0 {
		return nil, errors.New("cache: Timeout must be above 0")
	}
	c := &Cache{timeout: o.Timeout, log: o.Logger}
	c.breaker = gobreaker.NewCircuitBreaker[any](gobreaker.Settings{
		Name: "redis", Timeout: time.Second,
		ReadyToTrip: func(n gobreaker.Counts) bool { return n.ConsecutiveFailures >= 3 },
		IsSuccessful: func(err error) bool {
			return err == nil || errors.Is(err, redis.Nil) || errors.Is(err, context.Canceled)
		},
		OnStateChange: func(_ string, _, to gobreaker.State) {
			o.Logger.Warn("redis", "breaker", to.String())
		},
	})
	silence()
	if o.URL != "" {
		ro, err := redis.ParseURL(o.URL)
		if err != nil {
			return nil, fault.New(fault.Invalid, "redis.url cannot be read").WithCode("redis_url") // err may quote the password
		}
		// The defaults take 1.7 s to fail.
		ro.MaxRetries, ro.DialerRetries, ro.DialTimeout = -1, 1, max(o.Timeout, 200*time.Millisecond)
		ro.ReadTimeout, ro.WriteTimeout, ro.ContextTimeoutEnabled = o.Timeout, o.Timeout, true
		ro.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
		ro.OnConnect = c.meet
		c.client = redis.NewClient(ro)
		if o.Trace != nil {
			if err := o.Trace(c.client); err != nil {
				return nil, err
			}
		}
	}
	limiter, err := newLimiter(c)
	if err != nil {
		return nil, err
	}
	c.limiter = limiter
	return c, nil
}

// silence keeps go-redis from writing to stderr by itself: its failures are this package's to count and to tell.
var silence = sync.OnceFunc(func() { redis.SetLogger(quiet{}) })

type quiet struct{}

func (quiet) Printf(context.Context, string, ...any) {}

// Close tells Redis what it has not taken yet, if that is possible now, and closes the connections.
func (c *Cache) Close() error {
	c.limiter.close()
	if c.client == nil {
		return nil
	}
	left := c.held.len()
	for before := left + 1; left > 0 && left < before; {
		before = left
		c.tell(context.Background(), Key{})
		left = c.held.len()
	}
	if left > 0 {
		c.log.Warn("Redis has not taken changes; other processes may believe what was before until its time ends", "changes", left)
	}
	return c.client.Close()
}

// do runs one command unless Redis has just failed several times.
func (c *Cache) do(ctx context.Context, fn func(context.Context) error) error {
	if c.client == nil {
		return redis.Nil
	}
	_, err := c.breaker.Execute(func() (any, error) {
		ctx, cancel := context.WithTimeout(ctx, c.timeout)
		defer cancel()
		return nil, fn(ctx)
	})
	return err
}

// Ping asks whether Redis answers. Unavailable: it does not, or not as it should. Without a URL there is nothing to ask.
func (c *Cache) Ping(ctx context.Context) error {
	if c.client == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var said redis.Error
	err := c.client.Ping(ctx).Err()
	switch {
	case errors.As(err, &said):
		return fault.Wrap(err, fault.Unavailable, "Redis refuses what it is asked: %s", said).WithCode("redis_refuses")
	case err != nil:
		return fault.Wrap(err, fault.Unavailable, "Redis does not answer").WithCode("redis_unreachable")
	}
	return nil
}

// Key is a key that this package made.
type Key struct{ s string }

// String is the key as Redis knows it, up to the run of Redis behind its end.
func (k Key) String() string { return k.s }

const maxPart = 200

// TenantKey makes a key under a tenant's prefix. The fault is Internal when a part could be mistaken for something
// else.
func TenantKey(t tenant.Tenant, kind, id string) (Key, error) {
	if t.IsZero() {
		return Key{}, fault.New(fault.Internal, "a cache key of no tenant")
	}
	if err := checkParts(kind, id); err != nil {
		return Key{}, err
	}
	return Key{t.Schema.String() + ":" + strconv.FormatInt(t.CacheGeneration, 10) + ":" + kind + ":" + id}, nil
}

// PublicKey makes a key of the installation. No tenant's schema is called public.
func PublicKey(kind, id string) (Key, error) {
	if err := checkParts(kind, id); err != nil {
		return Key{}, err
	}
	return Key{"public:" + kind + ":" + id}, nil
}

func checkParts(parts ...string) error {
	for _, p := range parts {
		if p == "" || len(p) > maxPart {
			return fault.New(fault.Internal, "a cache key's part is empty or too long")
		}
		for i := range len(p) {
			if c := p[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`:{}*?[]\`, c) >= 0 {
				return fault.New(fault.Internal, "a cache key's part holds %q", string(rune(c)))
			}
		}
	}
	return nil
}

// Get finds a value. One that was set here and that Redis has not taken counts before the one that Redis has.
func (c *Cache) Get(ctx context.Context, k Key) ([]byte, bool) {
	c.tell(ctx, k)
	v, found, blind := c.held.get(k.s)
	if found {
		c.hits.Add(1)
		return v, true
	}
	if blind {
		c.misses.Add(1)
		return nil, false
	}
	err := c.named(ctx, k.s, func(ctx context.Context, name string, _ *run) (err error) {
		v, err = c.client.Get(ctx, name).Bytes()
		return err
	})
	if err != nil {
		c.misses.Add(1)
		return nil, false
	}
	c.hits.Add(1)
	return v, true
}

// Set stores a value for ttl, at most MaxTTL, whatever stands there. It is for changes: what Redis does not take is held
// by this process until ttl is over, read here instead of what Redis has, and given to Redis at a later Get. Unavailable:
// Redis has not taken it, and other processes may read the old value until it does.
func (c *Cache) Set(ctx context.Context, k Key, value []byte, ttl time.Duration) error {
	if c.client == nil || ttl < time.Millisecond {
		return nil
	}
	ttl = min(ttl, MaxTTL)
	v := c.held.add(k.s, value, ttl)
	err := c.set(ctx, k.s, value, ttl)
	c.held.settle(k.s, v, ttl, err == nil)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "Redis did not take a change").WithCode("redis_unreachable")
	}
	return nil
}

func (c *Cache) set(ctx context.Context, key string, value []byte, ttl time.Duration) error {
	return c.named(ctx, key, func(ctx context.Context, name string, _ *run) error { return c.client.Set(ctx, name, value, ttl).Err() })
}

// Add stores a value for ttl, at most MaxTTL, unless there is one. It is for what was read, since the moment read: what
// fails is a cache that holds nothing, and what was read before this Redis was met is not stored, since a change of it
// may have been told to the one before. There is no Delete: what was read before a change could be added right after it.
func (c *Cache) Add(ctx context.Context, k Key, value []byte, read time.Time, ttl time.Duration) {
	if ttl < time.Millisecond {
		return
	}
	_ = c.named(ctx, k.s, func(ctx context.Context, name string, in *run) error { // best effort, counted by the breaker
		if read.Before(in.since) {
			return nil
		}
		return c.client.SetArgs(ctx, name, value, redis.SetArgs{Mode: "NX", TTL: min(ttl, MaxTTL)}).Err()
	})
}

// Erase takes away every value under a tenant's prefix, of all generations, and says how many Redis had. What another process
// stores after that it does not find. Unavailable: Redis did not take part; what it has ends by itself, within MaxTTL.
func (c *Cache) Erase(ctx context.Context, t tenant.Tenant) (n int, err error) {
	if t.IsZero() {
		return 0, fault.New(fault.Internal, "the cache of no tenant was to be erased")
	}
	if c.client == nil {
		return 0, nil
	}
	pattern := t.Schema.String() + ":*" // a schema's name has no character that means something in a pattern
	for cursor := uint64(0); ; {
		var keys []string
		err := c.do(ctx, func(ctx context.Context) (err error) {
			if keys, cursor, err = c.client.Scan(ctx, cursor, pattern, 1000).Result(); err != nil || len(keys) == 0 {
				return err
			}
			gone, err := c.client.Unlink(ctx, keys...).Result()
			n += int(gone)
			return err
		})
		if err != nil {
			return n, fault.Wrap(err, fault.Unavailable, "Redis did not take a tenant's values away").WithCode("redis_unreachable")
		}
		if cursor == 0 {
			return n, nil
		}
	}
}

// Stats counts what this process asked for.
type Stats struct {
	Hits, Misses int64
	Held         int    // changes that Redis has not taken yet
	Breaker      string // closed, half-open or open
}

// Stats counts what this process asked for.
func (c *Cache) Stats() Stats {
	return Stats{Hits: c.hits.Load(), Misses: c.misses.Load(), Held: c.held.len(), Breaker: c.breaker.State().String()}
}

// State is how Redis is.
type State struct {
	Set    bool  // there is one to be asked
	Up     bool  // it answers
	Memory int64 // bytes that it holds; 0: unknown, its user may not ask
}

// State asks Redis how it is, past the breaker: for looks now and then, never on a request's way.
func (c *Cache) State(ctx context.Context) State {
	if c.client == nil {
		return State{}
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	text, err := c.client.Info(ctx, "memory").Result()
	var said redis.Error
	if err != nil { // one that refuses the question is there; one that is still reading its files answers nobody
		return State{Set: true, Up: errors.As(err, &said) && !redis.HasErrorPrefix(err, "LOADING")}
	}
	st := State{Set: true, Up: true}
	for line := range strings.Lines(text) {
		if value, found := strings.CutPrefix(line, "used_memory:"); found {
			st.Memory, _ = strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		}
	}
	return st
}

// Message tells the other processes what to forget.
type Message struct {
	Kind  string // the listener's word: letters only
	Value string
}

const channel = "oneo:invalidate"

// OnMessage registers a listener for Publish of this process and of others. Register before Listen.
func (c *Cache) OnMessage(fn func(Message)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.listeners = append(c.listeners, fn)
}

func (c *Cache) deliver(m Message) {
	c.mu.Lock()
	listeners := c.listeners
	c.mu.Unlock()
	for _, fn := range listeners {
		fn(m)
	}
}

// Publish tells this process at once, whatever becomes of Redis, and the others as soon as Redis does.
func (c *Cache) Publish(ctx context.Context, m Message) {
	c.deliver(m)
	_ = c.do(ctx, func(ctx context.Context) error { // best effort: the others' times to live bound what they miss
		return c.client.Publish(ctx, channel, m.Kind+" "+m.Value).Err()
	})
}

// Listen receives the other processes' messages until ctx ends. stale is called after every connection but the first:
// messages may have been missed.
func (c *Cache) Listen(ctx context.Context, stale func()) {
	if c.client == nil {
		<-ctx.Done()
		return
	}
	first := true
	for ctx.Err() == nil {
		c.listenOnce(ctx, func() {
			if !first {
				stale()
			}
			first = false
		})
		timer := time.NewTimer(time.Second)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

func (c *Cache) listenOnce(ctx context.Context, connected func()) {
	sub := c.client.Subscribe(ctx, channel)
	defer sub.Close()
	// A read that waits does not look at its context.
	defer context.AfterFunc(ctx, func() { _ = sub.Close() })()
	if _, err := sub.ReceiveTimeout(ctx, c.timeout+time.Second); err != nil {
		return
	}
	connected()
	for {
		// A server that died without a word is noticed by its silence after a ping.
		msg, err := sub.ReceiveTimeout(ctx, 30*time.Second)
		var timeout interface{ Timeout() bool }
		if errors.As(err, &timeout) && timeout.Timeout() && ctx.Err() == nil {
			if sub.Ping(ctx) != nil {
				return
			}
			if _, err := sub.ReceiveTimeout(ctx, c.timeout+time.Second); err != nil {
				return
			}
			continue
		}
		if err != nil {
			return
		}
		if m, ok := msg.(*redis.Message); ok {
			if kind, value, ok := strings.Cut(m.Payload, " "); ok {
				c.deliver(Message{Kind: kind, Value: value})
			}
		}
	}
}

// String says where Redis is, without a password.
func (c *Cache) String() string {
	if c.client == nil {
		return "no Redis"
	}
	o := c.client.Options()
	return fmt.Sprintf("%s/%d", o.Addr, o.DB)
}
