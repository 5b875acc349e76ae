-- The last restore of each tenant that was proved: a backup was restored and compared, and taken back (`oneo backup drill`).
create table public.proofs (
    tenant      integer primary key references public.tenants (number) on delete cascade,
    -- Its id in the store, and when its rows were read.
    backup      text not null,
    made_at     timestamptz not null,
    proved_at   timestamptz not null default now(),
    rows        bigint not null,
    duration_ms bigint not null
);

do $$
begin
    execute format('grant select on public.proofs to %I', current_setting('oneo.app_role'));
end $$;
