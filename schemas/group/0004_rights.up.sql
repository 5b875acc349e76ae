-- Who but the owner may use the schema of a tenant that was replaced, as the tenant had it: while it lies there nobody may.
alter table public.replaced add column rights jsonb not null default '[]';
-- Of those that were replaced before: the tenant's role alone.
-- oneo: allow dml-unbounded one row for each restore that can still be undone
update public.replaced r set rights = pg_catalog.jsonb_build_array(pg_catalog.jsonb_build_object('role', p.role, 'privilege', 'USAGE', 'grantable', false))
from public.placements p where p.number = r.tenant;
