package registry_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// owner runs fn in a transaction of the owner.
func owner(t *testing.T, db *postgres.DB, fn func(tx *postgres.OwnerTx) error) {
	t.Helper()
	require.NoError(t, db.AsOwner(t.Context(), postgres.MainGroup, fn))
}

func pointsOf(t *testing.T, db *postgres.DB, name string) (all []registry.Point, err error) {
	t.Helper()
	owner(t, db, func(tx *postgres.OwnerTx) error {
		all, err = registry.PointsOf(t.Context(), tx, name)
		return nil
	})
	return all, err
}

func TestPointsAreSetAndFound(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": env.Group, "second": second}
	})
	admin := pgtest.Admin(t, env.AdminURL)
	elsewhere, err := pgx.ParseConfig(second.URL)
	require.NoError(t, err)
	for _, database := range []string{env.Database, elsewhere.Database} {
		c := pgtest.Admin(t, env.Server.URL(database))
		for _, sql := range physical.Grants("oneo_owner") {
			for range 2 { // they can be repeated
				_, err := c.Exec(t.Context(), sql)
				require.NoError(t, err, sql)
			}
		}
	}
	ctx := t.Context()
	var log bytes.Buffer
	m := registry.NewMarker(db, slog.New(slog.NewTextHandler(&log, nil)))
	lsn := func() (now physical.LSN) {
		t.Helper()
		var s string
		require.NoError(t, admin.QueryRow(ctx, `select pg_current_wal_insert_lsn()::text`).Scan(&s))
		now, err := physical.ParseLSN(s)
		require.NoError(t, err)
		return now
	}
	one, err := uuid.NewV7()
	require.NoError(t, err)
	before, clock := lsn(), time.Now()
	m.Mark(ctx, registry.Marking{Operation: one, Kind: "tenant.drop", Tenant: "acme", Groups: []string{"second", "main", "second"}})
	after := lsn()
	require.Empty(t, log.String())

	ps, err := pointsOf(t, db, one.String())
	require.NoError(t, err)
	require.Len(t, ps, 2)
	names := map[string]bool{}
	for _, p := range ps {
		at, err := physical.ParseLSN(p.LSN)
		require.NoError(t, err)
		require.Greater(t, at, before)
		require.LessOrEqual(t, at, after)
		require.Equal(t, uint32(1), p.Timeline)
		require.WithinDuration(t, clock, p.At, pgtest.Patience) // on the same machine
		require.Equal(t, []any{one, "tenant.drop", "acme"}, []any{p.Operation, p.Kind, p.Tenant})
		require.LessOrEqual(t, len(p.Name), 63)
		names[p.Group+" "+p.Name], names[p.Name] = true, true
	}
	require.Len(t, names, 4, "two groups of one cluster have two points")

	// Who comes later with the same operation changes nothing of what is remembered.
	m.Mark(ctx, registry.Marking{Operation: one, Kind: "tenant.drop", Tenant: "acme", Groups: []string{"second"}})
	again, err := pointsOf(t, db, one.String())
	require.NoError(t, err)
	require.Equal(t, ps, again)

	// The end of an id is enough, and so is its beginning while no other one has the same.
	for _, name := range []string{one.String()[:8], one.String()[28:], strings.ToUpper(one.String())} {
		got, err := pointsOf(t, db, name)
		require.NoError(t, err, name)
		require.Equal(t, ps, got)
	}
	two := one
	two[15]++
	m.Mark(ctx, registry.Marking{Operation: two, Kind: "run.migrate"})
	_, err = pointsOf(t, db, one.String()[:8])
	requireFault(t, err, fault.Invalid, "ambiguous_point")
	for _, name := range []string{"", "abc", "________", "no such operation", uuid.NewString()} {
		_, err := pointsOf(t, db, name)
		requireFault(t, err, fault.NotFound, "unknown_point")
	}

	owner(t, db, func(tx *postgres.OwnerTx) error {
		all, err := registry.Points(ctx, tx, time.Time{}, 10)
		require.NoError(t, err)
		require.Len(t, all, 3)
		require.Equal(t, two, all[0].Operation, "the newest first")
		all, err = registry.Points(ctx, tx, all[0].At, 10)
		require.NoError(t, err)
		require.Len(t, all, 1)
		all, err = registry.Points(ctx, tx, time.Time{}, 2)
		require.NoError(t, err)
		require.Len(t, all, 2)
		return nil
	})

	// They name tenants, and a request needs none of them.
	err = app(env, func(ctx context.Context, q postgres.Querier) error {
		_, err := registry.Points(ctx, q, time.Time{}, 1)
		return err
	})
	require.Equal(t, "42501", postgres.SQLState(err))

	_, err = admin.Exec(ctx, `update public.restore_points set at = now() - interval '401 days' where operation = $1`, one)
	require.NoError(t, err)
	_, err = admin.Exec(ctx, `update public.restore_points set at = now() - interval '399 days' where operation = $1`, two)
	require.NoError(t, err)
	owner(t, db, func(tx *postgres.OwnerTx) error { return registry.ExpirePoints(ctx, tx) })
	_, err = pointsOf(t, db, one.String())
	requireFault(t, err, fault.NotFound, "unknown_point")
	_, err = pointsOf(t, db, two.String())
	require.NoError(t, err)

	// What one cluster has is remembered, also where the registry's own can have none.
	_, err = admin.Exec(ctx, `revoke execute on function pg_catalog.pg_create_restore_point(text) from oneo_owner`)
	require.NoError(t, err)
	half := registry.Marking{Operation: uuid.New(), Kind: "tenant.drop", Tenant: "acme", Groups: []string{"second"}}
	m.Mark(ctx, half)
	require.Contains(t, log.String(), "groups=main")
	ps, err = pointsOf(t, db, half.Operation.String())
	require.NoError(t, err)
	require.Len(t, ps, 1)
	require.Equal(t, "second", ps[0].Group)
}

// Whoever may not set points, or cannot reach where they are remembered, is told once, and goes on.
func TestNoPointIsNoFailure(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	admin := pgtest.Admin(t, env.AdminURL)
	var log bytes.Buffer
	m := registry.NewMarker(env.DB, slog.New(slog.NewTextHandler(&log, nil)))
	k := func() registry.Marking { return registry.Marking{Operation: uuid.New(), Kind: "tenant.merge"} }
	m.Mark(ctx, k())
	m.Mark(ctx, k())
	require.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
	require.Contains(t, log.String(), `hint="as a superuser, in the group's database: grant execute on function pg_catalog.pg_create_restore_point(text) to \"oneo_owner\""`)

	// A transaction goes on behind it, and what it had done is not lost.
	owner(t, env.DB, func(tx *postgres.OwnerTx) error {
		if _, err := tx.Exec(ctx, `insert into public.groups (name) values ('kept')`); err != nil {
			return err
		}
		m.MarkIn(ctx, tx, postgres.MainGroup, k())
		_, err := tx.Exec(ctx, `update public.groups set accepting = false where name = 'kept'`)
		return err
	})
	var kept bool
	require.NoError(t, admin.QueryRow(ctx, `select not accepting from public.groups where name = 'kept'`).Scan(&kept))
	require.True(t, kept)

	// The hint is what mends it; a transaction remembers a point in itself, and has no other connection for it.
	_, err := admin.Exec(ctx, postgres.GrantRestorePoints("oneo_owner"))
	require.NoError(t, err)
	db, _, _ := env.Open(t, func(o *postgres.Options) { o.OwnerConns = 1 })
	alone := registry.NewMarker(db, slog.New(slog.NewTextHandler(&log, nil)))
	in := k()
	owner(t, db, func(tx *postgres.OwnerTx) error {
		alone.MarkIn(ctx, tx, postgres.MainGroup, in)
		return nil
	})
	_, err = pointsOf(t, db, in.Operation.String())
	require.NoError(t, err, log.String())

	// A table that is not there yet is nobody's fault; one that cannot be written is told.
	log.Reset()
	_, err = admin.Exec(ctx, `alter table public.restore_points rename to elsewhere`)
	require.NoError(t, err)
	alone.Mark(ctx, k())
	require.Empty(t, log.String())
	_, err = admin.Exec(ctx, `alter table public.elsewhere rename to restore_points; revoke insert on public.restore_points from oneo_owner`)
	require.NoError(t, err)
	alone.Mark(ctx, k())
	require.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())

	var none *registry.Marker
	none.Mark(ctx, k())
	none.MarkIn(ctx, nil, postgres.MainGroup, k())
}

// A cluster that cannot have a point does not keep another one from its own.
func TestAClusterWithoutPoints(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	group, server := env.SecondServer(t)
	apart := pgtest.Admin(t, server.URL("oneo"))
	for _, sql := range []string{"alter system set wal_level to minimal", "alter system set max_wal_senders to 0", postgres.GrantRestorePoints("oneo_owner")} {
		_, err := apart.Exec(ctx, sql)
		require.NoError(t, err)
	}
	_, err := pgtest.Admin(t, env.AdminURL).Exec(ctx, postgres.GrantRestorePoints("oneo_owner"))
	require.NoError(t, err)
	require.NoError(t, server.Stop(ctx))
	require.NoError(t, server.Restart(ctx))
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": env.Group, "apart": group}
	})
	var log bytes.Buffer
	m := registry.NewMarker(db, slog.New(slog.NewTextHandler(&log, nil)))
	k := registry.Marking{Operation: uuid.New(), Kind: "tenant.move", Tenant: "acme", Groups: []string{"apart"}}
	m.Mark(ctx, k)
	require.Equal(t, 1, strings.Count(log.String(), "level=WARN"), log.String())
	require.Contains(t, log.String(), "wal_level must be")
	require.Contains(t, log.String(), "groups=apart")
	ps, err := pointsOf(t, db, k.Operation.String())
	require.NoError(t, err)
	require.Len(t, ps, 1)
	require.Equal(t, "main", ps[0].Group)
}
