package config_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/oneo-crm/oneo/pkg/config"
)

func TestDueTimesAreThoseOfTheirTimeZone(t *testing.T) {
	next := func(s config.Schedule, after string) string {
		times, err := s.Times()
		require.NoError(t, err)
		at, err := time.Parse(time.RFC3339, after)
		require.NoError(t, err)
		return times.Next(at).Format(time.RFC3339)
	}
	berlin := config.Schedule{Cron: "30 2 * * *", TimeZone: "Europe/Berlin"}
	require.Equal(t, "2026-11-26T02:30:00Z", next(config.Schedule{Cron: "30 2 * * *"}, "2026-11-25T22:00:00Z"), "UTC unless it is said")
	require.Equal(t, "2026-11-26T01:30:00Z", next(berlin, "2026-11-25T22:00:00Z"))
	// 02:30 does not exist on the day on which summer time begins, and comes twice on the day on which it ends.
	require.Equal(t, "2026-03-30T00:30:00Z", next(berlin, "2026-03-28T12:00:00Z"))
	require.Equal(t, "2026-10-25T00:30:00Z", next(berlin, "2026-10-24T12:00:00Z"))
	require.Equal(t, "2026-10-25T01:30:00Z", next(berlin, "2026-10-25T00:30:00Z"))
}
