package main

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

// returning is a tenant that is to be taken back to a moment.
type returning struct {
	slug string
	live tenant.Tenant // zero: there is none any more
	was  tenant.Tenant
	past pastArchive
}

// restoreAt takes tenants back to a moment. They share one recovery, which ends before anything live is changed.
func restoreAt(ctx context.Context, e *env, o restoreOptions) error {
	switch {
	case len(o.slugs) == 0:
		return errUsage{fault.New(fault.Invalid, "say which tenant is to be taken back").WithCode("no_tenant").WithHint("add -t NAME")}
	case len(o.slugs) > 1 && o.as != "":
		return errUsage{fault.New(fault.Invalid, "--as makes one tenant of one")}
	}
	if o.at.at != "" {
		if _, err := physical.ParseTime(o.at.at, time.Now(), time.Local); err != nil {
			return errUsage{err}
		}
	}
	if !e.yes && !e.terminal && !o.diff && o.as == "" {
		// It would be asked behind the recovery, which takes its time.
		return fault.New(fault.NeedsConfirmation, "this would take what is restored back to a moment").WithHint("add --yes, or look first: --diff")
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	todo := make([]*returning, len(o.slugs))
	var groups []string
	for i, slug := range o.slugs {
		todo[i] = &returning{slug: slug}
		t, err := tenantNamed(ctx, a, slug)
		switch {
		case err == nil:
			todo[i].live = t
			groups = append(groups, t.Group)
		case !fault.Is(err, fault.NotFound):
			return err
		case o.diff || !o.parts.IsZero():
			return err // they are about a tenant that is there
		}
	}
	if err := remember(ctx, e, a, o, todo, groups); err != nil {
		return err
	}
	defer func() {
		for _, r := range todo {
			if r.past.file != nil {
				_ = r.past.file.Close()
			}
		}
	}()
	var errs []error
	for _, r := range todo {
		if err := putBack(ctx, e, a, o, r); err != nil {
			if len(todo) == 1 || ctx.Err() != nil {
				return err
			}
			f := fault.Of(err)
			e.say("%s: %s", r.slug, f.Message)
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return fault.Wrap(errors.Join(errs...), fault.Unfit, "%d of %d tenants could not be taken back", len(errs), len(todo)).WithCode("tenants_failed")
	}
	return nil
}

// remember recovers the moment and writes the tenants, as they were then, into files of their own.
func remember(ctx context.Context, e *env, a *app.App, o restoreOptions, todo []*returning, groups []string) (err error) {
	past, err := recoverTenants(ctx, e, a, o, todo, groups)
	if err != nil {
		return err
	}
	defer func() {
		if cerr := past.Close(); err == nil {
			err = cerr
		}
	}()
	for _, r := range todo {
		if r.live.ID == "" && o.as == "" {
			if err := notElsewhere(ctx, a, r.was); err != nil {
				return err
			}
		}
		m, err := newMeter(e, o.progress, "taken")
		if err != nil {
			return err
		}
		var rows int64
		r.past.file, r.past.custom, rows, err = past.Remember(ctx, r.was, m.tell)
		m.end()
		if err != nil {
			return err
		}
		e.say("%s had %s row(s) then", r.was.Slug, grouped(rows))
	}
	return nil
}

// recoverTenants recovers the moment, and finds out which tenants are meant. Where one of them was in another group then, that group's
// cluster is needed too: it is known only now.
func recoverTenants(ctx context.Context, e *env, a *app.App, o restoreOptions, todo []*returning, groups []string) (*app.Past, error) {
	for {
		past, err := o.at.recover(ctx, e, a, o.progress, "oneo restore -t "+strings.Join(o.slugs, " -t "), groups)
		if err != nil {
			return nil, err
		}
		var missing []string
		for _, r := range todo {
			if r.was, err = tenantThen(ctx, past, r); err != nil {
				return nil, errors.Join(err, past.Close())
			}
			if !slices.Contains(past.DB.Groups(), r.was.Group) {
				missing = append(missing, r.was.Group)
			}
		}
		if len(missing) == 0 {
			return past, nil
		}
		if err := past.Close(); err != nil {
			return nil, err
		}
		for _, g := range missing {
			if slices.Contains(groups, g) || !slices.Contains(a.DB.Groups(), g) {
				return nil, fault.New(fault.Invalid, "the database group %q, in which it was then, is not configured", g).WithCode("unknown_group")
			}
		}
		groups = append(groups, missing...)
		e.say("then it was in the group %s: once more, with its cluster", strings.Join(missing, ", "))
	}
}

// tenantThen is a tenant as it was: by its identity if it lives, otherwise by its name.
func tenantThen(ctx context.Context, past *app.Past, r *returning) (t tenant.Tenant, err error) {
	at := past.Clusters[0].Target
	err = past.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		if r.live.ID != "" {
			t, err = registry.ByID(ctx, tx, r.live.ID)
		} else {
			t, err = bySlug(ctx, tx, r.slug)
		}
		return err
	})
	switch {
	case fault.Is(err, fault.NotFound) && r.live.ID != "":
		return t, fault.New(fault.NotFound, "there was no tenant %s at %s: it began at %s", r.slug, at, r.live.CreatedAt.UTC().Format(time.RFC3339)).WithCode("before_tenant").WithTenant(r.slug)
	case fault.Is(err, fault.NotFound):
		return t, fault.New(fault.NotFound, "there is no tenant %s, and there was none at %s", r.slug, at).WithCode("unknown_tenant").WithHint("oneo tenant list")
	case err != nil:
		return t, err
	case t.State == tenant.Purged:
		return t, fault.New(fault.NotFound, "the tenant %s was purged already at %s", r.slug, at).WithCode("unknown_tenant").WithTenant(r.slug)
	}
	return t, nil
}

// notElsewhere refuses a tenant that lives under another name by now.
func notElsewhere(ctx context.Context, a *app.App, was tenant.Tenant) error {
	var now tenant.Tenant
	err := a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) (err error) {
		now, err = registry.ByID(ctx, tx, was.ID)
		return err
	})
	switch {
	case fault.Is(err, fault.NotFound) || err == nil && now.State == tenant.Purged:
		return nil
	case err != nil:
		return err
	}
	return fault.New(fault.Conflict, "the tenant that was called %s then is called %s now", was.Slug, now.Slug).WithCode("renamed").WithTenant(now.Slug.String()).
		WithHint("take it back: -t %s; make another tenant of it: --as NAME", now.Slug)
}

// putBack makes what a tenant was then of the tenant that lives.
func putBack(ctx context.Context, e *env, a *app.App, o restoreOptions, r *returning) error {
	o.past, o.slug = &r.past, r.slug
	switch {
	case o.as != "":
		return tenantImport(ctx, e, o.importOptions)
	case r.live.ID == "":
		e.say("there is no tenant %s any more: it is made anew", r.slug)
		return tenantImport(ctx, e, o.importOptions)
	case r.live.State == tenant.Dropped && !o.diff && o.parts.IsZero():
		if err := e.confirm(ctx, "bring the dropped tenant "+r.slug+" back"); err != nil {
			return err
		}
		e.say("tenant %s is dropped: it comes back first", r.slug)
		t, err := a.Provision.Undrop(ctx, r.live.Slug, e.actor())
		if err != nil {
			return err
		}
		r.live = t
	}
	if o.diff || !o.parts.IsZero() || e.yes { // parts are shown before they are asked for
		return restoreInto(ctx, e, a, r.live, o)
	}
	found, err := a.Transfers.Diff(ctx, r.live, r.past.file, false, transfer.Parts{}, transfer.Loading{MaxBytes: o.maxSize, CustomDDL: o.customDDL, Known: o.known(), Erased: o.erased, Actor: e.actor()})
	if err != nil {
		return err
	}
	for _, d := range found {
		if d.Added+d.Removed+d.Changed > 0 {
			e.say("%s: %s come back, %s go, %s change, %s stay", d.Table, grouped(d.Added), grouped(d.Removed), grouped(d.Changed), grouped(d.Same))
		}
	}
	if _, err := r.past.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return restoreInto(ctx, e, a, r.live, o)
}
