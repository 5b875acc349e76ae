package tui

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRowsHaveACellForEachColumnAndAreSortedByWhatIsThere(t *testing.T) {
	f := newFake()
	q := question{arg: "acme", now: noon}
	for _, s := range screens() {
		rows, _, err := s.load(t.Context(), f, q)
		require.NoError(t, err)
		require.NotEmpty(t, rows, s.name)
		for _, r := range rows {
			require.Len(t, r.cells, len(s.columns), s.name)
			require.NotEmpty(t, r.id, s.name)
			require.NotEmpty(t, r.detail, s.name)
		}
		require.Less(t, s.sorting, len(s.columns), s.name)
		again, _, err := s.load(t.Context(), f, q)
		require.NoError(t, err)
		require.Equal(t, rows, again, "%s: the same data make the same rows", s.name)
	}
}

func TestRows(t *testing.T) {
	r := tenantRow(Tenant{Slug: "acme", State: "active", Version: 13, Created: noon.Add(-3 * 24 * time.Hour)}, TenantRate{Requests: 12.34, P95: 4.5, Errors: 0.5, Database: 0.25}, 14, noon)
	var texts []string
	for _, c := range r.cells[:9] {
		texts = append(texts, c.text)
	}
	require.Equal(t, []string{"acme", "● active", "▲ 13", "12", "4.5 ms", "0.5", "", "3d", "25 %"}, texts)
	require.Equal(t, warn, r.cells[2].tone)
	require.Equal(t, bad, r.cells[5].tone)

	r = runRow(Run{ID: "01a21573-58d0-74de-a97e-92ecc97b3b10", State: "running", OK: 5, Failed: 1, Queued: 4, Wave: 1, Waves: 2, Created: noon.Add(-time.Minute)}, noon)
	require.Equal(t, "92ecc97b3b10", r.cells[0].text)
	require.Equal(t, "? running", r.cells[2].text, "no process gives a sign of life")
	require.Equal(t, "██████░░░░ 6/10", r.cells[3].text)
	require.Equal(t, "60s", r.cells[7].text)
}

func TestRedact(t *testing.T) {
	for sql, want := range map[string]string{
		`select 1, 2.5, -3e4 from t1 where a = 'x''y' and b = $1`: `select ?, ?, -? from t1 where a = ? and b = $1`,
		`select "odd 'name" from x where y = E'it\'s' and z = 7`:  `select "odd 'name" from x where y = ? and z = ?`,
		`insert into t values ('cut off`:                          `insert into t values (?`,
		`do $$ begin perform secret('a'); end $$`:                 `do ?`,
		`do $x$ secret`:                     `do ?`,
		`select a -- 'secret'` + "\nfrom t": "select a  \nfrom t",
		`select /* secret */ b2`:            `select   b2`,
		`select /* secret`:                  `select  `,
	} {
		require.Equal(t, want, redact(sql), sql)
	}
}

func TestRatesAreDifferencesOfOneServersReadings(t *testing.T) {
	at := func(id string, second int, requests int64, tenants ...TenantLoad) Reading {
		return Reading{Server: Server{ID: id}, At: noon.Add(time.Duration(second) * time.Second), All: Load{Requests: requests, P95: float64(requests)}, Tenants: tenants,
			Redis: Redis{Set: true, Up: true, Hits: requests * 3, Misses: requests}}
	}
	load := func(n int32, requests int64) TenantLoad {
		return TenantLoad{Number: n, Tenant: "t", Load: Load{Requests: requests}}
	}
	before := []Reading{at("a", 0, 100, load(1, 50)), at("b", 0, 1000), {Server: Server{ID: "d"}, Err: "silent"}}
	after := []Reading{at("a", 10, 200, load(1, 100), load(2, 10)), at("b", 10, 5), at("c", 10, 7000), at("d", 10, 90), {Server: Server{ID: "e"}, Err: "silent"}}
	r := compare(before, after)
	require.InDelta(t, 10, r.Requests, 0.001, "only a: b was begun anew, c and d have no reading before")
	require.Equal(t, 4, r.Answer)
	require.Equal(t, 1, r.Silent)
	require.Equal(t, "silent", r.Why)
	require.InDelta(t, 5, r.Tenants[1].Requests, 0.001)
	require.InDelta(t, 1, r.Tenants[2].Requests, 0.001)
	require.InDelta(t, 0.75, r.Hits, 0.001)
	require.InDelta(t, 7000, r.P95, 0.001, "of the slowest")
	require.False(t, compare(nil, after).Ready)
	require.Equal(t, []string{"t", "t"}, []string{r.busiest(5)[0].Tenant, r.busiest(5)[1].Tenant})
	require.InDelta(t, 5, r.busiest(1)[0].Requests, 0.001)
}

func TestCommandLinesAreReadAsTheyAreWritten(t *testing.T) {
	for _, words := range [][]string{{"tenant", "suspend", "acme"}, {"tenant", "rename", "a", "b", "--name", "it's A & B"}, {"x", ""}} {
		got, ok := split(shown("oneo", words))
		require.True(t, ok)
		require.Equal(t, append([]string{"oneo"}, words...), got)
	}
	for _, line := range []string{"a; rm x", "a $(b)", "a 'b", "a | b", "a > b", "a `b`", ""} {
		_, ok := split(line)
		require.False(t, ok, line)
	}
	require.Equal(t, []string{"tenant", "resume", "acme"}, undoOf([]string{"x", "tenant acme is suspended; undo: oneo tenant resume acme", "name  acme"}))
	require.Equal(t, []string{"undo", "01a2"}, undoOf([]string{"to take it back: oneo undo 01a2"}))
	require.Nil(t, undoOf([]string{"undo: oneo tenant resume $(x)"}))
	require.Nil(t, undoOf([]string{"undo: rm -r /", "done"}))
}

func TestNumbers(t *testing.T) {
	require.Equal(t, []string{"0", "999", "1,000", "-12,345,678"}, []string{count(0), count(999), count(1000), count(-12345678)})
	require.Equal(t, []string{"900 B", "1.0 kB", "5.0 MB", "123 GB"}, []string{size(900), size(1024), size(5 << 20), size(123 << 30)})
	require.Equal(t, []string{"0s", "90s", "2m", "3h", "2d"}, []string{short(-time.Second), short(90 * time.Second), short(2 * time.Minute), short(3 * time.Hour), short(48 * time.Hour)})
	require.Equal(t, "  ▁▅█", spark([]float64{0, 5, 10}, 5))
	require.Equal(t, "▁█", spark([]float64{0, 0, 1, 10}, 2), "the highest of those that share a column")
	require.Equal(t, "     ", spark(nil, 5))
	require.Equal(t, "███░░", bar(3, 5, 5))
	require.Equal(t, "█████", bar(9, 5, 5))
	require.Equal(t, "ab…", fit("abcdef", 3, false))
	require.Equal(t, " ab", fit("ab", 3, true))
	require.Equal(t, "漢… ", fit("漢字漢", 4, false), "a wide character is not cut in two")
}
