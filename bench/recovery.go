package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

const (
	recoveryTenants = 500
	recoveryTurns   = 3
	takenRecords    = 220_000 // of the tenant that is taken back: about 100 MB
	otherRecords    = 8_000   // of each other one: all of them about 2 GB
	steadyRate      = 100     // requests a second of the others
)

// recovery measures how one tenant is taken back to a moment out of a large cluster, beside the same done by hand, what the others
// feel of it, and what archiving costs.
func (b *bench) recovery(ctx context.Context) (err error) {
	own := *b
	dir := filepath.Join(b.dir, "archived")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	repository := filepath.Join(dir, "physical")
	files, err := physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(repository, "main")})
	if err != nil {
		return err
	}
	plan, err := files.Plan(ctx)
	if err != nil {
		return err
	}
	settings := map[string]string{"shared_buffers": "1GB", "max_connections": "200", "max_locks_per_transaction": "256", "max_wal_size": "4GB"}
	maps.Copy(settings, plan.Settings)
	if own.pg, err = devstack.StartPostgres(ctx, devstack.PostgresOptions{Dir: dir, Trust: true, Settings: settings}); err != nil {
		return err
	}
	defer own.pg.Stop(context.WithoutCancel(ctx))
	in, err := own.install(ctx, "bench_recovery", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	b.tell("recovery: %d tenants", recoveryTenants)
	if err := in.grow(ctx, recoveryTenants); err != nil {
		return err
	}
	admin, err := pgx.Connect(ctx, own.pg.URL("bench_recovery"))
	if err != nil {
		return err
	}
	defer admin.Close(context.WithoutCancel(ctx))
	for i, slug := range in.slugs {
		n := otherRecords
		if i == 0 {
			n = takenRecords
		}
		const many = `insert into %[1]s.records (id, pipeline_id, data)
select gen_random_uuid(), p.id, jsonb_build_object('stage', 'Won', 'amount', g, 'note', md5(g::text) || repeat('x', 150)) from %[1]s.pipelines p, generate_series(1, $1::int) g`
		if _, err := admin.Exec(ctx, fmt.Sprintf(many, slug), n); err != nil {
			return err
		}
	}
	for _, grant := range physical.Grants("oneo_owner") {
		if _, err := admin.Exec(ctx, grant); err != nil {
			return err
		}
	}
	env := in.environment("ONEO_BACKUP_PHYSICAL_ENGINE=files", "ONEO_BACKUP_PHYSICAL_DIR="+repository)
	oneo := func(args ...string) (answer, story []byte, took time.Duration, err error) {
		cmd := exec.CommandContext(ctx, b.binary, args...)
		cmd.Env = env
		var out, problems bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &problems
		start := time.Now()
		if err = cmd.Run(); err != nil {
			err = fmt.Errorf("oneo %s: %w: %s", strings.Join(args, " "), err, problems.String())
		}
		return out.Bytes(), problems.Bytes(), time.Since(start), err
	}
	if files, err = physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(repository, "main"), URL: own.pg.URL("bench_recovery")}); err != nil {
		return err
	}
	if err := files.Prepare(ctx); err != nil {
		return err
	}
	b.tell("recovery: a physical backup")
	_, _, copied, err := oneo("backup", "physical", "create")
	if err != nil {
		return err
	}
	info, err := files.Info(ctx)
	if err != nil {
		return err
	}
	base := info.Backups[len(info.Backups)-1]
	// WAL behind it, as of a busy day.
	for _, slug := range in.slugs[1:101] {
		if _, err := admin.Exec(ctx, `update `+slug+`.records set data = data || '{"stage": "Lost"}'`); err != nil {
			return err
		}
	}
	var at time.Time
	if err := admin.QueryRow(ctx, `select clock_timestamp() from pg_sleep(0.01)`).Scan(&at); err != nil {
		return err
	}
	if _, err := admin.Exec(ctx, `select pg_sleep(0.01)`); err != nil {
		return err
	}
	p, err := in.serve(ctx)
	if err != nil {
		return err
	}
	defer p.stop()
	if _, err := in.drive(ctx, p, false, 2*time.Second); err != nil {
		return err
	}
	if err := physical.Flush(ctx, admin); err != nil {
		return err
	}
	if info, err = files.Info(ctx); err != nil {
		return err
	}
	others := everyone(recoveryTenants)[1:]
	beside := func(work func() error) (answers []answer, err error) {
		pctx, stop := context.WithCancel(ctx)
		done := make(chan struct{})
		go func() {
			defer close(done)
			answers = in.pace(pctx, p, steadyRate, shuffled(others))
		}()
		err = work()
		stop()
		<-done
		return answers, err
	}
	rest := func() error { pauseFor(ctx, b.duration); return ctx.Err() }
	var byOneo, byHand []time.Duration
	var ratios, slower []float64
	var phases []string
	var pauses []float64
	var tenants []float64
	for turn := range recoveryTurns {
		if _, err := admin.Exec(ctx, `delete from t00000.records`); err != nil {
			return err
		}
		alone, err := beside(rest)
		if err != nil {
			return err
		}
		b.tell("recovery: turn %d, oneo", turn+1)
		var answer, story []byte
		var took time.Duration
		var mine []time.Duration
		meanwhile, err := beside(func() (err error) {
			tctx, stop := context.WithCancel(ctx)
			done := make(chan struct{})
			go func() { defer close(done); mine = in.probe(tctx, p) }()
			answer, story, took, err = oneo("restore", "-t", "t00000", "--at", at.UTC().Format(time.RFC3339Nano), "--yes", "-o", "json", "--progress", "json")
			stop()
			<-done
			return err
		})
		if err != nil {
			return err
		}
		var n int
		if err := admin.QueryRow(ctx, `select count(*) from t00000.records`).Scan(&n); err != nil || n != takenRecords+recordsEach {
			return errors.Join(err, fmt.Errorf("%d records came back", n))
		}
		var restored struct {
			Pause float64 `json:"pause_ms"`
		}
		if err := json.Unmarshal(answer, &restored); err != nil {
			return err
		}
		pauses, phases = append(pauses, restored.Pause), phasesOf(story, took)
		tenants = append(tenants, ms(slowest(mine)))
		if _, err := admin.Exec(ctx, `delete from t00000.records`); err != nil {
			return err
		}
		b.tell("recovery: turn %d, by hand", turn+1)
		hand, err := own.recoverByHand(ctx, filepath.Join(repository, "main"), base, at)
		if err != nil {
			return err
		}
		byOneo, byHand = append(byOneo, took), append(byHand, hand)
		ratios = append(ratios, took.Seconds()/hand.Seconds())
		slower = append(slower, float64(summary(meanwhile, took).p99)/float64(summary(alone, b.duration).p99))
	}
	slices.Sort(ratios)
	slices.Sort(slower)
	slices.Sort(pauses)
	slices.Sort(tenants)
	b.printf("### One tenant of 100 MB to a moment, out of %d tenants and %d MB\n", recoveryTenants, base.Bytes>>20)
	b.printf("The physical backup took %.1f s. Behind it lie %d MB of WAL. By hand: cp, postgres with recovery settings, pg_dump, pg_restore in one transaction.\n", copied.Seconds(), info.Replayed(base)>>20)
	b.printf("| way | s | of by hand |\n| --- | --- | --- |")
	b.printf("| by hand | %.1f | 1.00 |", median(byHand).Seconds())
	b.printf("| oneo restore --at | %.1f | **%.2f** |\n", median(byOneo).Seconds(), ratios[len(ratios)/2])
	b.printf("Phases of the last one: %s.\n", strings.Join(phases, ", "))
	b.goal(ratios[len(ratios)/2] <= 1.2, "at most 1.2 times by hand", fmt.Sprintf("%.2f", ratios[len(ratios)/2]))
	b.printf("The gate was closed for %.1f ms (median); the tenant's own slowest answer meanwhile took %.0f ms.\n", pauses[len(pauses)/2], tenants[len(tenants)/2])
	b.goal(slower[len(slower)/2] <= 2, "the others' p99 during the whole recovery at most twice that without", fmt.Sprintf("%.1f times (%d requests a second over all)", slower[len(slower)/2], steadyRate))
	p.stop()
	return own.archiving(ctx, admin, plan)
}

func slowest(all []time.Duration) time.Duration {
	if len(all) == 0 {
		return 0
	}
	return slices.Max(all)
}

// probe asks for the tenant's list again and again.
func (in *installation) probe(ctx context.Context, p *process) (took []time.Duration) {
	for _, a := range in.pace(ctx, p, 20, []int{0}) {
		took = append(took, a.took)
	}
	return took
}

// phasesOf reads the lines of progress, and says how long each phase took.
func phasesOf(story []byte, total time.Duration) (told []string) {
	last := map[string]int64{}
	var order []string
	for line := range strings.Lines(string(story)) {
		var e struct {
			Phase string `json:"phase"`
			Took  int64  `json:"duration_ms"`
		}
		if json.Unmarshal([]byte(line), &e) != nil || e.Phase == "" {
			continue
		}
		if _, ok := last[e.Phase]; !ok {
			order = append(order, e.Phase)
		}
		last[e.Phase] = e.Took
	}
	left := total
	for _, name := range order {
		d := time.Duration(last[name]) * time.Millisecond
		left -= d
		told = append(told, fmt.Sprintf("%s %.1f s", name, d.Seconds()))
	}
	return append(told, fmt.Sprintf("the rest (flush, export, load, swap) %.1f s", left.Seconds()))
}

// recoverByHand does what an administrator does who has read the manual.
func (b *bench) recoverByHand(ctx context.Context, repository string, base physical.Backup, at time.Time) (time.Duration, error) {
	bin, err := pgserver.FindMajor(base.Major)
	if err != nil {
		return 0, err
	}
	live := b.pg.URL("bench_recovery")
	script := fmt.Sprintf(`set -eu
export PATH=%[1]s:$PATH PGUSER=postgres
run=%[2]s; rm -rf $run; mkdir -m 755 $run; chown postgres $run
psql -qX %[3]s -c 'select pg_current_xact_id()' -c 'select pg_switch_wal()' >/dev/null
setpriv --reuid=postgres --regid=postgres --clear-groups cp -a %[4]s/base/%[5]s $run/data
touch $run/data/recovery.signal; chown postgres $run/data/recovery.signal
printf 'max_connections=200\nmax_locks_per_transaction=256\n' >> $run/data/postgresql.conf
cd /
setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D $run/data -c archive_mode=off -c listen_addresses= -c unix_socket_directories=$run -c port=5433 \
	-c restore_command="'%[4]s/restore' \"%%p\" %%f" -c recovery_target_time='%[6]s' -c recovery_target_action=promote >$run/log 2>&1 &
pid=$!
until [ "$(psql -qtAX -h $run -p 5433 -d postgres -c 'select pg_is_in_recovery()' 2>/dev/null)" = f ]; do kill -0 $pid; sleep 0.2; done
pg_dump -h $run -p 5433 -d bench_recovery -Fc -Z1 -n t00000 -f $run/dump
kill -INT $pid; wait $pid || true
psql -qX %[3]s -c 'alter schema t00000 rename to t00000_was'
pg_restore --single-transaction -d %[3]s $run/dump
rm -rf $run
psql -qX %[3]s -c 'drop schema t00000 cascade' -c 'alter schema t00000_was rename to t00000' >/dev/null 2>&1
`, bin, filepath.Join(b.dir, "by-hand"), "'"+live+"'", repository, base.Label, at.UTC().Format("2006-01-02 15:04:05.000000+00"))
	// The last line puts things back and is not what is measured: its time is a few milliseconds.
	cmd := exec.CommandContext(ctx, "bash", "-c", script)
	start := time.Now()
	text, err := cmd.CombinedOutput()
	if err != nil {
		return 0, fmt.Errorf("by hand: %w: %s", err, text)
	}
	return time.Since(start), nil
}

// archiving measures a load of writes with the archive script and with an archive_command that does nothing, in turns.
func (b *bench) archiving(ctx context.Context, admin *pgx.Conn, plan physical.Plan) error {
	bin, err := pgserver.Find()
	if err != nil {
		return err
	}
	if _, err := admin.Exec(ctx, `create database bench_writes`); err != nil {
		return err
	}
	url := b.pg.URL("bench_writes")
	pgbench := func(args ...string) (string, error) {
		cmd := exec.CommandContext(ctx, filepath.Join(bin, "pgbench"), append(args, url)...)
		text, err := cmd.CombinedOutput()
		if err != nil {
			err = fmt.Errorf("pgbench: %w: %s", err, text)
		}
		return string(text), err
	}
	if _, err := pgbench("-i", "-q", "-s", "10"); err != nil {
		return err
	}
	turn := func(command string) (perSecond float64, err error) {
		if _, err := admin.Exec(ctx, "alter system set archive_command = '"+strings.ReplaceAll(command, "'", "''")+"'"); err != nil {
			return 0, err
		}
		if _, err := admin.Exec(ctx, `select pg_reload_conf()`); err != nil {
			return 0, err
		}
		if _, err := admin.Exec(ctx, `checkpoint`); err != nil {
			return 0, err
		}
		text, err := pgbench("-n", "-c", "8", "-j", "2", "-T", strconv.Itoa(max(4, int(b.duration.Seconds()))))
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(text) {
			if rest, ok := strings.CutPrefix(line, "tps = "); ok {
				return strconv.ParseFloat(strings.Fields(rest)[0], 64)
			}
		}
		return 0, fmt.Errorf("pgbench did not say how many: %s", text)
	}
	var with, without, ratios []float64
	for i := range 2 * recoveryTurns {
		var pair [2]float64
		for k := range 2 {
			which := (i + k) % 2
			if pair[which], err = turn([]string{"true", plan.Settings["archive_command"]}[which]); err != nil {
				return err
			}
		}
		without, with, ratios = append(without, pair[0]), append(with, pair[1]), append(ratios, pair[1]/pair[0])
	}
	for _, all := range [][]float64{with, without, ratios} {
		slices.Sort(all)
	}
	b.printf("### What archiving costs a load of writes\n")
	b.printf("pgbench, 8 connections, in turns; without: archive_command does nothing.\n")
	b.printf("| archiving | transactions/s | of without |\n| --- | --- | --- |")
	b.printf("| without | %.0f | 1.00 |\n| gzip, fsync, link | %.0f | **%.2f** |\n", without[len(without)/2], with[len(with)/2], ratios[len(ratios)/2])
	return nil
}
