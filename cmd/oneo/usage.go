package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

type usageOptions struct {
	selector     selector
	gone         bool
	since, until string
	by           string
}

func newTenantUsageCmd(e *env) *cobra.Command {
	var o usageOptions
	cmd := &cobra.Command{
		Use: "usage [NAME]", Short: "Show what tenants have used",
		Long: `Show what the servers have counted of each tenant, by hours, days or months in UTC: requests and how many of them failed by our fault or
were refused for a limit, transactions, the time for which they held a connection, rows read or written, and bytes of answers. A request is
counted when it is answered. Servers write about once a minute: what a server that is killed has counted since is lost; one that is stopped
writes it.

SIZE and RECORDS are the most that was found in the time, measured once an hour by PostgreSQL's own estimates; RECORDS is of the table
records. Usage of dropped and purged tenants stays for usage.keep, that of erased ones goes with them.`,
		Example: "  oneo tenant usage acme --by month --since 2026-01-01\n  oneo tenant usage --all-tenants --gone --since 2026-10-01 --until 2026-11-01 --by month -o csv",
		Args:    usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.selector.names = append(o.selector.names, args...)
			return tenantUsage(cmd.Context(), e, o)
		},
		ValidArgsFunction: e.completeTenants,
	}
	o.selector.bind(cmd, e)
	f := cmd.Flags()
	f.BoolVar(&o.gone, "gone", false, "with --all-tenants: also those that were dropped or purged")
	f.StringVar(&o.since, "since", "30d", "from this `TIME` on: 2026-10-01, RFC 3339, or so long ago, as 30d or 24h; whole hours")
	f.StringVar(&o.until, "until", "", "up to this `TIME`; default: now")
	f.StringVar(&o.by, "by", "day", "add up by hour, day or month, in UTC")
	return cmd
}

// moment reads a time: a date in UTC, RFC 3339, or how long it is ago.
func moment(s string, now time.Time) (time.Time, error) {
	for _, form := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(form, s); err == nil {
			return t, nil
		}
	}
	if days, ok := strings.CutSuffix(s, "d"); ok {
		if n, err := strconv.ParseUint(days, 10, 16); err == nil {
			return now.AddDate(0, 0, -int(n)), nil
		}
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return now.Add(-d), nil
	}
	return time.Time{}, errUsage{fault.New(fault.Invalid, "%q is no time", s).WithCode("bad_time").
		WithHint("write 2026-10-01, 2026-10-01T12:00:00Z, or how long ago: 30d, 24h, 5m")}
}

type usedRow struct {
	observe.Used
	tenant string
}

var usedColumns = []column[usedRow]{
	{"TENANT", "tenant", func(r usedRow) any { return r.tenant }},
	{"NUMBER", "number", func(r usedRow) any { return r.Tenant }},
	{"FROM", "from", func(r usedRow) any { return r.From }},
	{"REQUESTS", "requests", func(r usedRow) any { return r.Requests }},
	{"ERRORS", "errors", func(r usedRow) any { return r.Errors }},
	{"REFUSED", "refused", func(r usedRow) any { return r.Refused }},
	{"TRANSACTIONS", "transactions", func(r usedRow) any { return r.Transactions }},
	{"DATABASE S", "database_seconds", func(r usedRow) any { return float64(r.DatabaseUS) / 1e6 }},
	{"ROWS", "rows", func(r usedRow) any { return r.Rows }},
	{"OUT", "bytes_out", func(r usedRow) any { return bytesOf(r.BytesOut) }},
	{"SIZE", "size_bytes", func(r usedRow) any {
		if r.SizeBytes == nil {
			return nil
		}
		return bytesOf(*r.SizeBytes)
	}},
	{"RECORDS", "records", func(r usedRow) any {
		if r.Records == nil {
			return nil
		}
		return *r.Records
	}},
}

func tenantUsage(ctx context.Context, e *env, o usageOptions) error {
	now := time.Now().UTC()
	f := observe.UsageFilter{Until: now, By: observe.Span(o.by)}
	switch f.By {
	case observe.Hourly, observe.Daily, observe.Monthly:
	default:
		return errUsage{fault.New(fault.Invalid, "--by is hour, day or month, not %q", o.by)}
	}
	var err error
	if f.Since, err = moment(o.since, now); err != nil {
		return err
	}
	f.Since = f.Since.Truncate(time.Hour)
	if o.until != "" {
		if f.Until, err = moment(o.until, now); err != nil {
			return err
		}
	}
	if !f.Until.After(f.Since) {
		return errUsage{fault.New(fault.Invalid, "--until is not after --since")}
	}
	if o.gone && !o.selector.all {
		return errUsage{fault.New(fault.Invalid, "--gone goes with --all-tenants")}
	}
	filter, err := o.selector.filter()
	if err != nil {
		return err
	}
	if o.gone {
		filter.States = append(filter.States, tenant.Dropped)
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	ts, err := o.selector.list(ctx, a, filter)
	if err != nil {
		return err
	}
	names := map[int32]string{}
	for _, t := range ts {
		names[t.Number] = t.Slug.String()
		f.Tenants = append(f.Tenants, t.Number)
	}
	var rows []usedRow
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if o.gone {
			purged, err := tx.Query(ctx, `select t.number, t.slug from public.tenants t where t.state = 'purged' and exists (select from public.usage u where u.tenant = t.number)`)
			if err != nil {
				return err
			}
			var number int32
			var slug string
			_, err = pgx.ForEachRow(purged, []any{&number, &slug}, func() error {
				names[number] = slug
				f.Tenants = append(f.Tenants, number)
				return nil
			})
			if err != nil {
				return err
			}
		}
		used, err := observe.UsageOf(ctx, tx, f)
		for _, u := range used {
			rows = append(rows, usedRow{u, names[u.Tenant]})
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("read the usage: %w", err)
	}
	if err := show(e, rows, usedColumns); err != nil {
		return err
	}
	if len(rows) == 0 {
		e.say("nothing was used")
	}
	return nil
}
