package doctor

import (
	"context"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/physical"
)

var physicalChecks = []Check{
	{Name: "physical-archiving", Group: Store, About: "the clusters archive their WAL, as backup.physical.engine promises", run: checkArchiving},
	{Name: "physical-backups", Group: Store, About: "any moment since the last physical backup can be had back", run: checkPhysical},
	{Name: "physical-proofs", Group: Store, About: "a recovery of every cluster was proved in the last 30 days", run: checkPhysicalProofs},
	{Name: "scratch", Group: Store, About: "no recovered cluster was left behind", run: checkScratch},
}

// Physical is what is known of a cluster's physical backups.
type Physical struct {
	Cluster string
	Info    physical.Info
	// Answers: the cluster does. Archives: it archives WAL. Failing is the WAL that it tried to archive last, in vain.
	Answers, Archives bool
	Failing           string
	// Proved is when a recovery was proved last: zero, never; nil: nobody can say, since the database does not answer.
	Proved *time.Time
}

// physical reads it once.
func (d *Doctor) physical(ctx context.Context, r *report) ([]Physical, error) {
	if d.o.Physical == nil {
		r.skip("no physical backups are configured (backup.physical.engine)")
		return nil, nil
	}
	if d.clusters == nil {
		all, err := d.o.Physical(ctx)
		if err != nil {
			return nil, err
		}
		d.clusters = all
	}
	return d.clusters, nil
}

func checkArchiving(ctx context.Context, d *Doctor, r *report) error {
	all, err := d.physical(ctx, r)
	for _, p := range all {
		switch {
		case !p.Answers:
			r.found(Warn, "", "is the server running?", "the cluster %s does not answer", p.Cluster)
		case !p.Archives:
			r.found(Fail, "", "oneo backup physical setup", "the cluster %s archives no WAL", p.Cluster)
		case p.Failing != "":
			r.found(Fail, "", "PostgreSQL's log says why archive_command fails; also: oneo backup physical setup", "the cluster %s: archiving %s fails", p.Cluster, p.Failing)
		default:
			r.ok("%s archives", p.Cluster)
		}
	}
	return err
}

// physicalAge is how old the newest physical backup may be: WAL of so long is replayed by each recovery.
const physicalAge = 8 * 24 * time.Hour

func checkPhysical(ctx context.Context, d *Doctor, r *report) error {
	const create = "oneo backup physical create"
	all, err := d.physical(ctx, r)
	for _, p := range all {
		var newest physical.Backup
		var reach physical.Window
		for _, b := range p.Info.Backups {
			if b.Bad != "" {
				r.found(Warn, "", "oneo backup physical list", "the physical backup %s is no good: %s", b.Label, b.Bad)
			} else if w, ok := p.Info.Reach(b); ok && !b.Stop.Before(newest.Stop) {
				newest, reach = b, w
			}
		}
		age := d.o.Now().Sub(newest.Stop)
		switch {
		case newest.Label == "":
			r.found(Fail, "", create, "no moment of the cluster %s can be had back: there is no physical backup with its WAL", p.Cluster)
		case slices.ContainsFunc(p.Info.WAL, func(s physical.Stretch) bool { return s.Until.After(reach.Until) }):
			r.found(Fail, "", create, "WAL is missing behind the physical backup %s: moments after %s cannot be had back", newest.Label, reach.Until.UTC().Format(time.RFC3339))
		case age > physicalAge:
			r.found(Warn, "", create+"; a schedule of the kind physical makes them by itself", "the newest physical backup of %s is %d days old", p.Cluster, int(age.Hours()/24))
		default:
			r.ok("%s: moments from %s on", p.Cluster, p.Info.Windows()[0].From.UTC().Format(time.RFC3339))
		}
	}
	return err
}

// unprovedAge is how old a cluster's oldest physical backup may be before a recovery was ever proved. It is less than proofAge: many
// keep none for so long.
const unprovedAge = 7 * 24 * time.Hour

func checkPhysicalProofs(ctx context.Context, d *Doctor, r *report) error {
	const drill = "oneo backup drill --physical; a schedule of the kind physical-drill does it by itself"
	all, err := d.physical(ctx, r)
	for _, p := range all {
		oldest := d.o.Now()
		for _, b := range p.Info.Backups {
			if b.Bad == "" && b.Stop.Before(oldest) {
				oldest = b.Stop
			}
		}
		switch {
		case p.Proved == nil:
			r.found(Warn, "", "is the server running, and its shared schema migrated?", "nobody can say when a recovery of %s was proved last", p.Cluster)
		case p.Proved.IsZero() && d.o.Now().Sub(oldest) <= unprovedAge:
			r.ok("%s: not yet", p.Cluster)
		case p.Proved.IsZero():
			r.found(Warn, "", drill, "no recovery of %s was ever proved: nobody knows whether it can be had back", p.Cluster)
		case d.o.Now().Sub(*p.Proved) > proofAge:
			r.found(Warn, "", drill, "a recovery of %s was proved last %d days ago", p.Cluster, int(d.o.Now().Sub(*p.Proved).Hours()/24))
		default:
			r.ok("%s: on %s", p.Cluster, p.Proved.UTC().Format(time.DateOnly))
		}
	}
	return err
}

func checkScratch(_ context.Context, d *Doctor, r *report) error {
	if d.o.Scratch == "" {
		r.skip("no physical backups are configured (backup.physical.engine)")
		return nil
	}
	left, err := physical.Leftovers(d.o.Scratch)
	for _, l := range left {
		f := r.found(Warn, "", "oneo doctor --only scratch --fix", "%s was left behind by a process that has died (%s): %d MB", l.Dir, l.Why, l.Bytes>>20)
		f.by(func(ctx context.Context) error { return physical.RemoveLeftover(ctx, l.Dir) }, "remove %s", l.Dir)
		f.fix.long = true
	}
	if err == nil {
		r.ok("none")
	}
	return err
}
