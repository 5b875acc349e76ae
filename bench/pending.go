package main

import (
	"context"
	"fmt"
	"slices"
	"time"
)

// pendings is what "nothing to do" took at each number of tenants.
type pendings []struct {
	tenants int
	oneo    time.Duration
	tools   []time.Duration // the whole loop, in the order of tools
}

const (
	pendingRuns  = 5
	pendingLoops = 3
)

// pending measures `oneo migrate --all-tenants` with nothing to do, the whole command, and each tool's loop over the same
// schemas with as many workers. The tools' tables of versions are made before.
func (f *fleet) pending(ctx context.Context, to *pendings) error {
	if _, err := timed(f.migrate(ctx, f.jobs, "-q")); err != nil { // the first one reads its binary from the disk
		return err
	}
	var ours []time.Duration
	for range pendingRuns {
		took, err := timed(f.migrate(ctx, f.jobs, "-q"))
		if err != nil {
			return err
		}
		ours = append(ours, took)
	}
	for _, t := range tools {
		if err := t.overAll(ctx, f, t.files(f.base), f.jobs); err != nil {
			return err
		}
	}
	loops := make([][]time.Duration, len(tools))
	for round := range pendingLoops {
		for i := range tools {
			i := (i + round) % len(tools)
			start := time.Now()
			if err := tools[i].overAll(ctx, f, tools[i].files(f.base), f.jobs); err != nil {
				return err
			}
			loops[i] = append(loops[i], time.Since(start))
		}
	}
	theirs := make([]time.Duration, len(tools))
	for i, all := range loops {
		theirs[i] = median(all)
	}
	*to = append(*to, pendings{{len(f.slugs), median(ours), theirs}}...)
	return nil
}

func (all pendings) print(f *fleet) {
	if len(all) == 0 {
		return
	}
	f.b.printf("### Nothing pending\n")
	f.b.printf("`oneo migrate --all-tenants`, the whole command (median of %d); beside it each tool in a loop over the same schemas, %d workers, within this process (median of %d). The tools' columns are ms a schema; tern's lock has one number for the whole database, so that its workers wait for each other.\n",
		pendingRuns, f.jobs, pendingLoops)
	head, line := "| tenants | oneo ms | of the first | oneo ms a schema |", "| --- | --- | --- | --- |"
	for _, t := range tools {
		head, line = head+" "+t.name+" |", line+" --- |"
	}
	f.b.printf("%s\n%s", head, line)
	var ratios []float64
	for _, p := range all {
		ratios = append(ratios, float64(p.oneo)/float64(all[0].oneo))
		row := fmt.Sprintf("| %d | %.1f | **%.2f** | %.3f |", p.tenants, ms(p.oneo), ratios[len(ratios)-1], ms(p.oneo)/float64(p.tenants))
		for _, t := range p.tools {
			row += fmt.Sprintf(" %.2f |", ms(t)/float64(p.tenants))
		}
		f.b.printf("%s", row)
	}
	spread := slices.Max(ratios) / slices.Min(ratios)
	f.b.printf("")
	f.b.goal(spread <= 1.2, "within 20 % of each other", fmt.Sprintf("the slowest is %.2f of the fastest", spread))
}
