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
}

func (k task) child() error {
	o := postgres.DefaultOptions()
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
	ctx := context.Background()
	if k.What == "move" {
		slug, err := tenant.ParseSlug(k.As)
		if err != nil {
			return err
		}
		_, err = p.provision.Move(ctx, slug, provision.MoveRequest{Group: k.Into, Keep: time.Hour, Actor: "test"})
		return err
	}
	if k.What == "import" {
		f, err := os.Open(k.File)
		if err != nil {
			return err
		}
		defer f.Close()
		slug, err := tenant.ParseSlug(k.As)
		if err != nil {
			return err
		}
		_, _, err = p.Import(ctx, f, transfer.ImportOptions{Slug: slug, Loading: transfer.Loading{Actor: "test"}})
		return err
	}
	var t tenant.Tenant
	err = db.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		t, err = registry.ByNumber(ctx, tx, k.Number)
		return err
	})
	if err != nil {
		return err
	}
	if k.What == "clone" {
		slug, err := tenant.ParseSlug(k.As)
		if err != nil {
			return err
		}
		_, err = p.Clone(ctx, t, transfer.CloneOptions{Slug: slug, Actor: "test"})
		return err
	}
	switch k.What {
	case "restore", "merge":
		f, err := os.Open(k.File)
		if err != nil {
			return err
		}
		defer f.Close()
		if k.What == "restore" {
			_, _, err = p.Restore(ctx, t, f, time.Hour, false, transfer.Loading{Actor: "test"})
			return err
		}
		_, err = p.Merge(ctx, t, f, false, transfer.Parts{Tables: []string{"authors", "books"}}, func([]transfer.Difference) error { return nil }, transfer.Loading{Actor: "test"})
		return err
	}
	return store.WriteFile(ctx, k.File, func(w io.Writer) error {
		_, err := p.Export(ctx, t, w, transfer.ExportOptions{})
		return err
	})
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
		require.Eventually(t, func() bool { // the dead process's operation goes stale within a second
			code, out = k.process(t, "")
			return code == 0 || strings.Contains(out, "exists already")
		}, time.Minute, 100*time.Millisecond, "%s: %s", place, out)
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
			places = append(places, place+"=exit", place+"=exit@5")
		case "create":
			places = append(places, place+"=exit")
		}
	}
	tried := 0
	for n, place := range places {
		if strings.HasPrefix(place, "export") {
			k := task{What: "export", Number: one.Number, File: filepath.Join(dir, fmt.Sprintf("export-%d", n)), Base: f.Base.String(), Groups: groups}
			code, out := k.process(t, place)
			if code == 0 && strings.Contains(place, "@") { // it is not passed so often
				continue
			}
			require.Equal(t, 137, code, "%s: %s", place, out)
			require.NoFileExists(t, k.File)
			code, out = k.process(t, "")
			require.Zero(t, code, out)
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
		if code == 0 && strings.Contains(place, "@") {
			continue
		}
		require.Equal(t, 137, code, "%s: %s", place, out)
		schema := strings.ReplaceAll(k.As, "-", "_")
		if place != "create.finish=exit" && place != "create.after=exit" { // where the tenant is made, or waits for its last step
			require.Zero(t, f.count(`select count(*) from pg_namespace where nspname = $1`, schema), place)
		}
		require.Eventually(t, func() bool { // the dead process's operation goes stale within a second
			code, out = k.process(t, "")
			return code == 0 || strings.Contains(out, "exists already")
		}, time.Minute, 100*time.Millisecond, "%s: %s", place, out)
		got, err := registryTenant(f, k.As)
		require.NoError(t, err)
		require.Equal(t, tenant.Active, got.State, place)
		_, have := f.export(p, got)
		require.Equal(t, trailer.Tables, have.Tables, place)
		tried++
	}
	require.Greater(t, tried, 10)
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
