package provision_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// started is a task in a process of its own that is at work.
type started struct {
	cmd *exec.Cmd
	out *bytes.Buffer
}

func (k task) start(t *testing.T, failpoints string) started {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	raw, err := json.Marshal(k)
	require.NoError(t, err)
	s := started{exec.Command(self), &bytes.Buffer{}}
	s.cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+failpoints)
	s.cmd.Stdout, s.cmd.Stderr = s.out, s.out
	require.NoError(t, s.cmd.Start())
	t.Cleanup(func() { _ = s.cmd.Process.Kill() })
	return s
}

func (s started) signal(t *testing.T, sig syscall.Signal) {
	t.Helper()
	require.NoError(t, s.cmd.Process.Signal(sig))
}

func (f fixture) eventually(t *testing.T, sql string) {
	t.Helper()
	admin := pgtest.Admin(t, f.env.AdminURL)
	require.Eventually(t, func() bool {
		var is bool
		return admin.QueryRow(t.Context(), sql).Scan(&is) == nil && is
	}, pgtest.Patience, 10*time.Millisecond, sql)
}

func (f fixture) restore(t *testing.T, name string) provision.Restored {
	t.Helper()
	done, err := f.p.Restore(t.Context(), pgtest.Slug(t, "acme"), provision.RestoreRequest{Fill: oneUser(name), Keep: time.Hour, Actor: "test"})
	require.NoError(t, err)
	return done
}

// A process stands still in the middle of its restore and another one takes it for dead. Neither breaks what the other does,
// whichever of them ends it.
func TestRestoreOfAProcessThatWasTakenForDead(t *testing.T) {
	t.Parallel()
	t.Run("before the swap commits", func(t *testing.T) {
		t.Parallel()
		for _, group := range []string{"main", "second"} {
			t.Run(group, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, group)
				f.prepare(t, "restore", group)
				slow := task{Operation: "restore", Group: group, Groups: f.groups, Silent: true}
				gate := filepath.Join(t.TempDir(), "go")
				a := slow.start(t, "restore.schema=wait:"+gate)
				f.eventually(t, `select exists (select from public.operations where kind = 'tenant.restore' and state = 'running')`)
				f.eventually(t, fmt.Sprintf(`select exists (select from pg_locks l join pg_database d on d.oid = l.database
	where d.datname = %s and l.locktype = 'advisory' and l.granted and l.classid = %d)`, f.database(group), postgres.OperationLock))
				// Another one takes it up, cannot get the lock, and is interrupted. What it does then must not call failed what succeeds.
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() {
					_, err := f.p.Suspend(ctx, pgtest.Slug(t, "acme"), "test")
					ended <- err
				}()
				f.eventually(t, `select attempts = 2 from public.operations where kind = 'tenant.restore'`)
				f.eventually(t, `select exists (select from pg_stat_activity where datname = `+f.database(group)+` and query like '%pg_try_advisory_xact_lock%' and pid <> pg_backend_pid())`)
				require.NoError(t, os.WriteFile(gate, nil, 0o600))
				cancel()
				<-ended
				require.NoError(t, a.cmd.Wait(), a.out.String())
				require.Equal(t, "restored@acme.example", f.users(t, "acme"))
				require.Equal(t, "done 1", f.scalar(t, `select (select state from public.operations where kind = 'tenant.restore') || ' ' ||
	(select count(*) from public.audit where action = 'tenant.restore' and details ? 'kept_until')`))
				restore, err := uuid.Parse(f.scalar(t, `select id::text from public.operations where kind = 'tenant.restore'`))
				require.NoError(t, err)
				_, err = f.p.Return(t.Context(), pgtest.Slug(t, "acme"), restore, "test")
				require.NoError(t, err)
				require.Equal(t, "before@acme.example", f.users(t, "acme"))
				f.invariants(t)
			})
		}
	})
	t.Run("before it has the lock", func(t *testing.T) {
		t.Parallel()
		f := newFixture(t, "main")
		f.prepare(t, "restore", "main")
		tn, err := find(t.Context(), f.db, "acme")
		require.NoError(t, err)
		lock := pgtest.Admin(t, f.env.AdminURL)
		_, err = lock.Exec(t.Context(), `select pg_advisory_lock($1::int4, $2::int4)`, postgres.OperationLock, tn.Number)
		require.NoError(t, err)
		a := task{Operation: "restore", Group: "main", Groups: f.groups, Silent: true}.start(t, "")
		f.eventually(t, `select exists (select from public.operations where kind = 'tenant.restore' and state = 'running')`)
		f.eventually(t, `select exists (select from pg_stat_activity where datname = `+f.database("main")+` and query like '%pg_try_advisory_xact_lock%' and pid <> pg_backend_pid())`)
		f.stop(t, a, "main")
		_, err = lock.Exec(t.Context(), `select pg_advisory_unlock_all()`)
		require.NoError(t, err)
		f.restore(t, "later")
		a.signal(t, syscall.SIGCONT)
		require.Error(t, a.cmd.Wait())
		require.Contains(t, a.out.String(), "was taken back")
		require.Equal(t, "later@acme.example", f.users(t, "acme"))
		require.Equal(t, "1", f.scalar(t, `select count(*)::text from public.operations where state = 'failed'`))
		f.invariants(t)
	})
}

// stop makes a process stand still, and returns when it does and no statement of it is at work.
func (f fixture) stop(t *testing.T, a started, group string) {
	t.Helper()
	a.signal(t, syscall.SIGSTOP)
	require.Eventually(t, func() bool {
		state, err := exec.Command("ps", "-o", "state=", "-p", strconv.Itoa(a.cmd.Process.Pid)).Output()
		return err == nil && strings.HasPrefix(string(state), "T")
	}, pgtest.Patience, 10*time.Millisecond)
	f.eventually(t, `select not exists (select from pg_stat_activity where datname = `+f.database(group)+` and state = 'active' and pid <> pg_backend_pid())`)
}

// database is the name of a group's, quoted for SQL.
func (f fixture) database(group string) string {
	cfg, err := pgx.ParseConfig(f.groups[group].URL)
	if err != nil {
		panic(err)
	}
	return "'" + cfg.Database + "'"
}

// Undoing is refused where it would say what is not so, in one database and in two.
func TestARestoreIsUndoneOnce(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx, acme := t.Context(), pgtest.Slug(t, "acme")
			f.prepare(t, "restore", group)
			one := f.restore(t, "one")
			two := f.restore(t, "two")
			_, err := f.p.Return(ctx, acme, one.Operation, "test")
			requireFault(t, err, fault.Conflict, "restored_since")
			_, err = f.p.Return(ctx, acme, two.Operation, "test")
			require.NoError(t, err)
			require.Equal(t, "one@acme.example", f.users(t, "acme"))
			tn, err := f.p.Suspend(ctx, acme, "test")
			require.NoError(t, err)
			until, err := f.p.CheckReturn(ctx, tn, one.Operation)
			require.NoError(t, err)
			require.True(t, until.Equal(one.Kept))
			_, err = f.p.Return(ctx, acme, one.Operation, "test")
			require.NoError(t, err, "a suspended tenant's as well")
			_, err = f.p.Resume(ctx, acme, "test")
			require.NoError(t, err)
			require.Equal(t, "before@acme.example", f.users(t, "acme"))
			f.restore(t, "three")
			_, err = f.p.Return(ctx, acme, one.Operation, "test")
			requireFault(t, err, fault.Conflict, "undone_already")
			_, err = f.p.CheckReturn(ctx, tn, one.Operation)
			require.Error(t, err)
			require.Equal(t, "three@acme.example", f.users(t, "acme"))
			_, err = f.p.Return(ctx, acme, uuid.New(), "test")
			requireFault(t, err, fault.NotFound, "nothing_kept")
			f.invariants(t)
		})
	}
}

// What has happened to the tenant between the restore and its undo does not matter: another name, another schema, a drop that
// was taken back, each setting of isolation.
func TestUndoOfARestoreLater(t *testing.T) {
	t.Parallel()
	for _, by := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		t.Run(fmt.Sprint(by), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, func(o *postgres.Options) { o.Isolation = by })
			_, p, m, err := openOn(env.DB)
			require.NoError(t, err)
			f := fixture{env: env, groups: map[string]postgres.Group{"main": env.Group}, db: env.DB, p: p, m: m}
			ctx := t.Context()
			f.prepare(t, "restore", "main")
			done := f.restore(t, "restored")
			f.env.Invariants(t)
			to := pgtest.Slug(t, "globex")
			_, err = f.p.Rename(ctx, pgtest.Slug(t, "acme"), provision.RenameRequest{Slug: to, Schema: to.Schema(), Actor: "test"})
			require.NoError(t, err)
			_, err = f.p.Drop(ctx, to, time.Hour, "test")
			require.NoError(t, err)
			_, err = f.p.Return(ctx, to, done.Operation, "test")
			requireFault(t, err, fault.Conflict, "wrong_state")
			_, err = f.p.Undrop(ctx, to, "test")
			require.NoError(t, err)
			_, err = f.p.Return(ctx, to, done.Operation, "test")
			require.NoError(t, err)
			require.Equal(t, "before@acme.example", f.users(t, "globex"))
			require.Equal(t, "globex", f.scalar(t, `select schema from public.placements`))
			tn, err := find(ctx, f.db, "globex")
			require.NoError(t, err)
			require.NoError(t, f.db.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `update users set name = 'Ann'`)
				return err
			}))
			f.invariants(t)
			_, err = f.p.Drop(ctx, to, time.Hour, "test")
			require.NoError(t, err)
			_, err = f.p.Purge(ctx, to, "test")
			require.NoError(t, err)
			f.invariants(t)
			require.Equal(t, "0", f.scalar(t, `select count(*)::text from pg_namespace where nspname like 'oneo_%'`))
		})
	}
}

// While the rows come in the tenant is served, and nothing of it waits for hours; what is kept is kept from the swap on.
func TestBesideALongRestore(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx := t.Context()
	f.prepare(t, "restore", "main")
	tn, err := find(ctx, f.db, "acme")
	require.NoError(t, err)
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, err = admin.Exec(ctx, `set lock_timeout = '1ms'`)
	require.NoError(t, err)
	var filled time.Time
	fill := oneUser("restored")
	rows := fill.Rows
	fill.Rows = func(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) error {
		// What a run of `oneo sql` does in each tenant.
		if _, err := admin.Exec(ctx, `insert into public.marks (run, tenant) values (gen_random_uuid(), $1)`, tn.Number); err != nil {
			return err
		}
		if got := f.users(t, "acme"); got != "before@acme.example" {
			return fmt.Errorf("the tenant has %s", got)
		}
		for _, change := range []func() error{ // another process's changes are refused, not mixed in
			func() error { _, err := f.p.DropNow(ctx, tn); return err },
			func() error { _, err := f.p.RenameNow(ctx, tn, "globex"); return err },
		} {
			if err := change(); fault.Of(err).StableCode() != "operation_running" {
				return fmt.Errorf("not refused beside a restore: %w", err)
			}
		}
		if err := tx.QueryRow(ctx, `select pg_catalog.clock_timestamp() from pg_catalog.pg_sleep(1)`).Scan(&filled); err != nil {
			return err
		}
		return rows(ctx, tx, at)
	}
	done, err := f.p.Restore(ctx, pgtest.Slug(t, "acme"), provision.RestoreRequest{Fill: fill, Keep: time.Hour, Actor: "test"})
	require.NoError(t, err)
	require.False(t, done.Kept.Add(-time.Hour).Before(filled), "kept for an hour from the swap on")
	require.Equal(t, "restored@acme.example", f.users(t, "acme"))
	f.invariants(t)
}

// What is loaded beside a tenant is compared with the tenant as it is when nobody else changes it any more.
func TestBesideATenantThatWasChanged(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	f.prepare(t, "restore", "main")
	tn, err := find(t.Context(), f.db, "acme")
	require.NoError(t, err)
	other := pgtest.Admin(t, f.env.AdminURL)
	_, err = other.Exec(t.Context(), `select pg_advisory_lock($1::int4, $2::int4)`, postgres.OperationLock, tn.Number)
	require.NoError(t, err)
	ended := make(chan error, 1)
	go func() {
		ended <- f.p.Beside(context.Background(), tn.Slug, oneUser("restored"), func(context.Context, *postgres.OwnerTx, structure.Schema, structure.Schema) error { return nil })
	}()
	f.eventually(t, `select exists (select from pg_stat_activity where datname = `+f.database("main")+` and query like '%pg_try_advisory_xact_lock%' and pid <> pg_backend_pid())`)
	_, err = other.Exec(t.Context(), `update public.tenants set epoch = epoch + 1`)
	require.NoError(t, err)
	_, err = other.Exec(t.Context(), `select pg_advisory_unlock_all()`)
	require.NoError(t, err)
	requireFault(t, <-ended, fault.Conflict, "tenant_changed")
	f.invariants(t)
}

// Whom a person has let into the tenant's schema is kept out of what is kept, and is let in again by the undo.
func TestOthersRightsAreKept(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx := t.Context()
	f.prepare(t, "restore", "main")
	admin := pgtest.Admin(t, f.env.AdminURL)
	role := "report_" + f.env.Database
	_, err := admin.PgConn().Exec(ctx, "create role "+role+"; create role "+role+"_gone; grant usage on schema acme to "+role+" with grant option; grant usage on schema acme to "+role+"_gone").ReadAll()
	require.NoError(t, err)
	t.Cleanup(func() {
		_, err := admin.PgConn().Exec(context.Background(), "drop owned by "+role+"; drop role "+role).ReadAll()
		require.NoError(t, err)
	})
	may := func() string {
		return f.scalar(t, `select coalesce(string_agg(n.nspname::text || ' ' || a.is_grantable::text, ', ' order by n.nspname), '') from pg_namespace n, aclexplode(n.nspacl) a where a.grantee = '`+role+`'::regrole`)
	}
	require.Equal(t, "acme true", may())
	done := f.restore(t, "restored")
	require.Empty(t, may())
	f.invariants(t)
	_, err = admin.Exec(ctx, "drop role "+role+"_gone")
	require.NoError(t, err)
	_, err = admin.Exec(ctx, "grant usage on schema acme to public")
	require.NoError(t, err)
	_, err = f.p.Return(ctx, pgtest.Slug(t, "acme"), done.Operation, "test")
	require.NoError(t, err)
	require.Equal(t, "acme true", may())
	require.Equal(t, "before@acme.example", f.users(t, "acme"))
	f.invariants(t)
}

// A restore, and its undo, need one connection: an owner's pool of one must not wait for itself.
func TestRestoreWithOneConnection(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.OwnerConns = 1; o.AcquireTimeout = 2 * time.Second })
	_, p, m, err := openOn(env.DB, func(o *provision.Options) { o.StaleAfter = time.Hour }) // no signs of life
	require.NoError(t, err)
	f := fixture{env: env, groups: map[string]postgres.Group{"main": env.Group}, db: env.DB, p: p, m: m}
	f.prepare(t, "restore", "main")
	bad := provision.Filling{Version: 1, Rows: func(context.Context, *postgres.OwnerTx, structure.Schema) error {
		return fault.New(fault.Unverified, "no archive")
	}}
	_, err = f.p.Restore(t.Context(), pgtest.Slug(t, "acme"), provision.RestoreRequest{Fill: bad, Keep: time.Hour, Actor: "test"})
	requireFault(t, err, fault.Unverified, "unverified")
	f.invariants(t)
	done := f.restore(t, "restored")
	require.Equal(t, "restored@acme.example", f.users(t, "acme"))
	_, err = f.p.Return(t.Context(), pgtest.Slug(t, "acme"), done.Operation, "test")
	require.NoError(t, err)
	f.invariants(t)
}

// A process that is killed behind the swap leaves nobody with what was known of the rows before, and the next command on the
// tenant finishes it: here the undo.
func TestKilledBehindTheSwap(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			f.prepare(t, "restore", group)
			const generation = `select cache_generation::text from public.tenants`
			before := f.scalar(t, generation)
			a := task{Operation: "restore", Group: group, Groups: f.groups}.start(t, "restore.finish=exit")
			require.Error(t, a.cmd.Wait())
			require.Equal(t, 137, a.cmd.ProcessState.ExitCode(), a.out.String())
			require.Equal(t, "restored@acme.example", f.users(t, "acme"))
			if group == "main" {
				require.NotEqual(t, before, f.scalar(t, generation))
			}
			restore, err := uuid.Parse(f.scalar(t, `select id::text from public.operations where kind = 'tenant.restore' and state = 'running'`))
			require.NoError(t, err)
			_, err = f.p.Return(t.Context(), pgtest.Slug(t, "acme"), restore, "test")
			require.NoError(t, err)
			require.NotEqual(t, before, f.scalar(t, generation))
			require.Equal(t, "before@acme.example", f.users(t, "acme"))
			require.Equal(t, "done", f.scalar(t, `select state from public.operations where kind = 'tenant.restore'`))
			f.invariants(t)
		})
	}
}
