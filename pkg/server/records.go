package server

import (
	"context"
	"encoding/json"
	"net/http"
	"strings"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
)

func (s *Server) recordRoutes() []route {
	const records = pipelinesPath + "/:pipeline/records"
	r := func(method, path string, action auth.Action, access Access, body bodyKind, h Handler, params ...string) route {
		return route{method: method, path: records + path, realm: tenantRealm, policy: signedIn, action: action, access: access, body: body,
			params: params, handler: h}
	}
	// A record that comes back from the trash counts again; its room is taken as it is.
	create, patch, restore := r(http.MethodPost, "", auth.WriteRecords, Write, jsonBody, s.createRecord),
		r(http.MethodPatch, "/:id", auth.WriteRecords, Write, patchBody, s.patchRecord),
		r(http.MethodPost, "/:id/restore", auth.WriteRecords, Write, noBody, s.restoreRecord)
	create.stores, create.adds, patch.stores, restore.adds = true, true, true, true
	return []route{
		r(http.MethodGet, "", auth.ReadRecords, Read, noBody, s.listRecords, "filter", "sort", "limit", "cursor", "fields", "count", "trash"),
		create,
		// The route that speed is measured by: with its binding it is one round trip to PostgreSQL.
		r(http.MethodGet, "/:id", auth.ReadRecords, Single, noBody, s.showRecord),
		patch,
		r(http.MethodDelete, "/:id", auth.WriteRecords, Write, noBody, s.deleteRecord, "purge"),
		restore,
	}
}

func recordReply(status int, rec crm.Record) Reply {
	return Reply{Status: status, Body: rec, Header: etag(rec.Version)}
}

// place is where a page begins: behind one record, or before one.
type place struct {
	After  *uuid.UUID `json:"a,omitempty"`
	Before *uuid.UUID `json:"b,omitempty"`
}

func (s *Server) listRecords(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	limit, err := r.limit()
	if err != nil {
		return Reply{}, err
	}
	q := crm.ListQuery{Filter: r.Query("filter"), Limit: limit, Count: crm.CountNone}
	switch sort := r.Query("sort"); {
	case sort == "-id":
		q.Descending = true
	case sort != "id" && r.query.Has("sort"):
		return Reply{}, badParameter("sort", "sort must be id (oldest first) or -id (newest first)")
	}
	if q.Trash, err = r.boolean("trash"); err != nil {
		return Reply{}, err
	}
	if r.query.Has("count") {
		q.Count = crm.Count(r.Query("count"))
	}
	if r.query.Has("fields") {
		q.Fields = strings.Split(r.Query("fields"), ",")
	}
	scope := []string{"records", r.Tenant.ID, r.Param("pipeline"), q.Filter, r.Query("sort"), r.Query("trash")}
	if r.query.Has("cursor") {
		var p place
		if err := s.cursors.read(scope, r.Query("cursor"), &p); err != nil {
			return Reply{}, err
		}
		q.After, q.Before = p.After, p.Before
	}
	found, err := crm.List(ctx, tx, r.Param("pipeline"), q)
	if err != nil {
		return Reply{}, err
	}
	out := list{Data: found.Records, Page: page{HasMore: found.HasNext, Limit: limit, Count: found.Count}}
	if n := len(found.Records); n == 0 {
		out.Data = []crm.Record{}
		if found.HasNext { // what was before the cursor has gone: the list goes on at its beginning
			if out.Page.NextCursor, err = s.cursor(scope, place{}); err != nil {
				return Reply{}, err
			}
		}
	} else {
		if found.HasNext {
			if out.Page.NextCursor, err = s.cursor(scope, place{After: &found.Records[n-1].ID}); err != nil {
				return Reply{}, err
			}
		}
		if found.HasPrev {
			if out.Page.PrevCursor, err = s.cursor(scope, place{Before: &found.Records[0].ID}); err != nil {
				return Reply{}, err
			}
		}
	}
	return Reply{Body: out, Header: r.links(out.Page)}, nil
}

// readData takes the values out of a record's body.
func (r *Request) readData() (json.RawMessage, error) {
	var in struct {
		Data json.RawMessage `json:"data"`
	}
	if err := r.decode(&in); err != nil {
		return nil, err
	}
	if in.Data == nil {
		return nil, badField("/data", "required", `the values stand in data, for example {"data": {"name": "Ada"}}`)
	}
	return in.Data, nil
}

func (s *Server) createRecord(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	data, err := r.readData()
	if err != nil {
		return Reply{}, err
	}
	rec, err := crm.CreateRecord(ctx, tx, r.Param("pipeline"), data, r.Identity.UserID)
	if err != nil {
		return Reply{}, err
	}
	reply := recordReply(http.StatusCreated, rec)
	reply.Header.Set("Location", pipelinesPath+"/"+r.Param("pipeline")+"/records/"+rec.ID.String())
	return reply, nil
}

func (s *Server) showRecord(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "record")
	if err != nil {
		return Reply{}, err
	}
	rec, err := crm.RecordByID(ctx, tx, r.Param("pipeline"), id)
	if err != nil {
		return Reply{}, err
	}
	return recordReply(http.StatusOK, rec), nil
}

func (s *Server) patchRecord(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "record")
	if err != nil {
		return Reply{}, err
	}
	version, err := r.version()
	if err != nil {
		return Reply{}, err
	}
	data, err := r.readData()
	if err != nil {
		return Reply{}, err
	}
	rec, err := crm.PatchRecord(ctx, tx, r.Param("pipeline"), id, version, data)
	if err != nil {
		return Reply{}, inData(err)
	}
	return recordReply(http.StatusOK, rec), nil
}

// inData makes pointers into a record's values pointers into the body, where they stand in data.
func inData(err error) error {
	f := fault.Of(err)
	if f.Kind != fault.Unfit {
		return err
	}
	for i := range f.Fields {
		f.Fields[i].Pointer = "/data" + f.Fields[i].Pointer
	}
	return err
}

// deleteRecord moves a record to the trash, or with purge=true destroys one that is there, which is not everybody's.
func (s *Server) deleteRecord(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "record")
	if err != nil {
		return Reply{}, err
	}
	purge, err := r.boolean("purge")
	if err != nil {
		return Reply{}, err
	}
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	if purge {
		if err := r.Identity.May(auth.ManagePipelines); err != nil {
			return Reply{}, fault.New(fault.Forbidden, "only an administrator may destroy records").WithCode("forbidden")
		}
		return Reply{}, crm.PurgeRecord(ctx, tx, r.Param("pipeline"), id, version)
	}
	rec, err := crm.TrashRecord(ctx, tx, r.Param("pipeline"), id, version)
	if err != nil {
		return Reply{}, err
	}
	return recordReply(http.StatusOK, rec), nil
}

func (s *Server) restoreRecord(ctx context.Context, r *Request, tx Tx) (Reply, error) {
	id, err := r.id("id", "record")
	if err != nil {
		return Reply{}, err
	}
	version, err := r.versionIfGiven()
	if err != nil {
		return Reply{}, err
	}
	rec, err := crm.RestoreRecord(ctx, tx, r.Param("pipeline"), id, version)
	if err != nil {
		return Reply{}, err
	}
	return recordReply(http.StatusOK, rec), nil
}
