package main

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// progress tells how far a run is, on stderr: one line that is drawn again on a terminal, JSON lines otherwise. Where
// nobody asked for each tenant's, there are few of them, and none about a run that ends within briefFrom: its report, or
// its result, says the same.
type progress struct {
	e       *env
	mode    string // draw, json or none
	brief   bool   // of json: how far the run is, and what goes wrong, and no more
	waiting []map[string]any
	began   time.Time
	before  int // tasks that had ended when this process began
	counts  rollout.Counts
	run     rollout.Run
	held    string
	yielded bool    // has said that it does
	slowest []timed // the slowest three
	drawn   time.Time
	width   int
}

type timed struct {
	tenant string
	took   time.Duration
}

// newProgress chooses the form: mode is what --progress says.
func newProgress(e *env, mode string, run rollout.Run) (*progress, error) {
	p := &progress{e: e, began: time.Now(), run: run, counts: run.Counts, before: run.Tasks() - run.Left(), width: 80}
	switch mode {
	case "auto":
		p.mode, p.brief = "json", true
		if f, ok := e.err.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			p.mode = "draw"
			if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 20 {
				p.width = w
			}
		}
	case "json", "none":
		p.mode = mode
	default:
		return nil, errUsage{fault.New(fault.Invalid, "unknown progress %q", mode).WithHint("use one of auto, json, none")}
	}
	if e.quiet {
		p.mode = "none"
	}
	return p, nil
}

// told takes a piece of news.
func (p *progress) told(ev rollout.Event) {
	if ev.Run.Tasks() > 0 {
		p.counts, p.run = ev.Counts, ev.Run
	}
	switch {
	case ev.Task != nil && ev.Again > 0:
		p.news(map[string]any{"event": "busy", "tenant": ev.Task.Slug, "error": errorObject(ev.Outcome.Err), "again_ms": ev.Again.Milliseconds()},
			"%s is busy: %s; tried again in %s", ev.Task.Slug, errorObject(ev.Outcome.Err), ev.Again.Round(100*time.Millisecond))
	case ev.Task != nil:
		p.took(ev.Task.Slug, ev.Outcome.Duration)
		object := map[string]any{"event": "tenant", "tenant": ev.Task.Slug, "status": ev.Outcome.Status, "duration_ms": ev.Outcome.Duration.Milliseconds()}
		if ev.Outcome.To != 0 {
			object["from"], object["to"] = ev.Outcome.From, ev.Outcome.To
		}
		if ev.Outcome.Status == fleet.Failed {
			object["error"] = errorObject(ev.Outcome.Err)
			p.news(object, "%s failed: %s", ev.Task.Slug, errorObject(ev.Outcome.Err))
			return
		}
		p.quiet(object)
	case ev.Yields && !p.yielded:
		p.yielded = true
		p.news(map[string]any{"event": "yielding"}, "tenants are served meanwhile: one at a time, with rests (migrate.live_share); --jobs N goes on at full speed")
	case ev.Held != p.held:
		p.held = ev.Held
		if p.held != "" {
			p.news(map[string]any{"event": "held", "reason": p.held}, "holding back: %s", p.held)
		} else {
			p.news(map[string]any{"event": "released"}, "going on")
		}
	}
	p.draw(false)
}

// took remembers the slowest tenants.
func (p *progress) took(tenant string, d time.Duration) {
	p.slowest = append(p.slowest, timed{tenant, d})
	slices.SortStableFunc(p.slowest, func(a, b timed) int { return int(b.took - a.took) })
	p.slowest = p.slowest[:min(3, len(p.slowest))]
}

// news is worth a line of its own in both forms.
func (p *progress) news(object map[string]any, format string, args ...any) {
	switch p.mode {
	case "json":
		if p.early() {
			p.waiting = append(p.waiting, object)
			return
		}
		p.flush()
		p.line(object)
	case "draw":
		fmt.Fprintf(p.e.err, "\r\x1b[K"+format+"\n", args...)
		p.draw(true)
	}
}

// quiet is worth a line for machines only.
func (p *progress) quiet(object map[string]any) {
	if p.mode == "json" && !p.brief {
		p.line(object)
	}
}

// early reports whether the run may still end before anybody needs to hear of it.
func (p *progress) early() bool { return p.brief && time.Since(p.began) < briefFrom }

// flush writes the news of the beginning.
func (p *progress) flush() {
	for _, object := range p.waiting {
		p.line(object)
	}
	p.waiting = nil
}

// say tells the story in the form of the progress, so that who reads JSON lines reads nothing else.
func (p *progress) say(format string, args ...any) {
	if p.mode == "json" {
		p.line(map[string]any{"event": "note", "message": fmt.Sprintf(format, args...)})
		return
	}
	p.e.say(format, args...)
}

func (p *progress) line(object map[string]any) {
	text, err := json.Marshal(object)
	if err == nil { // strings and numbers of our own
		fmt.Fprintf(p.e.err, "%s\n", text)
	}
}

const (
	drawEvery = 100 * time.Millisecond
	tellEvery = time.Second
	briefFrom = 2 * time.Second
)

// draw shows how far the run is, now and then.
func (p *progress) draw(now bool) {
	every := drawEvery
	if p.mode == "json" {
		every = tellEvery
	}
	if p.mode == "none" || !now && time.Since(p.drawn) < every {
		return
	}
	if p.mode == "json" && p.early() {
		return
	}
	p.drawn = time.Now()
	done, left, rate := p.rate()
	if p.mode == "json" {
		p.flush()
		p.line(map[string]any{"event": "progress", "done": done, "failed": p.counts.Failed, "left": left, "wave": p.run.Wave + 1, "waves": p.run.Waves,
			"per_second": float64(int(rate*10)) / 10, "left_ms": p.remaining(left, rate).Milliseconds()})
		return
	}
	text := fmt.Sprintf("%s %d/%d done", bar(done, p.counts.Tasks()), done, p.counts.Tasks())
	if p.counts.Failed > 0 {
		text += fmt.Sprintf(", %d failed", p.counts.Failed)
	}
	text += fmt.Sprintf(", %d left", left)
	if p.run.Waves > 1 {
		text += fmt.Sprintf(", wave %d/%d", min(p.run.Wave+1, p.run.Waves), p.run.Waves)
	}
	switch wait := time.Until(p.run.WaveAfter); {
	case p.held != "":
		text += ", held back"
	case wait > 100*time.Millisecond:
		text += fmt.Sprintf(", next wave in %s", wait.Round(time.Second))
	case rate > 0:
		text += fmt.Sprintf(", %.0f/s, %s left", rate, short(p.remaining(left, rate)))
	}
	if len(p.slowest) > 0 {
		text += fmt.Sprintf(", slowest %s %s", p.slowest[0].tenant, short(p.slowest[0].took))
	}
	if r := []rune(text); len(r) >= p.width {
		text = string(r[:p.width-1])
	}
	fmt.Fprint(p.e.err, "\r\x1b[K"+text)
}

func (p *progress) rate() (done, left int, perSecond float64) {
	left = p.counts.Left()
	done = p.counts.Tasks() - left - p.counts.Failed
	if s := time.Since(p.began).Seconds(); s > 0.2 {
		perSecond = float64(done+p.counts.Failed-p.before) / s
	}
	return done, left, perSecond
}

func (p *progress) remaining(left int, rate float64) time.Duration {
	if rate <= 0 {
		return 0
	}
	return time.Duration(float64(left) / rate * float64(time.Second))
}

// clear takes the line away for what others write. It is drawn again with the next news.
func (p *progress) clear() {
	if p.mode == "draw" {
		fmt.Fprint(p.e.err, "\r\x1b[K")
	}
}

// end clears the line and names the slowest tenants.
func (p *progress) end() {
	p.clear()
	if p.mode != "draw" || p.counts.Tasks() < 10 || len(p.slowest) == 0 {
		return
	}
	names := make([]string, len(p.slowest))
	for i, s := range p.slowest {
		names[i] = s.tenant + " " + short(s.took)
	}
	p.e.say("slowest: %s", strings.Join(names, ", "))
}

func bar(done, all int) string {
	const cells = 16
	full := 0
	if all > 0 {
		full = done * cells / all
	}
	return "[" + strings.Repeat("#", full) + strings.Repeat(".", cells-full) + "]"
}

// short is a duration as people say it.
func short(d time.Duration) string {
	switch {
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%d min %d s", int(d.Minutes()), int(d.Seconds())%60)
	}
	return fmt.Sprintf("%d h %d min", int(d.Hours()), int(d.Minutes())%60)
}
