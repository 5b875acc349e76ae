package app_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// While money is moved between accounts, the cluster is backed up and moments are noted. A tenant as it was at one of them has exactly what
// was committed until then, by PostgreSQL's own commit times; and nothing that lives has changed by looking.
func TestATenantAtAMomentHasWhatWasCommittedUntilThen(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	s, superuser, open := newArchived(t)
	a := open()
	clusters, err := a.PhysicalClusters()
	require.NoError(t, err)
	require.NoError(t, a.MeetPhysical(ctx, clusters[0], superuser))
	var acme tenant.Tenant
	for _, slug := range []string{"other", "acme"} {
		acme, err = a.Provision.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, slug), Actor: "test"})
		require.NoError(t, err)
	}
	const accounts, each = 20, 1000
	_, err = s.admin.Exec(ctx, fmt.Sprintf(`
		create table acme.accounts (id int primary key, balance int not null);
		create table acme.ledger (id uuid primary key, xid text not null, debit int not null, credit int not null, amount int not null, at timestamptz not null);
		alter table acme.accounts owner to oneo_owner; alter table acme.ledger owner to oneo_owner;
		insert into acme.accounts select n, %d from generate_series(1, %d) n;
		insert into other.pipelines (id, key, name) select gen_random_uuid(), 'p' || n, 'other' from generate_series(1, 500) n`, each, accounts))
	require.NoError(t, err)
	const sums = `select string_agg(md5(p::text), '' order by id) from %s.%s p`
	sum := func(conn *pgx.Conn, schema, table string) (text string) {
		t.Helper()
		require.NoError(t, conn.QueryRow(ctx, fmt.Sprintf(sums, schema, table)).Scan(&text))
		return text
	}
	other := sum(s.admin, "other", "pipelines")

	// Transactions are open while a moment is noted, but none is just committing: whether that one is in it would be luck.
	var committing sync.RWMutex
	var done sync.WaitGroup
	stop, committed, failed := make(chan struct{}), make(chan struct{}), make(chan error, 4)
	for range 4 {
		conn := pgtest.Admin(t, superuser)
		done.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := transferMoney(ctx, conn, accounts, &committing); err != nil {
					failed <- err
					return
				}
				select {
				case committed <- struct{}{}:
				case <-stop:
				}
			}
		})
	}
	work := func(n int) {
		t.Helper()
		for range n {
			select {
			case <-committed:
			case err := <-failed:
				require.NoError(t, err)
			}
		}
	}
	made := make(chan error)
	go func() {
		_, _, err := a.CreatePhysical(ctx, clusters[0], physical.CreateOptions{})
		made <- err
	}()
	for backing := true; backing; {
		select {
		case err := <-made:
			require.NoError(t, err)
			backing = false
		case <-committed:
		case err := <-failed:
			require.NoError(t, err)
		}
	}
	var moments []time.Time
	for range 8 {
		work(5 + rand.IntN(40))
		committing.Lock()
		var at time.Time
		require.NoError(t, s.admin.QueryRow(ctx, `select clock_timestamp() from pg_sleep(0.001)`).Scan(&at))
		_, err := s.admin.Exec(ctx, `select pg_sleep(0.001)`)
		committing.Unlock()
		require.NoError(t, err)
		moments = append(moments, at)
	}
	work(20)
	close(stop)
	done.Wait()

	for _, i := range rand.Perm(len(moments))[:2] {
		past, err := a.Recover(ctx, app.PastOptions{
			Moment: app.Moment{Time: moments[i]}, Why: t.Name(), Report: func(string, physical.Progress) {}, Say: t.Logf,
		})
		require.NoError(t, err)
		// It goes the way of a restore: into an archive, and from there into a tenant.
		file, _, _, err := past.Remember(ctx, acme, nil)
		require.NoError(t, err)
		require.NoError(t, past.Close())
		slug := fmt.Sprintf("then%d", i)
		_, _, err = a.Transfers.Import(ctx, file, transfer.ImportOptions{Slug: pgtest.Slug(t, slug), Loading: transfer.Loading{CustomDDL: true, Actor: "test"}})
		require.NoError(t, err)
		require.NoError(t, file.Close())
		var total, rows int
		require.NoError(t, s.admin.QueryRow(ctx, `select (select sum(balance) from `+slug+`.accounts), (select count(*) from `+slug+`.ledger)`).Scan(&total, &rows))
		require.Equal(t, accounts*each, total)
		require.Positive(t, rows)
		var missing, extra int
		require.NoError(t, s.admin.QueryRow(ctx, `with expected as (select * from acme.ledger where pg_xact_commit_timestamp(xid::xid) <= $1)
select (select count(*) from (select * from expected except select * from `+slug+`.ledger) m), (select count(*) from (select * from `+slug+`.ledger except select * from expected) e)`, moments[i]).Scan(&missing, &extra))
		require.Equal(t, [2]int{}, [2]int{missing, extra}, "moment %d of %d, %d transactions", i, len(moments), rows)
		var live int
		require.NoError(t, s.admin.QueryRow(ctx, `select count(*) from acme.ledger`).Scan(&live))
		require.Greater(t, live, rows)
	}
	require.Equal(t, other, sum(s.admin, "other", "pipelines"))
}

// transferMoney moves an amount from one account to another, and says so in the ledger.
func transferMoney(ctx context.Context, conn *pgx.Conn, accounts int, committing *sync.RWMutex) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(context.WithoutCancel(ctx)) }() // after a commit it does nothing
	from, to, amount := 1+rand.IntN(accounts), 1+rand.IntN(accounts), 1+rand.IntN(50)
	// In the order of their numbers: nobody waits for each other in a circle.
	for _, id := range []int{min(from, to), max(from, to)} {
		change := amount
		if id == from {
			change = -amount
		}
		if from == to {
			change = 0
		}
		if _, err := tx.Exec(ctx, `update acme.accounts set balance = balance + $2 where id = $1`, id, change); err != nil {
			return err
		}
	}
	const note = `insert into acme.ledger (id, xid, debit, credit, amount, at) values (gen_random_uuid(), pg_current_xact_id()::text, $1, $2, $3, clock_timestamp())`
	if _, err := tx.Exec(ctx, note, from, to, amount); err != nil {
		return err
	}
	committing.RLock()
	defer committing.RUnlock()
	return tx.Commit(ctx)
}
