package backup_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/store"
)

// between is a store at which something happens before an object of a kind is put, or after one was deleted.
type between struct {
	store.Store
	put, deleted func(name string)
}

func (s *between) Put(ctx context.Context, name string, write func(io.Writer) error) error {
	if s.put != nil {
		s.put(name)
	}
	return s.Store.Put(ctx, name, write)
}

func (s *between) Delete(ctx context.Context, name string) error {
	err := s.Store.Delete(ctx, name)
	if s.deleted != nil {
		s.deleted(name)
	}
	return err
}

// Who prunes while a backup is made leaves its archive alone, whose manifest is to come.
func TestPruneBesideCreate(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 3)
	seen := 0
	b := f.with(func(o *backup.Options) {
		o.Store = &between{Store: f.o.Store, put: func(name string) {
			if !strings.HasSuffix(name, ".json") {
				return
			}
			seen++
			require.Len(t, f.files(), 1)
			_, err := f.Prune(t.Context(), backup.Policy{}, "", func(backup.Manifest) { t.Error("nothing was to go") })
			require.NoError(t, err)
		}}
	})
	made, err := b.Create(t.Context(), one, backup.CreateOptions{})
	require.NoError(t, err)
	require.Equal(t, 1, seen)
	require.NoError(t, f.Verify(t.Context(), made.Manifest, nil))
}

// Who reads a backup reads it to its end, also when it is pruned meanwhile; who comes later is told that it is gone.
func TestPrunedWhileItIsRead(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 5000)
	older := f.back(one)
	f.back(one)
	in, err := f.Backups.Open(t.Context(), older)
	require.NoError(t, err)
	defer in.Close()
	_, err = io.CopyN(io.Discard, in, 10)
	require.NoError(t, err)
	_, err = f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
	require.NoError(t, err)
	n, err := io.Copy(io.Discard, in)
	require.NoError(t, err)
	require.Equal(t, older.Bytes, n+10)
	_, err = f.Backups.Open(t.Context(), older)
	require.True(t, fault.Is(err, fault.NotFound), "%v", err)
}

// Of two that prune only one does. One that has lost its lock, with its connection, takes nothing more away: somebody else may have
// kept it meanwhile.
func TestPruneLosesItsLock(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	var ms []backup.Manifest
	for range 4 {
		ms = append(ms, f.back(one))
	}
	holders := func() (n int) {
		const ask = `select count(pg_terminate_backend(pid)) from pg_locks where locktype = 'advisory' and classid = 7302661
and database = (select oid from pg_database where datname = current_database())`
		require.NoError(t, f.DB.AsOwner(t.Context(), postgres.MainGroup, func(tx *postgres.OwnerTx) error { return tx.QueryRow(t.Context(), ask).Scan(&n) }))
		return n
	}
	b := f.with(func(o *backup.Options) {
		o.Store = &between{Store: f.o.Store, deleted: func(name string) {
			if strings.HasSuffix(name, ".oneo") {
				require.Eventually(t, func() bool { return holders() == 0 }, pgtest.Patience, 10*time.Millisecond)
				_, err := f.Keep(t.Context(), ms[1].ID, true, "needed")
				require.NoError(t, err)
			}
		}}
	})
	var gone []string
	_, err := b.Prune(t.Context(), backup.Policy{Last: 1}, "", func(m backup.Manifest) { gone = append(gone, m.ID) })
	require.True(t, fault.Is(err, fault.Unavailable), "%v", err)
	require.Len(t, gone, 1)
	require.Len(t, f.list().Backups, 3)
}

// An archive that is not as long as its manifest says is no backup, and does not count as one: those that are stay.
func TestCutArchiveIsNoBackup(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 100)
	older, newer := f.back(one), f.back(one)
	require.NoError(t, os.Truncate(f.path(newer.Name), newer.Bytes-1))
	plan, err := f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) { t.Error("nothing was to go") })
	require.NoError(t, err)
	require.Len(t, plan.Bad, 1)
	require.ErrorContains(t, plan.Bad[0].Err, "bytes")
	require.FileExists(t, f.path(newer.Name))
	got, err := f.Newest(t.Context(), one.ID)
	require.NoError(t, err)
	require.Equal(t, older.ID, got.ID)
	_, err = f.Find(t.Context(), newer.ID)
	require.True(t, fault.Is(err, fault.Unverified), "%v", err)
}

// What others keep beside the backups is nobody's business here.
func TestSomebodyElsesObjects(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	m := f.back(one)
	for _, name := range []string{"state.json", "terraform/state.json", one.ID + "/note.json", strings.TrimSuffix(m.Name, ".oneo") + "0.json"} {
		require.NoError(t, f.o.Store.Put(t.Context(), name, func(w io.Writer) error { _, err := w.Write([]byte("{}")); return err }))
	}
	c := f.list()
	require.Len(t, c.Backups, 1)
	require.Empty(t, c.Bad)
	require.Empty(t, c.Loose)
}

// The newest backup is not the one that a wrong clock has put into the future, if there is another one.
func TestNewest(t *testing.T) {
	t.Parallel()
	now := time.Now()
	at := func(tenant, id string, after time.Duration) backup.Manifest {
		return backup.Manifest{Tenant: tenant, ID: id, Made: now.Add(after)}
	}
	got := backup.Catalogue{Backups: []backup.Manifest{
		at("one", "1", -time.Hour), at("two", "1", -time.Minute), at("one", "2", -time.Minute), at("two", "2", 10*time.Minute),
		at("one", "3", 1000*time.Hour), at("three", "1", 1000*time.Hour), at("three", "2", 2000*time.Hour),
	}}.Newest()
	require.Len(t, got, 3)
	require.Equal(t, "2", got["one"].ID)
	require.Equal(t, "2", got["two"].ID, "clocks are a little apart")
	require.NotEmpty(t, got["three"].ID, "better than none")
}

// How old an interrupted backup is says the store, not the clock of who prunes.
func TestLooseByTheStoresClock(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	m := f.back(one)
	loose := one.ID + "/20200101T000000Z-00000000000000aa.oneo"
	require.NoError(t, f.o.Store.Put(t.Context(), loose, func(w io.Writer) error { _, err := w.Write([]byte("x")); return err }))
	age := func(name string, by time.Duration) {
		require.NoError(t, os.Chtimes(f.path(name), time.Now().Add(-by), time.Now().Add(-by)))
	}
	prune := func() {
		_, err := f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
		require.NoError(t, err)
	}
	for _, name := range []string{m.Name, manifestOf(m), loose} { // our clock has jumped ahead by a year
		age(name, 365*24*time.Hour)
	}
	prune()
	require.FileExists(t, f.path(loose))
	age(m.Name, 350*24*time.Hour)
	prune()
	require.NoFileExists(t, f.path(loose))
	require.NoError(t, f.Verify(t.Context(), m, nil))
}

// Parts of archives of killed processes go a week later, and with an erased tenant at once.
func TestPartsAreSwept(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one, two := f.tenant("acme", 1), f.tenant("beta", 1)
	m, other := f.back(one), f.back(two)
	part := func(m backup.Manifest, name string, age time.Duration) string {
		file := filepath.Join(filepath.Dir(f.path(m.Name)), ".oneo-partial-"+name)
		require.NoError(t, os.WriteFile(file, []byte("half an archive"), 0o600))
		require.NoError(t, os.Chtimes(file, time.Now().Add(-age), time.Now().Add(-age)))
		return file
	}
	old, young, theirs := part(m, "OLD", 8*24*time.Hour), part(m, "YOUNG", time.Hour), part(other, "THEIRS", time.Hour)
	_, err := f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
	require.NoError(t, err)
	require.NoFileExists(t, old)
	require.FileExists(t, young)
	_, err = f.EraseArchives(t.Context(), one.ID)
	require.NoError(t, err)
	entries, err := os.ReadDir(filepath.Dir(f.path(m.Name)))
	require.NoError(t, err)
	require.Empty(t, entries)
	require.FileExists(t, theirs)
}

// A program that hangs is ended with all that it has begun; one that floods, reads nothing or leaves somebody behind does no harm.
func TestHooksThatMisbehave(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	one := f.tenant("acme", 1)
	dir := t.TempDir()
	script := func(text string) []string { return []string{"/bin/sh", "-c", text, "hook", dir} }
	create := func(change func(*backup.Options)) (backup.Made, error) {
		return f.with(change).Create(t.Context(), one, backup.CreateOptions{})
	}
	_, err := create(func(o *backup.Options) {
		o.HookTimeout, o.Before = 3*time.Second, script(`trap "" TERM INT; sleep 600 & echo $! > "$1/pid"; sleep 600`)
	})
	require.True(t, fault.Is(err, fault.Unfit), "%v", err)
	require.ErrorContains(t, err, "not done after")
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	require.NoError(t, err)
	require.Eventually(t, func() bool { // of one that is dead and that nobody has buried it is empty
		line, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/cmdline")
		return err != nil || len(line) == 0
	}, pgtest.Patience, 10*time.Millisecond, "what it has begun lives on")
	require.Empty(t, f.files())
	_, err = create(func(o *backup.Options) { o.HookTimeout, o.Before = 500*time.Millisecond, script(`exec yes`) })
	require.ErrorContains(t, err, "not done after")

	made, err := create(func(o *backup.Options) { o.HookTimeout, o.After = 500*time.Millisecond, script(`sleep 600`) })
	require.NoError(t, err)
	require.Contains(t, made.Warning, "not done after")
	require.NoError(t, f.Verify(t.Context(), made.Manifest, nil), "the backup is there all the same")

	_, err = create(func(o *backup.Options) {
		o.Before = script(`exec <&-; yes | head -c 20000000; printf '\033[31mthe end\007\377' >&2; exit 1`)
	})
	require.ErrorContains(t, err, "the end")
	require.Less(t, len(err.Error()), 5000)
	require.False(t, bytes.ContainsAny([]byte(err.Error()), "\033\007\377"), "nothing that steers a terminal")

	made, err = create(func(o *backup.Options) {
		o.Before, o.After = script(`exec <&-`), script(`setsid sleep 60 & printenv > "$1/env"`)
		o.Environ = append(os.Environ(), "AWS_SECRET_ACCESS_KEY=secret", "AWS_SESSION_TOKEN=secret", "ONEO_X=secret", "OTHER=seen")
	})
	require.NoError(t, err)
	require.Empty(t, made.Warning)
	env, err := os.ReadFile(filepath.Join(dir, "env"))
	require.NoError(t, err)
	require.Contains(t, string(env), "OTHER=seen")
	require.NotContains(t, string(env), "secret")
}

// Who is done with the catalogue keeps nobody away from it, not even for as long as its session takes to end.
func TestTheCatalogueIsFreeAtOnce(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	for range 200 {
		_, err := f.Prune(t.Context(), backup.Policy{Last: 1}, "", func(backup.Manifest) {})
		require.NoError(t, err)
	}
}
