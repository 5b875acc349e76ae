package tenant_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

var (
	slugRule   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$`)
	schemaRule = regexp.MustCompile(`^[a-z0-9_]{1,48}$`)
	hostRule   = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*$`)
)

func TestParseSlugAccepts(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"a", "acme", "acme-berlin", "123", "select", "x1-2-3", strings.Repeat("a", 48), "template-x", "oneox", "pgx"} {
		slug, err := tenant.ParseSlug(s)
		require.NoErrorf(t, err, "slug %q should be accepted", s)
		require.Equal(t, s, slug.String(), "a slug is kept exactly as written")
		require.False(t, slug.IsZero())
		require.Equal(t, strings.ReplaceAll(s, "-", "_"), slug.Schema().String())
		_, err = tenant.ParseSchema(slug.Schema().String())
		require.NoErrorf(t, err, "the schema of slug %q must be a valid schema", s)
	}
}

// F05 and behaviours A 6-11: what is no name never reaches SQL.
func TestParseSlugRefuses(t *testing.T) {
	t.Parallel()
	for _, s := range []string{
		"", " ", "\t", "\x00", "a\x00b", "a b", " acme", "acme ", "acme\n", "Acme", "ACME", "a_b", "a.b", "a:b", "a/b", `a\b`, "../a",
		`x"; drop schema public; --`, "x';--", "a`b", "a@b", "a%b", "a*b", "a?b", "a{b}", "ácme", "аcme" /* Cyrillic */, "acme\u200b", "\xff",
		"-a", "a-", "-", "--", "xn--bcher-kva", "ab--c", strings.Repeat("a", 49), strings.Repeat("ü", 25), strings.Repeat("a", 64), strings.Repeat("a", 10_000),
		"public", "ext", "information-schema", "admin", "api", "www", "localhost", "postgres", "pg-x", "pg-catalog", "pg-temp", "oneo", "oneo-x", "template0",
		"oneo-dropped-7", "river",
	} {
		slug, err := tenant.ParseSlug(s)
		require.Truef(t, fault.Is(err, fault.Invalid), "slug %q must be refused as Invalid, got %v", s, err)
		require.Truef(t, slug.IsZero(), "slug %q was refused and yet returned", s)
		require.NotEmptyf(t, fault.Of(err).Hint, "slug %q: a refusal says what is allowed", s)
		require.Lessf(t, len(fault.Of(err).Message), 500, "slug of %d bytes: hostile input must not fill a terminal", len(s))
	}
}

// A spare's name is oneo's own: no tenant has it.
func TestSpareSchema(t *testing.T) {
	s := tenant.SpareSchema(2147483647)
	require.Equal(t, "oneo_spare_2147483647", s.String())
	_, err := tenant.ParseSchema(s.String())
	require.Truef(t, fault.Is(err, fault.Invalid), "a tenant must not be given the name %s: %v", s, err)
}

func TestParseSchema(t *testing.T) {
	t.Parallel()
	for _, s := range []string{"acme", "acme_berlin", "1", "select", "_x", strings.Repeat("a", 48)} {
		got, err := tenant.ParseSchema(s)
		require.NoErrorf(t, err, "schema %q", s)
		require.Equal(t, s, got.String())
	}
	for _, s := range []string{
		"", "Acme", "a-b", "a.b", `a"b`, "a b", "a\x00", "ä", strings.Repeat("a", 49), strings.Repeat("a", 64),
		"public", "ext", "information_schema", "pg_x", "pg_toast", "pg_catalog", "pg_temp", "oneo", "oneo_dropped_1", "oneo_x", "template",
	} {
		got, err := tenant.ParseSchema(s)
		require.Truef(t, fault.Is(err, fault.Invalid), "schema %q must be refused, got %v", s, err)
		require.True(t, got.IsZero())
	}
}

// F06: two long names that are equal in their first 63 bytes are both refused, never cut to one.
func TestLongNamesAreNeverCut(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 63)
	for _, s := range []string{long + "b", long + "c", long} {
		_, err := tenant.ParseSlug(s)
		require.Error(t, err)
		_, err = tenant.ParseSchema(s)
		require.Error(t, err)
	}
}

func TestParseHost(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"acme.localhost": "acme.localhost", "ACME.LocalHost": "acme.localhost", "acme.localhost:8000": "acme.localhost",
		"acme.localhost.": "acme.localhost", "acme.localhost.:80": "acme.localhost", "localhost": "localhost",
		"bücher.example": "xn--bcher-kva.example", "BÜCHER.example": "xn--bcher-kva.example", "xn--bcher-kva.example": "xn--bcher-kva.example",
		"a.co.uk": "a.co.uk", "1a.example": "1a.example", "123.example": "123.example", "straße.de": "xn--strae-oqa.de",
	} {
		h, err := tenant.ParseHost(in)
		require.NoErrorf(t, err, "host %q", in)
		require.Equalf(t, want, h.String(), "host %q", in)
	}
	// F42.
	for _, in := range []string{
		"", " ", ".", "..", ":", ":80", "a..b", ".a", "a..", "127.0.0.1", "127.0.0.1:80", "[::1]", "[::1]:80", "::1", "fe80::1%eth0", "[fe80::1%25eth0]:80",
		"127.1", "0x7f.1", "0x7f000001", "2130706433", "a.1", "1.2.3.4.", "a b", "a/b", "a@b", "user@acme.localhost", "%2e", "a%2eb", "a\x00b", "a\nb", "a_b.example",
		"-a.example", "a-.example", "a:b", "a:80:80", "a:", "a:999999", "a:-1", "a:8x", "http://acme.localhost", "acme.localhost/x", "a?b", "a#b", `a\b`, "*.example", "a*",
		strings.Repeat("a", 64) + ".example", strings.Repeat("a.", 130) + "example", strings.Repeat("a", 301), "\xff.example", "xn--\u200d.example", "xn--zz--.example",
	} {
		h, err := tenant.ParseHost(in)
		require.Truef(t, fault.Is(err, fault.Invalid), "host %q must be refused, got %q and %v", in, h, err)
		require.True(t, h.IsZero())
	}
}

func TestUnder(t *testing.T) {
	t.Parallel()
	base, err := tenant.ParseHost("localhost")
	require.NoError(t, err)
	slug, err := tenant.ParseSlug("acme-berlin")
	require.NoError(t, err)
	require.Equal(t, "acme-berlin.localhost", slug.Under(base).String())
	again, err := tenant.ParseHost(slug.Under(base).String())
	require.NoError(t, err)
	require.Equal(t, slug.Under(base), again, "a default host must be what a request's Host header is parsed to")
}

func TestStates(t *testing.T) {
	t.Parallel()
	slug, err := tenant.ParseSlug("acme")
	require.NoError(t, err)
	want := map[tenant.State]fault.Kind{
		tenant.Creating: fault.Suspended, tenant.Active: "", tenant.Suspended: fault.Suspended, tenant.Dropped: fault.Gone, tenant.Purged: fault.Gone,
	}
	require.Len(t, tenant.States, len(want))
	for _, s := range tenant.States {
		got, err := tenant.ParseState(string(s))
		require.NoError(t, err)
		require.Equal(t, s, got)
		err = tenant.Tenant{Number: 1, Slug: slug, Schema: slug.Schema(), State: s}.Serving()
		if want[s] == "" {
			require.NoErrorf(t, err, "a tenant in state %s is served", s)
			continue
		}
		require.Truef(t, fault.Is(err, want[s]), "state %s: want %s, got %v", s, want[s], err)
		require.Equal(t, "acme", fault.Of(err).Tenant)
	}
	for _, s := range []string{"", "Active", "deleted", "active "} {
		_, err := tenant.ParseState(s)
		require.Truef(t, fault.Is(err, fault.Invalid), "state %q", s)
	}
	require.Error(t, tenant.Tenant{Number: 1, State: ""}.Serving(), "an unknown state is not served")
}

func TestTenantIsZero(t *testing.T) {
	t.Parallel()
	slug, err := tenant.ParseSlug("acme")
	require.NoError(t, err)
	require.True(t, tenant.Tenant{}.IsZero())
	require.True(t, tenant.Tenant{Number: 1}.IsZero(), "a tenant without a schema binds to nothing")
	require.True(t, tenant.Tenant{Schema: slug.Schema()}.IsZero(), "a tenant without a number has no gate")
	require.False(t, tenant.Tenant{Number: 1, Schema: slug.Schema()}.IsZero())
}

func FuzzParseSlug(f *testing.F) {
	for _, s := range []string{"acme", "a-b", "", "pg_x", "xn--a", `x"; drop schema public; --`, strings.Repeat("a", 49), "a\x00", "ü"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		slug, err := tenant.ParseSlug(s)
		if err != nil {
			if !slug.IsZero() || !fault.Is(err, fault.Invalid) {
				t.Fatalf("%q refused with %v and slug %q", s, err, slug)
			}
			return
		}
		if slug.String() != s || !slugRule.MatchString(s) || len(s) > tenant.MaxSlugBytes {
			t.Fatalf("%q accepted as %q", s, slug)
		}
		if _, err := tenant.ParseSchema(slug.Schema().String()); err != nil {
			t.Fatalf("slug %q gives the schema %q, which is refused: %v", s, slug.Schema(), err)
		}
		base, err := tenant.ParseHost("localhost")
		if err != nil {
			t.Fatal(err)
		}
		if h, err := tenant.ParseHost(slug.Under(base).String()); err != nil || h != slug.Under(base) {
			t.Fatalf("the default host of %q does not parse to itself: %q %v", s, h, err)
		}
	})
}

func FuzzParseSchema(f *testing.F) {
	for _, s := range []string{"acme", "a_b", "", "pg_x", `x"`, strings.Repeat("a", 49), "a\x00", "ü", "public"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := tenant.ParseSchema(s)
		if err != nil {
			return
		}
		if got.String() != s || !schemaRule.MatchString(s) || strings.HasPrefix(s, "pg_") || s == "public" || s == "ext" {
			t.Fatalf("%q accepted as %q", s, got)
		}
	})
}

func FuzzParseHost(f *testing.F) {
	for _, s := range []string{"acme.localhost", "ACME.localhost.:80", "bücher.example", "127.0.0.1", "[::1]:80", "a..b", "xn--bcher-kva.de", "a。b", "％２ｅ", "ⅷ.example", "ℷA"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		h, err := tenant.ParseHost(s)
		if err != nil {
			if !h.IsZero() || !fault.Is(err, fault.Invalid) {
				t.Fatalf("%q refused with %v and host %q", s, err, h)
			}
			return
		}
		if !hostRule.MatchString(h.String()) || len(h.String()) > 253 {
			t.Fatalf("%q accepted as %q", s, h)
		}
		again, err := tenant.ParseHost(h.String())
		if err != nil || again != h {
			t.Fatalf("%q becomes %q, which becomes %q, %v", s, h, again, err)
		}
		if up, err := tenant.ParseHost(strings.ToUpper(h.String()) + ".:443"); err != nil || up != h {
			t.Fatalf("%q in capitals with dot and port becomes %q, %v", h, up, err)
		}
	})
}

func ExampleSlug_Schema() {
	slug, _ := tenant.ParseSlug("acme-berlin")
	fmt.Println(slug.Schema())
	// Output: acme_berlin
}
