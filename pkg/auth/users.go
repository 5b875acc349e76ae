package auth

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// MaxMetadataBytes bounds a user's metadata.
const MaxMetadataBytes = 16 << 10

// NewUser is an account to be made. The hash is computed by the caller, before the transaction.
type NewUser struct {
	Email        string // as ParseEmail returned it
	Name         string
	Role         string // empty: the realm's first
	PasswordHash string
	Metadata     json.RawMessage // an object; empty: {}
}

func scanUser(row pgx.Row) (User, error) {
	var u User
	err := row.Scan(&u.ID, &u.Email, &u.Name, &u.Role, &u.Metadata, &u.DisabledAt, &u.CreatedAt, &u.UpdatedAt, &u.Version)
	if errors.Is(err, pgx.ErrNoRows) {
		return u, fault.New(fault.NotFound, "there is no such user").WithCode("unknown_user")
	}
	return u, err
}

// AddUser makes an account. Conflict: the address is taken.
func (r *Realm) AddUser(ctx context.Context, q postgres.Querier, n NewUser) (User, error) {
	if n.Role == "" {
		n.Role = r.roles[0]
	}
	if len(n.Metadata) == 0 {
		n.Metadata = json.RawMessage(`{}`)
	}
	if err := r.checkUser(n.Name, n.Role, n.Metadata); err != nil {
		return User{}, err
	}
	id, err := uuid.NewV7()
	if err != nil {
		return User{}, err
	}
	u, err := scanUser(q.QueryRow(ctx, r.sql.addUser, id, n.Email, n.Name, n.Role, n.PasswordHash, n.Metadata))
	if postgres.SQLState(err) == "23505" {
		return u, fault.Wrap(err, fault.Conflict, "a user with the address %s exists already", n.Email).WithCode("user_exists")
	}
	return u, err
}

func (r *Realm) checkUser(name, role string, metadata json.RawMessage) error {
	field := func(pointer, code, detail string) error {
		return fault.New(fault.Unfit, "%s", detail).WithField(fault.Field{Pointer: pointer, Code: code, Detail: detail})
	}
	if len([]rune(name)) > 200 || strings.ContainsRune(name, 0) {
		return field("/name", "too_long", "a name may have at most 200 characters and no NUL")
	}
	if !slices.Contains(r.roles, role) {
		return field("/role", "unknown_role", "the role must be one of "+strings.Join(r.roles, ", "))
	}
	var object map[string]json.RawMessage
	if len(metadata) > MaxMetadataBytes || json.Unmarshal(metadata, &object) != nil || object == nil {
		return field("/metadata", "metadata", "metadata must be a JSON object of at most 16 KiB")
	}
	return nil
}

// Users lists accounts by id, which is the order in which they were made; after is the last one of the page before.
func (r *Realm) Users(ctx context.Context, q postgres.Querier, limit int, after *uuid.UUID) ([]User, error) {
	rows, err := q.Query(ctx, r.sql.listUsers, after, limit)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (User, error) { return scanUser(row) })
}

// UserByID finds an account. NotFound.
func (r *Realm) UserByID(ctx context.Context, q postgres.Querier, id uuid.UUID) (User, error) {
	return scanUser(q.QueryRow(ctx, r.sql.userByID, id))
}

// UserByEmail finds an account. NotFound.
func (r *Realm) UserByEmail(ctx context.Context, q postgres.Querier, email string) (User, error) {
	u, err := scanUser(q.QueryRow(ctx, r.sql.userByEmail, email))
	if fault.Is(err, fault.NotFound) {
		return u, fault.New(fault.NotFound, "there is no user %s", email).WithCode("unknown_user")
	}
	return u, err
}

// UpdateUser replaces name, role and metadata of the account as the caller read it. Stale: it is another version by
// now. Conflict: it is the last administrator and would not be one any more. A change of role ends its sessions; their
// hashes are returned, for the caches.
func (r *Realm) UpdateUser(ctx context.Context, q postgres.Querier, u User) (User, [][]byte, error) {
	if err := r.checkUser(u.Name, u.Role, u.Metadata); err != nil {
		return User{}, nil, err
	}
	if u.Role != RoleAdmin {
		if err := r.keepAnAdmin(ctx, q, u.ID); err != nil {
			return User{}, nil, err
		}
	}
	before, err := r.UserByID(ctx, q, u.ID)
	if err != nil {
		return User{}, nil, err
	}
	after, err := scanUser(q.QueryRow(ctx, r.sql.updateUser, u.ID, u.Version, u.Name, u.Role, u.Metadata))
	if fault.Is(err, fault.NotFound) {
		return User{}, nil, fault.New(fault.Stale, "the user was changed in between").WithCode("stale").WithDetails(map[string]any{"current": before})
	}
	if err != nil || before.Role == after.Role {
		return after, nil, err
	}
	ended, err := r.RevokeSessions(ctx, q, u.ID)
	return after, ended, err
}

// keepAnAdmin refuses to take away the last administrator of the realm. It locks the administrators until the
// transaction ends, so that two callers cannot take away each other's.
func (r *Realm) keepAnAdmin(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
	rows, err := q.Query(ctx, r.sql.lockAdmins)
	if err != nil {
		return err
	}
	admins, err := pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
	if err != nil {
		return err
	}
	if len(admins) == 1 && admins[0] == id {
		return fault.New(fault.Conflict, "this is the last administrator").WithCode("last_admin").
			WithHint("make somebody else an administrator first")
	}
	return nil
}

// DisableUser keeps an account from logging in, and ends its sessions; their hashes are returned, for the caches.
// Conflict: it is the last administrator.
func (r *Realm) DisableUser(ctx context.Context, q postgres.Querier, id uuid.UUID) (User, [][]byte, error) {
	if err := r.keepAnAdmin(ctx, q, id); err != nil {
		return User{}, nil, err
	}
	u, err := scanUser(q.QueryRow(ctx, r.sql.disableUser, id))
	if err != nil {
		return u, nil, err
	}
	ended, err := r.RevokeSessions(ctx, q, id)
	return u, ended, err
}

// EnableUser lets a disabled account log in again.
func (r *Realm) EnableUser(ctx context.Context, q postgres.Querier, id uuid.UUID) (User, error) {
	return scanUser(q.QueryRow(ctx, r.sql.enableUser, id))
}

// SetPassword replaces an account's password hash and ends its sessions; their hashes are returned, for the caches.
func (r *Realm) SetPassword(ctx context.Context, q postgres.Querier, id uuid.UUID, hash string) (User, [][]byte, error) {
	u, err := scanUser(q.QueryRow(ctx, r.sql.setPassword, id, hash))
	if err != nil {
		return u, nil, err
	}
	ended, err := r.RevokeSessions(ctx, q, id)
	return u, ended, err
}

// SessionOptions says how long sessions last and where they come from.
type SessionOptions struct {
	Idle      time.Duration // without a request
	Absolute  time.Duration // in all
	UserAgent string        // at most 200 bytes are kept
	Remote    string
}

// DefaultSessionOptions are a day without a request and thirty days in all.
func DefaultSessionOptions() SessionOptions {
	return SessionOptions{Idle: 24 * time.Hour, Absolute: 30 * 24 * time.Hour}
}

// Credential is what a login is checked against. For an unknown or disabled account it exists all the same and fails
// after the same work.
type Credential struct {
	userID uuid.UUID
	hash   string
}

// Credential reads what a login with this address is checked against.
func (r *Realm) Credential(ctx context.Context, q postgres.Querier, email string) (Credential, error) {
	var c Credential
	err := q.QueryRow(ctx, r.sql.credential, email).Scan(&c.userID, &c.hash)
	if errors.Is(err, pgx.ErrNoRows) {
		return Credential{}, nil
	}
	return c, err
}

// Check returns nil when the password is the credential's. Call it outside of any transaction. The fault is
// Unauthenticated and the same for a wrong password, an unknown and a disabled account.
func (h *Hasher) Check(ctx context.Context, c Credential, password string) error {
	ok, _, err := h.Verify(ctx, c.hash, password)
	if err != nil {
		return err
	}
	if !ok || c.userID == uuid.Nil {
		return fault.New(fault.Unauthenticated, "the address or the password is wrong").WithCode("login_failed")
	}
	return nil
}

// Strengthen returns a new hash for a password that Check accepted, when the stored one is weaker than today's, and
// otherwise nothing. Call it outside of any transaction.
func (h *Hasher) Strengthen(ctx context.Context, c Credential, password string) (string, error) {
	p, err := parsePHC(c.hash)
	if err != nil || p.memory > argonMemoryKiB || p.memory == argonMemoryKiB && p.time >= argonTime && len(p.key) >= keyBytes {
		return "", nil
	}
	return h.Hash(ctx, password)
}

// Rehash stores what Strengthen made, unless the password was changed meanwhile, and returns the credential to go on
// with.
func (r *Realm) Rehash(ctx context.Context, q postgres.Querier, c Credential, hash string) (Credential, error) {
	tag, err := q.Exec(ctx, r.sql.rehash, c.userID, c.hash, hash)
	if err == nil && tag.RowsAffected() == 1 {
		c.hash = hash
	}
	return c, err
}

// StartSession makes a session for a credential that Check accepted and returns its token, which is shown once. The
// fault is Unauthenticated when the account was disabled or its password changed since.
func (r *Realm) StartSession(ctx context.Context, q postgres.Querier, c Credential, o SessionOptions) (token string, expires time.Time, err error) {
	// What has run out is of no use to anybody: a login clears its own user's.
	if _, err := q.Exec(ctx, r.sql.purgeSessions, c.userID, o.Idle); err != nil {
		return "", expires, err
	}
	token, hash := newToken(r.session)
	agent := strings.ToValidUTF8(strings.ReplaceAll(o.UserAgent, "\x00", ""), "")
	if len(agent) > 200 {
		agent = strings.ToValidUTF8(agent[:200], "")
	}
	err = q.QueryRow(ctx, r.sql.startSession, hash, c.userID, c.hash, o.Absolute, agent, o.Remote).Scan(&expires)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", expires, fault.New(fault.Unauthenticated, "the address or the password is wrong").WithCode("login_failed")
	}
	return token, expires, err
}

// Authenticate finds who a token stands for, in one statement. idle is SessionOptions.Idle. The fault is
// Unauthenticated, and the same for whatever is wrong.
func (r *Realm) Authenticate(ctx context.Context, q postgres.Querier, token string, idle time.Duration) (Identity, error) {
	kind, ok := r.ParseToken(token)
	if !ok {
		return Identity{}, errUnauthenticated()
	}
	i := Identity{Realm: r.name, Kind: kind, TokenHash: HashToken(token)}
	var err error
	if kind == KindSession {
		err = q.QueryRow(ctx, r.sql.bySession, i.TokenHash, idle).Scan(&i.UserID, &i.Email, &i.Name, &i.Role, &i.ExpiresAt, &i.LastSeen)
	} else {
		err = q.QueryRow(ctx, r.sql.byKey, i.TokenHash).Scan(&i.UserID, &i.Email, &i.Name, &i.Role, &i.Scopes, &i.ExpiresAt, &i.LastSeen)
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return Identity{}, errUnauthenticated()
	}
	return i, err
}

// Touch notes that a session or key was used, at most once a minute.
func (r *Realm) Touch(ctx context.Context, q postgres.Querier, i Identity) error {
	sql := r.sql.touchSession
	if i.Kind == KindKey {
		sql = r.sql.touchKey
	}
	_, err := q.Exec(ctx, sql, i.TokenHash)
	return err
}

// EndSession ends the session of an identity.
func (r *Realm) EndSession(ctx context.Context, q postgres.Querier, i Identity) error {
	_, err := q.Exec(ctx, r.sql.endSession, i.TokenHash)
	return err
}

// RevokeSessions ends every session of a user and returns the hashes of their tokens, for the caches.
func (r *Realm) RevokeSessions(ctx context.Context, q postgres.Querier, id uuid.UUID) ([][]byte, error) {
	return hashes(q.Query(ctx, r.sql.revokeSessions, id))
}

// RevokeAllSessions ends every session of the realm, which is one tenant's where the transaction is bound.
func (r *Realm) RevokeAllSessions(ctx context.Context, q postgres.Querier) ([][]byte, error) {
	return hashes(q.Query(ctx, r.sql.revokeAll))
}

func hashes(rows pgx.Rows, err error) ([][]byte, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[[]byte])
}

// AddKey makes an API key for a user and returns its token, which is shown once. expires may be nil.
func (r *Realm) AddKey(ctx context.Context, q postgres.Querier, user uuid.UUID, name string, scopes []string, expires *time.Time) (Key, string, error) {
	if n := len([]rune(name)); n < 1 || n > 100 || strings.ContainsRune(name, 0) {
		return Key{}, "", fault.New(fault.Unfit, "a key needs a name of at most 100 characters").
			WithField(fault.Field{Pointer: "/name", Code: "name", Detail: "1 to 100 characters"})
	}
	if len(scopes) == 0 {
		scopes = []string{ScopeRead}
	}
	for _, s := range scopes {
		if _, ok := scoped[s]; !ok {
			return Key{}, "", fault.New(fault.Unfit, "unknown scope %q", clip(s)).
				WithField(fault.Field{Pointer: "/scopes", Code: "unknown_scope", Detail: "use read, write or admin"})
		}
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Key{}, "", err
	}
	token, hash := newToken(r.key)
	k, err := scanKey(q.QueryRow(ctx, r.sql.addKey, id, hash, user, name, scopes, expires))
	if errors.Is(err, pgx.ErrNoRows) {
		return k, "", fault.New(fault.NotFound, "there is no such user, or it is disabled").WithCode("unknown_user")
	}
	return k, token, err
}

func scanKey(row pgx.Row) (Key, error) {
	var k Key
	return k, row.Scan(&k.ID, &k.UserID, &k.Email, &k.Name, &k.Scopes, &k.CreatedAt, &k.ExpiresAt, &k.LastUsed, &k.RevokedAt)
}

// Keys lists API keys, oldest first; of one user, or with nil of all.
func (r *Realm) Keys(ctx context.Context, q postgres.Querier, user *uuid.UUID) ([]Key, error) {
	rows, err := q.Query(ctx, r.sql.listKeys, user)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (Key, error) { return scanKey(row) })
}

// RevokeKey ends a key for good and returns its token's hash, for the caches. With user it must be that user's. It
// does nothing to a revoked one. NotFound.
func (r *Realm) RevokeKey(ctx context.Context, q postgres.Querier, id uuid.UUID, user *uuid.UUID) ([]byte, error) {
	var hash []byte
	err := q.QueryRow(ctx, r.sql.revokeKey, id, user).Scan(&hash)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fault.New(fault.NotFound, "there is no key %s", id).WithCode("unknown_key")
	}
	return hash, err
}
