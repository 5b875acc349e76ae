package snapshot

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Point says of a tenant what a run has kept of it.
type Point struct {
	Number    int32
	From, To  int // versions: before the run, and as far as the run has come
	Tables    []string
	ExpiresAt time.Time
	Expired   bool
	Undone    bool
}

// Points lists what a run has kept in the database of a group, by the tenants' numbers.
func (s *Snapshots) Points(ctx context.Context, group string, run uuid.UUID) (map[int32]Point, error) {
	const list = `select u.tenant, u.from_version, u.to_version,
	array(select k from pg_catalog.jsonb_object_keys(u.tables) k order by k), u.expires_at, u.expires_at <= pg_catalog.now(), u.undone_at is not null
from public.undo_points u where u.run = $1`
	points := map[int32]Point{}
	err := s.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list, run)
		if err != nil {
			return err
		}
		var p Point
		_, err = pgx.ForEachRow(rows, []any{&p.Number, &p.From, &p.To, &p.Tables, &p.ExpiresAt, &p.Expired, &p.Undone}, func() error {
			points[p.Number] = p
			p.Tables = nil
			return nil
		})
		return err
	})
	return points, err
}

// Loss is what taking a tenant back takes away, as far as it can be counted.
type Loss struct {
	// Rows is how many rows of the tables that were copied, or that the run has made, were inserted or changed since the
	// run. Rows that were deleted since are not counted, and come back.
	Rows int64
	// Made are the tables and columns that the run has made, which go with what is in them.
	Made []string
}

// Check asks whether a tenant can be taken back now, and what would be lost. The faults are those of Undo.
func (s *Snapshots) Check(ctx context.Context, t tenant.Tenant, run uuid.UUID) (Loss, error) {
	var loss Loss
	err := s.o.DB.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
		p, err := read(ctx, tx, run, t.Number, false)
		if err == nil {
			err = s.may(ctx, tx, t, p)
		}
		if err != nil {
			return unknown(err)
		}
		old, err := s.reference(ctx, t.Group, p.from)
		if err != nil {
			return err
		}
		has, err := objects(ctx, tx, p.namespace)
		if err != nil {
			return err
		}
		if err := p.foreign(has, old); err != nil {
			return err
		}
		for _, o := range p.made {
			if kind, _, _ := strings.Cut(o, " "); (kind == "table" || kind == "column") && has[o] {
				loss.Made = append(loss.Made, o)
			}
		}
		loss.Made = slices.DeleteFunc(loss.Made, func(o string) bool { // a table's columns go without saying
			name, isColumn := strings.CutPrefix(o, "column ")
			if !isColumn {
				return false
			}
			return slices.ContainsFunc(loss.Made, func(t string) bool { return strings.HasPrefix("table "+name, t+".") })
		})
		loss.Rows, err = p.since(ctx, tx, run, t.Number)
		return err
	})
	return loss, named(err, t)
}

// since counts the rows that neither the run has written nor anybody who was done before their table was copied.
func (p point) since(ctx context.Context, tx *postgres.OwnerTx, run uuid.UUID, number int32) (rows int64, err error) {
	tables, err := readTables(ctx, tx, p.namespace)
	if err != nil {
		return 0, err
	}
	var counts []string
	for _, t := range tables {
		settled, kept := p.settled[strconv.FormatUint(uint64(t.oid), 10)]
		if !t.isRoot() || !kept && !slices.Contains(p.made, "table "+t.name) {
			continue
		}
		if !kept {
			settled = "{}"
		}
		counts = append(counts, "(select pg_catalog.count(*) from "+t.from(p.at)+", b where not (b.own + '"+settled+"'::pg_catalog.int8multirange) @> (b.top - ((b.top - xmin::text::int8) & 4294967295)))")
	}
	if len(counts) == 0 {
		return 0, nil
	}
	err = tx.QueryRow(ctx, `with b as materialized (
	select own, pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::int8 as top from public.undo_points where run = $1 and tenant = $2
) select `+strings.Join(counts, " + "), run, number).Scan(&rows)
	return rows, err
}

// unknown says that there is no undo point.
func unknown(err error) error {
	if errors.Is(err, pgx.ErrNoRows) {
		return fault.New(fault.NotFound, "there is no undo point of this run for the tenant: it kept none, or it has expired and was dropped").WithCode("no_undo_point")
	}
	return err
}

// may refuses what can be refused without building anything.
func (s *Snapshots) may(ctx context.Context, q postgres.Querier, t tenant.Tenant, p point) error {
	refuse := func(code, format string, args ...any) *fault.Fault {
		return fault.New(fault.Conflict, format, args...).WithCode(code)
	}
	switch {
	case p.undoneAt != nil:
		return refuse("undone_already", "the run was taken back for this tenant at %s", p.undoneAt.UTC().Format(time.RFC3339))
	case p.state == "moving" || p.state == "moved":
		return fault.New(fault.Locked, "the tenant is being moved to another group, or was").WithCode("operation_running").
			WithHint("wait for it; what was kept for undoing does not move with a tenant")
	case p.state != string(tenant.Active) && p.state != string(tenant.Suspended):
		return refuse("wrong_state", "the tenant is %s", p.state).WithHint("oneo tenant undrop %s, then undo the run", t.Slug)
	case p.expired:
		return refuse("undo_expired", "the undo point has expired, or does not fit any more because the tenant was taken down since").
			WithHint("`oneo migrate down` takes back what has a step down")
	case p.version > p.to:
		var later *string
		const next = `select max(run::text) from public.undo_points where tenant = $1 and from_version >= $2 and undone_at is null and expires_at > pg_catalog.now()`
		if err := q.QueryRow(ctx, next, t.Number, p.to).Scan(&later); err != nil {
			return err
		}
		f := refuse("migrated_since", "the tenant has been migrated further since, from version %d to %d", p.to, p.version)
		if later != nil {
			return f.WithHint("first: oneo undo %s -t %s", *later, t.Slug)
		}
		return f.WithHint("take it down first: oneo migrate down --to %d -t %s", p.to, t.Slug)
	case p.version < p.to:
		return refuse("migrated_since", "the tenant is at version %d; the run had brought it to %d", p.version, p.to)
	}
	var begun int
	const since = `select coalesce(min(version), 0) from public.progress where tenant = $1 and started_at > $2`
	if err := q.QueryRow(ctx, since, t.Number, p.updatedAt).Scan(&begun); err != nil {
		return err
	}
	if begun > 0 {
		return refuse("unfinished_migration", "migration %d of this tenant has been begun since, and is not finished", begun).WithHint("finish it: oneo migrate -t %s", t.Slug)
	}
	return s.o.Migrate.SameFiles(ctx, q, t.Number, p.from)
}

// foreign refuses a tenant that has what neither the migrations of its old version nor the run have made.
func (p point) foreign(has, old map[string]bool) error {
	var others []string
	for o := range has {
		if !old[o] && !slices.Contains(p.made, o) {
			others = append(others, o)
		}
	}
	if len(others) == 0 {
		return nil
	}
	slices.Sort(others)
	others = slices.DeleteFunc(others, func(o string) bool { // said with its table
		name, isColumn := strings.CutPrefix(o, "column ")
		return isColumn && slices.ContainsFunc(others, func(t string) bool { return strings.HasPrefix("table "+name, t+".") })
	})
	if n := len(others); n > 5 {
		others = append(others[:5], fmt.Sprintf("and %d more", n-5))
	}
	return fault.New(fault.Conflict, "the tenant has what no migration has made and what would be lost: %s", strings.Join(others, ", ")).
		WithCode("foreign_objects").WithHint("move it elsewhere, or drop it; `oneo migrate drift` shows it too")
}

// reference is a version of the migrations in a database group.
type reference struct {
	group   string
	version int
}

var errRead = errors.New("the reference has been read")

// reference names the objects that the migrations make, up to a version.
func (s *Snapshots) reference(ctx context.Context, group string, version int) (map[string]bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := reference{group, version}
	if made, known := s.references[r]; known {
		return made, nil
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, err
	}
	var made map[string]bool
	err = s.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		schema := tenant.UndoSchema(0, mark(id)) // no tenant has the number 0
		q := postgres.Quote(schema.String())
		if err := s.o.Migrate.Create(ctx, tx, schema, version, "create schema "+q+";\nset local search_path to "+q+", ext, pg_temp;\n", ""); err != nil {
			return err
		}
		namespace, err := namespaceOf(ctx, tx, schema.String())
		if err != nil {
			return err
		}
		if made, err = objects(ctx, tx, namespace); err != nil {
			return err
		}
		return errRead
	})
	if !errors.Is(err, errRead) {
		return nil, fmt.Errorf("make the old version %d to look at: %w", version, err)
	}
	s.references[r] = made
	return made, nil
}

func namespaceOf(ctx context.Context, q postgres.Querier, schema string) (namespace uint32, err error) {
	return namespace, q.QueryRow(ctx, `select oid from pg_catalog.pg_namespace where nspname = $1`, schema).Scan(&namespace)
}

// Undo takes one tenant back to where it was before a run, in one transaction: the structure is built anew from the
// migrations of the old version, the tables that were copied have those rows, and all others the rows that they have
// now. What goes is kept aside until the point expires. It does nothing to a tenant that was taken back already. While
// the tenant's other tables are moved into the new schema, or copied where that cannot be, its gate is closed: users get
// a 503.
//
// Faults: NotFound: there is no undo point. Conflict: it has expired, the tenant has gone on since or has what would be
// lost, or the files of the old version are not those that were applied. Locked: the tenant is busy.
func (s *Snapshots) Undo(ctx context.Context, t tenant.Tenant, run uuid.UUID) (res migrate.Result, err error) {
	start := time.Now()
	if err := failpoint.Hit("undo.before"); err != nil {
		return res, err
	}
	attempt := func(moving bool) error {
		return s.o.DB.AsOwnerWithin(ctx, t.Group, postgres.OwnerOptions{}, func(tx *postgres.OwnerTx) error {
			res = migrate.Result{}
			if err := tx.LockOperation(ctx, t.Number, s.o.LockWait); err != nil {
				return err
			}
			p, err := read(ctx, tx, run, t.Number, true)
			if err != nil {
				return unknown(err)
			}
			res.From, res.To = p.version, p.version
			if p.undoneAt != nil {
				return nil
			}
			if err := s.may(ctx, tx, t, p); err != nil {
				return err
			}
			w := &undoing{s: s, tx: tx, t: t, run: run, p: p}
			if err := w.do(ctx, moving); err != nil {
				return err
			}
			res.To = p.from
			return nil
		})
	}
	if err = attempt(true); errors.Is(err, errUnmoved) {
		s.o.Logger.WarnContext(ctx, "all tables of a tenant are copied to take it back", "tenant", t.Slug.String(), "err", err)
		err = attempt(false)
	}
	res.Duration = time.Since(start)
	if err != nil {
		if code := postgres.SQLState(err); code == "40P01" {
			err = fault.Wrap(err, fault.Locked, "other transactions were in the way of the locks that this needs").WithCode("lock_timeout").WithRetry(time.Second)
		}
		return res, named(err, t)
	}
	return res, failpoint.Hit("undo.after")
}

// undoing is the work on one tenant, in one transaction.
type undoing struct {
	s   *Snapshots
	tx  *postgres.OwnerTx
	t   tenant.Tenant
	run uuid.UUID
	p   point

	undone string // what the tenant had
	made   uint32 // the new schema
	tables []table
	schema tenant.Schema // p.at
}

// do takes the tenant back; with moving it moves the tables that it can move, and returns errUnmoved when that does not
// work.
func (w *undoing) do(ctx context.Context, moving bool) error {
	has, err := objects(ctx, w.tx, w.p.namespace)
	if err != nil {
		return err
	}
	if err := w.build(ctx); err != nil {
		return err
	}
	old, err := objects(ctx, w.tx, w.made)
	if err != nil {
		return err
	}
	if err := w.p.foreign(has, old); err != nil {
		return err
	}
	if err := failpoint.Hit("undo.built"); err != nil {
		return err
	}
	var m *mover
	if moving {
		if m, err = w.look(ctx); err != nil {
			return err
		}
	}
	put, err := w.bare(ctx)
	if err != nil {
		return err
	}
	var kept, live []table
	for _, t := range w.tables {
		_, is := w.p.tables[t.name]
		switch {
		case !t.isRoot() || m.moves(t.name):
		case is:
			kept = append(kept, t)
		default:
			live = append(live, t)
		}
	}
	if len(kept) != len(w.p.tables) {
		return w.unfit("tables of the undo point are not among those of version %d", w.p.from)
	}
	if err := w.fill(ctx, kept, w.p.schema); err != nil {
		return err
	}
	if err := failpoint.Hit("undo.kept"); err != nil {
		return err
	}
	// What was put back does not change any more: the keys between those tables need not wait for the gate.
	if put, err = w.keys(ctx, put, kept); err != nil {
		return err
	}
	// From here on nobody is at work in the tenant, until the transaction has ended.
	if err := w.tx.LockGate(ctx, w.t.Number); err != nil {
		return err
	}
	if err := w.shut(ctx, m); err != nil {
		return err
	}
	if moving {
		if put, err = w.move(ctx, m, put); err != nil {
			return err
		}
	}
	if err := w.fill(ctx, live, w.undone); err != nil {
		return err
	}
	if err := w.sequences(ctx); err != nil {
		return err
	}
	if err := w.tx.Script(ctx, script(put)); err != nil {
		if err = w.refill(err); moving {
			return unmoved(err)
		}
		return err
	}
	if moving {
		if err := w.verify(ctx, m); err != nil {
			return err
		}
	}
	if err := failpoint.Hit("undo.filled"); err != nil {
		return err
	}
	if err := w.place(ctx); err != nil {
		return err
	}
	return failpoint.Hit("undo.placed")
}

func (w *undoing) unfit(format string, args ...any) *fault.Fault {
	return fault.New(fault.Conflict, "the tenant cannot be taken back: "+format, args...).WithCode("undo_unfit").
		WithHint("nothing was changed; `oneo migrate drift -t %s` compares the tenant with its migrations", w.t.Slug)
}

// refill says that rows do not fit the old structure. What may pass keeps its own kind.
func (w *undoing) refill(err error) error {
	if postgres.SQLState(err) == "42501" {
		return fault.Wrap(err, fault.Conflict, "the tenant cannot be taken back: a row policy hides rows from the owner too").WithCode("undo_unfit").
			WithHint("nothing was changed; without `force row level security` the owner sees all rows")
	}
	if code := postgres.SQLState(err); strings.HasPrefix(code, "23") || strings.HasPrefix(code, "22") || code == "42804" {
		return fault.Wrap(err, fault.Conflict, "the tenant cannot be taken back: rows of today do not fit its old structure (SQLSTATE %s)", code).
			WithCode("undo_unfit").WithHint("nothing was changed; the log names the rule")
	}
	return err
}

// build renames the tenant's schema away and makes the old version under its name: a name that a function or a setting
// holds as text is then the right one. Nobody sees either before the commit.
func (w *undoing) build(ctx context.Context) error {
	before, err := migrate.Transaction(ctx, w.tx)
	if err != nil {
		return err
	}
	w.undone = tenant.UndoneSchema(w.t.Number, mark(w.run)).String()
	var there bool
	const stands = `select exists (select from pg_catalog.pg_namespace where oid = $1::oid and nspname = $2)`
	if err := w.tx.QueryRow(ctx, stands, w.p.namespace, w.p.at).Scan(&there); err != nil {
		return err
	}
	if !there {
		return fault.New(fault.NotFound, "the tenant's schema is not where the registry says").WithCode("schema_missing")
	}
	if w.schema, err = tenant.ParseSchema(w.p.at); err != nil {
		return err
	}
	lead := "alter schema " + postgres.Quote(w.p.at) + " rename to " + postgres.Quote(w.undone) + ";\n" +
		structure.Empty(structure.Schema{Name: w.p.at, Role: w.p.role})
	if err := w.s.o.Migrate.Create(ctx, w.tx, w.schema, w.p.from, lead, ""); err != nil {
		return err
	}
	after, err := migrate.Transaction(ctx, w.tx)
	if err != nil {
		return err
	}
	if err := migrate.SameTransaction(before, after); err != nil {
		return err
	}
	if w.made, err = namespaceOf(ctx, w.tx, w.p.at); err != nil {
		return err
	}
	if w.tables, err = readTables(ctx, w.tx, w.made); err != nil {
		return err
	}
	return w.bind(ctx)
}

// bind sets the path under which definitions are read and run. Tables are written by their qualified names.
func (w *undoing) bind(ctx context.Context) error { return w.tx.Bind(ctx, w.schema) }

// put is a statement that puts on again what bare has taken off: of a foreign key with its names.
type put struct {
	sql                    string
	table, key, references string // key: empty for anything else; references: a table of the same schema, or empty
}

func script(all []put) string {
	var lines []string
	for _, p := range all {
		lines = append(lines, p.sql)
	}
	return strings.Join(lines, ";\n")
}

// keys puts the foreign keys on that are between these tables alone, and returns what is left.
func (w *undoing) keys(ctx context.Context, all []put, between []table) (left []put, err error) {
	has := func(name string) bool {
		return slices.ContainsFunc(between, func(t table) bool { return t.name == name })
	}
	var now []put
	for _, p := range all {
		if p.key != "" && has(p.table) && has(p.references) {
			now = append(now, p)
		} else {
			left = append(left, p)
		}
	}
	if len(now) == 0 {
		return left, nil
	}
	return left, w.refill(w.tx.Script(ctx, script(now)))
}

// shut waits for who writes to the tenant's tables past the gate, and keeps them out; and readers of those that are moved.
func (w *undoing) shut(ctx context.Context, m *mover) error {
	there, err := readTables(ctx, w.tx, w.p.namespace)
	if err != nil {
		return err
	}
	var moved, others []string
	for _, t := range there {
		if m.moves(t.name) {
			moved = append(moved, t.from(w.undone))
		} else {
			others = append(others, t.from(w.undone))
		}
	}
	var lock []string
	if len(others) > 0 {
		lock = append(lock, "lock table "+strings.Join(others, ", ")+" in share row exclusive mode")
	}
	if len(moved) > 0 {
		lock = append(lock, "lock table "+strings.Join(moved, ", ")+" in access exclusive mode")
	}
	if len(lock) == 0 {
		return nil
	}
	return w.tx.Script(ctx, strings.Join(lock, ";\n"))
}

// bare takes off what stands in the way of filling the tables: foreign keys, triggers and rules, and the rows that the
// migrations themselves have put there. It returns what puts the first three back.
func (w *undoing) bare(ctx context.Context) (back []put, err error) {
	oids, names := make([]uint32, len(w.tables)), []string{}
	for i, t := range w.tables {
		oids[i] = t.oid
		if t.isRoot() {
			names = append(names, w.in(w.p.at, t))
		}
	}
	if len(names) == 0 {
		return nil, nil
	}
	const off = `with t as materialized (select c.oid, c.relname::text, pg_catalog.format('%I.%I', $2::text, c.relname) as name from pg_catalog.pg_class c where c.oid = any($1::oid[]))
select 1, pg_catalog.format('alter table only %s disable trigger %I', t.name, g.tgname),
	pg_catalog.format('alter table only %s enable %s trigger %I', t.name, case g.tgenabled when 'R' then 'replica' when 'A' then 'always' else '' end, g.tgname), g.oid, '', '', ''
from t join pg_catalog.pg_trigger g on g.tgrelid = t.oid where not g.tgisinternal and g.tgenabled <> 'D'
union all
select 1, pg_catalog.format('alter table %s disable rule %I', t.name, r.rulename),
	pg_catalog.format('alter table %s enable %s rule %I', t.name, case r.ev_enabled when 'R' then 'replica' when 'A' then 'always' else '' end, r.rulename), r.oid, '', '', ''
from t join pg_catalog.pg_rewrite r on r.ev_class = t.oid where r.ev_enabled <> 'D'
union all
select 0, pg_catalog.format('alter table %s drop constraint %I', t.name, k.conname),
	pg_catalog.format('alter table %s add constraint %I %s', t.name, k.conname, pg_catalog.pg_get_constraintdef(k.oid))
		|| coalesce(pg_catalog.format(E';\ncomment on constraint %I on %s is %L', k.conname, t.name, pg_catalog.obj_description(k.oid, 'pg_constraint')), ''), k.oid,
	t.relname, k.conname, coalesce((select r.relname from t r where r.oid = k.confrelid), '')
from t join pg_catalog.pg_constraint k on k.conrelid = t.oid where k.contype = 'f' and k.conparentid = 0
order by 1, 4`
	rows, err := w.tx.Query(ctx, off, oids, w.p.at)
	if err != nil {
		return nil, err
	}
	var take []string
	var kind int
	var down string
	var up put
	var oid uint32
	if _, err := pgx.ForEachRow(rows, []any{&kind, &down, &up.sql, &oid, &up.table, &up.key, &up.references}, func() error {
		take, back = append(take, down), append(back, up)
		return nil
	}); err != nil {
		return nil, err
	}
	// A view that holds rows is filled from the tables, in the order in which the views were made.
	const views = `select pg_catalog.format('refresh materialized view %I.%I', $2::text, c.relname) from pg_catalog.pg_class c
where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relkind = 'm' and c.relispopulated order by c.oid`
	if rows, err = w.tx.Query(ctx, views, w.made, w.p.at); err != nil {
		return nil, err
	}
	refresh, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, err
	}
	take = append(take, "truncate table "+strings.Join(names, ", ")+" restart identity", "set local row_security to off")
	if err := w.tx.Script(ctx, strings.Join(take, ";\n")); err != nil {
		return nil, err
	}
	for _, sql := range append(refresh, "set local row_security to default") {
		back = append(back, put{sql: sql})
	}
	return back, nil
}

func (w *undoing) in(schema string, t table) string {
	return postgres.Quote(schema) + "." + postgres.Quote(t.name)
}

// fill gives tables the rows of those of the same names in another schema, and counts them.
func (w *undoing) fill(ctx context.Context, tables []table, source string) error {
	if len(tables) == 0 {
		return nil
	}
	namespace, err := namespaceOf(ctx, w.tx, source)
	if err != nil {
		return err
	}
	there, err := readTables(ctx, w.tx, namespace)
	if err != nil {
		return err
	}
	sources := map[string]table{}
	for _, t := range there {
		if t.isRoot() {
			sources[t.name] = t
		}
	}
	for _, t := range tables {
		src, is := sources[t.name]
		if !is {
			return w.unfit("it lacks the table %s", t.name)
		}
		for _, c := range t.columns {
			if !slices.Contains(src.columns, c) {
				return w.unfit("its table %s lacks the column %s", t.name, c)
			}
		}
		for _, c := range src.columns { // of the tenant's own tables that has been asked
			if source == w.p.schema && !slices.Contains(t.columns, c) && !slices.Contains(t.generated, c) && !slices.Contains(w.p.made, "column "+t.name+"."+c) {
				return w.unfit("its table %s had the column %s, which no migration has made", t.name, c)
			}
		}
		values := make([]string, len(t.columns))
		for i, c := range t.columns {
			if values[i] = postgres.Quote(c); t.typed[c] != "" {
				values[i] += "::text::" + t.typed[c]
			}
		}
		list, into := strings.Join(values, ", "), ""
		if list != "" {
			into = " (" + quoted(t.columns) + ") overriding system value"
		}
		tag, err := w.tx.Exec(ctx, "insert into "+w.in(w.p.at, t)+into+" select "+list+" from "+src.from(source))
		if err != nil {
			return w.refill(err)
		}
		var rows int64
		if err := w.tx.QueryRow(ctx, "select pg_catalog.count(*) from "+t.from(w.p.at)).Scan(&rows); err != nil {
			return err
		}
		want := tag.RowsAffected()
		if source == w.p.schema {
			want = w.p.tables[t.name]
		}
		if rows != want {
			return w.unfit("the table %s would have %d rows instead of %d", t.name, rows, want)
		}
	}
	return nil
}

// sequences sets each sequence behind every value that it has ever given and that a column holds: a number is never given
// twice, also where the rows that had it are gone.
func (w *undoing) sequences(ctx context.Context) error {
	const list = `select c.relname::text, s.seqincrement, s.seqmin, s.seqmax, coalesce(t.relname::text, ''), coalesce(a.attname::text, ''),
	(select pg_catalog.pg_sequence_last_value(l.oid) from pg_catalog.pg_class l where l.relname = c.relname and l.relnamespace = $2::oid and l.relkind = 'S'),
	pg_catalog.pg_sequence_last_value(c.oid)
from pg_catalog.pg_class c join pg_catalog.pg_sequence s on s.seqrelid = c.oid
left join pg_catalog.pg_depend d on d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.objid = c.oid and d.objsubid = 0
	and d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass and d.deptype in ('a', 'i')
left join pg_catalog.pg_class t on t.oid = d.refobjid
left join pg_catalog.pg_attribute a on a.attrelid = d.refobjid and a.attnum = d.refobjsubid
	and a.atttypid in ('int2'::pg_catalog.regtype, 'int4'::pg_catalog.regtype, 'int8'::pg_catalog.regtype)
where c.oid in (` + inSchema + `'pg_catalog.pg_class'::pg_catalog.regclass) and c.relkind = 'S'`
	type sequence struct {
		name                string
		increment, min, max int64
		table, column       string
		live, own           *int64 // own: of one that was moved, or that a migration has used
	}
	rows, err := w.tx.Query(ctx, list, w.made, w.p.namespace)
	if err != nil {
		return err
	}
	all, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (s sequence, err error) {
		return s, row.Scan(&s.name, &s.increment, &s.min, &s.max, &s.table, &s.column, &s.live, &s.own)
	})
	if err != nil {
		return err
	}
	for _, s := range all {
		kept := w.p.sequences[s.name]
		furthest := "pg_catalog.max"
		if s.increment < 0 {
			furthest = "pg_catalog.min"
		}
		var renamed *int64 // by the run
		const byOID = `select pg_catalog.pg_sequence_last_value(c.oid) from pg_catalog.pg_class c where c.oid = $1::oid and c.relkind = 'S'`
		if err := w.tx.QueryRow(ctx, byOID, kept.OID).Scan(&renamed); err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		values := []*int64{kept.Last, renamed, s.live, s.own}
		if s.column != "" {
			var column *int64
			query := "select " + furthest + "(" + postgres.Quote(s.column) + ")::int8 from " + postgres.Quote(w.p.at) + "." + postgres.Quote(s.table)
			if err := w.tx.QueryRow(ctx, query).Scan(&column); err != nil {
				return err
			}
			values = append(values, column)
		}
		var to *int64
		for _, v := range values {
			if v == nil || *v < s.min || *v > s.max {
				continue
			}
			if to == nil || s.increment > 0 && *v > *to || s.increment < 0 && *v < *to {
				to = v
			}
		}
		if to == nil {
			continue
		}
		name := postgres.Quote(w.p.at) + "." + postgres.Quote(s.name)
		if _, err := w.tx.Exec(ctx, `select pg_catalog.setval($1::text::pg_catalog.regclass, $2)`, name, *to); err != nil {
			return err
		}
	}
	return nil
}

// place puts the new schema in the place of the other: placement, ledger and undo point say so.
func (w *undoing) place(ctx context.Context) error {
	for _, step := range []struct {
		sql  string
		args []any
	}{
		{`update public.placements set namespace = $2::oid, version = $3, reader = $4, epoch = epoch + 1, updated_at = pg_catalog.clock_timestamp() where number = $1`,
			[]any{w.t.Number, w.made, w.p.from, w.s.o.Migrate.Reader(w.p.from)}},
		{`delete from public.ledger where set = 'tenant' and tenant = $1 and version > $2`, []any{w.t.Number, w.p.from}},
		{`delete from public.progress where tenant = $1 and version > $2`, []any{w.t.Number, w.p.from}},
		{`update public.undo_points set undone_at = pg_catalog.now(), undone = $3, expires_at = greatest(expires_at, pg_catalog.now() + $4::pg_catalog.interval)
where run = $1 and tenant = $2`, []any{w.run, w.t.Number, w.undone, w.s.o.Keep}},
		{`select pg_catalog.pg_notify('oneo_versions', $1)`, []any{fmt.Sprintf("%d %d", w.t.Number, w.p.from)}},
	} {
		if _, err := w.tx.Exec(ctx, step.sql, step.args...); err != nil {
			return err
		}
	}
	// What lies aside is the owner's alone: without the use of its schema the grants on its tables are worth nothing.
	const others = `select pg_catalog.format('revoke all on schema %I from %s', n.nspname, case a.grantee when 0 then 'public' else pg_catalog.quote_ident(pg_catalog.pg_get_userbyid(a.grantee)) end)
from pg_catalog.pg_namespace n, pg_catalog.aclexplode(n.nspacl) a where n.oid = $1::oid and a.grantee <> n.nspowner`
	rows, err := w.tx.Query(ctx, others, w.p.namespace)
	if err != nil {
		return err
	}
	end, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	undone, role := postgres.Quote(w.undone), postgres.Quote(w.p.role)
	end = append(end, "alter default privileges in schema "+undone+" revoke all on tables from "+role,
		"alter default privileges in schema "+undone+" revoke all on sequences from "+role,
		"drop schema "+postgres.Quote(w.p.schema)+" cascade")
	return w.tx.Script(ctx, strings.Join(end, ";\n"))
}
