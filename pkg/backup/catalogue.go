package backup

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
)

// Catalogue is what a store holds.
type Catalogue struct {
	// Backups are in the order in which they were made.
	Backups []Manifest
	// Bad are manifests that cannot be believed, or whose archives are gone: nothing is done with them, or to what lies beside them.
	Bad []Bad
	// Loose are archives without a manifest: of backups that were interrupted, or are being made.
	Loose []store.Object

	newest time.Time // when the last one of all objects was written, by the store's clock
}

// Newest are the last backups by the ids of their tenants. One of the future is that only of a tenant that has no other.
func (c Catalogue) Newest() map[string]Manifest {
	newest := map[string]Manifest{}
	now := time.Now()
	for _, m := range c.Backups { // the oldest first
		if _, has := newest[m.Tenant]; !has || !m.future(now) {
			newest[m.Tenant] = m
		}
	}
	return newest
}

// Bad is a manifest that is none.
type Bad struct {
	Name string
	Err  error
}

// readers is how many manifests are read at one time.
const readers = 16

// List reads what there is of a tenant, by its id, or of all tenants: "".
func (b *Backups) List(ctx context.Context, tenantID string) (c Catalogue, err error) {
	objects, err := b.o.Store.List(ctx, prefixOf(tenantID))
	if err != nil {
		return c, err
	}
	archives := map[string]store.Object{}
	var names []string
	for _, o := range objects {
		if o.Modified.After(c.newest) {
			c.newest = o.Modified
		}
		// What has another name is somebody else's.
		if _, ours := parseName(o.Name); ours {
			archives[o.Name] = o
		} else if _, ours := parseManifestName(o.Name); ours {
			names = append(names, o.Name)
		}
	}
	manifests, errs := make([]Manifest, len(names)), make([]error, len(names))
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(readers, len(names)) {
		workers.Go(func() {
			for i := range next {
				if errs[i] = ctx.Err(); errs[i] == nil {
					manifests[i], errs[i] = b.read(ctx, names[i])
				}
			}
		})
	}
	for i := range names {
		next <- i
	}
	close(next)
	workers.Wait()
	for i, err := range errs {
		archived := strings.TrimSuffix(names[i], manifestSuffix) + archiveSuffix
		o, there := archives[archived]
		if !fault.Is(err, fault.NotFound) { // deleted meanwhile
			delete(archives, archived)
		}
		switch {
		case fault.Is(err, fault.NotFound):
		case fault.Is(err, fault.Unverified), fault.Is(err, fault.Conflict):
			c.Bad = append(c.Bad, Bad{names[i], err})
		case err != nil:
			return c, err
		case !there:
			c.Bad = append(c.Bad, Bad{names[i], gone(manifests[i])})
		case o.Size != manifests[i].Bytes:
			c.Bad = append(c.Bad, Bad{names[i], cut(manifests[i], o.Size)})
		default:
			c.Backups = append(c.Backups, manifests[i])
		}
	}
	slices.SortFunc(c.Backups, Manifest.compare)
	for _, o := range archives {
		c.Loose = append(c.Loose, o)
	}
	slices.SortFunc(c.Loose, func(a, b store.Object) int { return strings.Compare(a.Name, b.Name) })
	return c, nil
}

// compare puts older backups before newer ones.
func (m Manifest) compare(o Manifest) int {
	return cmp.Or(m.Made.Compare(o.Made), strings.Compare(m.ID, o.ID))
}

func gone(m Manifest) error {
	return m.named(fault.New(fault.Unverified, "the archive %s is not in the store", m.Name).WithCode("archive_missing"))
}

func cut(m Manifest, size int64) error {
	return m.named(fault.New(fault.Unverified, "the archive %s has %d bytes, and %d were written", m.Name, size, m.Bytes).WithCode("backup_damaged").
		WithHint("take an older backup: oneo backup list -t %s", m.Slug))
}

func prefixOf(tenantID string) string {
	if tenantID == "" {
		return ""
	}
	return tenantID + "/"
}

// minID is how many characters of an id must be given.
const minID = 4

// IsID reports whether a text is an id of a backup or the beginning of one.
func IsID(s string) bool {
	return len(s) >= minID && len(s) <= 16 && strings.Trim(s, "0123456789abcdef") == ""
}

// Find reads the backup of an id, or the only one whose id begins so. NotFound: there is none. Unverified: its manifest
// cannot be believed.
func (b *Backups) Find(ctx context.Context, id string) (m Manifest, err error) {
	none := fault.New(fault.NotFound, "there is no backup %s", id).WithCode("backup_not_found").WithHint("oneo backup list")
	if !IsID(id) {
		return m, none
	}
	objects, err := b.o.Store.List(ctx, "")
	if err != nil {
		return m, err
	}
	sizes := map[string]int64{}
	var found []string
	for _, o := range objects {
		sizes[o.Name] = o.Size
		if p, ours := parseManifestName(o.Name); ours && strings.HasPrefix(p.id, id) {
			found = append(found, o.Name)
		}
	}
	switch len(found) {
	case 0:
		return m, none
	case 1:
	default:
		return m, fault.New(fault.Invalid, "the ids of %d backups begin with %s", len(found), id).WithCode("ambiguous_backup").WithHint("oneo backup list; give more of the id")
	}
	if m, err = b.read(ctx, found[0]); err != nil {
		return m, err
	}
	switch size, there := sizes[m.Name]; {
	case !there:
		return m, gone(m)
	case size != m.Bytes:
		return m, cut(m, size)
	}
	return m, nil
}

// Newest is the last backup of a tenant, as Catalogue says it. NotFound: there is none.
func (b *Backups) Newest(ctx context.Context, tenantID string) (m Manifest, err error) {
	c, err := b.List(ctx, tenantID)
	if err != nil {
		return m, err
	}
	m, has := c.Newest()[tenantID]
	if !has {
		return m, fault.New(fault.NotFound, "there is no backup of this tenant").WithCode("backup_not_found").WithHint("oneo backup create -t NAME")
	}
	return m, nil
}

// Open reads the archive of a backup. NotFound: it was pruned since. What is not as its manifest says is a fault of the kind Unverified instead of io.EOF: what
// was read before that must not be believed.
func (b *Backups) Open(ctx context.Context, m Manifest) (io.ReadCloser, error) {
	in, err := b.o.Store.Get(ctx, m.Name)
	if fault.Is(err, fault.NotFound) {
		if err := b.manifestOf(ctx, m); fault.Is(err, fault.NotFound) {
			return nil, fault.New(fault.NotFound, "the backup %s was taken away meanwhile", m.ID).WithCode("backup_not_found").WithHint("oneo backup list")
		}
		return nil, gone(m)
	}
	if err != nil {
		return nil, err
	}
	return &checked{b: b, in: in, m: m, sum: sha256.New()}, nil
}

// checked compares an archive with its manifest while it is read.
type checked struct {
	b   *Backups
	in  io.ReadCloser
	m   Manifest
	sum hash.Hash
	n   int64
}

func (c *checked) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	c.sum.Write(p[:n])
	if c.n += int64(n); c.n > c.m.Bytes {
		return 0, c.other()
	}
	switch {
	case err == nil:
	case errors.Is(err, io.EOF):
		if c.n != c.m.Bytes || hex.EncodeToString(c.sum.Sum(nil)) != c.m.SHA256 {
			return 0, c.other()
		}
	default:
		return n, fault.Wrap(err, fault.Unavailable, "the store %s cannot be read", c.b.o.Store).WithCode("store_unreachable")
	}
	return n, err
}

func (c *checked) other() error {
	return fault.New(fault.Unverified, "the archive of the backup %s is not the one that was written: it was damaged, or swapped", c.m.ID).WithCode("backup_damaged").
		WithTenant(c.m.Slug).WithHint("take an older backup: oneo backup list -t %s; nothing was restored from this one", c.m.Slug)
}

func (c *checked) Close() error { return c.in.Close() }
