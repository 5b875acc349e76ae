package pgtest

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
)

// broken finds what must never be, at rest: each row is one sentence. An unfinished operation explains the state of its
// own tenant and nothing else.
const broken = `
with open as (select tenant from public.operations where state = 'running' and tenant is not null)
select format('I1: tenant %s (%s) has no placement', t.slug, t.state) from public.tenants t
where t.group_name = 'main' and t.state in ('active', 'suspended', 'dropped')
  and not exists (select from public.placements p where p.number = t.number) and t.number not in (select tenant from open)
union all
select format('I1: placement %s has no tenant', p.number) from public.placements p
where p.state <> 'spare' and not exists (select from public.tenants t where t.number = p.number and t.state <> 'purged') and p.number not in (select tenant from open)
union all
select format('I1: the spare %s stands in the schema %s', p.number, p.schema) from public.placements p
where p.state = 'spare' and p.schema <> 'oneo_spare_' || p.number
union all
select format('I1: placement %s names a schema that is not there: %s', p.number, p.schema) from public.placements p
where not exists (select from pg_namespace n where n.nspname = p.schema and n.oid = p.namespace)
union all
select format('I1: schema %s belongs to no placement', n.nspname) from pg_namespace n
where n.nspname !~ '^pg_' and n.nspname not in ('public', 'ext', 'river', 'information_schema')
  and not exists (select from public.placements p where p.schema = n.nspname)
  and not exists (select from public.undo_points u where coalesce(u.undone, u.schema) = n.nspname)
  and not exists (select from public.replaced r where r.schema = n.nspname and r.namespace = n.oid)
  and not exists (select from public.moved m where m.schema = n.nspname and m.namespace = n.oid)
union all
select format('I1: the restore %s of tenant %s has kept a schema that is not there: %s', r.operation, r.tenant, r.schema)
from public.replaced r where not exists (select from pg_namespace n where n.nspname = r.schema and n.oid = r.namespace)
union all
select format('I1: the move %s of tenant %s has left a schema that is not there: %s', m.operation, m.tenant, m.schema)
from public.moved m where not exists (select from pg_namespace n where n.nspname = m.schema and n.oid = m.namespace)
union all
select format('I1: the undo point of run %s and tenant %s names a schema that is not there: %s', u.run, u.tenant, coalesce(u.undone, u.schema))
from public.undo_points u where not exists (select from pg_namespace n where n.nspname = coalesce(u.undone, u.schema))
union all
select format('I1: %s may use the schema %s, which is the owner''s alone', a.grantee::regrole, n.nspname)
from pg_namespace n, aclexplode(n.nspacl) a where n.nspname ~ '^oneo_(undo(ne)?|replaced|moved)_' and a.grantee <> n.nspowner
union all
select format('I1: placement %s names a role that is not there: %s', p.number, p.role) from public.placements p
where not exists (select from pg_roles r where r.rolname = p.role)
union all
select format('I1: role %s belongs to no placement', r.rolname) from pg_roles r, public.installation i
where r.rolname like 'oneo\_' || i.id || '\_%' and not exists (select from public.placements p where p.role = r.rolname)
  and not exists (select from public.tenants t where t.group_name <> 'main' and t.state <> 'purged' and r.rolname = 'oneo_' || i.id || '_' || t.number)
  and not exists ( -- a spare's in another database
    select from pg_shdepend d where d.refclassid = 'pg_authid'::regclass and d.refobjid = r.oid
      and d.dbid not in (0, (select oid from pg_database where datname = current_database())))
union all
select format('I1: tenant %s of group %s is %s, its placement %s', t.slug, t.group_name, t.state, p.state) from public.tenants t join public.placements p using (number)
where case t.group_name when 'main' then t.state else 'moved' end <> p.state and t.number not in (select tenant from open)
union all
select format('I1: tenant %s is being moved by nobody: %s', p.number, p.moving) from public.placements p
where p.moving is not null and not exists (select from public.operations o where o.id = p.moving and o.state = 'running')
union all
select format('I2: tenant %s is at version %s, its ledger at %s', p.number, p.version, coalesce(l.head, 0)) from public.placements p
left join (select tenant, max(version) head from public.ledger where set = 'tenant' group by tenant) l on l.tenant = p.number
where p.version <> coalesce(l.head, 0)
union all
select format('I2: the ledger names tenant %s, which has no placement', l.tenant) from public.ledger l
where l.set = 'tenant' and not exists (select from public.placements p where p.number = l.tenant)
union all
select format('I4: advisory lock (%s, %s) is held by pid %s', l.classid, l.objid, l.pid) from pg_locks l
where l.locktype = 'advisory' and l.database = (select oid from pg_database where datname = current_database()) and l.pid <> pg_backend_pid()
union all
select format('I5: tenant %s is served and has no primary domain', t.slug) from public.tenants t
where t.state in ('active', 'suspended') and not exists (select from public.domains d where d.tenant = t.number and d.is_primary)
union all
select format('I9: a connection rests in state %s', a.state) from pg_stat_activity a
where a.datname = current_database() and a.state like 'idle in transaction%'`

// Invariants fails the test when registry, placements, schemas, roles and ledger do not agree. Call it when nothing is
// at work; the backends of a killed process or a cancelled statement are waited for. In a second group's
// database, call it through Admin and Broken.
func (env *Env) Invariants(t testing.TB) {
	t.Helper()
	admin := Admin(t, env.AdminURL)
	found := Broken(t, admin)
	for deadline := time.Now().Add(30 * time.Second); len(found) > 0 && time.Now().Before(deadline); found = Broken(t, admin) {
		pause := time.NewTimer(50 * time.Millisecond)
		<-pause.C
	}
	if len(found) > 0 {
		t.Errorf("invariants broken:\n%s", join(found))
	}
}

// Broken lists the invariants that do not hold in a database that has the registry.
func Broken(t testing.TB, c *pgx.Conn) []string {
	t.Helper()
	rows, err := c.Query(context.Background(), broken)
	if err != nil {
		t.Fatalf("pgtest: invariants: %v", err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatalf("pgtest: invariants: %v", err)
	}
	slices.Sort(found)
	return found
}

func join(lines []string) string {
	var s string
	for _, l := range lines {
		s += fmt.Sprintln("  " + l)
	}
	return s
}
