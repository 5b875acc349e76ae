package migrate

import (
	"strings"
)

// transactionControl are the words with which a statement begins, commits or takes back a transaction. "prepare
// transaction" is told from an ordinary prepare by its second word.
var transactionControl = map[string]bool{
	"begin": true, "start": true, "commit": true, "end": true, "rollback": true, "abort": true, "savepoint": true, "release": true,
}

// controlIn finds the first statement of a script that is transaction control: its words and the line it stands on. A
// step is one transaction together with its ledger row; a script that ends it leaves half of itself behind when the
// rest fails. What stands in quotes, dollar quotes, comments and the body of an SQL function is no such statement.
func controlIn(sql string) (words string, line int, found bool) {
	var first []string // the statement's first four words
	var at int         // where its first word stands
	parens, depth := 0, 0
	for i := 0; i < len(sql); {
		switch c := sql[i]; {
		case c == '\'':
			i = skipQuoted(sql, i, false)
			first = append(first, "") // a literal ends the run of words
		case c == '"':
			i = skipQuoted(sql, i, false)
			first = append(first, "")
		case strings.HasPrefix(sql[i:], "--"):
			i = skipTo(sql, i, "\n")
		case strings.HasPrefix(sql[i:], "/*"):
			i = skipComment(sql, i)
		case c == '$':
			i = skipDollar(sql, i)
		case c == '(':
			parens++
			i++
		case c == ')':
			parens = max(parens-1, 0)
			i++
		case c == ';':
			i++
			if depth == 0 {
				first, parens = first[:0], 0
			}
		case isWordStart(c):
			start := i
			for i < len(sql) && isWord(sql[i]) {
				i++
			}
			word := strings.ToLower(sql[start:i])
			if i < len(sql) && sql[i] == '\'' && (word == "e" || word == "b" || word == "x" || word == "n") {
				i = skipQuoted(sql, i, word == "e")
				first = append(first, "")
				continue
			}
			if len(first) == 0 {
				at = start
			}
			if len(first) < 4 {
				first = append(first, word)
				if transactionControl[first[0]] || len(first) == 2 && first[0] == "prepare" && word == "transaction" {
					return strings.Join(first, " "), 1 + strings.Count(sql[:at], "\n"), true
				}
			}
			// The body of an SQL function in the standard's form: begin atomic ...; ...; end. psql counts the same way.
			if parens == 0 && makesRoutine(first) {
				switch {
				case word == "begin", word == "case" && depth > 0:
					depth++
				case word == "end" && depth > 0:
					depth--
				}
			}
		default:
			i++
		}
	}
	return "", 0, false
}

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

func isWordStart(c byte) bool {
	return c == '_' || c >= 0x80 || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

func isWord(c byte) bool { return isWordStart(c) || c >= '0' && c <= '9' || c == '$' }

// skipQuoted returns the place behind a literal or quoted name that begins at i; a doubled quote belongs to it.
func skipQuoted(sql string, i int, escapes bool) int {
	quote := sql[i]
	for i++; i < len(sql); i++ {
		switch {
		case escapes && sql[i] == '\\':
			i++
		case sql[i] == quote && i+1 < len(sql) && sql[i+1] == quote:
			i++
		case sql[i] == quote:
			return i + 1
		}
	}
	return len(sql)
}

func skipTo(sql string, i int, end string) int {
	if n := strings.Index(sql[i:], end); n >= 0 {
		return i + n + len(end)
	}
	return len(sql)
}

// skipComment returns the place behind a comment that begins at i. They nest.
func skipComment(sql string, i int) int {
	for depth := 0; i < len(sql); {
		switch {
		case strings.HasPrefix(sql[i:], "/*"):
			depth++
			i += 2
		case strings.HasPrefix(sql[i:], "*/"):
			depth--
			i += 2
			if depth == 0 {
				return i
			}
		default:
			i++
		}
	}
	return len(sql)
}

// skipDollar returns the place behind a dollar-quoted literal that begins at i, or behind a dollar that begins none.
func skipDollar(sql string, i int) int {
	j := i + 1
	for j < len(sql) && isWord(sql[j]) && sql[j] != '$' {
		j++
	}
	if j >= len(sql) || sql[j] != '$' || j > i+1 && !isWordStart(sql[i+1]) {
		return i + 1
	}
	return skipTo(sql, j+1, sql[i:j+1])
}
