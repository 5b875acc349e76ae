package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// oneConn makes every tenant share one connection: what one leaves behind, the next finds.
func oneConn(o *postgres.Options) { o.MaxConns, o.InFlight = 2, 1 } // two sub-pools

// value reads one value in a bound transaction.
func value[T any](t *testing.T, db *postgres.DB, tn tenant.Tenant, a postgres.Access, sql string, args ...any) T {
	t.Helper()
	var v T
	err := db.InTenant(t.Context(), tn, a, func(tx *postgres.Tx) error {
		return tx.QueryRow(t.Context(), sql, args...).Scan(&v)
	})
	require.NoErrorf(t, err, "%s for tenant %s", sql, tn.Slug)
	return v
}

// try runs one statement in a bound transaction.
func try(ctx context.Context, db *postgres.DB, tn tenant.Tenant, a postgres.Access, sql string, args ...any) error {
	return db.InTenant(ctx, tn, a, func(tx *postgres.Tx) error {
		_, err := tx.Exec(ctx, sql, args...)
		return err
	})
}

// admin runs a script as superuser.
func admin(t *testing.T, env *pgtest.Env, sql string) {
	t.Helper()
	_, err := pgtest.Admin(t, env.AdminURL).PgConn().Exec(context.Background(), sql).ReadAll()
	require.NoErrorf(t, err, "as administrator: %s", sql)
}

// asLogin connects as the login that serves the tenant, past oneo: what an injected statement could do.
func asLogin(t *testing.T, env *pgtest.Env, role string) *pgx.Conn {
	t.Helper()
	cfg, err := pgx.ParseConfig(env.Group.URL)
	require.NoError(t, err)
	cfg.User = role
	c, err := pgx.ConnectConfig(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { _ = c.Close(context.Background()) })
	return c
}

func requireState(t *testing.T, err error, want, why string) {
	t.Helper()
	var pe *pgconn.PgError
	require.Truef(t, errors.As(err, &pe), "%s: want SQLSTATE %s, got %v", why, want, err)
	require.Equalf(t, want, pe.Code, "%s: %v", why, err)
}

func requireFault(t *testing.T, err error, kind fault.Kind, code string) {
	t.Helper()
	require.Truef(t, fault.Is(err, kind), "want a fault of kind %s (%s), got %v", kind, code, err)
	require.Equalf(t, code, fault.Of(err).StableCode(), "%v", err)
}

// until polls for what must become true.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(pgtest.Patience)
	for !ok() {
		require.Truef(t, time.Now().Before(deadline), "waited in vain: %s", what)
		pause := time.NewTimer(5 * time.Millisecond)
		<-pause.C
	}
}

func insertPipeline(key string) (string, []any) {
	return `insert into pipelines (id, key, name) values (gen_random_uuid(), $1, $1)`, []any{key}
}

func pipelineKey(a, b int) string { return fmt.Sprintf("k%d_%d", a, b) }
