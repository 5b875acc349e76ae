package tenant

import (
	"fmt"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// MaxSlugBytes is the longest slug. PostgreSQL cuts identifiers at 63 bytes in silence, and two tenants would share a
// schema; 48 leaves room for the names that oneo makes from a schema's name.
const MaxSlugBytes = 48

// reserved names may be neither a slug nor the schema made from one.
var reserved = []string{
	"public", "ext", "information_schema", "admin", "api", "www", "localhost", "app", "mail", "smtp", "imap", "ftp",
	"ns", "ns1", "ns2", "mx", "root", "postgres", "template", "template0", "template1", "static", "assets", "cdn",
	"status", "health", "metrics", "internal", "system", "support", "auth", "login", "river", "autoconfig",
	"autodiscover", "wpad", "isatap", "broadcasthost",
}

// Slug is a tenant's name: one DNS label of lower-case letters, digits and inner hyphens, at most MaxSlugBytes long.
// The zero Slug is no slug.
type Slug struct{ s string }

// ParseSlug reads a slug exactly as written: nothing is trimmed, folded or cut. The error is a fault of kind Invalid
// that says which rule is broken.
func ParseSlug(s string) (Slug, error) {
	if err := checkSlug(s); err != nil {
		return Slug{}, err
	}
	if err := checkSchema(schemaName(s)); err != nil {
		return Slug{}, err
	}
	return Slug{s}, nil
}

func checkSlug(s string) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "tenant name %q "+format, append([]any{clip(s)}, args...)...).
			WithCode("invalid_slug").
			WithHint("use lower-case letters, digits and inner hyphens, at most %d bytes, for example acme-berlin", MaxSlugBytes)
	}
	switch {
	case s == "":
		return bad("is empty")
	case len(s) > MaxSlugBytes:
		return bad("is longer than %d bytes", MaxSlugBytes)
	case s[0] == '-' || s[len(s)-1] == '-':
		return bad("begins or ends with a hyphen")
	case len(s) >= 4 && s[2:4] == "--":
		return bad("has hyphens in its third and fourth place, which DNS keeps for encoded names")
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return bad("holds %q", s[i:i+1])
		}
	}
	if slices.Contains(reserved, s) || strings.HasPrefix(s, "pg-") || strings.HasPrefix(s, "oneo-") || s == "oneo" {
		return bad("is reserved")
	}
	return nil
}

// clip keeps hostile input from filling a terminal.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "..."
	}
	return s
}

// String is the slug as text; empty for the zero Slug.
func (s Slug) String() string { return s.s }

// IsZero reports whether s was never parsed.
func (s Slug) IsZero() bool { return s.s == "" }

// Schema is the name of the schema that a tenant of this name gets by default: "-" becomes "_".
func (s Slug) Schema() Schema { return Schema{schemaName(s.s)} }

func schemaName(slug string) string { return strings.ReplaceAll(slug, "-", "_") }

// Schema is the name of a tenant's PostgreSQL schema: a lower-case identifier of letters, digits and "_", at most
// MaxSlugBytes long and not reserved. The zero Schema is no schema.
type Schema struct{ s string }

// ParseSchema reads a schema's name exactly as written.
func ParseSchema(s string) (Schema, error) {
	if err := checkSchema(s); err != nil {
		return Schema{}, err
	}
	return Schema{s}, nil
}

// SpareSchema is the name of the schema that stands ready for the tenant of a number. The prefix is oneo's: ParseSchema
// reads no such name.
func SpareSchema(number int32) Schema { return Schema{fmt.Sprintf("oneo_spare_%d", number)} }

// ReferenceSchema is the name of a schema that is made only to be looked at, told from others by a random number.
func ReferenceSchema(random uint64) Schema {
	return Schema{fmt.Sprintf("oneo_reference_%016x", random)}
}

// TrySchema is the name of a schema into which an archive is restored only to see whether it can be, told from others by
// a random number.
func TrySchema(random uint64) Schema { return Schema{fmt.Sprintf("oneo_try_%016x", random)} }

// RestoreSchema is the name of the schema that a restore loads the tenant of a number into, and ReplacedSchema of the one
// that holds what the restore has taken out of use. operation tells restores apart: 8 hex digits.
func RestoreSchema(number int32) Schema { return Schema{fmt.Sprintf("oneo_restore_%d", number)} }

// ReplacedSchema: see RestoreSchema.
func ReplacedSchema(number int32, operation string) Schema {
	return Schema{fmt.Sprintf("oneo_replaced_%d_%s", number, operation)}
}

// MovedSchema is where the copy lies that a move has left behind; operation tells it from those of other moves.
func MovedSchema(number int32, operation string) Schema {
	return Schema{fmt.Sprintf("oneo_moved_%d_%s", number, operation)}
}

// UndoSchema is the name of the schema that holds what a run has kept of the tenant of a number; UndoneSchema of the one
// that holds what undoing the run has taken out. run tells runs apart: 8 hex digits.
func UndoSchema(number int32, run string) Schema {
	return Schema{fmt.Sprintf("oneo_undo_%d_%s", number, run)}
}

// UndoneSchema is told of at UndoSchema.
func UndoneSchema(number int32, run string) Schema {
	return Schema{fmt.Sprintf("oneo_undone_%d_%s", number, run)}
}

func checkSchema(s string) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "schema name %q "+format, append([]any{clip(s)}, args...)...).
			WithCode("invalid_schema").
			WithHint("use lower-case letters, digits and underscores, at most %d bytes, for example acme_berlin", MaxSlugBytes)
	}
	if s == "" {
		return bad("is empty")
	}
	if len(s) > MaxSlugBytes {
		return bad("is longer than %d bytes", MaxSlugBytes)
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return bad("holds %q", s[i:i+1])
		}
	}
	if slices.Contains(reserved, s) || strings.HasPrefix(s, "pg_") || strings.HasPrefix(s, "oneo_") || s == "oneo" {
		return bad("is reserved")
	}
	return nil
}

// String is the name, unquoted; empty for the zero Schema.
func (s Schema) String() string { return s.s }

// IsZero reports whether s was never parsed.
func (s Schema) IsZero() bool { return s.s == "" }
