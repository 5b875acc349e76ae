package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const bindingState = `select concat_ws('|', current_setting('search_path'), current_user, current_setting('transaction_read_only'),
current_setting('statement_timeout'), current_setting('lock_timeout'), current_setting('idle_in_transaction_session_timeout'), current_schema())`

// The first use of a statement on a connection takes the explicit path, the second and third the ways of one round
// trip: by the shared name and by the tenant's own. All must be bound alike.
func TestBinding(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
			t.Run(fmt.Sprintf("%s %s", iso, st), func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, oneConn, func(o *postgres.Options) {
					o.Isolation, o.Statements = iso, st
					o.StatementTimeout, o.LockTimeout, o.IdleInTransactionTimeout = 7*time.Second, 1500*time.Millisecond, 11*time.Second
				})
				inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
				require.NoError(t, err)
				tenants := []tenant.Tenant{env.Tenant(t, "acme"), env.Tenant(t, "select"), env.Tenant(t, "1-2-3"), env.Tenant(t, "acme-berlin")}
				for round := range 5 {
					for _, tn := range tenants {
						for _, a := range []postgres.Access{postgres.Single, postgres.Read, postgres.Write} {
							role, readOnly := inst.TenantRole(tn.Number), "on"
							if iso == postgres.BySchema {
								role = inst.AppRole
							}
							if a == postgres.Write {
								readOnly = "off"
							}
							want := strings.Join([]string{`%s, ext, pg_temp`, role, readOnly, "7s", "1500ms", "11s", tn.Schema.String()}, "|")
							got := value[string](t, env.DB, tn, a, bindingState)
							name := tn.Schema.String()
							if name == "select" || name == "1_2_3" {
								name = `"` + name + `"`
							}
							require.Equalf(t, fmt.Sprintf(want, name), got, "binding of %s in round %d, access %d", tn.Slug, round, a)
						}
					}
				}
				env.Invariants(t)
			})
		}
	}
}

func TestSharedWorkIsUnboundAndLimited(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	ctx := t.Context()
	for _, a := range []postgres.Access{postgres.Read, postgres.Write, postgres.Single} {
		var got string
		require.NoError(t, env.DB.InShared(ctx, a, func(tx *postgres.Tx) error { return tx.QueryRow(ctx, bindingState).Scan(&got) }))
		readOnly := map[bool]string{true: "off", false: "on"}[a == postgres.Write]
		require.Equal(t, `""|oneo_app|`+readOnly+`|1min|1s|2min`, got)
	}
	err := env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error { _, err := tx.Exec(ctx, `select 1 from users`); return err })
	requireState(t, err, "42P01", "a statement that forgot its tenant")
	err = env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error { _, err := tx.Exec(ctx, `select 1 from acme.users`); return err })
	requireState(t, err, "42501", "shared work must not reach a tenant's table")
	err = env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
		_, err := tx.Exec(ctx, `insert into public.audit (actor, action) values ('x', 'x')`)
		return err
	})
	requireFault(t, err, fault.Internal, "read_only")
	err = env.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error { _, err := tx.Exec(ctx, `delete from public.tenants`); return err })
	requireState(t, err, "42501", "the app role may not delete tenants")
	err = env.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error { _, err := tx.Exec(ctx, `delete from public.ledger`); return err })
	requireState(t, err, "42501", "the app role may not touch the ledger")
}

// Security 20: in role mode PostgreSQL refuses another tenant's table. In schema mode only the path separates tenants.
func TestForeignTable(t *testing.T) {
	t.Parallel()
	for iso, want := range map[postgres.Isolation]string{postgres.ByRole: "42501", postgres.BySchema: ""} {
		t.Run(string(iso), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, func(o *postgres.Options) { o.Isolation = iso })
			a, b := env.Tenant(t, "acme"), env.Tenant(t, "globex")
			_ = b
			for _, access := range []postgres.Access{postgres.Read, postgres.Write, postgres.Single} {
				err := try(t.Context(), env.DB, a, access, `select email from globex.users`)
				if want == "" {
					require.NoError(t, err, "schema mode grants every schema to the app role: this is what it means")
					continue
				}
				requireState(t, err, want, "another tenant's table")
			}
			for _, sql := range []string{`select 1 from public.tenants`, `select 1 from public.administrators`} {
				err := try(t.Context(), env.DB, a, postgres.Read, sql)
				if iso == postgres.ByRole {
					requireState(t, err, "42501", sql)
				}
			}
			err := try(t.Context(), env.DB, a, postgres.Read, `select 1 from tenants`)
			requireState(t, err, "42P01", "public is not in the search path")
			require.NoError(t, try(t.Context(), env.DB, a, postgres.Read, `select email from users`))
		})
	}
}

func TestReadOnly(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	sql, args := insertPipeline("k")
	for range 3 { // explicit path, shared name, own name
		for _, access := range []postgres.Access{postgres.Read, postgres.Single} {
			requireFault(t, try(t.Context(), env.DB, a, access, sql, args...), fault.Internal, "read_only")
		}
	}
	require.Zero(t, value[int](t, env.DB, a, postgres.Read, `select count(*) from pipelines`), "nothing may have been written")
	require.NoError(t, try(t.Context(), env.DB, a, postgres.Write, sql, args...))
	require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select count(*) from pipelines`))
	for range 2 {
		requireFault(t, try(t.Context(), env.DB, a, postgres.Single, sql, "k2"), fault.Internal, "read_only")
	}
}

func TestSingleRunsOneStatement(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	for range 3 {
		err := env.DB.InTenant(t.Context(), a, postgres.Single, func(tx *postgres.Tx) error {
			var n int
			if err := tx.QueryRow(t.Context(), `select 1`).Scan(&n); err != nil {
				return err
			}
			return tx.QueryRow(t.Context(), `select 2`).Scan(&n)
		})
		requireFault(t, err, fault.Internal, "single")
	}
	require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Single, func(*postgres.Tx) error { return nil }), "no statement at all is well")
	err := env.DB.InTenant(t.Context(), a, postgres.Single, func(tx *postgres.Tx) error {
		var n int
		return tx.QueryRow(t.Context(), `select 1 where false`).Scan(&n)
	})
	require.ErrorIs(t, err, pgx.ErrNoRows)
}

// An error that comes behind the first rows must not be lost, also when fn does not look.
func TestSingleReportsLateErrors(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	for i := range 4 {
		err := env.DB.InTenant(t.Context(), a, postgres.Single, func(tx *postgres.Tx) error {
			rows, err := tx.Query(t.Context(), `select 1 / (500 - n) from generate_series(1, 1000) n`)
			if err == nil {
				rows.Next()
			}
			return nil
		})
		require.Errorf(t, err, "round %d: a division by zero behind the first row was reported as success", i)
		require.Equal(t, 1, value[int](t, env.DB, a, postgres.Single, `select 1`), "the connection stays usable")
	}
}

func TestNoTenantNoStatement(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	never := func(*postgres.Tx) error { panic("reached") }
	requireFault(t, env.DB.InTenant(t.Context(), tenant.Tenant{}, postgres.Read, never), fault.Internal, "no_tenant")
	requireFault(t, env.DB.InTenant(t.Context(), tenant.Tenant{Schema: a.Schema, Group: "main"}, postgres.Read, never), fault.Internal, "no_tenant")
	requireFault(t, env.DB.AsOwnerIn(t.Context(), tenant.Tenant{}, func(*postgres.OwnerTx) error { panic("reached") }), fault.Internal, "no_tenant")
	ghost := a
	ghost.Number = 999
	requireFault(t, env.DB.InTenant(t.Context(), ghost, postgres.Read, never), fault.Gone, "tenant_gone")
	elsewhere := a
	elsewhere.Group = "nowhere"
	requireFault(t, env.DB.InTenant(t.Context(), elsewhere, postgres.Read, never), fault.Invalid, "unknown_group")
	// Whoever lies about the schema is bound to where the placement says.
	liar := a
	liar.Schema = env.Tenant(t, "globex").Schema
	require.Equal(t, "acme", value[string](t, env.DB, liar, postgres.Single, `select current_schema()`))
	require.Equal(t, "acme", value[string](t, env.DB, liar, postgres.Read, `select current_schema()`))
}

// Security 13-17: what the logins may not do, whatever reaches them.
func TestLoginsMayNothing(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
	require.NoError(t, err)
	for _, role := range append(inst.LoginNames(), inst.AppRole) {
		c := asLogin(t, env, role)
		for sql, state := range map[string]string{
			`create table x (a int)`:                                         "3F000", // no schema to create in
			`create table public.x (a int)`:                                  "42501",
			`create table ext.x (a int)`:                                     "42501",
			`create table acme.x (a int)`:                                    "42501",
			`create schema x`:                                                "42501",
			`create temp table x (a int)`:                                    "42501",
			`create temp view x as select 1`:                                 "42501",
			`create function ext.f() returns int language sql as 'select 1'`: "42501",
			`create role x`:                                                  "42501",
			`create database x`:                                              "42501",
			`drop schema acme`:                                               "42501",
			`select pg_advisory_lock(1)`:                                     "42501",
			`select pg_advisory_lock(1, 2)`:                                  "42501",
			`select pg_advisory_lock_shared(1)`:                              "42501",
			`select pg_try_advisory_lock(1)`:                                 "42501",
			`select pg_try_advisory_lock_shared(1, 2)`:                       "42501",
			`select 1 from users`:                                            "42P01",
			`select 1 from acme.users`:                                       "42501",
			`update public.placements set state = 'active'`:                  "42501",
			`delete from public.installation`:                                "42501",
			`insert into public.ledger (set, tenant, version, name, checksum) values ('tenant', 1, 9, 'x', '')`: "42501",
			`copy (select 1) to program 'true'`:                           "42501",
			`select pg_read_file('/etc/passwd')`:                          "42501",
			`update pg_settings set setting = 'none' where name = 'role'`: "42501",
			`select lo_create(0)`:                                         "42501",
			`select lo_from_bytea(0, '')`:                                 "42501",
			`set role oneo_owner`:                                         "42501",
		} {
			_, err := c.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol)
			requireState(t, err, state, role+": "+sql)
		}
		var path string
		require.NoError(t, c.QueryRow(t.Context(), `show search_path`).Scan(&path))
		require.Contains(t, []string{"", `""`}, path, "an unbound login's search path is empty")
	}
	// The role of a tenant is granted to its own sub-pool's login only.
	other := inst.LoginOf(a.Number + 1)
	_, err = asLogin(t, env, other).Exec(t.Context(), "set role "+inst.TenantRole(a.Number))
	requireState(t, err, "42501", "the login of another sub-pool must not become this tenant")
	var super, createRole, createDB, bypass, repl, inherit bool
	for _, role := range append(inst.LoginNames(), inst.AppRole) {
		err := pgtest.Admin(t, env.AdminURL).QueryRow(t.Context(), `select rolsuper, rolcreaterole, rolcreatedb, rolbypassrls, rolreplication, rolinherit
from pg_roles where rolname = $1`, role).Scan(&super, &createRole, &createDB, &bypass, &repl, &inherit)
		require.NoError(t, err)
		require.Falsef(t, super || createRole || createDB || bypass || repl || inherit, "role %s has an attribute it must not have", role)
	}
}

func TestPanicRollsBackAndGoesOn(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	sql, args := insertPipeline("k")
	for _, access := range []postgres.Access{postgres.Write, postgres.Read, postgres.Single} {
		require.PanicsWithValue(t, "deliberate", func() {
			_ = env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) error {
				if access == postgres.Write {
					_, err := tx.Exec(t.Context(), sql, args...)
					require.NoError(t, err)
				} else {
					rows, err := tx.Query(t.Context(), `select generate_series(1, 100)`)
					require.NoError(t, err)
					rows.Next()
				}
				panic("deliberate")
			})
		})
	}
	require.PanicsWithValue(t, "deliberate", func() {
		_ = env.DB.AsOwnerIn(t.Context(), a, func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(t.Context(), sql, args...)
			require.NoError(t, err)
			panic("deliberate")
		})
	})
	require.Zero(t, value[int](t, env.DB, a, postgres.Single, `select count(*) from pipelines`), "a panic must roll back")
	env.Invariants(t)
}

func TestForgottenRowsAreNeverCommitted(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	for i := range 3 {
		sql, args := insertPipeline(pipelineKey(0, i))
		err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
			if _, err := tx.Exec(t.Context(), sql, args...); err != nil {
				return err
			}
			rows, err := tx.Query(t.Context(), `select generate_series(1, 100000)`)
			if err == nil {
				rows.Next()
			}
			return err
		})
		requireFault(t, err, fault.Internal, "rows_open")
		require.Zero(t, value[int](t, env.DB, a, postgres.Single, `select count(*) from pipelines`), "what was refused must not have been committed")
	}
	env.Invariants(t)
}

func TestTxIsDeadAfterwards(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	for range 3 {
		for _, access := range []postgres.Access{postgres.Write, postgres.Read, postgres.Single} {
			var kept *postgres.Tx
			var rows pgx.Rows
			_ = env.DB.InTenant(t.Context(), a, access, func(tx *postgres.Tx) (err error) {
				kept = tx
				rows, err = tx.Query(t.Context(), `select generate_series(1, 10000)`)
				return err
			})
			_, err := kept.Exec(t.Context(), `select 1`)
			require.Error(t, err, "a transaction that is over must not run statements")
			require.Error(t, kept.QueryRow(t.Context(), `select 1`).Scan(new(int)))
			n := 0
			for rows.Next() {
				n++
			}
			require.Less(t, n, 10000, "rows of a transaction that is over must not go on")
			require.Nil(t, rows.Conn(), "rows must not hand out the connection")
		}
	}
}

func TestCancelKeepsTheConnection(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	watch := pgtest.Admin(t, env.AdminURL)
	pid := value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`)
	for i := range 6 {
		access := []postgres.Access{postgres.Write, postgres.Read, postgres.Single}[i%3]
		ctx, cancel := context.WithCancel(t.Context())
		go func() { // once the statement is at work
			defer cancel()
			until(t, "the statement is at work", func() bool {
				var n int
				err := watch.QueryRow(t.Context(), `select count(*) from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'`).Scan(&n)
				return err != nil || n > 0
			})
		}()
		err := try(ctx, env.DB, a, access, `select pg_sleep(600)`) // a cancelled statement ends, or the test does not
		<-ctx.Done()
		require.Error(t, err)
		require.Equal(t, pid, value[int](t, env.DB, a, postgres.Single, `select pg_backend_pid()`), "a cancelled request keeps its connection")
		require.Equal(t, "acme, ext, pg_temp", value[string](t, env.DB, a, postgres.Read, `select current_setting('search_path')`))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, try(ctx, env.DB, a, postgres.Write, `select 1`), context.Canceled)
	env.Invariants(t)
}

func TestStatementTimeout(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, oneConn)
	a := env.Tenant(t, "acme")
	short, _, _ := env.Open(t, func(o *postgres.Options) { o.StatementTimeout = 200 * time.Millisecond })
	for range 3 {
		for _, access := range []postgres.Access{postgres.Write, postgres.Read, postgres.Single} {
			requireFault(t, try(t.Context(), short, a, access, `select pg_sleep(600)`), fault.Unavailable, "statement_timeout")
		}
	}
	until(t, "the connections are good", func() bool { return try(t.Context(), short, a, postgres.Single, `select 1`) == nil })
}

// A deferred constraint fails at the commit: that is the verdict, not what the statement said.
func TestDeferredConstraint(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Statements = st })
		a := env.Tenant(t, "acme")
		admin(t, env, `alter table acme.fields alter constraint fields_pipeline_id_fkey deferrable initially deferred`)
		const orphan = `insert into fields (id, pipeline_id, key, name, type) values (gen_random_uuid(), gen_random_uuid(), 'k', 'n', 'text')`
		for range 3 {
			said := errors.New("not run")
			err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
				_, said = tx.Exec(t.Context(), orphan)
				return said
			})
			require.NoError(t, said, "the statement itself succeeds")
			requireFault(t, err, fault.Conflict, "reference")
		}
		require.Zero(t, value[int](t, env.DB, a, postgres.Single, `select count(*) from fields`))
		env.Invariants(t)
	}
}

func TestAbortedTransactionIsNeverCommitted(t *testing.T) {
	t.Parallel()
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		env := pgtest.New(t, oneConn, func(o *postgres.Options) { o.Statements = st })
		a := env.Tenant(t, "acme")
		sql, args := insertPipeline("k")
		err := env.DB.InTenant(t.Context(), a, postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(t.Context(), sql, args...)
			require.NoError(t, err)
			_, err = tx.Exec(t.Context(), `select 1/0`)
			require.Error(t, err)
			return nil // swallowed
		})
		requireFault(t, err, fault.Internal, "rolled_back")
		err = env.DB.AsOwnerIn(t.Context(), a, func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(t.Context(), sql, args...)
			require.NoError(t, err)
			require.Error(t, tx.Script(t.Context(), `select 1/0`))
			return nil
		})
		requireFault(t, err, fault.Internal, "rolled_back")
		require.Zero(t, value[int](t, env.DB, a, postgres.Single, `select count(*) from pipelines`))
	}
}

func TestFaultsByState(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	sql, _ := insertPipeline("")
	require.NoError(t, try(t.Context(), env.DB, a, postgres.Write, sql, "k"))
	requireFault(t, try(t.Context(), env.DB, a, postgres.Write, sql, "k"), fault.Conflict, "exists")
	requireFault(t, try(t.Context(), env.DB, a, postgres.Write, sql, "NO KEY"), fault.Unfit, "value")
	requireFault(t, try(t.Context(), env.DB, a, postgres.Write, sql, "k\x00"), fault.Unfit, "value")
	require.ErrorIs(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(*postgres.Tx) error { return context.Canceled }), context.Canceled)
	err := try(t.Context(), env.DB, a, postgres.Write, sql, "k")
	require.Equal(t, "acme", fault.Of(err).Tenant, "a fault names its tenant")
}

func TestOptionsAreChecked(t *testing.T) {
	t.Parallel()
	good := postgres.DefaultOptions()
	good.Groups = map[string]postgres.Group{"main": {URL: "postgres://x:secret@127.0.0.1/x"}}
	_, err := postgres.Open(good)
	require.NoError(t, err, "opening connects nothing")
	for what, change := range map[string]func(*postgres.Options){
		"no main group": func(o *postgres.Options) { o.Groups = nil },
		"bad url": func(o *postgres.Options) {
			o.Groups = map[string]postgres.Group{"main": {URL: "postgres://x:secret@%zz/"}}
		},
		"conns":      func(o *postgres.Options) { o.MaxConns = 0 },
		"isolation":  func(o *postgres.Options) { o.Isolation = "none" },
		"statements": func(o *postgres.Options) { o.Statements = "x" },
		"timeouts":   func(o *postgres.Options) { o.LockTimeout = 0 },
		"logger":     func(o *postgres.Options) { o.Logger = nil },
		"roles":      func(o *postgres.Options) { o.AppRole = "" },
	} {
		o := good
		change(&o)
		_, err := postgres.Open(o)
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", what, err)
		require.NotContains(t, err.Error(), "secret", "an error must not quote a password")
	}
}

func TestCloseLeavesNothing(t *testing.T) {
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	ignore := goleak.IgnoreCurrent()
	db, _, _ := env.Open(t)
	require.Equal(t, 1, value[int](t, db, a, postgres.Single, `select 1`))
	require.NoError(t, db.InShared(t.Context(), postgres.Read, func(*postgres.Tx) error { return nil }))
	require.NoError(t, db.AsOwnerIn(t.Context(), a, func(*postgres.OwnerTx) error { return nil }))
	db.Close()
	db.Close()
	goleak.VerifyNone(t, ignore)
	require.Error(t, try(t.Context(), db, a, postgres.Read, `select 1`))
	require.Error(t, db.InShared(t.Context(), postgres.Read, func(*postgres.Tx) error { return nil }))
	require.Error(t, db.AsOwner(t.Context(), "main", func(*postgres.OwnerTx) error { return nil }))
}

// Only a database that was not reached is away: what one answers is its answer.
func TestAway(t *testing.T) {
	t.Parallel()
	for want, errs := range map[bool][]error{
		true: {
			&pgconn.ConnectError{Config: &pgconn.Config{}}, &pgconn.PgError{Code: "57P03"}, &pgconn.PgError{Code: "57P01"}, &pgconn.PgError{Code: "08006"},
			&pgconn.PgError{Code: "53300"}, context.DeadlineExceeded, io.ErrUnexpectedEOF,
			fault.New(fault.Unavailable, "none is free").WithCode("pool_exhausted"),
		},
		false: {
			nil, &pgconn.PgError{Code: "28P01"}, &pgconn.PgError{Code: "3D000"}, &pgconn.PgError{Code: "57P04"}, &pgconn.PgError{Code: "57014"},
			&pgconn.PgError{Code: "53100"}, &pgconn.PgError{Code: "58030"}, &pgconn.PgError{Code: "42501"}, &pgconn.PgError{Code: "42P01"},
			context.Canceled, pgx.ErrNoRows, fault.New(fault.NotFound, "none").WithCode("unknown_host"), errors.New("another"),
		},
	} {
		for _, err := range errs {
			require.Equalf(t, want, postgres.Away(postgres.Fault(err)), "%v", err)
		}
	}
}
