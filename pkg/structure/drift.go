package structure

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Options is what a Checker needs.
type Options struct {
	DB   *postgres.DB
	Head int // the newest version that Make knows
	// Make runs before, which makes an empty schema and binds the transaction to it, then the migrations up to a version
	// from 0 to Head, then after: (*migrate.Migrator).Create.
	Make func(ctx context.Context, tx *postgres.OwnerTx, schema tenant.Schema, version int, before, after string) error
}

// Checker compares tenants with what the migrations make. It is safe for concurrent use and keeps each reference that
// it has made.
type Checker struct {
	o  Options
	mu sync.Mutex
	// references by database group, because servers of several versions may use different words, and version.
	references map[reference]Structure
}

type reference struct {
	group   string
	version int
}

// New checks the options.
func New(o Options) (*Checker, error) {
	if o.DB == nil || o.Make == nil {
		return nil, errors.New("structure: DB and Make must be given")
	}
	return &Checker{o: o, references: map[reference]Structure{}}, nil
}

// State says what was found of a group of tenants.
type State string

const (
	// Identical is as the migrations of the tenant's version make it.
	Identical State = "identical"
	// Drifted differs from that.
	Drifted State = "drifted"
	// Missing is a schema that is gone, or was dropped and made again, behind oneo's back.
	Missing State = "missing"
	// Unfinished differs while a migration of more than one transaction has been begun and not ended.
	Unfinished State = "unfinished"
	// Unread could not be read: it is locked, or was changed each time it was looked at.
	Unread State = "unread"
)

// Group is tenants of one database group that are alike.
type Group struct {
	Database    string // the database group
	Version     int    // that the tenants are at
	State       State
	Tenants     []tenant.Tenant // in the order in which they were given
	Differences []Difference    // of Drifted and Unfinished
	Err         error           // of Unread: why

	schemas map[int32]Schema
	owner   string
}

const (
	// batch is how many tenants one query describes: it bounds what the backend, whose connection is closed afterwards,
	// remembers of their catalog.
	batch = 1000
	// details is how many tenants, one for each group of differing ones, are described in full at one time.
	details = 50
	// looks is how often a tenant that differs is looked at before it counts as being changed.
	looks = 4
	// alone and together are how often a query is tried whose failure may pass: of many tenants the one that is locked
	// is looked for early.
	alone, together = 4, 2
)

// Drift compares tenants of one database group with the reference of the version that each is at. It changes nothing.
// One query describes up to a thousand tenants. Whoever differs is looked at again, apart from the rest: a change that
// was committed in between is no drift. A tenant that cannot be read is in a group of its own and does not stop the others. The groups come in the order of Identical, Drifted,
// Missing, Unfinished, Unread, the larger first. Tenants must be of this group.
func (c *Checker) Drift(ctx context.Context, group string, tenants []tenant.Tenant) ([]Group, error) {
	numbers := make([]int32, len(tenants))
	for i, t := range tenants {
		numbers[i] = t.Number
	}
	r := round{c: c, group: group, found: map[int32]finding{}, settled: map[int32]State{}, unread: map[int32]error{}}
	if err := r.settle(ctx, numbers); err != nil {
		return nil, err
	}
	return r.groups(ctx, tenants)
}

// Reference is what the migrations make of an empty schema, up to a version, in a database group. It makes one in a
// transaction that is rolled back, so that nothing of it is left, and remembers the answer.
func (c *Checker) Reference(ctx context.Context, group string, version int) (Structure, error) {
	if version < 0 || version > c.o.Head {
		return Structure{}, fault.New(fault.Conflict, "a tenant is at version %d; this binary knows %d", version, c.o.Head).
			WithCode("newer_database").WithHint("use the newer oneo, or the folder of migrations that made it")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	key := reference{group, version}
	if s, made := c.references[key]; made {
		return s, nil
	}
	var s Structure
	err := retry(ctx, func() (err error) {
		s, err = c.make(ctx, group, version)
		return err
	})
	if err != nil {
		return Structure{}, fmt.Errorf("make the reference of version %d: %w", version, err)
	}
	c.references[key] = s
	return s, nil
}

// errMade ends the transaction in which a reference was made.
var errMade = errors.New("the reference has been read")

func (c *Checker) make(ctx context.Context, group string, version int) (Structure, error) {
	inst, err := c.o.DB.Installation(ctx, group)
	if err != nil {
		return Structure{}, err
	}
	name := tenant.ReferenceSchema(rand.Uint64()) // no tenant's schema or role begins so
	schema := Schema{Name: name.String(), Role: inst.AppRole}
	before, undo := "", "drop schema "+postgres.Quote(schema.Name)+" cascade"
	if c.o.DB.Isolation() == postgres.ByRole {
		schema.Role = schema.Name
		before = "create role " + postgres.Quote(schema.Role) + " nologin noinherit;\n"
		undo += "; drop role " + postgres.Quote(schema.Role)
	}
	before += Empty(schema)
	const transaction = `select pg_catalog.pg_current_xact_id()::text`
	var s Structure
	err = c.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		var began, ended string
		if err := tx.QueryRow(ctx, transaction).Scan(&began); err != nil {
			return err
		}
		if err := c.o.Make(ctx, tx, name, version, before, ""); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, transaction).Scan(&ended); err != nil {
			return err
		}
		if began != ended { // what would be rolled back has been committed
			if err := tx.Script(ctx, undo); err != nil {
				return err
			}
			return fault.New(fault.Invalid, "a migration ended the transaction that it ran in").WithCode("transaction_control")
		}
		if s, err = Read(ctx, tx, schema); err != nil {
			return err
		}
		return errMade
	})
	if !errors.Is(err, errMade) {
		return Structure{}, err
	}
	return s, nil
}

// finding is how one look at a tenant found it.
type finding struct {
	Schema
	missing    bool
	version    int
	unfinished bool
	hash       string // empty: it was renamed or dropped while we looked
}

// round is one comparison.
type round struct {
	c       *Checker
	group   string
	found   map[int32]finding
	settled map[int32]State
	unread  map[int32]error
}

// settle looks at tenants until each is known to be as it should be, or has been found twice in the same other way.
func (r *round) settle(ctx context.Context, numbers []int32) error {
	for n := 0; len(numbers) > 0; n++ {
		if n == looks {
			for _, number := range numbers {
				r.unread[number] = fault.New(fault.Locked, "it was changed each time it was looked at").WithCode("tenant_locked")
			}
			return nil
		}
		if n > 0 { // what is being changed wants a moment
			if err := pause(ctx, time.Duration(n)*100*time.Millisecond); err != nil {
				return err
			}
		}
		var again []int32
		for part := range slices.Chunk(numbers, batch) {
			now := map[int32]finding{}
			if err := r.look(ctx, part, now); err != nil {
				return err
			}
			for _, number := range part {
				if r.unread[number] != nil {
					continue
				}
				f, placed := now[number]
				f.missing = f.missing || !placed
				state, err := r.judge(ctx, f)
				if err != nil {
					return err
				}
				if before, seen := r.found[number]; state == Identical || state != Unread && seen && before == f {
					r.settled[number] = state
				} else {
					again = append(again, number)
				}
				r.found[number] = f
			}
		}
		numbers = again
	}
	return nil
}

// judge says what a finding means, if the next look confirms it.
func (r *round) judge(ctx context.Context, f finding) (State, error) {
	switch {
	case f.missing:
		return Missing, nil
	case f.hash == "":
		return Unread, nil
	}
	ref, err := r.c.Reference(ctx, r.group, f.version)
	switch {
	case err != nil:
		return "", err
	case ref.Hash() == f.hash:
		return Identical, nil
	case f.unfinished:
		return Unfinished, nil
	}
	return Drifted, nil
}

// look describes tenants in one query. Where one of them cannot be read because somebody holds a lock on it, the others
// are read all the same: by halves, until the one is found.
func (r *round) look(ctx context.Context, numbers []int32, into map[int32]finding) error {
	attempts := alone
	if len(numbers) > 1 {
		attempts = together
	}
	err := retryUpTo(ctx, attempts, func() error {
		return r.c.o.DB.AsOwner(ctx, r.group, func(tx *postgres.OwnerTx) error {
			tx.Retire()
			at, err := placed(ctx, tx, numbers)
			if err != nil {
				return err
			}
			var keys []int32
			var schemas []Schema
			for _, p := range at {
				if !p.missing {
					keys, schemas = append(keys, p.number), append(schemas, p.Schema)
				}
			}
			hashes, err := hash(ctx, tx, keys, schemas)
			if err != nil {
				return err
			}
			for _, p := range at {
				p.finding.hash = hashes[p.number]
				into[p.number] = p.finding
			}
			return nil
		})
	})
	switch {
	case err == nil || !passing(err):
		return err
	case len(numbers) == 1:
		r.unread[numbers[0]] = err
		return nil
	}
	half := len(numbers) / 2
	if err := r.look(ctx, numbers[:half], into); err != nil {
		return err
	}
	return r.look(ctx, numbers[half:], into)
}

// alike is what tenants of one group have in common.
type alike struct {
	state   State
	version int
	hash    string
}

// groups puts tenants together that are alike, and says of each group how it differs.
func (r *round) groups(ctx context.Context, tenants []tenant.Tenant) ([]Group, error) {
	var order []alike
	byKind := map[alike]*Group{}
	for _, t := range tenants {
		f := r.found[t.Number]
		a := alike{r.settled[t.Number], f.version, f.hash}
		if r.unread[t.Number] != nil {
			a = alike{state: Unread, version: f.version}
		}
		g := byKind[a]
		if g == nil {
			g = &Group{Database: r.group, Version: a.version, State: a.state, Err: r.unread[t.Number], schemas: map[int32]Schema{}}
			byKind[a], order = g, append(order, a)
		}
		g.Tenants = append(g.Tenants, t)
		g.schemas[t.Number] = f.Schema
	}
	var differing []alike
	for _, a := range order {
		if a.state == Drifted || a.state == Unfinished {
			differing = append(differing, a)
		}
	}
	for part := range slices.Chunk(differing, details) {
		if err := r.describe(ctx, part, byKind); err != nil {
			return nil, err
		}
	}
	all := make([]Group, len(order))
	for i, a := range order {
		all[i] = *byKind[a]
	}
	states := []State{Identical, Drifted, Missing, Unfinished, Unread}
	slices.SortStableFunc(all, func(a, b Group) int {
		if c := slices.Index(states, a.State) - slices.Index(states, b.State); c != 0 {
			return c
		}
		return len(b.Tenants) - len(a.Tenants)
	})
	return all, nil
}

// describe compares the first tenant of each group with its reference.
func (r *round) describe(ctx context.Context, part []alike, byKind map[alike]*Group) error {
	keys, schemas := make([]int32, len(part)), make([]Schema, len(part))
	for i, a := range part {
		keys[i] = byKind[a].Tenants[0].Number
		schemas[i] = byKind[a].schemas[keys[i]]
	}
	var found map[int32]Structure
	err := retry(ctx, func() error {
		return r.c.o.DB.AsOwner(ctx, r.group, func(tx *postgres.OwnerTx) (err error) {
			tx.Retire()
			found, err = read(ctx, tx, keys, schemas)
			return err
		})
	})
	if err != nil {
		return err
	}
	for i, a := range part {
		g, s := byKind[a], found[keys[i]]
		if s.Hash() != a.hash {
			g.State, g.Err = Unread, fault.New(fault.Locked, "it was changed while it was looked at").WithCode("tenant_locked")
			continue
		}
		ref, err := r.c.Reference(ctx, r.group, a.version)
		if err != nil {
			return err
		}
		g.owner, g.Differences = s.owner, Compare(ref, s)
		if len(g.Differences) == 0 { // Compare has a fault: what differs must not look as if it did not
			g.Differences = []Difference{{Kind: "schema hash", Want: ref.Hash(), Have: s.Hash(), attribute: "hash"}}
		}
	}
	return nil
}

// placement is where a tenant stands, as the database itself says.
type placement struct {
	number int32
	finding
}

// placed reads where tenants stand. A spare schema is nobody's.
func placed(ctx context.Context, q postgres.Querier, numbers []int32) ([]placement, error) {
	const query = `select p.number, p.schema, p.role, p.version, n.oid is null,
    exists (select from public.progress g where g.tenant = p.number and not g.beside)
from public.placements p left join pg_catalog.pg_namespace n on n.oid = p.namespace and n.nspname = p.schema
where p.number = any($1) and p.state <> 'spare'`
	rows, err := q.Query(ctx, query, numbers)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (p placement, err error) {
		return p, row.Scan(&p.number, &p.Name, &p.Role, &p.version, &p.missing, &p.unfinished)
	})
}

// passing reports whether the same query may succeed in a moment: a lock was not to be had, or something was dropped
// between the catalog's row and its description.
func passing(err error) bool {
	switch postgres.SQLState(err) {
	case "55P03", "40P01", "XX000", "42P01", "3F000":
		return true
	}
	return false
}

// retry runs fn again, a few times, while its failure may pass.
func retry(ctx context.Context, fn func() error) error { return retryUpTo(ctx, alone, fn) }

func retryUpTo(ctx context.Context, attempts int, fn func() error) error {
	for attempt := 1; ; attempt++ {
		err := fn()
		if err == nil || attempt == attempts || !passing(err) {
			return err
		}
		if perr := pause(ctx, time.Duration(50<<attempt)*time.Millisecond); perr != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
