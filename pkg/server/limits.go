package server

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Rate is how often something may be done: Count times in Per, all of them at once if need be. The zero Rate is no
// limit.
type Rate struct {
	Count int
	Per   time.Duration
}

// Decision is a limiter's answer.
type Decision struct {
	Allowed    bool
	Remaining  int           // how often it may still be done at once
	RetryAfter time.Duration // when not allowed: the wait until it is
	ResetAfter time.Duration // the wait until all is forgotten; 0: unknown
}

// Limiter counts for all instances together. It may fail: then each instance counts for itself.
type Limiter interface {
	Allow(ctx context.Context, key string, r Rate) (Decision, error)
}

// localLimiter counts in this process only. Its memory is bounded; what it forgets first is what was used least.
type localLimiter struct {
	buckets *otter.Cache[string, *rate.Limiter]
}

// maxBuckets bounds how many addresses and accounts are remembered, at about 200 bytes each.
const maxBuckets = 50_000

func newLocalLimiter() *localLimiter {
	return &localLimiter{buckets: otter.Must(&otter.Options[string, *rate.Limiter]{
		MaximumSize:      maxBuckets,
		ExpiryCalculator: otter.ExpiryAccessing[string, *rate.Limiter](10 * time.Minute),
	})}
}

func (l *localLimiter) allow(key string, r Rate) Decision {
	b, _ := l.buckets.ComputeIfAbsent(key, func() (*rate.Limiter, bool) {
		return rate.NewLimiter(rate.Every(r.Per/time.Duration(r.Count)), r.Count), false
	})
	now := time.Now() // by the monotonic clock: one that is set does not count
	if limit := rate.Every(r.Per / time.Duration(r.Count)); b.Limit() != limit || b.Burst() != r.Count {
		b.SetLimitAt(now, limit) // the limit of this key has changed
		b.SetBurstAt(now, r.Count)
	}
	if b.AllowN(now, 1) {
		return Decision{Allowed: true, Remaining: int(b.TokensAt(now))}
	}
	missing := 1 - b.TokensAt(now)
	return Decision{RetryAfter: time.Duration(missing * float64(r.Per) / float64(r.Count))}
}

// limit counts one use of a bucket. When the bucket is used up it returns a fault of kind Busy.
func (s *Server) limit(ctx context.Context, x *exchange, name, key string, r Rate) error {
	if r.Count <= 0 || r.Per <= 0 {
		return nil
	}
	key = name + ":" + key
	var d Decision
	err := error(nil)
	if s.opts.Limiter != nil {
		d, err = s.opts.Limiter.Allow(ctx, key, r)
	}
	if s.opts.Limiter == nil || err != nil {
		d = s.local.allow(key, r)
	}
	return s.decided(x, name, r, d)
}

// rateOf is how often a tenant with this budget of its own may be asked.
func (s *Server) rateOf(own tenant.Budget) Rate {
	switch n := own.Requests; {
	case n > 0:
		return Rate{Count: n, Per: time.Second}
	case n == tenant.Unlimited:
		return Rate{}
	}
	return s.opts.RequestsPerTenant
}

// outOfTime reports whether a statement was cancelled by the tenant's budget.
func outOfTime(x *exchange) bool {
	return x.tenant.Budget.StatementTimeout > 0 && fault.Of(x.err).Code == "statement_timeout"
}

// limitLocally counts in this process only: for what is counted with each request.
func (s *Server) limitLocally(x *exchange, name, key string, r Rate) error {
	if r.Count <= 0 || r.Per <= 0 {
		return nil
	}
	return s.decided(x, name, r, s.local.allow(name+":"+key, r))
}

func (s *Server) decided(x *exchange, name string, r Rate, d Decision) error {
	h := x.w.Header()
	h.Set("RateLimit-Policy", fmt.Sprintf("%q;q=%d;w=%d", name, r.Count, int(max(r.Per.Seconds(), 1))))
	reset := max(d.ResetAfter, d.RetryAfter)
	if d.Remaining == 0 && reset == 0 {
		reset = r.Per / time.Duration(r.Count)
	}
	h.Set("RateLimit", fmt.Sprintf("%q;r=%s;t=%s", name, strconv.Itoa(d.Remaining), retryAfter(reset)))
	if d.Allowed {
		return nil
	}
	return fault.New(fault.Busy, "too many requests of this kind").WithCode("rate_limited").WithRetry(max(d.RetryAfter, time.Second))
}
