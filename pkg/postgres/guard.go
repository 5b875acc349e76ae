package postgres

import (
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// allowed are the statements that cannot outlive their transaction. A list of what is refused would have to name SET,
// RESET, LISTEN, PREPARE, DEALLOCATE, DISCARD, LOCK, DECLARE, LOAD, DO, COPY and whatever comes next.
var allowed = []string{"select", "insert", "update", "delete", "with", "values", "merge", "explain"}

// lasting finds calls that change a session or a lock that outlives the transaction, whatever statement they hide in,
// and the ways to write a name so that it is not seen.
var lasting = regexp.MustCompile(`(?i)\b(set_config|pg_(try_)?advisory_(lock|unlock)\w*|pg_notify|dblink\w*)[\s\v]*(\(|/\*|--)|"(set_config|pg_[a-z_]*)"|\bu&"`)

// disguised finds what runs a statement that the guard does not see: an update of the view pg_settings calls
// set_config, the functions take SQL as text. Large objects belong to who makes them, and a tenant's role owns nothing.
var disguised = regexp.MustCompile(`(?i)\b(pg_settings|pg_file_settings|(query|cursor|table|schema|database)_to_xml\w*|ts_stat|ts_rewrite|lo_[a-z]+|lowrite|loread)\b`)

// explained finds what EXPLAIN may run besides plain statements.
var explained = regexp.MustCompile(`(?i)\b(execute|declare|create|refresh)\b`)

// maxPassed bounds the statements whose verdict is remembered.
const maxPassed = 4096

// guard refuses what a handler must not run. A statement that has passed is not looked at again: there are few, and
// looking costs more than sending them.
func (g *group) guard(sql string) error {
	if _, passed := g.passed.Load(sql); passed {
		return nil
	}
	if err := guard(sql); err != nil {
		return err
	}
	if g.passedCount.Add(1) <= maxPassed {
		g.passed.Store(sql, struct{}{})
	}
	return nil
}

// guard refuses what a handler must not run: everything but plain reading and writing.
func guard(sql string) error {
	word := firstWord(sql)
	if !slices.Contains(allowed, word) {
		return fault.New(fault.Internal, "statement %q is not allowed in a bound transaction", word).WithCode("statement_refused")
	}
	if m := explained.FindString(sql); word == "explain" && m != "" {
		return fault.New(fault.Internal, "explain %s is not allowed in a bound transaction", m).WithCode("statement_refused")
	}
	m := lasting.FindString(sql)
	if m == "" {
		m = disguised.FindString(sql)
	}
	if m != "" {
		return fault.New(fault.Internal, "%q is not allowed in a bound transaction", strings.TrimSpace(m)).WithCode("statement_refused")
	}
	return nil
}

// firstWord is the first key word of a statement in lower case, behind white space, comments and parentheses.
func firstWord(sql string) string {
	for {
		sql = strings.TrimLeft(sql, " \t\r\n\f\v(;")
		switch {
		case strings.HasPrefix(sql, "--"):
			_, rest, ok := strings.Cut(sql, "\n")
			if !ok {
				return ""
			}
			sql = rest
		case strings.HasPrefix(sql, "/*"):
			sql = afterComment(sql)
		default:
			end := strings.IndexFunc(sql, func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') })
			if end < 0 {
				end = len(sql)
			}
			return strings.ToLower(sql[:end])
		}
	}
}

// afterComment is what stands behind the comment with which sql begins. PostgreSQL nests comments.
func afterComment(sql string) string {
	depth := 0
	for i := 0; i+1 < len(sql); {
		switch sql[i : i+2] {
		case "/*":
			depth++
			i += 2
		case "*/":
			depth--
			if i += 2; depth == 0 {
				return sql[i:]
			}
		default:
			i++
		}
	}
	return ""
}

// guardArgs refuses pgx's switches among the arguments: the simple protocol would run several statements, and a
// rewriter would make another statement of the one that passed the guard.
func guardArgs(args []any) error {
	for _, a := range args {
		switch a.(type) {
		case pgx.QueryExecMode, pgx.QueryRewriter:
			return fault.New(fault.Internal, "%T is not allowed in a bound transaction", a).WithCode("statement_refused")
		}
	}
	return nil
}
