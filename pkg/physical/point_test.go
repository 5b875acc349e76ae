package physical_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// A recovery to the point that an operation has set has everything of before it, and nothing of it.
func TestARecoveryEndsBeforeAnOperation(t *testing.T) {
	t.Parallel()
	ctx := t.Context()
	dir, err := os.MkdirTemp("", "physical-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	repo := filepath.Join(dir, "repository")
	plan, err := must(physical.NewFiles(physical.FilesOptions{Dir: repo})).Plan(ctx)
	require.NoError(t, err)
	plan.Settings["archive_timeout"] = "0" // it is flushed below
	env := pgtest.NewAlone(t, dir, plan.Settings)
	admin := pgtest.Admin(t, env.AdminURL)
	for _, sql := range physical.Grants("oneo_owner") {
		_, err := admin.Exec(ctx, sql)
		require.NoError(t, err)
	}
	engine := must(physical.NewFiles(physical.FilesOptions{Dir: repo, URL: env.Group.OwnerURL}))
	require.NoError(t, engine.Prepare(ctx))
	_, err = engine.Create(ctx, physical.CreateOptions{})
	require.NoError(t, err)
	log := slog.New(slog.DiscardHandler)
	p, err := provision.New(provision.Options{
		DB: env.DB, Migrate: env.Migrate, BaseDomain: env.Base, DropGrace: time.Hour, GateWait: 30 * time.Second, Marker: registry.NewMarker(env.DB, log), Logger: log,
	})
	require.NoError(t, err)
	one := env.Tenant(t, "acme")
	_, err = p.Drop(ctx, one.Slug, 0, "test")
	require.NoError(t, err)
	_, err = p.Purge(ctx, one.Slug, "test")
	require.NoError(t, err)
	require.NoError(t, physical.Flush(ctx, admin))

	var points []registry.Point
	require.NoError(t, env.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		points, err = registry.Points(ctx, tx, time.Time{}, 10)
		return err
	}))
	require.Len(t, points, 2)
	for i, want := range []struct{ kind, state string }{{provision.KindPurge, "dropped"}, {provision.KindDrop, "active"}} {
		at := points[i]
		require.Equal(t, want.kind, at.Kind)
		lsn, err := physical.ParseLSN(at.LSN)
		require.NoError(t, err)
		c, err := physical.Recover(ctx, engine, physical.RecoverOptions{
			Dir: filepath.Join(dir, "scratch"), Target: physical.Target{Time: at.At, Point: at.Name, LSN: lsn}, Role: "postgres", Database: env.Database, Why: t.Name(),
		})
		require.NoError(t, err, want.kind)
		conn, err := pgx.Connect(ctx, c.URL("postgres", env.Database))
		require.NoError(t, err)
		var state string
		var users int
		require.NoError(t, conn.QueryRow(ctx, `select t.state, (select count(*) from pg_tables where tablename = 'users' and schemaname = p.schema)
from public.tenants t join public.placements p on p.number = t.number where t.slug = 'acme'`).Scan(&state, &users))
		require.Equal(t, want.state, state, want.kind)
		require.Equal(t, 1, users)
		require.NoError(t, conn.Close(ctx))
		require.NoError(t, c.Close(context.Background()))
	}
}
