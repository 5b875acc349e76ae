package main

import (
	"bufio"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// What became of tenants between a moment and now: each comes back as it was then, or it is said why not. One recovered cluster serves all.
func TestWhatBecameOfTenantsSince(t *testing.T) {
	t.Parallel()
	c, scratch, backUp := newArchived(t, physical.FilesName)
	admin := pgtest.Admin(t, c.env.AdminURL)
	count := func(sql string) (n int) {
		t.Helper()
		require.NoError(t, admin.QueryRow(t.Context(), sql).Scan(&n))
		return n
	}
	extra := c.environ[len(patience):]
	cmd := func(code int, args ...string) string {
		t.Helper()
		answer, story, got := oneo(t, c.env, extra, args...)
		require.Equal(t, code, got, "oneo %s: %s%s", strings.Join(args, " "), answer, story)
		return answer + story
	}
	for _, slug := range []string{"acme", "beta", "gamma", "delta", "eps", "zeta"} {
		c.run(0, "tenant create "+slug+" --admin-email ann@"+slug+".example")
	}
	backUp()
	c.sql(`insert into acme.pipelines (id, key, name) values (gen_random_uuid(), 'deals', 'Deals'), (gen_random_uuid(), 'leads', 'Leads');
		insert into acme.records (id, pipeline_id) select gen_random_uuid(), id from acme.pipelines, generate_series(1, 5)`)
	c.run(0, "tenant suspend eps --yes")
	c.run(0, "migrate down -t zeta --to 1 --yes")
	var at time.Time
	require.NoError(t, admin.QueryRow(t.Context(), `select clock_timestamp() from pg_sleep(0.01)`).Scan(&at))
	c.sql(`select pg_sleep(0.01)`)
	for _, slug := range []string{"acme", "beta", "gamma", "delta", "eps", "zeta"} {
		c.sql(`delete from ` + slug + `.users`)
	}
	c.sql(`delete from acme.records`)
	c.run(0, "tenant rename beta bravo --schema bravo --yes")
	c.run(0, "tenant drop gamma --yes")
	c.run(0, "tenant drop delta --purge --confirm delta")
	c.run(0, "tenant resume eps")
	c.run(0, "migrate -t zeta")
	c.run(0, "tenant create newbie")

	moment := at.UTC().Format(time.RFC3339Nano)
	kept := child(c.env, extra, "hold", "--at", moment, "--for", "1h")
	out, err := kept.StdoutPipe()
	require.NoError(t, err)
	kept.Stderr = os.Stderr
	require.NoError(t, kept.Start())
	defer func() {
		require.NoError(t, kept.Process.Signal(syscall.SIGINT))
		_ = kept.Wait() // it was interrupted
		left, err := os.ReadDir(scratch)
		require.NoError(t, err)
		require.Empty(t, left)
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err)
	require.Equal(t, holdReady, strings.TrimSpace(line))

	// The very same moment as the clocks showed it elsewhere.
	for zone, offset := range map[string]string{"Asia/Kolkata": "+05:30", "Europe/Berlin": "", "UTC": "Z"} {
		where, err := time.LoadLocation(zone)
		require.NoError(t, err)
		local := at.In(where).Format("2006-01-02 15:04:05.000000")
		for _, given := range []string{local, local + offset} {
			extra = append(c.environ[len(patience):len(c.environ):len(c.environ)], "TZ="+zone)
			told := cmd(0, "sql", "-t", "acme", "--at", given, "-o", "json", "select count(*)::int as n from records")
			require.Contains(t, told, `"n":10`)
			require.Contains(t, told, at.UTC().Format("recovering to 2006-01-02 15:04:05.999999Z"))
			require.Len(t, must1(os.ReadDir(scratch)), 1, "it is the one that is kept")
		}
	}
	extra = append(c.environ[len(patience):len(c.environ):len(c.environ)], "TZ=Europe/Berlin")
	require.Contains(t, cmd(2, "sql", "-t", "acme", "--at", "2025-10-26 02:30", "select 1"), "twice")
	require.Contains(t, cmd(2, "restore", "-t", "acme", "--at", "2025-03-30 02:30", "--yes"), "put forward")
	extra = c.environ[len(patience):]

	back := func(code int, slug string, more ...string) string {
		t.Helper()
		return cmd(code, append([]string{"restore", "-t", slug, "--at", moment, "--yes"}, more...)...)
	}
	require.Regexp(t, `there was no tenant newbie at .*: it began at \d{4}-`, back(10, "newbie"))
	require.Contains(t, back(10, "nobody"), "there was none at")
	require.Contains(t, back(1, "beta"), "is called bravo now")
	require.Contains(t, back(0, "gamma"), "tenant gamma is dropped: it comes back first")
	require.Contains(t, back(0, "delta"), "there is no tenant delta any more: it is made anew")
	back(0, "bravo")
	back(0, "eps")
	back(0, "zeta")
	for _, slug := range []string{"bravo", "gamma", "delta", "eps", "zeta"} {
		require.Equal(t, 1, count(`select count(*) from `+slug+`.users`), slug)
		require.Equal(t, 1, count(`select count(*) from public.tenants where state = 'active' and slug = '`+slug+`'`), slug)
		require.Equal(t, count(`select version from public.placements where schema = 'acme'`), count(`select version from public.placements where schema = '`+slug+`'`), slug)
	}
	require.Equal(t, 0, count(`select count(*) from zeta.pipelines`))

	// Beside the live one, and parts of it.
	cmd(0, "restore", "-t", "acme", "--at", moment, "--as", "acme-then", "--yes")
	require.Equal(t, 10, count(`select count(*) from acme_then.records`))
	require.Equal(t, 0, count(`select count(*) from acme.records`))
	require.Regexp(t, `"inserted": 5`, back(0, "acme", "--pipeline", "deals", "-o", "json"))
	require.Equal(t, 5, count(`select count(*) from acme.records r join acme.pipelines p on p.id = r.pipeline_id where p.key = 'deals'`))
	require.Equal(t, 5, count(`select count(*) from acme.records`))
	require.Equal(t, 0, count(`select count(*) from acme.users`))
	back(0, "acme", "--table", "users")
	require.Equal(t, 1, count(`select count(*) from acme.users`))
	require.Len(t, must1(os.ReadDir(scratch)), 1, "all was taken from the one that is kept")
	c.env.Invariants(t)
}

func must1[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
