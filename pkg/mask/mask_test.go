package mask_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/mask"
)

const secret = "a secret of at least thirty-two bytes"

// forms are what the masked values of a kind look like.
var forms = map[mask.Kind]*regexp.Regexp{
	mask.Email:    regexp.MustCompile(`^[a-z2-7]{24}@example\.invalid$`),
	mask.Phone:    regexp.MustCompile(`^([0-9+\-./() ]+|masked [a-z2-7]{24})$`),
	mask.Name:     regexp.MustCompile(`^Person [a-z2-7]{24}$`),
	mask.Address:  regexp.MustCompile(`^1 Street [a-z2-7]{24}$`),
	mask.Text:     regexp.MustCompile(`^masked [a-z2-7]{24}$`),
	mask.Password: regexp.MustCompile(`^!$`),
}

// What a value becomes is written down: another binary must make the same of it.
func TestValues(t *testing.T) {
	t.Parallel()
	m := mask.New(secret)
	for _, c := range []struct {
		kind        mask.Kind
		value, want string
	}{
		{mask.Email, "", ""},
		{mask.Email, "ada@acme.example", "mtlggsq2oyd4xkt4d56hq2tx@example.invalid"},
		{mask.Phone, "", ""},
		{mask.Phone, "+49 30 1234567", "+75 32 4378900"},
		{mask.Phone, "(030) 123-45.67/8", "(208) 667-62.20/0"},
		{mask.Phone, "110", "masked ksze7bho2tsxrjiep6rcu53n"},
		{mask.Phone, "030 1234567 ask for Ada", "masked q2txfiqczefcqtoa4ckwt62x"},
		{mask.Name, "Ada Lovelace", "Person f6aag7zvod4rfrkeun6nryt3"},
		{mask.Address, "12 St James's Square", "1 Street 3r3n3sasjs2vw4bkz3fp4dc5"},
		{mask.Text, "tab\tand\nline", "masked r3iffogannl4dkku3pfupxxg"},
		{mask.Password, "$argon2id$v=19$...", "!"},
		{"iban", "DE89 3704 0044 0532 0130 00", "masked 4kdiy2gv4lxhr4qrmehr4uk6"},
	} {
		require.Equal(t, c.want, m.Value(c.kind, c.value), "%s %q", c.kind, c.value)
	}
}

// Of very many values: the same becomes the same under the same secret and something else under another one, different
// ones become different, each has its kind's form, and nothing of the value stands in it.
func TestMaskProperties(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	m, again, other := mask.New(secret), mask.New(secret), mask.New(secret+"!")
	words := func(alphabet string, n int) string {
		r := []rune(alphabet)
		var b strings.Builder
		for range n {
			b.WriteRune(r[rng.IntN(len(r))])
		}
		return b.String()
	}
	for _, k := range mask.Kinds {
		seen := map[string]string{}
		for i := range 5000 {
			var v string
			switch {
			case k == mask.Phone && i%2 == 0:
				v = "+49 (" + words("0123456789", 3) + ") " + words("0123456789", 3+rng.IntN(8))
			case k == mask.Email:
				v = words("abcxyz.", 1+rng.IntN(10)) + "@" + words("abc", 4) + ".example"
			default:
				v = words("aB1 éß\t\n\\中😀", 12+rng.IntN(20))
			}
			got := m.Value(k, v)
			require.Equal(t, got, again.Value(k, v))
			require.Regexp(t, forms[k], got, "%q", v)
			if n := mask.Longest(k); n > 0 {
				require.LessOrEqual(t, len(got), n)
			}
			if k == mask.Password {
				continue
			}
			require.NotEqual(t, v, got)
			require.NotEqual(t, got, other.Value(k, v))
			require.NotContains(t, got, v)
			if was, there := seen[got]; there {
				require.Equal(t, was, v, "two values became %q", got)
			}
			seen[got] = v
		}
	}
	// Many numbers of six digits, where a hash would soon have made two of them the same: none comes twice.
	seen := make([]bool, 1_000_000)
	for i := range 100_000 {
		got := m.Value(mask.Phone, fmt.Sprintf("%03d-%03d", i/1000, i%1000))
		var a, b int
		_, err := fmt.Sscanf(got, "%03d-%03d", &a, &b)
		require.NoError(t, err)
		require.False(t, seen[a*1000+b], got)
		seen[a*1000+b] = true
	}
}

// Rows keep every value that is not masked, however they are cut, and their nulls.
func TestRows(t *testing.T) {
	t.Parallel()
	const in = "1\tAda\\tL\\\\N\\n\t\\N\tx\n2\t\\N\t\\\\N\ty\\\\\n3\t\t\\b\\f\\v\\r\tz\n"
	const want = "1\t<Ada\tL\\N\n>\t\\N\tx\n2\t\\N\t<\\N>\ty\\\\\n3\t<>\t<\b\f\v\r>\tz\n"
	for size := 1; size <= len(in); size++ {
		var b bytes.Buffer
		w := mask.Rows(&b, func(r *mask.Row) error {
			require.Equal(t, 4, r.Len())
			for i := 1; i <= 2; i++ {
				if v, ok := r.Get(i); ok {
					r.Set(i, "<"+v+">")
				}
			}
			return nil
		})
		for rest := in; rest != ""; rest = rest[min(size, len(rest)):] {
			n, err := io.WriteString(w, rest[:min(size, len(rest))])
			require.NoError(t, err)
			require.Equal(t, min(size, len(rest)), n)
		}
		require.NoError(t, w.Close())
		escaped := strings.NewReplacer("<Ada\tL\\N\n>", `<Ada\tL\\N\n>`, "<\\N>", `<\\N>`, "<\b\f\v\r>", `<\b\f\v\r>`).Replace(want)
		require.Equal(t, escaped, b.String())
	}
	w := mask.Rows(io.Discard, func(*mask.Row) error { return nil })
	_, err := io.WriteString(w, "1\tcut o")
	require.NoError(t, err)
	require.Error(t, w.Close())
	broken := fmt.Errorf("broken")
	_, err = io.WriteString(mask.Rows(io.Discard, func(*mask.Row) error { return broken }), "1\n")
	require.ErrorIs(t, err, broken)
	var none bytes.Buffer
	_, err = io.WriteString(mask.Rows(&none, func(*mask.Row) error { return nil }), "\n\n")
	require.NoError(t, err)
	require.Equal(t, "\n\n", none.String(), "rows without columns")
}

// Of a document the members that have a kind are masked, whatever they hold, and all others stay as they are written.
func TestDocument(t *testing.T) {
	t.Parallel()
	m := mask.New(secret)
	got, err := m.Document(map[string]mask.Kind{"mail": mask.Email, "tel": mask.Phone, "none": mask.Name},
		`{"mail": "ada@acme.example", "tel": [301234567, {"x": "0301234567"}, null, true], "n": 12345678901234567890.10, "note": "<b>&"}`)
	require.NoError(t, err)
	require.JSONEq(t, `{"mail": "`+m.Value(mask.Email, "ada@acme.example")+`", "tel": ["`+m.Value(mask.Phone, "301234567")+`", {"x": "`+
		m.Value(mask.Phone, "0301234567")+`"}, null, true], "n": 12345678901234567890.10, "note": "<b>&"}`, got)
	require.Contains(t, got, "12345678901234567890.10")
	require.Contains(t, got, "<b>&")
	for _, same := range []string{`{"a": 1.10}`, `[1, 2]`, `null`, `"text"`, `{}`} {
		got, err := m.Document(map[string]mask.Kind{"mail": mask.Email}, same)
		require.NoError(t, err)
		require.Equal(t, same, got)
	}
}
