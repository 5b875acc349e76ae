package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"

	"math"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type topOptions struct {
	once     bool
	readings int
	sort     string
	interval time.Duration
}

func newTopCmd(e *env) *cobra.Command {
	var o topOptions
	cmd := &cobra.Command{
		Use: "top", Short: "Show the tenants by load, live",
		Long: `Show the tenants by load, like top: their requests, errors and refusals in a second, the requests at
work, their share of all tenants' time in the database, rows in a second, the 95th percentile of
their answers in the last minute, and the budget of which they have used most. The running servers are
asked (server.ops_addr); one that does not answer is named. The percentile is the slowest server's.

On a terminal the screen is drawn anew with each reading, until Ctrl-C; otherwise each reading is a table. A
reading is the difference of two samples: -o json gives one.`,
		Example: "  oneo top\n  oneo top --once --sort refused\n  oneo top -n 3 --interval 10s -o ndjson",
		Args:    usageArgs(cobra.NoArgs),
		RunE:    func(cmd *cobra.Command, _ []string) error { return top(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.once, "once", false, "one reading, as -n 1")
	f.IntVarP(&o.readings, "readings", "n", 0, "end after `N` readings; 0: go on")
	f.StringVar(&o.sort, "sort", "db", "by `COLUMN`: "+strings.Join(topOrders, ", "))
	f.DurationVar(&o.interval, "interval", 2*time.Second, "the `TIME` between two samples, at least 200ms")
	must(cmd.RegisterFlagCompletionFunc("sort", cobra.FixedCompletions(topOrders, cobra.ShellCompDirectiveNoFileComp)))
	return cmd
}

func (o *topOptions) check(e *env) error {
	switch {
	case !slices.Contains(topOrders, o.sort):
		return errUsage{fault.New(fault.Invalid, "there is no column %q to sort by", o.sort).WithHint("use one of %s", strings.Join(topOrders, ", "))}
	case o.interval < 200*time.Millisecond:
		return errUsage{fault.New(fault.Invalid, "--interval must be at least 200ms")}
	case o.readings < 0:
		return errUsage{fault.New(fault.Invalid, "-n must not be below 0")}
	case o.once && o.readings > 1:
		return errUsage{fault.New(fault.Invalid, "--once and -n exclude each other")}
	}
	single := slices.Contains([]string{"json", "yaml"}, e.output)
	if single && o.readings > 1 {
		return errUsage{fault.New(fault.Invalid, "-o %s gives one reading", e.output).WithHint("use -o ndjson")}
	}
	if single || o.once {
		o.readings = 1
	}
	return nil
}

// usage is how much of a limit is used.
type usage struct {
	Used  float64 `json:"used"`
	Limit float64 `json:"limit"`
}

// topBudget is what a tenant has used of its budgets, of those that there are.
type topBudget struct {
	Requests *usage `json:"requests_per_second,omitempty"`
	InFlight *usage `json:"in_flight,omitempty"`
	Storage  *usage `json:"storage_bytes,omitempty"`
	Records  *usage `json:"records,omitempty"`
}

// String is the one of which most is used.
func (b topBudget) String() string {
	text, most := "", -1.0
	for _, u := range []struct {
		name string
		*usage
	}{{"requests", b.Requests}, {"in flight", b.InFlight}, {"storage", b.Storage}, {"records", b.Records}} {
		if u.usage != nil && u.Limit > 0 && u.Used/u.Limit > most {
			most = u.Used / u.Limit
			text = fmt.Sprintf("%s %.0f%%", u.name, 100*most)
		}
	}
	return text
}

// topRow is one tenant in one reading.
type topRow struct {
	number                         int32
	tenant                         string
	requests, errors, refused      float64 // in a second
	inFlight                       int64
	databaseSeconds, databaseShare float64 // in a second; of all tenants', in percent
	rows                           float64
	p95                            float64
	budget                         topBudget
}

var topColumns = []column[topRow]{
	{"TENANT", "tenant", func(r topRow) any { return r.tenant }},
	{"REQ/S", "requests_per_second", func(r topRow) any { return rate(r.requests) }},
	{"ERR/S", "errors_per_second", func(r topRow) any { return rate(r.errors) }},
	{"REF/S", "refused_per_second", func(r topRow) any { return rate(r.refused) }},
	{"FLIGHT", "in_flight", func(r topRow) any { return r.inFlight }},
	{"DB", "database_seconds_per_second", func(r topRow) any { return rate(r.databaseSeconds) }},
	{"DB %", "database_share_percent", func(r topRow) any { return rate(r.databaseShare) }},
	{"ROWS/S", "rows_per_second", func(r topRow) any { return rate(r.rows) }},
	{"P95 MS", "p95_ms", func(r topRow) any { return rate(r.p95) }},
	{"BUDGET", "budget", func(r topRow) any { return r.budget }},
}

// rate is a number with as many digits as say something.
func rate(x float64) float64 {
	if x >= 100 {
		return math.Round(x)
	}
	return math.Round(x*100) / 100
}

var topOrders = []string{"db", "requests", "errors", "refused", "in-flight", "rows", "p95", "tenant"}

// sortTop puts the most loaded first; equal ones stand by name.
func sortTop(rows []topRow, by string) {
	value := map[string]func(topRow) float64{
		"db": func(r topRow) float64 { return r.databaseSeconds }, "requests": func(r topRow) float64 { return r.requests },
		"errors": func(r topRow) float64 { return r.errors }, "refused": func(r topRow) float64 { return r.refused },
		"in-flight": func(r topRow) float64 { return float64(r.inFlight) }, "rows": func(r topRow) float64 { return r.rows },
		"p95": func(r topRow) float64 { return r.p95 }, "tenant": func(topRow) float64 { return 0 },
	}[by]
	slices.SortFunc(rows, func(a, b topRow) int {
		return cmp.Or(cmp.Compare(value(b), value(a)), cmp.Compare(b.requests, a.requests), cmp.Compare(a.tenant, b.tenant))
	})
}

// sample is what all servers said at one time.
type sample struct {
	at      time.Time // by this process's clock, which is never set back in between: a server's may be
	servers []observe.Reading
}

// topReading is the difference of two samples.
type topReading struct {
	rows                      []topRow
	requests, errors, refused float64 // of all, tenants or not
	answered                  int
	silent                    []string
}

// compare makes a reading. Counts of a server that was not in the first sample have no difference yet; those of a tenant
// that it had not held apart began at 0.
func compare(before, now sample) (r topReading) {
	seconds := max(now.at.Sub(before.at).Seconds(), 1e-3)
	was := map[uuid.UUID]observe.Stats{}
	for _, s := range before.servers {
		if s.Err == nil {
			was[s.Stats.Instance] = s.Stats
		}
	}
	byNumber := map[int32]*topRow{}
	total := 0.0
	for _, s := range now.servers {
		if s.Err != nil {
			r.silent = append(r.silent, fmt.Sprintf("%s (%s): %s", s.Instance.Host, s.Instance.OpsAddr, fault.Of(s.Err).Message))
			continue
		}
		r.answered++
		first, known := was[s.Stats.Instance]
		if known {
			d := since(first.All, s.Stats.All)
			r.requests, r.errors, r.refused = r.requests+float64(d.Requests)/seconds, r.errors+float64(d.Errors)/seconds, r.refused+float64(d.Refused)/seconds
		}
		loads := make(map[int32]observe.Load, len(first.Tenants))
		for _, t := range first.Tenants {
			loads[t.Number] = t.Load
		}
		for _, t := range s.Stats.Tenants {
			row := byNumber[t.Number]
			if row == nil {
				row = &topRow{number: t.Number}
				byNumber[t.Number] = row
			}
			row.tenant = t.Tenant
			row.inFlight += t.InFlight
			row.p95 = max(row.p95, t.P95)
			if !known {
				continue
			}
			d := since(loads[t.Number], t.Load)
			row.requests += float64(d.Requests) / seconds
			row.errors += float64(d.Errors) / seconds
			row.refused += float64(d.Refused) / seconds
			row.databaseSeconds += d.DatabaseSeconds / seconds
			row.rows += float64(d.Rows) / seconds
			total += d.DatabaseSeconds / seconds
		}
	}
	for _, row := range byNumber {
		if total > 0 {
			row.databaseShare = 100 * row.databaseSeconds / total
		}
		r.rows = append(r.rows, *row)
	}
	return r
}

// since is what has come on top. Counts that have shrunk were given up meanwhile and began anew.
func since(before, now observe.Load) observe.Load {
	if now.Requests < before.Requests || now.DatabaseSeconds < before.DatabaseSeconds || now.Rows < before.Rows {
		return now
	}
	now.Requests -= before.Requests
	now.Errors -= before.Errors
	now.Refused -= before.Refused
	now.DatabaseSeconds -= before.DatabaseSeconds
	now.Rows -= before.Rows
	return now
}

// topPatience is for how long PostgreSQL is waited for: one that hangs leaves what it said before.
const topPatience = 3 * time.Second

// topBoard is what one run of the command knows.
type topBoard struct {
	a        *app.App
	client   *observe.Client
	defaults tenant.Budget
	servers  []registry.Instance
	lost     error // why PostgreSQL could not be asked last
}

// sample asks the servers; who they are is PostgreSQL's to say, and what it said last when it is away.
func (b *topBoard) sample(ctx context.Context) sample {
	asking, cancel := context.WithTimeout(ctx, topPatience)
	defer cancel()
	err := b.a.DB.AsOwner(asking, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		found, err := registry.Instances(asking, tx, app.InstanceDead)
		if err == nil {
			b.servers = found
		}
		return err
	})
	b.lost = err
	servers := b.client.Stats(ctx, b.servers)
	return sample{at: time.Now(), servers: servers}
}

// budgets adds what the tenants have used of theirs.
func (b *topBoard) budgets(ctx context.Context, r *topReading) error {
	ctx, cancel := context.WithTimeout(ctx, topPatience)
	defer cancel()
	numbers := make([]int32, len(r.rows))
	for i, row := range r.rows {
		numbers[i] = row.number
	}
	var own map[int32]tenant.Tenant
	var placed []tenant.Tenant
	err := b.a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		if own, err = registry.Budgets(ctx, tx, numbers); err != nil {
			return err
		}
		placed, err = registry.ByNumbers(ctx, tx, numbers)
		return err
	})
	if err != nil {
		return err
	}
	groups := make(map[int32]tenant.Tenant, len(placed))
	for _, t := range placed {
		groups[t.Number] = t
	}
	for i := range r.rows {
		row := &r.rows[i]
		t, there := groups[row.number]
		if !there {
			continue
		}
		t.Budget, t.Use = own[row.number].Budget.Or(b.defaults), own[row.number].Use
		share := func(used, limit float64) *usage {
			if limit <= 0 {
				return nil
			}
			return &usage{Used: rate(used), Limit: limit}
		}
		servers := float64(r.answered)
		row.budget = topBudget{
			Requests: share(row.requests, float64(t.Budget.Requests)*servers),
			Storage:  share(float64(t.Use.Storage), float64(t.Budget.Storage)), Records: share(float64(t.Use.Records), float64(t.Budget.Records)),
		}
		if most, err := b.a.DB.MostInFlight(ctx, t); err == nil {
			row.budget.InFlight = share(float64(row.inFlight), float64(most)*servers)
		}
	}
	return nil
}

func top(ctx context.Context, e *env, o topOptions) error {
	if err := o.check(e); err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if a.Config.Server.Secret == "" {
		return fault.New(fault.Invalid, "server.secret is not set: servers tell only who has it").WithCode("no_secret").
			WithHint("set ONEO_SERVER_SECRET to the one that the servers have")
	}
	client := observe.NewClient([]byte(a.Config.Server.Secret))
	defer client.Close()
	b := &topBoard{a: a, client: client, defaults: app.BudgetOf(a.Config)}
	before := b.sample(ctx)
	if b.lost != nil {
		return b.lost
	}
	if len(before.servers) == 0 {
		return fault.New(fault.Unavailable, "no server is running").WithCode("no_server").WithHint("oneo serve")
	}
	draw := e.screen(o)
	if draw != nil {
		// The screen as it was comes back at the end.
		fmt.Fprint(e.out, "\x1b[?1049h\x1b[?25l")
		defer fmt.Fprint(e.out, "\x1b[?25h\x1b[?1049l")
	}
	for n := 1; ; n++ {
		if !restFor(ctx, o.interval) {
			return topEnd(ctx, draw != nil || o.readings == 0)
		}
		now := b.sample(ctx)
		r := compare(before, now)
		if ctx.Err() != nil {
			return topEnd(ctx, draw != nil || o.readings == 0)
		}
		before = now
		if b.lost == nil {
			b.lost = b.budgets(ctx, &r)
		}
		sortTop(r.rows, o.sort)
		if draw != nil {
			err = draw(r, b.lost)
		} else {
			err = e.tellTop(r, b.lost)
		}
		if err != nil {
			return err
		}
		if n == o.readings {
			if r.answered == 0 {
				return fault.New(fault.Unavailable, "no server has answered").WithCode("no_server")
			}
			return nil
		}
	}
}

// topEnd is how it ends when it is asked to: as it is meant to where it would have gone on for ever.
func topEnd(ctx context.Context, meant bool) error {
	if meant {
		return nil
	}
	return ctx.Err()
}

func restFor(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

// summary is the line above the tenants.
func (r topReading) summary() string {
	return fmt.Sprintf("%d server(s), %d tenant(s), %v requests/s, %v errors/s, %v refused/s", r.answered, len(r.rows), rate(r.requests), rate(r.errors), rate(r.refused))
}

// tellTop writes one reading.
func (e *env) tellTop(r topReading, lost error) error {
	e.say("%s", r.summary())
	for _, s := range r.silent {
		e.say("does not answer: %s", text(s))
	}
	if lost != nil {
		e.say("PostgreSQL cannot be asked; the servers are those of before, and budgets are left out: %s", fault.Of(lost).Message)
	}
	return show(e, r.rows, topColumns)
}

// screen draws readings on a terminal; nil: there is none, or something else was asked for.
func (e *env) screen(o topOptions) func(topReading, error) error {
	f, ok := e.out.(*os.File)
	if !ok || o.readings > 0 || e.output != "table" || !term.IsTerminal(int(f.Fd())) {
		return nil
	}
	return func(r topReading, lost error) error {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil || width < 1 || height < 1 {
			width, height = 80, 24
		}
		var b bytes.Buffer
		to := *e
		to.out, to.err = &b, &b
		if err := to.tellTop(r, lost); err != nil {
			return err
		}
		_, err = io.WriteString(e.out, topScreen(b.String(), width, height))
		return err
	}
}

// topScreen cuts lines to a screen and writes them from its upper left corner on; what stood there before goes.
func topScreen(lines string, width, height int) string {
	var b strings.Builder
	b.WriteString("\x1b[H")
	for i, line := range strings.Split(strings.TrimSuffix(lines, "\n"), "\n") {
		if i == height {
			break
		}
		if i > 0 {
			b.WriteString("\n")
		}
		if runes := []rune(line); len(runes) > width {
			line = string(runes[:width])
		}
		b.WriteString(line + "\x1b[K")
	}
	b.WriteString("\x1b[J")
	return b.String()
}
