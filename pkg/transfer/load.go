package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// fits refuses an archive that cannot be restored here: it is newer than this binary, or its migrations are others.
func (x *Transfers) fits(ctx context.Context, h archive.Header, group string) error {
	if h.Version() > x.head() {
		return fault.New(fault.Conflict, "the archive is at version %d; this oneo knows the migrations up to %d", h.Version(), x.head()).
			WithCode("archive_newer").WithHint("restore it with the oneo that wrote it, %s, or a newer one", h.Oneo)
	}
	files := x.o.Migrate.Files(migrate.TenantSet)
	for i, m := range h.Migrations {
		if m.Version != i+1 {
			return fault.New(fault.Conflict, "the archive lacks migration %d", i+1).WithCode("archive_unfit")
		}
	}
	var here int
	err := x.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select pg_catalog.current_setting('server_version_num')::int`).Scan(&here)
	})
	if err != nil {
		return err
	}
	if sameWords(h, here) {
		base, err := x.o.Structure.Reference(ctx, group, h.Version())
		if err != nil || base.Hash() == h.Base {
			return err
		}
	}
	// Another server, and another oneo, may use other words for the same structure; then the files themselves must be the same.
	for i, m := range h.Migrations {
		if string(files[i].Checksum[:]) != string(m.Checksum) {
			return fault.New(fault.Conflict, "migration %s is not the one that the archive was made with", files[i]).WithCode("archive_unfit").
				WithHint("restore it with the migrations that it was made with (--schemas), at version %d", h.Version())
		}
	}
	if sameWords(h, here) {
		return fault.New(fault.Conflict, "the migrations make another structure at version %d than where the archive was made", h.Version()).WithCode("archive_unfit").
			WithHint("restore it with the oneo that wrote it, %s", h.Oneo)
	}
	return nil
}

func major(serverVersion int) int { return serverVersion / 10_000 }

// sameWords reports whether a structure here is described as in an archive.
func sameWords(h archive.Header, here int) bool {
	return major(h.Postgres) == major(here) && h.Words == structure.Words
}

// load puts all of an archive into the tables that the migrations up to its version have made, in a transaction that nobody sees before it has
// ended. Secondary indexes and foreign keys are made when the rows are in. It returns only when the archive was read to its end
// and is whole.
func (x *Transfers) load(ctx context.Context, tx *postgres.OwnerTx, a *archive.Reader, at structure.Schema, o Loading) (archive.Trailer, error) {
	path, told := bound(at), &meter{tell: o.Progress}
	if err := tx.Script(ctx, plain); err != nil {
		return archive.Trailer{}, err
	}
	if err := tx.Script(ctx, path); err != nil {
		return archive.Trailer{}, err
	}
	if err := custom(ctx, tx, a.Structure(), at, o.ours); err != nil {
		return archive.Trailer{}, err
	}
	if !a.Header().Empty {
		if err := usableLabels(ctx, tx, at); err != nil {
			return archive.Trailer{}, err
		}
	}
	tables, err := tablesOf(ctx, tx, at.Name)
	if err != nil {
		return archive.Trailer{}, err
	}
	if err := tx.Script(ctx, path); err != nil { // what is taken off is described as it is made again
		return archive.Trailer{}, err
	}
	later, err := takeOff(ctx, tx, at.Name)
	if err != nil {
		return archive.Trailer{}, err
	}
	if !a.Header().Empty {
		if err := clear(ctx, tx, at.Name, tables); err != nil {
			return archive.Trailer{}, err
		}
	}
	if err := failpoint.Hit("load.begun"); err != nil {
		return archive.Trailer{}, err
	}
	counts := map[string]int64{}
	for {
		t, err := a.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return archive.Trailer{}, err
		}
		if err := suits(t, tables, counts); err != nil {
			return archive.Trailer{}, err
		}
		// Nobody sees the table yet: its rows are written as if they had always been there.
		n, err := tx.CopyFrom(ctx, told.from(a, t.Name), copyOf(at.Name, t.Name, t.Columns)+" from stdin with (freeze)")
		if err != nil {
			return archive.Trailer{}, fmt.Errorf("load table %s: %w", t.Name, err)
		}
		counts[t.Name] = n
		told.Rows += n
		if err := failpoint.Hit("load.table"); err != nil {
			return archive.Trailer{}, err
		}
	}
	trailer, err := a.Trailer()
	if err != nil {
		return trailer, err
	}
	for _, sum := range trailer.Tables {
		if counts[sum.Table] != sum.Rows {
			return trailer, fault.New(fault.Unverified, "table %s has %d rows in the archive, and %d came in", sum.Table, sum.Rows, counts[sum.Table]).WithCode("archive_damaged")
		}
	}
	if err := setSequences(ctx, tx, at.Name, trailer.Sequences); err != nil {
		return trailer, err
	}
	if err := tx.Script(ctx, strings.Join(later, ";\n")); err != nil {
		return trailer, fmt.Errorf("make indexes and constraints: %w", err)
	}
	if err := sameStructure(ctx, tx, a.Header(), at); err != nil {
		return trailer, err
	}
	// The rows are in. Views, and the migrations that follow, mean the database's time zone.
	if err := tx.Script(ctx, asUsual+";\n"+path); err != nil {
		return trailer, err
	}
	if err := refresh(ctx, tx, at.Name); err != nil {
		return trailer, err
	}
	// What plans are made by would otherwise come with the next autovacuum.
	names := make([]string, len(tables))
	for i, t := range tables {
		names[i] = postgres.Quote(at.Name) + "." + postgres.Quote(t.name)
	}
	if len(names) > 0 {
		if err := tx.Script(ctx, "analyze "+strings.Join(names, ", ")); err != nil {
			return trailer, err
		}
	}
	if err := failpoint.Hit("load.checked"); err != nil {
		return trailer, err
	}
	return trailer, nil
}

// usableLabels makes the schema's objects anew, by what they are, where a label was added to an enum since it was made: before
// PostgreSQL 17 no row may have such a label in the same transaction. No table has a row yet that is not to be cleared.
func usableLabels(ctx context.Context, tx *postgres.OwnerTx, at structure.Schema) error {
	const query = `select coalesce(pg_catalog.string_agg(pg_catalog.format('%L::%I.%I', e.enumlabel, n.nspname, y.typname), ', '), 'null'), current_user::text
from pg_catalog.pg_namespace n join pg_catalog.pg_type y on y.typnamespace = n.oid join pg_catalog.pg_enum e on e.enumtypid = y.oid where n.nspname = $1`
	var all, owner string
	if err := tx.QueryRow(ctx, query, at.Name).Scan(&all, &owner); err != nil {
		return err
	}
	err := tx.Script(ctx, "savepoint labels;\nselect "+all+";\nrelease labels")
	const unsafeLabel = "55P04"
	if pe := (*pgconn.PgError)(nil); err == nil || !errors.As(err, &pe) || pe.Code != unsafeLabel {
		return err
	}
	if err := tx.Script(ctx, "rollback to labels; release labels"); err != nil {
		return err
	}
	want, err := structure.Read(ctx, tx, at)
	if err != nil {
		return err
	}
	comments, err := commentsOf(ctx, tx, at.Name)
	if err != nil {
		return err
	}
	if err := tx.Script(ctx, "drop schema "+postgres.Quote(at.Name)+" cascade;\n"+structure.Empty(at)); err != nil {
		return err
	}
	empty, err := structure.Read(ctx, tx, at)
	if err != nil {
		return err
	}
	if err := tx.Script(ctx, bound(at)+"; set local check_function_bodies to off"); err != nil {
		return err
	}
	refused := func(why any) error {
		return fault.New(fault.Conflict, "before PostgreSQL 17 labels of an enum cannot be loaded that were added to it, and the tables could not be made otherwise: %v", why).
			WithCode("enum_labels").WithHint("load it into PostgreSQL 17 or a newer one")
	}
	if step, err := structure.Run(ctx, tx, at, owner, structure.Way(empty, want)); err != nil && step.SQL == "" {
		return err
	} else if err != nil {
		return refused(fmt.Sprintf("%s: %v", step.What, err))
	}
	if err := tx.Script(ctx, strings.Join(append(comments, "set local check_function_bodies to on"), ";\n")); err != nil {
		return err
	}
	have, err := structure.Read(ctx, tx, at)
	if err != nil {
		return err
	}
	if d := structure.Compare(want, have); len(d) > 0 {
		return refused(d[0])
	}
	return tx.Script(ctx, bound(at))
}

// bound is the statement that binds a transaction to a schema.
func bound(at structure.Schema) string {
	return "set local search_path to " + postgres.Quote(at.Name) + ", ext, pg_temp"
}

// suits refuses a table of an archive that the migrations do not make.
func suits(t archive.Table, tables []table, counts map[string]int64) error {
	i := slices.IndexFunc(tables, func(have table) bool { return have.name == t.Name })
	_, again := counts[t.Name]
	switch {
	case i < 0:
		return fault.New(fault.Conflict, "the archive has rows of a table %q that its migrations do not make", t.Name).WithCode("archive_unfit")
	case again:
		return fault.New(fault.Unverified, "the archive has table %q twice", t.Name).WithCode("archive_damaged")
	}
	for _, c := range t.Columns {
		if !slices.Contains(tables[i].columns, c) {
			return fault.New(fault.Conflict, "the archive has a column %q of table %q that its migrations do not make", c, t.Name).WithCode("archive_unfit")
		}
	}
	return nil
}

// clear takes away the rows that migrations have put into the tables: the archive has them as they are now.
func clear(ctx context.Context, tx *postgres.OwnerTx, schema string, tables []table) error {
	if len(tables) == 0 {
		return nil
	}
	names := make([]string, len(tables))
	for i, t := range tables {
		names[i] = postgres.Quote(schema) + "." + postgres.Quote(t.name)
	}
	return tx.Script(ctx, "truncate "+strings.Join(names, ", "))
}

// takeOff takes away what would slow the rows down or refuse them: foreign keys, secondary indexes, triggers, and checks that are
// not valid, which some rows may not have passed. It returns the statements that bring it back, in order.
func takeOff(ctx context.Context, tx *postgres.OwnerTx, schema string) (later []string, err error) {
	// Each row: what takes it off, what brings it back, and its comment.
	const query = `with s as (select oid from pg_catalog.pg_namespace where nspname = $1),
t as (select c.oid, c.relname, c.relispartition from pg_catalog.pg_class c where ` + lies + ` and c.relkind in ('r', 'p'))
select 1 as rank, k.conname::text as name, pg_catalog.format('alter table %I drop constraint %I', t.relname, k.conname),
	pg_catalog.format('alter table %I add constraint %I %s', t.relname, k.conname, pg_catalog.pg_get_constraintdef(k.oid)),
	pg_catalog.format('comment on constraint %I on %I is %L', k.conname, t.relname, pg_catalog.obj_description(k.oid, 'pg_constraint')),
	pg_catalog.obj_description(k.oid, 'pg_constraint') is not null
from t join pg_catalog.pg_constraint k on k.conrelid = t.oid where k.contype = 'f' and k.conparentid = 0
union all
select 2, c.relname::text, pg_catalog.format('drop index %I', c.relname), pg_catalog.pg_get_indexdef(c.oid),
	pg_catalog.format('comment on index %I is %L', c.relname, pg_catalog.obj_description(c.oid, 'pg_class')), pg_catalog.obj_description(c.oid, 'pg_class') is not null
from t join pg_catalog.pg_index i on i.indrelid = t.oid join pg_catalog.pg_class c on c.oid = i.indexrelid
where c.relkind = 'i' and not c.relispartition and not i.indisreplident and not i.indisclustered
	and not exists (select from pg_catalog.pg_constraint k where k.conindid = c.oid)
	and not exists (select from pg_catalog.pg_attribute a where a.attrelid = c.oid and a.attstattarget >= 0)
union all
select 3, g.tgname::text, pg_catalog.format('alter table %I disable trigger %I', t.relname, g.tgname),
	pg_catalog.format('alter table %I enable %s trigger %I', t.relname, case g.tgenabled when 'R' then 'replica' when 'A' then 'always' else '' end, g.tgname), '', false
from t join pg_catalog.pg_trigger g on g.tgrelid = t.oid where not g.tgisinternal and g.tgenabled <> 'D' and g.tgparentid = 0
union all
select 4, k.conname::text, pg_catalog.format('alter table %I drop constraint %I', t.relname, k.conname),
	pg_catalog.format('alter table %I add constraint %I %s', t.relname, k.conname, pg_catalog.pg_get_constraintdef(k.oid)),
	pg_catalog.format('comment on constraint %I on %I is %L', k.conname, t.relname, pg_catalog.obj_description(k.oid, 'pg_constraint')),
	pg_catalog.obj_description(k.oid, 'pg_constraint') is not null
from t join pg_catalog.pg_constraint k on k.conrelid = t.oid where k.contype = 'c' and not k.convalidated and k.conislocal and k.coninhcount = 0
union all
select 4, k.conname::text, pg_catalog.format('alter domain %I drop constraint %I', y.typname, k.conname),
	pg_catalog.format('alter domain %I add constraint %I %s', y.typname, k.conname, pg_catalog.pg_get_constraintdef(k.oid)),
	pg_catalog.format('comment on constraint %I on domain %I is %L', k.conname, y.typname, pg_catalog.obj_description(k.oid, 'pg_constraint')),
	pg_catalog.obj_description(k.oid, 'pg_constraint') is not null
from s join pg_catalog.pg_type y on y.typnamespace = s.oid join pg_catalog.pg_constraint k on k.contypid = y.oid where k.contype = 'c' and not k.convalidated
order by 1, 2`
	rows, err := tx.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	var off []string
	var foreign, indexes, triggers, checks []string
	var rank int
	var name, away, back, comment string
	var commented bool
	_, err = pgx.ForEachRow(rows, []any{&rank, &name, &away, &back, &comment, &commented}, func() error {
		off = append(off, away)
		list := []*[]string{&foreign, &indexes, &triggers, &checks}[rank-1]
		*list = append(*list, back)
		if commented {
			*list = append(*list, comment)
		}
		return nil
	})
	if err != nil || len(off) == 0 {
		return nil, err
	}
	if err := tx.Script(ctx, strings.Join(off, ";\n")); err != nil {
		return nil, err
	}
	return slices.Concat(checks, indexes, foreign, triggers), nil
}

// refresh fills the materialized views, in the order in which they were made: one may be made of another.
func refresh(ctx context.Context, tx *postgres.OwnerTx, schema string) error {
	const query = `select c.relname::text from pg_catalog.pg_class c
where ` + lies + ` and c.relkind = 'm' order by c.oid`
	rows, err := tx.Query(ctx, query, schema)
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, n := range names {
		if err := tx.Script(ctx, "refresh materialized view "+postgres.Quote(schema)+"."+postgres.Quote(n)); err != nil {
			return fmt.Errorf("refresh %s: %w", n, err)
		}
	}
	return nil
}

// setSequences lets the sequences go on behind the archive's values.
func setSequences(ctx context.Context, tx *postgres.OwnerTx, schema string, sequences []archive.Sequence) error {
	have, err := sequencesOf(ctx, tx, schema)
	if err != nil {
		return err
	}
	for _, s := range sequences {
		if !slices.ContainsFunc(have, func(h archive.Sequence) bool { return h.Name == s.Name }) {
			return fault.New(fault.Conflict, "the archive has a sequence %q that its migrations do not make", s.Name).WithCode("archive_unfit")
		}
		name := postgres.Quote(schema) + "." + postgres.Quote(s.Name)
		if _, err := tx.Exec(ctx, `select pg_catalog.setval($1::text::pg_catalog.regclass, $2, $3)`, name, s.Last, s.Called); err != nil {
			return fmt.Errorf("set sequence %s: %w", s.Name, err)
		}
	}
	return nil
}

// from counts what is read from r.
func (m *meter) from(r io.Reader, table string) io.Reader {
	m.Table = table
	return readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		m.count(n)
		return n, err
	})
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
