package postgres_test

import (
	"context"
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

var accesses = []postgres.Access{postgres.Single, postgres.Read, postgres.Write}

func serves(least, head int) func(*postgres.Options) {
	return func(o *postgres.Options) { o.Serves = postgres.Range{Min: least, Head: head} }
}

// patient keeps a busy machine from ending a wait for a migration that is at work: that is another refusal.
func patient(o *postgres.Options) { o.LockTimeout = 30 * time.Second }

// stand moves a tenant to a version and the least reader that it is open to.
func stand(t *testing.T, env *pgtest.Env, tn tenant.Tenant, version, reader int) {
	t.Helper()
	admin(t, env, fmt.Sprintf(`update public.placements set version = %d, reader = %d where number = %d`, version, reader, tn.Number))
}

func requireUpgrading(t *testing.T, err error) {
	t.Helper()
	requireFault(t, err, fault.Suspended, "tenant_upgrading")
	require.Equal(t, 5*time.Second, fault.Of(err).Retry, "a 503 says when to come back")
}

// F16: a tenant outside of the range is refused by the binding itself, whoever has it prepared already; its neighbour is
// served, and so is one that is merely newer.
func TestOutOfRangeIsRefused(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
			t.Run(fmt.Sprintf("%s %s", iso, st), func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, oneConn, serves(2, 3), func(o *postgres.Options) { o.Isolation, o.Statements = iso, st })
				a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
				const sql = `select count(*)::int from users`
				served := func(tn tenant.Tenant, why string) {
					t.Helper()
					for _, access := range accesses {
						require.NoErrorf(t, try(t.Context(), env.DB, tn, access, sql), "%s, access %d", why, access)
					}
				}
				refused := func(why string) {
					t.Helper()
					for range 2 {
						for _, access := range accesses {
							ran := false
							err := env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) error {
								_, err := tx.Exec(t.Context(), sql)
								ran = err == nil
								return err
							})
							require.Falsef(t, ran, "%s, access %d: the statement ran", why, access)
							requireUpgrading(t, err)
						}
					}
					served(b, "the neighbour, "+why)
				}
				for range 3 { // warm: the ways of one round trip are to be tried too
					served(a, "at the version that the code needs")
				}
				stand(t, env, a, 1, 0)
				refused("older than the code needs")
				stand(t, env, a, 2, 0)
				served(a, "in range again")
				stand(t, env, a, 7, 0)
				served(a, "merely newer")
				stand(t, env, a, 7, 3)
				served(a, "open to this very version")
				stand(t, env, a, 7, 4)
				refused("closed to this version")
				_, err := env.Provision.Suspend(t.Context(), a.Slug, "test")
				require.NoError(t, err)
				requireFault(t, try(t.Context(), env.DB, a, postgres.Single, sql), fault.Suspended, "tenant_suspended")
				_, err = env.Provision.Resume(t.Context(), a.Slug, "test")
				require.NoError(t, err)

				out, err := env.DB.OutOfRange(t.Context(), postgres.MainGroup)
				require.NoError(t, err)
				require.Equal(t, []int32{a.Number}, out)
				p, err := env.DB.Placement(t.Context(), a)
				require.NoError(t, err)
				require.Equal(t, postgres.Placement{Version: 7, Reader: 4}, p)
				require.False(t, env.DB.Serves().Holds(p))
			})
		}
	}
}

func TestRangeIsValidated(t *testing.T) {
	t.Parallel()
	for _, r := range []postgres.Range{{Min: -1, Head: 3}, {Min: 4, Head: 3}, {Head: math.MaxInt32 + 1}} {
		o := postgres.DefaultOptions()
		o.Groups, o.Serves = map[string]postgres.Group{"main": {URL: "postgres://localhost/x"}}, r
		_, err := postgres.Open(o)
		require.Truef(t, fault.Is(err, fault.Invalid), "%v: %v", r, err)
	}
}

// migration moves a tenant between two versions as a run would: DDL and placement in one transaction.
type migration struct {
	forth, back string
	reader      int // of the later version
}

func (m migration) move(ctx context.Context, c *pgx.Conn, tn tenant.Tenant, forward bool) error {
	ddl, version, reader := m.back, 2, 0
	if forward {
		ddl, version, reader = m.forth, 3, m.reader
	}
	return pgx.BeginFunc(ctx, c, func(tx pgx.Tx) error {
		ledger := `delete from public.ledger where set = 'tenant' and version = 3 and tenant = %d`
		if forward {
			ledger = `insert into public.ledger (set, tenant, version, name, checksum) values ('tenant', %d, 3, 'deals', sha256(''))`
		}
		_, err := tx.Exec(ctx, fmt.Sprintf(`set local search_path to %s; %s; update public.placements set version = %d, reader = %d, updated_at = now() where number = %d; `+ledger,
			postgres.Quote(tn.Schema.String()), ddl, version, reader, tn.Number, tn.Number), pgx.QueryExecModeSimpleProtocol)
		return err
	})
}

// deals gives a tenant a table with one row, which tells whose it is.
func deals(t *testing.T, env *pgtest.Env, tn tenant.Tenant, amount int) {
	t.Helper()
	s := postgres.Quote(tn.Schema.String())
	admin(t, env, fmt.Sprintf(`create table %s.deals (amount int, old text default 'old'); insert into %[1]s.deals values (%d); grant select, insert on %[1]s.deals to public`, s, amount))
}

// retyped changes the type of a column that everybody reads, and swaps another for a new one.
var retyped = migration{
	forth: `alter table deals alter column amount type text, drop column old, add column fresh text default 'fresh'`,
	back:  `alter table deals alter column amount type int using amount::int, drop column fresh, add column old text default 'old'`,
}

// F17: two tenants at two versions share one connection. Each answer is the right one; while versions stand still nobody
// is refused, and while one moves, a refusal is a clean one.
func TestMixedVersionsOnOneConnection(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		for _, hot := range []int{0, 50} {
			t.Run(fmt.Sprintf("%s, %d hot", st, hot), func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, oneConn, patient, func(o *postgres.Options) { o.Statements, o.HotStatements = st, hot })
				a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech") // a and c share a connection
				deals(t, env, a, 7)
				deals(t, env, c, 8)
				conn := pgtest.Admin(t, env.AdminURL)
				require.NoError(t, retyped.move(t.Context(), conn, c, true))
				read := func(tn tenant.Tenant, access postgres.Access, args ...any) (string, error) {
					sql := `select amount from deals`
					if len(args) > 0 {
						sql += ` where amount = $1`
					}
					var got any
					err := env.DB.InTenant(t.Context(), tn, access, func(tx *postgres.Tx) error {
						return tx.QueryRow(t.Context(), sql, args...).Scan(&got)
					})
					return fmt.Sprint(got), err
				}
				pid := value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`)
				for i := range 1000 {
					for tn, want := range map[tenant.Tenant]string{a: "7", c: "8"} {
						var args []any
						if i%2 == 0 {
							args = []any{want} // of the one an integer's parameter, of the other a text's
						}
						got, err := read(tn, accesses[i%3], args...)
						require.NoErrorf(t, err, "request %d of %s", i, tn.Slug)
						require.Equalf(t, want, got, "request %d of %s", i, tn.Slug)
					}
				}
				require.Equal(t, pid, value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`), "mixed versions must not cost connections")

				moving, stop := context.WithCancel(t.Context())
				var mover sync.WaitGroup
				defer mover.Wait()
				defer stop()
				var moves atomic.Int64
				mover.Go(func() {
					for forward := true; moving.Err() == nil; forward = !forward {
						if err := retyped.move(context.WithoutCancel(moving), conn, a, forward); err != nil {
							t.Errorf("migrate: %v", err)
							return
						}
						moves.Add(1)
						pause := time.NewTimer(2 * time.Millisecond)
						<-pause.C
					}
				})
				answered, refused := 0, 0
				for i := 0; i < 300 || moves.Load() < 50; i++ {
					require.False(t, t.Failed())
					for tn, want := range map[tenant.Tenant]string{a: "7", c: "8"} {
						got, err := read(tn, accesses[i%3])
						if err != nil {
							require.Equal(t, a, tn, "the tenant that stands still is never refused: %v", err)
							requireFault(t, err, fault.Unavailable, "tenant_changed")
							require.Positive(t, fault.Of(err).Retry)
							refused++
							continue
						}
						require.Equalf(t, want, got, "request %d of %s", i, tn.Slug)
						answered++
					}
				}
				t.Logf("%d answered, %d refused during %d migrations", answered, refused, moves.Load())
				stop()
				mover.Wait()
				env.Invariants(t)
			})
		}
	}
}

// F16: a binary that needs the later version asks for a column that only that has, while the tenant is migrated forth and
// back: it gets its rows, or is refused for the version. Never an error of its own, never the other version's rows.
func TestOnlyTheVersionsInRangeAreSeen(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, patient)
	a := env.Tenant(t, "acme")
	deals(t, env, a, 7)
	newer, _, _ := env.Open(t, serves(3, 3))
	older, _, _ := env.Open(t, serves(2, 2))
	m := retyped
	m.reader = 3
	conn := pgtest.Admin(t, env.AdminURL)
	moving, stop := context.WithCancel(t.Context())
	var mover, readers sync.WaitGroup
	defer mover.Wait()
	defer stop()
	mover.Go(func() {
		for forward := true; moving.Err() == nil; forward = !forward {
			if err := m.move(context.WithoutCancel(moving), conn, a, forward); err != nil {
				t.Errorf("migrate: %v", err)
				return
			}
			pause := time.NewTimer(3 * time.Millisecond)
			<-pause.C
		}
	})
	var seen [2]atomic.Int64
	for k, db := range []*postgres.DB{older, newer} {
		column := []string{"old", "fresh"}[k]
		readers.Go(func() {
			for i := 0; i < 300 || seen[k].Load() < 20; i++ {
				var got string
				err := db.InTenant(t.Context(), a, accesses[i%3], func(tx *postgres.Tx) error {
					if i%3 > 0 { // something before it, so that the migration may come in between
						if _, err := tx.Exec(t.Context(), `select 1`); err != nil {
							return err
						}
					}
					return tx.QueryRow(t.Context(), `select `+column+` from deals`).Scan(&got)
				})
				switch code := fault.Of(err); {
				case err == nil && got == column:
					seen[k].Add(1)
				case err != nil && (code.Code == "tenant_upgrading" || code.Code == "tenant_changed") && code.Retry > 0:
				default:
					t.Errorf("%s, request %d: %q, %v", column, i, got, err)
					return
				}
			}
		})
	}
	readers.Wait()
	stop()
	mover.Wait()
}

// A migration that is committed between two statements of a transaction is no bug of the second one. Without one, it is.
func TestErrorsOfAMigrationMeanwhile(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		for name, c := range map[string]struct {
			ddl, sql  string
			reader    int
			forthBack bool
			kind      fault.Kind
			code      string
		}{
			"a column is gone":               {ddl: `alter table deals drop column old`, sql: `select old from deals`, kind: fault.Unavailable, code: "tenant_changed"},
			"a column is gone, out of range": {ddl: `alter table deals drop column old`, sql: `select old from deals`, reader: 3, kind: fault.Suspended, code: "tenant_upgrading"},
			"a table is gone":                {ddl: `drop table deals`, sql: `select amount from deals`, kind: fault.Unavailable, code: "tenant_changed"},
			"a new column must be given":     {ddl: `alter table deals add column must int; update deals set must = 1; alter table deals alter column must set not null`, sql: `insert into deals (amount) values (1)`, kind: fault.Unavailable, code: "tenant_changed"},
			"a new rule":                     {ddl: `alter table deals add check (amount < 10)`, sql: `insert into deals (amount) values (99)`, kind: fault.Unavailable, code: "tenant_changed"},
			"another type":                   {ddl: `alter table deals alter column amount type text`, sql: `select old from deals where amount = 7`, kind: fault.Unavailable, code: "tenant_changed"},
			"forth and back":                 {ddl: `select 1`, sql: `select old2 from deals`, forthBack: true, kind: fault.Unavailable, code: "tenant_changed"},
			"nothing but a mistake":          {sql: `select old2 from deals`},
			"nothing but a value":            {sql: `insert into users (id) values (null)`, kind: fault.Unfit, code: "value"},
		} {
			t.Run(string(st)+" "+name, func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, serves(2, 2), func(o *postgres.Options) { o.Statements = st })
				a := env.Tenant(t, "acme")
				deals(t, env, a, 7)
				conn := pgtest.Admin(t, env.AdminURL)
				m := migration{forth: c.ddl, back: `select 1`, reader: c.reader}
				for range 3 { // its name is there
					_ = env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
						if _, err := tx.Exec(t.Context(), c.sql); err != nil {
							return err
						}
						return fault.New(fault.Conflict, "leave no row")
					})
				}
				err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
					if _, err := tx.Exec(t.Context(), `select 1`); err != nil {
						return err
					}
					if c.ddl != "" {
						require.NoError(t, m.move(t.Context(), conn, a, true))
					}
					if c.forthBack {
						require.NoError(t, m.move(t.Context(), conn, a, false))
					}
					_, err := tx.Exec(t.Context(), c.sql)
					require.Error(t, err)
					return err
				})
				if c.kind == "" {
					requireState(t, err, "42703", "a mistake stays one")
					require.Equal(t, fault.Internal, fault.Of(err).Kind)
					return
				}
				requireFault(t, err, c.kind, c.code)
			})
		}
	}
}

// Tenants share the names of statements with those of their version; a connection that is full of an earlier version's
// is replaced.
func TestNamesGoByVersion(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.HotStatements = 0 })
	a, _, c := env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech")
	stand(t, env, c, 3, 0)
	for range 3 {
		for _, tn := range []tenant.Tenant{a, c} {
			require.Equal(t, 42, value[int](t, env.DB, tn, postgres.Read, `select 42`))
			require.Equal(t, 42, value[int](t, env.DB, tn, postgres.Single, `select 42`))
		}
	}
	require.Equal(t, 2, value[int](t, env.DB, a, postgres.Read, `select count(distinct statement)::int from pg_prepared_statements where statement like 'select 42%'`),
		"one text for each version, also for a pooler that goes by texts")

	// A name that nobody could prove, because its transaction ended in a panic, goes with its connection.
	pid := value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`)
	require.Equal(t, pid, value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`))
	require.Panics(t, func() {
		_ = env.DB.InTenant(t.Context(), a, postgres.Read, func(tx *postgres.Tx) error {
			_, err := tx.Exec(t.Context(), `select 43`)
			require.NoError(t, err)
			panic("a bug")
		})
	})
	require.NotEqual(t, pid, value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`))
}

func TestListen(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx, stop := context.WithCancel(t.Context())
	var connects atomic.Int64
	heard := make(chan string, 100)
	ended := make(chan error, 1)
	go func() {
		ended <- env.DB.Listen(ctx, postgres.MainGroup, "Oneo versions", func() { connects.Add(1) }, func(p string) { heard <- p })
	}()
	hear := func(want string) {
		t.Helper()
		select {
		case got := <-heard:
			require.Equal(t, want, got)
		case <-time.After(pgtest.Patience):
			t.Fatalf("%q was not heard", want)
		}
	}
	until(t, "it listens", func() bool { return connects.Load() == 1 })
	admin(t, env, `select pg_notify('Oneo versions', '1 2'); select pg_notify('oneo versions', 'not for us')`)
	hear("1 2")
	for i := range int64(3) {
		const cut = `do $$ begin perform pg_terminate_backend(pid, 60000) from pg_stat_activity where query like 'listen %' and datname = current_database(); if not found then raise 'nobody listens'; end if; end $$`
		admin(t, env, cut)
		until(t, "it listens again", func() bool { return connects.Load() == i+2 })
		admin(t, env, `select pg_notify('Oneo versions', '3 4')`)
		hear("3 4")
	}
	stop()
	require.NoError(t, <-ended)
	err := env.DB.Listen(t.Context(), "nowhere", "x", func() {}, func(string) {})
	requireFault(t, err, fault.Invalid, "unknown_group")
}
