package postgres

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// inFlight caps the transactions that one tenant has at one time, so that one tenant cannot take the pool. It holds
// entries only for tenants that have work in flight or waiting.
type inFlight struct {
	limit int // of a tenant without a budget of its own
	most  int // of one with it
	wait  time.Duration

	mu      sync.Mutex
	tenants map[int32]*slots
}

// slots are one tenant's. Each caller brings the limit that it knows of, since a limit may change while the tenant is at
// work: whoever comes after the change is bound by the new one.
type slots struct {
	taken   int
	waiting []*waiter // first come, first served
}

type waiter struct {
	limit int
	given chan struct{} // closed with the slot taken
}

// waitersPerSlot bounds the queue of a busy tenant: behind it a caller is refused at once instead of waiting in vain.
const waitersPerSlot = 16

func newInFlight(limit, most int, wait time.Duration) *inFlight {
	return &inFlight{limit: limit, most: most, wait: wait, tenants: make(map[int32]*slots)}
}

// enter takes a slot of the tenant and returns its release; budget is the tenant's own limit, above 0 if there is one. It
// waits a bounded time; then the fault is Busy.
func (f *inFlight) enter(ctx context.Context, number int32, budget int) (func(), error) {
	limit := f.limitOf(budget)
	leave := func() { f.leave(number) }
	f.mu.Lock()
	s := f.tenants[number]
	if s == nil {
		s = &slots{}
		f.tenants[number] = s
	}
	if s.taken < limit && len(s.waiting) == 0 {
		s.taken++
		f.mu.Unlock()
		return leave, nil
	}
	if len(s.waiting) >= limit*waitersPerSlot {
		f.mu.Unlock()
		return nil, errTenantBusy()
	}
	w := &waiter{limit: limit, given: make(chan struct{})}
	s.waiting = append(s.waiting, w)
	f.mu.Unlock()

	timer := time.NewTimer(f.wait)
	defer timer.Stop()
	var err error
	select {
	case <-w.given:
		return leave, nil
	case <-timer.C:
		err = errTenantBusy()
	case <-ctx.Done():
		err = ctx.Err()
	}
	f.mu.Lock()
	i := slices.Index(s.waiting, w)
	if i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
		f.next(number, s) // one behind may have a higher limit
	}
	f.mu.Unlock()
	if i < 0 { // it was given in the last moment
		return leave, nil
	}
	return nil, err
}

func (f *inFlight) limitOf(budget int) int {
	if budget > 0 {
		return min(budget, f.most)
	}
	return f.limit
}

func (f *inFlight) leave(number int32) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.tenants[number]
	s.taken--
	f.next(number, s)
}

// next gives slots to those who wait, and drops the entry of a tenant that has nothing to do.
func (f *inFlight) next(number int32, s *slots) {
	for len(s.waiting) > 0 && s.taken < s.waiting[0].limit {
		s.taken++
		close(s.waiting[0].given)
		s.waiting = slices.Delete(s.waiting, 0, 1)
	}
	if s.taken == 0 && len(s.waiting) == 0 {
		delete(f.tenants, number)
	}
}

func errTenantBusy() error {
	return fault.New(fault.Busy, "this tenant has too much work in flight").WithCode("tenant_busy").WithRetry(time.Second)
}
