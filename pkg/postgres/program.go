package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// ProgramOptions says whose rights a program is to have.
type ProgramOptions struct {
	Tenant tenant.Tenant // zero: the shared schema of the main group
	Owner  bool          // with the owner's rights, instead of the tenant's or, on the shared schema, the app role's
}

// Program is how a program of an operator's connects by itself: past any pooler, with the search path and the role set
// by the start of its session. Unlike a bound transaction it holds no gate, and a program that means to can leave the
// role. It holds a password: it is printed as the place that it leads to.
type Program struct {
	Tenant tenant.Tenant
	Schema string // as it stands in the placement
	State  string // of the placement: active or suspended; empty for the shared schema

	config   *pgconn.Config
	settings map[string]string // of the connection URL, and not in config in the form that libpq wants
	user     string
	password string
	options  []string // NAME=VALUE, for the server
}

// Program reads where the tenant stands and how a program gets there. Gone: it has been removed. It does not mind whether the
// tenant is suspended.
func (db *DB) Program(ctx context.Context, o ProgramOptions) (Program, error) {
	p := Program{Tenant: o.Tenant, Schema: "public"}
	name := MainGroup
	if !o.Tenant.IsZero() {
		name = o.Tenant.Group
	}
	g, err := db.group(name)
	if err != nil {
		return p, err
	}
	app, err := pgconn.ParseConfig(g.urls.URL)
	if err == nil {
		p.config, err = pgconn.ParseConfig(g.urls.DirectURL)
	}
	if err != nil {
		return p, fault.New(fault.Invalid, "the connection URL of group %s cannot be read", name) // err may quote the password
	}
	p.settings = settingsOf(g.urls.DirectURL)
	p.user, p.password = app.User, app.Password
	role := ""
	if !o.Tenant.IsZero() {
		inst, err := g.installation(ctx)
		if err != nil {
			return p, err
		}
		if inst.Logins > 0 {
			p.user = inst.LoginOf(o.Tenant.Number)
			p.password = LoginPassword(db.opts.Secret, p.user)
		}
		if p.Schema, role, p.State, err = g.placed(ctx, o.Tenant.Number); err != nil {
			return p, withTenant(err, o.Tenant)
		}
	}
	p.options = append(p.options, "search_path="+Quote(p.Schema)+",ext,pg_temp")
	switch {
	case o.Owner:
		p.user, p.password = p.config.User, p.config.Password
	case role != "" && role != p.user:
		p.options = append(p.options, "role="+role)
	}
	return p, nil
}

// placed reads where a tenant stands.
func (g *group) placed(ctx context.Context, number int32) (schema, role, state string, err error) {
	pool, err := g.sharedPool()
	if err != nil {
		return "", "", "", err
	}
	const placed = `select p.schema, p.role, case when p.moving is null then p.state else 'moved' end from public.placements p
join pg_catalog.pg_namespace n on n.nspname = p.schema and n.oid = p.namespace where p.number = $1`
	err = retryLost(ctx, g.opts.AcquireTimeout, pool.Reset, func(ctx context.Context) error {
		return pool.QueryRow(ctx, placed, outsideTx, number).Scan(&schema, &role, &state)
	})
	if errors.Is(err, pgx.ErrNoRows) {
		return "", "", "", fault.New(fault.NotFound, "the tenant's schema is not where the registry says").WithCode("schema_missing")
	}
	if err == nil && state == "moved" {
		return "", "", "", moving(nil)
	}
	if err == nil && state != string(tenant.Active) && state != string(tenant.Suspended) {
		return "", "", "", fault.New(fault.Gone, "this tenant has been removed").WithCode("tenant_gone")
	}
	return schema, role, state, Fault(err)
}

// String is where the program is led, without the password.
func (p Program) String() string { return p.user + "@" + place(p.config) }

// GoString is String.
func (p Program) GoString() string { return p.String() }

// programEnv are the variables of libpq for the settings of a connection URL.
var programEnv = map[string]string{
	"sslmode": "PGSSLMODE", "sslcert": "PGSSLCERT", "sslkey": "PGSSLKEY", "sslrootcert": "PGSSLROOTCERT", "sslcrl": "PGSSLCRL",
	"sslsni": "PGSSLSNI", "sslnegotiation": "PGSSLNEGOTIATION", "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
	"ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION", "channel_binding": "PGCHANNELBINDING", "gssencmode": "PGGSSENCMODE",
	"krbsrvname": "PGKRBSRVNAME", "require_auth": "PGREQUIREAUTH", "requirepeer": "PGREQUIREPEER",
	"connect_timeout": "PGCONNECT_TIMEOUT", "target_session_attrs": "PGTARGETSESSIONATTRS", "client_encoding": "PGCLIENTENCODING",
}

// otherServer are the variables that would lead a program elsewhere, or let it in as somebody else.
var otherServer = []string{"PGSERVICE", "PGSERVICEFILE", "PGHOSTADDR", "PGPASSFILE", "PGPASSWORD", "PGOPTIONS", "DATABASE_URL"}

// Env is the environment of the program: environ without what oneo itself is configured by, and with
// the variables of libpq, DATABASE_URL and ONEO_TENANT, ONEO_TENANT_SCHEMA, ONEO_TENANT_NUMBER and ONEO_TENANT_GROUP.
func (p Program) Env(environ []string) []string {
	hosts, ports := p.hosts()
	set := map[string]string{
		"PGHOST": strings.Join(hosts, ","), "PGPORT": strings.Join(ports, ","), "PGUSER": p.user, "PGDATABASE": p.config.Database,
		"PGOPTIONS": p.serverOptions(), "PGAPPNAME": "oneo", "DATABASE_URL": p.URL(),
	}
	if p.password != "" {
		set["PGPASSWORD"] = p.password
	}
	for name, value := range p.settings {
		if variable, ok := programEnv[name]; ok {
			set[variable] = value
		}
	}
	if !p.Tenant.IsZero() {
		set["ONEO_TENANT"], set["ONEO_TENANT_SCHEMA"] = p.Tenant.Slug.String(), p.Schema
		set["ONEO_TENANT_NUMBER"], set["ONEO_TENANT_GROUP"] = strconv.Itoa(int(p.Tenant.Number)), p.Tenant.Group
	}
	var env []string
	for _, kv := range environ {
		name, _, _ := strings.Cut(kv, "=")
		if _, ours := set[name]; !ours && !strings.HasPrefix(name, "ONEO_") && name != "REDIS_URL" && !slices.Contains(otherServer, name) {
			env = append(env, kv)
		}
	}
	for name, value := range set {
		env = append(env, name+"="+value)
	}
	return env
}

// URL is the connection as one URL, with the password in it.
func (p Program) URL() string {
	query := url.Values{"options": {p.serverOptions()}, "application_name": {"oneo"}}
	for name, value := range p.settings {
		if _, ok := programEnv[name]; ok {
			query.Set(name, value)
		}
	}
	u := url.URL{Scheme: "postgres", Path: "/" + p.config.Database, User: url.User(p.user)}
	if p.password != "" {
		u.User = url.UserPassword(p.user, p.password)
	}
	hosts, ports := p.hosts()
	if slices.ContainsFunc(hosts, func(h string) bool { return strings.HasPrefix(h, "/") }) {
		query.Set("host", strings.Join(hosts, ","))
		query.Set("port", strings.Join(ports, ","))
	} else {
		pairs := make([]string, len(hosts))
		for i := range hosts {
			pairs[i] = net.JoinHostPort(hosts[i], ports[i])
		}
		u.Host = strings.Join(pairs, ",")
	}
	// libpq takes a plus sign for what it is.
	u.RawQuery = strings.ReplaceAll(query.Encode(), "+", "%20")
	return u.String()
}

// hosts are the servers to try, in their order.
func (p Program) hosts() (hosts, ports []string) {
	add := func(host string, port uint16) {
		number := strconv.Itoa(int(port))
		for i := range hosts {
			if hosts[i] == host && ports[i] == number {
				return
			}
		}
		hosts, ports = append(hosts, host), append(ports, number)
	}
	add(p.config.Host, p.config.Port)
	for _, f := range p.config.Fallbacks { // with and without TLS is the same place twice
		add(f.Host, f.Port)
	}
	return hosts, ports
}

// serverOptions are the settings as the server reads them from a client: split at white space, behind a backslash not.
func (p Program) serverOptions() string {
	escape := strings.NewReplacer(`\`, `\\`, " ", `\ `)
	all := make([]string, len(p.options))
	for i, o := range p.options {
		all[i] = "-c " + escape.Replace(o)
	}
	if given := p.settings["options"]; given != "" {
		all = append([]string{given}, all...)
	}
	return strings.Join(all, " ")
}

// settingsOf are the settings of a connection URL, or of a line of names and values, that pgx keeps in a form of its own.
func settingsOf(conn string) map[string]string {
	settings := map[string]string{}
	if u, err := url.Parse(conn); err == nil && (u.Scheme == "postgres" || u.Scheme == "postgresql") {
		for name, values := range u.Query() {
			settings[name] = values[0]
		}
		return settings
	}
	for rest := strings.TrimSpace(conn); rest != ""; rest = strings.TrimSpace(rest) {
		name, value, ok := strings.Cut(rest, "=")
		if !ok {
			break
		}
		value = strings.TrimLeft(value, " \t\r\n")
		var b strings.Builder
		quoted := strings.HasPrefix(value, "'")
		i := 0
		if quoted {
			i = 1
		}
	read:
		for ; i < len(value); i++ {
			switch c := value[i]; {
			case c == '\\' && i+1 < len(value):
				i++
				b.WriteByte(value[i])
			case quoted && c == '\'':
				i++
				break read
			case !quoted && strings.IndexByte(" \t\r\n", c) >= 0:
				break read
			default:
				b.WriteByte(c)
			}
		}
		settings[strings.TrimSpace(name)], rest = b.String(), value[i:]
	}
	return settings
}

var _ fmt.GoStringer = Program{}
