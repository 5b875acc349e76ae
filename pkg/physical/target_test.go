package physical_test

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the machine may have no zones

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
)

func TestMomentsAreReadExactlyOrRefused(t *testing.T) {
	zones := map[string]*time.Location{"UTC": time.UTC, "fixed": time.FixedZone("somewhere", -(3*3600 + 30*60))}
	for _, name := range []string{"Europe/Berlin", "Australia/Lord_Howe", "Asia/Kolkata", "America/St_Johns", "Pacific/Apia", "Africa/Casablanca"} {
		zones[name] = must(time.LoadLocation(name))
	}
	now := time.Date(2026, 8, 1, 12, 0, 0, 500, time.UTC)
	for _, c := range []struct {
		text, zone string
		want       string // RFC 3339 in UTC; empty: refused
		says       string // in what is refused, or in its hint
	}{
		// An offset says everything, whatever the zone.
		{text: "2026-08-01T14:03:00Z", zone: "Europe/Berlin", want: "2026-08-01T14:03:00Z"},
		{text: "2026-08-01T14:03:00+02:00", zone: "Asia/Kolkata", want: "2026-08-01T12:03:00Z"},
		{text: "2026-08-01T14:03:00.123456-05:30", zone: "UTC", want: "2026-08-01T19:33:00.123456Z"},
		{text: "2026-08-01 14:03+02", zone: "UTC", want: "2026-08-01T12:03:00Z"},
		{text: "2026-08-01 14:03 +02", zone: "UTC", want: "2026-08-01T12:03:00Z"},
		{text: "2026-08-01 14:03+0530", zone: "UTC", want: "2026-08-01T08:33:00Z"},
		{text: "2026-08-01 14:03:07.5 -02:30", zone: "UTC", want: "2026-08-01T16:33:07.5Z"},
		{text: "2026-08-01 14:03:07.000001+02", zone: "UTC", want: "2026-08-01T12:03:07.000001Z"},
		{text: "2026-08-01T14:03Z", zone: "Europe/Berlin", want: "2026-08-01T14:03:00Z"},
		{text: " 2026-08-01 14:03+02\n", zone: "UTC", want: "2026-08-01T12:03:00Z"},
		{text: "2026-01-01 00:30+14", zone: "UTC", want: "2025-12-31T10:30:00Z"},
		{text: "2026-03-29 02:30+01", zone: "Europe/Berlin", want: "2026-03-29T01:30:00Z"},
		{text: "2026-10-25 02:30+01", zone: "Europe/Berlin", want: "2026-10-25T01:30:00Z"},
		{text: "2026-10-25 02:30+02", zone: "Europe/Berlin", want: "2026-10-25T00:30:00Z"},
		// Without one it is the zone's.
		{text: "2026-08-01 14:03", zone: "UTC", want: "2026-08-01T14:03:00Z"},
		{text: "2026-08-01 14:03", zone: "Europe/Berlin", want: "2026-08-01T12:03:00Z"},
		{text: "2026-01-01 14:03:59.25", zone: "Europe/Berlin", want: "2026-01-01T13:03:59.25Z"},
		{text: "2026-08-01T14:03:01", zone: "Asia/Kolkata", want: "2026-08-01T08:33:01Z"},
		{text: "2026-08-01 14:03", zone: "fixed", want: "2026-08-01T17:33:00Z"},
		{text: "2024-02-29 00:00", zone: "UTC", want: "2024-02-29T00:00:00Z"},
		// Berlin in spring: 02:00 became 03:00.
		{text: "2026-03-29 01:59:59.999999", zone: "Europe/Berlin", want: "2026-03-29T00:59:59.999999Z"},
		{text: "2026-03-29 02:00", zone: "Europe/Berlin", says: "never showed 2026-03-29 02:00"},
		{text: "2026-03-29 02:30", zone: "Europe/Berlin", says: "2026-03-29 02:30+00"},
		{text: "2026-03-29 02:59:59.999999", zone: "Europe/Berlin", says: "never"},
		{text: "2026-03-29 03:00", zone: "Europe/Berlin", want: "2026-03-29T01:00:00Z"},
		// And in autumn: 03:00 became 02:00.
		{text: "2026-10-25 01:59:59", zone: "Europe/Berlin", want: "2026-10-24T23:59:59Z"},
		{text: "2026-10-25 02:00", zone: "Europe/Berlin", says: "twice"},
		{text: "2026-10-25 02:30", zone: "Europe/Berlin", says: "2026-10-25 02:30+02:00 or 2026-10-25 02:30+01:00"},
		{text: "2026-10-25T02:59:59.9", zone: "Europe/Berlin", says: "twice"},
		{text: "2026-10-25 03:00", zone: "Europe/Berlin", want: "2026-10-25T02:00:00Z"},
		// Lord Howe's clocks move by half an hour.
		{text: "2026-04-05 01:29", zone: "Australia/Lord_Howe", want: "2026-04-04T14:29:00Z"},
		{text: "2026-04-05 01:45", zone: "Australia/Lord_Howe", says: "2026-04-05 01:45+11:00 or 2026-04-05 01:45+10:30"},
		{text: "2026-04-05 02:00", zone: "Australia/Lord_Howe", want: "2026-04-04T15:30:00Z"},
		{text: "2026-10-04 01:59", zone: "Australia/Lord_Howe", want: "2026-10-03T15:29:00Z"},
		{text: "2026-10-04 02:15", zone: "Australia/Lord_Howe", says: "never"},
		{text: "2026-10-04 02:30", zone: "Australia/Lord_Howe", want: "2026-10-03T15:30:00Z"},
		// Newfoundland, and a day that Samoa did not have.
		{text: "2026-11-01 01:30", zone: "America/St_Johns", says: "2026-11-01 01:30-02:30 or 2026-11-01 01:30-03:30"},
		{text: "2011-12-30 12:00", zone: "Pacific/Apia", says: "never"},
		{text: "2011-12-31 00:00", zone: "Pacific/Apia", want: "2011-12-30T10:00:00Z"},
		// How long ago.
		{text: "10m", zone: "UTC", want: "2026-08-01T11:50:00.0000005Z"},
		{text: "2h30m ago", zone: "Europe/Berlin", want: "2026-08-01T09:30:00.0000005Z"},
		{text: "-90s", zone: "UTC", want: "2026-08-01T11:58:30.0000005Z"},
		{text: "0s", zone: "UTC", want: "2026-08-01T12:00:00.0000005Z"},
		{text: "-9223372036854775808ns", zone: "UTC", want: "1734-04-22T12:12:43.145224693Z"},
		// None of these is one.
		{text: "", zone: "UTC", says: "no moment"},
		{text: "ago", zone: "UTC", says: "no moment"},
		{text: "+10m", zone: "UTC", says: "no moment"},
		{text: "now", zone: "UTC", says: "no moment"},
		{text: "yesterday", zone: "UTC", says: "no moment"},
		{text: "2026-08-01", zone: "UTC", says: "no moment"},
		{text: "14:03", zone: "UTC", says: "no moment"},
		{text: "2026-02-29 14:03", zone: "UTC", says: "no moment"},
		{text: "2026-08-01 24:00", zone: "UTC", says: "no moment"},
		{text: "2026-08-01 14:60", zone: "UTC", says: "no moment"},
		{text: "2026-06-30 23:59:60Z", zone: "UTC", says: "no moment"},
		{text: "2026-08-01 14:03 CEST", zone: "UTC", says: "no moment"},
		{text: "2026-08-01 14:03+25", zone: "UTC", says: "no moment"},
		{text: "01.08.2026 14:03", zone: "UTC", says: "no moment"},
		{text: "08/01/2026 14:03", zone: "UTC", says: "no moment"},
		{text: "1785592980", zone: "UTC", says: "no moment"},
		{text: "2026-08-01 14:03'; drop table x", zone: "UTC", says: "no moment"},
	} {
		t.Run(c.text+" in "+c.zone, func(t *testing.T) {
			got, err := physical.ParseTime(c.text, now, zones[c.zone])
			if c.want == "" {
				require.Error(t, err, "%s", got)
				f := fault.Of(err)
				require.Equal(t, fault.Invalid, f.Kind)
				require.Equal(t, "bad_time", f.Code)
				require.Contains(t, f.Message+"\n"+f.Hint, c.says)
				return
			}
			require.NoError(t, err)
			require.Equal(t, c.want, got.UTC().Format(time.RFC3339Nano))
		})
	}
}

func FuzzMoments(f *testing.F) {
	for _, s := range []string{"2026-08-01 14:03+02", "2026-10-25 02:30", "10m ago", "-9223372036854775808ns", "0000-01-01 00:00+14", "9999-12-31T23:59:59.999999999-14:00", "+", " ago"} {
		f.Add(s, int32(3600))
	}
	berlin := must(time.LoadLocation("Europe/Berlin"))
	now := time.Date(2026, 8, 1, 12, 0, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, s string, offset int32) {
		for _, zone := range []*time.Location{berlin, time.FixedZone("", int(offset%(14*3600)))} {
			at, err := physical.ParseTime(s, now, zone)
			if err != nil {
				require.True(t, fault.Is(err, fault.Invalid), "%q: %v", s, err)
				continue
			}
			// What is told to a person reads back as the same moment.
			told := physical.Target{Time: at.Truncate(time.Microsecond)}
			if y := at.UTC().Year(); y < 0 || y > 9999 {
				continue
			}
			again, err := physical.ParseTime(told.String(), now, time.UTC)
			require.NoError(t, err, "%q is told as %q", s, told)
			require.True(t, again.Equal(told.Time), "%q is told as %q", s, told)
		}
	})
}

func TestPlacesInTheWALAreWrittenAsPostgreSQLDoes(t *testing.T) {
	dir, err := os.MkdirTemp("", "physical-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755)) // the server's own user must get through
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	pg, err := devstack.StartPostgres(t.Context(), devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, pg.Stop(context.Background())) })
	conn, err := pgx.Connect(t.Context(), pg.URL("postgres"))
	require.NoError(t, err)
	defer conn.Close(t.Context())
	var lsns []string
	for _, l := range []physical.LSN{1, 0xFFFFFF, 0x1000001, 0x16B3748, 0xFFFFFFFF, 0x100000001, 0x1_FF00_0001, 0xAB_CDEF_0123, 0xFFFFFFFF_FFFFFFFE} {
		back, err := physical.ParseLSN(l.String())
		require.NoError(t, err)
		require.Equal(t, l, back)
		lsns = append(lsns, l.String())
	}
	rows, err := conn.Query(t.Context(), `select lsn::text, lsn::pg_lsn::text, pg_walfile_name(lsn::pg_lsn), (pg_control_checkpoint()).timeline_id from unnest($1::text[]) lsn`, lsns)
	require.NoError(t, err)
	n := 0
	var mine, theirs, file string
	var timeline uint32
	_, err = pgx.ForEachRow(rows, []any{&mine, &theirs, &file, &timeline}, func() error {
		n++
		require.Equal(t, theirs, mine)
		require.Equal(t, file, must(physical.ParseLSN(mine)).Segment(timeline, physical.SegmentSize), mine)
		return nil
	})
	require.NoError(t, err)
	require.Len(t, lsns, n)
	// A place on the border is the later file's: PostgreSQL names the earlier one before version 17.
	require.Equal(t, "0000000200000001000000FF", physical.LSN(0x1_FF00_0000).Segment(2, physical.SegmentSize))
	require.Equal(t, "000000020000000200000000", physical.LSN(0x2_0000_0000).Segment(2, physical.SegmentSize))
	for _, s := range []string{"", "/", "1", "1/", "/1", "1/1/1", "g/1", "-1/1", "+1/1", "100000000/0", "0/100000000", " 0/1"} {
		_, err := physical.ParseLSN(s)
		require.Error(t, err, "%q", s)
	}
}

// at is a minute of the day of these tests.
func at(minute int) time.Time { return time.Date(2026, 8, 1, 14, minute, 0, 0, time.UTC) }

// wal is archived WAL: a segment was full each minute.
func wal(timeline uint32, first, last int) physical.Stretch {
	name := func(n int) string {
		return physical.LSN(n*physical.SegmentSize).Segment(timeline, physical.SegmentSize)
	} //nolint:gosec // small
	return physical.Stretch{First: name(first), Last: name(last), From: at(first), Until: at(last), Bytes: int64(last-first+1) * physical.SegmentSize}
}

// backup was made while a segment was written, and ended half a minute after its beginning.
func backup(label string, timeline uint32, segment int) physical.Backup {
	start := physical.LSN(segment * physical.SegmentSize) //nolint:gosec // small
	return physical.Backup{Label: label, Timeline: timeline, Start: at(segment - 1), Stop: at(segment - 1).Add(30 * time.Second),
		StartLSN: start + 0x28, StopLSN: start + 0x100}
}

func bad(b physical.Backup) physical.Backup {
	b.Bad = "its files are not there"
	return b
}

func point(segment int, minute int) physical.Target {
	return physical.Target{Point: "oneo-1", LSN: physical.LSN(segment*physical.SegmentSize) + 0x200, Time: at(minute)} //nolint:gosec // small
}

func moment(minute int) physical.Target { return physical.Target{Time: at(minute)} }

func TestWhichBackupReachesAMoment(t *testing.T) {
	type ask struct {
		target physical.Target
		backup string // empty: none
		code   string
	}
	for _, c := range []struct {
		name    string
		info    physical.Info
		windows string // from-until in minutes and seconds after 14:00
		asks    []ask
	}{
		{
			name: "nothing",
			asks: []ask{{moment(5), "", "no_physical_backup"}, {point(5, 5), "", "no_physical_backup"}},
		},
		{
			name: "one backup",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 3)}, WAL: []physical.Stretch{wal(1, 1, 9)}}, windows: "02:30-09:00",
			asks: []ask{
				{moment(1), "", "before_first_backup"},
				{moment(2), "", "before_first_backup"}, // while it was made
				{physical.Target{Time: at(2).Add(30 * time.Second)}, "a", ""},
				{moment(9), "a", ""},
				{moment(10), "a", ""}, // to be archived
				{point(2, 1), "", "before_first_backup"},
				{point(3, 2), "a", ""}, // behind the end of the backup, by whatever clock
				{point(12, 12), "a", ""},
			},
		},
		{
			name: "the nearest before, in whatever order they are listed",
			info: physical.Info{Backups: []physical.Backup{backup("c", 1, 8), backup("a", 1, 2), backup("b", 1, 5)}, WAL: []physical.Stretch{wal(1, 1, 9)}}, windows: "01:30-09:00",
			asks: []ask{{moment(4), "a", ""}, {moment(5), "b", ""}, {moment(7), "b", ""}, {moment(9), "c", ""}, {point(5, 9), "b", ""}, {point(4, 9), "a", ""}},
		},
		{
			name: "two at once",
			info: physical.Info{Backups: []physical.Backup{
				{Label: "long", Timeline: 1, Start: at(1), Stop: at(6), StartLSN: 2 << 24, StopLSN: 6 << 24},
				{Label: "short", Timeline: 1, Start: at(2), Stop: at(3), StartLSN: 3 << 24, StopLSN: 4 << 24},
			}, WAL: []physical.Stretch{wal(1, 1, 9)}}, windows: "03:00-09:00",
			asks: []ask{{moment(2), "", "before_first_backup"}, {moment(4), "short", ""}, {moment(6), "long", ""}, {point(5, 5), "short", ""}, {point(6, 5), "long", ""}},
		},
		{
			name: "bad ones do not count",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2), bad(backup("b", 1, 5))}, WAL: []physical.Stretch{wal(1, 1, 9)}}, windows: "01:30-09:00",
			asks: []ask{{moment(6), "a", ""}, {point(6, 6), "a", ""}},
		},
		{
			name: "bad ones alone",
			info: physical.Info{Backups: []physical.Backup{bad(backup("b", 1, 5))}, WAL: []physical.Stretch{wal(1, 1, 9)}},
			asks: []ask{{moment(6), "", "no_physical_backup"}},
		},
		{
			name: "a gap",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2), backup("b", 1, 8)}, WAL: []physical.Stretch{wal(1, 1, 4), wal(1, 6, 9)}}, windows: "01:30-04:00 07:30-09:00",
			asks: []ask{
				{moment(4), "a", ""},
				{moment(5), "", "wal_missing"},
				{moment(7), "", "wal_missing"}, // archived, but out of reach
				{moment(8), "b", ""},
				{point(4, 9), "a", ""},
				{point(5, 4), "", "wal_missing"},
				{point(6, 6), "", "wal_missing"},
				{point(8, 7), "b", ""},
			},
		},
		{
			name: "a gap at the end",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2)}, WAL: []physical.Stretch{wal(1, 1, 4), wal(1, 6, 6)}}, windows: "01:30-04:00",
			asks: []ask{{moment(4), "a", ""}, {moment(9), "", "wal_missing"}},
		},
		{
			name: "the WAL of the backup itself is missing",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 3)}, WAL: []physical.Stretch{wal(1, 1, 2), wal(1, 4, 9)}}, windows: "02:30-02:30",
			asks: []ask{{moment(5), "", "wal_missing"}},
		},
		{
			name: "no WAL yet",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 3)}}, windows: "02:30-02:30",
			asks: []ask{{moment(2), "", "before_first_backup"}, {moment(3), "a", ""}},
		},
		{
			name: "a promotion, and what the old server still archived",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2), backup("lost", 1, 7), backup("b", 2, 7)},
				WAL: []physical.Stretch{wal(1, 1, 8), wal(2, 5, 9)}}, windows: "01:30-09:00",
			asks: []ask{{moment(4), "a", ""}, {moment(6), "a", ""}, {moment(9), "b", ""}, {point(6, 6), "a", ""}, {point(7, 7), "b", ""}},
		},
		{
			name: "the old server has archived more than the new one",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2)}, WAL: []physical.Stretch{wal(1, 1, 10), wal(2, 5, 8)}}, windows: "01:30-08:00",
			asks: []ask{{moment(9), "a", ""}}, // to be archived
		},
		{
			name: "backups beside a gap, by a clock that was wrong",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2), backup("b", 1, 6)}, WAL: []physical.Stretch{
				{First: wal(1, 1, 4).First, Last: wal(1, 1, 4).Last, From: at(1), Until: at(7)}, wal(1, 6, 9)}}, windows: "01:30-07:00 05:30-09:00",
			asks: []ask{{moment(4), "a", ""}, {moment(6), "b", ""}},
		},
		{
			name: "a promotion in a segment that was never archived on the old timeline",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2)}, WAL: []physical.Stretch{wal(1, 1, 4), wal(2, 5, 9)}}, windows: "01:30-09:00",
			asks: []ask{{moment(8), "a", ""}},
		},
		{
			name: "the old timeline's WAL fills no gap of the new one's",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2)}, WAL: []physical.Stretch{wal(1, 1, 8), wal(2, 4, 5), wal(2, 7, 9)}}, windows: "01:30-05:00",
			asks: []ask{{moment(5), "a", ""}, {moment(8), "", "wal_missing"}},
		},
		{
			name: "WAL is missing where the timeline changed",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2)}, WAL: []physical.Stretch{wal(1, 1, 4), wal(2, 6, 9)}}, windows: "01:30-04:00",
			asks: []ask{{moment(3), "a", ""}, {moment(8), "", "wal_missing"}},
		},
		{
			name: "a cluster that was taken back, twice",
			info: physical.Info{Backups: []physical.Backup{backup("a", 1, 2), backup("lost", 2, 8)}, WAL: []physical.Stretch{wal(1, 1, 6), wal(2, 6, 9), wal(3, 4, 12)}}, windows: "01:30-12:00",
			asks: []ask{{moment(11), "a", ""}},
		},
		{
			name: "none of the history that the cluster has",
			info: physical.Info{Backups: []physical.Backup{backup("lost", 1, 8)}, WAL: []physical.Stretch{wal(1, 1, 9), wal(2, 4, 12)}},
			asks: []ask{{moment(9), "", "no_physical_backup"}},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ws []string
			for _, w := range c.info.Windows() {
				ws = append(ws, w.From.Format("04:05")+"-"+w.Until.Format("04:05"))
			}
			require.Equal(t, c.windows, strings.Join(ws, " "))
			for _, a := range c.asks {
				b, err := c.info.Choose(a.target)
				if a.code == "" {
					require.NoError(t, err, "%s", a.target)
					require.Equal(t, a.backup, b.Label, "%s", a.target)
					continue
				}
				require.Error(t, err, "%s: %s", a.target, b.Label)
				f := fault.Of(err)
				require.Equal(t, fault.NotFound, f.Kind)
				require.Equal(t, a.code, f.Code, "%s: %s", a.target, f.Message)
				require.NotEmpty(t, f.Hint)
			}
		})
	}
}

func TestSegmentsThatFollowEachOtherAreAStretch(t *testing.T) {
	var segments []physical.Segment
	for _, s := range []struct {
		timeline uint32
		number   int
	}{{2, 5}, {1, 0xFE}, {1, 0xFF}, {1, 0x100}, {1, 0x102}, {2, 6}, {1, 4}} {
		segments = append(segments, physical.Segment{Name: wal(s.timeline, s.number, s.number).First, At: at(s.number % 60)})
	}
	var got []string
	for _, s := range physical.Stretches(segments) {
		got = append(got, fmt.Sprintf("%s-%s %d", s.First, s.Last, s.Bytes/physical.SegmentSize))
	}
	require.Equal(t, []string{
		"000000010000000000000004-000000010000000000000004 1",
		"0000000100000000000000FE-000000010000000100000000 3",
		"000000010000000100000002-000000010000000100000002 1",
		"000000020000000000000005-000000020000000000000006 2",
	}, got)
}

func TestHowMuchIsReplayed(t *testing.T) {
	info := physical.Info{WAL: []physical.Stretch{wal(1, 1, 4), wal(2, 5, 9)}}
	require.EqualValues(t, 8*physical.SegmentSize, info.Replayed(backup("a", 1, 2)))
	require.Zero(t, info.Replayed(backup("a", 1, 12)))
	info.WAL = []physical.Stretch{wal(1, 1, 9), wal(2, 4, 12)}
	require.EqualValues(t, 2*physical.SegmentSize, info.Replayed(backup("lost", 1, 8)), "the timeline had been left before")
}
