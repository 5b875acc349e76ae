package lint

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

// catalog is what the migrations read so far have made, as far as the rules ask for it.
type catalog struct {
	tables    map[string]*table
	indexes   map[string]index
	functions map[string]string // name -> immutable, stable or volatile
}

type table struct {
	columns map[string]column
	checks  map[string]check
	// madeBy is the number of the file that made it.
	madeBy int
}

type column struct {
	typ     typ
	notNull bool
}

// check is a constraint that may still have to be validated.
type check struct {
	notNull   []string // columns that it forbids to be null
	validated bool
	addedBy   int
}

type index struct {
	table   string
	columns []string
}

// typ is a type as far as a change of it matters: its name without a schema, and its bounds.
type typ struct {
	name  string
	mods  []int
	array bool
	// collated: it has a collation of its own.
	collated bool
}

func newCatalog() *catalog {
	return &catalog{tables: map[string]*table{}, indexes: map[string]index{}, functions: map[string]string{}}
}

// relation is a table's name without its schema.
func relation(n node, key string) string { return str(sub(n, key), "relname") }

// table returns a table, also one that no migration read so far has made.
func (c *catalog) table(name string) *table {
	t := c.tables[name]
	if t == nil {
		t = &table{columns: map[string]column{}, checks: map[string]check{}, madeBy: -1}
	}
	return t
}

// apply notes what a statement of the file with this number makes and changes.
func (c *catalog) apply(s statement, file int) {
	n := s.node
	switch s.kind {
	case "CreateStmt":
		t := c.make(relation(n, "relation"), file)
		if t == nil {
			return
		}
		for _, e := range list(n, "tableElts") {
			switch kind, el := unwrap(e); kind {
			case "ColumnDef":
				t.addColumn(el, file)
			case "Constraint":
				t.addConstraint(el, file)
			}
		}
	case "CreateTableAsStmt":
		c.make(relation(sub(n, "into"), "rel"), file)
	case "ViewStmt":
		c.make(relation(n, "view"), file)
	case "IndexStmt":
		ix := index{table: relation(n, "relation")}
		for _, p := range list(n, "indexParams") {
			_, el := unwrap(p)
			ix.columns = append(ix.columns, str(el, "name"))
		}
		c.indexes[str(n, "idxname")] = ix
	case "CreateFunctionStmt":
		if name := words(list(n, "funcname")); len(name) > 0 {
			volatility := "volatile"
			if v, ok := option(n, "options", "volatility"); ok {
				volatility = str(sub(v, "arg"), "sval")
			}
			c.functions[name[len(name)-1]] = volatility
		}
	case "AlterTableStmt":
		c.alter(n, file)
	case "RenameStmt":
		c.rename(n)
	case "DropStmt":
		for _, o := range list(n, "objects") {
			_, l := unwrap(o)
			if name := words(list(l, "items")); len(name) > 0 {
				switch str(n, "removeType") {
				case "OBJECT_TABLE", "OBJECT_VIEW", "OBJECT_MATVIEW":
					delete(c.tables, name[len(name)-1])
				case "OBJECT_INDEX":
					delete(c.indexes, name[len(name)-1])
				}
			}
		}
	}
}

// make notes a new table or view. Nil: it is there already, as with "if not exists".
func (c *catalog) make(name string, file int) *table {
	if c.tables[name] != nil {
		return nil
	}
	c.tables[name] = &table{columns: map[string]column{}, checks: map[string]check{}, madeBy: file}
	return c.tables[name]
}

func (c *catalog) alter(n node, file int) {
	t := c.tables[relation(n, "relation")]
	if t == nil {
		return
	}
	for _, e := range list(n, "cmds") {
		_, cmd := unwrap(e)
		name := str(cmd, "name")
		switch str(cmd, "subtype") {
		case "AT_AddColumn":
			t.addColumn(sub(cmd, "def"), file)
		case "AT_DropColumn":
			delete(t.columns, name)
			maps.DeleteFunc(t.checks, func(_ string, k check) bool { return slices.Contains(k.notNull, name) })
		case "AT_AlterColumnType":
			col := t.columns[name]
			col.typ = typeOf(sub(cmd, "def"))
			t.columns[name] = col
		case "AT_SetNotNull":
			t.setNotNull(name, true)
		case "AT_DropNotNull":
			t.setNotNull(name, false)
		case "AT_AddConstraint":
			t.addConstraint(sub(cmd, "def"), file)
		case "AT_ValidateConstraint":
			if k, ok := t.checks[name]; ok {
				k.validated = true
				t.checks[name] = k
			}
		case "AT_DropConstraint":
			delete(t.checks, name)
		}
	}
}

func (c *catalog) rename(n node) {
	from, to := relation(n, "relation"), str(n, "newname")
	switch str(n, "renameType") {
	case "OBJECT_TABLE":
		if t := c.tables[from]; t != nil {
			delete(c.tables, from)
			c.tables[to] = t
		}
	case "OBJECT_COLUMN":
		t := c.tables[from]
		if t == nil {
			return
		}
		old := str(n, "subname")
		if col, ok := t.columns[old]; ok {
			delete(t.columns, old)
			t.columns[to] = col
		}
		for name, k := range t.checks {
			k.notNull = slices.Clone(k.notNull)
			for i := range k.notNull {
				if k.notNull[i] == old {
					k.notNull[i] = to
				}
			}
			t.checks[name] = k
		}
	case "OBJECT_INDEX":
		if ix, ok := c.indexes[from]; ok {
			delete(c.indexes, from)
			c.indexes[to] = ix
		}
	case "OBJECT_TABCONSTRAINT":
		if t := c.tables[from]; t != nil {
			if k, ok := t.checks[str(n, "subname")]; ok {
				delete(t.checks, str(n, "subname"))
				t.checks[to] = k
			}
		}
	}
}

func (t *table) setNotNull(name string, is bool) {
	col := t.columns[name]
	col.notNull = is
	t.columns[name] = col
}

func (t *table) addColumn(def node, file int) {
	name := str(def, "colname")
	col := column{typ: typeOf(def)}
	for _, e := range list(def, "constraints") {
		_, k := unwrap(e)
		switch str(k, "contype") {
		case "CONSTR_NOTNULL", "CONSTR_PRIMARY", "CONSTR_IDENTITY":
			col.notNull = true
		case "CONSTR_CHECK":
			t.addConstraint(k, file)
		}
	}
	t.columns[name] = col
}

func (t *table) addConstraint(k node, file int) {
	switch str(k, "contype") {
	case "CONSTR_PRIMARY":
		for _, name := range words(list(k, "keys")) {
			t.setNotNull(name, true)
		}
		return
	case "CONSTR_CHECK", "CONSTR_FOREIGN":
	default:
		return
	}
	c := check{validated: !flag(k, "skip_validation"), addedBy: file}
	if str(k, "contype") == "CONSTR_CHECK" {
		c.notNull = notNulls(k["raw_expr"])
	}
	name := str(k, "conname")
	if name == "" { // it has no name by which a later statement could be understood
		name = "?" + strconv.Itoa(len(t.checks))
	}
	t.checks[name] = c
}

// forbidsNull reports whether a validated constraint says that a column is not null.
func (t *table) forbidsNull(name string) bool {
	for k := range maps.Values(t.checks) {
		if k.validated && slices.Contains(k.notNull, name) {
			return true
		}
	}
	return t.columns[name].notNull
}

// notNulls are the columns that an expression forbids to be null: "a is not null", also as a part of "... and ...".
func notNulls(v any) []string {
	switch kind, n := unwrap(v); kind {
	case "NullTest":
		argKind, arg := unwrap(n["arg"])
		if w := words(list(arg, "fields")); argKind == "ColumnRef" && len(w) > 0 && str(n, "nulltesttype") == "IS_NOT_NULL" {
			return w[len(w)-1:]
		}
	case "BoolExpr":
		var all []string
		if str(n, "boolop") == "AND_EXPR" {
			for _, a := range list(n, "args") {
				all = append(all, notNulls(a)...)
			}
		}
		return all
	}
	return nil
}

// typeOf is the type in a column's definition.
func typeOf(def node) typ {
	tn := sub(def, "typeName")
	t := typ{array: len(list(tn, "arrayBounds")) > 0, collated: def["collClause"] != nil}
	if names := words(list(tn, "names")); len(names) > 0 {
		t.name = names[len(names)-1]
	}
	for _, m := range list(tn, "typmods") {
		_, c := unwrap(m)
		t.mods = append(t.mods, num(sub(c, "ival"), "ival"))
	}
	return t
}

// String is the type as people write it.
func (t typ) String() string {
	name := map[string]string{"int2": "smallint", "int4": "integer", "int8": "bigint", "bool": "boolean", "bpchar": "char", "float8": "double precision"}[t.name]
	if name == "" {
		name = t.name
	}
	if t.array {
		name += "[]"
	}
	return name
}

// keepsRows reports whether PostgreSQL changes a column from one type to the other without writing the table anew.
func keepsRows(from, to typ) bool {
	if from.array != to.array || from.name == "" || to.collated {
		return false
	}
	bound := func(i int) (old, neu int, lifted bool) {
		if len(to.mods) <= i {
			return 0, 0, true
		}
		if len(from.mods) <= i {
			return 0, 0, false
		}
		return from.mods[i], to.mods[i], false
	}
	if from.name != to.name {
		unbounded := len(to.mods) == 0
		switch from.name + " " + to.name {
		case "varchar text", "xml text", "cidr inet":
			return true
		case "text varchar", "xml varchar":
			return unbounded
		}
		return false
	}
	if slices.Equal(from.mods, to.mods) {
		return true
	}
	old, neu, lifted := bound(0)
	switch from.name {
	case "varchar", "varbit", "time", "timetz", "timestamp", "timestamptz":
		return lifted || len(from.mods) > 0 && neu >= old
	case "numeric":
		if lifted {
			return true
		}
		scale := func(mods []int) int {
			if len(mods) > 1 {
				return mods[1]
			}
			return 0
		}
		return len(from.mods) > 0 && neu >= old && scale(from.mods) == scale(to.mods)
	case "interval":
		return lifted
	}
	return false
}

// volatileFunctions are functions of PostgreSQL and its usual extensions whose answer differs from row to row.
var volatileFunctions = map[string]bool{
	"random": true, "random_normal": true, "gen_random_uuid": true, "uuidv4": true, "uuidv7": true, "clock_timestamp": true, "timeofday": true,
	"nextval": true, "setval": true, "gen_salt": true, "gen_random_bytes": true, "uuid_generate_v1": true, "uuid_generate_v1mc": true,
	"uuid_generate_v4": true, "pg_sleep": true,
}

// volatile names the first function in an expression that may answer otherwise for each row: then the expression is
// worked out for each of them.
func (c *catalog) volatile(expr any) (name string) {
	walk(expr, func(kind string, n node) bool {
		if kind == "FuncCall" && name == "" {
			if w := words(list(n, "funcname")); len(w) > 0 {
				last := w[len(w)-1]
				own, known := c.functions[last]
				// What stands in ext is not read here, and a function is volatile unless it says otherwise.
				if volatileFunctions[last] || known && own == "volatile" || !known && len(w) > 1 && w[0] == "ext" {
					name = strings.Join(w, ".")
				}
			}
		}
		return name == ""
	})
	return name
}

// option finds one of a statement's options.
func option(n node, field, name string) (node, bool) {
	for _, e := range list(n, field) {
		if _, d := unwrap(e); str(d, "defname") == name {
			return d, true
		}
	}
	return nil, false
}
