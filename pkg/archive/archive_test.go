package archive_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"filippo.io/age"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// content is everything that an archive holds, for comparison.
type content struct {
	Header    archive.Header
	Registry  archive.Registry
	Structure archive.Structure
	Tables    []archive.Table
	Rows      [][]byte
	Counts    []int64
	Sequences []archive.Sequence
}

func sample() content {
	many := &bytes.Buffer{}
	for i := range 8_000 {
		fmt.Fprintf(many, "%d\tname %d\t\\N\t{\"n\": %d}\n", i, i*7919%20011, i)
	}
	return content{
		Header: archive.Header{
			Made: time.Date(2026, 11, 25, 18, 0, 0, 0, time.UTC), Oneo: "1.2.3", Installation: "00c0ffee", Tenant: "6b0a2a5e-0000-4000-8000-000000000001",
			Number: 7, Slug: "acme", Schema: "acme", Group: "main", Postgres: 150018, Fingerprint: "abc",
			Migrations: []archive.Migration{{Version: 1, Name: "people", Checksum: []byte{1, 2}}, {Version: 2, Name: "pipelines", Checksum: []byte{3}}},
		},
		Registry:  archive.Registry{Name: "Acme & Söhne", State: "active", Settings: json.RawMessage(`{"a":1}`), Domains: []archive.Domain{{Host: "acme.example", Primary: true}}},
		Structure: archive.Structure{Custom: []archive.Statement{{Object: "table notes", SQL: "create table notes (id integer)"}}},
		Tables:    []archive.Table{{Name: "empty", Columns: []string{"id"}}, {Name: `quoted "name"`, Columns: []string{"id", "ä b", "c", "d"}}, {Name: "none"}},
		Rows:      [][]byte{nil, many.Bytes(), []byte("\n\n")},
		Counts:    []int64{0, 8_000, 2},
		Sequences: []archive.Sequence{{Name: "records_id_seq", Last: 9_000_000_000, Called: true}},
	}
}

// write makes the archive of c.
func write(t require.TestingT, w io.Writer, c content, to ...archive.Recipient) archive.Trailer {
	x, err := archive.NewWriter(w, c.Header, to...)
	require.NoError(t, err)
	require.NoError(t, x.Registry(c.Registry))
	require.NoError(t, x.Structure(c.Structure))
	for i, table := range c.Tables {
		rows, err := x.Table(table)
		require.NoError(t, err)
		_, err = io.Copy(rows, iotest.HalfReader(bytes.NewReader(c.Rows[i])))
		require.NoError(t, err)
		require.NoError(t, x.EndTable(c.Counts[i]))
	}
	trailer, err := x.Close(c.Sequences)
	require.NoError(t, err)
	return trailer
}

func bytesOf(t require.TestingT, c content, to ...archive.Recipient) []byte {
	var b bytes.Buffer
	write(t, &b, c, to...)
	return b.Bytes()
}

// read reads all of an archive. What it returns with an error is nothing.
func read(r io.Reader, o archive.ReadOptions) (c content, trailer archive.Trailer, err error) {
	x, err := archive.NewReader(r, o)
	if err != nil {
		return content{}, archive.Trailer{}, err
	}
	defer x.Close()
	c = content{Header: x.Header(), Registry: x.Registry(), Structure: x.Structure()}
	for {
		table, err := x.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return content{}, archive.Trailer{}, err
		}
		rows, err := io.ReadAll(x)
		if err != nil {
			return content{}, archive.Trailer{}, err
		}
		if len(rows) == 0 {
			rows = nil
		}
		c.Tables, c.Rows = append(c.Tables, table), append(c.Rows, rows)
	}
	trailer, err = x.Trailer()
	if err != nil {
		return content{}, archive.Trailer{}, err
	}
	for _, s := range trailer.Tables {
		c.Counts = append(c.Counts, s.Rows)
	}
	c.Sequences = trailer.Sequences
	return c, trailer, nil
}

func TestRoundTrip(t *testing.T) {
	t.Parallel()
	pair, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	recipient, err := archive.ParseRecipient(pair.Recipient().String())
	require.NoError(t, err)
	other, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	second, err := archive.ParseRecipient(other.Recipient().String())
	require.NoError(t, err)
	identities, err := archive.ParseIdentities("# made by age-keygen\n\n" + pair.String() + "\n")
	require.NoError(t, err)
	for name, to := range map[string][]archive.Recipient{"plain": nil, "encrypted": {recipient}, "encrypted to two": {second, recipient}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			want := sample()
			var b bytes.Buffer
			wrote := write(t, &b, want, to...)
			have, trailer, err := read(iotest.OneByteReader(bytes.NewReader(b.Bytes())), archive.ReadOptions{Identities: identities})
			require.NoError(t, err)
			require.Equal(t, want, have)
			require.Equal(t, wrote, trailer)
			require.Equal(t, int64(8_002), trailer.Rows())
			require.Equal(t, int64(len(want.Rows[1])+2), trailer.Bytes())
			sum := sha256.Sum256(want.Rows[1])
			require.Equal(t, sum[:], trailer.Tables[1].SHA256)
			if len(to) > 0 {
				require.NotContains(t, b.String(), "acme", "what is encrypted tells nothing of the tenant")
			}
			keys, err := archive.Keys(bytes.NewReader(b.Bytes()))
			require.NoError(t, err)
			require.Len(t, keys, len(to))
			if len(to) > 0 {
				require.Contains(t, keys, archive.KeyID(pair.Recipient().String()))
			}
			require.Less(t, b.Len(), len(want.Rows[1])/2, "it is compressed")
		})
	}
}

func TestKeys(t *testing.T) {
	t.Parallel()
	one, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	two, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	to, err := archive.ParseRecipient(" " + one.Recipient().String() + "\n")
	require.NoError(t, err)
	encrypted := bytesOf(t, sample(), to)
	_, _, err = read(bytes.NewReader(encrypted), archive.ReadOptions{})
	require.True(t, fault.Is(err, fault.WrongKey), "%v", err)
	require.ErrorContains(t, err, archive.KeyID(one.Recipient().String()))
	wrong, err := archive.ParseIdentities(two.String())
	require.NoError(t, err)
	_, _, err = read(bytes.NewReader(encrypted), archive.ReadOptions{Identities: wrong})
	require.True(t, fault.Is(err, fault.WrongKey), "%v", err)

	pass, err := archive.PassphraseRecipient("correct horse")
	require.NoError(t, err)
	encrypted = bytesOf(t, sample(), pass)
	keys, err := archive.Keys(bytes.NewReader(encrypted))
	require.NoError(t, err)
	require.Equal(t, []string{archive.PassphraseKey}, keys)
	for word, ok := range map[string]bool{"correct horse": true, "wrong horse": false} {
		id, err := archive.PassphraseIdentity(word)
		require.NoError(t, err)
		c, _, err := read(bytes.NewReader(encrypted), archive.ReadOptions{Identities: []archive.Identity{id}})
		if ok {
			require.NoError(t, err)
			require.Equal(t, sample(), c)
		} else {
			require.True(t, fault.Is(err, fault.WrongKey), "%v", err)
		}
	}
	_, err = archive.NewWriter(io.Discard, archive.Header{}, pass, to)
	require.ErrorContains(t, err, "cannot be combined")
	for _, bad := range []string{"", "age1", "AGE-SECRET-KEY-1", one.String()} {
		_, err := archive.ParseRecipient(bad)
		require.True(t, fault.Is(err, fault.Invalid), "%v", err)
	}
	for _, bad := range []string{"", "# nothing", one.Recipient().String(), one.String() + "x"} {
		_, err := archive.ParseIdentities(bad)
		require.True(t, fault.Is(err, fault.Invalid), "%v", err)
		require.NotContains(t, err.Error(), "AGE-SECRET")
	}
}

// Whatever is cut off is missed, wherever the cut is.
func TestTruncated(t *testing.T) {
	t.Parallel()
	pair, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	to, err := archive.ParseRecipient(pair.Recipient().String())
	require.NoError(t, err)
	ids, err := archive.ParseIdentities(pair.String())
	require.NoError(t, err)
	for name, whole := range map[string][]byte{"plain": bytesOf(t, sample()), "encrypted": bytesOf(t, sample(), to)} {
		cuts := []int{0, 1, 12, 13, 20, len(whole) - 1, len(whole) - 32, len(whole) - 33, len(whole) - 36}
		for at := 4096; at < len(whole); at += 4096 {
			cuts = append(cuts, at)
		}
		require.Greater(t, len(cuts), 20)
		for _, at := range cuts {
			c, _, err := read(bytes.NewReader(whole[:at]), archive.ReadOptions{Identities: ids})
			require.True(t, fault.Is(err, fault.Unverified), "%s, cut at %d of %d: %v", name, at, len(whole), err)
			require.Zero(t, c)
		}
		for _, more := range []string{"x", string(whole), strings.Repeat("\x00", 100_000)} {
			_, _, err := read(strings.NewReader(string(whole)+more), archive.ReadOptions{Identities: ids})
			require.True(t, fault.Is(err, fault.Unverified), "%s: %v", name, err)
		}
	}
}

// Whatever bit is another, it is found: also those that neither compression nor encryption look at.
func TestFlippedBits(t *testing.T) {
	t.Parallel()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	pair, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	to, err := archive.ParseRecipient(pair.Recipient().String())
	require.NoError(t, err)
	ids, err := archive.ParseIdentities(pair.String())
	require.NoError(t, err)
	for name, whole := range map[string][]byte{"plain": bytesOf(t, sample()), "encrypted": bytesOf(t, sample(), to)} {
		flip := func(bit int) {
			whole[bit/8] ^= 1 << (bit % 8)
			c, _, err := read(bytes.NewReader(whole), archive.ReadOptions{Identities: ids})
			whole[bit/8] ^= 1 << (bit % 8)
			require.Error(t, err, "%s: bit %d", name, bit)
			require.Zero(t, c)
		}
		for bit := range 8 * 150 { // the beginning, where the layers say how they are to be read
			flip(bit)
		}
		for range 1000 {
			flip(random.IntN(len(whole) * 8))
		}
		_, _, err := read(bytes.NewReader(whole), archive.ReadOptions{Identities: ids})
		require.NoError(t, err)
	}
}

// A stream that fails is not called a damaged archive: another copy would not help.
func TestStreamThatFails(t *testing.T) {
	t.Parallel()
	whole := bytesOf(t, sample())
	gone := errors.New("connection reset")
	for _, at := range []int{5, 100, len(whole) / 2, len(whole) - 3} {
		_, _, err := read(io.MultiReader(bytes.NewReader(whole[:at]), iotest.ErrReader(gone)), archive.ReadOptions{})
		require.ErrorIs(t, err, gone)
		require.False(t, fault.Is(err, fault.Unverified))
	}
}

// short is a full disk.
type short struct{ left int }

func (s *short) Write(p []byte) (int, error) {
	n := min(len(p), s.left)
	s.left -= n
	if n < len(p) {
		return n, errors.New("no space left on device")
	}
	return n, nil
}

// Once a byte could not be written, no Close says that all is well, wherever the disk was full.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	fill := func(w io.Writer) error {
		c := sample()
		x, err := archive.NewWriter(w, c.Header)
		if err != nil {
			return err
		}
		// The errors in between are left alone: the last one counts.
		_ = x.Registry(c.Registry)
		_ = x.Structure(c.Structure)
		for i, table := range c.Tables {
			if rows, err := x.Table(table); err == nil {
				_, _ = rows.Write(c.Rows[i])
			}
			_ = x.EndTable(c.Counts[i])
		}
		_, err = x.Close(c.Sequences)
		return err
	}
	var whole bytes.Buffer
	require.NoError(t, fill(&whole))
	for left := 0; left < whole.Len(); left += 1 + whole.Len()/50 {
		require.ErrorContains(t, fill(&short{left}), "no space left", "after %d bytes", left)
	}
	require.ErrorContains(t, fill(&short{whole.Len() - 1}), "no space left")
	require.NoError(t, fill(&short{whole.Len()}))
}

// What comes to more than is allowed is refused while it is read, and a wrong order of calls makes no archive.
func TestBounds(t *testing.T) {
	t.Parallel()
	c := sample()
	c.Rows[1] = bytes.Repeat([]byte("0\n"), 32<<20) // 64 MiB that compress to next to nothing
	bomb := bytesOf(t, c)
	require.Less(t, len(bomb), 100_000)
	_, _, err := read(bytes.NewReader(bomb), archive.ReadOptions{MaxBytes: 10 << 20})
	require.True(t, fault.Is(err, fault.TooLarge), "%v", err)

	x, err := archive.NewWriter(io.Discard, c.Header)
	require.NoError(t, err)
	_, err = x.Table(archive.Table{Name: "early"})
	require.Error(t, err)
	_, err = x.Close(nil)
	require.Error(t, err)

	later := bytes.Replace(bytesOf(t, sample()), []byte(`{"format":1}`), []byte(`{"format":9}`), 1)
	_, _, err = read(bytes.NewReader(later), archive.ReadOptions{})
	require.ErrorContains(t, err, "format 9")
	_, _, err = read(strings.NewReader("PK\x03\x04 is a zip file"), archive.ReadOptions{})
	require.ErrorContains(t, err, "no archive of oneo")
}

// Any rows, tables and names come back as they were.
func TestRoundTripOfAnything(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		c := content{Header: sample().Header, Registry: archive.Registry{Settings: json.RawMessage(`{}`)}}
		n := rapid.IntRange(0, 5).Draw(t, "tables")
		for i := range n {
			rows := rapid.SliceOfN(rapid.Byte(), -1, 2000).Draw(t, "rows")
			if rapid.Bool().Draw(t, "long") {
				rows = bytes.Repeat(rows, 400)
			}
			if len(rows) == 0 {
				rows = nil
			}
			c.Tables = append(c.Tables, archive.Table{Name: fmt.Sprint(i, rapid.String().Draw(t, "name")), Columns: rapid.SliceOfN(rapid.String(), 1, 4).Draw(t, "columns")})
			c.Rows, c.Counts = append(c.Rows, rows), append(c.Counts, rapid.Int64Min(0).Draw(t, "count"))
		}
		have, _, err := read(bytes.NewReader(bytesOf(t, c)), archive.ReadOptions{})
		require.NoError(t, err)
		require.Equal(t, c, have)
	})
}

// released are the archives of all formats that there ever were, by their names.
func released(t testing.TB) map[string][]byte {
	files, err := filepath.Glob("testdata/v*/*.oneo")
	require.NoError(t, err)
	all := map[string][]byte{}
	for _, name := range files {
		all[filepath.ToSlash(name)], err = os.ReadFile(name)
		require.NoError(t, err)
	}
	return all
}

// Archives of each released format are read for ever. How they were made says TestReleasedArchives in pkg/transfer.
func TestReleased(t *testing.T) {
	t.Parallel()
	all := released(t)
	require.Contains(t, all, "testdata/v1/plain.oneo")
	require.Contains(t, all, "testdata/v1/passphrase.oneo")
	require.Contains(t, all, "testdata/v1/custom.oneo")
	word, err := archive.PassphraseIdentity("correct horse battery staple")
	require.NoError(t, err)
	of := map[string]content{}
	for name, b := range all {
		c, trailer, err := read(bytes.NewReader(b), archive.ReadOptions{Identities: []archive.Identity{word}})
		require.NoError(t, err, name)
		require.Equal(t, "released", c.Header.Slug, name)
		require.Equal(t, 1, c.Header.Version(), name)
		require.GreaterOrEqual(t, trailer.Rows(), int64(9), name)
		of[name] = c
	}
	plain, locked := of["testdata/v1/plain.oneo"], of["testdata/v1/passphrase.oneo"]
	locked.Header.Made = plain.Header.Made
	require.Equal(t, plain, locked)
	require.Empty(t, plain.Structure.Custom)
	require.NotEmpty(t, of["testdata/v1/custom.oneo"].Structure.Custom)
	keys, err := archive.Keys(bytes.NewReader(all["testdata/v1/passphrase.oneo"]))
	require.NoError(t, err)
	require.Equal(t, []string{archive.PassphraseKey}, keys)
}

// The reader stands whatever it is given, and believes only what a writer has written.
func FuzzReader(f *testing.F) {
	small := sample()
	small.Rows[1], small.Counts[1] = []byte("1\ta\n"), 1
	f.Add(bytesOf(f, small))
	f.Add([]byte("oneo archive\n{\"format\":1}\n\x00\x00\x00\x00"))
	for _, b := range released(f) {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, trailer, err := read(bytes.NewReader(b), archive.ReadOptions{MaxBytes: 1 << 20})
		if err != nil {
			return
		}
		again, second, err := read(bytes.NewReader(bytesOf(t, c)), archive.ReadOptions{})
		require.NoError(t, err)
		require.Equal(t, c, again)
		require.Equal(t, trailer.Tables, second.Tables)
	})
}
