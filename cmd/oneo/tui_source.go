package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/tui"
)

// fleetSource is what the dashboard shows: the registry, PostgreSQL's own views, the store of backups, and what the servers tell.
type fleetSource struct {
	a      *app.App
	client *observe.Client

	mu    sync.Mutex
	names map[int32]string   // tenants' slugs by number, as they were last read
	ended map[string]tui.Run // runs that are over: what they come to is not counted again
}

var _ tui.Source = (*fleetSource)(nil)

func newFleetSource(a *app.App) *fleetSource {
	return &fleetSource{a: a, client: observe.NewClient([]byte(a.Config.Server.Secret)), names: map[int32]string{}, ended: map[string]tui.Run{}}
}

// ask runs one statement in a group's database, in a transaction of the owner that is short whatever happens.
func (s *fleetSource) ask(ctx context.Context, group, sql string, args []any, each func(pgx.CollectableRow) error) error {
	return fleetFault(s.a.DB.AsOwnerWithin(ctx, group, postgres.OwnerOptions{StatementTimeout: fleetBound}, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, sql, args...)
		if err != nil {
			return err
		}
		_, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) { return struct{}{}, each(row) })
		return err
	}))
}

func (s *fleetSource) Fleet(ctx context.Context) (tui.Fleet, error) { return countFleet(ctx, s.a) }

func (s *fleetSource) Tenants(ctx context.Context) ([]tui.Tenant, error) {
	const list = `select t.number, t.id::text, t.slug, t.name, t.schema, t.group_name, t.state, t.created_at, t.purge_after, coalesce(d.host, ''), coalesce(p.version, 0)
from public.tenants t left join public.domains d on d.tenant = t.number and d.is_primary left join public.placements p on p.number = t.number
where t.state <> 'purged'`
	var all []tui.Tenant
	names, groups := map[int32]string{}, map[string]bool{}
	err := s.ask(ctx, postgres.MainGroup, list, nil, func(row pgx.CollectableRow) error {
		var t tui.Tenant
		var purge *time.Time
		if err := row.Scan(&t.Number, &t.ID, &t.Slug, &t.Name, &t.Schema, &t.Group, &t.State, &t.Created, &purge, &t.Host, &t.Version); err != nil {
			return err
		}
		if purge != nil {
			t.Purge = *purge
		}
		names[t.Number] = t.Slug
		groups[t.Group] = true
		all = append(all, t)
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.names = names
	s.mu.Unlock()
	versions := map[int32]int{}
	for _, group := range s.a.DB.Groups() {
		if group == postgres.MainGroup || !groups[group] {
			continue
		}
		// One that does not answer leaves its tenants' versions out.
		_ = s.ask(ctx, group, `select number, version from public.placements`, nil, func(row pgx.CollectableRow) error {
			var number int32
			var version int
			err := row.Scan(&number, &version)
			versions[number] = version
			return err
		})
	}
	for i, t := range all {
		if t.Group != postgres.MainGroup {
			all[i].Version = versions[t.Number]
		}
	}
	return all, nil
}

// namesOf are the slugs of tenants, most of which are known.
func (s *fleetSource) namesOf(ctx context.Context, numbers []int32) (map[int32]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var missing []int32
	for _, n := range numbers {
		if _, known := s.names[n]; !known && n > 0 {
			missing = append(missing, n)
		}
	}
	if len(missing) > 0 {
		err := s.ask(ctx, postgres.MainGroup, `select number, slug from public.tenants where number = any($1)`, []any{missing}, func(row pgx.CollectableRow) error {
			var n int32
			var slug string
			err := row.Scan(&n, &slug)
			s.names[n] = slug
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	names := make(map[int32]string, len(numbers))
	for _, n := range numbers {
		names[n] = s.names[n]
	}
	return names, nil
}

func (s *fleetSource) Runs(ctx context.Context) ([]tui.Run, error) {
	// The tasks of runs that are over are counted once.
	const list = `select o.id::text, o.kind, o.state, o.actor, o.created_at, o.finished_at, o.error, r.wave + 1, r.waves,
	o.state = 'running' and o.heartbeat > now() - $1::interval, t.queued, t.running, t.ok, t.skipped, t.failed
from (select * from public.operations where left(kind, 4) = 'run.' order by id desc limit 100) o join public.runs r on r.id = o.id cross join lateral (
	select count(*) filter (where t.state = 'queued') queued, count(*) filter (where t.state = 'running') running, count(*) filter (where t.state = 'ok') ok,
		count(*) filter (where t.state = 'skipped') skipped, count(*) filter (where t.state = 'failed') failed
	from public.tasks t where t.run = o.id and not (o.finished_at is not null and o.id::text = any($2))) t`
	s.mu.Lock()
	defer s.mu.Unlock()
	known := make([]string, 0, len(s.ended))
	for id := range s.ended {
		known = append(known, id)
	}
	var all []tui.Run
	err := s.ask(ctx, postgres.MainGroup, list, []any{s.a.Config.Migrate.StaleAfter, known}, func(row pgx.CollectableRow) error {
		var r tui.Run
		var finished *time.Time
		var failure []byte
		if err := row.Scan(&r.ID, &r.Kind, &r.State, &r.Actor, &r.Created, &finished, &failure, &r.Wave, &r.Waves, &r.Alive,
			&r.Queued, &r.Running, &r.OK, &r.Skipped, &r.Failed); err != nil {
			return err
		}
		r.Kind = strings.TrimPrefix(r.Kind, rollout.Prefix)
		r.Error, _ = recorded(failure)
		if finished == nil {
			delete(s.ended, r.ID) // it may have been opened again
		} else {
			r.Finished = *finished
			if was, seen := s.ended[r.ID]; seen && slices.Contains(known, r.ID) {
				r.Queued, r.Running, r.OK, r.Skipped, r.Failed = was.Queued, was.Running, was.OK, was.Skipped, was.Failed
			}
			s.ended[r.ID] = r
		}
		all = append(all, r)
		return nil
	})
	return all, err
}

// recorded is what an error that was stored says.
func recorded(failure []byte) (message, hint string) {
	var e struct{ Message, Hint string }
	if len(failure) == 0 || json.Unmarshal(failure, &e) != nil {
		return "", ""
	}
	return e.Message, e.Hint
}

func (s *fleetSource) Tasks(ctx context.Context, run string) ([]tui.Task, error) {
	id, err := uuid.Parse(run)
	if err != nil {
		r, err := s.a.Rollout.Find(ctx, run)
		if err != nil {
			return nil, err
		}
		id = r.ID
	}
	const list = `select slug, state, coalesce(from_version, 0), coalesce(to_version, 0), attempts, coalesce(duration_ms, 0), error from public.tasks where run = $1`
	var all []tui.Task
	err = s.ask(ctx, postgres.MainGroup, list, []any{id}, func(row pgx.CollectableRow) error {
		var t tui.Task
		var ms int64
		var failure []byte
		err := row.Scan(&t.Tenant, &t.State, &t.From, &t.To, &t.Attempts, &ms, &failure)
		t.Duration = time.Duration(ms) * time.Millisecond
		t.Error, t.Hint = recorded(failure)
		all = append(all, t)
		return err
	})
	return all, err
}

func (s *fleetSource) Backups(ctx context.Context) ([]tui.Backup, error) {
	b, err := s.a.Backups()
	if err != nil {
		return nil, err
	}
	c, err := b.List(ctx, "")
	if err != nil {
		return nil, err
	}
	all := make([]tui.Backup, 0, len(c.Backups))
	for _, m := range c.Backups {
		all = append(all, tui.Backup{ID: m.ID, Tenant: m.Slug, Made: m.Made, Version: m.Version, Rows: m.Rows, Bytes: m.Bytes,
			Encrypted: len(m.Keys) > 0, Kept: m.Kept, Reason: m.Reason})
	}
	return all, nil
}

func (s *fleetSource) Ages(ctx context.Context) (ages tui.Ages, err error) {
	if s.a.Config.Backup.URL == "" {
		return ages, nil
	}
	ages.Set = true
	b, err := s.a.Backups()
	if err != nil {
		return ages, err
	}
	newest, err := newestBackups(ctx, b)
	if err != nil {
		return ages, err
	}
	err = s.ask(ctx, postgres.MainGroup, `select id::text, slug from public.tenants where state in ('active', 'suspended')`, nil, func(row pgx.CollectableRow) error {
		var id, slug string
		if err := row.Scan(&id, &slug); err != nil {
			return err
		}
		ages.Tenants++
		made, has := newest[id]
		switch {
		case !has:
			ages.Without++
			return nil
		case ages.Oldest.IsZero() || made.Before(ages.Oldest):
			ages.Oldest, ages.Whose = made, slug
		}
		if made.After(ages.Newest) {
			ages.Newest = made
		}
		return nil
	})
	return ages, err
}

// newestBackups is when each tenant was backed up last, by its id for the outside, in a full backup too.
func newestBackups(ctx context.Context, b *backup.Backups) (map[string]time.Time, error) {
	c, err := b.List(ctx, "")
	if err != nil {
		return nil, err
	}
	full, err := b.ListFull(ctx)
	if err != nil {
		return nil, err
	}
	newest := map[string]time.Time{}
	for id, m := range c.Newest() {
		newest[id] = m.Made
	}
	for _, f := range full.Backups {
		for _, g := range f.Groups {
			for _, t := range g.Tenants {
				if g.At.After(newest[t.Tenant]) {
					newest[t.Tenant] = g.At
				}
			}
		}
	}
	return newest, nil
}

// holders finds which sessions of a database work for which tenant: they hold its gate or its operation lock.
const holders = `holders as materialized (select l.pid, min(l.objid::bigint)::int4 number from pg_catalog.pg_locks l
	where l.locktype = 'advisory' and l.objsubid = 2 and l.classid = any(array[$1, $2]::int4[]::oid[])
		and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) group by l.pid)`

func (s *fleetSource) Sessions(ctx context.Context) ([]tui.Session, error) {
	const list = `with ` + holders + `
select a.pid, coalesce(h.number, 0), coalesce(a.usename, ''), coalesce(a.state, ''), coalesce(a.wait_event_type || ' ' || a.wait_event, ''),
	a.xact_start, a.query_start, case when a.state is null then '' else left(a.query, 4000) end, coalesce(host(a.client_addr), '')
from pg_catalog.pg_stat_activity a left join holders h on h.pid = a.pid
where a.datname = pg_catalog.current_database() and a.pid <> pg_catalog.pg_backend_pid()
	and (h.number is not null or a.state <> 'idle' and a.usename <> current_user) limit 1000`
	var all []tui.Session
	err := s.inGroups(func(group string) ([]int32, error) {
		var numbers []int32
		err := s.ask(ctx, group, list, []any{postgres.GateLock, postgres.OperationLock}, func(row pgx.CollectableRow) error {
			v := tui.Session{Group: group}
			var number int32
			var begun, since *time.Time
			if err := row.Scan(&v.PID, &number, &v.Login, &v.State, &v.Wait, &begun, &since, &v.Query, &v.From); err != nil {
				return err
			}
			v.Begun, v.Since = orZero(begun), orZero(since)
			all, numbers = append(all, v), append(numbers, number)
			return nil
		})
		return numbers, err
	}, func(i int, name string) { all[i].Tenant = name }, ctx)
	return all, err
}

// inGroups reads each group's database and names the tenants that were found.
func (s *fleetSource) inGroups(read func(group string) ([]int32, error), name func(i int, name string), ctx context.Context) error {
	var numbers []int32
	for _, group := range s.a.DB.Groups() {
		ns, err := read(group)
		if err != nil && group == postgres.MainGroup {
			return err
		}
		numbers = append(numbers, ns...)
	}
	names, err := s.namesOf(ctx, numbers)
	if err != nil {
		return err
	}
	for i, n := range numbers {
		name(i, names[n])
	}
	return nil
}

func orZero(t *time.Time) time.Time {
	if t == nil {
		return time.Time{}
	}
	return *t
}

func (s *fleetSource) Locks(ctx context.Context) ([]tui.Lock, error) {
	// Those who wait, and what those hold for whom they wait that is on the same thing.
	const list = `with ` + holders + `, l as materialized (select * from pg_catalog.pg_locks),
waits as materialized (select w.pid, pg_catalog.pg_blocking_pids(w.pid) behind from (select distinct pid from l where not granted) w)
select l.pid, coalesce(h.number, 0), l.locktype, l.mode, l.granted, l.waitstart, coalesce(case when l.granted then null else w.behind end, '{}'),
	case when l.locktype = 'advisory' then l.classid || ' ' || l.objid when l.relation is not null then coalesce(n.nspname || '.' || c.relname, l.relation::text)
		when l.transactionid is not null then l.transactionid::text when l.virtualxid is not null then l.virtualxid else '' end
from l left join holders h on h.pid = l.pid left join waits w on w.pid = l.pid
	left join pg_catalog.pg_class c on c.oid = l.relation and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
	left join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where not l.granted or exists (select from l m join waits v on v.pid = m.pid where not m.granted and l.pid = any(v.behind)
	and (m.locktype, m.database, m.relation, m.page, m.tuple, m.virtualxid, m.transactionid, m.classid, m.objid, m.objsubid)
		is not distinct from (l.locktype, l.database, l.relation, l.page, l.tuple, l.virtualxid, l.transactionid, l.classid, l.objid, l.objsubid))
limit 500`
	var all []tui.Lock
	err := s.inGroups(func(group string) ([]int32, error) {
		var numbers []int32
		err := s.ask(ctx, group, list, []any{postgres.GateLock, postgres.OperationLock}, func(row pgx.CollectableRow) error {
			v := tui.Lock{Group: group}
			var number int32
			var since *time.Time
			if err := row.Scan(&v.PID, &number, &v.Kind, &v.Mode, &v.Granted, &since, &v.Behind, &v.On); err != nil {
				return err
			}
			v.Since = orZero(since)
			switch v.On {
			case fmt.Sprintf("%d %d", postgres.GateLock, number):
				v.On = "the tenant's gate"
			case fmt.Sprintf("%d %d", postgres.OperationLock, number):
				v.On = "the tenant's operation lock"
			}
			all, numbers = append(all, v), append(numbers, number)
			return nil
		})
		return numbers, err
	}, func(i int, name string) { all[i].Tenant = name }, ctx)
	return all, err
}

func (s *fleetSource) Operations(ctx context.Context) ([]tui.Operation, error) {
	// Never their request: that of a creation holds a password's hash.
	const list = `select id::text, kind, slug, state, actor, attempts, created_at, started_at, finished_at, error from public.operations order by id desc limit 500`
	var all []tui.Operation
	err := s.ask(ctx, postgres.MainGroup, list, nil, func(row pgx.CollectableRow) error {
		var o tui.Operation
		var started, finished *time.Time
		var failure []byte
		err := row.Scan(&o.ID, &o.Kind, &o.Tenant, &o.State, &o.Actor, &o.Attempts, &o.Created, &started, &finished, &failure)
		o.Started, o.Finished = orZero(started), orZero(finished)
		o.Error, o.Hint = recorded(failure)
		all = append(all, o)
		return err
	})
	return all, err
}

func (s *fleetSource) Audit(ctx context.Context) ([]tui.AuditLine, error) {
	const list = `select id, at, actor, action, slug, request_id, details from public.audit order by id desc limit 1000`
	var all []tui.AuditLine
	err := s.ask(ctx, postgres.MainGroup, list, nil, func(row pgx.CollectableRow) error {
		var l tui.AuditLine
		err := row.Scan(&l.ID, &l.At, &l.Actor, &l.Action, &l.Tenant, &l.Request, &l.Details)
		all = append(all, l)
		return err
	})
	return all, err
}

func (s *fleetSource) Domains(ctx context.Context) ([]tui.Domain, error) {
	const list = `select d.host, t.slug, d.is_primary, t.state, d.created_at from public.domains d join public.tenants t on t.number = d.tenant where t.state <> 'purged'`
	var all []tui.Domain
	err := s.ask(ctx, postgres.MainGroup, list, nil, func(row pgx.CollectableRow) error {
		var d tui.Domain
		err := row.Scan(&d.Host, &d.Tenant, &d.Primary, &d.State, &d.Created)
		all = append(all, d)
		return err
	})
	return all, err
}

func (s *fleetSource) Users(ctx context.Context, name string) (all []tui.User, err error) {
	const most = 1000
	t, err := tenantNamed(ctx, s.a, name)
	if err != nil {
		return nil, err
	}
	err = s.a.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error {
		if err := s.a.InRange(ctx, tx, t); err != nil {
			return err
		}
		us, err := auth.Tenants().Users(ctx, tx, most, nil)
		for _, u := range us {
			all = append(all, tui.User{ID: u.ID.String(), Email: u.Email, Name: u.Name, Role: u.Role, Disabled: orZero(u.DisabledAt), Created: u.CreatedAt})
		}
		return err
	})
	return all, err
}

// instances are servers as the client of their listeners wants them, when there is a token to show them.
func (s *fleetSource) instances(servers []tui.Server) ([]registry.Instance, error) {
	if s.a.Config.Server.Secret == "" {
		return nil, fault.New(fault.Invalid, "server.secret is not set: servers do not tell")
	}
	all := make([]registry.Instance, len(servers))
	for i, v := range servers {
		id, err := uuid.Parse(v.ID)
		if err != nil {
			return nil, fault.Wrap(err, fault.Internal, "the server on %s has an id that is none", v.Host)
		}
		all[i] = registry.Instance{ID: id, Host: v.Host, PID: v.PID, Version: v.Version, OpsAddr: v.OpsAddr}
	}
	return all, nil
}

func (s *fleetSource) Readings(ctx context.Context, servers []tui.Server) []tui.Reading {
	out := make([]tui.Reading, len(servers))
	instances, err := s.instances(servers)
	if err != nil {
		for i, server := range servers {
			out[i] = tui.Reading{Server: server, Err: fault.Of(err).Message}
		}
		return out
	}
	for i, r := range s.client.Stats(ctx, instances) {
		if r.Err != nil {
			out[i] = tui.Reading{Server: servers[i], Err: fault.Of(r.Err).Message}
			continue
		}
		out[i] = readingOf(servers[i], r.Stats)
	}
	return out
}

// readingOf is what a server has counted, in the dashboard's words.
func readingOf(server tui.Server, st observe.Stats) tui.Reading {
	load := func(l observe.Load) tui.Load {
		return tui.Load{Requests: l.Requests, Errors: l.Errors, Refused: l.Refused, InFlight: l.InFlight, DatabaseSeconds: l.DatabaseSeconds, P50: l.P50, P95: l.P95, P99: l.P99}
	}
	r := tui.Reading{
		Server: server, At: st.At, All: load(st.All), Memory: st.Runtime.MemoryBytes,
		Redis: tui.Redis{Set: st.Cache.Redis, Up: st.Cache.Up, Hits: st.Cache.Hits, Misses: st.Cache.Misses, Memory: st.Cache.MemoryBytes},
	}
	for _, t := range st.Tenants {
		r.Tenants = append(r.Tenants, tui.TenantLoad{Number: t.Number, Tenant: t.Tenant, Load: load(t.Load)})
	}
	for _, p := range st.Pools {
		r.Pools = append(r.Pools, tui.Pool{Group: p.Group, Max: p.Max, InUse: p.InUse, Waits: p.Waits, Retired: p.Retired})
	}
	return r
}

// mostLines is how many log lines are shown.
const mostLines = 2000

func (s *fleetSource) Logs(ctx context.Context, servers []tui.Server, name string) ([]tui.LogLine, error) {
	var query observe.LogQuery
	if name != "" {
		if _, err := tenant.ParseSlug(name); err != nil {
			return nil, err
		}
		query.Tenants = []string{name}
	}
	instances, err := s.instances(servers)
	if err != nil {
		return nil, err
	}
	found, missing := s.client.AllLogs(ctx, instances, query)
	if len(missing) > 0 && len(missing) == len(servers) {
		return nil, missing[0].Err
	}
	slices.Reverse(found) // the newest first
	all := make([]tui.LogLine, 0, min(len(found), mostLines))
	for _, l := range found[:min(len(found), mostLines)] {
		all = append(all, logLine(l))
	}
	return all, nil
}

// firstFields are those that are looked for in a row that has no room for all.
var firstFields = []string{"error", "status", "code", "method", "route", "took"}

// logLine is a line of a server's log, in the dashboard's words.
func logLine(l observe.LogLine) tui.LogLine {
	out := tui.LogLine{At: l.At, Server: called(l.Instance), Level: l.Level, Message: l.Message}
	if l.Missed > 0 {
		out.Message = fmt.Sprintf("%d lines are gone", l.Missed)
	}
	var parts []string
	for _, k := range slices.SortedFunc(maps.Keys(l.Attrs), func(a, b string) int {
		rank := func(k string) int {
			return (slices.Index(firstFields, k) + len(firstFields) + 1) % (len(firstFields) + 1)
		}
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a, b))
	}) {
		switch v := fmt.Sprint(l.Attrs[k]); {
		case k == "tenant":
			out.Tenant = v
		case k == "request_id":
			out.Request = v
		case v != "":
			parts = append(parts, k+"="+v)
		}
	}
	out.Fields = strings.Join(parts, " ")
	return out
}
