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
	Run     string // what its life since its start is called; empty: it does not say, and what it had before that is believed
	// Persistence is what it writes to its disk.
	Persistence Persistence
	// At is the time by its clock.
	At time.Time
}

// Persistence is what Redis keeps for its next start, and how that went last.
type Persistence struct {
	SnapshotFailed bool // the last one
	Saving         bool // one is being written
	Saved          time.Time
	Changes        int64 // since Saved
	// Rules say when a snapshot is due. Those and Stops are known only with Asked: this user may ask.
	Rules []SaveRule
	Stops bool // it takes no writes while snapshots fail
	Asked bool
	Log   bool // there is an append-only file
	// LogFailed: it cannot be written, so that Redis takes no writes. RewriteFailed: it grows.
	LogFailed, RewriteFailed bool
}

// SaveRule makes a snapshot due when so long after the last one there are so many changes.
type SaveRule struct {
	After   time.Duration
	Changes int64
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
	s.Run = info["run_id"]
	number := func(k string) int64 { n, _ := strconv.ParseInt(info[k], 10, 64); return n } // not said: 0
	s.Persistence = Persistence{
		SnapshotFailed: info["rdb_last_bgsave_status"] == "err", Saving: info["rdb_bgsave_in_progress"] == "1",
		Saved: time.Unix(number("rdb_last_save_time"), 0), Changes: number("rdb_changes_since_last_save"),
		Log: info["aof_enabled"] == "1", LogFailed: info["aof_last_write_status"] == "err", RewriteFailed: info["aof_last_bgrewrite_status"] == "err",
	}
	c.saveRules(ctx, &s.Persistence)
	s.Used, s.Max = number("used_memory"), number("maxmemory")
	return s, nil
}

// saveRules asks for what is configured; few users may.
func (c *Cache) saveRules(ctx context.Context, p *Persistence) {
	conf := map[string]string{}
	for _, name := range []string{"save", "stop-writes-on-bgsave-error"} {
		got, err := c.client.ConfigGet(ctx, name).Result()
		if err != nil {
			return
		}
		conf[name] = got[name]
	}
	p.Asked, p.Stops = true, conf["stop-writes-on-bgsave-error"] == "yes"
	words := strings.Fields(conf["save"])
	for i := 0; i+1 < len(words); i += 2 {
		seconds, err1 := strconv.Atoi(words[i])
		changes, err2 := strconv.ParseInt(words[i+1], 10, 64)
		if err1 == nil && err2 == nil {
			p.Rules = append(p.Rules, SaveRule{time.Duration(seconds) * time.Second, changes})
		}
	}
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
