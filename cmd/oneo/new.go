package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/oneo-crm/oneo/pkg/fault"
)

type newOptions struct {
	name          string
	shared        bool
	data          bool
	noTransaction bool
}

func newMigrateNewCmd(e *env) *cobra.Command {
	var o newOptions
	cmd := &cobra.Command{
		Use: "new NAME", Short: "Make the files of the next migration",
		Long: `Make NNNN_NAME.up.sql and NNNN_NAME.down.sql with the next number in schemas.dir, or NNNN_NAME.data.sql
with --data. With --shared, NNNN_NAME.up.sql in schemas/shared of oneo's own source, where the shared
schema's migrations are; those are never taken back. Nothing is overwritten.

The files hold no statement yet: oneo migrate lint refuses them until they do.`,
		Example: "  oneo migrate new add_invoices --schemas ./migrations\n  oneo migrate new index_invoices --no-transaction\n  oneo migrate new fill_totals --data",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(_ *cobra.Command, args []string) error {
			o.name = args[0]
			return migrateNew(e, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.shared, "shared", false, "of the shared schema, in schemas/shared of oneo's source")
	f.BoolVar(&o.data, "data", false, "a statement that is repeated until it changes no row")
	f.BoolVar(&o.noTransaction, "no-transaction", false, "statements that run one by one, as create index concurrently must")
	return cmd
}

// newFile is a file that was made.
type newFile struct{ path string }

var newFileColumns = []column[newFile]{{"PATH", "path", func(f newFile) any { return f.path }}}

var migrationName = regexp.MustCompile(`^[a-z0-9_]{1,100}$`)

func migrateNew(e *env, o newOptions) error {
	if o.data && o.noTransaction {
		return errUsage{fault.New(fault.Invalid, "--data and --no-transaction exclude each other").WithHint("each batch of a data migration is a transaction")}
	}
	if o.data && o.shared {
		return errUsage{fault.New(fault.Invalid, "--data and --shared exclude each other").WithHint("data migrations are the tenants'")}
	}
	if !migrationName.MatchString(o.name) {
		f := fault.New(fault.Invalid, "a migration cannot be named %q", o.name).WithCode("bad_name").
			WithHint("use lower-case letters, digits and _, at most 100")
		if near := strings.Trim(regexp.MustCompile(`[^a-z0-9]+`).ReplaceAllString(strings.ToLower(o.name), "_"), "_"); migrationName.MatchString(near) {
			f = f.WithHint("use lower-case letters, digits and _: %s", near)
		}
		return f
	}
	dir, err := newDir(e, o)
	if err != nil {
		return err
	}
	number, err := nextNumber(dir)
	if err != nil {
		return err
	}
	made, err := writeNew(dir, number+"_"+o.name, o)
	if err != nil {
		return err
	}
	return show(e, made, newFileColumns)
}

var numbered = regexp.MustCompile(`^(\d{4,9})_.*\.sql$`)

// nextNumber is the number behind the greatest in a folder, with as many digits. The files need not be whole yet.
func nextNumber(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "the folder %s cannot be read", dir).WithCode("no_migrations")
	}
	greatest, digits := 0, 4
	for _, e := range entries {
		if m := numbered.FindStringSubmatch(e.Name()); m != nil {
			n, err := strconv.Atoi(m[1])
			if err != nil {
				return "", err
			}
			greatest, digits = max(greatest, n), max(digits, len(m[1]))
		}
	}
	return fmt.Sprintf("%0*d", digits, greatest+1), nil
}

// newDir is the folder in which the files are to be made.
func newDir(e *env, o newOptions) (string, error) {
	if o.shared {
		dir := filepath.Join("schemas", "shared")
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			return "", fault.New(fault.Invalid, "there is no folder %s here", dir).WithCode("no_migrations").
				WithHint("the shared schema's migrations are oneo's own: run this in its source; a product's are the tenants', without --shared")
		}
		return dir, nil
	}
	c, err := e.load()
	if err != nil {
		return "", err
	}
	if c.Schemas.Dir == "" {
		return "", fault.New(fault.Invalid, "no folder of migrations is configured").WithCode("no_migrations").
			WithHint("add --schemas DIR, or set schemas.dir (ONEO_SCHEMAS_DIR); the embedded migrations are part of the binary")
	}
	if st, err := os.Stat(c.Schemas.Dir); err != nil || !st.IsDir() {
		return "", fault.New(fault.Invalid, "schemas.dir: there is no folder %s", c.Schemas.Dir).WithCode("no_migrations").WithHint("mkdir -p %s", c.Schemas.Dir)
	}
	return c.Schemas.Dir, nil
}

// writeNew makes the files of a migration, or none of them.
func writeNew(dir, name string, o newOptions) (made []newFile, err error) {
	defer func() {
		if err != nil {
			for _, f := range made {
				err = errors.Join(err, os.Remove(f.path))
			}
			made = nil
		}
	}()
	const data = `-- One insert, update or delete of at most $1 rows, which is repeated until it changes none:
-- update t set x = y where id in (select id from t where x is null limit $1)
`
	up := "-- " + name + "\n"
	if o.noTransaction {
		up = "-- oneo: no-transaction\n" + up
	}
	texts := []struct{ path, text string }{{name + ".up.sql", up}}
	switch {
	case o.data:
		texts = []struct{ path, text string }{{name + ".data.sql", data}}
	case !o.shared:
		texts = append(texts, struct{ path, text string }{name + ".down.sql", "-- Takes back " + name + ". Delete this file when that cannot be done.\n"})
	}
	for _, t := range texts {
		path := filepath.Join(dir, t.path)
		file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o666)
		if errors.Is(err, fs.ErrExist) {
			return made, fault.Wrap(err, fault.Conflict, "%s is there already", path).WithCode("exists")
		}
		if err != nil {
			return made, fault.Wrap(err, fault.Invalid, "%s cannot be written", path).WithCode("unwritable")
		}
		made = append(made, newFile{path})
		_, err = file.WriteString(t.text)
		if err = errors.Join(err, file.Close()); err != nil {
			return made, fmt.Errorf("write %s: %w", path, err)
		}
	}
	return made, nil
}
