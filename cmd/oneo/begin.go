package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// askOptions are the flags of commands that ask something of many tenants and are no migration.
type askOptions struct {
	dryRun   bool
	selector selector
	fleetOptions
}

func (o *askOptions) bind(cmd *cobra.Command, e *env, dryRun string) {
	o.selector.bind(cmd, e)
	o.fleetOptions.bind(cmd)
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, dryRun)
}

// begin finds the tenants to be asked. There are none where nothing is left to do: none is selected, and none, which may
// be nil, is the result; or it was only to be shown which ones they are. check is called before anything is opened.
func (o *askOptions) begin(ctx context.Context, e *env, spec rollout.Spec, none *merged, check func() error) (*app.App, []tenant.Tenant, error) {
	if _, err := o.selector.filter(); err != nil {
		return nil, nil, err
	}
	if err := check(); err != nil {
		return nil, nil, err
	}
	a, err := e.open()
	if err != nil {
		return nil, nil, err
	}
	ts, err := o.selector.tenants(ctx, a)
	switch {
	case err != nil:
		return nil, nil, err
	case o.dryRun:
		return a, nil, showAsked(e, spec, ts)
	case len(ts) > 0:
		return a, ts, nil
	}
	e.say("no tenant is selected: nothing was done")
	if none == nil {
		return a, nil, nil
	}
	return a, nil, none.end()
}

// selected is a selector in a request.
type selected struct {
	All     bool     `json:"all_tenants,omitempty"`
	Tenants []string `json:"tenants,omitempty"`
	Exclude []string `json:"exclude,omitempty"`
	States  []string `json:"states,omitempty"`
	Group   string   `json:"group,omitempty"`
	Behind  bool     `json:"behind,omitempty"`
}

func (s *selector) request() selected {
	return selected{All: s.all, Tenants: s.names, Exclude: s.exclude, States: s.states, Group: s.group, Behind: s.behind}
}

func itemsOf(ts []tenant.Tenant) []rollout.Item {
	items := make([]rollout.Item, len(ts))
	for i, t := range ts {
		items[i].Tenant = t
	}
	return items
}

// asked is one tenant's line of a plan that is no migration.
type asked struct {
	tenant.Tenant
	wave int
}

var askedColumns = []column[asked]{
	{"TENANT", "tenant", func(a asked) any { return a.Slug.String() }},
	{"WAVE", "wave", func(a asked) any { return a.wave + 1 }},
	{"STATE", "state", func(a asked) any { return string(a.State) }},
	{"GROUP", "group", func(a asked) any { return a.Group }},
}

// showAsked shows whom a run would ask.
func showAsked(e *env, spec rollout.Spec, ts []tenant.Tenant) error {
	spec.Items = itemsOf(ts)
	rows := make([]asked, len(ts))
	for i, wave := range spec.Waves() {
		rows[i] = asked{ts[i], wave}
	}
	slices.SortStableFunc(rows, func(a, b asked) int { return a.wave - b.wave })
	e.say("%d tenant(s); nothing was done", len(rows))
	return show(e, rows, askedColumns)
}
