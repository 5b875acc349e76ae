package lint

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"sort"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/wasilibs/go-pgquery/parser"
)

// node is one node of PostgreSQL's parse tree, as libpg_query writes it in JSON. A node that may be of several kinds
// stands in an object with its kind as the only key, which is capitalised; fields never are.
type node = map[string]any

// errUnread is a text that the parser could not take, and why.
type errUnread struct {
	message string
	offset  int // in bytes; 0 when the parser gave no place
}

func (e *errUnread) Error() string { return e.message }

// sandbox lets one call at a time into the parser: each that finds it busy would load another one, for a second and more.
var sandbox struct {
	sync.Mutex
	loaded bool
}

// patience is how long the parser may take for a text. It reads a megabyte in less than a second; of an expression of
// many hundred operators in a row it overruns its stack, and may then never end.
func patience(sql string) time.Duration {
	return 5*time.Second + time.Duration(len(sql)/100_000)*time.Second
}

// guarded runs one call of the parser, which is C in a sandbox: what breaks out of it as a panic, or never ends, is an
// error here. After a panic the sandbox may be broken, and find nothing but errors for the rest of the process. A call
// that never ends cannot be stopped either: it is left behind with its sandbox, and the next call loads a new one.
func guarded[T any](sql string, call func(string) (T, error)) (T, error) {
	type answer struct {
		result T
		err    error
	}
	var none T
	if i := strings.IndexByte(sql, 0); i >= 0 {
		return none, &errUnread{message: "it holds a NUL byte", offset: i}
	}
	if !utf8.ValidString(sql) {
		return none, &errUnread{message: "it is not UTF-8"}
	}
	sandbox.Lock()
	defer sandbox.Unlock()
	if !sandbox.loaded {
		if _, err := parser.ScanToProtobuf("select 1"); err != nil {
			return none, fmt.Errorf("load the parser: %w", err)
		}
		sandbox.loaded = true
	}
	done := make(chan answer, 1)
	go func() {
		a := answer{err: &errUnread{message: "the parser gave up: it may be nested too deeply"}}
		defer func() {
			_ = recover() // the answer says it
			done <- a
		}()
		result, err := call(sql)
		a = answer{result, err}
	}()
	limit := time.NewTimer(patience(sql))
	defer limit.Stop()
	select {
	case a := <-done:
		var pe *parser.Error
		if errors.As(a.err, &pe) {
			return none, &errUnread{message: pe.Message, offset: byteOf(sql, pe.Cursorpos)}
		}
		return a.result, a.err
	case <-limit.C:
		sandbox.loaded = false
		return none, &errUnread{message: "the parser did not end: it is nested too deeply"}
	}
}

// byteOf turns a position in characters, from 1, into one in bytes.
func byteOf(sql string, position int) int {
	n := 0
	for i := range sql {
		if n++; n >= position {
			return i
		}
	}
	return len(sql)
}

// statement is one statement of a script.
type statement struct {
	kind string
	node node
	// start is where its text begins, past blanks and comments.
	start int
}

// parse reads a script into statements.
func parse(src source) ([]statement, error) {
	text, err := guarded(src.text, parser.ParseToJSON)
	if err != nil {
		return nil, err
	}
	var tree struct {
		Stmts []struct {
			Stmt     node `json:"stmt"`
			Location int  `json:"stmt_location"`
		} `json:"stmts"`
	}
	if err := json.Unmarshal([]byte(text), &tree); err != nil {
		return nil, &errUnread{message: "it is nested too deeply"}
	}
	stmts := make([]statement, 0, len(tree.Stmts))
	for _, s := range tree.Stmts {
		kind, n := unwrap(s.Stmt)
		stmts = append(stmts, statement{kind: kind, node: n, start: src.firstToken(s.Location)})
	}
	return stmts, nil
}

// source is a text with its tokens.
type source struct {
	text   string
	tokens []token
	// line is the line of the file on which the text begins, from 1.
	line int
}

// token is one word of SQL, by its place in bytes.
type token struct {
	start, end int
	kind       int
}

// The parser's numbers of the kinds of token that are looked at.
const (
	identToken     = 258
	stringToken    = 261
	sqlComment     = 275
	cComment       = 276
	semicolonToken = ';'
)

// newSource finds the tokens of a text. A text that cannot be cut into tokens has none; parsing it then says why.
func newSource(text string, line int) source {
	src := source{text: text, line: line}
	wire, err := guarded(text, parser.ScanToProtobuf)
	if err != nil {
		return src
	}
	fields(wire, func(number int, _ uint64, body []byte) {
		if number != 2 {
			return
		}
		var t token
		fields(body, func(number int, value uint64, _ []byte) {
			switch number {
			case 1:
				t.start = int(value)
			case 2:
				t.end = int(value)
			case 4:
				t.kind = int(value)
			}
		})
		if t.start >= 0 && t.start <= t.end && t.end <= len(text) {
			src.tokens = append(src.tokens, t)
		}
	})
	return src
}

// fields reads the fields of a protobuf message that holds numbers and messages only. A message that is cut short ends
// the reading.
func fields(wire []byte, visit func(number int, value uint64, body []byte)) {
	for len(wire) > 0 {
		key, n := binary.Uvarint(wire)
		if n <= 0 {
			return
		}
		wire = wire[n:]
		value, n := binary.Uvarint(wire)
		if n <= 0 {
			return
		}
		wire = wire[n:]
		switch key & 7 {
		case 0:
			visit(int(key>>3), value, nil)
		case 2:
			if value > uint64(len(wire)) {
				return
			}
			visit(int(key>>3), 0, wire[:value])
			wire = wire[value:]
		default:
			return
		}
	}
}

// lineOf is the line of the file on which a byte of the text stands.
func (s source) lineOf(offset int) int {
	offset = max(0, min(offset, len(s.text)))
	return s.line + strings.Count(s.text[:offset], "\n")
}

// firstToken is the place of the first token at or behind an offset that is no comment.
func (s source) firstToken(offset int) int {
	i := sort.Search(len(s.tokens), func(i int) bool { return s.tokens[i].start >= offset })
	for ; i < len(s.tokens); i++ {
		if k := s.tokens[i].kind; k != sqlComment && k != cComment {
			return s.tokens[i].start
		}
	}
	return max(0, min(offset, len(s.text)))
}

// statementOf is the place behind the last semicolon before an offset.
func (s source) statementOf(offset int) int {
	at := 0
	for _, t := range s.tokens {
		if t.start >= offset {
			break
		}
		if t.kind == semicolonToken {
			at = t.end
		}
	}
	return at
}

// semicolonAfter is the place of the first semicolon behind an offset; -1 when there is none.
func (s source) semicolonAfter(offset int) int {
	for _, t := range s.tokens {
		if t.start > offset && t.kind == semicolonToken {
			return t.start
		}
	}
	return -1
}

// stringAfter is the place of the first literal at or behind an offset.
func (s source) stringAfter(offset int) int {
	for _, t := range s.tokens {
		if t.start >= offset && t.kind == stringToken {
			return t.start
		}
	}
	return max(0, min(offset, len(s.text)))
}

// pieces cuts the text at its semicolons, so that what can be read is read when one statement cannot.
func (s source) pieces() []source {
	var all []source
	from := 0
	cut := func(to int) {
		if strings.TrimSpace(s.text[from:to]) != "" {
			all = append(all, newSource(s.text[from:to], s.lineOf(from)))
		}
		from = to
	}
	for _, t := range s.tokens {
		if t.kind == semicolonToken {
			cut(t.end)
		}
	}
	cut(len(s.text))
	return all
}

// unwrap takes a node out of the object that names its kind; the kind is empty when the field has but one.
func unwrap(v any) (kind string, n node) {
	n, ok := v.(node)
	if !ok {
		return "", nil
	}
	if len(n) == 1 {
		for k, inner := range n {
			if in, ok := inner.(node); ok && k != "" && k[0] >= 'A' && k[0] <= 'Z' {
				return k, in
			}
		}
	}
	return "", n
}

// walk visits every node below v, v included, until visit says no for a branch.
func walk(v any, visit func(kind string, n node) bool) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			walk(e, visit)
		}
	case node:
		kind, n := unwrap(v)
		if kind == "" {
			kind = plainKind(n)
		}
		if !visit(kind, n) {
			return
		}
		for _, e := range n {
			walk(e, visit)
		}
	}
}

// plainKind is the kind of a node in a field that holds but one, as far as it matters here.
func plainKind(n node) string {
	switch {
	case n["relname"] != nil:
		return "RangeVar"
	case n["names"] != nil:
		return "TypeName"
	case n["funcformat"] != nil:
		return "FuncCall"
	}
	return ""
}

func str(n node, key string) string {
	s, _ := n[key].(string)
	return s
}

func flag(n node, key string) bool {
	b, _ := n[key].(bool)
	return b
}

func num(n node, key string) int {
	f, _ := n[key].(float64)
	return int(f)
}

func list(n node, key string) []any {
	l, _ := n[key].([]any)
	return l
}

// sub is the node in a field, of whatever kind.
func sub(n node, key string) node {
	_, in := unwrap(n[key])
	return in
}

// words are the texts of a list of String nodes; nil when anything else stands in it.
func words(items []any) []string {
	all := make([]string, 0, len(items))
	for _, it := range items {
		kind, n := unwrap(it)
		if kind != "String" {
			return nil
		}
		all = append(all, str(n, "sval"))
	}
	return all
}

// constant is the text of a literal, also of one that is cast.
func constant(v any) (string, bool) {
	kind, n := unwrap(v)
	switch kind {
	case "TypeCast":
		return constant(n["arg"])
	case "A_Const":
		if s := sub(n, "sval"); s != nil {
			return str(s, "sval"), true
		}
	}
	return "", false
}

// isConstant reports whether an expression has no column in it.
func isConstant(v any) bool {
	is := true
	walk(v, func(kind string, _ node) bool {
		if kind == "ColumnRef" || kind == "SubLink" || kind == "CurrentOfExpr" {
			is = false
		}
		return is
	})
	return is
}

// columns are the names of the columns in an expression, without their tables.
func columns(v any) map[string]bool {
	all := map[string]bool{}
	walk(v, func(kind string, n node) bool {
		if kind == "ColumnRef" {
			if w := words(list(n, "fields")); len(w) > 0 {
				all[w[len(w)-1]] = true
			}
		}
		return true
	})
	return all
}

// plBody are the parts of a PL/pgSQL function that hold SQL.
type plBody struct {
	queries []plQuery
	dynamic []int // lines of statements whose text is put together as they run
	control []int // lines of commit and rollback
	types   []plQuery
}

// plQuery is one piece of SQL and the line of the body on which its statement begins, from 1.
type plQuery struct {
	text string
	line int
	// runs is false of an expression.
	runs bool
}

// readPL reads a function or do block in PL/pgSQL.
func readPL(text string) (plBody, error) {
	out, err := guarded(text, parser.ParsePlPgSqlToJSON)
	if err != nil {
		return plBody{}, err
	}
	var functions []any
	if err := json.Unmarshal([]byte(out), &functions); err != nil {
		return plBody{}, fmt.Errorf("read the parser's answer: %w", err)
	}
	var b plBody
	b.read(functions, "", 1)
	return b, nil
}

func (b *plBody) read(v any, kind string, line int) {
	switch v := v.(type) {
	case []any:
		for _, e := range v {
			b.read(e, "", line)
		}
	case node:
		if n := num(v, "lineno"); n > 0 {
			line = n
		}
		switch kind {
		case "PLpgSQL_stmt_dynexecute", "PLpgSQL_stmt_dynfors":
			b.dynamic = append(b.dynamic, line)
		case "PLpgSQL_stmt_return_query", "PLpgSQL_stmt_open":
			if v["dynquery"] != nil {
				b.dynamic = append(b.dynamic, line)
			}
		case "PLpgSQL_stmt_commit", "PLpgSQL_stmt_rollback":
			b.control = append(b.control, line)
		case "PLpgSQL_type":
			b.types = append(b.types, plQuery{text: str(v, "typname"), line: line})
		case "PLpgSQL_expr":
			b.expression(str(v, "query"), num(v, "parseMode"), line)
		}
		keys := make([]string, 0, len(v))
		for k := range v {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			b.read(v[k], k, line)
		}
	}
}

// expression notes a piece of SQL. parseMode 0 is a statement, 2 an expression, and above that an assignment.
func (b *plBody) expression(query string, mode, line int) {
	switch {
	case query == "":
	case mode == 0:
		b.queries = append(b.queries, plQuery{text: query, line: line, runs: true})
	case mode == 2:
		b.queries = append(b.queries, plQuery{text: "select " + query, line: line})
	default:
		target, value, found := strings.Cut(query, ":=")
		if !found {
			target, value, _ = strings.Cut(query, "=")
		}
		// The target has expressions of its own, as subscripts.
		b.queries = append(b.queries, plQuery{text: "select " + target, line: line}, plQuery{text: "select " + value, line: line})
	}
}
