package postgres

import (
	"regexp"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// allowed are the statements that cannot outlive their transaction. A list of what is refused would have to name SET,
// RESET, LISTEN, PREPARE, DEALLOCATE, DISCARD, LOCK, DECLARE, LOAD, DO, COPY and whatever comes next.
var allowed = []string{"select", "insert", "update", "delete", "with", "values", "merge", "explain"}

// lasting finds calls that change a session or a lock that outlives the transaction, whatever statement they hide in.
var lasting = regexp.MustCompile(`(?i)\b(set_config|pg_(try_)?advisory_(lock|unlock)\w*|pg_notify|dblink\w*)\s*\(|"(set_config|pg_[a-z_]*)"`)

// guard refuses what a handler must not run: everything but plain reading and writing.
func guard(sql string) error {
	word := firstWord(sql)
	if !slices.Contains(allowed, word) {
		return fault.New(fault.Internal, "statement %q is not allowed in a bound transaction", word).WithCode("statement_refused")
	}
	if m := lasting.FindString(sql); m != "" {
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
			// PostgreSQL nests comments; a statement that needs that is refused below by its "*/".
			_, rest, ok := strings.Cut(sql, "*/")
			if !ok {
				return ""
			}
			sql = rest
		default:
			end := strings.IndexFunc(sql, func(r rune) bool { return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') })
			if end < 0 {
				end = len(sql)
			}
			return strings.ToLower(sql[:end])
		}
	}
}
