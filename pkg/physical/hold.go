package physical

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// useFile is held shared by everybody who reads a cluster that is kept, and alone by who removes it.
const useFile = "use"

// Keep offers the cluster to other processes until a time. Its own process waits there, and closes it behind the last who reads.
func (c *Cluster) Keep(name string, until time.Time) error {
	if c.held == nil {
		return errors.New("the cluster is another process's")
	}
	if err := os.WriteFile(filepath.Join(c.dir, useFile), nil, 0o600); err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(c.dir, aboutFile))
	if err != nil {
		return err
	}
	var a about
	if err := json.Unmarshal(text, &a); err != nil {
		return err
	}
	a.Kept = &kept{Cluster: name, At: c.Target.Time.UTC(), Point: c.Target.Point, Until: until.UTC(), Run: c.run, Backup: c.Backup, Reached: c.Reached}
	if text, err = json.Marshal(a); err != nil {
		return err
	}
	// In place: the file is held. Who reads half of it takes the cluster for one that is not kept.
	if err := c.held.Truncate(0); err != nil {
		return err
	}
	_, err = c.held.WriteAt(append(text, '\n'), 0)
	return err
}

// Unused waits until nobody reads the cluster any more, and keeps everybody from beginning to.
func (c *Cluster) Unused(ctx context.Context) error {
	f, err := os.OpenFile(filepath.Join(c.dir, useFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			return err // f stays open, and the lock with it, for as long as this process
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

// kept is what another process must know of a cluster to read it.
type kept struct {
	Cluster string    `json:"cluster"`
	At      time.Time `json:"at"`
	Point   string    `json:"point,omitempty"`
	Until   time.Time `json:"until"`
	Run     string    `json:"run"`
	Backup  Backup    `json:"backup"`
	Reached time.Time `json:"reached"`
}

// Attach finds a cluster of that name that another process keeps at the target. nil: there is none. It must be closed, which leaves it to
// its process.
func Attach(dir, name string, t Target) (*Cluster, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), scratchPrefix) {
			continue
		}
		path := filepath.Join(dir, e.Name())
		c, err := attach(path, name, t)
		if err != nil {
			return nil, fmt.Errorf("look at %s: %w", path, err)
		}
		if c != nil {
			return c, nil
		}
	}
	return nil, nil
}

func attach(dir, name string, t Target) (*Cluster, error) {
	use, err := os.OpenFile(filepath.Join(dir, useFile), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	c, err := whenKept(dir, name, t, use)
	if c == nil {
		_ = use.Close()
	}
	return c, err
}

func whenKept(dir, name string, t Target, use *os.File) (*Cluster, error) {
	if err := syscall.Flock(int(use.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, nil // it is being removed
	} else if err != nil {
		return nil, err
	}
	held, err := os.Open(filepath.Join(dir, aboutFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer held.Close()
	// Its process has died where nobody holds it.
	if err := syscall.Flock(int(held.Fd()), syscall.LOCK_SH|syscall.LOCK_NB); !errors.Is(err, syscall.EWOULDBLOCK) {
		return nil, err
	}
	text, err := io.ReadAll(held)
	if err != nil {
		return nil, err
	}
	var a about
	if err := json.Unmarshal(text, &a); err != nil || a.Kept == nil {
		return nil, nil //nolint:nilerr // it is being written
	}
	k := a.Kept
	if k.Cluster != name || !k.At.Equal(t.Time) || k.Point != t.Point || time.Now().After(k.Until) {
		return nil, nil
	}
	return &Cluster{Target: t, Backup: k.Backup, Reached: k.Reached, dir: dir, run: k.Run, use: use}, nil
}
