package crm_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func TestParseFilter(t *testing.T) {
	t.Parallel()
	for text, want := range map[string][]crm.Term{
		"":                          nil,
		" \t\r\n":                   nil,
		`stage = "Won"`:             {{"stage", "Won"}},
		`stage="Won"&&amount=100`:   {{"stage", "Won"}, {"amount", json.Number("100")}},
		"  a=true\n&&\tb=false  ":   {{"a", true}, {"b", false}},
		`a = 12.50 && b = -0.5e3`:   {{"a", json.Number("12.50")}, {"b", json.Number("-0.5e3")}},
		`a = "x && y = 1"`:          {{"a", "x && y = 1"}},
		`a = "say \"hi\"\n\\ é 𝄞"`:  {{"a", "say \"hi\"\n\\ é 𝄞"}},
		`a = "\ud834\udd1e\\ud834"`: {{"a", `𝄞\ud834`}},
		`a = ""`:                    {{"a", ""}},
		`a = 1 && a = 1`:            {{"a", json.Number("1")}, {"a", json.Number("1")}}, // List refuses it
		`a_1 = "` + strings.Repeat("é", 100) + `"`: {{"a_1", strings.Repeat("é", 100)}},
	} {
		got, err := crm.ParseFilter(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
	}
}

func TestParseFilterRefuses(t *testing.T) {
	t.Parallel()
	const operator, value, field = "only the operator =", "a value is expected", "a field's key is expected"
	for text, want := range map[string]string{
		`stage`:                          operator + " is known at character 6",
		`stage != "Won"`:                 operator,
		`stage ~ "Won"`:                  operator,
		`stage == "Won"`:                 operator,
		`stage =~ "Won"`:                 operator,
		`amount > 100`:                   operator,
		`amount >= 100`:                  operator,
		`amount in (1)`:                  operator,
		`stage =`:                        value,
		`stage = Won`:                    value,
		`stage = 'Won'`:                  value,
		`stage = "Won`:                   value,
		`stage = null`:                   value,
		`stage = ["Won"]`:                value,
		`stage = {"a": 1}`:               value,
		`amount = 01`:                    "&& is expected",
		`amount = +1`:                    value,
		`amount = .5`:                    value,
		`amount = NaN`:                   value,
		`amount = -`:                     value,
		`amount = 1 2`:                   "&& is expected",
		`amount = 1 & b = 2`:             "&& is expected",
		`amount = 1 || b = 2`:            "&& is expected",
		`amount = 1, b = 2`:              "&& is expected",
		`amount = 1 &&`:                  field + " at character 14",
		`&& amount = 1`:                  field,
		`= 1`:                            field,
		`(a = 1)`:                        field,
		`!a = 1`:                         field,
		`"a" = 1`:                        field,
		`A = 1`:                          field,
		`1a = 1`:                         field,
		`_a = 1`:                         field,
		`é = 1`:                          field,
		`a.b = 1`:                        operator,
		`a' or 1=1 -- = 1`:               operator,
		`a = "\ud834"`:                   "half a character",
		`a = "\udd1e\ud834"`:             "half a character",
		"a = \"\xff\"":                   "no text",
		"a = \"\n\"":                     value,
		strings.Repeat("a", 49) + " = 1": field,
		`a = "` + strings.Repeat("é", crm.MaxFilterChars-5) + `"`: "at most 3500 characters",
		strings.Repeat("a = 1 && ", 50) + "a = 1":                 "at most 50 comparisons",
		`a = ` + strings.Repeat("[", 3000):                        value,
		`a = 1` + strings.Repeat(" ", crm.MaxFilterChars):         "at most 3500 characters",
	} {
		terms, err := crm.ParseFilter(text)
		require.Error(t, err, "%q was understood as %v", text, terms)
		f := fault.Of(err)
		require.Equal(t, fault.Invalid, f.Kind, text)
		require.Contains(t, f.Message, want, text)
		require.Len(t, f.Fields, 1, text)
		require.Equal(t, "filter", f.Fields[0].Parameter, "%q: the fault does not name the parameter", text)
		require.Less(t, len(f.Message), 400, "%q: a message that repeats what it was given", text)
		require.True(t, utf8.ValidString(f.Message), text)
	}
}

// written is how a filter of these terms is written in its plainest form.
func written(terms []crm.Term) string {
	parts := make([]string, len(terms))
	for i, t := range terms {
		v, err := json.Marshal(t.Value)
		if err != nil {
			panic(err)
		}
		parts[i] = fmt.Sprintf("%s = %s", t.Field, v)
	}
	return strings.Join(parts, " && ")
}

// Whatever is accepted means the same when it is written again, and nothing panics.
func FuzzParseFilter(f *testing.F) {
	for _, s := range []string{
		"", `stage = "Won" && amount = 100`, `a=1&&b=true`, `a = "\ud834\udd1e"`, `a = "\ud834"`, `a = "\\ud834"`, `a = -0.5E+10`, `a ~ 1`,
		`a = "x" &&`, "a = \"\xff\"", `a = "� \ufffd"`, `a = [[[`, `a = null`, "a\x00 = 1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		terms, err := crm.ParseFilter(s)
		if err != nil {
			if !fault.Is(err, fault.Invalid) {
				t.Fatalf("%q: %v is no fault of kind Invalid", s, err)
			}
			return
		}
		w := written(terms)
		if utf8.RuneCountInString(w) > crm.MaxFilterChars {
			return // escapes have made it longer than what is accepted
		}
		again, err := crm.ParseFilter(w)
		if err != nil {
			t.Fatalf("%q was accepted, but not as %q: %v", s, w, err)
		}
		if w2 := written(again); w2 != w {
			t.Fatalf("%q became %q", w, w2)
		}
	})
}
