package cache

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Server is what Redis says of itself.
type Server struct {
	Version string // as Redis counts: a fork says with which it agrees
	Fork    string // the fork's name; empty: Redis itself
	Replica bool   // it takes no writes
	Used    int64  // bytes
	Max     int64  // bytes; 0: no bound
	Policy  string // what goes when it is full, as in redis.conf
	Refuses bool   // its last snapshot failed, or its append-only file cannot be written: it may take no writes
	// At is the time by its clock.
	At time.Time
}

// Inspect asks Redis what it is. Unavailable: it does not answer; Forbidden: this user may not ask, and At may be all that
// is known. It must not be called without a URL.
func (c *Cache) Inspect(ctx context.Context) (s Server, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second+c.timeout)
	defer cancel()
	if s.At, err = c.client.Time(ctx).Result(); err != nil {
		return s, refused(err)
	}
	text, err := c.client.Info(ctx).Result()
	if err != nil {
		return s, refused(err)
	}
	info := map[string]string{}
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			info[k] = v
		}
	}
	s.Version, s.Policy, s.Replica = info["redis_version"], info["maxmemory_policy"], info["role"] == "slave"
	if name := info["server_name"]; name != "" && name != "redis" {
		s.Fork = name
	}
	s.Refuses = info["rdb_last_bgsave_status"] == "err" || info["aof_last_write_status"] == "err"
	s.Used, _ = strconv.ParseInt(info["used_memory"], 10, 64) // not said: 0
	s.Max, _ = strconv.ParseInt(info["maxmemory"], 10, 64)
	return s, nil
}

// refused tells a Redis that does not answer from one that does not let this user.
func refused(err error) error {
	if strings.HasPrefix(err.Error(), "NOPERM") {
		return fault.Wrap(err, fault.Forbidden, "Redis does not let this user look").WithCode("redis_forbidden").
			WithHint("allow it info, time and scan, as docker-compose.yml does")
	}
	return fault.Wrap(err, fault.Unavailable, "Redis does not answer").WithCode("redis_unreachable")
}

// Name is one key as it stands in Redis, whoever made it.
type Name struct {
	Key     string
	Endless bool // it has no time to live
}

// Names calls fn with keys that Redis has, at most so many, in no order. It reports whether those were all. Unavailable:
// Redis did not take part to the end; Forbidden: this user may not ask.
func (c *Cache) Names(ctx context.Context, most int, fn func(Name)) (all bool, err error) {
	if c.client == nil {
		return true, nil
	}
	n := 0
	for cursor := uint64(0); ; {
		if ctx.Err() != nil {
			return false, nil
		}
		page, cancel := context.WithTimeout(ctx, time.Second+c.timeout)
		keys, next, err := c.client.Scan(page, cursor, "*", 1000).Result()
		var ttls []*redis.DurationCmd
		if err == nil && len(keys) > 0 {
			p := c.client.Pipeline()
			for _, k := range keys {
				ttls = append(ttls, p.PTTL(page, k))
			}
			_, err = p.Exec(page)
		}
		cancel()
		if err != nil {
			return false, refused(err)
		}
		for i, k := range keys {
			if n++; n > most {
				return false, nil
			}
			fn(Name{Key: k, Endless: ttls[i].Val() == -1})
		}
		if cursor = next; cursor == 0 {
			return true, nil
		}
	}
}

// Unlink takes keys away that Names has told. Unavailable: Redis did not take part.
func (c *Cache) Unlink(ctx context.Context, keys ...string) error {
	if c.client == nil || len(keys) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second+c.timeout)
	defer cancel()
	if err := c.client.Unlink(ctx, keys...).Err(); err != nil {
		return refused(err)
	}
	return nil
}
