package main

import (
	"context"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/tui"
)

func newTUICmd(e *env) *cobra.Command {
	var readOnly bool
	cmd := &cobra.Command{
		Use: "tui", Short: "The dashboard: see the fleet, and act",
		Long: `Show the fleet in one screen, and lists of tenants, runs, backups, queries, locks, operations, the audit trail,
domains, users and logs; ? names the keys of each. What it changes, it changes by running a oneo command, which it
shows first. Rates and logs come from the running servers, everything else from PostgreSQL and the store of backups.

With --read-only, or tui.protected in the configuration, nothing is changed before :unlock and a typed word.`,
		Example: "  oneo tui\n  oneo tui --read-only --config production.yaml", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return runTUI(cmd.Context(), e, readOnly) },
	}
	cmd.Flags().BoolVar(&readOnly, "read-only", false, "change nothing before :unlock")
	return cmd
}

func runTUI(ctx context.Context, e *env, readOnly bool) error {
	out, ok := e.out.(*os.File)
	if !e.terminal || !ok || !term.IsTerminal(int(out.Fd())) {
		return fault.New(fault.NeedsConfirmation, "the dashboard needs a terminal").WithCode("no_terminal").
			WithHint("oneo status tells the fleet, oneo tenant list the tenants, both with -o json")
	}
	if e.getenv("TERM") == "dumb" {
		return fault.New(fault.NeedsConfirmation, "the dashboard needs a terminal that can move its cursor, and TERM is dumb").WithCode("no_terminal").
			WithHint("oneo status tells the fleet, oneo tenant list the tenants, both with -o json")
	}
	c, err := e.load()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return fault.Wrap(err, fault.Internal, "oneo cannot find its own program")
	}
	// What is logged would be written over the screen.
	a, err := app.Open(c, versionOf(), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	a.Environ, e.app = e.environ, a
	flags := e.globalFlags()
	return tui.Show(ctx, tui.Options{
		Source: newFleetSource(a),
		Command: func(ctx context.Context, args []string) *exec.Cmd {
			cmd := exec.CommandContext(ctx, self, slices.Concat(flags, args)...)
			cmd.Env = e.environ
			// As Ctrl-C would: it ends what it has in hand, and then in order.
			cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
			cmd.WaitDelay = 15 * time.Second
			return cmd
		},
		Prefix:    strings.Join(append([]string{"oneo"}, quotedAll(flags)...), " "),
		Place:     place(c),
		Protected: readOnly || c.TUI.Protected,
		NoColor:   e.noColor || e.getenv("NO_COLOR") != "",
		Environ:   e.environ, In: e.in, Out: e.out,
	})
}

// globalFlags are the flags that decide which installation a command is about: those of this command line.
func (e *env) globalFlags() []string {
	var flags []string
	if e.configFile != "" {
		flags = append(flags, "--config", e.configFile)
	}
	if dir := e.flags["schemas.dir"]; dir != "" {
		flags = append(flags, "--schemas", dir)
	}
	return flags
}

func quotedAll(words []string) []string {
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = w
		if strings.ContainsAny(w, " '\"$\\`&|;<>(){}*?[]~#!") {
			out[i] = shellQuote(w)
		}
	}
	return out
}

// place is the database, as one tells it from others: never with a password.
func place(c config.Config) string {
	cc, err := pgx.ParseConfig(c.Database.URL)
	if err != nil {
		return "?" // nothing else works either, and says why
	}
	host := cc.Host
	if strings.HasPrefix(host, "/") {
		host = "localhost"
	}
	return cc.Database + "@" + host
}
