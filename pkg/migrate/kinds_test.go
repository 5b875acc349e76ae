package migrate_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

func TestLoadKinds(t *testing.T) {
	t.Parallel()
	const noTx = "-- oneo: no-transaction\n"
	for what, c := range map[string]struct {
		fs   fstest.MapFS
		want string // in the error, with its hint; empty: good
	}{
		"no transaction":      {files("0001_a.up.sql", "-- why\n\n"+noTx+"create index concurrently i on a (b); vacuum a; alter type t add value 'x'; create table b (id int)"), ""},
		"breaking":            {files("0001_a.up.sql", "-- oneo: breaking\nselect 1"), ""},
		"data":                {files("0001_a.data.sql", "-- oneo: batch 10\n-- oneo: beside\nupdate a set b = 1 where id in (select id from a where b is null limit $1)"), ""},
		"data with":           {files("0001_a.data.sql", "with x as (select id from a limit 5) delete from a using x where a.id = x.id;"), ""},
		"down of data":        {files("0001_a.data.sql", "delete from a", "0001_a.down.sql", "select 1"), ""},
		"unknown":             {files("0001_a.up.sql", "-- oneo: no-transactions\nselect 1"), "did you mean -- oneo: no-transaction?"},
		"far from any":        {files("0001_a.up.sql", "-- oneo: xyzzy\nselect 1"), "they are no-transaction"},
		"capitals":            {files("0001_a.up.sql", "-- oneo: Breaking\nselect 1"), "line 1: there is no directive"},
		"below":               {files("0001_a.up.sql", "select 1;\n\n-- oneo: breaking\nselect 2"), "line 3: a directive stands below"},
		"not below":           {files("0001_a.up.sql", "select '\n-- oneo: breaking\n'"), ""},
		"twice":               {files("0001_a.up.sql", "-- oneo: breaking\n-- oneo: breaking\nselect 1"), "line 2: the directive breaking stands twice"},
		"value":               {files("0001_a.up.sql", "-- oneo: breaking yes\nselect 1"), "takes no value"},
		"batch of schema":     {files("0001_a.up.sql", "-- oneo: batch 5\nselect 1"), "0001_a.data.sql"},
		"beside of schema":    {files("0001_a.up.sql", "-- oneo: beside\nselect 1"), "for data migrations"},
		"no batch":            {files("0001_a.data.sql", "-- oneo: batch\ndelete from a where id < $1"), "from 1 to"},
		"batch 0":             {files("0001_a.data.sql", "-- oneo: batch 0\ndelete from a where id < $1"), "from 1 to"},
		"batch of literal":    {files("0001_a.data.sql", "-- oneo: batch 5\ndelete from a where b = '$1'"), "takes no $1"},
		"data no-transaction": {files("0001_a.data.sql", noTx+"delete from a"), "contradicts"},
		"breaking beside":     {files("0001_a.data.sql", "-- oneo: beside\n-- oneo: breaking\ndelete from a"), "a data migration cannot be breaking"},
		"breaking data":       {files("0001_a.data.sql", "-- oneo: breaking\ndelete from a"), "into a transactional file of its own before this one"},
		"breaking apart":      {files("0001_a.up.sql", noTx+"-- oneo: breaking\nvacuum a"), "a file without a transaction cannot be breaking"},
		"goose breaking":      {files("0001_a.sql", "-- oneo: breaking\n-- +goose NO TRANSACTION\n-- +goose Up\nvacuum a"), "a file without a transaction cannot be breaking"},
		"two statements":      {files("0001_a.data.sql", "delete from a; delete from b"), "one statement, not 2"},
		"no statement":        {files("0001_a.data.sql", "-- nothing\n;"), "one statement, not 0"},
		"$2":                  {files("0001_a.data.sql", "delete from a where id = $2"), "$2"},
		"reads":               {files("0001_a.data.sql", "with x as (delete from a returning 1) select count(*) from x"), "it reads"},
		"skip locked":         {files("0001_a.data.sql", "update a set b = 1 where id in (select id from a where b is null limit $1 for update SKIP\n-- on\nlocked)"), "would be done without them"},
		"for update":          {files("0001_a.data.sql", "update a set skip = locked where id in (select id from a where b = 'skip locked' limit $1 for update)"), ""},
		"ddl data":            {files("0001_a.data.sql", "create table a (id int)"), "insert, update, delete or merge"},
		"up and data":         {files("0001_a.data.sql", "delete from a", "0001_a.up.sql", "select 1"), "stands twice"},
		"directive down":      {files("0001_a.up.sql", "select 1", "0001_a.down.sql", noTx+"select 1"), "takes no directive"},
		"control":             {files("0001_a.up.sql", noTx+"create table a (id int);\ncommit"), "line 3: commit is transaction control"},
		"control in data":     {files("0001_a.data.sql", "commit"), "transaction control"},
		"nameless":            {files("0001_a.up.sql", noTx+"\ncreate index concurrently on a (b)"), "line 3: this statement cannot be resumed: an index that is made concurrently needs a name"},
		"qualified":           {files("0001_a.up.sql", noTx+"drop index concurrently if exists other.i"), "leaves the tenant"},
		"two indexes":         {files("0001_a.up.sql", noTx+"drop index concurrently i, j"), "one index at a time"},
		"long":                {files("0001_a.up.sql", noTx+"create index concurrently "+strings.Repeat("i", 64)+" on a (b)"), "longer than 63 bytes"},
		"vacuum all":          {files("0001_a.up.sql", noTx+"vacuum (full)"), "beyond the tenant"},
		"reindex all":         {files("0001_a.up.sql", noTx+"reindex (verbose) database concurrently x"), "beyond the tenant"},
		"system":              {files("0001_a.up.sql", noTx+"alter system set a = 1"), "beyond the tenant"},
		"nothing":             {files("0001_a.up.sql", noTx), "holds no statement"},
		"open quote":          {files("0001_a.up.sql", "select 1;\nselect 'x"), "line 2: a quote or comment does not end"},
		"open comment":        {files("0001_a.up.sql", "select 1; /* x /* y */"), "does not end"},
		"open dollar":         {files("0001_a.up.sql", "do $x$ begin end $y$"), "does not end"},

		"goose":                {files("0001_a.sql", "-- +goose Up\n-- +goose StatementBegin\ncreate table a (id int);\n-- +goose StatementEnd\n-- +goose Down\ndrop table a;"), ""},
		"goose up only":        {files("0001_a.sql", "-- +goose up\ncreate table a (id int);"), ""},
		"goose no transaction": {files("0001_a.sql", "-- +goose NO TRANSACTION\n-- +goose Up\nvacuum a;\n-- +goose Down\ndrop index concurrently x;"), ""},
		"goose stamp":          {files("20240101120000_a.sql", "-- +goose Up\nselect 1"), "goose fix"},
		"goose nothing":        {files("0001_a.sql", "select 1"), "is not named like a migration"},
		"goose before":         {files("0001_a.sql", "select 1;\n-- +goose Up\nselect 1"), "line 1: a statement stands before"},
		"goose order":          {files("0001_a.sql", "-- +goose Down\nselect 1;\n-- +goose Up\nselect 1"), "line 1: +goose Down is not understood here"},
		"goose unknown":        {files("0001_a.sql", "-- +goose Up\n-- +goose ENVSUB ON\nselect 1"), "line 2: +goose ENVSUB ON"},
		"goose open":           {files("0001_a.sql", "-- +goose Up\n-- +goose StatementBegin\nselect 1;\n-- +goose Down\nselect 1"), "line 2: StatementBegin without"},
		"goose and ours":       {files("0001_a.sql", "-- +goose Up\nselect 1", "0001_a.up.sql", "select 1"), "stands twice"},
		"goose control":        {files("0001_a.sql", "-- +goose Up\nselect 1;\n-- +goose Down\nselect 1;\ncommit;"), "line 5: commit"},
	} {
		_, err := migrate.Load(c.fs, ".")
		if c.want == "" {
			require.NoErrorf(t, err, what)
			continue
		}
		require.Truef(t, fault.Is(err, fault.Invalid), "%s: %v", what, err)
		require.Containsf(t, err.Error()+" "+fault.Of(err).Hint, c.want, what)
	}

	got, err := migrate.Load(files(
		"0001_a.sql", "-- +goose Up\ncreate table a (id int);\n-- +goose Down\ndrop table a;",
		"0002_b.up.sql", "-- oneo: no-transaction\nselect 1",
		"0003_c.data.sql", "-- oneo: beside\ndelete from a", "0004_d.data.sql", "-- oneo: batch 7\ndelete from a where id < $1"), ".")
	require.NoError(t, err)
	require.Equal(t, "\n\n-- +goose Down\ndrop table a;", got[0].Down, "lines keep their numbers")
	require.NotContains(t, got[0].Up, "drop")
	require.Equal(t, []migrate.Kind{migrate.Transactional, migrate.NoTransaction, migrate.Data, migrate.Data}, []migrate.Kind{got[0].Kind, got[1].Kind, got[2].Kind, got[3].Kind})
	require.True(t, got[2].Beside && !got[3].Beside)
	require.Equal(t, []int{migrate.DefaultBatch, 7}, []int{got[2].Batch, got[3].Batch})
	changed, err := migrate.Load(files("0001_a.sql", "-- +goose Up\ncreate table a (id int);\n-- +goose Down\ndrop table a cascade;"), ".")
	require.NoError(t, err)
	require.Equal(t, got[0].Checksum, changed[0].Checksum, "a step down may be mended, as in a file of its own")

	_, err = migrate.New(nil, migrate.Options{Files: fstest.MapFS{"group/0001_a.up.sql": {Data: []byte("-- oneo: no-transaction\nvacuum a")}, "shared/0001_a.up.sql": {Data: []byte("x")}, "tenant/0001_a.up.sql": {Data: []byte("x")}}})
	require.ErrorContains(t, err, "only a tenant's migrations")
	up := func(context.Context, *postgres.OwnerTx) error { return nil }
	batch := func(context.Context, *postgres.OwnerTx, int) (int64, error) { return 0, nil }
	for want, fn := range map[string]migrate.Func{
		"either Up or Batch": {Version: 1, Name: "a", Key: "k"}, "lacks a key": {Version: 1, Name: "a", Up: up}, "its name": {Version: 1, Name: "a'b", Key: "k", Up: up},
		"cannot be breaking": {Version: 1, Name: "a", Key: "k", Batch: batch, Breaking: true},
		"go with Batch":      {Version: 1, Name: "a", Key: "k", Up: up, Beside: true}, "above 0": {Name: "a", Key: "k", Up: up}, "is missing": {Version: 2, Name: "a", Key: "k", Up: up},
	} {
		_, err := migrate.New(nil, migrate.Options{Files: schemas.Files, Tenant: fstest.MapFS{}, Funcs: []migrate.Func{fn}})
		require.ErrorContains(t, err, want)
	}
	_, err = migrate.New(nil, migrate.Options{Files: schemas.Files, Funcs: []migrate.Func{{Version: 1, Name: "a", Key: "k", Up: up}}})
	require.ErrorContains(t, err, "stands twice")
}

// steps is a fixture whose tenant stands at version 1, with a table a, and whose later files a test chooses.
type steps struct {
	env *pgtest.Env
	fs  fstest.MapFS
	a   tenant.Tenant
}

func newSteps(t *testing.T) *steps {
	t.Helper()
	s := &steps{env: pgtest.New(t), fs: files("0001_a.up.sql", "create table a (id int primary key, n int);", "0001_a.down.sql", "drop table a;")}
	s.a = create(t, provisioner(t, s.env.DB, with(t, s.env.DB, s.fs)), "acme")
	return s
}

func (s *steps) put(name, sql string) { s.fs[name] = &fstest.MapFile{Data: []byte(sql)} }

func (s *steps) migrator(t *testing.T, change ...func(*migrate.Options)) *migrate.Migrator {
	t.Helper()
	o := migrate.Options{Files: schemas.Files, Tenant: s.fs, LockWait: pgtest.Patience}
	for _, f := range change {
		f(&o)
	}
	m, err := migrate.New(s.env.DB, o)
	require.NoError(t, err)
	return m
}

func (s *steps) exec(t *testing.T, sql string) {
	t.Helper()
	require.NoError(t, s.env.DB.AsOwnerIn(t.Context(), s.a, func(tx *postgres.OwnerTx) error { return tx.Script(t.Context(), sql) }))
}

// scalar asks in the tenant's schema.
func (s *steps) scalar(t *testing.T, sql string) string {
	t.Helper()
	var got string
	require.NoError(t, s.env.DB.AsOwnerIn(t.Context(), s.a, func(tx *postgres.OwnerTx) error {
		return tx.QueryRow(t.Context(), `select coalesce((`+sql+`)::text, 'null')`).Scan(&got)
	}))
	return got
}

func (s *steps) version(t *testing.T) string {
	t.Helper()
	return s.scalar(t, fmt.Sprintf(`select concat_ws(' ', version, (select string_agg(version::text, ',' order by version) from public.ledger where tenant = %d)) from public.placements where number = %[1]d`, s.a.Number))
}

// Behaviours F 104, 111: a target in between, one out of range, one that the tenant is beyond.
func TestTarget(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.put("0002_b.up.sql", "create table b (id int)")
	s.put("0003_c.up.sql", "create table c (id int)")
	m := s.migrator(t)
	for _, bad := range []int{-1, 4} {
		_, err := m.Tenant(ctx, s.a, migrate.TenantOptions{Target: bad})
		requireFault(t, err, fault.Invalid, "target_out_of_range")
	}
	res, err := m.Tenant(ctx, s.a, migrate.TenantOptions{Target: 2})
	require.NoError(t, err)
	require.Equal(t, []int{1, 2}, []int{res.From, res.To})
	require.Equal(t, "2 1,2", s.version(t))
	res, err = m.Tenant(ctx, s.a, migrate.TenantOptions{Target: 1})
	require.NoError(t, err, "ahead of the target is nothing to do")
	require.Equal(t, []int{2, 2, 0}, []int{res.From, res.To, len(res.Applied)})
	behind, err := m.TenantsBehind(ctx, "main")
	require.NoError(t, err)
	require.Equal(t, []migrate.Behind{{Number: s.a.Number, Version: 2}}, behind)
}

// Behaviours F 97, 118: a rehearsal leaves nothing, says what fails, and refuses what it could not take back.
func TestRehearse(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.put("0002_b.up.sql", "create table b (id int, a int references a deferrable initially deferred); insert into b values (1, 1)")
	s.put("0003_c.up.sql", "create table c (id int)")
	_, err := s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{Rehearse: true})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Contains(t, err.Error(), "deferred", "what would fail by the commit fails the rehearsal")
	s.exec(t, "insert into a values (1)")
	res, err := s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{Rehearse: true})
	require.NoError(t, err)
	require.Equal(t, []int{1, 3, 2}, []int{res.From, res.To, len(res.Applied)})
	require.Equal(t, "1 1", s.version(t))
	require.Equal(t, "null", s.scalar(t, "select to_regclass('b')"))
	for name, sql := range map[string]string{"0004_d.up.sql": "-- oneo: no-transaction\nvacuum a", "0004_d.data.sql": "delete from a"} {
		s.put(name, sql)
		_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{Rehearse: true})
		requireFault(t, err, fault.Invalid, "not_transactional")
		require.Contains(t, err.Error(), "0004_d")
		_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{Rehearse: true, Target: 3})
		require.NoError(t, err)
		delete(s.fs, name)
	}
	require.Equal(t, "1 1", s.version(t))
	s.env.Invariants(t)
}

// The place of a failure is right although the files are sent as one, and whatever PostgreSQL tells.
func TestPlaceOfFailure(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.exec(t, "insert into a values (1, 1), (2, 1)")
	s.put("0002_b.up.sql", "create table b (\n id int\n);\n-- ümläut;\nselect 1;")
	for sql, want := range map[string]string{
		"select 'é';\n\nselect\n  nonsense;":                                                                           "statement 2, line 4 (SQLSTATE 42703)",
		"create table c (id int);\ncreate tabel d (id int);":                                                           "statement 2, line 2 (SQLSTATE 42601)",
		"\nalter table a add constraint u unique (n);":                                                                 "statement 1, line 2 (SQLSTATE 23505)", // PostgreSQL tells no position
		"select 1; select 2;;\n;\n/* ; */ select 1/n from (select 0 as n) x;":                                          "statement 3, line 3 (SQLSTATE 22012)",
		"create function f() returns int language sql\nbegin atomic select 1; end;\ndo $$ begin\n perform 1/0; end $$": "statement 2, line 3 (SQLSTATE 22012)",
		"insert into a\nselect 1, 1":                                                                                   "statement 1, line 1 (SQLSTATE 23505)",
	} {
		s.put("0003_c.up.sql", sql)
		_, err := s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
		requireFault(t, err, fault.Unfit, "migration_failed")
		require.Containsf(t, fault.Of(err).Message, "0003_c failed in "+want, "%s", sql)
		require.Contains(t, fault.Of(err).Message, "the tenant is at version 1")
	}
	s.put("0003_c.up.sql", "select 1;")
	s.put("0004_d.up.sql", "-- oneo: no-transaction\ncreate table d (id int);\n\ncreate unique index concurrently u\n on a (n);")
	res, err := s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Contains(t, fault.Of(err).Message, "0004_d failed in statement 2, line 4 (SQLSTATE 23505); the tenant is at version 3")
	require.Equal(t, []int{1, 3, 2}, []int{res.From, res.To, len(res.Applied)}, "F 105: what was applied before is told")
	require.Equal(t, "null", s.scalar(t, "select to_regclass('u')"), "an index that cannot be is not left behind, invalid")
	require.Equal(t, "d", s.scalar(t, "select to_regclass('d')"))

	// What is done must stay as it is; what has failed may be mended.
	s.put("0004_d.up.sql", "-- oneo: no-transaction\ncreate table e (id int);\ncreate index concurrently u\n on a (n);")
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Conflict, "edited_migration")
	s.put("0004_d.up.sql", "-- oneo: no-transaction\ncreate table d (id int);\n\ncreate index concurrently u\n on a (n);")
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "4 1,2,3,4", s.version(t))
	s.env.Invariants(t)
}

// An index that somebody else has made is no index that the migration has made.
func TestNothingIsSwallowed(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.exec(t, "insert into a values (1); create index i on a (id)")
	s.put("0002_b.up.sql", "-- oneo: no-transaction\ncreate index concurrently i on a (n);")
	var err error
	for range 2 { // the second attempt must not take it for what the first has made
		_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
		requireFault(t, err, fault.Unfit, "migration_failed")
		require.Contains(t, err.Error(), "42P07")
	}
	require.Contains(t, s.scalar(t, "select pg_get_indexdef('i'::regclass)"), "(id)")
	s.put("0002_b.up.sql", "-- oneo: no-transaction\ndrop index concurrently j;")
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Contains(t, err.Error(), "42704")
	s.put("0002_b.up.sql", "-- oneo: no-transaction\ndrop index concurrently i;\ncreate index concurrently i on a (n);")
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Contains(t, s.scalar(t, "select pg_get_indexdef('i'::regclass)"), "(n)")
}

// On an empty table an index is made at once: it waits for no old transaction.
func TestPlainFormOnAnEmptyTable(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	old := pgtest.Admin(t, s.env.AdminURL)
	_, err := old.Exec(ctx, `begin isolation level repeatable read; select from public.placements`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	s.put("0002_b.up.sql", "-- oneo: no-transaction\ncreate index concurrently i on a (n);")
	_, err = s.migrator(t, func(o *migrate.Options) { o.LockWait = 200 * time.Millisecond }).Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "2 1,2", s.version(t))
	require.Equal(t, "true", s.scalar(t, "select indisvalid from pg_index where indexrelid = 'i'::regclass"))
}

// A partition whose detaching was cut short is finished.
func TestDetachIsFinished(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.exec(t, "create table p (id int) partition by range (id); create table q partition of p for values from (0) to (10); insert into p values (1)")
	s.put("0002_b.up.sql", "-- oneo: no-transaction\nalter table p detach partition q concurrently;")
	reader := pgtest.Admin(t, s.env.AdminURL)
	_, err := reader.Exec(ctx, `begin isolation level repeatable read; select from acme.p`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	m := s.migrator(t)
	res, err := m.Tenant(ctx, s.a, migrate.TenantOptions{LockTimeout: 100 * time.Millisecond})
	require.Truef(t, isLocked(err), "%v", err)
	require.Less(t, res.Duration, pgtest.Patience/2, "it must not be as patient as an index, for its lock is one that readers meet")
	require.Equal(t, "true", s.scalar(t, "select inhdetachpending from pg_inherits where inhrelid = 'q'::regclass"))
	_, err = reader.Exec(ctx, `rollback`)
	require.NoError(t, err)
	_, err = m.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "0 1", s.scalar(t, "select concat_ws(' ', (select count(*) from pg_inherits where inhrelid = 'q'::regclass), (select count(*) from q))"))
}

// A statement that changes the same rows again and again is stopped.
func TestEndlessDataMigration(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.exec(t, "insert into a select generate_series(1, 200)")
	s.put("0002_b.data.sql", "-- oneo: batch 1000\nupdate a set n = coalesce(n, 0) + 1 where id <= $1")
	_, err := s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "data_migration_endless")
	var n int
	_, err2 := fmt.Sscan(s.scalar(t, "select max(n) from a"), &n)
	require.NoError(t, err2)
	require.Less(t, n, 2*migrate.FreeBatches)
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "data_migration_endless")
	st, err := s.migrator(t).Status(ctx)
	require.NoError(t, err)
	require.Len(t, st.Unfinished, 1)
	require.Equal(t, migrate.Unfinished{Group: "main", Version: 2, Name: "b", Tenants: 1, Rows: st.Unfinished[0].Rows}, st.Unfinished[0])
	s.put("0002_b.data.sql", "update a set n = -1 where n >= 0")
	_, err = s.migrator(t).Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "2 1,2", s.version(t))
	s.env.Invariants(t)
}

// A data migration beside others: its version counts at once, its batches come last, and until they are done the tenant
// is behind; marking it says that they are.
func TestBeside(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.exec(t, "insert into a select generate_series(1, 5)")
	s.put("0002_b.data.sql", "-- oneo: batch 2\n-- oneo: beside\nupdate a set n = c where id in (select id from a where n is null limit $1)") // needs what comes later
	s.put("0003_c.up.sql", "alter table a add column c int not null default 7;")
	stop := errors.New("stop")
	cctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	m := s.migrator(t)
	res, err := m.Tenant(cctx, s.a, migrate.TenantOptions{Throttle: time.Millisecond, Progress: func(migrate.Progress) { cancel(stop) }})
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, []int{1, 3}, []int{res.From, res.To})
	require.Equal(t, "3 1,2,3", s.version(t))
	require.Equal(t, "2", s.scalar(t, "select count(*) from a where n = 7"))
	behind, err := m.TenantsBehind(ctx, "main")
	require.NoError(t, err)
	require.Equal(t, []migrate.Behind{{Number: s.a.Number, Version: 3, Beside: true}}, behind)
	st, err := m.Status(ctx)
	require.NoError(t, err)
	require.Equal(t, []migrate.Unfinished{{Group: "main", Version: 2, Name: "b", Beside: true, Tenants: 1, Rows: 2}}, st.Unfinished)
	res, err = m.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{3, 3, 0, 3}, []int{res.From, res.To, len(res.Applied), int(res.Rows)})
	require.Equal(t, "5", s.scalar(t, "select count(*) from a where n = 7"))
	behind, err = m.TenantsBehind(ctx, "main")
	require.NoError(t, err)
	require.Empty(t, behind)

	s.put("0004_d.data.sql", "-- oneo: beside\nupdate a set nonsense = 1")
	m = s.migrator(t)
	_, err = m.Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Equal(t, "4 1,2,3,4", s.version(t))
	res, err = m.Mark(ctx, s.a, 4, "ops")
	require.NoError(t, err)
	require.Empty(t, res.Applied)
	behind, err = m.TenantsBehind(ctx, "main")
	require.NoError(t, err)
	require.Empty(t, behind)
}

// Behaviours F 103, 104, 107: down in one transaction, refused before anything is done where a step cannot be taken back.
func TestDown(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.put("0002_b.up.sql", "-- oneo: breaking\ncreate table b (id int)")
	s.put("0003_c.up.sql", "create table c (id int)")
	s.put("0003_c.down.sql", "drop table c")
	s.put("0004_d.up.sql", "create table d (id int)")
	s.put("0004_d.down.sql", "drop table d")
	m := s.migrator(t)
	_, err := m.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	_, err = m.Down(ctx, s.a, 1, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "irreversible")
	require.Contains(t, err.Error(), "0002_b")
	requireFault(t, m.CanGoDown(4, 0), fault.Unfit, "irreversible")
	require.NoError(t, m.CanGoDown(4, 2))
	for _, bad := range [][2]int{{5, 1}, {4, -1}, {2, 3}} {
		requireFault(t, m.CanGoDown(bad[0], bad[1]), fault.Invalid, "target_out_of_range")
	}
	for _, bad := range []int{-1, 5} {
		_, err = m.Down(ctx, s.a, bad, migrate.TenantOptions{})
		requireFault(t, err, fault.Invalid, "target_out_of_range")
	}
	require.Equal(t, "4 1,2,3,4", s.version(t), "nothing was done")
	require.Equal(t, "2", s.scalar(t, "select reader from public.placements"))

	s.put("0003_c.down.sql", "select nonsense")
	_, err = s.migrator(t).Down(ctx, s.a, 2, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Contains(t, err.Error(), "0003_c failed in statement 1")
	require.Equal(t, "4 1,2,3,4", s.version(t))
	require.Equal(t, "d", s.scalar(t, "select to_regclass('d')"), "one transaction for the whole way")
	res, err := m.Down(ctx, s.a, 2, migrate.TenantOptions{Rehearse: true})
	require.NoError(t, err)
	require.Equal(t, []int{4, 2}, []int{res.From, res.To})
	require.Equal(t, "4 1,2,3,4", s.version(t))
	s.put("0004_d.up.sql", "create table d (id bigint)")
	_, err = s.migrator(t).Down(ctx, s.a, 2, migrate.TenantOptions{})
	requireFault(t, err, fault.Conflict, "edited_migration")

	listener := pgtest.Admin(t, s.env.AdminURL)
	_, err = listener.Exec(ctx, `listen oneo_versions`)
	require.NoError(t, err)
	res, err = m.Down(ctx, s.a, 2, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{4, 2, 2}, []int{res.From, res.To, len(res.Applied)})
	require.Equal(t, "2 1,2", s.version(t))
	require.Equal(t, "nullnull", s.scalar(t, "select coalesce(to_regclass('c')::text, 'null') || coalesce(to_regclass('d')::text, 'null')"))
	nctx, cancel := context.WithTimeout(ctx, pgtest.Patience)
	defer cancel()
	n, err := listener.WaitForNotification(nctx)
	require.NoError(t, err)
	require.Equal(t, fmt.Sprintf("%d 2", s.a.Number), n.Payload)
	res, err = m.Down(ctx, s.a, 3, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, []int{2, 2, 0}, []int{res.From, res.To, len(res.Applied)})

	s.put("0002_b.down.sql", "drop table b")
	s.put("0004_d.up.sql", "create table d (id int)")
	_, err = s.migrator(t).Down(ctx, s.a, 0, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "0", s.scalar(t, "select concat_ws(' ', version, (select count(*) from public.ledger where set = 'tenant')::text) from public.placements")[:1])
	require.Equal(t, "0", s.scalar(t, "select reader from public.placements"))
	_, err = m.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "4 1,2,3,4", s.version(t))

	s.put("0005_e.up.sql", "-- oneo: no-transaction\ncreate table e (id int);\nselect nonsense;")
	m = s.migrator(t)
	_, err = m.Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	_, err = m.Down(ctx, s.a, 3, migrate.TenantOptions{})
	requireFault(t, err, fault.Conflict, "unfinished_migration")
	res, err = m.Mark(ctx, s.a, 5, "ops")
	require.NoError(t, err)
	require.Equal(t, "0005_e", res.Applied[0].String())
	require.Equal(t, "5 1,2,3,4,5", s.version(t))
	require.Equal(t, "ops (marked)", s.scalar(t, "select applied_by from public.ledger where version = 5 and set = 'tenant'"))
	s.env.Invariants(t)
}

// Behaviours F 101, 119.
func TestMarkAndBaseline(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.put("0002_b.up.sql", "-- oneo: breaking\nselect nonsense")
	s.put("0003_c.up.sql", "select nonsense")
	m := s.migrator(t)
	for _, bad := range []int{0, 4} {
		_, err := m.Mark(ctx, s.a, bad, "ops")
		requireFault(t, err, fault.Invalid, "target_out_of_range")
	}
	res, err := m.Mark(ctx, s.a, 2, "ops")
	require.NoError(t, err)
	require.Equal(t, []int{1, 2}, []int{res.From, res.To})
	require.Equal(t, "2 1,2", s.version(t))
	require.Equal(t, "2", s.scalar(t, "select reader from public.placements"))
	res, err = m.Mark(ctx, s.a, 1, "ops")
	require.NoError(t, err)
	require.Empty(t, res.Applied, "it is there already")

	baseline := func(number int32, version int) error {
		return s.env.DB.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error { return m.BaselineTx(ctx, tx, number, version) })
	}
	requireFault(t, baseline(s.a.Number, 2), fault.Conflict, "not_new")
	requireFault(t, baseline(99, 4), fault.Invalid, "target_out_of_range")
	requireFault(t, baseline(99, 2), fault.NotFound, "schema_missing")
	_, err = pgtest.Admin(t, s.env.AdminURL).Exec(ctx, `delete from public.ledger where set = 'tenant'; update public.placements set version = 0, reader = 0`, pgx.QueryExecModeSimpleProtocol)
	require.NoError(t, err)
	require.NoError(t, baseline(s.a.Number, 0))
	require.NoError(t, baseline(s.a.Number, 3))
	require.Equal(t, "3 1,2,3", s.version(t))
	require.Equal(t, "2", s.scalar(t, "select reader from public.placements"))
	s.env.Invariants(t)
}

// Behaviour F 106: a step in Go is part of the transaction; it may fail, panic or end it, and the tenant is as it was.
func TestFuncs(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	ctx := t.Context()
	s.put("0002_b.up.sql", "create table b (id int)")
	s.put("0004_d.up.sql", "insert into b select count(*) from c")
	run := func(sql string) func(context.Context, *postgres.OwnerTx) error {
		return func(ctx context.Context, tx *postgres.OwnerTx) error { return tx.Script(ctx, sql) }
	}
	at := func(up func(context.Context, *postgres.OwnerTx) error) *migrate.Migrator {
		return s.migrator(t, func(o *migrate.Options) {
			o.Funcs = []migrate.Func{{Version: 3, Name: "c", Key: "1", Up: up, Down: run("drop table c")}}
		})
	}
	for what, c := range map[string]struct {
		up   func(context.Context, *postgres.OwnerTx) error
		code string
		kind fault.Kind
	}{
		"panics":       {func(context.Context, *postgres.OwnerTx) error { panic("oh") }, "migration_failed", fault.Unfit},
		"fails":        {func(context.Context, *postgres.OwnerTx) error { return errors.New("oh") }, "migration_failed", fault.Unfit},
		"fails in SQL": {run("select nonsense"), "migration_failed", fault.Unfit},
		"swallows": {func(ctx context.Context, tx *postgres.OwnerTx) error {
			_ = tx.Script(ctx, "select nonsense")
			return nil
		}, "", fault.Internal},
		"fault of itself": {func(context.Context, *postgres.OwnerTx) error { return fault.New(fault.Conflict, "no").WithCode("own") }, "own", fault.Conflict},
	} {
		_, err := at(c.up).Tenant(ctx, s.a, migrate.TenantOptions{})
		require.Errorf(t, err, what)
		if c.code != "" {
			requireFault(t, err, c.kind, c.code)
		}
		require.Equalf(t, "1 1", s.version(t), what)
		require.Equalf(t, "null", s.scalar(t, "select to_regclass('b')"), what)
	}
	_, err := at(run("commit; begin")).Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Invalid, "transaction_control")
	require.Equal(t, "1 1", s.version(t))
	s.exec(t, "drop table b") // what stands before its commit has stayed
	good := at(run("create table c (id int); insert into c values (1), (2)"))
	_, err = good.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, "4 1,2,3,4", s.version(t))
	require.Equal(t, "2", s.scalar(t, "select id from b"))
	edited := s.migrator(t, func(o *migrate.Options) {
		o.Funcs = []migrate.Func{{Version: 3, Name: "c", Key: "2", Up: run("select 1")}}
	})
	requireFault(t, edited.CheckApplied(ctx, "main"), fault.Conflict, "edited_migration")
	g := create(t, provisioner(t, s.env.DB, good), "globex")
	require.Equal(t, s.scalar(t, "select id from b"), (&steps{env: s.env, a: g}).scalar(t, "select id from b"), "a new tenant goes through it too")

	calls := 0
	batch := s.migrator(t, func(o *migrate.Options) {
		o.Funcs = []migrate.Func{{Version: 3, Name: "c", Key: "1", Up: run("")}, {Version: 5, Name: "e", Key: "1", Size: 1, Batch: func(ctx context.Context, tx *postgres.OwnerTx, limit int) (int64, error) {
			if calls++; calls == 2 {
				panic("oh")
			}
			tag, err := tx.Exec(ctx, `delete from c where id in (select id from c limit $1)`, limit)
			return tag.RowsAffected(), err
		}}}
	})
	_, err = batch.Tenant(ctx, s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.Equal(t, "1", s.scalar(t, "select count(*) from c"))
	res, err := batch.Tenant(ctx, s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	require.Equal(t, int64(1), res.Rows)
	require.Equal(t, []int{4, 5}, []int{res.From, res.To})
	s.env.Invariants(t)
}

// The records go with the commit: of a batch that has ended the transaction they are not written.
func TestBatchThatEndsItsTransaction(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	m := s.migrator(t, func(o *migrate.Options) {
		o.Funcs = []migrate.Func{{Version: 2, Name: "b", Key: "1", Batch: func(ctx context.Context, tx *postgres.OwnerTx, _ int) (int64, error) {
			return 0, tx.Script(ctx, "commit; begin")
		}}}
	})
	_, err := m.Tenant(t.Context(), s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Invalid, "transaction_control")
	require.Equal(t, "1 1", s.version(t))
	s.env.Invariants(t)
}

// A file that takes prepared statements away takes oneo's own away too: they are prepared anew.
func TestFileThatDeallocates(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	db, _, _ := s.env.Open(t, func(o *postgres.Options) { o.OwnerConns = 1 })
	for version := 2; version <= 4; version++ {
		s.put(fmt.Sprintf("%04d_d.up.sql", version), fmt.Sprintf("deallocate all; create table d%d (id int)", version))
		_, err := with(t, db, s.fs).Tenant(t.Context(), s.a, migrate.TenantOptions{})
		require.NoError(t, err)
	}
	require.Equal(t, "4 1,2,3,4", s.version(t))
	s.env.Invariants(t)
}

// What a new tenant gets is what migrating gives, with a step of each kind.
func TestCreationOfEveryKindEqualsMigrating(t *testing.T) {
	t.Parallel()
	k := newKinds(t)
	inst, err := k.env.DB.Installation(t.Context(), "main")
	require.NoError(t, err)
	stepped := k.tenant(t, "stepped")
	_, err = k.m.Tenant(t.Context(), stepped, migrate.TenantOptions{})
	require.NoError(t, err)
	created := create(t, provisioner(t, k.env.DB, k.m), "created")
	admin := pgtest.Admin(t, k.env.AdminURL)
	require.Equal(t, pgtest.Fingerprint(t, admin, "stepped", inst.TenantRole(stepped.Number)), pgtest.Fingerprint(t, admin, "created", inst.TenantRole(created.Number)))
	require.Equal(t, []string{"7 2", "7 2"}, k.lines(t, `select version || ' ' || reader from public.placements`))
	require.Empty(t, k.lines(t, `select tenant::text from public.progress`))
	require.Equal(t, []string{"2 1", "3 1", "6 1", "7 1"}, k.lines(t, `select version || ' ' || count(*) from public.counted where tenant = 'created' group by version order by version`))
	// Seeds that earlier steps have put there are changed by later data migrations, as everywhere else.
	fs := files("0001_a.up.sql", "create table a (id int, n int); insert into a select generate_series(1, 3000)", "0002_b.data.sql", "update a set n = 1 where id in (select id from a where n is null limit $1)")
	other := pgtest.New(t)
	seeds := with(t, other.DB, fs)
	create(t, provisioner(t, other.DB, seeds), "seeded")
	var left int
	require.NoError(t, pgtest.Admin(t, other.AdminURL).QueryRow(t.Context(), `select count(*) from seeded.a where n is null`).Scan(&left))
	require.Zero(t, left)
}

// Behaviours F 108, 109, F12: two processes at the same tenant, and at two, through every kind of step.
func TestTwoProcessesThroughEveryKind(t *testing.T) {
	t.Parallel()
	k := newKinds(t)
	other, _, _ := k.env.Open(t)
	om, err := migrate.New(other, everyKind())
	require.NoError(t, err)
	a, b := k.tenant(t, "acme"), k.tenant(t, "globex")
	var wg sync.WaitGroup
	for _, m := range []*migrate.Migrator{k.m, om, k.m, om} {
		for _, tn := range []tenant.Tenant{a, b} {
			wg.Go(func() {
				if _, err := m.Tenant(t.Context(), tn, migrate.TenantOptions{}); err != nil {
					t.Errorf("%s: %v", tn.Slug, err)
				}
			})
		}
	}
	wg.Wait()
	k.atHead(t, a)
	k.atHead(t, b)
}

// A statement that PostgreSQL does not support here says so: it is no change by somebody else.
func TestUnsupportedStatementIsNamed(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	s.put("0002_view.up.sql", "create view v as select id, n from a")
	s.put("0003_type.up.sql", "create table b (id int);\nalter table a alter column n type bigint")
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	requireFault(t, err, fault.Unfit, "migration_failed")
	require.ErrorContains(t, err, "0003_type failed in statement 2, line 2 (SQLSTATE 0A000)")
	require.Equal(t, "1 1", s.version(t))
}

// What a migration sets for its session is not what the next tenant's migrations run under, nor any other work of the owner.
func TestWhatAMigrationSetsEndsWithIt(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"-- why\nSET IntervalStyle = 'sql_standard'", "set session intervalstyle to sql_standard", "select set_config('intervalstyle', 'sql_standard', false)",
		"do $$ begin set intervalstyle = 'sql_standard'; end $$",
		"select pg_advisory_lock(7, 7)", "prepare left_over as select 1",
	} {
		t.Run(sql, func(t *testing.T) {
			t.Parallel()
			s := newSteps(t)
			s.put("0002_x.up.sql", sql)
			s.put("0002_x.down.sql", sql)
			db, _, _ := s.env.Open(t, func(o *postgres.Options) { o.OwnerConns = 1 })
			m, err := migrate.New(db, migrate.Options{Files: schemas.Files, Tenant: s.fs})
			require.NoError(t, err)
			clean := func(what string) {
				t.Helper()
				var left string
				require.NoError(t, db.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
					return tx.QueryRow(t.Context(), `select concat_ws(' ', current_setting('intervalstyle'),
	(select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()), (select min(name) from pg_prepared_statements where name = 'left_over'))`).Scan(&left)
				}))
				require.Equal(t, "postgres 0", left, what)
			}
			_, err = m.Tenant(t.Context(), s.a, migrate.TenantOptions{})
			require.NoError(t, err)
			clean("up")
			_, err = m.Down(t.Context(), s.a, 1, migrate.TenantOptions{})
			require.NoError(t, err)
			clean("down")
			create(t, provisioner(t, db, m), "globex")
			clean("a new tenant")
		})
	}
}

// What a file without a transaction has set for its session holds also for the statements behind the one that failed.
func TestWhatAFileSetsHoldsWhenItIsTakenUpAgain(t *testing.T) {
	t.Parallel()
	s := newSteps(t)
	const head = "-- oneo: no-transaction\ncreate table log (at text);\nset intervalstyle = 'sql_standard';\nreset intervalstyle;\n" +
		"set session intervalstyle = 'iso_8601';\ninsert into log values (current_setting('intervalstyle'));\n"
	s.put("0002_b.up.sql", head+"insert into log values (1/0)")
	_, err := s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	require.Equal(t, "22012", postgres.SQLState(err), "%v", err)
	s.put("0002_b.up.sql", head+"insert into log values (current_setting('intervalstyle'))")
	_, err = s.migrator(t).Tenant(t.Context(), s.a, migrate.TenantOptions{})
	require.NoError(t, err)
	var log string
	require.NoError(t, pgtest.Admin(t, s.env.AdminURL).QueryRow(t.Context(), "select string_agg(at, ' ') from acme.log").Scan(&log))
	require.Equal(t, "iso_8601 iso_8601", log)
}
