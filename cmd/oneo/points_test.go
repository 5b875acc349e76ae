package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// With an engine of physical backups a run has its restore point: one for all its tenants, which a resumed run keeps. Without the
// right to set one it is told how to get it, and everything goes on.
func TestRunsHaveRestorePoints(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 3)
	p.extra = append(p.extra, "ONEO_BACKUP_PHYSICAL_ENGINE=files", "ONEO_BACKUP_PHYSICAL_DIR="+t.TempDir())
	migrate := func(env ...string) (stderr string, code int) {
		t.Helper()
		_, stderr, code = p.run(env, "migrate", "--force", "--all-tenants", "--jobs", "2", "--progress", "none")
		return stderr, code
	}
	shown := func() (points []string) {
		t.Helper()
		stdout, stderr, code := p.run(nil, "migrate", "run", "show", "last", "-o", "json")
		require.Zero(t, code, stderr)
		var run struct {
			Points []string `json:"restore_points"`
		}
		require.NoError(t, json.Unmarshal([]byte(stdout), &run))
		return run.Points
	}
	names := func() (all string) {
		t.Helper()
		require.NoError(t, p.admin.QueryRow(t.Context(), `select coalesce(string_agg(kind || ' ' || name, ', ' order by at), '') from public.restore_points`).Scan(&all))
		return all
	}

	version := p.next("")
	stderr, code := migrate()
	require.Zero(t, code, stderr)
	require.Equal(t, 1, strings.Count(stderr, "level=WARN"), stderr)
	require.Contains(t, stderr, "grant execute on function pg_catalog.pg_create_restore_point(text) to")
	p.executedOnce(version)
	require.Empty(t, shown())
	require.Empty(t, names())

	_, err := p.admin.Exec(t.Context(), postgres.GrantRestorePoints(p.owner()))
	require.NoError(t, err)
	version = p.next("")
	_, stderr, code = p.run(nil, "migrate", "-t", "t000", "--rehearse", "--progress", "none")
	require.Zero(t, code, stderr)
	require.Empty(t, names(), "nothing is changed")

	// One that is killed before the point gets it from whoever goes on; killed behind it, it keeps it.
	stderr, code = migrate("ONEO_FAILPOINTS=run.planned=exit")
	require.Equal(t, 137, code, stderr)
	require.Empty(t, names())
	p.died()
	stderr, code = migrate("ONEO_FAILPOINTS=run.claimed=exit")
	require.Equal(t, 137, code, stderr)
	first := names()
	require.Regexp(t, `^run\.migrate oneo-[0-9a-f-]+$`, first)
	p.died()
	stderr, code = migrate()
	require.Zero(t, code, stderr)
	require.Contains(t, stderr, "going on with the run")
	require.NotContains(t, stderr, "restore point")
	p.executedOnce(version)
	require.Equal(t, first, names())
	require.Len(t, shown(), 1)
	require.Regexp(t, `^main \d{4}-`, shown()[0])

	// Each that changes tenants has one.
	for _, args := range [][]string{
		{"sql", "--all-tenants", "--write", "--yes", "--progress", "none", "update records set updated_at = updated_at"},
		{"migrate", "down", "--to", "3", "-t", "t001", "--yes", "--progress", "none"},
		{"tenant", "drop", "t002", "--yes"},
	} {
		_, stderr, code := p.run(nil, args...)
		require.Zero(t, code, "%s: %s", args, stderr)
	}
	var kinds string
	require.NoError(t, p.admin.QueryRow(t.Context(), `select string_agg(kind, ' ' order by at) from public.restore_points`).Scan(&kinds))
	require.Equal(t, "run.migrate run.sql run.down tenant.drop", kinds)
	p.env.Invariants(t)
}

// The shared schema has one before it is migrated, whatever comes of that.
func TestTheSharedSchemaHasARestorePoint(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	admin := pgtest.Admin(t, env.AdminURL)
	extra := []string{"ONEO_BACKUP_PHYSICAL_ENGINE=files", "ONEO_BACKUP_PHYSICAL_DIR=" + t.TempDir()}
	_, err := admin.Exec(t.Context(), postgres.GrantRestorePoints("oneo_owner"))
	require.NoError(t, err)
	points := func() (n int) {
		t.Helper()
		require.NoError(t, admin.QueryRow(t.Context(), `select count(*) from public.restore_points where kind = 'migrate.shared' and tenant = ''`).Scan(&n))
		return n
	}
	_, stderr, code := oneo(t, env, extra, "migrate", "--shared")
	require.Zero(t, code, stderr)
	require.Zero(t, points(), "there was nothing to do")
	_, err = admin.Exec(t.Context(), `delete from public.ledger where set = 'shared' and version = (select max(version) from public.ledger where set = 'shared')`)
	require.NoError(t, err)
	_, stderr, code = oneo(t, env, extra, "migrate", "--shared")
	require.NotZero(t, code, "its tables are there already")
	require.NotContains(t, stderr, "restore point")
	require.Equal(t, 1, points())
}
