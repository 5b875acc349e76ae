package doctor

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

var storeChecks = []Check{
	{Name: "store-reach", Group: Store, About: "the store takes an object, gives it back and takes it away", run: checkStore},
	{Name: "store-clock", Group: Store, About: "the store's clock and this machine's agree", run: checkStoreClock},
	{Name: "store-disk", Group: Store, About: "there is room where backups lie, where that can be known", run: checkStoreDisk},
	{Name: "schedules", Group: Store, About: "scheduled backups are made when their time has come", run: checkSchedules},
	{Name: "backups", Group: Store, About: "every tenant has a backup, as new as its schedules promise", slow: true, run: checkBackups},
	{Name: "proofs", Group: Store, About: "a backup of every tenant was restored in the last 30 days, to prove it", run: checkProofs},
}

func (d *Doctor) noStore(r *report) bool {
	if d.o.Store == nil {
		r.skip("no place for backups is configured (backup.url)")
		return true
	}
	return false
}

// hint is what to do about an error of the store's.
func hint(err error) string {
	if h := fault.Of(err).Hint; h != "" {
		return h
	}
	return "look at backup.url, at its keys, and into the store's own log"
}

func checkStore(ctx context.Context, d *Doctor, r *report) error {
	if d.noStore(r) {
		return nil
	}
	s, err := d.o.Store()
	if err != nil {
		r.found(Fail, "", hint(err), "%s", reason(err))
		return nil
	}
	const prefix = "doctor/"
	text := []byte(rand.Text())
	name := prefix + string(text)
	m := moment{before: d.o.Now(), grain: time.Second}
	err = s.Put(ctx, name, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
	if err != nil {
		r.found(Fail, "", hint(err), "nothing can be written: %s", reason(err))
		return nil
	}
	d.reached = true
	m.after = d.o.Now()
	defer func() { // also when what follows is cut short
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		if err := s.Delete(ctx, name); err != nil {
			r.found(Fail, "", hint(err), "what was written cannot be taken away (%s): %s", name, reason(err))
		}
	}()
	back, err := s.Get(ctx, name)
	if err != nil {
		r.found(Fail, "", hint(err), "what was written cannot be read: %s", reason(err))
		return nil
	}
	defer back.Close()
	if got, err := io.ReadAll(io.LimitReader(back, 100)); err != nil || !bytes.Equal(got, text) {
		r.found(Fail, "", "look into the store's own log", "what was written comes back as something else")
	}
	objects, err := s.List(ctx, prefix)
	if err != nil {
		r.found(Fail, "", hint(err), "the store cannot be listed: %s", reason(err))
		return nil
	}
	for _, o := range objects {
		if o.Name == name {
			m.theirs = o.Modified
			d.stored = &m
		}
	}
	r.ok("%s takes and gives", s)
	return nil
}

func checkStoreClock(ctx context.Context, d *Doctor, r *report) error {
	if d.noStore(r) {
		return nil
	}
	if d.stored == nil { // it is asked for alone, or failed
		var other report
		if err := checkStore(ctx, d, &other); err != nil {
			return err
		}
	}
	if d.stored == nil {
		return fault.New(fault.Unavailable, "the store does not say when an object was written")
	}
	judgeClock(r, "", "the store", *d.stored)
	return nil
}

func checkStoreDisk(_ context.Context, d *Doctor, r *report) error {
	if d.noStore(r) {
		return nil
	}
	path := d.o.Config.Backup.URL
	if strings.Contains(path, "://") {
		r.skip("the store does not say")
		return nil
	}
	of, err := diskOf(path)
	if err != nil {
		r.skip("the folder is not there yet")
		return nil //nolint:nilerr // it is made by the first backup
	}
	judgeDisk(r, "", of, 0, 0)
	return nil
}

func checkSchedules(ctx context.Context, d *Doctor, r *report) error {
	if d.o.Schedules == nil {
		r.skip("there are none (backup.schedules)")
		return nil
	}
	list, err := d.o.Schedules(ctx)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		r.skip("there are none (backup.schedules)")
		return nil
	}
	for _, s := range list {
		if !s.Healthy {
			status := Fail
			if s.State == "new" {
				status = Warn
			}
			r.found(status, "", "oneo backup schedule says when and why; `oneo serve` with database.owner_url makes them", "the schedule %s is %s", s.Name, s.State)
		}
	}
	r.ok("%d schedule(s)", len(list))
	return nil
}

func checkBackups(ctx context.Context, d *Doctor, r *report) error {
	if d.noStore(r) {
		return nil
	}
	b, err := d.o.Backups(ctx)
	if err != nil {
		return err
	}
	if b.Bad > 0 {
		r.found(Fail, "", "oneo backup list says which; oneo backup verify --all proves the others", "%d backup(s) cannot be believed: their manifests are damaged or not of this installation", b.Bad)
	}
	if len(b.Bare) > 0 {
		r.found(Warn, "", "oneo backup create --all-tenants", "%d tenant(s) have no backup: %s", len(b.Bare), some(b.Bare))
	}
	if len(b.Late) > 0 {
		r.found(Fail, "", "oneo backup create --all-tenants; oneo backup schedule --late", "the newest backup of %d tenant(s) is older than promised: %s", len(b.Late), some(b.Late))
	}
	r.ok("%d backup(s)", b.Count)
	return nil
}

// proofAge is how old the last proof may be that a tenant's backup can be restored.
const proofAge = 30 * 24 * time.Hour

func checkProofs(ctx context.Context, d *Doctor, r *report) error {
	if d.noStore(r) {
		return nil
	}
	const old = `select t.slug from public.tenants t left join public.proofs p on p.tenant = t.number cross join (select pg_catalog.now() - $1::interval as at) least
where t.state in ('active', 'suspended') and t.created_at < least.at and (p.proved_at is null or p.proved_at < least.at) order by t.slug`
	return d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, old, proofAge)
		if err != nil {
			return err
		}
		names, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		if len(names) > 0 {
			r.found(Warn, "", "oneo backup drill --all-tenants", "no backup of %d tenant(s) was restored in %d days: nobody knows whether it can be: %s", len(names), int(proofAge.Hours()/24), some(names))
		}
		var last *time.Time
		if err := tx.QueryRow(ctx, `select max(proved_at) from public.proofs`).Scan(&last); err != nil {
			return err
		}
		if last == nil {
			r.ok("no tenant is old enough to want one")
		} else {
			r.ok("the last one on %s", last.UTC().Format(time.DateOnly))
		}
		return nil
	})
}
