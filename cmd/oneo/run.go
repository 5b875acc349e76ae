package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"os/user"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/observe"
)

// Exit codes; `oneo help exit-codes` explains them.
const (
	exitOK          = 0
	exitFailed      = 1
	exitUsage       = 2
	exitSomeFailed  = 3
	exitForbidden   = 4
	exitUnreachable = 5
	exitNotFound    = 10
	exitLocked      = 11
	exitWrongKey    = 12
	exitPending     = 13
	exitUnverified  = 14
	exitInterrupted = 130
)

const exitCodes = `Exit codes

    0  done, or nothing to do
    1  failed
    2  usage error, or a confirmation was needed and there is no terminal
    3  one or more tenants of several failed
    4  not allowed
    5  PostgreSQL, Redis or the store cannot be reached
   10  tenant, user, key, backup or operation not found
   11  locked by another operation
   12  wrong or missing decryption key
   13  something is pending, has drifted or is unhealthy (--check, doctor)
   14  verification failed (a damaged archive or backup; migrate lint found errors)
  130  interrupted; the state is safe (serve and dev stopped by a signal: 0)
`

// env is what a command has: its streams, its configuration, and the parts of oneo, opened when they are needed.
type env struct {
	in       io.Reader
	out, err io.Writer
	environ  []string
	terminal bool // somebody can be asked
	colours  bool // what is told on stderr may be coloured

	// The flags that every command has.
	configFile string
	output     string
	quiet      bool
	verbose    bool
	yes        bool
	debug      bool
	noColor    bool
	flags      map[string]string // settings given as flags
	serving    bool              // the log must never be waited for

	logs    *observe.LogWriter // nil: lines are written at once
	cfg     *config.Config
	origins config.Origins
	app     *app.App
}

// run is the whole program: it takes what main has and returns the exit code.
func run(ctx context.Context, args, environ []string, in io.Reader, out, errw io.Writer) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The first signal stops in order; a second one ends the process at once.
	context.AfterFunc(ctx, stop)
	e := &env{in: in, out: out, err: errw, environ: environ, flags: map[string]string{}, output: "table"}
	if f, ok := in.(*os.File); ok {
		e.terminal = term.IsTerminal(int(f.Fd()))
	}
	if f, ok := errw.(*os.File); ok {
		e.colours = term.IsTerminal(int(f.Fd())) && e.getenv("NO_COLOR") == "" && e.getenv("TERM") != "dumb"
	}
	root := newRootCmd(e)
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errw)
	err := root.ExecuteContext(ctx)
	if e.app != nil {
		if cerr := e.app.Close(); err == nil {
			err = cerr
		}
	}
	if e.logs != nil {
		e.logs.Close(time.Second)
	}
	if err == nil {
		return exitOK
	}
	var usage errUsage
	if errors.As(err, &usage) {
		// A flag that is not known ends the reading of flags, and --output may stand behind it.
		e.output = outputOf(args, e.output)
	}
	code := exitCode(ctx, err)
	e.report(err, code)
	return code
}

// errUsage marks what cobra refused: an unknown command or flag, or a wrong number of arguments.
type errUsage struct{ error }

func (e errUsage) Unwrap() error { return e.error }

// getenv reads a variable of the environment that run was given.
func (e *env) getenv(name string) string {
	for _, kv := range e.environ {
		if n, v, _ := strings.Cut(kv, "="); n == name {
			return v
		}
	}
	return ""
}

// outputOf is the --output that a command line asks for, however wrong the rest of it is.
func outputOf(args []string, otherwise string) string {
	for i, arg := range args {
		name, value, given := strings.Cut(arg, "=")
		switch {
		case (name == "-o" || name == "--output") && given:
			return value
		case (arg == "-o" || arg == "--output") && i+1 < len(args):
			return args[i+1]
		case strings.HasPrefix(arg, "-o") && len(arg) > 2:
			return arg[2:]
		}
	}
	return otherwise
}

// errExit is a result that has been told already and asks for a code.
type errExit struct{ code int }

func (e errExit) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func exitCode(ctx context.Context, err error) int {
	var exit errExit
	var usage errUsage
	switch {
	case errors.As(err, &exit):
		return exit.code
	case errors.As(err, &usage):
		return exitUsage
	case ctx.Err() != nil || errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	switch fault.Of(err).Kind {
	case fault.Invalid, fault.Unfit, fault.NeedsConfirmation, fault.TooLarge, fault.Unsupported, fault.PreconditionRequired:
		return exitUsage
	case fault.Forbidden, fault.Unauthenticated:
		return exitForbidden
	case fault.Unavailable:
		return exitUnreachable
	case fault.NotFound, fault.Gone:
		return exitNotFound
	case fault.Locked, fault.Busy:
		return exitLocked
	case fault.WrongKey:
		return exitWrongKey
	case fault.Pending:
		return exitPending
	case fault.Unverified:
		return exitUnverified
	}
	return exitFailed
}

// report tells an error: what, why, and what to do next.
func (e *env) report(err error, code int) {
	var exit errExit
	if errors.As(err, &exit) {
		return
	}
	f := fault.Of(err)
	var isFault *fault.Fault
	if !errors.As(err, &isFault) {
		f = fault.Wrap(errors.Unwrap(err), fault.Internal, "%s", err)
		if code == exitUsage {
			f = fault.New(fault.Invalid, "%s", err).WithHint("add --help to see how the command is used")
		}
	}
	if code == exitInterrupted {
		f = fault.New(fault.Internal, "interrupted; everything is as it was, or whole").WithCode("interrupted").WithHint("run the same command again")
	}
	if e.output == "json" || e.output == "ndjson" {
		line, merr := json.Marshal(map[string]any{"error": map[string]any{
			"code": f.StableCode(), "exit": code, "message": f.Message, "hint": f.Hint, "tenant": f.Tenant,
		}})
		if merr == nil {
			fmt.Fprintln(e.err, string(line))
			return
		}
	}
	label := func(word, colour string) string {
		if e.colours && !e.noColor {
			return "\x1b[" + colour + "m" + word + "\x1b[0m"
		}
		return word
	}
	fmt.Fprintln(e.err, label("error:", "1;31"), f.Message)
	for i, field := range f.Fields {
		if i > 0 {
			fmt.Fprintf(e.err, "       %s%s %s\n", field.Parameter, field.Pointer, field.Detail)
		}
	}
	if cause := errors.Unwrap(f); cause != nil {
		fmt.Fprintln(e.err, label("cause:", "33"), strings.TrimSpace(strings.SplitN(cause.Error(), "\n", 2)[0]))
	}
	if f.Hint != "" {
		fmt.Fprintln(e.err, label("hint: ", "36"), f.Hint)
	}
	if e.debug {
		e.chain(err)
		var p *fleet.Panic
		if errors.As(err, &p) {
			fmt.Fprintf(e.err, "%s\n", p.Stack)
		}
	}
}

// chain tells an error and everything that it wraps.
func (e *env) chain(err error) {
	for err != nil {
		fmt.Fprintf(e.err, "debug: %T: %s\n", err, err)
		if many, ok := err.(interface{ Unwrap() []error }); ok {
			for _, one := range many.Unwrap() {
				e.chain(one)
			}
			return
		}
		err = errors.Unwrap(err)
	}
}

// load reads the configuration, once.
func (e *env) load() (config.Config, error) {
	if e.cfg != nil {
		return *e.cfg, nil
	}
	c, origins, err := config.Load(config.LoadOptions{File: e.configFile, Dir: ".", Env: e.environ, Flags: e.flags})
	if err != nil {
		return c, err
	}
	e.cfg, e.origins = &c, origins
	return c, nil
}

// open puts the parts together, once. It connects nothing.
func (e *env) open() (*app.App, error) {
	if e.app != nil {
		return e.app, nil
	}
	c, err := e.load()
	if err != nil {
		return nil, err
	}
	a, err := app.Open(c, versionOf(), e.logger(c))
	if err != nil {
		return nil, err
	}
	a.Environ = e.environ
	e.app = a
	return a, nil
}

func (e *env) logger(c config.Config) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Log.Level)); err != nil {
		level = slog.LevelInfo // validated
	}
	if e.verbose {
		level = slog.LevelDebug
	}
	o := &slog.HandlerOptions{Level: level}
	form := func(to io.Writer) slog.Handler {
		if c.Log.Format == "json" {
			return slog.NewJSONHandler(to, o)
		}
		return slog.NewTextHandler(to, o)
	}
	if e.serving {
		e.logs = observe.NewLogWriter(e.err, heldLog, func(n int64) []byte {
			var line bytes.Buffer
			slog.New(form(&line)).Warn("log lines were lost: nobody took them", "lines", n)
			return line.Bytes()
		})
		return slog.New(form(e.logs))
	}
	return slog.New(form(e.err))
}

// heldLog is how many bytes of lines wait for whoever reads a server's log.
const heldLog = 4 << 20

// say tells the story, on stderr, unless --quiet.
func (e *env) say(format string, args ...any) {
	if !e.quiet {
		fmt.Fprintf(e.err, format+"\n", args...)
	}
}

// onlyHere tells a secret that is shown once, where --output name leaves it out of the answer.
func (e *env) onlyHere(what, secret string) {
	if secret != "" && e.output == "name" {
		fmt.Fprintf(e.err, "%s: %s\n", what, secret)
	}
}

// actor is who runs the command, for the audit trail.
func (e *env) actor() string {
	name := "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	return "cli:" + name
}

func newRootCmd(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "oneo",
		Short: "One PostgreSQL schema per tenant: provision, migrate, serve",
		Long: `oneo runs a product that keeps one PostgreSQL schema per tenant.

It makes and drops tenants, migrates the shared schema and every tenant's, and serves
the Oneo CRM routed by domain: acme.localhost:8000 is the tenant acme, localhost:8000
is the administration.

New here? ` + "`oneo dev`" + ` starts everything on this machine, with demo data.`,
		Example:       "  oneo dev\n  oneo tenant create acme\n  oneo migrate --all-tenants\n  oneo serve",
		SilenceErrors: true, SilenceUsage: true,
		Args: known,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	f := root.PersistentFlags()
	f.StringVar(&e.configFile, "config", "", "configuration `FILE`")
	f.String("schemas", "", "`DIR` of a product's own tenant migrations, instead of schemas.dir")
	f.StringVarP(&e.output, "output", "o", "table", "table, json, yaml, csv, ndjson or name")
	f.BoolVarP(&e.quiet, "quiet", "q", false, "tell no story on stderr")
	f.BoolVarP(&e.verbose, "verbose", "v", false, "log more")
	f.BoolVarP(&e.yes, "yes", "y", false, "answer questions with yes (not those that want a name typed)")
	f.BoolVar(&e.debug, "debug", false, "show the whole chain of an error")
	f.BoolVar(&e.noColor, "no-color", false, "no colours")
	root.SetFlagErrorFunc(flagError)
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if flag := cmd.Flags().Lookup("schemas"); flag != nil && flag.Changed {
			e.flags["schemas.dir"] = flag.Value.String()
		}
		return checkOutput(e.output)
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	root.AddCommand(
		newInitCmd(e), newServeCmd(e), newDevCmd(e), newTUICmd(e), newStatusCmd(e), newCancelCmd(e), newTenantCmd(e), newTopCmd(e), newDomainCmd(e), newUserCmd(e), newAdminCmd(e), newKeyCmd(e),
		newMigrateCmd(e), newBackupCmd(e), newRestoreCmd(e), newRecoverCmd(e), newUndoCmd(e), newSQLCmd(e), newHoldCmd(e), newEachCmd(e), newPsqlCmd(e), newInspectCmd(e), newCacheCmd(e), newDoctorCmd(e), newConfigCmd(e), newHostsCmd(e), newLogsCmd(e), newVersionCmd(e),
		&cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: exitCodes},
	)
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "completion":
			c.Args, c.RunE = known, func(cmd *cobra.Command, _ []string) error { return cmd.Help() }
		case "help":
			c.Run, c.RunE = nil, helpOf
		}
	}
	return root
}

// usageArgs makes a wrong number of arguments a usage error, which names those that are missing.
func usageArgs(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		err := check(cmd, args)
		var told *fault.Fault
		if err == nil {
			return nil
		}
		if errors.As(err, &told) {
			return errUsage{err}
		}
		f := fault.New(fault.Invalid, "%s", err)
		if wanted := wantedArgs(cmd.Use); len(args) < len(wanted) {
			f = fault.New(fault.Invalid, "missing argument: %s", strings.Join(wanted[len(args):], " ")).WithCode("missing_argument")
		}
		return errUsage{f.WithHint("usage: %s", cmd.UseLine())}
	}
}

// wantedArgs are the arguments that a usage line begins with and that cannot be left out.
func wantedArgs(use string) (wanted []string) {
	for _, word := range strings.Fields(use)[1:] {
		switch {
		case word == "--":
		case strings.HasPrefix(word, "["), strings.HasPrefix(word, "-"), word == "|":
			return wanted
		default:
			wanted = append(wanted, word)
		}
	}
	return wanted
}

// known refuses, for a command that only holds others, a word that is none of them.
func known(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	var verbs, other []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() || c.Name() == "help" {
			verbs = append(verbs, c.Name())
		}
		if slices.Contains(c.SuggestFor, args[0]) { // what other tools call it
			other = append(other, c.Name())
		}
	}
	f := fault.New(fault.Invalid, "unknown command %q for %q", args[0], cmd.CommandPath()).WithCode("unknown_command")
	if near := append(other, fault.Nearest(args[0], verbs, 3)...); len(near) > 0 {
		return errUsage{f.WithHint("did you mean %s %s?", cmd.CommandPath(), strings.Join(near, ", "))}
	}
	return errUsage{f.WithHint("%s --help lists the commands", cmd.CommandPath())}
}

// flagError says which flag was meant.
func flagError(cmd *cobra.Command, err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) || unknown.GetSpecifiedShortnames() != "" {
		return errUsage{err}
	}
	var flags []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { flags = append(flags, f.Name) })
	near := fault.Nearest(unknown.GetSpecifiedName(), flags, 3)
	if len(near) == 0 {
		return errUsage{err}
	}
	return errUsage{fault.New(fault.Invalid, "%s", err).WithCode("unknown_flag").WithHint("did you mean --%s?", strings.Join(near, ", --"))}
}

// helpOf shows the help of a command or topic; cobra's own takes an unknown one for done.
func helpOf(cmd *cobra.Command, args []string) error {
	about, rest, err := cmd.Root().Find(args)
	if err != nil {
		return errUsage{err}
	}
	if len(rest) > 0 {
		if err := known(about, rest); about.HasSubCommands() {
			return err
		}
		return errUsage{fmt.Errorf("%q has no command %q", about.CommandPath(), rest[0])}
	}
	about.InitDefaultHelpFlag()
	return about.Help()
}

// untilStopped makes an orderly end of a server that a signal stopped.
func untilStopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// noun makes a command that only holds others; called alone, it shows its help.
func noun(use, short, long, example string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Example: example,
		Args: known,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(verbs...)
	return cmd
}
