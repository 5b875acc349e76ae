package server_test

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestLoginAndLogout(t *testing.T) {
	st := open(t)
	loginBody := func(email, pw string) string {
		return fmt.Sprintf(`{"email":%q,"password":%q,"token":true}`, email, pw)
	}
	wrong := []scenario{
		{name: "wrong password", body: loginBody(adminMail, "not the password"), status: 401, code: "login_failed"},
		{name: "unknown account", body: loginBody("nobody@example.com", password), status: 401, code: "login_failed"},
		{name: "administrators have no account here", body: loginBody(rootMail, password), status: 401, code: "login_failed"},
		{name: "tenants' users are no administrators", host: "localhost", body: loginBody(adminMail, password), status: 401, code: "login_failed"},
		{name: "no address", body: loginBody("nobody", password), status: 422, has: []string{`"/email"`}},
		{name: "unknown member", body: `{"email":"a@b.c","password":"x","remember":true}`, status: 400, code: "unknown_member", has: []string{`"/remember"`}},
		{name: "huge password", body: loginBody(adminMail, strings.Repeat("x", 5000)), status: 401, code: "login_failed"},
		{name: "form", body: "email=a", header: map[string]string{"Content-Type": "application/x-www-form-urlencoded"}, status: 415},
	}
	for _, sc := range wrong {
		t.Run(sc.name, func(t *testing.T) {
			sc.method, sc.path, sc.headers = "POST", "/api/v1/auth/login", map[string]string{"Set-Cookie": "-"}
			sc.hasNot = []string{"ons_", "oas_"}
			st.do(t, sc)
		})
	}
	unknown := st.do(t, scenario{method: "POST", path: "/api/v1/auth/login", body: loginBody("nobody@example.com", password)})
	known := st.do(t, scenario{method: "POST", path: "/api/v1/auth/login", body: loginBody(adminMail, "not the password")})
	require.Equal(t, known.get(t, "detail"), unknown.get(t, "detail"), "an account that is there must look like one that is not")

	token := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "me", path: "/api/v1/me", token: token, status: 200, has: []string{adminMail, `"acme"`}, hasNot: []string{token, "globex"}})
	st.do(t, scenario{name: "logout", method: "POST", path: "/api/v1/auth/logout", token: token, status: 204})
	st.do(t, scenario{name: "after logout", path: "/api/v1/me", token: token, status: 401, code: "unauthenticated"})

	cookie := st.loginCookie(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "cookie", path: "/api/v1/me", cookie: cookie, status: 200})
	out := st.do(t, scenario{name: "logout", method: "POST", path: "/api/v1/auth/logout", cookie: cookie, status: 204})
	require.Contains(t, out.header.Get("Set-Cookie"), "Max-Age=0")
	st.do(t, scenario{name: "cookie after logout", path: "/api/v1/me", cookie: cookie, status: 401})
	require.NotContains(t, st.logs.String(), token, "tokens must not be logged")
	require.NotContains(t, st.logs.String(), password)
}

func TestCredentialsAreNeverGuessed(t *testing.T) {
	st := open(t)
	admin, member := st.login(t, "acme.localhost", adminMail), st.login(t, "acme.localhost", memberMail)
	for _, sc := range []scenario{
		{name: "none", status: 401, headers: map[string]string{"Www-Authenticate": `Bearer realm="oneo"`}},
		{name: "bearer and cookie", token: admin, cookie: member, status: 400, code: "ambiguous_credentials"},
		{name: "two cookies", header: map[string]string{"Cookie": "oneo_session=" + admin + "; oneo_session=" + member}, status: 400, code: "ambiguous_credentials"},
		{name: "basic", header: map[string]string{"Authorization": "Basic YTpi"}, status: 401},
		{name: "empty bearer", header: map[string]string{"Authorization": "Bearer "}, status: 401},
		{name: "made up", token: "ons_" + strings.Repeat("A", 43), status: 401},
		{name: "other prefix", token: "oas_" + strings.TrimPrefix(admin, "ons_"), status: 401},
		{name: "token in the query", header: nil, path: "/api/v1/me?token=" + admin, status: 401},
		{name: "token as tenant header", header: map[string]string{"X-Tenant-ID": "acme", "X-Auth-Token": admin}, status: 401},
		{name: "another cookie's name", header: map[string]string{"Cookie": "__Host-oneo=" + admin}, status: 401},
		{name: "lower-case scheme", header: map[string]string{"Authorization": "bearer " + admin}, status: 200},
	} {
		t.Run(sc.name, func(t *testing.T) {
			if sc.path == "" {
				sc.path = "/api/v1/me"
			}
			st.do(t, sc)
		})
	}
}

func TestTokensOfAnotherTenantAreUnknown(t *testing.T) {
	st := open(t)
	acme, cookie := st.login(t, "acme.localhost", adminMail), st.loginCookie(t, "acme.localhost", adminMail)
	root := st.login(t, "localhost", rootMail)
	key := st.do(t, scenario{name: "key", method: "POST", path: "/api/v1/api-keys", token: acme, body: `{"name":"ci","scopes":["admin"]}`, status: 201}).text(t, "token")
	for _, path := range []string{"/api/v1/me", "/api/v1/users", "/api/v1/pipelines", "/api/v1/pipelines/deals/records", "/api/v1/api-keys"} {
		st.do(t, scenario{name: "at home", path: path, token: acme})
		st.do(t, scenario{name: "bearer", host: "globex.localhost", path: path, token: acme, status: 401, hasNot: []string{adminMail}})
		st.do(t, scenario{name: "cookie", host: "globex.localhost", path: path, cookie: cookie, status: 401, hasNot: []string{adminMail}})
		st.do(t, scenario{name: "key", host: "globex.localhost", path: path, token: key, status: 401, hasNot: []string{adminMail}})
		st.do(t, scenario{name: "administrator", host: "acme.localhost", path: path, token: root, status: 401})
	}
	for _, path := range []string{"/api/v1/me", "/api/v1/admin/tenants", "/api/v1/admin/operations", "/api/v1/admin/tenants/acme/domains"} {
		st.do(t, scenario{name: "tenant's on the public host", host: "localhost", path: path, token: acme, status: 401})
		st.do(t, scenario{name: "tenant's key on the public host", host: "localhost", path: path, token: key, status: 401})
		st.do(t, scenario{name: "administrator", host: "localhost", path: path, token: root, status: 200})
	}
	require.Contains(t, st.logs.String(), "a token was refused")

	// The same with every cache entry moved under the other tenant's key: what lies in a cache says itself whose it is.
	st.cache.mu.Lock()
	for k, v := range st.cache.values {
		if rest, ok := strings.CutPrefix(k, st.acme.Schema.String()+":"); ok {
			st.cache.values[st.globex.Schema.String()+":"+rest] = v
		}
	}
	st.cache.mu.Unlock()
	other := st.again(t)
	st.doAt(t, other, scenario{name: "from a cache", host: "globex.localhost", path: "/api/v1/pipelines", token: acme, status: 401})
	st.doAt(t, other, scenario{name: "from a cache", host: "acme.localhost", path: "/api/v1/pipelines", token: acme, status: 200})
}

func TestRealmsDoNotKnowEachOthersPaths(t *testing.T) {
	st := open(t)
	acme, root := st.login(t, "acme.localhost", adminMail), st.login(t, "localhost", rootMail)
	for _, path := range []string{"/api/v1/admin/tenants", "/api/v1/admin/operations", "/livez", "/readyz", "/metrics", "/debug/pprof/"} {
		st.do(t, scenario{name: "on a tenant's host", path: path, token: acme, status: 404, code: "unknown_path"})
	}
	for _, path := range []string{"/api/v1/users", "/api/v1/pipelines", "/api/v1/settings", "/livez", "/readyz", "/debug/pprof/"} {
		st.do(t, scenario{name: "on a public host", host: "localhost", path: path, token: root, status: 404, code: "unknown_path"})
	}
	st.do(t, scenario{name: "method", method: "PUT", path: "/api/v1/me", token: acme, status: 405, code: "method_not_allowed"})
	st.do(t, scenario{name: "preflight", method: "OPTIONS", path: "/api/v1/me", status: 405, header: map[string]string{"Origin": "https://evil.example"}})
	st.do(t, scenario{name: "head", method: "HEAD", path: "/api/v1/me", token: acme, status: 200})
	st.do(t, scenario{name: "index", path: "/", status: 200, has: []string{`"product":"oneo"`, "acme"}, hasNot: []string{"admin/tenants"}})
	st.do(t, scenario{name: "index", host: "localhost", path: "/", status: 200, has: []string{"admin/tenants"}, hasNot: []string{"acme"}})
	st.do(t, scenario{name: "query", path: "/?debug=1", status: 400, code: "unknown_parameter", has: []string{`"parameter":"debug"`}})
}

func TestALoginReplacesTheBrowsersSession(t *testing.T) {
	st := open(t)
	first := st.loginCookie(t, "acme.localhost", memberMail)
	planted := "ons_" + strings.Repeat("A", 43)
	for _, cookie := range []string{first, planted} {
		a := st.do(t, scenario{name: "login again", method: "POST", path: "/api/v1/auth/login", cookie: cookie, status: 200,
			body: fmt.Sprintf(`{"email":%q,"password":%q}`, adminMail, password)})
		second, err := http.ParseSetCookie(a.header.Get("Set-Cookie"))
		require.NoError(t, err)
		require.NotEqual(t, cookie, second.Value, "an id that the client chose or had must not be adopted")
		st.do(t, scenario{name: "the new one", path: "/api/v1/me", cookie: second.Value, status: 200, has: []string{adminMail}})
		st.do(t, scenario{name: "the old one", path: "/api/v1/me", cookie: cookie, status: 401})
	}
}

func TestWhatEndsSessionsEndsThemAtOnce(t *testing.T) {
	st := open(t)
	other := st.again(t) // another instance behind the same caches
	admin := st.login(t, "acme.localhost", adminMail)
	for _, tc := range []struct {
		name   string
		act    func(t *testing.T, id string)
		keyToo bool
	}{
		{"disable", func(t *testing.T, id string) {
			st.do(t, scenario{name: "disable", method: "POST", path: "/api/v1/users/" + id + "/disable", token: admin, status: 200, has: []string{"disabled_at"}})
		}, true},
		{"set-password", func(t *testing.T, id string) {
			st.do(t, scenario{name: "set-password", method: "POST", path: "/api/v1/users/" + id + "/set-password", token: admin,
				body: `{"password":"an entirely new one"}`, status: 200})
		}, false},
		{"revoke-sessions", func(t *testing.T, id string) {
			st.do(t, scenario{name: "revoke", method: "POST", path: "/api/v1/users/" + id + "/revoke-sessions", token: admin, status: 200, has: []string{`"ended":2`}})
		}, false},
		{"role", func(t *testing.T, id string) {
			st.do(t, scenario{name: "role", method: "PATCH", path: "/api/v1/users/" + id, token: admin, header: map[string]string{"If-Match": `"1"`},
				body: `{"role":"viewer"}`, status: 200})
		}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mail := tc.name + "@example.com"
			a := st.do(t, scenario{name: "add", method: "POST", path: "/api/v1/users", token: admin, status: 201,
				body: fmt.Sprintf(`{"email":%q,"password":%q,"role":"admin"}`, mail, password)})
			id := a.text(t, "id")
			bearer, cookie := st.login(t, "acme.localhost", mail), st.loginCookie(t, "acme.localhost", mail)
			key := st.do(t, scenario{name: "key", method: "POST", path: "/api/v1/api-keys", token: bearer, body: `{"name":"k","scopes":["admin"]}`, status: 201}).text(t, "token")
			for _, addr := range []string{st.addr, other} { // fill every cache
				st.doAt(t, addr, scenario{name: "before", path: "/api/v1/me", token: bearer, status: 200})
				st.doAt(t, addr, scenario{name: "before", path: "/api/v1/me", cookie: cookie, status: 200})
				st.doAt(t, addr, scenario{name: "before", path: "/api/v1/users", token: key, status: 200})
			}
			tc.act(t, id)
			st.do(t, scenario{name: "bearer", path: "/api/v1/pipelines", token: bearer, status: 401})
			st.do(t, scenario{name: "cookie", path: "/api/v1/pipelines", cookie: cookie, status: 401})
			switch {
			case tc.keyToo:
				st.do(t, scenario{name: "key", path: "/api/v1/users", token: key, status: 401})
			case tc.name == "role":
				st.do(t, scenario{name: "key", path: "/api/v1/users", token: key, status: 403})
			default:
				st.do(t, scenario{name: "key", path: "/api/v1/users", token: key, status: 200})
			}
			// The other instance may remember for LocalTTL, and no longer, whatever lies in the shared cache.
			eventually(t, "the other instance refuses the token too", func() bool {
				return st.doAt(t, other, scenario{path: "/api/v1/pipelines", token: bearer}).status == 401
			})
			if tc.keyToo {
				eventually(t, "the other instance refuses the key too", func() bool {
					return st.doAt(t, other, scenario{path: "/api/v1/pipelines", token: key}).status == 401
				})
			}
		})
	}
	st.do(t, scenario{name: "everybody out", method: "POST", path: "/api/v1/sessions/revoke", token: admin, status: 200})
	st.do(t, scenario{name: "the caller included", path: "/api/v1/me", token: admin, status: 401})
}

func TestRevokedKeysAreDeadAtOnce(t *testing.T) {
	st := open(t)
	member := st.login(t, "acme.localhost", memberMail)
	a := st.do(t, scenario{name: "add", method: "POST", path: "/api/v1/api-keys", token: member, body: `{"name":"ci","scopes":["read"]}`, status: 201})
	id, key := a.text(t, "id"), a.text(t, "token")
	st.do(t, scenario{name: "read", path: "/api/v1/pipelines", token: key, status: 200})
	st.do(t, scenario{name: "beyond its scope", method: "POST", path: "/api/v1/pipelines/x/records", token: key, body: `{"data":{}}`, status: 403})
	st.do(t, scenario{name: "no keys by a key", method: "POST", path: "/api/v1/api-keys", token: key, body: `{"name":"more"}`, status: 403})
	st.do(t, scenario{name: "no list by a key", path: "/api/v1/api-keys", token: key, status: 403})
	st.do(t, scenario{name: "no logout by a key", method: "POST", path: "/api/v1/auth/logout", token: key, status: 403})
	st.do(t, scenario{name: "others' keys", path: "/api/v1/api-keys?all=true", token: member, status: 403})
	st.do(t, scenario{name: "list", path: "/api/v1/api-keys", token: member, status: 200, has: []string{`"ci"`}, hasNot: []string{key}})
	viewer := st.login(t, "acme.localhost", viewerMail)
	st.do(t, scenario{name: "somebody else's", method: "DELETE", path: "/api/v1/api-keys/" + id, token: viewer, status: 404})
	st.do(t, scenario{name: "past", method: "POST", path: "/api/v1/api-keys", token: member, body: `{"name":"x","expires_at":"2020-01-01T00:00:00Z"}`, status: 422})
	st.do(t, scenario{name: "revoke", method: "DELETE", path: "/api/v1/api-keys/" + id, token: member, status: 204})
	st.do(t, scenario{name: "dead", path: "/api/v1/pipelines", token: key, status: 401})
}

func TestKeysAreListedInPages(t *testing.T) {
	st := open(t)
	member, admin := st.login(t, "acme.localhost", memberMail), st.login(t, "acme.localhost", adminMail)
	const k = "/api/v1/api-keys"
	st.do(t, scenario{name: "none", path: k, token: member, status: 200, has: []string{`"data":[]`, `"has_more":false`}})
	// With their quotes: a cursor may hold any two letters.
	for i := range 3 {
		st.do(t, scenario{name: "add", method: "POST", path: k, token: member, body: fmt.Sprintf(`{"name":"k%d"}`, i), status: 201})
	}
	a := st.do(t, scenario{name: "first", path: k + "?limit=2", token: member, status: 200, has: []string{`"k0"`, `"k1"`}, hasNot: []string{`"k2"`}})
	require.Equal(t, true, a.get(t, "page", "has_more"))
	require.Contains(t, a.header.Get("Link"), `rel="next"`)
	next := a.text(t, "page", "next_cursor")
	a = st.do(t, scenario{name: "second", path: k + "?limit=2&cursor=" + next, token: member, status: 200, has: []string{`"k2"`}, hasNot: []string{`"k0"`, `"k1"`}})
	require.Equal(t, false, a.get(t, "page", "has_more"))
	st.do(t, scenario{name: "of all", path: k + "?all=true&limit=3", token: admin, status: 200, has: []string{`"k0"`, `"k2"`}})
	st.do(t, scenario{name: "another's cursor", path: k + "?limit=2&cursor=" + next, token: admin, status: 400, code: "cursor_mismatch"})
	st.do(t, scenario{name: "limit", path: k + "?limit=0", token: member, status: 400})
}

func TestOwnPassword(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", memberMail)
	change := func(current, next string) string {
		return fmt.Sprintf(`{"current_password":%q,"password":%q}`, current, next)
	}
	st.do(t, scenario{name: "wrong", method: "POST", path: "/api/v1/me/password", token: token, body: change("nonsense", "a good new password"), status: 422,
		has: []string{"/current_password"}})
	st.do(t, scenario{name: "common", method: "POST", path: "/api/v1/me/password", token: token, body: change(password, "password1"), status: 422, has: []string{`"/password"`}})
	st.do(t, scenario{name: "still in", path: "/api/v1/me", token: token, status: 200})
	st.do(t, scenario{name: "good", method: "POST", path: "/api/v1/me/password", token: token, body: change(password, "a good new password"), status: 204})
	st.do(t, scenario{name: "out", path: "/api/v1/me", token: token, status: 401})
	st.do(t, scenario{name: "old password", method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":%q,"password":%q}`, memberMail, password), status: 401})
	st.do(t, scenario{name: "new password", method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":%q,"password":"a good new password"}`, memberMail), status: 200})
	st.login(t, "globex.localhost", memberMail) // the same person elsewhere is another account
}

// overtaken lets something happen before each writing transaction begins: after what was checked before it.
type overtaken struct {
	databases
	first func(ctx context.Context) error
}

func (o overtaken) InTenant(ctx context.Context, t tenant.Tenant, a server.Access, fn func(server.Tx) error) error {
	if a == server.Write {
		if err := o.first(ctx); err != nil {
			return err
		}
	}
	return o.databases.InTenant(ctx, t, a, fn)
}

func TestAnOwnPasswordDoesNotReplaceAReset(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", memberMail)
	reset, err := auth.NewHasher(1).Hash(t.Context(), "what the administrator set")
	require.NoError(t, err)
	addr := st.again(t, func(o *server.Options) {
		o.Databases = overtaken{databases{st.env.DB}, func(ctx context.Context) error {
			return st.env.DB.InTenant(ctx, st.acme, postgres.Write, func(tx *postgres.Tx) error {
				u, err := auth.Tenants().UserByEmail(ctx, tx, memberMail)
				if err == nil {
					_, _, err = auth.Tenants().SetPassword(ctx, tx, u.ID, reset)
				}
				return err
			})
		}}
	})
	st.doAt(t, addr, scenario{name: "too late", method: "POST", path: "/api/v1/me/password", token: token, status: 422,
		body: fmt.Sprintf(`{"current_password":%q,"password":"a good new password"}`, password), has: []string{"/current_password", "wrong_password"}})
	st.do(t, scenario{name: "not the own one", method: "POST", path: "/api/v1/auth/login", status: 401,
		body: fmt.Sprintf(`{"email":%q,"password":"a good new password"}`, memberMail)})
	st.do(t, scenario{name: "the reset", method: "POST", path: "/api/v1/auth/login", status: 200,
		body: fmt.Sprintf(`{"email":%q,"password":"what the administrator set"}`, memberMail)})
}

func TestSecureCookies(t *testing.T) {
	st := open(t, func(o *server.Options) { o.PublicURL = "https://oneo.example" })
	a := st.do(t, scenario{name: "login", method: "POST", path: "/api/v1/auth/login", status: 200,
		body: fmt.Sprintf(`{"email":%q,"password":%q}`, adminMail, password)})
	cookie, err := http.ParseSetCookie(a.header.Get("Set-Cookie"))
	require.NoError(t, err)
	require.Equal(t, "__Host-oneo", cookie.Name)
	require.True(t, cookie.Secure && cookie.HttpOnly)
	require.Empty(t, cookie.Domain)
	require.NotEmpty(t, a.header.Get("Strict-Transport-Security"))
	st.do(t, scenario{name: "me", path: "/api/v1/me", header: map[string]string{"Cookie": "__Host-oneo=" + cookie.Value}, status: 200})
	st.do(t, scenario{name: "the plain name does not count", path: "/api/v1/me", cookie: cookie.Value, status: 401})
}

// pausing holds the first reading transaction of a tenant after its work is done, as a slow network would.
type pausing struct {
	databases
	once            *atomic.Bool
	inside, release chan struct{}
}

func (p pausing) InTenant(ctx context.Context, t tenant.Tenant, a server.Access, fn func(server.Tx) error) error {
	err := p.databases.InTenant(ctx, t, a, fn)
	if a == server.Single && p.once.CompareAndSwap(false, true) {
		close(p.inside)
		<-p.release
	}
	return err
}

func TestALookUpThatIsOvertakenByALogoutLeavesNothingBehind(t *testing.T) {
	for _, where := range []string{"this process", "the shared cache"} {
		t.Run(where, func(t *testing.T) {
			st := open(t)
			token := st.login(t, "acme.localhost", adminMail)
			p := pausing{databases{st.env.DB}, &atomic.Bool{}, make(chan struct{}), make(chan struct{})}
			slow := st.again(t, func(o *server.Options) {
				o.Databases = p
				if where == "this process" {
					o.Cache, o.LocalTTL = nil, time.Hour
				} else {
					o.LocalTTL = time.Millisecond
				}
			})
			answered := make(chan int, 1)
			r := scenario{path: "/api/v1/me", token: token}.request(t, slow)
			go func() {
				resp, err := http.DefaultTransport.RoundTrip(r)
				if err != nil {
					answered <- -1
					return
				}
				_ = resp.Body.Close()
				answered <- resp.StatusCode
			}()
			<-p.inside // it has read that the token is good, and has not stored it yet
			st.doAt(t, slow, scenario{name: "logout", method: "POST", path: "/api/v1/auth/logout", token: token, status: 204})
			close(p.release)
			require.Equal(t, 200, <-answered, "it was good when it was asked about")
			st.doAt(t, slow, scenario{name: "afterwards", path: "/api/v1/pipelines", token: token, status: 401})
		})
	}
}

func TestACacheThatIsRolledBackRevivesNobody(t *testing.T) {
	st := open(t)
	const ttl = 300 * time.Millisecond
	addr := st.again(t, func(o *server.Options) { o.IdentityTTL, o.LocalTTL = ttl, time.Millisecond })
	token := st.login(t, "acme.localhost", adminMail)
	began := time.Now()
	st.doAt(t, addr, scenario{name: "before", path: "/api/v1/pipelines", token: token, status: 200})
	st.cache.mu.Lock()
	snapshot := maps.Clone(st.cache.values)
	st.cache.mu.Unlock()
	require.NotEmpty(t, snapshot, "who asked must have been cached")
	st.doAt(t, addr, scenario{name: "logout", method: "POST", path: "/api/v1/auth/logout", token: token, status: 204})
	eventually(t, "what the snapshot holds has aged", func() bool { return time.Since(began) > 2*ttl })
	st.cache.mu.Lock()
	st.cache.values = snapshot
	st.cache.mu.Unlock()
	st.doAt(t, addr, scenario{name: "after", path: "/api/v1/pipelines", token: token, status: 401})
}

// Security 45: what happens to credentials stands in the log, with the tenant and the request, and never the credential.
func TestCredentialsLeaveATrace(t *testing.T) {
	st := open(t)
	token := st.login(t, "acme.localhost", memberMail)
	require.Contains(t, st.logs.String(), `"logged in"`)
	st.do(t, scenario{name: "no address", method: "POST", path: "/api/v1/auth/login", status: 422,
		body: `{"email":"evil\nlevel=ERROR msg=forged@example.com","password":"guess guess guess"}`})
	st.do(t, scenario{name: "wrong", method: "POST", path: "/api/v1/auth/login", status: 401,
		body: `{"email":"nobody@example.com","password":"guess guess guess"}`})
	wrong := st.do(t, scenario{name: "not the password", method: "POST", path: "/api/v1/me/password", token: token, status: 422,
		body: `{"current_password":"guess guess guess","password":"a good new password"}`})
	st.do(t, scenario{name: "foreign cookie", host: "globex.localhost", path: "/api/v1/settings", cookie: token, status: 200})
	st.do(t, scenario{name: "changed", method: "POST", path: "/api/v1/me/password", token: token, status: 204,
		body: fmt.Sprintf(`{"current_password":%q,"password":"a good new password"}`, password)})
	st.do(t, scenario{name: "login", method: "POST", path: "/api/v1/auth/login", status: 200, body: fmt.Sprintf(`{"email":%q,"password":%q}`, adminMail, password)})
	out := st.login(t, "acme.localhost", adminMail)
	st.do(t, scenario{name: "logout", method: "POST", path: "/api/v1/auth/logout", token: out, status: 204})
	lines := strings.Split(strings.TrimSpace(st.logs.String()), "\n")
	count := func(words ...string) (n int) {
		for _, line := range lines {
			all := true
			for _, w := range words {
				all = all && strings.Contains(line, w)
			}
			if all {
				n++
			}
		}
		return n
	}
	require.Equal(t, 2, count(`"login failed"`, "tenant=acme"))
	require.Equal(t, 1, count(`"login failed"`, wrong.header.Get("X-Request-Id")))
	require.Equal(t, 1, count(`"a token was refused"`, "tenant=globex"), "a cookie of another tenant")
	require.Equal(t, 1, count(`"password changed"`, "tenant=acme"))
	require.Equal(t, 1, count(`"logged out"`, "tenant=acme"))
	require.Zero(t, count("level=ERROR"), "a line of the log is what the server wrote, not what a client sent")
	for _, secret := range []string{token, out, password, "guess guess guess", "a good new password"} {
		require.Zero(t, count(secret), "a credential stands in the log")
	}
}
