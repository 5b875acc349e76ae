// Package structure knows what a tenant's schema is made of: it describes every object of many schemas in one query over
// the catalog, compares them with a reference made from the migrations, and writes the statements that bring one to the
// other.
//
// It promises: two schemas of one version have the same description, whatever they are called, and nothing that
// PostgreSQL enforces or plans by is left out of it: tables, columns, defaults, constraints, indexes, triggers,
// functions, views, sequences, types, policies, owners, grants, storage. Left out are the order of columns, comments,
// what the rows hold, publications and security labels. Reading changes nothing, a reference leaves nothing behind,
// and nobody but a person runs the statements. What it needs is the owner's login.
//
// Known fault: an object that is called like one of pg_catalog's own of the same kind (a type "point") is qualified
// where another object refers to it, so that it seems to differ. Migrations cannot refer to it unqualified either.
package structure

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Schema names what is to be described: a schema, and the role whose grants in it are the tenant's own.
type Schema struct {
	Name string
	Role string
}

// Structure describes one schema, relative to its name and role. The zero Structure describes no schema.
type Structure struct {
	objects []object // sorted by kind and name
	owner   string   // the role that read it
	hash    string
}

// object is one thing in a schema: its name in parts and its attributes, each as name=value, in the order of the query.
type object struct {
	kind       string
	name       string
	attributes string
	ord        uint32
}

// Words is the version of the words in which structures are described. Whoever changes the description raises it: a hash that was
// kept, in an archive, is compared with one of the same words only.
const Words = 1

// Hash is a fingerprint of the structure: 64 hex digits. It holds for one major version of PostgreSQL, whose words the
// description uses, and for one version of Words.
func (s Structure) Hash() string { return s.hash }

// IsZero reports whether s describes no schema at all. An empty schema is described.
func (s Structure) IsZero() bool { return len(s.objects) == 0 }

// Lines are the description as text, one line an object, sorted: for people and for tests.
func (s Structure) Lines() []string {
	all := make([]string, len(s.objects))
	for i, o := range s.objects {
		all[i] = o.kind + " " + shown(o.name) + ": " + shown(strings.ReplaceAll(o.attributes, apart, "; "))
	}
	slices.Sort(all)
	return all
}

// Part is one thing that a table is made of.
type Part struct {
	Kind string // table for the table itself, column, constraint, index, trigger, rule or policy
	Name string // of the part; empty for the table itself
	Text string // its description, for comparing
}

// Parts lists what a table, a partition or a foreign table is made of; nothing where there is none of that name.
func (s Structure) Parts(table string) []Part {
	var parts []Part
	for _, o := range s.objects {
		if o.kind == "table" && o.name == table {
			parts = append(parts, Part{o.kind, "", o.attributes})
			continue
		}
		switch o.kind {
		case "column", "constraint", "index", "trigger", "rule", "policy":
			if of, name, _ := strings.Cut(o.name, apart); of == table {
				parts = append(parts, Part{o.kind, name, o.attributes})
			}
		}
	}
	return parts
}

// IsForeignKey reports whether the part is a constraint of that kind.
func (p Part) IsForeignKey() bool {
	return p.Kind == "constraint" && strings.HasPrefix(p.Text, "definition=FOREIGN KEY")
}

// Read describes one schema. NotFound: there is none of this name. It must run inside a transaction, whose search path
// it leaves empty. While the schema is being changed it may fail with XX000.
func Read(ctx context.Context, q postgres.Querier, schema Schema) (Structure, error) {
	found, err := read(ctx, q, []int32{0}, []Schema{schema})
	if err != nil {
		return Structure{}, err
	}
	s, there := found[0]
	if !there {
		return s, fault.New(fault.NotFound, "there is no schema %q", schema.Name).WithCode("schema_missing")
	}
	return s, nil
}

// Fingerprint is one hash of the structure in which a tenant stands: equal for equal structures, whatever tenant it is.
// NotFound: its schema is gone, or was made again behind oneo's back.
func Fingerprint(ctx context.Context, db *postgres.DB, t tenant.Tenant) (hash string, err error) {
	err = retry(ctx, func() error {
		return db.AsOwner(ctx, t.Group, func(tx *postgres.OwnerTx) error {
			at, err := placed(ctx, tx, []int32{t.Number})
			if err != nil {
				return err
			}
			if len(at) == 0 || at[0].missing {
				return fault.New(fault.NotFound, "the tenant's schema is not where the registry says").
					WithCode("schema_missing").WithTenant(t.Slug.String())
			}
			s, err := Read(ctx, tx, at[0].Schema)
			hash = s.Hash()
			return err
		})
	})
	return hash, err
}

// Empty is the SQL that makes a tenant's schema as it is before its first migration: with the rights of its role, and
// the search path bound to it until the transaction ends.
func Empty(s Schema) string {
	schema, role := postgres.Quote(s.Name), postgres.Quote(s.Role)
	// Default privileges before the tables: a grant on all tables afterwards would scan all of pg_class.
	return "create schema " + schema + ";\nset local search_path to " + schema + ", ext, pg_temp;\n" +
		"grant usage on schema " + schema + " to " + role + ";\n" +
		"alter default privileges in schema " + schema + " grant select, insert, update, delete on tables to " + role + ";\n" +
		"alter default privileges in schema " + schema + " grant usage, select on sequences to " + role + ";\n"
}

// read describes many schemas in one query, by their keys. What is not there is not in the answer.
func read(ctx context.Context, q postgres.Querier, keys []int32, schemas []Schema) (map[int32]Structure, error) {
	return readBy(ctx, q, linesOf(len(schemas)), keys, schemas)
}

func readBy(ctx context.Context, q postgres.Querier, lines string, keys []int32, schemas []Schema) (map[int32]Structure, error) {
	found := map[int32]Structure{}
	var owner string
	if err := q.QueryRow(ctx, `select current_user::text`).Scan(&owner); err != nil {
		return nil, err
	}
	var key int32
	var o object
	err := query(ctx, q, lines, keys, schemas, []any{&key, &o.kind, &o.name, &o.ord, &o.attributes}, func() {
		s := found[key]
		s.owner, s.objects = owner, append(s.objects, o)
		found[key] = s
	})
	for key, s := range found {
		slices.SortFunc(s.objects, func(a, b object) int {
			return cmp.Or(strings.Compare(a.kind, b.kind), strings.Compare(a.name, b.name))
		})
		s.hash = hashOf(s.objects)
		found[key] = s
	}
	return found, err
}

// hashOf is what hashesOf computes in the database.
func hashOf(sorted []object) string {
	all := make([]string, len(sorted))
	for i, o := range sorted {
		all[i] = o.kind + "\x1e" + o.name + "\x1e" + o.attributes
	}
	sum := sha256.Sum256([]byte(strings.Join(all, "\n")))
	return hex.EncodeToString(sum[:])
}

// hash gives the hash of many schemas in one query, by their keys. What is not there is not in the answer.
func hash(ctx context.Context, q postgres.Querier, keys []int32, schemas []Schema) (map[int32]string, error) {
	found := make(map[int32]string, len(keys))
	var key int32
	var h string
	return found, query(ctx, q, hashesOf(len(schemas)), keys, schemas, []any{&key, &h}, func() { found[key] = h })
}

func query(ctx context.Context, q postgres.Querier, sql string, keys []int32, schemas []Schema, into []any, each func()) error {
	names, roles := make([]string, len(schemas)), make([]string, len(schemas))
	for i, s := range schemas {
		names[i], roles[i] = s.Name, s.Role
	}
	// Compiling a statement of this length costs more than it saves, and the sort of a thousand tenants should stay in
	// memory. The path is empty while the statement is read: it means pg_catalog and nothing else.
	const settings = `select set_config('search_path', '', true), set_config('jit', 'off', true), set_config('work_mem', '64MB', true)`
	if _, err := q.Exec(ctx, settings); err != nil {
		return err
	}
	rows, err := q.Query(ctx, sql, keys, names, roles)
	if err != nil {
		return err
	}
	if _, err := pgx.ForEachRow(rows, into, func() error { each(); return nil }); err != nil {
		return err
	}
	_, err = q.Exec(ctx, `select set_config('search_path', '', true)`)
	return err
}
