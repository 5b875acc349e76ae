package backup_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/backup"
)

// at makes a tenant's backups at these times, "+" behind one that is kept.
func at(tenant string, times ...string) (ms []backup.Manifest) {
	for i, s := range times {
		text, kept := strings.CutSuffix(s, "+")
		made, err := time.Parse("2006-01-02 15:04", text)
		if err != nil {
			panic(err)
		}
		ms = append(ms, backup.Manifest{ID: fmt.Sprintf("%016d", i), Tenant: tenant, Slug: tenant, Made: made, Kept: kept})
	}
	return ms
}

// today is behind all of them but those that are of the future.
var today = time.Date(2027, 6, 1, 12, 0, 0, 0, time.UTC)

func TestPolicy(t *testing.T) {
	t.Parallel()
	days := []string{"2026-11-20 01:00", "2026-11-21 01:00", "2026-11-22 01:00", "2026-11-23 01:00", "2026-11-24 01:00", "2026-11-25 01:00", "2026-11-25 13:00"}
	for name, c := range map[string]struct {
		policy  backup.Policy
		keepMin int
		backups []string
		want    []string // the newest first
	}{
		"the last ones":                           {backup.Policy{Last: 2}, 1, days, []string{"11-25 13:00 last", "11-25 01:00 last"}},
		"more than there are":                     {backup.Policy{Last: 99}, 1, days[:2], []string{"11-21 01:00 last", "11-20 01:00 last"}},
		"the last one of each day":                {backup.Policy{Daily: 3}, 1, days, []string{"11-25 13:00 daily", "11-24 01:00 daily", "11-23 01:00 daily"}},
		"days without one do not count":           {backup.Policy{Daily: 2}, 1, []string{"2026-01-01 00:00", "2026-06-01 00:00", "2026-11-01 00:00"}, []string{"11-01 00:00 daily", "06-01 00:00 daily"}},
		"weeks begin on Monday":                   {backup.Policy{Weekly: 2}, 1, days, []string{"11-25 13:00 weekly", "11-22 01:00 weekly"}},
		"a week over the turn of the year is one": {backup.Policy{Weekly: 9}, 1, []string{"2026-12-28 00:00", "2027-01-03 23:59", "2027-01-04 00:00"}, []string{"01-04 00:00 weekly", "01-03 23:59 weekly"}},
		"months": {backup.Policy{Monthly: 2}, 1, []string{"2026-09-30 23:59", "2026-10-01 00:00", "2026-10-31 23:59", "2026-11-01 00:00"}, []string{"11-01 00:00 monthly", "10-31 23:59 monthly"}},
		"the same month of another year is another": {backup.Policy{Monthly: 9}, 1, []string{"2025-11-01 00:00", "2026-11-01 00:00"}, []string{"11-01 00:00 monthly", "11-01 00:00 monthly"}},
		"hours": {backup.Policy{Hourly: 2}, 1, []string{"2026-11-25 12:59", "2026-11-25 13:00", "2026-11-25 13:59"}, []string{"11-25 13:59 hourly", "11-25 12:59 hourly"}},
		"the same hour of another day is another":     {backup.Policy{Hourly: 9}, 1, []string{"2026-11-24 13:00", "2026-11-25 13:00"}, []string{"11-25 13:00 hourly", "11-24 13:00 hourly"}},
		"what several rules keep stays once":          {backup.Policy{Last: 1, Daily: 2, Weekly: 1}, 1, days, []string{"11-25 13:00 last,daily,weekly", "11-24 01:00 daily"}},
		"within, from the newest and not from now":    {backup.Policy{Within: backup.Span{Days: 1}}, 1, days, []string{"11-25 13:00 within", "11-25 01:00 within"}},
		"within, to the minute":                       {backup.Policy{Within: backup.Span{Hours: 12}}, 1, days, []string{"11-25 13:00 within", "11-25 01:00 within"}},
		"within, a month is the calendar's":           {backup.Policy{Within: backup.Span{Months: 1}}, 1, []string{"2026-02-27 00:00", "2026-02-28 00:00", "2026-03-28 00:00"}, []string{"03-28 00:00 within", "02-28 00:00 within"}},
		"kept ones stay, and do not count for a rule": {backup.Policy{Last: 1}, 1, []string{"2026-11-20 01:00+", "2026-11-21 01:00", "2026-11-22 01:00"}, []string{"11-22 01:00 last", "11-20 01:00 kept"}},
		"never below the minimum":                     {backup.Policy{Last: 1}, 3, days, []string{"11-25 13:00 last", "11-25 01:00 minimum", "11-24 01:00 minimum"}},
		"nothing but the minimum":                     {backup.Policy{}, 1, days, []string{"11-25 13:00 minimum"}},
		"one of the future stays, and takes no other one's place": {backup.Policy{Last: 1, Within: backup.Span{Days: 1}}, 2,
			append([]string{"2036-11-25 01:00", "2036-11-26 01:00"}, days...), []string{"11-26 01:00 future", "11-25 01:00 future", "11-25 13:00 last,within", "11-25 01:00 within"}},
		"nor that of the minimum":                      {backup.Policy{}, 1, append([]string{"2036-11-25 01:00"}, days...), []string{"11-25 01:00 future", "11-25 13:00 minimum"}},
		"a clock that stood in the past loses none":    {backup.Policy{Last: 1}, 1, []string{"2036-11-25 01:00", "2036-11-26 01:00"}, []string{"11-26 01:00 future", "11-25 01:00 future"}},
		"clocks that are a little apart are right":     {backup.Policy{Last: 1}, 1, []string{"2027-06-01 11:00", "2027-06-01 12:59"}, []string{"06-01 12:59 last"}},
		"a kept old one does not stand for the newest": {backup.Policy{}, 1, []string{"2026-11-20 01:00+", "2026-11-21 01:00"}, []string{"11-21 01:00 minimum", "11-20 01:00 kept"}},
	} {
		var got []string
		verdicts := c.policy.Apply(at("acme", c.backups...), c.keepMin, today)
		require.Len(t, verdicts, len(c.backups), name)
		for _, v := range verdicts {
			require.Equal(t, v.Keep, len(v.Why) > 0, name)
			if v.Keep {
				got = append(got, v.Made.Format("01-02 15:04 ")+strings.Join(v.Why, ","))
			}
		}
		require.Equal(t, c.want, got, name)
	}
}

// Tenants are judged each by itself, a namesake of a purged one too.
func TestPolicyIsOfEachTenant(t *testing.T) {
	t.Parallel()
	all := append(at("beta", "2026-11-20 01:00", "2026-11-21 01:00"), at("acme", "2020-01-01 00:00")...)
	former := at("id-of-a-purged-one", "2019-01-01 00:00")
	former[0].Slug = "acme"
	var got []string
	for _, v := range (backup.Policy{Last: 1}).Apply(append(all, former...), 1, today) {
		got = append(got, fmt.Sprintf("%s %s %t", v.Tenant, v.Made.Format(time.DateOnly), v.Keep))
	}
	require.Equal(t, []string{"acme 2020-01-01 true", "id-of-a-purged-one 2019-01-01 true", "beta 2026-11-21 true", "beta 2026-11-20 false"}, got)
	require.Empty(t, (backup.Policy{Last: 1}).Apply(nil, 1, today))
}

func TestParseSpan(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]backup.Span{
		"1y6m14d12h": {Years: 1, Months: 6, Days: 14, Hours: 12}, "2m": {Months: 2}, "48h": {Hours: 48}, "7d": {Days: 7},
	} {
		got, err := backup.ParseSpan(text)
		require.NoError(t, err)
		require.Equal(t, want, got, text)
	}
	for _, text := range []string{"", "5", "5s", "1h2d", "-1d", "1.5h", "1d ", "99999999d"} {
		_, err := backup.ParseSpan(text)
		require.Error(t, err, text)
	}
}
