package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
)

const (
	quietTenants = 20
	quietEach    = 50 * time.Millisecond // between two requests of one of them
	noisyClients = 64
	noisyRecords = 400_000
)

// neighbours measures twenty quiet tenants alone, beside one that saturates the server with slow queries, and the same with
// budgets. Everybody has the same server; the quiet ones ask at a fixed pace and are measured from when they meant to ask, so
// that a request that is held up does not hide those behind it.
func (b *bench) neighbours(ctx context.Context) error {
	in, err := b.install(ctx, "bench_neighbours", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	if err := in.grow(ctx, quietTenants+1); err != nil {
		return err
	}
	if err := in.open(func(db *postgres.DB, _ *migrate.Migrator, _ *provision.Provisioner) error {
		return db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			const many = `insert into t00000.records (id, pipeline_id, data)
select gen_random_uuid(), p.id, jsonb_build_object('stage', 'Won', 'amount', g, 'note', repeat('x', 60)) from t00000.pipelines p, generate_series(1, $1::int) g`
			_, err := tx.Exec(ctx, many, noisyRecords)
			return err
		})
	}); err != nil {
		return err
	}
	budget := func(flags ...string) error {
		cmd := exec.CommandContext(ctx, b.binary, append([]string{"tenant", "budget", in.slugs[0]}, flags...)...)
		cmd.Env = in.environment()
		if text, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("tenant budget: %w: %s", err, text)
		}
		return nil
	}
	type row struct {
		name  string
		noisy bool
		flags []string
		more  []string
		loop  bool
		quiet quiet
		noise noise
	}
	rows := []*row{
		{name: "alone"},
		{name: "alone, a loop in a shell keeps one core busy", loop: true},
		{name: "beside, with budgets", noisy: true, flags: []string{"--in-flight", "1", "--statement-timeout", "200ms", "--requests", "5"}},
		{name: "beside, with tight budgets", noisy: true, flags: []string{"--in-flight", "1", "--statement-timeout", "50ms", "--requests", "1"}},
		{name: "beside, with the server's own bounds only", noisy: true},
		{name: "beside, without any bound", noisy: true, more: []string{"ONEO_TENANCY_IN_FLIGHT=10000"}},
	}
	for _, r := range rows {
		b.tell("neighbours: %s", r.name)
		if err := budget(append([]string{"--reset"}, r.flags...)...); err != nil {
			return err
		}
		p, err := in.serve(ctx, r.more...)
		if err != nil {
			return err
		}
		in.crowd(ctx, p, 3*time.Second, false) // caches and backends are warm
		idle := func() {}
		if r.loop { // what the scheduler alone does to others, whoever it is that computes
			loop := exec.CommandContext(ctx, "sh", "-c", "while :; do :; done")
			if err := loop.Start(); err != nil {
				return err
			}
			idle = func() { _, _ = loop.Process.Kill(), loop.Wait() }
		}
		r.quiet, r.noise = in.crowd(ctx, p, b.duration, r.noisy)
		idle()
		p.stop()
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	b.printf("### %d quiet tenants beside one that asks for slow lists\n", quietTenants)
	b.printf("Each quiet tenant reads a record every %d ms; the noisy one counts its %d records in %d connections at once.\n", quietEach.Milliseconds(), noisyRecords, noisyClients)
	b.printf("| way | p50 ms | p99 ms | of alone | not answered 200 | the noisy one's answers |\n| --- | --- | --- | --- | --- | --- |")
	alone := rows[0].quiet.p99
	for _, r := range rows {
		b.printf("| %s | %.1f | %.1f | **%.1f** | %s | %s |", r.name, ms(r.quiet.p50), ms(r.quiet.p99), float64(r.quiet.p99)/float64(alone), told(r.quiet.failures), told(r.noise.answers))
	}
	b.printf("")
	ratio := float64(rows[3].quiet.p99) / float64(alone)
	b.goal(ratio <= 2 && len(rows[3].quiet.failures) == 0, "with tight budgets a p99 of at most twice the one alone, and nobody but the noisy tenant refused",
		fmt.Sprintf("%.1f times, refused: %s", ratio, told(rows[3].quiet.failures)))
	return nil
}

// quiet is how the quiet tenants were served, noise how the noisy one was, by status.
type quiet struct {
	p50, p99 time.Duration
	failures map[string]int
}

type noise struct{ answers map[string]int }

// crowd lets the quiet tenants ask for a while, and the noisy one beside them if it is to.
func (in *installation) crowd(ctx context.Context, p *process, d time.Duration, noisy bool) (quiet, noise) {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	// Everybody dials as if from a machine of their own: to the server, whatever the name.
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 2 * noisyClients, DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, p.addr)
	}}}
	defer client.CloseIdleConnections()
	ask := func(i int, path string) (status string) {
		req, err := http.NewRequest(http.MethodGet, "http://"+in.slugs[i]+".localhost"+path, nil)
		if err != nil {
			return err.Error()
		}
		req.Header.Set("Authorization", "Bearer "+token(in.slugs[i]))
		resp, err := client.Do(req)
		if err != nil {
			return "no answer"
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		return fmt.Sprint(resp.StatusCode)
	}
	var mu sync.Mutex
	var took []time.Duration
	q, n := quiet{failures: map[string]int{}}, noise{answers: map[string]int{}}
	var asking sync.WaitGroup
	for i := 1; i <= quietTenants; i++ {
		asking.Go(func() {
			// They do not all ask at the same moment.
			next := time.Now().Add(quietEach * time.Duration(i) / quietTenants)
			for k := 0; ; k++ {
				if !pauseFor(ctx, time.Until(next)) {
					// What it meant to ask and could not, because it was held up, counts too.
					mu.Lock()
					defer mu.Unlock()
					for ; time.Since(next) > quietEach; next = next.Add(quietEach) {
						took = append(took, time.Since(next))
						q.failures["never sent"]++
					}
					return
				}
				meant := next
				next = next.Add(quietEach)
				status := ask(i, recordPath(in.records[i][k%len(in.records[i])]))
				mu.Lock()
				took = append(took, time.Since(meant))
				if status != "200" {
					q.failures[status]++
				}
				mu.Unlock()
			}
		})
	}
	if noisy {
		for range noisyClients {
			asking.Go(func() {
				slow := strings.TrimSuffix(recordPath(""), "/") + "?count=exact&limit=1&filter=" + url.QueryEscape(`stage = "Won"`)
				for ctx.Err() == nil {
					status := ask(0, slow)
					mu.Lock()
					n.answers[status]++
					mu.Unlock()
					if status != "200" { // impatient, and no attack
						pauseFor(ctx, 250*time.Millisecond)
					}
				}
			})
		}
	}
	asking.Wait()
	slices.Sort(took)
	q.p50, q.p99 = took[len(took)/2], took[len(took)*99/100]
	return q, n
}

func pauseFor(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(max(d, 0)):
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
