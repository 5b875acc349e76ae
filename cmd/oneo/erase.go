package main

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
)

type eraseOptions struct {
	slug, confirm string
	keepArchives  bool
}

func newTenantEraseCmd(e *env) *cobra.Command {
	var o eraseOptions
	cmd := &cobra.Command{
		Use: "erase NAME", Short: "Destroy a tenant for good, and keep it from coming back",
		Long: `Destroy a tenant for good, active, suspended or dropped: its schema and role, what runs, restores and
moves have kept of it, its domains, sessions and cached values, and its archives in the store of backups (unless
--keep-archives leaves them where they are). There is no grace period. The tenant's name is to be typed (or
--confirm NAME).

What is left is a signed record of what was destroyed, when and by whom, and the audit trail. An archive of the
tenant is refused from the beginning on, unless the tenant is named: --erased ID. One that was interrupted, or whose
store is away, is gone on with by the same command, or by a server; where the store is gone for good, with
--keep-archives. Clones are tenants of their own: they are told, and stay. What --keep-archives has left goes by ` + "`oneo backup prune --erased`" + `.`,
		Example: "  oneo tenant erase acme\n  oneo tenant erase acme --confirm acme",
		Args:    usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.slug = args[0]
			return tenantErase(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.confirm, "confirm", "", "the tenant's `NAME`, instead of typing it")
	f.BoolVar(&o.keepArchives, "keep-archives", false, "leave the archives where they are")
	return cmd
}

var erasureColumns = []column[provision.Erasure]{
	{"NAME", "tenant", func(x provision.Erasure) any { return x.Slug }},
	{"ID", "id", func(x provision.Erasure) any { return x.Tenant }},
	{"ERASED", "erased_at", func(x provision.Erasure) any { return x.At }},
	{"BY", "actor", func(x provision.Erasure) any { return x.Actor }},
	{"SCHEMA", "schema", func(x provision.Erasure) any { return x.Destroyed.Schema }},
	{"TABLES", "tables", func(x provision.Erasure) any { return x.Destroyed.Tables }},
	{"KEPT SCHEMAS", "kept_schemas", func(x provision.Erasure) any { return x.Destroyed.Kept }},
	{"DOMAINS", "domains", func(x provision.Erasure) any { return x.Destroyed.Domains }},
	{"CACHED", "cache_keys", func(x provision.Erasure) any { return x.Destroyed.CacheKeys }},
	{"ARCHIVES", "archives", func(x provision.Erasure) any { return x.Destroyed.Archives }},
}

func tenantErase(ctx context.Context, e *env, o eraseOptions) error {
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.slug)
	if err != nil {
		return err
	}
	var clones []string
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		clones, err = registry.Clones(ctx, tx, t.ID)
		return err
	})
	if err != nil {
		return err
	}
	if len(clones) > 0 {
		e.say("clones of it are tenants of their own, and stay: %s", strings.Join(clones, ", "))
	}
	what := "destroy the tenant " + t.Slug.String() + ", all of its data and its archives for good"
	if o.keepArchives {
		what = "destroy the tenant " + t.Slug.String() + " and all of its data but its archives for good"
	}
	if err := e.confirmName(ctx, t.Slug.String(), o.confirm, what); err != nil {
		return err
	}
	done, err := a.Provision.Erase(ctx, t.Slug, provision.EraseRequest{KeepArchives: o.keepArchives, Actor: e.actor()})
	if err != nil {
		return err
	}
	e.say("erased tenant %s; an archive of it is refused from now on", done.Slug)
	if done.Destroyed.SchemaMissing {
		e.say("its schema %s was gone, or made again behind oneo's back: what bears the name was left alone", done.Destroyed.Schema)
	}
	if done.Destroyed.CacheLeft {
		e.say("Redis could not be asked: what it has cached of the tenant ends within a day")
	}
	switch done.Destroyed.ArchivesLeft {
	case provision.ArchivesKept:
		e.say("its archives were left where they are, as you have said; oneo backup prune --erased -t %s destroys them", done.Slug)
	case provision.ArchivesUnknown:
		e.say("no archives were touched: oneo knows of no store of backups here; destroy files of yours by hand")
	}
	return showOne(e, done, erasureColumns)
}
