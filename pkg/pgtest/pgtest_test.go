package pgtest_test

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func TestIsolation(t *testing.T) {
	t.Parallel()
	pgtest.Isolation(t, pgtest.New(t), pgtest.IsolationOptions{})
}

func TestIsolationBySchema(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.Isolation = postgres.BySchema })
	pgtest.Isolation(t, env, pgtest.IsolationOptions{Requests: 60})
}

func TestIsolationWithoutPreparedStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.Statements = postgres.Unprepared; o.MaxConns = 3 })
	pgtest.Isolation(t, env, pgtest.IsolationOptions{DB: env.DB, Requests: 60})
}

func TestEnvironmentsAreApart(t *testing.T) {
	t.Parallel()
	a, b := pgtest.New(t), pgtest.New(t)
	ta := a.Tenant(t, "acme")
	tb := b.Tenant(t, "acme")
	require.NotEqual(t, a.Database, b.Database)
	a.Invariants(t)
	b.Invariants(t)
	ia, err := a.DB.Installation(context.Background(), postgres.MainGroup)
	require.NoError(t, err)
	ib, err := b.DB.Installation(context.Background(), postgres.MainGroup)
	require.NoError(t, err)
	require.NotEqual(t, ia.TenantRole(ta.Number), ib.TenantRole(tb.Number), "roles are cluster-wide: two installations must not share one")
}

// The invariants must find what they are there for.
func TestBrokenFindsEachBreach(t *testing.T) {
	t.Parallel()
	for want, sql := range map[string]string{
		"has no placement":               `delete from public.ledger where set = 'tenant'; delete from public.placements`,
		"belongs to no placement":        `create schema stray`,
		"names a schema that is not":     `drop schema acme cascade; create schema acme`,
		"is active, its placement":       `update public.placements set state = 'suspended'`,
		"is at version":                  `delete from public.ledger where set = 'tenant' and version = 2`,
		"has no primary domain":          `update public.domains set is_primary = false`,
		"advisory lock (7302657, 99)":    `select pg_advisory_lock(7302657, 99)`,
		"role oneo_":                     `do $$ begin execute (select format('create role oneo_%s_999', id) from public.installation); end $$`,
		"names tenant 77, which has no":  `insert into public.ledger (set, tenant, version, name, checksum) select 'tenant', 77, 1, 'x', checksum from public.ledger limit 1`,
		"placement 88 has no tenant":     `insert into public.placements (number, schema, role, namespace, state) values (88, 'x', 'oneo_app', 0, 'active')`,
		"a connection rests in state id": `begin; select 1`,
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t)
			env.Tenant(t, "acme")
			env.Invariants(t)
			c := pgtest.Admin(t, env.AdminURL)
			_, err := c.PgConn().Exec(context.Background(), sql).ReadAll()
			require.NoError(t, err)
			found := pgtest.Broken(t, pgtest.Admin(t, env.AdminURL))
			require.NotEmptyf(t, found, "after %s", sql)
			hit := false
			for _, f := range found {
				hit = hit || strings.Contains(f, want)
			}
			require.Truef(t, hit, "after %s: want a sentence with %q, got %q", sql, want, found)
		})
	}
}

func TestFingerprint(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := context.Background()
	a, b := env.Tenant(t, "acme"), env.Tenant(t, "users")
	inst, err := env.DB.Installation(ctx, postgres.MainGroup)
	require.NoError(t, err)
	admin := pgtest.Admin(t, env.AdminURL)
	of := func(schema string, number int32) []string {
		return pgtest.Fingerprint(t, admin, schema, inst.TenantRole(number))
	}
	want := of("acme", a.Number)
	require.Equal(t, want, of("users", b.Number), "a schema named like a table must not disturb the fingerprint")
	for _, sql := range []string{
		`drop index users.records_live`, `alter table users.users add column x int`, `alter table users.users alter column name drop default`,
		`revoke select on users.users from ` + inst.TenantRole(b.Number), `alter table users.fields drop constraint fields_pipeline_id_fkey`,
		`alter table users.fields add foreign key (pipeline_id) references acme.pipelines`, `create view users.v as select id from users.users`,
	} {
		before := of("users", b.Number)
		_, err := admin.Exec(ctx, sql)
		require.NoError(t, err)
		require.NotEqualf(t, before, of("users", b.Number), "%s must show", sql)
	}
}
