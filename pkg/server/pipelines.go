package server

import (
	"context"
	"encoding/json"
	"net/http"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
)

const pipelinesPath = "/api/v1/pipelines"

func (s *Server) pipelineRoutes() []route {
	r := func(method, path string, action auth.Action, access Access, body bodyKind, h Handler) route {
		return route{method: method, path: pipelinesPath + path, realm: tenantRealm, policy: signedIn, action: action, access: access, body: body, handler: h}
	}
	stores := func(rt route) route {
		rt.stores = true
		return rt
	}
	return []route{
		r(http.MethodGet, "", auth.ReadRecords, Read, noBody, s.listPipelines),
		stores(r(http.MethodPost, "", auth.ManagePipelines, Write, jsonBody, s.createPipeline)),
		r(http.MethodGet, "/:pipeline", auth.ReadRecords, Read, noBody, s.showPipeline),
		stores(r(http.MethodPatch, "/:pipeline", auth.ManagePipelines, Write, patchBody, s.patchPipeline)),
		r(http.MethodDelete, "/:pipeline", auth.ManagePipelines, Write, noBody, s.deletePipeline),
		stores(r(http.MethodPost, "/:pipeline/fields", auth.ManagePipelines, Write, jsonBody, s.addField)),
		stores(r(http.MethodPatch, "/:pipeline/fields/:field", auth.ManagePipelines, Write, patchBody, s.patchField)),
		r(http.MethodDelete, "/:pipeline/fields/:field", auth.ManagePipelines, Write, noBody, s.removeField),
	}
}

func (s *Server) listPipelines(ctx context.Context, _ *Request, tx Tx) (Reply, error) {
	ps, err := crm.Pipelines(ctx, tx)
	if err != nil {
		return Reply{}, err
	}
	if ps == nil {
		ps = []crm.Pipeline{}
	}
	return Reply{Body: list{Data: ps, Page: page{Limit: len(ps)}}}, nil
}

func pipelineReply(status int, p crm.Pipeline) Reply {
	return Reply{Status: status, Body: p, Header: etag(p.Version)}
}

func (s *Server) createPipeline(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	var in crm.NewPipeline
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	p, err := crm.CreatePipeline(ctx, tx, in)
	if err != nil {
		return Reply{}, err
	}
	reply := pipelineReply(http.StatusCreated, p)
	reply.Header.Set("Location", pipelinesPath+"/"+p.Key)
	return reply, nil
}

func (s *Server) showPipeline(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	p, err := crm.PipelineByKey(ctx, tx, r.Param("pipeline"))
	if err != nil {
		return Reply{}, err
	}
	return pipelineReply(http.StatusOK, p), nil
}

func (s *Server) patchPipeline(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	version, err := r.version()
	if err != nil {
		return Reply{}, err
	}
	var in crm.PipelineChange
	if err := r.decodePatch(&in); err != nil {
		return Reply{}, err
	}
	p, err := crm.UpdatePipeline(ctx, tx, r.Param("pipeline"), version, in)
	if err != nil {
		return Reply{}, err
	}
	return pipelineReply(http.StatusOK, p), nil
}

func (s *Server) deletePipeline(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	return Reply{}, crm.DeletePipeline(ctx, tx, r.Param("pipeline"), version)
}

func (s *Server) addField(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	var in crm.NewField
	if err := r.decode(&in); err != nil {
		return Reply{}, err
	}
	f, err := crm.AddField(ctx, tx, r.Param("pipeline"), version, in)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Status: http.StatusCreated, Body: f}, nil
}

func (s *Server) patchField(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	var in crm.FieldChange
	if err := r.decodePatch(&in); err != nil {
		return Reply{}, err
	}
	f, err := crm.UpdateField(ctx, tx, r.Param("pipeline"), r.Param("field"), version, in)
	if err != nil {
		return Reply{}, err
	}
	return Reply{Body: f}, nil
}

func (s *Server) removeField(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	return Reply{}, crm.RemoveField(ctx, tx, r.Param("pipeline"), r.Param("field"), version)
}

// decodePatch reads a merge patch of a resource whose members are all there to stay: null, which would remove one, is
// refused and not taken for "unchanged".
func (r *Request) decodePatch(into any) error {
	if err := r.decode(into); err != nil {
		return err
	}
	var patch map[string]json.RawMessage
	if err := json.Unmarshal(r.Body, &patch); err != nil || patch == nil {
		return badField("", "type", "a merge patch is a JSON object")
	}
	for name, v := range patch {
		if string(v) == "null" {
			return badField("/"+escapePointer(name), "null", "this member cannot be removed")
		}
	}
	return nil
}
