package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
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
		Use: "restore BACKUP|FILE", Short: "Take a tenant back to a backup",
		Long: `Put the rows of a backup, or of an archive in a file, in the place of a tenant's. They are loaded beside the
tenant, which is served meanwhile, brought to the newest version, checked, and swapped in: requests wait for
some milliseconds. Its users log in again; domains and settings stay as they are.

What was there until then is kept for --keep, and ` + "`oneo undo`" + ` brings it back. With --as the archive becomes a new
tenant beside the live one.

BACKUP is the id of a backup, or the beginning of it, or "latest" with --tenant; it says itself whose it is. A tenant
that was purged since is made anew, under its own name if that is free. FILE may be - for standard input.`,
		Example: "  oneo restore 3f2a9c41\n  oneo restore latest -t acme\n  oneo restore 3f2a9c41 --as acme-yesterday\n  oneo restore acme-20261125T180000Z.oneo -t acme",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = args[0]
			return restore(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.slug, "tenant", "t", "", "`NAME` of the tenant that is taken back; default: the backup's")
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
	if o.slug != "" && o.as != "" && o.file != latestBackup {
		return errUsage{fault.New(fault.Invalid, "--tenant and --as exclude each other")}
	}
	var err error
	if o.backup, err = catalogued(ctx, e, o.file, o.slug); err != nil {
		return err
	}
	if m := o.backup; m != nil {
		e.say("backup %s of %s from %s: %s row(s)", m.ID, m.Slug, m.Made.UTC().Format(time.RFC3339), grouped(m.Rows))
	}
	switch {
	case o.as != "":
		return tenantImport(ctx, e, o.importOptions)
	case o.slug == "" && o.backup == nil:
		return errUsage{fault.New(fault.Invalid, "say which tenant is to be taken back").WithCode("no_tenant").
			WithHint("add -t NAME, or --as NAME for a new tenant beside it")}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	var t tenant.Tenant
	if o.slug != "" {
		t, err = tenantNamed(ctx, a, o.slug)
	} else if t, err = tenantOf(ctx, a, *o.backup); fault.Is(err, fault.NotFound) {
		e.say("there is no tenant %s any more: it is made anew", o.backup.Slug)
		return tenantImport(ctx, e, o.importOptions)
	}
	if err != nil {
		return err
	}
	in, identities, err := o.open(ctx, e)
	if err != nil {
		return err
	}
	defer in.Close()
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

// latestBackup stands for the newest backup of the tenant that is named.
const latestBackup = "latest"

// catalogued is the backup that an argument names, or nil for a file. A file that is there comes first.
func catalogued(ctx context.Context, e *env, name, slug string) (*backup.Manifest, error) {
	if _, err := os.Stat(name); err == nil || name == "-" || name != latestBackup && !backup.IsID(name) {
		return nil, nil
	}
	a, b, err := e.backups()
	if err != nil {
		return nil, err
	}
	var m backup.Manifest
	if name == latestBackup {
		if slug == "" {
			return nil, errUsage{fault.New(fault.Invalid, "say of which tenant the latest backup is to be restored").WithCode("no_tenant").WithHint("add -t NAME")}
		}
		t, err := tenantNamed(ctx, a, slug)
		if err != nil {
			return nil, err
		}
		m, err = b.Newest(ctx, t.ID)
		return &m, err
	}
	m, err = b.Find(ctx, name)
	return &m, err
}

// tenantOf is the tenant that a backup is of. NotFound: it was purged since, or is of another installation, and its name is free.
func tenantOf(ctx context.Context, a *app.App, m backup.Manifest) (t tenant.Tenant, err error) {
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if t, err = registry.ByID(ctx, tx, m.Tenant); err == nil && t.State != tenant.Purged {
			return nil
		} else if err != nil && !fault.Is(err, fault.NotFound) {
			return err
		}
		slug, err := tenant.ParseSlug(m.Slug)
		if err != nil {
			return err
		}
		taken, err := registry.Taken(ctx, tx, slug)
		if err == nil && taken {
			return fault.New(fault.Conflict, "the tenant of this backup is gone, and its name %s is now another tenant's", slug).WithCode("tenant_exists").
				WithHint("make a tenant of it: oneo restore %s --as NAME", m.ID)
		}
		if err == nil {
			err = fault.New(fault.NotFound, "the tenant of this backup is gone").WithCode("unknown_tenant")
		}
		return err
	})
	return t, err
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
