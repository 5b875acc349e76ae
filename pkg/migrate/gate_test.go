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

// F85: a shared schema that a newer binary has brought further is served by this one, and never changed by it, until a
// migration says that it is closed to it.
func TestNewerSharedSchemaIsServed(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	second := env.SecondGroup(t)
	db, m, _ := env.Open(t, func(o *postgres.Options) { o.Groups = map[string]postgres.Group{"main": env.Group, "second": second} })
	// Without an owner's URL the app role asks.
	app, asApp, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": {URL: env.Group.URL}, "second": {URL: second.URL}}
	})
	has, err := app.HasOwner(t.Context(), "main")
	require.NoError(t, err)
	require.False(t, has)
	_, err = m.Shared(t.Context())
	require.NoError(t, err)
	for group, set := range map[string]migrate.Set{"main": migrate.SharedSet, "second": migrate.GroupSet} {
		exec := func(sql string, args ...any) {
			t.Helper()
			require.NoError(t, db.AsOwner(t.Context(), group, func(tx *postgres.OwnerTx) error {
				_, err := tx.Exec(t.Context(), sql, args...)
				return err
			}))
		}
		head := m.Head(set)
		exec(`insert into public.ledger (set, tenant, version, name, checksum) values ($1, 0, $2, 'later', sha256('later'))`, set, head+1)
		for _, served := range []*migrate.Migrator{m, asApp} {
			require.NoError(t, served.SharedBehind(t.Context()), "merely newer")
		}
		_, err = m.Shared(t.Context())
		requireFault(t, err, fault.Conflict, "newer_database")
		exec(`insert into public.readers (set, reader) values ($1, $2)`, set, head)
		require.NoError(t, m.SharedBehind(t.Context()), "open to this very version")
		exec(`update public.readers set reader = $1`, head+1)
		for _, refused := range []*migrate.Migrator{m, asApp} {
			requireFault(t, refused.SharedBehind(t.Context()), fault.Conflict, "newer_database")
		}
		exec(`delete from public.readers`)
		require.NoError(t, m.SharedBehind(t.Context()))
		exec(`update public.ledger set checksum = sha256('other') where set = $1 and version = 1`, set)
		requireFault(t, m.SharedBehind(t.Context()), fault.Conflict, "edited_migration")
		exec(`update public.ledger set checksum = $2 where set = $1 and version = 1`, set, m.Files(set)[0].Checksum[:])
	}
}
