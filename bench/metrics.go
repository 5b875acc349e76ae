package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// sightParts are measured with one installation, which grows.
var sightParts = []string{"metrics", "tracing", "dashboard"}

// sight measures what it costs to see what goes on.
func (b *bench) sight(ctx context.Context, only []string, few, many int) error {
	asked := func(part string) bool { return slices.Contains(only, part) }
	in, err := b.install(ctx, "bench_sight", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	if err := in.grow(ctx, few); err != nil {
		return err
	}
	if asked("metrics") {
		if err := in.counting(ctx); err != nil {
			return err
		}
	}
	if asked("tracing") {
		if err := in.tracing(ctx); err != nil {
			return err
		}
	}
	var seen watched
	if asked("dashboard") {
		if err := in.watch(ctx, &seen); err != nil {
			return err
		}
	}
	if !asked("metrics") && !asked("dashboard") {
		return nil
	}
	b.tell("sight: up to %d tenants", many)
	if err := in.grow(ctx, many); err != nil {
		return err
	}
	if asked("metrics") {
		if err := in.scrapes(ctx); err != nil {
			return err
		}
	}
	if asked("dashboard") {
		if err := in.watch(ctx, &seen); err != nil {
			return err
		}
		seen.print(b)
	}
	return nil
}

// inTurns measures servers in turn: of each the turn in the middle, by its ratio to the first one's turn of the same round.
// Those to be scraped are, after each turn, as Prometheus would every few seconds.
func (in *installation) inTurns(ctx context.Context, servers []*process, scraped ...*process) ([]measured, error) {
	for _, p := range servers {
		if _, err := in.drive(ctx, p, false, in.warm()); err != nil {
			return nil, err
		}
	}
	turn := max(2*time.Second, in.b.duration/rounds)
	turns := make([][]measured, len(servers))
	for i := range len(servers) * rounds { // more than elsewhere, and each first as often as the others: the difference is small
		round := make([]measured, len(servers))
		for k := range servers {
			which := (i + k) % len(servers)
			var err error
			if round[which], err = in.drive(ctx, servers[which], false, turn); err != nil {
				return nil, err
			}
			for _, p := range scraped {
				if _, _, err := p.scrape(ctx); err != nil {
					return nil, err
				}
			}
		}
		for k := range round {
			round[k].ratio = round[k].perSecond / round[0].perSecond
			turns[k] = append(turns[k], round[k])
		}
	}
	rows := make([]measured, len(servers))
	for k := range rows {
		rows[k] = middle(turns[k])
	}
	return rows, nil
}

// leastOfOff is the throughput that is promised with counting or tracing on, of the one without.
const leastOfOff = 0.95

// counting measures the served read with counting on and off.
func (in *installation) counting(ctx context.Context) error {
	off, err := in.serve(ctx, "ONEO_METRICS_ENABLED=false")
	if err != nil {
		return err
	}
	defer off.stop()
	on, err := in.serve(ctx)
	if err != nil {
		return err
	}
	defer on.stop()
	rows, err := in.inTurns(ctx, []*process{off, on}, on)
	if err != nil {
		return err
	}
	b, without, with := in.b, rows[0], rows[1]
	b.printf("### Counting, %d tenants\n", len(in.slugs))
	b.printf("The served read of a record by id (16 connections, wrk), metrics.enabled off and on, in turns.\n")
	b.printf("| counting | requests/s | of off | p99 | server MB |\n| --- | --- | --- | --- | --- |")
	b.printf("| off | %.0f | **1.00** | %s | %.0f |", without.perSecond, without.p99, without.serverMB)
	b.printf("| on | %.0f | **%.2f** | %s | %.0f |\n", with.perSecond, with.ratio, with.p99, with.serverMB)
	b.goal(with.ratio >= leastOfOff, fmt.Sprintf("at least %.2f of off", leastOfOff), fmt.Sprintf("%.3f", with.ratio))
	return nil
}

// scrapes measures the scrape of a server that counts all tenants.
func (in *installation) scrapes(ctx context.Context) error {
	on, err := in.serve(ctx)
	if err != nil {
		return err
	}
	defer on.stop()
	if _, err := in.drive(ctx, on, false, in.warm()); err != nil {
		return err
	}
	many := len(in.slugs)
	var took []time.Duration
	var size int
	for range 20 {
		d, body, err := on.scrape(ctx)
		if err != nil {
			return err
		}
		took, size = append(took, d), len(body)
		if n := bytes.Count(body, []byte("\noneo_tenant_requests_total{")); n < 2 {
			return fmt.Errorf("a scrape has %d series of tenants", n)
		}
		if want := fmt.Appendf(nil, "\noneo_counted_tenants %d\n", many); !bytes.Contains(body, want) {
			return fmt.Errorf("the server does not count %d tenants apart", many)
		}
	}
	in.b.printf("### A scrape, %d tenants counted\n", many)
	in.b.printf("| scrape | median ms | slowest ms | KB | server MB |\n| --- | --- | --- | --- | --- |")
	in.b.printf("| GET /metrics | %.1f | %.1f | %d | %.0f |\n", ms(median(took)), ms(slices.Max(took)), size>>10, on.residentMB())
	in.b.goal(slices.Max(took) < 100*time.Millisecond && size < 1<<20, "below 100 ms and 1 MB",
		fmt.Sprintf("at most %.1f ms and %d KB", ms(slices.Max(took)), size>>10))
	return nil
}

// scrape reads /metrics as Prometheus does, without compression.
func (p *process) scrape(ctx context.Context) (took time.Duration, body []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.ops+"/metrics", nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Accept-Encoding", "identity")
	start := time.Now()
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET /metrics: %s", resp.Status)
	}
	return time.Since(start), body, err
}
