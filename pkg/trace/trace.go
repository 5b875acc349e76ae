// Package trace tells an OpenTelemetry collector how requests, their statements and their Redis commands follow each other and how long each
// takes. It promises: a span holds names, numbers and the tenant, and nothing that a request or a database has said: no statement, no
// argument, no key, no error's text; and a collector that is slow or away costs a request nothing.
package trace

import (
	"context"
	"log/slog"

	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/v9"
)

// Options say where traces go.
type Options struct {
	Endpoint string  // of a collector, OTLP over HTTP: http://collector:4318; empty: nothing is traced
	Sample   float64 // the part of the requests that is traced, from 0 to 1
	Version  string
	Logger   *slog.Logger
}

// Tracer traces. It is safe for concurrent use and must be closed.
type Tracer interface {
	// Request begins the span of a request; end is told how it ended. What works with the context is part of it.
	Request(ctx context.Context, method string) (_ context.Context, end func(route string, status int))
	// Postgres traces connections.
	Postgres() pgx.QueryTracer
	// Redis makes a client traced.
	Redis(c *redis.Client) error
	// Close sends what is held, within a few seconds.
	Close() error
}

// Open makes a Tracer; nil: the options want none. Unsupported: this binary was built without OpenTelemetry.
func Open(o Options) (Tracer, error) {
	if o.Endpoint == "" {
		return nil, nil
	}
	return open(o)
}
