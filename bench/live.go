package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

const liveRounds = 3

// traffic is what readers saw in one turn.
type traffic struct {
	perSecond     float64
	p50, p99, max time.Duration
	failures      map[string]int // answers other than 200 by status, and requests without an answer
	runs          int            // that went on meanwhile
	migrated      float64        // tenants a second, meanwhile
	ratio         float64        // of the p99 without a run, in the same round
}

// live lets readers read over all tenants, in turns without and with a run that adds a column to each of them. The server
// is one that does not know the migration, as during a rollout.
func (f *fleet) live(ctx context.Context) error {
	p, err := f.serve(ctx)
	if err != nil {
		return err
	}
	defer p.stop()
	// Until each backend has seen each tenant of its sub-pool several times.
	if _, err := f.drive(ctx, p, false, min(time.Minute, max(4*time.Second, time.Duration(len(f.slugs))*15*time.Millisecond))); err != nil {
		return err
	}
	f.b.printf("### Reading while a run goes on over %d tenants\n", len(f.slugs))
	how := "`oneo migrate --all-tenants`"
	if f.b.jobs > 0 {
		how = fmt.Sprintf("`oneo migrate --all-tenants --jobs %d`, which does not yield,", f.b.jobs)
	}
	f.b.printf("`oneo serve` reading records by id over all tenants, without a run and while %s adds a column to each, run after run; medians of %d turns of %s. wrk: 16 connections that never rest; steady: a quarter of what wrk reached, measured from the time at which a request was due.\n",
		how, liveRounds, f.b.duration)
	f.b.printf("| traffic | | requests/s | p50 ms | p99 ms | max ms | p99 of without | other than 200 |\n| --- | --- | --- | --- | --- | --- | --- | --- |")
	wrk := func(ctx context.Context) (traffic, error) { return f.wrkCounting(ctx, p, f.b.duration) }
	full, busiest, err := f.liveTurns(ctx, "wrk", wrk)
	if err != nil {
		return err
	}
	calm := full / 4
	steady := func(ctx context.Context) (traffic, error) {
		ctx, cancel := context.WithTimeout(ctx, f.b.duration)
		defer cancel()
		return summary(f.pace(ctx, p, calm, everyone(len(f.slugs))), f.b.duration), nil
	}
	_, calmest, err := f.liveTurns(ctx, "steady", steady)
	if err != nil {
		return err
	}
	f.b.printf("")
	f.b.goal(busiest <= 2 && calmest <= 2, "the p99 at most twice that without a run", fmt.Sprintf("%.2f with wrk, %.2f at a steady rate", busiest, calmest))
	return nil
}

// liveTurns takes turns without and with a run, prints both rows, and returns the requests a second without and the
// ratio of the p99s.
func (f *fleet) liveTurns(ctx context.Context, name string, read func(context.Context) (traffic, error)) (perSecond, ratio float64, err error) {
	var without, with []traffic
	for range liveRounds {
		a, err := read(ctx)
		if err != nil {
			return 0, 0, err
		}
		b, err := f.whileMigrating(ctx, read)
		if err != nil {
			return 0, 0, err
		}
		b.ratio = float64(b.p99) / float64(a.p99)
		without, with = append(without, a), append(with, b)
	}
	a, b := middleOf(without), middleOf(with)
	f.b.printf("| %s | no run | %.0f | %.1f | %.1f | %.0f | 1.00 | %s |", name, a.perSecond, ms(a.p50), ms(a.p99), ms(a.max), told(a.failures))
	f.b.printf("| %s | a run (%d runs in all, %.0f tenants/s) | %.0f | %.1f | %.1f | %.0f | **%.2f** | %s |",
		name, b.runs, b.migrated, b.perSecond, ms(b.p50), ms(b.p99), ms(b.max), b.ratio, told(b.failures))
	return a.perSecond, b.ratio, nil
}

// whileMigrating reads while runs go on one after another. The last one may outlive the reading; it is waited for.
func (f *fleet) whileMigrating(ctx context.Context, read func(context.Context) (traffic, error)) (traffic, error) {
	reading, stop := context.WithCancel(ctx)
	defer stop()
	type result struct {
		traffic
		err error
	}
	before, err := f.ledgerRows(ctx)
	if err != nil {
		return traffic{}, err
	}
	start, done := time.Now(), make(chan result, 1)
	go func() {
		t, err := read(reading)
		took := time.Since(start)
		after, cerr := f.ledgerRows(ctx)
		t.migrated = float64(after-before) / took.Seconds()
		done <- result{t, errors.Join(err, cerr)}
	}()
	for runs := 1; ; runs++ {
		column, err := f.addMigration()
		if err == nil {
			_, err = timed(f.migrate(ctx, f.b.jobs, "-q", "--force"))
		}
		if err == nil {
			err = f.added(ctx, column)
		}
		if err != nil {
			stop()
			<-done
			return traffic{}, err
		}
		select {
		case r := <-done:
			r.runs = runs
			return r.traffic, r.err
		default:
		}
	}
}

// ledgerRows is how many migrations of tenants have been applied.
func (f *fleet) ledgerRows(ctx context.Context) (n int, err error) {
	err = f.asSuperuser(ctx, func(c *pgx.Conn) error {
		return c.QueryRow(ctx, `select count(*) from public.ledger where set = 'tenant'`).Scan(&n)
	})
	return n, err
}

// middleOf is the turn in the middle by its ratio or its p99; the maximum and what failed are of all turns.
func middleOf(turns []traffic) traffic {
	sorted := slices.SortedFunc(slices.Values(turns), func(a, b traffic) int { return cmp.Or(cmp.Compare(a.ratio, b.ratio), cmp.Compare(a.p99, b.p99)) })
	m := sorted[len(sorted)/2]
	m.failures, m.runs = map[string]int{}, 0
	for _, t := range turns {
		m.max, m.runs = max(m.max, t.max), m.runs+t.runs
		for status, n := range t.failures {
			m.failures[status] += n
		}
	}
	return m
}

// told is a count by status as a table shows it.
func told(failures map[string]int) string {
	var all []string
	for status, n := range failures {
		all = append(all, fmt.Sprintf("%s: %d", status, n))
	}
	slices.Sort(all)
	return cmp.Or(strings.Join(all, ", "), "none")
}

var countedLine = regexp.MustCompile(`(?m)^counted (\d+) p50 (\d+) p99 (\d+) max (\d+) unanswered (\d+) statuses(.*)$`)

// wrkCounting lets wrk read over all tenants and counts the answers by status.
func (f *fleet) wrkCounting(ctx context.Context, p *process, d time.Duration) (traffic, error) {
	text, err := f.wrk(ctx, p, false, d, "COUNT=1")
	if err != nil {
		return traffic{}, err
	}
	g := countedLine.FindStringSubmatch(text)
	if g == nil {
		return traffic{}, fmt.Errorf("wrk did not count:\n%s", text)
	}
	us := func(s string) time.Duration {
		n, _ := strconv.ParseInt(s, 10, 64)
		return time.Duration(n) * time.Microsecond
	}
	requests, _ := strconv.ParseFloat(g[1], 64)
	t := traffic{perSecond: requests / d.Seconds(), p50: us(g[2]), p99: us(g[3]), max: us(g[4]), failures: map[string]int{}}
	if n, _ := strconv.Atoi(g[5]); n > 0 {
		t.failures["no answer"] = n
	}
	for _, f := range strings.Fields(g[6]) {
		status, n, _ := strings.Cut(f, "=")
		t.failures[status], _ = strconv.Atoi(n)
	}
	return t, nil
}
