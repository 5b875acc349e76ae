package inspect

import (
	"context"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Lock is one that a session holds or waits for, on what is a tenant's.
type Lock struct {
	Tenant      int32  `db:"tenant"`
	PID         int32  `db:"pid"`
	User        string `db:"usr"`
	Application string `db:"application"`
	On          string `db:"at"` // a table or index, "gate" or "operation": oneo's own two locks of a tenant
	Mode        string `db:"mode"`
	Granted     bool   `db:"granted"`
	Waiting     int64  `db:"waiting"`     // milliseconds; 0: it is granted
	Transaction *int64 `db:"transaction"` // milliseconds since it began; nil: none, or PostgreSQL hides it from the owner
	State       string `db:"state"`       // of the session; empty: PostgreSQL hides it from the owner
}

// Locks reads locks on what is a tenant's, those that are waited for first. Unless everything is asked for, what reading and writing takes is left out
// as long as it is granted.
func Locks(ctx context.Context, q postgres.Querier, of []int32, everything bool) ([]Lock, error) {
	const query = `with here as materialized (
	select l.* from pg_catalog.pg_locks l where l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
		and l.pid <> pg_catalog.pg_backend_pid()
), told as (
	select p.number, h.pid, c.relname::text as at, h.mode, h.granted, h.waitstart
	from here h join pg_catalog.pg_class c on c.oid = h.relation join public.placements p on p.namespace = c.relnamespace where h.locktype in ('relation', 'tuple', 'page', 'extend')
	union all
	select h.objid::int8::int4, h.pid, case h.classid::int8 when $2 then 'gate' else 'operation' end, h.mode, h.granted, h.waitstart
	from here h join public.placements p on p.number = h.objid::int8 where h.locktype = 'advisory' and h.objsubid = 2 and h.classid::int8 in ($2, $3)
)
select t.number as tenant, t.pid, coalesce(a.usename, '')::text as usr, coalesce(a.application_name, '') as application, t.at, t.mode, t.granted,
	case when t.granted then 0 else coalesce(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - t.waitstart) * 1000, 0) end::int8 as waiting,
	(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - a.xact_start) * 1000)::int8 as transaction, coalesce(a.state, '') as state
from told t left join pg_catalog.pg_stat_activity a on a.pid = t.pid
where ($1::int4[] is null or t.number = any ($1))
	and ($4 or not t.granted or t.at = 'operation' or t.mode not in ('AccessShareLock', 'RowShareLock', 'RowExclusiveLock', 'ShareLock') or t.mode = 'ShareLock' and t.at <> 'gate')
order by t.granted, waiting desc, transaction desc nulls last, t.number, t.pid, t.at, t.mode`
	return collect[Lock](ctx, q, query, of, int64(postgres.GateLock), int64(postgres.OperationLock), everything)
}

// Wait is one session that waits for another.
type Wait struct {
	Tenant      int32  `db:"tenant"` // whose it waits for; 0: of no tenant
	PID         int32  `db:"pid"`
	User        string `db:"usr"`
	On          string `db:"at"`
	Mode        string `db:"mode"`
	Waiting     int64  `db:"waiting"` // milliseconds
	By          int32  `db:"by"`      // the session that stands in the way; 0: a prepared transaction
	ByUser      string `db:"by_user"`
	ByState     string `db:"by_state"` // empty: PostgreSQL hides it from the owner
	Transaction *int64 `db:"transaction"`
	Text        string `db:"text"` // what the one in the way runs or ran last, when it was asked for
}

// Waits reads who waits for whom, the longest first; with text what the ones in the way run, literals and all.
func Waits(ctx context.Context, q postgres.Querier, of []int32, text bool) ([]Wait, error) {
	const query = `with w as materialized (
	select l.*, pg_catalog.pg_blocking_pids(l.pid) as blockers from pg_catalog.pg_locks l where not l.granted
), told as (
	select w.*, case when w.locktype = 'advisory' and w.objsubid = 2 and w.classid::int8 in ($2, $3) then (select p.number from public.placements p where p.number = w.objid::int8)
		else (select p.number from pg_catalog.pg_class c join public.placements p on p.namespace = c.relnamespace where c.oid = w.relation) end as number
	from w where w.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database()) or w.database is null
)
select coalesce(t.number, 0) as tenant, t.pid, coalesce(a.usename, '')::text as usr,
	coalesce(case when t.locktype = 'advisory' and t.number is not null then case t.classid::int8 when $2 then 'gate' else 'operation' end end,
		(select c.relname::text from pg_catalog.pg_class c where c.oid = t.relation), t.locktype) as at, t.mode,
	coalesce(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - t.waitstart) * 1000, 0)::int8 as waiting,
	b.pid as by, coalesce(ba.usename, '')::text as by_user, coalesce(ba.state, '') as by_state,
	(pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - ba.xact_start) * 1000)::int8 as transaction, case when $4 then coalesce(ba.query, '') else '' end as text
from told t cross join pg_catalog.unnest(t.blockers) b (pid)
left join pg_catalog.pg_stat_activity a on a.pid = t.pid left join pg_catalog.pg_stat_activity ba on ba.pid = b.pid
where a.datname is not distinct from pg_catalog.current_database() and ($1::int4[] is null or t.number = any ($1))
order by waiting desc, t.pid, b.pid`
	return collect[Wait](ctx, q, query, of, int64(postgres.GateLock), int64(postgres.OperationLock), text)
}

// Sessions are those of one login, by program.
type Sessions struct {
	User        string `db:"usr"`
	Application string `db:"application"`
	All         int64  `db:"all_of_them"`
	Active      int64  `db:"active"`
	Idle        int64  `db:"idle"`
	InIdle      int64  `db:"in_idle"` // idle in a transaction
	Waiting     int64  `db:"waiting"` // for a lock
	Hidden      int64  `db:"hidden"`  // PostgreSQL hides from the owner what they do
	Oldest      *int64 `db:"oldest"`  // milliseconds since the oldest transaction began
	Limit       int64  `db:"most"`    // max_connections of the server
}

// Pool reads who is connected to the database, most sessions first.
func Pool(ctx context.Context, q postgres.Querier) ([]Sessions, error) {
	const query = `select a.usename::text as usr, a.application_name as application, pg_catalog.count(*) as all_of_them,
	pg_catalog.count(*) filter (where a.state = 'active') as active, pg_catalog.count(*) filter (where a.state = 'idle') as idle,
	pg_catalog.count(*) filter (where a.state like 'idle in transaction%') as in_idle, pg_catalog.count(*) filter (where exists (select from pg_catalog.pg_locks l where l.pid = a.pid and not l.granted)) as waiting,
	pg_catalog.count(*) filter (where a.state is null) as hidden, pg_catalog.max((pg_catalog.date_part('epoch', pg_catalog.clock_timestamp() - a.xact_start) * 1000)::int8) as oldest,
	pg_catalog.current_setting('max_connections')::int8 as most
from pg_catalog.pg_stat_activity a where a.datname = pg_catalog.current_database() and a.usename is not null
group by a.usename, a.application_name order by all_of_them desc, usr, application`
	return collect[Sessions](ctx, q, query)
}
