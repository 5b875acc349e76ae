package physical

import "github.com/oneo-crm/oneo/pkg/postgres"

// Grants are the statements that a superuser runs in the database of each group, so that its owner may copy the cluster, set
// restore points, and have the WAL of a moment archived without waiting until a segment is full. They can be repeated.
func Grants(owner string) []string {
	return []string{
		"alter role " + postgres.Quote(owner) + " replication",
		postgres.GrantRestorePoints(owner),
		"grant execute on function pg_catalog.pg_switch_wal() to " + postgres.Quote(owner),
	}
}
