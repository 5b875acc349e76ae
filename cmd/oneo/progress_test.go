package main

import (
	"bytes"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/fleet"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// events tells a progress of ten tenants, of which one was busy and one has failed, and returns which events it wrote.
func events(t *testing.T, p *progress) []string {
	t.Helper()
	var out bytes.Buffer
	p.e.err = &out
	for i := range 10 {
		task := rollout.Task{Slug: "t" + string(rune('0'+i))}
		counts := rollout.Counts{OK: i + 1, Queued: 9 - i}
		ev := rollout.Event{Task: &task, Outcome: rollout.Outcome{Status: fleet.OK}, Counts: counts, Run: rollout.Run{Waves: 1, Counts: counts}}
		switch i {
		case 3:
			ev.Outcome.Err, ev.Again = fault.New(fault.Locked, "busy"), time.Second
		case 4:
			ev.Outcome = rollout.Outcome{Status: fleet.Failed, Err: fault.New(fault.Unfit, "no")}
		}
		p.told(ev)
	}
	p.end()
	p.say("that was all")
	var all []string
	for line := range strings.Lines(out.String()) {
		var o struct{ Event string }
		require.NoError(t, json.Unmarshal([]byte(line), &o), line)
		if o.Event != "progress" || !slices.Contains(all, o.Event) { // how many there are is a matter of time
			all = append(all, o.Event)
		}
	}
	return all
}

// Without a terminal a run that ends soon says its last word and nothing else; a longer one how far it is, now and then.
func TestProgressIsBrief(t *testing.T) {
	t.Parallel()
	make := func(mode string, since time.Duration) *progress {
		p, err := newProgress(&env{err: &bytes.Buffer{}}, mode, rollout.Run{})
		require.NoError(t, err)
		p.began = p.began.Add(-since)
		return p
	}
	require.Equal(t, []string{"note"}, events(t, make("auto", -time.Hour)), "an hour before it may speak")
	require.Equal(t, []string{"progress", "busy", "tenant", "note"}, events(t, make("auto", time.Hour)))
	p := make("auto", -time.Hour)
	require.Equal(t, []string{"note"}, events(t, p))
	p.began = p.began.Add(-2 * time.Hour)
	require.Equal(t, []string{"busy", "tenant", "progress", "busy", "tenant", "note"}, events(t, p), "what went wrong before is told then")
	all := events(t, make("json", 0))
	require.Equal(t, []string{"tenant", "progress", "tenant", "tenant", "busy", "tenant", "tenant", "tenant", "tenant", "tenant", "tenant", "note"}, all)
}
