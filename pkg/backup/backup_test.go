package backup_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"filippo.io/age"
	"github.com/google/uuid"
	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
	"github.com/oneo-crm/oneo/schemas"
)

// TestMain also serves as the child that makes or restores a full backup and is killed in the middle of it.
func TestMain(m *testing.M) {
	if raw := os.Getenv(fullTask); raw != "" {
		var k fullWork
		err := json.Unmarshal([]byte(raw), &k)
		if err == nil {
			err = k.child()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	pgtest.Main(m)
}

// fixture is an installation whose tenants have one table, and a store of their backups.
type fixture struct {
	*pgtest.Env
	t         *testing.T
	provision *provision.Provisioner
	transfers *transfer.Transfers
	dir       string
	o         backup.Options
	*backup.Backups
}

func newFixture(t *testing.T, change ...func(*backup.Options)) *fixture {
	t.Helper()
	f := &fixture{Env: pgtest.New(t), t: t, dir: t.TempDir()}
	log := slog.New(slog.DiscardHandler)
	files := fstest.MapFS{"0001_notes.up.sql": &fstest.MapFile{Data: []byte(`create table notes (id integer generated always as identity primary key, body text not null)`)}}
	m, err := migrate.New(f.DB, migrate.Options{Files: schemas.Files, Tenant: files})
	require.NoError(t, err)
	checker, err := structure.New(structure.Options{DB: f.DB, Head: m.Head(migrate.TenantSet), Make: m.Create})
	require.NoError(t, err)
	f.provision, err = provision.New(provision.Options{DB: f.DB, Migrate: m, Structure: checker, BaseDomain: f.Base, DropGrace: time.Hour, GateWait: pgtest.Patience,
		Secret: pgtest.Secret, Archives: archives{f}, Logger: log})
	require.NoError(t, err)
	f.transfers, err = transfer.New(transfer.Options{DB: f.DB, Migrate: m, Structure: checker, Provision: f.provision, BaseDomain: f.Base, Version: "test", Logger: log})
	require.NoError(t, err)
	s, err := store.NewDir(f.dir)
	require.NoError(t, err)
	f.o = backup.Options{Store: s, DB: f.DB, Transfers: f.transfers, Secret: pgtest.Secret, Environ: os.Environ(), Logger: log}
	for _, c := range change {
		c(&f.o)
	}
	f.Backups = f.with()
	return f
}

// archives are those of the fixture's backups, whichever these are.
type archives struct{ f *fixture }

func (a archives) EraseArchives(ctx context.Context, id string) (int, error) {
	return a.f.Backups.EraseArchives(ctx, id)
}

func (a archives) MarkErased(ctx context.Context, id, slug string) error {
	return a.f.Backups.MarkErased(ctx, id, slug)
}

// with is the same with other options.
func (f *fixture) with(change ...func(*backup.Options)) *backup.Backups {
	f.t.Helper()
	o := f.o
	for _, c := range change {
		c(&o)
	}
	b, err := backup.New(o)
	require.NoError(f.t, err)
	return b
}

func (f *fixture) tenant(slug string, notes int) tenant.Tenant {
	f.t.Helper()
	made, err := f.provision.Create(f.t.Context(), provision.CreateRequest{Slug: pgtest.Slug(f.t, slug), Actor: "test"})
	require.NoError(f.t, err)
	f.in(made, fmt.Sprintf(`insert into notes (body) select 'note ' || g || ' ' || repeat(md5(g::text), 20) from generate_series(1, %d) g`, notes))
	return made
}

func (f *fixture) in(t tenant.Tenant, sql string) {
	f.t.Helper()
	ctx := f.t.Context()
	require.NoError(f.t, f.DB.AsOwnerIn(ctx, t, func(tx *postgres.OwnerTx) error { return tx.Script(ctx, sql) }))
}

func (f *fixture) back(t tenant.Tenant) backup.Manifest {
	f.t.Helper()
	made, err := f.Create(f.t.Context(), t, backup.CreateOptions{})
	require.NoError(f.t, err)
	require.False(f.t, made.Before)
	return made.Manifest
}

func (f *fixture) list() backup.Catalogue {
	f.t.Helper()
	c, err := f.List(f.t.Context(), "")
	require.NoError(f.t, err)
	return c
}

// path is an object's file.
func (f *fixture) path(name string) string { return filepath.Join(f.dir, filepath.FromSlash(name)) }

func manifestOf(m backup.Manifest) string { return strings.TrimSuffix(m.Name, ".oneo") + ".json" }

// files are the names of what lies in the store.
func (f *fixture) files() (names []string) {
	f.t.Helper()
	objects, err := f.o.Store.List(f.t.Context(), "")
	require.NoError(f.t, err)
	for _, o := range objects {
		names = append(names, o.Name)
	}
	return names
}

// A backup is listed, found, proved, and restored to what the tenant was.
func TestBackup(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 100), f.tenant("beta", 3)
	before := time.Now()
	m := f.back(one)
	other := f.back(two)
	require.Equal(t, int64(100), m.Rows)
	require.Equal(t, []any{one.ID, "acme", "main", 1, 1, "test", false}, []any{m.Tenant, m.Slug, m.Group, m.Version, m.Tables, m.Oneo, m.Kept})
	require.WithinRange(t, m.Made, before.Add(-time.Second), time.Now().Add(time.Second))
	require.NotEmpty(t, m.Installation)
	st, err := os.Stat(f.path(m.Name))
	require.NoError(t, err)
	require.Equal(t, m.Bytes, st.Size())
	require.Equal(t, os.FileMode(0o600), st.Mode().Perm())

	require.Len(t, f.list().Backups, 2)
	mine, err := f.List(t.Context(), one.ID)
	require.NoError(t, err)
	require.Len(t, mine.Backups, 1)
	for _, id := range []string{m.ID, m.ID[:8]} {
		got, err := f.Find(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, m.Name, got.Name)
	}
	for _, id := range []string{"", "abc", "ffffffffffffffff0", "../etc", other.ID + "0", "nothing!"} {
		_, err = f.Find(t.Context(), id)
		require.True(t, fault.Is(err, fault.NotFound), "%q: %v", id, err)
	}
	require.NoError(t, f.Verify(t.Context(), m, nil))
	require.NoError(t, f.Checksum(t.Context(), m))
	trailer, err := f.Try(t.Context(), m, "main", transfer.Loading{Actor: "test"})
	require.NoError(t, err)
	require.Equal(t, int64(100), trailer.Rows())

	f.in(one, `delete from notes where id > 1`)
	in, err := f.Backups.Open(t.Context(), m)
	require.NoError(t, err)
	defer in.Close()
	_, _, err = f.transfers.Restore(t.Context(), one, in, time.Hour, false, transfer.Loading{Actor: "test"})
	require.NoError(t, err)
	require.Equal(t, int64(100), f.back(one).Rows)
	f.Invariants(t)
}

// A run makes one backup of a tenant, however often it is asked; another run makes another one.
func TestOneOfEachRun(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 1), f.tenant("beta", 1)
	run := uuid.New()
	first, err := f.Create(t.Context(), one, backup.CreateOptions{Run: run})
	require.NoError(t, err)
	again, err := f.Create(t.Context(), one, backup.CreateOptions{Run: run})
	require.NoError(t, err)
	require.True(t, again.Before)
	require.Equal(t, first.ID, again.ID)
	for _, o := range []struct {
		t   tenant.Tenant
		run uuid.UUID
	}{{two, run}, {one, uuid.New()}, {one, uuid.Nil}} {
		made, err := f.Create(t.Context(), o.t, backup.CreateOptions{Run: o.run})
		require.NoError(t, err)
		require.False(t, made.Before)
	}
	require.Len(t, f.list().Backups, 4)
	// One of which only the archive was written is none.
	require.NoError(t, os.Remove(f.path(manifestOf(first.Manifest))))
	made, err := f.Create(t.Context(), one, backup.CreateOptions{Run: run})
	require.NoError(t, err)
	require.False(t, made.Before)
	require.Len(t, f.list().Loose, 1)
}

// F51: a manifest is believed only where it stands, with the archive that it was made for, and signed by this installation.
func TestSwappedAndForged(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 10), f.tenant("beta", 10)
	a, b := f.back(one), f.back(two)
	older := f.back(one)
	move := func(from, to string) {
		text, err := os.ReadFile(f.path(from))
		require.NoError(t, err)
		require.NoError(t, os.MkdirAll(filepath.Dir(f.path(to)), 0o700))
		require.NoError(t, os.WriteFile(f.path(to), text, 0o600))
	}
	whole := map[string][]byte{}
	for _, name := range f.files() {
		text, err := os.ReadFile(f.path(name))
		require.NoError(t, err)
		whole[name] = text
	}
	again := func() {
		for name, text := range whole {
			require.NoError(t, os.WriteFile(f.path(name), text, 0o600))
		}
		require.Len(t, f.list().Backups, 3)
		require.Empty(t, f.list().Bad)
	}
	refused := func(m backup.Manifest, why string) {
		t.Helper()
		c := f.list()
		require.Len(t, c.Bad, 1)
		require.Len(t, c.Backups, 2)
		require.ErrorContains(t, c.Bad[0].Err, why)
		_, err := f.Find(t.Context(), m.ID)
		require.True(t, fault.Is(err, fault.Unverified), "%v", err)
		plan, err := f.Prune(t.Context(), backup.Policy{Last: 1}, m.Tenant, func(backup.Manifest) {})
		require.NoError(t, err)
		require.Len(t, plan.Bad, 1)
		require.FileExists(t, f.path(manifestOf(m)), "what cannot be believed is left alone")
		require.FileExists(t, f.path(m.Name))
	}

	move(manifestOf(b), manifestOf(a)) // another tenant's manifest
	refused(a, "is that of another backup")
	again()
	move(manifestOf(older), manifestOf(a)) // another one of the same tenant
	refused(a, "is that of another backup")
	again()
	forged := bytes.Replace(whole[manifestOf(a)], []byte(`"rows":10`), []byte(`"rows":99`), 1)
	require.NotEqual(t, whole[manifestOf(a)], forged)
	require.NoError(t, os.WriteFile(f.path(manifestOf(a)), forged, 0o600))
	refused(a, "was changed since")
	again()
	for _, text := range []string{"", "{}", "nonsense", `{"manifest":{},"mac":""}`, strings.Repeat(" ", 70<<10)} {
		require.NoError(t, os.WriteFile(f.path(manifestOf(a)), []byte(text), 0o600))
		require.Len(t, f.list().Bad, 1)
	}
	again()
	_, err := f.with(func(o *backup.Options) { o.Secret = "another installation's secret, long enough" }).Find(t.Context(), a.ID)
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)

	// Swapped archives: found by whoever reads them, and restored by nobody.
	move(b.Name, a.Name)
	for what, err := range map[string]error{
		"verify": f.Verify(t.Context(), a, nil), "checksum": f.Checksum(t.Context(), a),
		"try": func() error { _, err := f.Try(t.Context(), a, "main", transfer.Loading{}); return err }(),
	} {
		require.Truef(t, fault.Is(err, fault.Unverified), "%s: %v", what, err)
	}
	in, err := f.Backups.Open(t.Context(), a)
	require.NoError(t, err)
	defer in.Close()
	_, _, err = f.transfers.Restore(t.Context(), one, in, time.Hour, true, transfer.Loading{Actor: "test"})
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)
	again()
	require.NoError(t, os.WriteFile(f.path(a.Name), whole[older.Name], 0o600)) // the same tenant's, from another time
	require.True(t, fault.Is(f.Verify(t.Context(), a, nil), fault.Unverified))
	again()
	require.NoError(t, os.Remove(f.path(a.Name)))
	require.Len(t, f.list().Bad, 1)
	_, err = f.Find(t.Context(), a.ID)
	require.ErrorContains(t, err, "not in the store")
	_, err = f.Backups.Open(t.Context(), a)
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)
}

// F49, F50: each changed bit and each cut is found, with and without a key.
func TestDamage(t *testing.T) {
	t.Parallel()
	key, err := age.GenerateX25519Identity()
	require.NoError(t, err)
	to, err := archive.ParseRecipient(key.Recipient().String())
	require.NoError(t, err)
	ids, err := archive.ParseIdentities(key.String())
	require.NoError(t, err)
	f := newFixture(t, func(o *backup.Options) { o.To, o.Identities = []archive.Recipient{to}, ids })
	one := f.tenant("acme", 50)
	m := f.back(one)
	require.Equal(t, []string{to.ID()}, m.Keys)
	require.NoError(t, f.Verify(t.Context(), m, f.Identities()))
	require.True(t, fault.Is(f.Verify(t.Context(), m, nil), fault.WrongKey))
	require.NoError(t, f.Checksum(t.Context(), m), "which needs no key")
	whole, err := os.ReadFile(f.path(m.Name))
	require.NoError(t, err)
	try := func(b []byte) {
		t.Helper()
		require.NoError(t, os.WriteFile(f.path(m.Name), b, 0o600))
		for _, err := range []error{f.Verify(t.Context(), m, f.Identities()), f.Verify(t.Context(), m, nil), f.Checksum(t.Context(), m)} {
			require.Truef(t, fault.Is(err, fault.Unverified), "%v", err)
		}
	}
	for i := 0; i < len(whole); i += max(1, len(whole)/100) {
		b := bytes.Clone(whole)
		b[i] ^= 1 << (i % 8)
		try(b)
	}
	for _, n := range []int{0, 1, len(whole) / 2, len(whole) - 1} {
		try(whole[:n])
	}
	try(append(bytes.Clone(whole), 0))
	// Nothing but the manifest's checksum sees this one: it is an archive by itself.
	b, err := os.ReadFile(f.path(f.back(one).Name))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(f.path(m.Name), b, 0o600))
	require.True(t, fault.Is(f.Checksum(t.Context(), m), fault.Unverified))
}

// failing is a store that stops taking bytes after some, for objects of a kind.
type failing struct {
	store.Store
	suffix string
	after  int
	err    error
}

func (s *failing) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	if !strings.HasSuffix(name, s.suffix) {
		return s.Store.Put(ctx, name, write)
	}
	return s.Store.Put(ctx, name, func(w io.Writer) error { return write(&short{w, s.after, s.err}) })
}

type short struct {
	w    io.Writer
	left int
	err  error
}

func (s *short) Write(p []byte) (int, error) {
	if s.left -= len(p); s.left < 0 {
		return 0, s.err
	}
	return s.w.Write(p)
}

// forgetful is a store whose answer to having taken an object of a kind is lost.
type forgetful struct {
	store.Store
	suffix string
}

func (s *forgetful) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	err := s.Store.Put(ctx, name, write)
	if err == nil && strings.HasSuffix(name, s.suffix) {
		err = errors.New("connection lost")
	}
	return err
}

// F47: a store that is full, or goes away, leaves nothing of the backup and all of the others.
func TestStoreFails(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 20_000)
	m := f.back(one)
	was := f.files()
	full := fault.New(fault.TooLarge, "the store is full").WithCode("store_full")
	for _, c := range []struct {
		suffix string
		after  int
		err    error
		kind   fault.Kind
	}{
		{".oneo", 0, full, fault.TooLarge}, {".oneo", 100_000, full, fault.TooLarge}, {".oneo", 100_000, errors.New("reset by peer"), fault.Unavailable},
		{".json", 0, full, fault.TooLarge}, {".json", 0, errors.New("reset by peer"), fault.Unavailable},
	} {
		b := f.with(func(o *backup.Options) { o.Store = &failing{f.o.Store, c.suffix, c.after, c.err} })
		_, err := b.Create(t.Context(), one, backup.CreateOptions{})
		require.Truef(t, fault.Is(err, c.kind), "%v: %v", c, err)
		require.Equal(t, was, f.files(), "nothing is left, not even a partial file")
		entries, err := os.ReadDir(filepath.Dir(f.path(m.Name)))
		require.NoError(t, err)
		require.Len(t, entries, 2)
	}
	for _, suffix := range []string{".oneo", ".json"} {
		_, err := f.with(func(o *backup.Options) { o.Store = &forgetful{f.o.Store, suffix} }).Create(t.Context(), one, backup.CreateOptions{})
		require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
		require.Equal(t, was, f.files())
	}
	require.NoError(t, f.Verify(t.Context(), m, nil))
	ctx, cancel := context.WithCancel(t.Context())
	b := f.with(func(o *backup.Options) {
		o.Store = &failing{f.o.Store, ".oneo", 0, context.Canceled}
	})
	cancel()
	_, err := b.Create(ctx, one, backup.CreateOptions{})
	require.ErrorIs(t, err, context.Canceled)
	require.Equal(t, was, f.files())
}

// In S3 it is the same, and what the service refuses is told as what it is.
func TestBackupInS3(t *testing.T) {
	t.Parallel()
	backend := s3mem.New()
	require.NoError(t, backend.CreateBucket("bucket"))
	inner := gofakes3.New(backend, gofakes3.WithLogger(gofakes3.DiscardLog())).Server()
	var refuse atomic.Bool
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refuse.Load() && r.Method == http.MethodPut {
			w.WriteHeader(http.StatusForbidden)
			_, _ = io.WriteString(w, `<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>`)
			return
		}
		if r.Method == http.MethodGet && r.URL.Query().Has("uploads") { // it knows no empty list of them
			_, _ = io.WriteString(w, `<ListMultipartUploadsResult><Bucket>bucket</Bucket></ListMultipartUploadsResult>`)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close)
	s, err := store.Open("s3://bucket/backups?endpoint="+server.URL, []string{"AWS_ACCESS_KEY_ID=id", "AWS_SECRET_ACCESS_KEY=secret"})
	require.NoError(t, err)
	f := newFixture(t, func(o *backup.Options) { o.Store = s })
	one := f.tenant("acme", 1000)
	first, second := f.back(one), f.back(one)
	require.NoError(t, f.Verify(t.Context(), first, nil))
	_, err = f.Try(t.Context(), second, "main", transfer.Loading{Actor: "test"})
	require.NoError(t, err)
	refuse.Store(true)
	was := f.files()
	_, err = f.Create(t.Context(), one, backup.CreateOptions{})
	require.True(t, fault.Is(err, fault.Forbidden), "%v", err)
	require.ErrorContains(t, err, "denies access")
	require.Equal(t, was, f.files())
	refuse.Store(false)
	_, err = f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
	require.NoError(t, err)
	got, err := f.Newest(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, second.ID, got.ID)
	require.Len(t, f.files(), 2)
	n, err := f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Empty(t, f.files())
}

// Pruning takes whole backups away and what was interrupted long ago, and never what is kept.
func TestPruneAndKeep(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	var ms []backup.Manifest
	for range 4 {
		ms = append(ms, f.back(one))
	}
	kept, err := f.Keep(t.Context(), ms[0].ID[:10], true, "the first one")
	require.NoError(t, err)
	require.True(t, kept.Kept)
	loose := []string{one.ID + "/20200101T000000Z-00000000000000aa.oneo", one.ID + "/20200101T000000Z-00000000000000bb.oneo"}
	strange := "somebody/else.txt"
	for _, name := range append(loose, strange) {
		require.NoError(t, f.o.Store.Put(t.Context(), name, func(w io.Writer) error { _, err := w.Write([]byte("x")); return err }))
	}
	long := time.Now().Add(-8 * 24 * time.Hour)
	require.NoError(t, os.Chtimes(f.path(loose[0]), long, long))
	require.NoError(t, os.Chtimes(f.path(strange), long, long))

	var gone []string
	_, err = f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(m backup.Manifest) { gone = append(gone, m.ID) })
	require.NoError(t, err)
	require.ElementsMatch(t, []string{ms[1].ID, ms[2].ID}, gone)
	require.ElementsMatch(t, []string{ms[0].Name, manifestOf(ms[0]), ms[3].Name, manifestOf(ms[3]), loose[1], strange}, f.files())
	c := f.list()
	require.Equal(t, "the first one", c.Backups[0].Reason)
	require.NoError(t, f.Verify(t.Context(), c.Backups[0], nil), "a manifest that was written again is as good")

	back, err := f.Keep(t.Context(), ms[0].ID, false, "")
	require.NoError(t, err)
	require.Equal(t, "the first one", back.Reason)
	_, err = f.Prune(t.Context(), backup.Policy{}, "", func(backup.Manifest) {})
	require.NoError(t, err)
	c = f.list()
	require.Len(t, c.Backups, 1)
	require.Equal(t, ms[3].ID, c.Backups[0].ID, "the newest one stays whatever is said")
	_, err = f.Keep(t.Context(), ms[0].ID, true, "")
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)

	// Somebody who keeps waits for nobody who prunes, and the other way round: one of them is refused.
	require.NoError(t, f.DB.OwnerSession(t.Context(), postgres.MainGroup, func(ses *postgres.Session) error {
		_, err := ses.Exec(t.Context(), `select pg_advisory_lock(7302661, 0)`)
		require.NoError(t, err)
		_, err = f.Keep(t.Context(), ms[3].ID, true, "")
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
		_, err = f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
		require.True(t, fault.Is(err, fault.Locked), "%v", err)
		return nil
	}))
}

// Programs around a backup get JSON; one before it that fails stops it, one after it that fails is told.
func TestHooks(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	log := filepath.Join(t.TempDir(), "log")
	script := func(text string) []string { return []string{"/bin/sh", "-c", text, "hook", log} }
	note := script(`cat >> "$1"`)
	b := f.with(func(o *backup.Options) {
		o.Before, o.After, o.Environ = note, note, append(os.Environ(), "ONEO_SERVER_SECRET=secret", "DATABASE_URL=secret")
	})
	made, err := b.Create(t.Context(), one, backup.CreateOptions{Reason: "why"})
	require.NoError(t, err)
	require.Empty(t, made.Warning)
	text, err := os.ReadFile(log)
	require.NoError(t, err)
	type event struct {
		Event  string
		OK     bool
		Error  string
		Backup backup.Manifest
	}
	var events []event
	for line := range strings.Lines(string(text)) {
		var ev event
		require.NoError(t, json.Unmarshal([]byte(line), &ev))
		events = append(events, ev)
	}
	require.Len(t, events, 2)
	require.Equal(t, []any{"before", false, "acme", "why", ""}, []any{events[0].Event, events[0].OK, events[0].Backup.Slug, events[0].Backup.Reason, events[0].Backup.SHA256})
	require.Equal(t, []any{"after", true, made.ID, made.SHA256}, []any{events[1].Event, events[1].OK, events[1].Backup.ID, events[1].Backup.SHA256})

	was := f.files()
	stop := f.with(func(o *backup.Options) {
		o.Before, o.After = script(`echo "not now: $ONEO_HOOK $ONEO_SERVER_SECRET" >&2; exit 3`), script(`echo never >> "$1"`)
		o.Environ = append(os.Environ(), "ONEO_SERVER_SECRET=secret")
	})
	_, err = stop.Create(t.Context(), one, backup.CreateOptions{})
	require.True(t, fault.Is(err, fault.Unfit), "%v", err)
	require.ErrorContains(t, err, "not now: before")
	require.NotContains(t, err.Error(), "secret")
	require.Equal(t, was, f.files())
	after, err := os.ReadFile(log)
	require.NoError(t, err)
	require.Equal(t, text, after, "the program after it is not run for what was not begun")

	warned := f.with(func(o *backup.Options) { o.After = script(`echo trouble; exit 1`) })
	made, err = warned.Create(t.Context(), one, backup.CreateOptions{})
	require.NoError(t, err)
	require.Contains(t, made.Warning, "trouble")
	require.NoError(t, f.Verify(t.Context(), made.Manifest, nil))

	// The program after it hears of what failed: what the first one has stopped must go on.
	failed := f.with(func(o *backup.Options) {
		o.Before, o.After = script(`:`), note
		o.Store = &failing{f.o.Store, ".oneo", 0, errors.New("reset by peer")}
	})
	require.NoError(t, os.Remove(log))
	_, err = failed.Create(t.Context(), one, backup.CreateOptions{})
	require.Error(t, err)
	text, err = os.ReadFile(log)
	require.NoError(t, err)
	require.Contains(t, string(text), `"ok":false`)
	require.Contains(t, string(text), "cannot be written")
	_, err = f.with(func(o *backup.Options) { o.Before = []string{"/nowhere/program"} }).Create(t.Context(), one, backup.CreateOptions{})
	require.True(t, fault.Is(err, fault.Unfit), "%v", err)
}

// What a drill has proved is remembered, the newest backup's.
func TestProofs(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 2)
	older, newer := f.back(one), f.back(one)
	require.NoError(t, f.Remember(t.Context(), one.Number, newer, 1500*time.Millisecond))
	require.NoError(t, f.Remember(t.Context(), one.Number, older, time.Second))
	proofs, err := f.Proofs(t.Context())
	require.NoError(t, err)
	require.Len(t, proofs, 1)
	p := proofs[one.Number]
	require.Equal(t, []any{newer.ID, int64(2), 1500 * time.Millisecond}, []any{p.Backup, p.Rows, p.Duration})
	require.WithinDuration(t, newer.Made, p.Made, time.Millisecond)
}

// What a tenant has of its own comes back from its backup whatever it is, since the manifest, which nobody else can write, says that it was
// there: also what is not let through from any other archive. It is still asked for.
func TestOwnStatementsOfABackup(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 3)
	f.in(one, `create function counted(name text) returns bigint language plpgsql security definer set search_path from current as $$ declare n bigint; begin
	execute format('select count(*) from %I', name) into n; return n; end $$; grant usage on schema acme to pg_monitor; grant select on notes to pg_monitor`)
	m := f.back(one)
	require.NotEmpty(t, m.Custom)
	ctx := t.Context()
	_, err := f.Try(ctx, m, postgres.MainGroup, transfer.Loading{Actor: "test"})
	require.Error(t, err)
	require.Equal(t, "custom_ddl", fault.Of(err).StableCode(), "%v", err)
	_, err = f.Try(ctx, m, postgres.MainGroup, transfer.Loading{CustomDDL: true, Actor: "test"})
	require.NoError(t, err)
	load := func(as, known string) error {
		in, err := f.Backups.Open(ctx, m)
		require.NoError(t, err)
		defer in.Close()
		_, _, err = f.transfers.Import(ctx, in, transfer.ImportOptions{Slug: pgtest.Slug(t, as), Loading: transfer.Loading{CustomDDL: true, Known: known, Actor: "test"}})
		return err
	}
	for _, known := range []string{"", archive.Structure{Custom: []archive.Statement{{SQL: "other"}}}.Sum()} {
		err := load("copy", known)
		require.Error(t, err)
		require.Equal(t, "custom_ddl_refused", fault.Of(err).StableCode(), "%v", err)
	}
	require.NoError(t, load("copy", m.Custom))
	f.Invariants(t)
}
