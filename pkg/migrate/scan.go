package migrate

import (
	"regexp"
	"strings"
)

// transactionControl are the words with which a statement begins, commits or takes back a transaction. "prepare
// transaction" is told from an ordinary prepare by its second word.
var transactionControl = map[string]bool{
	"begin": true, "start": true, "commit": true, "end": true, "rollback": true, "abort": true, "savepoint": true, "release": true,
}

// tokenKind is what a token of SQL is, as far as the end of a statement depends on it.
type tokenKind int

const (
	space     tokenKind = iota // white space and comments
	word                       // a key word or an unquoted name
	name                       // a quoted name
	literal                    // in quotes or dollar quotes
	parameter                  // $1
	mark                       // any other character
)

type token struct {
	kind       tokenKind
	start, end int
	// open: the text ends before the quote or comment does.
	open bool
}

// next reads the token that begins at i, by PostgreSQL's rules with standard-conforming strings.
func next(sql string, i int) token {
	t := token{kind: mark, start: i, end: i + 1}
	switch c := sql[i]; {
	case c == '\'':
		t.kind = literal
		t.end, t.open = skipQuoted(sql, i, false)
	case c == '"':
		t.kind = name
		t.end, t.open = skipQuoted(sql, i, false)
	case strings.HasPrefix(sql[i:], "--"):
		t.kind = space
		t.end, _ = skipTo(sql, i, "\n")
	case strings.HasPrefix(sql[i:], "/*"):
		t.kind = space
		t.end, t.open = skipComment(sql, i)
	case isSpace(c):
		t.kind = space
		for t.end < len(sql) && isSpace(sql[t.end]) {
			t.end++
		}
	case c == '$':
		t.kind, t.end, t.open = skipDollar(sql, i)
	case isWordStart(c):
		t.kind = word
		for t.end < len(sql) && isWord(sql[t.end]) {
			t.end++
		}
		if t.end == i+1 && t.end < len(sql) && sql[t.end] == '\'' && strings.IndexByte("eEbBxXnN", c) >= 0 {
			t.kind = literal
			t.end, t.open = skipQuoted(sql, t.end, c == 'e' || c == 'E')
		}
	}
	return t
}

// routine tells a semicolon that ends a statement from one in the body of an SQL function in the standard's form (begin
// atomic ...; ...; end). psql counts the same way.
type routine struct {
	first  []string // the statement's first four words; a literal or a quoted name counts as an empty one
	parens int
	depth  int
}

// see takes note of a token that is not space.
func (r *routine) see(sql string, t token) {
	switch {
	case t.kind == literal || t.kind == name:
		r.first = append(r.first, "")
	case t.kind == mark && sql[t.start] == '(':
		r.parens++
	case t.kind == mark && sql[t.start] == ')':
		r.parens = max(r.parens-1, 0)
	case t.kind == word:
		w := strings.ToLower(sql[t.start:t.end])
		if len(r.first) < 4 {
			r.first = append(r.first, w)
		}
		if r.parens == 0 && makesRoutine(r.first) {
			switch {
			case w == "begin", w == "case" && r.depth > 0:
				r.depth++
			case w == "end" && r.depth > 0:
				r.depth--
			}
		}
	}
}

func (r *routine) reset() { r.first, r.parens, r.depth = r.first[:0], 0, 0 }

// controlIn finds the first statement of a script that is transaction control: its words and the line it stands on. A
// step is one transaction together with its ledger row; a script that ends it leaves half of itself behind when the
// rest fails. What stands in quotes, dollar quotes, comments and the body of an SQL function is no such statement.
func controlIn(sql string) (words string, line int, found bool) {
	var r routine
	at := 0 // where the statement's first word stands
	for i := 0; i < len(sql); {
		t := next(sql, i)
		i = t.end
		if t.kind == space {
			continue
		}
		if t.kind == mark && sql[t.start] == ';' {
			if r.depth == 0 {
				r.reset()
			}
			continue
		}
		if len(r.first) == 0 {
			at = t.start
		}
		before := len(r.first)
		r.see(sql, t)
		if t.kind != word || len(r.first) == before {
			continue
		}
		if transactionControl[r.first[0]] || len(r.first) == 2 && r.first[0] == "prepare" && r.first[1] == "transaction" {
			return strings.Join(r.first, " "), lineAt(sql, at), true
		}
	}
	return "", 0, false
}

// statement is one statement of a script.
type statement struct {
	text  string // with what stands before it, and its semicolon: the texts of all of them are the script
	start int    // of text, in the script
	line  int    // of its first word, counting from 1
	blank bool   // nothing but space and comments
}

// split cuts a script into its statements, where psql would. The last one is blank when only space is left. openLine
// is the line of a quote or comment that does not end; 0: all of them do.
func split(sql string) (all []statement, openLine int) {
	var r routine
	from, at := 0, -1
	end := func(to int) {
		s := statement{text: sql[from:to], start: from, blank: at < 0}
		if at < 0 {
			at = from
		}
		s.line = lineAt(sql, at)
		all = append(all, s)
		from, at = to, -1
		r.reset()
	}
	for i := 0; i < len(sql); {
		t := next(sql, i)
		i = t.end
		if t.open && openLine == 0 {
			openLine = lineAt(sql, t.start)
		}
		if t.kind == space {
			continue
		}
		if t.kind == mark && sql[t.start] == ';' && r.depth == 0 && r.parens == 0 {
			end(t.end)
			continue
		}
		if at < 0 {
			at = t.start
		}
		r.see(sql, t)
	}
	if from < len(sql) {
		end(len(sql))
	}
	return all, openLine
}

// tokens are a statement's, without space and the semicolon at its end.
func tokens(sql string) []token {
	var all []token
	for i := 0; i < len(sql); {
		t := next(sql, i)
		i = t.end
		if t.kind != space {
			all = append(all, t)
		}
	}
	if n := len(all); n > 0 && sql[all[n-1].start] == ';' {
		all = all[:n-1]
	}
	return all
}

func lineAt(sql string, i int) int { return 1 + strings.Count(sql[:i], "\n") }

// makesRoutine reports whether a statement's first words are create [or replace] function or procedure.
func makesRoutine(first []string) bool {
	if len(first) < 2 || first[0] != "create" {
		return false
	}
	what := first[1]
	if len(first) >= 4 && what == "or" && first[2] == "replace" {
		what = first[3]
	}
	return what == "function" || what == "procedure"
}

func isSpace(c byte) bool {
	return c == ' ' || c == '\t' || c == '\n' || c == '\r' || c == '\f' || c == '\v'
}

func isWordStart(c byte) bool {
	return c == '_' || c >= 0x80 || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

func isWord(c byte) bool { return isWordStart(c) || isDigit(c) || c == '$' }

// skipQuoted returns the place behind a literal or quoted name that begins at i; a doubled quote belongs to it.
func skipQuoted(sql string, i int, escapes bool) (end int, open bool) {
	quote := sql[i]
	for i++; i < len(sql); i++ {
		switch {
		case escapes && sql[i] == '\\':
			i++
		case sql[i] == quote && i+1 < len(sql) && sql[i+1] == quote:
			i++
		case sql[i] == quote:
			return i + 1, false
		}
	}
	return len(sql), true
}

func skipTo(sql string, i int, end string) (int, bool) {
	if n := strings.Index(sql[i:], end); n >= 0 {
		return i + n + len(end), false
	}
	return len(sql), true
}

// skipComment returns the place behind a comment that begins at i. They nest.
func skipComment(sql string, i int) (end int, open bool) {
	for depth := 0; i < len(sql); {
		switch {
		case strings.HasPrefix(sql[i:], "/*"):
			depth++
			i += 2
		case strings.HasPrefix(sql[i:], "*/"):
			depth--
			i += 2
			if depth == 0 {
				return i, false
			}
		default:
			i++
		}
	}
	return len(sql), true
}

// skipDollar reads what a dollar begins at i: a dollar-quoted literal, a parameter, or nothing but itself.
func skipDollar(sql string, i int) (kind tokenKind, end int, open bool) {
	j := i + 1
	if j < len(sql) && isDigit(sql[j]) {
		for j < len(sql) && isDigit(sql[j]) {
			j++
		}
		return parameter, j, false
	}
	for j < len(sql) && isWord(sql[j]) && sql[j] != '$' {
		j++
	}
	if j >= len(sql) || sql[j] != '$' {
		return mark, i + 1, false
	}
	end, open = skipTo(sql, j+1, sql[i:j+1])
	return literal, end, open
}

// lastingCalls are functions whose effect a session keeps, and in code that runs at once what sets a setting.
var (
	lastingCalls = regexp.MustCompile(`(?i)\b(set_config|pg_(try_)?advisory_lock(_shared)?)\b`)
	lastingCode  = regexp.MustCompile(`(?i)\bset\s+(session\s+)?"?[a-z_.]+"?\s*(=|to\b)|\bset\s+(session\s+)?(role|time\s+zone|session\s+authorization)\b|\b(reset|listen|prepare|load)\b`)
)

// lasts reports whether a text may leave behind in its session what outlives its transaction. It errs to that side.
// Temporary tables are refused to the owner.
func lasts(sql string) bool {
	if lastingCalls.MatchString(sql) {
		return true
	}
	for _, s := range statementsOf(sql) {
		switch first, _ := firstWords(s.text); {
		case sets(s.text):
			return true
		case first == "load", first == "listen", first == "prepare", first == "declare", first == "discard":
			return true
		case first == "do" && lastingCode.MatchString(s.text):
			return true
		}
	}
	return false
}

// sets reports whether a statement sets something for the rest of its session.
func sets(statement string) bool {
	switch first, second := firstWords(statement); first {
	case "reset":
		return true
	case "set":
		return second != "local" && second != "constraints" && second != "transaction"
	}
	return false
}

// firstWords are the two words with which a statement begins, in lower case; empty where it is no word.
func firstWords(statement string) (first, second string) {
	found := make([]string, 2)
	for i, t := range tokens(statement) {
		if t.kind != word || i == len(found) {
			break
		}
		found[i] = strings.ToLower(statement[t.start:t.end])
	}
	return found[0], found[1]
}
