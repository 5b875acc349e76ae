package app

import (
	"context"
	"net/http"
	"time"

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
	if a.Config.Backup.Physical.Engine != "" {
		o.Physical = a.physicalFacts
	}
	return observe.New(o)
}

// physicalWait is how long it may take to find out how the physical backups stand.
const physicalWait = time.Minute

func (a *App) physicalFacts(ctx context.Context) (all []observe.Physical, err error) {
	ctx, cancel := context.WithTimeout(ctx, physicalWait)
	defer cancel()
	clusters, err := a.PhysicalClusters()
	if err != nil {
		return nil, err
	}
	for _, k := range clusters {
		s, err := a.PhysicalState(ctx, k)
		if err != nil {
			return nil, err
		}
		p := observe.Physical{Cluster: k.Name, Archived: s.Archived().Until}
		if good := s.Good(); len(good) > 0 {
			p.Newest = good[len(good)-1].Stop
		}
		if s.Archiver != nil {
			failing := s.Archiver.Failing()
			p.Failing = &failing
		}
		all = append(all, p)
	}
	return all, nil
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
