package app_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// scheduled is an installation with a yearly backup of all tenants, whose time has passed.
type scheduled struct {
	*pgtest.Env
	t     *testing.T
	dir   string
	admin *pgx.Conn
	log   *safeBuffer
}

// safeBuffer is what several processes log.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string { s.mu.Lock(); defer s.mu.Unlock(); return s.b.String() }

func newScheduled(t *testing.T) *scheduled {
	t.Helper()
	env := pgtest.New(t)
	require.NoError(t, schedule.Migrate(context.Background(), env.DB))
	return &scheduled{Env: env, t: t, dir: t.TempDir(), admin: pgtest.Admin(t, env.AdminURL), log: &safeBuffer{}}
}

// app makes a process's parts.
func (s *scheduled) app(change ...func(*config.Config)) *app.App {
	s.t.Helper()
	c := config.Default()
	c.Database.URL, c.Database.OwnerURL, c.Server.Secret = s.Group.URL, s.Group.OwnerURL, pgtest.Secret
	c.Server.Addr, c.Server.OpsAddr = "127.0.0.1:0", "127.0.0.1:0"
	c.Database.AcquireTimeout, c.Database.ConnectTimeout, c.Database.LockTimeout = 30*time.Second, 30*time.Second, pgtest.Patience
	c.Migrate.StaleAfter, c.Migrate.Patience = 2*time.Second, pgtest.Patience
	c.Server.ShutdownGrace = time.Minute
	c.Backup.URL = filepath.Join(s.dir, "backups")
	c.Backup.Schedules = []config.Schedule{{Name: "yearly", Cron: "0 0 1 1 *", Select: config.Select{AllTenants: true}, Keep: config.Keep{Last: 1}}}
	for _, f := range change {
		f(&c)
	}
	require.NoError(s.t, c.Validate())
	a, err := app.Open(c, "test", slog.New(slog.NewTextHandler(s.log, nil)))
	require.NoError(s.t, err)
	a.Environ = os.Environ()
	s.t.Cleanup(func() { require.NoError(s.t, a.Close()) })
	return a
}

// due says that the newest due time has passed and nobody has seen it.
func (s *scheduled) due() {
	s.t.Helper()
	const row = `insert into public.schedules (name, spec, seen) values ('yearly', '0 0 1 1 * UTC', $1)
on conflict (name) do update set seen = excluded.seen`
	_, err := s.admin.Exec(context.Background(), row, time.Date(time.Now().UTC().Year(), 1, 1, 0, 0, 0, 0, time.UTC).Add(-time.Hour))
	require.NoError(s.t, err)
	// Whoever looks does so now, and not within half a minute.
	_, err = s.admin.Exec(context.Background(), `insert into river.river_job (kind, args, max_attempts, state) values ('schedule_look', '{}', 1, 'available')`)
	require.NoError(s.t, err)
}

// ended waits until the work on the due time has ended; meanwhile is done again and again.
func (s *scheduled) ended(meanwhile ...string) (st schedule.Standing) {
	s.t.Helper()
	ctx := context.Background()
	require.Eventually(s.t, func() bool {
		for _, sql := range meanwhile {
			_, err := s.admin.Exec(ctx, sql)
			require.NoError(s.t, err)
		}
		all, err := schedule.Standings(ctx, s.DB)
		require.NoError(s.t, err)
		st = all["yearly"]
		return st.Due != nil && !st.AtWork() && st.Due.Equal(st.Seen)
	}, pgtest.Patience, 50*time.Millisecond, "it does not end")
	return st
}

func (s *scheduled) runs(a *app.App) []rollout.Run {
	s.t.Helper()
	runs, err := a.Rollout.List(context.Background(), 100, false)
	require.NoError(s.t, err)
	return runs
}

func (s *scheduled) backups(a *app.App) []backup.Manifest {
	s.t.Helper()
	b, err := a.Backups()
	require.NoError(s.t, err)
	c, err := b.List(context.Background(), "")
	require.NoError(s.t, err)
	require.Empty(s.t, c.Bad)
	return c.Backups
}

// locked holds a lock on a tenant's table until release.
func (s *scheduled) locked(t tenant.Tenant, table, mode string) (release func()) {
	s.t.Helper()
	ctx := context.Background()
	conn := pgtest.Admin(s.t, s.AdminURL)
	tx, err := conn.Begin(ctx)
	require.NoError(s.t, err)
	_, err = tx.Exec(ctx, "lock table "+postgres.Quote(t.Schema.String())+"."+table+" in "+mode+" mode")
	require.NoError(s.t, err)
	return func() { require.NoError(s.t, tx.Rollback(ctx)) }
}

// waiting waits until somebody waits for a lock on a tenant's table.
func (s *scheduled) waiting(t tenant.Tenant, table string) {
	s.t.Helper()
	const query = `select exists (select from pg_catalog.pg_locks l join pg_catalog.pg_class c on c.oid = l.relation
join pg_catalog.pg_namespace n on n.oid = c.relnamespace where not l.granted and n.nspname = $1 and c.relname = $2)`
	require.Eventually(s.t, func() bool {
		var is bool
		require.NoError(s.t, s.admin.QueryRow(context.Background(), query, t.Schema.String(), table).Scan(&is))
		return is
	}, pgtest.Patience, 20*time.Millisecond, "nobody works on %s", t.Slug)
}

func TestServersBackUpOnSchedule(t *testing.T) {
	t.Parallel()
	s := newScheduled(t)
	s.Tenant(t, "acme")
	s.Tenant(t, "globex")
	s.due()
	a, b := s.app(), s.app()
	serve(t, a)
	serve(t, b)
	st := s.ended()
	require.Equal(t, 2, st.OK)
	require.True(t, st.Good())
	runs := s.runs(a)
	require.Len(t, runs, 1, "two servers, one due time, one run")
	require.Equal(t, app.KindBackup, runs[0].Kind)
	require.Equal(t, registry.Done, runs[0].State)
	require.Equal(t, "schedule:yearly", runs[0].Actor)
	require.Equal(t, *st.Run, runs[0].ID)
	first := s.backups(a)
	require.Len(t, first, 2)
	for _, m := range first {
		require.Equal(t, "schedule yearly", m.Reason)
		require.Equal(t, runs[0].ID.String(), m.Run)
	}

	s.due()
	second := s.ended()
	require.NotEqual(t, *st.Run, *second.Run)
	left := s.backups(a)
	require.Len(t, left, 2, "the schedule keeps the newest one of each tenant")
	for _, m := range left {
		require.Equal(t, second.Run.String(), m.Run)
	}
	require.NotContains(t, s.log.String(), "level=ERROR")
}

func TestNothingIsScheduledWithoutAnOwnerOrASchedule(t *testing.T) {
	t.Parallel()
	s := newScheduled(t)
	none, err := s.app(func(c *config.Config) { c.Backup.Schedules = nil }).Scheduler()
	require.NoError(t, err)
	require.Nil(t, none)
	_, err = s.admin.Exec(context.Background(), `drop schema river cascade`)
	require.NoError(t, err)
	serve(t, s.app(func(c *config.Config) { c.Backup.Schedules = nil }))
	serve(t, s.app(func(c *config.Config) { c.Database.OwnerURL = "" }))
	err = s.app().Serve(context.Background(), app.ServeOptions{})
	require.True(t, fault.Is(err, fault.Pending), "%v", err)
}

// flaky makes a program that fails for a tenant while a file is there, and one that keeps what it is given.
func (s *scheduled) flaky(slug string) (change func(*config.Config), flag, told string) {
	s.t.Helper()
	flag, told = filepath.Join(s.dir, "flag"), filepath.Join(s.dir, "told")
	require.NoError(s.t, os.WriteFile(flag, nil, 0o600))
	before := fmt.Sprintf(`if grep -q '"slug":"%s"' && [ -e %s ]; then echo not ready; exit 1; fi`, slug, flag)
	return func(c *config.Config) {
		c.Backup.Hooks.Before = []string{"/bin/sh", "-c", before}
		c.Backup.Alarm = []string{"/bin/sh", "-c", "cat >> " + told}
	}, flag, told
}

// sooner lets retries come at once.
var sooner = []string{
	`update public.operations set finished_at = finished_at - interval '1 hour' where state = 'failed'`,
	`update public.schedules set not_before = null`,
	`update river.river_job set scheduled_at = now(), state = 'available' where state = 'scheduled'`,
}

func TestFailedTenantsAreTriedAgainAndThenTold(t *testing.T) {
	t.Parallel()
	s := newScheduled(t)
	s.Tenant(t, "acme")
	s.Tenant(t, "globex")
	change, flag, told := s.flaky("globex")
	s.due()
	a := s.app(change)
	serve(t, a)
	st := s.ended(sooner...)
	require.Equal(t, 3, st.Tries)
	require.Equal(t, 1, st.OK)
	require.Equal(t, 1, st.Failed)
	require.Len(t, s.runs(a), 1)
	require.Len(t, s.backups(a), 1, "the tenant that failed stops no other one")
	var alarm schedule.Alarm
	text, err := os.ReadFile(told)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &alarm), "%s", text)
	require.Equal(t, schedule.CodeFailed, alarm.Code)
	require.Equal(t, "yearly", alarm.Schedule)
	require.Equal(t, 1, alarm.Failed)
	require.Equal(t, *st.Run, *alarm.Run)
	require.Contains(t, s.log.String(), "code=schedule_failed")

	require.NoError(t, os.Remove(told))
	s.due()
	require.Eventually(t, func() bool { // the first try has failed
		runs := s.runs(a)
		return len(runs) == 2 && runs[0].State == registry.Failed
	}, pgtest.Patience, 20*time.Millisecond)
	require.NoError(t, os.Remove(flag))
	st = s.ended(sooner...)
	require.True(t, st.Good())
	require.Equal(t, 2, st.OK)
	require.Equal(t, 1, st.Tries)
	_, err = os.Stat(told)
	require.ErrorIs(t, err, os.ErrNotExist, "what was made good raises no alarm")
}

func TestAServerThatStopsEndsTheTenantInHand(t *testing.T) {
	t.Parallel()
	s := newScheduled(t)
	acme, globex := s.Tenant(t, "acme"), s.Tenant(t, "globex")
	one, two := s.locked(acme, "records", "access exclusive"), s.locked(globex, "records", "access exclusive")
	s.due()
	single := func(c *config.Config) { c.Backup.Schedules[0].Jobs = 1 }
	a := s.app(single)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(ctx, app.ServeOptions{}) }()
	s.waiting(acme, "records")
	cancel()
	require.Eventually(t, func() bool { return strings.Contains(s.log.String(), "msg=stopped") }, pgtest.Patience, 10*time.Millisecond, "requests are served on")
	one()
	require.NoError(t, <-ended)
	require.Len(t, s.backups(a), 1, "the tenant in hand was finished")
	runs := s.runs(a)
	require.Len(t, runs, 1)
	require.Equal(t, registry.Running, runs[0].State)
	require.Equal(t, 1, runs[0].OK)
	require.Equal(t, 1, runs[0].Queued)
	two()
	serve(t, s.app(single))
	st := s.ended()
	require.Equal(t, 2, st.OK)
	require.Equal(t, runs[0].ID, *st.Run)
	require.Len(t, s.runs(a), 1, "the next server goes on with the run")
	require.Len(t, s.backups(a), 2)
}

func TestAScheduledBackupAndAMigrationExcludeEachOther(t *testing.T) {
	t.Parallel()
	s, ctx := newScheduled(t), context.Background()
	dir := t.TempDir()
	file := func(name, text string) {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
	}
	own := func(c *config.Config) { c.Schemas.Dir, c.Schemas.MinVersion = dir, 1 }
	file("0001_notes.up.sql", "create table notes (id integer primary key);")
	made, err := s.app(own).Provision.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Actor: "test"})
	require.NoError(t, err)
	file("0002_body.up.sql", "alter table notes add column body text;")
	a := s.app(own)
	serve(t, a)

	release := s.locked(made, "notes", "access share")
	migrated := make(chan error, 1)
	go func() {
		_, err := a.Migrate.Tenant(ctx, made, migrate.TenantOptions{})
		migrated <- err
	}()
	s.waiting(made, "notes")
	s.due()
	require.Eventually(t, func() bool { // it is set aside, and not in its way
		runs := s.runs(a)
		if len(runs) != 1 {
			return false
		}
		busy := false
		require.NoError(t, a.Rollout.Tasks(ctx, runs[0].ID, func(r rollout.Reported) error {
			busy = r.State == "queued" && r.Error != nil && r.Error.Code == "operation_running"
			return nil
		}))
		return busy
	}, pgtest.Patience, 20*time.Millisecond, "the backup does not meet the migration")
	require.Empty(t, s.backups(a))
	release()
	require.NoError(t, <-migrated)
	require.True(t, s.ended().Good())
	list := s.backups(a)
	require.Len(t, list, 1)
	require.Equal(t, 2, list[0].Version, "the backup is of the tenant as the migration has left it")

	file("0003_more.up.sql", "alter table notes add column more text;")
	newer := s.app(own)
	release = s.locked(made, "notes", "access exclusive")
	s.due()
	s.waiting(made, "notes")
	_, err = newer.Migrate.Tenant(ctx, made, migrate.TenantOptions{})
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	require.Equal(t, "operation_running", fault.Of(err).Code)
	release()
	require.True(t, s.ended().Good())
	_, err = newer.Migrate.Tenant(ctx, made, migrate.TenantOptions{})
	require.NoError(t, err)
}
