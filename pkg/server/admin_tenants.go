package server

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Admin is the registry as administrators see and change it. Each method works in the transaction on the shared tables
// that it is given. What changes a tenant's place is queued as an operation and done by a worker.
type Admin interface {
	// Tenants selects tenants in the order of their slugs.
	Tenants(ctx context.Context, tx Tx, f TenantFilter) ([]tenant.Tenant, error)
	// Tenant finds one that has not been purged.
	Tenant(ctx context.Context, tx Tx, slug tenant.Slug) (tenant.Tenant, error)

	// Standing reads the tenant's version where its schema is, in a transaction of its own. NotFound: it has none.
	Standing(ctx context.Context, t tenant.Tenant) (Standing, error)

	Domains(ctx context.Context, tx Tx, t tenant.Tenant) ([]Domain, error)
	AddDomain(ctx context.Context, tx Tx, t tenant.Tenant, host tenant.Host, primary bool) error
	RemoveDomain(ctx context.Context, tx Tx, t tenant.Tenant, host tenant.Host) error
	SetPrimary(ctx context.Context, tx Tx, t tenant.Tenant, host tenant.Host) error

	EnqueueCreate(ctx context.Context, tx Tx, c CreateTenant, actor string) (Operation, error)
	// EnqueueDrop keeps the schema for a grace period; 0: the configured one.
	EnqueueDrop(ctx context.Context, tx Tx, slug tenant.Slug, grace time.Duration, actor string) (Operation, error)
	// Enqueue takes the kinds tenant.suspend, tenant.resume, tenant.undrop and tenant.purge.
	Enqueue(ctx context.Context, tx Tx, kind string, slug tenant.Slug, actor string) (Operation, error)
	Operation(ctx context.Context, tx Tx, id uuid.UUID) (Operation, error)
	// Operations lists the newest first; before is the last one of the page before, or nil.
	Operations(ctx context.Context, tx Tx, limit int, before *uuid.UUID) ([]Operation, error)

	Audit(ctx context.Context, tx Tx, e AuditEntry) error
}

// Standing is a tenant's version, and why this instance does not serve it at that; empty: it does.
type Standing struct {
	Version   int
	NotServed string
}

// TenantFilter selects tenants. The zero TenantFilter selects all that have not been purged.
type TenantFilter struct {
	Name   string // a slug or glob; empty: all
	States []tenant.State
	Group  string
	After  string // slugs behind this one only
	Limit  int
}

// CreateTenant is a tenant to be made. It holds a password's hash, never a password.
type CreateTenant struct {
	Slug              tenant.Slug
	Name              string
	Schema            tenant.Schema // zero: the one that follows from the slug
	Group             string        // empty: the default
	Domains           []tenant.Host // besides <slug>.<base domain>
	AdminEmail        string        // empty: no first user
	AdminPasswordHash string
	Settings          json.RawMessage // an object, or nil
}

// AuditEntry is one line of the audit trail.
type AuditEntry struct {
	Actor     string
	Action    string
	Tenant    tenant.Tenant // zero: about no single tenant
	Details   any           // never a secret; may be nil
	RequestID string
}

const tenantsPath = "/api/v1/admin/tenants"

func (s *Server) adminTenantRoutes() []route {
	r := func(method, path string, access Access, body bodyKind, h Handler) route {
		// What writes here is done by a worker with the owner's connection.
		return route{method: method, path: tenantsPath + path, realm: publicRealm, policy: signedIn, action: auth.Administer,
			access: access, body: body, owner: access == Write, handler: h}
	}
	act := func(name, kind string) route {
		return r(http.MethodPost, "/:slug/"+name, Write, noBody, func(ctx context.Context, r *Request, tx Tx) (Reply, error) {
			return s.enqueue(ctx, r, tx, kind)
		})
	}
	all := r(http.MethodGet, "", Read, noBody, s.listTenants)
	all.params = []string{"name", "state", "group", "limit", "cursor"}
	create := r(http.MethodPost, "", Write, jsonBody, nil)
	create.free = s.createTenant
	show := r(http.MethodGet, "/:slug", Read, noBody, nil)
	show.free = s.showTenant
	return []route{
		all,
		create,
		show,
		r(http.MethodDelete, "/:slug", Write, optionalBody, s.dropTenant),
		r(http.MethodPost, "/:slug/purge", Write, optionalBody, s.purgeTenant),
		act("suspend", "tenant.suspend"),
		act("resume", "tenant.resume"),
		act("undrop", "tenant.undrop"),
	}
}

// tenantView is a tenant as administrators see it.
type tenantView struct {
	ID        string       `json:"id"`
	Slug      string       `json:"slug"`
	Name      string       `json:"name"`
	State     tenant.State `json:"state"`
	Group     string       `json:"group"`
	URL       string       `json:"url,omitempty"`
	Domains   []domainView `json:"domains,omitempty"`
	Version   *int         `json:"version,omitempty"` // nil: not looked for, or it cannot be read at the moment
	NotServed string       `json:"not_served,omitempty"`
	CreatedAt time.Time    `json:"created_at"`
}

func (s *Server) viewTenant(t tenant.Tenant) tenantView {
	v := tenantView{ID: t.ID, Slug: t.Slug.String(), Name: t.Name, State: t.State, Group: t.Group, CreatedAt: t.CreatedAt}
	if !t.Primary.IsZero() {
		v.URL = s.urlOf(t.Primary)
	}
	return v
}

// urlOf is where a host is reached from outside: with the scheme and port of the public URL.
func (s *Server) urlOf(h tenant.Host) string {
	u, err := url.Parse(s.opts.PublicURL)
	if err != nil { // validated
		return ""
	}
	host := h.String()
	if p := u.Port(); p != "" {
		host = net.JoinHostPort(host, p)
	}
	return u.Scheme + "://" + host
}

// adminTenant finds the tenant that a path names. A name that no tenant can have is one that no tenant has.
func (s *Server) adminTenant(ctx context.Context, r *Request, tx Tx) (tenant.Tenant, error) {
	slug, err := tenant.ParseSlug(r.Param("slug"))
	if err != nil {
		return tenant.Tenant{}, fault.New(fault.NotFound, "there is no tenant %q", clip(r.Param("slug"))).WithCode("unknown_tenant")
	}
	return s.opts.Admin.Tenant(ctx, tx, slug)
}

func (s *Server) audit(ctx context.Context, r *Request, tx Tx, t tenant.Tenant, action string, details any) error {
	return s.opts.Admin.Audit(ctx, tx, AuditEntry{
		Actor: r.Identity.Email, Action: action, Tenant: t, Details: details, RequestID: r.ID,
	})
}

func (s *Server) listTenants(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	limit, err := r.limit()
	if err != nil {
		return Reply{}, err
	}
	f := TenantFilter{Name: r.Query("name"), Group: r.Query("group"), Limit: limit + 1}
	if r.query.Has("state") {
		for name := range strings.SplitSeq(r.Query("state"), ",") {
			st, err := tenant.ParseState(name)
			if err != nil || st == tenant.Purged { // of a purged one nothing is left to list
				return Reply{}, badParameter("state", "state must be one or more of creating, active, suspended, dropped, separated by commas")
			}
			f.States = append(f.States, st)
		}
	}
	if f.Name != "" && !strings.ContainsAny(f.Name, "*?") {
		f.Name = "*" + f.Name + "*" // a list of one is a search, not a look-up that may fail
	}
	scope := []string{"tenants", f.Name, r.Query("state"), f.Group}
	if r.query.Has("cursor") {
		if err := s.cursors.read(scope, r.Query("cursor"), &f.After); err != nil {
			return Reply{}, err
		}
	}
	tenants, err := s.opts.Admin.Tenants(ctx, tx, f)
	if err != nil {
		return Reply{}, err
	}
	out := list{Page: page{Limit: limit}}
	if len(tenants) > limit {
		tenants = tenants[:limit]
		out.Page.HasMore = true
		if out.Page.NextCursor, err = s.cursor(scope, tenants[limit-1].Slug.String()); err != nil {
			return Reply{}, err
		}
	}
	data := make([]tenantView, len(tenants))
	for i, t := range tenants {
		data[i] = s.viewTenant(t)
	}
	out.Data = data
	return Reply{Body: out, Header: r.links(out.Page)}, nil
}

// showTenant reads the tenant's version after the registry, without a transaction there: its schema may be elsewhere, and
// what cannot be reached there must not hide the rest.
func (s *Server) showTenant(ctx context.Context, r *Request) (Reply, error) {
	var t tenant.Tenant
	var v tenantView
	err := s.opts.Databases.InShared(ctx, tenant.Tenant{}, Read, func(tx Tx) (err error) {
		if t, err = s.adminTenant(ctx, r, tx); err != nil {
			return err
		}
		v = s.viewTenant(t)
		v.Domains, err = s.domainViews(ctx, tx, t)
		return err
	})
	if err != nil {
		return Reply{}, err
	}
	st, err := s.opts.Admin.Standing(ctx, t)
	switch {
	case err == nil:
		v.Version, v.NotServed = &st.Version, st.NotServed
	case !fault.Is(err, fault.NotFound):
		s.opts.Logger.WarnContext(ctx, "read a tenant's version", "tenant", t.Slug.String(), "error", err)
	}
	return Reply{Body: v}, nil
}

// createTenant queues a new tenant. The first user's password is hashed here, before anything is written and outside
// any transaction: what is queued holds the hash only. A password that was made up is in the answer and nowhere else.
func (s *Server) createTenant(ctx context.Context, r *Request) (Reply, error) {
	var in struct {
		Slug          string          `json:"slug"`
		Name          string          `json:"name"`
		Schema        string          `json:"schema"`
		Group         string          `json:"group"`
		Domains       []string        `json:"domains"`
		AdminEmail    string          `json:"admin_email"`
		AdminPassword string          `json:"admin_password"`
		Settings      json.RawMessage `json:"settings"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	c, err := s.newTenant(in.Slug, in.Name, in.Schema, in.Group, in.Domains, in.Settings)
	if err != nil {
		return Reply{}, err
	}
	var first map[string]any
	if in.AdminEmail == "" && in.AdminPassword != "" {
		return Reply{}, badField("/admin_password", "without_email", "a first user's password needs admin_email")
	}
	if in.AdminEmail != "" {
		if c.AdminEmail, err = auth.ParseEmail(in.AdminEmail); err != nil {
			return Reply{}, at(err, "/admin_email")
		}
		first = map[string]any{"admin": map[string]string{"email": c.AdminEmail}}
		if in.AdminPassword == "" {
			in.AdminPassword = auth.GeneratePassword()
			first = map[string]any{"admin": map[string]string{"email": c.AdminEmail, "password": in.AdminPassword}}
		} else if err := auth.CheckPassword(in.AdminPassword, c.AdminEmail, c.Slug.String()); err != nil {
			return Reply{}, at(err, "/admin_password")
		}
		if c.AdminPasswordHash, err = s.opts.Hasher.Hash(ctx, in.AdminPassword); err != nil {
			return Reply{}, err
		}
	}
	var o Operation
	err = s.opts.Databases.InShared(ctx, tenant.Tenant{}, Write, func(tx Tx) error {
		_, err := s.opts.Admin.Tenant(ctx, tx, c.Slug)
		if err == nil {
			return fault.New(fault.Conflict, "there is a tenant %s already", c.Slug).WithCode("tenant_exists")
		}
		if !fault.Is(err, fault.NotFound) {
			return err
		}
		if o, err = s.opts.Admin.EnqueueCreate(ctx, tx, c, r.Identity.Email); err != nil {
			return err
		}
		return s.audit(ctx, r, tx, tenant.Tenant{Slug: c.Slug}, "tenant.create", map[string]any{"operation": o.ID})
	})
	if err != nil {
		return Reply{}, err
	}
	return s.accepted(o, first), nil
}

// newTenant checks what can be checked before a worker takes it up.
func (s *Server) newTenant(slug, name, schema, group string, domains []string, settings json.RawMessage) (CreateTenant, error) {
	c := CreateTenant{Name: name, Group: group}
	var err error
	if c.Slug, err = tenant.ParseSlug(slug); err != nil {
		return c, at(err, "/slug")
	}
	if schema != "" {
		if c.Schema, err = tenant.ParseSchema(schema); err != nil {
			return c, at(err, "/schema")
		}
	}
	if len([]rune(name)) > 200 {
		return c, badField("/name", "too_long", "a name may have at most 200 characters")
	}
	for i, d := range domains {
		host, err := s.assignable(d, "/domains/"+strconv.Itoa(i))
		if err != nil {
			return c, err
		}
		c.Domains = append(c.Domains, host)
	}
	if settings != nil && string(settings) != "null" {
		var object map[string]json.RawMessage
		if json.Unmarshal(settings, &object) != nil || object == nil {
			return c, badField("/settings", "type", "settings must be a JSON object")
		}
		c.Settings = settings
	}
	return c, nil
}

// at turns a fault about a single value into a 422 that points at it.
func at(err error, pointer string) error {
	if err == nil {
		return nil
	}
	f := fault.Of(err)
	if f.Kind != fault.Invalid && f.Kind != fault.Unfit {
		return err
	}
	return fault.Wrap(err, fault.Unfit, "%s", f.Message).WithCode(f.StableCode()).WithHint("%s", f.Hint).
		WithField(fault.Field{Pointer: pointer, Code: f.StableCode(), Detail: f.Message})
}

// enqueue queues one of the changes of state that take no more than a name.
func (s *Server) enqueue(ctx context.Context, r *Request, tx Tx, kind string) (Reply, error) {
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	o, err := s.opts.Admin.Enqueue(ctx, tx, kind, t.Slug, r.Identity.Email)
	if err != nil {
		return Reply{}, err
	}
	if err := s.audit(ctx, r, tx, t, kind, map[string]any{"operation": o.ID}); err != nil {
		return Reply{}, err
	}
	return s.accepted(o, nil), nil
}

func (s *Server) dropTenant(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	var in struct {
		Confirm *string `json:"confirm"`
		Grace   string  `json:"grace"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	if err := confirmed(in.Confirm, t.Slug.String()); err != nil {
		return Reply{}, err
	}
	var grace time.Duration
	if in.Grace != "" {
		if grace, err = time.ParseDuration(in.Grace); err != nil || grace <= 0 {
			return Reply{}, badField("/grace", "duration", "grace must be a duration above 0, for example 720h")
		}
	}
	o, err := s.opts.Admin.EnqueueDrop(ctx, tx, t.Slug, grace, r.Identity.Email)
	if err != nil {
		return Reply{}, err
	}
	if err := s.audit(ctx, r, tx, t, "tenant.drop", map[string]any{"operation": o.ID}); err != nil {
		return Reply{}, err
	}
	return s.accepted(o, nil), nil
}

func (s *Server) purgeTenant(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	var in struct {
		Confirm *string `json:"confirm"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	if err := confirmed(in.Confirm, t.Slug.String()); err != nil {
		return Reply{}, err
	}
	return s.enqueue(ctx, r, tx, "tenant.purge")
}
