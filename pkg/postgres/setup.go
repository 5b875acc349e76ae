package postgres

import (
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// SetupOptions says what Setup is to make in one group's database.
type SetupOptions struct {
	AdminURL  string // a superuser, or a role with CREATEROLE and CREATEDB that owns the database
	Group     Group  // names the database, and the passwords of the owner and the app role where the URLs carry them
	AppRole   string
	OwnerRole string
	Secret    string // derives the passwords that no URL carries
	Logins    int    // sub-pools; fixed by the first Setup
	// ID is the installation's id where another group's database has fixed it; empty makes one, or keeps the one there.
	ID string
	// KeepRoles leaves the roles as they are: they were made by another database's Setup on the same cluster.
	KeepRoles bool
	Logf      func(format string, args ...any) // the story; may be nil
}

// LoginPassword is the password of a role that no URL carries.
func LoginPassword(secret, role string) string {
	m := hmac.New(sha256.New, []byte(secret))
	m.Write([]byte("oneo login\x00" + role))
	return hex.EncodeToString(m.Sum(nil))
}

// Setup makes the database, the roles with their rights, the schema ext, the ledger and the row that says so. It is
// idempotent: running it again repairs what is missing and changes nothing else.
func Setup(ctx context.Context, o SetupOptions) (Installation, error) {
	if o.Logf == nil {
		o.Logf = func(string, ...any) {}
	}
	if o.Secret == "" {
		return Installation{}, fault.New(fault.Invalid, "server.secret is not set").WithCode("no_secret").
			WithHint("set ONEO_SERVER_SECRET to at least 32 random characters, for example from `openssl rand -hex 32`")
	}
	if o.Group.OwnerURL == "" {
		o.Group.OwnerURL = o.Group.URL
	}
	admin, err := pgx.ParseConfig(o.AdminURL)
	if err != nil {
		return Installation{}, fault.New(fault.Invalid, "the administrator's URL cannot be read").WithCode("bad_url")
	}
	app, err := pgx.ParseConfig(o.Group.URL)
	if err != nil {
		return Installation{}, fault.New(fault.Invalid, "the database URL cannot be read").WithCode("bad_url")
	}
	owner, err := pgx.ParseConfig(o.Group.OwnerURL)
	if err != nil {
		return Installation{}, fault.New(fault.Invalid, "the owner's URL cannot be read").WithCode("bad_url")
	}
	s := setup{o: o, database: app.Database, passwords: map[string]string{}}
	for _, c := range []*pgx.ConnConfig{app, owner} {
		if c.Password != "" {
			s.passwords[c.User] = c.Password
		}
	}
	if err := s.ensureDatabase(ctx, admin); err != nil {
		return Installation{}, Fault(err)
	}
	in := admin.Copy()
	in.Database = s.database
	conn, err := pgx.ConnectConfig(ctx, in)
	if err != nil {
		return Installation{}, Fault(err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var inst Installation
	// Roles are shared by all databases of a cluster: two set-ups at once may trip over each other's rows.
	for attempt := range 5 {
		inst, err = s.run(ctx, conn)
		if code := SQLState(err); attempt == 4 || code != "XX000" && code != "23505" && code != "42710" && code != "40P01" {
			break
		}
	}
	return inst, Fault(err)
}

type setup struct {
	o         SetupOptions
	database  string
	super     bool
	passwords map[string]string
}

func (s *setup) ensureDatabase(ctx context.Context, admin *pgx.ConnConfig) error {
	conn, err := pgx.ConnectConfig(ctx, admin)
	if err != nil && SQLState(err) == "3D000" {
		other := admin.Copy()
		other.Database = "postgres"
		conn, err = pgx.ConnectConfig(ctx, other)
	}
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	err = conn.QueryRow(ctx, `select exists (select from pg_catalog.pg_database where datname = $1)`, s.database).Scan(&exists)
	if err != nil || exists {
		return err
	}
	s.o.Logf("creating database %s", s.database)
	_, err = conn.Exec(ctx, "create database "+Quote(s.database)+" encoding 'UTF8' template template0")
	if SQLState(err) == "42P04" || SQLState(err) == "23505" { // another set-up was faster
		return nil
	}
	return err
}

// sessionLocks are the functions that take a lock which outlives the transaction.
var sessionLocks = []string{
	"pg_advisory_lock(bigint)", "pg_advisory_lock(integer, integer)",
	"pg_advisory_lock_shared(bigint)", "pg_advisory_lock_shared(integer, integer)",
	"pg_try_advisory_lock(bigint)", "pg_try_advisory_lock(integer, integer)",
	"pg_try_advisory_lock_shared(bigint)", "pg_try_advisory_lock_shared(integer, integer)",
}

// largeObjects are the functions that make an object which its maker owns: a tenant's role could not be dropped then.
var largeObjects = []string{"lo_creat(integer)", "lo_create(oid)", "lo_from_bytea(oid, bytea)"}

var installationID = regexp.MustCompile(`^[0-9a-f]{8}$`)

func (s *setup) run(ctx context.Context, conn *pgx.Conn) (inst Installation, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		exec := func(sql string) error {
			if _, err := tx.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol); err != nil {
				return fmt.Errorf("set up %s: %w", s.database, err)
			}
			return nil
		}
		if err := exec(`select pg_catalog.pg_advisory_xact_lock(7302659, 1)`); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, `select rolsuper from pg_catalog.pg_roles where rolname = current_user`).Scan(&s.super); err != nil {
			return err
		}
		inst, err = s.known(ctx, tx)
		if err != nil {
			return err
		}
		if !s.o.KeepRoles {
			if err := s.roles(ctx, tx, inst, exec); err != nil {
				return err
			}
		}
		for _, sql := range s.rights(inst) {
			if err := exec(sql); err != nil {
				return err
			}
		}
		return s.record(ctx, tx, &inst, exec)
	})
	return inst, err
}

// known is the installation that an earlier Setup fixed here, or the one to be made.
func (s *setup) known(ctx context.Context, tx pgx.Tx) (Installation, error) {
	inst := Installation{ID: s.o.ID, Logins: s.o.Logins, AppRole: s.o.AppRole}
	var there bool
	if err := tx.QueryRow(ctx, `select pg_catalog.to_regclass('public.installation') is not null`).Scan(&there); err != nil {
		return inst, err
	}
	if there {
		var old Installation
		err := tx.QueryRow(ctx, readInstallation).Scan(&old.ID, &old.Logins, &old.AppRole)
		if err == nil {
			if s.o.ID != "" && s.o.ID != old.ID {
				return inst, fault.New(fault.Conflict, "the database %s belongs to another installation (%s)", s.database, old.ID).
					WithCode("other_installation").WithHint("use an empty database for this group")
			}
			if old.AppRole != s.o.AppRole {
				return inst, fault.New(fault.Conflict, "the database %s was set up with the app role %s", s.database, old.AppRole).
					WithCode("other_role").WithHint("set ONEO_DATABASE_ROLES_APP=%s", old.AppRole)
			}
			return old, nil
		}
		if !errors.Is(err, pgx.ErrNoRows) {
			return inst, err
		}
	}
	if inst.ID == "" {
		var b [4]byte
		if _, err := rand.Read(b[:]); err != nil {
			return inst, err
		}
		inst.ID = hex.EncodeToString(b[:])
	}
	if !installationID.MatchString(inst.ID) {
		return inst, fault.New(fault.Invalid, "installation id %q is not 8 hex digits", inst.ID)
	}
	return inst, nil
}

func (s *setup) roles(ctx context.Context, tx pgx.Tx, inst Installation, exec func(string) error) error {
	ensure := func(name, attributes string) error {
		var exists, super bool
		err := tx.QueryRow(ctx, `select true, rolsuper from pg_catalog.pg_roles where rolname = $1`, name).Scan(&exists, &super)
		if err != nil && !errors.Is(err, pgx.ErrNoRows) {
			return err
		}
		if super {
			return fault.New(fault.Conflict, "the role %s is a superuser", name).WithCode("superuser_role").
				WithHint("use roles of oneo's own: they are named by database.roles")
		}
		verb := "alter"
		if !exists {
			verb = "create"
			s.o.Logf("creating role %s", name)
		}
		password := s.passwords[name]
		if password == "" {
			password = LoginPassword(s.o.Secret, name)
		}
		verifier, err := scramVerifier(password)
		if err != nil {
			return err
		}
		return exec(fmt.Sprintf("%s role %s with login %s password '%s'", verb, Quote(name), attributes, verifier))
	}
	if err := ensure(s.o.OwnerRole, "createrole nocreatedb"); err != nil {
		return err
	}
	plain := "noinherit nocreaterole nocreatedb"
	if s.super { // only a superuser may take these away from a role that somebody made before
		plain += " nobypassrls noreplication"
	}
	if err := ensure(s.o.AppRole, plain); err != nil {
		return err
	}
	if inst.Logins > 0 {
		for _, login := range inst.LoginNames() {
			if err := ensure(login, plain); err != nil {
				return err
			}
			if err := exec("grant " + Quote(s.o.AppRole) + " to " + Quote(login)); err != nil {
				return err
			}
		}
	}
	if !s.super {
		var self string
		if err := tx.QueryRow(ctx, `select current_user::text`).Scan(&self); err != nil {
			return err
		}
		if self != s.o.OwnerRole { // to hand objects over to the owner
			if err := exec("grant " + Quote(s.o.OwnerRole) + " to current_user"); err != nil {
				return err
			}
		}
	}
	return s.sight(ctx, tx)
}

// Sight are PostgreSQL's own roles by which the owner sees what the sessions of other logins do and how the server is set,
// and may end those sessions. No role that serves has any of them.
var Sight = []string{"pg_read_all_stats", "pg_read_all_settings", "pg_signal_backend"}

// SightGrant is the statement that gives a role those of them.
func SightGrant(of []string, role string) string {
	return "grant " + strings.Join(of, ", ") + " to " + Quote(role)
}

// sight gives the owner what it lacks of Sight. Where that is not ours to give, since PostgreSQL 16 wants the admin option
// of each, nothing but the sight is missing: the story says what a superuser can do about it.
func (s *setup) sight(ctx context.Context, tx pgx.Tx) error {
	rows, err := tx.Query(ctx, `select r from pg_catalog.unnest($1::text[]) r where not pg_catalog.pg_has_role($2, r, 'usage')`, Sight, s.o.OwnerRole)
	if err != nil {
		return err
	}
	lacks, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	var refused []string
	for _, role := range lacks {
		err := pgx.BeginFunc(ctx, tx, func(tx pgx.Tx) error {
			_, err := tx.Exec(ctx, SightGrant([]string{role}, s.o.OwnerRole), pgx.QueryExecModeSimpleProtocol)
			return err
		})
		switch {
		case SQLState(err) == "42501":
			refused = append(refused, role)
		case err != nil:
			return fmt.Errorf("set up %s: %w", s.database, err)
		}
	}
	if len(refused) > 0 {
		s.o.Logf("the owner sees little of other sessions and may not end them, which this administrator cannot give it: as a superuser, %s", SightGrant(refused, s.o.OwnerRole))
	}
	return nil
}

func (s *setup) rights(inst Installation) []string {
	db, owner := Quote(s.database), Quote(s.o.OwnerRole)
	roles := []string{Quote(s.o.AppRole)}
	if inst.Logins > 0 {
		for _, l := range inst.LoginNames() {
			roles = append(roles, Quote(l))
		}
	}
	all := strings.Join(roles, ", ")
	sql := []string{
		"revoke all on database " + db + " from public",
		"grant connect on database " + db + " to " + all,
		"grant connect, create on database " + db + " to " + owner,
		"alter schema public owner to " + owner,
		"revoke all on schema public from public",
		"grant usage on schema public to " + all,
		"create schema if not exists ext authorization " + owner,
		"grant usage on schema ext to public",
	}
	for _, r := range append([]string{owner}, roles...) {
		// On the role, not in the start-up parameters: poolers do not pass those on.
		sql = append(sql, "alter role "+r+" in database "+db+" set search_path to ''")
	}
	if s.super {
		for _, f := range sessionLocks {
			sql = append(sql, "revoke execute on function pg_catalog."+f+" from public",
				"grant execute on function pg_catalog."+f+" to "+owner)
		}
		// Its rule calls set_config for whoever may update the view.
		sql = append(sql, "revoke update on pg_catalog.pg_settings from public")
		for _, f := range largeObjects {
			sql = append(sql, "revoke execute on function pg_catalog."+f+" from public")
		}
	} else {
		s.o.Logf("not a superuser: session advisory locks stay open to the app role (its statements are guarded all the same)")
	}
	return sql
}

const makeRecords = `
create table if not exists public.installation (
    only_one   boolean primary key default true check (only_one),
    id         text not null check (id ~ '^[0-9a-f]{8}$'),
    logins     integer not null check (logins between 0 and 64),
    app_role   text not null,
    created_at timestamptz not null default now()
);
-- One row for each migration applied: tenant 0 for what the database itself holds. A row is written in the transaction
-- of its migration, with the file's checksum.
create table if not exists public.ledger (
    set         text collate "C" not null check (set in ('group', 'shared', 'tenant')),
    tenant      integer not null check ((tenant > 0) = (set = 'tenant')),
    version     integer not null check (version > 0),
    name        text not null,
    checksum    bytea not null check (octet_length(checksum) = 32),
    applied_at  timestamptz not null default now(),
    duration_ms integer not null default 0,
    applied_by  text not null default session_user,
    primary key (set, tenant, version)
);
-- Serves the question which contents of a file were ever applied, whatever the number of tenants.
create index if not exists ledger_contents on public.ledger (set, version, checksum);`

func (s *setup) record(ctx context.Context, tx pgx.Tx, inst *Installation, exec func(string) error) error {
	owner, app := Quote(s.o.OwnerRole), Quote(s.o.AppRole)
	if err := exec(makeRecords); err != nil {
		return err
	}
	const insert = `insert into public.installation (id, logins, app_role) values ($1, $2, $3) on conflict do nothing`
	if _, err := tx.Exec(ctx, insert, inst.ID, inst.Logins, inst.AppRole); err != nil {
		return err
	}
	return exec("alter table public.installation owner to " + owner + "; alter table public.ledger owner to " + owner +
		"; grant select on public.installation, public.ledger to " + app)
}

// scramVerifier is what PostgreSQL stores for a password, so that the password itself never stands in a statement.
func scramVerifier(password string) (string, error) {
	const iterations = 4096
	salt := make([]byte, 16)
	if _, err := rand.Read(salt); err != nil {
		return "", err
	}
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", err
	}
	sign := func(key []byte, text string) []byte {
		m := hmac.New(sha256.New, key)
		m.Write([]byte(text))
		return m.Sum(nil)
	}
	stored := sha256.Sum256(sign(salted, "Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, b64(salt), b64(stored[:]), b64(sign(salted, "Server Key"))), nil
}
