package migrate

import (
	"bytes"
	"context"
	"errors"
	"math"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// data repeats a data migration's batches until one changes nothing.
func (w *work) data(ctx context.Context, f File) error {
	for {
		var over bool
		var p progress
		called, err := w.enter(ctx, span{f.Version - 1, f.Version - 1}, false, func(tx *postgres.OwnerTx, st standing) (err error) {
			p, over, err = w.batch(ctx, tx, st, f)
			return err
		})
		switch {
		case err != nil:
			return err
		case !called: // somebody else has finished it
			return nil
		}
		w.batched(f, p)
		if over {
			w.applied(f)
			return failpoint.Hit("migrate.batched")
		}
		if err := w.pause(ctx); err != nil {
			return err
		}
	}
}

// besides carries on with the data migrations that run beside others, oldest first.
func (w *work) besides(ctx context.Context) error {
	for {
		var over bool
		var p progress
		var f File
		called, err := w.enter(ctx, span{math.MaxInt32, math.MaxInt32}, true, func(tx *postgres.OwnerTx, st standing) (err error) {
			var version int
			const oldest = `select min(version) from public.progress where tenant = $1 and beside`
			if err := tx.QueryRow(ctx, oldest, w.t.Number).Scan(&version); err != nil {
				return err
			}
			f = w.m.sets[TenantSet][version-1] // sameApplied has seen that it is the one
			p, over, err = w.batch(ctx, tx, st, f)
			return err
		})
		if err != nil || !called {
			return err
		}
		w.batched(f, p)
		if !over {
			err = w.pause(ctx)
		} else {
			err = failpoint.Hit("migrate.batched")
		}
		if err != nil {
			return err
		}
	}
}

// batched tells of a batch that has been committed.
func (w *work) batched(f File, p progress) {
	w.o.Progress(Progress{File: f, Batches: p.batches, Rows: p.rows})
	w.res.Rows += p.changed
}

// pause is what stands between two batches.
func (w *work) pause(ctx context.Context) error {
	if err := failpoint.Hit("migrate.batched"); err != nil {
		return err
	}
	if w.o.Throttle > 0 && !rest(ctx, w.o.Throttle) {
		return ctx.Err()
	}
	return ctx.Err()
}

// batch carries out one batch in the transaction that it is given, together with the note of it; and with the records
// of the whole migration when it has changed nothing.
func (w *work) batch(ctx context.Context, tx *postgres.OwnerTx, st standing, f File) (p progress, over bool, err error) {
	p, found, err := readProgress(ctx, tx, w.t.Number, f.Version)
	if err != nil {
		return p, false, err
	}
	// What its batches have changed stays changed: a mended file begins to count anew.
	if !found || !bytes.Equal(p.checksum, f.Checksum[:]) {
		p = progress{checksum: f.Checksum[:], beside: f.Beside}
	}
	if p.bound == 0 {
		if p.bound, err = mostRows(ctx, tx, w.t.Number); err != nil {
			return p, false, err
		}
	}
	if p.rows > p.bound || p.batches > p.bound/int64(f.least())+freeBatches {
		return p, false, endless(f, p.rows, p.batches)
	}
	err = w.o.Keeper.Around(ctx, tx, func() (err error) {
		p.changed, err = w.changeRows(ctx, tx, f)
		return err
	})
	if err != nil {
		return p, false, err
	}
	if p.changed > 0 {
		p.batches++
		p.rows += p.changed
		if err := p.write(ctx, tx, w.t.Number, f.Version); err != nil {
			return p, false, err
		}
		return p, false, failpoint.Hit("migrate.batch")
	}
	err = w.run(ctx, tx, st.xid, nil, func(b *pgx.Batch) {
		if !f.Beside {
			w.recordUp(b, []File{f}, sinceProgress)
		}
		w.forgetProgress(b, f.Version)
	})
	if err == nil {
		err = w.o.Keeper.Reached(ctx, tx)
	}
	if err == nil {
		err = failpoint.Hit("migrate.batch")
	}
	return p, true, err
}

func endless(f File, rows, batches int64) error {
	return fault.New(fault.Unfit, "data migration %s has changed %d rows in %d batches, more than this tenant can have: it changes the same rows again and again", f, rows, batches).
		WithCode("data_migration_endless").WithHint("let it leave out the rows that it has changed; a changed file begins to count anew")
}

func (w *work) changeRows(ctx context.Context, tx *postgres.OwnerTx, f File) (changed int64, err error) {
	if f.code != nil {
		err := guarded(f, func() (err error) {
			changed, err = f.code.Batch(ctx, tx, f.Batch)
			return err
		})
		if err == nil && changed < 0 {
			err = errors.New("a batch has returned a negative number of rows")
		}
		if err != nil {
			return 0, funcFailed(err, f)
		}
		return changed, nil
	}
	var args []any
	if f.sized {
		args = append(args, f.Batch)
	}
	tag, err := tx.Exec(ctx, f.steps[0].text, args...)
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		line := f.steps[0].line
		if pe.Position > 0 {
			line = lineAt(f.steps[0].text, byteOffset(f.steps[0].text, int(pe.Position)-1))
		}
		return 0, stepFailed(err, pe, f, 1, line)
	}
	return tag.RowsAffected(), err
}

const (
	// rowsOnPage is how many rows a page of 8 kB can hold at most: 24 bytes of header and 4 of pointer each.
	rowsOnPage = 291
	// freeRows and freeBatches are what every data migration may change, however small the tenant is.
	freeRows    = 100_000
	freeBatches = 1000
)

// least is how many rows a batch changes that has found as many as it wants; 1 where only the statement knows.
func (f File) least() int {
	if f.sized || f.code != nil {
		return f.Batch
	}
	return 1
}

// mostRows is more rows than a data migration can have to change that changes each once: twice what the tenant's tables
// could hold if their pages were full of empty rows, and freeRows. It is asked before the first batch, because each
// batch makes the tables larger.
func mostRows(ctx context.Context, tx *postgres.OwnerTx, number int32) (int64, error) {
	var pages int64
	const query = `select coalesce(sum(pg_catalog.pg_relation_size(c.oid)), 0)::int8 / pg_catalog.current_setting('block_size')::int8
from pg_catalog.pg_class c join public.placements p on p.namespace = c.relnamespace where p.number = $1 and c.relkind in ('r', 'm')`
	err := tx.QueryRow(ctx, query, number).Scan(&pages)
	return freeRows + 2*rowsOnPage*pages, err
}
