package migrate

import (
	"fmt"
	"slices"
	"strings"
)

// form is what must be known of a statement that stands in a file without a transaction.
type form int

const (
	ordinary    form = iota // runs in a transaction of its own, together with the note that it was done
	createIndex             // create index concurrently
	dropIndex               // drop index concurrently
	reindex                 // reindex concurrently
	detach                  // alter table ... detach partition ... concurrently
	maintenance             // vacuum
)

// shape is a statement, read as far as resuming it needs.
type shape struct {
	form form
	// name is what the statement is about: the index, or the table of a reindex, or the partition.
	name string
	// table holds the index that is made, or is the parent of the partition.
	table string
	// ofTable: a reindex of a whole table.
	ofTable bool
	// plain is the statement for a transaction, without concurrently; empty: there is nothing to do in a new schema.
	plain string
}

// reader goes through the tokens of one statement.
type reader struct {
	sql string
	ts  []token
	i   int
}

// is reports whether the next tokens are these key words, and passes over them.
func (r *reader) is(words ...string) bool {
	for k, w := range words {
		if r.i+k >= len(r.ts) {
			return false
		}
		if t := r.ts[r.i+k]; t.kind != word || !strings.EqualFold(r.sql[t.start:t.end], w) {
			return false
		}
	}
	r.i += len(words)
	return true
}

// mark reports whether the next token is this character, and passes over it.
func (r *reader) mark(c byte) bool {
	if r.i < len(r.ts) && r.ts[r.i].kind == mark && r.sql[r.ts[r.i].start] == c {
		r.i++
		return true
	}
	return false
}

// options passes over a list in parentheses, and returns its words.
func (r *reader) options() (words []string) {
	if !r.mark('(') {
		return nil
	}
	for depth := 1; depth > 0 && r.i < len(r.ts); r.i++ {
		t := r.ts[r.i]
		switch {
		case t.kind == mark && r.sql[t.start] == '(':
			depth++
		case t.kind == mark && r.sql[t.start] == ')':
			depth--
		case t.kind == word:
			words = append(words, strings.ToLower(r.sql[t.start:t.end]))
		}
	}
	return words
}

// name reads an unqualified name, as PostgreSQL keeps it.
func (r *reader) name() (string, error) {
	if r.i >= len(r.ts) || r.ts[r.i].kind != word && r.ts[r.i].kind != name {
		return "", fmt.Errorf("it lacks a name")
	}
	t := r.ts[r.i]
	r.i++
	s := r.sql[t.start:t.end]
	if t.kind == name {
		s = strings.ReplaceAll(s[1:len(s)-1], `""`, `"`)
	} else {
		s = strings.ToLower(s)
	}
	if len(s) > 63 {
		return "", fmt.Errorf("the name %s is longer than 63 bytes", s)
	}
	if r.mark('.') {
		return "", fmt.Errorf("the name behind %s. leaves the tenant: names in its migrations are not qualified", s)
	}
	return s, nil
}

// shapeOf reads a statement of a file without a transaction. The error says why it cannot be resumed sensibly.
func shapeOf(sql string) (shape, error) {
	r := &reader{sql: sql, ts: tokens(sql)}
	s := shape{plain: sql}
	var err error
	// without takes the word that was read last out of the plain text.
	without := func() {
		t := r.ts[r.i-1]
		s.plain = sql[:t.start] + sql[t.end:]
	}
	switch {
	case r.is("create"):
		if r.is("database") || r.is("tablespace") || r.is("subscription") || r.is("role") || r.is("user") {
			return s, fmt.Errorf("it reaches beyond the tenant")
		}
		r.is("unique")
		if !r.is("index") || !r.is("concurrently") {
			return s, nil
		}
		s.form = createIndex
		without()
		r.is("if", "not", "exists")
		if r.is("on") {
			return s, fmt.Errorf("an index that is made concurrently needs a name: what is left of it when it fails is found by that")
		}
		if s.name, err = r.name(); err != nil {
			return s, err
		}
		if !r.is("on") {
			return s, fmt.Errorf("it names no table")
		}
		r.is("only")
		s.table, err = r.name()
	case r.is("drop"):
		if r.is("database") || r.is("tablespace") || r.is("subscription") || r.is("role") || r.is("user") {
			return s, fmt.Errorf("it reaches beyond the tenant")
		}
		if !r.is("index", "concurrently") {
			return s, nil
		}
		s.form = dropIndex
		without()
		r.is("if", "exists")
		if s.name, err = r.name(); err == nil && r.mark(',') {
			err = fmt.Errorf("one index at a time can be dropped concurrently")
		}
	case r.is("reindex"):
		options := r.options()
		if r.is("schema") || r.is("database") || r.is("system") {
			return s, fmt.Errorf("it reaches beyond the tenant")
		}
		s.ofTable = r.is("table")
		if !s.ofTable && !r.is("index") {
			return s, fmt.Errorf("it names neither an index nor a table")
		}
		if !r.is("concurrently") && !slices.Contains(options, "concurrently") {
			return s, nil
		}
		s.form, s.plain = reindex, ""
		s.name, err = r.name()
	case r.is("alter", "table"):
		r.is("if", "exists")
		r.is("only")
		if n := len(r.ts); n < 4 || !(&reader{sql: sql, ts: r.ts, i: n - 1}).is("concurrently") {
			return s, nil
		}
		if s.table, err = r.name(); err != nil {
			return s, err
		}
		if !r.is("detach", "partition") {
			return s, nil
		}
		s.form = detach
		if s.name, err = r.name(); err != nil {
			return s, err
		}
		if !r.is("concurrently") {
			return s, fmt.Errorf("it is not understood behind the partition's name")
		}
		without()
	case r.is("alter", "system"), r.is("alter", "database"), r.is("alter", "role"), r.is("alter", "user"):
		return s, fmt.Errorf("it reaches beyond the tenant")
	case r.is("vacuum"), r.is("analyze"), r.is("analyse"), r.is("cluster"):
		s.form, s.plain = maintenance, ""
		r.options()
		for r.is("full") || r.is("freeze") || r.is("verbose") || r.is("analyze") || r.is("analyse") {
			continue
		}
		if r.i == len(r.ts) {
			return s, fmt.Errorf("it reaches beyond the tenant: name its tables")
		}
		for {
			if _, err = r.name(); err != nil {
				return s, err
			}
			r.options()
			if !r.mark(',') {
				break
			}
		}
	}
	return s, err
}

// dataShape checks the statement of a data migration: one that changes rows, and takes no other parameter than the
// size of its batches.
func dataShape(sql string) (sized bool, err error) {
	changes := false
	depth := 0
	before := ""
	for _, t := range tokens(sql) {
		after := before
		if before = ""; t.kind == word {
			before = strings.ToLower(sql[t.start:t.end])
		}
		switch {
		case after == "skip" && before == "locked":
			return false, fmt.Errorf("skip locked passes over the rows that others hold, and it would be done without them: leave it out, a batch waits for them and is tried again")
		case t.kind == parameter && sql[t.start:t.end] != "$1":
			return false, fmt.Errorf("%s: its one parameter is $1, the size of a batch", sql[t.start:t.end])
		case t.kind == parameter:
			sized = true
		case t.kind == mark && sql[t.start] == '(':
			depth++
		case t.kind == mark && sql[t.start] == ')':
			depth--
		case t.kind == word && depth == 0 && !changes:
			switch strings.ToLower(sql[t.start:t.end]) {
			case "insert", "update", "delete", "merge":
				changes = true
			case "select", "values", "table":
				return false, fmt.Errorf("it reads: it must be insert, update, delete or merge, so that the rows it changes can be counted")
			}
		}
	}
	if !changes {
		return false, fmt.Errorf("it must be insert, update, delete or merge")
	}
	return sized, nil
}

// withSize is a data migration's statement with a constant in the place of its parameter.
func withSize(sql string, size int) string {
	var b strings.Builder
	from := 0
	for _, t := range tokens(sql) {
		if t.kind == parameter {
			fmt.Fprintf(&b, "%s%d", sql[from:t.start], size)
			from = t.end
		}
	}
	return b.String() + sql[from:]
}
