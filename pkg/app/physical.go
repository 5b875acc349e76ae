package app

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// Cluster is a server of PostgreSQL that holds groups, and where its physical backups are.
type Cluster struct {
	Name   string   // of its folder: main, or the first of its groups
	Groups []string // sorted
	Engine physical.Engine
	Where  string // the repository's folder

	url      string // the owner's of one of the groups, past any pooler
	role     string
	database string
	bases    []base
}

// base is the database of one of a cluster's groups, as its owner reaches it past any pooler.
type base struct {
	database, owner, url string
}

// PhysicalClusters are those of the configuration's groups; main's is the first. Groups with one host and port share a cluster. Invalid:
// no engine is configured.
func (a *App) PhysicalClusters() ([]Cluster, error) {
	c := a.Config.Backup.Physical
	if c.Engine == "" {
		return nil, fault.New(fault.Invalid, "no physical backups are configured").WithCode("no_physical").
			WithHint("set backup.physical.engine (files or pgbackrest) and backup.physical.dir, and then: oneo backup physical setup")
	}
	groups := a.Config.AllGroups()
	names := slices.Sorted(maps.Keys(groups))
	// main's cluster is called main, whoever else is on it.
	slices.SortStableFunc(names, func(x, y string) int { return order(x == config.MainGroup, y == config.MainGroup) })
	var clusters []Cluster
	at := map[string]int{}
	for _, name := range names {
		direct, err := pgx.ParseConfig(groups[name].DirectURL)
		if err != nil {
			return nil, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", name).WithCode("bad_url")
		}
		owner, err := pgx.ParseConfig(groups[name].OwnerURL)
		if err != nil {
			return nil, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", name).WithCode("bad_url")
		}
		b := base{database: direct.Database, owner: owner.User}
		if b.url, err = withUser(groups[name].DirectURL, owner); err != nil {
			return nil, err
		}
		key := (&url.URL{Host: direct.Host, Fragment: string(rune(direct.Port))}).String()
		if i, ok := at[key]; ok {
			clusters[i].Groups, clusters[i].bases = append(clusters[i].Groups, name), append(clusters[i].bases, b)
			continue
		}
		at[key] = len(clusters)
		k := Cluster{Name: name, Groups: []string{name}, Where: filepath.Join(c.Dir, name), url: b.url, role: b.owner, database: b.database, bases: []base{b}}
		if k.Engine, err = a.engine(k); err != nil {
			return nil, err
		}
		clusters = append(clusters, k)
	}
	return clusters, nil
}

func order(x, y bool) int {
	switch {
	case x && !y:
		return -1
	case y && !x:
		return 1
	}
	return 0
}

// withUser is an URL with the owner as its user.
func withUser(direct string, owner *pgx.ConnConfig) (string, error) {
	u, err := url.Parse(direct)
	if err != nil {
		return "", fault.New(fault.Invalid, "a connection URL cannot be read").WithCode("bad_url")
	}
	u.User = url.User(owner.User)
	if owner.Password != "" {
		u.User = url.UserPassword(owner.User, owner.Password)
	}
	return u.String(), nil
}

func (a *App) engine(k Cluster) (physical.Engine, error) {
	c := a.Config.Backup.Physical
	switch c.Engine {
	case physical.FilesName:
		return physical.NewFiles(physical.FilesOptions{Dir: k.Where, URL: k.url})
	case physical.PgBackRestName:
		return physical.NewPgBackRest(physical.PgBackRestOptions{Dir: k.Where, URL: k.url, Stanza: c.Stanza, Config: c.Config})
	}
	return nil, fault.New(fault.Invalid, "there is no engine %q", c.Engine).WithCode("setting")
}

// ScratchDir is where clusters are recovered for a while.
func (a *App) ScratchDir() string {
	if dir := a.Config.Backup.Physical.Scratch; dir != "" {
		return dir
	}
	return filepath.Join(a.Config.Backup.Physical.Dir, ".scratch") // of the same disk: copies may share blocks
}

// Flush brings everything that was committed in a cluster until now into its archive.
func (k Cluster) Flush(ctx context.Context) error {
	conn, err := pgx.Connect(ctx, k.url)
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "the cluster of %s cannot be reached", k.Name).WithCode("unreachable")
	}
	defer conn.Close(context.WithoutCancel(ctx))
	return physical.Flush(ctx, conn)
}

// Past is an installation as it was at a moment, on clusters of its own that nobody else sees. What is done in it changes nothing
// of the live one.
type Past struct {
	*App
	Clusters []*physical.Cluster
	names    []string // of Clusters
}

// Moment is one of the whole installation.
type Moment struct {
	Time time.Time
	// Points are restore points that are meant in the place of the time, in the clusters of these groups.
	Points map[string]physical.Target
}

// MomentOf is the one before an operation, whose restore points they are.
func MomentOf(points []registry.Point) (m Moment, err error) {
	m.Points = map[string]physical.Target{}
	for _, p := range points {
		t := physical.Target{Time: p.At, Point: p.Name}
		if t.LSN, err = physical.ParseLSN(p.LSN); err != nil {
			return m, err
		}
		m.Points[p.Group] = t
		if m.Time.IsZero() || p.At.Before(m.Time) {
			m.Time = p.At
		}
	}
	return m, nil
}

// String says it to a person.
func (m Moment) String() string {
	for _, t := range m.Points {
		if len(m.Points) == 1 {
			return t.String()
		}
	}
	return physical.Target{Time: m.Time}.String()
}

// of is the moment in one cluster: the first of its groups' restore points, if there are any.
func (m Moment) of(k Cluster) physical.Target {
	found := physical.Target{Time: m.Time}
	for _, g := range k.Groups {
		if t, ok := m.Points[g]; ok && (found.Point == "" || t.LSN < found.LSN) {
			found = t
		}
	}
	return found
}

// PastOptions say what is recovered of an installation.
type PastOptions struct {
	Moment Moment
	// Groups are those that are needed besides main, which knows of all tenants.
	Groups []string
	Why    string
	// Report is told how far the recovery of a cluster is; Say what a person should know. Neither may be nil.
	Report func(cluster string, p physical.Progress)
	Say    func(format string, args ...any)
}

// Recover brings the clusters that are needed to a moment beside the live ones, and opens what they hold. The shared tables are
// brought to this program's version there; tenants stay at theirs. The Past must be closed. Faults are those of physical.Recover.
func (a *App) Recover(ctx context.Context, o PastOptions) (p *Past, err error) {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return nil, err
	}
	p = &Past{}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Close())
			p = nil
		}
	}()
	c := a.Config
	c.Redis.URL, c.Backup.URL, c.Backup.Physical, c.Backup.Schedules = "", "", config.Physical{}, nil
	c.Tracing.Endpoint, c.Metrics.Enabled = "", false
	groups := a.Config.AllGroups()
	c.Database.Groups = map[string]config.Group{}
	for _, k := range clusters {
		needed := slices.ContainsFunc(k.Groups, func(g string) bool { return g == config.MainGroup || slices.Contains(o.Groups, g) })
		if !needed {
			continue
		}
		r, err := physical.Attach(a.ScratchDir(), k.Name, o.Moment.of(k))
		if err != nil {
			return p, err
		}
		if r == nil {
			if r, err = a.recoverCluster(ctx, k, o, groups); err != nil {
				return p, err
			}
		}
		p.Clusters, p.names = append(p.Clusters, r), append(p.names, k.Name)
		for _, name := range k.Groups {
			if g, ok := moved(groups[name], r); !ok {
				return p, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", name).WithCode("bad_url")
			} else if name == config.MainGroup {
				c.Database.URL, c.Database.OwnerURL, c.Database.DirectURL = g.URL, g.OwnerURL, g.DirectURL
			} else {
				c.Database.Groups[name] = g
			}
		}
	}
	if p.App, err = Open(c, a.Version, slog.New(a.Log.Handler())); err != nil {
		return p, err
	}
	if _, err := p.Migrate.Shared(ctx); err != nil {
		return p, err
	}
	return p, nil
}

// recoverCluster recovers one cluster, with everything that was committed until now.
func (a *App) recoverCluster(ctx context.Context, k Cluster, o PastOptions, groups map[string]config.Group) (*physical.Cluster, error) {
	if err := k.Flush(ctx); err != nil {
		if !fault.Is(err, fault.Unavailable) || ctx.Err() != nil {
			return nil, err
		}
		// That may be why it is to be recovered.
		o.Say("%s: what it has not archived yet is missing", fault.Of(err).Message)
	}
	return physical.Recover(ctx, k.Engine, physical.RecoverOptions{
		Dir: a.ScratchDir(), Target: o.Moment.of(k), Role: k.role, Database: k.database, Only: databasesOf(k, groups), Why: o.Why,
		Begun: func(e physical.Estimate) {
			o.Say("%s: the physical backup %s, and at most %d MB of WAL behind it; about %d MB of disk in %s, probably for less than %s", k.Name, e.Backup.Label, e.WAL>>20, e.Disk>>20, a.ScratchDir(), e.Time)
		},
		Report: func(p physical.Progress) { o.Report(k.Name, p) },
	})
}

// databasesOf are those of a cluster's groups.
func databasesOf(k Cluster, groups map[string]config.Group) (names []string) {
	for _, g := range k.Groups {
		if c, err := pgx.ParseConfig(groups[g].DirectURL); err == nil && !slices.Contains(names, c.Database) {
			names = append(names, c.Database)
		}
	}
	return names
}

// moved are a group's URLs on a recovered cluster.
func moved(g config.Group, c *physical.Cluster) (to config.Group, ok bool) {
	for _, m := range []struct {
		from string
		to   *string
	}{{g.URL, &to.URL}, {g.OwnerURL, &to.OwnerURL}, {g.DirectURL, &to.DirectURL}} {
		u, err := pgx.ParseConfig(m.from)
		if err != nil {
			return to, false
		}
		*m.to = c.URL(u.User, u.Database)
	}
	return to, true
}

// Kept reports whether another process keeps all clusters at a moment.
func (a *App) Kept(m Moment) (bool, error) {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return false, err
	}
	for _, k := range clusters {
		c, err := physical.Attach(a.ScratchDir(), k.Name, m.of(k))
		if c == nil || err != nil {
			return false, err
		}
		if err := c.Close(context.Background()); err != nil {
			return false, err
		}
	}
	return true, nil
}

// Keep offers the past to other processes for a while, and returns when nobody reads it any more behind that time, or the context ends.
func (p *Past) Keep(ctx context.Context, d time.Duration, ready func()) error {
	until := time.Now().Add(d)
	for i, c := range p.Clusters {
		if err := c.Keep(p.names[i], until); err != nil {
			return err
		}
	}
	ready()
	if !wait(ctx, d) {
		return ctx.Err()
	}
	for _, c := range p.Clusters {
		if err := c.Unused(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Close takes the past apart: its servers end and their folders go.
func (p *Past) Close() error {
	var errs []error
	if p.App != nil {
		errs = append(errs, p.App.Close())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, c := range slices.Backward(p.Clusters) {
		errs = append(errs, c.Close(ctx))
	}
	return errors.Join(errs...)
}

// Now is the moment by the clock of the server that knows of all tenants.
func (a *App) Now(ctx context.Context) (now time.Time, err error) {
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select pg_catalog.clock_timestamp()`).Scan(&now)
	})
	return now, err
}
