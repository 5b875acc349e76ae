package migrate

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// TenantOptions says how one tenant is migrated. The zero value brings it to the head.
type TenantOptions struct {
	// Target is the version to reach, up only; 0: the head. A tenant that is there or further needs nothing.
	Target int
	// Rehearse runs everything in one transaction and rolls it back. The fault is Invalid, and names the step, when
	// one that is needed cannot be part of a transaction.
	Rehearse         bool
	LockTimeout      time.Duration // for each lock; 0: the database's
	StatementTimeout time.Duration // for each statement; 0: none
	LockWait         time.Duration // for another operation on the same tenant; 0: the Migrator's
	Throttle         time.Duration // pause between the batches of a data migration
	// Keeper keeps what the steps are about to change; nil: nothing is kept. A rehearsal keeps nothing.
	Keeper Keeper
	// Untold leaves out the notice to servers that the tenant's version has changed: whoever migrates many gives it by
	// Tell. Commits that carry a notice wait for each other, with their flush to disk.
	Untold bool
	// Progress is called after each step, statement and batch that is more than part of a transaction, by the
	// goroutine that called Tenant; may be nil.
	Progress func(Progress)
}

// Progress is how far a migration of one tenant is that is more than one transaction.
type Progress struct {
	File       File
	Statements int   // of a file without a transaction: done
	Of         int   // its statements
	Batches    int64 // of a data migration, over all attempts
	Rows       int64 // that they changed
}

// Keeper keeps what the steps of a migration are about to change in one tenant, so that it can be put back. What it
// writes stands or falls with the step.
type Keeper interface {
	// Around calls do, which changes the tenant's tables, in a transaction that is bound to the tenant and holds its
	// operation lock. It may take what do has changed back, to a savepoint, and call it again. do is nil before a file
	// without a transaction, whose statements follow elsewhere.
	Around(ctx context.Context, tx *postgres.OwnerTx, do func() error) error
	// Reached is called in the transaction in which the tenant has just reached another version outside of Around.
	Reached(ctx context.Context, q postgres.Querier) error
}

// keepNothing is the Keeper of those who want none.
type keepNothing struct{}

func (keepNothing) Around(_ context.Context, _ *postgres.OwnerTx, do func() error) error {
	if do == nil {
		return nil
	}
	return do()
}

func (keepNothing) Reached(context.Context, postgres.Querier) error { return nil }

// Tenant brings one tenant up to its target. It may be suspended, and need not be in the registry; it must have a
// placement. Its consecutive steps are one transaction where they can be: after a failure the tenant is at the version
// that Result.To says, and nothing of what came later is left, except in a file without a transaction and in a data
// migration, which go on where they stopped.
//
// The fault is Locked when the tenant is busy: another operation is at work on it, or others hold locks that the steps
// need; Conflict when a file was changed after it had been applied to this tenant; Unfit (migration_failed) when a
// statement failed, with its place; NotFound when the schema is not where the placement says; Unavailable when the
// database is.
func (m *Migrator) Tenant(ctx context.Context, t tenant.Tenant, o TenantOptions) (Result, error) {
	target, err := m.target(o.Target)
	if err != nil {
		return Result{}, err
	}
	w := m.work(t, o, target)
	return w.end(ctx, w.up(ctx))
}

// target is the version that is meant; 0: the head.
func (m *Migrator) target(version int) (int, error) {
	head := m.Head(TenantSet)
	switch {
	case version == 0:
		return head, nil
	case version < 0 || version > head:
		return 0, outOfRange(version, head)
	}
	return version, nil
}

func outOfRange(version, head int) error {
	return fault.New(fault.Invalid, "there is no version %d: the tenant migrations go from 1 to %d", version, head).WithCode("target_out_of_range")
}

// work is the migration of one tenant.
type work struct {
	m      *Migrator
	t      tenant.Tenant
	o      TenantOptions
	target int
	start  time.Time
	known  bool // res.From is
	beside bool // a data migration beside others was open when the tenant was looked at last
	res    Result
}

func (m *Migrator) work(t tenant.Tenant, o TenantOptions, target int) *work {
	if o.LockTimeout <= 0 {
		o.LockTimeout = m.db.LockTimeout()
	}
	if o.LockWait <= 0 {
		o.LockWait = m.lockWait
	}
	if o.Progress == nil {
		o.Progress = func(Progress) {}
	}
	if o.Keeper == nil || o.Rehearse {
		o.Keeper = keepNothing{}
	}
	return &work{m: m, t: t, o: o, target: target, start: time.Now()}
}

// end completes the result, and says in a failure where the tenant is.
func (w *work) end(ctx context.Context, err error) (Result, error) {
	w.res.Duration = time.Since(w.start)
	if err == nil {
		return w.res, nil
	}
	if ctx.Err() != nil && postgres.SQLState(err) == "57014" { // cancelled, not too slow
		return w.res, fmt.Errorf("migrate: %w", ctx.Err())
	}
	var f *fault.Fault
	if errors.As(err, &f) {
		if f.Tenant == "" {
			f.Tenant = w.t.Slug.String()
		}
		if f.Code == codeFailed && w.known {
			f.Message += fmt.Sprintf("; the tenant is at version %d", w.res.To)
		}
	}
	return w.res, err
}

// reached notes at which version the tenant is.
func (w *work) reached(version int) {
	if !w.known {
		w.known, w.res.From = true, version
	}
	w.res.To = version
}

// standing is what is known of a tenant in the transaction that holds its operation lock.
type standing struct {
	head   int // its newest ledger row
	beside bool
	got    *bool // the operation lock; nil: not asked for
	rows   int
	sum    []byte // of the checksums of its ledger rows
	xid    string
	heldBy string // a full backup that has not copied the tenant yet, whether the lock was got or not
}

// span is the versions at which work has to be done; at others it takes no lock.
type span struct{ from, to int }

var errBusy = errors.New("the operation lock is held")

// enter runs fn in a transaction that holds the operation lock and is bound to the tenant, when the tenant's version is
// within the span, or, with beside, when a data migration beside others is open. Otherwise fn is not called, and no lock
// is taken. It waits for the lock outside of any transaction.
func (w *work) enter(ctx context.Context, need span, beside bool, fn func(*postgres.OwnerTx, standing) error) (called bool, err error) {
	deadline := time.Now().Add(w.o.LockWait)
	for attempt := 0; ; attempt++ {
		heldBy := ""
		err := w.m.retryLocks(ctx, w.o.LockTimeout, func() error {
			called = false
			bounds := postgres.OwnerOptions{LockTimeout: w.o.LockTimeout, StatementTimeout: w.o.StatementTimeout}
			l := look{need: need, besides: beside}
			queue := func(b *pgx.Batch) { l.queue(b, w.t.Number) }
			err := w.m.db.AsOwnerAt(ctx, w.t.Group, w.t.Number, bounds, queue, func(tx *postgres.OwnerTx) error {
				st := l.standing()
				w.reached(st.head)
				w.beside = st.beside
				heldBy = st.heldBy
				switch {
				case st.got == nil:
					return nil
				case !*st.got, heldBy != "": // one that has come since the lock was tried, too
					return errBusy
				}
				if err := w.m.sameApplied(ctx, tx, w.t.Number, st); err != nil {
					return err
				}
				called = true
				return fn(tx, st)
			})
			if postgres.SQLState(err) == stateEnded {
				return SameTransaction("", "ended")
			}
			return err
		})
		if !errors.Is(err, errBusy) {
			return called, err
		}
		if time.Now().After(deadline) {
			if heldBy != "" {
				return false, postgres.HeldBack(heldBy)
			}
			return false, postgres.OperationBusy()
		}
		if !rest(ctx, min(5*time.Millisecond<<min(attempt, 6), 250*time.Millisecond)) {
			return false, ctx.Err()
		}
	}
}

const (
	// The lock is tried first, by a statement of its own: what the next one reads is not older than the lock. "offset 0"
	// keeps PostgreSQL from reading the ledger once for each time that its head is mentioned.
	tryLock = `select l.head, l.beside, case when l.head between $2 and $3 or $4 and l.beside then
	public.held_by($1) is null and pg_catalog.pg_try_advisory_xact_lock($5::int4, $1::int4) end
from (select coalesce((select max(version) from public.ledger where set = 'tenant' and tenant = $1), 0) as head,
	exists (select from public.progress where tenant = $1 and beside) as beside offset 0) l`
	applied = `select count(*), coalesce(max(l.version), 0), pg_catalog.sha256(coalesce(string_agg(l.checksum, ''::bytea), ''::bytea)),
	exists (select from public.progress where tenant = $1 and beside), pg_catalog.pg_current_xact_id()::text, coalesce(public.held_by($1), '')
from (select version, checksum from public.ledger where set = 'tenant' and tenant = $1 order by version) l`
)

// look tries the lock and reads where the tenant is.
type look struct {
	need          span
	besides       bool
	before, after standing
}

// queue adds the statements. They may be sent again.
func (l *look) queue(b *pgx.Batch, number int32) {
	b.Queue(tryLock, number, l.need.from, l.need.to, l.besides, postgres.OperationLock).QueryRow(func(row pgx.Row) error {
		return row.Scan(&l.before.head, &l.before.beside, &l.before.got)
	})
	b.Queue(applied, number).QueryRow(l.after.scan)
}

// scan reads the answer to applied.
func (st *standing) scan(row pgx.Row) error {
	return row.Scan(&st.rows, &st.head, &st.sum, &st.beside, &st.xid, &st.heldBy)
}

func (l *look) standing() standing {
	st := l.after
	// While the lock was tried somebody else may have finished: then there is nothing to do after all.
	if l.before.got != nil && *l.before.got && (st.head < l.need.from || st.head > l.need.to) && !(l.besides && st.beside) {
		return st
	}
	st.got = l.before.got
	return st
}

// sameApplied refuses to go on from files that differ from what was applied to this tenant.
func (m *Migrator) sameApplied(ctx context.Context, q postgres.Querier, number int32, st standing) error {
	files := m.sets[TenantSet]
	if st.rows == st.head && st.head <= len(files) {
		sum := sha256.New()
		for _, f := range files[:st.head] {
			sum.Write(f.Checksum[:])
		}
		if string(sum.Sum(nil)) == string(st.sum) {
			return nil
		}
	}
	rows, err := q.Query(ctx, `select version, checksum from public.ledger where set = 'tenant' and tenant = $1 order by version`, number)
	if err != nil {
		return err
	}
	expected, version := 1, 0
	var sum []byte
	_, err = pgx.ForEachRow(rows, []any{&version, &sum}, func() error {
		if version != expected {
			return fault.New(fault.Conflict, "the ledger lacks version %d of this tenant", expected).WithCode("ledger_gap").
				WithHint("somebody has changed public.ledger by hand: put the row back")
		}
		expected++
		return m.sameContent(TenantSet, version, sum)
	})
	return err
}

// up takes the tenant to the target, chunk by chunk, and then goes on with what runs beside.
func (w *work) up(ctx context.Context) error {
	for {
		if err := failpoint.Hit("migrate.before"); err != nil {
			return err
		}
		var did []File
		var alone *File
		called, err := w.enter(ctx, span{0, w.target - 1}, false, func(tx *postgres.OwnerTx, st standing) (err error) {
			did, alone, err = w.chunk(ctx, tx, st)
			return err
		})
		switch {
		case errors.Is(err, errRehearsed):
			w.applied(did...)
			return nil
		case err != nil:
			return err
		case !called:
		case alone == nil:
			w.applied(did...)
		case alone.Kind == NoTransaction:
			err = w.statements(ctx, *alone)
		default:
			err = w.data(ctx, *alone)
		}
		if err == nil && called {
			err = failpoint.Hit("migrate.after")
		}
		if err != nil {
			return err
		}
		if w.res.To >= w.target {
			break
		}
	}
	if !w.beside || w.o.Rehearse {
		return nil
	}
	return w.besides(ctx)
}

// applied notes what has been committed.
func (w *work) applied(files ...File) {
	w.res.Applied = append(w.res.Applied, files...)
	for _, f := range files {
		w.beside = w.beside || f.Kind == Data && f.Beside
	}
	w.reached(files[len(files)-1].Version)
}

// errRehearsed rolls a rehearsal back.
var errRehearsed = errors.New("rehearsed")

// chunk runs the steps that can be one transaction, up to the target or to one that stands by itself. When the next one
// does, it is returned and nothing is done.
func (w *work) chunk(ctx context.Context, tx *postgres.OwnerTx, st standing) (did []File, alone *File, err error) {
	files := w.m.sets[TenantSet][st.head:w.target]
	n := 0
	for n < len(files) && !files[n].alone() {
		n++
	}
	if w.o.Rehearse {
		for _, f := range files {
			if f.Kind == NoTransaction || f.Kind == Data {
				return nil, nil, fault.New(fault.Invalid, "migration %s cannot be rehearsed: it is not one transaction", f).WithCode("not_transactional").
					WithHint("rehearse the versions before it: --to %d", f.Version-1)
			}
		}
	}
	if n == 0 {
		if files[0].Kind == NoTransaction {
			err = w.o.Keeper.Around(ctx, tx, nil)
		}
		return nil, &files[0], err
	}
	// What older code cannot stand must not come between two statements of a request: those at work are waited for.
	if !w.o.Rehearse && w.m.Reader(files[n-1].Version) > w.m.Reader(st.head) {
		if err := tx.LockGate(ctx, w.t.Number); err != nil {
			return nil, nil, err
		}
	}
	retire(tx, files[:n])
	steps := make([]step, n)
	for i, f := range files[:n] {
		steps[i] = step{file: f}
		switch {
		case f.Kind == Data: // its batches come later
		case f.code != nil:
			steps[i].fn = f.code.Up
		default:
			steps[i].text, steps[i].parts = f.Up, f.steps
		}
	}
	err = w.o.Keeper.Around(ctx, tx, func() error {
		return w.run(ctx, tx, st.xid, steps, func(b *pgx.Batch) { w.recordUp(b, files[:n], sinceBegin) })
	})
	if err != nil {
		return nil, nil, err
	}
	if err := failpoint.Hit("migrate.applied"); err != nil {
		return nil, nil, err
	}
	if w.o.Rehearse {
		return files, nil, errRehearsed
	}
	return files[:n], nil, nil
}

// retire ends the connection with the transaction where the steps may leave something behind in the session: the next
// tenant's would run under it.
func retire(tx *postgres.OwnerTx, files []File) {
	if slices.ContainsFunc(files, func(f File) bool { return f.lasts }) {
		tx.Retire()
	}
}

// step is what one step of a chunk consists of.
type step struct {
	file  File
	text  string
	parts []statement
	fn    func(context.Context, *postgres.OwnerTx) error
}

// run carries out steps in the transaction: SQL that stands together as one script, and functions in between. records
// adds the records, which are written only if the transaction is still the one that it was. They go with the commit,
// unless it is to be rolled back or somebody wants to see them before.
func (w *work) run(ctx context.Context, tx *postgres.OwnerTx, xid string, steps []step, records func(*pgx.Batch)) error {
	sc := &script{}
	for _, s := range steps {
		if s.fn == nil {
			if s.text != "" {
				sc.add(s.file, s.text, s.parts)
			}
			continue
		}
		if len(sc.parts) > 0 {
			if done, err := tx.Run(ctx, sc.text()); err != nil {
				return sc.failed(err, done)
			}
			sc = &script{}
		}
		if err := guarded(s.file, func() error { return s.fn(ctx, tx) }); err != nil {
			return funcFailed(err, s.file)
		}
		after, err := Transaction(ctx, tx)
		if err == nil {
			err = SameTransaction(xid, after)
		}
		if err != nil {
			return funcFailed(err, s.file)
		}
	}
	// A constraint that waits for the commit is looked at while it can still be told from a lost connection.
	sc.then("set constraints all immediate")
	if done, err := tx.Run(ctx, sc.text()); err != nil {
		return sc.failed(err, done)
	}
	all := func(b *pgx.Batch) {
		b.Queue(`select ext.refuse($1::text, 'ended') where pg_catalog.pg_current_xact_id()::pg_catalog.text <> $2::text`, stateEnded, xid)
		records(b)
	}
	if _, nobody := w.o.Keeper.(keepNothing); w.o.Rehearse || !nobody {
		b := &pgx.Batch{}
		all(b)
		return tx.Send(ctx, b)
	}
	tx.Last(all)
	return nil
}

const (
	record = `insert into public.ledger (set, tenant, version, name, checksum, duration_ms)
values ('tenant', $1, $2, $3, $4, least(extract(epoch from pg_catalog.clock_timestamp() - %s) * 1000, 2147483647)::pg_catalog.int4)`
	// sinceBegin is when the work of a transaction began, and sinceProgress when that on a migration did which is more
	// than one transaction.
	sinceBegin    = "pg_catalog.now()"
	sinceProgress = "coalesce((select p.started_at from public.progress p where p.tenant = $1 and p.version = $2), pg_catalog.now())"
)

// recordUp adds the ledger rows of steps, what is to follow of those beside others, and the tenant's new place.
func (w *work) recordUp(b *pgx.Batch, files []File, since string) {
	number := w.t.Number
	for _, f := range files {
		b.Queue(fmt.Sprintf(record, since), number, f.Version, f.Name, f.Checksum[:])
	}
	for _, f := range files {
		if f.Kind == Data && f.Beside {
			b.Queue(`insert into public.progress (tenant, version, checksum, beside) values ($1, $2, $3, true)`, number, f.Version, f.Checksum[:])
		}
	}
	version := files[len(files)-1].Version
	b.Queue(`update public.placements set version = $2, reader = greatest(reader, $3), updated_at = pg_catalog.now() where number = $1`,
		number, version, w.m.Reader(version))
	w.tell(b, version)
}

// forgetProgress adds that the work on a migration that was more than one transaction is over.
func (w *work) forgetProgress(b *pgx.Batch, version int) {
	b.Queue(`delete from public.progress where tenant = $1 and version = $2`, w.t.Number, version)
}

// Tell says to the servers that versions of tenants of a group have changed: they look which ones they serve.
func (m *Migrator) Tell(ctx context.Context, group string) error {
	return m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `select pg_catalog.pg_notify('oneo_versions', '')`)
		return err
	})
}

// tell adds the notice that a tenant's version has changed: servers refuse what they do not know.
func (w *work) tell(b *pgx.Batch, version int) {
	if !w.o.Untold {
		b.Queue(`select pg_catalog.pg_notify('oneo_versions', $1)`, fmt.Sprintf("%d %d", w.t.Number, version))
	}
}

// funcFailed says which migration in Go failed. A fault of its own, and what may pass, keep what they say.
func funcFailed(err error, f File) error {
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return stepFailed(err, pe, f, 0, 0)
	}
	var known *fault.Fault
	if err = postgres.Fault(err); errors.As(err, &known) || errors.Is(err, context.Canceled) {
		return err
	}
	return fault.Wrap(err, fault.Unfit, "migration %s failed", f).WithCode(codeFailed).WithHint("mend the data or the function, then run the same command again")
}
