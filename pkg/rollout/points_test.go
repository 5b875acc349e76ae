package rollout_test

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// A run has one point in each of its groups, however many tenants and processes it has, and keeps it; one that has begun with a
// tenant gets none any more.
func TestARunHasOnePointInEachGroup(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	admin := pgtest.Admin(t, env.AdminURL)
	second := env.SecondGroup(t)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": env.Group, "second": second}
	})
	for _, group := range []string{"main", "second"} {
		var database string
		require.NoError(t, db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			return tx.QueryRow(ctx, `select current_database()`).Scan(&database)
		}))
		_, err := pgtest.Admin(t, env.Server.URL(database)).Exec(ctx, postgres.GrantRestorePoints("oneo_owner"))
		require.NoError(t, err)
	}
	log := slog.New(slog.DiscardHandler)
	r, err := rollout.New(rollout.Options{DB: db, StaleAfter: pgtest.Patience, Marker: registry.NewMarker(db, log), Logger: log})
	require.NoError(t, err)
	points := func(id uuid.UUID) (all []registry.Point) {
		t.Helper()
		require.NoError(t, db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			found, err := registry.Points(ctx, tx, time.Time{}, 100)
			for _, p := range found {
				if p.Operation == id {
					all = append(all, p)
				}
			}
			return err
		}))
		return all
	}
	planned := func() rollout.Run {
		s := spec(t, 4)
		s.Items[2].Tenant.Group, s.Items[3].Tenant.Group = "second", "second"
		return plan(t, r, s)
	}

	// It is paused behind its first tenant; before that one began, the points were there.
	run := planned()
	interrupted, stop := context.WithCancel(ctx)
	defer stop()
	var atFirst []registry.Point
	_, err = r.Work(interrupted, run.ID, rollout.WorkOptions{Jobs: 1, Changes: true}, func(context.Context, rollout.Task) rollout.Outcome {
		atFirst = points(run.ID)
		stop()
		return rollout.Outcome{}
	})
	require.ErrorIs(t, err, context.Canceled)
	require.Len(t, atFirst, 2)
	require.Equal(t, []string{"main", "second"}, []string{atFirst[0].Group, atFirst[1].Group}, "the registry's is the newest")
	require.Equal(t, []string{"run.test", ""}, []string{atFirst[0].Kind, atFirst[0].Tenant})
	done, err := r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 2, Changes: true}, func(context.Context, rollout.Task) rollout.Outcome { return rollout.Outcome{} })
	require.NoError(t, err)
	require.Equal(t, 4, done.OK)
	require.Equal(t, atFirst, points(run.ID))

	// One whose points could not be set then has none: they would be behind its first change. Not even somebody who was slow adds one.
	run = planned()
	_, err = admin.Exec(ctx, `update public.tasks set attempts = 1 where run = $1 and ordinal = 3`, run.ID)
	require.NoError(t, err)
	registry.NewMarker(db, log).Mark(ctx, registry.Marking{Operation: run.ID, Kind: "run.test"})
	_, err = r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 1, Changes: true}, func(context.Context, rollout.Task) rollout.Outcome { return rollout.Outcome{} })
	require.NoError(t, err)
	require.Empty(t, points(run.ID))

	// What changes nothing needs none.
	run = planned()
	_, err = r.Work(ctx, run.ID, rollout.WorkOptions{Jobs: 1}, func(context.Context, rollout.Task) rollout.Outcome { return rollout.Outcome{} })
	require.NoError(t, err)
	require.Empty(t, points(run.ID))

	// They are forgotten by their own age, also where runs are kept for ever.
	_, err = admin.Exec(ctx, `update public.restore_points set at = now() - interval '401 days'`)
	require.NoError(t, err)
	_, err = r.Expire(ctx, 0)
	require.NoError(t, err)
	var left int
	require.NoError(t, admin.QueryRow(ctx, `select count(*) from public.restore_points`).Scan(&left))
	require.Zero(t, left)
}
