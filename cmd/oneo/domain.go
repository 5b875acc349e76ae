package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func newDomainCmd(e *env) *cobra.Command {
	var primary bool
	add := domainVerb(e, "add NAME HOST", "Give a tenant another domain",
		"The domain is trusted as given and served at once. A domain that another tenant has, or had a short while ago, is refused,\nand so is one of server.public_hosts, where administrators are served.",
		"  oneo domain add acme crm.acme.com\n  oneo domain add acme crm.acme.com --primary",
		func(ctx context.Context, a *app.App, tx *postgres.OwnerTx, t tenant.Tenant, h tenant.Host) error {
			if err := notPublic(a.Config, h); err != nil {
				return err
			}
			return registry.AddDomain(ctx, tx, t, h, primary)
		}, "domain.add")
	add.Flags().BoolVar(&primary, "primary", false, "make it the canonical one")
	list := &cobra.Command{
		Use: "list NAME", Short: "List a tenant's domains", Long: "List a tenant's domains, the primary one first.",
		Example: "  oneo domain list acme", Args: usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			return listDomains(cmd.Context(), e, a, args[0])
		},
	}
	return noun("domain", "Add, list and remove the domains of a tenant",
		"A tenant is served under its domains; <name>.<base domain> is made with it.", "  oneo domain list acme",
		add, list,
		domainVerb(e, "remove NAME HOST", "Take a domain from a tenant",
			"The domain is not served any more, and is held back from other tenants for tenancy.domain_hold.",
			"  oneo domain remove acme crm.acme.com",
			func(ctx context.Context, a *app.App, tx *postgres.OwnerTx, t tenant.Tenant, h tenant.Host) error {
				return registry.RemoveDomain(ctx, tx, t, h, a.Config.Tenancy.DomainHold)
			}, "domain.remove"),
		domainVerb(e, "primary NAME HOST", "Make one of a tenant's domains the canonical one",
			"Links that oneo writes use the primary domain.", "  oneo domain primary acme crm.acme.com",
			func(ctx context.Context, _ *app.App, tx *postgres.OwnerTx, t tenant.Tenant, h tenant.Host) error {
				return registry.SetPrimary(ctx, tx, t, h)
			}, "domain.primary"),
	)
}

// publicHosts are those where administrators are served, and no tenant.
func publicHosts(c config.Config) ([]tenant.Host, error) {
	var hosts []tenant.Host
	for _, name := range c.Server.PublicHosts {
		h, err := tenant.ParseHost(name)
		if err != nil {
			return nil, fmt.Errorf("server.public_hosts: %w", err)
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

// notPublic refuses a public host for a tenant: the server would never serve it there.
func notPublic(c config.Config, hosts ...tenant.Host) error {
	public, err := publicHosts(c)
	if err != nil {
		return err
	}
	for _, h := range hosts {
		if slices.Contains(public, h) {
			return fault.New(fault.Invalid, "%s is a public host, where administrators are served", h).WithCode("public_host").
				WithHint("choose another one, or take it out of server.public_hosts")
		}
	}
	return nil
}

var domainColumns = []column[registry.Domain]{
	{"HOST", "host", func(d registry.Domain) any { return d.Host.String() }},
	{"PRIMARY", "primary", func(d registry.Domain) any { return d.Primary }},
	{"CREATED", "created_at", func(d registry.Domain) any { return d.CreatedAt }},
}

func listDomains(ctx context.Context, e *env, a *app.App, name string) error {
	var ds []registry.Domain
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		t, err := bySlug(ctx, tx, name)
		if err != nil {
			return err
		}
		ds, err = registry.Domains(ctx, tx, t)
		return err
	})
	if err != nil {
		return err
	}
	return show(e, ds, domainColumns)
}

func domainVerb(e *env, use, short, long, example string,
	do func(context.Context, *app.App, *postgres.OwnerTx, tenant.Tenant, tenant.Host) error, action string,
) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long, Example: example, Args: usageArgs(cobra.ExactArgs(2)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			host, err := tenant.ParseHost(args[1])
			if err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			var t tenant.Tenant
			var before, after []registry.Domain
			err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
				if t, err = bySlug(ctx, tx, args[0]); err != nil {
					return err
				}
				if before, err = registry.Domains(ctx, tx, t); err != nil {
					return err
				}
				if err := do(ctx, a, tx, t, host); err != nil {
					return err
				}
				if after, err = registry.Domains(ctx, tx, t); err != nil {
					return err
				}
				return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.actor(), Action: action, Tenant: t, Details: map[string]string{"host": host.String()}})
			})
			if err != nil {
				return err
			}
			if undo := undoDomain(t, host, before, after); undo != "" {
				e.say("undo: %s", undo)
			}
			a.Changed(ctx, t, host, t.Primary)
			return listDomains(ctx, e, a, args[0])
		},
	}
}

// undoDomain is the command that brings a tenant's domains back to what they were before one of them was added, removed
// or made the primary one; empty: they are as they were.
func undoDomain(t tenant.Tenant, host tenant.Host, before, after []registry.Domain) string {
	has := func(ds []registry.Domain) bool {
		return slices.ContainsFunc(ds, func(d registry.Domain) bool { return d.Host == host })
	}
	primary := func(ds []registry.Domain) (h tenant.Host) {
		if len(ds) > 0 && ds[0].Primary { // it comes first
			h = ds[0].Host
		}
		return h
	}
	domain := func(verb string, h tenant.Host) string {
		return "oneo domain " + verb + " " + t.Slug.String() + " " + h.String()
	}
	var undo []string
	if was := primary(before); was != primary(after) && !was.IsZero() && was != host {
		undo = append(undo, domain("primary", was))
	}
	switch {
	case has(after) && !has(before):
		undo = append(undo, domain("remove", host))
	case has(before) && !has(after):
		undo = append(undo, domain("add", host))
	}
	return strings.Join(undo, " && ")
}
