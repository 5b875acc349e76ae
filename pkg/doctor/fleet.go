package doctor

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

func itoa(n int32) string { return strconv.Itoa(int(n)) }

var fleetChecks = []Check{
	{Name: "instances", Group: Fleet, About: "the running servers are of one version and give signs of life", run: checkInstances},
	{Name: "shared-schema", Group: Fleet, About: "the shared tables of every group are as this binary needs them", run: checkShared},
	{Name: "files", Group: Fleet, About: "no migration was changed after it had been applied", run: checkFiles},
	{Name: "behind", Group: Fleet, About: "every tenant has all migrations, and this binary serves it", settles: true, run: checkBehind},
	{Name: "failed-migrations", Group: Fleet, About: "no tenant's last migration has failed, or stands half-done", settles: true, run: checkFailed},
	{Name: "operations", Group: Fleet, About: "no operation was left by its process, or waits for one", settles: true, run: checkOperations},
	{Name: "runs", Group: Fleet, About: "no run over the fleet was left by its processes, or is paused for days", settles: true, run: checkRuns},
}

// dead is after how long without a sign of life a server, an operation or a run is taken for left.
const dead = time.Minute

func checkInstances(ctx context.Context, d *Doctor, r *report) error {
	const list = `select version, host || ' (' || pid || ')', heartbeat < pg_catalog.now() - $1::interval, pg_catalog.to_char(heartbeat at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS')
from public.instances order by host, pid`
	versions := map[string][]string{}
	var stale []string
	err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list, dead)
		if err != nil {
			return err
		}
		var version, name, beat string
		var silent bool
		_, err = pgx.ForEachRow(rows, []any{&version, &name, &silent, &beat}, func() error {
			if silent {
				stale = append(stale, name+" since "+beat)
			} else {
				versions[version] = append(versions[version], name)
			}
			return nil
		})
		return err
	})
	if err != nil {
		return err
	}
	if len(stale) > 0 {
		// Who is alive after all enters itself again with its next sign of life.
		r.found(Warn, "", "oneo doctor --only instances --fix", "%d server(s) are in the list and silent: %s", len(stale), some(stale)).
			by(d.write(postgres.MainGroup, `delete from public.instances where heartbeat < pg_catalog.now() - $1::interval`, dead), "take %d silent server(s) off the list", len(stale))
	}
	if len(versions) > 1 {
		var each []string
		for _, v := range slices.Sorted(maps.Keys(versions)) {
			each = append(each, fmt.Sprintf("%s on %s", v, some(versions[v])))
		}
		r.found(Warn, "", "bring all servers to one version; while they are rolled out this is as it should be", "servers of different versions are running: %s", strings.Join(each, "; "))
	}
	n := 0
	for v, names := range versions {
		n += len(names)
		if v != d.o.Version {
			r.ok("this binary is %s", d.o.Version)
		}
	}
	if n == 0 {
		r.ok("no server is running")
	} else {
		r.ok("%d server(s) running, of version %s", n, strings.Join(slices.Sorted(maps.Keys(versions)), ", "))
	}
	return nil
}

// all is the error of the first group whose database is away.
func (d *Doctor) all(ctx context.Context) error {
	for _, group := range d.o.DB.Groups() {
		if err := d.away(ctx, group); err != nil {
			return err
		}
	}
	return nil
}

// told notes a fault that is itself the finding; an error that says nothing of what was looked at is returned.
func (r *report) told(database string, err error) error {
	f := fault.Of(err)
	switch f.Kind {
	case fault.Pending, fault.Conflict, fault.Invalid:
		r.found(Fail, database, f.Hint, "%s", f.Message)
		return nil
	}
	return err
}

func checkShared(ctx context.Context, d *Doctor, r *report) error {
	if err := d.all(ctx); err != nil {
		return err
	}
	if err := d.o.Migrate.SharedBehind(ctx); err != nil {
		return r.told("", err)
	}
	if d.o.Tables != nil {
		if err := d.o.Tables(ctx); err != nil {
			return r.told("", err)
		}
	}
	r.ok("group %d, shared %d", d.o.Migrate.Head(migrate.GroupSet), d.o.Migrate.Head(migrate.SharedSet))
	return nil
}

func checkFiles(ctx context.Context, d *Doctor, r *report) error {
	for _, group := range d.o.DB.Groups() {
		if err := d.away(ctx, group); err != nil {
			r.unseen(group, err)
			continue
		}
		err := d.o.Migrate.CheckApplied(ctx, group)
		if err == nil {
			continue
		}
		if f := fault.Of(err); f.Code == "newer_database" {
			r.found(Warn, group, f.Hint, "%s", f.Message)
		} else if err := r.told(group, err); err != nil {
			r.unseen(group, err)
		}
	}
	r.ok("%d tenant migration(s), as they were applied", d.o.Migrate.Head(migrate.TenantSet))
	return nil
}

func checkBehind(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.places(ctx, r)
	if err != nil {
		return err
	}
	tenants := 0
	for _, group := range d.o.DB.Groups() {
		s, ok := w.groups[group]
		if !ok {
			continue
		}
		by := s.byNumber()
		for _, p := range s.placements {
			if served(p.state) {
				tenants++
			}
		}
		behind, err := d.o.Migrate.TenantsBehind(ctx, group)
		if err != nil { // changed files, which are found by name
			r.unseen(group, err)
			continue
		}
		var lack, beside []string
		for _, b := range behind {
			switch {
			case w.open[b.Number] || !served(by[b.Number].state):
			case b.Beside:
				beside = append(beside, w.called(b.Number))
			default:
				lack = append(lack, w.called(b.Number))
			}
		}
		if len(lack) > 0 {
			r.found(Warn, group, "oneo migrate --all-tenants", "%d tenant(s) lack migrations: %s", len(lack), some(lack))
		}
		if len(beside) > 0 {
			r.found(Warn, group, "oneo migrate --all-tenants", "a data migration is not at its end at %d tenant(s): %s", len(beside), some(beside))
		}
		numbers, err := d.o.DB.OutOfRange(ctx, group)
		if err != nil {
			r.unseen(group, err)
			continue
		}
		var refused []string
		for _, n := range numbers {
			refused = append(refused, w.called(n))
		}
		if len(refused) > 0 {
			r.found(Fail, group, "oneo migrate --all-tenants, or use the newer oneo", "%d tenant(s) are not served by this binary, whose code does not fit their version: %s", len(refused), some(refused))
		}
	}
	r.ok("%d tenant(s) at version %d", tenants, d.o.Migrate.Head(migrate.TenantSet))
	return nil
}

// served reports whether a placement in the state is a living tenant's.
func served(state string) bool { return state == "active" || state == "suspended" || state == "moving" }

// failures are the tasks of the newest migration of each tenant that have failed; a tenant that has come to the version by
// another way since is told apart by its placement.
const failures = `select tenant, to_version, run::text from (
	select distinct on (t.tenant) t.tenant, t.state, t.to_version, t.run from public.tasks t join public.operations o on o.id = t.run
	where o.kind = 'run.migrate' and t.state in ('ok', 'skipped', 'failed') order by t.tenant, t.finished_at desc nulls last
) newest where state = 'failed' order by tenant`

func checkFailed(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	version := map[int32]int32{}
	for _, s := range w.groups {
		for _, p := range s.placements {
			if served(p.state) {
				version[p.number] = p.version
			}
		}
	}
	byRun := map[string][]string{}
	err = d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, failures)
		if err != nil {
			return err
		}
		var number int32
		var to *int32
		var run string
		_, err = pgx.ForEachRow(rows, []any{&number, &to, &run}, func() error {
			if at, ok := version[number]; ok && (to == nil || at < *to) {
				byRun[run] = append(byRun[run], w.called(number))
			}
			return nil
		})
		return err
	})
	if err != nil {
		return err
	}
	for _, run := range slices.Sorted(maps.Keys(byRun)) {
		r.found(Warn, "", "oneo migrate run show "+run+"; once it is mended: oneo migrate run retry "+run,
			"the last migration of %d tenant(s) has failed: %s", len(byRun[run]), some(byRun[run]))
	}
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		const left = `select tenant from public.progress where not beside and updated_at < pg_catalog.now() - $1::interval order by tenant`
		rows, err := tx.Query(ctx, left, dead)
		if err != nil {
			return err
		}
		numbers, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		var names []string
		for _, n := range numbers {
			names = append(names, w.called(n))
		}
		if len(names) > 0 {
			r.found(Warn, group, "oneo migrate --all-tenants goes on where it stopped", "a migration was begun and left at %d tenant(s): %s", len(names), some(names))
		}
		return err
	})
	r.ok("none has failed or is left")
	return nil
}

func checkOperations(ctx context.Context, d *Doctor, r *report) error {
	const list = `select o.kind, coalesce(nullif(o.slug, ''), t.slug, ''), o.state, o.id::text, o.attempts from public.operations o left join public.tenants t on t.number = o.tenant
where o.kind not like 'run.%' and (o.state = 'running' and coalesce(o.heartbeat, o.created_at) < pg_catalog.now() - $1::interval
	or o.state = 'queued' and o.created_at < pg_catalog.now() - $1::interval) order by o.created_at, o.id`
	return d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list, dead)
		if err != nil {
			return err
		}
		var queued []string
		var kind, slug, state, id string
		var attempts int
		_, err = pgx.ForEachRow(rows, []any{&kind, &slug, &state, &id, &attempts}, func() error {
			if state == "queued" {
				queued = append(queued, kind+" of "+slug)
				return nil
			}
			r.found(Fail, "", "run the command again that began it, or start `oneo serve` with database.owner_url: it goes on with it",
				"%s of %s was left by its process (operation %s, %d attempt(s))", kind, slug, id, attempts)
			return nil
		})
		if len(queued) > 0 {
			r.found(Warn, "", "start `oneo serve` with database.owner_url, which carries them out", "%d operation(s) wait for more than a minute: %s", len(queued), some(queued))
		}
		r.ok("none is left or waits")
		return err
	})
}

func checkRuns(ctx context.Context, d *Doctor, r *report) error {
	const list = `select id::text, kind, state from public.operations where kind like 'run.%' and
	(state = 'running' and coalesce(heartbeat, created_at) < pg_catalog.now() - $1::interval or
	state = 'paused' and coalesce(heartbeat, created_at) < pg_catalog.now() - interval '1 day') order by created_at, id`
	return d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list, dead)
		if err != nil {
			return err
		}
		var id, kind, state string
		_, err = pgx.ForEachRow(rows, []any{&id, &kind, &state}, func() error {
			what := "was left by its processes"
			if state == "paused" {
				what = "is paused for more than a day"
			}
			r.found(Warn, "", "oneo migrate run resume "+id+", or oneo migrate run abort "+id, "the run %s (%s) %s", id, kind, what)
			return nil
		})
		r.ok("none is left or forgotten")
		return err
	})
}
