package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/lint"
	"github.com/oneo-crm/oneo/pkg/migrate"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

type lintOptions struct {
	shared  bool
	all     bool
	newOnly bool
	offline bool
}

func newMigrateLintCmd(e *env) *cobra.Command {
	var o lintOptions
	cmd := &cobra.Command{
		Use: "lint", Short: "Say what in the migrations leaves the tenant, blocks it or breaks it",
		Long: `Read migrations with PostgreSQL's own parser, without running anything, and say what leaves the
tenant's schema, holds a lock for long, breaks running binaries or never ends, and how to write it
instead. A comment above a statement allows a rule, with a reason: -- oneo: allow RULE why

With a database, the files that are not applied anywhere yet are read, and it is estimated how many
rows and bytes of how many tenants they would read or write anew. Without one, all files are read.
Warnings exit 0; errors exit 14, and stop oneo migrate.`,
		Example: "  oneo migrate lint\n  oneo migrate lint --schemas ./migrations --offline -o json", Args: usageArgs(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return migrateLint(cmd.Context(), e, o) },
	}
	f := cmd.Flags()
	f.BoolVar(&o.all, "all", false, "all files, also those that are applied")
	f.BoolVar(&o.newOnly, "new-only", false, "only files that are not applied anywhere; fails without a database")
	f.BoolVar(&o.offline, "offline", false, "ask no database: all files, and no estimate")
	f.BoolVar(&o.shared, "shared", false, "oneo's own migrations of the shared schema")
	return cmd
}

// linted is a finding with what it means for the fleet.
type linted struct {
	lint.Finding
	estimate *estimate
}

var lintColumns = []column[linted]{
	{"FILE", "file", func(l linted) any { return l.File }},
	{"LINE", "line", func(l linted) any { return l.Line }},
	{"RULE", "rule", func(l linted) any { return l.Rule }},
	{"SEVERITY", "severity", func(l linted) any { return string(l.Severity) }},
	{"MESSAGE", "message", func(l linted) any { return l.Message }},
	{"INSTEAD", "instead", func(l linted) any { return l.Instead }},
}

// lintDetails are columns too wide for a table: there the story tells them.
var lintDetails = []column[linted]{
	{"LOCKS", "locks", func(l linted) any { return l.Locks }},
	{"ESTIMATE", "estimate", func(l linted) any {
		if l.estimate == nil {
			return nil
		}
		return *l.estimate
	}},
}

func migrateLint(ctx context.Context, e *env, o lintOptions) error {
	switch {
	case o.all && o.newOnly:
		return errUsage{fault.New(fault.Invalid, "--all and --new-only exclude each other")}
	case o.offline && o.newOnly:
		return errUsage{fault.New(fault.Invalid, "--new-only asks the database, and --offline asks none")}
	}
	sets, a, err := lintSets(ctx, e, o)
	if err != nil {
		return err
	}
	var found []lint.Finding
	files := 0
	for _, s := range sets {
		earlier, checked := lintFiles(s.files[:s.applied]), lintFiles(s.files[s.applied:])
		files += len(checked)
		found = append(found, lint.Check(s.scope, earlier, checked)...)
	}
	rows := make([]linted, len(found))
	for i, f := range found {
		rows[i] = linted{Finding: f}
	}
	if files == 0 {
		e.say("nothing to read: each file is applied somewhere; --all reads them all")
	} else if err := estimates(ctx, e, a, o, rows); err != nil {
		return err
	}
	columns := lintColumns
	if e.output != "table" {
		columns = slices.Concat(lintColumns, lintDetails)
	}
	if e.output != "table" || len(rows) > 0 {
		if err := show(e, rows, columns); err != nil {
			return err
		}
	}
	stop := lintErrors(found)
	if files > 0 {
		e.say("%d file(s) read: %d error(s), %d warning(s)", files, stop, len(found)-stop)
	}
	if stop > 0 {
		return errExit{exitUnverified}
	}
	return nil
}

// lintErrors counts the findings that stop a migration.
func lintErrors(found []lint.Finding) (n int) {
	for _, f := range found {
		if f.Severity == lint.Error {
			n++
		}
	}
	return n
}

// lintSet is a set of migrations, and how many of its files are taken as applied.
type lintSet struct {
	scope   lint.Scope
	files   []migrate.File
	applied int
}

// lintSets reads the files, and asks the database which of them are applied. The app is nil when there is none to ask.
func lintSets(ctx context.Context, e *env, o lintOptions) ([]lintSet, *app.App, error) {
	c, err := e.load()
	if err != nil {
		return nil, nil, err
	}
	scopes := map[migrate.Set]lint.Scope{migrate.TenantSet: lint.Tenant}
	if o.shared {
		scopes = map[migrate.Set]lint.Scope{migrate.GroupSet: lint.Shared, migrate.SharedSet: lint.Shared}
	}
	var sets []lintSet
	var asked *app.App
	for _, set := range []migrate.Set{migrate.GroupSet, migrate.SharedSet, migrate.TenantSet} {
		scope, wanted := scopes[set]
		if !wanted {
			continue
		}
		files, err := app.Migrations(c, set)
		if err != nil {
			return nil, nil, err
		}
		s := lintSet{scope: scope, files: files}
		if !o.offline {
			a, err := e.open()
			var head int
			if err == nil {
				head, _, err = applied(ctx, a, set, len(files))
			}
			switch {
			case err == nil:
				asked = a
			case o.newOnly || !noDatabase(err):
				return nil, nil, err
			default:
				e.say("no database is asked (%s): all files are read", fault.Of(err).Message)
				o.offline = true
			}
			if !o.all {
				s.applied = min(head, len(files))
			}
		}
		sets = append(sets, s)
	}
	return sets, asked, nil
}

// noDatabase reports whether none is configured, or it cannot be reached.
func noDatabase(err error) bool {
	f := fault.Of(err)
	return f.Kind == fault.Unavailable || f.StableCode() == "no_database"
}

// applied is the newest version of a set that is applied anywhere, and whether any tenant is behind head: one query for
// each group. A database in which oneo has made nothing yet has applied none.
func applied(ctx context.Context, a *app.App, set migrate.Set, head int) (newest int, behind bool, err error) {
	const query = `select coalesce((select max(version) from public.ledger where set = $1), 0),
exists (select from public.placements where version < $2 and state in ('active', 'suspended', 'moving'))`
	for _, group := range a.DB.Groups() {
		err := a.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			var at int
			var late bool
			err := tx.QueryRow(ctx, query, string(set), head).Scan(&at, &late)
			newest, behind = max(newest, at), behind || late
			return err
		})
		if err != nil && postgres.SQLState(err) != "42P01" {
			return 0, false, err
		}
	}
	return newest, behind, nil
}

// lintPending reads the tenants' migrations that are not applied anywhere, if any tenant is behind. With nothing pending
// it costs one query for each group, and the parser is not loaded.
func lintPending(ctx context.Context, _ *env, a *app.App) ([]lint.Finding, error) {
	files := a.Migrate.Files(migrate.TenantSet)
	newest, behind, err := applied(ctx, a, migrate.TenantSet, len(files))
	if err != nil || !behind || newest >= len(files) {
		return nil, err
	}
	return lint.Check(lint.Tenant, lintFiles(files[:newest]), lintFiles(files[newest:])), nil
}

// lintFiles are migrations as the linter reads them, each step up followed by its step down. One in Go has no text.
func lintFiles(files []migrate.File) []lint.File {
	var all []lint.File
	for _, f := range files {
		kind, up, down := lint.Transactional, ".up.sql", ".down.sql"
		switch {
		case strings.Contains(f.Up, "+goose Up"):
			up, down = ".sql", ".sql"
		case f.Kind == migrate.Data:
			up = ".data.sql"
		}
		switch f.Kind {
		case migrate.NoTransaction:
			kind = lint.NoTransaction
		case migrate.Data:
			kind = lint.Data
		}
		if f.Up != "" {
			all = append(all, lint.File{Name: f.String() + up, Kind: kind, SQL: f.Up, Breaking: f.Breaking, HasDown: f.Reversible()})
		}
		if f.Down != "" {
			all = append(all, lint.File{Name: f.String() + down, Kind: lint.Down, SQL: f.Down})
		}
	}
	return all
}

// estimate is what a statement would do to a table, over all tenants. Sizes are those of the last vacuum or analyze.
type estimate struct {
	Table   string   `json:"table"`
	Tenants int      `json:"tenants"`
	Rows    int64    `json:"rows"`
	Bytes   int64    `json:"size_bytes"`
	Largest *largest `json:"largest,omitempty"`
	// Unknown are tables that were never analyzed: they count as empty.
	Unknown int `json:"unknown"`

	number int32
}

type largest struct {
	Tenant string `json:"tenant"`
	Bytes  int64  `json:"size_bytes"`
}

func (s estimate) String() string {
	text := fmt.Sprintf("%s: %s tenant(s), about %s row(s), %s in all", s.Table, grouped(int64(s.Tenants)), grouped(s.Rows), size(s.Bytes))
	if s.Largest != nil {
		text += fmt.Sprintf(", the largest %s %s", s.Largest.Tenant, size(s.Largest.Bytes))
	}
	if s.Unknown > 0 {
		text += fmt.Sprintf("; %s of them never analyzed, which count as empty", grouped(int64(s.Unknown)))
	}
	return text
}

// estimates asks what the findings mean for the fleet, and tells it: one query for each group.
func estimates(ctx context.Context, e *env, a *app.App, o lintOptions, rows []linted) error {
	var tables []string
	for _, l := range rows {
		if l.Work != lint.NoWork && l.Table != "" && !slices.Contains(tables, l.Table) {
			tables = append(tables, l.Table)
		}
	}
	if len(tables) == 0 || o.shared {
		return nil
	}
	if a == nil {
		e.say("no estimate of how many rows that is: no database was asked")
		return nil
	}
	sizes, err := tableSizes(ctx, a, tables)
	if err != nil {
		return err
	}
	told := map[string]bool{}
	for i, l := range rows {
		s := sizes[l.Table]
		if l.Work == lint.NoWork || s == nil {
			continue
		}
		rows[i].estimate = s
		if line := fmt.Sprintf("%s; %s", s, l.Locks); !told[line] {
			told[line] = true
			e.say("estimate: %s", line)
		}
	}
	return nil
}

// tableSizes are the sizes of tables over all tenants, from the catalog alone: no table is opened, and so no lock is
// waited for.
func tableSizes(ctx context.Context, a *app.App, tables []string) (map[string]*estimate, error) {
	const query = `with tables as (
    select c.relname::text as name, p.number, greatest(c.reltuples, 0)::float8 as rows, c.reltuples < 0 as unknown,
        (c.relpages + coalesce(t.relpages, 0))::int8 * current_setting('block_size')::int8 as bytes
    from public.placements p
    join pg_catalog.pg_class c on c.relnamespace = p.namespace and c.relkind in ('r', 'm') and c.relname = any ($1)
    left join pg_catalog.pg_class t on t.oid = c.reltoastrelid
    where p.state in ('active', 'suspended'))
select name, count(*)::int8, sum(rows)::int8, sum(bytes)::int8, count(*) filter (where unknown)::int8,
    (array_agg(number order by bytes desc, number))[1], max(bytes)
from tables group by name`
	sizes := map[string]*estimate{}
	for _, name := range tables {
		sizes[name] = &estimate{Table: name}
	}
	for _, group := range a.DB.Groups() {
		err := a.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
			rows, err := tx.Query(ctx, query, tables)
			if err != nil {
				return err
			}
			var name string
			var tenants, unknown int
			var tuples, bytes, most int64
			var number int32
			_, err = pgx.ForEachRow(rows, []any{&name, &tenants, &tuples, &bytes, &unknown, &number, &most}, func() error {
				s := sizes[name]
				s.Tenants, s.Rows, s.Bytes, s.Unknown = s.Tenants+tenants, s.Rows+tuples, s.Bytes+bytes, s.Unknown+unknown
				if s.Largest == nil || most > s.Largest.Bytes {
					s.Largest, s.number = &largest{Bytes: most}, number
				}
				return nil
			})
			return err
		})
		if err != nil {
			if postgres.SQLState(err) == "42P01" { // oneo has made nothing there yet
				continue
			}
			return nil, err
		}
	}
	for _, s := range sizes {
		if s.Largest == nil {
			continue
		}
		names, err := namesOf(ctx, a, []int32{s.number})
		if err != nil {
			return nil, err
		}
		s.Largest.Tenant = strings.Join(names, "")
	}
	return sizes, nil
}

// grouped is a number with its thousands apart.
func grouped(n int64) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// size is a number of bytes as people read it.
func size(bytes int64) string {
	units := []string{"B", "kB", "MB", "GB", "TB"}
	f, u := float64(bytes), 0
	for f >= 1024 && u < len(units)-1 {
		f, u = f/1024, u+1
	}
	if u == 0 || f >= 100 {
		return fmt.Sprintf("%.0f %s", f, units[u])
	}
	return strings.Replace(fmt.Sprintf("%.1f %s", f, units[u]), ".0 ", " ", 1)
}
