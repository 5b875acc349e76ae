package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/devstack"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/pgtest"
)

// TestMain is the program itself when a script or a test calls it as a child.
func TestMain(m *testing.M) {
	if os.Getenv("ONEO_TEST_BE_ONEO") != "" {
		os.Exit(run(context.Background(), os.Args[1:], slices.DeleteFunc(os.Environ(), func(kv string) bool {
			return strings.HasPrefix(kv, "ONEO_TEST_BE_ONEO")
		}), os.Stdin, os.Stdout, os.Stderr))
	}
	defer func() { _ = os.Remove(plainPath()) }() // where there is one
	pgtest.Main(m)
}

// TestScripts runs testdata/script/*.txtar, each on a migrated database of its own, with oneo in its path.
func TestScripts(t *testing.T) {
	t.Parallel()
	bin := t.TempDir()
	self, err := os.Executable()
	require.NoError(t, err)
	wrapper := "#!/bin/sh\nexec env ONEO_TEST_BE_ONEO=1 " + self + " \"$@\"\n"
	require.NoError(t, os.WriteFile(filepath.Join(bin, "oneo"), []byte(wrapper), 0o755))
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("GORACE", os.Getenv("GORACE"))
			e.Setenv("PATH", bin+string(os.PathListSeparator)+e.Getenv("PATH"))
			if strings.Contains(e.WorkDir, "nodatabase") {
				return nil
			}
			schemas, err := filepath.Abs("../../schemas/tenant")
			if err != nil {
				return err
			}
			e.Setenv("SCHEMAS", schemas)
			if strings.Contains(e.WorkDir, "physical") {
				return ownServer(e)
			}
			env := pgtest.New(e.T().(testing.TB))
			e.Setenv("ONEO_DATABASE_URL", env.Group.URL)
			e.Setenv("ONEO_DATABASE_OWNER_URL", env.Group.OwnerURL)
			e.Setenv("ONEO_SERVER_SECRET", pgtest.Secret)
			for _, kv := range patience {
				k, v, _ := strings.Cut(kv, "=")
				e.Setenv(k, v)
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// exits CODE oneo ...: runs the command and holds its exit code.
			"exits": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: exits CODE COMMAND...")
				}
				err := ts.Exec(args[1], args[2:]...)
				code := "0"
				var exit *exec.ExitError
				if errors.As(err, &exit) {
					code = jsonText(exit.ExitCode())
				} else if err != nil {
					ts.Fatalf("%v", err)
				}
				if code != args[0] {
					ts.Fatalf("exit code %s, want %s", code, args[0])
				}
			},
			// remember VAR KEY: keeps a value of the JSON object that the last command has written.
			"remember": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 2 {
					ts.Fatalf("usage: remember VAR KEY")
				}
				var object map[string]any
				ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &object))
				value, there := object[args[1]].(string)
				if !there {
					ts.Fatalf("no text %q in %v", args[1], object)
				}
				ts.Setenv(args[0], value)
			},
			// restart-server starts the script's own server again.
			"restart-server": func(ts *testscript.TestScript, neg bool, args []string) {
				server, own := ts.Value(serverKey{}).(*devstack.Postgres)
				if neg || len(args) != 0 || !own {
					ts.Fatalf("usage: restart-server")
				}
				ts.Check(server.Restart(context.Background()))
			},
			// elsewhere goes on with another migrated database, as empty as the first one was.
			"elsewhere": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 0 {
					ts.Fatalf("usage: elsewhere")
				}
				env := pgtest.New(t)
				ts.Setenv("ONEO_DATABASE_URL", env.Group.URL)
				ts.Setenv("ONEO_DATABASE_OWNER_URL", env.Group.OwnerURL)
			},
			// sql TEXT, or sql @FILE: runs statements as the owner, past oneo.
			"sql": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 1 {
					ts.Fatalf("usage: sql TEXT|@FILE")
				}
				text := args[0]
				if file, ok := strings.CutPrefix(text, "@"); ok {
					text = ts.ReadFile(file)
				}
				ctx := context.Background()
				c, err := pgx.Connect(ctx, ts.Getenv("ONEO_DATABASE_OWNER_URL"))
				ts.Check(err)
				defer c.Close(ctx)
				ts.Check(c.PgConn().Exec(ctx, text).Close())
			},
		},
	})
}

type serverKey struct{}

// ownServer gives a script a PostgreSQL of its own, whose settings it may change. Nothing is made in it.
func ownServer(e *testscript.Env) error {
	dir, err := os.MkdirTemp("", "oneo-physical-") // PostgreSQL's user may enter it
	if err != nil {
		return err
	}
	e.Defer(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	server, err := devstack.StartPostgres(context.Background(), devstack.PostgresOptions{Dir: dir, Fast: true, Trust: true, Settings: map[string]string{"shared_buffers": "32MB"}})
	if err != nil {
		return err
	}
	e.Defer(func() { _ = server.Stop(context.Background()) })
	e.Values[serverKey{}] = server
	as := func(role string) string {
		return strings.Replace(server.URL("oneo"), "postgres@", role+"@", 1)
	}
	for k, v := range map[string]string{
		"DIR": dir, "ADMIN_URL": server.URL("oneo"), "ONEO_DATABASE_URL": as("oneo_app"), "ONEO_DATABASE_OWNER_URL": as("oneo_owner"), "ONEO_SERVER_SECRET": pgtest.Secret,
	} {
		e.Setenv(k, v)
	}
	for _, kv := range patience {
		k, v, _ := strings.Cut(kv, "=")
		e.Setenv(k, v)
	}
	return nil
}

func jsonText(v any) string {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func walk(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, c := range cmd.Commands() {
		walk(c, visit)
	}
}

func TestEveryCommandHasHelpAndAnExample(t *testing.T) {
	t.Parallel()
	root := newRootCmd(&env{flags: map[string]string{}})
	require.NotNil(t, root.PersistentFlags().Lookup("output"))
	for _, c := range root.Commands() {
		walk(c, func(c *cobra.Command) {
			require.NotEmpty(t, c.Short, c.CommandPath())
			require.NotNil(t, c.InheritedFlags().Lookup("output"), "%s has no --output", c.CommandPath())
			if c.Name() == "exit-codes" || c.Name() == "help" || strings.HasPrefix(c.CommandPath(), "oneo completion") {
				return
			}
			require.NotEmpty(t, c.Long, c.CommandPath())
			require.Contains(t, c.Example, "oneo ", c.CommandPath())
		})
	}
}

// TestAMissingArgumentIsNamed calls every command without any: one that wants some says which, and how it is called.
func TestAMissingArgumentIsNamed(t *testing.T) {
	t.Parallel()
	asked := 0
	walk(newRootCmd(&env{flags: map[string]string{}}), func(c *cobra.Command) {
		if c.Args == nil || c.Args(c, nil) == nil || c.Name() == "psql" { // psql has a choice, and says so itself
			return
		}
		asked++
		var usage errUsage
		require.ErrorAs(t, c.Args(c, nil), &usage, c.CommandPath())
		f := fault.Of(usage)
		require.Equal(t, "missing_argument", f.Code, "%s: %s", c.CommandPath(), f.Message)
		require.Regexp(t, "^missing argument: [A-Z]+(\\|[A-Z]+|\\.\\.\\.| [A-Z]+)*$", f.Message, c.CommandPath())
		require.Equal(t, "usage: "+c.UseLine(), f.Hint)
	})
	require.Greater(t, asked, 20)
	var errs strings.Builder
	require.Equal(t, exitUsage, run(t.Context(), []string{"tenant", "rename", "acme"}, nil, strings.NewReader(""), io.Discard, &errs))
	require.Equal(t, "error: missing argument: NEW\nhint:  usage: oneo tenant rename NAME NEW [flags]\n", errs.String())
}

// TestTheCommandLineIsAsCommitted shows an accidental change of a command or flag in the diff of a file.
func TestTheCommandLineIsAsCommitted(t *testing.T) {
	t.Parallel()
	tree := map[string]map[string]string{}
	walk(newRootCmd(&env{flags: map[string]string{}}), func(c *cobra.Command) {
		flags := map[string]string{}
		c.LocalFlags().VisitAll(func(f *pflag.Flag) {
			def := f.DefValue
			if f.Name == "data" || f.Name == "jobs" {
				def = "(of the machine)"
			}
			flags["--"+f.Name] = strings.TrimSpace(f.Shorthand + " " + f.Value.Type() + " " + def)
		})
		tree[c.CommandPath()+" | "+c.Use] = flags
	})
	got, err := json.MarshalIndent(tree, "", "  ")
	require.NoError(t, err)
	got = append(got, '\n')
	const golden = "testdata/cli.golden.json"
	if os.Getenv("ONEO_UPDATE_GOLDEN") != "" {
		require.NoError(t, os.WriteFile(golden, got, 0o644))
	}
	want, err := os.ReadFile(golden)
	require.NoError(t, err)
	require.Equal(t, string(want), string(got), "the command line has changed; if that is meant: make golden")
}

// TestDev runs `oneo dev` as a newcomer does: start, read by the printed lines' tokens, stop, start again.
func TestDev(t *testing.T) {
	t.Parallel()
	_, err := pgserver.Find()
	require.NoError(t, err)
	dir, err := os.MkdirTemp("", "oneo-dev-")
	require.NoError(t, err)
	require.NoError(t, os.Chmod(dir, 0o755))
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	first := startDev(t, dir)
	require.Contains(t, first.stderr.String(), "deals")
	lines := first.curl(t)
	require.Len(t, lines, 4, "three tenants and the administration")
	counts := map[string]int{}
	for _, l := range lines[:3] {
		status, body := first.get(t, l)
		require.Equal(t, 200, status, body)
		var page struct {
			Data []json.RawMessage `json:"data"`
			Page struct {
				Count *int `json:"count"`
			} `json:"page"`
		}
		require.NoError(t, json.Unmarshal([]byte(body), &page), body)
		require.Len(t, page.Data, 2)
		require.NotNil(t, page.Page.Count)
		counts["Won"] += *page.Page.Count
	}
	require.Equal(t, 4238, counts["Won"], "the deals won must add up to the file's")
	status, body := first.get(t, lines[3])
	require.Equal(t, 200, status, body)
	require.Contains(t, body, `"slug":"central"`)
	foreign := lines[0]
	foreign.host = lines[1].host
	status, body = first.get(t, foreign)
	require.Equal(t, 401, status, "central's key at east: %s", body)
	require.NotContains(t, body, "Won")
	slug, _, _ := strings.Cut(lines[0].host, ".")
	// A second terminal sees which statements cost most: the server counts them, by tenant.
	env, err := os.ReadFile(filepath.Join(dir, "oneo.env"))
	require.NoError(t, err)
	inspect := exec.Command(first.cmd.Path, "inspect", "queries", "-t", slug, "-o", "name")
	inspect.Env = append(os.Environ(), "ONEO_TEST_BE_ONEO=1")
	for line := range strings.Lines(string(env)) {
		if kv, ok := strings.CutPrefix(strings.TrimSpace(line), "export "); ok {
			inspect.Env = append(inspect.Env, strings.ReplaceAll(kv, "'", ""))
		}
	}
	counted, err := inspect.CombinedOutput()
	require.NoError(t, err, string(counted))
	require.Contains(t, string(counted), slug)
	// The tenants can be had back from a second terminal, as soon as the backup is made that was begun behind the welcome.
	require.Eventually(t, func() bool {
		list := exec.Command("sh", "-c", `. "$0" && exec env ONEO_TEST_BE_ONEO=1 "$1" backup physical list -o name -q`, filepath.Join(dir, "oneo.env"), first.cmd.Path)
		text, err := list.Output()
		require.NoError(t, err)
		return len(text) > 0
	}, 3*pgtest.Patience, 200*time.Millisecond, "no physical backup was made:\n%s", first.stderr)
	require.Equal(t, 0, first.stop(t))
	// A data folder that was made anew does not stumble over the old one's backups.
	text, err := os.ReadFile(filepath.Join(dir, "physical", "main", "cluster.json"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "physical", "main", "cluster.json"), bytes.Replace(text, []byte(`"system":"`), []byte(`"system":"1`), 1), 0o600))

	ops := twoPorts(t)
	again := startDev(t, dir, "ONEO_SERVER_OPS_ADDR=127.0.0.1:"+ops)
	res, err := http.Get("http://127.0.0.1:" + ops + "/livez")
	require.NoError(t, err, "operators are answered where that is configured")
	require.NoError(t, res.Body.Close())
	require.Contains(t, again.stderr.String(), "holds backups of another cluster")
	require.Equal(t, lines, again.curl(t), "a second start keeps data and keys")
	require.NotContains(t, again.stderr.String(), "TENANT", "a second start seeds nothing")
	require.Equal(t, 0, again.stop(t))
}
