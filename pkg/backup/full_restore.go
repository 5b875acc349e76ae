package backup

import (
	"context"
	"encoding/json"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// FullRestore says how a full backup is restored.
type FullRestore struct {
	// Group is the only one whose tenants are restored now; empty: all. The others wait for the same command without it.
	Group string
	Jobs  int // tenants at one time; below 1: 1
	// Erased are ids of erased tenants that are to come back all the same.
	Erased []string
	transfer.Loading
	// Told is called with each tenant that was restored or was not, by one goroutine at a time; may be nil.
	Told func(RestoredTenant)
}

// RestoredTenant is what has become of one tenant of a full backup.
type RestoredTenant struct {
	Slug, Group string
	Rows        int64
	Took        time.Duration
	Err         error
}

// FullRestored is what a restore of a full backup has come to.
type FullRestored struct {
	Tenants []RestoredTenant // that were restored now, or could not be
	// LeftOut and Erased name the tenants that do not come back: there is no archive of them, or they were erased since. They are told by the
	// process that has restored the registry.
	LeftOut, Erased []string
	// Waiting is how many tenants of other groups are still to be restored.
	Waiting int
	// Before: all of it had been restored already.
	Before bool
}

// RestoreFull puts a full backup into an installation that is empty but for what `oneo init` makes: the shared tables in one
// transaction, then tenant by tenant, each in one. No tenant is served before all of it is there. It goes on where an earlier attempt has
// ended, however that was. A tenant that fails is told and does not keep the others. Conflict: the installation is not empty.
func (b *Backups) RestoreFull(ctx context.Context, f Full, o FullRestore) (done FullRestored, err error) {
	waiting, ever, err := b.o.Transfers.Refillables(ctx, f.ID)
	if err != nil {
		return done, err
	}
	for _, w := range waiting {
		if w.Backup != f.ID {
			return done, fault.New(fault.Conflict, "the restore of another full backup, %s, has not ended", w.Backup).WithCode("restore_unfinished").
				WithHint("oneo restore --database %s", w.Backup)
		}
	}
	if o.Group != "" && !slices.Contains(f.Of(), o.Group) {
		return done, fault.New(fault.NotFound, "the full backup %s has no tenants of a group %q", f.ID, o.Group).WithCode("unknown_group").WithHint("its groups are: %s", strings.Join(f.Of(), ", "))
	}
	if !ever {
		if err := b.refillShared(ctx, f, o, &done); err != nil {
			return done, err
		}
		if waiting, _, err = b.o.Transfers.Refillables(ctx, f.ID); err != nil {
			return done, err
		}
	}
	done.Before = ever && len(waiting) == 0
	if err := failpoint.Hit("refill.shared"); err != nil {
		return done, err
	}
	archives := map[string]Manifest{}
	for _, m := range f.Archives() {
		if m.Tenant != "" {
			archives[m.Tenant] = m
		}
	}
	all := len(waiting)
	if o.Group != "" {
		waiting = slices.DeleteFunc(waiting, func(w provision.Refillable) bool { return w.Group != o.Group })
	}
	done.Waiting = all - len(waiting)
	results := make([]RestoredTenant, len(waiting))
	var mu sync.Mutex
	each(ctx, len(waiting), o.Jobs, func(i int) {
		w := waiting[i]
		started := time.Now()
		rows, err := b.refill(ctx, w, archives[w.ID], o)
		results[i] = RestoredTenant{Slug: w.Slug.String(), Group: w.Group, Rows: rows, Took: time.Since(started), Err: err}
		if o.Told != nil {
			mu.Lock()
			o.Told(results[i])
			mu.Unlock()
		}
	})
	done.Tenants = slices.DeleteFunc(results, func(r RestoredTenant) bool { return r.Slug == "" }) // not begun
	return done, ctx.Err()
}

// refillShared restores the shared tables: of the groups first, and at last the registry, by which the restore has begun.
func (b *Backups) refillShared(ctx context.Context, f Full, o FullRestore, done *FullRestored) error {
	main, err := f.main()
	if err != nil {
		return err
	}
	for _, g := range f.Groups {
		if !slices.Contains(b.o.DB.Groups(), g.Name) {
			return fault.New(fault.Invalid, "the backup has tenants of the database group %s, which is not configured", g.Name).WithCode("unknown_group").
				WithHint("set ONEO_DATABASE_GROUPS_%s_URL to an empty database, and run `oneo init`", strings.ToUpper(g.Name))
		}
		if err := b.o.Transfers.FitsShared(g.Versions, f.Oneo); err != nil {
			return err
		}
	}
	if err := b.o.Transfers.VacantRegistry(ctx); err != nil {
		return err
	}
	plan := provision.RefillPlan{Backup: f.ID, Groups: f.Of(), Held: map[string]bool{}, Erased: map[string]time.Time{}, Named: o.Erased, Actor: o.Actor}
	erased, err := b.erased(ctx)
	if err != nil {
		return err
	}
	for _, m := range f.Archives() {
		at, is := erased[m.Tenant]
		switch {
		case m.Tenant == "":
		case is && !slices.Contains(o.Erased, m.Tenant):
			plan.Erased[m.Tenant] = at
			done.Erased = append(done.Erased, m.Slug)
		default:
			plan.Held[m.Tenant] = true
		}
	}
	for _, id := range o.Erased {
		if !plan.Held[id] {
			return fault.New(fault.NotFound, "the full backup %s has no tenant %s", f.ID, id).WithCode("unknown_tenant").WithHint("oneo backup show %s -o json", f.ID)
		}
	}
	for _, l := range f.LeftOut() {
		if at, is := erased[l.Tenant]; is {
			plan.Erased[l.Tenant] = at
		}
	}
	for _, g := range f.Groups[1:] {
		err := b.shared(ctx, f, g, func(in io.Reader) error {
			return b.o.Transfers.RefillLedger(ctx, g.Name, g.numbers(), in, o.Identities)
		})
		if err != nil {
			return err
		}
	}
	return b.shared(ctx, f, main, func(in io.Reader) error {
		left, err := b.o.Transfers.RefillRegistry(ctx, main.numbers(), in, o.Identities, plan)
		for _, t := range left {
			done.LeftOut = append(done.LeftOut, t.Slug.String())
		}
		return err
	})
}

// shared opens the shared tables of a group.
func (b *Backups) shared(ctx context.Context, f Full, g FullGroup, load func(io.Reader) error) error {
	m := f.archive(g, FullTenant{FullObject: g.Shared})
	in, err := b.Open(ctx, m)
	if err != nil {
		return err
	}
	defer in.Close()
	return m.named(load(&until{ctx, in}))
}

// numbers are those of the group's tenants, with an archive or without.
func (g FullGroup) numbers() []int32 {
	all := []int32{}
	for _, t := range g.Tenants {
		all = append(all, t.Number)
	}
	for _, l := range g.LeftOut {
		all = append(all, l.Number)
	}
	return all
}

// refill restores one tenant.
func (b *Backups) refill(ctx context.Context, w provision.Refillable, m Manifest, o FullRestore) (rows int64, err error) {
	if m.Tenant == "" {
		return 0, fault.New(fault.Unverified, "the full backup has no archive of %s", w.Slug).WithCode("backup_damaged").WithTenant(w.Slug.String())
	}
	in, err := b.Open(ctx, m)
	if err != nil {
		return 0, err
	}
	defer in.Close()
	how := o.Loading
	how.Erased, how.Known = "", m.Custom
	if slices.Contains(o.Erased, w.ID) {
		how.Erased = w.ID
	}
	_, trailer, err := b.o.Transfers.Refill(ctx, w, &until{ctx, in}, how)
	if err != nil {
		return 0, err
	}
	if how.Erased != "" { // it is not erased any more, and later backups bring it back like the others
		if err := b.o.Store.Delete(ctx, erasedPrefix+w.ID+manifestSuffix); err != nil {
			return 0, err
		}
	}
	return trailer.Rows(), failpoint.Hit("refill.tenant")
}

// erasedNote is what lies in the store of an erased tenant. It is not signed: whoever forges one keeps a tenant out of a restore, which
// says so, until it is named.
type erasedNote struct {
	Tenant string    `json:"tenant"`
	Slug   string    `json:"slug"`
	At     time.Time `json:"at"`
}

// MarkErased notes that a tenant is erased: RestoreFull leaves it out.
func (b *Backups) MarkErased(ctx context.Context, tenantID, slug string) error {
	if err := checkTenantID(tenantID); err != nil {
		return err
	}
	name := erasedPrefix + tenantID + manifestSuffix
	if in, err := b.o.Store.Get(ctx, name); err == nil { // the first time is when it was
		return in.Close()
	} else if !fault.Is(err, fault.NotFound) {
		return err
	}
	return b.markErased(ctx, erasedNote{tenantID, slug, time.Now().UTC()})
}

// markAllErased notes what the store does not know yet: of tenants that were erased while it was away, or before there was one.
func (b *Backups) markAllErased(ctx context.Context) error {
	known, err := b.erased(ctx)
	if err != nil {
		return err
	}
	var missing []erasedNote
	err = b.o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select tenant::text, slug, erased_at from public.erasures order by tenant`)
		if err != nil {
			return err
		}
		var n erasedNote
		_, err = pgx.ForEachRow(rows, []any{&n.Tenant, &n.Slug, &n.At}, func() error {
			if _, is := known[n.Tenant]; !is {
				missing = append(missing, n)
			}
			return nil
		})
		return err
	})
	for _, n := range missing {
		if err == nil {
			err = b.markErased(ctx, n)
		}
	}
	return err
}

func (b *Backups) markErased(ctx context.Context, n erasedNote) error {
	name := erasedPrefix + n.Tenant + manifestSuffix
	text, err := json.Marshal(n)
	if err != nil {
		return err
	}
	err = b.o.Store.Put(ctx, name, func(w io.Writer) error {
		_, err := w.Write(append(text, '\n'))
		return err
	})
	if err != nil {
		return b.unwritten(err)
	}
	return nil
}

func checkTenantID(id string) error {
	if parsed, err := uuid.Parse(id); err != nil || parsed.String() != id {
		return fault.New(fault.Internal, "%q is no tenant's id: its archives were not erased", id) // the beginning of others' names, perhaps
	}
	return nil
}

// erased are the tenants of which it is noted that they are erased, by their ids, and since when.
func (b *Backups) erased(ctx context.Context) (map[string]time.Time, error) {
	objects, err := b.o.Store.List(ctx, erasedPrefix)
	if err != nil {
		return nil, err
	}
	all := map[string]time.Time{}
	for _, o := range objects {
		id := strings.TrimSuffix(strings.TrimPrefix(o.Name, erasedPrefix), manifestSuffix)
		if all[id], err = b.erasedAt(ctx, o.Name); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// Erased are the tenants of which the store knows that they are erased, by their ids, and since when. It asks no database.
func (b *Backups) Erased(ctx context.Context) (map[string]time.Time, error) { return b.erased(ctx) }

// erasedAt reads when a tenant was erased; of a note that cannot be understood, now: it is there.
func (b *Backups) erasedAt(ctx context.Context, name string) (time.Time, error) {
	in, err := b.o.Store.Get(ctx, name)
	if err != nil {
		return time.Time{}, err
	}
	defer in.Close()
	text, err := io.ReadAll(io.LimitReader(in, maxManifest))
	if err != nil {
		return time.Time{}, fault.Wrap(err, fault.Unavailable, "the store %s cannot be read", b.o.Store).WithCode("store_unreachable")
	}
	var n erasedNote
	if json.Unmarshal(text, &n) != nil || n.At.IsZero() {
		n.At = time.Now()
	}
	return n.At, nil
}

// eraseFromFull destroys a tenant's archives in full backups, and says how many there were.
func (b *Backups) eraseFromFull(ctx context.Context, tenantID string) (n int, err error) {
	objects, err := b.o.Store.List(ctx, fullPrefix)
	if err != nil {
		return 0, err
	}
	for _, o := range objects {
		if !strings.HasSuffix(o.Name, "/"+tenantID+archiveSuffix) {
			continue
		}
		if err := b.o.Store.Delete(ctx, o.Name); err != nil {
			return n, err
		}
		n++
	}
	return n, nil
}
