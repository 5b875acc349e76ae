-- What runs over the fleet and the servers need of each tenant's place.

-- spare: a schema of the warm pool, which no tenant has claimed yet.
alter table public.placements drop constraint placements_state_check;
-- oneo: allow add-check one short row for each tenant, read in milliseconds
alter table public.placements add constraint placements_state_check check (state in ('active', 'suspended', 'dropped', 'spare'));
-- oneo: allow create-index one short row for each tenant
create index placements_spare on public.placements (number) where state = 'spare';
-- The least head that a binary must have to serve this tenant: raised by migrations marked as breaking.
-- oneo: allow add-check one short row for each tenant
alter table public.placements add column reader integer not null default 0 check (reader >= 0);

-- How far a migration is that is more than one transaction: a file without a transaction, or a data migration. The row
-- ends with the ledger row, in one transaction; of a data migration that runs beside later ones it outlives it.
create table public.progress (
    tenant     integer not null references public.placements (number) on delete cascade,
    version    integer not null check (version > 0),
    -- Of a data migration: of its file. Of a file without a transaction: of the statements that are done, because it is
    -- continued only where those are unchanged; one that fails can be mended.
    checksum   bytea not null check (octet_length(checksum) = 32),
    statements integer not null default 0 check (statements >= 0),
    -- The checksum of the statement at work that cannot be in a transaction with this row: when the process dies, nobody
    -- knows whether it was done.
    begun      bytea check (octet_length(begun) = 32),
    -- More rows than this a data migration cannot have to change: one that does changes the same rows again.
    bound      bigint not null default 0 check (bound >= 0),
    batches    bigint not null default 0 check (batches >= 0),
    rows       bigint not null default 0 check (rows >= 0),
    beside     boolean not null default false,
    started_at timestamptz not null default now(),
    updated_at timestamptz not null default now(),
    primary key (tenant, version)
);
create index progress_beside on public.progress (tenant) where beside;

-- A run's change of a tenant that leaves no ledger row: written in the change's own transaction, so that a run that is
-- resumed makes it once.
create table public.marks (
    run    uuid not null,
    tenant integer not null references public.placements (number) on delete cascade,
    result jsonb,
    at     timestamptz not null default now(),
    primary key (run, tenant)
);

do $$
declare login text;
begin
    -- A login lays the tenant's role down before it writes the mark; the app role and the tenants' roles may not.
    foreach login in array string_to_array(current_setting('oneo.logins'), ',') loop
        execute format('grant select, insert on public.marks to %I', login);
    end loop;
end $$;

-- The least version of the files of group and of shared that a binary must know to serve from this database. A file that
-- older binaries cannot stand writes its own version here; without that they go on serving when it has been applied.
create table public.readers (
    set    text primary key check (set in ('group', 'shared')),
    reader integer not null check (reader > 0)
);

do $$ begin execute format('grant select on public.readers to %I', current_setting('oneo.app_role')); end $$;

-- What a run has kept of a tenant before it changed it, until it expires: `oneo undo` puts it back. schema holds copies
-- of the tables that the run has changed, as they were; nobody but the owner may look at them. The row is written in the
-- transactions of the tenant's migrations.
create table public.undo_points (
    run          uuid not null,
    -- Whoever takes the placement away must take the schemas away first.
    tenant       integer not null references public.placements (number),
    schema       text collate "C" not null unique,
    from_version integer not null check (from_version >= 0),
    -- As far as this run has come: a tenant at any other version cannot be taken back.
    to_version   integer not null check (to_version >= from_version),
    -- The tables that were copied, each with the number of its rows; and the last value of each sequence.
    tables       jsonb not null default '{}',
    sequences    jsonb not null default '{}',
    -- The numbers of the transactions whose rows are the run's own, and, by the oids of the tables that were copied, of those
    -- that were over then: any other's rows were written since.
    own          int8multirange not null default '{}',
    settled      jsonb not null default '{}',
    -- The names of all objects before the run, and of those that it has made: what is in neither is somebody else's.
    had          text[] not null,
    made         text[] not null default '{}',
    made_at      timestamptz not null default now(),
    updated_at   timestamptz not null default now(),
    expires_at   timestamptz not null,
    -- Once the tenant was taken back schema is gone, and undone is where the tables lie that it had until then.
    undone_at    timestamptz,
    undone       text collate "C" unique check ((undone is null) = (undone_at is null)),
    primary key (run, tenant)
);
create index undo_points_tenant on public.undo_points (tenant, to_version);
create index undo_points_expiry on public.undo_points (expires_at);
