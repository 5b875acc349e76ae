package pgtest

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// IsolationOptions says how hard Isolation tries.
type IsolationOptions struct {
	DB       *postgres.DB    // what is tried; nil: the installation opened anew with three connections
	Tenants  []tenant.Tenant // at least two; none: three new ones
	Workers  int             // goroutines; 0: 12
	Requests int             // of each goroutine; 0: 150
	Seed     uint64          // of what each goroutine does; 0: from the clock. It is printed when the test fails.
	// NoCancels leaves out callers that go away in the middle of a statement. The distribution's PgBouncer 1.18 dies of
	// a cancel request whose sender hangs up ("bad client state: 0", pgbouncer/pgbouncer#801).
	NoCancels bool
}

// Isolation tries to make one tenant see another's rows: every row carries its tenant's canary, many goroutines share
// few connections and mix Single, Read and Write with panics, cancelled contexts, failing statements and rows that
// nobody closes. It fails the test when a foreign row is seen or written, when an acknowledged write is missing, when
// a connection is left with anything on it, or when the invariants do not hold afterwards.
func Isolation(t testing.TB, env *Env, o IsolationOptions) {
	t.Helper()
	ctx := context.Background()
	if o.DB == nil {
		o.DB, _, _ = env.Open(t, func(po *postgres.Options) { po.MaxConns = 3; po.InFlight = 3; po.AcquireTimeout = Patience })
	}
	for i := len(o.Tenants); i < 3 && len(o.Tenants) != 2; i++ {
		o.Tenants = append(o.Tenants, env.Tenant(t, fmt.Sprintf("canary-%d", i)))
	}
	if len(o.Tenants) < 2 {
		t.Fatal("pgtest: isolation needs two tenants")
	}
	if o.Workers == 0 {
		o.Workers = 12
	}
	if o.Requests == 0 {
		o.Requests = 150
	}
	if o.Seed == 0 {
		o.Seed = uint64(time.Now().UnixNano())
	}
	s := &isolation{o: o, seen: map[int32]int{}, stored: map[int32]map[string]bool{}}
	for _, tn := range o.Tenants {
		s.stored[tn.Number] = map[string]bool{}
		s.seedRows(t, ctx, tn)
	}
	var wg sync.WaitGroup
	for w := range o.Workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(o.Seed, uint64(w)))
			for i := range o.Requests {
				s.request(ctx, r, fmt.Sprintf("%d-%d", w, i))
			}
		})
	}
	wg.Wait()
	for _, tn := range o.Tenants {
		s.check(ctx, tn)
	}
	s.atRest(t, ctx, env)
	if len(s.wrong) > 0 {
		t.Errorf("isolation broken (seed %d):\n%s", o.Seed, join(s.wrong))
	}
	env.Invariants(t)
}

type isolation struct {
	o IsolationOptions

	mu     sync.Mutex
	wrong  []string
	seen   map[int32]int
	stored map[int32]map[string]bool // acknowledged writes
}

const canaryKeys = 5

func canary(t tenant.Tenant) string { return "canary of " + t.Slug.String() }

func (s *isolation) seedRows(t testing.TB, ctx context.Context, tn tenant.Tenant) {
	t.Helper()
	err := s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
		for k := range canaryKeys {
			if err := insertCanary(ctx, tx, tn, fmt.Sprintf("seed-%d", k)); err != nil {
				return err
			}
			s.stored[tn.Number][fmt.Sprintf("seed-%d", k)] = true
		}
		return nil
	})
	if err != nil {
		t.Fatalf("pgtest: plant canaries in %s: %v", tn.Slug, err)
	}
}

func insertCanary(ctx context.Context, tx *postgres.Tx, tn tenant.Tenant, key string) error {
	const insert = `insert into pipelines (id, key, name, description) values (gen_random_uuid(), $1, $2, current_schema())`
	_, err := tx.Exec(ctx, insert, "k"+fmt.Sprintf("%x", key), canary(tn))
	return err
}

func (s *isolation) fail(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.wrong) < 20 {
		s.wrong = append(s.wrong, fmt.Sprintf(format, args...))
	}
}

var errDeliberate = errors.New("deliberate")

// request does one thing for one tenant, well or badly.
func (s *isolation) request(ctx context.Context, r *rand.Rand, key string) {
	tn := s.o.Tenants[r.IntN(len(s.o.Tenants))]
	switch r.IntN(12) {
	case 0, 1, 2:
		s.ok(s.o.DB.InTenant(ctx, tn, postgres.Single, func(tx *postgres.Tx) error { return s.look(ctx, tx, tn) }))
	case 3:
		s.ok(s.o.DB.InTenant(ctx, tn, postgres.Read, func(tx *postgres.Tx) error {
			return errors.Join(s.look(ctx, tx, tn), s.where(ctx, tx, tn), s.look(ctx, tx, tn))
		}))
	case 4, 5:
		err := s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
			return errors.Join(s.look(ctx, tx, tn), insertCanary(ctx, tx, tn, key))
		})
		if err == nil {
			s.mu.Lock()
			s.stored[tn.Number][key] = true
			s.mu.Unlock()
		}
		s.ok(err)
	case 6: // a panic between two statements
		func() {
			defer func() {
				if recover() == nil {
					s.fail("a panic in a transaction was swallowed")
				}
			}()
			_ = s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
				_ = insertCanary(ctx, tx, tn, "panic-"+key)
				panic("deliberate")
			})
		}()
	case 7: // a caller that goes away
		if s.o.NoCancels {
			return
		}
		cctx, cancel := context.WithCancel(ctx)
		_ = s.o.DB.InTenant(cctx, tn, postgres.Access(r.IntN(3)), func(tx *postgres.Tx) error {
			time.AfterFunc(time.Duration(r.IntN(3000))*time.Microsecond, cancel)
			_, err := tx.Exec(cctx, `select pg_sleep(0.01)`)
			return err
		})
		cancel()
	case 8: // a statement that fails, and whose failure is ignored
		err := s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
			_ = insertCanary(ctx, tx, tn, "failed-"+key)
			_, _ = tx.Exec(ctx, `select 1 / (select count(*) from pipelines where false)`)
			return nil
		})
		if err == nil {
			s.fail("a failed transaction of %s was reported as committed", tn.Slug)
		}
	case 9: // rows that nobody closes
		_ = s.o.DB.InTenant(ctx, tn, postgres.Access(r.IntN(3)), func(tx *postgres.Tx) error {
			rows, err := tx.Query(ctx, `select n from generate_series(1, 1000) n`)
			if err == nil {
				rows.Next()
			}
			return err
		})
	case 10: // a change of mind
		err := s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
			return errors.Join(insertCanary(ctx, tx, tn, "undone-"+key), errDeliberate)
		})
		if !errors.Is(err, errDeliberate) {
			s.fail("an error of fn came back as %v", err)
		}
	default: // what a handler must not run
		err := s.o.DB.InTenant(ctx, tn, postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(ctx, `set search_path to public`)
			return err
		})
		if err == nil {
			s.fail("SET was accepted in a bound transaction")
		}
	}
}

// ok notes an error that a well-behaved request must not get.
func (s *isolation) ok(err error) {
	if err != nil && !fault.Is(err, fault.Busy) {
		s.fail("a request failed: %v", err)
	}
}

// look reads every row of the tenant and compares its canary.
func (s *isolation) look(ctx context.Context, tx *postgres.Tx, tn tenant.Tenant) error {
	rows, err := tx.Query(ctx, `select name, description from pipelines`)
	if err != nil {
		return err
	}
	var name, schema string
	n := 0
	_, err = pgx.ForEachRow(rows, []any{&name, &schema}, func() error {
		n++
		if name != canary(tn) || schema != tn.Schema.String() {
			s.fail("bound to %s, saw a row %q written in schema %q", tn.Slug, name, schema)
		}
		return nil
	})
	if err == nil && n < canaryKeys {
		s.fail("bound to %s, saw %d rows of at least %d", tn.Slug, n, canaryKeys)
	}
	return err
}

// where compares what PostgreSQL says the transaction is bound to.
func (s *isolation) where(ctx context.Context, tx *postgres.Tx, tn tenant.Tenant) error {
	var path string
	if err := tx.QueryRow(ctx, `select current_setting('search_path')`).Scan(&path); err != nil {
		return err
	}
	if want := tn.Schema.String() + ", ext, pg_temp"; path != want && path != postgres.Quote(tn.Schema.String())+", ext, pg_temp" {
		s.fail("bound to %s, the search path is %q", tn.Slug, path)
	}
	return nil
}

// check compares the tenant's rows with the writes that were acknowledged.
func (s *isolation) check(ctx context.Context, tn tenant.Tenant) {
	err := s.o.DB.InTenant(ctx, tn, postgres.Read, func(tx *postgres.Tx) error {
		rows, err := tx.Query(ctx, `select key from pipelines`)
		if err != nil {
			return err
		}
		keys, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			return err
		}
		want := map[string]bool{}
		for k := range s.stored[tn.Number] {
			want["k"+fmt.Sprintf("%x", k)] = true
		}
		for _, k := range keys {
			if !want[k] {
				s.fail("%s holds the row %s, whose write was never acknowledged", tn.Slug, k)
			}
			delete(want, k)
		}
		for k := range want {
			s.fail("%s has lost the row %s, whose write was acknowledged", tn.Slug, k)
		}
		return nil
	})
	s.ok(err)
}

// atRest looks at every connection of the database from outside: nothing may be open, locked or left.
func (s *isolation) atRest(t testing.TB, ctx context.Context, env *Env) {
	t.Helper()
	const left = `select format('pid %s rests as %s in %s: %s', a.pid, a.usename, a.state, a.query) from pg_stat_activity a
where a.datname = current_database() and a.pid <> pg_backend_pid() and a.state is distinct from 'idle' and a.backend_type = 'client backend'
union all
select format('pid %s holds %s %s', l.pid, l.locktype, l.mode) from pg_locks l join pg_stat_activity a using (pid)
where a.datname = current_database() and l.pid <> pg_backend_pid() and a.backend_type = 'client backend'
union all
select 'temporary schema ' || n.nspname from pg_namespace n where n.nspname ~ '^pg_temp'`
	admin := Admin(t, env.AdminURL)
	var found []string
	for deadline := time.Now().Add(30 * time.Second); ; {
		rows, err := admin.Query(ctx, left)
		if err != nil {
			t.Fatalf("pgtest: look at connections: %v", err)
		}
		if found, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			t.Fatalf("pgtest: look at connections: %v", err)
		}
		// A cancelled statement's backend may take a moment to end.
		if len(found) == 0 || time.Now().After(deadline) {
			break
		}
		pause := time.NewTimer(20 * time.Millisecond)
		<-pause.C
	}
	for _, f := range found {
		s.fail("left behind: %s", f)
	}
}
