package physical_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// within are the processes that work in a folder or below it: PostgreSQL's work in their data folder.
func within(dir string) (pids []int) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		panic(err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err == nil && strings.HasPrefix(cwd, dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// ended waits until nothing works in the scratch folder any more.
func (a *archived) ended() {
	a.t.Helper()
	require.Eventually(a.t, func() bool { return len(within(a.scratch())) == 0 }, 2*time.Minute, 20*time.Millisecond, "nothing of the recovery still runs")
}

// nothingLeft is what a recovery that failed leaves.
func (a *archived) nothingLeft() {
	a.t.Helper()
	require.Empty(a.t, within(a.scratch()))
	entries, err := os.ReadDir(a.scratch())
	if err != nil {
		require.ErrorIs(a.t, err, os.ErrNotExist)
	}
	require.Empty(a.t, entries)
}

// cannot recovers what must not be recovered, and leaves nothing.
func (a *archived) cannot(o physical.RecoverOptions, kind fault.Kind, code string) *fault.Fault {
	a.t.Helper()
	o.Dir = a.scratch()
	if o.Role == "" {
		o.Role = "postgres"
	}
	if o.Database == "" {
		o.Database = "postgres"
	}
	_, err := physical.Recover(a.t.Context(), a.engine, o)
	f := a.faultOf(err, kind, code)
	a.nothingLeft()
	return f
}

// counted recovers a moment, counts, and removes what it has recovered.
func (a *archived) counted(target physical.Target, sql string) int {
	a.t.Helper()
	c, err := a.recover(target)
	require.NoError(a.t, err)
	n, err := count(a.t, c, "postgres", sql)
	require.NoError(a.t, err)
	require.NoError(a.t, c.Close(context.Background()))
	a.nothingLeft()
	return n
}

// A role and a database that were made after the backup are waited for; those that were not there at the moment are told.
func TestARecoveryThatNobodyCanAskEnds(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	_, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	early := a.now()
	a.exec(`create role late login`)
	a.exec(`create role barred nologin`)
	a.exec(`create database late`)
	late := a.now()
	a.flush()
	o := physical.RecoverOptions{Target: physical.Target{Time: early}, Database: "late"}
	require.Contains(t, a.cannot(o, fault.NotFound, "not_there_then").Message, `database "late" does not exist`)
	o.Database, o.Role = "", "late"
	require.Contains(t, a.cannot(o, fault.NotFound, "not_there_then").Message, `role "late" does not exist`)
	o.Target.Time, o.Role = late, "barred"
	require.Contains(t, a.cannot(o, fault.NotFound, "not_there_then").Message, `not permitted to log in`)
	o.Dir, o.Role, o.Database = a.scratch(), "late", "late"
	c, err := physical.Recover(t.Context(), a.engine, o)
	require.NoError(t, err)
	require.NoError(t, c.Close(context.Background()))
	a.nothingLeft()
}

// Replaying that a tablespace was made must not lead into the live cluster's.
func TestARecoveryKeepsOutOfTheLiveTablespaces(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) *archived{"files": withFiles, "pgbackrest": withPgBackRest} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := start(t)
			b, err := a.engine.Create(t.Context(), physical.CreateOptions{})
			require.NoError(t, err)
			a.after(b)
			live := filepath.Join(a.dir, "live-tablespace")
			require.NoError(t, os.Mkdir(live, 0o700))
			own, err := exec.Command("chown", "--reference="+filepath.Join(a.dir, "postgres"), live).CombinedOutput()
			require.NoError(t, err, "%s", own)
			a.exec(`create table deals (id int)`)
			before := a.now()
			a.exec(`create table goes_on ()`) // the replay ends here, before the tablespace
			a.exec(`create tablespace spare location '` + live + `'`)
			a.exec(`create table spare tablespace spare as select id from generate_series(1, 1000) id`)
			a.exec(`checkpoint`)
			after := a.now()
			a.exec(`delete from spare`)
			a.exec(`vacuum (truncate) spare`)
			a.exec(`insert into spare values (1)`)
			a.flush()
			tree := a.tree(live)
			f := a.cannot(physical.RecoverOptions{Target: physical.Target{Time: after}}, fault.Unfit, "tablespaces")
			require.Contains(t, f.Message, b.Label)
			require.Equal(t, tree, a.tree(live))
			require.Equal(t, 0, a.counted(physical.Target{Time: before}, `select count(*) from deals`))
			require.Equal(t, tree, a.tree(live))
			n := 0
			require.NoError(t, a.conn.QueryRow(t.Context(), `select count(*) from spare`).Scan(&n))
			require.Equal(t, 1, n)
			_, err = a.engine.Create(t.Context(), physical.CreateOptions{})
			if name == "files" {
				a.faultOf(err, fault.Unfit, "tablespaces")
				return
			}
			require.NoError(t, err)
			a.after(a.info().Backups[1])
			last := a.now()
			a.exec(`delete from spare`)
			a.flush()
			require.Equal(t, 1, a.counted(physical.Target{Time: last}, `select count(*) from spare`), "a backup that has it")
		})
	}
}

// tree is what lies in a folder: names, sizes, times and owners.
func (a *archived) tree(dir string) string {
	a.t.Helper()
	out, err := exec.Command("find", dir, "-printf", "%P %y %m %s %T@ %U\n").CombinedOutput()
	require.NoError(a.t, err, "%s", out)
	return string(out)
}

// A process that is killed at any place leaves no PostgreSQL running, no half backup, and what it leaves is found and removed.
func TestKilledAtEveryPlace(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	ctx := t.Context()
	base := func() (names []string) {
		for _, e := range must(os.ReadDir(a.repository("base"))) {
			names = append(names, e.Name())
		}
		return names
	}
	first, err := a.engine.Create(ctx, physical.CreateOptions{})
	require.NoError(t, err)
	a.exec(`create table deals as select 1 as id`)
	at := a.now()
	a.flush()
	places := 0
	for _, place := range failpoint.All {
		kind, _, _ := strings.Cut(place, ".")
		if kind != "physical" {
			continue
		}
		places++
		was := a.info()
		k := task{What: "recover", At: at}
		switch place {
		case "physical.copied", "physical.placed":
			k.What = "create"
		case "physical.whole", "physical.settled":
			k.Final = filepath.Join(a.dir, "stay", "postgres")
		case "physical.pruned":
			_, err := a.engine.Create(ctx, physical.CreateOptions{})
			require.NoError(t, err)
			was = a.info()
			require.Len(t, base(), 4, "what was killed before is swept away")
			was.Backups = was.Backups[1:]
			k.What, k.Labels = "prune", []string{first.Label}
		}
		code, said := a.child(k, place+"=exit")
		require.Equal(t, 137, code, "%s: %s", place, said)
		if k.What != "recover" {
			require.Equal(t, was.Backups, a.info().Backups, place)
			require.Greater(t, len(base()), 2*len(was.Backups), "%s: something is left to be swept away", place)
			if k.What == "prune" {
				require.NoError(t, a.engine.Prune(ctx, nil))
				require.Len(t, base(), 2)
				require.NoError(t, a.engine.Verify(ctx, was.Backups[0].Label, nil))
				at = a.now()
				a.flush()
			}
			continue
		}
		a.ended()
		left, err := physical.Leftovers(a.scratch())
		require.NoError(t, err)
		require.Len(t, left, 1, place)
		require.Equal(t, "a child", left[0].Why)
		require.Positive(t, left[0].Bytes)
		require.NoError(t, physical.RemoveLeftover(ctx, left[0].Dir))
		a.nothingLeft()
		if k.Final != "" {
			whole := len(must(filepath.Glob(k.Final)))
			require.Len(t, must(os.ReadDir(filepath.Dir(k.Final))), whole, "%s: it is in its place, or not there", place)
			require.Equal(t, place == "physical.settled", whole == 1, place)
		}
	}
	require.Equal(t, 9, places)
	require.Equal(t, 1, a.counted(physical.Target{Time: at}, `select count(*) from deals`))
}

// meddling is an engine with which something happens in the middle.
type meddling struct {
	physical.Engine
	before, after func()
	restore       string
	change        func(*physical.Info)
}

func (m meddling) Info(ctx context.Context) (physical.Info, error) {
	i, err := m.Engine.Info(ctx)
	if m.change != nil {
		m.change(&i)
	}
	return i, err
}

func (m meddling) Fetch(ctx context.Context, b physical.Backup, dir string, only []string, report func(physical.Progress)) error {
	if m.before != nil {
		m.before()
	}
	err := m.Engine.Fetch(ctx, b, dir, only, report)
	if m.after != nil {
		m.after()
	}
	return err
}

func (m meddling) RestoreCommand() string {
	if m.restore != "" {
		return m.restore
	}
	return m.Engine.RestoreCommand()
}

// Whoever interrupts a recovery or a backup finds nothing of it, in whatever phase it was.
func TestInterruptedInEveryPhase(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	_, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	at := a.now()
	a.flush()
	mark := filepath.Join(a.dir, "marks")
	require.NoError(t, os.Mkdir(mark, 0o777))
	require.NoError(t, os.Chmod(mark, 0o777))
	mark = filepath.Join(mark, "replaying")
	for phase, interrupt := range map[string]func(cancel func()) (meddling, func(physical.Progress)){
		"fetch": func(cancel func()) (meddling, func(physical.Progress)) { return meddling{before: cancel}, nil },
		"start": func(cancel func()) (meddling, func(physical.Progress)) { return meddling{after: cancel}, nil },
		"verify": func(cancel func()) (meddling, func(physical.Progress)) {
			return meddling{}, func(p physical.Progress) {
				if p.Phase == physical.PhaseVerify {
					cancel()
				}
			}
		},
		"replay": func(cancel func()) (meddling, func(physical.Progress)) {
			return meddling{restore: "touch '" + mark + "'; sleep 600", after: func() {
				go func() {
					for {
						if _, err := os.Lstat(mark); err == nil || t.Context().Err() != nil {
							cancel()
							return
						}
						time.Sleep(10 * time.Millisecond)
					}
				}()
			}}, nil
		},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		m, report := interrupt(cancel)
		m.Engine = a.engine
		_, err := physical.Recover(ctx, m, physical.RecoverOptions{Dir: a.scratch(), Target: physical.Target{Time: at}, Role: "postgres", Database: "postgres", Report: report})
		require.ErrorIs(t, err, context.Canceled, phase)
		cancel()
		a.ended()
		a.nothingLeft()
	}
	was := must(os.ReadDir(a.repository("base")))
	a.exec(`alter system set archive_command = 'false'`)
	a.exec(`select pg_reload_conf()`)
	for phase, wait := range map[string]string{"copy": "PG_VERSION", "archive": "global/pg_control"} {
		ctx, cancel := context.WithCancel(t.Context())
		go func() {
			for {
				if found, _ := filepath.Glob(a.repository("base", ".*.part", wait)); len(found) > 0 || t.Context().Err() != nil {
					cancel()
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}()
		_, err := a.engine.Create(ctx, physical.CreateOptions{})
		require.ErrorIs(t, err, context.Canceled, phase)
		require.Equal(t, len(was), len(must(os.ReadDir(a.repository("base")))), phase)
	}
}

// What the repository lacks or does not hold whole is said, and is never taken for the end of the WAL.
func TestWhatIsMissingOrDamagedIsNoMoment(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	ctx := t.Context()
	o := physical.RecoverOptions{Target: physical.Target{Time: a.now()}}
	a.cannot(o, fault.NotFound, "no_physical_backup")
	b, err := a.engine.Create(ctx, physical.CreateOptions{})
	require.NoError(t, err)
	a.cannot(o, fault.NotFound, "before_first_backup")
	a.exec(`create table deals (id int primary key)`)
	var moments []time.Time
	var segments []string
	for i := range 3 {
		a.exec(`insert into deals values ($1)`, i)
		moments = append(moments, a.now())
		a.flush()
		var last string
		require.NoError(t, a.conn.QueryRow(ctx, `select last_archived_wal from pg_stat_archiver`).Scan(&last))
		segments = append(segments, a.repository("wal", last[:24]+".gz"))
	}
	ask := func(i int) physical.RecoverOptions {
		return physical.RecoverOptions{Target: physical.Target{Time: moments[i]}}
	}

	// A file of the backup.
	control := a.repository("base", b.Label, "global", "pg_control")
	a.damaged(control, func() {
		f := a.faultOf(a.engine.Verify(ctx, b.Label, nil), fault.Unfit, "damaged")
		require.Contains(t, f.Message, "global/pg_control")
		a.cannot(ask(0), fault.Unfit, "damaged")
	})
	require.NoError(t, os.Rename(control, control+".away"))
	a.faultOf(a.engine.Verify(ctx, b.Label, nil), fault.Unfit, "damaged")
	require.NoError(t, os.Rename(control+".away", control))
	a.damaged(a.repository("base", b.Label, "backup_manifest"), func() { a.faultOf(a.engine.Verify(ctx, b.Label, nil), fault.Unfit, "damaged") })
	require.NoError(t, a.engine.Verify(ctx, b.Label, nil))

	// WAL: the moment before it is reached, those behind it are not.
	a.damaged(segments[1], func() {
		f := a.faultOf(a.engine.Verify(ctx, b.Label, nil), fault.Unfit, "damaged")
		require.Contains(t, f.Message, filepath.Base(segments[1])[:24])
		f = a.cannot(ask(2), fault.Unfit, "damaged")
		require.Contains(t, f.Message, filepath.Base(segments[1])[:24])
		require.Equal(t, 1, a.counted(ask(0).Target, `select count(*) from deals`))
	})
	a.archivedAs(segments[1], func(whole []byte) []byte { return whole[:len(whole)/2] }, 200)
	a.archivedAs(segments[1], func([]byte) []byte { return nil }, 200)
	require.NoError(t, os.Rename(segments[1], segments[1]+".away"))
	require.Len(t, a.info().Windows(), 1)
	f := a.cannot(ask(2), fault.NotFound, "wal_missing")
	require.Contains(t, f.Hint, "what can be reached")
	require.Equal(t, 1, a.counted(ask(0).Target, `select count(*) from deals`))
	require.NoError(t, os.Rename(segments[1]+".away", segments[1]))

	// A disk that is full is neither.
	a.engine = meddling{Engine: a.engine, change: func(i *physical.Info) { i.Backups[0].Bytes = 1 << 50 }}
	a.cannot(ask(0), fault.Unavailable, "disk_full")
	a.engine = a.engine.(meddling).Engine

	// Without the live server, all that was archived can be reached, and what cannot is told.
	_, err = a.conn.Exec(ctx, `select pg_current_xact_id()`) // is not archived
	require.NoError(t, err)
	require.NoError(t, a.server.Kill())
	f = a.cannot(physical.RecoverOptions{Target: physical.Target{Time: time.Now()}}, fault.NotFound, "target_not_reached")
	_, said, ok := strings.Cut(f.Message, "was committed at ")
	require.True(t, ok, f.Message)
	last, err := physical.ParseTime(said, time.Now(), time.UTC)
	require.NoError(t, err)
	require.True(t, last.After(moments[2]))
	require.Equal(t, 3, a.counted(physical.Target{Time: last}, `select count(*) from deals`))
	require.Equal(t, 3, a.counted(ask(2).Target, `select count(*) from deals`))
}

// archivedAs has the restore script give out a file of WAL that is another one, and tells with what it ends.
func (a *archived) archivedAs(path string, change func([]byte) []byte, code int) {
	a.t.Helper()
	was := must(os.ReadFile(path))
	require.NoError(a.t, os.WriteFile(path, change(was), 0o600))
	to := filepath.Join(a.dir, "given")
	cmd := exec.Command("sh", "-c", strings.NewReplacer("%f", filepath.Base(path)[:24], "%p", to).Replace(a.engine.RestoreCommand()))
	out, _ := cmd.CombinedOutput()
	require.Equal(a.t, code, cmd.ProcessState.ExitCode(), "%s", out)
	require.NoError(a.t, os.WriteFile(path, was, 0o600))
}

// A disk that is full in the middle of the replay is told as that, not as damaged WAL, and what was there is gone.
func TestADiskThatIsFullInTheReplay(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	_, err := a.engine.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
	a.exec(`create table noise as select md5(g::text) from generate_series(1, 300000) g`) // more than there is room for
	at := a.now()
	a.flush()
	small := filepath.Join(a.dir, "small")
	require.NoError(t, os.Mkdir(small, 0o755))
	code, said := a.child(task{What: "fill", Scratch: filepath.Join(small, "scratch"), At: at}, "")
	require.Zero(t, code, said)
	require.True(t, strings.HasPrefix(said, "disk_full "), said)
}

// Recoveries do not disturb each other, to the same moment or another; backups of one cluster come one after the other.
func TestTwoAtOnce(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	ctx := t.Context()
	var second []error
	b, err := a.engine.Create(ctx, physical.CreateOptions{Report: func(physical.Progress) {
		_, err := a.engine.Create(ctx, physical.CreateOptions{})
		second = append(second, err, a.engine.Prune(ctx, nil))
	}})
	require.NoError(t, err)
	require.NotEmpty(t, second)
	for _, err := range second {
		a.faultOf(err, fault.Locked, "physical_busy")
	}
	require.Len(t, a.info().Backups, 1)
	require.Equal(t, b.Label, a.info().Backups[0].Label)

	a.exec(`create table deals (id int primary key)`)
	var moments []time.Time
	for i := range 2 {
		a.exec(`insert into deals values ($1)`, i)
		moments = append(moments, a.now())
	}
	a.flush()
	moments = append(moments, moments[0]) // twice
	found := make([]*physical.Cluster, len(moments))
	errs := make([]error, len(moments))
	var all sync.WaitGroup
	for i, at := range moments {
		all.Go(func() { found[i], errs[i] = a.recover(physical.Target{Time: at}) })
	}
	all.Wait()
	require.NoError(t, errors.Join(errs...))
	for i, want := range []int{1, 2, 1} {
		n, err := count(t, found[i], "postgres", `select count(*) from deals`)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	for _, c := range found {
		require.NoError(t, c.Close(context.Background()))
	}
	a.nothingLeft()
}

// Two clusters never archive into one folder; what one has archived already, before it crashed, it may archive again.
func TestOneRepositoryIsOneClusters(t *testing.T) {
	t.Parallel()
	a, other := withFiles(t), withFiles(t)
	stranger := must(physical.NewFiles(physical.FilesOptions{Dir: a.repository(), URL: other.server.URL("postgres")}))
	a.faultOf(stranger.Prepare(t.Context()), fault.Conflict, "other_cluster")
	_, err := stranger.Create(t.Context(), physical.CreateOptions{})
	a.faultOf(err, fault.Conflict, "other_cluster")

	const name = "0000000100000000000000AA"
	file := filepath.Join(a.dir, "segment")
	archive := func(text string) (code int) {
		t.Helper()
		require.NoError(t, os.WriteFile(file, []byte(text), 0o644))
		cmd := exec.Command(a.repository("archive"), file, name)
		out, _ := cmd.CombinedOutput()
		if code = cmd.ProcessState.ExitCode(); code != 0 {
			require.Contains(t, string(out), "two clusters must not archive to one folder")
		}
		return code
	}
	require.Zero(t, archive("one"))
	kept := must(os.ReadFile(a.repository("wal", name+".gz")))
	require.Zero(t, archive("one"))
	require.NotZero(t, archive("other"))
	require.NotZero(t, archive("on"))
	require.Equal(t, kept, must(os.ReadFile(a.repository("wal", name+".gz"))))
	a.archivedAs(a.repository("wal", name+".gz"), func(b []byte) []byte { return b }, 0)
	require.Equal(t, "one", string(must(os.ReadFile(filepath.Join(a.dir, "given")))))
	require.Empty(t, must(filepath.Glob(a.repository("wal", ".*"))), "nothing half made is left")
}

// A recovered cluster takes the live one's place, and archives into the same repository. Moments before and behind the switch are reached
// along the new timeline; what the old one had behind the switch is not in it.
func TestAMomentBeyondAPromotion(t *testing.T) {
	t.Parallel()
	a := withFiles(t)
	ctx := t.Context()
	b, err := a.engine.Create(ctx, physical.CreateOptions{})
	require.NoError(t, err)
	a.exec(`create table deals (id int primary key)`)
	a.exec(`insert into deals values (1)`)
	before := a.now()
	a.exec(`insert into deals values (2)`)
	back := a.now()
	a.exec(`insert into deals values (100)`) // of the history that is left
	a.flush()
	require.NoError(t, a.server.Stop(ctx))

	// As an operator does it.
	next := filepath.Join(a.dir, "next")
	require.NoError(t, os.Mkdir(next, 0o755))
	out, err := exec.Command("cp", "--archive", a.repository("base", b.Label), filepath.Join(next, "postgres")).CombinedOutput()
	require.NoError(t, err, "%s", out)
	signal := filepath.Join(next, "postgres", "recovery.signal")
	require.NoError(t, os.WriteFile(signal, nil, 0o644))
	own, err := exec.Command("chown", "--reference="+filepath.Join(next, "postgres"), signal).CombinedOutput()
	require.NoError(t, err, "%s", own)
	plan, err := a.engine.Plan(ctx)
	require.NoError(t, err)
	settings := plan.Settings
	for k, v := range map[string]string{
		"autovacuum": "off", "archive_timeout": "0", "restore_command": a.engine.RestoreCommand(), "recovery_target_action": "promote",
		"recovery_target_time": back.UTC().Format("2006-01-02 15:04:05.000000+00"),
	} {
		settings[k] = v
	}
	a.server, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: next, Fast: true, Trust: true, Settings: settings})
	require.NoError(t, err)
	defer func() { require.NoError(t, a.server.Stop(context.Background())) }()
	a.connect()
	require.Eventually(t, func() (promoted bool) {
		require.NoError(t, a.conn.QueryRow(ctx, `select not pg_is_in_recovery()`).Scan(&promoted))
		return promoted
	}, 2*time.Minute, 20*time.Millisecond)
	a.engine = must(physical.NewFiles(physical.FilesOptions{Dir: a.repository(), URL: a.server.URL("postgres")}))
	a.exec(`insert into deals values (3)`)
	behind := a.now()
	a.exec(`delete from deals`)
	a.flush()

	require.Len(t, a.info().Windows(), 1)
	require.Equal(t, 1, a.counted(physical.Target{Time: before}, `select sum(id) from deals`))
	require.Equal(t, 6, a.counted(physical.Target{Time: behind}, `select sum(id) from deals`))
	require.NoError(t, a.engine.Verify(ctx, b.Label, nil))
	again, err := a.engine.Create(ctx, physical.CreateOptions{})
	require.NoError(t, err)
	require.EqualValues(t, 2, again.Timeline)
	a.exec(`insert into deals values (7)`)
	last := a.now()
	a.flush()
	require.Equal(t, 7, a.counted(physical.Target{Time: last}, `select sum(id) from deals`))
	require.NoError(t, a.engine.Prune(ctx, []string{b.Label}))
	require.NoError(t, a.engine.Verify(ctx, again.Label, nil))
	require.Equal(t, 7, a.counted(physical.Target{Time: last}, `select sum(id) from deals`))
}
