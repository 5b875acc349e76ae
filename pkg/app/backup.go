package app

import (
	"context"
	"os"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
)

// Backups are those of the configuration's store. Invalid: there is none, or a key cannot be read.
func (a *App) Backups() (*backup.Backups, error) {
	c := a.Config.Backup
	if c.URL == "" {
		return nil, fault.New(fault.Invalid, "no place for backups is configured").WithCode("no_backup_store").
			WithHint("set ONEO_BACKUP_URL (backup.url) to the path of a directory that is not on the database's disk, or to s3://bucket/prefix")
	}
	s, err := store.Open(c.URL, a.Environ)
	if err != nil {
		return nil, err
	}
	o := backup.Options{
		Store: s, DB: a.DB, Transfers: a.Transfers, Secret: a.Config.Server.Secret, KeepMin: c.KeepMin,
		Before: c.Hooks.Before, After: c.Hooks.After, HookTimeout: c.Hooks.Timeout, Environ: a.Environ, Logger: a.Log,
	}
	for _, text := range c.Recipients {
		r, err := archive.ParseRecipient(text)
		if err != nil {
			return nil, err
		}
		o.To = append(o.To, r)
	}
	if c.IdentityFile != "" {
		text, err := os.ReadFile(c.IdentityFile)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "the file of backup.identity_file cannot be read").WithCode("identity_file")
		}
		if o.Identities, err = archive.ParseIdentities(string(text)); err != nil {
			return nil, err
		}
	}
	return backup.New(o)
}

// archives are those of the configuration's store, for erasures.
type archives struct{ a *App }

func (x archives) EraseArchives(ctx context.Context, tenantID string) (int, error) {
	b, err := x.a.Backups()
	if err != nil {
		return 0, err
	}
	return b.EraseArchives(ctx, tenantID)
}

func (x archives) MarkErased(ctx context.Context, tenantID, slug string) error {
	b, err := x.a.Backups()
	if err != nil {
		return err
	}
	return b.MarkErased(ctx, tenantID, slug)
}
