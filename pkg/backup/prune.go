package backup

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
)

// Policy says which of a tenant's backups stay, in restic's words. What several rules keep stays once. Hours, days,
// weeks (from Monday) and months are those of UTC.
type Policy struct {
	// Last keeps so many of the newest. Hourly keeps the last one of each of the last so many hours in which there is one,
	// and so do the others.
	Last, Hourly, Daily, Weekly, Monthly int
	// Within keeps what was made within so long before the newest one.
	Within Span
}

// IsZero reports whether the policy keeps nothing.
func (p Policy) IsZero() bool { return p == Policy{} }

// Span is a time in years, months, days and hours, as restic writes it: 1y6m14d12h.
type Span struct{ Years, Months, Days, Hours int }

var spanForm = regexp.MustCompile(`^(?:(\d{1,4})y)?(?:(\d{1,4})m)?(?:(\d{1,5})d)?(?:(\d{1,6})h)?$`)

// Before is the time that lies so long before another one.
func (s Span) Before(t time.Time) time.Time {
	return t.AddDate(-s.Years, -s.Months, -s.Days).Add(-time.Duration(s.Hours) * time.Hour)
}

// ParseSpan reads a span.
func ParseSpan(s string) (Span, error) {
	parts := spanForm.FindStringSubmatch(s)
	if parts == nil || s == "" {
		return Span{}, fault.New(fault.Invalid, "%q is no span of time", s).WithCode("bad_span").WithHint("write years, months, days and hours, for example 2m or 1y6m14d12h")
	}
	var n [4]int
	for i := range n {
		if parts[i+1] != "" {
			n[i], _ = strconv.Atoi(parts[i+1]) // digits, few of them
		}
	}
	return Span{n[0], n[1], n[2], n[3]}, nil
}

// Verdict is what a policy says of one backup.
type Verdict struct {
	Manifest
	Keep bool
	Why  []string // it stays
}

// Apply says of each backup whether it stays; of one tenant at least the keepMin newest do, and those that are kept. Those of
// the future stay as well, and no rule counts them: a clock was wrong, and what it says takes no other one's place. The verdicts
// are by tenant, in the order of their names, and the newest backup first.
func (p Policy) Apply(backups []Manifest, keepMin int, now time.Time) []Verdict {
	byTenant := map[string][]Manifest{}
	for _, m := range backups {
		byTenant[m.Tenant] = append(byTenant[m.Tenant], m)
	}
	var tenants [][]Manifest
	for _, ms := range byTenant {
		slices.SortFunc(ms, func(a, b Manifest) int { return b.compare(a) })
		tenants = append(tenants, ms)
	}
	slices.SortFunc(tenants, func(a, b []Manifest) int {
		if c := strings.Compare(a[0].Slug, b[0].Slug); c != 0 {
			return c
		}
		return strings.Compare(a[0].Tenant, b[0].Tenant)
	})
	var all []Verdict
	for _, ms := range tenants {
		past := ms
		for len(past) > 0 && past[0].future(now) {
			all = append(all, Verdict{Manifest: past[0], Keep: true, Why: []string{"future"}})
			past = past[1:]
		}
		if len(past) > 0 {
			all = append(all, p.tenant(past, keepMin)...)
		}
	}
	return all
}

// skew is how far the clocks of those who make backups may be apart.
const skew = time.Hour

// future reports whether a backup says that it was made later than now.
func (m Manifest) future(now time.Time) bool { return m.Made.After(now.Add(skew)) }

// tenant applies the policy to the backups of one tenant, the newest first.
func (p Policy) tenant(ms []Manifest, keepMin int) []Verdict {
	periods := []struct {
		left int
		word string
		of   func(time.Time) string
		last string
	}{
		{p.Hourly, "hourly", func(t time.Time) string { return t.Format("2006-01-02 15") }, ""},
		{p.Daily, "daily", func(t time.Time) string { return t.Format(time.DateOnly) }, ""},
		{p.Weekly, "weekly", func(t time.Time) string { y, w := t.ISOWeek(); return fmt.Sprint(y, " ", w) }, ""},
		{p.Monthly, "monthly", func(t time.Time) string { return t.Format("2006-01") }, ""},
	}
	s := p.Within
	since := s.Before(ms[0].Made.UTC())
	verdicts := make([]Verdict, len(ms))
	for i, m := range ms {
		v := Verdict{Manifest: m}
		stays := func(why string) { v.Keep, v.Why = true, append(v.Why, why) }
		if m.Kept {
			stays("kept")
		}
		if i < p.Last {
			stays("last")
		}
		for k := range periods {
			per := &periods[k]
			if at := per.of(m.Made.UTC()); per.left > 0 && at != per.last {
				stays(per.word)
				per.left, per.last = per.left-1, at
			}
		}
		if s != (Span{}) && !m.Made.Before(since) {
			stays("within")
		}
		if i < keepMin && !v.Keep {
			stays("minimum")
		}
		verdicts[i] = v
	}
	return verdicts
}

// looseFor is how long an archive without a manifest is left alone: its backup may still be at work. It is counted to the
// newest thing that the store holds, and not to the time of this machine: who made it lives by the same clock.
const looseFor = 7 * 24 * time.Hour

// Plan is what Prune would do.
type Plan struct {
	Verdicts []Verdict
	// Loose are archives of backups that were interrupted long ago.
	Loose []store.Object
	Bad   []Bad // are left alone
}

// Removes is how many backups go.
func (p Plan) Removes() (n int) {
	for _, v := range p.Verdicts {
		if !v.Keep {
			n++
		}
	}
	return n
}

// Plan reads what there is of a tenant, or of all: "", and says what goes.
func (b *Backups) Plan(ctx context.Context, p Policy, tenantID string) (Plan, error) {
	c, err := b.List(ctx, tenantID)
	if err != nil {
		return Plan{}, err
	}
	plan := Plan{Verdicts: p.Apply(c.Backups, b.o.KeepMin, time.Now()), Bad: c.Bad}
	for _, o := range c.Loose {
		if c.newest.Sub(o.Modified) > looseFor {
			plan.Loose = append(plan.Loose, o)
		}
	}
	return plan, nil
}

// Prune takes away what the policy does not keep, and what killed processes have left. Nobody else changes what is kept
// meanwhile. done is called with each backup that is gone; what has been taken away stays so when an error ends it.
func (b *Backups) Prune(ctx context.Context, p Policy, tenantID string, done func(Manifest)) (Plan, error) {
	var plan Plan
	err := b.alone(ctx, func(still func() error) (err error) {
		if plan, err = b.Plan(ctx, p, tenantID); err != nil {
			return err
		}
		for _, v := range plan.Verdicts {
			if v.Keep {
				continue
			}
			if err := still(); err != nil {
				return err
			}
			// Without its manifest it is no backup any more, also if the archive stays behind.
			if err := b.o.Store.Delete(ctx, v.manifestName()); err != nil {
				return err
			}
			if err := b.o.Store.Delete(ctx, v.Name); err != nil {
				return err
			}
			done(v.Manifest)
		}
		for _, o := range plan.Loose {
			if err := b.o.Store.Delete(ctx, o.Name); err != nil {
				return err
			}
		}
		return b.Sweep(ctx, tenantID)
	})
	return plan, err
}

// Sweep takes away what killed processes have left long ago of archives that were being written, of a tenant, or of all: "". It
// is part of Prune.
func (b *Backups) Sweep(ctx context.Context, tenantID string) error {
	return b.o.Store.Sweep(ctx, prefixOf(tenantID), looseFor)
}

// Keep keeps Prune away from a backup, or no longer; reason, if there is one, replaces the one that it has.
func (b *Backups) Keep(ctx context.Context, id string, kept bool, reason string) (m Manifest, err error) {
	if err := checkReason(reason); err != nil {
		return m, err
	}
	err = b.alone(ctx, func(func() error) error {
		if m, err = b.Find(ctx, id); err != nil {
			return err
		}
		if m.Kept == kept && reason == "" {
			return nil
		}
		if m.Kept = kept; reason != "" {
			m.Reason = reason
		}
		return b.put(ctx, m)
	})
	return m, err
}
