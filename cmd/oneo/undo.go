package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/snapshot"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const kindUndo = rollout.Prefix + "undo"

func init() {
	runKinds[kindUndo] = undoWork
}

type undoOptions struct {
	dryRun   bool
	selector selector
	fleetOptions
}

func newUndoCmd(e *env) *cobra.Command {
	o := undoOptions{}
	cmd := &cobra.Command{
		Use: "undo RUN|OPERATION", Short: "Take back a run of migrations that kept undo points, or a restore",
		Long: `Put the tenants of a run of ` + "`oneo migrate --undo-point`" + ` back to the version that they had before it, or those
that --tenant names. Tables whose rows, columns or rules the run had changed get the rows that they
had then; all others keep today's. What was written to the former since is lost to the tenant, and
lies aside until the undo point expires (migrate.undo_keep): how many rows that are is told, and it
asks before. When one of the tenants cannot be taken back, nothing is done and it says why.

While what was put back is joined to the tenant's other tables, a second or two for a million rows,
its users are answered 503 with Retry-After. RUN is a run's id, the end of it, or "last".

OPERATION is that of ` + "`oneo restore`" + `, or the end of it: what the restore had replaced takes its place again, and what
it had brought, with all that was written since, lies aside in turn.`,
		Example: "  oneo undo last\n  oneo undo 018f3c2e-7a10-7c44-9d5e-0a1b2c3d4e5f -t acme --dry-run",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE:    func(cmd *cobra.Command, args []string) error { return runUndo(cmd.Context(), e, args[0], o) },
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.selector.names, "tenant", "t", nil, "tenant `NAME`, glob or @FILE with a name a line; repeatable; none: all of the run")
	f.StringArrayVar(&o.selector.exclude, "exclude", nil, "not this `NAME` or glob; wins over --tenant; repeatable")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	o.fleetOptions.bind(cmd)
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would be done and lost, and do nothing")
	return cmd
}

// undoRequest is what a process must know that resumes the undoing of a run.
type undoRequest struct {
	Run     uuid.UUID     `json:"run"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
	Tenants []string      `json:"tenants,omitempty"`
	Exclude []string      `json:"exclude,omitempty"`
}

func undoWork(_ *env, a *app.App, request json.RawMessage) (runWork, error) {
	var r undoRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	return runWork{timeout: r.Timeout, changes: true, do: aimed(func(ctx context.Context, t tenant.Tenant, _ rollout.Task) (migrate.Result, error) {
		res, err := a.Snapshots.Undo(ctx, t, r.Run)
		if err != nil {
			return res, err
		}
		// Rows have changed that caches may hold. An attempt that died after its commit has not come as far as this.
		return res, flushTenant(ctx, a, t)
	})}, nil
}

// undoable is one tenant of a run that may be taken back.
type undoable struct {
	tenant  tenant.Tenant
	task    rollout.Reported
	point   snapshot.Point
	loss    snapshot.Loss
	err     error  // why it cannot be
	skipped string // why it need not be
}

var undoColumns = []column[undoable]{
	{"TENANT", "tenant", func(u undoable) any { return u.tenant.Slug.String() }},
	{"FROM", "from", func(u undoable) any { return u.point.To }},
	{"TO", "to", func(u undoable) any { return u.point.From }},
	{"PUT BACK", "tables", func(u undoable) any { return u.point.Tables }},
	{"ROWS SINCE", "rows_since", func(u undoable) any { return u.loss.Rows }},
	{"GOES", "made", func(u undoable) any { return u.loss.Made }},
	{"EXPIRES", "expires_at", func(u undoable) any { return u.point.ExpiresAt }},
}

func runUndo(ctx context.Context, e *env, name string, o undoOptions) error {
	spec, err := o.spec(rollout.Spec{Kind: kindUndo, Actor: e.actor(), Alone: true, Rivals: rivals(kindUndo)})
	if err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	run, err := a.Rollout.Find(ctx, name)
	if fault.Is(err, fault.NotFound) {
		if op, rerr := a.Provision.RestoreOf(ctx, name); !fault.Is(rerr, fault.NotFound) {
			return returnRestore(ctx, e, a, op, rerr, o)
		}
	}
	if err != nil {
		return err
	}
	if err := mayUndo(run); err != nil {
		return elsewhere(ctx, a, err)
	}
	all, err := undoables(ctx, a, run, o.selector)
	if err != nil {
		return err
	}
	fleet.Run(ctx, all, fleet.Options{Jobs: max(1, min(o.jobs, a.Config.Database.OwnerConns-1))}, func(u *undoable) string { return u.task.Slug },
		func(ctx context.Context, u *undoable) fleet.Outcome {
			if u.err == nil && u.skipped == "" {
				u.loss, u.err = a.Snapshots.Check(ctx, u.tenant, run.ID)
			}
			return fleet.Outcome{}
		})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	var rows, refused []reported
	var ready []undoable
	var first error
	for _, u := range all {
		r := reported{tenant: u.task.Slug, status: string(fleet.Skipped), from: u.task.To, to: u.task.To}
		switch {
		case u.err != nil:
			r.status, r.err = string(fleet.Failed), errorObject(u.err)
			refused = append(refused, r)
			if first == nil {
				first = u.err
			}
		case u.skipped != "":
			e.say("skipped %s: %s", u.task.Slug, u.skipped)
			switch {
			case u.point.Undone:
				r.from, r.to = u.point.From, u.point.From
			case u.task.State != "ok":
				r.from, r.to = u.task.From, u.task.From
			}
			rows = append(rows, r)
		default:
			ready = append(ready, *u)
			spec.Items = append(spec.Items, rollout.Item{Tenant: u.tenant, From: u.point.To, To: u.point.From})
		}
	}
	switch {
	case len(refused) > 0 && len(all) == 1:
		return first
	case len(refused) > 0:
		if err := show(e, refused, reportColumns); err != nil {
			return err
		}
		e.say("nothing was done: %d of %d tenants cannot be taken back. Mend that, or leave them out with --exclude", len(refused), len(all))
		return errExit{exitSomeFailed}
	case o.dryRun:
		e.say("%d tenants would be taken back; nothing was done", len(ready))
		return show(e, ready, undoColumns)
	case len(ready) == 0:
		e.say("nothing to do: no selected tenant is where the run has left it")
		return show(e, rows, reportColumns)
	}
	if err := a.Rollout.LargestFirst(ctx, spec.Items); err != nil {
		return err
	}
	if err := e.confirm(ctx, whatGoes(e, run, ready)); err != nil {
		return err
	}
	spec.Request = undoRequest{Run: run.ID, Timeout: o.timeout, Tenants: o.selector.names, Exclude: o.selector.exclude}
	return planAndWork(ctx, e, a, spec, o.workOptions, rows)
}

// elsewhere adds to the refusal of a run which is the newest that can be taken back: "last" may be any kind of run.
func elsewhere(ctx context.Context, a *app.App, refusal error) error {
	f := fault.Of(refusal)
	if f.Code != "not_undoable" {
		return refusal
	}
	runs, err := a.Rollout.List(ctx, 1000, false)
	if err != nil {
		return refusal // it stands without the hint
	}
	for _, r := range runs {
		if mayUndo(r) == nil {
			return f.WithHint("the newest run that kept undo points: oneo undo %s", r.ID)
		}
	}
	return refusal
}

// mayUndo refuses a run that cannot be taken back as a whole.
func mayUndo(run rollout.Run) error {
	var r migrateRequest
	if run.Kind != kindMigrate {
		return fault.New(fault.Invalid, "the run %s is one of %q; only runs of migrations can be taken back", run.ID, strings.TrimPrefix(run.Kind, rollout.Prefix)).
			WithCode("not_undoable").WithHint("oneo migrate run list")
	}
	if err := json.Unmarshal(run.Request, &r); err != nil {
		return fmt.Errorf("read what the run was to do: %w", err)
	}
	if !r.UndoPoint {
		return fault.New(fault.Conflict, "the run %s kept no undo points", run.ID).WithCode("no_undo_point").
			WithHint("`oneo migrate down` takes back what has a step down; next time: oneo migrate --undo-point")
	}
	if !run.Over() {
		return fault.New(fault.Conflict, "the run %s has not ended", run.ID).WithCode("run_state").
			WithHint("wait for it, or end it: oneo migrate run abort %s", run.ID)
	}
	return nil
}

// undoables lists the selected tenants of a run, with what it has kept of each.
func undoables(ctx context.Context, a *app.App, run rollout.Run, s selector) ([]*undoable, error) {
	var all []*undoable
	var numbers []int32
	err := a.Rollout.Tasks(ctx, run.ID, func(t rollout.Reported) error {
		all = append(all, &undoable{task: t})
		numbers = append(numbers, t.Number)
		return nil
	})
	if err != nil {
		return nil, err
	}
	f := registry.Filter{Exclude: s.exclude}
	if len(s.names) > 0 {
		if f, err = s.filter(); err != nil {
			return nil, err
		}
		f.States = nil // one that is dropped is refused, not passed over
	}
	tenants, selected := map[int32]tenant.Tenant{}, map[int32]bool{}
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ts, err := registry.ByNumbers(ctx, tx, numbers)
		if err != nil {
			return err
		}
		for _, t := range ts {
			tenants[t.Number] = t
		}
		if ts, err = registry.List(ctx, tx, f); err != nil {
			return err
		}
		for _, t := range ts {
			selected[t.Number] = true
			if len(s.names) > 0 && slices.Contains(f.Names, t.Slug.String()) && !slices.Contains(numbers, t.Number) {
				u := &undoable{tenant: t, skipped: "the run did not have it"}
				u.task.Slug, u.task.State = t.Slug.String(), "skipped"
				all = append(all, u)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	points := map[string]map[int32]snapshot.Point{}
	for _, u := range all {
		t := tenants[u.task.Number]
		if u.skipped != "" || points[t.Group] != nil || t.Group == "" {
			continue
		}
		if points[t.Group], err = a.Snapshots.Points(ctx, t.Group, run.ID); err != nil {
			return nil, err
		}
	}
	all = slices.DeleteFunc(all, func(u *undoable) bool {
		t, known := tenants[u.task.Number]
		purged := !known || t.State == tenant.Purged
		return u.skipped == "" && !selected[u.task.Number] && (!purged || len(s.names) > 0)
	})
	for _, u := range all {
		if u.skipped != "" {
			continue
		}
		t, known := tenants[u.task.Number]
		if known {
			u.tenant, u.task.Slug = t, t.Slug.String()
		}
		var kept bool
		u.point, kept = points[t.Group][u.task.Number]
		switch {
		case !known || t.State == tenant.Purged:
			u.skipped = "it was destroyed since"
		case kept && u.point.Undone:
			u.skipped = "it was taken back already"
		case !kept && u.task.State != "ok":
			u.skipped = "the run has not changed it"
		}
	}
	return all, nil
}

// whatGoes tells of each tenant what it loses, and says it in one sentence.
func whatGoes(e *env, run rollout.Run, ready []undoable) string {
	var rows int64
	// Who loses most is told of first.
	ready = slices.Clone(ready)
	slices.SortStableFunc(ready, func(a, b undoable) int { return cmp.Compare(b.loss.Rows, a.loss.Rows) })
	for i, u := range ready {
		rows += u.loss.Rows
		if i >= fewTenants {
			continue
		}
		back := "no table's rows are put back"
		if len(u.point.Tables) > 0 {
			back = "put back as they were: " + strings.Join(u.point.Tables, ", ")
		}
		e.say("%s: from version %d to %d; %s; rows written there since: %d%s", u.tenant.Slug, u.point.To, u.point.From, back, u.loss.Rows, goes(u.loss.Made))
	}
	if n := len(ready) - fewTenants; n > 0 {
		e.say("and %d more; --dry-run -o json shows all", n)
	}
	return fmt.Sprintf("take %d tenant(s) back to before the run %s; %d row(s) written since are lost to them", len(ready), run.ID, rows)
}

func goes(made []string) string {
	if len(made) == 0 {
		return ""
	}
	return "; what the run has made goes: " + strings.Join(made, ", ")
}
