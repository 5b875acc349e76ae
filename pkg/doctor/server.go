package doctor

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

var reachChecks = []Check{
	{Name: "reach", Group: PostgreSQL, About: "the database of every group answers, to the owner and to the app role", run: checkReach},
}

var serverChecks = []Check{
	{Name: "version", Group: PostgreSQL, About: "the server has the newest security fixes that this binary knows of", run: checkVersion},
	{Name: "durability", Group: PostgreSQL, About: "what was committed survives a crash", run: checkDurability},
	{Name: "logins", Group: PostgreSQL, About: "the app role and its logins may nothing but serve", run: checkLogins},
	{Name: "sight", Group: PostgreSQL, About: "the owner sees what other sessions do, and may end them", run: checkSight},
	{Name: "closed", Group: PostgreSQL, About: "public and ext are closed to tenants, and ext holds no tables", run: checkClosed},
	{Name: "isolation-mode", Group: PostgreSQL, About: "which isolation is in force, and that the tenants were made for it", run: checkIsolationMode},
	{Name: "direct-url", Group: PostgreSQL, About: "database.direct_url leads past any pooler", run: checkDirectURL},
	{Name: "pooler", Group: PostgreSQL, About: "a pooler in the way is of a version, and set so, that it mixes nothing up", run: checkPooler},
	{Name: "connections", Group: PostgreSQL, About: "max_connections suffices for the pools of all servers", run: checkConnections},
	{Name: "lock-table", Group: PostgreSQL, About: "max_locks_per_transaction suffices for work on one tenant", run: checkLockTable},
	{Name: "sessions", Group: PostgreSQL, About: "no session stands still with locks, and nobody waits long for one", run: checkSessions},
	{Name: "prepared-transactions", Group: PostgreSQL, About: "no prepared transaction was forgotten", run: checkPrepared},
	{Name: "slots", Group: PostgreSQL, About: "no replication slot without a reader keeps the log", run: checkSlots},
	{Name: "indexes", Group: PostgreSQL, About: "no index is invalid", run: checkIndexes},
	{Name: "vacuum", Group: PostgreSQL, About: "autovacuum is on and far from wraparound", run: checkVacuum},
	{Name: "room", Group: PostgreSQL, About: "there is room for more tenants, in the catalogue and in the group", run: checkRoom},
	{Name: "disk", Group: PostgreSQL, About: "there is room on the server's disk, where that can be known", run: checkDisk},
	{Name: "clock", Group: PostgreSQL, About: "the server's clock and this machine's agree", run: checkClock},
}

func checkReach(ctx context.Context, d *Doctor, r *report) error {
	for _, group := range d.o.DB.Groups() {
		if err := d.away(ctx, group); err != nil {
			f := fault.Of(err)
			r.found(Fail, group, f.Hint, "%s", reason(err))
			continue
		}
		if _, err := d.o.DB.Installation(ctx, group); err != nil {
			r.found(Fail, group, fault.Of(err).Hint, "as the app role: %s", reason(err))
		}
	}
	r.ok("%d database(s) answer", len(d.o.DB.Groups()))
	return nil
}

func checkVersion(ctx context.Context, d *Doctor, r *report) error {
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var version int
		if err := tx.QueryRow(ctx, `select pg_catalog.current_setting('server_version_num')::int`).Scan(&version); err != nil {
			return err
		}
		judgeVersion(r, group, version)
		return nil
	})
	return nil
}

// judgeVersion compares server_version_num with what is known.
func judgeVersion(r *report, group string, version int) {
	major, minor := version/10000, version%10000
	newest := slices.MaxFunc(securityMinors, func(a, b securityMinor) int { return a.major - b.major })
	at := slices.IndexFunc(securityMinors, func(s securityMinor) bool { return s.major == major })
	switch {
	case major > newest.major:
		r.ok("PostgreSQL %d.%d, newer than this binary knows", major, minor)
	case at < 0:
		r.found(Fail, group, "move to PostgreSQL "+itoa(int32(newest.major)), "PostgreSQL %d.%d is mended no more", major, minor)
	default:
		s := securityMinors[at]
		if s.ended {
			r.found(Warn, group, "move to PostgreSQL "+itoa(int32(newest.major)), "PostgreSQL %d is mended no more since %s", major, s.released)
		}
		switch behind := s.minor - minor; {
		case behind <= 0:
			r.ok("PostgreSQL %d.%d", major, minor)
		case minor < s.before: // two security releases are missing
			r.found(Fail, group, fmt.Sprintf("install PostgreSQL %d.%d and restart it", major, s.minor), "PostgreSQL %d.%d lacks the security fixes of more than one release; %d.%d is of %s", major, minor, major, s.minor, securityReleased)
		default:
			r.found(Warn, group, fmt.Sprintf("install PostgreSQL %d.%d and restart it", major, s.minor), "PostgreSQL %d.%d lacks security fixes: %d.%d is of %s", major, minor, major, s.minor, securityReleased)
		}
	}
}

func checkDurability(ctx context.Context, d *Doctor, r *report) error {
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		for _, name := range []string{"fsync", "full_page_writes", "synchronous_commit"} {
			var value string
			if err := tx.QueryRow(ctx, `select pg_catalog.current_setting($1)`, name).Scan(&value); err != nil {
				return err
			}
			if value != "off" {
				continue
			}
			status, what := Fail, "a crash of the server destroys the database"
			if name == "synchronous_commit" {
				status, what = Warn, "a crash of the server loses what was committed just before"
			}
			r.found(status, group, "alter system set "+name+" to on; select pg_reload_conf()", "%s is off: %s", name, what)
		}
		return nil
	})
	r.ok("fsync, full_page_writes and synchronous_commit are on")
	return nil
}

func checkLogins(ctx context.Context, d *Doctor, r *report) error {
	const attributes = `select n.name, r.rolname is not null, coalesce(r.rolcanlogin, false), coalesce(pg_catalog.concat_ws(', ', case when r.rolsuper then 'superuser' end, case when r.rolbypassrls then 'bypassrls' end,
	case when r.rolcreaterole then 'createrole' end, case when r.rolcreatedb then 'createdb' end, case when r.rolreplication then 'replication' end, case when r.rolinherit then 'inherit' end), ''),
	r.oid is not null and pg_catalog.has_database_privilege(r.oid, pg_catalog.current_database(), 'create'), r.oid is not null and pg_catalog.has_database_privilege(r.oid, pg_catalog.current_database(), 'temp'),
	exists (select from pg_catalog.pg_class c where c.relowner = r.oid),
	exists (select from pg_catalog.pg_db_role_setting s join pg_catalog.pg_database b on b.oid = s.setdatabase and b.datname = pg_catalog.current_database()
		cross join pg_catalog.unnest(s.setconfig) c where s.setrole = r.oid and c in ('search_path=""', 'search_path='))
from pg_catalog.unnest($1::text[]) n (name) left join pg_catalog.pg_roles r on r.rolname = n.name`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		inst, err := d.o.DB.Installation(ctx, group)
		if err != nil {
			return err
		}
		names := []string{inst.AppRole}
		for _, login := range inst.LoginNames() {
			if !slices.Contains(names, login) {
				names = append(names, login)
			}
		}
		rows, err := tx.Query(ctx, attributes, names)
		if err != nil {
			return err
		}
		var name, may string
		var there, login, creates, temp, owns, path bool
		var pathless []string
		if _, err := pgx.ForEachRow(rows, []any{&name, &there, &login, &may, &creates, &temp, &owns, &path}, func() error {
			switch {
			case !there:
				r.found(Fail, group, "oneo init", "the role %s is not there", name)
				return nil
			case !login:
				r.found(Fail, group, "alter role "+postgres.Quote(name)+" login", "the role %s may not log in", name)
			}
			if may != "" {
				r.found(Fail, group, "alter role "+postgres.Quote(name)+" nosuperuser nobypassrls nocreaterole nocreatedb noreplication noinherit, as a superuser",
					"%s serves requests, and is more than it should be: %s", name, may)
			} else if creates || temp {
				r.found(Fail, group, "oneo init", "%s serves requests, and may make tables in the database", name)
			}
			if owns {
				r.found(Fail, group, "reassign owned by "+postgres.Quote(name)+" to "+postgres.Quote(d.o.Config.Database.Roles.Owner), "%s serves requests, and owns tables", name)
			}
			if !path {
				pathless = append(pathless, name)
			}
			return nil
		}); err != nil {
			return err
		}
		// PostgreSQL's own roles see, read or end what is others'; and whoever can become the owner may all.
		const strong = `select m.rolname, pg_catalog.string_agg(distinct pg_catalog.quote_ident(g.rolname), ', ') from pg_catalog.pg_auth_members a join pg_catalog.pg_roles g on g.oid = a.roleid join pg_catalog.pg_roles m on m.oid = a.member
where m.rolname = any($1) and g.rolname <> all($1) and g.rolname not like $2
	and exists (select from pg_catalog.pg_roles s where (s.rolname like 'pg\_%' or s.rolname = current_user) and pg_catalog.pg_has_role(g.oid, s.oid, 'member')) group by 1 order by 1`
		var of string
		if rows, err = tx.Query(ctx, strong, names, ours(inst)); err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&name, &of}, func() error {
			r.found(Fail, group, "revoke "+of+" from "+postgres.Quote(name)+", as a superuser", "%s serves requests, and is a member of %s", name, of)
			return nil
		}); err != nil {
			return err
		}
		if len(pathless) > 0 {
			r.found(Warn, group, "oneo init", "a statement that forgets its tenant could find a table: the search path of %s is not empty", some(pathless))
		}
		var owner string
		var super bool
		if err := tx.QueryRow(ctx, `select current_user::text, rolsuper from pg_catalog.pg_roles where rolname = current_user`).Scan(&owner, &super); err != nil {
			return err
		}
		if super {
			r.found(Warn, group, "let database.owner_url log in as "+d.o.Config.Database.Roles.Owner+", which oneo init makes", "commands work as the superuser %s, and need not", owner)
		}
		r.ok("%d login(s)", len(inst.LoginNames()))
		return nil
	})
	return nil
}

func checkSight(ctx context.Context, d *Doctor, r *report) error {
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var owner string
		var lacks []string
		const ask = `select current_user::text, coalesce(pg_catalog.array_agg(r) filter (where not pg_catalog.pg_has_role(r, 'usage')), '{}') from pg_catalog.unnest($1::text[]) r`
		if err := tx.QueryRow(ctx, ask, postgres.Sight).Scan(&owner, &lacks); err != nil {
			return err
		}
		if len(lacks) > 0 {
			r.found(Warn, group, postgres.SightGrant(lacks, owner)+", as a superuser; or oneo init",
				"%s is no member of %s: of other sessions, and of where the data lie, oneo shows less than there is, or may not end them", owner, strings.Join(lacks, ", "))
		}
		return nil
	})
	r.ok("it does")
	return nil
}

func checkClosed(ctx context.Context, d *Doctor, r *report) error {
	const schemas = `select n.nspname, pg_catalog.lower(a.privilege_type), case when a.grantee = 0 then 'public' else g.rolname end, case when a.grantee = 0 then 'all' when g.rolname like $1 then 'tenant' else 'app' end
from pg_catalog.pg_namespace n cross join lateral pg_catalog.aclexplode(coalesce(n.nspacl, pg_catalog.acldefault('n', n.nspowner))) a left join pg_catalog.pg_roles g on g.oid = a.grantee
where n.nspname in ('public', 'ext') and a.grantee <> n.nspowner and (a.grantee = 0 or g.rolname like $1 or g.rolname = $2 or g.rolname = any($3)) order by 1, 3, 2`
	const tables = `select c.relname from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = 'ext' and c.relkind in ('r', 'p', 'm', 'f', 'v')
and not exists (select from pg_catalog.pg_depend e where e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and e.objid = c.oid and e.deptype = 'e') order by 1`
	// What an extension lets everybody see in public is seen by who may use that schema: the app role, and no tenant's.
	const open = `select distinct c.relname || ' to ' || case when a.grantee = 0 then 'everybody' else g.rolname end from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
cross join lateral pg_catalog.aclexplode(c.relacl) a left join pg_catalog.pg_roles g on g.oid = a.grantee where n.nspname = 'public' and (a.grantee = 0 or g.rolname like $1)
	and not exists (select from pg_catalog.pg_depend e where e.classid = 'pg_catalog.pg_class'::pg_catalog.regclass and e.objid = c.oid and e.deptype = 'e') order by 1`
	const database = `select (select pg_catalog.string_agg(pg_catalog.lower(a.privilege_type), ', ') from pg_catalog.aclexplode(coalesce(b.datacl, pg_catalog.acldefault('d', b.datdba))) a where a.grantee = 0),
	pg_catalog.to_regnamespace('ext') is not null
from pg_catalog.pg_database b where b.datname = pg_catalog.current_database()`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		inst, err := d.o.DB.Installation(ctx, group)
		if err != nil {
			return err
		}
		rows, err := tx.Query(ctx, schemas, ours(inst), inst.AppRole, inst.LoginNames())
		if err != nil {
			return err
		}
		var schema, what, to, kind string
		if _, err := pgx.ForEachRow(rows, []any{&schema, &what, &to, &kind}, func() error {
			if what == "usage" && (kind == "app" || schema == "ext") { // as oneo init gives it
				return nil
			}
			whom := to
			if kind == "all" {
				whom = "everybody"
			}
			revoke := "revoke " + what + " on schema " + schema + " from " + grantee(to)
			r.found(Fail, group, revoke, "the schema %s is open: %s has %s", schema, whom, what).by(d.script(group, revoke), "revoke %s on the schema %s from %s", what, schema, whom)
			return nil
		}); err != nil {
			return err
		}
		for _, q := range []struct{ sql, repair, message string }{
			{tables, "alter table ext.%s set schema ..., where it belongs", "the schema ext holds tables, which all tenants share: %s"},
			{open, "revoke all on table public.%s from public, or from the tenant's role", "tables of public are open: %s"},
		} {
			args := []any{}
			if strings.Contains(q.sql, "$1") {
				args = append(args, ours(inst))
			}
			if rows, err = tx.Query(ctx, q.sql, args...); err != nil {
				return err
			}
			names, err := pgx.CollectRows(rows, pgx.RowTo[string])
			if err != nil {
				return err
			}
			if len(names) > 0 {
				first, _, _ := strings.Cut(names[0], " ")
				r.found(Fail, group, fmt.Sprintf(q.repair, postgres.Quote(first)), q.message, some(names))
			}
		}
		var rights *string
		var ext bool
		if err := tx.QueryRow(ctx, database).Scan(&rights, &ext); err != nil {
			return err
		}
		if rights != nil {
			r.found(Fail, group, "oneo init", "the database is open: everybody has %s", *rights)
		}
		if !ext {
			r.found(Fail, group, "oneo init", "the schema ext is not there")
		}
		return nil
	})
	r.ok("closed")
	return nil
}

// meaning says what an isolation means.
var meaning = map[postgres.Isolation]string{
	postgres.ByRole:   "PostgreSQL itself refuses a query that names another tenant's table",
	postgres.BySchema: "only the search path separates tenants: a query that names another tenant's table finds it",
}

func checkIsolationMode(ctx context.Context, d *Doctor, r *report) error {
	w, err := d.places(ctx, r)
	if err != nil {
		return err
	}
	mode := d.o.DB.Isolation()
	for group, s := range w.groups {
		var other []string
		for _, p := range s.placements {
			if (p.role == s.inst.AppRole) != (mode == postgres.BySchema) {
				other = append(other, w.called(p.number))
			}
		}
		if len(other) == 0 {
			continue
		}
		if mode == postgres.ByRole {
			r.found(Fail, group, "oneo tenant export and import them, which makes them anew", "tenancy.isolation is role, and %d tenant(s) were made without a role of their own: only the search path separates them: %s", len(other), some(other))
		} else {
			r.found(Warn, group, "set tenancy.isolation to role, where the cluster allows it", "tenancy.isolation is schema, and %d tenant(s) have roles of their own: new ones will not: %s", len(other), some(other))
		}
	}
	r.ok("%s: %s; neither stops injected SQL inside a tenant", mode, meaning[mode])
	return nil
}

func checkDirectURL(ctx context.Context, d *Doctor, r *report) error {
	for _, group := range d.o.DB.Groups() {
		err := d.away(ctx, group)
		if err == nil {
			err = d.o.DB.OwnerSession(ctx, group, func(*postgres.Session) error { return nil })
		}
		if err == nil {
			continue
		}
		if f := fault.Of(err); f.Code == "direct_url_pooled" {
			r.found(Fail, group, f.Hint, "%s", f.Message)
		} else {
			r.unseen(group, err)
		}
	}
	r.ok("PostgreSQL itself")
	return nil
}

// connect connects by a URL as it is, without a pool. What it answers may hold the URL: it is not for people.
func connect(ctx context.Context, url string, change func(*pgx.ConnConfig)) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fault.New(fault.Invalid, "the database URL cannot be read").WithCode("bad_url")
	}
	c.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol // the one that a pooler's console speaks
	change(c)
	return pgx.ConnectConfig(ctx, c)
}

// bouncer is what a pooler says of itself.
type bouncer struct {
	version string // "PgBouncer 1.18.0"; empty: it does not say
	tracks  string // its track_extra_parameters
}

func checkPooler(ctx context.Context, d *Doctor, r *report) error {
	groups := d.o.Config.AllGroups()
	for _, group := range d.o.DB.Groups() {
		if err := d.away(ctx, group); err != nil {
			r.unseen(group, err)
			continue
		}
		b, pooled, err := askPooler(ctx, groups[group])
		switch {
		case err != nil:
			r.unseen(group, err)
		case pooled:
			judgePooler(r, group, b, d.o.Config.Database.Statements)
		}
	}
	r.ok("none in the way")
	return nil
}

// askPooler finds out whether there is one between the app role and PostgreSQL, and what it says.
func askPooler(ctx context.Context, g config.Group) (b bouncer, pooled bool, err error) {
	c, err := connect(ctx, g.URL, func(*pgx.ConnConfig) {})
	if err != nil {
		return b, false, err
	}
	defer c.Close(context.WithoutCancel(ctx))
	var pid uint32
	if err := c.QueryRow(ctx, `select pg_catalog.pg_backend_pid()`).Scan(&pid); err != nil || pid == c.PgConn().PID() {
		return b, false, err
	}
	console, err := connect(ctx, g.URL, func(c *pgx.ConnConfig) { c.Database = "pgbouncer" })
	if err != nil { // it lets only its administrators in
		return b, true, nil //nolint:nilerr // that it does not say is the finding
	}
	defer console.Close(context.WithoutCancel(ctx))
	if err := console.QueryRow(ctx, `show version`).Scan(&b.version); err != nil {
		return b, true, nil //nolint:nilerr // as above
	}
	rows, err := console.Query(ctx, `show config`)
	if err != nil {
		return b, true, nil //nolint:nilerr // as above
	}
	defer rows.Close()
	for rows.Next() {
		if v, err := rows.Values(); err == nil && len(v) > 1 && v[0] == "track_extra_parameters" {
			b.tracks, _ = v[1].(string)
		}
	}
	return b, true, nil
}

func judgePooler(r *report, group string, b bouncer, statements string) {
	var v [3]int
	if _, err := fmt.Sscanf(b.version, "PgBouncer %d.%d.%d", &v[0], &v[1], &v[2]); err != nil {
		r.found(Warn, group, "put the app role into stats_users of the pooler, or ask it yourself: show version",
			"a pooler stands between oneo and PostgreSQL, and does not say what it is; PgBouncer must be 1.25.2 or newer")
		return
	}
	found := len(r.findings)
	older := func(major, minor, patch int) bool { return slices.Compare(v[:], []int{major, minor, patch}) < 0 }
	if older(1, 21, 0) && statements == "prepared" {
		r.found(Fail, group, "install PgBouncer 1.25.2, or set database.statements to unprepared", "%s carries no prepared statements, and database.statements is prepared", b.version)
	}
	switch {
	case older(1, 25, 1) && strings.Contains(b.tracks, "search_path"):
		r.found(Fail, group, "install PgBouncer 1.25.2, or take search_path out of track_extra_parameters", "%s tracks search_path, by which anybody may run SQL before the login (CVE-2025-12819)", b.version)
	case older(1, 25, 2):
		r.found(Warn, group, "install PgBouncer 1.25.2", "%s has known faults: it can be crashed without a login (CVE-2026-6664)", b.version)
	}
	if len(r.findings) == found {
		r.ok("%s", b.version)
	}
}

// beside are connections of a server besides its pools: the listener of versions, and of schedules.
const beside = 4

func checkConnections(ctx context.Context, d *Doctor, r *report) error {
	var servers int
	err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(ctx, `select count(*) from public.instances where heartbeat >= pg_catalog.now() - $1::interval`, dead).Scan(&servers)
	})
	if err != nil {
		return err
	}
	servers = max(servers, 1)
	c := d.o.Config.Database
	each := c.MaxConns + c.SharedConns + c.OwnerConns + beside
	type cluster struct {
		groups []string
		may    int
	}
	clusters := map[string]*cluster{} // several groups may be on one server
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		const ask = `select pg_catalog.pg_postmaster_start_time()::text || coalesce(pg_catalog.inet_server_port()::text, ''),
	pg_catalog.current_setting('max_connections')::int - pg_catalog.current_setting('superuser_reserved_connections')::int - coalesce(pg_catalog.current_setting('reserved_connections', true), '0')::int`
		var id string
		var may int
		if err := tx.QueryRow(ctx, ask).Scan(&id, &may); err != nil {
			return err
		}
		if clusters[id] == nil {
			clusters[id] = &cluster{may: may}
		}
		clusters[id].groups = append(clusters[id].groups, group)
		return nil
	})
	for _, id := range slices.Sorted(maps.Keys(clusters)) {
		cl := clusters[id]
		one, want := len(cl.groups)*each, servers*len(cl.groups)*each
		repair := "raise max_connections of PostgreSQL, lower database.max_conns, or put a pooler before it"
		switch where := strings.Join(cl.groups, ", "); {
		case one > cl.may:
			r.found(Fail, where, repair, "one server may ask for %d connections, and PostgreSQL gives %d", one, cl.may)
		case want > cl.may:
			r.found(Warn, where, repair, "%d servers may ask for %d connections, and PostgreSQL gives %d", servers, want, cl.may)
		default:
			r.ok("%d server(s) ask for at most %d of %d", servers, want, cl.may)
		}
	}
	return nil
}

func checkLockTable(ctx context.Context, d *Doctor, r *report) error {
	// A transaction that drops or migrates a tenant locks its tables, their indexes, and what hangs on them: about three
	// for each relation, as measured.
	const ask = `select pg_catalog.current_setting('max_locks_per_transaction')::int * (pg_catalog.current_setting('max_connections')::int + pg_catalog.current_setting('max_prepared_transactions')::int),
	coalesce((select max(n) from (select count(*) n from pg_catalog.pg_class c join public.placements p on p.namespace = c.relnamespace group by p.number) t), 0)`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var locks, relations int
		if err := tx.QueryRow(ctx, ask).Scan(&locks, &relations); err != nil {
			return err
		}
		judgeLocks(r, group, locks, 3*relations)
		return nil
	})
	return nil
}

func judgeLocks(r *report, group string, locks, each int) {
	const repair = "raise max_locks_per_transaction of PostgreSQL, and restart it"
	switch {
	case each > locks:
		r.found(Fail, group, repair, "the largest tenant takes about %d locks in one transaction, and there are %d in all", each, locks)
	case 4*each > locks: // as many as are at work at one time
		r.found(Warn, group, repair, "work on four tenants of the largest kind takes about %d locks, and there are %d in all", 4*each, locks)
	default:
		r.ok("%d locks; the largest tenant takes about %d", locks, each)
	}
}

func checkSessions(ctx context.Context, d *Doctor, r *report) error {
	const still = `select a.pid, coalesce(a.usename, ''), pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - a.state_change)::text from pg_catalog.pg_stat_activity a
where a.datname = pg_catalog.current_database() and a.state like 'idle in transaction%' and a.state_change < pg_catalog.clock_timestamp() - $1::interval order by a.state_change`
	// Also those of others, whose state may be hidden: that somebody waits is not.
	const waits = `select h.pid, count(distinct l.pid), pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - min(l.waitstart))::text from pg_catalog.pg_locks l cross join lateral pg_catalog.unnest(pg_catalog.pg_blocking_pids(l.pid)) h (pid)
where not l.granted and l.waitstart < pg_catalog.clock_timestamp() - least($1::interval, interval '1 minute') and h.pid <> 0 group by h.pid order by 1`
	// The operation lock is held for as long as the work takes; by a session that does nothing it was forgotten.
	const held = `select l.pid, l.objid::int, pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - a.state_change)::text from pg_catalog.pg_locks l join pg_catalog.pg_stat_activity a on a.pid = l.pid
where l.locktype = 'advisory' and l.classid = $2::int::oid and l.objsubid = 2 and l.granted and l.database = (select b.oid from pg_catalog.pg_database b where b.datname = pg_catalog.current_database())
	and a.state = 'idle' and a.state_change < pg_catalog.clock_timestamp() - $1::interval order by 1`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var pid, n int32
		var name, since string
		end := func() string { return "select pg_terminate_backend(" + itoa(pid) + ")" }
		rows, err := tx.Query(ctx, still, d.idle)
		if err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&pid, &name, &since}, func() error {
			r.found(Warn, group, end(), "the session %d of %s has stood still in a transaction for %s", pid, name, since)
			return nil
		}); err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, waits, d.idle); err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&pid, &n, &since}, func() error {
			r.found(Warn, group, end()+", or wait", "%d session(s) wait for the session %d, for %s", n, pid, since)
			return nil
		}); err != nil {
			return err
		}
		if rows, err = tx.Query(ctx, held, d.idle, postgres.OperationLock); err != nil {
			return err
		}
		if _, err := pgx.ForEachRow(rows, []any{&pid, &n, &since}, func() error {
			r.found(Warn, group, end(), "the session %d holds the operation lock of tenant number %d and has done nothing for %s", pid, n, since)
			return nil
		}); err != nil {
			return err
		}
		var sees bool
		if err := tx.QueryRow(ctx, `select pg_catalog.pg_has_role('pg_read_all_stats', 'usage')`).Scan(&sees); err != nil {
			return err
		}
		if !sees {
			r.ok("sessions of other roles are seen only where somebody waits for them: see the check sight")
		}
		return nil
	})
	r.ok("none stands still with locks")
	return nil
}

func checkPrepared(ctx context.Context, d *Doctor, r *report) error {
	const list = `select gid, owner::text, pg_catalog.date_trunc('second', pg_catalog.clock_timestamp() - prepared)::text from pg_catalog.pg_prepared_xacts
where database = pg_catalog.current_database() and prepared < pg_catalog.clock_timestamp() - $1::interval order by prepared`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list, d.idle)
		if err != nil {
			return err
		}
		var gid, owner, since string
		_, err = pgx.ForEachRow(rows, []any{&gid, &owner, &since}, func() error {
			r.found(Warn, group, "rollback prepared '"+strings.ReplaceAll(gid, "'", "''")+"', or commit it: whoever made it knows",
				"the prepared transaction %s of %s holds its locks, and vacuum back, for %s", gid, owner, since)
			return nil
		})
		return err
	})
	r.ok("none")
	return nil
}

func checkSlots(ctx context.Context, d *Doctor, r *report) error {
	const list = `select slot_name::text, coalesce(pg_catalog.pg_wal_lsn_diff(case when pg_catalog.pg_is_in_recovery() then pg_catalog.pg_last_wal_replay_lsn() else pg_catalog.pg_current_wal_lsn() end, restart_lsn), 0)::int8, coalesce(wal_status, '')
from pg_catalog.pg_replication_slots where not active and not temporary order by 1`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list)
		if err != nil {
			return err
		}
		var name, status string
		var kept int64
		_, err = pgx.ForEachRow(rows, []any{&name, &kept, &status}, func() error {
			r.found(Warn, group, "select pg_drop_replication_slot('"+strings.ReplaceAll(name, "'", "''")+"'), if its reader does not come back",
				"nobody reads the replication slot %s, which keeps %s of the log (%s)", name, size(kept), status)
			return nil
		})
		return err
	})
	r.ok("none without a reader")
	return nil
}

// size is a number of bytes for people.
func size(n int64) string {
	switch {
	case n >= 10<<30:
		return fmt.Sprintf("%d GB", n>>30)
	case n >= 1<<20:
		return fmt.Sprintf("%d MB", n>>20)
	}
	return fmt.Sprintf("%d kB", (n+1023)>>10)
}

// reindexed are the names that PostgreSQL gives to what it makes, or puts aside, in a reindex.
var reindexed = regexp.MustCompile(`_cc(new|old)[0-9]*$`)

func checkIndexes(ctx context.Context, d *Doctor, r *report) error {
	// One that is being built just now is invalid as well, and so is one whose migration goes on where it stopped.
	const list = `select n.nspname, c.relname, coalesce(p.number, 0), p.number is not null and exists (select from public.progress g where g.tenant = p.number)
from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace left join public.placements p on p.namespace = n.oid
where not (i.indisvalid and i.indisready) and c.relkind = 'i' and (p.number is not null or n.nspname in ('public', 'ext'))
	and not exists (select from pg_catalog.pg_stat_progress_create_index b where b.index_relid = i.indexrelid or b.relid = i.indrelid)
	and not exists (select from pg_catalog.pg_locks l where l.locktype = 'relation' and l.relation = i.indrelid and l.mode = 'ShareUpdateExclusiveLock')
order by 1, 2`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, list)
		if err != nil {
			return err
		}
		var schema, name string
		var number int32
		var migrates bool
		_, err = pgx.ForEachRow(rows, []any{&schema, &name, &number, &migrates}, func() error {
			full := postgres.Quote(schema) + "." + postgres.Quote(name)
			if migrates {
				r.found(Warn, group, "oneo migrate --all-tenants, which makes it anew", "the index %s was left half-made by a migration that has not ended", full)
				return nil
			}
			sql := "reindex index concurrently " + full
			if reindexed.MatchString(name) { // what an interrupted reindex has left
				sql = "drop index concurrently " + full
			}
			f := r.found(Fail, group, sql, "the index %s is invalid: it is tended, and no query uses it", full)
			f.by(func(ctx context.Context) error { return d.mendIndex(ctx, group, number, schema, name, sql) }, "%s", sql)
			f.fix.long = true
			return nil
		})
		return err
	})
	r.ok("all valid")
	return nil
}

// mendIndex makes an index anew, beside whoever uses the table, while no other operation is at work on the tenant.
func (d *Doctor) mendIndex(ctx context.Context, group string, number int32, schema, name, sql string) error {
	return d.o.DB.OwnerSession(ctx, group, func(s *postgres.Session) error {
		if number != 0 {
			if err := s.LockOperation(ctx, number, time.Second); err != nil {
				return err
			}
		}
		const still = `select exists (select from pg_catalog.pg_index i join pg_catalog.pg_class c on c.oid = i.indexrelid join pg_catalog.pg_namespace n on n.oid = c.relnamespace
where n.nspname = $1 and c.relname = $2 and not (i.indisvalid and i.indisready))`
		var is bool
		if err := s.QueryRow(ctx, still, schema, name).Scan(&is); err != nil || !is {
			return err
		}
		return s.Script(ctx, sql)
	})
}

func checkVacuum(ctx context.Context, d *Doctor, r *report) error {
	const ask = `select pg_catalog.current_setting('autovacuum')::bool, pg_catalog.current_setting('autovacuum_freeze_max_age')::int8, pg_catalog.age(datfrozenxid)::int8,
	pg_catalog.current_setting('autovacuum_multixact_freeze_max_age')::int8, pg_catalog.mxid_age(datminmxid)::int8
from pg_catalog.pg_database where datname = pg_catalog.current_database()`
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var on bool
		var most, age, mostMulti, ageMulti int64
		if err := tx.QueryRow(ctx, ask).Scan(&on, &most, &age, &mostMulti, &ageMulti); err != nil {
			return err
		}
		if !on {
			r.found(Fail, group, "alter system set autovacuum to on; select pg_reload_conf()", "autovacuum is off: tables grow, and statements are planned by old numbers")
		}
		judgeAge(r, group, "transactions", age, most)
		judgeAge(r, group, "multixacts", ageMulti, mostMulti)
		return nil
	})
	return nil
}

// stops is the age at which PostgreSQL takes no more writes.
const stops = 2_000_000_000

// judgeAge compares the age of the oldest row that vacuum has not frozen with the age at which it begins to by force.
func judgeAge(r *report, group, what string, age, most int64) {
	const repair = "find out what holds vacuum back (oneo doctor --only sessions,prepared-transactions,slots), then: vacuumdb --all --freeze"
	switch {
	case age > stops*3/4:
		r.found(Fail, group, repair, "PostgreSQL takes no more writes in %d million %s: the oldest row is %d million old", (stops-age)/1_000_000, what, age/1_000_000)
	case age > most+most/2:
		r.found(Warn, group, repair, "vacuum does not keep up: the oldest row is %d million %s old, and is to be %d at most", age/1_000_000, what, most/1_000_000)
	default:
		r.ok("the oldest row is %d million %s old, of %d", age/1_000_000, what, most/1_000_000)
	}
}

// measured is the largest catalogue with which oneo was measured: 5,000 tenants of 52 relations.
const measured = 260_000

func checkRoom(ctx context.Context, d *Doctor, r *report) error {
	const ask = `select (select count(*) from pg_catalog.pg_class), (select count(*) from public.placements),
	(select count(*) from pg_catalog.pg_class c join public.placements p on p.namespace = c.relnamespace), pg_catalog.pg_database_size(pg_catalog.current_database()),
	(select pg_catalog.pg_total_relation_size('pg_catalog.pg_class') + pg_catalog.pg_total_relation_size('pg_catalog.pg_attribute') + pg_catalog.pg_total_relation_size('pg_catalog.pg_depend') + pg_catalog.pg_total_relation_size('pg_catalog.pg_statistic'))`
	limits := map[string]*int64{}
	counts := map[string]int64{}
	err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		rows, err := tx.Query(ctx, `select g.name, g.max_tenants::int8, (select count(*) from public.tenants t where t.group_name = g.name and t.state <> 'purged') from public.groups g`)
		if err != nil {
			return err
		}
		var name string
		var most *int64
		var n int64
		_, err = pgx.ForEachRow(rows, []any{&name, &most, &n}, func() error { limits[name], counts[name] = most, n; return nil })
		return err
	})
	if err != nil {
		return err
	}
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		var relations, tenants, theirs, bytes, catalogue int64
		if err := tx.QueryRow(ctx, ask).Scan(&relations, &tenants, &theirs, &bytes, &catalogue); err != nil {
			return err
		}
		if most := limits[group]; most != nil && counts[group] >= *most {
			r.found(Warn, group, "raise max_tenants of the group in public.groups, or make another group", "the group is full: %d of %d tenants", counts[group], *most)
		}
		judgeRoom(r, group, relations, tenants, theirs, bytes, catalogue)
		return nil
	})
	return nil
}

func judgeRoom(r *report, group string, relations, tenants, theirs, bytes, catalogue int64) {
	if tenants == 0 || theirs == 0 {
		r.ok("%s; no tenants yet", size(bytes))
		return
	}
	each := max(theirs/tenants, 1)
	if relations >= measured {
		r.found(Warn, group, "put new tenants into another group", "the catalogue has %d relations, more than oneo was measured with (%d): connections take more memory, and what asks the catalogue takes longer", relations, measured)
		return
	}
	r.ok("room for about %s more of this shape: %d tenants have %d relations each, in %s with a catalogue of %s", thousands((measured-relations)/each), tenants, each, size(bytes), size(catalogue))
}

func thousands(n int64) string {
	s := fmt.Sprint(n)
	for at := len(s) - 3; at > 0; at -= 3 {
		s = s[:at] + "," + s[at:]
	}
	return s
}

func checkDisk(ctx context.Context, d *Doctor, r *report) error {
	groups := d.o.Config.AllGroups()
	unknown := ""
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		// The row is hidden from who may not see the setting.
		var dir string
		var files, tenants int64
		err := tx.QueryRow(ctx, `select coalesce((select setting from pg_catalog.pg_settings where name = 'data_directory'), ''),
	(select count(*) from pg_catalog.pg_class c join public.placements p on p.namespace = c.relnamespace where c.relfilenode <> 0), (select count(*) from public.placements)`).Scan(&dir, &files, &tenants)
		if err != nil {
			return err
		}
		switch {
		case !local(groups[group].URL):
			unknown = "the server is on another machine: look there"
			return nil
		case dir == "":
			unknown = "the server does not say where its data is: see the check sight"
			return nil
		}
		of, err := diskOf(dir)
		if err != nil {
			unknown = "the server's folder cannot be looked at from here"
			return nil //nolint:nilerr // it is the server's
		}
		judgeDisk(r, group, of, files, tenants)
		return nil
	})
	if unknown != "" && len(r.findings) == 0 && len(r.seen) == 0 {
		r.skip("%s", unknown)
	}
	return nil
}

type disk struct{ free, size, inodes, allInodes int64 } // bytes and files

// diskOf looks at the one on which a folder lies.
func diskOf(dir string) (disk, error) {
	var st syscall.Statfs_t
	err := syscall.Statfs(dir, &st)
	return disk{free: int64(st.Bavail) * st.Bsize, size: int64(st.Blocks) * st.Bsize, inodes: int64(st.Ffree), allInodes: int64(st.Files)}, err //nolint:gosec // sizes of disks
}

func judgeDisk(r *report, group string, d disk, files, tenants int64) {
	const repair = "make the disk larger, or move tenants to another group (oneo tenant move)"
	share := func(free, all int64) int64 {
		if all == 0 { // a file system without a bound
			return 100
		}
		return free * 100 / all
	}
	before := len(r.findings)
	for _, of := range []struct {
		what string
		left int64
		text string
	}{{"bytes", share(d.free, d.size), size(d.free)}, {"files", share(d.inodes, d.allInodes), thousands(d.inodes)}} {
		switch {
		case of.left < 5:
			r.found(Fail, group, repair, "%d %% of the disk's %s are left (%s)", of.left, of.what, of.text)
		case of.left < 15:
			r.found(Warn, group, repair, "%d %% of the disk's %s are left (%s)", of.left, of.what, of.text)
		}
	}
	if len(r.findings) > before {
		return
	}
	text := size(d.free) + " free"
	if tenants > 0 && files > 0 && d.allInodes > 0 {
		text += ", and files for about " + thousands(d.inodes/max(files/tenants, 1)) + " more tenants of this shape"
	}
	r.ok("%s", text)
}

// local reports whether a URL leads to this machine.
func local(url string) bool {
	c, err := pgx.ParseConfig(url)
	if err != nil {
		return false
	}
	return strings.HasPrefix(c.Host, "/") || localHost(c.Host)
}

func localHost(host string) bool {
	if ip, err := netip.ParseAddr(strings.Trim(host, "[]")); err == nil {
		return ip.IsLoopback()
	}
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// moment is a time by somebody else's clock, and between which times of ours it was.
type moment struct {
	theirs        time.Time
	before, after time.Time
	grain         time.Duration // to which theirs is cut
}

func checkClock(ctx context.Context, d *Doctor, r *report) error {
	d.each(ctx, r, func(group string, tx *postgres.OwnerTx) error {
		m := moment{before: d.o.Now()}
		if err := tx.QueryRow(ctx, `select pg_catalog.clock_timestamp()`).Scan(&m.theirs); err != nil {
			return err
		}
		m.after = d.o.Now()
		judgeClock(r, group, "PostgreSQL", m)
		return nil
	})
	return nil
}

// judgeClock says by how much a clock differs from this machine's. What the way there and back took tells nothing.
func judgeClock(r *report, group, whose string, m moment) {
	ahead := m.theirs.Sub(m.after)
	if behind := m.before.Sub(m.theirs.Add(m.grain)); behind > ahead {
		ahead = -behind
	}
	by := max(ahead, -ahead).Round(100 * time.Millisecond)
	word := "ahead of"
	if ahead < 0 {
		word = "behind"
	}
	if m.theirs.Add(m.grain).After(m.before) && m.theirs.Before(m.after) {
		by = 0
	}
	const repair = "let both machines keep time by NTP (chronyc tracking, timedatectl)"
	switch {
	case by > 30*time.Second:
		r.found(Fail, group, repair, "the clock of %s is %s %s this machine's", whose, by, word)
	case by > 2*time.Second:
		r.found(Warn, group, repair, "the clock of %s is %s %s this machine's", whose, by, word)
	default:
		r.ok("within two seconds")
	}
}
