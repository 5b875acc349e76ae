package auth_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func TestParseToken(t *testing.T) {
	t.Parallel()
	body := strings.Repeat("A", 43)
	for _, tc := range []struct{ name, token, tenant, administrator string }{
		{"tenant's session", "ons_" + body, auth.KindSession, ""},
		{"tenant's key", "onk_" + body, auth.KindKey, ""},
		{"administrator's session", "oas_" + body, "", auth.KindSession},
		{"administrator's key", "oak_" + body, "", auth.KindKey},
		{"empty", "", "", ""},
		{"prefix only", "ons_", "", ""},
		{"no prefix", body, "", ""},
		{"unknown prefix", "onx_" + body, "", ""},
		{"capital prefix", "ONS_" + body, "", ""},
		{"two prefixes", "ons_onk_" + body[4:], auth.KindSession, ""}, // 43 characters of the alphabet: unknown, not malformed
		{"short", "ons_" + body[1:], "", ""},
		{"long", "ons_" + body + "A", "", ""},
		{"padding", "ons_" + body[1:] + "=", "", ""},
		{"standard alphabet", "ons_" + body[1:] + "+", "", ""},
		{"line break inside", "ons_" + body[:20] + "\n" + body[21:], "", ""},
		{"line break behind", "ons_" + body + "\n", "", ""},
		{"space before", " ons_" + body, "", ""},
		{"loose bits: another text for the same 32 bytes", "ons_" + body[1:] + "B", "", ""},
		{"NUL", "ons_" + body[1:] + "\x00", "", ""},
		{"SQL", "ons_' or 1=1 --", "", ""},
		{"a megabyte", "ons_" + strings.Repeat("A", 1<<20), "", ""},
	} {
		for realm, want := range map[*auth.Realm]string{auth.Tenants(): tc.tenant, auth.Administrators(): tc.administrator} {
			kind, ok := realm.ParseToken(tc.token)
			require.Equalf(t, want, kind, "%s in realm %s", tc.name, realm.Name())
			require.Equalf(t, want != "", ok, "%s in realm %s", tc.name, realm.Name())
		}
	}
}

func FuzzToken(f *testing.F) {
	for _, s := range []string{"", "ons_", "ons_" + strings.Repeat("A", 43), "oak_" + strings.Repeat("_", 42) + "8", "onk_" + strings.Repeat("A", 42) + "\n"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		kind, ok := auth.Tenants().ParseToken(s)
		other, also := auth.Administrators().ParseToken(s)
		if ok && also {
			t.Fatalf("%q is a token of both realms", s)
		}
		if ok != (kind != "") || also != (other != "") {
			t.Fatalf("%q: kind %q %v, %q %v", s, kind, ok, other, also)
		}
		if !ok && !also {
			return
		}
		if len(s) != 47 || strings.Trim(s[4:], "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			t.Fatalf("%q has not the form of a token", s)
		}
	})
}

func TestHashToken(t *testing.T) {
	t.Parallel()
	a, b := auth.HashToken("ons_a"), auth.HashToken("onk_a")
	require.Len(t, a, 32)
	require.NotEqual(t, a, b, "the prefix is part of what is hashed")
}

var addresses = []struct{ in, want string }{
	{"ada@example.com", "ada@example.com"},
	{"Ada.Lovelace+crm@Example.COM", "ada.lovelace+crm@example.com"},
	{"root@localhost", "root@localhost"},
	{"o'hara@example.com", "o'hara@example.com"},
	{"ada@münchen.example", "ada@xn--mnchen-3ya.example"},
	{"ada@XN--MNCHEN-3YA.example", "ada@xn--mnchen-3ya.example"},
	{strings.Repeat("a", 64) + "@example.com", strings.Repeat("a", 64) + "@example.com"},
	{strings.Repeat("a", 65) + "@example.com", ""},
	{"a@" + strings.Repeat("b.", 126) + "cc", ""},
	{"", ""}, {"ada", ""}, {"@", ""}, {"@example.com", ""}, {"ada@", ""}, {"ada@@example.com", ""}, {"ada@b@example.com", ""},
	{"ada@example.com.", ""}, {"ada@.example.com", ""}, {"ada.@example.com", ""}, {".ada@example.com", ""}, {"a..b@example.com", ""},
	{"ada@example..com", ""}, {"ada@-example.com", ""}, {"ada@exa_mple.com", ""}, {"ada@example.com:25", ""},
	{"ada@127.0.0.1", ""}, {"ada@[127.0.0.1]", ""}, {"ada@[IPv6:::1]", ""},
	{"Ada <ada@example.com>", ""}, {"<ada@example.com>", ""}, {`"ada"@example.com`, ""}, {`"a b"@example.com`, ""}, {"ada@example.com (Ada)", ""},
	{"ada@example.com,bob@example.com", ""}, {" ada@example.com", ""}, {"ada@example.com\n", ""}, {"ada\r\nbcc: x@example.com", ""}, {"ada\x00@example.com", ""},
	{"adİ@example.com", ""},      // would fold to adi@example.com
	{"\u212aay@example.com", ""}, // the Kelvin sign folds to k
	{"ädä@example.com", ""},
	{"ada\xff@example.com", ""},
	{strings.Repeat("a", 1<<20) + "@example.com", ""},
}

func TestParseEmail(t *testing.T) {
	t.Parallel()
	for _, tc := range addresses {
		got, err := auth.ParseEmail(tc.in)
		require.Equalf(t, tc.want, got, "%.80q", tc.in)
		if tc.want != "" {
			require.NoErrorf(t, err, "%.80q", tc.in)
			continue
		}
		requireFault(t, err, fault.Invalid, "invalid_email")
		require.Less(t, len(err.Error()), 500, "the message holds no more than a piece of what was sent")
	}
}

func FuzzEmail(f *testing.F) {
	for _, tc := range addresses {
		if len(tc.in) < 1000 {
			f.Add(tc.in)
		}
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := auth.ParseEmail(s)
		if err != nil {
			if got != "" {
				t.Fatalf("%q: an address and an error", s)
			}
			return
		}
		if again, err := auth.ParseEmail(got); err != nil || again != got {
			t.Fatalf("%q is %q, which is %q (%v)", s, got, again, err)
		}
		if got != strings.ToLower(got) || len(got) > 254 || strings.ContainsFunc(got, func(r rune) bool { return r <= ' ' || r > '~' }) {
			t.Fatalf("%q is stored as %q", s, got)
		}
	})
}

var actions = []auth.Action{
	auth.ReadRecords, auth.WriteRecords, auth.ManagePipelines, auth.ManageUsers, auth.ManageSettings, auth.ManageKeys, auth.Administer,
}

func TestMay(t *testing.T) {
	t.Parallel()
	everything := "read records, write records, manage pipelines, manage users, manage settings, manage API keys"
	for _, tc := range []struct {
		realm, role, kind string
		scopes            []string
		want              string
	}{
		{"tenant", auth.RoleAdmin, auth.KindSession, nil, everything},
		{"tenant", auth.RoleMember, auth.KindSession, nil, "read records, write records"},
		{"tenant", auth.RoleViewer, auth.KindSession, nil, "read records"},
		{"administrator", auth.RoleAdmin, auth.KindSession, nil, "manage API keys, administer the installation"},

		{"tenant", auth.RoleAdmin, auth.KindKey, []string{auth.ScopeAdmin}, everything},
		{"tenant", auth.RoleAdmin, auth.KindKey, []string{auth.ScopeWrite}, "read records, write records"},
		{"tenant", auth.RoleAdmin, auth.KindKey, []string{auth.ScopeRead}, "read records"},
		{"tenant", auth.RoleAdmin, auth.KindKey, nil, ""},
		{"tenant", auth.RoleAdmin, auth.KindKey, []string{"everything", ""}, ""},
		// A key that outlived its user's promotion.
		{"tenant", auth.RoleMember, auth.KindKey, []string{auth.ScopeAdmin}, "read records, write records"},
		{"tenant", auth.RoleViewer, auth.KindKey, []string{auth.ScopeAdmin, auth.ScopeWrite}, "read records"},
		{"administrator", auth.RoleAdmin, auth.KindKey, []string{auth.ScopeAdmin}, "manage API keys, administer the installation"},
		{"administrator", auth.RoleAdmin, auth.KindKey, []string{auth.ScopeRead, auth.ScopeWrite}, ""},

		// What no statement returns and a cache might.
		{"", auth.RoleAdmin, auth.KindSession, nil, ""},
		{"public", auth.RoleAdmin, auth.KindSession, nil, ""},
		{"tenant", "", auth.KindSession, nil, ""},
		{"tenant", "root", auth.KindSession, nil, ""},
		{"administrator", auth.RoleMember, auth.KindSession, nil, ""},
		{"tenant", auth.RoleAdmin, "", []string{auth.ScopeAdmin}, ""},
	} {
		i := auth.Identity{Realm: tc.realm, UserID: uuid.New(), Role: tc.role, Kind: tc.kind, Scopes: tc.scopes}
		var may []string
		for _, a := range append(actions, "", "fly") {
			if err := i.May(a); err != nil {
				requireFault(t, err, fault.Forbidden, "forbidden")
				continue
			}
			may = append(may, string(a))
		}
		require.Equalf(t, tc.want, strings.Join(may, ", "), "%+v", tc)
	}
	for _, a := range actions {
		requireFault(t, auth.Identity{Realm: "tenant", Role: auth.RoleAdmin, Kind: auth.KindSession}.May(a), fault.Unauthenticated, "unauthenticated")
	}
}

func TestRealmsAreFixed(t *testing.T) {
	t.Parallel()
	require.Equal(t, []string{auth.RoleAdmin}, auth.Administrators().Roles())
	roles := auth.Tenants().Roles()
	roles[0] = "root"
	require.Equal(t, []string{auth.RoleAdmin, auth.RoleMember, auth.RoleViewer}, auth.Tenants().Roles(), "what is handed out is a copy")
}

func TestIdentityInCaches(t *testing.T) {
	t.Parallel()
	token := "onk_" + strings.Repeat("A", 43)
	at := time.Date(2026, 11, 23, 20, 0, 0, 0, time.UTC)
	i := auth.Identity{
		Realm: "tenant", UserID: uuid.New(), Email: "ada@example.com", Name: "Ada", Role: auth.RoleMember, Kind: auth.KindKey,
		TokenHash: auth.HashToken(token), Scopes: []string{auth.ScopeRead}, ExpiresAt: &at, LastSeen: &at,
	}
	raw, err := json.Marshal(i)
	require.NoError(t, err)
	require.NotContains(t, string(raw), token[4:])
	var again auth.Identity
	require.NoError(t, json.Unmarshal(raw, &again))
	require.Equal(t, i, again, "what comes back from a cache is who went in")
	require.False(t, again.IsZero())
	require.True(t, auth.Identity{}.IsZero())
}
