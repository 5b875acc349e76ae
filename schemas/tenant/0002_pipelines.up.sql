-- The core of the CRM: pipelines as databases, their fields, and records whose values stand in JSONB by field key.

create table pipelines (
    id          uuid primary key,
    key         text collate "C" not null unique check (key ~ '^[a-z][a-z0-9_]{0,47}$'),
    name        text not null check (char_length(name) between 1 and 200),
    description text not null default '' check (char_length(description) <= 2000),
    metadata    jsonb not null default '{}' check (jsonb_typeof(metadata) = 'object'),
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    version     integer not null default 1
);

create table fields (
    id          uuid primary key,
    pipeline_id uuid not null references pipelines (id) on delete cascade,
    key         text collate "C" not null check (key ~ '^[a-z][a-z0-9_]{0,47}$'),
    name        text not null check (char_length(name) between 1 and 200),
    type        text not null check (type in ('text', 'number', 'boolean', 'date', 'select', 'relation')),
    required    boolean not null default false,
    -- Of a select: {"choices": ["won", "lost"]}. Of a relation: {"pipeline": "accounts"}.
    options     jsonb not null default '{}' check (jsonb_typeof(options) = 'object'),
    position    integer not null default 0,
    created_at  timestamptz not null default now(),
    unique (pipeline_id, key)
);

create table records (
    id          uuid primary key,
    pipeline_id uuid not null references pipelines (id) on delete cascade,
    data        jsonb not null default '{}' check (jsonb_typeof(data) = 'object'),
    version     integer not null default 1,
    created_by  uuid references users (id) on delete set null,
    created_at  timestamptz not null default now(),
    updated_at  timestamptz not null default now(),
    -- Set while the record lies in the trash.
    deleted_at  timestamptz
);
create index records_created_by on records (created_by) where created_by is not null;
create index records_live on records (pipeline_id, id) where deleted_at is null;
create index records_trash on records (pipeline_id, id) where deleted_at is not null;
-- Equality and membership are written as data @> '{...}', which this index serves; data->>'k' = ... never uses it.
-- Without a pending list: until autovacuum came by, a filter after many inserts would read the whole list.
create index records_data on records using gin (data jsonb_path_ops) with (fastupdate = off);
