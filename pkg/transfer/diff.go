package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Difference is what taking a table back to an archive would change: rows that come in, go, become others, and stay as they are.
type Difference struct {
	Table   string
	Added   int64
	Removed int64
	Changed int64 // 0 where there is no primary key to know a row by: such a row is one removed and one added
	Same    int64
}

// errOnlyAsked rolls back what was done to answer a question.
var errOnlyAsked = errors.New("only asked")

// Diff says what Restore would change, table by table, or Merge of some parts, and changes nothing: the archive is loaded beside
// the tenant, brought to the newest version, compared with what is there, and rolled back. Faults: those of Restore and Merge.
func (x *Transfers) Diff(ctx context.Context, t tenant.Tenant, r io.Reader, foreign bool, parts Parts, o Loading) (all []Difference, err error) {
	err = x.beside(ctx, t, r, foreign, o, func(ctx context.Context, tx *postgres.OwnerTx, live, beside structure.Schema) error {
		if parts.IsZero() {
			all, err = differences(ctx, tx, live.Name, beside.Name, nil)
		} else {
			_, all, err = x.preview(ctx, tx, t, live.Name, beside.Name, parts)
		}
		if err != nil {
			return err
		}
		return errOnlyAsked
	})
	if errors.Is(err, errOnlyAsked) {
		err = nil
	}
	return all, named(err, t)
}

// beside runs fn in the transaction in which an archive was loaded beside a tenant. Nothing of it stays if fn fails.
func (x *Transfers) beside(ctx context.Context, t tenant.Tenant, r io.Reader, foreign bool, o Loading,
	fn func(ctx context.Context, tx *postgres.OwnerTx, live, beside structure.Schema) error) error {
	a, err := archive.NewReader(r, archive.ReadOptions{Identities: o.Identities, MaxBytes: o.MaxBytes})
	if err != nil {
		return err
	}
	defer a.Close()
	if err := ownArchive(a.Header(), t, foreign); err != nil {
		return err
	}
	var trailer archive.Trailer
	fill, err := x.filling(ctx, a, t.Group, o, &trailer)
	if err != nil {
		return err
	}
	return x.o.Provision.Beside(ctx, t.Slug, fill, fn)
}

// compared is how one table is compared, on one side and on the other.
type compared struct {
	name    string
	columns []string          // that both sides have and write
	key     []string          // the primary key, the same on both sides; none: whole rows are compared
	only    string            // a condition on the rows of both sides, of constants; empty: all
	live    bool              // the tenant has the table
	beside  bool              // the archive has
	lacking string            // a column that the archive has and the tenant has not; empty: none
	always  []string          // columns that PostgreSQL alone gives a value: they cannot be put back
	own     map[string]string // columns of a type that each side has of its own, and the tenant's type

	// How it is merged.
	overwrite   bool
	anyConflict bool              // what any rule forbids stays away, not only what is there already
	values      map[string]string // what a column gets instead of the archive's value
}

// comparable lists the tables of two schemas, as they are to be compared.
func comparable(ctx context.Context, tx *postgres.OwnerTx, live, beside string) ([]compared, error) {
	there, err := tablesOf(ctx, tx, live)
	if err != nil {
		return nil, err
	}
	here, err := tablesOf(ctx, tx, beside)
	if err != nil {
		return nil, err
	}
	keys, err := keysOf(ctx, tx, live)
	if err != nil {
		return nil, err
	}
	always, err := alwaysOf(ctx, tx, live)
	if err != nil {
		return nil, err
	}
	others, err := keysOf(ctx, tx, beside)
	if err != nil {
		return nil, err
	}
	own, err := ownTypesOf(ctx, tx, live)
	if err != nil {
		return nil, err
	}
	var all []compared
	for _, t := range there {
		all = append(all, compared{name: t.name, columns: t.columns, live: true})
	}
	for _, t := range here {
		i := slices.IndexFunc(all, func(c compared) bool { return c.name == t.name })
		if i < 0 {
			all = append(all, compared{name: t.name, columns: t.columns, beside: true})
			continue
		}
		c := &all[i]
		c.beside = true
		for _, column := range t.columns {
			if !slices.Contains(c.columns, column) {
				c.lacking = column
			}
		}
		c.always, c.own = always[c.name], own[c.name]
		c.columns = slices.DeleteFunc(c.columns, func(column string) bool { return !slices.Contains(t.columns, column) })
		if keys[c.name].types == others[c.name].types {
			c.key = keys[c.name].columns
		}
	}
	slices.SortFunc(all, func(a, b compared) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// alwaysOf lists the columns of a schema's tables that PostgreSQL alone gives a value.
func alwaysOf(ctx context.Context, q postgres.Querier, schema string) (map[string][]string, error) {
	const query = `select c.relname::text, a.attname::text from pg_catalog.pg_class c join pg_catalog.pg_attribute a on a.attrelid = c.oid
where ` + lies + ` and a.attidentity = 'a'`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	all := map[string][]string{}
	var name, column string
	_, err = pgx.ForEachRow(rows, []any{&name, &column}, func() error {
		all[name] = append(all[name], column)
		return nil
	})
	return all, err
}

// ownTypesOf lists the columns of a schema's tables whose types lie in the schema too.
func ownTypesOf(ctx context.Context, q postgres.Querier, schema string) (map[string]map[string]string, error) {
	const query = `select c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod)
from pg_catalog.pg_class c join pg_catalog.pg_attribute a on a.attrelid = c.oid join pg_catalog.pg_type y on y.oid = a.atttypid
where ` + lies + ` and c.relkind = 'r' and y.typnamespace = c.relnamespace`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	all := map[string]map[string]string{}
	var name, column, of string
	_, err = pgx.ForEachRow(rows, []any{&name, &column, &of}, func() error {
		if all[name] == nil {
			all[name] = map[string]string{}
		}
		all[name][column] = of
		return nil
	})
	return all, err
}

// key is a table's primary key.
type key struct {
	columns []string
	types   string // with the columns' names, and without the schema's: what two keys must have in common
}

func keysOf(ctx context.Context, q postgres.Querier, schema string) (map[string]key, error) {
	const query = `select c.relname::text, array_agg(a.attname::text order by u.ord), string_agg(a.attname || ' ' ||
	case when y.typnamespace = c.relnamespace then '.' || y.typname else pg_catalog.format_type(a.atttypid, a.atttypmod) end, ', ' order by u.ord)
from pg_catalog.pg_constraint k join pg_catalog.pg_class c on c.oid = k.conrelid
cross join lateral unnest(k.conkey) with ordinality u (num, ord)
join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum = u.num join pg_catalog.pg_type y on y.oid = a.atttypid
where k.contype = 'p' and ` + lies + ` group by c.oid, c.relname`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	all := map[string]key{}
	var name string
	var k key
	_, err = pgx.ForEachRow(rows, []any{&name, &k.columns, &k.types}, func() error {
		all[name] = key{slices.Clone(k.columns), k.types}
		return nil
	})
	return all, err
}

// differences compares two schemas; which, which may be nil, picks the tables and says which of their rows.
func differences(ctx context.Context, tx *postgres.OwnerTx, live, beside string, which func([]compared) ([]compared, error)) ([]Difference, error) {
	// Of the extensions' types the operators; values as text are the same whatever the path.
	if err := tx.Script(ctx, plain+"; set local search_path to ext, pg_temp"); err != nil {
		return nil, err
	}
	tables, err := comparable(ctx, tx, live, beside)
	if err != nil {
		return nil, err
	}
	if which != nil {
		if tables, err = which(tables); err != nil {
			return nil, err
		}
	}
	all := make([]Difference, 0, len(tables))
	for _, c := range tables {
		d := Difference{Table: c.name}
		if err := tx.QueryRow(ctx, c.sql(live, beside)).Scan(&d.Added, &d.Removed, &d.Changed, &d.Same); err != nil {
			return nil, fmt.Errorf("compare table %s: %w", c.name, err)
		}
		all = append(all, d)
	}
	return all, nil
}

// sql counts the rows that are added, removed, changed and the same. Rows are compared by the digest of their text: not every
// type can be compared, and not every row fits a hash table.
func (c compared) sql(live, beside string) string {
	where := ""
	if c.only != "" {
		where = " where " + c.only
	}
	side := func(schema string) string {
		return postgres.Quote(schema) + "." + postgres.Quote(c.name) + " t" + where
	}
	switch {
	case !c.live:
		return "select count(*), 0::bigint, 0::bigint, 0::bigint from " + side(beside)
	case !c.beside:
		return "select 0::bigint, count(*), 0::bigint, 0::bigint from " + side(live)
	case len(c.key) == 0:
		one := func(schema string) string {
			return "select " + c.digest() + " as v, count(*) as n from " + side(schema) + " group by 1"
		}
		return `select coalesce(sum(greatest(coalesce(b.n, 0) - coalesce(l.n, 0), 0)), 0)::bigint, coalesce(sum(greatest(coalesce(l.n, 0) - coalesce(b.n, 0), 0)), 0)::bigint,
	0::bigint, coalesce(sum(least(l.n, b.n)) filter (where l.n is not null and b.n is not null), 0)::bigint
from (` + one(live) + `) l full join (` + one(beside) + `) b on b.v = l.v`
	}
	one := func(schema string) string {
		from := c
		if schema == live {
			from.values = nil
		}
		list := from.digest() + " as v"
		for i, k := range c.key {
			as := "" // what is the same in two schemas has two types
			if c.own[k] != "" {
				as = "::text"
			}
			list += fmt.Sprintf(", t.%s%s as k%d", postgres.Quote(k), as, i)
		}
		return "select " + list + " from " + side(schema)
	}
	on := make([]string, len(c.key))
	for i := range c.key {
		on[i] = fmt.Sprintf("b.k%d = l.k%d", i, i)
	}
	return `select count(*) filter (where l.v is null), count(*) filter (where b.v is null), count(*) filter (where b.v <> l.v), count(*) filter (where b.v = l.v)
from (` + one(live) + `) l full join (` + one(beside) + `) b on ` + strings.Join(on, " and ")
}

// digest is that of the values of a row t.
func (c compared) digest() string {
	return "pg_catalog.sha256(pg_catalog.convert_to(" + c.row("t") + ", 'UTF8'))"
}

// row is a row's values as text.
func (c compared) row(alias string) string {
	quoted := make([]string, len(c.columns))
	for i, column := range c.columns {
		quoted[i] = alias + "." + postgres.Quote(column)
		if v := c.values[column]; v != "" && alias == "t" {
			quoted[i] = v
		}
	}
	return "row(" + strings.Join(quoted, ", ") + ")::text"
}

// ownArchive refuses another tenant's archive, unless foreign says that it is meant.
func ownArchive(h archive.Header, t tenant.Tenant, foreign bool) error {
	if h.Tenant == t.ID || foreign {
		return nil
	}
	return fault.New(fault.Conflict, "the archive is that of another tenant: %s, %s", h.Slug, h.Tenant).WithCode("other_tenant").
		WithTenant(t.Slug.String()).WithHint("make a tenant of it: oneo tenant import FILE --as NAME; --force restores it here all the same")
}
