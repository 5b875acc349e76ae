package archive

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// An archive whose bytes are those that were written, and whose sums are not those of its rows, is not believed: a writer with a
// fault is found like a disk with one.
func TestSumsAreCompared(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]struct{ rows, end, trailer func(*Writer) }{
		"nothing":                  {},
		"checksum of rows":         {rows: func(x *Writer) { x.rows.Write([]byte("x")) }},
		"bytes of rows":            {rows: func(x *Writer) { x.table.Bytes++ }},
		"name":                     {rows: func(x *Writer) { x.table.Table = "other" }},
		"count in the trailer":     {end: func(x *Writer) { x.sums[0].Rows++ }},
		"bytes in the trailer":     {end: func(x *Writer) { x.sums[0].Bytes++ }},
		"name in the trailer":      {end: func(x *Writer) { x.sums[0].Table = "other" }},
		"checksum in the trailer":  {end: func(x *Writer) { x.sums[0].SHA256 = bytes.Repeat([]byte{1}, 32) }},
		"a table too few":          {end: func(x *Writer) { x.sums = nil }},
		"a table too many":         {end: func(x *Writer) { x.sums = append(x.sums, x.sums[0]) }},
		"checksum over everything": {trailer: func(x *Writer) { x.sum.Write([]byte("x")) }},
	} {
		do := func(f func(*Writer), x *Writer) {
			if f != nil {
				f(x)
			}
		}
		var b bytes.Buffer
		x, err := NewWriter(&b, Header{Slug: "acme"})
		require.NoError(t, err)
		require.NoError(t, errors.Join(x.Registry(Registry{Settings: []byte("{}")}), x.Structure(Structure{})))
		rows, err := x.Table(Table{Name: "notes", Columns: []string{"id"}})
		require.NoError(t, err)
		_, err = rows.Write([]byte("1\n2\n"))
		require.NoError(t, err)
		do(spoil.rows, x)
		require.NoError(t, x.EndTable(2))
		do(spoil.end, x)
		do(spoil.trailer, x)
		_, err = x.Close(nil)
		require.NoError(t, err)

		r, err := NewReader(&b, ReadOptions{})
		require.NoError(t, err, name)
		for err == nil {
			_, err = r.Next()
		}
		_, terr := r.Trailer()
		if name == "nothing" {
			require.ErrorIs(t, err, io.EOF)
			require.NoError(t, terr)
		} else {
			require.True(t, fault.Is(err, fault.Unverified), "%s: %v", name, err)
			require.Error(t, terr, name)
		}
		r.Close()
	}
}
