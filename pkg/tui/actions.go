package tui

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// action is something that changes the fleet: command lines of oneo, made of the rows that were chosen.
type action struct {
	key     string
	what    string
	short   string
	screens []string
	states  []string // of the rows that it is for; nil: any
	word    string   // a name that is asked for first; "": none
	alone   bool     // for no rows: for the fleet
	one     bool     // for one row at a time
	typed   bool     // wants the tenant's name typed
	takes   bool     // takes the terminal over
	lines   func(rows []row, word string) [][]string
}

func each(args ...string) func([]row, string) [][]string {
	return func(rows []row, _ string) (lines [][]string) {
		for _, r := range rows {
			lines = append(lines, append(slices.Clone(args), r.tenant))
		}
		return lines
	}
}

// together is one command line for all tenants.
func together(args ...string) func([]row, string) [][]string {
	return func(rows []row, _ string) [][]string {
		line := slices.Clone(args)
		for _, r := range rows {
			line = append(line, "-t", r.tenant)
		}
		return [][]string{line}
	}
}

// actions are all of them. Those that destroy want a name typed.
func actions() []*action {
	ofTenants, ofRuns, ofBackups, ofSessions := []string{"tenants"}, []string{"migrations"}, []string{"backups"}, []string{"queries"}
	byID := func(args ...string) func([]row, string) [][]string {
		return func(rows []row, _ string) (lines [][]string) {
			for _, r := range rows {
				lines = append(lines, append(slices.Clone(args), r.id))
			}
			return lines
		}
	}
	cancel := func(flags ...string) func([]row, string) [][]string {
		return func(rows []row, _ string) (lines [][]string) {
			for _, r := range rows {
				group, pid, _ := strings.Cut(r.id, "/")
				line := []string{"cancel", pid, "-t", r.tenant}
				if group != "main" {
					line = append(line, "--group", group)
				}
				lines = append(lines, append(line, flags...))
			}
			return lines
		}
	}
	return []*action{
		{key: "n", what: "make a tenant", short: "new", screens: ofTenants, alone: true, word: "name of the new tenant",
			lines: func(_ []row, word string) [][]string { return [][]string{{"tenant", "create", word}} }},
		{key: "s", what: "suspend: stop serving the tenant", short: "suspend", screens: ofTenants, states: []string{"active"}, lines: each("tenant", "suspend")},
		{key: "r", what: "resume: serve a suspended tenant again", screens: ofTenants, states: []string{"suspended"}, lines: each("tenant", "resume")},
		{key: "m", what: "migrate the tenant", screens: ofTenants, states: []string{"active", "suspended"}, lines: together("migrate")},
		{key: "M", what: "migrate the shared schema and all tenants", short: "migrate", screens: []string{home, "tenants", "migrations"}, alone: true,
			lines: func([]row, string) [][]string { return [][]string{{"migrate", "--all-tenants"}} }},
		{key: "b", what: "back the tenant up", short: "back up", screens: ofTenants, states: []string{"active", "suspended"}, lines: together("backup", "create")},
		{key: "c", what: "clone the tenant", screens: ofTenants, states: []string{"active", "suspended"}, one: true, word: "name of the clone",
			lines: func(rows []row, word string) [][]string {
				return [][]string{{"tenant", "clone", rows[0].tenant, word}}
			}},
		{key: "p", what: "open psql on the tenant", screens: ofTenants, states: []string{"active", "suspended"}, one: true, takes: true, lines: each("psql")},
		{key: "e", what: "edit the settings of the tenant in $EDITOR", screens: ofTenants, states: []string{"active", "suspended"}, one: true, takes: true, lines: each("tenant", "edit")},
		{key: "D", what: "drop the tenant; its data is kept for a grace period", screens: ofTenants, states: []string{"active", "suspended"}, one: true, typed: true,
			lines: func(rows []row, _ string) [][]string { return [][]string{{"tenant", "drop", rows[0].tenant, "--yes"}} }},
		{key: "U", what: "bring a dropped tenant back", screens: ofTenants, states: []string{"dropped"}, lines: each("tenant", "undrop")},
		{key: "X", what: "destroy the tenant and its data for good", screens: ofTenants, one: true, typed: true,
			lines: func(rows []row, _ string) [][]string {
				return [][]string{{"tenant", "drop", rows[0].tenant, "--purge", "--confirm", rows[0].tenant}}
			}},

		{key: "P", what: "pause the run", screens: ofRuns, states: []string{"running"}, lines: byID("migrate", "run", "pause")},
		{key: "r", what: "go on with the run", screens: ofRuns, states: []string{"paused", "running", "failed"}, one: true, lines: byID("migrate", "run", "resume")},
		{key: "R", what: "try the failed tenants of the run again", screens: ofRuns, states: []string{"failed", "running", "paused"}, one: true, lines: byID("migrate", "run", "retry")},
		{key: "A", what: "end the run for good", screens: ofRuns, states: []string{"running", "paused"}, one: true, lines: byID("migrate", "run", "abort")},

		{key: "R", what: "restore: put the backup in the place of what its tenant has now", short: "restore", screens: ofBackups, one: true, typed: true,
			lines: func(rows []row, _ string) [][]string {
				return [][]string{{"restore", rows[0].id, "-t", rows[0].tenant, "--yes"}}
			}},
		{key: "V", what: "verify the backup", short: "verify", screens: ofBackups, lines: byID("backup", "verify")},

		{key: "C", what: "cancel the statement of the session", short: "cancel", screens: ofSessions, lines: cancel()},
		{key: "T", what: "terminate the session", screens: ofSessions, lines: cancel("--terminate")},
	}
}

// refuses says why an action is not for these rows; "": it is.
func (a *action) refuses(rows []row) string {
	switch {
	case a.alone:
		return ""
	case len(rows) == 0:
		return "there is no row to do this to"
	case a.one && len(rows) > 1:
		return "this is done to one at a time: " + count(len(rows)) + " are marked"
	}
	for _, r := range rows {
		if a.states != nil && !slices.Contains(a.states, r.state) {
			return r.name() + " is " + r.state + "; this is for what is " + strings.Join(a.states, " or ")
		}
		if slices.Contains(a.screens, "queries") && r.tenant == "" {
			return "the session works for no tenant at the moment"
		}
	}
	return ""
}

func (r row) name() string {
	if r.tenant != "" {
		return r.tenant
	}
	return tail(r.id)
}

// shown is a command line as it is shown and copied: a shell reads it back as the same words.
func shown(prefix string, args []string) string {
	words := make([]string, 0, len(args)+1)
	words = append(words, prefix)
	for _, a := range args {
		words = append(words, quoted(a))
	}
	return strings.Join(words, " ")
}

var simpleWord = regexp.MustCompile(`^[A-Za-z0-9_./:=@%+,-]+$`)

func quoted(s string) string {
	if simpleWord.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// split reads a command line as oneo prints them: words, and single quotes. false: it is something else.
func split(line string) (words []string, ok bool) {
	var word strings.Builder
	in, quote := false, false
	for i := 0; i < len(line); i++ {
		switch c := line[i]; {
		case quote && c == '\'':
			quote = false
		case quote:
			word.WriteByte(c)
		case c == '\'':
			in, quote = true, true
		case c == '\\' && i+1 < len(line):
			i++
			in = true
			word.WriteByte(line[i])
		case c == ' ':
			if in {
				words = append(words, word.String())
				word.Reset()
			}
			in = false
		case strings.IndexByte("\"`$&|;<>(){}*?[]~#!", c) >= 0:
			return nil, false
		default:
			in = true
			word.WriteByte(c)
		}
	}
	if in {
		words = append(words, word.String())
	}
	return words, !quote && len(words) > 0
}

// undoForm finds the command that takes back what a command has done, in what it says.
var undoForm = regexp.MustCompile(`(?:undo|to take it back): oneo (.+)$`)

// undoOf is that command's words; nil: there is none.
func undoOf(lines []string) []string {
	for _, l := range slices.Backward(lines) {
		if m := undoForm.FindStringSubmatch(strings.TrimSpace(l)); m != nil {
			if words, ok := split(m[1]); ok {
				return words
			}
		}
	}
	return nil
}

// job is command lines that are run one after another.
type job struct {
	lines  [][]string
	undoes bool // it is itself an undo
	at     int  // the line at work, or the last one
	out    []string
	code   int
	over   bool
	begun  time.Time
	scroll int

	events chan tea.Msg
	cancel context.CancelFunc
	ended  chan struct{}
}

const (
	keptLines  = 2000
	lineBytes  = 1 << 20
	unknowable = -1 // the exit code of what could not be started
)

type outputMsg struct {
	job  *job
	text string
}

type lineMsg struct { // the next command line begins
	job *job
	at  int
}

type endMsg struct {
	job  *job
	code int
	err  error
}

// run carries the job out: its first line that fails ends it.
func (j *job) run(ctx context.Context, command func(context.Context, []string) *exec.Cmd) {
	defer close(j.ended)
	defer close(j.events)
	tell := func(m tea.Msg) {
		select {
		case j.events <- m:
		case <-ctx.Done():
			select { // nobody may read any more
			case j.events <- m:
			case <-time.After(time.Second):
			}
		}
	}
	for i, args := range j.lines {
		tell(lineMsg{j, i})
		code, err := runOne(command(ctx, args), func(s string) { tell(outputMsg{j, s}) })
		if err != nil || code != 0 || i == len(j.lines)-1 {
			tell(endMsg{j, code, err})
			return
		}
	}
}

// runOne runs one command line and tells each line of what it says.
func runOne(cmd *exec.Cmd, tell func(string)) (code int, err error) {
	r, w := io.Pipe()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, w, w
	read := make(chan struct{})
	go func() {
		defer close(read)
		lines := bufio.NewScanner(r)
		lines.Buffer(nil, lineBytes)
		for lines.Scan() {
			tell(lines.Text())
		}
		_, _ = io.Copy(io.Discard, r) // a line that is too long must not hold the command up
	}()
	err = cmd.Run()
	_ = w.Close()
	<-read
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		return exit.ExitCode(), nil
	}
	return unknowable, err
}

// next waits for the next thing that the job tells.
func (j *job) next() tea.Msg {
	m, ok := <-j.events
	if !ok {
		return nil
	}
	return m
}

func (j *job) say(line string) {
	j.out = append(j.out, line)
	if len(j.out) > keptLines {
		j.out = j.out[len(j.out)-keptLines:]
	}
}

// again are the lines that the command asks to be run with --yes; nil: it does not ask.
func (j *job) again() [][]string {
	if !j.over || j.code != 2 {
		return nil
	}
	for _, l := range j.out {
		if strings.Contains(l, "hint:") && strings.HasSuffix(strings.TrimSpace(l), "add --yes") {
			lines := slices.Clone(j.lines[j.at:])
			lines[0] = append(slices.Clone(lines[0]), "--yes")
			return lines
		}
	}
	return nil
}

// ended says how the job has ended.
func (j *job) verdict() (string, tone) {
	switch {
	case !j.over:
		return "at work: x stops it", accent
	case j.code == 0:
		return "done", good
	case j.code == unknowable:
		return "it could not be run", bad
	case j.code == 130:
		return "interrupted", warn
	}
	return "exit code " + strconv.Itoa(j.code), bad
}

// checkWord says what is wrong with a name that was typed for a new tenant.
func checkWord(word string) string {
	if _, err := tenant.ParseSlug(word); err != nil {
		return err.Error()
	}
	return ""
}
