package cache

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// run is one life of a Redis server, from its start to its end. What it has when it comes back is from before its end, from
// a snapshot that may be older, or from another server: changes that it had been told may not be among it. So the names of
// values end with the run in which they were set, and nothing from another run is found.
type run struct {
	suffix string    // of names; empty: this Redis does not say, or its user may not ask
	since  time.Time // a moment at which it was already there
}

var errRun = errors.New("redis was started again, and again")

// meet is told of every new connection before a command goes over it. The server's word is asked for there, once a
// connection: a connection leads to one run and ends with it.
func (c *Cache) meet(ctx context.Context, conn *redis.Conn) error {
	asked := time.Now()
	text, err := conn.Info(ctx, "server").Result()
	var said redis.Error
	if err != nil && !errors.As(err, &said) {
		return err
	}
	suffix := ""
	for line := range strings.Lines(text) {
		if id, ok := strings.CutPrefix(strings.TrimSpace(line), "run_id:"); ok && checkParts(id) == nil {
			suffix = ":" + id[:min(len(id), 16)]
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if asked.Before(c.asked) { // an answer of a run that is over by now
		return nil
	}
	c.asked = asked
	if now := c.run.Load(); now == nil || now.suffix != suffix {
		c.run.Store(&run{suffix: suffix, since: asked})
	}
	return nil
}

// named runs a command with a key's name in the run that is there; once more if it has gone to another one.
func (c *Cache) named(ctx context.Context, key string, fn func(ctx context.Context, name string, in *run) error) error {
	return c.do(ctx, func(ctx context.Context) error {
		for range 3 {
			in := c.run.Load()
			if in == nil {
				err := c.client.Ping(ctx).Err()
				if in = c.run.Load(); in == nil {
					return err
				}
			}
			// The connection over which the answer came was met before.
			if err := fn(ctx, key+in.suffix, in); c.run.Load() == in {
				return err
			}
		}
		return errRun
	})
}
