package app

import (
	"context"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/mask"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// personal says what the tables of the embedded migrations hold of people: a tenant's users, and the records by the types and keys of
// their pipelines' fields.
func personal(ctx context.Context, q postgres.Querier) (transfer.Personal, error) {
	p := transfer.Personal{
		Columns: []transfer.Column{
			{Table: "users", Name: "email", Kind: mask.Email}, {Table: "users", Name: "name", Kind: mask.Name},
			{Table: "users", Name: "password_hash", Kind: mask.Password},
		},
		Harmless: []string{"api_keys", "fields", "pipelines", "sessions"},
		Left:     []string{"users.metadata"},
	}
	var there bool // a tenant may be at a version that has none
	const ask = `select pg_catalog.to_regclass('pipelines') is not null and pg_catalog.to_regclass('fields') is not null`
	if err := q.QueryRow(ctx, ask).Scan(&there); err != nil || !there {
		return p, err
	}
	pipelines, err := crm.Pipelines(ctx, q)
	if err != nil {
		return p, err
	}
	d := transfer.Document{Table: "records", Name: "data", By: "pipeline_id", Members: map[string]map[string]mask.Kind{}, Named: map[string]string{}}
	for _, pl := range pipelines {
		members := map[string]mask.Kind{}
		for _, f := range pl.Fields {
			switch what := f.Personal(); {
			case what != crm.NotPersonal:
				members[f.Key] = mask.Kind(what)
			case f.Type == crm.Text && f.Options.Personal == "":
				p.Left = append(p.Left, pl.Key+"."+f.Key)
			}
		}
		d.Members[pl.ID.String()], d.Named[pl.ID.String()] = members, pl.Key
	}
	p.Documents = []transfer.Document{d}
	return p, nil
}
