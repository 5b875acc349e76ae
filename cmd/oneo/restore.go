package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/archive"
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
	slugs    []string
	slug     string // the only one of slugs, or none
	force    bool
	keep     time.Duration
	diff     bool
	parts    transfer.Parts
	database bool
	jobs     int
	at       atOptions
}

func newRestoreCmd(e *env) *cobra.Command {
	var o restoreOptions
	cmd := &cobra.Command{
		Use: "restore [BACKUP|FILE]", Short: "Take a tenant back to a backup, or to any moment",
		Long: `Put the rows of a backup, or of an archive in a file, in the place of a tenant's. They are loaded beside the
tenant, which is served meanwhile, brought to the newest version, checked, and swapped in: requests wait for
some milliseconds. Its users log in again; domains and settings stay as they are.

What was there until then is kept for --keep, and ` + "`oneo undo`" + ` brings it back. With --as the archive becomes a new
tenant beside the live one.

BACKUP is the id of a backup, or the beginning of it, or "latest" with --tenant; it says itself whose it is. A tenant
that was purged since is made anew, under its own name if that is free. FILE may be - for standard input.

--diff shows what would change, by table, and changes nothing. --table and --pipeline do not take the tenant back: they
put the rows of those tables, or of that pipeline of the CRM, back among the ones that are there, by their primary
keys. Missing rows come in; with --overwrite those that have changed are put back too. Nothing is deleted, foreign keys
and triggers hold, all is one transaction, and nothing keeps what was overwritten: this cannot be undone. It is shown
first, and asked for.

With --at or --before there is no BACKUP: the tenant is taken back to that moment. From physical backups and archived
WAL a cluster of its own is recovered beside the live one, reached by this command alone, and the tenant's rows as
they were then are taken from it; all above holds for them. A tenant that was purged since comes back under its name.

With --database BACKUP is a full backup, and goes into an installation that is empty: after ` + "`oneo init`" + `, with the
same server.secret. The shared tables come first, then tenant by tenant, each with its number, name, domains, state
and settings; none is served before all of it is there. The same command goes on with a restore that was interrupted
or killed. Sessions do not come back: users log in again.`,
		Example: "  oneo restore 3f2a9c41\n  oneo restore latest -t acme --diff\n  oneo restore latest -t acme\n  oneo restore 3f2a9c41 --as acme-yesterday\n  oneo restore acme-20261125T180000Z.oneo -t acme\n" +
			"  oneo restore latest -t acme --table users --table api_keys\n  oneo restore latest -t acme --pipeline deals --overwrite\n" +
			"  oneo restore -t acme --at '2026-08-01 14:03+02' --diff\n  oneo restore -t acme --at 10m\n  oneo restore -t acme --before 3f2a9c41\n  oneo restore --database 7c1d90ab",
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(o.slugs) > 0 {
				o.slug = o.slugs[0]
			}
			switch {
			case !o.at.given() && len(o.slugs) > 1:
				return errUsage{fault.New(fault.Invalid, "a backup is one tenant's: one --tenant")}
			case o.at.given() && len(args) > 0:
				return errUsage{fault.New(fault.Invalid, "--at and --before go with no backup: they are a moment")}
			case o.at.given() && o.database:
				return errUsage{fault.New(fault.Invalid, "--database goes with a full backup").WithHint("a whole cluster at a moment: oneo recover cluster")}
			case !o.at.given() && len(args) == 0:
				return errUsage{fault.New(fault.Invalid, "say what is to be restored: BACKUP or FILE, or a moment").WithHint("oneo backup list -t NAME, or --at TIME, or --before OPERATION")}
			case len(args) > 0:
				o.file = args[0]
			}
			return restore(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.slugs, "tenant", "t", nil, "`NAME` of the tenant that is taken back; default: the backup's; with --at repeatable")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	f.DurationVar(&o.keep, "keep", 0, "for how long what is there now is kept; default: backup.undo_keep")
	f.BoolVar(&o.force, "force", false, "also when the archive is another tenant's")
	f.BoolVar(&o.diff, "diff", false, "show what would change, and change nothing")
	f.StringArrayVar(&o.parts.Tables, "table", nil, "only put rows of the table `NAME` back; repeatable")
	f.StringVar(&o.parts.Pipeline, "pipeline", "", "only put records of the pipeline `KEY` back")
	f.BoolVar(&o.parts.Overwrite, "overwrite", false, "with --table or --pipeline: rows that have changed too")
	f.BoolVar(&o.database, "database", false, "restore a full backup into an empty installation; --group: only that group's tenants now")
	f.IntVar(&o.jobs, "jobs", 2, "with --database: tenants at one time")
	o.at.register(f)
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
	if o.database {
		return restoreFull(ctx, e, o)
	}
	if o.slug != "" && o.as != "" && o.file != latestBackup && !o.at.given() {
		return errUsage{fault.New(fault.Invalid, "--tenant and --as exclude each other")}
	}
	switch {
	case len(o.parts.Tables) > 0 && o.parts.Pipeline != "":
		return errUsage{fault.New(fault.Invalid, "--table and --pipeline exclude each other")}
	case o.parts.Overwrite && o.parts.IsZero():
		return errUsage{fault.New(fault.Invalid, "--overwrite goes with --table or --pipeline: a restore puts everything back")}
	case o.keep != 0 && (o.diff || !o.parts.IsZero()):
		return errUsage{fault.New(fault.Invalid, "--keep goes with a restore of the whole tenant")}
	case o.as != "" && (o.diff || !o.parts.IsZero()):
		return errUsage{fault.New(fault.Invalid, "--diff, --table and --pipeline are about a tenant that is there: -t NAME")}
	}
	if o.at.given() {
		return restoreAt(ctx, e, o)
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
	} else if t, err = tenantOf(ctx, a, *o.backup); fault.Is(err, fault.NotFound) && !o.diff && o.parts.IsZero() {
		e.say("there is no tenant %s any more: it is made anew", o.backup.Slug)
		return tenantImport(ctx, e, o.importOptions)
	}
	if err != nil {
		return err
	}
	return restoreInto(ctx, e, a, t, o)
}

// restoreInto puts what is to be read in the place of a tenant's rows, or says what it would change, or puts parts of it back.
func restoreInto(ctx context.Context, e *env, a *app.App, t tenant.Tenant, o restoreOptions) error {
	in, identities, err := o.open(ctx, e)
	if err != nil {
		return err
	}
	defer in.Close()
	if o.diff || !o.parts.IsZero() {
		return restoreParts(ctx, e, a, t, in, identities, o)
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
		Identities: identities, MaxBytes: o.maxSize, CustomDDL: o.customDDL, Known: o.known(), Erased: o.erased, Actor: e.actor(), Progress: m.tell})
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

var differenceColumns = []column[transfer.Difference]{
	{"TABLE", "table", func(d transfer.Difference) any { return d.Table }},
	{"ADDED", "added", func(d transfer.Difference) any { return d.Added }},
	{"REMOVED", "removed", func(d transfer.Difference) any { return d.Removed }},
	{"CHANGED", "changed", func(d transfer.Difference) any { return d.Changed }},
	{"SAME", "same", func(d transfer.Difference) any { return d.Same }},
}

var mergedColumns = []column[transfer.Merged]{
	{"TABLE", "table", func(m transfer.Merged) any { return m.Table }},
	{"INSERTED", "inserted", func(m transfer.Merged) any { return m.Inserted }},
	{"OVERWRITTEN", "overwritten", func(m transfer.Merged) any { return m.Overwritten }},
}

// restoreParts shows what a restore would change, or puts some rows of an archive back among the live ones.
func restoreParts(ctx context.Context, e *env, a *app.App, t tenant.Tenant, in io.Reader, identities []archive.Identity, o restoreOptions) error {
	m, err := newMeter(e, o.progress, "loaded")
	if err != nil {
		return err
	}
	how := transfer.Loading{Identities: identities, MaxBytes: o.maxSize, CustomDDL: o.customDDL, Known: o.known(), Erased: o.erased, Actor: e.actor(), Progress: m.tell}
	if o.diff {
		found, err := a.Transfers.Diff(ctx, t, in, o.force, o.parts, how)
		m.end()
		if err != nil {
			return err
		}
		return show(e, found, differenceColumns)
	}
	merged, err := a.Transfers.Merge(ctx, t, in, o.force, o.parts, func(found []transfer.Difference) error {
		m.end()
		var into, over int64
		for _, d := range found {
			e.say("%s: %s missing, %s changed, %s stay", d.Table, grouped(d.Added), grouped(d.Changed), grouped(d.Same))
			into, over = into+d.Added, over+d.Changed
		}
		what := fmt.Sprintf("put %s missing row(s) into tenant %s", grouped(into), t.Slug)
		if o.parts.Overwrite {
			what += fmt.Sprintf(" and overwrite %s changed one(s)", grouped(over))
		}
		return e.confirm(ctx, what+"; it cannot be undone")
	}, how)
	if err != nil {
		m.end()
		return err
	}
	// Users and keys may have come back as they were.
	if err := flushTenant(ctx, a, t); err != nil {
		return err
	}
	return show(e, merged, mergedColumns)
}

// returnRestore undoes the restore op.
func returnRestore(ctx context.Context, e *env, a *app.App, op registry.Operation, err error, o undoOptions) error {
	if err != nil {
		return err
	}
	// One whose process died is finished, or taken back, by Return itself.
	if op.Number == nil || op.State != registry.Done && op.State != registry.Running {
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
		if _, err := a.Provision.CheckReturn(ctx, t, op.ID); err != nil {
			return err
		}
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
