package server

import (
	"context"
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// kindsOf reads the kinds that package fault declares from its source, so that a new one cannot be forgotten here.
func kindsOf(t *testing.T) []fault.Kind {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../fault/fault.go", nil, 0)
	require.NoError(t, err)
	var kinds []fault.Kind
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			if name, ok := v.Type.(*ast.Ident); !ok || name.Name != "Kind" {
				continue
			}
			text, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			require.NoError(t, err)
			kinds = append(kinds, fault.Kind(text))
		}
	}
	require.NotEmpty(t, kinds, "no constants of type Kind were found in ../fault/fault.go")
	return kinds
}

func TestEveryKindOfFaultHasAStatus(t *testing.T) {
	for _, k := range kindsOf(t) {
		_, ok := statuses[k]
		require.True(t, ok, "fault kind %q has no HTTP status; add it to statuses", k)
	}
	require.Len(t, statuses, len(kindsOf(t)), "statuses has kinds that fault does not declare")
}

func TestProblemsTellOnlyWhatAStrangerMayKnow(t *testing.T) {
	secret := errors.New(`ERROR: relation "t_acme.users" does not exist at 10.0.0.7:5432/oneo (SQLSTATE 42P01)`)
	for _, tc := range []struct {
		name   string
		err    error
		status int
		code   string
		has    string
	}{
		{"plain error", secret, 500, "internal", "request id"},
		{"internal fault", fault.Wrap(secret, fault.Internal, "t_acme.users is broken").WithCode("t_acme"), 500, "internal", "request id"},
		{"unavailable", fault.Wrap(secret, fault.Unavailable, "PostgreSQL at 10.0.0.7:5432/oneo cannot be reached").
			WithCode("database_unreachable").WithHint("t_acme"), 503, "database_unreachable", "try again"},
		{"not set up", fault.Wrap(secret, fault.Pending, "the login oneo_app_1 has a search path of its own").WithCode("search_path").
			WithHint("run `oneo init`, which sets it empty"), 503, "unavailable", "try again"},
		{"a migration at the table", fault.Wrap(secret, fault.Locked, "another transaction holds a lock on this").WithCode("lock_timeout"), 503, "lock_timeout", "try again"},
		{"deadline", context.DeadlineExceeded, 503, "timeout", "too long"},
		{"not found", fault.Wrap(secret, fault.NotFound, "there is no such record"), 404, "not_found", "no such record"},
		{"unknown outcome", fault.Wrap(secret, fault.Unavailable, "the change may or may not have been made").WithCode("outcome_unknown").WithRetry(time.Second),
			503, "outcome_unknown", "may or may not"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, header := problemOf(tc.err, "req-1", "/api")
			body := string(p.body())
			require.Equal(t, tc.status, p.Status, body)
			require.Equal(t, tc.code, p.Code, body)
			require.Contains(t, body, tc.has)
			require.Contains(t, body, `"request_id":"req-1"`)
			for _, leak := range []string{"t_acme", "10.0.0.7", "SQLSTATE", "42P01", "relation", "oneo_app", "oneo init", "search_path"} {
				require.NotContains(t, body, leak)
			}
			require.True(t, json.Valid([]byte(body)), body)
			if tc.code == "outcome_unknown" {
				require.Empty(t, header.Values("Retry-After"), "nobody is asked to repeat what may have been done")
			} else if tc.status == 503 {
				require.NotEmpty(t, header.Get("Retry-After"))
			}
		})
	}
}

func TestProblemCarriesFieldsAndDetails(t *testing.T) {
	err := fault.New(fault.Stale, "somebody was faster").WithField(fault.Field{Pointer: "/a", Code: "x", Detail: "y"}).
		WithDetails(map[string]any{"current": map[string]int{"version": 8}})
	p, _ := problemOf(err, "req-1", "/x")
	require.JSONEq(t, `{"type":"urn:oneo:problem:stale","title":"Precondition Failed","status":412,"detail":"somebody was faster",
		"instance":"/x","code":"stale","request_id":"req-1","errors":[{"pointer":"/a","code":"x","detail":"y"}],"current":{"version":8}}`, string(p.body()))
	p, header := problemOf(fault.New(fault.Busy, "slow down").WithRetry(1500*time.Millisecond), "r", "/")
	require.Equal(t, 429, p.Status)
	require.Equal(t, "2", header.Get("Retry-After"), "a wait is rounded up to whole seconds")
	p, header = problemOf(fault.New(fault.Unauthenticated, "who are you?"), "r", "/")
	require.Equal(t, 401, p.Status)
	require.Contains(t, header.Get("WWW-Authenticate"), "Bearer")
}

func TestCheckJSON(t *testing.T) {
	for _, tc := range []struct{ name, body, code, pointer string }{
		{"object", `{"a":{"b":[1,2,{"c":null}]},"d":"é\u00e9\ud83d\ude00"}`, "", ""},
		{"escaped backslash", `{"a":"\\ud800"}`, "", ""},
		{"duplicate", `{"a":1,"a":2}`, "duplicate_name", "/a"},
		{"duplicate within", `{"x":[{"a~b":1,"a~b":2}]}`, "duplicate_name", "/x/0/a~0b"},
		{"same name elsewhere", `{"x":{"a":1},"y":{"a":1}}`, "", ""},
		{"trailing", `{"a":1} {"b":2}`, "malformed_json", ""},
		{"truncated", `{"a":`, "malformed_json", ""},
		{"comma", `{"a":1,}`, "malformed_json", ""},
		{"array comma", `[1,]`, "malformed_json", ""},
		{"missing comma", `[1 2]`, "malformed_json", ""},
		{"mismatched", `{"a":[1}`, "malformed_json", ""},
		{"bare word", `nonsense`, "malformed_json", ""},
		{"invalid UTF-8", "{\"a\":\"\xff\"}", "malformed_json", ""},
		{"lone high surrogate", `{"a":"\ud800"}`, "malformed_json", ""},
		{"lone low surrogate", `{"a":"x\udc00"}`, "malformed_json", ""},
		{"high then other", `{"a":"\ud800\u0041"}`, "malformed_json", ""},
		{"NUL", `{"a":{"b":"x\u0000y"}}`, "value", "/a/b"},
		{"NUL name", `{"a\u0000":1}`, "value", ""},
		{"numbers", `{"a":[1,-2.50,1e999,1E-9]}`, "", ""},
		{"huge exponent", `{"public":[1,1e131000]}`, "value", "/public/1"},
		{"huge negative exponent", `{"metadata":{"a":1e-131000}}`, "value", "/metadata/a"},
		{"long number", `[` + strings.Repeat("9", 101) + `]`, "value", "/0"},
		{"exponents together", `[` + strings.Repeat("1e999,", 66) + `1]`, "value", "/65"},
		{"deep", strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1), "malformed_json", ""},
		{"deep enough", strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := checkJSON([]byte(tc.body))
			if tc.code == "" {
				require.NoError(t, err)
				return
			}
			require.Error(t, err)
			f := fault.Of(err)
			require.Equal(t, tc.code, f.StableCode(), "%v", err)
			if tc.pointer != "" {
				require.Equal(t, tc.pointer, f.Fields[0].Pointer)
			}
		})
	}
}

func TestDecodeIsStrict(t *testing.T) {
	type inner struct {
		Key string `json:"key"`
	}
	type body struct {
		Name   string          `json:"name"`
		Age    int             `json:"age"`
		Fields []inner         `json:"fields"`
		More   *inner          `json:"more"`
		Free   json.RawMessage `json:"free"`
	}
	for _, tc := range []struct {
		name, body, code, pointer string
		kind                      fault.Kind
	}{
		{"fits", `{"name":"x","age":3,"fields":[{"key":"a"}],"more":null,"free":{"Key":[{"KEY":1}]}}`, "", "", ""},
		{"unknown", `{"nme":"x"}`, "unknown_member", "/nme", fault.Invalid},
		{"another case", `{"Name":"x"}`, "unknown_member", "/Name", fault.Invalid},
		{"unknown within", `{"name":"x","fields":[{"key":"a"},{"ky":"b"}]}`, "unknown_member", "/fields/1/ky", fault.Invalid},
		{"another case within", `{"fields":[{"key":"a"},{"key":"b","Key":"c"}]}`, "unknown_member", "/fields/1/Key", fault.Invalid},
		{"another case behind a pointer", `{"more":{"Key":"a"}}`, "unknown_member", "/more/Key", fault.Invalid},
		{"wrong type", `{"age":"three"}`, "value", "/age", fault.Unfit},
		{"no whole number", `{"age":1.5}`, "value", "/age", fault.Unfit},
		{"array", `[1]`, "value", "", fault.Unfit},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var into body
			err := decode([]byte(tc.body), &into)
			if tc.code == "" {
				require.NoError(t, err)
				require.Equal(t, body{"x", 3, []inner{{"a"}}, nil, json.RawMessage(`{"Key":[{"KEY":1}]}`)}, into)
				return
			}
			require.Error(t, err)
			f := fault.Of(err)
			require.Equal(t, tc.kind, f.Kind, "%v", err)
			require.Equal(t, tc.code, f.StableCode())
			require.Equal(t, tc.pointer, f.Fields[0].Pointer)
		})
	}
}

func TestReadBody(t *testing.T) {
	for _, tc := range []struct {
		name, contentType, body string
		kind                    bodyKind
		code                    string
	}{
		{"json", "application/json", `{}`, jsonBody, ""},
		{"charset", "application/json; charset=UTF-8", `{}`, jsonBody, ""},
		{"other charset", "application/json; charset=latin1", `{}`, jsonBody, "content_type"},
		{"form", "application/x-www-form-urlencoded", `a=b`, jsonBody, "content_type"},
		{"text", "text/plain", `{}`, jsonBody, "content_type"},
		{"no type", "", `{}`, jsonBody, "content_type"},
		{"patch", "application/merge-patch+json", `{}`, patchBody, ""},
		{"patch as json", "application/json", `{}`, patchBody, ""},
		{"json as patch", "application/merge-patch+json", `{}`, jsonBody, "content_type"},
		{"missing", "application/json", ``, jsonBody, "body_required"},
		{"optional", "", ``, optionalBody, ""},
		{"none wanted", "", ``, noBody, ""},
		{"none wanted, empty object", "application/json", `{}`, noBody, ""},
		{"none wanted, something", "application/json", `{"a":1}`, noBody, "unknown_member"},
		{"too large", "application/json", `{"a":"` + strings.Repeat("x", 100) + `"}`, jsonBody, "body_too_large"},
	} {
		for _, chunked := range []bool{false, true} {
			t.Run(tc.name+" chunked "+strconv.FormatBool(chunked), func(t *testing.T) {
				r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(tc.body))
				r.Header.Set("Content-Type", tc.contentType)
				if chunked {
					r.ContentLength = -1
				}
				_, err := readBody(r, httptest.NewRecorder(), tc.kind, 64)
				switch {
				case tc.code == "":
					require.NoError(t, err)
				case tc.code == "body_required" && chunked:
					require.Error(t, err)
				default:
					require.Error(t, err)
					require.Equal(t, tc.code, fault.Of(err).StableCode(), "%v", err)
				}
			})
		}
	}
}

func TestReadQueryIsStrict(t *testing.T) {
	for raw, code := range map[string]string{
		"": "", "limit=5": "", "cursor=a&limit=5": "",
		"limt=5": "unknown_parameter", "limit=5&limit=6": "duplicate_parameter", "limit=%zz": "malformed_query",
		"limit=5;cursor=3": "malformed_query", "cursor=%ff": "malformed_parameter", "cursor=a%00b": "malformed_parameter",
		"LIMIT=5": "unknown_parameter",
	} {
		_, err := readQuery(raw, []string{"limit", "cursor"})
		if code == "" {
			require.NoError(t, err, raw)
			continue
		}
		require.Error(t, err, raw)
		require.Equal(t, code, fault.Of(err).StableCode(), raw)
		require.Equal(t, fault.Invalid, fault.Of(err).Kind, raw)
	}
}

func TestCursorsServeOnlyWhatTheyWereMadeFor(t *testing.T) {
	c := newCursors([]byte("0123456789abcdef"))
	cursor, err := c.make([]string{"tenants", "a", "bc"}, "acme")
	require.NoError(t, err)
	var last string
	require.NoError(t, c.read([]string{"tenants", "a", "bc"}, cursor, &last))
	require.Equal(t, "acme", last)
	p, m, _ := strings.Cut(cursor, ".")
	for name, try := range map[string]func() error{
		"another scope": func() error { return c.read([]string{"tenants", "a", "bd"}, cursor, &last) },
		"parts shifted": func() error { return c.read([]string{"tenants", "ab", "c"}, cursor, &last) },
		"another secret": func() error {
			return newCursors([]byte("another secret..")).read([]string{"tenants", "a", "bc"}, cursor, &last)
		},
		"another payload":      func() error { return c.read([]string{"tenants", "a", "bc"}, "InoiCg."+m, &last) },
		"no signature":         func() error { return c.read([]string{"tenants", "a", "bc"}, p, &last) },
		"empty":                func() error { return c.read([]string{"tenants", "a", "bc"}, "", &last) },
		"a part too many":      func() error { return c.read([]string{"tenants", "a", "bc"}, cursor+".x", &last) },
		"not base64":           func() error { return c.read([]string{"tenants", "a", "bc"}, "*."+m, &last) },
		"signature cut":        func() error { return c.read([]string{"tenants", "a", "bc"}, cursor[:len(cursor)-4], &last) },
		"whitespace in base64": func() error { return c.read([]string{"tenants", "a", "bc"}, p+"\n."+m, &last) },
	} {
		last = "untouched"
		err := try()
		if name == "whitespace in base64" && err == nil {
			continue // the decoder ignores line ends; the signature is over what was decoded
		}
		require.Error(t, err, name)
		require.Equal(t, "cursor_mismatch", fault.Of(err).Code, name)
		require.Equal(t, "untouched", last, "%s: a refused cursor must not be read", name)
	}
}

func TestForwardedAddressesCountOnlyFromProxies(t *testing.T) {
	s := &Server{opts: Options{TrustedProxies: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}}
	for _, tc := range []struct{ peer, forwarded, want string }{
		{"192.0.2.1:1000", "198.51.100.7", "192.0.2.1"},
		{"10.1.1.1:1000", "198.51.100.7", "198.51.100.7"},
		{"10.1.1.1:1000", "6.6.6.6, 198.51.100.7, 10.2.2.2", "198.51.100.7"},
		{"10.1.1.1:1000", "", "10.1.1.1"},
		{"10.1.1.1:1000", "nonsense", "10.1.1.1"},
		{"[::ffff:10.1.1.1]:1000", "198.51.100.7", "198.51.100.7"},
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.RemoteAddr = tc.peer
		r.Header.Set("X-Forwarded-For", tc.forwarded)
		require.Equal(t, tc.want, s.clientOf(r, peerOf(r)).String(), "peer %s, X-Forwarded-For %q", tc.peer, tc.forwarded)
	}
	require.Equal(t, "2001-db8-1-2--", bucketOf(netip.MustParseAddr("2001:db8:1:2:3:4:5:6")), "IPv6 counts by /64")
	require.Equal(t, "192.0.2.1", bucketOf(netip.MustParseAddr("192.0.2.1")))
}

func TestRequestIDsAreHarmless(t *testing.T) {
	for given, kept := range map[string]bool{
		"abcdef-123456": true, "short": false, "": false, "with space here": false, "line\nbreak-here": false,
		strings.Repeat("a", 65): false, "semi;colon;here": false,
	} {
		r := httptest.NewRequest(http.MethodGet, "/", nil)
		r.Header["X-Request-Id"] = []string{given}
		require.Equal(t, kept, requestID(r) == given, "%q", given)
	}
}

func TestLocalLimiterRefillsAndSaysWhen(t *testing.T) {
	l := newLocalLimiter()
	defer l.buckets.StopAllGoroutines()
	r := Rate{Count: 2, Per: time.Hour}
	require.True(t, l.allow("a", r).Allowed)
	require.True(t, l.allow("a", r).Allowed)
	d := l.allow("a", r)
	require.False(t, d.Allowed, "the third of two an hour")
	require.InDelta(t, (30 * time.Minute).Seconds(), d.RetryAfter.Seconds(), 5)
	require.True(t, l.allow("b", r).Allowed, "another key has its own count")
}

// roomless are the routes that write and for which no tenant's room is asked.
var roomless = []string{
	// Who is in, and with what: a full tenant manages its people.
	"POST /api/v1/auth/login", "POST /api/v1/auth/logout", "POST /api/v1/me/password",
	"POST /api/v1/users", "PATCH /api/v1/users/:id", "POST /api/v1/users/:id/disable", "POST /api/v1/users/:id/enable",
	"POST /api/v1/users/:id/set-password", "POST /api/v1/users/:id/revoke-sessions", "POST /api/v1/sessions/revoke",
	"POST /api/v1/api-keys", "DELETE /api/v1/api-keys/:id",
	"PATCH /api/v1/settings", // one row of the shared tables, of at most a body's size
	// These give room back.
	"DELETE /api/v1/pipelines/:pipeline", "DELETE /api/v1/pipelines/:pipeline/fields/:field", "DELETE /api/v1/pipelines/:pipeline/records/:id",
	// The administration's are of no tenant's budget.
	"POST /api/v1/admin/tenants", "DELETE /api/v1/admin/tenants/:slug", "POST /api/v1/admin/tenants/:slug/purge",
	"POST /api/v1/admin/tenants/:slug/suspend", "POST /api/v1/admin/tenants/:slug/resume", "POST /api/v1/admin/tenants/:slug/undrop",
	"POST /api/v1/admin/tenants/:slug/domains", "DELETE /api/v1/admin/tenants/:slug/domains/:host", "POST /api/v1/admin/tenants/:slug/domains/:host/primary",
}

// A route that writes says what it takes of its tenant's budget, or is known to take nothing: who adds a route must decide.
func TestEveryRouteThatWritesSaysWhatItTakes(t *testing.T) {
	got := []string{}
	for _, rt := range new(Server).routes() {
		name := rt.method + " " + rt.path
		switch takes := rt.stores || rt.adds; {
		case rt.method == http.MethodGet:
			require.False(t, takes, "%s only reads: it takes no room", name)
		case rt.realm&tenantRealm == 0:
			require.False(t, takes, "%s is of no tenant, so that no budget is looked at", name)
			got = append(got, name)
		case !takes:
			got = append(got, name)
		}
	}
	require.ElementsMatch(t, roomless, got, "mark a route that takes room as stores or adds, and name one that takes none in roomless")
}
