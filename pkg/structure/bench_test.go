package structure_test

import (
	"fmt"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// BenchmarkDrift compares ONEO_BENCH_TENANTS tenants (1,000) of oneo's own migrations, and says what the backend holds
// after one query over all of them.
func BenchmarkDrift(b *testing.B) {
	n := 1000
	if s := os.Getenv("ONEO_BENCH_TENANTS"); s != "" {
		var err error
		n, err = strconv.Atoi(s)
		require.NoError(b, err)
	}
	env := pgtest.New(b)
	ctx := b.Context()
	inst, err := env.DB.Installation(ctx, "main")
	require.NoError(b, err)
	ts := make([]tenant.Tenant, n)
	keys, schemas := make([]int32, n), make([]structure.Schema, n)
	for i := range ts {
		ts[i], err = env.Provision.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(b, fmt.Sprintf("t%d", i)), Actor: "bench"})
		require.NoError(b, err)
		keys[i], schemas[i] = ts[i].Number, structure.Schema{Name: ts[i].Schema.String(), Role: inst.TenantRole(ts[i].Number)}
	}
	admin := pgtest.Admin(b, env.AdminURL)
	start := time.Now()
	var held int64
	err = pgx.BeginFunc(ctx, admin, func(tx pgx.Tx) error {
		found, err := structure.Hashes(ctx, tx, keys, schemas)
		if err != nil {
			return err
		}
		require.Len(b, found, n)
		return tx.QueryRow(ctx, `select sum(total_bytes) from pg_backend_memory_contexts`).Scan(&held)
	})
	require.NoError(b, err)
	b.Logf("one query over %d tenants: %s, afterwards the backend holds %d MB", n, time.Since(start).Round(time.Millisecond), held>>20)
	for b.Loop() {
		c, err := structure.New(structure.Options{DB: env.DB, Head: env.Migrate.Head("tenant"), Make: env.Migrate.Create})
		require.NoError(b, err)
		groups, err := c.Drift(ctx, "main", ts)
		require.NoError(b, err)
		require.Len(b, groups, 1)
	}
}
