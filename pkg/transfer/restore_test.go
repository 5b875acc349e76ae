package transfer_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

func (f *fixture) restore(p parts, t tenant.Tenant, b []byte) (provision.Restored, error) {
	done, _, err := p.Restore(context.Background(), t, bytes.NewReader(b), time.Hour, false, transfer.Loading{Actor: "test"})
	return done, err
}

// A restore takes the tenant back to the archive, and undoing it takes it to where it was, with what was written since the archive.
func TestRestoreAndReturn(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, trailer := f.export(p, one)
	f.in(one, `delete from books; insert into authors (name) values ('since')`)
	_, broken := f.export(p, one)
	done, err := f.restore(p, one, b)
	require.NoError(t, err)
	require.Equal(t, one.Number, done.Tenant.Number)
	require.WithinDuration(t, time.Now().Add(time.Hour), done.Kept, time.Minute)
	_, have := f.export(p, one)
	require.Equal(t, trailer.Tables, have.Tables)
	require.Equal(t, "0", f.ask(one, `select count(*) from sessions`))
	f.Invariants(t)
	require.NoError(t, f.DB.InTenant(t.Context(), one, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), `insert into authors (name) values ('behind')`)
		return err
	}), "its own role may write")

	// The same archive again, then both are undone, the last one first.
	second, err := f.restore(p, one, b)
	require.NoError(t, err)
	_, err = p.provision.Return(t.Context(), one.Slug, done.Operation, "test")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	_, err = p.provision.Return(t.Context(), one.Slug, second.Operation, "test")
	require.NoError(t, err)
	require.Equal(t, "1", f.ask(one, `select count(*) from authors where name = 'behind'`))
	_, err = p.provision.Return(t.Context(), one.Slug, second.Operation, "test")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	_, err = p.provision.Return(t.Context(), one.Slug, done.Operation, "test")
	require.NoError(t, err)
	_, have = f.export(p, one)
	require.Equal(t, broken.Tables, have.Tables)
	require.Equal(t, "secret", f.ask(one, `select token from sessions`))
	f.Invariants(t)

	// What is kept goes when its time is over, and with the tenant.
	require.Equal(t, 2, f.count(`select count(*) from pg_namespace where nspname like 'oneo_replaced_%'`))
	_, err = f.admin.Exec(t.Context(), `update public.replaced set expires_at = now() - interval '1 second' where operation = $1`, done.Operation)
	require.NoError(t, err)
	_, err = p.provision.Return(t.Context(), one.Slug, done.Operation, "test")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	n, err := p.provision.ExpireReplaced(t.Context())
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, 1, f.count(`select count(*) from pg_namespace where nspname like 'oneo_replaced_%'`))
	_, err = p.provision.Drop(t.Context(), one.Slug, time.Hour, "test")
	require.NoError(t, err)
	_, err = p.provision.Purge(t.Context(), one.Slug, "test")
	require.NoError(t, err)
	require.Zero(t, f.count(`select count(*) from pg_namespace where nspname like 'oneo_replaced_%'`))
	f.Invariants(t)
}

// An archive of an older version is migrated up beside the tenant; undone, the tenant is at its own version again, whatever
// that was.
func TestRestoreOfAnOlderVersion(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	old := f.with(first)
	one := f.tenant(old, "acme")
	f.in(one, rows)
	b, _ := f.export(old, one)
	p := f.with(first, `alter table authors add column initial text`)
	done, err := f.restore(p, one, b)
	require.NoError(t, err)
	require.Equal(t, 2, f.count(`select version from public.placements where number = $1`, one.Number))
	require.Equal(t, "", f.ask(one, `select max(initial) from authors`))
	_, err = p.provision.Return(t.Context(), one.Slug, done.Operation, "test")
	require.NoError(t, err)
	require.Equal(t, 1, f.count(`select version from public.placements where number = $1`, one.Number))
	require.Equal(t, 1, f.count(`select count(*) from public.ledger where set = 'tenant' and tenant = $1`, one.Number))
	f.Invariants(t)
}

// The binary of before takes a tenant back that a newer one has migrated, and gives it back as it was: with the ledger's rows of
// a migration that it does not know.
func TestRestoreByAnOlderBinary(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	old := f.with(first)
	one := f.tenant(old, "acme")
	f.in(one, rows)
	b, _ := f.export(old, one)
	p := f.with(first, `alter table authors add column initial text`)
	_, err := p.migrate.Tenant(t.Context(), one, migrate.TenantOptions{})
	require.NoError(t, err)
	f.in(one, `update authors set initial = left(name, 1)`)
	const ledger = `select string_agg(l::text, E'\n' order by version) from public.ledger l where set = 'tenant' and tenant = $1`
	var before, after string
	require.NoError(t, f.admin.QueryRow(t.Context(), ledger, one.Number).Scan(&before))
	done, err := f.restore(old, one, b)
	require.NoError(t, err)
	require.Equal(t, 1, f.count(`select version from public.placements where number = $1`, one.Number))
	f.Invariants(t)
	_, err = old.provision.Return(t.Context(), one.Slug, done.Operation, "test")
	require.NoError(t, err)
	require.Equal(t, 2, f.count(`select version from public.placements where number = $1`, one.Number))
	require.NoError(t, f.admin.QueryRow(t.Context(), ledger, one.Number).Scan(&after))
	require.Equal(t, before, after)
	require.Equal(t, "A", f.ask(one, `select initial from authors where name = 'Ada'`))
	f.Invariants(t)
}

// What is refused changes nothing.
func TestRestoreRefused(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one, two := f.tenant(p, "acme"), f.tenant(p, "beta")
	f.in(one, rows)
	b, trailer := f.export(p, one)
	_, err := f.restore(p, two, b)
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "another tenant: acme")
	for n, bad := range [][]byte{b[:len(b)/2], b[:len(b)-1], flipped(b, len(b)/2)} {
		_, err := f.restore(p, one, bad)
		require.True(t, fault.Is(err, fault.Unverified), "%d: %v", n, err)
	}
	_, have := f.export(p, one)
	require.Equal(t, trailer.Tables, have.Tables)
	require.Equal(t, "secret", f.ask(one, `select token from sessions`))
	require.Zero(t, f.count(`select count(*) from pg_namespace where nspname like 'oneo_re%'`))
	require.Zero(t, f.count(`select count(*) from public.operations where state = 'running'`))
	_, err = p.provision.Drop(t.Context(), one.Slug, time.Hour, "test")
	require.NoError(t, err)
	_, err = f.restore(p, one, b)
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	f.Invariants(t)
}

// While users write, a restore and its undoing lose nothing that was answered: what was written before the swap is there
// again afterwards. No request fails otherwise than by a 503.
func TestSwapUnderLoad(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(`create table notes (id bigint primary key, author integer not null)`)
	one := f.tenant(p, "acme")
	b, _ := f.export(p, one)
	var written sync.Map
	var answered atomic.Int64
	var next atomic.Int64
	stop := make(chan struct{})
	var users sync.WaitGroup
	for u := range 4 {
		users.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				id := next.Add(1)
				ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
				err := f.DB.InTenant(ctx, one, postgres.Write, func(tx *postgres.Tx) error {
					if _, err := tx.Exec(ctx, `insert into notes values ($1, $2)`, id, u); err != nil {
						return err
					}
					// A transaction sees one of the two schemas and never both.
					var there int
					if err := tx.QueryRow(ctx, `select count(*) from notes where id = $1`, id).Scan(&there); err != nil || there != 1 {
						return fmt.Errorf("a row that was written is not seen: %w", err)
					}
					return nil
				})
				cancel()
				switch {
				case err == nil:
					written.Store(id, true)
					answered.Add(1)
				case fault.Is(err, fault.Unavailable), fault.Is(err, fault.Locked), fault.Is(err, fault.Suspended):
				default:
					t.Errorf("a request failed: %v", err)
					return
				}
			}
		})
	}
	aside := []string{"select id from acme.notes"}
	for range 5 {
		before := answered.Load()
		require.Eventually(t, func() bool { return answered.Load() > before+50 || t.Failed() }, time.Minute, time.Millisecond)
		done, err := f.restore(p, one, b)
		require.NoError(t, err)
		before = answered.Load()
		require.Eventually(t, func() bool { return answered.Load() > before+50 || t.Failed() }, time.Minute, time.Millisecond)
		// What was written into the restored tables is put aside with them.
		_, err = p.provision.Return(t.Context(), one.Slug, done.Operation, "test")
		require.NoError(t, err)
		aside = append(aside, fmt.Sprintf("select id from oneo_replaced_%d_%s.notes", one.Number, done.Operation.String()[28:]))
	}
	close(stop)
	users.Wait()
	n, lost := 0, 0
	have := map[int64]bool{}
	// Only now: a user may note an answer long after it was given.
	found, err := f.admin.Query(t.Context(), strings.Join(aside, " union all "))
	require.NoError(t, err)
	for found.Next() {
		var id int64
		require.NoError(t, found.Scan(&id))
		require.False(t, have[id], "a row is in two places")
		have[id] = true
	}
	require.NoError(t, found.Err())
	written.Range(func(id, _ any) bool {
		n++
		if !have[id.(int64)] {
			lost++
		}
		return true
	})
	require.Zero(t, lost, "of %d", n)
	require.Greater(t, n, 100)
	f.Invariants(t)
}

// Trying an archive says what a restore would say, of a good one and of bad ones, and leaves nothing.
func TestTryLeavesNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, trailer := f.export(p, one)
	const made = `select (select count(*) from pg_namespace) + (select count(*) from pg_roles where rolname like 'oneo\_try\_%') + (select count(*) from pg_class)`
	before := f.count(made)
	try := func(p parts, b []byte) (archive.Trailer, error) {
		return p.Try(context.Background(), postgres.MainGroup, bytes.NewReader(b), transfer.Loading{Actor: "test"})
	}
	got, err := try(p, b)
	require.NoError(t, err)
	require.Equal(t, trailer.Tables, got.Tables)

	later := f.with(first, `alter table authors add column died date`)
	_, err = try(later, b)
	require.NoError(t, err, "an older one is migrated up")
	unfit := f.with(first, `do $$ begin if exists (select from authors) then raise 'there are authors'; end if; end $$`)
	_, err = try(unfit, b)
	require.ErrorContains(t, err, "there are authors", "a migration that the rows do not stand is found")
	_, err = try(f.with(`create table other (id integer)`), b)
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	damaged := bytes.Clone(b)
	damaged[len(b)/2] ^= 1
	_, err = try(p, damaged)
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)
	_, err = try(p, b[:len(b)-1])
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)

	require.Equal(t, before, f.count(made))
	f.Invariants(t)
}
