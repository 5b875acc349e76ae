package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

var _ provision.Carrier = (*Transfers)(nil)

// Check refuses a tenant that Carry would refuse, and says about how many bytes of tables it has.
func (x *Transfers) Check(ctx context.Context, t tenant.Tenant, group string) (size int64, err error) {
	err = x.o.DB.OwnerSession(ctx, t.Group, func(ses *postgres.Session) error {
		return ses.Snapshot(ctx, func() error {
			if err := ses.Script(ctx, plain); err != nil {
				return err
			}
			at, err := standing(ctx, ses, t)
			if err != nil {
				return err
			}
			from, err := x.describe(ctx, ses, t, at)
			if err != nil {
				return err
			}
			if err := x.complete(ctx, ses, t.Group, &from); err != nil {
				return err
			}
			tables, err := tablesOf(ctx, ses, at.Name)
			if err != nil {
				return err
			}
			for _, table := range tables {
				size += table.bytes
			}
			return x.fits(ctx, from.header, group)
		})
	})
	return size, named(err, t)
}

// Carry sends a tenant as an archive from its group's database into another group's, without a file, its sessions
// included, and then reads it there once more: every table's rows, the sequences and the structure must be what was sent.
func (x *Transfers) Carry(ctx context.Context, t tenant.Tenant, group string, arrive func(context.Context, provision.Filling) error, told func(provision.MoveProgress)) (done provision.Carried, err error) {
	known, err := x.registryOf(ctx, t)
	if err != nil {
		return done, named(err, t)
	}
	in, out := io.Pipe()
	sent := &summed{form: &archived{w: out}}
	wrote := make(chan error, 1)
	go func() {
		err := x.o.DB.OwnerSession(ctx, t.Group, func(ses *postgres.Session) error {
			_, err := x.export(ctx, ses, t, known, sent, ExportOptions{volatile: true})
			return err
		})
		_ = out.CloseWithError(err) // always nil
		wrote <- err
	}()
	err = x.unload(ctx, in, group, arrive, func(p Progress) { told(moved("copy", p)) })
	if err == nil {
		_, err = io.Copy(io.Discard, in) // the writer is done when it has seen its last byte taken
	}
	_ = in.CloseWithError(errNotLoaded) // always nil
	if werr := <-wrote; err == nil || werr != nil && !errors.Is(werr, errNotLoaded) {
		err = werr
	}
	if err != nil {
		return done, named(err, t)
	}
	if err := x.verify(ctx, t, group, sent, func(p Progress) { told(moved("verify", p)) }); err != nil {
		return done, named(err, t)
	}
	return provision.Carried{Tables: len(sent.trailer.Tables), Rows: sent.trailer.Rows(), Bytes: sent.trailer.Bytes()}, nil
}

var errNotLoaded = errors.New("the other side has given up")

func moved(step string, p Progress) provision.MoveProgress {
	return provision.MoveProgress{Step: step, Table: p.Table, Rows: p.Rows, Bytes: p.Bytes, Total: p.Total}
}

// unload reads an archive of this installation into a group's database.
func (x *Transfers) unload(ctx context.Context, r io.Reader, group string, arrive func(context.Context, provision.Filling) error, tell func(Progress)) error {
	a, err := archive.NewReader(r, archive.ReadOptions{})
	if err != nil {
		return err
	}
	defer a.Close()
	var trailer archive.Trailer
	fill, err := x.filling(ctx, a, group, Loading{CustomDDL: true, ours: true, Progress: tell}, &trailer)
	if err != nil {
		return err
	}
	return arrive(ctx, fill)
}

// summed remembers what an export comes to, and passes it on; with discarded nothing else is made of it.
type summed struct {
	form
	header  archive.Header
	columns map[string][]string // by table, in the order in which they were read
	trailer archive.Trailer
}

func (s *summed) begin(ctx context.Context, from source) error {
	s.header, s.columns = from.header, map[string][]string{}
	return s.form.begin(ctx, from)
}

func (s *summed) table(t table) (io.Writer, string, error) {
	s.columns[t.name] = t.columns
	return s.form.table(t)
}

func (s *summed) end(sequences []archive.Sequence) (t archive.Trailer, err error) {
	s.trailer, err = s.form.end(sequences)
	return s.trailer, err
}

// discarded only sums the rows up, of columns in the order in which another one has read them.
type discarded struct {
	as     *summed
	schema string
	open   *tally
	sums   []archive.Sum
}

func (d *discarded) begin(_ context.Context, from source) error {
	d.schema = from.at.Name
	return nil
}

func (d *discarded) table(t table) (io.Writer, string, error) {
	d.open = newTally(io.Discard, t.name)
	if as := d.as.columns[t.name]; slices.Equal(slices.Sorted(slices.Values(as)), slices.Sorted(slices.Values(t.columns))) {
		t.columns = as
	}
	return d.open, copyOf(d.schema, t.name, t.columns), nil
}

func (d *discarded) endTable(rows int64) error {
	d.sums = append(d.sums, d.open.of(rows))
	return nil
}

func (d *discarded) end(sequences []archive.Sequence) (archive.Trailer, error) {
	return archive.Trailer{Tables: d.sums, Sequences: sequences}, nil
}

func (d *discarded) leave() {}

// verify reads the tenant in the other group's database and compares it with what was sent.
func (x *Transfers) verify(ctx context.Context, t tenant.Tenant, group string, sent *summed, tell func(Progress)) error {
	there := t
	there.Group = group
	have := &summed{form: &discarded{as: sent}}
	err := x.o.DB.OwnerSession(ctx, group, func(ses *postgres.Session) error {
		_, err := x.export(ctx, ses, there, archive.Registry{}, have, ExportOptions{volatile: true, again: true, Progress: tell})
		return err
	})
	if err != nil {
		return err
	}
	differs := func(format string, args ...any) error {
		return fault.New(fault.Unverified, "what has arrived is not what was sent: %s", fmt.Sprintf(format, args...)).WithCode("move_differs").
			WithHint("the tenant goes on where it was; nothing is lost")
	}
	if major(have.header.Postgres) == major(sent.header.Postgres) && have.header.Fingerprint != sent.header.Fingerprint {
		return differs("the structure is another one")
	}
	if have.header.Version() != sent.header.Version() || len(have.header.Migrations) != len(sent.header.Migrations) {
		return differs("the ledger is another one")
	}
	if n, want := len(have.trailer.Tables), len(sent.trailer.Tables); n != want {
		return differs("%d tables, and not %d", n, want)
	}
	for i, s := range sent.trailer.Tables {
		if h := have.trailer.Tables[i]; h.Table != s.Table || h.Rows != s.Rows || h.Bytes != s.Bytes || !bytes.Equal(h.SHA256, s.SHA256) {
			return differs("table %s has %d rows of %d bytes, and not %d of %d, or other ones", s.Table, h.Rows, h.Bytes, s.Rows, s.Bytes)
		}
	}
	if n, want := len(have.trailer.Sequences), len(sent.trailer.Sequences); n != want {
		return differs("%d sequences, and not %d", n, want)
	}
	for i, s := range sent.trailer.Sequences {
		if h := have.trailer.Sequences[i]; h != s {
			return differs("sequence %s stands at %d, and not at %d", s.Name, h.Last, s.Last)
		}
	}
	return nil
}
