package tui

import (
	"fmt"
	"strings"
	"time"

	"charm.land/lipgloss/v2"
)

// picture is what the home screen is drawn from.
type picture struct {
	now     time.Time
	fleet   Fleet
	known   bool // fleet was read
	rates   Rates
	history history
	ages    Ages
	agesErr string
	aged    bool // ages were read
}

// block is a part of the home screen: a title, and lines of a width.
type block struct {
	title string
	lines []string
}

// homeLines draws the fleet: blocks in as many columns as there is room for.
func homeLines(p palette, pic picture, width, height int) []string {
	columns := max(1, min(4, width/39))
	w := (width - 2*(columns-1)) / columns
	if w < 1 || height < 1 {
		return nil
	}
	blocks := []func(palette, picture, int) block{tenantsBlock, trafficBlock, poolsBlock, operationsBlock, backupsBlock, redisBlock, databaseBlock, serversBlock, busiestBlock}
	stacks := make([][]string, columns)
	for i, b := range blocks {
		at := i
		if i >= columns { // then where there is most room
			at = 0
			for c := range stacks {
				if len(stacks[c]) < len(stacks[at]) {
					at = c
				}
			}
		}
		blk := b(p, pic, w)
		if len(blk.lines) == 0 || len(stacks[at])+2 >= height && len(stacks[at]) > 0 { // a title alone says nothing
			continue
		}
		if len(stacks[at]) > 0 {
			stacks[at] = append(stacks[at], "")
		}
		stacks[at] = append(stacks[at], p.in(accent, fit(blk.title, w, false)))
		stacks[at] = append(stacks[at], blk.lines...)
	}
	tall := 0
	for _, s := range stacks {
		tall = max(tall, len(s))
	}
	var lines []string
	for y := range min(tall, height) {
		var b strings.Builder
		for c, s := range stacks {
			line := ""
			if y < len(s) {
				line = s[y]
			}
			if c > 0 {
				b.WriteString("  ")
			}
			b.WriteString(line)
			if c < columns-1 {
				b.WriteString(strings.Repeat(" ", max(0, w-lipgloss.Width(line))))
			}
		}
		lines = append(lines, b.String())
	}
	return lines
}

// field is one line: a name, a value, and what is beside it, in a width.
func field(p palette, width int, name, value string, t tone, beside string) string {
	const names, values = 13, 10
	v := fit(value, values, true)
	if len([]rune(value)) > values {
		v = fit(value, max(values, min(len([]rune(value)), width-names-2)), false)
	}
	line := fit(" "+name, min(names, width), false)
	used := names
	if room := width - used; room > 0 {
		v = fit(v, min(room, lipgloss.Width(v)), false)
		line += p.in(t, v)
		used += lipgloss.Width(v)
	}
	if room := width - used - 2; room > 0 && beside != "" {
		line += "  " + p.in(faint, fit(beside, room, false))
	}
	return line
}

func tenantsBlock(p palette, pic picture, w int) block {
	total := 0
	for _, s := range pic.fleet.Tenants {
		total += s.N
	}
	b := block{title: "TENANTS"}
	if !pic.known {
		b.lines = []string{p.in(faint, fit(" asking PostgreSQL …", w, false))}
		return b
	}
	b.lines = append(b.lines, field(p, w, "all", count(total), strong, ""))
	for _, s := range pic.fleet.Tenants {
		c := state(s.State)
		b.lines = append(b.lines, field(p, w, c.text, count(s.N), c.tone, ""))
	}
	const most = 4
	behind := 0
	for _, v := range pic.fleet.Versions {
		if v.Version < pic.fleet.Head {
			behind += v.N
		}
	}
	for i, v := range pic.fleet.Versions {
		if i == most {
			b.lines = append(b.lines, p.in(faint, fit(fmt.Sprintf(" and %d older version(s)", len(pic.fleet.Versions)-most), w, false)))
			break
		}
		var beside string
		t := good
		switch {
		case v.Version == pic.fleet.Head:
			beside = "the newest"
		case v.Version < pic.fleet.Head:
			beside, t = "behind", warn
		default:
			beside, t = "newer than this oneo", warn
		}
		b.lines = append(b.lines, field(p, w, fmt.Sprintf("version %d", v.Version), count(v.N), t, beside))
	}
	if behind > 0 {
		b.lines = append(b.lines, p.in(warn, fit(fmt.Sprintf(" ▲ %s behind: M migrates them", count(behind)), w, false)))
	}
	for _, g := range pic.fleet.Unreadable {
		b.lines = append(b.lines, p.in(bad, fit(" ✗ group "+g+" does not answer", w, false)))
	}
	return b
}

// noServers says why there are no rates.
func noServers(p palette, pic picture, w int) []string {
	switch {
	case !pic.known:
		return []string{p.in(faint, fit(" asking …", w, false))}
	case len(pic.fleet.Servers) == 0:
		return []string{p.in(warn, fit(" no server is running: oneo serve", w, false))}
	case pic.rates.Answer == 0 && pic.rates.Silent > 0:
		return []string{p.in(bad, fit(fmt.Sprintf(" ✗ none of %d server(s) answers", pic.rates.Silent), w, false))}
	case pic.rates.Answer == 0:
		return []string{p.in(faint, fit(" asking the servers …", w, false))}
	}
	return nil
}

func trafficBlock(p palette, pic picture, w int) block {
	b := block{title: "TRAFFIC"}
	if b.lines = noServers(p, pic, w); b.lines != nil {
		return b
	}
	r, beside := pic.rates, max(0, w-26)
	first := "-"
	if r.Ready {
		first = rate(r.Requests)
	}
	errors := normal
	if r.Errors > 0 {
		errors = bad
	}
	b.lines = []string{
		field(p, w, "requests/s", first, strong, spark(pic.history.requests, beside)),
		field(p, w, "p95", millis(r.P95), normal, spark(pic.history.p95, beside)),
		field(p, w, "errors/s", rate(r.Errors), errors, spark(pic.history.errors, beside)),
		field(p, w, "p50", millis(r.P50), normal, "p99 "+millis(r.P99)),
		field(p, w, "refused/s", rate(r.Refused), normal, ""),
		field(p, w, "in flight", count(r.InFlight), normal, ""),
	}
	return b
}

func poolsBlock(p palette, pic picture, w int) block {
	b := block{title: "POOLS"}
	if len(pic.rates.Pools) == 0 {
		return b
	}
	if len(pic.rates.Pools) == 1 {
		b.title = "POOL"
	}
	for i, q := range pic.rates.Pools {
		if i == 4 {
			b.lines = append(b.lines, p.in(faint, fit(fmt.Sprintf(" and %d more", len(pic.rates.Pools)-i), w, false)))
			break
		}
		t := normal
		if q.Max > 0 && q.InUse >= q.Max {
			t = bad
		}
		beside := bar(float64(q.InUse), float64(q.Max), max(0, min(12, w-26)))
		if q.Waits > 0 {
			beside, t = rate(q.Waits)+" waits/s", max(t, warn)
		}
		b.lines = append(b.lines, field(p, w, q.Group, count(q.InUse)+" of "+count(q.Max), t, beside))
	}
	b.lines = append(b.lines, field(p, w, "in use", percent(last(pic.history.pool), 1), normal, spark(pic.history.pool, max(0, w-26))))
	return b
}

func last(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	return values[len(values)-1]
}

func redisBlock(p palette, pic picture, w int) block {
	b := block{title: "REDIS"}
	r := pic.rates
	if r.Answer == 0 {
		return b
	}
	hits := "-"
	if r.Hits >= 0 {
		hits = percent(r.Hits, 1)
	}
	switch {
	case !r.Redis.Set:
		b.lines = append(b.lines, p.in(faint, fit(" none is set: each server caches for itself", w, false)))
	case !r.Redis.Up:
		b.lines = append(b.lines, p.in(bad, fit(" ✗ down: slower, nothing is lost", w, false)))
	default:
		memory := "-"
		if r.Redis.Memory > 0 {
			memory = size(r.Redis.Memory)
		}
		b.lines = append(b.lines, field(p, w, "memory", memory, normal, ""))
	}
	b.lines = append(b.lines, field(p, w, "hit rate", hits, normal, ""))
	return b
}

func operationsBlock(p palette, pic picture, w int) block {
	b := block{title: "OPERATIONS"}
	if !pic.known {
		return b
	}
	failed := normal
	if pic.fleet.FailedDay > 0 {
		failed = warn
	}
	b.lines = append(b.lines, field(p, w, "open", count(pic.fleet.OpenCount), strong, ""), field(p, w, "failed", count(pic.fleet.FailedDay), failed, "within a day"))
	for i, r := range pic.fleet.Runs {
		if i == 2 {
			break
		}
		b.lines = append(b.lines, field(p, w, r.Kind, count(r.ended())+"/"+count(r.tasks()), accent, bar(float64(r.ended()), float64(r.tasks()), max(0, min(12, w-26)))))
	}
	for i, o := range pic.fleet.Open {
		if i == 3 {
			break
		}
		b.lines = append(b.lines, p.in(accent, fit(" ▶ "+o.Kind+" "+o.Tenant+" "+ago(pic.now, o.Created), w, false)))
	}
	return b
}

func backupsBlock(p palette, pic picture, w int) block {
	b := block{title: "BACKUPS"}
	switch {
	case pic.agesErr != "":
		b.lines = []string{p.in(bad, fit(" ✗ "+pic.agesErr, w, false))}
	case !pic.aged:
		b.lines = []string{p.in(faint, fit(" looking into the store …", w, false))}
	case !pic.ages.Set:
		b.lines = []string{p.in(warn, fit(" ▲ no store is set: backup.url", w, false))}
	default:
		oldest, t := "-", normal
		if !pic.ages.Oldest.IsZero() {
			oldest = ago(pic.now, pic.ages.Oldest)
			if pic.now.Sub(pic.ages.Oldest) > 36*time.Hour {
				t = warn
			}
		}
		without := good
		if pic.ages.Without > 0 {
			without = bad
		}
		b.lines = []string{
			field(p, w, "oldest", oldest, t, pic.ages.Whose),
			field(p, w, "newest", orDash(ago(pic.now, pic.ages.Newest)), normal, ""),
			field(p, w, "without", count(pic.ages.Without), without, "of "+count(pic.ages.Tenants)),
		}
	}
	return b
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func databaseBlock(p palette, pic picture, w int) block {
	b := block{title: "POSTGRESQL"}
	if !pic.known {
		return b
	}
	d, waiting, sessions := pic.fleet.Database, normal, normal
	if d.Waiting > 0 {
		waiting = warn
	}
	if d.Max > 0 && d.Sessions*10 >= d.Max*9 {
		sessions = bad
	}
	b.lines = []string{
		field(p, w, "sessions", count(d.Sessions)+" of "+count(d.Max), sessions, ""),
		field(p, w, "lock waits", count(d.Waiting), waiting, ""),
	}
	return b
}

func serversBlock(p palette, pic picture, w int) block {
	b := block{title: "SERVERS"}
	if len(pic.fleet.Servers) == 0 {
		return b
	}
	t := good
	if pic.rates.Silent > 0 {
		t = bad
	}
	b.lines = append(b.lines, field(p, w, "answering", fmt.Sprintf("%d of %d", pic.rates.Answer, len(pic.fleet.Servers)), t, "memory "+size(pic.rates.Memory)))
	if pic.rates.Silent > 0 {
		for _, line := range wrap(pic.rates.Why, max(1, w-2)) {
			b.lines = append(b.lines, p.in(bad, fit(" "+line, w, false)))
		}
	}
	for i, s := range pic.fleet.Servers {
		if i == 4 {
			b.lines = append(b.lines, p.in(faint, fit(fmt.Sprintf(" and %d more", len(pic.fleet.Servers)-i), w, false)))
			break
		}
		b.lines = append(b.lines, p.in(faint, fit(fmt.Sprintf(" %s/%d  %s  up %s", s.Host, s.PID, s.Version, ago(pic.now, s.Started)), w, false)))
	}
	return b
}

func busiestBlock(p palette, pic picture, w int) block {
	b := block{title: "BUSIEST"}
	for _, t := range pic.rates.busiest(5) {
		b.lines = append(b.lines, field(p, w, t.Tenant, rate(t.Requests)+"/s", normal, millis(t.P95)))
	}
	return b
}
