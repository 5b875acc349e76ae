package physical

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/postgres"
)

//go:embed scripts/archive
var archiveScript string

//go:embed scripts/restore
var restoreScript string

// FilesName is how the engine of PostgreSQL's own tools is configured.
const FilesName = "files"

// FilesOptions is what the engine of PostgreSQL's own tools needs.
type FilesOptions struct {
	// Dir is the cluster's repository: plain copies in base/, compressed WAL in wal/. It belongs to PostgreSQL's user.
	Dir string
	// URL is how the cluster is reached, past any pooler, by a role that may replicate.
	URL string
}

// Files keeps backups in a folder, with pg_basebackup, pg_verifybackup, pg_archivecleanup and an archive_command of a few lines.
type Files struct {
	o       FilesOptions
	servant pgserver.Servant
}

var _ Engine = (*Files)(nil)

// NewFiles checks the options. Invalid: the folder's name cannot stand in a shell's line.
func NewFiles(o FilesOptions) (*Files, error) {
	if !filepath.IsAbs(o.Dir) || strings.ContainsAny(o.Dir, "'\"\\\n%$`") {
		return nil, fault.New(fault.Invalid, "%q cannot be the folder of physical backups", o.Dir).WithCode("physical_dir").WithHint("give an absolute path without quotes, backslashes, percent or dollar signs")
	}
	s, err := pgserver.FindServant()
	if err != nil {
		return nil, err
	}
	return &Files{o: o, servant: s}, nil
}

// Name is "files".
func (f *Files) Name() string { return FilesName }

func (f *Files) path(parts ...string) string {
	return filepath.Join(append([]string{f.o.Dir}, parts...)...)
}

// Plan says how the cluster comes to archive into the folder, and lets itself be copied.
func (f *Files) Plan(context.Context) (Plan, error) {
	cfg, err := pgx.ParseConfig(f.o.URL)
	if err != nil {
		return Plan{}, fault.New(fault.Invalid, "the URL of the cluster cannot be read").WithCode("bad_url")
	}
	hba := "host replication " + postgres.Quote(cfg.User) + " samenet scram-sha-256"
	if strings.HasPrefix(cfg.Host, "/") {
		hba = "local replication " + postgres.Quote(cfg.User) + " scram-sha-256"
	}
	return Plan{
		HBA: hba,
		Settings: map[string]string{
			"wal_level": "replica", "archive_mode": "on", "archive_timeout": "60s",
			"archive_command": fmt.Sprintf("'%s' \"%%p\" %%f", f.path("archive")),
		},
		Restart: []string{"archive_mode", "wal_level"},
	}, nil
}

// RestoreCommand runs the script that Prepare has written.
func (f *Files) RestoreCommand() string { return fmt.Sprintf("'%s' \"%%p\" %%f", f.path("restore")) }

// whose says which cluster a repository is of.
type whose struct {
	System string `json:"system"`
	Major  int    `json:"major"`
}

// server is what must be known of the running cluster.
type server struct {
	whose
	command     string // archive_command
	archives    bool
	replica     bool
	tablespaces int
}

func (f *Files) connect(ctx context.Context) (*pgx.Conn, server, error) {
	var s server
	cfg, err := pgx.ParseConfig(f.o.URL)
	if err != nil {
		return nil, s, fault.New(fault.Invalid, "the URL of the cluster cannot be read").WithCode("bad_url")
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, s, fault.Wrap(err, fault.Unavailable, "the cluster that is to be backed up cannot be reached").WithCode("unreachable")
	}
	const about = `select (select system_identifier::text from pg_catalog.pg_control_system()), pg_catalog.current_setting('server_version_num')::int / 10000,
	coalesce(pg_catalog.current_setting('archive_command', true), ''), pg_catalog.current_setting('archive_mode') <> 'off', pg_catalog.pg_is_in_recovery(),
	(select count(*) from pg_catalog.pg_tablespace where spcname not in ('pg_default', 'pg_global'))`
	if err := conn.QueryRow(ctx, about).Scan(&s.System, &s.Major, &s.command, &s.archives, &s.replica, &s.tablespaces); err != nil {
		_ = conn.Close(ctx)
		return nil, s, fault.Wrap(err, fault.Unavailable, "the cluster does not say what it is")
	}
	return conn, s, nil
}

// Prepare makes the folder and writes the two scripts.
func (f *Files) Prepare(ctx context.Context) error {
	conn, s, err := f.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// PostgreSQL's user must come through what is ours.
	if err := os.MkdirAll(filepath.Dir(f.o.Dir), 0o711); err != nil {
		return fault.Wrap(err, fault.Forbidden, "the folder of physical backups cannot be made").WithCode("physical_dir")
	}
	for _, dir := range []string{f.o.Dir, f.path("base"), f.path("wal")} {
		if err := f.servant.Own(dir); err != nil {
			return err
		}
	}
	free, err := f.lock()
	if err != nil {
		return err
	}
	defer free()
	was, err := f.whose()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		text, err := json.Marshal(s.whose)
		if err != nil {
			return err
		}
		if err := f.write("cluster.json", append(text, '\n'), 0o600); err != nil {
			return err
		}
	case err != nil:
		return err
	case was.System != s.System:
		return fault.New(fault.Conflict, "%s holds backups of another cluster (%s, and this one is %s)", f.o.Dir, was.System, s.System).
			WithCode("other_cluster").WithHint("give each cluster a folder of its own: backup.physical.dir")
	}
	for name, text := range map[string]string{"archive": archiveScript, "restore": restoreScript} {
		if err := f.write(name, []byte(text), 0o700); err != nil {
			return err
		}
	}
	return nil
}

func (f *Files) whose() (w whose, err error) {
	text, err := os.ReadFile(f.path("cluster.json"))
	if err != nil {
		return w, err
	}
	return w, json.Unmarshal(text, &w)
}

// write puts a file of PostgreSQL's user in place, whole and on the disk.
func (f *Files) write(name string, text []byte, mode os.FileMode) (err error) {
	path := f.path(name)
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	err = errors.Join(err, file.Chmod(mode), file.Sync(), file.Close(), f.servant.Chown(path+".new"))
	if err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// lock keeps everybody else from changing the repository. Locked: somebody is at it.
func (f *Files) lock() (free func(), err error) {
	file, err := os.OpenFile(f.path("lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(err, fault.Unavailable, "there is no repository for physical backups in %s yet", f.o.Dir).WithCode("no_repository").WithHint("oneo backup physical setup")
	}
	if err := errors.Join(f.servant.Chown(f.path("lock")), syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)); err != nil {
		_ = file.Close()
		return nil, fault.Wrap(err, fault.Locked, "a physical backup is being made or pruned in %s", f.o.Dir).WithCode("physical_busy").WithHint("try again when it has ended")
	}
	return func() { _ = file.Close() }, nil
}

// labelForm is how backups are called: when they were begun, in UTC.
const labelForm = "20060102T150405Z"

// Create copies the whole cluster with pg_basebackup, and waits until the WAL that it needs is archived.
func (f *Files) Create(ctx context.Context, o CreateOptions) (b Backup, err error) {
	if o.Kind != "" && o.Kind != Full {
		return b, fault.New(fault.Invalid, "PostgreSQL's own tools make full backups only").WithCode("engine").WithHint("differential and incremental ones are made by pgBackRest: backup.physical.engine")
	}
	free, err := f.lock()
	if err != nil {
		return b, err
	}
	defer free()
	conn, s, err := f.connect(ctx)
	if err != nil {
		return b, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := f.fit(s); err != nil {
		return b, err
	}
	if err := f.sweep(); err != nil {
		return b, err
	}
	b = Backup{Kind: Full, System: s.System, Major: s.Major}
	if err := conn.QueryRow(ctx, `select pg_catalog.clock_timestamp()`).Scan(&b.Start); err != nil {
		return b, err
	}
	b.Label = b.Start.UTC().Format(labelForm)
	if _, err := os.Lstat(f.path("base", b.Label)); err == nil {
		return b, fault.New(fault.Locked, "the last backup was begun in this very second").WithCode("physical_busy").WithHint("try again")
	}
	part := f.path("base", "."+b.Label+".part")
	done := false
	defer func() {
		if !done {
			_ = os.RemoveAll(part)
		}
	}()
	cctx, giveUp := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		patiently(cctx, conn, giveUp)
	}()
	err = f.copyCluster(cctx, s.Major, part, b.Label, o.Report)
	if cause := context.Cause(cctx); err != nil && cause != nil {
		err = cause
	}
	giveUp(nil)
	<-watched
	if err != nil {
		return b, err
	}
	if err := failpoint.Hit("physical.copied"); err != nil {
		return b, err
	}
	label, err := os.ReadFile(filepath.Join(part, "backup_label"))
	if err != nil {
		return b, fmt.Errorf("read where the copy begins: %w", err)
	}
	if b.StartLSN, b.Timeline, err = beginning(string(label)); err != nil {
		return b, err
	}
	if b.Bytes, err = sizeOf(part); err != nil {
		return b, err
	}
	b.Stored = b.Bytes
	// Asked for after the copy: not before its end.
	var lsn string
	if err := conn.QueryRow(ctx, `select pg_catalog.clock_timestamp(), pg_catalog.pg_current_wal_lsn()::text`).Scan(&b.Stop, &lsn); err != nil {
		return b, err
	}
	if b.StopLSN, err = ParseLSN(lsn); err != nil {
		return b, err
	}
	if err := f.archived(ctx, conn, b); err != nil {
		return b, err
	}
	if err := os.Rename(part, f.path("base", b.Label)); err != nil {
		return b, err
	}
	done = true
	if err := syncDir(f.path("base")); err != nil {
		return b, err
	}
	if err := failpoint.Hit("physical.placed"); err != nil {
		return b, err
	}
	text, err := json.MarshalIndent(b, "", "  ")
	if err != nil {
		return b, err
	}
	return b, f.write(filepath.Join("base", b.Label+".json"), append(text, '\n'), 0o600)
}

// fit refuses a cluster whose backups would bring back nothing.
func (f *Files) fit(s server) error {
	was, err := f.whose()
	if err != nil {
		return fault.Wrap(err, fault.Unavailable, "there is no repository for physical backups in %s yet", f.o.Dir).WithCode("no_repository").WithHint("oneo backup physical setup")
	}
	switch {
	case was.System != s.System:
		return fault.New(fault.Conflict, "%s holds backups of another cluster", f.o.Dir).WithCode("other_cluster").WithHint("give each cluster a folder of its own: backup.physical.dir")
	case s.replica:
		return fault.New(fault.Unfit, "the cluster is a standby: back its primary up").WithCode("standby")
	case s.tablespaces > 0:
		return fault.New(fault.Unfit, "the cluster has tablespaces of its own, which this engine does not carry").WithCode("tablespaces").WithHint("pgBackRest does: backup.physical.engine")
	case !s.archives || s.command != "" && !strings.Contains(s.command, f.path("archive")):
		return fault.New(fault.Unfit, "the cluster does not archive its WAL into %s", f.o.Dir).WithCode("not_archiving").WithHint("oneo backup physical setup says what is missing")
	}
	return nil
}

// sweep removes what killed processes have left. The repository is locked.
func (f *Files) sweep() error {
	entries, err := os.ReadDir(f.path("base"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() {
			continue
		}
		if _, err := os.Lstat(f.path("base", name+".json")); err == nil {
			continue
		}
		if err := os.RemoveAll(f.path("base", name)); err != nil {
			return fmt.Errorf("remove a backup that was not finished: %w", err)
		}
	}
	return nil
}

// patiently watches a copy. At its end PostgreSQL waits until the WAL that it needs is archived, for ever if need be, and says why in its
// log alone.
func patiently(ctx context.Context, conn *pgx.Conn, giveUp func(error)) {
	for since := time.Now(); ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Second):
		}
		var waits bool
		const ask = `select exists (select from pg_catalog.pg_stat_progress_basebackup where phase = 'waiting for wal archiving to finish')`
		if err := conn.QueryRow(context.WithoutCancel(ctx), ask).Scan(&waits); err != nil {
			giveUp(err)
			return
		}
		if !waits {
			since = time.Now()
		}
		if time.Since(since) > archivePatience {
			giveUp(fault.New(fault.Unavailable, "the WAL of the backup was not archived within %s", archivePatience).WithCode("not_archiving").
				WithHint("PostgreSQL's log says why archive_command fails; also: select * from pg_stat_archiver"))
			return
		}
	}
}

var copied = regexp.MustCompile(`(\d+)/(\d+) kB`)

// copyCluster copies all but the WAL, which lies in the archive. (To stream it, pg_basebackup makes a process that goes on for ever when
// its parent is killed.)
func (f *Files) copyCluster(ctx context.Context, major int, dir, label string, report func(Progress)) error {
	bin, err := pgserver.FindMajor(major)
	if err != nil {
		return err
	}
	cfg, err := pgx.ParseConfig(f.o.URL)
	if err != nil {
		return fault.New(fault.Invalid, "the URL of the cluster cannot be read").WithCode("bad_url")
	}
	cmd := f.servant.Command(filepath.Join(bin, "pg_basebackup"), "--pgdata", dir, "--format", "plain", "--wal-method", "none",
		"--checkpoint", "fast", "--manifest-checksums", "CRC32C", "--label", "oneo "+label, "--progress", "--no-password", "--verbose",
		"--host", cfg.Host, "--port", strconv.Itoa(int(cfg.Port)), "--username", cfg.User)
	cmd.Env = append(os.Environ(), "PGPASSWORD="+cfg.Password, "LC_ALL=C.UTF-8")
	if cfg.TLSConfig == nil {
		cmd.Env = append(cmd.Env, "PGSSLMODE=disable")
	}
	return run(ctx, cmd, func(line string) {
		if m := copied.FindStringSubmatch(line); m != nil && report != nil {
			done, _ := strconv.ParseInt(m[1], 10, 64) // the form holds digits only
			total, _ := strconv.ParseInt(m[2], 10, 64)
			report(Progress{Phase: PhaseCopy, Done: done << 10, Total: total << 10})
		}
	})
}

// run runs a program, which ends with us, and tells the lines of its standard error. Its error is what it said last.
func run(ctx context.Context, cmd *exec.Cmd, line func(string)) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stderr = w
	p, err := pgserver.StartProcess(cmd, syscall.SIGTERM)
	_ = w.Close()
	if err != nil {
		_ = r.Close()
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = p.Stop(context.WithoutCancel(ctx), 5*time.Second, syscall.SIGTERM) })
	defer stop()
	var last []string
	var rest bytes.Buffer
	buf := make([]byte, 4096)
	for {
		n, rerr := r.Read(buf)
		for _, c := range buf[:n] {
			if c != '\n' && c != '\r' {
				rest.WriteByte(c)
				continue
			}
			if text := strings.TrimSpace(rest.String()); text != "" {
				if line != nil {
					line(text)
				}
				if !copied.MatchString(text) {
					last = append(last[max(0, len(last)-4):], text)
				}
			}
			rest.Reset()
		}
		if rerr != nil {
			if rerr != io.EOF {
				err = rerr
			}
			break
		}
	}
	_ = r.Close()
	<-p.Done
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if p.Result != nil {
		if text := strings.TrimSpace(rest.String()); text != "" {
			last = append(last, text)
		}
		return fault.New(fault.Unavailable, "%s: %s", filepath.Base(cmd.Path), strings.Join(last, "\n")).WithCode("physical_program")
	}
	return err
}

var (
	startLine    = regexp.MustCompile(`(?m)^START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) `)
	timelineLine = regexp.MustCompile(`(?m)^START TIMELINE: (\d+)`)
)

// beginning reads PostgreSQL's backup_label.
func beginning(text string) (LSN, uint32, error) {
	at, tl := startLine.FindStringSubmatch(text), timelineLine.FindStringSubmatch(text)
	if at == nil || tl == nil {
		return 0, 0, errors.New("backup_label does not say where the copy begins")
	}
	lsn, err1 := ParseLSN(at[1])
	n, err2 := strconv.ParseUint(tl[1], 10, 32)
	return lsn, uint32(n), errors.Join(err1, err2)
}

// archived waits until the WAL up to the end of a copy is in the repository.
func (f *Files) archived(ctx context.Context, conn *pgx.Conn, b Backup) error {
	if _, err := conn.Exec(ctx, `select pg_catalog.pg_switch_wal()`); err != nil {
		return fault.Wrap(err, fault.Forbidden, "PostgreSQL does not let oneo end a segment of WAL").WithCode("grant").WithHint("oneo backup physical setup says which grant is missing")
	}
	return f.await(ctx, (b.StopLSN-1).Segment(b.Timeline, SegmentSize))
}

// archivePatience is how long one segment of WAL may take to be archived.
const archivePatience = 2 * time.Minute

func (f *Files) await(ctx context.Context, segment string) error {
	for deadline := time.Now().Add(archivePatience); ; {
		if _, err := os.Stat(f.path("wal", segment+".gz")); err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fault.New(fault.Unavailable, "the WAL %s was not archived within %s", segment, archivePatience).WithCode("not_archiving").
				WithHint("PostgreSQL's log says why archive_command fails; also: select * from pg_stat_archiver")
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func sizeOf(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) { // PostgreSQL renames and removes while we look
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		st, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			n += st.Size()
		}
		return err
	})
	return n, err
}

var segmentName = regexp.MustCompile(`^[0-9A-F]{24}$`)

// Info reads the names in the folder.
func (f *Files) Info(context.Context) (info Info, err error) {
	was, err := f.whose()
	if errors.Is(err, fs.ErrNotExist) {
		return info, nil
	}
	if err != nil {
		return info, err
	}
	info.System = was.System
	metas, err := filepath.Glob(f.path("base", "*.json"))
	if err != nil {
		return info, err
	}
	for _, path := range metas {
		b := Backup{Label: strings.TrimSuffix(filepath.Base(path), ".json")}
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) { // pruned just now
			continue
		}
		if err == nil {
			err = json.Unmarshal(text, &b)
		}
		if err != nil {
			b.Bad = "its description cannot be read: " + err.Error()
		} else if _, err := os.Stat(f.path("base", b.Label, "backup_manifest")); err != nil {
			b.Bad = "its files are not there"
		}
		info.Backups = append(info.Backups, b)
	}
	slices.SortFunc(info.Backups, func(a, b Backup) int { return strings.Compare(a.Label, b.Label) })
	entries, err := os.ReadDir(f.path("wal"))
	if err != nil {
		return info, err
	}
	var segments []Segment
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".gz")
		if !ok || !segmentName.MatchString(name) {
			continue
		}
		st, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return info, err
		}
		segments = append(segments, Segment{name, st.ModTime()})
	}
	info.WAL = Stretches(segments)
	return info, nil
}

// Segment is an archived file of WAL.
type Segment struct {
	Name string
	At   time.Time // when it was archived
}

// Stretches puts segments together that follow each other on one timeline: what another timeline has there fills no gap.
func Stretches(segments []Segment) (found []Stretch) {
	slices.SortFunc(segments, func(a, b Segment) int { return strings.Compare(a.Name, b.Name) })
	for i, s := range segments {
		if i > 0 && timelineOf(s.Name) == timelineOf(segments[i-1].Name) && segmentNumber(s.Name) == segmentNumber(segments[i-1].Name)+1 {
			last := &found[len(found)-1]
			last.Last, last.Until, last.Bytes = s.Name, later(last.Until, s.At), last.Bytes+SegmentSize
			continue
		}
		found = append(found, Stretch{First: s.Name, Last: s.Name, From: s.At, Until: s.At, Bytes: SegmentSize})
	}
	return found
}

// find is a backup by its label.
func (f *Files) find(ctx context.Context, label string) (Backup, Info, error) {
	info, err := f.Info(ctx)
	if err != nil {
		return Backup{}, info, err
	}
	b, err := info.Find(label)
	return b, info, err
}

// Verify compares the copy with its manifest, and reads the WAL that follows it.
func (f *Files) Verify(ctx context.Context, label string, report func(Progress)) error {
	b, info, err := f.find(ctx, label)
	if err != nil {
		return err
	}
	if b.Bad != "" {
		return fault.New(fault.Unfit, "the physical backup %s is no good: %s", label, b.Bad).WithCode("damaged")
	}
	if err := f.verify(ctx, b, f.path("base", label)); err != nil {
		return err
	}
	s := info.stretch(b)
	if s == nil {
		return fault.New(fault.Unfit, "the WAL of the physical backup %s is not there", label).WithCode("wal_missing")
	}
	entries, err := os.ReadDir(f.path("wal"))
	if err != nil {
		return err
	}
	first := segmentNumber(b.StartLSN.Segment(b.Timeline, SegmentSize))
	todo := slices.DeleteFunc(entries, func(e fs.DirEntry) bool {
		name, ok := strings.CutSuffix(e.Name(), ".gz")
		return !ok || !segmentName.MatchString(name) || segmentNumber(name) < first || segmentNumber(name) > segmentNumber(s.Last)
	})
	for i, e := range todo {
		cmd := f.servant.Command("gzip", "-t", f.path("wal", e.Name()))
		if err := run(ctx, cmd, nil); err != nil {
			if ctx.Err() != nil {
				return err
			}
			return fault.Wrap(err, fault.Unfit, "the WAL %s is damaged", strings.TrimSuffix(e.Name(), ".gz")).WithCode("damaged").WithHint("make a new backup now: moments after this file cannot be reached from older ones")
		}
		if report != nil {
			report(Progress{Phase: PhaseVerify, Done: int64(i+1) * SegmentSize, Total: int64(len(todo)) * SegmentSize})
		}
	}
	return nil
}

func (f *Files) verify(ctx context.Context, b Backup, dir string) error {
	bin, err := pgserver.FindMajor(b.Major)
	if err != nil {
		return err
	}
	words := append(pgserver.Gently(), filepath.Join(bin, "pg_verifybackup"), "--quiet", "--no-parse-wal", dir)
	if err := run(ctx, f.servant.Command(words[0], words[1:]...), nil); err != nil {
		if ctx.Err() != nil {
			return err
		}
		return fault.Wrap(err, fault.Unfit, "the physical backup %s is damaged: %s", b.Label, fault.Of(err).Message).WithCode("damaged").WithHint("another one may reach the moment: oneo backup physical list")
	}
	return nil
}

// Prune removes copies, and the WAL before the first one that is left.
func (f *Files) Prune(ctx context.Context, labels []string) error {
	free, err := f.lock()
	if err != nil {
		return err
	}
	defer free()
	for _, label := range labels {
		if _, _, err := f.find(ctx, label); err != nil {
			return err
		}
	}
	for _, label := range labels {
		// The description first: what is half removed is none.
		if err := os.Remove(f.path("base", label+".json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := failpoint.Hit("physical.pruned"); err != nil {
			return err
		}
	}
	if err := f.sweep(); err != nil {
		return err
	}
	info, err := f.Info(ctx)
	if err != nil || len(info.Backups) == 0 {
		return err
	}
	if slices.ContainsFunc(info.Backups, func(b Backup) bool { return b.StartLSN == 0 }) {
		return nil // one that cannot be read may need any of it
	}
	oldest := slices.MinFunc(info.Backups, func(a, b Backup) int { return int(min(1, max(-1, int64(a.StartLSN)-int64(b.StartLSN)))) })
	bin, err := pgserver.FindMajor(oldest.Major)
	if err != nil {
		return err
	}
	return run(ctx, f.servant.Command(filepath.Join(bin, "pg_archivecleanup"), "-x", ".gz", f.path("wal"), oldest.StartLSN.Segment(oldest.Timeline, SegmentSize)), nil)
}

// Fetch copies a backup, where the file system can without copying blocks, and compares the copy with its manifest.
func (f *Files) Fetch(ctx context.Context, b Backup, dir string, _ []string, report func(Progress)) error {
	words := append(pgserver.Gently(), "cp", "--archive", "--reflink=auto", f.path("base", b.Label)+"/.", dir)
	cctx, stop := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		for report != nil {
			select {
			case <-cctx.Done():
				return
			case <-time.After(500 * time.Millisecond):
			}
			if n, err := sizeOf(dir); err == nil {
				report(Progress{Phase: PhaseFetch, Done: n, Total: b.Bytes})
			}
		}
	}()
	err := run(ctx, f.servant.Command(words[0], words[1:]...), nil)
	stop()
	<-watched
	if err != nil {
		if strings.Contains(err.Error(), "No space left") {
			return fault.Wrap(err, fault.Unavailable, "the disk of %s is full", dir).WithCode("disk_full").WithHint("free space, or choose another folder: backup.physical.scratch")
		}
		return err
	}
	if report != nil {
		report(Progress{Phase: PhaseVerify, Done: 0, Total: b.Bytes})
	}
	return f.verify(ctx, b, dir)
}
