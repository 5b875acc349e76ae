package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/auth"
	"github.com/oneo-crm/oneo/pkg/fault"
)

// confirm asks before something that is hard to undo. --yes answers. Without a terminal it refuses and says which flag
// to add.
func (e *env) confirm(ctx context.Context, what string) error {
	if e.yes {
		return nil
	}
	if !e.terminal {
		return fault.New(fault.NeedsConfirmation, "this would %s", what).WithHint("add --yes")
	}
	in := bufio.NewReader(e.in)
	for {
		fmt.Fprintf(e.err, "This will %s. Go on? [y/N] ", what)
		line, err := wait(ctx, func() (string, error) { return in.ReadString('\n') })
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch strings.ToLower(strings.TrimSpace(line)) {
		case "y", "yes":
			return nil
		case "n", "no", "":
			return fault.New(fault.NeedsConfirmation, "nothing was done")
		}
		if err != nil {
			return fault.New(fault.NeedsConfirmation, "nothing was done")
		}
	}
}

// confirmName wants the name of what is to be destroyed typed, or given by --confirm. --yes does not answer.
func (e *env) confirmName(ctx context.Context, name, given, what string) error {
	if given == "" && e.terminal {
		fmt.Fprintf(e.err, "This will %s. Type %s to go on: ", what, name)
		line, err := wait(ctx, func() (string, error) { return bufio.NewReader(e.in).ReadString('\n') })
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		given = strings.TrimSpace(line)
	} else if given == "" {
		return fault.New(fault.NeedsConfirmation, "this would %s", what).WithHint("add --confirm %s", name)
	}
	if given != name {
		return fault.New(fault.NeedsConfirmation, "%q is not %q; nothing was done", given, name)
	}
	return nil
}

// confirmTyped wants a word typed before something is destroyed that has no name of its own to be typed. --yes answers.
func (e *env) confirmTyped(ctx context.Context, word, what string) error {
	switch {
	case e.yes:
		return nil
	case !e.terminal:
		return fault.New(fault.NeedsConfirmation, "this would %s", what).WithHint("add --yes")
	}
	return e.confirmName(ctx, word, "", what)
}

// wait reads from a terminal until the context ends: Ctrl-C at a question ends the program. A read that nobody answers
// is left behind, since nothing can interrupt it; the process ends with it.
func wait[T any](ctx context.Context, read func() (T, error)) (answer T, err error) {
	done := make(chan struct{})
	var got T
	var failed error
	go func() {
		defer close(done)
		got, failed = read()
	}()
	select {
	case <-done:
		return got, failed
	case <-ctx.Done():
		return answer, ctx.Err()
	}
}

// passwordFlags are the ways in which a password reaches a command; never as an argument, which others can read.
type passwordFlags struct {
	stdin bool
	file  string
}

// password reads a password, or generates one when asked by nothing at all; generated says so.
func (e *env) password(ctx context.Context, p passwordFlags, prompt string, mayGenerate bool) (password string, generated bool, err error) {
	switch {
	case p.stdin && p.file != "":
		return "", false, fault.New(fault.Invalid, "--password-stdin and --password-file exclude each other")
	case p.stdin:
		text, err := io.ReadAll(io.LimitReader(e.in, auth.MaxPasswordBytes+2))
		return strings.TrimRight(string(text), "\r\n"), false, err
	case p.file != "":
		text, err := os.ReadFile(p.file)
		if err != nil {
			return "", false, fault.Wrap(err, fault.Invalid, "the password file cannot be read")
		}
		return strings.TrimRight(string(text), "\r\n"), false, nil
	case mayGenerate:
		return auth.GeneratePassword(), true, nil
	}
	f, ok := e.in.(*os.File)
	if !e.terminal || !ok {
		return "", false, fault.New(fault.NeedsConfirmation, "a password is needed and there is no terminal").
			WithHint("add --password-stdin or --password-file FILE")
	}
	before, err := term.GetState(int(f.Fd()))
	if err != nil {
		return "", false, err
	}
	read := func(prompt string) (string, error) {
		fmt.Fprint(e.err, prompt)
		b, err := wait(ctx, func() ([]byte, error) { return term.ReadPassword(int(f.Fd())) })
		fmt.Fprintln(e.err)
		if ctx.Err() != nil {
			err = errors.Join(err, term.Restore(int(f.Fd()), before)) // the echo is back
		}
		return string(b), err
	}
	first, err := read(prompt + ": ")
	if err != nil {
		return "", false, err
	}
	again, err := read("once more: ")
	if err != nil {
		return "", false, err
	}
	if first != again {
		return "", false, fault.New(fault.Invalid, "the two passwords differ")
	}
	return first, false, nil
}
