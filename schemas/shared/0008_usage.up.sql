-- What each tenant has used, by the hour, for quotas and bills. Every server adds what it has counted, about once a minute.
create table public.usage (
    -- A number of public.tenants; the row stays when the tenant is purged, and goes when it is erased.
    tenant       integer not null,
    -- Its beginning.
    hour         timestamptz not null,
    requests     bigint not null default 0,
    errors       bigint not null default 0,
    refused      bigint not null default 0,
    transactions bigint not null default 0,
    database_us  bigint not null default 0,
    row_count    bigint not null default 0,
    bytes_out    bigint not null default 0,
    -- As they were found once in the hour, by PostgreSQL's own estimates; null: they were not.
    size_bytes   bigint,
    records      bigint,
    primary key (tenant, hour)
) with (fillfactor = 80);
create index usage_hour on public.usage (hour);

-- Up to which of its writes a server's are in public.usage, so that one whose answer was lost is not added twice.
create table public.usage_marks (
    writer     text collate "C" primary key,
    sequence   bigint not null,
    written_at timestamptz not null default now()
);

do $$
declare app text := current_setting('oneo.app_role');
begin
    execute format('grant select, insert, update on public.usage, public.usage_marks to %I', app);
    -- Nothing is added for a tenant that was erased.
    execute format('grant select (number) on public.erasures to %I', app);
end $$;
