package main

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/inspect"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// inspectOptions are those of all questions. Without a selection they are about the whole fleet, spares and dropped tenants included: nothing is changed.
type inspectOptions struct {
	selector selector
	limit    int
	timeout  time.Duration
	all      bool
	text     bool
}

const hiddenHint = "run `oneo init` with a superuser's URL, or `grant pg_read_all_stats to oneo_owner` (the owner's role) as a superuser"

func newInspectCmd(e *env) *cobra.Command {
	return noun("inspect", "What tenants cost PostgreSQL, and who is at work", `Ask PostgreSQL's own views, once for each database group: what each tenant's schema takes, which statements
cost most, who holds and waits for locks. Nothing is changed and nobody is kept waiting. Without -t it is about the whole fleet.`,
		"  oneo inspect sizes\n  oneo inspect queries -t acme\n  oneo inspect blocking",
		newInspectQueriesCmd(e), newInspectSizesCmd(e), newInspectLocksCmd(e), newInspectBlockingCmd(e), newInspectPoolCmd(e),
		newInspectIndexesCmd(e), newInspectBloatCmd(e), newInspectVacuumCmd(e))
}

// inspection makes the command of one question.
func inspection(e *env, use, short, long, example string, ask func(ctx context.Context, e *env, o inspectOptions) error, flags func(*cobra.Command, *inspectOptions)) *cobra.Command {
	var o inspectOptions
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Example: example, Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.limit < 0 {
				return errUsage{fault.New(fault.Invalid, "--limit cannot be negative")}
			}
			return ask(cmd.Context(), e, o)
		}}
	o.selector.bind(cmd, e)
	cmd.Flags().IntVar(&o.limit, "limit", 25, "show so many `ROWS`; 0: all")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 30*time.Second, "for each database group")
	if flags != nil {
		flags(cmd, &o)
	}
	return cmd
}

// found is an answer and where it is from.
type found[T any] struct {
	tenant string // empty: of no tenant
	group  string
	row    T
}

// inspectFleet asks each group's database and orders what they say. A group that does not answer is told, and makes the exit code 3 unless it is
// the only one.
func inspectFleet[T any](ctx context.Context, e *env, o inspectOptions, ask func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]T, error),
	whose func(T) int32, order func(a, b T) int, columns []column[found[T]]) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	all := len(o.selector.names) == 0
	narrowed := !all || len(o.selector.exclude)+len(o.selector.states) > 0 || o.selector.behind
	o.selector.all = all
	filter, err := o.selector.filter()
	if err != nil {
		return err
	}
	if !narrowed { // dropped ones too: they take their place until they are purged
		filter.States = nil
	}
	ts, err := o.selector.list(ctx, a, filter)
	if err != nil {
		return err
	}
	names, of := map[int32]string{}, map[string][]int32{}
	for _, t := range ts {
		names[t.Number] = t.Slug.String()
		of[t.Group] = append(of[t.Group], t.Number)
	}
	var rows []found[T]
	var failed []string
	var first error
	asked := 0
	for _, group := range a.DB.Groups() {
		if o.selector.group != "" && o.selector.group != group || narrowed && len(of[group]) == 0 {
			continue
		}
		asked++
		numbers := of[group]
		if !narrowed {
			numbers = nil
		}
		got, err := inspectGroup(ctx, a, group, o, numbers, ask)
		if err != nil {
			failed, first = append(failed, fmt.Sprintf("group %s: %s", group, fault.Of(err).Message)), cmp.Or(first, err)
			continue
		}
		for _, row := range got {
			rows = append(rows, found[T]{nameOf(names, whose(row)), group, row})
		}
	}
	if first != nil && asked == len(failed) {
		return first
	}
	if order != nil {
		slices.SortStableFunc(rows, func(a, b found[T]) int { return order(a.row, b.row) })
	}
	more := 0
	if o.limit > 0 && len(rows) > o.limit {
		more, rows = len(rows)-o.limit, rows[:o.limit]
	}
	if err := show(e, rows, columns); err != nil {
		return err
	}
	switch {
	case more > 0:
		e.say("and %d more: --limit 0 shows all", more)
	case len(rows) == 0:
		e.say("there is nothing to show")
	}
	for _, f := range failed {
		e.say("%s", f)
	}
	if first != nil {
		return errExit{exitSomeFailed}
	}
	return nil
}

func inspectGroup[T any](ctx context.Context, a *app.App, group string, o inspectOptions, of []int32,
	ask func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]T, error)) (rows []T, err error) {
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	err = a.DB.AsOwnerWithin(ctx, group, postgres.OwnerOptions{LockTimeout: time.Second, StatementTimeout: o.timeout}, func(tx *postgres.OwnerTx) error {
		rows, err = ask(ctx, tx, of)
		return err
	})
	return rows, err
}

// nameOf is how a tenant is called; what has no name by the registry, as a spare, is named by its number.
func nameOf(names map[int32]string, number int32) string {
	if number == 0 {
		return ""
	}
	if name, ok := names[number]; ok {
		return name
	}
	return "#" + strconv.Itoa(int(number))
}

// bytesOf and lasting are shown for people in a table, and as numbers in JSON.
type (
	bytesOf int64
	lasting int64 // milliseconds
)

func (b bytesOf) String() string { return size(int64(b)) }

func (l lasting) String() string {
	d := time.Duration(l) * time.Millisecond
	if d >= time.Second {
		d = d.Round(100 * time.Millisecond)
	}
	return d.String()
}

// lastingOr is nil where it is not known.
func lastingOr(ms *int64) any {
	if ms == nil {
		return nil
	}
	return lasting(*ms)
}

// millis is a time that PostgreSQL has measured.
func millis(ms float64) float64 { return float64(int64(ms*1000+0.5)) / 1000 }

func perTenant[T any](rest ...column[found[T]]) []column[found[T]] {
	return append([]column[found[T]]{{"TENANT", "tenant", func(f found[T]) any { return f.tenant }}, {"GROUP", "group", func(f found[T]) any { return f.group }}}, rest...)
}

func newInspectSizesCmd(e *env) *cobra.Command {
	type row = found[inspect.Size]
	columns := perTenant(
		column[row]{"SIZE", "size_bytes", func(r row) any { return bytesOf(r.row.Bytes) }},
		column[row]{"TABLES", "tables", func(r row) any { return r.row.Tables }},
		column[row]{"DATA", "data_bytes", func(r row) any { return bytesOf(r.row.Heap) }},
		column[row]{"INDEXES", "indexes_bytes", func(r row) any { return bytesOf(r.row.Indexes) }},
		column[row]{"ROWS", "rows_estimated", func(r row) any { return r.row.Rows }},
		column[row]{"LOCKED", "locked_tables", func(r row) any { return r.row.Locked }},
	)
	return inspection(e, "sizes", "What each tenant takes on the disk", `Measure each tenant's tables and indexes, the largest first. Rows are PostgreSQL's estimate of the last analyze. A table that somebody
holds for himself at this moment (LOCKED) is not waited for and not counted.`, "  oneo inspect sizes --limit 10\n  oneo inspect sizes -t acme -o json",
		func(ctx context.Context, e *env, o inspectOptions) error {
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Size, error) {
				return inspect.Sizes(ctx, tx, of)
			},
				func(s inspect.Size) int32 { return s.Tenant }, func(a, b inspect.Size) int { return cmp.Compare(b.Bytes, a.Bytes) }, columns)
		}, nil)
}

func newInspectQueriesCmd(e *env) *cobra.Command {
	type row = found[inspect.Statement]
	columns := perTenant(
		column[row]{"CALLS", "calls", func(r row) any { return r.row.Calls }},
		column[row]{"TOTAL MS", "total_ms", func(r row) any { return millis(r.row.Total) }},
		column[row]{"MEAN MS", "mean_ms", func(r row) any { return millis(r.row.Mean) }},
		column[row]{"ROWS", "rows", func(r row) any { return r.row.Rows }},
		column[row]{"READS", "blocks_read", func(r row) any { return r.row.Reads }},
		column[row]{"STATEMENT", "statement", func(r row) any {
			if e.output == "table" {
				return clipped(r.row.Text, 80)
			}
			return r.row.Text
		}},
	)
	return inspection(e, "queries", "Which statements cost most, by tenant", `Read what the extension pg_stat_statements has counted since it was reset: the statements that took most time, with $1 for each literal.

Each tenant works under a role of its own, by which PostgreSQL tells the lines apart, in every version. With tenancy.isolation: schema
there is no such role: PostgreSQL before 18 still counts each tenant's tables apart but does not say whose they are, and PostgreSQL 18 and
later count tables of one name in all schemas together. The command says which it is.`, "  oneo inspect queries\n  oneo inspect queries -t acme -o json",
		func(ctx context.Context, e *env, o inspectOptions) error {
			c, err := e.load()
			if err != nil {
				return err
			}
			byRole := postgres.Isolation(c.Tenancy.Isolation) == postgres.ByRole
			told := map[inspect.Split]bool{}
			hidden := false
			return errorAfter(inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Statement, error) {
				all, split, err := inspect.Statements(ctx, tx, of, byRole, o.limit)
				if err == nil && !told[split] {
					told[split] = true
					e.say("told apart %s", split)
				}
				for _, s := range all {
					hidden = hidden || s.Text == ""
				}
				return all, err
			}, func(s inspect.Statement) int32 { return s.Tenant }, func(a, b inspect.Statement) int { return cmp.Compare(b.Total, a.Total) }, columns), func() {
				if hidden {
					e.say("PostgreSQL hides statements of other roles from the owner: %s", hiddenHint)
				}
			})
		}, nil)
}

// errorAfter says something behind what was shown.
func errorAfter(err error, say func()) error {
	if err == nil {
		say()
	}
	return err
}

// clipped is a text without line breaks, cut for a table.
func clipped(s string, most int) string {
	var b []rune
	space := false
	for _, r := range s {
		if r == '\n' || r == '\t' || r == '\r' || r == ' ' {
			space = len(b) > 0
			continue
		}
		if space {
			b, space = append(b, ' '), false
		}
		if b = append(b, r); len(b) > most {
			return string(b[:most-1]) + "…"
		}
	}
	return string(b)
}

func newInspectLocksCmd(e *env) *cobra.Command {
	type row = found[inspect.Lock]
	columns := perTenant(
		column[row]{"ON", "on", func(r row) any { return r.row.On }},
		column[row]{"MODE", "mode", func(r row) any { return r.row.Mode }},
		column[row]{"GRANTED", "granted", func(r row) any { return r.row.Granted }},
		column[row]{"WAITING", "waiting_ms", func(r row) any { return lasting(r.row.Waiting) }},
		column[row]{"PID", "pid", func(r row) any { return r.row.PID }},
		column[row]{"LOGIN", "login", func(r row) any { return r.row.User }},
		column[row]{"PROGRAM", "program", func(r row) any { return r.row.Application }},
		column[row]{"STATE", "state", func(r row) any { return r.row.State }},
		column[row]{"TRANSACTION", "transaction_ms", func(r row) any { return lastingOr(r.row.Transaction) }},
	)
	return inspection(e, "locks", "Who holds and waits for locks", `Read the locks on tenants' tables and indexes and oneo's own two locks of a tenant: its gate, which requests take shared and changes of the
tenant for themselves, and the lock of the one operation that may be at work on it. Those that are waited for come first. What reading and writing takes is left
out as long as it is granted, unless --every is given.`, "  oneo inspect locks\n  oneo inspect locks -t acme --every",
		func(ctx context.Context, e *env, o inspectOptions) error {
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Lock, error) {
				return inspect.Locks(ctx, tx, of, o.all)
			},
				func(l inspect.Lock) int32 { return l.Tenant }, func(a, b inspect.Lock) int { return cmp.Compare(b.Waiting, a.Waiting) }, columns)
		}, func(cmd *cobra.Command, o *inspectOptions) {
			cmd.Flags().BoolVar(&o.all, "every", false, "also what reading and writing takes")
		})
}

func newInspectBlockingCmd(e *env) *cobra.Command {
	type row = found[inspect.Wait]
	columns := perTenant(
		column[row]{"PID", "pid", func(r row) any { return r.row.PID }},
		column[row]{"LOGIN", "login", func(r row) any { return r.row.User }},
		column[row]{"ON", "on", func(r row) any { return r.row.On }},
		column[row]{"MODE", "mode", func(r row) any { return r.row.Mode }},
		column[row]{"WAITING", "waiting_ms", func(r row) any { return lasting(r.row.Waiting) }},
		column[row]{"BY", "by_pid", func(r row) any { return r.row.By }},
		column[row]{"LOGIN", "by_login", func(r row) any { return r.row.ByUser }},
		column[row]{"STATE", "by_state", func(r row) any { return r.row.ByState }},
		column[row]{"TRANSACTION", "by_transaction_ms", func(r row) any { return lastingOr(r.row.Transaction) }},
	)
	return inspection(e, "blocking", "Who waits for whom", `Read which sessions wait for a lock and which stand in their way, the longest wait first. --text shows what those in the way run or ran last, with all
its literals: a tenant's data may be among them.`, "  oneo inspect blocking\n  oneo inspect blocking --text",
		func(ctx context.Context, e *env, o inspectOptions) error {
			shown := columns
			if o.text {
				shown = append(slices.Clone(columns), column[row]{"STATEMENT", "by_statement", func(r row) any { return r.row.Text }})
			}
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Wait, error) {
				return inspect.Waits(ctx, tx, of, o.text)
			},
				func(w inspect.Wait) int32 { return w.Tenant }, func(a, b inspect.Wait) int { return cmp.Compare(b.Waiting, a.Waiting) }, shown)
		}, func(cmd *cobra.Command, o *inspectOptions) {
			cmd.Flags().BoolVar(&o.text, "text", false, "show the statements of those in the way, literals and all")
		})
}

func newInspectPoolCmd(e *env) *cobra.Command {
	type row = found[inspect.Sessions]
	columns := []column[row]{
		{"LOGIN", "login", func(r row) any { return r.row.User }},
		{"GROUP", "group", func(r row) any { return r.group }},
		{"PROGRAM", "program", func(r row) any { return r.row.Application }},
		{"SESSIONS", "sessions", func(r row) any { return r.row.All }},
		{"ACTIVE", "active", func(r row) any { return r.row.Active }},
		{"IDLE", "idle", func(r row) any { return r.row.Idle }},
		{"IDLE IN TX", "idle_in_transaction", func(r row) any { return r.row.InIdle }},
		{"WAITING", "waiting", func(r row) any { return r.row.Waiting }},
		{"HIDDEN", "hidden", func(r row) any { return r.row.Hidden }},
		{"OLDEST TX", "oldest_transaction_ms", func(r row) any { return lastingOr(r.row.Oldest) }},
		{"OF", "max_connections", func(r row) any { return r.row.Limit }},
	}
	cmd := &cobra.Command{Use: "pool", Short: "Who is connected", Args: usageArgs(cobra.NoArgs), Example: "  oneo inspect pool\n  oneo inspect pool -o json",
		Long: `Read the sessions of each group's database by login and program, most first, and what they do. A login that ends with a number serves the tenants
of one sub-pool. WAITING counts those that wait for a lock, OF is how many the server
admits in all.`}
	o := inspectOptions{}
	cmd.Flags().StringVar(&o.selector.group, "group", "", "only this database `GROUP`")
	cmd.Flags().DurationVar(&o.timeout, "timeout", 30*time.Second, "for each database group")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		hidden := int64(0)
		ask := func(ctx context.Context, tx *postgres.OwnerTx, _ []int32) ([]inspect.Sessions, error) {
			all, err := inspect.Pool(ctx, tx)
			for _, s := range all {
				hidden += s.Hidden
			}
			return all, err
		}
		return errorAfter(inspectFleet(cmd.Context(), e, o, ask, func(inspect.Sessions) int32 { return 0 }, nil, columns), func() {
			if hidden > 0 {
				e.say("PostgreSQL hides from the owner what %d session(s) do: %s", hidden, hiddenHint)
			}
		})
	}
	return cmd
}

func newInspectIndexesCmd(e *env) *cobra.Command {
	type row = found[inspect.Index]
	columns := []column[row]{
		{"INDEX", "index", func(r row) any { return r.row.Index }},
		{"TABLE", "table", func(r row) any { return r.row.Table }},
		{"GROUP", "group", func(r row) any { return r.group }},
		{"KIND", "kind", func(r row) any { return r.row.Kind }},
		{"TENANTS", "tenants", func(r row) any { return r.row.Tenants }},
		{"SIZE", "size_bytes", func(r row) any { return bytesOf(r.row.Bytes) }},
		{"SCANS", "scans", func(r row) any { return r.row.Scans }},
		{"UNUSED IN", "unused_tenants", func(r row) any { return r.row.Unused }},
		{"INVALID IN", "invalid_tenants", func(r row) any { return r.row.Invalid }},
		{"DOUBLED IN", "doubled_tenants", func(r row) any { return r.row.Doubled }},
	}
	return inspection(e, "indexes", "Which indexes are broken, double or unused", `Read the tenants' indexes by name, over all tenants: an index that no tenant uses can go by one migration. Broken ones come first (INVALID IN so many tenants:
a concurrent creation that failed), then those with the same definition as another of their table, then the least used. Scans are counted since the statistics were reset; a unique or primary index
that is never scanned still holds its promise.`, "  oneo inspect indexes\n  oneo inspect indexes -t acme --limit 0",
		func(ctx context.Context, e *env, o inspectOptions) error {
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Index, error) {
				return inspect.Indexes(ctx, tx, of)
			},
				func(inspect.Index) int32 { return 0 }, nil, columns)
		}, nil)
}

func newInspectBloatCmd(e *env) *cobra.Command {
	type row = found[inspect.Bloat]
	columns := perTenant(
		column[row]{"DEAD ROWS", "dead_rows", func(r row) any { return r.row.Dead }},
		column[row]{"LIVE ROWS", "live_rows", func(r row) any { return r.row.Live }},
		column[row]{"DEAD", "dead_bytes_estimated", func(r row) any { return bytesOf(r.row.Bytes) }},
		column[row]{"WORST", "worst_table", func(r row) any { return r.row.Worst }},
	)
	return inspection(e, "bloat", "Whose tables are full of dead rows", `Read how many rows of each tenant are dead and wait for vacuum, most bytes first. It is PostgreSQL's estimate since the statistics were reset: what
vacuum has left behind as free room in a file is not in it.`, "  oneo inspect bloat\n  oneo inspect bloat -t acme",
		func(ctx context.Context, e *env, o inspectOptions) error {
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Bloat, error) {
				return inspect.Bloats(ctx, tx, of)
			},
				func(b inspect.Bloat) int32 { return b.Tenant }, func(a, b inspect.Bloat) int {
					return cmp.Or(cmp.Compare(b.Bytes, a.Bytes), cmp.Compare(b.Dead, a.Dead))
				}, columns)
		}, nil)
}

func newInspectVacuumCmd(e *env) *cobra.Command {
	type row = found[inspect.Vacuum]
	columns := perTenant(
		column[row]{"TABLES", "tables", func(r row) any { return r.row.Tables }},
		column[row]{"DUE", "due_tables", func(r row) any { return r.row.Due }},
		column[row]{"NEVER ANALYZED", "never_analyzed_tables", func(r row) any { return r.row.Never }},
		column[row]{"MODIFIED", "modified_rows", func(r row) any { return r.row.Modified }},
		column[row]{"XID AGE", "xid_age", func(r row) any { return r.row.Age }},
		column[row]{"OF FREEZE MAX %", "freeze_max_age_percent", func(r row) any { return r.row.Percent }},
	)
	return inspection(e, "vacuum", "How tenants' tables are looked after", `Read which tables autovacuum would take up now (DUE), which were never analyzed, how many rows were changed since, and how old the oldest transaction id of a tenant is: from
100 % of autovacuum_freeze_max_age on PostgreSQL vacuums against wraparound. The oldest come first.`, "  oneo inspect vacuum\n  oneo inspect vacuum --group eu --limit 5",
		func(ctx context.Context, e *env, o inspectOptions) error {
			return inspectFleet(ctx, e, o, func(ctx context.Context, tx *postgres.OwnerTx, of []int32) ([]inspect.Vacuum, error) {
				return inspect.Vacuums(ctx, tx, of)
			},
				func(v inspect.Vacuum) int32 { return v.Tenant }, func(a, b inspect.Vacuum) int { return cmp.Or(cmp.Compare(b.Age, a.Age), cmp.Compare(b.Due, a.Due)) }, columns)
		}, nil)
}
