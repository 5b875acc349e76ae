package app

import (
	"cmp"
	"context"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/schedule"
)

// physicalOnSchedule makes physical backups of a schedule's clusters, and takes away what it does not keep. A server that goes on with a due
// time makes those that were not made since.
func (a *App) physicalOnSchedule(ctx context.Context, c config.Schedule, t *schedule.Taken) (schedule.Result, error) {
	end := &schedule.Outcome{}
	failed := func(k Cluster, err error) {
		a.Log.ErrorContext(ctx, "a physical backup on schedule has failed", "code", fault.Of(err).StableCode(), "schedule", c.Name, "cluster", k.Name, "error", err)
		if end.Failed++; end.Err == "" {
			end.Err = k.Name + ": " + fault.Of(err).Message
		}
	}
	p, err := policy(c.Keep)
	if err != nil {
		return schedule.Result{}, err
	}
	clusters, err := a.PhysicalClusters()
	if err == nil {
		clusters, err = ClusterOf(clusters, c.Select.Group)
	}
	if err != nil {
		return schedule.Result{Ended: &schedule.Outcome{Err: fault.Of(err).Message}}, nil
	}
	again := false
	for _, k := range clusters {
		err := a.physicalOnce(ctx, k, c, t)
		switch {
		case ctx.Err() != nil:
			return schedule.Result{}, ctx.Err()
		case err == nil && !p.IsZero():
			gone, perr := a.PrunePhysical(ctx, k, p)
			if len(gone) > 0 {
				a.Log.InfoContext(ctx, "took old physical backups away", "schedule", c.Name, "cluster", k.Name, "backups", len(gone))
			}
			err = perr
		}
		switch {
		case err == nil:
			end.OK++
		case t.Tries < retriesMost && passes(err) && fault.Of(err).Code != noRepository:
			a.Log.WarnContext(ctx, "a physical backup on schedule is tried again", "schedule", c.Name, "cluster", k.Name, "error", err)
			again = true
		default:
			failed(k, err)
		}
	}
	if again {
		return schedule.Result{Again: retryAfter(t.Tries)}, t.Note(ctx, t.Run, t.Tries+1)
	}
	a.Log.InfoContext(ctx, "scheduled physical backups have ended", "schedule", c.Name, "ok", end.OK, "failed", end.Failed)
	return schedule.Result{Ended: end}, nil
}

// noRepository is the code of a repository that this machine does not have: another one may, and none comes by waiting.
const noRepository = "no_repository"

// physicalOnce makes a cluster's backup of a due time, unless there is one since: whoever made it died, or somebody was before it.
func (a *App) physicalOnce(ctx context.Context, k Cluster, c config.Schedule, t *schedule.Taken) error {
	info, err := k.Engine.Info(ctx)
	if err != nil {
		return err
	}
	kind := cmp.Or(physical.Kind(c.Copies), physical.Full)
	for _, b := range info.Backups {
		if _, ok := info.Reach(b); ok && b.Kind == kind && b.Start.After(t.Due) {
			return nil
		}
	}
	b, warning, err := a.CreatePhysical(ctx, k, physical.CreateOptions{Kind: kind})
	if err == nil {
		a.Log.InfoContext(ctx, "made a physical backup", "schedule", c.Name, "cluster", k.Name, "backup", b.Label, "warning", warning)
	}
	return err
}
