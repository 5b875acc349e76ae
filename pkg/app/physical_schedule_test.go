package app_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
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

func (s *scheduled) physicalDue() {
	s.t.Helper()
	s.due()
	_, err := s.admin.Exec(context.Background(), `update public.schedules set spec = 'physical 0 0 1 1 * UTC'`)
	require.NoError(s.t, err)
}

func TestServersBackUpClustersOnSchedule(t *testing.T) {
	t.Parallel()
	ctx := context.Background()
	s, superuser, open := newArchived(t)
	told := filepath.Join(s.dir, "told")
	a := open(func(c *config.Config) {
		c.Backup.Schedules = []config.Schedule{{Name: "yearly", Kind: config.KindPhysical, Cron: "0 0 1 1 *", Keep: config.Keep{Last: 1}}}
		c.Backup.Alarm = []string{"/bin/sh", "-c", "cat >> " + told}
	})
	begin(t, a)

	// A machine that has no repository says so at once, and loudly.
	s.physicalDue()
	st := s.ended(sooner...)
	require.Equal(t, [2]int{0, 1}, [2]int{st.OK, st.Failed})
	require.Contains(t, st.Err, "main: there is no repository for physical backups in "+s.dir)
	require.Zero(t, st.Tries)
	var alarm struct {
		schedule.Alarm
		Kind string
	}
	text, err := os.ReadFile(told)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &alarm), "%s", text)
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
	s.physicalDue()
	st = s.ended(sooner...)
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
	s.physicalDue()
	st = s.ended(sooner...)
	require.True(t, st.Good(), st.Err)
	require.Equal(t, []string{second.Label}, labels())
}
