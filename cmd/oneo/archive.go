package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/oneo-crm/oneo/pkg/archive"
	"github.com/oneo-crm/oneo/pkg/backup"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/store"
	"github.com/oneo-crm/oneo/pkg/tenant"
	"github.com/oneo-crm/oneo/pkg/transfer"
)

type exportOptions struct {
	slug       string
	file       string
	format     string
	recipients []string
	passphrase string // file
	progress   string
}

func newTenantExportCmd(e *env) *cobra.Command {
	var o exportOptions
	cmd := &cobra.Command{
		Use: "export NAME", Short: "Write a tenant into a file",
		Long: `Write one tenant into an archive: what the registry knows of it, and every row of its tables as it was
at one moment, while its users go on working. Sessions are not in it. The file is whole or it is not there.

With --recipient it is encrypted to an age key, or to several; with --passphrase-file to a passphrase.

Only an archive can be imported and restored. For other programs there are two more formats: sql is a script that
psql loads into any database, without oneo; ndjson is a directory with one file a table, one JSON object a row, and a
manifest, or with -f - the same as a tar file.`,
		Example: "  oneo tenant export acme\n  oneo tenant export acme -f - --recipient age1... | ssh backup 'cat > acme.oneo'\n" +
			"  oneo tenant export acme --format sql -f - | psql -v ON_ERROR_STOP=1 elsewhere",
		Args: usageArgs(cobra.ExactArgs(1)), ValidArgsFunction: e.completeFirstTenant,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.slug = args[0]
			return tenantExport(cmd.Context(), e, o)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&o.file, "file", "f", "", "`FILE` to write, - for standard output; default: NAME-<time>.FORMAT here")
	f.StringVar(&o.format, "format", "oneo", "`FORMAT`: oneo, sql or ndjson")
	f.StringArrayVar(&o.recipients, "recipient", nil, "age `KEY` that may open it (age1...); repeatable")
	f.StringVar(&o.passphrase, "passphrase-file", "", "encrypt by the passphrase in a `FILE`")
	f.StringVar(&o.progress, "progress", "auto", "`FORM` of the progress: auto, json or none")
	return cmd
}

// recipients are whom an archive is encrypted to.
func recipientsOf(keys []string, passphraseFile string) ([]archive.Recipient, error) {
	var all []archive.Recipient
	for _, k := range keys {
		r, err := archive.ParseRecipient(k)
		if err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	if passphraseFile == "" {
		return all, nil
	}
	word, err := passphrase(passphraseFile)
	if err != nil {
		return nil, err
	}
	r, err := archive.PassphraseRecipient(word)
	if err != nil {
		return nil, err
	}
	if len(all) > 0 {
		return nil, fault.New(fault.Invalid, "--recipient and --passphrase-file exclude each other")
	}
	return []archive.Recipient{r}, nil
}

func passphrase(file string) (string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return "", fault.Wrap(err, fault.Invalid, "the passphrase file cannot be read")
	}
	word := strings.TrimRight(string(text), "\r\n")
	if word == "" {
		return "", fault.New(fault.Invalid, "the passphrase file is empty")
	}
	return word, nil
}

type exported struct {
	tenant string
	file   string
	size   int64
	t      archive.Trailer
	took   time.Duration
}

var exportedColumns = []column[exported]{
	{"TENANT", "tenant", func(x exported) any { return x.tenant }},
	{"FILE", "file", func(x exported) any { return x.file }},
	{"SIZE", "size_bytes", func(x exported) any { return x.size }},
	{"TABLES", "tables", func(x exported) any { return len(x.t.Tables) }},
	{"ROWS", "rows", func(x exported) any { return x.t.Rows() }},
	{"TOOK", "duration_ms", func(x exported) any { return x.took.Milliseconds() }},
}

func tenantExport(ctx context.Context, e *env, o exportOptions) error {
	to, err := recipientsOf(o.recipients, o.passphrase)
	if err != nil {
		return err
	}
	format := transfer.Format(o.format)
	if !slices.Contains([]transfer.Format{transfer.Archive, transfer.SQL, transfer.NDJSON}, format) {
		return errUsage{fault.New(fault.Invalid, "unknown format %q", o.format).WithHint("use one of oneo, sql, ndjson")}
	}
	if f, ok := e.out.(*os.File); ok && o.file == "-" && format != transfer.SQL && term.IsTerminal(int(f.Fd())) {
		return fault.New(fault.Invalid, "an archive is not written to a terminal").WithCode("terminal").WithHint("-f FILE, or send it on: oneo tenant export %s -f - | ...", o.slug)
	}
	a, err := e.open()
	if err != nil {
		return err
	}
	t, err := tenantNamed(ctx, a, o.slug)
	if err != nil {
		return err
	}
	began := time.Now()
	m, err := newMeter(e, o.progress, "exported")
	if err != nil {
		return err
	}
	x := exported{tenant: t.Slug.String(), file: o.file}
	if x.file == "" {
		x.file = t.Slug.String() + "-" + began.UTC().Format("20060102T150405Z") + "." + o.format
	}
	how := transfer.ExportOptions{Format: format, To: to, Progress: m.tell}
	write := func(w io.Writer) error {
		c := &counted{w: w}
		x.t, err = a.Transfers.Export(ctx, t, c, how)
		x.size = c.n
		return err
	}
	switch {
	case o.file == "-":
		err = write(e.out)
	case format == transfer.NDJSON && len(to) == 0:
		err = store.WriteDir(ctx, x.file, func(create func(string) (io.WriteCloser, error)) error {
			x.t, err = a.Transfers.ExportFiles(ctx, t, create, how)
			x.size = x.t.Bytes()
			return err
		})
	default:
		err = store.WriteFile(ctx, x.file, write)
	}
	m.end()
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return fault.Wrap(err, fault.Invalid, "the file %s cannot be written: %v", x.file, pe.Err).WithCode("file")
	}
	if err != nil {
		return err
	}
	x.took = time.Since(began)
	e.say("exported tenant %s: %s row(s) in %d table(s)", t.Slug, grouped(x.t.Rows()), len(x.t.Tables))
	if o.file == "-" {
		return nil
	}
	return showOne(e, x, exportedColumns)
}

type counted struct {
	w io.Writer
	n int64
}

func (c *counted) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

type keyFlags struct {
	identity, passphrase string // files
}

func (k *keyFlags) register(f *pflag.FlagSet) {
	f.StringVar(&k.identity, "identity", "", "`FILE` with the age secret key that opens it")
	f.StringVar(&k.passphrase, "passphrase-file", "", "open it by the passphrase in a `FILE`")
}

func (k keyFlags) identities() (all []archive.Identity, err error) {
	if k.identity != "" {
		text, err := os.ReadFile(k.identity)
		if err != nil {
			return nil, fault.Wrap(err, fault.Invalid, "the identity file cannot be read")
		}
		if all, err = archive.ParseIdentities(string(text)); err != nil {
			return nil, err
		}
	}
	if k.passphrase != "" {
		word, err := passphrase(k.passphrase)
		if err != nil {
			return nil, err
		}
		id, err := archive.PassphraseIdentity(word)
		if err != nil {
			return nil, err
		}
		all = append(all, id)
	}
	return all, nil
}

type importOptions struct {
	file              string
	backup            *backup.Manifest // instead of a file
	past              *pastArchive     // instead of both
	as, schema, group string
	keys              keyFlags
	customDDL         bool
	erased            string
	noDomains         bool
	maxSize           int64
	progress          string
}

func newTenantImportCmd(e *env) *cobra.Command {
	var o importOptions
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Make a tenant of an archive",
		Long: `Make a new tenant of an archive, with all its rows. FILE may be - for standard input. Nobody sees the
tenant before all of the archive has been read and checked: an import that fails or is killed leaves nothing.

An archive of an older version is migrated up. Under its own name the tenant gets its domains back, and is
suspended if it was; with --as it begins with the default domain only.`,
		Example: "  oneo tenant import acme-20261125T180000Z.oneo\n  ssh backup cat acme.oneo | oneo tenant import - --as acme-copy --identity key.txt",
		Args:    usageArgs(cobra.ExactArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.file = args[0]
			return tenantImport(cmd.Context(), e, o)
		},
	}
	o.register(cmd.Flags())
	return cmd
}

func (o *importOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.as, "as", "", "`NAME` of the tenant; default: the archive's")
	f.StringVar(&o.schema, "schema", "", "`NAME` of the schema; default: made from the tenant's")
	f.StringVar(&o.group, "group", "", "database `GROUP`; default: main")
	o.keys.register(f)
	f.BoolVar(&o.customDDL, "with-custom-ddl", false, "run the SQL that the archive holds for what is not in the migrations, as far as it keeps to the tenant's schema; of a backup all of it")
	f.StringVar(&o.erased, "erased", "", "bring the erased tenant with this `ID` back all the same")
	f.BoolVar(&o.noDomains, "without-domains", false, "leave the archive's domains out")
	f.Int64Var(&o.maxSize, "max-size", 1<<40, "refuse an archive that comes to more `BYTES` when it is unpacked")
	f.StringVar(&o.progress, "progress", "auto", "`FORM` of the progress: auto, json or none")
}

func tenantImport(ctx context.Context, e *env, o importOptions) error {
	as := transfer.ImportOptions{
		Loading: transfer.Loading{MaxBytes: o.maxSize, CustomDDL: o.customDDL, Known: o.known(), Erased: o.erased, Actor: e.actor()},
		Group:   o.group, WithoutDomains: o.noDomains,
	}
	var err error
	if o.as != "" {
		if as.Slug, err = tenant.ParseSlug(o.as); err != nil {
			return err
		}
	}
	if o.schema != "" {
		if as.Schema, err = tenant.ParseSchema(o.schema); err != nil {
			return err
		}
	}
	in, identities, err := o.open(ctx, e)
	if err != nil {
		return err
	}
	defer in.Close()
	as.Identities = identities
	a, err := e.open()
	if err != nil {
		return err
	}
	m, err := newMeter(e, o.progress, "imported")
	if err != nil {
		return err
	}
	as.Progress = m.tell
	t, trailer, err := a.Transfers.Import(ctx, in, as)
	m.end()
	if err != nil {
		return err
	}
	e.say("imported tenant %s: %s row(s) in %d table(s)", t.Slug, grouped(trailer.Rows()), len(trailer.Tables))
	return showTenant(ctx, e, a, t, "")
}

// known is the sum of the statements that a backup's manifest, which is signed, says are in its archive.
func (o importOptions) known() string {
	if o.past != nil {
		return o.past.custom
	}
	if o.backup == nil {
		return ""
	}
	return o.backup.Custom
}

// open opens what is to be read, with the keys for it: those of the flags, or the configuration's for a backup.
func (o importOptions) open(ctx context.Context, e *env) (in io.ReadCloser, ids []archive.Identity, err error) {
	if ids, err = o.keys.identities(); err != nil {
		return nil, nil, err
	}
	if o.past != nil {
		return o.past.file, ids, nil
	}
	if o.backup == nil {
		in, err = e.input(o.file)
		return in, ids, err
	}
	_, b, err := e.backups()
	if err != nil {
		return nil, nil, err
	}
	if len(ids) == 0 {
		ids = b.Identities()
	}
	in, err = b.Open(ctx, *o.backup)
	return in, ids, err
}

// input opens a file that is named as an argument; - is standard input.
func (e *env) input(name string) (io.ReadCloser, error) {
	if name == "-" {
		if e.terminal {
			return nil, fault.New(fault.Invalid, "nothing comes from standard input").WithHint("name a file, or send one: ... | oneo tenant import -")
		}
		return io.NopCloser(e.in), nil
	}
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(err, fault.NotFound, "there is no file %s", name).WithCode("file_not_found")
	}
	if err != nil {
		return nil, fault.Wrap(err, fault.Invalid, "the file %s cannot be read", name).WithCode("file")
	}
	return f, nil
}
