package main

import (
	"bufio"
	"context"
	"errors"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type adoptOptions struct {
	createOptions
	adoption provision.Adoption
	jobs     int
}

func newTenantAdoptCmd(e *env) *cobra.Command {
	var o adoptOptions
	cmd := &cobra.Command{
		Use: "adopt NAME... | @FILE", Short: "Make tenants of schemas that exist already",
		Long: `Take over schemas that another tool made: register each, give it its role, rights and domain, and record
the migrations up to --version as applied. Nothing in it is changed but rights. It must belong to the
owner's role, and look as the migrations make it at that version; --force adopts it as it is.

Of several names each is one transaction: what cannot be adopted is told, the others go on, and the exit
code is 3. The same command again passes over those that are tenants already. @FILE has a name a line,
and behind it, where it is another, the schema.`,
		Example: `  oneo tenant adopt acme --schema acme_prod --version 12
  oneo tenant adopt acme beta gamma --version 12
  oneo tenant adopt @customers.txt --version 12
  oneo migrate drift -t acme`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("version") {
				return errUsage{fault.New(fault.Invalid, "say at which version of the migrations the schema is").WithCode("no_version").
					WithHint("add --version N; 0 records none of them")}
			}
			if len(args) == 1 && !strings.HasPrefix(args[0], "@") {
				o.slug = args[0]
				return tenantAdopt(cmd.Context(), e, o)
			}
			for _, of := range []string{"schema", "name", "domain", "settings"} {
				if cmd.Flags().Changed(of) {
					return errUsage{fault.New(fault.Invalid, "--%s is for one tenant", of)}
				}
			}
			return adoptMany(cmd.Context(), e, o, args)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.schema, "schema", "", "`NAME` of the schema; default: made from NAME")
	f.IntVar(&o.adoption.Version, "version", 0, "the `VERSION` of the migrations that the schema is at")
	f.BoolVar(&o.adoption.Force, "force", false, "adopt it although it differs from what the migrations make")
	f.StringVar(&o.name, "name", "", "`TEXT` for display; default: NAME")
	f.StringArrayVar(&o.domains, "domain", nil, "another `HOST` of the tenant; repeatable")
	f.StringVar(&o.group, "group", "", "database `GROUP`; default: main")
	f.StringVar(&o.settings, "settings", "", "`JSON` object; its member \"public\" anybody may read")
	f.IntVar(&o.jobs, "jobs", 4, "tenants at one time; at most database.owner_conns less one")
	return cmd
}

func tenantAdopt(ctx context.Context, e *env, o adoptOptions) error {
	r, err := o.request(e)
	if err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := adopt(ctx, a, r, o.adoption)
	if err != nil {
		return err
	}
	e.say("adopted the schema %s as tenant %s at version %d", t.Schema, t.Slug, o.adoption.Version)
	if o.adoption.Force {
		e.say("what differs from the migrations: oneo migrate drift -t %s", t.Slug)
	}
	return showTenant(ctx, e, a, t, "")
}

func adopt(ctx context.Context, a *app.App, r provision.CreateRequest, how provision.Adoption) (tenant.Tenant, error) {
	if err := notPublic(a.Config, append(r.Domains, r.Slug.Under(a.Base))...); err != nil {
		return tenant.Tenant{}, err
	}
	return a.Provision.Adopt(ctx, r, how)
}

// adoptMany adopts schemas each by itself. All names are read before the first is adopted.
func adoptMany(ctx context.Context, e *env, o adoptOptions, args []string) error {
	if o.jobs < 1 {
		return errUsage{fault.New(fault.Invalid, "--jobs must be above 0")}
	}
	lines, err := named(args)
	if err != nil {
		return err
	}
	var requests []provision.CreateRequest
	seen := map[string]bool{}
	for _, words := range lines {
		one := o.createOptions
		one.slug = words[0]
		if len(words) > 1 {
			one.schema = words[1]
		}
		r, err := one.request(e)
		if err != nil {
			return err
		}
		if r.Schema == (tenant.Schema{}) {
			r.Schema = r.Slug.Schema()
		}
		if !seen[r.Slug.String()] {
			requests, seen[r.Slug.String()] = append(requests, r), true
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	report := fleet.Run(ctx, requests, fleet.Options{Jobs: max(1, min(o.jobs, a.Config.Database.OwnerConns-1))},
		func(r provision.CreateRequest) string { return r.Slug.String() },
		func(ctx context.Context, r provision.CreateRequest) fleet.Outcome {
			_, err := adopt(ctx, a, r, o.adoption)
			var f *fault.Fault
			if errors.As(err, &f) && f.Code == "tenant_exists" {
				if t, there := tenantNamed(ctx, a, r.Slug.String()); there == nil && t.Schema == r.Schema && t.State != tenant.Dropped && t.State != tenant.Creating {
					return fleet.Outcome{Status: fleet.Skipped}
				}
			}
			if err != nil {
				return fleet.Outcome{Err: err}
			}
			return fleet.Outcome{To: o.adoption.Version}
		})
	few := e.output == "table" && !e.verbose && len(report.Outcomes) > fewTenants
	var rows []reported
	passed, left := 0, 0
	for _, out := range report.Outcomes {
		switch {
		case errors.Is(out.Err, fleet.ErrNotBegun):
			left++
		case out.Status == fleet.Skipped:
			passed++
		}
		if !few || out.Status == fleet.Failed {
			rows = append(rows, reported{tenant: out.Tenant, status: string(out.Status), from: out.From, to: out.To, duration: out.Duration, err: errorObject(out.Err)})
		}
	}
	if len(rows) > 0 || !few {
		if err := show(e, rows, reportColumns); err != nil {
			return err
		}
	}
	failed := report.Count(fleet.Failed)
	e.say("adopted %d at version %d, %d failed, %d were tenants already, %d left", report.Count(fleet.OK), o.adoption.Version, failed, passed, left)
	switch {
	case report.Interrupted():
		return ctx.Err()
	case failed > 0:
		return errExit{exitSomeFailed}
	}
	return nil
}

// named are the words of each tenant that is named by arguments, or by the lines of files.
func named(args []string) (lines [][]string, err error) {
	for _, arg := range args {
		path, isFile := strings.CutPrefix(arg, "@")
		if !isFile {
			lines = append(lines, []string{arg})
			continue
		}
		file, err := os.Open(path)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "the list of tenants %s cannot be read", path)
		}
		text := bufio.NewScanner(file)
		for text.Scan() {
			words := strings.Fields(text.Text())
			if len(words) == 0 || strings.HasPrefix(words[0], "#") {
				continue
			}
			if len(words) > 2 {
				err = fault.New(fault.Invalid, "the list of tenants %s has the line %q: a name, and the schema where it is another", path, text.Text()).WithCode("bad_list")
				break
			}
			lines = append(lines, words)
		}
		if err == nil && text.Err() != nil {
			err = fault.Wrap(text.Err(), fault.Invalid, "the list of tenants %s cannot be read", path)
		}
		_ = file.Close() // read only
		if err != nil {
			return nil, err
		}
	}
	if len(lines) == 0 {
		return nil, errUsage{fault.New(fault.Invalid, "no tenants are named").WithCode("no_selector")}
	}
	return lines, nil
}
