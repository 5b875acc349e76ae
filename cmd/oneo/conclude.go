package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/oneo-crm/oneo/pkg/app"
	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/rollout"
)

// madeKinds say of a run's tasks which of them stand, from what the work leaves in the tenants' own group. Kinds that are
// not here stay open until somebody resumes them: a statement that changes rows, or steps down, would be done a second
// time by the same command once its run had ended; undoing owes the caches word of what it has changed; and of reading
// and of programs nothing is left to see.
var madeKinds = map[string]func(ctx context.Context, a *app.App, run rollout.Run, tasks []rollout.Task) (map[int32]bool, error){
	kindMigrate: migrated,
	kindMark:    migrated,
	kindDown:    takenDown,
}

// concludeRuns ends the runs whose work is done and whose processes died before they wrote so. It is no part of what was
// asked for: what fails is told, and nothing more.
func concludeRuns(ctx context.Context, e *env, a *app.App) {
	ended, err := a.Rollout.Conclude(ctx, func(ctx context.Context, run rollout.Run, tasks []rollout.Task) (map[int32]bool, error) {
		if made := madeKinds[run.Kind]; made != nil {
			return made(ctx, a, run, tasks)
		}
		return nil, nil
	})
	for _, run := range ended {
		e.say("the run %s had nothing left to do, and its process died before it could write so: it is %s", run.ID, run.State)
	}
	if err != nil {
		e.say("runs of processes that died were not all looked at: %s", fault.Of(err).Message)
	}
}

// byGroup are the numbers of the tasks' tenants in each database group.
func byGroup(tasks []rollout.Task) map[string][]int32 {
	groups := map[string][]int32{}
	for _, t := range tasks {
		groups[t.Group] = append(groups[t.Group], t.Number)
	}
	return groups
}

// migrated are the tenants that are as far as their tasks were to bring them, batches beside later migrations included.
func migrated(ctx context.Context, a *app.App, _ rollout.Run, tasks []rollout.Task) (map[int32]bool, error) {
	made, err := atVersion(ctx, a, tasks, func(version, to int) bool { return version >= to })
	if err != nil {
		return nil, err
	}
	for group := range byGroup(tasks) {
		late, err := a.Migrate.TenantsBehind(ctx, group)
		if fault.Is(err, fault.Conflict) {
			return nil, nil // other files than the run's: nothing can be said
		}
		if err != nil {
			return nil, err
		}
		for _, b := range late {
			if b.Beside {
				delete(made, b.Number)
			}
		}
	}
	return made, nil
}

// takenDown are the tenants that were taken down to a version that the command named.
func takenDown(ctx context.Context, a *app.App, run rollout.Run, tasks []rollout.Task) (map[int32]bool, error) {
	var r aimedRequest
	if err := json.Unmarshal(run.Request, &r); err != nil {
		return nil, fmt.Errorf("read what the run %s was to do: %w", run.ID, err)
	}
	if r.Steps > 0 {
		return nil, nil
	}
	return atVersion(ctx, a, tasks, func(version, to int) bool { return version <= to })
}

func atVersion(ctx context.Context, a *app.App, tasks []rollout.Task, there func(version, to int) bool) (map[int32]bool, error) {
	made := map[int32]bool{}
	versions := map[int32]int{}
	for group, numbers := range byGroup(tasks) {
		found, err := a.Migrate.Versions(ctx, group, numbers)
		if err != nil {
			return nil, err
		}
		for number, version := range found {
			versions[number] = version
		}
	}
	for _, t := range tasks {
		if version, placed := versions[t.Number]; placed && there(version, t.To) {
			made[t.Number] = true
		}
	}
	return made, nil
}
