package observe

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// LogWriter hands lines on to a file or pipe without ever waiting for it: what it does not take in time is lost and counted, and
// the number is told once it takes lines again. A full disk, a pipe that nobody reads or one that is closed costs lines, never
// the work that logs. It is safe for concurrent use and must be closed.
type LogWriter struct {
	to   io.Writer
	lost func(n int64) []byte
	most int64

	lines   chan []byte
	held    atomic.Int64 // bytes
	dropped atomic.Int64 // lines not told of yet
	mu      sync.RWMutex // writing to lines, and closing it
	closed  bool
	done    chan struct{}
}

// linesHeld is how many lines may wait besides their bytes.
const linesHeld = 16 << 10

// NewLogWriter makes one that holds so many bytes at most; lost makes the line that says how many lines were lost.
func NewLogWriter(to io.Writer, most int64, lost func(n int64) []byte) *LogWriter {
	w := &LogWriter{to: to, lost: lost, most: most, lines: make(chan []byte, linesHeld), done: make(chan struct{})}
	go w.run()
	return w
}

// Write takes a line, or counts it as lost. It never fails.
func (w *LogWriter) Write(p []byte) (int, error) {
	w.mu.RLock()
	defer w.mu.RUnlock()
	size := int64(len(p))
	if w.closed || w.held.Add(size) > w.most {
		if !w.closed {
			w.held.Add(-size)
		}
		w.dropped.Add(1)
		return len(p), nil
	}
	select {
	case w.lines <- bytes.Clone(p):
	default:
		w.held.Add(-size)
		w.dropped.Add(1)
	}
	return len(p), nil
}

func (w *LogWriter) run() {
	defer close(w.done)
	for p := range w.lines {
		if n := w.dropped.Swap(0); n > 0 {
			if _, err := w.to.Write(w.lost(n)); err != nil {
				w.dropped.Add(n)
			}
		}
		if _, err := w.to.Write(p); err != nil {
			w.dropped.Add(1)
		}
		w.held.Add(-int64(len(p)))
	}
}

// Close writes what is held, for so long at most. What still waits then is lost.
func (w *LogWriter) Close(within time.Duration) {
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		close(w.lines)
	}
	w.mu.Unlock()
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-w.done:
	case <-t.C:
	}
}
