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

// Of runs that are over and old nothing is left; whatever may still be resumed, retried or undone is untouched.
func TestRunsExpire(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	admin := pgtest.Admin(t, env.AdminURL)
	exec := func(sql string, args ...any) {
		t.Helper()
		_, err := admin.Exec(ctx, sql, args...)
		require.NoError(t, err)
	}
	tn := env.Tenant(t, "acme")
	made := map[string]uuid.UUID{}
	for _, name := range []string{"done", "aborted", "recent", "failed", "paused", "running", "undo", "group"} {
		s := spec(t, 3)
		if name == "group" {
			s.Items[1].Tenant.Group = "elsewhere"
		}
		run := plan(t, r, s)
		made[name] = run.ID
		state, age := name, "91 days"
		switch name {
		case "recent":
			state, age = registry.Done, "89 days"
		case "undo", "group":
			state = registry.Done
		}
		exec(`update public.operations set state = $2, created_at = now() - interval '200 days', finished_at = case when $2 in ('done', 'failed', 'aborted') then now() - $3::text::interval end where id = $1`, run.ID, state, age)
		exec(`insert into public.marks (run, tenant, at) values ($1, $2, now() - interval '200 days')`, run.ID, tn.Number)
	}
	exec(`insert into public.undo_points (run, tenant, schema, from_version, to_version, had, expires_at) values ($1, $2, 'oneo_undo_x', 1, 2, '{}', now() - interval '1 day')`, made["undo"], tn.Number)
	left := func() map[string][2]int {
		all := map[string][2]int{}
		for name, id := range made {
			var tasks, marks int
			const count = `select (select count(*) from public.tasks where run = $1), (select count(*) from public.marks where run = $1)`
			require.NoError(t, admin.QueryRow(ctx, count, id).Scan(&tasks, &marks))
			if _, err := r.Show(ctx, id); err == nil || tasks+marks > 0 {
				all[name] = [2]int{tasks, marks}
			}
		}
		return all
	}
	n, err := r.Expire(ctx, 0)
	require.NoError(t, err)
	require.Zero(t, n)
	require.Len(t, left(), 8)

	// A group that cannot be asked may have undo points.
	gone := env.Group
	gone.URL, gone.OwnerURL = "postgres://nobody@127.0.0.1:1/x", "postgres://nobody@127.0.0.1:1/x"
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.AcquireTimeout = 100 * time.Millisecond
		o.Groups = map[string]postgres.Group{"main": env.Group, "away": gone}
	})
	blind, err := rollout.New(rollout.Options{DB: db, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	_, err = blind.Expire(ctx, 90*24*time.Hour)
	require.Error(t, err)
	require.Len(t, left(), 8)

	n, err = r.Expire(ctx, 90*24*time.Hour)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	want := map[string][2]int{}
	for _, name := range []string{"recent", "failed", "paused", "running", "undo", "group"} {
		want[name] = [2]int{3, 1}
	}
	require.Equal(t, want, left())

	// Once the point is gone and the failed one is aborted, they have their time as well.
	exec(`delete from public.undo_points`)
	_, err = r.Abort(ctx, made["failed"], "test")
	require.NoError(t, err)
	n, err = r.Expire(ctx, 90*24*time.Hour)
	require.NoError(t, err)
	require.Equal(t, 1, n, "what was aborted today is kept from today")
	require.NotContains(t, left(), "undo")
	require.Contains(t, left(), "failed")
}

// More than are removed at one time.
func TestManyRunsExpire(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	for range 23 {
		plan(t, r, spec(t, 2))
	}
	_, err := pgtest.Admin(t, env.AdminURL).Exec(t.Context(), `update public.operations set state = 'done', finished_at = now() - interval '2 hours'`)
	require.NoError(t, err)
	n, err := r.Expire(context.WithoutCancel(t.Context()), time.Hour)
	require.NoError(t, err)
	require.Equal(t, 23, n)
	runs, err := r.List(t.Context(), 50, false)
	require.NoError(t, err)
	require.Empty(t, runs)
}

// What a later run did well is forgotten before the failure is: the failure is not the last word about a tenant that
// has moved on since.
func TestFailureOfAnotherVersionHoldsNoMore(t *testing.T) {
	t.Parallel()
	f := rollout.Failure{From: 2, To: 3}
	require.True(t, f.Holds(2))
	require.True(t, f.Holds(3))
	require.False(t, f.Holds(4))
}
