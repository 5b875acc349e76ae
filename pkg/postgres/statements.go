package postgres

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

const stateKey = "oneo"

// connState is what a connection knows: the tenants that its backend has seen and the statements prepared on it. It is
// used by the connection's holder only.
//
// PostgreSQL throws a plan away whenever the search path differs from the one it was planned with, so a statement that
// all tenants share is planned anew at every change of tenant. A statement that a connection runs for the same tenant
// again therefore gets a name of its own; the others share one name.
//
// It also refuses a name whose columns or parameters have other types now (0A000), so tenants share names with those of
// their version only: while versions are mixed, the one's statement would not fit the other.
type connState struct {
	seen   map[int32]int32          // tenant -> its version when it was bound here last
	known  atomic.Int64             // how many those are, for others than the holder
	latest int32                    // the version bound last, whoever's: the best guess for a tenant not seen
	shared map[int32]*sharedVersion // by version
	count  int                      // names in shared
	own    map[ownKey]*list.Element
	recent *list.List // *ownStatement, most recently used first
	uses   map[ownKey]struct{}
	limit  int
	// unproved are the shared names made in the transaction at work.
	unproved []ownKey
	// stale is set when PostgreSQL said that a prepared statement no longer fits: the connection is then closed.
	stale bool
}

type ownKey struct {
	tenant, version int32
	sql             string
}

// sharedVersion are the names that the tenants of one version share.
type sharedVersion struct {
	names map[string]string // statement -> name
	used  time.Time
}

type ownStatement struct {
	key  ownKey
	name string
	used time.Time
}

const (
	maxSharedStatements = 512
	// ownStatementRest keeps a working set larger than the bound from replacing itself at every request: a name is
	// given up for another only when it has not been used for so long.
	ownStatementRest = 10 * time.Second
)

func newConnState(limit int) *connState {
	return &connState{
		seen: map[int32]int32{}, shared: map[int32]*sharedVersion{}, own: map[ownKey]*list.Element{},
		recent: list.New(), uses: map[ownKey]struct{}{}, limit: limit,
	}
}

// unseen is the version of a tenant that the connection has not bound yet.
const unseen = -1

// meets notes that work of the tenant comes to the backend.
func (st *connState) meets(tenant int32) {
	if _, known := st.seen[tenant]; !known {
		st.seen[tenant] = unseen
		st.known.Store(int64(len(st.seen)))
	}
}

// saw notes the version that the binding has found.
func (st *connState) saw(tenant, version int32) { st.seen[tenant], st.latest = version, version }

// versionOf is the version that the tenant has had here, or else the one that a tenant has had last.
func (st *connState) versionOf(tenant int32) int32 {
	if v, known := st.seen[tenant]; known && v != unseen {
		return v
	}
	return st.latest
}

func stateOf(c *pgxpool.Conn) *connState {
	st, _ := c.Conn().PgConn().CustomData()[stateKey].(*connState)
	return st
}

// ready returns the name under which the statement is prepared for the tenant, when nothing remains to be prepared.
func (st *connState) ready(key ownKey) (string, bool) {
	if el, ok := st.own[key]; ok {
		st.recent.MoveToFront(el)
		s := el.Value.(*ownStatement)
		s.used = time.Now()
		return s.name, true
	}
	name, ok := st.sharedName(key)
	if !ok {
		return "", false
	}
	if _, again := st.uses[key]; again && st.mayAdmit() {
		return "", false
	}
	st.note(key)
	return name, true
}

func (st *connState) sharedName(key ownKey) (name string, ok bool) {
	v := st.shared[key.version]
	if v == nil {
		return "", false
	}
	v.used = time.Now()
	name, ok = v.names[key.sql]
	return name, ok
}

// note remembers a use; the memory is bounded by forgetting everything when it is full.
func (st *connState) note(key ownKey) {
	if st.limit == 0 {
		return
	}
	if len(st.uses) >= 8*st.limit {
		clear(st.uses)
	}
	st.uses[key] = struct{}{}
}

func (st *connState) mayAdmit() bool {
	if st.limit == 0 {
		return false
	}
	if st.recent.Len() < st.limit {
		return true
	}
	return time.Since(st.recent.Back().Value.(*ownStatement).used) > ownStatementRest
}

// prepare makes the statement ready on the connection, which must be inside a transaction bound to the tenant. An
// empty name says that the statement should be run without one.
func (st *connState) prepare(ctx context.Context, c *pgx.Conn, key ownKey) (string, error) {
	if name, ok := st.ready(key); ok {
		return name, nil
	}
	if _, known := st.sharedName(key); !known {
		if st.count >= maxSharedStatements {
			st.stale = st.stale || st.outgrown(key.version)
			return "", nil
		}
		text := key.text()
		name := "s" + textHash(text)
		if _, err := c.Prepare(ctx, name, text); err != nil {
			return "", err
		}
		if st.shared[key.version] == nil {
			st.shared[key.version] = &sharedVersion{names: map[string]string{}}
		}
		st.shared[key.version].names[key.sql], st.shared[key.version].used = name, time.Now()
		st.count++
		st.unproved = append(st.unproved, key)
		st.note(key)
		return name, nil
	}
	if st.recent.Len() >= st.limit {
		el := st.recent.Back()
		old := el.Value.(*ownStatement)
		if err := c.Deallocate(ctx, old.name); err != nil {
			return "", err
		}
		st.recent.Remove(el)
		delete(st.own, old.key)
	}
	text := key.text()
	name := fmt.Sprintf("t%dx%s", key.tenant, textHash(text))
	if _, err := c.Prepare(ctx, name, text); err != nil {
		return "", err
	}
	st.own[key] = st.recent.PushFront(&ownStatement{key: key, name: name, used: time.Now()})
	delete(st.uses, key)
	return name, nil
}

// forget takes a shared name back.
func (st *connState) forget(ctx context.Context, c *pgx.Conn, key ownKey) error {
	name, ok := st.sharedName(key)
	if !ok {
		return nil
	}
	delete(st.shared[key.version].names, key.sql)
	st.count--
	return c.Deallocate(ctx, name)
}

// outgrown reports whether there are names of a version that no tenant has here any more, and that nobody will ask for.
func (st *connState) outgrown(version int32) bool {
	for v, names := range st.shared {
		if v != version && time.Since(names.used) > ownStatementRest {
			return true
		}
	}
	return false
}

// text is what is prepared. A pooler that carries prepared statements has one for each text, whatever the names: the
// version is in it.
func (k ownKey) text() string { return k.sql + "\n/* oneo " + strconv.Itoa(int(k.version)) + " */" }

// textHash makes a name from a statement's text, so that on whatever server connection a pooler runs the name it stands
// for this text, or for nothing.
func textHash(sql string) string {
	sum := sha256.Sum256([]byte(sql))
	return hex.EncodeToString(sum[:8])
}
