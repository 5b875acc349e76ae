package rollout

import (
	"cmp"
	"context"
	"slices"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// LargestFirst sorts the items by the size of their schemas, so that the longest work does not begin last. The sizes
// are what PostgreSQL last counted, read by one query for each group; where they are equal the order stays.
func (r *Runner) LargestFirst(ctx context.Context, items []Item) error {
	groups := map[string][]int32{}
	for _, it := range items {
		groups[it.Tenant.Group] = append(groups[it.Tenant.Group], it.Tenant.Number)
	}
	pages := map[int32]int64{}
	for group, numbers := range groups {
		const sizes = `select p.number, sum(c.relpages) from public.placements p join pg_catalog.pg_class c on c.relnamespace = p.namespace
where c.relkind in ('r', 'm') and p.number = any($1) group by p.number`
		err := r.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			rows, err := tx.Query(ctx, sizes, numbers)
			if err != nil {
				return err
			}
			var number int32
			var n int64
			_, err = pgx.ForEachRow(rows, []any{&number, &n}, func() error {
				pages[number] = n
				return nil
			})
			return err
		})
		if err != nil {
			return err
		}
	}
	slices.SortStableFunc(items, func(a, b Item) int { return cmp.Compare(pages[b.Tenant.Number], pages[a.Tenant.Number]) })
	return nil
}

// Failure is a tenant whose last task of a kind failed.
type Failure struct {
	Number   int32
	Slug     string
	Run      string
	From, To int // versions: where the tenant was, and where the failure left it
	Cause    Cause
}

// Holds reports whether the failure is the last word about a tenant at a version: a later run that went well may have
// expired.
func (f Failure) Holds(version int) bool { return version == f.From || version == f.To }

// Failures lists the tenants whose newest ended task of a kind failed.
func (r *Runner) Failures(ctx context.Context, kind string) (failures []Failure, err error) {
	const query = `select t.tenant, t.slug, t.run::text, coalesce(t.from_version, 0), coalesce(t.to_version, 0), t.error from (
	select distinct on (t.tenant) t.tenant, t.slug, t.run, t.state, t.from_version, t.to_version, t.error from public.tasks t join public.operations o on o.id = t.run
	where o.kind = $1 and t.state in ('ok', 'skipped', 'failed') order by t.tenant, t.run desc) t
where t.state = 'failed' order by t.slug`
	err = r.inMain(ctx, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, query, kind)
		if err != nil {
			return err
		}
		failures, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (f Failure, err error) {
			return f, row.Scan(&f.Number, &f.Slug, &f.Run, &f.From, &f.To, &f.Cause)
		})
		return err
	})
	return failures, err
}
