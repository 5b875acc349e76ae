package observe_test

import (
	"errors"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// ledger is an installation to which servers write what they have counted.
type ledger struct {
	*stage
	t   *testing.T
	now time.Time
}

func newLedger(t *testing.T) *ledger {
	s := &stage{env: pgtest.New(t)}
	s.admin = pgtest.Admin(t, s.env.AdminURL)
	return &ledger{stage: s, t: t, now: time.Now().UTC().Truncate(time.Hour)}
}

// server is one that counts, and lives by the test's time.
func (l *ledger) server() (*observe.Counter, *observe.Usage) {
	c := observe.NewCounter(0)
	u := observe.NewUsage(observe.UsageOptions{
		Instance: uuid.New(), Counter: c, DB: l.env.DB, Expires: true, Keep: 48 * time.Hour, Logger: slog.New(slog.DiscardHandler),
	})
	u.SetNow(func() time.Time { return l.now })
	return c, u
}

func (l *ledger) used(by observe.Span, ts ...tenant.Tenant) (all []observe.Used) {
	l.t.Helper()
	f := observe.UsageFilter{Since: l.now.Add(-30 * 24 * time.Hour), Until: l.now.Add(time.Hour), By: by}
	for _, tn := range ts {
		f.Tenants = append(f.Tenants, tn.Number)
	}
	require.NoError(l.t, l.env.DB.AsOwner(l.t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		all, err = observe.UsageOf(l.t.Context(), tx, f)
		return err
	}))
	return all
}

func (l *ledger) requests(tn tenant.Tenant) (sum int64) {
	for _, u := range l.used(observe.Monthly, tn) {
		sum += u.Requests
	}
	return sum
}

func TestServersUsageAddsUp(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	acme, globex := l.env.Tenant(t, "acme"), l.env.Tenant(t, "globex")
	hour := l.now
	one, first := l.server()
	two, second := l.server()
	answer(one, acme, observe.Answer{Status: 200, Bytes: 100})
	answer(one, acme, observe.Answer{Status: 500, Failed: true})
	answer(two, acme, observe.Answer{Status: 429, Refused: true, Bytes: 7})
	one.Transaction(acme, postgres.Work{Took: 1500 * time.Microsecond, Rows: 3})
	answer(two, globex, get(time.Millisecond))
	l.now = l.now.Add(time.Hour) // what was counted until now belongs to the hour that has ended
	require.NoError(t, first.Write(t.Context()))
	require.NoError(t, second.Write(t.Context()))
	require.NoError(t, second.Write(t.Context()), "nothing new")
	answer(one, acme, observe.Answer{Status: 200, Bytes: 1})
	require.NoError(t, first.Write(t.Context()))
	require.Equal(t, []observe.Used{
		{Tenant: acme.Number, From: hour, Requests: 3, Errors: 1, Refused: 1, Transactions: 1, DatabaseUS: 1500, Rows: 3, BytesOut: 107},
		{Tenant: acme.Number, From: l.now, Requests: 1, BytesOut: 1},
		{Tenant: globex.Number, From: hour, Requests: 1},
	}, inUTC(l.used(observe.Hourly, acme, globex)))
	require.Equal(t, int64(4), l.requests(acme))
	require.Empty(t, l.used(observe.Hourly), "of no tenant")
}

func inUTC(all []observe.Used) []observe.Used {
	for i := range all {
		all[i].From = all[i].From.UTC()
	}
	return all
}

// A commit whose answer was lost is not made a second time, and what was counted meanwhile is.
func TestUsageWhoseAnswerWasLostIsAddedOnce(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	acme := l.env.Tenant(t, "acme")
	c, u := l.server()
	lost := errors.New("the connection is gone")
	for range 3 {
		answer(c, acme, get(time.Millisecond))
		u.AfterWrite(func() error { return lost })
		require.ErrorIs(t, u.Write(t.Context()), lost)
		answer(c, acme, get(time.Millisecond))
		require.ErrorIs(t, u.Write(t.Context()), lost, "the same write again")
		u.AfterWrite(func() error { return nil })
		require.NoError(t, u.Write(t.Context()))
	}
	require.Equal(t, int64(6), l.requests(acme))
}

func TestUsageIsHeldWhileItCannotBeWritten(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	acme, globex := l.env.Tenant(t, "acme"), l.env.Tenant(t, "globex")
	begun := l.now
	c, u := l.server()
	u.SetHeld(4)
	l.exec(t, `alter table public.usage rename to away`)
	for range 5 {
		answer(c, acme, get(time.Millisecond))
		answer(c, globex, get(time.Millisecond))
		l.now = l.now.Add(time.Hour)
		require.Error(t, u.Write(t.Context()))
	}
	l.exec(t, `alter table public.away rename to usage`)
	u.Close() // writes what is left
	require.Equal(t, int64(5), l.requests(acme))
	require.Equal(t, int64(5), l.requests(globex))
	hours := l.used(observe.Hourly, acme)
	require.Equal(t, begun, hours[0].From.UTC(), "what was being written stays as it was")
	require.Len(t, hours, 3, "the oldest hours were put together: %v", hours)
	require.Equal(t, l.now.Add(-time.Hour), hours[2].From.UTC())
}

// Tenants come and go in the counter while it is read: each request is written once.
func TestUsageIsExactWhateverTheCounterHolds(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	c, u := l.server()
	c.SetLimit(3)
	const tenants, each = 10, 200
	var all []tenant.Tenant
	for i := range tenants {
		tn := named(t, int32(i+1), "t"+string(rune('a'+i)))
		all = append(all, tn)
	}
	var counting sync.WaitGroup
	for w := range 4 {
		counting.Go(func() {
			for i := range each {
				for n := range all {
					tn := all[(n+w+i)%tenants]
					answer(c, tn, get(time.Millisecond))
					c.Transaction(tn, postgres.Work{Took: time.Millisecond, Rows: 1})
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { counting.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		require.NoError(t, u.Write(t.Context()))
	}
	require.NoError(t, u.Write(t.Context()))
	for _, used := range l.used(observe.Monthly, all...) {
		require.Equal(t, int64(4*each), used.Requests)
		require.Equal(t, int64(4*each), used.Transactions)
		require.Equal(t, int64(4*each), used.Rows)
		require.Equal(t, int64(4*each*1000), used.DatabaseUS)
	}
	require.Len(t, l.used(observe.Monthly, all...), tenants)
}

func TestSizesAreMeasuredOnceAnHour(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	acme := l.env.Tenant(t, "acme")
	l.exec(t, `insert into acme.pipelines (id, key, name) values (gen_random_uuid(), 'deals', 'Deals')`)
	l.exec(t, `insert into acme.records (id, pipeline_id, data) select gen_random_uuid(), (select id from acme.pipelines), '{}' from generate_series(1, 50)`)
	l.exec(t, `analyze acme.records`)
	_, first := l.server()
	_, second := l.server()
	require.NoError(t, first.Measure(t.Context()))
	hours := l.used(observe.Hourly, acme)
	require.Len(t, hours, 1)
	require.Equal(t, int64(50), *hours[0].Records)
	require.Positive(t, *hours[0].SizeBytes)
	l.exec(t, `update public.usage set records = 7`)
	require.NoError(t, second.Measure(t.Context()))
	require.NoError(t, first.Measure(t.Context()))
	require.Equal(t, int64(7), *l.used(observe.Hourly, acme)[0].Records, "the hour has been measured")
	l.now = l.now.Add(time.Hour)
	require.NoError(t, second.Measure(t.Context()))
	require.Equal(t, int64(50), *l.used(observe.Hourly, acme)[1].Records)
}

// A purged tenant's usage stays until its time is over; an erased one's goes, and nothing is added to it.
func TestUsageExpires(t *testing.T) {
	t.Parallel()
	l := newLedger(t)
	acme, globex := l.env.Tenant(t, "acme"), l.env.Tenant(t, "globex")
	c, u := l.server()
	hour := l.now
	for _, ago := range []time.Duration{72 * time.Hour, 24 * time.Hour} {
		l.now = hour.Add(-ago)
		require.NoError(t, u.Write(t.Context())) // the next hour begins
		answer(c, acme, get(time.Millisecond))
		answer(c, globex, get(time.Millisecond))
		require.NoError(t, u.Write(t.Context()))
	}
	l.now = hour
	l.exec(t, `update public.usage_marks set written_at = now() - interval '72 hours'`)
	l.exec(t, `insert into public.usage_marks (writer, sequence) values ('at work', 1)`)
	l.exec(t, `insert into public.erasures (tenant, number, slug, erased_at, actor, destroyed, mac) values (gen_random_uuid(), $1, 'globex', now(), '', '{}', decode(repeat('00', 32), 'hex'))`, globex.Number)
	expired, err := u.Expire(t.Context())
	require.NoError(t, err)
	require.Equal(t, int64(3), expired)
	require.Equal(t, int64(1), l.requests(acme))
	require.Zero(t, l.requests(globex))
	answer(c, globex, get(time.Millisecond))
	require.NoError(t, u.Write(t.Context()))
	require.Zero(t, l.requests(globex))
	var marks int
	require.NoError(t, l.admin.QueryRow(t.Context(), `select count(*) from public.usage_marks`).Scan(&marks))
	require.Equal(t, 2, marks, "the server's, which has just written, and the one at work")
}
