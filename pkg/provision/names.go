package provision

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// nameless refuses to rename a schema while something in it, or in what a restore has taken out of use and an undo may bring
// back, holds its name as text, as a function's body: it would go on with that name, which may be another tenant's by then.
func nameless(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant) error {
	at, there, err := standing(ctx, tx, t.Number)
	if err != nil || !there { // moveSchema says so
		return err
	}
	kept, err := replacedSchemas(ctx, tx, t.Number)
	if err != nil {
		return err
	}
	for i, schema := range append([]string{at}, kept...) {
		if err := tx.Script(ctx, "set local search_path to "+postgres.Quote(schema)+", ext, pg_temp"); err != nil {
			return err
		}
		what, err := holdsName(ctx, tx, schema, t.Schema.String(), false)
		if err != nil {
			return err
		}
		if what == "" {
			continue
		}
		f := fault.New(fault.Conflict, "the schema cannot be renamed: %s holds its name as text", what).WithCode("schema_named")
		if i > 0 {
			return f.WithHint("it belongs to what a restore has replaced: rename it when that has expired, or without --schema")
		}
		return f.WithHint("write it without the name, in a migration, or rename without --schema")
	}
	return tx.Script(ctx, emptyPath)
}

// replacedSchemas lists what restores of the tenant have taken out of use, and an undo may bring back.
func replacedSchemas(ctx context.Context, tx *postgres.OwnerTx, number int32) ([]string, error) {
	rows, err := tx.Query(ctx, `select schema from public.replaced where tenant = $1 order by made_at`, number)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// repath changes the search paths that functions of a schema keep, as one made with "set search_path from current" does, from the
// former name of a schema to the present one. Otherwise they would work in whatever is called so next. The path of the transaction is empty.
func repath(ctx context.Context, tx *postgres.OwnerTx, schema, former, present string) error {
	const query = `select pg_catalog.format('alter routine %I.%I(%s) set search_path to %s', n.nspname, f.proname, pg_catalog.pg_get_function_identity_arguments(f.oid), m.path)
from pg_catalog.pg_namespace n
join pg_catalog.pg_depend d on d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass and d.refobjid = n.oid and d.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass
join pg_catalog.pg_proc f on f.oid = d.objid and f.pronamespace = n.oid
cross join pg_catalog.unnest(f.proconfig) c (setting)
cross join pg_catalog.substr(c.setting, 13) k (path)
cross join pg_catalog.regexp_replace(k.path, '(^|, *)' || pg_catalog.regexp_replace(pg_catalog.quote_ident($2), '([^[:alnum:]])', '\\\1', 'g') || '(?= *(,|$))', '\1' || pg_catalog.quote_ident($3), 'g') m (path)
where n.nspname = $1 and c.setting like 'search_path=%' and m.path <> k.path`
	rows, err := tx.Query(ctx, query, schema, former, present)
	if err != nil {
		return err
	}
	changes, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(changes) == 0 {
		return err
	}
	return tx.Script(ctx, strings.Join(changes, ";\n"))
}

// holdsName names something of a schema that holds name as text and as a word, as a function's body or, where rows are to be
// looked at, a row: renaming the schema that is called so would leave it behind. Empty: there is nothing. The path that a
// function keeps does not count: repath changes it. The transaction is bound to the schema.
func holdsName(ctx context.Context, tx *postgres.OwnerTx, schema, name string, inRows bool) (what string, err error) {
	// A function's body is text; in the others PostgreSQL knows what is a name, and only their literals are not bound.
	const query = `with s as (select oid from pg_catalog.pg_namespace where nspname = $1::text),
made (what, definition) as (
	select 'a default of the table ' || c.relname, pg_catalog.pg_get_expr(d.adbin, d.adrelid)
	from pg_catalog.pg_class c join s on c.relnamespace = s.oid join pg_catalog.pg_attrdef d on d.adrelid = c.oid
	union all
	select 'the constraint ' || k.conname, pg_catalog.pg_get_constraintdef(k.oid) from pg_catalog.pg_constraint k join s on k.connamespace = s.oid
	union all
	select 'the trigger ' || g.tgname, pg_catalog.pg_get_triggerdef(g.oid, true)
	from pg_catalog.pg_class c join s on c.relnamespace = s.oid join pg_catalog.pg_trigger g on g.tgrelid = c.oid and not g.tgisinternal
	union all
	select 'the view ' || c.relname, pg_catalog.pg_get_viewdef(c.oid) from pg_catalog.pg_class c join s on c.relnamespace = s.oid where c.relkind in ('v', 'm')
	union all
	select 'the index ' || c.relname, pg_catalog.pg_get_indexdef(c.oid, 0, true) from pg_catalog.pg_class c join s on c.relnamespace = s.oid where c.relkind in ('i', 'I')
	union all
	select 'the policy ' || y.polname, concat(pg_catalog.pg_get_expr(y.polqual, c.oid), ' ', pg_catalog.pg_get_expr(y.polwithcheck, c.oid))
	from pg_catalog.pg_class c join s on c.relnamespace = s.oid join pg_catalog.pg_policy y on y.polrelid = c.oid
), named as materialized ( -- or every schema of the database would be looked through
	select 'the function ' || f.proname as what, f.prosrc || ' ' || coalesce((select pg_catalog.string_agg(c, ' ') from pg_catalog.unnest(f.proconfig) c where c not like 'search_path=%'), '') as body
	from pg_catalog.pg_proc f join s on f.pronamespace = s.oid
	union all
	select what, (select pg_catalog.string_agg(l[1], ' ') from pg_catalog.regexp_matches(definition, '''([^'']+)''', 'g') l) from made
)
select coalesce(pg_catalog.min(what), ''), (
	select coalesce(pg_catalog.string_agg(pg_catalog.format('select %L where exists (select from %s t where pg_catalog.strpos((t.*)::text, $1) > 0)',
		'a row of ' || c.relname, c.oid::pg_catalog.regclass), ' union all '), '')
	from pg_catalog.pg_class c join s on c.relnamespace = s.oid where c.relkind in ('r', 'm'))
from named where body ~* ('(^|[^[:alnum:]_$])' || pg_catalog.regexp_replace($2, '([^[:alnum:]])', '\\\1', 'g') || '($|[^[:alnum:]_$])')`
	var rows string
	if err := tx.QueryRow(ctx, query, schema, name).Scan(&what, &rows); err != nil || what != "" || rows == "" || !inRows {
		return what, err
	}
	const first = `select coalesce((select min(what) from (%s) as found (what)), '')`
	err = tx.QueryRow(ctx, fmt.Sprintf(first, rows), name).Scan(&what)
	return what, err
}
