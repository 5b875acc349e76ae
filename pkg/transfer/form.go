package transfer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash"
	"io"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// Format is what an export writes.
type Format string

const (
	// Archive is oneo's own: the only one that import and restore read.
	Archive Format = "oneo"
	// SQL is a script for psql, which needs no oneo.
	SQL Format = "sql"
	// NDJSON is one file a table with one JSON object a row, and a manifest; as one stream they are a tar file.
	NDJSON Format = "ndjson"
)

// form is how an export is written. All forms are made of the same rows, at the same moment.
type form interface {
	// begin writes what comes before the rows.
	begin(ctx context.Context, from source) error
	// table begins a table, and says where its rows go and by which COPY they are read.
	table(t table) (rows io.Writer, read string, err error)
	endTable(rows int64) error
	// end writes what comes after the rows. Only when it returns nil is there an export.
	end(sequences []archive.Sequence) (archive.Trailer, error)
	// leave frees what is held, whether there was an end or not.
	leave()
}

// form is where an export is written as one stream.
func (x *Transfers) form(w io.Writer, o ExportOptions) (form, error) {
	if len(o.To) > 0 && o.Format != Archive && o.Format != "" {
		return nil, fault.New(fault.Invalid, "only an archive is encrypted; the format %s would be readable by everybody", o.Format).WithCode("not_encrypted").
			WithHint("encrypt the stream: oneo tenant export NAME --format %s -f - | age -r age1... > FILE", o.Format)
	}
	switch o.Format {
	case Archive, "":
		return &archived{w: w, to: o.To}, nil
	case SQL:
		return newScript(w, x.o.Structure), nil
	case NDJSON:
		return &objects{to: newTar(w)}, nil
	}
	return nil, fault.New(fault.Invalid, "unknown format %q", o.Format).WithHint("use one of oneo, sql, ndjson")
}

// archived writes an archive.
type archived struct {
	w      io.Writer
	to     []archive.Recipient
	out    *archive.Writer
	schema string
}

func (a *archived) begin(_ context.Context, from source) (err error) {
	a.schema = from.at.Name
	if a.out, err = archive.NewWriter(a.w, from.header, a.to...); err != nil {
		return err
	}
	return errors.Join(a.out.Registry(from.known), a.out.Structure(from.own))
}

func (a *archived) table(t table) (io.Writer, string, error) {
	rows, err := a.out.Table(archive.Table{Name: t.name, Columns: t.columns})
	return rows, copyOf(a.schema, t.name, t.columns), err
}

func (a *archived) endTable(rows int64) error { return a.out.EndTable(rows) }

func (a *archived) end(sequences []archive.Sequence) (archive.Trailer, error) {
	return a.out.Close(sequences)
}

func (a *archived) leave() {}

// tally sums up what is written of a table.
type tally struct {
	w    io.Writer
	sum  archive.Sum
	hash hash.Hash
}

func newTally(w io.Writer, table string) *tally {
	return &tally{w: w, sum: archive.Sum{Table: table}, hash: sha256.New()}
}

func (t *tally) Write(p []byte) (int, error) {
	t.hash.Write(p)
	t.sum.Bytes += int64(len(p))
	return t.w.Write(p)
}

// of is the sum, once there is nothing more.
func (t *tally) of(rows int64) archive.Sum {
	t.sum.Rows, t.sum.SHA256 = rows, t.hash.Sum(nil)
	return t.sum
}

// unescape turns what COPY writes of a single column of JSON back into JSON, one value a line. What it has written as an
// escape is a backslash of the JSON itself, or blank space between its words: a character of a text that would need one is escaped in JSON
// already.
type unescape struct {
	w    io.Writer
	half bool // the last byte of what was written before was a backslash
	buf  bytes.Buffer
}

func (u *unescape) Write(p []byte) (int, error) {
	n := len(p)
	u.buf.Reset()
	for len(p) > 0 {
		if u.half {
			if p[0] == '\\' {
				u.buf.WriteByte('\\')
			} else {
				u.buf.WriteByte(' ')
			}
			u.half, p = false, p[1:]
			continue
		}
		i := bytes.IndexByte(p, '\\')
		if i < 0 {
			u.buf.Write(p)
			break
		}
		u.buf.Write(p[:i])
		u.half, p = true, p[i+1:]
	}
	if _, err := u.w.Write(u.buf.Bytes()); err != nil {
		return 0, err
	}
	return n, nil
}
