package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// runWork is what a kind of run does with each tenant.
type runWork struct {
	do func(ctx context.Context, task rollout.Task) rollout.Outcome
	// begin is called first, with what ends when this process is to stop: the contexts of do go on. May be nil.
	begin func(ctx context.Context)
	// told is called with what happens, before it is told as progress; may be nil.
	told func(rollout.Event)
	// left is called once this process begins no more tasks, whatever has become of the run; may be nil.
	left func(ctx context.Context)
	// done is called once the run is over, however it ended, instead of a report of its tasks; may be nil. say tells the
	// story in the form of the progress.
	done      func(ctx context.Context, run rollout.Run, say func(string, ...any)) error
	timeout   time.Duration // for one tenant; 0: none
	noOwner   bool          // takes no connection of the owner's: as many tenants at one time as were asked for
	live      bool          // what the tenants say is the progress, unless another one is asked for
	brokenOff bool          // an interruption breaks off what is in hand
	changes   bool          // it changes the tenants: restore points are set before the first one
	// parting is said at the end of a run that has changed a tenant; may be nil.
	parting func(run rollout.Run) string
}

// runKinds makes the work of each kind of run from what was asked for, so that any process can resume it.
var runKinds = map[string]func(e *env, a *app.App, request json.RawMessage) (runWork, error){
	kindMigrate:  migrateWork,
	kindRehearse: migrateWork,
	kindSQL:      sqlWork,
	kindEach:     eachWork,
	kindBackup:   backupWork,
}

// rivals are the other kinds of runs that move the tenants to another version, for one of those kinds. A rehearsal moves
// none.
func rivals(kind string) []string {
	all := []string{kindMigrate, kindDown, kindMark, kindUndo}
	i := slices.Index(all, kind)
	if i < 0 {
		return nil
	}
	return slices.Delete(all, i, i+1)
}

// workOptions are the flags of those who work on a run.
type workOptions struct {
	jobs     int
	progress string
	flags    *pflag.FlagSet // nil: what was asked for is asked for
}

// yields reports whether the work gives way to others that use a database. Whoever says how many works at full speed.
func (o *workOptions) yields() bool { return o.flags != nil && !o.flags.Changed("jobs") }

func (o *workOptions) bind(cmd *cobra.Command) {
	o.flags = cmd.Flags()
	o.flags.IntVar(&o.jobs, "jobs", min(8, 2*runtime.NumCPU()), "tenants at one time; at most database.owner_conns less one; unless given, a run yields to others (migrate.live_share)")
	cmd.Flags().StringVar(&o.progress, "progress", "auto", "auto, json or none: how the run is told on stderr; json has a line for each tenant, auto without a terminal few, and none for 2 s")
}

func (o *workOptions) check() error {
	if o.jobs < 1 {
		return errUsage{fault.New(fault.Invalid, "--jobs must be at least 1")}
	}
	switch o.progress {
	case "auto", "json", "none":
		return nil
	}
	return errUsage{fault.New(fault.Invalid, "unknown progress %q", o.progress).WithHint("use one of auto, json, none")}
}

// fleetOptions are the flags of those who begin a run over many tenants.
type fleetOptions struct {
	workOptions
	maxFailures int
	failFast    bool
	canary      int
	wave        string
	pause       time.Duration
	timeout     time.Duration
}

func (o *fleetOptions) bind(cmd *cobra.Command) {
	o.workOptions.bind(cmd)
	f := cmd.Flags()
	f.IntVar(&o.maxFailures, "max-failures", 0, "begin no more tenants once so many have failed; 0: no bound")
	f.BoolVar(&o.failFast, "fail-fast", false, "begin no more tenants once one has failed")
	f.IntVar(&o.canary, "canary", 0, "begin with so many tenants, spread over the sizes; a failure among them ends the run")
	f.StringVar(&o.wave, "wave", "", "after the canaries, this `SHARE` or number of tenants at a time: 10% or 50")
	f.DurationVar(&o.pause, "pause", 0, "wait so long between two waves")
	f.DurationVar(&o.timeout, "timeout", 0, "end the work on a tenant that takes longer; 0: no bound")
}

// spec completes a run with what the flags say.
func (o *fleetOptions) spec(s rollout.Spec) (rollout.Spec, error) {
	if err := o.check(); err != nil {
		return s, err
	}
	for name, n := range map[string]int{"max-failures": o.maxFailures, "canary": o.canary, "pause": int(o.pause), "timeout": int(o.timeout)} {
		if n < 0 {
			return s, errUsage{fault.New(fault.Invalid, "--%s must not be below 0", name)}
		}
	}
	if o.failFast && o.maxFailures > 1 {
		return s, errUsage{fault.New(fault.Invalid, "--fail-fast and --max-failures exclude each other")}
	}
	var err error
	if s.Wave, err = rollout.ParseWave(o.wave); err != nil {
		return s, errUsage{err}
	}
	s.Canary, s.Pause, s.MaxFailures = o.canary, o.pause, o.maxFailures
	if o.failFast {
		s.MaxFailures = 1
	}
	return s, nil
}

// workOn works on a run until it is over and reports it: the exit code is its end.
func workOn(ctx context.Context, e *env, a *app.App, run rollout.Run, o workOptions, rows []reported) error {
	works, ok := runKinds[run.Kind]
	if !ok {
		return fault.New(fault.Unsupported, "this oneo cannot work on a run of the kind %q", run.Kind).WithCode("unknown_run_kind")
	}
	w, err := works(e, a, run.Request)
	if err != nil {
		return err
	}
	if w.begin != nil {
		w.begin(ctx)
	}
	if w.live && o.progress == "auto" {
		o.progress = "none"
	}
	p, err := newProgress(e, o.progress, run)
	if err != nil {
		return err
	}
	// One connection is left for the run's own rows.
	jobs := o.jobs
	if most := max(1, a.Config.Database.OwnerConns-1); jobs > most && !w.noOwner {
		jobs = most
		p.say("%d jobs at one time: database.owner_conns is %d, and one connection is the run's own", jobs, a.Config.Database.OwnerConns)
	}
	told := p.told
	if w.told != nil {
		// Whoever reads the result may go away, as head does: that must not end the process in the middle of the run.
		gone := make(chan os.Signal, 1)
		signal.Notify(gone, syscall.SIGPIPE)
		defer signal.Stop(gone)
		told = func(ev rollout.Event) {
			p.clear()
			w.told(ev)
			p.told(ev)
		}
	}
	looking, stop := context.WithCancel(ctx)
	defer stop()
	brake := a.Brake(looking, o.yields() && !w.live && !w.noOwner) // who reads, or runs programs, does not
	start := time.Now()
	end, err := a.Rollout.Work(ctx, run.ID, rollout.WorkOptions{
		Jobs: jobs, Patience: a.Config.Migrate.Patience, Timeout: w.timeout, Hold: brake.Hold, Yields: brake.Yields, Share: a.Config.Migrate.LiveShare, Changes: w.changes, Told: told,
	}, w.do)
	if w.left != nil {
		w.left(context.WithoutCancel(ctx))
	}
	p.end()
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("run %s: %w", run.ID, err)
	}
	interrupted := err != nil
	ctx = context.WithoutCancel(ctx) // what was done is told all the same
	if w.done != nil {
		if err := w.done(ctx, end, p.say); err != nil {
			return err
		}
	} else if err := showTasks(ctx, e, a, end, rows); err != nil {
		return err
	}
	p.say("%s in %s", tally(end), short(time.Since(start)))
	if w.parting != nil && end.OK > 0 {
		p.say("%s", w.parting(end))
	}
	switch {
	case interrupted && !end.Over():
		inHand := "the tenants in hand are finished"
		if w.brokenOff {
			inHand = "what was broken off is done again"
		}
		p.say("interrupted; %s. To go on: oneo migrate run resume %s", inHand, end.ID)
		return errExit{exitInterrupted}
	case end.State == registry.Paused:
		p.say("the run is paused. To go on: oneo migrate run resume %s", end.ID)
		return errExit{exitPending}
	case end.State == registry.Aborted:
		p.say("the run was aborted")
		return errExit{exitFailed}
	case end.Failed > 0 || end.State == registry.Failed:
		var why rollout.Cause
		if json.Unmarshal(end.Error, &why) == nil && why.Code != "tenants_failed" {
			p.say("%s", why.Message)
		}
		p.say("once it is mended: oneo migrate run retry %s", end.ID)
		return errExit{exitSomeFailed}
	}
	return nil
}

func tally(run rollout.Run) string {
	s := fmt.Sprintf("run %s: %d done, %d failed, %d skipped", run.ID, run.OK, run.Failed, run.Skipped)
	if n := run.Left(); n > 0 {
		s += fmt.Sprintf(", %d left", n)
	}
	return s
}

// reported is one tenant's line of a report.
type reported struct {
	tenant   string
	status   string
	from, to int
	duration time.Duration
	result   json.RawMessage
	err      any
}

var reportColumns = []column[reported]{
	{"TENANT", "tenant", func(r reported) any { return r.tenant }},
	{"STATUS", "status", func(r reported) any { return r.status }},
	{"FROM", "from", func(r reported) any { return r.from }},
	{"TO", "to", func(r reported) any { return r.to }},
	{"MS", "duration_ms", func(r reported) any { return r.duration.Milliseconds() }},
	{"ERROR", "error", func(r reported) any { return r.err }},
}

// fewTenants is up to how many a table names also those for which all went well.
const fewTenants = 20

// showTasks writes the report of a run: in a table of many tenants only those that ask for attention.
func showTasks(ctx context.Context, e *env, a *app.App, run rollout.Run, rows []reported) error {
	all := e.output != "table" || e.verbose || run.Tasks() <= fewTenants
	var states []string
	if !all {
		states = []string{"failed", "skipped"}
	}
	err := a.Rollout.Tasks(ctx, run.ID, func(t rollout.Reported) error {
		r := reported{tenant: t.Slug, status: t.State, from: t.From, to: t.To, duration: t.Duration, result: t.Result}
		if t.Error != nil {
			r.err = reportedError(*t.Error)
		}
		if t.State == "queued" || t.State == "running" {
			r.to = r.from
		}
		rows = append(rows, r)
		return nil
	}, states...)
	if err != nil || !all && len(rows) == 0 {
		return err
	}
	return show(e, rows, reportColumns)
}

// teller tells servers of a run's changes: of the first in each group at once, of the others a moment later together.
// Commits that carry a notice would wait for each other.
type teller struct {
	a       *app.App
	mu      sync.Mutex
	pending map[string]*time.Timer // by group
}

const tellServersEvery = 100 * time.Millisecond

func (t *teller) changed(ctx context.Context, group string) {
	t.mu.Lock()
	if t.pending == nil {
		t.pending = map[string]*time.Timer{}
	}
	_, waits := t.pending[group]
	if !waits {
		t.pending[group] = time.AfterFunc(tellServersEvery, func() {
			t.mu.Lock()
			delete(t.pending, group)
			t.mu.Unlock()
			t.tell(context.WithoutCancel(ctx), group)
		})
	}
	t.mu.Unlock()
	if !waits {
		t.tell(ctx, group)
	}
}

// rest tells what is still to be told.
func (t *teller) rest(ctx context.Context) {
	t.mu.Lock()
	var groups []string
	for group, timer := range t.pending {
		if timer.Stop() {
			groups = append(groups, group)
		}
	}
	t.mu.Unlock()
	for _, group := range groups {
		t.tell(ctx, group)
	}
}

// tell need not succeed: servers look by themselves too, and each binding looks at the version.
func (t *teller) tell(ctx context.Context, group string) {
	if err := t.a.Migrate.Tell(ctx, group); err != nil {
		t.a.Log.DebugContext(ctx, "tell the servers of changed versions", "group", group, "error", err)
	}
}

// taskTenant is the tenant of a task, as far as a migration needs to know it.
func taskTenant(t rollout.Task) (tenant.Tenant, error) {
	slug, err := tenant.ParseSlug(t.Slug)
	return tenant.Tenant{Number: t.Number, Slug: slug, Group: t.Group}, err
}

func newRunCmd(e *env) *cobra.Command {
	return noun("run", "See and steer durable runs",
		`A run over many tenants is stored: it can be paused, resumed by any process on any machine, retried and
aborted. RUN is a run's id, the end of it, or "last".

A run whose last process died before it could write that all was done is ended by whatever looks at runs
next: list, show, `+"`oneo migrate status`"+` or another run. One of statements, programs or steps down stays
open until it is resumed, so that the same command goes on with it and does nothing twice.`,
		"  oneo migrate run list\n  oneo migrate run show last\n  oneo migrate run resume last",
		newRunListCmd(e), newRunShowCmd(e),
		runVerb(e, "pause", "Begin no more tenants of a run", "What is in hand is finished; who works on the run stops. `oneo migrate run resume` goes on.",
			(*rollout.Runner).Pause),
		runVerb(e, "abort", "End a run for good", "What is in hand is finished, what is left is never begun. Tenants that are done stay so.",
			(*rollout.Runner).Abort),
		runOn(e, "resume", "Go on with a run", "Work on a run that was interrupted, paused or ended early, beside those who do already. Tenants that have failed stay so.",
			(*rollout.Runner).Resume),
		runOn(e, "retry", "Try the failed tenants of a run again", "Queue the failed tenants of a run once more and work on it.",
			(*rollout.Runner).Retry),
	)
}

var runColumns = []column[rollout.Run]{
	{"RUN", "id", func(r rollout.Run) any { return r.ID.String() }},
	{"KIND", "kind", func(r rollout.Run) any { return r.Kind[len(rollout.Prefix):] }},
	{"STATE", "state", func(r rollout.Run) any { return r.State }},
	{"DONE", "ok", func(r rollout.Run) any { return r.OK }},
	{"FAILED", "failed", func(r rollout.Run) any { return r.Failed }},
	{"SKIPPED", "skipped", func(r rollout.Run) any { return r.Skipped }},
	{"LEFT", "left", func(r rollout.Run) any { return r.Left() }},
	{"ALIVE", "alive", func(r rollout.Run) any { return r.Alive }},
	{"BY", "actor", func(r rollout.Run) any { return r.Actor }},
	{"BEGUN", "created_at", func(r rollout.Run) any { return r.CreatedAt }},
	{"ENDED", "finished_at", func(r rollout.Run) any { return r.FinishedAt }},
}

func newRunListCmd(e *env) *cobra.Command {
	var open bool
	var limit int
	cmd := &cobra.Command{
		Use: "list", Short: "List the newest runs",
		Long:    "List runs, the newest first: how many tenants are done, failed, skipped and left, and whether a process works on it.",
		Example: "  oneo migrate run list --open", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 1 {
				return errUsage{fault.New(fault.Invalid, "--limit must be at least 1")}
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			concludeRuns(cmd.Context(), e, a)
			runs, err := a.Rollout.List(cmd.Context(), limit, open)
			if err != nil {
				return err
			}
			return show(e, runs, runColumns)
		},
	}
	cmd.Flags().BoolVar(&open, "open", false, "only those that have not ended")
	cmd.Flags().IntVar(&limit, "limit", 20, "at most so many")
	return cmd
}

func newRunShowCmd(e *env) *cobra.Command {
	var tasks bool
	cmd := &cobra.Command{
		Use: "show RUN", Short: "Show how far a run is, and who failed",
		Long:    "Show a run and, in a table, the tenants that failed; with --tenants the tenants themselves.",
		Example: "  oneo migrate run show last --tenants -o json",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			concludeRuns(cmd.Context(), e, a)
			run, err := a.Rollout.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if tasks {
				return showTasks(cmd.Context(), e, a, run, nil)
			}
			points, err := restorePoints(cmd.Context(), a, run.ID)
			if err != nil {
				return err
			}
			columns := append(runColumns[:len(runColumns):len(runColumns)],
				column[rollout.Run]{"WAVE", "wave", func(r rollout.Run) any { return r.Wave + 1 }},
				column[rollout.Run]{"WAVES", "waves", func(r rollout.Run) any { return r.Waves }},
				column[rollout.Run]{"REQUEST", "request", func(r rollout.Run) any { return r.Request }},
				column[rollout.Run]{"RESTORE POINTS", "restore_points", func(rollout.Run) any { return points }},
				column[rollout.Run]{"ERROR", "error", func(r rollout.Run) any { return r.Error }})
			if err := showOne(e, run, columns); err != nil || e.output != "table" || run.Failed == 0 {
				return err
			}
			fmt.Fprintln(e.out)
			var failed []reported
			err = a.Rollout.Tasks(cmd.Context(), run.ID, func(t rollout.Reported) error {
				failed = append(failed, reported{tenant: t.Slug, status: t.State, from: t.From, to: t.To, duration: t.Duration, err: reportedError(*t.Error)})
				return nil
			}, "failed")
			if err != nil {
				return err
			}
			return show(e, failed, reportColumns)
		},
	}
	cmd.Flags().BoolVar(&tasks, "tenants", false, "the tenants instead: all of them with -o json, those that ask for attention in a table")
	return cmd
}

// restorePoints says in which groups a run has one, and at which moment; none: it has no name as a moment.
func restorePoints(ctx context.Context, a *app.App, run uuid.UUID) (all []string, err error) {
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		points, err := registry.PointsOf(ctx, tx, run.String())
		for _, p := range points {
			all = append(all, p.Group+" "+p.At.UTC().Format(time.RFC3339))
		}
		if fault.Is(err, fault.NotFound) {
			err = nil
		}
		return err
	})
	return all, err
}

// runVerb is a command that changes a run and does not work on it.
func runVerb(e *env, verb, short, long string, do func(*rollout.Runner, context.Context, uuid.UUID, string) (rollout.Run, error)) *cobra.Command {
	return &cobra.Command{
		Use: verb + " RUN", Short: short, Long: long, Example: "  oneo migrate run " + verb + " last", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			a, err := e.open()
			if err != nil {
				return err
			}
			run, err := a.Rollout.Find(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if run, err = do(a.Rollout, cmd.Context(), run.ID, e.actor()); err != nil {
				return err
			}
			if verb == "pause" {
				e.say("to go on: oneo migrate run resume %s", run.ID)
			}
			return showOne(e, run, runColumns)
		},
	}
}

// runOn is a command that opens a run and works on it.
func runOn(e *env, verb, short, long string, do func(*rollout.Runner, context.Context, uuid.UUID, string) (rollout.Run, error)) *cobra.Command {
	var o workOptions
	cmd := &cobra.Command{
		Use: verb + " RUN", Short: short, Long: long, Example: "  oneo migrate run " + verb + " last --jobs 4", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if err := o.check(); err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			run, err := a.Rollout.Find(ctx, args[0])
			if err != nil {
				return err
			}
			if run, err = do(a.Rollout, ctx, run.ID, e.actor()); err != nil {
				return err
			}
			if run.Over() {
				e.say("nothing to do: %s", tally(run))
				return showOne(e, run, runColumns)
			}
			return workOn(ctx, e, a, run, o, nil)
		},
	}
	o.bind(cmd)
	return cmd
}
