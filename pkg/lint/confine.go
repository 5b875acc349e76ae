package lint

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Confinement is where a statement that somebody else has written may work: one schema, which is the first of its search
// path, and the roles that have rights there.
type Confinement struct {
	Schema string
	Roles  []string // the owner's and the tenant's
}

// Check says why a statement might do anything else than make, change or drop an object of the schema; nil: it does not.
// It allows the kinds of statements that package structure writes and no other, one at a time. What it cannot read it refuses: SQL
// that is put together as it runs above all, because what a function does an index runs as it is built. The parser is loaded
// by the first call, which takes about a second.
func (p Confinement) Check(sql string) error {
	src := newSource(sql, 1)
	stmts, err := parse(src)
	if err != nil {
		return fmt.Errorf("PostgreSQL's parser cannot read it: %w", err)
	}
	if len(stmts) != 1 {
		return fmt.Errorf("it is %d statements", len(stmts))
	}
	var found []Finding
	c := confined{checker: checker{scope: Tenant, cat: newCatalog(), file: File{Kind: Transactional}, found: &found, src: src, at: 1, place: p.Schema}, p: p}
	c.outermost(stmts[0])
	for _, f := range found {
		if confining[f.Rule] {
			c.refuse("%s", f.Message)
		}
	}
	if len(c.refused) > 0 {
		return errors.New(c.refused[0])
	}
	return nil
}

// confining are the rules whose findings leave the schema, or might.
var confining = map[string]bool{
	ruleSyntax: true, ruleUnseen: true, ruleForeign: true, ruleCrossKey: true, ruleSearchPath: true, ruleSchema: true, ruleOutside: true, ruleExtension: true,
	ruleDefiner: true, ruleControl: true, ruleSession: true,
}

// confined looks at one statement.
type confined struct {
	checker
	p       Confinement
	refused []string
}

func (c *confined) refuse(format string, args ...any) {
	c.refused = append(c.refused, fmt.Sprintf(format, args...))
}

// makes are the kinds of statements that may stand by themselves.
var makes = map[string]bool{
	"CreateStmt": true, "CreateSeqStmt": true, "IndexStmt": true, "ViewStmt": true, "CreateTableAsStmt": true, "CreateFunctionStmt": true, "CreateTrigStmt": true,
	"RuleStmt": true, "CreatePolicyStmt": true, "CreateEnumStmt": true, "CompositeTypeStmt": true, "CreateDomainStmt": true, "CreateRangeStmt": true, "CreateStatsStmt": true,
	"AlterTableStmt": true, "AlterSeqStmt": true, "AlterEnumStmt": true, "AlterDomainStmt": true, "AlterStatsStmt": true, "AlterOwnerStmt": true, "RenameStmt": true,
	"CommentStmt": true, "GrantStmt": true, "AlterDefaultPrivilegesStmt": true, "DropStmt": true,
}

// works are the kinds of statements that may stand in a function, a rule or a view.
var works = map[string]bool{"SelectStmt": true, "InsertStmt": true, "UpdateStmt": true, "DeleteStmt": true, "MergeStmt": true, "CallStmt": true, "ReturnStmt": true}

// holdings are the kinds of objects that lie in a schema.
var holdings = map[string]bool{
	"OBJECT_TABLE": true, "OBJECT_COLUMN": true, "OBJECT_SEQUENCE": true, "OBJECT_INDEX": true, "OBJECT_VIEW": true, "OBJECT_MATVIEW": true, "OBJECT_FUNCTION": true,
	"OBJECT_PROCEDURE": true, "OBJECT_TRIGGER": true, "OBJECT_RULE": true, "OBJECT_POLICY": true, "OBJECT_TYPE": true, "OBJECT_DOMAIN": true, "OBJECT_STATISTIC_EXT": true,
	"OBJECT_TABCONSTRAINT": true, "OBJECT_DOMCONSTRAINT": true, "OBJECT_SCHEMA": true,
}

// outermost looks at the statement itself, then at all below it.
func (c *confined) outermost(s statement) {
	n := s.node
	if !makes[s.kind] {
		c.refuse("%s is no statement for a tenant's own objects", s.kind)
		return
	}
	c.statementNames(s)
	c.session(s)
	for _, t := range targets(s) {
		if t[0] != "" && t[0] != c.p.Schema {
			c.refuse("it makes or changes %s.%s", t[0], t[1])
		}
	}
	what := ""
	switch s.kind {
	case "CreateTableAsStmt":
		if str(n, "objtype") != "OBJECT_MATVIEW" {
			c.refuse("it makes a table of a query")
		}
	case "AlterTableStmt":
		if str(n, "objtype") == "OBJECT_FOREIGN_TABLE" {
			c.refuse("it changes a foreign table")
		}
	case "DropStmt":
		if what = str(n, "removeType"); what == "OBJECT_SCHEMA" {
			c.refuse("it drops a schema")
		}
		if str(n, "behavior") == "DROP_CASCADE" {
			c.refuse("it drops whatever depends on it")
		}
	case "CommentStmt":
		if what = str(n, "objtype"); what == "OBJECT_SCHEMA" {
			c.schemas(n["object"])
		}
	case "RenameStmt":
		if str(n, "renameType") != "OBJECT_SEQUENCE" {
			c.refuse("it renames something else than a sequence")
		}
	case "AlterOwnerStmt":
		what = str(n, "objectType")
		if t := dotted(what, n["object"]); t[0] != "" && t[0] != c.p.Schema || what == "OBJECT_SCHEMA" {
			c.refuse("it changes the owner of %s.%s", t[0], t[1])
		}
	case "GrantStmt":
		what = str(n, "objtype")
		c.grant(n)
	case "AlterDefaultPrivilegesStmt":
		c.defaults(n)
	case "CreateFunctionStmt":
		c.function(s)
	case "CreateTrigStmt":
		c.call(node{"funcname": n["funcname"]})
	}
	if what != "" && !holdings[what] {
		c.refuse("%s is nothing that lies in a schema", what)
	}
	c.below(n, s.kind == "CreateFunctionStmt")
}

// below looks at every name and every call in a tree. A function's settings are looked at by function.
func (c *confined) below(v any, isFunction bool) {
	c.walkNames(v, false)
	walk(v, func(kind string, n node) bool {
		if strings.HasSuffix(kind, "Stmt") && !works[kind] && kind != "ReplicaIdentityStmt" && !(isFunction && kind == "VariableSetStmt") {
			c.refuse("%s in it is more than to read and write rows", kind)
		}
		if n["roletype"] != nil {
			c.role(n)
		}
		if n["intoClause"] != nil {
			c.refuse("it makes a table of a query")
		}
		switch kind {
		case "RangeVar":
			// What PostgreSQL itself keeps of all tenants, and the first values of their columns, is not the tenant's.
			if name := str(n, "relname"); str(n, "schemaname") != "" && str(n, "schemaname") != c.p.Schema || strings.HasPrefix(name, "pg_") {
				c.refuse("it is about %s, which is not its own", strings.TrimPrefix(str(n, "schemaname")+"."+name, "."))
			}
		case "FuncCall":
			c.call(n)
		case "Constraint":
			for _, e := range list(n, "exclusions") {
				_, pair := unwrap(e)
				for _, item := range list(pair, "items") {
					_, of := unwrap(item)
					c.qualifiedWords(words(list(of, "items")), c.line(n))
				}
			}
		case "DefElem":
			switch w := words(list(sub(n, "arg"), "items")); str(n, "defname") {
			case "owned_by":
				if len(w) > 2 && w[len(w)-3] != c.p.Schema {
					c.refuse("it names the schema %s", w[len(w)-3])
				}
			case "sequence_name":
				if len(w) > 1 && w[len(w)-2] != c.p.Schema {
					c.refuse("it names the schema %s", w[len(w)-2])
				}
			}
		}
		return true
	})
}

// role looks at who gets, owns or is meant.
func (c *confined) role(n node) {
	switch str(n, "roletype") {
	case "ROLESPEC_CSTRING":
		if !slices.Contains(c.p.Roles, str(n, "rolename")) {
			c.refuse("it names the role %s", str(n, "rolename"))
		}
	case "ROLESPEC_SESSION_USER":
		c.refuse("it names whoever has logged in")
	}
}

// grant looks at rights for everybody, which only a function or a type may have, and at what they are on.
func (c *confined) grant(n node) {
	public := slices.ContainsFunc(list(n, "grantees"), func(e any) bool {
		_, r := unwrap(e)
		return str(r, "roletype") == "ROLESPEC_PUBLIC"
	})
	what := str(n, "objtype")
	switch what {
	case "OBJECT_FUNCTION", "OBJECT_PROCEDURE", "OBJECT_TYPE", "OBJECT_DOMAIN":
	default:
		if public && flag(n, "is_grant") {
			c.refuse("it gives rights to everybody")
		}
	}
	switch str(n, "targtype") {
	case "ACL_TARGET_ALL_IN_SCHEMA":
		c.schemas(list(n, "objects")...)
	case "ACL_TARGET_OBJECT":
		if what == "OBJECT_SCHEMA" {
			c.schemas(list(n, "objects")...)
			return
		}
		for _, o := range list(n, "objects") {
			if t := dotted(what, o); t[0] != "" && t[0] != c.p.Schema {
				c.refuse("it gives or takes rights on %s.%s", t[0], t[1])
			}
		}
	}
}

// schemas refuses all but the schema itself.
func (c *confined) schemas(names ...any) {
	for _, e := range names {
		if _, n := unwrap(e); str(n, "sval") != c.p.Schema {
			c.refuse("it names the schema %s", str(n, "sval"))
		}
	}
}

// defaults looks at default privileges: those of one schema are its own, all others are everybody's.
func (c *confined) defaults(n node) {
	in, ok := option(n, "options", "schemas")
	if !ok {
		c.refuse("it changes the default rights of all schemas")
		return
	}
	c.schemas(list(sub(in, "arg"), "items")...)
	c.grant(sub(n, "action"))
}

// function looks at how a function runs, and into it.
func (c *confined) function(s statement) {
	language := "sql"
	for _, e := range list(s.node, "options") {
		_, d := unwrap(e)
		switch str(d, "defname") {
		case "language":
			language = strings.ToLower(str(sub(d, "arg"), "sval"))
		case "security":
			if flag(sub(d, "arg"), "boolval") {
				c.refuse("the function runs with the rights of its owner")
			}
		case "set":
			switch name := strings.ToLower(str(sub(d, "arg"), "name")); name {
			case "role", "session_authorization", "session_replication_role",
				"standard_conforming_strings", "backslash_quote": // its body would be read otherwise there than here
				c.refuse("the function sets %s", name)
			}
		case "support", "transform":
			c.refuse("the function has a %s function", str(d, "defname"))
		}
	}
	as, text := option(s.node, "options", "as")
	switch {
	case language != "sql" && language != "plpgsql":
		c.refuse("the function is written in %s, which is not read", language)
	case text:
		c.body(s, as, language)
	case s.node["sql_body"] == nil: // which is in the tree
		c.refuse("the function has no body")
	}
}

// body looks into the text of a function.
func (c *confined) body(s statement, as node, language string) {
	arg := sub(as, "arg")
	text := str(arg, "sval")
	if items := words(list(arg, "items")); len(items) > 0 {
		text = items[0]
	}
	switch language {
	case "sql":
		c.text(text, false)
	case "plpgsql":
		b, err := readPL(c.src.text[s.start:])
		if err != nil {
			c.refuse("the function cannot be read: %v", err)
			return
		}
		if len(b.dynamic) > 0 {
			c.refuse("the function runs SQL that it puts together")
		}
		if len(b.control) > 0 {
			c.refuse("the function ends a transaction")
		}
		for _, t := range b.types {
			name, _, _ := strings.Cut(t.text, "%")
			if schema, rest, found := strings.Cut(name, "."); found && (!strings.HasSuffix(t.text, "%type") || strings.Contains(rest, ".")) {
				c.qualified(strings.Trim(schema, `"`), rest, 1)
			}
		}
		for _, q := range b.queries {
			c.text(q.text, true)
		}
	}
}

// text looks at statements in a function. Of a text that the parser does not read nothing is known.
func (c *confined) text(sql string, one bool) {
	stmts, err := parse(newSource(sql, 1))
	if err != nil {
		c.refuse("the function cannot be read: %v", err)
		return
	}
	if one && len(stmts) != 1 {
		c.refuse("the function cannot be read")
	}
	for _, s := range stmts {
		if !works[s.kind] {
			c.refuse("%s in the function is more than to read and write rows", s.kind)
			continue
		}
		c.session(s)
		c.statementNames(s)
		c.below(s.node, false)
	}
}

// reaching are functions of PostgreSQL and its extensions that run SQL given to them as a text, or reach what belongs to the
// connection, the server or its files. A star stands for whatever follows.
var reaching = []string{
	"query_to_xml*", "cursor_to_xml*", "table_to_xml*", "schema_to_xml*", "database_to_xml*", "ts_stat", "ts_rewrite", "set_config", "dblink*", "crosstab*", "connectby",
	"xpath_table", "lo_*", "loread", "lowrite", "pg_read_*", "pg_ls_*", "pg_stat_*", "pg_show_*", "pg_file_*", "pg_terminate_backend", "pg_cancel_backend", "pg_reload_conf",
	"pg_rotate_logfile", "pg_notify", "pg_advisory_*", "pg_try_advisory_*", "pg_logical_*", "pg_create_*", "pg_drop_*", "pg_replication_*", "pg_switch_wal", "pg_promote",
	"pg_backup_*", "pg_start_backup", "pg_stop_backup", "pg_wal_*", "pg_export_snapshot", "pg_import_*", "pg_log_*", "binary_upgrade_*", "pg_extension_*", "pg_prewarm", "autoprewarm_*",
	// Of a table or an index whose name is a text.
	"pg_clear_*", "pg_restore_*", "brin_summarize_*", "brin_desummarize_*", "gin_clean_pending_list", "check_primary_key", "check_foreign_key", "autoinc",
	"addgeometrycolumn", "dropgeometry*", "updategeometrysrid", "populate_geometry_columns", "http", "http_*",
}

// call looks at what a function is called, and at what it is given.
func (c *confined) call(n node) {
	w, args := words(list(n, "funcname")), list(n, "args")
	if len(w) == 0 {
		return
	}
	name := w[len(w)-1]
	if len(w) > 1 && w[len(w)-2] == c.p.Schema {
		return // whatever it does was looked at when it was made
	}
	for _, r := range reaching {
		if prefix, star := strings.CutSuffix(r, "*"); name == r || star && strings.HasPrefix(name, prefix) {
			c.refuse("it calls %s, which reaches beyond the tenant's tables", name)
		}
	}
	switch name {
	case "nextval", "setval", "currval":
		if len(args) > 0 && !named(args[0]) {
			c.refuse("it calls %s of a sequence whose name is put together as it runs", name)
		}
	}
}

// named reports whether a sequence is given by its name, or as the one of a table that is.
func named(v any) bool {
	if _, ok := constant(v); ok {
		return true
	}
	kind, n := unwrap(v)
	switch kind {
	case "TypeCast":
		return named(n["arg"])
	case "FuncCall":
		w, args := words(list(n, "funcname")), list(n, "args")
		if len(w) == 0 || w[len(w)-1] != "pg_get_serial_sequence" || len(args) == 0 {
			return false
		}
		_, ok := constant(args[0])
		return ok
	}
	return false
}
