-- What the archives beside this file were made with. Neither it nor they are ever changed: they must be readable for ever.
create table people (id integer generated always as identity primary key, name text not null unique, born date);
create table deals (
	id bigserial primary key, person integer not null references people (id) on delete cascade, title text not null,
	worth numeric(20, 4) check (worth >= 0), data jsonb not null default '{}', search text generated always as (lower(title)) stored
);
create table "Odd ""Name" ("a column" text, "select" integer, raw bytea, at timestamptz, list text[]);
create table empty (id integer);
create table sessions (token text primary key);
create sequence tickets start 100 increment 7;
create function counts() returns trigger language plpgsql as $$ begin perform nextval('tickets'); return null; end $$;
create trigger counted after insert on deals for each row execute function counts();
create view large as select id, title from deals where worth > 1000;
create materialized view persons as select person, count(*) as deals from deals group by person;
create index deals_person on deals (person);
comment on index deals_person is 'by person';
