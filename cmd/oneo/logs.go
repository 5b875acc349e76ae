package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type logsOptions struct {
	tenants []string
	level   string
	since   string
	follow  bool
}

func newLogsCmd(e *env) *cobra.Command {
	var o logsOptions
	cmd := &cobra.Command{
		Use: "logs", Short: "Show the log of all running servers",
		Long: `Read the last lines of the log from every server in public.instances and show them by time. Each server keeps log.keep of them in memory:
those of one that has ended are where its standard error goes. A server that does not answer is named, and makes the exit code 3.
A glob also finds lines of tenants that are called so no more.

--follow goes on with what comes, also from servers that begin later, until it is interrupted. The servers' operators' listeners
(server.ops_addr) must be reachable from here, and server.secret must be theirs.`,
		Example: "  oneo logs --since 5m --level warn\n  oneo logs -t acme -f\n  oneo logs -o json",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return logs(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.tenants, "tenant", "t", nil, "only lines of this tenant: a `NAME` or glob; repeatable")
	f.StringVar(&o.level, "level", "", "only lines from this `LEVEL` on: debug, info, warn or error")
	f.StringVar(&o.since, "since", "15m", "from this `TIME` on: so long ago, 2026-10-01 or RFC 3339")
	f.BoolVarP(&o.follow, "follow", "f", false, "go on with the lines that come; -o json writes one object a line then")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
	return cmd
}

func logs(ctx context.Context, e *env, o logsOptions) error {
	q := observe.LogQuery{Tenants: o.tenants, Level: o.level}
	if o.level != "" && !slices.Contains([]string{"debug", "info", "warn", "error"}, o.level) {
		return errUsage{fault.New(fault.Invalid, "--level is debug, info, warn or error, not %q", o.level)}
	}
	for _, t := range o.tenants {
		if t == "" || strings.ContainsAny(t, `\[]{}@`) {
			return errUsage{fault.New(fault.Invalid, "%q is no tenant name and no pattern", t).WithCode("bad_pattern").WithHint("use a name, or * and ? as in 'acme-*'")}
		}
	}
	var err error
	if q.Since, err = moment(o.since, time.Now()); err != nil {
		return err
	}
	if o.follow && (e.output == "yaml" || e.output == "csv" || e.output == "name") {
		return errUsage{fault.New(fault.Invalid, "--follow writes table, json or ndjson, not %s", e.output)}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if a.Config.Server.Secret == "" {
		return fault.New(fault.Invalid, "server.secret is not set: the servers would not answer").WithCode("no_secret").
			WithHint("set ONEO_SERVER_SECRET as the servers have it")
	}
	for _, name := range o.tenants {
		if strings.ContainsAny(name, "*?") {
			continue
		}
		slug, err := tenant.ParseSlug(name)
		if err != nil {
			return err
		}
		if err := a.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
			_, err := registry.BySlug(ctx, tx, slug)
			return err
		}); err != nil {
			return err
		}
	}
	client := observe.NewClient([]byte(a.Config.Server.Secret))
	defer client.Close()
	servers := func(ctx context.Context) (list []registry.Instance, err error) {
		err = a.DB.InShared(ctx, postgres.Read, func(tx *postgres.Tx) error {
			list, err = registry.Instances(ctx, tx, app.InstanceDead)
			return err
		})
		return list, err
	}
	lost := func(s registry.Instance, err error) {
		f := fault.Of(err)
		e.say("no log of %s: %s", called(s), f.Message)
	}
	if o.follow {
		f := observe.Follower{
			Client: client, Query: q, Servers: servers, Lost: lost,
			Found: func(s registry.Instance) { e.say("the log of %s goes on", called(s)) },
			Asked: func(err error) {
				if err != nil {
					e.say("the list of servers cannot be read; those that are known are followed: %s", fault.Of(err).Message)
				}
			},
			Lines: e.showLines,
		}
		return f.Run(ctx)
	}
	list, err := servers(ctx)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		e.say("no server is running")
	}
	all, missing := client.AllLogs(ctx, list, q)
	if err := ctx.Err(); err != nil {
		return err
	}
	if e.output == "table" {
		err = e.showLines(all)
	} else {
		err = show(e, slices.DeleteFunc(all, func(l observe.LogLine) bool { return l.Missed > 0 }), logColumns)
	}
	if err != nil {
		return err
	}
	for _, m := range missing {
		lost(m.Instance, m.Err)
	}
	if len(missing) > 0 {
		return errExit{exitSomeFailed}
	}
	return nil
}

// called is how a server is named.
func called(s registry.Instance) string { return fmt.Sprintf("%s/%d", s.Host, s.PID) }

var logColumns = []column[observe.LogLine]{
	{"TIME", "time", func(l observe.LogLine) any { return l.At.UTC().Format(time.RFC3339Nano) }},
	{"LEVEL", "level", func(l observe.LogLine) any { return l.Level }},
	{"SERVER", "server", func(l observe.LogLine) any { return called(l.Instance) }},
	{"TENANT", "tenant", func(l observe.LogLine) any { return member(l, "tenant") }},
	{"REQUEST", "request_id", func(l observe.LogLine) any { return member(l, "request_id") }},
	{"MESSAGE", "msg", func(l observe.LogLine) any { return l.Message }},
	{"REST", "attrs", func(l observe.LogLine) any {
		rest := maps.Clone(l.Attrs)
		delete(rest, "tenant")
		delete(rest, "request_id")
		text, _ := json.Marshal(rest) // it was JSON
		return json.RawMessage(text)
	}},
}

// member is a text of a line; nil: it has none.
func member(l observe.LogLine, key string) any {
	if s, _ := l.Attrs[key].(string); s != "" {
		return s
	}
	return nil
}

// showLines writes lines as they come: one text or object each.
func (e *env) showLines(all []observe.LogLine) error {
	for _, l := range all {
		var err error
		switch {
		case l.Missed > 0:
			e.say("%d lines of %s are gone", l.Missed, called(l.Instance))
		case e.output == "table":
			_, err = fmt.Fprintln(e.out, lineText(l))
		default:
			err = json.NewEncoder(e.out).Encode(object(l, logColumns))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// lineText is a line for people: when, how grave, where, for whom, what.
func lineText(l observe.LogLine) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s %-5s %s %s %s", l.At.UTC().Format("2006-01-02T15:04:05.000Z"), l.Level, text(called(l.Instance)), cmp.Or(text(member(l, "tenant")), "-"), text(l.Message))
	for _, key := range slices.Sorted(maps.Keys(l.Attrs)) {
		if v := l.Attrs[key]; key != "tenant" && v != "" {
			fmt.Fprintf(&b, " %s=%s", text(key), text(v))
		}
	}
	return b.String()
}
