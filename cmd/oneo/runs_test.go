package main

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/schemas"
)

// product is a folder of tenant migrations that grows, and an installation with tenants that follow it.
type product struct {
	t     *testing.T
	env   *pgtest.Env
	admin *pgx.Conn
	dir   string
	extra []string
	head  int
	n     int
}

// newProduct makes n tenants at version 2. Whenever a migration of next is committed in a tenant, a trigger notes it in
// public.executions: that is the truth about how often it ran. Runs over them are given --force where the linter is not what
// is tested: to load its parser takes longer than most of them.
func newProduct(t *testing.T, n int) *product {
	t.Helper()
	_, err := plainOneo()
	require.NoError(t, err)
	p := &product{t: t, env: pgtest.New(t), dir: t.TempDir(), head: 2, n: n}
	p.extra = []string{plain, "ONEO_SCHEMAS_DIR=" + p.dir, staleAfter}
	files, err := fs.Sub(schemas.Files, "tenant")
	require.NoError(t, err)
	require.NoError(t, os.CopyFS(p.dir, files))
	p.admin = pgtest.Admin(t, p.env.AdminURL)
	p.exec(`create table public.executions (schema text not null, version integer not null);
create function ext.note_execution() returns trigger language plpgsql security definer set search_path to pg_catalog, pg_temp as
	$$ begin insert into public.executions values (tg_table_schema, new.version); return new; end $$`)
	for i := range n {
		tn := p.env.Tenant(t, fmt.Sprintf("t%03d", i))
		p.exec(fmt.Sprintf(`create table %[1]s.executed (version integer not null); alter table %[1]s.executed owner to oneo_owner_test;
create trigger note after insert on %[1]s.executed for each row execute function ext.note_execution()`, tn.Schema))
	}
	return p
}

// staleAfter is longer than a busy machine keeps a process from giving a sign of life.
const staleAfter = "ONEO_MIGRATE_STALE_AFTER=10s"

// died makes the signs of life of a process that was killed old.
func (p *product) died() {
	p.t.Helper()
	p.exec(`update public.tasks set heartbeat = now() - interval '1 hour' where state = 'running';
update public.operations set heartbeat = now() - interval '1 hour' where state = 'running'`)
}

func (p *product) exec(sql string) {
	p.t.Helper()
	_, err := p.admin.PgConn().Exec(p.t.Context(), strings.ReplaceAll(sql, "oneo_owner_test", p.owner())).ReadAll()
	require.NoError(p.t, err, sql)
}

// owner is the role that migrations run as.
func (p *product) owner() string {
	c, err := pgx.ParseConfig(p.env.Group.OwnerURL)
	require.NoError(p.t, err)
	return c.User
}

// next adds a migration with some SQL, and returns its version.
func (p *product) next(sql string) int {
	p.t.Helper()
	p.head++
	text := fmt.Sprintf("insert into executed (version) values (%d);\nalter table records add column c%[1]d text;\n%s\n", p.head, sql)
	require.NoError(p.t, os.WriteFile(filepath.Join(p.dir, fmt.Sprintf("%04d_step.up.sql", p.head)), []byte(text), 0o600))
	down := fmt.Sprintf("alter table records drop column c%d;\n", p.head)
	require.NoError(p.t, os.WriteFile(filepath.Join(p.dir, fmt.Sprintf("%04d_step.down.sql", p.head)), []byte(down), 0o600))
	return p.head
}

func (p *product) run(env []string, args ...string) (stdout, stderr string, code int) {
	p.t.Helper()
	return oneo(p.t, p.env, append(p.extra[:len(p.extra):len(p.extra)], env...), args...)
}

// executedOnce holds that a version was committed exactly once in each tenant, and that ledger and placement say so.
func (p *product) executedOnce(version int) {
	p.t.Helper()
	var tenants, times, ledger, at int
	const count = `select (select count(distinct schema) from public.executions where version = $1), (select count(*) from public.executions where version = $1),
(select count(*) from public.ledger where set = 'tenant' and version = $1), (select count(*) from public.placements where version >= $1 and state = 'active')`
	require.NoError(p.t, p.admin.QueryRow(p.t.Context(), count, version).Scan(&tenants, &times, &ledger, &at))
	require.Equal(p.t, []int{p.n, p.n, p.n, p.n}, []int{tenants, times, ledger, at}, "tenants, executions, ledger rows and placements at version %d", version)
}

// F09, F10, F12, F95: kill -9 at every place of a run in the middle of 200 tenants; then the same command again.
func TestKilledRunsGoOn(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 200)
	for _, point := range failpoint.All {
		if !strings.HasPrefix(point, "run.") && point != "migrate.before" && point != "migrate.applied" && point != "migrate.after" {
			continue
		}
		version := p.next("")
		place := point + "=exit@40"
		if point == "run.planning" || point == "run.planned" {
			place = point + "=exit"
		} else if point == "run.settling" || point == "run.settled" {
			place = point + "=exit@3"
		}
		_, stderr, code := p.run([]string{"ONEO_FAILPOINTS=" + place}, "migrate", "--force", "--all-tenants", "--jobs", "3", "--progress", "none")
		require.Equalf(t, 137, code, "%s did not fire: %s", place, stderr)
		var done int
		require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = $1`, version).Scan(&done))
		require.Less(t, done, 200, "%s: killed in the middle", point)
		p.died()

		_, stderr, code = p.run(nil, "migrate", "--force", "--all-tenants", "--jobs", "3", "--progress", "none")
		require.Zerof(t, code, "again after %s: %s", place, stderr)
		if point != "run.planning" {
			require.Contains(t, stderr, "going on with the run", point)
		}
		p.executedOnce(version)
		_, stderr, code = p.run(nil, "migrate", "status", "--check")
		require.Zerof(t, code, "%s: %s", point, stderr)
	}
	p.env.Invariants(t)
}

// F12, behaviour 109: several processes at once, of which two are killed; each migration once for each tenant.
func TestProcessesShareARunOfMigrations(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 120)
	first := p.next("select pg_sleep(0.005);")
	second := p.next("")
	var processes sync.WaitGroup
	for i := range 4 {
		processes.Go(func() {
			env := []string{}
			if i < 2 {
				env = append(env, fmt.Sprintf("ONEO_FAILPOINTS=run.claimed=exit@%d", 10+7*i))
			}
			_, stderr, code := oneo(t, p.env, append(p.extra[:len(p.extra):len(p.extra)], env...), "migrate", "--force", "--all-tenants", "--jobs", "2", "--progress", "none")
			if i >= 2 && code != 0 {
				t.Errorf("process %d: exit %d: %s", i, code, stderr)
			}
		})
	}
	processes.Wait()
	p.executedOnce(first)
	p.executedOnce(second)
	// One that was late to plan may have found the others done: a run of its own has nothing but skipped tenants then.
	var done int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.tasks where state = 'ok'`).Scan(&done))
	require.Equal(t, 120, done, "they share one run")
}

// Ctrl-C finishes what is in hand, exits 130 and says how to go on; that goes on.
func TestInterruptedRunIsResumed(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 40)
	p.exec(`create table public.slow (); insert into public.slow default values;
create function ext.slowly() returns void language plpgsql security definer set search_path to pg_catalog, pg_temp as
	$$ begin perform pg_sleep(2) from public.slow; end $$; grant execute on function ext.slowly to public`)
	version := p.next("select ext.slowly();")
	cmd := child(p.env, p.extra, "migrate", "--force", "--all-tenants", "--jobs", "2", "--progress", "json")
	logs := &buffer{}
	cmd.Stderr = logs
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return strings.Contains(logs.String(), `"status":"ok"`) }, pgtest.Patience, 5*time.Millisecond)
	require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
	require.Error(t, cmd.Wait())
	require.Equal(t, exitInterrupted, cmd.ProcessState.ExitCode(), logs.String())
	_, rest, ok := strings.Cut(logs.String(), "To go on: oneo ")
	require.True(t, ok, logs.String())
	resume := strings.Fields(strings.TrimRight(rest, "\"}\n"))
	stdout, _, code := p.run(nil, "migrate", "run", "show", "last", "-o", "json")
	require.Zero(t, code)
	var shown struct {
		State    string
		OK, Left int
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &shown))
	require.Equal(t, "running", shown.State)
	require.Positive(t, shown.OK)
	require.Positive(t, shown.Left)
	require.Equal(t, 40, shown.OK+shown.Left, "nothing is left in hand")
	p.exec(`delete from public.slow`)
	_, stderr, code := p.run(nil, append(resume, "--progress", "none")...)
	require.Zero(t, code, stderr)
	p.executedOnce(version)
}

// F14: a tenant with a long reader is set aside, its other readers go on, and it is done once the reader has ended.
func TestBusyTenantDoesNotHoldUpARun(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 20)
	version := p.next("")
	reader := pgtest.Admin(t, p.env.AdminURL)
	_, err := reader.PgConn().Exec(t.Context(), `begin; select count(*) from t000.records`).ReadAll()
	require.NoError(t, err)
	cmd := child(p.env, append(p.extra, "ONEO_DATABASE_LOCK_TIMEOUT=300ms", "ONEO_MIGRATE_PATIENCE=1h"), "migrate", "--force", "--all-tenants", "--jobs", "2")
	logs := &buffer{}
	cmd.Stderr = logs
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return strings.Contains(logs.String(), `"event":"busy"`) }, pgtest.Patience, 10*time.Millisecond, "the tenant is set aside")
	// Meanwhile the others are done, and other readers go on. Without the lock timeout, one that is behind the migration would
	// wait for the long reader, which ends below.
	other := pgtest.Admin(t, p.env.AdminURL)
	_, err = other.Exec(t.Context(), `set lock_timeout to '1min'`)
	require.NoError(t, err)
	for done, deadline := 0, time.Now().Add(pgtest.Patience); done < 19 || strings.Count(logs.String(), `"event":"busy"`) < 3; time.Sleep(5 * time.Millisecond) {
		_, err := other.Exec(t.Context(), `select count(*) from t000.records`)
		require.NoError(t, err, "other readers go on")
		require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = $1`, version).Scan(&done))
		require.True(t, time.Now().Before(deadline), "the others wait for the busy one: %d are done", done)
	}
	_, err = reader.Exec(t.Context(), `rollback`)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait(), logs.String())
	p.executedOnce(version)
}

// Behaviour 83: when the shared schema fails, no tenant is touched; 84: a failed tenant is named and at its old version.
func TestFailedTenantIsAtItsOldVersion(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 8)
	p.next("")
	version := p.next("alter table records add constraint only_some check (current_schema() <> 't003');\ninsert into pipelines (id, key, name) values (gen_random_uuid(), 'x', 'x');\nselect 1 / (case when current_schema() = 't005' then 0 else 1 end);")
	_, stderr, code := p.run(nil, "migrate", "--all-tenants", "-o", "json")
	require.Equal(t, exitUsage, code, "the linter finds the check")
	require.Contains(t, stderr, "lint_errors")
	stdout, stderr, code := p.run(nil, "migrate", "--all-tenants", "-o", "json", "--force")
	require.Equal(t, exitSomeFailed, code, stderr)
	var report []struct {
		Tenant, Status string
		From, To       int
		Error          *struct{ Code, SQLState, Message, Hint string }
	}
	require.NoError(t, json.Unmarshal([]byte(stdout), &report))
	for _, r := range report {
		switch r.Tenant {
		case "(shared)":
		case "t005":
			require.Equal(t, "failed", r.Status)
			require.Equal(t, 2, r.To, "both of its migrations are rolled back")
			require.Equal(t, "22012", r.Error.SQLState)
			require.Contains(t, r.Error.Message, fmt.Sprintf("%04d_step", version))
			require.NotEmpty(t, r.Error.Hint)
		default:
			require.Equal(t, "ok", r.Status, r.Tenant)
			require.Equal(t, version, r.To)
		}
	}
	require.Len(t, report, 9)
	var columns int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from information_schema.columns where table_schema = 't005' and table_name = 'records' and column_name like 'c_'`).Scan(&columns))
	require.Zero(t, columns)
	stdout, _, code = p.run(nil, "migrate", "status", "--check", "-o", "json")
	require.Equal(t, exitPending, code)
	require.Contains(t, stdout, `"failed"`)
	require.Contains(t, stdout, `"t005"`)
	require.Contains(t, stdout, `22012`)
	p.env.Invariants(t)
}

// Behaviour 83: when the shared schema fails, no tenant is touched.
func TestSharedSchemaComesFirst(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 2)
	version := p.next("")
	var last string // its tables are there already: it fails
	const forget = `delete from public.ledger where set = 'shared' and version = (select max(version) from public.ledger where set = 'shared') returning name`
	require.NoError(t, p.admin.QueryRow(t.Context(), forget).Scan(&last))
	_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants")
	require.Equal(t, exitUsage, code, stderr)
	require.Contains(t, stderr, last)
	var touched int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = $1`, version).Scan(&touched))
	require.Zero(t, touched)
	_, stderr, code = p.run(nil, "migrate", "-t", "t000")
	require.Equal(t, exitPending, code, stderr)
}

func TestDownTakesTheFleetBack(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 6)
	p.next("")
	p.next("")
	_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants", "--progress", "none")
	require.Zero(t, code, stderr)
	_, stderr, code = p.run(nil, "migrate", "down", "--steps", "1", "-t", "t000")
	require.Equal(t, exitUsage, code)
	require.Contains(t, stderr, "--yes")
	_, stderr, code = p.run(nil, "migrate", "down", "--steps", "1", "-t", "t000", "--yes", "--progress", "none")
	require.Zero(t, code, stderr)
	stdout, stderr, code := p.run(nil, "migrate", "down", "--to", "2", "--all-tenants", "--yes", "--progress", "none", "-o", "json")
	require.Zero(t, code, stderr)
	require.Contains(t, stdout, `"from": 3`)
	require.Contains(t, stdout, `"from": 4`)
	_, stderr, code = p.run(nil, "migrate", "down", "--to", "9", "--all-tenants", "--yes")
	require.Equal(t, exitUsage, code, stderr)
	var columns int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from information_schema.columns where table_name = 'records' and column_name like 'c_'`).Scan(&columns))
	require.Zero(t, columns)
	require.NoError(t, os.Remove(filepath.Join(p.dir, "0003_step.down.sql")))
	_, stderr, code = p.run(nil, "migrate", "--force", "--all-tenants", "--progress", "none")
	require.Zero(t, code, stderr)
	_, stderr, code = p.run(nil, "migrate", "down", "--to", "2", "--all-tenants", "--yes")
	require.Equal(t, exitUsage, code)
	require.Contains(t, stderr, "0003_step")
	p.env.Invariants(t)
}

// F97: a run through PgBouncer in transaction mode, killed in the middle and resumed; a file without a transaction goes
// past it.
func TestRunThroughPgBouncer(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 60)
	bouncer := p.env.PgBouncer(t, 3)
	through := func(raw string) string {
		u, err := url.Parse(raw)
		require.NoError(t, err)
		u.Host = bouncer
		return u.String()
	}
	p.extra = append(p.extra, "ONEO_DATABASE_STATEMENTS=unprepared", "ONEO_DATABASE_URL="+through(p.env.Group.URL),
		"ONEO_DATABASE_OWNER_URL="+through(p.env.Group.OwnerURL), "ONEO_DATABASE_DIRECT_URL="+p.env.Group.OwnerURL)
	version := p.next("")
	text := "-- oneo: no-transaction\ncreate index concurrently records_version on records (version);\ninsert into executed (version) values (4);\n"
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "0004_index.up.sql"), []byte(text), 0o600))
	_, stderr, code := p.run([]string{"ONEO_FAILPOINTS=run.worked=exit@20"}, "migrate", "--force", "--all-tenants", "--jobs", "3", "--progress", "none")
	require.Equal(t, 137, code, stderr)
	p.died()
	_, stderr, code = p.run(nil, "migrate", "--force", "--all-tenants", "--jobs", "3", "--progress", "none")
	require.Zero(t, code, stderr)
	p.executedOnce(version)
	p.executedOnce(4)
	_, stderr, code = p.run(nil, "migrate", "status", "--check")
	require.Zero(t, code, stderr)
}

// A run of which all is done, and whose process died before it could write so, is ended by who looks next. Where the
// same command would do it once more, it stays open until that command, or resume, has gone on with it.
func TestRunWhoseLastWordWasLostIsConcluded(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 3)
	p.writable()
	last := func() (state string) {
		require.NoError(t, p.admin.QueryRow(t.Context(), `select state from public.operations where kind like 'run.%' order by id desc limit 1`).Scan(&state))
		return state
	}
	// Three tenants, one after another, and none of them written before the process dies with the last.
	dies := func(point string, args ...string) {
		t.Helper()
		_, stderr, code := p.run([]string{"ONEO_FAILPOINTS=" + point + "=exit@3"}, append(args, "--jobs", "1", "--progress", "none")...)
		require.Equal(t, 137, code, stderr)
		require.Equal(t, "running", last())
		p.exec(`update public.operations set heartbeat = now() - interval '1 hour'; update public.tasks set heartbeat = now() - interval '1 hour'`)
	}
	for _, look := range [][]string{{"migrate", "run", "list", "--open"}, {"migrate", "run", "show", "last"}, {"migrate", "status", "--check"}, {"sql", "-t", "t000", "select 1"}} {
		version := p.next("")
		dies("run.worked", "migrate", "--force", "--all-tenants")
		p.executedOnce(version)
		_, stderr, code := p.run(nil, look...)
		require.Zero(t, code, stderr)
		require.Contains(t, stderr, "had nothing left to do", look)
		var state string
		require.NoError(t, p.admin.QueryRow(t.Context(), `select state from public.operations where kind = 'run.migrate' order by id desc limit 1`).Scan(&state))
		require.Equal(t, "done", state, look)
	}
	dies("run.worked", "migrate", "down", "--to", "2", "--all-tenants", "--yes")
	_, _, code := p.run(nil, "migrate", "run", "list")
	require.Zero(t, code)
	require.Equal(t, "done", last())

	_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants", "--progress", "none")
	require.Zero(t, code, stderr)
	dies("run.worked", "migrate", "down", "--steps", "1", "--all-tenants", "--yes")
	_, _, code = p.run(nil, "migrate", "run", "list")
	require.Zero(t, code)
	require.Equal(t, "running", last())
	_, stderr, code = p.run(nil, "migrate", "down", "--steps", "1", "--all-tenants", "--yes", "--progress", "none")
	require.Zero(t, code, stderr)
	require.Contains(t, stderr, "going on with the run")
	var down int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.placements where version = $1`, p.head-1).Scan(&down))
	require.Equal(t, 3, down, "one step down, and not two")

	write := []string{"sql", "--all-tenants", "--write", "--yes", change(70)}
	dies("sql.committed", write...)
	_, _, code = p.run(nil, "migrate", "run", "show", "last")
	require.Zero(t, code)
	require.Equal(t, "running", last())
	_, stderr, code = p.run(nil, append(write, "--progress", "none")...)
	require.Zero(t, code, stderr)
	p.changedOnce(70)
	require.Equal(t, "done", last())
}

// A run gives way to servers, unless it is told how many tenants to take at one time.
func TestRunYieldsToServers(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 3)
	inst, err := p.env.DB.Installation(t.Context(), "main")
	require.NoError(t, err)
	server, err := pgx.ParseConfig(p.env.Group.URL)
	require.NoError(t, err)
	server.User = inst.LoginNames()[0]
	server.Password = postgres.LoginPassword(pgtest.Secret, server.User)
	c, err := pgx.ConnectConfig(t.Context(), server)
	require.NoError(t, err)
	defer c.Close(t.Context())
	for _, run := range []struct {
		share  string
		more   []string
		yields bool
	}{
		{"25", nil, true},
		{"25", []string{"--jobs", "2"}, false},
		{"0", nil, false},
	} {
		version := p.next("")
		_, stderr, code := p.run([]string{"ONEO_MIGRATE_LIVE_SHARE=" + run.share}, append([]string{"migrate", "--all-tenants", "--force", "--progress", "json"}, run.more...)...)
		require.Equal(t, 0, code, stderr)
		require.Equal(t, run.yields, strings.Contains(stderr, `"event":"yielding"`), "%+v: %s", run, stderr)
		p.executedOnce(version)
	}
}
