package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// The states of an operation. Done, Failed and Aborted are final.
const (
	Queued  = "queued"
	Running = "running"
	Paused  = "paused" // a run only
	Done    = "done"
	Failed  = "failed"
	Aborted = "aborted" // a run only
)

// Operation is one piece of work on a tenant that takes several steps or is done by another process than the one that
// asked for it.
type Operation struct {
	ID         uuid.UUID       `json:"id"`
	Kind       string          `json:"kind"`
	Number     *int32          `json:"-"`
	Slug       string          `json:"tenant"`
	State      string          `json:"state"`
	Begun      bool            `json:"-"` // its first step is committed
	Actor      string          `json:"actor"`
	Request    json.RawMessage `json:"-"` // holds a first user's password hash until the operation ends
	Result     json.RawMessage `json:"result,omitempty"`
	Error      json.RawMessage `json:"error,omitempty"`
	Attempts   int             `json:"attempts"`
	CreatedAt  time.Time       `json:"created_at"`
	StartedAt  *time.Time      `json:"started_at,omitempty"`
	FinishedAt *time.Time      `json:"finished_at,omitempty"`
}

const operationColumns = `id, kind, tenant, slug, state, step = 'begun', actor, request, result, error, attempts, created_at, started_at, finished_at`

// scanOperation reads operationColumns.
func scanOperation(row pgx.Row) (Operation, error) {
	var o Operation
	err := row.Scan(&o.ID, &o.Kind, &o.Number, &o.Slug, &o.State, &o.Begun, &o.Actor, &o.Request, &o.Result, &o.Error,
		&o.Attempts, &o.CreatedAt, &o.StartedAt, &o.FinishedAt)
	return o, err
}

// Enqueue asks a worker for an operation.
func Enqueue(ctx context.Context, q postgres.Querier, kind, slug, actor string, request any) (Operation, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return Operation{}, fmt.Errorf("write request: %w", err)
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Operation{}, err
	}
	const insert = `insert into public.operations (id, kind, slug, state, request, actor)
values ($1, $2, $3, 'queued', $4, $5) returning ` + operationColumns
	return scanOperation(q.QueryRow(ctx, insert, id, kind, slug, body, actor))
}

// Begin enters an operation that its caller carries out itself, in the transaction of its first step.
func Begin(ctx context.Context, q postgres.Querier, kind string, t tenant.Tenant, actor string, request any) (Operation, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return Operation{}, err
	}
	return BeginAs(ctx, q, id, kind, t, actor, request)
}

// BeginAs is Begin under an id that something knows the operation by already.
func BeginAs(ctx context.Context, q postgres.Querier, id uuid.UUID, kind string, t tenant.Tenant, actor string, request any) (Operation, error) {
	body, err := json.Marshal(request)
	if err != nil {
		return Operation{}, fmt.Errorf("write request: %w", err)
	}
	const insert = `insert into public.operations (id, kind, tenant, slug, state, step, request, actor, attempts, started_at, heartbeat)
values ($1, $2, $3, $4, 'running', 'begun', $5, $6, 1, now(), now()) returning ` + operationColumns
	return scanOperation(q.QueryRow(ctx, insert, id, kind, t.Number, t.Slug.String(), body, actor))
}

// Start marks a queued or interrupted operation as running on a tenant; 0: on one that has no number yet.
func Start(ctx context.Context, q postgres.Querier, id uuid.UUID, number int32) error {
	const start = `update public.operations set state = 'running', tenant = nullif($2, 0), attempts = attempts + 1,
	started_at = coalesce(started_at, now()), heartbeat = now() where id = $1 and state in ('queued', 'running')`
	return oneRow(q.Exec(ctx, start, id, number))
}

// Assign notes which tenant a running operation makes.
func Assign(ctx context.Context, q postgres.Querier, id uuid.UUID, number int32) error {
	return oneRow(q.Exec(ctx, `update public.operations set tenant = $2 where id = $1 and state = 'running'`, id, number))
}

// MarkBegun notes, in the transaction of an operation's first step, that the step is made.
func MarkBegun(ctx context.Context, q postgres.Querier, id uuid.UUID, request any) error {
	body, err := json.Marshal(request)
	if err != nil {
		return fmt.Errorf("write request: %w", err)
	}
	return oneRow(q.Exec(ctx, `update public.operations set step = 'begun', request = $2 where id = $1 and state = 'running'`, id, body))
}

// Beat says that the operation's process is alive.
func Beat(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
	_, err := q.Exec(ctx, `update public.operations set heartbeat = now() where id = $1 and state = 'running'`, id)
	return err
}

// Finish ends an operation well.
func Finish(ctx context.Context, q postgres.Querier, id uuid.UUID, result any) error {
	body, err := json.Marshal(result)
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	// What was asked is kept, but for secrets: a first user's password hash has served its purpose.
	const finish = `update public.operations set state = 'done', result = $2, request = case jsonb_typeof(request) when 'object' then request - 'admin_password_hash' else '{}' end,
	finished_at = now() where id = $1 and state in ('queued', 'running')`
	return oneRow(q.Exec(ctx, finish, id, body))
}

// Fail ends an operation with what the person who asked may read.
func Fail(ctx context.Context, q postgres.Querier, id uuid.UUID, f *fault.Fault) error {
	body, err := json.Marshal(map[string]string{"code": f.StableCode(), "message": f.Message, "hint": f.Hint})
	if err != nil {
		return fmt.Errorf("write error: %w", err)
	}
	const fail = `update public.operations set state = 'failed', error = $2, request = case jsonb_typeof(request) when 'object' then request - 'admin_password_hash' else '{}' end,
	finished_at = now() where id = $1 and state in ('queued', 'running')`
	return oneRow(q.Exec(ctx, fail, id, body))
}

func oneRow(tag interface{ RowsAffected() int64 }, err error) error {
	if err != nil {
		return err
	}
	if tag.RowsAffected() != 1 {
		return fault.New(fault.Conflict, "the operation has ended already").WithCode("operation_over")
	}
	return nil
}

// NextQueued locks the oldest operation on a tenant that waits for a worker, until the transaction ends; others skip it. The bool
// is false when there is none.
func NextQueued(ctx context.Context, q postgres.Querier) (Operation, bool, error) {
	// What waits for another operation on the same tenant does not hold up the others behind it. An older queued one
	// counts as well: another worker may be claiming it at this moment, and its row is skipped here. A rename that runs
	// stands under the former name, and is found by the tenant's number.
	const next = `select ` + operationColumns + ` from public.operations where state = 'queued' and kind like 'tenant.%'
and not exists (select from public.operations r where r.state in ('queued', 'running') and r.slug = operations.slug
	and (r.state = 'running' or (r.created_at, r.id) < (operations.created_at, operations.id)))
and not exists (select from public.operations r join public.tenants t on t.number = r.tenant
	where r.state = 'running' and t.slug = operations.slug and t.state <> 'purged')
order by created_at, id limit 1 for update skip locked`
	return optional(scanOperation(q.QueryRow(ctx, next)))
}

// NextInterrupted locks the oldest running operation on a tenant whose process has given no sign for as long as stale; after each
// attempt for twice as long, up to 64 times, so that what cannot be done at the moment is not tried all the time.
func NextInterrupted(ctx context.Context, q postgres.Querier, stale time.Duration) (Operation, bool, error) {
	const next = `select ` + operationColumns + ` from public.operations where state = 'running' and kind like 'tenant.%'
and coalesce(heartbeat, created_at) < now() - $1::interval * power(2, least(greatest(attempts - 1, 0), 6)) order by created_at, id limit 1 for update skip locked`
	return optional(scanOperation(q.QueryRow(ctx, next, stale)))
}

// TakeUp makes the caller the one who carries out a running operation whose process has given no sign for as long as
// stale; false: it is alive, has ended, or somebody else was faster.
func TakeUp(ctx context.Context, q postgres.Querier, id uuid.UUID, stale time.Duration) (bool, error) {
	const take = `update public.operations set heartbeat = now(), attempts = attempts + 1
where id = $1 and state = 'running' and coalesce(heartbeat, created_at) < now() - $2::interval`
	tag, err := q.Exec(ctx, take, id, stale)
	return tag.RowsAffected() == 1, err
}

// Open finds the running operation on a tenant.
func Open(ctx context.Context, q postgres.Querier, number int32) (Operation, bool, error) {
	const open = `select ` + operationColumns + ` from public.operations where tenant = $1 and state = 'running'`
	return optional(scanOperation(q.QueryRow(ctx, open, number)))
}

func optional(o Operation, err error) (Operation, bool, error) {
	if errors.Is(err, pgx.ErrNoRows) {
		return o, false, nil
	}
	return o, err == nil, err
}

// OperationByID finds an operation.
func OperationByID(ctx context.Context, q postgres.Querier, id uuid.UUID) (Operation, error) {
	const byID = `select ` + operationColumns + ` from public.operations where id = $1`
	o, err := scanOperation(q.QueryRow(ctx, byID, id))
	if errors.Is(err, pgx.ErrNoRows) {
		return o, fault.New(fault.NotFound, "there is no operation %s", id).WithCode("unknown_operation")
	}
	return o, err
}

// Operations reads operations, the newest first; before is the last one of the page before.
func Operations(ctx context.Context, q postgres.Querier, limit int, before *uuid.UUID) ([]Operation, error) {
	// The ids are version 7: their order is that of time.
	const list = `select ` + operationColumns + ` from public.operations where $1::uuid is null or id < $1 order by id desc limit $2`
	rows, err := q.Query(ctx, list, before, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (Operation, error) { return scanOperation(row) })
}

// AuditEntry is one line of the audit trail.
type AuditEntry struct {
	Actor     string
	Action    string
	Tenant    tenant.Tenant // zero: about no single tenant
	Details   any           // never a secret; may be nil
	RequestID string
}

// Audit writes a line of the audit trail, in the transaction of what it tells.
func Audit(ctx context.Context, q postgres.Querier, e AuditEntry) error {
	details := []byte("{}")
	if e.Details != nil {
		var err error
		if details, err = json.Marshal(e.Details); err != nil {
			return fmt.Errorf("write audit details: %w", err)
		}
	}
	const insert = `insert into public.audit (actor, action, tenant, slug, details, request_id) values ($1, $2, nullif($3::int, 0), $4, $5, $6)`
	_, err := q.Exec(ctx, insert, e.Actor, e.Action, e.Tenant.Number, e.Tenant.Slug.String(), details, e.RequestID)
	return err
}
