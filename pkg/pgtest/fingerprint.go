package pgtest

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/structure"
)

// Fingerprint describes the structure, the grants and the default privileges of a schema, one line an object. Two
// tenants at the same version have the same lines; role is the tenant's own.
func Fingerprint(t testing.TB, c *pgx.Conn, schema, role string) []string {
	t.Helper()
	ctx := context.Background()
	var s structure.Structure
	err := pgx.BeginFunc(ctx, c, func(tx pgx.Tx) (err error) {
		s, err = structure.Read(ctx, tx, structure.Schema{Name: schema, Role: role})
		return err
	})
	if err != nil {
		t.Fatalf("pgtest: fingerprint %s: %v", schema, err)
	}
	return s.Lines()
}
