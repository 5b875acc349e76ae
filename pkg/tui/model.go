package tui

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"charm.land/bubbles/v2/textinput"
	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// command is something that happens outside of Update, which itself does nothing but think.
type command = tea.Cmd

// mode is what a key goes to.
type mode int

const (
	browsing  mode = iota
	helping        // the keys are shown
	going          // a screen's name is typed behind :
	filtering      // a filter is typed behind /
	wording        // a name that an action needs is typed
	naming         // the name of a tenant that is to be dropped, or restored, is typed
	unlocking      // the word is typed that ends the protection
	agreeing       // a command line is shown: enter runs it
)

const (
	unlockWord = "unlock"

	fleetEvery = 2 * time.Second
	agesEvery  = 5 * time.Minute
	// pollEvery is the least time from one statement to the next that nobody has asked for.
	pollEvery = time.Second
	// Each question has a bound. What has not answered a second later is told, and waited for: nothing else is asked meanwhile.
	databaseBound = 5 * time.Second
	serverBound   = 3 * time.Second
	storeBound    = time.Minute
	// share is how many times longer than reading took the next one waits.
	share      = 10
	longestTry = 15 * time.Second
)

// Model is the dashboard's state. Update alone changes it.
type Model struct {
	o       Options
	ctx     context.Context // of everything that is asked and run; ends with the dashboard
	end     context.CancelFunc
	now     time.Time
	started time.Time
	palette palette
	width   int
	height  int

	screens []*screen
	stack   []*list // empty: home
	lists   map[string]*list
	pic     picture

	db struct {
		busy      bool
		began     time.Time
		notBefore time.Time
		heard     time.Time // when it last answered
		tries     int       // that failed since
		err       string
	}
	fleetDue time.Time
	readings []Reading
	reading  bool
	readDue  time.Time
	aging    bool
	agesDue  time.Time

	mode    mode
	input   textinput.Model
	message string
	tone    tone
	scroll  int // of the help

	protected bool
	values    bool
	pending   *action
	rows      []row // that the pending action is for
	proposed  *job
	job       *job
	output    bool // the job is shown
	undos     [][]string
	leaving   bool

	tick func() tea.Cmd // the next second
}

var _ tea.Model = (*Model)(nil)

// New makes a dashboard; Show shows it.
func New(o Options) *Model {
	if o.Now == nil {
		o.Now = time.Now
	}
	m := &Model{o: o, palette: newPalette(true), screens: screens(), lists: map[string]*list{}, protected: o.Protected, input: textinput.New(), tick: nextSecond}
	m.ctx, m.end = context.WithCancel(context.Background())
	m.input.ShowSuggestions = true
	still := m.input.Styles()
	still.Cursor.Blink = false
	m.input.SetStyles(still)
	m.input.KeyMap.Paste.SetEnabled(false) // it would run a program; what the terminal pastes comes all the same
	m.now = o.Now()
	m.started, m.db.heard = m.now, m.now
	m.pic.rates.Hits = -1
	return m
}

// stop ends what is at work; a command that still runs is interrupted and has a moment to end in order.
func (m *Model) stop() {
	m.end()
	if m.job != nil && !m.job.over {
		m.job.cancel()
		select {
		case <-m.job.ended:
		case <-time.After(20 * time.Second):
		}
	}
}

type (
	tickMsg  time.Time
	fleetMsg struct {
		fleet Fleet
		err   error
		took  time.Duration
	}
	readingsMsg struct {
		readings []Reading
		rates    Rates
	}
	agesMsg struct {
		ages Ages
		err  error
		took time.Duration
	}
	listMsg struct {
		list *list
		rows []row
		note string
		err  error
		took time.Duration
	}
	psqlMsg struct{ err error }
)

// Init is the first thing that bubbletea calls.
func (m *Model) Init() tea.Cmd {
	return tea.Batch(tea.RequestBackgroundColor, m.tick(), m.ask())
}

func nextSecond() tea.Cmd {
	return tea.Tick(time.Second, func(t time.Time) tea.Msg { return tickMsg(t) })
}

// Update takes what has happened.
func (m *Model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	m.now = m.o.Now()
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case tea.BackgroundColorMsg:
		m.palette = newPalette(msg.IsDark())
	case tickMsg:
		return m, tea.Batch(m.tick(), m.ask())
	case fleetMsg:
		return m, m.gotFleet(msg)
	case readingsMsg:
		m.reading, m.readings, m.pic.rates = false, msg.readings, msg.rates
		if msg.rates.Ready {
			m.pic.history.add(msg.rates)
		}
		m.readDue = m.now.Add(readEvery)
	case agesMsg:
		m.aging, m.agesDue = false, m.now.Add(max(agesEvery, share*msg.took))
		m.pic.ages, m.pic.agesErr, m.pic.aged = msg.ages, "", true
		if msg.err != nil {
			m.pic.agesErr, m.agesDue = said(msg.err), m.now.Add(max(30*time.Second, share*msg.took))
		}
	case listMsg:
		m.gotList(msg)
		return m, m.ask()
	case lineMsg, outputMsg, endMsg:
		return m, m.gotOutput(msg)
	case psqlMsg:
		if msg.err != nil {
			m.say(bad, "it ended badly: "+said(msg.err))
		}
		return m, m.refresh()
	case tea.KeyPressMsg:
		return m, m.press(msg)
	case tea.PasteMsg:
		if m.typing() {
			return m, m.typed(msg)
		}
	}
	return m, nil
}

// said is an error for people.
func said(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	var f *fault.Fault
	if errors.As(err, &f) {
		return f.Message
	}
	return err.Error()
}

// ask begins to read what is due: one thing at a time from the database, and beside it the servers and the store.
func (m *Model) ask() tea.Cmd {
	var cmds []tea.Cmd
	l := m.list()
	// What somebody has just asked for is no poll, and comes first.
	urgent := l != nil && l.urgent && m.db.tries == 0
	if !m.db.busy && (urgent || !m.now.Before(m.db.notBefore)) {
		wants := l != nil && !l.screen.elsewhere && !l.asking && !m.now.Before(l.due)
		switch {
		case wants && (urgent || m.now.Before(m.fleetDue) || l.due.Before(m.fleetDue)):
			m.db.busy, m.db.began = true, m.now
			cmds = append(cmds, m.askList(l, databaseBound))
		case !m.now.Before(m.db.notBefore) && !m.now.Before(m.fleetDue):
			m.db.busy, m.db.began = true, m.now
			cmds = append(cmds, m.askFleet())
		}
	}
	if l != nil && l.screen.elsewhere && !l.asking && !m.now.Before(l.due) {
		cmds = append(cmds, m.askList(l, storeBound))
	}
	if !m.reading && m.pic.known && !m.now.Before(m.readDue) {
		m.reading = true
		cmds = append(cmds, m.askServers())
	}
	if !m.aging && !m.now.Before(m.agesDue) {
		m.aging = true
		cmds = append(cmds, m.askAges())
	}
	return tea.Batch(cmds...)
}

func (m *Model) askFleet() tea.Cmd {
	ctx, source, clock := m.ctx, m.o.Source, m.o.Now
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(ctx, databaseBound)
		defer cancel()
		start := clock()
		f, err := source.Fleet(ctx)
		return fleetMsg{f, err, clock().Sub(start)}
	}
}

func (m *Model) askServers() tea.Cmd {
	ctx, source, before, servers := m.ctx, m.o.Source, m.readings, m.pic.fleet.Servers
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(ctx, serverBound)
		defer cancel()
		after := source.Readings(ctx, servers)
		return readingsMsg{after, compare(before, after)}
	}
}

func (m *Model) askAges() tea.Cmd {
	ctx, source, clock := m.ctx, m.o.Source, m.o.Now
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(ctx, storeBound)
		defer cancel()
		start := clock()
		a, err := source.Ages(ctx)
		return agesMsg{a, err, clock().Sub(start)}
	}
}

func (m *Model) askList(l *list, bound time.Duration) tea.Cmd {
	l.asking, l.urgent = true, false
	q := question{arg: l.arg, now: m.now, servers: m.pic.fleet.Servers, load: m.pic.rates.Tenants, head: m.pic.fleet.Head, values: m.values}
	ctx, source, clock := m.ctx, m.o.Source, m.o.Now
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(ctx, bound)
		defer cancel()
		start := clock()
		rows, note, err := l.screen.load(ctx, source, q)
		return listMsg{l, rows, note, err, clock().Sub(start)}
	}
}

// heard notes how the database has answered, and when it may be asked again.
func (m *Model) heard(err error) {
	m.db.busy = false
	if err == nil || !lost(err) {
		m.db.heard, m.db.tries, m.db.err = m.now, 0, ""
		m.db.notBefore = m.db.began.Add(pollEvery)
		return
	}
	wait := min(longestTry, pollEvery<<min(m.db.tries, 8))
	m.db.tries++
	m.db.err = said(err)
	m.db.notBefore = m.now.Add(wait)
}

// lost reports whether an error says that the database cannot be reached, rather than that it has refused.
func lost(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || fault.Of(err).Kind == fault.Unavailable
}

func (m *Model) gotFleet(msg fleetMsg) tea.Cmd {
	m.heard(msg.err)
	m.fleetDue = m.now.Add(max(fleetEvery, share*msg.took))
	switch {
	case msg.err == nil:
		m.pic.fleet, m.pic.known = msg.fleet, true
	case !lost(msg.err):
		m.say(bad, said(msg.err))
	}
	return m.ask()
}

func (m *Model) gotList(msg listMsg) {
	l := msg.list
	l.asking = false
	if !l.screen.elsewhere {
		m.heard(msg.err)
	}
	l.due = m.now.Add(max(l.screen.every, share*msg.took))
	if msg.err != nil {
		l.err = said(msg.err)
		return
	}
	l.set(msg.rows, msg.note, m.now)
}

// trouble is what is wrong with the connection; "": nothing.
func (m *Model) trouble() string {
	silent := m.now.Sub(m.db.heard)
	switch {
	case m.db.busy && m.now.Sub(m.db.began) > databaseBound+time.Second:
		return "PostgreSQL has not answered for " + short(silent) + ": waiting"
	case m.db.tries > 0:
		s := "PostgreSQL lost " + short(silent) + " ago: retrying"
		if m.db.err != "" {
			s += " (" + m.db.err + ")"
		}
		return s
	}
	return ""
}

// list is the one that is open; nil: home.
func (m *Model) list() *list {
	if len(m.stack) == 0 {
		return nil
	}
	return m.stack[len(m.stack)-1]
}

// where is the name of the screen.
func (m *Model) where() string {
	if l := m.list(); l != nil {
		return l.screen.name
	}
	return home
}

func (m *Model) say(t tone, s string) { m.tone, m.message = t, s }

func (m *Model) screen(name string) *screen {
	for _, s := range m.screens {
		if s.name == name || s.key == name && name != "" || slices.Contains(s.alias, name) {
			return s
		}
	}
	return nil
}

// open opens a list, on top of the others or in their place. Each is kept: its cursor and filter are as they were left.
func (m *Model) open(s *screen, arg string, top bool) tea.Cmd {
	if s.needs != "" && arg == "" {
		m.say(warn, s.name+" wants "+s.needs+": `:"+s.name+" NAME`, or enter on a row")
		return nil
	}
	key := s.name + " " + arg
	l := m.lists[key]
	if l == nil {
		l = newList(s, arg)
		if s.needs == "" || len(m.lists) < 100 { // a bound for who looks into many tenants
			m.lists[key] = l
		}
	}
	if !top {
		m.stack = nil
	}
	m.stack = append(m.stack, l)
	l.due, l.urgent = m.now, true
	return m.ask()
}

func (m *Model) openFor(name string) tea.Cmd {
	l := m.list()
	if l == nil {
		return nil
	}
	r := l.at()
	if r.tenant == "" {
		m.say(warn, "the row is of no tenant")
		return nil
	}
	return m.open(m.screen(name), r.tenant, true)
}

func (m *Model) goHome() tea.Cmd {
	m.stack = nil
	return nil
}

// press takes a key.
func (m *Model) press(k tea.KeyPressMsg) tea.Cmd {
	m.message = ""
	if k.String() != "q" && k.String() != "ctrl+c" {
		m.leaving = false
	}
	switch {
	case m.mode == agreeing:
		return m.agree(k)
	case m.typing():
		return m.type1(k)
	}
	name := k.String()
	if m.output && m.job != nil && m.job.over {
		switch name {
		case "enter":
			m.output = false
			return nil
		case "Y":
			if again := m.job.again(); again != nil {
				return m.run(&job{lines: again, undoes: m.job.undoes})
			}
		case "y":
			return m.copy(m.commandLines(m.job.lines), "the command line is copied")
		}
	}
	if m.mode == helping {
		switch name {
		case "down", "j":
			m.scroll++
			return nil
		case "up", "k":
			m.scroll = max(0, m.scroll-1)
			return nil
		case "pgdown", "ctrl+f", "space":
			m.scroll += m.page()
			return nil
		case "pgup", "ctrl+b":
			m.scroll = max(0, m.scroll-m.page())
			return nil
		}
	}
	if s := m.screen(name); s != nil && s.key == name {
		m.mode = browsing
		return m.open(s, "", false)
	}
	for _, b := range bindings() {
		if !slices.Contains(b.keys, name) || !b.on(m.where()) {
			continue
		}
		if m.mode == helping && name != "?" && name != "esc" && name != "q" && name != "ctrl+c" {
			m.mode = browsing
		}
		if b.action != nil {
			return m.begin(b.action)
		}
		if b.do != nil {
			return b.do(m)
		}
	}
	if m.where() == home && name == "enter" {
		return m.open(m.screen("tenants"), "", false)
	}
	return nil
}

// page is how many rows there are on the screen.
func (m *Model) page() int { return max(1, m.height-6) }

func (m *Model) moveBy(by int) tea.Cmd {
	if l := m.list(); l != nil {
		l.move(by)
	}
	return nil
}

func (m *Model) scrollBy(by int) tea.Cmd {
	if m.output && m.job != nil {
		m.job.scroll = max(0, m.job.scroll-by)
		return nil
	}
	if l := m.list(); l != nil {
		l.scroll = max(0, l.scroll+by)
	}
	return nil
}

func (m *Model) enter() tea.Cmd {
	l := m.list()
	if l == nil || l.at().id == "" {
		return nil
	}
	if l.screen.enter != nil {
		if name, arg := l.screen.enter(l.at()); name != "" && arg != "" {
			return m.open(m.screen(name), arg, true)
		}
	}
	l.details, l.scroll = !l.details, 0
	return nil
}

func (m *Model) toggleDetails() tea.Cmd {
	l := m.list()
	l.details, l.scroll = !l.details, 0
	return nil
}

func (m *Model) toggleWide() tea.Cmd {
	l := m.list()
	l.wide = !l.wide
	return nil
}

func (m *Model) toggleValues() tea.Cmd {
	m.values = !m.values
	if m.values {
		m.say(warn, "statements are shown with the values in them: v hides them again")
	}
	l := m.list()
	if !m.values {
		l.set(nil, "", time.Time{}) // what was shown must not stay until the next answer
	}
	l.due, l.urgent = m.now, true
	return m.ask()
}

func (m *Model) sortNext() tea.Cmd {
	l := m.list()
	id := l.at().id
	at, _ := columnsIn(l.screen.columns, l.wide, m.width)
	if len(at) == 0 {
		return nil
	}
	i := slices.Index(at, l.sorting)
	l.sorting = at[(i+1)%len(at)]
	l.arrange(id)
	return nil
}

func (m *Model) sortReverse() tea.Cmd {
	l := m.list()
	id := l.at().id
	l.down = !l.down
	l.arrange(id)
	return nil
}

func (m *Model) mark() tea.Cmd {
	l := m.list()
	if r := l.at(); r.id != "" {
		if l.marks[r.id] {
			delete(l.marks, r.id)
		} else {
			l.marks[r.id] = true
		}
		l.move(1)
	}
	return nil
}

func (m *Model) markAll() tea.Cmd {
	l := m.list()
	if len(l.marks) > 0 {
		l.marks = map[string]bool{}
		return nil
	}
	for _, i := range l.shown {
		l.marks[l.rows[i].id] = true
	}
	return nil
}

// copy hands a text to the terminal's clipboard.
func (m *Model) copy(s, told string) tea.Cmd {
	m.say(good, told)
	return tea.SetClipboard(s)
}

func (m *Model) copyNames() tea.Cmd {
	var names []string
	for _, r := range m.list().chosen() {
		if r.id == r.tenant || r.tenant == "" || m.where() != "domains" && m.where() != "users" && m.where() != "tasks" {
			names = append(names, clean(cmp.Or(nameOf(m.where(), r), r.id)))
			continue
		}
		names = append(names, clean(r.id))
	}
	if len(names) == 0 {
		return nil
	}
	return m.copy(strings.Join(names, "\n"), "copied: "+strings.Join(names[:min(3, len(names))], ", "))
}

// nameOf is by what a row goes in commands.
func nameOf(screen string, r row) string {
	switch screen {
	case "queries", "locks":
		return r.cells[0].text // the pid
	case "audit", "logs":
		return r.tenant
	}
	return r.id
}

func (m *Model) copyRows() tea.Cmd {
	var lines []string
	for _, r := range m.list().chosen() {
		var cells []string
		for _, c := range r.cells {
			cells = append(cells, clean(c.text))
		}
		lines = append(lines, strings.Join(cells, "\t"))
	}
	if len(lines) == 0 {
		return nil
	}
	return m.copy(strings.Join(lines, "\n"), "copied "+count(len(lines))+" row(s)")
}

func (m *Model) refresh() tea.Cmd {
	m.fleetDue, m.readDue = m.now, m.now
	if l := m.list(); l != nil {
		l.due, l.urgent = m.now, true
	} else {
		m.agesDue = m.now
	}
	if m.db.tries > 0 {
		m.db.notBefore = m.now // who asks does not wait for the next try
	}
	return m.ask()
}

func (m *Model) toggleHelp() tea.Cmd {
	m.scroll = 0
	if m.mode == helping {
		m.mode = browsing
	} else {
		m.mode = helping
	}
	return nil
}

func (m *Model) toggleOutput() tea.Cmd {
	if m.job == nil {
		m.say(faint, "no command was run yet")
		return nil
	}
	m.output = !m.output
	return nil
}

func (m *Model) back() tea.Cmd {
	l := m.list()
	switch {
	case m.mode == helping:
		m.mode = browsing
	case m.output:
		m.output = false
	case l == nil:
	case l.details:
		l.details = false
	case l.filter != "":
		id := l.at().id
		l.filter = ""
		l.arrange(id)
	case len(l.marks) > 0:
		l.marks = map[string]bool{}
	default:
		m.stack = m.stack[:len(m.stack)-1]
	}
	return nil
}

func (m *Model) quit() tea.Cmd {
	if m.job != nil && !m.job.over && !m.leaving {
		m.leaving = true
		m.say(warn, "a command is at work: once more leaves, and interrupts it")
		return nil
	}
	return tea.Quit
}

func (m *Model) interrupt() tea.Cmd {
	if m.job == nil || m.job.over {
		m.say(faint, "no command is at work")
		return nil
	}
	m.job.cancel()
	m.say(warn, "it is interrupted, and ends what it has in hand")
	return nil
}

// typing reports whether keys are letters.
func (m *Model) typing() bool {
	return m.mode == going || m.mode == filtering || m.mode == wording || m.mode == naming || m.mode == unlocking
}

func (m *Model) prompt(to mode, sign string, suggestions []string) tea.Cmd {
	m.mode = to
	m.input.Reset()
	m.input.Prompt = sign
	m.input.SetSuggestions(suggestions)
	return m.input.Focus()
}

func (m *Model) typed(msg tea.Msg) tea.Cmd {
	before := m.input.Value()
	var cmd tea.Cmd
	m.input, cmd = m.input.Update(msg)
	if l := m.list(); m.mode == filtering && l != nil && m.input.Value() != before {
		id := l.at().id
		l.filter = m.input.Value()
		l.arrange(id)
	}
	return cmd
}

// type1 takes a key while something is typed.
func (m *Model) type1(k tea.KeyPressMsg) tea.Cmd {
	switch k.String() {
	case "ctrl+c":
		return m.quit()
	case "esc":
		if l := m.list(); m.mode == filtering && l != nil {
			id := l.at().id
			l.filter = ""
			l.arrange(id)
		}
		m.settle()
		return nil
	case "enter":
		value := strings.TrimSpace(m.input.Value())
		switch m.mode {
		case filtering:
			m.settle()
			return nil
		case going:
			m.settle()
			return m.gone(value)
		case wording:
			if wrong := checkWord(value); wrong != "" {
				m.say(bad, wrong)
				return nil
			}
			m.propose(value)
			return nil
		case naming:
			return m.named(value)
		case unlocking:
			m.settle()
			if value != unlockWord {
				m.say(bad, "that is not the word; nothing is unlocked")
				return nil
			}
			m.protected = false
			m.say(warn, "unlocked: `:lock` protects again")
			return nil
		}
	}
	return m.typed(k)
}

// settle ends what was typed.
func (m *Model) settle() {
	m.mode, m.pending, m.rows, m.proposed = browsing, nil, nil, nil
	m.input.Blur()
}

func (m *Model) askFilter() tea.Cmd {
	l := m.list()
	cmd := m.prompt(filtering, "/", nil)
	m.input.SetValue(l.filter)
	m.input.CursorEnd()
	return cmd
}

// words are what can stand behind the colon.
func (m *Model) words() []string {
	words := []string{home, "keys", "lock", "quit", "unlock"}
	for _, s := range m.screens {
		if s.needs == "" {
			words = append(words, s.name)
		}
	}
	if l := m.lists["tenants "]; l != nil {
		for _, r := range l.rows[:min(len(l.rows), 2000)] {
			words = append(words, "users "+r.tenant, "logs "+r.tenant)
		}
	}
	slices.Sort(words)
	return words
}

func (m *Model) askCommand() tea.Cmd { return m.prompt(going, ":", m.words()) }

// gone goes where the words say.
func (m *Model) gone(line string) tea.Cmd {
	name, arg, _ := strings.Cut(line, " ")
	arg = strings.TrimSpace(arg)
	switch name {
	case "":
		return nil
	case home, "h", "fleet":
		return m.goHome()
	case "q", "quit":
		return m.quit()
	case "keys", "help", "?":
		m.mode, m.scroll = helping, 0
		return nil
	case "lock":
		m.protected = true
		m.say(good, "nothing is changed from here before `:unlock`")
		return nil
	case "unlock":
		if !m.protected {
			m.say(faint, "nothing is locked")
			return nil
		}
		return m.prompt(unlocking, "type "+unlockWord+" to be able to change "+clean(m.o.Place)+": ", nil)
	}
	s := m.screen(name)
	if s == nil {
		var known []string
		for _, s := range m.screens {
			known = append(known, s.name)
		}
		told := "there is no screen " + name
		if near := fault.Nearest(name, known, 3); len(near) > 0 {
			told += "; did you mean " + strings.Join(near, ", ") + "?"
		}
		m.say(bad, told)
		return nil
	}
	return m.open(s, arg, arg != "")
}

// begin begins an action: what it needs is asked for, and its command line shown, before anything runs.
func (m *Model) begin(a *action) tea.Cmd {
	if m.protected {
		m.say(warn, "read-only: `:unlock` lets this dashboard change things")
		return nil
	}
	if m.job != nil && !m.job.over {
		m.output = true
		m.say(warn, "a command is at work: wait for it, or x stops it")
		return nil
	}
	var rows []row
	if l := m.list(); l != nil && !a.alone {
		rows = l.chosen()
	}
	if why := a.refuses(rows); why != "" {
		m.say(warn, why)
		return nil
	}
	m.pending, m.rows = a, rows
	if a.word != "" {
		return m.prompt(wording, a.word+": ", nil)
	}
	m.propose("")
	if a.typed {
		return m.prompt(naming, "type "+clean(rows[0].tenant)+" to go on: ", nil)
	}
	return nil
}

// propose shows the command lines.
func (m *Model) propose(word string) {
	m.proposed = &job{lines: m.pending.lines(m.rows, word)}
	m.mode = agreeing
}

func (m *Model) named(value string) tea.Cmd {
	if value != m.rows[0].tenant {
		m.settle()
		m.say(warn, "that is not the name; nothing was done")
		return nil
	}
	return m.go1()
}

func (m *Model) agree(k tea.KeyPressMsg) tea.Cmd {
	switch k.String() {
	case "enter":
		return m.go1()
	case "y":
		return m.copy(m.commandLines(m.proposed.lines), "the command line is copied; enter runs it")
	case "esc", "n", "q", "ctrl+c":
		m.settle()
		m.say(faint, "nothing was done")
	}
	return nil
}

// go1 runs what was proposed.
func (m *Model) go1() tea.Cmd {
	a, j := m.pending, m.proposed
	m.settle()
	if a != nil && a.takes {
		return tea.ExecProcess(m.o.Command(m.ctx, j.lines[0]), func(err error) tea.Msg { return psqlMsg{err} })
	}
	return m.run(j)
}

// run begins a job.
func (m *Model) run(j *job) tea.Cmd {
	ctx, cancel := context.WithCancel(m.ctx)
	j.cancel, j.begun, j.events, j.ended = cancel, m.now, make(chan tea.Msg, 256), make(chan struct{})
	m.job, m.output = j, true
	command := m.o.Command
	return tea.Batch(func() tea.Msg {
		defer cancel()
		j.run(ctx, command)
		return nil
	}, j.next)
}

func (m *Model) gotOutput(msg tea.Msg) tea.Cmd {
	switch msg := msg.(type) {
	case lineMsg:
		if msg.at > 0 {
			m.finished(msg.job)
		}
		msg.job.at = msg.at
		if len(msg.job.lines) > 1 {
			msg.job.say("$ " + shown(m.o.Prefix, msg.job.lines[msg.at]))
		}
		return msg.job.next
	case outputMsg:
		msg.job.say(msg.text)
		return msg.job.next
	case endMsg:
		j := msg.job
		j.over, j.code = true, msg.code
		if msg.err != nil {
			j.say(msg.err.Error())
		}
		if j.code == 0 {
			m.finished(j)
		}
		if l := m.list(); l != nil {
			l.marks = map[string]bool{}
		}
		return m.refresh()
	}
	return nil
}

// finished keeps how to undo a command line that went well.
func (m *Model) finished(j *job) {
	if j.undoes {
		m.undos = m.undos[:max(0, len(m.undos)-1)]
		return
	}
	if undo := undoOf(j.out); undo != nil && (len(m.undos) == 0 || !slices.Equal(m.undos[len(m.undos)-1], undo)) {
		m.undos = append(m.undos, undo)
	}
}

func (m *Model) askUndo() tea.Cmd {
	switch {
	case m.protected:
		m.say(warn, "read-only: `:unlock` lets this dashboard change things")
	case m.job != nil && !m.job.over:
		m.say(warn, "a command is at work: wait for it, or x stops it")
	case len(m.undos) == 0:
		m.say(faint, "there is nothing to undo that was done from here")
	default:
		m.proposed = &job{lines: [][]string{m.undos[len(m.undos)-1]}, undoes: true}
		m.mode = agreeing
	}
	return nil
}

func (m *Model) commandLines(lines [][]string) string {
	var all []string
	for _, l := range lines {
		all = append(all, shown(m.o.Prefix, l))
	}
	return strings.Join(all, "\n")
}

// View draws the screen.
func (m *Model) View() tea.View {
	v := tea.NewView(strings.Join(m.draw(), "\n"))
	v.AltScreen = true
	v.WindowTitle = clean("oneo " + m.o.Place)
	return v
}

// draw makes exactly as many lines as the screen has, none of them wider.
func (m *Model) draw() []string {
	if m.width < 1 || m.height < 1 {
		return nil
	}
	w, p := m.width, m.palette
	m.pic.now = m.now
	lines := []string{p.bar.Render(m.titleLine(w))}
	bottom := []string{m.messageLine(w), hints(p, m.where(), w)}
	if m.height >= 4 {
		lines = append(lines, m.statusLine(w))
	}
	if m.height < 6 {
		bottom = bottom[:1]
	}
	if body := m.height - len(lines) - len(bottom); body > 0 {
		lines = append(lines, m.body(w, body)...)
		for len(lines) < m.height-len(bottom) {
			lines = append(lines, "")
		}
		lines = lines[:m.height-len(bottom)]
	}
	lines = append(lines, bottom...)
	lines = lines[:min(len(lines), m.height)]
	for i, l := range lines {
		lines[i] = ansi.Truncate(l, w, "")
	}
	return lines
}

func (m *Model) titleLine(w int) string {
	crumbs := home
	if len(m.stack) > 0 {
		var names []string
		for _, l := range m.stack {
			names = append(names, l.title())
		}
		crumbs = strings.Join(names, " › ")
	}
	right := m.now.UTC().Format("15:04:05") + "Z "
	if m.protected {
		right = "read-only  " + right
	}
	left := " oneo  " + m.o.Place + "  " + crumbs
	room := w - ansi.StringWidth(right) - 1
	if room < 10 {
		return fit(left, w, false)
	}
	return fit(left, room, false) + " " + right
}

func (m *Model) statusLine(w int) string {
	if t := m.trouble(); t != "" {
		return m.palette.loss.Render(fit(" ✗ "+t, w, false))
	}
	l := m.list()
	if l == nil {
		if !m.pic.known {
			return ""
		}
		return m.palette.in(faint, fit(" the fleet; enter opens the tenants", w, false))
	}
	var parts []string
	switch {
	case l.loaded.IsZero():
	case l.filter != "":
		parts = append(parts, count(len(l.shown))+" of "+count(len(l.rows)), "filter "+l.filter)
	default:
		parts = append(parts, count(len(l.rows)))
	}
	if l.badly != "" {
		parts = append(parts, l.badly)
	}
	if n := len(l.marks); n > 0 {
		parts = append(parts, count(n)+" marked")
	}
	if !l.loaded.IsZero() {
		if old := m.now.Sub(l.loaded); old > 10*time.Second {
			parts = append(parts, "read "+short(old)+" ago")
		}
	}
	if l.err != "" && len(l.rows) > 0 {
		parts = append(parts, l.err)
	}
	if l.note != "" {
		parts = append(parts, l.note)
	}
	return m.palette.in(faint, fit(" "+strings.Join(parts, " · "), w, false))
}

func (m *Model) messageLine(w int) string {
	if m.typing() && m.message == "" { // what is wrong with what was typed stands there until the next key
		m.input.SetWidth(max(1, w-ansi.StringWidth(m.input.Prompt)-2))
		return " " + m.input.View()
	}
	return m.palette.in(m.tone, fit(" "+m.message, w, false))
}

// body is what is between the frame's lines.
func (m *Model) body(w, h int) []string {
	p := m.palette
	if m.mode == helping {
		about := "The fleet in one screen."
		if l := m.list(); l != nil {
			about = l.screen.about
		}
		lines := helpLines(p, m.where(), about, w)
		m.scroll = max(0, min(m.scroll, len(lines)-h))
		return lines[m.scroll:]
	}
	var under []string
	switch l := m.list(); {
	case m.proposed != nil:
		under = m.proposal(w, h)
	case m.output && m.job != nil:
		under = m.jobLines(w, max(4, h/2))
	case l != nil && l.details && l.at().id != "":
		lines := l.detailLines(p, w-1)
		room := min(len(lines), max(3, h/2-1))
		l.scroll = max(0, min(l.scroll, len(lines)-room))
		under = []string{p.in(faint, strings.Repeat("─", w))}
		for _, s := range lines[l.scroll : l.scroll+room] {
			under = append(under, " "+s)
		}
	}
	under = under[:min(len(under), h)]
	room := h - len(under)
	var lines []string
	if l := m.list(); l != nil {
		lines = l.view(p, w, room)
	} else {
		lines = homeLines(p, m.pic, w, room)
	}
	lines = lines[:min(len(lines), room)]
	for len(lines) < room {
		lines = append(lines, "")
	}
	return append(lines, under...)
}

// proposal shows the command lines that are to be run.
func (m *Model) proposal(w, h int) []string {
	p := m.palette
	lines := []string{p.in(faint, strings.Repeat("─", w))}
	if m.pending != nil {
		lines = append(lines, p.in(strong, fit(" "+m.pending.what, w, false)))
	} else {
		lines = append(lines, p.in(strong, fit(" undo", w, false)))
	}
	most := max(1, h/2-3)
	for i, args := range m.proposed.lines {
		if i == most && len(m.proposed.lines) > most+1 {
			lines = append(lines, p.in(faint, fit(fmt.Sprintf("   and %d more", len(m.proposed.lines)-most), w, false)))
			break
		}
		for _, s := range wrap(shown(m.o.Prefix, args), max(1, w-4)) {
			lines = append(lines, "   "+p.in(accent, s))
		}
	}
	if m.mode == agreeing {
		lines = append(lines, p.in(faint, fit(" enter: run it   y: copy it   esc: leave it", w, false)))
	} else {
		lines = append(lines, p.in(faint, fit(" the name of the tenant, and enter: run it   esc: leave it", w, false)))
	}
	return lines
}

// jobLines show what a command says.
func (m *Model) jobLines(w, h int) []string {
	j, p := m.job, m.palette
	told, t := j.verdict()
	lines := []string{p.in(faint, strings.Repeat("─", w)), " " + p.in(accent, fit("$ "+shown(m.o.Prefix, j.lines[j.at]), max(1, w-1), false))}
	foot := told
	if j.over {
		foot += "   esc: close   y: copy the command line"
		if j.again() != nil {
			foot += "   Y: run it with --yes"
		} else if j.code == 0 && len(m.undos) > 0 && !j.undoes && slices.Equal(undoOf(j.out), m.undos[len(m.undos)-1]) {
			foot += "   z: undo"
		}
	}
	room := max(1, h-len(lines)-1)
	j.scroll = max(0, min(j.scroll, len(j.out)-1))
	end := len(j.out) - j.scroll
	var said []string // of the lines from room above the end, as many as fit: what is asked must be read to its end
	for _, s := range j.out[max(0, end-room):end] {
		said = append(said, wrap(s, max(1, w-1))...)
	}
	for _, s := range said[max(0, len(said)-room):] {
		lines = append(lines, " "+s)
	}
	return append(lines, p.in(t, fit(" "+foot, w, false)))
}
