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
	ReplicaLag  time.Duration // of the standby that is furthest behind; seen by members of pg_read_all_stats only
	Connections int           // in use, in percent of max_connections
	Others      bool          // looks whether tenants are served from it: Yields
}

// Brake looks at the groups' databases once a second and says whether to hold back.
type Brake struct {
	held   atomic.Pointer[string]
	others atomic.Bool
	told   map[string]bool // what it could not see, and has logged
}

// Hold says why nothing is to be begun at the moment; empty: go on.
func (b *Brake) Hold() string {
	if s := b.held.Load(); s != nil {
		return *s
	}
	return ""
}

// Yields reports whether tenants were served from one of the databases when it was last looked at: by sessions of the logins that
// bind. Where the owner may not see when a session was last at work, one that is there counts.
func (b *Brake) Yields() bool { return b.others.Load() }

// Brake begins to look, until ctx ends. A database that does not answer holds nothing back: the work itself meets it.
// What cannot be looked at is logged, once for each group and bound.
func (r *Runner) Brake(ctx context.Context, groups []string, bounds Bounds) *Brake {
	b := &Brake{told: map[string]bool{}}
	if bounds == (Bounds{}) {
		return b
	}
	yields := func() {
		others := false
		for _, group := range groups {
			others = others || bounds.Others && b.shared(ctx, r, group)
		}
		b.others.Store(others)
	}
	yields() // before anything is begun
	go func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			why := ""
			for _, group := range groups {
				if why = b.look(ctx, r, group, bounds); why != "" {
					break
				}
			}
			b.held.Store(&why)
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				yields()
			}
		}
	}()
	return b
}

// shared reports whether tenants are served from a group's database.
func (b *Brake) shared(ctx context.Context, r *Runner, group string) (others bool) {
	inst, err := r.o.DB.Installation(ctx, group)
	if err != nil {
		return false
	}
	// With the app role itself this process is connected too: such a session counts only where it is seen at work.
	const used = `select exists (select from pg_catalog.pg_stat_activity where datname = pg_catalog.current_database() and usename = any($1)
	and (state_change > pg_catalog.clock_timestamp() - interval '2 s' or state_change is null and usename <> $2))`
	err = r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, used, inst.LoginNames(), inst.AppRole).Scan(&others)
	})
	return others && err == nil // one that does not answer is met by the work itself
}

// strain is one bound, and the question whether a group's database has passed it.
type strain struct {
	setting string
	on      func(Bounds) bool
	ask     func(ctx context.Context, tx *postgres.OwnerTx, group string, bounds Bounds) (why string, err error)
}

// errUnseen says that PostgreSQL hides what is asked for.
type errUnseen string

func (e errUnseen) Error() string { return string(e) }

var strains = []strain{
	{"migrate.max_lock_waits", func(b Bounds) bool { return b.LockWaits > 0 }, lockWaits},
	{"migrate.max_replica_lag", func(b Bounds) bool { return b.ReplicaLag > 0 }, replicaLag},
	{"migrate.max_connections", func(b Bounds) bool { return b.Connections > 0 }, connections},
}

// look says which bound a group's database has passed. Each is asked for by itself: one that cannot be seen does not
// hide the others.
func (b *Brake) look(ctx context.Context, r *Runner, group string, bounds Bounds) string {
	held := ""
	for _, s := range strains {
		if held != "" || !s.on(bounds) {
			continue
		}
		err := r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) (err error) {
			held, err = s.ask(ctx, tx, group, bounds)
			return err
		})
		if key := group + " " + s.setting; err != nil && ctx.Err() == nil && !b.told[key] {
			b.told[key] = true
			r.o.Logger.WarnContext(ctx, "a run cannot see whether to hold back, and goes on without this bound",
				"bound", s.setting, "group", group, "error", err)
		}
	}
	return held
}

func lockWaits(ctx context.Context, tx *postgres.OwnerTx, group string, bounds Bounds) (string, error) {
	const waiting = `select count(distinct l.pid) from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid
where not l.granted and a.datname = current_database() and a.usename <> current_user`
	var n int
	if err := tx.QueryRow(ctx, waiting).Scan(&n); err != nil || n <= bounds.LockWaits {
		return "", err
	}
	return fmt.Sprintf("%d sessions wait for locks in group %s", n, group), nil
}

func replicaLag(ctx context.Context, tx *postgres.OwnerTx, group string, bounds Bounds) (string, error) {
	// Of a standby that it may not look at PostgreSQL shows the row, and nulls.
	const lag = `select coalesce(extract(epoch from max(replay_lag)), 0)::float8, count(*) filter (where state is null) from pg_catalog.pg_stat_replication`
	var seconds float64
	var hidden int
	if err := tx.QueryRow(ctx, lag).Scan(&seconds, &hidden); err != nil {
		return "", err
	}
	if behind := time.Duration(seconds * float64(time.Second)); behind > bounds.ReplicaLag {
		return fmt.Sprintf("a standby of group %s is %s behind", group, behind.Round(100*time.Millisecond)), nil
	}
	if hidden > 0 {
		return "", errUnseen(fmt.Sprintf("PostgreSQL does not show how far %d standby(s) are behind: grant pg_read_all_stats to the owner's role", hidden))
	}
	return "", nil
}

func connections(ctx context.Context, tx *postgres.OwnerTx, group string, bounds Bounds) (string, error) {
	const share = `select (select coalesce(sum(numbackends), 0)::int from pg_catalog.pg_stat_database) * 100 / current_setting('max_connections')::int`
	var used int
	if err := tx.QueryRow(ctx, share).Scan(&used); err != nil || used <= bounds.Connections {
		return "", err
	}
	return fmt.Sprintf("%d %% of the connections of group %s are in use", used, group), nil
}
