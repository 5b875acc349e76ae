package doctor_test

import (
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// TestRepairsOfOneGroupLeaveTheOthersTenants: roles are of the whole cluster, and a group that was added later may have another
// number of logins. What it says of a role says nothing of a tenant that stands elsewhere.
func TestRepairsOfOneGroupLeaveTheOthersTenants(t *testing.T) {
	f := newFleet(t)
	ctx := context.Background()
	second := f.env.SecondGroup(t)
	var m *migrate.Migrator
	f.o.DB, m, _ = f.env.Open(t, func(po *postgres.Options) {
		po.Groups = map[string]postgres.Group{postgres.MainGroup: f.env.Group, "second": second}
	})
	f.o.Migrate = m
	f.o.Config.Database.Groups = map[string]config.Group{"second": {URL: second.URL, OwnerURL: second.OwnerURL}}
	_, err := m.Shared(ctx)
	require.NoError(t, err)
	require.NoError(t, f.o.DB.AsOwner(ctx, "second", func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `update public.installation set logins = 64`)
		return err
	}))
	inst, err := f.o.DB.Installation(ctx, "second")
	require.NoError(t, err)
	require.NotEqual(t, []string{f.login, f.login}, []string{inst.LoginOf(f.a.Number), inst.LoginOf(f.b.Number)})

	res := result(t, f.run(t, func(o *doctor.Options) { o.Fix, o.Only = true, []string{"roles"} }), "roles")
	require.Empty(t, res.Fixed)
	require.Equal(t, doctor.OK, res.Status, res.Message)
	for _, tn := range []string{f.roleA, f.roleB} {
		var members int
		require.NoError(t, f.admin.QueryRow(ctx, `select count(*) from pg_auth_members a join pg_roles g on g.oid = a.roleid join pg_roles m on m.oid = a.member
where g.rolname = $1 and m.rolcanlogin and not m.rolcreaterole and not m.rolsuper`, tn).Scan(&members))
		require.Equal(t, 1, members, tn)
	}
}

// TestAnIndexThatIsSomebodysIsNotDropped: only what PostgreSQL itself named in a reindex goes.
func TestAnIndexThatIsSomebodysIsNotDropped(t *testing.T) {
	f := newFleet(t)
	f.sql(t, `create unique index cards_ccnew_at on @a.users (id); create index users_x_ccnew1 on @a.users (id);
update pg_index set indisvalid = false where indexrelid in ('@a.cards_ccnew_at'::regclass, '@a.users_x_ccnew1'::regclass)`)
	// A large index takes longer than any look, and a reindex that is cut short leaves one more that is invalid.
	found := result(t, f.run(t, func(o *doctor.Options) { o.Only = []string{"indexes"} }), "indexes").Findings
	require.Len(t, found, 2)
	for _, one := range found {
		require.True(t, doctor.Long(one), one.Message)
	}
	require.False(t, doctor.Bounded(newDoctor(t, f.o), true))
	require.True(t, doctor.Bounded(newDoctor(t, f.o), false))

	res := result(t, f.run(t, func(o *doctor.Options) { o.Fix, o.Only = true, []string{"indexes"} }), "indexes")
	require.Equal(t, doctor.OK, res.Status, res.Message)
	var whole, left bool
	require.NoError(t, f.admin.QueryRow(context.Background(), `select exists (select from pg_indexes where indexname = 'cards_ccnew_at'), exists (select from pg_indexes where indexname = 'users_x_ccnew1')`).Scan(&whole, &left))
	require.True(t, whole)
	require.False(t, left)
}
