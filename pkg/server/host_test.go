package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// raw sends bytes as they are and reads one answer.
func raw(t *testing.T, addr, request string) (*http.Response, string) {
	t.Helper()
	c, err := net.DialTimeout("tcp", addr, pgtest.Patience)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(pgtest.Patience)))
	_, err = io.WriteString(c, request)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	require.NoError(t, err, "no answer to %q", request)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp, string(body)
}

// addDomain gives a tenant another host.
func (st *stage) addDomain(t *testing.T, tn tenant.Tenant, name string) {
	t.Helper()
	host, err := tenant.ParseHost(name)
	require.NoError(t, err)
	require.NoError(t, st.env.DB.InShared(t.Context(), postgres.Write, func(tx *postgres.Tx) error {
		return registry.AddDomain(t.Context(), tx, tn, host, false)
	}))
}

func TestRawHosts(t *testing.T) {
	st := open(t)
	st.addDomain(t, st.acme, "bücher.example")
	label := strings.Repeat("a", 60)
	const acme, globex, public = `"slug":"acme"`, `"slug":"globex"`, "admin/tenants"
	for _, tc := range []struct {
		name, request string
		status        int
		has           string
	}{
		{"plain", "GET / HTTP/1.1\r\nHost: acme.localhost\r\n\r\n", 200, acme},
		{"any port", "GET / HTTP/1.1\r\nHost: acme.localhost:1\r\n\r\n", 200, acme},
		{"trailing dot", "GET / HTTP/1.1\r\nHost: acme.localhost.\r\n\r\n", 200, acme},
		{"trailing dot and port", "GET / HTTP/1.1\r\nHost: acme.localhost.:8000\r\n\r\n", 200, acme},
		{"upper case", "GET / HTTP/1.1\r\nHost: ACME.LocalHost\r\n\r\n", 200, acme},
		{"the other tenant", "GET / HTTP/1.1\r\nHost: globex.localhost\r\n\r\n", 200, globex},
		{"public", "GET / HTTP/1.1\r\nHost: localhost:8000\r\n\r\n", 200, public},
		{"punycode", "GET / HTTP/1.1\r\nHost: xn--bcher-kva.example\r\n\r\n", 200, acme},
		{"punycode upper case", "GET / HTTP/1.1\r\nHost: XN--BCHER-KVA.example\r\n\r\n", 200, acme},
		{"bad punycode", "GET / HTTP/1.1\r\nHost: xn--a.example\r\n\r\n", 400, ""},
		{"raw UTF-8", "GET / HTTP/1.1\r\nHost: b\xc3\xbccher.example\r\n\r\n", 400, ""},
		{"empty", "GET / HTTP/1.1\r\nHost: \r\n\r\n", 400, ""},
		{"none", "GET / HTTP/1.1\r\n\r\n", 400, ""},
		{"none in 1.0", "GET / HTTP/1.0\r\n\r\n", 400, ""},
		{"IPv4", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 400, "invalid_host"},
		{"IPv4 and port", "GET / HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n", 400, "invalid_host"},
		{"IPv4 in hex", "GET / HTTP/1.1\r\nHost: 0x7f.1\r\n\r\n", 400, "invalid_host"},
		{"IPv6", "GET / HTTP/1.1\r\nHost: [::1]\r\n\r\n", 400, "invalid_host"},
		{"IPv6 zone", "GET / HTTP/1.1\r\nHost: [fe80::1%25lo]:80\r\n\r\n", 400, ""},
		{"two dots", "GET / HTTP/1.1\r\nHost: acme..localhost\r\n\r\n", 400, "invalid_host"},
		{"two trailing dots", "GET / HTTP/1.1\r\nHost: acme.localhost..\r\n\r\n", 400, "invalid_host"},
		{"leading dot", "GET / HTTP/1.1\r\nHost: .acme.localhost\r\n\r\n", 400, "invalid_host"},
		{"300 bytes", "GET / HTTP/1.1\r\nHost: " + strings.Repeat(label+".", 5) + "localhost\r\n\r\n", 400, ""},
		{"percent", "GET / HTTP/1.1\r\nHost: acme%2elocalhost\r\n\r\n", 400, ""},
		{"at", "GET / HTTP/1.1\r\nHost: globex.localhost@acme.localhost\r\n\r\n", 400, ""},
		{"slash", "GET / HTTP/1.1\r\nHost: acme.localhost/x\r\n\r\n", 400, ""},
		{"NUL", "GET / HTTP/1.1\r\nHost: acme\x00.localhost\r\n\r\n", 400, ""},
		{"space", "GET / HTTP/1.1\r\nHost: acme .localhost\r\n\r\n", 400, ""},
		{"two hosts in one", "GET / HTTP/1.1\r\nHost: acme.localhost, globex.localhost\r\n\r\n", 400, ""},
		{"two Host headers", "GET / HTTP/1.1\r\nHost: acme.localhost\r\nHost: globex.localhost\r\n\r\n", 400, ""},
		{"two equal Host headers", "GET / HTTP/1.1\r\nHost: acme.localhost\r\nHost: acme.localhost\r\n\r\n", 400, ""},
		{"bad port", "GET / HTTP/1.1\r\nHost: acme.localhost:http\r\n\r\n", 400, ""},
		{"empty port", "GET / HTTP/1.1\r\nHost: acme.localhost:\r\n\r\n", 400, ""},
		{"absolute form, other host", "GET http://globex.localhost/ HTTP/1.1\r\nHost: acme.localhost\r\n\r\n", 400, "absolute_form"},
		{"absolute form, same host", "GET http://acme.localhost/ HTTP/1.1\r\nHost: acme.localhost\r\n\r\n", 400, "absolute_form"},
		{"opaque form", "GET mailto:acme.localhost HTTP/1.1\r\nHost: acme.localhost\r\n\r\n", 400, ""},
		{"connect", "CONNECT globex.localhost:80 HTTP/1.1\r\nHost: acme.localhost\r\n\r\n", 400, ""},
		{"unknown", "GET / HTTP/1.1\r\nHost: nobody.localhost\r\n\r\n", 404, "unknown_host"},
		{"unknown elsewhere", "GET / HTTP/1.1\r\nHost: acme.localhost.example.com\r\n\r\n", 404, "unknown_host"},
		{"below a tenant", "GET / HTTP/1.1\r\nHost: www.acme.localhost\r\n\r\n", 404, "unknown_host"},
		{"the schema's name", "GET / HTTP/1.1\r\nHost: pg-catalog.localhost\r\n\r\n", 404, "unknown_host"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, body := raw(t, st.addr, tc.request)
			require.Equal(t, tc.status, resp.StatusCode, "%s", body)
			require.Contains(t, body, tc.has)
			if tc.has != globex {
				require.NotContains(t, body, globex)
			}
			if tc.status != 200 {
				require.NotContains(t, body, acme)
				require.NotContains(t, body, public)
			}
		})
	}
}

func TestUnknownHostsLookAlike(t *testing.T) {
	st := open(t)
	ids := regexp.MustCompile(`"request_id":"[^"]+"`)
	var first string
	for _, host := range []string{"nobody.localhost", "acme.example.com", "pg-catalog.localhost", "public.localhost", "admin.localhost", "x.y.z"} {
		for _, path := range []string{"/api/v1/me"} {
			a := st.do(t, scenario{name: host, host: host, path: path, status: 404, code: "unknown_host", hasNot: []string{host}})
			body := ids.ReplaceAllString(a.body, "")
			if first == "" {
				first = body
			}
			require.Equal(t, first, body, "the answer for %s differs", host)
		}
	}
}

func TestForwardedHostsCountOnlyFromProxies(t *testing.T) {
	st := open(t)
	spoof := map[string]string{"X-Forwarded-Host": "globex.localhost", "Forwarded": "host=globex.localhost", "X-Host": "globex.localhost",
		"X-Original-Host": "globex.localhost", "X-Tenant": "globex", "X-Tenant-ID": "globex"}
	st.do(t, scenario{name: "spoofed", path: "/", header: spoof, status: 200, has: []string{`"slug":"acme"`}, hasNot: []string{"globex"}})

	behind := st.again(t, func(o *server.Options) { o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")} })
	only := func(v string) map[string]string { return map[string]string{"X-Forwarded-Host": v} }
	st.doAt(t, behind, scenario{name: "by a proxy", host: "internal.example", path: "/", header: only("globex.localhost"), status: 200, has: []string{`"slug":"globex"`}})
	st.doAt(t, behind, scenario{name: "two of them", path: "/", header: only("acme.localhost, globex.localhost"), status: 400, code: "invalid_host"})
	resp, body := raw(t, behind, "GET / HTTP/1.1\r\nHost: acme.localhost\r\nX-Forwarded-Host: globex.localhost\r\nX-Forwarded-Host: acme.localhost\r\n\r\n")
	require.Equal(t, 400, resp.StatusCode, body)
	st.doAt(t, behind, scenario{name: "an address", path: "/", header: only("127.0.0.1"), status: 400, code: "invalid_host"})
	st.doAt(t, behind, scenario{name: "Forwarded is not understood", path: "/", header: map[string]string{"Forwarded": "host=globex.localhost"}, status: 200,
		has: []string{`"slug":"acme"`}})
	elsewhere := st.again(t, func(o *server.Options) { o.TrustedProxies = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")} })
	st.doAt(t, elsewhere, scenario{name: "not our proxy", path: "/", header: only("globex.localhost"), status: 200, has: []string{`"slug":"acme"`}})
}

func TestStatesOfATenant(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", adminMail)
	slug := pgtest.Slug(t, "acme")
	_, err := st.env.Provision.Suspend(t.Context(), slug, "test")
	require.NoError(t, err)
	a := st.do(t, scenario{name: "suspended", path: "/api/v1/me", token: token, status: 503, code: "tenant_suspended"})
	require.NotEmpty(t, a.header.Get("Retry-After"))
	st.do(t, scenario{name: "suspended for everybody", path: "/", status: 503, code: "tenant_suspended"})
	st.do(t, scenario{name: "the others are served", host: "globex.localhost", path: "/", status: 200})
	_, err = st.env.Provision.Resume(t.Context(), slug, "test")
	require.NoError(t, err)
	st.do(t, scenario{name: "resumed", path: "/api/v1/me", token: token, status: 200})
	_, err = st.env.Provision.Drop(t.Context(), slug, time.Hour, "test")
	require.NoError(t, err)
	st.do(t, scenario{name: "dropped", path: "/api/v1/me", token: token, status: 410, code: "tenant_gone"})
	_, err = st.env.Provision.Undrop(t.Context(), slug, "test")
	require.NoError(t, err)
	st.do(t, scenario{name: "back", path: "/api/v1/me", token: token, status: 200})
}

func TestASuspendedTenantIsRefusedThoughItIsRemembered(t *testing.T) {
	st := open(t)
	// An instance that missed every message: it believes that acme is as it was at the start.
	stale := st.again(t, func(o *server.Options) { o.Resolver = remembered{st.acme} })
	token := st.login(t, "acme.localhost", adminMail)
	st.doAt(t, stale, scenario{name: "before", path: "/api/v1/pipelines", token: token, status: 200})
	_, err := st.env.Provision.Suspend(t.Context(), pgtest.Slug(t, "acme"), "test")
	require.NoError(t, err)
	st.doAt(t, stale, scenario{name: "suspended", path: "/api/v1/pipelines", token: token, status: 503, code: "tenant_suspended"})
	_, err = st.env.Provision.Drop(t.Context(), pgtest.Slug(t, "acme"), time.Hour, "test")
	require.NoError(t, err)
	st.doAt(t, stale, scenario{name: "dropped", path: "/api/v1/pipelines", token: token, status: 410, code: "tenant_gone"})
}

func TestATenantWhoseGroupIsNotConfiguredIsUnavailable(t *testing.T) {
	st := open(t)
	elsewhere := st.acme
	elsewhere.Group = "elsewhere"
	addr := st.again(t, func(o *server.Options) { o.Resolver = remembered{elsewhere} })
	a := st.doAt(t, addr, scenario{name: "no group", method: "POST", path: "/api/v1/auth/login", status: 503, code: "unavailable",
		body: fmt.Sprintf(`{"email":%q,"password":%q}`, adminMail, password), hasNot: []string{"elsewhere", "group", "ONEO_", "hint"}})
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Contains(t, st.logs.String(), `elsewhere\" is not configured`, "the operator is told")
}

func TestCrossOriginRequestsAreRefused(t *testing.T) {
	st := open(t)
	cookie := st.loginCookie(t, "acme.localhost", adminMail)
	post := func(name string, header map[string]string, status int) {
		t.Helper()
		st.do(t, scenario{name: name, method: "POST", path: "/api/v1/pipelines", cookie: cookie, header: header, status: status,
			body: `{"key":"` + strings.ReplaceAll(name, " ", "_") + `"}`})
	}
	post("other site", map[string]string{"Sec-Fetch-Site": "cross-site", "Origin": "https://evil.example"}, 403)
	post("other tenant", map[string]string{"Sec-Fetch-Site": "same-site", "Origin": "http://globex.localhost"}, 403)
	post("old browser", map[string]string{"Origin": "http://globex.localhost"}, 403)
	post("null origin", map[string]string{"Origin": "null"}, 403)
	post("same origin", map[string]string{"Sec-Fetch-Site": "same-origin", "Origin": "http://acme.localhost"}, 201)
	post("no browser", nil, 201)
	st.do(t, scenario{name: "login from elsewhere", method: "POST", path: "/api/v1/auth/login", status: 403, code: "cross_origin",
		header: map[string]string{"Origin": "https://evil.example"}, body: `{"email":"` + adminMail + `","password":"` + password + `"}`,
		headers: map[string]string{"Set-Cookie": "-"}})
}
