package structure

import (
	"strings"

	"github.com/oneo-crm/oneo/pkg/postgres"
)

// Step is one statement on the way from one structure to another. Its SQL means no schema and no role yet.
type Step struct {
	What string // the difference that it is for, for a person
	SQL  string
}

// Way is the statements that make the structure to out of the structure from, in order: for a schema that nobody uses
// and that holds no rows, because it takes away what is too much. Where no statement is safe there is none: whoever has
// gone the way compares what has come of it.
func Way(from, to Structure) []Step {
	g := Group{State: Drifted, Differences: Compare(to, from)}
	what := map[string]string{}
	for _, d := range g.Differences {
		for _, s := range d.steps {
			if what[s.sql] == "" {
				what[s.sql] = d.of()
			}
		}
	}
	var way []Step
	for _, s := range g.plan() {
		// Where an identity column begins is no matter without rows.
		if s.sql != "" && !strings.HasPrefix(s.sql, "select pg_catalog.setval(") {
			way = append(way, Step{What: what[s.sql], SQL: s.sql})
		}
	}
	return way
}

// of names what differs, whichever side has it.
func (d Difference) of() string { return oneLine(d.Kind + " " + d.Object) }

// On is the step's SQL for a schema, run by its owner.
func (s Step) On(schema Schema, owner string) string { return render(schema, owner).Replace(s.SQL) }

// String is the step's SQL for a person: @tenant, @owner and @schema stand for what On fills in.
func (s Step) String() string { return oneLine(shown(s.SQL)) }

// render puts the names of a schema and its roles where a description leaves them open.
func render(s Schema, owner string) *strings.Replacer {
	quoted := postgres.Quote(owner)
	return strings.NewReplacer(markSchema, strings.ReplaceAll(s.Name, "'", "''"), markName, postgres.Quote(s.Name),
		markTenant, postgres.Quote(s.Role), markOwner, quoted, markSelf, quoted)
}
