package tui

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
)

// column is one column of a list.
type column struct {
	title string
	width int
	right bool
	flex  bool // takes what is left of the width; width is the least
	wide  bool // shown in wide mode only
}

// cell is one value of a row: what is shown, and what it is sorted by.
type cell struct {
	text string
	key  string  // sorted by, when num is not; newRow takes the text, and small letters
	num  float64 // sorted by when isNum
	nums bool
	tone tone
}

func text(s string) cell { return cell{text: s} }

func dim(s string) cell { return cell{text: s, tone: faint} }

func number[T int | int32 | int64](n T) cell {
	return cell{text: count(n), num: float64(n), nums: true}
}

func float(f float64, s string) cell { return cell{text: s, num: f, nums: true} }

// age is how long ago something was: sorted, the youngest first.
func age(now, t time.Time) cell {
	if t.IsZero() {
		return cell{nums: true, num: -1}
	}
	return cell{text: ago(now, t), num: now.Sub(t).Seconds(), nums: true}
}

func (c cell) compare(d cell) int {
	if c.nums && d.nums {
		return cmp.Compare(c.num, d.num)
	}
	return strings.Compare(c.key, d.key)
}

// pair is one line of the details.
type pair struct{ name, value string }

// row is one line of a list: a pure function of what it shows.
type row struct {
	id     string // stays the same from one reading to the next
	tenant string // whose it is; "": nobody's, or everybody's
	state  string
	cells  []cell
	detail []pair
	find   string // what the filter looks through
}

// newRow completes a row.
func newRow(r row) row {
	parts := make([]string, 0, len(r.cells))
	for i, c := range r.cells {
		parts = append(parts, c.text)
		if !c.nums {
			r.cells[i].key = strings.ToLower(cmp.Or(c.key, c.text))
		}
	}
	r.find = strings.ToLower(strings.Join(parts, " "))
	return r
}

// matcher reads a filter: text that is contained, whatever its case; /an expression/; ~letters in this order; and any of them behind !,
// which turns it round.
func matcher(filter string) (func(row) bool, error) {
	if rest, inverse := strings.CutPrefix(filter, "!"); inverse {
		if rest == "" {
			return func(row) bool { return true }, nil
		}
		match, err := matcher(rest)
		if err != nil {
			return nil, err
		}
		return func(r row) bool { return !match(r) }, nil
	}
	if fuzzy, is := strings.CutPrefix(filter, "~"); is {
		letters := []rune(strings.ToLower(fuzzy))
		return func(r row) bool { return inOrder(r.find, letters) }, nil
	}
	if len(filter) > 2 && strings.HasPrefix(filter, "/") && strings.HasSuffix(filter, "/") {
		re, err := regexp.Compile("(?i)" + filter[1:len(filter)-1])
		if err != nil {
			return nil, err
		}
		return func(r row) bool { return re.MatchString(r.find) }, nil
	}
	part := strings.ToLower(filter)
	return func(r row) bool { return strings.Contains(r.find, part) }, nil
}

// inOrder reports whether the letters are in s one behind another.
func inOrder(s string, letters []rune) bool {
	for _, want := range letters {
		i := strings.IndexRune(s, want)
		if i < 0 {
			return false
		}
		s = s[i+len(string(want)):]
	}
	return true
}

// list is a screen that is open: its rows, and what of them is shown.
type list struct {
	screen *screen
	arg    string // the tenant or the run that it is about

	rows    []row
	loaded  time.Time // when they were read; zero: not yet
	asking  bool
	urgent  bool      // somebody waits for them
	due     time.Time // when they are to be read again
	err     string    // why they could not be, the last time
	note    string    // said above them
	shown   []int     // rows that pass the filter, in order
	cursor  int       // in shown
	top     int       // the first one on the screen
	sorting int       // column
	down    bool
	filter  string
	badly   string // what is wrong with the filter
	marks   map[string]bool
	wide    bool
	details bool
	scroll  int // lines of the details that are above the screen
}

func newList(s *screen, arg string) *list {
	return &list{screen: s, arg: arg, sorting: s.sorting, down: s.down, marks: map[string]bool{}}
}

// title is how the list calls itself.
func (l *list) title() string {
	if l.arg != "" {
		return l.screen.name + " " + tail(l.arg)
	}
	return l.screen.name
}

// set takes new rows; the cursor stays on its row.
func (l *list) set(rows []row, note string, now time.Time) {
	at := l.at()
	l.rows, l.note, l.loaded, l.err = rows, note, now, ""
	kept := map[string]bool{}
	if len(l.marks) > 0 {
		for _, r := range rows {
			if l.marks[r.id] {
				kept[r.id] = true
			}
		}
	}
	l.marks = kept
	l.arrange(at.id)
}

// arrange filters and sorts, and puts the cursor on the row with the id.
func (l *list) arrange(id string) {
	match, err := matcher(l.filter)
	l.badly = ""
	if err != nil {
		l.badly = "this is no regular expression"
		match = func(row) bool { return true }
	}
	l.shown = l.shown[:0]
	for i := range l.rows {
		if l.filter == "" || match(l.rows[i]) {
			l.shown = append(l.shown, i)
		}
	}
	slices.SortStableFunc(l.shown, func(a, b int) int {
		c := l.rows[a].cells[l.sorting].compare(l.rows[b].cells[l.sorting])
		if l.down {
			return -c
		}
		return c
	})
	if id != "" {
		for i, at := range l.shown {
			if l.rows[at].id == id {
				l.cursor = i
				return
			}
		}
	}
	l.cursor = max(0, min(l.cursor, len(l.shown)-1))
}

// at is the row of the cursor; one without an id: there is none.
func (l *list) at() row {
	if l.cursor < 0 || l.cursor >= len(l.shown) {
		return row{}
	}
	return l.rows[l.shown[l.cursor]]
}

// chosen are the marked rows in their order, or the one of the cursor.
func (l *list) chosen() []row {
	if len(l.marks) == 0 {
		if at := l.at(); at.id != "" {
			return []row{at}
		}
		return nil
	}
	var rows []row
	for _, i := range l.sortedAll() {
		if l.marks[l.rows[i].id] {
			rows = append(rows, l.rows[i])
		}
	}
	return rows
}

// sortedAll are all rows, also those that the filter hides: what is marked stays marked.
func (l *list) sortedAll() []int {
	all := make([]int, len(l.rows))
	for i := range all {
		all[i] = i
	}
	return all
}

// move moves the cursor by so many rows.
func (l *list) move(by int) {
	l.cursor = max(0, min(l.cursor+by, len(l.shown)-1))
	l.scroll = 0
}

// columnsIn are the columns that a width has room for, with their widths. In a narrow terminal the last ones go.
func columnsIn(columns []column, wide bool, width int) (at, widths []int) {
	left, flex := width-2, -1 // two for the mark
	for i, c := range columns {
		if c.wide && !wide {
			continue
		}
		need := c.width
		if len(at) > 0 {
			need += 2
		}
		if need > left {
			if len(at) > 0 {
				continue
			}
			need = max(1, left)
		}
		left -= need
		if c.flex && flex < 0 {
			flex = len(at)
		}
		at = append(at, i)
		if len(at) > 1 {
			need -= 2
		}
		widths = append(widths, need)
	}
	if flex >= 0 && left > 0 {
		widths[flex] += left
	}
	return at, widths
}

// view draws the list: its titles, and as many rows as there is room for, no others.
func (l *list) view(p palette, width, height int) []string {
	if height < 1 {
		return nil
	}
	at, widths := columnsIn(l.screen.columns, l.wide, width)
	var head []string
	for i, c := range at {
		title := l.screen.columns[c].title
		if c == l.sorting {
			title += map[bool]string{false: "↑", true: "↓"}[l.down]
		}
		head = append(head, fit(title, widths[i], l.screen.columns[c].right))
	}
	lines := []string{"  " + p.head.Render(strings.Join(head, "  "))}
	height--
	if len(l.shown) == 0 {
		return append(lines, p.in(faint, fit("  "+l.empty(), width, false)))
	}
	l.top = max(0, min(l.top, len(l.shown)-height))
	if l.cursor < l.top {
		l.top = l.cursor
	}
	if l.cursor >= l.top+height {
		l.top = l.cursor - height + 1
	}
	for i := l.top; i < min(len(l.shown), l.top+height); i++ {
		r := l.rows[l.shown[i]]
		lines = append(lines, l.line(p, r, at, widths, i == l.cursor))
	}
	return lines
}

func (l *list) line(p palette, r row, at, widths []int, cursor bool) string {
	mark := " "
	switch {
	case cursor && l.marks[r.id]:
		mark = "»"
	case cursor:
		mark = "›"
	case l.marks[r.id]:
		mark = "+"
	}
	var b strings.Builder
	for i, c := range at {
		if i > 0 {
			b.WriteString("  ")
		}
		s := fit(r.cells[c].text, widths[i], l.screen.columns[c].right)
		if !cursor {
			s = p.in(r.cells[c].tone, s)
		}
		b.WriteString(s)
	}
	if cursor {
		return p.at.Render(mark + " " + b.String())
	}
	return p.in(accent, mark) + " " + b.String()
}

// empty says why there are no rows.
func (l *list) empty() string {
	switch {
	case l.err != "":
		return l.err
	case l.loaded.IsZero():
		return "asking …"
	case l.filter != "" && len(l.rows) > 0:
		return "nothing passes the filter; esc takes it away"
	}
	return l.screen.none
}

// detailLines are the details of the cursor's row.
func (l *list) detailLines(p palette, width int) []string {
	r := l.at()
	names := 0
	for _, d := range r.detail {
		names = max(names, len(d.name))
	}
	names = min(names, 14)
	var lines []string
	for _, d := range r.detail {
		if d.value == "" {
			continue
		}
		for i, s := range wrap(d.value, max(1, width-names-2)) {
			name := ""
			if i == 0 {
				name = d.name
			}
			lines = append(lines, p.in(faint, fit(name, names, false))+"  "+strings.TrimRightFunc(s, unicode.IsSpace))
		}
	}
	return lines
}
