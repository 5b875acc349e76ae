package tui

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
	"github.com/stretchr/testify/require"
)

// noon is when all tests play.
var noon = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// TestMain is oneo as the tests' dashboards call it: it says what it was called with, and does as the first word says.
func TestMain(m *testing.M) {
	if os.Getenv("ONEO_TEST_TUI_CHILD") == "" {
		os.Exit(m.Run())
	}
	args := os.Args[1:]
	fmt.Println("called:", strings.Join(args, " "))
	switch {
	case slices.Equal(args, []string{"tenant", "suspend", "acme"}):
		fmt.Fprintln(os.Stderr, "tenant acme is suspended; undo: oneo tenant resume acme")
	case slices.Equal(args, []string{"tenant", "resume", "acme"}):
		fmt.Fprintln(os.Stderr, "tenant acme is active; undo: oneo tenant suspend acme")
	case args[0] == "migrate" && !slices.Contains(args, "--yes"):
		fmt.Fprintln(os.Stderr, "error: this would change much")
		fmt.Fprintln(os.Stderr, "hint:  add --yes")
		os.Exit(2)
	case args[0] == "backup":
		fmt.Println("\x1b[2J\x1b]0;stolen\x07 gone")
		os.Exit(3)
	}
}

// fakeSource answers with what it holds. When hang is set, it waits for it instead.
type fakeSource struct {
	mu      sync.Mutex
	calls   []string
	fail    error
	hang    chan struct{}
	hung    int // questions that wait for it
	fleet   Fleet
	load    []Reading
	ages    Ages
	tenants []Tenant
	log     []LogLine
	session []Session
}

// database notes a question to the database, and how it goes.
func (f *fakeSource) database(what string) error {
	f.mu.Lock()
	f.calls = append(f.calls, what)
	hang, fail := f.hang, f.fail
	if hang != nil {
		f.hung++
	}
	f.mu.Unlock()
	if hang != nil {
		<-hang
		f.set(func() { f.hung-- })
	}
	return fail
}

func (f *fakeSource) asked() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.calls)
}

func (f *fakeSource) set(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fakeSource) Fleet(context.Context) (Fleet, error)              { return f.fleet, f.database("fleet") }
func (f *fakeSource) Readings(_ context.Context, ss []Server) []Reading { return f.load }
func (f *fakeSource) Ages(context.Context) (Ages, error)                { return f.ages, nil }
func (f *fakeSource) Tenants(context.Context) ([]Tenant, error) {
	return f.tenants, f.database("tenants")
}
func (f *fakeSource) Runs(context.Context) ([]Run, error) { return someRuns, f.database("runs") }
func (f *fakeSource) Tasks(context.Context, string) ([]Task, error) {
	return someTasks, f.database("tasks")
}
func (f *fakeSource) Backups(context.Context) ([]Backup, error) { return someBackups, nil }
func (f *fakeSource) Sessions(context.Context) ([]Session, error) {
	return f.session, f.database("sessions")
}
func (f *fakeSource) Locks(context.Context) ([]Lock, error) { return someLocks, f.database("locks") }
func (f *fakeSource) Operations(context.Context) ([]Operation, error) {
	return someOperations, f.database("operations")
}
func (f *fakeSource) Audit(context.Context) ([]AuditLine, error) {
	return someAudit, f.database("audit")
}
func (f *fakeSource) Domains(context.Context) ([]Domain, error) {
	return someDomains, f.database("domains")
}
func (f *fakeSource) Users(_ context.Context, t string) ([]User, error) {
	return someUsers, f.database("users " + t)
}
func (f *fakeSource) Logs(context.Context, []Server, string) ([]LogLine, error) { return f.log, nil }

var (
	someServer = Server{ID: "a", Host: "app1", PID: 4711, Version: "1.2.0", OpsAddr: "10.0.0.1:8001", Started: noon.Add(-26 * time.Hour), Beat: noon}
	someRuns   = []Run{
		{ID: "01a21573-58d0-74de-a97e-92ecc97b3b10", Kind: "migrate", State: "running", Actor: "cli:ada", Queued: 380, Running: 4, OK: 613, Failed: 3, Wave: 2, Waves: 4, Alive: true, Created: noon.Add(-72 * time.Second)},
		{ID: "01a21573-58d0-74de-a97e-92ecc97b3b09", Kind: "backup", State: "done", Actor: "schedule nightly", OK: 996, Skipped: 4, Wave: 1, Waves: 1, Created: noon.Add(-10 * time.Hour), Finished: noon.Add(-9 * time.Hour)},
		{ID: "01a21573-58d0-74de-a97e-92ecc97b3b08", Kind: "sql", State: "running", Actor: "cli:bob", Queued: 3, OK: 1, Wave: 1, Waves: 1, Created: noon.Add(-time.Hour)},
	}
	someTasks = []Task{
		{Tenant: "acme", State: "ok", From: 13, To: 14, Attempts: 1, Duration: 180 * time.Millisecond},
		{Tenant: "beta", State: "failed", From: 13, To: 14, Attempts: 2, Duration: 2 * time.Second, Error: "a value does not fit", Hint: "mend the rows"},
		{Tenant: "gamma", State: "queued", From: 13, To: 14},
	}
	someBackups = []Backup{
		{ID: "3f2a9c41aa0011bb", Tenant: "acme", Made: noon.Add(-9 * time.Hour), Version: 13, Rows: 120_345, Bytes: 5 << 20, Encrypted: true},
		{ID: "7c1d90abaa0011bb", Tenant: "beta", Made: noon.Add(-50 * time.Hour), Version: 12, Rows: 12, Bytes: 900, Kept: true, Reason: "before the import"},
	}
	someLocks = []Lock{
		{Group: "main", PID: 100, Tenant: "acme", Kind: "relation", On: "acme.records", Mode: "AccessExclusiveLock", Since: noon.Add(-3 * time.Second), Behind: []int32{90}},
		{Group: "main", PID: 90, Tenant: "acme", Kind: "relation", On: "acme.records", Mode: "RowExclusiveLock", Granted: true},
	}
	someOperations = []Operation{
		{ID: "01a21573-58d0-74de-a97e-92ecc97b3b20", Kind: "tenant.move", Tenant: "acme", State: "running", Actor: "cli:ada", Attempts: 1, Created: noon.Add(-90 * time.Second), Started: noon.Add(-80 * time.Second)},
		{ID: "01a21573-58d0-74de-a97e-92ecc97b3b19", Kind: "tenant.drop", Tenant: "beta", State: "failed", Actor: "admin@example.com", Attempts: 3, Created: noon.Add(-3 * time.Hour), Started: noon.Add(-3 * time.Hour), Finished: noon.Add(-2 * time.Hour), Error: "another operation is at work", Hint: "wait"},
	}
	someAudit = []AuditLine{
		{ID: 7, At: noon.Add(-5 * time.Minute), Actor: "cli:ada", Action: "tenant.suspend", Tenant: "acme", Details: json.RawMessage(`{}`)},
		{ID: 6, At: noon.Add(-6 * time.Minute), Actor: "cli:bob", Action: "sql", Details: json.RawMessage(`{"mode":"write","statement":"update users set token = 'hunter2'"}`)},
	}
	someDomains = []Domain{{Host: "acme.example.com", Tenant: "acme", Primary: true, State: "active", Created: noon.Add(-100 * time.Hour)}, {Host: "beta.example.com", Tenant: "beta", Primary: true, State: "suspended", Created: noon.Add(-time.Hour)}}
	someUsers   = []User{{ID: "u1", Email: "ada@example.com", Name: "Ada", Role: "admin", Created: noon.Add(-100 * time.Hour)}, {ID: "u2", Email: "bob@example.com", Name: "Bob", Role: "viewer", Disabled: noon, Created: noon.Add(-90 * time.Hour)}}
)

func manyTenants(n int) []Tenant {
	var ts []Tenant
	for i := range n {
		name := []string{"acme", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"}[i%8]
		if i >= 8 {
			name += "-" + strconv.Itoa(i/8)
		}
		t := Tenant{Number: int32(i + 1), Slug: name, Name: strings.ToUpper(name), Schema: strings.ReplaceAll(name, "-", "_"), Group: "main", State: "active", Version: 14,
			Host: name + ".example.com", ID: fmt.Sprintf("00000000-0000-0000-0000-%012d", i), Created: noon.Add(-time.Duration(i+1) * time.Hour)}
		switch i {
		case 1:
			t.State = "suspended"
		case 2:
			t.Version = 13
		case 4:
			t.State, t.Purge = "dropped", noon.Add(29*24*time.Hour)
		}
		ts = append(ts, t)
	}
	return ts
}

func newFake() *fakeSource {
	at := func(seconds int, requests, errs int64) Reading {
		return Reading{Server: someServer, At: noon.Add(time.Duration(seconds) * time.Second),
			All: Load{Requests: requests, Errors: errs, Refused: 3, InFlight: 5, DatabaseSeconds: float64(requests) / 500, P50: 3.2, P95: 18.4, P99: 61},
			Tenants: []TenantLoad{{Number: 1, Tenant: "acme", Load: Load{Requests: requests / 2, Errors: errs, DatabaseSeconds: float64(requests) / 1000, P95: 22}},
				{Number: 4, Tenant: "delta", Load: Load{Requests: requests / 4, P95: 9}}},
			Pools: []Pool{{Group: "main", Max: 32, InUse: 7, Waits: 12, Retired: 2}},
			Redis: Redis{Set: true, Up: true, Hits: requests * 9 / 10, Misses: requests / 10, Memory: 48 << 20}, Memory: 180 << 20}
	}
	return &fakeSource{
		fleet: Fleet{At: noon, Tenants: []StateCount{{"active", 6}, {"suspended", 1}, {"dropped", 1}}, Versions: []VersionCount{{14, 6}, {13, 1}}, Head: 14, Servers: []Server{someServer},
			OpenCount: 2, FailedDay: 1, Open: someOperations[:1], Runs: someRuns[:1], Database: Database{Sessions: 41, Max: 150, Waiting: 1}},
		load: []Reading{at(2, 1240, 2)}, tenants: manyTenants(8),
		ages: Ages{Set: true, Tenants: 7, Without: 1, Oldest: noon.Add(-50 * time.Hour), Whose: "beta", Newest: noon.Add(-9 * time.Hour)},
		session: []Session{{Group: "main", PID: 90, Tenant: "acme", Login: "oneo_app_1", State: "active", Wait: "", Begun: noon.Add(-12 * time.Second), Since: noon.Add(-12 * time.Second), Query: "select id from records where data->>'name' = 'Ada Lovelace' and n > 42", From: "10.0.0.1"},
			{Group: "main", PID: 100, Tenant: "delta", Login: "oneo_app_4", State: "idle in transaction", Wait: "Client ClientRead", Begun: noon.Add(-time.Second), Since: noon.Add(-time.Second), Query: "begin", From: "10.0.0.1"}},
		log: []LogLine{{At: noon.Add(-time.Second), Level: "ERROR", Server: "app1/4711", Tenant: "acme", Message: "request", Request: "r1", Fields: "route=/api/v1/records status=500"},
			{At: noon.Add(-2 * time.Second), Level: "INFO", Server: "app1/4711", Tenant: "delta", Message: "request", Fields: "status=200"}},
	}
}

// stage plays a dashboard: its commands are carried out as bubbletea would, its clock is the test's.
type stage struct {
	*Model
	t      *testing.T
	source *fakeSource
	clock  time.Time
	msgs   chan tea.Msg
	open   int // commands that have not ended
	copied string
	left   bool
}

func play(t *testing.T, w, h int, change ...func(*Options, *fakeSource)) *stage {
	t.Helper()
	s := &stage{t: t, source: newFake(), clock: noon, msgs: make(chan tea.Msg, 1000)}
	o := Options{Source: s.source, Prefix: "oneo", Place: "crm@db1", Now: func() time.Time { return s.clock },
		Command: func(ctx context.Context, args []string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, os.Args[0], args...)
			cmd.Env = append(os.Environ(), "ONEO_TEST_TUI_CHILD=1", "GORACE=atexit_sleep_ms=0")
			return cmd
		}}
	for _, c := range change {
		c(&o, s.source)
	}
	s.Model = New(o)
	t.Cleanup(s.stop)
	s.tick = func() tea.Cmd { return nil }
	s.do(s.Init())
	s.send(tea.WindowSizeMsg{Width: w, Height: h})
	return s
}

// do carries a command out, beside the others.
func (s *stage) do(cmd tea.Cmd) {
	if cmd == nil {
		return
	}
	s.open++
	go func() { s.msgs <- cmd() }()
}

// take hands one message over.
func (s *stage) take(m tea.Msg) {
	switch m := m.(type) {
	case nil:
		return
	case tea.BatchMsg:
		for _, c := range m {
			s.do(c)
		}
		return
	case tea.QuitMsg:
		s.left = true
		return
	}
	if text := fmt.Sprintf("%T", m); text == "tea.setClipboardMsg" {
		s.copied = fmt.Sprint(m)
		return
	}
	_, cmd := s.Update(m)
	s.do(cmd)
}

// rest waits until nothing is at work.
func (s *stage) rest() {
	s.t.Helper()
	for s.open > 0 {
		s.one()
	}
}

// restButHung waits until nothing is at work but what the source does not answer.
func (s *stage) restButHung() {
	s.t.Helper()
	for {
		s.source.mu.Lock()
		hung := s.source.hung
		s.source.mu.Unlock()
		if s.open <= hung {
			return
		}
		select {
		case m := <-s.msgs:
			s.open--
			s.take(m)
		case <-time.After(time.Millisecond): // it may hang now
		}
	}
}

func (s *stage) one() {
	s.t.Helper()
	select {
	case m := <-s.msgs:
		s.open--
		s.take(m)
	case <-time.After(time.Minute):
		s.t.Fatal("a command has not ended")
	}
}

// send hands a message over and waits for what comes of it.
func (s *stage) send(m tea.Msg) {
	s.t.Helper()
	s.take(m)
	s.rest()
}

// later lets the time pass, a second at a time.
func (s *stage) later(seconds int) {
	s.t.Helper()
	for range seconds {
		s.clock = s.clock.Add(time.Second)
		s.send(tickMsg(s.clock))
	}
}

func keyOf(name string) tea.KeyPressMsg {
	for code, word := range map[rune]string{tea.KeyEnter: "enter", tea.KeyEscape: "esc", tea.KeyTab: "tab", tea.KeyUp: "up", tea.KeyDown: "down", tea.KeyPgDown: "pgdown", tea.KeyEnd: "end"} {
		if word == name {
			return tea.KeyPressMsg{Code: code}
		}
	}
	if name == "space" {
		return tea.KeyPressMsg{Code: tea.KeySpace, Text: " "}
	}
	if rest, ctrl := strings.CutPrefix(name, "ctrl+"); ctrl {
		return tea.KeyPressMsg{Code: rune(rest[0]), Mod: tea.ModCtrl}
	}
	return tea.KeyPressMsg{Code: []rune(name)[0], Text: name}
}

// press presses keys one after another.
func (s *stage) keys(names ...string) {
	s.t.Helper()
	for _, n := range names {
		s.send(keyOf(n))
	}
}

// write types a text.
func (s *stage) write(text string) {
	s.t.Helper()
	for _, r := range text {
		s.send(tea.KeyPressMsg{Code: r, Text: string(r)})
	}
}

// text is the screen without its colours.
func (s *stage) text() string {
	lines := s.draw()
	for i, l := range lines {
		lines[i] = strings.TrimRight(ansi.Strip(l), " ")
	}
	return strings.Join(lines, "\n") + "\n"
}

func (s *stage) sees(parts ...string) {
	s.t.Helper()
	for _, p := range parts {
		require.Contains(s.t, s.text(), p)
	}
}
