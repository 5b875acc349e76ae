package auth

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// MaxKeys is how many API keys that have not ended a user may have.
const MaxKeys = 100

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

// AddKey makes an API key for a user and returns its token, which is shown once. Without scopes a tenant's key is for
// reading. expires may be nil. Unfit: a scope that the realm does not know or that is more than the user's role, or
// an end in the past. Conflict: the user has MaxKeys already.
func (r *Realm) AddKey(ctx context.Context, q postgres.Querier, user uuid.UUID, name string, scopes []string, expires *time.Time) (Key, string, error) {
	if name == "" || !isLabel(name, 100) {
		return Key{}, "", unfit("/name", "name", "a key needs a name of at most 100 characters, without control characters")
	}
	if len(scopes) == 0 {
		scopes = []string{ScopeRead}
	}
	scopes = slices.Compact(slices.Sorted(slices.Values(scopes)))
	for _, s := range scopes {
		if _, ok := r.scopes[s]; !ok {
			return Key{}, "", unfit("/scopes", "unknown_scope", "the scopes of a key are "+strings.Join(r.scopeNames(), ", "))
		}
	}
	k := Key{UserID: user, Name: name, Scopes: scopes}
	var role string
	var ahead bool
	err := q.QueryRow(ctx, r.sql.keyOwner, user, expires).Scan(&k.Email, &role, &ahead)
	if errors.Is(err, pgx.ErrNoRows) {
		return Key{}, "", fault.New(fault.NotFound, "there is no such user, or it is disabled").WithCode("unknown_user")
	}
	if err != nil {
		return Key{}, "", err
	}
	if !ahead {
		return Key{}, "", unfit("/expires_at", "past", "a key must end in the future")
	}
	for _, s := range scopes {
		for _, a := range r.scopes[s] {
			if !slices.Contains(r.may[role], a) {
				return Key{}, "", unfit("/scopes", "beyond_role", "the scope "+s+" is more than the user's role, "+role+", may do")
			}
		}
	}
	if k.ID, err = uuid.NewV7(); err != nil {
		return Key{}, "", err
	}
	token, hash := newToken(r.key)
	err = q.QueryRow(ctx, r.sql.addKey, k.ID, hash, user, name, scopes, expires, MaxKeys).Scan(&k.CreatedAt, &k.ExpiresAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return Key{}, "", fault.New(fault.Conflict, "a user has at most %d API keys", MaxKeys).WithCode("too_many_keys").
			WithHint("revoke one that is not used any more")
	}
	if err != nil {
		return Key{}, "", err
	}
	return k, token, nil
}

// scopeNames lists the realm's scopes, the least first.
func (r *Realm) scopeNames() []string {
	var names []string
	for _, s := range []string{ScopeRead, ScopeWrite, ScopeAdmin} {
		if _, ok := r.scopes[s]; ok {
			names = append(names, s)
		}
	}
	return names
}

func scanKey(row pgx.Row) (Key, error) {
	var k Key
	err := row.Scan(&k.ID, &k.UserID, &k.Email, &k.Name, &k.Scopes, &k.CreatedAt, &k.ExpiresAt, &k.LastUsed, &k.RevokedAt)
	return k, err
}

// Keys lists API keys, oldest first, also those that ended; of one user, or with nil of all.
func (r *Realm) Keys(ctx context.Context, q postgres.Querier, user *uuid.UUID) ([]Key, error) {
	return keys(q.Query(ctx, r.sql.listKeys, user, nil, nil))
}

// KeyPage is a part of what Keys lists; after is the last one of the page before.
func (r *Realm) KeyPage(ctx context.Context, q postgres.Querier, user *uuid.UUID, limit int, after *uuid.UUID) ([]Key, error) {
	return keys(q.Query(ctx, r.sql.listKeys, user, after, limit))
}

func keys(rows pgx.Rows, err error) ([]Key, error) {
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
