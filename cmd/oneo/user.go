package main

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// people is where the accounts of a command are: in one tenant, or in the public schema.
type people struct {
	tenant string
	admins bool
}

func (p *people) bind(cmd *cobra.Command, e *env) {
	cmd.Flags().StringVarP(&p.tenant, "tenant", "t", "", "the tenant's `NAME`")
	must(cmd.RegisterFlagCompletionFunc("tenant", e.completeTenants))
}

func (p people) realm() *auth.Realm {
	if p.admins {
		return auth.Administrators()
	}
	return auth.Tenants()
}

// flag is how a command names the same accounts.
func (p people) flag() string {
	if p.admins {
		return " --admin"
	}
	return " -t " + p.tenant
}

// check says what is wrong with the selection, before a database or a person is asked for anything.
func (p people) check() error {
	switch {
	case p.admins && p.tenant != "":
		return errUsage{fault.New(fault.Invalid, "--tenant and --admin exclude each other").WithCode("two_selectors")}
	case !p.admins && p.tenant == "":
		return errUsage{fault.New(fault.Invalid, "no tenant is named").WithCode("no_selector").WithHint("add --tenant NAME")}
	}
	return nil
}

// in runs fn in a transaction where the accounts are.
func (p people) in(ctx context.Context, a *app.App, fn func(tx *postgres.OwnerTx, t tenant.Tenant) error) error {
	if p.admins {
		return a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error { return fn(tx, tenant.Tenant{}) })
	}
	if err := p.check(); err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, p.tenant)
	if err != nil {
		return err
	}
	return a.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error {
		if err := a.InRange(ctx, tx, t); err != nil {
			return err
		}
		return fn(tx, t)
	})
}

// audit tells what was done to an account.
func (p people) audit(ctx context.Context, e *env, a *app.App, t tenant.Tenant, action, who string) error {
	return a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		return registry.Audit(ctx, tx, registry.AuditEntry{Actor: e.actor(), Action: action, Tenant: t, Details: map[string]string{"user": who}})
	})
}

// forget makes the servers ask again who the tokens of a changed account stand for; without a user only the ended ones
// have changed. All that is remembered of a tenant is flushed besides, by its generation. A server remembers who is
// signed in for cache.local_ttl at most.
func (p people) forget(ctx context.Context, a *app.App, t tenant.Tenant, user uuid.UUID, ended [][]byte) error {
	a.AccountChanged(ctx, t, user, ended)
	if p.admins {
		return nil
	}
	var hosts []tenant.Host
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ds, err := registry.Domains(ctx, tx, t)
		for _, d := range ds {
			hosts = append(hosts, d.Host)
		}
		if err != nil {
			return err
		}
		return registry.FlushCache(ctx, tx, t)
	})
	if err != nil {
		return err
	}
	a.Changed(ctx, t, hosts...)
	return nil
}

var userColumns = []column[auth.User]{
	{"EMAIL", "email", func(u auth.User) any { return u.Email }},
	{"NAME", "name", func(u auth.User) any { return u.Name }},
	{"ROLE", "role", func(u auth.User) any { return u.Role }},
	{"DISABLED", "disabled_at", func(u auth.User) any { return u.DisabledAt }},
	{"CREATED", "created_at", func(u auth.User) any { return u.CreatedAt }},
	{"ID", "id", func(u auth.User) any { return u.ID.String() }},
}

func newUserCmd(e *env) *cobra.Command {
	return noun("user", "Add, list and disable the users of a tenant",
		"Users belong to one tenant and log in on its domains only.", "  oneo user list -t acme", peopleVerbs(e, false)...)
}

func newAdminCmd(e *env) *cobra.Command {
	return noun("admin", "Add, list and disable administrators",
		"Administrators belong to the installation and log in on the public hosts only.", "  oneo admin list", peopleVerbs(e, true)...)
}

func peopleVerbs(e *env, admins bool) []*cobra.Command {
	who, where := "user", " -t acme"
	if admins {
		who, where = "admin", ""
	}
	verb := func(use, short, long string, args int, do func(ctx context.Context, a *app.App, p people, args []string) error) *cobra.Command {
		p := people{admins: admins}
		cmd := &cobra.Command{
			Use: use, Short: short, Long: long, Args: usageArgs(cobra.ExactArgs(args)),
			RunE: func(cmd *cobra.Command, args []string) error {
				if err := p.check(); err != nil {
					return err
				}
				a, err := e.open()
				if err != nil {
					return err
				}
				return do(cmd.Context(), a, p, args)
			},
		}
		if !admins {
			p.bind(cmd, e)
		}
		cmd.Example = "  oneo " + who + " " + cmd.Name()
		if args > 0 {
			cmd.Example += " ada@example.com"
		}
		cmd.Example += where
		return cmd
	}
	var role, name string
	var newPassword, setPassword passwordFlags
	add := verb("add EMAIL", "Add an account", "Without --password-stdin or --password-file a password is generated and shown once.", 1,
		func(ctx context.Context, a *app.App, p people, args []string) error {
			return addUser(ctx, e, a, p, args[0], name, role, newPassword)
		})
	add.Flags().StringVar(&name, "name", "", "`TEXT` for display")
	add.Flags().StringVar(&role, "role", "", "admin, member or viewer; default: admin")
	set := verb("set-password EMAIL", "Give an account another password", "Its sessions end at once. The password comes from a prompt, --password-stdin or --password-file.", 1,
		func(ctx context.Context, a *app.App, p people, args []string) error {
			return setUserPassword(ctx, e, a, p, args[0], setPassword)
		})
	for cmd, p := range map[*cobra.Command]*passwordFlags{add: &newPassword, set: &setPassword} {
		cmd.Flags().BoolVar(&p.stdin, "password-stdin", false, "read the password from standard input")
		cmd.Flags().StringVar(&p.file, "password-file", "", "read the password from a `FILE`")
	}
	verbs := []*cobra.Command{
		add,
		verb("list", "List accounts", "List accounts in the order in which they were made.", 0, func(ctx context.Context, a *app.App, p people, _ []string) error {
			return listUsers(ctx, e, a, p)
		}),
		verb("disable EMAIL", "Keep an account from logging in", "Its sessions end at once; what it made stays. The last administrator cannot be disabled.", 1,
			func(ctx context.Context, a *app.App, p people, args []string) error {
				return changeUser(ctx, e, a, p, args[0], "user.disable", func(tx *postgres.OwnerTx, u auth.User) (auth.User, [][]byte, error) {
					return p.realm().DisableUser(ctx, tx, u.ID)
				})
			}),
		set,
		verb("revoke-sessions EMAIL", "End every session of an account", "It has to log in again everywhere.", 1,
			func(ctx context.Context, a *app.App, p people, args []string) error {
				return changeUser(ctx, e, a, p, args[0], "user.revoke-sessions", func(tx *postgres.OwnerTx, u auth.User) (auth.User, [][]byte, error) {
					ended, err := p.realm().RevokeSessions(ctx, tx, u.ID)
					return u, ended, err
				})
			}),
	}
	if admins {
		return verbs[:4]
	}
	return verbs
}

func addUser(ctx context.Context, e *env, a *app.App, p people, address, name, role string, pf passwordFlags) error {
	email, err := auth.ParseEmail(address)
	if err != nil {
		return err
	}
	password, generated, err := e.password(ctx, pf, "password", pf == passwordFlags{})
	if err != nil {
		return err
	}
	if !generated {
		if err := auth.CheckPassword(password, email, p.tenant); err != nil {
			return err
		}
	}
	hash, err := a.Hasher.Hash(ctx, password)
	if err != nil {
		return err
	}
	var u auth.User
	var t tenant.Tenant
	err = p.in(ctx, a, func(tx *postgres.OwnerTx, in tenant.Tenant) (err error) {
		t = in
		u, err = p.realm().AddUser(ctx, tx, auth.NewUser{Email: email, Name: name, Role: role, PasswordHash: hash})
		return err
	})
	if err != nil {
		return err
	}
	if err := p.audit(ctx, e, a, t, "user.add", email); err != nil {
		return err
	}
	columns := userColumns
	if generated {
		e.say("the password is shown this once")
		e.onlyHere("password", password)
		columns = append(columns[:len(columns):len(columns)], column[auth.User]{"PASSWORD", "password", func(auth.User) any { return password }})
	}
	return showOne(e, u, columns)
}

func listUsers(ctx context.Context, e *env, a *app.App, p people) error {
	const page = 1000
	var all []auth.User
	err := p.in(ctx, a, func(tx *postgres.OwnerTx, _ tenant.Tenant) error {
		var after *uuid.UUID
		for {
			us, err := p.realm().Users(ctx, tx, page, after)
			if err != nil {
				return err
			}
			if all = append(all, us...); len(us) < page {
				return nil
			}
			after = &us[len(us)-1].ID
		}
	})
	if err != nil {
		return err
	}
	return show(e, all, userColumns)
}

func setUserPassword(ctx context.Context, e *env, a *app.App, p people, address string, pf passwordFlags) error {
	// Whom it is for is known before anybody is asked for a password.
	err := p.in(ctx, a, func(tx *postgres.OwnerTx, _ tenant.Tenant) error {
		email, err := auth.ParseEmail(address)
		if err != nil {
			return err
		}
		_, err = p.realm().UserByEmail(ctx, tx, email)
		return err
	})
	if err != nil {
		return err
	}
	password, _, err := e.password(ctx, pf, "new password", false)
	if err != nil {
		return err
	}
	if err := auth.CheckPassword(password, address, p.tenant); err != nil {
		return err
	}
	hash, err := a.Hasher.Hash(ctx, password)
	if err != nil {
		return err
	}
	return changeUser(ctx, e, a, p, address, "user.set-password", func(tx *postgres.OwnerTx, u auth.User) (auth.User, [][]byte, error) {
		return p.realm().SetPassword(ctx, tx, u.ID, hash)
	})
}

func changeUser(ctx context.Context, e *env, a *app.App, p people, address, action string, do func(*postgres.OwnerTx, auth.User) (auth.User, [][]byte, error)) error {
	email, err := auth.ParseEmail(address)
	if err != nil {
		return err
	}
	var u auth.User
	var t tenant.Tenant
	var ended [][]byte
	err = p.in(ctx, a, func(tx *postgres.OwnerTx, in tenant.Tenant) (err error) {
		t = in
		if u, err = p.realm().UserByEmail(ctx, tx, email); err != nil {
			return err
		}
		u, ended, err = do(tx, u)
		return err
	})
	if err != nil {
		return err
	}
	e.say("%d session(s) ended", len(ended))
	if err := p.forget(ctx, a, t, u.ID, ended); err != nil {
		return err
	}
	if err := p.audit(ctx, e, a, t, action, email); err != nil {
		return err
	}
	return showOne(e, u, userColumns)
}

var keyColumns = []column[auth.Key]{
	{"ID", "id", func(k auth.Key) any { return k.ID.String() }},
	{"NAME", "name", func(k auth.Key) any { return k.Name }},
	{"USER", "user", func(k auth.Key) any { return k.Email }},
	{"SCOPES", "scopes", func(k auth.Key) any { return k.Scopes }},
	{"EXPIRES", "expires_at", func(k auth.Key) any { return k.ExpiresAt }},
	{"LAST USED", "last_used", func(k auth.Key) any { return k.LastUsed }},
	{"REVOKED", "revoked_at", func(k auth.Key) any { return k.RevokedAt }},
}

func newKeyCmd(e *env) *cobra.Command {
	bind := func(cmd *cobra.Command, p *people) *cobra.Command {
		p.bind(cmd, e)
		cmd.Flags().BoolVar(&p.admins, "admin", false, "keys of administrators, instead of a tenant's")
		return cmd
	}
	var pa, pl, pr people
	var user, name string
	var scopes []string
	var expires time.Duration
	add := bind(&cobra.Command{
		Use: "add", Short: "Make an API key for a user", Long: "Make an API key. Its token is shown this once; a key never may more than its user.",
		Example: "  oneo key add -t acme --user ada@acme.com --name reporting --scope read", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return addKey(cmd.Context(), e, pa, user, name, scopes, expires)
		},
	}, &pa)
	add.Flags().StringVar(&user, "user", "", "the user's `EMAIL`")
	add.Flags().StringVar(&name, "name", "", "what the key is for")
	add.Flags().StringArrayVar(&scopes, "scope", nil, "read, write or admin; repeatable; default: read, of an administrator's key admin")
	add.Flags().DurationVar(&expires, "expires", 0, "the key ends after so long; default: never")
	list := bind(&cobra.Command{
		Use: "list", Short: "List API keys", Long: "List API keys, revoked ones too; never their tokens.",
		Example: "  oneo key list -t acme\n  oneo key list --admin", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := pl.check(); err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			var ks []auth.Key
			err = pl.in(cmd.Context(), a, func(tx *postgres.OwnerTx, _ tenant.Tenant) (err error) {
				ks, err = pl.realm().Keys(cmd.Context(), tx, nil)
				return err
			})
			if err != nil {
				return err
			}
			return show(e, ks, keyColumns)
		},
	}, &pl)
	revoke := bind(&cobra.Command{
		Use: "revoke ID", Short: "End an API key for good", Long: "End an API key for good. Servers refuse it at once, or after cache.local_ttl at the latest.",
		Example: "  oneo key revoke 0199... -t acme", Args: usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			id, err := uuid.Parse(args[0])
			if err != nil {
				return fault.New(fault.Invalid, "%q is no key's id", args[0]).WithHint("oneo key list")
			}
			if err := pr.check(); err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			var t tenant.Tenant
			var hash []byte
			err = pr.in(ctx, a, func(tx *postgres.OwnerTx, in tenant.Tenant) (err error) {
				t = in
				hash, err = pr.realm().RevokeKey(ctx, tx, id, nil)
				return err
			})
			if err != nil {
				return err
			}
			if err := pr.forget(ctx, a, t, uuid.Nil, [][]byte{hash}); err != nil {
				return err
			}
			if err := pr.audit(ctx, e, a, t, "key.revoke", id.String()); err != nil {
				return err
			}
			e.say("key %s is revoked", id)
			return showOne(e, id, []column[uuid.UUID]{
				{"ID", "id", func(id uuid.UUID) any { return id.String() }},
				{"STATUS", "status", func(uuid.UUID) any { return "revoked" }},
			})
		},
	}, &pr)
	return noun("key", "Make, list and revoke API keys", "Programs send an API key as Authorization: Bearer TOKEN.", "  oneo key list -t acme", add, list, revoke)
}

func addKey(ctx context.Context, e *env, p people, user, name string, scopes []string, expires time.Duration) error {
	if err := p.check(); err != nil {
		return err
	}
	if user == "" || name == "" {
		return errUsage{fault.New(fault.Invalid, "a key needs a user and a name").WithCode("missing_flag").WithHint("add --user EMAIL and --name TEXT")}
	}
	if expires < 0 {
		return errUsage{fault.New(fault.Invalid, "--expires must not be negative")}
	}
	email, err := auth.ParseEmail(user)
	if err != nil {
		return err
	}
	if len(scopes) == 0 {
		scopes = []string{auth.ScopeRead}
		if p.admins {
			scopes = []string{auth.ScopeAdmin}
		}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	var until *time.Time
	if expires > 0 {
		u := time.Now().Add(expires)
		until = &u
	}
	var k auth.Key
	var token string
	var t tenant.Tenant
	err = p.in(ctx, a, func(tx *postgres.OwnerTx, in tenant.Tenant) error {
		t = in
		u, err := p.realm().UserByEmail(ctx, tx, email)
		if err != nil {
			return err
		}
		k, token, err = p.realm().AddKey(ctx, tx, u.ID, name, scopes, until)
		k.Email = u.Email
		return err
	})
	if err != nil {
		return err
	}
	if err := p.audit(ctx, e, a, t, "key.add", email); err != nil {
		return err
	}
	e.say("the token is shown this once; undo: oneo key revoke %s%s", k.ID, p.flag())
	columns := append([]column[auth.Key]{{"TOKEN", "token", func(auth.Key) any { return token }}}, keyColumns...)
	return showOne(e, k, columns)
}
