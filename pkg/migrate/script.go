package migrate

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

const (
	codeFailed = "migration_failed"
	// stateEnded is the SQLSTATE with which a script is ended that has ended its transaction.
	stateEnded = "ON004"
)

// script is the texts of several steps as one, which knows where each of them stands.
type script struct {
	lead  int // statements of oneo's own before the first part
	parts []part
	b     strings.Builder
}

type part struct {
	file  File
	steps []statement
	start int // of the text, in the script
	text  string
}

// add appends a step's text, whose statements are steps.
func (sc *script) add(f File, text string, steps []statement) {
	sc.parts = append(sc.parts, part{file: f, steps: steps, start: sc.b.Len(), text: text})
	sc.b.WriteString(text)
	sc.b.WriteString("\n;\n")
}

// then appends statements of oneo's own.
func (sc *script) then(format string, args ...any) {
	fmt.Fprintf(&sc.b, format, args...)
	sc.b.WriteString(";\n")
}

func (sc *script) text() string { return sc.b.String() }

// failed says which migration and which statement failed, where done statements had been carried out. The position
// that PostgreSQL gives counts characters of the whole script.
func (sc *script) failed(err error, done int) error {
	var pe *pgconn.PgError
	if !errors.As(err, &pe) {
		return err
	}
	if pe.Code == stateEnded {
		return SameTransaction("", "ended")
	}
	if pe.Position > 0 {
		at := byteOffset(sc.text(), int(pe.Position)-1)
		for _, p := range sc.parts {
			if at < p.start || at > p.start+len(p.text) {
				continue
			}
			line := lineAt(p.text, at-p.start)
			n := 0 // the statement that begins last before it
			for n < len(p.steps) && p.start+p.steps[n].start <= at {
				n++
			}
			return stepFailed(err, pe, p.file, n, line)
		}
	}
	if done < sc.lead {
		return err
	}
	done -= sc.lead
	for _, p := range sc.parts {
		if done < len(p.steps) {
			return stepFailed(err, pe, p.file, done+1, p.steps[done].line)
		}
		done -= len(p.steps)
	}
	if done == 0 && len(sc.parts) > 0 && strings.HasPrefix(pe.Code, "23") {
		return fault.Wrap(err, fault.Unfit, "a deferred constraint does not hold after migration %s (SQLSTATE %s)", sc.parts[len(sc.parts)-1].file, pe.Code).
			WithCode(codeFailed).WithHint("mend the data or the file, then run the same command again")
	}
	return err
}

// byteOffset is where the n-th character of a text begins.
func byteOffset(s string, n int) int {
	at := 0
	for ; n > 0 && at < len(s); n-- {
		_, size := utf8.DecodeRuneInString(s[at:])
		at += size
	}
	return at
}

// stepFailed says that a statement of a migration failed. What may pass, a lock or a lost server, keeps its own kind.
func stepFailed(err error, pe *pgconn.PgError, f File, statement, line int) error {
	where := ""
	if statement > 0 {
		where = fmt.Sprintf(" in statement %d", statement)
	}
	if line > 0 {
		where += fmt.Sprintf(", line %d", line)
	}
	if mayPass(pe.Code) {
		return fmt.Errorf("migration %s%s: %w", f, where, err)
	}
	return fault.Wrap(err, fault.Unfit, "migration %s failed%s (SQLSTATE %s)", f, where, pe.Code).
		WithCode(codeFailed).WithHint("%s", failureHint(pe.Code))
}

// mayPass reports whether a SQLSTATE says nothing about the statement: locks, a server that stops or has no room.
func mayPass(code string) bool {
	switch code {
	case "55P03", "40P01", "40001":
		return true
	case "57014": // statement_timeout, unless the caller has gone
		return false
	}
	switch code[:2] {
	case "08", "53", "57", "58":
		return true
	}
	return false
}

func failureHint(code string) string {
	const again = ", then run the same command again"
	switch {
	case code == "57014":
		return "it took longer than it may: give it more time" + again
	case code == "42501":
		return "the owner may not do this: grant it what it needs, or take it out of the file" + again
	case strings.HasPrefix(code, "23"):
		return "this tenant's rows do not fit: mend them, or the file" + again
	case code == "42P01", code == "42703", code == "42P07", code == "42701", code == "42704", code == "42710":
		return "if other tenants went through it, this one's structure is not what its version says; otherwise mend the file" + again
	}
	return "mend the data or the file" + again
}

// retryLocks runs fn again, twice, when a lock was not to be had or PostgreSQL broke a deadlock. In between it stays
// away for about as long as it has stood in the way of others.
func (m *Migrator) retryLocks(ctx context.Context, lockTimeout time.Duration, fn func() error) error {
	for attempt := 0; ; attempt++ {
		err := fn()
		code := postgres.SQLState(err)
		if attempt >= 2 || ctx.Err() != nil || code != "55P03" && code != "40P01" {
			return busy(err, code)
		}
		if !rest(ctx, lockTimeout/2+rand.N(lockTimeout)) {
			return busy(err, code)
		}
	}
}

// busy makes a deadlock what it is to the caller: locks that others held.
func busy(err error, code string) error {
	if code == "40P01" || code == "40001" {
		return fault.Wrap(err, fault.Locked, "other transactions were in the way of the locks that this needs").WithCode("lock_timeout").WithRetry(time.Second)
	}
	return err
}

// rest waits, and reports whether ctx let it.
func rest(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
