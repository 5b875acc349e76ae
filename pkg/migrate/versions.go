package migrate

import (
	"context"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Versions reads at which version tenants of a group are, in one query. A tenant without a placement is left out.
func (m *Migrator) Versions(ctx context.Context, group string, numbers []int32) (map[int32]int, error) {
	versions := make(map[int32]int, len(numbers))
	err := m.db.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select number, version from public.placements where number = any($1)`, numbers)
		if err != nil {
			return err
		}
		var number int32
		var version int
		_, err = pgx.ForEachRow(rows, []any{&number, &version}, func() error {
			versions[number] = version
			return nil
		})
		return err
	})
	return versions, err
}
