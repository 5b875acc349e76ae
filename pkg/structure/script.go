package structure

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/oneo-crm/oneo/pkg/fault"
	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// Script is the statements that make a structure out of an empty schema: those before its rows come, and those after
// them, because they would refuse rows in the order in which they come, slow them down, or do more with them than keep them.
// Owners and rights are not in it, nor policies for roles of a name.
type Script struct {
	Before, After []Step
}

// Script writes the statements that make a structure, in an order that works: it has made it by them, in a transaction
// of the database group that was rolled back, and found what came of it to be the same. Conflict: something in it can only be made by hand.
func (c *Checker) Script(ctx context.Context, group string, s Structure) (Script, error) {
	want := bare(s)
	g := Group{State: Drifted, Differences: Compare(want, Structure{})}
	var script Script
	for _, st := range g.plan() {
		switch step := (Step{SQL: st.sql}); {
		case st.sql == "" || st.off:
		case st.rank < rankConstraint:
			script.Before = append(script.Before, step)
		default:
			script.After = append(script.After, step)
		}
	}
	at := Schema{Name: tenant.ReferenceSchema(rand.Uint64()).String()}
	err := c.o.DB.AsOwner(ctx, group, func(tx *postgres.OwnerTx) error {
		tx.Retire()
		quoted := postgres.Quote(at.Name)
		if err := tx.Script(ctx, "create schema "+quoted+"; set local search_path to "+quoted+", ext, pg_temp; set local check_function_bodies to off"); err != nil {
			return err
		}
		if err := script.make(ctx, tx, at); err != nil {
			return err
		}
		have, err := Read(ctx, tx, at)
		if err != nil {
			return err
		}
		var other []string
		for _, d := range Compare(want, bare(have)) {
			other = append(other, d.String())
		}
		if len(other) > 0 {
			return byHand(strings.Join(other, "; "))
		}
		return errMade
	})
	if !errors.Is(err, errMade) {
		return Script{}, err
	}
	return script, nil
}

func byHand(what string) error {
	return fault.New(fault.Conflict, "the tenant has what plain statements cannot make: %s", what).WithCode("not_as_sql")
}

// bare is a structure without what depends on the roles of its server.
func bare(s Structure) Structure {
	out := Structure{owner: s.owner}
	for _, o := range s.objects {
		if o.kind == "schema" || o.kind == "default privileges" || o.kind == "policy" && o.get("to") != "public" {
			continue
		}
		kept := slices.DeleteFunc(strings.Split(o.attributes, apart), func(a string) bool {
			name, _, _ := strings.Cut(a, "=")
			return name == "owner" || name == "grants" || name == "sequence grants"
		})
		o.attributes = strings.Join(kept, apart)
		out.objects = append(out.objects, o)
	}
	return out
}

// make runs the statements and puts them in the order in which they could be run.
func (s *Script) make(ctx context.Context, tx *postgres.OwnerTx, at Schema) error {
	before, stuck, why, err := inOrder(ctx, tx, s.Before, tried(at))
	if err != nil {
		return err
	}
	for _, step := range stuck {
		// A function may need a view, which rows do not.
		if !strings.HasPrefix(step.SQL, "CREATE OR REPLACE ") {
			return byHand(step.String() + ": " + why.Error())
		}
	}
	after, stuck, why, err := inOrder(ctx, tx, append(stuck, s.After...), tried(at))
	if err != nil {
		return err
	}
	if len(stuck) > 0 {
		return byHand(stuck[0].String() + ": " + why.Error())
	}
	s.Before, s.After = before, after
	return nil
}

// tried is a step as it is tried where there are no rows.
func tried(at Schema) func(Step) string {
	return func(step Step) string {
		sql := strings.TrimRight(step.On(at, ""), " \n;")
		if strings.HasPrefix(sql, "create materialized view ") { // there is nothing to see yet
			sql += "\nwith no data"
		}
		return sql
	}
}

// Run runs the steps for a schema, to which the transaction is bound, by its owner. A step that fails waits for what the others make. When
// no order works it returns the first step that cannot be run, and why; the transaction goes on.
func Run(ctx context.Context, tx *postgres.OwnerTx, at Schema, owner string, steps []Step) (Step, error) {
	_, stuck, why, err := inOrder(ctx, tx, steps, func(s Step) string { return strings.TrimRight(s.On(at, owner), " \n;") })
	if err == nil && len(stuck) > 0 {
		return stuck[0], why
	}
	return Step{}, err
}

// inOrder runs statements: one that fails waits for what the others make, because a view or a function that was
// replaced may need what is younger than itself. stuck are those that never ran, and why is what the first of them failed by.
func inOrder(ctx context.Context, tx *postgres.OwnerTx, steps []Step, sql func(Step) string) (ran, stuck []Step, why, err error) {
	for len(steps) > 0 {
		stuck, why = nil, nil
		for _, step := range steps {
			err := tx.Script(ctx, "savepoint step;\n"+sql(step)+";\nrelease step")
			var refused *pgconn.PgError
			switch {
			case err == nil:
				ran = append(ran, step)
			case errors.As(err, &refused) && ctx.Err() == nil:
				if stuck = append(stuck, step); why == nil {
					why = err
				}
				if err := tx.Script(ctx, "rollback to step; release step"); err != nil {
					return nil, nil, nil, fmt.Errorf("try %s: %w", step, err)
				}
			default:
				return nil, nil, nil, err
			}
		}
		if len(stuck) == len(steps) {
			break
		}
		steps = stuck
	}
	return ran, stuck, why, nil
}
