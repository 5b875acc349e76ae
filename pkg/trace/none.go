//go:build !otel

package trace

import "github.com/oneo-crm/oneo/pkg/fault"

func open(Options) (Tracer, error) {
	return nil, fault.New(fault.Unsupported, "tracing.endpoint is set, and this oneo was built without OpenTelemetry").WithCode("no_tracing").
		WithHint("build it with `make build TAGS=nomsgpack,otel`, or leave tracing.endpoint empty")
}
