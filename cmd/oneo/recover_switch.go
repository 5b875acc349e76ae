package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/failpoint"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/pgserver"
	"github.com/oneo-crm/oneo/pkg/physical"
)

// switching is a switch of the data folder of dev that has begun. It is on the disk before the first of its two renames, and until the
// second is done.
type switching struct {
	ID        string `json:"id"` // of the recovery
	Recovered string `json:"recovered"`
	Kept      string `json:"kept"`
}

func switchFile(dir string) string { return filepath.Join(dir, "switch.json") }

// devFolder is the data folder of an oneo dev.
func devFolder(data string) (string, error) {
	dir, err := filepath.Abs(data)
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(filepath.Join(dir, "dev.json")); err != nil {
		return "", fault.New(fault.Invalid, "%s is not the data folder of an `oneo dev`", dir).WithCode("dev_folder").WithHint("name it with --data; for any other server leave --switch out: the steps are printed")
	}
	return dir, nil
}

func notRunning(dir string) error {
	pid, err := pgserver.Running(filepath.Join(dir, "postgres"))
	if err != nil {
		return err
	}
	if pid != 0 {
		return fault.New(fault.Conflict, "a PostgreSQL (pid %d) is running on %s", pid, filepath.Join(dir, "postgres")).WithCode("already_running").WithHint("stop `oneo dev` first")
	}
	return nil
}

// notSwitching refuses to start a dev whose data folder is half switched: it would begin with an empty one.
func notSwitching(dir string) error {
	if _, err := os.Stat(switchFile(dir)); err == nil {
		return fault.New(fault.Conflict, "a switch of %s to a recovered cluster was broken off", dir).WithCode("switching").WithHint("oneo recover cluster --switch --data %s ends it", dir)
	}
	return nil
}

// switchDev puts a recovered cluster in the place of that of a stopped dev, and says where the old one is kept.
func switchDev(dir string, r app.Recovered) (kept string, err error) {
	live := filepath.Join(dir, "postgres")
	if system := physical.SystemOf(live, r.Major); system != r.System {
		return "", fault.New(fault.Conflict, "%s holds another cluster (%s) than the one that was recovered (%s)", live, system, r.System).WithCode("other_cluster")
	}
	s := switching{ID: r.ID, Recovered: r.Data, Kept: live + "-before-" + r.Made.UTC().Format("20060102T150405Z")}
	if _, err := os.Lstat(s.Kept); err == nil {
		return "", fault.New(fault.Conflict, "%s is there already", s.Kept).WithCode("not_empty")
	}
	text, err := json.Marshal(s)
	if err != nil {
		return "", err
	}
	if err := writePrivate(switchFile(dir), append(text, '\n')); err != nil {
		return "", err
	}
	return s.Kept, s.run(dir)
}

// run does what is left to do.
func (s switching) run(dir string) error {
	live := filepath.Join(dir, "postgres")
	if n, err := physical.ReadNote(live); err == nil && n.ID == s.ID {
		return os.Remove(switchFile(dir)) // both are done
	}
	if n, err := physical.ReadNote(s.Recovered); err != nil || n.ID != s.ID {
		return fault.New(fault.Conflict, "a switch to %s was broken off, and it is not there any more", s.Recovered).WithCode("switching").
			WithHint("the old data folder is %s or %s; when it is in its place, remove %s", live, s.Kept, switchFile(dir))
	}
	if _, err := os.Lstat(s.Kept); errors.Is(err, fs.ErrNotExist) {
		if err := notRunning(dir); err != nil {
			return errors.Join(err, os.Remove(switchFile(dir))) // nothing was done
		}
		if err := failpoint.Hit("recover.switching"); err != nil {
			return err
		}
		if err := os.Rename(live, s.Kept); err != nil {
			return errors.Join(fmt.Errorf("put the old data folder aside: %w", err), os.Remove(switchFile(dir)))
		}
	}
	if err := failpoint.Hit("recover.aside"); err != nil {
		return err
	}
	if err := os.Rename(s.Recovered, live); err != nil {
		back := os.Rename(s.Kept, live)
		if back == nil {
			back = os.Remove(switchFile(dir))
		}
		return errors.Join(fault.Wrap(err, fault.Conflict, "%s cannot be put in the place of %s", s.Recovered, live).WithCode("switching").
			WithHint("are both on one file system? Leave --into out"), back)
	}
	if err := failpoint.Hit("recover.switched"); err != nil {
		return err
	}
	return os.Remove(switchFile(dir))
}

// finishSwitch ends a switch that was broken off.
func finishSwitch(e *env, dir string) (done bool, err error) {
	text, err := os.ReadFile(switchFile(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var s switching
	if err := json.Unmarshal(text, &s); err != nil {
		return false, fmt.Errorf("read %s: %w", switchFile(dir), err)
	}
	if err := s.run(dir); err != nil {
		return false, err
	}
	e.say("ended a switch that was broken off: %s is the recovered cluster; what it held is kept in %s", filepath.Join(dir, "postgres"), s.Kept)
	e.say("next: oneo dev --data %s, and a physical backup at once: oneo backup physical create", shellWord(dir))
	return true, showRecovered(e, nil, nil, nil, s.Kept)
}
