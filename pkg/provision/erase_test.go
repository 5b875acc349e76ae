package provision_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// requireErased holds that nothing is left of a tenant in either database but its tombstone and a record that is genuine.
func (f fixture) requireErased(t *testing.T, tn tenant.Tenant, group string) {
	t.Helper()
	ctx := t.Context()
	main := pgtest.Admin(t, f.env.AdminURL)
	count := func(want int, sql string, args ...any) {
		t.Helper()
		var n int
		require.NoError(t, main.QueryRow(ctx, sql, args...).Scan(&n))
		require.Equal(t, want, n, sql)
	}
	count(1, `select count(*) from public.tenants where number = $1 and state = 'purged' and name = '' and settings = '{}'`, tn.Number)
	count(0, `select count(*) from public.domains where tenant = $1`, tn.Number)
	count(0, `select count(*) from public.operations where tenant = $1 and (state = 'running' or request ?| array['name', 'admin_email', 'settings'])`, tn.Number)
	count(1, `select count(*) from public.audit where tenant = $1 and action = 'tenant.erase'`, tn.Number)
	count(1, `select count(*) from public.erasures where number = $1`, tn.Number)
	count(0, `select count(*) from public.usage where tenant = $1`, tn.Number)
	there := main
	if group != "main" {
		there = pgtest.Admin(t, f.adminURL(group))
	}
	for _, sql := range []string{
		`select count(*) from public.placements where number = $1`, `select count(*) from public.ledger where set = 'tenant' and tenant = $1`,
		`select count(*) from public.replaced where tenant = $1`, `select count(*) from public.undo_points where tenant = $1`,
		`select count(*) from pg_namespace where nspname ~ ('^oneo_[a-z]+_' || $1::int || '(_|$)')`,
	} {
		var n int
		require.NoError(t, there.QueryRow(ctx, sql, tn.Number).Scan(&n))
		require.Zero(t, n, sql)
	}
	inst, err := f.db.Installation(ctx, group)
	require.NoError(t, err)
	count(0, `select count(*) from pg_roles where rolname = $1`, inst.TenantRole(tn.Number))
	var id string
	require.NoError(t, main.QueryRow(ctx, `select id from public.tenants where number = $1`, tn.Number).Scan(&id))
	e, found, err := f.p.Erasure(ctx, id)
	require.NoError(t, err)
	require.True(t, found)
	require.True(t, e.Genuine)
	require.Equal(t, "test", e.Actor)
	require.WithinDuration(t, time.Now(), e.At, time.Hour)
}

// shelf is a store of archives that may be away, or go away when one archive was destroyed.
type shelf struct {
	archives    map[string]int
	away, dying bool
	asked       int
	marked      []string
}

func (s *shelf) MarkErased(_ context.Context, id, slug string) error {
	if s.away {
		return fault.New(fault.Unavailable, "the store is away").WithCode("store_away")
	}
	s.marked = append(s.marked, id+" "+slug)
	return nil
}

func (s *shelf) EraseArchives(_ context.Context, id string) (n int, err error) {
	s.asked++
	if s.dying {
		s.archives[id]--
		s.away, n = true, 1
	}
	if s.away {
		return n, fault.New(fault.Unavailable, "the store is away").WithCode("store_away")
	}
	n = s.archives[id]
	delete(s.archives, id)
	return n, nil
}

// A tenant is erased wherever it is, with what was kept of it and with its archives, and another one is as it was.
func TestErase(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		for _, state := range []tenant.State{tenant.Active, tenant.Suspended, tenant.Dropped} {
			t.Run(group+" "+string(state), func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, group)
				ctx := t.Context()
				s, uncached := &shelf{archives: map[string]int{}}, 0
				_, p, _, err := openOn(f.db, func(o *provision.Options) {
					o.Archives = s
					o.Uncache = func(_ context.Context, tn tenant.Tenant) (int, error) {
						require.Equal(t, "acme", tn.Schema.String())
						uncached++
						return 7, nil
					}
				})
				require.NoError(t, err)
				host, err := tenant.ParseHost("crm.acme.example")
				require.NoError(t, err)
				acme, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Name: "ACME Ltd", Group: group, Domains: []tenant.Host{host},
					Settings: []byte(`{"owner": "Ada"}`), AdminEmail: "ada@acme.example", AdminPasswordHash: hashed(t), Actor: "test"})
				require.NoError(t, err)
				beta := f.create(t, "beta", group)
				_, err = p.Restore(ctx, acme.Slug, provision.RestoreRequest{Fill: oneUser("restored"), Keep: time.Hour, Actor: "test"})
				require.NoError(t, err)
				switch state {
				case tenant.Suspended:
					_, err = p.Suspend(ctx, acme.Slug, "test")
				case tenant.Dropped:
					_, err = p.Drop(ctx, acme.Slug, 0, "test")
				}
				require.NoError(t, err)
				s.archives[acme.ID], s.archives[beta.ID] = 3, 2
				_, err = pgtest.Admin(t, f.env.AdminURL).Exec(ctx, `insert into public.usage (tenant, hour, requests) select number, now(), 1 from public.tenants`)
				require.NoError(t, err)

				e, err := p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
				require.NoError(t, err)
				require.Equal(t, acme.ID, e.Tenant)
				require.Equal(t, "acme", e.Slug)
				schema := "acme"
				if state == tenant.Dropped {
					schema = "oneo_dropped_1"
				}
				require.Equal(t, provision.Destroyed{Schema: schema, Tables: 6, Domains: 2, Kept: 1, CacheKeys: 7, Archives: 3}, e.Destroyed)
				require.Equal(t, 1, uncached)
				require.Equal(t, map[string]int{beta.ID: 2}, s.archives)
				f.requireErased(t, acme, group)
				f.invariants(t)
				require.Equal(t, "", f.users(t, "beta"))
				_, err = p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
				require.True(t, fault.Is(err, fault.NotFound), "%v", err)
				_, err = p.Undrop(ctx, acme.Slug, "test")
				require.True(t, fault.Is(err, fault.NotFound), "%v", err)

				// The name is free, and whoever has it next is somebody else.
				again, err := p.Create(ctx, provision.CreateRequest{Slug: acme.Slug, Group: group, Actor: "test"})
				require.NoError(t, err)
				_, found, err := p.Erasure(ctx, again.ID)
				require.NoError(t, err)
				require.False(t, found)
			})
		}
	}
}

func hashed(t *testing.T) string {
	t.Helper()
	return "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
}

// While the store of archives is away an erasure stays open, and says how far it is; it is gone on with by the same command, or by a
// server. What an attempt has destroyed is in the record, whoever writes that.
func TestEraseGoesOn(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	s := &shelf{archives: map[string]int{}, dying: true}
	cached := 2
	_, p, _, err := openOn(f.db, func(o *provision.Options) {
		o.Archives = s
		o.Uncache = func(context.Context, tenant.Tenant) (n int, err error) {
			if n, cached = cached, 0; n == 0 {
				err = errors.New("Redis is away")
			}
			return n, err
		}
	})
	require.NoError(t, err)
	acme, beta := f.create(t, "acme", "main"), f.create(t, "beta", "main")
	s.archives[acme.ID], s.archives[beta.ID] = 3, 2
	_, err = p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	require.ErrorContains(t, err, "tables are destroyed, its archives are not")
	_, found, err := p.Erasure(ctx, acme.ID)
	require.NoError(t, err)
	require.False(t, found, "what is not done is not recorded")
	erased := func() (is bool) {
		require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) (err error) {
			is, err = provision.Erased(ctx, tx, acme.ID)
			return err
		}))
		return is
	}
	require.True(t, erased(), "though it is not done")
	s.away, s.dying = false, false
	require.Eventually(t, func() bool { // its operation goes stale, and each attempt makes it wait longer
		e, err := p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "somebody else"})
		if err != nil {
			return false
		}
		require.Equal(t, provision.Destroyed{Schema: "acme", Tables: 6, Domains: 1, CacheKeys: 2, CacheLeft: true, Archives: 3}, e.Destroyed)
		require.Equal(t, "test", e.Actor, "who had asked for it")
		return true
	}, pgtest.Patience, 50*time.Millisecond)
	f.requireErased(t, acme, "main")
	require.True(t, erased())

	s.away = true
	_, err = p.Erase(ctx, beta.Slug, provision.EraseRequest{Actor: "test"})
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	s.away = false
	work, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- p.Work(work) }()
	require.Eventually(t, func() bool {
		_, found, err := p.Erasure(ctx, beta.ID)
		return err == nil && found
	}, pgtest.Patience, 50*time.Millisecond)
	stop()
	require.NoError(t, <-ended)
	f.requireErased(t, beta, "main")
	f.invariants(t)
}

// A request that is at work when its tenant is erased is finished; none begins after it.
func TestEraseWaitsForRequests(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	acme := f.create(t, "acme", "main")
	admin := pgtest.Admin(t, f.env.AdminURL)
	erased := make(chan error, 1)
	require.NoError(t, f.db.InTenant(ctx, acme, postgres.Write, func(tx *postgres.Tx) error {
		if _, err := tx.Exec(ctx, `select 1`); err != nil {
			return err
		}
		go func() {
			_, err := f.p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
			erased <- err
		}()
		require.Eventually(t, func() bool {
			var waits bool
			err := admin.QueryRow(ctx, `select exists (select from pg_locks where locktype = 'advisory' and not granted
and database = (select oid from pg_database where datname = current_database()))`).Scan(&waits)
			return err == nil && waits
		}, pgtest.Patience, time.Millisecond)
		_, err := tx.Exec(ctx, `insert into users (id, email, password_hash) values (gen_random_uuid(), 'late@acme.example', 'x')`)
		return err
	}))
	require.NoError(t, <-erased)
	f.requireErased(t, acme, "main")
	err := f.db.InTenant(ctx, acme, postgres.Read, func(*postgres.Tx) error { return nil })
	require.True(t, fault.Is(err, fault.Gone), "%v", err)
}

// The archives are left where that was asked for; a schema that is another's is left alone; without a secret nothing is begun.
func TestEraseLeaves(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	s := &shelf{}
	_, p, _, err := openOn(f.db, func(o *provision.Options) { o.Archives = s })
	require.NoError(t, err)
	f.create(t, "acme", "main")
	_, silent, _, err := openOn(f.db, func(o *provision.Options) { o.Secret = "" })
	require.NoError(t, err)
	_, err = silent.Erase(ctx, pgtest.Slug(t, "acme"), provision.EraseRequest{Actor: "test"})
	require.True(t, fault.Is(err, fault.Invalid), "%v", err)
	require.Equal(t, "", f.users(t, "acme"), "it is served")
	e, err := p.Erase(ctx, pgtest.Slug(t, "acme"), provision.EraseRequest{KeepArchives: true, Actor: "test"})
	require.NoError(t, err)
	require.Zero(t, s.asked)
	require.Equal(t, provision.ArchivesKept, e.Destroyed.ArchivesLeft)

	f.create(t, "beta", "main")
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, err = admin.Exec(ctx, `drop schema beta cascade; create schema beta; create table beta.precious (id integer)`)
	require.NoError(t, err)
	e, err = f.p.Erase(ctx, pgtest.Slug(t, "beta"), provision.EraseRequest{Actor: "test"})
	require.NoError(t, err)
	require.True(t, e.Destroyed.SchemaMissing)
	require.Zero(t, e.Destroyed.Tables)
	require.Equal(t, provision.ArchivesUnknown, e.Destroyed.ArchivesLeft)
	_, err = admin.Exec(ctx, `select from beta.precious`)
	require.NoError(t, err)
	_, err = admin.Exec(ctx, `drop schema beta cascade`)
	require.NoError(t, err)
	f.invariants(t)
}

// A record that was changed, or signed with another secret, is no genuine one, and still one.
func TestErasureIsSigned(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	acme := f.create(t, "acme", "main")
	e, err := f.p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
	require.NoError(t, err)
	require.True(t, e.Genuine)
	_, other, _, err := openOn(f.db, func(o *provision.Options) { o.Secret = pgtest.Secret + "!" })
	require.NoError(t, err)
	e, found, err := other.Erasure(ctx, acme.ID)
	require.NoError(t, err)
	require.True(t, found)
	require.False(t, e.Genuine)
	admin := pgtest.Admin(t, f.env.AdminURL)
	for _, change := range []string{
		`slug = 'other'`, `number = 7`, `actor = 'nobody'`, `erased_at = erased_at - interval '1 microsecond'`, `destroyed = '{"schema": "acme"}'`, `mac = sha256('')`,
	} {
		_, err := admin.Exec(ctx, `create table public.spare as select * from public.erasures; update public.erasures set `+change)
		require.NoError(t, err)
		e, found, err := f.p.Erasure(ctx, acme.ID)
		require.NoError(t, err)
		require.True(t, found, change)
		require.False(t, e.Genuine, change)
		_, err = admin.Exec(ctx, `delete from public.erasures; insert into public.erasures select * from public.spare; drop table public.spare`)
		require.NoError(t, err)
	}
	e, _, err = f.p.Erasure(ctx, acme.ID)
	require.NoError(t, err)
	require.True(t, e.Genuine)
}

// A process that knows of no store does not end what one began that does, and says so; who lets the archives be ends it.
func TestEraseWithoutItsStore(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	_, with, _, err := openOn(f.db, func(o *provision.Options) { o.Archives = &shelf{away: true} })
	require.NoError(t, err)
	acme := f.create(t, "acme", "main")
	_, err = with.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	f.aged(t)
	_, err = f.p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
	requireFault(t, err, fault.Invalid, "no_backup_store")
	f.aged(t)
	e, err := f.p.Erase(ctx, acme.Slug, provision.EraseRequest{KeepArchives: true, Actor: "somebody else"})
	require.NoError(t, err)
	require.Equal(t, provision.ArchivesKept, e.Destroyed.ArchivesLeft)
	f.requireErased(t, acme, "main")
	f.invariants(t)
}

// aged lets the operation that is open look as if its process had died long ago.
func (f fixture) aged(t *testing.T) {
	t.Helper()
	tag, err := pgtest.Admin(t, f.env.AdminURL).Exec(t.Context(), `update public.operations set heartbeat = now() - interval '1 day' where state = 'running'`)
	require.NoError(t, err)
	require.EqualValues(t, 1, tag.RowsAffected())
}

// What was asked about a tenant is forgotten with it, also what failed before it was known which tenant it was about.
func TestErasedRequestsAreForgotten(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "")
	ctx := t.Context()
	acme := f.create(t, "acme", "main")
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, err := admin.Exec(ctx, `insert into public.operations (id, kind, slug, tenant, state, request) values
	(gen_random_uuid(), 'tenant.rename', 'acme', $1, 'failed', '{"name": "Ada"}'), (gen_random_uuid(), 'tenant.create', 'acme', null, 'failed', '{"admin_email": "ada@acme.example"}'),
	(gen_random_uuid(), 'tenant.create', 'beta', null, 'failed', '{"admin_email": "bob@beta.example"}')`, acme.Number)
	require.NoError(t, err)
	_, err = f.p.Erase(ctx, acme.Slug, provision.EraseRequest{Actor: "test"})
	require.NoError(t, err)
	var left string
	require.NoError(t, admin.QueryRow(ctx, `select string_agg(request::text, ', ') from public.operations where request <> '{}' and kind <> 'tenant.erase'`).Scan(&left))
	require.JSONEq(t, `{"admin_email": "bob@beta.example"}`, left)
}

// What an erasure has left of the archives goes when that is said, of nobody but the erased tenant, and the record says when.
func TestEraseLeft(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx := t.Context()
	s := &shelf{archives: map[string]int{}}
	_, p, _, err := openOn(f.db, func(o *provision.Options) { o.Archives = s })
	require.NoError(t, err)
	acme, beta := f.create(t, "acme", "main"), f.create(t, "beta", "main")
	s.archives[acme.ID], s.archives[beta.ID] = 3, 2
	_, err = p.Erase(ctx, acme.Slug, provision.EraseRequest{KeepArchives: true, Actor: "test"})
	require.NoError(t, err)
	require.Equal(t, 3, s.archives[acme.ID])
	s.marked = nil
	left := func(id string) (e provision.Erasure, n int, err error) { return p.EraseLeft(ctx, id, "who") }
	record := func() provision.Erasure {
		t.Helper()
		all, err := p.Erasures(ctx)
		require.NoError(t, err)
		require.Len(t, all, 1)
		return all[0]
	}
	require.Equal(t, provision.ArchivesKept, record().Destroyed.ArchivesLeft)

	// Not of one that exists, or of which nobody knows for sure that it was erased.
	admin := pgtest.Admin(t, f.env.AdminURL)
	_, _, err = left(beta.ID)
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	for _, c := range []struct {
		do, undo string
		kind     fault.Kind
	}{
		{`update public.tenants set state = 'suspended' where slug = 'acme'`, `update public.tenants set state = 'purged' where slug = 'acme'`, fault.Conflict},
		{`update public.erasures set actor = 'nobody'`, `update public.erasures set actor = 'test'`, fault.Unverified},
	} {
		_, err := admin.Exec(ctx, c.do)
		require.NoError(t, err)
		_, _, err = left(acme.ID)
		require.True(t, fault.Is(err, c.kind), "%s: %v", c.do, err)
		_, err = admin.Exec(ctx, c.undo)
		require.NoError(t, err)
	}
	require.Zero(t, s.asked)
	require.Equal(t, provision.ArchivesKept, record().Destroyed.ArchivesLeft)

	// The store goes away in the midst of it.
	s.dying = true
	_, n, err := left(acme.ID)
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	require.Equal(t, 1, n)
	half := record()
	require.True(t, half.Genuine)
	require.Equal(t, provision.ArchivesGoing, half.Destroyed.ArchivesLeft)
	require.Equal(t, 1, half.Destroyed.Archives)
	require.Nil(t, half.Destroyed.ArchivesErasedAt)
	s.dying, s.away = false, false
	e, n, err := left(acme.ID)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	require.Equal(t, record(), e)
	require.True(t, e.Genuine)
	require.Equal(t, 3, e.Destroyed.Archives)
	require.Empty(t, e.Destroyed.ArchivesLeft)
	require.WithinDuration(t, time.Now(), *e.Destroyed.ArchivesErasedAt, time.Hour)
	require.Equal(t, "test", e.Actor)
	require.Equal(t, map[string]int{beta.ID: 2}, s.archives)
	require.Contains(t, s.marked, acme.ID+" acme")
	var audited string
	require.NoError(t, admin.QueryRow(ctx, `select actor || ' ' || slug || ' ' || (details->>'archives') from public.audit where action = 'tenant.erase.archives'`).Scan(&audited))
	require.Equal(t, "who acme 2", audited)
	require.NoError(t, f.db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		erased, err := provision.Erased(ctx, tx, acme.ID)
		require.True(t, erased, "it is erased as before")
		return err
	}))
}
