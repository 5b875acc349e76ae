package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/schedule"
	"github.com/oneo-crm/oneo/pkg/store"
)

type doctorOptions struct {
	only                       []string
	quick, fix, dryRun, strict bool
	timeout                    time.Duration
}

func newDoctorCmd(e *env) *cobra.Command {
	var o doctorOptions
	cmd := &cobra.Command{
		Use: "doctor", Short: "Look the whole fleet over and say what is wrong, with the repair",
		Long: `Look at registry, tenants, PostgreSQL, Redis, the store of backups and the configuration, one line a check,
and under each finding what repairs it. docs/doctor.md says what each check means.

Looking changes nothing, but for a small object that is written into the store and taken away again. A check
that cannot be made is a finding; the others are made all the same. --fix makes the repairs that take nothing
away from anybody and says which; with --dry-run it only says which it would make.

The exit code is 13 when a check fails, and with --strict also when one warns; 5 when neither PostgreSQL nor
Redis nor the store has answered. A warning is something to see to that harms nobody today: it alone exits 0.`,
		Example: "  oneo doctor\n  oneo doctor --quick --strict -q\n  oneo doctor --only tenants,redis-keys --fix --dry-run\n  oneo doctor -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return examine(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.StringSliceVar(&o.only, "only", nil, "only the checks or groups of these `NAMES`")
	f.BoolVar(&o.quick, "quick", false, "leave out what takes long with many tenants: drift and backups")
	f.BoolVar(&o.fix, "fix", false, "make the repairs that are safe")
	f.BoolVar(&o.dryRun, "dry-run", false, "with --fix: only say which")
	f.BoolVar(&o.strict, "strict", false, "exit 13 also when a check warns")
	f.DurationVar(&o.timeout, "timeout", 0, "how long each check may take (15s, and 2m for the long ones)")
	must(cmd.RegisterFlagCompletionFunc("only", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		var names []string
		for _, c := range doctor.Checks() {
			names = append(names, c.Name+"\t"+c.About)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}))
	cmd.AddCommand(newDoctorIsolationCmd(e))
	return cmd
}

var doctorColumns = []column[doctor.Result]{
	{"CHECK", "check", func(r doctor.Result) any { return r.Name }},
	{"GROUP", "group", func(r doctor.Result) any { return r.Group }},
	{"STATUS", "status", func(r doctor.Result) any { return string(r.Status) }},
	{"MESSAGE", "message", func(r doctor.Result) any { return r.Message }},
	{"FINDINGS", "findings", func(r doctor.Result) any { return append(findings{}, r.Findings...) }},
	{"FIXED", "fixed", func(r doctor.Result) any { return append([]doctor.Fixed{}, r.Fixed...) }},
	{"MS", "duration_ms", func(r doctor.Result) any { return r.Took.Milliseconds() }},
}

// findings in one cell are their repairs.
type findings []doctor.Finding

func (fs findings) String() string {
	var all []string
	for _, f := range fs {
		if f.Repair != "" {
			all = append(all, f.Repair)
		}
	}
	return strings.Join(all, "; ")
}

func examine(ctx context.Context, e *env, o doctorOptions) error {
	if o.dryRun && !o.fix {
		return errUsage{fault.New(fault.Invalid, "--dry-run says what --fix would do: give both").WithHint("without --fix nothing is changed anyway")}
	}
	if o.timeout < 0 {
		return errUsage{fault.New(fault.Invalid, "--timeout must be above 0, for example 30s")}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	p := printed{e: e, colours: e.colourful(), dry: o.dryRun}
	do := doctor.Options{
		DB: a.DB, Migrate: a.Migrate, Structure: a.Structure, Provision: a.Provision, Cache: a.Cache, Config: a.Config, Origins: e.origins, Version: a.Version, Actor: e.actor(),
		Tables: func(ctx context.Context) error { return schedule.Behind(ctx, a.DB) },
		Quick:  o.quick, Only: o.only, Fix: o.fix, DryRun: o.dryRun, Timeout: o.timeout,
	}
	if a.Config.Backup.URL != "" {
		do.Store = func() (store.Store, error) { return store.Open(a.Config.Backup.URL, a.Environ) }
		do.Backups = func(ctx context.Context) (doctor.Backups, error) { return backupsFor(ctx, a) }
	}
	if a.Config.Backup.URL != "" || len(a.Config.Backup.Schedules) > 0 { // physical ones need no store
		do.Schedules = func(ctx context.Context) ([]doctor.Schedule, error) { return standingOf(ctx, a) }
	}
	if a.Config.Backup.Physical.Engine != "" {
		do.Physical = func(ctx context.Context) ([]doctor.Physical, error) { return physicalOf(ctx, a) }
		do.Scratch = a.ScratchDir()
	}
	if e.output == "table" {
		do.Told = p.result
	}
	d, err := doctor.New(do)
	if err != nil {
		return errUsage{err}
	}
	rep, err := d.Run(ctx)
	if err != nil {
		return err
	}
	switch e.output {
	case "table":
	case "name":
		for _, r := range rep.Results {
			if r.Status == doctor.Warn || r.Status == doctor.Fail {
				fmt.Fprintln(e.out, r.Name)
			}
		}
	default:
		if err := show(e, rep.Results, doctorColumns); err != nil {
			return err
		}
	}
	bad, odd := rep.Count(doctor.Fail), rep.Count(doctor.Warn)
	e.say("%d ok, %d to see to, %d wrong, %d left out", rep.Count(doctor.OK), odd, bad, rep.Count(doctor.Skipped))
	switch {
	case !rep.Reached && len(o.only) == 0:
		return fault.New(fault.Unavailable, "neither PostgreSQL nor Redis nor a store has answered: only the configuration was looked at").
			WithCode("nothing_reached").WithHint("is the server running? `oneo config show --origin` says where the addresses come from")
	case bad > 0:
		return fault.New(fault.Pending, "%d check(s) have failed", bad).WithCode("unhealthy").WithHint("the repair stands under each finding; docs/doctor.md explains the checks")
	case odd > 0 && o.strict:
		return fault.New(fault.Pending, "%d check(s) warn", odd).WithCode("unhealthy").WithHint("the repair stands under each finding; docs/doctor.md explains the checks")
	}
	return nil
}

// physicalOf is what there is of each cluster's physical backups.
func physicalOf(ctx context.Context, a *app.App) ([]doctor.Physical, error) {
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return nil, err
	}
	proofs, perr := a.PhysicalProofs(ctx)
	list := []doctor.Physical{}
	for _, k := range clusters {
		s, err := a.PhysicalState(ctx, k)
		if err != nil {
			return nil, err
		}
		p := doctor.Physical{Cluster: k.Name, Info: s.Info, Answers: s.Archiver != nil}
		if r := s.Archiver; r != nil {
			if p.Archives = r.On; r.Failing() {
				p.Failing = *r.FailedWAL
			}
		}
		if proved := proofs[k.Name].ProvedAt; perr == nil {
			p.Proved = &proved
		}
		list = append(list, p)
	}
	return list, nil
}

// standingOf is where the schedules of backups stand.
func standingOf(ctx context.Context, a *app.App) ([]doctor.Schedule, error) {
	rows, err := schedules(ctx, a)
	list := make([]doctor.Schedule, len(rows))
	for i, r := range rows {
		list[i] = doctor.Schedule{Name: r.Schedule.Name, State: r.state, Healthy: r.healthy}
	}
	return list, err
}

// bareAfter is how old a tenant may be that has no backup.
const bareAfter = 24 * time.Hour

// backupsFor reads the catalogue, once, and compares it with the tenants.
func backupsFor(ctx context.Context, a *app.App) (found doctor.Backups, err error) {
	b, err := a.Backups()
	if err != nil {
		return found, err
	}
	c, err := b.List(ctx, "")
	if err != nil {
		return found, err
	}
	found.Count, found.Bad = len(c.Backups), len(c.Bad)
	ts, err := a.Selected(ctx, config.Select{})
	if err != nil {
		return found, err
	}
	newest, bad, err := b.Provable(ctx, idsOf(ts)) // full backups have some too
	if err != nil {
		return found, err
	}
	found.Bad += len(bad)
	bare := map[string]bool{}
	for _, t := range ts {
		if _, has := newest[t.ID]; !has && time.Since(t.CreatedAt) > bareAfter {
			bare[t.Slug.String()] = true
			found.Bare = append(found.Bare, t.Slug.String())
		}
	}
	rows, err := schedules(ctx, a)
	if err != nil {
		return found, err
	}
	late, err := lateTenants(ctx, a, b, rows)
	for _, l := range late {
		if slug := l.Slug.String(); !bare[slug] {
			found.Late = append(found.Late, slug+" ("+l.schedule+")")
		}
	}
	return found, err
}

// colourful reports whether what goes to stdout may be coloured.
func (e *env) colourful() bool {
	f, ok := e.out.(*os.File)
	return ok && !e.noColor && term.IsTerminal(int(f.Fd())) && e.getenv("NO_COLOR") == "" && e.getenv("TERM") != "dumb"
}

// printed writes results for people, as they come.
type printed struct {
	e       *env
	colours bool
	dry     bool
	group   string
}

// glyphs and colours of a status.
var glyphs = map[doctor.Status][2]string{
	doctor.OK: {"✓", "32"}, doctor.Warn: {"!", "33"}, doctor.Fail: {"✗", "31"}, doctor.Skipped: {"-", "2"},
}

func (p *printed) coloured(s, colour string) string {
	if !p.colours {
		return s
	}
	return "\x1b[" + colour + "m" + s + "\x1b[0m"
}

func (p *printed) result(r doctor.Result) {
	out := p.e.out
	if r.Group != p.group {
		if p.group != "" {
			fmt.Fprintln(out)
		}
		fmt.Fprintln(out, p.coloured(r.Group, "1"))
		p.group = r.Group
	}
	mark := func(s doctor.Status) string { return p.coloured(glyphs[s][0], glyphs[s][1]) }
	word := fmt.Sprintf("%-7s", r.Status)
	line := func(message string) {
		fmt.Fprintf(out, "  %s %s %-22s %s\n", mark(r.Status), p.coloured(word, glyphs[r.Status][1]), r.Name, text(message))
	}
	switch {
	case len(r.Findings) == 0:
		line(r.Message)
	case len(r.Findings) == 1:
		line(located(r.Findings[0]))
	default:
		line(fmt.Sprintf("%d findings", len(r.Findings)))
	}
	for _, f := range r.Findings {
		if len(r.Findings) > 1 {
			fmt.Fprintf(out, "      %s %s\n", mark(f.Status), text(located(f)))
		}
		if f.Repair != "" {
			fmt.Fprintf(out, "        %s %s\n", p.coloured("→", "36"), text(f.Repair))
		}
	}
	for _, f := range r.Fixed {
		did := "did: "
		switch {
		case p.dry:
			did = "would: "
		case !f.Done:
			did = "could not: "
		}
		line := did + f.What
		if f.Error != "" {
			line += ": " + f.Error
		}
		fmt.Fprintf(out, "        %s %s\n", p.coloured("+", "36"), text(line))
	}
}

// located is a finding with the database group that it is of, where that is not the main one.
func located(f doctor.Finding) string {
	if f.Database == "" || f.Database == "main" {
		return f.Message
	}
	return "group " + f.Database + ": " + f.Message
}
