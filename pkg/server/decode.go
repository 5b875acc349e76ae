package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// bodyKind says what a route wants to find in a request's body.
type bodyKind int

const (
	// noBody is a route without one; an empty JSON object is taken for none.
	noBody bodyKind = iota
	// jsonBody is application/json.
	jsonBody
	// patchBody is application/merge-patch+json (RFC 7396); application/json is understood as the same.
	patchBody
	// optionalBody is application/json or nothing.
	optionalBody
)

// maxDepth bounds how deeply values may be nested in a body.
const maxDepth = 64

// readBody reads a request's body as its route declares it, checked by checkJSON. It returns nil where there is none.
func readBody(r *http.Request, w http.ResponseWriter, kind bodyKind, limit int64) (json.RawMessage, error) {
	if r.Body == nil || r.Body == http.NoBody || r.ContentLength == 0 {
		if kind == jsonBody || kind == patchBody {
			return nil, fault.New(fault.Invalid, "this request needs a JSON body").WithCode("body_required")
		}
		return nil, nil
	}
	if r.ContentLength > limit {
		w.Header().Set("Connection", "close")
		return nil, tooLarge(limit)
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var over *http.MaxBytesError
	switch {
	case errors.As(err, &over):
		return nil, tooLarge(limit)
	case err != nil:
		return nil, fault.Wrap(err, fault.Invalid, "the body could not be read").WithCode("body_incomplete")
	case len(body) == 0 && (kind == noBody || kind == optionalBody):
		return nil, nil
	}
	if err := checkContentType(r.Header, w, kind); err != nil {
		return nil, err
	}
	if err := checkJSON(body); err != nil {
		return nil, err
	}
	if kind == noBody {
		return nil, decode(body, &struct{}{})
	}
	return body, nil
}

func tooLarge(limit int64) error {
	return fault.New(fault.TooLarge, "a body may have at most %d bytes", limit).WithCode("body_too_large")
}

func checkContentType(h http.Header, w http.ResponseWriter, kind bodyKind) error {
	want := "application/json"
	if kind == patchBody {
		want = "application/merge-patch+json"
		w.Header().Set("Accept-Patch", want)
	}
	given := h.Get("Content-Type")
	media, params, err := mime.ParseMediaType(given)
	charset := strings.ToLower(params["charset"])
	if err != nil || media != want && media != "application/json" || charset != "" && charset != "utf-8" || h.Get("Content-Encoding") != "" {
		return fault.New(fault.Unsupported, "this body's type is not understood here").WithCode("content_type").
			WithHint("send Content-Type: %s, in UTF-8 and not compressed", want)
	}
	return nil
}

// checkJSON refuses what encoding/json lets pass in silence and what PostgreSQL could not hold: a name given twice,
// text behind the value, invalid UTF-8, NUL characters and lone surrogates, values nested beyond maxDepth, and numbers
// that are short to write and enormous to read.
func checkJSON(body []byte) error {
	if !utf8.Valid(body) {
		return malformed("it is not valid UTF-8")
	}
	if at := loneSurrogate(body); at >= 0 {
		return malformed(fmt.Sprintf("it holds half a character (\\u escape) at byte %d", at))
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	c := &jsonCheck{d: d}
	if err := c.value(""); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return malformed("there is text behind the value")
	}
	return nil
}

func malformed(why string) error {
	return fault.New(fault.Invalid, "the body is not the JSON that is expected here: %s", why).WithCode("malformed_json")
}

// jsonCheck walks through one value.
type jsonCheck struct {
	d       *json.Decoder
	depth   int
	numbers crm.Numbers
}

func (c *jsonCheck) next() (json.Token, error) {
	t, err := c.d.Token()
	var syntax *json.SyntaxError
	switch {
	case errors.As(err, &syntax):
		return nil, malformed(fmt.Sprintf("%s at byte %d", strings.TrimPrefix(syntax.Error(), "json: "), syntax.Offset))
	case err != nil:
		return nil, malformed("it ends too early")
	}
	return t, nil
}

func (c *jsonCheck) value(pointer string) error {
	t, err := c.next()
	if err != nil {
		return err
	}
	switch t := t.(type) {
	case string:
		if strings.ContainsRune(t, 0) {
			return badField(pointer, "nul", "text may not hold a NUL character")
		}
	case json.Number:
		if why := c.numbers.Refuse(t); why != "" {
			return badField(pointer, "number", why)
		}
	case json.Delim:
		if c.depth++; c.depth > maxDepth {
			return malformed(fmt.Sprintf("values are nested more than %d deep", maxDepth))
		}
		if t == '{' {
			err = c.object(pointer)
		} else {
			err = c.array(pointer)
		}
		c.depth--
	}
	return err
}

func (c *jsonCheck) object(pointer string) error {
	seen := map[string]bool{}
	for c.d.More() {
		t, err := c.next()
		if err != nil {
			return err
		}
		name, _ := t.(string)
		at := pointer + "/" + escapePointer(name)
		if seen[name] {
			return fault.New(fault.Invalid, "a name stands twice in one object").WithCode("duplicate_name").
				WithField(fault.Field{Pointer: at, Code: "duplicate_name", Detail: "give each name once"})
		}
		if strings.ContainsRune(name, 0) {
			return badField(pointer, "nul", "names may not hold a NUL character")
		}
		seen[name] = true
		if err := c.value(at); err != nil {
			return err
		}
	}
	_, err := c.next()
	return err
}

func (c *jsonCheck) array(pointer string) error {
	for i := 0; c.d.More(); i++ {
		if err := c.value(pointer + "/" + strconv.Itoa(i)); err != nil {
			return err
		}
	}
	_, err := c.next()
	return err
}

// badField is a 422 that points at one member of the body.
func badField(pointer, code, detail string) error {
	return fault.New(fault.Unfit, "a value does not fit: %s", detail).WithCode("value").
		WithField(fault.Field{Pointer: pointer, Code: code, Detail: detail})
}

func escapePointer(name string) string {
	return strings.NewReplacer("~", "~0", "/", "~1").Replace(name)
}

// loneSurrogate finds a \u escape of half a surrogate pair, which no text can hold; -1: there is none.
func loneSurrogate(body []byte) int {
	if !bytes.Contains(body, []byte(`\u`)) {
		return -1
	}
	unit := func(i int) (uint64, bool) { // the code unit of an escape that begins at i
		if i+6 > len(body) || body[i] != '\\' || body[i+1] != 'u' {
			return 0, false
		}
		n, err := strconv.ParseUint(string(body[i+2:i+6]), 16, 16)
		return n, err == nil
	}
	for i := 0; i < len(body); i++ {
		if body[i] != '\\' {
			continue
		}
		n, ok := unit(i)
		switch {
		case !ok || n < 0xD800 || n > 0xDFFF:
			i++ // the escaped character itself
		case n >= 0xDC00:
			return i
		default:
			low, ok := unit(i + 6)
			if !ok || low < 0xDC00 || low > 0xDFFF {
				return i
			}
			i += 11
		}
	}
	return -1
}

// decode reads a body that checkJSON has seen into a struct. A member that the struct does not have is refused (400), a
// value of another type does not fit (422); both point at the place.
func decode(body json.RawMessage, into any) error {
	if err := exactNames(body, reflect.TypeOf(into), ""); err != nil {
		return err
	}
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	err := d.Decode(into)
	var wrongType *json.UnmarshalTypeError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrongType):
		if wrongType.Field == "" {
			return fault.New(fault.Unfit, "the body must be a JSON object").WithCode("value").
				WithField(fault.Field{Code: "type", Detail: "expected " + jsonName(wrongType.Type)})
		}
		pointer := "/" + strings.ReplaceAll(wrongType.Field, ".", "/")
		return badField(pointer, "type", fmt.Sprintf("expected %s, got %s", jsonName(wrongType.Type), wrongType.Value))
	}
	return fault.Wrap(err, fault.Unfit, "a value in the body does not fit").WithCode("value")
}

func unknownMember(pointer string, allowed []member) error {
	detail := "it is not known here"
	if len(allowed) > 0 {
		names := make([]string, len(allowed))
		for i, m := range allowed {
			names[i] = m.name
		}
		detail = "use " + strings.Join(names, ", ")
	}
	return fault.New(fault.Invalid, "the body has a member that is not known here").WithCode("unknown_member").
		WithField(fault.Field{Pointer: pointer, Code: "unknown_member", Detail: detail})
}

// jsonName is what a Go type is called in JSON.
func jsonName(t reflect.Type) string {
	switch t.Kind() {
	case reflect.Bool:
		return "a boolean"
	case reflect.String:
		return "a string"
	case reflect.Slice, reflect.Array:
		return "an array"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64, reflect.Uint32, reflect.Uint64:
		return "a whole number"
	case reflect.Float32, reflect.Float64:
		return "a number"
	default:
		return "an object"
	}
}

// exactNames holds the names in a body to those of the type that it is read into, at every depth: encoding/json takes
// "EMAIL" for "email", so that one member given in two spellings would lose a value in silence.
func exactNames(raw json.RawMessage, t reflect.Type, pointer string) error {
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if reflect.PointerTo(t).Implements(reflect.TypeFor[json.Unmarshaler]()) {
		return nil // it reads itself: free JSON, a time
	}
	switch t.Kind() {
	case reflect.Struct:
		var object map[string]json.RawMessage
		if json.Unmarshal(raw, &object) != nil {
			return nil // of another type, which decoding tells
		}
		allowed := members(t)
		for _, name := range slices.Sorted(maps.Keys(object)) {
			at := pointer + "/" + escapePointer(name)
			i := slices.IndexFunc(allowed, func(m member) bool { return m.name == name })
			if i < 0 {
				return unknownMember(at, allowed)
			}
			if err := exactNames(object[name], allowed[i].typ, at); err != nil {
				return err
			}
		}
	case reflect.Slice, reflect.Array:
		var array []json.RawMessage
		if json.Unmarshal(raw, &array) != nil {
			return nil
		}
		for i, v := range array {
			if err := exactNames(v, t.Elem(), pointer+"/"+strconv.Itoa(i)); err != nil {
				return err
			}
		}
	default:
	}
	return nil
}

// member is one name that a struct takes from JSON.
type member struct {
	name string
	typ  reflect.Type
}

// members lists those of a struct.
func members(t reflect.Type) []member {
	var ms []member
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("json"), ",")
		if name != "" && name != "-" {
			ms = append(ms, member{name, t.Field(i).Type})
		}
	}
	return ms
}
