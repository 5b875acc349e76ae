-- What restores have taken out of use, until it expires: `oneo undo` puts it back.
create table public.replaced (
    operation  uuid primary key,
    -- Whoever takes the placement away must take the schemas away first.
    tenant     integer not null references public.placements (number),
    -- Where it lies: at first the tables from before the restore, and once that was undone those that it had brought.
    schema     text collate "C" not null unique,
    namespace  oid not null,
    version    integer not null,
    reader     integer not null,
    -- Its rows of public.ledger and public.progress, as they were.
    ledger     jsonb not null,
    progress   jsonb not null,
    made_at    timestamptz not null default now(),
    expires_at timestamptz not null,
    undone_at  timestamptz,
    -- The operation that undid it, where that is one.
    undone_by  uuid
);
create index replaced_tenant on public.replaced (tenant, made_at);
create index replaced_expiry on public.replaced (expires_at);

-- A tenant on its way to another group's database. moving: it was active, and is read here and written nowhere. arriving: all of it
-- is here, and the registry has not switched, or this place has not heard of it. moved: it is served elsewhere, and what is
-- left here is kept for a while.
alter table public.placements drop constraint placements_state_check;
-- oneo: allow add-check one short row for each tenant
alter table public.placements add constraint placements_state_check
    check (state in ('active', 'suspended', 'dropped', 'spare', 'moving', 'arriving', 'moved'));
-- The operation that moves it, at both ends, until it is over.
alter table public.placements add column moving uuid;

-- What moves have left behind, until it expires. Whoever takes the placement away must take the schemas away first.
create table public.moved (
    operation  uuid primary key,
    tenant     integer not null references public.placements (number),
    -- Where it went.
    group_name text collate "C" not null,
    schema     text collate "C" not null unique,
    namespace  oid not null,
    version    integer not null,
    -- Its rows of public.ledger, as they were.
    ledger     jsonb not null,
    moved_at   timestamptz not null default now(),
    expires_at timestamptz not null
);
create index moved_tenant on public.moved (tenant, moved_at);
create index moved_expiry on public.moved (expires_at);
