package app

import (
	"context"
	"time"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// KindBackup is the kind of the runs that back tenants up.
const KindBackup = rollout.Prefix + "backup"

// KindMigrate is the kind of the runs that migrate tenants.
const KindMigrate = rollout.Prefix + "migrate"

// BackupRequest is what a process that works on a run of backups must know.
type BackupRequest struct {
	Reason  string        `json:"reason,omitempty"`
	Keep    bool          `json:"keep,omitempty"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
}

// BackedUp is what a task of such a run keeps.
type BackedUp struct {
	Backup  string         `json:"backup,omitempty"`
	Rows    int64          `json:"rows"`
	Bytes   int64          `json:"size_bytes"`
	Warning string         `json:"warning,omitempty"`
	Reason  *rollout.Cause `json:"reason,omitempty"` // why it was left out
}

// BackUp does the task of a run of backups. When interrupt ends, what is at work is broken off and the task handed back:
// half an archive is worth nothing.
func (a *App) BackUp(ctx, interrupt context.Context, b *backup.Backups, r BackupRequest, task rollout.Task) rollout.Outcome {
	var t tenant.Tenant
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		t, err = registry.ByNumber(ctx, tx, task.Number)
		return err
	})
	if err != nil {
		return rollout.Outcome{Err: err}
	}
	if t.State == tenant.Purged {
		return rollout.Outcome{Status: fleet.Skipped, Result: BackedUp{Reason: &rollout.Cause{Code: "tenant_purged", Message: "it was purged since"}}}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(interrupt, cancel)()
	made, err := b.Create(ctx, t, backup.CreateOptions{Run: task.Run, Reason: r.Reason, Kept: r.Keep})
	if err != nil {
		if interrupt.Err() != nil {
			return rollout.Outcome{Undone: true}
		}
		return rollout.Outcome{Err: err, Result: BackedUp{Warning: made.Warning}}
	}
	return rollout.Outcome{From: made.Version, To: made.Version, Result: BackedUp{Backup: made.ID, Rows: made.Rows, Bytes: made.Bytes, Warning: made.Warning}}
}

// Brake says when a run over the fleet is to hold back, by the bounds of the configuration, and, if it is one that yields,
// whether others use the databases; it looks until ctx ends.
func (a *App) Brake(ctx context.Context, yields bool) *rollout.Brake {
	m := a.Config.Migrate
	return a.Rollout.Brake(ctx, a.DB.Groups(), rollout.Bounds{
		LockWaits: m.MaxLockWaits, ReplicaLag: m.MaxReplicaLag, Connections: m.MaxConnections, Others: yields && m.LiveShare > 0,
	})
}
