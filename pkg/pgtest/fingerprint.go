package pgtest

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// fingerprint describes one schema, one line an object, relative to the schema and to the tenant's role. Everything
// outside pg_catalog is qualified by the server, because the search path is pg_catalog; the schema's own prefix is then
// taken away, at the beginning of an identifier only.
const fingerprint = `
with t as (
    select n.oid nsp, n.nspname, n.nspowner, n.nspacl,
        '(?<![\w$"])' || regexp_replace(quote_ident(n.nspname), '([.\\+*?\[^\]$(){}=!<>|:#-])', '\\\1', 'g') || '\.' pat, $2::text role
    from pg_namespace n where n.nspname = $1
), rel as (
    select t.*, c.oid rel, c.relname, c.relkind, c.relacl, c.relowner, c.relpersistence, c.relrowsecurity, c.reloptions, c.relreplident
    from t join pg_class c on c.relnamespace = t.nsp where c.relkind in ('r', 'p', 'v', 'm', 'S', 'f', 'c')
), grants as (
    select 'schema' kind, '' obj, a.* from t, aclexplode(coalesce(nspacl, acldefault('n', nspowner))) a
    union all
    select 'acl', relname, a.* from rel, aclexplode(coalesce(relacl, acldefault(case relkind when 'S' then 's'::"char" else 'r' end, relowner))) a
    where relkind <> 'c'
)
select 'rel', relname, format('%s %s rls=%s opt=%s ri=%s', relkind, relpersistence, relrowsecurity, reloptions, relreplident) from rel
union all
select g.kind, g.obj || ':' || g.privilege_type || ':' || case when g.grantee = 0 then 'public'
    when g.grantee::regrole::text in (t.role, quote_ident(t.role)) then '@tenant' else g.grantee::regrole::text end, g.is_grantable::text from grants g, t
union all
select 'col', relname || '.' || attname, format('%s nn=%s id=%s gen=%s coll=%s st=%s def=%s', regexp_replace(format_type(atttypid, atttypmod), pat, '', 'g'),
    attnotnull, attidentity, attgenerated, attcollation::regcollation, attstorage, regexp_replace(pg_get_expr(adbin, adrelid), pat, '', 'g'))
from rel join pg_attribute a on a.attrelid = rel.rel and attnum > 0 and not attisdropped
left join pg_attrdef d on d.adrelid = attrelid and d.adnum = attnum where relkind <> 'S'
union all
select 'con', relname || '.' || conname, regexp_replace(pg_get_constraintdef(k.oid), pat, '', 'g') || ' v=' || convalidated
from rel join pg_constraint k on k.conrelid = rel.rel where relkind in ('r', 'p')
union all
select 'idx', rel.relname || '.' || i.relname, regexp_replace(pg_get_indexdef(x.indexrelid), pat, '', 'g') || format(' valid=%s', indisvalid)
from rel join pg_index x on x.indrelid = rel.rel join pg_class i on i.oid = x.indexrelid
union all
select 'trg', relname || '.' || tgname, regexp_replace(pg_get_triggerdef(g.oid), pat, '', 'g') || ' en=' || tgenabled::text
from rel join pg_trigger g on g.tgrelid = rel.rel and not tgisinternal
union all
select 'view', relname, regexp_replace(pg_get_viewdef(rel.rel), pat, '', 'g') from rel where relkind in ('v', 'm')
union all
select 'seq', relname, format('%s %s %s %s %s %s %s', seqtypid::regtype, seqstart, seqincrement, seqmin, seqmax, seqcache, seqcycle)
from rel join pg_sequence s on s.seqrelid = rel.rel where relkind = 'S'
union all
select 'fn', proname || '(' || pg_get_function_identity_arguments(p.oid) || ')', md5(regexp_replace(pg_get_functiondef(p.oid), pat, '', 'g'))
from t join pg_proc p on p.pronamespace = t.nsp and p.prokind in ('f', 'p')
union all
select 'type', typname, typtype::text from t join pg_type y on y.typnamespace = t.nsp and typtype in ('e', 'd', 'r')
union all
select 'defacl', defaclobjtype::text, replace(defaclacl::text, t.role, '@tenant') from t join pg_default_acl d on d.defaclnamespace = t.nsp
order by 1, 2, 3`

// Fingerprint describes the structure, the grants and the default privileges of a schema, one line an object. Two
// tenants at the same version have the same lines; role is the tenant's own.
func Fingerprint(t testing.TB, c *pgx.Conn, schema, role string) []string {
	t.Helper()
	ctx := context.Background()
	var lines []string
	err := pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local search_path to pg_catalog"); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, fingerprint, schema, role)
		if err != nil {
			return err
		}
		lines, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (string, error) {
			var kind, obj string
			var def *string
			err := row.Scan(&kind, &obj, &def)
			if def == nil {
				def = new(string)
			}
			return strings.Join([]string{kind, obj, *def}, " "), err
		})
		return err
	})
	if err != nil {
		t.Fatalf("pgtest: fingerprint %s: %v", schema, err)
	}
	if len(lines) == 0 {
		t.Fatalf("pgtest: fingerprint %s: there is no such schema", schema)
	}
	return lines
}
