package structure

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/oneo-crm/oneo/pkg/postgres"
	"github.com/oneo-crm/oneo/pkg/tenant"
)

// step is one statement of a repair, or a sentence where no statement is safe.
type step struct {
	rank int    // statements of a lower rank come first
	ord  uint32 // within a rank
	sql  string
	// note is said above the statement.
	note string
	// off leaves the statement to a person: it is written as a comment.
	off bool
}

// The order of a repair: what is in the way goes first, then comes what others are made of.
const (
	rankBefore = iota // in a transaction of its own
	rankOwner         // needs a superuser
	rankAway
	rankType
	rankSequence
	rankMake // tables and functions, in the order of the reference
	rankColumn
	rankNotNull
	rankDefault
	rankConstraint
	rankForeignKey
	rankIndex
	rankView
	rankTrigger
	rankSetting
	rankRevoke
	rankGrant
	rankAdvice
	rankSurplus // left to a person
)

// Repair is the SQL that brings a tenant of the group back to its reference, as a script of one transaction for psql,
// run as the owner. It fails at its first line while another operation is at work on the tenant. What is too much is dropped by lines that are commented out, each under a warning; a sentence stands
// where no statement is safe. It is empty where there is nothing to repair.
func (g Group) Repair(t tenant.Tenant) string {
	switch g.State {
	case Missing:
		return fmt.Sprintf("-- %s: its schema is gone, or was made again behind oneo's back: restore it from a backup.\n", t.Slug)
	case Drifted:
	default:
		return ""
	}
	s := g.schemas[t.Number]
	schema, owner := postgres.Quote(s.Name), postgres.Quote(g.owner)
	words := render(s, g.owner)
	var b strings.Builder
	const claim = `do $$ begin if not pg_catalog.pg_try_advisory_xact_lock(%d, %d) then raise 'another operation is at work on this tenant'; end if; if public.held_by(%[2]d) is not null then raise 'a full backup has not copied this tenant yet'; end if; end $$`
	begin := fmt.Sprintf("begin;\n"+claim+";\nset local lock_timeout to '5s';\nset local search_path to %s, ext, pg_temp;\nset local check_function_bodies to off;\n",
		postgres.OperationLock, t.Number, schema)
	asOwner := false
	for _, st := range g.plan() {
		if st.rank > rankBefore {
			b.WriteString(begin)
			begin = ""
		}
		if st.rank > rankOwner && !asOwner {
			fmt.Fprintf(&b, "set local role %s;\n", owner)
			asOwner = true
		}
		if st.note != "" {
			b.WriteString(comment(words.Replace(st.note)) + "\n")
		}
		if st.sql == "" {
			continue
		}
		sql := strings.TrimRight(words.Replace(st.sql), " \n;") + ";"
		if st.off {
			sql = comment(sql)
		}
		b.WriteString(sql + "\n")
	}
	if begin == "" {
		b.WriteString("commit;\n")
	}
	return b.String()
}

// comment makes every line of a text a comment. psql ends a line at a carriage return as well.
func comment(text string) string {
	return "-- " + strings.NewReplacer("\r\n", "\n-- ", "\n", "\n-- ", "\r", "\n-- ").Replace(text)
}

// plan is the steps of all differences, in order, each once.
func (g Group) plan() []step {
	var all []step
	said := map[string]bool{}
	for _, d := range g.Differences {
		for _, s := range d.steps {
			key := s.sql + "\x00" + s.note
			if !said[key] {
				said[key] = true
				all = append(all, s)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b step) int { return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.ord, b.ord)) })
	return all
}

func do(rank int, format string, args ...any) step {
	return step{rank: rank, sql: fmt.Sprintf(format, args...)}
}

func advise(format string, args ...any) []step {
	return []step{{rank: rankAdvice, note: fmt.Sprintf(format, args...)}}
}

// noted puts a sentence above a statement.
func (s step) noted(format string, args ...any) step {
	s.note = fmt.Sprintf(format, args...)
	return s
}

// create makes an object of the reference with all that belongs to it.
func (c *comparison) create(o object) []step {
	var first []step
	name, parent := o.quoted(), ""
	if p, part := o.parent(); part {
		parent = postgres.Quote(p)
	}
	definition := o.get("definition")
	switch o.kind {
	case "table":
		first = append(first, c.createTable(o))
	case "view", "materialized view":
		first = append(first, do(rankView, "create %s %s as\n%s", o.kind, name, definition))
	case "composite type":
		var columns []string
		for _, p := range c.columns(o.name) {
			columns = append(columns, postgres.Quote(p.part())+" "+p.get("type")+prefixed(" collate ", p.get("collation")))
		}
		first = append(first, do(rankType, "create type %s as (%s)", name, strings.Join(columns, ", ")))
	case "enum":
		first = append(first, do(rankType, "create type %s as enum (%s)", name, strings.ReplaceAll(o.get("labels"), comma, ", ")))
	case "domain":
		first = append(first, do(rankType, "create domain %s as %s%s%s%s", name, o.get("type"), prefixed(" collate ", o.get("collation")),
			prefixed(" default ", o.get("default")), when(o.get("not null") != "", " not null")))
	case "range type":
		first = append(first, do(rankType, "create type %s as range (%s)", name, definition))
	case "sequence":
		first = append(first, do(rankSequence, "create%s sequence %s %s", when(o.get("unlogged") != "", " unlogged"), name, definition))
	case "function", "procedure":
		first = append(first, do(rankMake, "%s", definition))
	case "column":
		if parentIs(c, o, "composite type") {
			first = append(first, do(rankColumn, "alter type %s add attribute %s %s%s", parent, name, o.get("type"), prefixed(" collate ", o.get("collation"))))
			break
		}
		if parentIs(c, o, "view") || parentIs(c, o, "materialized view") {
			break
		}
		add := do(rankColumn, "alter table %s add column %s%s%s", parent, c.columnText(o), prefixed(" default ", o.get("default")),
			when(o.get("not null") != "" && o.get("identity") == "", " not null"))
		if o.get("not null") != "" && o.get("default") == "" && o.get("generated") == "" && o.get("identity") == "" {
			add = add.noted("It fails where the table has rows: the migrations give the column no default. Add it without \"not null\" and fill it first.")
		}
		first = append(first, add)
	case "constraint":
		first = append(first, c.addConstraint(o))
	case "domain constraint":
		first = append(first, do(rankConstraint, "alter domain %s add constraint %s %s%s", parent, name, definition, when(o.get("not valid") != "", " not valid")))
	case "index":
		// Of a partitioned table PostgreSQL describes an index that its partitions lack, which would be no valid one.
		for _, q := range []string{o.part(), name} {
			definition = strings.Replace(definition, "INDEX "+q+" ON ONLY ", "INDEX "+q+" ON ", 1)
		}
		rank := rankIndex
		if parentIs(c, o, "materialized view") {
			rank = rankTrigger
		}
		first = append(first, do(rank, "%s", definition).noted("A plain index: it keeps writers waiting while it is built. "+
			"On a large table make it with \"concurrently\", outside a transaction."))
	case "trigger", "rule":
		first = append(first, do(rankTrigger, "%s", definition))
	case "policy":
		first = append(first, do(rankTrigger, "create policy %s on %s as %s for %s to %s%s%s", name, parent, cmp.Or(when(o.get("restrictive") != "", "restrictive"), "permissive"),
			cmp.Or(o.get("for"), "all"), roles(o.get("to")), enclosed(" using (", o.get("using")), enclosed(" with check (", o.get("with check"))))
	case "statistics":
		first = append(first, do(rankTrigger, "%s", definition))
	case "default privileges":
		return c.grants(o, list(o.get("grants")), nil)
	default:
		return advise("The %s %s is missing. It has to be made by hand, as the migrations make it.", o.kind, o.name)
	}
	for i := range first {
		first[i].ord = o.ord
	}
	first = append(first, c.dress(o)...)
	for _, p := range c.parts[o.name] {
		switch {
		case !o.holds():
		case p.kind == "column":
			first = append(first, c.dress(p)...)
		default:
			first = append(first, c.create(p)...)
		}
	}
	return first
}

// dress gives an object that has just been made the attributes that its making does not give.
func (c *comparison) dress(o object) []step {
	var steps []step
	bare := object{kind: o.kind, name: o.name}
	for _, n := range o.names() {
		v := o.get(n)
		switch n {
		case "options", "toast options", "row security", "forced row security", "replica identity", "clustered", "enabled", "compression",
			"statistics", "owned by":
			steps = append(steps, c.alter(o, bare, n, v, "")...)
		case "storage":
			if !strings.HasSuffix(v, usual) {
				steps = append(steps, c.alter(o, bare, n, v, "")...)
			}
		case "default": // of a table's column it may need a function that is made later
			if parent, _ := o.parent(); o.kind == "column" && c.lost[parent] {
				steps = append(steps, c.alter(o, bare, n, v, "")...)
			}
		case "not null":
			if o.kind == "column" && o.get("inherited") != "" {
				steps = append(steps, c.alter(o, bare, n, v, "")...)
			}
		case "grants":
			if o.kind != "column" && o.kind != "enum" && o.kind != "range type" && o.kind != "domain" {
				steps = append(steps, do(rankRevoke, "revoke all on %s from public, %s", target(o), markTenant))
			}
			// The owner has its own rights from the start.
			steps = append(steps, c.grants(o, slices.DeleteFunc(list(v), func(g string) bool { return strings.HasPrefix(g, markSelf) }), nil)...)
		}
	}
	return steps
}

// usual marks a storage that is the type's own.
const usual = " (default)"

// columns are the reference's columns of a table, in their order there.
func (c *comparison) columns(table string) []object {
	var all []object
	for _, p := range c.parts[table] {
		if p.kind == "column" {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b object) int { return cmp.Compare(a.ord, b.ord) })
	return all
}

// createTable makes a table without its defaults and constraints: they may need what is made later.
func (c *comparison) createTable(o object) step {
	head := fmt.Sprintf("create%s table %s", when(o.get("unlogged") != "", " unlogged"), o.quoted())
	tail := prefixed(" partition by ", o.get("partition key")) + prefixed(" using ", o.get("access method")) + prefixed(" tablespace ", o.get("tablespace"))
	if parent := o.get("partition of"); parent != "" {
		return do(rankMake, "%s partition of %s %s%s", head, parent, o.get("partition bound"), tail)
	}
	var columns []string
	for _, p := range c.columns(o.name) {
		if p.get("inherited") == "" {
			columns = append(columns, "    "+c.columnText(p)+when(p.get("not null") != "" && p.get("identity") == "", " not null"))
		}
	}
	return do(rankMake, "%s (\n%s\n)%s%s", head, strings.Join(columns, ",\n"), enclosed(" inherits (", o.get("inherits")), tail)
}

func (c *comparison) columnText(o object) string {
	s := postgres.Quote(o.part()) + " " + o.get("type") + prefixed(" collate ", o.get("collation"))
	switch {
	case o.get("generated") != "":
		s += " generated always as (" + o.get("generated") + ") stored"
	case o.get("virtual") != "":
		s += " generated always as (" + o.get("virtual") + ") virtual"
	case o.get("identity") != "":
		s += identityText(o)
	}
	return s
}

func identityText(o object) string {
	return fmt.Sprintf(" generated %s as identity (sequence name %s %s)", o.get("identity"), o.get("identity sequence"), o.get("identity options"))
}

func (c *comparison) addConstraint(o object) step {
	parent, _ := o.parent()
	rank := rankConstraint
	if strings.HasPrefix(o.get("definition"), "FOREIGN KEY") {
		rank = rankForeignKey
	}
	return do(rank, "alter table %s add constraint %s %s%s", postgres.Quote(parent), o.quoted(), o.get("definition"), when(o.get("not valid") != "", " not valid"))
}

// alter brings one attribute of an object that is there from have to want.
func (c *comparison) alter(want, have object, name, w, h string) []step {
	table, id := want.quoted(), want.quoted()
	if p, part := want.parent(); part {
		table = postgres.Quote(p)
	}
	kind := want.kind // as ALTER calls it
	switch kind {
	case "enum", "range type", "composite type", "base type":
		kind = "type"
	}
	one := func(rank int, format string, args ...any) []step { return []step{do(rank, format, args...)} }
	byHand := advise("The %s of %s %s is %s instead of %s: no statement changes that safely.", name, want.kind, shown(want.name), cmp.Or(h, "not there"), cmp.Or(w, "none"))
	switch name {
	case "owner":
		return []step{do(rankOwner, "alter %s %s owner to %s", kind, id, role(w)).noted("The owner changes: this line needs a superuser.")}
	case "grants":
		missing, surplus := apartFrom(w, h)
		return c.grants(want, missing, surplus)
	case "sequence grants":
		missing, surplus := apartFrom(w, h)
		return c.grants(object{kind: "sequence", name: unquote(have.get("identity sequence"))}, missing, surplus)
	case "definition":
		return c.redefine(want, have)
	case "unlogged":
		return one(rankSetting, "alter %s %s set %s", kind, id, cmp.Or(when(w != "", "unlogged"), "logged"))
	case "options", "toast options":
		return options(want, kind, table, id, name, w, h)
	case "replica identity":
		switch {
		case w == "":
			return one(rankSetting-1, "alter table %s replica identity default", table)
		case want.kind == "table":
			return one(rankSetting, "alter table %s replica identity %s", table, w)
		}
		return one(rankSetting, "alter table %s replica identity using index %s", table, id)
	case "clustered":
		if w == "" {
			return one(rankSetting-1, "alter table %s set without cluster", table)
		}
		return one(rankSetting, "alter table %s cluster on %s", table, id)
	case "enabled":
		verb := map[string]string{"": "enable", "no": "disable", "always": "enable always", "replica": "enable replica"}[w]
		return one(rankSetting, "alter table %s %s %s %s", table, verb, want.kind, id)
	}
	switch want.kind {
	case "table":
		switch name {
		case "row security":
			return one(rankSetting, "alter table %s %s row level security", id, cmp.Or(when(w != "", "enable"), "disable"))
		case "forced row security":
			return one(rankSetting, "alter table %s %sforce row level security", id, when(w == "", "no "))
		case "inherits":
			return inherits(id, w, h)
		case "tablespace":
			return []step{do(rankSetting, "alter table %s set tablespace %s", id, cmp.Or(w, "pg_default")).noted("It copies the table under an exclusive lock.")}
		}
	case "sequence":
		if name == "owned by" {
			return one(rankSetting, "alter sequence %s owned by %s", id, cmp.Or(w, "none"))
		}
	case "column":
		return c.alterColumn(want, have, name, w, h, byHand)
	case "constraint":
		switch {
		case name == "not valid" && w == "" && want.get("definition") == have.get("definition"):
			return one(rankForeignKey, "alter table %s validate constraint %s", table, id)
		case name == "disabled" && w == "":
			s := c.redefine(want, have)
			s[0] = s[0].noted("Its triggers were disabled. Made anew, it is checked against the rows written since.")
			return s
		case name == "not valid", name == "invalid":
			return c.redefine(want, have)
		}
	case "domain constraint", "index", "policy":
		return c.redefine(want, have)
	case "function", "procedure":
		if name == "returns" {
			return append([]step{do(rankAway, "drop %s %s", want.kind, id)}, c.create(want)...)
		}
	case "statistics":
		return one(rankSetting, "alter statistics %s set statistics %s", id, cmp.Or(w, "-1"))
	case "enum":
		if name == "labels" {
			return c.labels(want, w, h)
		}
	case "domain":
		switch name {
		case "not null":
			return one(rankNotNull, "alter domain %s %s not null", id, cmp.Or(when(w != "", "set"), "drop"))
		case "default":
			if w == "" {
				return one(rankDefault, "alter domain %s drop default", id)
			}
			return one(rankDefault, "alter domain %s set default %s", id, w)
		}
	}
	return byHand
}

func (c *comparison) alterColumn(want, have object, name, w, h string, byHand []step) []step {
	parent, _ := want.parent()
	table, id := postgres.Quote(parent), want.quoted()
	alter := func(rank int, format string, args ...any) []step {
		return []step{do(rank, "alter table "+table+" alter column "+id+" "+format, args...)}
	}
	if parentIs(c, want, "composite type") {
		return []step{do(rankColumn, "alter type %s alter attribute %s type %s%s", table, id, want.get("type"), prefixed(" collate ", want.get("collation")))}
	}
	switch name {
	case "type", "collation":
		if want.get("generated")+have.get("generated") != "" {
			return c.renew(want)
		}
		var steps []step
		if have.get("default") != "" {
			steps = append(steps, alter(rankColumn, "drop default")...)
		}
		steps = append(steps, do(rankColumn, "alter table %s alter column %s type %s%s using %s::%s", table, id, want.get("type"),
			prefixed(" collate ", want.get("collation")), id, want.get("type")).noted("It may rewrite the table under an exclusive lock, and fails where a value does not fit."))
		if want.get("default") != "" {
			steps = append(steps, alter(rankDefault, "set default %s", want.get("default"))...)
		}
		return steps
	case "not null":
		if w == "" {
			return alter(rankNotNull, "drop not null")
		}
		s := alter(rankNotNull, "set not null")
		s[0] = s[0].noted("It fails where a row has no value.")
		return s
	case "default":
		switch {
		case w == "":
			return alter(rankDefault, "drop default")
		case have.get("generated") != "", have.get("identity") != "":
			return alter(rankSetting, "set default %s", w)
		}
		return alter(rankDefault, "set default %s", w)
	case "generated", "virtual":
		if w == "" && want.get("virtual")+have.get("virtual")+want.get("generated") == "" {
			return alter(rankColumn, "drop expression")
		}
		return c.renew(want)
	case "identity":
		switch {
		case h == "":
			return []step{
				do(rankDefault, "alter table %s alter column %s add%s", table, id, identityText(want)),
				do(rankSetting, "select pg_catalog.setval(%s, (select coalesce(max(%s), 0) + 1 from %s), false)", literal(want.get("identity sequence")), id, table),
			}
		case w == "":
			return []step{{
				rank: rankSurplus, off: true, sql: fmt.Sprintf("alter table %s alter column %s drop identity", table, id),
				note: "WARNING: not in the migrations; dropping it loses the sequence's state.",
			}}
		}
		return alter(rankDefault, "set generated %s", w)
	case "identity sequence":
		return []step{do(rankDefault, "alter sequence %s rename to %s", h, w)}
	case "identity options":
		return []step{do(rankSetting, "alter sequence %s %s", want.get("identity sequence"), w)}
	case "storage":
		return alter(rankSetting, "set storage %s", strings.TrimSuffix(w, usual))
	case "compression":
		return alter(rankSetting, "set compression %s", cmp.Or(w, "default"))
	case "statistics":
		return alter(rankSetting, "set statistics %s", cmp.Or(w, "-1"))
	}
	return byHand
}

// renew makes a generated column anew. Its values are computed, what hangs on it is not.
func (c *comparison) renew(o object) []step {
	parent, _ := o.parent()
	return []step{{
		rank: rankSurplus, off: true,
		sql:  fmt.Sprintf("alter table %s drop column %s", postgres.Quote(parent), o.quoted()),
		note: fmt.Sprintf("WARNING: the column %s has to be made anew, which destroys what it holds and the indexes on it. Afterwards look for drift again.", shown(o.name)),
	}, {
		rank: rankSurplus, ord: 1, off: true,
		sql: fmt.Sprintf("alter table %s add column %s%s", postgres.Quote(parent), c.columnText(o), when(o.get("not null") != "", " not null")),
	}}
}

// redefine takes away an object that holds nothing of its own, and makes it anew.
func (c *comparison) redefine(want, have object) []step {
	parent, _ := want.parent()
	table, id := postgres.Quote(parent), want.quoted()
	var away step
	switch want.kind {
	case "view", "materialized view":
		away = do(rankAway, "drop %s %s", want.kind, id).noted("It fails where something else is built on it.")
	case "constraint":
		away = do(rankAway, "alter table %s drop constraint %s", table, id)
	case "domain constraint":
		away = do(rankAway, "alter domain %s drop constraint %s", table, id)
	case "trigger", "rule", "policy":
		away = do(rankAway, "drop %s %s on %s", want.kind, id, table)
	case "index", "statistics":
		away = do(rankAway, "drop %s %s", want.kind, id)
	case "function", "procedure":
		if want.get("returns") != have.get("returns") {
			return nil // said by the attribute returns
		}
		return []step{do(rankMake, "%s", want.get("definition"))}
	case "sequence":
		return []step{do(rankSetting, "alter sequence %s %s", id, want.get("definition"))}
	default:
		return advise("The %s %s differs: it has to be made anew by hand.", want.kind, shown(want.name))
	}
	return append([]step{away}, c.create(want)...)
}

// labels adds labels to an enum; none can be taken away.
func (c *comparison) labels(o object, w, h string) []step {
	want, have := strings.Split(w, comma), strings.Split(h, comma)
	var steps []step
	for i, label := range want {
		if slices.Contains(have, label) {
			continue
		}
		where := ""
		if i > 0 {
			where = " after " + want[i-1]
		} else if len(have) > 0 && h != "" {
			where = " before " + have[0]
		}
		// A new label cannot be used in the transaction that adds it.
		steps = append(steps, step{rank: rankBefore, ord: uint32(i), sql: "alter type " + markName + "." + o.quoted() + " add value if not exists " + label + where})
	}
	for _, label := range have {
		if !slices.Contains(want, label) {
			return append(steps, advise("The enum %s has the label %s too much: PostgreSQL takes none away; it has to be made anew by hand.", o.name, label)...)
		}
	}
	if len(steps) == 0 {
		return advise("The labels of the enum %s stand in another order: it has to be made anew by hand.", o.name)
	}
	return steps
}

// options sets and resets storage parameters.
func options(want object, kind, table, id, name, w, h string) []step {
	missing, surplus := apartFrom(w, h)
	verb := fmt.Sprintf("alter %s %s", kind, id)
	if want.kind == "column" {
		verb = fmt.Sprintf("alter table %s alter column %s", table, id)
	}
	prefix := when(name == "toast options", "toast.")
	var set, reset []string
	for _, o := range missing {
		n, v, _ := strings.Cut(o, "=")
		set = append(set, prefix+n+" = "+literal(v))
	}
	for _, o := range surplus {
		n, _, _ := strings.Cut(o, "=")
		if !slices.ContainsFunc(missing, func(m string) bool { return strings.HasPrefix(m, n+"=") }) {
			reset = append(reset, prefix+n)
		}
	}
	var steps []step
	if len(reset) > 0 {
		steps = append(steps, do(rankSetting, "%s reset (%s)", verb, strings.Join(reset, ", ")))
	}
	if len(set) > 0 {
		steps = append(steps, do(rankSetting, "%s set (%s)", verb, strings.Join(set, ", ")))
	}
	return steps
}

func inherits(id, w, h string) []step {
	var steps []step
	split := func(s string) []string {
		if s == "" {
			return nil
		}
		return strings.Split(s, ", ")
	}
	for _, p := range split(h) {
		if !slices.Contains(split(w), p) {
			steps = append(steps, do(rankAway, "alter table %s no inherit %s", id, p))
		}
	}
	for _, p := range split(w) {
		if !slices.Contains(split(h), p) {
			steps = append(steps, do(rankConstraint, "alter table %s inherit %s", id, p))
		}
	}
	return steps
}

// grants gives the missing rights and proposes to take the surplus away.
func (c *comparison) grants(o object, missing, surplus []string) []step {
	var steps []step
	for _, g := range byRole(missing) {
		steps = append(steps, do(rankGrant, "%s to %s%s", right("grant ", g.privileges, o), role(g.role), when(g.option, " with grant option")))
	}
	// A right that stays, without the option to pass it on, is no right too much; nor is one that stays with it.
	var rights, passing []string
	for _, entry := range surplus {
		bare, option := strings.CutSuffix(entry, "*")
		switch {
		case option && slices.Contains(missing, bare):
			passing = append(passing, bare)
		case !slices.Contains(missing, entry+"*"):
			rights = append(rights, bare)
		}
	}
	revoke := func(verb string, entries []string) {
		for _, g := range byRole(entries) {
			steps = append(steps, step{
				rank: rankSurplus, ord: 10, off: true, sql: right(verb, g.privileges, o) + " from " + role(g.role),
				note: "WARNING: not in the migrations; somebody may rely on it.",
			})
		}
	}
	revoke("revoke ", rights)
	revoke("revoke grant option for ", passing)
	return steps
}

// granted are the rights of one role on one object.
type granted struct {
	role       string
	option     bool // to pass them on
	privileges []string
}

func byRole(entries []string) []granted {
	var all []granted
	for _, entry := range entries {
		i := strings.LastIndex(entry, ":")
		privilege, option := strings.CutSuffix(entry[i+1:], "*")
		at := slices.IndexFunc(all, func(g granted) bool { return g.role == entry[:i] && g.option == option })
		if at < 0 {
			at, all = len(all), append(all, granted{role: entry[:i], option: option})
		}
		all[at].privileges = append(all[at].privileges, privilege)
	}
	return all
}

func right(verb string, privileges []string, o object) string {
	all := strings.Join(privileges, ", ")
	switch o.kind {
	case "column":
		parent, _ := o.parent()
		of := " (" + o.quoted() + ")"
		return verb + strings.Join(privileges, of+", ") + of + " on table " + postgres.Quote(parent)
	case "default privileges":
		of, objects, _ := strings.Cut(o.name, apart)
		return "alter default privileges for role " + role(of) + " in schema " + markName + " " + verb + all + " on " + objects
	}
	return verb + all + " on " + target(o)
}

// target is an object as GRANT names it.
func target(o object) string {
	switch o.kind {
	case "schema":
		return "schema " + o.quoted()
	case "view", "materialized view", "foreign table":
		return "table " + o.quoted()
	case "enum", "range type", "base type":
		return "type " + o.quoted()
	case "aggregate":
		return "function " + o.quoted()
	}
	return o.kind + " " + o.quoted()
}

// drop proposes to take away what is too much.
func drop(o object) []step {
	id, kind := o.quoted(), o.kind
	parent, _ := o.parent()
	table := postgres.Quote(parent)
	s := step{rank: rankSurplus, off: true, ord: 5, note: "WARNING: not in the migrations; somebody may rely on it."}
	switch o.kind {
	case "enum", "range type", "composite type", "base type":
		kind, s.ord = "type", 9
	case "domain", "sequence", "function", "procedure", "aggregate":
		s.ord = 8
	case "table", "foreign table", "materialized view":
		s.ord = 7
		s.note = "WARNING: not in the migrations; dropping it destroys what it holds."
	}
	switch o.kind {
	case "column":
		s.sql, s.ord = fmt.Sprintf("alter table %s drop column %s", table, id), 6
		s.note = "WARNING: not in the migrations; dropping it destroys what it holds."
	case "constraint":
		s.sql = fmt.Sprintf("alter table %s drop constraint %s", table, id)
	case "domain constraint":
		s.sql = fmt.Sprintf("alter domain %s drop constraint %s", table, id)
	case "trigger", "rule", "policy":
		s.sql = fmt.Sprintf("drop %s %s on %s", kind, id, table)
	case "default privileges":
		c := &comparison{}
		return c.grants(o, nil, list(o.get("grants")))
	case "operator", "operator class", "collation", "conversion", "text search configuration", "text search dictionary", "extension":
		return advise("The %s %s is too much. Whether anything needs it has to be found out by hand.", o.kind, o.name)
	default:
		s.sql = fmt.Sprintf("drop %s %s", kind, id)
	}
	return []step{s}
}

// quoted is the object's own name as SQL: of a part the part's. Functions are SQL already.
func (o object) quoted() string {
	switch o.kind {
	case "function", "procedure", "aggregate":
		return o.name
	case "schema":
		return markName
	}
	if _, part := o.parent(); part {
		return postgres.Quote(o.part())
	}
	return postgres.Quote(o.name)
}

func parentIs(c *comparison, o object, kind string) bool {
	parent, _ := o.parent()
	_, is := c.want[kind+"\x1e"+parent]
	return is
}

func role(name string) string {
	switch name {
	case markTenant, markOwner, markSelf, "public":
		return name
	}
	return postgres.Quote(name)
}

func roles(names string) string {
	all := list(names)
	for i, n := range all {
		all[i] = role(n)
	}
	return strings.Join(all, ", ")
}

func literal(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

func unquote(identifier string) string {
	if s, quoted := strings.CutPrefix(identifier, `"`); quoted {
		return strings.ReplaceAll(strings.TrimSuffix(s, `"`), `""`, `"`)
	}
	return identifier
}

func when(is bool, text string) string {
	if is {
		return text
	}
	return ""
}

func prefixed(prefix, s string) string {
	if s == "" {
		return ""
	}
	return prefix + s
}

func enclosed(before, s string) string {
	if s == "" {
		return ""
	}
	return before + s + ")"
}
