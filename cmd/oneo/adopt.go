package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/provision"
)

type adoptOptions struct {
	createOptions
	adoption provision.Adoption
}

func newTenantAdoptCmd(e *env) *cobra.Command {
	var o adoptOptions
	cmd := &cobra.Command{
		Use: "adopt NAME", Short: "Make a tenant of a schema that exists already",
		Long: `Take over a schema that another tool made: register it, give it its role, rights and domain, and record
the migrations up to --version as applied. Nothing in it is changed but rights. It must belong to the
owner's role, and look as the migrations make it at that version; --force adopts it as it is.`,
		Example: "  oneo tenant adopt acme --schema acme_prod --version 12\n  oneo migrate drift -t acme",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.slug = args[0]
			if !cmd.Flags().Changed("version") {
				return errUsage{fault.New(fault.Invalid, "say at which version of the migrations the schema is").WithCode("no_version").
					WithHint("add --version N; 0 records none of them")}
			}
			return tenantAdopt(cmd.Context(), e, o)
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
	if err := notPublic(a.Config, append(r.Domains, r.Slug.Under(a.Base))...); err != nil {
		return err
	}
	t, err := a.Provision.Adopt(ctx, r, o.adoption)
	if err != nil {
		return err
	}
	e.say("adopted the schema %s as tenant %s at version %d", t.Schema, t.Slug, o.adoption.Version)
	if o.adoption.Force {
		e.say("what differs from the migrations: oneo migrate drift -t %s", t.Slug)
	}
	return showTenant(ctx, e, a, t, "")
}
