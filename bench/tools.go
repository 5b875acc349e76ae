package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strings"
	"testing/fstest"

	gomigrate "github.com/golang-migrate/migrate/v4"
	_ "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	"github.com/golang-migrate/migrate/v4/source/iofs"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/tern/v2/migrate"
	"github.com/pressly/goose/v3"
	"golang.org/x/sync/errgroup"
)

// tool is a migration program for one schema, used as its users use it for many: a loop over the schemas, each with a
// connection of its own whose search_path is the schema, where its table of versions stands too. It runs inside this
// process, so that no start of a program is charged to it.
type tool struct {
	name  string
	table string // of versions
	file  func(version int, name, text string) (path, content string)
	up    func(ctx context.Context, owner *url.URL, schema string, files fs.FS) error
}

var tools = []tool{
	{
		name: "goose", table: "goose_db_version",
		file: func(version int, name, text string) (string, string) {
			return fmt.Sprintf("%05d_%s.sql", version, name), "-- +goose Up\n" + text
		},
		up: func(ctx context.Context, owner *url.URL, schema string, files fs.FS) error {
			db, err := sql.Open("pgx", inSchema(owner, schema))
			if err != nil {
				return err
			}
			defer db.Close()
			p, err := goose.NewProvider(goose.DialectPostgres, db, files, goose.WithLogger(goose.NopLogger()))
			if err != nil {
				return err
			}
			_, err = p.Up(ctx)
			return err
		},
	},
	{
		// Its lock has one number for the whole database: the workers wait for each other.
		name: "tern", table: "schema_version",
		file: func(version int, name, text string) (string, string) {
			return fmt.Sprintf("%03d_%s.sql", version, name), text
		},
		up: func(ctx context.Context, owner *url.URL, schema string, files fs.FS) error {
			c, err := pgx.Connect(ctx, inSchema(owner, schema))
			if err != nil {
				return err
			}
			defer c.Close(context.WithoutCancel(ctx))
			m, err := migrate.NewMigrator(ctx, c, schema+".schema_version") // its documentation asks for the schema
			if err != nil {
				return err
			}
			if err := m.LoadMigrations(files); err != nil {
				return err
			}
			return m.Migrate(ctx)
		},
	},
	{
		name: "golang-migrate", table: "schema_migrations",
		file: func(version int, name, text string) (string, string) {
			return fmt.Sprintf("%d_%s.up.sql", version, name), text
		},
		up: func(_ context.Context, owner *url.URL, schema string, files fs.FS) error {
			source, err := iofs.New(files, ".")
			if err != nil {
				return err
			}
			m, err := gomigrate.NewWithSourceInstance("iofs", source, strings.Replace(inSchema(owner, schema), "postgres", "pgx5", 1))
			if err != nil {
				return err
			}
			if err = m.Up(); errors.Is(err, gomigrate.ErrNoChange) {
				err = nil
			}
			serr, derr := m.Close()
			return errors.Join(err, serr, derr)
		},
	},
}

// inSchema is a login whose search_path is a tenant's.
func inSchema(owner *url.URL, schema string) string {
	u := *owner
	q := u.Query()
	q.Set("search_path", schema+",ext")
	u.RawQuery = q.Encode()
	return u.String()
}

func versionTables() []string {
	all := make([]string, len(tools))
	for i, t := range tools {
		all[i] = t.table
	}
	return all
}

// files are a tool's migrations: as many that do nothing as oneo's tenants have, since the tables are there, and those
// that add the columns.
func (t tool) files(base int, columns ...string) fs.FS {
	all := fstest.MapFS{}
	add := func(version int, name, text string) {
		path, content := t.file(version, name, text)
		all[path] = &fstest.MapFile{Data: []byte(content)}
	}
	for v := range base {
		add(v+1, "base", "select 1;\n")
	}
	for i, c := range columns {
		add(base+i+1, c, addColumn(c))
	}
	return all
}

// overAll brings every tenant up, jobs at a time.
func (t tool) overAll(ctx context.Context, f *fleet, files fs.FS, jobs int) error {
	owner, err := url.Parse(f.group.OwnerURL)
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(jobs)
	for _, slug := range f.slugs {
		g.Go(func() error {
			err := ctx.Err() // golang-migrate does not look
			if err == nil {
				err = t.up(ctx, owner, slug, files)
			}
			if err != nil {
				return fmt.Errorf("%s of %s: %w", t.name, slug, err)
			}
			return nil
		})
	}
	return g.Wait()
}
