// Package demo seeds an installation with a real CRM's data: the tenants central, east and west, each with the accounts,
// products, agents and deals of its regional office.
//
// No row is dropped in silence: each rule that changes a row is stated here and counted in the report, a row that fits
// no rule is counted as refused, and the deals by stage, read back from the database, must add up to those of the file.
package demo

import (
	"context"
	"embed"
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Files is the data set "CRM sales opportunities" (Maven Analytics, public domain); data/README.md tells its flaws.
//
//go:embed data
var Files embed.FS

// Offices are the tenants that the seed makes, by the name of the regional office.
var Offices = []string{"Central", "East", "West"}

// Deps is what the seed needs of an installation.
type Deps struct {
	Data fs.FS // holds accounts.csv and so on; nil: Files
	// Tenant finds or makes a tenant.
	Tenant func(ctx context.Context, slug tenant.Slug, name string) (tenant.Tenant, error)
	// In runs fn in one transaction bound to the tenant.
	In func(ctx context.Context, t tenant.Tenant, fn func(q postgres.Querier) error) error
}

// The rules by which rows that do not fit as they are become records.
const (
	RuleProduct   = `product "GTXPro" is written "GTX Pro"`
	RuleSector    = `sector "technolgy" is written "technology"`
	RuleNoAccount = "deal without an account is kept without one"
	RuleOpen      = "deal without a close date is open: no close date, no value"
	RuleNoEngage  = "deal without an engage date is kept without one"
	RuleRefused   = "row refused: it fits no rule"
)

// Report says what the seed did.
type Report struct {
	Tenants []TenantReport
	Rules   map[string]int // how many rows each rule changed
	Refused []string       // which rows were refused, and why
	Stages  map[string]int // deals by stage, read back from the database
	Already bool           // every tenant had been seeded before
}

// TenantReport is one tenant's part.
type TenantReport struct {
	Tenant                               tenant.Tenant
	Accounts, Products, Agents, Dealings int
}

// Write tells the report in a few lines.
func (r Report) Write(out io.Writer) error {
	if r.Already {
		_, err := fmt.Fprintln(out, "the demo data is there already")
		return err
	}
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "TENANT\tACCOUNTS\tPRODUCTS\tAGENTS\tDEALS")
	for _, t := range r.Tenants {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\t%d\n", t.Tenant.Slug, t.Accounts, t.Products, t.Agents, t.Dealings)
	}
	fmt.Fprintln(w)
	for _, rule := range slices.Sorted(maps.Keys(r.Rules)) {
		fmt.Fprintf(w, "%d rows:\t%s\n", r.Rules[rule], rule)
	}
	for _, line := range r.Refused {
		fmt.Fprintf(w, "refused:\t%s\n", line)
	}
	return w.Flush()
}

// Seed makes the tenants and fills those that have no pipelines yet, each in one transaction: a seed that was killed is
// finished by running it again, and one that is done changes nothing.
func Seed(ctx context.Context, d Deps) (Report, error) {
	r := Report{Rules: map[string]int{}, Stages: map[string]int{}, Already: true}
	data := d.Data
	if data == nil {
		sub, err := fs.Sub(Files, "data")
		if err != nil {
			return r, err
		}
		data = sub
	}
	src, err := read(data, &r)
	if err != nil {
		return r, err
	}
	for _, office := range Offices {
		slug, err := tenant.ParseSlug(strings.ToLower(office))
		if err != nil {
			return r, err
		}
		t, err := d.Tenant(ctx, slug, office+" office")
		if err != nil {
			return r, fmt.Errorf("make tenant %s: %w", slug, err)
		}
		var tr TenantReport
		err = d.In(ctx, t, func(q postgres.Querier) error {
			there, err := crm.Pipelines(ctx, q)
			if err != nil {
				return err
			}
			if len(there) == 0 {
				r.Already = false
				if err := src.fill(ctx, q, office); err != nil {
					return err
				}
			}
			tr, err = count(ctx, q, r.Stages)
			return err
		})
		if err != nil {
			return r, fmt.Errorf("seed tenant %s: %w", slug, err)
		}
		tr.Tenant = t
		r.Tenants = append(r.Tenants, tr)
	}
	if !r.Already && !maps.Equal(r.Stages, src.stages) {
		return r, fmt.Errorf("the deals by stage do not add up: in the database %v, in the file %v", r.Stages, src.stages)
	}
	return r, nil
}

// source is the data set after the rules.
type source struct {
	accounts, products, agents []map[string]any
	deals                      []map[string]any // relations by name
	stages                     map[string]int   // of the deals that were kept
}

func rows(data fs.FS, name string, columns ...string) ([]map[string]string, error) {
	f, err := data.Open(name)
	if err != nil {
		return nil, fmt.Errorf("open the demo data: %w", err)
	}
	defer f.Close()
	all, err := csv.NewReader(f).ReadAll()
	if err != nil || len(all) == 0 {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	for _, c := range columns {
		if !slices.Contains(all[0], c) {
			return nil, fmt.Errorf("%s has no column %s", name, c)
		}
	}
	out := make([]map[string]string, 0, len(all)-1)
	for _, cells := range all[1:] {
		m := map[string]string{}
		for i, h := range all[0] {
			m[h] = strings.TrimSpace(cells[i])
		}
		out = append(out, m)
	}
	return out, nil
}

func read(data fs.FS, r *Report) (source, error) {
	s := source{stages: map[string]int{}}
	refuse := func(file string, row int, format string, args ...any) {
		r.Rules[RuleRefused]++
		r.Refused = append(r.Refused, fmt.Sprintf("%s row %d: %s", file, row+2, fmt.Sprintf(format, args...)))
	}
	accounts, err := rows(data, "accounts.csv", "account", "sector", "revenue", "employees", "office_location", "subsidiary_of", "year_established")
	if err != nil {
		return s, err
	}
	known := map[string]bool{}
	for _, a := range accounts {
		if a["sector"] == "technolgy" {
			a["sector"] = "technology"
			r.Rules[RuleSector]++
		}
		known["account "+a["account"]] = true
		s.accounts = append(s.accounts, values(a, map[string]string{"account": "name", "sector": "sector", "office_location": "location", "subsidiary_of": "subsidiary_of"},
			map[string]string{"year_established": "established", "revenue": "revenue", "employees": "employees"}))
	}
	products, err := rows(data, "products.csv", "product", "series", "sales_price")
	if err != nil {
		return s, err
	}
	for _, p := range products {
		known["product "+p["product"]] = true
		s.products = append(s.products, values(p, map[string]string{"product": "name", "series": "series"}, map[string]string{"sales_price": "price"}))
	}
	teams, err := rows(data, "sales_teams.csv", "sales_agent", "manager", "regional_office")
	if err != nil {
		return s, err
	}
	office := map[string]string{}
	for i, a := range teams {
		if !slices.Contains(Offices, a["regional_office"]) {
			refuse("sales_teams.csv", i, "there is no office %q", a["regional_office"])
			continue
		}
		office[a["sales_agent"]] = a["regional_office"]
		s.agents = append(s.agents, values(a, map[string]string{"sales_agent": "name", "manager": "manager", "regional_office": "regional_office"}, nil))
	}
	deals, err := rows(data, "sales_pipeline.csv", "opportunity_id", "sales_agent", "product", "account", "deal_stage", "engage_date", "close_date", "close_value")
	if err != nil {
		return s, err
	}
	for i, d := range deals {
		if why := s.deal(d, r, known, office); why != "" {
			refuse("sales_pipeline.csv", i, "%s", why)
		}
	}
	return s, nil
}

// deal adds one deal, or says why it fits no rule.
func (s *source) deal(d map[string]string, r *Report, known map[string]bool, office map[string]string) string {
	if d["product"] == "GTXPro" {
		d["product"] = "GTX Pro"
		r.Rules[RuleProduct]++
	}
	switch {
	case office[d["sales_agent"]] == "":
		return fmt.Sprintf("there is no agent %q", d["sales_agent"])
	case !known["product "+d["product"]]:
		return fmt.Sprintf("there is no product %q", d["product"])
	case d["account"] != "" && !known["account "+d["account"]]:
		return fmt.Sprintf("there is no account %q", d["account"])
	case !slices.Contains(stages, d["deal_stage"]):
		return fmt.Sprintf("there is no stage %q", d["deal_stage"])
	}
	v := map[string]any{"code": d["opportunity_id"], "stage": d["deal_stage"], "agent": d["sales_agent"], "product": d["product"], "office": office[d["sales_agent"]]}
	for column, key := range map[string]string{"engage_date": "engaged_on", "close_date": "closed_on"} {
		if d[column] == "" {
			continue
		}
		day, err := time.Parse("02-01-06", d[column])
		if err != nil {
			return fmt.Sprintf("%s %q is no date of the form DD-MM-YY", column, d[column])
		}
		v[key] = day.Format(time.DateOnly)
	}
	if d["close_value"] != "" {
		v["value"] = json.Number(d["close_value"])
	}
	if d["account"] != "" {
		v["account"] = d["account"]
	} else {
		r.Rules[RuleNoAccount]++
	}
	if d["close_date"] == "" {
		r.Rules[RuleOpen]++
	}
	if d["engage_date"] == "" {
		r.Rules[RuleNoEngage]++
	}
	s.deals = append(s.deals, v)
	s.stages[d["deal_stage"]]++
	return ""
}

// values takes texts and numbers out of a row; an empty cell is no value.
func values(row map[string]string, texts, numbers map[string]string) map[string]any {
	v := map[string]any{}
	for from, to := range texts {
		if row[from] != "" {
			v[to] = row[from]
		}
	}
	for from, to := range numbers {
		if row[from] != "" {
			v[to] = json.Number(row[from])
		}
	}
	return v
}

var stages = []string{"Prospecting", "Engaging", "Won", "Lost"}

func field(key string, t crm.Type, o crm.Options) crm.NewField {
	return crm.NewField{Key: key, Type: t, Options: o}
}

func relation(key, pipeline string) crm.NewField {
	return field(key, crm.Relation, crm.Options{Pipeline: pipeline})
}

var pipelines = []crm.NewPipeline{
	{Key: "accounts", Name: "Accounts", Fields: []crm.NewField{
		{Key: "name", Type: crm.Text, Required: true}, field("sector", crm.Text, crm.Options{}), field("location", crm.Text, crm.Options{}),
		field("established", crm.Number, crm.Options{}), field("revenue", crm.Number, crm.Options{}), field("employees", crm.Number, crm.Options{}),
		relation("subsidiary_of", "accounts"),
	}},
	{Key: "products", Name: "Products", Fields: []crm.NewField{
		{Key: "name", Type: crm.Text, Required: true}, field("series", crm.Text, crm.Options{}), field("price", crm.Number, crm.Options{}),
	}},
	{Key: "agents", Name: "Agents", Fields: []crm.NewField{
		{Key: "name", Type: crm.Text, Required: true}, field("manager", crm.Text, crm.Options{}), field("regional_office", crm.Text, crm.Options{}),
	}},
	{Key: "opportunities", Name: "Opportunities", Fields: []crm.NewField{
		{Key: "code", Type: crm.Text, Required: true}, {Key: "stage", Type: crm.Select, Required: true, Options: crm.Options{Choices: stages}},
		relation("account", "accounts"), relation("product", "products"), relation("agent", "agents"),
		field("engaged_on", crm.Date, crm.Options{}), field("closed_on", crm.Date, crm.Options{}), field("value", crm.Number, crm.Options{}),
	}},
}

// fill writes one office's part: all products, its agents, its deals, and the accounts that these name with their
// parents.
func (s source) fill(ctx context.Context, q postgres.Querier, office string) error {
	for _, p := range pipelines {
		p.Fields = slices.Clone(p.Fields)
		if _, err := crm.CreatePipeline(ctx, q, p); err != nil {
			return err
		}
	}
	var deals []map[string]any
	named := map[any]bool{}
	for _, d := range s.deals {
		if d["office"] == office {
			deals = append(deals, d)
			named[d["account"]] = true
		}
	}
	parents := map[any]bool{}
	for _, a := range s.accounts {
		if named[a["name"]] && a["subsidiary_of"] != nil {
			parents[a["subsidiary_of"]] = true
		}
	}
	ids := map[string]map[any]uuid.UUID{}
	write := func(pipeline, name string, rows []map[string]any, links map[string]string) error {
		bodies := make([]json.RawMessage, len(rows))
		for i, row := range rows {
			v := maps.Clone(row)
			delete(v, "office")
			for key, target := range links {
				if v[key] != nil {
					v[key] = ids[target][v[key]].String()
				}
			}
			var err error
			if bodies[i], err = json.Marshal(v); err != nil {
				return err
			}
		}
		if ids[pipeline] == nil {
			ids[pipeline] = map[any]uuid.UUID{}
		}
		const batch = 1000
		for start := 0; start < len(bodies); start += batch {
			end := min(start+batch, len(bodies))
			made, err := crm.CreateRecords(ctx, q, pipeline, bodies[start:end], uuid.Nil)
			if err != nil {
				return fmt.Errorf("%s: %w", pipeline, err)
			}
			for i, m := range made {
				ids[pipeline][rows[start+i][name]] = m.ID
			}
		}
		return nil
	}
	// Parents first: a relation points at what is there.
	var first, second, agents []map[string]any
	for _, a := range s.accounts {
		switch {
		case parents[a["name"]]:
			first = append(first, a)
		case named[a["name"]]:
			second = append(second, a)
		}
	}
	for _, a := range s.agents {
		if a["regional_office"] == office {
			agents = append(agents, a)
		}
	}
	parent := map[string]string{"subsidiary_of": "accounts"}
	for _, step := range []func() error{
		func() error { return write("accounts", "name", first, parent) },
		func() error { return write("accounts", "name", second, parent) },
		func() error { return write("products", "name", s.products, nil) },
		func() error { return write("agents", "name", agents, nil) },
		func() error {
			return write("opportunities", "code", deals, map[string]string{"account": "accounts", "product": "products", "agent": "agents"})
		},
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// count reads back what one tenant holds.
func count(ctx context.Context, q postgres.Querier, stages map[string]int) (TenantReport, error) {
	const counts = `select p.key, coalesce(r.data ->> 'stage', ''), count(*) from records r join pipelines p on p.id = r.pipeline_id
where r.deleted_at is null group by 1, 2`
	var tr TenantReport
	rows, err := q.Query(ctx, counts)
	if err != nil {
		return tr, err
	}
	defer rows.Close()
	for rows.Next() {
		var key, stage string
		var n int
		if err := rows.Scan(&key, &stage, &n); err != nil {
			return tr, err
		}
		switch key {
		case "accounts":
			tr.Accounts += n
		case "products":
			tr.Products += n
		case "agents":
			tr.Agents += n
		case "opportunities":
			tr.Dealings += n
			stages[stage] += n
		}
	}
	return tr, rows.Err()
}
