package backup

import (
	"context"
	"errors"
	"io"
	"slices"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// Verify reads a backup to its end: every byte is as its manifest says, every record can be decoded, every table's rows
// and the whole come to the sums that were written. Identities open it. Faults: Unverified for what is not so, WrongKey.
func (b *Backups) Verify(ctx context.Context, m Manifest, identities []archive.Identity) error {
	in, err := b.Open(ctx, m)
	if err != nil {
		return err
	}
	defer in.Close()
	a, err := archive.NewReader(&until{ctx, in}, archive.ReadOptions{Identities: identities})
	if err != nil {
		return m.named(b.worse(ctx, m, err))
	}
	defer a.Close()
	if err := m.describes(a.Header()); err != nil {
		return m.named(err)
	}
	for {
		if _, err := a.Next(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return m.named(err)
		}
	}
	trailer, err := a.Trailer()
	if err == nil {
		err = m.comesTo(trailer)
	}
	return m.named(err)
}

// worse says of an archive that cannot be opened whether it is damaged: a changed preamble looks like a wrong key.
func (b *Backups) worse(ctx context.Context, m Manifest, err error) error {
	if !fault.Is(err, fault.WrongKey) {
		return err
	}
	if cerr := b.Checksum(ctx, m); fault.Is(cerr, fault.Unverified) {
		return cerr
	}
	return err
}

// Checksum compares the bytes of a backup with its manifest, and decodes nothing: it needs no key.
func (b *Backups) Checksum(ctx context.Context, m Manifest) error {
	in, err := b.Open(ctx, m)
	if err != nil {
		return err
	}
	defer in.Close()
	_, err = io.Copy(io.Discard, &until{ctx, in})
	return err
}

// Try restores a backup into a schema that nobody sees, in the database of a group, and takes it back: see transfer.Try. Without a group
// it is the tenant's, or main where that is not configured.
func (b *Backups) Try(ctx context.Context, m Manifest, group string, o transfer.Loading) (archive.Trailer, error) {
	if group == "" {
		if group = m.Group; !slices.Contains(b.o.DB.Groups(), group) {
			group = postgres.MainGroup
		}
	}
	in, err := b.Open(ctx, m)
	if err != nil {
		return archive.Trailer{}, err
	}
	defer in.Close()
	o.Known = m.Custom
	trailer, err := b.o.Transfers.Try(ctx, group, &until{ctx, in}, o)
	if err == nil {
		err = m.comesTo(trailer)
	}
	return trailer, m.named(err)
}

// describes refuses an archive that is not the one that the manifest is about, before its rows are read.
func (m Manifest) describes(h archive.Header) error {
	if h.Tenant != m.Tenant || h.Group != m.Group || h.Installation != m.Installation || h.Version() != m.Version || !h.Made.Equal(m.Made) {
		return fault.New(fault.Unverified, "the archive is that of %s from %s, and not the one that was written", h.Slug, h.Made.UTC().Format(stamp)).WithCode("backup_damaged")
	}
	return nil
}

func (m Manifest) comesTo(t archive.Trailer) error {
	if t.Rows() != m.Rows || len(t.Tables) != m.Tables {
		return fault.New(fault.Unverified, "the archive has %d rows in %d tables, and its manifest says %d in %d", t.Rows(), len(t.Tables), m.Rows, m.Tables).WithCode("backup_damaged")
	}
	return nil
}

// until ends reading when ctx ends.
type until struct {
	ctx context.Context
	r   io.Reader
}

func (u *until) Read(p []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(p)
}
