package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgtype"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// writable gives the tenants' roles the right to write what next's migrations write.
func (p *product) writable() {
	p.exec(`do $$ declare s text; r text; begin
	for s, r in select schema, role from public.placements loop execute format('grant select, insert on %I.executed to %I', s, r); end loop; end $$`)
}

// changedOnce holds that a run's change was committed once in each tenant, and that each has its mark.
func (p *product) changedOnce(version int) {
	p.t.Helper()
	tenants, times, marks := p.changed(version)
	require.Equal(p.t, []int{p.n, p.n, p.n}, []int{tenants, times, marks}, "tenants, changes and marks of change %d", version)
}

// changed counts the tenants that have a change, how often it was committed, and the marks of that.
func (p *product) changed(version int) (tenants, times, marks int) {
	p.t.Helper()
	const count = `select (select count(distinct schema) from public.executions where version = $1), (select count(*) from public.executions where version = $1),
(select count(*) from public.marks m join public.operations o on o.id = m.run where o.request->'request'->>'statement' like '%(' || $1 || ')')`
	require.NoError(p.t, p.admin.QueryRow(p.t.Context(), count, version).Scan(&tenants, &times, &marks))
	return tenants, times, marks
}

func change(version int) string {
	return fmt.Sprintf("insert into executed (version) values (%d)", version)
}

// F09, F10: kill -9 at every place of a change in the middle of the fleet; then the same command, or the run itself,
// goes on. A trigger counts: each tenant is changed once.
func TestKilledWritesGoOn(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 60)
	p.writable()
	points := []string{"run.planned", "run.claimed", "run.worked", "run.settling", "run.settled", "sql.bound", "sql.ran", "sql.marked", "sql.committed"}
	for i, point := range points {
		version := 1000 + i
		place := point + "=exit@20"
		switch point {
		case "run.planned":
			place = point + "=exit"
		case "run.settling", "run.settled":
			place = point + "=exit@2"
		}
		command := []string{"sql", "--all-tenants", "--write", "--yes", "--jobs", "3", "--progress", "none", "-o", "csv", change(version)}
		_, stderr, code := p.run([]string{"ONEO_FAILPOINTS=" + place}, command...)
		require.Equalf(t, 137, code, "%s did not fire: %s", place, stderr)
		var done int
		require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = $1`, version).Scan(&done))
		require.Less(t, done, p.n, "%s: killed in the middle", point)
		p.died()
		again := command
		if i%2 == 1 {
			again = []string{"migrate", "run", "resume", "last", "--progress", "none", "-o", "csv"}
		}
		stdout, stderr, code := p.run(nil, again...)
		require.Zerof(t, code, "again after %s: %s", place, stderr)
		if i%2 == 0 {
			require.Contains(t, stderr, "going on with the run", point)
		}
		require.NotContains(t, stdout, ",0,", "a change that was made before is told with its count")
		p.changedOnce(version)
	}
	p.env.Invariants(t)
}

// Several processes on one change, some of which are killed.
func TestProcessesShareAChange(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 80)
	p.writable()
	var processes sync.WaitGroup
	for i := range 4 {
		processes.Go(func() {
			env := p.extra[:len(p.extra):len(p.extra)]
			if i < 2 {
				env = append(env, fmt.Sprintf("ONEO_FAILPOINTS=sql.marked=exit@%d", 8+5*i))
			}
			_, stderr, code := oneo(t, p.env, env, "sql", "--all-tenants", "--write", "--yes", "--jobs", "2", "--progress", "none", change(7))
			if i >= 2 && code != 0 {
				t.Errorf("process %d: exit %d: %s", i, code, stderr)
			}
		})
	}
	processes.Wait()
	var runs int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.runs`).Scan(&runs))
	if runs == 1 {
		p.changedOnce(7)
		return
	}
	// One began when the others had ended already: that is the same command once more, and a run of its own.
	tenants, times, marks := p.changed(7)
	require.Equal(t, p.n, tenants)
	require.Equal(t, marks, times, "each run changes a tenant once")
}

// Another statement minds no run of somebody else's, and aborts none.
func TestAnotherWriteLeavesADeadRunAlone(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 12)
	p.writable()
	write := func(version int, env ...string) int {
		_, _, code := p.run(env, "sql", "--all-tenants", "--write", "--yes", "--jobs", "2", "--progress", "none", change(version))
		return code
	}
	require.Equal(t, 137, write(1, "ONEO_FAILPOINTS=sql.ran=exit@5"))
	p.died()
	require.Zero(t, write(2))
	p.changedOnce(2)
	require.Zero(t, write(1))
	p.changedOnce(1)
	require.Zero(t, write(2), "a run that is over is no longer gone on with: the command means what it says")
	var times int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = 2`).Scan(&times))
	require.Equal(t, 2*p.n, times)
}

// In the middle of a migration the tenants that most others are unlike are told apart, and nothing is mixed.
func TestHalfMigratedColumnsAreNotMixed(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 9)
	p.next("")
	_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants", "--exclude", "t000", "--exclude", "t004", "--progress", "none")
	require.Zero(t, code, stderr)
	p.exec(`insert into t000.pipelines (id, key, name) select gen_random_uuid(), 'a', 'a'; insert into t001.pipelines (id, key, name) select gen_random_uuid(), 'a', 'a'`)
	stdout, stderr, code := p.run(nil, "sql", "--all-tenants", "--progress", "none", "-o", "ndjson", "select * from records right join (select 1 as one) x on true")
	require.Equal(t, exitSomeFailed, code, stderr)
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	require.Len(t, lines, 9)
	for i, line := range lines {
		require.Contains(t, line, fmt.Sprintf(`{"tenant":"t%03d",`, i), "in the order of names")
		if i == 0 || i == 4 {
			require.Contains(t, line, `"code":"columns_differ","message":"its columns are not those of the other tenants: it lacks c3 text"`)
		} else {
			require.Contains(t, line, `"c3":null,"one":1}`)
		}
	}
	_, stderr, code = p.run(nil, "sql", "--all-tenants", "--progress", "none", "select id from records")
	require.Zero(t, code, stderr)
}

// Whoever is first, the result stands in the order of names, and a later process shows what it read itself.
func TestResultsStandInTheOrderOfNames(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 30)
	names := func(stdout string) (all []string) {
		for line := range strings.SplitSeq(strings.TrimSpace(stdout), "\n") {
			var row struct{ Tenant string }
			require.NoError(t, json.Unmarshal([]byte(line), &row))
			all = append(all, row.Tenant)
		}
		return all
	}
	stdout, stderr, code := p.run(nil, "sql", "--all-tenants", "--jobs", "6", "--canary", "3", "--progress", "none", "-o", "ndjson", "select pg_sleep(random() * 0.05)")
	require.Zero(t, code, stderr)
	got := names(stdout)
	require.Len(t, got, 30)
	require.True(t, slices.IsSorted(got), got)

	_, _, code = p.run([]string{"ONEO_FAILPOINTS=run.worked=exit@10"}, "sql", "--all-tenants", "--jobs", "2", "--progress", "none", "select 1")
	require.Equal(t, 137, code)
	p.died()
	stdout, stderr, code = p.run(nil, "migrate", "run", "resume", "last", "--progress", "none", "-o", "ndjson")
	require.Zero(t, code, stderr)
	got = names(stdout)
	require.True(t, slices.IsSorted(got), got)
	if len(got) < 30 {
		require.Contains(t, stderr, fmt.Sprintf("%d tenant(s) answered to another process", 30-len(got)))
	}
	var rows int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.tasks where result is not null and result - 'rows' - 'cut' <> '{}'`).Scan(&rows))
	require.Zero(t, rows, "of what was read only counts are stored")
}

// Whoever reads the result goes away after its first row: a reading run ends early, a change is made all the same.
func TestReaderThatGoesAwayLeavesNoOpenRun(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 40)
	p.writable()
	for _, args := range [][]string{
		{"select pg_sleep(0.01), repeat('x', 5000)"}, {"--write", "--yes", change(5) + " returning repeat('x', 5000), pg_sleep(0.01)"},
	} {
		cmd := child(p.env, p.extra, append([]string{"sql", "--all-tenants", "--jobs", "2", "--progress", "none", "-o", "ndjson"}, args...)...)
		out, err := cmd.StdoutPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		_, err = out.Read(make([]byte, 100))
		require.NoError(t, err)
		require.NoError(t, out.Close())
		_ = cmd.Wait()
		require.True(t, cmd.ProcessState.Exited(), cmd.ProcessState)
		var state string
		var ok, left int
		const newest = `select o.state, (select count(*) from public.tasks t where t.run = o.id and t.state = 'ok'),
	(select count(*) from public.tasks t where t.run = o.id and t.state in ('queued', 'running'))
from public.operations o where o.kind = 'run.sql' order by o.id desc limit 1`
		require.NoError(t, p.admin.QueryRow(t.Context(), newest).Scan(&state, &ok, &left))
		require.Equal(t, "done", state)
		require.Zero(t, left)
		if len(args) > 1 {
			require.Equal(t, 40, ok)
			require.Zero(t, cmd.ProcessState.ExitCode())
		} else {
			require.Less(t, ok, 40)
			require.Equal(t, exitFailed, cmd.ProcessState.ExitCode())
		}
	}
	var times int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from public.executions where version = 5`).Scan(&times))
	require.Equal(t, 40, times)
}

// The pieces of a result come in any order, and more than once as much as is held for their order's sake.
func TestMerged(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		var out bytes.Buffer
		m := newMerged(&env{out: &out, output: "ndjson"}, []string{"n"}, 25)
		r := rand.New(rand.NewPCG(seed, 1))
		for _, i := range r.Perm(20) {
			p := piece{tenant: strconv.Itoa(i)}
			for n := range 2 {
				p.rows = append(p.rows, m.encode(p.tenant, []cell{numberCell(int64(n))}, nil))
			}
			m.add(i, p)
		}
		require.NoError(t, m.end())
		var want strings.Builder
		for i := range 20 {
			for n := range 2 {
				if 2*i+n < 25 {
					fmt.Fprintf(&want, "{\"tenant\":\"%d\",\"n\":%d}\n", i, n)
				}
			}
			if i >= 12 {
				fmt.Fprintf(&want, "{\"tenant\":\"%d\",\"error\":{\"code\":\"rows_cut\",\"message\":\"only the first 25 rows of all tenants\",\"hint\":\"raise --max-rows, or write 0 for no bound\"}}\n", i)
			}
		}
		require.Equal(t, want.String(), out.String(), "seed %d", seed)
		require.Equal(t, 8, m.cut)
	}

	var out bytes.Buffer
	m := newMerged(&env{out: &out, output: "csv"}, []string{"n"}, 0)
	m.add(2, piece{tenant: "c", rows: [][]byte{[]byte("c,1,\n")}, bytes: mergedBytes})
	require.Empty(t, out.String(), "it waits for its turn")
	m.add(1, piece{tenant: "b", rows: [][]byte{[]byte("b,1,\n")}, bytes: 1})
	require.Equal(t, "tenant,n,error\nb,1,\nc,1,\n", out.String(), "and not for ever")
	m.add(0, piece{tenant: "a", rows: [][]byte{[]byte("a,1,\n")}, bytes: 1})
	m.add(3, piece{tenant: "d", rows: [][]byte{[]byte("d,1,\n")}, bytes: 1})
	require.NoError(t, m.end())
	require.Equal(t, "tenant,n,error\nb,1,\nc,1,\na,1,\nd,1,\n", out.String())
	require.Zero(t, m.bytes)
	require.Empty(t, m.held)
}

func TestValues(t *testing.T) {
	t.Parallel()
	types := pgtype.NewMap()
	for _, c := range []struct {
		oid       uint32
		raw, want string
	}{
		{pgtype.Int8OID, "-9223372036854775808", "-9223372036854775808"},
		{pgtype.NumericOID, "0.10000000000000000000000000000001", "0.10000000000000000000000000000001"},
		{pgtype.NumericOID, "Infinity", `"Infinity"`},
		{pgtype.Float8OID, "1e+300", "1e+300"},
		{pgtype.BoolOID, "f", "false"},
		{pgtype.TextOID, "a\"\n\x01", `"a\"\n\u0001"`},
		{pgtype.JSONOID, "{\"b\":1,\n \"a\":  2}", `{"b":1,  "a":  2}`},
		{pgtype.TimestamptzOID, "2026-11-25 10:00:00.123+00", `"2026-11-25T10:00:00.123Z"`},
		{pgtype.TimestamptzOID, "infinity", `"infinity"`},
		{pgtype.TimestamptzOID, "0044-03-15 12:00:00+00 BC", `"0044-03-15 12:00:00+00 BC"`},
		{pgtype.TimestampOID, "2026-11-25 10:00:00", `"2026-11-25T10:00:00"`},
		{pgtype.DateOID, "2026-11-25", `"2026-11-25"`},
		{pgtype.ByteaOID, `\x00ff`, `"\\x00ff"`},
		{pgtype.Int4ArrayOID, "{1,NULL,3}", "[1,null,3]"},
		{pgtype.Int4ArrayOID, "{}", "[]"},
		{pgtype.TextArrayOID, `{{a,"b c"},{"d\"",NULL}}`, `[["a","b c"],["d\"",null]]`},
		{pgtype.JSONBArrayOID, `{"{\"a\": 1}"}`, `[{"a": 1}]`},
		{999999, "whatever", `"whatever"`},
	} {
		got := valueOf(types, c.oid, []byte(c.raw))
		require.Equal(t, c.want, string(got.json), c.raw)
		require.True(t, json.Valid(got.json), c.raw)
	}
	require.Nil(t, valueOf(types, pgtype.TextOID, nil).json)
}

// alive counts the processes of a file of ids that are at work.
func alive(t *testing.T, path string) int {
	t.Helper()
	text, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return 0
	}
	require.NoError(t, err)
	n := 0
	for _, pid := range strings.Fields(string(text)) {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if _, state, ok := strings.Cut(string(stat), ") "); err == nil && ok && !strings.HasPrefix(state, "Z") {
			n++
		}
	}
	return n
}

// begunSlowly is a command whose programs note that they began, wait for good, and note that they ended. Those of the first
// three tenants, and all once there is a file called quick, do not wait.
func begunSlowly(dir, trap string) []string {
	script := fmt.Sprintf(`%s; echo $$ >> %[2]s/pids; echo $ONEO_TENANT >> %[2]s/begun
case $ONEO_TENANT in t000|t001|t002) ;; *) test -e %[2]s/quick || { sleep 600 & echo $! >> %[2]s/pids; wait; } ;; esac
echo $ONEO_TENANT >> %[2]s/ended`, trap, dir)
	return []string{"each", "--all-tenants", "--jobs", "3", "--grace", "300ms", "--", "sh", "-c", script}
}

// Ctrl-C ends the programs in hand, leaves nothing running and says how to go on; that runs them for the others only.
func TestInterruptedEachIsResumed(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 12)
	for name, trap := range map[string]string{"at once": "trap 'exit 1' INT", "not at all": "trap '' INT TERM"} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			args := begunSlowly(dir, trap)
			cmd := child(p.env, p.extra, args...)
			logs := &buffer{}
			cmd.Stderr = logs
			require.NoError(t, cmd.Start())
			begun := func() int {
				text, _ := os.ReadFile(filepath.Join(dir, "begun"))
				return len(strings.Fields(string(text)))
			}
			require.Eventually(t, func() bool { return begun() >= 6 && alive(t, filepath.Join(dir, "pids")) >= 6 }, pgtest.Patience, 5*time.Millisecond)
			require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
			require.Error(t, cmd.Wait())
			require.Equal(t, exitInterrupted, cmd.ProcessState.ExitCode(), logs.String())
			require.Eventually(t, func() bool { return alive(t, filepath.Join(dir, "pids")) == 0 }, pgtest.Patience, 5*time.Millisecond, "something is left running")
			_, rest, ok := strings.Cut(logs.String(), "To go on: oneo ")
			require.True(t, ok, logs.String())
			require.Equal(t, 6, begun(), "no other is begun")
			require.NoError(t, os.WriteFile(filepath.Join(dir, "quick"), nil, 0o600))
			_, stderr, code := p.run(nil, append(strings.Fields(rest), "--progress", "none")...)
			require.Zero(t, code, stderr)
			ended, err := os.ReadFile(filepath.Join(dir, "ended"))
			require.NoError(t, err)
			got := strings.Fields(string(ended))
			slices.Sort(got)
			require.Equal(t, got, slices.Compact(slices.Clone(got)), "none ends twice")
			require.Len(t, got, 12)
		})
	}
}

// kill -9 takes the programs along, and the run goes on with those that had not ended.
func TestKilledEachIsResumed(t *testing.T) {
	t.Parallel()
	p := newProduct(t, 9)
	dir := t.TempDir()
	script := fmt.Sprintf(`echo $ONEO_TENANT >> %[1]s/begun; echo $$ >> %[1]s/pids; test -e %[1]s/quick || exec sleep 600`, dir)
	cmd := child(p.env, p.extra, "each", "--all-tenants", "--jobs", "3", "--", "sh", "-c", script)
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return alive(t, filepath.Join(dir, "pids")) == 3 }, pgtest.Patience, 5*time.Millisecond)
	require.NoError(t, cmd.Process.Kill())
	require.Error(t, cmd.Wait())
	require.Eventually(t, func() bool { return alive(t, filepath.Join(dir, "pids")) == 0 }, pgtest.Patience, 5*time.Millisecond, "a program outlived its oneo")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "quick"), nil, 0o600))
	p.died()
	_, stderr, code := p.run(nil, "migrate", "run", "resume", "last", "--progress", "none")
	require.Zero(t, code, stderr)
	text, err := os.ReadFile(filepath.Join(dir, "begun"))
	require.NoError(t, err)
	require.Len(t, strings.Fields(string(text)), 9+3, "those in hand ran again, the others once")
}
