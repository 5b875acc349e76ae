package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type driftOptions struct {
	selector   selector
	repairPlan bool
	check      bool
}

func newMigrateDriftCmd(e *env) *cobra.Command {
	var o driftOptions
	cmd := &cobra.Command{
		Use: "drift", Short: "Compare the tenants' schemas with what the migrations make",
		Long: `Describe every selected tenant in one query over the catalog, and compare each with what the
migrations make of an empty schema up to that tenant's version. Tenants that are alike are one row.
Nothing is changed, not even with --repair-plan, which prints the SQL that brings each tenant back:
what is too much is dropped by lines that are commented out, each under a warning, and a sentence
stands where no statement is safe. Read it before you give it to psql.

With -o name the names of all tenants that are not identical are printed. With --check the exit code
is 13 when there are any; it is 3 when a tenant could not be read.`,
		Example: "  oneo migrate drift --all-tenants --check\n  oneo migrate drift -t acme -o json\n  oneo migrate drift --all-tenants --repair-plan >plan.sql",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return migrateDrift(cmd.Context(), e, o) },
	}
	o.selector.bind(cmd, e)
	cmd.Flags().BoolVar(&o.repairPlan, "repair-plan", false, "print the SQL that brings each tenant back; it is not run")
	cmd.Flags().BoolVar(&o.check, "check", false, "exit 13 when a tenant is not as the migrations make it")
	return cmd
}

// differences in a table are the first few.
type differences []structure.Difference

func (ds differences) String() string {
	const most = 5
	var all []string
	for _, d := range ds[:min(most, len(ds))] {
		all = append(all, d.String())
	}
	if len(ds) > most {
		all = append(all, fmt.Sprintf("and %d more", len(ds)-most))
	}
	return strings.Join(all, "; ")
}

// slugs in a table are the first few.
type slugs []string

func (s slugs) String() string {
	const most = 5
	if len(s) <= most {
		return strings.Join(s, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(s[:most], ", "), len(s)-most)
}

func slugsOf(ts []tenant.Tenant) slugs {
	all := make(slugs, len(ts))
	for i, t := range ts {
		all[i] = t.Slug.String()
	}
	return all
}

var driftColumns = []column[structure.Group]{
	{"TENANTS", "tenants", func(g structure.Group) any { return len(g.Tenants) }},
	{"STATE", "state", func(g structure.Group) any { return string(g.State) }},
	{"VERSION", "version", func(g structure.Group) any { return g.Version }},
	{"GROUP", "group", func(g structure.Group) any { return g.Database }},
	{"DIFFERENCES", "differences", func(g structure.Group) any { return append(differences{}, g.Differences...) }},
	{"NAMES", "names", func(g structure.Group) any { return slugsOf(g.Tenants) }},
	{"ERROR", "error", func(g structure.Group) any { return errorObject(g.Err) }},
}

// repair is one tenant's script.
type repair struct {
	Tenant string `json:"tenant"`
	SQL    string `json:"sql"`
}

var repairColumn = column[structure.Group]{"REPAIR", "repair", func(g structure.Group) any {
	all := []repair{}
	for _, t := range g.Tenants {
		if sql := g.Repair(t); sql != "" {
			all = append(all, repair{t.Slug.String(), sql})
		}
	}
	return all
}}

func migrateDrift(ctx context.Context, e *env, o driftOptions) error {
	if _, err := o.selector.filter(); err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	ts, err := o.selector.tenants(ctx, a)
	if err != nil {
		return err
	}
	groups, err := drift(ctx, a, ts)
	if err != nil {
		return err
	}
	if err := showDrift(e, groups, o.repairPlan); err != nil {
		return err
	}
	count := map[structure.State]int{}
	for _, g := range groups {
		count[g.State] += len(g.Tenants)
	}
	e.say("%d identical, %d drifted, %d missing, %d unfinished, %d not read", count[structure.Identical], count[structure.Drifted],
		count[structure.Missing], count[structure.Unfinished], count[structure.Unread])
	n := len(ts) - count[structure.Identical] - count[structure.Unread]
	switch {
	case o.check && n > 0:
		return fault.New(fault.Pending, "%d tenant(s) are not as the migrations make them", n).WithCode("drifted").
			WithHint("oneo migrate drift --repair-plan with the same tenants says what would bring them back")
	case count[structure.Unread] > 0:
		e.say("run the same command again for those that could not be read")
		return errExit{exitSomeFailed}
	}
	return nil
}

// drift compares tenants with their references, one database group after the other.
func drift(ctx context.Context, a *app.App, ts []tenant.Tenant) ([]structure.Group, error) {
	checker, err := structure.New(structure.Options{DB: a.DB, Head: a.Migrate.Head(migrate.TenantSet), Make: a.Migrate.Create})
	if err != nil {
		return nil, err
	}
	byGroup := map[string][]tenant.Tenant{}
	for _, t := range ts {
		byGroup[t.Group] = append(byGroup[t.Group], t)
	}
	var all []structure.Group
	for _, group := range slices.Sorted(maps.Keys(byGroup)) {
		// Files that were changed after they had been applied would make a wrong reference: this refuses them.
		if _, err := a.Migrate.TenantsBehind(ctx, group); err != nil {
			return nil, err
		}
		found, err := checker.Drift(ctx, group, byGroup[group])
		if err != nil {
			return nil, err
		}
		all = append(all, found...)
	}
	return all, nil
}

func showDrift(e *env, groups []structure.Group, repairPlan bool) error {
	switch {
	case e.output == "name":
		for _, g := range groups {
			if g.State != structure.Identical {
				for _, s := range slugsOf(g.Tenants) {
					fmt.Fprintln(e.out, s)
				}
			}
		}
		return nil
	case !repairPlan:
		return show(e, groups, driftColumns)
	case e.output != "table":
		return show(e, groups, append(slices.Clone(driftColumns), repairColumn))
	}
	for _, g := range groups {
		if g.State == structure.Identical {
			continue
		}
		fmt.Fprintf(e.out, "-- %d tenant(s) of group %s at version %d, %s: %s\n", len(g.Tenants), g.Database, g.Version, g.State, slugsOf(g.Tenants))
		for _, d := range g.Differences {
			fmt.Fprintf(e.out, "--   %s\n", d)
		}
		if g.State == structure.Unfinished || g.State == structure.Unread {
			fmt.Fprint(e.out, "-- There is no plan: finish the migration, or look again.\n")
		}
		for _, t := range g.Tenants {
			if sql := g.Repair(t); sql != "" {
				fmt.Fprintf(e.out, "\n-- %s\n%s", t.Slug, sql)
			}
		}
		fmt.Fprintln(e.out)
	}
	return nil
}
