package transfer_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"

	"io"
)

const childTask = "TRANSFER_TEST_TASK"

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

// task is one thing done by a process of its own.
type task struct {
	What   string // export, import, clone, move, restore or merge
	Number int32  // of the tenant that is exported or cloned
	File   string
	As     string
	Into   string // the group that it is moved to
	Base   string
	Groups map[string]postgres.Group
	Away   bool // a server is away while it is done: it is not waited for as long as for a busy one
}

func (k task) child() error {
	o := postgres.DefaultOptions()
	pgtest.Patient(&o)
	if k.Away {
		o.AcquireTimeout = 5 * time.Second
	}
	o.Groups, o.Secret, o.OwnerConns = k.Groups, pgtest.Secret, 4
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	base, err := tenant.ParseHost(k.Base)
	if err != nil {
		return err
	}
	p, err := assemble(db, base, first)
	if err != nil {
		return err
	}
	return k.do(context.Background(), db, p)
}

func (k task) do(ctx context.Context, db *postgres.DB, p parts) (err error) {
	var as tenant.Slug
	if k.As != "" {
		if as, err = tenant.ParseSlug(k.As); err != nil {
			return err
		}
	}
	var t tenant.Tenant
	if k.Number != 0 {
		err := db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			t, err = registry.ByNumber(ctx, tx, k.Number)
			return err
		})
		if err != nil {
			return err
		}
	}
	var in *os.File
	switch k.What {
	case "import", "restore", "merge":
		if in, err = os.Open(k.File); err != nil {
			return err
		}
		defer in.Close()
	}
	by := transfer.Loading{Actor: "test"}
	switch k.What {
	case "export":
		return store.WriteFile(ctx, k.File, func(w io.Writer) error {
			_, err := p.Export(ctx, t, w, transfer.ExportOptions{})
			return err
		})
	case "import":
		_, _, err = p.Import(ctx, in, transfer.ImportOptions{Slug: as, Loading: by})
	case "clone":
		_, err = p.Clone(ctx, t, transfer.CloneOptions{Slug: as, Actor: "test"})
	case "move":
		_, err = p.provision.Move(ctx, as, provision.MoveRequest{Group: k.Into, Keep: time.Hour, Actor: "test"})
	case "restore":
		_, _, err = p.Restore(ctx, t, in, time.Hour, false, by)
	case "merge":
		_, err = p.Merge(ctx, t, in, false, transfer.Parts{Tables: []string{"authors", "books"}}, func([]transfer.Difference) error { return nil }, by)
	default:
		err = fmt.Errorf("no task %q", k.What)
	}
	return err
}

// died lets the operations that are open look as they do long after their processes died, instead of waiting for that.
func (f *fixture) died() {
	f.t.Helper()
	_, err := f.admin.Exec(context.Background(), `update public.operations set heartbeat = now() - interval '1 day' where state = 'running'`)
	require.NoError(f.t, err)
}

// again does what a dead process was to do, in this one; what that has left in the way, a connection or a lock, goes by itself.
func (f *fixture) again(t *testing.T, p parts, k task) {
	t.Helper()
	for deadline := time.Now().Add(pgtest.Patience); ; time.Sleep(100 * time.Millisecond) {
		f.died()
		err := k.do(context.Background(), f.DB, p)
		if err == nil || strings.Contains(err.Error(), "exists already") { // it had been finished, or its operation was finished first
			return
		}
		require.True(t, time.Now().Before(deadline), "%v", err)
	}
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

// kill -9 at each place of a clone, which is an export and an import in one, then the same again: there is no half a clone.
func TestKillClone(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	_, trailer := f.export(p, one)
	groups := map[string]postgres.Group{postgres.MainGroup: f.Group}
	tried := 0
	for n, place := range failpoint.All {
		switch prefix, _, _ := strings.Cut(place, "."); prefix {
		case "export", "load", "create":
		default:
			continue
		}
		k := task{What: "clone", Number: one.Number, As: fmt.Sprintf("copy-%d", n), Base: f.Base.String(), Groups: groups}
		code, out := k.process(t, place+"=exit")
		require.Equal(t, 137, code, "%s: %s", place, out)
		f.again(t, p, k)
		got, err := registryTenant(f, k.As)
		require.NoError(t, err)
		require.Equal(t, tenant.Active, got.State, place)
		_, have := f.export(p, got)
		require.Equal(t, trailer.Tables, have.Tables, place)
		require.Equal(t, 1, f.count(`select count(*) from public.audit where action = 'tenant.clone' and tenant = $1 and details ->> 'to' = $2`, one.Number, k.As), place)
		tried++
	}
	require.Equal(t, 10, tried)
	f.Invariants(t)
}

// kill -9 at each place of an export and an import, then the same again: of what was half done nothing is there, and
// the end is the same.
func TestKillEverywhere(t *testing.T) {
	t.Parallel()
	f := newFixture(t)
	p := f.with(first)
	one := f.tenant(p, "acme")
	f.in(one, rows)
	b, trailer := f.export(p, one)
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole")
	require.NoError(t, os.WriteFile(whole, b, 0o600))
	groups := map[string]postgres.Group{postgres.MainGroup: f.Group}
	places := []string{}
	for _, place := range failpoint.All {
		switch prefix, _, _ := strings.Cut(place, "."); prefix {
		case "export", "load":
			places = append(places, place+"=exit")
			if strings.HasSuffix(place, ".table") {
				places = append(places, place+"=exit@5")
			}
		case "create":
			places = append(places, place+"=exit")
		}
	}
	tried := 0
	for n, place := range places {
		if strings.HasPrefix(place, "export") {
			k := task{What: "export", Number: one.Number, File: filepath.Join(dir, fmt.Sprintf("export-%d", n)), Base: f.Base.String(), Groups: groups}
			code, out := k.process(t, place)
			require.Equal(t, 137, code, "%s: %s", place, out)
			require.NoFileExists(t, k.File)
			f.again(t, p, k)
			again, err := os.ReadFile(k.File)
			require.NoError(t, err)
			a, err := archive.NewReader(bytes.NewReader(again), archive.ReadOptions{})
			require.NoError(t, err)
			for err == nil {
				_, err = a.Next()
			}
			require.ErrorIs(t, err, io.EOF)
			have, err := a.Trailer()
			require.NoError(t, err)
			require.Equal(t, trailer.Tables, have.Tables)
			tried++
			continue
		}
		k := task{What: "import", File: whole, As: fmt.Sprintf("copy-%d", n), Base: f.Base.String(), Groups: groups}
		code, out := k.process(t, place)
		require.Equal(t, 137, code, "%s: %s", place, out)
		schema := strings.ReplaceAll(k.As, "-", "_")
		if place != "create.finish=exit" && place != "create.after=exit" { // where the tenant is made, or waits for its last step
			require.Zero(t, f.count(`select count(*) from pg_namespace where nspname = $1`, schema), place)
		}
		f.again(t, p, k)
		got, err := registryTenant(f, k.As)
		require.NoError(t, err)
		require.Equal(t, tenant.Active, got.State, place)
		_, have := f.export(p, got)
		require.Equal(t, trailer.Tables, have.Tables, place)
		tried++
	}
	require.Equal(t, 12, tried)
	f.Invariants(t)
}

// file is an archive on disk.
func (f *fixture) file(b []byte) string {
	f.t.Helper()
	name := filepath.Join(f.t.TempDir(), "archive")
	require.NoError(f.t, os.WriteFile(name, b, 0o600))
	return name
}

func registryTenant(f *fixture, slug string) (t tenant.Tenant, err error) {
	err = f.DB.AsOwner(context.Background(), postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		t, err = registry.BySlug(context.Background(), tx, pgtest.Slug(f.t, slug))
		return err
	})
	return t, err
}
