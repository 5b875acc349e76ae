package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// checkOptions are the flags of commands that read backups to prove them.
type checkOptions struct {
	jobs      int
	keys      keyFlags
	customDDL bool
}

func (o *checkOptions) bind(cmd *cobra.Command) {
	f := cmd.Flags()
	f.IntVar(&o.jobs, "jobs", 2, "backups at one time")
	o.keys.register(f)
	f.BoolVar(&o.customDDL, "with-custom-ddl", false, "run the SQL that an archive holds for what is not in the migrations")
}

// identities are those of the flags, or those of the configuration.
func (o *checkOptions) identities(b *backup.Backups) ([]archive.Identity, error) {
	ids, err := o.keys.identities()
	if err == nil && len(ids) == 0 {
		ids = b.Identities()
	}
	return ids, err
}

type backupVerifyOptions struct {
	checkOptions
	id        string
	names     []string
	all       bool
	restore   bool
	checksums bool
	sample    int
}

func newBackupVerifyCmd(e *env) *cobra.Command {
	var o backupVerifyOptions
	cmd := &cobra.Command{
		Use: "verify [BACKUP]", Short: "Prove that backups are whole",
		Long: `Read backups to their end: every byte is as the signed manifest says, every record is decoded, every
table's rows come to the sum that was written. With --checksums only the bytes are compared, which needs
no key. Neither needs a database.

With --restore each backup is also restored, into a schema that nobody sees in a transaction that is
rolled back: rows are counted, indexes and constraints are made, the structure is compared, and it is
migrated to the newest version. That writes as much into the database as a restore does.

BACKUP may be a full backup: then all of its archives are read, and that its manifest is whole is proved. With
--restore its tenants are restored as well, one by one, or with --sample N so many of them, chosen at random;
those that were erased since are left out. The shared tables are only read.

The exit code is 14 when a backup is not what was written.`,
		Example: "  oneo backup verify 3f2a9c41 --restore\n  oneo backup verify 7be2c621f00984ad --restore --sample 20\n  oneo backup verify -t acme\n  oneo backup verify --all --checksums",
		Args:    usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.id = args[0]
			}
			return backupVerify(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.names, "tenant", "t", nil, "all backups of the tenant of this `NAME`; repeatable")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	f.BoolVar(&o.all, "all", false, "all backups that there are")
	f.BoolVar(&o.restore, "restore", false, "restore it as well, and take it back")
	f.IntVar(&o.sample, "sample", 0, "with --restore, so many of a full backup's tenants; 0: all of them")
	f.BoolVar(&o.checksums, "checksums", false, "compare bytes only")
	o.bind(cmd)
	return cmd
}

// checked is one backup's line of a report.
type checked struct {
	backup.Manifest
	number int32 // of a tenant that is drilled
	status fleet.Status
	took   time.Duration
	err    error
}

func (c checked) reported() any {
	if c.err == nil {
		return nil
	}
	return errorObject(c.err)
}

var checkedColumns = []column[checked]{
	{"ID", "id", func(c checked) any { return c.ID }},
	{"TENANT", "tenant", func(c checked) any { return c.Slug }},
	{"MADE", "made_at", func(c checked) any {
		if c.Made.IsZero() { // there is none
			return nil
		}
		return c.Made
	}},
	{"STATUS", "status", func(c checked) any { return string(c.status) }},
	{"ROWS", "rows", func(c checked) any { return c.Rows }},
	{"SIZE", "size_bytes", func(c checked) any { return c.Bytes }},
	{"MS", "duration_ms", func(c checked) any { return c.took.Milliseconds() }},
	{"ERROR", "error", checked.reported},
}

func backupVerify(ctx context.Context, e *env, o backupVerifyOptions) error {
	given := 0
	for _, is := range []bool{o.id != "", len(o.names) > 0, o.all} {
		if is {
			given++
		}
	}
	if given != 1 {
		return errUsage{fault.New(fault.Invalid, "say which backups are to be verified").WithCode("no_selector").WithHint("give the id of one, -t NAME, or --all")}
	}
	if o.restore && o.checksums {
		return errUsage{fault.New(fault.Invalid, "--restore and --checksums exclude each other")}
	}
	if o.sample < 0 || o.sample > 0 && (!o.restore || o.id == "") {
		return errUsage{fault.New(fault.Invalid, "--sample must not be below 0, and goes with --restore and the id of a full backup")}
	}
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	ids, err := o.identities(b)
	if err != nil {
		return err
	}
	var c backup.Catalogue
	switch {
	case o.id != "":
		m, err := b.Find(ctx, o.id)
		if err != nil {
			f, full, err := findFull(ctx, b, o.id, err)
			if !full {
				return err
			}
			return verifyFull(ctx, e, b, f, o, ids)
		}
		if o.sample > 0 {
			return errUsage{fault.New(fault.Invalid, "--sample is for full backups; %s is one of %s alone", m.ID, m.Slug)}
		}
		c.Backups = []backup.Manifest{m}
	case o.all:
		c, err = b.List(ctx, "")
	}
	for _, name := range o.names {
		of, err := backupsOf(ctx, e, a, b, name)
		if err != nil {
			return err
		}
		c.Backups, c.Bad = append(c.Backups, of.Backups...), append(c.Bad, of.Bad...)
	}
	if err != nil {
		return err
	}
	e.sayOdd(c)
	items := make([]checked, len(c.Backups))
	for i, m := range c.Backups {
		items[i].Manifest = m
	}
	return check(ctx, e, items, len(c.Bad) > 0, o.jobs, func(c checked) error {
		switch {
		case o.checksums:
			return b.Checksum(ctx, c.Manifest)
		case o.restore:
			_, err := b.Try(ctx, c.Manifest, "", transfer.Loading{Identities: ids, CustomDDL: o.customDDL, Actor: e.actor()})
			return err
		}
		return b.Verify(ctx, c.Manifest, ids)
	})
}

// check does something with backups and reports it; odd says that there are things that are none. One backup's error is the command's.
func check(ctx context.Context, e *env, items []checked, odd bool, jobs int, do func(checked) error) error {
	if jobs < 1 {
		return errUsage{fault.New(fault.Invalid, "--jobs must be at least 1")}
	}
	type item struct{ *checked }
	list := make([]item, len(items))
	for i := range items {
		list[i] = item{&items[i]}
	}
	fleet.Run(ctx, list, fleet.Options{Jobs: jobs}, func(i item) string { return i.ID }, func(_ context.Context, i item) fleet.Outcome {
		start := time.Now()
		if i.err == nil {
			i.err = do(*i.checked)
		}
		i.took, i.status = time.Since(start), fleet.OK
		if i.err != nil {
			i.status = fleet.Failed
		}
		return fleet.Outcome{Err: i.err}
	})
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := show(e, items, checkedColumns); err != nil {
		return err
	}
	failed, worst := 0, exitSomeFailed
	for _, i := range items {
		switch {
		case i.err == nil:
			continue
		case fault.Is(i.err, fault.Unverified):
			worst = exitUnverified
		case fault.Is(i.err, fault.WrongKey) && worst == exitSomeFailed:
			worst = exitWrongKey
		}
		failed++
	}
	if len(items) == 1 && failed == 1 {
		return items[0].err
	}
	e.say("%d good, %d failed", len(items)-failed, failed)
	switch {
	case failed > 0:
		return errExit{worst}
	case odd:
		return errExit{exitUnverified}
	}
	return nil
}

type backupDrillOptions struct {
	checkOptions
	selector selector
	sample   int
	dryRun   bool
	physical bool
	at       atOptions
}

func newBackupDrillCmd(e *env) *cobra.Command {
	var o backupDrillOptions
	cmd := &cobra.Command{
		Use: "drill", Short: "Restore a sample of tenants and take it back, to prove that it can be done",
		Long: `Restore the newest backup of some of the selected tenants, chosen at random, into schemas that nobody
sees, compare what comes of it as ` + "`oneo backup verify --restore`" + ` does, and take it back. The tenants themselves are not touched.

The newest backup is the one whose rows are the youngest: one of the tenant's own, or its archive in a full backup where
that is younger than all of its own. One that says that it is of the future counts only where there is no other.

The last restore that was proved of each tenant is remembered; --dry-run shows it for all that are
selected, beside their newest backups. A tenant without a backup has failed.

With --physical a moment is recovered instead, any one that physical backups and archived WAL reach, or that of --at, on a
cluster of its own; some of the tenants of then are taken from it as ` + "`oneo restore --at`" + ` takes them, and restored and
compared in that cluster, which is then removed. What is live has no part in it but for its disks.`,
		Example: "  oneo backup drill --physical\n  oneo backup drill --all-tenants\n  oneo backup drill -t acme\n  oneo backup drill --all-tenants --dry-run",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return backupDrill(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	o.selector.bind(cmd, e)
	f.BoolVar(&o.physical, "physical", false, "prove that a moment can be recovered, and tenants be taken from it")
	o.at.register(f)
	f.IntVar(&o.sample, "sample", 5, "so many of the tenants; 0: all of them")
	f.BoolVar(&o.dryRun, "dry-run", false, "show the newest backup and the last proof of each tenant, and restore none")
	o.bind(cmd)
	return cmd
}

// provable is where one tenant stands.
type provable struct {
	tenant.Tenant
	newest *backup.Manifest
	proof  *backup.Proof
}

var provableColumns = []column[provable]{
	{"TENANT", "tenant", func(p provable) any { return p.Slug.String() }},
	{"NEWEST", "newest", func(p provable) any {
		if p.newest == nil {
			return nil
		}
		return p.newest.ID
	}},
	{"MADE", "made_at", func(p provable) any {
		if p.newest == nil {
			return nil
		}
		return p.newest.Made
	}},
	{"PROVED", "proved", func(p provable) any {
		if p.proof == nil {
			return nil
		}
		return p.proof.Backup
	}},
	{"AT", "proved_at", func(p provable) any {
		if p.proof == nil {
			return nil
		}
		return p.proof.ProvedAt
	}},
	{"ROWS", "rows", func(p provable) any {
		if p.proof == nil {
			return nil
		}
		return p.proof.Rows
	}},
	{"MS", "duration_ms", func(p provable) any {
		if p.proof == nil {
			return nil
		}
		return p.proof.Duration.Milliseconds()
	}},
}

func backupDrill(ctx context.Context, e *env, o backupDrillOptions) error {
	if o.sample < 0 {
		return errUsage{fault.New(fault.Invalid, "--sample must not be below 0")}
	}
	if o.physical {
		return drillPhysical(ctx, e, o)
	}
	if o.at.given() {
		return errUsage{fault.New(fault.Invalid, "--at goes with --physical: a backup has its own moment")}
	}
	if _, err := o.selector.filter(); err != nil {
		return err
	}
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	ids, err := o.identities(b)
	if err != nil {
		return err
	}
	ts, err := o.selector.tenants(ctx, a)
	if err != nil {
		return err
	}
	if n := o.sample; n > 0 && n < len(ts) && !o.dryRun {
		e.say("%d of %d tenant(s), chosen at random", n, len(ts))
		rand.Shuffle(len(ts), func(i, j int) { ts[i], ts[j] = ts[j], ts[i] })
		ts = ts[:n]
		slices.SortFunc(ts, func(a, b tenant.Tenant) int { return int(a.Number) - int(b.Number) })
	}
	newest, bad, err := b.Provable(ctx, idsOf(ts))
	if err != nil {
		return err
	}
	e.sayOddFull(bad)
	if o.dryRun {
		proofs, err := b.Proofs(ctx)
		if err != nil {
			return err
		}
		rows := make([]provable, len(ts))
		for i, t := range ts {
			rows[i].Tenant = t
			if m, has := newest[t.ID]; has {
				rows[i].newest = &m
			}
			if p, has := proofs[t.Number]; has {
				rows[i].proof = &p
			}
		}
		return show(e, rows, provableColumns)
	}
	items := make([]checked, len(ts))
	for i, t := range ts {
		m, has := newest[t.ID]
		items[i] = checked{Manifest: m, number: t.Number}
		if !has {
			items[i].Slug = t.Slug.String()
			items[i].err = fault.New(fault.NotFound, "there is no backup of tenant %s", t.Slug).WithCode("backup_not_found").WithHint("oneo backup create -t %s", t.Slug)
		}
	}
	return check(ctx, e, items, false, o.jobs, func(c checked) error {
		return b.Drill(ctx, c.number, c.Manifest, transfer.Loading{Identities: ids, CustomDDL: o.customDDL, Actor: e.actor()})
	})
}

func idsOf(ts []tenant.Tenant) (ids []string) {
	for _, t := range ts {
		ids = append(ids, t.ID)
	}
	return ids
}
