package postgres_test

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// ledger keeps what was told of each tenant's transactions; 0: of the shared tables'.
type ledger struct {
	mu   sync.Mutex
	told map[int32][]postgres.Work
}

func (l *ledger) Transaction(t tenant.Tenant, w postgres.Work) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told[t.Number] = append(l.told[t.Number], w)
}

// last is the one transaction that was told of since the last call.
func (l *ledger) last(t *testing.T, number int32) postgres.Work {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	require.Len(t, l.told[number], 1, "one transaction is told of once")
	w := l.told[number][0]
	l.told = map[int32][]postgres.Work{}
	return w
}

func (l *ledger) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told = map[int32][]postgres.Work{}
}

// Every way by which a tenant's work goes is counted, with the caller's statements and rows and nothing of the binding.
func TestTransactionsAreCounted(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*postgres.Options){
		"prepared":   func(*postgres.Options) {},
		"unprepared": func(o *postgres.Options) { o.Statements = postgres.Unprepared },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &ledger{told: map[int32][]postgres.Work{}}
			env := pgtest.New(t, oneConn, change, func(o *postgres.Options) { o.Counter = l })
			a := env.Tenant(t, "acme")
			l.forget()
			ctx := t.Context()
			const three = `select g, pg_sleep(0.01) from generate_series(1, 3) g`
			check := func(err error, number int32, statements, rows int64, failed bool) {
				t.Helper()
				w := l.last(t, number)
				require.Equal(t, failed, w.Failed, "%v", err)
				require.Equal(t, statements, w.Statements, "statements")
				require.Equal(t, rows, w.Rows, "rows")
				require.Positive(t, w.Took)
			}
			read := func(tx *postgres.Tx, sql string) error {
				rows, err := tx.Query(ctx, sql)
				if err != nil {
					return err
				}
				defer rows.Close()
				for rows.Next() {
				}
				return rows.Err()
			}
			for range 4 { // in a transaction of its own, by the shared name, by a name of the tenant's own
				err := env.DB.InTenant(ctx, a, postgres.Single, func(tx *postgres.Tx) error { return read(tx, three) })
				require.NoError(t, err)
				check(err, a.Number, 1, 3, false)
			}
			for range 3 {
				err := env.DB.InTenant(ctx, a, postgres.Read, func(tx *postgres.Tx) error {
					return errors.Join(read(tx, three), read(tx, `select 1`))
				})
				require.NoError(t, err)
				check(err, a.Number, 2, 4, false)
			}
			err := env.DB.InTenant(ctx, a, postgres.Write, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `update settings set value = value where false`)
				if err == nil {
					return errors.New("there is no such table")
				}
				return err
			})
			check(err, a.Number, 0, 0, true)
			err = env.DB.InTenant(ctx, a, postgres.Write, func(tx *postgres.Tx) error {
				_, err := tx.Exec(ctx, `insert into pipelines (id, key, name) select gen_random_uuid(), 'k' || g, 'n' from generate_series(1, 5) g`)
				return err
			})
			require.NoError(t, err)
			check(err, a.Number, 1, 5, false)

			// What callers asked wrongly is no failure, nor is what they gave up.
			err = env.DB.InTenant(ctx, a, postgres.Read, func(tx *postgres.Tx) error { return fault.New(fault.NotFound, "no") })
			check(err, a.Number, 0, 0, false)
			gone, leave := context.WithCancel(ctx)
			err = env.DB.InTenant(gone, a, postgres.Read, func(tx *postgres.Tx) error { leave(); return gone.Err() })
			check(err, a.Number, 0, 0, false)
			require.Panics(t, func() {
				_ = env.DB.InTenant(ctx, a, postgres.Read, func(*postgres.Tx) error { panic("here") })
			})
			check(nil, a.Number, 0, 0, true)

			err = env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error { return read(tx, three) })
			require.NoError(t, err)
			check(err, 0, 1, 3, false)
			_, err = env.DB.AsTenant(ctx, a, postgres.Statement{SQL: `select 1 from generate_series(1, 7)`})
			require.NoError(t, err)
			check(err, a.Number, 1, 7, false)

			// A transaction that got no connection is told of too.
			ended, end := context.WithCancel(ctx)
			end()
			err = env.DB.InTenant(ended, a, postgres.Read, func(*postgres.Tx) error { return nil })
			require.Error(t, err)
			l.forget()
		})
	}
}

// Each of the two sub-pools has one connection; one of them has seen two of the three tenants.
func TestStatsKnowTheBusiestConnection(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	for _, slug := range []string{"acme", "globex", "initech"} {
		tn := env.Tenant(t, slug)
		require.Equal(t, 1, value[int](t, env.DB, tn, postgres.Single, `select 1`))
	}
	st := env.DB.Stats()[0]
	require.Equal(t, 2, st.Tenants)
	require.Equal(t, 2, st.Max)
}
