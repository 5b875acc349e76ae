package doctor

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// IsolationOptions is what a proof of isolation works with.
type IsolationOptions struct {
	DB *postgres.DB // the installation's own, for the owner's work
	// Open opens the databases as a server does, with the same URLs, poolers and logins, but with one connection for each login: what one
	// tenant leaves behind is met by the other.
	Open      func() (*postgres.DB, error)
	Provision *provision.Provisioner
	Cache     *cache.Cache
	Options   postgres.Options // as Open uses them, for a client that does without oneo's binding
	Groups    []string
	Rounds    int // of each kind of work; 0: 200
	Actor     string
	Say       func(format string, args ...any)
	// InTenant, when given, does tenants' work instead of what Open has opened. It is for the test that plants leaks.
	InTenant func(ctx context.Context, t tenant.Tenant, a postgres.Access, fn func(*postgres.Tx) error) error
}

// Proof is the answer to one question about one group.
type Proof struct {
	Group string
	Check string
	State Status // Warn: it leaks in a way that was chosen, as by tenancy.isolation: schema; Skipped: Why says why it could not be asked
	Tried int    // pieces of work
	Why   string // what leaked, or would have, and why it did not
}

// probeName is the display name of throw-away tenants, by which a later run knows what a killed one has left.
const probeName = "oneo doctor isolation: may be dropped"

// probeTable is the one table that is asked. It is made beside the tenant's own: a product's migrations may be anything.
const probeTable = "oneo_probe"

// leftAfter is for how long another run's tenants are let alone: it may be at work.
const leftAfter = time.Hour

// Isolation makes two tenants in each group, does work for both at once over as few connections as there are, and takes them away again. It
// changes nothing of any other tenant. An error means that the question could not be asked; what leaks is in the proofs.
func Isolation(ctx context.Context, o IsolationOptions) (proofs []Proof, err error) {
	if o.Rounds == 0 {
		o.Rounds = 200
	}
	if err := clearLeft(ctx, o); err != nil {
		return nil, err
	}
	db, err := o.Open()
	if err != nil {
		return nil, err
	}
	defer db.Close()
	if o.InTenant == nil {
		o.InTenant = db.InTenant
	}
	for _, group := range o.Groups {
		got, err := isolationIn(ctx, o, db, group)
		proofs = append(proofs, got...)
		if err != nil {
			return proofs, err
		}
	}
	return proofs, nil
}

// prober asks about one group.
type prober struct {
	IsolationOptions
	db    *postgres.DB
	group string
	inst  postgres.Installation
	both  [2]tenant.Tenant

	proofs []Proof
}

func isolationIn(ctx context.Context, o IsolationOptions, db *postgres.DB, group string) (proofs []Proof, err error) {
	p := &prober{IsolationOptions: o, db: db, group: group}
	if p.inst, err = o.DB.Installation(ctx, group); err != nil {
		return nil, err
	}
	defer func() {
		// Also when the person has lost patience: nothing is left behind.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		for _, t := range p.both {
			if !t.IsZero() {
				if derr := destroyProbe(ctx, o.Provision, t.Slug, o.Actor); derr != nil {
					o.Say("the tenant %s was not taken away: oneo tenant drop %s --purge --yes --confirm %s", t.Slug, t.Slug, t.Slug)
					err = errors.Join(err, derr)
				}
			}
		}
	}()
	if err := p.make(ctx); err != nil {
		return nil, err
	}
	for _, ask := range []func(context.Context) error{p.reads, p.remains, p.others, p.roles, p.writes, p.sessions, p.caches, p.control} {
		if err := ask(ctx); err != nil {
			return p.proofs, err
		}
	}
	return p.proofs, nil
}

func (p *prober) say(check string, state Status, tried int, format string, args ...any) {
	p.proofs = append(p.proofs, Proof{p.group, check, state, tried, fmt.Sprintf(format, args...)})
}

// told says what was found, or why there was nothing to find.
func (p *prober) told(check string, tried int, leaks []string, holds string) {
	if len(leaks) == 0 {
		p.say(check, OK, tried, "%s", holds)
		return
	}
	p.say(check, Fail, tried, "%d of %d: %s", len(leaks), tried, leaks[0])
}

// make makes the two tenants, so that they share a login and with it a connection, and a table in each that says whose it is.
func (p *prober) make(ctx context.Context) error {
	random := make([]byte, 4)
	_, _ = rand.Read(random) // it never fails
	logins := int32(max(1, p.inst.Logins))
	for i, which := range []string{"a", "b"} {
		slug, err := tenant.ParseSlug("probe-" + hex.EncodeToString(random) + "-" + which)
		if err != nil {
			return err
		}
		if i == 1 {
			// Numbers are given in turn and decide on the login: those in between stay unused.
			if err := p.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
				for range logins - 1 {
					if _, err := registry.NextNumber(ctx, tx); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				return err
			}
		}
		if p.both[i], err = p.Provision.Create(ctx, provision.CreateRequest{Slug: slug, Name: probeName, Group: p.group, Actor: p.Actor}); err != nil {
			return err
		}
		t := p.both[i]
		err = p.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error {
			if err := tx.Script(ctx, "create table "+probeTable+" (who text not null, n bigint)"); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, "insert into "+probeTable+" (who, n) values ($1, 0)", t.Slug.String())
			return err
		})
		if err != nil {
			return err
		}
	}
	if p.both[0].Number%logins != p.both[1].Number%logins {
		p.Say("another tenant was made at this moment: the two do not share a login, and meet each other's connections only behind a pooler")
	}
	return nil
}

// work does one thing for each tenant in turn, from several goroutines at once, and collects what was wrong.
func (p *prober) work(ctx context.Context, fn func(ctx context.Context, t tenant.Tenant, n int) (leak string, err error)) (tried int, leaks []string, err error) {
	const workers = 4
	var mu sync.Mutex
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for w := range workers {
		wg.Go(func() {
			for n := w; n < p.Rounds && ctx.Err() == nil; n += workers {
				leak, ferr := fn(ctx, p.both[n%2], n)
				mu.Lock()
				tried++
				if leak != "" {
					leaks = append(leaks, leak)
				}
				if ferr != nil && err == nil {
					err = ferr
					cancel()
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return tried, leaks, err
}

const whose = "select who from " + probeTable

// reads is the question of questions: a statement that names no schema, in each form of transaction.
func (p *prober) reads(ctx context.Context) error {
	tried, leaks, err := p.work(ctx, func(ctx context.Context, t tenant.Tenant, n int) (leak string, err error) {
		access := []postgres.Access{postgres.Single, postgres.Read, postgres.Write}[n/2%3]
		err = p.InTenant(ctx, t, access, func(tx *postgres.Tx) error {
			var who string
			if err := tx.QueryRow(ctx, whose).Scan(&who); err != nil {
				return err
			}
			if who != t.Slug.String() {
				leak = fmt.Sprintf("work for %s read a row of %s: its connection was still bound to that tenant", t.Slug, who)
			}
			return nil
		})
		return leak, err
	})
	if err != nil {
		return err
	}
	p.told("reads", tried, leaks, "the path is set with each transaction, and statements that are prepared are planned for it")
	return nil
}

// remains is about what a transaction could leave on its connection for whoever comes next.
func (p *prober) remains(ctx context.Context) error {
	for _, r := range []struct{ what, leave, look string }{
		{"settings", "set search_path to " + postgres.Quote(p.both[0].Schema.String()), whose},
		{"settings", "select set_config('oneo.probe', '" + p.both[0].Slug.String() + "', false)::text", "select nullif(current_setting('oneo.probe', true), '')"},
		{"cursors", "declare oneo_probe cursor with hold for " + whose, "fetch 1 from oneo_probe"},
		{"prepared statements", "prepare oneo_probe as select '" + p.both[0].Slug.String() + "'::text", "execute oneo_probe"},
		{"temporary tables", "create temporary table oneo_probe_left as " + whose, "select who from oneo_probe_left"},
		{"session locks", fmt.Sprintf("select pg_advisory_lock(%d, %d)::text", probeLock, p.both[0].Number), fmt.Sprintf("select objid::text from pg_locks where locktype = 'advisory' and classid = %d", probeLock)},
	} {
		taken := p.InTenant(ctx, p.both[0], postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(ctx, r.leave)
			return err
		})
		if taken != nil && !refused(taken) {
			return taken
		}
		var leaks []string
		const looks = 8 // more than there are connections of a login, unless a pooler has many
		for range looks {
			err := p.InTenant(ctx, p.both[1], postgres.Read, func(tx *postgres.Tx) error {
				var found *string
				if err := tx.QueryRow(ctx, r.look).Scan(&found); err == nil && found != nil && *found != p.both[1].Slug.String() {
					leaks = append(leaks, fmt.Sprintf("%s of one tenant were met by the other: `%s` outlived its transaction", r.what, r.leave))
				} else if err != nil {
					return err
				}
				return nil
			})
			if err != nil && !refused(err) && !errors.Is(err, pgx.ErrNoRows) {
				return err
			}
		}
		why := "it ended with its transaction"
		if taken != nil {
			why = "it is refused: " + fault.Of(taken).Message
		}
		p.told(r.what, looks, leaks, why)
	}
	return nil
}

// probeLock is the first key of a lock that nothing else takes.
const probeLock = 7302699

// refused reports whether PostgreSQL or oneo has answered and said no.
func refused(err error) bool {
	switch postgres.SQLState(err) {
	case "42501", "42P01", "34000", "26000", "0A000", "42883", "25006": // no right, no such table, cursor, statement, not there, read only
		return true
	}
	return fault.Is(err, fault.Forbidden) || fault.Is(err, fault.Invalid) || fault.Of(err).Code == "statement_refused"
}

// others is about a statement that names the other tenant's table.
func (p *prober) others(ctx context.Context) error {
	var leaks []string
	for i, t := range p.both {
		other := p.both[1-i]
		err := p.InTenant(ctx, t, postgres.Read, func(tx *postgres.Tx) error {
			var who string
			if err := tx.QueryRow(ctx, "select who from "+postgres.Quote(other.Schema.String())+"."+probeTable).Scan(&who); err != nil {
				return err
			}
			leaks = append(leaks, fmt.Sprintf("a statement of %s that names the table of %s reads it", t.Slug, other.Slug))
			return nil
		})
		if err != nil && !refused(err) {
			return err
		}
	}
	switch {
	case len(leaks) > 0 && p.Options.Isolation == postgres.BySchema:
		p.say("other schemas", Warn, len(p.both), "%s: tenancy.isolation is schema, and all tenants share the rights of one role", leaks[0])
	default:
		p.told("other schemas", len(p.both), leaks, "PostgreSQL refuses it: each tenant's role may use its own schema only")
	}
	return nil
}

// roles is about who a tenant's work is to PostgreSQL.
func (p *prober) roles(ctx context.Context) error {
	var leaks []string
	for i, t := range p.both {
		var role, schema, mine string
		var strong, both bool
		err := p.InTenant(ctx, t, postgres.Read, func(tx *postgres.Tx) error {
			return tx.QueryRow(ctx, `select current_user::text, current_schema()::text`).Scan(&role, &schema)
		})
		if err != nil {
			return err
		}
		err = p.DB.AsOwner(ctx, p.group, func(tx *postgres.OwnerTx) error {
			const ask = `select p.role, r.rolsuper or r.rolbypassrls or r.rolcreaterole or r.rolcreatedb, pg_catalog.pg_has_role(r.oid, o.role, 'member')
from public.placements p, public.placements o, pg_catalog.pg_roles r where p.number = $1 and o.number = $2 and r.rolname = $3`
			return tx.QueryRow(ctx, ask, t.Number, p.both[1-i].Number, role).Scan(&mine, &strong, &both)
		})
		if err != nil {
			return err
		}
		switch {
		case schema != t.Schema.String():
			leaks = append(leaks, fmt.Sprintf("work for %s stands in the schema %s", t.Slug, schema))
		case role != mine:
			leaks = append(leaks, fmt.Sprintf("work for %s is done as %s, not as %s", t.Slug, role, mine))
		case strong:
			leaks = append(leaks, fmt.Sprintf("the role %s is more than a tenant's: it may pass by rights, or make roles or databases", role))
		case p.Options.Isolation == postgres.ByRole && both:
			leaks = append(leaks, fmt.Sprintf("the role of %s has the rights of the other tenant's", t.Slug))
		}
	}
	p.told("roles", len(p.both), leaks, "each tenant's work has that tenant's role, which has no more rights than its own")
	return nil
}

// writes is about whose table a row comes to lie in.
func (p *prober) writes(ctx context.Context) error {
	tried, _, err := p.work(ctx, func(ctx context.Context, t tenant.Tenant, n int) (string, error) {
		return "", p.InTenant(ctx, t, postgres.Write, func(tx *postgres.Tx) error {
			_, err := tx.Exec(ctx, "insert into "+probeTable+" (who, n) values ($1, $2)", t.Slug.String(), n+1)
			return err
		})
	})
	if err != nil {
		return err
	}
	var leaks []string
	for _, t := range p.both {
		var foreign, own int
		err := p.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error {
			return tx.QueryRow(ctx, "select count(*) filter (where who <> $1), count(*) filter (where who = $1 and n > 0) from "+probeTable, t.Slug.String()).Scan(&foreign, &own)
		})
		if err != nil {
			return err
		}
		if foreign > 0 {
			leaks = append(leaks, fmt.Sprintf("%d row(s) that were written for the other tenant lie in %s", foreign, t.Slug))
		}
		if own+foreign != p.Rounds/2 && foreign == 0 {
			leaks = append(leaks, fmt.Sprintf("%d of %d rows that were written for %s are not there", p.Rounds/2-own, p.Rounds/2, t.Slug))
		}
	}
	p.told("writes", tried, leaks, "each row lies in the tenant for which it was written")
	return nil
}

// sessions is about a token of one tenant that is shown to the other.
func (p *prober) sessions(ctx context.Context) error {
	const check, idle = "sessions", time.Hour
	realm := auth.Tenants()
	var token string
	err := p.InTenant(ctx, p.both[0], postgres.Write, func(tx *postgres.Tx) error {
		email, err := auth.ParseEmail("probe@" + p.both[0].Slug.String() + ".example")
		if err != nil {
			return err
		}
		if _, err := realm.AddUser(ctx, tx, auth.NewUser{Email: email, PasswordHash: noPassword}); err != nil {
			return err
		}
		c, err := realm.Credential(ctx, tx, email)
		if err != nil {
			return err
		}
		token, _, err = realm.StartSession(ctx, tx, c, auth.SessionOptions{Idle: idle, Absolute: idle})
		return err
	})
	if postgres.SQLState(err) == "42P01" || postgres.SQLState(err) == "42703" {
		p.say(check, Skipped, 0, "these migrations have no sessions of oneo's")
		return nil
	}
	if err != nil {
		return err
	}
	known := func(t tenant.Tenant) (bool, error) {
		err := p.InTenant(ctx, t, postgres.Read, func(tx *postgres.Tx) error {
			_, err := realm.Authenticate(ctx, tx, token, idle)
			return err
		})
		if fault.Is(err, fault.Unauthenticated) {
			return false, nil
		}
		return err == nil, err
	}
	own, err := known(p.both[0])
	if err != nil {
		return err
	}
	other, err := known(p.both[1])
	if err != nil {
		return err
	}
	var leaks []string
	if other {
		leaks = append(leaks, "a session of one tenant was let in by the other")
	}
	if !own {
		leaks = append(leaks, "a session was not found in the tenant in which it was begun")
	}
	p.told(check, 2, leaks, "they stand in the tenant's own schema, and are looked for there only")
	return nil
}

// noPassword is a hash that no password has.
const noPassword = "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"

// caches is about Redis, or what stands for it.
func (p *prober) caches(ctx context.Context) error {
	const check, kind, id, ttl = "caches", "probe", "1", time.Minute
	if p.Cache == nil {
		p.say(check, Skipped, 0, "no Redis is set")
		return nil
	}
	if err := p.Cache.Ping(ctx); err != nil {
		p.say(check, Skipped, 0, "Redis is away: %s", fault.Of(err).Message)
		return nil
	}
	var leaks []string
	var keys [2]cache.Key
	for i, t := range p.both {
		var err error
		if keys[i], err = cache.TenantKey(t, kind, id); err != nil {
			return err
		}
		if got, ok := p.Cache.Get(ctx, keys[i]); ok {
			leaks = append(leaks, fmt.Sprintf("%s was given what the cache holds for %s", t.Slug, got))
		}
		if err := p.Cache.Set(ctx, keys[i], []byte(t.Slug.String()), ttl); err != nil {
			return err
		}
	}
	for i, t := range p.both {
		if got, ok := p.Cache.Get(ctx, keys[i]); ok && string(got) != t.Slug.String() {
			leaks = append(leaks, fmt.Sprintf("%s was given what the cache holds for %s", t.Slug, got))
		}
	}
	if _, err := p.Cache.Erase(ctx, p.both[0]); err != nil {
		return err
	}
	if _, ok := p.Cache.Get(ctx, keys[0]); ok {
		leaks = append(leaks, "what was flushed for a tenant is still there")
	}
	if _, ok := p.Cache.Get(ctx, keys[1]); !ok {
		leaks = append(leaks, "flushing one tenant has flushed the other")
	}
	p.told(check, 6, leaks, "each key begins with its tenant's schema: "+keys[1].String())
	return nil
}

// control does the work as a client would that sets its path for the session, over the same URL: it must leak, or the questions before would
// not have seen a leak either.
func (p *prober) control(ctx context.Context) error {
	cfg, err := pgx.ParseConfig(p.Options.Groups[p.group].URL)
	if err != nil {
		return err
	}
	if p.inst.Logins > 0 {
		cfg.User = postgres.LoginName(p.inst.AppRole, int(p.both[0].Number)%p.inst.Logins)
		cfg.Password = postgres.LoginPassword(p.Options.Secret, cfg.User)
	}
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec // any pooler carries it
	var clients [2]*pgx.Conn
	for i := range clients {
		if clients[i], err = pgx.ConnectConfig(ctx, cfg); err != nil {
			return err
		}
		defer func() { _ = clients[i].Close(context.WithoutCancel(ctx)) }()
	}
	// Only the path: whatever oneo does sets its own, so that nobody is harmed by what is left if this process is killed here.
	left := p.both[0].Schema.String()
	if _, err := clients[0].Exec(ctx, "set search_path to "+postgres.Quote(left)); err != nil {
		return err
	}
	defer func() {
		for _, c := range clients {
			_, _ = c.Exec(context.WithoutCancel(ctx), "reset search_path")
		}
	}()
	met := func(c *pgx.Conn) bool {
		var path string
		return c.QueryRow(ctx, `select current_setting('search_path')`).Scan(&path) == nil && strings.Contains(path, left)
	}
	same, across := met(clients[0]), met(clients[1])
	switch {
	case across:
		p.say("a careless client", OK, 2, "would have leaked, even to other programs: the path that it sets for its session stays on the pooler's connection, and the next client works in %s", left)
	case same:
		p.say("a careless client", OK, 2, "would have leaked: the path that it sets for its session is met by whoever borrows its connection next")
	default:
		p.say("a careless client", Warn, 2, "did not leak although it sets its path for the session: something between oneo and PostgreSQL resets sessions, and the questions above may have seen less than there is")
	}
	return nil
}

// destroyProbe takes a throw-away tenant away for good.
func destroyProbe(ctx context.Context, p *provision.Provisioner, slug tenant.Slug, actor string) error {
	if _, err := p.Drop(ctx, slug, time.Hour, actor); err != nil {
		return err
	}
	_, err := p.Purge(ctx, slug, actor)
	return err
}

// leftProbes are the throw-away tenants that killed runs have left.
func leftProbes(ctx context.Context, tx *postgres.OwnerTx) ([]tenant.Slug, error) {
	const query = `select slug from public.tenants where name = $1 and slug ~ '^probe-[0-9a-f]{8}-[ab]$' and created_at < pg_catalog.now() - $2::interval and state in ('active', 'dropped') order by slug`
	rows, err := tx.Query(ctx, query, probeName, leftAfter)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.Slug, error) {
		var name string
		if err := row.Scan(&name); err != nil {
			return tenant.Slug{}, err
		}
		return tenant.ParseSlug(name)
	})
}

// clearLeft takes away what a killed run has left.
func clearLeft(ctx context.Context, o IsolationOptions) error {
	var left []tenant.Slug
	err := o.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		left, err = leftProbes(ctx, tx)
		return err
	})
	if err != nil {
		return err
	}
	for _, slug := range left {
		if err := destroyProbe(ctx, o.Provision, slug, o.Actor); err != nil {
			return err
		}
		o.Say("took away %s, which a run that was killed had left", slug)
	}
	return nil
}

func checkProbes(ctx context.Context, d *Doctor, r *report) error {
	var left []tenant.Slug
	err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		left, err = leftProbes(ctx, tx)
		return err
	})
	if err != nil {
		return err
	}
	if len(left) == 0 {
		r.ok("none")
		return nil
	}
	names := make([]string, len(left))
	for i, slug := range left {
		names[i] = slug.String()
	}
	f := r.found(Warn, "", "oneo doctor --only probes --fix", "%d throw-away tenant(s) were left by an `oneo doctor isolation` that was killed: %s", len(left), some(names))
	f.by(func(ctx context.Context) error {
		var errs []error
		for _, slug := range left {
			errs = append(errs, destroyProbe(ctx, d.o.Provision, slug, d.o.Actor))
		}
		return errors.Join(errs...)
	}, "destroy %s", strings.Join(names, ", "))
	f.fix.long = true
	return nil
}
