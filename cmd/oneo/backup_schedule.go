package main

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type backupScheduleOptions struct {
	check, late bool
}

func newBackupScheduleCmd(e *env) *cobra.Command {
	var o backupScheduleOptions
	cmd := &cobra.Command{
		Use: "schedule", Short: "Show what `oneo serve` backs up and proves by itself, and what was missed",
		Long: `Show the schedules of backup.schedules: when each one's time comes next, what became of the last time that
was taken on, and how many passed without a backup, which is when no server was there, or the backup before was
still at work. Those of the kind drill restore backups and take them back, as ` + "`oneo backup drill`" + ` does, and make
none; those of the kind physical back up whole clusters, as ` + "`oneo backup physical create`" + ` does, and those of
the kind physical-drill recover them to a random moment, as ` + "`oneo backup drill --physical`" + ` does. Times are UTC.

A schedule is overdue when its time has passed and no server has looked for five minutes, new until one
has, and stuck when it cannot be begun, or gone on with, for some minutes. --late shows the selected tenants whose newest backup is older than the schedule promises: than its last
time, once the backup of that one has ended, or else than the one before.`,
		Example: "  oneo backup schedule\n  oneo backup schedule --check -q\n  oneo backup schedule --late -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return backupSchedule(cmd.Context(), e, o) },
	}
	cmd.Flags().BoolVar(&o.check, "check", false, "exit with 13 when one is new, overdue, missed, stuck or failed; with --late when a tenant is")
	cmd.Flags().BoolVar(&o.late, "late", false, "show tenants whose newest backup is too old")
	return cmd
}

// scheduled is one schedule's line.
type scheduled struct {
	config.Schedule
	times schedule.Schedule
	schedule.Standing
	state   string
	healthy bool
	now     time.Time
}

// when leaves a time out that there is not.
func when(t *time.Time) any {
	if t == nil {
		return nil
	}
	return t.UTC()
}

var scheduledColumns = []column[scheduled]{
	{"SCHEDULE", "schedule", func(s scheduled) any { return s.Schedule.Name }},
	{"KIND", "kind", func(s scheduled) any { return s.KindOrBackup() }},
	{"STATE", "state", func(s scheduled) any { return s.state }},
	{"CRON", "cron", func(s scheduled) any { return s.Cron }},
	{"ZONE", "time_zone", func(s scheduled) any {
		if s.TimeZone == "" {
			return "UTC"
		}
		return s.TimeZone
	}},
	{"NEXT", "next_at", func(s scheduled) any { return s.times.Times.Next(s.now) }},
	{"LAST", "last_at", func(s scheduled) any { return when(s.Due) }},
	{"ENDED", "ended_at", func(s scheduled) any { return when(s.EndedAt) }},
	{"OK", "ok", func(s scheduled) any { return s.OK }},
	{"FAILED", "failed", func(s scheduled) any { return s.Failed }},
	{"MISSED", "missed", func(s scheduled) any { return s.Missed }},
	{"MISSED AT", "missed_at", func(s scheduled) any { return when(s.MissedAt) }},
	{"RUN", "run", func(s scheduled) any {
		if s.Run == nil {
			return nil
		}
		return s.Run.String()
	}},
	{"ERROR", "error", func(s scheduled) any { return s.Err }},
}

func backupSchedule(ctx context.Context, e *env, o backupScheduleOptions) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	rows, err := schedules(ctx, a)
	if err != nil {
		return err
	}
	if len(rows) == 0 {
		e.say("there is no schedule: see backup.schedules in config/oneo.yaml")
	}
	if o.late {
		return showLate(ctx, e, a, rows, o.check)
	}
	if err := show(e, rows, scheduledColumns); err != nil || !o.check {
		return err
	}
	var bad []string
	for _, r := range rows {
		if !r.healthy {
			bad = append(bad, r.Schedule.Name+" is "+r.state)
		}
	}
	if len(bad) > 0 {
		return fault.New(fault.Pending, "schedules are not as they should be: %s", strings.Join(bad, ", ")).WithCode("schedules_unhealthy").
			WithHint("look into the log of `oneo serve`; oneo backup create makes a backup now")
	}
	return nil
}

// schedules reads where the configuration's stand.
func schedules(ctx context.Context, a *app.App) ([]scheduled, error) {
	list, err := a.Schedules()
	if err != nil {
		return nil, err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return nil, err
	}
	standings, err := schedule.Standings(ctx, a.DB)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	rows := make([]scheduled, len(list))
	for i, sc := range list {
		st := standings[sc.Name]
		rows[i] = scheduled{Schedule: a.Config.Backup.Schedules[i], times: sc, Standing: st, now: now}
		rows[i].state, rows[i].healthy = sc.State(st, now)
	}
	return rows, nil
}

// lateTenant is a tenant whose newest backup is older than a schedule promises.
type lateTenant struct {
	tenant.Tenant
	schedule string
	promised time.Time
	newest   *backup.Manifest
}

var lateColumns = []column[lateTenant]{
	{"TENANT", "tenant", func(l lateTenant) any { return l.Slug.String() }},
	{"SCHEDULE", "schedule", func(l lateTenant) any { return l.schedule }},
	{"PROMISED", "promised_at", func(l lateTenant) any { return l.promised.UTC() }},
	{"NEWEST", "newest", func(l lateTenant) any {
		if l.newest == nil {
			return nil
		}
		return l.newest.ID
	}},
	{"MADE", "made_at", func(l lateTenant) any {
		if l.newest == nil {
			return nil
		}
		return l.newest.Made
	}},
}

// promises reports whether it is of tenants' backups.
func (s scheduled) promises() bool { return !s.IsDrill() && !s.OfClusters() }

// promise is the time that each selected tenant's newest backup must not be older than; zero: there is none yet.
func (s scheduled) promise() time.Time {
	if s.EndedAt != nil && s.healthy {
		return *s.Due
	}
	// The last two times that have passed, found from a time before them: a cron counts forwards only.
	var before time.Time
	for span := time.Hour; before.IsZero() && span < 10*366*24*time.Hour; span *= 4 {
		var last time.Time
		for at := s.times.Times.Next(s.now.Add(-span)); !at.IsZero() && !at.After(s.now); at = s.times.Times.Next(at) {
			before, last = last, at
		}
	}
	return before
}

func showLate(ctx context.Context, e *env, a *app.App, rows []scheduled, check bool) error {
	late := []lateTenant{}
	if slices.ContainsFunc(rows, scheduled.promises) {
		_, b, err := e.backups()
		if err != nil {
			return err
		}
		if late, err = lateTenants(ctx, a, b, rows); err != nil {
			return err
		}
	}
	if err := show(e, late, lateColumns); err != nil {
		return err
	}
	if len(late) > 0 && check {
		return fault.New(fault.Pending, "%d backup(s) are older than promised", len(late)).WithCode("backups_late").
			WithHint("oneo backup create -t %s", late[0].Slug)
	}
	return nil
}

// lateTenants are those whose newest backup is older than one of the schedules promises.
func lateTenants(ctx context.Context, a *app.App, b *backup.Backups, rows []scheduled) ([]lateTenant, error) {
	late := []lateTenant{}
	for _, r := range rows {
		if !r.promises() {
			continue
		}
		promised := r.promise()
		ts, err := a.Selected(ctx, r.Select)
		if err != nil {
			return nil, err
		}
		ts = slices.DeleteFunc(ts, func(t tenant.Tenant) bool { return t.CreatedAt.After(promised) })
		newest, err := b.NewestOf(ctx, idsOf(ts))
		if err != nil {
			return nil, err
		}
		for _, t := range ts {
			m, has := newest[t.ID]
			if has && !m.Made.Before(promised) {
				continue
			}
			l := lateTenant{Tenant: t, schedule: r.Schedule.Name, promised: promised}
			if has {
				l.newest = &m
			}
			late = append(late, l)
		}
	}
	return late, nil
}
