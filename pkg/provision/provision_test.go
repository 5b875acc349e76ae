package provision_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

// someHash has the form of a password's hash; nobody knows the password.
const someHash = "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$c29tZWhhc2hzb21laGFzaHNvbWVoYXNoc29tZWhhc2g"

func requireFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	require.Truef(t, fault.Is(err, kind), "want a fault of kind %s (%s), got %v", kind, code, err)
	require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
}

func (f fixture) scalar(t *testing.T, sql string) (v string) {
	t.Helper()
	require.NoError(t, pgtest.Admin(t, f.env.AdminURL).QueryRow(t.Context(), sql).Scan(&v))
	return v
}

func host(t *testing.T, s string) tenant.Host {
	t.Helper()
	h, err := tenant.ParseHost(s)
	require.NoError(t, err)
	return h
}

// A whole life, in both groups; each verb twice, and in states where it cannot be.
func TestLife(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx, acme, globex := t.Context(), pgtest.Slug(t, "acme"), pgtest.Slug(t, "globex")
			made, err := f.p.Create(ctx, provision.CreateRequest{
				Slug: acme, Group: group, Domains: []tenant.Host{host(t, "www.acme.example")}, AdminEmail: "ann@acme.example", AdminPasswordHash: someHash,
				Settings: json.RawMessage(`{"public": {"n": 12345678901234567890}}`), Actor: "test",
			})
			require.NoError(t, err)
			require.Equal(t, "acme.localhost", made.Primary.String())
			read := func(tn tenant.Tenant) (email string, err error) {
				err = f.db.InTenant(ctx, tn, postgres.Single, func(tx *postgres.Tx) error { return tx.QueryRow(ctx, `select email from users`).Scan(&email) })
				return email, err
			}
			email, err := read(made)
			require.NoError(t, err)
			require.Equal(t, "ann@acme.example", email)

			_, err = f.p.Create(ctx, provision.CreateRequest{Slug: acme, Group: group, Actor: "test"})
			requireFault(t, err, fault.Conflict, "tenant_exists")
			for what, verb := range map[string]func() (tenant.Tenant, error){
				"undrop": func() (tenant.Tenant, error) { return f.p.Undrop(ctx, acme, "test") },
				"purge":  func() (tenant.Tenant, error) { return f.p.Purge(ctx, acme, "test") },
			} {
				_, err = verb()
				require.Equalf(t, "wrong_state", fault.Of(err).Code, "%s of an active tenant: %v", what, err)
			}
			for range 2 {
				tn, err := f.p.Suspend(ctx, acme, "test")
				require.NoError(t, err)
				require.Equal(t, tenant.Suspended, tn.State)
				_, err = read(made)
				requireFault(t, err, fault.Suspended, "tenant_suspended")
			}
			for range 2 {
				tn, err := f.p.Resume(ctx, acme, "test")
				require.NoError(t, err)
				require.Equal(t, tenant.Active, tn.State)
			}
			for range 2 {
				tn, err := f.p.Drop(ctx, acme, 0, "test")
				require.NoError(t, err, "a double drop is no error")
				require.Equal(t, tenant.Dropped, tn.State)
				_, err = read(made)
				requireFault(t, err, fault.Gone, "tenant_gone")
			}
			_, err = f.p.Suspend(ctx, acme, "test")
			requireFault(t, err, fault.Conflict, "wrong_state")
			_, err = f.p.Rename(ctx, acme, provision.RenameRequest{Slug: globex, Actor: "test"})
			requireFault(t, err, fault.Conflict, "wrong_state")
			_, err = f.p.Create(ctx, provision.CreateRequest{Slug: acme, Group: group, Actor: "test"})
			requireFault(t, err, fault.Conflict, "tenant_exists")
			f.invariants(t)
			_, err = f.p.Undrop(ctx, acme, "test")
			require.NoError(t, err)
			email, err = read(made)
			require.NoError(t, err, "undrop brings the data back")
			require.Equal(t, "ann@acme.example", email)

			renamed, err := f.p.Rename(ctx, acme, provision.RenameRequest{Slug: globex, Schema: globex.Schema(), Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, "globex.localhost", renamed.Primary.String())
			require.Equal(t, "globex", renamed.Name)
			email, err = read(made)
			require.NoError(t, err, "whoever holds the old Tenant is bound to the right place")
			require.Equal(t, "ann@acme.example", email)
			_, err = f.p.Suspend(ctx, acme, "test")
			requireFault(t, err, fault.NotFound, "unknown_tenant")
			// The former default domain is held back from other tenants.
			_, err = f.p.Create(ctx, provision.CreateRequest{Slug: acme, Group: group, Actor: "test"})
			requireFault(t, err, fault.Conflict, "domain_held")
			f.invariants(t)

			_, err = f.p.Drop(ctx, globex, 0, "test")
			require.NoError(t, err)
			_, err = f.p.Purge(ctx, globex, "test")
			require.NoError(t, err)
			_, err = f.p.Purge(ctx, globex, "test")
			requireFault(t, err, fault.NotFound, "unknown_tenant")
			f.invariants(t)
			again := f.create(t, "globex", group)
			require.NotEqual(t, made.Number, again.Number, "a number is never used again")
			_, err = f.p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "initech"), Group: group, Domains: []tenant.Host{host(t, "www.acme.example")}, Actor: "test"})
			requireFault(t, err, fault.Conflict, "domain_held")
			f.invariants(t)
			require.NotEqual(t, "0", f.scalar(t, `select count(*)::text from public.audit where action = 'tenant.purge'`), "every change has its line in the audit trail")
		})
	}
}

// F02, behaviours A 16: one slug twenty times at once, and ten slugs at once.
func TestConcurrentCreates(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			_, other, _, err := openOn(func() *postgres.DB {
				db, _, _ := f.env.Open(t, func(o *postgres.Options) { o.Groups = f.groups })
				return db
			}())
			require.NoError(t, err)
			var wg sync.WaitGroup
			var won atomic.Int32
			for i := range 20 {
				p := []*provision.Provisioner{f.p, other}[i%2]
				wg.Go(func() {
					_, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
					switch {
					case err == nil:
						won.Add(1)
					case !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.Locked):
						t.Errorf("a loser got %v", err)
					}
				})
			}
			for i := range 10 {
				wg.Go(func() {
					_, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, fmt.Sprintf("t-%d", i)), Group: group, Actor: "test"})
					if err != nil {
						t.Errorf("t-%d: %v", i, err)
					}
				})
			}
			wg.Wait()
			require.EqualValues(t, 1, won.Load(), "exactly one of twenty creates wins")
			require.Equal(t, "11", f.scalar(t, `select count(*)::text from public.tenants where state = 'active'`))
			f.invariants(t)
		})
	}
}

// F03: one domain, many tenants at once: one has it, and of the others nothing is left.
func TestSameDomainOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	var wg sync.WaitGroup
	var won atomic.Int32
	for i := range 6 {
		wg.Go(func() {
			_, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, fmt.Sprintf("t-%d", i)), Domains: []tenant.Host{host(t, "crm.example")}, Actor: "test"})
			if err == nil {
				won.Add(1)
			} else if !fault.Is(err, fault.Conflict) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, won.Load())
	require.Equal(t, "1", f.scalar(t, `select count(*)::text from public.tenants`))
	f.invariants(t)
}

// Behaviours A 2, 5: a creation that fails leaves neither row nor role nor schema, and a schema that is there is not adopted.
func TestFailedCreateLeavesNothing(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			c := pgtest.Admin(t, f.adminURL(group))
			_, err := c.Exec(ctx, `create schema acme`)
			require.NoError(t, err)
			_, err = f.p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
			requireFault(t, err, fault.Conflict, "schema_exists")
			_, err = c.Exec(ctx, `drop schema acme`)
			require.NoError(t, err)
			f.invariants(t)

			bad, err := migrate.New(f.db, migrate.Options{Files: schemas.Files, Tenant: fstest.MapFS{
				"0001_a.up.sql": {Data: []byte("create table a (id int);")}, "0002_b.up.sql": {Data: []byte("create table b (id int);\ncreate table c (id nonsense);")},
			}})
			require.NoError(t, err)
			base := host(t, "localhost")
			p, err := provision.New(provision.Options{DB: f.db, Migrate: bad, BaseDomain: base, DropGrace: time.Hour, Logger: postgres.DefaultOptions().Logger})
			require.NoError(t, err)
			_, err = p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
			require.Error(t, err)
			require.Equal(t, "0", f.scalar(t, `select count(*)::text from public.tenants`), "a failed create leaves no row")
			require.Equal(t, "0", f.scalar(t, `select count(*)::text from public.domains`))
			require.Equal(t, "0", f.scalar(t, `select count(*)::text from pg_roles r, public.installation i where r.rolname like 'oneo\_' || i.id || '%'`), "nor a role")
			f.invariants(t)
			f.create(t, "acme", group)
			f.invariants(t)
		})
	}
}

func TestCreateIsChecked(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	acme := pgtest.Slug(t, "acme")
	for what, r := range map[string]provision.CreateRequest{
		"no slug": {}, "settings": {Slug: acme, Settings: json.RawMessage(`[]`)}, "endless settings": {Slug: acme, Settings: json.RawMessage(`{"public": 1e100000}`)}, "null settings": {Slug: acme, Settings: json.RawMessage(`null`)},
		"name": {Slug: acme, Name: "a\x00b"}, "group": {Slug: acme, Group: "nowhere"},
	} {
		_, err := f.p.Create(t.Context(), r)
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", what, err)
	}
	first := f.create(t, "acme", "main")
	_, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Schema: first.Schema, Actor: "test"})
	requireFault(t, err, fault.Conflict, "schema_taken")
	require.Equal(t, "1", f.scalar(t, `select count(*)::text from public.tenants`))
	f.invariants(t)
}

// F04: changes of one tenant at once end in one state on which everything agrees; also purge against undrop.
func TestChangesAtOnce(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		t.Run(string(iso), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, func(o *postgres.Options) { o.Isolation = iso; o.OwnerConns = 6 })
			f := fixture{env: env, groups: map[string]postgres.Group{"main": env.Group}, db: env.DB, p: env.Provision, m: env.Migrate}
			ctx, acme := t.Context(), pgtest.Slug(t, "acme")
			for range 12 {
				f.create(t, "acme", "main")
				_, err := f.p.Drop(ctx, acme, 0, "test")
				require.NoError(t, err)
				var wg sync.WaitGroup
				for _, verb := range []func() (tenant.Tenant, error){
					func() (tenant.Tenant, error) { return f.p.Undrop(ctx, acme, "test") },
					func() (tenant.Tenant, error) { return f.p.Purge(ctx, acme, "test") },
					func() (tenant.Tenant, error) { return f.p.Suspend(ctx, acme, "test") },
				} {
					wg.Go(func() {
						if _, err := verb(); err != nil && !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.Locked) && !fault.Is(err, fault.NotFound) {
							t.Errorf("%v", err)
						}
					})
				}
				wg.Wait()
				tn, err := find(ctx, f.db, "acme")
				require.NoError(t, err)
				if tn.State == tenant.Purged {
					continue
				}
				if iso == postgres.ByRole {
					f.invariants(t)
				}
				require.Equal(t, "1", f.scalar(t, `select count(*)::text from public.placements`), "a tenant that is not purged has its placement")
				_, err = f.p.Drop(ctx, acme, 0, "test")
				require.NoError(t, err)
				_, err = f.p.Purge(ctx, acme, "test")
				require.NoError(t, err)
			}
			f.invariants(t)
		})
	}
}

// Purge destroys what was renamed away, and never a schema that stands under the tenant's name by now.
func TestPurgeSparesTheNamesake(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	f.create(t, "acme", "main")
	_, err := f.p.Drop(t.Context(), pgtest.Slug(t, "acme"), 0, "test")
	require.NoError(t, err)
	c := pgtest.Admin(t, f.env.AdminURL)
	_, err = c.Exec(t.Context(), `create schema acme create table keep (id int)`)
	require.NoError(t, err)
	_, err = f.p.Undrop(t.Context(), pgtest.Slug(t, "acme"), "test")
	requireFault(t, err, fault.Conflict, "schema_exists")
	_, err = f.p.Purge(t.Context(), pgtest.Slug(t, "acme"), "test")
	require.NoError(t, err)
	_, err = c.Exec(t.Context(), `select 1 from acme.keep`)
	require.NoError(t, err, "a schema that is not the dropped one must not be touched")
	_, err = c.Exec(t.Context(), `drop schema acme cascade`)
	require.NoError(t, err)
	f.invariants(t)
}

// Queued operations are carried out once each, whoever works; one that fails says why; interrupted ones are taken up;
// what is overdue is purged.
func TestWork(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	queue := func(kind, slug string, request any) (op registry.Operation) {
		require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) (err error) {
			op, err = registry.Enqueue(ctx, tx, kind, slug, "test", request)
			return err
		}))
		return op
	}
	late := f.create(t, "late", "main")
	_, err := f.p.Drop(ctx, late.Slug, time.Hour, "test")
	require.NoError(t, err)
	require.Equal(t, "1", f.scalar(t, `with u as (update public.tenants set purge_after = now() - interval '1 hour' where slug = 'late' returning 1) select count(*)::text from u`))
	var ops []registry.Operation
	for i := range 8 {
		slug := fmt.Sprintf("t-%d", i)
		group := []string{"main", "second"}[i%2]
		ops = append(ops, queue(provision.KindCreate, slug, provision.CreateRequest{Slug: pgtest.Slug(t, slug), Group: group, AdminEmail: "a@b.c", AdminPasswordHash: someHash}.Request()))
	}
	for i := range 8 {
		ops = append(ops, queue(provision.KindSuspend, fmt.Sprintf("t-%d", i), nil))
	}
	unknown := queue(provision.KindDrop, "nobody", nil)
	wrong := queue("tenant.nonsense", "t-1", nil)
	var workers [2]*provision.Provisioner
	for i := range workers {
		db, _, _ := f.env.Open(t, func(o *postgres.Options) { o.Groups = f.groups })
		// One that stands still for a while must not be taken for dead: each operation is to need one attempt.
		_, workers[i], _, err = openOn(db, func(o *provision.Options) { o.StaleAfter = pgtest.Patience })
		require.NoError(t, err)
	}
	var wg sync.WaitGroup
	for _, p := range workers {
		wg.Go(func() {
			if err := p.Work(ctx); err != nil {
				t.Errorf("worker: %v", err)
			}
		})
	}
	get := func(op registry.Operation) (o registry.Operation) {
		require.NoError(t, f.db.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) (err error) {
			o, err = registry.OperationByID(t.Context(), tx, op.ID)
			return err
		}))
		return o
	}
	ended := func(op registry.Operation) registry.Operation {
		deadline := time.Now().Add(pgtest.Patience)
		for {
			o := get(op)
			if o.State == registry.Done || o.State == registry.Failed {
				return o
			}
			require.Truef(t, time.Now().Before(deadline), "operation %s of %s is still %s", o.Kind, o.Slug, o.State)
			pause := time.NewTimer(20 * time.Millisecond)
			<-pause.C
		}
	}
	for _, op := range ops {
		o := ended(op)
		require.Equalf(t, registry.Done, o.State, "%s of %s: %s", o.Kind, o.Slug, o.Error)
		require.Equal(t, 1, o.Attempts)
		require.NotContains(t, string(o.Request), "argon2id", "a password hash stays no longer than it is needed")
	}
	require.Contains(t, string(ended(unknown).Error), "unknown_tenant")
	require.Equal(t, registry.Failed, ended(wrong).State)
	require.Equal(t, "8", f.scalar(t, `select count(*)::text from public.tenants where state = 'suspended'`))
	// Nobody waits for a purge: it may still be at work.
	purged := func() bool { return f.scalar(t, `select state from public.tenants where slug = 'late'`) == "purged" }
	for deadline := time.Now().Add(pgtest.Patience); !purged() && time.Now().Before(deadline); {
		pause := time.NewTimer(20 * time.Millisecond)
		<-pause.C
	}
	require.True(t, purged(), "what is overdue is purged")
	require.Equal(t, "8", f.scalar(t, `select count(*)::text from public.audit where action = 'tenant.suspend'`), "each operation was done once")

	// An operation whose process died: no sign of life any more.
	acme := f.create(t, "acme", "second")
	var dead registry.Operation
	require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) (err error) {
		if dead, err = registry.Begin(ctx, tx, provision.KindDrop, acme, "test", map[string]any{"slug": "acme", "grace_seconds": 60}); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `update public.operations set heartbeat = now() - interval '1 hour' where id = $1`, dead.ID)
		return err
	}))
	o := ended(dead)
	require.Equalf(t, registry.Done, o.State, "%s", o.Error)
	require.GreaterOrEqual(t, o.Attempts, 2)
	require.Equal(t, "dropped", f.scalar(t, `select state from public.tenants where slug = 'acme'`))
	stop()
	wg.Wait()
	f.invariants(t)
}

// While another process shows signs of life, its operation is waited for and then refused, not doubled.
func TestLivingOperationIsNotTakenOver(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	acme := f.create(t, "acme", "second")
	p, err := provision.New(provision.Options{
		DB: f.db, Migrate: f.m, BaseDomain: host(t, "localhost"), DropGrace: time.Hour, GateWait: 100 * time.Millisecond, StaleAfter: time.Minute / 60 * 1,
		Logger: postgres.DefaultOptions().Logger,
	})
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 400*time.Millisecond)
	defer cancel()
	require.NoError(t, f.db.AsOwner(t.Context(), "main", func(tx *postgres.OwnerTx) error {
		_, err := registry.Begin(t.Context(), tx, provision.KindSuspend, acme, "test", nil)
		return err
	}))
	_, err = p.Drop(ctx, acme.Slug, 0, "test")
	require.Error(t, err)
	require.True(t, errors.Is(err, context.DeadlineExceeded) || fault.Is(err, fault.Locked) || fault.Is(err, fault.Unavailable), "%v", err)
	require.Equal(t, "active", f.scalar(t, `select state from public.tenants where slug = 'acme'`), "nothing was done over the head of a living operation")
}

// brief is a provisioner that waits for nothing long.
func (f fixture) brief(t *testing.T) *provision.Provisioner {
	t.Helper()
	p, err := provision.New(provision.Options{
		DB: f.db, Migrate: f.m, BaseDomain: host(t, "localhost"), DropGrace: time.Hour, DomainHold: time.Hour,
		GateWait: 50 * time.Millisecond, StaleAfter: 20 * time.Millisecond, Logger: postgres.DefaultOptions().Logger,
	})
	require.NoError(t, err)
	return p
}

// An operation that has begun in two databases is never given up half-made, however often it was tried in vain.
func TestBegunOperationIsNotGivenUp(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx, acme := t.Context(), pgtest.Slug(t, "acme")
	p := f.brief(t)
	r := provision.CreateRequest{Slug: acme, Group: "second", Actor: "test"}
	verbs := map[string]func() error{
		"create": func() error {
			_, finished, err := p.CreateOrFinish(ctx, r)
			require.Equal(t, err == nil, finished, "the first try has begun it")
			return err
		},
		"rename": func() error {
			_, err := p.Rename(ctx, acme, provision.RenameRequest{Slug: pgtest.Slug(t, "globex"), Schema: pgtest.Slug(t, "globex").Schema(), Actor: "test"})
			return err
		},
	}
	number := func() (n int32) {
		require.NoError(t, pgtest.Admin(t, f.env.AdminURL).QueryRow(ctx, `select coalesce((select max(number) from public.tenants), (select last_value + is_called::int from public.tenant_numbers))`).Scan(&n))
		return n
	}
	for _, what := range []string{"create", "rename"} {
		require.NoError(t, f.db.AsOwner(ctx, "second", func(tx *postgres.OwnerTx) error {
			got, err := tx.TryOperationLock(ctx, number())
			require.NoError(t, err)
			require.True(t, got)
			require.Truef(t, fault.Is(verbs[what](), fault.Locked), "%s must find the tenant locked", what)
			f.scalar(t, `with u as (update public.operations set attempts = 1000 where state = 'running' returning 1) select count(*)::text from u`)
			require.Truef(t, fault.Is(verbs[what](), fault.Locked), "%s must find the tenant locked again", what)
			return nil
		}))
		require.Equalf(t, "running", f.scalar(t, `select state from public.operations order by id desc limit 1`), "%s may still succeed", what)
		require.NoErrorf(t, verbs[what](), "%s, doing it again", what)
		f.invariants(t)
	}
	require.Equal(t, "globex active", f.scalar(t, `select slug || ' ' || state from public.tenants`))
}

// What cannot succeed is taken back, in both databases.
func TestImpossibleRenameIsTakenBack(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	f.create(t, "acme", "second")
	c := pgtest.Admin(t, f.adminURL("second"))
	_, err := c.Exec(t.Context(), `create schema globex`)
	require.NoError(t, err)
	_, err = f.p.Rename(t.Context(), pgtest.Slug(t, "acme"), provision.RenameRequest{Slug: pgtest.Slug(t, "globex"), Schema: pgtest.Slug(t, "globex").Schema(), Actor: "test"})
	requireFault(t, err, fault.Conflict, "schema_exists")
	require.Equal(t, "acme acme active", f.scalar(t, `select slug || ' ' || schema || ' ' || state from public.tenants`))
	require.Equal(t, "failed", f.scalar(t, `select state from public.operations order by id desc limit 1`))
	_, err = c.Exec(t.Context(), `drop schema globex`)
	require.NoError(t, err)
	f.invariants(t)
}

// A tenant that stands half-made with no operation to finish it is finished or made anew by creating it.
func TestHalfMadeIsTakenUp(t *testing.T) {
	t.Parallel()
	for _, made := range []bool{true, false} {
		t.Run(fmt.Sprintf("made %t", made), func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, "second")
			ctx, acme := t.Context(), pgtest.Slug(t, "acme")
			if made {
				f.create(t, "acme", "second")
				f.scalar(t, `with u as (update public.tenants set state = 'creating' returning 1) select count(*)::text from u`)
			} else {
				f.scalar(t, `with g as (insert into public.groups (name) values ('second') on conflict do nothing), i as (
	insert into public.tenants (slug, schema, name, group_name, state) values ('acme', 'acme', 'acme', 'second', 'creating') returning 1) select count(*)::text from i`)
			}
			_, err := f.p.Drop(ctx, acme, 0, "test")
			requireFault(t, err, fault.Conflict, "wrong_state")
			require.Contains(t, fault.Of(err).Hint, "oneo tenant create acme")
			_, finished, err := f.p.CreateOrFinish(ctx, provision.CreateRequest{Slug: acme, Group: "second", Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, made, finished)
			require.Equal(t, "active", f.scalar(t, `select state from public.tenants`))
			f.invariants(t)
		})
	}
}

// A schema that is gone, moved or made again behind oneo's back: its tenant can be dropped and purged, and what bears
// the name by then is not touched.
func TestSchemaMadeAgainIsSpared(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		for what, meddle := range map[string]string{
			"gone":       `drop schema acme cascade`,
			"made again": `drop schema acme cascade; create schema acme authorization oneo_owner; create table acme.keep (id int)`,
			"moved":      `alter schema acme rename to elsewhere; create table elsewhere.keep (id int)`,
			"restored":   `drop schema acme cascade; create schema acme; do $$ begin execute format('grant usage on schema acme to %I', (select role from public.placements where schema = 'acme')); end $$; create table acme.keep (id int)`,
		} {
			t.Run(group+" "+what, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, group)
				ctx, acme, globex := t.Context(), pgtest.Slug(t, "acme"), pgtest.Slug(t, "globex")
				f.create(t, "acme", group)
				c := pgtest.Admin(t, f.adminURL(group))
				_, err := c.Exec(ctx, meddle, pgx.QueryExecModeSimpleProtocol)
				require.NoError(t, err)
				_, err = f.p.Rename(ctx, acme, provision.RenameRequest{Slug: globex, Schema: globex.Schema(), Actor: "test"})
				requireFault(t, err, fault.NotFound, "schema_missing")
				require.Contains(t, fault.Of(err).Hint, "oneo tenant drop acme")
				require.Equal(t, "acme", f.scalar(t, `select slug from public.tenants`))
				dropped, err := f.p.Drop(ctx, acme, 0, "test")
				require.NoError(t, err)
				require.Equal(t, tenant.Dropped, dropped.State)
				require.Equal(t, "true", f.scalar(t, `select details ->> 'schema_missing' from public.audit where action = 'tenant.drop'`))
				_, err = f.p.Undrop(ctx, acme, "test")
				requireFault(t, err, fault.NotFound, "schema_missing")
				require.Contains(t, fault.Of(err).Hint, "--purge")
				_, err = f.p.Purge(ctx, acme, "test")
				require.NoError(t, err)
				require.Equal(t, "true", f.scalar(t, `select details ->> 'schema_missing' from public.audit where action = 'tenant.purge'`))
				var kept int
				require.NoError(t, c.QueryRow(ctx, `select count(*) from pg_catalog.pg_class where relname = 'keep'`).Scan(&kept))
				var roles int
				require.NoError(t, c.QueryRow(ctx, `select count(*) from pg_catalog.pg_roles r, public.installation i where r.rolname = 'oneo_' || i.id || '_' || $1::text`, fmt.Sprint(dropped.Number)).Scan(&roles))
				require.Equal(t, map[string]int{"gone": 0, "made again": 0, "moved": 1, "restored": 1}[what], roles, "the role stays only where something refers to it")
				if what != "gone" {
					require.Equal(t, 1, kept, "what is not oneo's must not be destroyed")
				}
			})
		}
	}
}

// A dropped tenant's schema that was made again under its renamed name is no more the tenant's.
func TestPurgeSparesWhatWasMadeAgain(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	acme := f.create(t, "acme", "main")
	_, err := f.p.Drop(t.Context(), acme.Slug, 0, "test")
	require.NoError(t, err)
	name := fmt.Sprintf("oneo_dropped_%d", acme.Number)
	c := pgtest.Admin(t, f.env.AdminURL)
	_, err = c.Exec(t.Context(), fmt.Sprintf(`drop schema %s cascade; create schema %[1]s authorization oneo_owner; create table %[1]s.keep (id int)`, name), pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	_, err = f.p.Purge(t.Context(), acme.Slug, "test")
	require.NoError(t, err)
	_, err = c.Exec(t.Context(), `select from `+name+`.keep`)
	require.NoError(t, err)
}

// A tenant that was undropped and dropped again since it was read, or found overdue, has its whole grace before it.
func TestGraceThatBeganAnew(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx, acme := t.Context(), pgtest.Slug(t, "acme")
			f.create(t, "acme", group)
			read, err := f.p.Drop(ctx, acme, 0, "test")
			require.NoError(t, err)
			_, err = f.p.Undrop(ctx, acme, "test")
			require.NoError(t, err)
			_, err = f.p.Drop(ctx, acme, 0, "test")
			require.NoError(t, err)
			requireFault(t, f.p.PurgeAsRead(ctx, read), fault.Conflict, "tenant_changed")
			requireFault(t, f.p.PurgeIfOverdue(ctx, acme), fault.Conflict, "not_overdue")
			require.Equal(t, "dropped", f.scalar(t, `select state from public.tenants`))
			f.scalar(t, `with u as (update public.tenants set purge_after = now() - interval '1 hour' returning 1) select count(*)::text from u`)
			require.NoError(t, f.p.PurgeIfOverdue(ctx, acme))
			require.Equal(t, "purged", f.scalar(t, `select state from public.tenants`))
			f.invariants(t)
		})
	}
}

// Tenants that cannot be purged do not keep the worker from those behind them.
func TestOverdueBehindFailing(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	c := pgtest.Admin(t, f.env.AdminURL)
	const stuck = 21
	for i := range stuck + 1 {
		made := f.create(t, fmt.Sprintf("t-%02d", i), "main")
		if i < stuck {
			_, err := c.Exec(ctx, fmt.Sprintf(`create table public.held_%[1]d (id int); do $$ begin execute format('grant select on public.held_%[1]d to %%I', (select role from public.placements where number = %[1]d)); end $$`, made.Number), pgx.QueryExecModeSimpleProtocol)
			require.NoError(t, err)
		}
		_, err := f.p.Drop(ctx, made.Slug, 0, "test")
		require.NoError(t, err)
	}
	_, err := c.Exec(ctx, `update public.tenants set purge_after = now() - interval '1 day' + number * interval '1 minute'`)
	require.NoError(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f.p.Work(ctx); err != nil {
			t.Errorf("worker: %v", err)
		}
	})
	state := func() string { return f.scalar(t, `select state from public.tenants order by number desc limit 1`) }
	for deadline := time.Now().Add(pgtest.Patience); state() != "purged" && time.Now().Before(deadline); {
		pause := time.NewTimer(50 * time.Millisecond)
		<-pause.C
	}
	stop()
	wg.Wait()
	require.Equal(t, "purged", state(), "the tenant behind those that cannot be purged")
	require.Equal(t, fmt.Sprint(stuck), f.scalar(t, `select count(*)::text from public.tenants where state = 'dropped'`))
}

// A dry run refuses what the creation refuses, and leaves no trace.
func TestDryRun(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			acme := f.create(t, "acme", group)
			require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
				if err := registry.AddDomain(ctx, tx, acme, host(t, "crm.example"), false); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `insert into public.domain_holds (host, tenant, held_until) values ('held.example', 1, now() + interval '1 hour')`)
				return err
			}))
			_, err := pgtest.Admin(t, f.adminURL(group)).Exec(ctx, `create schema theirs`)
			require.NoError(t, err)
			theirs, err := tenant.ParseSchema("theirs")
			require.NoError(t, err)
			counts := func() string {
				return f.scalar(t, `select concat_ws(' ', (select last_value from public.tenant_numbers), (select count(*) from public.tenants), (select count(*) from public.domains), (select count(*) from public.operations), (select count(*) from public.groups))`)
			}
			was := counts()
			for what, c := range map[string]struct {
				change func(*provision.CreateRequest)
				code   string
			}{
				"good":            {func(*provision.CreateRequest) {}, ""},
				"unknown group":   {func(r *provision.CreateRequest) { r.Group = "nowhere" }, "unknown_group"},
				"taken name":      {func(r *provision.CreateRequest) { r.Slug = acme.Slug }, "tenant_exists"},
				"taken schema":    {func(r *provision.CreateRequest) { r.Schema = acme.Schema }, "schema_taken"},
				"stranger schema": {func(r *provision.CreateRequest) { r.Schema = theirs }, "schema_exists"},
				"taken domain":    {func(r *provision.CreateRequest) { r.Domains = []tenant.Host{host(t, "crm.example")} }, "domain_taken"},
				"held domain":     {func(r *provision.CreateRequest) { r.Domains = []tenant.Host{host(t, "held.example")} }, "domain_held"},
			} {
				r := provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: group, Actor: "test"}
				c.change(&r)
				_, err := f.p.DryRun(ctx, r)
				require.Equalf(t, was, counts(), "%s: a dry run must leave nothing behind", what)
				if c.code == "" {
					require.NoError(t, err, what)
					continue
				}
				require.Errorf(t, err, what)
				require.Equalf(t, c.code, fault.Of(err).StableCode(), "%s: %v", what, err)
				_, err = f.p.Create(ctx, r)
				require.Errorf(t, err, what)
				require.Equalf(t, c.code, fault.Of(err).StableCode(), "%s, in earnest: %v", what, err)
				was = counts() // the attempt has used numbers up
			}
			f.scalar(t, fmt.Sprintf(`with u as (update public.groups set max_tenants = 1 where name = '%s' returning 1) select count(*)::text from u`, group))
			_, err = f.p.DryRun(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: group, Actor: "test"})
			requireFault(t, err, fault.Conflict, "group_full")
		})
	}
}

// A group's limit holds, however many are made at once.
func TestLimitAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	f.scalar(t, `with u as (update public.groups set max_tenants = 3 where name = 'main' returning 1) select count(*)::text from u`)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			_, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, fmt.Sprintf("t-%d", i)), Actor: "test"})
			if err != nil && fault.Of(err).Code != "group_full" {
				t.Errorf("t-%d: %v", i, err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, "3", f.scalar(t, `select count(*)::text from public.tenants`))
	f.invariants(t)
}

// An operation whose schema was made goes forward only, whatever has become of the schema since.
func TestWhatIsMadeGoesForward(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx := t.Context()
	acme := f.create(t, "acme", "second")
	c := pgtest.Admin(t, f.adminURL("second"))
	_, err := c.Exec(ctx, `alter schema acme rename to globex; update public.placements set schema = 'globex'; drop schema globex cascade`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
		op, err := registry.Begin(ctx, tx, provision.KindRename, acme, "test", map[string]string{
			"slug": "globex", "schema": "globex", "name": "globex", "old_slug": "acme", "old_schema": "acme", "old_name": "acme",
		})
		if err != nil {
			return err
		}
		if _, err := tx.Exec(ctx, `update public.operations set heartbeat = now() - interval '1 hour' where id = $1`, op.ID); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, `update public.tenants set slug = 'globex', schema = 'globex', name = 'globex'`)
		return err
	}))
	dropped, err := f.p.Drop(ctx, pgtest.Slug(t, "globex"), 0, "test")
	require.NoError(t, err)
	require.Equal(t, tenant.Dropped, dropped.State)
	require.Equal(t, "done", f.scalar(t, `select state from public.operations where kind = 'tenant.rename'`))
}
