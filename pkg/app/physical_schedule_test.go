package app_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/schedule"
)

// newArchived is an installation on a server of its own, which archives its WAL into dir/physical as soon as there is a repository.
func newArchived(t *testing.T) (s *scheduled, superuser string, open func(...func(*config.Config)) *app.App) {
	t.Helper()
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "oneo-archived-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	engine, err := physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(dir, "physical", "main")})
	require.NoError(t, err)
	plan, err := engine.Plan(ctx)
	require.NoError(t, err)
	plan.Settings["track_commit_timestamp"] = "on"
	pg, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true, Settings: plan.Settings})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, pg.Stop(context.Background())) })
	superuser = pg.URL("oneo")
	as := func(role string) string { return strings.Replace(superuser, "postgres@", role+"@", 1) }
	s = &scheduled{Env: &pgtest.Env{Group: postgres.Group{URL: as("oneo_app"), OwnerURL: as("oneo_owner"), DirectURL: as("oneo_owner")}, AdminURL: superuser}, t: t, dir: dir, log: &safeBuffer{}}
	open = func(change ...func(*config.Config)) *app.App {
		return s.app(append([]func(*config.Config){func(c *config.Config) {
			c.Backup.URL, c.Backup.Schedules = "", nil
			c.Backup.Physical = config.Physical{Engine: physical.FilesName, Dir: filepath.Join(dir, "physical")}
		}}, change...)...)
	}
	a := open()
	_, err = app.Init(ctx, a.Config, app.InitOptions{AdminURL: superuser, Logf: t.Logf})
	require.NoError(t, err)
	_, err = a.MigrateShared(ctx)
	require.NoError(t, err)
	s.DB, s.admin = a.DB, pgtest.Admin(t, superuser)
	return s, superuser, open
}

func (s *scheduled) physicalDue(kind string) {
	s.t.Helper()
	s.due()
	_, err := s.admin.Exec(context.Background(), `update public.schedules set spec = $1`, kind+" 0 0 1 1 * UTC")
	require.NoError(s.t, err)
}

// anew lets retries come at once, and looks for what is due: the job queue takes the job of a due time for the last one's while it has not
// noted that this has ended.
var anew = append([]string{`insert into river.river_job (kind, args, max_attempts, state) select 'schedule_look', '{}', 1, 'available'
where not exists (select from river.river_job where kind = 'schedule_look' and state in ('available', 'running'))`}, sooner...)

// told is what the program of the last alarm was told, and forgets that.
func told(t *testing.T, file string) (alarm struct {
	schedule.Alarm
	Kind string
}) {
	t.Helper()
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &alarm), "%s", text)
	require.NoError(t, os.Remove(file))
	return alarm
}

func TestServersBackUpClustersOnSchedule(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, superuser, open := newArchived(t)
	heard := filepath.Join(s.dir, "told")
	a := open(func(c *config.Config) {
		c.Backup.Schedules = []config.Schedule{{Name: "yearly", Kind: config.KindPhysical, Cron: "0 0 1 1 *", Keep: config.Keep{Last: 1}}}
		c.Backup.Alarm = []string{"/bin/sh", "-c", "cat >> " + heard}
	})
	stop := begin(t, a)

	// A machine that has no repository says so at once, and loudly.
	s.physicalDue(config.KindPhysical)
	st := s.ended(anew...)
	require.Equal(t, [2]int{0, 1}, [2]int{st.OK, st.Failed})
	require.Contains(t, st.Err, "main: there is no repository for physical backups in "+s.dir)
	require.Zero(t, st.Tries)
	alarm := told(t, heard)
	require.Equal(t, schedule.CodeFailed, alarm.Code)
	require.Equal(t, "physical", alarm.Kind)
	require.Contains(t, s.log.String(), "a scheduled physical backup has failed")

	clusters, err := a.PhysicalClusters()
	require.NoError(t, err)
	err = a.MeetPhysical(ctx, clusters[0], pgtest.New(t).AdminURL)
	require.True(t, fault.Is(err, fault.Conflict), "another cluster's superuser: %v", err)
	require.NoError(t, a.MeetPhysical(ctx, clusters[0], superuser))
	labels := func() (all []string) {
		info, err := clusters[0].Engine.Info(ctx)
		require.NoError(t, err)
		for _, b := range info.Backups {
			all = append(all, b.Label)
		}
		return all
	}
	s.physicalDue(config.KindPhysical)
	st = s.ended(anew...)
	require.True(t, st.Good(), st.Err)
	require.Equal(t, 1, st.OK)
	first := labels()
	require.Len(t, first, 1)

	// A due time whose backup there is already makes no other one; what is not kept goes.
	var second physical.Backup
	require.Eventually(t, func() bool {
		second, _, err = a.CreatePhysical(ctx, clusters[0], physical.CreateOptions{})
		if fault.Is(err, fault.Locked) { // its label would be the first one's
			return false
		}
		require.NoError(t, err)
		return true
	}, pgtest.Patience, 100*time.Millisecond)
	require.Len(t, labels(), 2)
	s.physicalDue(config.KindPhysical)
	st = s.ended(anew...)
	require.True(t, st.Good(), st.Err)
	require.Equal(t, []string{second.Label}, labels())
	stop()
	s.rehearse(open)
}

// rehearse goes on with schedules that recover the clusters: there is a backup.
func (s *scheduled) rehearse(open func(...func(*config.Config)) *app.App) {
	t, ctx := s.t, context.Background()
	heard := filepath.Join(s.dir, "told")
	two := 2
	a := open(func(c *config.Config) {
		c.Backup.Schedules = []config.Schedule{{Name: "yearly", Kind: config.KindPhysicalDrill, Cron: "0 0 1 1 *", Sample: &two}}
		c.Backup.Alarm = []string{"/bin/sh", "-c", "cat >> " + heard}
	})
	for _, slug := range []string{"acme", "beta", "gamma"} {
		_, err := a.Provision.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, slug), Actor: "test"})
		require.NoError(t, err)
	}
	clusters, err := a.PhysicalClusters()
	require.NoError(t, err)
	var b physical.Backup
	require.Eventually(t, func() bool { // its label must not be the last one's
		b, _, err = a.CreatePhysical(ctx, clusters[0], physical.CreateOptions{})
		return !fault.Is(err, fault.Locked)
	}, pgtest.Patience, 100*time.Millisecond)
	require.NoError(t, err)
	gone, err := a.PrunePhysical(ctx, clusters[0], backup.Policy{Last: 1})
	require.NoError(t, err)
	require.Len(t, gone, 1, "the tenants are there at any moment")
	// Whoever restores meanwhile has a cluster of his own.
	past, err := a.Recover(ctx, app.PastOptions{Moment: app.Moment{Time: b.Stop}, Why: t.Name(), Say: t.Logf, Report: func(string, physical.Progress) {}})
	require.NoError(t, err)
	leave := sync.OnceFunc(func() { require.NoError(t, past.Close()) })
	defer leave()
	for _, sql := range []string{
		`insert into public.physical_proofs select 'main', now(), 'x', 1, 1, now() - n * interval '1 hour', 1 from generate_series(1, 120) n`,
		`insert into public.physical_proofs select 'other', now(), 'x', 1, 1, now() - n * interval '1 year', 1 from generate_series(1, 2) n`,
	} {
		_, err := s.admin.Exec(ctx, sql)
		require.NoError(t, err)
	}

	begin(t, a)
	s.physicalDue(config.KindPhysicalDrill)
	st := s.ended(anew...)
	require.True(t, st.Good(), st.Err)
	require.Equal(t, 2, st.OK)
	require.NoFileExists(t, heard)
	proofs, err := a.PhysicalProofs(ctx)
	require.NoError(t, err)
	require.Equal(t, b.Label, proofs["main"].Backup)
	require.Equal(t, 2, proofs["main"].Tenants)
	require.False(t, proofs["main"].Target.Before(b.Stop))
	kept := func() (main, other int) {
		const count = `select count(*) filter (where cluster = 'main'), count(*) filter (where cluster = 'other') from public.physical_proofs`
		require.NoError(t, s.admin.QueryRow(ctx, count).Scan(&main, &other))
		return main, other
	}
	main, other := kept()
	require.Equal(t, [2]int{100, 2}, [2]int{main, other}, "the last 100 of each cluster")
	var n int
	require.NoError(t, past.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select count(*) from public.tenants`).Scan(&n)
	}))
	require.Equal(t, 3, n)
	scratch, err := os.ReadDir(a.ScratchDir())
	require.NoError(t, err)
	require.Len(t, scratch, 1, "the drill's is gone")
	leave()

	// What may pass is tried again before anything is recovered.
	repo := clusters[0].Where
	whose := filepath.Join(repo, "cluster.json")
	require.NoError(t, os.Rename(whose, whose+".away"))
	require.NoError(t, os.Symlink(filepath.Base(whose), whose))
	s.physicalDue(config.KindPhysicalDrill)
	st = s.ended(anew...)
	require.Equal(t, 3, st.Tries)
	require.NotEmpty(t, st.Err)
	require.NoError(t, os.Rename(whose+".away", whose))
	require.Equal(t, schedule.CodeFailed, told(t, heard).Code)

	// A recovery that fails has failed, whatever may pass: no other moment is tried.
	require.NoError(t, os.Remove(a.ScratchDir()))
	require.NoError(t, os.WriteFile(a.ScratchDir(), nil, 0o600))
	s.physicalDue(config.KindPhysicalDrill)
	st = s.ended(anew...)
	require.Zero(t, st.Tries)
	require.NotEmpty(t, st.Err)
	require.NoError(t, os.Remove(a.ScratchDir()))
	require.Equal(t, schedule.CodeFailed, told(t, heard).Code)

	// So it has from a backup that is damaged.
	manifest := filepath.Join(repo, "base", b.Label, "backup_manifest")
	text, err := os.ReadFile(manifest)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(manifest, text[:len(text)/2], 0o600))
	s.physicalDue(config.KindPhysicalDrill)
	st = s.ended(anew...)
	require.Zero(t, st.Tries)
	require.Contains(t, st.Err, "damaged")
	alarm := told(t, heard)
	require.Equal(t, schedule.CodeFailed, alarm.Code)
	require.Equal(t, "physical-drill", alarm.Kind)
	require.Contains(t, s.log.String(), "a scheduled physical drill has failed")

	// So does a machine without the repository.
	require.NoError(t, os.Rename(repo, repo+".away"))
	s.physicalDue(config.KindPhysicalDrill)
	st = s.ended(anew...)
	require.NoError(t, os.Rename(repo+".away", repo))
	require.Zero(t, st.Tries)
	require.Contains(t, st.Err, "main: there is no repository for physical backups in "+s.dir)
	require.Equal(t, schedule.CodeFailed, told(t, heard).Code)
	main, _ = kept()
	require.Equal(t, 100, main)
}
