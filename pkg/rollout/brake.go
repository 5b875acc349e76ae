package rollout

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Bounds are what a database may suffer before a run holds back. 0 switches one off.
type Bounds struct {
	LockWaits   int           // sessions, other than oneo's owner's, that wait for a lock
	ReplicaLag  time.Duration // of the standby that is furthest behind; seen by members of pg_monitor only
	Connections int           // in use, in percent of max_connections
}

// Brake looks at the groups' databases once a second and says whether to hold back.
type Brake struct{ held atomic.Pointer[string] }

// Hold says why nothing is to be begun at the moment; empty: go on.
func (b *Brake) Hold() string {
	if s := b.held.Load(); s != nil {
		return *s
	}
	return ""
}

// Brake begins to look, until ctx ends. A database that does not answer holds nothing back: the work itself meets it.
func (r *Runner) Brake(ctx context.Context, groups []string, bounds Bounds) *Brake {
	b := &Brake{}
	if bounds == (Bounds{}) {
		return b
	}
	go func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			why := ""
			for _, group := range groups {
				if s, err := r.strained(ctx, group, bounds); err == nil && s != "" {
					why = s
					break
				}
			}
			b.held.Store(&why)
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
			}
		}
	}()
	return b
}

// strained says which bound a group's database has passed.
func (r *Runner) strained(ctx context.Context, group string, bounds Bounds) (why string, err error) {
	const look = `select
	(select count(distinct l.pid) from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid
		where not l.granted and a.datname = current_database() and a.usename <> current_user),
	coalesce((select extract(epoch from max(replay_lag)) from pg_catalog.pg_stat_replication), 0)::float8,
	(select coalesce(sum(numbackends), 0)::int from pg_catalog.pg_stat_database) * 100 / current_setting('max_connections')::int`
	var waits, used int
	var lag float64
	err = r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error { return tx.QueryRow(ctx, look).Scan(&waits, &lag, &used) })
	behind := time.Duration(lag * float64(time.Second))
	switch {
	case err != nil:
	case bounds.LockWaits > 0 && waits > bounds.LockWaits:
		why = fmt.Sprintf("%d sessions wait for locks in group %s", waits, group)
	case bounds.ReplicaLag > 0 && behind > bounds.ReplicaLag:
		why = fmt.Sprintf("a standby of group %s is %s behind", group, behind.Round(100*time.Millisecond))
	case bounds.Connections > 0 && used > bounds.Connections:
		why = fmt.Sprintf("%d %% of the connections of group %s are in use", used, group)
	}
	return why, err
}
