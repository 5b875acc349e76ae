package server_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/server"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const tenants = "/api/v1/admin/tenants"

// work runs the operations worker until the test ends.
func (st *stage) work(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- st.env.Provision.Work(ctx) }()
	t.Cleanup(func() {
		cancel()
		require.NoError(t, <-done)
	})
}

// follow waits for an accepted operation to end and returns it.
func (st *stage) follow(t *testing.T, token string, accepted answer) answer {
	t.Helper()
	location := accepted.header.Get("Location")
	require.Equal(t, "/api/v1/admin/operations/"+accepted.text(t, "operation", "id"), location)
	var a answer
	eventually(t, "the operation ends", func() bool {
		a = st.do(t, scenario{name: "follow", host: "localhost", path: location, token: token, status: 200})
		state := a.text(t, "state")
		return state == "done" || state == "failed"
	})
	return a
}

// audited counts lines of the audit trail.
func (st *stage) audited(t *testing.T, action string) (n int) {
	t.Helper()
	err := pgtest.Admin(t, st.env.AdminURL).QueryRow(t.Context(),
		`select count(*) from public.audit where action = $1 and actor = $2 and request_id <> ''`, action, rootMail).Scan(&n)
	require.NoError(t, err)
	return n
}

func TestAdministratorsProvision(t *testing.T) {
	st := open(t, func(o *server.Options) {})
	st.work(t)
	root := st.login(t, "localhost", rootMail)
	require.Equal(t, 1, st.audited(t, "admin.login"))
	act := func(name, method, path, body string, status int) answer {
		t.Helper()
		return st.do(t, scenario{name: name, method: method, host: "localhost", path: path, token: root, body: body, status: status})
	}
	made := act("create", "POST", tenants, `{"slug":"initech","name":"Initech","domains":["crm.initech.example"],"admin_email":"Bill@initech.example","settings":{"public":{"x":1}}}`, 202)
	generated := made.text(t, "admin", "password")
	require.Equal(t, "bill@initech.example", made.text(t, "admin", "email"))
	done := st.follow(t, root, made)
	require.Equal(t, "done", done.text(t, "state"), done.body)
	require.NotContains(t, done.body, generated)
	var stored string
	require.NoError(t, pgtest.Admin(t, st.env.AdminURL).QueryRow(t.Context(), `select string_agg(o::text, ' ') from public.operations o`).Scan(&stored))
	require.NotContains(t, stored, generated, "a password must never be written")
	require.NotContains(t, stored, "argon2", "a hash must be gone once it has been used")
	for _, host := range []string{"initech.localhost", "crm.initech.example"} {
		st.do(t, scenario{name: "the first user", method: "POST", host: host, path: "/api/v1/auth/login", status: 200,
			body: fmt.Sprintf(`{"email":"bill@initech.example","password":%q}`, generated), has: []string{`"admin"`}})
	}
	st.do(t, scenario{name: "settings", host: "initech.localhost", path: "/api/v1/settings", status: 200, has: []string{`"x":1`}})
	act("exists", "POST", tenants, `{"slug":"initech"}`, 409)

	show := act("show", "GET", tenants+"/initech", "", 200)
	require.Contains(t, show.body, "http://initech.localhost:8000")
	require.NotContains(t, show.body, `"schema"`)
	require.Equal(t, "done", st.follow(t, root, act("suspend", "POST", tenants+"/initech/suspend", "", 202)).text(t, "state"))
	st.do(t, scenario{name: "suspended", host: "initech.localhost", path: "/", status: 503})
	require.Equal(t, "done", st.follow(t, root, act("resume", "POST", tenants+"/initech/resume", "", 202)).text(t, "state"))
	st.do(t, scenario{name: "resumed", host: "initech.localhost", path: "/", status: 200})

	for _, body := range []string{"", `{}`, `{"confirm":"acme"}`, `{"confirm":"INITECH"}`} {
		st.do(t, scenario{name: "unconfirmed", method: "DELETE", host: "localhost", path: tenants + "/initech", token: root, body: body, status: 422,
			code: "confirmation_required", has: []string{`"/confirm"`}})
	}
	st.do(t, scenario{name: "still there", host: "initech.localhost", path: "/", status: 200})
	require.Equal(t, "done", st.follow(t, root, act("drop", "DELETE", tenants+"/initech", `{"confirm":"initech","grace":"2h"}`, 202)).text(t, "state"))
	st.do(t, scenario{name: "dropped", host: "initech.localhost", path: "/", status: 410})
	require.Equal(t, "done", st.follow(t, root, act("undrop", "POST", tenants+"/initech/undrop", "", 202)).text(t, "state"))
	st.do(t, scenario{name: "undropped", host: "initech.localhost", path: "/", status: 200})
	failed := st.follow(t, root, act("purge of one that is served", "POST", tenants+"/initech/purge", `{"confirm":"initech"}`, 202))
	require.Equal(t, "failed", failed.text(t, "state"), failed.body)
	require.NotEmpty(t, failed.text(t, "error", "message"))
	act("purge unconfirmed", "POST", tenants+"/initech/purge", "", 422)
	for action, n := range map[string]int{"tenant.create": 1, "tenant.suspend": 1, "tenant.resume": 1, "tenant.drop": 1, "tenant.undrop": 1, "tenant.purge": 1} {
		require.Equal(t, n, st.audited(t, action), action)
	}
	ops := act("operations", "GET", "/api/v1/admin/operations?limit=2", "", 200)
	require.Len(t, ops.get(t, "data"), 2)
	older := act("older", "GET", "/api/v1/admin/operations?limit=2&cursor="+ops.text(t, "page", "next_cursor"), "", 200)
	require.NotEqual(t, ops.get(t, "data"), older.get(t, "data"))
	st.env.Invariants(t)
}

func TestBadRequestsToProvisionQueueNothing(t *testing.T) {
	st := open(t)
	root := st.login(t, "localhost", rootMail)
	for body, pointer := range map[string]string{
		`{"slug":"Acme"}`: "/slug", `{"slug":"public"}`: "/slug", `{}`: "/slug", `{"slug":"a; drop schema acme"}`: "/slug",
		`{"slug":"ok","schema":"pg_catalog"}`: "/schema", `{"slug":"ok","domains":["ok.example","127.0.0.1"]}`: "/domains/1",
		`{"slug":"ok","domains":["localhost"]}`: "/domains/0", `{"slug":"ok","admin_email":"x"}`: "/admin_email",
		`{"slug":"ok","admin_password":"a long enough one"}`:                            "/admin_password",
		`{"slug":"ok","admin_email":"a@b.example","admin_password":"short"}`:            "/admin_password",
		`{"slug":"ok","settings":[1]}`:                                                  "/settings",
		`{"slug":"ok","name":"` + strings.Repeat("x", 201) + `"}`:                       "/name",
		`{"slug":` + `"` + strings.Repeat("a", 49) + `"}`:                               "/slug",
		`{"slug":"ok","admin_email":"a@b.example","admin_password":"password1"}`:        "/admin_password",
		`{"slug":"ok","admin_email":"a@b.example","admin_password":"a@b.example"}`:      "/admin_password",
		`{"slug":"ok-enough","admin_email":"a@b.example","admin_password":"ok-enough"}`: "/admin_password",
	} {
		st.do(t, scenario{name: body, method: "POST", host: "localhost", path: tenants, token: root, body: body, status: 422, has: []string{`"` + pointer + `"`}})
	}
	for _, path := range []string{"/nobody/suspend", "/nobody/resume", "/nobody/undrop", "/pg_catalog/suspend", "/a%2fb/suspend"} {
		st.do(t, scenario{name: path, method: "POST", host: "localhost", path: tenants + path, token: root, status: 404})
	}
	st.do(t, scenario{name: "grace", method: "DELETE", host: "localhost", path: tenants + "/acme", token: root, body: `{"confirm":"acme","grace":"soon"}`, status: 422})
	var queued int
	require.NoError(t, pgtest.Admin(t, st.env.AdminURL).QueryRow(t.Context(), `select count(*) from public.operations where actor = $1`, rootMail).Scan(&queued))
	require.Zero(t, queued)

	without := st.again(t, func(o *server.Options) { o.Provisioning = false })
	for _, sc := range []scenario{
		{method: "POST", path: tenants, body: `{"slug":"ok"}`}, {method: "POST", path: tenants + "/acme/suspend"},
		{method: "DELETE", path: tenants + "/acme", body: `{"confirm":"acme"}`},
	} {
		sc.host, sc.token, sc.status, sc.code, sc.has = "localhost", root, 503, "provisioning_unavailable", []string{"cannot provision"}
		st.doAt(t, without, sc)
	}
	st.doAt(t, without, scenario{name: "reading goes on", host: "localhost", path: tenants, token: root, status: 200, has: []string{`"acme"`}})
	st.doAt(t, without, scenario{name: "nobody learns of it", host: "localhost", method: "POST", path: tenants, body: `{"slug":"ok"}`, status: 401})
}

func TestAdministratorsListTenants(t *testing.T) {
	st := open(t)
	st.env.Tenant(t, "acme-berlin")
	root := st.login(t, "localhost", rootMail)
	get := func(query string) answer {
		t.Helper()
		return st.do(t, scenario{name: query, host: "localhost", path: tenants + query, token: root, status: 200})
	}
	slugs := func(a answer) (out []string) {
		for _, r := range a.get(t, "data").([]any) {
			out = append(out, r.(map[string]any)["slug"].(string))
		}
		return out
	}
	require.Equal(t, []string{"acme", "acme-berlin", "globex"}, slugs(get("")))
	require.Equal(t, []string{"acme", "acme-berlin"}, slugs(get("?name=acme")))
	require.Equal(t, []string{"acme-berlin"}, slugs(get("?name=*-*")))
	require.Empty(t, slugs(get("?name=nobody")))
	require.Empty(t, slugs(get("?state=suspended,dropped")))
	require.Len(t, slugs(get("?state=active&group=main")), 3)
	first := get("?limit=2")
	require.Equal(t, []string{"acme", "acme-berlin"}, slugs(first))
	require.Equal(t, []string{"globex"}, slugs(get("?limit=2&cursor="+first.text(t, "page", "next_cursor"))))
	for query, parameter := range map[string]string{"?state=alive": "state", "?state=purged": "state", "?state=active,purged": "state", "?limit=0": "limit", "?slug=acme": "slug", "?state=active&cursor=" + first.text(t, "page", "next_cursor"): "cursor"} {
		st.do(t, scenario{name: query, host: "localhost", path: tenants + query, token: root, status: 400, has: []string{`"parameter":"` + parameter + `"`}})
	}
}

func TestDomains(t *testing.T) {
	st := open(t)
	root := st.login(t, "localhost", rootMail)
	const d = tenants + "/acme/domains"
	for _, sc := range []scenario{
		{name: "list", path: d, status: 200, has: []string{"acme.localhost", `"primary":true`}},
		{name: "add", method: "POST", path: d, body: `{"host":"CRM.Acme.Example."}`, status: 201, has: []string{`"crm.acme.example"`}},
		{name: "another tenant's", method: "POST", path: d, body: `{"host":"globex.localhost"}`, status: 409, code: "domain_taken"},
		{name: "public", method: "POST", path: d, body: `{"host":"localhost"}`, status: 422, has: []string{"public_host"}},
		{name: "address", method: "POST", path: d, body: `{"host":"10.0.0.1"}`, status: 422, has: []string{`"/host"`}},
		{name: "primary", method: "POST", path: d + "/crm.acme.example/primary", status: 200},
		{name: "the primary stays", method: "DELETE", path: d + "/crm.acme.example", status: 409, code: "primary_domain"},
		{name: "back", method: "POST", path: d + "/acme.localhost/primary", status: 200},
		{name: "remove", method: "DELETE", path: d + "/crm.acme.example", status: 200, hasNot: []string{"crm.acme.example"}},
		{name: "not there", method: "DELETE", path: d + "/crm.acme.example", status: 404},
		{name: "held back", method: "POST", path: tenants + "/globex/domains", body: `{"host":"crm.acme.example"}`, status: 409, code: "domain_held"},
		{name: "unknown tenant", path: tenants + "/nobody/domains", status: 404},
	} {
		t.Run(sc.name, func(t *testing.T) {
			sc.host, sc.token = "localhost", root
			st.do(t, sc)
			served := st.do(t, scenario{name: "routed", host: "crm.acme.example", path: "/"}).status
			want := 404
			if sc.name == "add" || sc.name == "another tenant's" || sc.name == "public" || sc.name == "address" || strings.Contains(sc.name, "primary") || sc.name == "back" {
				want = 200
			}
			require.Equal(t, want, served)
		})
	}
	require.Equal(t, 1, st.audited(t, "domain.add"))
	require.Equal(t, 2, st.audited(t, "domain.primary"))
	require.Equal(t, 1, st.audited(t, "domain.remove"))
}

// An administrator sees at which version a tenant is, and why this instance does not serve it; a place that cannot be
// reached hides nothing else.
func TestTenantShowsItsVersion(t *testing.T) {
	st := open(t)
	root := st.login(t, "localhost", rootMail)
	show := func(slug string, has, hasNot []string) {
		t.Helper()
		st.do(t, scenario{name: "show " + slug, host: "localhost", path: tenants + "/" + slug, token: root, status: 200, has: has, hasNot: hasNot})
	}
	show("acme", []string{`"version":2`, `"slug":"acme"`, `acme.localhost`}, []string{"not_served"})
	show("globex", []string{`"version":1`, `"not_served":"it is at version 1"`}, nil)
	st.env.Tenant(t, "initech")
	show("initech", []string{`"slug":"initech"`}, []string{"version", "10.0.0.7"})
	st.do(t, scenario{name: "list", host: "localhost", path: tenants, token: root, status: 200, hasNot: []string{"version"}})
}

// A tenant that is known to be out of range is refused before anything else is done for it; its neighbour is not.
func TestServesIsAskedFirst(t *testing.T) {
	st := open(t, func(o *server.Options) {
		o.Serves = func(tn tenant.Tenant) error {
			if tn.Slug.String() == "acme" {
				return postgres.Upgrading(tn)
			}
			return nil
		}
	})
	for _, path := range []string{"/", "/api/v1/me", "/api/v1/settings", "/nothing-here"} {
		a := st.do(t, scenario{name: path, path: path, status: 503, code: "tenant_upgrading", has: []string{"being upgraded"}, hasNot: []string{"version"}})
		require.Equal(t, "5", a.header.Get("Retry-After"))
	}
	st.do(t, scenario{name: "neighbour", host: "globex.localhost", path: "/api/v1/settings", status: 200})
	st.do(t, scenario{name: "administrators", host: "localhost", path: "/nothing-here", status: 404})
}
