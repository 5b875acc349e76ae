package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const kindEach = rollout.Prefix + "each"

type eachOptions struct {
	grace time.Duration
	askOptions
}

func newEachCmd(e *env) *cobra.Command {
	var o eachOptions
	cmd := &cobra.Command{
		Use: "each -- COMMAND [ARGS...]", Short: "Run a program for each tenant, with that tenant's connection",
		Long: `Run a program once for each of the selected tenants, several at one time, with that tenant's connection
in its environment: PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE, PGOPTIONS (search path and role) and
DATABASE_URL, and ONEO_TENANT, ONEO_TENANT_SCHEMA, ONEO_TENANT_NUMBER and ONEO_TENANT_GROUP. It has the
tenant's rights, not the owner's; what oneo itself is configured by (ONEO_..., REDIS_URL) is taken out of
its environment, and its stdin is empty. A suspended tenant is left out, and told.

In a table each line of the program stands behind its tenant: "acme| ...", on the stream that it was
written to. In the other forms there is one row for each tenant, with the end of what it wrote. A program
that does not end with 0 has failed; then the exit code is 3.

The run is stored with the command, its arguments and the folder, so let no argument be a secret; what
programs write is not stored. When the run is interrupted the programs get SIGINT, --grace later SIGTERM
and then SIGKILL. ` + "`oneo migrate run resume`" + ` runs the program for those tenants only for which it had not
ended; one that was broken off runs again: each one runs at least once.`,
		Example: `  oneo each --all-tenants -- psql -qc 'analyze users'
  oneo each -t 'shop-*' --jobs 4 -- sh -c 'pg_dump --schema="$ONEO_TENANT_SCHEMA" > "$ONEO_TENANT.sql"'
  oneo each --all-tenants -o ndjson --timeout 5m -- ./recalculate`,
		Args: usageArgs(cobra.MinimumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error { return runEach(cmd.Context(), e, o, args) },
	}
	o.bind(cmd, e, "show for which tenants the program would run, and run none")
	f := cmd.Flags()
	f.SetInterspersed(false) // behind the program's name its own flags begin
	f.DurationVar(&o.grace, "grace", 5*time.Second, "wait so long between SIGINT, SIGTERM and SIGKILL")
	return cmd
}

// eachRequest is what a process that goes on with the run must know.
type eachRequest struct {
	Command []string      `json:"command"`
	Dir     string        `json:"dir"`
	Timeout time.Duration `json:"timeout_ns,omitempty"`
	Grace   time.Duration `json:"grace_ns"`
	selected
}

func runEach(ctx context.Context, e *env, o eachOptions, command []string) error {
	spec, err := o.spec(rollout.Spec{Kind: kindEach, Actor: e.actor()})
	if err != nil {
		return err
	}
	if o.grace <= 0 {
		return errUsage{fault.New(fault.Invalid, "--grace must be above 0")}
	}
	dir, err := os.Getwd()
	if err != nil {
		return fmt.Errorf("find the working folder: %w", err)
	}
	var none *merged
	if e.output != "table" {
		none = newMerged(e, eachColumns, 0)
	}
	a, ts, err := o.begin(ctx, e, spec, none, func() error {
		_, err := e.program(command[0], dir)
		return err
	})
	if err != nil || len(ts) == 0 {
		return err
	}
	spec.Request = eachRequest{Command: command, Dir: dir, Timeout: o.timeout, Grace: o.grace, selected: o.selector.request()}
	spec.Items = itemsOf(ts)
	return planAndWork(ctx, e, a, spec, o.workOptions, nil)
}

// program finds a program by its name, as the environment's PATH says, or by its path from a folder.
func (e *env) program(name, dir string) (string, error) {
	notFound := func(cause error) error {
		return fault.Wrap(cause, fault.Invalid, "the program %s is not found", name).WithCode("no_program")
	}
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		if _, err := exec.LookPath(path); err != nil {
			return "", notFound(err)
		}
		return path, nil
	}
	for _, folder := range filepath.SplitList(e.getenv("PATH")) {
		if path := filepath.Join(folder, name); filepath.IsAbs(folder) {
			if _, err := exec.LookPath(path); err == nil {
				return path, nil
			}
		}
	}
	return "", notFound(nil)
}

// eachColumns are the columns of a row behind the tenant.
var eachColumns = []string{"status", "exit_code", "duration_ms", "stdout", "stderr", "left_out_bytes"}

// eachResult is how a program ended. The run keeps no word of what it wrote.
type eachResult struct {
	ExitCode int            `json:"exit_code"`
	Reason   *reportedError `json:"reason,omitempty"` // why it did not run
	out, err *bounded
}

// eachRun is one process's work on a program over the fleet.
type eachRun struct {
	eachRequest
	interrupt <-chan struct{} // closed when this process is to stop
	e         *env
	a         *app.App
	path      string
	m         *merged // nil in a table

	lines sync.Mutex // one line at a time
	told  int
}

func eachWork(e *env, a *app.App, request json.RawMessage) (runWork, error) {
	r := &eachRun{e: e, a: a}
	if err := json.Unmarshal(request, &r.eachRequest); err != nil || len(r.Command) == 0 {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	var err error
	if r.path, err = e.program(r.Command[0], r.Dir); err != nil {
		return runWork{}, err
	}
	if e.output != "table" {
		r.m = newMerged(e, eachColumns, 0)
	}
	begin := func(ctx context.Context) { r.interrupt = ctx.Done() }
	return runWork{do: r.do, begin: begin, told: r.tell, done: r.done, timeout: r.Timeout, noOwner: true, live: r.m == nil, brokenOff: true}, nil
}

func (r *eachRun) do(ctx context.Context, task rollout.Task) rollout.Outcome {
	select {
	case <-r.interrupt:
		return rollout.Outcome{Undone: true}
	default:
	}
	t, err := taskTenant(task)
	if err != nil {
		return rollout.Outcome{Err: err}
	}
	t.Schema = t.Slug.Schema() // the placement says where
	program, err := r.a.DB.Program(ctx, postgres.ProgramOptions{Tenant: t})
	if err == nil && program.State != string(tenant.Active) {
		err = fault.New(fault.Suspended, "this tenant is not available at the moment").WithCode("tenant_suspended")
	}
	if err != nil {
		if why := notServed(err); why != nil {
			return rollout.Outcome{Status: fleet.Skipped, Result: &eachResult{Reason: why}}
		}
		return rollout.Outcome{Err: err}
	}
	res := &eachResult{out: &bounded{}, err: &bounded{}}
	cmd := &exec.Cmd{Path: r.path, Args: r.Command, Dir: r.Dir, Env: program.Env(r.e.environ)}
	var out, errs io.Writer = res.out, res.err
	if r.m == nil {
		lineOut, lineErr := r.prefixed(task.Slug, r.e.out), r.prefixed(task.Slug, r.e.err)
		defer lineOut.flush()
		defer lineErr.flush()
		out, errs = lineOut, lineErr
	}
	state, brokenOff, err := r.run(ctx, cmd, out, errs)
	if err != nil {
		return rollout.Outcome{Err: fault.Wrap(err, fault.Unfit, "the program cannot be run: %s", err).WithCode("no_program"), Result: res}
	}
	res.ExitCode = state.ExitCode()
	switch status, _ := state.Sys().(syscall.WaitStatus); {
	case state.Success():
		return rollout.Outcome{Result: res}
	case brokenOff:
		return rollout.Outcome{Undone: true}
	case status.Signaled():
		res.ExitCode = 128 + int(status.Signal())
		return rollout.Outcome{Result: res, Err: fault.New(fault.Unfit, "the program was ended by the signal %q", status.Signal()).WithCode("signal")}
	}
	return rollout.Outcome{Result: res, Err: fault.New(fault.Unfit, "the program ended with %d", res.ExitCode).WithCode("exit_code")}
}

// run starts the program in a process group of its own, waits for it, and leaves nothing of the group running. A
// program is asked to end when the context of its tenant ends, or when this process is to stop: then it was broken off.
// The kernel kills it when this process dies; that is tied to the thread which started it.
func (r *eachRun) run(ctx context.Context, cmd *exec.Cmd, out, errs io.Writer) (state *os.ProcessState, brokenOff bool, err error) {
	outPipe, err := newPipe(out)
	if err != nil {
		return nil, false, err
	}
	errPipe, err := newPipe(errs)
	if err != nil {
		outPipe.abandon()
		return nil, false, err
	}
	cmd.Stdout, cmd.Stderr = outPipe.write, errPipe.write
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err == nil {
			state, _ = cmd.Process.Wait() // of a child of ours, once: it cannot fail
		}
		close(ended)
	}()
	if err := <-started; err != nil {
		outPipe.abandon()
		errPipe.abandon()
		return nil, false, err
	}
	outPipe.follow()
	errPipe.follow()
	group := -cmd.Process.Pid
	select {
	case <-ended:
	case <-ctx.Done():
		r.end(group, ended, syscall.SIGTERM)
	case <-r.interrupt:
		brokenOff = true
		r.end(group, ended, syscall.SIGINT, syscall.SIGTERM)
	}
	<-ended
	_ = syscall.Kill(group, syscall.SIGKILL) // what it left behind; mostly there is nothing
	outPipe.close()
	errPipe.close()
	return state, brokenOff, nil
}

// end sends the signals to the group, one after another, and death at last.
func (r *eachRun) end(group int, ended <-chan struct{}, signals ...syscall.Signal) {
	for _, s := range signals {
		_ = syscall.Kill(group, s) // it may have ended by itself
		timer := time.NewTimer(r.Grace)
		select {
		case <-ended:
			timer.Stop()
			return
		case <-timer.C:
		}
	}
	_ = syscall.Kill(group, syscall.SIGKILL)
}

// pipe carries what a program writes to a writer.
type pipe struct {
	read, write *os.File
	to          io.Writer
	done        chan struct{}
}

func newPipe(to io.Writer) (*pipe, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make a pipe: %w", err)
	}
	return &pipe{read: read, write: write, to: to, done: make(chan struct{})}, nil
}

// follow begins to read; the writing end is the program's alone.
func (p *pipe) follow() {
	_ = p.write.Close()
	go func() {
		defer close(p.done)
		if _, err := io.Copy(p.to, p.read); err != nil {
			_, _ = io.Copy(io.Discard, p.read) // nobody reads any more, and the program must not hang
		}
	}()
}

// close waits for the rest, and not for long: a process that left the group may hold the other end.
func (p *pipe) close() {
	_ = p.read.SetReadDeadline(time.Now().Add(time.Second))
	<-p.done
	_ = p.read.Close()
}

func (p *pipe) abandon() {
	_ = p.read.Close()
	_ = p.write.Close()
}

// bounded keeps the end of what is written.
type bounded struct {
	text []byte
	left int64 // bytes that were left out
}

const boundedBytes = 64 << 10

func (b *bounded) Write(p []byte) (int, error) {
	b.text = append(b.text, p...)
	if over := len(b.text) - boundedBytes; over > boundedBytes { // not with every write
		b.text, b.left = append([]byte(nil), b.text[over:]...), b.left+int64(over)
	}
	return len(p), nil
}

func (b *bounded) String() string {
	text := b.text[max(0, len(b.text)-boundedBytes):]
	return strings.ToValidUTF8(string(text), "�")
}

func (b *bounded) leftOut() int64 { return b.left + int64(max(0, len(b.text)-boundedBytes)) }

// lineWriter writes whole lines behind the tenant's name.
type lineWriter struct {
	r      *eachRun
	prefix string
	to     io.Writer
	begun  []byte
}

func (r *eachRun) prefixed(slug string, to io.Writer) *lineWriter {
	return &lineWriter{r: r, prefix: slug + "| ", to: to}
}

// maxLine is how long a line may grow before it is written in parts.
const maxLine = 64 << 10

func (w *lineWriter) Write(p []byte) (int, error) {
	n := len(p)
	for {
		line, rest, whole := bytes.Cut(p, []byte("\n"))
		w.begun = append(w.begun, line...)
		if !whole && len(w.begun) < maxLine {
			return n, nil
		}
		if err := w.line(); err != nil {
			return n, err
		}
		if p = rest; !whole {
			return n, nil
		}
	}
}

func (w *lineWriter) line() error {
	w.r.lines.Lock()
	defer w.r.lines.Unlock()
	_, err := fmt.Fprintf(w.to, "%s%s\n", w.prefix, bytes.TrimSuffix(w.begun, []byte("\r")))
	w.begun = w.begun[:0]
	return err
}

func (w *lineWriter) flush() {
	if len(w.begun) > 0 {
		_ = w.line() // the last word of a program that has ended
	}
}

// tell reports a tenant that is through.
func (r *eachRun) tell(ev rollout.Event) {
	if ev.Task == nil || ev.Again > 0 {
		return
	}
	r.told++
	res, _ := ev.Outcome.Result.(*eachResult)
	p := piece{tenant: ev.Task.Slug}
	switch {
	case res != nil && res.Reason != nil:
		p.told = res.Reason
	case ev.Outcome.Err != nil:
		p.told = told(ev.Outcome.Err)
	}
	if r.m == nil {
		r.lines.Lock()
		defer r.lines.Unlock()
		if p.told != nil {
			r.e.say("%s %s: %s", ev.Task.Slug, ev.Outcome.Status, p.told)
		}
		return
	}
	cells := []cell{stringCell(string(ev.Outcome.Status)), {}, numberCell(ev.Outcome.Duration.Milliseconds()), {}, {}, {}}
	if res != nil && res.out != nil {
		cells[1], cells[5] = numberCell(int64(res.ExitCode)), numberCell(res.out.leftOut()+res.err.leftOut())
		cells[3], cells[4] = stringCell(res.out.String()), stringCell(res.err.String())
	}
	row := r.m.encode(ev.Task.Slug, cells, p.told)
	p.rows, p.bytes, p.told = [][]byte{row}, len(row), nil
	r.m.add(ev.Task.Ordinal, p)
}

func (r *eachRun) done(_ context.Context, end rollout.Run, say func(string, ...any)) error {
	if n := end.Tasks() - end.Left() - r.told; n > 0 {
		say("%d tenant(s) were another process's: what their programs wrote is not here", n)
	}
	if r.m == nil {
		return nil
	}
	if err := r.m.end(); errors.Is(err, syscall.EPIPE) {
		say("the result was not read to its end")
	} else if err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	return nil
}
