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

// Kind is how a step is carried out.
type Kind string

const (
	// Transactional is SQL that runs in one transaction with the steps beside it: NNNN_name.up.sql.
	Transactional Kind = "transactional"
	// NoTransaction is SQL whose statements run one by one: NNNN_name.up.sql with `-- oneo: no-transaction`.
	NoTransaction Kind = "no-transaction"
	// Data is a statement, or a function, that is repeated until it changes no row: NNNN_name.data.sql.
	Data Kind = "data"
	// Go is a function that runs in one transaction with the steps beside it.
	Go Kind = "go"
)

const (
	// DefaultBatch is how many rows a batch of a data migration changes when nothing else is said.
	DefaultBatch = 1000
	maxBatch     = 1_000_000
)

// File is one migration: a step up, and a step down where one is delivered.
type File struct {
	Version int
	Name    string // without number and ending
	Kind    Kind
	// Breaking: a binary that does not know this version must not serve a tenant that has it.
	Breaking bool
	// Beside: a data migration whose batches run after the schema migrations, with the later ones done already.
	Beside   bool
	Batch    int    // rows; of a data migration
	Up       string // of a data migration its statement
	Down     string // empty when there is none
	Checksum [sha256.Size]byte

	code   *Func   // instead of Up and Down
	shapes []shape // of a file without a transaction, one for each statement
	steps  []statement
	sized  bool // Up takes the size of a batch as $1
	lasts  bool // Up or Down may leave something behind in its session
}

// String is the name by which people know the file: 0002_pipelines.
func (f File) String() string { return fmt.Sprintf("%04d_%s", f.Version, f.Name) }

// Reversible reports whether the step can be taken back.
func (f File) Reversible() bool { return f.Down != "" || f.code != nil && f.code.Down != nil }

// OnlyIndexes reports whether the step is a file without a transaction that makes, drops and tends indexes and does
// nothing else: what the tables hold is the same before and after it.
func (f File) OnlyIndexes() bool {
	return f.Kind == NoTransaction && !slices.ContainsFunc(f.shapes, func(s shape) bool { return s.form == ordinary || s.form == detach })
}

// alone reports whether the step cannot be part of a transaction with others.
func (f File) alone() bool { return f.Kind == NoTransaction || f.Kind == Data && !f.Beside }

const codeControl = "transaction_control"

var (
	fileName  = regexp.MustCompile(`^(\d{4,9})_([a-z0-9_]+)\.(up|down|data)\.sql$`)
	gooseName = regexp.MustCompile(`^(\d{4,9})_([a-z0-9_]+)\.sql$`)
	stampName = regexp.MustCompile(`^\d{10,}_.*\.sql$`)
)

const nameHint = "name them 0001_first.up.sql, 0002_second.up.sql and so on, with NNNN_name.down.sql where a step can be taken back, and NNNN_name.data.sql for a data migration"

// Load reads the migrations of one folder. Versions count from 1 without a gap; the fault is Invalid and names the
// file, and the line where there is one, when a number is missing or stands twice, when a step down has no step up,
// when a file is not named like a migration, when it begins or ends a transaction, when a directive is unknown or
// contradicts another, or when a statement cannot be run as its file demands.
//
// A file NNNN_name.sql is read as goose reads it: with its steps up and down behind `-- +goose Up` and `-- +goose Down`.
func Load(fsys fs.FS, dir string) ([]File, error) {
	byVersion, err := read(fsys, dir)
	if err != nil {
		return nil, err
	}
	return ordered(dir, byVersion)
}

func badFiles(dir, format string, args ...any) *fault.Fault {
	return fault.New(fault.Invalid, "migrations in "+dir+": "+format, args...).WithCode("bad_migrations").WithHint(nameHint)
}

// ordered checks that versions count from 1 without a gap.
func ordered(dir string, byVersion map[int]*File) ([]File, error) {
	files := make([]File, 0, len(byVersion))
	for _, f := range byVersion {
		if f.Up == "" && f.code == nil {
			return nil, badFiles(dir, "%s has a step down and no step up", f)
		}
		files = append(files, *f)
	}
	slices.SortFunc(files, func(a, b File) int { return a.Version - b.Version })
	for i, f := range files {
		if f.Version != i+1 {
			return nil, badFiles(dir, "version %d is missing before %s", i+1, f)
		}
	}
	return files, nil
}

func read(fsys fs.FS, dir string) (map[int]*File, error) {
	entries, err := fs.ReadDir(fsys, dir)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fault.Wrap(err, fault.Invalid, "the folder of migrations %s does not exist", dir).WithCode("no_migrations")
		}
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	byVersion := map[int]*File{}
	for _, e := range entries {
		if e.IsDir() || !strings.HasSuffix(e.Name(), ".sql") || e.Name() == NeutralizeFile {
			continue
		}
		part := "goose"
		m := fileName.FindStringSubmatch(e.Name())
		if m != nil {
			part = m[3]
		} else if m = gooseName.FindStringSubmatch(e.Name()); m == nil {
			bad := badFiles(dir, "%s is not named like a migration", e.Name())
			if stampName.MatchString(e.Name()) {
				return nil, bad.WithHint("versions are numbers without a gap, not times: `goose fix` renumbers goose's files; then give the numbers four digits or more")
			}
			return nil, bad
		}
		version, err := strconv.Atoi(m[1])
		if err != nil || version < 1 {
			return nil, badFiles(dir, "%s has no version above 0", e.Name())
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
			return nil, badFiles(dir, "version %d stands twice: %s and %s", version, f, m[2])
		}
		p := parser{dir: dir, file: e.Name(), f: f}
		if strings.TrimSpace(string(body)) == "" {
			return nil, badFiles(dir, "%s is empty", e.Name())
		}
		if err := p.read(part, string(body)); err != nil {
			return nil, err
		}
	}
	return byVersion, nil
}

// parser reads the texts of one file into a step.
type parser struct {
	dir, file string
	f         *File
}

func (p parser) bad(line int, format string, args ...any) *fault.Fault {
	where := ""
	if line > 0 {
		where = fmt.Sprintf(", line %d", line)
	}
	return fault.New(fault.Invalid, "migrations in %s: %s%s: %s", p.dir, p.file, where, fmt.Sprintf(format, args...)).WithCode("bad_migrations")
}

func (p parser) read(part, text string) error {
	switch part {
	case "up":
		d, err := p.directives(text)
		if err != nil {
			return err
		}
		if d.batch != 0 || d.beside {
			return p.bad(0, "batch and beside are for data migrations").WithHint("name it %s.data.sql", p.f)
		}
		return p.up(text, d)
	case "down":
		d, err := p.directives(text)
		if err != nil {
			return err
		}
		if d != (directives{}) {
			return p.bad(0, "a step down takes no directive: all steps down are one transaction")
		}
		return p.down(text)
	case "data":
		d, err := p.directives(text)
		if err != nil {
			return err
		}
		return p.data(text, d)
	}
	return p.goose(text)
}

// once refuses a second text for the same part of a step.
func (p parser) once(text string) error {
	if text != "" {
		return badFiles(p.dir, "version %d stands twice: %s", p.f.Version, p.file)
	}
	return nil
}

// sound refuses what no text of a migration may hold.
func (p parser) sound(text string) error {
	if words, line, found := controlIn(text); found {
		return p.bad(line, "%s is transaction control", words).WithCode(codeControl).
			WithHint("leave it out: oneo begins and ends the transactions, together with the ledger row")
	}
	if _, open := split(text); open > 0 {
		return p.bad(open, "a quote or comment does not end")
	}
	return nil
}

// ungatedHint says how to write a breaking step that cannot be one transaction.
const ungatedHint = "put the line into a transactional file of its own before this one, NNNN_name.up.sql, whose statement may be `select 1`: from then on older binaries refuse the tenant"

// ungated refuses a breaking step that is more than one transaction: nothing keeps requests away between them, and older
// binaries would only be told at its end.
func (p parser) ungated(what string) error {
	return p.bad(0, "%s cannot be breaking: it cannot keep the tenant's requests away while it runs", what).WithHint("%s", ungatedHint)
}

func (p parser) up(text string, d directives) error {
	if err := p.once(p.f.Up); err != nil {
		return err
	}
	if err := p.sound(text); err != nil {
		return err
	}
	p.f.Up, p.f.Breaking, p.f.Kind = text, d.breaking, Transactional
	p.f.Checksum = sha256.Sum256([]byte(text))
	p.f.steps = statementsOf(text)
	p.f.lasts = p.f.lasts || lasts(text)
	if !d.noTransaction {
		return nil
	}
	p.f.Kind = NoTransaction
	if d.breaking {
		return p.ungated("a file without a transaction")
	}
	if len(p.f.steps) == 0 {
		return p.bad(0, "it holds no statement")
	}
	for _, s := range p.f.steps {
		sh, err := shapeOf(s.text)
		if err != nil {
			return p.bad(s.line, "this statement cannot be resumed: %s", err)
		}
		p.f.shapes = append(p.f.shapes, sh)
	}
	return nil
}

func (p parser) down(text string) error {
	if err := p.once(p.f.Down); err != nil {
		return err
	}
	p.f.Down = text
	p.f.lasts = p.f.lasts || lasts(text)
	return p.sound(text)
}

func (p parser) data(text string, d directives) error {
	if err := p.once(p.f.Up); err != nil {
		return err
	}
	if err := p.sound(text); err != nil {
		return err
	}
	switch {
	case d.noTransaction:
		return p.bad(0, "no-transaction contradicts a data migration, each of whose batches is a transaction")
	case d.breaking:
		return p.ungated("a data migration")
	}
	p.f.steps = statementsOf(text)
	if len(p.f.steps) != 1 {
		return p.bad(0, "a data migration is one statement, not %d", len(p.f.steps))
	}
	sized, err := dataShape(p.f.steps[0].text)
	if err != nil {
		return p.bad(p.f.steps[0].line, "a data migration's statement: %s", err)
	}
	if d.batch != 0 && !sized {
		return p.bad(0, "it says batch %d and its statement takes no $1", d.batch).WithHint("write limit $1, or leave the directive out")
	}
	if d.batch == 0 {
		d.batch = DefaultBatch
	}
	p.f.Up, p.f.Kind, p.f.Beside, p.f.Batch, p.f.sized = text, Data, d.beside, d.batch, sized
	p.f.Checksum = sha256.Sum256([]byte(text))
	return nil
}

// statementsOf are the statements of a text without the blank ones.
func statementsOf(text string) []statement {
	all, _ := split(text)
	return slices.DeleteFunc(all, func(s statement) bool { return s.blank })
}

// directives are what the comment lines at the top of a file say.
type directives struct {
	noTransaction, breaking, beside bool
	batch                           int
}

var (
	directive       = regexp.MustCompile(`^--\s*oneo:\s*(.*?)\s*$`)
	knownDirectives = []string{"no-transaction", "breaking", "batch", "beside"}
)

// directiveIn is what a line says to the engine. What it allows the linter may stand above any statement, and the linter
// checks it.
func directiveIn(line string) (word, value string, found bool) {
	m := directive.FindStringSubmatch(line)
	if m == nil {
		return "", "", false
	}
	word, value, _ = strings.Cut(m[1], " ")
	return word, strings.TrimSpace(value), word != "allow"
}

func (p parser) directives(text string) (d directives, err error) {
	seen := map[string]bool{}
	rest, line := text, 0
	for rest != "" {
		l, after, _ := strings.Cut(rest, "\n")
		l = strings.TrimSpace(l)
		if l != "" && !strings.HasPrefix(l, "--") {
			break
		}
		rest = after
		line++
		word, value, found := directiveIn(l)
		if !found {
			continue
		}
		if seen[word] {
			return d, p.bad(line, "the directive %s stands twice", word)
		}
		seen[word] = true
		switch {
		case word == "batch":
			if d.batch, err = strconv.Atoi(value); err != nil || d.batch < 1 || d.batch > maxBatch {
				return d, p.bad(line, "batch %s: it must be a number from 1 to %d", value, maxBatch)
			}
			continue
		case word == "no-transaction":
			d.noTransaction = true
		case word == "breaking":
			d.breaking = true
		case word == "beside":
			d.beside = true
		default:
			bad := p.bad(line, "there is no directive %q", word).WithHint("they are %s", strings.Join(knownDirectives, ", "))
			if near := fault.Nearest(word, knownDirectives, 1); len(near) > 0 {
				bad = bad.WithHint("did you mean -- oneo: %s?", near[0])
			}
			return d, bad
		}
		if value != "" {
			return d, p.bad(line, "the directive %s takes no value", word)
		}
	}
	// Further down it would be overlooked by whoever reads the file, and by oneo.
	for i := 0; i < len(rest); {
		t := next(rest, i)
		i = t.end
		if t.kind != space {
			continue
		}
		if _, _, found := directiveIn(strings.TrimRight(rest[t.start:t.end], "\r\n")); found {
			return d, p.bad(line+lineAt(rest, t.start), "a directive stands below the first statement").
				WithHint("directives are comment lines at the top of the file")
		}
	}
	return d, nil
}

var gooseUp = regexp.MustCompile(`(?im)^\s*--\s*\+goose\s+up\s*$`)

var gooseLine = regexp.MustCompile(`(?i)^--\s*\+goose\s+(.*?)\s*$`)

// goose reads a file that holds both steps. Lines keep their numbers: what does not belong to a step is left blank.
func (p parser) goose(text string) error {
	bad := func(line int, format string, args ...any) error {
		return p.bad(line, format, args...).WithHint("a file of goose has -- +goose Up, its statements, and where it can be taken back -- +goose Down")
	}
	if !gooseUp.MatchString(text) {
		return badFiles(p.dir, "%s is not named like a migration, and is no file of goose: it has no line -- +goose Up", p.file)
	}
	var d directives
	var up, down strings.Builder
	section, inStatement := "", 0
	for i, l := range strings.SplitAfter(text, "\n") {
		m := gooseLine.FindStringSubmatch(strings.TrimSpace(l))
		if m != nil {
			switch what := strings.ToLower(m[1]); {
			case what == "up" && section == "" || what == "down" && section == "up":
				if inStatement > 0 {
					return bad(inStatement, "StatementBegin without StatementEnd")
				}
				section = what
			case what == "statementbegin" && inStatement == 0 && section != "":
				inStatement = i + 1
			case what == "statementend" && inStatement > 0:
				inStatement = 0
			case what == "no transaction":
				d.noTransaction = true
			default:
				return bad(i+1, "+goose %s is not understood here", m[1])
			}
		}
		switch section {
		case "up":
			up.WriteString(l)
			down.WriteString("\n")
		case "down":
			down.WriteString(l)
		default: // comments, and oneo's own directives
			if s := strings.TrimSpace(l); s != "" && !strings.HasPrefix(s, "--") {
				return bad(i+1, "a statement stands before -- +goose Up")
			}
			up.WriteString(l)
			down.WriteString("\n")
		}
	}
	if inStatement > 0 {
		return bad(inStatement, "StatementBegin without StatementEnd")
	}
	own, err := p.directives(up.String())
	if err != nil {
		return err
	}
	if own.batch != 0 || own.beside {
		return p.bad(0, "batch and beside are for data migrations").WithHint("name it %s.data.sql", p.f)
	}
	own.noTransaction = own.noTransaction || d.noTransaction
	if err := p.up(up.String(), own); err != nil {
		return err
	}
	if len(statementsOf(down.String())) == 0 {
		return nil
	}
	return p.down(down.String())
}
