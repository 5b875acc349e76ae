package observe

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
)

const (
	// heartbeatEach is how often a reader that follows hears something.
	heartbeatEach = 5 * time.Second
	// takenWithin is how long a reader may take for what is written to it at once.
	takenWithin = 10 * time.Second
	// instanceHeader says which server answers.
	instanceHeader = "Oneo-Instance"
)

// Handle answers GET /logs of a server: the lines that are kept, as one JSON object a line with its number as "seq", the oldest
// first. Its parameters: tenant, names or patterns with * and ?, repeatable; level, the least one; since, RFC 3339; after, the number of
// the last line that the reader has; follow=true goes on with those that come, and with {"heartbeat": time} where none do. A reader that
// falls behind what is kept is told {"cut": "..."} and left; {"missed": n} is said of lines behind after that are gone. Whoever mounts it asks for the token (Guard).
func (l *Logs) Handle(instance uuid.UUID) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { l.serve(w, r, instance) })
}

func (l *Logs) serve(w http.ResponseWriter, r *http.Request, instance uuid.UUID) {
	want, from, follow, err := readLogQuery(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var told chan struct{}
	if follow {
		var done func()
		var ok bool
		if told, done, ok = l.follow(); !ok {
			http.Error(w, fmt.Sprintf("%d readers follow the log already", maxFollowers), http.StatusServiceUnavailable)
			return
		}
		defer done()
	}
	h := w.Header()
	h.Set("Content-Type", "application/x-ndjson")
	h.Set("Cache-Control", "no-store")
	h.Set(instanceHeader, instance.String())
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	heartbeat := time.NewTicker(heartbeatEach)
	defer heartbeat.Stop()
	send := func(text []byte) bool {
		_ = rc.SetWriteDeadline(time.Now().Add(takenWithin)) // a recorder of a test has none
		if _, err := w.Write(text); err != nil {
			return false
		}
		return rc.Flush() == nil
	}
	until := l.end()
	for first := true; ; first = false {
		lines, next, missed := l.read(from, want)
		var out bytes.Buffer
		switch {
		case missed == 0 || first && from == 1: // a reader that comes for the first time has missed nothing
		case first || !follow:
			fmt.Fprintf(&out, `{"missed":%d}`+"\n", missed)
		default:
			send(fmt.Appendf(nil, `{"cut":"%d lines went by before they were read"}`+"\n", missed))
			return
		}
		for _, line := range lines {
			fmt.Fprintf(&out, `{"seq":%d,%s`+"\n", line.number, line.text[1:])
		}
		if !send(out.Bytes()) {
			return
		}
		from = next
		if !follow && from >= until {
			return
		}
		if from < l.end() {
			continue
		}
		select {
		case <-told:
		case now := <-heartbeat.C:
			if !send(fmt.Appendf(nil, `{"heartbeat":%q}`+"\n", now.UTC().Format(time.RFC3339Nano))) {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

// readLogQuery reads the parameters of GET /logs. from is the number of the first line to look at.
func readLogQuery(r *http.Request) (want func(logLine) bool, from int64, follow bool, err error) {
	q := r.URL.Query()
	for key := range q {
		if !slices.Contains([]string{"tenant", "level", "since", "after", "follow"}, key) {
			return nil, 0, false, fmt.Errorf("unknown parameter %q: tenant, level, since, after and follow are known", key)
		}
	}
	tenants := q["tenant"]
	for _, t := range tenants {
		if _, err := path.Match(t, ""); err != nil || t == "" {
			return nil, 0, false, fmt.Errorf("tenant: %q is no name and no pattern", t)
		}
	}
	level := slog.LevelDebug
	if s := q.Get("level"); s != "" {
		if err := level.UnmarshalText([]byte(s)); err != nil {
			return nil, 0, false, fmt.Errorf("level: %q is none of debug, info, warn, error", s)
		}
	}
	var since time.Time
	if s := q.Get("since"); s != "" {
		if since, err = time.Parse(time.RFC3339, s); err != nil {
			return nil, 0, false, fmt.Errorf("since: %q is no time of RFC 3339", s)
		}
	}
	from = 1
	if s := q.Get("after"); s != "" {
		after, err := strconv.ParseInt(s, 10, 64)
		if err != nil || after < 0 {
			return nil, 0, false, fmt.Errorf("after: %q is no number of a line", s)
		}
		from = after + 1
	}
	if s := q.Get("follow"); s != "" {
		if follow, err = strconv.ParseBool(s); err != nil {
			return nil, 0, false, fmt.Errorf("follow: %q is neither true nor false", s)
		}
	}
	return func(l logLine) bool {
		return l.level >= level && !l.at.Before(since) && (len(tenants) == 0 || slices.ContainsFunc(tenants, func(pattern string) bool {
			is, _ := path.Match(pattern, l.tenant) // it has been tried
			return is
		}))
	}, from, follow, nil
}
