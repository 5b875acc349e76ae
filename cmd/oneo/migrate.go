package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// The kinds of runs of migrations.
const (
	kindMigrate  = app.KindMigrate
	kindRehearse = rollout.Prefix + "rehearse"
)

type migrateOptions struct {
	shared    bool
	dryRun    bool
	rehearse  bool
	undoPoint bool
	force     bool
	to        int
	selector  selector
	fleetOptions
}

func newMigrateCmd(e *env) *cobra.Command {
	var o migrateOptions
	cmd := &cobra.Command{
		Use: "migrate", Short: "Bring the shared schema and tenants to the newest version",
		Long: `Apply what is missing: with --shared to the shared schema, with --tenant to some tenants, with
--all-tenants to the shared schema first and then to every tenant, the largest ones first.

The run is stored: when it is interrupted or killed, the same command or ` + "`oneo migrate run resume`" + `, on
any machine, goes on with it, and several processes may work on it at once. Each tenant's
migrations are one transaction together with their ledger rows: a tenant that fails is at its old
version, the others go on, and the exit code is 3. A tenant that is busy is tried again later. When
nothing is pending, that is one query.

With --undo-point each tenant's rows are kept of the tables that its migrations change, so that
` + "`oneo undo`" + ` can take the run back.`,
		Example: `  oneo migrate --shared
  oneo migrate --all-tenants --canary 5 --wave 10% --pause 30s
  oneo migrate --all-tenants --dry-run
  oneo migrate --all-tenants --undo-point
  oneo migrate -t acme -t 'beta-*' --rehearse`,
		Args: known,
		RunE: func(cmd *cobra.Command, _ []string) error { return runMigrate(cmd.Context(), e, o) },
	}
	o.selector.bind(cmd, e)
	o.fleetOptions.bind(cmd)
	cmd.Flags().BoolVar(&o.shared, "shared", false, "the shared schema only")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what would be done, and do nothing")
	cmd.Flags().BoolVar(&o.rehearse, "rehearse", false, "run each tenant's migrations and roll them back")
	cmd.Flags().IntVar(&o.to, "to", 0, "up to this `VERSION` only; 0: the newest")
	cmd.Flags().BoolVar(&o.force, "force", false, "do not ask the linter first: run also what it finds fault with")
	cmd.Flags().BoolVar(&o.undoPoint, "undo-point", false, "keep what is changed of each tenant, for `oneo undo`")
	cmd.AddCommand(newMigrateStatusCmd(e), newRunCmd(e), newDownCmd(e), newMarkCmd(e))
	cmd.AddCommand(newMigrateLintCmd(e), newMigrateNewCmd(e))
	cmd.AddCommand(newMigrateDriftCmd(e))
	return cmd
}

// migrateRequest is what a process that resumes a run of migrations must know. Two runs are the same when it is.
type migrateRequest struct {
	Target    int           `json:"target"`
	Rehearse  bool          `json:"rehearse,omitempty"`
	UndoPoint bool          `json:"undo_point,omitempty"`
	Timeout   time.Duration `json:"timeout_ns,omitempty"`
	All       bool          `json:"all_tenants,omitempty"`
	Tenants   []string      `json:"tenants,omitempty"`
	Exclude   []string      `json:"exclude,omitempty"`
	States    []string      `json:"states,omitempty"`
	Group     string        `json:"group,omitempty"`
}

// migrateWork brings a tenant to the version that the run was planned for.
func migrateWork(_ *env, a *app.App, request json.RawMessage) (runWork, error) {
	var r migrateRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	if head := a.Migrate.Head(migrate.TenantSet); r.Target > head {
		return runWork{}, fault.New(fault.Conflict, "the run is to reach version %d; this oneo knows %d", r.Target, head).
			WithCode("older_binary").WithHint("use the oneo, or the folder of migrations, that began it")
	}
	servers := &teller{a: a}
	w := runWork{timeout: r.Timeout, left: servers.rest, changes: !r.Rehearse}
	if r.UndoPoint {
		w.parting = func(run rollout.Run) string { return fmt.Sprintf("to take it back: oneo undo %s", run.ID) }
	}
	w.do = func(ctx context.Context, task rollout.Task) rollout.Outcome {
		t, err := taskTenant(task)
		if err != nil {
			return rollout.Outcome{Err: err}
		}
		o := migrate.TenantOptions{Target: r.Target, Rehearse: r.Rehearse, Untold: true}
		if r.UndoPoint {
			if err := a.Snapshots.Keepable(task.From, r.Target); err != nil { // the files may have come since the run was planned
				return rollout.Outcome{Err: err}
			}
			o.Keeper = a.Snapshots.Keeper(task.Run, t)
		}
		res, err := a.Migrate.Tenant(ctx, t, o)
		if len(res.Applied) > 0 && !r.Rehearse {
			servers.changed(ctx, t.Group)
		}
		out := rollout.Outcome{Status: fleet.OK, From: res.From, To: res.To, Err: err}
		switch {
		case err != nil:
			out.Status = fleet.Failed
		case len(res.Applied) == 0 && task.Attempts > 1 && task.From < res.To:
			out.From = task.From // an earlier attempt did it, and its process died before it could say so
		case len(res.Applied) == 0:
			out.Status = fleet.Skipped
		}
		return out
	}
	return w, nil
}

// errorObject is an error inside a report.
func errorObject(err error) any {
	if err == nil {
		return nil
	}
	f := fault.Of(err)
	message := f.Message
	if f.Kind == fault.Internal {
		message = err.Error()
	}
	return reportedError{Code: f.StableCode(), SQLState: postgres.SQLState(err), Message: message, Hint: f.Hint}
}

type reportedError struct {
	Code     string `json:"code"`
	SQLState string `json:"sqlstate,omitempty"`
	Message  string `json:"message"`
	Hint     string `json:"hint,omitempty"`
}

func (r reportedError) String() string { return r.Message }

func runMigrate(ctx context.Context, e *env, o migrateOptions) error {
	kind := kindMigrate
	if o.rehearse {
		kind = kindRehearse
	}
	spec, err := o.spec(rollout.Spec{Kind: kind, Actor: e.actor(), Alone: true, Rivals: rivals(kind)})
	if err != nil {
		return err
	}
	if o.shared && (o.selector.all || len(o.selector.names) > 0) {
		return errUsage{fault.New(fault.Invalid, "--shared goes with no tenants").WithHint("--all-tenants migrates the shared schema first")}
	}
	if o.to < 0 || o.to > 0 && o.shared {
		return errUsage{fault.New(fault.Invalid, "--to is a version of the tenants' migrations, above 0")}
	}
	if o.shared && o.rehearse {
		return errUsage{fault.New(fault.Invalid, "--rehearse is for tenants; the shared schema cannot be rehearsed")}
	}
	if o.undoPoint && (o.shared || o.rehearse) {
		return errUsage{fault.New(fault.Invalid, "--undo-point is for tenants that are migrated: the shared schema cannot be taken back, and a rehearsal leaves nothing to take back")}
	}
	if !o.shared {
		if _, err := o.selector.filter(); err != nil {
			var f *fault.Fault
			if errors.As(err, &f) && f.Code == "no_selector" {
				return errUsage{f.WithHint("add --shared, --tenant NAME (repeatable, globs, @file) or --all-tenants")}
			}
			return err
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if head := a.Migrate.Head(migrate.TenantSet); o.to > head {
		return errUsage{fault.New(fault.Invalid, "there is no version %d: the tenant migrations go from 1 to %d", o.to, head).WithCode("target_out_of_range")}
	}
	var rows []reported
	switch pending := a.Migrate.SharedBehind(ctx); {
	case pending != nil && !fault.Is(pending, fault.Pending):
		return pending
	case o.dryRun || o.rehearse || !o.shared && !o.selector.all:
		if pending != nil && !o.dryRun {
			return pending
		}
		if pending != nil {
			e.say("%s: it would be migrated first, and tenants are counted after that", fault.Of(pending).Message)
			return show(e, []planned{}, plannedColumns)
		}
		if o.shared {
			e.say("nothing to do: the shared schema is at its head")
			return show(e, []planned{}, plannedColumns)
		}
	default:
		res, err := a.MigrateShared(ctx)
		if err != nil {
			return err
		}
		row := reported{tenant: "(shared)", status: string(fleet.Skipped), from: res.From, to: res.To, duration: res.Duration}
		if len(res.Applied) > 0 {
			row.status = string(fleet.OK)
			e.say("shared schema: applied %s", names(res.Applied))
		}
		rows = append(rows, row)
		if o.shared {
			if row.status == string(fleet.Skipped) {
				e.say("nothing to do: the shared schema is at version %d", row.to)
			}
			return show(e, rows, reportColumns)
		}
	}
	err = migrateTenants(ctx, e, a, o, spec, rows)
	if o.selector.all && !o.dryRun && !o.rehearse && a.Config.Provisioning.PoolSize > 0 && ctx.Err() == nil {
		if kerr := a.Provision.KeepSpares(ctx); kerr != nil {
			e.say("spare schemas were not all brought up, `oneo serve` will: %s", fault.Of(kerr).Message)
		}
	}
	return err
}

// migrateTenants plans the run over the tenants that lack migrations, and works on it.
func migrateTenants(ctx context.Context, e *env, a *app.App, o migrateOptions, spec rollout.Spec, rows []reported) error {
	ts, passed, late, err := behind(ctx, a, o.selector)
	if err != nil {
		return err
	}
	for _, t := range passed {
		why := fault.New(fault.Conflict, "it is %s", t.State).WithCode("wrong_state")
		if t.State == tenant.Dropped {
			why = why.WithHint("oneo tenant undrop %s", t.Slug)
		}
		e.say("skipped %s: it is %s", t.Slug, t.State)
		rows = append(rows, reported{tenant: t.Slug.String(), status: string(fleet.Skipped), err: errorObject(why)})
	}
	head := a.Migrate.Head(migrate.TenantSet)
	if o.to > 0 {
		head = o.to
		ts = slices.DeleteFunc(ts, func(t tenant.Tenant) bool { return late[t.Number] >= head })
	}
	if len(ts) == 0 {
		which := "every"
		if len(passed) > 0 {
			which = "every other"
		}
		further := ""
		if o.to > 0 {
			further = " or further"
		}
		e.say("nothing to do: %s selected tenant is at version %d%s", which, head, further)
		switch {
		case o.dryRun:
			return show(e, []planned{}, plannedColumns)
		case e.output == "table":
			return nil
		}
		return show(e, rows, reportColumns)
	}
	least := head
	for _, t := range ts {
		spec.Items = append(spec.Items, rollout.Item{Tenant: t, From: late[t.Number], To: head})
		least = min(least, late[t.Number])
	}
	if o.rehearse {
		if err := rehearsable(a.Migrate.Files(migrate.TenantSet)[least:head]); err != nil {
			return err
		}
	}
	if o.undoPoint {
		for _, from := range versionsFrom(spec.Items) {
			if err := a.Snapshots.Keepable(from, head); err != nil {
				return err
			}
		}
	}
	if err := a.Rollout.LargestFirst(ctx, spec.Items); err != nil {
		return err
	}
	if !o.force {
		if err := lintedBefore(ctx, e, a, o.dryRun || o.rehearse); err != nil {
			return err
		}
	}
	if o.dryRun {
		return showPlan(e, a, spec)
	}
	if _, err := a.Snapshots.Expire(ctx); err != nil { // `oneo serve` does it too
		e.say("undo points that have expired: %s", fault.Of(err).Message)
	}
	s := o.selector
	spec.Request = migrateRequest{
		Target: head, Rehearse: o.rehearse, UndoPoint: o.undoPoint, Timeout: o.timeout,
		All: s.all, Tenants: s.names, Exclude: s.exclude, States: s.states, Group: s.group,
	}
	return planAndWork(ctx, e, a, spec, o.workOptions, rows)
}

// rehearsable refuses steps that cannot be rolled back with the rest.
func rehearsable(files []migrate.File) error {
	for _, f := range files {
		if f.Kind == migrate.NoTransaction || f.Kind == migrate.Data {
			return fault.New(fault.Invalid, "migration %s cannot be rehearsed: it is not one transaction", f).WithCode("not_transactional").
				WithHint("rehearse the versions before it: --to %d", f.Version-1)
		}
	}
	return nil
}

// lintedBefore tells what the linter finds in migrations that no tenant has yet. An error of it ends the run before it
// begins, unless that is to be passed over.
func lintedBefore(ctx context.Context, e *env, a *app.App, pass bool) error {
	findings, err := lintPending(ctx, e, a)
	if err != nil {
		return err
	}
	errs := 0
	for _, f := range findings {
		e.say("%s: %s:%d: %s (%s)", f.Severity, f.File, f.Line, f.Message, f.Rule)
		if f.Severity == lint.Error {
			errs++
		}
	}
	if errs == 0 || pass {
		return nil
	}
	return fault.New(fault.Unfit, "%d thing(s) in the migrations would do harm; nothing was done", errs).WithCode("lint_errors").
		WithHint("`oneo migrate lint` says how to write them instead; --force runs them all the same")
}

// versionsFrom are the versions from which tenants of a run begin.
func versionsFrom(items []rollout.Item) []int {
	var all []int
	for _, it := range items {
		if !slices.Contains(all, it.From) {
			all = append(all, it.From)
		}
	}
	return all
}

// planned is one tenant's line of a plan.
type planned struct {
	rollout.Item
	wave  int
	files []migrate.File
}

var plannedColumns = []column[planned]{
	{"TENANT", "tenant", func(p planned) any { return p.Tenant.Slug.String() }},
	{"WAVE", "wave", func(p planned) any { return p.wave + 1 }},
	{"FROM", "from", func(p planned) any { return p.From }},
	{"TO", "to", func(p planned) any { return p.To }},
	{"MIGRATIONS", "migrations", func(p planned) any {
		all := make([]string, len(p.files))
		for i, f := range p.files {
			all[i] = f.String()
		}
		return all
	}},
}

// between are the files that lead from one version to another, in the order in which they run.
func between(files []migrate.File, from, to int) []migrate.File {
	from, to = min(from, len(files)), min(to, len(files))
	if from <= to {
		return files[from:to]
	}
	back := slices.Clone(files[to:from])
	slices.Reverse(back)
	return back
}

// showPlan shows what a run would do: in a table of many tenants, how many of each wave and version.
func showPlan(e *env, a *app.App, spec rollout.Spec) error {
	files := a.Migrate.Files(migrate.TenantSet)
	waves := spec.Waves()
	rows := make([]planned, len(spec.Items))
	for i, it := range spec.Items {
		rows[i] = planned{Item: it, wave: waves[i], files: between(files, it.From, it.To)}
	}
	slices.SortStableFunc(rows, func(a, b planned) int { return a.wave - b.wave })
	e.say("%d tenants in %d wave(s); nothing was done", len(rows), slices.Max(waves)+1)
	if e.output == "table" && len(rows) > fewTenants && !e.verbose {
		e.say("the first %d; -v or -o json shows all", fewTenants)
		rows = rows[:fewTenants]
	}
	return show(e, rows, plannedColumns)
}

// behind lists the selected tenants that lack migrations, and all versions that lack some: one query for each group, and
// another for the names only if there are any. passed are those that were named and are in a state that is not selected.
func behind(ctx context.Context, a *app.App, s selector) (selected, passed []tenant.Tenant, late map[int32]int, err error) {
	f, err := s.filter()
	if err != nil {
		return nil, nil, nil, err
	}
	if late, err = lacking(ctx, a); err != nil {
		return nil, nil, nil, err
	}
	if len(late) == 0 && len(f.Names) == 0 && len(f.Exclude) == 0 && f.Group == "" {
		return nil, nil, late, nil
	}
	s.behind = false // they are told apart here
	states := f.States
	f.States = nil
	all, err := s.list(ctx, a, f)
	for _, t := range all {
		_, lacks := late[t.Number]
		switch {
		case !slices.Contains(states, t.State):
			if slices.Contains(f.Names, t.Slug.String()) {
				passed = append(passed, t)
			}
		case lacks:
			selected = append(selected, t)
		}
	}
	return selected, passed, late, err
}

// lacking finds who lacks migrations, and at which version, in one query for each group.
func lacking(ctx context.Context, a *app.App) (map[int32]int, error) {
	late := map[int32]int{}
	for _, group := range a.DB.Groups() {
		bs, err := a.Migrate.TenantsBehind(ctx, group)
		if err != nil {
			return nil, err
		}
		for _, b := range bs {
			late[b.Number] = b.Version
		}
	}
	return late, nil
}

func names(files []migrate.File) string {
	all := make([]string, len(files))
	for i, f := range files {
		all[i] = f.String()
	}
	return strings.Join(all, ", ")
}

func newMigrateStatusCmd(e *env) *cobra.Command {
	var o statusOptions
	cmd := &cobra.Command{
		Use: "status", Short: "Show which versions the tenants are at",
		Long: `Group the fleet without opening a tenant: current, behind (by how much), failed (by cause: what their
last run said), missing (the schema was dropped, or dropped and made again, behind oneo's back). That is
what the ledger says: each schema is "unchecked". With --drift every schema is compared with what the
migrations make, as by ` + "`oneo migrate drift`" + `, and tenants that differ are drifted, by their
differences; 1,000 tenants take about two seconds more.

Each tenant counts once. One that has failed and has drifted is failed, with the schema "drifted".

With --check the exit code is 13 when anything is pending, failed, missing or, with --drift, drifted. It
is 3 when a schema was to be compared and could not be read.`,
		Example: "  oneo migrate status\n  oneo migrate status --check -o json\n  oneo migrate status --drift --check", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return migrateStatus(cmd.Context(), e, o) },
	}
	cmd.Flags().BoolVar(&o.check, "check", false, "exit 13 when anything is pending, failed, missing or, with --drift, drifted")
	cmd.Flags().BoolVar(&o.drift, "drift", false, "compare every schema with what the migrations make")
	return cmd
}

type statusOptions struct{ check, drift bool }

// statusRow is one group of tenants that stand alike.
type statusRow struct {
	status, group string
	version, head int
	schema        string
	tenants       int
	cause         any
	names         []string // of those that ask for attention, up to five
}

// unchecked is a schema that nobody has looked at: its tenant's version is what the ledger says.
const unchecked = "unchecked"

var statusColumns = []column[statusRow]{
	{"STATUS", "status", func(s statusRow) any { return s.status }},
	{"VERSION", "version", func(s statusRow) any { return s.version }},
	{"BEHIND", "behind", func(s statusRow) any { return max(0, s.head-s.version) }},
	{"TENANTS", "tenants", func(s statusRow) any { return s.tenants }},
	{"SCHEMA", "schema", func(s statusRow) any { return s.schema }},
	{"GROUP", "group", func(s statusRow) any { return s.group }},
	{"NAMES", "names", func(s statusRow) any { return s.names }},
	{"CAUSE", "cause", func(s statusRow) any { return s.cause }},
}

func migrateStatus(ctx context.Context, e *env, o statusOptions) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	pending := a.Migrate.SharedBehind(ctx)
	if pending != nil && !fault.Is(pending, fault.Pending) {
		return pending
	}
	var fl fleetStatus
	if pending != nil {
		e.say("%s", fault.Of(pending).Message)
	} else {
		concludeRuns(ctx, e, a)
		if fl, err = readFleet(ctx, a, o.drift); err != nil {
			return err
		}
		pending = fl.pending()
	}
	if err := show(e, fl.rows, statusColumns); err != nil {
		return err
	}
	switch {
	case o.check && pending != nil:
		return pending
	case pending != nil && len(fl.rows) > 0:
		e.say("%s", fault.Of(pending).Message)
	}
	if fl.unread > 0 {
		e.say("%d schema(s) could not be read: run the same command again", fl.unread)
		return errExit{exitSomeFailed}
	}
	if len(fl.rows) > 0 && !o.drift {
		e.say("versions are what the ledger says; --drift compares the schemas with it")
	}
	return nil
}

// fleetStatus is where the fleet stands.
type fleetStatus struct {
	rows                            []statusRow
	behind, failed, drifted, unread int // tenants; those that have failed may have drifted as well
	missing                         int
	lost                            []string // names of the missing, up to five
}

// pending says what is to be done, if anything is.
func (f fleetStatus) pending() error {
	switch {
	case f.missing > 0:
		return fault.New(fault.Pending, "the schema of %d tenant(s) is gone or was made again behind oneo's back: %s", f.missing, strings.Join(f.lost, ", ")).
			WithCode("schema_missing").WithHint("restore them from a backup; nothing was changed")
	case f.drifted > 0:
		return fault.New(fault.Pending, "%d tenant(s) have drifted, %d have failed and %d are behind", f.drifted, f.failed, f.behind).WithCode("drifted").
			WithHint("oneo migrate drift --all-tenants --repair-plan says what would bring them back")
	case f.failed > 0:
		return fault.New(fault.Pending, "%d tenant(s) have failed and %d are behind", f.failed, f.behind).WithCode("tenants_failed").
			WithHint("mend the cause, then oneo migrate --all-tenants")
	case f.behind > 0:
		return fault.New(fault.Pending, "%d tenant(s) are behind", f.behind).WithCode("tenants_behind").WithHint("oneo migrate --all-tenants")
	}
	return nil
}

// statusKey is what the tenants of a row have in common.
type statusKey struct {
	status, group string
	version       int
	schema, cause string
}

// add counts tenants; name is one of them, or empty where names say nothing.
func (f *fleetStatus) add(at map[statusKey]int, k statusKey, head, tenants int, cause any, name string) {
	i, known := at[k]
	if !known {
		i = len(f.rows)
		at[k] = i
		f.rows = append(f.rows, statusRow{status: k.status, group: k.group, version: k.version, head: head, schema: k.schema, cause: cause})
	}
	row := &f.rows[i]
	row.tenants += tenants
	if name != "" && len(row.names) < someNames {
		row.names = append(row.names, name)
	}
	switch k.status {
	case "behind":
		f.behind += tenants
	case "failed":
		f.failed += tenants
	}
	switch k.schema {
	case string(structure.Drifted):
		f.drifted += tenants
	case string(structure.Unread):
		f.unread += tenants
	}
}

// someNames is how many tenants a row names.
const someNames = 5

// statuses are in the order in which they are told.
var statuses = []string{"current", "behind", "failed", "drifted", "missing"}

// readFleet groups the fleet: each tenant by what the ledger says, or compared where it is asked for.
func readFleet(ctx context.Context, a *app.App, compare bool) (f fleetStatus, err error) {
	st, err := a.Migrate.Status(ctx)
	if err != nil {
		return f, err
	}
	failures, err := a.Rollout.Failures(ctx, kindMigrate)
	if err != nil {
		return f, err
	}
	late := map[string]map[int32]int{}
	for _, group := range a.DB.Groups() {
		bs, err := a.Migrate.TenantsBehind(ctx, group)
		if err != nil {
			return f, err
		}
		late[group] = map[int32]int{}
		for _, b := range bs {
			late[group][b.Number] = b.Version
		}
	}
	failed := map[int32]rollout.Failure{}
	for _, fail := range failures {
		failed[fail.Number] = fail
	}
	gone := map[int32]bool{}
	for _, number := range st.Missing {
		gone[number] = true
	}
	at := map[statusKey]int{}
	standing := func(group string, version int) statusKey {
		status := "current"
		if version < st.Head {
			status = "behind"
		}
		return statusKey{status: status, group: group, version: version, schema: unchecked}
	}
	asFailed := func(group string, version int, schema string, fail rollout.Failure) {
		k := statusKey{status: "failed", group: group, version: version, schema: schema, cause: fail.Cause.SQLState + fail.Cause.Message}
		f.add(at, k, st.Head, 1, reportedError(fail.Cause), fail.Slug)
	}
	if compare {
		groups, err := driftOfAll(ctx, a)
		if err != nil {
			return f, err
		}
		for _, g := range groups {
			for _, t := range g.Tenants {
				fail, has := failed[t.Number]
				version, lacks := late[g.Database][t.Number]
				switch {
				case g.State == structure.Missing:
					if !gone[t.Number] { // since the status was read
						gone[t.Number] = true
						st.Missing = append(st.Missing, t.Number)
					}
				case gone[t.Number]:
				case has && lacks && fail.Holds(version):
					asFailed(g.Database, g.Version, string(g.State), fail)
				case g.State == structure.Drifted:
					k := statusKey{status: "drifted", group: g.Database, version: g.Version, schema: string(g.State), cause: fmt.Sprint(g.Differences)}
					f.add(at, k, st.Head, 1, append(differences{}, g.Differences...), t.Slug.String())
				default:
					k := standing(g.Database, g.Version)
					k.schema = string(g.State)
					f.add(at, k, st.Head, 1, nil, "")
				}
			}
		}
	} else {
		taken := map[statusKey]int{} // how many of a group and version are told otherwise
		for group, versions := range late {
			for _, fail := range failures { // by their names
				if version, lacks := versions[fail.Number]; lacks && fail.Holds(version) && !gone[fail.Number] {
					asFailed(group, version, unchecked, fail)
					taken[standing(group, version)]++
				}
			}
			if len(gone) == 0 {
				continue
			}
			lost, err := a.Migrate.Versions(ctx, group, st.Missing)
			if err != nil {
				return f, err
			}
			for _, version := range lost {
				taken[standing(group, version)]++
			}
		}
		for _, v := range st.Versions {
			k := standing(v.Group, v.Version)
			if n := v.Tenants - taken[k]; n > 0 {
				f.add(at, k, st.Head, n, nil, "")
			}
		}
	}
	if f.missing = len(st.Missing); f.missing > 0 {
		if f.lost, err = namesOf(ctx, a, st.Missing); err != nil {
			return f, err
		}
		f.rows = append(f.rows, statusRow{status: "missing", tenants: f.missing, schema: string(structure.Missing), names: f.lost})
	}
	slices.SortStableFunc(f.rows, func(a, b statusRow) int {
		return cmp.Or(cmp.Compare(slices.Index(statuses, a.status), slices.Index(statuses, b.status)), cmp.Compare(b.version, a.version),
			cmp.Compare(a.group, b.group), cmp.Compare(a.schema, b.schema), cmp.Compare(b.tenants, a.tenants), cmp.Compare(fmt.Sprint(a.cause), fmt.Sprint(b.cause)))
	})
	for _, row := range f.rows {
		if row.status != "missing" {
			slices.Sort(row.names)
		}
	}
	return f, nil
}

// driftOfAll compares every tenant that is not dropped with what the migrations make.
func driftOfAll(ctx context.Context, a *app.App) ([]structure.Group, error) {
	all := selector{all: true}
	ts, err := all.tenants(ctx, a)
	if err != nil {
		return nil, err
	}
	return drift(ctx, a, ts)
}

// namesOf are the names of the first five tenants, and how many more there are.
func namesOf(ctx context.Context, a *app.App, numbers []int32) ([]string, error) {
	const most = someNames
	var all []string
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ts, err := registry.ByNumbers(ctx, tx, numbers[:min(most, len(numbers))])
		for _, t := range ts {
			all = append(all, t.Slug.String())
		}
		return err
	})
	if len(numbers) > most {
		all = append(all, fmt.Sprintf("and %d more", len(numbers)-most))
	}
	return all, err
}
