package postgres_test

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
)

func setupOptions(env *pgtest.Env) postgres.SetupOptions {
	return postgres.SetupOptions{
		AdminURL: env.AdminURL, Group: env.Group, AppRole: "oneo_app", OwnerRole: "oneo_owner", Secret: pgtest.Secret, Logins: pgtest.Logins, KeepRoles: true,
	}
}

func TestSetupAgainChangesNothing(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	before, err := env.DB.Installation(t.Context(), "main")
	require.NoError(t, err)
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			o := setupOptions(env)
			o.Logins = 5 // fixed by the first
			inst, err := postgres.Setup(t.Context(), o)
			if err != nil || inst != before {
				t.Errorf("set up again: %+v, %v", inst, err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, "acme", value[string](t, env.DB, a, postgres.Single, `select current_schema()`))
	env.Invariants(t)
}

// `oneo dev` on a database that is there sets it up with the owner's own URL.
func TestSetupByTheOwnerItself(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	before, err := env.DB.Installation(t.Context(), "main")
	require.NoError(t, err)
	o := setupOptions(env)
	o.AdminURL, o.KeepRoles = env.Group.OwnerURL, false
	inst, err := postgres.Setup(t.Context(), o)
	require.NoError(t, err)
	require.Equal(t, before, inst)
	env.Tenant(t, "acme")
	env.Invariants(t)
}

func TestSetupRefuses(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	for code, change := range map[string]func(*postgres.SetupOptions){
		"superuser_role":     func(o *postgres.SetupOptions) { o.KeepRoles, o.OwnerRole = false, "postgres" },
		"other_installation": func(o *postgres.SetupOptions) { o.ID = "00000000" },
		"other_role":         func(o *postgres.SetupOptions) { o.AppRole = "another_app" },
		"no_secret":          func(o *postgres.SetupOptions) { o.Secret = "" },
		"bad_url":            func(o *postgres.SetupOptions) { o.AdminURL = "postgres://%zz" },
	} {
		o := setupOptions(env)
		change(&o)
		_, err := postgres.Setup(t.Context(), o)
		require.Errorf(t, err, code)
		require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
	}
	o := setupOptions(env)
	o.KeepRoles, o.AppRole = false, "postgres"
	_, err := postgres.Setup(t.Context(), o)
	require.Error(t, err, "the app role must not be a superuser")
}

func TestNotInitialised(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	admin(t, env, `drop table public.installation`)
	db, _, _ := env.Open(t)
	_, err := db.Installation(t.Context(), "main")
	requireFault(t, err, fault.Pending, "not_initialised")
	require.Contains(t, fault.Of(err).Hint, "oneo init")
}

// Two groups by name: each tenant's work goes to its own database.
func TestGroupsByName(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	db, m, p := env.Open(t, func(o *postgres.Options) { o.Groups = map[string]postgres.Group{"main": env.Group, "second": second} })
	require.Equal(t, []string{"main", "second"}, db.Groups())
	_, err := m.Shared(t.Context())
	require.NoError(t, err)
	a := env.Tenant(t, "acme")
	b, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: "second", Actor: "test"})
	require.NoError(t, err)
	for range 3 {
		for _, access := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
			da := value[string](t, db, a, access, `select current_database()`)
			require.Equal(t, env.Database, da)
			require.NotEqual(t, da, value[string](t, db, b, access, `select current_database()`))
		}
	}
	moved := b
	moved.Group = "main"
	requireFault(t, try(t.Context(), db, moved, postgres.Read, `select 1`), fault.Gone, "tenant_gone")
	requireFault(t, try(t.Context(), env.DB, b, postgres.Read, `select 1`), fault.Invalid, "unknown_group")
	env.Invariants(t)
}
