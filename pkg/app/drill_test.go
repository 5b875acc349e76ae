package app_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/schedule"
)

// drills makes the schedule one that restores so many tenants.
func drills(sample int) func(*config.Config) {
	return func(c *config.Config) {
		c.Backup.Schedules = []config.Schedule{{Name: "yearly", Kind: config.KindDrill, Cron: "0 0 1 1 *", Select: config.Select{AllTenants: true}, Sample: &sample}}
	}
}

// drillDue is due for a drill.
func (s *scheduled) drillDue() {
	s.t.Helper()
	s.due()
	_, err := s.admin.Exec(context.Background(), `update public.schedules set spec = 'drill 0 0 1 1 * UTC'`)
	require.NoError(s.t, err)
}

// proved are the numbers of the tenants that were proved, and forgets that.
func (s *scheduled) proved(a *app.App) (numbers []int32) {
	s.t.Helper()
	b, err := a.Backups()
	require.NoError(s.t, err)
	proofs, err := b.Proofs(context.Background())
	require.NoError(s.t, err)
	for n := range proofs {
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	_, err = s.admin.Exec(context.Background(), `delete from public.proofs`)
	require.NoError(s.t, err)
	return numbers
}

// begin serves until the test ends or stop is called.
func begin(t *testing.T, a *app.App) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.Serve(ctx, app.ServeOptions{}) }()
	stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-ended)
	})
	t.Cleanup(stop)
	return stop
}

func TestServersDrillOnSchedule(t *testing.T) {
	t.Parallel()
	s, ctx := newScheduled(t), context.Background()
	told := filepath.Join(s.dir, "told")
	tellTo := func(c *config.Config) { c.Backup.Alarm = []string{"/bin/sh", "-c", "cat >> " + told} }
	own := s.Tenant(t, "acme")
	var others []int32
	for _, slug := range []string{"beta", "gamma", "delta", "epsilon", "zeta"} {
		others = append(others, s.Tenant(t, slug).Number)
	}
	a := s.app(drills(2), tellTo)
	b, err := a.Backups()
	require.NoError(t, err)
	full, _, err := b.CreateFull(ctx, backup.FullOptions{})
	require.NoError(t, err)
	made, err := b.Create(ctx, own, backup.CreateOptions{})
	require.NoError(t, err)

	// A due time's sample is the same one, whoever draws it and how often: nothing is left out because it failed the first time.
	s.drillDue()
	stop := begin(t, a)
	st := s.ended(sooner...)
	require.True(t, st.Good(), st.Err)
	require.Equal(t, 2, st.OK)
	require.Nil(t, st.Run)
	first := s.proved(a)
	require.Len(t, first, 2)
	for range 2 {
		s.drillDue()
		s.ended(sooner...)
		require.Equal(t, first, s.proved(a))
	}
	stop()
	require.Empty(t, s.runs(a), "nothing is begun that has to be gone on with")
	require.Len(t, s.backups(a), 1)
	require.NoFileExists(t, told)

	// All of them: one whose backup is damaged has failed, and one that has none; the others are proved, and somebody is told.
	s.Tenant(t, "young")
	path := filepath.Join(s.dir, "backups", filepath.FromSlash(made.Name))
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	text[len(text)/2] ^= 1
	require.NoError(t, os.WriteFile(path, text, 0o600))
	all := s.app(drills(0), tellTo)
	stop = begin(t, all)
	s.drillDue()
	st = s.ended(sooner...)
	require.Equal(t, [2]int{5, 2}, [2]int{st.OK, st.Failed})
	require.Contains(t, st.Err, "acme: ")
	stop()
	require.Zero(t, st.Tries, "what is damaged stays so")
	require.Equal(t, others, s.proved(all))
	var alarm struct {
		schedule.Alarm
		Kind string
	}
	text, err = os.ReadFile(told)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &alarm), "%s", text)
	require.Equal(t, schedule.CodeFailed, alarm.Code)
	require.Equal(t, "drill", alarm.Kind)
	require.Equal(t, 2, alarm.Failed)
	require.Contains(t, s.log.String(), "a scheduled drill has failed")

	// What may pass is tried again before it has failed: here the store cannot read an object.
	require.NoError(t, os.RemoveAll(filepath.Dir(path)))
	unreadable := filepath.Join(s.dir, "backups", "full", full.ID, "main", own.ID+".oneo")
	require.NoError(t, os.Remove(unreadable))
	require.NoError(t, os.Symlink(filepath.Base(unreadable), unreadable))
	one := s.app(drills(0), func(c *config.Config) { c.Backup.Schedules[0].Select = config.Select{Tenant: []string{"acme"}} })
	s.drillDue()
	begin(t, one)
	st = s.ended(sooner...)
	require.Equal(t, 3, st.Tries)
	require.Nil(t, st.Run)
	require.Equal(t, [2]int{0, 1}, [2]int{st.OK, st.Failed})
	require.Contains(t, st.Err, "cannot be used")
}
