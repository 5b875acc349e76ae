package app

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// drillOnSchedule restores the newest backups of some of a schedule's tenants and takes them back. A server that goes on with a due time
// begins anew with the same tenants: nothing is left of what another one had begun.
func (a *App) drillOnSchedule(ctx context.Context, b *backup.Backups, c config.Schedule, t *schedule.Taken) (schedule.Result, error) {
	report, err := a.drill(ctx, b, c, t.Due)
	switch {
	case passes(err) || ctx.Err() != nil:
		return schedule.Result{}, err
	case err != nil:
		return schedule.Result{Ended: &schedule.Outcome{Err: fault.Of(err).Message}}, nil
	}
	if t.Tries < retriesMost && slices.ContainsFunc(report.Outcomes, func(o fleet.Outcome) bool {
		return fault.Is(o.Err, fault.Unavailable) || fault.Is(o.Err, fault.Locked) || fault.Is(o.Err, fault.Busy)
	}) {
		wait := retryAfter(t.Tries)
		return schedule.Result{Again: wait}, t.Note(ctx, t.Run, t.Tries+1)
	}
	end := &schedule.Outcome{OK: report.Count(fleet.OK), Failed: report.Count(fleet.Failed)}
	for _, o := range report.Outcomes {
		if o.Err == nil {
			continue
		}
		a.Log.ErrorContext(ctx, "a tenant's backup could not be restored", "code", fault.Of(o.Err).StableCode(), "schedule", c.Name, "tenant", o.Tenant, "error", o.Err)
		if end.Err == "" {
			end.Err = o.Tenant + ": " + fault.Of(o.Err).Message
		}
	}
	a.Log.InfoContext(ctx, "a scheduled drill has ended", "schedule", c.Name, "ok", end.OK, "failed", end.Failed)
	return schedule.Result{Ended: end}, nil
}

// drill does the work of a due time. An error is one of the whole.
func (a *App) drill(ctx context.Context, b *backup.Backups, c config.Schedule, due time.Time) (report fleet.Report, err error) {
	if err := b.Ready(ctx); err != nil {
		return report, err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return report, err
	}
	ts, err := a.Selected(ctx, c.Select)
	if err != nil {
		return report, err
	}
	if n := c.Drilled(); n > 0 && n < len(ts) {
		// The same tenants whoever draws them: one whose backup cannot be read for now is not left out the next time.
		draw := rand.New(rand.NewPCG(uint64(due.Unix()), 0))
		draw.Shuffle(len(ts), func(i, j int) { ts[i], ts[j] = ts[j], ts[i] })
		ts = ts[:n]
	}
	ids := make([]string, len(ts))
	for i, t := range ts {
		ids[i] = t.ID
	}
	newest, bad, err := b.Provable(ctx, ids)
	if err != nil {
		return report, err
	}
	for _, f := range bad {
		a.Log.WarnContext(ctx, "not a backup", "schedule", c.Name, "object", f.Name, "error", f.Err)
	}
	looking, stop := context.WithCancel(ctx)
	defer stop()
	brake := a.Brake(looking, false)
	report = fleet.Run(ctx, ts, fleet.Options{Jobs: a.scheduledJobs(c)}, func(t tenant.Tenant) string { return t.Slug.String() }, func(_ context.Context, t tenant.Tenant) fleet.Outcome {
		for brake.Hold() != "" && ctx.Err() == nil {
			time.Sleep(time.Second)
		}
		m, has := newest[t.ID]
		if !has {
			return fleet.Outcome{Err: fault.New(fault.NotFound, "there is no backup of this tenant").WithCode("backup_not_found")}
		}
		return fleet.Outcome{Err: b.Drill(ctx, t.Number, m, transfer.Loading{Identities: b.Identities(), Actor: scheduleActor(c.Name)})}
	})
	return report, ctx.Err()
}
