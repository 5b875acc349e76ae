package archive

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"hash"
	"io"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// The outermost layer: everything in pieces with their lengths before them, an empty one, and the checksum of all bytes
// so far. It finds every changed bit, also one that neither the compression nor the rows would show, and knows where the
// archive ends, so that it can be followed by nothing.

const (
	pieceSize = 64 << 10
	maxPiece  = 1 << 20
)

// sealer writes pieces. What was written before its first piece is told to sum beforehand.
type sealer struct {
	w       io.Writer
	sum     hash.Hash
	buf     []byte
	written int64
}

func newSealer(w io.Writer) *sealer {
	return &sealer{w: w, sum: sha256.New(), buf: make([]byte, 0, pieceSize)}
}

// raw writes bytes that are no piece.
func (s *sealer) raw(p []byte) error {
	s.sum.Write(p)
	n, err := s.w.Write(p)
	s.written += int64(n)
	return err
}

func (s *sealer) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		k := min(len(p), pieceSize-len(s.buf))
		s.buf = append(s.buf, p[:k]...)
		p, n = p[k:], n+k
		if len(s.buf) == pieceSize {
			if err := s.flush(); err != nil {
				return n, err
			}
		}
	}
	return n, nil
}

func (s *sealer) flush() error {
	var length [4]byte
	binary.BigEndian.PutUint32(length[:], uint32(len(s.buf)))
	if err := s.raw(length[:]); err != nil {
		return err
	}
	err := s.raw(s.buf)
	s.buf = s.buf[:0]
	return err
}

// Close writes the last piece, the empty one and the checksum.
func (s *sealer) Close() error {
	if len(s.buf) > 0 {
		if err := s.flush(); err != nil {
			return err
		}
	}
	if err := s.flush(); err != nil {
		return err
	}
	n, err := s.w.Write(s.sum.Sum(nil))
	s.written += int64(n)
	return err
}

// unsealer reads what a sealer wrote. At the end of the last piece it has compared the checksum and seen that nothing
// follows, and answers io.EOF.
type unsealer struct {
	r    io.Reader
	sum  hash.Hash
	read int64
	left int // of the piece
	done bool
	err  error // sticks
}

func newUnsealer(r io.Reader) *unsealer { return &unsealer{r: r, sum: sha256.New()} }

// raw reads exactly len(p) bytes that are no piece.
func (u *unsealer) raw(p []byte) error {
	n, err := io.ReadFull(u.r, p)
	u.read += int64(n)
	u.sum.Write(p[:n])
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return broken("the archive ends after %d bytes, in the middle", u.read)
	}
	return err
}

func (u *unsealer) Read(p []byte) (int, error) {
	if u.err != nil {
		return 0, u.err
	}
	if u.left == 0 {
		if u.err = u.next(); u.err != nil {
			return 0, u.err
		}
	}
	p = p[:min(len(p), u.left)]
	if u.err = u.raw(p); u.err != nil {
		return 0, u.err
	}
	u.left -= len(p)
	return len(p), nil
}

// next begins the next piece; io.EOF behind the last one.
func (u *unsealer) next() error {
	var length [4]byte
	if err := u.raw(length[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(length[:])
	if n > maxPiece {
		return broken("the archive is damaged before byte %d: a piece of %d bytes", u.read, n)
	}
	if n > 0 {
		u.left = int(n)
		return nil
	}
	want := u.sum.Sum(nil)
	have := make([]byte, len(want))
	if err := u.raw(have); err != nil {
		return err
	}
	if !bytes.Equal(want, have) {
		return broken("the archive is damaged: its checksum is another")
	}
	switch n, err := io.ReadFull(u.r, have[:1]); {
	case n > 0:
		return broken("the archive is followed by bytes that do not belong to it")
	case !errors.Is(err, io.EOF):
		return err
	}
	u.done = true
	return io.EOF
}

// broken is what is found wrong with the bytes of an archive.
func broken(format string, args ...any) error {
	return fault.New(fault.Unverified, format, args...).WithCode("archive_damaged").WithHint("take another copy of it, or an older backup; nothing was restored from this one")
}
