package app

import (
	"context"
	"fmt"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/schedule"
)

// physicalDrillOnSchedule recovers all clusters to a random moment and takes some of its tenants back. What may pass is tried again only
// before that: a recovery that fails has failed, since another moment that can be reached would not prove this one. A server that goes on
// with a due time begins anew.
func (a *App) physicalDrillOnSchedule(ctx context.Context, c config.Schedule, t *schedule.Taken) (schedule.Result, error) {
	var m Moment
	err := a.Migrate.SharedBehind(ctx)
	if err == nil {
		m.Time, err = a.RandomMoment(ctx)
	}
	if err != nil && ctx.Err() == nil && t.Tries < retriesMost && passes(err) && fault.Of(err).Code != noRepository {
		a.Log.WarnContext(ctx, "a physical drill on schedule is tried again", "schedule", c.Name, "error", err)
		return schedule.Result{Again: retryAfter(t.Tries)}, t.Note(ctx, t.Run, t.Tries+1)
	}
	end := &schedule.Outcome{}
	if err == nil {
		err = a.rehearseOnSchedule(ctx, c, m, end)
	}
	if ctx.Err() != nil {
		return schedule.Result{}, ctx.Err()
	}
	if err != nil {
		a.Log.ErrorContext(ctx, "a physical drill on schedule has failed", "code", fault.Of(err).StableCode(), "schedule", c.Name, "error", err)
		if end.Err == "" {
			end.Err = fault.Of(err).Message
		}
	}
	a.Log.InfoContext(ctx, "a scheduled physical drill has ended", "schedule", c.Name, "ok", end.OK, "failed", end.Failed)
	return schedule.Result{Ended: end}, nil
}

// rehearseOnSchedule counts in end what became of the tenants.
func (a *App) rehearseOnSchedule(ctx context.Context, c config.Schedule, m Moment, end *schedule.Outcome) error {
	o := PastOptions{
		Moment: m, Why: "schedule " + c.Name, Report: func(string, physical.Progress) {},
		Say: func(format string, args ...any) {
			a.Log.InfoContext(ctx, fmt.Sprintf(format, args...), "schedule", c.Name)
		},
	}
	a.Log.InfoContext(ctx, "a physical drill on schedule has drawn its moment", "schedule", c.Name, "moment", m.Time.UTC())
	proofs, err := a.Rehearse(ctx, o, registry.Filter{}, c.Drilled(), func(r Rehearsed) {
		if r.Err == nil {
			end.OK++
			return
		}
		slug := r.Tenant.Slug.String()
		a.Log.ErrorContext(ctx, "a tenant did not come back from a recovered cluster", "code", fault.Of(r.Err).StableCode(), "schedule", c.Name, "tenant", slug, "error", r.Err)
		if end.Failed++; end.Err == "" {
			end.Err = slug + ": " + fault.Of(r.Err).Message
		}
	})
	for _, p := range proofs {
		a.Log.InfoContext(ctx, "a recovery was proved", "schedule", c.Name, "cluster", p.Cluster, "moment", p.Target.UTC(), "backup", p.Backup, "tenants", p.Tenants, "rows", p.Rows)
	}
	return err
}
