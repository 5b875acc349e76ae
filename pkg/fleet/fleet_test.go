package fleet_test

import (
	"context"
	"errors"
	"strconv"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"github.com/oneo-crm/oneo/pkg/fleet"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func numbers(n int) []int {
	out := make([]int, n)
	for i := range out {
		out[i] = i
	}
	return out
}

func TestEveryItemHasOneOutcomeInOrder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n, jobs, bad := rapid.IntRange(0, 60).Draw(t, "n"), rapid.IntRange(0, 9).Draw(t, "jobs"), rapid.IntRange(1, 7).Draw(t, "bad")
		var now, most atomic.Int64
		seen := 0
		r := fleet.Run(context.Background(), numbers(n), fleet.Options{Jobs: jobs, Each: func(fleet.Outcome) { seen++ }}, strconv.Itoa,
			func(_ context.Context, i int) fleet.Outcome {
				most.Store(max(most.Load(), now.Add(1)))
				defer now.Add(-1)
				if i%bad == 0 {
					return fleet.Outcome{Status: fleet.Failed, Err: errors.New("bad")}
				}
				return fleet.Outcome{Status: fleet.OK}
			})
		require.Len(t, r.Outcomes, n)
		require.Equal(t, n, seen)
		require.LessOrEqual(t, most.Load(), int64(max(1, jobs)))
		for i, o := range r.Outcomes {
			require.Equal(t, strconv.Itoa(i), o.Tenant)
			require.Equal(t, i%bad == 0, o.Status == fleet.Failed)
		}
	})
}

func TestAPanicIsOneTenantsFailure(t *testing.T) {
	r := fleet.Run(context.Background(), numbers(3), fleet.Options{Jobs: 2}, strconv.Itoa, func(_ context.Context, i int) fleet.Outcome {
		if i == 1 {
			panic("oops")
		}
		return fleet.Outcome{Status: fleet.OK}
	})
	require.Equal(t, 2, r.Count(fleet.OK))
	require.ErrorContains(t, r.Outcomes[1].Err, "oops")
	require.Equal(t, fleet.Failed, r.Outcomes[1].Status)
	require.NotContains(t, r.Outcomes[1].Err.Error(), "goroutine", "a report shows no stack")
	var p *fleet.Panic
	require.ErrorAs(t, r.Outcomes[1].Err, &p)
	require.Contains(t, string(p.Stack), "fleet_test.go", "the stack is kept for the log")
}

func TestMaxFailuresAndTheContextStopBeginning(t *testing.T) {
	r := fleet.Run(context.Background(), numbers(10), fleet.Options{Jobs: 1, MaxFailures: 2}, strconv.Itoa, func(context.Context, int) fleet.Outcome {
		return fleet.Outcome{Status: fleet.Failed, Err: errors.New("bad")}
	})
	require.Equal(t, 2, r.Count(fleet.Failed))
	require.True(t, r.Interrupted())

	ctx, cancel := context.WithCancel(context.Background())
	r = fleet.Run(ctx, numbers(10), fleet.Options{Jobs: 1}, strconv.Itoa, func(ctx context.Context, i int) fleet.Outcome {
		if i == 3 {
			cancel()
		}
		require.NoError(t, ctx.Err(), "work in hand is finished")
		return fleet.Outcome{Status: fleet.OK}
	})
	require.Equal(t, 4, r.Count(fleet.OK))
	require.ErrorIs(t, r.Outcomes[4].Err, fleet.ErrNotBegun)
}

func TestAnErrorIsAFailureWhateverTheStatusSays(t *testing.T) {
	r := fleet.Run(context.Background(), numbers(3), fleet.Options{}, strconv.Itoa, func(_ context.Context, i int) fleet.Outcome {
		return []fleet.Outcome{{}, {Err: errors.New("bad")}, {Status: fleet.OK, Err: errors.New("bad")}}[i]
	})
	require.Equal(t, fleet.OK, r.Outcomes[0].Status)
	require.Equal(t, fleet.Failed, r.Outcomes[1].Status)
	require.Equal(t, fleet.Failed, r.Outcomes[2].Status)
}

func TestOutcomesComeInTheOrderOfTheirEnds(t *testing.T) {
	second := make(chan struct{})
	var ended []string
	r := fleet.Run(context.Background(), numbers(2), fleet.Options{Jobs: 2, Each: func(o fleet.Outcome) {
		if ended = append(ended, o.Tenant); o.Tenant == "1" {
			close(second)
		}
	}}, strconv.Itoa, func(_ context.Context, i int) fleet.Outcome {
		if i == 0 {
			<-second
		}
		return fleet.Outcome{}
	})
	require.Equal(t, []string{"1", "0"}, ended)
	require.Equal(t, "0", r.Outcomes[0].Tenant, "the report is in the order of the plan")
}
