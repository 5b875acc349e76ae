package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/physical"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/registry"
)

// atOptions are the flags by which a moment is named.
type atOptions struct {
	at, before string
}

func (o *atOptions) register(f *pflag.FlagSet) {
	f.StringVar(&o.before, "before", "", "the moment before an `OPERATION` changed anything: the id, or a part of it, of a run of migrations, restore, drop or move")
	f.StringVar(&o.at, "at", "", "the `TIME`: '2026-08-01 14:03:00+02', without an offset in the zone of this machine, or 10m for ten minutes ago")
}

func (o *atOptions) given() bool { return o.at != "" || o.before != "" }

// moment is what the flags name: a time, or the restore points of an operation, with the time of the first of them.
func (o *atOptions) moment(ctx context.Context, a *app.App) (m app.Moment, err error) {
	switch {
	case o.at != "" && o.before != "":
		return m, errUsage{fault.New(fault.Invalid, "--at and --before exclude each other")}
	case o.before == "":
		m.Time, err = o.time(ctx, a)
		return m, err
	}
	err = a.DB.AsOwner(ctx, postgres.MainGroup, func(tx *postgres.OwnerTx) error {
		points, err := registry.PointsOf(ctx, tx, o.before)
		if err == nil {
			m, err = app.MomentOf(points)
		}
		return err
	})
	return m, err
}

// time is the one that --at names.
func (o *atOptions) time(ctx context.Context, a *app.App) (at time.Time, err error) {
	now, err := a.Now(ctx)
	if err != nil {
		if !fault.Is(err, fault.Unavailable) {
			return at, err
		}
		now = time.Now() // the server may be what is to be recovered
	}
	if at, err = physical.ParseTime(o.at, now, time.Local); err != nil {
		return at, errUsage{err}
	}
	if at.After(now) {
		return at, fault.New(fault.Invalid, "%s is in the future: by the server's clock it is %s", physical.Target{Time: at}, now.UTC().Format(time.RFC3339)).WithCode("bad_time")
	}
	return at, nil
}

// recover brings the installation to the moment that the flags name, beside the live one, telling how far it is.
func (o *atOptions) recover(ctx context.Context, e *env, a *app.App, progress, why string, groups []string) (*app.Past, error) {
	at, err := o.moment(ctx, a)
	if err != nil {
		return nil, err
	}
	m, err := newPhases(e, progress)
	if err != nil {
		return nil, err
	}
	e.say("recovering to %s, beside what is live", at)
	start := time.Now()
	past, err := a.Recover(ctx, app.PastOptions{Moment: at, Groups: groups, Why: why, Report: m.tell, Say: e.say})
	m.end()
	if err != nil {
		return nil, err
	}
	for _, c := range past.Clusters {
		last := "no transaction since the backup"
		if !c.Reached.IsZero() {
			last = "the last transaction is of " + c.Reached.UTC().Format("2006-01-02 15:04:05.000Z")
		}
		e.say("recovered from the physical backup %s in %s; %s", c.Backup.Label, time.Since(start).Round(100*time.Millisecond), last)
	}
	return past, nil
}

// phases tells how far a recovery is, on stderr, as meter does for rows.
type phases struct {
	e    *env
	mode string

	mu    sync.Mutex
	phase physical.Phase
	began time.Time // of the phase
	drawn time.Time
	width int
}

func newPhases(e *env, mode string) (*phases, error) {
	m, err := newMeter(e, mode, "")
	if err != nil {
		return nil, err
	}
	return &phases{e: e, mode: m.mode, drawn: time.Now()}, nil
}

// words are the phases as a person reads them.
var words = map[physical.Phase]string{physical.PhaseCopy: "copying", physical.PhaseFetch: "fetching", physical.PhaseVerify: "checking", physical.PhaseReplay: "replaying"}

func (m *phases) tell(cluster string, p physical.Progress) {
	m.mu.Lock()
	defer m.mu.Unlock()
	every := time.Second
	if m.mode == "draw" {
		every = 200 * time.Millisecond
	}
	if p.Phase != m.phase {
		m.phase, m.began = p.Phase, time.Now()
	}
	if m.mode == "none" || time.Since(m.drawn) < every {
		return
	}
	m.drawn = time.Now()
	took := time.Since(m.began)
	var left time.Duration
	if p.Total > 0 && p.Done > 0 && took > time.Second {
		left = time.Duration(float64(took) * float64(max(0, p.Total-p.Done)) / float64(p.Done)).Round(time.Second)
	}
	if m.mode == "json" {
		event := map[string]any{"event": "progress", "cluster": cluster, "phase": string(p.Phase), "bytes": p.Done, "total_bytes": p.Total, "duration_ms": took.Milliseconds()}
		if !p.Moment.IsZero() {
			event["replayed_until"] = p.Moment.UTC()
		}
		if left > 0 {
			event["left_ms"] = left.Milliseconds()
		}
		if line, err := json.Marshal(event); err == nil {
			fmt.Fprintln(m.e.err, string(line))
		}
		return
	}
	line := fmt.Sprintf("%s %s: %s", words[p.Phase], cluster, size(p.Done))
	if p.Total > 0 {
		line += " of " + size(p.Total)
	}
	if !p.Moment.IsZero() {
		line += ", at " + p.Moment.UTC().Format("2006-01-02 15:04:05Z")
	}
	if left > 0 {
		line += fmt.Sprintf(", about %s left", left)
	}
	fmt.Fprint(m.e.err, "\r"+line+strings.Repeat(" ", max(0, m.width-len(line))))
	m.width = len(line)
}

func (m *phases) end() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.width > 0 {
		fmt.Fprint(m.e.err, "\r"+strings.Repeat(" ", m.width)+"\r")
		m.width = 0
	}
}

// pastArchive is a tenant as it was, in a file without a name: it is gone with this process.
type pastArchive struct {
	file   *os.File
	custom string // the sum of what the tenant has beyond its migrations
}
