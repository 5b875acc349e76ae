-- What has become of the due times of backup.schedules. River's tables, in the schema river, only wake servers up: if they
-- were lost, the next look at these rows would go on with what has not ended.
create table public.schedules (
    name        text collate "C" primary key,
    -- The cron words and the time zone that seen was counted by.
    spec        text not null,
    -- Up to where due times were taken on or counted as missed.
    seen        timestamptz not null,
    -- The newest one that was taken on, the run that was begun for it, and how often its failed tenants were tried again.
    due         timestamptz,
    run         uuid,
    tries       integer not null default 0,
    ended_at    timestamptz,
    ok          integer not null default 0,
    failed      integer not null default 0,
    skipped     integer not null default 0,
    error       text,
    -- How many were not taken on, the newest of them, and up to which of them an alarm was raised.
    missed      bigint not null default 0,
    missed_at   timestamptz,
    missed_told timestamptz,
    -- The server that is at work on the due time, and its last sign of life; or before when nobody is to be, and after how
    -- many errors one after another.
    worker      uuid,
    beat        timestamptz,
    not_before  timestamptz,
    errors      integer not null default 0
);
