package tui

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
)

// clean makes what others have written harmless: no character of it moves a cursor, begins an escape sequence, turns the direction of
// the text or is of no width.
func clean(s string) string {
	if plain(s) {
		return s
	}
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n' || r == '\t':
			return ' '
		case r == utf8.RuneError, unicode.IsControl(r), unicode.Is(unicode.Cf, r), unicode.Is(unicode.Zl, r), unicode.Is(unicode.Zp, r):
			return '?'
		}
		return r
	}, s)
}

// plain reports whether a text is printable ASCII, as most are.
func plain(s string) bool {
	for i := range len(s) {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// fit cleans a text and makes it exactly so wide, cut with an ellipsis or padded.
func fit(s string, width int, right bool) string {
	if width <= 0 {
		return ""
	}
	s = clean(s)
	w := ansi.StringWidth(s)
	if w > width {
		s = ansi.Truncate(s, width, "…")
		w = ansi.StringWidth(s)
	}
	pad := strings.Repeat(" ", max(0, width-w))
	if right {
		return pad + s
	}
	return s + pad
}

// wrap cleans a text and breaks it into lines of at most width.
func wrap(s string, width int) []string {
	if width <= 0 {
		return nil
	}
	var lines []string
	for part := range strings.SplitSeq(s, "\n") {
		lines = append(lines, strings.Split(ansi.Wrap(clean(part), width, " "), "\n")...)
	}
	return lines
}

// ago is how long something has been, in two letters or four: 12s, 3m, 5h, 2d. A clock that runs behind makes it 0s.
func ago(now, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return short(now.Sub(t))
}

func short(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return strconv.Itoa(int(d.Seconds())) + "s"
	case d < 2*time.Hour:
		return strconv.Itoa(int(d.Minutes())) + "m"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + "h"
	}
	return strconv.Itoa(int(d.Hours()/24)) + "d"
}

// count writes a whole number with its thousands apart.
func count[T int | int32 | int64](n T) string {
	s := strconv.FormatInt(int64(n), 10)
	head, sign := s, ""
	if strings.HasPrefix(s, "-") {
		sign, head = "-", s[1:]
	}
	for i := len(head) - 3; i > 0; i -= 3 {
		head = head[:i] + "," + head[i:]
	}
	return sign + head
}

// rate writes a number that is no whole one: as many places as it needs.
func rate(f float64) string {
	switch {
	case math.IsNaN(f) || math.IsInf(f, 0):
		return "-"
	case f == 0:
		return "0"
	case math.Abs(f) < 10:
		return strconv.FormatFloat(f, 'f', 1, 64)
	}
	return count(int64(math.Round(f)))
}

// size writes bytes.
func size(n int64) string {
	f, units := float64(n), []string{"B", "kB", "MB", "GB", "TB"}
	for len(units) > 1 && f >= 1024 {
		f, units = f/1024, units[1:]
	}
	if units[0] == "B" || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, units[0])
	}
	return fmt.Sprintf("%.1f %s", f, units[0])
}

// millis writes milliseconds.
func millis(ms float64) string {
	switch {
	case ms <= 0:
		return "-"
	case ms < 10:
		return strconv.FormatFloat(ms, 'f', 1, 64) + " ms"
	case ms < 10_000:
		return count(int64(math.Round(ms))) + " ms"
	}
	return rate(ms/1000) + " s"
}

func percent(part, whole float64) string {
	if whole <= 0 {
		return "-"
	}
	return strconv.Itoa(int(math.Round(100*part/whole))) + " %"
}

// bar draws a share.
func bar(part, whole float64, width int) string {
	if width <= 0 {
		return ""
	}
	full := 0
	if whole > 0 {
		full = int(math.Round(min(1, max(0, part/whole)) * float64(width)))
	}
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}

var ticks = []rune("▁▂▃▄▅▆▇█")

// spark draws the last values, the newest at the right end; several share a column when there are more. What is 0 stays on the ground.
func spark(values []float64, width int) string {
	if width <= 0 {
		return ""
	}
	per := max(1, int(math.Ceil(float64(len(values))/float64(width))))
	var columns []float64
	for end := len(values); end > 0; end -= per {
		most := 0.0
		for _, v := range values[max(0, end-per):end] {
			most = max(most, v)
		}
		columns = append(columns, most)
	}
	top := 0.0
	for _, c := range columns {
		top = max(top, c)
	}
	var b strings.Builder
	b.WriteString(strings.Repeat(" ", max(0, width-len(columns))))
	for i := len(columns) - 1; i >= 0; i-- {
		level := 0
		if top > 0 && columns[i] > 0 {
			level = max(1, int(math.Round(columns[i]/top*float64(len(ticks)-1))))
		}
		b.WriteRune(ticks[level])
	}
	return b.String()
}
