package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// meter tells how far the rows of one tenant are, on stderr: one line that is drawn again on a terminal, a JSON line a
// second otherwise, and nothing of what is over within a second.
type meter struct {
	e     *env
	mode  string // draw, json or none
	verb  string
	began time.Time
	drawn time.Time
	width int // of what was drawn
	// frozen is for how long a tenant that is moved cannot be written so far; 0: it can.
	frozen time.Duration
}

func newMeter(e *env, mode, verb string) (*meter, error) {
	m := &meter{e: e, mode: mode, verb: verb, began: time.Now()}
	switch mode {
	case "auto":
		m.mode = "json"
		if f, ok := e.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			m.mode = "draw"
		}
	case "json", "none":
	default:
		return nil, errUsage{fault.New(fault.Invalid, "unknown progress %q", mode).WithHint("use one of auto, json, none")}
	}
	if e.quiet {
		m.mode = "none"
	}
	m.drawn = m.began
	return m, nil
}

func (m *meter) tell(p transfer.Progress) {
	every := time.Second
	if m.mode == "draw" && m.width > 0 {
		every = 200 * time.Millisecond
	}
	if m.mode == "none" || time.Since(m.drawn) < every {
		return
	}
	m.drawn = time.Now()
	took := time.Since(m.began)
	if m.mode == "json" {
		event := map[string]any{"event": "progress", "table": p.Table, "rows": p.Rows, "bytes": p.Bytes, "total_bytes": p.Total, "duration_ms": took.Milliseconds()}
		if m.frozen > 0 {
			event["step"], event["frozen_ms"] = m.verb, m.frozen.Milliseconds()
		}
		line, err := json.Marshal(event)
		if err == nil {
			fmt.Fprintln(m.e.err, string(line))
		}
		return
	}
	line := fmt.Sprintf("%s %s of rows, %s/s, table %s", m.verb, size(p.Bytes), size(int64(float64(p.Bytes)/took.Seconds())), p.Table)
	if m.frozen > 0 {
		line += fmt.Sprintf(", frozen for %s", m.frozen.Round(time.Second))
	}
	fmt.Fprint(m.e.err, "\r"+line+strings.Repeat(" ", max(0, m.width-len(line))))
	m.width = len(line)
}

// end leaves the line free.
func (m *meter) end() {
	if m.width > 0 {
		fmt.Fprint(m.e.err, "\r"+strings.Repeat(" ", m.width)+"\r")
	}
}
