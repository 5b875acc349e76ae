package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/provision"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// create compares making tenants through oneo with psql running the very same statements: role, grant, schema,
// default privileges, tables, registry, domain, placement, ledger and audit rows, in one transaction a tenant, on one
// connection. Neither makes a first user. Both take turns, so that the machine's mood hits both.
func (b *bench) create(ctx context.Context, n int) error {
	in, err := b.install(ctx, "bench_create", postgres.ByRole, 8)
	if err != nil {
		return err
	}
	var ours, psql time.Duration
	const rounds = 4
	for round := range rounds {
		took, err := in.createWithPsql(ctx, round*2*n/rounds, n/rounds)
		if err != nil {
			return err
		}
		psql += took
		if took, err = in.createWithOneo(ctx, (round*2+1)*n/rounds, n/rounds); err != nil {
			return err
		}
		ours += took
	}
	each := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(n) }
	b.printf("### Creating %d tenants on one connection\n", n)
	b.printf("| way | ms a tenant | of psql |\n| --- | --- | --- |")
	b.printf("| psql, the same statements, one transaction each | %.1f | 1.00 |", each(psql))
	b.printf("| oneo | %.1f | **%.2f** |\n", each(ours), float64(ours)/float64(psql))
	return nil
}

func (in *installation) createWithOneo(ctx context.Context, first, n int) (took time.Duration, err error) {
	err = in.open(func(_ *postgres.DB, _ *migrate.Migrator, p *provision.Provisioner) error {
		start := time.Now()
		for i := first; i < first+n; i++ {
			slug, err := tenant.ParseSlug(fmt.Sprintf("c%05d", i))
			if err != nil {
				return err
			}
			if _, err := p.Create(ctx, provision.CreateRequest{Slug: slug}); err != nil {
				return err
			}
		}
		took = time.Since(start)
		return nil
	})
	return took, err
}

func (in *installation) createWithPsql(ctx context.Context, first, n int) (took time.Duration, err error) {
	var script strings.Builder
	err = in.open(func(db *postgres.DB, m *migrate.Migrator, _ *provision.Provisioner) error {
		inst, err := db.Installation(ctx, postgres.MainGroup)
		if err != nil {
			return err
		}
		for i := first; i < first+n; i++ {
			slug, number := fmt.Sprintf("c%05d", i), int32(1_000_000+i)
			role := inst.TenantRole(number)
			fmt.Fprintf(&script, "begin;\n")
			fmt.Fprintf(&script, "insert into public.tenants (number, slug, schema, name, state) values (%d, '%s', '%s', '%s', 'active');\n", number, slug, slug, slug)
			fmt.Fprintf(&script, "insert into public.domains (host, tenant, is_primary) values ('%s.localhost', %d, true);\n", slug, number)
			fmt.Fprintf(&script, "create role %s nologin noinherit;\ngrant %s to %s;\n", role, role, inst.LoginOf(number))
			fmt.Fprintf(&script, "create schema %s;\nset local search_path to %s, ext, pg_temp;\ngrant usage on schema %s to %s;\n", slug, slug, slug, role)
			fmt.Fprintf(&script, "alter default privileges in schema %s grant select, insert, update, delete on tables to %s;\n", slug, role)
			fmt.Fprintf(&script, "alter default privileges in schema %s grant usage, select on sequences to %s;\n", slug, role)
			script.WriteString(m.CreationScript())
			fmt.Fprintf(&script, "insert into public.placements (number, schema, role, namespace, state, version) values (%d, '%s', '%s', '%s'::regnamespace, 'active', %d);\n",
				number, slug, role, slug, m.Head(migrate.TenantSet))
			for _, f := range m.Files(migrate.TenantSet) {
				fmt.Fprintf(&script, "insert into public.ledger (set, tenant, version, name, checksum) values ('tenant', %d, %d, '%s', '\\x%x');\n", number, f.Version, f.Name, f.Checksum)
			}
			fmt.Fprintf(&script, "insert into public.audit (actor, action, tenant, slug) values ('bench', 'tenant.create', %d, '%s');\ncommit;\n", number, slug)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	file := filepath.Join(in.b.dir, "create.sql")
	if err := os.WriteFile(file, []byte(script.String()), 0o600); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", in.group.OwnerURL, "-f", file)
	start := time.Now()
	if text, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("psql: %w: %s", err, text)
	}
	return time.Since(start), nil
}
