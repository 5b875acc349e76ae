package server_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const deals = "/api/v1/pipelines/deals/records"

// withDeals makes a pipeline and returns tokens of an admin, a member and a viewer.
func withDeals(t *testing.T) (st *stage, admin, member, viewer string) {
	t.Helper()
	st = open(t)
	admin, member, viewer = st.login(t, "acme.localhost", adminMail), st.login(t, "acme.localhost", memberMail), st.login(t, "acme.localhost", viewerMail)
	a := st.do(t, scenario{name: "pipeline", method: "POST", path: "/api/v1/pipelines", token: admin, status: 201, body: `{"key":"deals","name":"Deals","fields":[
		{"key":"title","type":"text","required":true},{"key":"amount","type":"number"},
		{"key":"stage","type":"select","options":{"choices":["won","lost"]}}]}`, headers: map[string]string{"Location": "/api/v1/pipelines/deals"}})
	require.Equal(t, `"1"`, a.header.Get("ETag"))
	return st, admin, member, viewer
}

func ifMatch(v string) map[string]string { return map[string]string{"If-Match": v} }

func TestRecords(t *testing.T) {
	st, admin, member, viewer := withDeals(t)
	a := st.do(t, scenario{name: "create", method: "POST", path: deals, token: member, body: `{"data":{"title":"<Big> & bold","amount":12.50,"stage":"won"}}`,
		status: 201, has: []string{`"<Big> & bold"`, `12.50`}, headers: map[string]string{"Etag": `"1"`}})
	id := a.text(t, "id")
	one := deals + "/" + id
	require.Equal(t, one, a.header.Get("Location"))

	for _, sc := range []scenario{
		{name: "read", path: one, token: viewer, status: 200, has: []string{`"<Big> & bold"`}, headers: map[string]string{"Etag": `"1"`}},
		{name: "read elsewhere", path: "/api/v1/pipelines/other/records/" + id, token: viewer, status: 404},
		{name: "no id", path: deals + "/1", token: viewer, status: 404, code: "unknown_record"},
		{name: "no id", path: deals + "/%27;drop%20table%20records", token: viewer, status: 404},
		{name: "another id", path: deals + "/00000000-0000-0000-0000-000000000000", token: viewer, status: 404},
		{name: "parameter", path: one + "?fields=title", token: viewer, status: 400, code: "unknown_parameter"},
		{name: "viewer writes", method: "POST", path: deals, token: viewer, body: `{"data":{"title":"x"}}`, status: 403, code: "forbidden"},
		{name: "viewer deletes", method: "DELETE", path: one, token: viewer, status: 403},
		{name: "anonymous", path: one, status: 401},
		{name: "missing", method: "POST", path: deals, token: member, body: `{"data":{}}`, status: 422, has: []string{`"/data/title"`, `"required"`}},
		{name: "type", method: "POST", path: deals, token: member, body: `{"data":{"title":"x","amount":"much"}}`, status: 422, has: []string{`"/data/amount"`}},
		{name: "choice", method: "POST", path: deals, token: member, body: `{"data":{"title":"x","stage":"maybe"}}`, status: 422, has: []string{`"/data/stage"`, "won, lost"}},
		{name: "unknown field", method: "POST", path: deals, token: member, body: `{"data":{"title":"x","nope":1}}`, status: 422, has: []string{`"/data/nope"`}},
		{name: "no data", method: "POST", path: deals, token: member, body: `{"title":"x"}`, status: 400, code: "unknown_member", has: []string{`"/title"`}},
		{name: "twice", method: "POST", path: deals, token: member, body: `{"data":{"title":"x","title":"y"}}`, status: 400, code: "duplicate_name"},
		{name: "NUL", method: "POST", path: deals, token: member, body: `{"data":{"title":"a\u0000"}}`, status: 422, has: []string{`"/data/title"`}},
		{name: "unknown pipeline", method: "POST", path: "/api/v1/pipelines/nope/records", token: member, body: `{"data":{}}`, status: 404},
		{name: "no version", method: "PATCH", path: one, token: member, body: `{"data":{"amount":1}}`, status: 428, code: "if_match_required"},
		{name: "odd version", method: "PATCH", path: one, token: member, header: ifMatch(`W/"1"`), body: `{"data":{"amount":1}}`, status: 400, code: "bad_if_match"},
		{name: "patched type", method: "PATCH", path: one, token: member, header: ifMatch(`"1"`), body: `{"data":{"amount":"x"}}`, status: 422, has: []string{`"/data/amount"`}},
		{name: "patched away", method: "PATCH", path: one, token: member, header: ifMatch(`"1"`), body: `{"data":{"title":null}}`, status: 422, has: []string{`"/data/title"`}},
		{name: "idempotency", method: "POST", path: deals, token: member, header: map[string]string{"Idempotency-Key": "a"}, body: `{"data":{"title":"x"}}`, status: 400, code: "not_supported"},
		{name: "idempotent delete", method: "DELETE", path: one, token: member, header: map[string]string{"Idempotency-Key": ""}, status: 400, code: "not_supported"},
		{name: "idempotent read", path: one, token: viewer, header: map[string]string{"Idempotency-Key": "a"}, status: 200},
		{name: "unchanged so far", path: one, token: viewer, status: 200, has: []string{`"version":1`}},
		{name: "patch", method: "PATCH", path: one, token: member, header: ifMatch(`"1"`), body: `{"data":{"amount":13,"stage":null}}`, status: 200,
			has: []string{`"amount":13`}, hasNot: []string{"stage"}, headers: map[string]string{"Etag": `"2"`}},
		{name: "stale", method: "PATCH", path: one, token: member, header: ifMatch(`"1"`), body: `{"data":{"amount":14}}`, status: 412, code: "stale",
			has: []string{`"current"`, `"conflicting_fields":["amount"]`, `"version":2`}},
		{name: "stale delete", method: "DELETE", path: one, token: member, header: ifMatch(`"1"`), status: 412},
		{name: "purge of what is not in the trash", method: "DELETE", path: one + "?purge=true", token: admin, status: 404},
		{name: "delete", method: "DELETE", path: one, token: member, header: ifMatch(`"2"`), status: 200, has: []string{"deleted_at"}},
		{name: "gone", path: one, token: viewer, status: 404},
		{name: "not listed", path: deals, token: viewer, status: 200, hasNot: []string{id}},
		{name: "in the trash", path: deals + "?trash=true", token: viewer, status: 200, has: []string{id}},
		{name: "stale restore", method: "POST", path: one + "/restore", token: member, header: ifMatch(`"2"`), status: 412, code: "stale", has: []string{`"version":3`}},
		{name: "odd version of a restore", method: "POST", path: one + "/restore", token: member, header: ifMatch(`*`), status: 400, code: "bad_if_match"},
		{name: "restore", method: "POST", path: one + "/restore", token: member, header: ifMatch(`"3"`), status: 200, hasNot: []string{"deleted_at"}},
		{name: "back", path: one, token: viewer, status: 200},
		{name: "delete again", method: "DELETE", path: one, token: member, status: 200},
		{name: "member purges", method: "DELETE", path: one + "?purge=true", token: member, status: 403},
		{name: "what purge", method: "DELETE", path: one + "?purge=yes", token: admin, status: 400, has: []string{`"parameter":"purge"`}},
		{name: "stale purge", method: "DELETE", path: one + "?purge=true", token: admin, header: ifMatch(`"4"`), status: 412, code: "stale", has: []string{`"version":5`}},
		{name: "purge", method: "DELETE", path: one + "?purge=true", token: admin, header: ifMatch(`"5"`), status: 204},
		{name: "nothing to restore", method: "POST", path: one + "/restore", token: member, status: 404},
	} {
		t.Run(sc.name, func(t *testing.T) { st.do(t, sc) })
	}
}

func TestRecordLists(t *testing.T) {
	st, _, member, viewer := withDeals(t)
	for i := range 7 {
		stage := []string{"won", "lost"}[i%2]
		st.do(t, scenario{name: "create", method: "POST", path: deals, token: member, body: fmt.Sprintf(`{"data":{"title":"t%d","amount":%d,"stage":%q}}`, i, i, stage), status: 201})
	}
	titles := func(a answer) (out []string) {
		for _, r := range a.get(t, "data").([]any) {
			out = append(out, r.(map[string]any)["data"].(map[string]any)["title"].(string))
		}
		return out
	}
	get := func(query string) answer {
		t.Helper()
		return st.do(t, scenario{name: query, path: deals + query, token: viewer, status: 200})
	}
	first := get("?limit=3&count=exact")
	require.Equal(t, []string{"t0", "t1", "t2"}, titles(first))
	require.EqualValues(t, 7, first.get(t, "page", "count"))
	require.Equal(t, true, first.get(t, "page", "has_more"))
	require.Nil(t, first.get(t, "page", "prev_cursor"))
	next := first.text(t, "page", "next_cursor")
	require.Contains(t, first.header.Get("Link"), `rel="next"`)
	require.Contains(t, first.header.Get("Link"), url.QueryEscape(next))
	second := get("?limit=3&cursor=" + next)
	require.Equal(t, []string{"t3", "t4", "t5"}, titles(second))
	third := get("?limit=3&cursor=" + second.text(t, "page", "next_cursor"))
	require.Equal(t, []string{"t6"}, titles(third))
	require.Equal(t, false, third.get(t, "page", "has_more"))
	require.Nil(t, third.get(t, "page", "next_cursor"))
	require.Equal(t, []string{"t3", "t4", "t5"}, titles(get("?limit=3&cursor="+third.text(t, "page", "prev_cursor"))))
	require.Equal(t, []string{"t6", "t5"}, titles(get("?limit=2&sort=-id")))
	filter := url.QueryEscape(`stage = "lost"`)
	lost := get("?limit=2&filter=" + filter)
	require.Equal(t, []string{"t1", "t3"}, titles(lost))
	only := get("?fields=title&limit=1")
	require.NotContains(t, only.body, "amount")
	empty := get("?filter=" + url.QueryEscape(`title = "none"`))
	require.Equal(t, []any{}, empty.get(t, "data"))

	cursor := lost.text(t, "page", "next_cursor")
	for _, sc := range []scenario{
		{name: "without its filter", path: "?cursor=" + cursor, code: "cursor_mismatch"},
		{name: "with another filter", path: "?cursor=" + cursor + "&filter=" + url.QueryEscape(`stage = "won"`), code: "cursor_mismatch"},
		{name: "with another order", path: "?sort=-id&cursor=" + next, code: "cursor_mismatch"},
		{name: "made up", path: "?cursor=abc", code: "cursor_mismatch"},
		{name: "limit 0", path: "?limit=0", has: []string{`"parameter":"limit"`}},
		{name: "limit 1001", path: "?limit=1001", has: []string{`"parameter":"limit"`}},
		{name: "limit text", path: "?limit=many"},
		{name: "limit empty", path: "?limit="},
		{name: "sort", path: "?sort=amount", has: []string{`"parameter":"sort"`}},
		{name: "count", path: "?count=estimate", has: []string{`"parameter":"count"`}},
		{name: "unknown field", path: "?fields=title,nope", has: []string{`"parameter":"fields"`}},
		{name: "unknown parameter", path: "?filtre=x", code: "unknown_parameter"},
		{name: "filter field", path: "?filter=" + url.QueryEscape(`nope = "x"`), has: []string{`"parameter":"filter"`}},
		{name: "filter syntax", path: "?filter=" + url.QueryEscape(`stage ~ "x"`), has: []string{`"parameter":"filter"`}},
		{name: "filter type", path: "?filter=" + url.QueryEscape(`amount = "x"`), has: []string{`"parameter":"filter"`}},
		{name: "twice", path: "?limit=1&limit=2", code: "duplicate_parameter"},
	} {
		t.Run(sc.name, func(t *testing.T) {
			sc.path, sc.token, sc.status, sc.hasNot = deals+sc.path, viewer, 400, []string{`"data":`}
			st.do(t, sc)
		})
	}
	// A cursor of one tenant is of no use with another, though pipeline and filter have the same names there.
	globex := st.login(t, "globex.localhost", adminMail)
	st.do(t, scenario{name: "pipeline", method: "POST", host: "globex.localhost", path: "/api/v1/pipelines", token: globex, body: createDeals, status: 201})
	st.do(t, scenario{name: "another tenant's", host: "globex.localhost", path: deals + "?limit=3&cursor=" + next, token: globex, status: 400, code: "cursor_mismatch"})
	st.do(t, scenario{name: "globex has none", host: "globex.localhost", path: deals, token: globex, status: 200, hasNot: []string{"t0", "t1"}})
}

func TestABackwardPageKnowsWhatHasGone(t *testing.T) {
	st, _, member, viewer := withDeals(t)
	var ids []string
	for i := range 4 {
		ids = append(ids, st.do(t, scenario{name: "create", method: "POST", path: deals, token: member, body: fmt.Sprintf(`{"data":{"title":"t%d"}}`, i), status: 201}).text(t, "id"))
	}
	get := func(query string) answer {
		t.Helper()
		return st.do(t, scenario{name: query, path: deals + query, token: viewer, status: 200})
	}
	trash := func(i int) {
		t.Helper()
		st.do(t, scenario{name: "trash", method: "DELETE", path: deals + "/" + ids[i], token: member, status: 200})
	}
	second := get("?limit=2&cursor=" + get("?limit=2").text(t, "page", "next_cursor"))
	back := "?limit=2&cursor=" + second.text(t, "page", "prev_cursor")
	a := get(back)
	require.Equal(t, true, a.get(t, "page", "has_more"))
	require.Contains(t, a.body, ids[1])

	trash(0)
	trash(1)
	a = get(back)
	require.Equal(t, []any{}, a.get(t, "data"))
	require.Equal(t, true, a.get(t, "page", "has_more"))
	require.Nil(t, a.get(t, "page", "prev_cursor"))
	a = get("?limit=2&cursor=" + a.text(t, "page", "next_cursor"))
	require.Contains(t, a.body, ids[2])
	require.Contains(t, a.body, ids[3])
	require.Nil(t, a.get(t, "page", "prev_cursor"))

	trash(2)
	trash(3)
	a = get(back)
	require.Equal(t, []any{}, a.get(t, "data"))
	require.Equal(t, false, a.get(t, "page", "has_more"))
	require.Nil(t, a.get(t, "page", "next_cursor"))
}

func TestPipelines(t *testing.T) {
	st, admin, member, _ := withDeals(t)
	const p = "/api/v1/pipelines"
	for _, sc := range []scenario{
		{name: "member lists", path: p, token: member, status: 200, has: []string{`"deals"`}},
		{name: "member makes", method: "POST", path: p, token: member, body: `{"key":"x"}`, status: 403},
		{name: "member changes", method: "PATCH", path: p + "/deals", token: member, header: ifMatch(`"1"`), body: `{"name":"x"}`, status: 403},
		{name: "key is taken", method: "POST", path: p, token: admin, body: `{"key":"deals"}`, status: 409},
		{name: "bad key", method: "POST", path: p, token: admin, body: `{"key":"Deals"}`, status: 422, has: []string{`"/key"`}},
		{name: "unknown within", method: "POST", path: p, token: admin, body: `{"key":"y","fields":[{"key":"a","typ":"text"}]}`, status: 400, has: []string{`"/fields/0/typ"`}},
		{name: "huge number", method: "POST", path: p, token: admin, body: `{"key":"y","metadata":{"n":1e131000}}`, status: 422, has: []string{`"/metadata/n"`}},
		{name: "bad type", method: "POST", path: p, token: admin, body: `{"key":"y","fields":[{"key":"a","type":"money"}]}`, status: 422},
		{name: "no version", method: "PATCH", path: p + "/deals", token: admin, body: `{"name":"x"}`, status: 428},
		{name: "null", method: "PATCH", path: p + "/deals", token: admin, header: ifMatch(`"1"`), body: `{"name":null}`, status: 422, has: []string{`"/name"`}},
		{name: "key is fixed", method: "PATCH", path: p + "/deals", token: admin, header: ifMatch(`"1"`), body: `{"key":"x"}`, status: 400, code: "unknown_member"},
		{name: "change", method: "PATCH", path: p + "/deals", token: admin, header: map[string]string{"If-Match": `"1"`, "Content-Type": "application/merge-patch+json"},
			body: `{"name":"All deals","metadata":{"color":"red"}}`, status: 200, has: []string{"All deals", `"color"`}},
		{name: "stale", method: "PATCH", path: p + "/deals", token: admin, header: ifMatch(`"1"`), body: `{"name":"x"}`, status: 412},
		{name: "add a field", method: "POST", path: p + "/deals/fields", token: admin, body: `{"key":"closed","type":"date"}`, status: 201},
		{name: "add a field to another version", method: "POST", path: p + "/deals/fields", token: admin, header: ifMatch(`"2"`), body: `{"key":"late","type":"date"}`, status: 412, code: "stale",
			has: []string{`"current"`, `"closed"`}},
		{name: "field twice", method: "POST", path: p + "/deals/fields", token: admin, body: `{"key":"closed","type":"date"}`, status: 409},
		{name: "change a field", method: "PATCH", path: p + "/deals/fields/closed", token: admin, body: `{"name":"Closed on"}`, status: 200, has: []string{"Closed on"}},
		{name: "change a field of another version", method: "PATCH", path: p + "/deals/fields/closed", token: admin, header: ifMatch(`"3"`), body: `{"name":"x"}`, status: 412, code: "stale"},
		{name: "change a field of this version", method: "PATCH", path: p + "/deals/fields/closed", token: admin, header: ifMatch(`"4"`), body: `{"name":"Closed at"}`, status: 200},
		{name: "remove a field of another version", method: "DELETE", path: p + "/deals/fields/closed", token: admin, header: ifMatch(`"4"`), status: 412, code: "stale"},
		{name: "a field's type is fixed", method: "PATCH", path: p + "/deals/fields/closed", token: admin, body: `{"type":"text"}`, status: 400},
		{name: "remove a field", method: "DELETE", path: p + "/deals/fields/closed", token: admin, status: 204},
		{name: "no such field", method: "DELETE", path: p + "/deals/fields/closed", token: admin, status: 404},
		{name: "show", path: p + "/deals", token: member, status: 200, hasNot: []string{"closed"}},
		{name: "no such pipeline", path: p + "/nope", token: member, status: 404},
		{name: "a record", method: "POST", path: deals, token: member, body: `{"data":{"title":"x"}}`, status: 201},
		{name: "not empty", method: "DELETE", path: p + "/deals", token: admin, status: 409},
		{name: "another", method: "POST", path: p, token: admin, body: `{"key":"leads"}`, status: 201},
		{name: "delete another version", method: "DELETE", path: p + "/leads", token: admin, header: ifMatch(`"2"`), status: 412, code: "stale"},
		{name: "delete", method: "DELETE", path: p + "/leads", token: admin, header: ifMatch(`"1"`), status: 204},
	} {
		t.Run(sc.name, func(t *testing.T) { st.do(t, sc) })
	}
}

func TestUsers(t *testing.T) {
	st := open(t)
	admin, member := st.login(t, "acme.localhost", adminMail), st.login(t, "acme.localhost", memberMail)
	const u = "/api/v1/users"
	for _, method := range []string{http.MethodGet, http.MethodPost} {
		st.do(t, scenario{name: "member", method: method, path: u, token: member, body: map[string]string{"POST": `{"email":"x@example.com"}`}[method], status: 403})
	}
	before := st.users(t, st.globex)
	a := st.do(t, scenario{name: "add", method: "POST", path: u, token: admin, body: `{"email":"New@Example.com","name":"New","metadata":{"team":{"a":1}}}`, status: 201,
		has: []string{`"new@example.com"`, `"member"`}})
	id, generated := a.text(t, "id"), a.text(t, "password")
	require.GreaterOrEqual(t, len(generated), 20)
	require.Equal(t, before, st.users(t, st.globex), "another tenant's users")
	st.do(t, scenario{name: "the password works", method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":"new@example.com","password":%q}`, generated), status: 200})
	st.do(t, scenario{name: "and only here", method: "POST", host: "globex.localhost", path: "/api/v1/auth/login",
		body: fmt.Sprintf(`{"email":"new@example.com","password":%q}`, generated), status: 401})
	for _, sc := range []scenario{
		{name: "twice", method: "POST", path: u, body: `{"email":"new@example.com"}`, status: 409, code: "user_exists"},
		{name: "address", method: "POST", path: u, body: `{"email":"nobody"}`, status: 422, has: []string{`"/email"`}},
		{name: "role", method: "POST", path: u, body: `{"email":"r@example.com","role":"root"}`, status: 422, has: []string{`"/role"`}},
		{name: "short password", method: "POST", path: u, body: `{"email":"r@example.com","password":"short"}`, status: 422, has: []string{`"/password"`}},
		{name: "metadata", method: "POST", path: u, body: `{"email":"r@example.com","metadata":[1]}`, status: 422, has: []string{`"/metadata"`}},
		{name: "show", path: u + "/" + id, status: 200, headers: map[string]string{"Etag": `"1"`}},
		{name: "patch without a version", method: "PATCH", path: u + "/" + id, body: `{"name":"N"}`, status: 428},
		{name: "patch", method: "PATCH", path: u + "/" + id, header: ifMatch(`"1"`), body: `{"name":"Newer","metadata":{"team":{"b":2}}}`, status: 200,
			has: []string{"Newer", `"a":1`, `"b":2`}, headers: map[string]string{"Etag": `"2"`}},
		{name: "merge away", method: "PATCH", path: u + "/" + id, header: ifMatch(`"2"`), body: `{"metadata":{"team":null}}`, status: 200, hasNot: []string{"team"}},
		{name: "stale", method: "PATCH", path: u + "/" + id, header: ifMatch(`"2"`), body: `{"name":"x"}`, status: 412, has: []string{`"current"`}},
		{name: "address is fixed", method: "PATCH", path: u + "/" + id, header: ifMatch(`"3"`), body: `{"email":"x@example.com"}`, status: 400},
		{name: "set a weak password", method: "POST", path: u + "/" + id + "/set-password", body: `{"password":"new@example.com"}`, status: 422},
		{name: "nobody", path: u + "/00000000-0000-0000-0000-000000000000", status: 404, code: "unknown_user"},
		{name: "disable", method: "POST", path: u + "/" + id + "/disable", status: 200, has: []string{"disabled_at"}},
		{name: "disabled cannot log in", method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":"new@example.com","password":%q}`, generated), status: 401, code: "login_failed"},
		{name: "enable", method: "POST", path: u + "/" + id + "/enable", status: 200, hasNot: []string{"disabled_at"}},
		{name: "enabled logs in", method: "POST", path: "/api/v1/auth/login", body: fmt.Sprintf(`{"email":"new@example.com","password":%q}`, generated), status: 200},
	} {
		t.Run(sc.name, func(t *testing.T) {
			if !strings.HasSuffix(sc.path, "/login") {
				sc.token = admin
			}
			st.do(t, sc)
		})
	}
	self := st.do(t, scenario{name: "me", path: "/api/v1/me", token: admin, status: 200}).text(t, "user", "id")
	st.do(t, scenario{name: "the last administrator", method: "POST", path: u + "/" + self + "/disable", token: admin, status: 409, code: "last_admin"})

	page := st.do(t, scenario{name: "list", path: u + "?limit=3", token: admin, status: 200})
	cursor := page.text(t, "page", "next_cursor")
	rest := st.do(t, scenario{name: "rest", path: u + "?limit=3&cursor=" + cursor, token: admin, status: 200, has: []string{"new@example.com"}})
	require.Equal(t, false, rest.get(t, "page", "has_more"))
	globex := st.login(t, "globex.localhost", adminMail)
	st.do(t, scenario{name: "elsewhere", host: "globex.localhost", path: u + "?cursor=" + cursor, token: globex, status: 400, code: "cursor_mismatch"})
	st.do(t, scenario{name: "an id of another tenant", host: "globex.localhost", path: u + "/" + id, token: globex, status: 404})
}

func TestSettings(t *testing.T) {
	st := open(t)
	other := st.again(t)
	admin, member := st.login(t, "acme.localhost", adminMail), st.login(t, "acme.localhost", memberMail)
	const p = "/api/v1/settings"
	st.do(t, scenario{name: "empty", path: p, status: 200, has: []string{`{"public":{}}`}})
	st.do(t, scenario{name: "member", method: "PATCH", path: p, token: member, body: `{"a":1}`, status: 403})
	st.do(t, scenario{name: "anonymous", method: "PATCH", path: p, body: `{"a":1}`, status: 401})
	st.do(t, scenario{name: "set", method: "PATCH", path: p, token: admin, body: `{"public":{"color":"red"},"smtp":{"host":"mail.internal"},"n":1.10}`, status: 200})
	for _, addr := range []string{st.addr, other} {
		st.doAt(t, addr, scenario{name: "anybody", path: p, status: 200, has: []string{"red"}, hasNot: []string{"mail.internal", "smtp"}})
		st.doAt(t, addr, scenario{name: "a stale cookie is nobody", path: p, cookie: "ons_" + strings.Repeat("A", 43), status: 200, hasNot: []string{"smtp"}})
		st.doAt(t, addr, scenario{name: "a wrong token is an error", path: p, token: "ons_" + strings.Repeat("A", 43), status: 401})
		st.doAt(t, addr, scenario{name: "signed in", path: p, token: member, status: 200, has: []string{"red", "mail.internal", "1.10"}})
		st.doAt(t, addr, scenario{name: "another tenant", host: "globex.localhost", path: p, status: 200, hasNot: []string{"red"}})
	}
	st.do(t, scenario{name: "merge", method: "PATCH", path: p, token: admin, body: `{"public":{"color":null,"logo":"x"}}`, status: 200, has: []string{"logo", "smtp"}, hasNot: []string{"red"}})
	st.doAt(t, other, scenario{name: "seen everywhere at once", path: p, status: 200, has: []string{"logo"}, hasNot: []string{"red"}})
	st.do(t, scenario{name: "no object", method: "PATCH", path: p, token: admin, body: `[1]`, status: 422})
	st.do(t, scenario{name: "huge number", method: "PATCH", path: p, token: admin, body: `{"public":[1e131000,1e131000]}`, status: 422, has: []string{`"/public/0"`}})
	st.do(t, scenario{name: "too large", method: "PATCH", path: p, token: admin, body: `{"x":"` + strings.Repeat("y", 70<<10) + `"}`, status: 413})
}
