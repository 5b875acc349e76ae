package registry_test

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func requireFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	require.Truef(t, fault.Is(err, kind), "want a fault of kind %s (%s), got %v", kind, code, err)
	require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
}

func host(t *testing.T, s string) tenant.Host {
	t.Helper()
	h, err := tenant.ParseHost(s)
	require.NoError(t, err)
	return h
}

// app runs fn as the app role, as a server does.
func app(env *pgtest.Env, fn func(ctx context.Context, q postgres.Querier) error) error {
	ctx := context.Background()
	return env.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error { return fn(ctx, tx) })
}

func TestList(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	for _, s := range []string{"acme-1", "acme-2", "acmex", "globex"} {
		env.Tenant(t, s)
	}
	_, err := env.Provision.Suspend(t.Context(), pgtest.Slug(t, "globex"), "test")
	require.NoError(t, err)
	for _, c := range []struct {
		f    registry.Filter
		want []string
	}{
		{registry.Filter{}, []string{"acme-1", "acme-2", "acmex", "globex"}},
		{registry.Filter{Names: []string{"acme-*"}}, []string{"acme-1", "acme-2"}},
		{registry.Filter{Names: []string{"acme?"}}, []string{"acmex"}},
		{registry.Filter{Names: []string{"*"}, Exclude: []string{"acme*"}}, []string{"globex"}},
		{registry.Filter{Names: []string{"acme-1", "globex"}, Exclude: []string{"acme-1"}}, []string{"globex"}},
		{registry.Filter{States: []tenant.State{tenant.Suspended}}, []string{"globex"}},
		{registry.Filter{Names: []string{"globex"}, States: []tenant.State{tenant.Active}}, nil},
		{registry.Filter{Group: "main", Limit: 2}, []string{"acme-1", "acme-2"}},
		{registry.Filter{After: "acme-2"}, []string{"acmex", "globex"}},
		{registry.Filter{Group: "nowhere"}, nil},
		{registry.Filter{Names: []string{"none-*"}}, nil},
	} {
		var got []string
		require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
			ts, err := registry.List(ctx, q, c.f)
			for _, tn := range ts {
				got = append(got, tn.Slug.String())
			}
			return err
		}))
		require.Equalf(t, c.want, got, "%+v", c.f)
	}
	err = app(env, func(ctx context.Context, q postgres.Querier) error {
		_, err := registry.List(ctx, q, registry.Filter{Names: []string{"acme-1", "acme-9"}})
		return err
	})
	requireFault(t, err, fault.NotFound, "unknown_tenant")
	require.Contains(t, fault.Of(err).Hint, "acme-1")
	require.NotContains(t, fault.Of(err).Hint, "globex", "the hint names what looks like it, and nothing else")
	err = app(env, func(ctx context.Context, q postgres.Querier) error {
		_, err := registry.List(ctx, q, registry.Filter{Exclude: []string{"acme-9"}})
		return err
	})
	requireFault(t, err, fault.NotFound, "unknown_tenant")
	require.Contains(t, fault.Of(err).Hint, "acme-1")
	for _, bad := range []string{"[", `a\b`, "", "[a-", "acme-[12]", "{acme-1,acme-2}"} {
		err := app(env, func(ctx context.Context, q postgres.Querier) error {
			_, err := registry.List(ctx, q, registry.Filter{Names: []string{bad}})
			return err
		})
		requireFault(t, err, fault.Invalid, "bad_pattern")
	}
	for _, literal := range []string{"acme%", "acme_1"} {
		err := app(env, func(ctx context.Context, q postgres.Querier) error {
			_, err := registry.List(ctx, q, registry.Filter{Names: []string{literal}})
			return err
		})
		requireFault(t, err, fault.NotFound, "unknown_tenant")
	}
}

// Behaviours D 62, 63: a domain has one owner, a tenant one primary domain, whoever asks at the same time.
func TestDomains(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	crm := host(t, "crm.example")
	var wg sync.WaitGroup
	var won atomic.Int32
	for i := range 12 {
		tn := []tenant.Tenant{a, b}[i%2]
		wg.Go(func() {
			err := app(env, func(ctx context.Context, q postgres.Querier) error { return registry.AddDomain(ctx, q, tn, crm, false) })
			if err == nil {
				won.Add(1)
			} else if fault.Of(err).Code != "domain_taken" {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 6, won.Load(), "its owner may add it again, nobody else")
	var owner tenant.Tenant
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) (err error) {
		owner, err = registry.ByHost(ctx, q, crm)
		return err
	}))
	other := a
	if owner.Number == a.Number {
		other = b
	}
	hosts := []tenant.Host{crm, host(t, "a.example"), host(t, "b.example"), owner.Primary}
	for _, h := range hosts[1:3] {
		require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
			return registry.AddDomain(ctx, q, owner, h, false)
		}))
	}
	for i := range 16 {
		wg.Go(func() {
			err := app(env, func(ctx context.Context, q postgres.Querier) error {
				return registry.SetPrimary(ctx, q, owner, hosts[i%4])
			})
			if err != nil {
				t.Errorf("set primary: %v", err)
			}
		})
	}
	wg.Wait()
	primaries := 0
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		ds, err := registry.Domains(ctx, q, owner)
		for i, d := range ds {
			if d.Primary {
				primaries++
				require.Zero(t, i, "the primary one comes first")
			}
		}
		return err
	}))
	require.Equal(t, 1, primaries)
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.SetPrimary(ctx, q, owner, owner.Primary)
	}))
	requireFault(t, app(env, func(ctx context.Context, q postgres.Querier) error { return registry.SetPrimary(ctx, q, other, crm) }), fault.NotFound, "unknown_domain")
	requireFault(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.RemoveDomain(ctx, q, owner, owner.Primary, 0)
	}), fault.Conflict, "primary_domain")
	requireFault(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.RemoveDomain(ctx, q, other, crm, 0)
	}), fault.NotFound, "unknown_domain")

	// Security 10: a removed domain is held back from others, not from the one that had it.
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.RemoveDomain(ctx, q, owner, crm, time.Hour)
	}))
	requireFault(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.AddDomain(ctx, q, other, crm, false)
	}), fault.Conflict, "domain_held")
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.AddDomain(ctx, q, owner, crm, true)
	}))
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.SetPrimary(ctx, q, owner, owner.Primary)
	}))
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.RemoveDomain(ctx, q, owner, crm, 0)
	}))
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.AddDomain(ctx, q, other, crm, false)
	}))
	env.Invariants(t)
}

// D63: a tenant that is served has a primary domain, whoever takes one away while another is made the primary one.
func TestAPrimaryDomainStays(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	only, err := tenant.ParseHost("acme.localhost")
	require.NoError(t, err)
	requireFault(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.RemoveDomain(ctx, q, acme, only, 0)
	}), fault.Conflict, "primary_domain")
	other, err := tenant.ParseHost("crm.example")
	require.NoError(t, err)
	for range 25 {
		require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
			if err := registry.AddDomain(ctx, q, acme, other, false); err != nil {
				return err
			}
			return registry.SetPrimary(ctx, q, acme, only)
		}))
		var both sync.WaitGroup
		for _, change := range []func(context.Context, postgres.Querier) error{
			func(ctx context.Context, q postgres.Querier) error {
				return registry.RemoveDomain(ctx, q, acme, other, 0)
			},
			func(ctx context.Context, q postgres.Querier) error { return registry.SetPrimary(ctx, q, acme, other) },
		} {
			both.Go(func() {
				if err := app(env, change); err != nil && !fault.Is(err, fault.Conflict) && !fault.Is(err, fault.NotFound) {
					t.Error(err)
				}
			})
		}
		both.Wait()
		env.Invariants(t)
	}
}

func TestSettings(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
	merge := func(patch string) (got json.RawMessage, err error) {
		err = app(env, func(ctx context.Context, q postgres.Querier) (err error) {
			old, err := registry.Settings(ctx, q, a)
			if err != nil {
				return err
			}
			if got, err = crm.MergePatch(old, json.RawMessage(patch)); err != nil {
				got = json.RawMessage(patch) // what is no object must be refused by SetSettings
			}
			return registry.SetSettings(ctx, q, a, old, got)
		})
		return got, err
	}
	_, err := merge(`{"n": 12345678901234567890, "f": 1.10, "public": {"a": 1, "b": {"c": true}}, "gone": 1}`)
	require.NoError(t, err)
	got, err := merge(`{"public": {"b": {"d": [1, null]}, "a": null}, "gone": null}`)
	require.NoError(t, err)
	require.JSONEq(t, `{"n": 12345678901234567890, "f": 1.10, "public": {"b": {"c": true, "d": [1, null]}}}`, string(got))
	require.Contains(t, string(got), "12345678901234567890", "numbers stay as they were written")
	require.Contains(t, string(got), "1.10")
	for _, bad := range []string{`[]`, `null`, `1`, `"x"`, `{`, ``} {
		_, err := merge(bad)
		requireFault(t, err, fault.Unfit, "settings")
	}
	_, err = merge(`{"big": "` + strings.Repeat("x", registry.MaxSettingsBytes) + `"}`)
	requireFault(t, err, fault.TooLarge, "settings")
	err = app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.SetSettings(ctx, q, a, json.RawMessage(`{"stale": true}`), json.RawMessage(`{}`))
	})
	requireFault(t, err, fault.Stale, "stale")
	var other json.RawMessage
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) (err error) {
		other, err = registry.Settings(ctx, q, b)
		return err
	}))
	require.JSONEq(t, `{}`, string(other), "another tenant's settings stay as they were")
}

// Two claimers never get the same operation, and the oldest comes first.
func TestOperationsAreClaimedOnce(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	owner := func(fn func(ctx context.Context, q postgres.Querier) error) error {
		ctx := context.Background()
		return env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error { return fn(ctx, tx) })
	}
	const n = 12
	for i := range n {
		tn := env.Tenant(t, "t-"+string(rune('a'+i)))
		require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
			_, err := registry.Enqueue(ctx, q, "tenant.suspend", tn.Slug.String(), "test", nil)
			return err
		}))
	}
	var mu sync.Mutex
	claimed := map[uuid.UUID]int{}
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for {
				var op registry.Operation
				var found bool
				err := owner(func(ctx context.Context, q postgres.Querier) (err error) {
					if op, found, err = registry.NextQueued(ctx, q); err != nil || !found {
						return err
					}
					tn, err := registry.BySlug(ctx, q, mustSlug(op.Slug))
					if err != nil {
						return err
					}
					return registry.Start(ctx, q, op.ID, tn.Number)
				})
				if err != nil {
					t.Errorf("claim: %v", err)
				}
				if err != nil || !found {
					return
				}
				mu.Lock()
				claimed[op.ID]++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	require.Len(t, claimed, n)
	for id, times := range claimed {
		require.Equal(t, 1, times, "operation %s was claimed twice", id)
		require.NoError(t, owner(func(ctx context.Context, q postgres.Querier) error {
			took, err := registry.TakeUp(ctx, q, id, time.Hour)
			require.False(t, took, "a living operation is not taken up")
			return err
		}))
		require.NoError(t, owner(func(ctx context.Context, q postgres.Querier) error { return registry.Finish(ctx, q, id, nil) }))
		err := owner(func(ctx context.Context, q postgres.Querier) error {
			return registry.Fail(ctx, q, id, fault.Of(errors.New("x")))
		})
		requireFault(t, err, fault.Conflict, "operation_over")
	}
	err := owner(func(ctx context.Context, q postgres.Querier) error {
		_, err := registry.OperationByID(ctx, q, uuid.New())
		return err
	})
	requireFault(t, err, fault.NotFound, "unknown_operation")
}

// The operations of one tenant are claimed in their order, and one that has to wait holds up no other tenant's.
func TestQueueKeepsEachTenantsOrder(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme, beta, gamma := env.Tenant(t, "acme"), env.Tenant(t, "beta"), env.Tenant(t, "gamma")
	ctx := t.Context()
	queue := func(kind string, tn tenant.Tenant) (id uuid.UUID) {
		require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
			op, err := registry.Enqueue(ctx, q, kind, tn.Slug.String(), "test", nil)
			id = op.ID
			return err
		}))
		return id
	}
	first := queue("tenant.suspend", acme)
	queue("tenant.resume", acme)
	other := queue("tenant.suspend", beta)
	require.NoError(t, env.DB.AsOwner(ctx, "main", func(claiming *postgres.OwnerTx) error {
		op, found, err := registry.NextQueued(ctx, claiming)
		require.NoError(t, err)
		require.True(t, found)
		require.Equal(t, first, op.ID)
		return env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
			op, found, err := registry.NextQueued(ctx, tx)
			require.NoError(t, err)
			require.True(t, found)
			require.Equal(t, other, op.ID, "while a tenant's first operation is being claimed, its second one waits")
			return registry.Start(ctx, tx, other, beta.Number)
		})
	}))
	require.NoError(t, env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
		// A rename that runs: its row has the former name, the tenant the new one.
		_, err := registry.Begin(ctx, tx, "tenant.rename", acme, "test", nil)
		require.NoError(t, err)
		_, err = tx.Exec(ctx, `update public.operations set slug = 'former' where kind = 'tenant.rename'`)
		return err
	}))
	last := queue("tenant.suspend", gamma)
	require.NoError(t, env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
		op, found, err := registry.NextQueued(ctx, tx)
		require.NoError(t, err)
		require.True(t, found)
		require.Equal(t, last, op.ID, "what waits for a rename must not block the queue")
		return nil
	}))
}

// A purged tenant gets no domain, also when it is purged while one is being given to it.
func TestNoDomainForThePurged(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	_, err := env.Provision.Drop(t.Context(), acme.Slug, 0, "test")
	require.NoError(t, err)
	purged := make(chan error, 1)
	require.NoError(t, app(env, func(ctx context.Context, q postgres.Querier) error {
		require.NoError(t, registry.AddDomain(ctx, q, acme, host(t, "crm.example"), false))
		go func() {
			_, err := env.Provision.Purge(context.Background(), acme.Slug, "test")
			purged <- err
		}()
		return nil
	}))
	require.NoError(t, <-purged)
	err = app(env, func(ctx context.Context, q postgres.Querier) error {
		return registry.AddDomain(ctx, q, acme, host(t, "late.example"), false)
	})
	requireFault(t, err, fault.NotFound, "unknown_tenant")
	var left int
	require.NoError(t, pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select count(*) from public.domains`).Scan(&left))
	require.Zero(t, left, "a tombstone holds no host")
}

// What has failed before is left alone for longer, and taken up again all the same.
func TestInterruptedOperationsBackOff(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	acme := env.Tenant(t, "acme")
	for _, c := range []struct {
		attempts int
		silent   string
		want     bool
	}{{1, "5 seconds", false}, {1, "15 seconds", true}, {4, "15 seconds", false}, {4, "90 seconds", true}, {1000, "9 minutes", false}, {1000, "11 minutes", true}} {
		ctx := t.Context()
		require.NoError(t, env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
			op, err := registry.Begin(ctx, tx, "tenant.suspend", acme, "test", nil)
			require.NoError(t, err)
			_, err = tx.Exec(ctx, `update public.operations set attempts = $2, heartbeat = now() - $3::text::interval where id = $1`, op.ID, c.attempts, c.silent)
			require.NoError(t, err)
			_, found, err := registry.NextInterrupted(ctx, tx, 10*time.Second)
			require.NoError(t, err)
			require.Equalf(t, c.want, found, "%+v", c)
			return registry.Finish(ctx, tx, op.ID, nil)
		}))
	}
}

func mustSlug(s string) tenant.Slug {
	slug, err := tenant.ParseSlug(s)
	if err != nil {
		panic(err)
	}
	return slug
}
