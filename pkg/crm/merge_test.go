package crm_test

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// The cases of RFC 7396, appendix A, whose target and patch are objects, and numbers that keep their digits.
func TestMergePatch(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ target, patch, want string }{
		{`{"a":"b"}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"b"}`, `{"b":"c"}`, `{"a":"b","b":"c"}`},
		{`{"a":"b"}`, `{"a":null}`, `{}`},
		{`{"a":"b","b":"c"}`, `{"a":null}`, `{"b":"c"}`},
		{`{"a":["b"]}`, `{"a":"c"}`, `{"a":"c"}`},
		{`{"a":"c"}`, `{"a":["b"]}`, `{"a":["b"]}`},
		{`{"a":{"b":"c"}}`, `{"a":{"b":"d","c":null}}`, `{"a":{"b":"d"}}`},
		{`{"a":[{"b":"c"}]}`, `{"a":[1]}`, `{"a":[1]}`},
		{`{"e":null}`, `{"a":1}`, `{"a":1,"e":null}`},
		{`{}`, `{"a":{"bb":{"ccc":null}}}`, `{"a":{"bb":{}}}`},
		{`{"a":1.10,"b":12345678901234567890.5}`, `{"c":1e2}`, `{"a":1.10,"b":12345678901234567890.5,"c":1e2}`},
		{`{"a":"<b> & c"}`, `{}`, `{"a":"<b> & c"}`},
	} {
		got, err := crm.MergePatch(json.RawMessage(c.target), json.RawMessage(c.patch))
		require.NoError(t, err, c)
		require.Equal(t, c.want, string(got), c)
	}
	for _, bad := range []string{``, `null`, `[]`, `"a"`, `1`, `{`, `{} {}`, `{}x`} {
		_, err := crm.MergePatch(json.RawMessage(`{}`), json.RawMessage(bad))
		require.True(t, fault.Is(err, fault.Unfit), "patch %q: %v", bad, err)
		_, err = crm.MergePatch(json.RawMessage(bad), json.RawMessage(`{}`))
		require.True(t, fault.Is(err, fault.Unfit), "target %q: %v", bad, err)
	}
}

func value(depth int) *rapid.Generator[any] {
	leaves := []*rapid.Generator[any]{
		rapid.Just[any](nil), rapid.Just[any](true), rapid.String().AsAny(),
		rapid.Map(rapid.Int64(), func(n int64) any { return float64(n % 1000) }),
	}
	if depth > 0 {
		leaves = append(leaves, rapid.Map(object(depth-1), func(o map[string]any) any { return o }),
			rapid.Map(rapid.SliceOfN(rapid.Just[any](nil), 0, 2), func(l []any) any { return l }))
	}
	return rapid.OneOf(leaves...)
}

func object(depth int) *rapid.Generator[map[string]any] {
	return rapid.MapOfN(rapid.SampledFrom([]string{"a", "b", "c", "d"}), rapid.Deferred(func() *rapid.Generator[any] { return value(depth) }), 0, 4)
}

// holds reports what RFC 7396 asks for: where the patch says null there is nothing, where it says a value there is that
// value, within objects the same again, and what it does not mention is as before.
func holds(target, patch, got map[string]any) bool {
	for k, p := range patch {
		g, there := got[k]
		switch p := p.(type) {
		case nil:
			if there {
				return false
			}
		case map[string]any:
			before, _ := target[k].(map[string]any)
			after, ok := g.(map[string]any)
			if !ok || !holds(before, p, after) {
				return false
			}
		default:
			if !there || !same(p, g) {
				return false
			}
		}
	}
	for k, v := range target {
		if _, said := patch[k]; !said && !same(v, got[k]) {
			return false
		}
	}
	for k := range got {
		_, before := target[k]
		if _, said := patch[k]; !said && !before {
			return false
		}
	}
	return true
}

func same(a, b any) bool {
	x, err1 := json.Marshal(a)
	y, err2 := json.Marshal(b)
	return err1 == nil && err2 == nil && string(x) == string(y)
}

func TestMergePatchDoesWhatTheStandardSays(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		target, patch := object(3).Draw(t, "target"), object(3).Draw(t, "patch")
		merge := func(target, patch any) map[string]any {
			a, err := json.Marshal(target)
			require.NoError(t, err)
			b, err := json.Marshal(patch)
			require.NoError(t, err)
			merged, err := crm.MergePatch(a, b)
			require.NoError(t, err)
			var got map[string]any
			require.NoError(t, json.Unmarshal(merged, &got))
			return got
		}
		got := merge(target, patch)
		if !holds(target, patch, got) {
			t.Fatalf("%v patched with %v is %v", target, patch, got)
		}
		if again := merge(got, patch); !same(got, again) {
			t.Fatalf("patched twice with %v: %v, then %v", patch, got, again)
		}
	})
}
