package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type budgetOptions struct {
	tenant             string
	requests, inFlight int
	timeout            time.Duration
	storage            string
	records            int64
	reset              bool
	given              func(flag string) bool
}

func newTenantBudgetCmd(e *env) *cobra.Command {
	var o budgetOptions
	cmd := &cobra.Command{
		Use: "budget NAME", Short: "Show or set what a tenant's requests may take",
		Long: `Show what the requests of a tenant may take and what it keeps, or set it for this tenant. What is
not set for it is the default of budgets.* in the configuration; 0 takes a budget away. Whoever has
used one up is refused, and nobody else: requests and transactions with 429, a statement that takes
too long with 503, what would add to full storage or records with 403.

Requests, transactions and statement time hold for the tenant's requests, not for commands, and in each
server by itself. Servers hear of a change at once while Redis is there, and within seconds otherwise.
Storage and records are measured now, and by ` + "`oneo serve`" + ` every budgets.measure.`,
		Example: "  oneo tenant budget acme\n  oneo tenant budget acme --requests 50 --storage 2GB --records 100000\n  oneo tenant budget acme --reset",
		Args:    usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.tenant, o.given = args[0], cmd.Flags().Changed
			return tenantBudget(cmd.Context(), e, o)
		},
	}
	o.bind(cmd.Flags())
	return cmd
}

func (o *budgetOptions) bind(f *pflag.FlagSet) {
	f.IntVar(&o.requests, "requests", 0, "`N` requests in a second, in each server; 0: no bound")
	f.IntVar(&o.inFlight, "in-flight", 0, "`N` transactions, and so connections, at one time, in each server; 0: tenancy.in_flight")
	f.DurationVar(&o.timeout, "statement-timeout", 0, "the `TIME` of one statement; 0s: database.statement_timeout")
	f.StringVar(&o.storage, "storage", "", "the `SIZE` of its tables with their indexes, for example 2GB; 0: no bound")
	f.Int64Var(&o.records, "records", 0, "`N` records besides those in the trash; 0: no bound")
	f.BoolVar(&o.reset, "reset", false, "take back what was set for this tenant before")
}

// change says what the flags make of a budget; nil: they ask for nothing.
func (o budgetOptions) change() (func(tenant.Budget) tenant.Budget, error) {
	bad := func(flag, format string, args ...any) error {
		return errUsage{fault.New(fault.Invalid, "--%s "+format, append([]any{flag}, args...)...).WithCode("budget")}
	}
	var set []func(*tenant.Budget)
	if o.reset {
		set = append(set, func(b *tenant.Budget) { *b = tenant.Budget{} })
	}
	if o.given("requests") {
		if o.requests < 0 || o.requests > 1_000_000 {
			return nil, bad("requests", "must be from 0 to 1,000,000")
		}
		set = append(set, func(b *tenant.Budget) { b.Requests = orUnlimited(o.requests) })
	}
	if o.given("in-flight") {
		if o.inFlight < 0 || o.inFlight > 10_000 {
			return nil, bad("in-flight", "must be from 0 to 10,000")
		}
		set = append(set, func(b *tenant.Budget) { b.InFlight = orUnlimited(o.inFlight) })
	}
	if o.given("statement-timeout") {
		if o.timeout < 0 || o.timeout > 24*time.Hour || o.timeout%time.Millisecond != 0 {
			return nil, bad("statement-timeout", "must be whole milliseconds up to 24h, or 0s")
		}
		set = append(set, func(b *tenant.Budget) { b.StatementTimeout = orUnlimited(o.timeout) })
	}
	if o.given("storage") {
		size, err := config.ParseSize(o.storage)
		if err != nil {
			return nil, bad("storage", "is wrong: %v", err)
		}
		set = append(set, func(b *tenant.Budget) { b.Storage = orUnlimited(int64(size)) })
	}
	if o.given("records") {
		if o.records < 0 {
			return nil, bad("records", "must not be below 0")
		}
		set = append(set, func(b *tenant.Budget) { b.Records = orUnlimited(o.records) })
	}
	if set == nil {
		return nil, nil
	}
	return func(b tenant.Budget) tenant.Budget {
		for _, s := range set {
			s(&b)
		}
		return b
	}, nil
}

func orUnlimited[T int | int64 | time.Duration](n T) T {
	if n == 0 {
		return tenant.Unlimited
	}
	return n
}

// budgetFlags are the flags that set a budget.
func budgetFlags(b tenant.Budget) string {
	var s strings.Builder
	flag := func(name string, n int64, value any) {
		switch {
		case n < 0:
			fmt.Fprintf(&s, " --%s 0", name)
		case n > 0:
			fmt.Fprintf(&s, " --%s %v", name, value)
		}
	}
	flag("requests", int64(b.Requests), b.Requests)
	flag("in-flight", int64(b.InFlight), b.InFlight)
	flag("statement-timeout", int64(b.StatementTimeout), b.StatementTimeout)
	flag("storage", b.Storage, config.Size(b.Storage))
	flag("records", b.Records, b.Records)
	return s.String()
}

func tenantBudget(ctx context.Context, e *env, o budgetOptions) error {
	change, err := o.change()
	if err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.tenant)
	if err != nil {
		return err
	}
	if change != nil {
		if err := changeBudget(ctx, e, a, t, change); err != nil {
			return err
		}
	}
	b, err := readBudget(ctx, a, t)
	if err != nil {
		return err
	}
	return showOne(e, b, budgetColumns)
}

func changeBudget(ctx context.Context, e *env, a *app.App, t tenant.Tenant, change func(tenant.Budget) tenant.Budget) error {
	var was, is tenant.Budget
	var hosts []tenant.Host
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		if was, is, err = registry.ChangeBudget(ctx, tx, t.Number, change); err != nil {
			return err
		}
		ds, err := registry.Domains(ctx, tx, t)
		if err != nil {
			return err
		}
		for _, d := range ds {
			hosts = append(hosts, d.Host)
		}
		return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.actor(), Action: "tenant.budget", Tenant: t,
			Details: map[string]string{"was": strings.TrimSpace(budgetFlags(was)), "is": strings.TrimSpace(budgetFlags(is))}})
	})
	if err != nil {
		return err
	}
	// What is measured decides who is full: better now than at the servers' next look.
	t.Budget = is.Or(app.BudgetOf(a.Config))
	if t.Budget.Storage > 0 || t.Budget.Records > 0 {
		if err := a.Measure(ctx, t); err != nil {
			e.say("what %s keeps could not be measured, servers will do it: %s", t.Slug, fault.Of(err).Message)
		}
	}
	a.Changed(ctx, t, hosts...)
	e.say("set the budget of tenant %s; undo: oneo tenant budget %s --reset%s", t.Slug, t.Slug, budgetFlags(was))
	return nil
}

// budgetView is what a tenant may take, what is in use, and what of it was set for this tenant.
type budgetView struct {
	Tenant           string       `json:"tenant"`
	Requests         *int         `json:"requests_per_second"`
	InFlight         int          `json:"in_flight"`
	StatementTimeout int64        `json:"statement_timeout_ms"`
	Storage          *config.Size `json:"storage_bytes"`
	StorageUsed      *config.Size `json:"storage_used_bytes"`
	StorageFull      bool         `json:"storage_full"`
	Records          *int64       `json:"records"`
	RecordsUsed      *int64       `json:"records_used"`
	RecordsFull      bool         `json:"records_full"`
	Own              string       `json:"own"`
	MeasuredAt       *time.Time   `json:"measured_at"`
}

// String is the short form.
func (b budgetView) String() string {
	var parts []string
	if b.Requests != nil {
		parts = append(parts, fmt.Sprintf("%d requests/s", *b.Requests))
	}
	parts = append(parts, fmt.Sprintf("%d in flight", b.InFlight), fmt.Sprintf("%s a statement", time.Duration(b.StatementTimeout)*time.Millisecond))
	if b.Storage != nil {
		parts = append(parts, "storage "+used(b.StorageUsed, *b.Storage))
	}
	if b.Records != nil {
		parts = append(parts, "records "+used(b.RecordsUsed, *b.Records))
	}
	return strings.Join(parts, ", ")
}

// used is how much of a limit is in use.
func used[T any](n *T, limit T) string {
	if n == nil {
		return fmt.Sprintf("? of %v", limit)
	}
	return fmt.Sprintf("%v of %v", *n, limit)
}

var budgetColumns = []column[budgetView]{
	{"TENANT", "tenant", func(b budgetView) any { return b.Tenant }},
	{"REQUESTS PER SECOND", "requests_per_second", func(b budgetView) any { return deref(b.Requests) }},
	{"IN FLIGHT", "in_flight", func(b budgetView) any { return b.InFlight }},
	{"STATEMENT MS", "statement_timeout_ms", func(b budgetView) any { return b.StatementTimeout }},
	{"STORAGE", "storage_bytes", func(b budgetView) any { return deref(b.Storage) }},
	{"STORAGE USED", "storage_used_bytes", func(b budgetView) any { return deref(b.StorageUsed) }},
	{"STORAGE FULL", "storage_full", func(b budgetView) any { return b.StorageFull }},
	{"RECORDS", "records", func(b budgetView) any { return deref(b.Records) }},
	{"RECORDS USED", "records_used", func(b budgetView) any { return deref(b.RecordsUsed) }},
	{"RECORDS FULL", "records_full", func(b budgetView) any { return b.RecordsFull }},
	{"OWN", "own", func(b budgetView) any { return b.Own }},
	{"MEASURED", "measured_at", func(b budgetView) any { return b.MeasuredAt }},
}

// deref is a value that may be missing.
func deref[T any](p *T) any {
	if p == nil {
		return nil
	}
	return *p
}

// limited is a limit as it is shown; nil: there is none.
func limited[T int | int64 | config.Size](n T) *T {
	if n == 0 {
		return nil
	}
	return &n
}

func readBudget(ctx context.Context, a *app.App, t tenant.Tenant) (v budgetView, err error) {
	var own tenant.Budget
	var use tenant.Use
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		own, use, v.MeasuredAt, err = registry.BudgetOf(ctx, tx, t.Number)
		return err
	})
	if err != nil {
		return v, err
	}
	b := own.Or(app.BudgetOf(a.Config))
	v.Tenant, v.Own = t.Slug.String(), strings.TrimSpace(budgetFlags(own))
	v.Requests, v.Storage, v.Records = limited(b.Requests), limited(config.Size(b.Storage)), limited(b.Records)
	v.StorageFull, v.RecordsFull = tenant.Full(use.Storage, b.Storage, use.StorageFull), tenant.Full(use.Records, b.Records, use.RecordsFull)
	if v.MeasuredAt != nil && v.Storage != nil {
		size := config.Size(use.Storage)
		v.StorageUsed = &size
	}
	if v.MeasuredAt != nil && v.Records != nil {
		v.RecordsUsed = &use.Records
	}
	v.StatementTimeout = a.Config.Database.StatementTimeout.Milliseconds()
	if d := b.StatementTimeout.Milliseconds(); d > 0 {
		v.StatementTimeout = min(d, v.StatementTimeout)
	}
	t.Budget = b
	v.InFlight, err = a.DB.MostInFlight(ctx, t)
	return v, err
}
