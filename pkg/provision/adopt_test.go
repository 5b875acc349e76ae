package provision_test

import (
	"context"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// foreign makes a schema as another tool would have: by the owner, with the tables of a version.
func (f fixture) foreign(t *testing.T, group, schema string, version int) {
	t.Helper()
	err := f.db.AsOwner(t.Context(), group, func(tx *postgres.OwnerTx) error {
		return tx.Script(t.Context(), "create schema "+schema+"; set local search_path to "+schema+", ext, pg_temp;\n"+f.m.CreationScriptTo(version))
	})
	require.NoError(t, err)
}

// Behaviours 5, 101: a schema that is there is taken over only when that is asked for, at the version that it is at.
func TestAdopt(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			checker, err := structure.New(structure.Options{DB: f.db, Head: f.m.Head(migrate.TenantSet), Make: f.m.Create})
			require.NoError(t, err)
			_, p, _, err := openOn(f.db, func(o *provision.Options) { o.Structure = checker })
			require.NoError(t, err)
			ctx := t.Context()
			f.foreign(t, group, "legacy", 1)
			err = f.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
				return tx.Script(ctx, `insert into legacy.users (id, email, password_hash) values (gen_random_uuid(), 'ada@example.com', 'x')`)
			})
			require.NoError(t, err)
			request := provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Schema: schemaOf(t, "legacy"), Group: group, Actor: "test"}
			adopt := func(version int, force bool) (tenant.Tenant, error) {
				return p.Adopt(ctx, request, provision.Adoption{Version: version, Force: force})
			}
			_, err = adopt(2, false)
			require.True(t, fault.Is(err, fault.Conflict), "%v", err)
			require.ErrorContains(t, err, "is not what the migrations make at version 2")
			_, err = adopt(9, false)
			require.True(t, fault.Is(err, fault.Invalid), "%v", err)
			f.nothingMade(t, group)

			acme, err := adopt(1, false)
			require.NoError(t, err)
			require.Equal(t, "legacy", acme.Schema.String())
			_, err = f.m.Tenant(ctx, acme, migrate.TenantOptions{})
			require.NoError(t, err)
			var users int
			err = f.db.InTenant(ctx, acme, postgres.Read, func(tx *postgres.Tx) error {
				return tx.QueryRow(ctx, `select (select count(*) from users) + (select count(*) from records)`).Scan(&users)
			})
			require.NoError(t, err, "served at the head, with the rights of its own role")
			require.Equal(t, 1, users)
			other := f.create(t, "globex", group)
			err = f.db.InTenant(ctx, other, postgres.Read, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `select count(*) from legacy.users`)
				return err
			})
			require.Equal(t, "42501", postgres.SQLState(err), "a neighbour does not see it")
			_, err = adopt(1, false)
			require.True(t, fault.Is(err, fault.Conflict), "%v", err)
			request.Slug = pgtest.Slug(t, "initech")
			_, err = adopt(1, true)
			require.True(t, fault.Is(err, fault.Conflict), "one schema, one tenant: %v", err)
			request.Schema = schemaOf(t, "nowhere")
			_, err = adopt(1, true)
			require.ErrorContains(t, err, "there is no schema nowhere")
			f.invariants(t)
		})
	}
}

// What is not the owner's could not be migrated.
func TestAdoptRefusesWhatIsNotTheOwners(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	f.foreign(t, "main", "legacy", 2)
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, err := admin.Exec(context.Background(), `alter table legacy.records owner to postgres`)
	require.NoError(t, err)
	_, err = f.p.Adopt(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Schema: schemaOf(t, "legacy"), Actor: "test"}, provision.Adoption{Version: 2, Force: true})
	require.ErrorContains(t, err, "relation records of postgres")
	f.nothingMade(t, "main")
}

// What other tenants may look into is no tenant's own, also when its structure does not matter.
func TestAdoptRefusesWhatOthersMaySee(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx := t.Context()
	admin := pgtest.Admin(t, f.env.AdminURL)
	for i, to := range []string{"public", "oneo_app"} {
		schema := []string{"legacy", "older"}[i]
		f.foreign(t, "main", schema, 2)
		_, err := admin.Exec(ctx, "grant usage on schema "+schema+" to "+to+"; grant select on all tables in schema "+schema+" to "+to+"; grant usage on schema "+schema+" to pg_monitor")
		require.NoError(t, err)
		request := provision.CreateRequest{Slug: pgtest.Slug(t, schema), Schema: schemaOf(t, schema), Actor: "test"}
		_, err = f.p.Adopt(ctx, request, provision.Adoption{Version: 2, Force: true})
		require.Equal(t, "not_isolated", fault.Of(err).Code, "%s: %v", to, err)
		f.nothingMade(t, "main")
		_, err = admin.Exec(ctx, fault.Of(err).Hint[strings.Index(fault.Of(err).Hint, "revoke"):])
		require.NoError(t, err, "the hint is no SQL")
	}
	for _, schema := range []string{"legacy", "older"} {
		_, err := f.p.Adopt(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, schema), Schema: schemaOf(t, schema), Actor: "test"}, provision.Adoption{Version: 2, Force: true})
		require.NoError(t, err, "what others have, who are none of oneo's, is nobody's business")
	}
	// A neighbour's role.
	neighbour := f.create(t, "globex", "main")
	f.foreign(t, "main", "third", 2)
	inst, err := f.db.Installation(ctx, "main")
	require.NoError(t, err)
	_, err = admin.Exec(ctx, "grant usage on schema third to "+postgres.Quote(inst.TenantRole(neighbour.Number)))
	require.NoError(t, err)
	_, err = f.p.Adopt(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "third"), Schema: schemaOf(t, "third"), Actor: "test"}, provision.Adoption{Version: 2, Force: true})
	require.Equal(t, "not_isolated", fault.Of(err).Code, "%v", err)
}

// nothingMade holds that a refused adoption has left nothing.
func (f fixture) nothingMade(t *testing.T, group string) {
	t.Helper()
	var placements, tenants, roles int
	require.NoError(t, f.db.AsOwner(t.Context(), group, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(t.Context(), `select count(*) from public.placements`).Scan(&placements)
	}))
	inst, err := f.db.Installation(t.Context(), group)
	require.NoError(t, err)
	require.NoError(t, f.db.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) error {
		const left = `select (select count(*) from public.tenants where state <> 'purged'), (select count(*) from pg_roles where rolname like $1)`
		return tx.QueryRow(t.Context(), left, "oneo\\_"+inst.ID+"\\_%").Scan(&tenants, &roles)
	}))
	require.Equal(t, []int{0, 0, 0}, []int{placements, tenants, roles}, "placements, tenants and roles")
}

func schemaOf(t *testing.T, name string) tenant.Schema {
	t.Helper()
	s, err := tenant.ParseSchema(name)
	require.NoError(t, err)
	return s
}
