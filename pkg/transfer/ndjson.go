package transfer

import (
	"archive/tar"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Manifest is what an export as NDJSON says of itself, in the file manifest.json, which is written last.
type Manifest struct {
	Format  int             `json:"format"`
	Made    time.Time       `json:"made"`
	Oneo    string          `json:"oneo"`
	Tenant  string          `json:"tenant"` // its id for the outside
	Slug    string          `json:"slug"`
	Name    string          `json:"name"`
	Domains []string        `json:"domains"`
	Version int             `json:"version"` // of its schema
	Tables  []ManifestTable `json:"tables"`
}

// ManifestTable is one table of a Manifest.
type ManifestTable struct {
	Table      string           `json:"table"`
	File       string           `json:"file"`
	Columns    []ManifestColumn `json:"columns"`
	PrimaryKey []string         `json:"primary_key"`
	Rows       int64            `json:"rows"`
	Bytes      int64            `json:"bytes"`
	SHA256     string           `json:"sha256"` // of the file, in hex
}

// ManifestColumn is one column, with its type as PostgreSQL names it.
type ManifestColumn struct {
	Name      string `json:"name"`
	Type      string `json:"type"`
	Null      bool   `json:"null"`      // whether it may be null
	Generated bool   `json:"generated"` // computed from the others
}

// Files makes files; when one is closed without an error it is there.
type Files func(name string) (io.WriteCloser, error)

// ExportFiles writes a tenant as NDJSON, as Export does: the files TABLE.ndjson, and manifest.json at last. Their names
// have letters a to z, digits, _, -, . and % only; a table's name is in the manifest.
func (x *Transfers) ExportFiles(ctx context.Context, t tenant.Tenant, create Files, o ExportOptions) (archive.Trailer, error) {
	if len(o.To) > 0 || o.Format != NDJSON {
		return archive.Trailer{}, fault.New(fault.Invalid, "only NDJSON is written as files, and they are not encrypted").WithCode("not_encrypted")
	}
	return x.exportAs(ctx, t, &objects{to: directory{create}}, o)
}

// objects writes a tenant as NDJSON.
type objects struct {
	to interface {
		create(name string) (io.WriteCloser, error)
		close() error
	}
	schema   string
	manifest Manifest
	open     io.WriteCloser
	rows     *tally
	sums     []archive.Sum
}

func (o *objects) begin(ctx context.Context, from source) error {
	o.schema = from.at.Name
	h := from.header
	o.manifest = Manifest{Format: 1, Made: h.Made, Oneo: h.Oneo, Tenant: h.Tenant, Slug: h.Slug, Name: from.known.Name, Domains: []string{}, Version: h.Version(), Tables: []ManifestTable{}}
	for _, d := range from.known.Domains {
		o.manifest.Domains = append(o.manifest.Domains, d.Host)
	}
	for _, t := range from.tables {
		o.manifest.Tables = append(o.manifest.Tables, ManifestTable{Table: t.name, File: fileOf(t.name), Columns: []ManifestColumn{}, PrimaryKey: []string{}})
	}
	return o.columns(ctx, from.q)
}

// columns reads what the tables of the manifest are made of.
func (o *objects) columns(ctx context.Context, q postgres.Querier) error {
	const query = `select c.relname::text, a.attname::text, pg_catalog.format_type(a.atttypid, a.atttypmod), not a.attnotnull, a.attgenerated <> '',
	exists (select from pg_catalog.pg_index i where i.indrelid = c.oid and i.indisprimary and a.attnum = any (i.indkey::int2[]))
from pg_catalog.pg_class c join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
where ` + lies + ` and c.relkind = 'r' order by c.relname, a.attnum`
	rows, err := q.Query(ctx, query, o.schema)
	if err != nil {
		return err
	}
	of := map[string]*ManifestTable{}
	for i := range o.manifest.Tables {
		of[o.manifest.Tables[i].Table] = &o.manifest.Tables[i]
	}
	var name string
	var c ManifestColumn
	var key bool
	_, err = pgx.ForEachRow(rows, []any{&name, &c.Name, &c.Type, &c.Null, &c.Generated, &key}, func() error {
		t, written := of[name]
		if !written {
			return nil
		}
		t.Columns = append(t.Columns, c)
		if key {
			t.PrimaryKey = append(t.PrimaryKey, c.Name)
		}
		return nil
	})
	return err
}

// fileOf is a table's file. Any other byte than those that every system takes for itself, in either case, stands as a number.
func fileOf(table string) string {
	var b strings.Builder
	for _, c := range []byte(table) {
		if c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String() + ".ndjson"
}

func (o *objects) table(t table) (io.Writer, string, error) {
	at := &o.manifest.Tables[len(o.sums)]
	f, err := o.to.create(at.File)
	if err != nil {
		return nil, "", err
	}
	o.open, o.rows = f, newTally(f, t.name)
	columns := make([]string, len(at.Columns))
	for i, c := range at.Columns {
		columns[i] = postgres.Quote(c.Name)
	}
	// Not to_jsonb, which does not take every json that PostgreSQL keeps, and orders its keys. A bare r may be a column.
	read := fmt.Sprintf("copy (select pg_catalog.row_to_json(r.*) from (select %s from only %s.%s) r)", strings.Join(columns, ", "), postgres.Quote(o.schema), postgres.Quote(t.name))
	return &unescape{w: o.rows}, read, nil
}

func (o *objects) endTable(rows int64) error {
	sum := o.rows.of(rows)
	at := &o.manifest.Tables[len(o.sums)]
	at.Rows, at.Bytes, at.SHA256 = sum.Rows, sum.Bytes, hex.EncodeToString(sum.SHA256)
	o.sums = append(o.sums, sum)
	f := o.open
	o.open = nil
	return f.Close()
}

func (o *objects) end(sequences []archive.Sequence) (archive.Trailer, error) {
	text, err := json.MarshalIndent(o.manifest, "", "  ")
	if err != nil {
		return archive.Trailer{}, err
	}
	if o.open, err = o.to.create("manifest.json"); err != nil {
		return archive.Trailer{}, err
	}
	_, err = o.open.Write(append(text, '\n'))
	err = errors.Join(err, o.open.Close())
	o.open = nil
	if err != nil {
		return archive.Trailer{}, err
	}
	return archive.Trailer{Tables: o.sums, Sequences: sequences}, o.to.close()
}

func (o *objects) leave() {
	if f, ok := o.open.(*member); ok {
		f.drop()
	} else if o.open != nil {
		_ = o.open.Close()
	}
}

// directory makes files where somebody else says.
type directory struct{ files Files }

func (d directory) create(name string) (io.WriteCloser, error) { return d.files(name) }
func (d directory) close() error                               { return nil }

// tarFile makes the members of a tar file.
type tarFile struct {
	out  *tar.Writer
	made time.Time
}

func newTar(w io.Writer) *tarFile { return &tarFile{out: tar.NewWriter(w), made: time.Now()} }

// member is being written. A tar file says how long a member is before it comes, so that it waits in a file without a name.
type member struct {
	*os.File
	to   *tarFile
	name string
}

func (t *tarFile) create(name string) (io.WriteCloser, error) {
	f, err := os.CreateTemp("", ".oneo-partial-")
	if err != nil {
		return nil, err
	}
	return &member{File: f, to: t, name: name}, os.Remove(f.Name())
}

func (t *tarFile) close() error { return t.out.Close() }

// Close copies the member into the tar file.
func (m *member) Close() error {
	defer m.drop()
	size, err := m.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if _, err := m.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if err := m.to.out.WriteHeader(&tar.Header{Name: m.name, Mode: 0o600, Size: size, ModTime: m.to.made}); err != nil {
		return err
	}
	_, err = io.CopyN(m.to.out, m.File, size)
	return err
}

func (m *member) drop() { _ = m.File.Close() }
