package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// clusters is an installation whose servers archive their WAL, by the names of the clusters.
type clusters struct {
	command
	dir   string // for everything; main's server has the layout of a dev's
	repo  string
	admin map[string]*pgx.Conn
}

func newClusters(t *testing.T) *clusters {
	t.Helper()
	dir, err := os.MkdirTemp("", "oneo-recover-")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	f := &clusters{dir: dir, repo: filepath.Join(dir, "physical"), admin: map[string]*pgx.Conn{}}
	env := pgtest.NewAlone(t, dir, f.settings(t, "main"))
	f.command = command{t: t, env: env, environ: append(slices.Clone(patience), []string{
		"PATH=" + os.Getenv("PATH"), "ONEO_DATABASE_URL=" + env.Group.URL, "ONEO_DATABASE_OWNER_URL=" + env.Group.OwnerURL, "ONEO_SERVER_SECRET=" + pgtest.Secret,
		"ONEO_BACKUP_PHYSICAL_ENGINE=files", "ONEO_BACKUP_PHYSICAL_DIR=" + f.repo,
	}...)}
	f.admin["main"] = pgtest.Admin(t, env.AdminURL)
	return f
}

// settings are those of a server that archives as a cluster.
func (f *clusters) settings(t *testing.T, cluster string) map[string]string {
	t.Helper()
	files, err := physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(f.repo, cluster)})
	require.NoError(t, err)
	plan, err := files.Plan(t.Context())
	require.NoError(t, err)
	plan.Settings["archive_timeout"] = "0" // tests say when
	return plan.Settings
}

// second makes a second group on a cluster of its own.
func (f *clusters) second() {
	t := f.t
	group, server := f.env.SecondServer(t)
	conn := pgtest.Admin(t, server.URL("oneo"))
	for name, value := range f.settings(t, "second") {
		_, err := conn.Exec(t.Context(), "alter system set "+name+" = '"+strings.ReplaceAll(value, "'", "''")+"'")
		require.NoError(t, err)
	}
	require.NoError(t, server.Restart(t.Context()))
	f.admin["second"] = pgtest.Admin(t, server.URL("oneo"))
	f.environ = append(f.environ, "ONEO_DATABASE_GROUPS_SECOND_URL="+group.URL, "ONEO_DATABASE_GROUPS_SECOND_OWNER_URL="+group.OwnerURL)
	f.run(0, "migrate --shared")
}

// backup makes a physical backup of a cluster.
func (f *clusters) backup(cluster, url string) {
	t := f.t
	t.Helper()
	_, err := f.admin[cluster].Exec(t.Context(), `alter role oneo_owner replication; grant execute on function pg_create_restore_point(text), pg_switch_wal() to oneo_owner`)
	require.NoError(t, err)
	e, err := physical.NewFiles(physical.FilesOptions{Dir: filepath.Join(f.repo, cluster), URL: url})
	require.NoError(t, err)
	require.NoError(t, e.Prepare(t.Context()))
	_, err = e.Create(t.Context(), physical.CreateOptions{})
	require.NoError(t, err)
}

// now is a moment behind everything that was committed, and before everything that will be.
func (f *clusters) now() (at time.Time) {
	t := f.t
	t.Helper()
	require.NoError(t, f.admin["main"].QueryRow(t.Context(), `select clock_timestamp() from pg_sleep(0.01)`).Scan(&at))
	_, err := f.admin["main"].Exec(t.Context(), `select pg_sleep(0.01)`)
	require.NoError(t, err)
	return at
}

// answer is what `oneo recover cluster -o json` answers.
type answer struct {
	Clusters []struct {
		Cluster  string
		Data     string
		Target   string
		Tenants  int
		Timeline int
	}
	Differences []struct {
		Tenant, Kind, Means string
		Before, After       []string
	}
	Steps []struct {
		What     string
		Commands []string
	}
	Switched bool
	Kept     string
}

func (a answer) kinds() (all []string) {
	for _, d := range a.Differences {
		all = append(all, strings.TrimSpace(d.Kind+" "+d.Tenant))
	}
	return all
}

func (a answer) commands() (all []string) {
	for _, s := range a.Steps {
		all = append(all, s.Commands...)
	}
	return all
}

func (f *clusters) recover(code int, at time.Time, more ...string) (a answer, story string) {
	f.t.Helper()
	return f.recoverTo(code, append([]string{"--at", at.UTC().Format(time.RFC3339Nano)}, more...)...)
}

func (f *clusters) recoverTo(code int, flags ...string) (a answer, story string) {
	t := f.t
	t.Helper()
	var out, errs bytes.Buffer
	args := append([]string{"recover", "cluster", "-o", "json", "--progress", "none"}, flags...)
	got := run(t.Context(), args, f.environ, strings.NewReader(""), &out, &errs)
	require.Equal(t, code, got, "%s: %s%s", args, &out, &errs)
	if out.Len() > 0 {
		require.NoError(t, json.Unmarshal(out.Bytes(), &a), out.String())
	}
	return a, errs.String()
}

// The worst day: a cluster goes back while it lives, and when it was killed; into a folder that is not empty it does not, nor in the place
// of one that runs; a recovery that is killed, and a switch that is, are told and ended.
func TestRecoverACluster(t *testing.T) {
	t.Parallel()
	f := newClusters(t)
	for _, slug := range []string{"acme", "doomed", "globex"} {
		f.run(0, "tenant create "+slug)
	}
	f.backup("main", f.env.Group.OwnerURL)
	at := f.now()
	f.run(0, "tenant drop globex --yes")
	f.run(0, "tenant rename acme acme-two")
	f.run(0, "tenant create late")
	f.run(0, "tenant erase doomed --confirm doomed")
	into := filepath.Join(f.dir, "next")

	require.Contains(t, f.run(2, "recover cluster --into "+into), "to which moment")
	require.Contains(t, f.run(2, "recover cluster --at 1h"), "where the data folder")
	require.Contains(t, f.run(2, "recover cluster --at 1h --group nowhere --into "+into), "not configured")
	a, story := f.recover(13, at, "--into", into)
	require.Equal(t, []string{"erased doomed", "made late", "dropped globex", "renamed acme"}, a.kinds())
	require.Contains(t, story, "ERASED PEOPLE COME BACK: doomed was erased at ")
	require.Contains(t, story, "needs_decision")
	require.Empty(t, a.Steps)
	require.Equal(t, 3, a.Clusters[0].Tenants)
	f.run(0, "tenant show late") // nothing that lives has changed
	a, story = f.recover(0, at, "--into", into, "--accept-differences")
	require.Contains(t, story, "already")
	commands := a.commands()
	for _, c := range []string{"oneo tenant export late", "oneo tenant erase doomed --confirm doomed", "oneo tenant drop globex", "oneo tenant rename acme acme-two", "oneo backup physical create"} {
		require.Contains(t, commands, c)
	}
	require.Contains(t, strings.Join(commands, "\n"), "mv "+into+" ")
	require.Less(t, slices.Index(commands, "oneo tenant erase doomed --confirm doomed"), slices.Index(commands, "oneo serve"), "before anybody is served")
	_, story = f.recover(1, at.Add(-time.Millisecond), "--into", into)
	require.Contains(t, story, "not_empty")
	_, story = f.recover(1, at, "--into", f.repo)
	require.Contains(t, story, "not_empty")
	require.FileExists(t, filepath.Join(f.repo, "main", "cluster.json"))

	// Nobody switches under a server; then it is killed.
	require.NoError(t, os.WriteFile(filepath.Join(f.dir, "dev.json"), []byte("{}"), 0o600))
	_, story = f.recover(1, at, "--switch", "--data", f.dir)
	require.Contains(t, story, "already_running")
	require.NoError(t, f.env.Server.Kill())
	f.environ = append(f.environ, "ONEO_DATABASE_ACQUIRE_TIMEOUT=100ms") // it does not come back
	require.Contains(t, f.run(5, "recover cluster --before 01a2b3c4 --into "+into), "give the time itself")
	_, story, code := oneo(t, f.env, append(f.environ, "ONEO_FAILPOINTS=physical.fetched=exit"), "recover", "cluster", "--at", at.UTC().Format(time.RFC3339Nano), "--switch", "--data", f.dir, "--accept-differences")
	require.Equal(t, 137, code, story)
	_, story = f.recover(1, at, "--switch", "--data", f.dir, "--accept-differences")
	require.Contains(t, story, "half_recovered")
	require.NoDirExists(t, filepath.Join(f.dir, "recovered"), "what is not whole is not there")
	left, err := physical.Leftovers(filepath.Join(f.repo, ".scratch"))
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, filepath.Join(f.dir, "recovered"), left[0].Final)
	a, story = f.recover(13, at, "--switch", "--data", f.dir, "--discard")
	require.Contains(t, story, "removed what a recovery")
	halves, err := filepath.Glob(filepath.Join(f.dir, "recovered.scratch-*"))
	require.NoError(t, err)
	require.Empty(t, halves)
	require.Equal(t, []string{"unknown"}, a.kinds())
	require.Contains(t, a.Differences[0].Means, "the live registry cannot be read")

	_, story, code = oneo(t, f.env, append(f.environ, "ONEO_FAILPOINTS=recover.aside=exit"), "recover", "cluster", "--at", at.UTC().Format(time.RFC3339Nano), "--switch", "--data", f.dir, "--accept-differences")
	require.Equal(t, 137, code, story)
	require.NoDirExists(t, filepath.Join(f.dir, "postgres"))
	require.Contains(t, f.run(1, "dev --data "+f.dir), "broken off")
	a, story = f.recover(0, at, "--switch", "--data", f.dir)
	require.Contains(t, story, "ended a switch that was broken off")
	require.True(t, a.Switched)
	require.FileExists(t, filepath.Join(a.Kept, "PG_VERSION"), "the old one is kept")
	require.NoError(t, notSwitching(f.dir))

	settings := f.settings(t, "main")
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: f.dir, Trust: true, Settings: settings})
	require.NoError(t, err)
	defer func() { require.NoError(t, pg.Stop(context.Background())) }()
	conn := pgtest.Admin(t, pg.URL(f.env.Database))
	var slugs string
	require.NoError(t, conn.QueryRow(t.Context(), `select string_agg(slug || ' ' || state, ', ' order by slug) from public.tenants`).Scan(&slugs))
	require.Equal(t, "acme active, doomed active, globex active", slugs)
}

// Two clusters, and what happened between them since: each tenant whose rows are not where the registry says is told, whichever of
// them goes back.
func TestRecoverOneClusterOfTwo(t *testing.T) {
	t.Parallel()
	f := newClusters(t)
	f.second()
	f.run(0, "tenant create acme")
	f.run(0, "tenant create beta --group second")
	second := f.environ[len(f.environ)-1]
	f.backup("main", f.env.Group.OwnerURL)
	f.backup("second", strings.TrimPrefix(second, "ONEO_DATABASE_GROUPS_SECOND_OWNER_URL="))
	at := f.now()
	f.run(0, "tenant move acme --to second")
	f.run(0, "tenant create gamma --group second")
	var move string
	require.NoError(t, f.admin["main"].QueryRow(t.Context(), `select id::text from public.operations where kind = 'tenant.move'`).Scan(&move))

	a, _ := f.recover(13, at, "--into", filepath.Join(f.dir, "one"), "--group", "main")
	require.Equal(t, []string{"moved acme", "made gamma"}, a.kinds())
	require.Contains(t, a.Differences[0].Means, "was moved main -> second at ")
	require.Contains(t, a.Differences[0].Means, "the newer ones in group second, which is not recovered, and served by nobody")
	require.Equal(t, []string{"oneo tenant export gamma"}, a.Differences[1].Before)
	n, err := physical.ReadNote(filepath.Join(f.dir, "one"))
	require.NoError(t, err)
	require.Contains(t, string(n.More), `"next":3`, "gamma's number is not given again: its tables stay in group second")

	a, _ = f.recover(13, at, "--into", filepath.Join(f.dir, "two"), "--group", "second")
	require.Equal(t, []string{"unplaced acme", "unplaced gamma"}, a.kinds())

	// Each cluster goes back to the restore point that the move has set in it.
	a, _ = f.recoverTo(13, "--before", move, "--into", filepath.Join(f.dir, "both"))
	require.NotEqual(t, a.Clusters[0].Target, a.Clusters[1].Target)
	require.Equal(t, []string{"moved acme", "made gamma"}, a.kinds())
	require.Contains(t, a.Differences[0].Means, "only in the old data folder of cluster second")
	require.Equal(t, filepath.Join(f.dir, "both", "main"), a.Clusters[0].Data)
	require.Equal(t, filepath.Join(f.dir, "both", "second"), a.Clusters[1].Data)
	_, err = physical.ReadNote(a.Clusters[1].Data)
	require.NoError(t, err)

	// One tenant comes back from where it was then, to where it is: from main to second, and from second to main.
	f.run(0, "user add ada@acme.example -t acme --role member")
	there := f.now()
	require.Contains(t, f.run(0, "restore -t acme --yes --at "+at.UTC().Format(time.RFC3339Nano)), "restored tenant acme")
	require.NotContains(t, f.run(0, "user list -t acme"), "ada@acme.example")
	f.run(0, "tenant move acme --to main --force")
	told := f.run(0, "restore -t acme --yes --at "+there.UTC().Format(time.RFC3339Nano))
	require.Contains(t, told, "then it was in the group second: once more, with its cluster")
	require.Contains(t, f.run(0, "user list -t acme"), "ada@acme.example")
}

// Wherever a switch dies, the next one ends it; neither folder is lost.
func TestASwitchIsEnded(t *testing.T) {
	t.Parallel()
	for _, dies := range []string{"before", "aside", "behind", "gone"} {
		dir := t.TempDir()
		live, recovered := filepath.Join(dir, "postgres"), filepath.Join(dir, "recovered")
		s := switching{ID: "scratch-1", Recovered: recovered, Kept: live + "-before"}
		require.NoError(t, os.MkdirAll(live, 0o700))
		require.NoError(t, os.MkdirAll(recovered, 0o700))
		require.NoError(t, os.WriteFile(filepath.Join(live, "old"), nil, 0o600))
		require.NoError(t, os.WriteFile(filepath.Join(recovered, "oneo-recovered.json"), []byte(`{"id": "scratch-1"}`), 0o600))
		text, err := json.Marshal(s)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(switchFile(dir), text, 0o600))
		if dies != "before" {
			require.NoError(t, os.Rename(live, s.Kept))
		}
		switch dies {
		case "behind":
			require.NoError(t, os.Rename(recovered, live))
		case "gone":
			require.NoError(t, os.Rename(recovered, recovered+"-elsewhere"))
		}
		e := &env{out: &bytes.Buffer{}, err: &bytes.Buffer{}, output: "table"}
		done, err := finishSwitch(e, dir)
		require.FileExists(t, filepath.Join(s.Kept, "old"), dies)
		if dies == "gone" {
			require.Equal(t, "switching", fault.Of(err).StableCode())
			require.Error(t, notSwitching(dir))
			continue
		}
		require.NoError(t, err, dies)
		require.True(t, done)
		require.FileExists(t, filepath.Join(live, "oneo-recovered.json"), dies)
		require.NoError(t, notSwitching(dir))
	}
}
