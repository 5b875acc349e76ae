package crm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// stage is one tenant of a fresh installation.
type stage struct {
	*testing.T
	env *pgtest.Env
	at  tenant.Tenant
}

func open(t *testing.T) stage {
	t.Helper()
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns, o.InFlight = 12, 6 }) // so that one tenant's work meets
	return stage{t, env, env.Tenant(t, "acme")}
}

// write runs fn in a transaction of its own and returns its error.
func (s stage) write(fn func(ctx context.Context, q postgres.Querier) error) error {
	return inTenant(s.Context(), s.env, s.at, fn)
}

func inTenant(ctx context.Context, env *pgtest.Env, at tenant.Tenant, fn func(ctx context.Context, q postgres.Querier) error) error {
	return env.DB.InTenant(ctx, at, postgres.Write, func(tx *postgres.Tx) error { return fn(ctx, tx) })
}

// ok runs fn and demands that it works.
func (s stage) ok(fn func(ctx context.Context, q postgres.Querier) error) {
	s.Helper()
	require.NoError(s, s.write(fn))
}

func (s stage) pipeline(n crm.NewPipeline) (p crm.Pipeline) {
	s.Helper()
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) {
		p, err = crm.CreatePipeline(ctx, q, n)
		return err
	})
	return p
}

func (s stage) create(pipeline, data string) (r crm.Record) {
	s.Helper()
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) {
		r, err = crm.CreateRecord(ctx, q, pipeline, json.RawMessage(data), uuid.Nil)
		return err
	})
	return r
}

func (s stage) creates(pipeline string, n int, data func(i int) string) (rs []crm.Record) {
	s.Helper()
	all := make([]json.RawMessage, n)
	for i := range all {
		all[i] = json.RawMessage(data(i))
	}
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) {
		rs, err = crm.CreateRecords(ctx, q, pipeline, all, uuid.Nil)
		return err
	})
	return rs
}

func (s stage) list(pipeline string, l crm.ListQuery) (p crm.Page) {
	s.Helper()
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) {
		p, err = crm.List(ctx, q, pipeline, l)
		return err
	})
	return p
}

func (s stage) read(pipeline string, id uuid.UUID) (r crm.Record, err error) {
	err = s.env.DB.InTenant(s.Context(), s.at, postgres.Single, func(tx *postgres.Tx) (err error) {
		r, err = crm.RecordByID(s.Context(), tx, pipeline, id)
		return err
	})
	return r, err
}

// refused demands a fault of a kind and returns it.
func refused(t testing.TB, err error, kind fault.Kind, code string) *fault.Fault {
	t.Helper()
	require.Error(t, err)
	f := fault.Of(err)
	require.Equal(t, kind, f.Kind, "%v", err)
	require.Equal(t, code, f.Code, "%v", err)
	return f
}

// pointers are the places that a fault tells, each with its code.
func pointers(f *fault.Fault) (out []string) {
	for _, x := range f.Fields {
		out = append(out, x.Pointer+" "+x.Code)
	}
	return out
}

func everyType() crm.NewPipeline {
	return crm.NewPipeline{Key: "deals", Name: "Deals", Fields: []crm.NewField{
		{Key: "title", Type: crm.Text, Required: true},
		{Key: "amount", Type: crm.Number},
		{Key: "open", Type: crm.Boolean},
		{Key: "due", Type: crm.Date},
		{Key: "stage", Type: crm.Select, Options: crm.Options{Choices: []string{"won", "lost"}}},
		{Key: "parent", Type: crm.Relation, Options: crm.Options{Pipeline: "deals"}},
	}}
}

func TestPipelinesAreValidated(t *testing.T) {
	s := open(t)
	with := func(f crm.NewField) crm.NewPipeline { return crm.NewPipeline{Key: "p", Fields: []crm.NewField{f}} }
	many := func(n int) (c []string) {
		for i := range n {
			c = append(c, fmt.Sprint(i))
		}
		return c
	}
	var large []string // each of 200 characters, which are 800 bytes
	for i := range crm.MaxOptionsBytes/800 + 1 {
		large = append(large, strings.Repeat("𝄞", 199)+string(rune('𝄀'+i)))
	}
	fields := make([]crm.NewField, crm.MaxFields+1)
	for i := range fields {
		fields[i] = crm.NewField{Key: fmt.Sprintf("f%d", i), Type: crm.Text}
	}
	for name, c := range map[string]struct {
		n    crm.NewPipeline
		want []string
	}{
		"no key":          {crm.NewPipeline{Name: "x"}, []string{"/key key"}},
		"upper case":      {crm.NewPipeline{Key: "Deals"}, []string{"/key key"}},
		"digit first":     {crm.NewPipeline{Key: "1deals"}, []string{"/key key"}},
		"long key":        {crm.NewPipeline{Key: strings.Repeat("k", 49)}, []string{"/key key"}},
		"line break":      {crm.NewPipeline{Key: "deals\n"}, []string{"/key key"}},
		"long name":       {crm.NewPipeline{Key: "p", Name: strings.Repeat("n", 201)}, []string{"/name length"}},
		"NUL":             {crm.NewPipeline{Key: "p", Description: "a\x00b"}, []string{"/description length"}},
		"metadata":        {crm.NewPipeline{Key: "p", Metadata: json.RawMessage(`[1]`)}, []string{"/metadata object"}},
		"large metadata":  {crm.NewPipeline{Key: "p", Metadata: json.RawMessage(`{"a":"` + strings.Repeat("x", 17<<10) + `"}`)}, []string{"/metadata object"}},
		"too many fields": {crm.NewPipeline{Key: "p", Fields: fields}, []string{"/fields too_many"}},
		"a field twice": {crm.NewPipeline{Key: "p", Fields: []crm.NewField{{Key: "a", Type: crm.Text}, {Key: "a", Type: crm.Date}}},
			[]string{"/fields/1/key duplicate"}},
		"field's key":          {with(crm.NewField{Key: "a b", Type: crm.Text}), []string{"/fields/0/key key"}},
		"type":                 {with(crm.NewField{Key: "a", Type: "money"}), []string{"/fields/0/type type"}},
		"no type":              {with(crm.NewField{Key: "a"}), []string{"/fields/0/type type"}},
		"no choices":           {with(crm.NewField{Key: "a", Type: crm.Select}), []string{"/fields/0/options/choices choices"}},
		"too many choices":     {with(crm.NewField{Key: "a", Type: crm.Select, Options: crm.Options{Choices: many(501)}}), []string{"/fields/0/options/choices choices"}},
		"large choices":        {with(crm.NewField{Key: "a", Type: crm.Select, Options: crm.Options{Choices: large}}), []string{"/fields/0/options/choices too_large"}},
		"a choice twice":       {with(crm.NewField{Key: "a", Type: crm.Select, Options: crm.Options{Choices: []string{"x", "y", "x"}}}), []string{"/fields/0/options/choices/2 duplicate"}},
		"an empty choice":      {with(crm.NewField{Key: "a", Type: crm.Select, Options: crm.Options{Choices: []string{""}}}), []string{"/fields/0/options/choices/0 length"}},
		"choices of a text":    {with(crm.NewField{Key: "a", Type: crm.Text, Options: crm.Options{Choices: []string{"x"}}}), []string{"/fields/0/options/choices choices"}},
		"no pipeline":          {with(crm.NewField{Key: "a", Type: crm.Relation}), []string{"/fields/0/options/pipeline pipeline"}},
		"an unknown pipeline":  {with(crm.NewField{Key: "a", Type: crm.Relation, Options: crm.Options{Pipeline: "nope"}}), []string{"/fields/0/options/pipeline unknown_pipeline"}},
		"pipeline of a number": {with(crm.NewField{Key: "a", Type: crm.Number, Options: crm.Options{Pipeline: "p"}}), []string{"/fields/0/options/pipeline pipeline"}},
		"several at once": {crm.NewPipeline{Key: "P", Name: strings.Repeat("n", 201), Fields: []crm.NewField{{Key: "a", Type: "x"}}},
			[]string{"/key key", "/name length", "/fields/0/type type"}},
	} {
		err := s.write(func(ctx context.Context, q postgres.Querier) error {
			_, err := crm.CreatePipeline(ctx, q, c.n)
			return err
		})
		require.Error(t, err, name)
		require.Equal(t, fault.Unfit, fault.Of(err).Kind, "%s: %v", name, err)
		require.Equal(t, c.want, pointers(fault.Of(err)), name)
	}
	var ps []crm.Pipeline
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) { ps, err = crm.Pipelines(ctx, q); return err })
	require.Empty(t, ps, "a pipeline that was refused is there")

	fields = fields[:crm.MaxFields]
	require.Len(t, s.pipeline(crm.NewPipeline{Key: "wide", Fields: fields}).Fields, crm.MaxFields)
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.AddField(ctx, q, "wide", 0, crm.NewField{Key: "one_more", Type: crm.Text})
		return err
	})
	refused(t, err, fault.Conflict, "too_many")
}

func TestATenantHasABoundOfPipelines(t *testing.T) {
	s := open(t)
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := q.Exec(ctx, `insert into pipelines (id, key, name) select gen_random_uuid(), 'p' || n, 'p' from generate_series(2, $1) n`, crm.MaxPipelines)
		return err
	})
	s.pipeline(crm.NewPipeline{Key: "last"})
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.CreatePipeline(ctx, q, crm.NewPipeline{Key: "one_more"})
		return err
	})
	refused(t, err, fault.Conflict, "too_many_pipelines")
}

func TestPipelineLife(t *testing.T) {
	s := open(t)
	p := s.pipeline(everyType())
	require.Equal(t, "Deals", p.Name)
	require.Equal(t, "title", p.Fields[0].Name, "a field without a name is called like its key")
	require.JSONEq(t, `{}`, string(p.Metadata))
	change := func(version int, c crm.PipelineChange) (p crm.Pipeline, err error) {
		err = s.write(func(ctx context.Context, q postgres.Querier) (err error) {
			p, err = crm.UpdatePipeline(ctx, q, "deals", version, c)
			return err
		})
		return p, err
	}
	_, err := change(1, crm.PipelineChange{Metadata: json.RawMessage(`{"a": 1.10, "b": {"c": 1, "d": 2}}`)})
	require.NoError(t, err)
	name := "All deals"
	p, err = change(2, crm.PipelineChange{Name: &name, Metadata: json.RawMessage(`{"b": {"c": null}, "e": "<&>"}`)})
	require.NoError(t, err)
	require.Equal(t, 3, p.Version)
	require.Equal(t, "All deals", p.Name)
	require.Len(t, p.Fields, 6)
	require.Contains(t, string(p.Metadata), "1.10")
	require.JSONEq(t, `{"a": 1.10, "b": {"d": 2}, "e": "<&>"}`, string(p.Metadata))
	_, err = change(2, crm.PipelineChange{Name: &name})
	f := refused(t, err, fault.Stale, "stale")
	require.Equal(t, 3, f.Details.(map[string]any)["current"].(crm.Pipeline).Version)
	_, err = change(3, crm.PipelineChange{Metadata: json.RawMessage(`null`)})
	refused(t, err, fault.Unfit, "object")

	err = s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.CreatePipeline(ctx, q, everyType())
		return err
	})
	refused(t, err, fault.Conflict, "pipeline_exists")
	s.pipeline(crm.NewPipeline{Key: "notes", Fields: []crm.NewField{{Key: "deal", Type: crm.Relation, Options: crm.Options{Pipeline: "deals"}}}})
	remove := func(key string) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error { return crm.DeletePipeline(ctx, q, key, 0) })
	}
	refused(t, remove("deals"), fault.Conflict, "referenced")
	note := s.create("notes", `{}`)
	refused(t, remove("notes"), fault.Conflict, "not_empty")
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.TrashRecord(ctx, q, "notes", note.ID, 0)
		return err
	})
	refused(t, remove("notes"), fault.Conflict, "not_empty")
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		return crm.PurgeRecord(ctx, q, "notes", note.ID, 0)
	})
	require.NoError(t, remove("notes"))
	require.NoError(t, remove("deals"), "a relation to itself does not hold a pipeline")
	refused(t, remove("deals"), fault.NotFound, "unknown_pipeline")
	for _, key := range []string{"", "Deals", "a'b", "x\x00", strings.Repeat("k", 500)} {
		refused(t, remove(key), fault.NotFound, "unknown_pipeline")
	}
}

func TestFieldLife(t *testing.T) {
	s := open(t)
	s.pipeline(everyType())
	s.create("deals", `{"title": "old", "stage": "won"}`)
	add := func(n crm.NewField) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error {
			_, err := crm.AddField(ctx, q, "deals", 0, n)
			return err
		})
	}
	update := func(field string, c crm.FieldChange) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error {
			_, err := crm.UpdateField(ctx, q, "deals", field, 0, c)
			return err
		})
	}
	remove := func(field string) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error { return crm.RemoveField(ctx, q, "deals", field, 0) })
	}
	refused(t, add(crm.NewField{Key: "title", Type: crm.Text}), fault.Conflict, "field_exists")
	refused(t, add(crm.NewField{Key: "to", Type: crm.Relation, Options: crm.Options{Pipeline: "nope"}}), fault.Unfit, "unknown_pipeline")

	// A required field holds for what is written from now on, not for what is there.
	require.NoError(t, add(crm.NewField{Key: "owner", Type: crm.Text, Required: true}))
	old := s.list("deals", crm.ListQuery{Limit: 1, Count: crm.CountNone}).Records[0]
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.PatchRecord(ctx, q, "deals", old.ID, 1, json.RawMessage(`{"amount": 1}`))
		return err
	})
	require.Equal(t, []string{"/owner required"}, pointers(refused(t, err, fault.Unfit, "required")))
	err = s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.CreateRecord(ctx, q, "deals", json.RawMessage(`{"title": "new"}`), uuid.Nil)
		return err
	})
	require.Equal(t, []string{"/data/owner required"}, pointers(refused(t, err, fault.Unfit, "required")))
	s.create("deals", `{"title": "new", "owner": "Ada"}`)

	no, far, gone := false, 1<<40, crm.Options{Choices: []string{"lost", "new"}}
	require.NoError(t, update("owner", crm.FieldChange{Required: &no}))
	s.create("deals", `{"title": "newer"}`)
	refused(t, update("owner", crm.FieldChange{Position: &far}), fault.Unfit, "position")
	refused(t, update("stage", crm.FieldChange{Options: &gone}), fault.Conflict, "choice_used")
	refused(t, update("stage", crm.FieldChange{Options: &crm.Options{}}), fault.Unfit, "choices")
	refused(t, update("parent", crm.FieldChange{Options: &crm.Options{Pipeline: "others"}}), fault.Unfit, "fixed")
	refused(t, update("nope", crm.FieldChange{}), fault.NotFound, "unknown_field")
	require.NoError(t, update("stage", crm.FieldChange{Options: &crm.Options{Choices: []string{"won", "new"}}}), "a choice that nobody uses may go")
	s.create("deals", `{"title": "x", "stage": "new"}`)

	refused(t, remove("stage"), fault.Conflict, "field_used")
	refused(t, remove("nope"), fault.NotFound, "unknown_field")
	require.NoError(t, remove("due"))
	require.NoError(t, add(crm.NewField{Key: "due", Type: crm.Number}), "the key is free again")
	var p crm.Pipeline
	s.ok(func(ctx context.Context, q postgres.Querier) (err error) {
		p, err = crm.PipelineByKey(ctx, q, "deals")
		return err
	})
	require.Equal(t, 6, p.Version, "each change of a field is a version of its pipeline")
	require.Equal(t, "due", p.Fields[len(p.Fields)-1].Key)
}

func TestValuesAreHeldToTheirTypes(t *testing.T) {
	s := open(t)
	s.pipeline(everyType())
	first := s.create("deals", `{"title": "first"}`)
	s.pipeline(crm.NewPipeline{Key: "others"})
	other := s.create("others", `{}`)
	with := func(field, value string) string { return fmt.Sprintf(`{"title": "t", %q: %s}`, field, value) }
	for _, c := range []struct{ data, want string }{
		{`[]`, "/data object"}, {`null`, "/data object"}, {`"x"`, "/data object"}, {`{`, "/data object"}, {`{} {}`, "/data object"},
		{`{}`, "/data/title required"}, {`{"title": null}`, "/data/title required"},
		{with("nope", `1`), "/data/nope unknown_field"}, {with("nope", `null`), "/data/nope unknown_field"}, {with("a/b~c", `1`), "/data/a~1b~0c unknown_field"},
		{with("Title", `"x"`), "/data/Title unknown_field"},
		{`{"title": 1}`, "/data/title text"}, {`{"title": "a\u0000b"}`, "/data/title text"}, {`{"title": {}}`, "/data/title text"},
		{`{"title": "` + strings.Repeat("x", crm.MaxTextBytes+1) + `"}`, "/data/title text"},
		{with("amount", `"1"`), "/data/amount number"}, {with("amount", `true`), "/data/amount number"}, {with("amount", `[1]`), "/data/amount number"},
		{with("amount", `1e1000`), "/data/amount number"}, {with("amount", `1e-999999999999`), "/data/amount number"},
		{with("amount", strings.Repeat("9", 101)), "/data/amount number"},
		{with("open", `"true"`), "/data/open boolean"}, {with("open", `1`), "/data/open boolean"},
		{with("due", `"23.11.2026"`), "/data/due date"}, {with("due", `"2026-02-30"`), "/data/due date"}, {with("due", `"2026-1-1"`), "/data/due date"},
		{with("due", `"2026-11-23T10:00:00Z"`), "/data/due date"}, {with("due", `20261123`), "/data/due date"}, {with("due", `""`), "/data/due date"},
		{with("stage", `"Won"`), "/data/stage choice"}, {with("stage", `""`), "/data/stage choice"}, {with("stage", `["won"]`), "/data/stage choice"},
		{with("parent", `"x"`), "/data/parent relation"}, {with("parent", `1`), "/data/parent relation"},
		{with("parent", `"`+strings.ToUpper(first.ID.String())+`"`), "/data/parent relation"}, {with("parent", `"{`+first.ID.String()+`}"`), "/data/parent relation"},
		{with("parent", `"`+uuid.NewString()+`"`), "/data/parent dangling"}, {with("parent", `"`+other.ID.String()+`"`), "/data/parent dangling"},
	} {
		err := s.write(func(ctx context.Context, q postgres.Querier) error {
			_, err := crm.CreateRecord(ctx, q, "deals", json.RawMessage(c.data), uuid.Nil)
			return err
		})
		require.Error(t, err, "%.100s", c.data)
		require.Equal(t, fault.Unfit, fault.Of(err).Kind, "%.100s: %v", c.data, err)
		require.Equal(t, []string{c.want}, pointers(fault.Of(err)), "%.100s", c.data)
	}
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.CreateRecords(ctx, q, "deals", []json.RawMessage{[]byte(`{"title": "good"}`), []byte(`{"title": 1, "open": 2}`), []byte(`7`)}, uuid.Nil)
		return err
	})
	require.Equal(t, []string{"/1/data/open boolean", "/1/data/title text", "/2/data object"}, pointers(refused(t, err, fault.Unfit, "boolean")))
	require.Len(t, s.list("deals", crm.ListQuery{Limit: 10, Count: crm.CountNone}).Records, 1, "something of what was refused is there")

	data := `{"title": "<&> 𝄞 \"", "amount": 12345678901234567890.10, "open": false, "due": "2024-02-29", "stage": "won", "parent": "` + first.ID.String() + `"}`
	made := s.create("deals", data)
	require.JSONEq(t, data, string(made.Data))
	require.Contains(t, string(made.Data), "12345678901234567890.10", "a number lost digits")
	require.Equal(t, 1, made.Version)
	require.Nil(t, made.CreatedBy)
	require.JSONEq(t, `{"title": "t"}`, string(s.create("deals", with("amount", `null`)).Data), "null is no value")
	edge := strings.Repeat("<", crm.MaxTextBytes)
	require.Len(t, string(s.create("deals", `{"title": "`+edge+`"}`).Data), crm.MaxTextBytes+len(`{"title": ""}`), "escapes count towards no bound")
}

func TestARecordHasABound(t *testing.T) {
	s := open(t)
	var fields []crm.NewField
	var values []string
	for i := range 5 {
		fields = append(fields, crm.NewField{Key: fmt.Sprintf("t%d", i), Type: crm.Text})
		values = append(values, fmt.Sprintf(`"t%d": "%s"`, i, strings.Repeat("x", 60<<10)))
	}
	s.pipeline(crm.NewPipeline{Key: "notes", Fields: fields})
	r := s.create("notes", `{`+strings.Join(values[:4], ",")+`}`)
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.CreateRecord(ctx, q, "notes", json.RawMessage(`{`+strings.Join(values, ",")+`}`), uuid.Nil)
		return err
	})
	require.Equal(t, []string{"/data too_large"}, pointers(refused(t, err, fault.Unfit, "too_large")))
	err = s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.PatchRecord(ctx, q, "notes", r.ID, 1, json.RawMessage(`{`+values[4]+`}`))
		return err
	})
	refused(t, err, fault.Unfit, "too_large")
}

func TestRecordLife(t *testing.T) {
	s := open(t)
	s.pipeline(everyType())
	s.pipeline(crm.NewPipeline{Key: "others"})
	r := s.create("deals", `{"title": "a", "amount": 1.50, "stage": "won"}`)
	patch := func(version int, patch string) (out crm.Record, err error) {
		err = s.write(func(ctx context.Context, q postgres.Querier) (err error) {
			out, err = crm.PatchRecord(ctx, q, "deals", r.ID, version, json.RawMessage(patch))
			return err
		})
		return out, err
	}
	got, err := patch(1, `{"title": "b", "stage": null, "open": true}`)
	require.NoError(t, err)
	require.Equal(t, 2, got.Version)
	require.Equal(t, `{"open": true, "title": "b", "amount": 1.50}`, string(got.Data))
	require.True(t, got.UpdatedAt.After(got.CreatedAt))

	_, err = patch(1, `{"title": "b", "amount": 2, "due": "2026-11-23", "stage": null}`)
	f := refused(t, err, fault.Stale, "stale")
	require.Equal(t, got.Version, f.Details.(map[string]any)["current"].(crm.Record).Version)
	require.Equal(t, []string{"amount", "due"}, f.Details.(map[string]any)["conflicting_fields"], "fields of the patch that are not as it wants them")
	for _, bad := range []struct {
		version    int
		patch      string
		kind       fault.Kind
		code, want string
	}{
		{0, `{}`, fault.Stale, "stale", ""}, {-1, `{}`, fault.Stale, "stale", ""}, {3, `{}`, fault.Stale, "stale", ""},
		{2, `[]`, fault.Unfit, "object", ""}, {2, `null`, fault.Unfit, "object", ""},
		{2, `{"nope": null}`, fault.Unfit, "unknown_field", "/nope unknown_field"}, {2, `{"nope": 1}`, fault.Unfit, "unknown_field", "/nope unknown_field"},
		{2, `{"title": null}`, fault.Unfit, "required", "/title required"}, {2, `{"open": {"a": 1}}`, fault.Unfit, "boolean", "/open boolean"},
		{2, `{"parent": "` + uuid.NewString() + `"}`, fault.Unfit, "dangling", "/parent dangling"},
	} {
		_, err := patch(bad.version, bad.patch)
		f := refused(t, err, bad.kind, bad.code)
		if bad.want != "" {
			require.Equal(t, []string{bad.want}, pointers(f), bad.patch)
		}
	}
	got, err = s.read("deals", r.ID)
	require.NoError(t, err, "one statement is enough for a record")
	require.Equal(t, 2, got.Version, "something that was refused has changed the record")

	for _, key := range []string{"others", "nope", "DEALS", "x\x00", ""} {
		_, err = s.read(key, r.ID)
		refused(t, err, fault.NotFound, "unknown_record")
	}
	_, err = s.read("deals", uuid.New())
	refused(t, err, fault.NotFound, "unknown_record")

	on := func(fn func(ctx context.Context, q postgres.Querier, key string, id uuid.UUID) error) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error { return fn(ctx, q, "deals", r.ID) })
	}
	trash := func(version int) error {
		return on(func(ctx context.Context, q postgres.Querier, key string, id uuid.UUID) error {
			_, err := crm.TrashRecord(ctx, q, key, id, version)
			return err
		})
	}
	restore := func(version int) error {
		return on(func(ctx context.Context, q postgres.Querier, key string, id uuid.UUID) error {
			_, err := crm.RestoreRecord(ctx, q, key, id, version)
			return err
		})
	}
	purge := func(version int) error {
		return on(func(ctx context.Context, q postgres.Querier, key string, id uuid.UUID) error {
			return crm.PurgeRecord(ctx, q, key, id, version)
		})
	}
	refused(t, purge(0), fault.NotFound, "unknown_record")
	refused(t, restore(0), fault.NotFound, "unknown_record")
	refused(t, trash(1), fault.Stale, "stale")
	require.NoError(t, trash(2))
	refused(t, trash(0), fault.NotFound, "unknown_record")
	_, err = s.read("deals", r.ID)
	refused(t, err, fault.NotFound, "unknown_record")
	_, err = patch(3, `{"title": "x"}`)
	refused(t, err, fault.NotFound, "unknown_record")
	require.Empty(t, s.list("deals", crm.ListQuery{Limit: 5, Count: crm.CountNone}).Records)
	inTrash := s.list("deals", crm.ListQuery{Limit: 5, Trash: true, Count: crm.CountExact})
	require.Len(t, inTrash.Records, 1)
	require.EqualValues(t, 1, *inTrash.Count)
	require.NotNil(t, inTrash.Records[0].DeletedAt)
	refused(t, restore(2), fault.Stale, "stale")
	require.NoError(t, restore(3))
	got, err = s.read("deals", r.ID)
	require.NoError(t, err)
	require.Equal(t, 4, got.Version)
	require.Nil(t, got.DeletedAt)
	require.NoError(t, trash(4))
	refused(t, purge(4), fault.Stale, "stale")
	require.NoError(t, purge(5))
	refused(t, purge(0), fault.NotFound, "unknown_record")
	require.Empty(t, s.list("deals", crm.ListQuery{Limit: 5, Trash: true, Count: crm.CountNone}).Records)
}

func TestRelations(t *testing.T) {
	s := open(t)
	s.pipeline(crm.NewPipeline{Key: "accounts"})
	account := func(key string) crm.NewField {
		return crm.NewField{Key: key, Type: crm.Relation, Options: crm.Options{Pipeline: "accounts"}}
	}
	s.pipeline(crm.NewPipeline{Key: "deals", Fields: []crm.NewField{account("a"), account("b")}})
	first, second := s.create("accounts", `{}`), s.create("accounts", `{}`)
	deal := s.create("deals", fmt.Sprintf(`{"a": %q, "b": %q}`, first.ID, first.ID))
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.TrashRecord(ctx, q, "accounts", first.ID, 0)
		return err
	})

	patch := func(version int, patch string) error {
		return s.write(func(ctx context.Context, q postgres.Querier) error {
			_, err := crm.PatchRecord(ctx, q, "deals", deal.ID, version, json.RawMessage(patch))
			return err
		})
	}
	for _, field := range []string{"a", "b"} {
		f := refused(t, patch(1, fmt.Sprintf(`{%q: %q}`, field, first.ID)), fault.Unfit, "dangling")
		require.Equal(t, []string{"/" + field + " dangling"}, pointers(f), "what lies in the trash is no target")
	}
	require.NoError(t, patch(1, fmt.Sprintf(`{"a": %q}`, second.ID)), "a relation that is not touched may stay as it was")
	purge := func() error {
		return s.write(func(ctx context.Context, q postgres.Querier) error {
			return crm.PurgeRecord(ctx, q, "accounts", first.ID, 0)
		})
	}
	refused(t, purge(), fault.Conflict, "referenced")
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.TrashRecord(ctx, q, "deals", deal.ID, 0)
		return err
	})
	refused(t, purge(), fault.Conflict, "referenced") // a record in the trash can come back
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.RestoreRecord(ctx, q, "deals", deal.ID, 0)
		return err
	})
	require.NoError(t, patch(4, `{"b": null}`))
	require.NoError(t, purge())
}

// wait polls until ok holds.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(pgtest.Patience); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
		tick := time.NewTimer(2 * time.Millisecond)
		<-tick.C
	}
}
