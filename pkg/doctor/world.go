package doctor

import (
	"context"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// known is a tenant as the registry has it.
type known struct {
	number  int32
	slug    string
	schema  string
	group   string
	state   string
	created time.Time
}

// placed is where a tenant stands, as a group's database has it.
type placed struct {
	number  int32
	schema  string
	role    string
	state   string
	version int32
	head    int32   // of its ledger rows
	moving  *string // the operation
	named   bool    // there is a schema of the name
	same    bool    // and it is the one that was placed
}

// world is what registry and placements say, read once for all the checks that compare the two.
type world struct {
	tenants map[int32]known
	// open are the tenants with an operation at work, which explains what is odd about them, and moves those that are.
	open  map[int32]bool
	moves map[string]bool
	// groups are those that could be read, and unread why others could not.
	groups map[string]*standing
	unread map[string]error
}

// standing is what one group's database says.
type standing struct {
	inst       postgres.Installation
	placements []placed
}

func (s *standing) byNumber() map[int32]placed {
	by := make(map[int32]placed, len(s.placements))
	for _, p := range s.placements {
		by[p.number] = p
	}
	return by
}

// called is a tenant's name for people.
func (w *world) called(number int32) string {
	if t, ok := w.tenants[number]; ok {
		return t.slug
	}
	return "number " + itoa(number)
}

// sorted are the tenants in the order of their names.
func (w *world) sorted() []known {
	all := make([]known, 0, len(w.tenants))
	for _, t := range w.tenants {
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b known) int { return int(a.number) - int(b.number) })
	return all
}

const (
	readTenants = `select number, slug, schema, group_name, state, created_at from public.tenants`
	readOpen    = `select coalesce(tenant, 0), id::text from public.operations where state = 'running'`
	readPlaced  = `select p.number, p.schema, p.role, p.state, p.version, coalesce(l.head, 0), p.moving::text, n.oid is not null, coalesce(n.oid = p.namespace, false)
from public.placements p left join pg_catalog.pg_namespace n on n.nspname = p.schema
left join (select tenant, max(version) head from public.ledger where set = 'tenant' group by tenant) l on l.tenant = p.number
order by p.number`
)

// places is world for checks of what it says of the groups: those that cannot be read are noted.
func (d *Doctor) places(ctx context.Context, r *report) (*world, error) {
	w, err := d.world(ctx)
	if err == nil {
		for _, group := range d.o.DB.Groups() {
			if err := w.unread[group]; err != nil {
				r.unseen(group, err)
			}
		}
	}
	return w, err
}

// world reads it, or returns what was read before.
func (d *Doctor) world(ctx context.Context) (*world, error) {
	w := d.w
	if w == nil {
		w = &world{tenants: map[int32]known{}, open: map[int32]bool{}, moves: map[string]bool{}, groups: map[string]*standing{}, unread: map[string]error{}}
		err := d.read(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
			rows, err := tx.Query(ctx, readTenants)
			if err != nil {
				return err
			}
			var t known
			if _, err := pgx.ForEachRow(rows, []any{&t.number, &t.slug, &t.schema, &t.group, &t.state, &t.created}, func() error {
				w.tenants[t.number] = t
				return nil
			}); err != nil {
				return err
			}
			if rows, err = tx.Query(ctx, readOpen); err != nil {
				return err
			}
			var number int32
			var id string
			_, err = pgx.ForEachRow(rows, []any{&number, &id}, func() error {
				w.open[number], w.moves[id] = true, true
				return nil
			})
			return err
		})
		if err != nil {
			return nil, err
		}
		for _, group := range d.o.DB.Groups() {
			if s, err := d.standing(ctx, group); err == nil {
				w.groups[group] = s
			} else {
				w.unread[group] = err
			}
		}
		d.w = w
	}
	return w, nil
}

func (d *Doctor) standing(ctx context.Context, group string) (*standing, error) {
	s := &standing{}
	return s, d.read(ctx, group, func(tx *postgres.OwnerTx) error {
		const inst = `select id, logins, app_role from public.installation`
		if err := tx.QueryRow(ctx, inst).Scan(&s.inst.ID, &s.inst.Logins, &s.inst.AppRole); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, readPlaced)
		if err != nil {
			return err
		}
		s.placements, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (p placed, err error) {
			return p, row.Scan(&p.number, &p.schema, &p.role, &p.state, &p.version, &p.head, &p.moving, &p.named, &p.same)
		})
		return err
	})
}
