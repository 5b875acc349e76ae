// Package registry reads and writes the shared tables: tenants, domains, groups, operations and the audit trail. It
// opens no transactions: each function works in the one that its caller holds on the main database, as the app role or
// the owner. What changes a tenant's placement is in provision; here is only what is one row's business.
package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

const tenantColumns = `t.number, t.id::text, t.slug, t.schema, t.name, t.group_name, t.state, t.epoch, t.cache_generation, t.created_at, coalesce(p.host, '')`

const fromTenants = ` from public.tenants t left join public.domains p on p.tenant = t.number and p.is_primary`

// scanTenant reads tenantColumns, and more behind them. The words are parsed again: a row that somebody wrote past oneo is an error here and
// never an identifier elsewhere.
func scanTenant(row pgx.Row, more ...any) (tenant.Tenant, error) {
	var t tenant.Tenant
	var slug, schema, state, host string
	err := row.Scan(append([]any{&t.Number, &t.ID, &slug, &schema, &t.Name, &t.Group, &state, &t.Epoch, &t.CacheGeneration, &t.CreatedAt, &host}, more...)...)
	if err != nil {
		return tenant.Tenant{}, err
	}
	if t.Slug, err = tenant.ParseSlug(slug); err != nil {
		return tenant.Tenant{}, fmt.Errorf("tenant %d in the registry: %w", t.Number, err)
	}
	if t.Schema, err = tenant.ParseSchema(schema); err != nil {
		return tenant.Tenant{}, fmt.Errorf("tenant %d in the registry: %w", t.Number, err)
	}
	if t.State, err = tenant.ParseState(state); err != nil {
		return tenant.Tenant{}, fmt.Errorf("tenant %d in the registry: %w", t.Number, err)
	}
	if host != "" {
		if t.Primary, err = tenant.ParseHost(host); err != nil {
			return tenant.Tenant{}, fmt.Errorf("tenant %d in the registry: %w", t.Number, err)
		}
	}
	return t, nil
}

func collectTenants(rows pgx.Rows, err error) ([]tenant.Tenant, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (tenant.Tenant, error) { return scanTenant(row) })
}

// BySlug finds a tenant that has not been purged. NotFound: the hint lists names that look like it.
func BySlug(ctx context.Context, q postgres.Querier, slug tenant.Slug) (tenant.Tenant, error) {
	const bySlug = `select ` + tenantColumns + fromTenants + ` where t.slug = $1 and t.state <> 'purged'`
	t, err := scanTenant(q.QueryRow(ctx, bySlug, slug.String()))
	if errors.Is(err, pgx.ErrNoRows) {
		return t, unknown(ctx, q, slug.String())
	}
	return t, err
}

// Taken reports whether a tenant that has not been purged has the name. A free one is not held: two that are made at
// once are told apart by the insert.
func Taken(ctx context.Context, q postgres.Querier, slug tenant.Slug) (taken bool, err error) {
	const query = `select exists (select from public.tenants where slug = $1 and state <> 'purged')`
	return taken, q.QueryRow(ctx, query, slug.String()).Scan(&taken)
}

// NextNumber takes the number of a tenant that is to be made. It is never given again.
func NextNumber(ctx context.Context, q postgres.Querier) (number int32, err error) {
	return number, q.QueryRow(ctx, `select nextval('public.tenant_numbers')`).Scan(&number)
}

// ByNumber finds a tenant, purged or not.
func ByNumber(ctx context.Context, q postgres.Querier, number int32) (tenant.Tenant, error) {
	const byNumber = `select ` + tenantColumns + fromTenants + ` where t.number = $1`
	t, err := scanTenant(q.QueryRow(ctx, byNumber, number))
	if errors.Is(err, pgx.ErrNoRows) {
		return t, fault.New(fault.NotFound, "there is no tenant number %d", number).WithCode("unknown_tenant")
	}
	return t, err
}

// ByID finds a tenant by its id for the outside, purged or not.
func ByID(ctx context.Context, q postgres.Querier, id string) (tenant.Tenant, error) {
	const byID = `select ` + tenantColumns + fromTenants + ` where t.id = $1::text::uuid`
	t, err := scanTenant(q.QueryRow(ctx, byID, id))
	if errors.Is(err, pgx.ErrNoRows) {
		return t, fault.New(fault.NotFound, "there is no tenant with the id %s", id).WithCode("unknown_tenant")
	}
	return t, err
}

// ByNumbers finds tenants by their numbers, in the order of their slugs.
func ByNumbers(ctx context.Context, q postgres.Querier, numbers []int32) ([]tenant.Tenant, error) {
	const byNumbers = `select ` + tenantColumns + fromTenants + ` where t.number = any($1) order by t.slug`
	return collectTenants(q.Query(ctx, byNumbers, numbers))
}

// ByHost finds the tenant of a domain, whatever its state, with its budget. NotFound: no tenant has it.
func ByHost(ctx context.Context, q postgres.Querier, host tenant.Host) (tenant.Tenant, error) {
	const byHost = `select ` + tenantColumns + `, ` + budgetColumns + fromTenants + ` join public.domains d on d.tenant = t.number
left join public.budgets b on b.tenant = t.number where d.host = $1`
	var b budgetRow
	t, err := scanTenant(q.QueryRow(ctx, byHost, host.String()), b.dest()...)
	t.Budget, t.Use = b.budget(), b.use
	if errors.Is(err, pgx.ErrNoRows) {
		return t, fault.New(fault.NotFound, "no tenant has the host %s", host).WithCode("unknown_host")
	}
	return t, err
}

// Filter selects tenants. The zero Filter selects all that have not been purged.
type Filter struct {
	Names   []string // slugs or globs (* and ?); none: all
	Exclude []string // slugs or globs; wins over Names
	States  []tenant.State
	Group   string
	After   string // slugs behind this one only, for paging
	Limit   int    // 0: no limit
}

// List reads the tenants that a filter selects, in the order of their slugs. A name without * or ? that no tenant has
// is NotFound with the names that look like it, also one that is to be excluded: mistyped, it would exclude nobody. A
// name that is excluded or in another state is simply not selected.
func List(ctx context.Context, q postgres.Querier, f Filter) ([]tenant.Tenant, error) {
	for _, pattern := range slices.Concat(f.Names, f.Exclude) {
		// What looks like a pattern and selects nobody would exclude nobody either.
		if strings.ContainsAny(pattern, `\[]{}`) || pattern == "" {
			return nil, fault.New(fault.Invalid, "%q is no tenant name and no pattern", pattern).WithCode("bad_pattern").
				WithHint("use a name, or * and ? as in 'acme-*'")
		}
	}
	const list = `select ` + tenantColumns + fromTenants + `
where t.state <> 'purged'
  and (cardinality($1::text[]) = 0 or t.slug like any($1::text[]))
  and not t.slug like any($2::text[])
  and (cardinality($3::text[]) = 0 or t.state = any($3))
  and ($4 = '' or t.group_name = $4)
  and t.slug > $5
order by t.slug limit nullif($6::int, 0)`
	states := make([]string, len(f.States))
	for i, s := range f.States {
		states[i] = string(s)
	}
	found, err := collectTenants(q.Query(ctx, list, likes(f.Names), likes(f.Exclude), states, f.Group, f.After, f.Limit))
	if err != nil {
		return nil, err
	}
	return found, missingNames(ctx, q, slices.Concat(f.Names, f.Exclude), found)
}

// likes turns globs into LIKE patterns. A slug holds neither % nor _ nor a backslash.
func likes(globs []string) []string {
	out := make([]string, len(globs))
	for i, g := range globs {
		out[i] = strings.NewReplacer(`%`, `\%`, `_`, `\_`, `*`, `%`, `?`, `_`).Replace(g)
	}
	return out
}

func missingNames(ctx context.Context, q postgres.Querier, names []string, found []tenant.Tenant) error {
	have := map[string]bool{}
	for _, t := range found {
		have[t.Slug.String()] = true
	}
	var missing []string
	for _, n := range names {
		if !strings.ContainsAny(n, "*?") && !have[n] {
			missing = append(missing, n)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	const existing = `select slug from public.tenants where slug = any($1) and state <> 'purged'`
	rows, err := q.Query(ctx, existing, missing)
	if err != nil {
		return err
	}
	there, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	for _, n := range missing {
		if !slices.Contains(there, n) {
			return unknown(ctx, q, n)
		}
	}
	return nil
}

// unknown is the fault for a name that no tenant has, with up to five names that look like it.
func unknown(ctx context.Context, q postgres.Querier, name string) error {
	f := fault.New(fault.NotFound, "there is no tenant %q", name).WithCode("unknown_tenant").WithTenant(name)
	const near = `select slug from public.tenants where state <> 'purged'
order by (left(slug, 2) = left($1, 2)) desc, abs(length(slug) - length($1)), slug limit 500`
	rows, err := q.Query(ctx, near, name)
	if err != nil {
		return err
	}
	slugs, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	like := fault.Nearest(name, slugs, 5)
	if len(like) > 0 {
		return f.WithHint("did you mean %s? `oneo tenant list` shows all", strings.Join(like, ", "))
	}
	return f.WithHint("`oneo tenant list` shows all")
}

// Settings reads a tenant's settings: a JSON object whose member "public" anybody may see.
func Settings(ctx context.Context, q postgres.Querier, t tenant.Tenant) (json.RawMessage, error) {
	var s json.RawMessage
	err := q.QueryRow(ctx, `select settings from public.tenants where number = $1`, t.Number).Scan(&s)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, fault.New(fault.NotFound, "there is no tenant %q", t.Slug).WithCode("unknown_tenant")
	}
	return s, err
}

// MaxSettingsBytes bounds a tenant's settings.
const MaxSettingsBytes = 64 << 10

// SetSettings replaces a tenant's settings if they are still as the caller read them; Stale: they are not. The caller
// computes the new value, so that all of oneo merges JSON in one place.
func SetSettings(ctx context.Context, q postgres.Querier, t tenant.Tenant, old, settings json.RawMessage) error {
	var object map[string]json.RawMessage
	if err := json.Unmarshal(settings, &object); err != nil || object == nil {
		return fault.New(fault.Unfit, "settings must be a JSON object").WithCode("settings")
	}
	if len(settings) > MaxSettingsBytes {
		return fault.New(fault.TooLarge, "settings may have at most %d bytes", MaxSettingsBytes).WithCode("settings")
	}
	const set = `update public.tenants set settings = $3, updated_at = now() where number = $1 and settings = $2`
	tag, err := q.Exec(ctx, set, t.Number, old, settings)
	if err == nil && tag.RowsAffected() == 0 {
		return fault.New(fault.Stale, "the settings were changed in between").WithCode("stale")
	}
	return err
}

// Clones are the names of the tenants that are clones of the one with this id for the outside, in order.
func Clones(ctx context.Context, q postgres.Querier, id string) ([]string, error) {
	rows, err := q.Query(ctx, `select slug from public.tenants where settings -> 'clone' ->> 'id' = $1 and state <> 'purged' order by slug`, id)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// FlushCache raises the generation that is part of each of the tenant's cache keys.
func FlushCache(ctx context.Context, q postgres.Querier, t tenant.Tenant) error {
	const flush = `update public.tenants set cache_generation = cache_generation + 1, updated_at = now() where number = $1`
	_, err := q.Exec(ctx, flush, t.Number)
	return err
}

// Group is one database group as the registry knows it.
type Group struct {
	Name       string
	MaxTenants *int
	Accepting  bool
	Tenants    int
}

// Groups reads the groups with the number of their tenants.
func Groups(ctx context.Context, q postgres.Querier) ([]Group, error) {
	const groups = `select g.name, g.max_tenants, g.accepting,
	(select count(*) from public.tenants t where t.group_name = g.name and t.state <> 'purged')
from public.groups g order by g.name`
	rows, err := q.Query(ctx, groups)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (Group, error) {
		var g Group
		return g, row.Scan(&g.Name, &g.MaxTenants, &g.Accepting, &g.Tenants)
	})
}

// Domain is one host of a tenant.
type Domain struct {
	Host      tenant.Host
	Primary   bool
	CreatedAt time.Time
}

// Domains reads a tenant's domains: the primary one first.
func Domains(ctx context.Context, q postgres.Querier, t tenant.Tenant) ([]Domain, error) {
	const domains = `select host, is_primary, created_at from public.domains where tenant = $1 order by is_primary desc, host`
	rows, err := q.Query(ctx, domains, t.Number)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (Domain, error) {
		var d Domain
		var host string
		if err := row.Scan(&host, &d.Primary, &d.CreatedAt); err != nil {
			return d, err
		}
		d.Host, err = tenant.ParseHost(host)
		return d, err
	})
}

// AddDomain gives a host to a tenant. Conflict: another tenant has it, or it is held back for the tenant that had it
// last. NotFound: the tenant was purged since it was read. With primary the former primary domain becomes an ordinary one. Adding a host that the tenant has already
// changes nothing but primary.
func AddDomain(ctx context.Context, q postgres.Querier, t tenant.Tenant, host tenant.Host, primary bool) error {
	const held = `select tenant <> $2 from public.domain_holds where host = $1 and held_until > now()`
	var other bool
	if err := q.QueryRow(ctx, held, host.String(), t.Number).Scan(&other); err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return err
	}
	if other {
		return fault.New(fault.Conflict, "%s was another tenant's a short while ago and is held back", host).
			WithCode("domain_held").WithHint("it is free again after tenancy.domain_hold")
	}
	// A tenant's first domain is its primary one. The tenant's row is kept, so that no purge goes by in between: its
	// tombstone must not hold a host for good.
	const add = `insert into public.domains (host, tenant, is_primary)
select $1, t.number, not exists (select from public.domains d where d.tenant = $2 and d.is_primary)
from (select number from public.tenants where number = $2 and state <> 'purged' for key share) t
on conflict (host) do update set is_primary = domains.is_primary or excluded.is_primary where domains.tenant = excluded.tenant`
	tag, err := q.Exec(ctx, add, host.String(), t.Number)
	if err != nil {
		return err
	}
	if tag.RowsAffected() == 0 {
		var there bool
		const alive = `select exists (select from public.tenants where number = $1 and state <> 'purged')`
		if err := q.QueryRow(ctx, alive, t.Number).Scan(&there); err != nil {
			return err
		}
		if !there {
			return fault.New(fault.NotFound, "there is no tenant %q any more", t.Slug).WithCode("unknown_tenant").WithTenant(t.Slug.String())
		}
		return fault.New(fault.Conflict, "%s belongs to another tenant", host).WithCode("domain_taken")
	}
	const release = `delete from public.domain_holds where host = $1 and tenant = $2`
	if _, err := q.Exec(ctx, release, host.String(), t.Number); err != nil {
		return err
	}
	if primary {
		return SetPrimary(ctx, q, t, host)
	}
	return nil
}

// SetPrimary makes one of the tenant's hosts its canonical one. NotFound: the tenant does not have it.
func SetPrimary(ctx context.Context, q postgres.Querier, t tenant.Tenant, host tenant.Host) error {
	if err := lockDomains(ctx, q, t); err != nil {
		return err
	}
	const demote = `update public.domains set is_primary = false where tenant = $1 and is_primary and host <> $2`
	if _, err := q.Exec(ctx, demote, t.Number, host.String()); err != nil {
		return err
	}
	tag, err := q.Exec(ctx, `update public.domains set is_primary = true where tenant = $1 and host = $2`, t.Number, host.String())
	if err == nil && tag.RowsAffected() == 0 {
		return fault.New(fault.NotFound, "the tenant %s does not have the domain %s", t.Slug, host).WithCode("unknown_domain").
			WithHint("oneo domain list %s", t.Slug)
	}
	return err
}

// lockDomains serialises two who change which domain of a tenant is the primary one, or take one away: they would meet in
// the unique index, or leave the tenant without a primary domain.
func lockDomains(ctx context.Context, q postgres.Querier, t tenant.Tenant) error {
	_, err := q.Exec(ctx, `select from public.domains where tenant = $1 order by host for update`, t.Number)
	return err
}

// RemoveDomain takes a host from a tenant and holds it back for as long as hold, so that no other tenant takes over
// what bookmarks and mails point at. The primary domain stays: Conflict. So a tenant always has one.
func RemoveDomain(ctx context.Context, q postgres.Querier, t tenant.Tenant, host tenant.Host, hold time.Duration) error {
	if err := lockDomains(ctx, q, t); err != nil {
		return err
	}
	domains, err := Domains(ctx, q, t)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(domains, func(d Domain) bool { return d.Host == host })
	if i < 0 {
		return fault.New(fault.NotFound, "the tenant %s does not have the domain %s", t.Slug, host).WithCode("unknown_domain").
			WithHint("oneo domain list %s", t.Slug)
	}
	if domains[i].Primary {
		f := fault.New(fault.Conflict, "%s is the primary domain", host).WithCode("primary_domain")
		if len(domains) == 1 {
			return f.WithHint("oneo domain add %s ANOTHER --primary", t.Slug)
		}
		return f.WithHint("oneo domain primary %s %s", t.Slug, domains[1].Host)
	}
	if _, err := q.Exec(ctx, `delete from public.domains where host = $1 and tenant = $2`, host.String(), t.Number); err != nil {
		return err
	}
	if hold <= 0 {
		return nil
	}
	const keep = `insert into public.domain_holds (host, tenant, held_until) values ($1, $2, now() + $3::interval)
on conflict (host) do update set tenant = excluded.tenant, held_until = excluded.held_until`
	_, err = q.Exec(ctx, keep, host.String(), t.Number, hold)
	return err
}
