package physical

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// Find is a backup by its label. NotFound: there is none.
func (i Info) Find(label string) (Backup, error) {
	k := slices.IndexFunc(i.Backups, func(b Backup) bool { return b.Label == label })
	if k < 0 {
		return Backup{}, fault.New(fault.NotFound, "there is no physical backup %s", label).WithCode("backup_not_found").WithHint("oneo backup physical list")
	}
	return i.Backups[k], nil
}

// Reach is what can be reached from a backup by itself. false: nothing, since it is no good, or its WAL is not there.
func (i Info) Reach(b Backup) (Window, bool) {
	s := i.stretch(b)
	if b.Bad != "" || s == nil {
		return Window{}, false
	}
	return Window{From: b.Stop, Until: later(b.Stop, s.Until)}, true
}

// Archived is when the newest WAL was archived; zero: there is none.
func (i Info) Archived() (w Stretch) {
	for _, s := range i.WAL {
		if s.Until.After(w.Until) {
			w = s
		}
	}
	return w
}

// Needs are the labels of the backups that a backup is worth nothing without, the nearest one first.
func (i Info) Needs(label string) (labels []string) {
	for {
		k := slices.IndexFunc(i.Backups, func(b Backup) bool { return b.Label == label })
		if k < 0 || i.Backups[k].Prior == "" || slices.Contains(labels, i.Backups[k].Prior) {
			return labels
		}
		label = i.Backups[k].Prior
		labels = append(labels, label)
	}
}

// InUse are the labels of the backups that recoveries into a folder are reading, or may be. Locked: one has begun in this very
// moment, and does not say yet which.
func InUse(dir string) (labels []string, err error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), "scratch-") {
			continue
		}
		path := filepath.Join(dir, e.Name())
		left, err := abandoned(path)
		if err != nil {
			return nil, err
		}
		if left != nil { // its process has died
			_ = left.Close()
			continue
		}
		text, err := os.ReadFile(filepath.Join(path, aboutFile))
		if errors.Is(err, fs.ErrNotExist) {
			st, err := os.Stat(path)
			if errors.Is(err, fs.ErrNotExist) || err == nil && time.Since(st.ModTime()) > time.Minute { // it has ended meanwhile, or never began
				continue
			}
		}
		var a about
		if err != nil || json.Unmarshal(text, &a) != nil {
			return nil, fault.New(fault.Locked, "a recovery is beginning in %s", path).WithCode("physical_busy").WithHint("try again")
		}
		labels = append(labels, a.Backup)
	}
	return labels, nil
}
