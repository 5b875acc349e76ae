package doctor

import (
	"context"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
)

var settingChecks = []Check{
	{Name: "secret", Group: Configuration, About: "server.secret is set and cannot be guessed", run: checkSecret},
	{Name: "database-urls", Group: Configuration, About: "the owner and the app role log in as two different roles, over a way that nobody reads", run: checkURLs},
	{Name: "config-file", Group: Configuration, About: "files with secrets in them are readable by their owner alone", run: checkFile},
	{Name: "ops-addr", Group: Configuration, About: "server.ops_addr is not open to everybody", run: checkOpsAddr},
	{Name: "trusted-proxies", Group: Configuration, About: "not everybody may say which host was asked for", run: checkProxies},
	{Name: "public-url", Group: Configuration, About: "the outside is reached over https", run: checkPublicURL},
}

// published are the secrets that stand in files of this repository.
var published = []string{"a-secret-for-a-try-on-one-machine-only"}

func checkSecret(_ context.Context, d *Doctor, r *report) error {
	s := d.o.Config.Server.Secret
	const repair = "openssl rand -hex 32 makes one; then oneo init again, which gives the logins their passwords"
	distinct := map[rune]bool{}
	for _, c := range s {
		distinct[c] = true
	}
	switch {
	case len(s) < config.MinSecretBytes:
		r.found(Fail, "", repair, "server.secret is not set, or too short: servers do not start without it")
	case slices.Contains(published, s):
		r.found(Fail, "", repair, "server.secret is the one that everybody can read in docker-compose.yml")
	case len(distinct) < 10:
		r.found(Warn, "", repair, "server.secret has only %d different characters: it can be guessed", len(distinct))
	}
	r.ok("%d bytes, from the %s", len(s), d.origin("server.secret"))
	return nil
}

// origin is where a setting comes from.
func (d *Doctor) origin(key string) string {
	if o := d.o.Origins[key]; o != "" {
		return o
	}
	return "configuration"
}

func checkURLs(_ context.Context, d *Doctor, r *report) error {
	all := d.o.Config.AllGroups()
	for _, group := range d.o.DB.Groups() {
		g := all[group]
		app, err := pgx.ParseConfig(g.URL)
		if err != nil {
			return fault.New(fault.Invalid, "the database URL of group %s cannot be read", group) // err may hold the password
		}
		owner, err := pgx.ParseConfig(g.OwnerURL)
		if err != nil {
			return fault.New(fault.Invalid, "the owner's URL of group %s cannot be read", group)
		}
		key := "database"
		if group != config.MainGroup {
			key = "database.groups." + group
		}
		if app.User == owner.User {
			if app.User == d.o.Config.Database.Roles.App {
				r.found(Warn, group, "set "+config.EnvName(key+".owner_url")+" for the server that is to carry out operations, and for commands",
					"%s.owner_url is not set, or logs in as the app role: tenants can be served, and not made or changed", key)
			} else {
				r.found(Fail, group, "let "+key+".url log in as "+d.o.Config.Database.Roles.App+", which oneo init makes",
					"requests are served with the rights of %s, who owns all tenants' tables", app.User)
			}
		}
		for _, c := range []*pgx.ConnConfig{app, owner} {
			if c.TLSConfig == nil && !strings.HasPrefix(c.Host, "/") && !localHost(c.Host) {
				r.found(Warn, group, "add sslmode=verify-full to the URL", "the way to PostgreSQL at %s is not encrypted", c.Host)
				break
			}
		}
	}
	r.ok("two roles")
	return nil
}

func checkFile(_ context.Context, d *Doctor, r *report) error {
	looked := 0
	for _, key := range []string{"server.secret", "database.url", "database.owner_url", "database.direct_url", "redis.url"} {
		path, ok := strings.CutPrefix(d.origin(key), "file ")
		if !ok {
			continue
		}
		st, err := os.Stat(path)
		if err != nil { // it was read a moment ago
			continue
		}
		looked++
		if st.Mode().Perm()&0o004 != 0 {
			r.found(Warn, "", "chmod o-rwx "+path, "everybody on this machine can read %s in %s", key, path)
		}
	}
	if looked == 0 {
		r.ok("no secret is in a file")
	} else {
		r.ok("%d secret(s) in files that not everybody can read", looked)
	}
	return nil
}

func checkOpsAddr(_ context.Context, d *Doctor, r *report) error {
	addr := d.o.Config.Server.OpsAddr
	host, _, err := net.SplitHostPort(addr)
	if addr == "" || err != nil {
		r.skip("there is no such listener")
		return nil //nolint:nilerr // serve refuses it
	}
	ip, perr := netip.ParseAddr(host)
	const repair = "set server.ops_addr to 127.0.0.1:8001, or to an address of a private network"
	switch {
	case host == "" || perr == nil && ip.IsUnspecified():
		r.found(Warn, "", repair, "server.ops_addr (%s) listens on every network of this machine: profiles and metrics are for operators", addr)
	case perr == nil && !ip.IsLoopback() && !ip.IsPrivate() && !ip.IsLinkLocalUnicast():
		r.found(Fail, "", repair, "server.ops_addr (%s) is a public address: everybody can read profiles and metrics", addr)
	default:
		r.ok("%s", addr)
	}
	return nil
}

func checkProxies(_ context.Context, d *Doctor, r *report) error {
	for _, p := range d.o.Config.Server.TrustedProxies {
		prefix, err := netip.ParsePrefix(p)
		if err != nil { // validated
			continue
		}
		switch wide := prefix.Bits(); {
		case wide == 0:
			r.found(Fail, "", "name the proxies' own addresses in server.trusted_proxies", "everybody may say which host was asked for and who asks: server.trusted_proxies has %s", p)
		case wide < 8:
			r.found(Warn, "", "name the proxies' own addresses in server.trusted_proxies", "server.trusted_proxies has %s, which is a good part of the internet", p)
		}
	}
	r.ok("%d network(s)", len(d.o.Config.Server.TrustedProxies))
	return nil
}

func checkPublicURL(_ context.Context, d *Doctor, r *report) error {
	u, err := url.Parse(d.o.Config.Server.PublicURL)
	if err != nil { // validated
		return fault.New(fault.Invalid, "server.public_url cannot be read")
	}
	if u.Scheme == "http" && !localHost(u.Hostname()) {
		r.found(Warn, "", "put a proxy with certificates before oneo, and set server.public_url to https://"+u.Host, "server.public_url is http: browsers keep no session without https, and passwords can be read on the way")
	}
	r.ok("%s://%s", u.Scheme, u.Host)
	return nil
}
