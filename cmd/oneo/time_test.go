package main

import (
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// newArchived is a server that may archive its WAL, and backUp makes a physical backup of it. scratch is where moments are recovered.
func newArchived(t *testing.T, engine string) (c command, scratch string, backUp func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "oneo-time-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	repo := filepath.Join(dir, "physical")
	env := pgtest.NewAlone(t, dir, map[string]string{"archive_mode": "on", "full_page_writes": "on"})
	c = command{t: t, env: env, environ: append(slices.Clone(patience), []string{
		"ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret,
		"ONEO_BACKUP_PHYSICAL_ENGINE=" + engine, "ONEO_BACKUP_PHYSICAL_DIR=" + repo,
	}...)}
	return c, filepath.Join(repo, ".scratch"), func() {
		t.Helper()
		c.run(0, "backup physical setup --admin-url "+env.AdminURL)
		c.run(0, "backup physical create")
	}
}

// newArchivedOffices are the demonstration's tenants on a server that archives its WAL, with a physical backup behind them.
func newArchivedOffices(t *testing.T, engine string) *offices {
	t.Helper()
	c, scratch, backUp := newArchived(t, engine)
	o := &offices{command: c, at: map[string]*pgx.Conn{"main": pgtest.Admin(t, c.env.AdminURL)}, keys: map[string]string{}, scratch: scratch}
	o.open()
	backUp()
	return o
}

// Somebody deletes all deals of one tenant; the operator looks at the difference, brings them back to the second before while the
// others work, and undoes it again.
func TestTheSecondBeforeTheDeletion(t *testing.T) {
	t.Parallel()
	for _, engine := range []string{"files", "pgbackrest"} {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			o := newArchivedOffices(t, engine)
			o.requireWon("east", o.keys["east"], http.StatusOK, 1171)
			rows := func(slug string) map[string]string {
				sums := o.rows("main", slug)
				delete(sums, "api_keys") // says when each was used
				return sums
			}
			east, west := rows("east"), rows("west")
			var at string // pgBackRest knows the end of a backup by the second
			require.NoError(t, o.at["main"].QueryRow(t.Context(), `select to_char(clock_timestamp() at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS.US+00') from pg_sleep(1.1)`).Scan(&at))
			time.Sleep(10 * time.Millisecond)
			o.oneo(0, "sql", "-t", "east", "--write", "--yes", `delete from records where pipeline_id in (select id from pipelines where key = 'opportunities')`)
			o.requireWon("east", o.keys["east"], http.StatusOK, 0)
			deleted := rows("east")

			// The others work all the while.
			stop, failures := make(chan struct{}), map[int]int{}
			var working sync.WaitGroup
			working.Go(func() {
				path := "/api/v1/pipelines/opportunities/records?limit=1&count=exact&filter=" + url.QueryEscape(`stage = "Won"`)
				for {
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Millisecond):
					}
					if status, _ := o.served.do(t, "GET", "west.localhost", path, o.keys["west"], ""); status != http.StatusOK {
						failures[status]++
					}
				}
			})
			// The past is read, and kept for what follows.
			const count = "select count(*)::int as n from records"
			answer, _ := o.oneo(0, "sql", "-t", "east", "--at", at, "--keep=15s", "-o", "json", count)
			require.Regexp(t, `"n":2388`, answer)
			scratch, err := os.ReadDir(o.scratch)
			require.NoError(t, err)
			require.Len(t, scratch, 1)
			answer, _ = o.oneo(0, "sql", "-t", "east", "-o", "json", count)
			require.Regexp(t, `"n":97`, answer)
			answer, story := o.oneo(0, "restore", "-t", "east", "--at", at, "--diff", "-o", "json")
			require.Regexp(t, `"added": 2291,\s+"changed": 0,\s+"removed": 0,\s+"same": 97,\s+"table": "records"`, answer)
			require.Contains(t, story, "recovered from the physical backup")
			require.Equal(t, deleted, rows("east"))
			answer, story = o.oneo(0, "restore", "-t", "east", "--at", at, "--yes", "-o", "json")
			require.Contains(t, story, "undo: oneo undo ")
			require.Equal(t, east, rows("east"))
			o.requireWon("east", o.keys["east"], http.StatusOK, 1171)
			restored := field(t, answer, "operation")
			answer, _ = o.oneo(0, "sql", "-t", "east", "--before", restored, "-o", "json", count)
			require.Regexp(t, `"n":97`, answer)
			o.oneo(0, "undo", restored, "--yes")
			require.Equal(t, deleted, rows("east"))
			// Any moment, and all tenants of it.
			answer, story = o.oneo(0, "backup", "drill", "--physical", "--sample", "2", "-o", "json")
			require.Equal(t, 2, strings.Count(answer, `"status": "ok"`), answer)
			require.Contains(t, story, "2 tenant(s)")
			close(stop)
			working.Wait()
			require.Eventually(t, func() bool {
				scratch, err := os.ReadDir(o.scratch)
				return err == nil && len(scratch) == 0
			}, pgtest.Patience, 50*time.Millisecond, "what was kept is removed by itself")
			require.Empty(t, failures)
			require.Equal(t, west, rows("west"))
		})
	}
}
