package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func newTenantCmd(e *env) *cobra.Command {
	return noun("tenant", "Create, list, suspend, rename and drop tenants",
		"A tenant is one customer of the product: one PostgreSQL schema, one role, one or more domains.",
		"  oneo tenant create acme\n  oneo tenant list",
		newTenantCreateCmd(e), newTenantAdoptCmd(e), newTenantListCmd(e), newTenantShowCmd(e), newTenantRenameCmd(e), newTenantEditCmd(e), newTenantBudgetCmd(e),
		newTenantStateCmd(e, "suspend", "Stop serving a tenant, and keep it",
			"Requests at work are finished, later ones are answered 503. Undo it with `oneo tenant resume`.",
			func(p *provision.Provisioner) stateVerb { return p.Suspend }, "oneo tenant resume "),
		newTenantStateCmd(e, "resume", "Serve a suspended tenant again", "It is served at once.",
			func(p *provision.Provisioner) stateVerb { return p.Resume }, "oneo tenant suspend "),
		newTenantExportCmd(e), newTenantImportCmd(e), newTenantCloneCmd(e), newTenantMoveCmd(e),
		newTenantDropCmd(e), newTenantEraseCmd(e), newTenantUsageCmd(e),
		newTenantStateCmd(e, "undrop", "Bring a dropped tenant back",
			"As long as its grace period lasts, a dropped tenant comes back as it was.",
			func(p *provision.Provisioner) stateVerb { return p.Undrop }, "oneo tenant drop "),
	)
}

// tenantRow is a tenant as commands show it.
type tenantRow struct {
	tenant.Tenant
	url        string
	domains    []string
	settings   json.RawMessage
	purgeAfter *time.Time
	standing   app.Standing
}

var tenantColumns = []column[tenantRow]{
	{"NAME", "tenant", func(t tenantRow) any { return t.Slug.String() }},
	{"STATE", "state", func(t tenantRow) any { return string(t.State) }},
	{"SCHEMA", "schema", func(t tenantRow) any { return t.Schema.String() }},
	{"GROUP", "group", func(t tenantRow) any { return t.Group }},
	{"URL", "url", func(t tenantRow) any { return t.url }},
	{"CREATED", "created_at", func(t tenantRow) any { return t.CreatedAt }},
}

type createOptions struct {
	slug                       string
	name, schema, group, email string
	domains                    []string
	settings                   string
	ifNotExists, dryRun        bool
	password                   passwordFlags
}

func newTenantCreateCmd(e *env) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use: "create NAME", Short: "Create a tenant",
		Long: `Create a tenant: its role, its schema with all migrations, its domain NAME.<base domain>,
and with --admin-email its first user, whose password is printed once.

It is one transaction: a create that fails or is killed leaves nothing behind. In another group's
database it is two: one that was killed in between is finished by the same command.`,
		Example: "  oneo tenant create acme\n  oneo tenant create acme --name 'ACME Ltd' --domain crm.acme.com --admin-email ada@acme.com",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.slug = args[0]
			return tenantCreate(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.name, "name", "", "`TEXT` for display; default: NAME")
	f.StringArrayVar(&o.domains, "domain", nil, "another `HOST` of the tenant; repeatable")
	f.StringVar(&o.schema, "schema", "", "`NAME` of the schema; default: made from NAME")
	f.StringVar(&o.group, "group", "", "database `GROUP`; default: main")
	f.StringVar(&o.email, "admin-email", "", "`ADDRESS` of the first user")
	f.BoolVar(&o.password.stdin, "password-stdin", false, "read the first user's password from standard input")
	f.StringVar(&o.password.file, "password-file", "", "read the first user's password from a `FILE`")
	f.StringVar(&o.settings, "settings", "", "`JSON` object; its member \"public\" anybody may read")
	f.BoolVar(&o.ifNotExists, "if-not-exists", false, "succeed when the tenant exists already")
	f.BoolVar(&o.dryRun, "dry-run", false, "only check and show")
	return cmd
}

func (o createOptions) request(e *env) (r provision.CreateRequest, err error) {
	r = provision.CreateRequest{Name: o.name, Group: o.group, Settings: json.RawMessage(o.settings), Actor: e.actor()}
	if r.Slug, err = tenant.ParseSlug(o.slug); err != nil {
		return r, err
	}
	if o.schema != "" {
		if r.Schema, err = tenant.ParseSchema(o.schema); err != nil {
			return r, err
		}
	}
	for _, d := range o.domains {
		h, err := tenant.ParseHost(d)
		if err != nil {
			return r, err
		}
		r.Domains = append(r.Domains, h)
	}
	if o.email != "" {
		r.AdminEmail, err = auth.ParseEmail(o.email)
	} else if o.password != (passwordFlags{}) {
		err = fault.New(fault.Invalid, "a password was given and no --admin-email")
	}
	return r, err
}

func tenantCreate(ctx context.Context, e *env, o createOptions) error {
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
	if o.ifNotExists || o.dryRun {
		t, err := tenantNamed(ctx, a, o.slug)
		switch {
		case err == nil && o.ifNotExists && t.State == tenant.Creating && !o.dryRun:
			// It is finished, or made anew, below.
		case err == nil && o.ifNotExists:
			return tenantExists(ctx, e, a, t)
		case err == nil:
			return fault.New(fault.Conflict, "a tenant of this name exists already").WithCode("tenant_exists").WithTenant(o.slug).
				WithHint("oneo tenant show %s", o.slug)
		case !fault.Is(err, fault.NotFound):
			return err
		}
	}
	if o.dryRun {
		plan, err := a.Provision.DryRun(ctx, r)
		if err != nil {
			return err
		}
		e.say("would create this tenant (nothing was done):")
		t := tenant.Tenant{Slug: plan.Slug, Schema: plan.Schema, Group: plan.Group, Name: plan.Name, State: tenant.Active}
		return showOne(e, tenantRow{Tenant: t, url: a.URL(plan.Slug.Under(a.Base))}, tenantColumns[:5])
	}
	var password string
	if r.AdminEmail != "" {
		given, generated, err := e.password(ctx, o.password, "password of "+r.AdminEmail, true)
		if err != nil {
			return err
		}
		if !generated {
			if err := auth.CheckPassword(given, r.AdminEmail, o.slug); err != nil {
				return err
			}
		} else {
			password = given
		}
		if r.AdminPasswordHash, err = a.Hasher.Hash(ctx, given); err != nil {
			return err
		}
	}
	t, finished, err := a.Provision.CreateOrFinish(ctx, r)
	var f *fault.Fault
	if o.ifNotExists && errors.As(err, &f) && f.Code == "tenant_exists" {
		// Somebody else made it since it was looked for.
		if t, err = tenantNamed(ctx, a, o.slug); err == nil {
			return tenantExists(ctx, e, a, t)
		}
	}
	if err != nil {
		return err
	}
	if finished {
		e.say("finished tenant %s, whose creation had been interrupted; it is as it was asked for then", t.Slug)
		if r.AdminEmail != "" {
			e.say("its first user's password is the first run's; another one: oneo user set-password %s -t %s", r.AdminEmail, t.Slug)
		}
		return showTenant(ctx, e, a, t, "")
	}
	e.say("created tenant %s", t.Slug)
	if password != "" && e.output == "table" {
		e.say("first user %s; the password is shown this once", r.AdminEmail)
	}
	e.onlyHere("password", password)
	return showTenant(ctx, e, a, t, password)
}

// tenantExists answers --if-not-exists: a tenant that is there is as good as one that was made, unless it was dropped.
func tenantExists(ctx context.Context, e *env, a *app.App, t tenant.Tenant) error {
	switch t.State {
	case tenant.Dropped:
		return fault.New(fault.Conflict, "a tenant of this name exists and is dropped").WithCode("tenant_dropped").WithTenant(t.Slug.String()).
			WithHint("oneo tenant undrop %s", t.Slug)
	case tenant.Suspended:
		e.say("tenant %s exists already, and is suspended; serve it again: oneo tenant resume %s", t.Slug, t.Slug)
	default:
		e.say("tenant %s exists already", t.Slug)
	}
	return showTenant(ctx, e, a, t, "")
}

// showTenant shows one tenant with its domains; password, when there is one, is shown with it.
func showTenant(ctx context.Context, e *env, a *app.App, t tenant.Tenant, password string) error {
	row := tenantRow{Tenant: t, url: a.URL(t.Primary)}
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ds, err := registry.Domains(ctx, tx, t)
		if err != nil {
			return err
		}
		for _, d := range ds {
			row.domains = append(row.domains, d.Host.String())
		}
		if row.settings, err = registry.Settings(ctx, tx, t); err != nil {
			return err
		}
		return tx.QueryRow(ctx, `select purge_after from public.tenants where number = $1`, t.Number).Scan(&row.purgeAfter)
	})
	if err != nil {
		return err
	}
	if row.domains == nil {
		row.domains = []string{}
	}
	columns := append(tenantColumns[:len(tenantColumns):len(tenantColumns)],
		column[tenantRow]{"DISPLAY", "name", func(t tenantRow) any { return t.Name }},
		column[tenantRow]{"ID", "id", func(t tenantRow) any { return t.ID }},
		column[tenantRow]{"DOMAINS", "domains", func(t tenantRow) any { return t.domains }},
		column[tenantRow]{"SETTINGS", "settings", func(t tenantRow) any { return t.settings }},
	)
	switch st, err := a.Standing(ctx, t); {
	case err == nil:
		row.standing = st
		columns = append(columns, column[tenantRow]{"VERSION", "version", func(t tenantRow) any { return t.standing.Version }})
		if st.NotServed != "" {
			columns = append(columns, column[tenantRow]{"NOT SERVED", "not_served", func(t tenantRow) any { return t.standing.NotServed }})
		}
	case !fault.Is(err, fault.NotFound):
		e.say("its version cannot be read: %s", fault.Of(err).Message)
	}
	if b, err := readBudget(ctx, a, t); err == nil {
		columns = append(columns, column[tenantRow]{"BUDGET", "budget", func(tenantRow) any { return b }})
	} else {
		e.say("its budget cannot be read: %s", fault.Of(err).Message)
	}
	if m := cloneMark(row.settings); m != "" {
		columns = append(columns, column[tenantRow]{"CLONE OF", "clone_of", func(tenantRow) any { return m }})
	}
	if row.purgeAfter != nil {
		columns = append(columns, column[tenantRow]{"PURGED AFTER", "purge_after", func(t tenantRow) any { return t.purgeAfter }})
	}
	if password != "" {
		columns = append(columns, column[tenantRow]{"PASSWORD", "password", func(tenantRow) any { return password }})
	}
	return showOne(e, row, columns)
}

func newTenantListCmd(e *env) *cobra.Command {
	var s selector
	cmd := &cobra.Command{
		Use: "list", Short: "List tenants", Long: "List tenants, all but purged ones, in the order of their names.",
		Example: "  oneo tenant list\n  oneo tenant list -t 'acme-*' --state suspended -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			// Reading needs no selector; without --state dropped ones are listed too.
			s.all = len(s.names) == 0
			f, err := s.filter()
			if err != nil {
				return err
			}
			if len(s.states) == 0 {
				f.States = nil
			}
			ts, err := s.list(cmd.Context(), a, f)
			if err != nil {
				return err
			}
			var rows []tenantRow
			for _, t := range ts {
				rows = append(rows, tenantRow{Tenant: t, url: a.URL(t.Primary)})
			}
			return show(e, rows, tenantColumns)
		},
	}
	s.bind(cmd, e)
	return cmd
}

func newTenantShowCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use: "show NAME", Short: "Show one tenant", Long: "Show a tenant with its domains and settings.",
		Example: "  oneo tenant show acme\n  oneo tenant show acme -o json", Args: usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			t, err := tenantNamed(cmd.Context(), a, args[0])
			if err != nil {
				return err
			}
			return showTenant(cmd.Context(), e, a, t, "")
		},
	}
}

func newTenantRenameCmd(e *env) *cobra.Command {
	var schema, name string
	cmd := &cobra.Command{
		Use: "rename NAME NEW", Short: "Give a tenant another name and default domain",
		Long: `Give a tenant another name, and with it the default domain NEW.<base domain>. The former default
domain is held back from other tenants. The schema keeps its name unless --schema is given; then
requests of the tenant wait for the milliseconds that it takes.`,
		Example: "  oneo tenant rename acme acme-berlin\n  oneo tenant rename acme acme-berlin --schema acme_berlin",
		Args:    usageArgs(cobra.ExactArgs(2)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			r := provision.RenameRequest{Name: name, Actor: e.actor()}
			slug, err := tenant.ParseSlug(args[0])
			if err != nil {
				return err
			}
			if r.Slug, err = tenant.ParseSlug(args[1]); err != nil {
				return err
			}
			if schema != "" {
				if r.Schema, err = tenant.ParseSchema(schema); err != nil {
					return err
				}
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			if err := notPublic(a.Config, r.Slug.Under(a.Base)); err != nil {
				return err
			}
			before, err := tenantNamed(cmd.Context(), a, args[0])
			if err != nil && !fault.Is(err, fault.NotFound) { // an interrupted rename may have given the name up
				return err
			}
			known := err == nil
			t, err := a.Provision.Rename(cmd.Context(), slug, r)
			if err != nil {
				return err
			}
			if known {
				e.say("renamed %s to %s; undo: %s", slug, t.Slug, undoRename(before, t))
			} else {
				e.say("finished renaming %s to %s", slug, t.Slug)
			}
			return showTenant(cmd.Context(), e, a, t, "")
		},
	}
	cmd.Flags().StringVar(&schema, "schema", "", "rename the schema too, to `NAME`")
	cmd.Flags().StringVar(&name, "name", "", "`TEXT` for display")
	return cmd
}

// undoRename is the command that gives a tenant its former name, schema and display name.
func undoRename(before, after tenant.Tenant) string {
	undo := "oneo tenant rename " + after.Slug.String() + " " + before.Slug.String()
	if after.Schema != before.Schema {
		undo += " --schema " + before.Schema.String()
	}
	name := after.Name
	if name == after.Slug.String() { // a display name that was never given follows the name
		name = before.Slug.String()
	}
	if name != before.Name {
		undo += " --name " + shellQuote(before.Name)
	}
	return undo
}

// shellQuote makes one word of a shell's command line.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

type stateVerb func(ctx context.Context, slug tenant.Slug, actor string) (tenant.Tenant, error)

func newTenantStateCmd(e *env, verb, short, long string, do func(*provision.Provisioner) stateVerb, undo string) *cobra.Command {
	return &cobra.Command{
		Use: verb + " NAME", Short: short, Long: long, Example: "  oneo tenant " + verb + " acme",
		Args: usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			slug, err := tenant.ParseSlug(args[0])
			if err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			t, err := do(a.Provision)(cmd.Context(), slug, e.actor())
			if err != nil {
				return err
			}
			e.say("tenant %s is %s; undo: %s%s", t.Slug, t.State, undo, t.Slug)
			return showTenant(cmd.Context(), e, a, t, "")
		},
	}
}

func newTenantDropCmd(e *env) *cobra.Command {
	var purge bool
	var confirm string
	var grace time.Duration
	cmd := &cobra.Command{
		Use: "drop NAME", Short: "Drop a tenant, and keep its data for a grace period",
		Long: `Drop a tenant: its users get 410, its schema is renamed away and kept for a grace period
(tenancy.drop_grace), after which ` + "`oneo serve`" + ` purges it. Until then ` + "`oneo tenant undrop`" + ` brings it back.

--purge destroys the data at once, and wants the tenant's name typed (or --confirm NAME).`,
		Example: "  oneo tenant drop acme\n  oneo tenant drop acme --purge --confirm acme",
		Args:    usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			slug, err := tenant.ParseSlug(args[0])
			if err != nil {
				return err
			}
			if grace < 0 {
				return errUsage{fault.New(fault.Invalid, "--grace must not be negative").WithHint("0 means tenancy.drop_grace; --purge destroys at once")}
			}
			if purge && grace > 0 {
				return errUsage{fault.New(fault.Invalid, "--purge and --grace exclude each other")}
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			if _, err := tenantNamed(ctx, a, args[0]); err != nil {
				return err
			}
			if purge {
				err = e.confirmName(ctx, slug.String(), confirm, "destroy the tenant "+slug.String()+" and all of its data for good")
			} else {
				err = e.confirm(ctx, "take the tenant "+slug.String()+" away from its users; its data is kept for a grace period")
			}
			if err != nil {
				return err
			}
			t, err := a.Provision.Drop(ctx, slug, grace, e.actor())
			if err != nil {
				return err
			}
			if purge {
				if t, err = a.Provision.Purge(ctx, slug, e.actor()); err != nil {
					return err
				}
				e.say("purged tenant %s", t.Slug)
			} else {
				e.say("dropped tenant %s; undo: oneo tenant undrop %s", t.Slug, t.Slug)
			}
			return showTenant(ctx, e, a, t, "")
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "destroy the data now")
	cmd.Flags().StringVar(&confirm, "confirm", "", "the tenant's `NAME`, instead of typing it")
	cmd.Flags().DurationVar(&grace, "grace", 0, "keep the data for so long instead of tenancy.drop_grace")
	return cmd
}
