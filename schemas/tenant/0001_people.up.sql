-- Who may use this tenant. Names are unqualified: they are made in the tenant's own schema.

create table users (
    id            uuid primary key,
    email         text collate "C" not null unique check (email = lower(email) and char_length(email) <= 254),
    name          text not null default '' check (char_length(name) <= 200),
    role          text not null default 'member' check (role in ('admin', 'member', 'viewer')),
    password_hash text not null,
    metadata      jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    disabled_at   timestamptz,
    created_at    timestamptz not null default now(),
    updated_at    timestamptz not null default now(),
    version       integer not null default 1
);

create table sessions (
    token_hash bytea primary key,
    user_id    uuid not null references users (id) on delete cascade,
    created_at timestamptz not null default now(),
    last_seen  timestamptz not null default now(),
    expires_at timestamptz not null,
    user_agent text not null default '',
    remote     text not null default ''
);
create index sessions_user on sessions (user_id);
create index sessions_expiry on sessions (expires_at);

create table api_keys (
    id         uuid primary key,
    token_hash bytea not null unique,
    user_id    uuid not null references users (id) on delete cascade,
    name       text not null check (char_length(name) between 1 and 100),
    scopes     text[] not null default '{}',
    created_at timestamptz not null default now(),
    expires_at timestamptz,
    last_used  timestamptz,
    revoked_at timestamptz
);
create index api_keys_user on api_keys (user_id);
