package snapshot_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/snapshot"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

const childTask = "SNAPSHOT_TEST_TASK"

// TestMain also serves as the child that does one thing and is killed in the middle of it.
func TestMain(m *testing.M) {
	if raw := os.Getenv(childTask); raw != "" {
		var k task
		if err := json.Unmarshal([]byte(raw), &k); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(9)
		}
		if err := k.child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	pgtest.Main(m)
}

// task is one thing done to a tenant by a process of its own.
type task struct {
	What   string // migrate, undo or expire
	Number int32
	Run    uuid.UUID
	Up     []string
	Groups map[string]postgres.Group
}

func (k task) child() error {
	o := postgres.DefaultOptions()
	pgtest.Patient(&o)
	o.Groups, o.Secret, o.OwnerConns = k.Groups, pgtest.Secret, 4
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files, Tenant: files(k.Up...), LockWait: pgtest.Patience})
	if err != nil {
		return err
	}
	s, err := snapshot.New(snapshot.Options{DB: db, Migrate: m, Keep: time.Hour, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	ctx := context.Background()
	var t tenant.Tenant
	err = db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		t, err = registry.ByNumber(ctx, tx, k.Number)
		return err
	})
	if err != nil {
		return err
	}
	switch k.What {
	case "migrate":
		_, err = m.Tenant(ctx, t, migrate.TenantOptions{Keeper: s.Keeper(k.Run, t)})
	case "undo":
		_, err = s.Undo(ctx, t, k.Run)
	case "expire":
		_, err = s.Expire(ctx)
	default:
		err = fmt.Errorf("there is no %q", k.What)
	}
	return err
}

// process runs the task in a process of its own and returns its exit code.
func (k task) process(t *testing.T, failpoints string) (code int, out string) {
	t.Helper()
	self, err := os.Executable()
	require.NoError(t, err)
	raw, err := json.Marshal(k)
	require.NoError(t, err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+failpoints)
	b, _ := cmd.CombinedOutput()
	return cmd.ProcessState.ExitCode(), string(b)
}

// kill -9 at each place, at each of the first times that it is passed; then the same again. What was half done is not
// there, and the end is the same.
func TestKillEverywhere(t *testing.T) {
	t.Parallel()
	up := []string{
		first,
		`alter table books drop column pages cascade; create table notes (id int)`,
		`data:update authors set name = name || '.' where name not like '%.' and id in (select id from authors where name not like '%.' order by id limit $1)`,
		"-- oneo: no-transaction\ncreate index concurrently books_title on books (title)",
	}
	for _, place := range failpoint.All {
		what, times := map[string]string{"point": "migrate", "undo": "undo"}[strings.Split(place, ".")[0]], 1
		switch {
		case place == "point.expired":
			what = "expire"
		case place == "point.copied":
			times = 2 // books, authors
		case place == "point.noted":
			times = 4 // the first step, a batch, the last batch, and its version
		}
		for n := 1; n <= times && what != ""; n++ {
			at := fmt.Sprintf("%s=exit@%d", place, n)
			t.Run(at, func(t *testing.T) {
				t.Parallel()
				f := newFixture(t)
				s := f.snapshots(f.with(up...))
				books, authors := f.all(f.t1, "books"), f.all(f.t1, "authors")
				k := task{Number: f.t1.Number, Up: up, Groups: map[string]postgres.Group{postgres.MainGroup: f.Group}}
				var err error
				k.Run, err = uuid.NewV7()
				require.NoError(t, err)
				through := func(what string) {
					t.Helper()
					k.What = what
					code, out := k.process(t, "")
					require.Zerof(t, code, "%s: %s", what, out)
				}
				if what != "migrate" {
					through("migrate")
				}
				if what == "expire" {
					through("undo")
					_, err := f.admin.Exec(t.Context(), `update public.undo_points set expires_at = now()`)
					require.NoError(t, err)
				}
				k.What = what
				code, out := k.process(t, at)
				require.Equalf(t, 137, code, "the failpoint did not fire: %s", out)
				f.Invariants(t)
				through(what)
				f.Invariants(t)
				switch what {
				case "migrate":
					require.ElementsMatch(t, []string{"books", "authors"}, f.kept(k.Run, f.t1, s))
					through("undo")
				case "expire":
					require.Equal(t, "0", f.scalar(`select count(*) from public.undo_points`))
					require.Equal(t, "0", f.scalar(`select count(*) from pg_namespace where nspname like 'oneo\_undo%'`))
				}
				require.Equal(t, f.ref, f.print(f.t1))
				require.Equal(t, books, f.all(f.t1, "books"))
				require.Equal(t, authors, f.all(f.t1, "authors"))
				require.Equal(t, "1", f.scalar(`select version from public.placements where number = $1`, f.t1.Number))
				f.Invariants(t)
			})
		}
	}
}
