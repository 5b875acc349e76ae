-- Durable runs over the fleet. A run is an operation without a tenant, of a kind "run....", with a row in public.runs and
-- a task for each of its tenants. Any number of processes claim tasks and may die.

alter table public.operations drop constraint operations_state_check;
-- oneo: allow add-check a short row for each operation so far, read in milliseconds
alter table public.operations add constraint operations_state_check
    check (state in ('queued', 'running', 'paused', 'done', 'failed', 'aborted'));

create table public.runs (
    id           uuid primary key references public.operations (id) on delete cascade,
    -- Waves begin one after another: no task of a wave before all of the waves before it have ended.
    wave         integer not null default 0 check (wave >= 0),
    waves        integer not null check (waves > 0),
    wave_after   timestamptz not null default now(),
    pause        interval not null default '0',
    -- Begin no more once so many tasks have failed; null: no bound.
    max_failures integer check (max_failures > 0),
    -- Failures that retry has forgiven: they do not count against max_failures.
    forgiven     integer not null default 0
);

create table public.tasks (
    run         uuid not null references public.runs (id) on delete cascade,
    ordinal     integer not null,
    tenant      integer not null,
    slug        text not null,
    group_name  text collate "C" not null,
    wave        integer not null default 0,
    -- queued also once more, when the tenant was busy: not before not_before.
    state       text not null default 'queued' check (state in ('queued', 'running', 'ok', 'skipped', 'failed')),
    from_version integer,
    to_version  integer,
    attempts    integer not null default 0,
    not_before  timestamptz not null default now(),
    worker      uuid,
    heartbeat   timestamptz,
    duration_ms bigint,
    result      jsonb,
    error       jsonb,
    started_at  timestamptz,
    finished_at timestamptz,
    primary key (run, ordinal),
    unique (run, tenant)
);
create index tasks_open on public.tasks (run, wave, ordinal) where state in ('queued', 'running');
create index tasks_tenant on public.tasks (tenant, run desc);

do $$
begin
    execute format('grant select on public.runs, public.tasks to %I', current_setting('oneo.app_role'));
end $$;
