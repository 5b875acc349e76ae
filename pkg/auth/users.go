package auth

import (
	"context"
	"encoding/json"
	"errors"
	"net/mail"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// MaxMetadataBytes bounds a user's metadata.
const MaxMetadataBytes = 16 << 10

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

// NewUser is an account to be made. The hash is computed by the caller, before the transaction.
type NewUser struct {
	Email        string // as ParseEmail returned it
	Name         string
	Role         string // empty: the realm's first
	PasswordHash string
	Metadata     json.RawMessage // an object; empty: {}
}

// ParseEmail reads an address as it is stored: lower case, no display name, no quotes, at most 254 bytes, the domain
// as tenant.ParseHost writes it. The part before the @ is ASCII: folding the case of other letters makes one address
// of two (the Turkish dotted I becomes an i). The fault is Invalid.
func ParseEmail(s string) (string, error) {
	bad := func() error {
		return fault.New(fault.Invalid, "%q is no e-mail address", clip(s)).WithCode("invalid_email").
			WithHint("for example ada@example.com")
	}
	local, domain, _ := strings.Cut(s, "@")
	if len(s) > 254 || len(local) > 64 || strings.ContainsAny(s, "\" \t\r\n<>[]:") {
		return "", bad()
	}
	if strings.ContainsFunc(local, func(r rune) bool { return r > unicode.MaxASCII }) {
		return "", bad()
	}
	a, err := mail.ParseAddress(s)
	if err != nil || a.Name != "" || a.Address != s {
		return "", bad()
	}
	host, err := tenant.ParseHost(domain)
	if err != nil {
		return "", bad()
	}
	if s = strings.ToLower(local) + "@" + host.String(); len(s) > 254 {
		return "", bad()
	}
	return s, nil
}

// clip shortens what somebody sent for a message.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

func scanUser(row pgx.Row) (User, error) {
	var u User
	err := row.Scan(&u.ID, &u.Email, &u.Name, &u.Role, &u.Metadata, &u.DisabledAt, &u.CreatedAt, &u.UpdatedAt, &u.Version)
	if errors.Is(err, pgx.ErrNoRows) {
		return User{}, fault.New(fault.NotFound, "there is no such user").WithCode("unknown_user")
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
	if email, err := ParseEmail(n.Email); err != nil {
		return User{}, err
	} else if email != n.Email {
		return User{}, fault.New(fault.Internal, "an address was not parsed before it was stored").WithCode("email_form")
	}
	if err := r.checkUser(n.Name, n.Role, n.Metadata); err != nil {
		return User{}, err
	}
	if err := checkHash(n.PasswordHash); err != nil {
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
	if !isLabel(name, 200) {
		return unfit("/name", "name", "a name may have at most 200 characters and no control characters")
	}
	if !slices.Contains(r.roles, role) {
		return unfit("/role", "unknown_role", "the role must be one of "+strings.Join(r.roles, ", "))
	}
	var object map[string]json.RawMessage
	if len(metadata) > MaxMetadataBytes || json.Unmarshal(metadata, &object) != nil || object == nil {
		return unfit("/metadata", "metadata", "metadata must be a JSON object of at most 16 KiB")
	}
	return nil
}

// isLabel reports whether s can be stored as a name and shown in a list or a terminal.
func isLabel(s string, limit int) bool {
	return utf8.ValidString(s) && utf8.RuneCountInString(s) <= limit && !strings.ContainsFunc(s, unicode.IsControl)
}

func unfit(pointer, code, detail string) error {
	return fault.New(fault.Unfit, "%s", detail).WithField(fault.Field{Pointer: pointer, Code: code, Detail: detail})
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

// UserByEmail finds an account by its address, as ParseEmail returned it. NotFound.
func (r *Realm) UserByEmail(ctx context.Context, q postgres.Querier, email string) (User, error) {
	u, err := scanUser(q.QueryRow(ctx, r.sql.userByEmail, email))
	if fault.Is(err, fault.NotFound) {
		return u, fault.New(fault.NotFound, "there is no user %s", clip(email)).WithCode("unknown_user")
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
	before, err := r.UserByID(ctx, q, u.ID)
	if err != nil {
		return User{}, nil, err
	}
	// The role read here is the one that the statement replaces: it changes this version only, also where the caller
	// guessed a later one.
	if before.Version != u.Version {
		return User{}, nil, errStale(before)
	}
	if before.Role == RoleAdmin && u.Role != RoleAdmin {
		if err := r.keepAnAdmin(ctx, q, u.ID); err != nil {
			return User{}, nil, err
		}
	}
	after, err := scanUser(q.QueryRow(ctx, r.sql.updateUser, u.ID, u.Version, u.Name, u.Role, u.Metadata))
	if fault.Is(err, fault.NotFound) {
		current, err := r.UserByID(ctx, q, u.ID)
		if err != nil {
			return User{}, nil, err
		}
		return User{}, nil, errStale(current)
	}
	if err != nil || before.Role == after.Role {
		return after, nil, err
	}
	ended, err := r.RevokeSessions(ctx, q, u.ID)
	return after, ended, err
}

func errStale(current User) error {
	return fault.New(fault.Stale, "the user was changed in between").WithCode("stale").
		WithDetails(map[string]any{"current": current})
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

// DisableUser keeps an account from logging in, and ends its sessions; their hashes are returned, for the caches. Its
// API keys are refused for as long as it is disabled. Conflict: it is the last administrator.
func (r *Realm) DisableUser(ctx context.Context, q postgres.Querier, id uuid.UUID) (User, [][]byte, error) {
	if err := r.keepAnAdmin(ctx, q, id); err != nil {
		return User{}, nil, err
	}
	return r.logOut(ctx, q, q.QueryRow(ctx, r.sql.disableUser, id))
}

// EnableUser lets a disabled account log in again.
func (r *Realm) EnableUser(ctx context.Context, q postgres.Querier, id uuid.UUID) (User, error) {
	return scanUser(q.QueryRow(ctx, r.sql.enableUser, id))
}

// SetPassword replaces an account's password hash and ends its sessions; their hashes are returned, for the caches.
func (r *Realm) SetPassword(ctx context.Context, q postgres.Querier, id uuid.UUID, hash string) (User, [][]byte, error) {
	if err := checkHash(hash); err != nil {
		return User{}, nil, err
	}
	return r.logOut(ctx, q, q.QueryRow(ctx, r.sql.setPassword, id, hash))
}

// ChangePassword replaces the hash of a credential that Check accepted, for its owner, and ends the account's sessions
// like SetPassword. Unauthenticated: the password was changed or the account disabled since; what an administrator set
// meanwhile stays.
func (r *Realm) ChangePassword(ctx context.Context, q postgres.Querier, c Credential, hash string) (User, [][]byte, error) {
	if err := checkHash(hash); err != nil {
		return User{}, nil, err
	}
	u, ended, err := r.logOut(ctx, q, q.QueryRow(ctx, r.sql.changePassword, c.userID, hash, c.hash))
	if fault.Is(err, fault.NotFound) {
		return u, nil, errLogin()
	}
	return u, ended, err
}

// logOut ends the sessions of the account that has just been changed. It is a statement after the change, which waited
// for logins that held the account: it sees the sessions that they made.
func (r *Realm) logOut(ctx context.Context, q postgres.Querier, changed pgx.Row) (User, [][]byte, error) {
	u, err := scanUser(changed)
	if err != nil {
		return u, nil, err
	}
	ended, err := r.RevokeSessions(ctx, q, u.ID)
	return u, ended, err
}
