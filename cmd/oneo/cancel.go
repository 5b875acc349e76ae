package main

import (
	"context"
	"errors"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type cancelOptions struct {
	tenant, group string
	terminate     bool
}

func newCancelCmd(e *env) *cobra.Command {
	var o cancelOptions
	cmd := &cobra.Command{
		Use: "cancel PID", Short: "Cancel what a session does for a tenant",
		Long: `Cancel the statement of the PostgreSQL session PID, or with --terminate end the session, if it works for the
tenant at this moment: it holds that tenant's gate, or its operation lock. Who waits for the statement gets an error,
and its transaction is rolled back.

The owner's login must be allowed to, by pg_signal_backend: oneo init grants it.`,
		Example: "  oneo cancel 4711 -t acme\n  oneo cancel 4711 -t acme --terminate",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := strconv.ParseInt(args[0], 10, 32)
			if err != nil || pid < 1 {
				return errUsage{fault.New(fault.Invalid, "%q is no process id", args[0]).WithHint("oneo tui lists them: :queries")}
			}
			if o.tenant == "" {
				return errUsage{fault.New(fault.Invalid, "no tenant is named").WithCode("no_selector").WithHint("add --tenant NAME")}
			}
			return runCancel(cmd.Context(), e, int32(pid), o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.tenant, "tenant", "t", "", "the `NAME` of the tenant that the session works for")
	f.StringVar(&o.group, "group", "", "database `GROUP` of the session; default: the tenant's")
	f.BoolVar(&o.terminate, "terminate", false, "end the session")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	return cmd
}

func runCancel(ctx context.Context, e *env, pid int32, o cancelOptions) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.tenant)
	if err != nil {
		return err
	}
	group := t.Group
	if o.group != "" {
		group = o.group
	}
	action, call := "session.cancel", "pg_catalog.pg_cancel_backend(l.pid)"
	if o.terminate {
		action, call = "session.terminate", "pg_catalog.pg_terminate_backend(l.pid)"
	}
	// The session may have gone on to another tenant since it was looked at: its locks are read in the statement that ends it.
	stop := `select ` + call + ` from pg_catalog.pg_locks l where l.pid = $1 and l.locktype = 'advisory' and l.granted and l.objsubid = 2
	and l.database = (select oid from pg_catalog.pg_database where datname = pg_catalog.current_database())
	and l.classid = any(array[$2, $3]::int4[]::oid[]) and l.objid = $4::int4::oid limit 1`
	err = a.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		var done bool
		return tx.QueryRow(ctx, stop, pid, postgres.GateLock, postgres.OperationLock, t.Number).Scan(&done)
	})
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return fault.New(fault.NotFound, "the session %d does not work for %s now", pid, t.Slug).WithCode("no_session").WithTenant(t.Slug.String()).
			WithHint("it may have ended: oneo tui lists what is at work: :queries")
	case postgres.SQLState(err) == "42501":
		return fault.Wrap(err, fault.Forbidden, "PostgreSQL does not let the owner's login signal other sessions").WithCode("no_signal").
			WithHint("run `oneo init` with a superuser's URL, or as a superuser: grant pg_signal_backend to the login of database.owner_url")
	case err != nil:
		return err
	}
	if err := auditCancel(ctx, e, t, action, pid); err != nil {
		return err
	}
	if o.terminate {
		e.say("the session %d, which worked for %s, is ended", pid, t.Slug)
	} else {
		e.say("the statement of session %d for %s is cancelled", pid, t.Slug)
	}
	return nil
}

func auditCancel(ctx context.Context, e *env, t tenant.Tenant, action string, pid int32) error {
	return e.app.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.actor(), Action: action, Tenant: t, Details: map[string]any{"pid": pid}})
	})
}
