// Package auth holds users, passwords, sessions, API keys and roles: of a tenant, and of the administrators of the
// public schema. Both are the same code on tables of the same shape.
//
// It promises: tokens are opaque, made here with 256 bits of chance, and stored as hashes only; a token is looked up in
// one realm and, bound, in one tenant, so that another tenant's token is unknown; disabling a user or changing a
// password ends every session in the same transaction; and no password is ever computed inside a transaction.
// Functions take a transaction that their caller holds.
package auth

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"net/mail"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Realm is where a user belongs. Its statements are made once, from constants.
type Realm struct {
	name    string
	session string // prefix of session tokens
	key     string // prefix of API keys
	roles   []string
	sql     statements
}

// Tenants returns the realm of a tenant's users: unqualified tables, so that only bound work can use it.
func Tenants() *Realm { return tenants }

// Administrators returns the realm of the administrators of the public schema.
func Administrators() *Realm { return administrators }

var (
	tenants = &Realm{name: "tenant", session: "ons_", key: "onk_", roles: []string{RoleAdmin, RoleMember, RoleViewer},
		sql: render("users", "sessions", "api_keys")}
	administrators = &Realm{name: "administrator", session: "oas_", key: "oak_", roles: []string{RoleAdmin},
		sql: render("public.administrators", "public.administrator_sessions", "public.administrator_keys")}
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
	ScopeAdmin = "admin"
)

var allowed = map[string][]Action{
	RoleAdmin:  {ReadRecords, WriteRecords, ManagePipelines, ManageUsers, ManageSettings, ManageKeys},
	RoleMember: {ReadRecords, WriteRecords},
	RoleViewer: {ReadRecords},
}

var scoped = map[string][]Action{
	ScopeRead:  {ReadRecords},
	ScopeWrite: {ReadRecords, WriteRecords},
	ScopeAdmin: allowed[RoleAdmin],
}

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
// for somebody.
func (i Identity) May(a Action) error {
	if i.IsZero() {
		return errUnauthenticated()
	}
	may := slices.Contains(allowed[i.Role], a)
	if i.Realm == administrators.name {
		may = a == Administer || a == ManageKeys
	}
	if may && i.Kind == KindKey {
		may = slices.ContainsFunc(i.Scopes, func(s string) bool {
			return slices.Contains(scoped[s], a) || s == ScopeAdmin && a == Administer
		})
	}
	if !may {
		return fault.New(fault.Forbidden, "you may not %s", a).WithCode("forbidden")
	}
	return nil
}

func errUnauthenticated() error {
	return fault.New(fault.Unauthenticated, "log in first, or send a valid token").WithCode("unauthenticated")
}

// newToken makes a token and the hash under which it is stored.
func newToken(prefix string) (token string, hash []byte) {
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		panic(err) // never returned since Go 1.24
	}
	token = prefix + base64.RawURLEncoding.EncodeToString(b)
	return token, HashToken(token)
}

// HashToken is what is stored of a token, and what caches know it by.
func HashToken(token string) []byte {
	sum := sha256.Sum256([]byte(token))
	return sum[:]
}

// ParseToken says whether a text has the form of one of the realm's tokens, and of which kind, before any statement
// is run for it.
func (r *Realm) ParseToken(token string) (kind string, ok bool) {
	for prefix, kind := range map[string]string{r.session: KindSession, r.key: KindKey} {
		rest, found := strings.CutPrefix(token, prefix)
		if !found || len(rest) != 43 {
			continue
		}
		b, err := base64.RawURLEncoding.Strict().DecodeString(rest)
		return kind, err == nil && len(b) == 32
	}
	return "", false
}

// ParseEmail reads an address as it is stored: lower case, no display name. The fault is Invalid.
func ParseEmail(s string) (string, error) {
	a, err := mail.ParseAddress(s)
	_, domain, found := strings.Cut(s, "@")
	if err != nil || a.Name != "" || a.Address != s || len(s) > 254 || !found || domain == "" || strings.ContainsAny(s, " \t\r\n<>\"\x00") {
		return "", fault.New(fault.Invalid, "%q is no e-mail address", clip(s)).WithCode("invalid_email").
			WithHint("for example ada@example.com")
	}
	return strings.ToLower(s), nil
}

func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// User is one account. It never carries the password's hash.
type User struct {
	ID         uuid.UUID       `json:"id"`
	Email      string          `json:"email"`
	Name       string          `json:"name"`
	Role       string          `json:"role"`
	Metadata   json.RawMessage `json:"metadata"`
	DisabledAt *time.Time      `json:"disabled_at,omitempty"`
	CreatedAt  time.Time       `json:"created_at"`
	UpdatedAt  time.Time       `json:"updated_at"`
	Version    int             `json:"version"`
}

// Key is one API key, without its token.
type Key struct {
	ID        uuid.UUID  `json:"id"`
	UserID    uuid.UUID  `json:"user_id"`
	Email     string     `json:"email"`
	Name      string     `json:"name"`
	Scopes    []string   `json:"scopes"`
	CreatedAt time.Time  `json:"created_at"`
	ExpiresAt *time.Time `json:"expires_at,omitempty"`
	LastUsed  *time.Time `json:"last_used,omitempty"`
	RevokedAt *time.Time `json:"revoked_at,omitempty"`
}
