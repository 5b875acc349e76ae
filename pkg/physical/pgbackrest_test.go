package physical_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// withPgBackRest starts a cluster and does with it what the plan says.
func withPgBackRest(t *testing.T) *archived {
	t.Helper()
	_, err := exec.LookPath("pgbackrest")
	require.NoError(t, err, "scripts/setup.sh --ci installs pgBackRest")
	dir, err := os.MkdirTemp("", "physical-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	// Replay over databases that are left out needs whole pages, as every cluster has them.
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true, Settings: map[string]string{"autovacuum": "off", "full_page_writes": "on"}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, pg.Stop(context.Background())) })
	a := &archived{t: t, dir: dir, server: pg}
	a.connect()
	a.exec(`create role pgbackrest login`)
	a.engine = must(physical.NewPgBackRest(physical.PgBackRestOptions{Dir: filepath.Join(dir, "repository"), URL: pg.URL("postgres"), User: "pgbackrest"}))
	plan, err := a.engine.Plan(t.Context())
	require.NoError(t, err)
	require.Contains(t, plan.Files[a.repository("pgbackrest.conf")], "pg1-path="+filepath.Join(dir, "postgres")+"\n")
	for _, sql := range plan.SQL {
		a.exec(sql)
	}
	require.Empty(t, a.info()) // and no error
	require.NoError(t, a.engine.Prepare(t.Context()))
	require.Equal(t, plan.Files[a.repository("pgbackrest.conf")], string(must(os.ReadFile(a.repository("pgbackrest.conf")))))
	for name, value := range plan.Settings {
		if name == "archive_timeout" { // tests say when
			value = "0"
		}
		a.exec(fmt.Sprintf(`alter system set %s = '%s'`, name, strings.ReplaceAll(value, `'`, `''`)))
	}
	require.NoError(t, a.conn.Close(t.Context()))
	require.NoError(t, pg.Restart(t.Context()))
	a.connect()
	return a
}

func (a *archived) connect() {
	a.t.Helper()
	var err error
	a.conn, err = pgx.Connect(a.t.Context(), a.server.URL("postgres"))
	require.NoError(a.t, err)
	conn := a.conn
	a.t.Cleanup(func() { _ = conn.Close(context.Background()) })
}

func (a *archived) repository(parts ...string) string {
	return filepath.Join(append([]string{a.dir, "repository"}, parts...)...)
}

func (a *archived) info() physical.Info {
	a.t.Helper()
	return must(a.engine.Info(a.t.Context()))
}

func (a *archived) create(kind physical.Kind) physical.Backup {
	a.t.Helper()
	b, err := a.engine.Create(a.t.Context(), physical.CreateOptions{Kind: kind})
	require.NoError(a.t, err)
	require.Equal(a.t, kind, b.Kind)
	require.Empty(a.t, b.Bad)
	require.Less(a.t, b.StartLSN, b.StopLSN)
	return b
}

// after waits until a backup's last second is over.
func (a *archived) after(b physical.Backup) {
	a.t.Helper()
	a.exec(`select pg_sleep_until($1)`, b.Stop)
}

func (a *archived) faultOf(err error, kind fault.Kind, code string) *fault.Fault {
	a.t.Helper()
	require.Error(a.t, err)
	f := fault.Of(err)
	require.Equal(a.t, kind, f.Kind, "%v", err)
	require.Equal(a.t, code, f.Code, "%v", err)
	return f
}

// glob is the one file of that pattern.
func (a *archived) glob(pattern ...string) string {
	a.t.Helper()
	found := must(filepath.Glob(filepath.Join(pattern...)))
	require.Len(a.t, found, 1)
	return found[0]
}

// damaged runs a check while one byte of a file is another.
func (a *archived) damaged(path string, check func()) {
	a.t.Helper()
	was := must(os.ReadFile(path))
	bad := slices.Clone(was)
	bad[len(bad)/2] ^= 0xff
	require.NoError(a.t, os.WriteFile(path, bad, 0o600)) // its owner stays
	check()
	require.NoError(a.t, os.WriteFile(path, was, 0o600))
}

// count asks a recovered cluster.
func count(t *testing.T, c *physical.Cluster, database, sql string) (n int, err error) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), c.URL("postgres", database))
	if err != nil {
		return 0, err
	}
	defer conn.Close(context.Background())
	return n, conn.QueryRow(t.Context(), sql).Scan(&n)
}

func TestPgBackRestBringsAMomentBack(t *testing.T) {
	t.Parallel()
	a := withPgBackRest(t)
	ctx := t.Context()
	settings := must(os.ReadFile(a.repository("pgbackrest.conf")))
	// What the operator adds stays, and none of it leads a copy out of its folder, or leaves anything out of it.
	live := filepath.Join(a.dir, "live-tablespace")
	require.NoError(t, os.WriteFile(a.repository("pgbackrest.conf"), append(settings, `
[global:restore]
delta=y
link-all=y
db-exclude=crm
tablespace-map=spare=`+live+`
recovery-option=primary_conninfo=elsewhere
`...), 0o600))
	require.NoError(t, a.engine.Prepare(ctx))
	require.Contains(t, string(must(os.ReadFile(a.repository("pgbackrest.conf")))), "[global:restore]")

	require.NoError(t, os.Mkdir(live, 0o755))
	own, err := exec.Command("chown", "--reference="+filepath.Join(a.dir, "postgres"), live).CombinedOutput()
	require.NoError(t, err, "%s", own)
	a.exec(`create tablespace spare location '` + live + `'`)
	a.exec(`create database crm`)
	a.exec(`create database side`)
	crm, err := pgx.Connect(ctx, a.server.URL("crm"))
	require.NoError(t, err)
	defer crm.Close(context.Background())
	side, err := pgx.Connect(ctx, a.server.URL("side"))
	require.NoError(t, err)
	defer side.Close(context.Background())
	exec := func(c *pgx.Conn, sql string) {
		t.Helper()
		_, err := c.Exec(ctx, sql)
		require.NoError(t, err)
	}
	exec(crm, `create table deals as select id from generate_series(1, 1000) id`)
	exec(crm, `create table spare tablespace spare as select 1 as id`)
	exec(side, `create table deals as select id from generate_series(1, 1000) id`)

	var last physical.Progress
	full, err := a.engine.Create(ctx, physical.CreateOptions{Report: func(p physical.Progress) {
		require.GreaterOrEqual(t, p.Done, last.Done)
		last = p
	}})
	require.NoError(t, err)
	var system string
	require.NoError(t, a.conn.QueryRow(ctx, `select system_identifier::text from pg_control_system()`).Scan(&system))
	require.Equal(t, physical.Backup{Label: full.Label, Kind: physical.Full, Start: full.Start, Stop: full.Stop, StartLSN: full.StartLSN, StopLSN: full.StopLSN,
		Timeline: 1, Bytes: full.Bytes, Stored: full.Stored, System: system, Major: full.Major}, full)
	require.Equal(t, physical.PhaseCopy, last.Phase)
	require.Equal(t, last.Total, last.Done)
	require.InEpsilon(t, full.Bytes, last.Total, 0.05)
	exec(crm, `insert into deals values (1001)`)
	diff := a.create(physical.Differential)
	require.Equal(t, full.Label, diff.Prior)
	require.Less(t, diff.Stored, full.Stored)
	a.after(diff)
	exec(side, `insert into deals values (1001)`)
	exec(crm, `insert into deals values (1002)`)
	before := a.now()
	exec(crm, `delete from deals`)
	a.flush()
	incr := a.create(physical.Incremental)
	require.Equal(t, diff.Label, incr.Prior)

	// The moment is reached, with the one database that is asked for.
	fetched := int64(0)
	c, err := physical.Recover(ctx, a.engine, physical.RecoverOptions{
		Dir: filepath.Join(a.dir, "scratch"), Target: physical.Target{Time: before}, Role: "postgres", Database: "postgres", Only: []string{"crm"}, Why: t.Name(),
		Report: func(p physical.Progress) {
			if p.Phase == physical.PhaseFetch {
				fetched = p.Done
			}
		},
	})
	require.NoError(t, err)
	require.Equal(t, diff.Label, c.Backup.Label)
	require.Positive(t, fetched)
	n, err := count(t, c, "crm", `select count(*) from deals`)
	require.NoError(t, err)
	require.Equal(t, 1002, n)
	n, err = count(t, c, "crm", `select count(*) from spare`)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	_, err = count(t, c, "side", `select count(*) from deals`)
	require.Error(t, err, "nobody asked for side")
	n, err = count(t, c, "postgres", `select count(*) from pg_database where pg_tablespace_location(dattablespace) like '%live%'`)
	require.NoError(t, err)
	require.Zero(t, n)
	require.NoError(t, crm.QueryRow(ctx, `select count(*) from deals`).Scan(&n))
	require.Zero(t, n)
	require.NoError(t, c.Close(context.Background()))
	require.Empty(t, must(os.ReadDir(filepath.Join(a.dir, "scratch"))))

	// One that is to stay has its tablespaces beside it.
	next := filepath.Join(a.dir, "next")
	c, err = physical.Recover(ctx, a.engine, physical.RecoverOptions{
		Dir: filepath.Join(a.dir, "scratch"), Target: physical.Target{Time: before}, Role: "postgres", Database: "postgres", Final: filepath.Join(next, "postgres"),
	})
	require.NoError(t, err)
	_, err = c.Settle(ctx, nil)
	require.NoError(t, err)
	require.NoError(t, c.Close(context.Background()))
	names, err := filepath.Glob(filepath.Join(next, "*"))
	require.NoError(t, err)
	require.Equal(t, []string{filepath.Join(next, "postgres"), filepath.Join(next, "postgres-tablespaces")}, names)
	stays, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: next, Trust: true})
	require.NoError(t, err)
	conn, err := pgx.Connect(ctx, stays.URL("crm"))
	require.NoError(t, err)
	require.NoError(t, conn.QueryRow(ctx, `select (select count(*) from spare) + (select count(*) from deals)`).Scan(&n))
	require.Equal(t, 1003, n)
	require.NoError(t, conn.Close(ctx))
	require.NoError(t, stays.Stop(context.Background()))

	info := a.info()
	require.Equal(t, []physical.Backup{full, diff, incr}, info.Backups)
	require.Equal(t, system, info.System)
	require.Len(t, info.WAL, 1)
	require.NoError(t, a.engine.Verify(ctx, diff.Label, nil))
	a.missingWAL(info, diff, incr)
	a.damage(full, diff)
	a.strangers()
	a.prune(full, diff, incr)
}

// missingWAL takes one segment away that lies between two backups.
func (a *archived) missingWAL(info physical.Info, diff, incr physical.Backup) {
	t := a.t
	name := (incr.StartLSN - physical.SegmentSize).Segment(1, physical.SegmentSize)
	require.Greater(t, name, diff.StopLSN.Segment(1, physical.SegmentSize))
	path := a.glob(a.repository("archive/oneo/*/*"), name+"-*")
	require.NoError(t, os.Rename(path, path+".away"))
	gap := a.info()
	require.Len(t, gap.WAL, 2)
	require.Equal(t, info.WAL[0].First, gap.WAL[0].First)
	require.Less(t, gap.WAL[0].Last, name)
	require.Greater(t, gap.WAL[1].First, name)
	require.Equal(t, info.WAL[0].Last, gap.WAL[1].Last)
	require.Len(t, gap.Windows(), 2)
	// Two that differ are none.
	require.NoError(t, os.Rename(path+".away", path))
	twin := strings.Replace(path, name+"-", name+"-0", 1)
	twin = strings.Replace(twin, filepath.Ext(twin), "", 1)
	twin = twin[:len(twin)-1] + filepath.Ext(path)
	require.NoError(t, os.WriteFile(twin, nil, 0o644))
	require.Equal(t, gap.WAL, a.info().WAL)
	require.NoError(t, os.Remove(twin))
	require.Equal(t, info, a.info())
}

// damage changes a byte of what is stored.
func (a *archived) damage(full, diff physical.Backup) {
	t, ctx := a.t, a.t.Context()
	data := filepath.Join(a.dir, "damaged")
	require.NoError(t, os.Mkdir(data, 0o700))
	own, err := exec.Command("chown", "--reference="+filepath.Join(a.dir, "postgres"), data).CombinedOutput()
	require.NoError(t, err, "%s", own)
	a.damaged(a.repository("backup/oneo", full.Label, "bundle/1"), func() {
		for _, b := range []physical.Backup{full, diff} {
			f := a.faultOf(a.engine.Verify(ctx, b.Label, nil), fault.Unfit, "damaged")
			require.Contains(t, f.Message, full.Label+"/pg_data/")
		}
		a.faultOf(a.engine.Fetch(ctx, diff, data, nil, nil), fault.Unfit, "damaged")
		require.NoDirExists(t, data+"-tablespaces")
	})
	// What half arrived is not taken for a copy.
	a.faultOf(a.engine.Fetch(ctx, diff, data, nil, nil), fault.Conflict, "not_empty")
	require.NoDirExists(t, data+"-tablespaces")
	wal := diff.StartLSN.Segment(1, physical.SegmentSize)
	a.damaged(a.glob(a.repository("archive/oneo/*/*"), wal+"-*"), func() {
		f := a.faultOf(a.engine.Verify(ctx, diff.Label, nil), fault.Unfit, "damaged")
		require.Contains(t, f.Message, wal)
		// That it cannot be read is not that it is not there.
		cmd := exec.Command("sh", "-c", strings.NewReplacer("%f", wal, "%p", filepath.Join(a.dir, "fetched")).Replace(a.engine.RestoreCommand()))
		cmd.Dir = filepath.Join(a.dir, "postgres")
		require.Error(t, cmd.Run())
		require.Equal(t, 200, cmd.ProcessState.ExitCode())
	})
	cmd := exec.Command("sh", "-c", strings.NewReplacer("%f", "00000009.history", "%p", filepath.Join(a.dir, "fetched")).Replace(a.engine.RestoreCommand()))
	cmd.Dir = filepath.Join(a.dir, "postgres")
	require.Error(t, cmd.Run())
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.NoError(t, a.engine.Verify(ctx, diff.Label, nil))
	a.faultOf(a.engine.Verify(ctx, "20200101-000000F", nil), fault.NotFound, "backup_not_found")
}

// strangers are another cluster, and settings that say no secret.
func (a *archived) strangers() {
	t, ctx := a.t, a.t.Context()
	dir := filepath.Join(a.dir, "other")
	require.NoError(t, os.Mkdir(dir, 0o755))
	other, err := devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true})
	require.NoError(t, err)
	defer func() { require.NoError(t, other.Stop(context.Background())) }()
	settings := string(must(os.ReadFile(a.repository("pgbackrest.conf"))))
	settings = strings.ReplaceAll(settings, "pg1-path="+a.dir, "pg1-path="+dir)
	settings = strings.ReplaceAll(settings, "pg1-socket-path="+a.dir, "pg1-socket-path="+dir)
	settings = strings.ReplaceAll(settings, fmt.Sprint("pg1-port=", a.server.Port()), fmt.Sprint("pg1-port=", other.Port()))
	settings = strings.ReplaceAll(settings, "pg1-user=pgbackrest", "pg1-user=postgres")
	path := filepath.Join(dir, "pgbackrest.conf")
	require.NoError(t, os.WriteFile(path, []byte(settings), 0o644))
	e := must(physical.NewPgBackRest(physical.PgBackRestOptions{Dir: a.repository(), URL: other.URL("postgres"), Config: path}))
	a.faultOf(e.Prepare(ctx), fault.Conflict, "other_cluster")
	_, err = e.Create(ctx, physical.CreateOptions{})
	a.faultOf(err, fault.Conflict, "other_cluster")
	require.NoError(t, os.WriteFile(path, []byte("repo1-cipher-pass=hush\n"+settings), 0o644))
	_, err = e.Info(ctx)
	require.NotContains(t, fmt.Sprint(a.faultOf(err, fault.Unavailable, "physical_program")), "hush")
}

// prune removes the first set of backups when there is a second.
func (a *archived) prune(full, diff, incr physical.Backup) {
	t, ctx := a.t, a.t.Context()
	all := []string{full.Label, diff.Label, incr.Label}
	a.faultOf(a.engine.Prune(ctx, all), fault.Conflict, "backup_needed") // the last full one
	// One that is broken off in the middle is none.
	cctx, cancel := context.WithCancel(ctx)
	defer cancel()
	_, err := a.engine.Create(cctx, physical.CreateOptions{Report: func(physical.Progress) { cancel() }})
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, []physical.Backup{full, diff, incr}, a.info().Backups)
	next := a.create(physical.Full)
	a.faultOf(a.engine.Prune(ctx, []string{diff.Label}), fault.Conflict, "backup_needed")
	a.faultOf(a.engine.Prune(ctx, []string{incr.Label, "20200101-000000F"}), fault.NotFound, "backup_not_found")
	was := a.info()
	require.Len(t, was.Backups, 4)
	require.NoError(t, a.engine.Prune(ctx, []string{incr.Label}))
	got := a.info()
	require.Equal(t, []physical.Backup{full, diff, next}, got.Backups)
	require.Len(t, got.WAL, 1)
	require.Equal(t, full.StartLSN.Segment(1, physical.SegmentSize), got.WAL[0].First)
	require.Equal(t, was.WAL[0].Last, got.WAL[0].Last)
	require.NoError(t, a.engine.Prune(ctx, []string{diff.Label, full.Label}))
	got = a.info()
	require.Equal(t, []physical.Backup{next}, got.Backups)
	require.Len(t, got.WAL, 1)
	require.Equal(t, next.StartLSN.Segment(1, physical.SegmentSize), got.WAL[0].First)
	require.Equal(t, was.WAL[0].Last, got.WAL[0].Last)
}
