package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// A table that the run has not changed, or to which it has only added something, is not copied: it is moved into the new
// schema, which takes as long as its foreign keys to tables that were put back take to be checked. What the schema then
// looks like is compared with what the migrations have made of it before; whatever is not the same, or does not work,
// ends the attempt, and the tenant is taken back by copying all its tables.

// errUnmoved ends an attempt at moving tables, with what was in the way.
var errUnmoved = errors.New("tables cannot be moved")

// unmoved makes what PostgreSQL says to a statement of the attempt an end of the attempt. What may pass stays what it is.
func unmoved(err error) error {
	switch postgres.SQLState(err) {
	case "", "55P03", "40P01", "57014", "57P01":
		return err
	}
	return fmt.Errorf("%w: %w", errUnmoved, err)
}

// own finds what tables consist of: own(root, classid, objid). Foreign keys and triggers are no part of it: they are
// taken off and put on again.
const own = `with recursive own (root, classid, objid) as (
	select c.oid, 'pg_catalog.pg_class'::pg_catalog.regclass::oid, c.oid from pg_catalog.unnest($1::oid[]) r (oid) join pg_catalog.pg_class c on c.oid = r.oid
	union
	select own.root, d.classid, d.objid from own
	join pg_catalog.pg_depend d on d.refclassid = own.classid and d.refobjid = own.objid and d.deptype in ('a', 'i')
	where d.classid <> 'pg_catalog.pg_trigger'::pg_catalog.regclass
		and not (d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass and exists (select from pg_catalog.pg_constraint k where k.oid = d.objid and k.contype = 'f'))
)
`

// tiedQuery finds the tables among those given that something else in their schema hangs on, or that hang on something
// else, other than by foreign keys, triggers and plain views.
const tiedQuery = own + `select o.root from own o where o.classid = 'pg_catalog.pg_statistic_ext'::pg_catalog.regclass
union
select o.root from own o join pg_catalog.pg_depend d on d.classid = o.classid and d.objid = o.objid
where exists (select from pg_catalog.pg_depend n where n.classid = d.refclassid and n.objid = d.refobjid
		and n.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass and n.refobjid = $2::oid)
	and not exists (select from own i where i.root = o.root and i.classid = d.refclassid and i.objid = d.refobjid)
union
select o.root from own o join pg_catalog.pg_depend d on d.refclassid = o.classid and d.refobjid = o.objid
where not exists (select from own i where i.root = o.root and i.classid = d.classid and i.objid = d.objid)
	and not exists (select from pg_catalog.pg_constraint k where d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass and k.oid = d.objid and k.contype = 'f')
	and not exists (select from pg_catalog.pg_trigger g where d.classid = 'pg_catalog.pg_trigger'::pg_catalog.regclass and g.oid = d.objid and (g.tgisinternal or g.tgrelid = o.root))
	and not exists (select from pg_catalog.pg_rewrite w join pg_catalog.pg_class v on v.oid = w.ev_class
		where d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass and w.oid = d.objid and v.relkind = 'v')`

// remarks are the comments on a table and its columns, which a description leaves out.
const remarksQuery = `select coalesce(pg_catalog.string_agg(pg_catalog.concat_ws(' ', a.attname::text, d.description), E'\n' order by a.attname), '')
from pg_catalog.pg_description d left join pg_catalog.pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid and d.objsubid > 0
where d.classoid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objoid = $1::oid and not a.attname::text = any($2::text[])`

// mover is what is known for moving tables.
type mover struct {
	is, want structure.Structure // the tenant, and its old version
	tables   []moved
}

// moved is a table that is moved.
type moved struct {
	table
	added map[string][]string // what the run has added to it, by kind
}

// moves reports whether a table of this name is moved.
func (m *mover) moves(name string) bool {
	return m != nil && slices.ContainsFunc(m.tables, func(t moved) bool { return t.name == name })
}

// look finds the tables that can be moved. It must come before anything is taken off the new schema.
func (w *undoing) look(ctx context.Context) (*mover, error) {
	m := &mover{}
	var err error
	if m.is, err = structure.Read(ctx, w.tx, structure.Schema{Name: w.undone, Role: w.p.role}); err != nil {
		return nil, unmoved(err)
	}
	if m.want, err = structure.Read(ctx, w.tx, structure.Schema{Name: w.p.at, Role: w.p.role}); err != nil {
		return nil, unmoved(err)
	}
	if err := w.bind(ctx); err != nil {
		return nil, err
	}
	there, err := readTables(ctx, w.tx, w.p.namespace)
	if err != nil {
		return nil, err
	}
	live := map[string]table{}
	for _, t := range there {
		live[t.name] = t
	}
	fresh := map[string]table{}
	var fromOIDs, toOIDs []uint32
	for _, t := range w.tables {
		l, is := live[t.name]
		if _, kept := w.p.tables[t.name]; kept || !is || t.kind != "r" || l.kind != "r" || !t.isRoot() || !l.isRoot() {
			continue
		}
		added, same := w.p.added(t.name, m.is.Parts(t.name), m.want.Parts(t.name))
		if !same {
			continue
		}
		fresh[t.name] = t
		fromOIDs, toOIDs = append(fromOIDs, l.oid), append(toOIDs, t.oid)
		m.tables = append(m.tables, moved{l, added})
	}
	tied := map[uint32]bool{}
	for namespace, oids := range map[uint32][]uint32{w.p.namespace: fromOIDs, w.made: toOIDs} {
		rows, err := w.tx.Query(ctx, tiedQuery, oids, namespace)
		if err != nil {
			return nil, err
		}
		var oid uint32
		if _, err := pgx.ForEachRow(rows, []any{&oid}, func() error { tied[oid] = true; return nil }); err != nil {
			return nil, err
		}
	}
	var tables []moved
	for _, t := range m.tables {
		var is, want string
		if err := w.tx.QueryRow(ctx, remarksQuery, t.oid, append([]string{}, t.added["column"]...)).Scan(&is); err != nil {
			return nil, err
		}
		if err := w.tx.QueryRow(ctx, remarksQuery, fresh[t.name].oid, []string{}).Scan(&want); err != nil {
			return nil, err
		}
		if is == want && !tied[t.oid] && !tied[fresh[t.name].oid] {
			tables = append(tables, t)
		}
	}
	m.tables = tables
	return m, nil
}

// added tells what the run has added to a table, and whether it is that of the old version without it. Triggers and
// foreign keys are put on anew and need not be the same.
func (p point) added(table string, is, want []structure.Part) (added map[string][]string, same bool) {
	left := map[[2]string]string{}
	for _, part := range want {
		left[[2]string{part.Kind, part.Name}] = part.Text
	}
	added = map[string][]string{}
	for _, part := range is {
		id := [2]string{part.Kind, part.Name}
		text, old := left[id]
		delete(left, id)
		switch {
		case part.Kind == "trigger", part.IsForeignKey() && (!old || strings.HasPrefix(text, "definition=FOREIGN KEY")):
		case old && text == part.Text:
		case !old && slices.Contains(p.made, objectName(part.Kind, table, part.Name)):
			added[part.Kind] = append(added[part.Kind], part.Name)
		default:
			return nil, false
		}
	}
	for id, text := range left {
		if id[0] != "trigger" && !(structure.Part{Kind: id[0], Text: text}).IsForeignKey() {
			return nil, false
		}
	}
	return added, true
}

// objectName is what objects calls a part of a table.
func objectName(kind, table, name string) string {
	switch kind {
	case "column":
		return "column " + table + "." + name
	case "index":
		return "index " + name
	}
	return kind + " " + name + " of " + table
}

// move puts the tables of today into the place of those of the old version, and takes off what the run has added. It
// returns what is to be put on when all rows are there.
func (w *undoing) move(ctx context.Context, m *mover, all []put) (left []put, err error) {
	if len(m.tables) == 0 {
		return all, nil
	}
	oids, names := make([]uint32, len(m.tables)), make([]string, len(m.tables))
	fresh := make([]string, len(m.tables))
	for i, t := range m.tables {
		oids[i], names[i], fresh[i] = t.oid, t.name, w.in(w.p.at, t.table)
	}
	// Views hold no rows; those of the tables that go would keep hold of the tables that stay.
	take, _, err := w.views(ctx, w.p.namespace, w.undone)
	if err != nil {
		return nil, err
	}
	drop, create, err := w.views(ctx, w.made, w.p.at)
	if err != nil {
		return nil, err
	}
	keys, along, err := w.takeOff(ctx, m, oids)
	if err != nil {
		return nil, err
	}
	triggers, err := w.triggers(ctx, names)
	if err != nil {
		return nil, err
	}
	take = append(append(append(take, drop...), keys...), "drop table "+strings.Join(fresh, ", "))
	for _, t := range m.tables {
		take = append(take, "alter table "+w.in(w.undone, t.table)+" set schema "+postgres.Quote(w.p.at))
	}
	for _, t := range m.tables {
		off, err := w.without(ctx, t)
		if err != nil {
			return nil, err
		}
		take = append(take, off...)
	}
	if err := w.tx.Script(ctx, strings.Join(append(take, triggers...), ";\n")); err != nil {
		return nil, unmoved(err)
	}
	for _, sql := range create {
		left = append(left, put{sql: sql})
	}
	for _, p := range all {
		if p.key == "" || !along[[2]string{p.table, p.key}] {
			left = append(left, p)
		}
	}
	return left, nil
}

// views are the statements that drop the plain views of a schema, and those that make them again.
func (w *undoing) views(ctx context.Context, namespace uint32, schema string) (drop, create []string, err error) {
	const list = `select pg_catalog.format('%I.%I', $2::text, c.relname),
	pg_catalog.format('create view %I.%I %s as %s', $2::text, c.relname, 'with (' || pg_catalog.array_to_string(c.reloptions, ', ') || ')', pg_catalog.pg_get_viewdef(c.oid)),
	array(select case d.objsubid when 0 then pg_catalog.format('comment on view %I.%I is %L', $2::text, c.relname, d.description)
			else pg_catalog.format('comment on column %I.%I.%I is %L', $2::text, c.relname, a.attname, d.description) end
		from pg_catalog.pg_description d left join pg_catalog.pg_attribute a on a.attrelid = d.objoid and a.attnum = d.objsubid
		where d.classoid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objoid = c.oid order by d.objsubid)
from pg_catalog.pg_class c where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relkind = 'v' order by c.oid`
	rows, err := w.tx.Query(ctx, list, namespace, schema)
	if err != nil {
		return nil, nil, err
	}
	var names []string
	var name, again string
	var comments []string
	if _, err := pgx.ForEachRow(rows, []any{&name, &again, &comments}, func() error {
		names, create = append(names, name), append(append(create, strings.TrimSuffix(again, ";")), comments...)
		comments = nil
		return nil
	}); err != nil || len(names) == 0 {
		return nil, nil, err
	}
	return []string{"drop view " + strings.Join(names, ", ")}, create, nil
}

// takeOff are the statements that drop the foreign keys between the tables that are moved and those that stay, and the
// triggers of the former; and the foreign keys, by table and name, that come along.
func (w *undoing) takeOff(ctx context.Context, m *mover, oids []uint32) (off []string, along map[[2]string]bool, err error) {
	const list = `select k.conname::text, t.relname::text, true, k.conrelid = any($2::oid[]), k.confrelid = any($2::oid[])
	or k.confrelid not in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass)
from pg_catalog.pg_constraint k join pg_catalog.pg_class t on t.oid = k.conrelid
where k.contype = 'f' and k.conparentid = 0 and k.oid in ( -- by an index: those of the tables, and those that refer to them
	select d.objid from pg_catalog.pg_depend d where d.classid = 'pg_catalog.pg_constraint'::pg_catalog.regclass
		and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.refobjid = any($2::oid[]))
union all
select g.tgname::text, t.relname::text, false, true, true from pg_catalog.pg_trigger g join pg_catalog.pg_class t on t.oid = g.tgrelid
where g.tgrelid = any($2::oid[]) and not g.tgisinternal`
	along = map[[2]string]bool{}
	rows, err := w.tx.Query(ctx, list, w.p.namespace, oids)
	if err != nil {
		return nil, nil, err
	}
	var name, table string
	var key, from, to bool
	_, err = pgx.ForEachRow(rows, []any{&name, &table, &key, &from, &to}, func() error {
		at := postgres.Quote(w.undone) + "." + postgres.Quote(table)
		switch {
		case !key:
			off = append(off, "drop trigger "+postgres.Quote(name)+" on "+at)
		case from && to && sameKey(m, table, name):
			along[[2]string{table, name}] = true
		default:
			off = append(off, "alter table "+at+" drop constraint "+postgres.Quote(name))
		}
		return nil
	})
	return off, along, err
}

// sameKey reports whether the old version has a foreign key just so.
func sameKey(m *mover, table, name string) bool {
	return slices.ContainsFunc(m.is.Parts(table), func(p structure.Part) bool {
		return p.IsForeignKey() && p.Name == name && slices.Contains(m.want.Parts(table), p)
	})
}

// triggers are the statements that make the triggers of the old version. They are off, as those of all its tables, until
// the rows are there.
func (w *undoing) triggers(ctx context.Context, tables []string) ([]string, error) {
	const list = `select pg_catalog.pg_get_triggerdef(g.oid) || pg_catalog.format(E';\nalter table only %I.%I disable trigger %I', $2::text, c.relname, g.tgname)
	|| coalesce(pg_catalog.format(E';\ncomment on trigger %I on %I.%I is %L', g.tgname, $2::text, c.relname, pg_catalog.obj_description(g.oid, 'pg_trigger')), '')
from pg_catalog.pg_class c join pg_catalog.pg_trigger g on g.tgrelid = c.oid and not g.tgisinternal
where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relname = any($3::text[]) order by g.oid`
	rows, err := w.tx.Query(ctx, list, w.made, w.p.at, tables)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// without are the statements that take off a table, which has been moved, what the run has added to it. What is in the
// columns that go is kept, with the keys of the rows.
func (w *undoing) without(ctx context.Context, t moved) ([]string, error) {
	at := w.in(w.p.at, t.table)
	var take []string
	if columns := t.added["column"]; len(columns) > 0 {
		const key = `select array(select a.attname::text from pg_catalog.pg_index x join pg_catalog.pg_attribute a on a.attrelid = x.indrelid and a.attnum = any(x.indkey)
where x.indrelid = $1::oid and x.indisprimary and a.attnum > 0)`
		var keys []string
		if err := w.tx.QueryRow(ctx, key, t.oid).Scan(&keys); err != nil {
			return nil, err
		}
		list := "*"
		if len(keys) > 0 {
			list = quoted(append(keys, columns...))
		}
		take = append(take, "create table "+w.in(w.undone, t.table)+" as select "+list+" from only "+at+" where pg_catalog.num_nonnulls("+quoted(columns)+") > 0")
	}
	for _, kind := range []string{"constraint", "index", "rule", "policy", "column"} {
		for _, name := range t.added[kind] {
			switch q := postgres.Quote(name); kind {
			case "constraint", "column":
				take = append(take, "alter table only "+at+" drop "+kind+" "+q)
			case "index":
				take = append(take, "drop index if exists "+postgres.Quote(w.p.at)+"."+q)
			default:
				take = append(take, "drop "+kind+" "+q+" on "+at)
			}
		}
	}
	return take, nil
}

func quoted(names []string) string {
	q := make([]string, len(names))
	for i, n := range names {
		q[i] = postgres.Quote(n)
	}
	return strings.Join(q, ", ")
}

// verify ends the attempt when the schema is not in all what the migrations have made of it.
func (w *undoing) verify(ctx context.Context, m *mover) error {
	is, err := structure.Read(ctx, w.tx, structure.Schema{Name: w.p.at, Role: w.p.role})
	if err != nil {
		return unmoved(err)
	}
	if is.Hash() != m.want.Hash() {
		return fmt.Errorf("%w: the structure would not be that of version %d: %v", errUnmoved, w.p.from, structure.Compare(m.want, is))
	}
	return w.bind(ctx)
}
