package tenant

import (
	"net"
	"net/netip"
	"strings"
	"unicode/utf8"

	"golang.org/x/net/idna"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Host is a domain name as it is stored and matched: lower case, punycode, without port and trailing dot. The zero
// Host is no host.
type Host struct{ s string }

// hostProfile maps as browsers do (UTS 46), with the checks that keep look-alike and malformed labels out.
var hostProfile = idna.New(
	idna.MapForLookup(), idna.Transitional(false), idna.StrictDomainName(true), idna.BidiRule(),
	idna.CheckHyphens(true), idna.CheckJoiners(true), idna.ValidateLabels(true), idna.VerifyDNSLength(true),
)

// ParseHost reads the value of a Host header or a domain given by an operator: it removes a port and one trailing
// dot, folds case and encodes international names. IP addresses are no tenants' names and are refused, as is
// everything that is no DNS name. The error is a fault of kind Invalid.
func ParseHost(s string) (Host, error) {
	bad := func(why string) error {
		return fault.New(fault.Invalid, "host %q %s", clip(s), why).WithCode("invalid_host").
			WithHint("use a DNS name such as acme.example.com")
	}
	if s == "" {
		return Host{}, bad("is empty")
	}
	if len(s) > 300 {
		return Host{}, bad("is too long")
	}
	if !utf8.ValidString(s) { // idna would make the replacement character of it: many inputs, one host
		return Host{}, bad("is no DNS name")
	}
	name := s
	if strings.ContainsRune(name, ':') {
		h, port, err := net.SplitHostPort(name)
		if err != nil {
			return Host{}, bad("has a malformed port or is an IPv6 address")
		}
		if port == "" || len(port) > 5 || strings.Trim(port, "0123456789") != "" {
			return Host{}, bad("has a malformed port")
		}
		if strings.HasPrefix(name, "[") {
			return Host{}, bad("is an IPv6 address")
		}
		name = h
	}
	name = strings.TrimSuffix(name, ".")
	if _, err := netip.ParseAddr(name); err == nil {
		return Host{}, bad("is an IP address")
	}
	ascii, err := hostProfile.ToASCII(name)
	if err != nil || ascii == "" || strings.HasSuffix(ascii, ".") {
		return Host{}, bad("is no DNS name")
	}
	// What is mapped may come to letters that may not stand together ("ℷA"): such a name could be given and never asked for.
	if strings.Contains(ascii, "xn--") {
		if again, err := hostProfile.ToASCII(ascii); err != nil || again != ascii {
			return Host{}, bad("is no DNS name")
		}
	}
	// A last label of digits would be read as an IPv4 address by many parsers (0x7f.1, 127.1).
	last := ascii[strings.LastIndexByte(ascii, '.')+1:]
	if strings.Trim(last, "0123456789") == "" || strings.HasPrefix(last, "0x") {
		return Host{}, bad("is an IP address")
	}
	return Host{ascii}, nil
}

// Under is the host <slug>.<base>.
func (s Slug) Under(base Host) Host { return Host{s.s + "." + base.s} }

// String is the name in ASCII, without port; empty for the zero Host.
func (h Host) String() string { return h.s }

// IsZero reports whether h was never parsed.
func (h Host) IsZero() bool { return h.s == "" }
