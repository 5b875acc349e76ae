package physical

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
)

// RecoverOptions say what is recovered, and where to.
type RecoverOptions struct {
	// Dir is the folder in which a folder for the cluster is made.
	Dir    string
	Target Target
	// Role and Database are how the cluster is asked how far it is: any of its own.
	Role, Database string
	// Only are the databases that are needed; none: all. Engines that cannot tell them apart bring all.
	Only []string
	// Why is for whoever finds the folder.
	Why string
	// Begun is told what it is going to take, before anything is fetched; may be nil.
	Begun func(Estimate)
	// Report is told how far it is; may be nil. It may be called from another goroutine.
	Report func(Progress)
	// Final is the data folder of a cluster that is to stay, in the place of one that ends with us. It must be empty, or not be there.
	// It is there when Settle has put it there, whole, and never before.
	Final string
}

// Cluster is a recovered cluster. It runs, can be written to, and archives nothing.
type Cluster struct {
	Target Target
	Backup Backup
	// Reached is when the last transaction of it was committed; zero: there is none since the backup.
	Reached time.Time

	dir, data, run string
	role, database string
	final          string // where the data folder is to stay; empty: it goes with the cluster
	settled        bool
	bin            string
	servant        pgserver.Servant
	process        *pgserver.Process
	held           *os.File
	auto           []byte   // postgresql.auto.conf as it was fetched
	use            *os.File // of another process's cluster, that this one reads
}

// about is what a scratch cluster's folder says of itself.
type about struct {
	Why    string    `json:"why"`
	Target string    `json:"target"`
	Backup string    `json:"backup"` // its label
	Made   time.Time `json:"made"`
	Pid    int       `json:"pid"` // of the oneo that made it
	Kept   *kept     `json:"kept,omitempty"`
	// Final is where the data folder is to stay.
	Final string `json:"final,omitempty"`
}

const (
	aboutFile     = "scratch.json"
	scratchPrefix = "scratch-"
	damaged       = "damaged" // the code of what is not what was written
	// recoverySignal lies in the data folder of a cluster that is to recover.
	recoverySignal = "recovery.signal"
	socketPort     = 5432 // a part of the socket's name: nothing listens on a network
	// spare is what must be left free on the disk besides the cluster itself.
	spare = 256 << 20
	// memory is what PostgreSQL takes for itself while it recovers.
	memory = 256 << 20
)

// Recover brings a cluster to a moment beside the live one. NotFound: the moment cannot be reached, and the fault says what can.
// Unfit: what is needed is damaged. Unavailable: disk or memory do not suffice, or a program fails. What has failed leaves nothing.
func Recover(ctx context.Context, e Engine, o RecoverOptions) (c *Cluster, err error) {
	if o.Report == nil {
		o.Report = func(Progress) {}
	}
	info, err := e.Info(ctx)
	if err != nil {
		return nil, err
	}
	b, err := info.Choose(o.Target)
	if err != nil {
		return nil, err
	}
	bin, err := pgserver.FindMajor(b.Major)
	if err != nil {
		return nil, err
	}
	s, err := pgserver.FindServant()
	if err != nil {
		return nil, err
	}
	c = &Cluster{Target: o.Target, Backup: b, role: o.Role, database: o.Database, bin: bin, servant: s}
	made := c // a return with an error has taken c away
	defer func() {
		if err != nil {
			_ = made.remove(context.WithoutCancel(ctx)) // the reason is told already; what stays is found by Leftovers
			c = nil
		}
	}()
	if err := c.place(s, o); err != nil {
		return nil, err
	}
	if err := room(c.data, b, info, c.final != ""); err != nil {
		return nil, err
	}
	if o.Begun != nil {
		o.Begun(estimate(b, info))
	}
	if err := failpoint.Hit("physical.begun"); err != nil {
		return nil, err
	}
	if err := e.Fetch(ctx, b, c.data, o.Only, o.Report); err != nil {
		return nil, err
	}
	if err := c.forgetNote(); err != nil {
		return nil, err
	}
	if err := failpoint.Hit("physical.fetched"); err != nil {
		return nil, err
	}
	if err := c.shut(); err != nil {
		return nil, err
	}
	run := func(settings map[string]string) error {
		if err := c.start(ctx, s, bin, e.RestoreCommand(), settings); err != nil {
			return err
		}
		if err := failpoint.Hit("physical.started"); err != nil {
			return err
		}
		return c.replay(ctx, info, o.Report)
	}
	err = run(o.Target.settings())
	last, lerr := time.Parse("2006-01-02 15:04:05Z", c.last())
	switch {
	case err == nil:
	case fault.Of(err).StableCode() == damaged && b.Major >= 15:
		// It reads ahead, and may have met what is damaged behind the moment.
		settings := o.Target.settings()
		settings["recovery_prefetch"] = "off"
		err = run(settings)
	case lerr == nil && o.Target.Point == "" && last.Equal(o.Target.Time) && !info.gapAfter(b):
		// It ends at the first commit behind a moment, and behind the very last one there is none: all of the WAL is the moment.
		err = run(nil)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(c.tablespaces(), 0o700); err != nil { // nothing is replayed any more
		return nil, err
	}
	return c, failpoint.Hit("physical.recovered")
}

// place makes the folders of the cluster, which belong to PostgreSQL's user and can be entered by nobody else.
func (c *Cluster) place(s pgserver.Servant, o RecoverOptions) error {
	if err := s.Own(o.Dir); err != nil {
		return err
	}
	if o.Final != "" {
		var err error
		if c.final, err = filepath.Abs(o.Final); err != nil {
			return err
		}
		if err := vacant(o.Dir, c.final); err != nil {
			return err
		}
	}
	c.dir = filepath.Join(o.Dir, scratchPrefix+uuid.NewString()[:8])
	if err := s.Own(c.dir); err != nil {
		return err
	}
	if c.run = runOf(c.dir); filepath.Dir(c.run) != c.dir {
		if err := os.Mkdir(c.run, 0o700); err != nil { // nobody else may have made it
			return err
		}
	}
	var err error
	// Held for as long as this process lives: what nobody holds was left behind.
	if c.held, err = os.OpenFile(filepath.Join(c.dir, aboutFile), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return err
	}
	if err := syscall.Flock(int(c.held.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return err
	}
	data := filepath.Join(c.dir, "data")
	if c.final != "" {
		data = beside(c.final, c.dir)
	}
	text, err := json.Marshal(about{Why: o.Why, Target: o.Target.String(), Backup: c.Backup.Label, Made: time.Now().UTC(), Pid: os.Getpid(), Final: c.final})
	if err != nil {
		return err
	}
	if _, err := c.held.Write(append(text, '\n')); err != nil {
		return err
	}
	c.data = data
	return errors.Join(s.Own(c.data), s.Own(c.run))
}

// runOf is where the socket of a scratch cluster lies: its path may have 107 bytes, so a deep folder has it elsewhere.
func runOf(dir string) string {
	if run := filepath.Join(dir, "run"); len(run) <= 80 {
		return run
	}
	return filepath.Join(os.TempDir(), "oneo-"+filepath.Base(dir))
}

// full reports whether a folder's disk has no room for another file of WAL.
func full(dir string) bool {
	var st syscall.Statfs_t
	return syscall.Statfs(dir, &st) == nil && int64(st.Bavail)*st.Bsize < SegmentSize
}

// room refuses a recovery for which there is not enough room, before anything is fetched.
func room(dir string, b Backup, info Info, final bool) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return fmt.Errorf("look at the room in %s: %w", dir, err)
	}
	// Replay makes the cluster larger, by no more than its WAL.
	need, free := Room(b, info), int64(st.Bavail)*st.Bsize
	if free < need {
		where := "backup.physical.scratch"
		if final {
			where = "--into"
		}
		return fault.New(fault.Unavailable, "recovering needs about %d MB in %s, and %d MB are free", need>>20, dir, free>>20).WithCode("disk_full").
			WithHint("free space, or choose another folder: %s", where)
	}
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil //nolint:nilerr // another system, which does not say
	}
	if m := availableLine.FindSubmatch(text); m != nil {
		if kb, err := strconv.ParseInt(string(m[1]), 10, 64); err == nil && kb<<10 < memory {
			return fault.New(fault.Unavailable, "recovering needs about %d MB of memory, and %d MB are available", memory>>20, kb>>10).WithCode("memory").WithHint("recover where there is more, or at another hour")
		}
	}
	return nil
}

var availableLine = regexp.MustCompile(`(?m)^MemAvailable:\s+(\d+) kB`)

// Estimate is what a recovery is going to take.
type Estimate struct {
	Backup Backup
	Disk   int64 // bytes, about
	WAL    int64 // bytes that are replayed, at most
	// Time is how long it takes on an ordinary disk, rather too long than too short; the progress knows better.
	Time time.Duration
}

// Bytes a second that an ordinary machine fetches and checks, and replays, while it leaves most of itself to others.
const (
	fetchRate  = 100 << 20
	replayRate = 30 << 20
)

func estimate(b Backup, info Info) Estimate {
	e := Estimate{Backup: b, Disk: Room(b, info), WAL: info.Replayed(b)}
	e.Time = time.Second * time.Duration(1+b.Bytes/fetchRate+e.WAL/replayRate)
	return e
}

// Room is about how many bytes of disk a recovery from a backup takes.
func Room(b Backup, info Info) int64 { return b.Bytes + min(info.Replayed(b), b.Bytes) + spare }

func (c *Cluster) tablespaces() string { return filepath.Join(c.data, "pg_tblspc") }

// shut keeps the cluster from the folders of the live one's tablespaces. Replaying that a tablespace was made would link to its own folder,
// which is the live cluster's if that is on this machine, and write there. PostgreSQL, which is never root, cannot make a link in a folder
// that it may not write to, and ends. Unfit: what was fetched leads elsewhere already.
func (c *Cluster) shut() error {
	entries, err := os.ReadDir(c.tablespaces())
	if err != nil {
		return err
	}
	for _, e := range entries {
		to, err := filepath.EvalSymlinks(filepath.Join(c.tablespaces(), e.Name()))
		if err != nil {
			return fmt.Errorf("look where a tablespace lies: %w", err)
		}
		data, err := filepath.EvalSymlinks(c.data)
		if err != nil {
			return err
		}
		if !strings.HasPrefix(to, data+spacesSuffix+"/") && !strings.HasPrefix(to, data+"/") {
			return fault.New(fault.Unfit, "a tablespace of the physical backup %s lies in %s, which is not its own", c.Backup.Label, to).WithCode("tablespaces")
		}
	}
	return os.Chmod(c.tablespaces(), 0o500)
}

// least are settings that may not be less than where the WAL was written: PostgreSQL refuses to replay it otherwise.
func least(s pgserver.Servant, bin, data string) (map[string]string, error) {
	said, err := control(s, bin, data)
	if err != nil {
		return nil, err
	}
	found := map[string]string{}
	for word, name := range map[string]string{"max_connections": "max_connections", "max_worker_processes": "max_worker_processes", "max_wal_senders": "max_wal_senders",
		"max_prepared_xacts": "max_prepared_transactions", "max_locks_per_xact": "max_locks_per_transaction"} {
		if v, ok := said[word+" setting"]; ok {
			found[name] = v
		}
	}
	return found, nil
}

// start starts PostgreSQL on what was fetched so that it recovers to the target, or to the end of the WAL if there is none, whatever the
// settings in it say: none of these may archive, send or listen.
func (c *Cluster) start(ctx context.Context, s pgserver.Servant, bin, restore string, target map[string]string) error {
	settings, err := least(s, bin, c.data)
	if err != nil {
		return err
	}
	files := map[string]string{
		filepath.Join(c.dir, "postgresql.conf"): "# Written by oneo: all settings are given at the start.\n",
		filepath.Join(c.dir, "hba.conf"):        "local all all trust\n", // the socket's folder lets nobody in but PostgreSQL's user
		filepath.Join(c.dir, "ident.conf"):      "",
		filepath.Join(c.data, recoverySignal):   "",
	}
	auto := filepath.Join(c.data, "postgresql.auto.conf")
	was, err := os.ReadFile(auto)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	files[auto] = ""
	for path, text := range files {
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), s.Chown(path)); err != nil {
			return err
		}
	}
	_ = os.Remove(filepath.Join(c.data, "standby.signal")) // of a backup of a standby
	for k, v := range map[string]string{
		"config_file": filepath.Join(c.dir, "postgresql.conf"), "hba_file": filepath.Join(c.dir, "hba.conf"), "ident_file": filepath.Join(c.dir, "ident.conf"),
		"listen_addresses": "", "unix_socket_directories": c.run, "unix_socket_permissions": "0700", "port": strconv.Itoa(socketPort), "ssl": "off",
		"archive_mode": "off", "restore_command": restore, "hot_standby": "on", "shared_preload_libraries": "", "logging_collector": "off", "log_destination": "stderr",
		"autovacuum": "off", "shared_buffers": "128MB", "max_wal_size": "256MB", "log_min_messages": "info", "log_timezone": "UTC", "TimeZone": "UTC", "lc_messages": "C",
		"cluster_name": "oneo recovery",
	} {
		settings[k] = v
	}
	if c.final == "" { // nothing of it is needed after a crash
		settings["fsync"], settings["full_page_writes"], settings["synchronous_commit"] = "off", "off", "off"
	}
	for k, v := range target {
		settings[k] = v
	}
	if c.process == nil {
		c.auto = was
	}
	c.process, err = pgserver.Start(s, pgserver.StartOptions{Bin: bin, Data: c.data, Log: c.log(), Settings: settings, Gentle: true})
	return err
}

func (c *Cluster) log() string { return filepath.Join(c.dir, "postgres.log") }

// replay waits until the target is reached and the cluster can be written to.
func (c *Cluster) replay(ctx context.Context, info Info, report func(Progress)) error {
	total := info.Replayed(c.Backup)
	for {
		if c.process.Ended() {
			return c.diagnose(info)
		}
		all := c.replayed() // before it is asked
		recovering, p, err := c.look(ctx)
		var refused *pgconn.PgError
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case all && errors.As(err, &refused) && refused.Code[:2] != "53" && refused.Code[:2] != "57":
			// Neither busy nor ending: nothing that it will get over. Until all is replayed, the role and the database may still come.
			return fault.Wrap(err, fault.NotFound, "the cluster cannot be asked as it was at %s: %s", c.Target, refused.Message).WithCode("not_there_then").
				WithHint("if its database or its owner was made later, choose a later moment")
		case err == nil && !recovering:
			return nil
		case err == nil:
			p.Total = total
			report(p)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.process.Done:
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// replayed reports whether everything is: PostgreSQL removes the file then, also from before it can be written to.
func (c *Cluster) replayed() bool {
	_, err := os.Lstat(filepath.Join(c.data, recoverySignal))
	return errors.Is(err, fs.ErrNotExist)
}

// look asks how far the replay is. An error: it cannot be asked yet.
func (c *Cluster) look(ctx context.Context) (recovering bool, p Progress, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, c.URL(c.role, c.database))
	if err != nil {
		return true, p, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var at *time.Time
	var lsn *string
	const ask = `select pg_catalog.pg_is_in_recovery(), pg_catalog.pg_last_xact_replay_timestamp(), pg_catalog.pg_last_wal_replay_lsn()::text`
	if err := conn.QueryRow(ctx, ask).Scan(&recovering, &at, &lsn); err != nil {
		return true, p, err
	}
	p.Phase = PhaseReplay
	if at != nil {
		p.Moment, c.Reached = *at, *at
	}
	if lsn != nil {
		if l, err := ParseLSN(*lsn); err == nil && l > c.Backup.StartLSN {
			p.Done = int64(l - c.Backup.StartLSN) //nolint:gosec // a stretch of WAL
		}
	}
	return recovering, p, nil
}

var lastCommit = regexp.MustCompile(`last completed transaction was at log time ([0-9: .-]+[0-9])`)

// last is when the last transaction that was replayed before the WAL ended was committed, as PostgreSQL's log says; empty: it does not.
func (c *Cluster) last() string {
	text := pgserver.Tail(c.log())
	if m := lastCommit.FindStringSubmatch(text); m != nil && strings.Contains(text, "ended before configured recovery target was reached") {
		return m[1] + "Z"
	}
	return ""
}

// diagnose says why PostgreSQL ended in the middle of a recovery.
func (c *Cluster) diagnose(info Info) error {
	text := pgserver.Tail(c.log())
	has := func(s string) bool { return strings.Contains(text, s) }
	switch {
	case has("No space left on device"), full(c.dir), full(c.data): // the log may be on the same disk
		return fault.New(fault.Unavailable, "the disk of %s is full", c.dir).WithCode("disk_full").WithHint("free space, or choose another folder: backup.physical.scratch")
	case has("is damaged"):
		return fault.New(fault.Unfit, "archived WAL is damaged: %s", lineWith(text, "is damaged")).WithCode(damaged).
			WithHint("moments after this file can be reached from a later backup only: oneo backup physical list")
	case has(`could not create symbolic link "pg_tblspc/`), has(`could not create directory "pg_tblspc/`):
		return fault.New(fault.Unfit, "a tablespace was made after the physical backup %s: a recovery from it would write into that one's folder", c.Backup.Label).WithCode("tablespaces").
			WithHint("moments before it can be reached; those after it from a backup that has it, which pgBackRest makes")
	case has("ended before configured recovery target was reached"):
		until := "before the end of the backup"
		if last := c.last(); last != "" {
			until = "at " + last
		}
		f := fault.New(fault.NotFound, "%s cannot be reached: the last transaction in the archived WAL was committed %s", c.Target, until)
		if s := info.stretch(c.Backup); s != nil && info.gapAfter(c.Backup) {
			return f.WithCode("wal_missing").WithHint("WAL is missing behind %s; %s", s.Last, info.reach())
		}
		return f.WithCode("target_not_reached").WithHint("an earlier moment, or: is all WAL archived? oneo backup physical list")
	case has("consistent recovery point"), has("WAL ends before end of online backup"), has("could not locate required checkpoint record"):
		return fault.New(fault.NotFound, "the WAL that was written during the backup %s is missing", c.Backup.Label).WithCode("wal_missing").WithHint("%s", info.reach())
	}
	return fault.New(fault.Unavailable, "PostgreSQL ended while recovering; its log says:\n%s", text).WithCode("postgres_start")
}

func lineWith(text, what string) string {
	for line := range strings.Lines(text) {
		if strings.Contains(line, what) {
			return strings.TrimSpace(line)
		}
	}
	return ""
}

// URL is how one of the cluster's roles reaches a database of it, on this machine alone.
func (c *Cluster) URL(role, database string) string {
	u := url.URL{Scheme: "postgres", User: url.User(role), Path: "/" + database}
	u.RawQuery = url.Values{"host": {c.run}, "port": {strconv.Itoa(socketPort)}, "sslmode": {"disable"}}.Encode()
	return u.String()
}

// Data is the data folder.
func (c *Cluster) Data() string { return c.data }

// Dir is the folder of what belongs to the cluster and goes with it, and of nobody else.
func (c *Cluster) Dir() string { return c.dir }

// Close stops the cluster and removes it, but for a data folder that has been settled.
func (c *Cluster) Close(ctx context.Context) error {
	if c.use != nil {
		return c.use.Close()
	}
	if c.settled {
		c.data = ""
	}
	return c.remove(ctx)
}

func (c *Cluster) remove(ctx context.Context) error {
	if c.process != nil {
		// What is thrown away need not be put in order.
		if err := c.process.Stop(ctx, 20*time.Second, syscall.SIGQUIT); err != nil {
			return err
		}
	}
	var errs []error
	if c.data != "" {
		_ = os.Chmod(c.tablespaces(), 0o700) // so that what is in it can be removed; it may not be there
		errs = append(errs, os.RemoveAll(c.data), os.RemoveAll(c.data+spacesSuffix))
	}
	for _, dir := range []string{c.run, c.dir} {
		if dir != "" {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	if c.held != nil {
		errs = append(errs, c.held.Close())
	}
	return errors.Join(errs...)
}

// Leftover is a scratch cluster that nobody holds any more.
type Leftover struct {
	Dir    string    `json:"dir"`
	Why    string    `json:"why"`
	Target string    `json:"target"`
	Made   time.Time `json:"made"`
	Bytes  int64     `json:"size_bytes"`
	Pid    int       `json:"pid,omitempty"`
	// Final is where a data folder was to stay that was not made whole.
	Final string `json:"final,omitempty"`
}

// Leftovers are the scratch clusters in a folder whose process has died.
func Leftovers(dir string) (found []Leftover, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), scratchPrefix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		file, err := abandoned(path)
		if err != nil {
			return nil, err
		}
		if file == nil {
			continue
		}
		l := Leftover{Dir: path}
		var a about
		if err := json.NewDecoder(file).Decode(&a); err == nil {
			l.Why, l.Target, l.Made, l.Pid, l.Final = a.Why, a.Target, a.Made, a.Pid, a.Final
		} else if st, err := e.Info(); err == nil {
			l.Made = st.ModTime()
		}
		_ = file.Close()
		if l.Bytes, err = sizeOf(path); err != nil {
			return nil, err
		}
		if l.Final != "" {
			n, err := sizeOf(beside(l.Final, path))
			if err != nil {
				return nil, err
			}
			l.Bytes += n
		}
		found = append(found, l)
	}
	return found, nil
}

// abandoned opens and holds what a folder says of itself, if nobody else holds it; nil: somebody does, or it is only just being made.
func abandoned(dir string) (*os.File, error) {
	file, err := os.OpenFile(filepath.Join(dir, aboutFile), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	return file, nil
}

// RemoveLeftover removes a scratch cluster that nobody holds, with the half made data folder of one that was to stay, and its server
// if that still ends.
func RemoveLeftover(ctx context.Context, dir string) error {
	file, err := abandoned(dir)
	if err != nil || file == nil {
		return err
	}
	defer file.Close()
	data := filepath.Join(dir, "data")
	var about about
	if err := json.NewDecoder(file).Decode(&about); err == nil && about.Final != "" {
		data = beside(about.Final, dir)
	}
	if err := endServer(ctx, data); err != nil {
		return err
	}
	_ = os.Chmod((&Cluster{data: data}).tablespaces(), 0o700) // as in remove
	return errors.Join(os.RemoveAll(data), os.RemoveAll(data+spacesSuffix), os.RemoveAll(runOf(dir)), os.RemoveAll(dir))
}

// endServer ends a server that outlives the process that started it.
func endServer(ctx context.Context, data string) error {
	for tries := 0; ; tries++ {
		text, err := os.ReadFile(filepath.Join(data, "postmaster.pid"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		first, _, _ := strings.Cut(string(text), "\n")
		pid, err := strconv.Atoi(strings.TrimSpace(first))
		if err != nil || pid <= 0 {
			return nil
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil || !strings.Contains(string(line), data) {
			return nil // it has ended, and its number may be another's
		}
		sig := syscall.SIGQUIT
		if tries > 100 {
			sig = syscall.SIGKILL
		}
		if err := syscall.Kill(pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}
