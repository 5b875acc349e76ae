package doctor_test

import (
	"context"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// fleet is a healthy one: two tenants, Redis and a store.
type fleet struct {
	env    *pgtest.Env
	admin  *pgx.Conn
	redis  *redis.Client
	o      doctor.Options
	a, b   tenant.Tenant
	roleA  string
	roleB  string
	login  string // of a
	id     string
	backup string
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	ctx := context.Background()
	f := &fleet{env: pgtest.New(t), backup: filepath.Join(t.TempDir(), "backups")}
	f.admin = pgtest.Admin(t, f.env.AdminURL)
	f.a, f.b = f.env.Tenant(t, "aurora"), f.env.Tenant(t, "birch")
	inst, err := f.env.DB.Installation(ctx, postgres.MainGroup)
	require.NoError(t, err)
	f.roleA, f.roleB, f.login, f.id = inst.TenantRole(f.a.Number), inst.TenantRole(f.b.Number), inst.LoginOf(f.a.Number), inst.ID

	c := config.Default()
	c.Database.URL, c.Database.OwnerURL, c.Server.Secret = f.env.Group.URL, f.env.Group.OwnerURL, pgtest.Secret
	r := pgtest.Redis(t)
	c.Redis.URL, c.Redis.Timeout, c.Backup.URL = r.URL(), 30*time.Second, f.backup
	ro, err := redis.ParseURL(r.URL())
	require.NoError(t, err)
	f.redis = redis.NewClient(ro)
	t.Cleanup(func() { require.NoError(t, f.redis.Close()) })
	cached, err := cache.Open(cache.Options{URL: c.Redis.URL, Timeout: c.Redis.Timeout})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, cached.Close()) })
	checker, err := structure.New(structure.Options{DB: f.env.DB, Head: f.env.Migrate.Head(migrate.TenantSet), Make: f.env.Migrate.Create})
	require.NoError(t, err)
	f.o = doctor.Options{
		DB: f.env.DB, Migrate: f.env.Migrate, Structure: checker, Provision: f.env.Provision, Cache: cached, Config: c, Version: "v1", Actor: "test", Timeout: pgtest.Patience,
		Store: func() (store.Store, error) { return store.NewDir(f.backup) },
		Schedules: func(context.Context) ([]doctor.Schedule, error) {
			return []doctor.Schedule{{Name: "nightly", State: "ok", Healthy: true}}, nil
		},
		Backups: func(context.Context) (doctor.Backups, error) { return doctor.Backups{Count: 2}, nil },
		Scratch: filepath.Join(t.TempDir(), "scratch"),
	}
	withPhysical(nil)(&f.o)
	return f
}

func (f *fleet) sql(t *testing.T, sql string) {
	t.Helper()
	for k, v := range map[string]string{
		"@a": f.a.Schema.String(), "@b": f.b.Schema.String(), "@roleA": postgres.Quote(f.roleA), "@roleB": postgres.Quote(f.roleB), "@login": f.login,
		"@na": strconv.Itoa(int(f.a.Number)), "@nb": strconv.Itoa(int(f.b.Number)), "@id": f.id,
	} {
		sql = replaceWord(sql, k, v)
	}
	require.NoError(t, f.admin.PgConn().Exec(context.Background(), sql).Close(), sql)
}

// replaceWord replaces a word that begins with @ and is not the beginning of another.
func replaceWord(s, word, by string) string {
	var out strings.Builder
	for {
		at := strings.Index(s, word)
		if at < 0 {
			return out.String() + s
		}
		end := at + len(word)
		out.WriteString(s[:at])
		if end < len(s) && (s[end] >= 'a' && s[end] <= 'z' || s[end] >= 'A' && s[end] <= 'Z') {
			out.WriteString(word)
		} else {
			out.WriteString(by)
		}
		s = s[end:]
	}
}

func (f *fleet) run(t *testing.T, change ...func(*doctor.Options)) doctor.Report {
	t.Helper()
	o := f.o
	for _, c := range change {
		c(&o)
	}
	d, err := doctor.New(o)
	require.NoError(t, err)
	doctor.Impatient(d)
	rep, err := d.Run(context.Background())
	require.NoError(t, err)
	return rep
}

// ofTheMachine are checks of the machine and the server that the tests run on: what they find is true, and not the fleet's.
// The server of the tests forgets everything in a crash, has no autovacuum, and is as old as the distribution's.
var ofTheMachine = []string{"version", "durability", "vacuum", "disk", "store-disk"}

// found are the names of the checks that have found something, but for those of the machine.
func found(rep doctor.Report) []string {
	names := []string{}
	for _, r := range rep.Results {
		if (r.Status == doctor.Warn || r.Status == doctor.Fail) && !slices.Contains(ofTheMachine, r.Name) {
			names = append(names, r.Name)
		}
	}
	return names
}

func result(t *testing.T, rep doctor.Report, name string) doctor.Result {
	t.Helper()
	at := slices.IndexFunc(rep.Results, func(r doctor.Result) bool { return r.Name == name })
	require.GreaterOrEqual(t, at, 0, "no check %s", name)
	return rep.Results[at]
}

func groupOf(check string) string {
	all := doctor.Checks()
	return all[slices.IndexFunc(all, func(c doctor.Check) bool { return c.Name == check })].Group
}

// plant is one fault: how it comes, how its check tells it, and how it is healed.
type plant struct {
	check   string
	status  doctor.Status
	says    string // part of the message
	sql     string
	heal    string                // SQL; empty with fix: Run repairs it
	fix     string                // what Run says that it does
	options func(*doctor.Options) // instead of sql
	also    []string              // checks that this is no less a matter of, or that cannot be made then
}

// withPhysical has a cluster with a backup of a day ago and all of its WAL, and something wrong with it.
func withPhysical(wrong func(*doctor.Physical)) func(*doctor.Options) {
	return func(o *doctor.Options) {
		o.Physical = func(context.Context) ([]doctor.Physical, error) {
			made := time.Now().Add(-24 * time.Hour)
			proved := made
			segment := func(n uint64) string { return physical.LSN(n*physical.SegmentSize).Segment(1, physical.SegmentSize) }
			p := doctor.Physical{Cluster: "main", Answers: true, Archives: true, Proved: &proved, Info: physical.Info{
				Backups: []physical.Backup{{Label: "20261126T034512Z", Stop: made, Timeline: 1, StartLSN: 2 * physical.SegmentSize}},
				WAL:     []physical.Stretch{{First: segment(1), Last: segment(9), From: made.Add(-time.Hour), Until: time.Now()}},
			}}
			if wrong != nil {
				wrong(&p)
			}
			return []doctor.Physical{p}, nil
		}
	}
}

// breakIndex leaves an index as a concurrent making of one does that was interrupted.
const breakIndex = `update pg_index set indisvalid = false where indexrelid = (select min(i.indexrelid) from pg_index i join pg_class c on c.oid = i.indexrelid where c.relnamespace = '@a'::regnamespace and not i.indisprimary and not i.indisunique)`

var plants = []plant{
	{check: "instances", status: doctor.Warn, says: "silent", fix: "take 1 silent server(s) off the list",
		sql: `insert into public.instances (id, host, pid, version, ops_addr, heartbeat) values (gen_random_uuid(), 'gone', 1, 'v1', '', now() - interval '2 hours')`},
	{check: "instances", status: doctor.Warn, says: "different versions",
		sql: `insert into public.instances (id, host, pid, version, ops_addr) values (gen_random_uuid(), 'one', 1, 'v1', ''), (gen_random_uuid(), 'two', 2, 'v2', '')`, heal: `delete from public.instances`},
	{check: "shared-schema", status: doctor.Fail, says: "behind",
		sql:  `create temp table kept as select * from public.ledger where set = 'shared' and version = (select max(version) from public.ledger where set = 'shared'); delete from public.ledger l using kept k where l.set = 'shared' and l.version = k.version`,
		heal: `insert into public.ledger select * from kept; drop table kept`},
	{check: "files", status: doctor.Fail, says: "changed", also: []string{"behind", "drift"},
		sql:  `create temp table kept as select * from public.ledger where tenant = @na and version = 1; update public.ledger set checksum = decode(repeat('00', 32), 'hex') where tenant = @na and version = 1`,
		heal: `update public.ledger l set checksum = k.checksum from kept k where l.tenant = k.tenant and l.version = k.version; drop table kept`},
	{check: "failed-migrations", status: doctor.Warn, says: "aurora",
		sql: `insert into public.operations (id, kind, state) values ('00000000-0000-7000-8000-000000000001', 'run.migrate', 'failed'); insert into public.runs (id, waves) values ('00000000-0000-7000-8000-000000000001', 1);
insert into public.tasks (run, ordinal, tenant, slug, group_name, state, to_version, finished_at) values ('00000000-0000-7000-8000-000000000001', 0, @na, 'aurora', 'main', 'failed', 99, now())`,
		heal: `delete from public.operations where kind = 'run.migrate'`},
	{check: "operations", status: doctor.Fail, says: "tenant.suspend of aurora was left",
		sql:  `insert into public.operations (id, kind, state, tenant, slug, heartbeat) values (gen_random_uuid(), 'tenant.suspend', 'running', @na, 'aurora', now() - interval '1 hour')`,
		heal: `delete from public.operations where kind = 'tenant.suspend'`},
	{check: "runs", status: doctor.Warn, says: "paused",
		sql:  `insert into public.operations (id, kind, state, created_at) values (gen_random_uuid(), 'run.migrate', 'paused', now() - interval '3 days')`,
		heal: `delete from public.operations where kind = 'run.migrate'`},
	{check: "registry", status: doctor.Fail, says: "aurora is active in the registry and suspended where it stands",
		sql: `update public.placements set state = 'suspended' where number = @na`, heal: `update public.placements set state = 'active' where number = @na`},
	{check: "registry", status: doctor.Fail, says: "ghost is being created by nobody",
		sql: `insert into public.tenants (slug, schema, state) values ('ghost', 'ghost', 'creating')`, heal: `delete from public.tenants where slug = 'ghost'`},
	{check: "schemas", status: doctor.Fail, says: "made again behind oneo's back",
		sql:  `create temp table kept as select namespace from public.placements where number = @na; update public.placements set namespace = 1 where number = @na`,
		heal: `update public.placements set namespace = (select namespace from kept) where number = @na; drop table kept`},
	{check: "orphan-schemas", status: doctor.Warn, says: "oneo_try_0000000000000001", sql: `create schema oneo_try_0000000000000001 authorization oneo_owner`, heal: `drop schema oneo_try_0000000000000001`},
	{check: "kept", status: doctor.Warn, says: "is not there",
		sql:  `insert into public.replaced (operation, tenant, schema, namespace, version, reader, ledger, progress, expires_at) values (gen_random_uuid(), @na, 'oneo_replaced_1_00000000', 1, 1, 0, '[]', '[]', now() + interval '1 day')`,
		heal: `delete from public.replaced`},
	{check: "roles", status: doctor.Fail, says: "cannot be served", sql: `revoke @roleA from @login`, fix: "grant oneo_"},
	{check: "roles", status: doctor.Fail, says: "is a member of", sql: `grant @roleA to @roleB`, fix: "revoke oneo_"},
	{check: "roles", status: doctor.Fail, says: "not its sub-pool's login", sql: `grant @roleA to oneo_app`, fix: "revoke oneo_"},
	{check: "roles", status: doctor.Warn, says: "planted_reader, which is no role of oneo's", sql: `create role planted_reader; grant @roleA to planted_reader`, heal: `drop role planted_reader`},
	{check: "roles", status: doctor.Fail, says: "is a member of planted_group", sql: `create role planted_group; grant planted_group to @roleA`, heal: `drop role planted_group`},
	{check: "orphan-roles", status: doctor.Warn, says: "something still refers to it", sql: `create role oneo_@id_999998; grant usage on schema ext to oneo_@id_999998`,
		heal: `revoke usage on schema ext from oneo_@id_999998; drop role oneo_@id_999998`},
	{check: "orphan-roles", status: doctor.Warn, says: "may nothing", sql: `create role oneo_@id_999999`, fix: "drop the role oneo_"},
	{check: "grants", status: doctor.Fail, says: "which is that tenant's alone", sql: `grant usage on schema @a to @roleB`, fix: "revoke usage on aurora", also: []string{"drift"}},
	{check: "grants", status: doctor.Fail, says: "cannot be served", sql: `revoke usage on schema @a from @roleA`, fix: "grant usage on aurora", also: []string{"drift"}},
	{check: "grants", status: doctor.Warn, says: "planted_reader, which is no role of oneo's", sql: `create role planted_reader; grant usage on schema @a to planted_reader`,
		heal: `revoke usage on schema @a from planted_reader; drop role planted_reader`, also: []string{"drift"}},
	{check: "grants", status: doctor.Fail, says: "public may select aurora.users", sql: `grant select on @a.users to public`, heal: `revoke select on @a.users from public`, also: []string{"drift"}},
	{check: "domains", status: doctor.Fail, says: "they have no domain: aurora",
		sql: `create temp table kept as select * from public.domains where tenant = @na; delete from public.domains where tenant = @na`, heal: `insert into public.domains select * from kept; drop table kept`},
	{check: "domains", status: doctor.Warn, says: "held back for tenant birch",
		sql: `insert into public.domain_holds (host, tenant, held_until) select host, @nb, now() + interval '1 day' from public.domains where tenant = @na`, heal: `delete from public.domain_holds`},
	{check: "ledger", status: doctor.Warn, says: "number 888888",
		sql:  `insert into public.ledger (set, tenant, version, name, checksum) select set, 888888, version, name, checksum from public.ledger where tenant = @na and version = 1`,
		heal: `delete from public.ledger where tenant = 888888`},
	{check: "functions", status: doctor.Fail, says: "whatever search path", sql: `create function ext.unsafe() returns int language sql security definer as 'select 1'`, heal: `drop function ext.unsafe`},
	{check: "functions", status: doctor.Fail, says: "another tenant: birch", sql: `create function ext.astray() returns int language sql set search_path to @b, pg_temp as 'select 1'`, heal: `drop function ext.astray`},
	{check: "drift", status: doctor.Fail, says: "aurora (has column users.planted", sql: `alter table @a.users add column planted integer`, heal: `alter table @a.users drop column planted`},
	{check: "logins", status: doctor.Fail, says: "bypassrls", sql: `alter role oneo_app bypassrls`, heal: `alter role oneo_app nobypassrls`},
	{check: "logins", status: doctor.Warn, says: "search path of oneo_app is not empty", sql: `alter role oneo_app in database @database reset search_path`, heal: `alter role oneo_app in database @database set search_path to ''`},
	{check: "logins", status: doctor.Fail, says: "oneo_app_1 serves requests, and is a member of pg_signal_backend", sql: `grant pg_signal_backend to oneo_app_1`, heal: `revoke pg_signal_backend from oneo_app_1`},
	{check: "logins", status: doctor.Fail, says: "planted_group", sql: `create role planted_group; grant oneo_owner to planted_group; grant planted_group to oneo_app`, heal: `drop role planted_group`},
	{check: "sight", status: doctor.Warn, says: "oneo_owner is no member of pg_read_all_settings", sql: `revoke pg_read_all_settings from oneo_owner`, heal: `grant pg_read_all_settings to oneo_owner`},
	{check: "closed", status: doctor.Fail, says: "everybody has create", sql: `grant create on schema public to public`, fix: "revoke create on the schema public from everybody"},
	{check: "closed", status: doctor.Fail, says: "ext holds tables", sql: `create table ext.planted (id integer)`, heal: `drop table ext.planted`},
	{check: "slots", status: doctor.Warn, says: "planted", sql: `select pg_create_physical_replication_slot('planted', true)`, heal: `select pg_drop_replication_slot('planted')`},
	{check: "indexes", status: doctor.Fail, says: "is invalid", fix: "reindex index concurrently", also: []string{"drift"},
		sql: breakIndex},
	{check: "indexes", status: doctor.Warn, says: "left half-made by a migration", also: []string{"drift"},
		sql:  breakIndex + `; insert into public.progress (tenant, version, checksum) values (@na, 3, decode(repeat('00', 32), 'hex'))`,
		heal: `update pg_index set indisvalid = true where not indisvalid; delete from public.progress`},
	{check: "room", status: doctor.Warn, says: "the group is full: 2 of 1", sql: `update public.groups set max_tenants = 1`, heal: `update public.groups set max_tenants = null`},
	{check: "proofs", status: doctor.Warn, says: "birch", sql: `update public.tenants set created_at = now() - interval '60 days' where number = @nb`, heal: `update public.tenants set created_at = now() where number = @nb`},

	{check: "connections", status: doctor.Fail, says: "may ask for", options: func(o *doctor.Options) { o.Config.Database.MaxConns = 500 }},
	{check: "schedules", status: doctor.Fail, says: "nightly is overdue", options: func(o *doctor.Options) {
		o.Schedules = func(context.Context) ([]doctor.Schedule, error) {
			return []doctor.Schedule{{Name: "nightly", State: "overdue"}}, nil
		}
	}},
	{check: "backups", status: doctor.Fail, says: "aurora (nightly)", options: func(o *doctor.Options) {
		o.Backups = func(context.Context) (doctor.Backups, error) {
			return doctor.Backups{Late: []string{"aurora (nightly)"}}, nil
		}
	}},
	{check: "secret", status: doctor.Warn, says: "guessed", options: func(o *doctor.Options) { o.Config.Server.Secret = strings.Repeat("ab", 20) }},
	{check: "database-urls", status: doctor.Fail, says: "rights of oneo_owner", options: func(o *doctor.Options) { o.Config.Database.URL = o.Config.Database.OwnerURL }},
	{check: "ops-addr", status: doctor.Warn, says: "every network", options: func(o *doctor.Options) { o.Config.Server.OpsAddr = "0.0.0.0:8001" }},
	{check: "trusted-proxies", status: doctor.Fail, says: "everybody may say", options: func(o *doctor.Options) { o.Config.Server.TrustedProxies = []string{"0.0.0.0/0"} }},
	{check: "public-url", status: doctor.Warn, says: "http", options: func(o *doctor.Options) { o.Config.Server.PublicURL = "http://crm.example.com" }},
	{check: "store-reach", status: doctor.Fail, says: "nothing can be written", also: []string{"store-clock"}, options: func(o *doctor.Options) {
		o.Store = func() (store.Store, error) { return store.NewDir("/dev/null/backups") }
	}},
	{check: "clock", status: doctor.Warn, says: "1m", also: []string{"redis-clock", "store-clock"}, options: nil},
	{check: "physical-archiving", status: doctor.Fail, says: "archives no WAL", options: withPhysical(func(p *doctor.Physical) { p.Archives = false })},
	{check: "physical-archiving", status: doctor.Fail, says: "archiving 000000010000000000000009 fails", options: withPhysical(func(p *doctor.Physical) { p.Failing = "000000010000000000000009" })},
	{check: "physical-archiving", status: doctor.Warn, says: "does not answer", options: withPhysical(func(p *doctor.Physical) { p.Answers = false })},
	{check: "physical-backups", status: doctor.Fail, says: "no moment of the cluster main can be had back", options: withPhysical(func(p *doctor.Physical) { p.Info.Backups = nil })},
	{check: "physical-backups", status: doctor.Fail, says: "no moment of the cluster main can be had back", options: withPhysical(func(p *doctor.Physical) { p.Info.WAL = nil })},
	{check: "physical-backups", status: doctor.Warn, says: "is 9 days old", options: withPhysical(func(p *doctor.Physical) { p.Info.Backups[0].Stop = time.Now().Add(-9*24*time.Hour - time.Minute) })},
	{check: "physical-backups", status: doctor.Fail, says: "WAL is missing behind the physical backup 20261126T034512Z", options: withPhysical(func(p *doctor.Physical) {
		later := p.Info.WAL[0]
		p.Info.WAL[0].Last, p.Info.WAL[0].Until = p.Info.WAL[0].Last[:23]+"4", time.Now().Add(-time.Hour)
		later.First = later.Last[:23] + "6"
		p.Info.WAL = append(p.Info.WAL, later)
	})},
	{check: "physical-backups", status: doctor.Warn, says: "torn is no good: its files are not there", options: withPhysical(func(p *doctor.Physical) {
		p.Info.Backups = append(p.Info.Backups, physical.Backup{Label: "torn", Bad: "its files are not there"})
	})},
	{check: "physical-proofs", status: doctor.Warn, says: "was proved last 31 days ago", options: withPhysical(func(p *doctor.Physical) { *p.Proved = time.Now().Add(-31*24*time.Hour - time.Minute) })},
	{check: "physical-proofs", status: doctor.Warn, says: "no recovery of main was ever proved", options: withPhysical(func(p *doctor.Physical) {
		*p.Proved = time.Time{}
		p.Info.Backups = append(p.Info.Backups, physical.Backup{Label: "20261101T034512Z", Stop: time.Now().Add(-7*24*time.Hour - time.Minute), Timeline: 1, StartLSN: physical.SegmentSize})
	})},
	{check: "physical-proofs", status: doctor.Warn, says: "nobody can say", options: withPhysical(func(p *doctor.Physical) { p.Proved = nil })},
}

// TestEachPlantedFaultIsFoundAndHealed plants one fault after another in a healthy fleet: its check finds it by name, nothing
// else is found, and once it is healed nothing is.
func TestEachPlantedFaultIsFoundAndHealed(t *testing.T) {
	f := newFleet(t)
	rep := f.run(t)
	for _, r := range rep.Results {
		require.False(t, r.Status != doctor.OK && !slices.Contains(ofTheMachine, r.Name), "%s: %s %s", r.Name, r.Status, r.Message)
	}
	require.Len(t, rep.Results, len(doctor.Checks()))
	// What is true of the server of the tests is found as well.
	require.Contains(t, result(t, rep, "durability").Message, "fsync is off")
	require.Contains(t, result(t, rep, "vacuum").Message, "autovacuum is off")

	for _, p := range plants {
		if p.check == "clock" {
			p.status, p.says, p.options = doctor.Fail, "behind", func(o *doctor.Options) { o.Now = func() time.Time { return time.Now().Add(time.Minute) } }
		}
		if !t.Run(p.check, func(t *testing.T) {
			if p.heal != "" {
				t.Cleanup(func() { f.sql(t, strings.ReplaceAll(p.heal, "@database", f.env.Database)) })
			}
			if p.options == nil {
				f.sql(t, strings.ReplaceAll(p.sql, "@database", f.env.Database))
				p.options = func(*doctor.Options) {}
			}
			narrow := func(o *doctor.Options) {
				switch {
				case p.sql == "": // what is said of a setting is said by the checks of its group
					o.Only = append([]string{groupOf(p.check)}, p.also...)
				case p.check != "drift" && !slices.Contains(p.also, "drift"):
					o.Quick = true // the structure is as it was
				}
			}
			rep := f.run(t, p.options, narrow)
			require.ElementsMatch(t, append([]string{p.check}, p.also...), found(rep))
			res := result(t, rep, p.check)
			require.Equal(t, p.status, res.Status)
			require.Contains(t, res.Message, p.says)
			require.Len(t, res.Findings, 1)
			if p.check != "ledger" {
				require.NotEmpty(t, res.Findings[0].Repair)
			}
			require.Equal(t, p.fix != "", res.Findings[0].Fixable())
			if p.fix == "" {
				return
			}
			only := func(o *doctor.Options) { o.Fix, o.Only = true, []string{p.check} }
			rep = f.run(t, only, func(o *doctor.Options) { o.DryRun = true })
			require.Equal(t, p.status, result(t, rep, p.check).Status, "a dry run repairs nothing")
			require.Len(t, result(t, rep, p.check).Fixed, 1)
			require.False(t, result(t, rep, p.check).Fixed[0].Done)
			rep = f.run(t, only)
			res = result(t, rep, p.check)
			require.Equal(t, doctor.OK, res.Status, res.Message)
			require.Len(t, res.Fixed, 1)
			require.True(t, res.Fixed[0].Done, res.Fixed[0].Error)
			require.Contains(t, res.Fixed[0].What, p.fix)
		}) && p.fix != "" {
			t.FailNow() // it is there still, and would be found by all that follow
		}
	}
	f.roundAgain(t)
}

// roundAgain plants what needs more than a statement, and looks a last time.
func (f *fleet) roundAgain(t *testing.T) {
	ctx := context.Background()
	t.Run("behind", func(t *testing.T) {
		_, err := f.env.Migrate.Down(ctx, f.a, 1, migrate.TenantOptions{})
		require.NoError(t, err)
		rep := f.run(t)
		require.Equal(t, []string{"behind"}, found(rep))
		require.Contains(t, result(t, rep, "behind").Message, "1 tenant(s) lack migrations: aurora")
		_, err = f.env.Migrate.Tenant(ctx, f.a, migrate.TenantOptions{})
		require.NoError(t, err)
	})
	t.Run("probes", func(t *testing.T) {
		// Two that were left, one that may be at work, and two that only look like one.
		for _, slug := range []string{"probe-0123abcd-a", "probe-0123abcd-b", "probe-89ab4567-a", "probe-4567cdef-a", "probe-0123abcd-c"} {
			_, err := f.env.Provision.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, slug), Name: "oneo doctor isolation: may be dropped", Actor: "test"})
			require.NoError(t, err)
		}
		f.sql(t, `update public.tenants set created_at = now() - interval '2 h' where slug like 'probe-%' and slug <> 'probe-89ab4567-a'; update public.tenants set name = 'a customer' where slug = 'probe-4567cdef-a'`)
		_, err := f.env.Provision.Drop(ctx, pgtest.Slug(t, "probe-0123abcd-b"), time.Hour, "test")
		require.NoError(t, err)
		rep := f.run(t)
		require.Equal(t, []string{"probes"}, found(rep))
		res := result(t, rep, "probes")
		require.Contains(t, res.Message, "2 throw-away tenant(s) were left by an `oneo doctor isolation` that was killed: probe-0123abcd-a, probe-0123abcd-b")
		require.Equal(t, "oneo doctor --only probes --fix", res.Findings[0].Repair)
		fix := func(o *doctor.Options) { o.Fix, o.Only = true, []string{"probes"} }
		states := func() (all string) {
			t.Helper()
			require.NoError(t, f.admin.QueryRow(ctx, `select string_agg(slug || ' ' || state, ', ' order by slug) from public.tenants where slug in ('aurora', 'birch') or slug like 'probe-%'`).Scan(&all))
			return all
		}
		before := states()
		res = result(t, f.run(t, fix, func(o *doctor.Options) { o.DryRun = true }), "probes")
		require.Equal(t, "destroy probe-0123abcd-a, probe-0123abcd-b", res.Fixed[0].What)
		require.Equal(t, before, states())
		res = result(t, f.run(t, fix), "probes")
		require.Equal(t, doctor.OK, res.Status, res.Message)
		require.True(t, res.Fixed[0].Done, res.Fixed[0].Error)
		require.Equal(t, "aurora active, birch active, probe-0123abcd-a purged, probe-0123abcd-b purged, probe-0123abcd-c active, probe-4567cdef-a active, probe-89ab4567-a active", states())
		for _, slug := range []string{"probe-0123abcd-c", "probe-4567cdef-a", "probe-89ab4567-a"} {
			_, err := f.env.Provision.Drop(ctx, pgtest.Slug(t, slug), time.Hour, "test")
			require.NoError(t, err)
			_, err = f.env.Provision.Purge(ctx, pgtest.Slug(t, slug), "test")
			require.NoError(t, err)
		}
	})
	t.Run("sessions", func(t *testing.T) {
		owner := pgtest.Admin(t, f.env.Group.OwnerURL)
		tx, err := owner.Begin(ctx)
		require.NoError(t, err)
		rep := f.run(t)
		require.Equal(t, []string{"sessions"}, found(rep))
		require.Contains(t, result(t, rep, "sessions").Message, "of oneo_owner has stood still in a transaction")
		// Whoever waits for it is told of as well.
		_, err = tx.Exec(ctx, "lock table public.domain_holds")
		require.NoError(t, err)
		waiter := pgtest.Admin(t, f.env.AdminURL)
		waited := make(chan error, 1)
		go func() {
			_, err := waiter.Exec(ctx, "do $$ begin lock table public.domain_holds; end $$")
			waited <- err
		}()
		require.Eventually(t, func() bool {
			var waits bool
			err := f.admin.QueryRow(ctx, `select exists (select from pg_locks where not granted and pid = $1)`, int32(waiter.PgConn().PID())).Scan(&waits) //nolint:gosec // a process's number
			return err == nil && waits
		}, pgtest.Patience, 5*time.Millisecond)
		require.Contains(t, result(t, f.run(t, func(o *doctor.Options) { o.Only = []string{"sessions"} }), "sessions").Message, "1 session(s) wait for the session")
		require.NoError(t, tx.Rollback(ctx))
		require.NoError(t, <-waited)
		_, err = owner.Exec(ctx, `select pg_advisory_lock($1, $2)`, postgres.OperationLock, f.a.Number)
		require.NoError(t, err)
		rep = f.run(t)
		require.Equal(t, []string{"sessions"}, found(rep))
		require.Contains(t, result(t, rep, "sessions").Message, "holds the operation lock of tenant number")
		require.NoError(t, owner.Close(ctx))
	})
	t.Run("scratch", func(t *testing.T) {
		left := filepath.Join(f.o.Scratch, "scratch-4711")
		require.NoError(t, os.MkdirAll(left, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(left, "scratch.json"), []byte(`{"why": "restore of aurora", "target": "then"}`), 0o600))
		rep := f.run(t)
		require.Equal(t, []string{"scratch"}, found(rep))
		require.Contains(t, result(t, rep, "scratch").Message, "restore of aurora")
		res := result(t, f.run(t, func(o *doctor.Options) { o.Only, o.Fix = []string{"scratch"}, true }), "scratch")
		require.Equal(t, doctor.OK, res.Status, res.Message)
		require.NoDirExists(t, left)
	})
	t.Run("redis-memory", func(t *testing.T) {
		require.NoError(t, f.redis.ConfigSet(ctx, "maxmemory", "100mb").Err())
		rep := f.run(t)
		require.Equal(t, []string{"redis-memory"}, found(rep))
		require.NoError(t, f.redis.ConfigSet(ctx, "maxmemory-policy", "allkeys-lru").Err())
	})
	t.Run("redis-persistence", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "redis")
		require.NoError(t, os.Mkdir(dir, 0o700))
		r, err := devstack.StartRedis(ctx, devstack.RedisOptions{Dir: dir, Conf: map[string]string{"save": "3600 1", "stop-writes-on-bgsave-error": "no"}})
		require.NoError(t, err)
		t.Cleanup(func() { _ = r.Kill() }) // in order it would save first
		c, err := cache.Open(cache.Options{URL: r.URL(), Timeout: 30 * time.Second})
		require.NoError(t, err)
		t.Cleanup(func() { require.NoError(t, c.Close()) })
		ro, err := redis.ParseURL(r.URL())
		require.NoError(t, err)
		raw := redis.NewClient(ro)
		t.Cleanup(func() { require.NoError(t, raw.Close()) })
		this := func(o *doctor.Options) { o.Cache, o.Config.Redis.URL, o.Only = c, r.URL(), []string{doctor.Redis} }
		rep := f.run(t, this)
		require.Empty(t, found(rep))
		require.Equal(t, "keeps snapshots", result(t, rep, "redis-persistence").Message)
		require.NoError(t, os.RemoveAll(dir))
		require.NoError(t, raw.BgSave(ctx).Err())
		require.Eventually(t, func() bool { s, err := c.Inspect(ctx); return err == nil && s.Persistence.SnapshotFailed }, pgtest.Patience, 10*time.Millisecond)
		res := result(t, f.run(t, this), "redis-persistence")
		require.Equal(t, doctor.Warn, res.Status, res.Message)
		require.NoError(t, raw.ConfigSet(ctx, "stop-writes-on-bgsave-error", "yes").Err())
		rep = f.run(t, this)
		require.Equal(t, []string{"redis-reach", "redis-persistence"}, found(rep))
		require.Contains(t, result(t, rep, "redis-reach").Message, "MISCONF")
		res = result(t, rep, "redis-persistence")
		require.Equal(t, doctor.Fail, res.Status, res.Message)
		require.Contains(t, res.Findings[0].Repair, "config/redis.conf")
	})
	t.Run("redis-keys", func(t *testing.T) {
		f.sql(t, `insert into public.tenants (slug, schema, state) values ('former', 'former', 'purged')`)
		key, err := cache.TenantKey(f.a, "host", "x")
		require.NoError(t, err)
		for _, k := range []string{key.String(), "public:host:aurora.localhost", "former:1:host:y"} {
			require.NoError(t, f.redis.Set(ctx, k, "v", time.Hour).Err())
		}
		only := func(o *doctor.Options) { o.Only, o.Fix = []string{"redis-keys"}, true }
		rep := f.run(t)
		require.Equal(t, []string{"redis-keys"}, found(rep))
		require.Contains(t, result(t, rep, "redis-keys").Message, `1 key(s) are of tenants that are gone: "former"`)
		res := result(t, f.run(t, only), "redis-keys")
		require.Equal(t, doctor.OK, res.Status, res.Message)
		left, err := f.redis.Keys(ctx, "*").Result()
		require.NoError(t, err)
		require.ElementsMatch(t, []string{key.String(), "public:host:aurora.localhost"}, left, "only the gone tenant's key was taken away")

		require.NoError(t, f.redis.Set(ctx, "session:4711", "v", time.Hour).Err())
		require.NoError(t, f.redis.Set(ctx, key.String(), "v", 0).Err())
		res = result(t, f.run(t, only), "redis-keys")
		require.Len(t, res.Findings, 2)
		require.Contains(t, res.Message, `they begin with "session"`)
		require.Contains(t, res.Message, `1 key(s) never end by themselves; they begin with "aurora"`)
		require.Empty(t, res.Fixed, "what others have written is left alone")
		require.NoError(t, f.redis.FlushAll(ctx).Err())
	})
	t.Run("isolation-mode", func(t *testing.T) {
		db, _, _ := f.env.Open(t, func(o *postgres.Options) { o.Isolation = postgres.BySchema })
		rep := f.run(t, func(o *doctor.Options) { o.DB, o.Only = db, []string{doctor.PostgreSQL} })
		require.Equal(t, []string{"isolation-mode"}, found(rep))
	})
	t.Run("pooler", func(t *testing.T) {
		addr := f.env.PgBouncer(t, 2)
		through := func(raw string) string {
			u, err := url.Parse(raw)
			require.NoError(t, err)
			u.Host = addr
			return u.String()
		}
		db, _, _ := f.env.Open(t, func(o *postgres.Options) {
			g := o.Groups[postgres.MainGroup]
			g.DirectURL = through(g.OwnerURL)
			o.Groups = map[string]postgres.Group{postgres.MainGroup: g}
		})
		rep := f.run(t, func(o *doctor.Options) {
			o.DB, o.Config.Database.URL = db, through(o.Config.Database.URL)
			o.Only = []string{doctor.PostgreSQL}
		})
		require.Equal(t, []string{"direct-url", "pooler"}, found(rep))
		require.Contains(t, result(t, rep, "direct-url").Message, "goes through a pooler")
		require.Equal(t, doctor.Warn, result(t, rep, "pooler").Status)
	})
	t.Run("config-file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "oneo.yaml")
		require.NoError(t, os.WriteFile(file, nil, 0o644))
		open := func(o *doctor.Options) { o.Origins = config.Origins{"server.secret": "file " + file} }
		require.Equal(t, []string{"config-file"}, found(f.run(t, open)))
		require.NoError(t, os.Chmod(file, 0o600))
		require.Empty(t, found(f.run(t, open)))
	})
	require.Empty(t, found(f.run(t)), "all is healed")
	f.env.Invariants(t)
}
