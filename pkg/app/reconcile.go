package app

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// registered is a tenant as a registry has it.
type registered struct {
	Number int32     `json:"number"`
	ID     string    `json:"id"`
	Slug   string    `json:"slug"`
	Group  string    `json:"group"`
	State  string    `json:"state"`
	Made   time.Time `json:"made"`
}

func (r registered) there() bool { return r.State != string(tenant.Purged) }

// place is where a tenant stands in a group's database.
type place struct {
	Number  int32  `json:"number"`
	State   string `json:"state"`
	Schema  string `json:"schema"`
	Version int    `json:"version"`
	Stands  bool   `json:"stands"` // its schema is there
}

// served reports whether the place is one from which a tenant is served, or would be if its state let it.
func (p place) served() bool {
	return slices.Contains([]string{string(tenant.Active), string(tenant.Suspended), string(tenant.Dropped)}, p.State)
}

// pending is an operation that was begun and not ended.
type pending struct {
	Kind   string `json:"kind"`
	Number int32  `json:"number"`
	Slug   string `json:"slug"`
}

// registryThen is what main's database knows of tenants.
type registryThen struct {
	Version int          `json:"version"` // of the shared tables
	Next    int64        `json:"next"`    // the last number that was given to a tenant
	Tenants []registered `json:"tenants"`
	Pending []pending    `json:"pending,omitempty"`
}

// standing is what the databases of a cluster's groups say of tenants. It is kept in the note of a recovered cluster.
type standing struct {
	Registry *registryThen      `json:"registry,omitempty"` // main's cluster has it
	Places   map[string][]place `json:"places"`             // by group
}

// readRegistry reads tables and columns that the first version of the registry had.
func readRegistry(ctx context.Context, q postgres.Querier) (r registryThen, err error) {
	const about = `select (select coalesce(max(version), 0) from public.ledger where set = 'shared' and tenant = 0), (select last_value from public.tenant_numbers)`
	if err := q.QueryRow(ctx, about).Scan(&r.Version, &r.Next); err != nil {
		return r, err
	}
	rows, err := q.Query(ctx, `select number, id::text, slug, group_name, state, created_at from public.tenants order by number`)
	if err != nil {
		return r, err
	}
	if r.Tenants, err = pgx.CollectRows(rows, pgx.RowToStructByPos[registered]); err != nil {
		return r, err
	}
	rows, err = q.Query(ctx, `select kind, coalesce(tenant, 0), slug from public.operations where state in ('queued', 'running') order by created_at`)
	if err != nil {
		return r, err
	}
	r.Pending, err = pgx.CollectRows(rows, pgx.RowToStructByPos[pending])
	return r, err
}

// readPlaces reads all, spare ones with them: their numbers are given.
func readPlaces(ctx context.Context, q postgres.Querier) ([]place, error) {
	rows, err := q.Query(ctx, `select p.number, p.state, p.schema, p.version,
	exists (select from pg_catalog.pg_namespace n where n.oid = p.namespace and n.nspname = p.schema) from public.placements p order by p.number`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[place])
}

// live is what can be known of an installation without its recovered clusters. It changes nothing.
type live struct {
	registry *registryThen // nil: it cannot be read
	why      error         // it cannot
	places   map[string][]place
	away     map[string]error // groups whose databases cannot be read
	since    map[int32]map[string]time.Time
	erasures []provision.Erasure
	marked   map[string]time.Time // tenants of which the store of archives says that they are erased, by their ids
	unmarked error                // why it does not say so
}

// readLive asks what can be reached. What was audited after the moment is when it changed. Only the end of ctx is an error.
func (a *App) readLive(ctx context.Context, moment time.Time) (l live, err error) {
	l = live{places: map[string][]place{}, away: map[string]error{}, since: map[int32]map[string]time.Time{}, marked: map[string]time.Time{}}
	l.why = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		r, err := readRegistry(ctx, tx)
		if err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `select tenant, action, max(at) from public.audit where at > $1 and tenant is not null group by 1, 2`, moment)
		if err != nil {
			return err
		}
		var number int32
		var action string
		var at time.Time
		_, err = pgx.ForEachRow(rows, []any{&number, &action, &at}, func() error {
			if l.since[number] == nil {
				l.since[number] = map[string]time.Time{}
			}
			l.since[number][action] = at
			return nil
		})
		l.registry = &r
		return err
	})
	if l.why == nil {
		l.erasures, l.why = a.Provision.Erasures(ctx)
	}
	if l.why != nil {
		l.registry = nil
	}
	for _, group := range a.DB.Groups() {
		if group == postgres.MainGroup && l.why != nil { // it has been waited for
			l.away[group] = l.why
			continue
		}
		err := a.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) (err error) {
			l.places[group], err = readPlaces(ctx, tx)
			return err
		})
		if err != nil {
			delete(l.places, group)
			l.away[group] = err
		}
	}
	if a.Config.Backup.URL != "" {
		b, err := a.Backups()
		if err == nil {
			l.marked, err = b.Erased(ctx)
		}
		l.unmarked = err
	}
	return l, ctx.Err()
}

// Kinds of differences.
const (
	DiffErased   = "erased"   // a person's wish that a recovery undoes
	DiffUnknown  = "unknown"  // it cannot be said whether there are any
	DiffUnplaced = "unplaced" // the registry knows a tenant that stands nowhere
	DiffStray    = "stray"    // tables that the registry does not know
	DiffMade     = "made"
	DiffMoved    = "moved"
	DiffDropped  = "dropped"
	DiffPurged   = "purged"
	DiffState    = "state"
	DiffRenamed  = "renamed"
	DiffPending  = "pending" // an operation that was under way
)

var diffOrder = []string{DiffErased, DiffUnknown, DiffUnplaced, DiffStray, DiffMoved, DiffMade, DiffPurged, DiffDropped, DiffState, DiffRenamed, DiffPending}

// Difference is something about a tenant that a switch to recovered clusters makes other than it is, which nobody but a person can
// decide.
type Difference struct {
	Tenant string     `json:"tenant"` // empty: it is about all
	Kind   string     `json:"kind"`
	At     *time.Time `json:"at"` // when it came about; nil: it is not known
	Means  string     `json:"means"`
	Before []string   `json:"before"` // what keeps what the switch would lose: commands, while the old servers run
	After  []string   `json:"after"`  // what brings it about again: commands, behind the switch and before anybody is served
}

// reconciling compares what will be with what is.
type reconciling struct {
	live
	recovered map[string]string // the cluster of each group that was recovered
	past      *registryThen     // of main, if it was recovered
	places    map[string][]place
	found     []Difference
	told      map[int32]bool // a difference says where its tables are
}

// reconcile lists what is other behind a switch to recovered clusters.
func reconcile(done []Recovered, l live) []Difference {
	r := &reconciling{live: l, recovered: map[string]string{}, places: maps.Clone(l.places), told: map[int32]bool{}}
	for _, k := range done {
		for _, g := range k.Groups {
			r.recovered[g] = k.Cluster
			r.places[g] = k.standing.Places[g]
		}
		if k.standing.Registry != nil {
			r.past = k.standing.Registry
		}
	}
	then := r.past
	if then == nil {
		then = l.registry // main stays as it is
	}
	if l.registry == nil {
		r.add(Difference{Kind: DiffUnknown, Means: "the live registry cannot be read (" + fault.Of(l.why).Message + "): which tenants were made, moved, dropped, renamed or erased since is not known"})
	}
	if l.unmarked != nil {
		r.add(Difference{Kind: DiffUnknown, Means: "the store of archives cannot be read (" + fault.Of(l.unmarked).Message + "): whether it knows of tenants that were erased since is not known"})
	}
	for _, g := range slices.Sorted(maps.Keys(l.away)) {
		if _, is := r.recovered[g]; !is {
			r.add(Difference{Kind: DiffUnknown, Means: fmt.Sprintf("group %s is not recovered, and cannot be read (%s): what stands in it is not known", g, fault.Of(l.away[g]).Message)})
		}
	}
	r.erased(then)
	if r.past != nil && l.registry != nil {
		r.changed()
	}
	if then != nil {
		r.placed(then)
	}
	slices.SortStableFunc(r.found, func(a, b Difference) int {
		return cmp.Or(cmp.Compare(slices.Index(diffOrder, a.Kind), slices.Index(diffOrder, b.Kind)), strings.Compare(a.Tenant, b.Tenant))
	})
	return r.found
}

func (r *reconciling) add(d Difference) {
	d.Before, d.After = append([]string{}, d.Before...), append([]string{}, d.After...) // never null
	r.found = append(r.found, d)
}

// when is the time at which something last happened to a tenant, with its words; the empty one: nobody knows.
func (r *reconciling) when(number int32, action string) (*time.Time, string) {
	if at, ok := r.since[number][action]; ok {
		return &at, " at " + at.UTC().Format(time.RFC3339)
	}
	return nil, ""
}

// where says what becomes of rows that a group's database has now.
func (r *reconciling) where(group string) string {
	if k, is := r.recovered[group]; is {
		return "only in the old data folder of cluster " + k
	}
	return fmt.Sprintf("in group %s, which is not recovered, and served by nobody", group)
}

// erased lists those whose erasure a switch would undo.
func (r *reconciling) erased(then *registryThen) {
	type erasure struct {
		at   time.Time
		odd  string
		slug string
	}
	gone := map[string]erasure{}
	for id, at := range r.marked {
		gone[id] = erasure{at: at}
	}
	for _, e := range r.erasures {
		x := erasure{at: e.At, slug: e.Slug}
		if !e.Genuine {
			x.odd = " (the record of it was not made with this server.secret, or was changed since)"
		}
		gone[e.Tenant] = x
	}
	if r.past != nil {
		for _, t := range r.past.Tenants {
			e, is := gone[t.ID]
			if !is || !t.there() {
				continue
			}
			r.told[t.Number] = true
			r.add(Difference{Tenant: t.Slug, Kind: DiffErased, At: &e.at,
				Means: fmt.Sprintf("was erased at %s, after the moment%s: its people come back", e.at.UTC().Format(time.RFC3339), e.odd),
				After: []string{fmt.Sprintf("oneo tenant erase %s --confirm %s", t.Slug, t.Slug)}})
		}
		return
	}
	if then == nil {
		return
	}
	for _, t := range then.Tenants { // main stays, and knows of the erasure
		e, is := gone[t.ID]
		if !is || t.there() {
			continue
		}
		for _, g := range slices.Sorted(maps.Keys(r.recovered)) {
			for _, p := range r.places[g] {
				if p.Number != t.Number {
					continue
				}
				r.told[t.Number] = true
				r.add(Difference{Tenant: e.slug, Kind: DiffErased, At: &e.at,
					Means: fmt.Sprintf("was erased at %s, after the moment%s: its people come back into group %s, where the registry does not know them", e.at.UTC().Format(time.RFC3339), e.odd, g),
					After: []string{removeStray(g, p)}})
			}
		}
	}
}

// removeStray is what takes away tables that no registry knows.
func removeStray(group string, p place) string {
	return fmt.Sprintf("psql (group %s, as the owner) -c 'begin; delete from public.placements where number = %d; drop schema %s cascade; commit'", group, p.Number, postgres.Quote(p.Schema))
}

// changed compares the registry then with the one that lives.
func (r *reconciling) changed() {
	now := map[string]registered{}
	for _, t := range r.registry.Tenants {
		now[t.ID] = t
	}
	was := map[string]bool{}
	for _, t := range r.past.Tenants {
		was[t.ID] = true
		n, known := now[t.ID]
		if r.told[t.Number] || !known || !t.there() {
			continue
		}
		r.one(t, n)
	}
	for _, n := range r.registry.Tenants {
		if was[n.ID] || !n.there() {
			continue
		}
		r.told[n.Number] = true
		at := n.Made
		r.add(Difference{Tenant: n.Slug, Kind: DiffMade, At: &at,
			Means:  fmt.Sprintf("was made at %s, after the moment: no registry knows of it then, and its rows are %s", at.UTC().Format(time.RFC3339), r.where(n.Group)),
			Before: []string{"oneo tenant export " + n.Slug}, After: []string{"oneo tenant import " + n.Slug + ".oneo"}})
	}
}

// one compares a tenant then with what it is now.
func (r *reconciling) one(t, n registered) {
	s := func(x tenant.State) string { return string(x) }
	switch {
	case !n.there():
		at, words := r.when(t.Number, provision.KindPurge)
		r.add(Difference{Tenant: t.Slug, Kind: DiffPurged, At: at, Means: fmt.Sprintf("was purged%s, after the moment: it comes back, %s", words, t.State), After: []string{"oneo tenant drop " + t.Slug}})
		return
	case t.Group != n.Group:
		at, words := r.when(t.Number, provision.KindMove)
		r.told[t.Number] = true
		here := fmt.Sprintf("its rows as they were then are in the recovered cluster of group %s", t.Group)
		if _, is := r.recovered[t.Group]; !is {
			here = fmt.Sprintf("group %s, which is not recovered, has at most the copy that the move has left", t.Group)
		}
		r.add(Difference{Tenant: t.Slug, Kind: DiffMoved, At: at,
			Means:  fmt.Sprintf("was moved %s -> %s%s, after the moment: %s, and the newer ones %s", t.Group, n.Group, words, here, r.where(n.Group)),
			Before: []string{"oneo tenant export " + n.Slug}, After: []string{fmt.Sprintf("oneo restore %s.oneo -t %s", n.Slug, t.Slug)}})
	}
	if t.Slug != n.Slug {
		at, words := r.when(t.Number, provision.KindRename)
		r.add(Difference{Tenant: t.Slug, Kind: DiffRenamed, At: at, Means: fmt.Sprintf("was renamed to %s%s, after the moment: it has its old name again", n.Slug, words), After: []string{fmt.Sprintf("oneo tenant rename %s %s", t.Slug, n.Slug)}})
	}
	if t.State == n.State || t.State == s(tenant.Creating) || n.State == s(tenant.Creating) {
		return
	}
	kind, action, verb := DiffState, provision.KindResume, "resume"
	switch {
	case n.State == s(tenant.Dropped):
		kind, action, verb = DiffDropped, provision.KindDrop, "drop"
	case t.State == s(tenant.Dropped):
		kind, action, verb = DiffState, provision.KindUndrop, "undrop"
	case n.State == s(tenant.Suspended):
		action, verb = provision.KindSuspend, "suspend"
	}
	at, words := r.when(t.Number, action)
	r.add(Difference{Tenant: t.Slug, Kind: kind, At: at, Means: fmt.Sprintf("is %s%s, after the moment: it is %s again", n.State, words, t.State), After: []string{"oneo tenant " + verb + " " + t.Slug}})
}

// placed compares a registry with the places that will be there with it.
func (r *reconciling) placed(then *registryThen) {
	under := map[int32]string{}
	for _, p := range then.Pending {
		if r.past == nil { // it is under way in what lives
			continue
		}
		under[p.Number] = p.Kind
		r.add(Difference{Tenant: p.Slug, Kind: DiffPending, Means: p.Kind + " was under way at the moment: a server goes on with it, or takes it back"})
	}
	at := map[int32]string{}
	for _, t := range then.Tenants {
		if !t.there() {
			continue
		}
		at[t.Number] = t.Group
		places, known := r.places[t.Group]
		if !known || t.State == string(tenant.Creating) || under[t.Number] != "" {
			continue
		}
		i := slices.IndexFunc(places, func(p place) bool { return p.Number == t.Number })
		switch {
		case i < 0 || !places[i].served():
			r.add(Difference{Tenant: t.Slug, Kind: DiffUnplaced, Means: fmt.Sprintf("the registry has it in group %s, where it does not stand: it cannot be served", t.Group)})
		case !places[i].Stands:
			r.add(Difference{Tenant: t.Slug, Kind: DiffUnplaced, Means: fmt.Sprintf("its schema %s in group %s is not there: it cannot be served", places[i].Schema, t.Group)})
		}
	}
	for _, g := range slices.Sorted(maps.Keys(r.places)) {
		for _, p := range r.places[g] {
			if !p.served() || at[p.Number] == g || r.told[p.Number] || under[p.Number] != "" {
				continue
			}
			r.add(Difference{Tenant: p.Schema, Kind: DiffStray, Means: fmt.Sprintf("group %s holds tables (schema %s, number %d) of which the registry knows nothing there", g, p.Schema, p.Number), After: []string{removeStray(g, p)}})
		}
	}
}

// lastNumber is the greatest number of a tenant that anything knows which stays: none of them may be given again.
func (l live) lastNumber(recovered []string) (last int64) {
	if l.registry != nil {
		last = l.registry.Next
	}
	for g, places := range l.places {
		if slices.Contains(recovered, g) {
			continue
		}
		for _, p := range places {
			last = max(last, int64(p.Number))
		}
	}
	return last
}
