// Package physical takes whole clusters back to any moment that their physical backups and archived WAL reach. Proven engines
// make, keep and fetch both; it reads no WAL and has no format of blocks of its own. It promises: a recovered cluster stands
// at the moment that was asked for or there is none; it is reached by this machine's oneo alone, archives nothing, and ends
// with the process that made it; and the cluster that was backed up is not touched.
package physical

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Engine makes and keeps the physical backups of one cluster. Its methods may be called by several processes at once.
type Engine interface {
	// Name is the engine's, as it is configured.
	Name() string
	// Plan is what the cluster and this machine need before WAL is archived. Nothing is changed.
	Plan(ctx context.Context) (Plan, error)
	// Prepare makes the repository. It is idempotent. Conflict: the repository is another cluster's.
	Prepare(ctx context.Context) error
	// Create makes a backup. One that fails or whose process dies is none.
	Create(ctx context.Context, o CreateOptions) (Backup, error)
	// Info is what the repository holds; it needs no running cluster.
	Info(ctx context.Context) (Info, error)
	// Verify reads a backup and its WAL again and compares them with their checksums. Unfit: they are not what was written.
	Verify(ctx context.Context, label string, report func(Progress)) error
	// Prune removes backups by their labels, and the WAL that no backup needs any more.
	Prune(ctx context.Context, labels []string) error
	// Fetch puts the data folder of a backup at dir, which is empty and belongs to PostgreSQL's user, verified, without settings
	// of a recovery. Where the engine can, only the databases of only are whole; none: all.
	Fetch(ctx context.Context, b Backup, dir string, only []string, report func(Progress)) error
	// RestoreCommand is PostgreSQL's restore_command for the repository.
	RestoreCommand() string
}

// Plan is what must be done before a cluster's WAL is archived.
type Plan struct {
	// Settings of the cluster, and which of them want a restart.
	Settings map[string]string
	Restart  []string
	// SQL is run by a superuser in the group's database.
	SQL []string
	// Files are written on the machine of the cluster: text by path.
	Files map[string]string
	// HBA is a line of pg_hba.conf that may be missing; empty: none is needed.
	HBA string
}

// Kind is how much of the cluster a backup copies.
type Kind string

// Kinds of backups. Those that copy changes only are made by pgBackRest alone.
const (
	Full         Kind = "full"
	Differential Kind = "diff"
	Incremental  Kind = "incr"
)

// CreateOptions say how a backup is made.
type CreateOptions struct {
	Kind   Kind // empty: Full
	Report func(Progress)
}

// Backup is one physical backup.
type Backup struct {
	Label string `json:"label"`
	Kind  Kind   `json:"kind"`
	Prior string `json:"prior,omitempty"` // the backup that it needs
	// Start and Stop are when it was made. No moment before Stop can be reached from it.
	Start time.Time `json:"start"`
	Stop  time.Time `json:"stop"`
	// StartLSN is where the replay of WAL begins, StopLSN the first place at which the copy is consistent.
	StartLSN LSN    `json:"start_lsn"`
	StopLSN  LSN    `json:"stop_lsn"`
	Timeline uint32 `json:"timeline"`
	Bytes    int64  `json:"size_bytes"`   // of the data folder
	Stored   int64  `json:"stored_bytes"` // in the repository, without WAL
	System   string `json:"system"`       // the cluster's identifier
	Major    int    `json:"major"`        // PostgreSQL's version
	Bad      string `json:"bad,omitempty"`
}

// Info is what a repository holds.
type Info struct {
	System  string // of the cluster; empty: nothing is known yet
	Backups []Backup
	// WAL are the stretches of archived WAL without a gap, oldest first.
	WAL []Stretch
}

// Stretch is WAL without a gap: its first and last segment on one timeline, by their names, and when they were archived.
type Stretch struct {
	First string    `json:"first"`
	Last  string    `json:"last"`
	From  time.Time `json:"from"`
	Until time.Time `json:"until"`
	// Bytes of the segments, as PostgreSQL wrote them.
	Bytes int64 `json:"size_bytes"`
}

// Progress is how far a phase has come.
type Progress struct {
	Phase Phase
	Done  int64 // bytes
	Total int64 // bytes; 0: unknown
	// Moment is what the replay has reached; zero: nothing yet, or another phase.
	Moment time.Time
}

// Phase is a part of making or fetching a backup, or of a recovery.
type Phase string

// Phases.
const (
	PhaseCopy   Phase = "copy"
	PhaseFetch  Phase = "fetch"
	PhaseVerify Phase = "verify"
	PhaseReplay Phase = "replay"
)

// LSN is a place in the WAL.
type LSN uint64

// ParseLSN reads PostgreSQL's form.
func ParseLSN(s string) (LSN, error) {
	high, low, ok := strings.Cut(s, "/")
	h, err1 := strconv.ParseUint(high, 16, 32)
	l, err2 := strconv.ParseUint(low, 16, 32)
	if !ok || err1 != nil || err2 != nil {
		return 0, fmt.Errorf("%q is no place in the WAL", s)
	}
	return LSN(h<<32 | l), nil
}

// String is PostgreSQL's form.
func (l LSN) String() string { return fmt.Sprintf("%X/%X", uint64(l)>>32, uint32(l)) }

// MarshalText is PostgreSQL's form.
func (l LSN) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// UnmarshalText reads PostgreSQL's form.
func (l *LSN) UnmarshalText(text []byte) (err error) {
	*l, err = ParseLSN(string(text))
	return err
}

// Segment is the name of the file of WAL that holds the place, on a timeline, with segments of that many bytes.
func (l LSN) Segment(timeline uint32, size int64) string {
	n := uint64(l) / uint64(size)
	each := uint64(1) << 32 / uint64(size)
	return fmt.Sprintf("%08X%08X%08X", timeline, n/each, n%each)
}
