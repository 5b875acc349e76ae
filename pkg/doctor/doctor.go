// Package doctor looks a fleet over: registry, tenants, PostgreSQL, Redis, store and configuration, one check after
// another. It promises: looking changes nothing but a small object in the store that is taken away again, and costs each
// database one query a check, whatever the number of tenants; a check that cannot be made is a finding and keeps none of the
// others; each has its bound in time; what a repair does by itself takes no row and no right that is in use away.
package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/cache"
	"github.com/oneo-crm/oneo/pkg/config"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// Status is what a check has come to.
type Status string

const (
	// Skipped is a check of something that this installation does not have, or that was not asked for.
	Skipped Status = "skipped"
	// OK is a check that has found nothing.
	OK Status = "ok"
	// Warn is something to see to; what is served now is served rightly. So is what could not be looked at.
	Warn Status = "warn"
	// Fail is something that is wrong now.
	Fail Status = "fail"
)

var order = []Status{Skipped, OK, Warn, Fail}

// worse reports whether a says more than b.
func (a Status) worse(b Status) bool { return slices.Index(order, a) > slices.Index(order, b) }

// The groups of checks, in the order in which they are made.
const (
	Fleet         = "fleet"
	Tenants       = "tenants"
	PostgreSQL    = "postgresql"
	Redis         = "redis"
	Store         = "store"
	Configuration = "configuration"
)

// Check is one thing to be looked at.
type Check struct {
	Name  string // unique, a word of the command line
	Group string
	About string // what it looks at, in half a sentence
	// slow checks are left out of a quick look.
	slow bool
	// settles: what it compares is read at several moments. What it finds must be found twice.
	settles bool
	run     func(context.Context, *Doctor, *report) error
}

// Finding is one thing that is not as it should be.
type Finding struct {
	Status   Status `json:"status"`
	Database string `json:"database,omitempty"` // the database group; empty: of no one, or of all
	Message  string `json:"message"`
	Repair   string `json:"repair,omitempty"` // a command, or what to do
	fix      *fix
}

// Fixable reports whether Run can repair it by itself.
func (f Finding) Fixable() bool { return f.fix != nil }

// fix is a repair that is safe to be made without looking.
type fix struct {
	does string // "drop the role x"
	do   func(context.Context) error
	// long: it takes as long as it takes, since cut short it leaves more behind than there was.
	long bool
}

// Fixed is a repair that was made, or would be, or failed.
type Fixed struct {
	What  string `json:"what"`
	Done  bool   `json:"done"`
	Error string `json:"error,omitempty"`
}

// Result is one check's.
type Result struct {
	Check
	Status   Status
	Message  string // when nothing was found: what was looked at; else the findings in one line
	Findings []Finding
	Fixed    []Fixed
	Took     time.Duration
}

// Backups is what is known of the backups of a configuration.
type Backups struct {
	// Late are tenants whose newest backup is older than a schedule promises, and why.
	Late []string
	// Bare are tenants without any backup.
	Bare []string
	// Bad is how many manifests cannot be believed.
	Bad int
	// Count is how many backups there are.
	Count int
}

// Schedule is where one stands.
type Schedule struct {
	Name, State string
	Healthy     bool
}

// Options is what a Doctor needs.
type Options struct {
	DB        *postgres.DB
	Migrate   *migrate.Migrator
	Structure *structure.Checker
	Provision *provision.Provisioner // for repairs
	Cache     *cache.Cache
	Config    config.Config
	Origins   config.Origins // where the settings come from; may be nil
	// Tables reports whether the tables of schedules are behind; nil: they are not looked at.
	Tables func(context.Context) error
	// Store opens the store of backups, Schedules says where its schedules stand, and Backups reads what is in it; nil: there
	// is none.
	Store     func() (store.Store, error)
	Schedules func(context.Context) ([]Schedule, error)
	Backups   func(context.Context) (Backups, error)
	// Version is this program's, and Actor who makes repairs, for the audit trail.
	Version, Actor string
	// Physical reads what there is of each cluster's physical backups; nil: no engine makes any. Scratch is where clusters are recovered.
	Physical func(context.Context) ([]Physical, error)
	Scratch  string
	// Quick leaves out what takes its time with many tenants.
	Quick bool
	// Only narrows to checks or groups of these names; none: all.
	Only []string
	// Fix makes the repairs that are safe; with DryRun it only says which.
	Fix, DryRun bool
	// Timeout bounds each check, and each repair but the making of an index; 0 is 15 seconds, and two minutes for what is slow.
	Timeout time.Duration
	// Now is the clock; nil: the system's.
	Now func() time.Time
	// Told is called with each result as it comes; may be nil.
	Told func(Result)
}

// Report is what Run has come to.
type Report struct {
	Results []Result
	// Reached: PostgreSQL, Redis or the store has answered.
	Reached bool
}

// Count counts the results of a status.
func (r Report) Count(s Status) (n int) {
	for _, res := range r.Results {
		if res.Status == s {
			n++
		}
	}
	return n
}

// Doctor makes the checks once.
type Doctor struct {
	o       Options
	reached bool
	// asked are the groups whose databases were asked whether they answer; nil: they do.
	asked map[string]error
	// idle is for how long a session may stand still with locks.
	idle time.Duration
	// settle is how long work of others may take to be over that explains what was found.
	settle   time.Duration
	w        *world
	clusters []Physical // nil: not read yet
	// stored is when the store wrote an object, by its clock and by ours.
	stored *moment
}

// New checks the options. Invalid: there is no check or group of a name in Only.
func New(o Options) (*Doctor, error) {
	if o.DB == nil || o.Migrate == nil || o.Structure == nil || o.Provision == nil || o.Cache == nil {
		return nil, errors.New("doctor: DB, Migrate, Structure, Provision and Cache must be given")
	}
	groups := []string{Fleet, Tenants, PostgreSQL, Redis, Store, Configuration}
	names := slices.Clone(groups)
	for _, c := range checks {
		names = append(names, c.Name)
	}
	for _, name := range o.Only {
		if !slices.Contains(names, name) {
			f := fault.New(fault.Invalid, "there is no check %q", name).WithCode("unknown_check").WithHint("the groups are %s; docs/doctor.md lists the checks in them", strings.Join(groups, ", "))
			if near := fault.Nearest(name, names, 3); len(near) > 0 {
				f = f.WithHint("did you mean %s?", strings.Join(near, ", "))
			}
			return nil, f
		}
	}
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Told == nil {
		o.Told = func(Result) {}
	}
	return &Doctor{o: o, asked: map[string]error{}, idle: 5 * time.Minute, settle: 300 * time.Millisecond}, nil
}

// Checks lists what there is to be looked at, in order.
func Checks() []Check { return slices.Clone(checks) }

// checks is the table; a test holds docs/doctor.md equal to it.
var checks = slices.Concat(reachChecks, fleetChecks, tenantChecks, serverChecks, redisChecks, storeChecks, physicalChecks, settingChecks)

func (d *Doctor) wanted(c Check) bool {
	return len(d.o.Only) == 0 || slices.Contains(d.o.Only, c.Name) || slices.Contains(d.o.Only, c.Group)
}

// Run makes the checks, and the repairs where it was asked to. It ends early only with ctx.
func (d *Doctor) Run(ctx context.Context) (Report, error) {
	var rep Report
	for _, group := range []string{Fleet, Tenants, PostgreSQL, Redis, Store, Configuration} {
		for _, c := range checks {
			if c.Group != group || !d.wanted(c) {
				continue
			}
			res := d.one(ctx, c)
			if err := ctx.Err(); err != nil {
				return rep, err
			}
			rep.Results = append(rep.Results, res)
			d.o.Told(res)
		}
	}
	rep.Reached = d.reached
	return rep, nil
}

// one makes a check, repairs what it found, and looks again then.
func (d *Doctor) one(ctx context.Context, c Check) Result {
	start := time.Now()
	res := d.look(ctx, c)
	if d.o.Fix {
		for _, f := range res.Findings {
			if f.fix == nil {
				continue
			}
			fixed := Fixed{What: f.fix.does}
			if !d.o.DryRun {
				do := f.fix.do
				if !f.fix.long {
					do = func(ctx context.Context) error { return d.bounded(ctx, c, f.fix.do) }
				}
				if err := do(ctx); err != nil {
					fixed.Error = reason(err)
				}
				fixed.Done = fixed.Error == ""
			}
			res.Fixed = append(res.Fixed, fixed)
		}
		if len(res.Fixed) > 0 && !d.o.DryRun {
			d.w = nil
			fixed := res.Fixed
			res = d.look(ctx, c)
			res.Fixed = fixed
		}
	}
	res.Took = time.Since(start)
	return res
}

func (d *Doctor) look(ctx context.Context, c Check) Result {
	if c.slow && d.o.Quick {
		return Result{Check: c, Status: Skipped, Message: "left out of a quick look"}
	}
	r := d.ask(ctx, c)
	if c.settles && len(r.findings) > 0 {
		pause := time.NewTimer(d.settle)
		defer pause.Stop()
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		d.w = nil
		again := d.ask(ctx, c)
		again.findings = slices.DeleteFunc(again.findings, func(f Finding) bool {
			return !slices.ContainsFunc(r.findings, func(before Finding) bool { return before.Message == f.Message && before.Database == f.Database })
		})
		r = again
	}
	return r.result(c)
}

func (d *Doctor) ask(ctx context.Context, c Check) report {
	var r report
	if err := d.bounded(ctx, c, func(ctx context.Context) error { return c.run(ctx, d, &r) }); err != nil {
		r.unseen("", err)
	}
	return r
}

func (d *Doctor) bounded(ctx context.Context, c Check, fn func(context.Context) error) error {
	bound := d.o.Timeout
	switch {
	case bound > 0:
	case c.slow:
		bound = 2 * time.Minute
	default:
		bound = 15 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	return fn(ctx)
}

// report collects what a check finds.
type report struct {
	seen     []string
	skipped  string
	findings []Finding
}

// ok says what was looked at and is as it should be.
func (r *report) ok(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(r.seen, s) {
		r.seen = append(r.seen, s)
	}
}

// skip says why there is nothing to look at.
func (r *report) skip(format string, args ...any) { r.skipped = fmt.Sprintf(format, args...) }

// found notes a finding of a database group, or of none.
func (r *report) found(s Status, database, repair, format string, args ...any) *Finding {
	r.findings = append(r.findings, Finding{Status: s, Database: database, Message: fmt.Sprintf(format, args...), Repair: repair})
	return &r.findings[len(r.findings)-1]
}

// by says how a finding can be repaired without looking.
func (f *Finding) by(do func(context.Context) error, format string, args ...any) {
	f.fix = &fix{does: fmt.Sprintf(format, args...), do: do}
}

// unseen notes that something could not be looked at.
func (r *report) unseen(database string, err error) {
	repair := fault.Of(err).Hint
	r.found(Warn, database, repair, "could not be looked at: %s", reason(err))
}

// reason is an error for people: a fault's message, and of others only what holds no database's text.
func reason(err error) string {
	err = postgres.Fault(err)
	var f *fault.Fault
	if errors.As(err, &f) {
		if code := postgres.SQLState(err); code != "" && f.Kind == fault.Internal {
			return fmt.Sprintf("%s (SQLSTATE %s)", f.Message, code)
		}
		return f.Message
	}
	if code := postgres.SQLState(err); code != "" {
		return "PostgreSQL refused the query (SQLSTATE " + code + ")"
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "it took too long"
	}
	return err.Error()
}

func (r *report) result(c Check) Result {
	res := Result{Check: c, Status: OK, Findings: r.findings, Message: strings.Join(r.seen, "; ")}
	if r.skipped != "" {
		res.Status, res.Message = Skipped, r.skipped
	}
	if len(r.findings) == 0 {
		return res
	}
	slices.SortStableFunc(res.Findings, func(a, b Finding) int {
		return slices.Index(order, b.Status) - slices.Index(order, a.Status)
	})
	var all []string
	for _, f := range res.Findings {
		if f.Status.worse(res.Status) {
			res.Status = f.Status
		}
		all = append(all, f.Message)
	}
	res.Message = strings.Join(all, "; ")
	return res
}

// some names the first few.
func some(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// each looks at the databases of all groups that answer, each in a transaction of the owner's that cannot write.
func (d *Doctor) each(ctx context.Context, r *report, fn func(group string, tx *postgres.OwnerTx) error) {
	for _, group := range d.o.DB.Groups() {
		if err := d.read(ctx, group, func(tx *postgres.OwnerTx) error { return fn(group, tx) }); err != nil {
			r.unseen(group, err)
		}
	}
}

// read looks at one group's database. One that was lost is not waited for again.
func (d *Doctor) read(ctx context.Context, group string, fn func(*postgres.OwnerTx) error) error {
	if err := d.away(ctx, group); err != nil {
		return err
	}
	err := d.o.DB.AsOwnerWithin(ctx, group, d.bounds(ctx), func(tx *postgres.OwnerTx) error {
		if _, err := tx.Exec(ctx, `set transaction read only`); err != nil {
			return err
		}
		return fn(tx)
	})
	if postgres.Away(err) {
		d.asked[group] = err
	}
	return err
}

// probeWait is how long a database may take to answer at all.
const probeWait = 5 * time.Second

// away is why a group's database does not answer, or nil. It is asked once.
func (d *Doctor) away(ctx context.Context, group string) error {
	err, known := d.asked[group]
	if known {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	err = d.o.DB.AsOwnerWithin(ctx, group, d.bounds(ctx), func(*postgres.OwnerTx) error { return nil })
	d.asked[group] = err
	d.reached = d.reached || err == nil
	return err
}

// bounds are those of a transaction: PostgreSQL ends a statement by itself a little before nobody waits for it any more, so
// that one which takes too long is told from a server that is silent.
func (d *Doctor) bounds(ctx context.Context) postgres.OwnerOptions {
	o := postgres.OwnerOptions{StatementTimeout: 2 * time.Minute}
	if at, ok := ctx.Deadline(); ok {
		o.StatementTimeout = max(time.Until(at)*9/10, time.Millisecond)
	}
	return o
}

// write makes a repair in one transaction of the owner's.
func (d *Doctor) write(group, sql string, args ...any) func(context.Context) error {
	return func(ctx context.Context) error {
		return d.o.DB.AsOwnerWithin(ctx, group, d.bounds(ctx), func(tx *postgres.OwnerTx) error {
			_, err := tx.Exec(ctx, sql, args...)
			return err
		})
	}
}

// script is write for a statement without values.
func (d *Doctor) script(group, sql string) func(context.Context) error {
	return func(ctx context.Context) error {
		return d.o.DB.AsOwnerWithin(ctx, group, d.bounds(ctx), func(tx *postgres.OwnerTx) error { return tx.Script(ctx, sql) })
	}
}
