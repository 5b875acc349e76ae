package transfer_test

import (
	"bytes"
	"context"
	"reflect"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// together runs functions at once; each succeeds, or is refused because of another one.
func together(t *testing.T, fns ...func() error) (succeeded []bool) {
	t.Helper()
	succeeded = make([]bool, len(fns))
	errs := make([]error, len(fns))
	var all sync.WaitGroup
	for i, fn := range fns {
		all.Go(func() { errs[i] = fn() })
	}
	all.Wait()
	for i, err := range errs {
		succeeded[i] = err == nil
		if err != nil {
			require.True(t, fault.Is(err, fault.Locked) || fault.Is(err, fault.Conflict), "%d: %v", i, err)
		}
	}
	return succeeded
}

// Two restores of one tenant at once, beside exports: each is whole, before the other or behind it, and each can be undone.
func TestRestoresAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p, q := f.with(first), f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, _ := f.export(p, one)
	f.in(one, `delete from books`)
	before, _ := f.export(p, one)
	var done [2]provision.Restored
	var seen [2][]byte
	restore := func(i int, p parts) func() error {
		return func() (err error) {
			done[i], err = f.restore(p, one, b)
			return err
		}
	}
	export := func(i int, p parts) func() error {
		return func() error {
			var out bytes.Buffer
			_, err := p.Export(context.Background(), one, &out, transfer.ExportOptions{})
			seen[i] = out.Bytes()
			return err
		}
	}
	ok := together(t, restore(0, p), restore(1, q), export(0, p), export(1, q))
	require.True(t, ok[0] || ok[1])
	for i, b2 := range seen {
		if ok[2+i] {
			got := f.sums(b2)
			require.True(t, reflect.DeepEqual(got, f.sums(before)) || reflect.DeepEqual(got, f.sums(b)), "an export that is neither before nor behind")
		}
	}
	now, _ := f.export(p, one)
	require.Equal(t, f.sums(b), f.sums(now))
	n := 0
	for i := range 2 {
		if ok[i] {
			n++
		}
	}
	require.Equal(t, n, f.count(`select count(*) from public.replaced`))
	for n > 0 { // the last one first
		for i := range 2 {
			if _, err := p.provision.Return(t.Context(), one.Slug, done[i].Operation, "test"); ok[i] && err == nil {
				n, ok[i] = n-1, false
			}
		}
	}
	now, _ = f.export(p, one)
	require.Equal(t, f.sums(before), f.sums(now))
	f.Invariants(t)
}

// A restore beside a migration, a drop, a change of the schema's name: the one that comes second waits or is refused, and what
// stands in the end is one or the other.
func TestRestoreBesideOtherChanges(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	old := f.with(first)
	p, q := f.with(first, `alter table authors add column initial text`), f.with(first, `alter table authors add column initial text`)
	one := f.tenant(old, "acme")
	f.in(one, rows)
	b, _ := f.export(old, one)
	restore := func() error { _, err := f.restore(p, one, b); return err }
	read := func(slug string) string {
		now, err := registryTenant(f, slug)
		require.NoError(t, err)
		return f.ask(now, `select count(*) || ' ' || count(initial) from authors`)
	}
	together(t, restore, func() error {
		_, err := q.migrate.Tenant(context.Background(), one, migrate.TenantOptions{})
		return err
	})
	require.Equal(t, "5 0", read("acme"))
	require.Equal(t, 2, f.count(`select version from public.placements`))
	f.Invariants(t)

	to := pgtest.Slug(t, "globex")
	ok := together(t, restore, func() error {
		_, err := q.provision.Rename(context.Background(), one.Slug, provision.RenameRequest{Schema: to.Schema(), Actor: "test"})
		return err
	})
	require.True(t, ok[0] || ok[1])
	require.Equal(t, "5 0", read("acme"))
	f.Invariants(t)

	now, err := registryTenant(f, "acme")
	require.NoError(t, err)
	ok = together(t, func() error { _, err := f.restore(p, now, b); return err }, func() error {
		_, err := q.provision.Drop(context.Background(), one.Slug, time.Hour, "test")
		return err
	})
	require.True(t, ok[0] || ok[1])
	f.Invariants(t)
	if ok[1] {
		_, err := q.provision.Undrop(t.Context(), one.Slug, "test")
		require.NoError(t, err)
	}
	require.Equal(t, "5 0", read("acme"))
	f.Invariants(t)
	require.Zero(t, f.count(`select count(*) from public.operations where state = 'running'`))
}
