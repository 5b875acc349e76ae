package auth

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// SessionOptions says how long sessions last and where they come from.
type SessionOptions struct {
	Idle      time.Duration // without a request
	Absolute  time.Duration // in all
	UserAgent string        // at most 200 bytes are kept
	Remote    string        // at most 200 bytes are kept
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

// Credential reads what a login with this address, as ParseEmail returned it, is checked against.
func (r *Realm) Credential(ctx context.Context, q postgres.Querier, email string) (Credential, error) {
	var c Credential
	err := q.QueryRow(ctx, r.sql.credential, email).Scan(&c.userID, &c.hash)
	if errors.Is(err, pgx.ErrNoRows) {
		return Credential{}, nil
	}
	return c, err
}

// Rehash stores what Strengthen made, unless the password was changed meanwhile, and returns the credential to go on
// with.
func (r *Realm) Rehash(ctx context.Context, q postgres.Querier, c Credential, hash string) (Credential, error) {
	if err := checkHash(hash); err != nil {
		return c, err
	}
	tag, err := q.Exec(ctx, r.sql.rehash, c.userID, c.hash, hash)
	if err == nil && tag.RowsAffected() == 1 {
		c.hash = hash
	}
	return c, err
}

// StartSession makes a session for a credential that Check accepted and returns its token, which is shown once. The
// fault is Unauthenticated when the account was disabled or its password changed since.
func (r *Realm) StartSession(ctx context.Context, q postgres.Querier, c Credential, o SessionOptions) (token string, expires time.Time, err error) {
	token, hash := newToken(r.session)
	err = q.QueryRow(ctx, r.sql.startSession, hash, c.userID, c.hash, o.Absolute, keep(o.UserAgent), keep(o.Remote)).Scan(&expires)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", time.Time{}, errLogin()
	}
	if err != nil {
		return "", time.Time{}, err
	}
	// What has run out is of no use to anybody: a login clears its own user's. After the insert, which holds the user:
	// whoever changes the password takes the user first and the sessions after, too.
	if _, err := q.Exec(ctx, r.sql.purgeOwn, c.userID, o.Idle); err != nil {
		return "", time.Time{}, err
	}
	return token, expires, nil
}

// keep is what is stored of a text that a client sent about itself.
func keep(s string) string {
	const limit = 200
	s = strings.ReplaceAll(strings.ToValidUTF8(s, ""), "\x00", "")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
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
		err = q.QueryRow(ctx, r.sql.bySession, i.TokenHash, idle).
			Scan(&i.UserID, &i.Email, &i.Name, &i.Role, &i.ExpiresAt, &i.LastSeen)
	} else {
		err = q.QueryRow(ctx, r.sql.byKey, i.TokenHash).
			Scan(&i.UserID, &i.Email, &i.Name, &i.Role, &i.Scopes, &i.ExpiresAt, &i.LastSeen)
	}
	if errors.Is(err, pgx.ErrNoRows) {
		return Identity{}, errUnauthenticated()
	}
	if err != nil {
		return Identity{}, err
	}
	return i, nil
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

// PurgeExpired removes the sessions that have run out and says how many. They are refused without it; it is for the
// room that those leave who never come back.
func (r *Realm) PurgeExpired(ctx context.Context, q postgres.Querier, idle time.Duration) (int64, error) {
	tag, err := q.Exec(ctx, r.sql.purgeExpired, idle)
	return tag.RowsAffected(), err
}

func errLogin() error {
	return fault.New(fault.Unauthenticated, "the address or the password is wrong").WithCode("login_failed")
}
