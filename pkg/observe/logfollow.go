package observe

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/oneo-crm/oneo/pkg/registry"
)

// ByTime puts lines in the order of their times; those of one server keep theirs.
func ByTime(all []LogLine) {
	slices.SortStableFunc(all, func(a, b LogLine) int { return a.At.Compare(b.At) })
}

const (
	// lookEach is how often it is looked which servers there are, and those are tried again that have ended.
	lookEach = time.Second
	// settleFor is how long a line waits for earlier ones of other servers.
	settleFor = 500 * time.Millisecond
)

// Follower follows the logs of all servers.
type Follower struct {
	Client *Client
	Query  LogQuery
	// Servers are those that run now. While it fails those stay that were known.
	Servers func(ctx context.Context) ([]registry.Instance, error)
	// Lines is given some lines, by time as far as they came within half a second; an error ends it all.
	Lines func([]LogLine) error
	// Lost is told once of each server that does not answer, or does not any more, and Found of one that does again; Asked when
	// Servers fails, once, and with nil when it does not any more.
	Lost  func(s registry.Instance, err error)
	Found func(s registry.Instance)
	Asked func(err error)
}

// Run follows until ctx ends or Lines fails. No line that a server keeps is handed over twice or left out.
func (f *Follower) Run(ctx context.Context) error {
	ctx, stop := context.WithCancel(ctx)
	var reading sync.WaitGroup
	defer reading.Wait()
	defer stop()
	type ended struct {
		id   uuid.UUID
		last int64 // the number of the last line that it has handed over
		err  error
	}
	type state struct {
		s             registry.Instance
		last          int64
		reading, lost bool
	}
	lines, ends := make(chan LogLine, 1024), make(chan ended)
	known := map[uuid.UUID]*state{}
	start := func(st *state) {
		st.reading = true
		q, s := f.Query, st.s
		q.Follow, q.After = true, st.last
		reading.Go(func() {
			last := q.After
			err := f.Client.Logs(ctx, s, q, func(l LogLine) error {
				select {
				case lines <- l:
					last = max(last, l.Number)
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			})
			select {
			case ends <- ended{s.ID, last, err}:
			case <-ctx.Done():
			}
		})
	}
	asked := true
	look := func() {
		servers, err := f.Servers(ctx)
		if ctx.Err() != nil {
			return
		}
		if (err == nil) != asked {
			asked = err == nil
			f.Asked(err)
		}
		if err == nil {
			for id, st := range known {
				if !st.reading && !slices.ContainsFunc(servers, func(s registry.Instance) bool { return s.ID == id }) {
					delete(known, id)
				}
			}
			for _, s := range servers {
				if known[s.ID] == nil {
					known[s.ID] = &state{s: s}
				}
			}
		}
		for _, st := range known {
			if !st.reading {
				start(st)
			}
		}
	}
	look()
	looking, settling := time.NewTicker(lookEach), time.NewTicker(settleFor)
	defer looking.Stop()
	defer settling.Stop()
	var waiting []LogLine
	ripe := 0 // the first of them have waited since the last tick
	for {
		select {
		case l := <-lines:
			if st := known[l.Instance.ID]; st != nil && st.reading && st.lost {
				st.lost = false
				f.Found(st.s)
			}
			waiting = append(waiting, l)
		case e := <-ends:
			st := known[e.id]
			st.reading, st.last = false, e.last
			if !st.lost {
				st.lost = true
				f.Lost(st.s, e.err)
			}
		case <-looking.C:
			look()
		case <-settling.C:
			if ripe > 0 {
				latest := slices.MaxFunc(waiting[:ripe], func(a, b LogLine) int { return a.At.Compare(b.At) }).At
				ByTime(waiting)
				if ripe = slices.IndexFunc(waiting, func(l LogLine) bool { return l.At.After(latest) }); ripe < 0 {
					ripe = len(waiting)
				}
				if err := f.Lines(waiting[:ripe]); err != nil {
					return err
				}
				waiting = slices.Clone(waiting[ripe:])
			}
			ripe = len(waiting)
		case <-ctx.Done():
			return nil
		}
	}
}
