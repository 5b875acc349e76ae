package observe

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/registry"
)

const (
	// clientFor bounds each server's answer.
	clientFor = time.Second
	// maxStats bounds what is read of one.
	maxStats = 32 << 20
)

// Client reads the operators' listeners of running servers.
type Client struct {
	token string
	host  string // this machine's
	http  *http.Client
}

// NewClient makes a client with the token of a secret. It goes straight to the servers, past any proxy, and follows no
// redirection: nobody else is to get the token.
func NewClient(secret []byte) *Client {
	host, _ := os.Hostname() // empty is nobody's
	return &Client{token: Token(secret), host: host, http: &http.Client{
		Transport:     &http.Transport{DialContext: (&net.Dialer{Timeout: clientFor}).DialContext, MaxIdleConnsPerHost: 2, IdleConnTimeout: time.Minute},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// Close ends the connections at rest.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Reading is what one server answered.
type Reading struct {
	Instance registry.Instance
	Stats    Stats // zero where Err is set
	Err      error
}

// Stats reads /stats of all servers at once, in their order. One that does not answer within a second is a Reading with its
// Err; the whole never fails, and takes no longer.
func (c *Client) Stats(ctx context.Context, servers []registry.Instance) []Reading {
	out := make([]Reading, len(servers))
	var wg sync.WaitGroup
	for i, s := range servers {
		out[i].Instance = s
		wg.Go(func() { out[i].Stats, out[i].Err = c.stats(ctx, s) })
	}
	wg.Wait()
	return out
}

func (c *Client) stats(ctx context.Context, s registry.Instance) (st Stats, err error) {
	ctx, cancel := context.WithTimeout(ctx, clientFor)
	defer cancel()
	resp, err := c.Get(ctx, s, "/stats", nil)
	if err != nil {
		return Stats{}, err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxStats)).Decode(&st); err != nil {
		return Stats{}, unreadable(s, err)
	}
	if st.Instance != s.ID {
		return Stats{}, fault.New(fault.Unavailable, "another server answers at %s", s.OpsAddr).WithCode("other_instance")
	}
	return st, nil
}

func unreadable(s registry.Instance, err error) error {
	return fault.Wrap(err, fault.Unavailable, "the server at %s does not answer", s.OpsAddr).WithCode("instance_unreachable")
}

// Get asks one server's operators' listener, for as long as ctx. The answer is 200; whoever asked closes its body.
func (c *Client) Get(ctx context.Context, s registry.Instance, path string, query url.Values) (*http.Response, error) {
	addr, err := c.reach(s)
	if err != nil {
		return nil, err
	}
	u := url.URL{Scheme: "http", Host: addr, Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, unreadable(s, err)
	}
	req.Header.Set("Authorization", "Bearer "+c.token)
	resp, err := c.http.Do(req)
	if err != nil {
		var ue *url.Error
		if errors.As(err, &ue) {
			err = ue.Err
		}
		return nil, unreadable(s, err)
	}
	switch resp.StatusCode {
	case http.StatusOK:
		return resp, nil
	case http.StatusUnauthorized:
		err = fault.New(fault.Forbidden, "the server at %s has another server.secret", s.OpsAddr).WithCode("other_secret")
	case http.StatusNotFound:
		err = fault.New(fault.Unavailable, "the server at %s does not tell: its version is %s, or metrics.enabled is off", s.OpsAddr, s.Version).WithCode("not_told")
	default:
		err = unreadable(s, fmt.Errorf("it says %s", resp.Status))
	}
	_ = resp.Body.Close()
	return nil, err
}

// reach is the address under which this machine reaches a server's listener. One on all addresses is reached by its
// machine's name; one on the loopback address is reached on its own machine only, where another server may have the port.
func (c *Client) reach(s registry.Instance) (string, error) {
	host, port, err := net.SplitHostPort(s.OpsAddr)
	if err != nil {
		return "", fault.New(fault.Unavailable, "the server on %s has no listener for operators", s.Host).WithCode("no_ops_addr").
			WithHint("set server.ops_addr there")
	}
	ip, err := netip.ParseAddr(host)
	here := s.Host == c.host
	switch {
	case host == "", err == nil && ip.IsUnspecified():
		if here {
			return net.JoinHostPort("localhost", port), nil
		}
		return net.JoinHostPort(s.Host, port), nil
	case !here && (err == nil && ip.IsLoopback() || strings.EqualFold(host, "localhost")):
		return "", fault.New(fault.Unavailable, "the server on %s tells only programs on its own machine (%s)", s.Host, s.OpsAddr).WithCode("loopback").
			WithHint("set server.ops_addr there to an address of the private network")
	}
	return s.OpsAddr, nil
}
