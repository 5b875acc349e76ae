-- A full backup of this database reads each tenant as it was at one moment, and may come to it an hour later. Until then
-- nothing may change the tenant's structure: whoever takes a tenant's operation lock asks public.held_by first.

create table public.holds (
    id         integer generated always as identity primary key,
    -- The backup's id, and who makes it.
    backup     text not null,
    actor      text not null default '',
    -- Until the moment is fixed every tenant is held, those too that are being made; after that those of public.held.
    everything boolean not null default true,
    began_at   timestamptz not null default now()
);

-- The tenants that the backup has not copied yet.
create table public.held (
    tenant integer not null,
    hold   integer not null references public.holds (id) on delete cascade,
    primary key (tenant, hold)
);

-- The backup that holds a tenant back, or null. A hold is in force while a session of the backup's process has the advisory
-- lock (7302666, id): one that was killed holds nothing. 0 stands for the shared tables, which are locked as such.
create function public.held_by(number integer) returns text
    language plpgsql stable set search_path to pg_catalog, pg_temp as $$
begin
    if number = 0 or not exists (select from public.holds) then
        return null;
    end if;
    return (select pg_catalog.min(h.backup || case h.actor when '' then '' else ' by ' || h.actor end) from public.holds h
        where (h.everything or exists (select from public.held d where d.hold = h.id and d.tenant = number))
            and exists (select from pg_catalog.pg_locks l where l.locktype = 'advisory' and l.classid = 7302666 and l.objid = h.id::oid and l.objsubid = 2 and l.granted
                and l.database = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database())));
end $$;
