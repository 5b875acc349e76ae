package lint

import (
	"maps"
	"strings"
)

// names looks for what leaves the tenant, and for stars.
func (c *checker) names(s statement) {
	c.statementNames(s)
	if c.scope != Tenant {
		return
	}
	c.walkNames(s.node, c.body || s.kind == "ViewStmt" || s.kind == "CreateTableAsStmt" || s.kind == "CreateFunctionStmt" || isData(s.kind))
}

// walkNames looks at every name below v, and at stars where they are forbidden.
func (c *checker) walkNames(v any, stars bool) {
	crossed := map[string]bool{}
	walk(v, func(kind string, n node) bool {
		switch kind {
		case "RangeVar":
			if schema := str(n, "schemaname"); schema != "" && !crossed[schema+"."+str(n, "relname")] {
				c.qualified(schema, str(n, "relname"), c.line(n))
			}
		case "TypeName":
			c.qualifiedWords(words(list(n, "names")), c.line(n))
		case "Constraint":
			if schema := str(sub(n, "pktable"), "schemaname"); schema != "" && schema != c.place {
				crossed[schema+"."+relation(n, "pktable")] = true
				c.add(ruleCrossKey, c.line(n), "a foreign key to %s.%s, which is another schema's", schema, relation(n, "pktable"))
			}
		case "ColumnRef":
			c.columnRef(n, stars)
		case "FuncCall":
			w, args := words(list(n, "funcname")), list(n, "args")
			c.qualifiedWords(w, c.line(n))
			if len(w) > 0 && len(args) > 0 && tableFunctions[w[len(w)-1]] {
				c.literal(args[0], c.line(n))
			}
		case "TypeCast":
			if name := words(list(sub(n, "typeName"), "names")); len(name) > 0 && strings.HasPrefix(name[len(name)-1], "reg") {
				c.literal(n["arg"], c.line(n))
			}
		case "SubLink":
			c.qualifiedWords(words(list(n, "operName")), c.line(n))
			if str(n, "subLinkType") == "EXISTS_SUBLINK" {
				// What its list of columns says does not matter, so it may be a star.
				_, query := unwrap(n["subselect"])
				c.walkNames(query["targetList"], false) // names in it do: an aggregate has it computed
				query = maps.Clone(query)
				delete(query, "targetList")
				c.walkNames(query, stars)
				return false
			}
		default:
			for _, field := range []string{"objname", "defnames", "domainname", "typeName", "opclass", "collname", "collation", "name", "useOp", "method"} {
				c.qualifiedWords(words(list(n, field)), c.line(n))
			}
		}
		return true
	})
}

func isData(kind string) bool {
	return kind == "InsertStmt" || kind == "UpdateStmt" || kind == "DeleteStmt" || kind == "MergeStmt"
}

// columnRef looks at schema.table.column and, where that matters, at stars.
func (c *checker) columnRef(n node, stars bool) {
	fields := list(n, "fields")
	if len(fields) == 0 {
		return
	}
	if kind, _ := unwrap(fields[len(fields)-1]); kind == "A_Star" {
		if stars {
			c.add(ruleStar, c.line(n), "all columns, whichever they are when it runs")
		}
		fields = fields[:len(fields)-1]
		if len(fields) < 2 {
			return
		}
	} else if len(fields) < 3 {
		return
	}
	if w := words(fields); len(w) > 1 && w[0] != "new" && w[0] != "old" && w[0] != "excluded" {
		c.qualified(w[0], w[1], c.line(n))
	}
}

// own are the schemas that a statement may name.
func (c *checker) own(schema string) bool {
	return schema == "ext" || schema == "pg_catalog" || schema == "pg_temp" || schema == c.place && c.place != ""
}

func (c *checker) qualified(schema, name string, line int) {
	if !c.own(schema) {
		c.add(ruleForeign, line, "%s.%s names a schema: the statement leaves the tenant", schema, name)
	}
}

func (c *checker) qualifiedWords(w []string, line int) {
	if len(w) > 1 {
		c.qualified(w[len(w)-2], w[len(w)-1], line)
	}
}

// tableFunctions take a table's or sequence's name as text.
var tableFunctions = map[string]bool{
	"nextval": true, "currval": true, "setval": true, "to_regclass": true, "to_regtype": true, "to_regproc": true, "pg_get_serial_sequence": true,
	"pg_relation_size": true, "pg_total_relation_size": true, "table_to_xml": true,
}

// literal looks at a text that names a table.
func (c *checker) literal(v any, line int) {
	text, ok := constant(v)
	if !ok {
		return
	}
	if text != "" && strings.Trim(text, "0123456789") == "" {
		c.add(ruleForeign, line, "'%s' is an object's number, whose it may be", text)
	}
	// A database may be called as the schema is: what stands before the last dot counts.
	if w := dots(text); len(w) > 1 {
		c.qualified(strings.Join(w[:len(w)-1], "."), w[len(w)-1], line)
	}
}

// dots cuts a name at the dots that are not in quotes, and takes the quotes off.
func dots(name string) (w []string) {
	quoted := false
	w = strings.FieldsFunc(name, func(r rune) bool {
		quoted = quoted != (r == '"')
		return r == '.' && !quoted
	})
	for i := range w {
		w[i] = strings.Trim(w[i], `"`)
	}
	return w
}

// statementNames looks at what the statement itself makes, changes and sets.
func (c *checker) statementNames(s statement) {
	n := s.node
	for _, target := range targets(s) {
		switch schema := target[0]; {
		case schema == "ext" || schema == "pg_catalog":
			c.add(ruleForeign, c.at, "it makes or changes %s.%s, which all tenants share", schema, target[1])
		case schema != "":
			c.qualified(schema, target[1], c.at)
		}
	}
	// The statement itself is no node that walkNames is told the kind of.
	if s.kind == "CreateFunctionStmt" || s.kind == "CreateTrigStmt" {
		c.qualifiedWords(words(list(n, "funcname")), c.at)
	}
	switch s.kind {
	case "CreateSchemaStmt":
		c.add(ruleSchema, c.at, "it makes the schema %s", str(n, "schemaname"))
	case "AlterObjectSchemaStmt":
		c.add(ruleSchema, c.at, "it moves something into the schema %s", str(n, "newschema"))
	case "CreateExtensionStmt", "AlterExtensionStmt", "AlterExtensionContentsStmt":
		c.add(ruleExtension, c.at, "it makes or changes the extension %s", str(n, "extname"))
	case "CreateEnumStmt", "CompositeTypeStmt", "CreateDomainStmt", "CreateRangeStmt", "AlterEnumStmt", "AlterDomainStmt", "AlterTypeStmt":
		c.add(ruleType, c.at, "it makes or changes a type of the tenant's own")
	case "DefineStmt":
		if str(n, "kind") == "OBJECT_TYPE" {
			c.add(ruleType, c.at, "it makes a type of the tenant's own")
		}
	case "AlterTableStmt":
		if str(n, "objtype") == "OBJECT_TYPE" {
			c.add(ruleType, c.at, "it changes a type of the tenant's own")
		}
		for _, e := range list(n, "cmds") {
			if _, cmd := unwrap(e); str(cmd, "subtype") == "AT_ChangeOwner" {
				c.add(ruleRights, c.at, "it changes an owner")
			}
		}
	case "GrantStmt", "GrantRoleStmt", "AlterDefaultPrivilegesStmt", "CreateRoleStmt", "AlterRoleStmt", "AlterRoleSetStmt", "DropRoleStmt",
		"AlterOwnerStmt", "ReassignOwnedStmt", "DropOwnedStmt", "SecLabelStmt":
		c.add(ruleRights, c.at, "it changes roles, rights or owners")
	case "CreatedbStmt", "DropdbStmt", "AlterDatabaseStmt", "AlterDatabaseSetStmt", "AlterDatabaseRefreshCollStmt", "AlterSystemStmt",
		"CreateTableSpaceStmt", "DropTableSpaceStmt", "AlterTableSpaceOptionsStmt", "AlterTableMoveAllStmt", "CreatePublicationStmt",
		"AlterPublicationStmt", "CreateSubscriptionStmt", "AlterSubscriptionStmt", "DropSubscriptionStmt", "CreateEventTrigStmt",
		"AlterEventTrigStmt", "CreateFdwStmt", "AlterFdwStmt", "CreateForeignServerStmt", "AlterForeignServerStmt", "CreateForeignTableStmt",
		"CreateUserMappingStmt", "AlterUserMappingStmt", "DropUserMappingStmt", "ImportForeignSchemaStmt", "CreatePlangStmt", "CreateAmStmt",
		"CreateCastStmt", "CreateTransformStmt", "CheckPointStmt":
		c.add(ruleOutside, c.at, "it changes what all tenants share")
	case "DropStmt":
		c.drop(n)
	case "RenameStmt":
		switch str(n, "renameType") {
		case "OBJECT_SCHEMA":
			c.add(ruleSchema, c.at, "it renames the schema %s", str(n, "subname"))
		case "OBJECT_ROLE":
			c.add(ruleRights, c.at, "it renames a role")
		case "OBJECT_TYPE", "OBJECT_DOMAIN", "OBJECT_ATTRIBUTE":
			c.add(ruleType, c.at, "it renames a type of the tenant's own, or a part of it")
		case "OBJECT_DATABASE", "OBJECT_TABLESPACE", "OBJECT_PUBLICATION", "OBJECT_SUBSCRIPTION", "OBJECT_FDW", "OBJECT_FOREIGN_SERVER", "OBJECT_EVENT_TRIGGER", "OBJECT_LANGUAGE":
			c.add(ruleOutside, c.at, "it changes what all tenants share")
		}
	case "CreateFunctionStmt":
		c.pinned(n, "options")
	case "AlterFunctionStmt":
		c.pinned(n, "actions")
	}
}

// drop looks at what a statement drops that is not the tenant's alone, or a type.
func (c *checker) drop(n node) {
	switch what := str(n, "removeType"); what {
	case "OBJECT_SCHEMA":
		c.add(ruleSchema, c.at, "it drops a schema")
	case "OBJECT_EXTENSION":
		c.add(ruleExtension, c.at, "it drops an extension")
	case "OBJECT_TYPE", "OBJECT_DOMAIN":
		c.add(ruleType, c.at, "it drops a type of the tenant's own")
	case "OBJECT_PUBLICATION", "OBJECT_EVENT_TRIGGER", "OBJECT_FDW", "OBJECT_FOREIGN_SERVER", "OBJECT_LANGUAGE", "OBJECT_CAST", "OBJECT_ACCESS_METHOD", "OBJECT_TRANSFORM":
		c.add(ruleOutside, c.at, "it drops what all tenants share")
	}
}

// pinned looks at a function's search path.
func (c *checker) pinned(n node, field string) {
	definer, pins := false, false
	for _, e := range list(n, field) {
		_, d := unwrap(e)
		switch str(d, "defname") {
		case "security":
			definer = flag(sub(d, "arg"), "boolval")
		case "set":
			v := sub(d, "arg")
			if str(v, "name") != "search_path" {
				continue
			}
			kind := str(v, "kind")
			pins = kind == "VAR_SET_VALUE" || kind == "VAR_SET_CURRENT"
			for _, a := range list(v, "args") {
				if schema, ok := constant(a); ok && schema != "" && !c.own(schema) && c.scope == Tenant {
					c.add(ruleSearchPath, c.line(d), "the function's search path names %s", schema)
				}
			}
		}
	}
	if definer && !pins {
		c.add(ruleDefiner, c.at, "a security definer function runs with its owner's rights along the caller's search path")
	}
}

// targets are the schema and name of what a statement makes or changes.
func targets(s statement) [][2]string {
	n := s.node
	var all [][2]string
	rel := func(field string) {
		if r := sub(n, field); str(r, "schemaname") != "" {
			all = append(all, [2]string{str(r, "schemaname"), str(r, "relname")})
		}
	}
	name := func(w []string) {
		if len(w) > 1 {
			all = append(all, [2]string{w[len(w)-2], w[len(w)-1]})
		}
	}
	switch s.kind {
	case "CreateFunctionStmt":
		name(words(list(n, "funcname")))
	case "CreateEnumStmt", "CreateRangeStmt", "AlterEnumStmt", "AlterTypeStmt", "AlterDomainStmt":
		name(words(list(n, "typeName")))
	case "CreateDomainStmt":
		name(words(list(n, "domainname")))
	case "CompositeTypeStmt":
		rel("typevar")
	case "DefineStmt", "CreateStatsStmt":
		name(words(list(n, "defnames")))
	case "AlterFunctionStmt":
		name(words(list(sub(n, "func"), "objname")))
	case "ViewStmt":
		rel("view")
	case "CreateSeqStmt", "AlterSeqStmt":
		rel("sequence")
	case "CreateStmt", "AlterTableStmt", "IndexStmt", "CreateTrigStmt", "RenameStmt", "InsertStmt", "UpdateStmt", "DeleteStmt":
		rel("relation")
	case "DropStmt":
		for _, o := range list(n, "objects") {
			all = append(all, dotted(str(n, "removeType"), o))
		}
	case "CommentStmt":
		all = append(all, dotted(str(n, "objtype"), n["object"]))
	}
	return all
}

// dotted is the schema and name of an object of a kind, in the forms in which drop and comment have them.
func dotted(what string, v any) [2]string {
	kind, n := unwrap(v)
	var w []string
	switch kind {
	case "List":
		w = words(list(n, "items"))
	case "TypeName":
		w = words(list(n, "names"))
	case "ObjectWithArgs":
		w = words(list(n, "objname"))
	}
	switch what { // these stand behind the name of their table
	case "OBJECT_TRIGGER", "OBJECT_RULE", "OBJECT_POLICY", "OBJECT_COLUMN", "OBJECT_TABCONSTRAINT":
		if len(w) > 0 {
			w = w[:len(w)-1]
		}
	}
	if len(w) < 2 {
		return [2]string{}
	}
	return [2]string{w[len(w)-2], w[len(w)-1]}
}

// session looks for transaction control and for what outlives the transaction.
func (c *checker) session(s statement) {
	n := s.node
	switch s.kind {
	case "TransactionStmt":
		c.add(ruleControl, c.at, "it begins, ends or divides a transaction")
	case "VariableSetStmt":
		name := str(n, "name")
		switch {
		case name == "search_path":
			c.add(ruleSearchPath, c.at, "it sets the search path, by which the tenant is bound")
		case name == "role" || name == "session_authorization":
			c.add(ruleRights, c.at, "it changes the role at work")
		case str(n, "kind") == "VAR_RESET_ALL":
			c.add(ruleSearchPath, c.at, "reset all takes the search path back, by which the tenant is bound")
		case !flag(n, "is_local") && name != "TRANSACTION":
			c.stays("set %s stays on the connection when the transaction has ended", name)
		}
	case "DiscardStmt":
		c.stays("discard takes away what the connection was set up with")
	case "PrepareStmt", "ListenStmt", "LoadStmt", "DeallocateStmt", "UnlistenStmt":
		c.stays("it changes the connection, which the next tenant uses")
	case "DeclareCursorStmt":
		const hold = 0x0020
		if num(n, "options")&hold != 0 {
			c.stays("a cursor with hold outlives the transaction")
		}
	case "CreateStmt":
		if str(sub(n, "relation"), "relpersistence") == "t" && str(n, "oncommit") != "ONCOMMIT_DROP" {
			c.stays("the temporary table %s stays on the connection: for the next tenant it exists already", relation(n, "relation"))
		}
	case "CreateTableAsStmt":
		into := sub(n, "into")
		if str(sub(into, "rel"), "relpersistence") == "t" && str(into, "onCommit") != "ONCOMMIT_DROP" {
			c.stays("the temporary table %s stays on the connection: for the next tenant it exists already", relation(into, "rel"))
		}
	}
	walk(n, func(kind string, n node) bool {
		if kind != "FuncCall" {
			return true
		}
		w := words(list(n, "funcname"))
		if len(w) == 0 {
			return true
		}
		switch name := w[len(w)-1]; name {
		case "set_config":
			args := list(n, "args")
			if len(args) != 3 {
				return true
			}
			what, _ := constant(args[0])
			if strings.EqualFold(what, "search_path") {
				c.add(ruleSearchPath, c.line(n), "it sets the search path, by which the tenant is bound")
			} else if isFalse(args[2]) {
				c.stays("set_config(..., false) stays on the connection when the transaction has ended")
			}
		case "pg_advisory_lock", "pg_advisory_lock_shared", "pg_try_advisory_lock", "pg_try_advisory_lock_shared":
			c.stays("%s is held until the connection ends; pg_advisory_xact_lock is not", name)
		}
		return true
	})
}

// stays notes what outlives a transaction. A file without one has a connection of its own, which is closed behind it.
func (c *checker) stays(format string, args ...any) {
	if c.inTx() {
		c.add(ruleSession, c.at, format, args...)
	}
}

// isFalse reports the constant false.
func isFalse(v any) bool {
	kind, n := unwrap(v)
	if kind == "TypeCast" {
		return isFalse(n["arg"])
	}
	b := sub(n, "boolval")
	return kind == "A_Const" && n["boolval"] != nil && !flag(b, "boolval")
}

// bodies looks into the functions and blocks that a statement holds.
func (c *checker) bodies(s statement) {
	var field, what string
	switch s.kind {
	case "CreateFunctionStmt":
		field, what = "options", "the function"
	case "DoStmt":
		field, what = "args", "the block"
	default:
		return
	}
	language := "plpgsql"
	if d, ok := option(s.node, field, "language"); ok {
		language = strings.ToLower(str(sub(d, "arg"), "sval"))
	} else if s.kind == "CreateFunctionStmt" {
		language = "sql"
	}
	as, ok := option(s.node, field, "as")
	if !ok {
		return // the standard's form: the tree has the body
	}
	text := str(sub(as, "arg"), "sval")
	if items := words(list(sub(as, "arg"), "items")); len(items) == 1 {
		text = items[0]
	}
	in := *c
	in.outer = append(append([]int{}, c.outer...), c.at)
	in.body = s.kind != "DoStmt" || c.body
	// The literal begins on this line, and so does the body's first one.
	begin := c.src.lineOf(c.src.stringAfter(num(as, "location")))
	switch language {
	case "sql":
		in.src = newSource(text, begin)
		in.longNames()
		stmts, bad := statements(in.src)
		for _, u := range bad {
			in.at = u.statement
			in.add(ruleSyntax, u.line, "PostgreSQL's parser cannot read this: %s", u.message)
		}
		for _, st := range stmts {
			in.statement(st)
		}
	case "plpgsql":
		// The parser reads a whole statement.
		start := s.start
		end := len(c.src.text)
		if next := c.src.semicolonAfter(start); next > start {
			end = next
		}
		b, err := readPL(c.src.text[start:end])
		if err != nil {
			c.add(ruleUnseen, c.at, "the body of %s cannot be read: %s", what, err)
			return
		}
		in.pl(b, begin, what)
	default:
		c.add(ruleUnseen, c.at, "the body of %s is written in %s, which is not read", what, language)
	}
}

// pl looks at the parts of a body in PL/pgSQL that begins on a line of the file.
func (c *checker) pl(b plBody, begin int, what string) {
	for _, line := range b.dynamic {
		c.at = begin + line - 1
		c.add(ruleUnseen, c.at, "%s runs SQL that it puts together: it is not read here", what)
	}
	for _, line := range b.control {
		c.at = begin + line - 1
		if !c.body && c.file.Kind != NoTransaction {
			c.add(ruleControl, c.at, "it begins, ends or divides a transaction")
		}
	}
	for _, t := range b.types {
		name, _, _ := strings.Cut(t.text, "%")
		schema, rest, found := strings.Cut(name, ".")
		// table.column%type has a dot of its own.
		if found && (!strings.HasSuffix(t.text, "%type") || strings.Contains(rest, ".")) && c.scope == Tenant {
			c.at = begin + t.line - 1
			c.qualified(strings.Trim(schema, `"`), rest, c.at)
		}
	}
	for _, q := range b.queries {
		in := *c
		in.src = newSource(q.text, begin+q.line-1)
		in.body = c.body || !q.runs
		stmts, _ := statements(in.src) // PL/pgSQL's own parser has read it
		for _, st := range stmts {
			in.statement(st)
		}
	}
}
