package provision_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"sync"
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

// sized is another process whose pools have a size; they are not filled yet.
func (f fixture) sized(t *testing.T, size int, change ...func(*provision.Options)) *provision.Provisioner {
	t.Helper()
	db, _, _ := f.env.Open(t, func(o *postgres.Options) { o.Groups = f.groups })
	_, p, _, err := openOn(db, append([]func(*provision.Options){task{PoolSize: size}.options}, change...)...)
	require.NoError(t, err)
	return p
}

// pooled is sized with full pools.
func (f fixture) pooled(t *testing.T, size int) *provision.Provisioner {
	t.Helper()
	p := f.sized(t, size)
	p.KeepPools(t.Context())
	for g := range f.groups {
		require.Lenf(t, f.spares(t, g), size, "spares of group %s", g)
	}
	return p
}

// spares are the numbers of a group's spares.
func (f fixture) spares(t *testing.T, group string) (numbers []int32) {
	t.Helper()
	require.NoError(t, f.db.AsOwner(t.Context(), group, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(t.Context(), `select number from public.placements where state = 'spare' order by number`)
		if err != nil {
			return err
		}
		numbers, err = pgx.CollectRows(rows, pgx.RowTo[int32])
		return err
	}))
	return numbers
}

func (f fixture) requireSpares(t *testing.T, group string, ready, unfit int) {
	t.Helper()
	counts, err := f.p.Spares(t.Context())
	require.NoError(t, err)
	for _, c := range counts {
		if c.Group == group {
			require.Equal(t, provision.SpareCount{Group: group, Ready: ready, Unfit: unfit}, c)
			return
		}
	}
	t.Fatalf("there is no group %s", group)
}

// What makes a spare one that no tenant may have. %[1]d is its number.
const (
	behind = `set search_path to oneo_spare_%[1]d, ext; drop table records, fields, pipelines;
delete from public.ledger where set = 'tenant' and tenant = %[1]d and version > 1; update public.placements set version = 1 where number = %[1]d`
	edited    = `update public.ledger set checksum = sha256('other') where set = 'tenant' and tenant = %[1]d and version = 2`
	missing   = `drop schema oneo_spare_%[1]d cascade`
	madeAgain = `drop schema oneo_spare_%[1]d cascade; create schema oneo_spare_%[1]d`
	atWork    = `insert into public.progress (tenant, version, checksum, beside) values (%[1]d, 2, sha256(''), true)`
	otherRole = `update public.placements set role = 'oneo_app' where number = %[1]d`
	noRows    = `delete from public.ledger where set = 'tenant' and tenant = %[1]d and version = 1`
)

func (f fixture) spoil(t *testing.T, group string, number int32, how string) {
	t.Helper()
	_, err := pgtest.Admin(t, f.adminURL(group)).PgConn().Exec(t.Context(), fmt.Sprintf(how, number)).ReadAll()
	require.NoError(t, err)
}

// A tenant that took a spare is like any other: in its structure, its rights, its life and what it is told by.
func TestClaimedTenantIsLikeAnyOther(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx, acme := t.Context(), pgtest.Slug(t, "acme")
			plain := f.create(t, "plain", group)
			p := f.pooled(t, 3)
			spares := f.spares(t, group)
			listed := func() (names []string) {
				require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
					found, err := registry.List(ctx, tx, registry.Filter{})
					for _, tn := range found {
						names = append(names, tn.Slug.String())
					}
					return err
				}))
				return names
			}
			require.Equal(t, []string{"plain"}, listed(), "spares are no tenants")

			claimed, err := p.Create(ctx, provision.CreateRequest{
				Slug: acme, Group: group, Domains: []tenant.Host{host(t, "www.acme.example")}, AdminEmail: "ann@acme.example", AdminPasswordHash: someHash,
				Settings: json.RawMessage(`{"public": {"n": 1}}`), Actor: "test",
			})
			require.NoError(t, err)
			require.Equal(t, spares[0], claimed.Number)
			require.Equal(t, spares[1:], f.spares(t, group))
			require.Equal(t, []string{"acme", "plain"}, listed())
			require.Equal(t, tenant.Active, claimed.State)
			require.Equal(t, "acme.localhost", claimed.Primary.String())
			require.Equal(t, "acme 2 1 {\"public\": {\"n\": 1}}", f.scalar(t, `select t.schema || ' ' || (select count(*) from public.domains d where d.tenant = t.number) || ' ' ||
	(select count(*) from public.audit a where a.tenant = t.number and a.action = 'tenant.create') || ' ' || t.settings from public.tenants t where slug = 'acme'`))
			f.invariants(t)

			inst, err := f.db.Installation(ctx, group)
			require.NoError(t, err)
			c := pgtest.Admin(t, f.adminURL(group))
			require.Equal(t, pgtest.Fingerprint(t, c, "plain", inst.TenantRole(plain.Number)), pgtest.Fingerprint(t, c, "acme", inst.TenantRole(claimed.Number)))
			const applied = `select count(*) || ' ' || string_agg(name || encode(checksum, 'hex'), ' ' order by version) from public.ledger where set = 'tenant' and tenant = $1`
			var want, got string
			require.NoError(t, c.QueryRow(ctx, applied, plain.Number).Scan(&want))
			require.NoError(t, c.QueryRow(ctx, applied, claimed.Number).Scan(&got))
			require.Equal(t, want, got)

			var email string
			require.NoError(t, f.db.InTenant(ctx, claimed, postgres.Write, func(tx *postgres.Tx) error {
				if err := tx.QueryRow(ctx, `select email from users`).Scan(&email); err != nil {
					return err
				}
				_, err := tx.Exec(ctx, `update users set name = 'Ann'`)
				return err
			}))
			require.Equal(t, "ann@acme.example", email)
			other := fmt.Sprintf("oneo_spare_%d", spares[1])
			for from, table := range map[tenant.Tenant]string{plain: "acme", claimed: "plain"} {
				for _, table := range []string{table, other} {
					err := f.db.InTenant(ctx, from, postgres.Read, func(tx *postgres.Tx) error {
						_, err := tx.Exec(ctx, `select from `+table+`.users`)
						return err
					})
					require.Equalf(t, "42501", postgres.SQLState(err), "%s must not reach %s: %v", from.Slug, table, err)
				}
			}
			// Who knows a spare's number is not bound to it.
			err = f.db.InTenant(ctx, tenant.Tenant{Number: spares[1], Slug: acme, Schema: acme.Schema(), Group: group}, postgres.Read, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `select from users`)
				return err
			})
			requireFault(t, err, fault.Gone, "tenant_gone")

			_, err = p.Rename(ctx, acme, provision.RenameRequest{Slug: pgtest.Slug(t, "globex"), Schema: pgtest.Slug(t, "globex").Schema(), Actor: "test"})
			require.NoError(t, err)
			globex := pgtest.Slug(t, "globex")
			_, err = p.Drop(ctx, globex, 0, "test")
			require.NoError(t, err)
			f.invariants(t)
			_, err = p.Undrop(ctx, globex, "test")
			require.NoError(t, err)
			_, err = p.Drop(ctx, globex, 0, "test")
			require.NoError(t, err)
			_, err = p.Purge(ctx, globex, "test")
			require.NoError(t, err)
			f.invariants(t)
			again, err := p.Create(ctx, provision.CreateRequest{Slug: globex, Schema: pgtest.Slug(t, "own-schema").Schema(), Group: group, Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, spares[1], again.Number)
			require.Equal(t, "own_schema", again.Schema.String())
			f.invariants(t)
		})
	}
}

// Behaviours A 20 and 21: fifty creates by two processes on a pool of ten. Every one is made, no two have a number, and
// the pool is never larger than its size and full again in the end.
func TestFiftyCreatesOnAPoolOfTen(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			const size, creates = 10, 50
			processes := []*provision.Provisioner{f.pooled(t, size), f.sized(t, size)}
			first := f.spares(t, group)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var working, wg sync.WaitGroup
			for _, p := range processes {
				working.Go(func() {
					if err := p.Work(ctx); err != nil {
						t.Errorf("worker: %v", err)
					}
				})
			}
			var mu sync.Mutex
			numbers := map[int32]bool{}
			for i := range creates {
				wg.Go(func() {
					made, err := processes[i%2].Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, fmt.Sprintf("t-%d", i)), Group: group, Actor: "test"})
					if err != nil {
						t.Errorf("t-%d: %v", i, err)
						return
					}
					mu.Lock()
					defer mu.Unlock()
					if numbers[made.Number] {
						t.Errorf("two tenants have the number %d", made.Number)
					}
					numbers[made.Number] = true
				})
			}
			done := make(chan struct{})
			go func() { wg.Wait(); close(done) }()
			full := func() bool {
				n := len(f.spares(t, group))
				require.LessOrEqual(t, n, size, "the pool is too large")
				return n == size
			}
			for running := true; running; {
				select {
				case <-done:
					running = false
				default:
					full()
				}
			}
			for deadline := time.Now().Add(pgtest.Patience); !full(); {
				require.True(t, time.Now().Before(deadline), "the pool is not filled again")
				pause := time.NewTimer(50 * time.Millisecond)
				<-pause.C
			}
			stop()
			working.Wait()
			require.Len(t, numbers, creates)
			for _, n := range first {
				require.Truef(t, numbers[n], "the spare %d was taken by nobody", n)
			}
			f.requireSpares(t, group, size, 0)
			f.invariants(t)
		})
	}
}

// What a creation would not make now is given to no tenant: it is made in the ordinary way, and the spare replaced.
func TestSparesThatNoTenantGets(t *testing.T) {
	t.Parallel()
	for what, how := range map[string]string{
		"behind": behind, "schema missing": missing, "schema made again": madeAgain, "data migration at work": atWork, "another role": otherRole, "no ledger row": noRows,
	} {
		groups := []string{"main"}
		if how == behind || how == madeAgain { // the question is the same everywhere
			groups = append(groups, "second")
		}
		for _, group := range groups {
			t.Run(group+" "+what, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t, group)
				p := f.pooled(t, 1)
				bad := f.spares(t, group)
				f.spoil(t, group, bad[0], how)
				made, err := p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
				require.NoError(t, err)
				require.NotEqual(t, bad[0], made.Number)
				require.Equal(t, bad, f.spares(t, group))
				f.requireSpares(t, group, 0, 1)
				f.reached(t, "create", group)

				require.NoError(t, p.KeepSpares(t.Context()))
				f.requireSpares(t, group, 1, 0)
				require.NotEqual(t, bad, f.spares(t, group))
				if how == madeAgain { // what bears its name is somebody else's
					c := pgtest.Admin(t, f.adminURL(group))
					_, err := c.Exec(t.Context(), fmt.Sprintf(`drop schema oneo_spare_%d`, bad[0]))
					require.NoError(t, err, "a schema that is not oneo's was left alone")
				}
				good := f.spares(t, group)
				made, err = p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: group, Actor: "test"})
				require.NoError(t, err)
				require.Equal(t, good[0], made.Number)
				f.invariants(t)
			})
		}
	}
}

// A spare of files that have changed since keeps nobody from anything once the tenants' files are known to be ours, and
// is not judged by a process whose files are not the tenants'.
func TestSparesOfEditedFiles(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	ctx := t.Context()
	p := f.pooled(t, 2)
	bad := f.spares(t, "main")
	for _, n := range bad {
		f.spoil(t, "main", n, edited)
	}
	_, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Actor: "test"})
	requireFault(t, err, fault.Conflict, "edited_migration")
	p.KeepPools(ctx)
	f.requireSpares(t, "main", 2, 0)
	require.NotSubset(t, f.spares(t, "main"), bad)
	f.invariants(t)
	f.create(t, "acme", "main")
	good := f.spares(t, "main")

	other := fstest.MapFS{}
	for _, m := range f.m.Files(migrate.TenantSet) {
		other[m.String()+".up.sql"] = &fstest.MapFile{Data: []byte(m.Up + "\n-- changed")}
	}
	stranger := f.sized(t, 2, f.files(t, other))
	stranger.KeepPools(ctx)
	require.Equal(t, good, f.spares(t, "main"), "whoever has other files than the tenants destroys nothing")
	_, err = stranger.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Actor: "test"})
	requireFault(t, err, fault.Conflict, "edited_migration")
	require.Equal(t, good, f.spares(t, "main"))
	f.invariants(t)
}

// files makes a process's tenant migrations others.
func (f fixture) files(t *testing.T, files fs.FS) func(*provision.Options) {
	t.Helper()
	return func(o *provision.Options) {
		m, err := migrate.New(o.DB, migrate.Options{Files: schemas.Files, Tenant: files})
		require.NoError(t, err)
		o.Migrate = m
	}
}

// Two versions of oneo at once: the newer one replaces what is behind, the older one leaves that alone and takes none.
func TestSparesOfTwoVersions(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			old := f.pooled(t, 2)
			before := f.spares(t, group)
			newer := fstest.MapFS{"0003_more.up.sql": {Data: []byte("create table more (id int);")}}
			for _, m := range f.m.Files(migrate.TenantSet) {
				newer[m.String()+".up.sql"] = &fstest.MapFile{Data: []byte(m.Up)}
			}
			next := f.sized(t, 2, f.files(t, newer))
			made, err := next.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
			require.NoError(t, err)
			require.NotContains(t, before, made.Number, "a spare that is behind is taken by nobody")
			require.NoError(t, next.KeepSpares(ctx))
			after := f.spares(t, group)
			require.Len(t, after, 2)
			require.NotSubset(t, before, after)
			var least int
			require.NoError(t, pgtest.Admin(t, f.adminURL(group)).QueryRow(ctx, `select min(version) from public.placements where state = 'spare'`).Scan(&least))
			require.Equal(t, 3, least)

			old.KeepPools(ctx)
			require.NoError(t, old.KeepSpares(ctx))
			require.Equal(t, after, f.spares(t, group), "what is newer is not the older one's to judge")
			made, err = old.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: group, Actor: "test"})
			require.NoError(t, err)
			require.NotContains(t, after, made.Number, "nor to take")
			made, err = next.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "initech"), Group: group, Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, after[0], made.Number)
			f.invariants(t)
		})
	}
}

// Behaviours A 21: a creation that fails gives its spare back.
func TestFailedClaimGivesTheSpareBack(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			p := f.pooled(t, 1)
			_, err := f.p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "first"), Domains: []tenant.Host{host(t, "crm.example")}, Actor: "test"})
			require.NoError(t, err)
			c := pgtest.Admin(t, f.adminURL(group))
			_, err = c.Exec(ctx, `create schema strange`)
			require.NoError(t, err)
			spares := f.spares(t, group)
			for code, r := range map[string]provision.CreateRequest{
				"domain_taken":  {Slug: pgtest.Slug(t, "acme"), Domains: []tenant.Host{host(t, "crm.example")}},
				"schema_taken":  {Slug: pgtest.Slug(t, "acme"), Schema: pgtest.Slug(t, "first").Schema()},
				"tenant_exists": {Slug: pgtest.Slug(t, "first")},
				"schema_exists": {Slug: pgtest.Slug(t, "strange")},
			} {
				r.Group, r.Actor = group, "test"
				_, err := p.Create(ctx, r)
				requireFault(t, err, fault.Conflict, code)
				require.Equalf(t, spares, f.spares(t, group), "after %s", code)
				f.requireSpares(t, group, 1, 0)
			}
			require.Equal(t, "1", f.scalar(t, `select count(*)::text from public.tenants`))
			_, err = c.Exec(ctx, `drop schema strange`)
			require.NoError(t, err)
			made, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "strange"), Group: group, Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, spares[0], made.Number)
			empty, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: group, Actor: "test"})
			require.NoError(t, err, "an empty pool makes one")
			require.NotContains(t, spares, empty.Number)
			f.reached(t, "create", group)
			f.invariants(t)
		})
	}
}

// In two databases, a creation that stands still behind its beginning has reserved its spare: nobody else gets it. What
// becomes of the spare meanwhile does not keep the creation from ending, under the same number.
func TestReservedSpare(t *testing.T) {
	t.Parallel()
	for what, how := range map[string]string{"untouched": "select", "behind": behind, "missing": missing, "removed": ""} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, "second")
			ctx := t.Context()
			f.pooled(t, 2)
			p := f.sized(t, 2, func(o *provision.Options) { o.GateWait, o.StaleAfter = 50*time.Millisecond, 20*time.Millisecond })
			spares := f.spares(t, "second")
			acme := provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Group: "second", AdminEmail: "ann@acme.example", AdminPasswordHash: someHash, Actor: "test"}
			require.NoError(t, f.db.AsOwner(ctx, "second", func(tx *postgres.OwnerTx) error {
				got, err := tx.TryOperationLock(ctx, spares[0])
				require.NoError(t, err)
				require.True(t, got)
				_, err = p.Create(ctx, acme)
				require.Truef(t, fault.Is(err, fault.Locked), "the tenant must be found locked: %v", err)
				return nil
			}))
			require.Equal(t, spares, f.spares(t, "second"))
			other, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Group: "second", Actor: "test"})
			require.NoError(t, err)
			require.Equal(t, spares[1], other.Number, "the next spare, not the reserved one")
			third, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "initech"), Group: "second", Actor: "test"})
			require.NoError(t, err)
			require.NotContains(t, spares, third.Number, "no spare is left but the reserved one")
			if how == "" {
				did, err := p.Keep(ctx, "second", 0)
				require.NoError(t, err)
				require.True(t, did)
			} else {
				f.spoil(t, "second", spares[0], how+" /* %[1]d */")
			}
			made, finished, err := p.CreateOrFinish(ctx, acme)
			require.NoError(t, err)
			require.True(t, finished)
			require.Equal(t, spares[0], made.Number)
			require.Empty(t, f.spares(t, "second"))
			f.reached(t, "create", "second")
			inst, err := f.db.Installation(ctx, "second")
			require.NoError(t, err)
			c := pgtest.Admin(t, f.adminURL("second"))
			require.Equal(t, pgtest.Fingerprint(t, c, "initech", inst.TenantRole(third.Number)), pgtest.Fingerprint(t, c, "acme", inst.TenantRole(made.Number)))
			f.invariants(t)
		})
	}
}

// The pools follow the setting and the groups, and count for no limit.
func TestPoolSize(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx := t.Context()
	set := func(sql string) {
		t.Helper()
		_, err := pgtest.Admin(t, f.env.AdminURL).Exec(ctx, sql)
		require.NoError(t, err)
	}
	sizes := func(main, second int) {
		t.Helper()
		f.requireSpares(t, "main", main, 0)
		f.requireSpares(t, "second", second, 0)
		f.invariants(t)
	}
	f.pooled(t, 3)
	sizes(3, 3)
	f.pooled(t, 1)
	sizes(1, 1)
	// What a process does not ask for, it does not take.
	spares := f.spares(t, "main")
	require.NotContains(t, spares, f.create(t, "acme", "main").Number)

	set(`insert into public.groups (name, accepting) values ('second', false)`)
	set(`update public.groups set max_tenants = 2 where name = 'main'`)
	p := f.sized(t, 2)
	p.KeepPools(ctx)
	sizes(2, 0)
	_, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "globex"), Actor: "test"})
	require.NoError(t, err, "spares are not counted as tenants")
	_, err = p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "initech"), Actor: "test"})
	requireFault(t, err, fault.Conflict, "group_full")
	_, err = p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, "initech"), Group: "second", Actor: "test"})
	requireFault(t, err, fault.Conflict, "group_closed")
	sizes(1, 0)
	set(`update public.groups set accepting = true`)
	require.NoError(t, p.KeepSpares(ctx))
	sizes(1, 0)
	f.pooled(t, 0)
	sizes(0, 0)
	require.Equal(t, "2", f.scalar(t, `select count(*)::text from pg_roles r, public.installation i where r.rolname like 'oneo\_' || i.id || '%'`), "no role is left but the tenants'")
}

// A queued creation takes a spare too, and its operation says which tenant it made.
func TestWorkerClaims(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "second")
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	p := f.pooled(t, 2)
	for _, group := range []string{"main", "second"} {
		spares := f.spares(t, group)
		var op registry.Operation
		require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) (err error) {
			op, err = registry.Enqueue(ctx, tx, provision.KindCreate, group, "test",
				provision.CreateRequest{Slug: pgtest.Slug(t, "of-"+group), Group: group}.Request())
			return err
		}))
		wctx, end := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := p.Work(wctx); err != nil {
				t.Errorf("worker: %v", err)
			}
		})
		for deadline := time.Now().Add(pgtest.Patience); op.State != registry.Done && time.Now().Before(deadline); {
			require.NoError(t, f.db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) (err error) {
				op, err = registry.OperationByID(ctx, tx, op.ID)
				return err
			}))
		}
		end()
		wg.Wait()
		require.Equal(t, registry.Done, op.State, string(op.Error))
		require.Equal(t, spares[0], *op.Number)
		p.KeepPools(ctx)
		f.requireSpares(t, group, 2, 0)
	}
	f.invariants(t)
}

// Tables that hold the name of their schema as text cannot be made ahead: then there is no spare, and tenants are made
// in the ordinary way.
func TestTablesThatNameTheirSchema(t *testing.T) {
	t.Parallel()
	for what, sql := range map[string]string{
		"function": "create table a (id int); do $$ begin execute format('create function f() returns bigint language sql as %L', 'select count(*) from ' || current_schema() || '.a'); end $$;",
		"default":  "create table a (at text); do $$ begin execute format('alter table a alter at set default %L', current_schema()); end $$;",
		"check":    "create table a (at text); do $$ begin execute format('alter table a add check (at = %L)', current_schema()); end $$;",
		"policy": "create table a (at text); alter table a enable row level security; " +
			"do $$ begin execute format('create policy p on a using (at = %L)', current_schema()); end $$;",
		"index": "create table a (at text); do $$ begin execute format('create index on a ((at || %L))', current_schema()); end $$;",
		"row":   "create table a (at text); insert into a values ('x'), (current_schema());",
		"view":  "do $$ begin execute format('create view v as select %L::text as at', current_schema()); end $$;",
		"trigger": "create table a (at text); create function g() returns trigger language plpgsql as 'begin return new; end'; " +
			"do $$ begin execute format('create trigger t before insert on a for each row execute function g(%L)', current_schema()); end $$;",
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, "main")
			p := f.sized(t, 1, f.files(t, fstest.MapFS{"0001_a.up.sql": {Data: []byte(sql)}}))
			_, err := p.Keep(t.Context(), "main", 1)
			requireFault(t, err, fault.Conflict, "no_spares")
			require.Empty(t, f.spares(t, "main"))
			_, err = p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Actor: "test"})
			require.NoError(t, err)
			f.invariants(t)
		})
	}
	// What PostgreSQL itself keeps by its oid follows the schema.
	f := newFixture(t, "main")
	p := f.sized(t, 1, f.files(t, fstest.MapFS{"0001_a.up.sql": {Data: []byte(`create table a (id int primary key);
create table b (id int generated always as identity, a int references a, at text default 'x' check (at <> ''));
create view v as select a.id from a join b on b.a = a.id; create function g() returns trigger language plpgsql as 'begin return new; end';
create trigger t before insert on b for each row execute function g(); create function f() returns bigint language sql set search_path from current as 'select count(*) from b';
insert into a values (1); create index on b ((at || 'x')); alter table b enable row level security; create policy p on b using (at = 'x')`)}}))
	did, err := p.Keep(t.Context(), "main", 1)
	require.NoError(t, err)
	require.True(t, did)
	_, err = p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "acme"), Actor: "test"})
	require.NoError(t, err)
	require.Empty(t, f.spares(t, "main"), "the tenant has taken it")
	require.Equal(t, "0 {\"search_path=acme, ext, pg_temp\"}", f.scalar(t, `select acme.f() || ' ' || proconfig::text from pg_proc where proname = 'f' and pronamespace = 'acme'::regnamespace`))
	f.invariants(t)
}

// A spare that a creation is taking is not destroyed under its hands: neither while its row nor while its operation lock
// is held.
func TestSpareInUseIsNotDestroyed(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			p := f.pooled(t, 1)
			number := f.spares(t, group)[0]
			for what, hold := range map[string]func(*postgres.OwnerTx) error{
				"row": func(tx *postgres.OwnerTx) error {
					_, err := tx.Exec(ctx, `select from public.placements where number = $1 for update`, number)
					return err
				},
				"operation lock": func(tx *postgres.OwnerTx) error { return tx.LockOperation(ctx, number, 0) },
			} {
				require.NoError(t, f.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
					require.NoError(t, hold(tx))
					did, err := p.Keep(ctx, group, 0)
					require.NoErrorf(t, err, "while somebody has its %s", what)
					require.Falsef(t, did, "the spare was destroyed while somebody had its %s", what)
					return nil
				}))
			}
			require.Equal(t, []int32{number}, f.spares(t, group))
			f.invariants(t)
		})
	}
}

// A pool that is emptied while tenants are made from it: each spare is either destroyed or a tenant's, and no tenant
// loses anything.
func TestEmptyingWhileClaiming(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		t.Run(group, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, group)
			ctx := t.Context()
			const size = 12
			p := f.pooled(t, size)
			var wg sync.WaitGroup
			for range 2 {
				emptier := f.sized(t, 0)
				wg.Go(func() {
					for len(f.spares(t, group)) > 0 {
						if _, err := emptier.Keep(ctx, group, 0); err != nil && !fault.Is(err, fault.Locked) {
							t.Errorf("empty the pool: %v", err)
						}
					}
				})
			}
			for i := range size {
				wg.Go(func() {
					_, err := p.Create(ctx, provision.CreateRequest{
						Slug: pgtest.Slug(t, fmt.Sprintf("t-%d", i)), Group: group, AdminEmail: "ann@acme.example", AdminPasswordHash: someHash, Actor: "test",
					})
					if err != nil {
						t.Errorf("t-%d: %v", i, err)
					}
				})
			}
			wg.Wait()
			for i := range size {
				tn, err := find(ctx, f.db, fmt.Sprintf("t-%d", i))
				require.NoError(t, err)
				var users int
				require.NoError(t, f.db.InTenant(ctx, tn, postgres.Single, func(tx *postgres.Tx) error {
					return tx.QueryRow(ctx, `select count(*) from users`).Scan(&users)
				}))
				require.Equal(t, 1, users)
			}
			require.Empty(t, f.spares(t, group))
			f.invariants(t)
		})
	}
}

// A schema that would not be given away once it is made is not made, or it would be destroyed and made again for ever.
func TestSpareThatWouldNotBeGiven(t *testing.T) {
	t.Parallel()
	f := newFixture(t, "main")
	p := f.sized(t, 1)
	_, err := pgtest.Admin(t, f.env.AdminURL).PgConn().Exec(t.Context(), `create function public.leave() returns trigger language plpgsql as
$$ begin insert into public.progress (tenant, version, checksum) values (new.number, 1, sha256('')); return new; end $$;
create trigger leave after insert on public.placements for each row execute function public.leave()`).ReadAll()
	require.NoError(t, err)
	did, err := p.Keep(t.Context(), "main", 1)
	requireFault(t, err, fault.Conflict, "no_spares")
	require.False(t, did)
	require.Empty(t, f.spares(t, "main"))
	f.invariants(t)
}
