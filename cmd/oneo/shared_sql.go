package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// ofTenants says which flag of many tenants was given, if one was.
func (o *sqlOptions) ofTenants() string {
	s := o.selector
	for _, f := range []struct {
		flag  string
		given bool
	}{
		{"tenant", len(s.names) > 0}, {"all-tenants", s.all}, {"exclude", len(s.exclude) > 0}, {"state", len(s.states) > 0},
		{"group", s.group != ""}, {"behind", s.behind}, {"canary", o.canary != 0}, {"wave", o.wave != ""}, {"pause", o.pause != 0},
		{"max-failures", o.maxFailures != 0}, {"fail-fast", o.failFast},
	} {
		if f.given {
			return f.flag
		}
	}
	return ""
}

// runSharedSQL runs one statement in the shared schema. It is one transaction, which happens or does not: there is no
// run to be gone on with.
func runSharedSQL(ctx context.Context, e *env, o sqlOptions, mode, statement string) error {
	if flag := o.ofTenants(); flag != "" {
		return errUsage{fault.New(fault.Invalid, "--shared goes with no tenants, and --%s is for them", flag)}
	}
	if o.timeout < 0 {
		return errUsage{fault.New(fault.Invalid, "--timeout must not be below 0")}
	}
	if err := postgres.CheckStatement(statement); err != nil {
		return err
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	// What PostgreSQL cannot even parse is refused before anybody is asked and anything is written.
	if _, err := a.DB.AsShared(ctx, postgres.Statement{SQL: statement, Describe: true, Timeout: o.timeout}); err != nil {
		return sharedFault(err, o)
	}
	if o.dryRun {
		e.say("the statement would run once, in the shared schema; nothing was done")
		return show(e, []asked{}, askedColumns)
	}
	if mode == sqlWrite {
		if err := e.confirm(ctx, "change rows of the shared schema"); err != nil {
			return err
		}
	}
	if err := auditShared(ctx, e, a, mode, statement); err != nil {
		return err
	}
	s := &sqlRun{e: e, a: a, known: make(chan []sqlColumn, 1), m: newMerged(e, nil, o.maxRows)}
	s.sqlRequest = sqlRequest{Statement: statement, Mode: mode, Limit: o.limit, MaxRows: o.maxRows, Timeout: o.timeout}
	s.m.alone = true
	s.known <- nil
	res, err := s.ask("", uuid.Nil, func(st postgres.Statement) (postgres.StatementResult, error) { return a.DB.AsShared(ctx, st) })
	if err != nil {
		return sharedFault(err, o)
	}
	s.m.add(0, res.rows)
	if err := s.m.end(); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	if s.m.cut > 0 {
		e.say("the result is cut: there are more rows than are shown; --limit and --max-rows say how many are")
	}
	switch mode {
	case sqlRehearse:
		e.say("rehearsed and rolled back: %d row(s)", res.Rows)
	case sqlWrite:
		e.say("%d row(s)", res.Rows)
	}
	return nil
}

// auditShared notes who is about to run what, by itself: whatever becomes of the statement, it was sent.
func auditShared(ctx context.Context, e *env, a *app.App, mode, statement string) error {
	err := a.DB.InShared(ctx, postgres.Write, func(tx *postgres.Tx) error {
		return registry.Audit(ctx, tx, registry.AuditEntry{
			Actor: e.actor(), Action: "sql", Details: map[string]any{"shared": true, "mode": mode, "statement": statement},
		})
	})
	if err != nil {
		return fmt.Errorf("write the audit trail: %w", err)
	}
	return nil
}

// sharedFault says what became of the statement: one that PostgreSQL would not run at all is a usage error, one that
// failed is a failure.
func sharedFault(err error, o sqlOptions) error {
	switch postgres.SQLState(err) {
	case "42601", "42P18", "42P02":
		return refusedStatement(err)
	}
	err = statementFault(err, o.timeout)
	var f *fault.Fault
	if errors.As(err, &f) && f.Kind == fault.Unfit {
		failed := *f
		failed.Kind = fault.Conflict
		return &failed
	}
	if fault.Of(err).Code == "not_allowed" {
		return fault.Wrap(err, fault.Forbidden, "%s", fault.Of(err).Message).WithCode("not_allowed").
			WithHint("the statement has the rights of the app role; `oneo psql --owner --shared` has the owner's")
	}
	return err
}
