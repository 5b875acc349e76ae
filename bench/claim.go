package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// claim compares a creation that takes a spare of the warm pool with one that makes everything, both with a first user
// and on one connection. Both take turns; the pool is filled while no clock runs.
func (b *bench) claim(ctx context.Context, n int) error {
	in, err := b.install(ctx, "bench_claim", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	const rounds = 4
	var full, claimed []time.Duration
	for round := range rounds {
		each, err := in.createEach(ctx, 0, fmt.Sprintf("f%d", round), n/rounds)
		if err != nil {
			return err
		}
		full = append(full, each...)
		if each, err = in.createEach(ctx, n/rounds, fmt.Sprintf("c%d", round), n/rounds); err != nil {
			return err
		}
		claimed = append(claimed, each...)
	}
	b.printf("### Sign-up: %d tenants each way, with a first user, on one connection\n", n)
	b.printf("| way | ms (median) | p99 | slowest | of a full creation |\n| --- | --- | --- | --- | --- |")
	whole := ms(median(full))
	for _, way := range []struct {
		name string
		each []time.Duration
	}{{"full creation", full}, {"a spare of the warm pool", claimed}} {
		slices.Sort(way.each)
		b.printf("| %s | %.1f | %.1f | %.1f | **%.2f** |", way.name, ms(median(way.each)), ms(way.each[len(way.each)*99/100]), ms(way.each[len(way.each)-1]), ms(median(way.each))/whole)
	}
	b.printf("")
	return nil
}

// createEach makes n tenants, from a pool of that size where it is not 0, and returns how long each took.
func (in *installation) createEach(ctx context.Context, pool int, prefix string, n int) (each []time.Duration, err error) {
	err = in.openPooled(pool, func(_ *postgres.DB, _ *migrate.Migrator, p *provision.Provisioner) error {
		if err := fill(ctx, p, pool); err != nil {
			return err
		}
		for i := range n {
			slug, err := tenant.ParseSlug(fmt.Sprintf("%s-%04d", prefix, i))
			if err != nil {
				return err
			}
			start := time.Now()
			if _, err := p.Create(ctx, provision.CreateRequest{Slug: slug, AdminEmail: "bench@example.com", AdminPasswordHash: benchHash}); err != nil {
				return err
			}
			each = append(each, time.Since(start))
		}
		if pool == 0 {
			return nil
		}
		left, err := p.Spares(ctx)
		if err == nil && left[0].Ready != 0 {
			err = fmt.Errorf("%d spares were not taken", left[0].Ready)
		}
		return err
	})
	return each, err
}

// fill lets a worker fill the pool.
func fill(ctx context.Context, p *provision.Provisioner, size int) error {
	wctx, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- p.Work(wctx) }()
	for {
		counts, err := p.Spares(ctx)
		if err != nil || counts[0].Ready >= size {
			stop()
			return errors.Join(err, <-done)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
