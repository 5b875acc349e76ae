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

// metrics measures the served read with counting on and off, in turns, and a scrape of a server that counts many tenants.
func (b *bench) metrics(ctx context.Context, few, many int) error {
	in, err := b.install(ctx, "bench_metrics", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	if err := in.grow(ctx, few); err != nil {
		return err
	}
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
	for _, p := range []*process{off, on} {
		if _, err := in.drive(ctx, p, false, 4*time.Second); err != nil {
			return err
		}
	}
	turn := max(2*time.Second, b.duration/rounds)
	var offs, ons []measured
	for i := range 2 * rounds { // twice as many as elsewhere, and each first as often as the other: the difference is small
		var pair [2]measured
		for k := range 2 {
			which := (i + k) % 2
			if pair[which], err = in.drive(ctx, []*process{off, on}[which], false, turn); err != nil {
				return err
			}
			if _, _, err := on.scrape(ctx); err != nil { // as Prometheus would, every few seconds
				return err
			}
		}
		pair[1].ratio = pair[1].perSecond / pair[0].perSecond
		offs, ons = append(offs, pair[0]), append(ons, pair[1])
	}
	without, with := middle(offs), middle(ons)
	b.printf("### Counting, %d tenants\n", few)
	b.printf("The served read of a record by id (16 connections, wrk), metrics.enabled off and on, in turns.\n")
	b.printf("| counting | requests/s | of off | p99 | server MB |\n| --- | --- | --- | --- | --- |")
	b.printf("| off | %.0f | **1.00** | %s | %.0f |", without.perSecond, without.p99, without.serverMB)
	b.printf("| on | %.0f | **%.2f** | %s | %.0f |\n", with.perSecond, with.ratio, with.p99, with.serverMB)

	if err := in.grow(ctx, many); err != nil {
		return err
	}
	if _, err := in.drive(ctx, on, false, time.Minute); err != nil { // each tenant several times
		return err
	}
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
	b.printf("### A scrape, %d tenants counted\n", many)
	b.printf("| scrape | median ms | slowest ms | KB | server MB |\n| --- | --- | --- | --- | --- |")
	b.printf("| GET /metrics | %.1f | %.1f | %d | %.0f |\n", ms(median(took)), ms(slices.Max(took)), size>>10, on.residentMB())
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
