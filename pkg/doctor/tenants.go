package doctor

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

var tenantChecks = []Check{
	{Name: "registry", Group: Tenants, About: "every tenant has one place, and every place a tenant in the same state", settles: true, run: checkRegistry},
	{Name: "schemas", Group: Tenants, About: "every place has its schema, and it is the one that was made for it", settles: true, run: checkSchemas},
	{Name: "orphan-schemas", Group: Tenants, About: "every schema belongs to a tenant, or to something that can be undone", settles: true, run: checkOrphanSchemas},
	{Name: "kept", Group: Tenants, About: "what restores, moves and runs have kept is there, and goes when its time is over", settles: true, run: checkKept},
	{Name: "roles", Group: Tenants, About: "every tenant's role is there, may nothing more, and is granted to its sub-pool's login alone", settles: true, run: checkRoles},
	{Name: "orphan-roles", Group: Tenants, About: "every tenant's role has a tenant", settles: true, run: checkOrphanRoles},
	{Name: "grants", Group: Tenants, About: "every tenant's role reaches its schema, and nobody else does", settles: true, run: checkGrants},
	{Name: "domains", Group: Tenants, About: "every served tenant has a primary domain, and nobody has another's", settles: true, run: checkDomains},
	{Name: "ledger", Group: Tenants, About: "the version of every tenant is the last of its ledger rows", settles: true, run: checkLedger},
	{Name: "functions", Group: Tenants, About: "no function runs with its owner's rights on a path that it does not keep, or in another tenant's schema", run: checkFunctions},
	{Name: "probes", Group: Tenants, About: "no throw-away tenant was left by a proof of isolation", settles: true, run: checkProbes},
	{Name: "drift", Group: Tenants, About: "every tenant's schema is what the migrations make", slow: true, run: checkDrift},
}

func checkRegistry(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.places(ctx, r)
	if err != nil {
		return err
	}
	configured := d.o.DB.Groups()
	placedIn := map[int32][]string{} // where it could be written
	for group, s := range w.groups {
		for _, p := range s.placements {
			if p.state == "active" {
				placedIn[p.number] = append(placedIn[p.number], group)
			}
		}
	}
	count := 0
	elsewhere := map[string][]string{}
	bare := map[string][]string{}
	for _, t := range w.sorted() {
		if t.state == "purged" || w.open[t.number] {
			continue
		}
		count++
		if t.state == "creating" {
			r.found(Fail, t.group, "oneo tenant create "+t.slug+", which finishes it", "tenant %s is being created by nobody", t.slug)
			continue
		}
		if !slices.Contains(configured, t.group) {
			elsewhere[t.group] = append(elsewhere[t.group], t.slug)
			continue
		}
		if places := placedIn[t.number]; len(places) > 1 {
			slices.Sort(places)
			r.found(Fail, "", "stop the servers, find out which copy was written last, then ask for help: never repair this by a guess",
				"tenant %s can be written in %d databases: %s", t.slug, len(places), strings.Join(places, ", "))
		}
		s, read := w.groups[t.group]
		if !read {
			continue
		}
		at := slices.IndexFunc(s.placements, func(p placed) bool { return p.number == t.number })
		if at < 0 {
			bare[t.group] = append(bare[t.group], t.slug)
			continue
		}
		p := s.placements[at]
		if p.state != t.state {
			repair := "oneo tenant show " + t.slug
			switch t.state {
			case "active":
				repair = "oneo tenant suspend " + t.slug + " && oneo tenant resume " + t.slug
			case "suspended":
				repair = "oneo tenant resume " + t.slug + " && oneo tenant suspend " + t.slug
			}
			r.found(Fail, t.group, repair, "tenant %s is %s in the registry and %s where it stands", t.slug, t.state, p.state)
		} else if (t.state == "active" || t.state == "suspended") && p.schema != t.schema {
			r.found(Fail, t.group, "oneo tenant rename "+t.slug+" --schema "+t.schema, "tenant %s stands in the schema %s, and the registry says %s", t.slug, p.schema, t.schema)
		}
	}
	for group, names := range elsewhere {
		r.found(Fail, group, "set ONEO_DATABASE_GROUPS_"+strings.ToUpper(group)+"_URL", "%d tenant(s) are in the group %s, which is not configured: %s", len(names), group, some(names))
	}
	for group, names := range bare {
		r.found(Fail, group, "oneo restore BACKUP -t "+names[0]+", or oneo tenant erase "+names[0], "%d tenant(s) stand nowhere: %s", len(names), some(names))
	}
	for group, s := range w.groups {
		var lost []string
		for _, p := range s.placements {
			t, known := w.tenants[p.number]
			switch {
			case w.open[p.number] || p.state == "spare":
			case p.moving != nil && !w.moves[*p.moving]:
				r.found(Fail, group, "oneo tenant move "+w.called(p.number)+" --to GROUP, the same command again, goes on with it", "tenant %s is being moved by nobody", w.called(p.number))
			case !known || t.state == "purged":
				lost = append(lost, fmt.Sprintf("number %d in the schema %s", p.number, p.schema))
			case t.group != group && p.state != "moved":
				r.found(Fail, group, "oneo tenant show "+t.slug, "tenant %s is in the group %s, and %s here as well", t.slug, t.group, p.state)
			}
		}
		if len(lost) > 0 {
			r.found(Fail, group, "look into the schema, then take it away by hand: drop schema, and delete from public.placements", "%d place(s) have no tenant: %s", len(lost), some(lost))
		}
	}
	r.ok("%d tenant(s) in %d group(s), each in its place", count, len(w.groups))
	return nil
}

func checkSchemas(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.places(ctx, r)
	if err != nil {
		return err
	}
	n := 0
	for group, s := range w.groups {
		for _, p := range s.placements {
			if w.open[p.number] {
				continue
			}
			n++
			name := w.called(p.number)
			switch {
			case !p.named:
				r.found(Fail, group, "oneo restore BACKUP -t "+name, "the schema %s of tenant %s is not there", p.schema, name)
			case !p.same:
				r.found(Fail, group, "find out who made it; then oneo restore BACKUP -t "+name, "the schema %s of tenant %s was dropped and made again behind oneo's back", p.schema, name)
			}
		}
	}
	r.ok("%d schema(s)", n)
	return nil
}

func checkOrphanSchemas(ctx context.Context, d *Doctor, r *report) error {
	const list = `select n.nspname, pg_catalog.pg_has_role(n.nspowner, 'usage') from pg_catalog.pg_namespace n
where n.nspname !~ '^pg_' and n.nspname not in ('public', 'ext', 'river', 'information_schema')
	and not exists (select from public.placements p where p.schema = n.nspname)
	and not exists (select from public.undo_points u where coalesce(u.undone, u.schema) = n.nspname)
	and not exists (select from public.replaced r where r.schema = n.nspname)
	and not exists (select from public.moved m where m.schema = n.nspname) order by 1`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list)
		if err != nil {
			return err
		}
		var left, ours, others []string
		var name string
		var owned bool
		_, err = pgx.ForEachRow(rows, []any{&name, &owned}, func() error {
			switch {
			case strings.HasPrefix(name, "oneo_"):
				left = append(left, name)
			case owned:
				ours = append(ours, name)
			default:
				others = append(others, name)
			}
			return nil
		})
		if len(left) > 0 {
			r.found(Warn, group, "look into it, then: drop schema "+postgres.Quote(left[0])+" cascade", "%d schema(s) were left behind that nothing remembers: %s", len(left), some(left))
		}
		if len(ours) > 0 {
			r.found(Warn, group, "oneo tenant adopt "+ours[0]+", or look into it and drop it", "%d schema(s) of the owner's belong to no tenant: %s", len(ours), some(ours))
		}
		if len(others) > 0 {
			r.ok("%d schema(s) of others: %s", len(others), some(others))
		}
		return err
	})
	r.ok("none")
	return nil
}

func checkKept(ctx context.Context, d *Doctor, r *report) error {
	const list = `with kept as (
	select 'restore' kind, operation::text id, tenant, schema, namespace, expires_at from public.replaced
	union all select 'move', operation::text, tenant, schema, namespace, expires_at from public.moved
	union all select 'run', run::text, tenant, coalesce(undone, schema), null, expires_at from public.undo_points)
select k.kind, k.id, k.tenant, k.schema, n.oid is not null and (k.namespace is null or k.namespace = n.oid), k.expires_at < pg_catalog.now() - interval '1 day'
from kept k left join pg_catalog.pg_namespace n on n.nspname = k.schema order by 3, 2`
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	n := 0
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list)
		if err != nil {
			return err
		}
		var over []string
		var kind, id, schema string
		var number int32
		var there, expired bool
		_, err = pgx.ForEachRow(rows, []any{&kind, &id, &number, &schema, &there, &expired}, func() error {
			n++
			switch {
			case !there:
				r.found(Warn, group, "it cannot be undone any more; its row goes when its time is over", "what the %s %s has kept of tenant %s is not there: %s", kind, id, w.called(number), schema)
			case expired:
				over = append(over, schema)
			}
			return nil
		})
		if len(over) > 0 {
			r.found(Warn, group, "start `oneo serve` with database.owner_url, which takes them away", "%d schema(s) are kept for longer than they were to be: %s", len(over), some(over))
		}
		return err
	})
	r.ok("%d kept for undoing", n)
	return nil
}

// member is one row of who is in which role.
type member struct{ role, member string }

// ours is the pattern of the names of an installation's tenants' roles.
func ours(inst postgres.Installation) string { return `oneo\_` + inst.ID + `\_%` }

// numberOf is the tenant of a role of the installation's.
func numberOf(inst postgres.Installation, role string) (int32, bool) {
	rest, ok := strings.CutPrefix(role, "oneo_"+inst.ID+"_")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseInt(rest, 10, 32)
	return int32(n), err == nil && n > 0 && strconv.FormatInt(n, 10) == rest
}

func checkRoles(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	const attributes = `select rolname, rolcanlogin or rolsuper or rolinherit or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls
from pg_catalog.pg_roles where rolname like $1 or rolname = $2`
	// Whoever has made a role may administer it, since PostgreSQL 16; that is the owner.
	const members = `select g.rolname, m.rolname from pg_catalog.pg_auth_members a join pg_catalog.pg_roles g on g.oid = a.roleid join pg_catalog.pg_roles m on m.oid = a.member
where (g.rolname like $1 or m.rolname like $1 or g.rolname = $2) and m.rolname <> current_user and not m.rolsuper`
	// Roles are of the whole cluster, which other groups may share, with another number of logins.
	rightful := map[member]bool{}
	for _, s := range w.groups {
		for _, p := range s.placements {
			rightful[member{s.inst.TenantRole(p.number), s.inst.LoginOf(p.number)}] = true
		}
	}
	n := 0
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		s := w.groups[group]
		if s == nil {
			return w.unread[group]
		}
		there := map[string]bool{} // and whether it may more than it should
		var name string
		var more bool
		rows, err := tx.Query(ctx, attributes, ours(s.inst), s.inst.AppRole)
		if err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&name, &more}, func() error { there[name] = more; return nil }); err != nil {
			return err
		}
		in := map[member]bool{}
		var m member
		if rows, err = tx.Query(ctx, members, ours(s.inst), s.inst.AppRole); err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&m.role, &m.member}, func() error { in[m] = true; return nil }); err != nil {
			return err
		}
		logins := s.inst.LoginNames()
		var missing, powerful []string
		byRole := map[string]bool{}
		for _, p := range s.placements {
			if w.open[p.number] {
				continue
			}
			n++
			own := p.role == s.inst.TenantRole(p.number)
			byRole[p.role] = true
			more, ok := there[p.role]
			switch {
			case !ok:
				missing = append(missing, fmt.Sprintf("%s of %s", p.role, w.called(p.number)))
				continue
			case own && more:
				powerful = append(powerful, p.role)
			}
			if login := s.inst.LoginOf(p.number); own && !in[member{p.role, login}] {
				grant := "grant " + postgres.Quote(p.role) + " to " + postgres.Quote(login)
				r.found(Fail, group, grant, "tenant %s cannot be served: its role %s is not granted to %s", w.called(p.number), p.role, login).
					by(d.script(group, grant), "grant %s to %s", p.role, login)
			}
		}
		if len(missing) > 0 {
			r.found(Fail, group, "make it as `create role ... nologin noinherit`, then oneo doctor --only roles --fix and oneo migrate drift --repair-plan",
				"%d role(s) of tenants are not there: %s", len(missing), some(missing))
		}
		if len(powerful) > 0 {
			r.found(Fail, group, "alter role "+postgres.Quote(powerful[0])+" nologin noinherit nosuperuser nocreaterole nocreatedb noreplication nobypassrls, as a superuser",
				"%d role(s) of tenants may more than a role without a login: %s", len(powerful), some(powerful))
		}
		for _, m := range sortedMembers(in) {
			number, tenants := numberOf(s.inst, m.role)
			_, memberIsTenant := numberOf(s.inst, m.member)
			revoke := "revoke " + postgres.Quote(m.role) + " from " + postgres.Quote(m.member)
			switch {
			case memberIsTenant:
				f := r.found(Fail, group, revoke, "the role %s of a tenant is a member of %s", m.member, m.role)
				if tenants || slices.Contains(logins, m.role) || m.role == s.inst.AppRole { // another role was given by a person, who knows why
					f.by(d.script(group, revoke), "revoke %s from %s", m.role, m.member)
				}
			case !tenants || m.member == s.inst.LoginOf(number) || rightful[m] || w.open[number]:
			case len(w.unread) > 0 && !byRole[m.role]: // it may be of a tenant of the group that is away
			case slices.Contains(logins, m.member) || m.member == s.inst.AppRole:
				r.found(Fail, group, revoke, "the role %s is granted to %s, which is not its sub-pool's login", m.role, m.member).by(d.script(group, revoke), "revoke %s from %s", m.role, m.member)
			default:
				r.found(Warn, group, revoke, "%s, which is no role of oneo's, is a member of the role %s of tenant %s", m.member, m.role, w.called(number))
			}
		}
		if byRole[s.inst.AppRole] { // by schema: the app role's rights are the tenants'
			for _, login := range logins {
				if login != s.inst.AppRole && !in[member{s.inst.AppRole, login}] {
					r.found(Fail, group, "oneo init", "the app role %s is not granted to %s", s.inst.AppRole, login)
				}
			}
		}
		return nil
	})
	r.ok("%d role(s)", n)
	return nil
}

func sortedMembers(in map[member]bool) []member {
	all := make([]member, 0, len(in))
	for m := range in {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b member) int { return strings.Compare(a.role+"\x00"+a.member, b.role+"\x00"+b.member) })
	return all
}

func checkOrphanRoles(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	// What depends on a role, in any database of the cluster, is a right of its or a thing that it owns.
	const list = `select r.rolname, exists (select from pg_catalog.pg_shdepend d where d.refclassid = 'pg_catalog.pg_authid'::pg_catalog.regclass and d.refobjid = r.oid)
from pg_catalog.pg_roles r where r.rolname like $1 order by 1`
	has := map[string]bool{}
	for _, s := range w.groups {
		for _, p := range s.placements {
			has[p.role] = true
		}
	}
	told := map[string]bool{}
	n := 0
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		s := w.groups[group]
		if s == nil {
			return w.unread[group]
		}
		rows, err := tx.Query(ctx, list, ours(s.inst))
		if err != nil {
			return err
		}
		var name string
		var used bool
		_, err = pgx.ForEachRow(rows, []any{&name, &used}, func() error {
			number, ok := numberOf(s.inst, name)
			if !ok { // not of that form: somebody else's
				return nil
			}
			n++
			t, known := w.tenants[number]
			if has[name] || told[name] || known && t.state != "purged" || w.open[number] {
				return nil
			}
			if used && len(w.groups) < len(d.o.DB.Groups()) { // it may be of a tenant of the group that is away
				return nil
			}
			told[name] = true
			if used {
				r.found(Warn, group, "find out what by `drop role "+postgres.Quote(name)+"`, which names it and does nothing else", "the role %s belongs to no tenant, and something still refers to it", name)
				return nil
			}
			drop := "drop role " + postgres.Quote(name)
			// PostgreSQL refuses to drop a role that owns or may anything, in any database.
			r.found(Warn, group, drop, "the role %s belongs to no tenant, and may nothing", name).by(d.script(group, drop), "drop the role %s", name)
			return nil
		})
		return err
	})
	r.ok("%d role(s), each of a tenant", n)
	return nil
}

func checkGrants(ctx context.Context, d *Doctor, r *report) error {
	// Whom rights are looked at of: everybody, the roles of oneo's, and others.
	const whose = `case when a.grantee = 0 then 'public' else g.rolname end, a.grantee = 0 or g.rolname like $1 or g.rolname = $2 or g.rolname = any($3)`
	const reach = `select p.number, p.schema, p.role, pg_catalog.has_schema_privilege(r.oid, n.oid, 'usage'), pg_catalog.has_schema_privilege(r.oid, n.oid, 'create')
from public.placements p join pg_catalog.pg_namespace n on n.oid = p.namespace join pg_catalog.pg_roles r on r.rolname = p.role
where p.state in ('active', 'suspended', 'moving') and not r.rolsuper
	and not (pg_catalog.has_schema_privilege(r.oid, n.oid, 'usage') and not pg_catalog.has_schema_privilege(r.oid, n.oid, 'create')) order by 1`
	const schemas = `select p.number, n.nspname, pg_catalog.lower(a.privilege_type), ` + whose + `
from public.placements p join pg_catalog.pg_namespace n on n.oid = p.namespace cross join lateral pg_catalog.aclexplode(n.nspacl) a
left join pg_catalog.pg_roles g on g.oid = a.grantee
where a.grantee <> n.nspowner and g.rolname is distinct from p.role order by 1, 4, 3`
	const tables = `select p.number, n.nspname || '.' || c.relname, pg_catalog.string_agg(distinct pg_catalog.lower(a.privilege_type), ', '), ` + whose + `
from public.placements p join pg_catalog.pg_namespace n on n.oid = p.namespace join pg_catalog.pg_class c on c.relnamespace = n.oid
cross join lateral pg_catalog.aclexplode(c.relacl) a left join pg_catalog.pg_roles g on g.oid = a.grantee
where c.relkind in ('r', 'p', 'v', 'm', 'f', 'S') and a.grantee <> c.relowner and g.rolname is distinct from p.role
	and (a.grantee = 0 or g.rolname like $1 or g.rolname = $2 or g.rolname = any($3))
group by 1, 2, 4, 5 order by 1, 2, 4`
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	n := 0
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		s := w.groups[group]
		if s == nil {
			return w.unread[group]
		}
		n += len(s.placements)
		args := []any{ours(s.inst), s.inst.AppRole, s.inst.LoginNames()}
		var number int32
		var what, role, to string
		var may, makes, oneos bool
		rows, err := tx.Query(ctx, reach)
		if err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&number, &what, &role, &may, &makes}, func() error {
			if w.open[number] {
				return nil
			}
			if !may {
				grant := "grant usage on schema " + postgres.Quote(what) + " to " + postgres.Quote(role)
				r.found(Fail, group, grant, "tenant %s cannot be served: its role may not use its schema %s", w.called(number), what).by(d.script(group, grant), "grant usage on %s to %s", what, role)
			}
			if makes {
				revoke := "revoke create on schema " + postgres.Quote(what) + " from " + postgres.Quote(role)
				r.found(Fail, group, revoke, "requests of tenant %s may make tables in its schema %s", w.called(number), what).by(d.script(group, revoke), "revoke create on %s from %s", what, role)
			}
			return nil
		}); err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, schemas, args...); err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&number, &what, &role, &to, &oneos}, func() error {
			if w.open[number] {
				return nil
			}
			revoke := "revoke " + role + " on schema " + postgres.Quote(what) + " from " + grantee(to)
			if !oneos {
				r.found(Warn, group, revoke, "%s, which is no role of oneo's, has %s on the schema of tenant %s", to, role, w.called(number))
				return nil
			}
			r.found(Fail, group, revoke, "%s has %s on the schema of tenant %s, which is that tenant's alone", to, role, w.called(number)).
				by(d.script(group, revoke), "revoke %s on %s from %s", role, what, to)
			return nil
		}); err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, tables, args...); err != nil {
			return err
		}
		_, err = pgx.ForEachRow(rows, []any{&number, &what, &role, &to, &oneos}, func() error {
			if !w.open[number] {
				schema, table, _ := strings.Cut(what, ".")
				r.found(Fail, group, "revoke all on "+postgres.Quote(schema)+"."+postgres.Quote(table)+" from "+grantee(to), "%s may %s %s, which is tenant %s's alone", to, role, what, w.called(number))
			}
			return nil
		})
		return err
	})
	r.ok("%d schema(s), each its tenant's alone", n)
	return nil
}

// grantee is a role in SQL; nobody is called public.
func grantee(role string) string {
	if role == "public" {
		return role
	}
	return postgres.Quote(role)
}

func checkDomains(ctx context.Context, d *Doctor, r *report) error {
	const list = `select d.host, t.slug, t.state, coalesce(h.tenant, 0) from public.domains d join public.tenants t on t.number = d.tenant
left join public.domain_holds h on h.host = d.host and h.tenant <> d.tenant and h.held_until > pg_catalog.now() order by d.host`
	const bare = `select t.number, t.slug, exists (select from public.domains d where d.tenant = t.number) from public.tenants t
where t.state in ('active', 'suspended') and not exists (select from public.domains d where d.tenant = t.number and d.is_primary) order by t.slug`
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	public := map[tenant.Host]bool{}
	for _, h := range d.o.Config.Server.PublicHosts {
		if host, err := tenant.ParseHost(h); err == nil {
			public[host] = true
		}
	}
	return d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, bare)
		if err != nil {
			return err
		}
		var none, noPrimary []string
		var number, holder int32
		var host, slug, state string
		var some1 bool
		if _, err := pgx.ForEachRow(rows, []any{&number, &slug, &some1}, func() error {
			switch {
			case w.open[number]:
			case some1:
				noPrimary = append(noPrimary, slug)
			default:
				none = append(none, slug)
			}
			return nil
		}); err != nil {
			return err
		}
		if len(none) > 0 {
			r.found(Fail, "", "oneo domain add "+none[0]+"."+d.o.Config.Server.BaseDomain+" -t "+none[0]+" --primary", "%d tenant(s) cannot be reached: they have no domain: %s", len(none), some(none))
		}
		if len(noPrimary) > 0 {
			r.found(Warn, "", "oneo domain primary HOST -t "+noPrimary[0], "%d tenant(s) have no primary domain: %s", len(noPrimary), some(noPrimary))
		}
		if rows, err = tx.Query(ctx, list); err != nil {
			return err
		}
		n := 0
		_, err = pgx.ForEachRow(rows, []any{&host, &slug, &state, &holder}, func() error {
			n++
			parsed, err := tenant.ParseHost(host)
			remove := "oneo domain remove " + host + " -t " + slug
			switch {
			case err != nil || parsed.String() != host:
				r.found(Fail, "", remove, "the domain %q of tenant %s is not one that a request can have", host, slug)
			case public[parsed]:
				r.found(Fail, "", remove, "the domain %s of tenant %s is one of server.public_hosts: the administration answers there", host, slug)
			case holder != 0:
				r.found(Warn, "", remove+", if it was not given to it on purpose", "the domain %s of tenant %s is held back for tenant %s", host, slug, w.called(holder))
			}
			return nil
		})
		r.ok("%d domain(s)", n)
		return err
	})
}

func checkLedger(ctx context.Context, d *Doctor, r *report) error {
	const lost = `select distinct l.tenant from public.ledger l where l.set = 'tenant' and not exists (select from public.placements p where p.number = l.tenant) order by 1`
	w, err := d.world(ctx)
	if err != nil {
		return err
	}
	n := 0
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		s := w.groups[group]
		if s == nil {
			return w.unread[group]
		}
		for _, p := range s.placements {
			if n++; !w.open[p.number] && p.state != "moved" && p.version != p.head {
				r.found(Fail, group, "oneo migrate drift -t "+w.called(p.number)+", which says what is there; then oneo migrate mark",
					"tenant %s is said to be at version %d, and the last row of its ledger is %d", w.called(p.number), p.version, p.head)
			}
		}
		rows, err := tx.Query(ctx, lost)
		if err != nil {
			return err
		}
		numbers, err := pgx.CollectRows(rows, pgx.RowTo[int32])
		var names []string
		for _, number := range numbers {
			if !w.open[number] {
				names = append(names, w.called(number))
			}
		}
		if len(names) > 0 {
			r.found(Warn, group, "", "the ledger has rows of %d tenant(s) that stand nowhere here: %s", len(names), some(names))
		}
		return err
	})
	r.ok("%d ledger(s)", n)
	return nil
}

func checkFunctions(ctx context.Context, d *Doctor, r *report) error {
	const list = `with f as materialized (
	select p.oid, n.nspname, t.number, p.prosecdef, p.proconfig, pg_catalog.format('%I.%I(%s)', n.nspname, p.proname, pg_catalog.pg_get_function_identity_arguments(p.oid)) as name
	from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace left join public.placements t on t.schema = n.nspname
	where (p.prosecdef or p.proconfig is not null) and (t.number is not null or n.nspname in ('public', 'ext'))
		and not exists (select from pg_catalog.pg_depend e where e.classid = 'pg_catalog.pg_proc'::pg_catalog.regclass and e.objid = p.oid and e.deptype = 'e'))
select f.name, null from f where f.prosecdef and not exists (select from pg_catalog.unnest(f.proconfig) c where c like 'search\_path=%')
union all
select f.name, o.schema from f cross join pg_catalog.unnest(f.proconfig) c cross join pg_catalog.regexp_split_to_table(pg_catalog.substr(c, 13), ' *, *') w
join public.placements o on o.schema = pg_catalog.btrim(w, '"') where c like 'search\_path=%' and o.schema <> f.nspname
order by 1, 2`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list)
		if err != nil {
			return err
		}
		var name string
		var other *string
		_, err = pgx.ForEachRow(rows, []any{&name, &other}, func() error {
			schema, _, _ := strings.Cut(name, ".")
			repair := "alter routine " + name + " set search_path to " + schema + ", ext, pg_temp; and in a migration"
			if other != nil {
				r.found(Fail, group, repair, "the function %s works in the schema of another tenant: %s", name, *other)
			} else {
				r.found(Fail, group, repair, "the function %s runs with its owner's rights on whatever search path its caller has", name)
			}
			return nil
		})
		return err
	})
	r.ok("none is unsafe")
	return nil
}

func checkDrift(ctx context.Context, d *Doctor, r *report) error {
	var all []tenant.Tenant
	err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		all, err = registry.List(ctx, tx, registry.Filter{States: []tenant.State{tenant.Active, tenant.Suspended}})
		return err
	})
	if err != nil {
		return err
	}
	by := map[string][]tenant.Tenant{}
	for _, t := range all {
		if t.Name != probeName { // they have a table of the doctor's own, and go by themselves
			by[t.Group] = append(by[t.Group], t)
		}
	}
	same := 0
	for _, group := range d.o.DB.Groups() {
		ts := by[group]
		if len(ts) == 0 {
			continue
		}
		if err := d.away(ctx, group); err != nil {
			r.unseen(group, err)
			continue
		}
		// Files that were changed after they had been applied would make a wrong reference.
		if err := d.o.Migrate.CheckApplied(ctx, group); err != nil {
			r.unseen(group, err)
			continue
		}
		groups, err := d.o.Structure.Drift(ctx, group, ts)
		if err != nil {
			r.unseen(group, err)
			continue
		}
		for _, g := range groups {
			var names []string
			for _, t := range g.Tenants {
				names = append(names, t.Slug.String())
			}
			switch g.State {
			case structure.Drifted:
				differs := g.Differences[0].String()
				if n := len(g.Differences); n > 1 {
					differs += fmt.Sprintf(", and %d more", n-1)
				}
				r.found(Fail, group, "oneo migrate drift -t "+names[0]+" --repair-plan", "%d tenant(s) are not what the migrations make: %s (%s)", len(names), some(names), differs)
			case structure.Unfinished:
				r.found(Warn, group, "oneo migrate -t "+names[0], "%d tenant(s) are in the midst of a migration: %s", len(names), some(names))
			case structure.Unread:
				r.found(Warn, group, "oneo migrate drift -t "+names[0], "%d tenant(s) could not be read: %s", len(names), some(names))
			case structure.Identical:
				same += len(names)
			case structure.Missing: // is found by the check of schemas
			}
		}
	}
	r.ok("%d tenant(s) as the migrations make them", same)
	return nil
}
