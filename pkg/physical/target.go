package physical

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Target is where a recovery ends.
type Target struct {
	// Time is the moment: what was committed until then is there, what was committed later is not.
	Time time.Time
	// Point names a restore point that was set at Time, at LSN; empty: Time itself is meant.
	Point string
	LSN   LSN
}

// String says it to a person.
func (t Target) String() string {
	at := t.Time.UTC().Format("2006-01-02 15:04:05.999999Z")
	if t.Point != "" {
		return fmt.Sprintf("restore point %s (%s)", t.Point, at)
	}
	return at
}

// settings are PostgreSQL's for a recovery that ends there.
func (t Target) settings() map[string]string {
	s := map[string]string{"recovery_target_timeline": "latest", "recovery_target_inclusive": "on", "recovery_target_action": "promote"}
	if t.Point != "" {
		s["recovery_target_name"] = t.Point
	} else {
		s["recovery_target_time"] = t.Time.UTC().Format("2006-01-02 15:04:05.000000+00")
	}
	return s
}

// Window is a stretch of time of which each moment can be reached, from one of some backups.
type Window struct {
	From  time.Time `json:"from"`
	Until time.Time `json:"until"`
}

// Windows are the moments that can be reached, oldest first. Between two of them WAL is missing.
func (i Info) Windows() (ws []Window) {
	var last *Stretch
	for _, b := range i.Backups {
		if b.Bad != "" {
			continue
		}
		w := Window{From: b.Stop, Until: b.Stop}
		s := i.stretch(b)
		if s != nil && s.Until.After(w.Until) {
			w.Until = s.Until
		}
		// Between two backups of one stretch nothing is missing, also where an engine tells times by the second.
		if n := len(ws); n > 0 && (s != nil && s == last || !w.From.After(ws[n-1].Until)) {
			ws[n-1].Until = later(ws[n-1].Until, w.Until)
		} else {
			ws = append(ws, w)
		}
		last = s
	}
	return ws
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// stretch is the WAL that follows a backup; nil: it is not archived.
func (i Info) stretch(b Backup) *Stretch {
	start := b.StartLSN.Segment(b.Timeline, SegmentSize)
	for k := range i.WAL {
		// A name without its timeline is the segment's place.
		if i.WAL[k].First[8:] <= start[8:] && start[8:] <= i.WAL[k].Last[8:] {
			return &i.WAL[k]
		}
	}
	return nil
}

// SegmentSize is of how many bytes a file of WAL is. initdb --wal-segsize can make it another; such clusters are refused.
const SegmentSize = 16 << 20

// Choose is the backup from which a target is reached with the least WAL. NotFound: there is none; the fault says what can be reached.
func (i Info) Choose(t Target) (Backup, error) {
	good := slices.DeleteFunc(slices.Clone(i.Backups), func(b Backup) bool { return b.Bad != "" })
	slices.SortFunc(good, func(a, b Backup) int { return b.Stop.Compare(a.Stop) })
	if len(good) == 0 {
		return Backup{}, fault.New(fault.NotFound, "there is no physical backup").WithCode("no_physical_backup").WithHint("make one for the next time: oneo backup physical create")
	}
	for _, b := range good {
		if t.Point != "" && b.StopLSN > t.LSN || b.Stop.After(t.Time) {
			continue
		}
		if s := i.stretch(b); s == nil || s.Until.Before(t.Time) {
			// There may be WAL after a gap: then no backup before it reaches the target.
			if i.archivedAfter(b, t.Time) {
				return Backup{}, fault.New(fault.NotFound, "WAL is missing between the backup %s and %s", b.Label, t).WithCode("wal_missing").WithHint("%s", i.reach())
			}
		}
		return b, nil
	}
	return Backup{}, fault.New(fault.NotFound, "%s is before the end of the first physical backup", t).WithCode("before_first_backup").WithHint("%s", i.reach())
}

// archivedAfter reports whether WAL was archived after a moment, in a stretch that is not the backup's.
func (i Info) archivedAfter(b Backup, at time.Time) bool {
	own := i.stretch(b)
	for k := range i.WAL {
		if s := &i.WAL[k]; s != own && s.Until.After(at) && (own == nil || s.From.After(own.Until)) {
			return true
		}
	}
	return false
}

// reach says what can be reached, as a hint.
func (i Info) reach() string {
	ws := i.Windows()
	if len(ws) == 0 {
		return "nothing can be reached: oneo backup physical list"
	}
	var parts []string
	for _, w := range ws {
		parts = append(parts, fmt.Sprintf("%s to %s", w.From.UTC().Format(time.RFC3339), w.Until.UTC().Format(time.RFC3339)))
	}
	return "what can be reached: " + strings.Join(parts, ", ")
}

// Replayed is how many bytes of WAL lie between a backup's beginning and the end of what is archived: at most so much is replayed.
func (i Info) Replayed(b Backup) int64 {
	s := i.stretch(b)
	if s == nil {
		return 0
	}
	n := segmentNumber(s.Last) - segmentNumber(b.StartLSN.Segment(b.Timeline, SegmentSize)) + 1
	return max(0, n) * SegmentSize
}

// segmentNumber is the place of a segment of WAL, counted from the first one, whatever its timeline.
func segmentNumber(name string) int64 {
	var log, seg int64
	if _, err := fmt.Sscanf(name[8:24], "%08X%08X", &log, &seg); err != nil {
		return 0
	}
	return log*(1<<32/SegmentSize) + seg
}

// localForms are how a moment is written, besides as RFC 3339.
var localForms = []string{"2006-01-02 15:04", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02T15:04:05"} // a fraction of seconds may follow

// zoneForms follow one of localForms.
var zoneForms = []string{"Z07", "Z07:00", "Z0700", " Z07", " Z07:00", " Z0700"}

// ParseTime reads a moment: RFC 3339, a date and time with an offset ("2026-08-01 14:03+02") or without one, which is then one of
// the zone, or how long ago it was ("90s", "2h30m"). Invalid: it is none, or the clocks of the zone showed it twice or never.
func ParseTime(s string, now time.Time, zone *time.Location) (time.Time, error) {
	s = strings.TrimSpace(s)
	if d, err := time.ParseDuration(strings.TrimSuffix(s, " ago")); err == nil {
		if d < 0 {
			d = -d
		}
		return now.Add(-d), nil
	}
	if t, err := time.Parse(time.RFC3339Nano, s); err == nil {
		return t, nil
	}
	for _, form := range localForms {
		for _, z := range zoneForms {
			if t, err := time.Parse(form+z, s); err == nil {
				return t, nil
			}
		}
	}
	for _, form := range localForms {
		wall, err := time.Parse(form, s)
		if err != nil {
			continue
		}
		return onceIn(wall, zone, s)
	}
	return time.Time{}, fault.New(fault.Invalid, "%q is no moment", s).WithCode("bad_time").
		WithHint("for example '2026-08-01 14:03:00+02', '2026-08-01T12:03:00Z', or 10m for ten minutes ago")
}

// onceIn is the one moment at which the clocks of the zone showed a date and time.
func onceIn(wall time.Time, zone *time.Location, s string) (time.Time, error) {
	var found []time.Time
	// Offsets in force around that time; none changes twice within two days.
	for _, near := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		_, offset := wall.Add(near).In(zone).Zone()
		t := wall.Add(-time.Duration(offset) * time.Second).In(zone)
		if t.Format(time.DateTime) == wall.Format(time.DateTime) && !slices.ContainsFunc(found, t.Equal) {
			found = append(found, t)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return time.Time{}, fault.New(fault.Invalid, "the clocks of %s never showed %s: they were put forward", zone, s).WithCode("bad_time").WithHint("give the offset, for example %s+00", s)
	}
	return time.Time{}, fault.New(fault.Invalid, "the clocks of %s showed %s twice: they were put back", zone, s).WithCode("bad_time").
		WithHint("give the offset: %s%s or %s%s", s, found[0].Format("-07:00"), s, found[1].Format("-07:00"))
}
