-- What every group's database holds, the main one included: where each tenant of this database stands, and the
-- functions that the binding calls. public.installation and public.ledger are made by `oneo init`, before any migration.

create table public.placements (
    number     integer primary key check (number > 0),
    schema     text collate "C" not null unique check (octet_length(schema) between 1 and 63),
    role       text not null,
    -- The schema's oid: a schema dropped and made again behind oneo's back shows at once.
    namespace  oid not null,
    state      text not null check (state in ('active', 'suspended', 'dropped')),
    -- Counts changes of placement; a server that bound against an older one re-reads the registry.
    epoch      bigint not null default 1,
    -- The head of this tenant's ledger rows, changed in the same transaction: "who is behind?" reads one index.
    version    integer not null default 0,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index placements_behind on public.placements (version) where state <> 'dropped';

comment on table public.placements is 'Tenants whose schemas stand in this database; the truth that every binding checks.';

-- Ends a binding that must not go on. A function, because a statement pipelined behind the gate runs unless the gate
-- itself raises. ON001: another operation holds the gate. ON002: the placement is not as the caller believed.
create function ext.refuse(code text, state text) returns integer
    language plpgsql volatile set search_path to pg_catalog, pg_temp as $$
begin
    raise exception 'tenant is not served: %', state using errcode = code;
end $$;

do $$
declare login text;
begin
    execute format('grant select on public.placements to %I', current_setting('oneo.app_role'));
    foreach login in array string_to_array(current_setting('oneo.logins'), ',') loop
        execute format('grant select on public.placements to %I', login);
    end loop;
end $$;
