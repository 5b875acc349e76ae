package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// The parts of -only archives.
const (
	onExport  = "export"
	onRestore = "restore"
	onBackups = "backups"
)

var archiveParts = []string{onExport, onRestore, onBackups}

const (
	// The tenants that are measured: the one with many records, one with a tenth of it, and one as all others are.
	largeTenant, middleTenant, smallTenant = 0, 1, 2

	largeRecords = 200_000
	archiveTurns = 3
)

// vault is an installation whose tenants are archived.
type vault struct {
	*installation
}

// archives measures exports, restores and backups. A part that fails is told, and the others go on.
func (b *bench) archives(ctx context.Context, only []string, n, many int) error {
	in, err := b.install(ctx, "bench_archives", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	v := &vault{in}
	if err := v.grow(ctx, 3); err != nil {
		return err
	}
	if err := v.asSuperuser(ctx, v.enlarge); err != nil {
		return err
	}
	var among [][]string
	steps := []struct {
		part string
		size int
		run  func(context.Context) error
	}{
		{onExport, 3, v.export},
		{onRestore, 3, v.restore},
		{onBackups, n, v.backups},
		{onExport, n, func(ctx context.Context) error { return v.small(ctx, &among) }},
		{onExport, many, func(ctx context.Context) error { return v.small(ctx, &among) }},
	}
	for _, s := range steps {
		if !slices.Contains(only, s.part) || s.size < len(v.slugs) || ctx.Err() != nil {
			continue
		}
		b.tell("%s at %d tenants", s.part, s.size)
		if err := v.grow(ctx, s.size); err != nil {
			return err
		}
		if err := v.asSuperuser(ctx, func(c *pgx.Conn) error { return rest(ctx, c) }); err != nil {
			return err
		}
		if err := s.run(ctx); err != nil {
			return fmt.Errorf("%s at %d tenants: %w", s.part, s.size, err)
		}
	}
	if len(among) == 2 {
		b.printf("### One small tenant among many\n")
		b.printf("A tenant of %d records, the whole command; medians of %d.\n", recordsEach, 3*archiveTurns)
		b.printf("| tenants | oneo tenant export ms | of the first | pg_dump -Fc -n ms | of the first |\n| --- | --- | --- | --- | --- |")
		for _, row := range among {
			b.printf("| %s |", strings.Join(row, " | "))
		}
		ratio, _ := strconv.ParseFloat(strings.Trim(among[1][2], "*"), 64)
		b.printf("")
		b.goal(ratio <= 1.2, "within 20 % of each other", among[1][2])
	}
	return ctx.Err()
}

// enlarge gives two tenants their records, of texts that do not repeat, and a key that outlives a restore.
func (v *vault) enlarge(c *pgx.Conn) error {
	for tenant, records := range map[int]int{largeTenant: largeRecords, middleTenant: largeRecords / 10} {
		key := sha256.Sum256([]byte(v.key(tenant)))
		sql := fmt.Sprintf(`set search_path to %s, ext;
insert into records (id, pipeline_id, data)
select gen_random_uuid(), p.id, jsonb_build_object('stage', 'Won', 'amount', g * 17, 'note', md5(g::text) || ' ' || md5((g + 1)::text) || ' ' || md5((g * 3)::text))
from pipelines p, generate_series(1, %d) g;
insert into api_keys (id, token_hash, user_id, name, scopes) select gen_random_uuid(), '\x%x', id, 'bench', '{read}' from users;
vacuum analyze records;
reset search_path`, pgx.Identifier{v.slugs[tenant]}.Sanitize(), records, key)
		for _, statement := range strings.Split(sql, ";\n") {
			if _, err := c.PgConn().Exec(context.Background(), statement).ReadAll(); err != nil {
				return err
			}
		}
	}
	return nil
}

// logIn gives the large tenant its session back.
func (v *vault) logIn(c *pgx.Conn) error {
	slug := v.slugs[largeTenant]
	hash := sha256.Sum256([]byte(token(slug)))
	_, err := c.Exec(context.Background(), fmt.Sprintf(`insert into %[1]s.sessions (token_hash, user_id, expires_at) select $1, id, now() + interval '30 days' from %[1]s.users limit 1`,
		pgx.Identifier{slug}.Sanitize()), hash[:])
	return err
}

func (v *vault) key(tenant int) string {
	sum := sha256.Sum256([]byte("key " + v.slugs[tenant]))
	return "onk_" + base64.RawURLEncoding.EncodeToString(sum[:])
}

// oneo is a command of the binary on the installation.
func (v *vault) oneo(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, v.b.binary, args...)
	cmd.Env = v.environment("ONEO_BACKUP_URL=" + filepath.Join(v.b.dir, "backups"))
	return cmd
}

// shell is a pipeline of programs: if one fails, all of it does.
func (v *vault) shell(ctx context.Context, script string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", script)
	cmd.Env = append(os.Environ(), "DB="+v.group.OwnerURL, "RAW="+v.b.pg.URL("bench_raw"), "DIR="+v.b.dir)
	return cmd
}

// way is one way to do something.
type way struct {
	name string
	run  func() (time.Duration, error)
}

// turns lets all ways run in turn, and prints their medians; the ratio is how fast each is, of the first, in the
// same round. It returns the second's.
func (v *vault) turns(all []way, bytes func(name string) int64) (ratio float64, err error) {
	took := make([][]time.Duration, len(all))
	ratios := make([][]float64, len(all))
	for range archiveTurns {
		for i, c := range all {
			d, err := c.run()
			if err != nil {
				return 0, fmt.Errorf("%s: %w", c.name, err)
			}
			took[i] = append(took[i], d)
		}
		for i := range all {
			last := len(took[i]) - 1
			ratios[i] = append(ratios[i], float64(took[0][last])/float64(took[i][last]))
		}
	}
	v.b.printf("| way | s | MB | speed, of the first |\n| --- | --- | --- | --- |")
	for i, c := range all {
		slices.Sort(ratios[i])
		v.b.printf("| %s | %.2f | %.1f | **%.2f** |", c.name, median(took[i]).Seconds(), float64(bytes(c.name))/1e6, ratios[i][len(ratios[i])/2])
	}
	v.b.printf("")
	return ratios[1][len(ratios[1])/2], nil
}

// export compares ways to bring a large tenant into a file.
func (v *vault) export(ctx context.Context) error {
	slug := v.slugs[largeTenant]
	copies := ""
	for _, table := range []string{"users", "api_keys", "pipelines", "fields", "records"} {
		copies += fmt.Sprintf(" -c 'copy %s.%s to stdout'", pgx.Identifier{slug}.Sanitize(), table)
	}
	files := map[string]string{}
	file := func(name, as string) string {
		files[name] = filepath.Join(v.b.dir, as)
		return files[name]
	}
	all := []way{
		{"psql COPY, zstd", func() (time.Duration, error) {
			return timed(v.shell(ctx, `psql -X -q -d "$DB" -c "begin isolation level repeatable read"`+copies+` | zstd -q -f -o `+file("psql COPY, zstd", "copy.zst")))
		}},
		{"oneo tenant export", func() (time.Duration, error) {
			f := file("oneo tenant export", "large.oneo")
			if err := os.RemoveAll(f); err != nil {
				return 0, err
			}
			return timed(v.oneo(ctx, "tenant", "export", slug, "-f", f, "-q"))
		}},
		{"pg_dump -Fc -n", func() (time.Duration, error) {
			return timed(v.shell(ctx, `pg_dump -d "$DB" -Fc -n `+slug+` -f `+file("pg_dump -Fc -n", "large.dump")))
		}},
	}
	v.b.printf("### Export of a tenant of %d records\n", largeRecords)
	v.b.printf("Medians of %d turns; the whole commands, to a file.\n", archiveTurns)
	ratio, err := v.turns(all, func(name string) int64 {
		info, err := os.Stat(files[name])
		if err != nil {
			return 0
		}
		return info.Size()
	})
	if err != nil {
		return err
	}
	v.b.goal(ratio >= 0.8, "at least 0.8 of COPY through zstd", fmt.Sprintf("%.2f", ratio))
	peak := func(tenant int) (float64, error) {
		return peakOf(ctx, v.oneo(ctx, "tenant", "export", v.slugs[tenant], "-f", filepath.Join(v.b.dir, fmt.Sprintf("peak%d.oneo", tenant)), "-q"))
	}
	tenth, err := peak(middleTenant)
	if err != nil {
		return err
	}
	whole, err := peak(largeTenant)
	if err != nil {
		return err
	}
	v.b.printf("")
	v.b.goal(whole <= 1.2*tenth, "memory flat in the tenant's size: at most 1.20", fmt.Sprintf("peak of %.1f MB with %d records, %.1f MB with %d: %.2f",
		tenth, largeRecords/10, whole, largeRecords, whole/tenth))
	return nil
}

// small measures what one tenant's export costs beside so many others.
func (v *vault) small(ctx context.Context, rows *[][]string) error {
	slug := v.slugs[smallTenant]
	var oneo, dump []time.Duration
	for i := range 3 * archiveTurns {
		d, err := timed(v.oneo(ctx, "tenant", "export", slug, "-f", filepath.Join(v.b.dir, fmt.Sprintf("small%d-%d.oneo", len(v.slugs), i)), "-q"))
		if err != nil {
			return err
		}
		oneo = append(oneo, d)
		if d, err = timed(v.shell(ctx, `pg_dump -d "$DB" -Fc -n `+slug+` -f "$DIR/small.dump"`)); err != nil {
			return err
		}
		dump = append(dump, d)
	}
	a, b, one, two := ms(median(oneo)), ms(median(dump)), 1.0, 1.0
	if len(*rows) > 0 {
		first := func(column int) float64 { f, _ := strconv.ParseFloat((*rows)[0][column], 64); return f }
		one, two = a/first(1), b/first(3)
	}
	*rows = append(*rows, []string{fmt.Sprint(len(v.slugs)), fmt.Sprintf("%.0f", a), fmt.Sprintf("**%.2f**", one), fmt.Sprintf("%.0f", b), fmt.Sprintf("%.2f", two)})
	return nil
}

var pauseTold = regexp.MustCompile(`(?m)^pause +([\d.]+)$`)

// restore compares a restore in place with what psql makes of a dump, whose data it copies before it builds the indexes,
// and then restores while the tenant is read.
func (v *vault) restore(ctx context.Context) (err error) {
	slug, file := v.slugs[largeTenant], filepath.Join(v.b.dir, "restore.oneo")
	if _, err := timed(v.oneo(ctx, "tenant", "export", slug, "-f", file, "-q")); err != nil {
		return err
	}
	if _, err := v.b.install(ctx, "bench_raw", postgres.ByRole, 0); err != nil {
		return err
	}
	if _, err := timed(v.shell(ctx, `pg_dump -d "$DB" -O -x -n `+slug+` -f "$DIR/raw.sql"`)); err != nil {
		return err
	}
	var pauses []string
	restore := func() (time.Duration, error) {
		start := time.Now()
		text, err := v.oneo(ctx, "restore", file, "-t", slug, "--yes").CombinedOutput()
		if err != nil {
			return 0, fmt.Errorf("%w: %s", err, tail(text))
		}
		if g := pauseTold.FindSubmatch(text); g != nil {
			pauses = append(pauses, string(g[1]))
		}
		return time.Since(start), nil
	}
	all := []way{
		{"psql, a plain dump: COPY, then indexes", func() (time.Duration, error) {
			return timed(v.shell(ctx, `psql -X -q -1 -v ON_ERROR_STOP=1 -d "$RAW" -f "$DIR/raw.sql" && psql -X -q -d "$RAW" -c 'checkpoint'`))
		}},
		{"oneo restore, in place", restore},
	}
	raw := all[0].run
	all[0].run = func() (time.Duration, error) {
		if out, err := v.shell(ctx, `psql -X -q -d "$RAW" -c 'set client_min_messages to warning' -c 'drop schema if exists `+slug+` cascade' -c checkpoint`).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%w: %s", err, out)
		}
		return raw()
	}
	v.b.printf("### Restore of a tenant of %d records\n", largeRecords)
	v.b.printf("Medians of %d turns. oneo reads a compressed archive, checks it, and exchanges the schemas.\n", archiveTurns)
	ratio, err := v.turns(all, func(name string) int64 {
		as := file
		if name == all[0].name {
			as = filepath.Join(v.b.dir, "raw.sql")
		}
		info, err := os.Stat(as)
		if err != nil {
			return 0
		}
		return info.Size()
	})
	if err != nil {
		return err
	}
	v.b.goal(ratio >= 0.7, "at least 0.7 of COPY and index builds", fmt.Sprintf("%.2f", ratio))

	p, err := v.serve(ctx)
	if err != nil {
		return err
	}
	defer p.stop()
	const perSecond = 200
	read := func(ctx context.Context) []answer {
		return v.paceAs(ctx, p, perSecond, []int{largeTenant}, func(tenant int) string { return v.key(tenant) })
	}
	defer func() { err = errors.Join(err, v.asSuperuser(ctx, v.logIn)) }() // a restore ends sessions
	var last [2]traffic
	for range 2 { // the first one warms
		calm, stop := context.WithTimeout(ctx, v.b.duration)
		before := read(calm)
		stop()
		reading, stop := context.WithCancel(ctx)
		done := make(chan []answer, 1)
		go func() { done <- read(reading) }()
		_, err = restore()
		time.Sleep(time.Second)
		stop()
		during := <-done
		if err != nil {
			return err
		}
		last = [2]traffic{summary(before, v.b.duration), summary(during, v.b.duration)}
	}
	v.b.printf("\nThe tenant read %d times a second while it is restored in place, from the start of the command until 1 s after its end:\n", perSecond)
	v.b.printf("| | p50 ms | p99 ms | longest ms | other than 200 |\n| --- | --- | --- | --- | --- |")
	for i, name := range []string{"no restore", "a restore"} {
		t := last[i]
		v.b.printf("| %s | %.1f | %.1f | %.1f | %s |", name, ms(t.p50), ms(t.p99), ms(t.max), told(t.failures))
	}
	v.b.printf("\nPauses that the restores told, of the gate, in ms: %s.\n", strings.Join(pauses, ", "))
	return nil
}

// backups measures a backup of every tenant, alone and while all of them are read.
func (v *vault) backups(ctx context.Context) error {
	run := func(more ...string) (time.Duration, error) {
		return timed(v.oneo(ctx, append([]string{"backup", "create", "--all-tenants", "-q", "--reason", "bench"}, more...)...))
	}
	took, err := run()
	if err != nil {
		return err
	}
	v.b.printf("### Backups of all of %d tenants\n", len(v.slugs))
	v.b.printf("`oneo backup create --all-tenants` into a directory, nobody served: %.1f s, %.0f tenants a second (one has %d records, one %d, the others %d).\n",
		took.Seconds(), float64(len(v.slugs))/took.Seconds(), largeRecords, largeRecords/10, recordsEach)
	p, err := v.serve(ctx)
	if err != nil {
		return err
	}
	defer p.stop()
	if _, err := v.drive(ctx, p, false, max(v.b.duration, 15*time.Second)); err != nil { // each backend sees each tenant
		return err
	}
	const perSecond = 500
	read := func(ctx context.Context) []answer { return v.pace(ctx, p, perSecond, everyone(len(v.slugs))) }
	var without, with []traffic
	rate := 0.0
	for range liveRounds {
		calm, stop := context.WithTimeout(ctx, v.b.duration)
		a := summary(read(calm), v.b.duration)
		stop()
		reading, stop := context.WithCancel(ctx)
		done := make(chan []answer, 1)
		go func() { done <- read(reading) }()
		took, err := run()
		stop()
		b := summary(<-done, took)
		if err != nil {
			return err
		}
		rate = float64(len(v.slugs)) / took.Seconds()
		b.ratio = float64(b.p99) / float64(a.p99)
		without, with = append(without, a), append(with, b)
	}
	a, b := middleOf(without), middleOf(with)
	v.b.printf("While `oneo serve` is read %d times a second over all tenants the backup yields (%.0f tenants/s); medians of %d turns:\n", perSecond, rate, liveRounds)
	v.b.printf("| | p50 ms | p99 ms | longest ms | p99 of without | other than 200 |\n| --- | --- | --- | --- | --- | --- |")
	v.b.printf("| no backup | %.1f | %.1f | %.0f | 1.00 | %s |", ms(a.p50), ms(a.p99), ms(a.max), told(a.failures))
	v.b.printf("| a backup of all | %.1f | %.1f | %.0f | **%.2f** | %s |", ms(b.p50), ms(b.p99), ms(b.max), b.ratio, told(b.failures))
	v.b.printf("")
	v.b.goal(b.ratio <= 2, "the p99 at most twice that without", fmt.Sprintf("%.2f", b.ratio))
	return nil
}
