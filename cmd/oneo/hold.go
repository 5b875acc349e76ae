package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// runSQLAt runs a reading statement in the past.
func runSQLAt(ctx context.Context, e *env, o sqlOptions, statement string) (err error) {
	if o.write || o.rehearse {
		return errUsage{fault.New(fault.Invalid, "the past can be read only").WithHint("oneo restore -t NAME --at TIME brings it back")}
	}
	if o.keep < 0 || o.keep > 24*time.Hour {
		return errUsage{fault.New(fault.Invalid, "--keep must be up to 24h")}
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	if o.keep > 0 {
		if err := keepPast(ctx, e, a, &o.at, o.keep); err != nil {
			return err
		}
	}
	past, err := o.at.recover(ctx, e, a, o.progress, "oneo sql", a.DB.Groups())
	if err != nil {
		return err
	}
	defer func() {
		if cerr := past.Close(); err == nil {
			err = cerr
		}
	}()
	then := *e
	then.app = past.App
	return runSQL(ctx, &then, o, statement)
}

// holdReady is what the process that keeps a past says when it can be read.
const holdReady = "ready"

// keepPast starts a process that recovers a moment and keeps it for a while, also behind this one's end. It returns when it can be read.
func keepPast(ctx context.Context, e *env, a *app.App, at *atOptions, d time.Duration) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	m, err := at.moment(ctx, a)
	if err != nil {
		return err
	}
	which := []string{"--before", at.before}
	if at.before == "" {
		at.at = m.Time.UTC().Format(time.RFC3339Nano) // the very same moment, however it was given
		which = []string{"--at", at.at}
	}
	if kept, err := a.Kept(m); err != nil || kept {
		return err // until the time that it was given first
	}
	//nolint:noctx // it outlives this command
	cmd := exec.Command(self, slices.Concat(e.globalFlags(), []string{"hold"}, append(which, "--for", d.String(), "--progress", "none"))...)
	cmd.Env = e.environ
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // a Ctrl-C here is not for it
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	problems, err := os.CreateTemp("", "oneo-hold-*.log")
	if err != nil {
		return err
	}
	defer problems.Close()
	defer os.Remove(problems.Name()) // it is still written to, and gone with its last writer
	cmd.Stderr = problems
	e.say("recovering to %s, to be kept for %s", m, short(d))
	if err := cmd.Start(); err != nil {
		return err
	}
	interrupted := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGINT) })
	defer interrupted()
	line, _ := bufio.NewReader(out).ReadString('\n') // what went wrong is told below
	if strings.TrimSpace(line) == holdReady {
		return cmd.Process.Release()
	}
	_ = cmd.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if _, err := problems.Seek(0, io.SeekStart); err != nil {
		return err
	}
	text, err := io.ReadAll(io.LimitReader(problems, 4096))
	if err != nil {
		return err
	}
	return fault.New(fault.Unavailable, "the past could not be recovered: %s", strings.TrimSpace(string(text))).WithCode("hold")
}

type holdOptions struct {
	at       atOptions
	keep     time.Duration
	progress string
}

// newHoldCmd is the process behind --keep.
func newHoldCmd(e *env) *cobra.Command {
	var o holdOptions
	cmd := &cobra.Command{
		Use: "hold", Short: "Recover a moment and keep it for other commands", Hidden: true,
		Long:    "Recover the installation to a moment, beside what is live, say ready, and keep it until the time is over and\nnobody reads it any more. `oneo sql --at TIME --keep` starts this by itself.",
		Example: "  oneo hold --at 2026-08-01T12:03:00Z --for 1h", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return hold(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	o.at.register(f)
	f.DurationVar(&o.keep, "for", time.Hour, "for so long")
	f.StringVar(&o.progress, "progress", "auto", "`FORM` of the progress: auto, json or none")
	return cmd
}

func hold(ctx context.Context, e *env, o holdOptions) (err error) {
	a, err := e.open()
	if err != nil {
		return err
	}
	e.quiet = true // who has started it tells
	past, err := o.at.recover(ctx, e, a, o.progress, "oneo hold", a.DB.Groups())
	if err != nil {
		return err
	}
	defer func() {
		if cerr := past.Close(); err == nil {
			err = cerr
		}
	}()
	return past.Keep(ctx, o.keep, func() { fmt.Fprintln(e.out, holdReady) })
}
