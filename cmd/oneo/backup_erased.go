package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/provision"
)

// erasedLeft is what the store still holds of an erased tenant, or held.
type erasedLeft struct {
	provision.Erasure
	backup.Left
	gone *time.Time
	why  string // it stays
}

var erasedLeftColumns = []column[erasedLeft]{
	{"TENANT", "tenant", func(l erasedLeft) any { return l.Slug }},
	{"ID", "id", func(l erasedLeft) any { return l.Tenant }},
	{"ERASED", "erased_at", func(l erasedLeft) any { return l.At }},
	{"ARCHIVES", "archives", func(l erasedLeft) any { return l.Archives }},
	{"SIZE", "size_bytes", func(l erasedLeft) any { return l.Bytes }},
	{"STAYS", "stays", func(l erasedLeft) any { return l.why != "" }},
	{"FOR", "for", func(l erasedLeft) any { return l.why }},
	{"GONE", "archives_erased_at", func(l erasedLeft) any { return when(l.gone) }},
}

// leftOf finds what is left of erased tenants, of one name or id or of all: "", and says why it stays.
func leftOf(ctx context.Context, a *app.App, b *backup.Backups, within backup.Span, name string) (list []erasedLeft, err error) {
	records, err := a.Provision.Erasures(ctx)
	if err != nil {
		return nil, err
	}
	left, err := b.Left(ctx)
	if err != nil {
		return nil, err
	}
	known := false
	for _, r := range records {
		if name != "" && name != r.Slug && name != r.Tenant {
			continue
		}
		known = true
		l := erasedLeft{Erasure: r, Left: left[r.Tenant]}
		going := r.Genuine && r.Destroyed.ArchivesLeft == provision.ArchivesGoing
		if l.Bytes == 0 && l.Archives == 0 && !going {
			continue
		}
		kept, err := b.Keeps(ctx, r.Tenant)
		switch {
		case err != nil:
			return nil, err
		case r.Exists:
			l.why = "exists"
		case !r.Genuine:
			l.why = "unverified"
		case kept > 0:
			l.why = "kept"
		case within != (backup.Span{}) && !r.At.Before(within.Before(time.Now())):
			l.why = "within"
		}
		list = append(list, l)
	}
	if name != "" && !known {
		return nil, fault.New(fault.NotFound, "no tenant %s was erased", name).WithCode("unknown_tenant").WithHint("oneo backup prune --erased --dry-run")
	}
	return list, nil
}

// backupPruneErased takes away the archives that erasures have left.
func backupPruneErased(ctx context.Context, e *env, within backup.Span, name string, dryRun bool) error {
	a, b, err := e.backups()
	if err != nil {
		return err
	}
	if err := a.Migrate.SharedBehind(ctx); err != nil {
		return err
	}
	list, err := leftOf(ctx, a, b, within, name)
	if err != nil {
		return err
	}
	var goes []erasedLeft
	var all backup.Left
	doubtful := false
	for _, l := range list {
		switch l.why {
		case "":
			goes = append(goes, l)
			all.Archives, all.Bytes = all.Archives+l.Archives, all.Bytes+l.Bytes
		case "unverified":
			doubtful = true
			e.say("left alone: the record of the erasure of %s was not made with this server.secret, or was changed since", l.Slug)
		case "exists":
			e.say("left alone: the tenant %s exists, though it was erased", l.Slug)
		case "kept":
			e.say("left alone: a backup of %s is kept; `oneo backup list` shows it, and `oneo backup keep --remove` takes that back", l.Slug)
		}
	}
	what := fmt.Sprintf("destroy all archives of %d erased tenant(s), %d archive(s), %s, for good", len(goes), all.Archives, size(all.Bytes))
	gone := []erasedLeft{}
	switch {
	case dryRun:
		e.say("would %s; nothing was done", what)
		gone = append(gone, list...)
	case len(goes) > 0:
		word := "erased"
		if len(goes) == 1 {
			word = goes[0].Slug
		}
		if err := e.confirmTyped(ctx, word, what); err != nil {
			return err
		}
		fallthrough
	default:
		for _, l := range goes {
			if kept, kerr := b.Keeps(ctx, l.Tenant); kerr != nil || kept > 0 { // somebody has said so meanwhile
				err = errors.Join(err, kerr)
				continue
			}
			done, n, eerr := a.Provision.EraseLeft(ctx, l.Tenant, e.actor())
			if eerr != nil {
				err = fmt.Errorf("%s: %w", l.Slug, eerr)
				break
			}
			l.Archives, l.gone = n, done.Destroyed.ArchivesErasedAt
			gone = append(gone, l)
		}
		e.say("destroyed the archives of %d of %d erased tenant(s)", len(gone), len(list))
	}
	if err := errors.Join(err, show(e, gone, erasedLeftColumns)); err != nil {
		return err
	}
	if doubtful {
		return errExit{exitUnverified}
	}
	return nil
}
