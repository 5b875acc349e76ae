-- Recoveries that were proved: a cluster was brought to a moment, and tenants of it were restored and compared
-- (`oneo backup drill --physical`). The owner's alone.
create table public.physical_proofs (
    -- The cluster's name: main, or the first of its groups.
    cluster     text collate "C" not null,
    -- The moment, and the physical backup that it was reached from.
    target      timestamptz not null,
    backup      text not null,
    tenants     integer not null,
    rows        bigint not null,
    proved_at   timestamptz not null default now(),
    duration_ms bigint not null,
    primary key (cluster, proved_at)
);
