package lint

import (
	"fmt"
	"strings"
)

// Which lock is held for how long, in words.
const (
	exclusiveRewrite = "ACCESS EXCLUSIVE, which stops all reading and writing, while every row is written anew"
	exclusiveScan    = "ACCESS EXCLUSIVE, which stops all reading and writing, while every row is read"
	exclusiveIndex   = "ACCESS EXCLUSIVE, which stops all reading and writing, while an index is built"
	exclusiveShort   = "ACCESS EXCLUSIVE, which stops all reading and writing, until the transaction ends"
	shareScan        = "SHARE ROW EXCLUSIVE on both tables, which stops all writing, while every row is read and looked up"
	shareIndex       = "SHARE, which stops all writing, while the index is built"
	rowLocks         = "a lock on each row that is changed, until the transaction ends"
)

// existing reports whether a table existed before this file, or is one that the files read do not make.
func (c *checker) existing(name string) bool { return c.cat.table(name).madeBy != c.number }

// inTx reports whether the file runs in a transaction.
func (c *checker) inTx() bool { return c.file.Kind != NoTransaction }

// with completes a finding.
func (f *Finding) with(table string, work Work, locks string) {
	f.Table, f.Work, f.Locks = table, work, locks
}

// locks looks for statements that hold a table for long, and for those that break binaries at work.
func (c *checker) locks(s statement) {
	n := s.node
	refused := func(what string) {
		if c.inTx() {
			c.add(ruleInTx, c.at, "PostgreSQL refuses %s inside a transaction", what)
		}
	}
	switch s.kind {
	case "IndexStmt":
		t := relation(n, "relation")
		if flag(n, "concurrent") {
			refused("create index concurrently")
		} else if c.existing(t) {
			c.add(ruleCreateIndex, c.at, "an index on %s is built while nobody can write to it", t).with(t, Reads, shareIndex)
		}
	case "ReindexStmt":
		if _, concurrently := option(n, "params", "concurrently"); concurrently {
			refused("reindex concurrently")
		} else {
			t := relation(n, "relation")
			c.add(ruleReindex, c.at, "an index is built anew while nobody can write to its table").with(t, Reads, shareIndex)
		}
	case "DropStmt":
		c.drops(n, refused)
	case "AlterTableStmt":
		if str(n, "objtype") == "OBJECT_TABLE" || str(n, "objtype") == "OBJECT_MATVIEW" {
			for _, e := range list(n, "cmds") {
				_, cmd := unwrap(e)
				c.alter(relation(n, "relation"), cmd)
				if c.file.Kind == Down {
					continue
				}
				// A later part of the statement sees what an earlier one has made.
				c.cat.alter(node{"relation": n["relation"], "cmds": []any{e}}, c.number)
			}
		}
	case "RenameStmt":
		c.renames(n)
	case "ClusterStmt":
		t := relation(n, "relation")
		c.add(ruleTableRewrite, c.at, "cluster writes %s anew", t).with(t, Rewrites, exclusiveRewrite)
	case "VacuumStmt":
		if !flag(n, "is_vacuumcmd") {
			return
		}
		refused("vacuum")
		if _, full := option(n, "options", "full"); full {
			t := ""
			if rels := list(n, "rels"); len(rels) == 1 {
				_, r := unwrap(rels[0])
				t = relation(r, "relation")
			}
			c.add(ruleTableRewrite, c.at, "vacuum full writes %s anew", t).with(t, Rewrites, exclusiveRewrite)
		}
	case "RefreshMatViewStmt":
		if t := relation(n, "relation"); !flag(n, "concurrent") && !flag(n, "skipData") {
			c.add(ruleRefresh, c.at, "%s cannot be read while it is made anew", t).with(t, Rewrites, exclusiveRewrite)
		}
	case "LockStmt":
		c.add(ruleLockTable, c.at, "it locks a table until the transaction ends").with("", NoWork, "the lock that it names, until the transaction ends")
	case "TruncateStmt":
		for _, r := range list(n, "relations") {
			if _, rel := unwrap(r); c.existing(str(rel, "relname")) {
				c.add(ruleTruncate, c.at, "every row of %s is gone, in every tenant", str(rel, "relname")).with(str(rel, "relname"), NoWork, exclusiveShort)
			}
		}
		c.cascade(n)
	case "CreatedbStmt", "DropdbStmt", "AlterSystemStmt", "CreateTableSpaceStmt", "DropTableSpaceStmt", "CreateSubscriptionStmt":
		refused("this statement")
	}
}

func (c *checker) cascade(n node) {
	if str(n, "behavior") == "DROP_CASCADE" && c.file.Kind != Down {
		c.add(ruleCascade, c.at, "cascade takes along whatever depends on it, in each tenant what stands there")
	}
}

// drops looks at what a statement drops.
func (c *checker) drops(n node, refused func(string)) {
	what := str(n, "removeType")
	var names []string
	for _, o := range list(n, "objects") {
		kind, ob := unwrap(o)
		var w []string
		switch kind {
		case "List":
			w = words(list(ob, "items"))
		case "ObjectWithArgs":
			w = words(list(ob, "objname"))
		}
		if len(w) > 0 {
			names = append(names, w[len(w)-1])
		}
	}
	switch what {
	case "OBJECT_INDEX":
		if flag(n, "concurrent") {
			refused("drop index concurrently")
			return
		}
		for _, name := range names {
			if ix, known := c.cat.indexes[name]; !known || c.existing(ix.table) {
				c.add(ruleDropIndex, c.at, "the index %s is dropped behind whoever reads its table, and everybody else behind that", name).
					with(ix.table, NoWork, exclusiveShort)
			}
		}
	case "OBJECT_TABLE", "OBJECT_VIEW", "OBJECT_MATVIEW", "OBJECT_FUNCTION", "OBJECT_PROCEDURE", "OBJECT_ROUTINE":
		for _, name := range names {
			if !c.existing(name) || c.remade[name] {
				continue
			}
			c.breaks("%s is dropped", name)
			if what == "OBJECT_TABLE" && c.file.Kind != Down {
				c.add(ruleDropData, c.at, "%s is dropped with its rows, in every tenant", name).with(name, NoWork, exclusiveShort)
			}
		}
	}
	c.cascade(n)
}

// breaks notes a change that running binaries do not survive.
func (c *checker) breaks(format string, args ...any) {
	if !c.file.Breaking && c.file.Kind != Down {
		c.add(ruleBreaking, c.at, format+", and the binaries that run may still use it", args...)
	}
}

func (c *checker) renames(n node) {
	table, sub := relation(n, "relation"), str(n, "subname")
	switch str(n, "renameType") {
	case "OBJECT_TABLE", "OBJECT_VIEW", "OBJECT_MATVIEW":
		if c.existing(table) {
			c.breaks("%s is renamed", table)
		}
	case "OBJECT_COLUMN":
		if c.existing(table) {
			c.breaks("%s.%s is renamed", table, sub)
		}
	case "OBJECT_FUNCTION", "OBJECT_PROCEDURE", "OBJECT_ROUTINE":
		c.breaks("a function is renamed")
	}
}

// alter looks at one part of an alter table.
func (c *checker) alter(table string, cmd node) {
	name, def := str(cmd, "name"), sub(cmd, "def")
	if str(cmd, "subtype") == "AT_DetachPartition" && flag(def, "concurrent") && c.inTx() {
		c.add(ruleInTx, c.at, "PostgreSQL refuses detach partition concurrently inside a transaction")
	}
	if !c.existing(table) {
		return
	}
	t := c.cat.table(table)
	switch str(cmd, "subtype") {
	case "AT_AddColumn":
		c.addColumn(table, def)
	case "AT_DropColumn":
		c.breaks("%s.%s is dropped", table, name)
		if c.file.Kind != Down {
			c.add(ruleDropData, c.at, "%s.%s is dropped with what is in it, in every tenant", table, name).with(table, NoWork, exclusiveShort)
		}
		c.cascade(cmd)
	case "AT_AlterColumnType":
		from, to := t.columns[name].typ, typeOf(def)
		if keepsRows(from, to) && plainUsing(def["raw_default"], name, to) {
			return
		}
		was := ""
		if from.name != "" {
			was = " from " + from.String()
		}
		c.add(ruleTypeRewrite, c.line(def), "the type of %s.%s changes%s to %s: every row is written anew", table, name, was, to).
			with(table, Rewrites, exclusiveRewrite)
	case "AT_SetNotNull":
		if !t.forbidsNull(name) {
			c.add(ruleSetNotNull, c.at, "set not null reads all of %s to see that no %s is null", table, name).with(table, Reads, exclusiveScan)
		}
	case "AT_AddConstraint":
		c.addConstraint(table, def)
	case "AT_ValidateConstraint":
		if !c.inTx() {
			return
		}
		if k, ok := t.checks[name]; ok && k.addedBy == c.number {
			c.add(ruleValidateFile, c.at, "%s is added and validated in one transaction: %s is locked while it is read", name, table).with(table, Reads, exclusiveScan)
		} else {
			c.add(ruleValidateTx, c.at, "%s is validated in a transaction in which other steps may hold their locks", name).
				with(table, Reads, "SHARE UPDATE EXCLUSIVE, which stops neither reading nor writing, and what the other steps hold")
		}
	case "AT_SetLogged", "AT_SetUnLogged", "AT_SetAccessMethod", "AT_SetTableSpace", "AT_SetExpression":
		c.add(ruleTableRewrite, c.at, "%s is written anew", table).with(table, Rewrites, exclusiveRewrite)
	}
}

// plainUsing reports whether a USING clause, if there is one, only names the column, or casts it to the new type.
func plainUsing(v any, name string, to typ) bool {
	if v == nil {
		return true
	}
	kind, n := unwrap(v)
	if kind == "TypeCast" {
		cast := typeOf(n)
		if cast.name != to.name || fmt.Sprint(cast.mods) != fmt.Sprint(to.mods) {
			return false
		}
		kind, n = unwrap(n["arg"])
	}
	w := words(list(n, "fields"))
	return kind == "ColumnRef" && len(w) == 1 && w[0] == name
}

// addColumn looks at a column added to an existing table.
func (c *checker) addColumn(table string, def node) {
	name, line := str(def, "colname"), c.line(def)
	rewrites := func(why string, args ...any) {
		c.add(ruleColRewrite, line, "%s.%s %s: every row is written anew", table, name, fmt.Sprintf(why, args...)).with(table, Rewrites, exclusiveRewrite)
	}
	var notNull, filled, defaults bool
	if strings.HasSuffix(typeOf(def).name, "serial") {
		filled = true
		rewrites("takes its numbers from a sequence")
	}
	for _, e := range list(def, "constraints") {
		_, k := unwrap(e)
		switch str(k, "contype") {
		case "CONSTR_NOTNULL":
			notNull = true
		case "CONSTR_DEFAULT":
			defaults = true
			kind, value := unwrap(k["raw_expr"])
			if kind == "A_Const" && flag(value, "isnull") {
				continue
			}
			filled = true
			if f := c.cat.volatile(k["raw_expr"]); f != "" {
				rewrites("has the volatile default %s()", f)
			}
		case "CONSTR_IDENTITY":
			filled = true
			rewrites("is an identity")
		case "CONSTR_GENERATED":
			filled = true
			rewrites("is a stored generated column")
		}
	}
	for _, e := range list(def, "constraints") {
		_, k := unwrap(e)
		// PostgreSQL looks nothing up for a key whose column is null in each row, which it sees by there being no default.
		if str(k, "contype") != "CONSTR_FOREIGN" || filled || defaults {
			c.addConstraint(table, k)
		}
	}
	if notNull && !filled {
		c.add(ruleRequired, line, "%s.%s has no value for the rows that are there", table, name).with(table, NoWork, "")
	}
}

// addConstraint looks at a constraint added to an existing table.
func (c *checker) addConstraint(table string, k node) {
	line := c.line(k)
	name := str(k, "conname")
	if name == "" {
		name = "it"
	}
	switch str(k, "contype") {
	case "CONSTR_CHECK":
		if !flag(k, "skip_validation") {
			c.add(ruleAddCheck, line, "a check on %s: every row is read to see whether %s holds", table, name).with(table, Reads, exclusiveScan)
		}
	case "CONSTR_FOREIGN":
		if !flag(k, "skip_validation") {
			c.add(ruleAddKey, line, "a foreign key from %s to %s: every row is looked up", table, relation(k, "pktable")).with(table, Reads, shareScan)
		}
	case "CONSTR_UNIQUE", "CONSTR_PRIMARY":
		if using := str(k, "indexname"); using == "" {
			c.add(ruleAddUnique, line, "a unique index on %s is built while nobody can use the table", table).with(table, Reads, exclusiveIndex)
		} else if str(k, "contype") == "CONSTR_PRIMARY" {
			for _, col := range c.cat.indexes[using].columns {
				if !c.cat.table(table).forbidsNull(col) {
					c.add(ruleSetNotNull, line, "a primary key makes %s.%s not null: all of %s is read", table, col, table).with(table, Reads, exclusiveScan)
				}
			}
		}
	case "CONSTR_EXCLUSION":
		c.add(ruleExclusion, line, "an exclusion constraint on %s is built while nobody can use the table", table).with(table, Reads, exclusiveIndex)
	}
}
