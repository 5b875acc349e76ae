package backup_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
	"github.com/oneo-crm/oneo/schemas"
)

const fullTask = "BACKUP_TEST_FULL"

// place is an installation of two groups, main and second.
type place struct {
	t      testing.TB
	env    *pgtest.Env
	groups map[string]postgres.Group
	db     *postgres.DB
	m      *migrate.Migrator
	p      *provision.Provisioner
	*shelf
	admin map[string]*pgx.Conn
}

var notes = fstest.MapFS{"0001_notes.up.sql": &fstest.MapFile{Data: []byte(`create table notes (id integer generated always as identity primary key, body text not null, amount bigint not null default 0)`)}}

// later has one migration more, which rewrites the table.
var later = fstest.MapFS{"0001_notes.up.sql": notes["0001_notes.up.sql"], "0002_wide.up.sql": &fstest.MapFile{Data: []byte(`alter table notes alter amount type numeric`)}}

// assemble is an installation as a process opens it.
func assemble(db *postgres.DB, dir string, files fstest.MapFS, wait time.Duration) (m *migrate.Migrator, p *provision.Provisioner, b *shelf, err error) {
	log := slog.New(slog.DiscardHandler)
	if m, err = migrate.New(db, migrate.Options{Files: schemas.Files, Tenant: files}); err != nil {
		return nil, nil, nil, err
	}
	checker, err := structure.New(structure.Options{DB: db, Head: m.Head(migrate.TenantSet), Make: m.Create})
	if err != nil {
		return nil, nil, nil, err
	}
	base, err := tenant.ParseHost("localhost")
	if err != nil {
		return nil, nil, nil, err
	}
	o := provision.Options{DB: db, Migrate: m, Structure: checker, BaseDomain: base, DropGrace: time.Hour, GateWait: wait, StaleAfter: min(wait, 10*time.Second), Secret: pgtest.Secret, Logger: log}
	b = &shelf{}
	o.Archives, o.PoolSize = b, 1
	o.Uncache = func(_ context.Context, t tenant.Tenant) (int, error) {
		b.uncached.Store(t.Slug.String(), true)
		return 0, nil
	}
	if p, err = provision.New(o); err != nil {
		return nil, nil, nil, err
	}
	x, err := transfer.New(transfer.Options{DB: db, Migrate: m, Structure: checker, Provision: p, BaseDomain: base, Version: "test", LockWait: wait, Logger: log})
	if err != nil {
		return nil, nil, nil, err
	}
	s, err := store.NewDir(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	b.o = backup.Options{Store: s, DB: db, Transfers: x, Secret: pgtest.Secret, Environ: os.Environ(), Logger: log}
	b.Backups, err = backup.New(b.o)
	return m, p, b, err
}

// shelf is the store, which is opened later than the provisioner, and what was taken out of the cache, by names.
type shelf struct {
	*backup.Backups
	o        backup.Options
	uncached sync.Map
}

func newPlace(t testing.TB, dir string) *place {
	t.Helper()
	f := &place{t: t, env: pgtest.New(t), admin: map[string]*pgx.Conn{}}
	second := f.env.SecondGroup(t)
	f.groups = map[string]postgres.Group{postgres.MainGroup: f.env.Group, "second": second}
	f.db, _, _ = f.env.Open(t, func(o *postgres.Options) { o.Groups, o.OwnerConns = f.groups, 6 })
	f.open(dir, notes, pgtest.Patience)
	_, err := f.m.Shared(t.Context())
	require.NoError(t, err)
	f.admin[postgres.MainGroup] = pgtest.Admin(t, f.env.AdminURL)
	there, err := pgx.ParseConfig(second.URL)
	require.NoError(t, err)
	f.admin["second"] = pgtest.Admin(t, f.env.Server.URL(there.Database))
	return f
}

func (f *place) open(dir string, files fstest.MapFS, wait time.Duration) {
	f.t.Helper()
	var err error
	f.m, f.p, f.shelf, err = assemble(f.db, dir, files, wait)
	require.NoError(f.t, err)
}

func (f *place) tenant(slug, group string, rows int) tenant.Tenant {
	f.t.Helper()
	host, err := tenant.ParseHost(slug + ".example")
	require.NoError(f.t, err)
	made, err := f.p.Create(f.t.Context(), provision.CreateRequest{Slug: pgtest.Slug(f.t, slug), Group: group, Domains: []tenant.Host{host}, Settings: []byte(`{"of": "` + slug + `"}`), Actor: "test"})
	require.NoError(f.t, err)
	f.in(made, fmt.Sprintf(`insert into notes (body, amount) select 'note ' || g || ' of %s', 100 from generate_series(1, %d) g`, slug, rows))
	return made
}

func (f *place) in(t tenant.Tenant, sql string) {
	f.t.Helper()
	ctx := f.t.Context()
	require.NoError(f.t, f.db.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error { return tx.Script(ctx, sql) }))
}

// text is what a query of one value answers in a group's database.
func (f *place) text(group, sql string, args ...any) (s string) {
	f.t.Helper()
	require.NoError(f.t, f.admin[group].QueryRow(f.t.Context(), sql, args...).Scan(&s))
	return s
}

func (f *place) full(o backup.FullOptions) backup.Full {
	f.t.Helper()
	o.Actor = "test"
	made, warning, err := f.CreateFull(f.t.Context(), o)
	require.NoError(f.t, err)
	require.Empty(f.t, warning)
	found, err := f.FindFull(f.t.Context(), made.ID[:8])
	require.NoError(f.t, err)
	require.Equal(f.t, made.ID, found.ID)
	return found
}

func restoring() backup.FullRestore {
	return backup.FullRestore{Jobs: 2, Loading: transfer.Loading{Actor: "test"}}
}

func (f *place) restore(made backup.Full, o backup.FullRestore) backup.FullRestored {
	f.t.Helper()
	done, err := f.RestoreFull(f.t.Context(), made, o)
	require.NoError(f.t, err)
	for _, r := range done.Tenants {
		require.NoError(f.t, r.Err, r.Slug)
	}
	return done
}

// state is all that must come back, in words: of the registry and of each group's tenants.
func (f *place) state() map[string]string {
	f.t.Helper()
	all := map[string]string{}
	all["tenants"] = f.text("main", `select string_agg(concat_ws(' ', number, id, slug, schema, name, group_name, state, state_before, settings, created_at), E'\n' order by number) from public.tenants`)
	all["domains"] = f.text("main", `select string_agg(concat_ws(' ', host, tenant, is_primary, created_at), E'\n' order by host) from public.domains`)
	all["administrators"] = f.text("main", `select coalesce(string_agg(a::text, E'\n' order by a.id), '') from public.administrators a`)
	for group, c := range f.admin {
		all[group+" ledger"] = f.text(group, `select coalesce(string_agg(l::text, E'\n' order by l.tenant, l.version), '') from public.ledger l where set = 'tenant'`)
		all[group+" placements"] = f.text(group, `select coalesce(string_agg(concat_ws(' ', number, schema, state, version, reader), E'\n' order by number), '') from public.placements`)
		rows, err := c.Query(f.t.Context(), `select p.number, p.schema from public.placements p order by 1`)
		require.NoError(f.t, err)
		schemas := map[int32]string{}
		var number int32
		var schema string
		_, err = pgx.ForEachRow(rows, []any{&number, &schema}, func() error { schemas[number] = schema; return nil })
		require.NoError(f.t, err)
		for number, schema := range schemas {
			name := fmt.Sprintf("%d notes", number)
			all[name] = f.text(group, `select coalesce(string_agg(n::text, E'\n' order by n.id), '') from `+postgres.Quote(schema)+`.notes n`)
			all[name+" sequence"] = f.text(group, `select last_value || ' ' || is_called from `+postgres.Quote(schema)+`.notes_id_seq`)
		}
	}
	return all
}

// fleet makes a tenant of each state in both groups.
func (f *place) fleet() (all []tenant.Tenant) {
	f.t.Helper()
	ctx := f.t.Context()
	for n, group := range []string{"main", "second"} {
		all = append(all, f.tenant(fmt.Sprintf("acme-%d", n), group, 30), f.tenant(fmt.Sprintf("sleepy-%d", n), group, 2), f.tenant(fmt.Sprintf("gone-%d", n), group, 3))
		_, err := f.p.Suspend(ctx, pgtest.Slug(f.t, fmt.Sprintf("sleepy-%d", n)), "test")
		require.NoError(f.t, err)
		_, err = f.p.Drop(ctx, pgtest.Slug(f.t, fmt.Sprintf("gone-%d", n)), time.Hour*24*365, "test")
		require.NoError(f.t, err)
	}
	_, err := f.admin["main"].Exec(ctx, `insert into public.administrators (id, email, password_hash) values (gen_random_uuid(), 'root@example.com', 'x')`)
	require.NoError(f.t, err)
	_, err = f.admin["main"].Exec(ctx, `insert into public.administrator_sessions (token_hash, user_id, expires_at) select 'x', id, now() + interval '1 day' from public.administrators`)
	require.NoError(f.t, err)
	return all
}

// All of two groups goes into an empty installation, and is there what it was, but for sessions.
func TestFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	fleet := f.fleet()
	_, err := f.admin["main"].Exec(t.Context(), `update public.tenants set purge_after = now() - interval '1 day' where slug = 'gone-0'`) // no server has come by
	require.NoError(t, err)
	was := f.state()
	// What had not ended then is over afterwards.
	_, err = f.admin["main"].Exec(t.Context(), `insert into public.operations (id, kind, slug, state) values (gen_random_uuid(), 'tenant.create', 'later', 'queued');
insert into public.tenants (slug, schema, state) values ('half', 'half', 'creating')`)
	require.NoError(t, err)
	made := f.full(backup.FullOptions{Jobs: 3, Reason: "why"})
	_, err = f.admin["main"].Exec(t.Context(), `delete from public.tenants where slug = 'half'`)
	require.NoError(t, err)
	require.Equal(t, []string{"main", "second"}, made.Of())
	require.Equal(t, 6, made.Tenants())
	require.Empty(t, made.LeftOut())
	require.Contains(t, made.Consistency, "not consistent with each other")
	require.Equal(t, was, f.state(), "a backup changes nothing")
	require.Equal(t, "0", f.text("main", `select count(*) from public.holds`))
	require.NoError(t, f.VerifyFull(t.Context(), made, 2, false, nil))
	c, err := f.ListFull(t.Context())
	require.NoError(t, err)
	require.Len(t, c.Backups, 1)
	require.Empty(t, c.Loose)
	one, err := f.List(t.Context(), "")
	require.NoError(t, err)
	require.Empty(t, one.Backups, "the lists of tenants' backups know nothing of it")
	require.Empty(t, one.Bad)
	require.Empty(t, one.Loose)

	g := newPlace(t, dir)
	done := g.restore(made, backup.FullRestore{Group: "second", Loading: transfer.Loading{Actor: "test"}})
	require.Len(t, done.Tenants, 3)
	require.Equal(t, 3, done.Waiting)
	// What waits is not served, not changed and not made anew.
	waits := fleet[0]
	err = g.db.InTenant(t.Context(), waits, postgres.Read, func(*postgres.Tx) error { return nil })
	require.Error(t, err)
	require.Equal(t, "creating", g.text("main", `select state from public.tenants where number = $1`, waits.Number))
	quick := *g
	quick.open(dir, notes, 100*time.Millisecond)
	_, err = quick.p.Suspend(t.Context(), waits.Slug, "test")
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	_, err = quick.p.Create(t.Context(), provision.CreateRequest{Slug: waits.Slug, Actor: "test"})
	require.True(t, fault.Is(err, fault.Locked), "%v", err)

	done = g.restore(made, restoring())
	require.Len(t, done.Tenants, 3)
	require.Equal(t, was, g.state())
	require.Equal(t, "0", g.text("main", `select count(*) from public.administrator_sessions`))
	require.Empty(t, done.LeftOut)
	require.Equal(t, "0", g.text("main", `select count(*) from public.operations where state not in ('done', 'failed')`))
	require.Equal(t, "true", g.text("main", `select (purge_after > now())::text from public.tenants where slug = 'gone-0'`), "it would be purged at once")
	for _, tn := range fleet {
		_, is := g.uncached.Load(tn.Slug.String())
		require.True(t, is, tn.Slug)
	}
	require.True(t, g.restore(made, restoring()).Before)
	require.NoError(t, g.db.InTenant(t.Context(), fleet[0], postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), `insert into notes (body) values ('after')`)
		return err
	}))
	require.Equal(t, "31", g.text("main", `select max(id)::text from acme_0.notes`))
	next := g.tenant("next", "second", 1)
	require.Greater(t, next.Number, fleet[5].Number)
	back, err := g.p.Undrop(t.Context(), pgtest.Slug(t, "gone-1"), "test")
	require.NoError(t, err)
	require.Equal(t, tenant.Active, back.State)
	g.env.Invariants(t)
	// And once more from there.
	again := g.full(backup.FullOptions{Groups: []string{"second"}})
	require.Equal(t, []string{"second"}, again.Of())
	require.Equal(t, 4, again.Tenants())

	// Nowhere else than into an empty installation.
	_, err = f.RestoreFull(t.Context(), made, restoring())
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "not empty")
	require.Equal(t, was, f.state())
}

// While a tenant has not been copied nothing changes its structure; those that have are free, and so is everybody who is new.
// Who empties a table past oneo's locks is found out.
func TestFullHoldsBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	var ts []tenant.Tenant
	for i := range 5 {
		ts = append(ts, f.tenant(fmt.Sprintf("t%d", i), []string{"main", "second"}[i/3], 5))
	}
	quick := *f
	quick.open(dir, later, 100*time.Millisecond)
	tried := false
	made := f.full(backup.FullOptions{Told: func(done, of int) {
		if done > 1 {
			return
		}
		tried = true
		require.Equal(t, 5, of)
		held := func(err error) {
			t.Helper()
			require.True(t, fault.Is(err, fault.Locked), "%v", err)
			require.ErrorContains(t, err, "has not copied this tenant yet")
		}
		for _, waits := range []tenant.Tenant{ts[1], ts[3]} {
			_, err := quick.m.Tenant(ctx, waits, migrate.TenantOptions{LockWait: 100 * time.Millisecond})
			held(err)
			_, err = quick.p.Drop(ctx, waits.Slug, time.Hour, "test")
			held(err)
		}
		_, err := quick.p.Move(ctx, ts[2].Slug, provision.MoveRequest{Group: "second", Keep: time.Hour, Actor: "test"})
		held(err)
		// The one that has been copied is nobody's concern any more.
		_, err = quick.m.Tenant(ctx, ts[0], migrate.TenantOptions{LockWait: pgtest.Patience})
		require.NoError(t, err)
		_, err = f.p.Drop(ctx, ts[0].Slug, time.Hour, "test")
		require.NoError(t, err)
		e, err := f.p.Erase(ctx, ts[0].Slug, provision.EraseRequest{Actor: "test"})
		require.NoError(t, err)
		require.Equal(t, 1, e.Destroyed.Archives, "also of a backup that is being made")
		f.tenant("new", "main", 1)
		f.tenant("newer", "second", 1)
		// Users go on, and whoever only reads.
		f.in(ts[1], `insert into notes (body) values ('later')`)
		_, err = f.Create(ctx, ts[1], backup.CreateOptions{})
		require.NoError(t, err)
		// Another full backup is refused.
		_, _, err = quick.CreateFull(ctx, backup.FullOptions{})
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
		// Somebody at psql.
		_, err = f.admin["main"].Exec(ctx, `truncate t2.notes`)
		require.NoError(t, err)
		_, err = f.admin["second"].Exec(ctx, `update public.placements set epoch = epoch + 1 where number = $1`, ts[4].Number)
		require.NoError(t, err)
	}})
	require.True(t, tried)
	require.Equal(t, 3, made.Tenants())
	require.Len(t, made.LeftOut(), 2)
	for i, slug := range []string{"t2", "t4"} {
		require.Equal(t, []any{slug, "changed_meanwhile"}, []any{made.LeftOut()[i].Slug, made.LeftOut()[i].Code})
	}
	// Now it may be.
	_, err := quick.m.Tenant(ctx, ts[1], migrate.TenantOptions{LockWait: pgtest.Patience})
	require.NoError(t, err)

	g := newPlace(t, dir)
	done := g.restore(made, restoring())
	require.Equal(t, []string{"t2", "t4"}, done.LeftOut)
	require.Equal(t, []string{"t0"}, done.Erased)
	require.Equal(t, "t1 t3", g.text("main", `select string_agg(slug, ' ' order by slug) from public.tenants where state <> 'purged'`))
	require.Equal(t, "5", g.text("main", `select count(*) from t1.notes`), "as it was at the moment")
	g.tenant("t2", "main", 1) // its name is free
}

// Who is at work when a full backup begins is waited for, and who comes then waits; when that takes too long there is no backup, and nothing
// is held back.
func TestFullWaitsForThoseAtWork(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one := f.tenant("acme", "second", 3)
	worker := f.admin["second"]
	_, err := worker.Exec(ctx, `select pg_advisory_lock(7302658, $1::int4)`, one.Number)
	require.NoError(t, err)
	quick := *f
	quick.open(dir, notes, 100*time.Millisecond)
	_, _, err = quick.CreateFull(ctx, backup.FullOptions{})
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	require.Equal(t, "0", f.text("main", `select count(*) from public.holds`))
	require.Equal(t, "0", f.text("second", `select count(*) from public.holds`))

	result := make(chan error, 1)
	go func() {
		_, _, err := f.CreateFull(ctx, backup.FullOptions{})
		result <- err
	}()
	require.Eventually(t, func() bool {
		return f.text("second", `select coalesce(public.held_by($1::int4), '')`, one.Number) != ""
	}, pgtest.Patience, 10*time.Millisecond)
	// It empties the table now, when the hold is there and the moment is not.
	_, err = worker.Exec(ctx, `truncate acme.notes; insert into acme.notes (body) values ('from then on')`)
	require.NoError(t, err)
	_, err = quick.p.Suspend(ctx, one.Slug, "test")
	require.True(t, fault.Is(err, fault.Locked), "%v", err)
	select {
	case err := <-result:
		require.Fail(t, "it did not wait", "%v", err)
	default:
	}
	_, err = worker.Exec(ctx, `select pg_advisory_unlock(7302658, $1::int4)`, one.Number)
	require.NoError(t, err)
	require.NoError(t, <-result)
	c, err := f.ListFull(ctx)
	require.NoError(t, err)
	require.Len(t, c.Backups, 1)
	g := newPlace(t, dir)
	g.restore(c.Backups[0], restoring())
	require.Equal(t, "from then on", g.text("second", `select string_agg(body, ', ') from acme.notes`))
}

// A moment that is lost in the midst of it leaves no backup.
func TestFullLosesItsMoment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	for i := range 3 {
		f.tenant(fmt.Sprintf("t%d", i), "second", 3)
	}
	for _, at := range []int{1, 3} { // the last time nobody reads as of it any more
		f.losesIt(at)
	}
	f.full(backup.FullOptions{})
}

func (f *place) losesIt(at int) {
	t, ctx := f.t, f.t.Context()
	_, _, err := f.CreateFull(ctx, backup.FullOptions{Told: func(done, _ int) {
		if done == at {
			n := f.text("second", `select count(pg_terminate_backend(pid)) from pg_locks where locktype = 'advisory' and classid = 7302666 and database = (select oid from pg_database where datname = current_database())`)
			require.Equal(t, "1", n)
			require.Eventually(t, func() bool { return f.text("second", `select coalesce(public.held_by(1), '')`) == "" }, pgtest.Patience, 10*time.Millisecond)
		}
	}})
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	c, err := f.ListFull(ctx)
	require.NoError(t, err)
	require.Empty(t, c.Backups)
	require.NotEmpty(t, c.Loose)
}

// A spare that bears the number of a tenant makes room for it; and one that was being moved when it was backed up is as it was before.
func TestFullOddPlaces(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one := f.tenant("acme", "main", 3)
	_, err := f.admin["main"].Exec(ctx, `update public.placements set state = 'moving', moving = gen_random_uuid() where number = $1`, one.Number)
	require.NoError(t, err)
	made := f.full(backup.FullOptions{})
	require.Equal(t, 1, made.Tenants())

	g := newPlace(t, dir)
	work, stop := context.WithCancel(ctx)
	over := make(chan error, 1)
	go func() { over <- g.p.Work(work) }()
	require.Eventually(t, func() bool {
		return g.text("main", `select count(*) from public.placements where number = $1 and state = 'spare'`, one.Number) == "1"
	}, pgtest.Patience, 10*time.Millisecond)
	stop()
	require.NoError(t, <-over)
	// Already while its rows are awaited: nobody may take it.
	g.restore(made, backup.FullRestore{Group: "second", Loading: transfer.Loading{Actor: "test"}})
	require.Equal(t, "0", g.text("main", `select count(*) from public.placements where number = $1`, one.Number))
	g.restore(made, restoring())
	require.Equal(t, "3", g.text("main", `select count(*) from acme.notes`))
	require.Equal(t, "active", g.text("main", `select concat(state, moving) from public.placements where number = $1`, one.Number))
	require.NoError(t, g.db.InTenant(ctx, one, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(ctx, `insert into notes (body) values ('after')`)
		return err
	}))
	g.env.Invariants(t)
}

// Two tenants between whom money goes to and fro are seen at one moment: the total is what it always is.
func TestFullIsOneMoment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	a, b := f.tenant("a", "main", 20), f.tenant("b", "main", 20)
	sum := func(f *place) string {
		return f.text("main", `select (select sum(amount) from a.notes) + (select sum(amount) from b.notes)`)
	}
	total := sum(f)
	var moved atomic.Int64
	stop, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		for n := int64(1); ; n++ {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			err := f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
				return tx.Script(ctx, fmt.Sprintf(`update a.notes set amount = amount - %[1]d where id = %[2]d; update b.notes set amount = amount + %[1]d where id = %[2]d`, n, n%20+1))
			})
			if err != nil {
				stopped <- err
				return
			}
			moved.Add(1)
		}
	}()
	made := f.full(backup.FullOptions{Told: func(done, _ int) {
		// Money has gone over between the copies of the two.
		was := moved.Load()
		require.Eventually(t, func() bool { return done > 1 || moved.Load() > was+5 }, pgtest.Patience, time.Millisecond)
	}})
	close(stop)
	require.NoError(t, <-stopped)
	require.Equal(t, total, sum(f))
	g := newPlace(t, dir)
	g.restore(made, restoring())
	require.Equal(t, total, sum(g))
	require.NotEqual(t, f.text("main", `select sum(amount)::text from a.notes`), g.text("main", `select sum(amount)::text from a.notes`), "it was not backed up in the midst of it")
	require.Equal(t, []int32{a.Number, b.Number}, []int32{made.Groups[0].Tenants[0].Number, made.Groups[0].Tenants[1].Number})
}

// An erased tenant does not come back from an older full backup, not even where nobody knows any more that it was erased, unless it is named; and
// its archive is gone.
func TestFullAndErased(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one, two, three := f.tenant("acme", "second", 3), f.tenant("beta", "second", 3), f.tenant("gamma", "main", 3)
	made := f.full(backup.FullOptions{Kept: true})
	_, err := f.p.Erase(ctx, one.Slug, provision.EraseRequest{Actor: "test"})
	require.NoError(t, err)
	_, err = f.p.Erase(ctx, two.Slug, provision.EraseRequest{KeepArchives: true, Actor: "test"})
	require.NoError(t, err)
	require.NoFileExists(t, filepath.Join(dir, "full", made.ID, "second", one.ID+".oneo"))
	require.FileExists(t, filepath.Join(dir, "full", made.ID, "second", two.ID+".oneo"))
	require.NoError(t, f.VerifyFull(ctx, made, 2, false, nil))

	// Where the store was away when it was erased, the next full backup says so.
	require.NoError(t, os.Remove(filepath.Join(dir, "erased", two.ID+".json")))
	later := f.full(backup.FullOptions{})
	require.Equal(t, 1, later.Tenants())

	g := newPlace(t, dir)
	done := g.restore(made, restoring())
	require.ElementsMatch(t, []string{"acme", "beta"}, done.Erased)
	require.Equal(t, "gamma", g.text("main", `select string_agg(slug, ' ') from public.tenants where state <> 'purged'`))
	require.Equal(t, "0", g.text("second", `select count(*) from public.placements`))
	e, found, err := g.p.Erasure(ctx, two.ID)
	require.NoError(t, err)
	require.True(t, found && e.Genuine)
	require.Equal(t, "0", g.text("main", `select count(*) from public.domains where tenant <> $1`, three.Number))

	h := newPlace(t, dir)
	named := restoring()
	named.Erased = []string{two.ID}
	done = h.restore(made, named)
	require.Equal(t, []string{"acme"}, done.Erased)
	require.Equal(t, "beta gamma", h.text("main", `select string_agg(slug, ' ' order by slug) from public.tenants where state <> 'purged'`))
	require.Equal(t, "3", h.text("second", `select count(*) from beta.notes`))
	named.Erased = []string{one.ID}
	k := newPlace(t, dir)
	done, err = k.RestoreFull(ctx, made, named)
	require.NoError(t, err)
	i := slices.IndexFunc(done.Tenants, func(r backup.RestoredTenant) bool { return r.Slug == "acme" })
	require.ErrorContains(t, done.Tenants[i].Err, "is not in the store")
}

// A tenant is held back until its archive is in the store: an erasure that comes before would not find it. What it has beyond its migrations
// comes back when that is said, by the command that goes on.
func TestFullHeldUntilStored(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one, two := f.tenant("acme", "main", 3), f.tenant("beta", "second", 3)
	f.in(one, `create table extra (of integer primary key); insert into extra values (7)`)
	quick := *f
	quick.open(dir, notes, 100*time.Millisecond)
	o := f.o
	s := &interrupted{Store: o.Store, suffix: two.ID + ".oneo", do: func() {
		_, err := quick.p.Suspend(ctx, two.Slug, "test")
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
	}}
	o.Store = s
	b, err := backup.New(o)
	require.NoError(t, err)
	made, _, err := b.CreateFull(ctx, backup.FullOptions{})
	require.NoError(t, err)
	require.True(t, s.did)

	g := newPlace(t, dir)
	done, err := g.RestoreFull(ctx, made, restoring())
	require.NoError(t, err)
	require.ErrorContains(t, done.Tenants[0].Err, "more than its migrations make")
	require.NoError(t, done.Tenants[1].Err)
	said := restoring()
	said.CustomDDL = true
	done = g.restore(made, said)
	require.Len(t, done.Tenants, 1)
	require.Equal(t, "7", g.text("main", `select of::text from acme.extra`))
}

// Who was being erased at the moment of a full backup does not come back from it.
func TestFullOfWhoIsBeingErased(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	one := f.tenant("acme", "main", 3)
	f.tenant("beta", "main", 3)
	_, err := f.admin["main"].Exec(t.Context(), `insert into public.operations (id, kind, tenant, slug, state, step) values (gen_random_uuid(), 'tenant.erase', $1, 'acme', 'running', 'begun')`, one.Number)
	require.NoError(t, err)
	made := f.full(backup.FullOptions{})
	g := newPlace(t, dir)
	g.restore(made, restoring())
	require.Equal(t, "beta", g.text("main", `select string_agg(slug, ' ') from public.tenants where state <> 'purged'`))
	require.Equal(t, "1", g.text("main", `select count(*) from public.erasures where tenant = $1::text::uuid`, one.ID))
}

// What was changed or swapped in a full backup is found, and nothing of it is believed; an older one is migrated up.
func TestFullDamagedAndOlder(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one, two := f.tenant("acme", "main", 3), f.tenant("beta", "main", 3)
	made := f.full(backup.FullOptions{})
	at := func(name string) string { return filepath.Join(dir, "full", made.ID, filepath.FromSlash(name)) }
	keep := map[string][]byte{}
	for _, name := range []string{"manifest.json", "main/shared.oneo", "main/" + one.ID + ".oneo", "main/" + two.ID + ".oneo"} {
		text, err := os.ReadFile(at(name))
		require.NoError(t, err)
		keep[name] = text
	}
	put := func(name string, text []byte) { require.NoError(t, os.WriteFile(at(name), text, 0o600)) }
	unverified := func(err error) {
		t.Helper()
		require.True(t, fault.Is(err, fault.Unverified), "%v", err)
	}
	// One tenant's archive in another's place.
	put("main/"+one.ID+".oneo", keep["main/"+two.ID+".oneo"])
	unverified(f.VerifyFull(ctx, made, 1, false, nil))
	g := newPlace(t, dir)
	done, err := g.RestoreFull(ctx, made, restoring())
	require.NoError(t, err)
	require.Len(t, done.Tenants, 2)
	unverified(done.Tenants[0].Err)
	require.NoError(t, done.Tenants[1].Err)
	require.Equal(t, "creating active", g.text("main", `select string_agg(state, ' ' order by number) from public.tenants`))
	// With the right one the same command goes on, with newer migrations too.
	put("main/"+one.ID+".oneo", keep["main/"+one.ID+".oneo"])
	g.open(dir, later, pgtest.Patience)
	done = g.restore(made, restoring())
	require.Len(t, done.Tenants, 1)
	require.Equal(t, "numeric", g.text("main", `select pg_typeof(amount) from acme.notes limit 1`))
	require.Equal(t, "1 2", g.text("main", `select string_agg(version::text, ' ' order by version) from public.ledger where set = 'tenant' and tenant = $1`, one.Number))

	// A changed bit in the shared tables: nothing is restored, and a whole one goes in.
	h := newPlace(t, dir)
	bent := slices.Clone(keep["main/shared.oneo"])
	bent[len(bent)/2] ^= 1
	put("main/shared.oneo", bent)
	_, err = h.RestoreFull(ctx, made, restoring())
	unverified(err)
	require.Equal(t, "0", h.text("main", `select count(*) from public.tenants`))
	put("main/shared.oneo", keep["main/shared.oneo"])
	h.restore(made, restoring())

	put("manifest.json", []byte(strings.Replace(string(keep["manifest.json"]), `"slug":"acme"`, `"slug":"acma"`, 1)))
	_, err = f.FindFull(ctx, made.ID)
	unverified(err)
	put("manifest.json", keep["manifest.json"])
	c, err := f.ListFull(ctx)
	require.NoError(t, err)
	require.Len(t, c.Backups, 1)
}

// Full backups are kept and pruned as wholes; those of other groups are judged by themselves.
func TestFullPruned(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	f.tenant("acme", "main", 1)
	oldest, kept, other := f.full(backup.FullOptions{}), f.full(backup.FullOptions{}), f.full(backup.FullOptions{Groups: []string{"second"}})
	newest := f.full(backup.FullOptions{})
	_, err := f.KeepFull(ctx, kept.ID, true, "for ever")
	require.NoError(t, err)
	// What was interrupted is swept when all of it is old.
	for _, id := range []string{"00000000000000aa", "00000000000000bb"} {
		for n, name := range []string{"x.oneo", "y.oneo"} {
			file := filepath.Join(dir, "full", id, "main", name)
			require.NoError(t, os.MkdirAll(filepath.Dir(file), 0o700))
			require.NoError(t, os.WriteFile(file, nil, 0o600))
			if id[15] == 'a' || n == 0 {
				old := time.Now().Add(-8 * 24 * time.Hour)
				require.NoError(t, os.Chtimes(file, old, old))
			}
		}
	}
	var gone []string
	plan, err := f.PruneFull(ctx, backup.Policy{Last: 1}, func(x backup.Full) { gone = append(gone, x.ID) })
	require.NoError(t, err)
	require.Equal(t, []string{oldest.ID}, gone)
	require.Len(t, plan.Loose, 2)
	c, err := f.ListFull(ctx)
	require.NoError(t, err)
	var left []string
	for _, x := range c.Backups {
		left = append(left, x.ID)
	}
	require.Equal(t, []string{kept.ID, other.ID, newest.ID}, left)
	require.Equal(t, "for ever", c.Backups[0].Reason)
	require.Len(t, c.Loose, 2)
	left = nil
	require.NoError(t, filepath.WalkDir(filepath.Join(dir, "full", oldest.ID), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, path)
		}
		return nil
	}))
	require.Empty(t, left)
	require.NoError(t, f.VerifyFull(ctx, newest, 1, true, nil))
}

// fullWork is what a process of its own does.
type fullWork struct {
	Restore string // the id; empty: a backup is made
	Dir     string
	Groups  map[string]postgres.Group
}

func (k fullWork) child() error {
	o := postgres.DefaultOptions()
	pgtest.Patient(&o)
	o.Groups, o.Secret, o.OwnerConns = k.Groups, pgtest.Secret, 4
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	_, _, b, err := assemble(db, k.Dir, notes, pgtest.Patience)
	if err != nil {
		return err
	}
	ctx := context.Background()
	if k.Restore == "" {
		_, _, err := b.CreateFull(ctx, backup.FullOptions{Actor: "test"})
		return err
	}
	made, err := b.FindFull(ctx, k.Restore)
	if err != nil {
		return err
	}
	done, err := b.RestoreFull(ctx, made, backup.FullRestore{Loading: transfer.Loading{Actor: "test"}})
	for _, r := range done.Tenants {
		if err == nil {
			err = r.Err
		}
	}
	return err
}

// killed runs the work in a process of its own, which is killed at a place.
func (k fullWork) killed(t *testing.T, place string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	raw, err := json.Marshal(k)
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), fullTask+"="+string(raw), "ONEO_FAILPOINTS="+place)
	out, _ := cmd.CombinedOutput()
	require.Equal(t, 137, cmd.ProcessState.ExitCode(), "%s: %s", place, out)
}

// kill -9 at each place of a full backup: there is none, and nothing is held back. At each place of its restore: the same command goes on,
// and the end is the same.
func TestKillFull(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	for n, group := range []string{"main", "second"} {
		f.tenant(fmt.Sprintf("acme-%d", n), group, 5)
		f.tenant(fmt.Sprintf("beta-%d", n), group, 2)
	}
	was := f.state()
	tried := 0
	for _, place := range failpoint.All {
		if !strings.HasPrefix(place, "full.") {
			continue
		}
		fullWork{Dir: dir, Groups: f.groups}.killed(t, place+"=exit")
		c, err := f.ListFull(ctx)
		require.NoError(t, err)
		require.Empty(t, c.Backups, place)
		for _, slug := range []string{"acme-0", "acme-1"} {
			_, err := f.p.Suspend(ctx, pgtest.Slug(t, slug), "test")
			require.NoError(t, err, place)
			_, err = f.p.Resume(ctx, pgtest.Slug(t, slug), "test")
			require.NoError(t, err, place)
		}
		tried++
	}
	require.Equal(t, 5, tried)
	require.Equal(t, was, f.state())
	made := f.full(backup.FullOptions{})
	require.Equal(t, 4, made.Tenants())

	tried = 0
	// The third one stands in the other group, whose commit comes before the registry's.
	for _, place := range append(slices.Clone(failpoint.All), "refill.finish=exit@3") {
		if !strings.HasPrefix(place, "refill.") {
			continue
		}
		g := newPlace(t, dir)
		how := place
		if !strings.Contains(how, "=") {
			how += "=exit"
		}
		fullWork{Restore: made.ID, Dir: dir, Groups: g.groups}.killed(t, how)
		// Whoever stands as a tenant that is served has all of its rows.
		for _, group := range []string{"main", "second"} {
			for _, schema := range strings.Fields(g.text(group, `select coalesce(string_agg(schema, ' '), '') from public.placements`)) {
				require.Equal(t, f.text(group, `select string_agg(n::text, ' ' order by id) from `+schema+`.notes n`), g.text(group, `select string_agg(n::text, ' ' order by id) from `+schema+`.notes n`), place)
			}
		}
		g.restore(made, restoring())
		require.Equal(t, was, g.state(), place)
		g.env.Invariants(t)
		tried++
	}
	require.Equal(t, 6, tried)
}

// Every shared table is either in a full backup or left out on purpose: who adds one decides.
func TestFullKnowsTheSharedTables(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	made := f.full(backup.FullOptions{})
	require.Equal(t, 13, made.Groups[0].Shared.Tables)
	in := []string{"groups", "tenants", "domains", "domain_holds", "budgets", "operations", "audit", "administrators", "administrator_keys", "proofs", "erasures", "usage", "ledger"}
	out := []string{
		"administrator_sessions", "instances", // they would log somebody in, or be taken for alive
		"runs", "tasks", "marks", // runs are over
		"schedules",                         // what the configuration says is due from now on
		"usage_marks",                       // of servers that wrote here
		"restore_points", "physical_proofs", // about the WAL and the backups of the clusters here
		"holds", "held", "installation", "readers", // this database's own
		"placements", "progress", "undo_points", "replaced", "moved", // where what is not restored lies
	}
	var have []string
	rows, err := f.admin["main"].Query(t.Context(), `select relname::text from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p')`)
	require.NoError(t, err)
	have, err = pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	require.ElementsMatch(t, append(in, out...), have, "a shared table is in neither list, here and in pkg/transfer")
}

// A full backup is proved archive by archive, and its tenants are restored in their groups and taken back; a drill takes a tenant's archive
// of it where the tenant has no backup of its own that is newer.
func TestFullTried(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	f := newPlace(t, dir)
	ctx := t.Context()
	one, two, three := f.tenant("acme", "main", 3), f.tenant("beta", "second", 40), f.tenant("gamma", "second", 2)
	ids := []string{one.ID, two.ID}
	old, err := f.Create(ctx, two, backup.CreateOptions{})
	require.NoError(t, err)
	newest := func() map[string]backup.Manifest {
		t.Helper()
		ms, bad, err := f.Provable(ctx, ids)
		require.NoError(t, err)
		require.Empty(t, bad)
		return ms
	}
	require.Equal(t, old.ID, newest()[two.ID].ID)
	require.NotContains(t, newest(), one.ID)
	_, err = f.p.Erase(ctx, three.Slug, provision.EraseRequest{KeepArchives: true, Actor: "test"})
	require.NoError(t, err)
	four := f.tenant("delta", "second", 2)
	made := f.full(backup.FullOptions{})
	_, err = f.p.Erase(ctx, four.Slug, provision.EraseRequest{KeepArchives: true, Actor: "test"})
	require.NoError(t, err)

	require.NoError(t, f.VerifyFull(ctx, made, 2, false, nil))
	tries, erased, err := f.Triable(ctx, made)
	require.NoError(t, err)
	require.Equal(t, 1, erased, "who is erased is not restored, also where its archive is left")
	require.Len(t, tries, 2)
	state := f.state()
	for _, m := range tries {
		trailer, err := f.Try(ctx, m, "", transfer.Loading{Actor: "test"})
		require.NoError(t, err)
		require.Equal(t, map[string]int64{"acme": 3, "beta": 40}[m.Slug], trailer.Rows())
	}
	require.Equal(t, state, f.state(), "all of it was taken back")

	require.Equal(t, made.ID, newest()[one.ID].ID)
	require.True(t, made.Groups[0].At.Equal(newest()[one.ID].Made), "it is of the group's moment")
	require.Equal(t, made.ID, newest()[two.ID].ID, "it is newer than the tenant's own")
	own, err := f.NewestOf(ctx, ids)
	require.NoError(t, err)
	require.Equal(t, old.ID, own[two.ID].ID)
	require.NotContains(t, own, one.ID)
	require.NoError(t, f.Drill(ctx, one.Number, newest()[one.ID], transfer.Loading{Actor: "test"}))
	proofs, err := f.Proofs(ctx)
	require.NoError(t, err)
	require.Equal(t, made.ID, proofs[one.Number].Backup)
	require.Equal(t, int64(3), proofs[one.Number].Rows)
	later, err := f.Create(ctx, two, backup.CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, later.ID, newest()[two.ID].ID, "the tenant's own is newer")

	// What is not as it must be in a manifest, whoever has signed it.
	unverified := func(err error) {
		t.Helper()
		require.True(t, fault.Is(err, fault.Unverified), "%v", err)
	}
	other := made
	other.Groups = []backup.FullGroup{made.Groups[1], made.Groups[0]}
	unverified(f.VerifyFull(ctx, other, 1, true, nil))
	again := made.Groups[1]
	again.Tenants = nil
	other.Groups = []backup.FullGroup{made.Groups[0], made.Groups[1], again}
	unverified(f.VerifyFull(ctx, other, 1, true, nil))
	twice := made.Groups[1]
	twice.Tenants = append(twice.Tenants[:1:1], twice.Tenants[0])
	other.Groups = []backup.FullGroup{made.Groups[0], twice}
	unverified(f.VerifyFull(ctx, other, 1, true, nil))
	other = made
	other.ID = "0000000000000000"
	unverified(f.VerifyFull(ctx, other, 1, true, nil))
	elsewhere := tries[1]
	elsewhere.Group = "main"
	unverified(f.Verify(ctx, elsewhere, nil))

	// A byte of one tenant's archive has changed: that tenant fails, and is not remembered as proved.
	path := filepath.Join(dir, filepath.FromSlash(tries[0].Name))
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	text[len(text)/2] ^= 1
	require.NoError(t, os.WriteFile(path, text, 0o600))
	unverified(f.VerifyFull(ctx, made, 2, false, nil))
	_, err = f.admin["main"].Exec(ctx, `delete from public.proofs`)
	require.NoError(t, err)
	unverified(f.Drill(ctx, one.Number, tries[0], transfer.Loading{Actor: "test"}))
	proofs, err = f.Proofs(ctx)
	require.NoError(t, err)
	require.Empty(t, proofs)
	require.NoError(t, f.Drill(ctx, two.Number, tries[1], transfer.Loading{Actor: "test"}))
	// One whose manifest cannot be believed does not count, and is told.
	require.NoError(t, os.WriteFile(filepath.Join(dir, "full", made.ID, "manifest.json"), []byte("{}"), 0o600))
	ms, bad, err := f.Provable(ctx, ids)
	require.NoError(t, err)
	require.Len(t, bad, 1)
	require.NotContains(t, ms, one.ID)
}
