// Package migrate brings a schema to a version, up or down. There are three sets of migrations: what every group's
// database holds, the shared tables of the main one, and a tenant's tables.
//
// It promises: what was applied is in the ledger, in the transaction that applied it, so that each step is applied
// exactly once, however many processes try and wherever one is killed. The steps of a tenant that can be one
// transaction are one: a tenant whose migration fails is at its old version. What cannot, a file without a transaction
// or a data migration, notes how far it is and goes on from there. A step whose file was changed after it had been
// applied is refused before anything of its set is done; and the question who is behind is one query for each database,
// whose cost does not grow with the number of tenants.
package migrate

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Set names one of the three sets of migrations.
type Set string

const (
	// GroupSet is what every group's database holds.
	GroupSet Set = "group"
	// SharedSet is the registry in the main group's database.
	SharedSet Set = "shared"
	// TenantSet is a tenant's tables.
	TenantSet Set = "tenant"
)

// Options says where the migrations are. Each is a folder of an fs.FS.
type Options struct {
	Files fs.FS // holds the folders group and shared, and tenant unless Tenant is given
	// Tenant replaces the folder tenant of Files with the root of another file system.
	Tenant fs.FS
	// TenantDir is what messages call the root of Tenant; empty: ".".
	TenantDir string
	// Funcs are steps of the tenant set that are written in Go; they fill numbers that no file has.
	Funcs []Func
	// LockWait is how long a step waits for another operation on the same tenant; 0 is 10 seconds.
	LockWait time.Duration
}

// Migrator applies migrations through one DB. It is safe for concurrent use.
type Migrator struct {
	db       *postgres.DB
	sets     map[Set][]File
	lockWait time.Duration
	// neutralize is the text of the tenant folder's file of that name.
	neutralize string
}

// New loads all migrations.
func New(db *postgres.DB, o Options) (*Migrator, error) {
	m := &Migrator{db: db, sets: map[Set][]File{}, lockWait: o.LockWait}
	if m.lockWait == 0 {
		m.lockWait = 10 * time.Second
	}
	for _, set := range []Set{GroupSet, SharedSet, TenantSet} {
		fsys, dir := o.Files, string(set)
		if set == TenantSet && o.Tenant != nil {
			fsys, dir = o.Tenant, "."
		}
		byVersion, err := read(fsys, dir)
		if err != nil {
			return nil, o.called(err)
		}
		for v, f := range byVersion {
			if set != TenantSet && (f.Kind != Transactional || f.Breaking) {
				return nil, badFiles(dir, "%s: only a tenant's migrations have directives, or change data in batches", byVersion[v])
			}
		}
		if set == TenantSet {
			if err := addFuncs(dir, byVersion, o.Funcs); err != nil {
				return nil, o.called(err)
			}
			if m.neutralize, err = readNeutralize(fsys, dir); err != nil {
				return nil, o.called(err)
			}
		}
		if m.sets[set], err = ordered(dir, byVersion); err != nil {
			return nil, o.called(err)
		}
	}
	return m, nil
}

// called has a fault of the files say in which folder they are.
func (o Options) called(err error) error {
	var f *fault.Fault
	if o.TenantDir != "" && errors.As(err, &f) {
		if rest, is := strings.CutPrefix(f.Message, "migrations in .: "); is {
			f.Message = "migrations in " + o.TenantDir + ": " + rest
		}
	}
	return err
}

func addFuncs(dir string, byVersion map[int]*File, funcs []Func) error {
	for _, fn := range funcs {
		f, err := fn.file()
		if err != nil {
			return err
		}
		if other := byVersion[f.Version]; other != nil {
			return badFiles(dir, "version %d stands twice: %s, and %s in Go", f.Version, other, f)
		}
		byVersion[f.Version] = &f
	}
	return nil
}

// Head is the newest version of a set.
func (m *Migrator) Head(set Set) int { return len(m.sets[set]) }

// Files are the migrations of a set, oldest first.
func (m *Migrator) Files(set Set) []File { return m.sets[set] }

// Reader is the least head that a binary must have to serve a tenant at a version: the newest breaking one up to it.
func (m *Migrator) Reader(version int) int {
	files := m.sets[TenantSet]
	for v := min(version, len(files)); v > 0; v-- {
		if files[v-1].Breaking {
			return v
		}
	}
	return 0
}

// Result is what happened to one schema.
type Result struct {
	From, To int
	Applied  []File // on the way down the ones that were taken back
	Rows     int64  // changed by data migrations
	Duration time.Duration
}

const appliedVersion = `select coalesce(max(version), 0) from public.ledger where set = $1 and tenant = 0`

// Shared brings the shared schema to its head: what each group's database holds, main first, then the registry.
func (m *Migrator) Shared(ctx context.Context) (Result, error) {
	start := time.Now()
	var res Result
	for _, group := range m.db.Groups() {
		sets := []Set{GroupSet}
		if group == postgres.MainGroup {
			sets = []Set{GroupSet, SharedSet}
		}
		inst, err := m.db.Installation(ctx, group)
		if err != nil {
			return res, err
		}
		if _, err := m.contents(ctx, group, GroupSet, SharedSet); err != nil {
			return res, err
		}
		for _, set := range sets {
			from, applied, err := m.apply(ctx, group, set, func(tx *postgres.OwnerTx) error {
				const settings = `select pg_catalog.set_config('oneo.app_role', $1, true), pg_catalog.set_config('oneo.logins', $2, true)`
				_, err := tx.Exec(ctx, settings, inst.AppRole, strings.Join(inst.LoginNames(), ","))
				return err
			})
			res.Applied = append(res.Applied, applied...)
			if set == SharedSet {
				res.From, res.To = from, from+len(applied)
			}
			if err != nil {
				res.Duration = time.Since(start)
				return res, err
			}
		}
	}
	res.Duration = time.Since(start)
	return res, nil
}

// SharedBehind returns nil when this binary can serve from the shared schema of every group, and otherwise a fault: of
// kind Pending, which says what to run, when one is behind; Conflict when one has a migration that is closed to this
// binary. One that is merely newer is served, and the tenants' own migrations are not its business: a newer binary that
// has begun must not stop the servers that still run.
func (m *Migrator) SharedBehind(ctx context.Context) error {
	for _, group := range m.db.Groups() {
		heads, readers, err := m.sharedHeads(ctx, group)
		if err != nil {
			return err
		}
		sets := []Set{GroupSet}
		if group == postgres.MainGroup {
			sets = append(sets, SharedSet)
		}
		for _, set := range sets {
			if n := m.Head(set) - heads[set]; n > 0 {
				return fault.New(fault.Pending, "the shared schema of group %s is %d migration(s) behind", group, n).
					WithCode("shared_behind").WithHint("oneo migrate --shared")
			}
			if readers[set] > m.Head(set) {
				return newer(set, heads[set], m.Head(set))
			}
		}
	}
	return nil
}

// sharedHeads reads the newest version applied of what a group's database and the registry hold, and the least that a
// binary must know. It refuses changed files.
func (m *Migrator) sharedHeads(ctx context.Context, group string) (heads, readers map[Set]int, err error) {
	const query = contentsQuery + `
union all
select r.set, r.reader, null, 0 from public.readers r`
	heads, readers = map[Set]int{}, map[Set]int{}
	if _, err := m.db.Installation(ctx, group); err != nil {
		return nil, nil, err
	}
	err = m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, query)
		if err != nil {
			return err
		}
		var set Set
		var version int
		var sum []byte
		var number int32
		_, err = pgx.ForEachRow(rows, []any{&set, &version, &sum, &number}, func() error {
			switch {
			case sum == nil:
				readers[set] = version
				return nil
			case set == TenantSet:
				return nil
			}
			heads[set] = max(heads[set], version)
			if version > m.Head(set) {
				return nil
			}
			return m.sameContent(set, version, sum)
		})
		return err
	})
	if err != nil && postgres.SQLState(err) == "42P01" {
		return nil, nil, sharedMissing(err, group)
	}
	return heads, readers, err
}

// apply runs what is missing of the group's or the shared set, each step in a transaction of its own. prepare sets up
// that transaction.
func (m *Migrator) apply(ctx context.Context, group string, set Set, prepare func(*postgres.OwnerTx) error) (from int, applied []File, err error) {
	from = -1
	for {
		var step *File
		err := m.retryLocks(ctx, m.db.LockTimeout(), func() error {
			step = nil
			return m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
				var at int
				if err := tx.QueryRow(ctx, appliedVersion, string(set)).Scan(&at); err != nil {
					return err
				}
				if at >= m.Head(set) { // nothing to do needs no lock
					from = max(from, at-len(applied))
					return nil
				}
				if err := tx.LockOperation(ctx, 0, m.lockWait); err != nil {
					return err
				}
				// Somebody else may have applied it while we waited for the lock.
				if err := tx.QueryRow(ctx, appliedVersion, string(set)).Scan(&at); err != nil {
					return err
				}
				if from < 0 {
					from = at
				}
				if at >= m.Head(set) {
					return nil
				}
				if _, err := m.readHeads(ctx, tx, contentsQuery, nil, []Set{GroupSet, SharedSet}, func(Behind) {}); err != nil {
					return err
				}
				next := m.sets[set][at]
				if err := prepare(tx); err != nil {
					return err
				}
				if err := m.step(ctx, tx, set, next); err != nil {
					return err
				}
				step = &next
				return nil
			})
		})
		if err != nil || step == nil {
			return max(from, 0), applied, err
		}
		applied = append(applied, *step)
	}
}

// step runs one file and writes its ledger row, in the transaction that it is given.
func (m *Migrator) step(ctx context.Context, tx *postgres.OwnerTx, set Set, f File) error {
	start := time.Now()
	before, err := Transaction(ctx, tx)
	if err != nil {
		return err
	}
	sc := script{}
	sc.add(f, f.Up, f.steps)
	if done, err := tx.Run(ctx, sc.text()); err != nil {
		return sc.failed(err, done)
	}
	after, err := Transaction(ctx, tx)
	if err != nil {
		return err
	}
	if err := SameTransaction(before, after); err != nil {
		return fmt.Errorf("migration %s: %w", f, err)
	}
	return Record(ctx, tx, set, 0, []File{f}, time.Since(start))
}

// Transaction is the number of the transaction at work, which changes when a script ends it.
func Transaction(ctx context.Context, q postgres.Querier) (id string, err error) {
	return id, q.QueryRow(ctx, `select pg_catalog.pg_current_xact_id()::text`).Scan(&id)
}

// SameTransaction refuses a script that has ended the transaction it ran in. Load refuses such files; this is for what
// slips past it, as on a server that reads quotes otherwise.
func SameTransaction(before, after string) error {
	if before == after {
		return nil
	}
	return fault.New(fault.Invalid, "the script ended the transaction that it ran in; what stands before that has stayed").
		WithCode(codeControl).WithHint("take the transaction control out of the file, and what it left behind out of the schema")
}

// Record writes the ledger rows of files that have been applied in the same transaction.
func Record(ctx context.Context, q postgres.Querier, set Set, number int32, files []File, took time.Duration) error {
	const insert = `insert into public.ledger (set, tenant, version, name, checksum, duration_ms)
select $1, $2, v, n, c, $6 from unnest($3::int4[], $4::text[], $5::bytea[]) as f (v, n, c)`
	versions, names, sums := make([]int32, len(files)), make([]string, len(files)), make([][]byte, len(files))
	for i, f := range files {
		versions[i], names[i], sums[i] = int32(f.Version), f.Name, f.Checksum[:]
	}
	_, err := q.Exec(ctx, insert, string(set), number, versions, names, sums, int32(took.Milliseconds()))
	return err
}

// Behind is a tenant that lacks migrations.
type Behind struct {
	Number  int32
	Version int
	// Beside: what it lacks is the batches of a data migration whose ledger row it has.
	Beside bool
}

// contentsQuery reads each (set, version, checksum) that was ever applied, skipping through the index, so that its cost
// grows with the number of files and not of tenants; and who is behind, through an index on the version.
const contentsQuery = `
with recursive applied as (
    (select l.set, l.version, l.checksum from public.ledger l order by l.set, l.version, l.checksum limit 1)
    union all
    select n.set, n.version, n.checksum from applied a cross join lateral (
        select l.set, l.version, l.checksum from public.ledger l
        where (l.set, l.version, l.checksum) > (a.set, a.version, a.checksum)
        order by l.set, l.version, l.checksum limit 1) n
)
select a.set, a.version, a.checksum, 0 from applied a`

const behindQuery = contentsQuery + `
union all
select 'behind', p.version, null, p.number from public.placements p where p.state in ('active', 'suspended', 'moving') and p.version < $1
union all
select distinct 'beside', p.version, null::bytea, p.number from public.progress g join public.placements p on p.number = g.tenant
where g.beside and p.state in ('active', 'suspended', 'moving') and p.version >= $1`

// TenantsBehind lists the tenants of a group that lack migrations, or have a data migration that is still at work beside
// others: in one query. It refuses files that were changed after they had been applied to anybody, as CheckApplied
// does. Spares of the warm pool are no tenants.
func (m *Migrator) TenantsBehind(ctx context.Context, group string) ([]Behind, error) {
	var behind []Behind
	_, err := m.readContents(ctx, group, behindQuery, []any{m.Head(TenantSet)}, []Set{TenantSet}, func(b Behind) { behind = append(behind, b) })
	return behind, err
}

// CheckApplied refuses tenant migrations that differ from what was applied to any tenant of a group, and a group that is
// at a newer version than this binary's: Conflict. A run asks it once; Tenant looks at the tenant's own rows only.
func (m *Migrator) CheckApplied(ctx context.Context, group string) error {
	_, err := m.contents(ctx, group, TenantSet)
	return err
}

// contents returns the newest version applied anywhere of each set, and refuses changed files of those that are given.
func (m *Migrator) contents(ctx context.Context, group string, checked ...Set) (map[Set]int, error) {
	return m.readContents(ctx, group, contentsQuery, nil, checked, func(Behind) {})
}

func (m *Migrator) readContents(ctx context.Context, group, sql string, args []any, checked []Set, behind func(Behind)) (map[Set]int, error) {
	if _, err := m.db.Installation(ctx, group); err != nil {
		return nil, err
	}
	var heads map[Set]int
	err := m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) (err error) {
		heads, err = m.readHeads(ctx, tx, sql, args, checked, behind)
		return err
	})
	if err != nil && postgres.SQLState(err) == "42P01" {
		return nil, sharedMissing(err, group)
	}
	return heads, err
}

// readHeads is readContents in a transaction of the group's database.
func (m *Migrator) readHeads(ctx context.Context, tx *postgres.OwnerTx, sql string, args []any, checked []Set, behind func(Behind)) (map[Set]int, error) {
	rows, err := tx.Query(ctx, sql, args...)
	if err != nil {
		return nil, err
	}
	heads := map[Set]int{}
	var set string
	var version int
	var sum []byte
	var number int32
	_, err = pgx.ForEachRow(rows, []any{&set, &version, &sum, &number}, func() error {
		if set == "behind" || set == "beside" {
			behind(Behind{Number: number, Version: version, Beside: set == "beside"})
			return nil
		}
		heads[Set(set)] = max(heads[Set(set)], version)
		if !slices.Contains(checked, Set(set)) {
			return nil
		}
		return m.sameContent(Set(set), version, sum)
	})
	return heads, err
}

// sameContent refuses a file that differs from what was applied under its number.
func (m *Migrator) sameContent(set Set, version int, sum []byte) error {
	files := m.sets[set]
	if version > len(files) {
		return newer(set, version, len(files))
	}
	if f := files[version-1]; string(f.Checksum[:]) != string(sum) {
		return edited(f, set)
	}
	return nil
}

func newer(set Set, version, known int) error {
	return fault.New(fault.Conflict, "the database is at version %d of the %s migrations; this binary knows %d", version, set, known).
		WithCode("newer_database").WithHint("use the newer oneo, or the folder of migrations that made it")
}

func sharedMissing(err error, group string) error {
	return fault.Wrap(err, fault.Pending, "the shared schema of group %s has not been made, or is behind", group).
		WithCode("shared_behind").WithHint("oneo migrate --shared")
}

// SameFiles refuses files up to a version that differ from what was applied to one tenant of the database whose
// transaction it is given.
func (m *Migrator) SameFiles(ctx context.Context, q postgres.Querier, number int32, version int) error {
	rows, err := q.Query(ctx, `select version, checksum from public.ledger where set = 'tenant' and tenant = $1 and version <= $2 order by version`, number, version)
	if err != nil {
		return err
	}
	var at, seen int
	var sum []byte
	_, err = pgx.ForEachRow(rows, []any{&at, &sum}, func() error {
		seen++
		return m.sameContent(TenantSet, at, sum)
	})
	if err == nil && seen != version {
		return fault.New(fault.Conflict, "the ledger has %d of the versions up to %d of this tenant", seen, version).WithCode("ledger_gap").
			WithHint("somebody has changed public.ledger by hand: put the rows back")
	}
	return err
}

func edited(f File, set Set) error {
	return fault.New(fault.Conflict, "migration %s (%s) was changed after it had been applied", f, set).
		WithCode("edited_migration").WithHint("restore the file as it was and write a new migration for the change")
}

// CheckTenantFiles refuses tenant migrations that differ from what was applied to any tenant of the database whose
// transaction it is given. A database that is ahead of them is none of its concern: who is made by the older files is
// behind, and nothing worse.
func (m *Migrator) CheckTenantFiles(ctx context.Context, q postgres.Querier) error {
	const other = `select coalesce(min(f.version), 0) from unnest($1::int4[], $2::bytea[]) as f (version, checksum)
where exists (select from public.ledger l where l.set = 'tenant' and l.version = f.version and l.checksum < f.checksum)
   or exists (select from public.ledger l where l.set = 'tenant' and l.version = f.version and l.checksum > f.checksum)`
	files := m.sets[TenantSet]
	versions, sums := make([]int32, len(files)), make([][]byte, len(files))
	for i, f := range files {
		versions[i], sums[i] = int32(f.Version), f.Checksum[:]
	}
	var version int
	if err := q.QueryRow(ctx, other, versions, sums).Scan(&version); err != nil || version == 0 {
		return err
	}
	return edited(files[version-1], TenantSet)
}

// VersionCount is how many tenants of a group stand at a version.
type VersionCount struct {
	Group   string `json:"group"`
	Version int    `json:"version"`
	Tenants int    `json:"tenants"`
	Behind  int    `json:"behind"` // versions up to the head; 0 also for those that are further than it
}

// Unfinished is a migration that some tenants of a group have begun and not finished: a file without a transaction, or
// a data migration.
type Unfinished struct {
	Group   string `json:"group"`
	Version int    `json:"version"`
	Name    string `json:"name"`
	Beside  bool   `json:"beside"` // the tenants are counted as having its version
	Tenants int    `json:"tenants"`
	Rows    int64  `json:"rows"` // changed so far, by all of them
}

// Status is where the fleet stands. Spares of the warm pool are no part of it.
type Status struct {
	Head       int
	Versions   []VersionCount
	Unfinished []Unfinished
	// Missing are the numbers of tenants whose schema was dropped, or dropped and made again, behind oneo's back.
	Missing []int32
}

// Status reads where every tenant stands, without opening one.
func (m *Migrator) Status(ctx context.Context) (Status, error) {
	st := Status{Head: m.Head(TenantSet)}
	for _, group := range m.db.Groups() {
		if _, err := m.contents(ctx, group, GroupSet, SharedSet, TenantSet); err != nil {
			return st, err
		}
		if err := m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error { return m.statusOf(ctx, tx, group, &st) }); err != nil {
			return st, err
		}
	}
	return st, nil
}

func (m *Migrator) statusOf(ctx context.Context, tx *postgres.OwnerTx, group string, st *Status) error {
	const counts = `select version, count(*) from public.placements where state in ('active', 'suspended', 'moving') group by version order by version desc`
	rows, err := tx.Query(ctx, counts)
	if err != nil {
		return err
	}
	vc := VersionCount{Group: group}
	if _, err := pgx.ForEachRow(rows, []any{&vc.Version, &vc.Tenants}, func() error {
		vc.Behind = max(0, st.Head-vc.Version)
		st.Versions = append(st.Versions, vc)
		return nil
	}); err != nil {
		return err
	}
	const unfinished = `select g.version, g.beside, count(*), sum(g.rows)::int8 from public.progress g join public.placements p on p.number = g.tenant
where p.state in ('active', 'suspended', 'moving') group by g.version, g.beside order by g.version`
	if rows, err = tx.Query(ctx, unfinished); err != nil {
		return err
	}
	u := Unfinished{Group: group}
	if _, err := pgx.ForEachRow(rows, []any{&u.Version, &u.Beside, &u.Tenants, &u.Rows}, func() error {
		u.Name = ""
		if u.Version <= st.Head {
			u.Name = m.sets[TenantSet][u.Version-1].Name
		}
		st.Unfinished = append(st.Unfinished, u)
		return nil
	}); err != nil {
		return err
	}
	const missing = `select p.number from public.placements p
left join pg_catalog.pg_namespace n on n.oid = p.namespace and n.nspname = p.schema
where n.oid is null and p.state in ('active', 'suspended', 'moving') order by p.number`
	if rows, err = tx.Query(ctx, missing); err != nil {
		return err
	}
	numbers, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	st.Missing = append(st.Missing, numbers...)
	return err
}
