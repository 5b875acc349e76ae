package app

import (
	"context"
	"time"

	"github.com/oneo-crm/oneo/pkg/doctor"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Isolation proves, with two throw-away tenants in each of the groups, that tenants do not meet each other over the configured URLs, poolers and Redis.
func (a *App) Isolation(ctx context.Context, groups []string, actor string, say func(format string, args ...any)) ([]doctor.Proof, error) {
	o := DatabaseOptions(a.Config, a.Log)
	var err error
	if o.Serves, err = served(a.Config); err != nil {
		return nil, err
	}
	// One connection for each login, for which those who work at once wait in turn.
	o.MaxConns, o.InFlight, o.AcquireTimeout = 1, 1, max(o.AcquireTimeout, 30*time.Second)
	return doctor.Isolation(ctx, doctor.IsolationOptions{
		DB: a.DB, Open: func() (*postgres.DB, error) { return postgres.Open(o) }, Options: o,
		Provision: a.Provision, Cache: a.Cache, Groups: groups, Actor: actor, Say: say,
	})
}
