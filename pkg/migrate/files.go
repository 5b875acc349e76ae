package migrate

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// File is one migration: a step up, and a step down where one is delivered.
type File struct {
	Version  int
	Name     string // without number and ending
	Up       string
	Down     string // empty when there is none
	Checksum [sha256.Size]byte
}

// String is the name by which people know the file: 0002_pipelines.
func (f File) String() string { return fmt.Sprintf("%04d_%s", f.Version, f.Name) }

const codeControl = "transaction_control"

var fileName = regexp.MustCompile(`^(\d{4,9})_([a-z0-9_]+)\.(up|down)\.sql$`)

// Load reads the migrations of one folder. Versions count from 1 without a gap; the fault is Invalid and names the
// file when a number is missing or stands twice, when a step down has no step up, when a file is not named like a
// migration, or when it begins or ends a transaction.
func Load(fsys fs.FS, dir string) ([]File, error) {
	entries, err := fs.ReadDir(fsys, dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.Wrap(err, fault.Invalid, "the folder of migrations %s does not exist", dir).WithCode("no_migrations")
		}
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	bad := func(format string, args ...any) error {
		return fault.New(fault.Invalid, "migrations in "+dir+": "+format, args...).WithCode("bad_migrations").
			WithHint("name them 0001_first.up.sql, 0002_second.up.sql and so on, with NNNN_name.down.sql where a step can be taken back")
	}
	byVersion := map[int]*File{}
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".sql") {
			continue
		}
		m := fileName.FindStringSubmatch(e.Name())
		if m == nil {
			return nil, bad("%s is not named like a migration", e.Name())
		}
		version, err := strconv.Atoi(m[1])
		if err != nil || version < 1 {
			return nil, bad("%s has no version above 0", e.Name())
		}
		body, err := fs.ReadFile(fsys, path.Join(dir, e.Name()))
		if err != nil {
			return nil, fmt.Errorf("read migration: %w", err)
		}
		f := byVersion[version]
		if f == nil {
			f = &File{Version: version, Name: m[2]}
			byVersion[version] = f
		}
		if f.Name != m[2] {
			return nil, bad("version %d stands twice: %s and %s", version, f.Name, m[2])
		}
		text := &f.Up
		if m[3] == "down" {
			text = &f.Down
		}
		if *text != "" {
			return nil, bad("version %d stands twice: %s", version, e.Name())
		}
		if strings.TrimSpace(string(body)) == "" {
			return nil, bad("%s is empty", e.Name())
		}
		*text = string(body)
		if words, line, found := controlIn(*text); found {
			return nil, fault.New(fault.Invalid, "migrations in %s: %s, line %d: %s is transaction control", dir, e.Name(), line, words).
				WithCode(codeControl).WithHint("leave it out: each migration is one transaction already, together with its ledger row")
		}
	}
	files := make([]File, 0, len(byVersion))
	for _, f := range byVersion {
		if f.Up == "" {
			return nil, bad("%s has a step down and no step up", f)
		}
		f.Checksum = sha256.Sum256([]byte(f.Up))
		files = append(files, *f)
	}
	slices.SortFunc(files, func(a, b File) int { return a.Version - b.Version })
	for i, f := range files {
		if f.Version != i+1 {
			return nil, bad("version %d is missing before %s", i+1, f)
		}
	}
	return files, nil
}
