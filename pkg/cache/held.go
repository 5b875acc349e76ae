package cache

import (
	"context"
	"sync"
	"time"
)

// maxHeld bounds what is held, at about 500 bytes each.
const maxHeld = 10_000

// held are the values that Redis was to take and has not. Whoever sets a value says that what Redis has is no longer
// true: it must not be read here again, even when Redis is back and still has it.
type held struct {
	mu     sync.Mutex
	values map[string]*heldValue
	// blind ends the time in which nothing is read at all: more had to be held than may be.
	blind   time.Time
	telling bool // Redis is being told at the moment
}

type heldValue struct {
	value []byte
	ttl   time.Duration
	until time.Time
	owed  bool // Redis was asked and did not take it; false: it is being asked for the first time
}

// add holds a value before Redis is asked: whoever reads meanwhile must not get the old one. Nil: there is no room.
func (h *held) add(key string, value []byte, ttl time.Duration) *heldValue {
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, there := h.values[key]; !there && len(h.values) >= maxHeld {
		h.sweep()
		if len(h.values) >= maxHeld {
			return nil
		}
	}
	if h.values == nil {
		h.values = map[string]*heldValue{}
	}
	v := &heldValue{value: value, ttl: ttl, until: time.Now().Add(ttl)}
	h.values[key] = v
	return v
}

// settle notes whether Redis took a value. One that was replaced meanwhile is another's to settle.
func (h *held) settle(key string, v *heldValue, ttl time.Duration, taken bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case v == nil && !taken:
		h.blind = later(h.blind, time.Now().Add(ttl))
	case v == nil:
	case !taken:
		v.owed = true
	case h.values[key] == v:
		delete(h.values, key)
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func (h *held) sweep() {
	now := time.Now()
	for k, v := range h.values {
		if now.After(v.until) {
			delete(h.values, k)
		}
	}
}

// get finds what is held of a key. With blind nothing may be read.
func (h *held) get(key string) (value []byte, found, blind bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.values) == 0 && h.blind.IsZero() {
		return nil, false, false
	}
	now := time.Now()
	if v, ok := h.values[key]; ok && now.Before(v.until) {
		return v.value, true, false
	}
	return nil, false, now.Before(h.blind)
}

// next is a value that Redis is to be told of, the one of a key first; one caller at a time.
func (h *held) next(first string) (key string, v *heldValue) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.values) == 0 || h.telling {
		return "", nil
	}
	now := time.Now()
	take := func(k string, v *heldValue) bool {
		if now.After(v.until) {
			delete(h.values, k)
			return false
		}
		return v.owed
	}
	if v, ok := h.values[first]; ok && take(first, v) {
		h.telling = true
		return first, v
	}
	for k, v := range h.values {
		if take(k, v) {
			h.telling = true
			return k, v
		}
	}
	return "", nil
}

func (h *held) told() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.telling = false
}

func (h *held) len() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.values)
}

// tell gives Redis one value that it did not take before. The time to live is the whole one again: a value that another
// process set meanwhile may be overwritten, but not end sooner than it would have. That is right for bars, which are all
// alike; of values that differ the last one would have to win.
func (c *Cache) tell(ctx context.Context, asked Key) {
	key, v := c.held.next(asked.s)
	if v == nil {
		return
	}
	defer c.held.told()
	if err := c.set(ctx, key, v.value, v.ttl); err == nil {
		c.held.settle(key, v, v.ttl, true)
	}
}
