//go:build !otel

package trace_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/trace"
)

func TestABinaryWithoutOpenTelemetrySaysSo(t *testing.T) {
	tr, err := trace.Open(trace.Options{})
	require.NoError(t, err)
	require.Nil(t, tr)
	_, err = trace.Open(trace.Options{Endpoint: "http://127.0.0.1:4318"})
	require.True(t, fault.Is(err, fault.Unsupported), "%v", err)
	require.Contains(t, fault.Of(err).Hint, "otel")
}
