package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func (s *Server) authRoutes() []route {
	return []route{
		{method: http.MethodPost, path: "/api/v1/auth/login", realm: bothRealms, policy: open, body: jsonBody, free: s.login},
		{method: http.MethodPost, path: "/api/v1/auth/logout", realm: bothRealms, policy: session, access: Write, handler: s.logout},
		{method: http.MethodGet, path: "/api/v1/me", realm: bothRealms, policy: signedIn, access: Single, handler: s.me},
		{method: http.MethodPost, path: "/api/v1/me/password", realm: bothRealms, policy: session, body: jsonBody, free: s.changePassword},
	}
}

// login checks a password and starts a session: in a cookie for browsers, or with "token": true in the answer for
// programs. The password is checked outside of any transaction, and takes as long for an address that nobody has.
func (s *Server) login(ctx context.Context, r *Request) (Reply, error) {
	var in struct {
		Email    string `json:"email"`
		Password string `json:"password"`
		Token    bool   `json:"token"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	email, err := auth.ParseEmail(in.Email)
	if err != nil {
		return Reply{}, at(err, "/email")
	}
	if err := s.limitLogins(ctx, r, email); err != nil {
		return Reply{}, err
	}
	if len(in.Password) > auth.MaxPasswordBytes {
		return Reply{}, s.loginFailed(ctx, r, errLogin())
	}
	realm := realmOf(r.x)
	c, err := s.checkPassword(ctx, r, realm, email, in.Password)
	if err != nil {
		return Reply{}, s.loginFailed(ctx, r, err)
	}
	stronger, err := s.opts.Hasher.Strengthen(ctx, c, in.Password)
	if err != nil {
		return Reply{}, err
	}
	options := s.opts.Sessions
	options.UserAgent, options.Remote = r.x.r.UserAgent(), r.Client.String()
	old := s.cookieSession(r, realm)

	var token string
	var expires time.Time
	var user auth.User
	err = s.within(ctx, r, Write, func(tx Tx) (err error) {
		if stronger != "" {
			if c, err = realm.Rehash(ctx, tx, c, stronger); err != nil {
				return err
			}
		}
		if token, expires, err = realm.StartSession(ctx, tx, c, options); err != nil {
			return err
		}
		// A session that the browser had is not taken over and not left lying about. It goes after the user is held, in
		// the order of a password change, so that neither waits for the other in a circle.
		if old != nil {
			if err := realm.EndSession(ctx, tx, auth.Identity{TokenHash: old}); err != nil {
				return err
			}
		}
		if user, err = realm.UserByEmail(ctx, tx, email); err != nil {
			return err
		}
		if r.x.realm == publicRealm {
			return s.opts.Admin.Audit(ctx, tx, AuditEntry{Actor: email, Action: "admin.login", Details: map[string]string{"client": options.Remote}, RequestID: r.ID})
		}
		return nil
	})
	if err != nil {
		return Reply{}, s.loginFailed(ctx, r, err)
	}
	s.accountEvent(ctx, r, "logged in", user.ID)

	body := map[string]any{"user": user, "expires_at": expires}
	reply := Reply{Status: http.StatusOK, Body: body}
	if in.Token {
		body["token"], body["token_type"] = token, "Bearer"
	} else {
		reply.Header = http.Header{"Set-Cookie": []string{s.cookie(token, expires).String()}}
	}
	if old != nil {
		reply.After = func(ctx context.Context) { s.forgetTokens(ctx, r.Tenant, [][]byte{old}) }
	}
	return reply, nil
}

func errLogin() error {
	return fault.New(fault.Unauthenticated, "the address or the password is wrong").WithCode("login_failed")
}

// limitLogins counts attempts by address of the caller, and by that, the tenant and the account. By the tenant and not
// by the host, or each further domain would give as many attempts again.
func (s *Server) limitLogins(ctx context.Context, r *Request, email string) error {
	ip := bucketOf(r.Client)
	if err := s.limit(ctx, r.x, "login-ip", ip, s.opts.LoginPerIP); err != nil {
		return err
	}
	account := sha256.Sum256([]byte(email))
	return s.limit(ctx, r.x, "login", ip+":"+strconv.Itoa(int(r.Tenant.Number))+":"+hex.EncodeToString(account[:12]), s.opts.LoginPerAccount)
}

// checkPassword returns the credential of an account whose password it is.
func (s *Server) checkPassword(ctx context.Context, r *Request, realm *auth.Realm, email, password string) (c auth.Credential, err error) {
	err = s.within(ctx, r, Single, func(tx Tx) (err error) {
		c, err = realm.Credential(ctx, tx, email)
		return err
	})
	if err != nil {
		return c, err
	}
	return c, s.opts.Hasher.Check(ctx, c, password)
}

func (s *Server) loginFailed(ctx context.Context, r *Request, err error) error {
	if fault.Is(err, fault.Unauthenticated) {
		s.opts.Logger.LogAttrs(ctx, slog.LevelWarn, "login failed", slog.String("request_id", r.ID), slog.String("host", r.Host.String()),
			slog.String("tenant", r.Tenant.Slug.String()), slog.String("client", r.Client.String()))
	}
	return err
}

// accountEvent writes to the log what an account did with its credentials.
func (s *Server) accountEvent(ctx context.Context, r *Request, what string, user uuid.UUID) {
	s.opts.Logger.LogAttrs(ctx, slog.LevelInfo, what, slog.String("request_id", r.ID), slog.String("tenant", r.Tenant.Slug.String()),
		slog.String("realm", realmOf(r.x).Name()), slog.String("user", user.String()), slog.String("client", r.Client.String()))
}

// cookieSession is the hash of the session token that a login request's cookie carries; nil: none.
func (s *Server) cookieSession(r *Request, realm *auth.Realm) []byte {
	for _, c := range r.x.r.CookiesNamed(s.cookieName()) {
		if kind, ok := realm.ParseToken(c.Value); ok && kind == auth.KindSession {
			return auth.HashToken(c.Value)
		}
	}
	return nil
}

// cookie carries a session token; without one it takes the browser's away.
func (s *Server) cookie(token string, expires time.Time) *http.Cookie {
	c := &http.Cookie{
		Name: s.cookieName(), Value: token, Path: "/", Secure: s.secure, HttpOnly: true, SameSite: http.SameSiteLaxMode, Expires: expires,
	}
	if token == "" {
		c.MaxAge, c.Expires = -1, time.Time{}
	}
	return c
}

func (s *Server) logout(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	if err := realmOf(r.x).EndSession(ctx, tx, r.Identity); err != nil {
		return Reply{}, err
	}
	return Reply{
		Header: http.Header{"Set-Cookie": []string{s.cookie("", time.Time{}).String()}},
		After: func(ctx context.Context) {
			s.forgetTokens(ctx, r.Tenant, [][]byte{r.Identity.TokenHash})
			s.accountEvent(ctx, r, "logged out", r.Identity.UserID)
		},
	}, nil
}

// me tells who is asking, as PostgreSQL has it now.
func (s *Server) me(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	user, err := realmOf(r.x).UserByID(ctx, tx, r.Identity.UserID)
	if fault.Is(err, fault.NotFound) || err == nil && user.DisabledAt != nil {
		return Reply{}, unauthenticated()
	}
	if err != nil {
		return Reply{}, err
	}
	body := map[string]any{"user": user, "realm": r.Identity.Realm, "kind": r.Identity.Kind, "expires_at": r.Identity.ExpiresAt}
	if r.Identity.Kind == auth.KindKey {
		body["scopes"] = r.Identity.Scopes
	}
	if r.x.realm == tenantRealm {
		body["tenant"] = map[string]string{"id": r.Tenant.ID, "slug": r.Tenant.Slug.String(), "name": r.Tenant.Name}
	}
	return Reply{Body: body}, nil
}

// changePassword replaces one's own password. Every session ends, this one too.
func (s *Server) changePassword(ctx context.Context, r *Request) (Reply, error) {
	var in struct {
		Current  string `json:"current_password"`
		Password string `json:"password"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	if err := s.limitLogins(ctx, r, r.Identity.Email); err != nil {
		return Reply{}, err
	}
	hash, err := s.newPassword(ctx, in.Password, r.Identity.Email, r.Tenant.Slug.String())
	if err != nil {
		return Reply{}, err
	}
	realm := realmOf(r.x)
	c, err := s.checkPassword(ctx, r, realm, r.Identity.Email, in.Current)
	var ended [][]byte
	if err == nil {
		err = s.within(ctx, r, Write, func(tx Tx) (err error) {
			// What was checked is what is replaced: not the password that an administrator has set since.
			if _, ended, err = realm.ChangePassword(ctx, tx, c, hash); err != nil || r.x.realm == tenantRealm {
				return err
			}
			return s.audit(ctx, r, tx, r.Tenant, "admin.password", nil)
		})
	}
	if fault.Is(err, fault.Unauthenticated) {
		_ = s.loginFailed(ctx, r, err) // for the log
		return Reply{}, badField("/current_password", "wrong_password", "this is not the present password")
	}
	if err != nil {
		return Reply{}, err
	}
	s.accountEvent(ctx, r, "password changed", r.Identity.UserID)
	return Reply{
		Header: http.Header{"Set-Cookie": []string{s.cookie("", time.Time{}).String()}},
		After: func(ctx context.Context) {
			s.forgetTokens(ctx, r.Tenant, ended)
			s.forgetUser(ctx, r.Tenant, r.Identity.UserID)
		},
	}, nil
}

// newPassword checks and hashes a password that somebody chose, outside of any transaction.
func (s *Server) newPassword(ctx context.Context, password string, words ...string) (string, error) {
	if err := auth.CheckPassword(password, words...); err != nil {
		return "", at(err, "/password")
	}
	return s.opts.Hasher.Hash(ctx, password)
}
