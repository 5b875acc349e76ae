package backup

import (
	"bytes"
	"cmp"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

const (
	fullFormat = 1
	// fullPrefix begins the names of all objects of full backups: full/<id>/..., of which manifest.json is written last.
	fullPrefix   = "full/"
	fullManifest = "/manifest.json"
	sharedName   = "shared" + archiveSuffix
	// erasedPrefix begins the names of what is noted of erased tenants: erased/<tenant's id>.json.
	erasedPrefix = "erased/"
	// maxFullManifest bounds what is read of a full backup's manifest, in bytes: some hundred thousand tenants.
	maxFullManifest = 256 << 20
	// wholeDatabase stands where a tenant's name would, in what hooks are told and policies say.
	wholeDatabase = "(database)"
)

// Full is what is known of a full backup: the shared tables, and all tenants of one or more groups.
type Full struct {
	Format       int    `json:"format"`
	ID           string `json:"id"`
	Installation string `json:"installation"`
	// Made is the moment of the registry's database, and Ended when the last tenant had been copied.
	Made  time.Time `json:"made"`
	Ended time.Time `json:"ended"`
	// Consistency says what the moments of the groups are to each other: nothing.
	Consistency string `json:"consistency"`
	// Groups begin with main, whose shared tables are there always, and tell of the others in the order of their names.
	Groups []FullGroup `json:"groups"`
	Keys   []string    `json:"keys"` // ids of those that open it; none: it is not encrypted
	Oneo   string      `json:"oneo"`
	Kept   bool        `json:"kept"`
	Reason string      `json:"reason,omitempty"`
}

// perGroup is what Full.Consistency says.
const perGroup = "each group is as it was at its own moment; groups are not consistent with each other"

// FullGroup is what a full backup has of one group's database.
type FullGroup struct {
	Name string `json:"name"`
	// At is the moment as of which all of it was read, by one exported snapshot.
	At       time.Time           `json:"at"`
	Postgres int                 `json:"postgres"`
	Versions map[migrate.Set]int `json:"versions"` // of the shared tables
	Shared   FullObject          `json:"shared"`
	Tenants  []FullTenant        `json:"tenants"`
	LeftOut  []LeftOut           `json:"left_out"`
	// Whole: the group's tenants were to be backed up; otherwise only its shared tables were.
	Whole bool `json:"whole"`
}

// FullObject is one archive of a full backup.
type FullObject struct {
	Name   string    `json:"name"`
	Made   time.Time `json:"made"` // as its header says
	Bytes  int64     `json:"bytes"`
	SHA256 string    `json:"sha256"` // in hex
	Tables int       `json:"tables"`
	Rows   int64     `json:"rows"`
}

// FullTenant is a tenant's archive, an ordinary one.
type FullTenant struct {
	Tenant  string `json:"tenant"` // its id for the outside
	Number  int32  `json:"number"`
	Slug    string `json:"slug"`
	Version int    `json:"version"`
	// Custom is the Sum of the statements for what the tenant has beyond its migrations.
	Custom string `json:"custom,omitempty"`
	FullObject
}

// LeftOut is a tenant of which there is no archive, and why.
type LeftOut struct {
	Tenant string `json:"tenant"`
	Number int32  `json:"number"`
	Slug   string `json:"slug"`
	Code   string `json:"code"`
	Reason string `json:"reason"`
}

// Tenants counts the tenants' archives.
func (f Full) Tenants() (n int) {
	for _, g := range f.Groups {
		n += len(g.Tenants)
	}
	return n
}

// LeftOut lists the tenants of which there is no archive.
func (f Full) LeftOut() (all []LeftOut) {
	for _, g := range f.Groups {
		all = append(all, g.LeftOut...)
	}
	return all
}

// Of names the groups whose tenants are in it.
func (f Full) Of() (names []string) {
	for _, g := range f.Groups {
		if g.Whole {
			names = append(names, g.Name)
		}
	}
	return names
}

// Bytes is the size of all archives.
func (f Full) Bytes() (n int64) {
	for _, m := range f.Archives() {
		n += m.Bytes
	}
	return n
}

// Rows is how many rows all archives have.
func (f Full) Rows() (n int64) {
	for _, m := range f.Archives() {
		n += m.Rows
	}
	return n
}

// Archives are the archives as if each were a backup by itself, those of the shared tables first in each group.
func (f Full) Archives() (all []Manifest) {
	for _, g := range f.Groups {
		all = append(all, f.archive(g, FullTenant{FullObject: g.Shared}))
		for _, t := range g.Tenants {
			all = append(all, f.archive(g, t))
		}
	}
	return all
}

// manifestOf reads the manifest that an archive belongs to.
func (b *Backups) manifestOf(ctx context.Context, m Manifest) (err error) {
	if strings.HasPrefix(m.Name, fullPrefix) {
		_, err = b.readFull(ctx, m.ID)
	} else {
		_, err = b.read(ctx, m.manifestName())
	}
	return err
}

func (f Full) archive(g FullGroup, t FullTenant) Manifest {
	return Manifest{
		Name: t.Name, ID: f.ID, Installation: f.Installation, Tenant: t.Tenant, Slug: t.Slug, Group: g.Name, Made: t.Made, Version: t.Version,
		Postgres: g.Postgres, Custom: t.Custom, Bytes: t.Bytes, SHA256: t.SHA256, Tables: t.Tables, Rows: t.Rows, Keys: f.Keys, Oneo: f.Oneo,
	}
}

// FullOptions say how a full backup is made.
type FullOptions struct {
	Groups []string // whose tenants are backed up; none: all that are configured
	Jobs   int      // tenants at one time; below 1: 1
	Reason string
	Kept   bool
	Actor  string
	// Told is called with how many of the tenants have been copied, by one goroutine at a time; may be nil.
	Told func(done, of int)
}

// CreateFull backs up the shared tables and all tenants of groups, each group as it was at one moment. Structural operations wait for
// each tenant's copy: see transfer.Moments. A tenant that cannot be exported is left out, and the backup says so. Anything
// else that fails, or the death of the process, leaves no backup. warning is what went wrong with the program after it. Faults: Locked
// and Unavailable of the databases; those of the store.
func (b *Backups) CreateFull(ctx context.Context, o FullOptions) (f Full, warning string, err error) {
	if err := checkReason(o.Reason); err != nil {
		return f, "", err
	}
	if len(o.Groups) == 0 {
		o.Groups = b.o.DB.Groups()
	}
	f = Full{Format: fullFormat, ID: randomHex() + randomHex(), Consistency: perGroup, Keys: []string{}, Kept: o.Kept, Reason: o.Reason}
	for _, r := range b.o.To {
		f.Keys = append(f.Keys, r.ID())
	}
	if err := b.markAllErased(ctx); err != nil {
		return f, "", err
	}
	event := hookEvent{Event: "before", Manifest: Manifest{Format: fullFormat, ID: f.ID, Name: fullPrefix + f.ID, Slug: wholeDatabase, Group: strings.Join(o.Groups, ","), Made: time.Now().UTC(), Kept: o.Kept, Reason: o.Reason}}
	if err := b.hook(ctx, "before", b.o.Before, event); ctx.Err() != nil {
		return f, "", ctx.Err()
	} else if err != nil {
		return f, "", fault.Wrap(err, fault.Unfit, "the program before the backup failed; no backup was made").WithCode("hook_failed")
	}
	err = b.o.Transfers.Moments(ctx, o.Groups, f.ID, o.Actor, func(ctx context.Context, ms []*transfer.Moment) error {
		return b.copyAll(ctx, &f, ms, o)
	})
	if err == nil {
		err = failpoint.Hit("full.copied")
	}
	if err == nil { // only now: whoever has lost a moment has nothing
		err = b.putFull(ctx, f)
	}
	event.Event, event.OK, event.Manifest.Bytes, event.Manifest.Rows = "after", err == nil, f.Bytes(), f.Rows()
	if err != nil {
		event.Error = fault.Of(err).Message
	}
	actx := ctx
	if ctx.Err() != nil { // what the first program has stopped must go on
		var cancel context.CancelFunc
		actx, cancel = context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
	}
	if herr := b.hook(actx, "after", b.o.After, event); herr != nil {
		warning = "the program after the backup failed: " + herr.Error()
		b.o.Logger.WarnContext(ctx, "the program after a full backup failed", "backup", f.ID, "error", herr)
	}
	return f, warning, err
}

// copyAll writes the archives of all moments.
func (b *Backups) copyAll(ctx context.Context, f *Full, ms []*transfer.Moment, o FullOptions) error {
	type item struct {
		m *transfer.Moment
		t tenant.Tenant
		g *FullGroup
	}
	var items []item
	f.Made, f.Groups = ms[0].At.UTC(), make([]FullGroup, len(ms))
	for i, m := range ms {
		g := &f.Groups[i]
		*g = FullGroup{Name: m.Group, At: m.At.UTC(), Postgres: m.Postgres, Versions: m.Versions, Tenants: []FullTenant{}, LeftOut: []LeftOut{}, Whole: slices.Contains(o.Groups, m.Group)}
		object, header, _, err := b.writeArchive(ctx, fullPrefix+f.ID+"/"+m.Group+"/"+sharedName, func(w io.Writer, begun func(archive.Header)) (archive.Trailer, error) {
			return m.ExportShared(ctx, w, b.o.To, begun)
		})
		if err != nil {
			return err
		}
		g.Shared, f.Installation, f.Oneo = object, header.Installation, header.Oneo
		for _, t := range m.Missing {
			g.LeftOut = append(g.LeftOut, LeftOut{t.ID, t.Number, t.Slug.String(), "schema_missing", "its schema was not where the registry says"})
		}
		for _, t := range m.Tenants {
			items = append(items, item{m, t, g})
		}
	}
	if err := failpoint.Hit("full.shared"); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	next := make(chan item)
	var workers sync.WaitGroup
	var mu sync.Mutex // over what is noted of each
	done := 0
	for range max(1, o.Jobs) {
		workers.Go(func() {
			for it := range next {
				if ctx.Err() != nil {
					continue
				}
				ft, out, err := b.copyTenant(ctx, f.ID, it.m, it.t)
				mu.Lock()
				switch {
				case err != nil:
					cancel(err)
				case out != nil:
					it.g.LeftOut = append(it.g.LeftOut, *out)
				default:
					it.g.Tenants = append(it.g.Tenants, ft)
				}
				if done++; err == nil && o.Told != nil {
					o.Told(done, len(items))
				}
				mu.Unlock()
			}
		})
	}
	for _, it := range items {
		next <- it
	}
	close(next)
	workers.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	for i := range f.Groups {
		slices.SortFunc(f.Groups[i].Tenants, func(a, b FullTenant) int { return cmp.Compare(a.Number, b.Number) })
		slices.SortFunc(f.Groups[i].LeftOut, func(a, b LeftOut) int { return cmp.Compare(a.Number, b.Number) })
	}
	f.Ended = time.Now().UTC()
	return nil
}

// copyTenant writes one tenant's archive. out: it cannot be exported, which is no reason to have no backup of the others.
func (b *Backups) copyTenant(ctx context.Context, id string, m *transfer.Moment, t tenant.Tenant) (ft FullTenant, out *LeftOut, err error) {
	custom := ""
	object, header, exportErr, err := b.writeArchive(ctx, fullPrefix+id+"/"+m.Group+"/"+t.ID+archiveSuffix, func(w io.Writer, begun func(archive.Header)) (archive.Trailer, error) {
		return m.Export(ctx, t, w, transfer.ExportOptions{To: b.o.To, Begun: begun, Own: func(s archive.Structure) { custom = s.Sum() }})
	})
	switch {
	case err == nil:
		// Only now: an erasure that begins behind this finds the archive.
		ft = FullTenant{Tenant: t.ID, Number: t.Number, Slug: t.Slug.String(), Version: header.Version(), Custom: custom, FullObject: object}
		if err := m.Release(ctx, t); err != nil {
			return ft, nil, err
		}
		return ft, nil, failpoint.Hit("full.tenant")
	case exportErr == nil, ctx.Err() != nil, fault.Is(err, fault.Unavailable), errors.Is(err, failpoint.ErrInjected):
		return ft, nil, err
	}
	b.o.Logger.WarnContext(ctx, "a tenant is not in the full backup", "tenant", t.Slug, "backup", id, "error", err)
	why := fault.Of(err)
	return ft, &LeftOut{t.ID, t.Number, t.Slug.String(), why.StableCode(), why.Message}, m.Release(ctx, t)
}

// writeArchive puts what export writes into the store. exportErr is err where that comes from the export, and not from the store.
func (b *Backups) writeArchive(ctx context.Context, name string, export func(io.Writer, func(archive.Header)) (archive.Trailer, error)) (o FullObject, h archive.Header, exportErr, err error) {
	var into *summed
	err = b.o.Store.Put(ctx, name, func(w io.Writer) error {
		into = &summed{w: w, sum: sha256.New()}
		trailer, err := export(into, func(begun archive.Header) { h = begun })
		o = FullObject{Name: name, Made: h.Made, Rows: trailer.Rows(), Tables: len(trailer.Tables)}
		exportErr = err
		return err
	})
	switch {
	case err == nil:
		o.Bytes, o.SHA256 = into.n, hex.EncodeToString(into.sum.Sum(nil))
		return o, h, nil, nil
	case exportErr == nil || !errors.Is(err, exportErr): // the store's own
		return o, h, nil, b.unwritten(err)
	case into.err != nil: // the export was ended by it
		return o, h, nil, b.unwritten(into.err)
	}
	return o, h, exportErr, exportErr
}

// fullMAC signs manifests of full backups: no other manifest passes for one.
func (b *Backups) fullMAC(manifest []byte) string {
	k := hmac.New(sha256.New, []byte(b.o.Secret))
	k.Write([]byte("oneo full backup manifest"))
	m := hmac.New(sha256.New, k.Sum(nil))
	m.Write(manifest)
	return hex.EncodeToString(m.Sum(nil))
}

// putFull writes the manifest: with it the backup is there. What it names must be, too: a long time may have gone by.
func (b *Backups) putFull(ctx context.Context, f Full) error {
	objects, err := b.o.Store.List(ctx, fullPrefix+f.ID+"/")
	if err != nil {
		return err
	}
	erased, err := b.erased(ctx)
	if err != nil {
		return err
	}
	sizes := map[string]int64{}
	for _, o := range objects {
		sizes[o.Name] = o.Size
	}
	for _, m := range f.Archives() {
		size, there := sizes[m.Name]
		if _, since := erased[m.Tenant]; since && !there {
			continue
		}
		if size != m.Bytes {
			return fault.New(fault.Unverified, "the store %s has not kept %s as it was written", b.o.Store, m.Name).WithCode("backup_damaged").WithHint("run the command again")
		}
	}
	return b.signFull(ctx, f)
}

func (b *Backups) signFull(ctx context.Context, f Full) error {
	body, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	text, err := json.Marshal(signed{Manifest: body, MAC: b.fullMAC(body)})
	if err != nil {
		return fmt.Errorf("write the manifest: %w", err)
	}
	err = b.o.Store.Put(ctx, fullPrefix+f.ID+fullManifest, func(w io.Writer) error {
		_, err := w.Write(append(text, '\n'))
		return err
	})
	if err != nil {
		return b.unwritten(err)
	}
	return nil
}

// readFull reads the manifest of a full backup. Unverified: it was not written by this installation, or not for this place.
func (b *Backups) readFull(ctx context.Context, id string) (f Full, err error) {
	name := fullPrefix + id + fullManifest
	in, err := b.o.Store.Get(ctx, name)
	if err != nil {
		return f, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxFullManifest+1))
	if err != nil {
		return f, fault.Wrap(err, fault.Unavailable, "the store %s cannot be read", b.o.Store).WithCode("store_unreachable")
	}
	bad := func(why string) error {
		return fault.New(fault.Unverified, "the manifest %s %s", name, why).WithCode("manifest_unverified").
			WithHint("server.secret must be the one of the installation that was backed up")
	}
	var s signed
	if len(text) > maxFullManifest || json.Unmarshal(text, &s) != nil {
		return f, bad("cannot be read")
	}
	if !hmac.Equal([]byte(b.fullMAC(bytes.TrimSpace(s.Manifest))), []byte(s.MAC)) {
		return f, bad("was not signed with this installation's server.secret, or was changed since")
	}
	if err := json.Unmarshal(s.Manifest, &f); err != nil {
		return f, bad("cannot be read")
	}
	if f.Format > fullFormat {
		return f, fault.New(fault.Conflict, "the manifest %s has format %d, and this oneo reads up to %d", name, f.Format, fullFormat).WithCode("manifest_too_new").WithHint("use a newer oneo")
	}
	if f.ID != id {
		return f, bad("is that of another backup: " + f.ID)
	}
	return f, nil
}

// FullCatalogue is what a store holds of full backups.
type FullCatalogue struct {
	Backups []Full // in the order in which they were made
	Bad     []Bad
	// Loose are objects without a manifest: of backups that were interrupted, or are being made.
	Loose []store.Object

	newest time.Time // the youngest object, by the store's clock
}

var fullForm = regexp.MustCompile(`^full/([0-9a-f]{16})/(.+)$`)

// ListFull reads what full backups there are.
func (b *Backups) ListFull(ctx context.Context) (c FullCatalogue, err error) {
	objects, err := b.o.Store.List(ctx, fullPrefix)
	if err != nil {
		return c, err
	}
	by := map[string][]store.Object{}
	for _, o := range objects {
		if o.Modified.After(c.newest) {
			c.newest = o.Modified
		}
		if parts := fullForm.FindStringSubmatch(o.Name); parts != nil {
			by[parts[1]] = append(by[parts[1]], o)
		}
	}
	for id, all := range by {
		f, err := b.readFull(ctx, id)
		switch {
		case fault.Is(err, fault.NotFound):
			c.Loose = append(c.Loose, all...)
		case fault.Is(err, fault.Unverified), fault.Is(err, fault.Conflict):
			c.Bad = append(c.Bad, Bad{fullPrefix + id + fullManifest, err})
		case err != nil:
			return c, err
		default:
			c.Backups = append(c.Backups, f)
		}
	}
	slices.SortFunc(c.Backups, Full.compare)
	slices.SortFunc(c.Bad, func(a, b Bad) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(c.Loose, func(a, b store.Object) int { return strings.Compare(a.Name, b.Name) })
	return c, nil
}

func (f Full) compare(o Full) int { return cmp.Or(f.Made.Compare(o.Made), strings.Compare(f.ID, o.ID)) }

// FindFull reads the full backup of an id, or the only one whose id begins so. NotFound: there is none.
func (b *Backups) FindFull(ctx context.Context, id string) (f Full, err error) {
	none := fault.New(fault.NotFound, "there is no full backup %s", id).WithCode("backup_not_found").WithHint("oneo backup list --database")
	if !IsID(id) {
		return f, none
	}
	objects, err := b.o.Store.List(ctx, fullPrefix+id)
	if err != nil {
		return f, err
	}
	var found []string
	for _, o := range objects {
		if parts := fullForm.FindStringSubmatch(o.Name); parts != nil && fullPrefix+parts[1]+fullManifest == o.Name {
			found = append(found, parts[1])
		}
	}
	switch len(found) {
	case 0:
		return f, none
	case 1:
		return b.readFull(ctx, found[0])
	}
	return f, fault.New(fault.Invalid, "the ids of %d full backups begin with %s", len(found), id).WithCode("ambiguous_backup").WithHint("oneo backup list --database; give more of the id")
}

// VerifyFull proves each archive of a full backup as Verify does, or with checksums as Checksum does, and that it begins with the registry and has
// each tenant once. Archives of tenants that were erased since may be gone. The first fault comes back, with all others.
func (b *Backups) VerifyFull(ctx context.Context, f Full, jobs int, checksums bool, identities []archive.Identity) error {
	if err := f.whole(); err != nil {
		return err
	}
	erased, err := b.erased(ctx)
	if err != nil {
		return err
	}
	archives := f.Archives()
	errs := make([]error, len(archives))
	each(ctx, len(archives), jobs, func(i int) {
		m := archives[i]
		if checksums {
			errs[i] = b.Checksum(ctx, m)
		} else {
			errs[i] = b.Verify(ctx, m, identities)
		}
		var of *fault.Fault
		if _, is := erased[m.Tenant]; is && errors.As(errs[i], &of) && of.Code == "archive_missing" {
			errs[i] = nil
		}
	})
	return errors.Join(append(errs, ctx.Err())...)
}

// each calls do for 0 to n-1, some at one time, until ctx ends.
func each(ctx context.Context, n, jobs int, do func(int)) {
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(max(1, jobs), n) {
		workers.Go(func() {
			for i := range next {
				if ctx.Err() == nil {
					do(i)
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	workers.Wait()
}

// KeepFull is Keep for a full backup.
func (b *Backups) KeepFull(ctx context.Context, id string, kept bool, reason string) (f Full, err error) {
	if err := checkReason(reason); err != nil {
		return f, err
	}
	err = b.alone(ctx, func(func() error) error {
		if f, err = b.FindFull(ctx, id); err != nil {
			return err
		}
		if f.Kept == kept && reason == "" {
			return nil
		}
		if f.Kept = kept; reason != "" {
			f.Reason = reason
		}
		return b.signFull(ctx, f)
	})
	return f, err
}

// FullPlan is what PruneFull would do.
type FullPlan struct {
	Keep, Remove []Full
	Loose        []store.Object // of backups that were interrupted long ago
	Bad          []Bad          // are left alone
}

// PlanFull says which full backups a policy does not keep. Those of the same groups are judged together, each as one whole.
func (b *Backups) PlanFull(ctx context.Context, p Policy) (plan FullPlan, err error) {
	c, err := b.ListFull(ctx)
	if err != nil {
		return plan, err
	}
	plan.Bad = c.Bad
	by := map[string]Full{}
	var ms []Manifest
	for _, f := range c.Backups {
		by[f.ID] = f
		ms = append(ms, Manifest{ID: f.ID, Tenant: strings.Join(f.Of(), ","), Slug: wholeDatabase, Made: f.Made, Kept: f.Kept})
	}
	for _, v := range p.Apply(ms, b.o.KeepMin, time.Now()) {
		if v.Keep {
			plan.Keep = append(plan.Keep, by[v.ID])
		} else {
			plan.Remove = append(plan.Remove, by[v.ID])
		}
	}
	// As old as the youngest of its objects, by the store's own clock: one that is being made goes on writing.
	young := map[string]bool{}
	for _, o := range c.Loose {
		if c.newest.Sub(o.Modified) <= looseFor {
			young[fullForm.FindStringSubmatch(o.Name)[1]] = true
		}
	}
	for _, o := range c.Loose {
		if !young[fullForm.FindStringSubmatch(o.Name)[1]] {
			plan.Loose = append(plan.Loose, o)
		}
	}
	return plan, nil
}

// PruneFull takes away what the policy does not keep, as Prune does.
func (b *Backups) PruneFull(ctx context.Context, p Policy, done func(Full)) (plan FullPlan, err error) {
	err = b.alone(ctx, func(still func() error) error {
		if plan, err = b.PlanFull(ctx, p); err != nil {
			return err
		}
		for _, f := range plan.Remove {
			if err := still(); err != nil {
				return err
			}
			// Without its manifest it is no backup any more, also if archives stay behind.
			if err := b.o.Store.Delete(ctx, fullPrefix+f.ID+fullManifest); err != nil {
				return err
			}
			objects, err := b.o.Store.List(ctx, fullPrefix+f.ID+"/")
			if err != nil {
				return err
			}
			for _, o := range objects {
				if err := b.o.Store.Delete(ctx, o.Name); err != nil {
					return err
				}
			}
			done(f)
		}
		for _, o := range plan.Loose {
			if err := b.o.Store.Delete(ctx, o.Name); err != nil {
				return err
			}
		}
		return b.o.Store.Sweep(ctx, fullPrefix, looseFor)
	})
	return plan, err
}

// main is the group that has the registry.
func (f Full) main() (FullGroup, error) {
	if len(f.Groups) == 0 || f.Groups[0].Name != postgres.MainGroup {
		return FullGroup{}, fault.New(fault.Unverified, "the manifest of the full backup %s does not begin with the registry", f.ID).WithCode("backup_damaged")
	}
	return f.Groups[0], nil
}

// whole refuses what no full backup is: one that does not begin with the registry, or that has a group or a tenant twice, or another backup's objects.
func (f Full) whole() error {
	if _, err := f.main(); err != nil {
		return err
	}
	bad := func(what string) error {
		return fault.New(fault.Unverified, "the manifest of the full backup %s %s", f.ID, what).WithCode("backup_damaged")
	}
	groups, tenants := map[string]bool{}, map[string]bool{}
	for _, g := range f.Groups {
		if groups[g.Name] {
			return bad("has the group " + g.Name + " twice")
		}
		groups[g.Name] = true
	}
	for _, m := range f.Archives() {
		switch {
		case !strings.HasPrefix(m.Name, fullPrefix+f.ID+"/"+m.Group+"/"):
			return bad("has the object of another one: " + m.Name)
		case m.Tenant != "" && tenants[m.Tenant]:
			return bad("has the tenant " + m.Slug + " twice")
		}
		tenants[m.Tenant] = true
	}
	return nil
}
