package archive

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash"
	"io"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// ReadOptions say how an archive is read.
type ReadOptions struct {
	// Identities open an encrypted archive.
	Identities []Identity
	// MaxBytes bounds what the archive may come to when it is unpacked, in bytes; 0: no bound.
	MaxBytes int64
}

// Reader reads an archive: Header, Registry and Structure are there from the beginning, Next goes through the tables,
// Read gives the rows of the one at hand, and when Next has answered io.EOF all of it was compared with its checksums and Trailer is
// there. Whatever is wrong with the bytes is a fault of the kind Unverified. It is not safe for concurrent use and must be closed.
type Reader struct {
	seal *unsealer
	zip  *zstd.Decoder
	in   *bufio.Reader
	sum  hash.Hash
	max  int64
	got  int64
	err  error // sticks

	header    Header
	registry  Registry
	structure Structure
	trailer   *Trailer

	open *Sum // the table at hand
	rows hash.Hash
	left int // of the record of rows at hand
	sums []Sum
}

// Keys reads the beginning of an archive and returns the ids of the keys that open it; none: it is not encrypted.
func Keys(r io.Reader) ([]string, error) {
	p, err := readPreamble(newUnsealer(r))
	return p.Keys, err
}

// maxPreamble bounds the first line, in bytes: hundreds of key ids.
const maxPreamble = 64 << 10

func readPreamble(u *unsealer) (p preamble, err error) {
	head := make([]byte, len(magic))
	if err := u.raw(head); err != nil || string(head) != magic {
		if err != nil && !fault.Is(err, fault.Unverified) {
			return p, err
		}
		return p, fault.New(fault.Unverified, "this is no archive of oneo").WithCode("no_archive").WithHint("oneo tenant export writes one")
	}
	var line []byte
	for b := []byte{0}; ; line = append(line, b[0]) {
		if err := u.raw(b); err != nil {
			return p, err
		}
		if b[0] == '\n' {
			break
		}
		if len(line) == maxPreamble {
			return p, broken("the archive's first line does not end")
		}
	}
	if err := json.Unmarshal(line, &p); err != nil {
		return p, broken("the archive's first line cannot be read")
	}
	if p.Format < 1 {
		return p, broken("the archive's first line names no format")
	}
	if p.Format > Format {
		return p, fault.New(fault.Conflict, "the archive has format %d, and this oneo reads up to %d", p.Format, Format).WithCode("archive_too_new").
			WithHint("use a newer oneo")
	}
	return p, nil
}

// NewReader reads the beginning of an archive, up to its first table.
func NewReader(r io.Reader, o ReadOptions) (*Reader, error) {
	x := &Reader{seal: newUnsealer(bufio.NewReaderSize(r, pieceSize)), sum: sha256.New(), max: o.MaxBytes}
	p, err := readPreamble(x.seal)
	if err != nil {
		return nil, err
	}
	var inner io.Reader = x.seal
	if len(p.Keys) > 0 {
		if len(o.Identities) == 0 {
			return nil, wrongKey(nil, p.Keys, 0)
		}
		ids := make([]age.Identity, len(o.Identities))
		for i, id := range o.Identities {
			ids[i] = id.age
		}
		inner, err = age.Decrypt(inner, ids...)
		if noMatch(err) {
			return nil, wrongKey(err, p.Keys, len(ids))
		}
		if err != nil {
			return nil, x.fail(err)
		}
	}
	// A window beyond what the writer uses is refused: it would be reserved before anything was read. With one worker all
	// is read by whoever calls Read, so that an error of the layers below is theirs to look at.
	x.zip, err = zstd.NewReader(inner, zstd.WithDecoderMaxWindow(8<<20), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderConcurrency(1))
	if err != nil {
		return nil, x.fail(err)
	}
	x.in = bufio.NewReaderSize(x.zip, pieceSize)
	for _, part := range []struct {
		k kind
		v any
	}{{kindHeader, &x.header}, {kindRegistry, &x.registry}, {kindStructure, &x.structure}} {
		if err := x.record(part.k, part.v); err != nil {
			x.Close()
			return nil, err
		}
	}
	return x, nil
}

// Close frees what reading holds; it does not close the stream below.
func (x *Reader) Close() { x.zip.Close() }

// Header says whose archive it is.
func (x *Reader) Header() Header { return x.header }

// Registry is what the registry knew of the tenant.
func (x *Reader) Registry() Registry { return x.registry }

// Structure is what the tenant had beyond its migrations.
func (x *Reader) Structure() Structure { return x.structure }

// Trailer is what the whole comes to; there only once Next has answered io.EOF.
func (x *Reader) Trailer() (Trailer, error) {
	if x.trailer == nil {
		return Trailer{}, errors.New("archive: it has not been read to its end")
	}
	return *x.trailer, nil
}

// Consumed is how many bytes of the archive have been read so far.
func (x *Reader) Consumed() int64 { return x.seal.read }

// fail makes an error stick. What another layer says of bytes that it cannot understand is damage; what the stream below
// says of itself, a disk or a network that does not answer, is told as it is.
func (x *Reader) fail(err error) error {
	switch {
	case x.err != nil: // the first one
	case x.seal.err != nil && !errors.Is(x.seal.err, io.EOF):
		x.err = x.seal.err
	case fault.Is(err, fault.Unverified), fault.Is(err, fault.TooLarge):
		x.err = err
	default:
		x.err = broken("the archive is damaged before byte %d: %v", x.seal.read, err)
	}
	return x.err
}

// head reads the beginning of the next record.
func (x *Reader) head() (k kind, size uint32, err error) {
	var head [5]byte
	if _, err := io.ReadFull(x.in, head[:]); err != nil {
		return 0, 0, x.fail(err)
	}
	k, size = kind(head[0]), binary.BigEndian.Uint32(head[1:])
	if k != kindTrailer { // which holds the sum of all before it
		x.sum.Write(head[:])
	}
	bound := uint32(MaxRecord)
	if k == kindData {
		bound = maxData
	}
	if size > bound {
		return 0, 0, x.fail(broken("the archive is damaged: a record %q of %d bytes", k, size))
	}
	if x.got += int64(size) + int64(len(head)); x.max > 0 && x.got > x.max {
		return 0, 0, x.fail(fault.New(fault.TooLarge, "the archive comes to more than %d bytes when it is unpacked", x.max).WithCode("archive_too_large").
			WithHint("allow more by --max-size, if you know where it comes from"))
	}
	return k, size, nil
}

// body reads a record that is JSON.
func (x *Reader) body(k kind, size uint32, v any) error {
	// It grows as bytes come, not as the length promises.
	var body bytes.Buffer
	if _, err := io.CopyN(&body, x.in, int64(size)); err != nil {
		return x.fail(err)
	}
	if k != kindTrailer {
		x.sum.Write(body.Bytes())
	}
	if err := json.Unmarshal(body.Bytes(), v); err != nil {
		return x.fail(broken("the archive is damaged: record %q cannot be read", k))
	}
	return nil
}

func (x *Reader) record(want kind, v any) error {
	k, size, err := x.head()
	if err != nil {
		return err
	}
	if k != want {
		return x.fail(broken("the archive is damaged: record %q where %q must be", k, want))
	}
	return x.body(k, size, v)
}

// Next goes to the next table; what is left of the one at hand is read over. io.EOF: that was the last one, and
// everything is as its checksums say.
func (x *Reader) Next() (Table, error) {
	if x.err != nil {
		return Table{}, x.err
	}
	if x.open != nil {
		if _, err := io.Copy(io.Discard, x); err != nil {
			return Table{}, err
		}
	}
	k, size, err := x.head()
	if err != nil {
		return Table{}, err
	}
	switch k {
	case kindTable:
		var t Table
		if err := x.body(k, size, &t); err != nil {
			return Table{}, err
		}
		if len(x.sums) == maxTables {
			return Table{}, x.fail(broken("the archive has more than %d tables", maxTables))
		}
		x.open, x.rows = &Sum{Table: t.Name}, sha256.New()
		return t, nil
	case kindTrailer:
		return Table{}, x.finish(size)
	default:
		return Table{}, x.fail(broken("the archive is damaged: record %q between tables", k))
	}
}

// Read gives rows of the table at hand, as COPY writes them in its text format. io.EOF: that was all, and they are as
// their checksum says.
func (x *Reader) Read(p []byte) (int, error) {
	if x.err != nil {
		return 0, x.err
	}
	if x.open == nil {
		return 0, io.EOF
	}
	for x.left == 0 {
		k, size, err := x.head()
		if err != nil {
			return 0, err
		}
		switch k {
		case kindData:
			x.left = int(size)
		case kindEnd:
			return 0, x.endTable(size)
		default:
			return 0, x.fail(broken("the archive is damaged: record %q among rows", k))
		}
	}
	n, err := io.ReadFull(x.in, p[:min(len(p), x.left)])
	x.sum.Write(p[:n])
	x.rows.Write(p[:n])
	x.left -= n
	x.open.Bytes += int64(n)
	if err != nil {
		return n, x.fail(err)
	}
	return n, nil
}

// endTable compares the table's rows with what they must come to.
func (x *Reader) endTable(size uint32) error {
	var want Sum
	if err := x.body(kindEnd, size, &want); err != nil {
		return err
	}
	have := *x.open
	have.Rows, have.SHA256 = want.Rows, x.rows.Sum(nil)
	if !same(want, have) {
		return x.fail(broken("the archive is damaged: the rows of %s are not those that were written", have.Table))
	}
	x.sums, x.open = append(x.sums, want), nil
	return io.EOF
}

func same(a, b Sum) bool {
	return a.Table == b.Table && a.Rows == b.Rows && a.Bytes == b.Bytes && bytes.Equal(a.SHA256, b.SHA256)
}

// finish reads the trailer and the end of the stream.
func (x *Reader) finish(size uint32) error {
	want := x.sum.Sum(nil)
	var t Trailer
	if err := x.body(kindTrailer, size, &t); err != nil {
		return err
	}
	whole := bytes.Equal(want, t.SHA256) && len(t.Tables) == len(x.sums) && len(t.Sequences) <= maxTables
	for i := 0; whole && i < len(x.sums); i++ {
		whole = same(t.Tables[i], x.sums[i])
	}
	if !whole {
		return x.fail(broken("the archive is damaged: its trailer does not fit what it holds"))
	}
	switch n, err := io.ReadFull(x.in, make([]byte, 1)); {
	case n > 0:
		return x.fail(broken("the archive goes on behind its trailer"))
	case !errors.Is(err, io.EOF):
		return x.fail(err)
	}
	// The layers in between may stop before the last piece was seen; only the seal knows that all is well.
	if !x.seal.done {
		if n, err := x.seal.Read(make([]byte, 1)); n > 0 {
			return x.fail(broken("the archive goes on behind its trailer"))
		} else if !errors.Is(err, io.EOF) {
			return x.fail(err)
		}
	}
	x.trailer, x.err = &t, io.EOF
	return io.EOF
}
