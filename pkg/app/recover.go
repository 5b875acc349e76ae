package app

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// Recovered is a cluster at a moment, in a data folder that stays. It does not run.
type Recovered struct {
	Cluster string   `json:"cluster"`
	Groups  []string `json:"groups"`
	Data    string   `json:"data"`
	physical.Note
	// Found: an earlier call has recovered it.
	Found bool `json:"found"`
	// Host and Port are where the live cluster is expected.
	Host string `json:"host"`
	Port uint16 `json:"port"`

	standing standing
}

// Tenants are how many the registry in it knows; 0 in one that has no registry.
func (r Recovered) Tenants() (n int) {
	if r.standing.Registry != nil {
		for _, t := range r.standing.Registry.Tenants {
			if t.there() {
				n++
			}
		}
	}
	return n
}

// Behind are how many migrations of the shared tables, and whether tenants, are not at this program's version.
func (a *App) Behind(r Recovered) (shared int, tenants bool) {
	if r.standing.Registry != nil {
		shared = max(0, a.Migrate.Head(migrate.SharedSet)-r.standing.Registry.Version)
	}
	for _, places := range r.standing.Places {
		tenants = tenants || slices.ContainsFunc(places, func(p place) bool { return p.served() && p.Version < a.Migrate.Head(migrate.TenantSet) })
	}
	return shared, tenants
}

// RecoverOptions say which clusters are brought to a moment, and into which folder.
type RecoverOptions struct {
	Moment Moment
	// Groups are those whose clusters are recovered; none: all.
	Groups []string
	// Into is the data folder of the only cluster, or holds a folder for each of several by its name.
	Into string
	// Discard removes what a recovery into one of the folders has left that was broken off.
	Discard bool
	Why     string
	// Report is told how far the recovery of a cluster is; Say what a person should know. Neither may be nil.
	Report func(cluster string, p physical.Progress)
	Say    func(format string, args ...any)
}

// RecoverClusters brings clusters to a moment, each into a data folder that stays, checked and stopped in order, and lists what differs
// from what lives: nothing of that is changed. What an earlier call has recovered to the same moment is taken as it is. No live database
// is needed. Of what fails nothing is left, but clusters that were recovered before it. Faults are those of physical.Recover.
func (a *App) RecoverClusters(ctx context.Context, o RecoverOptions) (done []Recovered, differences []Difference, err error) {
	clusters, err := a.neededClusters(o.Groups)
	if err != nil {
		return nil, nil, err
	}
	l, err := a.readLive(ctx, o.Moment.Time)
	if err != nil {
		return nil, nil, err
	}
	var groups []string
	for _, k := range clusters {
		groups = append(groups, k.Groups...)
	}
	last := l.lastNumber(groups)
	for _, k := range clusters {
		data := o.Into
		if len(clusters) > 1 {
			data = filepath.Join(o.Into, k.Name)
		}
		if data, err = filepath.Abs(data); err != nil {
			return done, nil, err
		}
		r, err := a.recoverToStay(ctx, k, data, last, o)
		if err != nil {
			return done, nil, err
		}
		done = append(done, r)
	}
	return done, reconcile(done, l), nil
}

// neededClusters are those of some groups; of none: all.
func (a *App) neededClusters(groups []string) ([]Cluster, error) {
	all, err := a.PhysicalClusters()
	if err != nil || len(groups) == 0 {
		return all, err
	}
	known := a.Config.AllGroups()
	for _, g := range groups {
		if _, ok := known[g]; !ok {
			return nil, fault.New(fault.Invalid, "database group %q is not configured", g).WithCode("unknown_group")
		}
	}
	return slices.DeleteFunc(all, func(k Cluster) bool {
		return !slices.ContainsFunc(k.Groups, func(g string) bool { return slices.Contains(groups, g) })
	}), nil
}

// recoverToStay brings one cluster to the moment, or finds that this was done.
func (a *App) recoverToStay(ctx context.Context, k Cluster, data string, last int64, o RecoverOptions) (r Recovered, err error) {
	target := o.Moment.of(k)
	r = Recovered{Cluster: k.Name, Groups: k.Groups, Data: data}
	if c, err := pgx.ParseConfig(k.url); err == nil {
		r.Host, r.Port = c.Host, c.Port
	}
	half, alive, err := physical.Begun(a.ScratchDir(), data)
	if err != nil {
		return r, err
	}
	if half != nil && !alive && o.Discard {
		if err := physical.RemoveLeftover(ctx, half.Dir); err != nil {
			return r, err
		}
		o.Say("removed what a recovery to %s had left in %s", half.Target, data)
		half = nil
	}
	if half == nil {
		r.Note, err = physical.ReadNote(data)
		switch {
		case err == nil && r.Target != target.String():
			return r, fault.New(fault.Conflict, "%s holds a cluster that was recovered to %s", data, r.Target).WithCode("not_empty").WithHint("name another folder, or remove that one")
		case err == nil:
			o.Say("cluster %s was recovered to %s at %s already", k.Name, r.Target, r.Made.Format(time.RFC3339))
			r.Found = true
			return r, json.Unmarshal(r.More, &r.standing)
		case !errors.Is(err, fs.ErrNotExist):
			return r, fault.Wrap(err, fault.Unfit, "what %s says of itself cannot be read", data).WithCode("damaged")
		}
	}
	fctx, cancel := context.WithTimeout(ctx, flushPatience)
	err = k.Flush(fctx)
	cancel()
	if ctx.Err() != nil {
		return r, ctx.Err()
	}
	if err != nil { // that may be why it is to be recovered
		o.Say("%s: what it has not archived yet is missing", fault.Of(err).Message)
	}
	c, err := physical.Recover(ctx, k.Engine, physical.RecoverOptions{
		Dir: a.ScratchDir(), Target: target, Role: k.role, Database: k.database, Why: o.Why, Final: data,
		Report: func(p physical.Progress) { o.Report(k.Name, p) },
	})
	if err != nil {
		return r, err
	}
	defer func() {
		cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, c.Close(cctx))
	}()
	if r.standing, err = a.stand(ctx, k, c, last); err != nil {
		return r, err
	}
	o.Say("checking %s", k.Name)
	r.Note, err = c.Settle(ctx, r.standing)
	return r, err
}

// flushPatience is how long a live cluster may take to archive what it has. One that is in no state to do so must not hold up its recovery.
const flushPatience = 3 * time.Minute

// stand reads what a recovered cluster, which runs, says of tenants. last is a number up to which none may be given to a new one.
func (a *App) stand(ctx context.Context, k Cluster, c *physical.Cluster, last int64) (s standing, err error) {
	s.Places = map[string][]place{}
	groups := a.Config.AllGroups()
	for _, g := range k.Groups {
		at, ok := moved(groups[g], c)
		if !ok {
			return s, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", g).WithCode("bad_url")
		}
		conn, err := pgx.Connect(ctx, at.OwnerURL)
		if err == nil {
			err = func() error {
				defer conn.Close(context.WithoutCancel(ctx))
				var err error
				if s.Places[g], err = readPlaces(ctx, conn); err != nil || g != config.MainGroup {
					return err
				}
				// A number that was given since may have tables in a group that stays.
				if _, err := conn.Exec(ctx, `select pg_catalog.setval('public.tenant_numbers', $1) from public.tenant_numbers where last_value < $1`, last); err != nil {
					return err
				}
				r, err := readRegistry(ctx, conn)
				s.Registry = &r
				return err
			}()
		}
		if err != nil {
			return s, fault.Wrap(err, fault.Unfit, "the recovered database of group %s does not hold what oneo makes: %s", g, strings.TrimSpace(err.Error())).WithCode("not_oneo").
				WithHint("was `oneo init` run after that moment only?")
		}
	}
	return s, nil
}
