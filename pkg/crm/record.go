package crm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Record is one row of a pipeline.
type Record struct {
	ID        uuid.UUID       `json:"id"`
	Data      json.RawMessage `json:"data"`
	Version   int             `json:"version"`
	CreatedBy *uuid.UUID      `json:"created_by,omitempty"`
	CreatedAt time.Time       `json:"created_at"`
	UpdatedAt time.Time       `json:"updated_at"`
	DeletedAt *time.Time      `json:"deleted_at,omitempty"`
}

const recordColumns = `r.id, r.data, r.version, r.created_by, r.created_at, r.updated_at, r.deleted_at`

func scanRecord(row pgx.Row) (Record, error) {
	var r Record
	return r, row.Scan(&r.ID, &r.Data, &r.Version, &r.CreatedBy, &r.CreatedAt, &r.UpdatedAt, &r.DeletedAt)
}

func unknownRecord() error {
	return fault.New(fault.NotFound, "there is no such record").WithCode("unknown_record")
}

// RecordByID reads a record that is not in the trash, in one statement. NotFound, also for an unknown pipeline.
func RecordByID(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID) (Record, error) {
	if !keyForm.MatchString(pipelineKey) {
		return Record{}, unknownRecord()
	}
	const byID = `select ` + recordColumns + ` from records r join pipelines p on p.id = r.pipeline_id
where r.id = $2 and p.key = $1 and r.deleted_at is null`
	r, err := scanRecord(q.QueryRow(ctx, byID, pipelineKey, id))
	if errors.Is(err, pgx.ErrNoRows) {
		return r, unknownRecord()
	}
	return r, err
}

// CreateRecord adds a record. by is the user, or uuid.Nil. Unfit: values do not fit, with pointers.
func CreateRecord(ctx context.Context, q postgres.Querier, pipelineKey string, data json.RawMessage, by uuid.UUID) (Record, error) {
	rs, err := CreateRecords(ctx, q, pipelineKey, []json.RawMessage{data}, by)
	if err != nil {
		var f *fault.Fault
		if errors.As(err, &f) { // of one record the pointers need no number
			for i := range f.Fields {
				f.Fields[i].Pointer = strings.TrimPrefix(f.Fields[i].Pointer, "/0")
			}
		}
		return Record{}, err
	}
	return rs[0], nil
}

// CreateRecords adds records in one statement: all or none. It returns them in the order given, in which their ids
// ascend. null says the same as leaving a value out. How many records it takes at once is the caller's to bound.
func CreateRecords(ctx context.Context, q postgres.Querier, pipelineKey string, data []json.RawMessage, by uuid.UUID) ([]Record, error) {
	// Shared, so that the fields stay as they are until the records are written.
	p, err := pipeline(ctx, q, pipelineKey, "for share")
	if err != nil {
		return nil, err
	}
	var u unfit
	var l links
	ids, bodies := make([]uuid.UUID, len(data)), make([][]byte, len(data))
	for i, raw := range data {
		values, err := object(raw)
		if err != nil {
			u.add(fmt.Sprintf("/%d/data", i), "object", "data must be a JSON object")
			continue
		}
		at := fmt.Sprintf("/%d/data", i)
		p.unset(&u, at, values)
		if bodies[i], err = p.body(&u, &l, at, values); err != nil {
			return nil, err
		}
		if ids[i], err = uuid.NewV7(); err != nil {
			return nil, err
		}
	}
	if err := u.err(); err != nil {
		return nil, err
	}
	if err := l.check(ctx, q); err != nil {
		return nil, err
	}
	const insert = `insert into records as r (id, pipeline_id, data, created_by)
select i, $2, d, nullif($4, '00000000-0000-0000-0000-000000000000'::uuid) from unnest($1::uuid[], $3::jsonb[]) as n (i, d) returning ` + recordColumns
	rows, err := q.Query(ctx, insert, ids, p.ID, bodies, by)
	if err != nil {
		return nil, err
	}
	made, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Record, error) { return scanRecord(row) })
	slices.SortFunc(made, func(a, b Record) int { return bytes.Compare(a.ID[:], b.ID[:]) })
	return made, err
}

// unset takes the values out that are null, which says: no value. Their fields must be there all the same.
func (p Pipeline) unset(u *unfit, at string, values map[string]any) {
	for _, k := range slices.Sorted(maps.Keys(values)) {
		if values[k] != nil {
			continue
		}
		if _, ok := p.field(k); ok {
			delete(values, k) // an unknown one is told by check
		}
	}
}

// body checks a record's values and writes them as they are stored.
func (p Pipeline) body(u *unfit, l *links, at string, values map[string]any) ([]byte, error) {
	p.check(u, l, at, values)
	body, err := encode(values)
	if err != nil {
		return nil, fmt.Errorf("write a record: %w", err)
	}
	if len(body) > MaxRecordBytes {
		u.add(at, "too_large", "a record has at most %d bytes", MaxRecordBytes)
	}
	return body, nil
}

// encode writes JSON without the escapes that HTML would need: they would count towards the bounds.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// PatchRecord applies a merge patch (RFC 7396) to the data of a record that is still at the version. Stale: it is not;
// Details then holds the current record and the fields of the patch that differ from it. No version but the current one
// is kept, so changes of different fields are not merged: whoever asked does it, having both. What the patch does not
// touch is held to the fields as they are now: a field that has become required must be given a value.
func PatchRecord(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID, version int, patch json.RawMessage) (Record, error) {
	changes, err := object(patch)
	if err != nil {
		return Record{}, fault.New(fault.Unfit, "the patch must be a JSON object").WithCode("object")
	}
	p, err := pipeline(ctx, q, pipelineKey, "for share")
	if err != nil {
		return Record{}, err
	}
	// Not "for update": a record that points at this one may be written meanwhile, and two that point at each other do
	// not wait for each other.
	r, err := lockRecord(ctx, q, p.ID, id, false, "for no key update")
	if err != nil {
		return r, err
	}
	values, err := object(r.Data)
	if err != nil {
		return r, fmt.Errorf("read a record: %w", err)
	}
	if r.Version != version {
		return r, conflict(r, values, changes)
	}
	maps.Copy(values, changes) // values are scalars: merging is setting and removing
	var u unfit
	var l links
	p.unset(&u, "", values)
	body, err := p.body(&u, &l, "", values)
	if err != nil {
		return r, err
	}
	if err := u.err(); err != nil {
		return r, err
	}
	if err := l.only(changes).check(ctx, q); err != nil {
		return r, err
	}
	const update = `update records r set data = $2, version = version + 1, updated_at = now() where id = $1 returning ` + recordColumns
	return scanRecord(q.QueryRow(ctx, update, id, body))
}

func conflict(current Record, values, changes map[string]any) error {
	differing := []string{}
	for k, v := range changes {
		a, _ := json.Marshal(v)
		b, _ := json.Marshal(values[k])
		if !bytes.Equal(a, b) {
			differing = append(differing, k)
		}
	}
	slices.Sort(differing)
	return fault.New(fault.Stale, "the record was changed in between").WithCode("stale").
		WithDetails(map[string]any{"current": current, "conflicting_fields": differing})
}

// lockRecord reads a record that is in the trash or is not, with a lock ("for update") held until the transaction ends.
func lockRecord(ctx context.Context, q postgres.Querier, pipelineID, id uuid.UUID, trash bool, lock string) (Record, error) {
	const byID = `select ` + recordColumns + ` from records r where r.id = $1 and r.pipeline_id = $2 and (r.deleted_at is not null) = $3 `
	r, err := scanRecord(q.QueryRow(ctx, byID+lock, id, pipelineID, trash))
	if errors.Is(err, pgx.ErrNoRows) {
		return r, unknownRecord()
	}
	return r, err
}

// TrashRecord moves a record to the trash, from which it is no target for new relations; those that point at it stay.
// With a version above 0 it must still be at it (Stale).
func TrashRecord(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID, version int) (Record, error) {
	return setTrash(ctx, q, pipelineKey, id, version, false,
		`update records r set deleted_at = now(), version = version + 1, updated_at = now() where id = $1 returning `+recordColumns)
}

// RestoreRecord takes a record out of the trash. With a version above 0 it must still be at it (Stale).
func RestoreRecord(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID, version int) (Record, error) {
	return setTrash(ctx, q, pipelineKey, id, version, true,
		`update records r set deleted_at = null, version = version + 1, updated_at = now() where id = $1 returning `+recordColumns)
}

func setTrash(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID, version int, trash bool, sql string) (Record, error) {
	p, err := pipeline(ctx, q, pipelineKey, "")
	if err != nil {
		return Record{}, err
	}
	r, err := lockRecord(ctx, q, p.ID, id, trash, "for update")
	if err != nil {
		return r, err
	}
	if version > 0 && r.Version != version {
		return r, stale(r)
	}
	return scanRecord(q.QueryRow(ctx, sql, id))
}

// PurgeRecord destroys a record that is in the trash. Conflict: another record points at it. With a version above 0 it
// must still be at it (Stale).
func PurgeRecord(ctx context.Context, q postgres.Querier, pipelineKey string, id uuid.UUID, version int) error {
	p, err := pipeline(ctx, q, pipelineKey, "")
	if err != nil {
		return err
	}
	r, err := lockRecord(ctx, q, p.ID, id, true, "for update")
	if err != nil {
		return err
	}
	if version > 0 && r.Version != version {
		return stale(r)
	}
	const relations = `select f.pipeline_id, f.key from fields f where f.type = 'relation' and f.options ->> 'pipeline' = $1`
	rows, err := q.Query(ctx, relations, p.Key)
	if err != nil {
		return err
	}
	type relation struct {
		pipeline uuid.UUID
		probe    []byte
	}
	pointing, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (relation, error) {
		var r relation
		var key string
		if err := row.Scan(&r.pipeline, &key); err != nil {
			return r, err
		}
		r.probe, err = json.Marshal(map[string]string{key: id.String()})
		return r, err
	})
	if err != nil {
		return err
	}
	for _, r := range pointing {
		var used bool
		if err := q.QueryRow(ctx, `select exists (select from records where pipeline_id = $1 and data @> $2)`, r.pipeline, r.probe).Scan(&used); err != nil {
			return err
		}
		if used {
			return fault.New(fault.Conflict, "another record points at this one").WithCode("referenced")
		}
	}
	_, err = q.Exec(ctx, `delete from records where id = $1`, id)
	return err
}

// object reads a JSON object whose numbers stay as they are written.
func object(raw json.RawMessage) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	var o map[string]any
	if err := d.Decode(&o); err != nil {
		return nil, err
	}
	if o == nil {
		return nil, errors.New("not an object")
	}
	if d.More() {
		return nil, errors.New("more than an object")
	}
	return o, nil
}

// check holds a record's values against the fields, and collects its relations.
func (p Pipeline) check(u *unfit, l *links, at string, values map[string]any) {
	for _, k := range slices.Sorted(maps.Keys(values)) { // so that the answer is the same each time
		pointer := at + "/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(k)
		f, ok := p.field(k)
		if !ok {
			u.add(pointer, "unknown_field", "the pipeline %s has no field %q", p.Key, clipText(k))
			continue
		}
		f.check(u, l, pointer, values[k])
	}
	for _, f := range p.Fields {
		if _, ok := values[f.Key]; f.Required && !ok {
			u.add(at+"/"+f.Key, "required", "the field %s needs a value", f.Key)
		}
	}
}

func (f Field) check(u *unfit, l *links, pointer string, value any) {
	s, isText := value.(string)
	switch f.Type {
	case Text:
		if !isText || len(s) > MaxTextBytes || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			u.add(pointer, "text", "must be a text of at most %d bytes without NUL", MaxTextBytes)
		}
	case Number:
		n, ok := value.(json.Number)
		if !ok || !fitsNumber(n) {
			u.add(pointer, "number", "must be a number of at most %d characters and an exponent below 1000", maxNumberChars)
		}
	case Boolean:
		if _, ok := value.(bool); !ok {
			u.add(pointer, "boolean", "must be true or false")
		}
	case Date:
		if _, err := time.Parse(time.DateOnly, s); !isText || err != nil {
			u.add(pointer, "date", "must be a date such as 2026-11-23")
		}
	case Select:
		if !isText || !slices.Contains(f.Options.Choices, s) {
			u.add(pointer, "choice", "must be one of: %s", strings.Join(f.Options.Choices[:min(10, len(f.Options.Choices))], ", "))
		}
	case Relation:
		id, err := uuid.Parse(s)
		if !isText || err != nil || id.String() != s {
			u.add(pointer, "relation", "must be the id of a record of %s", f.Options.Pipeline)
			return
		}
		*l = append(*l, link{f.Key, f.Options.Pipeline, id, pointer})
	}
}

// link is a value that points at a record.
type link struct {
	field, pipeline string // the key of the field, and of the pipeline that it points at
	id              uuid.UUID
	pointer         string
}

type links []link

// only keeps the links that a patch sets: what stood there before was checked when it was written.
func (l links) only(changes map[string]any) links {
	return slices.DeleteFunc(l, func(l link) bool { _, set := changes[l.field]; return !set })
}

// check holds, in one statement, that every link points at a record that is there and not in the trash, and keeps it
// from being purged until the transaction ends.
func (l links) check(ctx context.Context, q postgres.Querier) error {
	if len(l) == 0 {
		return nil
	}
	ids := make([]uuid.UUID, 0, len(l))
	seen := make(map[uuid.UUID]bool, len(l))
	for _, to := range l {
		if !seen[to.id] {
			seen[to.id] = true
			ids = append(ids, to.id)
		}
	}
	// Ordered, so that everybody takes the locks in one order.
	const live = `select p.key, r.id from records r join pipelines p on p.id = r.pipeline_id
where r.id = any($1) and r.deleted_at is null order by r.id for key share of r`
	rows, err := q.Query(ctx, live, ids)
	if err != nil {
		return err
	}
	in := make(map[uuid.UUID]string, len(ids))
	var key string
	var id uuid.UUID
	if _, err := pgx.ForEachRow(rows, []any{&key, &id}, func() error { in[id] = key; return nil }); err != nil {
		return err
	}
	var u unfit
	for _, to := range l {
		if in[to.id] != to.pipeline {
			u.add(to.pointer, "dangling", "%s has no record %s", to.pipeline, to.id)
		}
	}
	return u.err()
}

// MergePatch applies a merge patch (RFC 7396) to a JSON object. Numbers stay as they are written.
func MergePatch(target, patch json.RawMessage) (json.RawMessage, error) {
	t, err := object(target)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unfit, "the value is not a JSON object").WithCode("object")
	}
	p, err := object(patch)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unfit, "the patch must be a JSON object").WithCode("object")
	}
	out, err := encode(merge(t, p))
	if err != nil {
		return nil, fmt.Errorf("write the merged object: %w", err)
	}
	return out, nil
}

func merge(target, patch map[string]any) map[string]any {
	if target == nil {
		target = map[string]any{}
	}
	for k, v := range patch {
		switch v := v.(type) {
		case nil:
			delete(target, k)
		case map[string]any:
			inner, _ := target[k].(map[string]any)
			target[k] = merge(inner, v)
		default:
			target[k] = v
		}
	}
	return target
}
