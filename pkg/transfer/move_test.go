package transfer_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// moving is a fixture with two places: the group main and the group second, and p that knows both.
type moving struct {
	*fixture
	p      parts
	groups map[string]postgres.Group
	second *pgx.Conn
	server *devstack.Postgres // of the second group, where it has one of its own
}

// newMoving makes the second group: another database on the same server, or, with apart, on a server of its own.
func newMoving(t *testing.T, apart bool) *moving {
	t.Helper()
	f := &moving{fixture: newFixture(t)}
	var admin string
	var second postgres.Group
	if apart {
		second, f.server = f.SecondServer(t)
		admin = f.server.URL("oneo")
	} else {
		second = f.SecondGroup(t)
		cfg, err := pgx.ParseConfig(second.URL)
		require.NoError(t, err)
		admin = f.Server.URL(cfg.Database)
	}
	f.groups = map[string]postgres.Group{postgres.MainGroup: f.Group, "second": second}
	f.DB, _, _ = f.Open(t, func(o *postgres.Options) { o.Groups = f.groups })
	f.p = f.on(f.DB, first)
	_, err := f.p.migrate.Shared(t.Context())
	require.NoError(t, err)
	f.second = pgtest.Admin(t, admin)
	return f
}

func (f *moving) move(t tenant.Tenant, group string, change ...func(*provision.MoveRequest)) (provision.Moved, error) {
	r := provision.MoveRequest{Group: group, Keep: time.Hour, Actor: "test"}
	for _, c := range change {
		c(&r)
	}
	return f.p.provision.Move(context.Background(), t.Slug, r)
}

// A move has a restore point in each database that it changes, before it begins.
func TestAMoveHasItsPoints(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	for _, c := range []*pgx.Conn{f.admin, f.second} {
		_, err := c.Exec(t.Context(), postgres.GrantRestorePoints("oneo_owner"))
		require.NoError(t, err)
	}
	done, err := f.move(one, "second")
	require.NoError(t, err)
	const ask = `select string_agg(p.group_name, ' ' order by p.group_name) from public.restore_points p join public.operations o on o.id = p.operation
where o.id = $1 and p.kind = 'tenant.move' and p.tenant = 'acme' and p.at <= o.created_at and p.lsn < pg_current_wal_insert_lsn()`
	var groups string
	require.NoError(t, f.admin.QueryRow(t.Context(), ask, done.Operation).Scan(&groups))
	require.Equal(t, "main second", groups)
}

// whole is what a tenant has, read without any help of the move: every table's rows as text, sessions included.
func (f *moving) whole(c *pgx.Conn, schema string) map[string]string {
	f.t.Helper()
	rows, err := c.Query(context.Background(), `select c.relname::text from pg_class c where c.relnamespace = $1::text::regnamespace and c.relkind in ('r', 'm', 'v') order by 1`, postgres.Quote(schema))
	require.NoError(f.t, err)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(f.t, err)
	have := map[string]string{}
	for _, n := range names {
		var text string
		at := postgres.Quote(schema) + "." + postgres.Quote(n)
		require.NoError(f.t, c.QueryRow(context.Background(), "select coalesce(string_agg(r::text, E'\\n' order by r::text collate \"C\"), '') from "+at+" r").Scan(&text))
		have[n] = text
	}
	return have
}

// writable says at which of the two places the tenant may be written.
func (f *moving) writable(number int32) (places []string) {
	f.t.Helper()
	for name, c := range map[string]*pgx.Conn{postgres.MainGroup: f.admin, "second": f.second} {
		var n int
		require.NoError(f.t, c.QueryRow(context.Background(), `select count(*) from public.placements where number = $1 and state = 'active'`, number).Scan(&n))
		if n > 0 {
			places = append(places, name)
		}
	}
	return places
}

func (f *moving) now(t tenant.Tenant) tenant.Tenant {
	f.t.Helper()
	now, err := registryTenant(f.fixture, t.Slug.String())
	require.NoError(f.t, err)
	return now
}

// write writes one row where t says that the tenant is.
func (f *moving) write(t tenant.Tenant, key string) error {
	return f.DB.InTenant(context.Background(), t, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(context.Background(), `insert into log (what) values ($1)`, key)
		return err
	})
}

func (f *moving) read(t tenant.Tenant) error {
	return f.DB.InTenant(context.Background(), t, postgres.Single, func(tx *postgres.Tx) error {
		var n int
		return tx.QueryRow(context.Background(), `select count(*) from log`).Scan(&n)
	})
}

// A tenant of every kind of column and object, with some of its own, is the same at its new place: its sessions and sequences
// too. The old place refuses whoever still goes there. Then it moves back, and what was left behind expires.
func TestMove(t *testing.T) {
	t.Parallel()
	f := newMoving(t, true)
	one := f.tenant(f.p, "acme")
	f.in(one, rows)
	f.in(one, `create table own (id serial primary key, what text); insert into own (what) values ('mine'); create index on own (what); create view mine as select what from own`)
	before := f.whole(f.admin, "acme")
	require.Equal(t, "(secret)", before["sessions"])
	lines := pgtest.Fingerprint(t, f.admin, "acme", roleOf(t, f.admin, one.Number))

	var told []provision.MoveProgress
	done, err := f.move(one, "second", func(r *provision.MoveRequest) { r.Progress = func(p provision.MoveProgress) { told = append(told, p) } })
	require.NoError(t, err)
	require.Equal(t, "second", done.Tenant.Group)
	require.Equal(t, tenant.Active, done.Tenant.State)
	require.Equal(t, "main", done.From)
	require.Positive(t, done.Rows)
	require.Positive(t, done.Pause)
	require.Greater(t, done.Tenant.Epoch, one.Epoch)
	require.Greater(t, done.Tenant.CacheGeneration, one.CacheGeneration)
	require.Equal(t, before, f.whole(f.second, "acme"))
	require.Equal(t, lines, pgtest.Fingerprint(t, f.second, "acme", roleOf(t, f.second, one.Number)))
	require.Equal(t, []string{"second"}, f.writable(one.Number))
	for _, sql := range []string{`select last_value from %s.tickets`, `select last_value from %s.books_id_seq`} {
		var here, there int64
		require.NoError(t, f.second.QueryRow(t.Context(), fmt.Sprintf(sql, "acme")).Scan(&there))
		require.NoError(t, f.admin.QueryRow(t.Context(), fmt.Sprintf(sql, left(one, done))).Scan(&here))
		require.Equal(t, here, there)
	}
	for _, p := range told {
		require.Contains(t, []string{"copy", "verify"}, p.Step)
		require.Positive(t, p.Frozen)
	}

	// A server that has not heard of it: neither written nor read, and told to come again.
	for _, err := range []error{f.write(one, "stale"), f.read(one)} {
		require.True(t, fault.Is(err, fault.Suspended), "%v", err)
		require.Equal(t, "tenant_moved", fault.Of(err).Code)
	}
	require.NoError(t, f.write(done.Tenant, "at its new place"))
	require.NoError(t, f.read(done.Tenant))
	err = f.DB.AsOwnerIn(t.Context(), one, func(*postgres.OwnerTx) error { return nil })
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	_, err = f.p.migrate.Tenant(t.Context(), one, migrate.TenantOptions{})
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	f.Invariants(t)

	// Again is nothing; back again, while the first copy is still kept.
	again, err := f.move(one, "second")
	require.NoError(t, err)
	require.Zero(t, again.Operation)
	now := f.whole(f.second, "acme")
	back, err := f.move(one, "main")
	require.NoError(t, err)
	require.Equal(t, now, f.whole(f.admin, "acme"))
	require.Equal(t, before, f.whole(f.admin, left(one, done)), "what was left behind first is still there")
	require.Equal(t, []string{"main"}, f.writable(one.Number))
	require.NoError(t, f.write(back.Tenant, "home"))
	f.Invariants(t)

	// What is left behind goes when its time is over: with place and role where the tenant is not, without them where it is.
	n, err := f.p.provision.ExpireMoved(t.Context())
	require.NoError(t, err)
	require.Zero(t, n)
	n, err = f.p.provision.DropMoved(t.Context(), one.Number)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	require.Zero(t, f.there(f.second, one.Number))
	require.Equal(t, 1, f.there(f.admin, one.Number))
	require.NoError(t, f.write(back.Tenant, "still home"))
	f.Invariants(t)
}

// there counts everything that a database has of a tenant, as one place.
func (f *moving) there(c *pgx.Conn, number int32) (n int) {
	f.t.Helper()
	const all = `select greatest((select count(*) from public.placements where number = $1), (select count(*) from public.ledger where set = 'tenant' and tenant = $1),
	(select count(*) from pg_namespace where nspname = 'acme' or nspname like 'oneo_moved_%'), (select count(*) from public.moved where tenant = $1),
	(select count(*) from pg_roles r, public.installation i where r.rolname = 'oneo_' || i.id || '_' || $1))`
	require.NoError(f.t, c.QueryRow(context.Background(), all, number).Scan(&n))
	return n
}

func roleOf(t *testing.T, c *pgx.Conn, number int32) (role string) {
	t.Helper()
	require.NoError(t, c.QueryRow(t.Context(), `select role from public.placements where number = $1`, number).Scan(&role))
	return role
}

func left(t tenant.Tenant, m provision.Moved) string {
	return fmt.Sprintf("oneo_moved_%d_%s", t.Number, m.Operation.String()[28:])
}

// Two groups in one cluster share the tenant's role: it goes when the last copy goes. A suspended tenant stays suspended, a purge
// leaves nothing anywhere.
func TestMoveWithinACluster(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	f.in(one, rows)
	_, err := f.p.provision.Suspend(t.Context(), one.Slug, "test")
	require.NoError(t, err)
	done, err := f.move(one, "second")
	require.NoError(t, err)
	require.Equal(t, tenant.Suspended, done.Tenant.State)
	require.Empty(t, f.writable(one.Number))
	err = f.write(done.Tenant, "no")
	require.True(t, fault.Is(err, fault.Suspended), "%v", err)
	require.Equal(t, "tenant_suspended", fault.Of(err).Code)
	f.Invariants(t)
	n, err := f.p.provision.DropMoved(t.Context(), one.Number)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	done.Tenant, err = f.p.provision.Resume(t.Context(), one.Slug, "test")
	require.NoError(t, err)
	require.NoError(t, f.write(done.Tenant, "yes"), "its role is still there")
	// Away and back once more, then dropped and purged: with all copies.
	for _, group := range []string{"main", "second"} {
		_, err = f.move(one, group)
		require.NoError(t, err)
	}
	_, err = f.p.provision.Drop(t.Context(), one.Slug, time.Hour, "test")
	require.NoError(t, err)
	_, err = f.p.provision.Purge(t.Context(), one.Slug, "test")
	require.NoError(t, err)
	require.Zero(t, f.there(f.admin, one.Number))
	require.Zero(t, f.there(f.second, one.Number))
	f.Invariants(t)
}

// While users write and read, a move loses nothing that was answered, and whoever is refused is told to come again. Reads go on
// until the switch.
func TestMoveUnderLoad(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	var answered sync.Map
	var writes, reads, next atomic.Int64
	stop := make(chan struct{})
	var users sync.WaitGroup
	user := func(stale bool) {
		at := one
		for {
			select {
			case <-stop:
				return
			default:
			}
			if !stale { // a server that asks the registry; the others never hear of anything
				now, err := registryTenant(f.fixture, "acme")
				if err != nil {
					t.Errorf("the registry: %v", err)
					return
				}
				at = now
			}
			key := fmt.Sprint(next.Add(1))
			err := f.write(at, key)
			switch {
			case err == nil:
				answered.Store(key, true)
				writes.Add(1)
			case fault.Is(err, fault.Unavailable), fault.Is(err, fault.Suspended):
			default:
				t.Errorf("a write failed: %v", err)
				return
			}
			switch err := f.read(at); {
			case err == nil:
				reads.Add(1)
			case fault.Is(err, fault.Unavailable), fault.Is(err, fault.Suspended):
			default:
				t.Errorf("a read failed: %v", err)
				return
			}
		}
	}
	for u := range 4 {
		users.Go(func() { user(u%2 == 0) })
	}
	for _, group := range []string{"second", "main", "second"} {
		before := writes.Load()
		require.Eventually(t, func() bool { return writes.Load() > before+50 || t.Failed() }, time.Minute, time.Millisecond)
		_, err := f.move(one, group)
		require.NoError(t, err)
		require.Equal(t, []string{group}, f.writable(one.Number))
	}
	before := writes.Load()
	require.Eventually(t, func() bool { return writes.Load() > before+50 || t.Failed() }, time.Minute, time.Millisecond)
	close(stop)
	users.Wait()
	found, err := f.second.Query(t.Context(), `select what from acme.log`)
	require.NoError(t, err)
	names, err := pgx.CollectRows(found, pgx.RowTo[string])
	require.NoError(t, err)
	have := map[string]bool{}
	for _, n := range names {
		have[n] = true
	}
	n, lost := 0, 0
	answered.Range(func(key, _ any) bool {
		n++
		if !have[key.(string)] {
			lost++
		}
		return true
	})
	require.Zero(t, lost, "of %d", n)
	require.Len(t, names, n, "what was refused was not written")
	require.Greater(t, n, 200)
	f.Invariants(t)
}

// Who was writing when the tenant is frozen is waited for, and what was written is in the copy.
func TestMoveWaitsForWriters(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	written := make(chan struct{})
	var moved sync.WaitGroup
	var werr, merr error
	moved.Go(func() {
		werr = f.DB.InTenant(context.Background(), one, postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(context.Background(), `insert into log (what) values ('in flight')`)
			close(written)
			if err == nil {
				// Until the move waits for this transaction.
				const waits = `select exists (select from pg_locks where locktype = 'advisory' and not granted and database = (select oid from pg_database where datname = current_database()))`
				for there, deadline := false, time.Now().Add(pgtest.Patience); !there && err == nil && time.Now().Before(deadline); time.Sleep(time.Millisecond) {
					err = f.admin.QueryRow(context.Background(), waits).Scan(&there)
				}
			}
			return err
		})
	})
	<-written
	moved.Go(func() { _, merr = f.move(one, "second") })
	moved.Wait()
	require.NoError(t, merr)
	require.NoError(t, werr)
	require.Equal(t, "(1,\"in flight\")", f.whole(f.second, "acme")["log"])
}

// A process that another one has taken up the move of, while it stood still, switches nothing any more.
func TestAMoveTakenForDead(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	for n, place := range []string{"move.frozen", "move.copied", "move.verified"} {
		one := f.tenant(f.p, fmt.Sprintf("acme%d", n))
		f.in(one, rows)
		before := f.whole(f.admin, one.Schema.String())
		on := f.paused(t, one, place)
		_, err := f.admin.Exec(t.Context(), `update public.operations set attempts = attempts + 1 where state = 'running'`) // as whoever takes it up does
		require.NoError(t, err)
		code, out := on()
		require.Equal(t, 1, code, "%s: %s", place, out)
		require.Contains(t, out, "another process has taken the move", place)
		require.Equal(t, postgres.MainGroup, f.now(one).Group, place)
		require.Error(t, f.write(one, "the other one is at work"), place)
		f.again(t, f.p, f.task(one))
		require.Equal(t, before, f.whole(f.second, one.Schema.String()), place)
		require.Equal(t, []string{"second"}, f.writable(one.Number), place)
		f.Invariants(t)
	}
}

// task moves a tenant to where it is not.
func (f *moving) task(t tenant.Tenant) task {
	into := "second"
	if t.Group == into {
		into = postgres.MainGroup
	}
	return task{What: "move", As: t.Slug.String(), Into: into, Base: f.Base.String(), Groups: f.groups}
}

// kill -9 at each place of a move: at no moment can the tenant be written at two places, and the same command, or a server, brings it
// to its end with every row.
func TestKillAMoveEverywhere(t *testing.T) {
	t.Parallel()
	places := []string{}
	for _, place := range failpoint.All {
		switch prefix, _, _ := strings.Cut(place, "."); prefix {
		case "move", "export", "load":
			places = append(places, place+"=exit")
		}
		if place == "export.table" || place == "load.table" {
			places = append(places, place+"=exit@5")
		}
	}
	places = append(places, "export.begun=exit@2") // in the second reading
	f := newMoving(t, false)
	for n, place := range places {
		one := f.tenant(f.p, fmt.Sprintf("acme%d", n))
		schema := one.Schema.String()
		f.in(one, rows)
		before := f.whole(f.admin, schema)
		code, out := f.task(one).process(t, place)
		require.Equal(t, 137, code, "%s: %s", place, out)
		require.LessOrEqual(t, len(f.writable(one.Number)), 1, place)
		if n%2 == 0 || place == "move.before=exit" {
			f.again(t, f.p, f.task(one))
		} else {
			f.worked(t)
		}
		now := f.now(one)
		require.Equal(t, "second", now.Group, place)
		require.Equal(t, []string{"second"}, f.writable(one.Number), place)
		require.Equal(t, before, f.whole(f.second, schema), place)
		require.NoError(t, f.write(now, "afterwards"), place)
		require.Error(t, f.write(one, "stale"), place)
		require.Zero(t, f.count(`select count(*) from public.operations where state = 'running'`), place)
		require.Equal(t, 1, f.count(`select count(*) from public.moved where tenant = $1`, one.Number), place)
		f.Invariants(t)
	}
}

// worked lets a server work until no operation is open.
func (f *moving) worked(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	over := make(chan error, 1)
	go func() { over <- f.p.provision.Work(ctx) }()
	require.Eventually(t, func() bool {
		f.died()
		return f.count(`select count(*) from public.operations where state = 'running'`) == 0
	}, pgtest.Patience, 50*time.Millisecond)
	cancel()
	require.NoError(t, <-over)
}

// paused begins a move in a process of its own, and returns once it waits at the place; on lets it go on and returns how it ended.
func (f *moving) paused(t *testing.T, one tenant.Tenant, place string) (on func() (code int, out string)) {
	t.Helper()
	gate := filepath.Join(t.TempDir(), "go on")
	type end struct {
		code int
		out  string
	}
	ended := make(chan end, 1)
	k := f.task(one)
	k.Away = f.server != nil
	go func() {
		code, out := k.process(t, place+"=wait:"+gate)
		ended <- end{code, out}
	}()
	open := func() { require.NoError(t, os.WriteFile(gate, nil, 0o600)) }
	t.Cleanup(open) // also when the test fails
	f.reached(t, one, place)
	return func() (int, string) {
		open()
		e := <-ended
		return e.code, e.out
	}
}

// reached waits until a move of a tenant, as it was before, has come to a place, as the databases show it.
func (f *moving) reached(t *testing.T, one tenant.Tenant, place string) {
	t.Helper()
	from, to := f.admin, f.second
	if one.Group != postgres.MainGroup {
		from, to = to, from
	}
	is := func(c *pgx.Conn, state string) (is bool) {
		const ask = `select exists (select from public.placements where number = $1 and state = $2)`
		require.NoError(t, c.QueryRow(context.Background(), ask, one.Number, state).Scan(&is))
		return is
	}
	require.Eventually(t, func() bool {
		switch place {
		case "move.frozen":
			return is(from, "moving")
		case "move.copied", "move.verified":
			return is(to, "arriving")
		default:
			return f.now(one).Group != one.Group
		}
	}, pgtest.Patience, 10*time.Millisecond)
}

// The target goes away before the switch: the tenant goes on where it was, and when the target is back the same command
// succeeds. Behind the switch it waits for the target, and nobody writes anywhere meanwhile.
func TestTargetGoesAway(t *testing.T) {
	t.Parallel()
	f := newMoving(t, true)
	type begun struct {
		place    string
		one      tenant.Tenant
		before   map[string]string
		on       func() (int, string)
		switched bool
	}
	var all []*begun
	for n, place := range []string{"move.frozen", "move.copied", "move.verified", "move.switched"} {
		b := &begun{place: place, one: f.tenant(f.p, fmt.Sprintf("acme%d", n))}
		f.in(b.one, rows)
		b.before = f.whole(f.admin, b.one.Schema.String())
		b.on = f.paused(t, b.one, place)
		require.NoError(t, f.read(b.one), "it is read while it moves")
		err := f.write(b.one, "no")
		require.True(t, fault.Is(err, fault.Suspended), "%s: %v", place, err)
		all = append(all, b)
	}
	require.NoError(t, f.server.Stop(t.Context()))
	var ended sync.WaitGroup
	for _, b := range all { // each waits for the server for a while
		ended.Go(func() {
			if code, out := b.on(); code == 0 {
				t.Errorf("%s: %s", b.place, out)
			}
		})
	}
	ended.Wait()
	for _, b := range all {
		b.switched = f.now(b.one).Group == "second" // the switch needs no target
		switch b.place {
		case "move.frozen", "move.copied":
			require.False(t, b.switched, b.place)
		case "move.switched":
			require.True(t, b.switched, b.place)
		}
		if b.switched {
			require.Error(t, f.write(b.one, "no"), b.place)
		} else {
			require.NoError(t, f.write(b.one, "goes on"), b.place)
			require.Zero(t, f.count(`select count(*) from public.operations where state = 'running' and tenant = $1`, b.one.Number), b.place)
			f.in(b.one, `delete from log where what = 'goes on'`)
		}
	}
	require.NoError(t, f.server.Restart(t.Context()))
	f.second = pgtest.Admin(t, f.server.URL("oneo"))
	_, err := f.p.provision.ExpireMoved(t.Context())
	require.NoError(t, err)
	for _, b := range all {
		schema := b.one.Schema.String()
		require.LessOrEqual(t, len(f.writable(b.one.Number)), 1, b.place)
		if !b.switched {
			var there int
			const left = `select (select count(*) from public.placements where number = $1) + (select count(*) from pg_namespace where nspname = $2)`
			require.NoError(t, f.second.QueryRow(t.Context(), left, b.one.Number, schema).Scan(&there))
			require.Zero(t, there, "%s: what had arrived is destroyed", b.place)
		}
		f.again(t, f.p, f.task(b.one))
		require.Equal(t, b.before, f.whole(f.second, schema), b.place)
		require.NoError(t, f.write(f.now(b.one), "arrived"), b.place)
		require.Equal(t, []string{"second"}, f.writable(b.one.Number), b.place)
	}
	f.Invariants(t)
}

// The source goes away. Before the copy is made the tenant waits for it, frozen; then the move goes on without it, and retires
// it when it is back. Until then nobody is served by it.
func TestSourceGoesAway(t *testing.T) {
	t.Parallel()
	f := newMoving(t, true)
	type begun struct {
		place  string
		one    tenant.Tenant
		before map[string]string
		on     func() (int, string)
	}
	var all []*begun
	for n, place := range []string{"move.frozen", "move.copied", "move.switched"} {
		b := &begun{place: place, one: f.tenant(f.p, fmt.Sprintf("acme%d", n))}
		f.in(b.one, rows)
		_, err := f.move(b.one, "second")
		require.NoError(t, err)
		dropped, err := f.p.provision.DropMoved(t.Context(), b.one.Number)
		require.NoError(t, err)
		require.Equal(t, 1, dropped)
		b.one = f.now(b.one)
		b.before = f.whole(f.second, b.one.Schema.String())
		b.on = f.paused(t, b.one, place) // on the way back
		all = append(all, b)
	}
	require.NoError(t, f.server.Stop(t.Context()))
	var ended sync.WaitGroup
	for _, b := range all { // each waits for the server for a while
		ended.Go(func() {
			if code, out := b.on(); code == 0 {
				t.Errorf("%s: %s", b.place, out)
			}
		})
	}
	ended.Wait()
	for _, b := range all {
		now := f.now(b.one)
		if b.place == "move.frozen" {
			require.Equal(t, "second", now.Group, b.place)
		} else {
			require.Equal(t, postgres.MainGroup, now.Group, b.place)
			require.NoError(t, f.write(now, "served"), b.place)
		}
		require.Equal(t, 1, f.count(`select count(*) from public.operations where state = 'running' and tenant = $1`, b.one.Number), b.place)
	}
	require.NoError(t, f.server.Restart(t.Context()))
	f.second = pgtest.Admin(t, f.server.URL("oneo"))
	for _, b := range all {
		require.LessOrEqual(t, len(f.writable(b.one.Number)), 1, b.place)
		require.Error(t, f.write(b.one, "stale"), b.place)
	}
	f.worked(t)
	for _, b := range all {
		require.Equal(t, []string{postgres.MainGroup}, f.writable(b.one.Number), b.place)
		f.in(f.now(b.one), `delete from log where what = 'served'`)
		require.Equal(t, b.before, f.whole(f.admin, b.one.Schema.String()), b.place)
		var kept int
		require.NoError(t, f.second.QueryRow(t.Context(), `select count(*) from public.moved where tenant = $1`, b.one.Number).Scan(&kept))
		require.Equal(t, 1, kept, b.place)
	}
	f.Invariants(t)
}

// A step that fails is undone before the switch and finished behind it, also where only its answer was lost: then, or by the
// same command.
func TestAMoveThatFails(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	for n, place := range failpoint.All {
		if !strings.HasPrefix(place, "move.") && place != "export.table" && place != "load.checked" {
			continue
		}
		one := f.tenant(f.p, fmt.Sprintf("acme%d", n))
		schema := one.Schema.String()
		f.in(one, rows)
		before := f.whole(f.admin, schema)
		code, out := f.task(one).process(t, place+"=error")
		open := f.count(`select count(*) from public.operations where state = 'running'`)
		switch place {
		case "move.switched": // it had switched, and found that out
			require.Zero(t, code, "%s: %s", place, out)
			require.Zero(t, open, place)
		case "move.retired", "move.opened", "move.finish":
			require.Equal(t, 1, code, "%s: %s", place, out)
			require.Equal(t, 1, open, place)
		default:
			require.Equal(t, 1, code, "%s: %s", place, out)
			require.Zero(t, open, place)
			if place != "move.after" {
				require.NoError(t, f.write(one, "goes on"), place)
				f.in(one, `delete from log where what = 'goes on'`)
			}
		}
		require.LessOrEqual(t, len(f.writable(one.Number)), 1, place)
		if open == 0 {
			f.Invariants(t)
		}
		f.again(t, f.p, f.task(one))
		require.Equal(t, before, f.whole(f.second, schema), place)
		require.Equal(t, []string{"second"}, f.writable(one.Number), place)
		f.Invariants(t)
	}
}

// What arrived is not what was sent: the move is undone, and says so.
func TestMoveThatDiffers(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	f.in(one, rows)
	for what, sql := range map[string]string{
		"rows":      `update acme.authors set born = '1900-01-01' where name = 'Ada'`,
		"a row":     `delete from acme.types where id = 3`,
		"sequence":  `select setval('acme.tickets', 1000)`,
		"structure": `alter table acme.log add column more text`,
		"index":     `drop index acme.titles`,
	} {
		on := f.paused(t, one, "move.copied")
		_, err := f.second.Exec(t.Context(), sql)
		require.NoError(t, err, what)
		code, out := on()
		require.Equal(t, 1, code, "%s: %s", what, out)
		require.Contains(t, out, "what has arrived is not what was sent", what)
		require.NoError(t, f.write(one, "goes on"), what)
		require.Equal(t, []string{"main"}, f.writable(one.Number), what)
		require.Zero(t, f.there(f.second, one.Number)-1, "%s: the role is the same cluster's", what)
		f.Invariants(t)
	}
}

// Whatever would change the tenant while it moves, or goes on after its process has died, waits or is refused.
func TestBesideAMove(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	f.in(one, rows)
	later := f.on(f.DB, first, `alter table log add column more text`)
	code, out := f.task(one).process(t, "move.copied=exit")
	require.Equal(t, 137, code, out)
	_, err := later.migrate.Tenant(t.Context(), one, migrate.TenantOptions{})
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	require.Error(t, f.DB.AsOwnerIn(t.Context(), one, func(*postgres.OwnerTx) error { return errors.New("must not be called") }))
	b, _ := f.export(f.p, one)
	require.NotEmpty(t, b, "it can be exported")
	// Two at once: one does it, the other waits for that, or is told to.
	f.died()
	var both sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		both.Go(func() { _, errs[i] = f.move(one, "second") })
	}
	both.Wait()
	for _, err := range errs {
		if err != nil {
			require.True(t, fault.Is(err, fault.Locked), "%v", err)
		}
	}
	require.Equal(t, []string{"second"}, f.writable(one.Number))
	res, err := later.migrate.Tenant(t.Context(), f.now(one), migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, 2, res.To)
	f.Invariants(t)
}

// What stands in the way is told before anything is frozen, by the dry run as well.
func TestMoveRefused(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	f.in(one, rows)
	refused := func(code string, change ...func(*provision.MoveRequest)) {
		t.Helper()
		r := provision.MoveRequest{Group: "second", Keep: time.Hour, Actor: "test"}
		for _, c := range change {
			c(&r)
		}
		_, _, err := f.p.provision.MayMove(t.Context(), one.Slug, r)
		require.Error(t, err)
		require.Equal(t, code, fault.Of(err).Code, "%v", err)
		_, err = f.p.provision.Move(t.Context(), one.Slug, r)
		require.Equal(t, code, fault.Of(err).Code, "%v", err)
		require.NoError(t, f.write(one, "goes on"))
		require.Zero(t, f.count(`select count(*) from public.operations where state = 'running'`))
	}
	sql := func(c *pgx.Conn, sql string) {
		t.Helper()
		_, err := c.Exec(t.Context(), sql)
		require.NoError(t, err)
	}
	refused("unknown_group", func(r *provision.MoveRequest) { r.Group = "nowhere" })
	refused("invalid_keep", func(r *provision.MoveRequest) { r.Keep = 0 })
	sql(f.second, `create schema acme`)
	refused("schema_exists")
	sql(f.second, `drop schema acme`)
	sql(f.admin, `insert into public.groups (name, accepting) values ('second', false)`)
	refused("group_closed")
	sql(f.admin, `update public.groups set accepting = true, max_tenants = 0 where name = 'second'`)
	refused("group_full")
	sql(f.admin, `update public.groups set max_tenants = null`)
	sql(f.admin, `insert into public.progress (tenant, version, checksum) values (`+fmt.Sprint(one.Number)+`, 2, decode(repeat('00', 32), 'hex'))`)
	refused("migration_unfinished")
	sql(f.admin, `delete from public.progress`)
	b, _ := f.export(f.p, one)
	restored, err := f.restore(f.p, one, b)
	require.NoError(t, err)
	refused("undo_kept")
	var other string
	require.NoError(t, f.second.QueryRow(t.Context(), `update public.installation set id = 'ffffffff' returning id`).Scan(&other))
	fresh, _, _ := f.Open(t, func(o *postgres.Options) { o.Groups = f.groups })
	_, _, err = f.on(fresh, first).provision.MayMove(t.Context(), one.Slug, provision.MoveRequest{Group: "second", Keep: time.Hour})
	require.Equal(t, "other_installation", fault.Of(err).Code, "%v", err)
	f.p = f.on(f.DB, first)

	sql(f.second, `update public.installation set id = (select '`+installation(t, f.admin)+`')`)
	_, err = f.move(one, "second", func(r *provision.MoveRequest) { r.Force = true })
	require.NoError(t, err)
	_, err = f.p.provision.Return(t.Context(), one.Slug, restored.Operation, "test")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	n, err := f.p.provision.ExpireReplaced(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	_, err = f.p.provision.Drop(t.Context(), one.Slug, time.Hour, "test")
	require.NoError(t, err)
	_, err = f.move(one, "main")
	require.Equal(t, "wrong_state", fault.Of(err).Code, "%v", err)
	f.Invariants(t)
}

func installation(t *testing.T, c *pgx.Conn) (id string) {
	t.Helper()
	require.NoError(t, c.QueryRow(t.Context(), `select id from public.installation`).Scan(&id))
	return id
}

// The row of the operation tells how far it is, and its end what was done.
func TestAMoveIsTold(t *testing.T) {
	t.Parallel()
	f := newMoving(t, false)
	one := f.tenant(f.p, "acme")
	on := f.paused(t, one, "move.copied")
	var phase string
	require.NoError(t, f.admin.QueryRow(t.Context(), `select request->'move'->>'phase' from public.operations where state = 'running'`).Scan(&phase))
	require.Equal(t, "frozen", phase)
	code, out := on()
	require.Zero(t, code, out)
	var result, audit json.RawMessage
	require.NoError(t, f.admin.QueryRow(t.Context(), `select o.result, a.details from public.operations o join public.audit a on a.action = o.kind and a.tenant = o.tenant
where o.kind = 'tenant.move' and o.tenant = $1`, one.Number).Scan(&result, &audit))
	require.JSONEq(t, string(result), string(audit))
	var told map[string]any
	require.NoError(t, json.Unmarshal(result, &told))
	require.Equal(t, "main", told["from"])
	require.Equal(t, "second", told["to"])
	op, err := f.operation(one)
	require.NoError(t, err)
	require.Equal(t, registry.Done, op.State)
}

func (f *moving) operation(t tenant.Tenant) (op registry.Operation, err error) {
	err = f.DB.AsOwner(context.Background(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ops, err := registry.Operations(context.Background(), tx, 1, nil)
		if err == nil {
			op = ops[0]
		}
		return err
	})
	return op, err
}
