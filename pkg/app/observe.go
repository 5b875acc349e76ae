package app

import (
	"net/http"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/observe"
	"github.com/oneo-crm/oneo/pkg/server"
)

// observer is what tells of this server.
func (a *App) observer(id uuid.UUID, version string) *observe.Observer {
	o := observe.Options{
		Instance: id, Version: version, Counter: a.Counter, DB: a.DB, Cache: a.Cache, Head: a.Migrate.Head(migrate.TenantSet),
		MigrateKind: KindMigrate, Logger: a.Log,
	}
	if a.Config.Backup.URL != "" {
		o.BackupKind = KindBackup
	}
	return observe.New(o)
}

// opsHandlers are those of the operators' listener that tell of this server. Numbers of the whole are for whoever reaches the
// listener; what each tenant does is for whoever has the token. Without an observer there are the last lines of the log alone.
func (a *App) opsHandlers(id uuid.UUID, o *observe.Observer) map[string]http.Handler {
	secret := []byte(a.Config.Server.Secret)
	all := map[string]http.Handler{"GET /logs": observe.Guard(secret, a.Logs.Handle(id))}
	if o != nil {
		all["GET /metrics"] = o.Metrics()
		all["GET /stats"] = observe.Guard(secret, http.HandlerFunc(o.ServeStats))
	}
	return all
}

// counter hands the server's requests to the one that counts them.
type counter struct{ *observe.Counter }

func (c counter) End(a server.Answer) { c.Counter.End(observe.Answer(a)) }
