package transfer_test

import (
	"bytes"
	"context"
	"io"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// own is what a tenant has beyond its migrations.
const own = `create table notes (id serial primary key, book bigint references books (id), text text); insert into notes (book, text) values (1, 'mine');
create view emails as select name from authors; create function twice(i integer) returns integer language sql as 'select 2 * i'`

func (f *fixture) clone(p parts, t tenant.Tenant, as string, change ...func(*transfer.CloneOptions)) (transfer.Cloned, error) {
	o := transfer.CloneOptions{Slug: pgtest.Slug(f.t, as), Actor: "test"}
	for _, c := range change {
		c(&o)
	}
	return p.Clone(context.Background(), t, o)
}

// A clone is the original of one moment, own tables and all, under an id and a number of its own; what was written about
// the original in the registry stays there, and the original is as it was.
func TestClone(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	host, err := tenant.ParseHost("crm.acme.example")
	require.NoError(t, err)
	one, err := p.provision.Create(t.Context(), provision.CreateRequest{
		Slug: pgtest.Slug(t, "acme"), Settings: []byte(`{"public": {"colour": "teal"}, "number": 12345678901234567890.10}`), Domains: []tenant.Host{host}, Actor: "test"})
	require.NoError(t, err)
	f.in(one, rows)
	f.in(one, own)
	_, trailer := f.export(p, one)
	one, err = p.provision.Suspend(t.Context(), one.Slug, "test")
	require.NoError(t, err)

	done, err := f.clone(p, one, "copy")
	require.NoError(t, err)
	two := done.Tenant
	require.False(t, done.Neutralized, "there is no file that would")
	require.Equal(t, tenant.Active, two.State)
	require.NotEqual(t, one.ID, two.ID)
	require.NotEqual(t, one.Number, two.Number)
	_, have := f.export(p, two)
	require.Equal(t, trailer.Tables, have.Tables)
	require.Equal(t, trailer.Sequences, have.Sequences)
	require.Equal(t, pgtest.Fingerprint(t, f.admin, one.Schema.String(), f.role(one)), pgtest.Fingerprint(t, f.admin, two.Schema.String(), f.role(two)))
	require.Equal(t, "0", f.ask(two, `select count(*) from sessions`))
	require.Equal(t, "secret", f.ask(one, `select token from sessions`))
	require.Equal(t, 1, f.count(`select count(*) from public.domains where tenant = $1`, two.Number))
	require.Equal(t, 1, f.count(`select count(*) from public.tenants where number = $1 and settings @> '{"public": {"colour": "teal"}, "number": 12345678901234567890.10}'
and settings -> 'clone' ->> 'of' = 'acme' and settings -> 'clone' ->> 'id' = $2 and (settings -> 'clone' ->> 'at')::timestamptz > now() - interval '1 hour'`, two.Number, one.ID))
	require.Equal(t, 1, f.count(`select count(*) from public.tenants where number = $1 and not settings ? 'clone'`, one.Number))
	require.Equal(t, 1, f.count(`select count(*) from public.audit where action = 'tenant.create' and tenant = $1 and details -> 'clone_of' ->> 'slug' = 'acme'`, two.Number))
	require.Equal(t, 1, f.count(`select count(*) from public.audit where action = 'tenant.clone' and tenant = $1 and slug = 'acme' and details ->> 'to' = 'copy'`, one.Number))
	require.NoError(t, f.DB.InTenant(t.Context(), two, postgres.Write, func(tx *postgres.Tx) error {
		_, err := tx.Exec(t.Context(), `insert into authors (name) values ('its own')`)
		return err
	}))
	require.Equal(t, "0", f.ask(one, `select count(*) from authors where name = 'its own'`))
	f.Invariants(t)

	// A clone's clone is marked as the clone's.
	done, err = f.clone(p, two, "again")
	require.NoError(t, err)
	require.Equal(t, 1, f.count(`select count(*) from public.tenants where number = $1 and settings -> 'clone' ->> 'of' = 'copy'`, done.Tenant.Number))
}

// Without its rows a clone has the same structure, and what the migrations insert.
func TestCloneWithoutRows(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	f.in(one, own)
	done, err := f.clone(p, one, "copy", func(o *transfer.CloneOptions) { o.Empty = true })
	require.NoError(t, err)
	two := done.Tenant
	require.Zero(t, done.Trailer.Rows())
	require.Equal(t, pgtest.Fingerprint(t, f.admin, one.Schema.String(), f.role(one)), pgtest.Fingerprint(t, f.admin, two.Schema.String(), f.role(two)))
	require.Equal(t, "by the migration", f.ask(two, `select string_agg(key, ',') from seeded`))
	for _, table := range []string{"authors", "books", "notes", "parts", "types", "counted", `"Odd ""Name"`} {
		require.Equal(t, "0", f.ask(two, `select count(*) from `+table), table)
	}
	require.Equal(t, "100", f.ask(two, `select nextval('tickets')`))
	f.Invariants(t)
}

// What the folder's own file takes off is off before anybody sees the clone, by words of the newest version, in the clone only.
func TestCloneIsNeutralized(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	old := f.with(first)
	one := f.tenant(old, "acme")
	f.in(one, rows)
	p := f.with(first, `alter table authors add column token text default 'live'`,
		`neutralize:-- mail and keys
update authors set token = 'off'; delete from seeded; insert into seeded values ('neutral');`)
	done, err := f.clone(p, one, "copy")
	require.NoError(t, err)
	two := done.Tenant
	require.True(t, done.Neutralized)
	require.Equal(t, "0", f.ask(two, `select count(*) from authors where token <> 'off'`))
	require.Equal(t, "neutral", f.ask(two, `select string_agg(key, ',') from seeded`))
	require.Equal(t, "1", f.ask(two, `select count(distinct xmin::text) from (select xmin from seeded union all select xmin from books) x`), "one transaction")
	require.Equal(t, "another", f.ask(one, `select string_agg(key, ',') from seeded`))
	f.Invariants(t)

	// One that fails leaves no clone: one that is not neutralised is none.
	bad := f.with(first, `alter table authors add column token text default 'live'`, "neutralize:select 1;\ndelete from no_such_table")
	_, err = f.clone(bad, one, "other")
	require.True(t, fault.Is(err, fault.Unfit), "%v", err)
	require.ErrorContains(t, err, "neutralize.sql failed in line 2")
	f.nothing("other")
}

// What is refused leaves nothing; a failure of the one side is told, and not what it did to the other.
func TestCloneRefused(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	f.tenant(p, "beta")
	_, err := f.clone(p, one, "acme")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	_, err = f.clone(p, one, "beta")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "exists already")
	_, err = f.clone(p, one, "copy", func(o *transfer.CloneOptions) { o.Group = "nowhere" })
	require.Error(t, err)
	f.nothing("copy")
	newer := f.with(first, `alter table authors add column token text`)
	two, err := newer.provision.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, "newer"), Actor: "test"})
	require.NoError(t, err)
	_, err = f.clone(p, two, "copy")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	f.nothing("copy")
	_, err = f.admin.Exec(t.Context(), `alter schema acme rename to elsewhere`)
	require.NoError(t, err)
	_, err = f.clone(p, one, "copy")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
	require.ErrorContains(t, err, "not where the registry says")
	f.nothing("copy")
}

// A clone goes into another group's database when that is asked for, and stays in the original's otherwise.
func TestCloneIntoAnotherGroup(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	second := f.SecondGroup(t)
	db, _, _ := f.Open(t, func(o *postgres.Options) { o.Groups["second"] = second })
	p := f.on(db, first)
	_, err := p.migrate.Shared(t.Context())
	require.NoError(t, err)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	_, trailer := f.export(p, one)
	done, err := f.clone(p, one, "copy", func(o *transfer.CloneOptions) { o.Group = "second" })
	require.NoError(t, err)
	require.Equal(t, "second", done.Tenant.Group)
	_, have := f.export(p, done.Tenant)
	require.Equal(t, trailer.Tables, have.Tables)
	done, err = f.clone(p, done.Tenant, "again")
	require.NoError(t, err)
	require.Equal(t, "second", done.Tenant.Group)
	require.WithinDuration(t, time.Now(), done.Tenant.CreatedAt, time.Hour)
}

// Who was erased comes back from no archive, under no name and in nobody's place, unless named; also not from one that was
// being read when it was erased.
func TestErasedStaysErased(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one, other := f.tenant(p, "acme"), f.tenant(p, "beta")
	f.in(one, rows)
	f.in(one, `insert into log (what) select md5(i::text) || md5((-i)::text) from generate_series(1, 100000) i`) // more than a reader reads ahead
	b, trailer := f.export(p, one)
	id := one.ID
	erase := func(t *testing.T) {
		t.Helper()
		_, err := p.provision.Erase(t.Context(), one.Slug, provision.EraseRequest{Actor: "test"})
		require.NoError(t, err)
	}
	began := 0
	during := func() *readerAt {
		return &readerAt{b: b, at: len(b) / 2, do: func() { began++; erase(t) }}
	}
	_, _, err := p.Import(t.Context(), during(), transfer.ImportOptions{Slug: pgtest.Slug(t, "copy"), Loading: transfer.Loading{Actor: "test"}})
	require.Equal(t, 1, began)
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "which was erased at")
	f.nothing("copy")

	for _, as := range []string{"", "copy"} {
		_, err := f.load(p, b, as)
		require.True(t, fault.Is(err, fault.Conflict), "%v", err)
		require.ErrorContains(t, err, "which was erased at")
		f.nothing("copy")
		require.Zero(t, f.count(`select count(*) from public.tenants where slug = 'acme' and state <> 'purged'`))
	}
	_, _, err = p.Restore(t.Context(), other, bytes.NewReader(b), time.Hour, true, transfer.Loading{Actor: "test"})
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "which was erased at")
	_, err = f.load(p, b, "copy", func(o *transfer.ImportOptions) { o.Erased = other.ID })
	require.True(t, fault.Is(err, fault.Invalid), "%v", err)
	_, err = f.admin.Exec(t.Context(), `update public.erasures set actor = 'nobody'`)
	require.NoError(t, err)
	_, err = f.load(p, b, "copy")
	require.ErrorContains(t, err, "was changed since")

	two, err := f.load(p, b, "", func(o *transfer.ImportOptions) { o.Erased = id })
	require.NoError(t, err)
	require.NotEqual(t, id, two.ID)
	_, have := f.export(p, two)
	require.Equal(t, trailer.Tables, have.Tables)
	f.Invariants(t)
}

// Nor from one while the erasure is under way, waiting for whoever is at the tenant or for its store: there is no record yet.
func TestNobodyComesBackWhileErased(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one, other := f.tenant(p, "acme"), f.tenant(p, "beta")
	f.in(one, rows)
	b, _ := f.export(p, one)
	_, err := f.admin.Exec(t.Context(), `select pg_advisory_lock($1::int4, $2::int4)`, postgres.OperationLock, one.Number)
	require.NoError(t, err)
	erased := make(chan error, 1)
	go func() {
		_, err := p.provision.Erase(context.Background(), one.Slug, provision.EraseRequest{Actor: "test"})
		erased <- err
	}()
	require.Eventually(t, func() bool { return f.count(`select count(*) from public.operations where state = 'running'`) == 1 }, pgtest.Patience, time.Millisecond)
	_, err = f.load(p, b, "copy")
	require.True(t, fault.Is(err, fault.Conflict), "%v", err)
	require.ErrorContains(t, err, "which is being erased")
	_, _, err = p.Restore(t.Context(), other, bytes.NewReader(b), time.Hour, true, transfer.Loading{Actor: "test"})
	require.ErrorContains(t, err, "which is being erased")
	_, err = p.Diff(t.Context(), other, bytes.NewReader(b), true, transfer.Parts{}, transfer.Loading{Actor: "test"})
	require.ErrorContains(t, err, "which is being erased")
	f.nothing("copy")
	_, err = f.admin.Exec(t.Context(), `select pg_advisory_unlock_all()`)
	require.NoError(t, err)
	if err := <-erased; err != nil { // it had waited long enough, and is gone on with
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
		f.died()
		_, err = p.provision.Erase(t.Context(), one.Slug, provision.EraseRequest{Actor: "test"})
		require.NoError(t, err)
	}
	_, err = f.load(p, b, "copy")
	require.ErrorContains(t, err, "which was erased at")
	f.Invariants(t)
}

// readerAt is an archive that something happens to when half of it has been read.
type readerAt struct {
	b    []byte
	at   int
	done bool
	n    int
	do   func()
}

func (r *readerAt) Read(p []byte) (int, error) {
	if r.n == len(r.b) {
		return 0, io.EOF
	}
	if r.n >= r.at && !r.done {
		r.done = true
		r.do()
	}
	end := len(r.b)
	if !r.done {
		end = r.at
	}
	n := copy(p, r.b[r.n:end])
	r.n += n
	return n, nil
}

// What moves have left of an erased tenant in other databases goes with it, the role last: two databases may share it.
func TestEraseAfterAMove(t *testing.T) {
	t.Parallel()
	for _, apart := range []bool{false, true} {
		f := newMoving(t, apart)
		one, other := f.tenant(f.p, "acme"), f.tenant(f.p, "beta")
		f.in(one, rows)
		role := f.role(one)
		_, err := f.move(one, "second")
		require.NoError(t, err)
		_, err = f.move(other, "second")
		require.NoError(t, err)
		e, err := f.p.provision.Erase(t.Context(), one.Slug, provision.EraseRequest{Actor: "test"})
		require.NoError(t, err)
		require.Equal(t, 1, e.Destroyed.Kept)
		for group, c := range map[string]*pgx.Conn{postgres.MainGroup: f.admin, "second": f.second} {
			for _, sql := range []string{
				`select count(*) from public.placements where number = $1`, `select count(*) from public.moved where tenant = $1`,
				`select count(*) from public.ledger where set = 'tenant' and tenant = $1`, `select count(*) from pg_namespace where nspname = 'acme' or nspname ~ ('^oneo_[a-z]+_' || $1::int || '(_|$)')`,
			} {
				var n int
				require.NoError(t, c.QueryRow(t.Context(), sql, one.Number).Scan(&n))
				require.Zero(t, n, "%s: %s", group, sql)
			}
			var n int
			require.NoError(t, c.QueryRow(t.Context(), `select count(*) from pg_roles where rolname = $1`, role).Scan(&n))
			require.Zero(t, n, group)
			require.NoError(t, c.QueryRow(t.Context(), `select count(*) from public.placements where number = $1`, other.Number).Scan(&n))
			require.Equal(t, 1, n, "of another tenant all is there")
		}
		require.NoError(t, f.write(f.now(other), "still"))
	}
}
