package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// The server that leads and works on a scheduled backup is killed in the middle of it: another one ends the same run.
func TestKilledServersBackupsGoOn(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	for i := range 3 {
		env.Tenant(t, fmt.Sprintf("t%d", i))
	}
	admin := pgtest.Admin(t, env.AdminURL)
	dir := t.TempDir()
	extra := []string{
		"ONEO_BACKUP_URL=" + filepath.Join(dir, "backups"), "ONEO_MIGRATE_STALE_AFTER=2s",
		`ONEO_BACKUP_SCHEDULES=[{"name":"yearly","cron":"0 0 1 1 *","jobs":1,"select":{"all_tenants":true}}]`,
	}
	_, stderr, code := oneo(t, env, extra, "migrate", "--shared")
	require.Zero(t, code, stderr)
	due := time.Date(time.Now().UTC().Year(), 1, 1, 0, 0, 0, 0, time.UTC)
	_, err := admin.Exec(t.Context(), `insert into public.schedules (name, spec, seen) values ('yearly', '0 0 1 1 * UTC', $1)`, due.Add(-time.Hour))
	require.NoError(t, err)
	count := func(query string) (n int) {
		require.NoError(t, admin.QueryRow(t.Context(), query).Scan(&n))
		return n
	}
	// The first one stands still over the second tenant.
	first := serve(t, env, append(extra[:len(extra):len(extra)], "ONEO_FAILPOINTS=backup.stored=wait:"+filepath.Join(dir, "never")+"@2")...)
	require.Eventually(t, func() bool {
		return count(`select count(*) from public.tasks where state = 'ok'`) == 1 && count(`select count(*) from public.tasks where state = 'running'`) >= 1
	}, pgtest.Patience, 20*time.Millisecond, "the first server does not begin")
	second := serve(t, env, extra...)
	require.NoError(t, first.cmd.Process.Signal(syscall.SIGKILL))
	_ = first.cmd.Wait() // killed

	require.Eventually(t, func() bool { return count(`select count(*) from public.schedules where ended_at is not null`) == 1 }, pgtest.Patience, 50*time.Millisecond,
		"the second server does not go on: %s", second.logs)
	require.Equal(t, 1, count(`select count(*) from public.runs`), "one due time is one run")
	require.Equal(t, 3, count(`select ok from public.schedules`))
	stdout, stderr, code := oneo(t, env, extra, "backup", "list", "-o", "json")
	require.Zero(t, code, stderr)
	var made []struct{ Tenant string }
	require.NoError(t, json.Unmarshal([]byte(stdout), &made))
	require.Len(t, made, 3, "each tenant is backed up once")
	stdout, stderr, code = oneo(t, env, extra, "backup", "schedule", "--check", "-o", "json")
	require.Zero(t, code, stderr)
	require.Contains(t, stdout, `"state": "ok"`)
	stdout, stderr, code = oneo(t, env, extra, "backup", "schedule", "--late", "--check", "-o", "json")
	require.Zero(t, code, stderr)
	require.Equal(t, "[]", strings.TrimSpace(stdout))

	// What the schedule promises is looked for in the store, by the tenant.
	_, err = admin.Exec(t.Context(), `update public.tenants set created_at = $1`, due.Add(-24*time.Hour))
	require.NoError(t, err)
	env.Tenant(t, "young")
	tn := env.Tenant(t, "late")
	_, err = admin.Exec(t.Context(), `update public.tenants set created_at = $2 where number = $1`, tn.Number, due.Add(-24*time.Hour))
	require.NoError(t, err)
	// A drill promises none.
	drill := append(extra[:2:2], strings.Replace(extra[2], `[`, `[{"name":"proof","kind":"drill","cron":"* * * * *","select":{"all_tenants":true}},`, 1))
	stdout, stderr, code = oneo(t, env, drill, "backup", "schedule", "--late", "--check", "-o", "name")
	require.Equal(t, exitPending, code, stderr)
	require.Equal(t, "late", strings.TrimSpace(stdout))
	// A due time that passed while nobody looked.
	require.NoError(t, second.cmd.Process.Signal(syscall.SIGTERM))
	require.NoError(t, second.cmd.Wait())
	_, err = admin.Exec(t.Context(), `update public.schedules set seen = seen - interval '1 hour'`)
	require.NoError(t, err)
	_, stderr, code = oneo(t, env, extra, "backup", "schedule", "--check")
	require.Equal(t, exitPending, code, stderr)
	require.Contains(t, stderr, "yearly is overdue")
}

// kill -9 at every place of a due time: it is done once, and told.
func TestKilledOverADueTime(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	env.Tenant(t, "beta")
	admin := pgtest.Admin(t, env.AdminURL)
	dir := t.TempDir()
	told := filepath.Join(dir, "told")
	extra := []string{
		"ONEO_BACKUP_URL=" + filepath.Join(dir, "backups"), "ONEO_MIGRATE_STALE_AFTER=2s",
		`ONEO_BACKUP_SCHEDULES=[{"name":"yearly","cron":"0 0 1 1 *","select":{"all_tenants":true}}]`, "ONEO_BACKUP_ALARM=/bin/sh,-c,cat >> " + told,
	}
	_, stderr, code := oneo(t, env, extra, "migrate", "--shared")
	require.Zero(t, code, stderr)
	due := time.Date(time.Now().UTC().Year(), 1, 1, 0, 0, 0, 0, time.UTC)
	// The one of the year before was missed.
	_, err := admin.Exec(t.Context(), `insert into public.schedules (name, spec, seen) values ('yearly', '0 0 1 1 * UTC', $1)`, due.AddDate(-1, 0, -1))
	require.NoError(t, err)
	for _, point := range failpoint.All {
		if !strings.HasPrefix(point, "schedule.") {
			continue
		}
		_, stderr, code := oneo(t, env, append(extra[:len(extra):len(extra)], "ONEO_SERVER_ADDR=127.0.0.1:0", "ONEO_SERVER_OPS_ADDR=127.0.0.1:0", "ONEO_FAILPOINTS="+point+"=exit"), "serve")
		require.Equalf(t, 137, code, "%s did not fire: %s", point, stderr)
		// Its leadership would run out in a quarter of a minute.
		_, err := admin.Exec(t.Context(), `delete from river.river_leader`)
		require.NoError(t, err)
	}
	last := serve(t, env, extra...)
	var ok, missed, runs, tasks int
	require.Eventually(t, func() bool {
		err := admin.QueryRow(t.Context(), `select ok, missed, (select count(*) from public.runs), (select count(*) from public.tasks where attempts = 1) from public.schedules where ended_at is not null`).
			Scan(&ok, &missed, &runs, &tasks)
		return err == nil
	}, pgtest.Patience, 50*time.Millisecond, "the last server does not end it: %s", last.logs)
	require.Equal(t, [4]int{2, 1, 1, 2}, [4]int{ok, missed, runs, tasks}, "backed up, missed, runs, tenants that were begun once")
	text, err := os.ReadFile(told)
	require.NoError(t, err)
	require.Contains(t, string(text), `"code":"schedule_missed"`, "the alarm is raised, whoever died")
}
