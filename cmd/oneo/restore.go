package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

type restoreOptions struct {
	importOptions
	slug  string
	force bool
	keep  time.Duration
}

func newRestoreCmd(e *env) *cobra.Command {
	var o restoreOptions
	cmd := &cobra.Command{
		Use: "restore FILE", Short: "Take a tenant back to an archive",
		Long: `Put the rows of an archive in the place of a tenant's. They are loaded beside the tenant, which is served
meanwhile, brought to the newest version, checked, and swapped in: requests wait for some milliseconds. Its users
log in again; domains and settings stay as they are.

What was there until then is kept for --keep, and ` + "`oneo undo`" + ` brings it back. With --as the archive becomes a new
tenant beside the live one. FILE may be - for standard input.`,
		Example: "  oneo restore acme-20261125T180000Z.oneo -t acme\n  oneo restore acme-20261125T180000Z.oneo --as acme-yesterday",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = args[0]
			return restore(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.slug, "tenant", "t", "", "`NAME` of the tenant that is taken back")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	f.DurationVar(&o.keep, "keep", 0, "for how long what is there now is kept; default: backup.undo_keep")
	f.BoolVar(&o.force, "force", false, "also when the archive is another tenant's")
	o.importOptions.register(f)
	return cmd
}

type restoredRow struct {
	provision.Restored
	rows int64
}

var restoredColumns = []column[restoredRow]{
	{"TENANT", "tenant", func(r restoredRow) any { return r.Tenant.Slug.String() }},
	{"OPERATION", "operation", func(r restoredRow) any { return r.Operation.String() }},
	{"ROWS", "rows", func(r restoredRow) any { return r.rows }},
	{"PAUSE", "pause_ms", func(r restoredRow) any { return float64(r.Pause.Microseconds()) / 1000 }},
	{"KEPT UNTIL", "kept_until", func(r restoredRow) any { return r.Kept }},
}

func restore(ctx context.Context, e *env, o restoreOptions) error {
	switch {
	case o.slug != "" && o.as != "":
		return errUsage{fault.New(fault.Invalid, "--tenant and --as exclude each other")}
	case o.as != "":
		return tenantImport(ctx, e, o.importOptions)
	case o.slug == "":
		return errUsage{fault.New(fault.Invalid, "say which tenant is to be taken back").WithCode("no_tenant").
			WithHint("add -t NAME, or --as NAME for a new tenant beside it")}
	}
	identities, err := o.keys.identities()
	if err != nil {
		return err
	}
	in, err := e.input(o.file)
	if err != nil {
		return err
	}
	defer in.Close()
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.slug)
	if err != nil {
		return err
	}
	if err := e.confirm(ctx, "put an archive in the place of what tenant "+t.Slug.String()+" has now, and log its users out"); err != nil {
		return err
	}
	m, err := newMeter(e, o.progress, "loaded")
	if err != nil {
		return err
	}
	keep := o.keep
	if keep <= 0 {
		keep = a.Config.Backup.UndoKeep
	}
	done, trailer, err := a.Transfers.Restore(ctx, t, in, keep, o.force, transfer.Loading{
		Identities: identities, MaxBytes: o.maxSize, CustomDDL: o.customDDL, Actor: e.actor(), Progress: m.tell})
	m.end()
	if err != nil {
		return err
	}
	e.say("restored tenant %s; undo: oneo undo %s", t.Slug, done.Operation)
	return showOne(e, restoredRow{done, trailer.Rows()}, restoredColumns)
}

// returnRestore undoes the restore op.
func returnRestore(ctx context.Context, e *env, a *app.App, op registry.Operation, err error, o undoOptions) error {
	if err != nil {
		return err
	}
	if op.Number == nil || op.State != registry.Done {
		return fault.New(fault.Conflict, "the restore %s is %s: there is nothing to undo", op.ID, op.State).WithCode("wrong_state")
	}
	var t tenant.Tenant
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		t, err = registry.ByNumber(ctx, tx, *op.Number)
		return err
	})
	if err != nil {
		return err
	}
	what := "put what tenant " + t.Slug.String() + " had before the restore back in its place, and what was written since aside"
	if o.dryRun {
		e.say("would %s", what)
		return showOne(e, restoredRow{Restored: provision.Restored{Tenant: t, Operation: op.ID}}, restoredColumns[:2])
	}
	if err := e.confirm(ctx, what); err != nil {
		return err
	}
	done, err := a.Provision.Return(ctx, t.Slug, op.ID, e.actor())
	if err != nil {
		return err
	}
	e.say("tenant %s is as it was before the restore; what it had until now is kept until %s", t.Slug, done.Kept.UTC().Format(time.RFC3339))
	return showOne(e, restoredRow{Restored: done}, restoredColumns[:2])
}
