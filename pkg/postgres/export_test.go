package postgres

import (
	"context"

	"github.com/jackc/pgx/v5"
)

// GiveSight is the step of Setup that gives an owner Sight.
func GiveSight(ctx context.Context, tx pgx.Tx, owner string, logf func(string, ...any)) error {
	s := setup{o: SetupOptions{OwnerRole: owner, Logf: logf}}
	return s.sight(ctx, tx)
}
