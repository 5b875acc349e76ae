package migrate

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// CanGoDown asks whether the steps from one version down to another can all be taken back. The fault is Unfit and names
// the first that cannot; Invalid for versions that there are not.
func (m *Migrator) CanGoDown(from, target int) error {
	files := m.sets[TenantSet]
	if target < 0 || from > len(files) || target > from {
		return fault.New(fault.Invalid, "there is no way down from version %d to %d: the tenant migrations go from 1 to %d", from, target, len(files)).
			WithCode("target_out_of_range")
	}
	for v := from; v > target; v-- {
		if f := files[v-1]; !f.Reversible() {
			return fault.New(fault.Unfit, "migration %s cannot be taken back: it has no step down", f).WithCode("irreversible").
				WithHint("write %s.down.sql, or go no further down than --to %d; nothing was changed", f, f.Version)
		}
	}
	return nil
}

// Down takes one tenant down to a version; 0: to before the first. All steps down are one transaction, in which their
// ledger rows go. A tenant that is there or below needs nothing. Of the options Throttle has no meaning here. The faults
// are Tenant's, those of CanGoDown, and Conflict when a migration of this tenant has been begun and not finished.
func (m *Migrator) Down(ctx context.Context, t tenant.Tenant, target int, o TenantOptions) (Result, error) {
	if target < 0 || target > m.Head(TenantSet) {
		return Result{}, outOfRange(target, m.Head(TenantSet))
	}
	w := m.work(t, o, target)
	return w.end(ctx, w.down(ctx))
}

func (w *work) down(ctx context.Context) error {
	if err := failpoint.Hit("down.before"); err != nil {
		return err
	}
	var did []File
	_, err := w.enter(ctx, span{w.target + 1, math.MaxInt32}, false, func(tx *postgres.OwnerTx, st standing) (err error) {
		did, err = w.back(ctx, tx, st)
		return err
	})
	rehearsed := errors.Is(err, errRehearsed)
	if err != nil && !rehearsed {
		return err
	}
	if len(did) > 0 {
		w.res.Applied = did
		w.reached(w.target)
	}
	if rehearsed {
		return nil
	}
	return failpoint.Hit("down.after")
}

// back runs the steps down, newest first.
func (w *work) back(ctx context.Context, tx *postgres.OwnerTx, st standing) ([]File, error) {
	if err := w.m.CanGoDown(st.head, w.target); err != nil {
		return nil, err
	}
	var begun int
	const unfinished = `select coalesce(min(version), 0) from public.progress where tenant = $1 and version > $2`
	if err := tx.QueryRow(ctx, unfinished, w.t.Number, st.head).Scan(&begun); err != nil {
		return nil, err
	}
	if begun > 0 {
		return nil, fault.New(fault.Conflict, "migration %d of this tenant has been begun and is not finished", begun).WithCode("unfinished_migration").
			WithHint("finish it with `oneo migrate -t %s`, or say that it is done with `oneo migrate mark %d --applied`; then go down", w.t.Slug, begun)
	}
	// What newer code needs must not go from between two statements of a request: those at work are waited for.
	if !w.o.Rehearse {
		if err := tx.LockGate(ctx, w.t.Number); err != nil {
			return nil, err
		}
	}
	files := w.m.sets[TenantSet]
	retire(tx, files[w.target:st.head])
	var steps []step
	var did []File
	for v := st.head; v > w.target; v-- {
		f := files[v-1]
		s := step{file: f}
		if f.code != nil {
			s.fn = f.code.Down
		} else {
			s.text = plainText(f.Down)
			s.parts = statementsOf(s.text)
		}
		did, steps = append(did, f), append(steps, s)
	}
	err := w.run(ctx, tx, st.xid, steps, func(b *pgx.Batch) {
		b.Queue(`delete from public.progress where tenant = $1 and version > $2`, w.t.Number, w.target)
		// What a run has kept no longer fits: should the tenant come to that version once more, it is by another way.
		b.Queue(`update public.undo_points set expires_at = least(expires_at, pg_catalog.now()) where tenant = $1 and to_version > $2 and undone_at is null`,
			w.t.Number, w.target)
		b.Queue(`delete from public.ledger where set = 'tenant' and tenant = $1 and version > $2`, w.t.Number, w.target)
		b.Queue(`update public.placements set version = $2, reader = $3, updated_at = pg_catalog.now() where number = $1`,
			w.t.Number, w.target, w.m.Reader(w.target))
		w.tell(b, w.target)
	})
	if err != nil {
		return nil, err
	}
	if err := failpoint.Hit("down.applied"); err != nil {
		return nil, err
	}
	if w.o.Rehearse {
		return did, errRehearsed
	}
	return did, nil
}

// plainText is SQL for a transaction: without concurrently, and without vacuum and the like. Lines keep their numbers.
func plainText(sql string) string {
	var b strings.Builder
	all, _ := split(sql)
	for _, s := range all {
		if sh, err := shapeOf(s.text); err != nil || sh.plain != "" {
			b.WriteString(sh.plain)
		} else {
			b.WriteString(strings.Repeat("\n", strings.Count(s.text, "\n")))
		}
	}
	return b.String()
}

// Mark records the next steps up to a version as applied, without running them: for what was done by hand. A step that
// was begun and not finished counts as done. For a version that the tenant has already, it ends a data migration
// beside others that is still open. Result.Applied is what was recorded.
func (m *Migrator) Mark(ctx context.Context, t tenant.Tenant, version int, actor string) (Result, error) {
	if version < 1 || version > m.Head(TenantSet) {
		return Result{}, outOfRange(version, m.Head(TenantSet))
	}
	w := m.work(t, TenantOptions{}, version)
	var did []File
	_, err := w.enter(ctx, span{0, version - 1}, true, func(tx *postgres.OwnerTx, st standing) error {
		did = nil
		if st.head < version {
			did = m.sets[TenantSet][st.head:version]
			if err := m.recordMarked(ctx, tx, t.Number, did, actor); err != nil {
				return err
			}
		}
		// Of what has just been marked nothing is open; of a version that was there before, it is what was asked for.
		_, err := tx.Exec(ctx, `delete from public.progress where tenant = $1 and (version > $2 or version = $3)`, t.Number, st.head, version)
		return err
	})
	if err == nil && len(did) > 0 {
		w.applied(did...)
	}
	return w.end(ctx, err)
}

// BaselineTx records the versions up to one as applied, for a schema that is at that version already and whose placement
// stands, in the transaction of whoever adopts it. Version 0 records nothing. Conflict: the tenant has a ledger already.
func (m *Migrator) BaselineTx(ctx context.Context, tx *postgres.OwnerTx, number int32, version int) error {
	if version < 0 || version > m.Head(TenantSet) {
		return outOfRange(version, m.Head(TenantSet))
	}
	var there bool
	const known = `select exists (select from public.ledger where set = 'tenant' and tenant = $1)`
	if err := tx.QueryRow(ctx, known, number).Scan(&there); err != nil {
		return err
	}
	if there {
		return fault.New(fault.Conflict, "the tenant has a ledger already").WithCode("not_new").WithHint("oneo migrate mark VERSION --applied")
	}
	if version == 0 {
		return nil
	}
	return m.recordMarked(ctx, tx, number, m.sets[TenantSet][:version], "baseline")
}

// recordMarked writes ledger rows for what was not run here, and moves the placement.
func (m *Migrator) recordMarked(ctx context.Context, tx *postgres.OwnerTx, number int32, files []File, by string) error {
	if err := Record(ctx, tx, TenantSet, number, files, 0); err != nil {
		return err
	}
	version := files[len(files)-1].Version
	const sign = `update public.ledger set applied_by = $4 where set = 'tenant' and tenant = $1 and version between $2 and $3`
	if _, err := tx.Exec(ctx, sign, number, files[0].Version, version, by+" (marked)"); err != nil {
		return err
	}
	const move = `update public.placements set version = $2, reader = greatest(reader, $3), updated_at = now() where number = $1`
	tag, err := tx.Exec(ctx, move, number, version, m.Reader(version))
	if err != nil {
		return err
	}
	if tag.RowsAffected() != 1 {
		return fault.New(fault.NotFound, "the tenant has no placement here").WithCode("schema_missing")
	}
	_, err = tx.Exec(ctx, `select pg_catalog.pg_notify('oneo_versions', $1)`, fmt.Sprintf("%d %d", number, version))
	return err
}

// progress is a row of public.progress.
type progress struct {
	checksum      []byte
	statements    int
	begun         []byte // checksum of the statement at work; nil: none
	batches, rows int64
	bound         int64
	beside        bool
	changed       int64 // by the batch at hand; not in the row
}

func readProgress(ctx context.Context, q postgres.Querier, number int32, version int) (p progress, found bool, err error) {
	const query = `select checksum, statements, begun, batches, rows, bound, beside from public.progress where tenant = $1 and version = $2`
	err = q.QueryRow(ctx, query, number, version).Scan(&p.checksum, &p.statements, &p.begun, &p.batches, &p.rows, &p.bound, &p.beside)
	if errors.Is(err, pgx.ErrNoRows) {
		return p, false, nil
	}
	return p, err == nil, err
}

// write keeps how far a migration is.
func (p progress) write(ctx context.Context, q postgres.Querier, number int32, version int) error {
	const upsert = `insert into public.progress (tenant, version, checksum, statements, begun, batches, rows, bound, beside)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
on conflict (tenant, version) do update set checksum = excluded.checksum, statements = excluded.statements, begun = excluded.begun,
	batches = excluded.batches, rows = excluded.rows, bound = excluded.bound, updated_at = now()`
	_, err := q.Exec(ctx, upsert, number, version, p.checksum, p.statements, p.begun, p.batches, p.rows, p.bound, p.beside)
	return err
}
