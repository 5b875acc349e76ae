package tui

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/fault"
)

// shows are the screens that are held as files, each after some keys.
var shows = []struct {
	name string
	act  func(s *stage)
}{
	{"home", func(s *stage) { s.later(3) }},
	{"home-lost", func(s *stage) {
		s.source.set(func() { s.source.fail = fault.New(fault.Unavailable, "PostgreSQL cannot be reached") })
		s.later(12)
	}},
	{"tenants", func(s *stage) { s.later(3); s.keys("2", "down", "space") }},
	{"tenants-details", func(s *stage) { s.keys("2", "d") }},
	{"tenants-filter", func(s *stage) { s.keys("2", "/"); s.write("!/^a|ta/"); s.keys("enter") }},
	{"tenants-suspend", func(s *stage) { s.keys("2", "s") }},
	{"tenants-suspended", func(s *stage) { s.keys("2", "s", "enter") }},
	{"tenants-drop", func(s *stage) { s.keys("2", "D"); s.write("ac") }},
	{"tenants-keys", func(s *stage) { s.keys("2", "?") }},
	{"migrations", func(s *stage) { s.keys("3") }},
	{"tasks", func(s *stage) { s.keys("3", "enter", "down", "d") }},
	{"backups", func(s *stage) { s.keys("4") }},
	{"queries", func(s *stage) { s.keys("5", "d") }},
	{"locks", func(s *stage) { s.keys("6") }},
	{"operations", func(s *stage) { s.keys("7", "down", "d") }},
	{"audit", func(s *stage) { s.keys("8") }},
	{"domains", func(s *stage) { s.keys("9") }},
	{"users", func(s *stage) { s.keys("2", "enter") }},
	{"logs", func(s *stage) { s.keys("0") }},
}

func TestScreensAreAsCommitted(t *testing.T) {
	for _, size := range [][2]int{{80, 24}, {120, 40}, {200, 50}} {
		for _, show := range shows {
			name := fmt.Sprintf("%s-%dx%d", show.name, size[0], size[1])
			t.Run(name, func(t *testing.T) {
				s := play(t, size[0], size[1])
				first := s.source.load[0]
				earlier := first
				earlier.At, earlier.All.Requests, earlier.All.Errors, earlier.All.DatabaseSeconds = noon, 0, 0, 0
				earlier.Tenants, earlier.Redis.Hits, earlier.Redis.Misses, earlier.Pools = nil, 0, 0, []Pool{{Group: "main", Max: 32, InUse: 7}}
				s.readings = []Reading{earlier}
				show.act(s)
				path := filepath.Join("testdata", name+".golden")
				if os.Getenv("ONEO_UPDATE_GOLDEN") != "" {
					require.NoError(t, os.MkdirAll("testdata", 0o755))
					require.NoError(t, os.WriteFile(path, []byte(s.text()), 0o644))
				}
				want, err := os.ReadFile(path)
				require.NoError(t, err, "ONEO_UPDATE_GOLDEN=1 writes it")
				require.Equal(t, string(want), s.text())
			})
		}
	}
}
