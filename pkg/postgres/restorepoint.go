package postgres

import (
	"context"
	"strconv"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// RestorePoint is a named place in a cluster's WAL, at which a recovery can end.
type RestorePoint struct {
	Name     string    `json:"name"`
	LSN      string    `json:"lsn"` // in PostgreSQL's form
	Timeline uint32    `json:"timeline"`
	At       time.Time `json:"at"` // by the server's clock
}

// GrantRestorePoints is what a superuser runs in a database to let a role set restore points in it.
func GrantRestorePoints(role string) string {
	return "grant execute on function pg_catalog.pg_create_restore_point(text) to " + Quote(role)
}

// SetRestorePoint names the present end of the WAL of the group's cluster. The point stays also when the transaction is rolled
// back, and says nothing of it: what it has not committed is not there. When it fails, so has the transaction. Faults: Forbidden
// when the owner may not; Conflict when the cluster cannot, because its WAL says too little or because it is a standby.
func (tx *OwnerTx) SetRestorePoint(ctx context.Context, name string) (p RestorePoint, err error) {
	p.Name = name
	// The clock is read behind the point, and the file's name begins with the timeline.
	const set = `select p.lsn::text, pg_catalog.substr(pg_catalog.pg_walfile_name(p.lsn), 1, 8), pg_catalog.clock_timestamp()
from (select pg_catalog.pg_create_restore_point($1) as lsn offset 0) p`
	var timeline string
	if err := tx.QueryRow(ctx, set, name).Scan(&p.LSN, &timeline, &p.At); err != nil {
		switch SQLState(err) {
		case "42501":
			return p, fault.Wrap(err, fault.Forbidden, "the owner may not set restore points").WithCode("restore_point_forbidden").
				WithHint("as a superuser, in the group's database: %s", GrantRestorePoints(tx.group.opts.OwnerRole))
		case "55000":
			return p, fault.Wrap(err, fault.Conflict, "the server sets no restore points").WithCode("restore_point_refused").
				WithHint("wal_level must be replica or logical, and the server no standby")
		}
		return p, err
	}
	n, err := strconv.ParseUint(timeline, 16, 32)
	p.Timeline = uint32(n)
	return p, err
}
