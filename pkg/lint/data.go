package lint

// rows looks for statements that change more rows in one transaction than a batch.
func (c *checker) rows(s statement) {
	if c.file.Kind == Data {
		return
	}
	look := func(kind string, n node) {
		t := relation(n, "relation")
		if !c.existing(t) {
			return
		}
		switch kind {
		case "UpdateStmt", "DeleteStmt":
			where := n["whereClause"]
			verb := map[string]string{"UpdateStmt": "changed", "DeleteStmt": "deleted"}[kind]
			switch {
			case where == nil || isConstant(where):
				c.add(ruleNoWhere, c.line(sub(n, "relation")), "every row of %s is %s in one transaction", t, verb).with(t, Rewrites, rowLocks)
			case !picksRows(where) && !limited(n):
				c.add(ruleUnbounded, c.line(sub(n, "relation")), "rows of %s are %s in one transaction, however many they are", t, verb).with(t, Rewrites, rowLocks)
			}
		case "MergeStmt":
			c.add(ruleUnbounded, c.line(sub(n, "relation")), "rows of %s are merged in one transaction, however many they are", t).with(t, Rewrites, rowLocks)
		}
	}
	if s.kind == "CreateFunctionStmt" || s.kind == "ViewStmt" || s.kind == "RuleStmt" {
		return // it runs later, if ever
	}
	look(s.kind, s.node)
	walk(s.node, func(kind string, n node) bool {
		look(kind, n)
		return true
	})
	if s.kind == "InsertStmt" {
		c.copies(s.node)
	}
}

// copies looks at an insert that takes its rows from a table.
func (c *checker) copies(n node) {
	_, q := unwrap(n["selectStmt"])
	if q["valuesLists"] != nil || q["limitCount"] != nil {
		return
	}
	for _, f := range list(q, "fromClause") {
		kind, rel := unwrap(f)
		if t := str(rel, "relname"); kind == "RangeVar" && c.existing(t) && !isWith(n, t) && !picksRows(q["whereClause"]) {
			c.add(ruleUnbounded, c.line(sub(n, "relation")), "rows of %s are copied in one transaction, however many they are", t).with(t, Reads, "none that stops others")
			return
		}
	}
}

// isWith reports whether a name is that of a WITH query.
func isWith(n node, name string) bool {
	for _, e := range list(sub(n, "withClause"), "ctes") {
		if _, q := unwrap(e); str(q, "ctename") == name {
			return true
		}
	}
	return false
}

// picksRows reports whether a condition compares a column with constants: "id = 7", "key in ('a', 'b')", also as one part
// of "... and ...". Such a statement is meant for few rows.
func picksRows(v any) bool {
	kind, n := unwrap(v)
	switch kind {
	case "A_Expr":
		w := words(list(n, "name"))
		if len(w) == 0 || w[len(w)-1] != "=" {
			return false
		}
		if k := str(n, "kind"); k != "AEXPR_OP" && k != "AEXPR_IN" && k != "AEXPR_OP_ANY" {
			return false
		}
		column, _ := unwrap(n["lexpr"])
		other := n["rexpr"]
		if column != "ColumnRef" {
			column, _ = unwrap(other)
			other = n["lexpr"]
		}
		if l, ok := other.([]any); ok {
			for _, e := range l {
				if !isConstant(e) {
					return false
				}
			}
			return column == "ColumnRef"
		}
		return column == "ColumnRef" && isConstant(other)
	case "BoolExpr":
		if str(n, "boolop") == "AND_EXPR" {
			for _, a := range list(n, "args") {
				if picksRows(a) {
					return true
				}
			}
		}
	}
	return false
}

// data looks at a data file as a whole: one statement, with a limit and an end.
func (c *checker) data(stmts []read) {
	if len(stmts) == 0 {
		return // said already
	}
	s := stmts[0]
	c.src = s.src
	c.at = s.src.lineOf(s.start)
	if len(stmts) > 1 {
		c.at = stmts[1].src.lineOf(stmts[1].start)
		c.add(ruleDataOne, c.at, "a second statement: a data file is one, which is repeated")
		return
	}
	if !isData(s.kind) || s.kind == "MergeStmt" {
		c.add(ruleDataOne, c.at, "it is no insert, update or delete")
		return
	}
	t := relation(s.node, "relation")
	if !limited(s.node) {
		c.add(ruleDataLimit, c.at, "it has no limit: the first batch is everything").with(t, Rewrites, rowLocks)
	}
	switch s.kind {
	case "UpdateStmt":
		if !endsUpdate(s.node) {
			c.add(ruleDataEndless, c.at, "no condition is on a column that it sets: the rows that it has changed are found again").with(t, Rewrites, rowLocks)
		}
	case "InsertStmt":
		if !endsInsert(s.node) {
			c.add(ruleDataEndless, c.at, "nothing keeps it from inserting the same rows again").with(t, Rewrites, rowLocks)
		}
	}
}

// limited reports whether a query anywhere in a statement has a limit.
func limited(v any) bool {
	is := false
	walk(v, func(_ string, n node) bool {
		is = is || n["limitCount"] != nil
		return !is
	})
	return is
}

// conditions are the columns in all conditions of a statement, those of its subqueries included.
func conditions(v any) map[string]bool {
	all := map[string]bool{}
	walk(v, func(_ string, n node) bool {
		for _, field := range []string{"whereClause", "havingClause", "quals"} {
			for name := range columns(n[field]) {
				all[name] = true
			}
		}
		return true
	})
	return all
}

func endsUpdate(n node) bool {
	asked := conditions(node{"UpdateStmt": n})
	for _, e := range list(n, "targetList") {
		if _, target := unwrap(e); asked[str(target, "name")] {
			return true
		}
	}
	return false
}

func endsInsert(n node) bool {
	if conflict := sub(n, "onConflictClause"); conflict != nil {
		return str(conflict, "action") == "ONCONFLICT_NOTHING"
	}
	ends := false
	walk(n["selectStmt"], func(kind string, n node) bool {
		switch kind {
		case "SubLink": // not exists, not in
			ends = true
		case "NullTest": // an outer join's "... is null"
			ends = ends || str(n, "nulltesttype") == "IS_NULL"
		case "SelectStmt":
			ends = ends || str(n, "op") == "SETOP_EXCEPT"
		}
		return true
	})
	return ends
}
