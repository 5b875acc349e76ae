package transfer

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/structure"
)

// script writes a tenant as SQL that psql loads into a database where there is no oneo: one transaction that makes the
// schema, copies the rows, and makes then what would have been in their way. Without its end it does nothing.
type script struct {
	w       *bufio.Writer
	checker *structure.Checker

	schema   structure.Schema
	after    []structure.Step
	comments []string
	rows     *tally
	sums     []archive.Sum
}

func newScript(w io.Writer, c *structure.Checker) *script {
	return &script{w: bufio.NewWriterSize(w, 64<<10), checker: c}
}

// What stands at the head of a script. The first line keeps psql from taking rows for commands when a COPY was refused.
const scriptHead = `\set ON_ERROR_STOP on
begin;
set local client_encoding to utf8;
set local standard_conforming_strings to on;
set local datestyle to 'ISO, YMD';
set local intervalstyle to postgres;
set local timezone to utc;
set local lc_monetary to 'C';
set local xmloption to content;
set local row_security to off;
set local check_function_bodies to off;
set local client_min_messages to warning;
`

func (s *script) begin(ctx context.Context, from source) error {
	s.schema = from.at
	made, err := s.checker.Script(ctx, from.header.Group, from.have)
	if err != nil {
		return err
	}
	s.after = made.After
	if s.comments, err = commentsOf(ctx, from.q, s.schema.Name); err != nil {
		return err
	}
	extensions, err := extensionsOf(ctx, from.q)
	if err != nil {
		return err
	}
	h, schema := from.header, postgres.Quote(s.schema.Name)
	fmt.Fprintf(s.w, "-- The tenant %s as it was at %s, at version %d; written by oneo %s from PostgreSQL %d.\n-- Load it into a database that has no schema %s: psql -v ON_ERROR_STOP=1 -f FILE\n\n",
		h.Slug, h.Made.Format("2006-01-02 15:04:05Z"), h.Version(), strings.Join(strings.Fields(h.Oneo), " "), major(h.Postgres), schema)
	fmt.Fprintf(s.w, "%screate schema %s;\n", scriptHead, schema)
	if len(extensions) > 0 {
		fmt.Fprintf(s.w, "create schema if not exists ext;\n")
	}
	for _, e := range extensions {
		fmt.Fprintf(s.w, "create extension if not exists %s with schema ext;\n", postgres.Quote(e))
	}
	fmt.Fprintf(s.w, "set local search_path to %s, ext, pg_temp;\n\n", schema)
	s.steps(made.Before)
	return s.w.Flush()
}

func (s *script) steps(steps []structure.Step) {
	for _, step := range steps {
		fmt.Fprintf(s.w, "%s;\n", strings.TrimRight(step.On(s.schema, ""), " \n;"))
	}
}

func (s *script) table(t table) (io.Writer, string, error) {
	read := copyOf(s.schema.Name, t.name, t.columns)
	fmt.Fprintf(s.w, "\n%s from stdin;\n", read)
	s.rows = newTally(s.w, t.name)
	return s.rows, read, nil
}

func (s *script) endTable(rows int64) error {
	s.sums = append(s.sums, s.rows.of(rows))
	_, err := s.w.WriteString("\\.\n")
	return err
}

func (s *script) end(sequences []archive.Sequence) (archive.Trailer, error) {
	fmt.Fprint(s.w, "\n")
	for _, q := range sequences {
		name := strings.ReplaceAll(postgres.Quote(s.schema.Name)+"."+postgres.Quote(q.Name), "'", "''")
		fmt.Fprintf(s.w, "select pg_catalog.setval('%s', %d, %t);\n", name, q.Last, q.Called)
	}
	fmt.Fprint(s.w, "\n")
	s.steps(s.after)
	for _, c := range s.comments {
		fmt.Fprintf(s.w, "%s;\n", c)
	}
	fmt.Fprint(s.w, "commit;\n")
	return archive.Trailer{Tables: s.sums, Sequences: sequences}, s.w.Flush()
}

func (s *script) leave() {}

// extensionsOf lists the extensions that a tenant may use.
func extensionsOf(ctx context.Context, q postgres.Querier) ([]string, error) {
	const query = `select extname::text from pg_catalog.pg_extension
where extnamespace = (select oid from pg_catalog.pg_namespace where nspname = 'ext') order by extname`
	rows, err := q.Query(ctx, query)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// commentsOf reads the comments on what is in a schema, as statements. What PostgreSQL names by itself has none.
func commentsOf(ctx context.Context, q postgres.Querier, schema string) ([]string, error) {
	const query = `with s as (select oid, nspname from pg_catalog.pg_namespace where nspname = $1),
r as (select c.oid, c.relname, c.relkind, c.relispartition from pg_catalog.pg_class c join s on c.relnamespace = s.oid),
-- by catalog, as pg_description has it: what is commented, and how a comment names it
o (class, oid, sub, what) as (
	select 'pg_namespace', oid, 0, pg_catalog.format('schema %I', nspname) from s
	union all select 'pg_class', oid, 0, pg_catalog.format('%s %I', case relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence'
		when 'i' then 'index' when 'I' then 'index' when 'c' then 'type' else 'table' end, relname) from r where not (relispartition and relkind in ('i', 'I'))
	union all select 'pg_class', r.oid, a.attnum, pg_catalog.format('column %I.%I', relname, attname) from r
		join pg_catalog.pg_attribute a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped where relkind in ('r', 'p', 'v', 'm', 'c')
	union all select 'pg_constraint', k.oid, 0, pg_catalog.format('constraint %I on %I', conname, relname) from r
		join pg_catalog.pg_constraint k on k.conrelid = r.oid and k.conparentid = 0 and k.conislocal and k.contype in ('c', 'f', 'p', 'u', 'x')
	union all select 'pg_constraint', k.oid, 0, pg_catalog.format('constraint %I on domain %I', conname, typname) from s
		join pg_catalog.pg_type y on y.typnamespace = s.oid join pg_catalog.pg_constraint k on k.contypid = y.oid and k.contype = 'c'
	union all select 'pg_trigger', g.oid, 0, pg_catalog.format('trigger %I on %I', tgname, relname) from r
		join pg_catalog.pg_trigger g on g.tgrelid = r.oid and not g.tgisinternal and g.tgparentid = 0
	union all select 'pg_rewrite', w.oid, 0, pg_catalog.format('rule %I on %I', rulename, relname) from r
		join pg_catalog.pg_rewrite w on w.ev_class = r.oid and w.rulename <> '_RETURN'
	union all select 'pg_policy', p.oid, 0, pg_catalog.format('policy %I on %I', polname, relname) from r
		join pg_catalog.pg_policy p on p.polrelid = r.oid and p.polroles = '{0}'
	union all select 'pg_statistic_ext', x.oid, 0, pg_catalog.format('statistics %I', stxname) from s join pg_catalog.pg_statistic_ext x on x.stxnamespace = s.oid
	union all select 'pg_proc', p.oid, 0, pg_catalog.format('%s %I(%s)', case prokind when 'p' then 'procedure' else 'function' end, proname,
		pg_catalog.pg_get_function_identity_arguments(p.oid)) from s join pg_catalog.pg_proc p on p.pronamespace = s.oid
	union all select 'pg_type', y.oid, 0, pg_catalog.format('%s %I', case typtype when 'd' then 'domain' else 'type' end, typname) from s
		join pg_catalog.pg_type y on y.typnamespace = s.oid and (y.typtype in ('e', 'd', 'r'))
)
select pg_catalog.format('comment on %s is %L', what, d.description) from o
join pg_catalog.pg_description d on d.classoid = ('pg_catalog.' || o.class)::pg_catalog.regclass and d.objoid = o.oid and d.objsubid = o.sub order by 1`
	rows, err := q.Query(ctx, query, schema)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
