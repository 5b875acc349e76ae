-- The registry: which tenants there are and where they stand. It lives in the main group's database only.

create table public.groups (
    name        text collate "C" primary key check (name ~ '^[a-z0-9]{1,32}$'),
    max_tenants integer check (max_tenants >= 0),
    accepting   boolean not null default true,
    created_at  timestamptz not null default now()
);
comment on table public.groups is 'Database groups: named and limited here; their connection strings live in the configuration.';
insert into public.groups (name) values ('main');

create sequence public.tenant_numbers as integer minvalue 1 no cycle;

create table public.tenants (
    number           integer primary key default nextval('public.tenant_numbers') check (number > 0),
    id               uuid not null unique default gen_random_uuid(),
    slug             text collate "C" not null check (slug ~ '^[a-z0-9]([a-z0-9-]{0,46}[a-z0-9])?$'),
    schema           text collate "C" not null check (schema ~ '^[a-z0-9_]{1,48}$'),
    name             text not null default '' check (char_length(name) <= 200),
    group_name       text collate "C" not null default 'main' references public.groups (name),
    state            text not null check (state in ('creating', 'active', 'suspended', 'dropped', 'purged')),
    -- The state to return to by undrop.
    state_before     text check (state_before in ('active', 'suspended')),
    epoch            bigint not null default 1,
    cache_generation bigint not null default 1,
    settings         jsonb not null default '{}' check (jsonb_typeof(settings) = 'object'),
    created_at       timestamptz not null default now(),
    updated_at       timestamptz not null default now(),
    dropped_at       timestamptz,
    purge_after      timestamptz,
    check ((state = 'dropped') = (purge_after is not null))
);
alter sequence public.tenant_numbers owned by public.tenants.number;
-- A purged tenant's row stays as its tombstone and frees its names. Schemas are unique over all groups: they are the
-- prefix of Redis keys.
create unique index tenants_slug on public.tenants (slug) where state <> 'purged';
create unique index tenants_schema on public.tenants (schema) where state <> 'purged';
create index tenants_purge on public.tenants (purge_after) where state = 'dropped';

create table public.domains (
    host       text collate "C" primary key check (octet_length(host) between 1 and 253 and host = lower(host)),
    tenant     integer not null references public.tenants (number) on delete cascade,
    is_primary boolean not null default false,
    created_at timestamptz not null default now()
);
create index domains_tenant on public.domains (tenant);
create unique index domains_one_primary on public.domains (tenant) where is_primary;

create table public.domain_holds (
    host       text collate "C" primary key,
    tenant     integer not null,
    held_until timestamptz not null
);
comment on table public.domain_holds is 'Domains removed from a tenant: no other tenant may claim them before held_until.';

create table public.operations (
    id          uuid primary key,
    kind        text not null,
    tenant      integer,
    slug        text not null default '',
    -- queued: to be claimed by a worker; running: begun; done and failed are final.
    state       text not null check (state in ('queued', 'running', 'done', 'failed')),
    -- 'begun' once its first step is committed: a resumed operation goes on behind it.
    step        text not null default '' check (step in ('', 'begun')),
    request     jsonb not null default '{}',
    result      jsonb,
    error       jsonb,
    actor       text not null default '',
    attempts    integer not null default 0,
    heartbeat   timestamptz,
    created_at  timestamptz not null default now(),
    started_at  timestamptz,
    finished_at timestamptz
);
create index operations_open on public.operations (created_at) where state in ('queued', 'running');
create index operations_tenant on public.operations (tenant, created_at desc);
-- One structural operation on a tenant at a time, whoever runs it.
create unique index operations_one_running on public.operations (tenant) where state = 'running' and tenant is not null;

create table public.instances (
    id         uuid primary key,
    host       text not null,
    pid        integer not null,
    version    text not null,
    ops_addr   text not null,
    started_at timestamptz not null default now(),
    heartbeat  timestamptz not null default now()
);

create table public.audit (
    id         bigint generated always as identity primary key,
    at         timestamptz not null default now(),
    actor      text not null,
    action     text not null,
    tenant     integer,
    slug       text not null default '',
    details    jsonb not null default '{}',
    request_id text not null default ''
);
create index audit_tenant on public.audit (tenant, id desc);

do $$
declare app text := current_setting('oneo.app_role');
begin
    execute format('grant select on public.groups, public.tenants to %I', app);
    execute format('grant update (settings, cache_generation, updated_at) on public.tenants to %I', app);
    execute format('grant select, insert, update, delete on public.domains, public.domain_holds, public.instances to %I', app);
    execute format('grant select, insert on public.operations, public.audit to %I', app);
end $$;
