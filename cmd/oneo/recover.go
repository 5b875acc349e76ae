package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

type recoverOptions struct {
	at       atOptions
	into     string
	groups   []string
	accept   bool
	discard  bool
	change   bool // --switch
	data     string
	progress string
}

func newRecoverCmd(e *env) *cobra.Command {
	return noun("recover", "Take whole clusters back to any moment", "Take whole clusters back to any moment. For one tenant see `oneo restore --at`.", "  oneo recover cluster --at 10m --into /srv/recovered", newRecoverClusterCmd(e))
}

func newRecoverClusterCmd(e *env) *cobra.Command {
	var o recoverOptions
	cmd := &cobra.Command{
		Use: "cluster", Short: "Make a data folder of a whole cluster as it was at a moment",
		Long: `Recover whole clusters from their physical backups and archived WAL, each into a new data folder: DIR itself, or a folder in
DIR by the cluster's name where there are several. Nothing that lives is changed, and no live server is needed. Each is started
privately, reaches the moment, is looked over (tenants, their schemas, checksums of pages), and stopped in order; its settings are
those of the backup. What remains to be done is printed, for this machine.

With --group only the clusters of these groups go back. Other clusters stay as they are, and what they hold is compared with the
registry as it will be: tenants that were made, moved, dropped, purged or erased since are listed with what becomes of each.
Nothing of that is guessed: while there is such a difference the exit code is 13, and the steps are printed when the same command
says --accept-differences. What is recovered already is not recovered again.

A recovery that was killed leaves a half made folder beside DIR, of which the next one tells, and which --discard removes.

--switch puts the recovered cluster in the place of that of ` + "`oneo dev`" + `, which must be stopped. Its old data folder is kept beside it.`,
		Example: "  oneo recover cluster --at '2026-08-01 14:03:00+02' --into /srv/recovered\n  oneo recover cluster --at 1h --group second --into /srv/second --accept-differences\n" +
			"  oneo recover cluster --at 10m --switch --accept-differences",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return recoverClusters(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	o.at.register(f)
	f.StringVar(&o.into, "into", "", "the new data folder `DIR`, which is empty or not there (with --switch: recovered in --data)")
	f.StringSliceVar(&o.groups, "group", nil, "only the clusters of these database `GROUPS`")
	f.BoolVar(&o.accept, "accept-differences", false, "go on although tenants differ from what lives; they have been read")
	f.BoolVar(&o.discard, "discard", false, "first remove what a recovery has left in DIR that was broken off")
	f.BoolVar(&o.change, "switch", false, "put it in the place of the cluster of a stopped oneo dev")
	f.StringVar(&o.data, "data", defaultDataDir(e.environ), "the data `DIR` of oneo dev")
	f.StringVar(&o.progress, "progress", "auto", "auto, json or none")
	return cmd
}

// step is something that an operator does.
type step struct {
	What     string   `json:"what"`
	Commands []string `json:"commands"`
}

func do(what string, commands ...string) step { return step{what, append([]string{}, commands...)} }

var recoveredColumns = []column[app.Recovered]{
	{"CLUSTER", "cluster", func(r app.Recovered) any { return r.Cluster }},
	{"GROUPS", "groups", func(r app.Recovered) any { return r.Groups }},
	{"DATA", "data", func(r app.Recovered) any { return r.Data }},
	{"MOMENT", "target", func(r app.Recovered) any { return r.Target }},
	{"LAST TRANSACTION", "reached", func(r app.Recovered) any {
		if r.Reached.IsZero() {
			return when(nil)
		}
		return when(&r.Reached)
	}},
	{"BACKUP", "backup", func(r app.Recovered) any { return r.Backup }},
	{"TIMELINE", "timeline", func(r app.Recovered) any { return r.Timeline }},
	{"TENANTS", "tenants", func(r app.Recovered) any { return r.Tenants() }},
	{"CHECKSUMS", "checksums", func(r app.Recovered) any { return r.Checksums }},
}

var apartColumns = []column[app.Difference]{
	{"TENANT", "tenant", func(d app.Difference) any { return d.Tenant }},
	{"KIND", "kind", func(d app.Difference) any { return d.Kind }},
	{"MEANS", "means", func(d app.Difference) any { return d.Means }},
}

func recoverClusters(ctx context.Context, e *env, o recoverOptions) error {
	if o.change {
		dir, err := devFolder(o.data)
		if err != nil {
			return err
		}
		o.data = dir
		// A switch that was broken off is ended, whatever else is asked for: between its two steps there is no data folder.
		if done, err := finishSwitch(e, o.data); done || err != nil {
			return err
		}
		if err := notRunning(o.data); err != nil {
			return err
		}
		if o.into == "" {
			o.into = filepath.Join(o.data, "recovered")
		}
	}
	switch {
	case !o.at.given():
		return errUsage{fault.New(fault.Invalid, "say to which moment").WithCode("no_time").WithHint("add --at TIME or --before OPERATION")}
	case o.into == "":
		return errUsage{fault.New(fault.Invalid, "say where the data folder is to be made").WithCode("no_folder").WithHint("add --into DIR")}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	moment, err := o.at.moment(ctx, a)
	if err != nil {
		if o.at.before != "" && fault.Is(err, fault.Unavailable) {
			return fault.Wrap(err, fault.Unavailable, "what --before means stands in the registry, which cannot be reached").WithCode("unreachable").WithHint("give the time itself: --at TIME")
		}
		return err
	}
	m, err := newPhases(e, o.progress)
	if err != nil {
		return err
	}
	e.say("recovering to %s", moment)
	done, differences, err := a.RecoverClusters(ctx, app.RecoverOptions{
		Moment: moment, Groups: o.groups, Into: o.into, Discard: o.discard, Why: "oneo recover cluster --into " + o.into, Report: m.tell, Say: e.say,
	})
	m.end()
	if err != nil {
		for _, r := range done {
			e.say("cluster %s is recovered, in %s: the same command goes on with the others", r.Cluster, r.Data)
		}
		return err
	}
	if o.change && len(done) > 1 {
		return fault.New(fault.Invalid, "oneo dev has one cluster, and %d are configured", len(done)).WithCode("dev_folder").WithHint("the steps for each are printed without --switch")
	}
	for _, d := range differences {
		if d.Kind == app.DiffErased {
			e.say("ERASED PEOPLE COME BACK: %s %s; erase it again, before anybody is served: %s", d.Tenant, d.Means, strings.Join(d.After, "; "))
		}
	}
	agreed := len(differences) == 0 || o.accept
	var steps []step
	switched := ""
	switch {
	case !agreed:
	case o.change:
		if switched, err = switchDev(o.data, done[0]); err != nil {
			return err
		}
		e.say("%s holds the cluster as it was at %s; what it held is kept in %s", filepath.Join(o.data, "postgres"), done[0].Target, switched)
		steps = behindTheSwitch(a, []step{do("start it", "oneo dev --data "+shellWord(o.data))}, true, done, differences)
		steps = append(steps, do(fmt.Sprintf("to take the switch back, with oneo dev stopped; once it has run, the old cluster needs another backup.physical.dir: this one follows timeline %d", done[0].Timeline), "mv "+shellWord(filepath.Join(o.data, "postgres"))+" "+shellWord(done[0].Data), "mv "+shellWord(switched)+" "+shellWord(filepath.Join(o.data, "postgres"))))
	default:
		steps = stepsOf(a, o.data, done, differences)
	}
	if err := showRecovered(e, done, differences, steps, switched); err != nil {
		return err
	}
	if !agreed {
		return fault.New(fault.Pending, "%d difference(s) need a decision; nothing that lives was changed", len(differences)).WithCode("needs_decision").
			WithHint("read what each means, and then: oneo recover cluster %s --into %s%s --accept-differences", o.when(moment), shellWord(o.into), o.more())
	}
	return nil
}

// when is the flag that names the same moment again.
func (o recoverOptions) when(m app.Moment) string {
	if o.at.before != "" {
		return "--before " + shellWord(o.at.before)
	}
	return "--at '" + m.Time.UTC().Format("2006-01-02 15:04:05.999999+00") + "'"
}

// more are the flags that the same command has again.
func (o recoverOptions) more() (s string) {
	if len(o.groups) > 0 {
		s += " --group " + strings.Join(o.groups, ",")
	}
	if o.change {
		s += " --switch --data " + shellWord(o.data)
	}
	return s
}

func showRecovered(e *env, done []app.Recovered, differences []app.Difference, steps []step, switched string) error {
	switch e.output {
	case "json", "yaml":
		clusters := []map[string]any{}
		for _, r := range done {
			clusters = append(clusters, object(r, recoveredColumns))
		}
		return e.encode(map[string]any{"clusters": clusters, "differences": append([]app.Difference{}, differences...), "steps": append([]step{}, steps...), "switched": switched != "", "kept": switched})
	case "table":
	default:
		return show(e, done, recoveredColumns)
	}
	if len(done) > 0 {
		if err := show(e, done, recoveredColumns); err != nil {
			return err
		}
	}
	if len(differences) > 0 {
		fmt.Fprintln(e.out)
		if err := show(e, differences, apartColumns); err != nil {
			return err
		}
	}
	for i, s := range steps {
		fmt.Fprintf(e.out, "\n%d. %s\n", i+1, text(s.What))
		for _, c := range s.Commands {
			fmt.Fprintf(e.out, "     %s\n", text(c))
		}
	}
	return nil
}

// stepsOf are what an operator does to switch to recovered clusters.
func stepsOf(a *app.App, dev string, done []app.Recovered, differences []app.Difference) (steps []step) {
	var before []string
	for _, d := range differences {
		before = append(before, d.Before...)
	}
	if len(before) > 0 {
		steps = append(steps, do("while the old servers still run: keep what the switch would lose", before...))
	}
	steps = append(steps, do("stop every `oneo serve`, and whoever else writes"))
	var kept []string
	for _, r := range done {
		old := oldFolder(r, dev)
		aside := old + ".before-" + r.Made.UTC().Format("20060102T150405Z")
		kept = append(kept, aside)
		stop, start := control(r, old)
		put := "put the recovered folder in the place of the old one, which is kept"
		if _, err := os.Lstat(r.Data + "-tablespaces"); err == nil {
			put += "; its tablespaces stay in " + r.Data + "-tablespaces"
		}
		steps = append(steps,
			do("stop the old server of cluster "+r.Cluster, stop),
			do(put, "mv "+shellWord(old)+" "+shellWord(aside), "mv "+shellWord(r.Data)+" "+shellWord(old)),
			do("start it, with the settings that it had", start))
	}
	steps = behindTheSwitch(a, steps, false, done, differences)
	return append(steps, do("keep "+strings.Join(kept, ", ")+" until nobody misses anything. Started, it would archive into the same repository: only ever with -c archive_mode=off, on another port"))
}

// behindTheSwitch adds what is done once the recovered clusters run.
func behindTheSwitch(a *app.App, steps []step, dev bool, done []app.Recovered, differences []app.Difference) []step {
	if u, err := url.Parse(a.Config.Redis.URL); err == nil && u.Host != "" && !dev { // dev's own one starts with it, and what it had is not believed
		host, port, err := net.SplitHostPort(u.Host)
		if err != nil {
			host, port = u.Host, "6379"
		}
		steps = append(steps, do("empty Redis: it holds values of a time that is over", fmt.Sprintf("redis-cli -h %s -p %s flushdb", host, port)))
	}
	for _, r := range done {
		shared, tenants := a.Behind(r)
		if shared > 0 {
			steps = append(steps, do("bring the shared tables to this version", "oneo migrate --shared"))
		}
		if tenants {
			steps = append(steps, do("bring tenants to this version", "oneo migrate --all-tenants"))
		}
	}
	var after []string
	for _, d := range differences {
		after = append(after, d.After...)
	}
	if len(after) > 0 {
		steps = append(steps, do("before anybody is served: bring about again what is to be", after...))
	}
	steps = append(steps,
		do(fmt.Sprintf("make a physical backup at once: the cluster goes on with timeline %d, and from older backups no moment behind the switch may be reached", done[0].Timeline), "oneo backup physical create"),
		do("look everything over", "oneo doctor"))
	if !dev {
		steps = append(steps, do("serve", "oneo serve"))
	}
	return steps
}

// oldFolder is the data folder of the cluster that a recovered one replaces, where this machine has it; otherwise words for it.
func oldFolder(r app.Recovered, dev string) string {
	candidates, _ := filepath.Glob(fmt.Sprintf("/var/lib/postgresql/%d/*", r.Major)) // the pattern is whole
	candidates = append(candidates, filepath.Join(dev, "postgres"), os.Getenv("PGDATA"))
	for _, dir := range candidates {
		if dir != "" && physical.SystemOf(dir, r.Major) == r.System {
			return dir
		}
	}
	return "OLD"
}

// control is how the server on a data folder is stopped and started.
func control(r app.Recovered, old string) (stop, start string) {
	if name, ok := strings.CutPrefix(old, fmt.Sprintf("/var/lib/postgresql/%d/", r.Major)); ok {
		if _, err := exec.LookPath("pg_ctlcluster"); err == nil {
			of := fmt.Sprintf("pg_ctlcluster %d %s ", r.Major, name)
			return of + "stop", of + "start"
		}
	}
	if old == "OLD" {
		return fmt.Sprintf("on %s: pg_ctl -D OLD stop -m fast   # OLD: the data folder of the server on port %d", r.Host, r.Port), fmt.Sprintf("on %s: pg_ctl -D OLD start", r.Host)
	}
	return "pg_ctl -D " + shellWord(old) + " stop -m fast", "pg_ctl -D " + shellWord(old) + " start"
}

// shellWord is a word as a shell takes it.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || slices.Contains([]rune("/._-+:=@"), r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
