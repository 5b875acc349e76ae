-- Who may administer the fleet. The same shape as a tenant's users, sessions and keys, in tables of their own.

create table public.administrators (
    id            uuid primary key,
    email         text collate "C" not null unique check (email = lower(email) and char_length(email) <= 254),
    name          text not null default '' check (char_length(name) <= 200),
    role          text not null default 'admin' check (role in ('admin')),
    password_hash text not null,
    metadata      jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    disabled_at   timestamptz,
    created_at    timestamptz not null default now(),
    updated_at    timestamptz not null default now(),
    version       integer not null default 1
);

create table public.administrator_sessions (
    token_hash bytea primary key,
    user_id    uuid not null references public.administrators (id) on delete cascade,
    created_at timestamptz not null default now(),
    last_seen  timestamptz not null default now(),
    expires_at timestamptz not null,
    user_agent text not null default '',
    remote     text not null default ''
);
create index administrator_sessions_user on public.administrator_sessions (user_id);
create index administrator_sessions_expiry on public.administrator_sessions (expires_at);

create table public.administrator_keys (
    id         uuid primary key,
    token_hash bytea not null unique,
    user_id    uuid not null references public.administrators (id) on delete cascade,
    name       text not null check (char_length(name) between 1 and 100),
    scopes     text[] not null default '{}',
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    last_used  timestamptz,
    revoked_at timestamptz
);
create index administrator_keys_user on public.administrator_keys (user_id);

do $$
begin
    execute format('grant select, insert, update, delete on public.administrators, public.administrator_sessions, public.administrator_keys to %I',
        current_setting('oneo.app_role'));
end $$;
