package transfer

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const (
	// drainEvery is how often those are looked for who were at work when a full backup began.
	drainEvery = 50 * time.Millisecond
	// signEvery is how often a moment's session gives a sign of life, and lostAfter how long PostgreSQL waits for one: then
	// the session ends, and nothing is held back any more.
	signEvery = 5 * time.Second
	lostAfter = time.Minute
)

// Moment is a group's database as it was at one moment. Until it is over no structural operation begins on a tenant that was
// not released.
type Moment struct {
	Group string
	// At is when it was.
	At time.Time
	// Postgres is the server's version as in server_version_num.
	Postgres int
	// Versions are those of the group's and, in the main group, of the shared migrations.
	Versions map[migrate.Set]int
	// Tenants are those whose schemas stand there, in the order of their numbers. Missing are those of which the registry says so
	// and that do not.
	Tenants, Missing []tenant.Tenant

	x        *Transfers
	ses      *postgres.Session // whose snapshot it is
	snapshot string
	hold     int32
	known    map[int32]archive.Registry
}

// Moments fixes one moment of each group's database and of the registry's, which comes first, and gives them to fn: what is
// exported of one group is consistent in itself, and groups are not consistent with each other. Structural operations wait, or
// are refused, from before the first moment on: on each tenant until it was released, on the shared tables until fn
// returns. Those that were at work are waited for. When this process dies nothing is held back any more. backup and actor name it to
// those who wait.
//
// Locked: another full backup is being made, or an operation does not end in time. What fn returns comes back; Unavailable when
// a moment was lost while it ran.
func (x *Transfers) Moments(ctx context.Context, groups []string, backup, actor string, fn func(context.Context, []*Moment) error) error {
	names := []string{postgres.MainGroup}
	for _, g := range x.o.DB.Groups() {
		if g != postgres.MainGroup && slices.Contains(groups, g) {
			names = append(names, g)
		}
	}
	return x.held(ctx, names, backup, actor, nil, func(ms []*Moment) error {
		return x.atOnce(ctx, ms, 0, func() error {
			if err := x.standingAt(ctx, ms, groups); err != nil {
				return err
			}
			if err := failpoint.Hit("full.held"); err != nil {
				return err
			}
			return whileTheyLast(ctx, ms, fn)
		})
	})
}

// held holds all structural operations back in one group's database after another, then calls then. All are held before the
// first moment is fixed: a tenant that is being moved must not be missed in both places.
func (x *Transfers) held(ctx context.Context, names []string, backup, actor string, ms []*Moment, then func([]*Moment) error) error {
	if len(names) == 0 {
		return then(ms)
	}
	return x.o.DB.OwnerSession(ctx, names[0], func(ses *postgres.Session) error {
		m := &Moment{Group: names[0], x: x, ses: ses}
		defer m.release(ctx)
		if err := m.take(ctx, backup, actor); err != nil {
			return fmt.Errorf("hold back what changes the database of group %s: %w", m.Group, err)
		}
		return x.held(ctx, names[1:], backup, actor, append(ms, m), then)
	})
}

// take makes the hold seen, and waits for those who may not have seen it.
func (m *Moment) take(ctx context.Context, backup, actor string) error {
	// Migrations of the shared tables take it too. It goes with the session.
	err := m.ses.LockReading(ctx, 0, m.x.o.LockWait)
	if fault.Is(err, fault.Locked) {
		return fault.Wrap(err, fault.Locked, "another full backup, or a migration of the shared tables, is at work").WithCode("operation_running").WithRetry(time.Second).
			WithHint("wait until it is done, then run the command again")
	}
	if err != nil {
		return err
	}
	// Whatever else stands there is of processes that were killed: whoever lives has the lock that we have.
	if _, err := m.ses.Exec(ctx, `delete from public.holds`); err != nil {
		return err
	}
	if err := m.ses.QueryRow(ctx, `insert into public.holds (backup, actor) values ($1, $2) returning id`, backup, actor).Scan(&m.hold); err != nil {
		return err
	}
	if _, err := m.ses.Exec(ctx, `select pg_catalog.pg_advisory_lock($1::int4, $2::int4)`, postgres.HoldLock, m.hold); err != nil {
		return err
	}
	if err := failpoint.Hit("full.holding"); err != nil {
		return err
	}
	return m.drain(ctx)
}

// drain waits for those who have an operation lock now. Whoever gets one later has seen the hold, and changes nothing.
func (m *Moment) drain(ctx context.Context) error {
	const query = `select l.objid::int4, l.pid from pg_catalog.pg_locks l where l.locktype = 'advisory' and l.classid = $1::int4::oid and l.objid <> 0 and l.objsubid = 2 and l.granted
	and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())`
	type holder struct{ tenant, pid int32 }
	atWork := func() (map[holder]bool, error) {
		rows, err := m.ses.Query(ctx, query, postgres.OperationLock)
		if err != nil {
			return nil, err
		}
		all := map[holder]bool{}
		var h holder
		_, err = pgx.ForEachRow(rows, []any{&h.tenant, &h.pid}, func() error { all[h] = true; return nil })
		return all, err
	}
	first, err := atWork()
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(m.x.o.LockWait); ; {
		now, err := atWork()
		if err != nil {
			return err
		}
		for h := range first {
			if !now[h] {
				delete(first, h)
			}
		}
		switch {
		case len(first) == 0:
			return nil
		case time.Now().After(deadline):
			return fault.New(fault.Locked, "operations on %d tenant(s) have not ended", len(first)).WithCode("operation_running").WithRetry(time.Second).
				WithHint("wait until they are done, then run the command again")
		}
		select {
		case <-time.After(drainEvery):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// release lets go of what is still held back. Where it cannot, the end of the session does.
func (m *Moment) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err := m.x.o.DB.AsOwner(ctx, m.Group, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `delete from public.holds where id = $1`, m.hold)
		return err
	})
	if err != nil {
		m.x.o.Logger.WarnContext(ctx, "what a full backup has held back is let go by the end of its session", "group", m.Group, "error", err)
	}
}

// atOnce begins the transactions whose snapshots the moments are, then calls then.
func (x *Transfers) atOnce(ctx context.Context, ms []*Moment, i int, then func() error) error {
	if i == len(ms) {
		return then()
	}
	m := ms[i]
	if err := m.ses.Script(ctx, fmt.Sprintf("set idle_in_transaction_session_timeout to %d", lostAfter.Milliseconds())); err != nil {
		return err
	}
	return m.ses.Snapshot(ctx, func() error {
		const fix = `select pg_catalog.pg_export_snapshot(), pg_catalog.clock_timestamp(), pg_catalog.current_setting('server_version_num')::int`
		if err := m.ses.QueryRow(ctx, fix).Scan(&m.snapshot, &m.At, &m.Postgres); err != nil {
			return err
		}
		rows, err := m.ses.Query(ctx, `select set, max(version) from public.ledger where tenant = 0 group by set`)
		if err != nil {
			return err
		}
		m.Versions = map[migrate.Set]int{}
		var set migrate.Set
		var version int
		if _, err := pgx.ForEachRow(rows, []any{&set, &version}, func() error { m.Versions[set] = version; return nil }); err != nil {
			return err
		}
		return x.atOnce(ctx, ms, i+1, then)
	})
}

// standingAt reads whose tenants are to be exported from which moment, and lets go of everybody else.
func (x *Transfers) standingAt(ctx context.Context, ms []*Moment, groups []string) error {
	all, known, err := x.registered(ctx, ms[0].ses)
	if err != nil {
		return err
	}
	for _, m := range ms {
		m.known = known
		rows, err := m.ses.Query(ctx, `select p.number from public.placements p
join pg_catalog.pg_namespace n on n.oid = p.namespace and n.nspname = p.schema where p.state not in ('spare', 'moved')`)
		if err != nil {
			return err
		}
		stands, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		if err != nil {
			return err
		}
		slices.Sort(stands)
		numbers := []int32{}
		for _, t := range all {
			if t.Group != m.Group || !slices.Contains(groups, m.Group) {
				continue
			}
			if _, there := slices.BinarySearch(stands, t.Number); there {
				m.Tenants, numbers = append(m.Tenants, t), append(numbers, t.Number)
			} else if t.State != tenant.Creating { // which had not got as far as its schema
				m.Missing = append(m.Missing, t)
			}
		}
		err = x.o.DB.AsOwner(ctx, m.Group, func(tx *postgres.OwnerTx) error {
			if _, err := tx.Exec(ctx, `insert into public.held (tenant, hold) select n, $1 from unnest($2::int4[]) n`, m.hold, numbers); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, `update public.holds set everything = false where id = $1`, m.hold)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// registered reads all tenants that are not purged, in the order of their numbers, and what an archive says of each.
func (x *Transfers) registered(ctx context.Context, q postgres.Querier) (all []tenant.Tenant, known map[int32]archive.Registry, err error) {
	if all, err = registry.List(ctx, q, registry.Filter{}); err != nil {
		return nil, nil, err
	}
	slices.SortFunc(all, func(a, b tenant.Tenant) int { return int(a.Number) - int(b.Number) })
	known = map[int32]archive.Registry{}
	slugs := map[int32]tenant.Slug{}
	for _, t := range all {
		slugs[t.Number] = t.Slug
	}
	rows, err := q.Query(ctx, `select number, name, state, settings from public.tenants where state <> 'purged'`)
	if err != nil {
		return nil, nil, err
	}
	var number int32
	var name, state, host string
	var settings json.RawMessage
	_, err = pgx.ForEachRow(rows, []any{&number, &name, &state, &settings}, func() error {
		known[number] = archive.Registry{Name: name, State: state, Settings: slices.Clone(settings)}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	rows, err = q.Query(ctx, `select tenant, host, is_primary from public.domains order by tenant, not is_primary, host`)
	if err != nil {
		return nil, nil, err
	}
	var primary bool
	_, err = pgx.ForEachRow(rows, []any{&number, &host, &primary}, func() error {
		r, there := known[number]
		if slug := slugs[number]; there && host != slug.Under(x.o.BaseDomain).String() {
			r.Domains = append(r.Domains, archive.Domain{Host: host, Primary: primary})
			known[number] = r
		}
		return nil
	})
	return all, known, err
}

var errMomentOver = errors.New("the moment is over")

// whileTheyLast calls fn, and ends its context when a moment's session is lost.
func whileTheyLast(ctx context.Context, ms []*Moment, fn func(context.Context, []*Moment) error) error {
	fctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		ticker := time.NewTicker(signEvery)
		defer ticker.Stop()
		for {
			select {
			case <-stop:
				return
			case <-ticker.C:
			}
			for _, m := range ms {
				sctx, end := context.WithTimeout(context.WithoutCancel(ctx), lostAfter)
				_, err := m.ses.Exec(sctx, `select`)
				end()
				if err != nil {
					cancel(fmt.Errorf("%w: %w", errMomentOver, err))
					return
				}
			}
		}
	}()
	err := fn(fctx, ms)
	close(stop)
	<-stopped
	if cause := context.Cause(fctx); errors.Is(cause, errMomentOver) {
		return fault.Wrap(cause, fault.Unavailable, "the session that holds structural operations back was lost, and with it the moment of the backup").WithCode("hold_lost").
			WithHint("nothing of this backup can be used; run the command again")
	}
	return err
}

// Export writes a tenant as it was at the moment, as an archive. Faults: those of Transfers.Export; Conflict when somebody has changed
// the tenant's structure all the same; Unavailable when the moment was lost.
func (m *Moment) Export(ctx context.Context, t tenant.Tenant, w io.Writer, o ExportOptions) (trailer archive.Trailer, err error) {
	x := m.x
	out, err := x.form(w, o)
	if err != nil {
		return trailer, err
	}
	seen := ""
	err = x.o.DB.ReadingSession(ctx, m.Group, func(ses *postgres.Session) error {
		return ses.SnapshotOf(ctx, m.snapshot, func() error {
			if trailer, err = x.read(ctx, ses, t, m.known[t.Number], out, o); err != nil {
				return err
			}
			seen, err = stood(ctx, ses, t.Number)
			return err
		})
	})
	if err != nil {
		return trailer, named(err, t)
	}
	// That it was held back all the time is proved at the end: who has the lock is the session whose transaction then commits.
	return trailer, named(x.o.DB.AsOwner(ctx, m.Group, func(tx *postgres.OwnerTx) error {
		now, err := stood(ctx, tx, t.Number)
		if err == nil && now != seen {
			err = fault.New(fault.Conflict, "the tenant's place or its ledger is not what it was at the moment of the backup").WithCode("changed_meanwhile").
				WithHint("somebody has changed it past oneo's locks; run the command again")
		}
		return err
	}), t)
}

// Release lets go of a tenant whose archive is where it belongs, or of which there is to be none.
func (m *Moment) Release(ctx context.Context, t tenant.Tenant) error {
	return m.x.o.DB.AsOwner(ctx, m.Group, func(tx *postgres.OwnerTx) error {
		_, err := tx.Exec(ctx, `delete from public.held where hold = $1 and tenant = $2`, m.hold, t.Number)
		return err
	})
}

// stood is all that must not change between the moment and the end of the copy.
func stood(ctx context.Context, q postgres.Querier, number int32) (all string, err error) {
	const query = `select pg_catalog.jsonb_build_array(p.schema, p.role, p.namespace, p.state, p.epoch, p.version, p.reader, p.moving, n.nspname,
	(select pg_catalog.jsonb_agg(l.checksum order by l.version) from public.ledger l where l.set = 'tenant' and l.tenant = p.number))::text
from public.placements p left join pg_catalog.pg_namespace n on n.oid = p.namespace where p.number = $1`
	err = q.QueryRow(ctx, query, number).Scan(&all)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", nil
	}
	return all, err
}

// sharedTables are the tables of the registry's database that a full backup holds, in an order in which their foreign keys
// hold, with a condition for its rows. Of every group's it holds the ledger.
var sharedTables = []struct{ name, where string }{
	{"groups", ""}, {"tenants", ""}, {"domains", ""}, {"domain_holds", ""}, {"budgets", ""},
	{"operations", "kind like 'tenant.%'"}, // a run goes on where its tenants' marks are, which are not restored
	{"audit", ""}, {"administrators", ""}, {"administrator_keys", ""}, {"proofs", ""}, {"erasures", ""}, {"usage", ""}, {ledgerTable, "set = 'tenant' and tenant = any('{%s}')"},
}

const ledgerTable = "ledger"

// numbering is the sequence that numbers the tenants.
const numbering = "tenant_numbers"

// ExportShared writes the shared tables of the group's database as they were at the moment, in the form of an archive. No session
// is in it.
func (m *Moment) ExportShared(ctx context.Context, w io.Writer, to []archive.Recipient, begun func(archive.Header)) (trailer archive.Trailer, err error) {
	x := m.x
	inst, err := x.o.DB.Installation(ctx, m.Group)
	if err != nil {
		return trailer, err
	}
	h := archive.Header{Made: m.At.UTC(), Oneo: x.o.Version, Installation: inst.ID, Schema: "public", Group: m.Group, Postgres: m.Postgres}
	begun(h)
	err = x.o.DB.OwnerSession(ctx, m.Group, func(ses *postgres.Session) error {
		return ses.SnapshotOf(ctx, m.snapshot, func() error {
			if err := ses.Script(ctx, plain); err != nil {
				return err
			}
			out, err := archive.NewWriter(w, h, to...)
			if err != nil {
				return err
			}
			if err := errors.Join(out.Registry(archive.Registry{}), out.Structure(archive.Structure{})); err != nil {
				return err
			}
			for _, table := range sharedTables {
				if m.Group != postgres.MainGroup && table.name != ledgerTable {
					continue
				}
				columns, err := sharedColumns(ctx, ses, table.name)
				if err != nil {
					return err
				}
				rows, err := out.Table(archive.Table{Name: table.name, Columns: columns})
				if err != nil {
					return err
				}
				where := table.where
				if table.name == ledgerTable {
					where = fmt.Sprintf(where, m.numbers())
				}
				n, err := ses.CopyTo(ctx, rows, copyQuery(table.name, columns, where)+" to stdout")
				if err != nil {
					return fmt.Errorf("read table %s: %w", table.name, err)
				}
				if err := out.EndTable(n); err != nil {
					return err
				}
			}
			var sequences []archive.Sequence
			if m.Group == postgres.MainGroup {
				s := archive.Sequence{Name: numbering}
				if err := ses.QueryRow(ctx, `select last_value, is_called from public.tenant_numbers`).Scan(&s.Last, &s.Called); err != nil {
					return err
				}
				sequences = append(sequences, s)
			}
			trailer, err = out.Close(sequences)
			return err
		})
	})
	return trailer, err
}

// numbers lists the numbers of the tenants that are exported.
func (m *Moment) numbers() string {
	var all []string
	for _, t := range m.Tenants {
		all = append(all, strconv.Itoa(int(t.Number)))
	}
	return strings.Join(all, ",")
}

func copyQuery(table string, columns []string, where string) string {
	quoted := make([]string, len(columns))
	for i, c := range columns {
		quoted[i] = postgres.Quote(c)
	}
	query := "select " + strings.Join(quoted, ", ") + " from public." + postgres.Quote(table)
	if where != "" {
		query += " where " + where
	}
	return "copy (" + query + ")"
}

// sharedColumns are the columns of a shared table whose values are written.
func sharedColumns(ctx context.Context, q postgres.Querier, table string) (columns []string, err error) {
	const query = `select coalesce(pg_catalog.array_agg(a.attname::text order by a.attnum), '{}') from pg_catalog.pg_attribute a
where a.attrelid = ('public.' || pg_catalog.quote_ident($1))::pg_catalog.regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''`
	return columns, q.QueryRow(ctx, query, table).Scan(&columns)
}
