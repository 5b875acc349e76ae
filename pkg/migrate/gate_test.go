package migrate_test

import (
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// F16: a step that older code cannot stand, and any step down, never comes between two statements of a request: it waits
// for those at work, within lock_timeout. Other steps do not wait.
func TestBreakingStepsWaitForRequestsAtWork(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	head := env.Migrate.Head(migrate.TenantSet)
	fs := upTo(t, env, head)
	for name, text := range map[string]string{
		"0003_plain.up.sql":   `create table plain (); grant select on plain to public`,
		"0003_plain.down.sql": `drop table plain`,
		"0004_break.up.sql":   "-- oneo: breaking\nalter table plain add column n int default 4",
		"0004_break.down.sql": `alter table plain drop column n`,
	} {
		fs[name] = &fstest.MapFile{Data: []byte(text)}
	}
	m := with(t, env.DB, fs)
	soon := migrate.TenantOptions{LockTimeout: 30 * time.Millisecond}
	to := func(version int) error {
		o := soon
		o.Target = version
		_, err := m.Tenant(t.Context(), a, o)
		return err
	}
	down := func(version int) error {
		_, err := m.Down(t.Context(), a, version, soon)
		return err
	}
	waits := func(what string, step func() error) {
		t.Helper()
		require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(tx *postgres.Tx) error { // it has touched no table
			err := step()
			require.Truef(t, fault.Is(err, fault.Locked), "%s: %v", what, err)
			require.Equal(t, "gate_busy", fault.Of(err).StableCode())
			return nil
		}))
		require.NoError(t, step(), what)
	}
	require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(*postgres.Tx) error { return to(3) }), "others do not wait")
	waits("a breaking step", func() error { return to(4) })
	require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(*postgres.Tx) error {
		_, err := m.Down(t.Context(), a, 3, migrate.TenantOptions{Rehearse: true})
		return err
	}), "nobody sees what a rehearsal does")
	waits("a step down", func() error { return down(3) })
	require.NoError(t, down(2))
	waits("several steps, of which one is breaking", func() error { return to(4) })
	env.Invariants(t)
}
