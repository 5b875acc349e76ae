package main

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"gopkg.in/yaml.v3"

	"github.com/oneo-crm/oneo/pkg/fault"
)

var outputs = []string{"table", "json", "yaml", "csv", "ndjson", "name"}

func checkOutput(o string) error {
	if slices.Contains(outputs, o) {
		return nil
	}
	return fault.New(fault.Invalid, "unknown output %q", o).WithHint("use one of %s", strings.Join(outputs, ", "))
}

// column is one column of a table: its heading, its key in JSON, and its value.
type column[T any] struct {
	heading string
	key     string
	value   func(T) any
}

// show writes a list in the form that was asked for. The first column is the name. In JSON a list is an array, also
// when it is empty.
func show[T any](e *env, items []T, columns []column[T]) error {
	switch e.output {
	case "json", "yaml":
		list := make([]map[string]any, 0, len(items))
		for _, it := range items {
			list = append(list, object(it, columns))
		}
		return e.encode(list)
	case "ndjson":
		enc := json.NewEncoder(e.out)
		for _, it := range items {
			if err := enc.Encode(object(it, columns)); err != nil {
				return err
			}
		}
		return nil
	case "name":
		for _, it := range items {
			fmt.Fprintln(e.out, text(columns[0].value(it)))
		}
		return nil
	case "csv":
		return writeCSV(e.out, items, columns)
	}
	w := tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
	headings := make([]string, len(columns))
	for i, c := range columns {
		headings[i] = c.heading
	}
	fmt.Fprintln(w, strings.Join(headings, "\t"))
	for _, it := range items {
		cells := make([]string, len(columns))
		for i, c := range columns {
			cells[i] = text(c.value(it))
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
	return w.Flush()
}

// showOne writes one thing: an object in JSON, a line for each column in a table.
func showOne[T any](e *env, it T, columns []column[T]) error {
	switch e.output {
	case "json", "yaml":
		return e.encode(object(it, columns))
	case "table":
		w := tabwriter.NewWriter(e.out, 0, 4, 2, ' ', 0)
		for _, c := range columns {
			if s := text(c.value(it)); s != "" {
				fmt.Fprintf(w, "%s\t%s\n", strings.ToLower(c.heading), s)
			}
		}
		return w.Flush()
	}
	return show(e, []T{it}, columns)
}

func (e *env) encode(v any) error {
	if e.output == "yaml" {
		// By way of JSON, so that both forms have the same keys and the same values.
		text, err := json.Marshal(v)
		if err != nil {
			return err
		}
		if v, err = fromJSON(text); err != nil {
			return err
		}
		enc := yaml.NewEncoder(e.out)
		defer enc.Close()
		return enc.Encode(v)
	}
	enc := json.NewEncoder(e.out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// fromJSON reads JSON into what the YAML encoder writes well: whole numbers stay whole.
func fromJSON(text []byte) (any, error) {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil {
		return nil, err
	}
	var plain func(v any) any
	plain = func(v any) any {
		switch v := v.(type) {
		case map[string]any:
			for k := range v {
				v[k] = plain(v[k])
			}
		case []any:
			for i := range v {
				v[i] = plain(v[i])
			}
		case json.Number:
			if n, err := v.Int64(); err == nil {
				return n
			}
			if n, err := v.Float64(); err == nil {
				return n
			}
			return v.String()
		}
		return v
	}
	return plain(v), nil
}

func object[T any](it T, columns []column[T]) map[string]any {
	m := map[string]any{}
	for _, c := range columns {
		switch v := c.value(it).(type) {
		case time.Time:
			m[c.key] = v.UTC().Format(time.RFC3339)
		case *time.Time:
			m[c.key] = nil
			if v != nil {
				m[c.key] = v.UTC().Format(time.RFC3339)
			}
		case []string:
			m[c.key] = append([]string{}, v...) // never null
		case json.RawMessage:
			m[c.key] = nil
			if len(v) > 0 {
				m[c.key] = v
			}
		default:
			m[c.key] = v
		}
	}
	return m
}

func writeCSV[T any](out io.Writer, items []T, columns []column[T]) error {
	w := csv.NewWriter(out)
	row := make([]string, len(columns))
	for i, c := range columns {
		row[i] = c.key
	}
	if err := w.Write(row); err != nil {
		return err
	}
	for _, it := range items {
		for i, c := range columns {
			row[i] = csvText(c.value(it))
		}
		if err := w.Write(row); err != nil {
			return err
		}
	}
	w.Flush()
	return w.Error()
}

// csvText is a value as programs read it: a number is one, where people read 2 MB.
func csvText(v any) string {
	if n := reflect.ValueOf(v); n.CanInt() {
		return strconv.FormatInt(n.Int(), 10)
	}
	return text(v)
}

// text is a value as people read it. Control characters, which could move a terminal's cursor, are shown as such.
func text(v any) string {
	var s string
	switch v := v.(type) {
	case nil:
		return ""
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case *time.Time:
		if v == nil {
			return ""
		}
		return v.UTC().Format(time.RFC3339)
	case []string:
		s = strings.Join(v, ", ")
	case json.RawMessage:
		s = string(v)
	default:
		s = fmt.Sprint(v)
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
			return '?'
		}
		return r
	}, s)
}
