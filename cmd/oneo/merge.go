package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"text/tabwriter"

	"gopkg.in/yaml.v3"
)

// cell is one value of a merged result.
type cell struct {
	json json.RawMessage // nil: null
	text string          // as PostgreSQL writes it, for csv and tables
}

func stringCell(s string) cell {
	text, err := json.Marshal(s)
	if err != nil {
		panic(err) // a string
	}
	return cell{json: text, text: s}
}

func numberCell(n int64) cell {
	text := strconv.FormatInt(n, 10)
	return cell{json: json.RawMessage(text), text: text}
}

// piece is what one tenant adds to a merged result.
type piece struct {
	tenant string
	rows   [][]byte // as they are written, without what stands between them
	bytes  int
	// told follows the rows: an error, or why there are no more of them.
	told *reportedError
}

// merged writes what many tenants answer as one result, in the order of the plan, whoever is first. Of a tenant that
// keeps the others waiting it does not hold more than mergedBytes: then it is written when it comes. In ndjson, csv,
// json and yaml nothing that has been written is held; a table is written at the end.
type merged struct {
	e     *env
	max   int  // rows in all; 0: no bound
	alone bool // there is one piece, and no tenant: its rows stand by themselves

	mu      sync.Mutex
	columns []string // behind the tenant; nil until they are known
	held    map[int]piece
	bytes   int // held
	next    int // the ordinal whose turn it is
	rows    int // written
	begun   bool
	table   []piece // held to the end
	errors  bool
	cut     int // tenants whose rows are not all there
	err     error
}

// mergedBytes is how much is held for the order's sake.
const mergedBytes = 64 << 20

// tenantBytes is how much of one tenant's answer is taken.
const tenantBytes = 16 << 20

func newMerged(e *env, columns []string, max int) *merged {
	return &merged{e: e, max: max, columns: columns, held: map[int]piece{}}
}

// know fixes the columns, the first time that it is called.
func (m *merged) know(columns []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.columns == nil {
		m.columns = append([]string{}, columns...)
	}
}

// full reports whether the rows of the tenants before this one are already as many as are to be shown.
func (m *merged) full(ordinal int) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.rows
	for o, p := range m.held {
		if o < ordinal {
			n += len(p.rows)
		}
	}
	return m.max > 0 && n >= m.max
}

// unread reports whether nobody takes what is written any more.
func (m *merged) unread() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err != nil
}

// add takes a tenant's part.
func (m *merged) add(ordinal int, p piece) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.held[ordinal] = p
	m.bytes += p.bytes
	late := ordinal < m.next
	for m.columns != nil {
		p, ok := m.held[m.next]
		if !ok {
			break
		}
		m.take(m.next, p)
		m.next++
	}
	if late {
		m.take(ordinal, p)
	} else if m.bytes > mergedBytes {
		m.release()
	}
}

// release writes all that is held, in its order.
func (m *merged) release() {
	ordinals := make([]int, 0, len(m.held))
	for o := range m.held {
		ordinals = append(ordinals, o)
	}
	slices.Sort(ordinals)
	for _, o := range ordinals {
		m.take(o, m.held[o])
		m.next = max(m.next, o+1)
	}
}

func (m *merged) take(ordinal int, p piece) {
	delete(m.held, ordinal)
	m.bytes -= p.bytes
	if left := m.max - m.rows; m.max > 0 && len(p.rows) > left {
		p.rows, p.told = p.rows[:left], m.cutAll()
	}
	if p.told != nil && p.told.Code == rowsCut {
		m.cut++
	}
	m.rows += len(p.rows)
	if m.e.output == "table" {
		m.table = append(m.table, p)
		m.errors = m.errors || p.told != nil
		return
	}
	for _, row := range p.rows {
		m.write(row)
		if m.e.output == "name" && !m.alone {
			break
		}
	}
	if p.told != nil && m.e.output != "name" {
		m.write(m.encode(p.tenant, nil, p.told))
	}
}

// The codes of what is said where rows are missing.
const rowsCut = "rows_cut"

func (m *merged) cutTenant(limit int) *reportedError {
	return m.cutAfter(fmt.Sprintf("only the first %d rows", limit), "raise --limit, or write 0 for no bound")
}

func (m *merged) cutBytes() *reportedError {
	return m.cutAfter(fmt.Sprintf("only the first %d MiB", tenantBytes>>20), "select fewer columns")
}

func (m *merged) cutAfter(message, hint string) *reportedError {
	if !m.alone {
		message += " of this tenant"
	}
	return &reportedError{Code: rowsCut, Message: message, Hint: hint}
}

func (m *merged) cutAll() *reportedError {
	message := fmt.Sprintf("only the first %d rows", m.max)
	if !m.alone {
		message += " of all tenants"
	}
	return &reportedError{Code: rowsCut, Message: message, Hint: "raise --max-rows, or write 0 for no bound"}
}

// write writes one row and what stands between it and the one before.
func (m *merged) write(row []byte) {
	if m.err != nil {
		return
	}
	var b []byte
	switch {
	case m.e.output == "json" && m.begun:
		b = []byte(",\n  ")
	case m.e.output == "json":
		b = []byte("[\n  ")
	case m.e.output == "csv" && !m.begun:
		b = m.heading()
	}
	m.begun = true
	_, m.err = m.e.out.Write(append(b, row...))
}

func (m *merged) heading() []byte {
	var b bytes.Buffer
	for i, c := range slices.Concat(m.first("tenant"), m.columns, []string{"error"}) {
		if i > 0 {
			b.WriteByte(',')
		}
		csvField(&b, c)
	}
	b.WriteByte('\n')
	return b.Bytes()
}

// first is what stands before the columns, where there are tenants.
func (m *merged) first(s string) []string {
	if m.alone {
		return nil
	}
	return []string{s}
}

// end writes what is left, and what a result without rows consists of.
func (m *merged) end() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.release()
	rest := ""
	switch m.e.output {
	case "json":
		rest = "\n]\n"
		if !m.begun {
			rest = "[]\n"
		}
	case "yaml":
		if !m.begun {
			rest = "[]\n"
		}
	case "csv":
		if !m.begun {
			rest = string(m.heading())
		}
	case "table":
		return m.flush()
	}
	if m.err == nil {
		_, m.err = fmt.Fprint(m.e.out, rest)
	}
	return m.err
}

// flush writes the table.
func (m *merged) flush() error {
	w := tabwriter.NewWriter(m.e.out, 0, 4, 2, ' ', 0)
	heading := slices.Concat(m.first("TENANT"), m.columns)
	for i, h := range heading {
		heading[i] = text(strings.ToUpper(h))
	}
	if m.errors {
		heading = append(heading, "ERROR")
	}
	fmt.Fprintln(w, strings.Join(heading, "\t"))
	for _, p := range m.table {
		for _, row := range p.rows {
			if m.errors {
				row = append(row[:len(row)-1:len(row)-1], '\t', '\n')
			}
			if _, err := w.Write(row); err != nil {
				return err
			}
		}
		if p.told != nil {
			fmt.Fprintf(w, "%s\t%s\n", strings.Join(append(m.first(text(p.tenant)), make([]string, len(m.columns))...), "\t"), text(p.told))
		}
	}
	return w.Flush()
}

// encode writes one row in the form that was asked for: cells, or what is to be told in their place.
func (m *merged) encode(tenant string, cells []cell, told *reportedError) []byte {
	var b bytes.Buffer
	switch m.e.output {
	case "csv":
		for _, t := range m.first(tenant) {
			csvField(&b, t)
			b.WriteByte(',')
		}
		for i := range m.columns {
			if i < len(cells) && cells[i].json != nil {
				csvField(&b, cells[i].text)
			}
			b.WriteByte(',')
		}
		if told != nil {
			csvField(&b, told.Message)
		}
	case "table":
		fields := m.first(text(tenant))
		for _, c := range cells {
			fields = append(fields, text(c.text))
		}
		b.WriteString(strings.Join(fields, "\t"))
	case "name":
		if b.WriteString(tenant); m.alone && len(cells) > 0 {
			b.WriteString(text(cells[0].text))
		}
	case "yaml":
		row, err := yaml.Marshal(yamlRow(m.keys(tenant, cells, told)))
		if err != nil { // a value that YAML cannot hold
			return m.encode(tenant, nil, &reportedError{Code: "value", Message: err.Error()})
		}
		return row
	default:
		b.WriteByte('{')
		for i, kv := range m.keys(tenant, cells, told) {
			if i > 0 {
				b.WriteByte(',')
			}
			b.Write(stringCell(kv.key).json)
			b.WriteByte(':')
			b.Write(kv.value)
		}
		b.WriteByte('}')
		if m.e.output == "json" {
			return b.Bytes()
		}
	}
	b.WriteByte('\n')
	return b.Bytes()
}

type keyed struct {
	key   string
	value json.RawMessage
}

// keys are a row's keys and values: the tenant first.
func (m *merged) keys(tenant string, cells []cell, told *reportedError) []keyed {
	var all []keyed
	for _, t := range m.first(tenant) {
		all = append(all, keyed{"tenant", stringCell(t).json})
	}
	for i, c := range cells {
		if c.json == nil {
			c.json = json.RawMessage("null")
		}
		all = append(all, keyed{m.columns[i], c.json})
	}
	if told != nil {
		value, err := json.Marshal(told)
		if err != nil {
			panic(err) // strings
		}
		all = append(all, keyed{"error", value})
	}
	return all
}

// csvField writes a value so that an empty string and null differ, as PostgreSQL's own csv does: null is nothing at
// all, an empty string is two quotes.
func csvField(b *bytes.Buffer, s string) {
	if s != "" && s != `\.` && !strings.ContainsAny(s, ",\"\r\n") && !strings.HasPrefix(s, " ") && !strings.HasSuffix(s, " ") {
		b.WriteString(s)
		return
	}
	b.WriteByte('"')
	b.WriteString(strings.ReplaceAll(s, `"`, `""`))
	b.WriteByte('"')
}

// yamlRow is a list of one row, whose keys keep their order and whose numbers keep their digits.
func yamlRow(row []keyed) *yaml.Node {
	m := &yaml.Node{Kind: yaml.MappingNode}
	for _, kv := range row {
		m.Content = append(m.Content, yamlString(kv.key), yamlNode(kv.value))
	}
	return &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{m}}
}

func yamlScalar(tag, value string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: value}
}

// yamlString is a string that no reader of YAML, old or new, takes for anything else.
func yamlString(value string) *yaml.Node {
	n := &yaml.Node{}
	if err := n.Encode(value); err != nil {
		return yamlScalar("!!str", strings.ToValidUTF8(value, "?"))
	}
	return n
}

func yamlNode(value json.RawMessage) *yaml.Node {
	dec := json.NewDecoder(bytes.NewReader(value))
	dec.UseNumber()
	token, err := dec.Token()
	if err != nil {
		return yamlString(string(value)) // PostgreSQL's own json, and not Go's
	}
	switch t := token.(type) {
	case json.Delim:
		if t == '[' {
			var items []json.RawMessage
			if json.Unmarshal(value, &items) != nil {
				return yamlString(string(value))
			}
			n := &yaml.Node{Kind: yaml.SequenceNode}
			for _, it := range items {
				n.Content = append(n.Content, yamlNode(it))
			}
			return n
		}
		n := &yaml.Node{Kind: yaml.MappingNode}
		for dec.More() {
			key, err := dec.Token()
			var v json.RawMessage
			if err != nil || dec.Decode(&v) != nil {
				return yamlString(string(value))
			}
			n.Content = append(n.Content, yamlString(fmt.Sprint(key)), yamlNode(v))
		}
		return n
	case json.Number:
		if strings.ContainsAny(t.String(), ".eE") {
			return yamlScalar("!!float", t.String())
		}
		return yamlScalar("!!int", t.String())
	case string:
		return yamlString(t)
	case bool:
		return yamlScalar("!!bool", fmt.Sprint(t))
	}
	return yamlScalar("!!null", "null")
}

// told is an error in the place of a tenant's rows.
func told(err error) *reportedError {
	if r, ok := errorObject(err).(reportedError); ok {
		return &r
	}
	return nil
}

// uniqueKeys are column names as the keys of a row: none twice, and none that a merged result has itself.
func (m *merged) uniqueKeys(names []string) []string {
	taken := map[string]bool{"tenant": !m.alone, "error": true}
	keys := make([]string, len(names))
	for i, name := range names {
		key := name
		for n := 2; taken[key]; n++ {
			key = fmt.Sprintf("%s_%d", name, n)
		}
		taken[key], keys[i] = true, key
	}
	return keys
}
