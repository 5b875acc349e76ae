package migrate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// apart carries out a file without a transaction, on a connection of its own that holds the tenant's operation lock.
type apart struct {
	*work
	f         File
	s         *postgres.Session
	namespace uint32
	p         progress
}

// statements carries out what is left of a file without a transaction. A statement that can be in a transaction is in
// one with the note that it was done. Of one that cannot, it is noted first that it was begun: should this process die,
// the next one looks for what it left.
func (w *work) statements(ctx context.Context, f File) error {
	done := false
	err := w.m.db.OwnerSession(ctx, w.t.Group, func(s *postgres.Session) error {
		if err := s.LockOperation(ctx, w.t.Number, w.o.LockWait); err != nil {
			return err
		}
		var st standing
		if err := st.scan(s.QueryRow(ctx, applied, w.t.Number)); err != nil {
			return err
		}
		if st.head != f.Version-1 {
			return nil // somebody else was here while we waited for the lock
		}
		if err := w.m.sameApplied(ctx, s, w.t.Number, st); err != nil {
			return err
		}
		a := &apart{work: w, f: f, s: s}
		var err error
		if a.namespace, err = s.BindPlaced(ctx, w.t.Number); err != nil {
			return err
		}
		if err := a.bounds(ctx, false); err != nil {
			return err
		}
		if err := a.resume(ctx); err != nil {
			return err
		}
		for a.p.statements < len(f.steps) {
			if err := a.next(ctx, a.p.statements); err != nil {
				return err
			}
			w.o.Progress(Progress{File: f, Statements: a.p.statements, Of: len(f.steps)})
		}
		done = true
		return w.m.retryLocks(ctx, w.o.LockTimeout, func() error {
			return s.Tx(ctx, func() error {
				b := &pgx.Batch{}
				w.recordUp(b, []File{f}, sinceProgress)
				w.forgetProgress(b, f.Version)
				if err := s.Send(ctx, b); err != nil {
					return err
				}
				if err := w.o.Keeper.Reached(ctx, s); err != nil {
					return err
				}
				return failpoint.Hit("migrate.finish")
			})
		})
	})
	if err == nil && done {
		w.applied(f)
	}
	return err
}

// bounds sets the session's timeouts. What only waits for old transactions holds up nobody meanwhile, and is patient.
func (a *apart) bounds(ctx context.Context, patient bool) error {
	lock := a.o.LockTimeout
	if patient {
		lock = max(lock, a.o.LockWait)
	}
	return a.s.Timeouts(ctx, lock, a.o.StatementTimeout)
}

// resume reads how far an earlier attempt came. It goes on only from statements that are still the same.
func (a *apart) resume(ctx context.Context) error {
	p, found, err := readProgress(ctx, a.s, a.t.Number, a.f.Version)
	if err != nil {
		return err
	}
	if !found {
		p.checksum = a.sum(0)
	}
	if p.statements > len(a.f.steps) || !bytes.Equal(p.checksum, a.sum(p.statements)) {
		return fault.New(fault.Conflict, "migration %s was begun, and its first %d statement(s), which are done, were changed since", a.f, p.statements).
			WithCode("edited_migration").WithHint("restore them; what comes after them may be mended")
	}
	a.p = p
	// What the statements that are done have set was set for another session.
	for i, s := range a.f.steps[:p.statements] {
		if !sets(s.text) {
			continue
		}
		if err := a.s.Script(ctx, s.text); err != nil {
			return a.failed(err, i)
		}
	}
	return nil
}

// sum is the checksum of the first n statements.
func (a *apart) sum(n int) []byte {
	h := sha256.New()
	for _, s := range a.f.steps[:n] {
		h.Write([]byte(s.text))
	}
	return h.Sum(nil)
}

// note writes that so many statements are done, and that the next one is at work, if it is.
func (a *apart) note(ctx context.Context, statements int, atWork bool) error {
	p := a.p
	p.statements, p.checksum, p.begun = statements, a.sum(statements), nil
	if atWork {
		p.begun = sumOf(a.f.steps[statements])
	}
	if err := p.write(ctx, a.s, a.t.Number, a.f.Version); err != nil {
		return err
	}
	a.p = p
	return nil
}

func sumOf(s statement) []byte {
	sum := sha256.Sum256([]byte(s.text))
	return sum[:]
}

// next carries out the statement i. Of one that cannot be in a transaction, what it is to change is looked at first:
// only when that is as before the statement is it noted to be at work, so that what is found afterwards is its doing.
func (a *apart) next(ctx context.Context, i int) error {
	sh, text := a.f.shapes[i], a.f.steps[i].text
	if sh.form == ordinary {
		return a.inTx(ctx, i, text)
	}
	begun := bytes.Equal(a.p.begun, sumOf(a.f.steps[i]))
	before := true // what it is to change is as before it
	switch sh.form {
	case createIndex:
		there, err := a.index(ctx, sh.name)
		if err != nil {
			return err
		}
		if there.table == sh.table && there.invalid {
			if err := a.dropInvalid(ctx, sh.name); err != nil {
				return err
			}
			there = index{}
		}
		if begun && there.table == sh.table {
			return a.note(ctx, i+1, false)
		}
		if before = there.table == ""; before {
			empty, err := a.empty(ctx, sh.table)
			if err != nil {
				return err
			}
			if empty {
				return a.inTx(ctx, i, sh.plain)
			}
		}
	case dropIndex:
		there, err := a.index(ctx, sh.name)
		if err != nil {
			return err
		}
		if before = there.table != ""; begun && !before {
			return a.note(ctx, i+1, false)
		}
	case reindex:
		left, err := a.leftOf(ctx, sh)
		if err != nil {
			return err
		}
		for _, name := range left {
			if err := a.dropInvalid(ctx, name); err != nil {
				return err
			}
		}
	case detach:
		attached, pending, err := a.partition(ctx, sh)
		if err != nil {
			return err
		}
		if before = attached; begun && !before {
			return a.note(ctx, i+1, false)
		}
		if pending {
			text = "alter table " + postgres.Quote(sh.table) + " detach partition " + postgres.Quote(sh.name) + " finalize"
		}
	}
	if !begun && before {
		if err := a.note(ctx, i, true); err != nil {
			return err
		}
	}
	if err := failpoint.Hit("migrate.begun"); err != nil {
		return err
	}
	// To be patient with the lock on a partition would hold up its readers.
	if err := a.bounds(ctx, sh.form != detach); err != nil {
		return err
	}
	if err := a.s.Script(ctx, text); err != nil {
		return errors.Join(a.failed(err, i), a.tidy(ctx, sh, err))
	}
	if err := a.bounds(ctx, false); err != nil {
		return err
	}
	if err := failpoint.Hit("migrate.statement"); err != nil {
		return err
	}
	return a.note(ctx, i+1, false)
}

// inTx carries a statement out in a transaction, with the note that it was done.
func (a *apart) inTx(ctx context.Context, i int, text string) error {
	before := a.p
	return a.m.retryLocks(ctx, a.o.LockTimeout, func() error {
		err := a.s.Tx(ctx, func() error {
			if err := a.s.Script(ctx, text); err != nil {
				return a.failed(err, i)
			}
			return a.note(ctx, i+1, false)
		})
		if err != nil {
			a.p = before
		}
		return err
	})
}

// failed names the statement i in an error.
func (a *apart) failed(err error, i int) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return err
	}
	s := a.f.steps[i]
	line := s.line
	if pe.Position > 0 {
		line = lineAt(a.f.Up, s.start) - 1 + lineAt(s.text, byteOffset(s.text, int(pe.Position)-1))
	}
	failed := stepFailed(err, pe, a.f, i+1, line)
	var f *fault.Fault
	if errors.As(failed, &f) && i > 0 {
		f.Hint += fmt.Sprintf("; the %d statement(s) before it are done and must stay as they are", i)
	}
	return failed
}

// tidy takes away the index that a statement left unfinished, when the server can still be asked: it would slow every
// write to the table. What cannot be tidied now is found by the next attempt.
func (a *apart) tidy(ctx context.Context, sh shape, cause error) error {
	if sh.form != createIndex || ctx.Err() != nil || postgres.SQLState(cause) == "" || mayPass(postgres.SQLState(cause)) {
		return nil
	}
	there, err := a.index(ctx, sh.name)
	if err != nil || there.table != sh.table || !there.invalid {
		return err
	}
	if err := a.dropInvalid(ctx, sh.name); postgres.SQLState(err) != "55P03" {
		return err
	}
	return nil
}

// index is an index of the tenant's schema; the zero value: there is none.
type index struct {
	table   string
	invalid bool
}

func (a *apart) index(ctx context.Context, name string) (found index, err error) {
	const query = `select t.relname::text, not x.indisvalid from pg_catalog.pg_class i
join pg_catalog.pg_index x on x.indexrelid = i.oid join pg_catalog.pg_class t on t.oid = x.indrelid
where i.relnamespace = $1::oid and i.relname = $2`
	err = a.s.QueryRow(ctx, query, a.namespace, name).Scan(&found.table, &found.invalid)
	if errors.Is(err, pgx.ErrNoRows) {
		return index{}, nil
	}
	return found, err
}

// empty reports whether a table of the tenant's has no rows. A partitioned one is not asked: it must be made in
// pieces, and says so itself.
func (a *apart) empty(ctx context.Context, table string) (bool, error) {
	var there bool
	const query = `select exists (select from pg_catalog.pg_class where relnamespace = $1::oid and relname = $2 and relkind in ('r', 'm'))`
	if err := a.s.QueryRow(ctx, query, a.namespace, table).Scan(&there); err != nil || !there {
		return false, err
	}
	var rows bool
	err := a.s.QueryRow(ctx, "select exists (select from "+postgres.Quote(table)+")").Scan(&rows)
	return !rows, err
}

// leftOf lists the invalid indexes that a reindex of before has left. Those of a TOAST table are not the tenant's to
// drop and stay, as after a reindex by hand.
func (a *apart) leftOf(ctx context.Context, sh shape) ([]string, error) {
	const query = `select i.relname::text from pg_catalog.pg_index x join pg_catalog.pg_class i on i.oid = x.indexrelid
join pg_catalog.pg_class t on t.oid = x.indrelid
where i.relnamespace = $1::oid and not x.indisvalid and i.relname ~ '_cc(new|old)[0-9]*$'
	and case when $3 then t.relname = $2 else t.oid = (select y.indrelid from pg_catalog.pg_index y join pg_catalog.pg_class j on j.oid = y.indexrelid
		where j.relnamespace = $1::oid and j.relname = $2) and pg_catalog.starts_with($2::text, pg_catalog.regexp_replace(i.relname::text, '_cc(new|old)[0-9]*$', '')) end
order by 1`
	rows, err := a.s.Query(ctx, query, a.namespace, sh.name, sh.ofTable)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// dropInvalid drops an index that serves nobody. The one statement runs outside of a transaction and can be repeated.
func (a *apart) dropInvalid(ctx context.Context, name string) error {
	if err := a.bounds(ctx, true); err != nil {
		return err
	}
	err := a.s.Script(ctx, "drop index concurrently "+postgres.Quote(name))
	if err == nil {
		err = failpoint.Hit("migrate.tidied")
	}
	return errors.Join(err, a.bounds(ctx, false))
}

// partition reports whether a partition is attached to its table, and whether it is being detached.
func (a *apart) partition(ctx context.Context, sh shape) (attached, pending bool, err error) {
	const query = `select h.inhdetachpending from pg_catalog.pg_inherits h
join pg_catalog.pg_class p on p.oid = h.inhparent join pg_catalog.pg_class c on c.oid = h.inhrelid
where p.relnamespace = $1::oid and p.relname = $2 and c.relnamespace = $1::oid and c.relname = $3`
	err = a.s.QueryRow(ctx, query, a.namespace, sh.table, sh.name).Scan(&pending)
	if errors.Is(err, pgx.ErrNoRows) {
		return false, false, nil
	}
	return err == nil, pending, err
}
