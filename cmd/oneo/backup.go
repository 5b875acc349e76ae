package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const kindBackup = app.KindBackup

func newBackupCmd(e *env) *cobra.Command {
	return noun("backup", "Keep backups of tenants, and prove them",
		`Keep backups in the directory or object store of backup.url. A backup is an archive of one tenant, as
`+"`oneo tenant export`"+` writes it, with a signed manifest beside it. What there is needs no database to be
listed, checked or pruned but a lock. `+"`oneo restore`"+` takes a backup's id.

BACKUP is the id of a backup, or the beginning of it.`,
		"  oneo backup create --all-tenants\n  oneo backup list -t acme\n  oneo backup drill --all-tenants\n  oneo backup prune --keep-daily 7 --keep-weekly 5",
		newBackupCreateCmd(e), newBackupListCmd(e), newBackupShowCmd(e), newBackupVerifyCmd(e), newBackupDrillCmd(e), newBackupKeepCmd(e), newBackupPruneCmd(e), newBackupScheduleCmd(e), newBackupPhysicalCmd(e))
}

// backups opens the store of backups.
func (e *env) backups() (*app.App, *backup.Backups, error) {
	a, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	b, err := a.Backups()
	return a, b, err
}

type backupCreateOptions struct {
	database bool
	reason   string
	keep     bool
	askOptions
}

func newBackupCreateCmd(e *env) *cobra.Command {
	var o backupCreateOptions
	cmd := &cobra.Command{
		Use: "create", Short: "Back tenants up",
		Long: `Back up the selected tenants, several at one time, while their users go on working: each one's rows as
they were at one moment. No migration runs on a tenant meanwhile, and one on which another operation is
at work is tried again later. A backup is there whole or not at all.

The run is durable: the same command goes on with it when it was interrupted or killed, and no tenant is
backed up twice. One that was begun more than ` + backupJoin.String() + ` ago is not gone on with: a new one takes its place.

With --database the shared tables and all tenants of every group, or of --group, become one full backup: each group
as it was at one moment, groups not consistent with each other. Migrations, drops, moves and the like of a tenant
wait until it is copied, or are refused. A full backup that was interrupted or killed is none, holds nothing back, and
is begun anew. A tenant that cannot be exported is left out and told: exit code 3. ` + "`oneo restore --database`" + ` restores it.

Backups are encrypted to backup.recipients. The programs of backup.hooks are run around each backup.`,
		Example: "  oneo backup create -t acme --reason 'before the import' --keep\n  oneo backup create --all-tenants --jobs 4\n  oneo backup create --database",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return backupCreate(cmd.Context(), e, o) },
	}
	o.bind(cmd, e, "show which tenants would be backed up, and do nothing")
	f := cmd.Flags()
	f.BoolVar(&o.database, "database", false, "one full backup: the shared tables and all tenants")
	f.StringVar(&o.reason, "reason", "", "`WHY`, for who lists backups")
	f.BoolVar(&o.keep, "keep", false, "keep `oneo backup prune` away from them")
	return cmd
}

// backupRequest is what a process that goes on with the run must know.
type backupRequest struct {
	app.BackupRequest
	selected
}

// backupJoin is until when the same command goes on with a run whose process has died. Later it would leave the tenants that
// were backed up then without a backup of now.
const backupJoin = 6 * time.Hour

func backupCreate(ctx context.Context, e *env, o backupCreateOptions) error {
	if o.database {
		return backupFull(ctx, e, o)
	}
	spec, err := o.spec(rollout.Spec{Kind: kindBackup, Actor: e.actor(), Join: true})
	if err != nil {
		return err
	}
	a, ts, err := o.begin(ctx, e, spec, nil, func() error {
		_, b, err := e.backups()
		if err == nil {
			err = b.Ready(ctx)
		}
		return err
	})
	if err != nil || len(ts) == 0 {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	if err := endOldBackups(ctx, e, a); err != nil {
		return err
	}
	spec.Request = backupRequest{app.BackupRequest{Reason: o.reason, Keep: o.keep, Timeout: o.timeout}, o.selector.request()}
	spec.Items = itemsOf(ts)
	return planAndWork(ctx, e, a, spec, o.workOptions, nil)
}

// endOldBackups ends the runs of backups that nobody should go on with.
func endOldBackups(ctx context.Context, e *env, a *app.App) error {
	runs, err := a.Rollout.List(ctx, 1000, true)
	if err != nil {
		return err
	}
	for _, run := range runs {
		if run.Kind != kindBackup || run.State != registry.Running || run.Alive || time.Since(run.CreatedAt) < backupJoin {
			continue
		}
		if _, err := a.Rollout.Abort(ctx, run.ID, e.actor()); err != nil && !fault.Is(err, fault.Conflict) {
			return err
		}
		e.say("the run %s was begun %s ago and its process died: it is aborted, and a new one begins", run.ID, short(time.Since(run.CreatedAt)))
	}
	return nil
}

// backupRun is one process's work on a run of backups.
type backupRun struct {
	e *env
	a *app.App
	b *backup.Backups
}

func backupWork(e *env, a *app.App, request json.RawMessage) (runWork, error) {
	r := &backupRun{e: e, a: a}
	var req app.BackupRequest
	if err := json.Unmarshal(request, &req); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	var err error
	if r.b, err = a.Backups(); err != nil {
		return runWork{}, err
	}
	w := runWork{done: r.done, timeout: req.Timeout, brokenOff: true}
	var interrupt context.Context
	w.begin = func(ctx context.Context) { interrupt = ctx }
	w.do = func(ctx context.Context, task rollout.Task) rollout.Outcome {
		return a.BackUp(ctx, interrupt, r.b, req, task)
	}
	return w, nil
}

// backedRow is one tenant's line of a report.
type backedRow struct {
	tenant, status string
	app.BackedUp
	duration time.Duration
	err      any
}

var backedColumns = []column[backedRow]{
	{"TENANT", "tenant", func(r backedRow) any { return r.tenant }},
	{"STATUS", "status", func(r backedRow) any { return r.status }},
	{"BACKUP", "backup", func(r backedRow) any { return r.Backup }},
	{"ROWS", "rows", func(r backedRow) any { return r.Rows }},
	{"SIZE", "size_bytes", func(r backedRow) any { return r.Bytes }},
	{"MS", "duration_ms", func(r backedRow) any { return r.duration.Milliseconds() }},
	{"ERROR", "error", func(r backedRow) any { return r.err }},
}

// done reports the run: in a table of many tenants only those that ask for attention.
func (r *backupRun) done(ctx context.Context, run rollout.Run, say func(string, ...any)) error {
	all := r.e.output != "table" || r.e.verbose || run.Tasks() <= fewTenants
	var rows []backedRow
	var total, bytes int64
	err := r.a.Rollout.Tasks(ctx, run.ID, func(t rollout.Reported) error {
		row := backedRow{tenant: t.Slug, status: t.State, duration: t.Duration}
		if len(t.Result) > 0 {
			if err := json.Unmarshal(t.Result, &row.BackedUp); err != nil {
				return fmt.Errorf("read what became of %s: %w", t.Slug, err)
			}
		}
		switch {
		case t.Error != nil:
			row.err = reportedError(*t.Error)
		case row.Reason != nil:
			row.err = reportedError(*row.Reason)
		}
		if row.Warning != "" {
			say("%s: %s", t.Slug, row.Warning)
		}
		total, bytes = total+row.Rows, bytes+row.Bytes
		if all || t.State == string(fleet.Failed) || t.State == string(fleet.Skipped) {
			rows = append(rows, row)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if all || len(rows) > 0 {
		if err := show(r.e, rows, backedColumns); err != nil {
			return err
		}
	}
	say("%d backup(s) in %s: %s row(s), %s", run.OK, r.b.Store(), grouped(total), size(bytes))
	return nil
}

var manifestColumns = []column[backup.Manifest]{
	{"ID", "id", func(m backup.Manifest) any { return m.ID }},
	{"TENANT", "tenant", func(m backup.Manifest) any { return m.Slug }},
	{"MADE", "made_at", func(m backup.Manifest) any { return m.Made }},
	{"VERSION", "version", func(m backup.Manifest) any { return m.Version }},
	{"ROWS", "rows", func(m backup.Manifest) any { return m.Rows }},
	{"SIZE", "size_bytes", func(m backup.Manifest) any { return m.Bytes }},
	{"ENCRYPTED", "encrypted", func(m backup.Manifest) any { return len(m.Keys) > 0 }},
	{"KEPT", "kept", func(m backup.Manifest) any { return m.Kept }},
	{"REASON", "reason", func(m backup.Manifest) any { return m.Reason }},
}

var manifestDetails = append(manifestColumns[:len(manifestColumns):len(manifestColumns)], []column[backup.Manifest]{
	{"TABLES", "tables", func(m backup.Manifest) any { return m.Tables }},
	{"GROUP", "group", func(m backup.Manifest) any { return m.Group }},
	{"KEYS", "keys", func(m backup.Manifest) any { return m.Keys }},
	{"SHA256", "sha256", func(m backup.Manifest) any { return m.SHA256 }},
	{"OBJECT", "object", func(m backup.Manifest) any { return m.Name }},
	{"RUN", "run", func(m backup.Manifest) any { return m.Run }},
	{"TENANT ID", "tenant_id", func(m backup.Manifest) any { return m.Tenant }},
	{"INSTALLATION", "installation", func(m backup.Manifest) any { return m.Installation }},
	{"POSTGRES", "postgres", func(m backup.Manifest) any { return m.Postgres }},
	{"ONEO", "oneo", func(m backup.Manifest) any { return m.Oneo }},
}...)

func newBackupListCmd(e *env) *cobra.Command {
	var name string
	var database bool
	cmd := &cobra.Command{
		Use: "list", Short: "List what backups there are",
		Long: `List the backups in the store, the oldest first. No database is needed, but to find out that a tenant has
been renamed. What lies there and cannot be believed - a manifest that this installation has not signed, or
that is another backup's - is told and not listed.`,
		Example: "  oneo backup list\n  oneo backup list -t acme -o json\n  oneo backup list --database", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case database && name != "":
				return errUsage{fault.New(fault.Invalid, "--database and --tenant exclude each other").WithCode("two_selectors")}
			case database:
				return backupListFull(cmd.Context(), e)
			}
			return backupList(cmd.Context(), e, name)
		},
	}
	cmd.Flags().BoolVar(&database, "database", false, "full backups instead")
	cmd.Flags().StringVarP(&name, "tenant", "t", "", "only backups of the tenant of this `NAME`, also from before it had it")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	return cmd
}

func backupList(ctx context.Context, e *env, name string) error {
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	c, err := backupsOf(ctx, e, a, b, name)
	if err != nil {
		return err
	}
	e.sayOdd(c)
	return show(e, c.Backups, manifestColumns)
}

// backupsOf reads what there is of a tenant: the one that has the name now, or else those that had it when they were backed
// up. An empty name: all.
func backupsOf(ctx context.Context, e *env, a *app.App, b *backup.Backups, name string) (backup.Catalogue, error) {
	if name == "" {
		return b.List(ctx, "")
	}
	if _, err := tenant.ParseSlug(name); err != nil {
		return backup.Catalogue{}, err
	}
	t, err := tenantNamed(ctx, a, name)
	switch {
	case err == nil:
		return b.List(ctx, t.ID)
	case fault.Is(err, fault.NotFound):
	case fault.Is(err, fault.Unavailable), fault.Is(err, fault.Pending):
		e.say("the database cannot be asked who %s is; backups are found by the name that it had then", name)
	default:
		return backup.Catalogue{}, err
	}
	c, lerr := b.List(ctx, "")
	c.Backups = slices.DeleteFunc(c.Backups, func(m backup.Manifest) bool { return m.Slug != name })
	if lerr == nil && len(c.Backups) == 0 && fault.Is(err, fault.NotFound) {
		return c, err
	}
	return c, lerr
}

// sayOdd tells what lies in the store and is no backup.
func (e *env) sayOdd(c backup.Catalogue) {
	for _, bad := range c.Bad {
		e.say("not a backup: %s", fault.Of(bad.Err).Message)
	}
	if n := len(c.Loose); n > 0 {
		e.say("%d archive(s) have no manifest: they are being written, or were interrupted and are pruned after a week", n)
	}
}

func newBackupShowCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use: "show BACKUP", Short: "Show what is known of a backup",
		Long:    "Show the manifest of a backup: whose it is and from when, what it comes to, and which keys open it. Its archive is not read.",
		Example: "  oneo backup show 3f2a9c41", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, b, err := e.backups()
			if err != nil {
				return err
			}
			m, err := b.Find(cmd.Context(), args[0])
			if err != nil {
				f, full, err := findFull(cmd.Context(), b, args[0], err)
				if !full {
					return err
				}
				return showOne(e, f, fullDetails)
			}
			return showOne(e, m, manifestDetails)
		},
	}
}

func newBackupKeepCmd(e *env) *cobra.Command {
	var remove bool
	var reason string
	cmd := &cobra.Command{
		Use: "keep BACKUP", Short: "Keep a backup from being pruned",
		Long:    "Keep `oneo backup prune` away from a backup, for ever; with --remove no longer.",
		Example: "  oneo backup keep 3f2a9c41 --reason 'end of the year'\n  oneo backup keep --remove 3f2a9c41", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			_, b, err := e.backups()
			if err != nil {
				return err
			}
			m, err := b.Keep(cmd.Context(), args[0], !remove, reason)
			if err != nil {
				f, full, err := findFull(cmd.Context(), b, args[0], err)
				if !full {
					return err
				}
				return keepFull(cmd.Context(), e, b, f.ID, remove, reason)
			}
			if remove {
				e.say("the backup %s of %s may be pruned", m.ID, m.Slug)
			} else {
				e.say("the backup %s of %s is kept; undo: oneo backup keep --remove %s", m.ID, m.Slug, m.ID)
			}
			return showOne(e, m, manifestColumns)
		},
	}
	cmd.Flags().BoolVar(&remove, "remove", false, "no longer")
	cmd.Flags().StringVar(&reason, "reason", "", "`WHY`, for who lists backups")
	return cmd
}

// keepOptions are the flags by which a policy is named.
type keepOptions struct {
	policy backup.Policy
	within string
}

// bind registers the flags.
func (o *keepOptions) bind(cmd *cobra.Command) {
	f, p := cmd.Flags(), &o.policy
	f.IntVar(&p.Last, "keep-last", 0, "keep the newest `N`")
	f.IntVar(&p.Hourly, "keep-hourly", 0, "keep the last backup of each of the last `N` hours that have one")
	f.IntVar(&p.Daily, "keep-daily", 0, "keep the last backup of each of the last `N` days that have one")
	f.IntVar(&p.Weekly, "keep-weekly", 0, "keep the last backup of each of the last `N` weeks that have one")
	f.IntVar(&p.Monthly, "keep-monthly", 0, "keep the last backup of each of the last `N` months that have one")
	f.StringVar(&o.within, "keep-within", "", "keep what is at most so much older than the newest: years, months, days and hours, as in `1y6m14d12h`")
}

// read checks them.
func (o *keepOptions) read() (backup.Policy, error) {
	p := o.policy
	if slices.Min([]int{p.Last, p.Hourly, p.Daily, p.Weekly, p.Monthly}) < 0 {
		return p, errUsage{fault.New(fault.Invalid, "what is kept must not be below 0")}
	}
	if o.within != "" {
		var err error
		if p.Within, err = backup.ParseSpan(o.within); err != nil {
			return p, errUsage{err}
		}
	}
	return p, nil
}

var errNoPolicy = errUsage{fault.New(fault.Invalid, "no rule says what is kept").WithCode("no_policy").WithHint("add for example --keep-daily 7 --keep-weekly 5")}

type backupPruneOptions struct {
	keepOptions
	name     string
	database bool
	erased   bool
	dryRun   bool
}

func newBackupPruneCmd(e *env) *cobra.Command {
	var o backupPruneOptions
	cmd := &cobra.Command{
		Use: "prune", Short: "Take old backups away",
		Long: `Take away the backups that no rule keeps, tenant by tenant, and archives of backups that were interrupted
more than a week ago. The rules are restic's: --keep-daily 7 keeps the last backup of each of the last
seven days on which there is one, and so on; what several rules keep stays once. Days begin at midnight
UTC, weeks on Monday. --keep-within counts from a tenant's newest backup.

Whatever the rules say, the newest backups of each tenant stay, as many as backup.keep_min, and so does
what ` + "`oneo backup keep`" + ` keeps. A manifest that cannot be believed and its archive are left alone.

With --erased all archives go of tenants that were erased, which ` + "`oneo tenant erase --keep-archives`" + ` has left: their
own backups, and their archives in full backups, also in those that are kept. A tenant with a backup of its own that
is kept is left alone, and so is one that exists, or whose record of erasure is not genuine. The record says then when they
went. --keep-within leaves those of tenants that were erased no longer ago. It wants a word typed, or --yes.`,
		Example: "  oneo backup prune --keep-within 2d --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run\n  oneo backup prune -t acme --keep-last 3 --yes\n  oneo backup prune --erased --keep-within 1y --dry-run",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return backupPrune(cmd.Context(), e, o) },
	}
	o.bind(cmd)
	f := cmd.Flags()
	f.StringVarP(&o.name, "tenant", "t", "", "only backups of the tenant of this `NAME`; default: all that there are")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	f.BoolVar(&o.database, "database", false, "full backups instead, those of the same groups by the same rules, each as a whole")
	f.BoolVar(&o.erased, "erased", false, "archives of erased tenants instead; -t: of the erased ones of this `NAME` or id")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would go and why the others stay, and do nothing")
	return cmd
}

var verdictColumns = []column[backup.Verdict]{
	{"ID", "id", func(v backup.Verdict) any { return v.ID }},
	{"TENANT", "tenant", func(v backup.Verdict) any { return v.Slug }},
	{"MADE", "made_at", func(v backup.Verdict) any { return v.Made }},
	{"SIZE", "size_bytes", func(v backup.Verdict) any { return v.Bytes }},
	{"STAYS", "stays", func(v backup.Verdict) any { return v.Keep }},
	{"FOR", "for", func(v backup.Verdict) any { return v.Why }},
}

func backupPrune(ctx context.Context, e *env, o backupPruneOptions) error {
	p, err := o.read()
	if err != nil {
		return err
	}
	if o.erased {
		if o.database || p != (backup.Policy{Within: p.Within}) {
			return errUsage{fault.New(fault.Invalid, "--erased goes with --tenant and --keep-within only").WithCode("two_selectors")}
		}
		return backupPruneErased(ctx, e, p.Within, o.name, o.dryRun)
	}
	if p.IsZero() {
		return errNoPolicy
	}
	switch {
	case o.database && o.name != "":
		return errUsage{fault.New(fault.Invalid, "--database and --tenant exclude each other").WithCode("two_selectors")}
	case o.database:
		return backupPruneFull(ctx, e, p, o.dryRun)
	}
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	id := ""
	if o.name != "" {
		t, err := tenantNamed(ctx, a, o.name)
		if err != nil {
			return err
		}
		id = t.ID
	}
	plan, err := b.Plan(ctx, p, id)
	if err != nil {
		return err
	}
	e.sayOdd(backup.Catalogue{Bad: plan.Bad})
	n := plan.Removes()
	var bytes int64
	for _, v := range plan.Verdicts {
		if !v.Keep {
			bytes += v.Bytes
		}
	}
	for _, l := range plan.Loose {
		bytes += l.Size
	}
	if o.dryRun {
		e.say("would take away %d of %d backup(s) and %d interrupted one(s), %s; nothing was done", n, len(plan.Verdicts), len(plan.Loose), size(bytes))
		return show(e, plan.Verdicts, verdictColumns)
	}
	gone := []backup.Manifest{}
	if n+len(plan.Loose) > 0 {
		if err := e.confirm(ctx, fmt.Sprintf("take away %d of %d backup(s) and %d interrupted one(s), %s, for good", n, len(plan.Verdicts), len(plan.Loose), size(bytes))); err != nil {
			return err
		}
		// What has come since is judged anew; what was to stay stays.
		plan, err = b.Prune(ctx, p, id, func(m backup.Manifest) { gone = append(gone, m) })
	} else {
		err = b.Sweep(ctx, id)
	}
	e.say("took away %d of %d backup(s)", len(gone), len(plan.Verdicts))
	return errors.Join(err, show(e, gone, manifestColumns))
}
