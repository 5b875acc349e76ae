package observe

import (
	"math"
	"sync/atomic"
	"time"
)

// The buckets of a window: the first ends at a tenth of a millisecond, each ends at 1.2 times the one before it, so that the
// middle of a bucket is within 10 % of all that is in it, and the last takes what is longer than 40 s.
const (
	buckets     = 72
	firstBucket = 100 * time.Microsecond
	growth      = 1.2
)

// A window is made of slots; the one at work is not over yet, so that it covers the last 60 to 70 seconds.
const (
	slotLength = 10 * time.Second
	slots      = 7
)

var perBucket = 1 / math.Log(growth)

func bucketOf(d time.Duration) int {
	if d <= firstBucket {
		return 0
	}
	return min(1+int(math.Log(float64(d)/float64(firstBucket))*perBucket), buckets-1)
}

// middleOf is the time in the (geometric) middle of a bucket, in milliseconds.
func middleOf(bucket int) float64 {
	return float64(firstBucket) / float64(time.Millisecond) * math.Pow(growth, float64(bucket)-0.5)
}

// window counts how long answers of the last minute took. It takes 2 KB and no lock: at the turn of a slot, answers that come at
// the same moment may be left out. The zero window is empty.
type window struct {
	slots [slots]struct {
		turn    atomic.Int64 // which stretch of time the counts are of, from 1 on
		buckets [buckets]atomic.Uint32
	}
}

func turnOf(now time.Duration) int64 { return int64(now/slotLength) + 1 }

// add counts one answer. now is the time since the counter began, which no setting of clocks moves.
func (w *window) add(now, took time.Duration) {
	turn := turnOf(now)
	s := &w.slots[turn%slots]
	if was := s.turn.Load(); was != turn {
		if was > turn { // it took this goroutine a minute to come here
			return
		}
		if s.turn.CompareAndSwap(was, turn) {
			for i := range s.buckets {
				s.buckets[i].Store(0)
			}
		}
	}
	s.buckets[bucketOf(took)].Add(1)
}

// sum is what is in the window now.
func (w *window) sum(now time.Duration) (counts [buckets]uint64, all uint64) {
	turn := turnOf(now)
	for i := range w.slots {
		if was := w.slots[i].turn.Load(); was <= turn-slots || was > turn {
			continue
		}
		for b := range counts {
			n := uint64(w.slots[i].buckets[b].Load())
			counts[b] += n
			all += n
		}
	}
	return counts, all
}

// quantiles are p50, p95 and p99 of the window in milliseconds, and how many answers are in it.
func (w *window) quantiles(now time.Duration) (p50, p95, p99 float64, all uint64) {
	counts, all := w.sum(now)
	if all == 0 {
		return 0, 0, 0, 0
	}
	of := func(q float64) float64 {
		rank, seen := uint64(math.Ceil(q*float64(all))), uint64(0)
		for b, n := range counts {
			if seen += n; seen >= rank {
				return middleOf(b)
			}
		}
		return middleOf(buckets - 1)
	}
	return of(0.50), of(0.95), of(0.99), all
}
