package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const (
	kindDown = rollout.Prefix + "down"
	kindMark = rollout.Prefix + "mark"
)

func init() {
	runKinds[kindDown] = downWork
	runKinds[kindMark] = markWork
}

type downOptions struct {
	to       int
	steps    int
	dryRun   bool
	selector selector
	fleetOptions
}

func newDownCmd(e *env) *cobra.Command {
	o := downOptions{}
	cmd := &cobra.Command{
		Use: "down", Short: "Take tenants back to an earlier version",
		Long: `Run the .down.sql of each migration above --to VERSION, or of the last --steps N, newest first: one
transaction for each tenant. What the taken-back migrations had added is destroyed, and it asks before.
A migration that has no way back refuses the whole command before anything is done.`,
		Example: "  oneo migrate down --steps 1 -t acme\n  oneo migrate down --to 12 --all-tenants --canary 3 --yes",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if cmd.Flags().Changed("to") == cmd.Flags().Changed("steps") {
				return errUsage{fault.New(fault.Invalid, "say either --to VERSION or --steps N").WithCode("no_target")}
			}
			return runDown(cmd.Context(), e, o)
		},
	}
	o.selector.bind(cmd, e)
	o.fleetOptions.bind(cmd)
	cmd.Flags().IntVar(&o.to, "to", 0, "the `VERSION` to go back to; 0: before the first migration")
	cmd.Flags().IntVar(&o.steps, "steps", 0, "how many migrations to take back")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show what would be done, and do nothing")
	return cmd
}

// aimedRequest is what a process must know that resumes a run whose tasks say themselves where each tenant is to go.
type aimedRequest struct {
	To      int           `json:"to,omitempty"`
	Steps   int           `json:"steps,omitempty"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
	Actor   string        `json:"actor,omitempty"`
	All     bool          `json:"all_tenants,omitempty"`
	Tenants []string      `json:"tenants,omitempty"`
	Exclude []string      `json:"exclude,omitempty"`
	States  []string      `json:"states,omitempty"`
	Group   string        `json:"group,omitempty"`
}

func downWork(_ *env, a *app.App, request json.RawMessage) (runWork, error) {
	var r aimedRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	servers := &teller{a: a}
	return runWork{timeout: r.Timeout, left: servers.rest, changes: true, do: aimed(func(ctx context.Context, t tenant.Tenant, task rollout.Task) (migrate.Result, error) {
		res, err := a.Migrate.Down(ctx, t, task.To, migrate.TenantOptions{Untold: true})
		if res.From != res.To {
			servers.changed(ctx, t.Group)
		}
		return res, err
	})}, nil
}

// aimed is the work on a task that says itself where its tenant is to go.
func aimed(do func(context.Context, tenant.Tenant, rollout.Task) (migrate.Result, error)) func(context.Context, rollout.Task) rollout.Outcome {
	return func(ctx context.Context, task rollout.Task) rollout.Outcome {
		t, err := taskTenant(task)
		if err != nil {
			return rollout.Outcome{Err: err}
		}
		res, err := do(ctx, t, task)
		out := rollout.Outcome{Status: fleet.OK, From: res.From, To: res.To, Err: err}
		switch {
		case err != nil:
			out.Status = fleet.Failed
		case res.From == res.To && task.Attempts > 1:
			out.From = task.From // done by an attempt that died before it could say so
		case res.From == res.To:
			out.Status = fleet.Skipped
		}
		return out
	}
}

func runDown(ctx context.Context, e *env, o downOptions) error {
	spec, err := o.spec(rollout.Spec{Kind: kindDown, Actor: e.actor(), Alone: true, Rivals: rivals(kindDown)})
	if err != nil {
		return err
	}
	if o.to < 0 || o.steps < 0 {
		return errUsage{fault.New(fault.Invalid, "--to and --steps must not be below 0")}
	}
	if _, err := o.selector.filter(); err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	if head := a.Migrate.Head(migrate.TenantSet); o.to > head {
		return fault.New(fault.Invalid, "there is no version %d: the tenant migrations go from 1 to %d", o.to, head).WithCode("target_out_of_range")
	}
	spec.Items, err = aim(ctx, a, o.selector, func(version int) (int, bool) {
		target := o.to
		if o.steps > 0 {
			target = max(0, version-o.steps)
		}
		return target, target < version
	})
	if err != nil {
		return err
	}
	if len(spec.Items) == 0 {
		e.say("nothing to do: no selected tenant is above that version")
		return show(e, []reported{}, reportColumns)
	}
	asked := map[[2]int]bool{}
	for _, it := range spec.Items {
		if way := [2]int{it.From, it.To}; !asked[way] {
			asked[way] = true
			if err := a.Migrate.CanGoDown(it.From, it.To); err != nil {
				return err
			}
		}
	}
	if err := a.Rollout.LargestFirst(ctx, spec.Items); err != nil {
		return err
	}
	if o.dryRun {
		return showPlan(e, a, spec)
	}
	if err := e.confirm(ctx, fmt.Sprintf("take %d tenant(s) back and destroy what the migrations had added", len(spec.Items))); err != nil {
		return err
	}
	s := o.selector
	spec.Request = aimedRequest{To: o.to, Steps: o.steps, Timeout: o.timeout, All: s.all, Tenants: s.names, Exclude: s.exclude, States: s.states, Group: s.group}
	return planAndWork(ctx, e, a, spec, o.workOptions, nil)
}

// planAndWork stores a run, or goes on with the one that does the same already, and works on it.
func planAndWork(ctx context.Context, e *env, a *app.App, spec rollout.Spec, o workOptions, rows []reported) error {
	concludeRuns(ctx, e, a)
	if _, err := a.Rollout.Expire(ctx, a.Config.Runs.Keep); err != nil { // `oneo serve` does it too
		e.say("runs whose time is over: %s", fault.Of(err).Message)
	}
	run, joined, err := a.Rollout.Plan(ctx, spec)
	if err != nil {
		return err
	}
	if joined {
		e.say("going on with the run %s, begun by %s at %s", run.ID, run.Actor, run.CreatedAt.UTC().Format(time.RFC3339))
	}
	return workOn(ctx, e, a, run, o, rows)
}

// aim makes an item of each selected tenant for which there is something to do: target says where it is to go.
func aim(ctx context.Context, a *app.App, s selector, target func(version int) (int, bool)) ([]rollout.Item, error) {
	ts, err := s.tenants(ctx, a)
	if err != nil {
		return nil, err
	}
	versions, err := versionsOf(ctx, a, ts)
	if err != nil {
		return nil, err
	}
	var items []rollout.Item
	for _, t := range ts {
		version, placed := versions[t.Number]
		if to, needed := target(version); placed && needed {
			items = append(items, rollout.Item{Tenant: t, From: version, To: to})
		}
	}
	return items, nil
}

// versionsOf reads at which version tenants are, in one query for each group.
func versionsOf(ctx context.Context, a *app.App, ts []tenant.Tenant) (map[int32]int, error) {
	groups := map[string][]int32{}
	for _, t := range ts {
		groups[t.Group] = append(groups[t.Group], t.Number)
	}
	all := make(map[int32]int, len(ts))
	for group, numbers := range groups {
		versions, err := a.Migrate.Versions(ctx, group, numbers)
		if err != nil {
			return nil, err
		}
		for number, version := range versions {
			all[number] = version
		}
	}
	return all, nil
}

type markOptions struct {
	applied  bool
	selector selector
	workOptions
}

func newMarkCmd(e *env) *cobra.Command {
	o := markOptions{}
	cmd := &cobra.Command{
		Use: "mark VERSION", Short: "Record migrations as applied without running them", SuggestFor: []string{"baseline"},
		Long: `Write the ledger rows of what selected tenants lack up to VERSION and run nothing: for tenants in which
the change was made by hand. ` + "`oneo migrate drift`" + ` says whether that is so. It asks before. A schema that another
tool made, and that is no tenant yet, is taken over with its version by ` + "`oneo tenant adopt`" + `.`,
		Example: "  oneo migrate mark 14 --applied -t acme", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			var version int
			if n, err := fmt.Sscanf(args[0], "%d", &version); n != 1 || err != nil || version < 1 || fmt.Sprint(version) != args[0] {
				return errUsage{fault.New(fault.Invalid, "%q is no version", args[0]).WithHint("`oneo migrate status` shows them")}
			}
			if !o.applied {
				return errUsage{fault.New(fault.Invalid, "say what the migrations are to be marked as").WithHint("add --applied")}
			}
			return runMark(cmd.Context(), e, version, o)
		},
	}
	o.selector.bind(cmd, e)
	o.workOptions.bind(cmd)
	cmd.Flags().BoolVar(&o.applied, "applied", false, "as applied")
	return cmd
}

func runMark(ctx context.Context, e *env, version int, o markOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	if _, err := o.selector.filter(); err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	if head := a.Migrate.Head(migrate.TenantSet); version > head {
		return fault.New(fault.Invalid, "there is no version %d: the tenant migrations go from 1 to %d", version, head).WithCode("target_out_of_range")
	}
	spec := rollout.Spec{Kind: kindMark, Actor: e.actor(), Alone: true, Rivals: rivals(kindMark)}
	spec.Items, err = aim(ctx, a, o.selector, func(at int) (int, bool) { return version, at < version })
	if err != nil {
		return err
	}
	if len(spec.Items) == 0 {
		e.say("nothing to do: every selected tenant is at version %d or further", version)
		return show(e, []reported{}, reportColumns)
	}
	if err := e.confirm(ctx, fmt.Sprintf("record migrations of %d tenant(s) as applied without running them", len(spec.Items))); err != nil {
		return err
	}
	s := o.selector
	spec.Request = aimedRequest{To: version, Actor: e.actor(), All: s.all, Tenants: s.names, Exclude: s.exclude, States: s.states, Group: s.group}
	return planAndWork(ctx, e, a, spec, o.workOptions, nil)
}

func markWork(_ *env, a *app.App, request json.RawMessage) (runWork, error) {
	var r aimedRequest
	if err := json.Unmarshal(request, &r); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	return runWork{do: aimed(func(ctx context.Context, t tenant.Tenant, task rollout.Task) (migrate.Result, error) {
		return a.Migrate.Mark(ctx, t, task.To, r.Actor)
	})}, nil
}
