package crm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/crm"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// numbered makes the pipeline of everyType with n records whose titles are "t0", "t1" and so on.
func numbered(t *testing.T, n int) stage {
	s := open(t)
	s.pipeline(everyType())
	s.creates("deals", n, func(i int) string {
		return fmt.Sprintf(`{"title": "t%d", "amount": %d, "open": %t, "stage": %q}`, i, i%100, i%2 == 0, []string{"won", "lost"}[i%2])
	})
	return s
}

func titles(p crm.Page) (out []string) {
	for _, r := range p.Records {
		var d struct {
			Title string `json:"title"`
		}
		if err := json.Unmarshal(r.Data, &d); err != nil {
			panic(err)
		}
		out = append(out, d.Title)
	}
	return out
}

func TestListPages(t *testing.T) {
	s := numbered(t, 7)
	l := crm.ListQuery{Limit: 3, Count: crm.CountNone}
	walk := func(l crm.ListQuery, want ...string) {
		t.Helper()
		var got []string
		var pages []crm.Page
		for {
			p := s.list("deals", l)
			got = append(got, titles(p)...)
			require.Equal(t, l.After != nil, p.HasPrev)
			pages = append(pages, p)
			if !p.HasNext {
				break
			}
			l.After = &p.Records[len(p.Records)-1].ID
		}
		require.Equal(t, want, got)
		for i := len(pages) - 1; i > 0; i-- { // and the same pages backwards
			back := l
			back.After, back.Before = nil, &pages[i].Records[0].ID
			p := s.list("deals", back)
			require.Equal(t, titles(pages[i-1]), titles(p), "the page before page %d", i)
			require.True(t, p.HasNext)
			require.Equal(t, i > 1, p.HasPrev, "is there a page before page %d", i-1)
		}
	}
	walk(l, "t0", "t1", "t2", "t3", "t4", "t5", "t6")
	l.Descending = true
	walk(l, "t6", "t5", "t4", "t3", "t2", "t1", "t0")
	l.Descending, l.Filter, l.Limit = false, `stage = "won"`, 2
	walk(l, "t0", "t2", "t4", "t6")
	l.Limit = 4
	walk(l, "t0", "t2", "t4", "t6")
	l.Limit, l.Descending = 1, true
	walk(l, "t6", "t4", "t2", "t0")
}

func TestABackwardPageLooksBeyondItself(t *testing.T) {
	s := numbered(t, 4) // t0 and t2 are won
	all := s.list("deals", crm.ListQuery{Limit: 10, Count: crm.CountNone}).Records
	for _, c := range []struct {
		l    crm.ListQuery
		want bool
	}{
		{crm.ListQuery{Before: &all[3].ID}, true},
		{crm.ListQuery{Before: &all[3].ID, Fields: []string{"title"}}, true},
		{crm.ListQuery{Before: &all[0].ID}, true},
		{crm.ListQuery{Before: &all[2].ID, Filter: `stage = "won"`}, true},
		{crm.ListQuery{Before: &all[3].ID, Filter: `stage = "won"`}, false},
		{crm.ListQuery{Before: &all[3].ID, Filter: `stage = "won"`, Fields: []string{"title"}}, false},
		{crm.ListQuery{Before: &all[0].ID, Descending: true}, true},
		{crm.ListQuery{Before: &all[0].ID, Descending: true, Filter: `stage = "lost"`}, false},
		{crm.ListQuery{Before: &all[3].ID, Trash: true}, false},
	} {
		c.l.Limit, c.l.Count = 10, crm.CountExact
		require.Equal(t, c.want, s.list("deals", c.l).HasNext, "%+v", c.l)
	}
}

// A page is bounded by what it holds, not by the number of its records alone, and paging goes on where it ended.
func TestLargeRecordsMakeShortPages(t *testing.T) {
	s := open(t)
	var fields []crm.NewField
	for i := range 4 {
		fields = append(fields, crm.NewField{Key: fmt.Sprintf("t%d", i), Type: crm.Text})
	}
	s.pipeline(crm.NewPipeline{Key: "notes", Fields: fields})
	text, size := strings.Repeat("x", 60<<10), 4*60<<10
	record := fmt.Sprintf(`{"t0": %q, "t1": %q, "t2": %q, "t3": %q}`, text, text, text, text)
	n := crm.MaxPageBytes/size + 3
	var all []uuid.UUID
	for _, r := range s.creates("notes", n, func(int) string { return record }) {
		all = append(all, r.ID)
	}
	ids := func(p crm.Page) (out []uuid.UUID) {
		held := 0
		for _, r := range p.Records {
			out, held = append(out, r.ID), held+len(r.Data)
		}
		require.LessOrEqual(t, held, crm.MaxPageBytes)
		return out
	}
	for _, descending := range []bool{false, true} {
		want := slices.Clone(all)
		if descending {
			slices.Reverse(want)
		}
		l := crm.ListQuery{Limit: crm.MaxLimit, Descending: descending, Count: crm.CountNone}
		first := s.list("notes", l)
		require.Less(t, len(first.Records), n)
		require.True(t, first.HasNext)
		require.False(t, first.HasPrev)
		l.After = &first.Records[len(first.Records)-1].ID
		second := s.list("notes", l)
		require.False(t, second.HasNext)
		require.Equal(t, want, append(ids(first), ids(second)...))

		last := want[n-1]
		l.After, l.Before = nil, &last
		back := s.list("notes", l)
		require.True(t, back.HasPrev)
		front := back.Records[0].ID
		l.Before = &front
		rest := s.list("notes", l)
		require.False(t, rest.HasPrev)
		require.Equal(t, want[:n-1], append(ids(rest), ids(back)...), "backwards, a short page ends at its cursor")

		l.Before, l.Fields = nil, []string{"t0"}
		require.Len(t, s.list("notes", l).Records, n, "what counts is what is answered")
	}
}

func TestListFilters(t *testing.T) {
	s := numbered(t, 7)
	parent := s.create("deals", `{"title": "p", "due": "2026-11-23", "amount": 12.50}`)
	s.create("deals", `{"title": "a && b = \"c\"", "parent": "`+parent.ID.String()+`"}`)
	for filter, want := range map[string][]string{
		"":                                      {"t0", "t1", "t2", "t3", "t4", "t5", "t6", "p", `a && b = "c"`},
		`title = "t3"`:                          {"t3"},
		`amount = 3`:                            {"t3"},
		`amount = 3.0`:                          {"t3"},
		`amount = 12.5`:                         {"p"},
		`amount = 125e-1`:                       {"p"},
		`open = false`:                          {"t1", "t3", "t5"},
		`open = false && amount = 3`:            {"t3"},
		`open = true && amount = 3`:             nil,
		`due = "2026-11-23"`:                    {"p"},
		`parent = "` + parent.ID.String() + `"`: {`a && b = "c"`},
		`title = "a && b = \"c\""`:              {`a && b = "c"`},
		`title = "T3"`:                          nil,
		`title = "%"`:                           nil,
		`title = "' or 1=1 --"`:                 nil,
	} {
		p := s.list("deals", crm.ListQuery{Filter: filter, Limit: 50, Count: crm.CountExact})
		require.Equal(t, want, titles(p), filter)
		require.EqualValues(t, len(want), *p.Count, filter)
		few := s.list("deals", crm.ListQuery{Filter: filter, Limit: 1, Count: crm.CountExact, Fields: []string{"title"}})
		require.EqualValues(t, len(want), *few.Count, "%s: the count of a list with fields", filter)
	}
	p := s.list("deals", crm.ListQuery{Filter: `title = "t3"`, Limit: 1, Count: crm.CountNone, Fields: []string{"stage", "amount", "due"}})
	require.Nil(t, p.Count)
	require.JSONEq(t, `{"stage": "lost", "amount": 3}`, string(p.Records[0].Data), "a field without a value is not there")
}

// What is not understood is refused by the name of the parameter, and never read as "all".
func TestListRefuses(t *testing.T) {
	s := numbered(t, 3)
	good := crm.ListQuery{Limit: 50, Count: crm.CountNone}
	for name, c := range map[string]struct {
		change    func(*crm.ListQuery)
		parameter string
		want      string
	}{
		"limit 0":            {func(l *crm.ListQuery) { l.Limit = 0 }, "limit", "from 1 to 1000"},
		"limit -1":           {func(l *crm.ListQuery) { l.Limit = -1 }, "limit", "from 1 to 1000"},
		"limit 1001":         {func(l *crm.ListQuery) { l.Limit = 1001 }, "limit", "from 1 to 1000"},
		"count":              {func(l *crm.ListQuery) { l.Count = "estimate" }, "count", "none or exact"},
		"no count":           {func(l *crm.ListQuery) { l.Count = "" }, "count", "none or exact"},
		"unknown field":      {func(l *crm.ListQuery) { l.Fields = []string{"title", "nope"} }, "fields", `no field "nope"`},
		"empty field":        {func(l *crm.ListQuery) { l.Fields = []string{""} }, "fields", `no field ""`},
		"filter's field":     {func(l *crm.ListQuery) { l.Filter = `nope = 1` }, "filter", "it has: title, amount"},
		"filter's syntax":    {func(l *crm.ListQuery) { l.Filter = `title ~ "t"` }, "filter", "only the operator ="},
		"a field twice":      {func(l *crm.ListQuery) { l.Filter = `amount = 1 && amount = 2` }, "filter", "stands twice"},
		"text for a number":  {func(l *crm.ListQuery) { l.Filter = `amount = "1"` }, "filter", "amount must be a number"},
		"number for a text":  {func(l *crm.ListQuery) { l.Filter = `title = 1` }, "filter", "title must be a text"},
		"no choice":          {func(l *crm.ListQuery) { l.Filter = `stage = "Won"` }, "filter", "one of: won, lost"},
		"no date":            {func(l *crm.ListQuery) { l.Filter = `due = "today"` }, "filter", "a date such as"},
		"no id":              {func(l *crm.ListQuery) { l.Filter = `parent = "x"` }, "filter", "the id of a record"},
		"no boolean":         {func(l *crm.ListQuery) { l.Filter = `open = "true"` }, "filter", "true or false"},
		"NUL":                {func(l *crm.ListQuery) { l.Filter = `title = "\u0000"` }, "filter", "without NUL"},
		"an enormous number": {func(l *crm.ListQuery) { l.Filter = `amount = 1e999999999` }, "filter", "a number"},
		"a filter of 4,000":  {func(l *crm.ListQuery) { l.Filter = `title = "` + strings.Repeat("x", 4000) + `"` }, "filter", "3500"},
	} {
		l := good
		c.change(&l)
		err := s.write(func(ctx context.Context, q postgres.Querier) error {
			p, err := crm.List(ctx, q, "deals", l)
			require.Empty(t, p.Records, "%s: rows beside the error", name)
			return err
		})
		require.True(t, fault.Is(err, fault.Invalid), "%s: %v", name, err)
		f := fault.Of(err)
		require.Len(t, f.Fields, 1, name)
		require.Equal(t, c.parameter, f.Fields[0].Parameter, name)
		require.Contains(t, f.Message, c.want, name)
	}
	err := s.write(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.List(ctx, q, "nope", good)
		return err
	})
	refused(t, err, fault.NotFound, "unknown_pipeline")
}

// spy remembers the last statement that returned rows.
type spy struct {
	postgres.Querier
	sql  string
	args []any
}

func (s *spy) Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error) {
	s.sql, s.args = sql, args
	return s.Querier.Query(ctx, sql, args...)
}

// plan is how PostgreSQL carries out the list.
func plan(t *testing.T, s stage, l crm.ListQuery) (out string) {
	t.Helper()
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		seen := &spy{Querier: q}
		if _, err := crm.List(ctx, seen, "deals", l); err != nil {
			return err
		}
		rows, err := q.Query(ctx, "explain "+seen.sql, seen.args...)
		if err != nil {
			return err
		}
		lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
		out = strings.Join(lines, "\n")
		return err
	})
	return out
}

func TestAnIndexServesEachList(t *testing.T) {
	s := numbered(t, 5000)
	s.pipeline(crm.NewPipeline{Key: "notes"})
	s.creates("notes", 100, func(int) string { return `{}` })
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := q.Exec(ctx, `update records set deleted_at = now() where data @> '{"amount": 7}'`)
		return err
	})
	admin := pgtest.Admin(t, s.env.AdminURL)
	// As autovacuum does within a minute of such a load: until then the new entries wait, unsorted, in the index's
	// pending list, and a few thousand rows are read faster without it.
	_, err := admin.Exec(t.Context(), "vacuum analyze "+pgx.Identifier{s.at.Schema.String(), "records"}.Sanitize())
	require.NoError(t, err)
	for range 8 { // a prepared statement's plan becomes a generic one after a while, if PostgreSQL thinks it as good
		p := plan(t, s, crm.ListQuery{Filter: `title = "t4711"`, Limit: 50, Count: crm.CountNone})
		require.Contains(t, p, "Bitmap Index Scan on records_data", "the GIN index does not serve a selective filter:\n%s", p)
		require.NotContains(t, p, "Seq Scan", p)
	}
	middle := s.list("deals", crm.ListQuery{Filter: `title = "t2500"`, Limit: 1, Count: crm.CountNone}).Records[0].ID
	for name, l := range map[string]crm.ListQuery{
		"no filter":           {Limit: 50, Count: crm.CountNone},
		"no filter, backward": {Limit: 50, Descending: true, Count: crm.CountNone},
		"trash":               {Limit: 50, Trash: true, Count: crm.CountNone},
		"behind a record":     {Limit: 50, After: &middle, Count: crm.CountNone},
		"before a record":     {Limit: 50, Before: &middle, Count: crm.CountNone},
	} {
		p, index := plan(t, s, l), "records_live"
		if l.Trash {
			index = "records_trash"
		}
		require.Contains(t, p, index, "%s:\n%s", name, p)
		require.NotContains(t, p, "Sort", "%s: the index is in the order of the list:\n%s", name, p)
	}
	p := s.list("deals", crm.ListQuery{Filter: `title = "t4711"`, Limit: 50, Count: crm.CountExact})
	require.Equal(t, []string{"t4711"}, titles(p))
}

// Every record that is there from the beginning to the end of a walk is seen once, whatever is written meanwhile.
func TestPagingUnderWrites(t *testing.T) {
	for _, descending := range []bool{false, true} {
		t.Run(fmt.Sprintf("descending=%t", descending), func(t *testing.T) {
			s := numbered(t, 300)
			var there []uuid.UUID
			for _, r := range s.list("deals", crm.ListQuery{Limit: 1000, Count: crm.CountNone}).Records {
				there = append(there, r.ID)
			}
			ctx, cancel := context.WithCancel(t.Context())
			var writers sync.WaitGroup
			var mu sync.Mutex
			written := 0
			for w := range 2 {
				writers.Go(func() {
					for i := 0; ctx.Err() == nil && i < 2000; i++ {
						err := inTenant(ctx, s.env, s.at, func(ctx context.Context, q postgres.Querier) error {
							_, err := crm.CreateRecord(ctx, q, "deals", fmt.Appendf(nil, `{"title": "w%d-%d"}`, w, i), uuid.Nil)
							return err
						})
						if err != nil && ctx.Err() == nil {
							t.Errorf("write: %v", err)
							return
						}
						mu.Lock()
						written++
						mu.Unlock()
					}
				})
			}
			wait(t, "both write", func() bool { mu.Lock(); defer mu.Unlock(); return written > 10 })
			seen := map[uuid.UUID]int{}
			l := crm.ListQuery{Limit: 20, Descending: descending, Count: crm.CountNone}
			for {
				p := s.list("deals", l)
				require.True(t, slices.IsSortedFunc(p.Records, func(a, b crm.Record) int {
					c := strings.Compare(a.ID.String(), b.ID.String())
					if descending {
						return -c
					}
					return c
				}))
				for _, r := range p.Records {
					seen[r.ID]++
				}
				if !p.HasNext {
					break
				}
				l.After = &p.Records[len(p.Records)-1].ID
				if len(seen) > 1500 {
					break // the writers are ahead: what was there has been passed
				}
			}
			cancel()
			writers.Wait()
			for _, id := range there {
				require.Equal(t, 1, seen[id], "record %s", id)
			}
			for id, n := range seen {
				require.Equal(t, 1, n, "record %s", id)
			}
		})
	}
}

func TestOnePatchWinsPerVersion(t *testing.T) {
	s := open(t)
	s.pipeline(everyType())
	r := s.create("deals", `{"title": "t"}`)
	const workers, rounds = 4, 10
	for version := 1; version <= rounds; version++ {
		errs := make([]error, workers)
		var all sync.WaitGroup
		for w := range workers {
			all.Go(func() {
				errs[w] = inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error {
					_, err := crm.PatchRecord(ctx, q, "deals", r.ID, version, fmt.Appendf(nil, `{"amount": %d}`, w))
					return err
				})
			})
		}
		all.Wait()
		won := -1
		for w, err := range errs {
			if err == nil {
				require.Equal(t, -1, won, "version %d was changed twice", version)
				won = w
				continue
			}
			f := refused(t, err, fault.Stale, "stale")
			require.Equal(t, version+1, f.Details.(map[string]any)["current"].(crm.Record).Version)
		}
		require.NotEqual(t, -1, won, "nobody could change version %d", version)
		got, err := s.read("deals", r.ID)
		require.NoError(t, err)
		require.Equal(t, version+1, got.Version)
		require.JSONEq(t, fmt.Sprintf(`{"title": "t", "amount": %d}`, won), string(got.Data), "the winner's change is not what is stored")
	}
}

// before calls do before each statement that returns no rows.
type before struct {
	postgres.Querier
	do func()
}

func (b before) Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error) {
	b.do()
	return b.Querier.Exec(ctx, sql, args...)
}

// A relation and the purge of its target exclude each other, whichever comes first.
func TestARelationNeverDangles(t *testing.T) {
	s := open(t)
	s.pipeline(crm.NewPipeline{Key: "accounts"})
	s.pipeline(crm.NewPipeline{Key: "deals", Fields: []crm.NewField{
		{Key: "account", Type: crm.Relation, Options: crm.Options{Pipeline: "accounts"}}}})
	admin := pgtest.Admin(t, s.env.AdminURL)
	blocked := func() bool {
		var n int
		err := admin.QueryRow(t.Context(), `select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`).Scan(&n)
		require.NoError(t, err)
		return n > 0
	}
	point := func(ctx context.Context, q postgres.Querier, to uuid.UUID) error {
		_, err := crm.CreateRecord(ctx, q, "deals", fmt.Appendf(nil, `{"account": %q}`, to), uuid.Nil)
		return err
	}
	destroy := func(ctx context.Context, q postgres.Querier, id uuid.UUID) error {
		if _, err := crm.TrashRecord(ctx, q, "accounts", id, 0); err != nil {
			return err
		}
		return crm.PurgeRecord(ctx, q, "accounts", id, 0)
	}
	type act func(ctx context.Context, q postgres.Querier, id uuid.UUID) error
	race := func(first, second act) error {
		id := s.create("accounts", `{}`).ID
		var err error
		var other sync.WaitGroup
		s.ok(func(ctx context.Context, q postgres.Querier) error {
			if err := first(ctx, q, id); err != nil {
				return err
			}
			other.Go(func() {
				err = inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error { return second(ctx, q, id) })
			})
			wait(t, "the second one waits for the first", blocked)
			return nil
		})
		other.Wait()
		return err
	}
	refused(t, race(point, destroy), fault.Conflict, "referenced")
	refused(t, race(destroy, point), fault.Unfit, "dangling")

	// Between looking for relations and destroying, nobody can bring the record back and point at it.
	old := s.create("accounts", `{}`).ID
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		_, err := crm.TrashRecord(ctx, q, "accounts", old, 0)
		return err
	})
	var restored error
	var other sync.WaitGroup
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		return crm.PurgeRecord(ctx, before{q, func() {
			other.Go(func() {
				restored = inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error {
					_, err := crm.RestoreRecord(ctx, q, "accounts", old, 0)
					return err
				})
			})
			wait(t, "the restore waits for the purge", blocked)
		}}, "accounts", old, 0)
	})
	other.Wait()
	refused(t, restored, fault.NotFound, "unknown_record")

	// A version is checked when nobody else can change it any more.
	changed := s.create("accounts", `{}`).ID
	var trashed error
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		if _, err := crm.PatchRecord(ctx, q, "accounts", changed, 1, json.RawMessage(`{}`)); err != nil {
			return err
		}
		other.Go(func() {
			trashed = inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error {
				_, err := crm.TrashRecord(ctx, q, "accounts", changed, 1)
				return err
			})
		})
		wait(t, "the trash waits for the patch", blocked)
		return nil
	})
	other.Wait()
	refused(t, trashed, fault.Stale, "stale")

	// A patch of the target is no reason to wait: two that point at each other would wait for ever.
	to := s.create("accounts", `{}`).ID
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		if _, err := crm.PatchRecord(ctx, q, "accounts", to, 1, json.RawMessage(`{}`)); err != nil {
			return err
		}
		return inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error { return point(ctx, q, to) })
	})
}

// A field that changes and records that are written exclude each other: no record is written by the fields of before.
func TestFieldsHoldStillWhileRecordsAreWritten(t *testing.T) {
	s := open(t)
	s.pipeline(everyType())
	var err error
	var other sync.WaitGroup
	admin := pgtest.Admin(t, s.env.AdminURL)
	s.ok(func(ctx context.Context, q postgres.Querier) error {
		if err := crm.RemoveField(ctx, q, "deals", "stage", 0); err != nil {
			return err
		}
		other.Go(func() {
			err = inTenant(t.Context(), s.env, s.at, func(ctx context.Context, q postgres.Querier) error {
				_, err := crm.CreateRecord(ctx, q, "deals", json.RawMessage(`{"title": "t", "stage": "won"}`), uuid.Nil)
				return err
			})
		})
		wait(t, "the writer waits", func() (blocked bool) {
			require.NoError(t, admin.QueryRow(ctx, `select count(*) > 0 from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'`).Scan(&blocked))
			return blocked
		})
		return nil
	})
	other.Wait()
	refused(t, err, fault.Unfit, "unknown_field")
}

// Two tenants with pipelines of one name, through one pool of few connections, by the same statements.
func TestTenantsNeverMix(t *testing.T) {
	t.Parallel()
	env := pgtest.New(t, func(o *postgres.Options) { o.MaxConns = 2 })
	tenants := []tenant.Tenant{env.Tenant(t, "acme"), env.Tenant(t, "globex"), env.Tenant(t, "initech")}
	ids := make([]uuid.UUID, len(tenants))
	for i, at := range tenants {
		s := stage{t, env, at}
		// The fields stand in another order in each: a plan or a row of another tenant would show.
		p := everyType()
		p.Description = at.Slug.String()
		p.Fields = append(p.Fields[i:], p.Fields[:i]...)
		s.pipeline(p)
		ids[i] = s.create("deals", fmt.Sprintf(`{"title": %q}`, at.Slug)).ID
	}
	var all sync.WaitGroup
	for w := range 6 {
		all.Go(func() {
			for i := range 40 {
				n := (w + i) % len(tenants)
				at, name := tenants[n], tenants[n].Slug.String()
				err := inTenant(t.Context(), env, at, func(ctx context.Context, q postgres.Querier) error {
					made, err := crm.CreateRecord(ctx, q, "deals", fmt.Appendf(nil, `{"title": %q, "amount": %d}`, name, i), uuid.Nil)
					if err != nil {
						return err
					}
					p, err := crm.List(ctx, q, "deals", crm.ListQuery{Filter: fmt.Sprintf("amount = %d", i), Limit: 1000, Count: crm.CountNone})
					if err != nil {
						return err
					}
					if !slices.ContainsFunc(p.Records, func(r crm.Record) bool { return r.ID == made.ID }) {
						return fmt.Errorf("%s does not see what it has written", name)
					}
					for _, got := range titles(p) {
						if got != name {
							return fmt.Errorf("%s sees a record of %s", name, got)
						}
					}
					pl, err := crm.PipelineByKey(ctx, q, "deals")
					if err == nil && pl.Description != name {
						err = fmt.Errorf("%s sees the pipeline of %s", name, pl.Description)
					}
					return err
				})
				if err != nil {
					t.Errorf("worker %d: %v", w, err)
					return
				}
				for other, id := range ids {
					r, err := stage{t, env, at}.read("deals", id)
					if other == n {
						if err != nil || !strings.Contains(string(r.Data), name) {
							t.Errorf("%s reads its record as %s: %v", name, r.Data, err)
						}
					} else if !fault.Is(err, fault.NotFound) {
						t.Errorf("%s reads a record of %s: %s, %v", name, tenants[other].Slug, r.Data, err)
					}
				}
			}
		})
	}
	all.Wait()
}
