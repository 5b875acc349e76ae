package main

import (
	"context"
	"time"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
)

var rehearsedColumns = []column[app.Rehearsed]{
	{"TENANT", "tenant", func(r app.Rehearsed) any { return r.Tenant.Slug.String() }},
	{"STATUS", "status", func(r app.Rehearsed) any {
		if r.Err != nil {
			return "failed"
		}
		return "ok"
	}},
	{"ROWS", "rows", func(r app.Rehearsed) any { return r.Rows }},
	{"MS", "duration_ms", func(r app.Rehearsed) any { return r.Took.Milliseconds() }},
	{"ERROR", "error", func(r app.Rehearsed) any {
		if r.Err == nil {
			return nil
		}
		return errorObject(r.Err)
	}},
}

// drillPhysical recovers a moment and takes some tenants from it.
func drillPhysical(ctx context.Context, e *env, o backupDrillOptions) error {
	if o.dryRun {
		return errUsage{fault.New(fault.Invalid, "--dry-run does not go with --physical").WithHint("oneo backup physical list shows what was proved last")}
	}
	if !o.selector.all && len(o.selector.names) == 0 {
		o.selector.all = true
	}
	f, err := o.selector.filter()
	if err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	var at app.Moment
	if o.at.given() {
		at, err = o.at.moment(ctx, a)
	} else {
		at.Time, err = a.RandomMoment(ctx)
	}
	if err != nil {
		return err
	}
	m, err := newPhases(e, "auto")
	if err != nil {
		return err
	}
	e.say("recovering to %s, beside what is live", at)
	var rows []app.Rehearsed
	proofs, err := a.Rehearse(ctx, app.PastOptions{Moment: at, Why: "oneo backup drill --physical", Report: m.tell, Say: e.say}, f, o.sample, func(r app.Rehearsed) {
		m.end()
		rows = append(rows, r)
	})
	m.end()
	if err != nil && len(rows) == 0 {
		return err
	}
	if serr := show(e, rows, rehearsedColumns); serr != nil {
		return serr
	}
	for _, p := range proofs {
		e.say("%s: %s was reached from the physical backup %s; %d tenant(s), %s row(s), in %s", p.Cluster, at, p.Backup, p.Tenants, grouped(p.Rows), p.Duration.Round(100*time.Millisecond))
	}
	return err
}
