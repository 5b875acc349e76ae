package rollout_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// left makes a run of which every task is in a state, in the hands of a process that died long ago.
func left(t *testing.T, env *pgtest.Env, r *rollout.Runner, state, task string) rollout.Run {
	t.Helper()
	run := plan(t, r, spec(t, 6))
	admin := pgtest.Admin(t, env.AdminURL)
	for _, sql := range []string{
		`update public.tasks set state = '` + task + `', worker = gen_random_uuid(), heartbeat = now() - interval '1 hour', attempts = 1 where run = $1`,
		`update public.operations set state = '` + state + `', heartbeat = now() - interval '1 hour' where id = $1`,
	} {
		_, err := admin.Exec(t.Context(), sql, run.ID)
		require.NoError(t, err)
	}
	return run
}

func TestRunsWithNothingLeftAreConcluded(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	done, paused := left(t, env, r, registry.Running, "ok"), left(t, env, r, registry.Paused, "skipped")
	failed := left(t, env, r, registry.Running, "failed")
	open, held := left(t, env, r, registry.Running, "running"), left(t, env, r, registry.Paused, "queued")
	living := left(t, env, r, registry.Running, "ok")
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(ctx, `update public.operations set heartbeat = now() + interval '1 hour' where id = $1`, living.ID)
	require.NoError(t, err)

	ended, err := r.Conclude(ctx, nil)
	require.NoError(t, err)
	require.Len(t, ended, 3)
	for _, c := range []struct {
		run   rollout.Run
		state string
	}{
		{done, registry.Done}, {paused, registry.Done}, {failed, registry.Failed},
		{open, registry.Running}, {held, registry.Paused}, {living, registry.Running},
	} {
		now, err := r.Show(ctx, c.run.ID)
		require.NoError(t, err)
		require.Equal(t, c.state, now.State)
		require.Equal(t, now.Over(), now.FinishedAt != nil)
	}
	var result, details string
	require.NoError(t, admin.QueryRow(ctx, `select result::text from public.operations where id = $1`, paused.ID).Scan(&result))
	require.JSONEq(t, `{"skipped": 6}`, result)
	require.NoError(t, admin.QueryRow(ctx, `select details->>'state' from public.audit where action = 'run.test.ended' and details->>'run' = $1`, failed.ID.String()).Scan(&details))
	require.Equal(t, "failed", details)
	ended, err = r.Conclude(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, ended)
}

// What stands of a dead process's tasks is somebody else's to know: all of them, or the run stays as it is.
func TestRunsWhoseTasksStandAreConcluded(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r := newRunner(t, env)
	ctx := t.Context()
	run := left(t, env, r, registry.Running, "running")
	number := int32(0)
	made := func(_ context.Context, asked rollout.Run, tasks []rollout.Task) (map[int32]bool, error) {
		require.Equal(t, run.ID, asked.ID)
		stand := map[int32]bool{}
		for _, task := range tasks {
			stand[task.Number] = task.Number != number
		}
		return stand, nil
	}
	number = 4
	ended, err := r.Conclude(ctx, made)
	require.NoError(t, err)
	require.Empty(t, ended)
	now, err := r.Show(ctx, run.ID)
	require.NoError(t, err)
	require.Equal(t, rollout.Counts{Running: 6}, now.Counts, "nothing is written of those that stand")

	_, err = r.Conclude(ctx, func(context.Context, rollout.Run, []rollout.Task) (map[int32]bool, error) {
		return nil, errors.New("away")
	})
	require.ErrorContains(t, err, "away")

	// A process that begins to work on it meanwhile is left to it.
	ended, err = r.Conclude(ctx, func(_ context.Context, _ rollout.Run, tasks []rollout.Task) (map[int32]bool, error) {
		_, err := pgtest.Admin(t, env.AdminURL).Exec(ctx, `update public.operations set heartbeat = now() + interval '1 hour' where id = $1`, run.ID)
		stand := map[int32]bool{}
		for _, task := range tasks {
			stand[task.Number] = true
		}
		return stand, err
	})
	require.NoError(t, err)
	require.Empty(t, ended)
	_, err = pgtest.Admin(t, env.AdminURL).Exec(ctx, `update public.operations set heartbeat = now() - interval '1 hour' where id = $1`, run.ID)
	require.NoError(t, err)

	number = 0
	ended, err = r.Conclude(ctx, made)
	require.NoError(t, err)
	require.Len(t, ended, 1)
	require.Equal(t, registry.Done, ended[0].State)
	require.Equal(t, rollout.Counts{OK: 6}, ended[0].Counts)
	require.NoError(t, r.Tasks(ctx, run.ID, func(task rollout.Reported) error {
		require.NotNil(t, task.Ended)
		require.WithinDuration(t, time.Now(), *task.Ended, time.Minute)
		return nil
	}))
}
