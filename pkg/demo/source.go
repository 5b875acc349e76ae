package demo

import (
	"encoding/csv"
	"encoding/json"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"time"

	"github.com/oneo-crm/oneo/pkg/crm"
)

// Keys of the pipelines.
const (
	accounts      = "accounts"
	products      = "products"
	agents        = "agents"
	opportunities = "opportunities"
)

// office is a regional office: a tenant.
type office struct{ slug, name string }

var offices = []office{{"central", "Central"}, {"east", "East"}, {"west", "West"}}

var stages = []string{"Prospecting", "Engaging", "Won", "Lost"}

var sectors = []string{
	"employment", "entertainment", "finance", "marketing", "medical", "retail", "services", "software", "technology",
	"telecommunications",
}

func pipelines() []crm.NewPipeline {
	var regions []string
	for _, o := range offices {
		regions = append(regions, o.name)
	}
	return []crm.NewPipeline{
		{Key: products, Name: "Products", Description: "What is sold", Fields: []crm.NewField{
			{Key: "name", Name: "Name", Type: crm.Text, Required: true, Options: crm.Options{Personal: crm.NotPersonal}},
			{Key: "series", Name: "Series", Type: crm.Text},
			{Key: "price", Name: "List price", Type: crm.Number},
		}},
		{Key: agents, Name: "Agents", Description: "Who sells", Fields: []crm.NewField{
			{Key: "name", Name: "Name", Type: crm.Text, Required: true},
			{Key: "manager", Name: "Manager", Type: crm.Text, Options: crm.Options{Personal: crm.PersonalName}},
			{Key: "regional_office", Name: "Regional office", Type: crm.Select, Options: crm.Options{Choices: regions}},
		}},
		{Key: accounts, Name: "Accounts", Description: "Who buys", Fields: []crm.NewField{
			{Key: "name", Name: "Name", Type: crm.Text, Required: true},
			{Key: "sector", Name: "Sector", Type: crm.Select, Options: crm.Options{Choices: sectors}},
			{Key: "established", Name: "Established", Type: crm.Number},
			{Key: "revenue", Name: "Revenue, millions", Type: crm.Number},
			{Key: "employees", Name: "Employees", Type: crm.Number},
			{Key: "location", Name: "Location", Type: crm.Text},
			{Key: "subsidiary_of", Name: "Subsidiary of", Type: crm.Relation, Options: crm.Options{Pipeline: accounts}},
		}},
		{Key: opportunities, Name: "Opportunities", Description: "Deals, open and closed", Fields: []crm.NewField{
			{Key: "code", Name: "Code", Type: crm.Text, Required: true},
			{Key: "stage", Name: "Stage", Type: crm.Select, Required: true, Options: crm.Options{Choices: stages}},
			{Key: "account", Name: "Account", Type: crm.Relation, Options: crm.Options{Pipeline: accounts}},
			{Key: "product", Name: "Product", Type: crm.Relation, Options: crm.Options{Pipeline: products}},
			{Key: "agent", Name: "Agent", Type: crm.Relation, Required: true, Options: crm.Options{Pipeline: agents}},
			{Key: "engaged_on", Name: "Engaged on", Type: crm.Date},
			{Key: "closed_on", Name: "Closed on", Type: crm.Date},
			{Key: "value", Name: "Value", Type: crm.Number},
			{Key: "engaged_in", Name: "Quarter engaged", Type: crm.Text},
			{Key: "closed_in", Name: "Quarter closed", Type: crm.Text},
		}},
	}
}

// respelt are the misspellings that are known for certain, by column. Nothing else is corrected.
var respelt = map[string]map[string]string{
	"product":         {"GTXPro": "GTX Pro"},
	"sector":          {"technolgy": "technology"},
	"office_location": {"Philipines": "Philippines"},
}

// link names a row of another pipeline.
type link struct{ pipeline, key string }

// row is a record to be.
type row struct {
	key    string // in its pipeline: a name, a deal's number
	office string // of agents and deals
	values map[string]any
	links  map[string]link // field -> what it points at
}

// source is the data as read, with the rules applied.
type source struct {
	accounts, products, agents, deals []row
	notes                             notes
	stages                            map[string]int // deals in the file
	leftOut                           map[string]int // of them, those that no tenant gets
}

// notes counts what each rule has done, in the order in which the rules were first needed.
type notes struct{ list []Note }

func (n *notes) add(format string, args ...any) { n.count(false, fmt.Sprintf(format, args...)) }

func (n *notes) leave(format string, args ...any) { n.count(true, fmt.Sprintf(format, args...)) }

func (n *notes) count(leftOut bool, rule string) {
	i := slices.IndexFunc(n.list, func(x Note) bool { return x.Rule == rule })
	if i < 0 {
		i = len(n.list)
		n.list = append(n.list, Note{Rule: rule, LeftOut: leftOut})
	}
	n.list[i].Count++
}

// table reads a file whose first line must be exactly the header. Rows of another width are left out.
func (s *source) table(data fs.FS, name string, header ...string) ([]map[string]string, error) {
	f, err := data.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := csv.NewReader(f)
	r.FieldsPerRecord = -1
	all, err := r.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if len(all) == 0 || !slices.Equal(all[0], header) {
		return nil, fmt.Errorf("%s: the columns must be %q", name, header)
	}
	rows := make([]map[string]string, 0, len(all)-1)
	for _, cells := range all[1:] {
		if len(cells) != len(header) {
			s.notes.leave("rows of %s with %d columns instead of %d", name, len(cells), len(header))
			continue
		}
		m := make(map[string]string, len(header))
		for i, c := range header {
			m[c] = cells[i]
			if to := respelt[c][cells[i]]; to != "" {
				s.notes.add("%s %s read as %s", c, cells[i], to)
				m[c] = to
			}
		}
		rows = append(rows, m)
	}
	return rows, nil
}

func read(data fs.FS) (*source, error) {
	s := &source{stages: map[string]int{}, leftOut: map[string]int{}}
	for _, f := range []func(fs.FS) error{s.readProducts, s.readAgents, s.readAccounts, s.readDeals} {
		if err := f(data); err != nil {
			return nil, err
		}
	}
	used := map[string]bool{}
	for _, o := range offices {
		for _, a := range s.pick(o).accounts {
			used[a.key] = true
		}
	}
	for _, a := range s.accounts {
		if !used[a.key] {
			s.notes.leave("accounts that no deal and no subsidiary names")
		}
	}
	return s, nil
}

// once reports whether a row's key is there and new, and counts it otherwise.
func (s *source) once(rows []row, kind, key string) bool {
	if key == "" {
		s.notes.leave("%s without a name", kind)
		return false
	}
	if has(rows, key) {
		s.notes.leave("%s that stand twice: the first one counts", kind)
		return false
	}
	return true
}

func has(rows []row, key string) bool {
	return slices.ContainsFunc(rows, func(r row) bool { return r.key == key })
}

func (s *source) readProducts(data fs.FS) error {
	rows, err := s.table(data, "products.csv", "product", "series", "sales_price")
	for _, c := range rows {
		if !s.once(s.products, products, c["product"]) {
			continue
		}
		r := row{key: c["product"], values: map[string]any{"name": c["product"]}}
		s.text(r, "series", c["series"])
		s.number(r, products, "price", c["sales_price"])
		s.products = append(s.products, r)
	}
	return err
}

func (s *source) readAgents(data fs.FS) error {
	rows, err := s.table(data, "sales_teams.csv", "sales_agent", "manager", "regional_office")
	for _, c := range rows {
		if !s.once(s.agents, agents, c["sales_agent"]) {
			continue
		}
		if !slices.ContainsFunc(offices, func(o office) bool { return o.name == c["regional_office"] }) {
			s.notes.leave("agents of no known office")
			continue
		}
		r := row{key: c["sales_agent"], office: c["regional_office"],
			values: map[string]any{"name": c["sales_agent"], "regional_office": c["regional_office"]}}
		s.text(r, "manager", c["manager"])
		s.agents = append(s.agents, r)
	}
	return err
}

func (s *source) readAccounts(data fs.FS) error {
	rows, err := s.table(data, "accounts.csv", "account", "sector", "year_established", "revenue", "employees", "office_location", "subsidiary_of")
	if err != nil {
		return err
	}
	parents := map[string]string{}
	for _, c := range rows {
		if !s.once(s.accounts, accounts, c["account"]) {
			continue
		}
		r := row{key: c["account"], values: map[string]any{"name": c["account"]}, links: map[string]link{}}
		if c["sector"] != "" && !slices.Contains(sectors, c["sector"]) {
			s.notes.add("accounts of an unknown sector: kept without it")
		} else {
			s.text(r, "sector", c["sector"])
		}
		s.number(r, accounts, "established", c["year_established"])
		s.number(r, accounts, "revenue", c["revenue"])
		s.number(r, accounts, "employees", c["employees"])
		s.text(r, "location", c["office_location"])
		if p := c["subsidiary_of"]; p != "" {
			parents[r.key] = p
		}
		s.accounts = append(s.accounts, r)
	}
	for _, r := range s.accounts {
		p := parents[r.key]
		switch {
		case p == "":
		case !has(s.accounts, p):
			s.notes.add("accounts of an unknown parent: kept without the relation")
			delete(parents, r.key)
		case circle(parents, r.key):
			s.notes.add("accounts that are their own ancestor: kept without the relation")
			delete(parents, r.key)
		default:
			r.links["subsidiary_of"] = link{accounts, p}
		}
	}
	return nil
}

// circle reports whether a walk from key to its parents comes back to it.
func circle(parents map[string]string, key string) bool {
	seen := map[string]bool{}
	for at := parents[key]; at != "" && !seen[at]; at = parents[at] {
		if at == key {
			return true
		}
		seen[at] = true
	}
	return false
}

func (s *source) readDeals(data fs.FS) error {
	rows, err := s.table(data, "sales_pipeline.csv", "opportunity_id", "sales_agent", "product", "account", "deal_stage",
		"engage_date", "close_date", "close_value", "engage_quarter", "close_quarter")
	if err != nil {
		return err
	}
	names := func(rows []row) map[string]string {
		m := make(map[string]string, len(rows))
		for _, r := range rows {
			m[r.key] = r.office
		}
		return m
	}
	agentOffice, known := names(s.agents), map[string]map[string]string{accounts: names(s.accounts), products: names(s.products)}
	seen := make(map[string]bool, len(rows))
	for _, c := range rows {
		id, stage := c["opportunity_id"], c["deal_stage"]
		s.stages[stage]++
		leave := func(why string) {
			s.notes.leave("%s", why)
			s.leftOut[stage]++
		}
		office := agentOffice[c["sales_agent"]]
		switch {
		case id == "":
			leave("deals without a number")
			continue
		case seen[id]:
			leave("deals that stand twice: the first one counts")
			continue
		case !slices.Contains(stages, stage):
			leave("deals in an unknown stage")
			continue
		case office == "":
			leave("deals of an unknown agent, and so of no office")
			continue
		}
		seen[id] = true
		r := row{key: id, office: office, values: map[string]any{"code": id, "stage": stage},
			links: map[string]link{"agent": {agents, c["sales_agent"]}}}
		s.relation(r, "account", accounts, c["account"], known)
		s.relation(r, "product", products, c["product"], known)
		s.date(r, "engaged_on", c["engage_date"])
		s.date(r, "closed_on", c["close_date"])
		s.number(r, "deals", "value", c["close_value"])
		s.text(r, "engaged_in", c["engage_quarter"])
		s.text(r, "closed_in", c["close_quarter"])
		s.deals = append(s.deals, r)
	}
	return nil
}

func (s *source) relation(r row, field, pipeline, name string, known map[string]map[string]string) {
	if name == "" {
		s.notes.add("deals without %s: kept without the relation", field)
	} else if _, ok := known[pipeline][name]; !ok {
		s.notes.add("deals of an unknown %s: kept without the relation", field)
	} else {
		r.links[field] = link{pipeline, name}
	}
}

func (s *source) text(r row, field, value string) {
	if value != "" {
		r.values[field] = value
	}
}

var numberForm = regexp.MustCompile(`^-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,6})?$`)

func (s *source) number(r row, kind, field, value string) {
	switch {
	case value == "":
		s.notes.add("%s without %s: kept without it", kind, field)
	case !numberForm.MatchString(value):
		s.notes.add("%s whose %s is no number: kept without it", kind, field)
	default:
		r.values[field] = json.Number(value)
	}
}

// date reads DD-MM-YY, as the file has it.
func (s *source) date(r row, field, value string) {
	if value == "" {
		s.notes.add("deals without %s: kept without it", field)
		return
	}
	day, err := time.Parse("02-01-06", value)
	if err != nil {
		s.notes.add("deals whose %s is no date: kept without it", field)
		return
	}
	s.notes.add("dates read as DD-MM-YY and written as YYYY-MM-DD")
	r.values[field] = day.Format(time.DateOnly)
}

// picked is what one office gets.
type picked struct{ accounts, products, agents, deals []row }

// pick gives an office its own deals and agents, all products, and the accounts that its deals name with the parents of
// these.
func (s *source) pick(o office) picked {
	p := picked{products: s.products}
	parent, named := map[string]string{}, map[string]bool{}
	for _, a := range s.accounts {
		parent[a.key] = a.links["subsidiary_of"].key
	}
	for _, a := range s.agents {
		if a.office == o.name {
			p.agents = append(p.agents, a)
		}
	}
	for _, d := range s.deals {
		if d.office != o.name {
			continue
		}
		p.deals = append(p.deals, d)
		for a := d.links["account"].key; a != "" && !named[a]; a = parent[a] {
			named[a] = true
		}
	}
	for _, a := range s.accounts {
		if named[a.key] {
			p.accounts = append(p.accounts, a)
		}
	}
	return p
}

func (p picked) stages() map[string]int {
	n := map[string]int{}
	for _, d := range p.deals {
		stage, _ := d.values["stage"].(string) // readDeals put one into each
		n[stage]++
	}
	return n
}

// report is what the database must hold once p is written.
func (p picked) report() TenantReport {
	return TenantReport{Accounts: len(p.accounts), Products: len(p.products), Agents: len(p.agents), Deals: p.stages()}
}
