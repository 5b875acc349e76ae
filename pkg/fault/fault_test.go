package fault_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

func TestFaultKeepsCauseAndWords(t *testing.T) {
	t.Parallel()
	cause := errors.New("secret detail")
	err := fmt.Errorf("outer: %w", fault.Wrap(cause, fault.Conflict, "the name %s is taken", "acme").WithCode("taken").
		WithHint("choose %s", "another").WithTenant("acme").WithRetry(time.Second).
		WithField(fault.Field{Pointer: "/slug", Code: "taken", Detail: "is taken"}).WithDetails(map[string]int{"n": 1}))

	require.True(t, fault.Is(err, fault.Conflict))
	require.False(t, fault.Is(err, fault.Invalid))
	require.ErrorIs(t, err, cause, "the cause stays reachable for the log")
	f := fault.Of(err)
	require.Equal(t, "the name acme is taken", f.Message)
	require.NotContains(t, f.Message+f.Hint, "secret", "what people read never holds the cause")
	require.Contains(t, f.Error(), "secret detail", "the log does")
	require.Equal(t, "choose another", f.Hint)
	require.Equal(t, "taken", f.StableCode())
	require.Equal(t, "acme", f.Tenant)
	require.Equal(t, time.Second, f.Retry)
	require.Len(t, f.Fields, 1)
	require.NotNil(t, f.Details)
}

func TestOf(t *testing.T) {
	t.Parallel()
	require.Nil(t, fault.Of(nil))
	f := fault.Of(errors.New("pq: password is hunter2"))
	require.Equal(t, fault.Internal, f.Kind)
	require.NotContains(t, f.Message, "hunter2", "an unknown error is hidden behind a plain sentence")
	require.Equal(t, "internal", f.StableCode(), "without a code the kind is the code")
	inner := fault.New(fault.Invalid, "inner")
	require.Equal(t, fault.Locked, fault.Of(fault.Wrap(inner, fault.Locked, "outer")).Kind, "the outermost fault counts")
	require.False(t, fault.Is(nil, fault.Internal))
	require.False(t, fault.Is(errors.New("x"), fault.Internal), "only a fault has a kind")
	require.Equal(t, "inner", inner.Error())
}
