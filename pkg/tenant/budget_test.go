package tenant_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestBudgetOr(t *testing.T) {
	t.Parallel()
	defaults := tenant.Budget{Requests: 10, InFlight: 2, StatementTimeout: time.Second, Storage: 1 << 20, Records: 100}
	require.Equal(t, defaults, tenant.Budget{}.Or(defaults), "what is not said is the default")
	own := tenant.Budget{Requests: 1, InFlight: 1, StatementTimeout: time.Hour, Storage: 1, Records: 1}
	require.Equal(t, own, own.Or(defaults))
	none := tenant.Budget{Requests: tenant.Unlimited, InFlight: tenant.Unlimited, StatementTimeout: tenant.Unlimited, Storage: tenant.Unlimited, Records: tenant.Unlimited}
	require.Equal(t, tenant.Budget{}, none.Or(defaults))
}

// A tenant at its limit is not refused and served by turns.
func TestFull(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		used, limit int64
		was, full   bool
	}{
		{used: 1 << 40, limit: 0, was: true, full: false},
		{used: 99, limit: 100, full: false},
		{used: 100, limit: 100, full: true},
		{used: 96, limit: 100, was: true, full: true},
		{used: 95, limit: 100, was: true, full: false},
		{used: 96, limit: 100, full: false},
		{used: 1, limit: 1, full: true},
		{used: 0, limit: 1, was: true, full: false},
	} {
		require.Equal(t, c.full, tenant.Full(c.used, c.limit, c.was), "%+v", c)
	}
}

func TestWhoIsFullIsRefused(t *testing.T) {
	t.Parallel()
	slug, err := tenant.ParseSlug("acme")
	require.NoError(t, err)
	tn := tenant.Tenant{Slug: slug, Budget: tenant.Budget{Storage: 100, Records: 10}, Use: tenant.Use{Storage: 99, Records: 9}}
	require.NoError(t, tn.MayStore())
	require.NoError(t, tn.MayAdd())
	tn.Use = tenant.Use{Storage: 100, Records: 10}
	for code, err := range map[string]error{"storage_full": tn.MayStore(), "records_full": tn.MayAdd()} {
		require.True(t, fault.Is(err, fault.Forbidden), "%v", err)
		require.Equal(t, code, fault.Of(err).Code)
		require.Equal(t, "acme", fault.Of(err).Tenant)
	}
	tn.Budget = tenant.Budget{}
	require.NoError(t, tn.MayStore(), "what is in use is no bound without a budget")
	require.NoError(t, tn.MayAdd())
}
