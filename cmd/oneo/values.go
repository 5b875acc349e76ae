package main

import (
	"encoding/json"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5/pgtype"
)

// valueOf makes a cell of a value in PostgreSQL's text form. Numbers keep their digits, json and jsonb stay what they
// are, arrays become lists, and what JSON has no form for is a string: NaN, intervals, ranges, bytea in hexadecimal.
func valueOf(types *pgtype.Map, oid uint32, raw []byte) cell {
	if raw == nil {
		return cell{}
	}
	s := string(raw)
	switch oid {
	case pgtype.BoolOID:
		s = map[string]string{"t": "true", "f": "false"}[s]
		return cell{json: json.RawMessage(s), text: s}
	case pgtype.Int2OID, pgtype.Int4OID, pgtype.Int8OID, pgtype.OIDOID, pgtype.Float4OID, pgtype.Float8OID, pgtype.NumericOID:
		if json.Valid(raw) { // not NaN and the infinities
			return cell{json: json.RawMessage(s), text: s}
		}
	case pgtype.JSONOID, pgtype.JSONBOID:
		if json.Valid(raw) {
			return cell{json: json.RawMessage(oneLine(raw)), text: s}
		}
	case pgtype.TimestamptzOID:
		if utcTime.MatchString(s) {
			return stringCell(strings.Replace(strings.TrimSuffix(s, "+00"), " ", "T", 1) + "Z")
		}
	case pgtype.TimestampOID:
		if localTime.MatchString(s) {
			return stringCell(strings.Replace(s, " ", "T", 1))
		}
	}
	if t, ok := types.TypeForOID(oid); ok {
		if array, ok := t.Codec.(*pgtype.ArrayCodec); ok {
			var a pgtype.Array[*string]
			if types.Scan(oid, pgtype.TextFormatCode, raw, &a) == nil && a.Valid {
				return cell{json: list(types, array.ElementType.OID, a.Elements, a.Dims), text: s}
			}
		}
	}
	return stringCell(s)
}

var (
	localTime = regexp.MustCompile(`^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?$`)
	utcTime   = regexp.MustCompile(`^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d+)?\+00$`)
)

// oneLine takes the line breaks out of JSON that was stored with them: a row is a line.
func oneLine(raw []byte) []byte {
	return []byte(strings.NewReplacer("\n", " ", "\r", " ").Replace(string(raw)))
}

// list is an array, one list in another for each of its dimensions.
func list(types *pgtype.Map, oid uint32, elements []*string, dims []pgtype.ArrayDimension) json.RawMessage {
	b := []byte{'['}
	add := func(item json.RawMessage) {
		if len(b) > 1 {
			b = append(b, ',')
		}
		b = append(b, item...)
	}
	if len(dims) > 1 {
		each := len(elements) / int(max(1, dims[0].Length))
		for i := range int(dims[0].Length) {
			add(list(types, oid, elements[i*each:(i+1)*each], dims[1:]))
		}
		return append(b, ']')
	}
	for _, e := range elements {
		item := json.RawMessage("null")
		if e != nil {
			item = valueOf(types, oid, []byte(*e)).json
		}
		add(item)
	}
	return append(b, ']')
}
