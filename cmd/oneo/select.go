package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// selector says which tenants a command is for. Without any it is a usage error, never "all".
type selector struct {
	names   []string
	exclude []string
	states  []string
	group   string
	behind  bool
	all     bool
}

func (s *selector) bind(cmd *cobra.Command, e *env) {
	f := cmd.Flags()
	f.StringArrayVarP(&s.names, "tenant", "t", nil, "tenant `NAME`, glob or @FILE with a name a line; repeatable")
	f.BoolVar(&s.all, "all-tenants", false, "all tenants but dropped ones")
	f.StringArrayVar(&s.exclude, "exclude", nil, "not this `NAME` or glob; wins over --tenant; repeatable")
	f.StringArrayVar(&s.states, "state", nil, "only tenants in this `STATE`: active or suspended; repeatable")
	f.StringVar(&s.group, "group", "", "only tenants of this database `GROUP`")
	f.BoolVar(&s.behind, "behind", false, "only tenants that lack migrations")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
}

func must(err error) {
	if err != nil {
		panic(err) // a flag of our own that does not exist
	}
}

// filter is the registry's filter for the selection.
func (s *selector) filter() (registry.Filter, error) {
	f := registry.Filter{Exclude: s.exclude, Group: s.group}
	if len(s.names) == 0 && !s.all {
		return f, errUsage{fault.New(fault.Invalid, "no tenants are selected").WithCode("no_selector").
			WithHint("add --tenant NAME (repeatable, globs, @file) or --all-tenants")}
	}
	if len(s.names) > 0 && s.all {
		return f, errUsage{fault.New(fault.Invalid, "--tenant and --all-tenants exclude each other").WithCode("two_selectors")}
	}
	for _, n := range s.names {
		path, isFile := strings.CutPrefix(n, "@")
		if !isFile {
			f.Names = append(f.Names, n)
			continue
		}
		file, err := os.Open(path)
		if err != nil {
			return f, fault.Wrap(err, fault.Invalid, "the list of tenants %s cannot be read", path)
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			if name := strings.TrimSpace(lines.Text()); name != "" && !strings.HasPrefix(name, "#") {
				f.Names = append(f.Names, name)
			}
		}
		err = lines.Err()
		_ = file.Close() // read only
		if err != nil {
			return f, fault.Wrap(err, fault.Invalid, "the list of tenants %s cannot be read", path)
		}
		if len(f.Names) == 0 {
			return f, fault.New(fault.Invalid, "the list of tenants %s is empty", path).WithCode("no_selector")
		}
	}
	f.States = []tenant.State{tenant.Active, tenant.Suspended}
	if len(s.states) > 0 {
		f.States = nil
		for _, st := range s.states {
			state, err := tenant.ParseState(st)
			if err != nil {
				return f, err
			}
			f.States = append(f.States, state)
		}
	}
	return f, nil
}

// tenants reads the selected tenants.
func (s *selector) tenants(ctx context.Context, a *app.App) ([]tenant.Tenant, error) {
	f, err := s.filter()
	if err != nil {
		return nil, err
	}
	return s.list(ctx, a, f)
}

// list reads the tenants of the selection's filter.
func (s *selector) list(ctx context.Context, a *app.App, f registry.Filter) (ts []tenant.Tenant, err error) {
	var late map[int32]int
	if s.behind {
		if late, err = lacking(ctx, a); err != nil {
			return nil, err
		}
	}
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if err := knownGroup(ctx, a, tx, s.group); err != nil {
			return err
		}
		ts, err = registry.List(ctx, tx, f)
		return err
	})
	if s.behind {
		ts = slices.DeleteFunc(ts, func(t tenant.Tenant) bool { _, lacks := late[t.Number]; return !lacks })
	}
	return ts, err
}

// knownGroup refuses a group that is neither configured nor any tenant's: mistyped, it would select nobody.
func knownGroup(ctx context.Context, a *app.App, tx *postgres.OwnerTx, name string) error {
	if name == "" || slices.Contains(a.DB.Groups(), name) {
		return nil
	}
	groups, err := registry.Groups(ctx, tx)
	if err != nil {
		return err
	}
	known := slices.Clone(a.DB.Groups())
	for _, g := range groups {
		known = append(known, g.Name)
	}
	if slices.Contains(known, name) {
		return nil
	}
	slices.Sort(known)
	return fault.New(fault.NotFound, "there is no database group %q", name).WithCode("unknown_group").
		WithHint("the groups are: %s", strings.Join(slices.Compact(known), ", "))
}

// tenantNamed reads the one tenant that an argument names.
func tenantNamed(ctx context.Context, a *app.App, name string) (t tenant.Tenant, err error) {
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		t, err = bySlug(ctx, tx, name)
		return err
	})
	return t, err
}

// bySlug finds a tenant by what a person typed; what no tenant can be called is what no tenant is called.
func bySlug(ctx context.Context, tx *postgres.OwnerTx, name string) (tenant.Tenant, error) {
	slug, err := tenant.ParseSlug(name)
	if err != nil {
		return tenant.Tenant{}, err
	}
	return registry.BySlug(ctx, tx, slug)
}

// completeTenants offers live tenant names to the shell.
func (e *env) completeTenants(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
	a, err := e.open()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	err = a.DB.AsOwner(cmd.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		f := registry.Filter{Limit: 200}
		if clean, err := tenant.ParseSlug(strings.TrimRight(begun, "-")); err == nil {
			f.Names = []string{clean.String() + "*"}
		}
		ts, err := registry.List(cmd.Context(), tx, f)
		for _, t := range ts {
			names = append(names, fmt.Sprintf("%s\t%s", t.Slug, t.State))
		}
		return err
	})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

func (e *env) completeFirstTenant(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return e.completeTenants(cmd, args, begun)
}
