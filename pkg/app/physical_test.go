package app

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// TestWhatIsPrunedOfPhysicalBackups goes through what keeps a backup besides the rules.
func TestWhatIsPrunedOfPhysicalBackups(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)
	at := func(days int) time.Time { return now.AddDate(0, 0, -days) }
	// Each begins in a segment of its own, all of which were archived.
	made := func(label string, days int, segment uint64, kind physical.Kind, prior string) physical.Backup {
		return physical.Backup{
			Label: label, Kind: kind, Prior: prior, Stop: at(days), Timeline: 1,
			StartLSN: physical.LSN(segment * physical.SegmentSize), StopLSN: physical.LSN(segment*physical.SegmentSize + 100),
		}
	}
	full := func(label string, days int, segment uint64) physical.Backup {
		return made(label, days, segment, physical.Full, "")
	}
	wal := func(first, last uint64) physical.Stretch {
		return physical.Stretch{First: physical.LSN(first*physical.SegmentSize).Segment(1, physical.SegmentSize), Last: physical.LSN(last*physical.SegmentSize).Segment(1, physical.SegmentSize), From: at(9), Until: at(0)}
	}
	bad := full("bad", 0, 9)
	bad.Bad = "its files are not there"
	for name, c := range map[string]struct {
		backups []physical.Backup
		wal     []physical.Stretch
		policy  backup.Policy
		least   int
		used    []string
		want    map[string][]string // why it stays; none: it goes
	}{
		"rules": {
			backups: []physical.Backup{full("a", 3, 1), full("b", 2, 2), full("c", 1, 3)}, wal: []physical.Stretch{wal(1, 9)}, policy: backup.Policy{Last: 2}, least: 1,
			want: map[string][]string{"a": nil, "b": {"last"}, "c": {"last"}},
		},
		"the newest good ones stay, whatever the rules": {
			backups: []physical.Backup{full("a", 40, 1), full("b", 39, 2), full("c", 38, 3)}, wal: []physical.Stretch{wal(1, 9)}, policy: backup.Policy{Within: backup.Span{Hours: 1}}, least: 2,
			want: map[string][]string{"a": nil, "b": {"minimum"}, "c": {"within"}},
		},
		"one that is bad, or has no WAL, is no good one": {
			backups: []physical.Backup{full("a", 3, 1), full("b", 2, 20), bad}, wal: []physical.Stretch{wal(1, 9)}, policy: backup.Policy{Last: 1}, least: 1,
			want: map[string][]string{"a": {"minimum"}, "b": {"last"}, "bad": {"unreadable"}},
		},
		"what others need": {
			backups: []physical.Backup{full("a", 9, 1), full("f", 5, 2), made("d", 4, 3, physical.Differential, "f"), made("i", 3, 4, physical.Incremental, "d"), made("j", 2, 5, physical.Incremental, "f")},
			wal:     []physical.Stretch{wal(1, 9)}, policy: backup.Policy{Last: 1}, least: 1, used: []string{"i"},
			want: map[string][]string{"a": nil, "f": {"needed"}, "d": {"needed"}, "i": {"in use"}, "j": {"last"}},
		},
		"a clock that was wrong": {
			backups: []physical.Backup{full("a", 1, 1), full("b", -400, 2)}, wal: []physical.Stretch{wal(1, 9)}, policy: backup.Policy{Last: 1}, least: 1,
			want: map[string][]string{"a": {"last"}, "b": {"future"}},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := map[string][]string{}
			for _, v := range judge("main", physical.Info{Backups: c.backups, WAL: c.wal}, c.policy, c.least, c.used, now) {
				require.Equal(t, len(v.Why) > 0, v.Keep)
				got[v.Label] = v.Why
			}
			require.Equal(t, c.want, got)
		})
	}
}
