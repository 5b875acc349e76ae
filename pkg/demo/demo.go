// Package demo seeds an installation with the sales of a real hardware seller: one tenant for each of its regional
// offices, central, east and west.
//
// It promises that nothing of the data is dropped or guessed in silence: each row that does not fit is handled by a
// stated rule and counted in the Report, and the deals by stage that PostgreSQL holds in the end are those of the file,
// or Seed fails. A tenant is seeded in one transaction, so a Seed that was killed is finished by the next one; a tenant
// that has pipelines is left as it is.
package demo

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
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

// Deps is what Seed needs of an installation.
type Deps struct {
	Data fs.FS // holds accounts.csv and so on; nil: Files
	// Tenant finds or makes a tenant.
	Tenant func(ctx context.Context, slug tenant.Slug, name string) (tenant.Tenant, error)
	// In runs fn in one writing transaction bound to the tenant, and commits only if fn returned nil.
	In func(ctx context.Context, t tenant.Tenant, fn func(q postgres.Querier) error) error
}

// published are the deals by stage that the README of Files holds an import to.
func published() map[string]int {
	return map[string]int{"Prospecting": 500, "Engaging": 1589, "Won": 4238, "Lost": 2473}
}

// Seed makes the tenants and fills those that have no pipelines yet. An error of the data as a whole, such as a missing
// column, leaves everything as it was.
func Seed(ctx context.Context, d Deps) (Report, error) {
	began := time.Now()
	data, want := d.Data, map[string]int(nil)
	if data == nil {
		sub, err := fs.Sub(Files, "data")
		if err != nil {
			return Report{}, err
		}
		data, want = sub, published()
	}
	s, err := read(data)
	if err != nil {
		return Report{}, fmt.Errorf("read the demo data: %w", err)
	}
	if err := s.adds(want); err != nil {
		return Report{}, err
	}
	r := Report{Notes: s.notes.list, Stages: map[string]int{}, Already: true}
	for _, o := range offices {
		made, filled, err := s.office(ctx, d, o)
		if err != nil {
			return r, fmt.Errorf("seed tenant %s: %w", o.slug, err)
		}
		r.Already = r.Already && !filled
		r.Tenants = append(r.Tenants, made)
		for stage, n := range made.Deals {
			r.Stages[stage] += n
		}
	}
	r.Elapsed = time.Since(began)
	return r, nil
}

// adds holds that what the offices will get, and what is counted as left out, are the deals of the file; and that these
// are the ones that are wanted, unless want is nil. What an office gets is held against the database when it is written.
func (s *source) adds(want map[string]int) error {
	got := maps.Clone(s.leftOut)
	for _, o := range offices {
		for stage, n := range s.pick(o).stages() {
			got[stage] += n
		}
	}
	if !maps.Equal(got, s.stages) {
		return fmt.Errorf("the demo's deals by stage are %v, and %v in the file", got, s.stages)
	}
	if want != nil && (!maps.Equal(got, want) || len(s.leftOut) > 0) {
		return fmt.Errorf("the demo's deals by stage are %v, of which %v are left out; all of %v were to be seeded", got, s.leftOut, want)
	}
	return nil
}

// office finds or makes the tenant of an office, and reports whether it was filled now.
func (s *source) office(ctx context.Context, d Deps, o office) (made TenantReport, filled bool, err error) {
	slug, err := tenant.ParseSlug(o.slug)
	if err != nil {
		return made, false, err
	}
	t, err := d.Tenant(ctx, slug, o.name+" office")
	if err != nil {
		return made, false, err
	}
	err = d.In(ctx, t, func(q postgres.Querier) error {
		there, err := crm.Pipelines(ctx, q)
		if err != nil {
			return err
		}
		p := s.pick(o)
		if filled = len(there) == 0; filled {
			if err := p.write(ctx, q); err != nil {
				return err
			}
		}
		if made, err = count(ctx, q); err != nil || !filled {
			return err
		}
		if want := p.report(); made.Accounts != want.Accounts || made.Products != want.Products || made.Agents != want.Agents ||
			!maps.Equal(made.Deals, want.Deals) {
			return fmt.Errorf("the database holds %+v after writing %+v", made, want)
		}
		return nil
	})
	made.Tenant = t
	return made, filled, err
}

// write makes the pipelines and the records.
func (p picked) write(ctx context.Context, q postgres.Querier) error {
	for _, n := range pipelines() {
		if _, err := crm.CreatePipeline(ctx, q, n); err != nil {
			return err
		}
	}
	ids := map[string]map[string]string{} // pipeline -> a row's key -> the id of its record
	write := func(pipeline string, rows []row) error {
		data := make([]json.RawMessage, len(rows))
		for i, r := range rows {
			values := maps.Clone(r.values)
			for field, l := range r.links {
				values[field] = ids[l.pipeline][l.key]
			}
			var err error
			if data[i], err = json.Marshal(values); err != nil {
				return err
			}
		}
		made, err := crm.CreateRecords(ctx, q, pipeline, data, uuid.Nil)
		if err != nil {
			return fmt.Errorf("write %s: %w", pipeline, err)
		}
		if ids[pipeline] == nil {
			ids[pipeline] = make(map[string]string, len(rows))
		}
		for i, r := range rows {
			ids[pipeline][r.key] = made[i].ID.String()
		}
		return nil
	}
	if err := write(products, p.products); err != nil {
		return err
	}
	if err := write(agents, p.agents); err != nil {
		return err
	}
	for rest := p.accounts; len(rest) > 0; { // a relation points at what is there: parents come first
		var ready, waiting []row
		for _, a := range rest {
			if parent := a.links["subsidiary_of"].key; parent == "" || ids[accounts][parent] != "" {
				ready = append(ready, a)
			} else {
				waiting = append(waiting, a)
			}
		}
		if len(ready) == 0 {
			return fmt.Errorf("write accounts: %d are each other's ancestors", len(waiting)) // read has seen to it that none is
		}
		if err := write(accounts, ready); err != nil {
			return err
		}
		rest = waiting
	}
	return write(opportunities, p.deals)
}

// count reads what a tenant holds in the demo's pipelines.
func count(ctx context.Context, q postgres.Querier) (TenantReport, error) {
	const counts = `select p.key, coalesce(r.data ->> 'stage', ''), count(*) from records r join pipelines p on p.id = r.pipeline_id
where p.key in ('accounts', 'products', 'agents', 'opportunities') and r.deleted_at is null group by 1, 2`
	t := TenantReport{Deals: map[string]int{}}
	rows, err := q.Query(ctx, counts)
	if err != nil {
		return t, err
	}
	defer rows.Close()
	for rows.Next() {
		var pipeline, stage string
		var n int
		if err := rows.Scan(&pipeline, &stage, &n); err != nil {
			return t, err
		}
		switch pipeline {
		case accounts:
			t.Accounts += n
		case products:
			t.Products += n
		case agents:
			t.Agents += n
		default:
			t.Deals[stage] += n
		}
	}
	return t, rows.Err()
}
