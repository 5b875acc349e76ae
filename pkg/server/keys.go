package server

import (
	"context"
	"net/http"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

const keysPath = "/api/v1/api-keys"

func (s *Server) keyRoutes() []route {
	return []route{
		{method: http.MethodGet, path: keysPath, realm: bothRealms, policy: signedIn, access: Read, params: []string{"all", "limit", "cursor"}, handler: s.listKeys},
		{method: http.MethodPost, path: keysPath, realm: bothRealms, policy: signedIn, access: Write, body: jsonBody, handler: s.addKey},
		{method: http.MethodDelete, path: keysPath + "/:id", realm: bothRealms, policy: signedIn, access: Write, handler: s.revokeKey},
	}
}

// ownKeys answers whether whoever is asking may have keys of their own: everybody who logged in, and an API key only if
// it may manage keys, so that one that was lent for reading cannot make another that lasts longer.
func ownKeys(r *Request) error {
	if r.Identity.Kind == auth.KindSession {
		return nil
	}
	return r.Identity.May(auth.ManageKeys)
}

// listKeys shows one's own keys; with all=true those of everybody, to who may manage them.
func (s *Server) listKeys(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	all, err := r.boolean("all")
	if err != nil {
		return Reply{}, err
	}
	whose := &r.Identity.UserID
	if all {
		whose, err = nil, r.Identity.May(auth.ManageKeys)
	} else {
		err = ownKeys(r)
	}
	if err != nil {
		return Reply{}, err
	}
	limit, err := r.limit()
	if err != nil {
		return Reply{}, err
	}
	scope := []string{"keys", r.Tenant.ID, r.Query("all"), r.Identity.UserID.String()}
	var after *uuid.UUID
	if r.query.Has("cursor") {
		after = new(uuid.UUID)
		if err := s.cursors.read(scope, r.Query("cursor"), after); err != nil {
			return Reply{}, err
		}
	}
	keys, err := realmOf(r.x).KeyPage(ctx, tx, whose, limit+1, after)
	if err != nil {
		return Reply{}, err
	}
	out := list{Data: []auth.Key{}, Page: page{Limit: limit}}
	if len(keys) > limit {
		keys = keys[:limit]
		out.Page.HasMore = true
		if out.Page.NextCursor, err = s.cursor(scope, keys[limit-1].ID); err != nil {
			return Reply{}, err
		}
	}
	if len(keys) > 0 {
		out.Data = keys
	}
	return Reply{Body: out, Header: r.links(out.Page)}, nil
}

// addKey makes a key and shows its token, this once.
func (s *Server) addKey(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	var in struct {
		Name      string     `json:"name"`
		Scopes    []string   `json:"scopes"`
		ExpiresAt *time.Time `json:"expires_at"`
		UserID    *uuid.UUID `json:"user_id"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	user := r.Identity.UserID
	err := ownKeys(r)
	if in.UserID != nil && *in.UserID != user {
		user, err = *in.UserID, r.Identity.May(auth.ManageKeys)
	}
	if err != nil {
		return Reply{}, err
	}
	if in.ExpiresAt != nil && !in.ExpiresAt.After(time.Now()) {
		return Reply{}, badField("/expires_at", "past", "expires_at must lie in the future")
	}
	key, token, err := realmOf(r.x).AddKey(ctx, tx, user, in.Name, in.Scopes, in.ExpiresAt)
	if fault.Is(err, fault.NotFound) {
		return Reply{}, at(fault.New(fault.Unfit, "there is no such user, or it is disabled").WithCode("unknown_user"), "/user_id")
	}
	if err != nil {
		return Reply{}, err
	}
	if r.x.realm == publicRealm {
		if err := s.audit(ctx, r, tx, r.Tenant, "key.add", map[string]any{"key": key.ID}); err != nil {
			return Reply{}, err
		}
	}
	body := struct {
		auth.Key
		Token string `json:"token"`
	}{key, token}
	return Reply{Status: http.StatusCreated, Body: body, Header: http.Header{"Location": []string{keysPath + "/" + key.ID.String()}},
		After: func(ctx context.Context) { s.peopleChanged(ctx, r, "API key added", user) }}, nil
}

func (s *Server) revokeKey(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "key")
	if err != nil {
		return Reply{}, err
	}
	whose := &r.Identity.UserID
	if r.Identity.May(auth.ManageKeys) == nil {
		whose = nil
	} else if err := ownKeys(r); err != nil {
		return Reply{}, err
	}
	hash, err := realmOf(r.x).RevokeKey(ctx, tx, id, whose)
	if err != nil {
		return Reply{}, err
	}
	if r.x.realm == publicRealm {
		if err := s.audit(ctx, r, tx, r.Tenant, "key.revoke", map[string]any{"key": id}); err != nil {
			return Reply{}, err
		}
	}
	return Reply{After: func(ctx context.Context) {
		s.peopleChanged(ctx, r, "API key revoked", r.Identity.UserID)
		s.forgetTokens(ctx, r.Tenant, [][]byte{hash})
	}}, nil
}
