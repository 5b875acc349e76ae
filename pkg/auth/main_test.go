package auth_test

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// place is one realm in a database of the test's own: a tenant's, or the administrators'.
type place struct {
	realm  *auth.Realm
	db     *postgres.DB
	tenant tenant.Tenant // zero: the administrators
	tables *strings.Replacer
	env    *pgtest.Env
}

// places runs the test in both realms of one installation.
func places(t *testing.T, test func(*testing.T, place)) {
	env := install(t)
	t.Run("tenant", func(t *testing.T) { test(t, inTenant(env, env.Tenant(t, "acme"))) })
	t.Run("administrator", func(t *testing.T) {
		test(t, place{realm: auth.Administrators(), db: env.DB, env: env, tables: strings.NewReplacer("{users}", "public.administrators",
			"{sessions}", "public.administrator_sessions", "{keys}", "public.administrator_keys")})
	})
}

// install allows a tenant several transactions at once, and a transaction to wait for another that a test holds.
func install(t *testing.T) *pgtest.Env {
	t.Helper()
	return pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight, o.LockTimeout = 8, 3, 10*time.Second })
}

func inTenant(env *pgtest.Env, tn tenant.Tenant) place {
	return place{realm: auth.Tenants(), db: env.DB, env: env, tenant: tn,
		tables: strings.NewReplacer("{users}", "users", "{sessions}", "sessions", "{keys}", "api_keys")}
}

func (p place) in(ctx context.Context, a postgres.Access, fn func(postgres.Querier) error) error {
	run := func(tx *postgres.Tx) error { return fn(tx) }
	if p.tenant.IsZero() {
		return p.db.InShared(ctx, a, run)
	}
	return p.db.InTenant(ctx, p.tenant, a, run)
}

func (p place) write(t *testing.T, fn func(postgres.Querier) error) error {
	t.Helper()
	return p.in(t.Context(), postgres.Write, fn)
}

// must writes what the test takes for granted.
func (p place) must(t *testing.T, fn func(postgres.Querier) error) {
	t.Helper()
	require.NoError(t, p.write(t, fn))
}

// sql runs a statement on the realm's tables: {users}, {sessions} and {keys}.
func (p place) sql(t *testing.T, sql string, args ...any) {
	t.Helper()
	p.must(t, func(q postgres.Querier) error {
		_, err := q.Exec(t.Context(), p.tables.Replace(sql), args...)
		return err
	})
}

func value[T any](t *testing.T, p place, sql string, args ...any) T {
	t.Helper()
	var v T
	require.NoError(t, p.in(t.Context(), postgres.Read, func(q postgres.Querier) error {
		return q.QueryRow(t.Context(), p.tables.Replace(sql), args...).Scan(&v)
	}))
	return v
}

// One hash serves all users: each takes 19 MiB and tens of milliseconds.
var hashed = sync.OnceValues(func() (string, error) { return auth.NewHasher(1).Hash(context.Background(), password) })

func hash(t *testing.T) string {
	t.Helper()
	h, err := hashed()
	require.NoError(t, err)
	return h
}

func (p place) add(t *testing.T, email, role string) auth.User {
	t.Helper()
	var u auth.User
	p.must(t, func(q postgres.Querier) (err error) {
		u, err = p.realm.AddUser(t.Context(), q, auth.NewUser{Email: email, Role: role, PasswordHash: hash(t)})
		return err
	})
	return u
}

func (p place) credential(t *testing.T, email string) auth.Credential {
	t.Helper()
	var c auth.Credential
	require.NoError(t, p.in(t.Context(), postgres.Single, func(q postgres.Querier) (err error) {
		c, err = p.realm.Credential(t.Context(), q, email)
		return err
	}))
	return c
}

func (p place) start(t *testing.T, c auth.Credential) (token string, expires time.Time, err error) {
	t.Helper()
	err = p.write(t, func(q postgres.Querier) (err error) {
		token, expires, err = p.realm.StartSession(t.Context(), q, c, auth.DefaultSessionOptions())
		return err
	})
	return token, expires, err
}

func (p place) login(t *testing.T, email string) string {
	t.Helper()
	token, _, err := p.start(t, p.credential(t, email))
	require.NoErrorf(t, err, "log %s in", email)
	return token
}

// who authenticates as a server does: one reading statement.
func (p place) who(t *testing.T, token string) (i auth.Identity, err error) {
	t.Helper()
	err = p.in(t.Context(), postgres.Single, func(q postgres.Querier) (err error) {
		i, err = p.realm.Authenticate(t.Context(), q, token, auth.DefaultSessionOptions().Idle)
		return err
	})
	return i, err
}

func (p place) key(t *testing.T, u auth.User, scopes ...string) (k auth.Key, token string) {
	t.Helper()
	p.must(t, func(q postgres.Querier) (err error) {
		k, token, err = p.realm.AddKey(t.Context(), q, u.ID, "ci", scopes, nil)
		return err
	})
	return k, token
}

// requireUnknown: nothing but that it is not valid may be learned of a token.
func (p place) requireUnknown(t *testing.T, token, why string) {
	t.Helper()
	i, err := p.who(t, token)
	requireFault(t, err, "unauthenticated", "unauthenticated")
	require.Equalf(t, "log in first, or send a valid token", err.Error(), "%s: one message for all", why)
	require.Truef(t, i.IsZero(), "%s: an identity and an error", why)
	require.Emptyf(t, i.TokenHash, "%s: an identity and an error", why)
}

// blocked waits until a transaction of this database waits for a lock.
func (p place) blocked(t *testing.T) {
	t.Helper()
	c := pgtest.Admin(t, p.env.AdminURL)
	until(t, "a transaction waits for a lock", func() bool {
		var n int
		require.NoError(t, c.QueryRow(t.Context(),
			`select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n))
		return n > 0
	})
}

// until polls for what must become true.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(pgtest.Patience)
	for !ok() {
		require.Truef(t, time.Now().Before(deadline), "waited in vain: %s", what)
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
	}
}
