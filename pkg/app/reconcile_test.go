package app

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/provision"
)

// What is other behind a switch is told, and what is not is not.
func TestReconcile(t *testing.T) {
	t.Parallel()
	at := time.Date(2026, 8, 1, 12, 0, 0, 0, time.UTC)
	one := registered{Number: 1, ID: "a", Slug: "acme", Group: "main", State: "active", Made: at}
	with := func(change func(*registered)) registered { r := one; change(&r); return r }
	state := func(s string) registered { return with(func(r *registered) { r.State = s }) }
	gone := with(func(r *registered) { r.State, r.Slug = "purged", "acme" })
	in := func(number int32, state string) []place {
		return []place{{Number: number, State: state, Schema: "s", Stands: true}}
	}
	then := func(ts ...registered) *registryThen { return &registryThen{Tenants: ts, Next: 1} }
	away := fault.New(fault.Unavailable, "nobody answers")
	erasure := provision.Erasure{Tenant: "a", Slug: "acme", At: at, Genuine: true}
	for what, c := range map[string]struct {
		main   *registryThen // as recovered; nil: only second is recovered
		places map[string][]place
		live   live
		want   []string
		means  string
	}{
		"the same":              {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(one)}},
		"a spare place":         {main: then(one), places: map[string][]place{"main": append(in(1, "active"), in(7, "spare")...)}, live: live{registry: then(one)}},
		"nobody answers":        {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{why: away}, want: []string{"unknown "}, means: "nobody answers"},
		"the store is away":     {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(one), unmarked: away}, want: []string{"unknown "}, means: "the store"},
		"another group is away": {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(one), away: map[string]error{"second": away}}, want: []string{"unknown "}, means: "group second is not recovered"},
		"erased": {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(gone), erasures: []provision.Erasure{erasure}},
			want: []string{"erased acme"}, means: "was erased at 2026-08-01T12:00:00Z"},
		"erased, by an odd record": {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(gone), erasures: []provision.Erasure{{Tenant: "a", At: at}}},
			want: []string{"erased acme"}, means: "was not made with this server.secret"},
		"erased, says the store alone": {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{why: away, marked: map[string]time.Time{"a": at}}, want: []string{"erased acme", "unknown "}},
		"erased before":                {main: then(gone), places: map[string][]place{"main": {}}, live: live{registry: then(gone), erasures: []provision.Erasure{erasure}}},
		"erased, and main stays":       {places: map[string][]place{"second": in(1, "active")}, live: live{registry: then(gone), erasures: []provision.Erasure{erasure}}, want: []string{"erased acme"}, means: "into group second"},
		"purged":                       {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(gone)}, want: []string{"purged acme"}},
		"dropped":                      {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(state("dropped"))}, want: []string{"dropped acme"}},
		"undropped":                    {main: then(state("dropped")), places: map[string][]place{"main": in(1, "dropped")}, live: live{registry: then(one)}, want: []string{"state acme"}},
		"suspended":                    {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(state("suspended"))}, want: []string{"state acme"}},
		"made":                         {main: then(), places: map[string][]place{"main": {}}, live: live{registry: then(one)}, want: []string{"made acme"}, means: "only in the old data folder of cluster main"},
		"made, in what stays":          {main: then(), places: map[string][]place{"main": {}}, live: live{registry: then(with(func(r *registered) { r.Group = "second" })), places: map[string][]place{"second": in(1, "active")}}, want: []string{"made acme"}, means: "served by nobody"},
		"made and purged":              {main: then(), places: map[string][]place{"main": {}}, live: live{registry: then(gone)}},
		"renamed":                      {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(with(func(r *registered) { r.Slug = "new" }))}, want: []string{"renamed acme"}},
		"moved away": {main: then(one), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then(with(func(r *registered) { r.Group = "second" })), places: map[string][]place{"second": in(1, "active")}},
			want: []string{"moved acme"}, means: "the newer ones in group second"},
		"moved here, and its old place stays": {main: then(with(func(r *registered) { r.Group = "second" })), places: map[string][]place{"main": {}}, live: live{registry: then(one), places: map[string][]place{"second": in(1, "moved")}},
			want: []string{"unplaced acme", "moved acme"}},
		"nowhere":         {main: then(one), places: map[string][]place{"main": {}}, live: live{registry: then(one)}, want: []string{"unplaced acme"}},
		"without schema":  {main: then(one), places: map[string][]place{"main": {{Number: 1, State: "active", Schema: "s"}}}, live: live{registry: then(one)}, want: []string{"unplaced acme"}},
		"nobody's tables": {main: then(), places: map[string][]place{"main": in(1, "active")}, live: live{registry: then()}, want: []string{"stray s"}},
		"main stays":      {places: map[string][]place{"second": {}}, live: live{registry: then(with(func(r *registered) { r.Group = "second" })), places: map[string][]place{"main": {}}}, want: []string{"unplaced acme"}},
		"under way": {main: &registryThen{Tenants: []registered{one}, Pending: []pending{{Kind: "tenant.drop", Number: 1, Slug: "acme"}}}, places: map[string][]place{"main": {}}, live: live{registry: then(one)},
			want: []string{"pending acme"}},
	} {
		k := Recovered{Cluster: "main", Groups: []string{"main"}, standing: standing{Registry: c.main, Places: c.places}}
		if c.main == nil {
			k.Cluster, k.Groups = "second", []string{"second"}
		}
		if c.live.places == nil {
			c.live.places = map[string][]place{}
		}
		var got []string
		means := ""
		for _, d := range reconcile([]Recovered{k}, c.live) {
			got, means = append(got, d.Kind+" "+d.Tenant), means+d.Means+"\n"
			require.NotNil(t, d.Before, what)
			require.NotNil(t, d.After, what)
		}
		require.Equal(t, c.want, got, what)
		require.Contains(t, means, c.means, what)
	}
	l := live{places: map[string][]place{"main": in(90, "active"), "second": in(40, "spare")}, why: errors.New("away")}
	require.EqualValues(t, 40, l.lastNumber([]string{"main"}), "what stays has it")
	l.registry = &registryThen{Next: 41}
	require.EqualValues(t, 41, l.lastNumber([]string{"main"}))
}
