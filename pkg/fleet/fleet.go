// Package fleet runs one piece of work for many tenants: bounded workers, one outcome for each tenant, and a report in
// the order of the plan. One tenant's failure, or panic, is that tenant's outcome; it does not stop the others unless
// that is asked for. What was not begun when the context ended is said so.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"
)

// Status is how one tenant's work ended.
type Status string

const (
	// OK is work that was done.
	OK Status = "ok"
	// Skipped is a tenant for which there was nothing to do, or whose work was not begun.
	Skipped Status = "skipped"
	// Failed is work that ended with an error.
	Failed Status = "failed"
)

// Outcome is one tenant's part of a report.
type Outcome struct {
	Tenant   string
	Status   Status
	Duration time.Duration
	From, To int // versions, for a migration
	Err      error
}

// Options says how the work is done.
type Options struct {
	Jobs        int           // at one time; at least 1
	MaxFailures int           // begin no more once so many have failed; 0: no bound
	Each        func(Outcome) // called with each outcome as it comes, never twice at a time; may be nil
}

// ErrNotBegun is the error of a tenant whose work was not begun, because the context had ended or too many had failed.
var ErrNotBegun = errors.New("not begun")

// Report is every tenant's outcome, in the order of the plan.
type Report struct {
	Outcomes []Outcome
	Duration time.Duration
}

// Count is the number of outcomes with the status.
func (r Report) Count(s Status) int {
	n := 0
	for _, o := range r.Outcomes {
		if o.Status == s {
			n++
		}
	}
	return n
}

// Interrupted reports whether some work was not begun.
func (r Report) Interrupted() bool {
	for _, o := range r.Outcomes {
		if errors.Is(o.Err, ErrNotBegun) {
			return true
		}
	}
	return false
}

// Run does work for each item and returns when all workers have ended. When ctx ends, work in hand is finished with a
// context that goes on, and no more is begun. name names an item's tenant in its outcome. An outcome with an error is
// Failed, and one without a status is OK.
func Run[T any](ctx context.Context, items []T, o Options, name func(T) string, work func(context.Context, T) Outcome) Report {
	start := time.Now()
	report := Report{Outcomes: make([]Outcome, len(items))}
	var mu sync.Mutex
	next, failures := 0, 0
	take := func() (int, bool) {
		mu.Lock()
		defer mu.Unlock()
		if next == len(items) || ctx.Err() != nil || o.MaxFailures > 0 && failures >= o.MaxFailures {
			return 0, false
		}
		next++
		return next - 1, true
	}
	// Finishing a tenant is what leaves it whole; interrupting it would only leave more to do again.
	working := context.WithoutCancel(ctx)
	var workers sync.WaitGroup
	for range min(max(1, o.Jobs), len(items)) {
		workers.Go(func() {
			for {
				i, ok := take()
				if !ok {
					return
				}
				out := guarded(working, items[i], work)
				out.Tenant = name(items[i])
				mu.Lock()
				report.Outcomes[i] = out
				if out.Status == Failed {
					failures++
				}
				if o.Each != nil {
					o.Each(out)
				}
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	for i := next; i < len(items); i++ {
		report.Outcomes[i] = Outcome{Tenant: name(items[i]), Status: Skipped, Err: ErrNotBegun}
	}
	report.Duration = time.Since(start)
	return report
}

// Panic is the error of a tenant whose work panicked. Its text has no stack.
type Panic struct {
	Value any
	Stack []byte
}

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v", p.Value) }

func guarded[T any](ctx context.Context, item T, work func(context.Context, T) Outcome) (out Outcome) {
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			out = Outcome{Err: &Panic{Value: p, Stack: debug.Stack()}}
		}
		switch {
		case out.Err != nil:
			out.Status = Failed
		case out.Status == "":
			out.Status = OK
		}
		out.Duration = time.Since(start)
	}()
	return work(ctx, item)
}
