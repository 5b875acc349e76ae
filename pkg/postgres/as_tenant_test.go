package postgres_test

import (
	"fmt"
	"net/url"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const addPipeline = `insert into pipelines (id, key, name) select gen_random_uuid(), 'k' || count(*), current_user from pipelines`

// An operator's statement has the rights of a request of that tenant, in each way of keeping tenants apart and through
// each way to the server; a marked one happens once.
func TestAsTenant(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		for _, way := range []string{"prepared", "unprepared", "bouncer"} {
			t.Run(string(iso)+" "+way, func(t *testing.T) {
				t.Parallel()
				env := pgtest.New(t, oneConn, func(o *postgres.Options) {
					o.Isolation = iso
					if way != "prepared" {
						o.Statements = postgres.Unprepared
					}
				})
				a, b := env.Tenant(t, "acme"), env.Tenant(t, "1-2-3")
				db := env.DB
				if way == "bouncer" {
					bouncer := env.PgBouncer(t, 2)
					db, _, _ = env.Open(t, func(o *postgres.Options) {
						o.Groups = map[string]postgres.Group{"main": {URL: through(t, env.Group.URL, bouncer), OwnerURL: through(t, env.Group.OwnerURL, bouncer)}}
					})
				}
				asTenant(t, env, db, a, b)
				env.Invariants(t)
			})
		}
	}
}

func asTenant(t *testing.T, env *pgtest.Env, db *postgres.DB, a, b tenant.Tenant) {
	ctx := t.Context()
	// A mark is found by whoever takes the run up again, and by no other run and tenant.
	mark := uuid.New()
	insert := postgres.Statement{SQL: addPipeline, Write: true, Mark: mark, Timeout: 5 * time.Second}
	for i, tn := range []tenant.Tenant{a, a, b, a} {
		done, err := db.AsTenant(ctx, tn, insert)
		require.NoError(t, err)
		require.Equal(t, postgres.StatementResult{Rows: 1, Before: i == 1 || i == 3}, done)
	}
	count := func(tn tenant.Tenant) (n string) {
		_, err := db.AsTenant(ctx, tn, postgres.Statement{SQL: `select count(*), min(name) from pipelines`, Row: func(row [][]byte) error {
			n = string(row[0])
			return nil
		}})
		require.NoError(t, err)
		return n
	}
	require.Equal(t, "1", count(a))
	require.Equal(t, "1", count(b))
	insert.Mark = uuid.New()
	_, err := db.AsTenant(ctx, a, insert)
	require.NoError(t, err)
	require.Equal(t, "2", count(a))

	// Of a rehearsal nothing stays, and no mark.
	insert.Mark, insert.Rehearse = uuid.New(), true
	for range 2 {
		done, err := db.AsTenant(ctx, a, insert)
		require.NoError(t, err)
		require.Equal(t, postgres.StatementResult{Rows: 1}, done)
	}
	require.Equal(t, "2", count(a))

	// Reading does not write, also where it does not begin so.
	for _, sql := range []string{addPipeline, `with gone as (delete from pipelines returning id) select count(*) from gone`, `explain analyze ` + addPipeline} {
		_, err := db.AsTenant(ctx, a, postgres.Statement{SQL: sql})
		requireState(t, err, "25006", sql)
	}
	// A statement cannot leave the role, and what leaves none of its traces leaves none here.
	for _, sql := range []string{
		``, ` ; `, `-- x`, `set role oneo_owner`, `reset role`, `select set_config('role', 'none', true)`, `begin`, `commit`,
		`create table x (id int)`, `update pg_settings set setting = 'none' where name = 'role'`, `copy pipelines to stdout`, `do $$ begin end $$`,
	} {
		_, err := db.AsTenant(ctx, a, postgres.Statement{SQL: sql, Write: true})
		require.Truef(t, fault.Is(err, fault.Invalid), "%q: %v", sql, err)
	}
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: `select 1; delete from pipelines`, Write: true})
	requireState(t, err, "42601", "two statements")
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: `select $1::int`})
	requireFault(t, err, fault.Invalid, "has_parameters")
	require.Equal(t, "2", count(a))
	if db.Isolation() == postgres.ByRole {
		for _, sql := range []string{`select count(*) from "1_2_3".pipelines`, `insert into public.marks (run, tenant) values (gen_random_uuid(), 1)`, `select * from public.marks`} {
			_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: sql, Write: true})
			requireState(t, err, "42501", sql)
		}
	}

	// Time and rows are bounded; what is read is read in full up to there, and not beyond.
	start := time.Now()
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: `select pg_sleep(20)`, Timeout: 100 * time.Millisecond})
	requireState(t, err, "57014", "a slow statement")
	require.Less(t, time.Since(start), 10*time.Second)
	for limit, want := range map[int]postgres.StatementResult{0: {Rows: 5}, 4: {Rows: 4, Cut: true}, 5: {Rows: 5}, 6: {Rows: 5}} {
		rows := 0
		done, err := db.AsTenant(ctx, a, postgres.Statement{SQL: `select generate_series(1, 5)`, Limit: limit, Row: func([][]byte) error { rows++; return nil }})
		require.NoError(t, err)
		require.Equal(t, want, done)
		require.EqualValues(t, want.Rows, rows)
	}
	start = time.Now()
	done, err := db.AsTenant(ctx, a, postgres.Statement{SQL: `select generate_series(1, 1000000000)`, Limit: 10, Timeout: 20 * time.Second})
	require.NoError(t, err, "the server is told to stop, or it would take minutes")
	require.Equal(t, postgres.StatementResult{Rows: 10, Cut: true}, done)
	require.Less(t, time.Since(start), 20*time.Second)

	// An error of the columns' or a row's reader ends it, and the connection serves on.
	no := fault.New(fault.Unfit, "no").WithCode("no")
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: addPipeline, Write: true, Columns: func([]postgres.Column) error { return no }})
	requireFault(t, err, fault.Unfit, "no")
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: addPipeline + ` returning key`, Write: true, Row: func([][]byte) error { return no }})
	requireFault(t, err, fault.Unfit, "no")
	require.Equal(t, "2", count(a))

	// Types that are not PostgreSQL's own are named.
	var columns []postgres.Column
	_, err = db.AsTenant(ctx, a, postgres.Statement{SQL: `select 1 as n, p as whole, now() as at from pipelines p limit 1`, Columns: func(cs []postgres.Column) error { columns = cs; return nil }})
	require.NoError(t, err)
	var types []string
	for _, c := range columns {
		types = append(types, c.Name+" "+c.Type)
	}
	require.Equal(t, []string{"n int4", "whole pipelines", "at timestamptz"}, types)

	_, err = env.Provision.Suspend(ctx, b.Slug, "test")
	require.NoError(t, err)
	_, err = db.AsTenant(ctx, b, postgres.Statement{SQL: `select 1`})
	requireFault(t, err, fault.Suspended, "tenant_suspended")
}

// The range of versions is what this binary's code needs; an operator's statement is none of its.
func TestAsTenantAtAnyVersion(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	for _, st := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		db, _, _ := env.Open(t, func(o *postgres.Options) { o.Serves, o.Statements = postgres.Range{Min: 70, Head: 80}, st })
		requireFault(t, try(t.Context(), db, a, postgres.Read, `select 1`), fault.Suspended, "tenant_upgrading")
		for range 2 {
			done, err := db.AsTenant(t.Context(), a, postgres.Statement{SQL: `select 1`})
			require.NoError(t, err)
			require.EqualValues(t, 1, done.Rows)
			_, err = db.AsTenant(t.Context(), a, postgres.Statement{SQL: `select nothing from users`})
			requireState(t, err, "42703", "what is wrong with a statement is told")
			require.False(t, fault.Is(err, fault.Suspended) || fault.Is(err, fault.Unavailable), "%v", err)
		}
		requireFault(t, try(t.Context(), db, a, postgres.Read, `select 1`), fault.Suspended, "tenant_upgrading")
	}
}

// What is deferred to the end of the transaction fails in a rehearsal as it would in the change, with the tenant's rights.
func TestRehearsalFindsWhatIsDeferred(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	admin(t, env, `alter table acme.pipelines add constraint once unique (name) deferrable initially deferred`)
	twice := postgres.Statement{SQL: `insert into pipelines (id, key, name) select gen_random_uuid(), 'k' || n, 'same' from generate_series(1, 2) n`, Write: true}
	for _, rehearse := range []bool{true, false} {
		twice.Rehearse = rehearse
		_, err := env.DB.AsTenant(t.Context(), a, twice)
		requireState(t, err, "23505", fmt.Sprint("rehearse ", rehearse))
	}
}

// A process that was taken for dead, and is not, makes the change beside the one that took its place: one of them does.
func TestMarkedChangeHappensOnceAtATime(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight = 12, 6 })
	a := env.Tenant(t, "acme")
	// No constraint of the table's own stands in the way of two of them.
	const add = `insert into pipelines (id, key, name) select gen_random_uuid(), 'k' || substr(md5(random()::text), 1, 12), 'x' where pg_sleep(0.05) is not null`
	s := postgres.Statement{SQL: add, Write: true, Mark: uuid.New()}
	var made, refused atomic.Int32
	var all sync.WaitGroup
	for range 6 {
		all.Go(func() {
			switch done, err := env.DB.AsTenant(t.Context(), a, s); {
			case err == nil && !done.Before:
				made.Add(1)
			case err == nil:
			case fault.Is(err, fault.Locked), fault.Is(err, fault.Conflict): // tried again by whoever runs it
				refused.Add(1)
			default:
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.EqualValues(t, 1, made.Load())
	require.EqualValues(t, 1, value[int](t, env.DB, a, postgres.Read, `select count(*)::int from pipelines`))
	t.Logf("%d were refused", refused.Load())
}

// Neither the app role nor a tenant's role writes marks.
func TestMarksAreTheLogins(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "acme")
	c := asLogin(t, env, "oneo_app_1")
	var app bool
	require.NoError(t, c.QueryRow(t.Context(), `select has_table_privilege('oneo_app', 'public.marks', 'insert')`).Scan(&app))
	require.False(t, app)
	_, err := c.Exec(t.Context(), `update public.marks set result = null`)
	requireState(t, err, "42501", "a mark is written once")
}

// A program is led to the tenant with its rights; its password stands in its environment and nowhere else.
func TestProgram(t *testing.T) {
	t.Parallel()
	for _, iso := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		env := pgtest.New(t, func(o *postgres.Options) {
			o.Isolation = iso
			g := o.Groups["main"]
			g.OwnerURL = strings.Replace(g.OwnerURL, "sslmode=disable", "sslmode=prefer&connect_timeout=7", 1)
			o.Groups = map[string]postgres.Group{"main": g}
		})
		a := env.Tenant(t, "1-2-3")
		inst, err := env.DB.Installation(t.Context(), postgres.MainGroup)
		require.NoError(t, err)
		role := inst.TenantRole(a.Number)
		if iso == postgres.BySchema {
			role = inst.AppRole
		}
		for _, c := range []struct {
			o                  postgres.ProgramOptions
			session, user, now string
		}{
			{postgres.ProgramOptions{Tenant: a}, inst.LoginOf(a.Number), role, "1_2_3"},
			{postgres.ProgramOptions{Tenant: a, Owner: true}, "oneo_owner", "oneo_owner", "1_2_3"},
			{postgres.ProgramOptions{}, "oneo_app", "oneo_app", "public"},
			{postgres.ProgramOptions{Owner: true}, "oneo_owner", "oneo_owner", "public"},
		} {
			p, err := env.DB.Program(t.Context(), c.o)
			require.NoError(t, err)
			password := ""
			if u, err := url.Parse(p.URL()); err == nil {
				password, _ = u.User.Password()
			}
			if strings.Contains(c.session, "oneo_app_") {
				require.Equal(t, postgres.LoginPassword(pgtest.Secret, c.session), password)
				for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
					require.NotContains(t, fmt.Sprintf(verb, p), password)
					require.NotContains(t, fmt.Sprintf(verb, &p), password)
				}
			}
			const where = `select session_user || ' ' || current_user || ' ' || current_schema()`
			want := c.session + " " + c.user + " " + c.now
			conn := pgtest.Admin(t, p.URL())
			var got string
			require.NoError(t, conn.QueryRow(t.Context(), where).Scan(&got))
			require.Equal(t, want, got, "pgx, by the URL")

			environ := p.Env([]string{"PATH=/usr/bin:/bin", "HOME=/nowhere", "PGSERVICE=elsewhere", "PGOPTIONS=-c role=none", "PGPASSFILE=/x", "ONEO_SERVER_SECRET=s3cret", "DATABASE_URL=x", "KEPT=1"})
			require.Contains(t, environ, "KEPT=1")
			require.Contains(t, environ, "PGSSLMODE=prefer")
			require.Contains(t, environ, "PGCONNECT_TIMEOUT=7")
			all := strings.Join(environ, "\n")
			require.NotContains(t, all, "s3cret")
			require.NotContains(t, all, "elsewhere")
			require.NotContains(t, all, "PGPASSFILE")
			for _, args := range [][]string{{"-Atc", where}, {"-d", p.URL(), "-Atc", where}} {
				cmd := exec.Command("psql", args...)
				cmd.Env = environ
				out, err := cmd.CombinedOutput()
				require.NoError(t, err, string(out))
				require.Equal(t, want, strings.TrimSpace(string(out)), "psql")
			}
		}
		// A connection given as names and values leads to the same place.
		cfg, err := pgx.ParseConfig(env.Group.OwnerURL)
		require.NoError(t, err)
		db, _, _ := env.Open(t, func(o *postgres.Options) {
			o.Groups = map[string]postgres.Group{"main": {URL: env.Group.URL, DirectURL: fmt.Sprintf(`host = %s port=%d user=oneo_owner dbname='%s' sslmode = prefer application_name='it\'s'`, cfg.Host, cfg.Port, cfg.Database)}}
		})
		p, err := db.Program(t.Context(), postgres.ProgramOptions{Tenant: a})
		require.NoError(t, err)
		require.Contains(t, p.URL(), "sslmode=prefer")
		require.Contains(t, p.Env(nil), "PGSSLMODE=prefer")
		_, err = env.Provision.Drop(t.Context(), a.Slug, 0, "test")
		require.NoError(t, err)
		_, err = db.Program(t.Context(), postgres.ProgramOptions{Tenant: a})
		requireFault(t, err, fault.Gone, "tenant_gone")
	}
}

// An operator's statement on the shared schema has the app role's rights, reads unless it is told otherwise, and leaves
// nothing on the connection.
func TestAsShared(t *testing.T) {
	t.Parallel()
	for _, statements := range []postgres.Statements{postgres.Prepared, postgres.Unprepared} {
		t.Run(string(statements), func(t *testing.T) {
			t.Parallel()
			env := pgtest.New(t, func(o *postgres.Options) { o.SharedConns, o.Statements = 1, statements })
			env.Tenant(t, "acme")
			ctx := t.Context()
			read := func(sql string) (values []string) {
				_, err := env.DB.AsShared(ctx, postgres.Statement{SQL: sql, Row: func(row [][]byte) error {
					values = append(values, string(row[0]))
					return nil
				}})
				require.NoError(t, err)
				return values
			}
			const change = `update tenants set settings = '{"a": 1}'`
			require.Equal(t, []string{"oneo_app"}, read(`select current_user`))
			_, err := env.DB.AsShared(ctx, postgres.Statement{SQL: change})
			requireState(t, err, "25006", "reading")
			_, err = env.DB.AsShared(ctx, postgres.Statement{SQL: `delete from tenants`, Write: true})
			requireState(t, err, "42501", "no right of the app role's")
			for _, sql := range []string{`set role oneo_owner`, `commit`, `select set_config('role', 'x', false)`, ``} {
				_, err = env.DB.AsShared(ctx, postgres.Statement{SQL: sql, Write: true})
				require.Truef(t, fault.Is(err, fault.Invalid), "%q: %v", sql, err)
			}
			done, err := env.DB.AsShared(ctx, postgres.Statement{SQL: change, Write: true, Rehearse: true})
			require.NoError(t, err)
			require.Equal(t, int64(1), done.Rows)
			require.Equal(t, []string{"0"}, read(`select count(*) from tenants where settings ? 'a'`))
			_, err = env.DB.AsShared(ctx, postgres.Statement{SQL: change, Write: true, Mark: uuid.New()})
			require.NoError(t, err)
			require.Equal(t, []string{"1"}, read(`select count(*) from tenants where settings ? 'a'`))
			_, err = env.DB.AsShared(ctx, postgres.Statement{SQL: `select pg_sleep(60)`, Timeout: 100 * time.Millisecond})
			requireState(t, err, "57014", "a slow statement")
			done, err = env.DB.AsShared(ctx, postgres.Statement{SQL: `select generate_series(1, 9)`, Limit: 4})
			require.NoError(t, err)
			require.Equal(t, postgres.StatementResult{Rows: 4, Cut: true}, done)
			require.NoError(t, env.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
				var path, zone string
				err := tx.QueryRow(ctx, `select current_setting('search_path'), current_setting('timezone')`).Scan(&path, &zone)
				require.Empty(t, strings.Trim(path, `"`))
				return err
			}))
		})
	}
}
