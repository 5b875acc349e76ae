package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tui"
)

// sourceOf is what the dashboard shows of a test's installation.
func sourceOf(t *testing.T, env *pgtest.Env) *fleetSource {
	t.Helper()
	c, _, err := config.Load(config.LoadOptions{Env: append([]string{
		"ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret, "ONEO_REDIS_URL=",
	}, patience...)})
	require.NoError(t, err)
	a, err := app.Open(c, "test", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, a.Close()) })
	return newFleetSource(a)
}

// next is what comes, unless the work ends before.
func next[T any](t *testing.T, c <-chan T, ended <-chan error) (got T) {
	t.Helper()
	select {
	case got = <-c:
	case err := <-ended:
		t.Fatalf("it has ended: %v", err)
	}
	return got
}

// TestWhatATenantsSessionDoesIsSeenAndCancelled looks at a statement of a tenant's and one that waits for it, and cancels by
// the tenant that it is for.
func TestWhatATenantsSessionDoesIsSeenAndCancelled(t *testing.T) {
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight, o.StatementTimeout = 16, 4, time.Hour })
	env.Blind(t)
	acme, beta := env.Tenant(t, "acme"), env.Tenant(t, "beta")
	source := sourceOf(t, env)
	ctx := t.Context()

	// One that holds a lock and sleeps, and one that waits for the lock: another transaction of the tenant.
	begun, pids := make(chan struct{}), make(chan int32, 2)
	ended := make(chan error, 2)
	do := func(sql string, ready chan struct{}) {
		ended <- env.DB.InTenant(context.WithoutCancel(ctx), acme, postgres.Write, func(tx *postgres.Tx) error {
			var pid int32
			if err := tx.QueryRow(ctx, `select pg_catalog.pg_backend_pid()`).Scan(&pid); err != nil {
				return err
			}
			pids <- pid
			if _, err := tx.Exec(ctx, `select pg_catalog.pg_advisory_xact_lock(77)`); err != nil {
				return err
			}
			if ready != nil {
				close(ready)
			}
			_, err := tx.Exec(ctx, sql)
			return err
		})
	}
	go do(`select pg_catalog.pg_sleep(3600), 'it is Ada'`, begun)
	holder := next(t, pids, ended)
	next(t, begun, ended)
	go do(`select 1`, nil)
	waiter := next(t, pids, ended)

	var sessions []tui.Session
	require.Eventually(t, func() bool {
		var err error
		sessions, err = source.Sessions(ctx)
		require.NoError(t, err)
		of := func(pid int32) bool {
			return slices.ContainsFunc(sessions, func(s tui.Session) bool { return s.PID == pid && s.Tenant == "acme" })
		}
		return of(holder) && of(waiter)
	}, pgtest.Patience, 20*time.Millisecond)
	for _, s := range sessions {
		if s.State == "" {
			require.Empty(t, s.Query, "what PostgreSQL does not show is not shown in its words either")
		}
	}
	var locks []tui.Lock
	require.Eventually(t, func() bool {
		var err error
		locks, err = source.Locks(ctx)
		require.NoError(t, err)
		return len(locks) >= 2
	}, pgtest.Patience, 20*time.Millisecond)
	require.True(t, slices.ContainsFunc(locks, func(l tui.Lock) bool {
		return l.PID == waiter && !l.Granted && l.Tenant == "acme" && slices.Contains(l.Behind, holder)
	}), "%+v", locks)
	require.True(t, slices.ContainsFunc(locks, func(l tui.Lock) bool { return l.PID == holder && l.Granted }), "%+v", locks)

	pid := fmt.Sprint(holder)
	_, errs, code := oneo(t, env, nil, "cancel", pid, "-t", beta.Slug.String())
	require.Equal(t, exitNotFound, code, "the session is not beta's: %s", errs)
	_, errs, code = oneo(t, env, nil, "cancel", pid, "-t", "acme")
	require.Equal(t, exitForbidden, code, errs)
	require.Contains(t, errs, "grant pg_signal_backend")
	require.Empty(t, ended, "it is still at work")

	admin := pgtest.Admin(t, env.AdminURL)
	var owner string
	require.NoError(t, env.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select current_user::text`).Scan(&owner)
	}))
	_, err := admin.Exec(ctx, "grant pg_signal_backend to "+postgres.Quote(owner))
	require.NoError(t, err)
	_, errs, code = oneo(t, env, nil, "cancel", pid, "-t", "acme")
	require.Zero(t, code, errs)
	first := <-ended
	second := <-ended
	require.True(t, (first == nil) != (second == nil), "one was cancelled, and the other had its lock then: %v, %v", first, second)
	_, errs, code = oneo(t, env, nil, "cancel", pid, "-t", "acme")
	require.Equal(t, exitNotFound, code, errs)
	audit, err := source.Audit(ctx)
	require.NoError(t, err)
	require.Equal(t, "session.cancel", audit[0].Action)
	require.Equal(t, "acme", audit[0].Tenant)
}

// TestTheFleetIsWhatTheRegistrySays reads every screen of a small fleet.
func TestTheFleetIsWhatTheRegistrySays(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	backups := "ONEO_BACKUP_URL=" + t.TempDir()
	run := func(args ...string) {
		t.Helper()
		_, errs, code := oneo(t, env, []string{backups}, args...)
		require.Zero(t, code, "%v: %s", args, errs)
	}
	run("tenant", "create", "acme", "--admin-email", "ada@example.com")
	run("tenant", "create", "beta")
	run("tenant", "suspend", "beta")
	run("backup", "create", "-t", "acme")
	source := sourceOf(t, env)
	ctx := t.Context()

	f, err := source.Fleet(ctx)
	require.NoError(t, err)
	require.Equal(t, []tui.StateCount{{State: "active", N: 1}, {State: "suspended", N: 1}}, f.Tenants)
	require.Equal(t, []tui.VersionCount{{Version: f.Head, N: 2}}, f.Versions)
	require.Positive(t, f.Database.Max)
	ts, err := source.Tenants(ctx)
	require.NoError(t, err)
	require.Len(t, ts, 2)
	for _, tn := range ts {
		require.Equal(t, f.Head, tn.Version)
		require.Equal(t, tn.Slug+".localhost", tn.Host)
	}
	for range 2 { // the second time from what is remembered of runs that are over
		rs, err := source.Runs(ctx)
		require.NoError(t, err)
		require.Len(t, rs, 1)
		require.Equal(t, []any{"backup", "done", 1, 0}, []any{rs[0].Kind, rs[0].State, rs[0].OK, rs[0].Queued})
		tasks, err := source.Tasks(ctx, rs[0].ID)
		require.NoError(t, err)
		require.Equal(t, "acme", tasks[0].Tenant)
	}
	ops, err := source.Operations(ctx)
	require.NoError(t, err)
	require.NotEmpty(t, ops)
	ds, err := source.Domains(ctx)
	require.NoError(t, err)
	require.Len(t, ds, 2)
	us, err := source.Users(ctx, "acme")
	require.NoError(t, err)
	require.Equal(t, "ada@example.com", us[0].Email)
	ages, err := source.Ages(ctx)
	require.NoError(t, err)
	require.False(t, ages.Set, "this one knows of no store")
	source.a.Config.Backup.URL = backups[len("ONEO_BACKUP_URL="):]
	ages, err = source.Ages(ctx)
	require.NoError(t, err)
	require.Equal(t, []any{true, 2, 1, "acme"}, []any{ages.Set, ages.Tenants, ages.Without, ages.Whose})
	bs, err := source.Backups(ctx)
	require.NoError(t, err)
	require.Len(t, bs, 1)
	host, err := os.Hostname()
	require.NoError(t, err)
	silent := tui.Server{ID: uuid.NewString(), Host: host, OpsAddr: "127.0.0.1:1"}
	require.Equal(t, []tui.Reading{{Server: silent, Err: "the server at 127.0.0.1:1 does not answer"}}, source.Readings(ctx, []tui.Server{silent}),
		"a server that does not answer is one line, not the end")
	_, err = source.Logs(ctx, []tui.Server{silent}, "acme")
	require.ErrorContains(t, err, "the server at 127.0.0.1:1 does not answer")
	source.a.Config.Server.Secret = ""
	require.Equal(t, []tui.Reading{{Server: silent, Err: "server.secret is not set: servers do not tell"}}, source.Readings(ctx, []tui.Server{silent}))
}
