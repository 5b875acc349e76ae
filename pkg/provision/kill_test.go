package provision_test

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/pgtest"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/registry"
	"github.com/oneo-crm/oneo/pkg/structure"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/schemas"
)

const childTask = "PROVISION_TEST_TASK"

// TestMain also serves as the child that carries out one task and is killed in the middle of it.
func TestMain(m *testing.M) {
	if raw := os.Getenv(childTask); raw != "" {
		var task task
		if err := json.Unmarshal([]byte(raw), &task); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(9)
		}
		if err := task.child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	pgtest.Main(m)
}

// task is one operation on the tenant "acme", as a process of its own would do it.
type task struct {
	Operation string
	Group     string
	PoolSize  int
	Restore   uuid.UUID // that is undone
	Silent    bool      // gives no signs of life
	Groups    map[string]postgres.Group
}

func (k task) child() error {
	o := postgres.DefaultOptions()
	pgtest.Patient(&o)
	o.Groups, o.Secret, o.OwnerConns = k.Groups, pgtest.Secret, 4
	db, err := postgres.Open(o)
	if err != nil {
		return err
	}
	defer db.Close()
	_, p, _, err := openOn(db, k.options)
	if err != nil {
		return err
	}
	return k.do(context.Background(), p)
}

func (k task) options(o *provision.Options) {
	o.PoolSize = k.PoolSize
	if k.Silent {
		o.StaleAfter = time.Hour
	}
}

func openOn(db *postgres.DB, change ...func(*provision.Options)) (*postgres.DB, *provision.Provisioner, *migrate.Migrator, error) {
	m, err := migrate.New(db, migrate.Options{Files: schemas.Files})
	if err != nil {
		return nil, nil, nil, err
	}
	base, err := tenant.ParseHost("localhost")
	if err != nil {
		return nil, nil, nil, err
	}
	o := provision.Options{
		DB: db, Migrate: m, BaseDomain: base, DropGrace: time.Hour, DomainHold: time.Hour, GateWait: 30 * time.Second,
		StaleAfter: 200 * time.Millisecond, Secret: pgtest.Secret, Logger: slog.New(slog.DiscardHandler),
		Marker: registry.NewMarker(db, slog.New(slog.DiscardHandler)),
	}
	for _, f := range change {
		f(&o)
	}
	p, err := provision.New(o)
	return db, p, m, err
}

func (k task) do(ctx context.Context, p *provision.Provisioner) error {
	acme, err := tenant.ParseSlug("acme")
	if err != nil {
		return err
	}
	switch k.Operation {
	case "create":
		_, err = p.Create(ctx, provision.CreateRequest{Slug: acme, Group: k.Group, Actor: "test"})
	case "suspend":
		_, err = p.Suspend(ctx, acme, "test")
	case "resume":
		_, err = p.Resume(ctx, acme, "test")
	case "drop":
		_, err = p.Drop(ctx, acme, 0, "test")
	case "undrop":
		_, err = p.Undrop(ctx, acme, "test")
	case "purge":
		_, err = p.Purge(ctx, acme, "test")
	case "erase":
		_, err = p.Erase(ctx, acme, provision.EraseRequest{Actor: "test"})
	case "rename":
		to, perr := tenant.ParseSlug("globex")
		if perr != nil {
			return perr
		}
		_, err = p.Rename(ctx, acme, provision.RenameRequest{Slug: to, Schema: to.Schema(), Actor: "test"})
	case "restore":
		_, err = p.Restore(ctx, acme, provision.RestoreRequest{Fill: oneUser("restored"), Keep: time.Hour, Actor: "test"})
	case "return":
		_, err = p.Return(ctx, acme, k.Restore, "test")
	case "spare":
		if err = p.KeepSpares(ctx); err == nil {
			p.KeepPools(ctx)
		}
	default:
		err = fmt.Errorf("no operation %q", k.Operation)
	}
	return err
}

// kill -9 at every place of every operation, in the registry's database and in another one: the same command, run
// again, reaches the end state, and everything agrees.
func TestKillEverywhere(t *testing.T) {
	t.Parallel()
	for _, group := range []string{"main", "second"} {
		for _, place := range slices.Concat(failpoint.All, claiming) {
			// Runs over the fleet, backups, their schedules, recoveries of clusters and what erasures have left are killed in cmd/oneo, migrations of one tenant in pkg/migrate, undo points in
			// pkg/snapshot, archives and moves in pkg/transfer, full backups and their restores in pkg/backup.
			switch kind, _, _ := strings.Cut(place, "."); kind {
			case "run", "migrate", "down", "sql", "point", "undo", "export", "load", "merge", "move", "backup", "schedule", "full", "refill", "left", "physical", "recover":
				continue
			}
			t.Run(group+" "+place, func(t *testing.T) {
				t.Parallel()
				point, claims := strings.CutSuffix(place, " of a spare")
				operation, _, ok := strings.Cut(point, ".")
				require.Truef(t, ok, "the failpoint %s names no operation", point)
				f := newFixture(t, group)
				ctx := t.Context()
				k := task{Operation: operation, Group: group, Groups: f.groups}
				var spares []int32
				if claims || operation == "spare" {
					k.PoolSize = 2
					f.p = f.pooled(t, k.PoolSize)
					spares = f.spares(t, group)
				}
				f.prepare(t, operation, group)
				if operation == "return" {
					done, err := f.p.Restore(ctx, pgtest.Slug(t, "acme"), provision.RestoreRequest{Fill: oneUser("restored"), Keep: time.Hour, Actor: "test"})
					require.NoError(t, err)
					k.Restore = done.Operation
				}

				self, err := os.Executable()
				require.NoError(t, err)
				raw, err := json.Marshal(k)
				require.NoError(t, err)
				cmd := exec.Command(self)
				cmd.Env = append(os.Environ(), childTask+"="+string(raw), "ONEO_FAILPOINTS="+point+"=exit")
				out, _ := cmd.CombinedOutput()
				require.Equalf(t, 137, cmd.ProcessState.ExitCode(), "the failpoint %s did not fire:\n%s", point, out)

				f.oneOfTwo(t, operation, place)

				// The connections of the dead process may take a moment to end, and its operation to go stale.
				pause := time.NewTimer(250 * time.Millisecond)
				<-pause.C
				err = k.do(ctx, f.p)
				// When the dead process had finished, or its operation is finished first, doing it again may say so.
				if err != nil {
					require.Truef(t, strings.Contains(err.Error(), "exists already") || strings.Contains(err.Error(), "there is no tenant") ||
						strings.Contains(err.Error(), "cannot be") || strings.Contains(err.Error(), "undone already"), "doing it again: %v", err)
				}
				f.reached(t, operation, group)
				f.pointed(t, operation, group)
				if claims {
					tn, err := find(ctx, f.db, "acme")
					require.NoError(t, err)
					require.Containsf(t, spares, tn.Number, "the tenant has taken one of the spares")
					require.Subset(t, spares, f.spares(t, group), "no other spare was made")
					require.Len(t, f.spares(t, group), len(spares)-1, "no other spare is lost")
				}
				f.invariants(t)
			})
		}
	}
}

// oneUser fills a tenant's tables with one user, of that name.
func oneUser(name string) provision.Filling {
	return provision.Filling{Version: 1, Rows: func(ctx context.Context, tx *postgres.OwnerTx, _ structure.Schema) error {
		_, err := tx.Exec(ctx, `insert into users (id, email, password_hash) values (gen_random_uuid(), $1, 'x')`, name+"@acme.example")
		return err
	}}
}

// users reads who a tenant has, as a request.
func (f fixture) users(t *testing.T, slug string) (emails string) {
	t.Helper()
	tn, err := find(t.Context(), f.db, slug)
	require.NoError(t, err)
	require.NoError(t, f.db.InTenant(t.Context(), tn, postgres.Read, func(tx *postgres.Tx) error {
		return tx.QueryRow(t.Context(), `select coalesce(string_agg(email, ' ' order by email), '') from users`).Scan(&emails)
	}))
	return emails
}

// oneOfTwo holds that a killed restore, or its undo, has left the tenant as it was or as it was to be, and served.
func (f fixture) oneOfTwo(t *testing.T, operation, place string) {
	t.Helper()
	before, after := "before@acme.example", "restored@acme.example"
	switch operation {
	case "restore":
	case "return":
		before, after = after, before
	default:
		return
	}
	want := before
	if place == operation+".finish" || place == operation+".after" {
		want = after
		if f.groups["second"].URL == "" && place == "return.finish" { // all is one transaction
			want = before
		}
	}
	require.Equal(t, want, f.users(t, "acme"), place)
}

// claiming are the places of a creation that takes a spare.
var claiming = []string{
	"create.before of a spare", "create.started of a spare", "create.schema of a spare", "create.finish of a spare", "create.after of a spare",
}

type fixture struct {
	env    *pgtest.Env
	groups map[string]postgres.Group
	db     *postgres.DB
	p      *provision.Provisioner
	m      *migrate.Migrator
}

// newFixture makes an installation, with a second group when one is asked for.
func newFixture(t *testing.T, group string) fixture {
	t.Helper()
	env := pgtest.New(t)
	groups := map[string]postgres.Group{"main": env.Group}
	if group == "second" {
		groups[group] = env.SecondGroup(t)
	}
	db, _, _ := env.Open(t, func(o *postgres.Options) { o.Groups = groups })
	_, p, m, err := openOn(db)
	require.NoError(t, err)
	_, err = m.Shared(t.Context())
	require.NoError(t, err)
	f := fixture{env: env, groups: groups, db: db, p: p, m: m}
	for name := range groups {
		_, err := pgtest.Admin(t, f.adminURL(name)).Exec(t.Context(), postgres.GrantRestorePoints("oneo_owner"))
		require.NoError(t, err)
	}
	return f
}

func (f fixture) create(t *testing.T, slug, group string) tenant.Tenant {
	t.Helper()
	made, err := f.p.Create(t.Context(), provision.CreateRequest{Slug: pgtest.Slug(t, slug), Group: group, Actor: "test"})
	require.NoError(t, err)
	return made
}

// prepare brings acme to where the operation begins.
func (f fixture) prepare(t *testing.T, operation, group string) {
	t.Helper()
	ctx, acme := t.Context(), pgtest.Slug(t, "acme")
	switch operation {
	case "create":
		return
	case "spare": // one of them is behind
		f.spoil(t, group, f.spares(t, group)[0], behind)
		return
	}
	f.create(t, "acme", group)
	var err error
	switch operation {
	case "restore", "return":
		tn, ferr := find(ctx, f.db, "acme")
		require.NoError(t, ferr)
		err = f.db.AsOwnerIn(ctx, tn, func(tx *postgres.OwnerTx) error {
			return oneUser("before").Rows(ctx, tx, structure.Schema{})
		})
	case "resume":
		_, err = f.p.Suspend(ctx, acme, "test")
	case "undrop", "purge":
		_, err = f.p.Drop(ctx, acme, 0, "test")
	}
	require.NoError(t, err)
}

func find(ctx context.Context, db *postgres.DB, slug string) (t tenant.Tenant, err error) {
	err = db.AsOwner(ctx, "main", func(tx *postgres.OwnerTx) error {
		const query = `select number, slug, schema, group_name, state from public.tenants where slug = $1 order by number desc limit 1`
		var s, schema, state string
		if err := tx.QueryRow(ctx, query, slug).Scan(&t.Number, &s, &schema, &t.Group, &state); err != nil {
			return err
		}
		var err error
		if t.Slug, err = tenant.ParseSlug(s); err != nil {
			return err
		}
		if t.Schema, err = tenant.ParseSchema(schema); err != nil {
			return err
		}
		t.State = tenant.State(state)
		return nil
	})
	return t, err
}

// reached checks the end state of an operation, by what the tenant can and cannot do.
func (f fixture) reached(t *testing.T, operation, group string) {
	t.Helper()
	slug, state := "acme", tenant.Active
	if operation == "spare" {
		f.requireSpares(t, group, 2, 0)
		return
	}
	switch operation {
	case "rename":
		slug = "globex"
	case "suspend":
		state = tenant.Suspended
	case "drop":
		state = tenant.Dropped
	case "purge", "erase":
		state = tenant.Purged
	}
	tn, err := find(t.Context(), f.db, slug)
	require.NoErrorf(t, err, "tenant %s after %s", slug, operation)
	require.Equalf(t, state, tn.State, "state after %s", operation)
	if operation == "erase" {
		f.requireErased(t, tn, group)
	}
	require.Equal(t, group, tn.Group)
	var schema string
	err = f.db.InTenant(t.Context(), tn, postgres.Read, func(tx *postgres.Tx) error {
		return tx.QueryRow(t.Context(), `select current_schema() from (select count(*) from records) r`).Scan(&schema)
	})
	if state == tenant.Active {
		require.NoErrorf(t, err, "after %s the tenant must be served, with its newest tables", operation)
		switch operation {
		case "restore":
			require.Equal(t, "restored@acme.example", f.users(t, slug))
		case "return":
			require.Equal(t, "before@acme.example", f.users(t, slug))
		}
		require.Equal(t, slug, schema)
	} else {
		require.Errorf(t, err, "after %s the tenant must not be served", operation)
	}
}

// invariants of both databases.
func (f fixture) invariants(t *testing.T) {
	t.Helper()
	f.env.Invariants(t)
	main := pgtest.Admin(t, f.env.AdminURL)
	var open int
	require.NoError(t, main.QueryRow(t.Context(), `select count(*) from public.operations where state in ('running', 'queued')`).Scan(&open))
	require.Zero(t, open, "an operation was left open")
	if _, ok := f.groups["second"]; !ok {
		return
	}
	const second = `select format('placement %s %s', p.number, p.schema) from public.placements p
left join pg_namespace n on n.nspname = p.schema and n.oid = p.namespace left join pg_roles r on r.rolname = p.role where n.oid is null or r.oid is null
union all select 'stray schema ' || nspname from pg_namespace where nspname !~ '^pg_' and nspname not in ('public', 'ext', 'information_schema')
  and nspname not in (select schema from public.placements) and nspname not in (select schema from public.replaced)
union all select format('ledger of %s', tenant) from public.ledger where set = 'tenant' and tenant not in (select number from public.placements)
union all select format('version of %s', p.number) from public.placements p
  where p.version <> (select coalesce(max(version), 0) from public.ledger where set = 'tenant' and tenant = p.number)`
	c := pgtest.Admin(t, f.adminURL("second"))
	rows, err := c.Query(t.Context(), second)
	require.NoError(t, err)
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	require.Empty(t, found, "the second group's database")
	// Registry and the second group's placements agree.
	rows, err = c.Query(t.Context(), `select format('%s %s', number, state) from public.placements where state <> 'spare' order by number`)
	require.NoError(t, err)
	placed, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	rows, err = main.Query(t.Context(), `select format('%s %s', number, state) from public.tenants where group_name = 'second' and state <> 'purged' order by number`)
	require.NoError(t, err)
	known, err := pgx.CollectRows(rows, pgx.RowTo[string])
	require.NoError(t, err)
	require.Equal(t, known, placed, "registry and placements of the second group")
}

func (f fixture) adminURL(group string) string {
	cfg, err := pgx.ParseConfig(f.groups[group].URL)
	if err != nil {
		panic(err)
	}
	return f.env.Server.URL(cfg.Database)
}
