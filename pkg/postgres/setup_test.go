package postgres_test

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/jackc/pgx/v5"
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

// The owner sees what other sessions do and may end them; whoever serves may neither, by itself or by any role that it can become.
func TestTheOwnerAloneSeesAndEndsSessions(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	inst, err := env.DB.Installation(t.Context(), "main")
	require.NoError(t, err)
	super := pgtest.Admin(t, env.AdminURL)
	has := func(role string, how string) (sight []string) {
		t.Helper()
		require.NoError(t, super.QueryRow(t.Context(), `select coalesce(array_agg(r order by r), '{}') from unnest($1::text[]) r where pg_has_role($2, r, $3)`,
			postgres.Sight, role, how).Scan(&sight))
		return sight
	}
	require.ElementsMatch(t, postgres.Sight, has("oneo_owner", "usage"))
	for _, role := range append(inst.LoginNames(), inst.AppRole, inst.TenantRole(acme.Number)) {
		require.Empty(t, has(role, "member"), role)
	}
	// Nor does it come to them with the work: the session of somebody else stays unseen and alive.
	other := pgtest.Admin(t, env.AdminURL)
	_, err = other.Exec(t.Context(), `select 'a secret'`)
	require.NoError(t, err)
	pid := int32(other.PgConn().PID()) //nolint:gosec // a process's number
	require.Equal(t, "<insufficient privilege>", value[string](t, env.DB, acme, postgres.Read, `select query from pg_stat_activity where pid = $1`, pid))
	requireState(t, try(t.Context(), env.DB, acme, postgres.Write, `select pg_terminate_backend($1)`, pid), "42501", "a tenant's work ends a session")
	_, err = asLogin(t, env, inst.LoginOf(acme.Number)).Exec(t.Context(), `select pg_terminate_backend($1)`, pid)
	requireState(t, err, "42501", "a login ends a session")
	require.NoError(t, other.Ping(t.Context()))
	var seen string
	require.NoError(t, env.DB.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(t.Context(), `select query from pg_stat_activity where pid = $1`, pid).Scan(&seen)
	}))
	require.NotContains(t, seen, "insufficient")
}

// An administrator who may not give the owner its sight is told who can, and the rest of the set-up is made; one who may gives
// what is missing; and of what is there nothing is said.
func TestSightThatIsNotOursToGive(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	admin(t, env, `create role planted_small login; create role planted_owner; grant pg_read_all_settings to planted_owner`)
	t.Cleanup(func() {
		_, err := pgtest.Admin(t, env.AdminURL).PgConn().Exec(context.Background(), `drop owned by planted_small; drop role planted_small; drop role planted_owner`).ReadAll()
		require.NoError(t, err)
	})
	give := func(c *pgx.Conn) (story []string) {
		t.Helper()
		require.NoError(t, pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
			if err := postgres.GiveSight(ctx, tx, "planted_owner", func(format string, args ...any) { story = append(story, fmt.Sprintf(format, args...)) }); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `select 1`) // it goes on
			return err
		}))
		return story
	}
	story := give(asUser(t, env, "planted_small"))
	require.Len(t, story, 1)
	require.Contains(t, story[0], `as a superuser, grant pg_read_all_stats, pg_signal_backend to "planted_owner"`)
	require.Empty(t, give(pgtest.Admin(t, env.AdminURL)))
	require.Empty(t, give(asUser(t, env, "planted_small")), "there is nothing left to give")
	for _, role := range postgres.Sight {
		var has bool
		require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(ctx, `select pg_has_role('planted_owner', $1, 'usage')`, role).Scan(&has))
		require.True(t, has, role)
	}
}

// asUser connects to the test's database as another role, past what oneo revokes of it.
func asUser(t *testing.T, env *pgtest.Env, role string) *pgx.Conn {
	t.Helper()
	admin(t, env, "grant connect on database "+postgres.Quote(env.Database)+" to "+role)
	return asLogin(t, env, role)
}
