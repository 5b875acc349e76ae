-- Restore points: names in the WAL of the clusters that an operation was about to change, before its first change, so that a
-- recovery can end there. The owner's alone: they name tenants, and serving needs none. A row stays when its run expires.
create table public.restore_points (
    -- The operation's or run's id, whether or not it has a row in public.operations.
    operation  uuid not null,
    group_name text collate "C" not null,
    -- As PostgreSQL knows it. A cluster whose groups are two has a point for each.
    name       text collate "C" not null unique,
    lsn        pg_lsn not null,
    timeline   integer not null,
    -- By the clock of the cluster's server.
    at         timestamptz not null,
    kind       text not null,
    -- The tenant's name at that time; empty: more than one is concerned.
    tenant     text collate "C" not null default '',
    primary key (operation, group_name)
);
create index restore_points_at on public.restore_points (at);
