package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// version is set by the build (-ldflags "-X main.version=...").
var version = ""

// versionOf is the version of this binary: the build's, or what the toolchain knows of its source.
func versionOf() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" && len(s.Value) >= 12 {
				return "devel-" + s.Value[:12]
			}
		}
	}
	return "devel"
}

func newVersionCmd(e *env) *cobra.Command {
	return &cobra.Command{
		Use: "version", Short: "Show the version", Long: "Show the version of this binary. It needs no database.", Example: "  oneo version",
		Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			type info struct{ version, goVersion string }
			i := info{version: versionOf()}
			if b, ok := debug.ReadBuildInfo(); ok {
				i.goVersion = b.GoVersion
			}
			return showOne(e, i, []column[info]{
				{"VERSION", "version", func(i info) any { return i.version }},
				{"GO", "go", func(i info) any { return i.goVersion }},
			})
		},
	}
}

func newServeCmd(e *env) *cobra.Command {
	var auto bool
	var addr string
	cmd := &cobra.Command{
		Use: "serve", Short: "Serve tenants and the administration over HTTP",
		Long: `Serve every tenant under its domains and the administration under the public hosts. It refuses to start
when the shared schema is behind; --auto-migrate brings it up first. Health and readiness are on
server.ops_addr. A signal stops it in order: requests at work are finished.`,
		Example: "  oneo serve\n  oneo serve --auto-migrate --addr :8080", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if addr != "" {
				e.flags["server.addr"] = addr
			}
			// Whoever reads the log may go away: a write then fails, and the process lives. Nobody waits for these signals; they are
			// not ignored, which programs that are started would inherit.
			signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
			e.serving = true
			a, err := e.open()
			if err != nil {
				return err
			}
			return untilStopped(cmd.Context(), a.Serve(cmd.Context(), app.ServeOptions{AutoMigrate: auto, Version: versionOf()}))
		},
	}
	cmd.Flags().BoolVar(&auto, "auto-migrate", false, "bring the shared schema to its newest version first")
	cmd.Flags().StringVar(&addr, "addr", "", "`ADDRESS` to serve on; default: server.addr")
	return cmd
}

func newInitCmd(e *env) *cobra.Command {
	var admin, adminFile, group string
	cmd := &cobra.Command{
		Use: "init", Short: "Make database, roles and rights, once",
		Long: `Make what oneo needs in PostgreSQL: the database, the owner's and the app's roles with their rights, a login
for each sub-pool, the schema ext and the ledger. It can be run again: it repairs what is missing.

It wants an administrator's URL (a superuser, or a role with CREATEROLE and CREATEDB): with --admin-url,
better with --admin-url-file, or else the owner's URL of the configuration.
Give a file where others can see the list of processes.`,
		Example: "  oneo init --admin-url-file /run/secrets/postgres-admin-url\n  oneo init --admin-url postgres://postgres@localhost/postgres",
		Args:    usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := e.load()
			if err != nil {
				return err
			}
			if admin != "" && adminFile != "" {
				return errUsage{fault.New(fault.Invalid, "--admin-url and --admin-url-file exclude each other")}
			}
			if adminFile != "" {
				text, err := readFile(e, adminFile)
				if err != nil {
					return fault.Wrap(err, fault.Invalid, "the file with the administrator's URL cannot be read")
				}
				admin = string(trimNewline(text))
			}
			inst, err := app.Init(cmd.Context(), c, app.InitOptions{AdminURL: admin, Group: group, Logf: e.say})
			if err != nil {
				return err
			}
			e.say("initialised; next: oneo migrate --shared")
			return showOne(e, inst, []column[postgres.Installation]{
				{"INSTALLATION", "installation", func(i postgres.Installation) any { return i.ID }},
				{"LOGINS", "logins", func(i postgres.Installation) any { return i.Logins }},
				{"APP ROLE", "app_role", func(i postgres.Installation) any { return i.AppRole }},
			})
		},
	}
	cmd.Flags().StringVar(&admin, "admin-url", "", "the administrator's `URL`")
	cmd.Flags().StringVar(&adminFile, "admin-url-file", "", "a `FILE` that holds it; - is standard input")
	cmd.Flags().StringVar(&group, "group", "", "only this database `GROUP`")
	return cmd
}

// readFile reads a file, or standard input where its name is "-".
func readFile(e *env, name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(io.LimitReader(e.in, 64<<10))
	}
	return os.ReadFile(name)
}

func trimNewline(b []byte) []byte {
	for len(b) > 0 && (b[len(b)-1] == '\n' || b[len(b)-1] == '\r') {
		b = b[:len(b)-1]
	}
	return b
}

func newConfigCmd(e *env) *cobra.Command {
	var origin bool
	showCmd := &cobra.Command{
		Use: "show", Short: "Show every setting", Long: "Show every setting, with secrets hidden; --origin says where each value comes from.",
		Example: "  oneo config show --origin", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			c, err := e.load()
			if err != nil {
				return err
			}
			columns := []column[[3]string]{
				{"SETTING", "key", func(s [3]string) any { return s[0] }},
				{"VALUE", "value", func(s [3]string) any { return s[1] }},
			}
			if origin {
				columns = append(columns, column[[3]string]{"ORIGIN", "origin", func(s [3]string) any { return s[2] }})
			}
			var rows [][3]string
			for _, s := range c.Settings(e.origins) {
				rows = append(rows, [3]string{s.Key, s.Value, s.Origin})
			}
			return show(e, rows, columns)
		},
	}
	showCmd.Flags().BoolVar(&origin, "origin", false, "say where each value comes from")
	validate := &cobra.Command{
		Use: "validate", Short: "Check the configuration", Long: "Read the configuration and check every value. It connects to nothing.",
		Example: "  oneo config validate --config /etc/oneo/config.yaml", Args: usageArgs(cobra.NoArgs),
		RunE: func(*cobra.Command, []string) error {
			if _, err := e.load(); err != nil {
				return err
			}
			e.say("the configuration is valid")
			if e.output == "table" {
				return nil
			}
			return showOne(e, true, []column[bool]{{"VALID", "valid", func(ok bool) any { return ok }}})
		},
	}
	return noun("config", "Show and check the configuration", "Settings come from flags, the environment, a file and the defaults, in this order.",
		"  oneo config show --origin", showCmd, validate)
}

func newCacheCmd(e *env) *cobra.Command {
	var s selector
	flush := &cobra.Command{
		Use: "flush", Short: "Forget what is cached of tenants",
		Long:    "Raise the tenants' cache generation: every value cached of them is forgotten by every server at once. Nothing but speed changes.",
		Example: "  oneo cache flush -t acme", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if _, err := s.filter(); err != nil {
				return err
			}
			a, err := e.open()
			if err != nil {
				return err
			}
			ts, err := s.tenants(cmd.Context(), a)
			if err != nil {
				return err
			}
			report := fleet.Run(cmd.Context(), ts, fleet.Options{Jobs: 1},
				func(t tenant.Tenant) string { return t.Slug.String() },
				func(ctx context.Context, t tenant.Tenant) fleet.Outcome {
					return fleet.Outcome{Err: flushTenant(ctx, a, t)}
				})
			if err := show(e, report.Outcomes, flushedColumns); err != nil {
				return err
			}
			e.say("flushed %d tenant(s)", report.Count(fleet.OK))
			switch {
			case report.Count(fleet.Failed) > 0:
				return errExit{exitSomeFailed}
			case report.Interrupted():
				return cmd.Context().Err()
			}
			return nil
		},
	}
	s.bind(flush, e)
	return noun("cache", "Flush what is cached of tenants", "Redis and the servers cache what PostgreSQL knows; losing it costs speed only.",
		"  oneo cache flush -t acme", flush)
}

var flushedColumns = []column[fleet.Outcome]{
	{"TENANT", "tenant", func(o fleet.Outcome) any { return o.Tenant }},
	{"STATUS", "status", func(o fleet.Outcome) any { return string(o.Status) }},
	{"MS", "duration_ms", func(o fleet.Outcome) any { return o.Duration.Milliseconds() }},
	{"ERROR", "error", func(o fleet.Outcome) any { return errorObject(o.Err) }},
}

func flushTenant(ctx context.Context, a *app.App, t tenant.Tenant) error {
	var hosts []tenant.Host
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		ds, err := registry.Domains(ctx, tx, t)
		for _, d := range ds {
			hosts = append(hosts, d.Host)
		}
		if err != nil {
			return err
		}
		return registry.FlushCache(ctx, tx, t)
	})
	if err != nil {
		return fmt.Errorf("flush %s: %w", t.Slug, err)
	}
	a.Changed(ctx, t, hosts...)
	return nil
}
