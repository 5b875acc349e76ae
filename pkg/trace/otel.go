//go:build otel

package trace

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/exaring/otelpgx"
	"github.com/jackc/pgx/v5"
	"github.com/redis/go-redis/extra/redisotel/v9"
	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdk "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Bounds of what is held for the collector: what does not fit is not sent.
const (
	spansHeld    = 4096
	spansAtOnce  = 512
	sendEach     = 2 * time.Second
	sendWithin   = 5 * time.Second
	tellFailures = time.Minute // at most so often
)

type tracer struct {
	provider *sdk.TracerProvider
	requests trace.Tracer
}

func open(o Options) (Tracer, error) {
	exporter, err := otlptracehttp.New(context.Background(), otlptracehttp.WithEndpointURL(o.Endpoint), otlptracehttp.WithTimeout(sendWithin),
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: false}))
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "tracing.endpoint cannot be used").WithCode("setting")
	}
	otel.SetErrorHandler(&failures{log: o.Logger})
	provider := sdk.NewTracerProvider(
		sdk.WithSampler(sdk.ParentBased(sdk.TraceIDRatioBased(o.Sample))),
		sdk.WithResource(resource.NewSchemaless(attribute.String("service.name", "oneo"), attribute.String("service.version", o.Version))),
		sdk.WithSpanProcessor(owned{}),
		sdk.WithBatcher(scrubbing{exporter}, sdk.WithMaxQueueSize(spansHeld), sdk.WithMaxExportBatchSize(spansAtOnce), sdk.WithBatchTimeout(sendEach),
			sdk.WithExportTimeout(sendWithin)),
	)
	return &tracer{provider, provider.Tracer("oneo")}, nil
}

// failures logs what could not be sent, now and then.
type failures struct {
	log  *slog.Logger
	mu   sync.Mutex
	last time.Time
}

func (f *failures) Handle(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if time.Since(f.last) < tellFailures {
		return
	}
	f.last = time.Now()
	f.log.Warn("traces cannot be sent", "error", err)
}

const (
	tenantKey  = attribute.Key("oneo.tenant")
	requestKey = attribute.Key("oneo.request_id")
	methodKey  = attribute.Key("http.request.method")
	routeKey   = attribute.Key("http.route")
	statusKey  = attribute.Key("http.response.status_code")
)

var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}

// Request takes no parent from outside: strangers could have everything traced.
func (t *tracer) Request(ctx context.Context, method string) (context.Context, func(route string, status int)) {
	if !slices.Contains(methods, method) {
		method = "_OTHER"
	}
	about := tenant.AboutOf(ctx)
	ctx, span := t.requests.Start(ctx, method, trace.WithNewRoot(), trace.WithSpanKind(trace.SpanKindServer), trace.WithAttributes(methodKey.String(method)))
	return ctx, func(route string, status int) {
		if route != "" {
			span.SetName(method + " " + route)
			span.SetAttributes(routeKey.String(route))
		}
		if about != nil {
			span.SetAttributes(requestKey.String(about.Request))
			if slug := about.Tenant(); slug != "" { // it was not known at the beginning
				span.SetAttributes(tenantKey.String(slug))
			}
		}
		span.SetAttributes(statusKey.Int(status))
		if status >= 500 {
			span.SetStatus(codes.Error, "")
		}
		span.End()
	}
}

// Postgres names a span by a statement's first word: its text may hold anything.
func (t *tracer) Postgres() pgx.QueryTracer {
	return otelpgx.NewTracer(otelpgx.WithTracerProvider(t.provider), otelpgx.WithDisableSQLStatementInAttributes(), otelpgx.WithDisableConnectionDetailsInAttributes(),
		otelpgx.WithSpanNameFunc(func(sql string) string {
			word, _, _ := strings.Cut(strings.TrimSpace(sql), " ")
			return strings.ToLower(word[:min(len(word), 40)])
		}))
}

func (t *tracer) Redis(c *redis.Client) error {
	return redisotel.InstrumentTracing(c, redisotel.WithTracerProvider(t.provider), redisotel.WithDBStatement(false), redisotel.WithCallerEnabled(false))
}

func (t *tracer) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), sendWithin)
	defer cancel()
	_ = t.provider.Shutdown(ctx) // a collector that is away has been told of
	return nil
}

// owned says of each span for whom it is, by its context.
type owned struct{}

func (owned) OnStart(ctx context.Context, s sdk.ReadWriteSpan) {
	if about := tenant.AboutOf(ctx); about != nil && about.Tenant() != "" {
		s.SetAttributes(tenantKey.String(about.Tenant()))
	}
}

func (owned) OnEnd(sdk.ReadOnlySpan)           {}
func (owned) Shutdown(context.Context) error   { return nil }
func (owned) ForceFlush(context.Context) error { return nil }

// told are the attributes that leave the process: names and numbers.
var told = []attribute.Key{
	tenantKey, requestKey, methodKey, routeKey, statusKey, "db.system", "db.system.name", "db.operation", "db.operation.name", "db.operation.batch.size",
	otelpgx.RowsAffectedKey, otelpgx.SQLStateKey, "db.redis.num_cmd",
}

// scrubbing sends spans without what libraries have noted besides: errors' texts, statements, keys.
type scrubbing struct{ sdk.SpanExporter }

func (s scrubbing) ExportSpans(ctx context.Context, spans []sdk.ReadOnlySpan) error {
	clean := make([]sdk.ReadOnlySpan, len(spans))
	for i, span := range spans {
		clean[i] = scrubbed{span}
	}
	return s.SpanExporter.ExportSpans(ctx, clean)
}

type scrubbed struct{ sdk.ReadOnlySpan }

func (scrubbed) Events() []sdk.Event { return nil }

func (s scrubbed) Status() sdk.Status { return sdk.Status{Code: s.ReadOnlySpan.Status().Code} }

func (s scrubbed) Attributes() (kept []attribute.KeyValue) {
	for _, a := range s.ReadOnlySpan.Attributes() {
		if slices.Contains(told, a.Key) {
			kept = append(kept, a)
		}
	}
	return kept
}
