package main

import (
	"context"
	"encoding/json"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

type cloneOptions struct {
	from, to      string
	schema, group string
	noData, mask  bool
	progress      string
}

func newTenantCloneCmd(e *env) *cobra.Command {
	var o cloneOptions
	cmd := &cobra.Command{
		Use: "clone NAME NEW", Short: "Make a tenant of another one",
		Long: `Make a new tenant NEW with the tables and rows of NAME as they are at one moment, while its users go on
working. What NAME has beyond its migrations comes along; its domains, sessions and API keys do not. NEW is seen
by nobody before it is whole and neutralised: of the embedded migrations by deleting the API keys, in schemas.dir
by the file neutralize.sql. Its settings say whose clone it is.

With --no-data it has the structure only, and the rows that migrations insert. With --mask what is about people
is replaced by made-up values while the rows pass: addresses of mail, telephone numbers, names and postal addresses
of users and records, and what a migration's comments mark. Which columns these are, and which texts were left as
they are, is told. A masked user's password opens nothing.`,
		Example: "  oneo tenant clone acme acme-test\n  oneo tenant clone acme acme-empty --no-data\n  oneo tenant clone acme acme-demo --mask",
		Args:    usageArgs(cobra.ExactArgs(2)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.from, o.to = args[0], args[1]
			return tenantClone(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.schema, "schema", "", "`NAME` of the schema; default: made from NEW")
	f.StringVar(&o.group, "group", "", "database `GROUP`; default: that of NAME")
	f.BoolVar(&o.noData, "no-data", false, "the structure only")
	f.BoolVar(&o.mask, "mask", false, "replace what is about people by made-up values")
	f.StringVar(&o.progress, "progress", "auto", "`FORM` of the progress: auto, json or none")
	return cmd
}

func tenantClone(ctx context.Context, e *env, o cloneOptions) error {
	as := transfer.CloneOptions{Group: o.group, Empty: o.noData, Mask: o.mask, Actor: e.actor()}
	if o.mask && o.noData {
		return errUsage{fault.New(fault.Invalid, "--mask and --no-data exclude each other: without data there is nothing to mask")}
	}
	var err error
	if as.Slug, err = tenant.ParseSlug(o.to); err != nil {
		return err
	}
	if o.schema != "" {
		if as.Schema, err = tenant.ParseSchema(o.schema); err != nil {
			return err
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := notPublic(a.Config, as.Slug.Under(a.Base)); err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.from)
	if err != nil {
		return err
	}
	m, err := newMeter(e, o.progress, "cloned")
	if err != nil {
		return err
	}
	as.Progress = m.tell
	done, err := a.Transfers.Clone(ctx, t, as)
	m.end()
	if err != nil {
		return err
	}
	e.say("cloned tenant %s to %s: %s row(s) in %d table(s)", t.Slug, done.Tenant.Slug, grouped(done.Trailer.Rows()), len(done.Trailer.Tables))
	if !done.Neutralized {
		e.say("nothing in it was neutralised: the folder of migrations has no file %s", migrate.NeutralizeFile)
	}
	if o.mask {
		e.say("masked: %s", strings.Join(done.Masking.Masked, ", "))
		if len(done.Masking.Left) > 0 {
			e.say("left as they are: %s", strings.Join(done.Masking.Left, ", "))
		}
	}
	return showTenant(ctx, e, a, done.Tenant, "")
}

// cloneMark is the name of the tenant of which these are the settings of a clone; empty: of none.
func cloneMark(settings json.RawMessage) string {
	var s struct {
		Clone struct {
			Of string `json:"of"`
		} `json:"clone"`
	}
	if err := json.Unmarshal(settings, &s); err != nil { // a product's own word of that name
		return ""
	}
	return s.Clone.Of
}
