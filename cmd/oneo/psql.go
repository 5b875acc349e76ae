package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type psqlOptions struct {
	owner  bool
	shared bool
}

func newPsqlCmd(e *env) *cobra.Command {
	var o psqlOptions
	cmd := &cobra.Command{
		Use: "psql TENANT [-- PSQL-ARGS...]", Short: "Open psql on one tenant",
		Long: `Become psql, connected past any pooler, with the search path on the tenant's schema and the tenant's own
rights, or with the owner's. With --shared it is the shared schema, with the rights of the app role. What
stands behind -- is psql's. The exit code is psql's.

A session is no bound transaction: it holds up no rename or drop, it sees what it saw at its start, and
who means to can leave the tenant's role in it. Your own .psqlrc is read, and may set another prompt. The
audit trail says who opened psql where.`,
		Example: `  oneo psql acme
  oneo psql acme -- -c 'select count(*) from users'
  oneo psql --owner acme
  oneo psql --shared`,
		Args: usageArgs(func(cmd *cobra.Command, args []string) error {
			names := args
			if n := cmd.ArgsLenAtDash(); n >= 0 {
				names = args[:n]
			}
			switch {
			case o.shared && len(names) > 0:
				return fault.New(fault.Invalid, "--shared goes with no tenant").WithHint("psql's own arguments stand behind --")
			case !o.shared && len(names) != 1:
				return fault.New(fault.Invalid, "psql wants one tenant, and has %d", len(names)).
					WithHint("oneo psql TENANT -- PSQL-ARGS..., or oneo psql --shared")
			}
			return nil
		}),
		ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if !o.shared {
				name, args = args[0], args[1:]
			}
			return runPsql(cmd.Context(), e, o, name, args)
		},
	}
	cmd.Flags().BoolVar(&o.owner, "owner", false, "with the owner's rights, who may change tables")
	cmd.Flags().BoolVar(&o.shared, "shared", false, "the shared schema, instead of a tenant's")
	return cmd
}

func runPsql(ctx context.Context, e *env, o psqlOptions, name string, args []string) error {
	path, err := e.program("psql", "")
	if err != nil {
		return fault.New(fault.Unavailable, "psql is not installed").WithCode("no_psql").
			WithHint("it comes with PostgreSQL's client: apt install postgresql-client, dnf install postgresql, or brew install libpq")
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	var t tenant.Tenant
	if !o.shared {
		if t, err = tenantNamed(ctx, a, name); err != nil {
			return err
		}
		if t.State != tenant.Active && t.State != tenant.Suspended {
			f := fault.New(fault.Conflict, "the tenant %s is %s", t.Slug, t.State).WithCode("wrong_state").WithTenant(t.Slug.String())
			if t.State == tenant.Dropped {
				f = f.WithHint("oneo tenant undrop %s", t.Slug)
			}
			return f
		}
	}
	program, err := a.DB.Program(ctx, postgres.ProgramOptions{Tenant: t, Owner: o.owner})
	if err != nil {
		return err
	}
	if t.State == tenant.Suspended {
		e.say("the tenant %s is suspended", t.Slug)
	}
	err = a.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
		return registry.Audit(ctx, tx, registry.AuditEntry{
			Actor: e.actor(), Action: "psql", Tenant: t, Details: map[string]any{"owner": o.owner, "shared": o.shared},
		})
	})
	if err != nil {
		return fmt.Errorf("write the audit trail: %w", err)
	}
	if err := a.Close(); err != nil {
		return err
	}
	e.app = nil
	argv := append([]string{filepath.Base(path), "-v", "PROMPT1=" + prompt(t, o) + "%R%x%# ", "-v", "PROMPT2=" + prompt(t, o) + "%R%x%# "}, args...)
	if err := syscall.Exec(path, argv, program.Env(e.environ)); err != nil {
		return fault.Wrap(err, fault.Unavailable, "psql cannot be started").WithCode("no_psql")
	}
	return nil
}

// prompt says where the session is, and that it is the owner's.
func prompt(t tenant.Tenant, o psqlOptions) string {
	name := t.Slug.String()
	if o.shared {
		name = "(shared)"
	}
	if o.owner {
		name += " (owner)"
	}
	return strings.ReplaceAll(name, "%", "%%")
}
