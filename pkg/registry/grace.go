package registry

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/maypok86/otter/v2"

	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Grace says for how long the registry's last answers stand in for it while it cannot be asked.
type Grace struct {
	For    time.Duration    // from the moment at which the answer was given; 0: they never do
	Away   func(error) bool // whether an error of Lookup says that the registry cannot be asked
	Logger *slog.Logger
}

const (
	// askAgain is how often one request asks a registry that was away, and for how long an old answer is used before it
	// is looked at again. All others use what they have at once: each of them would wait until its connection is given up.
	askAgain = time.Second
)

// answer is what the registry said of a host when it was asked last.
type answer struct {
	tenant tenant.Tenant // zero: no tenant has it
	at     time.Time
	change time.Time // the mark of a change in the shared cache that was seen before it was asked; zero: there was none
}

// lastAnswers are the registry's last answers. One goes as soon as it is known not to hold any more.
type lastAnswers struct {
	grace  Grace
	byHost *otter.Cache[tenant.Host, answer]

	mu     sync.Mutex
	newest time.Time // when the registry answered last, for any tenant
	since  time.Time // since when the registry has been away; zero: it is not
	next   time.Time // when it is asked again
}

func newLastAnswers(g Grace, size int) (*lastAnswers, error) {
	if g.For < 0 || g.For > 0 && (g.Away == nil || g.Logger == nil) {
		return nil, errors.New("resolver: a Grace needs Away and Logger")
	}
	byHost, err := otter.New(&otter.Options[tenant.Host, answer]{
		MaximumSize: size,
		ExpiryCalculator: otter.ExpiryWritingFunc(func(e otter.Entry[tenant.Host, answer]) time.Duration {
			return max(g.For-time.Since(e.Value.at), time.Nanosecond)
		}),
	})
	if err != nil {
		return nil, fmt.Errorf("make the cache of last answers: %w", err)
	}
	return &lastAnswers{grace: g, byHost: byHost}, nil
}

// keep keeps an answer of the registry.
func (l *lastAnswers) keep(host tenant.Host, a answer) {
	if a.tenant.IsZero() {
		l.drop(host)
		return
	}
	if l.grace.For == 0 {
		return
	}
	if last, ok := l.byHost.GetIfPresent(host); ok && last.at.After(a.at) {
		return
	}
	l.byHost.Set(host, a)
	l.mu.Lock()
	defer l.mu.Unlock()
	if a.at.After(l.newest) {
		l.newest = a.at
	}
}

// drop forgets an answer that does not hold any more.
func (l *lastAnswers) drop(host tenant.Host) { l.byHost.Invalidate(host) }

// dropUnlessSince is drop for a host with the mark of a change, unless the answer was asked for when the mark stood.
func (l *lastAnswers) dropUnlessSince(host tenant.Host, change time.Time) {
	if a, ok := l.byHost.GetIfPresent(host); ok && !a.change.Equal(change) {
		l.drop(host)
	}
}

// of is the last answer for a host that may still be used.
func (l *lastAnswers) of(host tenant.Host) (tenant.Tenant, bool) {
	a, ok := l.byHost.GetIfPresent(host)
	return a.tenant, ok
}

// young reports whether there may be an answer that can still be used.
func (l *lastAnswers) young() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return !l.newest.IsZero() && time.Since(l.newest) <= l.grace.For
}

// resting reports whether the registry is away and need not be asked at the moment. When it has to be, the caller is the
// one that asks.
func (l *lastAnswers) resting() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since.IsZero() {
		return false
	}
	if time.Now().Before(l.next) {
		return true
	}
	l.next = time.Now().Add(askAgain)
	return false
}

// heard notes how the registry answered, and reports whether it could not be asked.
func (l *lastAnswers) heard(err error) (away bool) {
	if l.grace.For == 0 {
		return false
	}
	away = err != nil && l.grace.Away(err)
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case away && l.since.IsZero():
		l.since = time.Now()
		l.grace.Logger.Warn("the registry cannot be asked: its last answers stand in for it", "for", l.grace.For, "error", err)
		fallthrough
	case away:
		l.next = time.Now().Add(askAgain)
	case !l.since.IsZero():
		l.grace.Logger.Info("the registry answers again", "after", time.Since(l.since).Round(time.Millisecond))
		l.since = time.Time{}
	}
	return away
}
