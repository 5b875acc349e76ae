package server

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Settings reads and changes a tenant's settings: a JSON object whose member "public" everybody may see. They are in
// the shared tables; the transaction given is one on those.
type Settings interface {
	Settings(ctx context.Context, tx Tx, t tenant.Tenant) (json.RawMessage, error)
	// SetSettings replaces them if they are still the old ones; Stale: they are not.
	SetSettings(ctx context.Context, tx Tx, t tenant.Tenant, old, settings json.RawMessage) error
}

const settingsPath = "/api/v1/settings"

func (s *Server) settingsRoutes() []route {
	return []route{
		{method: http.MethodGet, path: settingsPath, realm: tenantRealm, policy: optional, free: s.showSettings},
		{method: http.MethodPatch, path: settingsPath, realm: tenantRealm, policy: signedIn, action: auth.ManageSettings, access: Write, shared: true, body: patchBody,
			handler: s.patchSettings},
	}
}

// showSettings answers everybody with the public part and those who are signed in with all.
func (s *Server) showSettings(ctx context.Context, r *Request) (Reply, error) {
	settings, err := s.settings(ctx, r.Tenant)
	if err != nil {
		return Reply{}, err
	}
	if r.x.signedIn() {
		return Reply{Body: settings}, nil
	}
	var parts struct {
		Public json.RawMessage `json:"public"`
	}
	if err := json.Unmarshal(settings, &parts); err != nil || parts.Public == nil {
		parts.Public = json.RawMessage(`{}`)
	}
	return Reply{Body: map[string]json.RawMessage{"public": parts.Public}}, nil
}

func (s *Server) settings(ctx context.Context, t tenant.Tenant) (json.RawMessage, error) {
	var settings json.RawMessage
	found, barred := s.recall(ctx, t, "settings", "all", s.opts.IdentityTTL, &settings)
	if found {
		return settings, nil
	}
	read := time.Now()
	err := s.opts.Databases.InShared(ctx, t, Read, func(tx Tx) (err error) {
		settings, err = s.opts.Settings.Settings(ctx, tx, t)
		return err
	})
	if err == nil && !barred {
		s.keep(ctx, t, "settings", "all", read, s.opts.IdentityTTL, settings)
	}
	return settings, err
}

func (s *Server) patchSettings(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	old, err := s.opts.Settings.Settings(ctx, tx, r.Tenant)
	if err != nil {
		return Reply{}, err
	}
	settings, err := crm.MergePatch(old, r.Body)
	if err != nil {
		return Reply{}, err
	}
	err = s.opts.Settings.SetSettings(ctx, tx, r.Tenant, old, settings)
	if fault.Is(err, fault.Stale) {
		// No version was asked for: to the caller it is a race that is worth another try.
		return Reply{}, fault.Wrap(err, fault.Conflict, "the settings were changed at the same moment; please try again").WithCode("settings_changed")
	}
	if err != nil {
		return Reply{}, err
	}
	if err := s.audit(ctx, r, tx, r.Tenant, "settings.change", nil); err != nil {
		return Reply{}, err
	}
	return Reply{Body: settings, After: func(ctx context.Context) { s.bar(ctx, r.Tenant, "settings", "all") }}, nil
}
