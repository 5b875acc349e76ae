package doctor

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/fault"
)

var redisChecks = []Check{
	{Name: "redis-reach", Group: Redis, About: "Redis answers and takes writes", run: checkRedis},
	{Name: "redis-memory", Group: Redis, About: "a full Redis lets old values go instead of refusing new ones", run: checkRedisMemory},
	{Name: "redis-persistence", Group: Redis, About: "what Redis keeps across a restart is written, and not taken for the truth after one", run: checkRedisPersistence},
	{Name: "redis-version", Group: Redis, About: "Redis has the security fixes that this binary knows of", run: checkRedisVersion},
	{Name: "redis-keys", Group: Redis, About: "every key is a tenant's or the installation's, and ends by itself", run: checkRedisKeys},
	{Name: "redis-clock", Group: Redis, About: "Redis's clock and this machine's agree", run: checkRedisClock},
	{Name: "redis-url", Group: Redis, About: "the way to Redis has a password, and is encrypted where it leaves the machine", run: checkRedisURL},
}

// noRedis says of a check that there is nothing to look at.
func (d *Doctor) noRedis(r *report) bool {
	if d.o.Config.Redis.URL == "" {
		r.skip("no Redis is configured: each server caches and counts for itself")
		return true
	}
	return false
}

// inspect asks Redis what it is. It is false where there is none, or it does not say: the user that serves need not be
// allowed to ask.
func (d *Doctor) inspect(ctx context.Context, r *report) (s cache.Server, ok bool, err error) {
	if d.noRedis(r) {
		return s, false, nil
	}
	s, err = d.o.Cache.Inspect(ctx)
	if fault.Is(err, fault.Forbidden) {
		r.skip("Redis does not let this user ask, which is as it should be for serving: look with another redis.url, whose user may info, scan and pttl")
		return s, false, nil
	}
	return s, err == nil, err
}

func checkRedis(ctx context.Context, d *Doctor, r *report) error {
	if d.noRedis(r) {
		return nil
	}
	if err := d.o.Cache.Ping(ctx); err != nil {
		if f := fault.Of(err); f.Code == "redis_refuses" {
			d.reached = true
			r.found(Fail, "", "mend what it says", "at %s, %s", d.o.Cache, f.Message)
			return nil
		}
		r.found(Fail, "", "start it, or look at redis.url; oneo serves without it, and slower", "Redis at %s does not answer", d.o.Cache)
		return nil
	}
	d.reached = true
	s, err := d.o.Cache.Inspect(ctx)
	switch {
	case fault.Is(err, fault.Forbidden):
	case err != nil:
		return err
	case s.Replica:
		r.found(Fail, "", "let redis.url lead to the primary", "Redis is a replica and takes no writes: caches stay empty, and limits are not shared")
	}
	r.ok("%s answers", d.o.Cache)
	return nil
}

func checkRedisMemory(ctx context.Context, d *Doctor, r *report) error {
	s, ok, err := d.inspect(ctx, r)
	if ok {
		judgeMemory(r, s)
	}
	return err
}

func judgeMemory(r *report, s cache.Server) {
	switch {
	case s.Max == 0:
		r.ok("%s used, without a bound of its own", size(s.Used))
	case s.Policy == "noeviction":
		status := Warn
		if s.Used > s.Max*9/10 {
			status = Fail
		}
		r.found(status, "", "config set maxmemory-policy allkeys-lru, and in redis.conf",
			"a full Redis refuses writes (noeviction, %s of %s used): servers would believe for a while what others have changed", size(s.Used), size(s.Max))
	default: // what is evicted near the bound is what it is for
		r.ok("%s of %s used, %s", size(s.Used), size(s.Max), s.Policy)
	}
}

func checkRedisPersistence(ctx context.Context, d *Doctor, r *report) error {
	if d.noRedis(r) {
		return nil
	}
	s, err := d.o.Cache.Inspect(ctx)
	switch {
	case fault.Is(err, fault.Forbidden):
		judgeRun(r, d.o.Config.Cache.SharedTTL, "")
	case err != nil:
		return err
	default:
		if s.Version != "" { // the one inside oneo dev says nothing of itself, and keeps nothing
			judgeRun(r, d.o.Config.Cache.SharedTTL, s.Run)
		}
		judgePersistence(r, s.Persistence, s.At)
	}
	return nil
}

// judgeRun is about what servers go by to leave alone what Redis has from before its start.
func judgeRun(r *report, ttl time.Duration, run string) {
	if run == "" {
		r.found(Warn, "", "allow the user of redis.url info, as docker-compose.yml does",
			"Redis does not say since when it runs: started from an old snapshot, it is believed for up to %s, sessions that have ended among it", ttl)
	}
}

// saveSlack is how much later than due a snapshot may be: one that is being tried again, or waits for another.
const saveSlack = 10 * time.Minute

func judgePersistence(r *report, p cache.Persistence, now time.Time) {
	const as = "; save, appendonly and stop-writes-on-bgsave-error as in config/redis.conf"
	switch {
	case p.LogFailed:
		r.found(Fail, "", "free its disk, or let it write there"+as, "Redis cannot write its append-only file, and refuses writes")
	case p.RewriteFailed:
		r.found(Warn, "", "free its disk and memory: its log says which", "Redis could not rewrite its append-only file, which grows until it can")
	}
	switch {
	case p.SnapshotFailed && p.Stops:
		r.found(Fail, "", "free its disk and memory: its log says which"+as, "Redis could not write its last snapshot, and refuses writes")
	case p.SnapshotFailed: // whether it takes writes, redis-reach has seen
		r.found(Warn, "", "free its disk and memory: its log says which", "Redis could not write its last snapshot; the one before is of %s", p.Saved.UTC().Format(time.DateTime))
	default:
		for _, rule := range p.Rules {
			if age := now.Sub(p.Saved); !p.Saving && p.Changes >= rule.Changes && age > rule.After+saveSlack {
				r.found(Warn, "", "look into its log for why it does not save", "the last snapshot of Redis is %s old, with %d changes since; it was due after %s",
					age.Round(time.Second), p.Changes, rule.After)
				break
			}
		}
	}
	var kept []string
	if len(p.Rules) > 0 {
		kept = append(kept, "snapshots")
	}
	if p.Log {
		kept = append(kept, "an append-only file")
	}
	switch {
	case len(kept) > 0:
		r.ok("keeps %s", strings.Join(kept, " and "))
	case p.Asked:
		r.ok("keeps nothing across a restart, which counts alone would outlive")
	default:
		r.ok("no append-only file; this user may not ask for more")
	}
}

func checkRedisVersion(ctx context.Context, d *Doctor, r *report) error {
	s, ok, err := d.inspect(ctx, r)
	if ok {
		judgeRedis(r, s)
	}
	return err
}

func judgeRedis(r *report, s cache.Server) {
	if s.Fork != "" {
		r.ok("%s, which counts by itself", s.Fork)
		return
	}
	var v [3]int
	if _, err := fmt.Sscanf(s.Version, "%d.%d.%d", &v[0], &v[1], &v[2]); err != nil {
		r.ok("Redis %s", s.Version)
		return
	}
	branch := [2]int{v[0], v[1]}
	fixed, known := redisFixes[branch]
	switch {
	case known && v[2] < fixed:
		r.found(Warn, "", fmt.Sprintf("install Redis %d.%d.%d, and restart it", v[0], v[1], fixed), "Redis %s lets whoever may run scripts run code (CVE-2025-49844)", s.Version)
	case v[0] < 6:
		r.found(Fail, "", "install a newer Redis", "Redis %s is mended no more", s.Version)
	case !known && slices.Compare(branch[:], []int{8, 2}) < 0:
		r.ok("Redis %s, whose fixes are the distribution's", s.Version)
	default:
		r.ok("Redis %s", s.Version)
	}
}

// Bounds of a look through Redis.
const (
	mostKeys = 200_000
	keysTime = 5 * time.Second
)

func checkRedisKeys(ctx context.Context, d *Doctor, r *report) error {
	if _, ok, err := d.inspect(ctx, r); !ok {
		return err
	}
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	is, was := map[string]bool{}, map[string]bool{}
	for _, t := range w.tenants {
		if t.state == "purged" {
			was[t.schema] = true
		} else {
			is[t.schema] = true
		}
	}
	var foreign, endless, gone []string
	looked := 0
	bounded, cancel := context.WithTimeout(ctx, keysTime)
	defer cancel()
	all, err := d.o.Cache.Names(bounded, mostKeys, func(n cache.Name) {
		looked++
		switch whose := keyOf(n.Key, is, was); {
		case whose == foreignKey:
			foreign = append(foreign, n.Key)
		case whose == goneKey:
			gone = append(gone, n.Key)
		case n.Endless:
			endless = append(endless, n.Key)
		}
	})
	if fault.Is(err, fault.Forbidden) {
		r.skip("Redis does not let this user look through its keys, which is as it should be for serving")
		return nil
	}
	if err != nil {
		return err
	}
	prefixes := func(keys []string) string {
		by := map[string]bool{}
		for _, k := range keys {
			first, _, _ := strings.Cut(k, ":")
			by[strconv.QuoteToASCII(first[:min(len(first), 40)])] = true
		}
		return some(slices.Sorted(maps.Keys(by)))
	}
	if len(foreign) > 0 {
		r.found(Warn, "", "give oneo a Redis, or a database of it, of its own: redis.url", "%d key(s) are neither a tenant's nor the installation's; they begin with %s", len(foreign), prefixes(foreign))
	}
	if len(gone) > 0 {
		r.found(Warn, "", "oneo doctor --only redis-keys --fix", "%d key(s) are of tenants that are gone: %s", len(gone), prefixes(gone)).
			by(func(ctx context.Context) error { return d.uncache(ctx, gone) }, "take %d key(s) of tenants that are gone out of Redis", len(gone))
	}
	if len(endless) > 0 {
		r.found(Warn, "", "find out who wrote them: oneo gives each key a time to live", "%d key(s) never end by themselves; they begin with %s", len(endless), prefixes(endless))
	}
	if all {
		r.ok("%d key(s)", looked)
	} else {
		r.ok("the first %d key(s)", looked)
	}
	return nil
}

// uncache takes cached values away whose tenants are gone still.
func (d *Doctor) uncache(ctx context.Context, keys []string) error {
	d.w = nil
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	is := map[string]bool{}
	for _, t := range w.tenants {
		if t.state != "purged" {
			is[t.schema] = true
		}
	}
	keys = slices.DeleteFunc(slices.Clone(keys), func(k string) bool { // whose schema's name was given to another meanwhile
		schema, _, _ := strings.Cut(k, ":")
		return is[schema]
	})
	for page := range slices.Chunk(keys, 1000) {
		if err := d.o.Cache.Unlink(ctx, page...); err != nil {
			return err
		}
	}
	return nil
}

type keyKind int

const (
	ourKey keyKind = iota
	goneKey
	foreignKey
)

// keyOf tells whose a key is, by the schemas of the tenants that there are and that were. Keys are as pkg/cache makes
// them: <schema>:<generation>:<kind>:<id> and public:<kind>:<id>, with the run of Redis behind it where that is known, and
// the latter behind rate: where something is counted.
func keyOf(key string, is, was map[string]bool) keyKind {
	key = strings.TrimPrefix(key, "rate:public:")
	parts := strings.Split(key, ":")
	switch n := len(parts); {
	case parts[0] == "public" && (n == 3 || n == 4), parts[0] == "rate" && n == 2:
		return ourKey
	case n != 4 && n != 5:
		return foreignKey
	}
	if _, err := strconv.ParseInt(parts[1], 10, 64); err != nil {
		return foreignKey
	}
	switch {
	case is[parts[0]]:
		return ourKey
	case was[parts[0]]:
		return goneKey
	}
	return foreignKey
}

func checkRedisClock(ctx context.Context, d *Doctor, r *report) error {
	if d.noRedis(r) {
		return nil
	}
	m := moment{before: d.o.Now()}
	s, err := d.o.Cache.Inspect(ctx)
	if s.At.IsZero() {
		return err
	}
	m.theirs, m.after = s.At, d.o.Now()
	judgeClock(r, "", "Redis", m)
	return nil
}

func checkRedisURL(_ context.Context, d *Doctor, r *report) error {
	if d.noRedis(r) {
		return nil
	}
	u, err := url.Parse(d.o.Config.Redis.URL)
	if err != nil {
		return fault.New(fault.Invalid, "redis.url cannot be read") // err holds the password
	}
	password, _ := u.User.Password()
	here := u.Scheme == "unix" || localHost(u.Hostname())
	if password == "" && !here {
		r.found(Fail, "", "give Redis a user with a password (docker-compose.yml shows one) and write it into redis.url", "Redis at %s is used without a password: whoever reaches it reads and writes what servers believe", u.Host)
	}
	if u.Scheme == "redis" && !here {
		r.found(Warn, "", "use rediss://, or a network that nobody else is on", "the way to Redis at %s is not encrypted", u.Host)
	}
	r.ok("as it should be")
	return nil
}
