package tui

import (
	"context"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/charmbracelet/x/ansi"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

func TestTheDatabaseIsPolledOnceASecondAtMost(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2")
	for _, screen := range []string{"2", "3", "5", "7"} {
		s.keys(screen)
		for range 30 {
			before := s.source.asked()
			s.later(1)
			require.LessOrEqual(t, s.source.asked()-before, 1, "a second on screen %s", screen)
		}
	}
	// The list and the counts share the seconds.
	require.Contains(t, s.source.calls[len(s.source.calls)-8:], "fleet")
	require.Contains(t, s.source.calls[len(s.source.calls)-8:], "operations")
}

func TestADatabaseThatIsSlowIsAskedLessOften(t *testing.T) {
	s := play(t, 80, 24)
	s.send(fleetMsg{fleet: s.source.fleet, took: 3 * time.Second})
	before := s.source.asked()
	s.later(25)
	require.Zero(t, s.source.asked()-before, "reading took 3 s: it is not done again for 30 s")
	s.later(10)
	require.Positive(t, s.source.asked()-before)
}

func TestItNeverFreezesWhileTheDatabaseHangs(t *testing.T) {
	hang := make(chan struct{})
	s := play(t, 80, 24)
	s.sees("● active")
	s.source.set(func() { s.source.hang = hang })
	tick := func(seconds int) {
		for range seconds {
			s.clock = s.clock.Add(time.Second)
			s.take(tickMsg(s.clock))
			s.restButHung() // what hangs is not waited for
		}
	}
	tick(3)
	asked := s.source.asked
	require.Equal(t, 2, asked(), "a question hangs")
	tick(9)
	s.sees("PostgreSQL has not answered for 12s: waiting", "● active")
	s.take(keyOf("2"))
	s.take(keyOf("?"))
	s.restButHung()
	s.sees("make a tenant")
	s.take(keyOf("esc"))
	s.take(keyOf("9"))
	s.restButHung()
	s.sees("domains", "asking …")
	tick(120)
	require.Equal(t, 2, asked(), "nothing more is asked while a question hangs")
	s.take(keyOf("q"))
	s.restButHung()
	require.True(t, s.left, "q leaves")

	close(hang)
	s.source.set(func() { s.source.hang = nil })
	s.rest()
	s.sees("acme.example.com")
	require.NotContains(t, s.text(), "PostgreSQL has not answered")
}

func TestALostConnectionIsToldAndTriedAgainLessAndLessOften(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2")
	s.source.set(func() { s.source.fail = fault.New(fault.Unavailable, "PostgreSQL cannot be reached") })
	before := s.source.asked()
	s.later(60)
	tries := s.source.asked() - before
	require.LessOrEqual(t, tries, 9, "1, 2, 4, 8, 15, 15, ... seconds")
	require.GreaterOrEqual(t, tries, 5)
	s.sees("PostgreSQL lost 60s ago: retrying (PostgreSQL cannot be reached)", "acme")
	s.source.set(func() { s.source.fail = nil })
	s.later(16)
	require.NotContains(t, s.text(), "lost")
}

func TestARefusalIsNoLoss(t *testing.T) {
	s := play(t, 80, 24, func(_ *Options, f *fakeSource) { f.fail = fault.New(fault.Forbidden, "permission denied") })
	s.keys("9")
	s.sees("permission denied")
	require.NotContains(t, s.text(), "lost")
}

func TestAnActionShowsItsCommandAndRunsThatOne(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2", "s")
	s.sees("oneo tenant suspend acme", "enter: run it")
	require.Nil(t, s.job, "nothing runs before enter")
	s.keys("y")
	require.Equal(t, "oneo tenant suspend acme", s.copied)
	s.keys("enter")
	s.sees("$ oneo tenant suspend acme", "called: tenant suspend acme", "done", "z: undo")
	s.keys("esc", "z")
	s.sees("oneo tenant resume acme")
	s.keys("enter")
	s.sees("called: tenant resume acme")
	s.keys("esc", "z")
	s.sees("there is nothing to undo")
}

func TestEscapeRunsNothing(t *testing.T) {
	for _, keys := range [][]string{{"s", "esc"}, {"D", "esc"}, {"n", "esc"}, {"D", "enter"}} {
		s := play(t, 80, 24)
		s.keys("2")
		s.keys(keys...)
		require.Nil(t, s.job, "%v", keys)
	}
}

func TestANameThatIsNoneIsSaidToBeWrong(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2", "n")
	s.write("Bad Name!")
	s.keys("enter")
	s.sees(checkWord("Bad Name!"))
	s.keys("backspace")
	s.sees("name of the new tenant: Bad Name")
	require.Nil(t, s.job)
}

func TestWhatDestroysWantsTheNameTyped(t *testing.T) {
	for key, want := range map[string]string{"D": "tenant drop acme --yes", "X": "tenant drop acme --purge --confirm acme"} {
		s := play(t, 80, 24)
		s.keys("2", key)
		s.sees("oneo "+want, "type acme to go on")
		s.write("acm")
		s.keys("enter")
		s.sees("that is not the name; nothing was done")
		require.Nil(t, s.job)
		s.keys(key)
		s.write("acme")
		s.keys("enter")
		s.sees("called: " + want)
	}
	s := play(t, 80, 24)
	s.keys("2", "*", "D")
	s.sees("this is done to one at a time: 8 are marked")
	s.keys("4", "R")
	s.sees("oneo restore 3f2a9c41aa0011bb -t acme --yes", "type acme to go on")
}

func TestAProtectedDashboardChangesNothing(t *testing.T) {
	s := play(t, 80, 24, func(o *Options, _ *fakeSource) { o.Protected = true })
	s.sees("read-only")
	for _, screen := range append([]string{home}, lists()...) {
		s.stack = nil
		if sc := s.screen(screen); sc != nil {
			s.do(s.Model.open(sc, "acme", false))
			s.rest()
		}
		for _, a := range actions() {
			if slices.Contains(a.screens, screen) {
				s.keys(a.key)
				require.Equal(t, browsing, s.mode, "%s on %s", a.key, screen)
				s.sees("read-only: `:unlock`")
			}
		}
	}
	s.undos = [][]string{{"tenant", "resume", "acme"}}
	s.keys("z")
	require.Nil(t, s.proposed)
	s.keys(":")
	s.write("unlock")
	s.keys("enter")
	s.sees("type unlock to be able to change crm@db1")
	s.write("yes")
	s.keys("enter")
	require.True(t, s.protected)
	s.keys(":")
	s.write("unlock")
	s.keys("enter")
	s.write("unlock")
	s.keys("enter", "2", "s")
	s.sees("oneo tenant suspend acme")
}

func TestSeveralRowsAreSeveralCommandsAndTheFirstThatFailsEndsThem(t *testing.T) {
	s := play(t, 100, 30)
	s.keys("2", "space", "down", "space", "s") // acme, and delta behind beta
	s.sees("oneo tenant suspend acme", "oneo tenant suspend delta")
	s.keys("enter")
	s.sees("called: tenant suspend acme", "called: tenant suspend delta", "done")
	require.Empty(t, s.list().marks, "what was done is not marked any more")
	s.keys("esc", "*", "b")
	s.sees("epsilon is dropped; this is for what is active or suspended")
	s.keys("esc", "g", "space", "b", "enter")
	s.sees("oneo backup create -t acme", "exit code 3")
	s.keys("esc", "4", "*", "V", "enter")
	s.sees("called: backup verify 3f2a9c41aa0011bb", "exit code 3")
	require.NotContains(t, s.text(), "called: backup verify 7c1d90abaa0011bb", "the first has failed")
}

func TestWhatACommandAsksIsAskedOn(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2", "m", "enter")
	s.sees("this would change much", "Y: run it with --yes", "exit code 2")
	s.keys("Y")
	s.sees("called: migrate -t acme --yes", "done")
	s.width = 20
	s.sees("called: migrate -t\n acme --yes") // what is long is not cut
}

func TestOneCommandAtATimeAndItCanBeStopped(t *testing.T) {
	s := play(t, 80, 24, func(o *Options, _ *fakeSource) {
		plain := o.Command
		o.Command = func(ctx context.Context, args []string) *exec.Cmd {
			if args[0] == "tenant" {
				return exec.CommandContext(ctx, "sleep", "1000")
			}
			return plain(ctx, args)
		}
	})
	s.keys("2", "s")
	s.take(keyOf("enter"))
	s.sees("at work: x stops it")
	s.take(keyOf("b"))
	s.sees("a command is at work")
	s.take(keyOf("q"))
	s.sees("once more leaves, and interrupts it")
	require.False(t, s.left)
	s.keys("x")
	require.True(t, s.job.over)
	require.NotZero(t, s.job.code)
}

func TestNamesThatNoTenantCanHaveAreRefusedBeforeTheyAreWords(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2", "n")
	s.write("--help")
	s.keys("enter")
	require.Nil(t, s.proposed)
	require.Equal(t, wording, s.mode)
	s.keys("esc", "n")
	s.write("new-one")
	s.keys("enter")
	s.sees("oneo tenant create new-one")
}

func TestScreensAreOpenedByTheirNamesAndDigits(t *testing.T) {
	s := play(t, 80, 24)
	for _, sc := range screens() {
		if sc.key != "" {
			s.keys(sc.key)
			require.Equal(t, sc.name, s.where())
		}
		s.keys("1")
		require.Equal(t, home, s.where())
		arg := ""
		if sc.needs != "" {
			arg = " acme"
		}
		s.keys(":")
		s.write(sc.name + arg)
		s.keys("enter")
		require.Equal(t, sc.name, s.where())
		s.keys("1")
	}
	s.keys(":")
	s.write("ten")
	s.keys("tab", "enter")
	require.Equal(t, "tenants", s.where(), "tab completes")
	s.keys(":")
	s.write("users th")
	s.keys("tab", "enter")
	s.sees("tenants › users theta", "ada@example.com")
	s.keys("esc")
	require.Equal(t, "tenants", s.where())
	s.keys(":")
	s.write("tenats")
	s.keys("enter")
	s.sees("there is no screen tenats; did you mean tenants?")
	s.keys(":")
	s.write("users")
	s.keys("enter")
	s.sees("users wants a tenant")
}

func TestFilterSortAndMarks(t *testing.T) {
	s := play(t, 80, 24)
	s.keys("2")
	names := func() (names []string) {
		for _, i := range s.list().shown {
			names = append(names, s.list().rows[i].tenant)
		}
		return names
	}
	for filter, want := range map[string][]string{
		"ETA": {"beta", "eta", "theta", "zeta"}, "!eta": {"acme", "delta", "epsilon", "gamma"}, "/^(a|g)/": {"acme", "gamma"}, "~gmcm": {"gamma"},
		"!~e": nil, "/(/": {"acme", "beta", "delta", "epsilon", "eta", "gamma", "theta", "zeta"}, "suspended": {"beta"},
	} {
		s.keys("/")
		s.write(filter)
		s.keys("enter")
		require.Equal(t, want, names(), filter)
		s.keys("esc")
		require.Len(t, names(), 8, "esc takes it away")
	}
	s.keys("o", "o", "O")
	require.Equal(t, "gamma", names()[7], "by version, the newest first")
	s.keys("end")
	require.Equal(t, "gamma", s.list().at().tenant)
	s.source.set(func() { s.source.tenants = append(s.source.tenants, Tenant{Slug: "old", State: "active", Version: 1}) })
	s.later(10)
	require.Equal(t, "gamma", s.list().at().tenant, "the cursor stays on its row")
	require.Equal(t, "old", names()[8])
	s.keys("space", "y")
	require.Equal(t, "gamma", s.copied)
	s.keys("/")
	s.write("acme")
	s.keys("enter", "y")
	require.Equal(t, "gamma", s.copied, "what is marked is meant, also when it is not seen")
}

func TestItFitsIntoEveryTerminal(t *testing.T) {
	s := play(t, 80, 24)
	s.later(3)
	acts := map[string][]string{"home": {"1"}, "help": {"2", "?"}, "details": {"esc", "2", "d"}, "asked": {"esc", "2", "s"}, "typed": {"esc", "2", "D"}, "filter": {"esc", "2", "/"}, "output": {"esc", "2", "s", "enter"}}
	for _, sc := range screens() {
		if sc.key != "" {
			acts[sc.name] = []string{"esc", "esc", sc.key, "w"}
		}
	}
	for name, keys := range acts {
		s.keys(keys...)
		for _, w := range []int{0, 1, 2, 3, 5, 9, 15, 20, 39, 60, 81} {
			for _, h := range []int{0, 1, 2, 3, 4, 6, 10, 24} {
				s.width, s.height = w, h
				lines := s.draw()
				require.LessOrEqual(t, len(lines), h, "%s at %dx%d", name, w, h)
				for _, l := range lines {
					require.LessOrEqual(t, ansi.StringWidth(l), w, "%s at %dx%d: %q", name, w, h, l)
				}
			}
		}
		s.width, s.height = 80, 24
	}
}

// hostile is what a tenant may have written: it clears the screen, sets the title, moves the cursor, turns the direction round.
const hostile = "a\x1b[2Jb\x1b]0;t\x07c\x9b31md\r\ne\u202ef\u200bg\tz"

func TestNothingOfATenantReachesTheTerminalAsAControlCharacter(t *testing.T) {
	s := play(t, 300, 60, func(o *Options, f *fakeSource) {
		o.Place = hostile
		f.fleet.Open[0].Tenant, f.fleet.Unreadable = hostile, []string{hostile}
		f.fleet.Servers[0].Host = hostile
		f.ages.Whose = hostile
		f.tenants = []Tenant{{Slug: hostile, Name: hostile, Schema: hostile, Group: hostile, State: hostile, Host: hostile, ID: hostile}}
		f.log = []LogLine{{Level: hostile, Tenant: hostile, Message: hostile, Fields: hostile, Server: hostile, Request: hostile}}
		f.session = []Session{{Group: hostile, Tenant: hostile, Login: hostile, State: hostile, Wait: hostile, Query: hostile, From: hostile}}
	})
	s.later(3)
	for _, keys := range [][]string{{"1"}, {"2", "d", "w"}, {"esc", "D"}, {"esc", "5", "v", "d"}, {"0", "d"}, {"2", "/"}} {
		s.keys(keys...)
		s.sees("b?]0")
		for _, l := range s.draw() {
			for _, r := range ansi.Strip(l) {
				require.False(t, unicode.IsControl(r) || unicode.Is(unicode.Cf, r), "%v: %q", keys, l)
			}
			require.NotContains(t, l, "\x1b[2J")
			require.NotContains(t, l, "\x1b]")
			require.NotContains(t, l, "\u009b")
		}
	}
	require.False(t, strings.ContainsAny(s.View().WindowTitle, "\x1b\x07"))
	s.keys("esc", "2", "y")
	require.NotContains(t, s.copied, "\x1b", "nor is it copied: a shell that it is pasted into would run its lines")
	require.NotContains(t, s.copied, "\n")

	s = play(t, 80, 24)
	s.keys("2", "b", "enter")
	s.sees("?[2J?]0;stolen? gone")
}

func TestValuesOfStatementsAreHiddenBeforeTheyAreAskedFor(t *testing.T) {
	s := play(t, 200, 40)
	s.keys("5", "d")
	s.sees("data->>? = ? and n > ?")
	require.NotContains(t, s.text(), "Lovelace")
	s.keys("v")
	s.sees("Ada Lovelace", "v hides them again")
	hang := make(chan struct{})
	s.source.set(func() { s.source.hang = hang })
	s.take(keyOf("v"))
	s.restButHung()
	require.NotContains(t, s.text(), "Lovelace", "at once, whenever PostgreSQL answers")
	s.source.set(func() { s.source.hang = nil })
	close(hang)
	s.rest()
	require.NotContains(t, s.text(), "Lovelace")
	s.keys("8")
	s.sees("set token = ?")
	require.NotContains(t, s.text(), "hunter2")
}

func TestFiftyThousandTenants(t *testing.T) {
	s := play(t, 120, 40, func(_ *Options, f *fakeSource) { f.tenants = manyTenants(50_000) })
	s.keys("2")
	s.sees("50,000")
	p, l := s.palette, s.list()
	many := testing.AllocsPerRun(20, func() { l.view(p, 120, 36) })
	few := newList(l.screen, "")
	few.set(l.rows[:100], "", s.now)
	require.InDelta(t, testing.AllocsPerRun(20, func() { few.view(p, 120, 36) }), many, 60, "drawing costs what is seen")
	s.keys("end")
	s.sees("›")
	s.keys("/")
	s.write("zeta-4321")
	s.sees("1 of 50,000")
	before := s.source.asked()
	s.keys("esc")
	s.later(20)
	tenants := 0
	for _, c := range s.source.calls[before:] {
		if c == "tenants" {
			tenants++
		}
	}
	require.LessOrEqual(t, tenants, 4, "the list is read every five seconds at most")
}

func TestKeysOfOneScreenDoNotMeanTwoThings(t *testing.T) {
	for _, screen := range append([]string{home}, lists()...) {
		own, shared := keysOf(screen)
		seen := map[string]string{}
		for _, b := range append(own, shared...) {
			for _, k := range b.keys {
				require.Empty(t, seen[k], "%s on %s: %s", k, screen, b.what)
				seen[k] = b.what
			}
		}
	}
}
