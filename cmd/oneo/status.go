package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tui"
)

// fleetBound is how long PostgreSQL may take for one of the dashboard's statements; then it ends it itself.
const fleetBound = 4 * time.Second

// countFleet counts what there is: one statement in the main group's database, and a small one in each other group's.
func countFleet(ctx context.Context, a *app.App) (f tui.Fleet, err error) {
	const versions = `select coalesce(json_agg(v), '[]') from (select version, count(*) n from public.placements where state in ('active', 'suspended', 'moving')
	group by version order by version desc) v`
	const fleet = `select now(),
	(select coalesce(json_agg(s), '[]') from (select state, count(*) n from public.tenants where state <> 'purged' group by state) s),
	(` + versions + `),
	(select coalesce(json_agg(i), '[]') from (select id, host, pid, version, ops_addr, started_at, heartbeat from public.instances
		where heartbeat > now() - interval '1 minute' order by started_at, id limit 1000) i),
	(select count(*) from public.operations where state in ('queued', 'running')),
	(select coalesce(json_agg(o), '[]') from (select id, kind, slug, state, actor, created_at from public.operations
		where state in ('queued', 'running') and left(kind, 4) <> 'run.' order by created_at limit 20) o),
	(select coalesce(json_agg(r), '[]') from (select o.id, o.kind, o.state, o.actor, o.created_at, t.ended, t.failed, t.left from public.operations o
		join public.runs r on r.id = o.id cross join lateral (select count(*) filter (where t.state in ('ok', 'skipped')) ended, count(*) filter (where t.state = 'failed') failed,
			count(*) filter (where t.state in ('queued', 'running')) "left" from public.tasks t where t.run = o.id) t
		where o.state in ('running', 'queued') order by o.created_at desc limit 5) r),
	(select count(*) from public.operations where state = 'failed' and id >= $1 and finished_at > now() - interval '1 day'),
	(select count(datid) from pg_catalog.pg_stat_activity),
	pg_catalog.current_setting('max_connections')::int,
	(select count(distinct pid) from pg_catalog.pg_locks where not granted)`
	var states, at, servers, open, runs []byte
	err = a.DB.AsOwnerWithin(ctx, postgres.MainGroup, postgres.OwnerOptions{StatementTimeout: fleetBound}, func(tx *postgres.OwnerTx) error {
		// Ids begin with their time: nothing that is older than two days is looked at. Days, for clocks that differ.
		return tx.QueryRow(ctx, fleet, idAt(time.Now().Add(-48*time.Hour))).Scan(&f.At, &states, &at, &servers, &f.OpenCount, &open, &runs, &f.FailedDay,
			&f.Database.Sessions, &f.Database.Max, &f.Database.Waiting)
	})
	if err != nil {
		return f, fleetFault(err)
	}
	var ops []struct {
		ID, Kind, Slug, State, Actor string
		CreatedAt                    time.Time `json:"created_at"`
	}
	var rs []struct {
		ID, Kind, State, Actor string
		CreatedAt              time.Time `json:"created_at"`
		Ended, Failed, Left    int
	}
	for _, part := range []struct {
		text []byte
		into any
	}{{states, &f.Tenants}, {at, &f.Versions}, {servers, &f.Servers}, {open, &ops}, {runs, &rs}} {
		if err := json.Unmarshal(part.text, part.into); err != nil {
			return f, fmt.Errorf("read what the fleet is: %w", err)
		}
	}
	for _, o := range ops {
		f.Open = append(f.Open, tui.Operation{ID: o.ID, Kind: o.Kind, Tenant: o.Slug, State: o.State, Actor: o.Actor, Created: o.CreatedAt})
	}
	for _, r := range rs {
		f.Runs = append(f.Runs, tui.Run{ID: r.ID, Kind: strings.TrimPrefix(r.Kind, rollout.Prefix), State: r.State, Actor: r.Actor, Created: r.CreatedAt,
			OK: r.Ended, Failed: r.Failed, Queued: r.Left})
	}
	for _, group := range a.DB.Groups() {
		if group == postgres.MainGroup {
			continue
		}
		var text []byte
		err := a.DB.AsOwnerWithin(ctx, group, postgres.OwnerOptions{StatementTimeout: fleetBound}, func(tx *postgres.OwnerTx) error {
			return tx.QueryRow(ctx, versions).Scan(&text)
		})
		var vs []tui.VersionCount
		if err == nil {
			err = json.Unmarshal(text, &vs)
		}
		if err != nil { // the others are told all the same
			f.Unreadable = append(f.Unreadable, group)
			continue
		}
		f.Versions = append(f.Versions, vs...)
	}
	f.Versions = summed(f.Versions)
	order := []string{"active", "suspended", "creating", "dropped"}
	slices.SortFunc(f.Tenants, func(a, b tui.StateCount) int {
		return cmp.Compare(slices.Index(order, a.State), slices.Index(order, b.State))
	})
	f.Head = a.Migrate.Head(migrate.TenantSet)
	return f, nil
}

// idAt is the least id that was made at a time: the first bits of a version 7 are its milliseconds.
func idAt(t time.Time) string {
	return fmt.Sprintf("%08x-%04x-7000-8000-000000000000", uint32(t.UnixMilli()>>16), uint16(t.UnixMilli()))
}

// summed adds the counts of groups up, the newest version first.
func summed(vs []tui.VersionCount) []tui.VersionCount {
	n := map[int]int{}
	for _, v := range vs {
		n[v.Version] += v.N
	}
	var out []tui.VersionCount
	for v, c := range n {
		out = append(out, tui.VersionCount{Version: v, N: c})
	}
	slices.SortFunc(out, func(a, b tui.VersionCount) int { return cmp.Compare(b.Version, a.Version) })
	return out
}

// fleetFault says what is missing where PostgreSQL knows no such table.
func fleetFault(err error) error {
	if postgres.SQLState(err) == "42P01" {
		return fault.Wrap(err, fault.Pending, "the shared schema is not there, or behind").WithCode("shared_behind").WithHint("oneo migrate --shared")
	}
	return err
}

func newStatusCmd(e *env) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use: "status", Short: "The fleet in ten lines",
		Long: `Count the fleet as ` + "`oneo tui`" + ` does, by one statement: tenants by state and version, servers, operations and
runs, sessions.

With --check the exit code is 13 when a tenant is behind, no server gives a sign of life, an operation failed within
a day, or a group's database does not answer. ` + "`oneo doctor`" + ` looks deeper.`,
		Example: "  oneo status\n  oneo status --check -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runStatus(cmd.Context(), e, check) },
	}
	cmd.Flags().BoolVar(&check, "check", false, "exit 13 when something asks for attention")
	return cmd
}

// fleetRow is the fleet as `oneo status` tells it.
type fleetRow struct {
	tui.Fleet
	attention []string
}

func (r fleetRow) states() string {
	var parts []string
	for _, s := range r.Tenants {
		parts = append(parts, fmt.Sprintf("%d %s", s.N, s.State))
	}
	return strings.Join(parts, ", ")
}

func (r fleetRow) behind() (n int) {
	for _, v := range r.Versions {
		if v.Version < r.Head {
			n += v.N
		}
	}
	return n
}

// byState and byVersion are lists in JSON, and a phrase in a table.
type (
	byState   []tui.StateCount
	byVersion []tui.VersionCount
)

func (b byState) String() string { return fleetRow{Fleet: tui.Fleet{Tenants: b}}.states() }

func (b byVersion) String() string {
	var parts []string
	for _, v := range b {
		parts = append(parts, fmt.Sprintf("%d at %d", v.N, v.Version))
	}
	return strings.Join(parts, ", ")
}

var fleetColumns = []column[fleetRow]{
	{"TENANTS", "tenants", func(r fleetRow) any { return append(byState{}, r.Tenants...) }},
	{"VERSIONS", "versions", func(r fleetRow) any { return append(byVersion{}, r.Versions...) }},
	{"NEWEST", "newest_version", func(r fleetRow) any { return r.Head }},
	{"BEHIND", "behind", func(r fleetRow) any { return r.behind() }},
	{"SERVERS", "servers", func(r fleetRow) any { return len(r.Servers) }},
	{"OPEN", "open_operations", func(r fleetRow) any { return r.OpenCount }},
	{"FAILED", "failed_within_a_day", func(r fleetRow) any { return r.FailedDay }},
	{"SESSIONS", "sessions", func(r fleetRow) any { return r.Database.Sessions }},
	{"OF", "max_connections", func(r fleetRow) any { return r.Database.Max }},
	{"ATTENTION", "attention", func(r fleetRow) any { return r.attention }},
}

func runStatus(ctx context.Context, e *env, check bool) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	r := fleetRow{}
	if r.Fleet, err = countFleet(ctx, a); err != nil {
		return err
	}
	say := func(format string, args ...any) { r.attention = append(r.attention, fmt.Sprintf(format, args...)) }
	if n := r.behind(); n > 0 {
		say("%d tenant(s) are behind: oneo migrate --all-tenants", n)
	}
	if len(r.Servers) == 0 {
		say("no server gives a sign of life: oneo serve")
	}
	if r.FailedDay > 0 {
		say("%d operation(s) failed within a day", r.FailedDay)
	}
	for _, g := range r.Unreadable {
		say("the database of group %s does not answer", g)
	}
	if err := showOne(e, r, fleetColumns); err != nil {
		return err
	}
	if check && len(r.attention) > 0 {
		return errExit{exitPending}
	}
	return nil
}
