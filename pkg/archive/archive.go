// Package archive is one tenant on disk: a single stream, written and read in one pass, that holds what the registry
// knows of the tenant, its structure and the rows of its tables. It knows no database and no place where archives lie.
//
// An archive is whole or it is not one: whatever is cut off, changed, swapped or put behind it is found before its last
// row is believed. Who reads one therefore uses nothing of it before Trailer has answered: rows go into a place that
// nobody sees until then. docs/archive.md describes the bytes.
package archive

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Format is the version of the format that is written. Archives of all formats up to it can be read, for ever.
const Format = 1

// Bounds of what is read; an archive beyond them is refused before it costs memory.
const (
	// MaxRecord bounds a record that is not rows, in bytes as JSON.
	MaxRecord = 16 << 20
	// maxTables bounds the tables of an archive, and its sequences.
	maxTables = 100_000
	// maxData is the most that one record of rows holds, in bytes; dataSize is what is written.
	maxData  = 256 << 10
	dataSize = 64 << 10
)

// Header says whose archive it is and of which state. It is the first record.
type Header struct {
	// Made is when the snapshot of the rows was taken.
	Made time.Time `json:"made"`
	// Oneo is the version of the program that wrote it.
	Oneo string `json:"oneo"`
	// Installation is the id of the installation that the tenant belongs to.
	Installation string `json:"installation"`
	// Tenant is the tenant's id for the outside; Number the one inside its installation.
	Tenant string `json:"tenant"`
	Number int32  `json:"number"`
	Slug   string `json:"slug"`
	Schema string `json:"schema"`
	Group  string `json:"group"`
	// Postgres is the server's version as in server_version_num: 150018.
	Postgres int `json:"postgres"`
	// Words is the version of the words that Fingerprint and Base are made of.
	Words int `json:"words"`
	// Migrations are the applied ones in their order; the last one's version is the archive's.
	Migrations []Migration `json:"migrations"`
	// Fingerprint is the structure's, and Base that of what the migrations make: where they differ, Structure has what lies between. Neither
	// depends on the schema's name; both hold for one major version of PostgreSQL
	// and one version of the words.
	Fingerprint string `json:"fingerprint"`
	Base        string `json:"base"`
	// Empty says that the rows were left out: a tenant that is made of it begins with those that its migrations insert.
	Empty bool `json:"empty,omitempty"`
}

// Version is the schema version: that of the last applied migration, 0 without any.
func (h Header) Version() int {
	if len(h.Migrations) == 0 {
		return 0
	}
	return h.Migrations[len(h.Migrations)-1].Version
}

// Migration is one row of the tenant's ledger.
type Migration struct {
	Version  int    `json:"version"`
	Name     string `json:"name"`
	Checksum []byte `json:"checksum"`
}

// Registry is what the shared tables know of the tenant.
type Registry struct {
	Name     string          `json:"name"`
	State    string          `json:"state"`
	Settings json.RawMessage `json:"settings"`
	Domains  []Domain        `json:"domains"`
}

// Domain is one of the tenant's hosts.
type Domain struct {
	Host    string `json:"host"`
	Primary bool   `json:"primary"`
}

// Structure is what the tenant has beyond its migrations. A tenant that has nothing of its own has an empty one.
type Structure struct {
	// Custom are the statements that make it out of what the migrations make, in order. They are run before the rows come.
	Custom []Statement `json:"custom"`
}

// Sum tells structures apart: the SHA-256 of the statements, in hex. Empty: there is none.
func (s Structure) Sum() string {
	if len(s.Custom) == 0 {
		return ""
	}
	h := sha256.New()
	for _, c := range s.Custom {
		fmt.Fprintf(h, "%d %s%d %s", len(c.Object), c.Object, len(c.SQL), c.SQL)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// Statement makes one object.
type Statement struct {
	// Object says what it makes, for a person: "table notes".
	Object string `json:"object"`
	SQL    string `json:"sql"`
}

// Table begins the rows of a table.
type Table struct {
	Name string `json:"name"`
	// Columns are those whose values follow, in the order of the rows; generated ones are not among them.
	Columns []string `json:"columns"`
}

// Sum is what a table's rows come to.
type Sum struct {
	Table  string `json:"table"`
	Rows   int64  `json:"rows"`
	Bytes  int64  `json:"bytes"`
	SHA256 []byte `json:"sha256"`
}

// Sequence is the state of a sequence, as setval takes it.
type Sequence struct {
	Name   string `json:"name"`
	Last   int64  `json:"last"`
	Called bool   `json:"called"`
}

// Trailer is the last record: what the whole must come to.
type Trailer struct {
	Tables    []Sum      `json:"tables"`
	Sequences []Sequence `json:"sequences"`
	// SHA256 is the checksum of all records before, those of the rows included.
	SHA256 []byte `json:"sha256"`
}

// Rows is the number of rows in all tables, Bytes their size as COPY writes them.
func (t Trailer) Rows() (rows int64) {
	for _, s := range t.Tables {
		rows += s.Rows
	}
	return rows
}

// Bytes is the size of all rows as COPY writes them.
func (t Trailer) Bytes() (n int64) {
	for _, s := range t.Tables {
		n += s.Bytes
	}
	return n
}

// kind is the first byte of a record.
type kind byte

const (
	kindHeader    kind = 'H'
	kindRegistry  kind = 'R'
	kindStructure kind = 'S'
	kindTable     kind = 'T'
	kindData      kind = 'D'
	kindEnd       kind = 'E'
	kindTrailer   kind = 'Z'
)

func (k kind) String() string { return string(rune(k)) }

// preamble is the one line that can be read without a key: it says how to read what follows.
type preamble struct {
	Format int `json:"format"`
	// Keys are the ids of the keys that open it; none: it is not encrypted.
	Keys []string `json:"keys,omitempty"`
}

// magic begins every archive.
const magic = "oneo archive\n"
