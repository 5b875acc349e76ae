package demo_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
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
			t, err = env.Provision.Create(ctx, provision.CreateRequest{Slug: slug, Name: name, Actor: "test"})
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

// one reads a number by a statement in a tenant.
func one(t *testing.T, env *pgtest.Env, in tenant.Tenant, sql string) (n int) {
	t.Helper()
	err := env.DB.InTenant(t.Context(), in, postgres.Read, func(tx *postgres.Tx) error { return tx.QueryRow(t.Context(), sql).Scan(&n) })
	require.NoError(t, err, sql)
	return n
}

const deals = `records r join pipelines p on p.id = r.pipeline_id where p.key = 'opportunities'`

func TestTheDealsAddUpToTheFile(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	r, err := demo.Seed(t.Context(), deps(env))
	require.NoError(t, err)
	t.Logf("seeded in %v", r.Elapsed)
	require.Equal(t, map[string]int{"Engaging": 1589, "Lost": 2473, "Prospecting": 500, "Won": 4238}, r.Stages)
	require.False(t, r.Already)
	require.Zero(t, r.LeftOut(), "%+v", r.Notes)
	for rule, want := range map[string]int{
		"product GTXPro read as GTX Pro":                         1480,
		"sector technolgy read as technology":                    12,
		"office_location Philipines read as Philippines":         1,
		"deals without account: kept without the relation":       1425,
		"deals without engaged_on: kept without it":              500,
		"deals without closed_on: kept without it":               2089,
		"deals without value: kept without it":                   2089,
		"dates read as DD-MM-YY and written as YYYY-MM-DD":       8300 + 6711,
		"deals of an unknown product: kept without the relation": 0,
	} {
		require.Equal(t, want, r.Note(rule), rule)
	}
	require.Len(t, r.Notes, 8, "a rule that nobody expects: %+v", r.Notes)

	var out bytes.Buffer
	require.NoError(t, r.Write(&out))
	for _, want := range []string{"central", "east", "west", "8,800", "1,589", "2,473", "4,238", "1,425  deals without account", "0  rows are in no tenant"} {
		require.Contains(t, out.String(), want)
	}
	t.Log("\n" + out.String())

	// What the database holds, by the files' own figures for each office.
	offices := map[string][2]int{"central": {3512, 11}, "east": {2291, 12}, "west": {2997, 12}}
	require.Len(t, r.Tenants, len(offices))
	accountless := 0
	for _, o := range r.Tenants {
		want := offices[o.Tenant.Slug.String()]
		require.Equal(t, want[0], one(t, env, o.Tenant, "select count(*) from "+deals), o.Tenant.Slug)
		require.Equal(t, want[1], o.Agents, o.Tenant.Slug)
		require.Equal(t, 7, o.Products)
		require.Zero(t, one(t, env, o.Tenant, "select count(*) from "+deals+` and not (data ? 'product' and data ? 'agent')`), "deals without product or agent")
		require.Zero(t, one(t, env, o.Tenant, `select count(*) from records d join pipelines p on p.id = d.pipeline_id and p.key = 'opportunities'
			left join records a on a.id = (d.data ->> 'account')::uuid and a.pipeline_id = (select id from pipelines where key = 'accounts')
			where d.data ? 'account' and a.id is null`), "relations that point at nothing")
		require.Positive(t, one(t, env, o.Tenant, `select count(*) from records r where data ? 'subsidiary_of'`))
		accountless += one(t, env, o.Tenant, "select count(*) from "+deals+` and not data ? 'account'`)
	}
	require.Equal(t, 1425, accountless)
	require.Equal(t, 1, one(t, env, r.Tenants[0].Tenant, "select count(*) from "+deals+
		` and data @> '{"code": "1C1I7A6R", "stage": "Won", "engaged_on": "2016-10-20", "closed_on": "2017-03-01", "value": 1054, "closed_in": "Q1 2017"}'`),
		"the first deal of the file, as written")

	// Whatever the users have done since, a second Seed keeps it.
	const trash = `update records set deleted_at = now() where id = (select r.id from ` + deals + ` limit 1)`
	require.NoError(t, env.DB.InTenant(t.Context(), r.Tenants[1].Tenant, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), trash)
		return err
	}))
	again, err := demo.Seed(t.Context(), deps(env))
	require.NoError(t, err)
	require.True(t, again.Already)
	require.Equal(t, 8799, again.Stages["Engaging"]+again.Stages["Lost"]+again.Stages["Prospecting"]+again.Stages["Won"])
	out.Reset()
	require.NoError(t, again.Write(&out))
	require.Equal(t, "the demo data is there already\n", out.String())
	env.Invariants(t)
}

// A Seed that dies in the second tenant leaves the first one whole and the second one empty; the next finishes.
func TestAKilledSeedIsFinished(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	d := deps(env)
	in, died := d.In, errors.New("killed")
	var half tenant.Tenant
	d.In = func(ctx context.Context, at tenant.Tenant, fn func(postgres.Querier) error) error {
		return in(ctx, at, func(q postgres.Querier) error {
			err := fn(q)
			if at.Slug.String() == "east" {
				half = at
				return died
			}
			return err
		})
	}
	r, err := demo.Seed(t.Context(), d)
	require.ErrorIs(t, err, died)
	require.Len(t, r.Tenants, 1)
	require.Zero(t, one(t, env, half, `select count(*) from pipelines`), "a half-seeded tenant")
	require.Equal(t, 3512, one(t, env, r.Tenants[0].Tenant, "select count(*) from "+deals))

	r, err = demo.Seed(t.Context(), deps(env))
	require.NoError(t, err)
	require.False(t, r.Already)
	require.Equal(t, map[string]int{"Engaging": 1589, "Lost": 2473, "Prospecting": 500, "Won": 4238}, r.Stages)
}

// thief takes a deal away before the deals are counted.
type thief struct{ postgres.Querier }

func (q thief) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	if strings.Contains(sql, "count(*)") {
		if _, err := q.Exec(ctx, `delete from records where id = (select r.id from `+deals+` limit 1)`); err != nil {
			return nil, err
		}
	}
	return q.Querier.Query(ctx, sql, args...)
}

func TestADealThatIsMissingInTheDatabaseFails(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	d := deps(env)
	d.Data = files("1,Ada,GTX Pro,Acme,Won,20-10-16,01-03-17,1054,,\n2,Ada,GTX Pro,Acme,Lost,20-10-16,01-03-17,0,,\n")
	in := d.In
	var east tenant.Tenant
	d.In = func(ctx context.Context, at tenant.Tenant, fn func(postgres.Querier) error) error {
		if at.Slug.String() == "east" {
			east = at
		}
		return in(ctx, at, func(q postgres.Querier) error { return fn(thief{q}) })
	}
	_, err := demo.Seed(t.Context(), d)
	require.ErrorContains(t, err, "seed tenant east: the database holds")
	require.Zero(t, one(t, env, east, `select count(*) from records`), "what does not add up was kept")
}

func TestATenantWithPipelinesIsLeftAlone(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	mine := env.Tenant(t, "east")
	require.NoError(t, env.DB.InTenant(t.Context(), mine, postgres.Write, func(tx *postgres.Tx) error {
		_, err := crm.CreatePipeline(t.Context(), tx, crm.NewPipeline{Key: "accounts"})
		if err != nil {
			return err
		}
		_, err = crm.CreateRecord(t.Context(), tx, "accounts", []byte(`{}`), uuid.Nil)
		return err
	}))
	d := deps(env)
	d.Data = files("1,Ada,GTX Pro,Acme,Won,20-10-16,01-03-17,1054,,\n")
	_, err := demo.Seed(t.Context(), d)
	require.NoError(t, err)
	require.Equal(t, 1, one(t, env, mine, `select count(*) from pipelines`))
	require.Equal(t, 1, one(t, env, mine, `select count(*) from records`))
}

// files is a small data set with its share of flaws, and with the given deals.
func files(deals string) fstest.MapFS {
	return fstest.MapFS{
		"accounts.csv": {Data: []byte("account,sector,year_established,revenue,employees,office_location,subsidiary_of\n" +
			"Acme,retail,1990,1.5,3,Here,\nLeaf,retail,1990,,3,,Twig\nTwig,mining,1990,1.5,many,Here,Acme\nLost,retail,1990,1.5,3,Here,Nobody\n" +
			"A,retail,1990,1.5,3,Here,B\nB,retail,1990,1.5,3,Here,A\nAcme,retail,1990,1.5,3,Here,\nshort,row\n")},
		"products.csv":       {Data: []byte("product,series,sales_price\nGTX Pro,GTX,4821\nFree,,\n")},
		"sales_teams.csv":    {Data: []byte("sales_agent,manager,regional_office\nAda,Bob,East\nEve,Bob,Nowhere\n")},
		"sales_pipeline.csv": {Data: []byte("opportunity_id,sales_agent,product,account,deal_stage,engage_date,close_date,close_value,engage_quarter,close_quarter\n" + deals)},
	}
}

func TestRowsThatDoNotFitAreCounted(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	d := deps(env)
	d.Data = files(strings.Join([]string{
		`1,Ada,GTXPro,Leaf,Won,20-10-16,01-03-17,1054,Q4 2016,Q1 2017`,
		`2,Ada,Unknown,Acme,Won,31-02-16,2017-03-01,1e3,,`, // kept: no relation to the product, no dates, no value
		`3,Eve,GTX Pro,,Won,,,,,`,                          // of an agent without an office
		`4,Nobody,GTX Pro,,Lost,,,,,`,                      // of an agent that is not there
		`5,Ada,GTX Pro,Inity,Maybe,,,,,`,                   // in a stage that is not there
		`1,Ada,GTX Pro,A,Won,20-10-16,01-03-17,054,,`,      // twice
		`,Ada,GTX Pro,A,Won,20-10-16,01-03-17,1,,`,         // nameless
		`6,Ada,GTX Pro,Typo,Lost,20-10-16,01-03-17,01,,`,   // kept
		`7,too,short`,
		`8,Ada,Free,B,Engaging,,,12.50,,`,
	}, "\n") + "\n")
	r, err := demo.Seed(t.Context(), d)
	require.NoError(t, err)
	require.Equal(t, map[string]int{"Won": 2, "Lost": 1, "Engaging": 1}, r.Stages)
	for rule, want := range map[string]int{
		"rows of accounts.csv with 2 columns instead of 7":                1,
		"accounts that stand twice: the first one counts":                 1,
		"accounts of an unknown sector: kept without it":                  1,
		"accounts whose employees is no number: kept without it":          1,
		"accounts without revenue: kept without it":                       1,
		"accounts of an unknown parent: kept without the relation":        1,
		"accounts that are their own ancestor: kept without the relation": 1,
		"accounts that no deal and no subsidiary names":                   1,
		"agents of no known office":                                       1,
		"products without price: kept without it":                         1,
		"product GTXPro read as GTX Pro":                                  1,
		"deals of an unknown product: kept without the relation":          1,
		"deals of an unknown account: kept without the relation":          1,
		"deals whose engaged_on is no date: kept without it":              1,
		"deals whose closed_on is no date: kept without it":               1,
		"deals whose value is no number: kept without it":                 2,
		"deals of an unknown agent, and so of no office":                  2,
		"deals in an unknown stage":                                       1,
		"deals that stand twice: the first one counts":                    1,
		"deals without a number":                                          1,
		"rows of sales_pipeline.csv with 3 columns instead of 10":         1,
	} {
		require.Equal(t, want, r.Note(rule), "%s\nin %+v", rule, r.Notes)
	}
	require.Equal(t, 1+1+1+1+2+1+1+1+1, r.LeftOut(), "%+v", r.Notes)
	east := r.Tenants[1].Tenant
	require.Equal(t, 5, r.Tenants[1].Accounts, "Leaf, its parent, that one's parent, and a pair that was a circle")
	require.Equal(t, 1, one(t, env, east, `select count(*) from records leaf join records twig on leaf.data ->> 'subsidiary_of' = twig.id::text
		join records acme on twig.data ->> 'subsidiary_of' = acme.id::text where acme.data ->> 'name' = 'Acme'`))
	require.Equal(t, 1, one(t, env, east, `select count(*) from records where data ->> 'value' = '12.50'`), "a number keeps its digits")
	var out bytes.Buffer
	require.NoError(t, r.Write(&out))
	require.Contains(t, out.String(), "2  deals of an unknown agent, and so of no office: left out\n")
	require.Contains(t, out.String(), "10  rows are in no tenant\n")
}

func TestDataThatCannotBeReadChangesNothing(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t)
	missing := files("")
	delete(missing, "products.csv")
	columns := files("")
	columns["sales_teams.csv"].Data = []byte("agent,manager,office\nAda,Bob,East\n")
	quote := files("1,\"Ada,GTX Pro,,Won,,,,,\n")
	for name, c := range map[string]struct {
		data fstest.MapFS
		want string
	}{
		"a file is missing": {missing, "products.csv"},
		"other columns":     {columns, "sales_teams.csv"},
		"an open quote":     {quote, "sales_pipeline.csv"},
	} {
		d := deps(env)
		d.Data = c.data
		d.Tenant = func(context.Context, tenant.Slug, string) (tenant.Tenant, error) {
			t.Errorf("%s: a tenant was made", name)
			return tenant.Tenant{}, errors.New("no")
		}
		_, err := demo.Seed(t.Context(), d)
		require.ErrorContains(t, err, c.want, name)
	}
}
