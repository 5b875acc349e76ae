package main

import (
	"bytes"
	"context"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// asking is somebody at a terminal who types what in gives.
func asking(in io.Reader) (*env, *bytes.Buffer) {
	var told bytes.Buffer
	return &env{in: in, out: io.Discard, err: &told, terminal: true, output: "table"}, &told
}

func TestAQuestionTakesNoDefault(t *testing.T) {
	t.Parallel()
	for typed, goesOn := range map[string]bool{
		"y\n": true, "YES\n": true, "what\ny\n": true, "n\n": false, "\n": false, "": false, "what\n": false,
	} {
		e, told := asking(strings.NewReader(typed))
		err := e.confirm(t.Context(), "do it")
		require.Equal(t, goesOn, err == nil, "typed %q: %v", typed, err)
		require.Contains(t, told.String(), "This will do it. Go on? [y/N]")
		if !goesOn {
			require.Equal(t, exitUsage, exitCode(t.Context(), err), "typed %q", typed)
		}
	}
}

func TestDestroyingWantsTheName(t *testing.T) {
	t.Parallel()
	for typed, goesOn := range map[string]bool{"acme\n": true, "acme": true, "y\n": false, "Acme\n": false, "\n": false, "": false} {
		e, _ := asking(strings.NewReader(typed))
		e.yes = true
		err := e.confirmName(t.Context(), "acme", "", "destroy acme")
		require.Equal(t, goesOn, err == nil, "typed %q: %v", typed, err)
	}
	e, told := asking(strings.NewReader("acme\n"))
	require.True(t, fault.Is(e.confirmName(t.Context(), "acme", "beta", "destroy acme"), fault.NeedsConfirmation), "a wrong --confirm is not asked again")
	require.Empty(t, told.String())
}

func TestAnInterruptEndsAQuestion(t *testing.T) {
	t.Parallel()
	nobody, typed := io.Pipe() // nobody types
	t.Cleanup(func() { _ = typed.Close() })
	for name, ask := range map[string]func(context.Context, *env) error{
		"y/N":  func(ctx context.Context, e *env) error { return e.confirm(ctx, "do it") },
		"name": func(ctx context.Context, e *env) error { return e.confirmName(ctx, "acme", "", "do it") },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		e, _ := asking(nobody)
		ended := make(chan error, 1)
		go func() { ended <- ask(ctx, e) }()
		cancel()
		select {
		case err := <-ended:
			require.ErrorIs(t, err, context.Canceled, name)
			require.Equal(t, exitInterrupted, exitCode(ctx, err), name)
		case <-time.After(time.Minute):
			t.Fatalf("%s: a question that nobody answers outlives Ctrl-C", name)
		}
	}
}

func TestColoursAreForTerminalsThatWantThem(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ colours, noColor, want bool }{{true, false, true}, {true, true, false}, {false, false, false}} {
		e, told := asking(nil)
		e.colours, e.noColor = c.colours, c.noColor
		e.report(fault.New(fault.NotFound, "there is none").WithHint("look"), exitNotFound)
		require.Equal(t, c.want, strings.Contains(told.String(), "\x1b["), "%+v: %q", c, told)
	}
}

func TestControlCharactersDoNotReachATerminal(t *testing.T) {
	t.Parallel()
	require.Equal(t, "a?b?c?d é", text("a\x1bb\u009bc\u202ed é"))
}
