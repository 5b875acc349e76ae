package archive

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash"
	"io"
	"slices"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
)

// Writer writes an archive: the header, then registry, structure and tables, then the trailer. An error sticks: once
// something could not be written, Close says so too. It is not safe for concurrent use.
type Writer struct {
	seal *sealer
	age  io.WriteCloser // nil: not encrypted
	zip  *zstd.Encoder
	sum  hash.Hash // over all records
	err  error

	table *Sum // open
	rows  hash.Hash
	buf   []byte // rows of it that make no whole record yet
	sums  []Sum
	last  kind
}

// NewWriter begins an archive. With recipients everything but their key ids is encrypted.
func NewWriter(w io.Writer, h Header, to ...Recipient) (*Writer, error) {
	keys, all, err := recipients(to)
	if err != nil {
		return nil, err
	}
	x := &Writer{seal: newSealer(w), sum: sha256.New(), buf: make([]byte, 0, dataSize)}
	line, err := json.Marshal(preamble{Format: Format, Keys: keys})
	if err != nil {
		return nil, err
	}
	if err := x.seal.raw(slices.Concat([]byte(magic), line, []byte("\n"))); err != nil {
		return nil, err
	}
	var inner io.Writer = x.seal
	if len(all) > 0 {
		if x.age, err = age.Encrypt(x.seal, all...); err != nil {
			return nil, err
		}
		inner = x.age
	}
	// One goroutine compresses while the next block is read; a window of 4 MiB keeps the memory small on both sides.
	x.zip, err = zstd.NewWriter(inner, zstd.WithEncoderConcurrency(2), zstd.WithWindowSize(4<<20), zstd.WithEncoderCRC(true))
	if err != nil {
		return nil, err
	}
	x.record(kindHeader, h)
	return x, x.err
}

// Registry writes what the registry knows.
func (x *Writer) Registry(r Registry) error { return x.after(kindHeader, kindRegistry, r) }

// Structure writes what the tenant has beyond its migrations.
func (x *Writer) Structure(s Structure) error { return x.after(kindRegistry, kindStructure, s) }

func (x *Writer) after(before, k kind, v any) error {
	if x.err == nil && x.last != before {
		x.err = fmt.Errorf("archive: record %s must follow %s", k, before)
	}
	x.record(k, v)
	return x.err
}

// Table begins the rows of a table; what is written to w are rows as COPY writes them in its text format.
func (x *Writer) Table(t Table) (w io.Writer, err error) {
	switch {
	case x.err != nil:
	case x.table != nil || (x.last != kindStructure && x.last != kindEnd):
		x.err = fmt.Errorf("archive: table %s begins in the wrong place", t.Name)
	case len(x.sums) == maxTables:
		x.err = fmt.Errorf("archive: more than %d tables", maxTables)
	}
	x.record(kindTable, t)
	x.table, x.rows = &Sum{Table: t.Name}, sha256.New()
	return data{x}, x.err
}

// EndTable ends the rows of the table, and says how many they were.
func (x *Writer) EndTable(rows int64) error {
	if x.err == nil && x.table == nil {
		x.err = fmt.Errorf("archive: no table is open")
	}
	if x.err != nil {
		return x.err
	}
	x.flush()
	x.table.Rows, x.table.SHA256 = rows, x.rows.Sum(nil)
	x.record(kindEnd, *x.table)
	x.sums = append(x.sums, *x.table)
	x.table = nil
	return x.err
}

// Close writes the trailer and all that is still held back. Only when it returns nil is there an archive.
func (x *Writer) Close(sequences []Sequence) (Trailer, error) {
	t := Trailer{Tables: x.sums, Sequences: sequences, SHA256: x.sum.Sum(nil)}
	if x.err == nil && (x.table != nil || (x.last != kindStructure && x.last != kindEnd)) {
		x.err = fmt.Errorf("archive: closed in the wrong place")
	}
	x.record(kindTrailer, t)
	closers := []io.Closer{x.zip, x.age, x.seal}
	if x.age == nil {
		closers = []io.Closer{x.zip, x.seal}
	}
	for _, c := range closers {
		if err := c.Close(); err != nil && x.err == nil {
			x.err = err
		}
	}
	return t, x.err
}

// Written is how many bytes of the archive have been written so far.
func (x *Writer) Written() int64 { return x.seal.written }

// data takes the rows of the open table.
type data struct{ x *Writer }

func (d data) Write(p []byte) (n int, err error) {
	if d.x.table == nil && d.x.err == nil {
		d.x.err = fmt.Errorf("archive: rows without a table")
	}
	for len(p) > 0 && d.x.err == nil { // COPY comes row by row
		k := min(len(p), dataSize-len(d.x.buf))
		d.x.buf = append(d.x.buf, p[:k]...)
		if p, n = p[k:], n+k; len(d.x.buf) == dataSize {
			d.x.flush()
		}
	}
	return n, d.x.err
}

// flush writes the rows that were held back.
func (x *Writer) flush() {
	if len(x.buf) > 0 {
		x.rows.Write(x.buf)
		x.raw(kindData, x.buf)
		x.table.Bytes += int64(len(x.buf))
		x.buf = x.buf[:0]
	}
}

func (x *Writer) record(k kind, v any) {
	if x.err != nil {
		return
	}
	body, err := json.Marshal(v)
	if err == nil && len(body) > MaxRecord {
		err = fmt.Errorf("archive: record %s has %d bytes, more than %d", k, len(body), MaxRecord)
	}
	if err != nil {
		x.err = err
		return
	}
	x.raw(k, body)
	x.last = k
}

// raw writes a record: its kind, its length, its body.
func (x *Writer) raw(k kind, body []byte) {
	var head [5]byte
	head[0] = byte(k)
	binary.BigEndian.PutUint32(head[1:], uint32(len(body)))
	for _, p := range [][]byte{head[:], body} {
		if x.err == nil {
			x.sum.Write(p)
			_, x.err = x.zip.Write(p)
		}
	}
}
