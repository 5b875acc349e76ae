package transfer

import (
	"context"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/mask"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// Personal is what a product's tables are known to hold of people. Columns of tables that are not there are passed over.
type Personal struct {
	Columns   []Column
	Documents []Document
	// Harmless are tables that hold nothing of people: nobody is told of them.
	Harmless []string
	// Left are texts that may hold anything, for a person: "contacts.notes".
	Left []string
}

// Column is a column whose values are about people.
type Column struct {
	Table, Name string
	Kind        mask.Kind
}

// Document is a column of JSON objects whose members are about people, which ones depending on the row.
type Document struct {
	Table, Name string
	// By is the column that says which Members a row's object has; Named is what people call its values.
	By      string
	Members map[string]map[string]mask.Kind // value of By -> member -> kind
	Named   map[string]string
}

// Masking is what was masked, and what may be about people and was not: each as "table.column (kind)".
type Masking struct {
	Masked, Left []string
}

// masked is how the rows of one table are changed.
type masked struct {
	texts, jsons map[string]mask.Kind // by column
	padded       map[string]bool      // columns whose values are filled up with blanks that do not count
	documents    []Document
}

// markForm is how a column's comment says what the column holds of people.
var markForm = regexp.MustCompile(`(?:^|\s)oneo:mask=(\S+)`)

// place is a column.
type place struct{ table, column string }

func (p place) String() string { return p.table + "." + p.column }

// maskable are the types whose values can be replaced.
var (
	textTypes = []string{"text", "varchar", "bpchar", "citext"}
	jsonTypes = []string{"json", "jsonb"}
)

// masking finds out which columns are about people: what the product says, what the columns' comments say, and what a foreign key
// ties to one of these. Invalid: nothing is, so that a masked copy would not be one.
func (x *Transfers) masking(ctx context.Context, ses *postgres.Session, at structure.Schema) (all map[string]*masked, told Masking, err error) {
	var p Personal
	if x.o.Personal != nil {
		if err := ses.Script(ctx, "set local search_path to "+postgres.Quote(at.Name)+", ext, pg_temp"); err != nil {
			return nil, told, err
		}
		if p, err = x.o.Personal(ctx, ses); err != nil {
			return nil, told, err
		}
		if err := ses.Script(ctx, plain); err != nil {
			return nil, told, err
		}
	}
	types, limits, kinds, unknown, err := marks(ctx, ses, at.Name)
	if err != nil {
		return nil, told, err
	}
	told.Left = slices.Concat(p.Left, unknown)
	for _, c := range p.Columns {
		at := place{c.Table, c.Name}
		if _, said := kinds[at]; !said && types[at] != "" {
			kinds[at] = c.Kind
		}
	}
	if err := alongKeys(ctx, ses, at.Name, kinds); err != nil {
		return nil, told, err
	}
	all = map[string]*masked{}
	of := func(table string) *masked {
		if all[table] == nil {
			all[table] = &masked{texts: map[string]mask.Kind{}, jsons: map[string]mask.Kind{}, padded: map[string]bool{}}
		}
		return all[table]
	}
	for at, k := range kinds {
		switch word := fmt.Sprintf("%s (%s)", at, k); {
		case k == none || types[at] == "": // of a partitioned table: its partitions have the rows
		case slices.Contains(textTypes, types[at]):
			if most := limits[at]; most > 0 && most < mask.Longest(k) {
				return nil, told, fault.New(fault.Invalid, "%s holds at most %d characters, and masked as %s it has up to %d", at, most, k, mask.Longest(k)).
					WithCode("mask_too_long").WithHint("make the column wider, or give it another mark")
			}
			of(at.table).texts[at.column], of(at.table).padded[at.column] = k, types[at] == "bpchar"
			told.Masked = append(told.Masked, word)
		case slices.Contains(jsonTypes, types[at]):
			of(at.table).jsons[at.column] = k
			told.Masked = append(told.Masked, word)
		default:
			told.Left = append(told.Left, fmt.Sprintf("%s (%s, of type %s)", at, k, types[at]))
		}
	}
	for _, d := range p.Documents {
		if types[place{d.Table, d.Name}] == "" || types[place{d.Table, d.By}] == "" {
			continue
		}
		of(d.Table).documents = append(of(d.Table).documents, d)
		for value, members := range d.Members {
			for member, k := range members {
				told.Masked = append(told.Masked, fmt.Sprintf("%s.%s (%s)", d.Named[value], member, k))
			}
		}
	}
	if len(told.Masked) == 0 {
		return nil, told, fault.New(fault.Invalid, "nothing in the tenant's tables is marked as personal").WithCode("nothing_to_mask").
			WithHint("mark columns in a migration: comment on column people.email is 'oneo:mask=email'; the kinds are %s", kindWords())
	}
	silent := map[string]bool{}
	for at, t := range types {
		if all[at.table] == nil && !slices.Contains(p.Harmless, at.table) && !slices.Contains(x.o.Volatile, at.table) &&
			(slices.Contains(textTypes, t) || slices.Contains(jsonTypes, t)) && kinds[at] != none {
			silent[at.table] = true
		}
	}
	for table := range silent {
		told.Left = append(told.Left, "table "+table)
	}
	slices.Sort(told.Masked)
	slices.Sort(told.Left)
	return all, told, nil
}

// none marks a column that is not about people.
const none mask.Kind = "none"

func kindWords() string {
	words := make([]string, len(mask.Kinds))
	for i, k := range mask.Kinds {
		words[i] = string(k)
	}
	return strings.Join(words, ", ")
}

// marks reads what the comments of columns say, and the types of those columns that are written. The comment of a
// partitioned table's column holds for its partitions. A limit is of characters, and 0 where there is none.
func marks(ctx context.Context, q postgres.Querier, schema string) (types map[place]string, limits map[place]int, kinds map[place]mask.Kind, unknown []string, err error) {
	const query = `select c.relname::text, a.attname::text, coalesce(pg_catalog.col_description(c.oid, a.attnum), (
	select pg_catalog.col_description(r.attrelid, r.attnum) from pg_catalog.pg_attribute r
	where r.attrelid = pg_catalog.pg_partition_root(c.oid) and r.attname = a.attname), ''),
	case when c.relkind = 'r' and a.attgenerated = '' then coalesce(b.typname, t.typname)::text else '' end,
	greatest(case when b.oid is null then a.atttypmod else t.typtypmod end - 4, 0)
from pg_catalog.pg_class c join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_catalog.pg_type t on t.oid = a.atttypid left join pg_catalog.pg_type b on b.oid = t.typbasetype
where ` + lies + ` and c.relkind in ('r', 'p')`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	types, limits, kinds = map[place]string{}, map[place]int{}, map[place]mask.Kind{}
	var at place
	var comment, typ string
	var limit int
	_, err = pgx.ForEachRow(rows, []any{&at.table, &at.column, &comment, &typ, &limit}, func() error {
		if typ != "" {
			types[at], limits[at] = typ, limit
		}
		m := markForm.FindStringSubmatch(comment)
		switch {
		case m == nil:
		case m[1] == string(none) || slices.Contains(mask.Kinds, mask.Kind(m[1])):
			kinds[at] = mask.Kind(m[1])
		case typ != "":
			unknown = append(unknown, fmt.Sprintf("%s (%s, which is no kind)", at, m[1]))
		}
		return nil
	})
	return types, limits, kinds, unknown, err
}

// alongKeys gives both ends of a foreign key the same kind: what refers to a masked value must go on referring to it.
func alongKeys(ctx context.Context, q postgres.Querier, schema string, kinds map[place]mask.Kind) error {
	const query = `select c.relname::text, a.attname::text, f.relname::text, b.attname::text
from pg_catalog.pg_constraint k join pg_catalog.pg_class c on c.oid = k.conrelid join pg_catalog.pg_class f on f.oid = k.confrelid,
	rows from (pg_catalog.unnest(k.conkey), pg_catalog.unnest(k.confkey)) as x (here, there),
	pg_catalog.pg_attribute a, pg_catalog.pg_attribute b
where k.contype = 'f' and ` + lies + `
	and a.attrelid = c.oid and a.attnum = x.here and b.attrelid = f.oid and b.attnum = x.there order by 1, 2, 3, 4`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return err
	}
	keys, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (k [2]place, err error) {
		return k, row.Scan(&k[0].table, &k[0].column, &k[1].table, &k[1].column)
	})
	if err != nil {
		return err
	}
	for again := true; again; {
		again = false
		for _, k := range keys {
			a, b := kinds[k[0]], kinds[k[1]]
			switch {
			case a == b:
			case a == "":
				kinds[k[0]], again = b, true
			case b == "":
				kinds[k[1]], again = a, true
			default:
				return fault.New(fault.Invalid, "%s is marked as %s, and %s, to which it refers, as %s", k[0], a, k[1], b).WithCode("masks_contradict").
					WithHint("give both the same mark")
			}
		}
	}
	return nil
}

// through takes the rows of a table as they are, and writes them to w masked.
func (d *masked) through(w io.Writer, m *mask.Masker, t table) io.WriteCloser {
	var steps []func(*mask.Row) error
	at := func(column string) int { return slices.Index(t.columns, column) }
	for _, column := range slices.Sorted(maps.Keys(d.texts)) {
		i, k, padded := at(column), d.texts[column], d.padded[column]
		steps = append(steps, func(r *mask.Row) error {
			if v, ok := r.Get(i); ok {
				if padded {
					v = strings.TrimRight(v, " ")
				}
				r.Set(i, m.Value(k, v))
			}
			return nil
		})
	}
	for _, column := range slices.Sorted(maps.Keys(d.jsons)) {
		i, k := at(column), d.jsons[column]
		steps = append(steps, func(r *mask.Row) error {
			v, ok := r.Get(i)
			if !ok {
				return nil
			}
			body, err := m.JSON(k, []byte(v))
			if err == nil {
				r.Set(i, string(body))
			}
			return err
		})
	}
	for _, doc := range d.documents {
		i, by := at(doc.Name), at(doc.By)
		steps = append(steps, func(r *mask.Row) error {
			v, ok := r.Get(i)
			which, known := r.Get(by)
			if !ok || !known {
				return nil
			}
			text, err := m.Document(doc.Members[which], v)
			if err == nil {
				r.Set(i, text)
			}
			return err
		})
	}
	return mask.Rows(w, func(r *mask.Row) error {
		if r.Len() != len(t.columns) {
			return fmt.Errorf("a row of %s has %d columns and not %d", t.name, r.Len(), len(t.columns))
		}
		for _, s := range steps {
			if err := s(r); err != nil {
				return err
			}
		}
		return nil
	})
}
