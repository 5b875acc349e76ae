package server

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

const usersPath = "/api/v1/users"

func (s *Server) userRoutes() []route {
	r := func(method, path string, access Access, body bodyKind, h Handler) route {
		return route{method: method, path: usersPath + path, realm: tenantRealm, policy: signedIn, action: auth.ManageUsers,
			access: access, body: body, handler: h}
	}
	free := func(method, path string, h func(context.Context, *Request) (Reply, error)) route {
		return route{method: method, path: usersPath + path, realm: tenantRealm, policy: signedIn, action: auth.ManageUsers, body: jsonBody, free: h}
	}
	all := r(http.MethodGet, "", Read, noBody, s.listUsers)
	all.params = []string{"limit", "cursor"}
	return []route{
		all,
		free(http.MethodPost, "", s.addUser),
		r(http.MethodGet, "/:id", Single, noBody, s.showUser),
		r(http.MethodPatch, "/:id", Write, patchBody, s.patchUser),
		r(http.MethodPost, "/:id/disable", Write, noBody, s.disableUser),
		r(http.MethodPost, "/:id/enable", Write, noBody, s.enableUser),
		free(http.MethodPost, "/:id/set-password", s.setPassword),
		r(http.MethodPost, "/:id/revoke-sessions", Write, noBody, s.revokeSessions),
		{method: http.MethodPost, path: "/api/v1/sessions/revoke", realm: tenantRealm, policy: signedIn, action: auth.ManageUsers,
			access: Write, handler: s.revokeAllSessions},
	}
}

func userReply(status int, u auth.User) Reply {
	return Reply{Status: status, Body: u, Header: etag(u.Version)}
}

func (s *Server) listUsers(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	limit, err := r.limit()
	if err != nil {
		return Reply{}, err
	}
	scope := []string{"users", r.Tenant.ID}
	var after *uuid.UUID
	if r.query.Has("cursor") {
		after = new(uuid.UUID)
		if err := s.cursors.read(scope, r.Query("cursor"), after); err != nil {
			return Reply{}, err
		}
	}
	users, err := auth.Tenants().Users(ctx, tx, limit+1, after)
	if err != nil {
		return Reply{}, err
	}
	out := list{Page: page{Limit: limit}}
	if len(users) > limit {
		users = users[:limit]
		out.Page.HasMore = true
		if out.Page.NextCursor, err = s.cursor(scope, users[limit-1].ID); err != nil {
			return Reply{}, err
		}
	}
	out.Data = users
	return Reply{Body: out, Header: r.links(out.Page)}, nil
}

func (s *Server) addUser(ctx context.Context, r *Request) (Reply, error) {
	var in struct {
		Email    string          `json:"email"`
		Name     string          `json:"name"`
		Role     string          `json:"role"`
		Password string          `json:"password"`
		Metadata json.RawMessage `json:"metadata"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	email, err := auth.ParseEmail(in.Email)
	if err != nil {
		return Reply{}, at(err, "/email")
	}
	if in.Role == "" {
		in.Role = auth.RoleMember // the least surprising; an administrator is made by name only
	}
	generated := in.Password == ""
	if generated {
		in.Password = auth.GeneratePassword()
	}
	hash, err := s.newPassword(ctx, in.Password, email, r.Tenant.Slug.String())
	if err != nil {
		return Reply{}, err
	}
	var user auth.User
	err = s.within(ctx, r, Write, func(tx Tx) (err error) {
		user, err = auth.Tenants().AddUser(ctx, tx, auth.NewUser{Email: email, Name: in.Name, Role: in.Role, PasswordHash: hash, Metadata: in.Metadata})
		return err
	})
	if err != nil {
		return Reply{}, err
	}
	s.peopleChanged(ctx, r, "user added", user.ID)
	reply := userReply(http.StatusCreated, user)
	reply.Header.Set("Location", usersPath+"/"+user.ID.String())
	if generated {
		reply.Body = struct {
			auth.User
			Password string `json:"password"` // shown once
		}{user, in.Password}
	}
	return reply, nil
}

// peopleChanged tells the log who changed whom; names and addresses stay out of it.
func (s *Server) peopleChanged(ctx context.Context, r *Request, what string, id uuid.UUID) {
	s.opts.Logger.LogAttrs(ctx, slog.LevelInfo, what, slog.String("request_id", r.ID), slog.String("tenant", r.Tenant.Slug.String()),
		slog.String("user", id.String()), slog.String("by", r.Identity.UserID.String()))
}

func (s *Server) showUser(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	u, err := auth.Tenants().UserByID(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	return userReply(http.StatusOK, u), nil
}

// patchUser merges a patch into name, role and metadata.
func (s *Server) patchUser(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	version, err := r.version()
	if err != nil {
		return Reply{}, err
	}
	var in struct {
		Name     json.RawMessage `json:"name"`
		Role     json.RawMessage `json:"role"`
		Metadata json.RawMessage `json:"metadata"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	u, err := auth.Tenants().UserByID(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	if u.Version != version {
		return Reply{}, fault.New(fault.Stale, "the user was changed in between").WithCode("stale").WithDetails(map[string]any{"current": u})
	}
	if err := patchText(in.Name, &u.Name, "/name", ""); err != nil {
		return Reply{}, err
	}
	if err := patchText(in.Role, &u.Role, "/role", auth.RoleMember); err != nil {
		return Reply{}, err
	}
	if in.Metadata != nil {
		if u.Metadata, err = crm.MergePatch(u.Metadata, in.Metadata); err != nil {
			return Reply{}, at(err, "/metadata")
		}
	}
	after, ended, err := auth.Tenants().UpdateUser(ctx, tx, u)
	if err != nil {
		return Reply{}, err
	}
	reply := userReply(http.StatusOK, after)
	reply.After = s.forgetting(r, "user changed", id, ended)
	return reply, nil
}

// patchText applies one member of a merge patch to a text; null gives back the default.
func patchText(raw json.RawMessage, into *string, pointer, fallback string) error {
	switch {
	case raw == nil:
		return nil
	case string(raw) == "null":
		*into = fallback
		return nil
	case json.Unmarshal(raw, into) != nil:
		return badField(pointer, "type", "expected a string")
	}
	return nil
}

// forgetting drops what is remembered of a user's rights, and tells the log what was done.
func (s *Server) forgetting(r *Request, what string, id uuid.UUID, ended [][]byte) func(context.Context) {
	return func(ctx context.Context) {
		s.peopleChanged(ctx, r, what, id)
		s.forgetTokens(ctx, r.Tenant, ended)
		s.forgetUser(ctx, r.Tenant, id)
	}
}

func (s *Server) disableUser(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	u, ended, err := auth.Tenants().DisableUser(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	reply := userReply(http.StatusOK, u)
	reply.After = s.forgetting(r, "user disabled", id, ended)
	return reply, nil
}

func (s *Server) enableUser(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	u, err := auth.Tenants().EnableUser(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	reply := userReply(http.StatusOK, u)
	reply.After = s.forgetting(r, "user enabled", id, nil)
	return reply, nil
}

func (s *Server) setPassword(ctx context.Context, r *Request) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	var in struct {
		Password string `json:"password"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	hash, err := s.newPassword(ctx, in.Password, r.Tenant.Slug.String())
	if err != nil {
		return Reply{}, err
	}
	var u auth.User
	var ended [][]byte
	err = s.within(ctx, r, Write, func(tx Tx) (err error) {
		if u, ended, err = auth.Tenants().SetPassword(ctx, tx, id, hash); err != nil {
			return err
		}
		return at(auth.CheckPassword(in.Password, u.Email), "/password")
	})
	if err != nil {
		return Reply{}, err
	}
	reply := userReply(http.StatusOK, u)
	reply.After = s.forgetting(r, "password set", id, ended)
	return reply, nil
}

func (s *Server) revokeSessions(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "user")
	if err != nil {
		return Reply{}, err
	}
	if _, err := auth.Tenants().UserByID(ctx, tx, id); err != nil {
		return Reply{}, err
	}
	ended, err := auth.Tenants().RevokeSessions(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Body: map[string]int{"ended": len(ended)}, After: s.forgetting(r, "sessions revoked", id, ended)}, nil
}

// revokeAllSessions logs everybody of the tenant out, the caller included.
func (s *Server) revokeAllSessions(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	ended, err := auth.Tenants().RevokeAllSessions(ctx, tx)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Body: map[string]int{"ended": len(ended)}, After: func(ctx context.Context) {
		s.peopleChanged(ctx, r, "all sessions revoked", uuid.Nil)
		s.forgetTokens(ctx, r.Tenant, ended)
	}}, nil
}
