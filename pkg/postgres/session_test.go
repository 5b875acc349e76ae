package postgres_test

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// A session keeps what it sets and locks until it ends, and nothing outlives it.
func TestOwnerSession(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	a := env.Tenant(t, "acme")
	stop := errors.New("stop")
	err := env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error {
		_, err := s.Exec(ctx, `select from users`)
		require.Equal(t, "42P01", postgres.SQLState(err), "an unbound session finds no tables")
		require.NoError(t, s.LockOperation(ctx, a.Number, time.Second))
		namespace, err := s.BindPlaced(ctx, a.Number)
		require.NoError(t, err)
		require.NotZero(t, namespace)
		require.NoError(t, s.Tx(ctx, func() error { return s.Script(ctx, `create table here (id int)`) }))
		require.ErrorIs(t, s.Tx(ctx, func() error { require.NoError(t, s.Script(ctx, `create table not_here (id int)`)); return stop }), stop)
		swallowed := s.Tx(ctx, func() error { _ = s.Script(ctx, `select nonsense`); return nil })
		requireFault(t, swallowed, fault.Internal, "rolled_back")
		var there, lock string
		require.NoError(t, s.QueryRow(ctx, `select concat_ws(' ', to_regclass('here'), to_regclass('not_here')), current_setting('lock_timeout')`).Scan(&there, &lock))
		require.Equal(t, []string{"here", "1s"}, []string{there, lock})
		require.NoError(t, s.Timeouts(ctx, 0, 50*time.Millisecond))
		require.Equal(t, "57014", postgres.SQLState(s.Script(ctx, `select pg_sleep(600)`)))
		require.NoError(t, s.Timeouts(ctx, 0, pgtest.Patience))
		err = env.DB.OwnerSession(ctx, "main", func(other *postgres.Session) error {
			return other.LockOperation(ctx, a.Number, 50*time.Millisecond)
		})
		requireFault(t, err, fault.Locked, "operation_running")
		_, err = s.BindPlaced(ctx, a.Number+1)
		requireFault(t, err, fault.NotFound, "schema_missing")
		return stop
	})
	require.ErrorIs(t, err, stop)
	require.NoError(t, env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error { return s.LockOperation(ctx, a.Number, 5*time.Second) }))
	env.Invariants(t)
}

// What a session sets would be the next client's, behind a pooler: it is refused before anything is set.
func TestOwnerSessionRefusesAPooler(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := env.PgBouncer(t, 1)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": {URL: env.Group.URL, OwnerURL: env.Group.OwnerURL, DirectURL: through(t, env.Group.OwnerURL, bouncer)}}
	})
	err := db.OwnerSession(t.Context(), "main", func(*postgres.Session) error { t.Error("it was let through"); return nil })
	requireFault(t, err, fault.Invalid, "direct_url_pooled")
}
