package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/physical"
)

func newBackupPhysicalCmd(e *env) *cobra.Command {
	return noun("physical", "Keep backups of whole clusters with their WAL, from which any moment can be had back",
		`Keep backups of whole PostgreSQL clusters, and archive the WAL that they write meanwhile: any moment can then be had
back, for one tenant (`+"`oneo restore -t TENANT --at TIME`"+`) or for all. Groups on one host and port are one cluster, which is called
main, or as the first of its groups. The engine of backup.physical.engine makes and keeps them, in backup.physical.dir.

LABEL is the name of a physical backup in the list.`,
		"  oneo backup physical setup\n  oneo backup physical create\n  oneo backup physical list\n  oneo backup physical prune --keep-daily 7 --keep-weekly 5",
		newPhysicalSetupCmd(e), newPhysicalCreateCmd(e), newPhysicalListCmd(e), newPhysicalVerifyCmd(e), newPhysicalPruneCmd(e))
}

// clusters are those that hold a group, or all.
func (e *env) clusters(group string) (*app.App, []app.Cluster, error) {
	a, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	all, err := a.PhysicalClusters()
	if err != nil {
		return nil, nil, err
	}
	ks, err := app.ClusterOf(all, group)
	return a, ks, err
}

type physicalSetupOptions struct {
	group, admin, adminFile string
	print                   bool
}

func newPhysicalSetupCmd(e *env) *cobra.Command {
	var o physicalSetupOptions
	cmd := &cobra.Command{
		Use: "setup", Short: "Make the repository, and say what PostgreSQL needs before WAL is archived",
		Long: `Make each cluster's repository, compare the cluster's settings, the owner's rights and pg_hba.conf with what the engine
needs, and say what is missing as lines to copy. With the URL of a superuser, settings and rights that are missing are
set and granted, and nothing else: a restart that PostgreSQL needs and a line of pg_hba.conf are only told.

Once nothing is missing it is proved that WAL comes into the repository. The exit code is 13 for as long as something is
missing. It can be run again at any time. With --print nothing is done, and all that the engine needs is printed, there or not.`,
		Example: "  oneo backup physical setup\n  oneo backup physical setup --admin-url-file /run/secrets/postgres-admin-url\n  oneo backup physical setup --print",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return physicalSetup(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.group, "group", "", "only the cluster of this database `GROUP`")
	f.StringVar(&o.admin, "admin-url", "", "a superuser's `URL`: set and grant what is missing")
	f.StringVar(&o.adminFile, "admin-url-file", "", "a `FILE` that holds it; - is standard input")
	f.BoolVar(&o.print, "print", false, "print all that is needed, and do nothing")
	return cmd
}

var needColumns = []column[app.Need]{
	{"CHECK", "check", func(n app.Need) any { return n.Check }},
	{"CLUSTER", "cluster", func(n app.Need) any { return n.Cluster }},
	{"STATE", "state", func(n app.Need) any { return string(n.State) }},
	{"HAS", "has", func(n app.Need) any { return n.Has }},
	{"WANTS", "wants", func(n app.Need) any { return n.Wants }},
}

// needDetails are for programs; people read the lines below the table.
var needDetails = append(needColumns[:len(needColumns):len(needColumns)], []column[app.Need]{
	{"WHERE", "where", func(n app.Need) any { return n.Where }},
	{"DO", "do", func(n app.Need) any { return n.Do }},
}...)

func showNeeds(e *env, needs []app.Need) error {
	if e.output == "table" {
		return show(e, needs, needColumns)
	}
	return show(e, needs, needDetails)
}

func physicalSetup(ctx context.Context, e *env, o physicalSetupOptions) error {
	switch {
	case o.admin != "" && o.adminFile != "":
		return errUsage{fault.New(fault.Invalid, "--admin-url and --admin-url-file exclude each other")}
	case o.print && (o.admin != "" || o.adminFile != ""):
		return errUsage{fault.New(fault.Invalid, "--print does nothing: it goes with no superuser")}
	}
	a, clusters, err := e.clusters(o.group)
	if err != nil {
		return err
	}
	if o.print {
		return physicalPrint(ctx, e, a, clusters)
	}
	if o.adminFile != "" {
		text, err := readFile(e, o.adminFile)
		if err != nil {
			return fault.Wrap(err, fault.Invalid, "the file with the superuser's URL cannot be read")
		}
		o.admin = string(trimNewline(text))
	}
	if o.admin != "" && len(clusters) > 1 {
		return errUsage{fault.New(fault.Invalid, "there are %d clusters, and a superuser's URL is of one", len(clusters)).WithHint("name it with --group")}
	}
	var all []app.Need
	left, restarts := 0, 0
	for _, k := range clusters {
		needs, err := a.SetUpPhysical(ctx, k, o.admin)
		if err != nil {
			return err
		}
		for _, n := range needs {
			switch {
			case n.Healthy():
				continue
			case n.State == app.NeedRestart:
				restarts++
			case n.State == app.NeedFailed:
				e.say("%s: %s; %s", k.Name, n.Has, n.Where)
			}
			left++
		}
		all = append(all, needs...)
	}
	if err := showNeeds(e, all); err != nil {
		return err
	}
	for _, k := range clusters {
		sayLines(func(line string) { e.say("%s", line) }, k, all, func(n app.Need) bool { return n.State == app.NeedMissing })
	}
	if restarts > 0 {
		e.say("PostgreSQL must be started again before its settings count")
	}
	if left > 0 {
		return fault.New(fault.Pending, "%d thing(s) are missing before any moment can be had back", left).WithCode("physical_setup").
			WithHint("see above, and run oneo backup physical setup again; with --admin-url it sets and grants what it can")
	}
	e.say("ready; next: oneo backup physical create")
	return nil
}

func physicalPrint(ctx context.Context, e *env, a *app.App, clusters []app.Cluster) error {
	var all []app.Need
	for _, k := range clusters {
		needs, err := a.PhysicalPlan(ctx, k)
		if err != nil {
			return err
		}
		if e.output == "table" {
			sayLines(func(line string) { fmt.Fprintln(e.out, line) }, k, needs, func(app.Need) bool { return true })
		}
		all = append(all, needs...)
	}
	if e.output == "table" {
		return nil
	}
	return showNeeds(e, all)
}

// sayLines tells what is to be done to a cluster, in lines to copy, those of one place together.
func sayLines(say func(string), k app.Cluster, needs []app.Need, which func(app.Need) bool) {
	last, set := "", false
	reload := func() {
		if set {
			say("select pg_reload_conf();")
		}
		set = false
	}
	defer reload()
	for _, n := range needs {
		if n.Cluster != k.Name || !which(n) || len(n.Do) == 0 {
			continue
		}
		if n.Where != last {
			reload()
			say(fmt.Sprintf("-- cluster %s, %s:", k, n.Where))
			last = n.Where
		}
		set = set || n.Reloads
		for _, line := range n.Do {
			say(line)
		}
	}
}

type physicalCreateOptions struct {
	kind, group, progress string
}

func newPhysicalCreateCmd(e *env) *cobra.Command {
	var o physicalCreateOptions
	cmd := &cobra.Command{
		Use: "create", Short: "Back whole clusters up",
		Long: `Back each cluster up while it is used. Moments before the end of the first backup cannot be had back; later ones are
reached the faster the newer the backup before them is. A backup is there whole or not at all.

Kinds other than full copy changes only, where the engine can: diff since the last full one, incr since the last
one of any kind. The programs of backup.hooks are run around each backup, with ONEO_BACKUP_KIND=physical.`,
		Example: "  oneo backup physical create\n  oneo backup physical create --kind incr --group main", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return physicalCreate(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.StringVar(&o.kind, "kind", string(physical.Full), "`KIND`: full, diff or incr")
	f.StringVar(&o.group, "group", "", "only the cluster of this database `GROUP`")
	f.StringVar(&o.progress, "progress", "auto", "auto, json or none")
	return cmd
}

// physicalRow is one physical backup's line.
type physicalRow struct {
	cluster string
	physical.Backup
	reach *physical.Window // nil: nothing
	took  time.Duration
	err   error
}

var physicalColumns = []column[physicalRow]{
	{"LABEL", "label", func(r physicalRow) any { return r.Label }},
	{"CLUSTER", "cluster", func(r physicalRow) any { return r.cluster }},
	{"KIND", "kind", func(r physicalRow) any { return string(r.Kind) }},
	{"FINISHED", "finished_at", func(r physicalRow) any { return unlessZero(r.Stop) }},
	{"SIZE", "size_bytes", func(r physicalRow) any { return bytesOf(r.Bytes) }},
	{"STORED", "stored_bytes", func(r physicalRow) any { return bytesOf(r.Stored) }},
}

// unlessZero leaves a time out that there is not.
func unlessZero(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t
}

var physicalCreated = append(physicalColumns[:len(physicalColumns):len(physicalColumns)], physicalResult...)

var physicalResult = []column[physicalRow]{
	{"STATUS", "status", func(r physicalRow) any {
		if r.err != nil {
			return string(fleet.Failed)
		}
		return string(fleet.OK)
	}},
	{"MS", "duration_ms", func(r physicalRow) any { return r.took.Milliseconds() }},
	{"ERROR", "error", func(r physicalRow) any {
		if r.err == nil {
			return nil
		}
		return errorObject(r.err)
	}},
}

func physicalCreate(ctx context.Context, e *env, o physicalCreateOptions) error {
	kind := physical.Kind(o.kind)
	if !slices.Contains([]physical.Kind{physical.Full, physical.Differential, physical.Incremental}, kind) {
		return errUsage{fault.New(fault.Invalid, "there is no kind %q of physical backups", o.kind).WithHint("use full, diff or incr")}
	}
	a, clusters, err := e.clusters(o.group)
	if err != nil {
		return err
	}
	rows := make([]physicalRow, len(clusters))
	for i, k := range clusters {
		rows[i].cluster = k.Name
	}
	err = eachPhysical(ctx, e, o.progress, rows, func(i int, r *physicalRow, report func(physical.Progress)) error {
		b, warning, err := a.CreatePhysical(ctx, clusters[i], physical.CreateOptions{Kind: kind, Report: report})
		r.Backup = b
		if warning != "" {
			e.say("%s: %s", r.cluster, warning)
		}
		if err == nil {
			e.say("physical backup %s of %s in %s: any moment from %s on can be had back", b.Label, clusters[i], clusters[i].Where, b.Stop.UTC().Format(time.RFC3339))
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := show(e, rows, physicalCreated); err != nil {
		return err
	}
	return physicalEnd(e, rows)
}

// eachPhysical does something with one backup after another, telling how far it is. An error is one of the whole.
func eachPhysical(ctx context.Context, e *env, progress string, rows []physicalRow, do func(int, *physicalRow, func(physical.Progress)) error) error {
	for i := range rows {
		m, err := newPhases(e, progress)
		if err != nil {
			return err
		}
		start := time.Now()
		rows[i].err = do(i, &rows[i], func(p physical.Progress) { m.tell(rows[i].cluster, p) })
		m.end()
		rows[i].took = time.Since(start)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if len(rows) == 1 && rows[i].err != nil {
			return rows[i].err
		}
	}
	return nil
}

// physicalEnd is the exit of a command over several backups that are shown.
func physicalEnd(e *env, rows []physicalRow) error {
	failed, code := 0, exitSomeFailed
	for _, r := range rows {
		if r.err != nil {
			failed++
			if fault.Is(r.err, fault.Unverified) {
				code = exitUnverified
			}
		}
	}
	if failed == 0 {
		return nil
	}
	e.say("%d good, %d failed", len(rows)-failed, failed)
	return errExit{code}
}

func newPhysicalListCmd(e *env) *cobra.Command {
	var group string
	cmd := &cobra.Command{
		Use: "list", Short: "List physical backups, and which moments can be had back",
		Long: `List the physical backups of each cluster, the oldest first, with the moments that are reached from each. Below stands what
matters: the earliest and the latest moment that can be had back, where between them WAL is missing, when the last WAL was
archived - what was committed since would be lost with the cluster - and whether archiving fails now.

The repository is read; the cluster is asked for its archiving only, and need not answer.`,
		Example: "  oneo backup physical list\n  oneo backup physical list --group main -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return physicalList(cmd.Context(), e, group) },
	}
	cmd.Flags().StringVar(&group, "group", "", "only the cluster of this database `GROUP`")
	return cmd
}

var reachColumns = append(physicalColumns[:len(physicalColumns):len(physicalColumns)], []column[physicalRow]{
	{"FROM", "from", func(r physicalRow) any {
		if r.reach == nil {
			return nil
		}
		return r.reach.From
	}},
	{"UNTIL", "until", func(r physicalRow) any {
		if r.reach == nil {
			return nil
		}
		return r.reach.Until
	}},
	{"BAD", "bad", func(r physicalRow) any {
		if r.Bad == "" && r.reach == nil {
			return "its WAL is not there"
		}
		return r.Bad
	}},
}...)

func rowsOf(s app.ClusterState) []physicalRow {
	rows := []physicalRow{}
	for _, b := range s.Backups {
		r := physicalRow{cluster: s.Name, Backup: b}
		if w, ok := s.Reach(b); ok {
			r.reach = &w
		}
		rows = append(rows, r)
	}
	return rows
}

// span is a stretch of time in JSON.
type span struct {
	From  string `json:"from"`
	Until string `json:"until"`
}

func spanOf(from, until time.Time) span {
	return span{from.UTC().Format(time.RFC3339Nano), until.UTC().Format(time.RFC3339Nano)}
}

// gaps are the stretches between windows.
func gaps(ws []physical.Window) []span {
	list := []span{}
	for i := range ws[:max(0, len(ws)-1)] {
		list = append(list, spanOf(ws[i].Until, ws[i+1].From))
	}
	return list
}

// reached is a cluster's state, and when a recovery of it was proved last.
type reached struct {
	app.ClusterState
	proof *app.PhysicalProof // nil: never, or the database does not answer
}

var clusterColumns = []column[reached]{
	{"CLUSTER", "cluster", func(s reached) any { return s.Name }},
	{"GROUPS", "groups", func(s reached) any { return s.Groups }},
	{"ENGINE", "engine", func(s reached) any { return s.Engine.Name() }},
	{"REPOSITORY", "repository", func(s reached) any { return s.Where }},
	{"SYSTEM", "system", func(s reached) any { return s.System }},
	{"EARLIEST", "earliest_at", func(s reached) any {
		if ws := s.Windows(); len(ws) > 0 {
			return ws[0].From
		}
		return nil
	}},
	{"LATEST", "latest_at", func(s reached) any {
		if ws := s.Windows(); len(ws) > 0 {
			return ws[len(ws)-1].Until
		}
		return nil
	}},
	{"WINDOWS", "windows", func(s reached) any {
		list := []span{}
		for _, w := range s.Windows() {
			list = append(list, spanOf(w.From, w.Until))
		}
		return list
	}},
	{"GAPS", "gaps", func(s reached) any { return gaps(s.Windows()) }},
	{"ARCHIVED", "archived_at", func(s reached) any { return unlessZero(s.Archived().Until) }},
	{"AGE", "archived_age_ms", func(s reached) any {
		if last := s.Archived().Until; !last.IsZero() {
			return max(0, s.At.Sub(last).Milliseconds())
		}
		return nil
	}},
	{"PROVED", "proved_at", func(s reached) any {
		if s.proof == nil {
			return nil
		}
		return s.proof.ProvedAt
	}},
	{"ARCHIVER", "archiver", func(s reached) any {
		r := s.Archiver
		if r == nil {
			return nil
		}
		return map[string]any{"on": r.On, "failing": r.Failing(), "last_wal": r.LastWAL, "last_at": when(r.LastAt), "failed_wal": r.FailedWAL, "failed_at": when(r.FailedAt)}
	}},
	{"BACKUPS", "backups", func(s reached) any {
		list := []map[string]any{}
		for _, r := range rowsOf(s.ClusterState) {
			list = append(list, object(r, reachColumns))
		}
		return list
	}},
}

func physicalList(ctx context.Context, e *env, group string) error {
	a, clusters, err := e.clusters(group)
	if err != nil {
		return err
	}
	proofs, err := a.PhysicalProofs(ctx)
	if err != nil && ctx.Err() != nil {
		return err // otherwise what there is of backups is told without the database
	}
	var states []reached
	rows := []physicalRow{}
	for _, k := range clusters {
		s, err := a.PhysicalState(ctx, k)
		if err != nil {
			return err
		}
		r := reached{ClusterState: s}
		if p, is := proofs[k.Name]; is {
			r.proof = &p
		}
		states, rows = append(states, r), append(rows, rowsOf(s)...)
	}
	switch e.output {
	case "json", "yaml", "ndjson":
		return show(e, states, clusterColumns)
	}
	if err := show(e, rows, reachColumns); err != nil {
		return err
	}
	for _, s := range states {
		sayReach(e, s)
	}
	return nil
}

// sayReach tells what matters of a cluster.
func sayReach(e *env, s reached) {
	const form = "2006-01-02 15:04:05Z"
	ws := s.Windows()
	switch n := len(ws); {
	case s.System == "":
		e.say("%s: there is no repository in %s yet: oneo backup physical setup", s.Cluster, s.Where)
		return
	case n == 0:
		e.say("%s: no moment can be had back yet: oneo backup physical create", s.Cluster)
	default:
		e.say("%s: moments from %s to %s can be had back", s.Cluster, ws[0].From.UTC().Format(form), ws[n-1].Until.UTC().Format(form))
	}
	for i := range ws[:max(0, len(ws)-1)] {
		e.say("%s: but none from %s to %s: WAL is missing", s.Cluster, ws[i].Until.UTC().Format(form), ws[i+1].From.UTC().Format(form))
	}
	if last := s.Archived(); !last.Until.IsZero() {
		e.say("%s: the last WAL was archived %s ago: what was committed since would be lost with the cluster", s.Cluster, short(max(0, s.At.Sub(last.Until))))
	}
	if s.proof != nil {
		e.say("%s: a recovery was proved last on %s", s.Cluster, s.proof.ProvedAt.UTC().Format(form))
	}
	switch r := s.Archiver; {
	case r == nil:
		e.say("%s: the cluster does not answer", s.Cluster)
	case !r.On:
		e.say("%s: no WAL is archived: oneo backup physical setup", s.Cluster)
	case r.Failing():
		e.say("%s: archiving fails since %s (WAL %s): PostgreSQL's log says why", s.Cluster, r.FailedAt.UTC().Format(form), *r.FailedWAL)
	}
}

type physicalVerifyOptions struct {
	label, group, progress string
	all                    bool
}

func newPhysicalVerifyCmd(e *env) *cobra.Command {
	var o physicalVerifyOptions
	cmd := &cobra.Command{
		Use: "verify [LABEL|latest]", Short: "Prove that physical backups are whole",
		Long: `Read physical backups and the WAL behind them again, and compare them with their checksums. That they can be recovered is
proved by recovering: ` + "`oneo sql -t TENANT --at TIME`" + ` and ` + "`oneo restore --at TIME --diff`" + ` do that and change nothing.

The exit code is 14 when a backup is not what was written.`,
		Example: "  oneo backup physical verify latest\n  oneo backup physical verify 20261126T034512Z\n  oneo backup physical verify --all -q", Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.label = args[0]
			}
			return physicalVerify(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.all, "all", false, "all physical backups that there are")
	f.StringVar(&o.group, "group", "", "only those of the cluster of this database `GROUP`")
	f.StringVar(&o.progress, "progress", "auto", "auto, json or none")
	return cmd
}

var physicalVerified = append(physicalColumns[:len(physicalColumns):len(physicalColumns)], physicalResult...)

func physicalVerify(ctx context.Context, e *env, o physicalVerifyOptions) error {
	if o.all == (o.label != "") {
		return errUsage{fault.New(fault.Invalid, "say which physical backups are to be verified").WithCode("no_selector").WithHint("give the label of one, latest, or --all")}
	}
	a, clusters, err := e.clusters(o.group)
	if err != nil {
		return err
	}
	rows := []physicalRow{}
	var at []app.Cluster
	for _, k := range clusters {
		info, err := k.Engine.Info(ctx)
		if err != nil {
			return err
		}
		backups := info.Backups
		switch {
		case o.label == "latest" && len(backups) > 0:
			backups = []physical.Backup{slices.MaxFunc(backups, func(a, b physical.Backup) int { return a.Stop.Compare(b.Stop) })}
		case !o.all:
			backups = slices.DeleteFunc(slices.Clone(backups), func(b physical.Backup) bool { return b.Label != o.label })
		}
		for _, b := range backups {
			rows, at = append(rows, physicalRow{cluster: k.Name, Backup: b}), append(at, k)
		}
	}
	if len(rows) == 0 && !o.all {
		what := "physical backup " + o.label
		if o.label == "latest" {
			what = "physical backup yet"
		}
		return fault.New(fault.NotFound, "there is no %s", what).WithCode("backup_not_found").WithHint("oneo backup physical list")
	}
	err = eachPhysical(ctx, e, o.progress, rows, func(i int, r *physicalRow, report func(physical.Progress)) error {
		return a.VerifyPhysical(ctx, at[i], r.Label, report)
	})
	if err != nil {
		return err
	}
	if err := show(e, rows, physicalVerified); err != nil {
		return err
	}
	return physicalEnd(e, rows)
}

type physicalPruneOptions struct {
	keepOptions
	group  string
	dryRun bool
}

func newPhysicalPruneCmd(e *env) *cobra.Command {
	var o physicalPruneOptions
	cmd := &cobra.Command{
		Use: "prune", Short: "Take old physical backups away, and the WAL that no other one needs",
		Long: `Take away the physical backups that no rule keeps, cluster by cluster, and the WAL from before the oldest that stays:
moments before its end can then no longer be had back. The rules are those of ` + "`oneo backup prune`" + `.

Whatever the rules say, these stay: the newest from which a moment can be had back, as many as
backup.keep_min; those that others are worth nothing without; one that a recovery on this machine is reading; and what cannot be read.`,
		Example: "  oneo backup physical prune --keep-daily 7 --keep-weekly 5 --dry-run\n  oneo backup physical prune --keep-last 2 --yes",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return physicalPrune(cmd.Context(), e, o) },
	}
	o.bind(cmd)
	f := cmd.Flags()
	f.StringVar(&o.group, "group", "", "only those of the cluster of this database `GROUP`")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would go and why the others stay, and do nothing")
	return cmd
}

var physicalVerdicts = []column[app.PhysicalVerdict]{
	{"LABEL", "label", func(v app.PhysicalVerdict) any { return v.Label }},
	{"CLUSTER", "cluster", func(v app.PhysicalVerdict) any { return v.Cluster }},
	{"KIND", "kind", func(v app.PhysicalVerdict) any { return string(v.Kind) }},
	{"FINISHED", "finished_at", func(v app.PhysicalVerdict) any { return unlessZero(v.Stop) }},
	{"STORED", "stored_bytes", func(v app.PhysicalVerdict) any { return bytesOf(v.Stored) }},
	{"STAYS", "stays", func(v app.PhysicalVerdict) any { return v.Keep }},
	{"FOR", "for", func(v app.PhysicalVerdict) any { return v.Why }},
}

func physicalPrune(ctx context.Context, e *env, o physicalPruneOptions) error {
	p, err := o.read()
	if err != nil {
		return err
	}
	if p.IsZero() {
		return errNoPolicy
	}
	a, clusters, err := e.clusters(o.group)
	if err != nil {
		return err
	}
	all := []app.PhysicalVerdict{}
	n, bytes := 0, int64(0)
	for _, k := range clusters {
		vs, err := a.PlanPhysicalPrune(ctx, k, p)
		if err != nil {
			return err
		}
		for _, v := range vs {
			if !v.Keep {
				n, bytes = n+1, bytes+v.Stored
			} else if v.Bad != "" {
				e.say("left alone: %s of %s: %s", v.Label, v.Cluster, v.Bad)
			}
		}
		all = append(all, vs...)
	}
	what := fmt.Sprintf("take away %d of %d physical backup(s), %s, and the WAL that only they need", n, len(all), size(bytes))
	if o.dryRun {
		e.say("would %s; nothing was done", what)
		return show(e, all, physicalVerdicts)
	}
	gone := []app.PhysicalVerdict{}
	if n > 0 {
		if err := e.confirm(ctx, what+", for good"); err != nil {
			return err
		}
		var errs []error
		for _, k := range clusters {
			of, err := a.PrunePhysical(ctx, k, p)
			gone, errs = append(gone, of...), append(errs, err)
		}
		err = errors.Join(errs...)
	}
	e.say("took away %d of %d physical backup(s)", len(gone), len(all))
	return errors.Join(err, show(e, gone, physicalVerdicts))
}
