package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/rollout"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

var fullColumns = []column[backup.Full]{
	{"ID", "id", func(f backup.Full) any { return f.ID }},
	{"GROUPS", "groups", func(f backup.Full) any { return f.Of() }},
	{"MADE", "made_at", func(f backup.Full) any { return f.Made }},
	{"TENANTS", "tenants", func(f backup.Full) any { return f.Tenants() }},
	{"LEFT OUT", "left_out", func(f backup.Full) any {
		names := []string{}
		for _, l := range f.LeftOut() {
			names = append(names, l.Slug)
		}
		return names
	}},
	{"ROWS", "rows", func(f backup.Full) any { return f.Rows() }},
	{"SIZE", "size_bytes", func(f backup.Full) any { return f.Bytes() }},
	{"ENCRYPTED", "encrypted", func(f backup.Full) any { return len(f.Keys) > 0 }},
	{"KEPT", "kept", func(f backup.Full) any { return f.Kept }},
	{"REASON", "reason", func(f backup.Full) any { return f.Reason }},
}

var fullDetails = append(fullColumns[:len(fullColumns):len(fullColumns)], []column[backup.Full]{
	{"ENDED", "ended_at", func(f backup.Full) any { return f.Ended }},
	{"CONSISTENCY", "consistency", func(f backup.Full) any { return f.Consistency }},
	{"KEYS", "keys", func(f backup.Full) any { return f.Keys }},
	{"INSTALLATION", "installation", func(f backup.Full) any { return f.Installation }},
	{"ONEO", "oneo", func(f backup.Full) any { return f.Oneo }},
}...)

// backupFull makes a full backup.
func backupFull(ctx context.Context, e *env, o backupCreateOptions) error {
	s := o.selector
	if len(s.names) > 0 || s.all || len(s.exclude) > 0 || len(s.states) > 0 || s.behind {
		return errUsage{fault.New(fault.Invalid, "--database backs up all tenants: it goes with no selection but --group").WithCode("two_selectors")}
	}
	if o.canary > 0 || o.wave != "" || o.maxFailures > 0 || o.failFast || o.pause > 0 || o.timeout > 0 {
		return errUsage{fault.New(fault.Invalid, "a full backup has no canaries, waves, pauses or bounds: it is there whole or not at all")}
	}
	if err := o.check(); err != nil {
		return err
	}
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	all := selector{all: true, group: s.group, states: []string{"active", "suspended", "dropped"}}
	ts, err := all.tenants(ctx, a)
	if err != nil {
		return err
	}
	if o.dryRun {
		return showAsked(e, rollout.Spec{}, ts)
	}
	if err := b.Ready(ctx); err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	how := backup.FullOptions{Jobs: o.jobs, Reason: o.reason, Kept: o.keep, Actor: e.actor()}
	if s.group != "" {
		how.Groups = []string{s.group}
	}
	last := time.Now()
	how.Told = func(done, of int) {
		if time.Since(last) > 5*time.Second && o.progress != "none" {
			last = time.Now()
			e.say("%d of %d tenant(s)", done, of)
		}
	}
	f, warning, err := b.CreateFull(ctx, how)
	if warning != "" {
		e.say("%s", warning)
	}
	if err != nil {
		return err
	}
	for _, l := range f.LeftOut() {
		e.say("left out: %s: %s", l.Slug, l.Reason)
	}
	e.say("full backup %s in %s: %d tenant(s) of %s, %s row(s), %s", f.ID, b.Store(), f.Tenants(), strings.Join(f.Of(), ", "), grouped(f.Rows()), size(f.Bytes()))
	if len(f.Of()) > 1 {
		e.say("%s", f.Consistency)
	}
	if err := showOne(e, f, fullColumns); err != nil {
		return err
	}
	if len(f.LeftOut()) > 0 {
		return errExit{exitSomeFailed}
	}
	return nil
}

func backupListFull(ctx context.Context, e *env) error {
	_, b, err := e.backups()
	if err != nil {
		return err
	}
	c, err := b.ListFull(ctx)
	if err != nil {
		return err
	}
	e.sayOddFull(c.Bad)
	if n := len(c.Loose); n > 0 {
		e.say("%d archive(s) have no manifest: they are being written, or were interrupted and are pruned after a week", n)
	}
	return show(e, c.Backups, fullColumns)
}

func (e *env) sayOddFull(bad []backup.Bad) {
	for _, b := range bad {
		e.say("not a backup: %s", fault.Of(b.Err).Message)
	}
}

// findFull is the full backup of an id of which there is no other backup: err is that of looking for one.
func findFull(ctx context.Context, b *backup.Backups, id string, err error) (f backup.Full, found bool, _ error) {
	if !fault.Is(err, fault.NotFound) {
		return f, false, err
	}
	f, ferr := b.FindFull(ctx, id)
	if fault.Is(ferr, fault.NotFound) {
		return f, false, err
	}
	return f, ferr == nil, ferr
}

// verifyFull proves a full backup, and restores its tenants where that is asked for.
func verifyFull(ctx context.Context, e *env, b *backup.Backups, f backup.Full, o backupVerifyOptions, ids []archive.Identity) error {
	items := []checked{{Manifest: backup.Manifest{ID: f.ID, Slug: "(database)", Made: f.Made, Rows: f.Rows(), Bytes: f.Bytes()}}}
	if o.restore {
		tries, erased, err := b.Triable(ctx, f)
		if err != nil {
			return err
		}
		if erased > 0 {
			e.say("%d tenant(s) were erased since, and are not restored", erased)
		}
		if n := o.sample; n > 0 && n < len(tries) {
			e.say("%d of %d tenant(s) are restored, chosen at random", n, len(tries))
			rand.Shuffle(len(tries), func(i, j int) { tries[i], tries[j] = tries[j], tries[i] })
			tries = tries[:n]
		}
		slices.SortFunc(tries, func(a, b backup.Manifest) int { return strings.Compare(a.Slug, b.Slug) })
		for _, m := range tries {
			items = append(items, checked{Manifest: m})
		}
	}
	return check(ctx, e, items, false, o.jobs, func(c checked) error {
		if c.Tenant == "" {
			return b.VerifyFull(ctx, f, o.jobs, o.checksums, ids)
		}
		_, err := b.Try(ctx, c.Manifest, "", transfer.Loading{Identities: ids, CustomDDL: o.customDDL, Actor: e.actor()})
		return err
	})
}

func keepFull(ctx context.Context, e *env, b *backup.Backups, id string, remove bool, reason string) error {
	f, err := b.KeepFull(ctx, id, !remove, reason)
	if err != nil {
		return err
	}
	if remove {
		e.say("the full backup %s may be pruned", f.ID)
	} else {
		e.say("the full backup %s is kept; undo: oneo backup keep --remove %s", f.ID, f.ID)
	}
	return showOne(e, f, fullColumns)
}

func backupPruneFull(ctx context.Context, e *env, p backup.Policy, dryRun bool) error {
	_, b, err := e.backups()
	if err != nil {
		return err
	}
	plan, err := b.PlanFull(ctx, p)
	if err != nil {
		return err
	}
	e.sayOddFull(plan.Bad)
	n := len(plan.Remove)
	var bytes int64
	for _, f := range plan.Remove {
		bytes += f.Bytes()
	}
	for _, l := range plan.Loose {
		bytes += l.Size
	}
	what := fmt.Sprintf("take away %d of %d full backup(s) and %d archive(s) of interrupted ones, %s", n, n+len(plan.Keep), len(plan.Loose), size(bytes))
	if dryRun {
		e.say("would %s; nothing was done", what)
		return show(e, plan.Remove, fullColumns)
	}
	gone := []backup.Full{}
	if n+len(plan.Loose) > 0 {
		if err := e.confirm(ctx, what+", for good"); err != nil {
			return err
		}
		plan, err = b.PruneFull(ctx, p, func(f backup.Full) { gone = append(gone, f) })
	}
	e.say("took away %d of %d full backup(s)", len(gone), len(plan.Keep)+len(plan.Remove))
	return errors.Join(err, show(e, gone, fullColumns))
}

var refilledColumns = []column[backup.RestoredTenant]{
	{"TENANT", "tenant", func(r backup.RestoredTenant) any { return r.Slug }},
	{"GROUP", "group", func(r backup.RestoredTenant) any { return r.Group }},
	{"STATUS", "status", func(r backup.RestoredTenant) any {
		if r.Err != nil {
			return string(fleet.Failed)
		}
		return string(fleet.OK)
	}},
	{"ROWS", "rows", func(r backup.RestoredTenant) any { return r.Rows }},
	{"MS", "duration_ms", func(r backup.RestoredTenant) any { return r.Took.Milliseconds() }},
	{"ERROR", "error", func(r backup.RestoredTenant) any { return errorObject(r.Err) }},
}

// restoreFull restores a full backup into an empty installation.
func restoreFull(ctx context.Context, e *env, o restoreOptions) error {
	if o.slug != "" || o.as != "" || o.schema != "" || o.diff || !o.parts.IsZero() || o.keep != 0 || o.force || o.noDomains {
		return errUsage{fault.New(fault.Invalid, "--database restores everything as it was: it goes with --group and --erased only").WithCode("two_selectors")}
	}
	if o.jobs < 1 {
		return errUsage{fault.New(fault.Invalid, "--jobs must be at least 1")}
	}
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	ids, err := o.keys.identities()
	if err != nil {
		return err
	}
	if len(ids) == 0 {
		ids = b.Identities()
	}
	f, err := b.FindFull(ctx, o.file)
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	e.say("full backup %s from %s: %d tenant(s) of %s, %s row(s)", f.ID, f.Made.UTC().Format(time.RFC3339), f.Tenants(), strings.Join(f.Of(), ", "), grouped(f.Rows()))
	if err := e.confirm(ctx, fmt.Sprintf("restore %d tenant(s) and the shared tables into this installation", f.Tenants())); err != nil {
		return err
	}
	how := backup.FullRestore{Group: o.group, Jobs: o.jobs, Loading: transfer.Loading{Identities: ids, MaxBytes: o.maxSize, CustomDDL: o.customDDL, Actor: e.actor()}}
	if o.erased != "" {
		how.Erased = strings.Split(o.erased, ",")
	}
	n, last := 0, time.Now()
	how.Told = func(r backup.RestoredTenant) {
		if n++; time.Since(last) > 5*time.Second && o.progress != "none" {
			last = time.Now()
			e.say("%d tenant(s), the last one %s", n, r.Slug)
		}
	}
	done, err := b.RestoreFull(ctx, f, how)
	failed := 0
	for _, t := range done.Tenants {
		if t.Err != nil {
			failed++
		}
	}
	if err != nil {
		if n > 0 {
			e.say("%d tenant(s) are restored; the same command goes on", n-failed)
		}
		return err
	}
	for _, slug := range done.LeftOut {
		e.say("not restored: %s: the backup has no archive of it", slug)
	}
	for _, slug := range done.Erased {
		e.say("not restored: %s: it was erased since", slug)
	}
	if done.Before {
		e.say("this backup has been restored here already: there is nothing to do")
	} else {
		e.say("restored %d tenant(s), %d failed, %d of other groups wait for the same command", len(done.Tenants)-failed, failed, done.Waiting)
	}
	if err := show(e, done.Tenants, refilledColumns); err != nil {
		return err
	}
	if failed > 0 || len(done.LeftOut) > 0 {
		return errExit{exitSomeFailed}
	}
	return nil
}
