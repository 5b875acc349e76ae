package structure

import (
	"context"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Both describes schemas in each of the two ways.
func Both(ctx context.Context, q postgres.Querier, schemas []Schema) (both [2][][]string, err error) {
	keys := make([]int32, len(schemas))
	for i := range keys {
		keys[i] = int32(i)
	}
	for i, lines := range Lines {
		found, err := readBy(ctx, q, lines, keys, schemas)
		if err != nil {
			return both, err
		}
		for _, key := range keys {
			both[i] = append(both[i], found[key].Lines())
		}
	}
	return both, nil
}

// Hashes is the query over many schemas.
var Hashes = hash

// Lines are the queries that describe schemas: a few, and many.
var Lines = [2]string{linesOfFew, linesOfMany}
