package observe

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// maxLine bounds one line that is kept: a longer one loses its attributes.
const maxLine = 64 << 10

// maxFollowers bounds who may follow the lines at one time.
const maxFollowers = 16

// Logs keeps the last lines of a process's log in memory, as JSON. It is safe for concurrent use, and whoever logs never waits for
// whoever reads.
type Logs struct {
	most int // bytes

	mu        sync.Mutex
	buf       bytes.Buffer // the line that is being made
	lines     []logLine
	next      int64 // the number of the next line; they count from 1
	size      int   // of all lines, in bytes
	followers map[chan struct{}]bool
}

type logLine struct {
	at     time.Time
	level  slog.Level
	tenant string
	text   []byte // a JSON object
}

// lineCost is about what a line takes besides its text.
const lineCost = 96

// NewLogs makes a Logs that keeps so many bytes at most.
func NewLogs(most int) *Logs {
	return &Logs{most: most, next: 1, followers: map[chan struct{}]bool{}}
}

// Handler is a log handler that says for which tenant and request a line is, by its context, hands it on to out, and keeps it. What
// out does not want is not kept either.
func (l *Logs) Handler(out slog.Handler) slog.Handler {
	kept := slog.NewJSONHandler(&l.buf, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Value.Kind() == slog.KindDuration {
			a.Value = slog.StringValue(a.Value.Duration().String())
		}
		return a
	}})
	return &logHandler{logs: l, out: out, kept: kept}
}

type logHandler struct {
	logs      *Logs
	out, kept slog.Handler
	has       named
}

// named are the tenant and the request that a line names by itself.
type named struct {
	tenant, request       string
	hasTenant, hasRequest bool
}

func (n *named) look(a slog.Attr) {
	switch a.Key {
	case "tenant":
		n.tenant, n.hasTenant = a.Value.Resolve().String(), true
	case "request_id":
		n.request, n.hasRequest = a.Value.Resolve().String(), true
	}
}

func (h *logHandler) Enabled(ctx context.Context, level slog.Level) bool {
	return h.out.Enabled(ctx, level)
}

func (h *logHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	more := *h
	for _, a := range attrs {
		more.has.look(a)
	}
	more.out, more.kept = h.out.WithAttrs(attrs), h.kept.WithAttrs(attrs)
	return &more
}

func (h *logHandler) WithGroup(name string) slog.Handler {
	more := *h
	more.out, more.kept = h.out.WithGroup(name), h.kept.WithGroup(name)
	return &more
}

func (h *logHandler) Handle(ctx context.Context, r slog.Record) error {
	n := h.has
	r.Attrs(func(a slog.Attr) bool { n.look(a); return true })
	if about := tenant.AboutOf(ctx); about != nil {
		var more []slog.Attr
		if !n.hasRequest {
			n.request = about.Request
			more = append(more, slog.String("request_id", n.request))
		}
		if !n.hasTenant && about.Tenant() != "" {
			n.tenant = about.Tenant()
			more = append(more, slog.String("tenant", n.tenant))
		}
		if len(more) > 0 {
			r = r.Clone()
			r.AddAttrs(more...)
		}
	}
	h.logs.keep(ctx, h.kept, r, n)
	return h.out.Handle(ctx, r)
}

func (l *Logs) keep(ctx context.Context, form slog.Handler, r slog.Record, n named) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf.Reset()
	if err := form.Handle(ctx, r); err != nil { // a buffer takes everything
		return
	}
	if size := l.buf.Len(); size > maxLine {
		l.buf.Reset()
		short := slog.NewRecord(r.Time, r.Level, r.Message[:min(len(r.Message), 1000)], 0)
		short.AddAttrs(slog.String("tenant", n.tenant), slog.String("request_id", n.request), slog.Int("too_long_bytes", size))
		if err := slog.NewJSONHandler(&l.buf, nil).Handle(ctx, short); err != nil {
			return
		}
	}
	text := slices.Clone(bytes.TrimSuffix(l.buf.Bytes(), []byte("\n")))
	l.lines = append(l.lines, logLine{r.Time, r.Level, n.tenant, text})
	l.next++
	l.size += len(text) + lineCost
	for l.size > l.most && len(l.lines) > 1 {
		l.size -= len(l.lines[0].text) + lineCost
		l.lines[0] = logLine{}
		l.lines = l.lines[1:]
	}
	for f := range l.followers {
		select {
		case f <- struct{}{}:
		default: // it has been told already
		}
	}
}

// numbered is a line with its number.
type numbered struct {
	logLine
	number int64
}

// read is some lines from the number from on, those that want says, and the number of the line behind them. missed is how
// many lines that began there are not kept any more.
func (l *Logs) read(from int64, want func(logLine) bool) (found []numbered, next, missed int64) {
	const together = 256
	l.mu.Lock()
	defer l.mu.Unlock()
	first := l.next - int64(len(l.lines))
	if from < first {
		from, missed = first, first-from
	}
	for next = from; next < l.next && len(found) < together; next++ {
		if line := l.lines[next-first]; want(line) {
			found = append(found, numbered{line, next})
		}
	}
	return found, next, missed
}

// end is the number of the line that comes next.
func (l *Logs) end() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.next
}

// follow is told of each line, or of several at once, until done is called. False: too many follow.
func (l *Logs) follow() (told chan struct{}, done func(), ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.followers) >= maxFollowers {
		return nil, nil, false
	}
	told = make(chan struct{}, 1)
	l.followers[told] = true
	return told, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.followers, told)
	}, true
}
