package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// One tenant after another is exported over one session. One whose export fails, or is broken off, between two others takes
// the session with it: nothing of it stays locked, and the next one's archive is what another process would have written.
func TestExportsOverOneSession(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	full := errors.New("no space left on device")
	one, two, three := f.tenant(p, "acme"), f.tenant(p, "beta"), f.tenant(p, "gamma")
	f.in(one, rows)
	f.in(two, rows+`delete from books; create table added (id int primary key)`)
	f.in(three, rows+`update books set title = 'of gamma ' || id; alter table log add column added text default 'x'`)
	holders := func(number int32) int {
		return f.count(`select coalesce(max(l.pid), 0) from pg_locks l where l.locktype = 'advisory' and l.classid = $1::int4::oid and l.objid = $2::int4::oid
	and l.database = (select oid from pg_database where datname = current_database())`, postgres.OperationLock, number)
	}
	// export writes a tenant, and says over which backend; with after, until the writer has taken so many bytes.
	export := func(ctx context.Context, who tenant.Tenant, after int, begun func()) (b bytes.Buffer, pid int, err error) {
		var w io.Writer = &b
		if after > 0 {
			w = &breaking{w: w, left: after, err: full}
		}
		_, err = p.Export(ctx, who, w, transfer.ExportOptions{Begun: func(archive.Header) {
			pid = holders(who.Number)
			begun()
		}})
		return b, pid, err
	}
	ctx, nothing := t.Context(), func() {}
	elsewhere, _, _ := f.Open(t, func(*postgres.Options) {})
	other := f.on(elsewhere, first)
	well := func(who tenant.Tenant) (pid int) {
		t.Helper()
		b, pid, err := export(ctx, who, 0, nothing)
		require.NoError(t, err)
		require.NotZero(t, pid)
		require.Zero(t, holders(who.Number))
		fresh, _ := f.export(other, who)
		require.Equal(t, f.sums(fresh), f.sums(b.Bytes()))
		return pid
	}
	last := well(one)
	require.Equal(t, last, well(three), "the session is used again")
	for name, fail := range map[string]func() (int, error){
		"a full disk": func() (int, error) {
			_, pid, err := export(ctx, two, 100, nothing)
			require.ErrorIs(t, err, full)
			return pid, err
		},
		"cancelled": func() (int, error) {
			cctx, cancel := context.WithCancel(ctx)
			defer cancel()
			_, pid, err := export(cctx, two, 0, cancel)
			require.ErrorIs(t, err, context.Canceled)
			return pid, err
		},
		"its backend is ended": func() (int, error) {
			_, pid, err := export(ctx, two, 0, func() { f.count(`select pg_terminate_backend($1, 60000)::int`, holders(two.Number)) })
			return pid, err
		},
	} {
		pid, err := fail()
		require.Error(t, err, name)
		require.Equal(t, last, pid, name)
		require.Eventually(t, func() bool { return holders(two.Number) == 0 }, pgtest.Patience, 10*time.Millisecond, name)
		last = well(three)
		require.NotEqual(t, pid, last, name)
		require.Equal(t, last, well(one), name)
	}
	f.Invariants(t)
}

// breaking takes so many bytes.
type breaking struct {
	w    io.Writer
	left int
	err  error
}

func (b *breaking) Write(p []byte) (int, error) {
	if b.left -= len(p); b.left < 0 {
		return 0, b.err
	}
	return b.w.Write(p)
}
