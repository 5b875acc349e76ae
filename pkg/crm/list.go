package crm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Bounds of a list.
const (
	MaxLimit       = 1000
	DefaultLimit   = 50
	MaxFilterChars = 3500
	maxFilterTerms = 50
	// MaxPageBytes is how much data a page holds, though its limit allow more records: 1,000 of the largest are 256 MB.
	MaxPageBytes = 8 << 20
)

// Count says whether a list is counted.
type Count string

const (
	CountNone  Count = "none"
	CountExact Count = "exact"
)

// ListQuery selects records of one pipeline, in the order of their ids, which is the order in which they were made.
type ListQuery struct {
	Filter     string // field = value && ...; empty: all
	Descending bool
	Limit      int        // 1..MaxLimit
	After      *uuid.UUID // behind this record, in the order of the list
	Before     *uuid.UUID // the page that ends before this record; not together with After
	Trash      bool       // the records in the trash instead
	Fields     []string   // of the data; nil: all
	Count      Count
}

// Page is a part of a list. Without records it may still have a next one: the page before a record that has become the
// first is empty, and what follows it is the list from its beginning.
type Page struct {
	Records []Record
	HasNext bool
	HasPrev bool
	Count   *int64 // nil: not counted
}

// List reads a page, which ends early where the data is large: HasNext and HasPrev say whether there is more, its length
// does not. Invalid, with the parameter: the query is not understood.
func List(ctx context.Context, q postgres.Querier, pipelineKey string, l ListQuery) (Page, error) {
	p, err := pipeline(ctx, q, pipelineKey, "")
	if err != nil {
		return Page{}, err
	}
	if l.Limit < 1 || l.Limit > MaxLimit {
		return Page{}, parameter("limit", "limit", "the limit must be from 1 to %d", MaxLimit)
	}
	if l.Count != CountNone && l.Count != CountExact {
		return Page{}, parameter("count", "count", "count must be none or exact")
	}
	if l.After != nil && l.Before != nil {
		return Page{}, errors.New("crm: After and Before together")
	}
	for _, f := range l.Fields {
		if _, ok := p.field(f); !ok {
			return Page{}, parameter("fields", "unknown_field", "the pipeline %s has no field %q", p.Key, clipText(f))
		}
	}
	probe, err := p.compile(l.Filter)
	if err != nil {
		return Page{}, err
	}

	args := []any{p.ID}
	arg := func(v any) string { args = append(args, v); return "$" + strconv.Itoa(len(args)) }
	data := "r.data"
	if l.Fields != nil {
		data = "(select coalesce(jsonb_object_agg(e.key, e.value), '{}') from jsonb_each(r.data) e where e.key = any(" + arg(l.Fields) + "))"
	}
	// A range of one, with the pipeline in the order too: an index on (pipeline_id, id) has this order and the primary key
	// has not. With "=" PostgreSQL may walk along the primary key, through all records of other pipelines.
	where := " from records r where r.pipeline_id >= $1 and r.pipeline_id <= $1 and r.deleted_at is "
	if l.Trash {
		where += "not "
	}
	where += "null"
	if probe != nil {
		where += " and r.data @> " + arg(probe)
	}
	// What selects the records, without their place in the list: for the count, and for what lies beyond a page.
	selected, selectedArgs := where, slices.Clone(args)
	if l.Fields != nil { // these have no use for it, and PostgreSQL wants every parameter used
		selected += " and $2::text[] is not null"
	}
	// Towards the page before, the list is walked backwards and turned round.
	back := l.Before != nil
	descending := l.Descending != back
	if at := l.After; at != nil || back {
		if back {
			at = l.Before
		}
		compare := " > "
		if descending {
			compare = " < "
		}
		where += " and r.id" + compare + arg(*at)
	}
	order := " order by r.pipeline_id, r.id"
	if descending {
		order = " order by r.pipeline_id desc, r.id desc"
	}
	sql := "select r.id, " + data + ", r.version, r.created_by, r.created_at, r.updated_at, r.deleted_at" + where + order + " limit " + arg(l.Limit+1)
	rows, err := q.Query(ctx, sql, args...)
	if err != nil {
		return Page{}, err
	}
	page := Page{}
	more := false
	for size := 0; !more && rows.Next(); {
		r, err := scanRecord(rows)
		if err != nil {
			rows.Close()
			return page, err
		}
		size += len(r.Data)
		if more = len(page.Records) == l.Limit || len(page.Records) > 0 && size > MaxPageBytes; !more {
			page.Records = append(page.Records, r)
		}
	}
	rows.Close()
	if err := rows.Err(); err != nil {
		return page, err
	}
	page.HasNext, page.HasPrev = more, l.After != nil
	if back {
		slices.Reverse(page.Records)
		page.HasPrev = more
		// The record that the page ends before, and all behind it, may have gone.
		compare := " >= "
		if l.Descending {
			compare = " <= "
		}
		beyond := "select exists (select" + selected + " and r.id" + compare + "$" + strconv.Itoa(len(selectedArgs)+1) + ")"
		if err := q.QueryRow(ctx, beyond, append(selectedArgs, *l.Before)...).Scan(&page.HasNext); err != nil {
			return page, err
		}
	}
	if l.Count == CountExact {
		var n int64
		if err := q.QueryRow(ctx, "select count(*)"+selected, selectedArgs...).Scan(&n); err != nil {
			return page, err
		}
		page.Count = &n
	}
	return page, nil
}

func parameter(name, code, format string, args ...any) error {
	detail := fmt.Sprintf(format, args...)
	return fault.New(fault.Invalid, "%s", detail).WithCode(code).WithField(fault.Field{Parameter: name, Code: code, Detail: detail})
}

func clipText(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// compile turns a filter into the object that a record's data must contain: data @> '{...}' is what the GIN index
// serves. nil: no filter.
func (p Pipeline) compile(filter string) ([]byte, error) {
	terms, err := ParseFilter(filter)
	if err != nil || len(terms) == 0 {
		return nil, err
	}
	values := map[string]any{}
	for _, t := range terms {
		f, ok := p.field(t.Field)
		if !ok {
			keys := make([]string, len(p.Fields))
			for i, f := range p.Fields {
				keys[i] = f.Key
			}
			return nil, parameter("filter", "unknown_field", "the pipeline %s has no field %q; it has: %s", p.Key, clipText(t.Field), strings.Join(keys, ", "))
		}
		var u unfit
		f.check(&u, &links{}, "", t.Value)
		if len(u.fields) > 0 {
			return nil, parameter("filter", "value", "the value of %s %s", f.Key, u.fields[0].Detail)
		}
		if _, twice := values[t.Field]; twice {
			return nil, parameter("filter", "twice", "the field %s stands twice", t.Field)
		}
		values[t.Field] = t.Value
	}
	return json.Marshal(values)
}

// Term is one comparison of a filter.
type Term struct {
	Field string
	Value any // string, json.Number or bool
}

// ParseFilter reads comparisons for equality, joined by &&: stage = "Won" && amount = 100. Texts stand in double
// quotes with JSON's escapes. The fault is Invalid and says what is allowed.
func ParseFilter(s string) ([]Term, error) {
	bad := func(at int, format string, args ...any) error {
		return parameter("filter", "filter", `%s at character %d; write field = value, joined by &&, for example stage = "Won" && amount = 100`,
			fmt.Sprintf(format, args...), utf8.RuneCountInString(s[:min(at, len(s))])+1)
	}
	if !utf8.ValidString(s) {
		return nil, parameter("filter", "filter", "the filter is no text")
	}
	if utf8.RuneCountInString(s) > MaxFilterChars {
		return nil, parameter("filter", "filter", "a filter has at most %d characters", MaxFilterChars)
	}
	var terms []Term
	i := 0
	space := func() {
		for i < len(s) && strings.IndexByte(" \t\r\n", s[i]) >= 0 {
			i++
		}
	}
	space()
	if i == len(s) {
		return nil, nil
	}
	for {
		start := i
		for i < len(s) && (s[i] >= 'a' && s[i] <= 'z' || s[i] >= '0' && s[i] <= '9' || s[i] == '_') {
			i++
		}
		field := s[start:i]
		if !keyForm.MatchString(field) {
			return nil, bad(start, "a field's key is expected")
		}
		space()
		if i >= len(s) || s[i] != '=' {
			return nil, bad(i, "only the operator = is known")
		}
		i++
		if i < len(s) && (s[i] == '=' || s[i] == '~') {
			return nil, bad(i, "only the operator = is known")
		}
		space()
		d := json.NewDecoder(strings.NewReader(s[i:]))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil {
			return nil, bad(i, "a value is expected: a text in double quotes, a number, true or false")
		}
		switch v.(type) {
		case string, json.Number, bool:
		default:
			return nil, bad(i, "a value is expected: a text in double quotes, a number, true or false")
		}
		raw := s[i : i+int(d.InputOffset())]
		if halfCharacter(raw) {
			return nil, bad(i, `half a character (\u escape) stands in the text`)
		}
		i += len(raw)
		if terms = append(terms, Term{Field: field, Value: v}); len(terms) > maxFilterTerms {
			return nil, bad(i, "a filter has at most %d comparisons", maxFilterTerms)
		}
		space()
		if i == len(s) {
			return terms, nil
		}
		if !strings.HasPrefix(s[i:], "&&") {
			return nil, bad(i, "&& is expected")
		}
		i += 2
		space()
	}
}

// halfCharacter reports whether a JSON value holds half a surrogate pair, for which encoding/json would put a
// replacement character.
func halfCharacter(raw string) bool {
	escape := func(i int) rune {
		if i+6 > len(raw) || raw[i:i+2] != `\u` {
			return 0
		}
		n, _ := strconv.ParseUint(raw[i+2:i+6], 16, 32) // encoding/json has read it
		return rune(n)
	}
	for i := 0; i < len(raw); {
		switch r := escape(i); {
		case utf16.IsSurrogate(r):
			if utf16.DecodeRune(r, escape(i+6)) == utf8.RuneError {
				return true
			}
			i += 12
		case raw[i] == '\\':
			i += 2
		default:
			i++
		}
	}
	return false
}
