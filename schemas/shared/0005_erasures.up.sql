-- Tenants that were erased: an archive of one of them makes no tenant any more, unless it is named.
create table public.erasures (
    -- The tenant's id for the outside, by which archives know it.
    tenant    uuid primary key,
    number    integer not null,
    slug      text collate "C" not null,
    erased_at timestamptz not null,
    actor     text not null,
    -- What was destroyed, byte by byte as it was signed.
    destroyed json not null,
    -- Of all other columns, under a key that is derived from server.secret.
    mac       bytea not null check (octet_length(mac) = 32)
);
create index erasures_slug on public.erasures (slug, erased_at desc);
