// Package lint reads migrations with PostgreSQL's own parser and says what in them leaves the tenant, holds a lock for
// long, breaks running binaries or never ends, and how to write it instead.
//
// It promises: what it finds depends on the files alone, so that a file that passes in CI passes everywhere; it runs
// nothing and connects to nothing; no input makes it panic; and what it cannot read it says. It is no proof: SQL that is
// put together as it runs is not seen.
package lint

import (
	"cmp"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Kind is how a migration is run.
type Kind string

const (
	// Transactional files run in one transaction.
	Transactional Kind = "transactional"
	// NoTransaction files run each statement by itself.
	NoTransaction Kind = "no-transaction"
	// Data files hold one statement that is repeated until it changes no row.
	Data Kind = "data"
	// Down files take a step back, in one transaction.
	Down Kind = "down"
)

// Severity says whether a finding stops a migration.
type Severity string

const (
	// Error stops `oneo migrate` unless it is forced.
	Error Severity = "error"
	// Warning is told, and stops nothing.
	Warning Severity = "warning"
)

// Scope says whose tables a set of migrations makes.
type Scope string

const (
	// Tenant migrations make a tenant's tables, with unqualified names.
	Tenant Scope = "tenant"
	// Shared migrations make shared tables, qualified with public.
	Shared Scope = "shared"
)

// File is one migration to be read.
type File struct {
	Name string // as people know it: 0003_invoices.up.sql
	Kind Kind
	SQL  string
	// Line is the line of the named file on which SQL begins; 0 is 1.
	Line int
	// Breaking: the file says that old binaries cannot go on with what it makes.
	Breaking bool
	// HasDown: there is a step down for it.
	HasDown bool
}

// Work is what a statement does to every row of its table, for an estimate of its time.
type Work string

const (
	// NoWork is little work, or work that is not on rows.
	NoWork Work = ""
	// Reads every row.
	Reads Work = "reads"
	// Rewrites every row, or changes it.
	Rewrites Work = "rewrites"
)

// Finding is one thing found.
type Finding struct {
	File     string
	Line     int
	Rule     string
	Severity Severity
	// Message says what was found.
	Message string
	// Instead says how to write it.
	Instead string
	// Locks says which lock is held how long; empty when that is not the matter.
	Locks string
	// Table is the table concerned, or empty, and Work what is done to its rows.
	Table string
	Work  Work

	statements []int // the lines on which the statements begin in which it stands: of a function, and in its body
}

// Check reads files, in the order in which they are applied, and returns what it finds in that order. earlier are the
// files before them, which are read for what they make only. The parser is loaded by the first call that has files to
// read, which takes about a second.
func Check(scope Scope, earlier, files []File) []Finding {
	if len(files) == 0 {
		return nil
	}
	cat := newCatalog()
	for i, f := range earlier {
		if f.Kind == Down {
			continue
		}
		src := newSource(f.SQL, 1)
		stmts, _ := statements(src) // what cannot be read has been applied
		for _, s := range stmts {
			cat.apply(s.statement, i)
		}
	}
	var all []Finding
	for i, f := range files {
		all = append(all, checkFile(scope, cat, f, len(earlier)+i)...)
	}
	return all
}

// read is a statement together with the text it stands in.
type read struct {
	statement
	src source
}

// statements reads a text; where that fails, statement by statement, and returns what could not be read beside the rest.
func statements(src source) (all []read, bad []unread) {
	take := func(src source) error {
		stmts, err := parse(src)
		for _, s := range stmts {
			all = append(all, read{s, src})
		}
		return err
	}
	err := take(src)
	if err == nil {
		return all, nil
	}
	for _, piece := range src.pieces() {
		// A text of one statement has been read already.
		if piece.text != src.text {
			err = take(piece)
		}
		if err != nil {
			at := 0
			if u := (*errUnread)(nil); errors.As(err, &u) {
				at = u.offset
			}
			bad = append(bad, unread{line: piece.lineOf(at), statement: piece.lineOf(piece.firstToken(0)), message: err.Error()})
		}
	}
	return all, bad
}

type unread struct {
	line, statement int
	message         string
}

// checker looks at one file.
type checker struct {
	scope  Scope
	cat    *catalog
	file   File
	number int
	found  *[]Finding
	// place is the one schema that may be named besides those of everybody; empty: none.
	place string
	// remade are the views and functions that the file makes: dropping one of them is the way to change it.
	remade map[string]bool
	src    source
	// at is the line on which the statement at work begins, in the file.
	at int
	// outer are the lines on which the statements begin whose bodies it stands in.
	outer []int
	// body: the statement stands in a function and runs later, or never.
	body bool
}

func checkFile(scope Scope, cat *catalog, f File, number int) []Finding {
	var found []Finding
	c := checker{scope: scope, cat: cat, file: f, number: number, found: &found, at: 1}
	c.src = newSource(f.SQL, max(f.Line, 1))
	c.longNames()
	stmts, bad := statements(c.src)
	for _, u := range bad {
		c.at = u.statement
		c.add(ruleSyntax, u.line, "PostgreSQL's parser cannot read this: %s", u.message)
	}
	c.at = c.src.line
	if len(stmts) == 0 && len(bad) == 0 {
		c.add(ruleEmpty, c.src.line, "%s has no statement", f.Name)
	}
	if !f.HasDown && (f.Kind == Transactional || f.Kind == NoTransaction) {
		c.add(ruleMissingDown, c.src.line, "%s has no step down", f.Name)
	}
	if f.Breaking && (f.Kind == NoTransaction || f.Kind == Data) {
		c.add(ruleBreakApart, c.src.line, "%s is breaking and cannot keep requests away while it runs", f.Name)
	}
	c.remade = map[string]bool{}
	for _, s := range stmts {
		switch s.kind {
		case "ViewStmt":
			c.remade[relation(s.node, "view")] = true
		case "CreateFunctionStmt":
			if w := words(list(s.node, "funcname")); len(w) > 0 {
				c.remade[w[len(w)-1]] = true
			}
		}
	}
	for _, s := range stmts {
		c.statement(s)
	}
	if f.Kind == Data {
		c.data(stmts)
	}
	return c.allowed(found)
}

// statement looks at one statement, and then notes what it makes.
func (c *checker) statement(s read) {
	c.src = s.src
	c.at = s.src.lineOf(s.start)
	c.names(s.statement)
	c.session(s.statement)
	if !c.body {
		c.locks(s.statement)
		c.rows(s.statement)
	}
	c.bodies(s.statement)
	if !c.body && c.file.Kind != Down {
		c.cat.apply(s.statement, c.number)
	}
}

// add notes a finding.
func (c *checker) add(rule string, line int, format string, args ...any) *Finding {
	r, _ := ruleNamed(rule)
	if r.TenantOnly && c.scope != Tenant {
		return &Finding{}
	}
	f := Finding{
		File: c.file.Name, Line: line, Rule: rule, Severity: r.Severity, Message: fmt.Sprintf(format, args...), Instead: r.Instead, statements: append(slices.Clone(c.outer), c.at),
	}
	for i, other := range *c.found {
		if other.Line == f.Line && other.Rule == f.Rule && other.Message == f.Message {
			return &(*c.found)[i]
		}
	}
	*c.found = append(*c.found, f)
	return &(*c.found)[len(*c.found)-1]
}

// line is the line of a node that knows its place; of another, the statement's.
func (c *checker) line(n node) int {
	if at, ok := n["location"].(float64); ok && at >= 0 {
		return c.src.lineOf(int(at))
	}
	return c.at
}

// longNames finds names that PostgreSQL would cut. The tree has them cut already.
func (c *checker) longNames() {
	for _, t := range c.src.tokens {
		if t.kind != identToken {
			continue
		}
		name := c.src.text[t.start:t.end]
		if strings.HasPrefix(name, `"`) {
			name = strings.ReplaceAll(strings.Trim(name, `"`), `""`, `"`)
		}
		if len(name) > 63 {
			c.at = c.src.lineOf(c.src.firstToken(c.src.statementOf(t.start)))
			c.add(ruleLongName, c.src.lineOf(t.start), "the name %s... has %d bytes: PostgreSQL cuts it at 63, and two may become one", strings.ToValidUTF8(name[:40], ""), len(name))
		}
	}
}

// directive is a line that silences a rule for the statement, or for the line, below it.
var directive = regexp.MustCompile(`^\s*--\s*oneo:\s*allow(?:\s+(\S+))?\s*(.*?)\s*$`)

type allow struct {
	rule   string
	line   int // where it stands
	covers int // the line that it is for
	used   bool
}

// allowed takes out what the file allows, adds what is wrong with the allowing, and sorts the rest by line.
func (c *checker) allowed(found []Finding) []Finding {
	c.found = &found
	lines := strings.Split(c.file.SQL, "\n")
	first := max(c.file.Line, 1)
	var allows []allow
	for i, l := range lines {
		m := directive.FindStringSubmatch(l)
		if m == nil {
			continue
		}
		c.at = first + i
		_, known := ruleNamed(m[1])
		switch {
		case m[1] == "":
			c.add(ruleBadAllow, first+i, "it says neither which rule is allowed nor why")
		case !known:
			f := c.add(ruleBadAllow, first+i, "there is no rule %s", m[1])
			if near := fault.Nearest(m[1], ruleNames(), 1); len(near) > 0 {
				f.Instead = "did you mean " + near[0] + "?"
			}
		case m[2] == "":
			c.add(ruleBadAllow, first+i, "it does not say why %s is allowed", m[1])
		default:
			next := i + 1
			for next < len(lines) && (strings.TrimSpace(lines[next]) == "" || strings.HasPrefix(strings.TrimSpace(lines[next]), "--")) {
				next++
			}
			allows = append(allows, allow{rule: m[1], line: first + i, covers: first + next})
		}
	}
	kept := slices.DeleteFunc(found, func(f Finding) bool {
		silent := false
		for i := range allows {
			a := &allows[i]
			// What is said of the whole file is allowed anywhere in it.
			whole := f.Rule == ruleMissingDown || f.Rule == ruleEmpty
			if a.rule == f.Rule && (whole || a.covers == f.Line || slices.Contains(f.statements, a.covers)) {
				a.used, silent = true, true
			}
		}
		return silent
	})
	c.found = &kept
	for _, a := range allows {
		if r, _ := ruleNamed(a.rule); !a.used && !(r.TenantOnly && c.scope != Tenant) {
			c.at = a.line
			c.add(ruleUnusedAllow, a.line, "%s finds nothing in the lines below", a.rule)
		}
	}
	slices.SortStableFunc(kept, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Rule, b.Rule), cmp.Compare(a.Message, b.Message))
	})
	return kept
}

func ruleNames() []string {
	names := make([]string, len(rules))
	for i, r := range rules {
		names[i] = r.Name
	}
	return names
}
