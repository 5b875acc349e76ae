package physical

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Flush brings everything that was committed until now into the archive, with a commit behind it: a recovery to a moment ends at
// the first commit after it, and cannot know without one that it has come far enough. It returns when the WAL is archived.
func Flush(ctx context.Context, conn *pgx.Conn) error {
	segment, err := endSegment(ctx, conn)
	if err != nil {
		return err
	}
	nudged := time.Now()
	for deadline := nudged.Add(archivePatience); ; {
		var failed *string
		var done bool
		// Names of segments of one timeline are in order; behind a promotion the later timeline is greater.
		const ask = `select last_archived_wal is not null and left(last_archived_wal, 24) collate "C" >= $1, case when last_failed_time > coalesce(last_archived_time, 'epoch') then last_failed_wal end from pg_catalog.pg_stat_archiver`
		if err := conn.QueryRow(ctx, ask, segment).Scan(&done, &failed); err != nil {
			return err
		}
		if done {
			return nil
		}
		if time.Now().After(deadline) {
			f := fault.New(fault.Unavailable, "the WAL %s was not archived within %s", segment, archivePatience).WithCode("not_archiving")
			if failed != nil {
				f = fault.New(fault.Unavailable, "archiving %s fails", *failed).WithCode("not_archiving")
			}
			return f.WithHint("PostgreSQL's log says why archive_command fails; also: select * from pg_stat_archiver")
		}
		if time.Since(nudged) > nudgeAfter {
			// An archiver that has just failed, or just been given its command, looks again after a minute, or when a segment ends.
			if _, err := endSegment(ctx, conn); err != nil {
				return err
			}
			nudged = time.Now()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// nudgeAfter is how long archiving a segment may take before the archiver is woken.
const nudgeAfter = 5 * time.Second

// endSegment commits something and ends the segment of WAL that it is in, whose name it returns.
func endSegment(ctx context.Context, conn *pgx.Conn) (name string, err error) {
	// A transaction with a number of its own commits with a record, also when it writes nothing.
	if _, err := conn.Exec(ctx, `select pg_catalog.pg_current_xact_id()`); err != nil {
		return "", err
	}
	if err := conn.QueryRow(ctx, `select pg_catalog.pg_walfile_name(pg_catalog.pg_switch_wal())`).Scan(&name); err != nil {
		return "", fault.Wrap(err, fault.Forbidden, "PostgreSQL does not let oneo end a segment of WAL").WithCode("grant").WithHint("oneo backup physical setup says which grant is missing")
	}
	return name, nil
}
