package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Parts says what of an archive is merged into a tenant's live tables: tables, or one pipeline of the CRM.
type Parts struct {
	Tables   []string
	Pipeline string // by its key
	// Overwrite also puts rows back that have changed since; without it only missing ones come in.
	Overwrite bool
}

// IsZero reports whether nothing is picked.
func (p Parts) IsZero() bool { return len(p.Tables) == 0 && p.Pipeline == "" }

// Merged is what has come into a table.
type Merged struct {
	Table       string
	Inserted    int64
	Overwritten int64
}

// ActionMerge is how a merge stands in the audit trail.
const ActionMerge = "tenant.merge"

// Merge puts rows of an archive back into a tenant's live tables, by their primary keys, in one transaction: missing ones, and with
// Overwrite changed ones. It deletes nothing. agree is shown what would be done and refuses by an error; then nothing is. The
// tenant's own constraints and triggers hold. Faults: those of Restore; NotFound for what the archive or the tenant has not;
// Conflict where rows do not fit, or cannot be told apart.
func (x *Transfers) Merge(ctx context.Context, t tenant.Tenant, r io.Reader, foreign bool, parts Parts, agree func([]Difference) error, o Loading) (all []Merged, err error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	err = x.beside(ctx, t, r, foreign, o, func(ctx context.Context, tx *postgres.OwnerTx, live, beside structure.Schema) error {
		if all, err = x.merge(ctx, tx, id, t, live.Name, beside.Name, parts, agree); err != nil {
			return err
		}
		return x.auditMerge(ctx, tx, id, t, parts, all, o.Actor)
	})
	return all, named(err, t)
}

func (x *Transfers) merge(ctx context.Context, tx *postgres.OwnerTx, operation uuid.UUID, t tenant.Tenant, live, beside string, parts Parts, agree func([]Difference) error) ([]Merged, error) {
	picked, found, err := x.preview(ctx, tx, t, live, beside, parts)
	if err != nil {
		return nil, err
	}
	if err := agree(found); err != nil {
		return nil, err
	}
	x.o.Marker.MarkIn(ctx, tx, t.Group, registry.Marking{Operation: operation, Kind: ActionMerge, Tenant: t.Slug.String(), Groups: []string{t.Group}})
	// As a request of the tenant: what takes the gate for itself waits, and nothing is written behind it.
	if err := tx.ShareGate(ctx, t.Number); err != nil {
		return nil, err
	}
	if picked, err = parentsFirst(ctx, tx, live, picked); err != nil {
		return nil, err
	}
	// The tenant's triggers mean its own tables.
	if err := tx.Script(ctx, "set local search_path to "+postgres.Quote(live)+", ext, pg_temp"); err != nil {
		return nil, err
	}
	all := make([]Merged, 0, len(picked))
	for _, c := range picked {
		m := Merged{Table: c.name}
		if err := tx.QueryRow(ctx, c.mergeSQL(live, beside)).Scan(&m.Inserted, &m.Overwritten); err != nil {
			return nil, refusedRows(err, c.name)
		}
		all = append(all, m)
		if err := failpoint.Hit("merge.table"); err != nil {
			return nil, err
		}
	}
	if err := tx.Script(ctx, "set constraints all immediate"); err != nil {
		return nil, refusedRows(err, "")
	}
	for _, c := range picked {
		if err := raiseSequences(ctx, tx, live, c.name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// preview picks the tables and says what a merge of them would do.
func (x *Transfers) preview(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant, live, beside string, parts Parts) (picked []compared, found []Difference, err error) {
	var version int
	if err := tx.QueryRow(ctx, `select version from public.placements where number = $1`, t.Number).Scan(&version); err != nil {
		return nil, nil, err
	}
	if version != x.head() {
		return nil, nil, fault.New(fault.Conflict, "the tenant is at version %d, and the rows of the archive at %d", version, x.head()).WithCode("tenant_behind").
			WithHint("oneo migrate -t %s", t.Slug)
	}
	found, err = differences(ctx, tx, live, beside, func(all []compared) ([]compared, error) {
		if parts.Pipeline != "" {
			picked, err = pipeline(ctx, tx, live, beside, all, parts)
		} else {
			picked, err = pickTables(all, parts)
		}
		return picked, err
	})
	for i := range found { // nothing is deleted
		found[i].Same, found[i].Removed = found[i].Same+found[i].Removed, 0
	}
	return picked, found, err
}

func pickTables(all []compared, parts Parts) (picked []compared, err error) {
	for _, name := range slices.Compact(slices.Sorted(slices.Values(parts.Tables))) {
		i := slices.IndexFunc(all, func(c compared) bool { return c.name == name })
		switch {
		case i < 0 || !all[i].beside:
			return nil, fault.New(fault.NotFound, "the archive has no table %q", name).WithCode("unknown_table")
		case !all[i].live:
			return nil, fault.New(fault.NotFound, "the tenant has no table %q", name).WithCode("unknown_table")
		case len(all[i].key) == 0:
			return nil, fault.New(fault.Conflict, "table %q has no primary key, or another one than in the archive: its rows cannot be told apart", name).WithCode("no_primary_key").
				WithHint("restore the archive under another name (--as), and take from there what is needed")
		case all[i].lacking != "":
			return nil, fault.New(fault.Conflict, "the archive has a column %q of table %q, and the tenant has not", all[i].lacking, name).WithCode("structure_differs")
		}
		c := all[i]
		c.overwrite = parts.Overwrite
		picked = append(picked, c)
	}
	return picked, nil
}

// pipeline picks the rows of one pipeline of the embedded migrations: itself and its fields where they are missing, and its records.
func pipeline(ctx context.Context, tx *postgres.OwnerTx, live, beside string, all []compared, parts Parts) ([]compared, error) {
	wanted := map[string][]string{"pipelines": {"id", "key"}, "fields": {"pipeline_id", "key"}, "records": {"pipeline_id", "created_by"}, "users": {"id"}}
	byName := map[string]compared{}
	for _, c := range all {
		byName[c.name] = c
	}
	for name, columns := range wanted {
		c := byName[name]
		for _, column := range columns {
			if !c.live || !c.beside || !slices.Contains(c.columns, column) || !slices.Equal(c.key, []string{"id"}) {
				return nil, fault.New(fault.Conflict, "these tenant migrations make no pipelines as those that oneo has embedded").WithCode("no_pipelines").
					WithHint("merge tables: --table NAME")
			}
		}
	}
	find := func(schema string) (id string, err error) {
		err = tx.QueryRow(ctx, `select coalesce((select id::text from `+postgres.Quote(schema)+`.pipelines where key = $1), '')`, parts.Pipeline).Scan(&id)
		return id, err
	}
	id, err := find(beside)
	if err != nil {
		return nil, err
	}
	if id == "" {
		return nil, fault.New(fault.NotFound, "the archive has no pipeline %q", parts.Pipeline).WithCode("unknown_pipeline")
	}
	now, err := find(live)
	if err != nil {
		return nil, err
	}
	if now != "" && now != id {
		return nil, fault.New(fault.Conflict, "the tenant has made another pipeline %q since: the archive's records are not its own", parts.Pipeline).WithCode("pipeline_remade").
			WithHint("give that one another key first")
	}
	own, fields, records := byName["pipelines"], byName["fields"], byName["records"]
	own.only = "t.id = '" + id + "'" // as PostgreSQL writes an uuid
	fields.only, records.only = "t.pipeline_id = '"+id+"'", "t.pipeline_id = '"+id+"'"
	// A field that was made again under its key stands for the old one.
	fields.anyConflict = true
	records.overwrite = parts.Overwrite
	// As deleting the user would have left it.
	records.values = map[string]string{"created_by": "(select u.id from " + postgres.Quote(live) + ".users u where u.id = t.created_by)"}
	return []compared{own, fields, records}, nil
}

// mergeSQL brings rows of a table into the live one, and counts those that came in and those that were put back.
func (c compared) mergeSQL(live, beside string) string {
	columns, values, set := make([]string, len(c.columns)), make([]string, len(c.columns)), []string{}
	for i, name := range c.columns {
		q := postgres.Quote(name)
		columns[i], values[i] = q, "t."+q
		if own := c.own[name]; own != "" {
			values[i] += "::text::" + own
		}
		if v := c.values[name]; v != "" {
			values[i] = v
		}
		if !slices.Contains(c.key, name) && !slices.Contains(c.always, name) {
			set = append(set, q+" = excluded."+q)
		}
	}
	keys := make([]string, len(c.key))
	for i, k := range c.key {
		keys[i] = postgres.Quote(k)
	}
	conflict := "on conflict (" + strings.Join(keys, ", ") + ") do nothing"
	switch {
	case c.anyConflict:
		conflict = "on conflict do nothing"
	case c.overwrite && len(set) > 0:
		conflict = "on conflict (" + strings.Join(keys, ", ") + ") do update set " + strings.Join(set, ", ") + " where " + c.row("l") + " <> " + c.row("excluded")
	}
	where := ""
	if c.only != "" {
		where = " where " + c.only
	}
	return "with merged as (insert into " + postgres.Quote(live) + "." + postgres.Quote(c.name) + " as l (" + strings.Join(columns, ", ") + ") overriding system value\nselect " +
		strings.Join(values, ", ") + " from " + postgres.Quote(beside) + "." + postgres.Quote(c.name) + " t" + where + "\n" + conflict +
		" returning (l.xmax = 0) as fresh)\nselect count(*) filter (where fresh), count(*) filter (where not fresh) from merged"
}

// refusedRows gives the refusal of the tenant's own rules words.
func refusedRows(err error, table string) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) || len(pe.Code) != 5 {
		return err
	}
	if pe.TableName != "" {
		table = pe.TableName
	}
	switch {
	case pe.Code == "23503":
		return fault.Wrap(err, fault.Conflict, "rows of table %s refer to rows that the tenant does not have any more: %s", table, pe.Detail).WithCode("missing_reference").
			WithHint("merge the other table as well: --table")
	case pe.Code[:2] == "23":
		return fault.Wrap(err, fault.Conflict, "rows of table %s do not fit to what the tenant has now: %s", table, strings.TrimSpace(pe.Message+" "+pe.Detail)).WithCode("rows_do_not_fit")
	case pe.Code == "0A000", pe.Code == "55000":
		return fault.Wrap(err, fault.Conflict, "rows cannot be merged into table %s: %s", table, pe.Message).WithCode("cannot_merge")
	}
	return err
}

// parentsFirst orders tables so that what others refer to comes first. Tables that refer to each other in a circle keep their order.
func parentsFirst(ctx context.Context, q postgres.Querier, schema string, tables []compared) ([]compared, error) {
	const query = `select c.relname::text, r.relname::text from pg_catalog.pg_constraint k
join pg_catalog.pg_class c on c.oid = k.conrelid join pg_catalog.pg_class r on r.oid = k.confrelid
where k.contype = 'f' and c.oid <> r.oid and ` + lies
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	parents := map[string][]string{}
	var child, parent string
	if _, err := pgx.ForEachRow(rows, []any{&child, &parent}, func() error {
		parents[child] = append(parents[child], parent)
		return nil
	}); err != nil {
		return nil, err
	}
	var ordered []compared
	seen := map[string]bool{}
	var visit func(c compared)
	visit = func(c compared) {
		if seen[c.name] {
			return
		}
		seen[c.name] = true
		for _, p := range tables {
			if slices.Contains(parents[c.name], p.name) {
				visit(p)
			}
		}
		ordered = append(ordered, c)
	}
	for _, c := range tables {
		visit(c)
	}
	return ordered, nil
}

// raiseSequences lets the sequences that give a table's columns their values go on behind the last one that is there.
func raiseSequences(ctx context.Context, tx *postgres.OwnerTx, schema, name string) error {
	const query = `with a as (select attrelid, attnum, attname from pg_catalog.pg_attribute
	where attrelid = pg_catalog.format('%I.%I', $1::text, $2::text)::pg_catalog.regclass and atttypid in (20, 21, 23)),
of (attname, sequence) as (
	select a.attname, d.objid from a join pg_catalog.pg_depend d on d.refobjid = a.attrelid and d.refobjsubid = a.attnum and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
		and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype in ('a', 'i')
	union
	select a.attname, d.refobjid from a join pg_catalog.pg_attrdef v on v.adrelid = a.attrelid and v.adnum = a.attnum
		join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_attrdef'::pg_catalog.regclass and d.objid = v.oid and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass)
select of.attname::text, n.nspname::text, s.relname::text, q.seqincrement > 0, q.seqmin, q.seqmax
from of join pg_catalog.pg_class s on s.oid = of.sequence and s.relkind = 'S' join pg_catalog.pg_namespace n on n.oid = s.relnamespace
join pg_catalog.pg_sequence q on q.seqrelid = s.oid`
	rows, err := tx.Query(ctx, query, schema, name)
	if err != nil {
		return err
	}
	var column, at, sequence string
	var up bool
	var least, most int64
	var all []string
	if _, err := pgx.ForEachRow(rows, []any{&column, &at, &sequence, &up, &least, &most}, func() error {
		q, last, behind := postgres.Quote(at)+"."+postgres.Quote(sequence), "max", ">"
		if !up {
			last, behind = "min", "<"
		}
		all = append(all, fmt.Sprintf(`select pg_catalog.setval('%s'::pg_catalog.regclass, m.last) from (select %s(%s)::bigint from %s.%s) m (last), %s s
where m.last between %d and %d and (m.last %s s.last_value or m.last = s.last_value and not s.is_called)`,
			strings.ReplaceAll(q, "'", "''"), last, postgres.Quote(column), postgres.Quote(schema), postgres.Quote(name), q, least, most, behind))
		return nil
	}); err != nil {
		return err
	}
	return tx.Script(ctx, strings.Join(all, ";\n"))
}

// auditMerge writes who has merged what, in the merge's transaction or, where the registry is in another database, before its
// commit: no merge is without its line.
func (x *Transfers) auditMerge(ctx context.Context, tx *postgres.OwnerTx, operation uuid.UUID, t tenant.Tenant, parts Parts, all []Merged, actor string) error {
	counts := map[string]any{}
	for _, m := range all {
		counts[m.Table] = map[string]int64{"inserted": m.Inserted, "overwritten": m.Overwritten}
	}
	details := map[string]any{"operation": operation, "tables": counts, "overwrite": parts.Overwrite}
	if parts.Pipeline != "" {
		details["pipeline"] = parts.Pipeline
	}
	line := registry.AuditEntry{Actor: actor, Action: ActionMerge, Tenant: t, Details: details}
	if x.o.DB.SameDatabase(t.Group) {
		if err := tx.Script(ctx, "set local search_path to ''"); err != nil {
			return err
		}
		return registry.Audit(ctx, tx, line)
	}
	return x.o.DB.AsOwner(ctx, postgres.MainGroup, func(main *postgres.OwnerTx) error { return registry.Audit(ctx, main, line) })
}
