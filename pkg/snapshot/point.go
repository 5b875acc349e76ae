package snapshot

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// point is a row of public.undo_points, and where its tenant stands.
type point struct {
	schema    string
	from, to  int
	tables    map[string]int64 // those that were copied, with the number of rows
	sequences map[string]sequenceAt
	settled   map[string]string // by the oid of a table that was copied
	made      []string
	updatedAt time.Time
	expired   bool
	undoneAt  *time.Time

	at        string // the tenant's schema
	namespace uint32
	role      string
	state     string
	version   int
}

// sequenceAt is where a sequence stood before the run. It may be called otherwise since.
type sequenceAt struct {
	OID  uint32 `json:"oid"`
	Last *int64 `json:"last"` // nil: it had given no number
}

const readPoint = `select u.schema, u.from_version, u.to_version, u.tables, u.sequences, u.settled, u.made, u.updated_at, u.expires_at <= pg_catalog.now(), u.undone_at,
	p.schema, p.namespace, p.role, case when p.moving is null then p.state else 'moving' end, p.version
from public.undo_points u join public.placements p on p.number = u.tenant where u.run = $1 and u.tenant = $2`

// read reads an undo point; with lock it keeps its row until the transaction ends. pgx.ErrNoRows: there is none.
func read(ctx context.Context, q postgres.Querier, run uuid.UUID, number int32, lock bool) (p point, err error) {
	query := readPoint
	if lock {
		query += ` for update of u`
	}
	return p, q.QueryRow(ctx, query, run, number).Scan(&p.schema, &p.from, &p.to, &p.tables, &p.sequences, &p.settled, &p.made, &p.updatedAt, &p.expired, &p.undoneAt,
		&p.at, &p.namespace, &p.role, &p.state, &p.version)
}

// keeper keeps the undo point of one run and tenant.
type keeper struct {
	s   *Snapshots
	run uuid.UUID
	t   tenant.Tenant
}

var _ migrate.Keeper = keeper{}

// Keeper is what a migration of the tenant is to be given, so that the run can be taken back.
func (s *Snapshots) Keeper(run uuid.UUID, t tenant.Tenant) migrate.Keeper { return keeper{s, run, t} }

// Around finds out what do changes by letting it: when that is something of which no copy is there, it takes the change
// back, copies the rows and does it once more. So no statement has to be understood, whatever a trigger or a function
// does behind it, and what costs twice is only what changes rows or takes something away.
func (k keeper) Around(ctx context.Context, tx *postgres.OwnerTx, do func() error) error {
	p, err := k.open(ctx, tx)
	if err != nil || do == nil {
		return err
	}
	before, err := readTables(ctx, tx, p.namespace)
	if err != nil {
		return err
	}
	for {
		if err := tx.Script(ctx, "savepoint oneo_point"); err != nil {
			return err
		}
		if err := do(); err != nil {
			return err
		}
		after, err := readTables(ctx, tx, p.namespace)
		if err != nil {
			return err
		}
		missing := slices.DeleteFunc(changed(before, after), func(name string) bool {
			_, kept := p.tables[name]
			return kept || slices.Contains(p.made, "table "+name)
		})
		if len(missing) == 0 {
			break
		}
		if err := tx.Script(ctx, "rollback to savepoint oneo_point; release savepoint oneo_point"); err != nil {
			return err
		}
		if err := k.copy(ctx, tx, &p, before, missing); err != nil {
			return err
		}
	}
	if err := tx.Script(ctx, "release savepoint oneo_point"); err != nil {
		return err
	}
	return k.Reached(ctx, tx)
}

// open makes the undo point where there is none yet, and reads it.
func (k keeper) open(ctx context.Context, tx *postgres.OwnerTx) (point, error) {
	const insert = `with here as materialized (select p.number, p.version, p.namespace from public.placements p where p.number = $2)
insert into public.undo_points (run, tenant, schema, from_version, to_version, had, sequences, expires_at)
select $1, h.number, $3, h.version, h.version, $4, coalesce((
	select pg_catalog.jsonb_object_agg(c.relname, pg_catalog.jsonb_build_object('oid', c.oid::int8, 'last', pg_catalog.pg_sequence_last_value(c.oid)))
	from pg_catalog.pg_depend d join pg_catalog.pg_class c on c.oid = d.objid and c.relkind = 'S'
	where d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass and d.refobjid = h.namespace and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass), '{}'),
	pg_catalog.now() + $5::pg_catalog.interval
from here h`
	p, err := read(ctx, tx, k.run, k.t.Number, true)
	switch {
	case err == nil && (p.undoneAt != nil || p.expired):
		return p, fault.New(fault.Conflict, "the undo point that this run kept of the tenant is used up").WithCode("undo_expired").
			WithTenant(k.t.Slug.String()).WithHint("begin a new run: oneo migrate -t %s --undo-point", k.t.Slug)
	case !errors.Is(err, pgx.ErrNoRows):
		return p, err
	}
	var namespace uint32
	var beside bool
	const here = `select namespace, exists (select from public.progress where tenant = $1 and beside) from public.placements where number = $1`
	if err := tx.QueryRow(ctx, here, k.t.Number).Scan(&namespace, &beside); err != nil {
		return p, err
	}
	if beside { // to take back what it does here, and to leave it as done, would leave rows unchanged for ever
		return p, fault.New(fault.Conflict, "no undo point can be kept: a data migration of an earlier run has not ended").WithCode("no_undo_point").
			WithTenant(k.t.Slug.String()).WithHint("end it first, without --undo-point: oneo migrate -t %s", k.t.Slug)
	}
	had, err := objects(ctx, tx, namespace)
	if err != nil {
		return p, err
	}
	names := make([]string, 0, len(had))
	for name := range had {
		names = append(names, name)
	}
	slices.Sort(names)
	schema := tenant.UndoSchema(k.t.Number, mark(k.run)).String()
	if _, err := tx.Exec(ctx, insert, k.run, k.t.Number, schema, names, k.s.o.Keep); err != nil {
		return p, err
	}
	// Nobody is granted anything: a schema of oneo's own is the owner's alone.
	if err := tx.Script(ctx, "create schema "+postgres.Quote(schema)); err != nil {
		return p, err
	}
	if err := failpoint.Hit("point.made"); err != nil {
		return p, err
	}
	return read(ctx, tx, k.run, k.t.Number, true)
}

// copy copies the rows of tables. From here to the end of the transaction nobody else writes to them: a row that came
// between the copy and the change would be in neither.
func (k keeper) copy(ctx context.Context, tx *postgres.OwnerTx, p *point, all []table, names []string) error {
	var lock, from, columns []string
	var oids []uint32
	for _, t := range all {
		if t.isRoot() && slices.Contains(names, t.name) {
			lock = append(lock, t.from(p.at))
			from = append(from, t.name)
			oids = append(oids, t.oid)
			list := make([]string, 0, len(t.columns)+len(t.generated))
			for _, c := range slices.Concat(t.columns, t.generated) {
				q := postgres.Quote(c)
				if t.typed[c] != "" {
					q += "::text as " + q
				}
				list = append(list, q)
			}
			columns = append(columns, strings.Join(list, ", "))
		}
	}
	// A policy that binds the owner too must end this, not hide rows from it.
	if err := tx.Script(ctx, "set local row_security to off; lock table "+strings.Join(lock, ", ")+" in share row exclusive mode"); err != nil {
		return err
	}
	for i, name := range from {
		tag, err := tx.Exec(ctx, "create table "+postgres.Quote(p.schema)+"."+postgres.Quote(name)+" as select "+columns[i]+" from "+lock[i])
		if postgres.SQLState(err) == "42501" {
			return fault.Wrap(err, fault.Conflict, "no undo point can be kept: a row policy of the table %s hides rows from the owner too", name).
				WithCode("no_undo_point").WithHint("leave --undo-point out; without `force row level security` the owner sees all rows")
		}
		if err != nil {
			return err
		}
		p.tables[name] = tag.RowsAffected()
	}
	if err := tx.Script(ctx, "set local row_security to default"); err != nil {
		return err
	}
	// Who is at work now has written to none of these tables, or we would have waited.
	const note = `with t as materialized (select pg_catalog.pg_current_xact_id()::text::int8 as top), others as (` + othersAtWork + `)
update public.undo_points u set tables = $3, settled = u.settled || coalesce((
	select pg_catalog.jsonb_object_agg(o::text, (pg_catalog.int8multirange(pg_catalog.int8range(null, t.top))
		- coalesce((select pg_catalog.range_agg(pg_catalog.int8range(x, x + 1)) from others), '{}'))::text)
	from pg_catalog.unnest($4::int8[]) o, t), '{}')
where run = $1 and tenant = $2`
	if _, err := tx.Exec(ctx, note, k.run, k.t.Number, p.tables, oids); err != nil {
		return err
	}
	return failpoint.Hit("point.copied")
}

// othersAtWork are the numbers of the transactions besides this one, t.top, and of their open savepoints, that are at work.
// Each holds a lock on its number.
const othersAtWork = `select t.top - (((t.top - l.transactionid::text::int8 + 2147483648) & 4294967295) - 2147483648) as x
	from t, pg_catalog.pg_locks l where l.locktype = 'transactionid' and l.mode = 'ExclusiveLock' and l.granted and l.pid is distinct from pg_catalog.pg_backend_pid()`

// Reached notes what the tenant is after a step: its version, what the run has made, and which rows are the run's own. The
// row is written in a sub-transaction of its own, whose number, the row's xmin, is above those of all that the step has
// done: what is at work between the transaction's number and this one, and nobody else's, is ours.
func (k keeper) Reached(ctx context.Context, q postgres.Querier) error {
	const note = `update public.undo_points u set to_version = p.version, updated_at = pg_catalog.clock_timestamp(),
	expires_at = greatest(u.expires_at, pg_catalog.now() + $3::pg_catalog.interval),
	made = array(select o from pg_catalog.unnest($4::text[]) o except select h from pg_catalog.unnest(u.had) h)
from public.placements p where p.number = u.tenant and u.run = $1 and u.tenant = $2`
	var namespace uint32
	if err := q.QueryRow(ctx, `select namespace from public.placements where number = $1`, k.t.Number).Scan(&namespace); err != nil {
		return err
	}
	has, err := objects(ctx, q, namespace)
	if err != nil {
		return err
	}
	names := make([]string, 0, len(has))
	for name := range has {
		names = append(names, name)
	}
	if _, err := q.Exec(ctx, `savepoint oneo_note`); err != nil {
		return err
	}
	tag, err := q.Exec(ctx, note, k.run, k.t.Number, k.s.o.Keep, names)
	if err != nil {
		return err
	}
	if tag.RowsAffected() != 1 {
		return fault.New(fault.Internal, "the undo point of tenant %s is gone while its run is at work", k.t.Slug)
	}
	const own = `with t as materialized (
	select pg_catalog.pg_current_xact_id()::text::int8 as top, u.xmin::text::int8 as last from public.undo_points u where u.run = $1 and u.tenant = $2
), others as (` + othersAtWork + `)
update public.undo_points u set own = u.own + coalesce((
	select pg_catalog.range_agg(pg_catalog.int8range(x, x + 1)) from t, pg_catalog.generate_series(t.top, t.top + ((t.last - t.top) & 4294967295)) x
	where pg_catalog.pg_xact_status(x::text::pg_catalog.xid8) = 'in progress' and x not in (select x from others)), '{}')
where u.run = $1 and u.tenant = $2`
	if _, err := q.Exec(ctx, own, k.run, k.t.Number); err != nil {
		return err
	}
	if _, err := q.Exec(ctx, `release savepoint oneo_note`); err != nil {
		return err
	}
	return failpoint.Hit("point.noted")
}
