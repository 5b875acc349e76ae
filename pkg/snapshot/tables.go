package snapshot

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// inSchema are the oids of what a schema holds. A schema's objects depend on it, and that has an index: the cost does
// not grow with the number of tenants, as a look through pg_class would.
const inSchema = `select d.objid from pg_catalog.pg_depend d where d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
	and d.refobjid = $1::oid and d.classid = `

// objectsQuery names every object of a schema, in the words in which people are told of them.
const objectsQuery = `with rel as materialized (
	select c.oid, c.relkind, c.relname from pg_catalog.pg_class c
	where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f')
)
select case relkind when 'v' then 'view ' when 'm' then 'materialized view ' when 'S' then 'sequence ' when 'f' then 'foreign table ' else 'table ' end || relname from rel
union all
select 'column ' || relname || '.' || a.attname from rel join pg_catalog.pg_attribute a on a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped
where relkind in ('r', 'p', 'f')
union all
select 'constraint ' || k.conname || ' of ' || relname from rel join pg_catalog.pg_constraint k on k.conrelid = rel.oid and k.contype in ('c', 'f', 'p', 'u', 'x')
union all
select 'index ' || i.relname from rel join pg_catalog.pg_index x on x.indrelid = rel.oid join pg_catalog.pg_class i on i.oid = x.indexrelid
where not exists (select from pg_catalog.pg_constraint k where k.conindid = i.oid and k.conrelid = rel.oid)
union all
select 'trigger ' || t.tgname || ' of ' || relname from rel join pg_catalog.pg_trigger t on t.tgrelid = rel.oid and not t.tgisinternal
union all
select 'rule ' || w.rulename || ' of ' || relname from rel join pg_catalog.pg_rewrite w on w.ev_class = rel.oid and w.rulename <> '_RETURN'
union all
select 'policy ' || p.polname || ' of ' || relname from rel join pg_catalog.pg_policy p on p.polrelid = rel.oid
union all
select 'function ' || f.proname || '(' || pg_catalog.pg_get_function_identity_arguments(f.oid) || ')' from pg_catalog.pg_proc f
where f.oid in (` + inSchema + `'pg_catalog.pg_proc'::pg_catalog.regclass)
union all
select 'type ' || y.typname from pg_catalog.pg_type y
where y.oid in (` + inSchema + `'pg_catalog.pg_type'::pg_catalog.regclass) and y.typtype in ('e', 'd', 'r')
union all
-- What others than the owner and the tenant may do. The right to run a function is everybody's from the beginning.
select pg_catalog.concat_ws(' ', 'grant to', case a.grantee when 0 then 'public' else pg_catalog.pg_get_userbyid(a.grantee)::text end, 'on', g.what)
from (
	select nspowner as owner, nspacl as acl, 'the schema' as what from pg_catalog.pg_namespace where oid = $1::oid
	union all
	select c.relowner, c.relacl, case c.relkind when 'v' then 'view ' when 'm' then 'materialized view ' when 'S' then 'sequence ' when 'f' then 'foreign table ' else 'table ' end || c.relname
	from rel join pg_catalog.pg_class c on c.oid = rel.oid
	union all
	select c.relowner, t.attacl, 'column ' || c.relname || '.' || t.attname
	from rel join pg_catalog.pg_class c on c.oid = rel.oid join pg_catalog.pg_attribute t on t.attrelid = rel.oid and t.attnum > 0 and t.attacl is not null
	union all
	select f.proowner, f.proacl, 'function ' || f.proname || '(' || pg_catalog.pg_get_function_identity_arguments(f.oid) || ')' from pg_catalog.pg_proc f
	where f.oid in (` + inSchema + `'pg_catalog.pg_proc'::pg_catalog.regclass)
) g, pg_catalog.aclexplode(g.acl) a
where a.grantee <> g.owner and not (a.grantee = 0 and g.what like 'function %')
	and a.grantee not in (select r.oid from public.placements p join pg_catalog.pg_roles r on r.rolname = p.role where p.namespace = $1::oid)
union all
-- What hangs on its tables from elsewhere, and would go on with those that are put aside.
select pg_catalog.concat_ws(' ', o.kind, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(o.name), 'on', rel.relname)
from rel join pg_catalog.pg_depend d on d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.refobjid = rel.oid
join lateral (
	select 'view' as kind, v.relname as name, v.relnamespace as namespace from pg_catalog.pg_rewrite w join pg_catalog.pg_class v on v.oid = w.ev_class
	where d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass and w.oid = d.objid
	union all
	select 'foreign key of', t.relname, t.relnamespace from pg_catalog.pg_constraint k join pg_catalog.pg_class t on t.oid = k.conrelid
	where d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass and k.oid = d.objid
	union all
	select 'default of', t.relname, t.relnamespace from pg_catalog.pg_attrdef e join pg_catalog.pg_class t on t.oid = e.adrelid
	where d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass and e.oid = d.objid
	union all
	select 'table', t.relname, t.relnamespace from pg_catalog.pg_class t
	where d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and t.oid = d.objid and t.relkind <> 't'
	union all
	select 'function', f.proname, f.pronamespace from pg_catalog.pg_proc f
	where d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and f.oid = d.objid
) o on o.namespace <> $1::oid
join pg_catalog.pg_namespace n on n.oid = o.namespace
union all
select 'publication ' || p.pubname || ' of ' || relname from rel join pg_catalog.pg_publication_rel r on r.prrelid = rel.oid join pg_catalog.pg_publication p on p.oid = r.prpubid`

// objects names every object of a schema.
func objects(ctx context.Context, q postgres.Querier, namespace uint32) (map[string]bool, error) {
	rows, err := q.Query(ctx, objectsQuery, namespace)
	if err != nil {
		return nil, err
	}
	found := map[string]bool{}
	var name string
	_, err = pgx.ForEachRow(rows, []any{&name}, func() error {
		found[name] = true
		return nil
	})
	return found, err
}

// table is a table as it stands at a moment of a transaction.
type table struct {
	oid      uint32
	name     string
	kind     string // r or p
	filenode uint32 // changes when PostgreSQL writes the table anew
	root     uint32 // of the partitions that it belongs to; the table itself where there are none
	written  bool   // this transaction has changed rows, or may have
	// parts are what rows depend on: columns with their types, and what rows must satisfy. As long as none of them is
	// gone, rows of another time fit.
	parts   []string
	columns []string // those that can be written
	// typed are the types of the columns whose types lie in the schema itself. Their values go through text: neither
	// do the copies keep hold of the types, nor are those of two schemas the same.
	typed map[string]string
	// generated are the others.
	generated []string
}

// tablesQuery reads the tables of a schema. A transaction that changes a row holds the lock ROW EXCLUSIVE on its table
// until it ends, and nothing else takes it: a trigger, a rule, a function and a cascade are no exceptions.
const tablesQuery = `with rel as materialized (
	select c.oid, c.relname, c.relkind, c.relfilenode from pg_catalog.pg_class c
	where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relkind in ('r', 'p')
), written as materialized (
	select l.relation from pg_catalog.pg_locks l where l.pid = pg_catalog.pg_backend_pid() and l.locktype = 'relation' and l.mode = 'RowExclusiveLock'
		and l.granted and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
)
select oid, relname::text, relkind::text, relfilenode, coalesce(pg_catalog.pg_partition_root(oid)::oid, oid), oid in (select relation from written),
	array(
		select pg_catalog.concat_ws(' ', 'column', a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod), nullif(a.attcollation, 0)::text, a.attgenerated::text)
		from pg_catalog.pg_attribute a where a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped
		union all
		select 'not null ' || a.attname from pg_catalog.pg_attribute a where a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped and a.attnotnull
		union all
		select 'rule ' || pg_catalog.pg_get_constraintdef(k.oid) from pg_catalog.pg_constraint k where k.conrelid = rel.oid and k.contype in ('c', 'p', 'u', 'x')
		union all
		select pg_catalog.concat_ws(' ', 'reference', k.conkey::text, k.confrelid::text, k.confkey::text) from pg_catalog.pg_constraint k
		where k.conrelid = rel.oid and k.contype = 'f'
		union all
		select pg_catalog.pg_get_indexdef(x.indexrelid) from pg_catalog.pg_index x where x.indrelid = rel.oid and x.indisunique
			and not exists (select from pg_catalog.pg_constraint k where k.conindid = x.indexrelid and k.conrelid = rel.oid)),
	array(select a.attname::text from pg_catalog.pg_attribute a where a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = '' order by a.attnum),
	array(select a.attname::text from pg_catalog.pg_attribute a where a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated <> ''),
	(select coalesce(pg_catalog.jsonb_object_agg(a.attname, pg_catalog.format_type(a.atttypid, a.atttypmod)), '{}')
		from pg_catalog.pg_attribute a join pg_catalog.pg_type y on y.oid = a.atttypid and y.typnamespace = $1::oid where a.attrelid = rel.oid and a.attnum > 0 and not a.attisdropped)
from rel order by oid`

// readTables reads the tables of a schema in the order in which they were made.
func readTables(ctx context.Context, q postgres.Querier, namespace uint32) ([]table, error) {
	rows, err := q.Query(ctx, tablesQuery, namespace)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (t table, err error) {
		return t, row.Scan(&t.oid, &t.name, &t.kind, &t.filenode, &t.root, &t.written, &t.parts, &t.columns, &t.generated, &t.typed)
	})
}

// isRoot reports whether the table is one by itself, and no partition of another.
func (t table) isRoot() bool { return t.root == t.oid }

// from is how the rows of a table are named that are its own: a partitioned one's are in its partitions.
func (t table) from(schema string) string {
	name := postgres.Quote(schema) + "." + postgres.Quote(t.name)
	if t.kind == "p" {
		return name
	}
	return "only " + name
}

// changed names the tables, of those before, whose rows of that time cannot be had from the tables after: rows may have
// been changed, the table was written anew, or a column or a rule is gone. What was only added to a table takes nothing
// away. Partitions are one table with their root.
func changed(before, after []table) []string {
	now := map[uint32]table{}
	for _, t := range after {
		now[t.oid] = t
	}
	roots := map[uint32]bool{}
	hit := map[uint32]bool{}
	was := map[uint32]bool{}
	for _, t := range before {
		was[t.oid] = true
		roots[t.root] = true
		a, there := now[t.oid]
		switch {
		case !there, a.written, a.name != t.name, a.filenode != t.filenode, a.root != t.root, !subset(t.parts, a.parts):
			hit[t.root] = true
		}
		if there && a.root != t.root {
			hit[a.root] = true // it has become a partition
		}
	}
	for _, t := range after {
		if !was[t.oid] && !t.isRoot() {
			hit[t.root] = true // a new partition takes rows that none took before
		}
	}
	var names []string
	for _, t := range before {
		if t.isRoot() && hit[t.oid] {
			names = append(names, t.name)
		}
	}
	return names
}

func subset(few, many []string) bool {
	has := make(map[string]bool, len(many))
	for _, s := range many {
		has[s] = true
	}
	for _, s := range few {
		if !has[s] {
			return false
		}
	}
	return true
}
