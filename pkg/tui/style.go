package tui

import (
	"charm.land/lipgloss/v2"
)

// tone is what a colour says. What it says a glyph or a word says too.
type tone int

const (
	normal tone = iota
	good
	warn
	bad
	faint
	strong
	accent
)

// palette is how tones look before a dark or a light background.
type palette struct {
	tones map[tone]lipgloss.Style
	bar   lipgloss.Style // the first line
	loss  lipgloss.Style // what is wrong with the connection
	at    lipgloss.Style // the row of the cursor
	head  lipgloss.Style // the columns' titles
}

func newPalette(dark bool) palette {
	pick := lipgloss.LightDark(dark)
	ink := func(light, dark string) lipgloss.Style {
		return lipgloss.NewStyle().Foreground(pick(lipgloss.Color(light), lipgloss.Color(dark)))
	}
	return palette{
		tones: map[tone]lipgloss.Style{
			normal: lipgloss.NewStyle(),
			good:   ink("#1a7f37", "#3fb950"),
			warn:   ink("#9a6700", "#d29922"),
			bad:    ink("#cf222e", "#ff7b72").Bold(true),
			faint:  ink("#6e7781", "#8b949e"),
			strong: lipgloss.NewStyle().Bold(true),
			accent: ink("#0550ae", "#79c0ff").Bold(true),
		},
		bar:  lipgloss.NewStyle().Bold(true).Reverse(true),
		loss: lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Color("#ffffff")).Background(lipgloss.Color("#cf222e")),
		at:   lipgloss.NewStyle().Reverse(true),
		head: ink("#57606a", "#8b949e").Bold(true).Underline(true),
	}
}

func (p palette) in(t tone, s string) string {
	if t == normal || s == "" {
		return s
	}
	return p.tones[t].Render(s)
}

// glyphs say a state without a colour.
var glyphs = map[string]struct {
	sign string
	tone tone
}{
	"active": {"●", good}, "ok": {"●", good}, "done": {"●", good}, "alive": {"●", good}, "granted": {"●", good}, "idle": {"·", faint},
	"running": {"▶", accent}, "suspended": {"◐", warn}, "paused": {"◐", warn}, "queued": {"○", faint}, "creating": {"◌", accent},
	"skipped": {"○", faint}, "dropped": {"✗", bad}, "failed": {"✗", bad}, "aborted": {"✗", bad}, "waiting": {"◷", warn},
	"ERROR": {"✗", bad}, "WARN": {"▲", warn}, "INFO": {"·", normal}, "DEBUG": {"·", faint}, "disabled": {"✗", warn},
}

// state is a cell for a state: its glyph, and its word.
func state(s string) cell {
	g, known := glyphs[s]
	if !known {
		return cell{text: s}
	}
	return cell{text: g.sign + " " + s, key: s, tone: g.tone}
}
