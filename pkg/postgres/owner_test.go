package postgres_test

import (
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// What is sent with the beginning and with the commit is part of the transaction: it is bounded, what comes first is
// asked before the binding, what comes last does not see the tenant, and if that fails nothing is committed.
func TestAsOwnerAt(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	a := env.Tenant(t, "acme")
	bounds := postgres.OwnerOptions{LockTimeout: 1500 * time.Millisecond, StatementTimeout: 40 * time.Second}
	const settings = `select concat_ws(' ', current_setting('search_path'), current_setting('lock_timeout'), current_setting('statement_timeout'), pg_backend_pid())`
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		db, _, _ := env.Open(t, func(o *postgres.Options) { o.Statements, o.OwnerConns = st, 1 })
		var first, then, last, pid string
		named := func(name string) []string {
			var found []string
			require.NoError(t, db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
				if err := tx.QueryRow(ctx, `select pg_backend_pid()::text`).Scan(&pid); err != nil {
					return err
				}
				rows, err := tx.Query(ctx, `select nspname::text from pg_class c join pg_namespace n on n.oid = relnamespace where relname = $1`, name)
				if err != nil {
					return err
				}
				found, err = pgx.CollectRows(rows, pgx.RowTo[string])
				return err
			}))
			return found
		}
		at := func(number int32, table string, end func(*pgx.Batch)) error {
			return db.AsOwnerAt(ctx, "main", number, bounds, func(b *pgx.Batch) {
				b.Queue(settings).QueryRow(func(row pgx.Row) error { return row.Scan(&first) })
			}, func(tx *postgres.OwnerTx) error {
				if err := tx.QueryRow(ctx, settings).Scan(&then); err != nil {
					return err
				}
				if _, err := tx.Run(ctx, "create table "+table+" (id int)"); err != nil {
					return err
				}
				tx.Last(end)
				return nil
			})
		}
		require.NoError(t, at(a.Number, "kept_"+string(st), func(b *pgx.Batch) {
			b.Queue(settings).QueryRow(func(row pgx.Row) error { return row.Scan(&last) })
		}))
		require.Equal(t, []string{"acme"}, named("kept_"+string(st)))
		require.Equal(t, ` 1500ms 40s `+pid, first)
		require.Equal(t, `acme, ext, pg_temp 1500ms 40s `+pid, then)
		require.Equal(t, `"" 1500ms 40s `+pid, last)
		was := pid
		err := at(a.Number, "lost", func(b *pgx.Batch) { b.Queue(`select 1 / $1::int`, 0) })
		requireState(t, err, "22012", "the last statement failed")
		require.Empty(t, named("lost"))
		requireFault(t, at(a.Number+1, "lost", func(*pgx.Batch) {}), fault.NotFound, "schema_missing")
		require.Empty(t, named("lost"))
		require.Equal(t, was, pid, "the connection has outlived the failures")
	}
	admin(t, env, `drop table acme.kept_prepared, acme.kept_unprepared`)
	env.Invariants(t)
}
