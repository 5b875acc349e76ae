package physical

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
)

// noteFile lies in a data folder that was recovered to stay, from the moment at which it is whole. PostgreSQL does not look at it.
const noteFile = "oneo-recovered.json"

// Note is what a data folder that was recovered to stay says of itself.
type Note struct {
	ID       string    `json:"id"` // of the recovery
	Target   string    `json:"target"`
	Backup   string    `json:"backup"`
	Reached  time.Time `json:"reached"` // zero: no transaction was committed since the backup
	Made     time.Time `json:"made"`
	System   string    `json:"system"`
	Major    int       `json:"major"`
	Timeline uint32    `json:"timeline"` // that it goes on with
	// Checksums: its pages were read and fit their checksums. False: it has none.
	Checksums bool            `json:"checksums"`
	More      json.RawMessage `json:"more,omitempty"` // of whoever asked for it
}

// ReadNote reads what a data folder says of itself. fs.ErrNotExist: it is not one that was recovered to stay, or not whole.
func ReadNote(data string) (n Note, err error) {
	text, err := os.ReadFile(filepath.Join(data, noteFile))
	if err != nil {
		return n, err
	}
	return n, json.Unmarshal(text, &n)
}

// forgetNote takes away what a backup has brought of an earlier recovery.
func (c *Cluster) forgetNote() error {
	if err := os.Remove(filepath.Join(c.data, noteFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// beside is where a data folder is until it is whole: on the same disk as where it is to stay, under a name that nobody else uses.
func beside(final, scratch string) string { return final + "." + filepath.Base(scratch) }

// vacant refuses a data folder that holds something, or in whose place none can be put, and says why. dir is where the scratch folders are.
func vacant(dir, final string) error {
	l, alive, err := Begun(dir, final)
	switch {
	case err != nil:
		return err
	case l != nil && alive:
		return fault.New(fault.Locked, "another oneo (pid %d) is recovering into %s", l.Pid, final).WithCode("recovering")
	case l != nil:
		return fault.New(fault.Conflict, "a recovery to %s into %s was broken off, and has left %s, which is no whole cluster", l.Target, final, beside(final, l.Dir)).
			WithCode("half_recovered").WithHint("add --discard to remove that and to begin anew")
	}
	if _, err := os.Lstat(final + spacesSuffix); err == nil {
		return fault.New(fault.Conflict, "%s is there already: tablespaces of the recovered cluster would have to lie there", final+spacesSuffix).WithCode("not_empty").WithHint("name another folder, or remove that one")
	}
	entries, err := os.ReadDir(final)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fault.Wrap(err, fault.Invalid, "%s cannot be a data folder", final).WithCode("data_folder")
	}
	if len(entries) > 0 {
		return fault.New(fault.Conflict, "the folder %s is not empty", final).WithCode("not_empty").WithHint("name one that is empty, or is not there")
	}
	var own, parent syscall.Stat_t
	if err := errors.Join(syscall.Stat(final, &own), syscall.Stat(filepath.Dir(final), &parent)); err != nil {
		return fmt.Errorf("look at %s: %w", final, err)
	}
	if own.Dev != parent.Dev {
		return fault.New(fault.Invalid, "%s is where a disk is mounted", final).WithCode("data_folder").WithHint("name a folder in it: %s", filepath.Join(final, "postgres"))
	}
	return nil
}

// Begun is the recovery into a data folder that was begun and has not ended, and whether its process lives; nil: there is none. dir is
// where the scratch folders are.
func Begun(dir, final string) (l *Leftover, alive bool, err error) {
	paths, err := filepath.Glob(filepath.Join(dir, "scratch-*", aboutFile))
	if err != nil {
		return nil, false, err
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		var a about
		if err != nil || json.Unmarshal(text, &a) != nil || a.Final != final {
			continue // of another one, or just removed
		}
		l = &Leftover{Dir: filepath.Dir(path), Why: a.Why, Target: a.Target, Made: a.Made, Pid: a.Pid, Final: a.Final}
		if n, err := ReadNote(final); err == nil && n.ID == filepath.Base(l.Dir) {
			return nil, false, nil // it was killed when all was done
		}
		file, err := abandoned(l.Dir)
		if err != nil {
			return nil, false, err
		}
		if file == nil {
			return l, true, nil
		}
		return l, false, file.Close()
	}
	return nil, false, nil
}

// Settle stops a cluster that is to stay, in order, and makes its data folder one that anybody may start: its settings are those of the
// backup, its pages fit their checksums where it has any, and what it has written on its new timeline is archived by the one who starts
// it. more is kept in its note. Only then is it in its place, from where Close does not take it. Unfit: a page does not fit its checksum.
func (c *Cluster) Settle(ctx context.Context, more any) (n Note, err error) {
	if err := c.process.Stop(ctx, 5*time.Minute, syscall.SIGINT); err != nil {
		return n, err
	}
	control, err := c.control()
	if err != nil {
		return n, err
	}
	if state := control["Database cluster state"]; state != "shut down" || ctx.Err() != nil {
		return n, errors.Join(ctx.Err(), fault.New(fault.Unavailable, "the recovered cluster did not stop in order: %s; its log says:\n%s", state, pgserver.Tail(c.log())).WithCode("postgres_stop"))
	}
	n = Note{ID: filepath.Base(c.dir), Target: c.Target.String(), Backup: c.Backup.Label, Reached: c.Reached, Made: time.Now().UTC(), System: c.Backup.System, Major: c.Backup.Major}
	if _, err := fmt.Sscan(control["Latest checkpoint's TimeLineID"], &n.Timeline); err != nil {
		return n, fmt.Errorf("read the timeline of the recovered cluster: %w", err)
	}
	if n.More, err = json.Marshal(more); err != nil {
		return n, err
	}
	if v := control["Data page checksum version"]; v != "" && v != "0" {
		words := append(pgserver.Gently(), filepath.Join(c.bin, "pg_checksums"), "--check", "-D", c.data)
		if err := run(ctx, c.servant.Command(words[0], words[1:]...), nil); err != nil {
			if ctx.Err() != nil {
				return n, err
			}
			return n, fault.Wrap(err, fault.Unfit, "the recovered cluster is damaged: %s", fault.Of(err).Message).WithCode("damaged").WithHint("an earlier moment may be reached from another backup: oneo backup physical list")
		}
		n.Checksums = true
	}
	// Its own settings, for who starts it, and none of ours.
	if err := c.put("postgresql.auto.conf", c.auto); err != nil {
		return n, err
	}
	if err := os.Remove(filepath.Join(c.data, "postmaster.opts")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return n, err
	}
	if err := c.toArchive(n.Timeline, control["Latest checkpoint's REDO WAL file"]); err != nil {
		return n, err
	}
	text, err := json.Marshal(n)
	if err != nil {
		return n, err
	}
	if err := c.put(noteFile, append(text, '\n')); err != nil {
		return n, err
	}
	if err := failpoint.Hit("physical.whole"); err != nil {
		return n, err
	}
	if err := c.placeSpaces(); err != nil {
		return n, err
	}
	if err := os.Rename(c.data, c.final); err != nil {
		return n, fmt.Errorf("put the recovered data folder in its place: %w", err)
	}
	c.settled = true
	if err := syncDir(filepath.Dir(c.final)); err != nil {
		return n, err
	}
	return n, failpoint.Hit("physical.settled")
}

// spacesSuffix makes of the name of a data folder that of the one in which its tablespaces are, if it has any.
const spacesSuffix = "-tablespaces"

// placeSpaces puts the folder of the tablespaces beside where the data folder is to stay, and their links right.
func (c *Cluster) placeSpaces() error {
	was, is := c.data+spacesSuffix, c.final+spacesSuffix
	if _, err := os.Lstat(was); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	links := filepath.Join(c.data, "pg_tblspc")
	entries, err := os.ReadDir(links)
	if err != nil {
		return err
	}
	for _, e := range entries {
		link := filepath.Join(links, e.Name())
		to, err := os.Readlink(link)
		if err != nil {
			return err
		}
		rest, ok := strings.CutPrefix(to, was+"/")
		if !ok {
			return fmt.Errorf("the tablespace %s lies in %s, and not in %s", e.Name(), to, was)
		}
		if err := errors.Join(os.Remove(link), os.Symlink(filepath.Join(is, rest), link), c.servant.Lchown(link)); err != nil {
			return err
		}
	}
	if err := os.Rename(was, is); err != nil {
		return fmt.Errorf("put the recovered tablespaces in their place: %w", err)
	}
	return syncDir(links)
}

// toArchive marks what was written on the new timeline as not archived yet. It was written without archiving, so that nobody's archive
// knows of a timeline that perhaps nobody goes on with; without its history, recoveries would go on with the old one.
func (c *Cluster) toArchive(timeline uint32, last string) error {
	entries, err := os.ReadDir(filepath.Join(c.data, "pg_wal"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		of := strings.HasPrefix(name, fmt.Sprintf("%08X", timeline))
		if !of || !(strings.HasSuffix(name, ".history") || segmentName.MatchString(name) && name < last) {
			continue
		}
		status := filepath.Join("pg_wal", "archive_status", name)
		if err := c.put(status+".ready", nil); err != nil {
			return err
		}
		if err := os.Remove(filepath.Join(c.data, status+".done")); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// put writes a file of the data folder that belongs to PostgreSQL's user, whole and on the disk.
func (c *Cluster) put(name string, text []byte) error {
	path := filepath.Join(c.data, name)
	file, err := os.OpenFile(path+".new", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(text)
	if err := errors.Join(err, file.Sync(), file.Close(), c.servant.Chown(path+".new")); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

var anyControlLine = regexp.MustCompile(`(?m)^([^:\n]+):\s+(.*)$`)

// control is what PostgreSQL's control file says, by the words of pg_controldata.
func (c *Cluster) control() (map[string]string, error) { return control(c.servant, c.bin, c.data) }

func control(s pgserver.Servant, bin, data string) (map[string]string, error) {
	cmd := s.Command(filepath.Join(bin, "pg_controldata"), data)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	text, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("pg_controldata: %w", err)
	}
	found := map[string]string{}
	for _, m := range anyControlLine.FindAllStringSubmatch(string(text), -1) {
		found[m[1]] = strings.TrimSpace(m[2])
	}
	return found, nil
}

// SystemOf is the identifier of the cluster in a data folder, which says whose copy it is; empty: there is none that can be read.
func SystemOf(data string, major int) string {
	bin, err := pgserver.FindMajor(major)
	if err != nil {
		return ""
	}
	s, err := pgserver.FindServant()
	if err != nil {
		return ""
	}
	found, err := control(s, bin, data)
	if err != nil {
		return ""
	}
	return found["Database system identifier"]
}
