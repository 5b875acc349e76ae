package main

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

type moveOptions struct {
	slug     string
	to       string
	keep     time.Duration
	force    bool
	dryRun   bool
	dropKept bool
	confirm  string
	progress string
}

func newTenantMoveCmd(e *env) *cobra.Command {
	var o moveOptions
	cmd := &cobra.Command{
		Use: "move NAME --to GROUP", Short: "Bring a tenant to another group's database",
		Long: `Bring a tenant to another group's database, with all it has: rows, structure, users, sessions and keys.

It is frozen meanwhile: its users read, and what they write is answered 503 with Retry-After. All of it is copied and
read again at the new place; only when both are the same is the registry switched, the old place retired and the new
one opened. At no moment can it be written at both. A move that fails or is interrupted before the switch is undone; one
that was killed is gone on with by the same command, or by a server after some seconds.

What is left behind is kept for --keep, and then destroyed; --drop-kept destroys it now. To go back, move it back.`,
		Example: "  oneo tenant move acme --to eu2 --dry-run\n  oneo tenant move acme --to eu2\n  oneo tenant move acme --drop-kept",
		Args:    usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.slug = args[0]
			return tenantMove(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.to, "to", "", "database `GROUP` that it goes to")
	f.DurationVar(&o.keep, "keep", 0, "for how long the old copy is kept; default: backup.undo_keep")
	f.BoolVar(&o.force, "force", false, "also when a run or a restore can still be undone: that is lost by the move")
	f.BoolVar(&o.dryRun, "dry-run", false, "only check and show")
	f.BoolVar(&o.dropKept, "drop-kept", false, "destroy what moves of the tenant have left behind")
	f.StringVar(&o.confirm, "confirm", "", "the tenant's `NAME`, for --drop-kept without a terminal")
	f.StringVar(&o.progress, "progress", "auto", "`FORM` of the progress: auto, json or none")
	return cmd
}

var movedColumns = []column[provision.Moved]{
	{"TENANT", "tenant", func(m provision.Moved) any { return m.Tenant.Slug.String() }},
	{"FROM", "from", func(m provision.Moved) any { return m.From }},
	{"TO", "to", func(m provision.Moved) any { return m.Tenant.Group }},
	{"OPERATION", "operation", func(m provision.Moved) any { return m.Operation.String() }},
	{"TABLES", "tables", func(m provision.Moved) any { return m.Tables }},
	{"ROWS", "rows", func(m provision.Moved) any { return m.Rows }},
	{"SIZE", "size_bytes", func(m provision.Moved) any { return m.Bytes }},
	{"PAUSE", "pause_ms", func(m provision.Moved) any { return m.Pause.Milliseconds() }},
	{"KEPT UNTIL", "kept_until", func(m provision.Moved) any { return m.Kept }},
}

// plannedMove is what a dry run shows.
type plannedMove struct {
	t     tenant.Tenant
	to    string
	bytes int64
}

var plannedMoveColumns = []column[plannedMove]{
	{"TENANT", "tenant", func(m plannedMove) any { return m.t.Slug.String() }},
	{"FROM", "from", func(m plannedMove) any { return m.t.Group }},
	{"TO", "to", func(m plannedMove) any { return m.to }},
	{"SIZE", "size_bytes", func(m plannedMove) any { return m.bytes }},
}

func tenantMove(ctx context.Context, e *env, o moveOptions) error {
	switch {
	case o.dropKept && o.to != "":
		return errUsage{fault.New(fault.Invalid, "--to and --drop-kept exclude each other")}
	case !o.dropKept && o.to == "":
		return errUsage{fault.New(fault.Invalid, "say where the tenant is to go").WithCode("no_group").WithHint("add --to GROUP; `oneo config show` lists the groups")}
	}
	slug, err := tenant.ParseSlug(o.slug)
	if err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if o.dropKept {
		return dropKept(ctx, e, a, o)
	}
	m, err := newMeter(e, o.progress, "")
	if err != nil {
		return err
	}
	r := provision.MoveRequest{Group: o.to, Keep: o.keep, Force: o.force, Actor: e.actor()}
	if r.Keep == 0 {
		r.Keep = a.Config.Backup.UndoKeep
	}
	if o.dryRun {
		t, bytes, err := a.Provision.MayMove(ctx, slug, r)
		if err != nil {
			return err
		}
		if t.Group == o.to {
			e.say("tenant %s is in group %s already", t.Slug, o.to)
		} else {
			e.say("would move tenant %s from group %s to %s: about %s, frozen for writes while they are copied and compared", t.Slug, t.Group, o.to, size(bytes))
		}
		return showOne(e, plannedMove{t, o.to, bytes}, plannedMoveColumns)
	}
	r.Progress = func(p provision.MoveProgress) {
		m.verb = map[string]string{"copy": "copied", "verify": "compared"}[p.Step]
		m.frozen = p.Frozen
		m.tell(transfer.Progress{Table: p.Table, Rows: p.Rows, Bytes: p.Bytes, Total: p.Total})
	}
	done, err := a.Provision.Move(ctx, slug, r)
	m.end()
	if err != nil {
		return err
	}
	if done.Operation == uuid.Nil {
		e.say("tenant %s is in group %s already", done.Tenant.Slug, o.to)
	} else {
		e.say("moved tenant %s from group %s to %s: %s row(s) in %d table(s), the same at both; it could not be written for %s",
			done.Tenant.Slug, done.From, done.Tenant.Group, grouped(done.Rows), done.Tables, done.Pause.Round(time.Millisecond))
		e.say("back: oneo tenant move %s --to %s; the old copy is kept until %s", done.Tenant.Slug, done.From, done.Kept.UTC().Format(time.RFC3339))
	}
	return showOne(e, done, movedColumns)
}

// dropKept destroys what moves have left behind of a tenant.
func dropKept(ctx context.Context, e *env, a *app.App, o moveOptions) error {
	t, err := tenantNamed(ctx, a, o.slug)
	if err != nil {
		return err
	}
	what := "destroy what moves of tenant " + t.Slug.String() + " have left behind; where it is served it stays as it is"
	if o.dryRun {
		e.say("would %s", what)
		return nil
	}
	if err := e.confirmName(ctx, t.Slug.String(), o.confirm, what); err != nil {
		return err
	}
	n, err := a.Provision.DropMoved(ctx, t.Number)
	if err != nil {
		return err
	}
	copies := "copies"
	if n == 1 {
		copies = "copy"
	}
	e.say("destroyed %d old %s of tenant %s", n, copies, t.Slug)
	return nil
}
