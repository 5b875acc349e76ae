package app

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// ClusterOf is the cluster that holds a group, of all: PhysicalClusters. An empty group: all of them. Invalid: there is no such group.
func ClusterOf(clusters []Cluster, group string) ([]Cluster, error) {
	if group == "" {
		return clusters, nil
	}
	for _, k := range clusters {
		if slices.Contains(k.Groups, group) {
			return []Cluster{k}, nil
		}
	}
	return nil, fault.New(fault.Invalid, "database group %q is not configured", group).WithCode("unknown_group")
}

// physicalEvent is what the programs of backup.hooks read around a physical backup.
type physicalEvent struct {
	Event   string          `json:"event"` // before or after
	OK      bool            `json:"ok"`    // after: there is a backup
	Error   string          `json:"error,omitempty"`
	Kind    string          `json:"kind"` // physical
	Cluster string          `json:"cluster"`
	Groups  []string        `json:"groups"`
	Store   string          `json:"store"`
	Backup  physical.Backup `json:"backup"` // as far as it is known
}

// physicalHook is what the programs find in their environment besides ONEO_HOOK.
const physicalHook = "ONEO_BACKUP_KIND=physical"

// CreatePhysical makes a physical backup of a cluster, with the programs of backup.hooks around it. The warning is for a person,
// also where there is an error. Unfit: the program before has failed, and no backup was made.
func (a *App) CreatePhysical(ctx context.Context, k Cluster, o physical.CreateOptions) (b physical.Backup, warning string, err error) {
	h := a.Config.Backup.Hooks
	if o.Kind == "" {
		o.Kind = physical.Full
	}
	ev := physicalEvent{Event: "before", Kind: "physical", Cluster: k.Name, Groups: k.Groups, Store: k.Where, Backup: physical.Backup{Kind: o.Kind}}
	if err := backup.Tell(ctx, "before", h.Before, a.Environ, h.Timeout, ev, physicalHook); ctx.Err() != nil {
		return b, "", ctx.Err()
	} else if err != nil {
		return b, "", fault.Wrap(err, fault.Unfit, "the program before the backup failed; no backup was made").WithCode("hook_failed")
	}
	b, err = k.Engine.Create(ctx, o)
	ev.Event, ev.OK = "after", err == nil
	if err != nil {
		ev.Error = fault.Of(err).Message
	} else {
		ev.Backup = b
	}
	actx := ctx
	if ctx.Err() != nil { // what the first program has stopped must go on
		var cancel context.CancelFunc
		actx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
	}
	if herr := backup.Tell(actx, "after", h.After, a.Environ, h.Timeout, ev, physicalHook); herr != nil {
		warning = "the program after the backup failed: " + herr.Error()
		a.Log.WarnContext(ctx, "the program after a physical backup failed", "cluster", k.Name, "backup", b.Label, "error", herr)
	}
	return b, warning, err
}

// ClusterState is what is known of a cluster's physical backups.
type ClusterState struct {
	Cluster
	physical.Info
	Archiver *Archiver // nil: the cluster does not answer
	At       time.Time
}

// Archiver is what a cluster says of its archiving.
type Archiver struct {
	On        bool
	LastWAL   *string
	LastAt    *time.Time
	FailedWAL *string
	FailedAt  *time.Time
}

// Failing reports whether the last try to archive WAL has failed.
func (r Archiver) Failing() bool {
	return r.FailedAt != nil && (r.LastAt == nil || r.FailedAt.After(*r.LastAt))
}

// askWait is how long a cluster may take to say how its archiving is.
const askWait = 10 * time.Second

// PhysicalState reads what a cluster's repository holds, and asks the cluster, which need not answer.
func (a *App) PhysicalState(ctx context.Context, k Cluster) (s ClusterState, err error) {
	s.Cluster, s.At = k, time.Now()
	if s.Info, err = k.Engine.Info(ctx); err != nil {
		return s, err
	}
	ctx, cancel := context.WithTimeout(ctx, askWait)
	defer cancel()
	conn, err := k.connect(ctx, k.url)
	if err != nil {
		return s, nil //nolint:nilerr // backups are there also where the cluster is not
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var r Archiver
	const ask = `select pg_catalog.current_setting('archive_mode') <> 'off', last_archived_wal, last_archived_time, last_failed_wal, last_failed_time from pg_catalog.pg_stat_archiver`
	if err := conn.QueryRow(ctx, ask).Scan(&r.On, &r.LastWAL, &r.LastAt, &r.FailedWAL, &r.FailedAt); err == nil {
		s.Archiver = &r
	}
	return s, nil
}

// Good are the backups from which a moment can be reached, oldest first.
func (s ClusterState) Good() (good []physical.Backup) {
	for _, b := range s.Backups {
		if _, ok := s.Reach(b); ok {
			good = append(good, b)
		}
	}
	slices.SortFunc(good, func(a, b physical.Backup) int { return a.Stop.Compare(b.Stop) })
	return good
}

// PhysicalVerdict is what a policy says of a physical backup.
type PhysicalVerdict struct {
	Cluster string
	physical.Backup
	Keep bool
	Why  []string
}

// PlanPhysicalPrune says of each backup of a cluster whether it stays: by the rules, as one of the backup.keep_min newest from which a moment
// can be reached, because another one that stays needs it, because a recovery reads it, or because it cannot be read: the
// newest first.
func (a *App) PlanPhysicalPrune(ctx context.Context, k Cluster, p backup.Policy) ([]PhysicalVerdict, error) {
	info, err := k.Engine.Info(ctx)
	if err != nil {
		return nil, err
	}
	used, err := physical.InUse(a.ScratchDir())
	if err != nil {
		return nil, err
	}
	return judge(k.Name, info, p, a.Config.Backup.KeepMin, used, time.Now()), nil
}

func judge(cluster string, info physical.Info, p backup.Policy, least int, used []string, now time.Time) (all []PhysicalVerdict) {
	var ms []backup.Manifest
	for _, b := range info.Backups {
		if b.Bad == "" {
			ms = append(ms, backup.Manifest{ID: b.Label, Tenant: cluster, Slug: cluster, Made: b.Stop})
		}
	}
	ruled := map[string][]string{}
	for _, v := range p.Apply(ms, 0, now) {
		ruled[v.ID] = v.Why
	}
	backups := slices.Clone(info.Backups)
	slices.SortFunc(backups, func(a, b physical.Backup) int { return b.Stop.Compare(a.Stop) })
	good := 0
	for _, b := range backups {
		v := PhysicalVerdict{Cluster: cluster, Backup: b, Why: ruled[b.Label]}
		if b.Bad != "" { // it is no backup that rules could count, and may be one that somebody can mend
			v.Why = append(v.Why, "unreadable")
		} else if _, ok := info.Reach(b); ok {
			if good++; good <= least && len(v.Why) == 0 {
				v.Why = append(v.Why, "minimum")
			}
		}
		if slices.Contains(used, b.Label) {
			v.Why = append(v.Why, "in use")
		}
		all = append(all, v)
	}
	needed := map[string]bool{}
	for _, v := range all {
		if len(v.Why) > 0 {
			for _, label := range info.Needs(v.Label) {
				needed[label] = true
			}
		}
	}
	for i := range all {
		if len(all[i].Why) == 0 && needed[all[i].Label] {
			all[i].Why = []string{"needed"}
		}
		all[i].Keep = len(all[i].Why) > 0
	}
	return all
}

// PrunePhysical removes what the policy does not keep of a cluster's backups, and the WAL that none of the others needs. What has
// come since it was planned is judged anew.
func (a *App) PrunePhysical(ctx context.Context, k Cluster, p backup.Policy) (gone []PhysicalVerdict, err error) {
	all, err := a.PlanPhysicalPrune(ctx, k, p)
	if err != nil {
		return nil, err
	}
	gone = slices.DeleteFunc(all, func(v PhysicalVerdict) bool { return v.Keep })
	var labels []string
	for _, v := range gone {
		labels = append(labels, v.Label)
	}
	// Also with none: WAL may have been left by one that was killed.
	if err := k.Engine.Prune(ctx, labels); err != nil {
		return nil, err
	}
	return gone, nil
}

// VerifyPhysical proves a backup. Unverified: it is not what was written.
func (a *App) VerifyPhysical(ctx context.Context, k Cluster, label string, report func(physical.Progress)) error {
	err := k.Engine.Verify(ctx, label, report)
	var f *fault.Fault
	if errors.As(err, &f) && f.Kind == fault.Unfit {
		bad := *f
		bad.Kind = fault.Unverified
		return &bad
	}
	return err
}
