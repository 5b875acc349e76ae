package app

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// PhysicalProof is a recovery that was proved.
type PhysicalProof struct {
	Cluster  string
	Target   time.Time
	Backup   string
	Tenants  int
	Rows     int64
	ProvedAt time.Time
	Duration time.Duration
}

// proofsKept is how many proofs of a cluster are remembered.
const proofsKept = 100

// Rehearsed is what became of one tenant of a rehearsed recovery.
type Rehearsed struct {
	Tenant tenant.Tenant
	Rows   int64
	Took   time.Duration
	Err    error
}

// RandomMoment is one of those that can be reached in all clusters.
func (a *App) RandomMoment(ctx context.Context) (time.Time, error) {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return time.Time{}, err
	}
	var common []physical.Window
	for i, k := range clusters {
		info, err := k.Engine.Info(ctx)
		if err != nil {
			return time.Time{}, err
		}
		if info.System == "" {
			return time.Time{}, fault.New(fault.Unavailable, "%s: there is no repository for physical backups in %s", k.Name, k.Where).WithCode(noRepository).WithHint("oneo backup physical setup")
		}
		ws := info.Windows()
		if i == 0 {
			common = ws
			continue
		}
		common = overlaps(common, ws)
	}
	if len(common) == 0 {
		return time.Time{}, fault.New(fault.NotFound, "there is no moment that can be reached").WithCode("no_physical_backup").WithHint("oneo backup physical list")
	}
	// Of the last window, which goes on: where another one ends the last commit may be earlier than its WAL was archived.
	w := common[len(common)-1]
	if d := w.Until.Sub(w.From); d > 0 {
		return w.From.Add(rand.N(d)), nil //nolint:gosec // any moment will do
	}
	return w.From, nil
}

// overlaps are the stretches of time that are in both.
func overlaps(xs, ys []physical.Window) (both []physical.Window) {
	for _, x := range xs {
		for _, y := range ys {
			from, until := x.From, x.Until
			if y.From.After(from) {
				from = y.From
			}
			if y.Until.Before(until) {
				until = y.Until
			}
			if !until.Before(from) {
				both = append(both, physical.Window{From: from, Until: until})
			}
		}
	}
	return both
}

// Rehearse recovers a moment and takes tenants of it as a restore would: those that f selects of then, and of these some that are drawn at
// random; sample 0: all. Each is written into
// an archive, which is restored and compared in the recovered cluster itself: nothing live has any part in it. What was proved is
// remembered if every tenant came back, with the 99 of each cluster before it.
func (a *App) Rehearse(ctx context.Context, o PastOptions, f registry.Filter, sample int, each func(Rehearsed)) (proofs []PhysicalProof, err error) {
	start := time.Now()
	o.Groups = a.DB.Groups()
	past, err := a.Recover(ctx, o)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, past.Close()) }()
	var ts []tenant.Tenant
	if len(f.States) == 0 {
		f.States = []tenant.State{tenant.Active, tenant.Suspended}
	}
	err = past.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		ts, err = registry.List(ctx, tx, f)
		return err
	})
	if err != nil {
		return nil, err
	}
	if sample > 0 && sample < len(ts) {
		rand.Shuffle(len(ts), func(i, j int) { ts[i], ts[j] = ts[j], ts[i] })
		ts = ts[:sample]
		slices.SortFunc(ts, func(x, y tenant.Tenant) int { return int(x.Number) - int(y.Number) })
	}
	byGroup := map[string]*PhysicalProof{}
	for i, c := range past.Clusters {
		proofs = append(proofs, PhysicalProof{Cluster: past.names[i], Target: c.Target.Time, Backup: c.Backup.Label})
	}
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return nil, err
	}
	for _, k := range clusters {
		for i := range proofs {
			for _, g := range k.Groups {
				if proofs[i].Cluster == k.Name {
					byGroup[g] = &proofs[i]
				}
			}
		}
	}
	failed := 0
	for _, t := range ts {
		began := time.Now()
		r := Rehearsed{Tenant: t}
		r.Rows, r.Err = past.try(ctx, t)
		r.Took = time.Since(began)
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		each(r)
		if r.Err != nil {
			failed++
			continue
		}
		if p := byGroup[t.Group]; p != nil {
			p.Tenants, p.Rows = p.Tenants+1, p.Rows+r.Rows
		}
	}
	if failed > 0 {
		return nil, fault.New(fault.Unfit, "%d of %d tenants did not come back", failed, len(ts)).WithCode("tenants_failed")
	}
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		const note = `insert into public.physical_proofs (cluster, target, backup, tenants, rows, duration_ms) values ($1, $2, $3, $4, $5, $6) returning proved_at`
		const forget = `delete from public.physical_proofs where cluster = $1 and proved_at < (select min(proved_at) from (select proved_at from public.physical_proofs where cluster = $1 order by proved_at desc limit $2) newest)`
		for i := range proofs {
			p := &proofs[i]
			p.Duration = time.Since(start)
			if err := tx.QueryRow(ctx, note, p.Cluster, p.Target, p.Backup, p.Tenants, p.Rows, p.Duration.Milliseconds()).Scan(&p.ProvedAt); err != nil {
				return err
			}
			if _, err := tx.Exec(ctx, forget, p.Cluster, proofsKept); err != nil {
				return err
			}
		}
		return nil
	})
	return proofs, err
}

// try takes one tenant as a restore would, and restores it where nobody sees it.
func (p *Past) try(ctx context.Context, t tenant.Tenant) (rows int64, err error) {
	file, custom, written, err := p.Remember(ctx, t, nil)
	if err != nil {
		return 0, err
	}
	defer file.Close()
	back, err := p.Transfers.Try(ctx, t.Group, file, transfer.Loading{Known: custom, Actor: "drill"})
	if err == nil && back.Rows() != written {
		err = fault.New(fault.Unfit, "%d rows were written and %d came back", written, back.Rows()).WithCode("backup_damaged")
	}
	return back.Rows(), err
}

// unnamed is a file beside the recovered cluster that is gone with this process.
func (p *Past) unnamed() (*os.File, error) {
	file, err := os.CreateTemp(p.Clusters[0].Dir(), "*.oneo")
	if err == nil {
		if err = os.Remove(file.Name()); err != nil {
			_ = file.Close()
		}
	}
	return file, err
}

// Remember writes a tenant of the past into an archive, in a file without a name, from its beginning, and tells how it goes. custom
// is the sum of what the tenant has beyond its migrations.
func (p *Past) Remember(ctx context.Context, t tenant.Tenant, progress func(transfer.Progress)) (file *os.File, custom string, rows int64, err error) {
	if file, err = p.unnamed(); err != nil {
		return nil, "", 0, err
	}
	defer func() {
		if err != nil {
			_ = file.Close()
			file = nil
		}
	}()
	trailer, err := p.Transfers.Export(ctx, t, file, transfer.ExportOptions{Own: func(s archive.Structure) { custom = s.Sum() }, Progress: progress})
	if err != nil {
		return file, "", 0, err
	}
	_, err = file.Seek(0, 0)
	return file, custom, trailer.Rows(), err
}

// PhysicalProofs are the last proved recoveries, by the names of clusters.
func (a *App) PhysicalProofs(ctx context.Context) (map[string]PhysicalProof, error) {
	proofs := map[string]PhysicalProof{}
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select distinct on (cluster) cluster, target, backup, tenants, rows, proved_at, duration_ms from public.physical_proofs order by cluster, proved_at desc`)
		if err != nil {
			return err
		}
		var p PhysicalProof
		var took int64
		_, err = pgx.ForEachRow(rows, []any{&p.Cluster, &p.Target, &p.Backup, &p.Tenants, &p.Rows, &p.ProvedAt, &took}, func() error {
			p.Duration = time.Duration(took) * time.Millisecond
			proofs[p.Cluster] = p
			return nil
		})
		return err
	})
	return proofs, err
}
