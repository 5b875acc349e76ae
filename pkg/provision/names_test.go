package provision_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// A function keeps a search path that names its schema. It follows the schema wherever oneo renames it: in a rename, in what an undo
// would bring back, in a restore. Otherwise it would go on in the schema that is called so next, which may be another tenant's.
func TestPathsOfFunctionsFollow(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx, slug := t.Context(), pgtest.Slug(t, "acme")
			c := pgtest.Admin(t, f.adminURL(group))
			exec := func(sql string) { // as a migration
				_, err := pgtest.Admin(t, f.groups[group].OwnerURL).PgConn().Exec(ctx, sql).ReadAll()
				require.NoError(t, err)
			}
			one := func(sql string) (v string) {
				require.NoError(t, c.QueryRow(ctx, sql).Scan(&v))
				return v
			}
			// settings are those of the functions, by their names, of the schemas whose name begins so.
			settings := func(schema string) (all string) {
				require.NoError(t, c.QueryRow(ctx, `select coalesce(string_agg(f.proname || ': ' || array_to_string(f.proconfig, ' + '), '; ' order by f.proname), '')
from pg_proc f join pg_namespace n on n.oid = f.pronamespace where starts_with(n.nspname, $1)`, schema).Scan(&all))
				return all
			}
			rename := func(to string) error {
				_, err := f.p.Rename(ctx, slug, provision.RenameRequest{Schema: pgtest.Slug(t, to).Schema(), Actor: "test"})
				return err
			}
			counts := `create function count_users() returns bigint language sql security definer set search_path from current as 'select count(*) from users'`
			f.prepare(t, "restore", group)
			exec(`begin; set local search_path to acme, ext, pg_temp; ` + counts + `;
create function other(mood text, int[]) returns int language sql set work_mem to '1MB' set search_path to ext, "acme", "acme x", acmes, pg_temp as 'select 1';
create procedure procedure() language sql set search_path to acme as 'select 1'; commit`)

			require.NoError(t, rename("order"))
			require.Equal(t, `count_users: search_path="order", ext, pg_temp; other: work_mem=1MB + search_path=ext, "order", "acme x", acmes, pg_temp; procedure: search_path="order"`, settings("order"))
			done, err := f.p.Restore(ctx, slug, provision.RestoreRequest{Keep: time.Hour, Actor: "test", Fill: provision.Filling{Version: 1,
				Rows: func(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) error {
					return tx.Script(ctx, counts)
				}}})
			require.NoError(t, err)
			require.Equal(t, `count_users: search_path="order", ext, pg_temp`, settings("order"))
			require.Equal(t, "0", one(`select "order".count_users()::text`))

			require.NoError(t, rename("globex"))
			require.Equal(t, `count_users: search_path=globex, ext, pg_temp`, settings("globex"))
			_, err = f.p.Return(ctx, slug, done.Operation, "test")
			require.NoError(t, err)
			require.Equal(t, `count_users: search_path=globex, ext, pg_temp; other: work_mem=1MB + search_path=ext, globex, "acme x", acmes, pg_temp; procedure: search_path=globex`, settings("globex"))
			require.Equal(t, "1", one(`select globex.count_users()::text`))
			f.invariants(t)
		})
	}
}

// What names its schema in a text of its own cannot be renamed: neither what is in use nor what an undo would bring back.
func TestRenameOfWhatNamesItsSchema(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx, slug := t.Context(), pgtest.Slug(t, "users")
	f.create(t, "users", "main")
	exec := func(sql string) {
		_, err := pgtest.Admin(t, f.env.AdminURL).PgConn().Exec(ctx, sql).ReadAll()
		require.NoError(t, err)
	}
	rename := func() error {
		_, err := f.p.Rename(ctx, slug, provision.RenameRequest{Slug: pgtest.Slug(t, "globex"), Schema: pgtest.Slug(t, "globex").Schema(), Actor: "test"})
		return err
	}
	refused := func(what string) {
		t.Helper()
		err := rename()
		requireFault(t, err, fault.Conflict, "schema_named")
		require.ErrorContains(t, err, what)
		require.Equal(t, "users users users", f.scalar(t, `select slug || ' ' || t.schema || ' ' || p.schema from public.tenants t join public.placements p using (number)`))
	}
	exec(`create function users.f() returns bigint language sql as 'select count(*) from USERS.users'`)
	refused("the function f")
	exec(`drop function users.f(); alter table users.users alter name set default 'of users'`)
	refused("a default of the table users")
	done, err := f.p.Restore(ctx, slug, provision.RestoreRequest{Fill: oneUser("restored"), Keep: time.Hour, Actor: "test"})
	require.NoError(t, err)
	err = rename()
	requireFault(t, err, fault.Conflict, "schema_named")
	require.Contains(t, fault.Of(err).Hint, "a restore has replaced")
	_, err = f.p.Return(ctx, slug, done.Operation, "test")
	require.NoError(t, err)
	// A table, its columns, a trigger and a key that are called like the schema are no texts.
	exec(`alter table users.users alter name drop default; create table users.t (users uuid references users.users check (users is not null));
create function users.g() returns trigger language plpgsql as 'begin return new; end'; create trigger users before insert on users.users for each row execute function users.g();
create view users.v as select users.email from users.users`)
	exec(`drop schema ` + f.scalar(t, `select schema from public.replaced`) + ` cascade; delete from public.replaced`)
	require.NoError(t, rename())
	f.invariants(t)
}
