// Package backup keeps backups of tenants in a store: it makes them, lists them, proves them and says which of them may
// go. The store is the truth: what is there can be listed and checked without a database.
//
// It promises: a backup is there once its manifest is, and the manifest comes after the archive; a manifest is believed
// only where it stands and with the archive that it was made for, by whoever knows the installation's secret; and
// nothing takes a tenant's newest backups away, or one that is kept.
package backup

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// Options is what Backups need.
type Options struct {
	Store     store.Store
	DB        *postgres.DB
	Transfers *transfer.Transfers
	// Secret is the installation's: manifests are signed with a key that is derived from it.
	Secret string
	// To is whom backups are encrypted to; none: whoever reads the store reads them.
	To []archive.Recipient
	// Identities open backups where they are read.
	Identities []archive.Identity
	// KeepMin is how many of a tenant's newest backups Prune leaves in any case; 0 is 1.
	KeepMin int
	// Before and After are programs with their arguments that are run around each backup; may be empty.
	Before, After []string
	// HookTimeout is when such a program is ended; 0: 10 minutes.
	HookTimeout time.Duration
	// Environ is the environment of these programs, as os.Environ; what configures oneo is taken out of it.
	Environ []string
	Logger  *slog.Logger
}

// Backups is the catalogue of a store. It is safe for concurrent use.
type Backups struct {
	o   Options
	key []byte // of manifests
}

// New checks the options.
func New(o Options) (*Backups, error) {
	if o.Store == nil || o.DB == nil || o.Transfers == nil || o.Logger == nil {
		return nil, errors.New("backup: Store, DB, Transfers and Logger must be given")
	}
	if o.Secret == "" {
		return nil, fault.New(fault.Invalid, "server.secret is not set").WithCode("no_secret").
			WithHint("set ONEO_SERVER_SECRET to the one that `oneo init` was run with: it signs what is known of backups")
	}
	o.KeepMin = max(1, o.KeepMin)
	o.HookTimeout = cmp.Or(o.HookTimeout, 10*time.Minute)
	return &Backups{o: o, key: manifestKey(o.Secret)}, nil
}

// Store is where the backups lie.
func (b *Backups) Store() store.Store { return b.o.Store }

// Ready reports why no backup could be made, as far as the store knows beforehand.
func (b *Backups) Ready(ctx context.Context) error {
	_, err := b.o.Store.List(ctx, "ready/") // nothing is called so
	return err
}

// Identities open the backups, as far as they are known here.
func (b *Backups) Identities() []archive.Identity { return b.o.Identities }

// CreateOptions say how one backup is made.
type CreateOptions struct {
	// Run is what the backup is made for: each run makes one of each tenant, however often it is asked. Nil: none.
	Run uuid.UUID
	// Reason says why, for who lists backups; may be empty.
	Reason string
	// Kept keeps Prune away from it.
	Kept     bool
	Progress func(transfer.Progress)
}

// Made is a backup that was made.
type Made struct {
	Manifest
	// Before: the run had made it already.
	Before bool
	// Warning is what went wrong and did not make it worse; may be empty.
	Warning string
}

// Create backs a tenant up. It holds the tenant's operation lock, and no lock that a request waits for. Faults: those of
// an export, Unavailable where the store cannot be used, TooLarge where it is full, Unfit where the program before it
// failed. When it fails there is no such backup.
func (b *Backups) Create(ctx context.Context, t tenant.Tenant, o CreateOptions) (made Made, err error) {
	mark := markOf(o.Run, t.ID)
	if o.Run != uuid.Nil {
		m, found, err := b.madeFor(ctx, t, mark, o.Run)
		if err != nil || found {
			return Made{Manifest: m, Before: true}, err
		}
	}
	began := time.Now().UTC()
	m := Manifest{
		Format: manifestFormat, ID: mark + randomHex(), Tenant: t.ID, Slug: t.Slug.String(), Group: t.Group,
		Reason: o.Reason, Kept: o.Kept,
	}
	if o.Run != uuid.Nil {
		m.Run = o.Run.String()
	}
	m.Name = t.ID + "/" + began.Format(stamp) + "-" + m.ID + archiveSuffix
	if err := checkReason(o.Reason); err != nil {
		return made, err
	}
	if err := b.hook(ctx, "before", b.o.Before, hookEvent{Event: "before", Manifest: m}); ctx.Err() != nil {
		return made, ctx.Err()
	} else if err != nil {
		return made, fault.Wrap(err, fault.Unfit, "the program before the backup failed; no backup was made").WithCode("hook_failed").WithTenant(m.Slug)
	}
	err = b.write(ctx, t, &m, o.Progress)
	after := hookEvent{Event: "after", OK: err == nil, Manifest: m}
	if err != nil {
		after.Error = fault.Of(err).Message
	}
	made.Manifest = m
	actx := ctx
	if ctx.Err() != nil { // what the first program has stopped must go on
		var cancel context.CancelFunc
		actx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
	}
	if herr := b.hook(actx, "after", b.o.After, after); herr != nil {
		made.Warning = "the program after the backup failed: " + herr.Error()
		b.o.Logger.WarnContext(ctx, "the program after a backup failed", "tenant", m.Slug, "backup", m.ID, "error", herr)
	}
	return made, err
}

// write puts the archive and then its manifest into the store, and completes m.
func (b *Backups) write(ctx context.Context, t tenant.Tenant, m *Manifest, progress func(transfer.Progress)) (err error) {
	var into *summed
	var exportErr error
	defer func() {
		if err != nil && into != nil {
			b.unmake(ctx, *m)
			if gone := b.notErased(ctx, t); fault.Is(gone, fault.Gone) { // which has taken away what was being written
				err = gone
			}
		}
	}()
	err = store.PutAhead(ctx, b.o.Store, m.Name, func(w io.Writer) error { // without its manifest it is nothing
		into = &summed{w: w, sum: sha256.New()}
		if err := failpoint.Hit("backup.begun"); err != nil {
			return err
		}
		trailer, err := b.o.Transfers.Export(ctx, t, into, transfer.ExportOptions{To: b.o.To, Progress: progress, Begun: func(h archive.Header) {
			m.Made, m.Version, m.Postgres, m.Oneo, m.Installation = h.Made, h.Version(), h.Postgres, h.Oneo, h.Installation
			m.Slug, m.Group = h.Slug, h.Group
		}, Own: func(s archive.Structure) { m.Custom = s.Sum() }})
		m.Rows, m.Tables = trailer.Rows(), len(trailer.Tables)
		exportErr = err
		return err
	})
	switch {
	case err == nil:
	case exportErr == nil || !errors.Is(err, exportErr): // the store's own
		return b.unwritten(err)
	case into.err != nil: // the export was ended by it
		return b.unwritten(into.err)
	default:
		return exportErr
	}
	m.Bytes, m.SHA256 = into.n, hex.EncodeToString(into.sum.Sum(nil))
	m.Keys = []string{}
	for _, r := range b.o.To {
		m.Keys = append(m.Keys, r.ID())
	}
	if err := failpoint.Hit("backup.stored"); err != nil {
		return err
	}
	if err := b.put(ctx, *m); err != nil {
		return err
	}
	// An erasure that begins behind this finds the backup; one that has begun may have looked before it was there.
	if err := b.notErased(ctx, t); err != nil {
		return err
	}
	return failpoint.Hit("backup.recorded")
}

// unmake takes away what there may be of a backup that failed, if only because an answer was lost: the manifest first, without
// which it is none. What cannot be taken away is a backup that nobody was told of, or is swept by Prune one day.
func (b *Backups) unmake(ctx context.Context, m Manifest) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	err := b.o.Store.Delete(ctx, m.manifestName())
	if err == nil {
		err = b.o.Store.Delete(ctx, m.Name)
	}
	if err != nil {
		b.o.Logger.WarnContext(ctx, "what a failed backup has left cannot be taken away", "tenant", m.Slug, "backup", m.ID, "error", err)
	}
}

// notErased refuses a tenant that was erased, or is being erased, since its rows were read.
func (b *Backups) notErased(ctx context.Context, t tenant.Tenant) error {
	return b.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		erased, err := provision.Erased(ctx, tx, t.ID)
		if err == nil && erased {
			err = fault.New(fault.Gone, "the tenant was erased while its backup was made; nothing is left of this backup").WithCode("erased").WithTenant(t.Slug.String())
		}
		return err
	})
}

// unwritten is a store that did not take what was written.
func (b *Backups) unwritten(err error) error {
	var f *fault.Fault
	switch {
	case errors.As(err, &f) && f.Code == "store_full":
		return fault.Wrap(err, f.Kind, "%s; nothing is left of this backup, and the others are as they were", f.Message).WithCode(f.Code).
			WithHint("make room: oneo backup prune")
	case f != nil, errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded), errors.Is(err, failpoint.ErrInjected):
		return err
	}
	return fault.Wrap(err, fault.Unavailable, "the store %s cannot be written", b.o.Store).WithCode("store_unreachable")
}

// madeFor finds the backup that a run has made of a tenant.
func (b *Backups) madeFor(ctx context.Context, t tenant.Tenant, mark string, run uuid.UUID) (Manifest, bool, error) {
	objects, err := b.o.Store.List(ctx, t.ID+"/")
	if err != nil {
		return Manifest{}, false, err
	}
	for _, o := range objects {
		if p, ours := parseManifestName(o.Name); !ours || !strings.HasPrefix(p.id, mark) {
			continue
		}
		m, err := b.read(ctx, o.Name)
		if fault.Is(err, fault.NotFound) || fault.Is(err, fault.Unverified) {
			continue // it is no backup
		}
		if err != nil || m.Run == run.String() {
			return m, err == nil, err
		}
	}
	return Manifest{}, false, nil
}

// markOf begins the ids of the backups that a run makes of a tenant.
func markOf(run uuid.UUID, tenantID string) string {
	if run == uuid.Nil {
		return randomHex()
	}
	sum := sha256.Sum256([]byte(run.String() + " " + tenantID))
	return hex.EncodeToString(sum[:4])
}

func randomHex() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // it never fails
	return hex.EncodeToString(b[:])
}

// summed counts and sums what goes by, and remembers why the other side did not take it.
type summed struct {
	w   io.Writer
	sum hash.Hash
	n   int64
	err error
}

func (s *summed) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.sum.Write(p[:n])
	s.n += int64(n)
	if err != nil && s.err == nil {
		s.err = err
	}
	return n, err
}

// maxReason bounds what is written of a reason, in bytes.
const maxReason = 500

func checkReason(reason string) error {
	if len(reason) > maxReason {
		return fault.New(fault.Invalid, "the reason is longer than %d bytes", maxReason).WithCode("long_reason")
	}
	return nil
}

// named says of an error which backup it is about.
func (m Manifest) named(err error) error {
	var f *fault.Fault
	if errors.As(err, &f) && f.Tenant == "" {
		f.Tenant = m.Slug
	}
	if err != nil {
		return fmt.Errorf("backup %s: %w", m.ID, err)
	}
	return nil
}
