// Package crm holds a tenant's pipelines, their typed fields, and the records whose values stand in JSONB by field key.
//
// It promises: a record holds only values that fit its fields; a relation points at a record that was there, in the
// pipeline that the field names, when it was written; a change names the version it was made against; deleting moves to
// the trash; and a filter or parameter that is not understood is refused, never dropped. Functions work in a
// transaction that their caller holds and that is bound to the tenant.
package crm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Type is the type of a field's values.
type Type string

const (
	Text     Type = "text"     // a string of at most MaxTextBytes
	Number   Type = "number"   // a JSON number, kept as it is written
	Boolean  Type = "boolean"  // true or false
	Date     Type = "date"     // "2026-11-23"
	Select   Type = "select"   // one of the field's choices
	Relation Type = "relation" // the id of a record of the field's pipeline
)

var types = []Type{Text, Number, Boolean, Date, Select, Relation}

// Bounds of a tenant's pipelines.
const (
	MaxPipelines    = 500
	MaxFields       = 200
	MaxChoices      = 500
	MaxOptionsBytes = 64 << 10 // all choices of a field together
	MaxRecordBytes  = 256 << 10
	MaxTextBytes    = 64 << 10
)

// Options says more about a field of type Select, Relation or Text.
type Options struct {
	Choices  []string `json:"choices,omitempty"`  // of a Select: at least one, each once
	Pipeline string   `json:"pipeline,omitempty"` // of a Relation: the key of the pipeline that it points at
	Personal string   `json:"personal,omitempty"` // of a Text: what it holds of a person (Field.Personal)
}

// Field is one column of a pipeline.
type Field struct {
	ID       uuid.UUID `json:"id"`
	Key      string    `json:"key"` // in a record's data; fixed
	Name     string    `json:"name"`
	Type     Type      `json:"type"` // fixed
	Required bool      `json:"required"`
	Options  Options   `json:"options"`
	Position int       `json:"position"`
}

// Pipeline is one database of a tenant.
type Pipeline struct {
	ID          uuid.UUID       `json:"id"`
	Key         string          `json:"key"` // in addresses; fixed
	Name        string          `json:"name"`
	Description string          `json:"description"`
	Metadata    json.RawMessage `json:"metadata"`
	Fields      []Field         `json:"fields"`
	CreatedAt   time.Time       `json:"created_at"`
	UpdatedAt   time.Time       `json:"updated_at"`
	Version     int             `json:"version"`
}

// NewField is a field to be made.
type NewField struct {
	Key      string  `json:"key"`
	Name     string  `json:"name"` // empty: the key
	Type     Type    `json:"type"`
	Required bool    `json:"required"`
	Options  Options `json:"options"`
}

// NewPipeline is a pipeline to be made.
type NewPipeline struct {
	Key         string          `json:"key"`
	Name        string          `json:"name"` // empty: the key
	Description string          `json:"description"`
	Metadata    json.RawMessage `json:"metadata"`
	Fields      []NewField      `json:"fields"`
}

var keyForm = regexp.MustCompile(`^[a-z][a-z0-9_]{0,47}$`)

// unfit collects what does not fit, so that one answer tells all of it.
type unfit struct{ fields []fault.Field }

func (u *unfit) add(pointer, code, format string, args ...any) {
	u.fields = append(u.fields, fault.Field{Pointer: pointer, Code: code, Detail: fmt.Sprintf(format, args...)})
}

func (u *unfit) err() error {
	if len(u.fields) == 0 {
		return nil
	}
	f := fault.New(fault.Unfit, "%s", u.fields[0].Detail).WithCode(u.fields[0].Code)
	f.Fields = u.fields
	return f
}

func (u *unfit) text(pointer, value string, least, most int) {
	if n := len([]rune(value)); n < least || n > most || strings.ContainsRune(value, 0) {
		u.add(pointer, "length", "must have %d to %d characters and no NUL", least, most)
	}
}

func (u *unfit) object(pointer string, raw json.RawMessage, most int) {
	var o map[string]json.RawMessage
	if len(raw) > most || json.Unmarshal(raw, &o) != nil || o == nil {
		u.add(pointer, "object", "must be a JSON object of at most %d bytes", most)
	}
}

const maxMetadataBytes = 16 << 10

func (u *unfit) field(at string, f *NewField) {
	if !keyForm.MatchString(f.Key) {
		u.add(at+"/key", "key", "a key has lower-case letters, digits and _, begins with a letter and has at most 48 characters")
	}
	if f.Name == "" {
		f.Name = f.Key
	}
	u.text(at+"/name", f.Name, 1, 200)
	if !slices.Contains(types, f.Type) {
		u.add(at+"/type", "type", "the type must be one of text, number, boolean, date, select, relation")
	}
	u.options(at+"/options", f.Type, f.Options)
}

func (u *unfit) options(at string, t Type, o Options) {
	switch {
	case t == Select && (len(o.Choices) == 0 || len(o.Choices) > MaxChoices):
		u.add(at+"/choices", "choices", "a select needs 1 to %d choices", MaxChoices)
	case t != Select && len(o.Choices) > 0:
		u.add(at+"/choices", "choices", "only a select has choices")
	case t == Relation && !keyForm.MatchString(o.Pipeline):
		u.add(at+"/pipeline", "pipeline", "a relation needs the key of the pipeline that it points at")
	case t != Relation && o.Pipeline != "":
		u.add(at+"/pipeline", "pipeline", "only a relation names a pipeline")
	}
	switch {
	case t != Text && o.Personal != "":
		u.add(at+"/personal", "personal", "only a text says what it holds of a person")
	case o.Personal != "" && !slices.Contains(personal, o.Personal):
		u.add(at+"/personal", "personal", "what a text holds of a person is one of %s", strings.Join(personal, ", "))
	}
	seen, size := map[string]bool{}, 0
	for i, c := range o.Choices {
		size += len(c)
		u.text(fmt.Sprintf("%s/choices/%d", at, i), c, 1, 200)
		if seen[c] {
			u.add(fmt.Sprintf("%s/choices/%d", at, i), "duplicate", "the choice stands twice")
		}
		seen[c] = true
	}
	if size > MaxOptionsBytes {
		u.add(at+"/choices", "too_large", "the choices of a field together have at most %d bytes", MaxOptionsBytes)
	}
}

const pipelineColumns = `id, key, name, description, metadata, created_at, updated_at, version`

func scanPipeline(row pgx.Row) (Pipeline, error) {
	p := Pipeline{Fields: []Field{}}
	err := row.Scan(&p.ID, &p.Key, &p.Name, &p.Description, &p.Metadata, &p.CreatedAt, &p.UpdatedAt, &p.Version)
	return p, err
}

func unknownPipeline(key string) error {
	if len(key) > 80 {
		key = key[:80]
	}
	return fault.New(fault.NotFound, "there is no pipeline %q", key).WithCode("unknown_pipeline")
}

// CreatePipeline makes a pipeline with its fields. Conflict: the key is taken, or the tenant has MaxPipelines already. Unfit: something does not fit, with
// pointers; a relation may point at the pipeline itself.
func CreatePipeline(ctx context.Context, q postgres.Querier, n NewPipeline) (Pipeline, error) {
	var u unfit
	if !keyForm.MatchString(n.Key) {
		u.add("/key", "key", "a key has lower-case letters, digits and _, begins with a letter and has at most 48 characters")
	}
	if n.Name == "" {
		n.Name = n.Key
	}
	u.text("/name", n.Name, 1, 200)
	u.text("/description", n.Description, 0, 2000)
	if len(n.Metadata) == 0 {
		n.Metadata = json.RawMessage(`{}`)
	}
	u.object("/metadata", n.Metadata, maxMetadataBytes)
	if len(n.Fields) > MaxFields {
		u.add("/fields", "too_many", "a pipeline has at most %d fields", MaxFields)
		return Pipeline{}, u.err()
	}
	seen := map[string]bool{}
	for i := range n.Fields {
		at := fmt.Sprintf("/fields/%d", i)
		u.field(at, &n.Fields[i])
		if seen[n.Fields[i].Key] {
			u.add(at+"/key", "duplicate", "the key stands twice")
		}
		seen[n.Fields[i].Key] = true
	}
	if err := u.err(); err != nil {
		return Pipeline{}, err
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Pipeline{}, err
	}
	// Callers at the same moment do not see each other's and may go past the bound by as many as they are: it is there for
	// the size of the list, which that does not change.
	const insert = `insert into pipelines (id, key, name, description, metadata)
select $1, $2, $3, $4, $5 where $6 > (select count(*) from pipelines) returning ` + pipelineColumns
	p, err := scanPipeline(q.QueryRow(ctx, insert, id, n.Key, n.Name, n.Description, n.Metadata, MaxPipelines))
	if errors.Is(err, pgx.ErrNoRows) {
		return p, fault.New(fault.Conflict, "a tenant has at most %d pipelines", MaxPipelines).WithCode("too_many_pipelines")
	}
	if postgres.SQLState(err) == "23505" {
		return p, fault.Wrap(err, fault.Conflict, "a pipeline with the key %s exists already", n.Key).WithCode("pipeline_exists")
	}
	if err != nil {
		return p, err
	}
	for i, f := range n.Fields {
		made, err := addField(ctx, q, p, f, i, fmt.Sprintf("/fields/%d", i))
		if err != nil {
			return p, err
		}
		p.Fields = append(p.Fields, made)
	}
	return p, nil
}

// Pipelines lists all pipelines with their fields, by key.
func Pipelines(ctx context.Context, q postgres.Querier) ([]Pipeline, error) {
	rows, err := q.Query(ctx, `select `+pipelineColumns+` from pipelines order by key`)
	if err != nil {
		return nil, err
	}
	ps, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Pipeline, error) { return scanPipeline(row) })
	if err != nil {
		return nil, err
	}
	const all = `select f.pipeline_id, f.id, f.key, f.name, f.type, f.required, f.options, f.position from fields f order by f.pipeline_id, f.position, f.id`
	if rows, err = q.Query(ctx, all); err != nil {
		return nil, err
	}
	byID := map[uuid.UUID]*Pipeline{}
	for i := range ps {
		byID[ps[i].ID] = &ps[i]
	}
	var owner uuid.UUID
	var f Field
	_, err = pgx.ForEachRow(rows, []any{&owner, &f.ID, &f.Key, &f.Name, &f.Type, &f.Required, &f.Options, &f.Position}, func() error {
		if p := byID[owner]; p != nil {
			p.Fields = append(p.Fields, f)
		}
		f = Field{}
		return nil
	})
	return ps, err
}

// PipelineByKey finds a pipeline with its fields. NotFound.
func PipelineByKey(ctx context.Context, q postgres.Querier, key string) (Pipeline, error) {
	return pipeline(ctx, q, key, "")
}

// pipeline reads a pipeline, with lock ("for share", "for update") held until the transaction ends.
func pipeline(ctx context.Context, q postgres.Querier, key, lock string) (Pipeline, error) {
	if !keyForm.MatchString(key) {
		return Pipeline{}, unknownPipeline(key)
	}
	p, err := scanPipeline(q.QueryRow(ctx, `select `+pipelineColumns+` from pipelines where key = $1 `+lock, key))
	if errors.Is(err, pgx.ErrNoRows) {
		return p, unknownPipeline(key)
	}
	if err != nil {
		return p, err
	}
	const fields = `select id, key, name, type, required, options, position from fields where pipeline_id = $1 order by position, id`
	rows, err := q.Query(ctx, fields, p.ID)
	if err != nil {
		return p, err
	}
	p.Fields, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (Field, error) {
		var f Field
		return f, row.Scan(&f.ID, &f.Key, &f.Name, &f.Type, &f.Required, &f.Options, &f.Position)
	})
	return p, err
}

// PipelineChange says what of a pipeline is to change; nil stays.
type PipelineChange struct {
	Name        *string         `json:"name"`
	Description *string         `json:"description"`
	Metadata    json.RawMessage `json:"metadata"` // a merge patch
}

// UpdatePipeline changes a pipeline that is still at the version. Stale: it is not.
func UpdatePipeline(ctx context.Context, q postgres.Querier, key string, version int, c PipelineChange) (Pipeline, error) {
	p, err := pipeline(ctx, q, key, "for update")
	if err != nil {
		return p, err
	}
	if p.Version != version {
		return p, stale(p)
	}
	if c.Name != nil {
		p.Name = *c.Name
	}
	if c.Description != nil {
		p.Description = *c.Description
	}
	if len(c.Metadata) > 0 {
		if p.Metadata, err = MergePatch(p.Metadata, c.Metadata); err != nil {
			return p, err
		}
	}
	var u unfit
	u.text("/name", p.Name, 1, 200)
	u.text("/description", p.Description, 0, 2000)
	u.object("/metadata", p.Metadata, maxMetadataBytes)
	if err := u.err(); err != nil {
		return p, err
	}
	const update = `update pipelines set name = $2, description = $3, metadata = $4, version = version + 1, updated_at = now()
where id = $1 returning ` + pipelineColumns
	fields := p.Fields
	p, err = scanPipeline(q.QueryRow(ctx, update, p.ID, p.Name, p.Description, p.Metadata))
	p.Fields = fields
	return p, err
}

// changing reads a pipeline that is to change, held until the transaction ends. With a version above 0 it must still be at
// it (Stale).
func changing(ctx context.Context, q postgres.Querier, key string, version int) (Pipeline, error) {
	p, err := pipeline(ctx, q, key, "for update")
	if err == nil && version > 0 && p.Version != version {
		err = stale(p)
	}
	return p, err
}

func stale(current any) error {
	return fault.New(fault.Stale, "it was changed in between").WithCode("stale").WithDetails(map[string]any{"current": current})
}

// DeletePipeline removes an empty pipeline with its fields. Conflict: it has records, also in the trash, or a relation
// points at it. With a version above 0 it must still be at it (Stale).
func DeletePipeline(ctx context.Context, q postgres.Querier, key string, version int) error {
	p, err := changing(ctx, q, key, version)
	if err != nil {
		return err
	}
	var records, pointed bool
	const used = `select exists (select from records where pipeline_id = $1),
	exists (select from fields where type = 'relation' and options ->> 'pipeline' = $2 and pipeline_id <> $1)`
	if err := q.QueryRow(ctx, used, p.ID, p.Key).Scan(&records, &pointed); err != nil {
		return err
	}
	if records {
		return fault.New(fault.Conflict, "the pipeline has records").WithCode("not_empty").WithHint("delete and purge them first")
	}
	if pointed {
		return fault.New(fault.Conflict, "a relation of another pipeline points at this one").WithCode("referenced")
	}
	_, err = q.Exec(ctx, `delete from pipelines where id = $1`, p.ID)
	return err
}

// AddField adds a field to a pipeline. A required one holds for records that are written from now on. With a version
// above 0 the pipeline must still be at it (Stale).
func AddField(ctx context.Context, q postgres.Querier, key string, version int, n NewField) (Field, error) {
	var u unfit
	u.field("", &n)
	if err := u.err(); err != nil {
		return Field{}, err
	}
	p, err := changing(ctx, q, key, version)
	if err != nil {
		return Field{}, err
	}
	if len(p.Fields) >= MaxFields {
		return Field{}, fault.New(fault.Conflict, "a pipeline has at most %d fields", MaxFields).WithCode("too_many")
	}
	last := 0
	for _, f := range p.Fields {
		last = max(last, f.Position+1)
	}
	f, err := addField(ctx, q, p, n, last, "")
	if err != nil {
		return f, err
	}
	return f, touchPipeline(ctx, q, p.ID)
}

func touchPipeline(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
	_, err := q.Exec(ctx, `update pipelines set version = version + 1, updated_at = now() where id = $1`, id)
	return err
}

func addField(ctx context.Context, q postgres.Querier, p Pipeline, n NewField, position int, at string) (Field, error) {
	if n.Type == Relation && n.Options.Pipeline != p.Key {
		// Locked, so that it is not deleted until the field is there.
		const target = `select key from pipelines where key = $1 for key share`
		err := q.QueryRow(ctx, target, n.Options.Pipeline).Scan(&n.Options.Pipeline)
		if errors.Is(err, pgx.ErrNoRows) {
			var u unfit
			u.add(at+"/options/pipeline", "unknown_pipeline", "there is no pipeline %q", n.Options.Pipeline)
			return Field{}, u.err()
		}
		if err != nil {
			return Field{}, err
		}
	}
	id, err := uuid.NewV7()
	if err != nil {
		return Field{}, err
	}
	options, err := json.Marshal(n.Options)
	if err != nil {
		return Field{}, fmt.Errorf("write options: %w", err)
	}
	const insert = `insert into fields (id, pipeline_id, key, name, type, required, options, position) values ($1, $2, $3, $4, $5, $6, $7, $8)`
	if _, err := q.Exec(ctx, insert, id, p.ID, n.Key, n.Name, string(n.Type), n.Required, options, position); err != nil {
		if postgres.SQLState(err) == "23505" {
			return Field{}, fault.Wrap(err, fault.Conflict, "a field with the key %s exists already", n.Key).WithCode("field_exists")
		}
		return Field{}, err
	}
	return Field{ID: id, Key: n.Key, Name: n.Name, Type: n.Type, Required: n.Required, Options: n.Options, Position: position}, nil
}

const maxPosition = 100_000

// FieldChange says what of a field is to change; nil stays. Key and type are fixed.
type FieldChange struct {
	Name     *string  `json:"name"`
	Required *bool    `json:"required"`
	Options  *Options `json:"options"`
	Position *int     `json:"position"`
}

// UpdateField changes a field. Conflict: a choice that records use would go. With a version above 0 the pipeline must
// still be at it (Stale).
func UpdateField(ctx context.Context, q postgres.Querier, key, field string, version int, c FieldChange) (Field, error) {
	p, err := changing(ctx, q, key, version)
	if err != nil {
		return Field{}, err
	}
	f, ok := p.field(field)
	if !ok {
		return Field{}, unknownField(field)
	}
	if c.Name != nil {
		f.Name = *c.Name
	}
	if c.Required != nil {
		f.Required = *c.Required
	}
	if c.Position != nil {
		f.Position = *c.Position
	}
	var u unfit
	u.text("/name", f.Name, 1, 200)
	if f.Position < 0 || f.Position > maxPosition {
		u.add("/position", "position", "the position must be from 0 to %d", maxPosition)
	}
	if c.Options != nil {
		u.options("/options", f.Type, *c.Options)
		if f.Type == Relation && c.Options.Pipeline != f.Options.Pipeline {
			u.add("/options/pipeline", "fixed", "a relation keeps the pipeline that it points at")
		}
	}
	if err := u.err(); err != nil {
		return f, err
	}
	if c.Options != nil {
		for _, choice := range f.Options.Choices {
			if slices.Contains(c.Options.Choices, choice) {
				continue
			}
			probe, err := json.Marshal(map[string]string{f.Key: choice})
			if err != nil {
				return f, fmt.Errorf("write a choice: %w", err)
			}
			var used bool
			const query = `select exists (select from records where pipeline_id = $1 and data @> $2)`
			if err := q.QueryRow(ctx, query, p.ID, probe).Scan(&used); err != nil {
				return f, err
			}
			if used {
				return f, fault.New(fault.Conflict, "records use the choice %q", choice).WithCode("choice_used")
			}
		}
		f.Options = *c.Options
	}
	options, err := json.Marshal(f.Options)
	if err != nil {
		return f, fmt.Errorf("write options: %w", err)
	}
	const update = `update fields set name = $2, required = $3, options = $4, position = $5 where id = $1`
	if _, err := q.Exec(ctx, update, f.ID, f.Name, f.Required, options, f.Position); err != nil {
		return f, err
	}
	return f, touchPipeline(ctx, q, p.ID)
}

// RemoveField removes a field. Conflict: records have a value in it. With a version above 0 the pipeline must still be at
// it (Stale).
func RemoveField(ctx context.Context, q postgres.Querier, key, field string, version int) error {
	p, err := changing(ctx, q, key, version)
	if err != nil {
		return err
	}
	f, ok := p.field(field)
	if !ok {
		return unknownField(field)
	}
	var used bool
	if err := q.QueryRow(ctx, `select exists (select from records where pipeline_id = $1 and data ? $2)`, p.ID, f.Key).Scan(&used); err != nil {
		return err
	}
	if used {
		return fault.New(fault.Conflict, "records have values in this field").WithCode("field_used").WithHint("set them to null first")
	}
	if _, err := q.Exec(ctx, `delete from fields where id = $1`, f.ID); err != nil {
		return err
	}
	return touchPipeline(ctx, q, p.ID)
}

func (p Pipeline) field(key string) (Field, bool) {
	i := slices.IndexFunc(p.Fields, func(f Field) bool { return f.Key == key })
	if i < 0 {
		return Field{}, false
	}
	return p.Fields[i], true
}

func unknownField(key string) error {
	if len(key) > 80 {
		key = key[:80]
	}
	return fault.New(fault.NotFound, "there is no field %q", key).WithCode("unknown_field")
}
