package inspect_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/inspect"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func ask[T any](t *testing.T, db *postgres.DB, fn func(ctx context.Context, tx *postgres.OwnerTx) (T, error)) (v T) {
	t.Helper()
	require.NoError(t, db.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		v, err = fn(t.Context(), tx)
		return err
	}))
	return v
}

func exec(t *testing.T, c *pgx.Conn, sql string) {
	t.Helper()
	_, err := c.PgConn().Exec(t.Context(), sql).ReadAll()
	require.NoError(t, err)
}

func numbers[T any](rows []T, of func(T) int32) (all []int32) {
	for _, r := range rows {
		all = append(all, of(r))
	}
	return all
}

// What takes room, what is dead, what is old and which index nobody uses is told of the tenant whose it is, and of those that are asked for only.
func TestWhatTenantsTake(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	small, large := env.Tenant(t, "small"), env.Tenant(t, "large")
	admin := pgtest.Admin(t, env.AdminURL)
	exec(t, admin, `create table large.fat (id int primary key, at int, body text); create index fat_at on large.fat (at); create index fat_at_again on large.fat (at);
create table small.fat (id int primary key, at int); create index fat_at on small.fat (at);
insert into large.fat select n, n, repeat('x', 500) from generate_series(1, 2000) n; analyze large.fat;
delete from large.fat where id <= 500`)
	sizes := func(of []int32) []inspect.Size {
		return ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Size, error) {
			return inspect.Sizes(ctx, tx, of)
		})
	}
	all := sizes(nil)
	require.Equal(t, []int32{large.Number, small.Number}, numbers(all, func(s inspect.Size) int32 { return s.Tenant }), "the largest first")
	require.Greater(t, all[0].Bytes, all[1].Bytes+1<<20)
	require.Equal(t, all[0].Bytes, all[0].Heap+all[0].Indexes)
	require.Equal(t, all[1].Tables, all[0].Tables)
	require.GreaterOrEqual(t, all[0].Rows, int64(2000))
	require.Zero(t, all[0].Locked)
	require.Equal(t, all[1:], sizes([]int32{small.Number}))

	// A table that somebody holds for himself is not waited for.
	holder := pgtest.Admin(t, env.AdminURL)
	exec(t, holder, `begin; lock table large.fat in access exclusive mode`)
	held := sizes([]int32{large.Number})
	require.Equal(t, int64(1), held[0].Locked)
	require.Equal(t, all[0].Tables, held[0].Tables)
	require.Less(t, held[0].Bytes, all[0].Bytes-1<<20)
	exec(t, holder, `rollback`)

	// Sessions report what they did at the end, or when they are told to.
	exec(t, admin, `select pg_stat_force_next_flush()`)
	bloat := ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Bloat, error) {
		return inspect.Bloats(ctx, tx, nil)
	})
	require.Equal(t, large.Number, bloat[0].Tenant)
	require.Equal(t, int64(500), bloat[0].Dead)
	require.Equal(t, "fat", bloat[0].Worst)
	require.InDelta(t, 2000/4*560, float64(bloat[0].Bytes), 100_000)
	require.Equal(t, inspect.Bloat{Tenant: small.Number, Live: bloat[1].Live}, bloat[1])

	vacuum := ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Vacuum, error) {
		return inspect.Vacuums(ctx, tx, []int32{large.Number})
	})
	require.Len(t, vacuum, 1)
	require.Equal(t, all[0].Tables, vacuum[0].Tables)
	require.Equal(t, all[0].Tables-1, vacuum[0].Never, "only fat was analyzed")
	require.Equal(t, int64(1), vacuum[0].Due)
	require.GreaterOrEqual(t, vacuum[0].Modified, int64(500))
	require.Positive(t, vacuum[0].Age)
	require.Zero(t, vacuum[0].Percent)

	indexes := func(of []int32) map[string]inspect.Index {
		m := map[string]inspect.Index{}
		for _, i := range ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Index, error) {
			return inspect.Indexes(ctx, tx, of)
		}) {
			m[i.Index] = i
		}
		return m
	}
	exec(t, admin, `set enable_seqscan = off; select count(*) from large.fat where at = 700; update pg_index set indisvalid = false where indexrelid = 'small.fat_at'::regclass; select pg_stat_force_next_flush()`)
	found := indexes(nil)
	require.Equal(t, int64(2), found["fat_at"].Tenants)
	require.Equal(t, int64(1), found["fat_at"].Invalid)
	require.Equal(t, int64(1), found["fat_at_again"].Doubled)
	require.Equal(t, int64(1), found["fat_at"].Scans+found["fat_at_again"].Scans, "PostgreSQL takes either")
	require.Equal(t, "plain", found["fat_at"].Kind)
	require.Equal(t, "primary", found["fat_pkey"].Kind)
	require.Equal(t, int64(2), found["users_pkey"].Tenants)
	require.Equal(t, int64(2), found["users_pkey"].Unused)
	require.Zero(t, found["fat_pkey"].Doubled)
	found = indexes([]int32{large.Number})
	require.Zero(t, found["fat_at"].Invalid)
	require.Equal(t, int64(1), found["fat_at"].Tenants)
}

// Who stands in whose way is told, with the tenant, at a table as at oneo's own locks; and what he runs only to who asks for it.
func TestWhoWaitsForWhom(t *testing.T) {
	env := pgtest.New(t)
	env.Blind(t)
	a, b := env.Tenant(t, "a"), env.Tenant(t, "b")
	exec(t, pgtest.Admin(t, env.AdminURL), `create table a.t (id int); create table b.t (id int)`)
	holder, waiter, gate := pgtest.Admin(t, env.AdminURL), pgtest.Admin(t, env.AdminURL), pgtest.Admin(t, env.AdminURL)
	exec(t, holder, `set application_name = 'holder'; begin; lock table a.t in exclusive mode; select 'secret'`)
	exec(t, gate, fmt.Sprintf(`begin; select pg_advisory_xact_lock(%d, %d); select pg_advisory_xact_lock(%d, %d)`, postgres.GateLock, b.Number, postgres.OperationLock, b.Number))
	waiting := make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		_, err := waiter.Exec(ctx, `insert into a.t values (1)`)
		waiting <- err
	}()
	defer func() { cancel(); <-waiting }()
	locks := func(of []int32, every bool) []inspect.Lock {
		return ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Lock, error) {
			return inspect.Locks(ctx, tx, of, every)
		})
	}
	require.Eventually(t, func() bool { return len(locks([]int32{a.Number}, false)) == 2 }, pgtest.Patience, 10*time.Millisecond)
	at := locks(nil, false)
	require.Len(t, at, 4)
	require.False(t, at[0].Granted)
	require.Equal(t, []any{a.Number, int32(waiter.PgConn().PID()), "t", "RowExclusiveLock"}, []any{at[0].Tenant, at[0].PID, at[0].On, at[0].Mode})
	require.Equal(t, []any{a.Number, int32(holder.PgConn().PID()), "t", "ExclusiveLock", true, "holder"}, []any{at[1].Tenant, at[1].PID, at[1].On, at[1].Mode, at[1].Granted, at[1].Application}, "the oldest transaction first")
	require.ElementsMatch(t, []string{"gate", "operation"}, []string{at[2].On, at[3].On})
	require.Equal(t, []int32{b.Number, b.Number}, []int32{at[2].Tenant, at[3].Tenant})

	waits := func(of []int32, text bool) []inspect.Wait {
		return ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Wait, error) {
			return inspect.Waits(ctx, tx, of, text)
		})
	}
	w := waits(nil, false)
	require.Len(t, w, 1)
	require.Equal(t, []any{a.Number, int32(waiter.PgConn().PID()), "t", "RowExclusiveLock", int32(holder.PgConn().PID()), ""}, []any{w[0].Tenant, w[0].PID, w[0].On, w[0].Mode, w[0].By, w[0].Text})
	require.Empty(t, waits([]int32{b.Number}, false))
	// The owner may not see it; a superuser's answer would have it.
	require.Equal(t, "<insufficient privilege>", waits(nil, true)[0].Text)
	exec(t, pgtest.Admin(t, env.AdminURL), `grant pg_read_all_stats to oneo_owner`)
	require.Contains(t, waits(nil, true)[0].Text, "secret")
	require.Empty(t, waits(nil, false)[0].Text)

	// A request that reads and writes is no news.
	require.NoError(t, env.DB.InTenant(t.Context(), a, postgres.Read, func(tx *postgres.Tx) error {
		require.Len(t, locks([]int32{a.Number}, false), 2)
		require.Greater(t, len(locks([]int32{a.Number}, true)), 2)
		return nil
	}))
	pool := ask(t, env.DB, func(ctx context.Context, tx *postgres.OwnerTx) ([]inspect.Sessions, error) {
		return inspect.Pool(ctx, tx)
	})
	found := map[string]inspect.Sessions{}
	for _, s := range pool {
		found[s.User+" "+s.Application] = s
	}
	require.Equal(t, int64(1), found["postgres holder"].InIdle)
	require.GreaterOrEqual(t, found["postgres "].Waiting, int64(1))
	require.Equal(t, int64(1), found["oneo_owner oneo"].Active, "the one that asks")
	require.Equal(t, int64(200), found["oneo_owner oneo"].Limit)
}

// Statements are told apart by the tenants' roles, without literals; where there is nothing that counts them, the answer says what to do.
func TestStatements(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	env.Tenant(t, "a") // without any the extension is not asked
	err := env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, _, err := inspect.Statements(t.Context(), tx, nil, true, 10)
		return err
	})
	require.Equal(t, "no_statements", fault.Of(err).StableCode())
	exec(t, pgtest.Admin(t, env.AdminURL), `create extension pg_stat_statements`)
	err = env.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		_, _, err := inspect.Statements(t.Context(), tx, nil, true, 10)
		return err
	})
	require.Equal(t, "no_statements", fault.Of(err).StableCode())
	require.Contains(t, fault.Of(err).Message, "did not load")

	for _, by := range []postgres.Isolation{postgres.ByRole, postgres.BySchema} {
		t.Run(fmt.Sprint(by), func(t *testing.T) {
			t.Parallel()
			db, create := counting(t, by)
			ctx := t.Context()
			a, b := create("a"), create("b")
			for n, tn := range []tenant.Tenant{a, b, b} {
				require.NoError(t, db.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
					_, err := tx.Exec(ctx, `insert into pipelines (id, key, name) values (gen_random_uuid(), 'k`+fmt.Sprint(n)+`', 'secret')`)
					return err
				}))
			}
			read := func(of []int32, limit int) (all []inspect.Statement, split inspect.Split) {
				require.NoError(t, db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
					all, split, err = inspect.Statements(ctx, tx, of, by == postgres.ByRole, limit)
					return err
				}))
				return all, split
			}
			calls := func(all []inspect.Statement) map[int32]int64 {
				m := map[int32]int64{}
				for _, s := range all {
					if len(s.Text) > 21 && s.Text[:21] == "insert into pipelines" {
						m[s.Tenant] += s.Calls
						require.NotContains(t, s.Text, "secret")
					}
				}
				return m
			}
			all, split := read(nil, 0)
			if by == postgres.BySchema {
				require.Equal(t, inspect.SplitUnnamed, split)
				require.Equal(t, map[int32]int64{0: 3}, calls(all))
				all, _ = read([]int32{a.Number}, 0)
				require.Empty(t, all)
				return
			}
			require.Equal(t, inspect.SplitByRole, split)
			require.Equal(t, map[int32]int64{a.Number: 1, b.Number: 2}, calls(all))
			all, _ = read([]int32{b.Number}, 0)
			require.Equal(t, map[int32]int64{b.Number: 2}, calls(all))
			all, _ = read(nil, 1)
			require.Len(t, all, 1)
		})
	}
}

// counting makes an installation on a server of its own that counts statements, and shows them to the owner.
func counting(t *testing.T, by postgres.Isolation) (*postgres.DB, func(slug string) tenant.Tenant) {
	t.Helper()
	ctx := t.Context()
	dir, err := os.MkdirTemp("", "pgtest-own-")
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	pg, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true,
		Settings: map[string]string{"shared_preload_libraries": "pg_stat_statements"}})
	require.NoError(t, err)
	t.Cleanup(func() { _ = pg.Stop(context.WithoutCancel(ctx)) })
	as := func(role string) string {
		u, err := url.Parse(pg.URL("oneo"))
		require.NoError(t, err)
		u.User = url.User(role)
		return u.String()
	}
	g := postgres.Group{URL: as("oneo_app"), OwnerURL: as("oneo_owner")}
	_, err = postgres.Setup(ctx, postgres.SetupOptions{AdminURL: pg.URL("postgres"), Group: g, AppRole: "oneo_app", OwnerRole: "oneo_owner", Secret: pgtest.Secret, Logins: 2})
	require.NoError(t, err)
	exec(t, pgtest.Admin(t, pg.URL("oneo")), `create extension pg_stat_statements`)
	o := postgres.DefaultOptions()
	o.Groups, o.Secret, o.Isolation = map[string]postgres.Group{postgres.MainGroup: g}, pgtest.Secret, by
	pgtest.Patient(&o)
	db, err := postgres.Open(o)
	require.NoError(t, err)
	t.Cleanup(db.Close)
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	require.NoError(t, err)
	_, err = m.Shared(ctx)
	require.NoError(t, err)
	base, err := tenant.ParseHost("localhost")
	require.NoError(t, err)
	p, err := provision.New(provision.Options{DB: db, Migrate: m, BaseDomain: base, Logger: slog.New(slog.DiscardHandler)})
	require.NoError(t, err)
	return db, func(slug string) tenant.Tenant {
		tn, err := p.Create(ctx, provision.CreateRequest{Slug: pgtest.Slug(t, slug), Actor: "test"})
		require.NoError(t, err)
		return tn
	}
}
