package postgres_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Whoever gets an operation lock at the moment in which a full backup begins to hold the tenant back lets go of it: the backup may not have
// seen the lock. In all three ways in which it is taken.
func TestHeldSinceTheLockWasTried(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	one := env.Tenant(t, "acme")
	admin := pgtest.Admin(t, env.AdminURL)
	// It is not held when it is asked for the first time, and held from then on.
	_, err := admin.Exec(ctx, `create sequence public.asked; grant usage on sequence public.asked to oneo_owner;
create or replace function public.held_by(number integer) returns text language sql set search_path to pg_catalog, pg_temp as
	$$ select case when pg_catalog.nextval('public.asked') > 1 then 'b' end $$;
delete from public.ledger where set = 'tenant' and version > 1`)
	require.NoError(t, err)
	unlocked := func() {
		t.Helper()
		var n int
		require.NoError(t, admin.QueryRow(ctx, `select count(*) from pg_locks where locktype = 'advisory' and classid = 7302658
	and database = (select oid from pg_database where datname = current_database())`).Scan(&n))
		require.Zero(t, n, "it holds the lock all the same")
	}
	held := func(err error) {
		t.Helper()
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
		require.ErrorContains(t, err, "the full backup b has not copied this tenant yet")
		unlocked()
		var asked int64
		require.NoError(t, admin.QueryRow(ctx, `select last_value from public.asked`).Scan(&asked))
		require.GreaterOrEqual(t, asked, int64(2))
		_, err = admin.Exec(ctx, `alter sequence public.asked restart`)
		require.NoError(t, err)
	}
	held(env.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error { return tx.LockOperation(ctx, one.Number, 0) }))
	held(env.DB.OwnerSession(ctx, postgres.MainGroup, func(ses *postgres.Session) error {
		err := ses.LockOperation(ctx, one.Number, 0)
		unlocked() // while the session is there
		return err
	}))
	_, err = env.Migrate.Tenant(ctx, one, migrate.TenantOptions{LockWait: time.Nanosecond})
	held(err)
}
