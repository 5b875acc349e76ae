package server

import (
	"context"
	"net/http"
	"time"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Domain is one host of a tenant.
type Domain struct {
	Host      tenant.Host
	Primary   bool
	CreatedAt time.Time
}

// domainView is a domain as it is shown.
type domainView struct {
	Host      string    `json:"host"`
	Primary   bool      `json:"primary"`
	URL       string    `json:"url"`
	CreatedAt time.Time `json:"created_at"`
}

func (s *Server) adminDomainRoutes() []route {
	r := func(method, path string, access Access, body bodyKind, h Handler) route {
		return route{method: method, path: tenantsPath + "/:slug/domains" + path, realm: publicRealm, policy: signedIn,
			action: auth.Administer, access: access, body: body, handler: h}
	}
	return []route{
		r(http.MethodGet, "", Read, noBody, s.listDomains),
		r(http.MethodPost, "", Write, jsonBody, s.addDomain),
		r(http.MethodDelete, "/:host", Write, noBody, s.removeDomain),
		r(http.MethodPost, "/:host/primary", Write, noBody, s.setPrimary),
	}
}

func (s *Server) domainViews(ctx context.Context, tx Tx, t tenant.Tenant) ([]domainView, error) {
	domains, err := s.opts.Admin.Domains(ctx, tx, t)
	if err != nil {
		return nil, err
	}
	views := make([]domainView, len(domains))
	for i, d := range domains {
		views[i] = domainView{Host: d.Host.String(), Primary: d.Primary, URL: s.urlOf(d.Host), CreatedAt: d.CreatedAt}
	}
	return views, nil
}

func (s *Server) listDomains(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	views, err := s.domainViews(ctx, tx, t)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Body: list{Data: views, Page: page{Limit: maxLimit}}}, nil
}

func (s *Server) addDomain(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	var in struct {
		Host    string `json:"host"`
		Primary bool   `json:"primary"`
	}
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	host, err := s.assignable(in.Host, "/host")
	if err != nil {
		return Reply{}, err
	}
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	if err := s.opts.Admin.AddDomain(ctx, tx, t, host, in.Primary); err != nil {
		return Reply{}, err
	}
	reply, err := s.changedDomains(ctx, r, tx, t, "domain.add", host)
	reply.Status = http.StatusCreated
	return reply, err
}

func (s *Server) removeDomain(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	t, host, err := s.adminDomain(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	if err := s.opts.Admin.RemoveDomain(ctx, tx, t, host); err != nil {
		return Reply{}, err
	}
	return s.changedDomains(ctx, r, tx, t, "domain.remove", host)
}

func (s *Server) setPrimary(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	t, host, err := s.adminDomain(ctx, r, tx)
	if err != nil {
		return Reply{}, err
	}
	if err := s.opts.Admin.SetPrimary(ctx, tx, t, host); err != nil {
		return Reply{}, err
	}
	return s.changedDomains(ctx, r, tx, t, "domain.primary", host)
}

// adminDomain reads the tenant and the host of a path.
func (s *Server) adminDomain(ctx context.Context, r *Request, tx Tx) (tenant.Tenant, tenant.Host, error) {
	t, err := s.adminTenant(ctx, r, tx)
	if err != nil {
		return t, tenant.Host{}, err
	}
	host, err := tenant.ParseHost(r.Param("host"))
	if err != nil {
		return t, host, fault.New(fault.NotFound, "there is no such domain").WithCode("unknown_domain")
	}
	return t, host, nil
}

// assignable reads a host that a tenant is to have. A public host is the administrators'.
func (s *Server) assignable(name, pointer string) (tenant.Host, error) {
	host, err := tenant.ParseHost(name)
	if err != nil {
		return host, badField(pointer, "invalid_host", fault.Of(err).Message)
	}
	for _, p := range s.opts.PublicHosts {
		if p == host {
			return host, badField(pointer, "public_host", host.String()+" is a public host, where administrators are served")
		}
	}
	return host, nil
}

// changedDomains audits a change of domains and answers with the domains as they are now. Their hosts are forgotten
// once the change is made.
func (s *Server) changedDomains(ctx context.Context, r *Request, tx Tx, t tenant.Tenant, action string, host tenant.Host) (Reply, error) {
	if err := s.audit(ctx, r, tx, t, action, map[string]string{"host": host.String()}); err != nil {
		return Reply{}, err
	}
	views, err := s.domainViews(ctx, tx, t)
	if err != nil {
		return Reply{}, err
	}
	hosts := []tenant.Host{host}
	for _, v := range views {
		if h, err := tenant.ParseHost(v.Host); err == nil && h != host {
			hosts = append(hosts, h) // each remembers the tenant with its primary host
		}
	}
	return Reply{
		Body:  list{Data: views, Page: page{Limit: maxLimit}},
		After: func(ctx context.Context) { s.opts.Resolver.Forget(ctx, hosts...) },
	}, nil
}
