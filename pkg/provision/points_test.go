package provision_test

import (
	"bytes"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// pointing are the operations of this package before which restore points are set, by their kind.
var pointing = map[string]string{
	"drop": provision.KindDrop, "purge": provision.KindPurge, "erase": provision.KindErase, "restore": provision.KindRestore, "return": provision.KindReturn,
}

// pointed holds that whoever has done an operation, however often it was begun, is known by restore points in each group concerned.
func (f fixture) pointed(t *testing.T, operation, group string) {
	t.Helper()
	c := pgtest.Admin(t, f.env.AdminURL)
	kind, is := pointing[operation]
	if !is {
		var n int
		require.NoError(t, c.QueryRow(t.Context(), `select count(*) from public.restore_points where kind <> all($1)`, slices.Collect(maps.Values(pointing))).Scan(&n))
		require.Zero(t, n, "a restore point before an operation that changes little")
		return
	}
	const done = `select (details->>'operation')::uuid from public.audit where action = $1 order by at desc limit 1`
	var id uuid.UUID
	require.NoError(t, c.QueryRow(t.Context(), done, kind).Scan(&id))
	var groups []string
	require.NoError(t, c.QueryRow(t.Context(), `select array_agg(group_name::text order by group_name) from public.restore_points where operation = $1 and kind = $2 and tenant = 'acme'`, id, kind).Scan(&groups))
	want := []string{"main"}
	if group != "main" {
		want = append(want, group)
	}
	require.Equal(t, want, groups)
}

// Each of them sets its points before anything of it is committed, and not in the place of somebody else's; nobody needs them.
func TestPointsAreSetBeforeTheFirstChange(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		for operation := range pointing {
			t.Run(operation+" "+group, func(t *testing.T) {
				t.Parallel()
				ctx := t.Context()
				f := newFixture(t, group)
				f.prepare(t, operation, group)
				k := task{Operation: operation, Group: group}
				if operation == "return" {
					k.Restore = f.restore(t, "restored").Operation
				}
				admin := pgtest.Admin(t, f.env.AdminURL)
				// What others could see when the points were remembered.
				_, err := admin.Exec(ctx, `truncate public.restore_points;
create table public.witness (tenants text, running bigint, lsn pg_lsn);
create function public.see() returns trigger language plpgsql security definer set search_path to public, pg_catalog as $$ begin
	insert into witness select (select string_agg(format('%s %s %s', slug, state, epoch), ' ') from tenants), (select count(*) from operations where state <> 'done'), new.lsn;
	return new;
end $$;
create trigger see before insert on public.restore_points for each row execute function public.see();
grant execute on function public.see() to oneo_owner`)
				require.NoError(t, err)
				const standing = `select (select string_agg(format('%s %s %s', slug, state, epoch), ' ') from public.tenants), pg_current_wal_insert_lsn()::text`
				var before, after, from, to string
				require.NoError(t, admin.QueryRow(ctx, standing).Scan(&before, &from))
				require.NoError(t, k.do(ctx, f.p))
				require.NoError(t, admin.QueryRow(ctx, standing).Scan(&after, &to))
				require.NotEqual(t, before, after)
				f.pointed(t, operation, group)
				var points, good int
				const seen = `select count(*), count(*) filter (where tenants = $1 and running = 0 and lsn between $2::text::pg_lsn and $3::text::pg_lsn) from public.witness`
				require.NoError(t, admin.QueryRow(ctx, seen, before, from, to).Scan(&points, &good))
				require.Equal(t, len(f.groups), points)
				require.Equal(t, points, good)
				f.invariants(t)
			})
		}
	}
}

// An operation whose points cannot be set is done all the same, with one warning.
func TestWithoutARightToPointsEverythingGoesOn(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx := t.Context()
	for name := range f.groups {
		_, err := pgtest.Admin(t, f.adminURL(name)).Exec(ctx, `revoke execute on function pg_catalog.pg_create_restore_point(text) from oneo_owner`)
		require.NoError(t, err)
	}
	var log bytes.Buffer
	_, p, _, err := openOn(f.db, func(o *provision.Options) {
		o.Marker = registry.NewMarker(f.db, slog.New(slog.NewTextHandler(&log, nil)))
	})
	require.NoError(t, err)
	f.p = p
	k := task{Group: "second"}
	f.prepare(t, "restore", "second")
	for _, operation := range []string{"restore", "drop", "purge"} {
		k.Operation = operation
		require.NoError(t, k.do(ctx, p), operation)
		f.reached(t, operation, "second")
	}
	require.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
	require.Contains(t, log.String(), "groups=second,main")
	f.invariants(t)
}

// A process that takes an operation up sets no point of its own: the operation may have changed something by then.
func TestWhoTakesAnOperationUpSetsNoPoint(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	f.prepare(t, "drop", "second")
	var op registry.Operation
	acme, err := find(t.Context(), f.db, "acme")
	require.NoError(t, err)
	require.NoError(t, f.db.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) error {
		op, err = registry.Begin(t.Context(), tx, provision.KindDrop, acme, "dead", map[string]any{"slug": "acme", "grace_seconds": 60})
		return err
	}))
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, err = admin.Exec(t.Context(), `update public.operations set heartbeat = now() - interval '1 hour'`)
	require.NoError(t, err)
	dropped, err := f.p.Drop(t.Context(), pgtest.Slug(t, "acme"), 0, "test")
	require.NoError(t, err)
	require.Equal(t, tenant.Dropped, dropped.State)
	var points int
	var told uuid.UUID
	const ask = `select (select count(*) from public.restore_points), (select (details->>'operation')::uuid from public.audit where action = 'tenant.drop')`
	require.NoError(t, admin.QueryRow(t.Context(), ask).Scan(&points, &told))
	require.Zero(t, points)
	require.Equal(t, op.ID, told)
}
