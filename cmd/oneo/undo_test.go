package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// undone is a fleet at version 3 whose run has kept undo points. The migration puts a mark in each user's name.
func undone(t *testing.T, n int) (*product, string) {
	t.Helper()
	_, err := plainOneo()
	require.NoError(t, err)
	p := &product{t: t, env: pgtest.New(t), dir: t.TempDir(), head: 2, n: n}
	p.extra = []string{plain, "ONEO_SCHEMAS_DIR=" + p.dir, staleAfter}
	p.admin = pgtest.Admin(t, p.env.AdminURL)
	for i := range n {
		tn := p.env.Tenant(t, fmt.Sprintf("t%03d", i))
		p.exec(fmt.Sprintf(`insert into %[1]s.users (id, email, password_hash, name) values (gen_random_uuid(), 'a@b.c', 'x', 'somebody')`, tn.Schema))
	}
	files, err := os.ReadDir("../../schemas/tenant")
	require.NoError(t, err)
	for _, f := range files {
		text, err := os.ReadFile(filepath.Join("../../schemas/tenant", f.Name()))
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(filepath.Join(p.dir, f.Name()), text, 0o600))
	}
	require.NoError(t, os.WriteFile(filepath.Join(p.dir, "0003_mark.up.sql"), []byte("update users set name = name || '!' where name not like '%!';\nalter table records add column note text;\n"), 0o600))
	_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants", "--undo-point", "--progress", "none")
	require.Zero(t, code, stderr)
	_, rest, ok := strings.Cut(stderr, "to take it back: oneo undo ")
	require.True(t, ok, stderr)
	return p, strings.TrimSpace(rest)
}

// back holds that every tenant is at version 2 with the rows of then, each taken back once.
func (p *product) back() {
	p.t.Helper()
	var at, undone, epochs, marked int
	const count = `select (select count(*) from public.placements where version = 2), (select count(*) from public.undo_points where undone_at is not null),
(select sum(epoch) from public.placements)`
	require.NoError(p.t, p.admin.QueryRow(p.t.Context(), count).Scan(&at, &undone, &epochs))
	require.Equal(p.t, []int{p.n, p.n, 2 * p.n}, []int{at, undone, epochs}, "tenants at version 2, points that were used, and epochs: each once")
	for i := range p.n {
		var n int
		require.NoError(p.t, p.admin.QueryRow(p.t.Context(), fmt.Sprintf(`select count(*) from t%03d.users where name <> 'somebody'`, i)).Scan(&n))
		marked += n
	}
	require.Zero(p.t, marked)
	p.env.Invariants(p.t)
}

// kill -9 at each place in the middle of a fleet that is taken back; then the same command again.
func TestKilledUndoGoesOn(t *testing.T) {
	t.Parallel()
	for _, place := range []string{"undo.before", "undo.built", "undo.kept", "undo.filled", "undo.placed", "undo.after", "run.claimed", "run.worked", "run.settled"} {
		t.Run(place, func(t *testing.T) {
			t.Parallel()
			p, run := undone(t, 12)
			_, stderr, code := p.run([]string{"ONEO_FAILPOINTS=" + place + "=exit@4"}, "undo", run, "--yes", "--jobs", "2", "--progress", "none")
			require.Equalf(t, 137, code, "%s did not fire: %s", place, stderr)
			p.env.Invariants(t)
			p.died()
			_, stderr, code = p.run(nil, "undo", run, "--yes", "--jobs", "2", "--progress", "none")
			require.Zerof(t, code, "again after %s: %s", place, stderr)
			require.Contains(t, stderr, "going on with the run", place)
			p.back()
		})
	}
}

// Two processes at once, one of which is killed; the other takes up what it had in hand.
func TestProcessesShareAnUndo(t *testing.T) {
	t.Parallel()
	p, run := undone(t, 16)
	var processes sync.WaitGroup
	for i := range 3 {
		processes.Go(func() {
			env := append(p.extra[:len(p.extra):len(p.extra)], []string{"ONEO_FAILPOINTS=run.claimed=exit@3", "", ""}[i])
			_, stderr, code := oneo(t, p.env, env, "undo", run, "--yes", "--jobs", "2", "--progress", "none")
			if i > 0 && code != 0 {
				t.Errorf("process %d: exit %d: %s", i, code, stderr)
			}
		})
	}
	processes.Wait()
	p.back()
}

// A busy tenant is set aside, and done once it is free.
func TestUndoSetsABusyTenantAside(t *testing.T) {
	t.Parallel()
	p, run := undone(t, 3)
	writer := pgtest.Admin(t, p.env.AdminURL)
	_, err := writer.PgConn().Exec(t.Context(), `begin; insert into t001.pipelines (id, key, name) values (gen_random_uuid(), 'later', 'later')`).ReadAll()
	require.NoError(t, err)
	cmd := child(p.env, append(p.extra, "ONEO_DATABASE_LOCK_TIMEOUT=200ms", "ONEO_MIGRATE_PATIENCE=1h"), "undo", run, "--yes", "-o", "json")
	logs, out := &buffer{}, &buffer{}
	cmd.Stderr, cmd.Stdout = logs, out
	require.NoError(t, cmd.Start())
	require.Eventually(t, func() bool { return strings.Contains(logs.String(), `"event":"busy"`) }, pgtest.Patience, 10*time.Millisecond, "the tenant is set aside")
	_, err = writer.Exec(t.Context(), `commit`)
	require.NoError(t, err)
	require.NoError(t, cmd.Wait(), logs.String())
	var report []struct{ Tenant, Status string }
	require.NoError(t, json.Unmarshal([]byte(out.String()), &report), out.String())
	require.Len(t, report, 3)
	p.back()
	var n int
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from t001.pipelines where key = 'later'`).Scan(&n))
	require.Equal(t, 1, n)
}

// Over HTTP: while a tenant is migrated and taken back again and again, each record that was acknowledged is there, and no
// answer is another error than 503. A server drops what has expired.
func TestServedWhileTakenBack(t *testing.T) {
	t.Parallel()
	p, _ := undone(t, 1)
	_, stderr, code := p.run(nil, "undo", "last", "--yes", "--progress", "none")
	require.Zero(t, code, stderr)
	_, token := userKey(t, p.env, nil, "t000", "user@example.com")
	s := serve(t, p.env)
	status, body := s.do(t, "POST", "t000.localhost", "/api/v1/pipelines", token, `{"key":"deals","name":"Deals","fields":[{"key":"note","name":"Note","type":"text"}]}`)
	require.Equal(t, http.StatusCreated, status, body)
	var made, waited atomic.Int64
	stop := make(chan struct{})
	var users sync.WaitGroup
	for u := range 3 {
		users.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond): // so that the machine has time for the migration, and for other tests
				}
				method, path, body, want := "POST", "/api/v1/pipelines/deals/records", fmt.Sprintf(`{"data":{"note":"%d of %d"}}`, i, u), http.StatusCreated
				if i%3 == 2 {
					method, path, body, want = "GET", path+"?limit=3&count=exact", "", http.StatusOK
				}
				status, answer := s.do(t, method, "t000.localhost", path, token, body)
				switch {
				case status == want && method == "POST":
					made.Add(1)
				case status == want:
				case status == http.StatusServiceUnavailable:
					waited.Add(1)
				default:
					t.Errorf("%s %s: %d %s", method, path, status, answer)
				}
			}
		})
	}
	for range 5 {
		_, stderr, code := p.run(nil, "migrate", "--force", "--all-tenants", "--undo-point", "--progress", "none")
		require.Zero(t, code, stderr)
		_, stderr, code = p.run(nil, "undo", "last", "--yes", "--progress", "none")
		require.Zero(t, code, stderr)
	}
	require.Eventually(t, func() bool { return made.Load() > 50 }, pgtest.Patience, time.Millisecond)
	close(stop)
	users.Wait()
	var records int64
	require.NoError(t, p.admin.QueryRow(t.Context(), `select count(*) from t000.records`).Scan(&records))
	require.Equal(t, made.Load(), records, "each record that was acknowledged, and no other")
	t.Logf("%d records, %d answers of 503", records, waited.Load())
	p.env.Invariants(t)

	var points int
	p.exec(`update public.undo_points set expires_at = now()`)
	serve(t, p.env)
	require.Eventually(t, func() bool {
		return p.admin.QueryRow(t.Context(), `select count(*) from public.undo_points`).Scan(&points) == nil && points == 0
	}, pgtest.Patience, 20*time.Millisecond, "a server drops what has expired")
	p.env.Invariants(t)
}
