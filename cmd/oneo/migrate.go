package main

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type migrateOptions struct {
	shared      bool
	jobs        int
	maxFailures int
	selector    selector
}

func newMigrateCmd(e *env) *cobra.Command {
	var o migrateOptions
	cmd := &cobra.Command{
		Use: "migrate", Short: "Bring the shared schema and tenants to the newest version",
		Long: `Apply what is missing: with --shared to the shared schema, with --tenant to some tenants, with
--all-tenants to the shared schema first and then to every tenant.

Each migration of each tenant is one transaction together with its ledger row: a run that is
interrupted or killed is finished by running it again. One tenant's failure does not stop the
others; the exit code is then 3. When nothing is pending, that is one query.`,
		Example: "  oneo migrate --shared\n  oneo migrate --all-tenants --jobs 8\n  oneo migrate -t acme -t 'beta-*'",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return runMigrate(cmd.Context(), e, o) },
	}
	o.selector.bind(cmd, e)
	cmd.Flags().BoolVar(&o.shared, "shared", false, "the shared schema only")
	cmd.Flags().IntVar(&o.jobs, "jobs", min(8, 2*runtime.NumCPU()), "tenants at one time; at most database.owner_conns")
	cmd.Flags().IntVar(&o.maxFailures, "max-failures", 0, "begin no more tenants once so many have failed; 0: no bound")
	cmd.AddCommand(newMigrateStatusCmd(e))
	return cmd
}

// migrated is one schema's outcome.
type migrated struct{ fleet.Outcome }

var migratedColumns = []column[migrated]{
	{"TENANT", "tenant", func(m migrated) any { return m.Tenant }},
	{"STATUS", "status", func(m migrated) any { return string(m.Status) }},
	{"FROM", "from", func(m migrated) any { return m.From }},
	{"TO", "to", func(m migrated) any { return m.To }},
	{"MS", "duration_ms", func(m migrated) any { return m.Duration.Milliseconds() }},
	{"ERROR", "error", func(m migrated) any { return errorObject(m.Err) }},
}

// errorObject is an error inside a report.
func errorObject(err error) any {
	if err == nil {
		return nil
	}
	f := fault.Of(err)
	message := f.Message
	if f.Kind == fault.Internal {
		message = err.Error()
	}
	return reportedError{Code: f.StableCode(), SQLState: postgres.SQLState(err), Message: message, Hint: f.Hint}
}

type reportedError struct {
	Code     string `json:"code"`
	SQLState string `json:"sqlstate,omitempty"`
	Message  string `json:"message"`
	Hint     string `json:"hint,omitempty"`
}

func (r reportedError) String() string { return r.Message }

func runMigrate(ctx context.Context, e *env, o migrateOptions) error {
	if o.jobs < 1 {
		return errUsage{fault.New(fault.Invalid, "--jobs must be at least 1")}
	}
	if o.shared && (o.selector.all || len(o.selector.names) > 0) {
		return errUsage{fault.New(fault.Invalid, "--shared goes with no tenants").WithHint("--all-tenants migrates the shared schema first")}
	}
	if !o.shared {
		if _, err := o.selector.filter(); err != nil {
			var f *fault.Fault
			if errors.As(err, &f) && f.Code == "no_selector" {
				return errUsage{f.WithHint("add --shared, --tenant NAME (repeatable, globs, @file) or --all-tenants")}
			}
			return err
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	var rows []migrated
	if o.shared || o.selector.all {
		res, err := a.Migrate.Shared(ctx)
		if err != nil {
			return err
		}
		out := fleet.Outcome{Tenant: "(shared)", Status: fleet.Skipped, From: res.From, To: res.To, Duration: res.Duration}
		if len(res.Applied) > 0 {
			out.Status = fleet.OK
			e.say("shared schema: applied %s", names(res.Applied))
		}
		rows = append(rows, migrated{out})
	} else if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	if o.shared {
		if rows[0].Status == fleet.Skipped {
			e.say("nothing to do: the shared schema is at version %d", rows[0].To)
		}
		return show(e, rows, migratedColumns)
	}
	ts, passed, err := behind(ctx, a, o.selector)
	if err != nil {
		return err
	}
	for _, t := range passed {
		why := fault.New(fault.Conflict, "it is %s", t.State).WithCode("wrong_state")
		if t.State == tenant.Dropped {
			why = why.WithHint("oneo tenant undrop %s", t.Slug)
		}
		e.say("skipped %s: it is %s", t.Slug, t.State)
		rows = append(rows, migrated{fleet.Outcome{Tenant: t.Slug.String(), Status: fleet.Skipped, Err: why}})
	}
	if len(ts) == 0 {
		if len(passed) == 0 {
			e.say("nothing to do: every selected tenant is at version %d", a.Migrate.Head(migrate.TenantSet))
		} else {
			e.say("nothing to do: every other selected tenant is at version %d", a.Migrate.Head(migrate.TenantSet))
		}
		if e.output == "table" {
			return nil
		}
		return show(e, rows, migratedColumns)
	}
	report := migrateTenants(ctx, e, a, o, ts)
	for _, out := range report.Outcomes {
		rows = append(rows, migrated{out})
	}
	if err := show(e, rows, migratedColumns); err != nil {
		return err
	}
	failed := report.Count(fleet.Failed)
	e.say("%d migrated, %d failed, %d skipped in %s", report.Count(fleet.OK), failed, report.Count(fleet.Skipped), report.Duration.Round(time.Millisecond))
	switch {
	case failed > 0:
		return errExit{exitSomeFailed}
	case report.Interrupted():
		e.say("interrupted; run the same command again to finish")
		return errExit{exitInterrupted}
	}
	return nil
}

func migrateTenants(ctx context.Context, e *env, a *app.App, o migrateOptions, ts []tenant.Tenant) fleet.Report {
	done := 0
	return fleet.Run(ctx, ts, fleet.Options{
		Jobs: min(o.jobs, a.Config.Database.OwnerConns), MaxFailures: o.maxFailures,
		Each: func(out fleet.Outcome) {
			done++
			switch {
			case out.Err != nil:
				e.say("%d/%d %s failed: %s", done, len(ts), out.Tenant, errorObject(out.Err))
			case e.verbose || len(ts) <= 20 || done%100 == 0 || done == len(ts):
				e.say("%d/%d %s %d -> %d", done, len(ts), out.Tenant, out.From, out.To)
			}
		},
	}, func(t tenant.Tenant) string { return t.Slug.String() },
		func(ctx context.Context, t tenant.Tenant) fleet.Outcome {
			res, err := a.Migrate.Tenant(ctx, t, migrate.TenantOptions{})
			out := fleet.Outcome{Status: fleet.OK, From: res.From, To: res.To, Err: err}
			if err != nil {
				out.Status = fleet.Failed
			} else if len(res.Applied) == 0 {
				out.Status = fleet.Skipped
			}
			return out
		})
}

// behind lists the selected tenants that lack migrations: one query for each group, and another for the names only if
// there are any. passed are those that were named and are in a state that is not selected.
func behind(ctx context.Context, a *app.App, s selector) (selected, passed []tenant.Tenant, err error) {
	f, err := s.filter()
	if err != nil {
		return nil, nil, err
	}
	late, err := lacking(ctx, a)
	if err != nil {
		return nil, nil, err
	}
	if len(late) == 0 && len(f.Names) == 0 && len(f.Exclude) == 0 && f.Group == "" {
		return nil, nil, nil
	}
	s.behind = false // they are told apart here
	states := f.States
	f.States = nil
	all, err := s.list(ctx, a, f)
	for _, t := range all {
		switch {
		case !slices.Contains(states, t.State):
			if slices.Contains(f.Names, t.Slug.String()) {
				passed = append(passed, t)
			}
		case late[t.Number]:
			selected = append(selected, t)
		}
	}
	return selected, passed, err
}

// lacking finds who lacks migrations, in one query for each group.
func lacking(ctx context.Context, a *app.App) (map[int32]bool, error) {
	late := map[int32]bool{}
	for _, group := range a.DB.Groups() {
		bs, err := a.Migrate.TenantsBehind(ctx, group)
		if err != nil {
			return nil, err
		}
		for _, b := range bs {
			late[b.Number] = true
		}
	}
	return late, nil
}

func names(files []migrate.File) string {
	all := make([]string, len(files))
	for i, f := range files {
		all[i] = f.String()
	}
	return strings.Join(all, ", ")
}

func newMigrateStatusCmd(e *env) *cobra.Command {
	var check bool
	cmd := &cobra.Command{
		Use: "status", Short: "Show which versions the tenants are at",
		Long: `Group the fleet by version, without opening a tenant. A tenant whose schema was dropped, or dropped
and made again, behind oneo's back is named. With --check the exit code is 13 when anything is pending.`,
		Example: "  oneo migrate status\n  oneo migrate status --check -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return migrateStatus(cmd.Context(), e, check) },
	}
	cmd.Flags().BoolVar(&check, "check", false, "exit 13 when anything is pending")
	return cmd
}

type statusRow struct {
	migrate.VersionCount
	head int
}

func migrateStatus(ctx context.Context, e *env, check bool) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	pending := a.Migrate.SharedBehind(ctx)
	if pending != nil && !fault.Is(pending, fault.Pending) {
		return pending
	}
	if pending != nil {
		e.say("%s", fault.Of(pending).Message)
		if err := show(e, []statusRow{}, statusColumns); err != nil {
			return err
		}
	} else {
		st, err := a.Migrate.Status(ctx)
		if err != nil {
			return err
		}
		var rows []statusRow
		late := 0
		for _, v := range st.Versions {
			rows = append(rows, statusRow{v, st.Head})
			if v.Version < st.Head {
				late += v.Tenants
			}
		}
		if err := show(e, rows, statusColumns); err != nil {
			return err
		}
		if len(st.Missing) > 0 {
			lost, err := namesOf(ctx, a, st.Missing)
			if err != nil {
				return err
			}
			pending = fault.New(fault.Pending, "the schema of %d tenant(s) is gone or was made again behind oneo's back: %s", len(st.Missing), lost).
				WithCode("schema_missing").WithHint("restore them from a backup; nothing was changed")
			e.say("%s", fault.Of(pending).Message)
		} else if late > 0 {
			pending = fault.New(fault.Pending, "%d tenant(s) are behind", late).WithCode("tenants_behind").WithHint("oneo migrate --all-tenants")
		}
	}
	if check && pending != nil {
		return pending
	}
	return nil
}

var statusColumns = []column[statusRow]{
	{"VERSION", "version", func(s statusRow) any { return s.Version }},
	{"TENANTS", "tenants", func(s statusRow) any { return s.Tenants }},
	{"BEHIND", "behind", func(s statusRow) any { return max(0, s.head-s.Version) }},
	{"GROUP", "group", func(s statusRow) any { return s.Group }},
}

func namesOf(ctx context.Context, a *app.App, numbers []int32) (string, error) {
	const most = 5
	var all []string
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ts, err := registry.ByNumbers(ctx, tx, numbers[:min(most, len(numbers))])
		for _, t := range ts {
			all = append(all, t.Slug.String())
		}
		return err
	})
	if len(numbers) > most {
		all = append(all, fmt.Sprintf("and %d more", len(numbers)-most))
	}
	return strings.Join(all, ", "), err
}
