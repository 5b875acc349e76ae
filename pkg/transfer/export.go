package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/mask"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// ExportOptions say how a tenant is written.
type ExportOptions struct {
	// Format is what is written; empty: an archive.
	Format Format
	// To is whom the archive is encrypted to; none: everybody can read it.
	To []archive.Recipient
	// Empty leaves all rows out: what is made of it begins as the migrations make it.
	Empty bool
	// Begun is told what the archive says of itself, before its rows are read; may be nil. So is Own, of what the tenant has beyond its
	// migrations.
	Begun func(archive.Header)
	Own   func(archive.Structure)
	// Progress is told how far it is, now and then; may be nil.
	Progress func(Progress)

	// masks is told what was masked; nil: nothing is to be.
	masks *Masking
	// volatile writes the rows of volatile tables as well: the archive does not leave this installation.
	volatile bool
	// again only sums up what has been exported.
	again bool
}

// Progress is how far an export or a load has come.
type Progress struct {
	Table string // at hand
	Rows  int64
	Bytes int64 // of rows, as COPY writes them
	// Total is about how many bytes of tables there are, as PostgreSQL keeps them; 0: unknown.
	Total int64
}

// Export writes a tenant as an archive, or in another format: every row as it was at one moment, while others go on working. It holds the
// tenant's operation lock, so that no migration runs meanwhile, and no lock that a request would wait for. When it fails,
// what was written is no archive, and Reader says so; plain SQL ends nothing that it has begun. Conflict: the tenant has something
// beyond its migrations that no archive carries; it is named.
func (x *Transfers) Export(ctx context.Context, t tenant.Tenant, w io.Writer, o ExportOptions) (archive.Trailer, error) {
	out, err := x.form(w, o)
	if err != nil {
		return archive.Trailer{}, err
	}
	return x.exportAs(ctx, t, out, o)
}

func (x *Transfers) exportAs(ctx context.Context, t tenant.Tenant, out form, o ExportOptions) (trailer archive.Trailer, err error) {
	known, err := x.registryOf(ctx, t)
	if err != nil {
		return trailer, named(err, t)
	}
	err = x.o.DB.ReadingSession(ctx, t.Group, func(ses *postgres.Session) error {
		trailer, err = x.export(ctx, ses, t, known, out, o)
		return err
	})
	return trailer, named(err, t)
}

// registryOf reads what the shared tables know of a tenant.
func (x *Transfers) registryOf(ctx context.Context, t tenant.Tenant) (r archive.Registry, err error) {
	err = x.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		now, err := registry.ByNumber(ctx, tx, t.Number)
		if err != nil {
			return err
		}
		r = archive.Registry{Name: now.Name, State: string(now.State)}
		if r.Settings, err = registry.Settings(ctx, tx, t); err != nil {
			return err
		}
		domains, err := registry.Domains(ctx, tx, t)
		if err != nil {
			return err
		}
		for _, d := range domains {
			// The default one goes with the name, which may be another one there.
			if d.Host != now.Slug.Under(x.o.BaseDomain) {
				r.Domains = append(r.Domains, archive.Domain{Host: d.Host.String(), Primary: d.Primary})
			}
		}
		return nil
	})
	return r, err
}

// plain is how values are written, whatever the server's or the database's own words are: what one server writes another one reads.
const plain = `set local datestyle to 'ISO, YMD'; set local intervalstyle to postgres; set local extra_float_digits to 3;
set local bytea_output to hex; set local synchronize_seqscans to off; set local timezone to utc; set local lc_monetary to 'C'; set local xmloption to content;
set local row_security to off; set local standard_conforming_strings to on; set local search_path to ''`

// asUsual takes plain back: what is computed is so by the database's own words.
const asUsual = `set local datestyle to default; set local intervalstyle to default; set local extra_float_digits to default;
set local bytea_output to default; set local synchronize_seqscans to default; set local timezone to default; set local lc_monetary to default; set local xmloption to default;
set local row_security to default; set local standard_conforming_strings to default`

// export writes one tenant over a session that may write others afterwards.
func (x *Transfers) export(ctx context.Context, ses *postgres.Session, t tenant.Tenant, known archive.Registry, out form, o ExportOptions) (trailer archive.Trailer, err error) {
	// The lock comes first: the snapshot must not be older than what another operation has just done.
	if err := ses.LockReading(ctx, t.Number, x.o.LockWait); err != nil {
		return trailer, err
	}
	defer func() {
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if uerr := ses.UnlockOperation(uctx, t.Number); err == nil {
			err = uerr
		}
	}()
	err = ses.Snapshot(ctx, func() error {
		trailer, err = x.read(ctx, ses, t, known, out, o)
		return err
	})
	return trailer, err
}

// read writes one tenant as a snapshot has it, whose transaction has begun and in which nothing else was read before. Nothing
// changes the structure of the tenant between the snapshot and the end of it.
func (x *Transfers) read(ctx context.Context, ses *postgres.Session, t tenant.Tenant, known archive.Registry, out form, o ExportOptions) (trailer archive.Trailer, err error) {
	inst, err := x.o.DB.Installation(ctx, t.Group)
	if err != nil {
		return trailer, err
	}
	if err := ses.Script(ctx, plain); err != nil {
		return trailer, err
	}
	at, err := standing(ctx, ses, t)
	if err != nil {
		return trailer, err
	}
	from, err := x.describe(ctx, ses, t, at)
	if err != nil {
		return trailer, err
	}
	if !o.again && (o.Format == Archive || o.Format == "") {
		if err := x.complete(ctx, ses, t.Group, &from); err != nil {
			return trailer, err
		}
	}
	from.header.Installation, from.header.Empty, from.known = inst.ID, o.Empty, known
	if o.Begun != nil {
		o.Begun(from.header)
	}
	if o.Own != nil {
		o.Own(from.own)
	}
	tables, err := tablesOf(ctx, ses, at.Name)
	if err != nil {
		return trailer, err
	}
	from.tables = slices.DeleteFunc(tables, func(t table) bool { return !o.volatile && slices.Contains(x.o.Volatile, t.name) })
	var masks map[string]*masked
	var masker *mask.Masker
	if o.masks != nil {
		if masks, *o.masks, err = x.masking(ctx, ses, at); err != nil {
			return trailer, err
		}
		masker = mask.New(x.o.Secret)
	}
	defer out.leave()
	if err := out.begin(ctx, from); err != nil {
		return trailer, err
	}
	if err := failpoint.Hit("export.begun"); err != nil {
		return trailer, err
	}
	if o.Empty {
		return out.end(nil)
	}
	told := meter{tell: o.Progress}
	for _, table := range from.tables {
		told.Total += table.bytes
	}
	for _, table := range from.tables {
		rows, read, err := out.table(table)
		if err != nil {
			return trailer, err
		}
		through := noClose(rows)
		if m := masks[table.name]; m != nil {
			through = m.through(rows, masker, table)
		}
		n, err := ses.CopyTo(ctx, told.through(through, table.name), read+" to stdout")
		if err == nil {
			err = through.Close()
		}
		if err != nil {
			return trailer, fmt.Errorf("read table %s: %w", table.name, err)
		}
		told.Rows += n
		if err := out.endTable(n); err != nil {
			return trailer, err
		}
		if err := failpoint.Hit("export.table"); err != nil {
			return trailer, err
		}
	}
	// A sequence knows no snapshots: read behind the rows it is ahead of all of them.
	sequences, err := sequencesOf(ctx, ses, at.Name)
	if err != nil {
		return trailer, err
	}
	if err := asTheyWere(ctx, ses, at.Name, from.tables); err != nil {
		return trailer, err
	}
	return out.end(sequences)
}

// asTheyWere refuses tables that somebody has emptied or rewritten since the snapshot, past all of oneo's locks: the rows from
// before are not there any more, and a snapshot does not bring them back. Reading them has kept out whoever comes now.
func asTheyWere(ctx context.Context, q postgres.Querier, schema string, tables []table) error {
	names := make([]string, len(tables))
	for i, t := range tables {
		names[i] = t.name
	}
	// The snapshot sees the row that names the old file, the function looks at what is there.
	const query = `select pg_catalog.min(c.relname::text) from pg_catalog.pg_class c
where ` + lies + ` and c.relname = any($2) and pg_catalog.pg_relation_filenode(c.oid) is distinct from c.relfilenode`
	var found *string
	if err := q.QueryRow(ctx, query, schema, names).Scan(&found); err != nil || found == nil {
		return err
	}
	return fault.New(fault.Conflict, "the table %s was emptied or rewritten while the tenant was read", *found).WithCode("changed_meanwhile").
		WithHint("run the same command again when whoever does that past oneo is done")
}

// standing is where the tenant's schema stands. NotFound: it is gone, or was made again behind oneo's back.
func standing(ctx context.Context, q postgres.Querier, t tenant.Tenant) (at structure.Schema, err error) {
	const query = `select p.schema, p.role from public.placements p
join pg_catalog.pg_namespace n on n.oid = p.namespace and n.nspname = p.schema where p.number = $1 and p.state <> 'spare'`
	err = q.QueryRow(ctx, query, t.Number).Scan(&at.Name, &at.Role)
	if errors.Is(err, pgx.ErrNoRows) {
		return at, fault.New(fault.NotFound, "the tenant's schema is not where the registry says").WithCode("schema_missing").
			WithHint("oneo migrate status names all such tenants")
	}
	return at, err
}

// source is what an export writes from, but for the rows.
type source struct {
	q      postgres.Querier // in the snapshot
	at     structure.Schema
	header archive.Header
	known  archive.Registry
	own    archive.Structure
	have   structure.Structure
	tables []table // those whose rows are written
}

// describe says at which version the tenant is and what it has beyond that.
func (x *Transfers) describe(ctx context.Context, ses *postgres.Session, t tenant.Tenant, at structure.Schema) (from source, err error) {
	from = source{q: ses, at: at}
	h := &from.header
	*h = archive.Header{Made: time.Now().UTC(), Oneo: x.o.Version, Tenant: t.ID, Number: t.Number, Slug: t.Slug.String(), Schema: t.Schema.String(), Group: t.Group, Words: structure.Words}
	var beside int
	const ask = `select pg_catalog.current_setting('server_version_num')::int, (select count(*) from public.progress where tenant = $1)`
	if err := ses.QueryRow(ctx, ask, t.Number).Scan(&h.Postgres, &beside); err != nil {
		return from, err
	}
	if beside > 0 {
		return from, fault.New(fault.Conflict, "a migration of this tenant has been begun and not ended").WithCode("migration_unfinished").
			WithHint("oneo migrate -t %s", t.Slug)
	}
	rows, err := ses.Query(ctx, `select version, name, checksum from public.ledger where set = 'tenant' and tenant = $1 order by version`, t.Number)
	if err != nil {
		return from, err
	}
	h.Migrations, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (m archive.Migration, err error) {
		return m, row.Scan(&m.Version, &m.Name, &m.Checksum)
	})
	if err != nil {
		return from, err
	}
	if from.have, err = structure.Read(ctx, ses.Kept(), at); err != nil {
		return from, err
	}
	base, err := x.o.Structure.Reference(ctx, t.Group, h.Version())
	if err != nil {
		return from, err
	}
	h.Fingerprint, h.Base = from.have.Hash(), base.Hash()
	if h.Fingerprint != h.Base {
		for _, step := range structure.Way(base, from.have) {
			from.own.Custom = append(from.own.Custom, archive.Statement{Object: step.What, SQL: step.SQL})
		}
	}
	return from, nil
}

// lies holds for the relations c of the schema $1, but for indexes and composite types. pg_depend comes first: it has an index by
// schema, and pg_class, which has none, would be read through with the relations of all other tenants.
const lies = `c.oid in (select d.objid from pg_catalog.pg_depend d where d.refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass
	and d.refobjid = (select oid from pg_catalog.pg_namespace where nspname = $1) and d.classid = 'pg_catalog.pg_class'::pg_catalog.regclass)
and c.relnamespace = (select oid from pg_catalog.pg_namespace where nspname = $1)`

// table is one whose rows are written.
type table struct {
	name    string
	columns []string
	bytes   int64
}

// tablesOf lists the tables of a schema that hold rows, with the columns that are written: not those that PostgreSQL
// computes. It looks at nothing of other schemas.
func tablesOf(ctx context.Context, q postgres.Querier, schema string) ([]table, error) {
	const query = `select c.relname::text, coalesce((select pg_catalog.array_agg(a.attname::text order by a.attnum) from pg_catalog.pg_attribute a
	where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''), '{}'), pg_catalog.pg_table_size(c.oid)
from pg_catalog.pg_class c where ` + lies + ` and c.relkind = 'r' order by c.relname`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (t table, err error) {
		return t, row.Scan(&t.name, &t.columns, &t.bytes)
	})
}

// sequencesOf reads where the sequences of a schema stand.
func sequencesOf(ctx context.Context, q postgres.Querier, schema string) ([]archive.Sequence, error) {
	const query = `select c.relname::text from pg_catalog.pg_class c
where ` + lies + ` and c.relkind = 'S' order by c.relname`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(names) == 0 {
		return nil, err
	}
	all := make([]archive.Sequence, len(names))
	asks := make([]string, len(names))
	for i, n := range names {
		all[i].Name = n
		asks[i] = fmt.Sprintf("select %d, last_value, is_called from %s.%s", i, postgres.Quote(schema), postgres.Quote(n))
	}
	rows, err = q.Query(ctx, strings.Join(asks, " union all "))
	if err != nil {
		return nil, err
	}
	var i int
	var last int64
	var called bool
	_, err = pgx.ForEachRow(rows, []any{&i, &last, &called}, func() error {
		all[i].Last, all[i].Called = last, called
		return nil
	})
	return all, err
}

// copyOf is the beginning of a COPY of a table's rows.
func copyOf(schema, name string, columns []string) string {
	quoted := make([]string, len(columns))
	for i, c := range columns {
		quoted[i] = postgres.Quote(c)
	}
	list := ""
	if len(quoted) > 0 {
		list = " (" + strings.Join(quoted, ", ") + ")"
	}
	return "copy " + postgres.Quote(schema) + "." + postgres.Quote(name) + list
}

// meter counts the rows that go by, and tells of them.
type meter struct {
	Progress
	tell func(Progress)
	last time.Time
}

const tellEvery = 100 * time.Millisecond

func (m *meter) count(n int) {
	m.Bytes += int64(n)
	if m.tell != nil && time.Since(m.last) > tellEvery {
		m.last = time.Now()
		m.tell(m.Progress)
	}
}

// through counts what is written to w.
func (m *meter) through(w io.Writer, table string) io.Writer {
	m.Table = table
	return writerFunc(func(p []byte) (int, error) {
		m.count(len(p))
		return w.Write(p)
	})
}

// noClose is w with a Close that does nothing.
func noClose(w io.Writer) io.WriteCloser {
	return struct {
		io.Writer
		io.Closer
	}{w, io.NopCloser(nil)}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// head is the newest version that this binary knows.
func (x *Transfers) head() int { return x.o.Migrate.Head(migrate.TenantSet) }
