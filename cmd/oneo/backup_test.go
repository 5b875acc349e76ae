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

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// backed is an installation with tenants that are backed up into a directory.
type backed struct {
	t       *testing.T
	env     *pgtest.Env
	admin   *pgx.Conn
	extra   []string
	dir     string // the store
	tenants int
}

func newBacked(t *testing.T, tenants int, extra ...string) *backed {
	t.Helper()
	_, err := plainOneo()
	require.NoError(t, err)
	f := &backed{t: t, env: pgtest.New(t), dir: filepath.Join(t.TempDir(), "store"), tenants: tenants}
	f.extra = append([]string{plain, staleAfter, "ONEO_BACKUP_URL=" + f.dir}, extra...)
	f.admin = pgtest.Admin(t, f.env.AdminURL)
	for i := range tenants {
		f.env.Tenant(t, fmt.Sprintf("t%03d", i))
	}
	return f
}

func (f *backed) run(extra []string, args ...string) (stdout, stderr string, code int) {
	f.t.Helper()
	return oneo(f.t, f.env, append(f.extra[:len(f.extra):len(f.extra)], extra...), args...)
}

func (f *backed) sql(text string) {
	f.t.Helper()
	_, err := f.admin.PgConn().Exec(f.t.Context(), text).ReadAll()
	require.NoError(f.t, err)
}

// died makes the signs of life of a process that was killed old.
func (f *backed) died() {
	f.t.Helper()
	f.sql(`update public.tasks set heartbeat = now() - interval '1 hour' where state = 'running';
update public.operations set heartbeat = now() - interval '1 hour' where state = 'running'`)
}

// each is how many backups each tenant has.
func (f *backed) each() map[string]int {
	f.t.Helper()
	stdout, stderr, code := f.run(nil, "backup", "list", "-o", "json")
	require.Zero(f.t, code, stderr)
	require.NotContains(f.t, stderr, "not a backup")
	var list []struct{ Tenant string }
	require.NoError(f.t, json.Unmarshal([]byte(stdout), &list))
	n := map[string]int{}
	for _, b := range list {
		n[b.Tenant]++
	}
	return n
}

// leftovers are the files of archives that were not written to their end, and archives without a manifest.
func (f *backed) leftovers() (halves, loose []string) {
	f.t.Helper()
	require.NoError(f.t, filepath.WalkDir(f.dir, func(name string, e os.DirEntry, err error) error {
		switch stem, archived := strings.CutSuffix(name, ".oneo"); {
		case err != nil || e.IsDir():
			return err
		case strings.HasPrefix(e.Name(), "."):
			halves = append(halves, name)
		case archived:
			if _, err := os.Stat(stem + ".json"); err != nil {
				loose = append(loose, name)
			}
		}
		return nil
	}))
	return halves, loose
}

func (f *backed) want(n int) map[string]int {
	all := map[string]int{}
	for i := range f.tenants {
		all[fmt.Sprintf("t%03d", i)] = n
	}
	return all
}

var createAll = []string{"backup", "create", "--all-tenants", "--jobs", "2", "--progress", "none"}

// F48, F12: kill -9 at every place of a run of backups, then the same command: each tenant is backed up once, and what is
// there is whole.
func TestKilledBackupsGoOn(t *testing.T) {
	t.Parallel()
	f := newBacked(t, 4)
	rounds := 0
	for _, point := range failpoint.All {
		kind, _, _ := strings.Cut(point, ".")
		if kind != "run" && kind != "backup" && kind != "export" || point == "run.planning" {
			continue
		}
		place := point + "=exit@3"
		if strings.HasPrefix(point, "run.planned") || strings.HasPrefix(point, "run.settl") {
			place = point + "=exit"
		}
		rounds++
		_, stderr, code := f.run([]string{"ONEO_FAILPOINTS=" + place}, createAll...)
		require.Equalf(t, 137, code, "%s did not fire: %s", place, stderr)
		f.died()
		_, stderr, code = f.run(nil, createAll...)
		require.Zerof(t, code, "again after %s: %s", place, stderr)
		require.Contains(t, stderr, "going on with the run", point)
		require.Equal(t, f.want(rounds), f.each(), point)
	}
	require.Greater(t, rounds, 8)
	_, stderr, code := f.run(nil, "backup", "verify", "--all")
	require.Zero(t, code, stderr)

	// What the killed have left was never listed. When it is old it is swept, and nothing else is.
	halves, loose := f.leftovers()
	require.NotEmpty(t, halves)
	require.NotEmpty(t, loose)
	_, stderr, code = f.run(nil, "backup", "prune", "--keep-last", "1000")
	require.Zero(t, code, stderr)
	again, alone := f.leftovers()
	require.Equal(t, [][]string{halves, loose}, [][]string{again, alone}, "what is young may be at work")
	long := time.Now().Add(-8 * 24 * time.Hour)
	for _, file := range append(halves, loose...) {
		require.NoError(t, os.Chtimes(file, long, long))
	}
	_, stderr, code = f.run(nil, "backup", "prune", "--keep-last", "1000", "--yes")
	require.Zero(t, code, stderr)
	halves, loose = f.leftovers()
	require.Empty(t, halves)
	require.Empty(t, loose)
	require.Equal(t, f.want(rounds), f.each())

	// One that was begun long ago is not gone on with: it would leave who was done then without a backup of now.
	_, stderr, code = f.run([]string{"ONEO_FAILPOINTS=backup.begun=exit@3"}, createAll...)
	require.Equal(t, 137, code, stderr)
	f.died()
	f.sql(`update public.operations set created_at = created_at - interval '7 hours' where state = 'running'`)
	_, stderr, code = f.run(nil, createAll...)
	require.Zero(t, code, stderr)
	require.Contains(t, stderr, "it is aborted, and a new one begins")
	require.NotContains(t, stderr, "going on with the run")
	for tenant, n := range f.each() {
		require.GreaterOrEqual(t, n, rounds+1, tenant)
	}
	f.env.Invariants(t)
}

// A tenant on which another operation is at work is set aside; Ctrl-C breaks off what is in hand, exits 130 and says how
// to go on, and that does.
func TestInterruptedBackups(t *testing.T) {
	t.Parallel()
	f := newBacked(t, 4)
	f.sql(`select pg_advisory_lock(7302658, (select number from public.tenants where slug = 't001'))`)
	cmd := child(f.env, append(f.extra, "ONEO_MIGRATE_PATIENCE=10m"), createAll[:len(createAll)-2]...)
	logs := &buffer{}
	cmd.Stderr = logs
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return len(f.each()) == 3 }, pgtest.Patience, 100*time.Millisecond)
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.Error(t, cmd.Wait())
	require.Equal(t, exitInterrupted, cmd.ProcessState.ExitCode(), logs.String())
	_, rest, ok := strings.Cut(logs.String(), "To go on: oneo ")
	require.True(t, ok, logs.String())
	require.NotContains(t, f.each(), "t001")

	f.sql(`select pg_advisory_unlock_all()`)
	_, stderr, code := f.run(nil, strings.Fields(strings.TrimRight(strings.SplitN(rest, "\n", 2)[0], "\"}"))...)
	require.Zero(t, code, stderr)
	require.Equal(t, f.want(1), f.each())
}

// A tenant that cannot be backed up does not stop the others: exit 3, and retry does the rest.
func TestFailedBackupIsRetried(t *testing.T) {
	t.Parallel()
	f := newBacked(t, 4)
	stdout, stderr, code := f.run([]string{`ONEO_BACKUP_HOOKS_BEFORE=/bin/sh,-c,! grep t002`}, createAll...)
	require.Equal(t, exitSomeFailed, code, stderr)
	require.Regexp(t, `t002 +failed`, stdout)
	require.Contains(t, stdout, "the program before the backup failed")
	require.Contains(t, stderr, "oneo migrate run retry")
	want := f.want(1)
	delete(want, "t002")
	require.Equal(t, want, f.each())
	stdout, stderr, code = f.run([]string{`ONEO_BACKUP_HOOKS_AFTER=/bin/sh,-c,echo oh no; exit 1`}, "migrate", "run", "retry", "last")
	require.Zero(t, code, stderr)
	require.Contains(t, stderr, "t002: the program after the backup failed: /bin/sh: exit status 1: oh no")
	require.Equal(t, 4, strings.Count(stdout, " ok "), stdout)
	require.Equal(t, f.want(1), f.each())
}
