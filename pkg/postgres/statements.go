package postgres

import (
	"container/list"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
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
type connState struct {
	seen   map[int32]struct{}
	shared map[string]string // statement -> name
	own    map[ownKey]*list.Element
	recent *list.List // *ownStatement, most recently used first
	uses   map[ownKey]struct{}
	limit  int
	// stale is set when PostgreSQL said that a prepared statement no longer fits: the connection is then closed.
	stale bool
}

type ownKey struct {
	tenant int32
	sql    string
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
		seen: map[int32]struct{}{}, shared: map[string]string{}, own: map[ownKey]*list.Element{},
		recent: list.New(), uses: map[ownKey]struct{}{}, limit: limit,
	}
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
	name, ok := st.shared[key.sql]
	if !ok {
		return "", false
	}
	if _, again := st.uses[key]; again && st.mayAdmit() {
		return "", false
	}
	st.note(key)
	return name, true
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
	if _, known := st.shared[key.sql]; !known {
		if len(st.shared) >= maxSharedStatements {
			return "", nil
		}
		name := "s" + textHash(key.sql)
		if _, err := c.Prepare(ctx, name, key.sql); err != nil {
			return "", err
		}
		st.shared[key.sql] = name
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
	name := fmt.Sprintf("t%dx%s", key.tenant, textHash(key.sql))
	if _, err := c.Prepare(ctx, name, key.sql); err != nil {
		return "", err
	}
	st.own[key] = st.recent.PushFront(&ownStatement{key: key, name: name, used: time.Now()})
	delete(st.uses, key)
	return name, nil
}

// textHash makes a name from a statement's text, so that on whatever server connection a pooler runs the name it stands
// for this text, or for nothing.
func textHash(sql string) string {
	sum := sha256.Sum256([]byte(sql))
	return hex.EncodeToString(sum[:8])
}

// outlived reports whether err says that a prepared statement no longer fits the schema that it was prepared for.
func outlived(err error) bool {
	switch SQLState(err) {
	case "0A000", "26000", "42P05":
		return true
	}
	return false
}
