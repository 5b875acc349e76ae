package doctor_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// TestTheDocumentationListsEveryCheck holds docs/doctor.md equal to the table of checks.
func TestTheDocumentationListsEveryCheck(t *testing.T) {
	text, err := os.ReadFile("../../docs/doctor.md")
	require.NoError(t, err)
	rows := regexp.MustCompile("(?m)^\\| `([a-z-]+)` \\| ([^|]+) \\| ([^|]+) \\| ([^|]+) \\|$").FindAllStringSubmatch(string(text), -1)
	var want, got []string
	seen := map[string]bool{doctor.Fleet: true, doctor.Tenants: true, doctor.PostgreSQL: true, doctor.Redis: true, doctor.Store: true, doctor.Configuration: true}
	for _, c := range doctor.Checks() {
		require.False(t, seen[c.Name], "two checks, or a check and a group, are called %s", c.Name)
		seen[c.Name] = true
	}
	for _, g := range []string{doctor.Fleet, doctor.Tenants, doctor.PostgreSQL, doctor.Redis, doctor.Store, doctor.Configuration} {
		require.Contains(t, string(text), "\n## `"+g+"`\n", "the group %s has a heading", g)
		for _, c := range doctor.Checks() {
			if c.Group == g {
				want = append(want, c.Name+": "+c.About)
			}
		}
	}
	for _, row := range rows {
		got = append(got, row[1]+": "+row[2])
		require.NotEmpty(t, strings.TrimSpace(row[3]), row[1])
		require.NotEmpty(t, strings.TrimSpace(row[4]), row[1])
	}
	require.Equal(t, want, got)
}

func newDoctor(t *testing.T, o doctor.Options) *doctor.Doctor {
	t.Helper()
	d, err := doctor.New(o)
	require.NoError(t, err)
	doctor.Impatient(d)
	return d
}

// TestWhatMustNotHappen: repairs stop short of what somebody uses, looking does not write, and work of others explains what
// it makes odd.
func TestWhatMustNotHappen(t *testing.T) {
	f := newFleet(t)
	ctx := context.Background()

	t.Run("looking does not write", func(t *testing.T) {
		err := doctor.Read(ctx, newDoctor(t, f.o), `delete from public.domains`)
		require.Equal(t, "25006", postgres.SQLState(err))
	})
	t.Run("a server that gives signs of life stays in the list", func(t *testing.T) {
		f.sql(t, `insert into public.instances (id, host, pid, version, ops_addr, heartbeat) values (gen_random_uuid(), 'gone', 1, 'v1', '', now() - interval '2 hours'), (gen_random_uuid(), 'alive', 2, 'v1', '', now())`)
		res := result(t, f.run(t, func(o *doctor.Options) { o.Fix, o.Only = true, []string{"instances"} }), "instances")
		require.Equal(t, doctor.OK, res.Status, res.Message)
		require.Contains(t, res.Message, "1 server(s) running, of version v1")
		f.sql(t, `delete from public.instances`)
	})
	t.Run("an operation at work explains what is odd about its tenant", func(t *testing.T) {
		f.sql(t, `insert into public.operations (id, kind, state, tenant, slug, heartbeat) values (gen_random_uuid(), 'tenant.suspend', 'running', @na, 'aurora', now()); update public.placements set state = 'suspended', namespace = 1 where number = @na`)
		require.Empty(t, found(f.run(t, func(o *doctor.Options) { o.Quick = true })))
		f.sql(t, `delete from public.operations; update public.placements set state = 'active', namespace = 'aurora'::regnamespace where number = @na`)
	})
	t.Run("what an extension shows in public is not open to tenants", func(t *testing.T) {
		f.sql(t, `create extension pg_stat_statements`)
		only := func(o *doctor.Options) { o.Only = []string{"closed"} }
		require.Equal(t, doctor.OK, result(t, f.run(t, only), "closed").Status)
		require.Equal(t, "42501", postgres.SQLState(f.env.DB.InTenant(ctx, f.a, postgres.Read, func(tx *postgres.Tx) error {
			_, err := tx.Exec(ctx, `select 1 from public.pg_stat_statements`)
			return err
		})))
		f.sql(t, `create table public.planted (id int); grant select on public.planted to public`)
		require.Contains(t, result(t, f.run(t, only), "closed").Message, "tables of public are open: planted to everybody")
		f.sql(t, `drop table public.planted; drop extension pg_stat_statements`)
	})
	t.Run("an index that is being built is left alone", func(t *testing.T) {
		f.sql(t, breakIndex)
		builder := pgtest.Admin(t, f.env.AdminURL)
		tx, err := builder.Begin(ctx)
		require.NoError(t, err)
		var name string
		require.NoError(t, f.admin.QueryRow(ctx, `select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid where not i.indisvalid`).Scan(&name))
		_, err = tx.Exec(ctx, `do $$ begin execute format('lock table %s in share update exclusive mode', (select indrelid::regclass from pg_index where not indisvalid)); end $$`)
		require.NoError(t, err)
		only := func(o *doctor.Options) { o.Only, o.Fix = []string{"indexes"}, true }
		require.Equal(t, doctor.OK, result(t, f.run(t, only), "indexes").Status)
		require.NoError(t, tx.Rollback(ctx))

		// Nor is one touched whose tenant is being worked on.
		_, err = builder.Exec(ctx, `select pg_advisory_lock($1, $2)`, postgres.OperationLock, f.a.Number)
		require.NoError(t, err)
		res := result(t, f.run(t, only), "indexes")
		require.Equal(t, doctor.Fail, res.Status)
		require.Len(t, res.Fixed, 1)
		require.False(t, res.Fixed[0].Done)
		require.Contains(t, res.Fixed[0].Error, "another operation")
		_, err = builder.Exec(ctx, `select pg_advisory_unlock_all()`)
		require.NoError(t, err)
		f.sql(t, `update pg_index set indisvalid = true where not indisvalid`)
		// And one that is whole again by the time is left.
		full := postgres.Quote(f.a.Schema.String()) + "." + postgres.Quote(name)
		require.NoError(t, doctor.MendIndex(ctx, newDoctor(t, f.o), f.a.Number, f.a.Schema.String(), name, "drop index concurrently "+full))
		f.sql(t, `select '`+full+`'::regclass`)
	})
	t.Run("what is cached of a living tenant stays", func(t *testing.T) {
		key, err := cache.TenantKey(f.a, "host", "x")
		require.NoError(t, err)
		require.NoError(t, f.redis.Set(ctx, key.String(), "v", time.Hour).Err())
		require.NoError(t, f.redis.Set(ctx, "former:1:host:y", "v", time.Hour).Err())
		require.NoError(t, doctor.Uncache(ctx, newDoctor(t, f.o), key.String(), "former:1:host:y"))
		left, err := f.redis.Keys(ctx, "*").Result()
		require.NoError(t, err)
		require.Equal(t, []string{key.String()}, left)
	})
	t.Run("what is over a moment later is not found", func(t *testing.T) {
		d, n := newDoctor(t, f.o), 0
		res := doctor.One(d, true, func(_ context.Context, found func(string)) error {
			if n++; n == 1 {
				found("passing")
			}
			found("lasting")
			return nil
		})
		require.Equal(t, "lasting", res.Message)
		require.Equal(t, 2, n)
	})
	t.Run("a check that does not end is a finding", func(t *testing.T) {
		o := f.o
		o.Timeout = time.Millisecond
		res := doctor.One(newDoctor(t, o), false, func(ctx context.Context, _ func(string)) error {
			<-ctx.Done()
			return ctx.Err()
		})
		require.Equal(t, doctor.Warn, res.Status)
		require.Equal(t, "could not be looked at: the database did not answer in time", res.Message)
	})
	t.Run("an error tells no secret", func(t *testing.T) {
		res := doctor.One(newDoctor(t, f.o), false, func(context.Context, func(string)) error {
			return fault.Wrap(errors.New("postgres://u:sesame@h"), fault.Internal, "something went wrong")
		})
		require.Equal(t, "could not be looked at: something went wrong", res.Message)
	})
}

// TestADatabaseThatIsAway is told by one check, and the others look at what answers.
func TestADatabaseThatIsAway(t *testing.T) {
	f := newFleet(t)
	second := f.env.SecondGroup(t)
	with := func(g postgres.Group) func(*doctor.Options) {
		return func(o *doctor.Options) {
			o.DB, o.Migrate, _ = f.env.Open(t, func(po *postgres.Options) {
				po.Groups = map[string]postgres.Group{postgres.MainGroup: f.env.Group, "second": g}
				po.AcquireTimeout = 100 * time.Millisecond // what is not there is not there later
			})
			o.Config.Database.Groups = map[string]config.Group{"second": {URL: g.URL, OwnerURL: g.OwnerURL}}
			o.Quick = true
		}
	}
	there := with(second)
	require.Contains(t, found(f.run(t, there)), "shared-schema", "the second database has no tables yet")
	o := f.o
	there(&o)
	_, err := o.Migrate.Shared(context.Background())
	require.NoError(t, err)
	require.Empty(t, found(f.run(t, func(to *doctor.Options) { *to = o })), "two groups, both healthy")

	away := with(postgres.Group{URL: "postgres://oneo_app:sesame@127.0.0.1:1/oneo", OwnerURL: "postgres://oneo_owner:sesame@127.0.0.1:1/oneo"})
	rep := f.run(t, away)
	require.True(t, rep.Reached)
	require.Equal(t, doctor.Fail, result(t, rep, "reach").Status)
	for _, r := range rep.Results {
		require.NotContains(t, r.Message, "sesame")
		for _, finding := range r.Findings {
			require.False(t, finding.Database != "second" && finding.Status == doctor.Fail && !slices.Contains(ofTheMachine, r.Name), "%s: %s", r.Name, finding.Message)
		}
	}
	require.Equal(t, doctor.OK, result(t, rep, "domains").Status, "the registry is looked at")
	require.Contains(t, result(t, rep, "grants").Message, "PostgreSQL at 127.0.0.1:1/oneo cannot be reached")

	// Nothing answers: the configuration is looked at all the same.
	rep = f.run(t, func(o *doctor.Options) {
		o.DB, o.Migrate, _ = f.env.Open(t, func(po *postgres.Options) {
			po.Groups = map[string]postgres.Group{postgres.MainGroup: {URL: "postgres://oneo_app@127.0.0.1:1/oneo"}}
			po.AcquireTimeout = 100 * time.Millisecond
		})
		o.Config.Redis.URL, o.Store = "", nil
	})
	require.False(t, rep.Reached)
	require.Equal(t, doctor.OK, result(t, rep, "secret").Status)
	require.Len(t, rep.Results, len(doctor.Checks()))
}

func TestNewRefusesWhatItDoesNotKnow(t *testing.T) {
	f := newFleet(t)
	o := f.o
	o.Only = []string{"tenant", "drift"}
	_, err := doctor.New(o)
	require.Equal(t, fault.Invalid, fault.Of(err).Kind)
	require.Equal(t, "did you mean tenants?", fault.Of(err).Hint)
	o.Only = []string{"nonsense"}
	_, err = doctor.New(o)
	require.Equal(t, "the groups are fleet, tenants, postgresql, redis, store, configuration; docs/doctor.md lists the checks in them", fault.Of(err).Hint)
	_, err = doctor.New(doctor.Options{})
	require.Error(t, err)
}

// TestARedisThatIsAway is told, and hides nothing else.
func TestARedisThatIsAway(t *testing.T) {
	f := newFleet(t)
	away, err := cache.Open(cache.Options{URL: "redis://:sesame@127.0.0.1:1/0", Timeout: time.Second, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, away.Close()) })
	rep := f.run(t, func(o *doctor.Options) { o.Cache, o.Only = away, []string{doctor.Redis, doctor.Configuration} })
	require.Equal(t, []string{"redis-reach", "redis-memory", "redis-persistence", "redis-version", "redis-keys", "redis-clock"}, found(rep))
	require.Equal(t, doctor.Fail, result(t, rep, "redis-reach").Status)
	require.NotContains(t, result(t, rep, "redis-reach").Message, "sesame")

	// A user who may serve and no more: nothing is wrong with that.
	ctx := context.Background()
	require.NoError(t, f.redis.Do(ctx, "acl", "setuser", "server", "on", ">words", "~*", "&oneo:*", "-@all", "+get", "+set", "+ping", "+time", "+hello", "+auth", "+select", "+client|setname", "+info").Err())
	u := strings.Replace(f.o.Config.Redis.URL, "redis://:"+f.redis.Options().Password, "redis://server:words", 1)
	serving, err := cache.Open(cache.Options{URL: u, Timeout: 30 * time.Second})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, serving.Close()) })
	rep = f.run(t, func(o *doctor.Options) { o.Cache, o.Only = serving, []string{doctor.Redis} })
	require.Empty(t, found(rep))
	require.Equal(t, doctor.OK, result(t, rep, "redis-reach").Status)
	require.Equal(t, doctor.Skipped, result(t, rep, "redis-keys").Status)

	// But without info the servers do not notice that it was started again.
	require.NoError(t, f.redis.Do(ctx, "acl", "setuser", "server", "-info").Err())
	rep = f.run(t, func(o *doctor.Options) { o.Cache, o.Only = serving, []string{doctor.Redis} })
	require.Equal(t, []string{"redis-persistence"}, found(rep))
	require.Equal(t, doctor.Warn, result(t, rep, "redis-persistence").Status)
	require.Contains(t, result(t, rep, "redis-persistence").Message, "does not say since when it runs")
}

// TestJudgements are of what cannot be planted: servers of other versions, old rows, full disks, clocks that are apart.
func TestJudgements(t *testing.T) {
	now := time.Now()
	hourly := []cache.SaveRule{{After: time.Hour, Changes: 1}}
	for _, c := range []struct {
		name  string
		judge func() doctor.Result
		want  doctor.Status
		says  string
	}{
		{"newest", func() doctor.Result { return doctor.Judged(doctor.Version(180006)) }, doctor.OK, "18.6"},
		{"newer than known", func() doctor.Result { return doctor.Judged(doctor.Version(180009)) }, doctor.OK, ""},
		{"a major of the future", func() doctor.Result { return doctor.Judged(doctor.Version(190001)) }, doctor.OK, "newer"},
		{"one behind", func() doctor.Result { return doctor.Judged(doctor.Version(150018)) }, doctor.Warn, "15.19"},
		{"two behind", func() doctor.Result { return doctor.Judged(doctor.Version(150017)) }, doctor.Fail, "more than one release"},
		{"ended", func() doctor.Result { return doctor.Judged(doctor.Version(140024)) }, doctor.Warn, "mended no more"},
		{"long ended", func() doctor.Result { return doctor.Judged(doctor.Version(120022)) }, doctor.Fail, "mended no more"},
		{"locks", func() doctor.Result { return doctor.Judged(doctor.Locks(6400, 164)) }, doctor.OK, ""},
		{"few locks", func() doctor.Result { return doctor.Judged(doctor.Locks(640, 164)) }, doctor.Warn, "four tenants"},
		{"too few locks", func() doctor.Result { return doctor.Judged(doctor.Locks(100, 164)) }, doctor.Fail, "there are 100 in all"},
		{"young", func() doctor.Result { return doctor.Judged(doctor.Age(190_000_000, 200_000_000)) }, doctor.OK, ""},
		{"old", func() doctor.Result { return doctor.Judged(doctor.Age(400_000_000, 200_000_000)) }, doctor.Warn, "keep up"},
		{"near wraparound", func() doctor.Result { return doctor.Judged(doctor.Age(1_900_000_000, 200_000_000)) }, doctor.Fail, "in 100 million"},
		{"room", func() doctor.Result { return doctor.Judged(doctor.Room(98_800, 1900, 98_800)) }, doctor.OK, "room for about 3,100 more of this shape"},
		{"empty", func() doctor.Result { return doctor.Judged(doctor.Room(400, 0, 0)) }, doctor.OK, "no tenants yet"},
		{"no room", func() doctor.Result { return doctor.Judged(doctor.Room(300_000, 6000, 299_000)) }, doctor.Warn, "more than oneo was measured with"},
		{"disk", func() doctor.Result { return doctor.Judged(doctor.Disk(50<<30, 100<<30, 1000, 2000)) }, doctor.OK, "files for about 20 more"},
		{"disk without inodes", func() doctor.Result { return doctor.Judged(doctor.Disk(50<<30, 100<<30, 0, 0)) }, doctor.OK, "free"},
		{"fuller disk", func() doctor.Result { return doctor.Judged(doctor.Disk(10<<30, 100<<30, 1000, 2000)) }, doctor.Warn, "10 %"},
		{"full of files", func() doctor.Result { return doctor.Judged(doctor.Disk(50<<30, 100<<30, 20, 2000)) }, doctor.Fail, "files"},
		{"pooler", func() doctor.Result {
			return doctor.Judged(doctor.Pooler("PgBouncer 1.25.2", "search_path", "prepared"))
		}, doctor.OK, "1.25.2"},
		{"old pooler", func() doctor.Result { return doctor.Judged(doctor.Pooler("PgBouncer 1.18.0", "", "prepared")) }, doctor.Fail, "no prepared statements"},
		{"old pooler, unprepared", func() doctor.Result { return doctor.Judged(doctor.Pooler("PgBouncer 1.18.0", "", "unprepared")) }, doctor.Warn, "CVE-2026-6664"},
		{"pooler that tracks", func() doctor.Result {
			return doctor.Judged(doctor.Pooler("PgBouncer 1.25.0", "IntervalStyle, search_path", "prepared"))
		}, doctor.Fail, "CVE-2025-12819"},
		{"silent pooler", func() doctor.Result { return doctor.Judged(doctor.Pooler("", "", "prepared")) }, doctor.Warn, "does not say"},
		{"redis without a bound", func() doctor.Result { return doctor.Judged(doctor.Memory(cache.Server{Policy: "noeviction"})) }, doctor.OK, ""},
		{"redis that evicts", func() doctor.Result {
			return doctor.Judged(doctor.Memory(cache.Server{Policy: "volatile-lru", Max: 100, Used: 99}))
		}, doctor.OK, ""},
		{"redis that is full", func() doctor.Result {
			return doctor.Judged(doctor.Memory(cache.Server{Policy: "noeviction", Max: 100, Used: 95}))
		}, doctor.Fail, "refuses writes"},
		{"redis that saves", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Rules: hourly, Log: true, Saved: now.Add(-65 * time.Minute), Changes: 7}, now))
		}, doctor.OK, "snapshots and an append-only file"},
		{"redis without a change", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Rules: hourly, Saved: now.Add(-time.Hour * 100)}, now))
		}, doctor.OK, "snapshots"},
		{"redis that is saving", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Rules: hourly, Saved: now.Add(-2 * time.Hour), Changes: 7, Saving: true}, now))
		}, doctor.OK, "snapshots"},
		{"redis whose snapshot is late", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Rules: hourly, Saved: now.Add(-2 * time.Hour), Changes: 7}, now))
		}, doctor.Warn, "2h0m0s old, with 7 changes"},
		{"redis whose snapshot failed", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Rules: hourly, SnapshotFailed: true}, now))
		}, doctor.Warn, "could not write its last snapshot"},
		{"redis that stops", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Stops: true, SnapshotFailed: true}, now))
		}, doctor.Fail, "refuses writes"},
		{"redis that may stop", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{SnapshotFailed: true}, now))
		}, doctor.Warn, "could not write its last snapshot"},
		{"redis whose disk is full", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Log: true, LogFailed: true}, now))
		}, doctor.Fail, "append-only file, and refuses writes"},
		{"redis whose log grows", func() doctor.Result {
			return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true, Log: true, RewriteFailed: true}, now))
		}, doctor.Warn, "grows"},
		{"redis that keeps nothing", func() doctor.Result { return doctor.Judged(doctor.Persistence(cache.Persistence{Asked: true}, now)) }, doctor.OK, "nothing"},
		{"redis that does not say its run", func() doctor.Result { return doctor.Judged(doctor.Run("")) }, doctor.Warn, "up to 30s"},
		{"redis that says its run", func() doctor.Result { return doctor.Judged(doctor.Run("0a1b")) }, doctor.OK, ""},
		{"mended redis", func() doctor.Result { return doctor.Judged(doctor.RedisVersion(cache.Server{Version: "7.2.11"})) }, doctor.OK, ""},
		{"redis with a hole", func() doctor.Result { return doctor.Judged(doctor.RedisVersion(cache.Server{Version: "7.2.4"})) }, doctor.Warn, "CVE-2025-49844"},
		{"the distribution's redis", func() doctor.Result { return doctor.Judged(doctor.RedisVersion(cache.Server{Version: "7.0.15"})) }, doctor.OK, "distribution"},
		{"valkey", func() doctor.Result {
			return doctor.Judged(doctor.RedisVersion(cache.Server{Version: "7.2.4", Fork: "valkey"}))
		}, doctor.OK, "valkey"},
		{"very old redis", func() doctor.Result { return doctor.Judged(doctor.RedisVersion(cache.Server{Version: "5.0.3"})) }, doctor.Fail, "mended no more"},
		{"same time", func() doctor.Result {
			return doctor.Judged(doctor.Clock(now, now.Add(-time.Second), now.Add(time.Second), 0))
		}, doctor.OK, ""},
		{"a slow answer", func() doctor.Result {
			return doctor.Judged(doctor.Clock(now, now.Add(-time.Minute), now.Add(time.Minute), 0))
		}, doctor.OK, ""},
		{"whole seconds", func() doctor.Result {
			return doctor.Judged(doctor.Clock(now.Truncate(time.Second), now, now.Add(time.Millisecond), time.Second))
		}, doctor.OK, ""},
		{"ahead", func() doctor.Result { return doctor.Judged(doctor.Clock(now.Add(5*time.Second), now, now, 0)) }, doctor.Warn, "5s ahead of"},
		{"far behind", func() doctor.Result { return doctor.Judged(doctor.Clock(now.Add(-time.Hour), now, now, 0)) }, doctor.Fail, "behind"},
	} {
		res := c.judge()
		require.Equal(t, c.want, res.Status, "%s: %s", c.name, res.Message)
		require.Contains(t, res.Message, c.says, c.name)
	}
}

func TestKeysAreTold(t *testing.T) {
	is, was := map[string]bool{"acme": true}, map[string]bool{"old": true}
	for key, want := range map[string]string{
		"acme:1:host:x": "ours", "public:host:acme.localhost": "ours", "rate:public:rate:0a1b": "ours", "old:7:session:y": "gone",
		"other:1:host:x": "foreign", "acme:one:host:x": "foreign", "acme": "foreign", "acme:1:host": "foreign", "acme:1:host:x:0a1b": "ours", "acme:1:host:x:0a1b:y": "foreign",
		"public:host:acme.localhost:0a1b": "ours", "public:host:acme.localhost:0a1b:y": "foreign", "old:7:session:y:0a1b": "gone",
		"public:host": "foreign", "sess:1234": "foreign", "": "foreign", "acme:1:a\n:b": "ours",
	} {
		require.Equal(t, want, doctor.KeyOf(key, is, was), "%q", key)
	}
}
