package registry

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Instance is one running server.
type Instance struct {
	ID      uuid.UUID
	Host    string
	PID     int
	Version string
	OpsAddr string
}

// BeatInstance enters an instance or says that it is alive, and removes those that have not for as long as dead.
func BeatInstance(ctx context.Context, q postgres.Querier, i Instance, dead time.Duration) error {
	const beat = `insert into public.instances (id, host, pid, version, ops_addr) values ($1, $2, $3, $4, $5)
on conflict (id) do update set heartbeat = now()`
	if _, err := q.Exec(ctx, beat, i.ID, i.Host, i.PID, i.Version, i.OpsAddr); err != nil {
		return err
	}
	_, err := q.Exec(ctx, `delete from public.instances where heartbeat < now() - $1::interval`, dead)
	return err
}

// RemoveInstance takes an instance off the list.
func RemoveInstance(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
	_, err := q.Exec(ctx, `delete from public.instances where id = $1`, id)
	return err
}

// Instances lists the servers that have given a sign of life within the time dead, those that began first at the beginning.
func Instances(ctx context.Context, q postgres.Querier, dead time.Duration) ([]Instance, error) {
	const list = `select id, host, pid, version, ops_addr from public.instances where heartbeat > now() - $1::interval order by started_at, id`
	rows, err := q.Query(ctx, list, dead)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Instance])
}
