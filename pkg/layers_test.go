package pkg_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/oneo-crm/oneo/"

// room is one package of the house. It may import rooms of lower layers only, never its neighbours. Tests are exempt.
type room struct {
	layer int
	// only, when given, are the rooms that it may import, instead of all below it.
	only []string
}

// house is the plan: docs/adr/0008 and the design's table of layers.
var house = map[string]room{
	"schemas": {layer: 0}, "pkg/fault": {layer: 0}, "pkg/failpoint": {layer: 0},
	"pkg/tenant": {layer: 1},
	"pkg/config": {layer: 2}, "pkg/postgres": {layer: 2}, "pkg/cache": {layer: 2}, "pkg/fleet": {layer: 2}, "pkg/pgserver": {layer: 2},
	"pkg/lint": {layer: 2}, "pkg/archive": {layer: 2}, "pkg/trace": {layer: 2}, "pkg/store": {layer: 2}, "pkg/mask": {layer: 2},
	"pkg/devstack": {layer: 3}, "pkg/physical": {layer: 3},
	"pkg/registry": {layer: 3}, "pkg/migrate": {layer: 3}, "pkg/auth": {layer: 3}, "pkg/crm": {layer: 3}, "pkg/structure": {layer: 3}, "pkg/inspect": {layer: 3},
	"pkg/provision": {layer: 4},
	"pkg/demo":      {layer: 5}, "pkg/observe": {layer: 5}, "pkg/pgtest": {layer: 5}, "pkg/snapshot": {layer: 5}, "pkg/transfer": {layer: 5},
	"pkg/rollout": {layer: 6}, "pkg/backup": {layer: 6}, "pkg/schedule": {layer: 6}, "pkg/doctor": {layer: 6},
	"pkg/server": {layer: 7, only: []string{"pkg/fault", "pkg/tenant", "pkg/fleet", "pkg/auth", "pkg/crm"}},
	"pkg/tui":    {layer: 7, only: []string{"pkg/fault", "pkg/tenant", "pkg/fleet"}},
	"pkg/app":    {layer: 8},
	"cmd/oneo":   {layer: 9},
}

// owners are the only rooms that may import a module, whose path begins so.
var owners = map[string][]string{
	"github.com/gin-gonic/":                   {"pkg/server"},
	"charm.land/":                             {"pkg/tui"},
	"github.com/charmbracelet/":               {"pkg/tui"},
	"github.com/spf13/viper":                  {"pkg/config"},
	"github.com/go-viper/":                    {"pkg/config"},
	"github.com/redis/":                       {"pkg/cache", "pkg/trace"},
	"github.com/go-redis/":                    {"pkg/cache"},
	"github.com/sony/gobreaker":               {"pkg/cache"},
	"github.com/alicebob/":                    {"pkg/devstack"},
	"github.com/jackc/pgx/v5/pgxpool":         {"pkg/postgres"},
	"github.com/riverqueue/":                  {"pkg/schedule"},
	"github.com/robfig/cron/":                 {"pkg/config"},
	"github.com/jackc/pgx/v5/pgconn/ctxwatch": {"pkg/postgres"},
	"github.com/spf13/cobra":                  {"cmd/oneo"},
	"github.com/wasilibs/":                    {"pkg/lint"},
	"github.com/pganalyze/":                   {"pkg/lint"},
	"golang.org/x/crypto/argon2":              {"pkg/auth"},
	"golang.org/x/net/idna":                   {"pkg/tenant"},
	"filippo.io/":                             {"pkg/archive"},
	"github.com/klauspost/":                   {"pkg/archive"},
	"github.com/minio/":                       {"pkg/store"},
	"github.com/prometheus/":                  {"pkg/observe"},
	"github.com/exaring/":                     {"pkg/trace"},
	"go.opentelemetry.io/":                    {"pkg/trace"},
}

// from is the lowest layer from which a module may be imported.
var from = map[string]int{"github.com/": 2, "golang.org/": 1, "gopkg.in/": 2, "filippo.io/": 2, "charm.land/": 7, "go.opentelemetry.io/": 2}

// imports are a room's imports by file, tests left out, and its package comments.
type imports struct {
	paths    map[string][]string // file -> import paths
	comments []string
}

// violations compares what was read with the plan.
func violations(read map[string]imports) []string {
	var bad []string
	say := func(format string, args ...any) { bad = append(bad, fmt.Sprintf(format, args...)) }
	for dir, im := range read {
		r, ok := house[dir]
		if !ok {
			say("%s is a room that the plan does not know: give it a layer and a sentence in docs/adr/0008", dir)
			continue
		}
		for file, paths := range im.paths {
			for _, p := range paths {
				if inner, ours := strings.CutPrefix(p, module); ours {
					target, known := house[inner]
					switch {
					case !known:
						say("%s imports %s, which the plan does not know", file, inner)
					case target.layer >= r.layer:
						say("%s (layer %d) imports %s (layer %d): only towards layer 0, never sideways", file, r.layer, inner, target.layer)
					case r.only != nil && !slices.Contains(r.only, inner):
						say("%s imports %s; %s may import %s only: declare an interface instead", file, inner, dir, strings.Join(r.only, ", "))
					}
					continue
				}
				for prefix, rooms := range owners {
					if strings.HasPrefix(p, prefix) && !slices.Contains(rooms, dir) {
						say("%s imports %s, which belongs to %s", file, p, strings.Join(rooms, ", "))
					}
				}
				for prefix, layer := range from {
					if strings.HasPrefix(p, prefix) && r.layer < layer {
						say("%s (layer %d) imports %s, which begins at layer %d", file, r.layer, p, layer)
					}
				}
			}
		}
		name := filepath.Base(dir)
		want := "Package " + name + " "
		if strings.HasPrefix(dir, "cmd/") {
			want = "Command " + name + " "
		}
		if len(im.comments) != 1 || !strings.HasPrefix(im.comments[0], want) {
			say("%s needs exactly one package comment that begins %q; it has %d: %q", dir, want, len(im.comments), im.comments)
		}
	}
	slices.Sort(bad)
	return bad
}

// readHouse parses the imports of every room, in this process: a test that asks another one passes from go test's cache.
func readHouse(t *testing.T, root string) map[string]imports {
	t.Helper()
	read := map[string]imports{}
	for _, top := range []string{"pkg", "cmd", "schemas"} {
		err := filepath.WalkDir(filepath.Join(root, top), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			src, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, src, parser.ImportsOnly|parser.ParseComments)
			if err != nil {
				return err
			}
			dir, err := filepath.Rel(root, filepath.Dir(path))
			if err != nil {
				return err
			}
			add(read, filepath.ToSlash(dir), filepath.Base(path), f)
			return nil
		})
		require.NoError(t, err)
	}
	return read
}

func add(read map[string]imports, dir, file string, f *ast.File) {
	im, ok := read[dir]
	if !ok {
		im.paths = map[string][]string{}
	}
	im.paths[dir+"/"+file] = []string{}
	for _, spec := range f.Imports {
		p, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			panic(err) // the parser read it
		}
		im.paths[dir+"/"+file] = append(im.paths[dir+"/"+file], p)
	}
	if f.Doc != nil {
		im.comments = append(im.comments, f.Doc.Text())
	}
	read[dir] = im
}

func TestTheHouseStandsAsPlanned(t *testing.T) {
	read := readHouse(t, "..")
	require.Empty(t, violations(read))
	for dir := range house {
		require.Contains(t, read, dir, "the plan has a room that is not there")
	}
}

func TestThePlanFindsWhatItForbids(t *testing.T) {
	for name, c := range map[string]struct{ dir, path, want string }{
		"upwards":          {"pkg/tenant", module + "pkg/app", "never sideways"},
		"sideways":         {"pkg/crm", module + "pkg/auth", "never sideways"},
		"past the list":    {"pkg/server", module + "pkg/postgres", "declare an interface"},
		"a foreign module": {"pkg/registry", "github.com/redis/go-redis/v9", "belongs to pkg/cache"},
		"the pool":         {"pkg/app", "github.com/jackc/pgx/v5/pgxpool", "belongs to pkg/postgres"},
		"too low":          {"pkg/fault", "github.com/google/uuid", "begins at layer 2"},
		"an unknown room":  {"pkg/util", "fmt", "does not know"},
	} {
		im := imports{paths: map[string][]string{c.dir + "/x.go": {c.path}}, comments: []string{"Package " + filepath.Base(c.dir) + " is."}}
		bad := violations(map[string]imports{c.dir: im})
		require.Len(t, bad, 1, name)
		require.Contains(t, bad[0], c.want, name)
	}
	bad := violations(map[string]imports{"pkg/crm": {comments: []string{"Package crm is.", "Package crm is twice."}}})
	require.Len(t, bad, 1)
}
