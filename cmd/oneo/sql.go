package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const kindSQL = rollout.Prefix + "sql"

// The modes of a statement over the fleet.
const (
	sqlRead     = "read"
	sqlWrite    = "write"
	sqlRehearse = "rehearse"
)

type sqlOptions struct {
	file     string
	write    bool
	rehearse bool
	shared   bool
	limit    int
	maxRows  int
	at       atOptions
	keep     time.Duration
	askOptions
}

func newSQLCmd(e *env) *cobra.Command {
	var o sqlOptions
	cmd := &cobra.Command{
		Use: "sql [STATEMENT | -]", Short: "Run one statement over tenants, as one result",
		Long: `Run one statement for each of the selected tenants, with that tenant's own rights, and write what they
answer as one result, in the order of their names, with the tenant in front. What a tenant refuses is a
row {tenant, error} of it, and the exit code is 3. So is a tenant whose columns are others than those of
most tenants, as in the middle of a migration: nothing is mixed. A suspended tenant is left out, and told.

Reading is the default: the transaction is read-only, --timeout ends the statement, and --limit and
--max-rows cut the result; what was cut is told, and is a row with the error rows_cut. --write changes
rows, in one transaction for each tenant and once for each, also when the run is killed and gone on with.
--rehearse does the same, says how many rows, and rolls back. Changes of tables belong in a migration.

The run is stored with the statement's text, and with counts of rows, never with what was read: see
` + "`oneo migrate run`" + `. In csv, null is an empty field and an empty string is "". Times are in UTC.

With --shared the statement runs once, in the shared schema and with the rights of the app role: reading
is the default there too, and its result has no tenant in front. It is no run; the audit trail has it.

With --at the statement reads the past: the tenants as they were at that moment, on a cluster that is recovered from
physical backups for it alone. --keep leaves that cluster for an hour, or for as long as it says: until then
statements and restores to the very same moment are answered at once. It is removed by itself.`,
		Example: `  oneo sql --all-tenants 'select count(*) as users from users'
  oneo sql -t 'shop-*' -o csv 'select id, email from users where disabled_at is null' > users.csv
  oneo sql --all-tenants --rehearse "update users set email = lower(email) where email <> lower(email)"
  oneo sql --all-tenants --write --canary 3 -f mend.sql
  oneo sql -t acme --at '2026-08-01 14:03+02' --keep 'select count(*) from records'
  oneo sql --shared 'select state, count(*) from tenants group by state'`,
		Args: usageArgs(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			statement, err := o.statement(e, args)
			if err != nil {
				return err
			}
			if o.at.given() {
				return runSQLAt(cmd.Context(), e, o, statement)
			}
			if o.keep != 0 {
				return errUsage{fault.New(fault.Invalid, "--keep goes with --at")}
			}
			return runSQL(cmd.Context(), e, o, statement)
		},
	}
	o.bind(cmd, e, "show which tenants would be asked, and ask none")
	f := cmd.Flags()
	f.StringVarP(&o.file, "file", "f", "", "read the statement from `FILE`")
	f.BoolVar(&o.shared, "shared", false, "the shared schema, instead of tenants")
	f.BoolVar(&o.write, "write", false, "change rows")
	f.BoolVar(&o.rehearse, "rehearse", false, "change rows, count them and roll back")
	f.IntVar(&o.limit, "limit", 1000, "show so many rows of each tenant; 0: all")
	f.IntVar(&o.maxRows, "max-rows", 100_000, "show so many rows in all; 0: all")
	o.at.register(f)
	f.DurationVar(&o.keep, "keep", 0, "with --at: leave the recovered cluster for so long")
	f.Lookup("keep").NoOptDefVal = "1h"
	timeout := f.Lookup("timeout")
	must(timeout.Value.Set("30s"))
	timeout.DefValue, timeout.Usage = "30s", "end the statement of a tenant after so long; 0: no bound"
	return cmd
}

// maxStatement bounds the text of a statement: it is stored with the run.
const maxStatement = 1 << 20

// statement is the one of the argument, of the file or of stdin.
func (o *sqlOptions) statement(e *env, args []string) (string, error) {
	var in io.Reader
	switch {
	case o.file != "" && len(args) > 0:
		return "", errUsage{fault.New(fault.Invalid, "a statement and --file exclude each other")}
	case o.file == "-" || len(args) == 1 && args[0] == "-":
		in = e.in
	case o.file != "":
		f, err := os.Open(o.file)
		if err != nil {
			return "", fault.Wrap(err, fault.Invalid, "the file %s cannot be read", o.file).WithCode("no_statement")
		}
		defer f.Close()
		in = f
	case len(args) == 1:
		in = strings.NewReader(args[0])
	default:
		return "", errUsage{fault.New(fault.Invalid, "no statement is given").WithCode("no_statement").
			WithHint("write it as the argument, or read it with -f FILE or -")}
	}
	text, err := io.ReadAll(io.LimitReader(in, maxStatement+1))
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "the statement cannot be read").WithCode("no_statement")
	}
	if len(text) > maxStatement {
		return "", fault.New(fault.TooLarge, "the statement is longer than %d bytes", maxStatement).WithCode("long_statement")
	}
	return string(text), nil
}

// sqlRequest is what a process that goes on with the run must know.
type sqlRequest struct {
	Statement string        `json:"statement"`
	Mode      string        `json:"mode"`
	Limit     int           `json:"limit"`
	MaxRows   int           `json:"max_rows"`
	Timeout   time.Duration `json:"timeout_ns,omitempty"`
	Columns   []sqlColumn   `json:"columns,omitempty"` // of a reading statement, where they are known
	selected
}

type sqlColumn struct {
	Name string `json:"name"`
	Type string `json:"type"`
}

func (c sqlColumn) String() string { return c.Name + " " + c.Type }

func runSQL(ctx context.Context, e *env, o sqlOptions, statement string) error {
	mode := sqlRead
	switch {
	case o.write && o.rehearse:
		return errUsage{fault.New(fault.Invalid, "--write and --rehearse exclude each other")}
	case o.write:
		mode = sqlWrite
	case o.rehearse:
		mode = sqlRehearse
	}
	if o.limit < 0 || o.maxRows < 0 {
		return errUsage{fault.New(fault.Invalid, "--limit and --max-rows must not be below 0")}
	}
	if o.shared {
		return runSharedSQL(ctx, e, o, mode, statement)
	}
	spec, err := o.spec(rollout.Spec{Kind: kindSQL, Actor: e.actor(), Join: mode == sqlWrite})
	if err != nil {
		return err
	}
	a, ts, err := o.begin(ctx, e, spec, newMerged(e, []string{}, 0), func() error {
		err := postgres.CheckStatement(statement)
		if err == nil && mode == sqlRead && postgres.ChangesRows(statement) {
			err = fault.New(fault.Invalid, "the statement changes rows, and reading is the default").WithCode("read_only").
				WithHint("add --write to change rows, or --rehearse to try it")
		}
		return err
	})
	if err != nil || len(ts) == 0 {
		return err
	}
	request := sqlRequest{Statement: statement, Mode: mode, Limit: o.limit, MaxRows: o.maxRows, Timeout: o.timeout, selected: o.selector.request()}
	columns, err := probe(ctx, a, ts, statement, o.timeout)
	if err != nil {
		return err
	}
	if mode == sqlRead {
		request.Columns = columns
	}
	if mode == sqlWrite {
		if err := e.confirm(ctx, fmt.Sprintf("change rows of %d tenant(s)", len(ts))); err != nil {
			return err
		}
	}
	spec.Request = request
	spec.Items = itemsOf(ts)
	return planAndWork(ctx, e, a, spec, o.workOptions, nil)
}

// probes is how many tenants a statement is tried at before any is asked.
const probes = 5

// probe has a statement parsed, and not run, by a few tenants: what is wrong wherever it runs is refused before anything
// is begun. The columns are those of a tenant at the version that most tenants are at, or unknown.
func probe(ctx context.Context, a *app.App, ts []tenant.Tenant, statement string, timeout time.Duration) ([]sqlColumn, error) {
	late, err := lacking(ctx, a)
	if err != nil {
		return nil, err
	}
	version := func(t tenant.Tenant) int {
		if v, behind := late[t.Number]; behind {
			return v
		}
		return -1 // the newest
	}
	at := map[int]int{}
	for _, t := range ts {
		at[version(t)]++
	}
	some := slices.DeleteFunc(slices.Clone(ts), func(t tenant.Tenant) bool { return t.State != tenant.Active })
	slices.SortStableFunc(some, func(a, b tenant.Tenant) int { return cmp.Compare(at[version(b)], at[version(a)]) })
	for _, t := range some[:min(probes, len(some))] {
		columns := []sqlColumn{}
		_, err := a.DB.AsTenant(ctx, t, postgres.Statement{SQL: statement, Describe: true, Timeout: timeout, Columns: func(cs []postgres.Column) error {
			columns = columnsOf(cs)
			return nil
		}})
		switch state := postgres.SQLState(err); {
		case err == nil:
			return columns, nil
		case state == "42601", state == "42P18", state == "42P02", fault.Is(err, fault.Invalid):
			return nil, refusedStatement(err)
		case fault.Is(err, fault.Unavailable) && state == "":
			return nil, err
		}
	}
	return nil, nil
}

// refusedStatement is a statement that no tenant can run.
func refusedStatement(err error) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return err
	}
	f := fault.New(fault.Invalid, "%s", pe.Message).WithCode("bad_statement").WithHint("nothing was begun")
	if strings.Contains(pe.Message, "multiple commands") {
		return f.WithCode("many_statements").WithHint("give one statement: each is a run of its own")
	}
	return f
}

func columnsOf(cs []postgres.Column) []sqlColumn {
	columns := make([]sqlColumn, len(cs))
	for i, c := range cs {
		columns[i] = sqlColumn{Name: c.Name, Type: cmp.Or(c.Type, fmt.Sprint(c.OID))}
	}
	return columns
}

// sqlResult is what one tenant answered. The run keeps the counts only.
type sqlResult struct {
	postgres.StatementResult
	Reason *reportedError `json:"reason,omitempty"` // why it was skipped
	rows   piece
}

// sqlRun is one process's work on a statement over the fleet.
type sqlRun struct {
	sqlRequest
	e *env
	a *app.App
	m *merged

	known chan []sqlColumn // holds the columns; nil until a tenant has told
	told  int              // tenants whose answers were written
	rows  int64
}

func sqlWork(e *env, a *app.App, request json.RawMessage) (runWork, error) {
	s := &sqlRun{e: e, a: a, known: make(chan []sqlColumn, 1)}
	if err := json.Unmarshal(request, &s.sqlRequest); err != nil {
		return runWork{}, fmt.Errorf("read what the run is to do: %w", err)
	}
	s.m = newMerged(e, nil, s.MaxRows)
	s.known <- s.Columns
	if s.Columns != nil {
		s.m.know(s.keys(s.Columns))
	}
	return runWork{do: s.do, told: s.tell, done: s.done, noOwner: true, changes: s.Mode == sqlWrite}, nil
}

// keys are the merged result's columns behind the tenant. A statement that returns nothing is told by how many rows it
// has changed, and so is a rehearsal.
func (s *sqlRun) keys(columns []sqlColumn) []string {
	if s.counts(columns) {
		return []string{"rows"}
	}
	names := make([]string, len(columns))
	for i, c := range columns {
		names[i] = c.Name
	}
	return s.m.uniqueKeys(names)
}

func (s *sqlRun) counts(columns []sqlColumn) bool { return s.Mode == sqlRehearse || len(columns) == 0 }

// agree holds a tenant's columns against those of the others, before its statement runs.
func (s *sqlRun) agree(columns []sqlColumn) error {
	want := <-s.known
	if want == nil {
		want = columns
		s.m.know(s.keys(columns))
	}
	s.known <- want
	if s.Mode == sqlRehearse || slices.Equal(want, columns) {
		return nil
	}
	return fault.New(fault.Unfit, "its columns are not those of the other tenants: %s", difference(want, columns)).WithCode("columns_differ").
		WithHint("name the columns instead of *, or `oneo migrate status` says who is behind")
}

// difference names what one list of columns has and the other has not.
func difference(want, got []sqlColumn) string {
	var parts []string
	say := func(word string, list, other []sqlColumn) {
		var names []string
		for _, c := range list {
			if !slices.Contains(other, c) {
				names = append(names, c.String())
			}
		}
		if len(names) > 0 {
			parts = append(parts, word+" "+strings.Join(names, ", "))
		}
	}
	say("it lacks", want, got)
	say("it has", got, want)
	if len(parts) == 0 {
		return "they stand in another order"
	}
	return strings.Join(parts, "; ")
}

func (s *sqlRun) do(ctx context.Context, task rollout.Task) rollout.Outcome {
	skip := func(why *reportedError) rollout.Outcome {
		return rollout.Outcome{Status: fleet.Skipped, Result: &sqlResult{Reason: why}}
	}
	switch {
	case s.Mode != sqlRead: // a change is made whether or not its result is read
	case s.m.unread():
		return skip(&reportedError{Code: "unread", Message: "nobody reads the result any more"})
	case s.m.full(task.Ordinal):
		return skip(s.m.cutAll())
	}
	t, err := taskTenant(task)
	if err != nil {
		return rollout.Outcome{Err: err}
	}
	t.Schema = t.Slug.Schema() // the binding asks the placement
	res, err := s.ask(task.Slug, task.Run, func(st postgres.Statement) (postgres.StatementResult, error) { return s.a.DB.AsTenant(ctx, t, st) })
	if err != nil {
		if why := notServed(err); why != nil {
			return skip(why)
		}
		return rollout.Outcome{Err: statementFault(err, s.Timeout)}
	}
	return rollout.Outcome{Status: fleet.OK, Result: res}
}

// ask runs the statement once, as run does it, and keeps what it answers. mark is the run whose change it is.
func (s *sqlRun) ask(name string, mark uuid.UUID, run func(postgres.Statement) (postgres.StatementResult, error)) (*sqlResult, error) {
	var columns []sqlColumn
	var oids []uint32
	var types *pgtype.Map
	rows := piece{tenant: name}
	st := postgres.Statement{
		SQL: s.Statement, Write: s.Mode != sqlRead, Rehearse: s.Mode == sqlRehearse, Timeout: s.Timeout, Limit: s.Limit,
		Columns: func(cs []postgres.Column) error {
			columns, types = columnsOf(cs), pgtype.NewMap()
			for _, c := range cs {
				oids = append(oids, c.OID)
			}
			return s.agree(columns)
		},
		Row: func(values [][]byte) error {
			switch {
			case s.counts(columns) || rows.told != nil:
				return nil
			case s.Limit > 0 && len(rows.rows) == s.Limit: // a writing statement is not left alone
				rows.told = s.m.cutTenant(s.Limit)
				return nil
			case rows.bytes > tenantBytes:
				rows.told = s.m.cutBytes()
				return nil
			}
			cells := make([]cell, len(values))
			for i, v := range values {
				cells[i] = valueOf(types, oids[i], v)
			}
			row := s.m.encode(name, cells, nil)
			rows.rows, rows.bytes = append(rows.rows, row), rows.bytes+len(row)
			return nil
		},
	}
	if s.Mode == sqlWrite {
		st.Mark = mark
	}
	res, err := run(st)
	if err != nil {
		return nil, err
	}
	switch {
	case res.Before && !s.counted():
		rows.told = &reportedError{Code: "done_before", Message: fmt.Sprintf("%d row(s) were changed by an earlier attempt, which had their values", res.Rows)}
	case res.Before, s.counts(columns):
		rows.rows = [][]byte{s.m.encode(name, []cell{numberCell(res.Rows)}, nil)}
	case res.Cut:
		rows.told = s.m.cutTenant(s.Limit)
	}
	return &sqlResult{StatementResult: res, rows: rows}, nil
}

// counted reports whether the result is a count, as far as any tenant has told.
func (s *sqlRun) counted() bool {
	columns := <-s.known
	s.known <- columns
	return s.counts(columns)
}

// notServed is why a tenant is left out that is suspended, upgraded or gone, or nil.
func notServed(err error) *reportedError {
	f := fault.Of(err)
	if f.Kind != fault.Gone && (f.Kind != fault.Suspended || f.Code == "tenant_locked") {
		return nil
	}
	return &reportedError{Code: f.StableCode(), Message: f.Message}
}

// statementFault says what became of an operator's statement. The operator wrote it: they read PostgreSQL's own words.
func statementFault(err error, timeout time.Duration) error {
	f := fault.Of(err)
	if f.Kind == fault.Busy || f.Code == "tenant_locked" {
		return fault.Wrap(err, fault.Locked, "%s", f.Message).WithCode(f.Code).WithRetry(f.Retry)
	}
	var pe *pgconn.PgError
	if !errors.As(err, &pe) || f.Code == "outcome_unknown" {
		return err
	}
	message := pe.Message
	if pe.Detail != "" {
		message += " (" + pe.Detail + ")"
	}
	switch pe.Code {
	case "25006":
		return fault.Wrap(err, fault.Forbidden, "%s", message).WithCode("read_only").WithHint("add --write to change rows, or --rehearse to try it")
	case "42501":
		return fault.Wrap(err, fault.Forbidden, "%s", message).WithCode("not_allowed").
			WithHint("the statement has the tenant's own rights: rows of its own tables; changes of tables belong in a migration")
	case "57014":
		return fault.Wrap(err, fault.Unfit, "the statement took longer than %s and was cancelled", timeout).WithCode("statement_timeout").WithHint("raise --timeout")
	case "55P03", "40001", "40P01":
		return fault.Wrap(err, fault.Locked, "%s", message).WithCode(f.StableCode()).WithRetry(time.Second)
	}
	if strings.HasPrefix(pe.Code, "08") || strings.HasPrefix(pe.Code, "53") || strings.HasPrefix(pe.Code, "57") || strings.HasPrefix(pe.Code, "28") {
		return err
	}
	bad := fault.Wrap(err, fault.Unfit, "%s", message).WithCode("statement_failed")
	if pe.Hint != "" {
		bad = bad.WithHint("%s", pe.Hint)
	}
	return bad
}

// tell adds a tenant that is through to the result.
func (s *sqlRun) tell(ev rollout.Event) {
	if ev.Task == nil || ev.Again > 0 {
		return
	}
	p := piece{tenant: ev.Task.Slug}
	switch r, ok := ev.Outcome.Result.(*sqlResult); {
	case ev.Outcome.Err != nil:
		p.told = told(ev.Outcome.Err)
	case ok && r.Reason != nil:
		p.told = r.Reason
	case ok:
		p = r.rows
		s.told++
		s.rows += r.Rows
	}
	s.m.add(ev.Task.Ordinal, p)
}

func (s *sqlRun) done(_ context.Context, end rollout.Run, say func(string, ...any)) error {
	switch err := s.m.end(); {
	case errors.Is(err, syscall.EPIPE) && s.Mode == sqlRead:
		return errExit{exitFailed} // as if it had died of it, but for the run, which has ended
	case errors.Is(err, syscall.EPIPE):
		say("the result was not read to its end")
	case err != nil:
		return fmt.Errorf("write the result: %w", err)
	}
	if s.m.cut > 0 {
		say("the result is cut: %d tenant(s) have more rows than are shown; --limit and --max-rows say how many are", s.m.cut)
	}
	switch s.Mode {
	case sqlRehearse:
		say("rehearsed and rolled back: %d row(s) in %d tenant(s)", s.rows, s.told)
	case sqlWrite:
		say("%d row(s) in %d tenant(s)", s.rows, s.told)
	}
	if n := end.OK - s.told; n > 0 {
		say("%d tenant(s) answered to another process: their rows are not here", n)
	}
	return nil
}
