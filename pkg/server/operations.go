package server

import (
	"context"
	"encoding/json"
	"net/http"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// Operation is work that was asked for and that a worker does: what a client follows.
type Operation struct {
	ID         uuid.UUID       `json:"id"`
	Kind       string          `json:"kind"`
	Slug       string          `json:"tenant"`
	State      string          `json:"state"` // queued, running, done or failed
	Actor      string          `json:"actor"`
	Request    json.RawMessage `json:"request,omitempty"`
	Result     json.RawMessage `json:"result,omitempty"`
	Error      json.RawMessage `json:"error,omitempty"`
	Attempts   int             `json:"attempts"`
	CreatedAt  time.Time       `json:"created_at"`
	StartedAt  *time.Time      `json:"started_at,omitempty"`
	FinishedAt *time.Time      `json:"finished_at,omitempty"`
}

const operationsPath = "/api/v1/admin/operations"

func (s *Server) operationRoutes() []route {
	return []route{
		{method: http.MethodGet, path: operationsPath, realm: publicRealm, policy: signedIn, action: auth.Administer, access: Read,
			params: []string{"limit", "cursor"}, handler: s.listOperations},
		{method: http.MethodGet, path: operationsPath + "/:id", realm: publicRealm, policy: signedIn, action: auth.Administer, access: Read, handler: s.showOperation},
	}
}

func (s *Server) listOperations(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	limit, err := r.limit()
	if err != nil {
		return Reply{}, err
	}
	scope := []string{"operations"}
	var before *uuid.UUID
	if r.query.Has("cursor") {
		before = new(uuid.UUID)
		if err := s.cursors.read(scope, r.Query("cursor"), before); err != nil {
			return Reply{}, err
		}
	}
	ops, err := s.opts.Admin.Operations(ctx, tx, limit+1, before)
	if err != nil {
		return Reply{}, err
	}
	out := list{Page: page{Limit: limit}}
	if len(ops) > limit {
		ops = ops[:limit]
		out.Page.HasMore = true
		if out.Page.NextCursor, err = s.cursor(scope, ops[limit-1].ID); err != nil {
			return Reply{}, err
		}
	}
	data := make([]Operation, len(ops))
	for i, o := range ops {
		data[i] = forEyes(o)
	}
	out.Data = data
	return Reply{Body: out, Header: r.links(out.Page)}, nil
}

func (s *Server) showOperation(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "operation")
	if err != nil {
		return Reply{}, err
	}
	o, err := s.opts.Admin.Operation(ctx, tx, id)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Body: forEyes(o)}, nil
}

// forEyes is an operation without what nobody should read: a first user's password hash.
func forEyes(o Operation) Operation {
	var request map[string]json.RawMessage
	if json.Unmarshal(o.Request, &request) != nil {
		o.Request = nil
		return o
	}
	delete(request, "admin_password_hash")
	o.Request, _ = json.Marshal(request) // was read a moment ago
	return o
}

// accepted is the answer to a request whose work is done later: 202 and where to follow it.
func (s *Server) accepted(o Operation, more map[string]any) Reply {
	body := map[string]any{"operation": forEyes(o)}
	for k, v := range more {
		body[k] = v
	}
	return Reply{
		Status: http.StatusAccepted, Body: body,
		Header: http.Header{"Location": []string{operationsPath + "/" + o.ID.String()}},
		After: func(context.Context) {
			if s.opts.OnEnqueued != nil {
				s.opts.OnEnqueued()
			}
		},
	}
}

// confirmed reads {"confirm": name}: destructive routes want the name of what they destroy.
func confirmed(given *string, slug string) error {
	if given != nil && *given == slug {
		return nil
	}
	return fault.New(fault.NeedsConfirmation, "this destroys the tenant %s and needs its name as confirmation", slug).WithCode("confirmation_required").
		WithField(fault.Field{Pointer: "/confirm", Code: "confirmation_required", Detail: `send {"confirm": "` + slug + `"}`})
}
