package demo_test

import (
	"bytes"
	"context"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/demo"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func deps(env *pgtest.Env) demo.Deps {
	return demo.Deps{
		Tenant: func(ctx context.Context, slug tenant.Slug, name string) (t tenant.Tenant, err error) {
			t, err = env.Provision.Create(ctx, provision.CreateRequest{Slug: slug, Name: name})
			if !fault.Is(err, fault.Conflict) {
				return t, err
			}
			return t, env.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
				t, err = registry.BySlug(ctx, tx, slug)
				return err
			})
		},
		In: func(ctx context.Context, t tenant.Tenant, fn func(postgres.Querier) error) error {
			return env.DB.InTenant(ctx, t, postgres.Write, func(tx *postgres.Tx) error { return fn(tx) })
		},
	}
}

func TestTheDealsAddUpToTheFile(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r, err := demo.Seed(t.Context(), deps(env))
	require.NoError(t, err)
	require.Equal(t, map[string]int{"Engaging": 1589, "Lost": 2473, "Prospecting": 500, "Won": 4238}, r.Stages)
	require.Equal(t, 1425, r.Rules[demo.RuleNoAccount])
	require.Equal(t, 1480, r.Rules[demo.RuleProduct])
	require.Equal(t, 12, r.Rules[demo.RuleSector])
	require.Empty(t, r.Refused)
	require.Len(t, r.Tenants, 3)
	var out bytes.Buffer
	require.NoError(t, r.Write(&out))
	require.Contains(t, out.String(), "GTXPro")

	again, err := demo.Seed(t.Context(), deps(env))
	require.NoError(t, err)
	require.True(t, again.Already)
	require.Equal(t, r.Stages, again.Stages, "a second seed must change nothing")
	env.Invariants(t)
}

func TestARowThatFitsNoRuleIsCounted(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	d := deps(env)
	d.Data = fstest.MapFS{
		"accounts.csv":    {Data: []byte("account,sector,year_established,revenue,employees,office_location,subsidiary_of\nAcme,retail,1990,1.5,3,Here,\n")},
		"products.csv":    {Data: []byte("product,series,sales_price\nGTX Pro,GTX,4821\n")},
		"sales_teams.csv": {Data: []byte("sales_agent,manager,regional_office\nAda,Bob,East\nEve,Bob,Nowhere\n")},
		"sales_pipeline.csv": {Data: []byte("opportunity_id,sales_agent,product,account,deal_stage,engage_date,close_date,close_value\n" +
			"1,Ada,GTXPro,Acme,Won,20-10-16,01-03-17,1054\n2,Ada,Unknown,Acme,Won,,,\n3,Eve,GTX Pro,,Won,,,\n4,Ada,GTX Pro,,Won,2016-10-20,,\n")},
	}
	r, err := demo.Seed(t.Context(), d)
	require.NoError(t, err)
	require.Equal(t, map[string]int{"Won": 1}, r.Stages)
	require.Equal(t, 4, r.Rules[demo.RuleRefused])
	require.Len(t, r.Refused, 4)
	require.Contains(t, r.Refused[1], "sales_pipeline.csv row 3")
}
