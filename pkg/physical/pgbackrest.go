package physical

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/store"
)

// PgBackRestName is how the engine of pgBackRest is configured.
const PgBackRestName = "pgbackrest"

// PgBackRestOptions is what the engine of pgBackRest needs.
type PgBackRestOptions struct {
	// Dir is the cluster's repository. It belongs to PostgreSQL's user.
	Dir string
	// URL is how the cluster is reached, past any pooler. pgBackRest itself reads the data folder, and comes through the socket.
	URL string
	// Stanza is pgBackRest's name of the cluster; empty: oneo.
	Stanza string
	// Config is the operator's own file of settings, in which the repository may lie anywhere: its first one is used. It is never
	// written. Empty: Prepare writes one into Dir, where there is none.
	Config string
	// User is the role that pgBackRest connects as; empty: the one with the name of PostgreSQL's user.
	User string
}

// PgBackRest keeps backups with pgBackRest, 2.45 or newer, on the machine of the cluster.
type PgBackRest struct {
	o       PgBackRestOptions
	own     bool // the file of settings is oneo's
	servant pgserver.Servant
}

var _ Engine = (*PgBackRest)(nil)

// NewPgBackRest checks the options. Invalid: a path that cannot stand in a shell's line.
func NewPgBackRest(o PgBackRestOptions) (*PgBackRest, error) {
	own := o.Config == ""
	if own {
		o.Config = filepath.Join(o.Dir, "pgbackrest.conf")
	}
	if o.Stanza == "" {
		o.Stanza = "oneo"
	}
	for _, p := range []string{o.Dir, o.Config} {
		if !filepath.IsAbs(p) || strings.ContainsAny(p, "'\"\\\n%$`") {
			return nil, fault.New(fault.Invalid, "%q cannot be a path for physical backups", p).WithCode("physical_dir").WithHint("give an absolute path without quotes, backslashes, percent or dollar signs")
		}
	}
	s, err := pgserver.FindServant()
	if err != nil {
		return nil, err
	}
	return &PgBackRest{o: o, own: own, servant: s}, nil
}

// Name is "pgbackrest".
func (p *PgBackRest) Name() string { return PgBackRestName }

// asked is what the running cluster says of itself.
type asked struct {
	role, database string
	segment        string  // the size of a segment of WAL
	port           int     //
	data, sockets  *string // nil: the role may not know
	super          bool    // pgBackRest's role, that is
}

func (p *PgBackRest) ask(ctx context.Context) (a asked, err error) {
	cfg, err := pgx.ParseConfig(p.o.URL)
	if err != nil {
		return a, fault.New(fault.Invalid, "the URL of the cluster cannot be read").WithCode("bad_url")
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return a, fault.Wrap(err, fault.Unavailable, "the cluster that is to be backed up cannot be reached").WithCode("unreachable")
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// The view leaves out what the role may not know.
	const about = `select current_user, pg_catalog.current_database(), pg_catalog.current_setting('wal_segment_size'), pg_catalog.current_setting('port')::int,
	(select setting from pg_catalog.pg_settings where name = 'data_directory'),
	(select pg_catalog.split_part(setting, ',', 1) from pg_catalog.pg_settings where name = 'unix_socket_directories'),
	$1 = '' or coalesce((select rolsuper from pg_catalog.pg_roles where rolname = $1), false)`
	if err := conn.QueryRow(ctx, about, p.o.User).Scan(&a.role, &a.database, &a.segment, &a.port, &a.data, &a.sockets, &a.super); err != nil {
		return a, fault.Wrap(err, fault.Unavailable, "the cluster does not say what it is")
	}
	return a, nil
}

// Plan says how the cluster comes to archive with pgBackRest. The file of settings is left out as long as the role of the URL may
// not know where the cluster lies.
func (p *PgBackRest) Plan(ctx context.Context) (Plan, error) {
	plan := Plan{
		Settings: map[string]string{
			"wal_level": "replica", "archive_mode": "on", "archive_timeout": "60s",
			"archive_command": fmt.Sprintf(`pgbackrest --config='%s' --stanza=%s archive-push "%%p"`, p.o.Config, p.o.Stanza),
		},
		Restart: []string{"archive_mode", "wal_level"},
	}
	a, err := p.ask(ctx)
	if err != nil {
		return Plan{}, err
	}
	if p.own && (a.data == nil || a.sockets == nil) {
		plan.SQL = append(plan.SQL, "grant pg_read_all_settings to "+postgres.Quote(a.role))
	}
	if !a.super {
		user := postgres.Quote(p.o.User)
		plan.SQL = append(plan.SQL, "grant pg_read_all_settings to "+user,
			"grant execute on function pg_catalog.pg_backup_start(text, boolean), pg_catalog.pg_backup_stop(boolean), pg_catalog.pg_switch_wal(), pg_catalog.pg_create_restore_point(text) to "+user)
	}
	if text, ok := p.settings(a); p.own && ok {
		plan.Files = map[string]string{p.o.Config: text}
	}
	return plan, nil
}

// settings are those of pgBackRest. Many tenants have many small files: these are bundled.
func (p *PgBackRest) settings(a asked) (text string, ok bool) {
	if a.data == nil || a.sockets == nil || *a.sockets == "" {
		return "", false
	}
	text = fmt.Sprintf(`# pgBackRest's settings for one cluster. oneo has written this file and does not write it again: it is yours to change.
[global]
repo1-path=%[1]s
repo1-bundle=y
# oneo removes backups by its own rules, and the WAL that none of the others needs.
repo1-retention-full=9999999
expire-auto=n
compress-type=zst
start-fast=y
lock-path=%[1]s/lock
log-level-file=off

[%[2]s]
pg1-path=%[3]s
pg1-port=%[4]d
pg1-socket-path=%[5]s
pg1-database=%[6]s
`, p.o.Dir, p.o.Stanza, *a.data, a.port, *a.sockets, a.database)
	if p.o.User != "" {
		text += "pg1-user=" + p.o.User + "\n"
	}
	return text, true
}

// RestoreCommand fetches WAL for the cluster in whose data folder it is run. Only 1 says that there is no such file; every other
// failure ends the recovery: what cannot be read is not the end of the WAL.
func (p *PgBackRest) RestoreCommand() string {
	return fmt.Sprintf(`pgbackrest --config='%s' --stanza=%s --pg1-path="$(pwd -P)" --no-archive-async archive-get %%f "%%p"; code=$?; [ $code -le 1 ] || code=200; exit $code`, p.o.Config, p.o.Stanza)
}

// Prepare makes the repository, and the file of settings where there is none.
func (p *PgBackRest) Prepare(ctx context.Context) error {
	a, err := p.ask(ctx)
	if err != nil {
		return err
	}
	if a.segment != "16MB" {
		return fault.New(fault.Unfit, "the cluster has segments of WAL of %s, and oneo knows those of 16MB only", a.segment).WithCode("wal_segment_size")
	}
	if p.own {
		if err := p.servant.Own(p.o.Dir); err != nil {
			return err
		}
		if err := p.writeSettings(ctx, a); err != nil {
			return err
		}
	}
	_, err = p.run(ctx, nil, "stanza-create")
	return err
}

func (p *PgBackRest) writeSettings(ctx context.Context, a asked) error {
	if _, err := os.Lstat(p.o.Config); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text, ok := p.settings(a)
	if !ok {
		return fault.New(fault.Forbidden, "%s may not know where the cluster lies", a.role).WithCode("grant").WithHint("grant pg_read_all_settings to %s", postgres.Quote(a.role))
	}
	err := store.WriteFile(ctx, p.o.Config, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
	if err != nil {
		return fmt.Errorf("write pgBackRest's settings: %w", err)
	}
	return p.servant.Chown(p.o.Config)
}

var (
	newLabel = regexp.MustCompile(`new backup label = (\S+)`)
	// fileLine is a file that was copied: its size, and how much of the whole is done.
	fileLine = regexp.MustCompile(`file .* \((?:[^()]*, )?([0-9.]+)([KMGTP]?B), ([0-9.]+)%\)`)
)

// copiedFile reads a line about a file that was copied.
func copiedFile(line string) (size, percent float64, ok bool) {
	m := fileLine.FindStringSubmatch(line)
	if m == nil {
		return 0, 0, false
	}
	size, err1 := strconv.ParseFloat(m[1], 64)
	percent, err2 := strconv.ParseFloat(m[3], 64)
	for _, unit := range "KMGTP" {
		if m[2] == "B" {
			break
		}
		size *= 1024
		if m[2][0] == byte(unit) {
			break
		}
	}
	return size, percent, err1 == nil && err2 == nil
}

// Create makes a backup. Where there is none that it could build upon, it is a full one.
func (p *PgBackRest) Create(ctx context.Context, o CreateOptions) (b Backup, err error) {
	if o.Kind == "" {
		o.Kind = Full
	}
	var label string
	var done, total float64
	_, err = p.run(ctx, func(line string) {
		if m := newLabel.FindStringSubmatch(line); m != nil {
			label = m[1]
		}
		size, percent, ok := copiedFile(line)
		if !ok || o.Report == nil {
			return
		}
		// How much the whole is, it does not say.
		if done += size; total == 0 && percent >= 1 {
			total = done * 100 / percent
		}
		if total > 0 {
			o.Report(Progress{Phase: PhaseCopy, Done: int64(total * percent / 100), Total: int64(total)})
		}
	}, "backup", "--repo=1", "--type="+string(o.Kind))
	if err != nil {
		return b, err
	}
	b, _, err = p.find(ctx, label)
	return b, err
}

// stanza is what pgBackRest says of a cluster; only what is used.
type stanza struct {
	Archive []struct {
		Database struct {
			ID int `json:"id"`
		} `json:"database"`
		ID string `json:"id"`
	} `json:"archive"`
	Backup []struct {
		Archive  struct{ Start, Stop *string } `json:"archive"`
		Database struct {
			ID   int `json:"id"`
			Repo int `json:"repo-key"`
		} `json:"database"`
		Databases []struct {
			Name string `json:"name"`
			OID  uint32 `json:"oid"`
		} `json:"database-ref"`
		Tablespaces []struct {
			Name string `json:"name"`
		} `json:"tablespace"`
		Error *bool `json:"error"`
		Info  struct {
			Size       int64 `json:"size"`
			Repository struct {
				Delta int64 `json:"delta"`
			} `json:"repository"`
		} `json:"info"`
		Label     string                     `json:"label"`
		LSN       struct{ Start, Stop *LSN } `json:"lsn"`
		Prior     string                     `json:"prior"`
		Timestamp struct{ Start, Stop int64 }
		Type      Kind `json:"type"`
	} `json:"backup"`
	DB []struct {
		ID      int    `json:"id"`
		System  uint64 `json:"system-id"`
		Version string `json:"version"`
	} `json:"db"`
	Status struct {
		Lock struct {
			Backup struct {
				Held bool `json:"held"`
			} `json:"backup"`
		} `json:"lock"`
	} `json:"status"`
	Repo []struct {
		Status struct {
			Code    int    `json:"code"`
			Message string `json:"message"`
		} `json:"status"`
	} `json:"repo"`
}

// look reads what pgBackRest says of the cluster, and with a label more of one backup.
func (p *PgBackRest) look(ctx context.Context, label string) (s stanza, err error) {
	if _, err := os.Lstat(p.o.Config); p.own && errors.Is(err, fs.ErrNotExist) {
		return s, nil // nothing yet
	}
	args := []string{"info", "--repo=1", "--output=json"}
	if label != "" {
		args = append(args, "--set="+label)
	}
	text, err := p.run(ctx, nil, args...)
	if err != nil {
		return s, err
	}
	var all []stanza
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		return s, fmt.Errorf("read what pgbackrest info says: %w", err)
	}
	if len(all) != 1 || len(all[0].Repo) != 1 {
		return s, nil // nothing yet
	}
	s = all[0]
	// All others say that there is nothing yet.
	if r := s.Repo[0].Status; r.Code == 99 {
		return s, fault.New(fault.Unavailable, "the repository of physical backups cannot be read: %s", r.Message).WithCode("physical_program")
	}
	return s, nil
}

// Info asks pgBackRest, and reads the names in its archive.
func (p *PgBackRest) Info(ctx context.Context) (Info, error) {
	s, err := p.look(ctx, "")
	if err != nil || len(s.DB) == 0 {
		return Info{}, err
	}
	info, archive, err := s.info()
	if err != nil {
		return info, err
	}
	text, err := p.run(ctx, nil, "repo-ls", "--repo=1", "--output=json", "--recurse", "archive/"+p.o.Stanza+"/"+archive)
	if err != nil {
		return info, err
	}
	segments, err := archivedSegments([]byte(text))
	if err != nil {
		return info, err
	}
	info.WAL = Stretches(segments)
	return info, nil
}

// info is all but the WAL, which lies in the folder archive.
func (s stanza) info() (info Info, archive string, err error) {
	now := s.DB[len(s.DB)-1] // those before it are of times before an upgrade of PostgreSQL
	info.System = strconv.FormatUint(now.System, 10)
	for _, a := range s.Archive {
		if a.Database.ID == now.ID {
			archive = a.ID
		}
	}
	for _, x := range s.Backup {
		b := Backup{
			Label: x.Label, Kind: x.Type, Prior: x.Prior, Bytes: x.Info.Size, Stored: x.Info.Repository.Delta,
			// Both are cut to the second, and the end may not be before the true one.
			Start: time.Unix(x.Timestamp.Start, 0).UTC(), Stop: time.Unix(x.Timestamp.Stop+1, 0).UTC(),
		}
		for _, d := range s.DB {
			if d.ID != x.Database.ID {
				continue
			}
			b.System = strconv.FormatUint(d.System, 10)
			if b.Major, err = strconv.Atoi(d.Version); err != nil {
				return info, "", fmt.Errorf("read what pgbackrest info says: %w", err)
			}
		}
		switch {
		case x.LSN.Start == nil || x.LSN.Stop == nil || x.Archive.Start == nil || len(*x.Archive.Start) != 24:
			b.Bad = "it was made without WAL"
		case x.Database.ID != now.ID:
			b.Bad = "it is of the cluster before an upgrade of PostgreSQL: pgbackrest restore brings it back as a whole"
		case x.Error != nil && *x.Error:
			b.Bad = "pages of the cluster had wrong checksums when it was made: pgbackrest info --set=" + x.Label
		}
		if x.LSN.Start != nil && x.LSN.Stop != nil && x.Archive.Start != nil && len(*x.Archive.Start) == 24 {
			b.StartLSN, b.StopLSN = *x.LSN.Start, *x.LSN.Stop
			timeline, err := strconv.ParseUint((*x.Archive.Start)[:8], 16, 32)
			if err != nil {
				return info, "", fmt.Errorf("read what pgbackrest info says: %w", err)
			}
			b.Timeline = uint32(timeline)
		}
		info.Backups = append(info.Backups, b)
	}
	return info, archive, nil
}

// archivedName is a segment in the archive: its name, and the checksum of what is in it.
var archivedName = regexp.MustCompile(`^([0-9A-F]{24})-[0-9a-f]{40}(\.[a-z0-9]+)?$`)

// archivedSegments reads a list of the files of an archive. A segment of which there are two that differ is none: pgBackRest gives
// out neither.
func archivedSegments(list []byte) (segments []Segment, err error) {
	var files map[string]struct {
		Type string `json:"type"`
		Time int64  `json:"time"`
	}
	if err := json.Unmarshal(list, &files); err != nil {
		return nil, fmt.Errorf("read what pgbackrest repo-ls says: %w", err)
	}
	twice := map[string]int{}
	for name, f := range files {
		if m := archivedName.FindStringSubmatch(path.Base(name)); m != nil && f.Type == "file" {
			twice[m[1]]++
			segments = append(segments, Segment{m[1], time.Unix(f.Time, 0).UTC()})
		}
	}
	return slices.DeleteFunc(segments, func(s Segment) bool { return twice[s.Name] > 1 }), nil
}

// find is a backup by its label.
func (p *PgBackRest) find(ctx context.Context, label string) (Backup, Info, error) {
	info, err := p.Info(ctx)
	if err != nil {
		return Backup{}, info, err
	}
	b, err := info.Find(label)
	return b, info, err
}

var (
	verdictLine = regexp.MustCompile(`^\s*backup: (\S+), status: ([^,]+)`)
	damageLine  = regexp.MustCompile(`(?:invalid checksum|file missing|invalid size) '([^']+)'|invalid result (\S+): `)
)

// Verify has pgBackRest read the whole repository: it cannot read one backup alone.
func (p *PgBackRest) Verify(ctx context.Context, label string, report func(Progress)) error {
	b, info, err := p.find(ctx, label)
	if err != nil {
		return err
	}
	if b.Bad != "" {
		return fault.New(fault.Unfit, "the physical backup %s is no good: %s", label, b.Bad).WithCode("damaged")
	}
	s := info.stretch(b)
	if s == nil {
		return fault.New(fault.Unfit, "the WAL of the physical backup %s is not there", label).WithCode("wal_missing")
	}
	if report == nil {
		report = func(Progress) {}
	}
	report(Progress{Phase: PhaseVerify, Total: b.Bytes})
	verdict := "not looked at"
	var files []string
	// Its exit code says nothing about what it has found.
	_, err = p.run(ctx, func(line string) {
		if m := verdictLine.FindStringSubmatch(line); m != nil && m[1] == label {
			verdict = m[2]
		}
		if m := damageLine.FindStringSubmatch(line); m != nil {
			files = append(files, m[1]+m[2])
		}
	}, "verify", "--repo=1", "--output=text", "--verbose", "--job-retry=1")
	if err != nil {
		return err
	}
	if verdict != "valid" {
		f := fault.New(fault.Unfit, "the physical backup %s is damaged: pgBackRest calls it %s", label, verdict).WithCode("damaged")
		if i := slices.IndexFunc(files, func(name string) bool { return archived(name) == "" }); i >= 0 {
			f.Message += ", " + files[i]
		}
		return f.WithHint("another one may reach the moment: oneo backup physical list")
	}
	first := segmentNumber(b.StartLSN.Segment(b.Timeline, SegmentSize))
	for _, name := range files {
		if segment := archived(name); segment != "" && segmentNumber(segment) >= first && segmentNumber(segment) <= segmentNumber(s.Last) {
			return fault.New(fault.Unfit, "the WAL %s is damaged", segment).WithCode("damaged").WithHint("make a new backup now: moments after this file cannot be reached from older ones")
		}
	}
	report(Progress{Phase: PhaseVerify, Done: b.Bytes, Total: b.Bytes})
	return nil
}

// archived is the segment of WAL that a file of the repository holds; empty: it is none.
func archived(name string) string {
	if m := archivedName.FindStringSubmatch(path.Base(name)); m != nil {
		return m[1]
	}
	return ""
}

// Prune has pgBackRest remove backups, and the WAL before the first one that is left. Conflict: others build upon one of them, or
// it is the last full one.
func (p *PgBackRest) Prune(ctx context.Context, labels []string) error {
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	prior := map[string]string{}
	for _, b := range info.Backups {
		prior[b.Label] = b.Prior
	}
	for _, label := range labels {
		if _, ok := prior[label]; !ok {
			return fault.New(fault.NotFound, "there is no physical backup %s", label).WithCode("backup_not_found").WithHint("oneo backup physical list")
		}
	}
	// pgBackRest removes what builds upon a backup with it.
	for _, b := range info.Backups {
		if slices.Contains(labels, b.Prior) && !slices.Contains(labels, b.Label) {
			return fault.New(fault.Conflict, "the physical backup %s builds upon %s", b.Label, b.Prior).WithCode("backup_needed").WithHint("remove both, or neither")
		}
	}
	// Whatever the operator's settings say: nothing else goes.
	keep := []string{"expire", "--repo=1", "--repo1-retention-full-type=count", "--repo1-retention-full=9999999", "--reset-repo1-retention-diff", "--repo1-retention-archive-type=full"}
	for _, label := range labels {
		if slices.Contains(labels, prior[label]) {
			continue // it goes with that
		}
		if _, err := p.run(ctx, nil, append(slices.Clone(keep), "--repo1-retention-archive=9999999", "--set="+label)...); err != nil {
			return err
		}
	}
	s, err := p.look(ctx, "")
	if err != nil {
		return err
	}
	// WAL goes by how many full backups there are. A backup that ends between the counting and the removing would make that number
	// too small; one cannot begin and end in between: pgBackRest waits for the next second.
	if s.Status.Lock.Backup.Held {
		return busy()
	}
	full := 0
	for _, b := range s.Backup {
		if b.Type == Full {
			full++
		}
	}
	if full == 0 {
		return nil
	}
	_, err = p.run(ctx, nil, append(keep, "--repo1-retention-archive="+strconv.Itoa(full))...)
	return err
}

// firstOwnOID is the first number that PostgreSQL gives to what is made after initdb.
const firstOwnOID = 16384

// Fetch has pgBackRest restore a backup, which compares each file with its checksum. Tablespaces come to lie beside dir.
func (p *PgBackRest) Fetch(ctx context.Context, b Backup, dir string, only []string, report func(Progress)) (err error) {
	s, err := p.look(ctx, b.Label)
	if err != nil {
		return err
	}
	if len(s.Backup) != 1 {
		return fault.New(fault.NotFound, "there is no physical backup %s", b.Label).WithCode("backup_not_found").WithHint("oneo backup physical list")
	}
	spaces := dir + spacesSuffix
	// The operator's settings may be for restores in place: none of them may lead out of dir.
	args := []string{
		"restore", "--repo=1", "--set=" + b.Label, "--type=none", "--pg1-path=" + dir, "--tablespace-map-all=" + spaces, "--reset-tablespace-map",
		"--no-link-all", "--reset-link-map", "--no-delta", "--reset-db-exclude", "--reset-recovery-option", "--job-retry=1",
	}
	include := included(s, only)
	if len(include) == 0 {
		args = append(args, "--reset-db-include")
	}
	for _, name := range include {
		args = append(args, "--db-include="+name)
	}
	if len(s.Backup[0].Tablespaces) > 0 {
		if err := os.Mkdir(spaces, 0o700); err != nil {
			return fmt.Errorf("make a folder for tablespaces: %w", err)
		}
		defer func() {
			if err != nil {
				_ = os.RemoveAll(spaces) // the reason is told already
			}
		}()
		if err := p.servant.Chown(spaces); err != nil {
			return err
		}
	}
	_, err = p.run(ctx, func(line string) {
		if _, percent, ok := copiedFile(line); ok && report != nil {
			report(Progress{Phase: PhaseFetch, Done: int64(float64(b.Bytes) * percent / 100), Total: b.Bytes})
		}
	}, args...)
	if err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, "recovery.signal")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// included are the databases that must be asked for so that those of only are whole; none: all. What is made after a backup comes
// with the WAL, and those of initdb are always there.
func included(s stanza, only []string) (names []string) {
	wanted := false
	for _, d := range s.Backup[0].Databases {
		wanted = wanted || slices.Contains(only, d.Name)
		// postgres is where one connects to look.
		if d.OID >= firstOwnOID && (slices.Contains(only, d.Name) || d.Name == "postgres") {
			names = append(names, d.Name)
		}
	}
	if !wanted {
		return nil
	}
	return names
}

// gentle are the commands that read or write much.
var gentle = []string{"backup", "restore", "verify"}

// run runs a command of pgBackRest, which ends with us, and returns what it says; or, for line, tells its lines while it works.
func (p *PgBackRest) run(ctx context.Context, line func(string), args ...string) (string, error) {
	program, err := exec.LookPath("pgbackrest")
	if err != nil {
		return "", fault.Wrap(err, fault.Unavailable, "pgBackRest is not installed on this machine").WithCode("no_pgbackrest").WithHint("`apt-get install pgbackrest`; for tests run scripts/setup.sh --ci")
	}
	level := "off"
	if line != nil {
		level = "detail"
	}
	words := []string{program, "--config=" + p.o.Config, "--stanza=" + p.o.Stanza, "--log-level-console=" + level, "--log-level-stderr=warn", "--no-log-timestamp"}
	if slices.Contains(gentle, args[0]) {
		words = append(pgserver.Gently(), words...)
	}
	words = append(words, args...)
	cmd := p.servant.Command(words[0], words[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, problems := &lines{each: line}, &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = out, problems
	process, err := pgserver.StartProcess(cmd, syscall.SIGTERM)
	if err != nil {
		return "", fmt.Errorf("start pgBackRest: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = process.Stop(context.WithoutCancel(ctx), 5*time.Second, syscall.SIGTERM) })
	defer stop()
	<-process.Done
	if ctx.Err() != nil {
		return "", ctx.Err()
	}
	if process.Result != nil {
		return "", p.failure(args[0], cmd.ProcessState.ExitCode(), problems.String())
	}
	return out.text.String(), nil
}

// lines tells what is written line by line, or, when nobody listens, keeps it.
type lines struct {
	each func(string)
	text bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.text.Write(p)
	for l.each != nil {
		i := bytes.IndexByte(l.text.Bytes(), '\n')
		if i < 0 {
			break
		}
		l.each(strings.TrimRight(string(l.text.Next(i+1)), "\r\n"))
	}
	return len(p), nil
}

func busy() error {
	return fault.New(fault.Locked, "a physical backup is being made or pruned").WithCode("physical_busy").WithHint("try again when it has ended")
}

var (
	errorLine = regexp.MustCompile(`^ERROR: \[(\d+)\]: (?:raised from [^:]*: )?(.*)`)
	// secret is a setting that a complaint about a line of the file of settings may show.
	secret = regexp.MustCompile(`(?i)([a-z0-9-]*(?:pass|key|secret|token)[a-z0-9-]*)\s*=\s*\S+`)
)

// failure is a fault with pgBackRest's last error.
func (p *PgBackRest) failure(command string, code int, said string) error {
	text, hints := "", ""
	mine := false
	for line := range strings.Lines(said) {
		line = strings.TrimRight(line, "\n")
		if m := errorLine.FindStringSubmatch(line); m != nil {
			// "encountered 1 error(s)": the one before it is the error.
			if mine = m[1] != "104"; mine {
				text, hints = m[2], ""
				code, _ = strconv.Atoi(m[1]) // the form holds digits only
			}
			continue
		}
		rest := strings.TrimSpace(line)
		hint, isHint := strings.CutPrefix(rest, "HINT: ")
		switch {
		case rest == line || !mine: // not of the error
			mine = false
		case isHint:
			hints = strings.TrimSpace(hints + " " + hint)
		case !strings.Contains(rest, "on retry after"):
			text += " " + rest
		}
	}
	text = secret.ReplaceAllString(text, "$1=...")
	f := fault.New(fault.Unavailable, "pgbackrest %s: %s", command, text).WithCode("physical_program")
	switch {
	case text == "":
		f.Message = fmt.Sprintf("pgbackrest %s ended with %d", command, code)
	case strings.Contains(text, "No space left on device"):
		f.Kind, f.Code = fault.Unavailable, "disk_full"
	case code == 50:
		return busy()
	case command == "stanza-create" && code == 28, code == 51, code == 44, code == 58:
		f.Kind, f.Code = fault.Conflict, "other_cluster"
		f.Message = "the repository holds backups of another cluster: " + text
		return f.WithHint("give each cluster a folder of its own: backup.physical.dir; after an upgrade of PostgreSQL: pgbackrest --config=%s --stanza=%s stanza-upgrade", p.o.Config, p.o.Stanza)
	case command == "restore" && slices.Contains([]int{26, 29, 42, 55}, code):
		f.Kind, f.Code = fault.Unfit, "damaged"
		return f.WithHint("another backup may reach the moment: oneo backup physical list")
	case command == "restore" && code == 40:
		f.Kind, f.Code = fault.Conflict, "not_empty"
		return f
	case command == "expire" && code == 75:
		f.Kind, f.Code = fault.Conflict, "backup_needed"
	case code == 55:
		f.Code = "no_repository"
		return f.WithHint("oneo backup physical setup")
	case code == 56:
		f.Code = "unreachable"
	case slices.Contains([]int{68, 82, 87}, code):
		f.Kind, f.Code = fault.Unfit, "not_archiving"
		return f.WithHint("oneo backup physical setup says what is missing. %s", hints)
	}
	return f.WithHint("%s", hints)
}
