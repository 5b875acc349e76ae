package postgres_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// A session keeps what it sets and locks until it ends, and nothing outlives it.
func TestOwnerSession(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	a := env.Tenant(t, "acme")
	stop := errors.New("stop")
	err := env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error {
		_, err := s.Exec(ctx, `select from users`)
		require.Equal(t, "42P01", postgres.SQLState(err), "an unbound session finds no tables")
		require.NoError(t, s.LockOperation(ctx, a.Number, time.Second))
		namespace, err := s.BindPlaced(ctx, a.Number)
		require.NoError(t, err)
		require.NotZero(t, namespace)
		require.NoError(t, s.Tx(ctx, func() error { return s.Script(ctx, `create table here (id int)`) }))
		require.ErrorIs(t, s.Tx(ctx, func() error { require.NoError(t, s.Script(ctx, `create table not_here (id int)`)); return stop }), stop)
		swallowed := s.Tx(ctx, func() error { _ = s.Script(ctx, `select nonsense`); return nil })
		requireFault(t, swallowed, fault.Internal, "rolled_back")
		var there, lock string
		require.NoError(t, s.QueryRow(ctx, `select concat_ws(' ', to_regclass('here'), to_regclass('not_here')), current_setting('lock_timeout')`).Scan(&there, &lock))
		require.Equal(t, []string{"here", "1s"}, []string{there, lock})
		require.NoError(t, s.Timeouts(ctx, 0, 50*time.Millisecond))
		require.Equal(t, "57014", postgres.SQLState(s.Script(ctx, `select pg_sleep(600)`)))
		require.NoError(t, s.Timeouts(ctx, 0, pgtest.Patience))
		err = env.DB.OwnerSession(ctx, "main", func(other *postgres.Session) error {
			return other.LockOperation(ctx, a.Number, 50*time.Millisecond)
		})
		requireFault(t, err, fault.Locked, "operation_running")
		_, err = s.BindPlaced(ctx, a.Number+1)
		requireFault(t, err, fault.NotFound, "schema_missing")
		return stop
	})
	require.ErrorIs(t, err, stop)
	require.NoError(t, env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error { return s.LockOperation(ctx, a.Number, 5*time.Second) }))
	env.Invariants(t)
}

// What a session sets would be the next client's, behind a pooler: it is refused before anything is set.
func TestOwnerSessionRefusesAPooler(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	bouncer := env.PgBouncer(t, 1)
	db, _, _ := env.Open(t, func(o *postgres.Options) {
		o.Groups = map[string]postgres.Group{"main": {URL: env.Group.URL, OwnerURL: env.Group.OwnerURL, DirectURL: through(t, env.Group.OwnerURL, bouncer)}}
	})
	err := db.OwnerSession(t.Context(), "main", func(*postgres.Session) error { t.Error("it was let through"); return nil })
	requireFault(t, err, fault.Invalid, "direct_url_pooled")
}

// Whoever gets a connection that was used before finds it as a new one: whatever somebody has set, locked or made on it
// is gone when his function has returned, not only when the next one comes.
func TestReadingSessionIsCleared(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	a := env.Tenant(t, "acme")
	admin := pgtest.Admin(t, env.AdminURL)
	_, err := admin.Exec(ctx, `do $$ begin execute format('grant temporary on database %I to oneo_owner', current_database()); end $$`)
	require.NoError(t, err)
	var role string
	require.NoError(t, admin.QueryRow(ctx, `select role from public.placements where number = $1`, a.Number).Scan(&role))
	_, err = admin.Exec(ctx, `create sequence public.asked; grant usage on sequence public.asked to oneo_owner; grant `+role+` to oneo_owner`)
	require.NoError(t, err)
	// What a session is: what it has set, who works, what it holds and what it has made.
	const state = `select ((select jsonb_object_agg(name, setting) from pg_settings where source = 'session' and name <> 'plan_cache_mode') || jsonb_build_object('role', current_user, 'session', session_user,
	'locks', (select count(*) from pg_locks where pid = pg_backend_pid() and locktype = 'advisory'), 'cursors', (select count(*) from pg_cursors),
	'listens', (select count(*) from pg_listening_channels()), 'temporary', pg_my_temp_schema() <> 0 and exists (select from pg_class where relnamespace = pg_my_temp_schema())))::text`
	look := func(s *postgres.Session) (found string) {
		require.NoError(t, s.QueryRow(ctx, state).Scan(&found))
		return found
	}
	pid := func(s *postgres.Session) (found int) {
		require.NoError(t, s.QueryRow(ctx, `select pg_backend_pid()`).Scan(&found))
		return found
	}
	var fresh string
	var first int
	require.NoError(t, env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error { fresh = look(s); return nil }))
	require.NoError(t, env.DB.ReadingSession(ctx, "main", func(s *postgres.Session) error {
		first = pid(s)
		require.JSONEq(t, fresh, look(s))
		require.NoError(t, s.LockOperation(ctx, a.Number, time.Second))
		require.NoError(t, s.LockReading(ctx, a.Number, time.Second), "twice, so that one unlocking would not do")
		_, err := s.BindPlaced(ctx, a.Number)
		require.NoError(t, err)
		require.NoError(t, s.Timeouts(ctx, 0, time.Hour))
		require.NoError(t, s.Script(ctx, `set timezone to 'Asia/Tokyo'; set datestyle to 'German'; set extra_float_digits to 0; listen something`))
		require.NoError(t, s.Script(ctx, `create temp table users (id int); select nextval('public.asked')`))
		require.NoError(t, s.Tx(ctx, func() error { return s.Script(ctx, `declare c cursor with hold for select 1`) }))
		require.NoError(t, s.Script(ctx, `set role `+postgres.Quote(role)))
		require.NotEqual(t, fresh, look(s))
		return nil
	}))
	_, err = admin.Exec(ctx, `revoke `+role+` from oneo_owner`)
	require.NoError(t, err)
	var locks int
	require.NoError(t, admin.QueryRow(ctx, `select count(*) from pg_locks where pid = $1 and locktype in ('advisory', 'relation')`, first).Scan(&locks))
	require.Zero(t, locks)
	require.NoError(t, env.DB.OwnerSession(ctx, "main", func(s *postgres.Session) error { return s.LockOperation(ctx, a.Number, 0) }))
	require.NoError(t, env.DB.ReadingSession(ctx, "main", func(s *postgres.Session) error {
		require.Equal(t, first, pid(s))
		require.JSONEq(t, fresh, look(s))
		_, err := s.Exec(ctx, `select from users`)
		require.Equal(t, "42P01", postgres.SQLState(err))
		_, err = s.Exec(ctx, `select lastval()`)
		require.Equal(t, "55000", postgres.SQLState(err))
		return nil
	}))
	// Two at one time are two.
	require.NoError(t, env.DB.ReadingSession(ctx, "main", func(s *postgres.Session) error {
		return env.DB.ReadingSession(ctx, "main", func(other *postgres.Session) error {
			require.NotEqual(t, pid(s), pid(other))
			return nil
		})
	}))
	env.Invariants(t)
}

// A connection on which anything went wrong is closed, and with it goes what it held. So is one that has seen many tenants.
func TestReadingSessionIsClosed(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	a := env.Tenant(t, "acme")
	admin := pgtest.Admin(t, env.AdminURL)
	stop := errors.New("stop")
	// use is how a session is used: as what ends it, with a context of its own.
	use := func(fn func(ctx context.Context, cancel func(), s *postgres.Session) error) (pid uint32, err error) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		err = env.DB.ReadingSession(ctx, "main", func(s *postgres.Session) error {
			require.NoError(t, s.QueryRow(ctx, `select pg_backend_pid()`).Scan(&pid))
			require.NoError(t, s.LockOperation(ctx, a.Number, pgtest.Patience), "somebody has left a lock")
			return fn(ctx, cancel, s)
		})
		return pid, err
	}
	well := func(context.Context, func(), *postgres.Session) error { return nil }
	last, err := use(well)
	require.NoError(t, err)
	for name, fn := range map[string]func(context.Context, func(), *postgres.Session) error{
		"an error":  func(context.Context, func(), *postgres.Session) error { return stop },
		"a panic":   func(context.Context, func(), *postgres.Session) error { panic(stop) },
		"cancelled": func(_ context.Context, cancel func(), _ *postgres.Session) error { cancel(); return nil },
		"open":      func(ctx context.Context, _ func(), s *postgres.Session) error { return s.Script(ctx, "begin") },
		"failed, open": func(ctx context.Context, _ func(), s *postgres.Session) error {
			_ = s.Script(ctx, "begin; select nonsense")
			return nil
		},
		"rows": func(ctx context.Context, _ func(), s *postgres.Session) error {
			_, err := s.Query(ctx, "select generate_series(1, 1000000)")
			return err
		},
		"a broken COPY": func(ctx context.Context, _ func(), s *postgres.Session) error {
			_, err := s.CopyTo(ctx, failingWriter{stop}, "copy (select generate_series(1, 1000000)) to stdout")
			require.ErrorIs(t, err, stop)
			return nil
		},
		"its server": func(ctx context.Context, _ func(), s *postgres.Session) error {
			return s.Script(ctx, "select pg_terminate_backend(pg_backend_pid())")
		},
	} {
		var pid uint32
		func() {
			defer func() { require.True(t, name == "a panic" == (recover() != nil)) }()
			_, _ = use(func(ctx context.Context, cancel func(), s *postgres.Session) error {
				require.NoError(t, s.QueryRow(ctx, `select pg_backend_pid()`).Scan(&pid))
				return fn(ctx, cancel, s)
			})
		}()
		require.Equal(t, last, pid, "%s: the one before was used well", name)
		last, err = use(well)
		require.NoError(t, err, name)
		require.NotEqual(t, pid, last, name)
		require.Eventually(t, func() (gone bool) {
			require.NoError(t, admin.QueryRow(t.Context(), `select not exists (select from pg_stat_activity where pid = $1)`, int64(pid)).Scan(&gone))
			return gone
		}, pgtest.Patience, 10*time.Millisecond, name)
	}
	// A server that has ended the session while nobody used it is no failure of whoever comes next.
	_, err = admin.Exec(t.Context(), `select pg_terminate_backend($1, 60000)`, int64(last))
	require.NoError(t, err)
	last, err = use(well)
	require.NoError(t, err)
	pids := map[uint32]bool{last: true}
	for range 99 {
		pid, err := use(well)
		require.NoError(t, err)
		pids[pid] = true
	}
	require.Len(t, pids, 1)
	pid, err := use(well)
	require.NoError(t, err)
	require.NotContains(t, pids, pid, "its backend remembers a hundred tenants")
	env.Invariants(t)
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// What is kept is prepared once, and means the same whoever uses it next.
func TestReadingSessionKeeps(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	ctx := t.Context()
	for _, schema := range []string{"pg_catalog", "public", "ext"} {
		require.NoError(t, env.DB.ReadingSession(ctx, "main", func(s *postgres.Session) error {
			require.NoError(t, s.Script(ctx, "set search_path to ext"))
			var found string
			require.NoError(t, s.Kept().QueryRow(ctx, `select nspname from pg_catalog.pg_namespace where nspname = $1`, schema).Scan(&found))
			require.Equal(t, schema, found)
			rows, err := s.Kept().Query(ctx, `select 1`)
			require.NoError(t, err)
			rows.Close()
			var kept int
			require.NoError(t, s.QueryRow(ctx, `select count(*) from pg_prepared_statements`).Scan(&kept))
			require.Equal(t, 2, kept)
			return nil
		}))
	}
}
