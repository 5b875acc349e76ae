package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// versionsChannel is where a migration tells that a tenant's version has changed.
const versionsChannel = "oneo_versions"

// versions remembers the tenants that this process does not serve because their versions are outside of the range of its
// code. It follows what PostgreSQL tells, and reads anew now and then in any case: what is told may be lost. It spares
// work and decides nothing: the binding of each request reads the placement itself. When a group cannot be read, what
// was last known of it stands.
type versions struct {
	db   *postgres.DB
	poll time.Duration
	log  *slog.Logger
	out  map[string]*atomic.Pointer[map[int32]struct{}] // by group
}

func newVersions(db *postgres.DB, poll time.Duration, log *slog.Logger) *versions {
	v := &versions{db: db, poll: poll, log: log, out: map[string]*atomic.Pointer[map[int32]struct{}]{}}
	for _, group := range db.Groups() {
		v.out[group] = &atomic.Pointer[map[int32]struct{}]{}
	}
	return v
}

// serves returns nil unless the tenant is known to be outside of the range.
func (v *versions) serves(t tenant.Tenant) error {
	group := v.out[t.Group]
	if group == nil {
		return nil
	}
	if known := group.Load(); known != nil {
		if _, out := (*known)[t.Number]; out {
			return postgres.Upgrading(t)
		}
	}
	return nil
}

// readEach is the least time between two looks at a group while a run tells of tenant after tenant.
const readEach = 100 * time.Millisecond

// watch keeps what is known of a group up to date until ctx ends.
func (v *versions) watch(ctx context.Context, group string) {
	told := make(chan struct{}, 1)
	tell := func() {
		select {
		case told <- struct{}{}:
		default: // a look is due already, and will see this too
		}
	}
	var listening sync.WaitGroup
	defer listening.Wait()
	listening.Go(func() {
		if err := v.db.Listen(ctx, group, versionsChannel, tell, func(string) { tell() }); err != nil {
			v.log.Error("listen to changes of versions", "group", group, "error", err)
		}
	})
	lost := false
	for {
		began := time.Now()
		err := v.read(ctx, group)
		if err != nil && !lost && ctx.Err() == nil {
			v.log.Warn("read the tenants' versions; what was last known of them stands", "group", group, "error", err)
		}
		lost = err != nil
		poll := time.NewTimer(v.poll*3/4 + rand.N(v.poll/4+1))
		select {
		case <-told:
		case <-poll.C:
		case <-ctx.Done():
		}
		poll.Stop()
		if !wait(ctx, readEach-time.Since(began)) {
			return
		}
	}
}

// wait reports whether ctx still stands after the time.
func wait(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-timer.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}

func (v *versions) read(ctx context.Context, group string) error {
	numbers, err := v.db.OutOfRange(ctx, group)
	if err != nil {
		return err
	}
	out := make(map[int32]struct{}, len(numbers))
	for _, n := range numbers {
		out[n] = struct{}{}
	}
	was := 0
	if before := v.out[group].Swap(&out); before != nil {
		was = len(*before)
	}
	if (was == 0) != (len(out) == 0) {
		r := v.db.Serves()
		v.log.Info("tenants outside of the versions that are served", "group", group, "tenants", len(out), "least", r.Min, "head", r.Head)
	}
	return nil
}

// Standing is a tenant's version, and why this process does not serve it at that; empty: it does.
type Standing struct {
	Version   int
	NotServed string
}

// Standing reads at which version a tenant is. NotFound: it has no placement, because it is being made or was purged.
func (a *App) Standing(ctx context.Context, t tenant.Tenant) (Standing, error) {
	p, err := a.DB.Placement(ctx, t)
	if errors.Is(err, pgx.ErrNoRows) {
		return Standing{}, fault.New(fault.NotFound, "tenant %s has no placement", t.Slug).WithCode("schema_missing")
	}
	if err != nil {
		return Standing{}, err
	}
	return a.standing(p), nil
}

func (a *App) standing(p postgres.Placement) Standing {
	st := Standing{Version: p.Version}
	switch r := a.DB.Serves(); {
	case p.Version < r.Min:
		st.NotServed = fmt.Sprintf("it is at version %d, and this oneo serves from version %d on", p.Version, r.Min)
	case p.Reader > r.Head:
		st.NotServed = fmt.Sprintf("it asks for a oneo that knows version %d, and this one knows %d", p.Reader, r.Head)
	}
	return st
}

// InRange refuses the tenant in whose schema the transaction works when this oneo's code does not fit its version: what
// the binding does for requests, for commands that read and write the same tables.
func (a *App) InRange(ctx context.Context, tx *postgres.OwnerTx, t tenant.Tenant) error {
	p, err := tx.Placement(ctx, t)
	if err != nil {
		return err
	}
	if st := a.standing(p); st.NotServed != "" {
		return fault.New(fault.Suspended, "the code of this oneo does not fit tenant %s: %s", t.Slug, st.NotServed).
			WithCode("tenant_upgrading").WithTenant(t.Slug.String()).WithHint("oneo migrate -t %s, or use the newer oneo", t.Slug)
	}
	return nil
}
