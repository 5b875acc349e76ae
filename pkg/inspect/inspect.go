// Package inspect reads from PostgreSQL's own views what each tenant's schema costs and who is at work there: statements, sizes, locks,
// sessions, indexes, dead rows and vacuum.
//
// It promises: each question is one statement for all the tenants of a database, and changes nothing; it takes no lock for which
// anybody waits, and waits for none that is known to be held; and no literal of a tenant's statement is in what it returns, unless the
// caller asks for the text of running statements.
//
// Tenants are those of public.placements of the database that is asked; of is the list of their numbers, nil for all.
package inspect

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// collect asks one question.
func collect[T any](ctx context.Context, q postgres.Querier, query string, args ...any) ([]T, error) {
	rows, err := q.Query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByName[T])
}

// held are the relations that somebody holds for himself, or waits to: asking for the size of one would wait for him.
const held = `held as materialized (
	select distinct l.relation from pg_catalog.pg_locks l where l.locktype = 'relation' and l.mode = 'AccessExclusiveLock'
		and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
), `

// Size is what one tenant takes on the disk.
type Size struct {
	Tenant  int32 `db:"tenant"`
	Bytes   int64 `db:"bytes"` // tables, indexes and what lies in TOAST
	Tables  int64 `db:"tables"`
	Heap    int64 `db:"heap"` // bytes of the tables, TOAST included
	Indexes int64 `db:"indexes"`
	Rows    int64 `db:"rows"`   // as estimated by the last analyze, or counted since the statistics were reset
	Locked  int64 `db:"locked"` // tables that somebody holds for himself; they are not counted
}

// Sizes measures tenants, the largest first.
func Sizes(ctx context.Context, q postgres.Querier, of []int32) ([]Size, error) {
	const query = `with ` + held + `own as materialized (
	select p.number, c.oid, case when c.reltuples < 0 then pg_catalog.pg_stat_get_live_tuples(c.oid) else c.reltuples end as rows, held.relation is not null as locked
	from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace and c.relkind in ('r', 'm')
	left join held on held.relation = c.oid
	where $1::int4[] is null or p.number = any ($1)
)
select number as tenant, coalesce(pg_catalog.sum(case when not locked then pg_catalog.pg_total_relation_size(oid) end), 0)::int8 as bytes, pg_catalog.count(*) as tables,
	coalesce(pg_catalog.sum(case when not locked then pg_catalog.pg_table_size(oid) end), 0)::int8 as heap,
	coalesce(pg_catalog.sum(case when not locked then pg_catalog.pg_indexes_size(oid) end), 0)::int8 as indexes,
	pg_catalog.sum(rows)::int8 as rows, pg_catalog.count(*) filter (where locked) as locked
from own group by number order by bytes desc, tenant`
	return collect[Size](ctx, q, query, of)
}

// Index is an index that tenants have under one name, over all of them.
type Index struct {
	Table   string `db:"tab"`
	Index   string `db:"ind"`
	Kind    string `db:"kind"` // primary, unique, exclusion or plain
	Tenants int64  `db:"tenants"`
	Bytes   int64  `db:"bytes"` // without those that somebody holds for himself
	Scans   int64  `db:"scans"` // since the statistics were reset
	// Unused counts the tenants in which it was never used, Invalid those in which it is broken and only costs, Doubled those
	// in which an earlier index of the same table has the same definition.
	Unused  int64 `db:"unused"`
	Invalid int64 `db:"invalid"`
	Doubled int64 `db:"doubled"`
}

// Indexes reads the tenants' indexes: broken ones first, then those that are used least for what they take.
func Indexes(ctx context.Context, q postgres.Querier, of []int32) ([]Index, error) {
	const query = `with ` + held + `own as materialized (
	select p.number, t.relname as tab, i.relname as ind, x.*, pg_catalog.pg_stat_get_numscans(i.oid) as scans,
		case when not exists (select from held where held.relation in (i.oid, t.oid)) then pg_catalog.pg_relation_size(i.oid) else 0 end as bytes
	from public.placements p join pg_catalog.pg_class t on t.relnamespace = p.namespace and t.relkind in ('r', 'm')
	join pg_catalog.pg_index x on x.indrelid = t.oid join pg_catalog.pg_class i on i.oid = x.indexrelid
	where $1::int4[] is null or p.number = any ($1)
), told as (
	select own.*, pg_catalog.row_number() over (partition by indrelid, indkey::text, indclass::text, indoption::text, indcollation::text, indisunique,
		pg_catalog.pg_get_expr(indexprs, indrelid), pg_catalog.pg_get_expr(indpred, indrelid), (select relam from pg_catalog.pg_class where oid = indexrelid) order by indexrelid) > 1 as doubled
	from own
)
select tab::text, ind::text, case when pg_catalog.bool_or(indisprimary) then 'primary' when pg_catalog.bool_or(indisexclusion) then 'exclusion' when pg_catalog.bool_or(indisunique) then 'unique' else 'plain' end as kind,
	pg_catalog.count(*) as tenants, pg_catalog.sum(bytes)::int8 as bytes, pg_catalog.sum(scans)::int8 as scans,
	pg_catalog.count(*) filter (where scans = 0) as unused, pg_catalog.count(*) filter (where not indisvalid or not indisready) as invalid,
	pg_catalog.count(*) filter (where doubled) as doubled
from told group by tab, ind
order by pg_catalog.bool_or(not indisvalid or not indisready) desc, pg_catalog.bool_or(doubled) desc, pg_catalog.sum(scans), pg_catalog.sum(bytes) desc, tab, ind`
	return collect[Index](ctx, q, query, of)
}

// Bloat is what of one tenant's tables is dead rows, by the statistics.
type Bloat struct {
	Tenant int32  `db:"tenant"`
	Dead   int64  `db:"dead"`
	Live   int64  `db:"live"`
	Bytes  int64  `db:"bytes"` // of the tables, that dead rows take if they are as wide as the others
	Worst  string `db:"worst"` // the table with most of them
}

// Bloats reads the dead rows of tenants, most bytes first. PostgreSQL counts them since the statistics were reset: it is an
// estimate, and what was bloated before that and vacuumed since is not in it.
func Bloats(ctx context.Context, q postgres.Querier, of []int32) ([]Bloat, error) {
	const query = `with own as materialized (
	select p.number, c.relname, c.relpages, pg_catalog.pg_stat_get_dead_tuples(c.oid) as dead, pg_catalog.pg_stat_get_live_tuples(c.oid) as live
	from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace and c.relkind in ('r', 'm')
	where $1::int4[] is null or p.number = any ($1)
)
select number as tenant, pg_catalog.sum(dead)::int8 as dead, pg_catalog.sum(live)::int8 as live,
	(pg_catalog.sum(case when dead > 0 then relpages::float8 * dead / (dead + live) else 0 end) * pg_catalog.current_setting('block_size')::int8)::int8 as bytes,
	coalesce((pg_catalog.array_agg(relname::text order by dead desc, relname) filter (where dead > 0))[1], '') as worst
from own group by number order by bytes desc, dead desc, tenant`
	return collect[Bloat](ctx, q, query, of)
}

// Vacuum is how one tenant's tables are looked after.
type Vacuum struct {
	Tenant   int32 `db:"tenant"`
	Tables   int64 `db:"tables"`
	Never    int64 `db:"never"`    // tables that were never analyzed, by anybody
	Modified int64 `db:"modified"` // rows changed since the last analyze
	Due      int64 `db:"due"`      // tables that autovacuum would take up now, by its general settings
	// Age is that of the oldest transaction id in a table, Percent that of autovacuum_freeze_max_age: from 100 on PostgreSQL
	// vacuums against wraparound, whether anybody likes it or not.
	Age     int64 `db:"age"`
	Percent int64 `db:"percent"`
}

// Vacuums reads how tenants' tables are looked after, the oldest first.
func Vacuums(ctx context.Context, q postgres.Querier, of []int32) ([]Vacuum, error) {
	const query = `with own as materialized (
	select p.number, c.reltuples, pg_catalog.age(c.relfrozenxid) as age, pg_catalog.pg_stat_get_dead_tuples(c.oid) as dead, pg_catalog.pg_stat_get_mod_since_analyze(c.oid) as modified,
		pg_catalog.pg_stat_get_last_analyze_time(c.oid) is null and pg_catalog.pg_stat_get_last_autoanalyze_time(c.oid) is null as never
	from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace and c.relkind in ('r', 'm')
	where $1::int4[] is null or p.number = any ($1)
)
select number as tenant, pg_catalog.count(*) as tables, pg_catalog.count(*) filter (where never) as never, pg_catalog.sum(modified)::int8 as modified,
	pg_catalog.count(*) filter (where dead > pg_catalog.current_setting('autovacuum_vacuum_threshold')::int8
		+ pg_catalog.current_setting('autovacuum_vacuum_scale_factor')::float8 * greatest(reltuples, 0)) as due,
	pg_catalog.max(age)::int8 as age, (100 * pg_catalog.max(age)::int8 / pg_catalog.current_setting('autovacuum_freeze_max_age')::int8) as percent
from own group by number order by age desc, due desc, tenant`
	return collect[Vacuum](ctx, q, query, of)
}

// Statement is what one statement of one tenant has cost since pg_stat_statements was reset.
type Statement struct {
	Tenant int32   `db:"tenant"` // 0: PostgreSQL cannot say whose; see Split
	Calls  int64   `db:"calls"`
	Total  float64 `db:"total"` // milliseconds, planning left out
	Mean   float64 `db:"mean"`
	Rows   int64   `db:"rows"`
	Reads  int64   `db:"reads"` // blocks that were not in shared buffers
	Text   string  `db:"text"`  // with $1 for each literal; empty: PostgreSQL hides it from the owner
}

// Split says how pg_stat_statements tells tenants apart, for people.
type Split string

// By role: each tenant works under a role of its own, which PostgreSQL counts by. Without it PostgreSQL before 18 counts each tenant's
// tables apart but does not say whose they are; 18 and later count tables of one name in all schemas together.
const (
	SplitByRole  Split = "by each tenant's role"
	SplitUnnamed Split = "tenants are counted apart, but PostgreSQL does not say whose a line is: tenancy.isolation is schema"
	SplitMerged  Split = "all tenants are counted together: tenancy.isolation is schema, and PostgreSQL 18 and later merge tables of one name"
)

// Statements reads what tenants' statements have cost, most time first, at most limit of them (0: all), and how they are told apart. byRole
// says that each tenant's work is done under its role.
// NotFound with code no_statements: the extension is not there.
func Statements(ctx context.Context, q postgres.Querier, of []int32, byRole bool, limit int) ([]Statement, Split, error) {
	const look = `select pg_catalog.quote_ident(n.nspname), pg_catalog.current_setting('server_version_num')::int4
from pg_catalog.pg_extension e join pg_catalog.pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_stat_statements'`
	var schema string
	var version int
	err := q.QueryRow(ctx, look).Scan(&schema, &version)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, "", fault.New(fault.NotFound, "pg_stat_statements is not there: PostgreSQL does not count statements").WithCode("no_statements").
			WithHint("add it to shared_preload_libraries, restart PostgreSQL, and run `create extension pg_stat_statements` in the database, as a superuser")
	}
	if err != nil {
		return nil, "", err
	}
	split := SplitByRole
	switch {
	case !byRole && version >= 180000:
		split = SplitMerged
	case !byRole:
		split = SplitUnnamed
	}
	query := `select coalesce(p.number, 0) as tenant, s.calls, s.total_exec_time as total, s.mean_exec_time as mean, s.rows, s.shared_blks_read as reads,
	case when s.queryid is null then '' else s.query end as text
from ` + schema + `.pg_stat_statements s join pg_catalog.pg_roles r on r.oid = s.userid left join public.placements p on $2 and p.role = r.rolname
where s.dbid = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
	and case when $1::int4[] is null then p.number is not null or not $2 and r.rolname <> current_user else p.number = any ($1) end
order by s.total_exec_time desc limit nullif($3::int8, 0)`
	all, err := collect[Statement](ctx, q, query, of, byRole, limit)
	if postgres.SQLState(err) == "55000" { // the library was not loaded when the server started
		return nil, "", fault.Wrap(err, fault.NotFound, "pg_stat_statements is made in the database, but PostgreSQL did not load it").WithCode("no_statements").
			WithHint("add it to shared_preload_libraries and restart PostgreSQL")
	}
	return all, split, err
}
