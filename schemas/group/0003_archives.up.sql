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
