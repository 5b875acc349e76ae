package structure

import (
	"regexp"
	"strings"
)

// The marks that stand in descriptions for what each tenant has under another name. They are control characters, which
// no identifier of ours holds; render and shown replace them.
const (
	markSchema = "\x01" // the schema itself, inside a literal
	markTenant = "\x02" // the tenant's role
	markOwner  = "\x03" // the role that reads: oneo's owner
	markSelf   = "\x04" // the owner of the object in question
	markName   = "\x05" // the schema itself, as an identifier; in statements only

	// apart separates the parts of an object's name and the attributes of its description, comma the labels of an enum.
	apart = "\x1f"
	comma = "\x1d"
)

// description describes every object of the schemas that it is given, but for how they are found: (key, kind, object, ord, attributes).
//
// Names are made relative by PostgreSQL itself, not by replacing text: before each expression is turned into text, the
// search path is set to that schema, as a migration has it. What lies in the schema is then unqualified, and what lies
// elsewhere, another tenant's table above all, is qualified. A schema that is called like one of its tables or columns
// is no special case. pg_catalog comes first: nothing in a schema can stand in for an operator of PostgreSQL's own
// while the owner's statement runs.
//
// The first object's type is that of all: without it they would be names, and cut at 63 bytes.
//
// kind, object and attributes are the description; ord is an order in which the objects can be made.
var description = strings.NewReplacer(
	"{us}", `E'\x1f'`,
	"{schema_acl}", acl("coalesce(nspacl, acldefault('n', nspowner))", "nspowner"),
	"{rel_acl}", acl("coalesce(relacl, acldefault('r', relowner))", "relowner"),
	"{seq_acl}", acl("coalesce(relacl, acldefault('s', relowner))", "relowner"),
	"{column_acl}", acl("attacl", "relowner"),
	"{function_acl}", acl("coalesce(proacl, acldefault('f', proowner))", "proowner"),
	"{type_acl}", acl("coalesce(typacl, acldefault('T', typowner))", "typowner"),
	"{default_acl}", acl("defaclacl", "defaclrole"),
	"{nspowner}", who("nspowner"), "{relowner}", who("relowner"), "{proowner}", who("proowner"), "{typowner}", who("typowner"),
	"{stxowner}", who("stxowner"), "{defaclrole}", who("defaclrole"), "{polrole}", who("polrole"),
	// The path is set once for each run of rows of one schema; a CASE keeps the order.
	"{at}", `case when current_setting('search_path') = path or set_config('search_path', path, true) is not null then `,
	"{end}", ` end`,
).Replace(`
with t as materialized (
    select i.key, n.oid nsp, n.nspname, n.nspowner, n.nspacl, quote_ident(n.nspname) q,
        'pg_catalog, ' || quote_ident(n.nspname) || ', ext, pg_temp' path, r.oid rol, me.oid me
    from unnest($1::int4[], $2::text[], $3::text[]) i (key, schema, role)
    join pg_namespace n on n.nspname = i.schema
    join pg_roles me on me.rolname = current_user
    left join pg_roles r on r.rolname = i.role
{own}), rel as materialized (
    select t.key, t.nsp, t.path, t.rol, t.me, c.oid rel, c.relname, c.relkind, c.relacl, c.relowner, c.relpersistence, c.relrowsecurity,
        c.relforcerowsecurity, c.reloptions, c.relreplident, c.relispartition, c.relpartbound, c.relam, c.reltablespace, c.reloftype,
        c.reltoastrelid, c.relhasindex, c.relhastriggers, c.relhasrules
    {in c pg_class relnamespace} where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f', 'c')
), seq as materialized (
    select rel.*, d.refobjid, d.refobjsubid, d.deptype, s.seqtypid, s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache, s.seqcycle
    from rel join pg_sequence s on s.seqrelid = rel.rel
    left join lateral (
        select d.refobjid, d.refobjsubid, d.deptype from pg_depend d
        where d.classid = 'pg_class'::regclass and d.objid = rel.rel and d.objsubid = 0 and d.refclassid = 'pg_class'::regclass
          and d.deptype in ('a', 'i') limit 1) d on true
    where rel.relkind = 'S'
), con as materialized (
    select rel.*, k.oid con, k.conname, k.contype, k.convalidated, k.conindid, k.conparentid, k.conislocal
    from rel join pg_constraint k on k.conrelid = rel.rel where rel.relkind in ('r', 'p', 'f') and k.contype in ('c', 'f', 'p', 'u', 'x')
)
select key, 'schema' kind, ''::text object, 0::oid ord, concat_ws({us}, 'owner=' || {nspowner}, 'grants=' || {schema_acl},
    case when not has_schema_privilege(nsp, 'usage') then 'closed=yes' end) attributes
from t

union all
select key, case relkind when 'v' then 'view' when 'm' then 'materialized view' when 'f' then 'foreign table' when 'c' then 'composite type' else 'table' end,
    relname, rel, concat_ws({us},
    'owner=' || {relowner},
    case when relpersistence = 'u' then 'unlogged=yes' end,
    case when relrowsecurity then 'row security=enabled' end,
    case when relforcerowsecurity then 'forced row security=enabled' end,
    'options=' || (select string_agg(o, ',' order by o collate "C") from unnest(reloptions) o),
    'toast options=' || (select string_agg(o, ',' order by o collate "C") from pg_class c, unnest(c.reloptions) o where c.oid = rel.reltoastrelid),
    case when relkind in ('r', 'p', 'm') and relreplident in ('f', 'n') then 'replica identity=' || case relreplident when 'f' then 'full' else 'nothing' end end,
    case when relispartition then 'partition of=' else 'inherits=' end
        || {at}(select string_agg(h.inhparent::regclass::text, ', ' order by h.inhseqno) from pg_inherits h where h.inhrelid = rel.rel){end},
    'partition bound=' || {at}pg_get_expr(relpartbound, rel){end},
    case when relkind = 'p' then 'partition key=' || {at}pg_get_partkeydef(rel){end} end,
    'access method=' || (select a.amname from pg_am a where a.oid = relam and a.amname <> 'heap'),
    'tablespace=' || (select s.spcname from pg_tablespace s where s.oid = reltablespace),
    case when reloftype <> 0 then 'of=' || {at}reloftype::regtype::text{end} end,
    'server=' || (select s.srvname || ' ' || coalesce(f.ftoptions::text, '') from pg_foreign_table f join pg_foreign_server s on s.oid = f.ftserver where f.ftrelid = rel),
    case when relkind in ('v', 'm') then 'definition=' || {at}pg_get_viewdef(rel){end} end,
    case when relkind <> 'c' then 'grants=' || {rel_acl} end)
from rel where relkind <> 'S'

union all
select key, 'sequence', relname, rel, concat_ws({us},
    'owner=' || {relowner},
    case when relpersistence = 'u' then 'unlogged=yes' end,
    format('definition=as %s start %s increment %s minvalue %s maxvalue %s cache %s %s', format_type(seqtypid, null), seqstart, seqincrement, seqmin, seqmax, seqcache,
        case when seqcycle then 'cycle' else 'no cycle' end),
    'owned by=' || {at}(select refobjid::regclass::text || '.' || quote_ident(a.attname) from pg_attribute a where a.attrelid = refobjid and a.attnum = refobjsubid){end},
    'grants=' || {seq_acl})
from seq where deptype is distinct from 'i'

union all
select rel.key, 'column', rel.relname || {us} || a.attname, a.attnum::int4::oid, concat_ws({us},
    case when relkind in ('v', 'm') then null when attinhcount = 0 then 'type=' || {at}format_type(atttypid, atttypmod){end} else 'inherited=yes' end,
    case when relkind not in ('v', 'm') and attinhcount = 0 and attcollation not in (0, y.typcollation) then 'collation=' || {at}attcollation::regcollation::text{end} end,
    case when attnotnull then 'not null=yes' end,
    case attgenerated when '' then 'default=' when 'v' then 'virtual=' else 'generated=' end || {at}pg_get_expr(d.adbin, d.adrelid){end},
    case attidentity when 'a' then 'identity=always' when 'd' then 'identity=by default' end,
    'identity sequence=' || quote_ident(s.sequence),
    case when s.refobjid is not null then format('identity options=start %s increment %s minvalue %s maxvalue %s cache %s %s', s.seqstart, s.seqincrement, s.seqmin, s.seqmax, s.seqcache,
        case when s.seqcycle then 'cycle' else 'no cycle' end) end,
    case when relkind not in ('v', 'm') and y.typstorage <> 'p' then 'storage=' || case attstorage when 'p' then 'plain' when 'e' then 'external' when 'm' then 'main' else 'extended' end || case when attstorage = y.typstorage then ' (default)' else '' end end,
    case attcompression when 'p' then 'compression=pglz' when 'l' then 'compression=lz4' end,
    'statistics=' || nullif(attstattarget, -1),
    'options=' || (select string_agg(o, ',' order by o collate "C") from unnest(attoptions) o),
    'grants=' || {column_acl},
    'sequence grants=' || s.grants)
from rel join pg_attribute a on a.attrelid = rel.rel and a.attnum > 0 and not a.attisdropped
join pg_type y on y.oid = a.atttypid
left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
left join (select refobjid, refobjsubid, relname sequence, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle, {seq_acl} grants from seq where deptype = 'i') s on s.refobjid = a.attrelid and s.refobjsubid = a.attnum
where relkind <> 'S' and (relkind not in ('v', 'm') or d.oid is not null or attacl is not null or attoptions is not null)

union all
select key, 'constraint', relname || {us} || conname, con, concat_ws({us},
    'definition=' || {at}regexp_replace(pg_get_constraintdef(con), ' NOT VALID$', ''){end},
    case when not convalidated then 'not valid=yes' end,
    case when exists (select from pg_trigger g where g.tgconstraint = con and g.tgisinternal and g.tgenabled <> 'O') then 'disabled=yes' end,
    case when x.indisclustered then 'clustered=yes' end,
    case when x.indisreplident then 'replica identity=yes' end,
    case when not x.indisvalid or not x.indisready then 'invalid=yes' end)
from con left join pg_index x on x.indexrelid = con.conindid and contype in ('p', 'u', 'x')
where conparentid = 0 and conislocal

union all
select rel.key, 'index', rel.relname || {us} || i.relname, i.oid, concat_ws({us},
    'definition=' || {at}pg_get_indexdef(x.indexrelid, 0, true){end},
    case when not x.indisvalid or not x.indisready then 'invalid=yes' end,
    case when x.indisclustered then 'clustered=yes' end,
    case when x.indisreplident then 'replica identity=yes' end,
    'tablespace=' || (select s.spcname from pg_tablespace s where s.oid = i.reltablespace))
from rel join pg_index x on x.indrelid = rel.rel join pg_class i on i.oid = x.indexrelid
left join (select con, conindid from con where contype in ('p', 'u', 'x')) k on k.conindid = x.indexrelid
where rel.relhasindex and k.con is null and not i.relispartition

union all
select key, 'trigger', relname || {us} || tgname, g.oid, concat_ws({us},
    'definition=' || {at}pg_get_triggerdef(g.oid, true){end},
    case tgenabled when 'D' then 'enabled=no' when 'A' then 'enabled=always' when 'R' then 'enabled=replica' end)
from rel join pg_trigger g on g.tgrelid = rel.rel and not g.tgisinternal and g.tgparentid = 0 where relhastriggers

union all
select key, 'rule', relname || {us} || rulename, w.oid, concat_ws({us},
    'definition=' || {at}pg_get_ruledef(w.oid, true){end},
    case ev_enabled when 'D' then 'enabled=no' when 'A' then 'enabled=always' when 'R' then 'enabled=replica' end)
from rel join pg_rewrite w on w.ev_class = rel.rel and w.rulename <> '_RETURN' where relhasrules

union all
select key, 'policy', relname || {us} || polname, p.oid, concat_ws({us},
    case when not polpermissive then 'restrictive=yes' end,
    case polcmd when 'r' then 'for=select' when 'a' then 'for=insert' when 'w' then 'for=update' when 'd' then 'for=delete' end,
    'to=' || (select string_agg(w, ',' order by w collate "C") from (select {polrole} w from unnest(polroles) polrole) w),
    'using=' || {at}pg_get_expr(polqual, polrelid){end},
    'with check=' || {at}pg_get_expr(polwithcheck, polrelid){end})
from rel join pg_policy p on p.polrelid = rel.rel where relkind in ('r', 'p')

union all
select key, 'statistics', stxname, s.oid, concat_ws({us},
    'owner=' || {stxowner},
    'definition=' || {at}replace(pg_get_statisticsobjdef(s.oid), 'CREATE STATISTICS ' || q || '.', 'CREATE STATISTICS '){end},
    'statistics=' || nullif(stxstattarget, -1))
{in s pg_statistic_ext stxnamespace}

union all
select key, case prokind when 'p' then 'procedure' when 'a' then 'aggregate' else 'function' end,
    {at}quote_ident(proname) || '(' || pg_get_function_identity_arguments(p.oid) || ')'{end}, p.oid, concat_ws({us},
    'owner=' || {proowner},
    'returns=' || {at}pg_get_function_result(p.oid){end},
    'definition=' || {at}case
        when prokind = 'a' then (select format('sfunc = %s, stype = %s, finalfunc = %s, initcond = %s', g.aggtransfn, format_type(g.aggtranstype, null), g.aggfinalfn, g.agginitval)
            from pg_aggregate g where g.aggfnoid = p.oid)
        -- The function's own name is always qualified, and so is the path that "set search_path from current" keeps.
        when array_to_string(proconfig, ' ') like '%search_path=%' then regexp_replace(overlay(pg_get_functiondef(p.oid) placing '' from
                (case prokind when 'p' then 29 else 28 end) for length(q) + 1),
            '(\n SET search_path TO (?:[^\n]*, )?)' || regexp_replace(quote_literal(nspname), '([^\w''])', '\\\1', 'g') || '(?=[,\n])', E'\\1''\x01''')
        else overlay(pg_get_functiondef(p.oid) placing '' from (case prokind when 'p' then 29 else 28 end) for length(q) + 1) end{end},
    'grants=' || {function_acl})
{in p pg_proc pronamespace}
where not (p.prolang = 12 and p.prosrc ~ '^(multi)?range_constructor') -- a range type's own

union all
select key, case typtype when 'e' then 'enum' when 'd' then 'domain' when 'r' then 'range type' else 'base type' end, typname, y.oid, concat_ws({us},
    'owner=' || {typowner},
    case when typtype = 'd' then 'type=' || {at}format_type(typbasetype, typtypmod){end} end,
    case when typtype = 'd' and typcollation <> 0 then 'collation=' || {at}typcollation::regcollation::text{end} end,
    case when typnotnull then 'not null=yes' end,
    'default=' || {at}pg_get_expr(typdefaultbin, 0){end},
    'labels=' || (select string_agg(quote_literal(e.enumlabel), E'\x1d' order by e.enumsortorder) from pg_enum e where e.enumtypid = y.oid),
    'definition=' || {at}(select concat_ws(', ', 'subtype = ' || format_type(r.rngsubtype, null),
        'subtype_opclass = ' || (select quote_ident(c.opcname) from pg_opclass c where c.oid = r.rngsubopc),
        'collation = ' || nullif(r.rngcollation, 0)::regcollation, 'canonical = ' || nullif(r.rngcanonical::oid, 0)::regproc,
        'subtype_diff = ' || nullif(r.rngsubdiff::oid, 0)::regproc, 'multirange_type_name = ' || format_type(r.rngmultitypid, null))
        from pg_range r where r.rngtypid = y.oid){end},
    'grants=' || {type_acl})
{in y pg_type typnamespace}
where typtype in ('e', 'd', 'r') or typtype = 'b' and typcategory <> 'A'

union all
select key, 'domain constraint', typname || {us} || k.conname, k.oid, concat_ws({us},
    'definition=' || {at}regexp_replace(pg_get_constraintdef(k.oid), ' NOT VALID$', ''){end},
    case when not k.convalidated then 'not valid=yes' end)
{in y pg_type typnamespace} join pg_constraint k on k.contypid = y.oid and k.contype = 'c' where typtype = 'd'

union all
select key, 'default privileges', {defaclrole} || {us} || case defaclobjtype when 'r' then 'tables' when 'S' then 'sequences' when 'f' then 'functions' when 'T' then 'types' else 'schemas' end,
    d.oid, 'grants=' || {default_acl}
{in d pg_default_acl defaclnamespace}

union all
select key, 'operator', {at}format('%s (%s, %s)', oprname, oprleft::regtype, oprright::regtype){end}, o.oid, 'definition=' || {at}oprcode::text{end}
{in o pg_operator oprnamespace}
union all
select key, 'operator class', opcname, o.oid, 'definition=' || {at}format('%s %s', opcintype::regtype, opcdefault){end} {in o pg_opclass opcnamespace}
union all
select key, 'collation', collname, c.oid, format('definition=%s %s %s', collprovider, collcollate, collctype) {in c pg_collation collnamespace}
union all
select key, 'conversion', conname, c.oid, 'definition=' || {at}conproc::text{end} {in c pg_conversion connamespace}
union all
select key, 'text search configuration', cfgname, c.oid, 'definition=' || {at}(
    select string_agg(format('%s %s', m.maptokentype, m.mapdict::regdictionary), ', ' order by m.maptokentype, m.mapseqno) from pg_ts_config_map m where m.mapcfg = c.oid){end}
{in c pg_ts_config cfgnamespace}
union all
select key, 'text search dictionary', dictname, d.oid, 'definition=' || coalesce(dictinitoption, '') {in d pg_ts_dict dictnamespace}
union all
select key, 'extension', extname, e.oid, 'definition=' || extversion {in e pg_extension extnamespace}`)

// The two ways to find what lies in a schema. The catalogs have no index by schema, and pg_depend has one: for a few schemas it comes first, so
// that nothing of the others is read. For many, PostgreSQL would take that way for one of a few rows and join each with each.
var (
	inSchema = regexp.MustCompile(`\{in (\w+) (\w+) (\w+)\}`)

	linesOfFew = inSchema.ReplaceAllString(strings.Replace(description, "{own}", `), own as materialized (
    select distinct t.key, t.nsp, t.nspname, t.q, t.path, t.rol, t.me, d.classid, d.objid from t join pg_depend d on d.refclassid = 'pg_namespace'::regclass and d.refobjid = t.nsp
    -- a composite type's relation lies where its type does
    union all select t.key, t.nsp, t.nspname, t.q, t.path, t.rol, t.me, 'pg_class'::regclass, y.typrelid
    from t join pg_depend d on d.refclassid = 'pg_namespace'::regclass and d.refobjid = t.nsp and d.classid = 'pg_type'::regclass join pg_type y on y.oid = d.objid and y.typtype = 'c'
`, 1), `from own t join $2 $1 on $1.oid = t.objid and t.classid = '$2'::regclass and $1.$3 = t.nsp`)
	linesOfMany = inSchema.ReplaceAllString(strings.Replace(description, "{own}", "", 1), `from t join $2 $1 on $1.$3 = t.nsp`)
)

// few is how many schemas are still looked for one by one.
const few = 16

// linesOf describes every object of so many schemas.
func linesOf(schemas int) string {
	if schemas <= few {
		return linesOfFew
	}
	return linesOfMany
}

// hashesOf is one hash for each schema, over what lines gives, in an order that no locale changes.
func hashesOf(schemas int) string {
	return `select key, encode(sha256(convert_to(string_agg(kind || E'\x1e' || object || E'\x1e' || attributes, E'\n'
    order by kind collate "C", object collate "C", attributes collate "C"), 'UTF8')), 'hex')
from (` + linesOf(schemas) + `) l group by key`
}

// who names a role so that it is the same for every tenant.
func who(role string) string {
	return `case ` + role + ` when 0 then 'public' when rol then E'\x02' when me then E'\x03' else pg_get_userbyid(` + role + `)::text end`
}

// acl is a list of grants as role:privilege, with a star for the grant option, whoever granted them.
func acl(list, owner string) string {
	return `(select string_agg(distinct g, ',' order by g) from (
        select (case when a.grantee = ` + owner + ` then E'\x04' else ` + who("a.grantee") + ` end || ':' || lower(a.privilege_type) || case when a.is_grantable then '*' else '' end) collate "C" g
        from aclexplode(` + list + `) a) g)`
}
