package postgres

import (
	"context"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// inFlight caps the transactions that one tenant has at one time, so that one tenant cannot take the pool. It holds
// entries only for tenants that have work in flight or waiting.
type inFlight struct {
	limit int
	wait  time.Duration

	mu      sync.Mutex
	tenants map[int32]*slots
}

type slots struct {
	taken chan struct{}
	users int // holders and waiters
}

// waitersPerSlot bounds the queue of a busy tenant: behind it a caller is refused at once instead of waiting in vain.
const waitersPerSlot = 16

func newInFlight(limit int, wait time.Duration) *inFlight {
	return &inFlight{limit: limit, wait: wait, tenants: make(map[int32]*slots)}
}

// enter takes a slot of the tenant and returns its release. It waits a bounded time; then the fault is Busy.
func (f *inFlight) enter(ctx context.Context, number int32) (func(), error) {
	f.mu.Lock()
	s := f.tenants[number]
	if s == nil {
		s = &slots{taken: make(chan struct{}, f.limit)}
		f.tenants[number] = s
	}
	if s.users >= f.limit*(1+waitersPerSlot) {
		f.mu.Unlock()
		return nil, errTenantBusy()
	}
	s.users++
	f.mu.Unlock()

	leave := func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if s.users--; s.users == 0 {
			delete(f.tenants, number)
		}
	}
	select {
	case s.taken <- struct{}{}:
	default:
		timer := time.NewTimer(f.wait)
		defer timer.Stop()
		select {
		case s.taken <- struct{}{}:
		case <-timer.C:
			leave()
			return nil, errTenantBusy()
		case <-ctx.Done():
			leave()
			return nil, ctx.Err()
		}
	}
	return func() { <-s.taken; leave() }, nil
}

func errTenantBusy() error {
	return fault.New(fault.Busy, "this tenant has too much work in flight").WithCode("tenant_busy").WithRetry(time.Second)
}
