package cache

import (
	"context"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/maypok86/otter/v2"
	"golang.org/x/time/rate"
)

// Limit is so many events in so long; as many may come at once.
type Limit struct {
	Count int
	Per   time.Duration
}

// Decision is what a limit says of one event.
type Decision struct {
	Allowed    bool
	Remaining  int
	RetryAfter time.Duration // when not allowed
	ResetAfter time.Duration
}

// limiter counts in Redis, and in the process when Redis is away: each process then allows the whole limit.
type limiter struct {
	shared *redis_rate.Limiter
	local  *otter.Cache[string, *rate.Limiter]
}

const maxLocalLimits = 100_000

func newLimiter(c *Cache) (*limiter, error) {
	local, err := otter.New(&otter.Options[string, *rate.Limiter]{
		MaximumSize: maxLocalLimits, ExpiryCalculator: otter.ExpiryAccessing[string, *rate.Limiter](10 * time.Minute),
	})
	if err != nil {
		return nil, err
	}
	l := &limiter{local: local}
	if c.client != nil {
		l.shared = redis_rate.NewLimiter(c.client)
	}
	return l, nil
}

func (l *limiter) close() { l.local.StopAllGoroutines() }

// Allow counts one event under a key of the caller's.
func (c *Cache) Allow(ctx context.Context, k Key, limit Limit) Decision {
	if c.limiter.shared != nil {
		var res *redis_rate.Result
		err := c.do(ctx, func(ctx context.Context) (err error) {
			res, err = c.limiter.shared.Allow(ctx, k.s, redis_rate.Limit{Rate: limit.Count, Burst: limit.Count, Period: limit.Per})
			return err
		})
		if err == nil {
			return Decision{Allowed: res.Allowed > 0, Remaining: res.Remaining, RetryAfter: max(0, res.RetryAfter), ResetAfter: res.ResetAfter}
		}
	}
	every := limit.Per / time.Duration(max(1, limit.Count))
	b, _ := c.limiter.local.ComputeIfAbsent(k.s, func() (*rate.Limiter, bool) {
		return rate.NewLimiter(rate.Every(every), limit.Count), false
	})
	if b.Allow() {
		return Decision{Allowed: true, Remaining: int(b.Tokens()), ResetAfter: every}
	}
	return Decision{RetryAfter: every, ResetAfter: every}
}
