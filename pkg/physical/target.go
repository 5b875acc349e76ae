package physical

import (
	"fmt"
	"slices"
	"strconv"
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
	var end string // of the last window's WAL
	for _, b := range i.usable() {
		w, s := Window{From: b.Stop, Until: b.Stop}, i.stretch(b)
		if s != nil {
			w.Until = later(w.Until, s.Until)
		}
		// Backups that the same WAL follows are one window, whatever the clocks said.
		if n := len(ws); n > 0 && s != nil && s.Last == end {
			ws[n-1].Until = later(ws[n-1].Until, w.Until)
			continue
		}
		if ws, end = append(ws, w), ""; s != nil {
			end = s.Last
		}
	}
	return ws
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// usable are the backups from which a recovery can be made, oldest first: whole, and of a history that the cluster still has.
// A recovery follows the latest timeline, and a backup that ended after that one had left its own does not lead there.
func (i Info) usable() (bs []Backup) {
	for _, b := range i.Backups {
		stop := segmentNumber(b.StopLSN.Segment(b.Timeline, SegmentSize))
		left := slices.ContainsFunc(i.WAL, func(s Stretch) bool {
			return timelineOf(s.First) > b.Timeline && segmentNumber(s.First) < stop
		})
		if b.Bad == "" && !left {
			bs = append(bs, b)
		}
	}
	slices.SortStableFunc(bs, func(a, b Backup) int { return a.Stop.Compare(b.Stop) })
	return bs
}

// stretch is the WAL that follows a backup without a gap, over the promotions that left its timeline; nil: it is not archived.
func (i Info) stretch(b Backup) (found *Stretch) {
	start := segmentNumber(b.StartLSN.Segment(b.Timeline, SegmentSize))
	wal := slices.Clone(i.WAL)
	slices.SortFunc(wal, func(a, b Stretch) int { return strings.Compare(a.First, b.First) })
	for _, s := range wal {
		first, last := segmentNumber(s.First), segmentNumber(s.Last)
		if found == nil {
			if timelineOf(s.First) <= b.Timeline && b.Timeline <= timelineOf(s.Last) && first <= start && start <= last {
				found = &s
			}
			continue
		}
		// A timeline begins in the segment in which the one before was left, which may have been archived there or not.
		if timelineOf(s.First) > timelineOf(found.Last) && start <= first && first <= segmentNumber(found.Last)+1 {
			found.Last, found.Until, found.Bytes = s.Last, s.Until, found.Bytes+s.Bytes
		}
	}
	return found
}

// SegmentSize is of how many bytes a file of WAL is. initdb --wal-segsize can make it another; such clusters are refused.
const SegmentSize = 16 << 20

// Choose is the backup from which a target is reached with the least WAL, some of which may not have been archived yet.
// NotFound: there is none; the fault says what can be reached.
func (i Info) Choose(t Target) (Backup, error) {
	if len(i.Backups) == 0 {
		return Backup{}, fault.New(fault.NotFound, "there is no physical backup").WithCode("no_physical_backup").WithHint("make one for the next time: oneo backup physical create")
	}
	good := i.usable()
	if len(good) == 0 {
		return Backup{}, fault.New(fault.NotFound, "none of the physical backups can be used").WithCode("no_physical_backup").
			WithHint("see why: oneo backup physical list; make one for the next time: oneo backup physical create")
	}
	for _, b := range slices.Backward(good) {
		// A restore point has a place in the WAL, and no clock can put it before the backup.
		if t.Point != "" && b.StopLSN > t.LSN || t.Point == "" && b.Stop.After(t.Time) {
			continue
		}
		// A gap is not filled any more, and no older backup gets over it.
		if !i.stretch(b).reaches(t) && i.gapAfter(b) {
			return Backup{}, fault.New(fault.NotFound, "WAL is missing between the backup %s and %s", b.Label, t).WithCode("wal_missing").WithHint("%s", i.reach())
		}
		return b, nil
	}
	return Backup{}, fault.New(fault.NotFound, "%s is before the end of the first physical backup", t).WithCode("before_first_backup").WithHint("%s", i.reach())
}

// reaches reports whether the target is in the WAL.
func (s *Stretch) reaches(t Target) bool {
	switch {
	case s == nil:
		return false
	case t.Point != "":
		// The LSN is where the record of the point ends.
		return segmentNumber((t.LSN-1).Segment(1, SegmentSize)) <= segmentNumber(s.Last)
	}
	return !s.Until.Before(t.Time)
}

// gapAfter reports whether WAL was archived that lies behind what follows a backup without a gap.
func (i Info) gapAfter(b Backup) bool {
	end := b.StartLSN.Segment(b.Timeline, SegmentSize)
	if s := i.stretch(b); s != nil {
		end = s.Last
	}
	return slices.ContainsFunc(i.WAL, func(s Stretch) bool {
		return timelineOf(s.Last) >= timelineOf(end) && segmentNumber(s.Last) > segmentNumber(end)
	})
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
	return (segmentNumber(s.Last) - segmentNumber(b.StartLSN.Segment(b.Timeline, SegmentSize)) + 1) * SegmentSize
}

// segmentNumber is the place of a segment of WAL, counted from the first one, whatever its timeline; 0: the name is none.
func segmentNumber(name string) int64 {
	if len(name) != 24 {
		return 0
	}
	log, err1 := strconv.ParseUint(name[8:16], 16, 32)
	seg, err2 := strconv.ParseUint(name[16:], 16, 32)
	if err1 != nil || err2 != nil {
		return 0
	}
	return int64(log)*(1<<32/SegmentSize) + int64(seg) //nolint:gosec // 40 bits
}

// timelineOf is a segment's; 0: the name is none.
func timelineOf(name string) uint32 {
	if len(name) != 24 {
		return 0
	}
	n, _ := strconv.ParseUint(name[:8], 16, 32) // 0 if it cannot be read
	return uint32(n)
}

// localForms are how a moment is written, besides as RFC 3339.
var localForms = []string{"2006-01-02 15:04", "2006-01-02 15:04:05", "2006-01-02T15:04", "2006-01-02T15:04:05"} // a fraction of seconds may follow

// zoneForms follow one of localForms.
var zoneForms = []string{"Z07", "Z07:00", "Z0700", " Z07", " Z07:00", " Z0700"}

// ParseTime reads a moment: RFC 3339, a date and time with an offset ("2026-08-01 14:03+02") or without one, which is then one of
// the zone, or how long ago it was ("90s", "2h30m"). Invalid: it is none, or the clocks of the zone showed it twice or never.
func ParseTime(s string, now time.Time, zone *time.Location) (time.Time, error) {
	s = strings.TrimSpace(s)
	if d, err := time.ParseDuration(strings.TrimSuffix(s, " ago")); err == nil && !strings.HasPrefix(s, "+") {
		return now.Add(-d.Abs()), nil
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
	where := zone.String()
	if zone == time.Local {
		where = "this machine"
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return time.Time{}, fault.New(fault.Invalid, "the clocks of %s never showed %s: they were put forward", where, s).WithCode("bad_time").WithHint("give the offset, for example %s+00", s)
	}
	return time.Time{}, fault.New(fault.Invalid, "the clocks of %s showed %s twice: they were put back", where, s).WithCode("bad_time").
		WithHint("give the offset: %s%s or %s%s", s, found[0].Format("-07:00"), s, found[1].Format("-07:00"))
}
