package server

import (
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/maypok86/otter/v2"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// identityKey is a token's hash together with the tenant and its cache generation: the same token at another tenant is
// another key. On public hosts number is 0.
type identityKey struct {
	number     int32
	generation int64
	hash       [32]byte
}

// identities remembers in this process, for LocalTTL, who a token stands for.
type identities struct {
	known *otter.Cache[identityKey, auth.Identity]
	// changes counts what has been forgotten: an identity that was read before may not be stored after it.
	changes atomic.Int64
}

// maxIdentities bounds the memory, at about 500 bytes each.
const maxIdentities = 20_000

func newIdentities(ttl time.Duration) *identities {
	return &identities{known: otter.Must(&otter.Options[identityKey, auth.Identity]{
		MaximumSize: maxIdentities, ExpiryCalculator: otter.ExpiryWriting[identityKey, auth.Identity](ttl),
	})}
}

func (c *identities) close() { c.known.StopAllGoroutines() }

func (c *identities) forget(match func(identityKey, auth.Identity) bool) {
	c.changes.Add(1)
	for k, i := range c.known.All() {
		if match(k, i) {
			c.known.Invalidate(k)
		}
	}
}

// realmOf is where a request's users are kept.
func realmOf(x *exchange) *auth.Realm {
	if x.realm == publicRealm {
		return auth.Administrators()
	}
	return auth.Tenants()
}

// signedIn reports whether it is known who is asking.
func (x *exchange) signedIn() bool { return !x.identity.IsZero() }

// cookieName is the session cookie's. Browsers take the prefix only with Secure, Path=/ and without Domain, so that no
// sibling host can set it; over plain http there is no such protection and the name does not promise it.
func (s *Server) cookieName() string {
	if s.secure {
		return "__Host-oneo"
	}
	return "oneo_session"
}

// presented is the token that a request carries; empty: none. A request may carry one, in one place: which of two counts
// is never guessed.
func (s *Server) presented(r *http.Request) (token string, cookie bool, err error) {
	header := r.Header.Values("Authorization")
	cookies := r.CookiesNamed(s.cookieName())
	switch {
	case len(header)+len(cookies) > 1:
		return "", false, fault.New(fault.Invalid, "the request carries more than one set of credentials").WithCode("ambiguous_credentials").
			WithHint("send either Authorization or one %s cookie", s.cookieName())
	case len(header) == 1:
		scheme, token, _ := strings.Cut(header[0], " ")
		if !strings.EqualFold(scheme, "Bearer") {
			return "", false, unauthenticated()
		}
		if token = strings.TrimSpace(token); token == "" {
			return "", false, unauthenticated()
		}
		return token, false, nil
	case len(cookies) == 1:
		return cookies[0].Value, true, nil
	}
	return "", false, nil
}

func unauthenticated() error {
	return fault.New(fault.Unauthenticated, "log in first, or send a valid token").WithCode("unauthenticated")
}

// authenticate finds out who is asking, with the request's own tenant (or the administrators) only: a token of another
// tenant is as unknown as one that was made up.
func (s *Server) authenticate(ctx context.Context, x *exchange, p policy) error {
	if p == open {
		return nil
	}
	token, cookie, err := s.presented(x.r)
	if err != nil {
		return err
	}
	if token == "" {
		if p == optional {
			return nil
		}
		return unauthenticated()
	}
	i, err := s.identify(ctx, x, token)
	switch {
	case fault.Is(err, fault.Unauthenticated):
		s.opts.Logger.LogAttrs(ctx, slog.LevelWarn, "a token was refused", slog.String("request_id", x.id),
			slog.String("host", x.host.String()), slog.String("tenant", x.tenant.Slug.String()), slog.String("client", x.client.String()))
		if cookie && p == optional {
			return nil // a cookie that has run out makes a visitor, not an error
		}
		return err
	case err != nil:
		return err
	}
	x.identity = i
	return nil
}

// identify looks a token up: in this process, in the shared cache, in PostgreSQL.
func (s *Server) identify(ctx context.Context, x *exchange, token string) (auth.Identity, error) {
	realm := realmOf(x)
	if _, ok := realm.ParseToken(token); !ok {
		return auth.Identity{}, unauthenticated()
	}
	key := identityKey{number: x.tenant.Number, generation: x.tenant.CacheGeneration, hash: [32]byte(auth.HashToken(token))}
	now := time.Now()
	if i, ok := s.identities.known.GetIfPresent(key); ok && current(i, realm, now) {
		return i, nil
	}
	changes := s.identities.changes.Load()
	i, found, keep := s.recallIdentity(ctx, x.tenant, realm, key)
	if !found {
		var err error
		if i, err = s.readIdentity(ctx, x, realm, token); err != nil {
			return auth.Identity{}, err
		}
		if keep {
			s.keep(ctx, x.tenant, "identity", hex.EncodeToString(key.hash[:]), now, s.opts.IdentityTTL, i)
		}
	}
	if s.identities.changes.Load() == changes {
		s.identities.known.Set(key, i)
	}
	return i, nil
}

// current reports whether what was remembered still holds by its own account.
func current(i auth.Identity, realm *auth.Realm, now time.Time) bool {
	return i.Realm == realm.Name() && !i.IsZero() && (i.ExpiresAt == nil || i.ExpiresAt.After(now))
}

// recallIdentity asks the shared cache. A user whose rights have just changed is barred as a whole, since the tokens of
// their keys are not known to whoever changed them.
func (s *Server) recallIdentity(ctx context.Context, t tenant.Tenant, realm *auth.Realm, key identityKey) (i auth.Identity, found, keep bool) {
	found, barred := s.recall(ctx, t, "identity", hex.EncodeToString(key.hash[:]), s.opts.IdentityTTL, &i)
	if !found {
		return i, false, !barred
	}
	if [32]byte(i.TokenHash) != key.hash || !current(i, realm, time.Now()) {
		return i, false, false
	}
	if _, barred := s.recall(ctx, t, "user", i.UserID.String(), s.barTime(), nil); barred {
		return i, false, false
	}
	return i, true, false
}

// readIdentity asks PostgreSQL, and notes there about once a minute that the token is in use.
func (s *Server) readIdentity(ctx context.Context, x *exchange, realm *auth.Realm, token string) (i auth.Identity, err error) {
	run := func(a Access, fn func(Tx) error) error {
		if x.realm == publicRealm {
			return s.opts.Databases.InShared(ctx, tenant.Tenant{}, a, fn)
		}
		return s.opts.Databases.InTenant(ctx, x.tenant, a, fn)
	}
	err = run(Single, func(tx Tx) (err error) {
		i, err = realm.Authenticate(ctx, tx, token, s.opts.Sessions.Idle)
		return err
	})
	if err != nil || i.LastSeen != nil && time.Since(*i.LastSeen) < time.Minute {
		return i, err
	}
	if terr := run(Write, func(tx Tx) error { return realm.Touch(ctx, tx, i) }); terr != nil {
		s.opts.Logger.LogAttrs(ctx, slog.LevelWarn, "use of a token could not be noted", slog.String("request_id", x.id), slog.String("error", terr.Error()))
	}
	return i, nil
}

// Ended says that tokens no longer stand for what they did: one of them, or with a user whatever stands for that user.
// With neither it is about all of a tenant's.
type Ended struct {
	Tenant int32 // the tenant's number; 0: administrators
	User   uuid.UUID
	Hash   [32]byte
}

// String is the form in which instances tell each other.
func (e Ended) String() string {
	return fmt.Sprintf("%d %s %x", e.Tenant, e.User, e.Hash)
}

// ParseEnded reads what String wrote.
func ParseEnded(text string) (e Ended, ok bool) {
	number, rest, _ := strings.Cut(text, " ")
	user, hash, _ := strings.Cut(rest, " ")
	n, err := strconv.ParseInt(number, 10, 32)
	if err != nil || n < 0 {
		return Ended{}, false
	}
	e.Tenant = int32(n)
	if e.User, err = uuid.Parse(user); err != nil {
		return Ended{}, false
	}
	raw, err := hex.DecodeString(hash)
	if err != nil || len(raw) != len(e.Hash) {
		return Ended{}, false
	}
	e.Hash = [32]byte(raw)
	return e, true
}

// matches reports whether what is remembered under a key is what has ended.
func (e Ended) matches(k identityKey, i auth.Identity) bool {
	switch {
	case k.number != e.Tenant:
		return false
	case e.User != uuid.Nil:
		return i.UserID == e.User
	case e.Hash != [32]byte{}:
		return k.hash == e.Hash
	}
	return true
}

// Forget makes this process ask again who the tokens stand for.
func (s *Server) Forget(e Ended) { s.identities.forget(e.matches) }

// ForgetAll makes this process ask again who any token stands for: messages of others may have been missed.
func (s *Server) ForgetAll() {
	s.identities.forget(func(identityKey, auth.Identity) bool { return true })
}

// forgetTokens makes tokens worthless everywhere: here and in the shared cache at once, in the other instances' own
// memory as soon as they hear of it, and within LocalTTL if they do not. Call it after the commit.
func (s *Server) forgetTokens(ctx context.Context, t tenant.Tenant, hashes [][]byte) {
	for _, h := range hashes {
		if len(h) == 32 {
			s.bar(ctx, t, "identity", hex.EncodeToString(h))
			s.ended(ctx, Ended{Tenant: t.Number, Hash: [32]byte(h)})
		}
	}
}

// forgetUser does the same for whatever a user's sessions and keys are.
func (s *Server) forgetUser(ctx context.Context, t tenant.Tenant, id uuid.UUID) {
	s.bar(ctx, t, "user", id.String())
	s.ended(ctx, Ended{Tenant: t.Number, User: id})
}

func (s *Server) ended(ctx context.Context, e Ended) {
	s.Forget(e)
	if s.opts.OnEnded != nil {
		s.opts.OnEnded(ctx, e)
	}
}

// authorise answers whether whoever is asking may.
func authorise(x *exchange, rt *route) error {
	if rt.policy < signedIn {
		return nil
	}
	if !x.signedIn() {
		return unauthenticated()
	}
	if rt.policy == session && x.identity.Kind != auth.KindSession {
		return fault.New(fault.Forbidden, "an API key may not do this; log in instead").WithCode("session_required")
	}
	if rt.action == "" {
		return nil
	}
	return x.identity.May(rt.action)
}
