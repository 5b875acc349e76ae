package doctor

import (
	"context"
	"time"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Impatient takes every session that stands still for one that does so for too long, and looks twice without a pause.
func Impatient(d *Doctor) { d.idle, d.settle = 0, 0 }

// Judged is what one of the judges says.
func Judged(judge func(r *report)) Result {
	var r report
	judge(&r)
	return r.result(Check{})
}

// The judges, for what cannot be planted.
var (
	Version = func(v int) func(*report) { return func(r *report) { judgeVersion(r, "main", v) } }
	Locks   = func(locks, each int) func(*report) { return func(r *report) { judgeLocks(r, "main", locks, each) } }
	Age     = func(age, most int64) func(*report) {
		return func(r *report) { judgeAge(r, "main", "transactions", age, most) }
	}
	Room = func(relations, tenants, theirs int64) func(*report) {
		return func(r *report) { judgeRoom(r, "main", relations, tenants, theirs, 1<<30, 1<<20) }
	}
	Disk = func(free, size, inodes, all int64) func(*report) {
		return func(r *report) { judgeDisk(r, "main", disk{free, size, inodes, all}, 100, 2) }
	}
	Pooler = func(version, tracks, statements string) func(*report) {
		return func(r *report) { judgePooler(r, "main", bouncer{version, tracks}, statements) }
	}
	Memory       = func(s cache.Server) func(*report) { return func(r *report) { judgeMemory(r, s) } }
	RedisVersion = func(s cache.Server) func(*report) { return func(r *report) { judgeRedis(r, s) } }
	Run          = func(run string) func(*report) { return func(r *report) { judgeRun(r, 30*time.Second, run) } }
	Persistence  = func(p cache.Persistence, now time.Time) func(*report) {
		return func(r *report) { judgePersistence(r, p, now) }
	}
	Clock = func(theirs, before, after time.Time, grain time.Duration) func(*report) {
		return func(r *report) { judgeClock(r, "main", "it", moment{theirs, before, after, grain}) }
	}
)

// KeyOf is keyOf, in words.
func KeyOf(key string, is, was map[string]bool) string {
	return map[keyKind]string{ourKey: "ours", goneKey: "gone", foreignKey: "foreign"}[keyOf(key, is, was)]
}

// One looks once, at what a function says that is asked again and again.
func One(d *Doctor, settles bool, look func(ctx context.Context, found func(message string)) error) Result {
	return d.one(context.Background(), Check{settles: settles, run: func(ctx context.Context, _ *Doctor, r *report) error {
		return look(ctx, func(message string) { r.found(Fail, "", "", "%s", message) })
	}})
}

// Read runs a statement as a check would.
func Read(ctx context.Context, d *Doctor, sql string) error {
	return d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, sql)
		return err
	})
}

// MendIndex and Uncache are repairs by themselves.
var (
	MendIndex = func(ctx context.Context, d *Doctor, number int32, schema, name, sql string) error {
		return d.mendIndex(ctx, postgres.MainGroup, number, schema, name, sql)
	}
	Uncache = func(ctx context.Context, d *Doctor, keys ...string) error { return d.uncache(ctx, keys) }
)

// Long reports whether a finding's repair may take as long as it takes, and Bounded whether one that may, or may not, is told
// of an end.
func Long(f Finding) bool { return f.fix.long }

// Bounded is told of at Long.
func Bounded(d *Doctor, long bool) (bounded bool) {
	d.o.Fix = true
	d.one(context.Background(), Check{run: func(_ context.Context, _ *Doctor, r *report) error {
		f := r.found(Fail, "", "", "wrong")
		f.by(func(ctx context.Context) error {
			_, bounded = ctx.Deadline()
			return nil
		}, "mend it")
		f.fix.long = long
		return nil
	}})
	return bounded
}
