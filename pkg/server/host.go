package server

import (
	"context"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// realm is whose routes a host serves: a request is in exactly one.
type realm int

const (
	// tenantRealm is the host of a tenant: its users, its data.
	tenantRealm realm = 1 << iota
	// publicRealm is a public host: administrators, the fleet.
	publicRealm
	bothRealms = tenantRealm | publicRealm
)

// errUnknownHost is the one answer for every host that is no tenant's and no public one.
func errUnknownHost() error {
	return fault.New(fault.NotFound, "nothing is served under this host name").WithCode("unknown_host")
}

// locate decides by the host name alone which realm and which tenant a request is for. Nothing else in the request can:
// no header but X-Forwarded-Host from a configured proxy, no parameter, no cookie.
func (s *Server) locate(ctx context.Context, x *exchange) error {
	if u := x.r.URL; u.Host != "" || u.Scheme != "" || u.Opaque != "" {
		// net/http lets the host of an absolute request line win over the Host header, so that the two may differ unseen.
		return fault.New(fault.Invalid, "the request line must be a path, not an absolute URL").WithCode("absolute_form")
	}
	name := x.r.Host
	if s.trusts(x.peer) {
		switch forwarded := x.r.Header.Values("X-Forwarded-Host"); {
		case len(forwarded) > 1 || len(forwarded) == 1 && strings.Contains(forwarded[0], ","):
			return fault.New(fault.Invalid, "X-Forwarded-Host names more than one host").WithCode("invalid_host")
		case len(forwarded) == 1:
			name = forwarded[0]
			x.r.Host = name // what CrossOriginProtection compares the Origin with
		}
	}
	host, err := tenant.ParseHost(name)
	if err != nil {
		return err
	}
	x.host = host
	if slices.Contains(s.opts.PublicHosts, host) {
		x.realm = publicRealm
		return nil
	}
	t, err := s.opts.Resolver.Resolve(ctx, host)
	if fault.Is(err, fault.NotFound) {
		return errUnknownHost()
	}
	if err != nil {
		return err
	}
	x.realm, x.tenant, x.rate = tenantRealm, t, s.rateOf(t.Budget)
	x.tenant.Budget = t.Budget.Or(s.opts.Budget)
	x.about.For(t.Slug)
	if s.opts.Counter != nil {
		x.counted = s.opts.Counter.Bind(t)
	}
	if err := t.Serving(); err != nil || s.opts.Serves == nil {
		return err
	}
	return s.opts.Serves(t)
}

// trusts reports whether a peer is a configured proxy.
func (s *Server) trusts(peer netip.Addr) bool {
	return slices.ContainsFunc(s.opts.TrustedProxies, func(p netip.Prefix) bool { return p.Contains(peer) })
}

// peerOf is the address at the other end of the connection.
func peerOf(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}

// clientOf is the address that a request came from: the peer, or behind configured proxies the last address in
// X-Forwarded-For that is not one of theirs.
func (s *Server) clientOf(r *http.Request, peer netip.Addr) netip.Addr {
	if !s.trusts(peer) {
		return peer
	}
	hops := strings.Split(strings.Join(r.Header.Values("X-Forwarded-For"), ","), ",")
	client := peer
	for _, hop := range slices.Backward(hops) {
		a, err := netip.ParseAddr(strings.TrimSpace(hop))
		if err != nil {
			break
		}
		if client = a.Unmap().WithZone(""); !s.trusts(client) {
			break
		}
	}
	return client
}

// bucketOf is what rate limits count by: an address, and of IPv6 the network of a /64, which is one customer's.
func bucketOf(a netip.Addr) string {
	if a.Is6() {
		if p, err := a.Prefix(64); err == nil {
			return strings.ReplaceAll(p.Addr().String(), ":", "-")
		}
	}
	return a.String()
}
