// Package failpoint holds named places at which a test makes the process fail: it is how "kill -9 at every step" is
// tested. The places are declared once, in All, so that one test loops over them. Without ONEO_FAILPOINTS in the environment a place costs one
// map look-up and does nothing.
package failpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// ErrInjected is what a place armed with "error" returns.
var ErrInjected = errors.New("failure injected by ONEO_FAILPOINTS")

// All lists the places, operation by operation, in the order in which the operation passes them.
var All = []string{
	"create.before", "create.started", "create.schema", "create.finish", "create.after",
	"drop.before", "drop.started", "drop.schema", "drop.finish", "drop.after",
	"purge.before", "purge.started", "purge.schema", "purge.finish", "purge.after",
	"erase.before", "erase.started", "erase.schema", "erase.outside", "erase.finish", "erase.after",
	"left.begun", "left.erased",
	"undrop.before", "undrop.started", "undrop.schema", "undrop.finish", "undrop.after",
	"rename.before", "rename.started", "rename.schema", "rename.finish", "rename.after",
	"suspend.before", "suspend.started", "suspend.schema", "suspend.finish", "suspend.after",
	"resume.before", "resume.started", "resume.schema", "resume.finish", "resume.after",
	"restore.before", "restore.started", "restore.filled", "restore.schema", "restore.finish", "restore.after",
	"return.before", "return.started", "return.schema", "return.finish", "return.after",
	"move.before", "move.started", "move.frozen", "move.arrived", "move.copied", "move.verified", "move.switching", "move.switched",
	"move.retired", "move.opened", "move.finish", "move.after",
	"spare.removed", "spare.made",
	"migrate.before", "migrate.applied", "migrate.tidied", "migrate.begun", "migrate.statement", "migrate.finish",
	"migrate.batch", "migrate.batched", "migrate.after",
	"down.before", "down.applied", "down.after",
	"point.made", "point.copied", "point.noted", "point.expired",
	"undo.before", "undo.built", "undo.kept", "undo.filled", "undo.placed", "undo.after",
	"export.begun", "export.table", "load.begun", "load.table", "load.checked", "merge.table",
	"backup.begun", "backup.stored", "backup.recorded",
	"schedule.taking", "schedule.taken", "schedule.ending",
	"full.holding", "full.held", "full.shared", "full.tenant", "full.copied",
	"refill.shared", "refill.built", "refill.finish", "refill.after", "refill.tenant",
	"run.planning", "run.planned", "run.settling", "run.settled", "run.claimed", "run.worked",
	"physical.copied", "physical.placed", "physical.pruned", "physical.begun", "physical.fetched", "physical.started", "physical.recovered", "physical.whole", "physical.settled",
	"recover.switching", "recover.aside", "recover.switched",
	"sql.bound", "sql.ran", "sql.marked", "sql.committed",
}

var armed = sync.OnceValues(func() (map[string]string, error) {
	return parse(os.Getenv("ONEO_FAILPOINTS"))
})

// hits counts how often each place has been passed that acts from a certain time on.
var hits sync.Map // name -> *atomic.Int64

// parse reads "name=action[,name=action]"; actions are exit, error, panic and wait:FILE. Behind @N an action waits
// for the N-th time that the process comes by: exit@20.
func parse(spec string) (map[string]string, error) {
	places := map[string]string{}
	for part := range strings.SplitSeq(spec, ",") {
		if part == "" {
			continue
		}
		name, action, ok := strings.Cut(part, "=")
		if !ok || !slices.Contains(All, name) {
			return nil, fmt.Errorf("ONEO_FAILPOINTS: %q is no name=action with a known name", part)
		}
		places[name] = action
	}
	return places, nil
}

// Hit does what the environment says for the place: nothing, return ErrInjected, panic, wait until a file is there, or leave the process
// at once without any clean-up, as kill -9 would.
func Hit(name string) error {
	places, err := armed()
	if err != nil {
		return err
	}
	action, ok := places[name]
	if !ok {
		return nil
	}
	action, from, counted := strings.Cut(action, "@")
	if counted {
		nth, err := strconv.ParseInt(from, 10, 64)
		if err != nil {
			return fmt.Errorf("ONEO_FAILPOINTS: %s: %w", name, err)
		}
		n, _ := hits.LoadOrStore(name, new(atomic.Int64))
		if n.(*atomic.Int64).Add(1) < nth {
			return nil
		}
	}
	switch {
	case action == "exit":
		os.Exit(137)
	case action == "error":
		return fmt.Errorf("%s: %w", name, ErrInjected)
	case action == "panic":
		panic("failpoint " + name)
	case strings.HasPrefix(action, "wait:"):
		for {
			_, err := os.Stat(strings.TrimPrefix(action, "wait:"))
			if err == nil {
				return nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("ONEO_FAILPOINTS: %s: %w", name, err)
			}
			time.Sleep(5 * time.Millisecond)
		}
	default:
		return fmt.Errorf("ONEO_FAILPOINTS: %s: unknown action %q (exit, error, panic, wait:FILE)", name, action)
	}
	return nil
}
