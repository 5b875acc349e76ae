// Package auth holds users, passwords, sessions, API keys and roles: of a tenant, and of the administrators of the
// public schema. Both are the same code on tables of the same shape.
//
// It promises: tokens are opaque, made here with 256 bits of chance, and stored as hashes only; a token is looked up in
// one realm and, bound, in one tenant, so that another tenant's token is unknown; disabling a user or changing a
// password ends every session in the same transaction; and no password is ever computed inside a transaction.
// Functions take a transaction that their caller holds. Time is PostgreSQL's.
package auth

import (
	"slices"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Realm is where a user belongs. Its statements are made once, from constants.
type Realm struct {
	name    string
	session string              // prefix of session tokens
	key     string              // prefix of API keys
	roles   []string            // the first is the default
	may     map[string][]Action // by role
	scopes  map[string][]Action // by an API key's scope
	sql     statements
}

// SessionsTable is the tenant's table of who is logged in: it is never copied anywhere.
const SessionsTable = "sessions"

// Tenants returns the realm of a tenant's users: unqualified tables, so that only bound work can use it.
func Tenants() *Realm { return tenants }

// Administrators returns the realm of the administrators of the public schema.
func Administrators() *Realm { return administrators }

var (
	tenants = &Realm{
		name: "tenant", session: "ons_", key: "onk_",
		roles: []string{RoleAdmin, RoleMember, RoleViewer},
		may: map[string][]Action{
			RoleAdmin:  {ReadRecords, WriteRecords, ManagePipelines, ManageUsers, ManageSettings, ManageKeys},
			RoleMember: {ReadRecords, WriteRecords},
			RoleViewer: {ReadRecords},
		},
		scopes: map[string][]Action{
			ScopeAdmin: {ReadRecords, WriteRecords, ManagePipelines, ManageUsers, ManageSettings, ManageKeys},
			ScopeWrite: {ReadRecords, WriteRecords},
			ScopeRead:  {ReadRecords},
		},
		sql: render("users", SessionsTable, "api_keys"),
	}
	// There is nothing in the public schema that an administrator may read without being one.
	administrators = &Realm{
		name: "administrator", session: "oas_", key: "oak_",
		roles:  []string{RoleAdmin},
		may:    map[string][]Action{RoleAdmin: {Administer, ManageKeys}},
		scopes: map[string][]Action{ScopeAdmin: {Administer, ManageKeys}},
		sql:    render("public.administrators", "public.administrator_sessions", "public.administrator_keys"),
	}
)

// Name is "tenant" or "administrator".
func (r *Realm) Name() string { return r.name }

// Roles lists the roles that a user of the realm may have.
func (r *Realm) Roles() []string { return slices.Clone(r.roles) }

// The roles of a tenant's user.
const (
	RoleAdmin  = "admin"  // everything in the tenant
	RoleMember = "member" // reads and writes records
	RoleViewer = "viewer" // reads
)

// Action is something that a role may or may not do.
type Action string

// The actions that handlers ask for.
const (
	ReadRecords     Action = "read records"
	WriteRecords    Action = "write records"
	ManagePipelines Action = "manage pipelines"
	ManageUsers     Action = "manage users"
	ManageSettings  Action = "manage settings"
	ManageKeys      Action = "manage API keys"
	Administer      Action = "administer the installation"
)

// The scopes of an API key: each contains those before it, and none is more than its user's role.
const (
	ScopeRead  = "read"
	ScopeWrite = "write"
	ScopeAdmin = "admin" // the only one of an administrator's key
)

// Identity is who is asking: the user behind a session or an API key. Its JSON form is for caches and holds no token.
type Identity struct {
	Realm     string     `json:"realm"`
	UserID    uuid.UUID  `json:"user_id"`
	Email     string     `json:"email"`
	Name      string     `json:"name"`
	Role      string     `json:"role"`
	Kind      string     `json:"kind"` // session or key
	TokenHash []byte     `json:"token_hash"`
	Scopes    []string   `json:"scopes,omitempty"` // of a key
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	LastSeen  *time.Time `json:"last_seen,omitempty"`
}

// The kinds of an Identity.
const (
	KindSession = "session"
	KindKey     = "key"
)

// IsZero reports whether nobody has been authenticated.
func (i Identity) IsZero() bool { return i.UserID == uuid.Nil }

// May returns nil when the identity may do the action, and otherwise a fault: Unauthenticated for nobody, Forbidden
// for somebody. A key may what both its scopes and its user's role allow.
func (i Identity) May(a Action) error {
	if i.IsZero() {
		return errUnauthenticated()
	}
	for _, r := range []*Realm{tenants, administrators} {
		if r.name == i.Realm && slices.Contains(r.may[i.Role], a) && r.inScope(i, a) {
			return nil
		}
	}
	return fault.New(fault.Forbidden, "you may not %s", a).WithCode("forbidden")
}

// inScope reports whether the token itself, whoever's it is, is good for an action.
func (r *Realm) inScope(i Identity, a Action) bool {
	switch i.Kind {
	case KindSession:
		return true
	case KindKey:
		return slices.ContainsFunc(i.Scopes, func(s string) bool { return slices.Contains(r.scopes[s], a) })
	}
	return false
}

func errUnauthenticated() error {
	return fault.New(fault.Unauthenticated, "log in first, or send a valid token").WithCode("unauthenticated")
}
