package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// KindMigrateShared is how migrations of the shared schema stand among the restore points.
const KindMigrateShared = "migrate.shared"

// MigrateShared brings the shared schema to its head, and the tables that schedules need beside it.
func (a *App) MigrateShared(ctx context.Context) (migrate.Result, error) {
	if a.Marker != nil && fault.Is(a.Migrate.SharedBehind(ctx), fault.Pending) {
		id, err := uuid.NewV7()
		if err != nil {
			return migrate.Result{}, err
		}
		a.Marker.Mark(ctx, registry.Marking{Operation: id, Kind: KindMigrateShared, Groups: a.DB.Groups()})
	}
	res, err := a.Migrate.Shared(ctx)
	if err == nil {
		err = schedule.Migrate(ctx, a.DB)
	}
	return res, err
}

// Schedules are the configuration's, with their due times. Invalid: what is to be kept cannot be read.
func (a *App) Schedules() ([]schedule.Schedule, error) {
	var list []schedule.Schedule
	for _, c := range a.Config.Backup.Schedules {
		times, err := c.Times()
		if err == nil {
			_, err = policy(c.Keep)
		}
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "the schedule %s cannot be used", c.Name).WithCode("setting")
		}
		list = append(list, schedule.Schedule{Name: c.Name, Spec: c.Spec(), Times: times, Jitter: c.Jitter})
	}
	return list, nil
}

func policy(k config.Keep) (p backup.Policy, err error) {
	p = backup.Policy{Last: k.Last, Hourly: k.Hourly, Daily: k.Daily, Weekly: k.Weekly, Monthly: k.Monthly}
	if k.Within != "" {
		p.Within, err = backup.ParseSpan(k.Within)
	}
	return p, err
}

// Selected are the tenants that a schedule is for.
func (a *App) Selected(ctx context.Context, s config.Select) (ts []tenant.Tenant, err error) {
	f := registry.Filter{Names: s.Tenant, Exclude: s.Exclude, Group: s.Group, States: []tenant.State{tenant.Active, tenant.Suspended}}
	if len(s.State) > 0 {
		f.States = nil
		for _, st := range s.State {
			f.States = append(f.States, tenant.State(st)) // validated
		}
	}
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ts, err = registry.List(ctx, tx, f)
		return err
	})
	return ts, err
}

// Scheduler works on the configuration's schedules. It is nil where there is none.
func (a *App) Scheduler() (*schedule.Scheduler, error) {
	list, err := a.Schedules()
	if err != nil || len(list) == 0 {
		return nil, err
	}
	var b *backup.Backups
	if slices.ContainsFunc(a.Config.Backup.Schedules, func(c config.Schedule) bool { return !c.OfClusters() }) {
		if b, err = a.Backups(); err != nil {
			return nil, err
		}
	}
	return schedule.New(schedule.Options{
		DB: a.DB, Schedules: list, StaleAfter: a.Config.Migrate.StaleAfter, Logger: a.Log,
		Do: func(ctx context.Context, t *schedule.Taken) (schedule.Result, error) {
			c, found := a.configured(t.Schedule)
			switch {
			case !found:
				return schedule.Result{}, fmt.Errorf("there is no schedule %s", t.Schedule)
			case c.IsDrill():
				return a.drillOnSchedule(ctx, b, c, t)
			case c.IsPhysical():
				return a.physicalOnSchedule(ctx, c, t)
			case c.IsPhysicalDrill():
				return a.physicalDrillOnSchedule(ctx, c, t)
			}
			return a.backUpOnSchedule(ctx, b, c, t)
		},
		Alarm: a.alarm,
	})
}

// configured is the schedule of a name.
func (a *App) configured(name string) (c config.Schedule, found bool) {
	i := slices.IndexFunc(a.Config.Backup.Schedules, func(c config.Schedule) bool { return c.Name == name })
	if i < 0 {
		return c, false
	}
	return a.Config.Backup.Schedules[i], true
}

// alarmWait is how long the program of an alarm may take.
const alarmWait = 30 * time.Second

// raised is what the program of an alarm is told.
type raised struct {
	schedule.Alarm
	Kind string `json:"kind"`
}

func (a *App) alarm(ctx context.Context, al schedule.Alarm) {
	c, _ := a.configured(al.Schedule)
	kind := c.KindOrBackup()
	what := "a scheduled " + strings.ReplaceAll(kind, "-", " ")
	if c.IsPhysical() {
		what += " backup"
	}
	texts := map[string]string{
		schedule.CodeMissed: what + " was missed", schedule.CodeFailed: what + " has failed", schedule.CodeStuck: what + " cannot be done; it is tried on",
	}
	attrs := []any{"code", al.Code, "kind", kind, "schedule", al.Schedule, "due_at", al.Due, "missed", al.Missed, "ok", al.OK, "failed", al.Failed}
	if al.Run != nil {
		attrs = append(attrs, "run", *al.Run)
	}
	if al.Error != "" {
		attrs = append(attrs, "error", al.Error)
	}
	a.Log.ErrorContext(ctx, texts[al.Code], attrs...)
	if err := backup.Tell(context.WithoutCancel(ctx), "alarm", a.Config.Backup.Alarm, a.Environ, alarmWait, raised{al, kind}); err != nil {
		a.Log.ErrorContext(ctx, "the program of backup.alarm failed", "code", "alarm_failed", "error", err)
	}
}

// scheduledRequest is what a run asks for that a schedule has begun.
type scheduledRequest struct {
	BackupRequest
	Schedule string        `json:"schedule"`
	Due      time.Time     `json:"due"`
	Select   config.Select `json:"select"`
}

const (
	// scheduledJobs is how many tenants are backed up at one time unless the schedule says another number: there are
	// servers in the same process.
	scheduledJobs = 2
	// retriesMost is how often a run's failed tenants are tried once more, by itself: after one minute, four and sixteen. So is a drill
	// that has met with an error that may pass.
	retriesMost = 3
)

// scheduledJobs is how many tenants of a schedule are worked on at one time. One connection of the owner's is the run's own, and the
// server needs some, too.
func (a *App) scheduledJobs(c config.Schedule) int {
	jobs := c.Jobs
	if jobs == 0 {
		jobs = scheduledJobs
	}
	return min(jobs, max(1, a.Config.Database.OwnerConns-2))
}

func retryAfter(tries int) time.Duration { return time.Minute << (2 * tries) }

// scheduleActor is who asks for a schedule's runs, for the audit trail.
func scheduleActor(name string) string { return "schedule:" + name }

// backUpOnSchedule goes on with the run of a due time, wherever it is.
func (a *App) backUpOnSchedule(ctx context.Context, b *backup.Backups, c config.Schedule, t *schedule.Taken) (schedule.Result, error) {
	run, mine, err := a.scheduledRun(ctx, b, c, t)
	switch {
	case passes(err) || ctx.Err() != nil:
		return schedule.Result{}, err
	case err != nil:
		return schedule.Result{Ended: &schedule.Outcome{Err: fault.Of(err).Message}}, nil
	case run.ID == uuid.Nil: // nobody is selected
		return schedule.Result{Ended: &schedule.Outcome{}}, nil
	}
	for {
		switch {
		case run.State == registry.Paused: // a person has done that
			return schedule.Result{Again: time.Minute}, nil
		case run.Alive && !mine:
			return schedule.Result{Again: a.Config.Migrate.StaleAfter}, nil
		case run.State == registry.Failed && t.Tries < retriesMost:
			if wait := time.Until(run.FinishedAt.Add(retryAfter(t.Tries))); wait > 0 {
				return schedule.Result{Again: wait}, nil
			}
			if err := t.Note(ctx, run.ID, t.Tries+1); err != nil {
				return schedule.Result{}, err
			}
			if run, err = a.Rollout.Retry(ctx, run.ID, scheduleActor(c.Name)); err != nil {
				return schedule.Result{}, err
			}
		case run.Over():
			return a.endScheduled(ctx, b, c, run)
		}
		mine = false
		if run, err = a.workOnBackups(ctx, b, run, a.scheduledJobs(c)); err != nil {
			return schedule.Result{}, err
		}
	}
}

// passes reports whether an error is one that ends by itself.
func passes(err error) bool {
	var f *fault.Fault
	return err != nil && (!errors.As(err, &f) || fault.Is(err, fault.Unavailable) || fault.Is(err, fault.Locked) || fault.Is(err, fault.Busy) || fault.Is(err, fault.Pending))
}

// scheduledRun is the run of a due time, planned now unless it has been; mine: nobody else works on it yet. The zero Run:
// there are no tenants.
func (a *App) scheduledRun(ctx context.Context, b *backup.Backups, c config.Schedule, t *schedule.Taken) (run rollout.Run, mine bool, err error) {
	if t.Run != uuid.Nil {
		run, err := a.Rollout.Show(ctx, t.Run)
		return run, false, err
	}
	if err := b.Ready(ctx); err != nil {
		return run, false, err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return run, false, err
	}
	ts, err := a.Selected(ctx, c.Select)
	if err != nil || len(ts) == 0 {
		return run, false, err
	}
	if err := a.abortOlder(ctx, c.Name, t.Due); err != nil {
		return run, false, err
	}
	spec := rollout.Spec{Kind: KindBackup, Actor: scheduleActor(c.Name), Join: true, Request: scheduledRequest{
		BackupRequest: BackupRequest{Reason: "schedule " + c.Name}, Schedule: c.Name, Due: t.Due, Select: c.Select,
	}}
	for _, ten := range ts {
		spec.Items = append(spec.Items, rollout.Item{Tenant: ten})
	}
	// The same due time joins the run that it has begun: whoever did died before it could note that.
	run, joined, err := a.Rollout.Plan(ctx, spec)
	if err != nil {
		return run, false, err
	}
	return run, !joined, t.Note(ctx, run.ID, 0)
}

// abortOlder ends the runs of a schedule's earlier due times that nobody goes on with.
func (a *App) abortOlder(ctx context.Context, name string, due time.Time) error {
	runs, err := a.Rollout.List(ctx, 1000, true)
	if err != nil {
		return err
	}
	for _, run := range runs {
		var r scheduledRequest
		if run.Kind != KindBackup || run.State != registry.Running || run.Alive || json.Unmarshal(run.Request, &r) != nil || r.Schedule != name || r.Due.Equal(due) {
			continue
		}
		if _, err := a.Rollout.Abort(ctx, run.ID, scheduleActor(name)); err != nil && !fault.Is(err, fault.Conflict) {
			return err
		}
	}
	return nil
}

// workOnBackups works on a run of backups until it is over. When ctx ends, the tenants in hand are finished, for as long as
// the server's grace; then they are broken off, and begun again by whoever goes on with the run.
func (a *App) workOnBackups(ctx context.Context, b *backup.Backups, run rollout.Run, jobs int) (rollout.Run, error) {
	interrupt, breakOff := context.WithCancel(context.WithoutCancel(ctx))
	defer breakOff()
	defer context.AfterFunc(ctx, func() {
		timer := time.AfterFunc(a.Config.Server.ShutdownGrace, breakOff)
		context.AfterFunc(interrupt, func() { timer.Stop() })
	})()
	looking, stop := context.WithCancel(ctx)
	defer stop()
	brake := a.Brake(looking, true)
	o := rollout.WorkOptions{Jobs: jobs, Patience: a.Config.Migrate.Patience, Hold: brake.Hold, Yields: brake.Yields, Share: a.Config.Migrate.LiveShare}
	var req BackupRequest
	if err := json.Unmarshal(run.Request, &req); err != nil {
		return run, fmt.Errorf("read what the run is to do: %w", err)
	}
	return a.Rollout.Work(ctx, run.ID, o, func(ctx context.Context, task rollout.Task) rollout.Outcome {
		return a.BackUp(ctx, interrupt, b, req, task)
	})
}

// endScheduled takes away what the schedule does not keep of the tenants that were backed up, and says how the run ended.
func (a *App) endScheduled(ctx context.Context, b *backup.Backups, c config.Schedule, run rollout.Run) (schedule.Result, error) {
	end := &schedule.Outcome{OK: run.OK, Failed: run.Failed, Skipped: run.Skipped}
	switch {
	case run.State == registry.Aborted:
		end.Err = "the run was aborted"
	case run.Left() > 0:
		end.Err = fmt.Sprintf("the run was ended with %d tenants left", run.Left())
	}
	p, err := policy(c.Keep)
	if err != nil {
		return schedule.Result{}, err
	}
	if !p.IsZero() {
		if err := a.pruneBehind(ctx, b, p, run.ID); err != nil {
			if passes(err) {
				return schedule.Result{}, err
			}
			end.Err = "old backups could not be taken away: " + fault.Of(err).Message
		}
	}
	a.Log.InfoContext(ctx, "a scheduled backup has ended", "schedule", c.Name, "run", run.ID, "ok", run.OK, "failed", run.Failed, "skipped", run.Skipped)
	return schedule.Result{Ended: end}, nil
}

// pruneBehind takes away old backups of the tenants that a run has backed up, and of no other one.
func (a *App) pruneBehind(ctx context.Context, b *backup.Backups, p backup.Policy, run uuid.UUID) error {
	var numbers []int32
	err := a.Rollout.Tasks(ctx, run, func(t rollout.Reported) error {
		numbers = append(numbers, t.Number)
		return nil
	}, "ok")
	if err != nil {
		return err
	}
	gone := 0
	for _, n := range numbers {
		var t tenant.Tenant
		err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
			t, err = registry.ByNumber(ctx, tx, n)
			return err
		})
		if err == nil {
			_, err = b.Prune(ctx, p, t.ID, func(backup.Manifest) { gone++ })
		}
		if err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
	}
	if gone > 0 {
		a.Log.InfoContext(ctx, "took old backups away", "run", run, "backups", gone)
	}
	return nil
}
