package mask

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Row is one row as PostgreSQL's COPY writes it in its text format.
type Row struct {
	fields [][]byte
}

// Len is how many columns it has.
func (r *Row) Len() int { return len(r.fields) }

// Get is the value of a column; false: it is null.
func (r *Row) Get(i int) (value string, ok bool) {
	f := r.fields[i]
	if string(f) == `\N` {
		return "", false
	}
	return unescape(f), true
}

// Set changes a column.
func (r *Row) Set(i int, value string) { r.fields[i] = escape(value) }

// Rows are written to w as change leaves them. What is written to it may be cut anywhere; Close writes nothing more, and
// says when the last row was not whole.
func Rows(w io.Writer, change func(*Row) error) io.WriteCloser { return &rows{w: w, change: change} }

type rows struct {
	w      io.Writer
	change func(*Row) error
	part   []byte // of a row that has not come as a whole
	row    Row
	out    []byte
}

func (x *rows) Write(p []byte) (int, error) {
	n := len(p)
	for {
		// A line feed in a value is written as \n: one that stands there ends a row.
		i := bytes.IndexByte(p, '\n')
		if i < 0 {
			x.part = append(x.part, p...)
			return n, nil
		}
		line := p[:i]
		if len(x.part) > 0 {
			x.part = append(x.part, line...)
			line = x.part
		}
		if err := x.line(line); err != nil {
			return 0, err
		}
		x.part, p = x.part[:0], p[i+1:]
	}
}

func (x *rows) line(line []byte) error {
	x.row.fields = x.row.fields[:0]
	for rest, more := line, true; more; {
		var f []byte
		f, rest, more = bytes.Cut(rest, []byte{'\t'})
		x.row.fields = append(x.row.fields, f)
	}
	if err := x.change(&x.row); err != nil {
		return err
	}
	x.out = append(bytes.Join(x.row.fields, []byte{'\t'}), '\n')
	_, err := x.w.Write(x.out)
	return err
}

func (x *rows) Close() error {
	if len(x.part) > 0 {
		return fmt.Errorf("mask: the last row does not end")
	}
	return nil
}

var (
	escapes   = map[byte]byte{'b': '\b', 'f': '\f', 'n': '\n', 'r': '\r', 't': '\t', 'v': '\v'}
	unescapes = strings.NewReplacer("\\", `\\`, "\b", `\b`, "\f", `\f`, "\n", `\n`, "\r", `\r`, "\t", `\t`, "\v", `\v`)
)

// unescape reads a value as COPY writes it: of the escapes only those of single characters.
func unescape(f []byte) string {
	if bytes.IndexByte(f, '\\') < 0 {
		return string(f)
	}
	var b strings.Builder
	for i := 0; i < len(f); i++ {
		c := f[i]
		if c == '\\' && i+1 < len(f) {
			i++
			c = f[i]
			if e, is := escapes[c]; is {
				c = e
			}
		}
		b.WriteByte(c)
	}
	return b.String()
}

func escape(v string) []byte { return []byte(unescapes.Replace(v)) }

// Document masks the members of a JSON object by their kinds, and leaves the others. Of a member that is no text what it
// holds is masked as texts, numbers too: nothing of a member that has a kind stays, but null, true and false.
func (m *Masker) Document(kinds map[string]Kind, text string) (string, error) {
	var object map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &object); err != nil || object == nil { // no object has no members
		return text, nil
	}
	changed := false
	for key, k := range kinds {
		raw, there := object[key]
		if !there {
			continue
		}
		var err error
		if object[key], err = m.JSON(k, raw); err != nil {
			return "", err
		}
		changed = true
	}
	if !changed {
		return text, nil
	}
	body, err := encode(object)
	return string(body), err
}

// JSON masks every text and every number of a JSON value.
func (m *Masker) JSON(k Kind, raw []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, fmt.Errorf("mask: %w", err)
	}
	return encode(m.inside(k, v))
}

func (m *Masker) inside(k Kind, v any) any {
	switch v := v.(type) {
	case string:
		return m.Value(k, v)
	case json.Number:
		return m.Value(k, v.String())
	case []any:
		for i := range v {
			v[i] = m.inside(k, v[i])
		}
	case map[string]any:
		for key := range v {
			v[key] = m.inside(k, v[key])
		}
	}
	return v
}

// encode writes JSON as it is, without the escapes that HTML would need.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}
