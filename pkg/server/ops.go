package server

import (
	"context"
	"errors"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// checkTimeout bounds each check of /readyz.
const checkTimeout = 2 * time.Second

// health is what /readyz answers.
type health struct {
	Status  string            `json:"status"` // ready, stopping or not_ready
	Version string            `json:"version,omitempty"`
	Checks  map[string]string `json:"checks"` // ok, or the code of what is wrong
}

// opsHandler serves operators, on a listener that tenants cannot reach.
func (s *Server) opsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) {
		opsReply(w, http.StatusOK, map[string]string{"status": "alive"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		h, ready := s.ready(r.Context())
		status := http.StatusOK
		if !ready {
			status = http.StatusServiceUnavailable
		}
		opsReply(w, status, h)
	})
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	for pattern, h := range s.opts.Ops {
		mux.Handle(pattern, h)
	}
	return mux
}

func opsReply(w http.ResponseWriter, status int, v any) {
	body, err := encode(v)
	if err != nil {
		status, body = http.StatusInternalServerError, nil
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n'))
}

// ready runs all checks at once. What an optional one finds, or what is borne, is told and changes nothing.
func (s *Server) ready(ctx context.Context) (health, bool) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	found := make([]error, len(s.opts.Checks))
	var wg sync.WaitGroup
	for i, c := range s.opts.Checks {
		wg.Go(func() { found[i] = c.Run(ctx) })
	}
	wg.Wait()
	h := health{Status: "ready", Version: s.opts.Version, Checks: map[string]string{}}
	for i, c := range s.opts.Checks {
		h.Checks[c.Name] = "ok"
		if found[i] == nil {
			continue
		}
		h.Checks[c.Name] = fault.Of(found[i]).StableCode()
		var borne Borne
		if c.Required && !errors.As(found[i], &borne) {
			h.Status = "not_ready"
		}
	}
	if s.stopping.Load() {
		h.Status = "stopping"
	}
	return h, h.Status == "ready"
}
