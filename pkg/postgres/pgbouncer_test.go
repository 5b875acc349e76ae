package postgres_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// F97: through a PgBouncer that hands one server connection from client to client after each transaction.
func TestPgBouncer(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := env.PgBouncer(t, 1)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Statements, o.MaxConns, o.InFlight, o.AcquireTimeout = postgres.Unprepared, 8, 4, pgtest.Patience
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, bouncer), OwnerURL: through(t, env.Group.OwnerURL, bouncer), DirectURL: env.Group.OwnerURL}}
	})
	pgtest.Isolation(t, env, pgtest.IsolationOptions{DB: db, Tenants: []tenant.Tenant{env.Tenant(t, "acme"), env.Tenant(t, "globex")}, Workers: 6, Requests: 40, NoCancels: true})
}

// Behind a pooler that carries no prepared statements, prepared mode is refused in words instead of running what another
// client prepared. The pooler does hand one server connection to everybody: what a session sets, the next one finds.
func TestPoolerWithoutPreparedStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := env.PgBouncer(t, 1)
	cfg, err := pgx.ParseConfig(through(t, env.AdminURL, bouncer))
	require.NoError(t, err)
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec
	var conns [2]*pgx.Conn
	for i := range conns {
		conns[i], err = pgx.ConnectConfig(t.Context(), cfg)
		require.NoError(t, err)
		defer conns[i].Close(context.Background())
	}
	var leaked string
	_, err = conns[0].Exec(t.Context(), `set search_path to leaked`)
	require.NoError(t, err)
	require.NoError(t, conns[1].QueryRow(t.Context(), `show search_path`).Scan(&leaked))
	require.Equal(t, "leaked", leaked, "this pooler was to show what a session leaves behind")

	a := env.Tenant(t, "acme")
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, bouncer), OwnerURL: through(t, env.Group.OwnerURL, bouncer)}}
	})
	nothing := func(*postgres.Tx) error { t.Error("a statement was let through"); return nil }
	for range 3 {
		requireFault(t, db.InTenant(t.Context(), a, postgres.Read, nothing), fault.Pending, "pooler_unprepared")
		requireFault(t, db.InShared(t.Context(), postgres.Read, nothing), fault.Pending, "pooler_unprepared")
		err := db.AsOwner(t.Context(), postgres.MainGroup, func(*postgres.OwnerTx) error { return nothing(nil) })
		requireFault(t, err, fault.Pending, "pooler_unprepared")
	}
}
