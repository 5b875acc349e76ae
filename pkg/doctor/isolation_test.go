package doctor_test

import (
	"context"
	"fmt"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// isolation is a proof about an installation, over one connection for each login.
func isolation(t *testing.T, env *pgtest.Env, by postgres.Isolation, change func(*postgres.Options)) doctor.IsolationOptions {
	t.Helper()
	o := doctor.IsolationOptions{DB: env.DB, Provision: env.Provision, Groups: env.DB.Groups(), Rounds: 60, Actor: "test",
		Say: func(format string, args ...any) { t.Logf(format, args...) }}
	o.Open = func() (*postgres.DB, error) {
		db, _, _ := env.Open(t, func(po *postgres.Options) {
			po.MaxConns, po.InFlight, po.Isolation = pgtest.Logins, 1, by
			change(po)
			o.Options = *po
		})
		return db, nil
	}
	_, err := o.Open()
	require.NoError(t, err)
	return o
}

// states are the answers by question.
func states(proofs []doctor.Proof) map[string]doctor.Status {
	m := map[string]doctor.Status{}
	for _, p := range proofs {
		if m[p.Check] != doctor.Fail {
			m[p.Check] = p.State
		}
	}
	return m
}

func requireGone(t *testing.T, env *pgtest.Env) {
	t.Helper()
	var left int
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select (select count(*) from public.placements) + (select count(*) from pg_namespace where nspname ~ 'probe|oneo_dropped')`).Scan(&left))
	require.Zero(t, left)
	env.Invariants(t)
}

// On a sound installation each question is answered, over a pooler as well, and nothing is left behind.
func TestIsolationHolds(t *testing.T) {
	t.Parallel()
	for _, by := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		for _, pooled := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s pooled %t", by, pooled), func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, func(o *postgres.Options) { o.Isolation = by })
				change := func(*postgres.Options) {}
				if pooled {
					addr := env.PgBouncer(t, 1)
					through := func(raw string) string {
						u, err := url.Parse(raw)
						require.NoError(t, err)
						u.Host = addr
						return u.String()
					}
					change = func(po *postgres.Options) {
						po.Statements = postgres.Unprepared
						po.Groups = map[string]postgres.Group{"main": {URL: through(env.Group.URL), OwnerURL: env.Group.OwnerURL, DirectURL: env.Group.OwnerURL}}
					}
				}
				o := isolation(t, env, by, change)
				redis, err := devstack.StartRedis(t.Context(), devstack.RedisOptions{Dir: t.TempDir()})
				require.NoError(t, err)
				t.Cleanup(func() { _ = redis.Stop(context.WithoutCancel(t.Context())) })
				o.Cache, err = cache.Open(cache.Options{URL: redis.URL(), Timeout: pgtest.Patience})
				require.NoError(t, err)
				t.Cleanup(func() { _ = o.Cache.Close() })
				proofs, err := doctor.Isolation(t.Context(), o)
				require.NoError(t, err)
				want := map[string]doctor.Status{"reads": doctor.OK, "settings": doctor.OK, "cursors": doctor.OK, "prepared statements": doctor.OK,
					"temporary tables": doctor.OK, "session locks": doctor.OK, "other schemas": doctor.OK, "roles": doctor.OK, "writes": doctor.OK,
					"sessions": doctor.OK, "caches": doctor.OK, "a careless client": doctor.OK}
				if by == postgres.BySchema {
					want["other schemas"] = doctor.Warn
				}
				require.Equal(t, want, states(proofs), "%v", proofs)
				requireGone(t, env)
				for k := range pgtest.Logins { // nothing is left on a pooler's connections either
					u, err := url.Parse(o.Options.Groups["main"].URL)
					require.NoError(t, err)
					u.User = url.User(postgres.LoginName("oneo_app", k))
					cfg, err := pgx.ParseConfig(u.String())
					require.NoError(t, err)
					cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
					c, err := pgx.ConnectConfig(t.Context(), cfg)
					require.NoError(t, err)
					var path string
					require.NoError(t, c.QueryRow(t.Context(), `select current_setting('search_path')`).Scan(&path))
					require.Equal(t, `""`, path)
					require.NoError(t, c.Close(t.Context()))
				}
			})
		}
	}
}

// What leaks is found and said: work that is bound to the wrong tenant, rights that one role has in another's schema, a role that is more than a tenant's.
func TestIsolationThatLeaks(t *testing.T) {
	t.Parallel()
	t.Run("binding", func(t *testing.T) {
		t.Parallel()
		env := pgtest.New(t)
		o := isolation(t, env, postgres.ByRole, func(*postgres.Options) {})
		db, err := o.Open()
		require.NoError(t, err)
		var n atomic.Int64
		var last atomic.Pointer[tenant.Tenant]
		o.InTenant = func(ctx context.Context, tn tenant.Tenant, a postgres.Access, fn func(*postgres.Tx) error) error {
			before := last.Swap(&tn)
			if n.Add(1)%7 == 0 && before != nil { // the connection was not bound anew
				tn = *before
			}
			return db.InTenant(ctx, tn, a, fn)
		}
		o.Rounds = 200
		proofs, err := doctor.Isolation(t.Context(), o)
		require.NoError(t, err)
		require.Equal(t, doctor.Fail, states(proofs)["reads"])
		require.Equal(t, doctor.Fail, states(proofs)["writes"])
		requireGone(t, env)
	})
	for what, c := range map[string]struct{ sql, check string }{
		"rights": {`do $$ declare r record; begin for r in select schema from public.placements loop
execute format('grant usage on schema %I to public; grant select on all tables in schema %I to public', r.schema, r.schema); end loop; end $$`, "other schemas"},
		"member": {`do $$ declare r record; begin for r in select a.role as one, b.role as other from public.placements a, public.placements b where a.number < b.number loop
execute format('grant %I to %I', r.other, r.one); end loop; end $$`, "roles"},
		"strong": {`do $$ declare r record; begin for r in select role from public.placements loop execute format('alter role %I bypassrls', r.role); end loop; end $$`, "roles"},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t)
			o := isolation(t, env, postgres.ByRole, func(*postgres.Options) {})
			db, err := o.Open()
			require.NoError(t, err)
			var planted atomic.Bool
			o.InTenant = func(ctx context.Context, tn tenant.Tenant, a postgres.Access, fn func(*postgres.Tx) error) error {
				if planted.CompareAndSwap(false, true) { // both tenants are there
					if _, err := pgtest.Admin(t, env.AdminURL).PgConn().Exec(ctx, c.sql).ReadAll(); err != nil {
						return err
					}
				}
				return db.InTenant(ctx, tn, a, fn)
			}
			proofs, err := doctor.Isolation(t.Context(), o)
			require.NoError(t, err)
			require.Equal(t, doctor.Fail, states(proofs)[c.check], "%v", proofs)
			requireGone(t, env)
		})
	}
}

// A run that is cut short takes its tenants away all the same; what a killed one has left goes with a later run, but not what another one may be using.
func TestIsolationLeavesNothing(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	o := isolation(t, env, postgres.ByRole, func(*postgres.Options) {})
	ctx, cancel := context.WithCancel(t.Context())
	o.InTenant = func(context.Context, tenant.Tenant, postgres.Access, func(*postgres.Tx) error) error {
		cancel()
		return ctx.Err()
	}
	_, err := doctor.Isolation(ctx, o)
	require.ErrorIs(t, err, context.Canceled)
	requireGone(t, env)

	admin := pgtest.Admin(t, env.AdminURL)
	for _, slug := range []string{"probe-0123abcd-a", "probe-0123abcd-b", "probe-89ab4567-a", "probe-0123abcd-c"} {
		_, err := env.Provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, slug), Name: "oneo doctor isolation: may be dropped", Actor: "test"})
		require.NoError(t, err)
	}
	_, err = admin.Exec(t.Context(), `update public.tenants set created_at = now() - interval '2 h', name = case slug when 'probe-0123abcd-b' then 'a customer' else name end where slug like 'probe-0123abcd-%'`)
	require.NoError(t, err)
	_, err = env.Provision.Drop(t.Context(), pgtest.Slug(t, "probe-0123abcd-a"), time.Hour, "test")
	require.NoError(t, err)
	o.InTenant = nil
	_, err = doctor.Isolation(t.Context(), o)
	require.NoError(t, err)
	var left string
	require.NoError(t, admin.QueryRow(t.Context(), `select string_agg(slug, ' ' order by slug) from public.tenants where state <> 'purged'`).Scan(&left))
	require.Equal(t, "probe-0123abcd-b probe-0123abcd-c probe-89ab4567-a", left)
}
