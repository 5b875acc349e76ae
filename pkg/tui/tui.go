// Package tui is the dashboard: the fleet in one screen, lists to look into, and commands to act with. It promises: it never waits for
// what it shows, so that the keys work while the database hangs; it asks the database one statement at a time and polls once a second at
// most, whatever the number of tenants; what it changes, it changes by running the oneo command that it shows; and nothing that comes
// from a tenant reaches the terminal as a control character.
package tui

import (
	"context"
	"io"
	"os/exec"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/colorprofile"
)

// Source is what the dashboard shows. Its methods are called from other goroutines than the one that draws, with a context that ends
// soon; a method that does not heed it delays news only. Errors are shown by their text, which must hold no secret.
type Source interface {
	// Fleet counts what there is: one small statement for each database group.
	Fleet(ctx context.Context) (Fleet, error)
	// Readings asks the servers themselves, not the database. One that does not answer is a Reading with an Err.
	Readings(ctx context.Context, servers []Server) []Reading
	// Ages looks into the store of backups.
	Ages(ctx context.Context) (Ages, error)

	Tenants(ctx context.Context) ([]Tenant, error)
	Runs(ctx context.Context) ([]Run, error)
	Tasks(ctx context.Context, run string) ([]Task, error)
	Backups(ctx context.Context) ([]Backup, error)
	Sessions(ctx context.Context) ([]Session, error)
	Locks(ctx context.Context) ([]Lock, error)
	Operations(ctx context.Context) ([]Operation, error)
	Audit(ctx context.Context) ([]AuditLine, error)
	Domains(ctx context.Context) ([]Domain, error)
	Users(ctx context.Context, tenant string) ([]User, error)
	// Logs are the last lines of the servers, the newest first; of one tenant, or of all: "".
	Logs(ctx context.Context, servers []Server, tenant string) ([]LogLine, error)
}

// Options is what a dashboard needs.
type Options struct {
	Source Source
	// Command is `oneo ARGS...` as a child process, with the settings that this one has.
	Command func(ctx context.Context, args []string) *exec.Cmd
	// Prefix is how the command lines begin that are shown: oneo, and the flags that every one of them gets.
	Prefix string
	// Place says where one is: the database, without a password.
	Place string
	// Protected dashboards change nothing before they are unlocked.
	Protected bool
	// NoColor leaves colours out, whatever the terminal can.
	NoColor bool
	// Now is the clock; nil: the system's.
	Now func() time.Time

	Environ []string
	In      io.Reader
	Out     io.Writer
}

// Show shows the dashboard until it is left or ctx ends.
func Show(ctx context.Context, o Options) error {
	m := New(o)
	defer m.stop()
	opts := []tea.ProgramOption{tea.WithContext(ctx), tea.WithInput(o.In), tea.WithOutput(o.Out), tea.WithEnvironment(o.Environ)}
	if o.NoColor {
		opts = append(opts, tea.WithColorProfile(colorprofile.ASCII))
	}
	_, err := tea.NewProgram(m, opts...).Run()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}
