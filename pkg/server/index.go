package server

import (
	"context"
	"net/http"
)

// indexRoutes is the friendly answer to a newcomer's first curl.
func (s *Server) indexRoutes() []route {
	return []route{
		{method: http.MethodGet, path: "/", realm: bothRealms, policy: open, free: s.index},
		{method: http.MethodGet, path: "/api/v1", realm: bothRealms, policy: open, free: s.index},
	}
}

func (s *Server) index(_ context.Context, r *Request) (Reply, error) {
	links := map[string]string{
		"login": "POST /api/v1/auth/login", "logout": "POST /api/v1/auth/logout", "me": "GET /api/v1/me",
	}
	body := map[string]any{"product": "oneo", "host": r.Host.String(), "links": links}
	if s.opts.Version != "" {
		body["version"] = s.opts.Version
	}
	if r.x.realm == publicRealm {
		body["what"] = "the administration: administrators log in here"
		links["tenants"], links["operations"] = "GET "+tenantsPath, "GET "+operationsPath
		return Reply{Body: body}, nil
	}
	body["what"] = "one tenant of oneo: its users log in here"
	body["tenant"] = map[string]string{"slug": r.Tenant.Slug.String(), "name": r.Tenant.Name}
	links["settings"], links["pipelines"] = "GET "+settingsPath, "GET "+pipelinesPath
	links["records"] = "GET " + pipelinesPath + "/{pipeline}/records"
	links["users"], links["api_keys"] = "GET "+usersPath, "GET "+keysPath
	return Reply{Body: body}, nil
}
