package tui

import (
	"fmt"
	"slices"
	"strings"
)

// binding is a key, or several that do the same, and what it does. The help, the hints and docs/tui.md are made of them.
type binding struct {
	keys    []string // as bubbletea names them
	label   string   // as people read them; "": the first of keys
	what    string
	short   string   // in the hints at the bottom; "": not there
	screens []string // where it works; nil: everywhere
	do      func(m *Model) command
	action  *action
}

func (b binding) name() string {
	if b.label != "" {
		return b.label
	}
	return b.keys[0]
}

// sign is the name in the hints: the first key.
func (b binding) sign() string { sign, _, _ := strings.Cut(b.name(), " "); return sign }

func (b binding) on(screen string) bool {
	return b.screens == nil || slices.Contains(b.screens, screen)
}

// lists are the screens that have rows.
func lists() []string {
	var names []string
	for _, s := range screens() {
		names = append(names, s.name)
	}
	return names
}

// bindings are all keys. The first that fits is done; those of one screen stand in front of those of all of them.
func bindings() []binding {
	all := lists()
	var table []binding
	for _, a := range actions() {
		table = append(table, binding{keys: []string{a.key}, what: a.what, short: a.short, screens: a.screens, action: a})
	}
	return append(table, []binding{
		{keys: []string{"u"}, what: "the users of the tenant", screens: []string{"tenants", "domains", "backups", "tasks"}, do: func(m *Model) command { return m.openFor("users") }},
		{keys: []string{"L"}, what: "the log lines of the tenant", screens: []string{"tenants", "domains", "queries", "operations"}, do: func(m *Model) command { return m.openFor("logs") }},
		{keys: []string{"v"}, what: "show statements with the values in them, or without", short: "values", screens: []string{"queries"}, do: (*Model).toggleValues},

		{keys: []string{"up", "k"}, label: "↑ k", what: "one row up", screens: all, do: func(m *Model) command { return m.moveBy(-1) }},
		{keys: []string{"down", "j"}, label: "↓ j", what: "one row down", screens: all, do: func(m *Model) command { return m.moveBy(1) }},
		{keys: []string{"pgup", "ctrl+b"}, label: "pgup ctrl+b", what: "one screen up", screens: all, do: func(m *Model) command { return m.moveBy(-m.page()) }},
		{keys: []string{"pgdown", "ctrl+f"}, label: "pgdn ctrl+f", what: "one screen down", screens: all, do: func(m *Model) command { return m.moveBy(m.page()) }},
		{keys: []string{"home", "g"}, label: "home g", what: "the first row", screens: all, do: func(m *Model) command { return m.moveBy(-1 << 30) }},
		{keys: []string{"end", "G"}, label: "end G", what: "the last row", screens: all, do: func(m *Model) command { return m.moveBy(1 << 30) }},
		{keys: []string{"enter"}, what: "look into the row", short: "open", screens: all, do: (*Model).enter},
		{keys: []string{"d"}, what: "the details of the row, or no more; J and K scroll them", short: "details", screens: all, do: (*Model).toggleDetails},
		{keys: []string{"J"}, what: "the details down", screens: all, do: func(m *Model) command { return m.scrollBy(1) }},
		{keys: []string{"K"}, what: "the details up", screens: all, do: func(m *Model) command { return m.scrollBy(-1) }},
		{keys: []string{"/"}, what: "filter: text, /expression/, ~letters in this order; ! in front turns it round", short: "filter", screens: all, do: (*Model).askFilter},
		{keys: []string{"o"}, what: "sort by the next column", short: "sort", screens: all, do: (*Model).sortNext},
		{keys: []string{"O"}, what: "sort the other way round", screens: all, do: (*Model).sortReverse},
		{keys: []string{"w"}, what: "more columns, or as many as before", screens: all, do: (*Model).toggleWide},
		{keys: []string{"space"}, what: "mark the row, or no more; actions are for all marked rows", short: "mark", screens: all, do: (*Model).mark},
		{keys: []string{"*"}, what: "mark all rows that pass the filter, or none", screens: all, do: (*Model).markAll},
		{keys: []string{"y"}, what: "copy the names of the rows (by the terminal: OSC 52)", screens: all, do: (*Model).copyNames},
		{keys: []string{"Y"}, what: "copy the rows, tabs between their columns", screens: all, do: (*Model).copyRows},

		{keys: []string{"1"}, what: "the fleet", do: func(m *Model) command { return m.goHome() }},
		{keys: []string{"2", "3", "4", "5", "6", "7", "8", "9", "0"}, label: "2…9,0", short: "screens", what: "tenants, migrations, backups, queries, locks, operations, audit, domains, logs", do: nil},
		{keys: []string{":"}, what: "a screen by its name; tab completes", short: "go to", do: (*Model).askCommand},
		{keys: []string{"esc"}, what: "back: from the output, the help, the details, the filter, the marks, the screen", do: (*Model).back},
		{keys: []string{"ctrl+r"}, what: "ask again now", do: (*Model).refresh},
		{keys: []string{"z"}, what: "undo what was done last and can be undone", do: (*Model).askUndo},
		{keys: []string{"ctrl+o"}, what: "the output of the last command, or no more", do: (*Model).toggleOutput},
		{keys: []string{"x"}, what: "stop the command that is at work", do: (*Model).interrupt},
		{keys: []string{"?"}, what: "the keys of the screen", short: "keys", do: (*Model).toggleHelp},
		{keys: []string{"q", "ctrl+c"}, label: "q ctrl+c", what: "leave", short: "leave", do: (*Model).quit},
	}...)
}

// keysOf are the bindings of a screen: its own in front, and those of every list and of every screen.
func keysOf(screen string) (own, shared []binding) {
	for _, b := range bindings() {
		switch {
		case !b.on(screen):
		case b.screens == nil || len(b.screens) == len(lists()):
			shared = append(shared, b)
		default:
			own = append(own, b)
		}
	}
	return own, shared
}

// Keys is the part of docs/tui.md that lists every key, in Markdown.
func Keys() string {
	var b strings.Builder
	table := func(title string, keys []binding) {
		fmt.Fprintf(&b, "### %s\n\n| key | what it does |\n| --- | --- |\n", title)
		for _, k := range keys {
			fmt.Fprintf(&b, "| `%s` | %s |\n", k.name(), strings.ReplaceAll(k.what, "|", `\|`))
		}
		b.WriteString("\n")
	}
	everywhere, inLists := []binding{}, []binding{}
	for _, k := range bindings() {
		switch {
		case k.screens == nil:
			everywhere = append(everywhere, k)
		case len(k.screens) == len(lists()):
			inLists = append(inLists, k)
		}
	}
	table("Everywhere", everywhere)
	table("In every list", inLists)
	for _, name := range append([]string{home}, lists()...) {
		if own, _ := keysOf(name); len(own) > 0 {
			table("In "+name, own)
		}
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// helpLines are the keys of a screen, in as many columns as there is room for.
func helpLines(p palette, screen, about string, width int) []string {
	own, shared := keysOf(screen)
	var lines []string
	for s := range slices.Values(wrap(about, width-2)) {
		lines = append(lines, " "+p.in(strong, s))
	}
	lines = append(lines, "")
	for _, k := range append(own, shared...) {
		for i, s := range wrap(k.what, max(1, width-16)) {
			name := ""
			if i == 0 {
				name = k.name()
			}
			lines = append(lines, " "+p.in(accent, fit(name, 12, false))+"  "+s)
		}
	}
	return lines
}

// hints are the keys that the last line names, as many as fit.
func hints(p palette, screen string, width int) string {
	own, shared := keysOf(screen)
	var parts []string
	used := 1
	// What is this screen's own comes first, and how to leave is never missing.
	var must, may []binding
	for _, k := range append(slices.Clone(own), shared...) {
		switch {
		case k.short == "":
		case k.screens == nil:
			must = append(must, k)
		default:
			may = append(may, k)
		}
	}
	for _, k := range must {
		used += len([]rune(k.sign())) + 1 + len(k.short) + 2
	}
	show := func(k binding) { parts = append(parts, p.in(accent, k.sign())+" "+p.in(faint, k.short)) }
	for _, k := range may {
		if need := len([]rune(k.sign())) + 1 + len(k.short) + 2; used+need <= width {
			used += need
			show(k)
		}
	}
	for _, k := range must {
		show(k)
	}
	return " " + strings.Join(parts, "  ")
}
