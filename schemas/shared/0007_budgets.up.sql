-- What single tenants' requests may take, where it is not the default of the configuration, and what was measured last.
create table public.budgets (
    tenant       integer primary key references public.tenants (number) on delete cascade,
    -- Null: the default; 0: none.
    requests     integer check (requests >= 0),
    in_flight    integer check (in_flight >= 0),
    statement_ms integer check (statement_ms >= 0),
    storage      bigint check (storage >= 0),
    records      bigint check (records >= 0),
    -- Bytes and rows, and whether the budget was used up then. Null: not measured.
    storage_used bigint,
    records_used bigint,
    storage_full boolean not null default false,
    records_full boolean not null default false,
    measured_at  timestamptz
);

do $$
begin
    execute format('grant select on public.budgets to %I', current_setting('oneo.app_role'));
end $$;
